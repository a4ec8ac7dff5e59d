"""Methods that draw tokens at random, to try out a patch: what they choose depends on nothing but
the layer, the image and the number of tokens, so that a second computation can know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokred.maps import Clusters, Kept, TokenMap, take
from tokred.reducers import Tokens
from tokred.reducers.svit import SViT


@dataclass(frozen=True)
class FirstMembers(Clusters):
    """Merging in which a merged token is its first member, not the mean of its members. It still
    stands for all of them. So a model in which the other members are hidden from attention computes
    the same tokens."""

    def down(
        self, x: Float[Tensor, "batch fine dim"], size: Float[Tensor, "batch fine"]
    ) -> Float[Tensor, "batch coarse dim"]:
        return take(x, self.representatives())


@dataclass(frozen=True)
class Noisy(Kept):
    """Pruning in which noise takes the place of every dropped token on the full grid."""

    def up(
        self, y: Float[Tensor, "batch coarse dim"], stale: Float[Tensor, "batch fine dim"] | None
    ) -> Float[Tensor, "batch fine dim"]:
        assert stale is not None
        return super().up(y, noise(stale, 0))


@dataclass(frozen=True)
class Probe:
    """A reducer that draws tokens at random, and remembers what it was shown.

    Attributes:
        needs: the signals that it asks for.
        prunes: whether it drops tokens, rather than merge them.
        place: where it stands: "between" or "before".
        noisy: whether noise takes the place of dropped tokens, see `Noisy`.
        shown: what it was shown, call by call.
        calls: by layer, the numbers of tokens before and after.
    """

    needs: frozenset[str] = frozenset()
    prunes: bool = False
    place: str = "between"
    noisy: bool = False
    bibtex: str = ""
    shown: list[Tokens] = field(default_factory=list, repr=False, compare=False)
    calls: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)
    _known: dict[Any, Standing] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return "tokens dropped at random" if self.prunes else "tokens merged at random"

    def __call__(self, tokens: Tokens, keep: int) -> TokenMap:
        """A map to exactly `keep` tokens."""
        batch, fine, _ = tokens.x.shape
        self.shown.append(tokens)
        self.calls[tokens.layer] = fine, keep
        return self.drawn(tokens.layer, batch, fine, keep, tokens.x.device)

    def drawn(
        self, layer: int, batch: int, fine: int, keep: int, device: torch.device | str = "cpu"
    ) -> TokenMap:
        """The map of a layer, from so many tokens to `keep`."""
        index, labels = zip(
            *(_drawn(layer, image, fine, keep) for image in range(batch)), strict=True
        )
        if not self.prunes:
            return FirstMembers(torch.stack(labels).to(device), keep)
        kind = Noisy if self.noisy else Kept
        return kind(torch.stack(index).to(device), fine)

    def standing(self, batch: int, full: int, through: int) -> Standing:
        """What is left of the tokens of the full grid behind layer `through`."""
        passed = tuple((at, *counts) for at, counts in sorted(self.calls.items()) if at <= through)
        if (batch, full, passed) not in self._known:
            all_of_them = torch.arange(full).expand(batch, -1)
            left = Standing(all_of_them, torch.ones(batch, full), all_of_them)
            for layer, fine, keep in passed:
                left = left.after(self.drawn(layer, batch, fine, keep))
            self._known[batch, full, passed] = left
        return self._known[batch, full, passed]


@dataclass(frozen=True)
class Chooser(SViT):
    """Gates of blocks that choose tokens at random, in every second image one less.

    Attributes:
        chosen: by layer, which tokens were chosen: 1, or 0.
    """

    chosen: dict[int, Float[Tensor, "batch patches"]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __str__(self) -> str:
        return "tokens chosen at random"

    def __call__(self, tokens: Tokens, keep: int) -> Kept:
        """A map to `keep` tokens or one less."""
        batch, fine, _ = tokens.x.shape
        counts = [max(1, keep - image % 2) for image in range(batch)]
        index = torch.zeros(batch, keep, dtype=torch.long)
        for row, (image, count) in zip(index, enumerate(counts), strict=True):
            row[:count] = _drawn(tokens.layer, image, fine, count)[0]
        device = tokens.x.device
        kept = Kept(index.to(device), fine, torch.tensor(counts, device=device))
        self.chosen[tokens.layer] = (kept.labels() >= 0).float()
        return kept


@dataclass(frozen=True)
class Equals:
    """Merging of tokens that are equal: those at the end join the first one that they are equal
    to."""

    needs: ClassVar[frozenset[str]] = frozenset()
    bibtex: ClassVar[str] = ""

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        """A map to exactly `keep` tokens, no fewer than are different."""
        apart = torch.cdist(tokens.x.float(), tokens.x.float())
        equal = apart <= 1e-3 * apart.amax((1, 2), keepdim=True)
        first = equal.int().argmax(2)  # the first of equals
        number = torch.arange(first.shape[1], device=first.device).expand_as(first)
        new = first == number
        left = new | ((~new).cumsum(1) <= keep - new.sum(1, keepdim=True))
        joined = torch.where(left, number, first)
        return Clusters((left.cumsum(1) - 1).gather(1, joined), keep)


@lru_cache
def _drawn(layer: int, image: int, fine: int, keep: int) -> tuple[Tensor, Tensor]:
    """The tokens that are kept of one image, rising; and which of these each token joins: one that
    stands before it."""
    generator = torch.Generator().manual_seed(1000 * layer + image)
    others = 1 + torch.randperm(fine - 1, generator=generator)[: keep - 1]
    # The first token is kept when tokens are merged, or some could join none before them.
    first = torch.cat([torch.zeros(1, dtype=torch.long), others]).sort().values
    before = torch.isin(torch.arange(fine), first).cumsum(0)
    labels = (torch.rand(fine, generator=generator) * before).long().clamp(max=keep - 1)
    labels[first] = torch.arange(keep)
    kept = torch.randperm(fine, generator=generator)[:keep].sort().values
    return kept, labels


@dataclass(frozen=True)
class Standing:
    """What is left of the tokens of a full grid.

    Attributes:
        positions: where on the full grid each token that is left stands.
        sizes: how many tokens of the full grid it stands for.
        labels: the token that each one of the full grid went into; -1 if it was dropped.
    """

    positions: Int[Tensor, "batch few"]
    sizes: Float[Tensor, "batch few"]
    labels: Int[Tensor, "batch full"]

    def after(self, token_map: TokenMap) -> Standing:
        """What is left after one more reduction."""
        chosen, onward = token_map.representatives(), token_map.labels()
        labels = torch.where(self.labels < 0, -1, onward.gather(1, self.labels.clamp(min=0)))
        return Standing(self.positions.gather(1, chosen), token_map.total(self.sizes), labels)

    def bias(self, merges: bool) -> Float[Tensor, "batch full"]:
        """What to add to the logits of attention on the full grid, so that it sees the tokens that
        are left and no others, each merged one as often as what it stands for."""
        hidden = torch.full(self.labels.shape, -torch.inf)
        seen = self.sizes.log() if merges else torch.zeros_like(self.sizes)
        return hidden.scatter(1, self.positions, seen)

    def restored(
        self, x: Float[Tensor, "batch full dim"], seed: int
    ) -> Float[Tensor, "batch full dim"]:
        """The full grid of copies, from any full grid: each token that of its cluster. Dropped
        ones become noise."""
        dropped = self.labels.to(x.device)[..., None] < 0
        source = self.positions.gather(1, self.labels.clamp(min=0)).to(x.device)
        return torch.where(dropped, noise(x, seed), take(x, source))


def noise(like: Tensor, seed: int) -> Tensor:
    """Noise as strong as a tensor is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like) * like.abs().max()
