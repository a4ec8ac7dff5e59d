"""SViT: learned gates choose, for every image and in every layer anew, which tokens go through it.

Liu et al., "Revisiting Token Pruning for Object Detection and Instance Segmentation", WACV 2024,
https://arxiv.org/abs/2306.07050, section 4. Differs from the published code in that inference is
deterministic (there, it samples as in training), that tokens are really left out of the computation
for any number of heads and tokens, and that no class token is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokred import gates as weights
from tokred.gates import Gates, Numbered
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
            (`Reduction.gates`). Or a released checkpoint, as a file or a state dict, of which the
            weights named `selective_modules.*` are read, see `released`. Without any they start at
            random, to be trained.
        reactivate: whether a token that was left out once may be chosen again (table 3 of the
            paper). If not, the mask of a gate is multiplied by the masks before it.
        preserve: whether tokens that are left out stay in the feature map. If not, they are dropped
            for good, as pruners drop them; heads that pool tokens do not see them.
        fixed: choose in every image exactly the number of tokens that the schedule asks for, those
            with the highest odds. Such models can be compiled.
    """

    gates: Gates | Mapping[str, Tensor] | None = field(default=None, repr=False)
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
        if isinstance(self.gates, Mapping) and not isinstance(self.gates, nn.Module):
            object.__setattr__(self, "gates", released(self.gates))

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


_SELECTIVE = re.compile(r"(?:.*\.)?selective_modules\.(\d+)\.(.+)\.(weight|bias)")


def released(tensors: Mapping[str, Tensor]) -> Numbered:
    """The gates of a released checkpoint, in which they are named `selective_modules.<number>.*`.

    All weights of these names must be used, and none may be missing: of each gate a LayerNorm, and
    two linear layers, told apart by their shapes, C, [C/4, C] and [2, C/4] (section 4.1). The first
    output is for keeping a token. Weights of other names are those of the model, and are left out.
    Gates that are numbered from 0 on belong to the layers with gates, in their order.

    Unlike there, prefix tokens go through every block here, whatever a gate would say of them.

    Args:
        tensors: the weights of the checkpoint, by name.

    Raises:
        ValueError: there are no such weights, or others than these.
    """
    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name, value in tensors.items():
        if "selective_modules." not in name:
            continue
        match = _SELECTIVE.fullmatch(name)
        if match is None:
            raise ValueError(f"gates: {name} is no weight of a gate")
        number, module, part = int(match[1]), match[2], match[3]
        found.setdefault(number, {}).setdefault(module, {})[part] = value
    if not found:
        first = ", ".join(list(tensors)[:3])
        raise ValueError(
            "gates must hold weights named selective_modules.<number>.*, as released checkpoints "
            f"of SViT do, and there are none among {len(tensors)}, which begin with: {first}"
        )
    return Numbered({str(number): _gate_of(number, found[number]) for number in sorted(found)})


def _gate_of(number: int, modules: Mapping[str, Mapping[str, Tensor]]) -> Gate:
    """One gate, of its weights by module."""
    shapes = {name: tuple(parts["weight"].shape) for name, parts in modules.items()
              if "weight" in parts}  # fmt: skip
    width = next((shape[0] for shape in shapes.values() if len(shape) == 1), 0)
    inside = max(1, width // 4)
    wanted = {"norm": (width,), "fc1": (inside, width), "fc2": (2, inside)}
    named = {
        f"{role}.{part}": value.float()
        for role, shape in wanted.items()
        for name, parts in modules.items()
        if shapes.get(name) == shape
        for part, value in parts.items()
    }
    gate = Gate(width) if width else None
    fits = gate is not None and named.keys() == gate.state_dict().keys()
    if gate is None or not fits or len(modules) != len(wanted):
        there = {f"{name}.{part}": list(value.shape)
                 for name, parts in modules.items() for part, value in parts.items()}  # fmt: skip
        raise ValueError(
            f"gates: selective_modules.{number} is no LayerNorm of C, with linear layers of C to "
            f"C/4 and of C/4 to 2 behind it; it holds {there}"
        )
    weights.fill(nn.ModuleDict({str(number): gate}),
                 {f"{number}.{name}": value for name, value in named.items()},
                 "gates")  # fmt: skip
    return gate


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

    Tokens whose scores are not finite are chosen first: what is not a number must not vanish. (A
    token with infinity has NaN or infinity as its score, as the norm in front of a gate has it.)
    """
    lost = ~scores.isfinite().all(-1)
    there = tokens.size > 0
    if tokens.kept is not None:
        there = there & (tokens.kept > 0)
    if number is not None:
        odds = (scores[..., 0] - scores[..., 1]).masked_fill(lost, torch.nan)
        odds = odds.masked_fill(~there, -torch.inf)
        return Kept(ranked(odds)[:, :number].sort(-1).values, odds.shape[1])
    return kept_where((lost | (scores[..., 0] > scores[..., 1])) & there)
