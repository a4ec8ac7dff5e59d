"""One forward pass with fewer tokens: the seam between the engine and a patched block.

What a tensor of tokens stands for (how many original tokens each one is, and by which maps they
became few) is a value, `State`, that is looked up by the activation itself and lives as long as it
does. So passes may interleave: several threads, recomputation under gradient checkpointing, two
forward passes before a backward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokred import gates as weights
from tokred.kernels.varlen import NotPerImageError, PerImage
from tokred.maps import Clusters, Kept, TokenMap, Weighted, ranked, side_by_side, take
from tokred.reducers import Reconstruction, Reducer, Tokens, learned, place, prunes, varies
from tokred.schedule import Schedule, plan, shares


@dataclass(frozen=True)
class Layout:
    """How a model lays out its sequence: prefix tokens, a grid of patch tokens, suffix tokens.

    Attributes:
        prefix: how many tokens stand in front (class, distillation, register tokens).
        layers: how many blocks there are.
        grid: (height, width) of the patch tokens, for the model's own image size. Of a video,
            the frames are stacked: (frames * height, width).
        class_token: whether the first token is a class token.
        suffix: how many tokens stand at the end (detection tokens).
        by_position: whether blocks are given anything by position (rotary tables, relative
            position biases), so that we have to know where tokens stand.
        raster: whether patch tokens run row by row; not where the model shuffles them.
    """

    prefix: int
    layers: int
    grid: tuple[int, int]
    class_token: bool
    suffix: int = 0
    by_position: bool = False
    raster: bool = True

    @property
    def patches(self) -> int:
        """Patch tokens, for the model's own image size."""
        return self.grid[0] * self.grid[1]

    @property
    def others(self) -> int:
        """Tokens that are never touched."""
        return self.prefix + self.suffix


@dataclass(frozen=True)
class Ahead:
    """What a pass has still to do: this block, and those behind it.

    A chain rather than a tuple: no block then depends on which number it has, and blocks that are
    compiled one by one can share their code.

    Attributes:
        keep: patch tokens that leave this block.
        tapped: whether somebody is going to see what this block puts out.
        left: blocks from this one on.
        rest: the blocks behind this one; None at the last.
    """

    keep: int
    tapped: bool
    left: int
    rest: Ahead | None


@dataclass(frozen=True)
class Reduced:
    """One reduction that has happened: its map, how many tokens were asked for, what is needed to
    undo it, and the reduction before it."""

    map: TokenMap
    asked: int
    size: Float[Tensor, "batch fine"] | None
    bias: Float[Tensor, "batch 1 1 fine_and_others"] | None
    index: Int[Tensor, "batch fine"] | None
    grid: tuple[int, int] | None
    stale: Float[Tensor, "batch fine dim"] | None
    former: Reduced | None


@dataclass(frozen=True)
class State:
    """What the tokens of one activation stand for.

    Attributes:
        ahead: what the pass has still to do; None behind the last block.
        full: patch tokens of the full grid.
        trail: the last reduction so far, which knows the one before it.
        size: how many original tokens each patch token stands for, 0 for padding; None if each
            one for itself.
        bias: what is added to attention, zeros for the other tokens: the logarithm of the size
            where attention is proportional, -inf for padding.
        expanded: whether the activation is on the full grid again, copies for merged tokens.
        received: the attention that each patch token got in the block before, if a method before
            the next block wants to know.
        index: where on the full grid each patch token stands (a merged one: its first member);
            None if all stand in their places, or nobody asks.
        lengths: where the images of a batch came padded: how many patch tokens each has.
        grid: rows and columns of the few tokens, where they are known to stand on a grid.
        aside: the few tokens themselves, where the activation is expanded and they could not be
            had back from it (see `Weighted`).
        kept: of a learned method that remembers, which tokens of the full grid it has not left
            out, 1 or 0. None if all are there, or nobody asks.
    """

    ahead: Ahead | None
    full: int
    trail: Reduced | None = None
    size: Float[Tensor, "batch tokens"] | None = None
    bias: Float[Tensor, "batch 1 1 tokens_and_others"] | None = None
    expanded: bool = False
    received: Float[Tensor, "batch tokens"] | None = None
    index: Int[Tensor, "batch tokens"] | None = None
    lengths: tuple[int, ...] | None = None
    grid: tuple[int, int] | None = None
    aside: Tensor | None = None
    kept: Float[Tensor, "batch full"] | None = None

    # Written out, because older versions of torch.compile cannot follow dataclasses.replace.
    def seen(
        self, expanded: bool, aside: Tensor | None = None, trail: Reduced | None = None
    ) -> State:
        """The same tokens, on the full grid or few again, as they came about or by another trail of
        the same maps."""
        return State(
            self.ahead,
            self.full,
            trail or self.trail,
            self.size,
            self.bias,
            expanded,
            self.received,
            self.index,
            self.lengths,
            self.grid,
            aside,
            self.kept,
        )

    def at(self, ahead: Ahead | None) -> State:
        """The same tokens, in front of another block."""
        return State(
            ahead,
            self.full,
            self.trail,
            self.size,
            self.bias,
            self.expanded,
            self.received,
            self.index,
            self.lengths,
            self.grid,
            self.aside,
            self.kept,
        )

    def masked(self, bias: Tensor | None, kept: Float[Tensor, "batch full"] | None) -> State:
        """The same tokens, none of them gone, with another bias of attention."""
        return State(
            self.ahead, self.full, bias=bias, lengths=self.lengths, grid=self.grid, kept=kept
        )

    @property
    def few(self) -> int:
        """Patch tokens after the last reduction."""
        return self.full if self.trail is None else self.trail.map.num_coarse

    @property
    def tokens(self) -> int:
        """Patch tokens of the activation."""
        return self.full if self.expanded else self.few

    @property
    def prunes(self) -> bool:
        """Whether tokens were dropped, rather than merged."""
        return any(not reduced.map.merges for reduced in _unrolled(self.trail))

    @property
    def exact(self) -> bool:
        """Whether the few tokens can be had back from the full grid that was made of them."""
        return all(type(reduced.map) in (Clusters, Kept) for reduced in _unrolled(self.trail))

    @property
    def ragged(self) -> bool:
        """Whether samples differ in their number of tokens, and some are padded."""
        return not self.expanded and any(reduced.map.ragged for reduced in _unrolled(self.trail))

    def positions(self) -> Int[Tensor, "batch tokens"] | None:
        """Where on the full grid each patch token stands; None if all stand in their places."""
        if self.trail is None or self.index is not None:
            return self.index
        index: Tensor | None = None
        for reduced in _unrolled(self.trail):
            chosen = reduced.map.representatives()
            index = chosen if index is None else index.gather(1, chosen)
        return index


