"""What hangs on a patched model: stand-ins for forwards, and hooks.

They are objects rather than closures, so that a copied or pickled model takes its own along.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from tokred.engine import passing
from tokred.engine.gated import gather
from tokred.engine.leaving import outside_of_the_graph
from tokred.engine.pooling import poolable
from tokred.engine.reduction import Reduction
from tokred.engine.state import State
from tokred.engine.step import Step, enter, passing_by
from tokred.engine.windows import too_small
from tokred.graphs import compiling, exporting, in_a_graph, tracing
from tokred.host import Denoiser, Host, Stage, find_host, hosts, is_a, submodule
from tokred.patching.tracers import as_node, refuse_fx, refuse_vmap, traced

Checkpoint = Callable[[Any], Callable[..., Any] | None]
Read = Callable[[Any, Tensor], Tensor]


MARK = "_tokred"
"""The attribute of a module that keeps what stands in for its methods, by their names: what is
wrapped around a stand-in later hides it."""


def hung_on(module: nn.Module) -> dict[str, Any]:
    """What stands in for methods of a module, by their names, whatever is wrapped around it."""
    found: dict[str, Any] = getattr(module, MARK, {})
    return found


@dataclass(eq=False)
class Tower:
    """The model whose blocks are patched. Blocks may be cut off or replaced behind our back: layers
    behind the features that are wanted often are.

    Attributes:
        model: the model.
        reduction: what is applied.
        host: its patch; None in a copy that was loaded from a file, until it is asked for.
        wrapped: whether something was put around its blocks before they were patched.
    """

    model: nn.Module
    reduction: Reduction
    host: Host | Stage | None
    wrapped: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "host": None}  # some of its functions cannot be pickled

    def __call__(self) -> int:
        """How many blocks run, up to the last patched one that is still there. Blocks behind it get
        the full grid.

        Raises:
            RuntimeError: there is another block among those that are patched, or none are left.
        """
        if compiling() and self.wrapped:
            # The compiler cannot follow how blocks that are compiled themselves are looked into.
            why = "blocks were compiled one by one before tokred.apply"
            return outside_of_the_graph(why, self._count)
        return self._count()

    def _count(self) -> int:
        if self.host is None:
            self.host = find_host(self.model)[0]
        last, strange = -1, -1
        for at, block in enumerate(self.host.blocks(self.model)):
            layer = self._layer(block)
            if layer is None:
                strange = at if strange < 0 else strange
            elif strange >= 0 or layer <= last:
                raise RuntimeError(
                    f"block {at if strange < 0 else strange} of {type(self.model).__name__} is "
                    "another one than when tokred was applied: call tokred.apply again"
                )
            else:
                last = layer
        if last < 0:
            raise RuntimeError(
                f"no block of {type(self.model).__name__} is one that tokred was applied to: call "
                "tokred.apply again"
            )
        return last + 1

    def _layer(self, block: nn.Module) -> int | None:
        """Which of the patched blocks one is, if it is one, in whatever is wrapped around it."""
        found = hung_on(block).get("forward")
        if isinstance(found, StandIn):
            return found.layer if found.reduction is self.reduction else None
        for part in block.modules():
            found = hung_on(part).get("forward")
            if isinstance(found, StandIn) and found.reduction is self.reduction:
                return found.layer
        return None


@dataclass(eq=False, kw_only=True)
class StandIn:
    """Stands in for `block.forward`.

    Attributes:
        block: the block.
        call: its restated forward.
        reduction: what is applied.
        layer: which block it is, from 0.
        first: whether it is the first one.
        checkpoint: what its own forward would call itself through, see `Family.checkpoint`.
        always_full: whether the model looks at what leaves it in every call; None if its patch is
            still to be asked.
        off: whether it was taken away, but is still called, by something that was wrapped around
            it later. It is the block's own forward then.
    """

    is_tokred: ClassVar[bool] = True
    __name__: ClassVar[str] = "forward"

    block: nn.Module
    call: Callable[..., Any]
    reduction: Reduction
    layer: int
    first: bool
    checkpoint: Checkpoint | None = None
    always_full: bool | None = False
    off: bool = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Up to version 0.7 one class stood in for blocks of all kinds, and forwards said themselves
        # what is always seen.
        if state.get("grid") is not None:
            self.__class__ = PatchedInWindows
        self.__dict__.update({"always_full": None, "off": False, **state})

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(type(self.block).forward, self.block)  # for inspect.signature

    def _as_node(self, proxy: Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """This block as one node of a graph of torch.fx."""
        hooks = proxy.tracer.root._forward_pre_hooks.values()  # type: ignore[attr-defined]
        if any(isinstance(hook, HandedOut) for hook in hooks):
            refuse_fx(self.reduction, "which layers the model hands out")
        hooks = proxy.tracer.root._forward_hooks.values()  # type: ignore[attr-defined]
        if any(isinstance(hook, Trim) for hook in hooks):
            refuse_fx(self.reduction, "which of them were dropped")
        return as_node(self.block, proxy, args, kwargs)

    def _hand_out(self, step: Step) -> None:
        """Lets the block put out the full grid, if the model looks at it in every call."""
        if self.always_full is None:
            families = [found for found in hosts().values() if not isinstance(found, Denoiser)]
            known = (found for found in families if is_a(self.block, found.forwards))
            self.always_full = next((found.always_full(self.block) for found in known), False)
        if self.always_full and not step.last:
            step.hand_out()

    def _with_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments by position, where the tokens were given by name."""
        if args:
            return args
        return (kwargs.pop(next(iter(inspect.signature(self.__wrapped__).parameters))),)


