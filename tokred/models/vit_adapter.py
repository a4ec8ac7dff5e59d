"""ViT-Adapter: a plain vision transformer that hands out a pyramid, for dense prediction.

Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023,
https://arxiv.org/abs/2205.08534, section 3. Attention between the two branches is that of Zhu et
al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021,
https://arxiv.org/abs/2010.04159, section 4.1, in plain torch.

The transformer keeps its own blocks, with global attention. `tokred.apply` finds them: then each
group of blocks runs on fewer tokens, and every injector and extractor still gets the full grid.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokred.optional import require

Grid = tuple[int, int]
"""Height and width."""


class ViTAdapter(nn.Module):
    """Four maps at strides 4, 8, 16 and 32, as wide as the transformer, from images whose sides are
    multiples of 32.

    The published adapters for ViT-T, S, B and L have 6, 6, 12 and 16 heads (the default here) and
    2.5, 5.8, 14.0 and 23.7 million parameters besides the transformer's. With a `value_ratio` of 1,
    1, 0.5 and 0.5, this one has 2.4, 5.8, 13.7 and 23.2 million.

    Maps are normalised by `nn.BatchNorm2d`. With few images per device, `nn.SyncBatchNorm` can
    replace it (`convert_sync_batchnorm`). The final norm and the head of the transformer are not
    used.

    >>> vit = timm.create_model("deit_small_patch16_224", dynamic_img_size=True)
    >>> [tuple(one.shape) for one in ViTAdapter(vit)(torch.zeros(1, 3, 64, 96))]
    [(1, 384, 16, 24), (1, 384, 8, 12), (1, 384, 4, 6), (1, 384, 2, 3)]

    Args:
        vit: a timm `VisionTransformer` made with `dynamic_img_size=True`. It becomes a part of the
            adapter. If its patches are not 16 pixels wide, images are resized for it, so that its
            grid has a stride of 16 all the same.
        interactions: N, the number of groups of blocks. Each group has an injector before it and an
            extractor after it; the number of blocks must be a multiple of N.
        extra_extractors: the number of further extractors after the last one.
        heads: heads of the attention between the branches; as published if not given.
        points: the number of points that each head looks at in every map.
        value_ratio: width of the values in that attention, relative to the transformer's width.
        hidden_ratio: width inside the extractors' feed-forward networks, relative to the same.
        stem_width: channels of the convolutional stem.
        in_channels: channels of the images.

    Raises:
        TypeError: `vit` is no `VisionTransformer` of timm.
        ValueError: it takes images of one size only or drops patches; or an option is out of range.
    """

    def __init__(
        self,
        vit: nn.Module,
        interactions: int = 4,
        *,
        extra_extractors: int = 2,
        heads: int | None = None,
        points: int = 4,
        value_ratio: float = 1.0,
        hidden_ratio: float = 0.25,
        stem_width: int = 64,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        # First, so that its patch embedding is what a reduction reads the grid from.
        self.vit = _checked(vit)
        self.width = int(self.vit.embed_dim)
        blocks = len(self.vit.blocks)
        if interactions < 1 or blocks % interactions:
            raise ValueError(
                f"interactions must be a divisor of the number of blocks, {blocks}, not "
                f"{interactions}"
            )
        if extra_extractors < 0:
            raise ValueError(f"extra_extractors must be at least 0, not {extra_extractors}")
        attention = (max(6, self.width // 64) if heads is None else heads, points, value_ratio)

        self.prior = SpatialPrior(self.width, stem_width, in_channels)
        self.level_embed = nn.Parameter(torch.empty(3, self.width))
        self.injectors = nn.ModuleList(
            Injector(self.width, *attention) for _ in range(interactions)
        )
        self.extractors = nn.ModuleList(
            Extractor(self.width, *attention, hidden_ratio)
            for _ in range(interactions + extra_extractors)
        )
        self.finer = nn.ConvTranspose2d(self.width, self.width, 2, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(self.width) for _ in range(4))

        nn.init.normal_(self.level_embed)
        for part in (self.prior, self.injectors, self.extractors, self.finer):
            part.apply(_draw)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pyramid: four maps [batch, dim, height/s, width/s], s = 4, 8, 16, 32.

        Raises:
            ValueError: height or width is not a multiple of 32.
        """
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(
                f"height and width must be multiples of 32, not {height} and {width}; pad the "
                "images"
            )
        quarter, *maps = self.prior(images)
        spatial = torch.cat(
            [_tokens(one) + level for one, level in zip(maps, self.level_embed, strict=True)], 1
        )
        grid = (height // 16, width // 16)
        x, spatial = self.interact(self._embed(images, grid), spatial, grid)

        grids = _levels(grid)
        parts = spatial.split([h * w for h, w in grids], 1)
        eighth, sixteenth, thirty_second = map(_map, parts, grids)
        seen = _map(x, grid)

        def finished(norm: nn.Module, one: Tensor) -> Tensor:
            size = one.shape[-2:]
            resized = F.interpolate(seen, size, mode="bilinear", align_corners=False)
            normed: Tensor = norm(one + resized)
            return normed

        return (
            finished(self.norms[0], quarter + self.finer(eighth)),
            finished(self.norms[1], eighth),
            finished(self.norms[2], sixteenth),
            finished(self.norms[3], thirty_second),
        )

    def interact(
        self,
        x: Float[Tensor, "batch tokens dim"],
        spatial: Float[Tensor, "batch spatial dim"],
        grid: Grid,
    ) -> tuple[Float[Tensor, "batch patches dim"], Float[Tensor, "batch spatial dim"]]:
        """Both branches, from beginning to end (figure 4 of the paper).

        Args:
            x: the transformer's tokens, embedded: prefix tokens and h * w patch tokens.
            spatial: the prior's three maps, end to end.
            grid: (h, w) of the patch tokens.

        Returns:
            The patch tokens and the spatial features.
        """
        prefix, grids = int(self.vit.num_prefix_tokens), _levels(grid)
        patches_at, spatial_at = centres([grid], x.device), centres(grids, x.device)
        blocks = list(self.vit.blocks)
        interactions = len(self.injectors)
        size = len(blocks) // interactions
        for number, (injector, extractor) in enumerate(
            zip(self.injectors, self.extractors[:interactions], strict=True)
        ):
            patches = injector(x[:, prefix:], patches_at, spatial, grids)
            x = torch.cat([x[:, :prefix], patches], 1)
            for block in blocks[number * size : (number + 1) * size]:
                if self.vit.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            spatial = extractor(spatial, spatial_at, x[:, prefix:], grids)
        for extractor in self.extractors[interactions:]:
            spatial = extractor(spatial, spatial_at, x[:, prefix:], grids)
        return x[:, prefix:], spatial

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks compute their activations again in the backward pass, to save memory."""
        self.vit.set_grad_checkpointing(enable)

    def _embed(
        self, images: Float[Tensor, "batch channels height width"], grid: Grid
    ) -> Float[Tensor, "batch tokens dim"]:
        """The transformer's tokens in front of its first block, on a grid of stride 16."""
        rows, columns = self.vit.patch_embed.feat_ratio(as_scalar=False)
        size = (grid[0] * rows, grid[1] * columns)
        if size != images.shape[-2:]:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        x: Tensor = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))
        return x


