"""Adaptive token sampling: as many tokens as the image needs, up to a limit.

Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022,
https://arxiv.org/abs/2111.15667, sections 3.1 and 3.2. The tokens that are not sampled leave
between attention and MLP, which is the same as leaving their queries out of the attention: their
keys and values still take part in it. Differs from the published code in that distances in the
cumulative sum are exact, that an image gives the same result in a batch as alone, and in that K
points are those of the paper (there: K + 1 points without the last; `published=True` takes these).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokred.maps import Kept, deciding, kept_where
from tokred.reducers.protocol import ADDED, Tokens, brief
from tokred.reducers.registry import register


@register("ats")
@dataclass(frozen=True)
class ATS:
    """Samples tokens by the class token's attention and the length of their values.

    A token that matters much is drawn several times but kept once, so that at most `keep` tokens
    stay, fewer in images with few tokens that matter. Without a class token, the attention from
    all tokens counts. Runs eagerly: how many tokens stay depends on the images.

    Args:
        published: see `sample`.
    """

    published: bool = field(default=False, metadata=ADDED)

    needs: ClassVar[frozenset[str]] = frozenset({"class_attention", "value"})
    varies: ClassVar[bool] = True
    prunes: ClassVar[bool] = True
    bibtex: ClassVar[str] = """@inproceedings{fayyaz2022ats,
  title     = {Adaptive Token Sampling for Efficient Vision Transformers},
  author    = {Fayyaz, Mohsen and Abbasi Koohpayegani, Soroush and Rezaei Jafari, Farnoush and
               Sengupta, Sunando and Vaezi Joze, Hamid Reza and Sommerlade, Eric and
               Pirsiavash, Hamed and Gall, Juergen},
  booktitle = {European Conference on Computer Vision},
  year      = {2022}
}"""

    __repr__ = brief

    def __call__(self, tokens: Tokens, keep: int) -> Kept:
        assert tokens.class_attention is not None and tokens.value is not None
        # Equation 3, summed over heads.
        length = tokens.value.to(tokens.class_attention.dtype).norm(dim=-1)
        significance = (tokens.class_attention * length).sum(1) * (tokens.size > 0)
        return kept_where(sample(deciding(significance), keep, self.published))


def sample(
    significance: Float[Tensor, "batch tokens"], num: int, published: bool = False
) -> Bool[Tensor, "batch tokens"]:
    """Inverse transform sampling at `num` fixed points; returns which tokens are drawn at least
    once.

    The points are 1/2K, 3/2K, ..., (2K-1)/2K (section 3.2). Each draws the token whose entry in
    the cumulative sum of the normalised significance is nearest to it; of equals, the lowest index.

    Args:
        significance: at least 0. If it is 0 for all tokens of a sample, the first one is drawn. Of
            a sample with NaN or infinity, some token or other is.
        num: how many points, at least 1.
        published: take the points for `num` + 1 and leave out the last one, as the published code
            does: 1/2(K+1), ..., (2K-1)/2(K+1). So the tokens at the end of an image are drawn less.
    """
    # float64: after a few hundred additions in float32 nearby points would change places.
    share = significance.double()
    total = share.sum(-1, keepdim=True)
    cumulative = (share / torch.where(total > 0, total, 1)).cumsum(-1)
    points = torch.arange(1, 2 * num, 2, device=share.device, dtype=share.dtype)
    points = points / (2 * (num + 1 if published else num))
    points = points.expand(share.shape[0], num).contiguous()
    above = torch.searchsorted(cumulative, points).clamp(max=share.shape[1] - 1)
    below = (above - 1).clamp(min=0)
    to_above = (cumulative.gather(1, above) - points).abs()
    to_below = (cumulative.gather(1, below) - points).abs()
    nearest = torch.where(to_below <= to_above, below, above)
    # A token without significance has the same entry as the token before it; the first is drawn.
    # (NaN would come behind the last entry.)
    drawn = torch.searchsorted(cumulative, cumulative.gather(1, nearest))
    drawn = drawn.clamp(max=share.shape[1] - 1)
    chosen = torch.zeros_like(share, dtype=torch.bool)
    return chosen.scatter(1, drawn, True)