@dataclass(eq=False, kw_only=True)
class Patched(StandIn):
    """Stands in for the forward of a block that attends to the whole image. See `StandIn`, too.

    Attributes:
        scale: what attention multiplies its logits by; None for one by the square root of the width
            of a head.
        explicit: its attention, computed the host's other way.
        taps: for every signal that is read off the block, its name, where, and how.
        mask: name of the mask that it is given, and which argument behind the tokens it is.
        pads: whether images of a batch may come with different numbers of tokens.
    """

    scale: float | None = None
    explicit: nn.Module | None = None
    taps: tuple[tuple[str, str, Read | None], ...] = ()
    mask: tuple[str, int] | None = None
    pads: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.__wrapped__(*args, **kwargs)
        if args and self.always_full is False and not compiling() and not tracing():
            step = passing_by(self.reduction, args[0], self.layer, self.scale, self.explicit)
            if step is not None:
                return step.pass_by(self.call(self.block, step, *args, **kwargs))
        proxy = traced(args, kwargs)
        if proxy is not None:
            return self._as_node(proxy, args, kwargs)
        if torch.compiler.is_compiling() and self._in_a_graph(args, kwargs):
            why = self._varies(args, kwargs)
            if why is not None:
                return outside_of_the_graph(why, self, *args, **kwargs)
        through = None if self.checkpoint is None else self.checkpoint(self.block)
        if through is not None:
            return through(partial(self.run, **kwargs), *args)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The block with fewer tokens, whatever it is called through."""
        x, *others = self._with_tokens(args, kwargs)
        refuse_vmap(self.reduction, x)
        step = enter(
            self.reduction,
            x,
            self.layer,
            first=self.first,
            scale=self.scale,
            mask=self._given_mask(others, kwargs) if self.first else None,
            explicit=self.explicit,
            training=self.block.training,
        )
        self._hand_out(step)
        if self.taps and not compiling() and step.wants_signals:
            self.tap()
        few = step.open(x)
        if step.masked or self.reduction.traits.place != "around":
            y = self.call(self.block, step, few, *others, **kwargs)
        else:
            given = (*others, *kwargs.values())
            y = gather(
                step,
                lambda x: self.call(self.block, step, x, *others, **kwargs),
                few,
                alone=not any(isinstance(value, Tensor) for value in given),
            )
        if isinstance(y, tuple):
            return (step.close(y[0]), *y[1:])
        return step.close(y)

    def tap(self) -> None:
        """Reads signals where they are now: a submodule may have been replaced since last time,
        by an adapter around it for example."""
        for signal, path, read in self.taps:
            module = submodule(self.block, path)
            if module is None:
                continue
            there = [hook for hook in module._forward_hooks.values() if _reads(hook, signal)]
            if any(hook.reduction is self.reduction for hook in there):
                continue
            for part in module.modules():
                for key, hung in list(part._forward_hooks.items()):
                    if _reads(hung, signal):
                        del part._forward_hooks[key]
            module.register_forward_hook(Tap(self.reduction, signal, read, self.block))

    def _in_a_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return in_a_graph(self._with_tokens(args, dict(kwargs))[0])

    def _varies(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why a graph cannot hold this block: what happens depends on the images. None if it
        can."""
        if self.reduction.traits.varies:
            return varying(self.reduction)
        if self.reduction.gates is not None and self.block.training:
            return f"{self.reduction.reducer} keeps its decisions for the loss in training mode"
        if self.pads and self._given_mask(args[1:], kwargs) is not None:
            return "images of a padded batch have different numbers of tokens"
        return None

    def _given_mask(self, others: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
        if self.mask is None:
            return None
        name, at = self.mask
        mask: Tensor | None = others[at] if at < len(others) else kwargs.get(name)
        return mask


@dataclass(eq=False, kw_only=True)
class PatchedInWindows(StandIn):
    """Stands in for the forward of a block that attends in windows. See `StandIn`, too.

    Attributes:
        grid: tells the grid of its tokens, see `WindowedHost.grid`.
        channels_first: whether its tokens come and go as [batch, dim, rows, columns].
    """

    grid: Callable[..., tuple[int, int]]
    channels_first: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.__wrapped__(*args, **kwargs)
        proxy = traced(args, kwargs)
        if proxy is not None:
            return self._as_node(proxy, args, kwargs)
        through = None if self.checkpoint is None else self.checkpoint(self.block)
        if through is None:
            return self.run(*args, **kwargs)
        if self.first or not args:
            return through(partial(self.run, **kwargs), *args)
        state = self.reduction.memory.ridden(args[0])
        return through(partial(self._knowing, state, kwargs), *args)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The block on smaller windows, whatever it is called through."""
        x, *others = self._with_tokens(args, kwargs)
        refuse_vmap(self.reduction, x)
        if self.first:
            self._begin(self.grid(self.block, x, *others, **kwargs))
        reduction = self.reduction
        tokens = self._tokens_of(x)
        passing.pass_on(reduction, x, tokens)
        step = enter(reduction, tokens, self.layer, first=self.first)
        passing.pass_on(reduction, tokens, x)
        self._hand_out(step)
        tokens = step.open(tokens)
        y = self.call(self.block, step, self._map_of(tokens, step, x), *others, **kwargs)
        rest = None
        if isinstance(y, tuple):
            y, *rest = y
        tokens = step.close(self._tokens_of(y))
        y = self._map_of(tokens, step, x)
        if y is not tokens:
            passing.pass_on(reduction, tokens, y)
        return y if rest is None else (y, *rest)

    def _begin(self, grid: tuple[int, int]) -> None:
        """Only the block itself knows the grid of the feature map."""
        self.reduction.set_grid(grid)
        if not compiling() and too_small(self.reduction, grid):
            warnings.warn(
                f"a feature map of {grid[0]}x{grid[1]} tokens is too small for its windows to "
                "be reduced: nothing is reduced",
                stacklevel=3,
            )

    def _knowing(self, state: State | None, kwargs: dict[str, Any], x: Tensor, *others: Any) -> Any:
        """`run`, if `x` may be a copy: where a whole stage is checkpointed, and its blocks once
        more, recomputation has no other. (Only where it is right for any kind of checkpointing:
        no gradient flows through the state.)"""
        if state is not None and not compiling():
            passing.carry(self.reduction, x, state)
        return self.run(x, *others, **kwargs)

    def _tokens_of(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] of a feature map in the host's form."""
        if self.channels_first:
            return x.flatten(2).transpose(1, 2)
        return x.flatten(1, -2)

    def _map_of(self, tokens: Tensor, step: Step, like: Tensor) -> Tensor:
        """The feature map, in the host's form, of [batch, tokens, dim]."""
        if like.ndim == 3:
            return tokens
        cells: Tensor = tokens.unflatten(1, step.grid_of(tokens))
        return cells.movedim(-1, 1) if self.channels_first else cells


@dataclass(eq=False)
class PatchedAttention:
    """Stands in for the forward of a block's attention, while the block runs."""

    is_tokred: ClassVar[bool] = True
    __name__: ClassVar[str] = "forward"

    attention: nn.Module
    call: Callable[..., Any]
    reduction: Reduction
    off: bool = False  # see `StandIn`

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(type(self.attention).forward, self.attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = None if self.off else self.reduction.running
        if step is None:
            return type(self.attention).forward(self.attention, *args, **kwargs)
        return self.call(self.attention, step, *args, **kwargs)


@dataclass(eq=False)
class PatchedMethod:
    """Stands in for another method of the model."""

    model: nn.Module
    original: Callable[..., Any]
    call: Callable[..., Any]
    reduction: Reduction
    off: bool = False  # see `StandIn`

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(self.original, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.off:
            return self.__wrapped__(*args, **kwargs)
        if traced(args, kwargs) is not None:
            refuse_fx(self.reduction, f"how {type(self.model).__name__} pools them")
            return self.original(self.model, *args, **kwargs)
        if (compiling() or exporting()) and self.reduction.traits.varies:
            return outside_of_the_graph(varying(self.reduction), self, *args, **kwargs)
        return self.call(self.reduction, self.original, self.model, *args, **kwargs)


@dataclass(eq=False)
class Tap:
    """A forward hook that shows a submodule's output to the running block."""

    reduction: Reduction
    signal: str
    read: Read | None
    block: nn.Module

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        step = self.reduction.running
        if step is not None:
            value = output if self.read is None else self.read(self.block, output)
            step.see(**{self.signal: value})


@dataclass(eq=False)
class Carry:
    """A forward hook that carries the state across a module that treats tokens one by one."""

    reduction: Reduction

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        proxy = traced(args, {})
        if proxy is not None:  # a norm of a class of the model's library, which torch.fx opens
            return as_node(module, proxy, args, {})
        if in_a_graph(args[0]) and self.reduction.traits.varies:
            outside_of_the_graph(varying(self.reduction), self, module, args, output)
        else:
            passing.pass_on(self.reduction, args[0], output)
        return None


@dataclass(eq=False)
class Grid:
    """A forward hook that tells on which grid the patches of the images stand. Of videos, the
    frames are stacked."""

    reduction: Reduction

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        proxy = traced(args, {})
        if proxy is not None:
            return as_node(module, proxy, args, {})
        *frames, rows, columns = output.shape[2:]
        self.reduction.set_grid((math.prod(frames) * rows, columns))
        return None


@dataclass(eq=False)
class HandedOut:
    """A forward pre-hook of the model that tells which layers a call of it hands out."""

    reduction: Reduction
    layers: Callable[[Any, Any, Any], frozenset[int]]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if traced(args, kwargs) is not None:
            refuse_fx(self.reduction, "which layers the model hands out")
            return
        self.reduction.set_tapped(self.layers(module, args, kwargs))


@dataclass(eq=False)
class Pool:
    """A forward pre-hook of a module that pools features, see `tokred.engine.pooling`."""

    reduction: Reduction

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if traced(args, {}) is not None:
            refuse_fx(self.reduction, f"what {type(module).__name__} must know of them")
            return None
        found = poolable(self.reduction, args[0])
        if found is None:
            return None
        seen, there = found
        mask = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else None
        if mask is None:
            if there is not None and not bool(there.all()):
                raise ValueError(
                    f"{self.reduction.reducer} keeps different numbers of tokens in different "
                    f"images, and {type(module).__name__} pools without a mask: use a method that "
                    "merges, or images one by one"
                )
            return (seen, *args[1:])
        if mask.shape[-1] == seen.shape[1]:
            return (seen, *args[1:])
        # The mask says which tokens of the full sequence are there, of which some were dropped.
        left = torch.ones(seen.shape[:2], dtype=torch.bool, device=seen.device)
        if there is not None:
            layout = self.reduction.layout
            left = F.pad(there, (layout.prefix, layout.suffix), value=True)
        return (seen, left.to(mask.dtype), *args[2:])


@dataclass(eq=False)
class Trim:
    """A forward hook of a model whose output is averaged elsewhere: leaves the dropped tokens out
    of it, if the last block has put out the full grid."""

    reduction: Reduction

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.reduction.memory.here.state is None:
            return output
        by_name = isinstance(output, Mapping)
        if by_name:
            features = output["last_hidden_state"]
        else:
            features = output[0] if isinstance(output, tuple) else output
        if traced((features,), {}) is not None:
            refuse_fx(self.reduction, "which of them were dropped")
            return output
        found = poolable(self.reduction, features)
        passing.forget(self.reduction)
        if found is None or found[0] is features:
            return output
        # Images that keep different numbers of tokens were refused when they left the last block.
        if by_name:
            return type(output)(**{**output, "last_hidden_state": found[0]})
        return (found[0], *output[1:]) if isinstance(output, tuple) else found[0]


HOOKS = (Tap, Carry, Pool, Grid, HandedOut, Trim)


def varying(reduction: Reduction) -> str:
    """What to say of a method that decides by the images how many tokens stay."""
    return f"{reduction.reducer} keeps different numbers of tokens in different images"


def _reads(hook: Any, signal: str) -> TypeGuard[Tap]:
    return isinstance(hook, Tap) and hook.signal == signal
