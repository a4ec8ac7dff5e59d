"""Pruning for diversity: keep tokens that are as little alike as possible.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR
2025, https://arxiv.org/abs/2503.02175. The subset of tokens whose two most similar members are
least alike (the max-min diversity problem) is looked for greedily: first comes the token whose most
similar other token is least like it, then, one after the other, the token that is least like those
that were taken. Written from descriptions of the method, without the paper's text: what was not
checked there is the choice of the first token. Differs from the paper in that it prunes inside of a
vision transformer, not in front of a language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tokred.maps import Kept, deciding, wide
from tokred.reducers.protocol import Tokens
from tokred.reducers.registry import register

_AT_ONCE = 2**24
"""Similarities that are held at once."""


@register("divprune")
@dataclass(frozen=True)
class DivPrune:
    """Keeps tokens that are as little alike as possible; drops the others.

    Stands before the block and compares the tokens themselves, by their cosine. Looks at nothing
    that says how important a token is.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[str] = "before"
    prunes: ClassVar[bool] = True
    bibtex: ClassVar[str] = """@inproceedings{alvar2025divprune,
  title     = {{DivPrune}: Diversity-based Visual Token Pruning for Large Multimodal Models},
  author    = {Alvar, Saeed Ranjbar and Singh, Gursimran and Akbari, Mohammad and Zhang, Yong},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2025}
}"""

    def __call__(self, tokens: Tokens, keep: int) -> Kept:
        return Kept(select(tokens.x.detach(), keep), tokens.x.shape[1])


def select(x: Float[Tensor, "batch tokens dim"], num: int) -> Int[Tensor, "batch num"]:
    """The tokens that are taken of every sample, in rising order.

    Ties go to the lower index.

    Args:
        x: what tokens are compared by, in any floating-point dtype; need not be normalised. A row
            of zeros is as far from every token as an orthogonal one. A row with NaN or infinity is
            farther from every token than any other: it is taken, so that it does not vanish.
        num: how many to take, in [1, tokens].

    Raises:
        ValueError: `num` is out of range.
    """
    if not 1 <= num <= x.shape[1]:
        raise ValueError(f"num must be in [1, {x.shape[1]}] for {x.shape[1]} tokens, not {num}")
    # ONNX has no operator like ours: there, the graph holds every turn of the loop.
    chosen: Tensor = _in_parts(x, num) if torch.onnx.is_in_onnx_export() else _select(x, num)
    return chosen


# An opaque operator: a graph would hold every turn of the loop.
@torch.library.custom_op(
    "tokred::most_diverse", mutates_args=(), schema="(Tensor x, int num) -> Tensor"
)
def _select(x: Tensor, num: int) -> Tensor:
    return _in_parts(x, num)


@_select.register_fake
def _(x: Tensor, num: int) -> Tensor:
    return x.new_empty((x.shape[0], num), dtype=torch.int64)


def _in_parts(x: Float[Tensor, "batch tokens dim"], num: int) -> Int[Tensor, "batch num"]:
    unit = F.normalize(wide(x.detach()), dim=-1)
    samples = max(1, _AT_ONCE // x.shape[1] ** 2)
    return torch.cat([_greedily(part, num) for part in unit.split(samples)])


def _greedily(unit: Float[Tensor, "batch tokens dim"], num: int) -> Int[Tensor, "batch num"]:
    similarity = deciding(unit @ unit.transpose(1, 2)).nan_to_num(-2.0)
    similarity = _with_diagonal(similarity, -torch.inf)
    # The first token. (A matrix product is not always symmetric to the last bit. If two tokens are
    # each other's most similar one, they have to be equally far.)
    first = torch.maximum(similarity.amax(1), similarity.amax(2)).argmin(1)

    # So that a token that is taken is not taken again.
    similarity = _with_diagonal(similarity, torch.inf)
    sample = torch.arange(unit.shape[0], device=unit.device)
    chosen, highest = [first], similarity[sample, first]
    for _ in range(num - 1):
        chosen.append(highest.argmin(1))
        highest = torch.maximum(highest, similarity[sample, chosen[-1]])
    return torch.stack(chosen, 1).sort(1).values


def _with_diagonal(
    x: Float[Tensor, "batch tokens tokens"], value: float
) -> Float[Tensor, "batch tokens tokens"]:
    """The same with `value` on the diagonals; in place, but for ONNX, which knows no views."""
    if torch.onnx.is_in_onnx_export():
        return x.masked_fill(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), value)
    x.diagonal(dim1=1, dim2=2).fill_(value)
    return x
