"""One model, some images, and everything that is measured for each setting."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tokred.data.inputs import Inputs, call, pixels
from tokred.data.processes import launched
from tokred.data.samples import Samples, sent
from tokred.engine.reduction import Reduction
from tokred.host import Denoiser, Host, UnsupportedModelError, find_host
from tokred.measure.answers import Answers
from tokred.measure.batches import Batches
from tokred.measure.conditions import device_name, versions_of
from tokred.measure.counting import count, peak_memory
from tokred.measure.evaluation import Evaluation, Row, Speed
from tokred.measure.fidelity import Fidelity, total
from tokred.measure.limit import counts_of, first_of, limits_of, put_on
from tokred.measure.metrics import TASKS
from tokred.measure.race import PATIENCE, Pace, paces, sides
from tokred.measure.settings import Setting
from tokred.measure.slicing import take_off
from tokred.patching import apply, host_of, remove
from tokred.patching.gain import NoGainWarning
from tokred.patching.presets import Preset
from tokred.reducers.protocol import traits
from tokred.version import __version__

WORK, MOST = 20e9, 32
"""If the size of a batch on the CPU is not given: the most multiply-adds that it may take, and the
most images in it. So small models have enough to do, and large ones are measured many times."""


class Work:
    """Measures settings on one model and the same images.

    Attributes:
        model: in which nothing is compiled, and which has no reduction between two calls.
        host: as for `tokred.apply`.
        patch: how the model is patched.
        batches: the images.
        answers: the model's answers to them.
        inputs: the batch on which speed is measured.
        layout: how the model lays out its tokens for such images.
        tokens: patch tokens that enter the first layer.
        seconds: how long the speed of a setting is measured.
        several: the processes that share the work.
    """

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
        device, dtype = parameter.device, parameter.dtype
        self.model, self.host, self.patch = model, host, patch
        if batch is None:
            batch = 64 if device.type == "cuda" else _fitting(model, samples, device, dtype)
        _check(task, batch, compared, seconds, workers)
        self.seconds, self.several = seconds, launched("evaluate")
        self.batches = Batches(samples, batch, device, dtype, workers, self.several)
        self.answers = Answers(model, host, self.batches, task, compared)
        self.inputs = self.answers.inputs
        height, width = pixels(self.inputs).shape[-2:]
        self.layout = patch.layout(find_host(model, host)[1], (height, width))
        self.tokens = math.prod(self.layout.grid)

    def why_not(self, setting: Setting) -> str | None:
        """Why the model cannot be reduced like this; None if it can."""
        reducer = setting.reducer
        if not isinstance(reducer, Preset):
            said = traits(reducer)
            if said.learned and said.gates is None:
                return "its gates are not trained: give them, as in tokred.SViT(gates=path)"
        try:
            self.applied(setting)
            with torch.no_grad():  # some things show in a pass only
                call(self.model, first_of(self.inputs))
        except (UnsupportedModelError, ValueError) as error:
            return str(error)
        finally:
            remove(self.model)
        return None

    def applied(self, setting: Setting) -> Reduction:
        """Applies a setting to the model."""
        with warnings.catch_warnings():
            # A keep rate of 1 is no mistake in a table of keep rates.
            warnings.filterwarnings("ignore", message=".*nothing is reduced")
            warnings.simplefilter("ignore", NoGainWarning)  # what is gained is measured
            reduction: Reduction = apply(
                self.model, setting.reducer, setting.schedule, host=self.host
            )
        return reduction

    def reduction(self, setting: Setting) -> Reduction:
        """The reduction of a setting, which is not left on the model."""
        reduction = self.applied(setting)
        remove(self.model)
        return reduction

    def row(self, setting: Setting | None, speeds: Mapping[str, Speed] | None = None) -> Row:
        """Everything about one setting, or about the dense model.

        Args:
            setting: what to try; None: the dense model.
            speeds: those of "dense", "reduced" and "limit", if they were measured already.
        """
        reduction = None if setting is None else self.applied(setting)
        try:
            metrics, images, differences = self.answers.seen(dense=reduction is None)
        finally:
            remove(self.model)
        if speeds is None:
            arms: dict[str, Any] = {"dense": None}
            if reduction is not None:
                arms |= {"reduced": reduction, "limit": self.free_limit(reduction)}
            speeds = self.several.by_main(lambda: self.speeds(arms, self.seconds))
        close = total(differences)
        return Row(
            method="dense" if setting is None else setting.method,
            keep_rate=None if setting is None else setting.keep_rate,
            code="" if setting is None else setting.code,
            tokens=self.tokens,
            counts=self.counts(reduction),
            images=images,
            metrics=metrics,
            compared=close.images,
            agreement=_percent(close.agreement),
            kl=close.divergence,
            cosine=close.cosine,
            depth_error=_percent(close.depth_error),
            speed=speeds["reduced" if reduction else "dense"],
            dense=speeds["dense"],
            limit=speeds.get("limit"),
        )

    def difference(self, setting: Setting, batches: int) -> Fidelity:
        """How close a setting stays to the dense model, on the first few of the batches that are
        compared."""
        self.applied(setting)
        try:
            return total(self.answers.seen(dense=False, batches=batches)[2])
        finally:
            remove(self.model)

    def counts(self, reduction: Reduction | None) -> tuple[int, ...]:
        """Patch tokens after each layer."""
        if reduction is None:
            return (self.tokens,) * self.layout.layers
        return counts_of(self.model, self.patch, self.inputs, reduction, self.layout.grid)

    def free_limit(self, reduction: Reduction) -> Any:
        """The side of a race that cuts tokens off to the same numbers, at no cost."""
        one = first_of(self.inputs)
        return limits_of(self.model, self.patch, one, reduction, self.counts(reduction)).free

    def speeds(self, arms: Mapping[str, Any], seconds: float) -> dict[str, Speed]:
        """What several reductions cost to run (None: the dense model, which is called "dense")."""
        whole, one = self.inputs, first_of(self.inputs)
        alone = len(pixels(whole)) == 1
        many = self.pace(arms, whole, seconds * (1 if alone else 2 / 3))
        single = many if alone else self.pace(arms, one, seconds / 3)
        found = {}
        try:
            for arm, reduction in arms.items():
                put_on(self.model, self.patch, reduction)
                found[arm] = Speed(
                    images_per_second=len(pixels(whole)) / many[arm].seconds,
                    latency=single[arm].seconds,
                    mult_adds=count(self.model, one),
                    peak_memory=peak_memory(self.model, whole),
                    error=many[arm].error,
                )
        finally:
            take_off(self.model)
        return found

    def pace(
        self, arms: Mapping[str, Any], inputs: Inputs, seconds: float, patience: int = PATIENCE
    ) -> dict[str, Pace]:
        """How long several reductions take for a batch, in turns (None: the dense model, which is
        called "dense"); see `tokred.measure.race.paces`."""
        racing = sides(self.model, self.patch, arms, compile=False)
        try:
            return paces(racing, inputs, seconds, patience)
        finally:
            take_off(self.model)

    def table(self, name: str, rows: Sequence[Row], refused: Mapping[str, str]) -> Evaluation:
        """The evaluation with the rows that are known so far.

        Args:
            name: of the model.
            rows: the dense model first.
            refused: settings that the model does not take, with the reason.
        """
        batches, task = self.batches, self.answers.task
        leading, better, unit = _leading(rows[0]) if task is None else task.leads
        return Evaluation(
            model=name,
            data=batches.samples.name,
            task=task.name if task else "unlabelled",
            leading=leading,
            higher_is_better=better,
            unit=unit,
            device=device_name(batches.device),
            dtype=str(batches.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            batch=min(batches.size, len(batches.samples)),
            versions={"tokred": __version__, **versions_of(self.model)},
            rows=tuple(rows),
            refused=dict(refused),
        )


def _check(task: str | None, batch: int, compared: int, seconds: float, workers: int) -> None:
    """Refuses options that are out of range."""
    if batch < 1 or compared < 1 or seconds <= 0:
        raise ValueError(
            "batch and compared must be at least 1 image and seconds above 0, not "
            f"{batch}, {compared} and {seconds}"
        )
    if workers < 0:
        raise ValueError(f"workers must be at least 0 processes, not {workers}")
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")


def _fitting(model: nn.Module, samples: Samples, device: torch.device, dtype: torch.dtype) -> int:
    """How many images a batch has on the CPU: a power of two."""
    cost = count(model, sent(samples.batch([0])[0][0], device, dtype))
    return 1 << max(0, int(math.log2(min(MOST, WORK / max(1.0, cost)))))


def _leading(dense: Row) -> tuple[str, bool, str]:
    """The metric that settings are compared by without labels, whether more is better, its unit."""
    if dense.agreement is not None:
        return "agreement", True, "%"
    if dense.depth_error is not None:
        return "depth_error", False, "%"
    return "cosine", True, "%"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