class SpatialPrior(nn.Module):
    """A convolutional stem, as in ResNet, and its maps at strides 4, 8, 16 and 32, projected to
    the transformer's width (section 3.2, figure 4c)."""

    def __init__(self, dim: int, stem_width: int, in_channels: int) -> None:
        super().__init__()
        wide = stem_width
        self.stem = nn.Sequential(
            *_convolution(in_channels, wide, 2),
            *_convolution(wide, wide, 1),
            *_convolution(wide, wide, 1),
            nn.MaxPool2d(3, 2, 1),
        )
        # Channels double with every step, but for the last one.
        self.eighth = nn.Sequential(*_convolution(wide, 2 * wide, 2))
        self.sixteenth = nn.Sequential(*_convolution(2 * wide, 4 * wide, 2))
        self.thirty_second = nn.Sequential(*_convolution(4 * wide, 4 * wide, 2))
        widths = (wide, 2 * wide, 4 * wide, 4 * wide)
        self.projections = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """Maps [batch, dim, height/s, width/s], s = 4, 8, 16, 32."""
        maps = [self.stem(images)]
        for step in (self.eighth, self.sixteenth, self.thirty_second):
            maps.append(step(maps[-1]))
        return [project(one) for project, one in zip(self.projections, maps, strict=True)]


