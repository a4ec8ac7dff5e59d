"""Cutting sequences off: the limit that methods are measured against. It is no method itself, so it
has no short name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tokred.maps import Kept
from tokred.reducers.protocol import Tokens


@dataclass(frozen=True)
class Truncate:
    """Keeps the first tokens, whatever they are.

    Attributes:
        place: where it stands in a block, as the method that is measured against it.
        keys_only: whether only keys and values become fewer; of denoisers.
    """

    place: str = "between"
    keys_only: bool = False

    needs: ClassVar[frozenset[str]] = frozenset()
    limit: ClassVar[bool] = True
    bibtex: ClassVar[str] = ""

    def __call__(self, tokens: Tokens, keep: int) -> Leading:
        batch, num, _ = tokens.x.shape
        index = torch.arange(keep, device=tokens.x.device)[None]
        return Leading(index.expand(batch, keep), num)


@dataclass(frozen=True)
class Leading(Kept):
    """The first tokens: a slice, which costs nothing."""

    def down(
        self, x: Float[Tensor, "batch fine dim"], size: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        return x[:, : self.num_coarse]

    def up(
        self, y: Float[Tensor, "batch coarse dim"], stale: Float[Tensor, "batch fine dim"] | None
    ) -> Float[Tensor, "batch fine dim"]:
        """The others stay what they were; zeros, if that is not given."""
        if stale is not None:
            return super().up(y, stale)
        return F.pad(y, (0, 0, 0, self.num_fine - self.num_coarse))
