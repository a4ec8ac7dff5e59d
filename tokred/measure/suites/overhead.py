"""The suite `overhead`: what our bookkeeping costs, block by block and reduction by reduction.

One image at a time, where it weighs most. The sides of a model take turns:

- *dense*: the model's own forward;
- *keeps all*: every block is patched, and none reduces;
- *seamed limit* and *free limit*: tokens cut off in patched blocks, and by a slice in the model's
  own forward;
- every method as `tokred.apply` puts it in;
- every method *bare*: the same blocks with nothing but the method's tensor operations. What the
  method looks at (keys, attention) is there already, taken from a pass before. It is called on
  that, merges the tokens, adds up their sizes, and gives attention their logarithm, all inside of
  the model's own forward. That is what somebody would write by hand for this model and schedule.

Differences are taken round by round, and their median counts, so that a machine that becomes slower
slows both sides. Of them:

- *a block that does not reduce*: (keeps all - dense) / blocks;
- *operations of a method*: bare - free limit;
- *bookkeeping of a method*: method - bare. It holds what reading keys and attention costs;
- *a reduction, over its operations*: (bookkeeping - all blocks that do not reduce) / reductions.
"""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.engine.layout import Layout
from tokred.engine.reduction import Reduction
from tokred.engine.sequence import fewer
from tokred.host import Host, blocks_of, find_host, forward_of
from tokred.maps import TokenMap
from tokred.measure.conditions import device_name, versions_of
from tokred.measure.limit import Limits, limits_of, put_on
from tokred.measure.race import Arm, measure, sides
from tokred.measure.slicing import Cut, Sliced, hang_slices, take_off
from tokred.optional import require
from tokred.reducers import Reducer, make
from tokred.reducers.protocol import Tokens, traits
from tokred.schedule import Exactly, Stages

FORMAT = 1
"""Version of the dictionary's layout."""

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
METHODS = ("tome", "atc")
DENSE, ALL, SEAMED, FREE = "dense", "keeps all", "seamed limit", "free limit"


@dataclass(frozen=True)
class Difference:
    """How much longer one side takes than another.

    Attributes:
        microseconds: the median of the differences in the rounds.
        error: its standard error, in microseconds.
    """

    microseconds: float
    error: float

    def __truediv__(self, many: int) -> Difference:
        return Difference(self.microseconds / many, self.error / many)

    def __str__(self) -> str:
        return f"{self.microseconds:.0f} ± {self.error:.0f}"


@dataclass(frozen=True)
class MethodCost:
    """What one method costs in one model, per pass.

    Attributes:
        method: its name.
        counts: patch tokens after each layer.
        reductions: how many layers reduce.
        milliseconds: median of the reduced model, per pass.
        efficiency: the share of the free limit that it reaches.
        above: what it takes over the free limit.
        operations: its tensor operations, over the free limit.
        bookkeeping: what it takes over its operations.
        reduction: the bookkeeping of a reduction: without that of blocks that do not reduce.
    """

    method: str
    counts: tuple[int, ...]
    reductions: int
    milliseconds: float
    efficiency: float
    above: Difference
    operations: Difference
    bookkeeping: Difference
    reduction: Difference


@dataclass(frozen=True)
class Group:
    """One model, and all that was measured in turns with it.

    Attributes:
        model: its name.
        image_size: in pixels.
        batch: images per pass.
        blocks: how many blocks are patched.
        milliseconds: median of every side, per pass.
        rounds: measured runs of each side.
        free_limit: the speed-up of the free limit.
        why_seamed: why the free limit runs in patched blocks; empty if it does not.
        block: what a patched block that does not reduce costs over the model's own.
        limit: what the seamed limit takes over the free one, per pass.
        methods: the costs of each.
    """

    model: str
    image_size: int
    batch: int
    blocks: int
    milliseconds: dict[str, float]
    rounds: int
    free_limit: float
    why_seamed: str
    block: Difference
    limit: Difference
    methods: tuple[MethodCost, ...]


