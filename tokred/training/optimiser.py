"""Learning rates and weight decay of all parameters."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from tokred.training.recipe import Recipe
from tokred.training.trained import Trained


def groups(trained: Trained, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameters that are trained, in groups by learning rate and weight decay.

    Raises:
        ValueError: no parameter is trained.
    """
    spared: Any = getattr(trained.model, "no_weight_decay", set)()
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for part, lr in ((trained.model, recipe.lr), (trained.gates, recipe.gate_lr)):
        for name, p in [] if part is None else part.named_parameters():
            if p.requires_grad:
                decayed = p.ndim > 1 and not (part is trained.model and name in spared)
                key = (lr, recipe.weight_decay if decayed else 0.0)
                found.setdefault(key, []).append(p)
    if not found:
        raise ValueError("nothing is to be trained: no parameter of the model requires a gradient")
    return [
        {"params": params, "lr": lr, "peak": lr, "weight_decay": decay}
        for (lr, decay), params in found.items()
    ]


def factor_at(step: int, total: int, warmup: float) -> float:
    """The factor of the learning rate at a step, counted from 0: it rises in a line, then falls as
    a cosine."""
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1)))
