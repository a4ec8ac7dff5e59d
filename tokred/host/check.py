"""Whether a model is the one that a patch was written for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from tokred.host.host import Host, Stage, UnsupportedModelError

ADDING_A_HOST = "docs/adding-a-host.md says how to add one"


def check_host(host: Host | Stage, model: nn.Module, signals: frozenset[str]) -> None:
    """Raises unless this model's blocks are the ones that the patch was written for.

    Args:
        host: the patch, or one stage of it.
        model: the tower.
        signals: what must be read off its blocks.

    Raises:
        UnsupportedModelError: naming what stands in the way.
    """
    cls, family = class_name(type(model)), host.family
    if not is_a(model, family.models):
        raise UnsupportedModelError(
            f"{cls} is not a {' or a '.join(family.models)}, which was expected"
        )
    blocks = blocks_of(host, model)
    if not blocks:
        raise UnsupportedModelError(f"{cls} has no blocks to reduce tokens in")
    for layer, block in enumerate(blocks):
        if not is_a(block, family.forwards):
            _check_not_wrapped(f"{cls}: block {layer}", block, family.forwards)
            raise UnsupportedModelError(
                f"{cls}: block {layer} is a {class_name(type(block))}, but only "
                f"{', '.join(family.forwards)} is supported here; {ADDING_A_HOST}"
            )
        known, theirs = named(block, family.forwards)
        _check_forward(f"{cls}: block {layer}", block, theirs, family.forwards[known])
        if family.attention is not None and family.attend is not None:
            part = family.attention(block)
            what = f"{cls}: the attention of block {layer}"
            _check_library(what, part, theirs)
            _check_forward(what, part, type(part), family.attend)
        if isinstance(family, Host):
            _check_taps(f"{cls}: block {layer}", family, block, signals)
            for path in _attentions(family):
                _check_own(f"{cls}: {path} of block {layer}", submodule(block, path))
    if len({id(block) for block in blocks}) < len(blocks):
        raise UnsupportedModelError(f"{cls}: some blocks are one and the same module")
    unread = signals - (family.taps.keys() | family.shows if isinstance(family, Host) else set())
    if unread:
        raise UnsupportedModelError(f"{cls}: this patch cannot read {sorted(unread)}")
    reason = family.refuse(model, signals)
    if reason:
        raise UnsupportedModelError(f"{cls}: {reason}")


def blocks_of(host: Host | Stage, model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, inside of what was put around each of them."""
    return [unwrapped(block) for block in host.blocks(model)]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of `torch.compile` and of `checkpoint_wrapper`, which run it by calling
    it."""
    while True:
        inside = (vars(module)["_modules"].get(name) for name in WRAPPED)
        inner = next((found for found in inside if found is not None), None)
        if inner is None:
            return module
        module = inner


WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where wrappers keep the module that they call."""


def forward_of(host: Host | Stage, block: nn.Module) -> Callable[..., Any]:
    """The restated forward of a block, by its class."""
    forwards = host.family.forwards
    return forwards[named(block, forwards)[0]]


def tap_of(host: Host, block: nn.Module, signal: str) -> str | None:
    """Where a signal can be read in this block; None if nowhere."""
    for path in _paths(host, signal):
        if submodule(block, path) is not None:
            return path
    return None


def named(module: nn.Module, names: Mapping[str, Any] | Sequence[str]) -> tuple[str, type]:
    """Which of the named classes a module is an instance of: the name and the class."""
    for cls in type(module).__mro__:
        if class_name(cls) in names:
            return class_name(cls), cls
    raise KeyError(class_name(type(module)))


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a path; None if there is none."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def is_a(module: nn.Module, names: Mapping[str, Any] | Sequence[str]) -> bool:
    """Whether a module is an instance of one of the named classes."""
    return any(class_name(cls) in names for cls in type(module).__mro__)


def class_name(cls: type) -> str:
    """The full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


# Forwards in place of others


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


_VARIADIC = ("args", "kwargs")


def _check_forward(what: str, module: nn.Module, cls: type, restated: Callable[..., Any]) -> None:
    """Raises unless the module's forward is the one of `cls`, with the restated parameters."""
    # Wrapped ones too: fully sharded layers are of a class of their own, whose forward
    # transformers wraps once more.
    if inspect.unwrap(type(module).forward) is not inspect.unwrap(cls.forward):  # type: ignore[attr-defined]
        raise UnsupportedModelError(
            f"{what} is a {class_name(type(module))}, which has a forward of its own; only that of "
            f"{class_name(cls)} is supported; {ADDING_A_HOST}"
        )
    _check_own(what, module)
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
            f"{class_name(cls)}.forward takes {theirs} in the installed version of its library, "
            f"but the patch was written for {ours}"
        )


def _check_own(what: str, module: nn.Module | None) -> None:
    """Raises if the forward of this instance was replaced."""
    there = None if module is None else innermost(module)
    if there is not None and not getattr(there, "is_tokred", False):
        raise UnsupportedModelError(
            f"{what}: its forward was replaced, by {there!r}; undo that, and apply it again after "
            "tokred if you need it"
        )


def _check_library(what: str, attention: nn.Module, block: type) -> None:
    """Raises if an attention that is restated is not of the library of its block."""
    forward = inspect.unwrap(type(attention).forward)
    library = block.__module__.split(".")[0]
    if forward.__module__.split(".")[0] not in (library, "torch"):
        raise UnsupportedModelError(
            f"{what} is a {class_name(type(attention))}, but only that of {library} is supported "
            f"here, which the patch restates; {ADDING_A_HOST}"
        )


def _check_not_wrapped(what: str, block: nn.Module, known: Mapping[str, Any]) -> None:
    """Raises if a block that we know is inside of something else."""
    inside = [part for part in block.children() if is_a(part, known)]
    if len(inside) == 1:
        raise UnsupportedModelError(
            f"{what} is a {class_name(type(inside[0]))} inside of a {class_name(type(block))}: "
            "call tokred.apply first, and put that around the blocks afterwards"
        )


def _attentions(host: Host) -> list[str]:
    """The paths of what signals are read off: the attention of a block, as it is called."""
    paths = [path for signal in host.taps for path in _paths(host, signal)]
    return list(dict.fromkeys(path.rpartition(".")[0] for path in paths if "." in path))


def _check_taps(what: str, host: Host, block: nn.Module, signals: frozenset[str]) -> None:
    """Raises unless the block has the submodules whose outputs are read."""
    for signal in sorted(signals & host.taps.keys()):
        if tap_of(host, block, signal) is None:
            raise UnsupportedModelError(
                f"{what} has no {' or '.join(_paths(host, signal))}, where its {signal} would be "
                "read"
            )


def _paths(host: Host, signal: str) -> tuple[str, ...]:
    paths = host.taps[signal]
    return (paths,) if isinstance(paths, str) else paths