def run(
    models: Sequence[str] = MODELS,
    methods: Sequence[str] = METHODS,
    *,
    keep_rate: float = 0.5,
    batch: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 60,
    on_group: Callable[[Group], None] | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures all sides of every model. The results are for `markdown` and JSON.

    Args:
        models: timm names of vision transformers.
        methods: names of methods that stand between attention and MLP and keep as many tokens of
            every image.
        keep_rate: as for `tokred.apply`.
        batch: images per pass.
        device: "cpu" or "cuda".
        dtype: of model and images.
        rounds: measured rounds.
        on_group: called with every finished group.
        on_round: called after every round with (rounds done, rounds in all), model by model.

    Raises:
        ValueError: a method stands elsewhere, or keeps other numbers of other images.
    """
    timm = require("timm", "timm")
    reducers = {name: _checked(name) for name in methods}
    groups, versions = list[Group](), {}
    for name in models:
        model = timm.create_model(name).eval().to(device, dtype)
        size = model.patch_embed.img_size
        images = torch.randn(batch, 3, *size).to(device, dtype)
        groups.append(_group(name, model, images, reducers, keep_rate, rounds, on_round))
        versions = versions_of(model)
        if on_group:
            on_group(groups[-1])
    return {
        "format": FORMAT,
        "suite": "overhead",
        "device": device_name(torch.device(device)),
        "machine": platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "keep_rate": keep_rate,
        "python": platform.python_version(),
        "versions": versions,
        "groups": [asdict(group) for group in groups],
    }


def markdown(results: dict[str, Any]) -> str:
    """Two tables: blocks, and reductions."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    groups = results["groups"]
    lines = [
        f"# Suite overhead: {results['device']}, {results['dtype']}",
        "",
        f"{results['threads']} threads, Python {results['python']}, {versions}. Batch "
        f"{groups[0]['batch']}, keep rate {results['keep_rate']:g}, {groups[0]['rounds']} rounds "
        "in turns. Microseconds are medians of the differences between two sides in the same "
        "round, with their standard errors.",
        "",
        "| model | dense, ms | free limit | a block that does not reduce, µs | seamed limit over "
        "the free one, µs per pass |",
        "|---|---|---|---|---|",
    ]
    for group in groups:
        cells = [
            group["model"],
            f"{group['milliseconds'][DENSE]:.2f}",
            f"{group['free_limit']:.2f}",
            _told(group["block"]),
            "not known" if group["why_seamed"] else _told(group["limit"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| model | method | ms | of limit | over the limit, µs per pass | of it operations | of it "
        "bookkeeping | a reduction, over its operations, µs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in groups:
        for cost in group["methods"]:
            cells = [
                group["model"],
                cost["method"],
                f"{cost['milliseconds']:.2f}",
                f"{cost['efficiency']:.2f}",
                *(
                    _told(cost[name])
                    for name in ("above", "operations", "bookkeeping", "reduction")
                ),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    for group in groups:
        if group["why_seamed"]:
            why = group["why_seamed"]
            lines += ["", f"The free limit of {group['model']} runs in patched blocks, too: {why}."]
    return "\n".join(lines) + "\n"


def _told(difference: dict[str, float]) -> str:
    return str(Difference(**difference))


def _checked(name: str) -> Reducer:
    """A method that can be run bare.

    Raises:
        ValueError: it cannot.
    """
    reducer = make(name)
    said = traits(reducer)
    if said.place != "between" or said.varies:
        raise ValueError(
            "methods must stand between attention and MLP and keep as many tokens of every image, "
            f"so that they can be timed without the engine, not {name!r}"
        )
    return reducer


def _group(
    name: str,
    model: nn.Module,
    images: Tensor,
    reducers: dict[str, Reducer],
    keep_rate: float,
    rounds: int,
    on_round: Callable[[int, int], None] | None,
) -> Group:
    host, tower = find_host(model)
    assert isinstance(host, Host)
    layout = host.layout(tower, None)
    reductions = {
        method: Reduction(reducer, Stages(keep_rate), layout, traits(reducer).proportional)
        for method, reducer in reducers.items()
    }
    first = next(iter(reductions.values()))
    counts = first.counts(layout.patches, layout.grid)
    limits = limits_of(model, host, images, first, counts)
    whole = Exactly((layout.patches,) * layout.layers)
    arms = {
        DENSE: None,
        ALL: Reduction(first.reducer, whole, layout, first.proportional_attention),
        SEAMED: limits.seamed,
        FREE: limits.free,
        **reductions,
    }
    racing = sides(model, host, arms, compile=False)
    for method, reduction in reductions.items():
        hung = bare(model, host, images, reduction)
        racing[f"bare {method}"] = (model, partial(_hang_bare, model, hung))
    try:
        measured = measure(racing, images, rounds, 3, on_round)
    finally:
        take_off(model)
    return _told_apart(name, images, layout, limits, reductions, measured)


def _told_apart(
    name: str,
    images: Tensor,
    layout: Layout,
    limits: Limits,
    reductions: dict[str, Reduction],
    measured: dict[str, Arm],
) -> Group:
    block = _difference(measured[ALL], measured[DENSE]) / layout.layers
    costs = []
    for method, reduction in reductions.items():
        counts = reduction.counts(layout.patches, layout.grid)
        many = sum(b < a for a, b in zip((layout.patches, *counts), counts, strict=False))
        arm, alone = measured[method], measured[f"bare {method}"]
        books = _difference(arm, alone)
        costs.append(
            MethodCost(
                method=method,
                counts=counts,
                reductions=many,
                milliseconds=arm.median * 1e3,
                efficiency=measured[FREE].median / arm.median,
                above=_difference(arm, measured[FREE]),
                operations=_difference(alone, measured[FREE]),
                bookkeeping=books,
                reduction=Difference(
                    books.microseconds - layout.layers * block.microseconds,
                    math.hypot(books.error, layout.layers * block.error),
                )
                / max(1, many),
            )
        )
    dense, free = measured[DENSE], measured[FREE]
    return Group(
        model=name,
        image_size=images.shape[-1],
        batch=len(images),
        blocks=layout.layers,
        milliseconds={side: arm.median * 1e3 for side, arm in measured.items()},
        rounds=len(dense.seconds),
        free_limit=dense.median / free.median,
        why_seamed=limits.why_seamed,
        block=block,
        limit=_difference(measured[SEAMED], free),
        methods=tuple(costs),
    )


def _difference(slow: Arm, fast: Arm) -> Difference:
    found = [1e6 * (a - b) for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    if len(found) < 2:
        return Difference(found[0], math.nan)
    low, _, high = statistics.quantiles(found, n=4)
    # As in `tokred.measure.race.beside`.
    error = 1.253 / 1.349 * (high - low) / math.sqrt(len(found))
    return Difference(statistics.median(found), error)


# A method without the engine


@dataclass
class Sizes:
    """What merged tokens stand for, during one pass.

    Attributes:
        bias: the logarithm of the sizes, as attention takes it; None as long as all are 1.
    """

    bias: Tensor | None = None


@dataclass
class Bare(Cut):
    """Stands in for the engine's `Step`, as `Cut` does: a method's tensor operations, and nothing
    else.

    Attributes:
        reduction: the method.
        view: what it looks at in this block; None if the block does not reduce.
        sizes: what all blocks of a model share.
    """

    reduction: Reduction = field(kw_only=True)
    view: Tokens | None = field(kw_only=True)
    sizes: Sizes = field(kw_only=True)

    def bias(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        return mask if self.starts else self.sizes.bias

    def reduce(self, x: Tensor) -> Tensor:
        """As few tokens as the method keeps."""
        if self.view is None:
            return x
        token_map: TokenMap = self.reduction.reducer(self.view, self.after)
        few, total, log = fewer(self.reduction.layout, x, token_map, self.view.size)
        if self.reduction.proportional_attention and token_map.merges:
            if log is None:
                total = token_map.total(self.view.size) if total is None else total
                log = F.pad(total.log(), (self.prefix, self.suffix))[:, None, None]
            self.sizes.bias = log.to(x.dtype)
        elif self.starts:
            self.sizes.bias = None
        return few


def bare(model: nn.Module, host: Host, images: Tensor, reduction: Reduction) -> list[Sliced]:
    """What stands in for the blocks of a model, so that it runs a method without the engine.

    Args:
        model: one whose blocks are given nothing by position.
        host: how it is patched.
        images: the only ones that it may be called with then.
        reduction: the method.
    """
    views = _views(model, host, images, reduction)
    tower = find_host(model, host)[1]
    layout, sizes, made = reduction.layout, Sizes(), list[Sliced]()
    before = layout.patches
    counts = reduction.counts(layout.patches, layout.grid)
    for layer, (block, after) in enumerate(zip(blocks_of(host, tower), counts, strict=True)):
        starts = before == layout.patches
        cut = Bare(
            *(layout.prefix, layout.suffix, layout.patches, before, after),
            starts=starts,
            reduction=reduction,
            view=views.get(layer),
            sizes=sizes,
        )
        # The blocks in front of the first reduction run their own forward.
        own = starts and after == before
        made.append(Sliced(block, forward_of(host, block), cut, own=own))
        before = after
    return [sliced for sliced in made if sliced.needed]


def _hang_bare(model: nn.Module, made: Sequence[Sliced]) -> None:
    take_off(model)
    hang_slices(made)


def _views(model: nn.Module, host: Host, images: Tensor, reduction: Reduction) -> dict[int, Tokens]:
    """What a method looks at in each block that reduces."""
    views: dict[int, Tokens] = {}
    watched = Watched(reduction.reducer, views)
    same = Reduction(
        watched,  # type: ignore[arg-type]
        reduction.schedule,
        reduction.layout,
        reduction.proportional_attention,
    )
    put_on(model, host, same)
    try:
        with torch.no_grad():
            model(images)
    finally:
        take_off(model)
    return views


class Watched:
    """A method that keeps what it is given to look at, by layer."""

    def __init__(self, reducer: Reducer, views: dict[int, Tokens]) -> None:
        self.reducer, self.views = reducer, views

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reducer, name)

    def __call__(self, tokens: Tokens, keep: int) -> TokenMap:
        self.views[tokens.layer] = tokens
        return self.reducer(tokens, keep)
