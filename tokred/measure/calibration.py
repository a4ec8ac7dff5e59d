"""`tokred.calibrate`: gates that keep, on some images, the share of tokens they are meant to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokred.data.inputs import Inputs, call
from tokred.host import module_of
from tokred.patching import reduction_of, uncompiled
from tokred.reducers.svit import Gate


def calibrate(model: Any, images: Inputs) -> dict[int, float]:
    """Moves the threshold of every gate so that it keeps its target share of these images' tokens.

    What a gate prefers stays as it is; only how many tokens are good enough changes. One pass: a
    gate is set before its layer runs, so that those behind it see what they will see.

    Args:
        model: a model to which `SViT` is applied, in eval mode.
        images: what the model takes; a few dozen images say enough.

    Returns:
        For each layer, by how much the logit in favour of keeping a token was raised.

    Raises:
        ValueError: the model has no gates that decide by themselves.
    """
    model = uncompiled(module_of(model))
    reduction = reduction_of(model)
    gates = getattr(reduction, "gates", None) or {}
    if not gates or not all(isinstance(gate, Gate) for gate in gates.values()):
        raise ValueError(
            "model has no gates to calibrate: tokred.apply(model, tokred.SViT(...)) puts some in"
        )
    if model.training:
        raise ValueError("model must be in eval mode, in which gates decide: call model.eval()")
    left = _Left() if reduction.reducer.remembers else None
    sets = {layer: _Sets(target, left) for layer, target in reduction.targets.items()}
    hooks = [gates[str(layer)].register_forward_hook(one) for layer, one in sets.items()]
    try:
        with torch.no_grad():
            call(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: one.raised for layer, one in sets.items()}


@dataclass(eq=False)
class _Left:
    """Of a method that remembers: the tokens that no gate has left out so far."""

    tokens: Bool[Tensor, "batch tokens"] | None = None


@dataclass(eq=False)
class _Sets:
    """A forward hook that sets a gate by what it has put out."""

    share: float
    left: _Left | None
    raised: float = 0.0

    def __call__(
        self, gate: nn.Module, args: Any, scores: Float[Tensor, "batch tokens 2"]
    ) -> Float[Tensor, "batch tokens 2"]:
        assert isinstance(gate, Gate)
        odds = scores[..., 0] - scores[..., 1]
        choice = odds.flatten()
        if self.left is not None and self.left.tokens is not None:
            choice = odds[self.left.tokens]
        choice = choice.sort(descending=True).values
        last = min(len(choice), max(1, round(self.share * odds.numel()))) - 1
        after = min(last + 1, len(choice) - 1)
        self.raised = -float(choice[last] + choice[after]) / 2
        if after == last:  # all that are left stay
            self.raised = max(0.0, 1e-3 - float(choice[last]))
        gate.favour(self.raised)
        if self.left is not None:
            stays = odds + self.raised > 0
            former = self.left.tokens
            self.left.tokens = stays if former is None else stays & former
        return gate.forward(*args)  # without this hook