@dataclass(frozen=True)
class Record:
    """What `tokred.inspect` wants to know of one reduction, or of one rise.

    Attributes:
        layer: the block, from 0.
        before: patch tokens before it, and
        after: patch tokens after it.
        map: how they became few; None if they became many.
        undone: how many of the last reductions a rise has undone.
        around: whether there are all tokens again behind the block.
    """

    layer: int
    before: int
    after: int
    map: TokenMap | None
    undone: int = 0
    around: bool = False


@dataclass(eq=False)
class Attributes:
    """Attributes that hang on a model as long as a reduction does, for code that reads and sets
    them there.

    Attributes:
        model: on which they hang.
        values: by name. While they hang, those of the model count.
    """

    model: nn.Module = field(repr=False)
    values: dict[str, Any]

    def get(self, name: str) -> Any:
        """What it is now."""
        return getattr(self.model, name, self.values[name])

    def hang(self) -> None:
        """Puts them on the model."""
        for name, value in self.values.items():
            setattr(self.model, name, value)

    def take_away(self) -> None:
        """Takes them off the model; if they are hung there again, they are what they are now."""
        for name in self.values:
            if name in vars(self.model):
                self.values[name] = vars(self.model).pop(name)


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
        tapped_by: the host's own word on which layers are seen during the running call.
        averages: whether the model averages the patch tokens that leave its last block, where it
            cannot be told which of them were dropped.
        reconstruction: what the full grid is made of; None: of copies.
        gates: of a learned method, its modules, by layer. They are no part of the model.
        noise: what is added to the logits of gates in training, `noise(layer, logits)`; Gumbel
            noise from the global random stream, if None.
        padded: of a method that gates blocks: pad images to the one that keeps most tokens, rather
            than lay the tokens of all end to end.
        attributes: what it hangs on the model besides; nothing, if None.
        remembers: keep what the last pass of every thread has done to its tokens, see `last_pass`.
    """

    reducer: Reducer
    schedule: Schedule
    layout: Layout
    proportional_attention: bool = True
    full_grid: bool = True
    attention: str = "host"
    tapped_by: Callable[[int], frozenset[int]] | None = None
    averages: bool = False
    reconstruction: Reconstruction | None = None
    gates: nn.ModuleDict | None = None
    noise: Callable[[int, Float[Tensor, "batch tokens 2"]], Tensor] | None = None
    padded: bool = False
    attributes: Attributes | None = None
    remembers: bool = False
    # Runtime state: by activation, and by thread. (An attribute of the tensor would do as well as
    # a weak dictionary, but would be saved and copied with features that leave the model.) Code
    # that is being compiled can see neither, and has a plain dictionary instead.
    _riding: Any = field(default_factory=WeakTensorKeyDictionary, repr=False)
    _local: Any = field(default_factory=threading.local, repr=False)
    _traced: dict[str, Any] = field(default_factory=dict, repr=False)
    # Layers whose attention was seen not to be fused, or not to be the host's alone.
    _unfused: set[int] = field(default_factory=set, repr=False)
    # Whether the last pass was one of compiled code, which cannot be remembered.
    _unseen: bool = field(default=False, repr=False)

    def __str__(self) -> str:
        tokens = self.layout.patches
        counts = self.counts(tokens, self.layout.grid)
        return f"{self.reducer}, patch tokens per layer: {tokens} -> {', '.join(map(str, counts))}"

    def __getstate__(self) -> dict[str, Any]:
        runtime = {"_riding", "_local", "_traced"}
        return {name: value for name, value in vars(self).items() if name not in runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._riding, self._local, self._traced = WeakTensorKeyDictionary(), threading.local(), {}

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of patch tokens that is to leave each layer, at the model's own image size."""
        return shares(self.schedule, self.layout.patches, self.layout.layers)

    @property
    def targets(self) -> dict[int, float]:
        """Of a learned method: the share of patch tokens that each of its gates is to keep."""
        return {int(layer): self.shares[int(layer)] for layer in self.gates or ()}

    @property
    def decisions(self) -> dict[int, Float[Tensor, "batch tokens"]]:
        """Of a learned method: which tokens each gate has kept (1) in the last forward pass of
        this thread in training mode, with the gradients of a softmax."""
        found: dict[int, Tensor] = getattr(self._local, "decisions", {})
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of a learned method; empty of others."""
        return {} if self.gates is None else dict(self.gates.state_dict())

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts weights in, all or none.

        Raises:
            ValueError: they do not fit, or are not finite.
        """
        weights.fill(self._gates(), tensors, "the state dict")

    def save(self, path: str | Path) -> None:
        """Writes the weights of a learned method, as safetensors, for `SViT(gates=path)`.

        Raises:
            ValueError: the method learns nothing.
        """
        gates = self._gates()
        width = int(gates.get_submodule(next(iter(gates))).width)  # type: ignore[arg-type]
        assert learned(self.reducer)
        weights.write(path, gates, self.reducer.learned, self.shares, width)

    def load(self, path: str | Path) -> None:
        """Reads weights that `save` has written, all or none.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: they do not fit, or are not finite, or the method learns nothing.
        """
        gates = self._gates()
        tensors, about = weights.read(path)
        check_gates(self.reducer, about, self.layout.layers, str(path))
        weights.fill(gates, tensors, str(path))

    def _gates(self) -> nn.ModuleDict:
        if not self.gates:
            raise ValueError(
                f"{self.reducer} has no weights: it learns nothing, or keeps all tokens"
            )
        return self.gates

    def start(self, x: Float[Tensor, "batch tokens dim"], mask: Tensor | None = None) -> State:
        """The state of tokens that nothing has been done to.

        Args:
            x: the tokens.
            mask: the attention mask that the first block was given. Tokens that no query may see
                are padding, and are never merged with others.
        """
        layout = self.layout
        tokens = x.shape[1] - layout.others
        grid = self._grid_of(tokens)
        if mask is None or torch.compiler.is_compiling():
            return State(self._ahead(tokens, tokens, grid), tokens, grid=grid)
        valid = visible(mask, x.shape[0])[:, layout.prefix : x.shape[1] - layout.suffix]
        if bool(valid.all()):
            return State(self._ahead(tokens, tokens, grid), tokens, grid=grid)
        if self.reconstruction is not None or self.gates is not None:
            raise ValueError(
                f"{self.reconstruction or self.reducer} needs images that are not padded: give "
                "them one by one"
            )
        lengths = tuple(valid.sum(1).tolist())
        ahead = self._ahead(tokens, max(lengths), None)
        return State(ahead, tokens, size=valid.float(), lengths=lengths)

    def counts(self, tokens: int, grid: tuple[int, int] | None) -> tuple[int, ...]:
        """How many tokens leave each layer, of so many that stand on `grid`: what the schedule
        asks for, or the nearest number that the method can make on the grid."""
        asked = plan(self.schedule, tokens, self.layout.layers)
        return tuple(fitted(self.reducer, count, tokens, grid) for count in asked)

    def _grid_of(self, tokens: int) -> tuple[int, int] | None:
        """The grid that so many tokens stand on: that of the image, or of the model's own size."""
        if not self.layout.raster:
            return None
        grid: tuple[int, int] | None = self._get("grid")
        for rows, columns in (grid or (0, 0), self.layout.grid):
            if rows * columns == tokens:
                return rows, columns
        return None

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Says on which grid the patches of the images stand that are running."""
        if not torch.compiler.is_compiling():
            self._local.grid = grid
        self._traced["grid"] = grid

    def _ahead(self, tokens: int, longest: int, grid: tuple[int, int] | None) -> Ahead | None:
        """What a pass has to do, where the longest image has so many of the tokens."""
        counts, tapped = self.counts(longest, grid), self.tapped()
        ahead: Ahead | None = None
        for layer in reversed(range(self.layout.layers)):
            # Padding alone is no reason to reduce.
            keep = counts[layer] if counts[layer] < longest else tokens
            ahead = Ahead(keep, layer in tapped, self.layout.layers - layer, ahead)
        return ahead

    def enter(
        self,
        layer: int,
        first: bool,
        scale: float,
        x: Float[Tensor, "batch tokens dim"],
        mask: Tensor | None = None,
        explicit: nn.Module | None = None,
        training: bool = False,
    ) -> Step:
        """Called when a patched block begins. The first block starts a pass, whoever called it."""
        state = self.start(x, mask) if first else self.carried(x, layer) or self._alone(layer, x)
        if first and self.gates is not None and not torch.compiler.is_compiling():
            self._local.decisions = {}
        if first and self.remembers:
            self._unseen = torch.compiler.is_compiling()
            if not torch.compiler.is_compiling():
                self._local.past, self._local.running = None, []
        if not first and not torch.compiler.is_compiling():
            self._riding[x] = state  # for recomputation, if the host has changed what it rode on
        gate = None if self.gates is None else self._gate(layer, x.device)
        masked = training and self.gates is not None
        step = Step(self, layer, scale, state, explicit, gate, masked)
        self._put("step", step)
        return step

    def _gate(self, layer: int, device: torch.device) -> nn.Module | None:
        """The gate of a layer, on the device of its tokens: it does not move with the model."""
        gates = self.gates
        if gates is None or str(layer) not in gates:
            return None
        gate: nn.Module = gates[str(layer)]
        weight = next(gate.parameters())
        return gate if weight.device == device else gate.to(device)

    def drops_in_training(self, state: State) -> bool:
        """Whether some tokens of the full grid are there for the sake of training alone."""
        return state.kept is not None and prunes(self.reducer)

    def check_pooling(self, state: State) -> None:
        """Raises where a head is about to pool tokens of which some should not be there.

        Raises:
            ValueError: it is.
        """
        if self.drops_in_training(state):
            raise ValueError(
                f"{self.reducer} cannot be trained on a model that pools its patch tokens, which "
                "would see those that are to be dropped: use SViT(), which keeps them"
            )

    def decided(self, layer: int, mask: Float[Tensor, "batch tokens"]) -> None:
        """Keeps what a gate has decided in training, for its loss."""
        if not torch.compiler.is_compiling():
            self._local.decisions[layer] = mask

    def leave(self) -> None:
        """Called when a patched block ends: what was read off its submodules is let go."""
        self._put("step", None)

    @property
    def running(self) -> Step | None:
        """The block of this thread that is running, if there is one."""
        step: Step | None = self._get("step")
        return step

    def _alone(self, layer: int, x: Float[Tensor, "batch tokens dim"]) -> State:
        """The state of tokens that come from nowhere into a later block: only a full grid can be
        told from tokens whose sizes were lost."""
        full = self.layout.others + self.layout.patches
        if x.shape[1] != full:
            raise RuntimeError(
                f"block {layer} got {x.shape[1]} tokens of which nothing is known; only a full "
                f"grid ({full} with prefix tokens) can enter in the middle. Under reentrant "
                "gradient checkpointing, use use_reentrant=False"
            )
        return self._from(layer, self.start(x))

    def _from(self, layer: int, state: State) -> State:
        """The state in front of `layer`, if blocks before it were left out."""
        ahead, left = state.ahead, self.layout.layers - layer
        while ahead is not None and ahead.left > left:
            ahead = ahead.rest
        return state.at(ahead)

    def carry(self, x: Tensor, state: State) -> None:
        """Lets `state` ride on `x`."""
        if torch.compiler.is_compiling():
            self._traced["state"] = state
            if state.aside is not None:
                self._traced["shown"] = x
        else:
            self._riding[x] = state

    def riding(self, x: Tensor) -> State | None:
        """The state that rides on `x` itself; None where code is being compiled."""
        if torch.compiler.is_compiling():
            return None
        state: State | None = self._riding.get(x)
        return state

    def remember(self, state: State) -> None:
        """Keeps the state for the next block, in case its activation loses it, or the next block
        is compiled and this one is not."""
        if not torch.compiler.is_compiling():
            self._local.state = state
            self._traced["state"] = state

    def carried(self, x: Tensor, layer: int | None = None) -> State | None:
        """The state that rides on `x`. If `x` has lost it (it was moved, detached, or computed
        with), the last state of this thread, provided that it fits.

        Args:
            x: the activation.
            layer: the block that it enters; None behind the last one.

        Raises:
            RuntimeError: tokens were added or taken away between two blocks.
        """
        if torch.compiler.is_compiling():
            traced: State | None = self._traced.get("state")
            if traced is None or traced.aside is None or self._traced.get("shown") is x:
                return traced
            return traced.seen(expanded=True)
        state: State | None = self._riding.get(x)
        if state is None:
            # Of this thread; or of the block before, if that one is compiled.
            for last in (getattr(self._local, "state", None), self._traced.get("state")):
                if last is not None and self._left(last) == self._behind(layer):
                    # What was set aside is no longer what x says.
                    state = last if last.aside is None else last.seen(expanded=True)
                    break
        if state is not None and x.shape[1] != state.tokens + self.layout.others:
            raise RuntimeError(
                f"a patched block got {x.shape[1]} tokens, but the one before it has put out "
                f"{state.tokens + self.layout.others}. Tokens cannot be added or taken away "
                "between blocks while a reduction is applied; tokred.remove(model) takes it out. "
                "(A pass that was broken off is forgotten when the first block runs again.)"
            )
        if state is not None and layer is not None and self._left(state) != self._behind(layer):
            return self._from(layer, state)
        return state

    def _behind(self, layer: int | None) -> int:
        return 0 if layer is None else self.layout.layers - layer

    @staticmethod
    def _left(state: State) -> int:
        return 0 if state.ahead is None else state.ahead.left

    def pass_on(self, x: Tensor, y: Tensor) -> None:
        """Lets the state of `x` ride on `y` too, the same tokens after a norm."""
        if torch.compiler.is_compiling():
            if self._traced.get("shown") is x:
                self._traced["shown"] = y
            return
        state = self._riding.get(x)
        if state is not None:
            self._riding[y] = state

    def forget(self) -> None:
        """Drops the last state of this thread: the pass is over."""
        if not torch.compiler.is_compiling():
            self._local.state = None
            self._local.grid = None
            if self.remembers and self._local.running is not None:
                # Once only: blocks may run again, one by one, for gradients.
                self._local.past, self._local.running = self._local.running, None
        self._traced.clear()

    def see(self, signal: str, value: Tensor) -> None:
        """Called when a tapped submodule of the running block has put something out."""
        step = self.running
        if step is not None and step.wants_signals:
            step.signals[signal] = value

    def set_tapped(self, layers: frozenset[int]) -> None:
        """Says at which layers the host hands out tokens during this call, and so wants the full
        grid."""
        if not torch.compiler.is_compiling():
            self._local.tapped = layers
        if layers:
            self._traced["tapped"] = layers
        else:
            self._traced.pop("tapped", None)

    def tapped(self) -> frozenset[int]:
        layers: frozenset[int] = self._get("tapped") or frozenset()
        return layers if self.tapped_by is None else layers | self.tapped_by(self.layout.layers)

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
            running = getattr(self._local, "running", None)
            if running is not None:
                running.append(record)

    @property
    def last_pass(self) -> list[Record] | None:
        """Of a reduction that remembers: what the last pass of this thread did to its tokens; None
        if there was none yet that came to its end.

        Raises:
            RuntimeError: the last pass was one of compiled code.
        """
        if self._unseen:
            raise RuntimeError(
                "the last pass was one of compiled code, which keeps no record of what became of "
                "tokens: run the model itself, not what torch.compile has made of it"
            )
        found: list[Record] | None = getattr(self._local, "past", None)
        return found

    def expand(
        self, x: Float[Tensor, "batch tokens dim"], state: State
    ) -> Float[Tensor, "batch full dim"]:
        """The full grid from reduced tokens: copies for merged ones, the last value for dropped
        ones."""
        if state.expanded or state.trail is None:
            return x
        return _up(self.layout, x, _unrolled(state.trail))

    def compress(
        self, x: Float[Tensor, "batch full dim"], state: State
    ) -> Float[Tensor, "batch tokens dim"]:
        """Reduced tokens from the full grid that `expand` has made. Merged tokens are copies of
        each other there, so that their mean is what they were; where that is not so, they were
        kept, and go on unless somebody has changed the full grid."""
        return self.descend(x, state)[0]

    def descend(
        self, x: Float[Tensor, "batch full dim"], state: State
    ) -> tuple[Float[Tensor, "batch tokens dim"], State]:
        """`compress`, and the state of what it returns, in which dropped tokens are what they are
        on this full grid: somebody may have changed it."""
        if not state.expanded or state.trail is None:
            return x, state
        if state.aside is not None:
            return state.aside, state.seen(expanded=False)
        tokens = patches(self.layout, x)
        trail: Reduced | None = None
        for r in _unrolled(state.trail):
            size = r.size
            if size is None:
                size = torch.ones(tokens.shape[:2], dtype=torch.float32, device=x.device)
            stale = None if r.stale is None else tokens
            trail = Reduced(r.map, r.asked, r.size, r.bias, r.index, r.grid, stale, trail)
            tokens = r.map.down(tokens, size)
        return _between(self.layout, x, tokens), state.seen(expanded=False, trail=trail)

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
    gate: nn.Module | None = None
    masked: bool = False
    signals: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    flat: bool = False
    entered: tuple[Tensor, Tensor] | None = None

    @property
    def untouched(self) -> bool:
        """Whether all tokens are there and may be seen, so that the host's own mask will do."""
        return self.state.trail is None and self.entered is None

    @property
    def wants_signals(self) -> bool:
        """Whether something is read off this block: the method stands in it and is going to
        reduce, or before the next block, and is going to reduce there."""
        reducer, ahead = self.reduction.reducer, self.state.ahead
        if not reducer.needs or ahead is None:
            return False
        if place(reducer) == "before":
            return ahead.rest is not None and ahead.rest.keep < ahead.keep
        return ahead.keep < self.state.few

    def open(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch kept dim"]:
        """Before the block: few tokens again, if they were expanded for somebody to see; many, if
        the schedule has them rise; and fewer still, if that is where the method stands."""
        state = self.state
        assert state.ahead is not None
        rises = state.trail is not None and state.ahead.keep > state.trail.asked
        if state.expanded and not (rises and state.ahead.keep == state.full):
            x, self.state = self.reduction.descend(x, state)
        if rises:
            x = self._rise(x, state.ahead.keep)
        if self.masked:
            return self._mask(x)
        return self._change(x) if place(self.reduction.reducer) == "before" else x

    def _mask(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The masked form of a learned method, for training: all tokens stay, those that the gate
        leaves out cannot be seen, and `close` puts back what they were."""
        reduction, state = self.reduction, self.state
        reducer, mask = reduction.reducer, state.kept
        assert learned(reducer)
        if self.gate is not None:
            view = self._tokens(patches(reduction.layout, x), self._ones(x))
            with torch.autocast(x.device.type, enabled=False):
                logits = reducer.score(view)
                noise = (reduction.noise or _drawn)(self.layer, logits)
                mask = weights.straight_through(logits, noise)
                if state.kept is not None:
                    mask = mask * state.kept
            reduction.decided(self.layer, mask)
        if mask is None:
            return x
        self.entered = x, mask
        bias = self._around(weights.log_mask(mask), 0.0)[:, None, None, :]
        self.state = state.masked(bias, mask if reducer.remembers else None)
        return x

    def gated(
        self,
        run: Callable[[Float[Tensor, "batch some dim"]], Any],
        x: Float[Tensor, "batch tokens dim"],
        alone: bool = True,
    ) -> Any:
        """Runs the block on the tokens that its gate chooses; the others stay what they are, and
        there are all tokens again behind it. What the block returns besides is left alone.

        The tokens of all images are laid end to end where attention can be computed image by image
        (see `PerImage`); else images are padded to the one with the most tokens.

        Args:
            run: the block, from its tokens on.
            x: all tokens.
            alone: whether tokens are all that the block is given, and nothing for each image.
        """
        reduction, state = self.reduction, self.state
        if self.gate is None and state.kept is None:
            return run(x)
        tokens, size = patches(reduction.layout, x), self._ones(x)
        if self.gate is None:
            assert state.kept is not None
            token_map = _those(state.kept)
        else:
            with torch.autocast(x.device.type, enabled=False):
                chosen = reduction.reducer(self._tokens(tokens, size), self._asked)
            assert isinstance(chosen, Kept)
            token_map = chosen
        assert learned(reduction.reducer)
        kept = (token_map.labels() >= 0).to(size) if reduction.reducer.remembers else None
        num = tokens.shape[1]
        record = Record(self.layer, num, token_map.num_coarse, token_map, around=True)
        if self.gate is not None:
            reduction.record(record)
        if token_map.counts is None and token_map.num_coarse == num:
            y = run(x)
        else:
            y = self._end_to_end(run, x, token_map) if alone else None
            if y is None:
                y = self._padded(run, x, token_map, tokens, size)
        self.state = state.masked(None, kept)
        return y

    @property
    def _asked(self) -> int:
        assert self.state.ahead is not None
        return self.state.ahead.keep

    def _end_to_end(self, run: Callable[[Tensor], Any], x: Tensor, token_map: Kept) -> Any:
        """`gated` on the chosen tokens of all images as one sequence; None if that cannot be."""
        reduction = self.reduction
        layout = reduction.layout
        if token_map.counts is None or layout.by_position or reduction.padded:
            return None
        if self.layer in reduction._unfused:
            return None
        active = self._around((token_map.labels() >= 0).to(x.dtype), 1.0) > 0
        lengths = active.sum(1).tolist()
        if sum(lengths) == 0:
            return x
        rows = active.flatten().nonzero()[:, 0]
        one_by_one = PerImage(lengths)
        self.flat = True
        try:
            with one_by_one:
                y = run(x.flatten(0, 1).index_select(0, rows)[None])
        except NotPerImageError:
            return None
        finally:
            self.flat = False
        if one_by_one.calls == 0:
            reduction._unfused.add(self.layer)
            return None

        def back(few: Tensor) -> Tensor:
            return x.flatten(0, 1).index_copy(0, rows, few[0].to(x.dtype)).view_as(x)

        return (back(y[0]), *y[1:]) if isinstance(y, tuple) else back(y)

    def _padded(
        self, run: Callable[[Tensor], Any], x: Tensor, token_map: Kept, tokens: Tensor, size: Tensor
    ) -> Any:
        """`gated` on the chosen tokens of every image, padded."""
        layout = self.reduction.layout
        if token_map.num_coarse + layout.others == 0:
            return x
        few = _between(layout, x, token_map.down(tokens, size))
        self._went_down(token_map, token_map.num_coarse, tokens, size, None)
        undone = _unrolled(self.state.trail)
        y = run(few)
        if isinstance(y, tuple):
            return (_up(layout, y[0], undone), *y[1:])
        return _up(layout, y, undone)

    def _ones(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch patches"]:
        patch_tokens = x.shape[1] - self.reduction.layout.others
        return torch.ones(x.shape[0], patch_tokens, dtype=torch.float32, device=x.device)

    def _around(
        self, x: Float[Tensor, "batch patches"], value: float
    ) -> Float[Tensor, "batch tokens"]:
        """Numbers of the patch tokens, and one of the others."""
        layout = self.reduction.layout
        return F.pad(x, (layout.prefix, layout.suffix), value=value)

    def grid_of(self, x: Float[Tensor, "batch tokens dim"]) -> tuple[int, int]:
        """Rows and columns of the tokens of this block, which may be few, or on the full grid."""
        grids = [self.state.grid, *(reduced.grid for reduced in _unrolled(self.state.trail))]
        return next(grid for grid in grids if grid and grid[0] * grid[1] == x.shape[1])

    def bias(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """What to add to the logits of attention: the host's own mask, of the tokens that are
        left; and, where attention is proportional, the logarithm of how many tokens each key
        stands for (ToMe, equation 1). None if there is neither.

        Args:
            x: the tokens; what is returned has their dtype.
            mask: the host's mask or bias of the full sequence, bool (True: may be seen) or added
                to the logits: [batch or 1, heads or 1, tokens or 1, tokens], or without the batch;
                or [batch, tokens] that says which tokens are there.
        """
        given = mask
        if self.flat:
            if mask is not None:
                raise NotPerImageError
            return None
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise ValueError(f"a mask that is a {type(mask).__name__} cannot be re-indexed")
            mask = queries_by_keys(mask, x.shape[0])
            if mask.ndim == 2:
                mask = (mask != 0)[:, None, None]
            mask = self.rows_and_columns(mask)
        if self.state.bias is not None:
            # In the dtype of x: with float64 queries and a float32 mask, torch's fused attention
            # on the CPU is silently wrong.
            mask = added(self.state.bias.to(x.dtype), mask)
        self.mask = mask
        return given if self.untouched else mask

    def rows_and_columns(self, mask: Tensor) -> Tensor:
        """A mask over the full sequence, re-indexed for the tokens that are left; itself as long
        as all are.

        Raises:
            ValueError: it is no mask over the full sequence.
        """
        layout, state = self.reduction.layout, self.state
        if mask.ndim == 3:
            mask = mask[None]
        full = state.full + layout.others
        if mask.ndim != 4 or mask.shape[3] != full or mask.shape[2] not in (1, full):
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} cannot be used while tokens are reduced: "
                f"[batch, heads, {full} or 1, {full}] is expected, for the full grid of "
                f"{state.full} patches and {layout.others} other tokens"
            )
        at = self._sequence()
        if at is None:
            return mask
        mask = mask.expand(at.shape[0], -1, -1, -1)
        mask = mask.gather(3, at[:, None, None].expand(-1, *mask.shape[1:3], -1))
        if mask.shape[2] == full:
            mask = mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return mask

    def rows(
        self, table: Float[Tensor, "*lead positions dim"]
    ) -> Float[Tensor, "*lead tokens dim"] | Float[Tensor, "batch heads tokens dim"]:
        """A table with a row for every position (rotary embeddings), for the tokens that are left;
        itself as long as all are.

        A merged token takes the place of its first member.

        Args:
            table: [positions, dim], [heads, positions, dim] or [batch, heads, positions, dim], of
                the patch tokens or of the whole sequence.

        Returns:
            [batch, 1 or heads, tokens, dim], of the patch tokens or the whole sequence.
        """
        layout, state = self.reduction.layout, self.state
        positions = table.shape[-2]
        if positions == state.full:
            at = state.positions()
        elif positions == state.full + layout.others:
            at = self._sequence()
        else:
            raise ValueError(
                f"a table of {positions} positions fits neither {state.full} patch tokens nor the "
                f"sequence of {state.full + layout.others}"
            )
        if at is None:
            return table
        if table.ndim == 2:
            return take(table.expand(at.shape[0], *table.shape), at)[:, None]
        table = table.expand(at.shape[0], *table.shape[-3:])
        index = at[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
        return table.gather(2, index)

    def _sequence(self) -> Int[Tensor, "batch tokens_and_others"] | None:
        """Where each token of the sequence stood; None if all stand in their places."""
        layout, state = self.reduction.layout, self.state
        index = state.positions()
        if index is None:
            return None
        around = torch.arange(state.full + layout.others, device=index.device)
        around = around.expand(index.shape[0], -1)
        front, back = around[:, : layout.prefix], around[:, layout.prefix + state.full :]
        return torch.cat([front, index + layout.prefix, back], 1)

    def attend(
        self, attention: nn.Module, x: Float[Tensor, "batch tokens dim"], heads: int
    ) -> nn.Module:
        """The attention to call on `x`: the host's, or the same one computed the other way."""
        if self.explicit is not None and not self.flat and explicit_is_faster(x, heads):
            return self.explicit
        return attention

    def see(self, **signals: Tensor) -> None:
        """For attention that is restated: shows the "key", "query" or "value" that it computes,
        [batch, heads, tokens, head_dim]."""
        if self.wants_signals:
            self.signals.update(signals)

    def hand_out(self) -> None:
        """Says that what this block puts out is going to be seen, on the full grid."""
        ahead = self.state.ahead
        assert ahead is not None
        self.state = self.state.at(Ahead(ahead.keep, True, ahead.left, ahead.rest))

    def reduce(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch kept dim"]:
        """Between attention and MLP: as many tokens as the schedule asks for at this layer, if
        that is where the method stands."""
        if place(self.reduction.reducer) == "between":
            return self._change(x)
        self._receive()
        return x

    def _change(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch kept dim"]:
        state, layout = self.state, self.reduction.layout
        assert state.ahead is not None
        num, keep = x.shape[1] - layout.others, state.ahead.keep
        # What there should be. A method whose samples vary may have left more or fewer.
        exact = not varies(self.reduction.reducer) and state.lengths is None
        asked = num
        if not exact:
            asked = state.full if state.trail is None else state.trail.asked
        if self.gate is None and (self.reduction.gates is not None or keep >= min(asked, num)):
            return x
        tokens = patches(layout, x)
        size = state.size
        if size is None:
            size = torch.ones(tokens.shape[:2], dtype=torch.float32, device=x.device)
        view = self._tokens(tokens, size)
        # Autocast would compare tokens in half precision.
        with torch.autocast(x.device.type, enabled=False):
            if state.lengths is None:
                token_map = self.reduction.reducer(view, keep)
            else:
                token_map = self._apart(view, state.lengths)
            if exact and token_map.num_coarse != keep:
                raise ValueError(
                    f"{self.reduction.reducer} returned {token_map.num_coarse} tokens of {num} "
                    f"at layer {self.layer}, but was asked for {keep}"
                )
            fewer = token_map.down(tokens, size)
            coarse_grid = getattr(token_map, "grid", None)
            reconstruction = self.reduction.reconstruction
            if reconstruction is not None:
                # Chosen by what tokens are now: later there is nothing to compare them by.
                index, weight = reconstruction(tokens, fewer, state.grid, coarse_grid)
                token_map = Weighted(token_map, index, weight)
        self.signals.clear()  # so that the keys need not live on through the MLP
        del view
        self.reduction.record(Record(self.layer, num, token_map.num_coarse, token_map))
        self._went_down(token_map, keep, tokens, size, coarse_grid)
        return _between(layout, x, fewer)

    def _apart(self, view: Tokens, lengths: tuple[int, ...]) -> TokenMap:
        """The map of a batch whose images were padded to the same length: every image is reduced
        as if it came alone, and padding is left out."""
        reduction = self.reduction
        valid = view.size > 0
        there = valid.sum(1).tolist()
        order = ranked(valid.int())  # padding last
        alike: dict[tuple[int, int], list[int]] = {}
        for sample, (length, now) in enumerate(zip(lengths, there, strict=True)):
            keep = plan(reduction.schedule, length, reduction.layout.layers)[self.layer]
            alike.setdefault((now, min(keep, now)), []).append(sample)
        parts: list[tuple[Tensor, Tensor, TokenMap | None]] = []
        for (now, keep), samples in alike.items():
            rows = torch.tensor(samples, device=order.device)
            columns = order[rows, :now]
            part = None if keep == now else reduction.reducer(view.part(rows, columns), keep)
            parts.append((rows, columns, part))
        return side_by_side(parts, view.size)

    def close(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch out dim"]:
        """After the block: the full grid, if somebody is going to see it."""
        if self.entered is not None:
            x = self._unmask(x)
        reduction, state = self.reduction, self.state
        ahead = state.ahead
        assert ahead is not None
        last = ahead.rest is None
        if last and reduction.averages:
            reduction.check_pooling(state)
        averaged = last and reduction.averages and state.prunes
        if averaged and state.ragged:
            raise ValueError(
                f"{reduction.reducer} keeps different numbers of tokens in different images, and "
                "this model averages its tokens without a mask: use a method that merges, or "
                "images one by one"
            )
        full = ahead.tapped or (last and (reduction.full_grid or reduction.averages))
        if full and not averaged:
            aside = None if last or state.exact else x
            x = reduction.expand(x, state)
            state = state.seen(expanded=True, aside=aside)
        elif last and state.ragged:
            assert state.size is not None
            padding = F.pad(state.size == 0, (reduction.layout.prefix, reduction.layout.suffix))
            x = x.masked_fill(padding[..., None], 0)
        reduction.leave()
        state = state.at(ahead.rest)
        if not last:
            reduction.carry(x, state)
            reduction.remember(state)
            return x
        reduction.forget()
        if reduction.drops_in_training(state) or needed_for_pooling(state):
            # The maps suffice for that; what was dropped need not live on with the features.
            reduction.carry(x, _without_stale(state))
        return x

    def _unmask(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """x <- M Block(x) + (1 - M) x (SViT, section 4.1): gradients reach the gate here, too."""
        assert self.entered is not None
        before, mask = self.entered
        through = self._around(mask, 1.0)[..., None].to(x.dtype)
        self.entered = None
        self.state = self.state.masked(None, self.state.kept)
        return through * x + (1 - through) * before

    def _tokens(
        self, x: Float[Tensor, "batch tokens dim"], size: Float[Tensor, "batch tokens"]
    ) -> Tokens:
        needs, layout, read = self.reduction.reducer.needs, self.reduction.layout, self.signals
        wanted = {"key", "value"} & needs
        if "class_attention" in needs:
            wanted |= {"key", "query"}
        missing = wanted - set(read)
        if missing:
            raise RuntimeError(
                f"block {self.layer}: {sorted(missing)} could not be read. A submodule of its "
                "attention was replaced or is left out since tokred.apply; call tokred.apply again"
            )
        attention = None
        if "class_attention" in needs:
            rows = slice(0, 1) if layout.class_token else slice(None)
            attention = patches(layout, self._attention(rows), 2)
        key, value = read.get("key"), read.get("value")
        return Tokens(
            x=x,
            size=size,
            key=None if key is None or "key" not in needs else patches(layout, key.detach(), 2),
            value=None if value is None else patches(layout, value.detach(), 2),
            class_attention=attention,
            attention_received=self.state.received,
            grid=self.state.grid,
            layer=self.layer,
            layers=layout.layers,
            before=layout.prefix,
            gate=self.gate,
            kept=self.state.kept,
        )

    def _attention(self, rows: slice) -> Float[Tensor, "batch heads tokens"]:
        """The attention that every key gets from the queries at `rows`."""
        query, key = self.signals["query"].detach(), self.signals["key"].detach()
        if self.rotate is not None:
            query, key = self.rotate(query), self.rotate(key)
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, rows]
        return mean_attention(query[:, :, rows], key, self.scale, mask, self._asking(rows))

    def _asking(self, rows: slice) -> Float[Tensor, "batch rows"] | None:
        """Which of the queries at `rows` are tokens (1), and which padding (0), that asks for
        nothing; None if all are tokens."""
        state, layout = self.state, self.reduction.layout
        if state.size is None or (state.lengths is None and not state.ragged):
            return None
        there = (state.size > 0).float()
        return F.pad(there, (layout.prefix, layout.suffix), value=1.0)[:, rows]

    def _receive(self) -> None:
        """Keeps how much attention tokens got in this block, if the method stands before the next
        one and wants to know."""
        reducer, state = self.reduction.reducer, self.state
        if "attention_received" not in reducer.needs or not self.wants_signals:
            return
        asking = self._asking(slice(None))
        queries = self.signals["query"].shape[2] if asking is None else asking.sum(1, keepdim=True)
        received = patches(self.reduction.layout, self._attention(slice(None)).sum(1)) * queries
        self.signals.clear()
        self.state = State(
            state.ahead,
            state.full,
            state.trail,
            state.size,
            state.bias,
            received=received,
            index=state.index,
            lengths=state.lengths,
            grid=state.grid,
        )

    def _went_down(
        self,
        token_map: TokenMap,
        asked: int,
        tokens: Float[Tensor, "batch fine dim"],
        size: Float[Tensor, "batch fine"],
        grid: tuple[int, int] | None,
    ) -> None:
        state = self.state
        stale = None if token_map.merges else tokens
        reduced = Reduced(
            token_map,
            asked,
            state.size,
            state.bias,
            state.index,
            state.grid,
            stale,
            state.trail,
        )
        new, bias, index = None, None, None
        if token_map.merges or token_map.ragged or state.size is not None:
            new = token_map.total(size)
            bias = self._bias_of(new, token_map.ragged)
        if self.reduction.layout.by_position:
            index = token_map.representatives()
            if state.index is not None:
                index = state.index.gather(1, index)
        self.state = State(
            state.ahead,
            state.full,
            reduced,
            new,
            bias,
            index=index,
            lengths=state.lengths,
            grid=grid,
        )

    def _bias_of(
        self, size: Float[Tensor, "batch tokens"], ragged: bool
    ) -> Float[Tensor, "batch 1 1 tokens_and_others"] | None:
        if self.reduction.proportional_attention:
            bias = size.log()  # -inf for padding
        elif ragged or self.state.ragged:
            bias = torch.zeros_like(size).masked_fill(size == 0, -torch.inf)
        else:
            return None
        layout = self.reduction.layout
        return F.pad(bias, (layout.prefix, layout.suffix))[:, None, None, :]

    def _rise(self, x: Float[Tensor, "batch tokens dim"], to: int) -> Float[Tensor, "batch to dim"]:
        """Undoes reductions, back to as many tokens as there were before them."""
        state = self.state
        trail = state.trail
        undone: list[Reduced] = []
        size, bias, index, grid = state.size, state.bias, state.index, state.grid
        while trail is not None and trail.asked < to:
            undone.insert(0, trail)
            size, bias, index, grid = trail.size, trail.bias, trail.index, trail.grid
            trail = trail.former
        self.reduction.record(Record(self.layer, state.few, to, None, len(undone)))
        if not state.expanded:  # else it is the full grid already
            x = _up(self.reduction.layout, x, undone)
        self.state = State(
            state.ahead,
            state.full,
            trail,
            size,
            bias,
            index=index,
            lengths=state.lengths,
            grid=grid,
        )
        return x


def check_gates(reducer: Reducer, about: Mapping[str, Any], layers: int, where: str) -> None:
    """Raises unless a file of weights is for this method, and for so many layers.

    Raises:
        ValueError: it is for another.
    """
    if not learned(reducer) or about["method"] != reducer.learned:
        raise ValueError(f"gates: {where} is of {about['method']!r}, not of {reducer}")
    if len(about["shares"]) != layers:
        raise ValueError(
            f"gates: {where} is for a model of {len(about['shares'])} layers; this one has {layers}"
        )


def _drawn(layer: int, logits: Float[Tensor, "batch tokens 2"]) -> Float[Tensor, "batch tokens 2"]:
    return weights.gumbel(logits)


def _those(kept: Float[Tensor, "batch tokens"]) -> Kept:
    """The tokens that are marked, as a map."""
    counts = (kept > 0).sum(1)
    most = int(counts.max()) if len(counts) > 0 else 0
    return Kept(ranked((kept > 0).int())[:, :most], kept.shape[1], counts)


def fitted(reducer: Reducer, keep: int, tokens: int, grid: tuple[int, int] | None) -> int:
    """The number of tokens nearest to `keep` that a method can make, of so many on `grid`."""
    fit = getattr(reducer, "fit", None)
    if fit is None or grid is None or keep >= tokens:
        return keep
    return int(fit(keep, grid))


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
    return state.trail is not None and (state.prunes or not state.expanded)


def mean_attention(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    scale: float,
    bias: Tensor | None = None,
    asking: Float[Tensor, "batch rows"] | None = None,
) -> Float[Tensor, "batch heads tokens"]:
    """The attention that each key gets from the given queries: softmax(scale * q k^T + bias), mean
    over the queries, float32. Head by head if the queries are many, so that the whole map of all
    heads never exists.

    Args:
        query: of whom.
        key: of all tokens.
        scale: what logits are multiplied by.
        bias: what is added to them, or bool (True: may be seen); [batch or 1, heads or 1,
            rows or 1, tokens].
        asking: the weight of each query in the mean; all alike if not given.
    """
    query, key = query.float(), key.float()
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, -torch.inf)
    if query.shape[2] == 1:
        logits = (query @ key.transpose(2, 3)) * scale
        return (logits if bias is None else logits + bias).softmax(-1).squeeze(2)
    heads = []
    for head in range(query.shape[1]):
        logits = (query[:, head] @ key[:, head].transpose(1, 2)) * scale
        if bias is not None:
            logits = logits + bias[:, min(head, bias.shape[1] - 1)]
        paid = logits.softmax(-1)
        if asking is None:
            heads.append(paid.mean(1))
        else:
            heads.append((paid * asking[:, :, None]).sum(1) / asking.sum(1, keepdim=True))
    return torch.stack(heads, 1)


def added(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias and a mask (bool, True: may be seen; or added to the logits) in one."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return bias + mask


def queries_by_keys(mask: Tensor, batch: int) -> Tensor:
    """A mask of two dimensions is [batch, tokens], but if it is square, and not as long as the
    batch, [queries, tokens]: that with two dimensions more."""
    if mask.ndim == 2 and mask.shape[0] == mask.shape[1] != batch:
        return mask[None, None]
    return mask


def visible(mask: Tensor, batch: int) -> Bool[Tensor, "batch tokens"]:
    """Which tokens any query may see, by an attention mask: [batch or 1, heads or 1, queries or 1,
    tokens], without the batch, or just [batch, tokens]; bool, of integers (0: hidden) or added to
    the logits."""
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    seen = queries_by_keys(mask, batch) != 0
    if seen.ndim == 3:
        seen = seen[None]
    if seen.ndim == 4:
        seen = seen.flatten(1, 2).any(1)
    return seen.expand(batch, -1)


def patches(layout: Layout, x: Tensor, dim: int = 1) -> Tensor:
    """The patch tokens of a sequence, whose tokens run along `dim`."""
    return x.narrow(dim, layout.prefix, x.shape[dim] - layout.others)


def _between(
    layout: Layout, x: Float[Tensor, "batch tokens dim"], patch_tokens: Tensor
) -> Float[Tensor, "batch new dim"]:
    """The sequence with other patch tokens."""
    if not layout.suffix:
        return torch.cat([x[:, : layout.prefix], patch_tokens], 1)
    return torch.cat([x[:, : layout.prefix], patch_tokens, x[:, -layout.suffix :]], 1)


def _unrolled(trail: Reduced | None) -> list[Reduced]:
    """The reductions of a trail, the first one first."""
    found: list[Reduced] = []
    while trail is not None:
        found.insert(0, trail)
        trail = trail.former
    return found


def _without_stale(state: State) -> State:
    trail: Reduced | None = None
    for r in _unrolled(state.trail):
        trail = Reduced(r.map, r.asked, r.size, r.bias, r.index, r.grid, None, trail)
    return State(
        state.ahead,
        state.full,
        trail,
        state.size,
        state.bias,
        state.expanded,
        index=state.index,
        lengths=state.lengths,
        grid=state.grid,
        kept=state.kept,
    )


def _up(
    layout: Layout, x: Float[Tensor, "batch coarse dim"], undone: list[Reduced]
) -> Float[Tensor, "batch fine dim"]:
    """Undoes reductions, given first to last. Runs of merges are undone by one copy."""
    clusters: Clusters | None = None
    for reduced in reversed(undone):
        if type(reduced.map) is Clusters:
            clusters = reduced.map.then(clusters) if clusters else reduced.map
            continue
        if clusters:
            x, clusters = _copies(layout, x, clusters), None
        x = _between(layout, x, reduced.map.up(patches(layout, x), reduced.stale))
    return _copies(layout, x, clusters) if clusters else x


def _copies(
    layout: Layout, x: Float[Tensor, "batch coarse dim"], clusters: Clusters
) -> Float[Tensor, "batch fine dim"]:
    """`clusters.up` between the other tokens. Those are copied along, which spares a second copy
    of everything to put the parts together."""
    around = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    parts = [around[:, : layout.prefix], clusters.index + layout.prefix]
    if layout.suffix:
        parts.append(around[:, -layout.suffix :])
    return take(x, torch.cat(parts, 1))
