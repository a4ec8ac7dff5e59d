"""Patched models under tracers that are older than torch.export: torch.fx, TorchScript, vmap.

torch.fx gets every patched block as one node of its graph, and the norm behind the blocks as
another. TorchScript gets the model without what hangs on it, where that reduces nothing. What
cannot be right is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from tokred.engine.reduction import Reduction
from tokred.graphs import compiling


def keeps_all(reduction: Any) -> bool:
    """Whether nothing is ever reduced, at the model's own image size and at larger ones."""
    if not isinstance(reduction, Reduction):
        return bool(reduction.around.keep_rate == 1)
    return reduction.keeps_all


# torch.fx


def traced(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Proxy | None:
    """One of the arguments, if torch.fx is tracing and they stand for what is not there yet."""
    if compiling():
        return None
    for given in args:  # (Every block asks this in every pass: a generator takes longer.)
        if isinstance(given, Proxy):
            return given
    for given in kwargs.values():
        if isinstance(given, Proxy):
            return given
    return None


def as_node(module: nn.Module, proxy: Proxy, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A node of the graph that calls a module, so that what hangs on it works when the graph
    runs."""
    tracer = proxy.tracer
    path = tracer.path_of_module(module)  # type: ignore[attr-defined]
    return tracer.create_proxy("call_module", path, tuple(args), dict(kwargs))


def refuse_fx(reduction: Reduction, what: str) -> None:
    """Raises unless nothing is reduced.

    Args:
        reduction: what is applied.
        what: what torch.fx would leave out of its graph.

    Raises:
        RuntimeError: something is.
    """
    if not keeps_all(reduction):
        raise RuntimeError(
            f"torch.fx cannot trace this model while {reduction.reducer} reduces its tokens: the "
            f"graph would leave out {what}. Use torch.export or torch.compile, or the model's own "
            "ways to hand out features; tokred.remove(model) takes the reduction out"
        )


# torch.func.vmap


def refuse_vmap(reduction: Any, x: Tensor) -> None:
    """Raises where `torch.func.vmap` runs a block that something is reduced in.

    Raises:
        RuntimeError: it does.
    """
    if compiling() or not torch._C._functorch.is_batchedtensor(x):
        return
    if not keeps_all(reduction):
        raise RuntimeError(
            f"torch.func.vmap cannot run a model while {reduction.reducer} reduces its tokens: "
            "each image would have other ones. Give the model the images as a batch, which treats "
            "them apart"
        )


# TorchScript


@dataclass(eq=False)
class Scripted:
    """What `torch.jit.script` asks a module for before it compiles it (`__prepare_scriptable__`).

    Attributes:
        module: the module.
        reduction: what is applied.
        plain: makes a copy without what hangs on it, with the same weights.
    """

    NAME: ClassVar[str] = "__prepare_scriptable__"

    module: nn.Module
    reduction: Any
    plain: Callable[[nn.Module], nn.Module]

    def __call__(self) -> nn.Module:
        if not keeps_all(self.reduction):
            raise RuntimeError(
                f"torch.jit.script cannot compile a model while {self.reduction.reducer} reduces "
                "its tokens: TorchScript reads source code, in which the reduction is not. "
                "Use torch.export, torch.compile or torch.jit.trace; tokred.remove(model) "
                "takes the reduction out"
            )
        return self.plain(self.module)
