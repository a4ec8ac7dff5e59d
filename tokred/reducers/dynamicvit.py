"""DynamicViT: a learned predictor drops tokens, stage by stage.

Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS
2021, https://arxiv.org/abs/2106.02034, sections 3.2 and 3.3. Differs from the published code in
that the predictor's global feature is the mean over the tokens that are left, at inference as in
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokred.gates import Gates
from tokred.maps import Kept
from tokred.reducers.protocol import Tokens
from tokred.reducers.registry import register
from tokred.reducers.svit import kept, start_at


@register("dynamicvit")
@dataclass(frozen=True)
class DynamicViT:
    """Keeps the tokens that a learned predictor holds most worth keeping; drops the others.

    Every image keeps the same number. Needs trained predictors, see `tokred train`.

    Args:
        gates: a file that `Reduction.save` or `tokred train` has written, or the predictors
            themselves (`Reduction.gates`). Without any they start at random, to be trained.
    """

    gates: Gates | None = field(default=None, repr=False)

    needs: ClassVar[frozenset[str]] = frozenset()
    learned: ClassVar[str] = "dynamicvit"
    place: ClassVar[str] = "before"
    prunes: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    proportional: ClassVar[bool] = False
    bibtex: ClassVar[str] = """@inproceedings{rao2021dynamicvit,
  title     = {DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification},
  author    = {Rao, Yongming and Zhao, Wenliang and Liu, Benlin and Lu, Jiwen and Zhou, Jie and
               Hsieh, Cho-Jui},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021}
}"""

    def layers(self, shares: Sequence[float]) -> list[int]:
        """The layers that have predictors: those at which the number of tokens falls."""
        before = [1.0, *shares]
        return [layer for layer, share in enumerate(shares) if share < before[layer]]

    def gate(self, width: int, odds: float) -> Predictor:
        """A random predictor for tokens of this width, which keeps about `odds` tokens for each one
        that it drops."""
        return Predictor(width, odds)

    def score(self, tokens: Tokens) -> Float[Tensor, "batch tokens 2"]:
        """The log-probabilities of keeping each token, and of dropping it."""
        assert tokens.gate is not None
        there = (tokens.size > 0).to(tokens.size)
        scores: Tensor = tokens.gate(
            tokens.x, there if tokens.kept is None else tokens.kept * there
        )
        return scores

    def __call__(self, tokens: Tokens, keep: int) -> Kept:
        return kept(self.score(tokens), tokens, keep)


class Predictor(nn.Module):
    """An MLP on the features of a token and the mean of the global features of all tokens that are
    left (equations 1 to 5)."""

    def __init__(self, width: int, odds: float = 1.0) -> None:
        super().__init__()
        self.width = width
        half = max(2, width // 2)
        self.local = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, half * 2), nn.GELU())
        self.fc1 = nn.Linear(half * 2, half)
        self.fc2 = nn.Linear(half, half // 2)
        self.fc3 = nn.Linear(half // 2, 2)
        self.act = nn.GELU()
        start_at(self.fc3, odds)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], there: Float[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens 2"]:
        """log-softmax over (keep, drop).

        Args:
            x: the tokens.
            there: 1 for those that are left, 0 for those that were dropped before.
        """
        local, every = self.local(x.to(self.fc1.weight.dtype)).chunk(2, -1)
        there = there.to(every.dtype)[..., None]
        # What is not finite has no part in the mean: the scores of all tokens would be NaN, and not
        # those of the token alone that must not vanish.
        every = every.nan_to_num(0, 0, 0)
        mean = (every * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
        both = torch.cat([local, mean.expand_as(local)], -1)
        scores: Tensor = self.fc3(self.act(self.fc2(self.act(self.fc1(both)))))
        return scores.log_softmax(-1)