class Injector(nn.Module):
    """Spatial features into the transformer's tokens (equation 1): x + gamma * Attention(norm(x),
    norm(spatial)). gamma begins as 0, so that the transformer begins as it was pretrained."""

    def __init__(self, dim: int, heads: int, points: int, value_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.norm_spatial = nn.LayerNorm(dim, eps=1e-6)
        self.attention = DeformableAttention(dim, 3, heads, points, value_ratio)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(
        self,
        x: Float[Tensor, "batch patches dim"],
        at: Float[Tensor, "patches 2"],
        spatial: Float[Tensor, "batch spatial dim"],
        grids: Sequence[Grid],
    ) -> Float[Tensor, "batch patches dim"]:
        """New patch tokens.

        Args:
            x: all patch tokens.
            at: their points in the image, see `centres`.
            spatial: three maps, end to end.
            grids: the sizes of the maps.
        """
        found = self.attention(self.norm(x), at, self.norm_spatial(spatial), grids)
        new: Tensor = x + self.gamma * found
        return new


class Extractor(nn.Module):
    """The transformer's tokens into the spatial features (equations 2 and 3): spatial +
    Attention(norm(spatial), norm(x)), then a feed-forward network with a convolution."""

    def __init__(
        self, dim: int, heads: int, points: int, value_ratio: float, hidden_ratio: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6)
        self.attention = DeformableAttention(dim, 1, heads, points, value_ratio)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvolutionalMlp(dim, int(dim * hidden_ratio))

    def forward(
        self,
        spatial: Float[Tensor, "batch spatial dim"],
        at: Float[Tensor, "spatial 2"],
        x: Float[Tensor, "batch patches dim"],
        grids: Sequence[Grid],
    ) -> Float[Tensor, "batch spatial dim"]:
        """New spatial features.

        Args:
            spatial: three maps, end to end.
            at: the points of their pixels in the image, see `centres`.
            x: all patch tokens, on the second of the grids.
            grids: the sizes of the maps.
        """
        query, patches = self.norm(spatial), self.norm_patches(x)
        spatial = spatial + self.attention(query, at, patches, grids[1:2])
        new: Tensor = spatial + self.mlp(self.norm_mlp(spatial), grids)
        return new


class ConvolutionalMlp(nn.Module):
    """A feed-forward network with a depth-wise 3x3 convolution before its nonlinearity, because the
    spatial features have no position embeddings (section 3.3; Wang et al., "PVT v2", 2022)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden_ratio must leave at least 1 of {dim} channels, not {hidden}")
        self.fc1 = nn.Linear(dim, hidden)
        self.convolution = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(
        self, x: Float[Tensor, "batch spatial dim"], grids: Sequence[Grid]
    ) -> Float[Tensor, "batch spatial dim"]:
        """Several maps, end to end, each convolved on its own."""
        parts = self.fc1(x).split([h * w for h, w in grids], 1)
        maps = [self.convolution(_map(one, grid)) for one, grid in zip(parts, grids, strict=True)]
        new: Tensor = self.fc2(F.gelu(torch.cat([_tokens(one) for one in maps], 1)))
        return new


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, equation 3): each head of each query
    looks at a few points of every map, around its own place."""

    def __init__(
        self, dim: int, levels: int, heads: int, points: int, value_ratio: float = 1.0
    ) -> None:
        super().__init__()
        inner = int(dim * value_ratio)
        if heads < 1 or inner < 1 or inner % heads:
            raise ValueError(
                f"heads must be a divisor of the width of the values, {inner} ({value_ratio} of "
                f"{dim}), not {heads}"
            )
        if points < 1:
            raise ValueError(f"points must be at least 1, not {points}")
        self.shape = (heads, levels, points)
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value = nn.Linear(dim, inner)
        self.out = nn.Linear(inner, dim)

    def forward(
        self,
        query: Float[Tensor, "batch queries dim"],
        at: Float[Tensor, "queries 2"],
        value: Float[Tensor, "batch pixels dim"],
        grids: Sequence[Grid],
    ) -> Float[Tensor, "batch queries dim"]:
        """The attention's output for every query.

        Args:
            query: the queries.
            at: their points in the image (x, y), from 0 to 1.
            value: the maps, end to end.
            grids: the sizes of the maps.
        """
        heads, levels, points = self.shape
        # Points of the image in half precision would miss pixels of a large map.
        wide = torch.promote_types(query.dtype, torch.float32)
        offsets = self.offsets(query).to(wide).unflatten(-1, (heads, levels, points, 2))
        sizes = torch.tensor([(w, h) for h, w in grids], dtype=wide, device=query.device)
        locations = at.to(wide)[:, None, None, None] + offsets / sizes[:, None]
        weights = self.weights(query).to(wide).unflatten(-1, (heads, levels * points)).softmax(-1)
        found = attend(
            self.value(value).unflatten(-1, (heads, -1)),
            grids,
            locations,
            weights.unflatten(-1, (levels, points)),
        )
        new: Tensor = self.out(found.to(query.dtype))
        return new

    def reset(self) -> None:
        """The initial weights of Deformable DETR (section 4.1 and appendix A.4): all points weigh
        the same, and point k of a head is k pixels away, in a direction of this head."""
        heads, _, points = self.shape
        turn = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack([turn.cos(), turn.sin()], -1)
        # On the border of a square, so that eight heads look at the eight neighbours.
        direction = direction / direction.abs().amax(-1, keepdim=True)
        away = direction[:, None, None] * torch.arange(1, points + 1)[:, None]
        with torch.no_grad():
            self.offsets.weight.zero_()
            self.offsets.bias.view(*self.shape, 2).copy_(away)
            self.weights.weight.zero_()
            self.weights.bias.zero_()
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.out.weight)


