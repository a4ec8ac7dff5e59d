"""SViT: learned gates choose, for every image and in every layer anew, which tokens go through it.

Liu et al., "Revisiting Token Pruning for Object Detection and Instance Segmentation", WACV 2024,
https://arxiv.org/abs/2306.07050, section 4. Differs from the published code in that inference is
deterministic (there, it samples as in training), that tokens are really left out of the computation
for any number of heads and tokens, and that no class token is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokred.gates import Gates
from tokred.maps import Kept, kept_where, ranked
from tokred.reducers.protocol import Tokens
from tokred.reducers.registry import register


@register("svit")
@dataclass(frozen=True)
class SViT:
    """Lets a learned gate choose the tokens that go through a block; the others stay as they are.

    A later gate may choose them again. How many tokens go through differs between images; the keep
    rate is what gates are trained to keep on average. Dense outputs stay whole. Prefix tokens go
    through every block.

    Args:
        gates: a file that `Reduction.save` or `tokred train` has written, or the gates themselves
            (`Reduction.gates`). Without any they start at random, to be trained.
        reactivate: whether a token that was left out once may be chosen again (table 3 of the
            paper). If not, the mask of a gate is multiplied by the masks before it.
        preserve: whether tokens that are left out stay in the feature map. If not, they are dropped
            for good, as pruners drop them; heads that pool tokens do not see them.
        fixed: choose in every image exactly the number of tokens that the schedule asks for, those
            with the highest odds. Such models can be compiled.
    """

    gates: Gates | None = field(default=None, repr=False)
    reactivate: bool = True
    preserve: bool = True
    fixed: bool = False

    needs: ClassVar[frozenset[str]] = frozenset()
    learned: ClassVar[str] = "svit"
    proportional: ClassVar[bool] = False
    bibtex: ClassVar[str] = """@inproceedings{liu2024svit,
  title     = {Revisiting Token Pruning for Object Detection and Instance Segmentation},
  author    = {Liu, Yifei and Gehrig, Mathias and Messikommer, Nico and Cannici, Marco and
               Scaramuzza, Davide},
  booktitle = {IEEE/CVF Winter Conference on Applications of Computer Vision},
  year      = {2024}
}"""

    def __post_init__(self) -> None:
        if self.reactivate and not self.preserve:
            raise ValueError(
                "reactivate must be False where preserve is: a token that was dropped cannot be "
                "chosen again"
            )

    @property
    def place(self) -> str:
        """Around the block, if what is left out stays; before it, if that is dropped."""
        return "around" if self.preserve else "before"

    @property
    def varies(self) -> bool:
        """Whether images end with different numbers of tokens."""
        return not self.fixed

    @property
    def prunes(self) -> bool:
        """Whether tokens are dropped."""
        return not self.preserve

    @property
    def remembers(self) -> bool:
        """Whether what one gate left out stays out."""
        return not self.reactivate

    def layers(self, shares: Sequence[float]) -> list[int]:
        """The layers that have gates: all that run on fewer than all tokens."""
        return [layer for layer, share in enumerate(shares) if share < 1]

    def gate(self, width: int, odds: float) -> Gate:
        """A random gate for tokens of this width, which keeps about `odds` tokens for each one that
        it leaves out."""
        return Gate(width, odds)

    def score(self, tokens: Tokens) -> Float[Tensor, "batch tokens 2"]:
        """The log-probabilities of keeping each token, and of leaving it out."""
        assert tokens.gate is not None
        scores: Tensor = tokens.gate(tokens.x)
        return scores

    def __call__(self, tokens: Tokens, keep: int) -> Kept:
        return kept(self.score(tokens), tokens, keep if self.fixed else None)


class Gate(nn.Module):
    """LayerNorm, and an MLP with two outputs (section 4.1).

    It computes in the dtype of its weights, not in that of the tokens, so that a model in half
    precision decides as it does in float32, except where rounding of the tokens decides.
    """

    def __init__(self, width: int, odds: float = 1.0) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.fc1 = nn.Linear(width, max(1, width // 4))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(max(1, width // 4), 2)
        start_at(self.fc2, odds)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens 2"]:
        """log-softmax over (keep, leave out)."""
        x = x.to(self.fc1.weight.dtype)
        scores: Tensor = self.fc2(self.act(self.fc1(self.norm(x))))
        return scores.log_softmax(-1)

    def favour(self, more: float) -> None:
        """Raises the logit for keeping a token by `more`, relative to the other logit."""
        with torch.no_grad():
            self.fc2.bias.add_(torch.tensor([more / 2, -more / 2]).to(self.fc2.bias))


def start_at(last: nn.Linear, odds: float) -> None:
    """Sets the bias of a random gate so that it begins near these odds of keeping a token."""
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.5, -0.5]) * torch.tensor(odds).log())


def kept(
    scores: Float[Tensor, "batch tokens 2"], tokens: Tokens, number: int | None = None
) -> Kept:
    """The tokens that are chosen, of those that are still there.

    Args:
        scores: the log-probabilities for and against each token.
        tokens: the tokens.
        number: choose this many, those with the highest odds (of equals, the lower index). If not
            given, choose the tokens that are more likely to be kept than not.

    Tokens whose scores are NaN are chosen first: what is not a number must not vanish.
    """
    there = tokens.size > 0
    if tokens.kept is not None:
        there = there & (tokens.kept > 0)
    if number is not None:
        odds = (scores[..., 0] - scores[..., 1]).masked_fill(~there, -torch.inf)
        return Kept(ranked(odds)[:, :number].sort(-1).values, odds.shape[1])
    return kept_where(~(scores[..., 0] <= scores[..., 1]) & there)
