"""What `tokred.apply` is going to hang on a model: everything checked, nothing changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokred import gates as weights
from tokred.engine.denoising import Around
from tokred.engine.layout import Layout
from tokred.engine.reduction import Reduction, check_gates
from tokred.engine.windows import why_not
from tokred.host import (
    Host,
    Stage,
    UnsupportedModelError,
    WindowedHost,
    blocks_of,
    check_host,
    find_host,
)
from tokred.patching.presets import Preset
from tokred.reducers.protocol import Learned, Reconstruction, Reducer, Traits, learned, traits
from tokred.reducers.registry import make
from tokred.reducers.slic import Bilinear, Nearest
from tokred.schedule import Hourglass, Schedule, Shares, check_keep_rate


def reduction_for(
    model: nn.Module,
    method: str | Reducer | Preset = "tome",
    keep_rate: float | Schedule | Around | None = None,
    *,
    schedule: Schedule | None = None,
    reconstruction: str | Reconstruction | None = None,
    stage: int | None = None,
    host: Host | WindowedHost | None = None,
    proportional_attention: bool | None = None,
    full_grid: bool = True,
    attention: str = "host",
    prefix: int | None = None,
    hand_out: Sequence[int] = (),
) -> tuple[Host | Stage, Reduction]:
    """What `apply` (see there) hangs on a model that is no denoiser, and by which host."""
    cls = type(model).__qualname__
    if isinstance(keep_rate, Around):
        raise TypeError(
            f"keep_rate must be a number or a schedule for {cls}, not {keep_rate!r}, which is for "
            "denoisers"
        )
    reducer, chosen, gated = _method(method, keep_rate, schedule)
    said = traits(reducer)
    rebuilt = _reconstruction(reducer, reconstruction)
    if not full_grid and said.place == "around":
        raise ValueError(
            f"full_grid must be True for {reducer}: there are all tokens again behind every block"
        )
    if attention not in ("host", "fastest"):
        raise ValueError(f"attention must be 'host' or 'fastest', not {attention!r}")
    found, tower = find_host(model, host)
    found = found.at(tower, stage)
    if isinstance(found, Stage):
        reason = why_not(reducer, proportional_attention, full_grid)
        if reason:
            raise UnsupportedModelError(f"{cls}: {reason}")
    check_host(found, tower, signals_of(said))
    if isinstance(found, Host) and not full_grid:
        reason = found.full_grid_only(model, tower)
        if reason:
            raise UnsupportedModelError(
                f"{cls}: features cannot be handed out reduced, as full_grid=False asks: {reason}"
            )
    if isinstance(found, Host) and said.prunes and rebuilt is None:
        reason = found.merges_only(model, tower)
        if reason:
            raise UnsupportedModelError(f"{cls}: {reason}")
    layout = _layout(found, tower, prefix)
    trims = isinstance(found, Host) and found.averages_output(model, tower)
    reduction = Reduction(
        reducer,
        chosen,
        layout,
        said.proportional if proportional_attention is None else proportional_attention,
        full_grid,
        attention,
        tapped_by=found.family.tapped,
        averages=trims or (isinstance(found, Host) and found.averages(model, tower)),
        trims=trims,
        reconstruction=rebuilt,
        hand_out=_layers(hand_out, layout.layers),
    )
    if learned(reducer):
        reduction.gates = _gates(model, found, tower, reducer, reduction, gated)
    return found, reduction


def _layout(host: Host | Stage, tower: nn.Module, prefix: int | None) -> Layout:
    """The layout of a model, with the number of prefix tokens that the caller declares.

    Raises:
        ValueError: there cannot be so many.
        UnsupportedModelError: the model has none.
    """
    layout = host.layout(tower, None)
    if prefix is None:
        return layout
    if isinstance(host, Stage):
        raise UnsupportedModelError(
            f"{type(tower).__qualname__} attends in windows and has no prefix tokens: prefix must "
            f"be None, not {prefix!r}"
        )
    if not isinstance(prefix, int) or prefix < layout.prefix:
        raise ValueError(
            f"prefix must be an integer from {layout.prefix} on, the number of prefix tokens that "
            f"{type(tower).__qualname__} has itself, not {prefix!r}"
        )
    return replace(layout, prefix=prefix, declared=True)


def _layers(hand_out: Sequence[int], layers: int) -> frozenset[int]:
    """The layers that a caller names, counted from 0.

    Raises:
        ValueError: there is no such layer.
    """
    wrong = [
        layer for layer in hand_out if not isinstance(layer, int) or not -layers <= layer < layers
    ]
    if wrong:
        raise ValueError(
            f"hand_out must be layers in [0, {layers - 1}], or in [-{layers}, -1] from the last "
            f"one on, not {wrong[0]!r}"
        )
    return frozenset(layer % layers for layer in hand_out)


Gated = tuple[dict[str, Tensor], dict[str, Any]]
"""Weights of gates that were read from a file, and what the file says of them."""


def _method(
    method: str | Reducer | Preset,
    keep_rate: float | Schedule | None,
    schedule: Schedule | None,
) -> tuple[Reducer, Schedule, Gated | None]:
    """The method, its schedule, and what was read from its file of weights, if it has one."""
    if isinstance(method, Preset):
        if keep_rate is not None or schedule is not None:
            raise ValueError(
                "a preset has a schedule of its own: give no keep_rate and no schedule"
            )
        schedule = method.schedule
        method = method.reducer
    reducer = make(method)
    gated = None
    if learned(reducer) and isinstance(reducer.gates, str | Path):
        gated = weights.read(reducer.gates)
        if not gated[1]:
            reducer, gated = _of_others(reducer, gated[0]), None
        elif keep_rate is None and schedule is None:
            schedule = Shares(gated[1]["shares"])
    chosen = _schedule(reducer, keep_rate, schedule)
    if isinstance(chosen, Hourglass) and chosen.grid and traits(reducer).open_grid:
        reducer = replace(reducer, grid=chosen.grid)  # type: ignore[type-var]
    return reducer, chosen, gated


def _of_others(reducer: Learned, tensors: dict[str, Tensor]) -> Learned:
    """The method, with weights from a file that is not one of tokred's.

    Raises:
        ValueError: they are not of this method, or it can read tokred's files alone.
    """
    if reducer.learned != "svit" or not any("selective_modules." in name for name in tensors):
        raise ValueError(
            f"gates: {reducer.gates} does not say what it is for (Reduction.save writes files that "
            "do), and is no released checkpoint of SViT with selective_modules.* in it"
        )
    changed: Learned = replace(reducer, gates=tensors)  # type: ignore[type-var]
    return changed


def signals_of(said: Traits) -> frozenset[str]:
    """What must be read off a block for the signals that a method needs."""
    attention = {"key", "query"}
    read = {
        "key": {"key"},
        "value": {"value"},
        "class_attention": attention,
        "attention_received": attention,
    }
    return frozenset().union(*(read.get(signal, ()) for signal in said.needs))


def _gates(
    model: nn.Module,
    host: Host | Stage,
    tower: nn.Module,
    reducer: Learned,
    reduction: Reduction,
    read: Gated | None,
) -> nn.ModuleDict | None:
    """The modules of a learned method: those given, those read, or random ones.

    Raises:
        ValueError: they do not fit.
    """
    where = str(reducer.gates)
    if read is not None:
        check_gates(reducer, read[1], reduction.layout.layers, where)
    shares = reduction.shares
    layers = reducer.layers(shares)
    if not layers:
        return None
    block = blocks_of(host, tower)[0]
    width = weights.width_of(block)
    if width is None:
        raise UnsupportedModelError(
            f"{type(model).__qualname__}: blocks have no linear layer that tells the width of "
            "their tokens"
        )
    gates = nn.ModuleDict()
    for layer in layers:
        share = shares[layer]
        if reducer.remembers:
            share = share / min(1.0, *shares[:layer])
        gates[str(layer)] = reducer.gate(width, share / max(1 - share, 1e-3))
    gates.to(next(block.parameters()).device)
    gates.train(tower.training)
    if read is not None:
        _fill(gates, reducer, reduction, read, width, type(tower).__qualname__)
    elif isinstance(reducer.gates, nn.ModuleDict):
        given = reducer.gates
        if isinstance(given, weights.Numbered):
            given = given.at(layers)
        weights.fill(gates, given.state_dict(), "gates")
        gates = given
    elif reducer.gates is not None:
        raise TypeError(
            f"gates must be a file, or modules by layer, not {type(reducer.gates).__name__}"
        )
    elif not tower.training:
        warnings.warn(
            f"the gates of {reducer} are random, and so is what it leaves out: train them "
            "(`tokred train`), or give gates=, a file of trained ones",
            stacklevel=4,
        )
    return gates


def _fill(
    gates: nn.ModuleDict,
    reducer: Learned,
    reduction: Reduction,
    read: Gated,
    width: int,
    tower: str,
) -> None:
    """Puts the weights of a file into gates.

    Raises:
        ValueError: they do not fit.
    """
    tensors, about = read
    where = str(reducer.gates)
    if about["width"] != width:
        raise ValueError(
            f"gates: {where} is for tokens of width {about['width']}; those of {tower} have {width}"
        )
    varies = reduction.traits.varies
    pairs = zip(about["shares"], reduction.shares, strict=True)
    if varies and any(abs(a - b) > 1e-3 for a, b in pairs):
        raise ValueError(
            f"gates: {where} was trained for another keep rate, and its gates decide by "
            "themselves how many tokens stay: leave keep_rate and schedule out, or use "
            f"{type(reducer).__name__}(gates, fixed=True), which keeps as many as it is told"
        )
    own = {name: value for name, value in tensors.items() if name.split(".")[0] in gates}
    weights.fill(gates, tensors if varies else own, where)


def _schedule(
    reducer: Reducer, keep_rate: float | Schedule | None, schedule: Schedule | None
) -> Schedule:
    if schedule is not None:
        if not callable(schedule):
            raise TypeError(f"schedule must be one of tokred's schedules, not {schedule!r}")
        return schedule
    if callable(keep_rate):
        return keep_rate
    rate = 0.7 if keep_rate is None else keep_rate
    check_keep_rate(rate)
    return traits(reducer).schedule(rate)


def _reconstruction(reducer: Reducer, chosen: str | Reconstruction | None) -> Reconstruction | None:
    said = traits(reducer)
    if chosen is None:
        chosen = said.reconstruction
    named: dict[str, Callable[[], Reconstruction | None]] = {
        "copy": lambda: said.copying,
        "nearest": Nearest,
        "bilinear": Bilinear,
    }
    if isinstance(chosen, str):
        if chosen not in named:
            raise ValueError(f"reconstruction must be one of {sorted(named)}, not {chosen!r}")
        chosen = named[chosen]()
    if chosen is not None and (isinstance(chosen, type) or not callable(chosen)):
        raise TypeError(
            f"reconstruction must be one of {sorted(named)} or a value such as tokred.Nearest(), "
            f"not {chosen!r}"
        )
    if chosen is not None and said.varies:
        raise ValueError(
            f"{reducer} keeps different numbers of tokens in different images: reconstruction "
            "must be 'copy'"
        )
    return chosen
