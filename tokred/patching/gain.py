"""Whether anything can be gained, by multiply-adds: what fewer tokens save against what it takes to
choose them. Nothing is run.

One decision takes about as long as 60 million multiply-adds, whatever there is to decide: measured
on one thread of a CPU, one image at a time (`vit_tiny`, 49 tokens, keep rate .5: three decisions,
144 million saved, .96 of the dense model's speed; 196 tokens: 660 million, 1.40; `vit_small`, 16
tokens: 180 million, .96; `vit_base`, 16 tokens: 720 million, 1.09). With several images at once it
takes hardly longer. So a decision that saves a third of that for an image gains nothing for one
image or two.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tokred.engine.denoising import Around, Place
from tokred.engine.reduction import Reduction
from tokred.gates import width_of
from tokred.reducers.protocol import Reducer, traits

WORTH = 20_000_000
"""The fewest multiply-adds that a decision must save for each image to be worth its time."""


class NoGainWarning(UserWarning):
    """A model has so few tokens, or so narrow ones, that reducing them takes longer than it saves,
    unless many images are computed at once."""


def why_none(reduction: Reduction, block: nn.Module) -> str | None:
    """Why nothing is gained in a model that attends to the whole image; None if something is.

    Args:
        reduction: what is applied.
        block: one of the model's blocks, which are alike.
    """
    width, grid = width_of(block), reduction.layout.grid
    weights = _weights(block)
    if width is None or weights < width**2:  # of weights that are packed, too little is known
        return None

    def worth(grid: tuple[int, int], tokens: int) -> bool:
        counts = reduction.counts(tokens, grid)
        before = (tokens, *counts[:-1])
        if reduction.traits.place == "around":
            before = (tokens,) * len(counts)
        decisions = sum(few < many for few, many in zip(counts, before, strict=True))
        saved = sum(_block(tokens, weights, width) - _block(n, weights, width) for n in counts)
        return saved >= WORTH * decisions

    tokens = reduction.layout.patches
    if worth(grid, tokens):
        return None
    from_here = ""
    for side in range(1, 65):
        if side * side <= tokens:
            continue
        try:
            if worth((side, side), side * side):
                from_here = f", and from about {side * side} tokens on"
                break
        except ValueError:  # the schedule is for this number of tokens alone
            break
    return (
        f"{tokens} tokens of width {width} are so few that {reduction.reducer} takes longer to "
        "choose than fewer tokens save: nothing is gained, except with several images at once"
        f"{from_here}"
    )


def none_around(
    model: nn.Module, places: Sequence[Place], reducer: Reducer, around: Around
) -> str | None:
    """The same of a denoiser whose tokens are known by its own image size, level by level."""
    size = getattr(getattr(model, "config", None), "sample_size", None)
    if size is None or traits(reducer).keys_only:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    patch = getattr(model.config, "patch_size", None) or 1
    poor = []
    for level in sorted({place.level for place in places}):
        tokens = (height // patch // 2**level) * (width // patch // 2**level)
        few = int(tokens * around.keep_rate)
        here = [place for place in places if place.level == level]
        saved = 0
        for place in here:
            for name in around.modules:
                if name in place.modules:
                    module = model.get_submodule(f"{place.path}.{place.modules[name]}")
                    dim = (width_of(module) or 0) if name == "attention" else 0
                    weights = _weights(module)
                    saved += _block(tokens, weights, dim) - _block(few, weights, dim)
        decisions = 1 if around.shared else len(here)
        if saved < WORTH * decisions:
            poor.append(f"{tokens} tokens of level {level}")
    if not poor:
        return None
    return (
        f"{' and '.join(poor)} are so few that {reducer} takes longer to choose than fewer tokens "
        "save: nothing is gained there, except with several images at once or on larger ones"
    )


def _block(tokens: int, weights: int, width: int) -> int:
    """Multiply-adds of a block: every weight for each token, and attention of all to all."""
    return tokens * weights + 2 * tokens * tokens * width


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)