def attend(
    value: Float[Tensor, "batch pixels heads head_dim"],
    grids: Sequence[Grid],
    locations: Float[Tensor, "batch queries heads levels points 2"],
    weights: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch queries heads_and_dim"]:
    """Deformable DETR, equation 3, between its projections: the weighted sum over levels l and
    points k of the maps' bilinear values at the given locations. Outside of a map all is zero.

    Args:
        value: the maps of all levels, end to end.
        grids: their sizes (height, width).
        locations: (x, y), from 0 (left and upper edge of the map) to 1.
        weights: the weights of the points, which add up to one over levels and points.

    Returns:
        The heads' sums side by side, at least float32: pixels are weighed in full precision.
    """
    batch, queries, heads = locations.shape[:3]
    wide = torch.promote_types(value.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=value.device)
    parts = value.to(wide).split([h * w for h, w in grids], 1)
    for level, (part, (h, w)) in enumerate(zip(parts, grids, strict=True)):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, -1, h, w)
        # grid_sample counts from -1 to 1; heads are samples of the batch to it.
        where = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1).to(wide)
        found = F.grid_sample(maps, where, "bilinear", "zeros", align_corners=False)
        share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1).to(wide)
        total = total + (found * share[:, None]).sum(-1)  # [batch * heads, head_dim, queries]
    return total.reshape(batch, -1, queries).transpose(1, 2)


