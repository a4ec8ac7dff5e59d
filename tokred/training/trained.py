"""The model that is trained, with its gates; and the dense model that teaches it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokred.data.inputs import call
from tokred.engine.layout import Layout
from tokred.host import blocks_of, find_host
from tokred.patching import remove
from tokred.training.recipe import Recipe


class Trained(nn.Module):
    """A model and its gates as one module. So DistributedDataParallel, which wraps it, sees the
    parameters of both, and everything that losses need comes out of one forward.

    Args:
        model: the model.
        reduction: what is applied to it.
        frozen: whether gates alone are trained.
        blocks: the model's blocks; needed if it is frozen.
        last: sees the tokens behind the last block, if a loss needs them.
    """

    def __init__(
        self,
        model: nn.Module,
        reduction: Any,
        frozen: bool = False,
        blocks: Sequence[nn.Module] = (),
        last: LastTokens | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.gates: nn.Module | None = getattr(reduction, "gates", None)
        self.reduction = reduction
        self.frozen = frozen
        self.last = last
        self._blocks = tuple(blocks)  # of the model; a tuple does not register them again

    def forward(self, inputs: Any) -> tuple[Any, dict[int, Tensor], Tensor | None]:
        """The outputs of the model, the decisions of its gates, and the patch tokens behind its
        last block, if a loss needs them."""
        outputs = call(self.model, inputs)
        decisions = {} if self.gates is None else dict(self.reduction.decisions)
        return outputs, decisions, None if self.last is None else self.last.taken()

    def train(self, mode: bool = True) -> Trained:
        """In training, a frozen model is in evaluation mode (no dropout, no new statistics), except
        for the blocks themselves: their mode decides whether tokens are masked or left out."""
        super().train(mode)
        if mode and self.frozen:
            self.model.eval()
            for block in self._blocks:
                block.training = True
        return self


@contextmanager
def prepared(model: nn.Module, reduction: Any, recipe: Recipe) -> Iterator[Trained]:
    """Makes a model ready for training. Afterwards everything except its weights is as before."""
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    gates = getattr(reduction, "gates", None)
    of_gates = gates.training if gates is not None else False
    blocks: Sequence[nn.Module] = ()
    last = None
    try:
        if recipe.frozen:
            model.requires_grad_(False)
            host, tower = find_host(model)
            blocks = blocks_of(host, tower)
        if recipe.distill:
            last = LastTokens(model, reduction.layout)
        yield Trained(model, reduction, recipe.frozen, blocks, last)
    finally:
        if last is not None:
            last.handle.remove()
        for name, p in model.named_parameters():
            p.requires_grad_(wanted[name])
            p.grad = None
        for module, mode in modes.items():
            module.training = mode
        if gates is not None:
            gates.train(of_gates)
            for p in gates.parameters():
                p.grad = None


class LastTokens:
    """Keeps the patch tokens that leave the last block of a model."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        host, tower = find_host(model)
        self.layout = layout
        self.seen: list[Tensor] = []
        self.handle = host.blocks(tower)[-1].register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen = [output[0] if isinstance(output, tuple) else output]

    def taken(self) -> Float[Tensor, "batch tokens dim"]:
        """The tokens of the last pass, which are then forgotten.

        Raises:
            ValueError: the block does not put out a sequence of tokens.
        """
        (x,), self.seen = self.seen, []
        if x.ndim != 3:
            raise ValueError(
                f"distill compares tokens [batch, tokens, dim]; blocks of this model put out "
                f"{x.ndim} axes: set distill to 0"
            )
        return x[:, self.layout.prefix : x.shape[1] - self.layout.suffix]


class Teacher:
    """The dense model as it was before the training.

    Args:
        model: the model.
        last: sees the tokens behind its last block, if a loss needs them.
    """

    def __init__(self, model: nn.Module, last: LastTokens | None) -> None:
        self.model, self.last = model, last

    def to(self, device: torch.device) -> None:
        """Moves the model to a device."""
        self.model.to(device)

    def __call__(self, inputs: Any) -> tuple[Any, Tensor | None]:
        outputs = call(self.model, inputs)
        return outputs, None if self.last is None else self.last.taken()


def teacher_of(model: nn.Module, reduction: Any, recipe: Recipe) -> Teacher:
    """A copy of the model without reduction, which is not trained."""
    dense = copy.deepcopy(model)
    remove(dense)
    dense.eval().requires_grad_(False)
    return Teacher(dense, LastTokens(dense, reduction.layout) if recipe.distill else None)
