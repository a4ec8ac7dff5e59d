"""The sentences of an advice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tokred.data.inputs import pixels
from tokred.measure.advise.values import Candidate
from tokred.measure.evaluation import Evaluation, Row
from tokred.measure.payoff import WORTH, estimate
from tokred.measure.work import Work


def advised(table: Evaluation, wanted: str, good: Sequence[Candidate]) -> tuple[str, ...]:
    """What to say about the best candidate.

    Args:
        table: the evaluation.
        wanted: the budget, in words.
        good: the candidates that meet the budget, the best one first.
    """
    best, *others = good
    row, unit = best.row, table.unit
    score, dense = table.score(row), table.score(table.dense)
    told = [
        f"{wanted[0].upper()}{wanted[1:]}: {best.setting.method}, "
        f"{'a schedule found for this model' if best.searched else 'one keep rate'}.",
        f"Measured on {row.images} images: {table.leading} {score:.2f}{unit} (dense "
        f"{dense:.2f}{unit}, {score - dense:+.2f}); {row.speed_up:.2f}x as fast "
        f"(±{100 * row.speed.error:.0f} %) at batch {table.batch} ({row.latency_speed_up:.2f}x "
        f"for one image alone), free limit {row.free_limit:.2f}x.",
    ]
    alone = one_alone(row)
    if table.batch > 1 and alone:
        told.append(alone)
    if row.agreement is not None and table.unit == "%":
        # How many answers have changed bounds how far the drop on other images may be from this
        # one: by two standard errors of that share, or, if none has changed, by the rule of three.
        changed, many = 1 - row.agreement / 100, max(1, row.compared)
        error = 100 * max(2 * math.sqrt(changed / many), 3 / many)
        told.append(
            f"{row.agreement:.1f} % of the answers agree with the dense model's; on other images "
            f"of this kind, the change of {table.leading} should differ from this one by at most "
            f"{error:.1f} points."
        )
    rival = next((c for c in others if not c.searched), None)
    if best.searched and rival is not None:
        told.append(
            f"The best uniform keep rate that meets the budget: {rival.setting.name}, "
            f"{table.score(rival.row):.2f}{unit} at {rival.row.speed_up:.2f}x."
        )
    return tuple(told)


def one_alone(row: Row) -> str:
    """What to say of one image at a time; empty if that is faster, too."""
    if row.latency_speed_up >= WORTH or row.limit is None:
        return ""
    times = (speed.latency for speed in (row.dense, row.speed, row.limit))
    return f"One image alone gains nothing. {estimate(1, row.tokens, *times)}"


def limits(
    work: Work, free: Mapping[float, float], speed_up: float | None = None
) -> tuple[str, ...]:
    """What cutting tokens off at no cost would gain, and why that is less than what was asked.

    Args:
        work: measures settings on the model and the images.
        free: the speed-ups of the free limit, by keep rate.
        speed_up: what was asked, if it was a speed-up.
    """
    where = f"batch {len(pixels(work.inputs))} on {work.batches.device.type}"
    gains = ", ".join(f"{gain:.2f}x at keep rate {rate:g}" for rate, gain in free.items())
    told = [
        f"The free limit (tokens cut off at no cost, which no method can beat) with {where}: "
        f"{gains}."
    ]
    if speed_up is None:
        return tuple(told)
    enough = [rate for rate, gain in free.items() if gain >= speed_up]
    if enough:
        told.append(f"So a {speed_up:g}x speed-up needs a keep rate of at most {max(enough):g}.")
    elif max(free.values()) < 1.1:
        told.append(
            "The time goes into starting operators rather than into tokens: try a larger batch or "
            "image, or torch.compile."
        )
    else:
        told.append(f"A {speed_up:g}x speed-up is out of reach of every method.")
    return tuple(told)


def measured(table: Evaluation, candidate: Candidate) -> str:
    """A candidate, what it loses and what it gains."""
    return (
        f"{candidate.setting.name}, {table.drop(candidate.row):.2f} points of {table.leading} "
        f"lost at {candidate.row.speed_up:.2f}x"
    )
