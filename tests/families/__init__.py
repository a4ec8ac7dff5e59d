"""Small models of the real classes, with random weights: what tests/test_hosts.py is run on.

One file per patch; each defines `SMALL`, from names to `Small`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def answer(outputs: Any) -> Tensor:
    """What a model is asked for: its logits, pooled features or tokens."""
    if isinstance(outputs, Tensor):
        return outputs
    for name in ("logits", "pooler_output", "last_hidden_state"):
        found = getattr(outputs, name, None)
        if found is not None:
            return found
    return outputs[0]


def hidden_states(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The features behind every block of a model of transformers, [batch, sequence, dim]."""
    return list(model(**inputs, output_hidden_states=True).hidden_states[1:])


@dataclass(frozen=True)
class Small:
    """How to make one, and what is special about it.

    Attributes:
        build: makes the model: 4 blocks or more, in evaluation mode, on a grid of 16 patches or
            more. It is called behind `torch.manual_seed`.
        inputs: makes random inputs for a batch of the given size, as a tensor or by name.
        twins: inputs (batch 2) in which every patch shows one of two pictures, and the model with
            positions made blank, in place: then merging equal patches loses nothing. None if
            equal patches cannot be had.
        features: what the model hands out between its blocks, in order, one [batch, sequence,
            dim] for every block; None if it hands out nothing.
        counted: path, in a block, of the submodule at whose input tokens are counted.
        behind: whether tokens are reduced behind that submodule, so that it sees those that left
            the block before.
        refuses: methods that are refused at `apply`, and a part of the reason.
        counts_class: whether leaving out proportional attention changes the answer (it cannot
            where nothing but merged tokens is attended to by merged tokens).
        answer: takes what is compared out of the outputs.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    twins: Callable[[nn.Module], Any] | None = None
    features: Callable[[nn.Module, Any], list[Tensor]] | None = None
    counted: str = "mlp"
    behind: bool = False
    refuses: Mapping[str, str] | None = None
    counts_class: bool = True
    answer: Callable[[Any], Tensor] = answer

    def __post_init__(self) -> None:
        object.__setattr__(self, "build", if_it_exists(self.build))


def if_it_exists(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """With the oldest versions of the libraries, skips tests whose model they do not have yet."""
    if os.environ.get("TOKRED_VERSIONS") != "oldest":
        return build

    @wraps(build)
    def made(*args: Any, **options: Any) -> nn.Module:
        try:
            return build(*args, **options)
        except (TypeError, RuntimeError) as error:
            if not any(said in str(error) for said in ("unexpected keyword", "Unknown model")):
                raise
            pytest.skip(f"this version of its library has no such model: {error}")

    return made


def visible(model: nn.Module) -> nn.Module:
    """Draws every parameter and buffer of floating point away from defaults such as 0, 1 and 1e-5,
    so that a patch that drops or doubles one cannot hide; in evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or name.endswith(("gamma", "lambda1", "lambda_1", "lambda_2")):
                parameter.uniform_(0.1, 0.5) if "bias" not in name else parameter.normal_(std=0.1)
            elif parameter.abs().max() == 0 or name.endswith(("token", "tokens")):
                parameter.normal_(std=0.5)
    return model.eval()


def two_pictures(size: tuple[int, int], patch: tuple[int, int], channels: int = 3) -> Tensor:
    """[2, channels, *size] whose patches show one of two pictures, a third of them the first."""
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    first, second = torch.randn(2, 2, channels, *patch).unbind()
    across = torch.arange(size[1]) < max(1, columns // 3) * patch[1]
    return torch.where(
        across, first.repeat(1, 1, rows, columns), second.repeat(1, 1, rows, columns)
    )
