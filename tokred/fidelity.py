"""How close a model with fewer tokens stays to the model it was: no labels are needed for that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokred.denoising import Denoising
from tokred.host import Host, find_host
from tokred.inputs import Inputs, call, pixels
from tokred.patching import hang, reduction_of, remove, uncompiled


@dataclass(frozen=True)
class Fidelity:
    """What a reduced model has in common with itself before.

    Attributes:
        images: how many were compared.
        cosine: the cosine between the features that leave the last block and those of the dense
            model, mean over patch tokens and images (Liang et al. 2022, table 1).
        agreement: the share of decisions (classes of images, pixels or queries, by the largest
            score) that are the same; None if the model decides nothing.
        depth_error: the mean of |depth - dense depth| / dense depth over pixels; None if the model
            estimates no depth.
    """

    images: int
    cosine: float
    agreement: float | None
    depth_error: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"over {self.images} images: cosine of final features {self.cosine:.4f}"
        if self.agreement is not None:
            text += f", same decision {self.agreement:.2%}"
        if self.depth_error is not None:
            text += f", relative depth error {self.depth_error:.2%}"
        return text


def fidelity(
    model: nn.Module, batches: Inputs | Iterable[Inputs], host: Host | None = None
) -> Fidelity:
    """Compares a model to which a reduction is applied with the same model without it.

    Every batch runs through both, without gradients; the model is left as it was.

    Args:
        model: the model, in evaluation mode.
        batches: what the model takes: one batch, or several.
        host: the host it was applied with, if one was given to `tokred.apply`.

    Raises:
        ValueError: no reduction is applied, features come out reduced (`full_grid=False`), or
            there are no images.
    """
    model = uncompiled(model)
    reduction = reduction_of(model)
    if reduction is None:
        raise ValueError("no reduction is applied to the model; call tokred.apply first")
    if isinstance(reduction, Denoising):
        raise ValueError("a denoiser has no final features to compare: compare images (tokred fid)")
    if not reduction.full_grid:
        raise ValueError("features come out reduced: apply with full_grid=True to compare them")
    found, tower = find_host(model, host)
    layout, last = reduction.layout, found.blocks(tower)[-1]
    reduced_features: list[Tensor] = []
    sums = _Sums()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        reduced_features.append(output[0] if isinstance(output, tuple) else output)

    handle = last.register_forward_hook(keep)
    try:
        for batch in _batches(batches):
            with torch.no_grad():
                reduced_features.clear()
                reduced = decisions(call(model, batch))
                remove(model)
                try:
                    dense = decisions(call(model, batch))
                finally:
                    hang(model, found, reduction)
            ours, theirs = (
                y[:, layout.prefix : y.shape[1] - layout.suffix] if y.ndim == 3 else y.flatten(1, 2)
                for y in (_channels_last(y, found) for y in reduced_features)
            )
            sums.add(len(pixels(batch)), ours, theirs, reduced, dense)
    finally:
        handle.remove()
    return sums.result()


@dataclass(frozen=True)
class Decisions:
    """What a model has made of its images.

    Attributes:
        chosen: the class of every image, pixel or query; None if the model chooses none.
        depth: of every pixel; None if the model estimates none.
    """

    chosen: Tensor | None
    depth: Float[Tensor, "batch height width"] | None


def decisions(outputs: Any) -> Decisions:
    """What a model has decided, by what its outputs are called, or by their shape: scores are
    [batch, classes], [batch, queries, classes] or [batch, classes, height, width]. The masks of
    prompts (SAM) say of every pixel whether it is inside.
    """
    depth = _field(outputs, "predicted_depth")
    masks = _field(outputs, "masks_queries_logits")
    scores = _field(outputs, "logits")
    prompted = _field(outputs, "pred_masks")
    if prompted is not None:
        return Decisions((prompted > 0).long(), None)
    if isinstance(outputs, Tensor):
        scores = outputs
    if masks is not None:
        # The class of a pixel, as Mask2Former makes a semantic map of its queries: the last class
        # is "none".
        queries = _field(outputs, "class_queries_logits")
        assert queries is not None
        scores = torch.einsum("bqc,bqhw->bchw", queries.softmax(-1)[..., :-1], masks.sigmoid())
    if depth is not None or scores is None:
        return Decisions(None, depth)
    return Decisions(scores.argmax(1 if scores.ndim == 4 else -1), None)


class _Sums:
    """Runs up what is compared, batch by batch."""

    def __init__(self) -> None:
        self.images = 0
        self.tokens = 0
        self.cosine = 0.0
        self.chosen = 0
        self.same = 0
        self.depths = 0
        self.error = 0.0

    def add(
        self, images: int, ours: Tensor, theirs: Tensor, reduced: Decisions, dense: Decisions
    ) -> None:
        self.images += images
        cosine = F.cosine_similarity(ours.double(), theirs.double(), dim=-1)
        self.tokens += cosine.numel()
        self.cosine += float(cosine.sum())
        if reduced.chosen is not None and dense.chosen is not None:
            self.chosen += dense.chosen.numel()
            self.same += int((reduced.chosen == dense.chosen).sum())
        if reduced.depth is not None and dense.depth is not None:
            there = dense.depth > 0
            error = (reduced.depth - dense.depth).abs()[there] / dense.depth[there]
            self.depths += int(there.sum())
            self.error += float(error.double().sum())

    def result(self) -> Fidelity:
        if not self.images:
            raise ValueError("batches must hold at least one image")
        return Fidelity(
            self.images,
            self.cosine / self.tokens,
            self.same / self.chosen if self.chosen else None,
            self.error / self.depths if self.depths else None,
        )


def _channels_last(y: Tensor, host: Host) -> Tensor:
    return y.movedim(1, -1) if host.channels_first else y


def _batches(given: Inputs | Iterable[Inputs]) -> Iterable[Inputs]:
    if isinstance(given, Tensor | Mapping):
        return [given]
    return given


def _field(outputs: Any, name: str) -> Tensor | None:
    found = outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
    return found if isinstance(found, Tensor) else None
