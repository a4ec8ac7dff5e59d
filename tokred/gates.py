"""What learned methods have in common: decisions that gradients can pass, and files of weights.

The modules that decide (SViT's gates, DynamicViT's predictors) are one `nn.ModuleDict` per model,
with the layer's number as the key. They hang on the `Reduction`, not on the model, whose state dict
stays what it was.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokred.optional import require

Gates = str | Path | nn.ModuleDict
"""Where the weights of a learned method come from: a file, or the modules themselves."""


class Numbered(nn.ModuleDict):
    """Modules of a learned method that are numbered one by one, rather than by layer, as in files
    of others."""

    def at(self, layers: Sequence[int]) -> nn.ModuleDict:
        """The same, by the layers that are to have one: in their order, from 0 on; or by number, if
        the numbers are those of the layers. (Itself, if they are neither.)"""
        numbers = sorted(int(number) for number in self)
        if numbers not in (list(range(len(layers))), sorted(layers)):
            return self
        pairs = zip(numbers, sorted(layers), strict=True)
        return nn.ModuleDict({str(layer): self[str(number)] for number, layer in pairs})


TINY = 1e-30
"""The weight of a pruned key in `log_mask`, in place of 0."""


def straight_through(
    logits: Float[Tensor, "batch tokens 2"],
    noise: Float[Tensor, "batch tokens 2"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "batch tokens"]:
    """Which tokens are kept, 1 or 0, with the gradient of a softmax: straight-through
    Gumbel-softmax (Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017,
    section 2.2).

    Args:
        logits: channel 0 for keeping a token, channel 1 against it.
        noise: Gumbel noise, see `gumbel`. Without it, the larger logit decides; if both are equal,
            the token is not kept.
        temperature: of the softmax whose gradient is taken.
    """
    if noise is not None:
        logits = logits + noise
    hard = (logits[..., 0] > logits[..., 1]).to(logits.dtype)
    soft = (logits / temperature).softmax(-1)[..., 0]
    return hard + (soft - soft.detach())


def gumbel(
    like: Float[Tensor, "*shape"], generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Standard Gumbel noise of the shape, dtype and device of a tensor: -log(-log(u)).

    Args:
        like: the tensor.
        generator: on the same device; without one, the global random stream is drawn from, as
            dropout does.
    """
    exponential = torch.empty_like(like).exponential_(generator=generator)
    return -exponential.clamp_min(torch.finfo(like.dtype).tiny).log()


def log_mask(mask: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """What to add to the logits of attention so that pruned keys get no weight, differentiably.

    Softmax then weighs key j by m_j exp(a_j) / sum_k m_k exp(a_k) (Rao et al., DynamicViT, NeurIPS
    2021, equation 11). With m exactly 0, no gradient would say whether a pruned token had been
    useful. So 1e-30 takes its place: in the sum it is lost in rounding, and the gradient is right.

    This gradient has no bound: where the attention logit of a pruned key is much higher than those
    of the kept keys, it would outweigh every other loss. So the gradient of a pruned key is clipped
    to the largest gradient among the image's kept keys.
    """
    logarithm: Tensor = _LogMask.apply(mask)
    return logarithm


class _LogMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return (mask + TINY).log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        kept = mask > 0
        grad = grad / (mask + TINY)
        most = grad.abs().masked_fill(~kept, 0).amax(-1, keepdim=True)
        return torch.where(kept, grad, grad.clamp(-most, most))


def width_of(block: nn.Module) -> int | None:
    """The dimension of the tokens of a block: what its first linear layer takes."""
    linear = (module for module in block.modules() if isinstance(module, nn.Linear))
    first = next(linear, None)
    return None if first is None else first.in_features


def write(
    path: str | Path, gates: nn.ModuleDict, method: str, shares: Sequence[float], width: int
) -> None:
    """Writes the weights of a learned method, and what they are for, as safetensors.

    Args:
        path: the file.
        gates: the modules.
        method: the short name of the method.
        shares: for every layer, the share of the tokens that the gates were trained to keep.
        width: the dimension of the tokens.
    """
    save_file = require("safetensors.torch", "train").save_file
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in gates.state_dict().items()
    }
    about = {"method": method, "shares": json.dumps(list(shares)), "width": str(width)}
    save_file(tensors, path, metadata=about)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a file that `write` has written, and what they are for: "method", "shares"
    and "width". Of other files, the weights alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"gates must be a file of weights: there is none at {path}")
    if path.suffix in (".pth", ".pt", ".bin"):
        return _pickled(path), {}
    require("safetensors", "train")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"gates: {path} is not a safetensors file ({error})") from error
    if not {"method", "shares", "width"} <= about.keys():
        return tensors, {}
    about["shares"] = tuple(json.loads(about["shares"]))
    about["width"] = int(about["width"])
    return tensors, about


def _pickled(path: Path) -> dict[str, Tensor]:
    """The weights in a file that torch has written, at the top or under "model" or "state_dict". Of
    it nothing but tensors and plain values is read."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of the training script
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"gates: {path} cannot be read as weights ({error})") from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise ValueError(f"gates: {path} holds no weights, but {type(content).__name__}")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def fill(
    gates: nn.ModuleDict,
    tensors: Mapping[str, Tensor],
    where: str,
) -> None:
    """Copies weights into the modules of a learned method, all or nothing.

    Args:
        gates: the modules.
        tensors: their weights, by name.
        where: the name of their source, for error messages.

    Raises:
        ValueError: they are for other layers or another width, or are not finite.
    """
    own = gates.state_dict()
    layers = sorted({int(name.split(".")[0]) for name in tensors})
    expected = sorted(int(layer) for layer in gates)
    if layers != expected:
        raise ValueError(
            f"{where} is for the layers {layers}, but {expected} of this model are to have gates"
        )
    if tensors.keys() != own.keys():
        odd = sorted(tensors.keys() ^ own.keys())
        raise ValueError(f"{where} does not fit: {', '.join(odd[:4])} and so on differ in name")
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{where}: {name} has the shape {tuple(value.shape)}, but this model needs "
                f"{tuple(own[name].shape)}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"{where}: {name} has values that are not finite (NaN or infinity)")
    gates.load_state_dict(dict(tensors))
