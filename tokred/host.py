"""What a patch must say about a model, and how the patch for a model is found."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor, nn

from tokred.run import Layout

ADDING_A_HOST = "docs/adding-a-host.md says how to add one"


class UnsupportedModelError(TypeError):
    """No patch knows this model, or the one that does cannot vouch for it."""


@dataclass(frozen=True)
class Host:
    """A model family, as tokred sees it. Written once per family, in a file of `patches/`.

    Attributes:
        model: instances of this class are patched by this host.
        block: the class whose `forward` the patch restates.
        blocks: the blocks of a model, in the order they run.
        layout: the layout of a model, for images of (height, width) pixels, or for the model's
            own image size if that is None.
        forward: the block's own forward, with the seam: `forward(block, step, x, ...)`, the same
            parameters after `x` as the block's.
        taps: where in a block a signal can be read: the submodule whose output it is. "key",
            "query" and "value" are [batch, heads, tokens, head_dim], as attention compares them.
        reads: `read(block, output)`, for signals that are only a part of that output. Functions
            of a module, because they are pickled with the model.
        scale: what attention multiplies its logits by, in a block.
        passes: modules of the model that tokens pass after the last block, one by one.
        explicit: makes, of a block, its attention computed without a fused kernel: a module that
            shares everything with the block's own; None if the host knows only one way, or the
            model is set up for that one.
        methods: methods of the model that must know of the reduction, and what is called instead:
            `method(reduction, original, model, *args, **kwargs)`, `original` being the function of
            the model's class.
        refuse: why a model (given the signals that are needed) cannot be patched; None if it can.
        summary: one clause for lists.
    """

    model: type[nn.Module]
    block: type[nn.Module]
    blocks: Callable[[Any], Sequence[nn.Module]]
    layout: Callable[[Any, tuple[int, int] | None], Layout]
    forward: Callable[..., Tensor]
    taps: Mapping[str, Callable[[Any], nn.Module]]
    scale: Callable[[Any], float]
    passes: Callable[[Any], Sequence[nn.Module]] = lambda model: ()
    reads: Mapping[str, Callable[[Any, Tensor], Tensor]] = field(default_factory=dict)
    explicit: Callable[[Any], nn.Module | None] = lambda block: None
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    refuse: Callable[[Any, frozenset[str]], str | None] = lambda model, signals: None
    summary: str = ""

    def check(self, model: nn.Module, signals: frozenset[str]) -> None:
        """Raises unless this model's blocks are the ones that the patch was written for.

        Raises:
            UnsupportedModelError: naming what stands in the way.
        """
        cls = _name(type(model))
        if not isinstance(model, self.model):
            raise UnsupportedModelError(f"{cls} is not a {_name(self.model)}, which was expected")
        blocks = self.blocks(model)
        if not blocks:
            raise UnsupportedModelError(f"{cls} has no blocks to reduce tokens in")
        for layer, block in enumerate(blocks):
            if type(block).forward is not self.block.forward:
                raise UnsupportedModelError(
                    f"{cls}: block {layer} is a {_name(type(block))}, but only "
                    f"{_name(self.block)} is supported here; {ADDING_A_HOST}"
                )
            there = vars(block).get("forward")
            if there is not None and not getattr(there, "is_tokred", False):
                raise UnsupportedModelError(
                    f"{cls}: the forward of block {layer} was replaced, by {there!r}; "
                    "undo that, and apply it again after tokred if you need it"
                )
        if len({id(block) for block in blocks}) < len(blocks):
            raise UnsupportedModelError(f"{cls}: some blocks are one and the same module")
        theirs = list(inspect.signature(self.block.forward).parameters)[1:]
        ours = list(inspect.signature(self.forward).parameters)[2:]
        # Older versions of a library lack the last parameters; an unknown one we cannot honour.
        if theirs != ours[: len(theirs)]:
            raise UnsupportedModelError(
                f"{_name(self.block)}.forward takes {theirs} in the installed version of its "
                f"library, but the patch was written for {ours}"
            )
        unread = signals - self.taps.keys()
        if unread:
            raise UnsupportedModelError(f"{cls}: this patch cannot read {sorted(unread)}")
        reason = self.refuse(model, signals)
        if reason:
            raise UnsupportedModelError(f"{cls}: {reason}")


def hosts() -> dict[str, Host]:
    """The patches of all libraries that are imported already, by file name.

    The first word of a patch's file name is its library (`timm_vit`: timm).
    """
    found = {}
    for name in patch_names():
        if name.split("_")[0] in sys.modules:
            found[name] = import_module(f"tokred.patches.{name}").HOST
    return found


def patch_names() -> list[str]:
    """The names of all patches, whether their library is installed or not."""
    try:
        patches = import_module("tokred.patches")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tokred.patches is missing: this is a source tree that is not installed; "
            "run `pip install -e .` in it"
        ) from error
    return sorted(module.name for module in iter_modules(patches.__path__))


def find_host(model: nn.Module) -> Host:
    """The host of a model.

    Raises:
        UnsupportedModelError: no patch knows the model's class.
        TypeError: it is no model at all.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
    known = hosts()
    for host in known.values():
        if isinstance(model, host.model):
            return host
    supported = ", ".join(f"{name} ({_name(host.model)})" for name, host in known.items())
    raise UnsupportedModelError(
        f"no patch for {_name(type(model))}; supported: "
        f"{supported or 'none of the imported libraries'}; {ADDING_A_HOST}"
    )


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
