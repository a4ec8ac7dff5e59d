"""`tokred.evaluate`: a model, somebody's images, and every setting that is worth a look.

Accuracy and closeness to the dense model are counted image by image, in the same batches however
many processes share them, so that the table does not depend on their number. Speed is measured by
one process while the others wait: the dense model, the setting and the free limit take turns, as
in `tokred.bench`.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tokred.data import samples as sampling
from tokred.data.inputs import Inputs, call, pixels
from tokred.data.samples import Samples, Transform
from tokred.engine import Layout, Reduction
from tokred.host import Denoiser, Host, UnsupportedModelError, find_host, module_of
from tokred.measure.cost import (
    count,
    counts_of,
    device_name,
    first_of,
    free_limit_of,
    measure,
    peak_memory,
    put_back,
    sides,
    versions_of,
)
from tokred.measure.evaluation import Evaluation, Row, Speed, row_from
from tokred.measure.fidelity import Difference, Fidelity, Seen, compare, seeing, total
from tokred.measure.metrics import TASKS, Scores, Task, task_of
from tokred.optional import require
from tokred.patching import apply, hang, host_of, reduction_of, remove, uncompiled
from tokred.patching.presets import Preset
from tokred.reducers import Reducer, learned, names, parse
from tokred.schedule import Schedule

METHODS = ("tome", "atc", "dpc_knn", "evit")
"""The methods that are tried if none are named: merging by pairs, by clusters, by density; and
pruning."""
DENSE_METHODS = ("slic", "tome", "atc")
"""The same, of models that answer for every pixel."""
KEEP_RATES = (0.9, 0.7, 0.5, 0.3)
WORK, MOST = 20e9, 32
"""Multiply-adds that a batch may take on the CPU, and images in it, if its size is not given: so
that small models are busy with tokens, and many rounds of large ones can be measured."""
SURE, PATIENCE = 0.03, 3
"""The standard error of a speed-up that is good enough, and how many times as long as asked it is
measured to get there."""
HELD = 2**30
"""Bytes of images, and of what the dense model made of them, that are kept in memory."""


@dataclass(frozen=True)
class Setting:
    """One reduction to try.

    Attributes:
        method: how it is called in the table.
        reducer: the method, or a preset.
        schedule: a keep rate or a schedule; None: what the method or preset brings.
    """

    method: str
    reducer: Reducer | Preset
    schedule: float | Schedule | None

    @property
    def keep_rate(self) -> float | None:
        """Of the schedule, if it has one."""
        rate = getattr(self.schedule, "keep_rate", self.schedule)
        return rate if isinstance(rate, float | int) else None

    @property
    def name(self) -> str:
        """Method and keep rate, or schedule."""
        if self.schedule is None:
            return self.method
        return f"{self.method} {self.schedule}"

    @property
    def code(self) -> str:
        """The line that applies it."""
        arguments = [_written(self.reducer)]
        if isinstance(self.schedule, float | int):
            arguments.append(f"keep_rate={self.schedule:g}")
        elif self.schedule is not None:
            arguments.append(_written(self.schedule))
        return f"tokred.apply(model, {', '.join(arguments)})"


def settings_of(
    methods: Iterable[str | Reducer | Preset] | Mapping[str, Reducer | Preset],
    keep_rates: Iterable[float | Schedule],
    schedule: Callable[[float], Schedule] | None = None,
) -> list[Setting]:
    """Every method at every keep rate; presets, and methods with trained gates, once.

    Args:
        methods: names, with options after a colon (`"atc:single"`), methods or presets; or such
            with names of one's own.
        keep_rates: numbers in (0, 1], or schedules.
        schedule: what makes a schedule of a keep rate, such as `tokred.Hourglass`; if not given,
            what `tokred.apply` makes.

    Raises:
        ValueError: no method has that name, or it has no such option.
        TypeError: it is no method.
    """
    given = methods.items() if isinstance(methods, Mapping) else ((None, m) for m in methods)
    rates = [
        schedule(rate) if schedule is not None and isinstance(rate, float | int) else rate
        for rate in keep_rates
    ]
    found = []
    for name, method in given:
        reducer = method_of(method) if isinstance(method, str) else method
        text = name or (method if isinstance(method, str) else spelled(reducer))
        once = isinstance(reducer, Preset) or (learned(reducer) and _gates_in(reducer))
        for rate in [None] if once else rates:
            found.append(Setting(text, reducer, rate))
    return found


def method_of(text: str) -> Reducer | Preset:
    """A method, with options after a colon, or a preset, as they are written on the command line.

    Raises:
        ValueError: no method has that name, or it has no such option.
    """
    return tokred.presets[text] if text in tokred.presets else parse(text)


def spelled(reducer: Reducer | Preset) -> str:
    """A method as the command line has it: its name, with the options that are not the default."""
    for name, preset in tokred.presets.items():
        if preset is reducer:
            return name
    for name in names():
        usual: Any = parse(name)
        same = type(reducer) is type(usual)
        if same:
            changed = [
                f"{field.name}={getattr(reducer, field.name)}"
                for field in dataclasses.fields(usual)
                if field.compare and getattr(reducer, field.name) != getattr(usual, field.name)
            ]
            return f"{name}:{','.join(changed)}" if changed else name
    return str(reducer)


def _gates_in(reducer: Any) -> bool:
    return isinstance(reducer.gates, str | Path)


def _written(value: Any) -> str:
    """A value as somebody would write it."""
    if isinstance(value, Preset):
        return f'tokred.presets["{spelled(value)}"]'
    name = spelled(value) if hasattr(value, "needs") else ""
    if name in names():
        return f'"{name}"'
    ours = type(value).__name__ in tokred.__all__
    shown = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in dataclasses.fields(value)
        if field.init and getattr(value, field.name) != field.default
    ]
    return f"{'tokred.' if ours else ''}{type(value).__name__}({', '.join(shown)})"


def evaluate(
    model: Any,
    data: Any,
    methods: Iterable[str | Reducer | Preset] | Mapping[str, Reducer | Preset] | None = None,
    keep_rates: Iterable[float | Schedule] = KEEP_RATES,
    *,
    schedule: Callable[[float], Schedule] | None = None,
    task: str | None = None,
    labelled: bool = True,
    transform: Transform | None = None,
    batch: int | None = None,
    limit: int | None = None,
    compared: int = 256,
    seconds: float = 2.0,
    workers: int = 0,
    host: Host | None = None,
    name: str | None = None,
    cache: str | Path | bool = True,
    fresh: bool = False,
    progress: bool = True,
    on_row: Callable[[Evaluation], None] | None = None,
) -> Evaluation:
    """What every setting gains and costs, on this model, these images and this machine.

    With labels: accuracy. With and without: how close the reduced model stays to the dense one.
    Of the dense model, every setting and the free limit: images per second, latency of one image,
    multiply-adds, peak memory. The model is left as it was.

    Finished settings are kept on disk, and not measured again for the same weights, data, options,
    versions and machine: what was interrupted goes on where it was. Under `accelerate launch`, all
    processes share the images.

    >>> table = tokred.evaluate(model, "flowers/val", methods=("tome", "atc"))
    >>> table.best(max_drop=0.5).code

    Args:
        model: a supported model, in evaluation mode, on its device and in its dtype.
        data: a folder of pictures, or of folders of them, one for each class, or with `images` and
            `labels` or `depth` in it; "hf:NAME" or a Hugging Face dataset; a dataset or loader of
            torch or timm; a list of pictures, paths or tensors; a tensor; `zoo.held_out()`.
        methods: what to try: names (`"atc:single"`), methods, presets; or such by names of one's
            own. If not given, tome, atc, dpc_knn and evit; of models that answer for every pixel,
            slic, tome and atc.
        keep_rates: numbers in (0, 1], or schedules; each for each method.
        schedule: what makes a schedule of a keep rate, such as `tokred.Hourglass` for dense models;
            as `tokred.apply` does, if not given.
        task: "classification", "multilabel", "segmentation", "depth" or "relative depth"; as the
            labels have it, if not given.
        labelled: whether to look for labels.
        transform: how pictures are prepared: a function from a picture to a tensor [C, H, W], or an
            image processor; the model's own, if not given.
        batch: images per batch, for accuracy and for speed; if not given, 64 on CUDA, elsewhere
            a power of two, at most 32, that takes the dense model at most 20 G multiply-adds
            (of models that take more for one image, 1).
        limit: look at only so many images, spread evenly.
        compared: how many images are compared with the dense model, spread evenly (fewer where
            what it made of them takes more than 1 GiB).
        seconds: how long the speed of each setting is measured; on a busy machine, up to three
            times as long.
        workers: processes that read and prepare images, as those of a torch loader; 0: this one.
            Worth it where the model is faster than that, and images are too many for memory.
        host: as for `tokred.apply`.
        name: what the model is called in the table; its class if not given.
        cache: the folder where finished settings are kept; True: the user's cache folder
            (`~/.cache/tokred`, or $TOKRED_CACHE); False: none are kept.
        fresh: measure all of them again.
        progress: show a bar and the table as it grows.
        on_row: called with the table after every setting, by the main process.

    Raises:
        ValueError: there are no images, labels that the model cannot give, an option is out of
            range, or the model is in training mode.
        UnsupportedModelError: the model is not one we know.
        ModuleNotFoundError: a library is missing: `pip install "tokred[evaluate]"`.
    """
    rates = list(keep_rates)
    wanted = settings_of(METHODS if methods is None else methods, rates, schedule)
    if not wanted:
        raise ValueError("methods and keep_rates must name at least one setting")
    model = uncompiled(module_of(model))
    with put_back(model, host):
        remove(model)
        samples = sampling.of(data, model, transform, limit, labelled)
        work = Work(model, samples, host, task, batch, compared, seconds, workers)
        if methods is None and work.dense_outputs:
            wanted = settings_of(DENSE_METHODS, rates, schedule)
        several = work.several
        store = _Store(cache, fresh, work) if several.main else None
        return _run(work, wanted, store, name or type(model).__name__, progress, on_row)


def _run(
    work: Work,
    wanted: list[Setting],
    store: _Store | None,
    name: str,
    progress: bool,
    on_row: Callable[[Evaluation], None] | None,
) -> Evaluation:
    several = work.several
    refused: dict[str, str] = {}
    rows: list[Row] = []
    what: list[Setting | None] = [None, *wanted]
    known = several.told([store.get(setting) for setting in what] if store else None)
    table = None
    with Shown(len(what), progress and several.main) as shown:
        work.told = shown.far
        for setting, row in zip(what, known, strict=True):
            if setting is not None:
                reason = work.why_not(setting)
                if reason is not None:
                    refused[setting.name] = reason
                    shown.step()
                    continue
            if row is None:
                shown.now(setting.name if setting else "dense")
                row = work.row(setting)
                if store:
                    store.put(setting, row)
            rows.append(row)
            table = work.table(name, rows, refused)
            shown.row(table)
            if on_row and several.main:
                on_row(table)
    assert table is not None
    return dataclasses.replace(table, refused=_together(wanted, refused))


def _together(wanted: Sequence[Setting], refused: Mapping[str, str]) -> dict[str, str]:
    """A method that is refused at every keep rate for the same reason is named once."""
    found: dict[str, str] = {}
    for setting in wanted:
        mine = [refused.get(s.name) for s in wanted if s.method == setting.method]
        if setting.name in refused:
            name = setting.method if len(set(mine)) == 1 else setting.name
            found[name] = refused[setting.name]
    return found


class Work:
    """What all settings are measured with."""

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        host: Host | None,
        task: str | None,
        batch: int | None,
        compared: int,
        seconds: float,
        workers: int = 0,
    ) -> None:
        patch = host_of(model, host)
        if isinstance(patch, Denoiser):
            raise UnsupportedModelError(
                f"{type(model).__name__} makes images: compare those (`tokred fid`)"
            )
        if model.training:
            raise ValueError("model must be in evaluation mode: call model.eval()")
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.model, self.host, self.samples = model, host, samples
        self.found = patch
        if batch is None:
            batch = 64 if self.device.type == "cuda" else self._fitting()
        if batch < 1 or compared < 1 or seconds <= 0:
            raise ValueError(
                "batch and compared must be at least 1 image and seconds above 0, not "
                f"{batch}, {compared} and {seconds}"
            )
        if workers < 0:
            raise ValueError(f"workers must be at least 0 processes, not {workers}")
        if task is not None and task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
        self.batch, self.seconds, self.several = batch, seconds, Processes()
        self.workers = workers
        self.told: Callable[[str], None] = lambda _: None  # how far a pass over the images is
        self._held: dict[int, Any] = {}
        self._room = HELD
        self._dense: dict[int, list[Seen]] = {}
        first = samples.batch(range(min(batch, len(samples))))
        self.inputs = self._sent(first[0][0])
        with seeing(model, host) as see:
            self.example = see(self.inputs)
        targets = first[0][1]
        self.task: Task | None = None
        if targets is not None:
            self.task = TASKS[task] if task else task_of(targets, self.example.decisions, model)
        elif task is not None:
            raise ValueError(f"{samples.name} has no labels for {task}")
        self.multilabel = self.task is not None and self.task.name == "multilabel"
        # So many batches' outputs of the dense model as there is room for.
        size = sum(
            x.numel() * x.element_size()
            for x in (self.example.features, self.example.decisions.scores,
                      self.example.decisions.chosen, self.example.decisions.depth)
            if x is not None
        )  # fmt: skip
        room = max(1, HELD // max(1, size))
        batches = -(-len(samples) // batch)
        few = min(-(-compared // batch), room, batches)
        # Spread, because folders come class by class.
        self.compared = [i * batches // few for i in range(few)]
        self.layout = self._layout(self.inputs)
        self.tokens = math.prod(self.layout.grid)

    def _fitting(self) -> int:
        """Images in a batch on the CPU."""
        cost = count(self.model, self._sent(self.samples.batch([0])[0][0]))
        return 1 << max(0, int(math.log2(min(MOST, WORK / max(1.0, cost)))))

    def _layout(self, inputs: Inputs) -> Layout:
        _, tower = find_host(self.model, self.host)
        height, width = pixels(inputs).shape[-2:]
        return self.found.layout(tower, (height, width))

    @property
    def dense_outputs(self) -> bool:
        """Whether the model answers for every pixel."""
        decided = self.example.decisions
        return decided.depth is not None or (decided.chosen is not None and decided.chosen.ndim > 2)

    def why_not(self, setting: Setting) -> str | None:
        """Why the model cannot be reduced so; None if it can."""
        reducer = setting.reducer
        if not isinstance(reducer, Preset) and learned(reducer) and reducer.gates is None:
            return "its gates are not trained: give them, as in tokred.SViT(gates=path)"
        try:
            self.applied(setting)
            with torch.no_grad():  # some things only a pass can tell
                call(self.model, first_of(self.inputs))
        except (UnsupportedModelError, ValueError) as error:
            return str(error)
        finally:
            remove(self.model)
        return None

    def applied(self, setting: Setting) -> Reduction:
        """Puts it into the model."""
        with warnings.catch_warnings():
            # A keep rate of 1 is no mistake in a table of keep rates.
            warnings.filterwarnings("ignore", message=".*nothing is reduced")
            reduction: Reduction = apply(
                self.model, setting.reducer, setting.schedule, host=self.host
            )
        return reduction

    def row(self, setting: Setting | None, speeds: Mapping[str, Speed] | None = None) -> Row:
        """Everything about one setting; of the dense model, if it is None.

        Args:
            setting: what to try.
            speeds: of "dense", "reduced" and "limit", if they were measured already.
        """
        reduction = None if setting is None else self.applied(setting)
        try:
            metrics, images, difference = self.looked(reduction is None)
        finally:
            remove(self.model)
        if speeds is None:
            arms: dict[str, Any] = {"dense": None}
            if reduction is not None:
                arms |= {"reduced": reduction, "limit": self.free_limit(reduction)}
            speeds = self.several.by_main(lambda: self.race(arms, self.seconds))
        close = total(difference)

        def percent(share: float | None) -> float | None:
            return None if share is None else 100 * share

        return Row(
            method="dense" if setting is None else setting.method,
            keep_rate=None if setting is None else setting.keep_rate,
            code="" if setting is None else setting.code,
            tokens=self.tokens,
            counts=self.counts(reduction),
            images=images,
            metrics=metrics,
            compared=close.images,
            agreement=percent(close.agreement),
            kl=close.divergence,
            cosine=close.cosine,
            depth_error=percent(close.depth_error),
            speed=speeds["reduced" if reduction else "dense"],
            dense=speeds["dense"],
            limit=speeds.get("limit"),
        )

    def difference(self, setting: Setting, batches: int) -> Fidelity:
        """How close a setting stays to the dense model, on the first few of the batches that are
        compared."""
        self.applied(setting)
        try:
            return total(self.looked(False, batches)[2])
        finally:
            remove(self.model)

    def looked(
        self, dense: bool, batches: int | None = None
    ) -> tuple[dict[str, float], int, list[Difference]]:
        """Scores over all images, how many there were, and the differences from the dense model,
        batch by batch. With `batches`, no scores, and only so many batches of those that are
        compared."""
        if not dense and not self._dense:
            self._see_dense()
        scores = None
        if self.task is not None and batches is None:
            scores = Scores(self.task, self.example.decisions, self.device)
        few = self.compared if batches is None else self.compared[:batches]
        differences: list[tuple[int, Difference]] = []
        images = 0
        with seeing(self.model, self.host) as see:
            for number, groups in self._batches(None if batches is None else few):
                parts = []
                for inputs, targets in groups:
                    seen = see(inputs)
                    images += seen.images
                    if scores is not None and targets is not None:
                        scores.add(seen.decisions, targets)
                    if number in few:
                        parts.append(seen.to("cpu"))
                if dense and parts:
                    self._dense[number] = parts
                differences += [
                    (number, compare(ours, theirs, self.multilabel))
                    for ours, theirs in zip(parts, self._dense.get(number, ()), strict=bool(parts))
                ]
        # In the order of batches, so that sums are the same for any number of processes.
        gathered = sorted(self.several.gathered(differences), key=lambda pair: pair[0])
        counted = sum(self.several.gathered([images]))
        return scores.result() if scores else {}, counted, [d for _, d in gathered]

    def _see_dense(self) -> None:
        """What the dense model makes of the images that are compared; needed where its row was
        known from another run."""
        former = reduction_of(self.model)
        remove(self.model)
        with seeing(self.model, self.host) as see:
            for number, groups in self._batches(self.compared):
                self._dense[number] = [see(inputs).to("cpu") for inputs, _ in groups]
        if former is not None:
            hang(self.model, self.found, former)

    def _batches(
        self, numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[tuple[Inputs, list[Tensor] | None]]]]:
        """This process's share of the batches, of these numbers or all; the first of them are kept
        in memory, as many as there is room for."""
        size, many = self.batch, len(self.samples)
        every = range(-(-many // size)) if numbers is None else numbers
        mine = [n for n in every if n % self.several.number == self.several.index]
        wanted = [range(n * size, min(many, (n + 1) * size)) for n in mine if n not in self._held]
        fresh = self.samples.batches(wanted, self.workers)
        for done, number in enumerate(mine):
            far = done * size * self.several.number
            self.told(f"{far} of {min(many, len(every) * size)} images")
            groups = self._held.get(number) or next(fresh)
            if number not in self._held:
                self._room -= sum(_bytes(inputs) for inputs, _ in groups)
                if self._room >= 0:
                    self._held[number] = groups
            yield number, [(self._sent(inputs), targets) for inputs, targets in groups]

    def _sent(self, inputs: Inputs) -> Inputs:
        return sampling.sent(inputs, self.device, self.dtype)

    def counts(self, reduction: Reduction | None) -> tuple[int, ...]:
        """Patch tokens after each layer."""
        if reduction is None:
            return (self.tokens,) * self.layout.layers
        return counts_of(self.model, self.found, self.inputs, reduction, self.layout.grid)

    def free_limit(self, reduction: Reduction) -> Any:
        """The same numbers of tokens, for nothing."""
        one = first_of(self.inputs)
        return free_limit_of(self.model, self.found, one, reduction, self.counts(reduction))

    def race(self, arms: Mapping[str, Any], seconds: float) -> dict[str, Speed]:
        """What several reductions cost to run (None: the dense model, which is "dense")."""
        whole, one = self.inputs, first_of(self.inputs)
        alone = len(pixels(whole)) == 1
        many = self.pace(arms, whole, seconds * (1 if alone else 2 / 3))
        single = many if alone else self.pace(arms, one, seconds / 3)
        found = {}
        try:
            for arm, reduction in arms.items():
                remove(self.model)
                if reduction is not None:
                    hang(self.model, self.found, reduction)
                found[arm] = Speed(
                    images_per_second=len(pixels(whole)) / many[arm].seconds,
                    latency=single[arm].seconds,
                    mult_adds=count(self.model, one),
                    peak_memory=peak_memory(self.model, whole),
                    error=many[arm].error,
                )
        finally:
            remove(self.model)
        return found

    def pace(
        self, arms: Mapping[str, Any], inputs: Inputs, seconds: float, patience: int = PATIENCE
    ) -> dict[str, Pace]:
        """How long several reductions (None: the dense model, which is "dense") take for a batch,
        in turns; as often again, up to so many times in all, as that leaves a speed-up unsure."""
        racing = sides(self.model, self.found, arms, compile=False)
        rounds: dict[str, tuple[float, ...]] = dict.fromkeys(arms, ())
        try:
            for again in range(patience):
                taken = measure(racing, inputs, 1000, 0 if again else 1, limit=seconds)
                rounds = {arm: rounds[arm] + taken[arm].seconds for arm in arms}
                found = {arm: _beside(rounds["dense"], rounds[arm]) for arm in arms}
                if max(pace.error for pace in found.values()) <= SURE:
                    break
        finally:
            remove(self.model)
        return found

    def table(self, name: str, rows: Sequence[Row], refused: Mapping[str, str]) -> Evaluation:
        """What is known so far."""
        if self.task is not None:
            leading, unit = self.task.leading, self.task.unit
            better = self.task.metrics[leading]
        else:
            dense = rows[0]
            leading, better, unit = "cosine", True, "%"
            if dense.agreement is not None:
                leading = "agreement"
            elif dense.depth_error is not None:
                leading, better = "depth_error", False
        return Evaluation(
            model=name,
            data=self.samples.name,
            task=self.task.name if self.task else "unlabelled",
            leading=leading,
            higher_is_better=better,
            unit=unit,
            device=device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            batch=min(self.batch, len(self.samples)),
            versions={"tokred": tokred.__version__, **versions_of(self.model)},
            rows=tuple(rows),
            refused=dict(refused),
        )


@dataclass(frozen=True)
class Pace:
    """How fast a side is.

    Attributes:
        seconds: for a batch.
        error: standard error of its ratio to the dense model, as a share of it.
    """

    seconds: float
    error: float = 0.0


def _beside(dense: Sequence[float], arm: Sequence[float]) -> Pace:
    """What the dense model took in a round is set against what the other side took in the same
    round, so that a machine which is busy now and then slows down both; of these ratios the median
    counts."""
    ratios = [a / b for a, b in zip(arm, dense, strict=True)]
    middle = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4)
    # Of a normal distribution, the quartiles are 1.349 standard deviations apart, and the median
    # of n values has a standard error of 1.253 of them, by the square root of n.
    error = 1.253 / 1.349 * (high - low) / math.sqrt(len(ratios)) / middle
    return Pace(statistics.median(dense) * middle, error)


def _bytes(inputs: Inputs) -> int:
    parts = [inputs] if isinstance(inputs, Tensor) else inputs.values()
    return sum(x.numel() * x.element_size() for x in parts if isinstance(x, Tensor))


# --- several processes ----------------------------------------------------------------------------


class Processes:
    """This process among those that `accelerate launch` has started; the only one, if none."""

    def __init__(self) -> None:
        self.state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        ):
            cpu = not torch.accelerator.is_available()
            # One process measures speeds while the others wait.
            day = datetime.timedelta(days=1)
            self.state = require("accelerate", "evaluate").PartialState(cpu, timeout=day)

    @property
    def index(self) -> int:
        return int(self.state.process_index) if self.state else 0

    @property
    def number(self) -> int:
        return int(self.state.num_processes) if self.state else 1

    @property
    def main(self) -> bool:
        return self.index == 0

    def told(self, value: Any) -> Any:
        """What the main process says."""
        if self.number == 1:
            return value
        box = [value if self.main else None]
        require("accelerate.utils", "evaluate").broadcast_object_list(box)
        return box[0]

    def by_main(self, work: Callable[[], Any]) -> Any:
        """What the main process makes, while the others wait. Its errors are everybody's."""
        if self.number == 1:
            return work()
        outcome: tuple[bool, Any] | None = None
        if self.main:
            try:
                outcome = True, work()
            except Exception as error:
                outcome = False, error
        fine, made = self.told(outcome)
        if not fine:
            raise made
        return made

    def gathered(self, values: list[Any]) -> list[Any]:
        """Those of all processes."""
        if self.number == 1:
            return values
        found: list[Any] = require("accelerate.utils", "evaluate").gather_object(values)
        return found


