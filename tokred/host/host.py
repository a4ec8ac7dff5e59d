"""What a patch must say about a family of models: three kinds of hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokred.engine.denoising import Place
from tokred.engine.layout import Layout
from tokred.engine.sampling import THOUSAND, Times


class UnsupportedModelError(TypeError):
    """No patch knows this model, or the one that does cannot vouch for it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What `Host` and `WindowedHost` have in common: families of models whose blocks are patched.

    Written once per family, in a file of `patches/`. Classes are named in full
    ("timm.models.vision_transformer.Block"), so that a patch can speak of classes that the
    installed version lacks, and imports no model for the sake of another. Functions that are called
    by a patched model (all but those marked *) are functions of a module, because they are pickled
    with it.

    Attributes:
        models: the classes of the models whose blocks these are: a vision tower, where it is part
            of something larger.
        forwards: for every class of block, its own forward with the seam: `forward(block, step, x,
            ...)`, the same parameters after `x` as the block's.
        layout: * the layout of a model, for images of (height, width) pixels, or for the model's
            own image size if that is None.
        attention: * the part of a block whose own forward is restated too, because it takes no
            mask or hides its keys; None if attention is called as it is.
        attend: that forward: `attend(attention, step, x, ...)`, the same parameters after `x`.
        methods: methods of the model that must know of the reduction, and what is called instead:
            `method(reduction, original, model, *args, **kwargs)`, `original` being the function of
            the model's class.
        tapped: `tapped(layers)`: the layers whose output the host is going to hand out during the
            call that runs.
        handed_out: the same where only the model and what it is called with can tell:
            `handed_out(model, args, kwargs)`.
        always_full: * `always_full(block)`: whether the model looks at what leaves this block in
            every call, so that it must get the full grid there. (The last block has its own rule.)
        checkpoint: what the block's own forward would call itself through for gradient
            checkpointing; None if it would not, now.
        means: * whether a module of one of `models` is meant, where other families have that class
            as well.
        refuse: * why a model (given the signals that are needed) cannot be patched; None if it can.
        summary: one clause for lists; a plain text, which is read from the file (`summary_of`).
    """

    models: tuple[str, ...]
    forwards: Mapping[str, Callable[..., Any]]
    layout: Callable[[Any, tuple[int, int] | None], Layout]
    attention: Callable[[Any], nn.Module] | None = None
    attend: Callable[..., Any] | None = None
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    tapped: Callable[[int], frozenset[int]] | None = None
    handed_out: Callable[[Any, Any, Any], frozenset[int]] | None = None
    always_full: Callable[[Any], bool] = lambda block: False
    checkpoint: Callable[[Any], Callable[..., Any] | None] | None = None
    means: Callable[[Any], bool] = lambda model: True
    refuse: Callable[[Any, frozenset[str]], str | None] = lambda model, signals: None
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class Host(Family):
    """A family of models whose blocks attend to the whole image. See `Family` for the rest.

    Attributes:
        blocks: * the blocks of a model, in the order they run.
        scale: * what attention multiplies its logits by, in a block. If not given, one by the
            square root of the width of a head.
        taps: where in a block a signal can be read: the path of the submodule whose output it is,
            or several paths, of which every class of block has one. "key", "query" and "value" are
            [batch, heads, tokens, head_dim], as attention compares them, but without rotary
            positions.
        reads: `read(block, output)`, for signals that have to be made of that output.
        shows: the signals that `attend` (or `forward`) shows by `step.see`.
        explicit: * makes, of a block, its attention computed without a fused kernel: a module that
            shares everything with the block's own; None if the host knows only one way, or the
            model is set up for that one.
        passes: * modules of the model that tokens pass after the last block, one by one.
        pools: * modules of the model that are given the features and pool them; they see merged
            tokens as often as what they stand for, and no dropped ones.
        averages: * `averages(root, model)`: whether the patch tokens that leave the last block are
            pooled elsewhere, where dropped ones could not be told apart. They are left out then.
        averages_output: * `averages_output(root, model)`: the same, where what is pooled is what
            the model's own forward puts out: a tensor, the first of a tuple, or
            `last_hidden_state`. Dropped tokens are left out of that alone, so that hidden states
            are full grids. (Modules in between are among `passes`.)
        merges_only: * `merges_only(root, model)`: why no tokens may be dropped in a model in which
            they may be merged; None if they may.
        full_grid_only: * `full_grid_only(root, model)`: why features cannot be handed out reduced,
            as `full_grid=False` asks; None if they can.
        pads: whether images of a batch may come with different numbers of tokens, and a mask.
    """

    blocks: Callable[[Any], Sequence[nn.Module]]
    scale: Callable[[Any], float] | None = None
    taps: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    reads: Mapping[str, Callable[[Any, Tensor], Tensor]] = field(default_factory=dict)
    shows: frozenset[str] = frozenset()
    explicit: Callable[[Any], nn.Module | None] = lambda block: None
    passes: Callable[[Any], Sequence[nn.Module]] = lambda model: ()
    pools: Callable[[Any], Sequence[nn.Module]] = lambda model: ()
    averages: Callable[[Any, Any], bool] = lambda root, model: False
    averages_output: Callable[[Any, Any], bool] = lambda root, model: False
    merges_only: Callable[[Any, Any], str | None] = lambda root, model: None
    full_grid_only: Callable[[Any, Any], str | None] = lambda root, model: None
    pads: bool = False

    @property
    def family(self) -> Host:
        """The patch itself."""
        return self

    def at(self, model: nn.Module, stage: int | None = None) -> Host:
        """This host: its models have no stages to choose from.

        Raises:
            ValueError: a stage is chosen.
        """
        if stage is not None:
            raise ValueError(
                f"stage must be None: {type(model).__module__}.{type(model).__qualname__} is not "
                "reduced by stages"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class WindowedHost(Family):
    """A family of models whose blocks attend in windows. One stage of blocks is reduced, in its
    windows (see `at`). `layout` tells the patches in front of the first stage. See `Family` for the
    rest.

    Attributes:
        stages: * the blocks of every stage of a model.
        window: * `window(block)`: rows and columns of a block's windows; None if the block attends
            to the whole feature map.
        grid: `grid(block, x, ...)`: rows and columns of the tokens that enter a block, given what
            the block is given: its tokens come and go as [batch, rows, columns, dim] or as [batch,
            tokens, dim].
        channels_first: whether they come and go as [batch, dim, rows, columns] instead.
    """

    stages: Callable[[Any], Sequence[Sequence[nn.Module]]]
    window: Callable[[Any], tuple[int, int] | None]
    grid: Callable[..., tuple[int, int]]
    channels_first: bool = False

    def at(self, model: nn.Module, stage: int | None = None) -> Stage:
        """One stage of a model.

        Args:
            model: the model.
            stage: which stage, from 0; the one with most blocks if not given.

        Raises:
            ValueError: there is no such stage.
        """
        sizes = [len(blocks) for blocks in self.stages(model)]
        chosen = sizes.index(max(sizes)) if stage is None else stage
        if not 0 <= chosen < len(sizes):
            raise ValueError(f"stage must be in [0, {len(sizes) - 1}], not {stage!r}")
        return Stage(self, chosen)


@dataclass(frozen=True)
class Stage:
    """One stage of models whose blocks attend in windows.

    Attributes:
        family: the patch.
        number: which stage, from 0.
    """

    family: WindowedHost
    number: int

    def at(self, model: nn.Module, stage: int | None = None) -> Stage:
        """Another stage of a model, see `WindowedHost.at`."""
        return self.family.at(model, stage)

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """The blocks of this stage."""
        return self.family.stages(model)[self.number]

    def layout(self, model: Any, image_size: tuple[int, int] | None) -> Layout:
        """The layout of one of its windows; for images of (height, width) pixels, or where no block
        has windows, that of its whole feature map."""
        blocks = self.blocks(model)
        grid = next(filter(None, map(self.family.window, blocks)), None)
        if grid is None or image_size is not None:
            grid = self.family.layout(model, image_size).grid
            for _ in range(self.number):
                grid = (-(-grid[0] // 2), -(-grid[1] // 2))
        return Layout(prefix=0, layers=len(blocks), grid=grid, class_token=False)


@dataclass(frozen=True)
class Denoiser:
    """A family of denoisers of diffusion models, around whose modules tokens are merged.

    Classes are named in full, as for `Host`; functions that are called by a patched model (all but
    those marked *) are functions of a module, because they are pickled with it.

    Attributes:
        models: the classes of the models.
        places: * the blocks of a model, in the order they run.
        grid: `grid(owner, args, kwargs)`: rows and columns of the tokens that the owner of some
            blocks makes of what it is called with.
        timestep: `timestep(model, args, kwargs)`: the time step that the model is called with.
        prompt: `prompt(model, args, kwargs)`: what else it is called with that stays the same in
            all steps of a sampling, and differs between the calls of one step: the tensors of the
            text, say.
        beside: `beside(attention, x, kwargs, down)`: what attention is called with beside its
            tokens, made for few of them: `x` are all tokens, [batch, tokens, dim], and `down` makes
            few of such a tensor. It raises ValueError where that cannot be done.
        keys: `keys(attention)`: why self-attention cannot be given other tokens for its keys and
            values (as `encoder_hidden_states`); None if it can. Asked before each use, as
            processors may be exchanged.
        times: * `times(model)`: the time steps that a model is usually called with.
        summary: one clause for lists; a plain text, which is read from the file (`summary_of`).
    """

    models: tuple[str, ...]
    places: Callable[[Any], Sequence[Place]]
    grid: Callable[[Any, Any, Any], tuple[int, int]]
    timestep: Callable[[Any, Any, Any], Any]
    prompt: Callable[[Any, Any, Any], Sequence[Tensor]]
    beside: Callable[[Any, Tensor, Any, Callable[[Tensor], Tensor]], dict[str, Any]]
    keys: Callable[[Any], str | None]
    times: Callable[[Any], Times] = lambda model: THOUSAND
    summary: str = ""
