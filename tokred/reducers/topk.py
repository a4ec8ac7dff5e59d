"""Top-K pruning by the class token's attention.

The simplest pruner, as measured by Haurum et al., "Which Tokens to Use? Investigating Token
Reduction in Vision Transformers", ICCVW 2023, https://arxiv.org/abs/2308.04657, section 3.2; the
score is that of Liang et al., "EViT", ICLR 2022, equation 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.maps import Kept, deciding, ranked
from tokred.reducers.protocol import Tokens
from tokred.reducers.registry import register


@register("topk")
@dataclass(frozen=True)
class TopK:
    """Keeps the tokens that the class token attends to most; drops the others.

    Without a class token: those that get the most attention from all tokens. Of equal scores the
    lower index wins.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"class_attention"})
    prunes: ClassVar[bool] = True
    bibtex: ClassVar[str] = """@inproceedings{haurum2023tokens,
  title     = {Which Tokens to Use? Investigating Token Reduction in Vision Transformers},
  author    = {Haurum, Joakim Bruslund and Escalera, Sergio and Taylor, Graham W. and
               Moeslund, Thomas B.},
  booktitle = {IEEE/CVF International Conference on Computer Vision Workshops},
  year      = {2023}
}"""

    def __call__(self, tokens: Tokens, keep: int) -> Kept:
        assert tokens.class_attention is not None
        importance = deciding(tokens.class_attention.mean(1))
        order = ranked(importance)
        return Kept(order[:, :keep].sort(-1).values, tokens.x.shape[1])
