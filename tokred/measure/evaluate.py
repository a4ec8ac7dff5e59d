"""`tokred.evaluate`: a table of what settings gain and cost, on a model and images of one's own.

Accuracy and closeness to the dense model are counted image by image. Batches are the same however
many processes share them, so the table does not depend on the number of processes. Speed is
measured by one process while the others wait: the dense model, the setting and the free limit take
turns, as in `tokred.bench`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokred.data import samples as sampling
from tokred.data.samples import Transform
from tokred.host import Host, module_of
from tokred.measure.evaluation import Evaluation, Row
from tokred.measure.progress import Progress
from tokred.measure.settings import DENSE_METHODS, KEEP_RATES, METHODS, Setting, settings_of
from tokred.measure.store import Store, folder_of
from tokred.measure.subject import put_back
from tokred.measure.work import Work
from tokred.patching import remove, uncompiled
from tokred.patching.presets import Preset
from tokred.reducers import Reducer
from tokred.schedule import Schedule


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
    """Measures what every setting gains and costs on this model, these images and this machine.

    Accuracy is measured if there are labels; how close the reduced model stays to the dense one, in
    any case. For the dense model, every setting and the free limit, it measures images per second,
    the latency of one image, multiply-adds and peak memory. The model is left as it was.

    Finished settings are kept on disk, and are not measured again with the same weights, data,
    options, versions and machine. So an evaluation that was interrupted goes on where it stopped.
    Under `accelerate launch`, all processes share the images.

    >>> table = tokred.evaluate(model, "flowers/val", methods=("tome", "atc"))
    >>> table.best(max_drop=0.5).code

    Args:
        model: a supported model, in evaluation mode, on its device and in its dtype.
        data: a folder of pictures, or of one folder for each class, or with folders `images` and
            `labels` (or `depth`) in it; "hf:NAME" or a Hugging Face dataset; a dataset or loader of
            torch or timm; a list of pictures, paths or tensors; a tensor; `zoo.held_out()`.
        methods: what to try: a list of names (`"atc:single"`), methods or presets; or a mapping to
            them from names of one's own. If not given: tome, atc, dpc_knn and evit; for models that
            answer for every pixel: slic, tome and atc.
        keep_rates: numbers in (0, 1], or schedules. Each is tried with each method.
        schedule: makes a schedule out of a keep rate, such as `tokred.Hourglass` for dense models;
            if not given, the schedule is that of `tokred.apply`.
        task: "classification", "multilabel", "segmentation", "depth" or "relative depth"; if not
            given, the labels tell it.
        labelled: whether to look for labels.
        transform: prepares pictures: a function from a picture to a tensor [C, H, W], or an image
            processor; the model's own, if not given.
        batch: images per batch, for accuracy and for speed. If not given: 64 on CUDA; elsewhere
            the largest power of two, from 1 to 32, with which the dense model takes at most 20 G
            multiply-adds.
        limit: how many images are used, spread evenly; all, if not given.
        compared: how many images are compared with the dense model, spread evenly. (Fewer, if the
            dense model's answers to them take more than 1 GiB.)
        seconds: how long the speed of each setting is measured; on a busy machine, up to three
            times as long.
        workers: processes that read and prepare images, as those of a torch loader; 0: this one
            does. They help if the model is faster than reading, and the images do not fit into
            memory.
        host: as for `tokred.apply`.
        name: what the model is called in the table; its class if not given.
        cache: the folder where finished settings are kept; True: the user's cache folder
            (`~/.cache/tokred`, or $TOKRED_CACHE); False: none are kept.
        fresh: whether to measure finished settings again.
        progress: whether to show a progress bar, and the table as it grows.
        on_row: called with the table after every setting, by the main process.

    Raises:
        ValueError: there are no images, the labels do not fit the model, an option is out of range,
            or the model is in training mode.
        UnsupportedModelError: the model is not one we know.
        ModuleNotFoundError: a library is missing: `pip install "tokred[evaluate]"`.
    """
    # Longer than 60 lines by its documented arguments.
    rates = list(keep_rates)
    wanted = settings_of(METHODS if methods is None else methods, rates, schedule)
    if not wanted:
        raise ValueError("methods and keep_rates must name at least one setting")
    model = uncompiled(module_of(model))
    with put_back(model, host):
        remove(model)
        samples = sampling.of(data, model, transform, limit, labelled)
        work = Work(model, samples, host, task, batch, compared, seconds, workers)
        if methods is None and work.answers.everywhere:
            wanted = settings_of(DENSE_METHODS, rates, schedule)
        folder = folder_of(cache)
        data_is = "" if folder is None else work.batches.fingerprint()
        store = Store(folder, fresh, work, data_is) if work.several.main else None
        return _run(work, wanted, store, name or type(model).__name__, progress, on_row)


def _run(
    work: Work,
    wanted: list[Setting],
    store: Store | None,
    name: str,
    progress: bool,
    on_row: Callable[[Evaluation], None] | None,
) -> Evaluation:
    several = work.several
    refused: dict[str, str] = {}
    rows: list[Row] = []
    what: list[Setting | None] = [None, *wanted]
    known = several.told([store.get(s) if store else None for s in what])
    table = None
    with Progress(len(what), progress and several.main) as bar:
        work.batches.on_progress = bar.detail
        for setting, row in zip(what, known, strict=True):
            if setting is not None:
                reason = work.why_not(setting)
                if reason is not None:
                    refused[setting.name] = reason
                    bar.step()
                    continue
            if row is None:
                bar.now(setting.name if setting else "dense")
                row = work.row(setting)
                if store:
                    store.put(setting, row)
            rows.append(row)
            table = work.table(name, rows, refused)
            bar.row(table)
            if on_row and several.main:
                on_row(table)
    assert table is not None
    return dataclasses.replace(table, refused=_together(wanted, refused))


def _together(wanted: Sequence[Setting], refused: Mapping[str, str]) -> dict[str, str]:
    """The refused settings. A method that is refused at every keep rate for the same reason is
    named once."""
    found: dict[str, str] = {}
    for setting in wanted:
        mine = [refused.get(s.name) for s in wanted if s.method == setting.method]
        if setting.name in refused:
            name = setting.method if len(set(mine)) == 1 else setting.name
            found[name] = refused[setting.name]
    return found
