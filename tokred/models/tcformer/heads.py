"""Heads for what TCFormers are used for: poses, face landmarks, body meshes, segmentation.

The finest map of a pyramid becomes heatmaps (Zeng et al., CVPR 2022, section 4: whole-body pose and
face alignment); the mean token of the last stage becomes coordinates (Li et al., "Human Pose
Regression with Residual Log-likelihood Estimation", ICCV 2021, https://arxiv.org/abs/2107.11291) or
the parameters of a body model (Kanazawa et al., "End-to-end Recovery of Human Shape and Pose", CVPR
2018, https://arxiv.org/abs/1712.06584); all four maps become a segmentation (Kirillov et al.,
"Panoptic Feature Pyramid Networks", CVPR 2019, https://arxiv.org/abs/1901.02446).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokred.models.tcformer.backbone import TCFormer
from tokred.models.tcformer.necks import Pyramid


class HeatmapHead(nn.Module):
    """A heatmap for every keypoint: a 1x1 convolution of the finest map."""

    def __init__(self, in_channels: int, num_keypoints: int) -> None:
        super().__init__()
        self.final_layer = nn.Conv2d(in_channels, num_keypoints, 1)
        nn.init.normal_(self.final_layer.weight, std=0.001)
        if self.final_layer.bias is not None:
            nn.init.zeros_(self.final_layer.bias)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "batch keypoints rows columns"]:
        """The heatmaps, a quarter as high and wide as the images."""
        found: Tensor = self.final_layer(maps[0])
        return found


class PoseEstimator(Pyramid):
    """A pyramid and a `HeatmapHead`, with the names of the published whole-body checkpoints.

    Args:
        backbone: see `Pyramid`.
        num_keypoints: the number of keypoints, such as 133 for COCO-WholeBody.
        neck: see `MTA`.
        out_channels: width of the pyramid.
        options: further options of `MTA`.
    """

    def __init__(
        self,
        backbone: TCFormer,
        num_keypoints: int,
        neck: str = "mta",
        out_channels: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(backbone, neck, out_channels, **options)
        self.keypoint_head = HeatmapHead(out_channels, num_keypoints)

    def forward(  # type: ignore[override]
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch keypoints rows columns"]:
        """The heatmaps, a quarter as high and wide as the images."""
        found: Tensor = self.keypoint_head(super().forward(images))
        return found


def draw_heatmaps(
    keypoints: Float[Tensor, "batch keypoints 2"],
    size: tuple[int, int],
    sigma: float = 2.0,
    stride: int = 4,
) -> Float[Tensor, "batch keypoints rows columns"]:
    """Targets for heatmaps: Gaussians of height 1.

    Args:
        keypoints: (x, y) in pixels of the image.
        size: rows and columns of the heatmaps.
        sigma: standard deviation of the Gaussians, in pixels of the heatmaps.
        stride: pixels of the image per pixel of the heatmaps.
    """
    squared = torch.zeros((), device=keypoints.device)
    for axis, length in ((0, size[1]), (1, size[0])):
        # Pixel i of a heatmap is the middle of as many pixels of the image as its stride.
        pixel = torch.arange(length, device=keypoints.device, dtype=keypoints.dtype)
        away = pixel - ((keypoints[..., axis, None] + 0.5) / stride - 0.5)
        squared = squared + (away**2)[..., None, :] if axis == 0 else squared + (away**2)[..., None]
    return (-squared / (2 * sigma**2)).exp()


def read_heatmaps(
    heatmaps: Float[Tensor, "batch keypoints rows columns"], stride: int = 4
) -> tuple[Float[Tensor, "batch keypoints 2"], Float[Tensor, "batch keypoints"]]:
    """The keypoints of heatmaps: their highest pixels, moved by a quarter towards the higher
    neighbour along each axis (Newell et al., "Stacked Hourglass Networks", ECCV 2016).

    Returns:
        (x, y) in pixels of the image, and the heights.
    """
    rows, columns = heatmaps.shape[2:]
    height, best = heatmaps.flatten(2).max(-1)
    y, x = best // columns, best % columns
    padded = F.pad(heatmaps, (1, 1, 1, 1), mode="replicate").flatten(2)

    def at(dy: int, dx: int) -> Tensor:
        return padded.gather(2, ((y + 1 + dy) * (columns + 2) + x + 1 + dx)[..., None])[..., 0]

    offset = torch.stack([at(0, 1) - at(0, -1), at(1, 0) - at(-1, 0)], -1).sign() / 4
    inside = torch.stack([(x > 0) & (x < columns - 1), (y > 0) & (y < rows - 1)], -1)
    found = torch.stack([x, y], -1) + offset * inside
    return (found + 0.5) * stride - 0.5, height


@dataclass(frozen=True)
class Keypoints:
    """Keypoints that were regressed.

    Attributes:
        at: (x, y), as shares of the image's width and height.
        sigma: their uncertainty, in the same unit.
    """

    at: Float[Tensor, "batch keypoints 2"]
    sigma: Float[Tensor, "batch keypoints 2"]

    @property
    def score(self) -> Float[Tensor, "batch keypoints"]:
        """How certain the keypoints are, from 0 to 1; higher = more."""
        return 1 - self.sigma.mean(-1)


class LikelihoodHead(nn.Module):
    """Coordinates and their uncertainty from the mean token; trained by residual log-likelihood,
    with a flow that learns how errors are distributed and is not used any more afterwards.

    Args:
        dim: width of the tokens.
        num_keypoints: the number of keypoints.
    """

    def __init__(self, dim: int, num_keypoints: int) -> None:
        super().__init__()
        self.num_keypoints = num_keypoints
        self.regress = nn.Linear(dim, num_keypoints * 4)
        self.flow = RealNVP()
        nn.init.xavier_uniform_(self.regress.weight, gain=0.01)
        nn.init.zeros_(self.regress.bias)
        with torch.no_grad():  # in the middle of the image
            self.regress.bias.view(num_keypoints, 4)[:, :2] = 0.5

    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Keypoints:
        """The keypoints, from the tokens of the last stage."""
        found = self.regress(tokens.mean(1)).unflatten(1, (self.num_keypoints, 4))
        return Keypoints(found[..., :2], found[..., 2:].sigmoid())

    def loss(
        self,
        found: Keypoints,
        target: Float[Tensor, "batch keypoints 2"],
        visible: Float[Tensor, "batch keypoints"] | None = None,
    ) -> Tensor:
        """Equation 9 of Li et al.: -log Q(e) - log G(e) + log sigma for e = (target - at) / sigma,
        with a Laplace distribution as Q, and G what the flow adds to it; the mean over keypoints.

        Args:
            found: what `forward` has returned.
            target: where the keypoints are.
            visible: weights of the keypoints; 0 for those that are not visible.
        """
        wide = torch.promote_types(found.at.dtype, torch.float32)
        sigma = found.sigma.to(wide).clamp_min(1e-6)
        error = (target.to(wide) - found.at.to(wide)) / sigma
        laplace = -(math.log(2) + error.abs()).sum(-1)
        loss: Tensor = sigma.log().sum(-1) - laplace - self.flow(error)
        if visible is None:
            return loss.mean()
        weight = visible.to(wide)
        return (loss * weight).sum() / weight.sum().clamp_min(1)


class RealNVP(nn.Module):
    """The logarithm of a density of points in the plane: affine couplings down to a normal
    distribution (Dinh et al., "Density Estimation using Real NVP", ICLR 2017).

    Args:
        couplings: the number of couplings; they transform one coordinate after the other.
        hidden: width inside each coupling.
    """

    def __init__(self, couplings: int = 6, hidden: int = 64) -> None:
        super().__init__()

        def network(*last: nn.Module) -> nn.Module:
            wide = [nn.Linear(1, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU()]
            return nn.Sequential(*wide, nn.Linear(hidden, 1), *last)

        self.scales = nn.ModuleList(network(nn.Tanh()) for _ in range(couplings))
        self.shifts = nn.ModuleList(network() for _ in range(couplings))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, gain=0.01)

    def forward(self, x: Float[Tensor, "*points 2"]) -> Float[Tensor, "*points"]:
        """The logarithm of the density at every point."""
        dtype = self.scales[0][0].weight.dtype  # type: ignore[index]
        fixed, moved = x.to(dtype).split(1, -1)
        log_det = torch.zeros_like(fixed)
        for scale, shift in zip(self.scales, self.shifts, strict=True):
            log_scale = scale(fixed)
            moved = (moved - shift(fixed)) * (-log_scale).exp()
            log_det = log_det - log_scale
            fixed, moved = moved, fixed
        found: Tensor = log_det - (fixed**2 + moved**2) / 2 - math.log(2 * math.pi)
        return found[..., 0]


class IterativeHead(nn.Module):
    """Parameters, such as pose, shape and camera of a body model, from the mean token: a guess that
    is corrected a few times by what the token and the guess before say (Kanazawa et al., section
    3.2).

    Args:
        dim: width of the tokens.
        start: the first guess, such as the parameters of the mean body; zeros if only their number
            is given.
        iterations: the number of corrections.
        hidden: width of the two hidden layers.
        dropout: dropout after each of those.

    Raises:
        ValueError: there is no correction.
    """

    start: Tensor

    def __init__(
        self,
        dim: int,
        start: Float[Tensor, " parameters"] | int,
        iterations: int = 3,
        hidden: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {iterations}")
        guess = torch.zeros(start) if isinstance(start, int) else start.detach().clone()
        self.register_buffer("start", guess)
        self.iterations = iterations
        self.correct = nn.Sequential(
            nn.Linear(dim + len(guess), hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, len(guess)),
        )
        nn.init.xavier_uniform_(self.correct[-1].weight, gain=0.01)  # type: ignore[arg-type]

    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch params"]:
        """The parameters, from the tokens of the last stage."""
        feature = tokens.mean(1)
        guess = self.start.to(feature.dtype).expand(len(feature), -1)
        for _ in range(self.iterations):
            guess = guess + self.correct(torch.cat([feature, guess], 1))
        return guess


class SegmentationHead(nn.Module):
    """A class for every pixel from all four maps (Kirillov et al., figure 3): each goes up to the
    finest in steps of 2, a convolution in front of each step; then they are added up.

    Args:
        in_channels: channels of the maps.
        num_classes: the number of classes.
        channels: channels of the convolutions.
        levels: the number of maps.
    """

    def __init__(
        self, in_channels: int, num_classes: int, channels: int = 128, levels: int = 4
    ) -> None:
        super().__init__()
        groups = math.gcd(32, max(channels // 4, 1))

        def step(into: int) -> nn.Module:
            conv = nn.Conv2d(into, channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")
            return nn.Sequential(conv, nn.GroupNorm(groups, channels), nn.ReLU())

        self.steps = nn.ModuleList(
            nn.ModuleList(step(in_channels if n == 0 else channels) for n in range(max(level, 1)))
            for level in range(levels)
        )
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(
        self, maps: Sequence[Tensor], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch classes height width"]:
        """The logits of every class at every pixel.

        Args:
            maps: the finest first.
            size: height and width of the images; four times those of the finest map, if not given.
        """
        total: Tensor | None = None
        several: Any = self.steps
        for level, (one, steps) in enumerate(zip(maps, several, strict=True)):
            for n, step in enumerate(steps):
                one = step(one)
                if level:
                    one = _resized(one, tuple(maps[level - n - 1].shape[2:]))
            total = one if total is None else total + one
        assert total is not None
        height, width = maps[0].shape[2:]
        return _resized(self.classify(total), size or (4 * height, 4 * width))


def _resized(one: Tensor, size: Any) -> Tensor:
    return F.interpolate(one, size, mode="bilinear", align_corners=False)
