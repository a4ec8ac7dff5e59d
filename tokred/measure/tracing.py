"""`tokred.inspect`: what a forward pass does to its tokens, reduction by reduction."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tokred.data.inputs import Inputs, call, pixels
from tokred.engine.denoising import DenoiserTrace, Denoising
from tokred.engine.observing import Record
from tokred.host import Host, find_host, module_of
from tokred.maps import Clusters, TokenMap
from tokred.patching import reduction_of, uncompiled
from tokred.reducers.protocol import Reducer, traits


@dataclass(frozen=True)
class StageTrace:
    """One reduction: where it happened, and which tokens became which.

    Attributes:
        layer: the block, from 0.
        before: patch tokens before it.
        after: patch tokens after it; of the image that has the most, if images differ.
        counts: patch tokens of each image after it.
        map: how they became fewer.
        labels: the token that each cell of the full grid belongs to after this stage, [B, H, W];
            -1 where it was dropped, here or before.
        around: whether all tokens are there again behind the block.
    """

    layer: int
    before: int
    after: int
    counts: tuple[int, ...]
    map: TokenMap
    labels: Int[Tensor, "batch height width"]
    around: bool = False


@dataclass(frozen=True)
class Trace:
    """What happened to the tokens of some images.

    Attributes:
        method: the method and its options.
        grid: (height, width) of the full grid of patch tokens.
        prefix: number of prefix tokens, which no method touches.
        layers: number of blocks of the model.
        stages: the reductions, in order.
        rises: the layers before which reductions are undone, and how many tokens there are then.
    """

    method: str
    grid: tuple[int, int]
    prefix: int
    layers: int
    stages: tuple[StageTrace, ...]
    rises: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        full = self.grid[0] * self.grid[1]
        by_layer = {stage.layer: stage for stage in self.stages}
        rises = dict(self.rises)
        lines = [
            f"{self.method} on a {self.grid[0]}x{self.grid[1]} grid, {self.prefix} prefix tokens"
        ]
        lines.append("layer  patch tokens")
        count = full
        for layer in range(self.layers):
            stage, former = by_layer.get(layer), by_layer.get(layer - 1)
            note = ""
            if former and former.around:
                count = former.before
            if layer in rises:
                note = f"  {count} -> {rises[layer]} again"
                count = rises[layer]
            if stage and stage.around:
                mean = sum(stage.counts) / len(stage.counts)
                count = round(mean)
                note = f"  of {stage.before}; images have {min(stage.counts)} to {stage.after}"
            elif stage:
                count = stage.after
                note += f"  {stage.before} -> {stage.after}, {_told(stage)}"
                if stage.map.ragged:
                    mean = sum(stage.counts) / len(stage.counts)
                    note += f"; images have {min(stage.counts)} to {stage.after}, mean {mean:.1f}"
            bar = "#" * max(1, round(30 * count / full))
            lines.append(f"{layer:5d}  {count:12d}  {bar:30s}{note}".rstrip())
        return "\n".join(lines)

    def usage(self) -> Int[Tensor, "batch height width"]:
        """How many layers each cell of the full grid went through, as a token of its own or as part
        of one (SViT, figures 1 and 9)."""
        labels = self._per_layer()
        return (labels >= 0).sum(0)

    def reactivated(self) -> dict[int, float]:
        """For each reduced layer, the share of its tokens that the layer before did not work on
        (SViT, figure 5); 0 if no token comes back."""
        labels = self._per_layer() >= 0
        shares = {}
        for stage in self.stages:
            now = labels[stage.layer]
            before = labels[stage.layer - 1] if stage.layer else torch.ones_like(now)
            shares[stage.layer] = int((now & ~before).sum()) / max(1, int(now.sum()))
        return shares

    def _per_layer(self) -> Int[Tensor, "layers batch height width"]:
        """The token of each cell in each block. (A reduction between attention and MLP counts for
        the block in which it stands.)"""
        by_layer, rises = {stage.layer: stage for stage in self.stages}, dict(self.rises)
        whole = torch.arange(self.grid[0] * self.grid[1]).view(1, *self.grid)
        if self.stages:
            whole = whole.to(self.stages[0].labels.device).expand_as(self.stages[0].labels)
        layers, past = [], [whole]
        for layer in range(self.layers):
            if layer in rises:
                while len(past) > 1 and int(past[-1].max()) + 1 < rises[layer]:
                    past.pop()
            stage = by_layer.get(layer)
            if stage is None:
                layers.append(past[-1])
                continue
            layers.append(stage.labels)
            if not stage.around:
                past.append(stage.labels)
        return torch.stack(layers)


def inspect(model: Any, images: Inputs, host: Host | None = None) -> Trace | DenoiserTrace:
    """Runs the model on the images and tells what its reduction does to their tokens.

    The model is run as it is (uncompiled, without gradients); its outputs are discarded.

    Args:
        model: a model to which a reduction is applied; or a model that is or contains a TCFormer,
            which makes its tokens fewer by itself.
        images: what the model takes, on its device and in its dtype: images, or a mapping of
            inputs by name. For a denoiser (or a pipeline): latents, time step and what else it
            takes.
        host: the host it was applied with, if one was given to `tokred.apply`.

    Returns:
        What happened, layer by layer; for a denoiser, block by block.

    Raises:
        ValueError: no reduction is applied to the model, or the model shuffles its patches.
    """
    model = module_of(model)
    reduction = reduction_of(model)
    native = tcformer_in(model)
    if reduction is None and native is not None:
        return _clusters(native, pixels(images))
    if reduction is None:
        raise ValueError("model has no reduction to inspect; call tokred.apply(model, ...) first")
    if isinstance(reduction, Denoising):
        return _denoised(model, images, reduction)
    batch = pixels(images)
    height, width = batch.shape[-2:]
    found, tower = find_host(model, host)
    layout = found.layout(tower, (height, width))
    if not layout.raster:
        raise ValueError(
            f"{type(tower).__qualname__} shuffles its patches, so that what became of them cannot "
            "be laid out over an image"
        )
    with torch.no_grad(), reduction.recording() as records:
        call(uncompiled(model), images)
    return Trace(
        method=_on(reduction.reducer, batch.device),
        grid=layout.grid,
        prefix=reduction.layout.prefix,
        layers=layout.layers,
        stages=_stages(records, batch, layout.grid),
        rises=tuple((record.layer, record.after) for record in records if record.map is None),
    )


def _denoised(model: nn.Module, images: Inputs, reduction: Denoising) -> DenoiserTrace:
    """What happens to the tokens of a denoiser."""
    with torch.no_grad(), reduction.recording() as merged:
        call(uncompiled(model), images)
    method = _on(reduction.reducer, pixels(images).device)
    return DenoiserTrace(method, reduction.around.modules, tuple(merged), reduction.total)


def _stages(
    records: Sequence[Record], batch: Tensor, grid: tuple[int, int]
) -> tuple[StageTrace, ...]:
    """The reductions, with the token that each cell of the full grid belongs to after each."""
    cells = grid[0] * grid[1]
    so_far = [torch.arange(cells, device=batch.device).expand(len(batch), cells)]
    stages = []
    for record in records:
        if record.map is None:
            del so_far[len(so_far) - record.undone :]
            continue
        onward, labels = record.map.labels(), so_far[-1]
        labels = torch.where(labels >= 0, onward.gather(1, labels.clamp(min=0)), -1)
        if not record.around:
            so_far.append(labels)
        stages.append(
            StageTrace(
                layer=record.layer,
                before=record.before,
                after=record.after,
                counts=tuple((labels.max(1).values + 1).tolist()),
                map=record.map,
                labels=labels.reshape(-1, *grid),
                around=record.around,
            )
        )
    return tuple(stages)


def tcformer_in(model: nn.Module) -> Any:
    """The TCFormer that a model is or contains; None if there is none."""
    # Without the import there cannot be one.
    module = sys.modules.get("tokred.models.tcformer.backbone")
    if module is None:
        return None
    return next((one for one in model.modules() if isinstance(one, module.TCFormer)), None)


def _clusters(model: Any, images: Tensor) -> Trace:
    """The trace of a TCFormer: its cells are the full grid, and its stages are the reductions."""
    training = model.training
    try:
        with torch.no_grad():
            layouts = [stage.layout for stage in model.eval().stages(images)]
    finally:
        model.train(training)
    depths = [len(getattr(model, f"block{n + 1}")) for n in range(len(layouts))]
    stages = []
    for n in range(1, len(layouts)):
        fine, coarse = layouts[n - 1], layouts[n]
        index = coarse.cells.index.gather(1, fine.cells.representatives())
        stages.append(
            StageTrace(
                layer=sum(depths[:n]),
                before=fine.num_tokens,
                after=coarse.num_tokens,
                counts=(coarse.num_tokens,) * len(images),
                map=Clusters(index, coarse.num_tokens),
                labels=coarse.cells.index.unflatten(1, coarse.grid),
            )
        )
    parts = " ".join(f"{side}x{side}" for side in model.parts)
    method = f"{model.clustering} in {parts} parts"
    return Trace(method, layouts[0].grid, 0, sum(depths), tuple(stages))


def _on(reducer: Reducer, device: torch.device) -> str:
    """A method and its options; options that depend on the device ("auto") as they are there."""
    on = traits(reducer).on
    return str(reducer if on is None else on(device))


def _told(stage: StageTrace) -> str:
    if not stage.map.merges:
        return f"{stage.before - stage.after} dropped" + (" at least" if stage.map.ragged else "")
    flat = stage.labels.flatten(1)
    members = torch.zeros(len(flat), stage.after, dtype=torch.int64, device=flat.device)
    members = members.scatter_add(1, flat.clamp(min=0), (flat >= 0).long())
    largest = members.max(1).values.float().mean()
    return f"the largest stands for {largest:.0f} patches"