def centres(grids: Sequence[Grid], device: torch.device) -> Float[Tensor, "pixels 2"]:
    """The centres of the pixels of maps (height, width): (x, y) in the image, from 0 to 1; map by
    map, row by row."""
    parts = []
    for h, w in grids:
        y = (torch.arange(h, device=device, dtype=torch.float32) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=torch.float32) + 0.5) / w
        parts.append(torch.stack([x.repeat(h), y.repeat_interleave(w)], -1))
    return torch.cat(parts)


class Backbone(nn.Module):
    """An adapter as a backbone of torchvision's detectors: five maps of the same width, by name
    (Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017)."""

    def __init__(self, adapter: ViTAdapter, out_channels: int) -> None:
        super().__init__()
        ops = require("torchvision.ops", "torchvision")
        fpn = require("torchvision.ops.feature_pyramid_network", "torchvision")
        self.out_channels = out_channels
        self.adapter = adapter
        self.fpn = ops.FeaturePyramidNetwork(
            [adapter.width] * 4, out_channels, extra_blocks=fpn.LastLevelMaxPool()
        )

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Any:
        """A dictionary of [batch, out_channels, height/s, width/s]: "0" to "3" for s = 4, 8, 16,
        32, "pool" for 64."""
        return self.fpn(OrderedDict((str(n), one) for n, one in enumerate(self.adapter(images))))


def mask_rcnn(
    adapter: ViTAdapter, num_classes: int, out_channels: int = 256, **options: Any
) -> nn.Module:
    """torchvision's Mask R-CNN (He et al., ICCV 2017) on the pyramid of an adapter.

    Args:
        adapter: the adapter, which becomes a part of the detector.
        num_classes: the number of classes, including the background.
        out_channels: width of the pyramid that the heads see.
        options: options of `torchvision.models.detection.MaskRCNN`, such as `min_size`.

    Raises:
        ModuleNotFoundError: torchvision is not installed (`pip install "tokred[torchvision]"`).
        TypeError: `adapter` is no `ViTAdapter`.
    """
    if not isinstance(adapter, ViTAdapter):
        raise TypeError(f"adapter must be a ViTAdapter, not {type(adapter).__qualname__}")
    detection = require("torchvision.models.detection", "torchvision")
    model: nn.Module = detection.MaskRCNN(Backbone(adapter, out_channels), num_classes, **options)
    return model


def _checked(vit: nn.Module) -> Any:
    """The transformer, unless it cannot be adapted: then an error."""
    timm = require("timm.models.vision_transformer", "timm")
    if not isinstance(vit, timm.VisionTransformer):
        raise TypeError(f"vit must be a VisionTransformer of timm, not {type(vit).__qualname__}")
    known: Any = vit
    if not known.dynamic_img_size:
        raise ValueError("vit takes images of one size only; create it with dynamic_img_size=True")
    if not isinstance(known.patch_drop, nn.Identity):
        raise ValueError("vit drops patches in training; create it with patch_drop_rate=0")
    return known


def _levels(grid: Grid) -> list[Grid]:
    """The sizes of the spatial features, around that of the patch tokens."""
    h, w = grid
    return [(2 * h, 2 * w), (h, w), (h // 2, w // 2)]


def _tokens(one: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch tokens dim"]:
    return one.flatten(2).transpose(1, 2)


def _map(
    tokens: Float[Tensor, "batch tokens dim"], grid: Grid
) -> Float[Tensor, "batch dim height width"]:
    found: Tensor = tokens.transpose(1, 2).unflatten(2, grid)
    return found


def _convolution(into: int, out: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(into, out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    ]


def _draw(module: nn.Module) -> None:
    """Initial weights: of a linear layer as in vision transformers, of a convolution as in
    ResNet."""
    if isinstance(module, DeformableAttention):
        module.reset()
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
