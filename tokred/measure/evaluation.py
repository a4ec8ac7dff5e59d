"""The values of `tokred.evaluate`: a `Row` for each setting, and the `Evaluation` with all rows.

table = tokred.evaluate(model, "flowers/val", methods=("tome", "atc"), keep_rates=(0.7, 0.5))
table.plot()
print(table.best(max_drop=0.5).code)
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from tokred.measure.results import Result, drawn
from tokred.optional import require

BUSY = 1.3
"""A warning is given if the dense model takes this many times as long in one row as in another."""
UNSURE = 0.05
"""A warning is given if the standard error of a speed-up is a larger share of it."""


@dataclass(frozen=True)
class Speed:
    """What it costs to run a model, as measured on this machine.

    Attributes:
        images_per_second: for batches of the size of the evaluation.
        latency: seconds for one image alone.
        mult_adds: multiply-adds per image; None if they could not be counted.
        peak_memory: the most bytes that the tensors of a pass took, not counting what was there
            before.
        error: standard error of the speed-up over the dense model, as a share of it; 0 for the
            dense model itself.
    """

    images_per_second: float
    latency: float
    mult_adds: float | None
    peak_memory: int | None
    error: float = 0.0


@dataclass(frozen=True)
class Row:
    """What one setting does to the answers and to the time.

    Attributes:
        method: as it was asked for, such as "atc:single"; "dense" for the dense model.
        keep_rate: of the schedule, if it has one; None otherwise.
        code: the line that applies it; empty for the dense model.
        tokens: patch tokens that enter the model.
        counts: patch tokens after each layer.
        images: how many images were used.
        metrics: scores against the labels, by name, the leading one first: in percent; for depth,
            in the unit of the metric. Empty without labels.
        compared: how many images were compared with the dense model.
        agreement: percentage of decisions (classes of images, pixels or queries) that are the same
            as the dense model's; None if the model decides nothing.
        kl: mean Kullback-Leibler divergence of the probabilities from the dense model's, in nats;
            None if there are no probabilities.
        cosine: mean cosine between the final features and the dense model's.
        depth_error: mean distance of the depths from the dense model's, in percent of those; None
            if the model estimates no depth.
        speed: of the setting, measured in turns with the dense model and the free limit.
        dense: the dense model's speed in the same run.
        limit: the free limit's speed in the same run (tokens cut off to the same numbers); None in
            the dense model's row.
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
    depth_error: float | None
    speed: Speed
    dense: Speed
    limit: Speed | None = None

    @property
    def speed_up(self) -> float:
        """The speed-up over the dense model, in images per second."""
        return self.speed.images_per_second / self.dense.images_per_second

    @property
    def latency_speed_up(self) -> float:
        """The speed-up over the dense model, for one image alone."""
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


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """The table that `tokred.evaluate` has made.

    Attributes:
        model: class or name of the model.
        data: what it was tried on, in words.
        task: "classification", "multilabel", "segmentation", "depth", "relative depth", or
            "unlabelled".
        leading: the metric that settings are compared by: the first of `Row.metrics`. Without
            labels, "agreement" with the dense model, or, if the model decides nothing,
            "depth_error" or "cosine".
        higher_is_better: whether more of it is better.
        unit: the unit of the leading metric: "%" or "".
        device, dtype, threads, batch: what it was measured on.
        versions: the versions of libraries.
        rows: the dense model first, then every setting.
        refused: settings that the model does not take, with the reason.
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
        """The row of the dense model."""
        return self.rows[0]

    @property
    def settings(self) -> tuple[Row, ...]:
        """All rows but the dense model's."""
        return self.rows[1:]

    def score(self, row: Row) -> float:
        """The value of the leading metric in a row; a cosine in percent."""
        if self.leading in row.metrics:
            return row.metrics[self.leading]
        close = getattr(row, self.leading)
        return float(close) * (100 if self.leading == "cosine" else 1)

    def drop(self, row: Row) -> float:
        """By how much a row is worse than the dense model in the leading metric."""
        change = self.score(self.dense) - self.score(row)
        return change if self.higher_is_better else -change

    def images_per_second(self, row: Row) -> float:
        """The speed-up of a row times the dense model's images per second, of which the median over
        all rows is taken. So rows can be compared with each other, even if the machine was slower
        while some of them were measured. What was measured is in `Row.speed`."""
        return statistics.median(r.dense.images_per_second for r in self.rows) * row.speed_up

    def latency(self, row: Row) -> float:
        """Seconds for one image alone, made comparable as in `images_per_second`."""
        return statistics.median(r.dense.latency for r in self.rows) / row.latency_speed_up

    def warnings(self) -> list[str]:
        """Warnings for readers of the speeds, in sentences."""
        told = []
        paces = [self.batch / row.dense.images_per_second for row in self.rows]
        error = max(row.speed.error for row in self.rows)
        if max(paces) > BUSY * min(paces) or error > UNSURE:
            told.append(
                "The machine was busy with other work: the dense model took from "
                f"{1e3 * min(paces):.3g} to {1e3 * max(paces):.3g} ms per batch, and speed-ups are "
                f"unsure by up to {100 * error:.0f} %. Measure again when it is quiet "
                "(fresh=True), or for longer (seconds=)."
            )
        # A high keep rate gains little anywhere.
        few = [r for r in self.settings if sum(r.counts) < 0.75 * r.tokens * len(r.counts)]
        if few and max(row.free_limit for row in few) < 1.1:
            told.append(
                "Even tokens cut off at no cost gain next to nothing here: the time goes into "
                "starting operators. Try a larger batch or image, or torch.compile."
            )
        return told

    def front(self) -> tuple[Row, ...]:
        """The settings to which no other is superior in speed and score at once, the slowest first.
        The dense model counts as one of them."""
        best: list[Row] = []
        rows = [row for row in self.rows if math.isfinite(self.score(row))]
        for row in sorted(rows, key=lambda row: (-row.speed_up, self.drop(row))):
            if not best or self.drop(row) < self.drop(best[-1]):
                best.append(row)
        return tuple(reversed(best))

    def within(self, max_drop: float) -> tuple[Row, ...]:
        """The settings that lose at most `max_drop` of the leading metric and are not slower than
        the dense model, the slowest first."""
        kept = [r for r in self.settings if self.drop(r) <= max_drop and r.speed_up >= 1]
        return tuple(sorted(kept, key=lambda row: (row.speed_up, -self.drop(row))))

    def best(self, max_drop: float | None = None, min_speed_up: float | None = None) -> Row:
        """The best setting within bounds.

        Args:
            max_drop: the fastest setting is returned that loses at most this many points of the
                leading metric.
            min_speed_up: the setting is returned that loses least among those with at least this
                speed-up. With both, the fastest one.

        Raises:
            ValueError: neither is given.
            LookupError: no setting is within the bounds; the message names the nearest one.
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
        wants = []
        if max_drop is not None:
            wants.append(f"loses at most {max_drop:g} of {self.leading}")
        if min_speed_up is not None:
            wants.append(f"is {min_speed_up:g} times as fast")
        wanted = " and ".join(wants)
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

    def lines(self) -> list[str]:
        """The table as text: its head, and a line for every row."""
        names = [*self.dense.metrics] if self.dense.metrics else []
        head = (
            f"{'method':22s}{'keep':>5s}"
            + "".join(f"{name:>9s}" for name in names)
            + f"{'agree':>8s}{'KL':>9s}{'cosine':>8s}{'images/s':>10s}{'speed-up':>9s}"
            + f"{'±':>5s}{'limit':>6s}{'latency':>10s}{'G mult':>8s}{'MiB':>7s}  tokens"
        )
        return [head, *map(self._line, self.rows)]

    def _line(self, row: Row) -> str:
        def cell(x: float | None, wide: int, digits: int, by: float = 1.0) -> str:
            return " " * wide if x is None else f"{x * by:{wide}.{digits}f}"

        speed = row.speed
        counts = " ".join(map(str, dict.fromkeys((row.tokens, *row.counts))))
        return (
            f"{row.method:22s}{'' if row.keep_rate is None else f'{row.keep_rate:g}':>5s}"
            + "".join(cell(x, 9, 2 if abs(x) >= 1 else 4) for x in row.metrics.values())
            + cell(row.agreement, 8, 2)
            + cell(row.kl, 9, 4)
            + cell(row.cosine, 8, 4)
            + cell(self.images_per_second(row), 10, 1)
            + f"{row.speed_up:8.2f}x"
            + (" " * 5 if row.limit is None else f"{100 * speed.error:4.0f}%")
            + f"{row.free_limit:6.2f}{self.latency(row) * 1e3:7.1f} ms"
            + cell(speed.mult_adds, 8, 3, 1e-9)
            + cell(speed.peak_memory, 7, 1, 2**-20)
            + f"  {counts}"
        )

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        images = self.dense.images
        lines = [
            f"{self.model} on {self.data}: {images} images, {self.task}",
            *self.lines(),
            *(f"refused: {name}: {reason}" for name, reason in self.refused.items()),
            "the front, slowest first: " + ", ".join(row.name for row in self.front()),
            *self.warnings(),
            f"batch {self.batch}, {self.dtype}, {self.device}, {self.threads} threads, {versions}",
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def to_pandas(self) -> Any:
        """A pandas data frame with a row for every setting.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return require("pandas", "evaluate").DataFrame([self._flat(row) for row in self.rows])

    def _flat(self, row: Row) -> dict[str, Any]:
        close = {n: getattr(row, n) for n in ("agreement", "kl", "cosine", "depth_error")}
        limits = row.limit and {
            f"limit_{name}": x for name, x in dataclasses.asdict(row.limit).items()
        }
        front = self.front()
        return {
            "method": row.method,
            "keep_rate": row.keep_rate,
            **row.metrics,
            "drop": self.drop(row),
            **{name: x for name, x in close.items() if x is not None},
            "speed_up": row.speed_up,
            "free_limit": row.free_limit,
            "latency_speed_up": row.latency_speed_up,
            **dataclasses.asdict(row.speed),
            "images_per_second": self.images_per_second(row),
            "latency": self.latency(row),
            **(limits or {}),
            "front": row in front,
            "tokens": row.counts,
            "images": row.images,
            "code": row.code,
        }

    def plot(self, axes: Any = None) -> Any:
        """The leading metric against the measured speed-up, with a line for each method. The
        settings of the front have a ring, and a broken line joins them.

        Args:
            axes: where to draw; a figure of its own if not given.

        Returns:
            The figure.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed.
        """
        return drawn(self, "plot", axes)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it, for `from_dict`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> Evaluation:
        """An evaluation that `as_dict` has stored."""
        return Evaluation(**{**stored, "rows": tuple(row_from(row) for row in stored["rows"])})


def row_from(stored: dict[str, Any]) -> Row:
    """A row that `dataclasses.asdict` has stored."""
    speeds = {
        name: None if stored[name] is None else Speed(**stored[name])
        for name in ("speed", "dense", "limit")
    }
    return Row(**{**stored, **speeds, "counts": tuple(stored["counts"])})
