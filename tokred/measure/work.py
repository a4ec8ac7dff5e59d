"""What all settings are measured with: the model, the images, and the dense model's answers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokred.data import samples as sampling
from tokred.data.inputs import Inputs, call, pixels
from tokred.data.samples import Samples
from tokred.engine.run import Layout, Reduction
from tokred.host.host import Denoiser, Host, UnsupportedModelError, find_host
from tokred.measure.conditions import device_name, versions_of
from tokred.measure.counting import count, peak_memory
from tokred.measure.evaluation import Evaluation, Row, Speed
from tokred.measure.fidelity import Difference, Fidelity, Seen, compare, seeing, total
from tokred.measure.limit import counts_of, first_of, free_limit_of
from tokred.measure.metrics import TASKS, Scores, Task, task_of
from tokred.measure.processes import Processes
from tokred.measure.race import PATIENCE, SURE, Pace, _beside, measure, sides
from tokred.measure.settings import Setting
from tokred.patching.patching import apply, hang, host_of, reduction_of, remove
from tokred.patching.presets import Preset
from tokred.reducers import learned
from tokred.version import __version__

WORK, MOST = 20e9, 32
"""Multiply-adds that a batch may take on the CPU, and images in it, if its size is not given: so
that small models are busy with tokens, and many rounds of large ones can be measured."""
HELD = 2**30
"""Bytes of images, and of what the dense model made of them, that are kept in memory."""


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
            versions={"tokred": __version__, **versions_of(self.model)},
            rows=tuple(rows),
            refused=dict(refused),
        )


def _bytes(inputs: Inputs) -> int:
    parts = [inputs] if isinstance(inputs, Tensor) else inputs.values()
    return sum(x.numel() * x.element_size() for x in parts if isinstance(x, Tensor))
