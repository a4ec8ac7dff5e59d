"""What a patch must say about a model, and how the patch for a model is found."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor, nn

from tokred.engine.run import Layout

ADDING_A_HOST = "docs/adding-a-host.md says how to add one"


class UnsupportedModelError(TypeError):
    """No patch knows this model, or the one that does cannot vouch for it."""


@dataclass(frozen=True)
class Host:
    """A model family, as tokred sees it. Written once per family, in a file of `patches/`.

    Classes are named in full ("timm.models.vision_transformer.Block"), so that a patch can speak
    of classes that the installed version lacks, and imports no model for the sake of another.
    Functions that are called by a patched model (all but those marked *) are functions of a module,
    because they are pickled with it.

    Attributes:
        models: the classes of the models whose blocks these are: a vision tower, where it is part
            of something larger.
        forwards: for every class of block, its own forward with the seam: `forward(block, step, x,
            ...)`, the same parameters after `x` as the block's.
        blocks: * the blocks of a model, in the order they run.
        layout: * the layout of a model, for images of (height, width) pixels, or for the model's
            own image size if that is None.
        scale: * what attention multiplies its logits by, in a block.
        taps: where in a block a signal can be read: the path of the submodule whose output it is,
            or several paths, of which every class of block has one. "key", "query" and "value" are
            [batch, heads, tokens, head_dim], as attention compares them, but
            without rotary positions.
        reads: `read(block, output)`, for signals that have to be made of that output.
        attention: * the part of a block whose own forward is restated too, because it takes no
            mask or hides its keys; None if attention is called as it is.
        attend: that forward: `attend(attention, step, x, ...)`, the same parameters after `x`.
        shows: the signals that `attend` shows by `step.see`.
        explicit: * makes, of a block, its attention computed without a fused kernel: a module that
            shares everything with the block's own; None if the host knows only one way, or the
            model is set up for that one.
        passes: * modules of the model that tokens pass after the last block, one by one.
        pools: * modules of the model that are given the features and pool them; they see merged
            tokens as often as what they stand for, and no dropped ones.
        averages: * `averages(root, model)`: whether the patch tokens that leave the last block are
            pooled elsewhere, where dropped ones could not be told apart. They are left out then.
        merges_only: * `merges_only(root, model)`: why no tokens may be dropped in a model in which
            they may be merged; None if they may.
        methods: methods of the model that must know of the reduction, and what is called instead:
            `method(reduction, original, model, *args, **kwargs)`, `original` being the function of
            the model's class.
        tapped: `tapped(layers)`: the layers whose output the host is going to hand out during the
            call that runs.
        handed_out: the same where only the model and what it is called with can tell:
            `handed_out(model, args, kwargs)`.
        checkpoint: what the block's own forward would call itself through for gradient
            checkpointing; None if it would not, now.
        pads: whether images of a batch may come with different numbers of tokens, and a mask.
        means: * whether a module of one of `models` is meant, where other families have that class
            as well.
        stages: * of a model whose blocks attend in windows, the blocks of every stage. One stage is
            reduced (see `at`), in its windows; `blocks` is not asked, and `layout` for the patches
            in front of the first stage.
        window: * `window(block)`: rows and columns of a block's windows, where there are stages;
            None if the block attends to the whole feature map.
        grid: `grid(block, x, ...)`: rows and columns of the tokens that enter a block, given what
            the block is given, where there are stages: its tokens come and go as [batch, rows,
            columns, dim] or as [batch, tokens, dim].
        channels_first: whether they come and go as [batch, dim, rows, columns] instead.
        refuse: * why a model (given the signals that are needed) cannot be patched; None if it can.
        summary: one clause for lists.
    """

    models: tuple[str, ...]
    forwards: Mapping[str, Callable[..., Any]]
    blocks: Callable[[Any], Sequence[nn.Module]]
    layout: Callable[[Any, tuple[int, int] | None], Layout]
    scale: Callable[[Any], float]
    taps: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    reads: Mapping[str, Callable[[Any, Tensor], Tensor]] = field(default_factory=dict)
    attention: Callable[[Any], nn.Module] | None = None
    attend: Callable[..., Any] | None = None
    shows: frozenset[str] = frozenset()
    explicit: Callable[[Any], nn.Module | None] = lambda block: None
    passes: Callable[[Any], Sequence[nn.Module]] = lambda model: ()
    pools: Callable[[Any], Sequence[nn.Module]] = lambda model: ()
    averages: Callable[[Any, Any], bool] = lambda root, model: False
    merges_only: Callable[[Any, Any], str | None] = lambda root, model: None
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    tapped: Callable[[int], frozenset[int]] | None = None
    handed_out: Callable[[Any, Any, Any], frozenset[int]] | None = None
    checkpoint: Callable[[Any], Callable[..., Any] | None] | None = None
    pads: bool = False
    means: Callable[[Any], bool] = lambda model: True
    stages: Callable[[Any], Sequence[Sequence[nn.Module]]] | None = None
    window: Callable[[Any], tuple[int, int] | None] | None = None
    grid: Callable[..., tuple[int, int]] | None = None
    channels_first: bool = False
    base: Host | None = None
    refuse: Callable[[Any, frozenset[str]], str | None] = lambda model, signals: None
    summary: str = ""

    def at(self, model: nn.Module, stage: int | None = None) -> Host:
        """This host, for one stage of a model that has several: `blocks` are those of the stage,
        `layout` is that of one of its windows, or for given images that of its feature map.

        Args:
            model: the model.
            stage: which stage, from 0; the one with most blocks if not given.

        Raises:
            ValueError: there is no such stage.
        """
        base = self.base or self
        stages, window = base.stages, base.window
        if stages is None or window is None:
            if stage is not None:
                raise ValueError(
                    f"stage must be None: {_name(type(model))} is not reduced by stages"
                )
            return self
        sizes = [len(blocks) for blocks in stages(model)]
        chosen = sizes.index(max(sizes)) if stage is None else stage
        if not 0 <= chosen < len(sizes):
            raise ValueError(f"stage must be in [0, {len(sizes) - 1}], not {stage!r}")

        def blocks(model: Any) -> Sequence[nn.Module]:
            return stages(model)[chosen]

        def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
            grid = next(filter(None, map(window, blocks(model))), None)
            if grid is None or image_size is not None:
                grid = base.layout(model, image_size).grid
                for _ in range(chosen):
                    grid = (-(-grid[0] // 2), -(-grid[1] // 2))
            return Layout(prefix=0, layers=sizes[chosen], grid=grid, class_token=False)

        return replace(base, blocks=blocks, layout=layout, base=base)

    def applied_to(self, model: nn.Module) -> int | None:
        """The stage of a model in which a reduction hangs; None if in none."""
        stages = self.stages(model) if self.stages else ()
        at = (n for n, blocks in enumerate(stages) if any(is_patched(block) for block in blocks))
        return next(at, None)

    def forward_of(self, block: nn.Module) -> Callable[..., Any]:
        """The restated forward of a block, by its class."""
        return self.forwards[named(block, self.forwards)[0]]

    def tap_of(self, block: nn.Module, signal: str) -> str | None:
        """Where a signal can be read in this block; None if nowhere."""
        for path in self._paths(signal):
            if submodule(block, path) is not None:
                return path
        return None

    def _paths(self, signal: str) -> tuple[str, ...]:
        paths = self.taps[signal]
        return (paths,) if isinstance(paths, str) else paths

    def check(self, model: nn.Module, signals: frozenset[str]) -> None:
        """Raises unless this model's blocks are the ones that the patch was written for.

        Raises:
            UnsupportedModelError: naming what stands in the way.
        """
        cls = _name(type(model))
        if not is_a(model, self.models):
            raise UnsupportedModelError(
                f"{cls} is not a {' or a '.join(self.models)}, which was expected"
            )
        blocks = self.blocks(model)
        if not blocks:
            raise UnsupportedModelError(f"{cls} has no blocks to reduce tokens in")
        for layer, block in enumerate(blocks):
            if not is_a(block, self.forwards):
                raise UnsupportedModelError(
                    f"{cls}: block {layer} is a {_name(type(block))}, but only "
                    f"{', '.join(self.forwards)} is supported here; {ADDING_A_HOST}"
                )
            known, theirs = named(block, self.forwards)
            _check_forward(f"{cls}: block {layer}", block, theirs, self.forwards[known])
            if self.attention is not None and self.attend is not None:
                part = self.attention(block)
                what = f"{cls}: the attention of block {layer}"
                _check_forward(what, part, type(part), self.attend)
            for signal in sorted(signals & self.taps.keys()):
                if self.tap_of(block, signal) is None:
                    raise UnsupportedModelError(
                        f"{cls}: block {layer} has no {' or '.join(self._paths(signal))}, where "
                        f"its {signal} would be read"
                    )
        if len({id(block) for block in blocks}) < len(blocks):
            raise UnsupportedModelError(f"{cls}: some blocks are one and the same module")
        unread = signals - self.taps.keys() - self.shows
        if unread:
            raise UnsupportedModelError(f"{cls}: this patch cannot read {sorted(unread)}")
        reason = self.refuse(model, signals)
        if reason:
            raise UnsupportedModelError(f"{cls}: {reason}")


@dataclass(frozen=True)
class Place:
    """A block of a denoiser.

    Attributes:
        path: where it is in the model.
        owner: path of the module that lays its feature map out as the block's tokens.
        level: how often the grid of the latents (or of the patches) was halved before it.
        modules: path, in the block, of its "attention" (to itself), "cross_attention" and "mlp",
            as far as it has them: each is given its tokens first, as [batch, tokens, dim].
    """

    path: str
    owner: str
    level: int
    modules: Mapping[str, str]


@dataclass(frozen=True)
class Denoiser:
    """A family of denoisers of diffusion models, around whose modules tokens are merged.

    Classes are named in full, as for `Host`; functions that are called by a patched model (all but
    `places`) are functions of a module, because they are pickled with it.

    Attributes:
        models: the classes of the models.
        places: the blocks of a model, in the order they run.
        grid: `grid(owner, args, kwargs)`: rows and columns of the tokens that the owner of some
            blocks makes of what it is called with.
        progress: `progress(model, args, kwargs)`: where in the sampling a call of the model is,
            from 0 (noise) to 1 (image).
        summary: one clause for lists.
    """

    models: tuple[str, ...]
    places: Callable[[Any], Sequence[Place]]
    grid: Callable[[Any, Any, Any], tuple[int, int]]
    progress: Callable[[Any, Any, Any], float]
    summary: str = ""


def module_of(model: Any) -> Any:
    """The model that is meant: of a diffusers pipeline, its denoiser; of one of transformers, its
    model."""
    if isinstance(model, nn.Module):
        return model
    inside = (getattr(model, name, None) for name in ("unet", "transformer", "model"))
    return next((found for found in inside if isinstance(found, nn.Module)), model)


def find_denoiser(model: Any) -> Denoiser | None:
    """The patch for a model, if it is a denoiser that one knows."""
    if not isinstance(model, nn.Module):
        return None
    known = (found for found in _loaded().values() if isinstance(found, Denoiser))
    return next((denoiser for denoiser in known if is_a(model, denoiser.models)), None)


def hosts() -> dict[str, Host | Denoiser]:
    """The patches of all libraries that are imported already, by file name.

    The first word of a patch's file name is its library (`timm_vit`: timm). Patches that the
    installed version of their library cannot load are left out.
    """
    return {name: found for name, found in _loaded().items() if not isinstance(found, ImportError)}


def _loaded() -> dict[str, Host | Denoiser | ImportError]:
    """The patches of all libraries that are imported already, or why they cannot be loaded: a
    version that is too old for one library's patches is no reason to refuse another's models."""
    found: dict[str, Host | Denoiser | ImportError] = {}
    for name in patch_names():
        if library_of(name) in sys.modules:
            try:
                found[name] = import_module(f"tokred.patches.{name}").HOST
            except ImportError as error:
                found[name] = error
    return found


def library_of(patch: str) -> str:
    """The library that a patch is for, as it is imported."""
    return {"openclip": "open_clip"}.get(patch.split("_")[0], patch.split("_")[0])


def patch_names() -> list[str]:
    """The names of all patches, whether their library is installed or not."""
    try:
        patches = import_module("tokred.patches")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tokred.patches is missing: this is a source tree that is not installed; "
            "run `pip install -e .` in it"
        ) from error
    names = (module.name for module in iter_modules(patches.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def find_host(model: nn.Module, host: Host | None = None) -> tuple[Host, nn.Module]:
    """The host of a model, and the part of the model that it is for: the model itself, or the one
    vision tower somewhere inside.

    Args:
        model: the model.
        host: the host to look for; any, if not given.

    Raises:
        UnsupportedModelError: no patch knows the model's class, or there are several towers.
        TypeError: it is no model at all.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
    if isinstance(model, torch.fx.GraphModule | torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{_name(type(model))} is a graph that was exported or traced already: tokens cannot "
            "be reduced in it any more. Apply tokred to the model that it was made from, and "
            "export that"
        )
    known = hosts() if host is None else {"given": host}
    towers = _towers(model, [found for found in known.values() if isinstance(found, Host)])
    if len(towers) == 1:
        _, found, tower = towers[0]
        return (found if found.base else found.at(tower, found.applied_to(tower))), tower
    if towers:
        paths = ", ".join(f"{path} ({_name(type(tower))})" for path, _, tower in towers)
        raise UnsupportedModelError(
            f"{_name(type(model))} has {len(towers)} vision towers: {paths}; apply tokred to each "
            "one that you mean"
        )
    if host is not None:
        raise UnsupportedModelError(
            f"{_name(type(model))} is not a {' or a '.join(host.models)}, which was expected"
        )
    supported = ", ".join(known) or "none of the imported libraries"
    failed = {name: why for name, why in _loaded().items() if isinstance(why, ImportError)}
    told = "".join(
        f"; {name} needs another version of its library: {why}" for name, why in failed.items()
    )
    raise UnsupportedModelError(
        f"no patch for {_name(type(model))}; supported: {supported} (docs/hosts.md lists their "
        f"models){told}; {ADDING_A_HOST}"
    )


