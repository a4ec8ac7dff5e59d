"""What the tokens of one activation stand for: values, which are never changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from tokred.graphs import compiling
from tokred.maps import Clusters, Kept, TokenMap

Value = TypeVar("Value")


def quickly(kind: Callable[..., Value], **fields: Any) -> Value:
    """A frozen dataclass with all of its fields, without asking its own `__init__`, which sets them
    one by one. Passes make several in every reduction, and one in every block.

    Args:
        kind: the class; it has no `__post_init__`.
        fields: the values of all its fields.
    """
    if compiling():
        return kind(**fields)
    value: Value = object.__new__(kind)  # type: ignore[arg-type]
    value.__dict__.update(fields)
    return value


@dataclass(frozen=True)
class Ahead:
    """What a pass still has to do: this block, and those behind it.

    A chain rather than a tuple: no block then depends on which number it has, and blocks that are
    compiled one by one can share their code.

    Attributes:
        keep: number of patch tokens that leave this block; of a padded batch, those of its longest
            image.
        tapped: whether somebody is going to see what this block puts out.
        left: number of blocks from this one on.
        rest: the blocks behind this one; None at the last.
        each: where the images of a batch came padded: number of patch tokens of each that leave
            this block.
    """

    keep: int
    tapped: bool
    left: int
    rest: Ahead | None
    each: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Reduced:
    """One reduction that has happened.

    Attributes:
        map: how the tokens became fewer.
        asked: how many tokens the schedule asked for.
        size, bias, index, grid, each: those of the `State` before the reduction.
        stale: the tokens before the reduction, if the map needs them to make the full grid.
        former: the reduction before this one; None at the first.
    """

    map: TokenMap
    asked: int
    size: Float[Tensor, "batch fine"] | None
    bias: Float[Tensor, "batch 1 1 fine_and_others"] | None
    index: Int[Tensor, "batch fine"] | None
    grid: tuple[int, int] | None
    stale: Float[Tensor, "batch fine dim"] | None
    former: Reduced | None
    each: tuple[int, ...] | None = None

    def but(self, stale: Tensor | None, former: Reduced | None) -> Reduced:
        """The same reduction with other stale tokens, behind another former one."""
        return Reduced(
            map=self.map,
            asked=self.asked,
            size=self.size,
            bias=self.bias,
            index=self.index,
            grid=self.grid,
            stale=stale,
            former=former,
            each=self.each,
        )


@dataclass(frozen=True, kw_only=True)
class State:
    """What the tokens of one activation stand for.

    Attributes:
        ahead: what the pass still has to do; None behind the last block.
        full: number of patch tokens of the full grid.
        trail: the last reduction so far, which knows the one before it.
        size: how many original tokens each patch token stands for, 0 for padding; None if each
            one stands for itself.
        bias: what is added to the logits of attention, zeros for the other tokens: the logarithm
            of the size where attention is proportional, -inf for padding.
        expanded: whether the activation is on the full grid again, with copies for merged tokens.
        received: the attention that each patch token got in the block before, if the method stands
            before the next block and needs it.
        index: where on the full grid each patch token stands (a merged one: its first member);
            None if all stand in their places, or if nobody asks.
        each: where the images of a batch came padded: how many patch tokens were asked for of
            each, at first those that it has.
        grid: rows and columns of the reduced tokens, where they are known to stand on a grid.
        aside: the reduced tokens themselves, where the activation is expanded and they could not
            be recovered from it (see `Weighted`).
        kept: of a learned method that remembers, which tokens of the full grid it has not left
            out, 1 or 0. None if all are there, or if nobody asks.
    """

    ahead: Ahead | None
    full: int
    trail: Reduced | None = None
    size: Float[Tensor, "batch tokens"] | None = None
    bias: Float[Tensor, "batch 1 1 tokens_and_others"] | None = None
    expanded: bool = False
    received: Float[Tensor, "batch tokens"] | None = None
    index: Int[Tensor, "batch tokens"] | None = None
    each: tuple[int, ...] | None = None
    grid: tuple[int, int] | None = None
    aside: Tensor | None = None
    kept: Float[Tensor, "batch full"] | None = None

    def but(self, **changes: Any) -> State:
        """The same state with other values for the given attributes."""
        if not compiling():
            return quickly(State, **{**self.__dict__, **changes})
        # Written out, because older versions of torch.compile cannot follow dataclasses.replace.
        return State(
            ahead=changes.get("ahead", self.ahead),
            full=changes.get("full", self.full),
            trail=changes.get("trail", self.trail),
            size=changes.get("size", self.size),
            bias=changes.get("bias", self.bias),
            expanded=changes.get("expanded", self.expanded),
            received=changes.get("received", self.received),
            index=changes.get("index", self.index),
            each=changes.get("each", self.each),
            grid=changes.get("grid", self.grid),
            aside=changes.get("aside", self.aside),
            kept=changes.get("kept", self.kept),
        )

    @property
    def asked(self) -> int:
        """How many patch tokens were asked for so far."""
        return self.full if self.trail is None else self.trail.asked

    @property
    def few(self) -> int:
        """Number of patch tokens after the last reduction."""
        return self.full if self.trail is None else self.trail.map.num_coarse

    @property
    def tokens(self) -> int:
        """Number of patch tokens of the activation."""
        return self.full if self.expanded else self.few

    def falls(self, ahead: Ahead) -> bool:
        """Whether a block asks for fewer tokens than were asked for so far.

        How many there are makes no difference: where images vary, an image would be reduced or not
        according to the longest of its batch.
        """
        if self.each is None or ahead.each is None:
            return ahead.keep < self.asked
        return any(fewer < now for fewer, now in zip(ahead.each, self.each, strict=True))

    @property
    def left(self) -> int:
        """Number of blocks that the pass still has to run."""
        return 0 if self.ahead is None else self.ahead.left

    @property
    def by_image(self) -> bool:
        """Whether anything of it belongs to single images: not before the first reduction."""
        known = (self.trail, self.size, self.received, self.each, self.kept)
        return any(value is not None for value in known)

    @property
    def prunes(self) -> bool:
        """Whether tokens were dropped, rather than merged."""
        return any(not reduced.map.merges for reduced in unrolled(self.trail))

    @property
    def exact(self) -> bool:
        """Whether the reduced tokens can be recovered from the full grid that was made of them."""
        return all(type(reduced.map) in (Clusters, Kept) for reduced in unrolled(self.trail))

    @property
    def constant(self) -> bool:
        """Whether no gradient flows through it: it says which tokens merged, and holds no token and
        no weight that a model has computed."""
        return (
            self.aside is None
            and self.kept is None
            and all(
                type(reduced.map) is Clusters and reduced.map.share is None
                for reduced in unrolled(self.trail)
            )
        )

    @property
    def ragged(self) -> bool:
        """Whether images differ in their number of tokens, and some are padded."""
        return not self.expanded and any(reduced.map.ragged for reduced in unrolled(self.trail))

    def positions(self) -> Int[Tensor, "batch tokens"] | None:
        """Where on the full grid each patch token stands; None if all stand in their places."""
        if self.trail is None or self.index is not None:
            return self.index
        index: Tensor | None = None
        for reduced in unrolled(self.trail):
            chosen = reduced.map.representatives()
            index = chosen if index is None else index.gather(1, chosen)
        return index

    def without_stale(self) -> State:
        """The same state without the tokens that pruning methods have dropped. It suffices for
        pooling, and need not keep them in memory as long as the features live."""
        trail: Reduced | None = None
        for reduced in unrolled(self.trail):
            trail = reduced.but(stale=None, former=trail)
        return self.but(trail=trail, received=None, aside=None)


def unrolled(trail: Reduced | None) -> list[Reduced]:
    """The reductions of a trail, the first one first."""
    found: list[Reduced] = []
    while trail is not None:
        found.insert(0, trail)
        trail = trail.former
    return found
