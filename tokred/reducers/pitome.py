"""PiToMe: merging that protects the tokens that few others resemble.

Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024,
https://arxiv.org/abs/2405.16148, section 3.2. A token's energy is how much the others resemble it:
high in large uniform regions, low for a token that stands alone. Only the tokens of the highest
energy take part in a bipartite matching. Differs from the paper in that more than half of the
tokens can go, in rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tokred.graphs import in_a_graph
from tokred.maps import Clusters, deciding, in_order_of_first_member, ranked, take
from tokred.reducers.protocol import Tokens
from tokred.reducers.registry import register
from tokred.reducers.tome import mean_over_heads


@register("pitome")
@dataclass(frozen=True)
class PiToMe:
    """Merges tokens that resemble many others in pairs, and leaves those that stand alone.

    Tokens are compared by the cosine of their keys, averaged over heads. One matching removes half
    of the tokens at most; if more must go, the merged tokens are matched again.

    Args:
        margin: tokens count as alike from this cosine on. If not given, it is 0.9 in the first
            layer and falls by the same amount in every layer, to reach 0 after the last one.
        alpha: the weight of tokens that are not alike, which lower the energy.
    """

    margin: float | None = None
    alpha: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"key"})
    bibtex: ClassVar[str] = """@inproceedings{tran2024pitome,
  title     = {Accelerating Transformers with Spectrum-Preserving Token Merging},
  author    = {Tran, Hoai-Chau and Nguyen, Duy M. H. and Nguyen, Duy M. and Nguyen, Trung-Tin and
               Le, Ngan and Xie, Pengtao and Sonntag, Daniel and Zou, James and
               Nguyen, Binh T. and Niepert, Mathias},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}"""

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        assert tokens.key is not None
        margin = self.margin
        if margin is None:
            margin = 0.9 - 0.9 * tokens.layer / tokens.layers
        metric, size = mean_over_heads(tokens.key), tokens.size
        clusters = once = self._halve_at_most(metric, keep, margin)
        while clusters.num_coarse > keep:
            metric, size = once.down(metric, size), once.total(size)
            once = self._halve_at_most(metric, keep, margin)
            clusters = clusters.then(once)
        return clusters

    def _halve_at_most(
        self, metric: Float[Tensor, "batch tokens dim"], keep: int, margin: float
    ) -> Clusters:
        num = metric.shape[1]
        merges = min(num - keep, num // 2)
        return Clusters(match(metric, merges, margin, self.alpha), num - merges)


def match(
    metric: Float[Tensor, "batch tokens dim"], merges: int, margin: float, alpha: float = 1.0
) -> Int[Tensor, "batch tokens"]:
    """Merges `merges` of the tokens with the highest energy; returns the group of every token.

    Groups are numbered in the order of their first tokens. Ties go to the lower index.

    Args:
        metric: what tokens are compared by; need not be normalised. A row of zeros is as far
            from every token as an orthogonal one.
        merges: how many tokens to remove, in [0, tokens // 2].
        margin: see `energy`.
        alpha: see `energy`.

    Raises:
        ValueError: `merges` is out of range.
    """
    batch, num, _ = metric.shape
    if not 0 <= merges <= num // 2:
        raise ValueError(
            f"PiToMe removes between 0 and {num // 2} of {num} tokens at a time, not {merges}: "
            "every one of them needs a partner that stays"
        )
    label = torch.arange(num, device=metric.device).repeat(batch, 1)
    if merges == 0:
        return label

    # Step 1: the 2 * merges tokens with the highest energy may merge; the others are protected.
    unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    order = ranked(deciding(energy(unit, margin, alpha)))

    # Step 2: in the order of their energy they alternate between sets A and B. (B is sorted again,
    # so that the first of equals is the one with the lowest index.)
    a = order[:, 0 : 2 * merges : 2]
    b = order[:, 1 : 2 * merges : 2].sort(-1).values

    # Step 3: every token of A merges with its most similar token of B.
    partner = deciding(take(unit, a) @ take(unit, b).transpose(1, 2)).argmax(-1)
    return in_order_of_first_member(label.scatter(1, a, b.gather(1, partner)))


def energy(
    unit: Float[Tensor, "batch tokens dim"],
    margin: float,
    alpha: float = 1.0,
    elements: int | None = None,
) -> Float[Tensor, "batch tokens"]:
    """How much the tokens of a sample resemble each one, on average (equation 4).

    A cosine x counts as x from `margin` on, and as alpha * (exp(x - margin) - 1) below it.

    Args:
        unit: tokens of length 1. (A token is among its own neighbours, which adds the same to all.)
        elements: how many cosines are held at once; only their means are needed. On the CPU, the
            default is what fits into the cache.
    """
    rows = unit.shape[1]
    if elements is None:
        elements = 2**18 if unit.device.type == "cpu" else 2**24
    if not in_a_graph(unit):  # there the batch may be a symbol, not a number
        rows = max(1, elements // max(1, unit.shape[0] * unit.shape[1]))
    means = []
    for some in unit.split(rows, dim=1):
        cosine = some @ unit.transpose(1, 2)
        alike = cosine >= margin
        means.append(cosine.where(alike, alpha * torch.expm1(cosine - margin)).mean(-1))
    return torch.cat(means, 1)
