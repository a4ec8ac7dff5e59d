"""What a reduction gains and costs on somebody's own model, images and machine.

    table = tokred.evaluate(model, "flowers/val", methods=("tome", "atc"), keep_rates=(0.7, 0.5))
    table.plot()
    print(table.best(max_drop=0.5).code)

This file holds the values: one `Row` for each setting, and the `Evaluation` that has all of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Speed:
    """What a model costs to run, as it was measured here.

    Attributes:
        images_per_second: with the batch of the evaluation.
        latency: seconds for one image alone.
        mult_adds: multiply-adds per image, counted; None where they could not be.
        peak_memory: bytes that tensors of one pass took at most, beyond what was there before.
    """

    images_per_second: float
    latency: float
    mult_adds: float | None
    peak_memory: int | None


@dataclass(frozen=True)
class Row:
    """One setting: what it does to the answers, and to the time.

    Attributes:
        method: as it was asked for, such as "atc:single"; "dense" for the model as it is.
        keep_rate: of the schedule, where it has one; None of others and of the dense model.
        code: the line that applies it; empty for the dense model.
        tokens: patch tokens that enter the model.
        counts: patch tokens after each layer.
        images: how many were looked at.
        metrics: scores against the labels, by name, the leading one first: percent, or, of depth,
            what the metric is in. Empty without labels.
        compared: how many images were compared with the dense model.
        agreement: percent of decisions (classes of images, pixels or queries) that are the dense
            model's; None where nothing is decided.
        kl: mean Kullback-Leibler divergence of its probabilities from the dense model's, in nats;
            None where there are none.
        cosine: mean cosine between its final features and the dense model's.
        speed: measured in turns with the dense model,
        dense: which took this in the same run, and with
        limit: the free limit, tokens cut off to the same numbers; None of the dense model.
    """

    method: str
    keep_rate: float | None
    code: str
    tokens: int
    counts: tuple[int, ...]
    images: int
    metrics: dict[str, float]
    compared: int
    agreement: float | None
    kl: float | None
    cosine: float | None
    speed: Speed
    dense: Speed
    limit: Speed | None = None

    @property
    def speed_up(self) -> float:
        """Over the dense model, in images per second."""
        return self.speed.images_per_second / self.dense.images_per_second

    @property
    def latency_speed_up(self) -> float:
        """Over the dense model, for one image alone."""
        return self.dense.latency / self.speed.latency

    @property
    def free_limit(self) -> float:
        """The speed-up of cutting tokens off at no cost: no method can be faster."""
        return (
            1.0
            if self.limit is None
            else (self.limit.images_per_second / self.dense.images_per_second)
        )

    @property
    def name(self) -> str:
        """Method and keep rate."""
        return self.method if self.keep_rate is None else f"{self.method} {self.keep_rate:g}"


@dataclass(frozen=True)
class Evaluation:
    """The table that `tokred.evaluate` has made.

    Attributes:
        model: class or name of the model.
        data: what it was tried on, in words.
        task: "classification", "multilabel", "segmentation", "depth", "relative depth", or
            "unlabelled".
        leading: the metric that settings are compared by: the first of `Row.metrics`, or
            "agreement" (with the dense model) where there are no labels.
        higher_is_better: whether more of it is better.
        unit: of the leading metric: "%" or "".
        device, dtype, threads, batch: what it was measured on.
        versions: of the libraries.
        rows: the dense model first, then every setting.
        refused: settings that cannot be, with the reason.
    """

    model: str
    data: str
    task: str
    leading: str
    higher_is_better: bool
    unit: str
    device: str
    dtype: str
    threads: int
    batch: int
    versions: dict[str, str]
    rows: tuple[Row, ...]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def dense(self) -> Row:
        """The model as it is."""
        return self.rows[0]

    @property
    def settings(self) -> tuple[Row, ...]:
        """All rows but the dense model's."""
        return self.rows[1:]

    def score(self, row: Row) -> float:
        """The leading metric of a row; of the dense model's agreement with itself, 100."""
        if self.leading == "agreement":
            return 100.0 if row.agreement is None else row.agreement
        return row.metrics[self.leading]

    def drop(self, row: Row) -> float:
        """By how much a row is worse than the dense model in the leading metric."""
        change = self.score(self.dense) - self.score(row)
        return change if self.higher_is_better else -change

    def front(self) -> tuple[Row, ...]:
        """The settings that no other is both faster and better than, the slowest first; the dense
        model among them."""
        best: list[Row] = []
        for row in sorted(self.rows, key=lambda row: (-row.speed_up, self.drop(row))):
            if not best or self.drop(row) < self.drop(best[-1]):
                best.append(row)
        return tuple(reversed(best))

    def best(self, max_drop: float | None = None, min_speed_up: float | None = None) -> Row:
        """The fastest setting that loses at most `max_drop` of the leading metric, or the one that
        loses least among those that are `min_speed_up` times as fast; with both, the fastest.

        Raises:
            ValueError: neither is given.
            LookupError: no setting is good enough; the message names the nearest one.
        """
        if max_drop is None and min_speed_up is None:
            raise ValueError("give max_drop (points of the leading metric) or min_speed_up")
        good = [
            row
            for row in self.settings
            if (max_drop is None or self.drop(row) <= max_drop)
            and row.speed_up >= (min_speed_up or 1.0)
        ]
        if not good:
            raise LookupError(self._nearest(max_drop, min_speed_up))
        if max_drop is None:
            return min(good, key=lambda row: (self.drop(row), -row.speed_up))
        return max(good, key=lambda row: (row.speed_up, -self.drop(row)))

    def _nearest(self, max_drop: float | None, min_speed_up: float | None) -> str:
        wanted = " and ".join(
            [f"loses at most {max_drop:g} of {self.leading}"] * (max_drop is not None)
            + [f"is {min_speed_up:g} times as fast"] * (min_speed_up is not None)
        )
        if not self.settings:
            return f"no setting {wanted}: none was measured"
        if max_drop is not None:
            least = min(self.settings, key=self.drop)
        else:
            least = max(self.settings, key=lambda row: row.speed_up)
        return (
            f"no setting of the {len(self.settings)} that were measured {wanted}; nearest is "
            f"{least.name}, {self.drop(least):.2f} worse at {least.speed_up:.2f}x"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; `from_dict` makes it again."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> Evaluation:
        """What `as_dict` has stored."""
        return Evaluation(**{**stored, "rows": tuple(row_from(row) for row in stored["rows"])})


def row_from(stored: dict[str, Any]) -> Row:
    """A row that `dataclasses.asdict` has stored."""
    speeds = {
        name: None if stored[name] is None else Speed(**stored[name])
        for name in ("speed", "dense", "limit")
    }
    return Row(**{**stored, **speeds, "counts": tuple(stored["counts"])})
