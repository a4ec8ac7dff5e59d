"""`tokred.advise`: checks what was asked, and starts the search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokred.data import samples as sampling
from tokred.data.samples import Transform
from tokred.host import Host, module_of
from tokred.measure.advise.search import Search
from tokred.measure.advise.values import Advice
from tokred.measure.progress import Progress
from tokred.measure.settings import settings_of
from tokred.measure.subject import put_back
from tokred.measure.work import Work
from tokred.patching import remove, uncompiled
from tokred.patching.presets import Preset
from tokred.reducers import Reducer, make, names
from tokred.reducers.protocol import traits


def candidates() -> tuple[str, ...]:
    """The methods that are tried if none are named, with their variants: all that need no training
    and keep the same number of tokens of every image. (Baselines and methods for denoisers alone
    are not among them.)"""
    found = []
    for name in names():
        said = traits(make(name))
        if not (said.varies or said.learned or said.baseline or said.limit or said.keys_only):
            found += [name, *(f"{name}:{variant}" for variant in said.variants)]
    return tuple(found)


METHODS = candidates()
"""The candidates among the methods that tokred brings."""


def advise(
    model: Any,
    data: Any,
    *,
    speedup: float | None = None,
    max_drop: float | None = None,
    methods: Iterable[str | Reducer | Preset] | Mapping[str, Reducer | Preset] | None = None,
    images: int = 256,
    batch: int | None = None,
    labelled: bool = True,
    task: str | None = None,
    transform: Transform | None = None,
    seconds: float = 2.0,
    workers: int = 0,
    host: Host | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Advice:
    """Finds method, layers and numbers of tokens for a budget, by trying them on some images.

    >>> advice = tokred.advise(model, "flowers/val", speedup=1.5)
    >>> print(advice)  # what it gains and costs, and the line of code
    >>> eval(advice.code)

    Args:
        model: as for `tokred.evaluate`; left as it was.
        data: as for `tokred.evaluate`: labelled if possible.
        speedup: how many times as fast as the dense model the setting has to be; the one that
            loses least is advised.
        max_drop: how many points of the leading metric the setting may lose (without labels, of
            agreement with the dense model); the fastest one is advised.
        methods: as for `tokred.evaluate`; if not given, all that need no training and keep the
            same number of tokens of every image.
        images: how many are used, drawn evenly at random, always the same.
        batch, labelled, task, transform, workers, host, name, progress: as for `tokred.evaluate`.
        seconds: how long each candidate's speed is measured.

    Raises:
        ValueError: none or both of `speedup` and `max_drop` are given, or they are out of range;
            otherwise as `tokred.evaluate`.
        UnsupportedModelError: the model is not one we know, or it takes none of the methods.
    """
    _check(speedup, max_drop, images)
    wanted = settings_of(candidates() if methods is None else methods, (0.5,))
    model = uncompiled(module_of(model))
    with put_back(model, host):
        remove(model)
        samples = sampling.of(data, model, transform, None, labelled)
        samples = sampling.drawn(samples, min(images, len(samples)))
        work = Work(model, samples, host, task, batch, images, seconds, workers)
        if work.several.number > 1:
            raise ValueError("advise runs in one process: start it without accelerate launch")
        with Progress(0, progress) as bar:
            work.batches.on_progress = bar.detail
            search = Search(work, wanted, bar, name or type(model).__name__)
            return search.faster(speedup) if speedup is not None else search.closest(max_drop or 0)


def _check(speedup: float | None, max_drop: float | None, images: int) -> None:
    """Refuses budgets that make no sense."""
    if (speedup is None) == (max_drop is None):
        raise ValueError(f"give one of speedup and max_drop, not {speedup} and {max_drop}")
    if speedup is not None and speedup <= 1:
        raise ValueError(f"speedup must be above 1, the dense model's own, not {speedup}")
    if max_drop is not None and max_drop < 0:
        raise ValueError(f"max_drop must be at least 0 points, not {max_drop}")
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
