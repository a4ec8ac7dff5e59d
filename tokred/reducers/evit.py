"""Pruning by the class token's attention, with one token that stands for all that go.

Liang et al., "Not All Patches Are What You Need: Expediting Vision Transformers via Token
Reorganizations" (EViT), ICLR 2022, https://arxiv.org/abs/2202.07800, section 3.2. Differs from
the published code in that the fused token is a weighted mean (as the paper's text says; there: a
weighted sum, `published=True`), that it is one of the tokens that are asked for rather than one
more, and that it stands where its first member stood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokred.maps import Clusters, deciding, in_order_of_first_member, ranked, take
from tokred.reducers.protocol import Tokens
from tokred.reducers.registry import register


@register("evit")
@dataclass(frozen=True)
class EViT:
    """Keeps the tokens that the class token attends to most, and fuses the others into one.

    Of the `keep` tokens that are left, one is the fused one; from then on, it is an ordinary token.
    Without a class token: those that get the most attention from all tokens. Of equal scores the
    lower index wins.

    Args:
        published: make the fused token the sum of its members times their attention, as the
            published code does, and not their mean.
    """

    published: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"class_attention"})
    proportional: ClassVar[bool] = False
    bibtex: ClassVar[str] = """@inproceedings{liang2022evit,
  title     = {Not All Patches are What You Need: Expediting Vision Transformers via Token
               Reorganizations},
  author    = {Liang, Youwei and Ge, Chongjian and Tong, Zhan and Song, Yibing and Wang, Jue and
               Xie, Pengtao},
  booktitle = {International Conference on Learning Representations},
  year      = {2022}
}"""

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        assert tokens.class_attention is not None
        attention = tokens.class_attention.mean(1)
        fused = least(attention, attention.shape[1] - keep + 1)

        # Every kept token is a group of its own. All others are one group, named by their first.
        position = torch.arange(fused.shape[1], device=fused.device).expand(fused.shape)
        first = fused.int().argmax(-1, keepdim=True)
        index = in_order_of_first_member(torch.where(fused, first, position))

        # Equations 3 and 4: a token is weighed by its attention. (All alike, if all of it is 0.)
        total = (attention * fused).sum(-1, keepdim=True)
        weight = torch.where(total > 0, attention, torch.ones_like(attention))
        total = torch.where(total > 0, total, fused.sum(-1, keepdim=True).to(total))
        if self.published:
            summed = torch.where(fused, attention, torch.ones_like(attention))
            return Summed(index, keep, summed, sum_of_shares=torch.where(fused, total, 1.0))
        return Clusters(index, keep, torch.where(fused, weight / total, torch.ones_like(weight)))


@dataclass(frozen=True)
class Summed(Clusters):
    """Clusters whose shares do not add up to 1.

    Attributes:
        sum_of_shares: for each fine token, the sum of the shares in its coarse token. `up` divides
            copies by it, so that they are as large as a token, and merge into the same again.
    """

    sum_of_shares: Float[Tensor, "batch fine"] | None = None

    def up(
        self,
        y: Float[Tensor, "batch coarse dim"],
        stale: Float[Tensor, "batch fine dim"] | None = None,
    ) -> Float[Tensor, "batch fine dim"]:
        assert self.sum_of_shares is not None
        return take(y, self.index) / self.sum_of_shares[..., None].to(y.dtype)


def least(score: Float[Tensor, "batch tokens"], num: int) -> Bool[Tensor, "batch tokens"]:
    """The `num` tokens with the lowest scores; of equal ones, those with the higher index."""
    order = ranked(deciding(score))
    chosen = torch.zeros_like(score, dtype=torch.bool)
    return chosen.scatter(1, order[:, score.shape[1] - num :], True)
