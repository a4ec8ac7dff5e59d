"""What somebody outside of the engine may learn of a pass: records of reductions, and its parts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from tokred.maps import TokenMap


@dataclass(frozen=True)
class Record:
    """One reduction, or one rise, as `tokred.inspect` tells of it.

    Attributes:
        layer: the block, from 0.
        before: number of patch tokens before it.
        after: number of patch tokens after it.
        map: how they became fewer; None if they became more.
        undone: how many of the last reductions a rise has undone.
        around: whether there are all tokens again behind the block.
    """

    layer: int
    before: int
    after: int
    map: TokenMap | None
    undone: int = 0
    around: bool = False


class Observer:
    """Watches a reduction (`Reduction.observer`). Every method may be overridden.

    It is told of a pass in the thread that runs the pass, also while code is being compiled (ask
    `torch.compiler.is_compiling()`).
    """

    def hung(self) -> None:
        """The reduction was put into a model."""

    def taken_away(self) -> None:
        """The reduction was taken out of the model. It may be put in again."""

    def begins(self) -> None:
        """A pass begins: the first block is about to run."""

    def ends(self) -> None:
        """A pass ends: the last block has run. (Blocks may run again later, for gradients.)"""

    def records(self, record: Record) -> None:
        """A block has reduced its tokens, or undone reductions. Not in compiled code."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """What happens inside the context is this part of the block that is running.

        Args:
            name: "matching" (signals are read and the method decides), "merging" (tokens become
                fewer), "bias" (sizes, masks and positions of the tokens that are left), "back"
                (the full grid is made), or "rest" (the host's own work, inside another part).
                Parts nest.
        """
        return nullcontext()
