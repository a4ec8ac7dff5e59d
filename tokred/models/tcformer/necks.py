"""Multi-stage token aggregation: one pyramid from the tokens of four stages.

Zeng et al., CVPR 2022, section 3.3 (MTA), and TPAMI 2024 (CR-MTA, in which keys and values are the
clusters of the last stage); see `tokred.models.tcformer`. From the coarsest stage on, the tokens of
a stage are copied to the tokens of the next finer stage that they are clusters of, added to those,
and run through one block. Tokens become maps only at the end, so that no detail is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokred.models.tcformer.backbone import Block, TCFormer, chosen_stages, draw
from tokred.models.tcformer.tokens import ImageTokens, interpolate

REDUCTIONS = {"mta": "conv", "mta_pool": "pool", "cr_mta": "clusters"}
"""The necks by name, and how each makes few keys and values of many: by strided convolutions, by
averages (without parameters), or by the clusters of the last stage (TCFormerV2's)."""


class MTA(nn.Module):
    """One pyramid of tokens, all of one width, from the tokens of all stages.

    Args:
        widths: width of the tokens of every stage.
        out_channels: width of the pyramid.
        neck: "mta", "mta_pool" or "cr_mta", see `REDUCTIONS`.
        heads: attention heads of the blocks.
        mlp_ratio: width inside their feed-forward networks, as a multiple of the pyramid's width.
        sr_ratios: for all stages but the last, the factor by which maps are reduced, along each
            side, for keys and values. Has no effect with "cr_mta".

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 320, 512),
        out_channels: int = 256,
        neck: str = "mta",
        *,
        heads: int = 4,
        mlp_ratio: float = 4,
        sr_ratios: Sequence[int] = (8, 4, 2),
    ) -> None:
        super().__init__()
        if neck not in REDUCTIONS:
            raise ValueError(f"neck must be one of {', '.join(REDUCTIONS)}, not {neck!r}")
        if len(sr_ratios) != len(widths) - 1:
            raise ValueError(
                f"sr_ratios must be {len(widths) - 1} numbers, one for every stage but the last, "
                f"not {tuple(sr_ratios)}"
            )
        self.out_channels = out_channels
        self.grad_checkpointing = False
        # With the names that they have in checkpoints.
        self.lateral_convs = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(width, out_channels, 1)}) for width in widths
        )
        self.merge_blocks = nn.ModuleList(
            Block(out_channels, heads, mlp_ratio, sr_ratio, REDUCTIONS[neck])
            for sr_ratio in sr_ratios
        )
        self.apply(draw)

    def forward(self, stages: Sequence[ImageTokens]) -> list[ImageTokens]:
        """The pyramid, the finest level first; the layouts are those of the stages."""
        levels = []
        for lateral, stage in zip(self.lateral_convs, stages, strict=True):
            conv: Any = lateral["conv"]  # type: ignore[index]
            levels.append(replace(stage, x=F.linear(stage.x, conv.weight[..., 0, 0], conv.bias)))
        last = levels[-1].layout
        for n in reversed(range(len(levels) - 1)):
            coarser, layout = levels[n + 1], levels[n].layout
            x = levels[n].x + interpolate(coarser.x, coarser.layout, layout)
            block = self.merge_blocks[n]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, None, last, use_reentrant=False)
            else:
                x = block(x, layout, None, last)
            levels[n] = ImageTokens(x, layout)
        return levels


class Pyramid(nn.Module):
    """A TCFormer that hands out four maps, at strides 4, 8, 16 and 32.

    >>> pyramid = Pyramid(tcformerv2_small(), "cr_mta")
    >>> [tuple(one.shape) for one in pyramid(torch.zeros(1, 3, 224, 224))]
    [(1, 256, 56, 56), (1, 256, 28, 28), (1, 256, 14, 14), (1, 256, 7, 7)]

    Args:
        backbone: the TCFormer, which becomes a part of the pyramid, without its head.
        neck: see `MTA`.
        out_channels: channels of the maps.
        options: further options of `MTA`.
    """

    def __init__(
        self, backbone: TCFormer, neck: str = "mta", out_channels: int = 256, **options: Any
    ) -> None:
        super().__init__()
        if not isinstance(backbone, TCFormer):
            raise TypeError(f"backbone must be a TCFormer, not {type(backbone).__qualname__}")
        backbone.reset_classifier(0)
        widths = [one["num_chs"] for one in backbone.feature_info]
        self.backbone = backbone
        self.neck = MTA(widths, out_channels, neck, **options)
        self.out_channels = self.num_features = out_channels
        self.num_classes = 0
        self.strides = tuple(one["reduction"] for one in backbone.feature_info)
        self.feature_info = [
            {**one, "num_chs": out_channels, "module": "neck"} for one in backbone.feature_info
        ]

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four maps [batch, out_channels, rows, columns], the finest first."""
        one, two, three, four = (level.map() for level in self.stages(images))
        return one, two, three, four

    def stages(self, images: Float[Tensor, "batch channels height width"]) -> list[ImageTokens]:
        """The same as tokens."""
        found: list[ImageTokens] = self.neck(self.backbone.stages(images))
        return found

    def forward_intermediates(
        self,
        x: Float[Tensor, "batch channels height width"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Some of the maps, as timm asks for them; see `TCFormer.forward_intermediates`."""
        if output_fmt != "NCHW":
            raise ValueError(f"maps come as NCHW, not {output_fmt!r}")
        levels = self.stages(x)
        maps = [levels[n].map() for n in chosen_stages(indices, len(levels))]
        return maps if intermediates_only else (levels[-1].x, maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks compute their activations again in the backward pass, to save memory."""
        self.backbone.set_grad_checkpointing(enable)
        self.neck.grad_checkpointing = enable
