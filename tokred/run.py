"""One forward pass with fewer tokens: the seam between the engine and a patched block.

What a tensor of tokens stands for (how many original tokens each one is, and by which maps they
became few) is a value, `State`, that is looked up by the activation itself and lives as long as it
does. So passes may interleave: several threads, recomputation under gradient checkpointing, two
forward passes before a backward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokred.maps import Clusters, TokenMap, take
from tokred.reducers import Reducer, Tokens, place, varies
from tokred.schedule import Schedule, plan


@dataclass(frozen=True)
class Layout:
    """How a model lays out its sequence: prefix tokens in front, then a grid of patch tokens.

    Attributes:
        prefix: how many prefix tokens there are (class, distillation, register tokens).
        layers: how many blocks there are.
        grid: (height, width) of the patch tokens, for the model's own image size.
        class_token: whether the first token is a class token.
    """

    prefix: int
    layers: int
    grid: tuple[int, int]
    class_token: bool


@dataclass(frozen=True)
class Reduced:
    """One reduction that has happened: its map, how many tokens were asked for, and what is needed
    to undo it."""

    map: TokenMap
    asked: int
    size: Float[Tensor, "batch fine"] | None
    bias: Float[Tensor, "batch 1 1 fine_and_prefix"] | None
    stale: Float[Tensor, "batch fine dim"] | None


@dataclass(frozen=True)
class State:
    """What the tokens of one activation stand for.

    Attributes:
        counts: the plan of the pass: patch tokens after each layer.
        full: patch tokens of the full grid.
        trail: the reductions so far, the last one at the end.
        size: how many original tokens each patch token stands for, 0 for padding; None if each
            one for itself.
        bias: what is added to attention, zeros for the prefix tokens: the logarithm of the size
            where attention is proportional, -inf for padding.
        expanded: whether the activation is on the full grid again, copies for merged tokens.
        received: the attention that each patch token got in the block before, if a method before
            the next block wants to know.
    """

    counts: tuple[int, ...]
    full: int
    trail: tuple[Reduced, ...] = ()
    size: Float[Tensor, "batch tokens"] | None = None
    bias: Float[Tensor, "batch 1 1 tokens_and_prefix"] | None = None
    expanded: bool = False
    received: Float[Tensor, "batch tokens"] | None = None

    # Written out, because older versions of torch.compile cannot follow dataclasses.replace.
    def seen(self, expanded: bool) -> State:
        """The same tokens, on the full grid or few again."""
        return State(
            self.counts, self.full, self.trail, self.size, self.bias, expanded, self.received
        )

    @property
    def tokens(self) -> int:
        """Patch tokens of the activation."""
        return self.trail[-1].map.num_coarse if self.trail and not self.expanded else self.full

    @property
    def prunes(self) -> bool:
        """Whether tokens were dropped, rather than merged."""
        return any(not reduced.map.merges for reduced in self.trail)

    @property
    def ragged(self) -> bool:
        """Whether samples differ in their number of tokens, and some are padded."""
        return not self.expanded and any(reduced.map.ragged for reduced in self.trail)


@dataclass(frozen=True)
class Record:
    """What `tokred.inspect` wants to know of one reduction."""

    layer: int
    before: int
    map: TokenMap


@dataclass(eq=False)
class Reduction:
    """A method that has been put into a model: what stays the same between forward passes.

    Attributes:
        reducer: the method.
        schedule: how many tokens stay after each layer.
        layout: how the model lays out its tokens.
        proportional_attention: whether a token that stands for s tokens counts s times as a key.
        full_grid: whether features that leave the model are on the full grid again.
        attention: "host" calls the host's attention as it is set up; "fastest" may take the
            host's other way of computing it, see `explicit_is_faster`.
    """

    reducer: Reducer
    schedule: Schedule
    layout: Layout
    proportional_attention: bool = True
    full_grid: bool = True
    attention: str = "host"
    # Runtime state: by activation, and by thread. (An attribute of the tensor would do as well as
    # a weak dictionary, but would be saved and copied with features that leave the model.) Code
    # that is being compiled can see neither, and has a plain dictionary instead.
    _riding: Any = field(default_factory=WeakTensorKeyDictionary, repr=False)
    _local: Any = field(default_factory=threading.local, repr=False)
    _traced: dict[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        tokens = self.layout.grid[0] * self.layout.grid[1]
        counts = plan(self.schedule, tokens, self.layout.layers)
        return f"{self.reducer}, patch tokens per layer: {tokens} -> {', '.join(map(str, counts))}"

    def __getstate__(self) -> dict[str, Any]:
        runtime = {"_riding", "_local", "_traced"}
        return {name: value for name, value in vars(self).items() if name not in runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._riding, self._local, self._traced = WeakTensorKeyDictionary(), threading.local(), {}

    def start(self, x: Float[Tensor, "batch tokens dim"]) -> State:
        """The state of tokens that nothing has been done to."""
        tokens = x.shape[1] - self.layout.prefix
        return State(plan(self.schedule, tokens, self.layout.layers), tokens)

    def enter(
        self,
        layer: int,
        scale: float,
        x: Float[Tensor, "batch tokens dim"],
        explicit: nn.Module | None = None,
    ) -> Step:
        """Called when a patched block begins. The first block starts a pass, whoever called it."""
        state = self.start(x) if layer == 0 else self.carried(x) or self._alone(layer, x)
        step = Step(self, layer, scale, state, explicit)
        # Keys that nobody is going to read would be kept from being freed.
        self._put("signals", step.signals if step.wants_signals else None)
        return step

    def leave(self) -> None:
        """Called when a patched block ends: what was read off its submodules is let go."""
        self._put("signals", None)

    def _alone(self, layer: int, x: Float[Tensor, "batch tokens dim"]) -> State:
        """The state of tokens that come from nowhere into a later block: only a full grid can be
        told from tokens whose sizes were lost."""
        full = self.layout.prefix + self.layout.grid[0] * self.layout.grid[1]
        if x.shape[1] != full:
            raise RuntimeError(
                f"block {layer} got {x.shape[1]} tokens of which nothing is known; only a full "
                f"grid ({full} with prefix tokens) can enter in the middle. Under reentrant "
                "gradient checkpointing, use use_reentrant=False"
            )
        return self.start(x)

    def carry(self, x: Tensor, state: State) -> None:
        """Lets `state` ride on `x`."""
        if torch.compiler.is_compiling():
            self._traced["state"] = state
        else:
            self._riding[x] = state

    def remember(self, state: State) -> None:
        """Keeps the state for the next block of this thread, in case its activation loses it."""
        if not torch.compiler.is_compiling():
            self._local.state = state

    def carried(self, x: Tensor) -> State | None:
        """The state that rides on `x`. If `x` has lost it (it was moved, detached, or computed
        with), the last state of this thread, provided that it fits.

        Raises:
            RuntimeError: tokens were added or taken away between two blocks.
        """
        if torch.compiler.is_compiling():
            traced: State | None = self._traced.get("state")
            return traced
        state: State | None = self._riding.get(x)
        if state is None:
            state = getattr(self._local, "state", None)
        if state is not None and x.shape[1] != state.tokens + self.layout.prefix:
            raise RuntimeError(
                f"a patched block got {x.shape[1]} tokens, but the one before it has put out "
                f"{state.tokens + self.layout.prefix}. Tokens cannot be added or taken away "
                "between blocks while a reduction is applied; tokred.remove(model) takes it out. "
                "(A pass that was broken off is forgotten when the first block runs again.)"
            )
        return state

    def pass_on(self, x: Tensor, y: Tensor) -> None:
        """Lets the state of `x` ride on `y` too, the same tokens after a norm."""
        if not torch.compiler.is_compiling():
            state = self._riding.get(x)
            if state is not None:
                self._riding[y] = state

    def forget(self) -> None:
        """Drops the last state of this thread: the pass is over."""
        if torch.compiler.is_compiling():
            self._traced.clear()
        else:
            self._local.state = None

    def see(self, signal: str, value: Tensor) -> None:
        """Called when a tapped submodule of the running block has put something out."""
        signals = self._get("signals")
        if signals is not None:
            signals[signal] = value

    def set_tapped(self, layers: frozenset[int]) -> None:
        """Says at which layers the host hands out tokens during this call, and so wants the full
        grid."""
        self._put("tapped", layers)

    def tapped(self) -> frozenset[int]:
        layers: frozenset[int] | None = self._get("tapped")
        return layers or frozenset()

    @contextmanager
    def recording(self) -> Iterator[list[Record]]:
        """Collects what every reduction of this thread does, until the end of the block."""
        records: list[Record] = []
        self._local.records = records
        try:
            yield records
        finally:
            self._local.records = None

    def record(self, record: Record) -> None:
        if not torch.compiler.is_compiling():
            records = getattr(self._local, "records", None)
            if records is not None:
                records.append(record)

    def expand(
        self, x: Float[Tensor, "batch tokens dim"], state: State
    ) -> Float[Tensor, "batch full dim"]:
        """The full grid from reduced tokens: copies for merged ones, the last value for dropped
        ones."""
        if state.expanded or not state.trail:
            return x
        return _up_behind(self.layout.prefix, x, state.trail)

    def compress(
        self, x: Float[Tensor, "batch full dim"], state: State
    ) -> Float[Tensor, "batch tokens dim"]:
        """Reduced tokens from the full grid that `expand` has made. Merged tokens are copies of
        each other there, so that their mean is what they were."""
        if not state.expanded or not state.trail:
            return x
        prefix = self.layout.prefix
        tokens = x[:, prefix:]
        for reduced in state.trail:
            size = reduced.size
            if size is None:
                size = torch.ones(tokens.shape[:2], dtype=torch.float32, device=x.device)
            tokens = reduced.map.down(tokens, size)
        return torch.cat([x[:, :prefix], tokens], 1)

    def _put(self, name: str, value: Any) -> None:
        if torch.compiler.is_compiling():
            self._traced[name] = value
        else:
            setattr(self._local, name, value)

    def _get(self, name: str) -> Any:
        if torch.compiler.is_compiling():
            return self._traced.get(name)
        return getattr(self._local, name, None)


@dataclass
class Step:
    """One run of one patched block: all that a patch may call."""

    reduction: Reduction
    layer: int
    scale: float
    state: State
    explicit: nn.Module | None = None
    signals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def wants_signals(self) -> bool:
        """Whether something is read off this block: the method stands in it and is going to
        reduce, or before the next block, and is going to reduce there."""
        reducer, state = self.reduction.reducer, self.state
        if not reducer.needs:
            return False
        if place(reducer) == "before":
            return min(state.counts[self.layer : self.layer + 2]) < state.counts[self.layer]
        few = state.trail[-1].map.num_coarse if state.trail else state.full
        return state.counts[self.layer] < few

    def open(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch kept dim"]:
        """Before the block: few tokens again, if they were expanded for somebody to see, and fewer
        still, if that is where the method stands."""
        if self.state.expanded:
            x = self.reduction.compress(x, self.state)
            self.state = self.state.seen(expanded=False)
        return self._change(x) if place(self.reduction.reducer) == "before" else x

    def bias(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Proportional attention: a token that stands for s tokens counts s times as a key
        (ToMe, equation 1: log s is added to its logits). Just `mask` as long as no token stands
        for more than itself.

        Raises:
            ValueError: there is a mask, and this pass reduces tokens.
        """
        if mask is not None and min(self.state.counts) < self.state.full:
            raise ValueError(
                "attn_mask cannot be combined with token reduction here: it names positions "
                "that are merged or dropped. Call the model without it, or tokred.remove(model)"
            )
        if self.state.bias is None:
            return mask
        # In the dtype of x: with float64 queries and a float32 mask, torch's fused attention on
        # the CPU is silently wrong.
        return self.state.bias.to(x.dtype)

    def attend(
        self, attention: nn.Module, x: Float[Tensor, "batch tokens dim"], heads: int
    ) -> nn.Module:
        """The attention to call on `x`: the host's, or the same one computed the other way."""
        if self.explicit is not None and explicit_is_faster(x, heads):
            return self.explicit
        return attention

    def reduce(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch kept dim"]:
        """Between attention and MLP: as many tokens as the schedule asks for at this layer, if
        that is where the method stands."""
        if place(self.reduction.reducer) == "between":
            return self._change(x)
        self._receive()
        return x

    def _change(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch kept dim"]:
        prefix, counts = self.reduction.layout.prefix, self.state.counts
        num, keep = x.shape[1] - prefix, counts[self.layer]
        # What there should be. A method whose samples vary may have left more or fewer.
        exact = not varies(self.reduction.reducer)
        asked = num if exact else (self.state.full, *counts)[self.layer]
        if keep > asked:
            return self._rise(x, keep)
        if keep == asked or keep >= num:
            return x
        tokens = x[:, prefix:]
        size = self.state.size
        if size is None:
            size = torch.ones(tokens.shape[:2], dtype=torch.float32, device=x.device)
        view = self._tokens(tokens, size)
        # Autocast would compare tokens in half precision.
        with torch.autocast(x.device.type, enabled=False):
            token_map = self.reduction.reducer(view, keep)
            if exact and token_map.num_coarse != keep:
                raise ValueError(
                    f"{self.reduction.reducer} returned {token_map.num_coarse} tokens of {num} "
                    f"at layer {self.layer}, but was asked for {keep}"
                )
            fewer = token_map.down(tokens, size)
        self.signals.clear()  # so that the keys need not live on through the MLP
        del view
        self.reduction.record(Record(self.layer, num, token_map))
        self._went_down(token_map, keep, tokens, size)
        return torch.cat([x[:, :prefix], fewer], 1)

    def close(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch out dim"]:
        """After the block: the full grid, if somebody is going to see it."""
        reduction, state = self.reduction, self.state
        last = self.layer == reduction.layout.layers - 1
        if self.layer in reduction.tapped() or (last and reduction.full_grid):
            x = reduction.expand(x, state)
            state = state.seen(expanded=True)
        elif last and state.ragged:
            assert state.size is not None
            padding = F.pad(state.size == 0, (reduction.layout.prefix, 0))
            x = x.masked_fill(padding[..., None], 0)
        reduction.leave()
        if not last:
            reduction.carry(x, state)
            reduction.remember(state)
            return x
        reduction.forget()
        if needed_for_pooling(state):
            # The maps suffice for that; what was dropped need not live on with the features.
            trail = tuple(Reduced(r.map, r.asked, r.size, r.bias, None) for r in state.trail)
            rest = (state.size, state.bias, state.expanded)
            reduction.carry(x, State(state.counts, state.full, trail, *rest))
        return x

    def _tokens(
        self, x: Float[Tensor, "batch tokens dim"], size: Float[Tensor, "batch tokens"]
    ) -> Tokens:
        needs, layout, read = self.reduction.reducer.needs, self.reduction.layout, self.signals
        key, value = read.get("key"), read.get("value")
        attention = None
        if "class_attention" in needs:
            rows = read["query"][:, :, :1] if layout.class_token else read["query"]
            attention = self._attention(rows)[:, :, layout.prefix :]
        return Tokens(
            x=x,
            size=size,
            key=key.detach()[:, :, layout.prefix :] if key is not None and "key" in needs else None,
            value=value.detach()[:, :, layout.prefix :] if value is not None else None,
            class_attention=attention,
            attention_received=self.state.received,
            layer=self.layer,
            layers=layout.layers,
            before=layout.prefix,
        )

    def _attention(
        self, query: Float[Tensor, "batch heads rows head_dim"]
    ) -> Float[Tensor, "batch heads tokens"]:
        key, bias = self.signals["key"].detach(), self.state.bias
        return mean_attention(query.detach(), key, self.scale, bias)

    def _receive(self) -> None:
        """Keeps how much attention tokens got in this block, if the method stands before the next
        one and wants to know."""
        reducer, state = self.reduction.reducer, self.state
        if "attention_received" not in reducer.needs or not self.wants_signals:
            return
        query, prefix = self.signals["query"], self.reduction.layout.prefix
        received = self._attention(query).sum(1)[:, prefix:] * query.shape[2]
        self.signals.clear()
        self.state = State(
            state.counts, state.full, state.trail, state.size, state.bias, received=received
        )

    def _went_down(
        self,
        token_map: TokenMap,
        asked: int,
        tokens: Float[Tensor, "batch fine dim"],
        size: Float[Tensor, "batch fine"],
    ) -> None:
        state = self.state
        stale = None if token_map.merges else tokens
        reduced = Reduced(token_map, asked, state.size, state.bias, stale)
        new, bias = None, None
        if token_map.merges or token_map.ragged or state.size is not None:
            new = token_map.total(size)
            bias = self._bias_of(new, token_map.ragged or state.ragged)
        self.state = State(state.counts, state.full, (*state.trail, reduced), new, bias)

    def _bias_of(
        self, size: Float[Tensor, "batch tokens"], ragged: bool
    ) -> Float[Tensor, "batch 1 1 tokens_and_prefix"] | None:
        if self.reduction.proportional_attention:
            bias = size.log()  # -inf for padding
        elif ragged:
            bias = torch.zeros_like(size).masked_fill(size == 0, -torch.inf)
        else:
            return None
        return F.pad(bias, (self.reduction.layout.prefix, 0))[:, None, None, :]

    def _rise(self, x: Float[Tensor, "batch tokens dim"], to: int) -> Float[Tensor, "batch to dim"]:
        trail = self.state.trail
        undone: list[Reduced] = []
        size, bias = self.state.size, self.state.bias
        while trail and trail[-1].asked < to:
            *rest, reduced = trail
            trail = tuple(rest)
            undone.insert(0, reduced)
            size, bias = reduced.size, reduced.bias
        x = _up_behind(self.reduction.layout.prefix, x, tuple(undone))
        self.state = State(self.state.counts, self.state.full, trail, size, bias)
        return x


def explicit_is_faster(x: Float[Tensor, "batch tokens dim"], heads: int) -> bool:
    """Whether attention is faster as two matrix products and a softmax than fused.

    It is on CPUs, in bfloat16, where sequences are of middling length and all weights of one block
    together few enough to stay in the cache (measured on AVX-512).
    """
    batch, tokens, _ = x.shape
    few = batch * heads * tokens**2 <= 2**20
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and tokens >= 40 and few


def needed_for_pooling(state: State) -> bool:
    """Whether a pooled head must know what the tokens stand for: some were dropped, or they are
    still few."""
    return len(state.trail) > 0 and (state.prunes or not state.expanded)


def mean_attention(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    scale: float,
    bias: Float[Tensor, "batch 1 1 tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens"]:
    """The attention that each key gets from the given queries: softmax(scale * q k^T + bias), mean
    over the queries, float32. Head by head if the queries are many, so that the whole map of all
    heads never exists."""
    query, key = query.float(), key.float()
    if query.shape[2] == 1:
        logits = (query @ key.transpose(2, 3)) * scale
        return (logits if bias is None else logits + bias).softmax(-1).squeeze(2)
    heads = []
    for head in range(query.shape[1]):
        logits = (query[:, head] @ key[:, head].transpose(1, 2)) * scale
        heads.append((logits if bias is None else logits + bias[:, 0]).softmax(-1).mean(1))
    return torch.stack(heads, 1)


def _up_behind(
    prefix: int, x: Float[Tensor, "batch coarse dim"], trail: tuple[Reduced, ...]
) -> Float[Tensor, "batch fine dim"]:
    """Undoes the reductions of a trail, for tokens behind prefix tokens. Runs of merges are undone
    by one copy."""
    clusters: Clusters | None = None
    for reduced in reversed(trail):
        if type(reduced.map) is Clusters:
            clusters = reduced.map.then(clusters) if clusters else reduced.map
            continue
        if clusters:
            x, clusters = _copies(prefix, x, clusters), None
        x = torch.cat([x[:, :prefix], reduced.map.up(x[:, prefix:], reduced.stale)], 1)
    return _copies(prefix, x, clusters) if clusters else x


def _copies(
    prefix: int, x: Float[Tensor, "batch coarse dim"], clusters: Clusters
) -> Float[Tensor, "batch fine dim"]:
    """`clusters.up` behind prefix tokens. Those are copied along, which spares a second copy of
    everything to put the two together."""
    front = torch.arange(prefix, device=x.device).expand(x.shape[0], prefix)
    return take(x, torch.cat([front, clusters.index + prefix], 1))