def _towers(model: nn.Module, known: list[Host]) -> list[tuple[str, Host, nn.Module]]:
    """The outermost modules that a host is for, and their paths."""
    found: list[tuple[str, Host, nn.Module]] = []
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        for host in known:
            if is_a(module, host.models) and host.means(module):
                found.append((path, host, module))
                inside.update(id(part) for part in module.modules())
                break
    return found


def named(module: nn.Module, names: Mapping[str, Any] | Sequence[str]) -> tuple[str, type]:
    """Which of the named classes a module is an instance of: the name and the class."""
    for cls in type(module).__mro__:
        if _name(cls) in names:
            return _name(cls), cls
    raise KeyError(_name(type(module)))


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a path; None if there is none."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def is_a(module: nn.Module, names: Mapping[str, Any] | Sequence[str]) -> bool:
    """Whether a module is an instance of one of the named classes."""
    return any(_name(cls) in names for cls in type(module).__mro__)


def _check_forward(what: str, module: nn.Module, cls: type, restated: Callable[..., Any]) -> None:
    """Raises unless the module's forward is the one of `cls`, with the restated parameters."""
    # Wrapped ones too: fully sharded layers are of a class of their own, whose forward
    # transformers wraps once more.
    if inspect.unwrap(type(module).forward) is not inspect.unwrap(cls.forward):  # type: ignore[attr-defined]
        raise UnsupportedModelError(
            f"{what} is a {_name(type(module))}, which has a forward of its own; only that of "
            f"{_name(cls)} is supported; {ADDING_A_HOST}"
        )
    there = innermost(module)
    if there is not None and not getattr(there, "is_tokred", False):
        raise UnsupportedModelError(
            f"{what}: its forward was replaced, by {there!r}; undo that, and apply it again after "
            "tokred if you need it"
        )
    theirs = list(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]
    ours = list(inspect.signature(restated).parameters)[2:]
    # Older versions of a library lack the last parameters; an unknown one we cannot honour.
    if ours == list(_VARIADIC):  # passes on whatever it is given
        return
    keywords = [name for name in theirs if name in _VARIADIC]
    plain = [name for name in theirs if name not in _VARIADIC]
    if plain != [name for name in ours if name not in _VARIADIC][: len(plain)] or (
        keywords and keywords[-1] not in ours
    ):
        raise UnsupportedModelError(
            f"{_name(cls)}.forward takes {theirs} in the installed version of its library, but the "
            f"patch was written for {ours}"
        )


_VARIADIC = ("args", "kwargs")


def innermost_slot(module: nn.Module) -> tuple[dict[str, Any], str]:
    """The dictionary and the name under which a module's forward is kept, inside of what
    accelerate and the hooks of diffusers have put around it."""
    own = vars(module)
    references = getattr(own.get("_diffusers_hook"), "_fn_refs", ())
    if "_old_forward" in own:  # accelerate
        wrapped = own["_old_forward"]
        if not references or inspect.ismethod(wrapped) or getattr(wrapped, "is_tokred", False):
            return own, "_old_forward"
    if references:
        first = vars(references[0])
        return first, "forward" if first["original_forward"] is None else "original_forward"
    return own, "forward"


def innermost(module: nn.Module) -> Any:
    """What was put in place of a module's forward; None if that is its class's own."""
    where, name = innermost_slot(module)
    there = where.get(name)
    own = inspect.ismethod(there) and there.__func__ is type(module).forward
    return None if own else there


def is_patched(block: nn.Module) -> bool:
    """Whether something of ours stands in place of a module's forward."""
    return bool(getattr(innermost(block), "is_tokred", False))


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
