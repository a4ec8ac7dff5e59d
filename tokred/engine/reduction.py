"""A method that has been put into a model: what stays the same between forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokred import gates as weights
from tokred.engine.layout import Layout
from tokred.engine.memory import Memory
from tokred.engine.observing import Observer, Record
from tokred.engine.state import Ahead, State
from tokred.graphs import compiling, tracing
from tokred.reducers.protocol import Reconstruction, Reducer, Traits, learned, traits
from tokred.schedule import PURE, Schedule, plan, shares

if TYPE_CHECKING:
    from tokred.engine.step import Step

_MOST_PLANS = 64
"""How many image sizes a reduction keeps the plans of."""

_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass
class Running:
    """What is known of the pass that is running in one thread.

    Attributes:
        step: the block that is running.
        state: the state of the tokens that left the last block, in case they have lost it.
        last: those tokens.
        grid: rows and columns of the patches of the images.
        tapped: the layers whose output the running call hands out.
        decisions: what each gate has decided in training, by layer.
        records: where `Reduction.recording` collects.
    """

    step: Step | None = None
    state: State | None = None
    last: Tensor | None = None
    grid: tuple[int, int] | None = None
    tapped: frozenset[int] | None = None
    decisions: dict[int, Tensor] | None = None
    records: list[Record] | None = None


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
        trims: whether dropped tokens can be left out of what the model averages behind the last
            block, so that they need not be left out of what is handed out there.
        reconstruction: what the full grid is made of; None: of copies.
        gates: of a learned method, its modules, by layer. They are no part of the model.
        noise: what is added to the logits of gates in training, `noise(layer, logits)`; Gumbel
            noise from the global random stream, if None.
        padded: of a method that gates blocks: whether images are padded to the one that keeps most
            tokens, rather than the tokens of all images laid end to end.
        windows: rows and columns of a reduced window, where blocks attend in windows.
        hand_out: layers that put out the full grid in every pass, for who looks at them.
        observer: who watches its passes; nobody, if None.
        end: on a model, tells how many of its patched blocks run: others may have been cut off.
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
    windows: tuple[int, int] | None = None
    observer: Observer | None = None
    hand_out: frozenset[int] = frozenset()
    trims: bool = False
    end: Callable[[], int] | None = field(init=False, repr=False, default=None)
    traits: Traits = field(init=False, repr=False)
    memory: Memory[Running, State] = field(
        init=False, repr=False, default_factory=lambda: Memory(Running)
    )
    # What passes have to do, once it is known: by schedule, tokens, grid, and what is handed out.
    _plans: dict[Any, Ahead | None] = field(init=False, repr=False, default_factory=dict)
    # Layers whose attention was seen not to be fused, or not to be the host's alone.
    unfused: set[int] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self) -> None:
        self.traits = traits(self.reducer)

    def __str__(self) -> str:
        tokens = self.layout.patches
        counts = self.counts(tokens, self.layout.grid)
        return f"{self.reducer}, patch tokens per layer: {tokens} -> {', '.join(map(str, counts))}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Version 0.7 had other names for some, and left others out of files.
        former = {name: state[name] for name in state if not name.startswith("_")}
        windows = getattr(state["reducer"], "few", None)
        observer = former.pop("attributes", None)
        self.__dict__.update({"observer": observer, "windows": windows, **former})
        self.__dict__.setdefault("memory", Memory(Running))
        self._plans = {}
        self.__dict__.setdefault("unfused", state.get("_unfused", set()))
        self.traits = traits(self.reducer)

    # What it is to do

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of patch tokens that is to leave each layer, at the model's own image size."""
        return shares(self.schedule, self.layout.patches, self.layout.layers)

    @property
    def targets(self) -> dict[int, float]:
        """Of a learned method: the share of patch tokens that each of its gates is to keep."""
        return {int(layer): self.shares[int(layer)] for layer in self.gates or ()}

    def counts(self, tokens: int, grid: tuple[int, int] | None) -> tuple[int, ...]:
        """How many tokens leave each layer, of so many that stand on `grid`: what the schedule
        asks for, or the nearest number that the method can make on the grid."""
        asked = plan(self.schedule, tokens, self.layout.layers)
        return tuple(fitted(self.traits, count, tokens, grid) for count in asked)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever reduced, at the model's own image size and at larger ones."""
        layers, patches = self.layout.layers, self.layout.patches
        try:
            return self.gates is None and all(
                min(plan(self.schedule, tokens, layers)) == tokens
                for tokens in (patches, 4 * patches)
            )
        except ValueError:  # a schedule for one number of tokens
            return False

    @property
    def reading(self) -> frozenset[int]:
        """The layers off which signals are read, at the model's own image size and at larger ones.
        (At others, they are read as soon as they are wanted.) A hook costs time in every pass, so
        that it hangs only there."""
        layers, patches = self.layout.layers, self.layout.patches
        if self.gates is not None or not isinstance(self.schedule, PURE):
            return frozenset(range(layers))
        falling: set[int] = set()
        for tokens in (patches, 4 * patches, 16 * patches):
            try:
                counts = (tokens, *plan(self.schedule, tokens, layers))
            except ValueError:  # a schedule for one number of tokens
                continue
            falling.update(at for at in range(layers) if counts[at + 1] < counts[at])
        early = 1 if self.traits.place == "before" else 0
        return frozenset(layer - early for layer in falling if layer >= early)

    def ahead(
        self, tokens: int, grid: tuple[int, int] | None, lengths: tuple[int, ...] | None = None
    ) -> Ahead | None:
        """What a pass has to do.

        Args:
            tokens: how many patch tokens there are.
            grid: the one that they stand on.
            lengths: where the images of a batch came padded: how many tokens each has.

        Raises:
            RuntimeError: blocks were replaced since the reduction was applied.
        """
        blocks = self.layout.layers if self.end is None else self.end()
        tapped = self.tapped()
        changes = not isinstance(self.schedule, PURE)
        if lengths is not None or changes or compiling() or tracing():
            return self._ahead(tokens, grid, lengths, tapped, blocks)
        which = (self.schedule, tokens, grid, tapped, blocks)
        found = self._plans.get(which)
        if found is None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            found = self._plans[which] = self._ahead(tokens, grid, lengths, tapped, blocks)
        return found

    def _ahead(
        self,
        tokens: int,
        grid: tuple[int, int] | None,
        lengths: tuple[int, ...] | None,
        tapped: frozenset[int],
        blocks: int,
    ) -> Ahead | None:
        longest = tokens if lengths is None else max(lengths)
        counts = self.counts(longest, grid)
        # Of every image what it would be asked for alone; of one that is nothing but padding, none.
        plans = {0: (0,) * self.layout.layers}
        plans.update((n, self.counts(n, grid)) for n in set(lengths or ()) - {0})
        ahead: Ahead | None = None
        for layer in reversed(range(blocks)):
            # Padding alone is no reason to reduce.
            keep = counts[layer] if counts[layer] < longest else tokens
            each = None if lengths is None else tuple(plans[length][layer] for length in lengths)
            ahead = Ahead(keep, layer in tapped, self.layout.layers - layer, ahead, each)
        return ahead

    # What a host says during a pass

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Says on which grid the patches of the running images stand."""
        self.memory.here.grid = grid

    def grid_of(self, tokens: int) -> tuple[int, int] | None:
        """The grid that so many tokens stand on: that of the image, or of the model's own size."""
        if not self.layout.raster:
            return None
        for rows, columns in (self.memory.here.grid or (0, 0), self.layout.grid):
            if rows * columns == tokens:
                return rows, columns
        return None

    def set_tapped(self, layers: frozenset[int]) -> None:
        """Says at which layers the host hands out tokens during this call, and so needs the full
        grid; none again, once the call is over."""
        self.memory.here.tapped = layers or None

    def handing_out(
        self, layers: frozenset[int], call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Calls a method of the model that hands out what leaves some of its layers: on the full
        grid, there."""
        # No context manager: older versions of torch.compile cannot follow one.
        self.set_tapped(layers)
        try:
            return call(*args, **kwargs)
        finally:
            self.set_tapped(frozenset())

    def tapped(self) -> frozenset[int]:
        """The layers whose output is handed out during this call."""
        layers = self.hand_out | (self.memory.here.tapped or frozenset())
        return layers if self.tapped_by is None else layers | self.tapped_by(self.layout.layers)

    @property
    def running(self) -> Step | None:
        """The block of this thread that is running, if there is one."""
        return self.memory.here.step

    # What it tells

    @property
    def decisions(self) -> dict[int, Float[Tensor, "batch tokens"]]:
        """Of a learned method: which tokens each gate has kept (1) in the last forward pass of
        this thread in training mode, with the gradients of a softmax."""
        return self.memory.here.decisions or {}

    @contextmanager
    def recording(self) -> Iterator[list[Record]]:
        """Collects what every reduction of this thread does, until the end of the block."""
        records: list[Record] = []
        self.memory.here.records = records
        try:
            yield records
        finally:
            self.memory.here.records = None

    def record(self, record: Record) -> None:
        """Tells who listens of a reduction. Compiled code tells nobody."""
        if compiling():
            return
        records = self.memory.here.records
        if records is not None:
            records.append(record)
        if self.observer is not None:
            self.observer.records(record)

    def part(self, name: str) -> AbstractContextManager[None]:
        """A context in which this part of the work is done (see `Observer.part`), for who observes
        the passes."""
        return _NOTHING if self.observer is None else self.observer.part(name)

    # The weights of a learned method

    def gate(self, layer: int, device: torch.device) -> nn.Module | None:
        """The gate of a layer, on the device of its tokens: it does not move with the model."""
        gates = self.gates
        if gates is None or str(layer) not in gates:
            return None
        gate: nn.Module = gates[str(layer)]
        weight = next(gate.parameters())
        return gate if weight.device == device else gate.to(device)

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
        if not about:
            raise ValueError(
                f"{path} does not say what it is for; Reduction.save writes files that do"
            )
        check_gates(self.reducer, about, self.layout.layers, str(path))
        weights.fill(gates, tensors, str(path))

    def _gates(self) -> nn.ModuleDict:
        if not self.gates:
            raise ValueError(
                f"{self.reducer} has no weights: it learns nothing, or keeps all tokens"
            )
        return self.gates


def fitted(said: Traits, keep: int, tokens: int, grid: tuple[int, int] | None) -> int:
    """The number of tokens nearest to `keep` that a method can make, of so many on `grid`."""
    if said.fit is None or grid is None or keep >= tokens:
        return keep
    return int(said.fit(keep, grid))


def check_gates(reducer: Reducer, about: Mapping[str, Any], layers: int, where: str) -> None:
    """Raises unless a file of weights is for this method, and for so many layers.

    Raises:
        ValueError: it is for another method, or another number of layers.
    """
    if not learned(reducer) or about["method"] != reducer.learned:
        raise ValueError(f"gates: {where} is of {about['method']!r}, not of {reducer}")
    if len(about["shares"]) != layers:
        raise ValueError(
            f"gates: {where} is for a model of {len(about['shares'])} layers; this one has {layers}"
        )