# --- what was measured before ---------------------------------------------------------------------


class _Store:
    """Finished settings, a small JSON file each."""

    def __init__(self, where: str | Path | bool, fresh: bool, work: Work) -> None:
        self.folder: Path | None = None
        if where is False:
            return
        if where is True:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            where = os.environ.get("TOKRED_CACHE") or Path(home) / "tokred"
        self.folder = Path(where) / "evaluate"
        self.fresh = fresh
        self.about = {
            "model": fingerprint(work.model),
            "data": work.samples.fingerprint(),
            "task": work.task.name if work.task else None,
            "batch": work.batch,
            "compared": work.compared,
            "seconds": work.seconds,
            "device": device_name(work.device),
            "dtype": str(work.dtype),
            "threads": torch.get_num_threads(),
            "versions": {
                "tokred": tokred.__version__,
                "python": sys.version.split()[0],
                **versions_of(work.model),
            },
        }

    def get(self, setting: Setting | None) -> Row | None:
        """What was measured; None if it was not, or not so."""
        path = self._path(setting)
        if path is None or self.fresh or not path.is_file():
            return None
        try:
            return row_from(json.loads(path.read_text())["row"])
        except (ValueError, KeyError, TypeError):  # cut off, or of another time
            return None

    def put(self, setting: Setting | None, row: Row) -> None:
        """Keeps it, whole or not at all."""
        path = self._path(setting)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        text = {"about": self.about, "row": dataclasses.asdict(row)}
        partial.write_text(json.dumps(text, indent=1))
        partial.replace(path)

    def _path(self, setting: Setting | None) -> Path | None:
        if self.folder is None:
            return None
        key: dict[str, Any] = dict(self.about)
        if setting is not None:
            key["setting"] = [setting.method, repr(setting.reducer), repr(setting.schedule)]
            gates = getattr(setting.reducer, "gates", None)
            if isinstance(gates, str | Path):
                key["gates"] = hashlib.sha256(Path(gates).read_bytes()).hexdigest()
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:24]}.json"


