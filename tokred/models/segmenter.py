"""Segmenter: a ViT that gives every pixel a class.

Strudel, Garcia, Laptev, Schmid, "Segmenter: Transformer for Semantic Segmentation", ICCV 2021,
https://arxiv.org/abs/2105.05633, section 3. The encoder is a timm `VisionTransformer` that is
handed in (or a `SwinTransformer`, of which the last stage is decoded); a decoder turns its patch
tokens into one score per class; the scores, on the grid of patches, are upsampled to the pixels.
`tokred.apply(segmenter, ...)` finds the encoder inside. The output of the encoder is on the full
grid, whatever was merged inside, so that nothing here depends on it.

The scores are logits, for a cross entropy. The paper has a softmax over the classes, followed by a
layer norm (section 3.2); here is only the layer norm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokred.optional import require


class Segmenter(nn.Module):
    """Encoder, decoder, upsampling.

    Args:
        encoder: a timm `VisionTransformer` or `SwinTransformer`; its own head is not used. Images
            of other sizes than the one it was made for need `dynamic_img_size=True` (Swin:
            `strict_img_size=False`).
        decoder: from patch tokens [batch, tokens, dim] to scores [batch, tokens, classes]:
            `LinearDecoder`, `MaskTransformer` or a module of one's own.

    Raises:
        TypeError: `encoder` is neither.
        ModuleNotFoundError: timm is not installed (`pip install "tokred[timm]"`).
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        vit = require("timm.models.vision_transformer", "timm").VisionTransformer
        swin = require("timm.models.swin_transformer", "timm").SwinTransformer
        if not isinstance(encoder, vit | swin):
            raise TypeError(
                "encoder must be a timm VisionTransformer or SwinTransformer, not "
                f"{type(encoder).__qualname__}"
            )
        self.encoder: Any = encoder  # its attributes are timm's
        self.decoder = decoder

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """The logits of every class at every pixel, in the dtype of the decoder's scores."""
        height, width = images.shape[-2:]
        x = self.encoder.forward_features(images)
        embed = self.encoder.patch_embed
        down, across = embed.feat_ratio(as_scalar=False)
        if x.ndim == 4:  # Swin's tokens are on a grid, which every stage but the first has halved
            rows, columns = x.shape[1:3]
            tokens = x.flatten(1, 2)
            halved = 2 ** (len(self.encoder.layers) - 1)
            down, across = down * halved, across * halved
        else:
            rows, columns = embed.dynamic_feat_size((height, width))
            tokens = x[:, self.encoder.num_prefix_tokens :]
        scores = self.decoder(tokens).transpose(1, 2).unflatten(2, (rows, columns))
        # An encoder that pads its images (`dynamic_img_pad`) pads them right and below.
        size = (rows * down, columns * across)
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        return scores[:, :, :height, :width]


class LinearDecoder(nn.Module):
    """One linear layer on every patch token (section 3.2, "Linear")."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, num_classes)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens classes"]:
        """The scores of every class at every patch."""
        scores: Tensor = self.head(tokens)
        return scores


class MaskTransformer(nn.Module):
    """Class embeddings run through a few blocks together with the patch tokens. The mask of a class
    is the similarity of each patch to its embedding (section 3.2, "Mask Transformer").

    Args:
        dim: width of the encoder's tokens.
        num_classes: how many classes.
        width: width of the decoder; `dim` if not given.
        depth: number of blocks.
        heads: attention heads of each; must divide `width`.

    Raises:
        ValueError: an option is out of range.
        ModuleNotFoundError: timm is not installed (`pip install "tokred[timm]"`).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        width: int | None = None,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        width = dim if width is None else width
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the decoder's width, {width}; {heads} does not")
        block = require("timm.models.vision_transformer", "timm").Block
        self.project = nn.Linear(dim, width)
        self.classes = nn.Parameter(0.02 * torch.randn(1, num_classes, width))
        self.blocks = nn.ModuleList(block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.patch_projection = nn.Linear(width, width, bias=False)
        self.class_projection = nn.Linear(width, width, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens classes"]:
        """The scores of every class at every patch."""
        batch, num_patches, _ = tokens.shape
        x = torch.cat([self.project(tokens), self.classes.expand(batch, -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        patches = F.normalize(self.patch_projection(x[:, :num_patches]), dim=2)
        classes = F.normalize(self.class_projection(x[:, num_patches:]), dim=2)
        masks: Tensor = self.mask_norm(patches @ classes.mT)
        return masks


def mean_iou(
    predicted: Int[Tensor, "batch height width"],
    target: Int[Tensor, "batch height width"],
    num_classes: int,
) -> float:
    """Mean intersection over union: pixels of all images together, then the mean over classes.

    The intersection of a class are the pixels where it is predicted and right, its union those
    where it is predicted or right. A class that is in neither is left out of the mean.

    Args:
        predicted: classes, as `logits.argmax(1)` gives them; any integer dtype.
        target: the right classes.
        num_classes: classes are 0 to `num_classes - 1`.

    Raises:
        ValueError: shapes differ, there are no pixels, or a class is out of range.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"predicted and target must have one shape, not {tuple(predicted.shape)} and "
            f"{tuple(target.shape)}"
        )
    if predicted.numel() == 0:
        raise ValueError(f"predicted has no pixels: its shape is {tuple(predicted.shape)}")
    for name, classes in (("predicted", predicted), ("target", target)):
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} must hold classes 0 to {num_classes - 1}, not {wrong}")
    pairs = target.flatten().long() * num_classes + predicted.flatten().long()
    confusion = pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)
    right = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - right
    there = union > 0
    return float((right[there].double() / union[there].double()).mean())