def fingerprint(model: nn.Module) -> str:
    """Tells a model from others: its structure, and all its weights, bit by bit."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(getattr(tensor, 'shape', ()))}".encode())
        if isinstance(tensor, Tensor):
            try:
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(flat.numpy().data)
            except (RuntimeError, NotImplementedError, AttributeError):  # a quantised tensor
                digest.update(repr(tensor).encode())
    return digest.hexdigest()[:16]


# --- what is seen while it runs -------------------------------------------------------------------


class Shown:
    """A bar, and the table as it grows: in a notebook one that is drawn anew, else line by line."""

    def __init__(self, many: int, wanted: bool) -> None:
        self.bar: Any = None
        self._handle: Any = None
        self._lines = 0
        self._what, self._told = "", time.monotonic()
        if wanted:
            self.bar = require("tqdm.auto", "evaluate").tqdm(
                total=many, desc="measuring", leave=False, file=sys.stderr
            )
            if _in_notebook():
                self._handle = require("IPython.display", "evaluate")

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def expect(self, many: int) -> None:
        if self.bar is not None:
            self.bar.total += many
            self.bar.refresh()

    def now(self, what: str) -> None:
        self._what = what
        if self.bar is not None:
            self.bar.set_postfix_str(what)

    def far(self, how: str) -> None:
        """How far it is with that, told once a second."""
        if self.bar is not None and time.monotonic() - self._told >= 1:
            self._told = time.monotonic()
            self.bar.set_postfix_str(f"{self._what}, {how}")

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def row(self, table: Evaluation) -> None:
        if self.bar is None:
            return
        if self._handle is not None:
            if self._lines == 0:
                self._shown = self._handle.display(table, display_id=True)
            else:
                self._shown.update(table)
        else:
            lines = table.lines()
            for line in lines if self._lines == 0 else lines[-1:]:
                self.bar.write(line, file=sys.stderr)
        self._lines += 1
        self.step()


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")
