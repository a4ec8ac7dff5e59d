"""`tokred.visualise`: a trace drawn over its images; and the plot of accuracy against speed.

Needs Pillow, the plot Matplotlib: `pip install "tokred[plots]"`.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from tokred.engine.denoising import DenoiserTrace
from tokred.measure.tracing import Trace
from tokred.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

_GAP = 8
_GREY, _LINE = (40, 40, 44), (255, 255, 255)


def visualise(
    trace: Trace | DenoiserTrace, images: Tensor | Sequence[Image], cell: int = 16
) -> list[Image]:
    """One strip per image: the image, then its tokens after every reduction.

    A merged token is filled with the mean colour of its patches, tinted with a colour of its own
    so that patches which lie apart are seen to belong together, and outlined. A token that stands
    for its own patch shows the patch. A dropped token is dark.

    Args:
        trace: what `tokred.inspect` has returned.
        images: the same images in the same order, as the model took them ([B, C, H, W]; each is
            stretched to full contrast), as uint8, or as pictures of any size. Of a denoiser, whose
            blocks of the finest level are drawn: the pictures of its latents.
        cell: pixels per patch in the drawing.

    Raises:
        ValueError: there are not as many images as were traced, or nothing was reduced.
        ModuleNotFoundError: Pillow is not installed.
    """
    grid, stages = _laid_out(trace)
    pictures = [_picture(image, grid, cell) for image in images]
    traced = len(stages[0][1])
    if len(pictures) != traced:
        raise ValueError(f"images must be the {traced} that were traced, not {len(pictures)}")
    captions = ["image", *(caption for caption, _ in stages)]
    strips = []
    for b, picture in enumerate(pictures):
        maps = [_tokens(picture, labels[b].cpu(), cell) for _, labels in stages]
        strips.append(_strip([picture, *maps], captions))
    return strips


def heat(trace: Trace, images: Tensor | Sequence[Image], cell: int = 16) -> list[Image]:
    """One strip per image: the image, and how many layers each of its patches went through (SViT,
    figures 1 and 9), from dark (fewest, of all the images) to bright (most), with a scale.

    Args:
        trace: what `tokred.inspect` has returned.
        images: the same images in the same order, as for `visualise`.
        cell: pixels per patch in the drawing.

    Raises:
        ValueError: there are not as many images as were traced, or nothing was reduced.
        ModuleNotFoundError: Pillow is not installed.
    """
    if not trace.stages:
        raise ValueError("the trace has no reductions to draw: every token was kept")
    usage = trace.usage().cpu()
    pictures = [_picture(image, trace.grid, cell) for image in images]
    if len(pictures) != len(usage):
        raise ValueError(f"images must be the {len(usage)} that were traced, not {len(pictures)}")
    fewest, most = int(usage.min()), int(usage.max())
    scale = torch.linspace(1, 0, trace.grid[0] * cell)[:, None].expand(-1, max(48, 2 * cell))
    captions = ["image", "layers used", f"{fewest} - {most}"]
    strips = []
    for picture, used in zip(pictures, usage, strict=True):
        share = (used - fewest) / max(1, most - fewest)
        large = share.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        strips.append(_strip([picture, _hot(large), _hot(scale)], captions))
    return strips


def plot_usage(axes: Axes, trace: Trace) -> None:
    """For every layer, the share of the patch tokens that it works on, and of these the part that
    the layer before did not work on (SViT, figure 5).

    Args:
        axes: where to draw.
        trace: what `tokred.inspect` has returned.
    """
    cells = trace.grid[0] * trace.grid[1]
    by_layer = {stage.layer: stage for stage in trace.stages}
    back = trace.reactivated()
    shares, again, share = [], [], 1.0
    for layer in range(trace.layers):
        stage = by_layer.get(layer)
        if stage:
            share = sum(stage.counts) / len(stage.counts) / cells
        shares.append(100 * share)
        again.append(100 * share * back.get(layer, 0.0))
        if stage and stage.around:
            share = 1.0
    layers = range(trace.layers)
    axes.bar(layers, shares, color="#9db8d2", label="tokens used")
    axes.bar(layers, again, color="#c8553d", label="of these, not used in the layer before")
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the patch tokens, %")
    axes.set_xticks(list(layers))
    axes.set_ylim(0, 130)  # room for the legend
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.legend(loc="upper right")


def _hot(share: Tensor) -> UInt8[Tensor, "3 height width"]:
    """Shares from 0 to 1 in colours from dark blue over red to light yellow."""
    stops = torch.tensor([[24, 20, 66], [138, 35, 111], [238, 98, 66], [252, 245, 180]]).float()
    at = share.clamp(0, 1) * (len(stops) - 1)
    low = at.floor().clamp(max=len(stops) - 2).long()
    part = (at - low)[..., None]
    colours = stops[low] * (1 - part) + stops[low + 1] * part
    return colours.permute(2, 0, 1).round().to(torch.uint8)


def _laid_out(
    trace: Trace | DenoiserTrace,
) -> tuple[tuple[int, int], list[tuple[str, Int[Tensor, "batch height width"]]]]:
    """The grid, and for every reduction on it a caption and the token of each cell."""
    if not (trace.blocks if isinstance(trace, DenoiserTrace) else trace.stages):
        raise ValueError("the trace has no reductions to draw: every token was kept")
    if not isinstance(trace, DenoiserTrace):
        return trace.grid, [
            (f"layer {stage.layer}: {stage.after} tokens", stage.labels) for stage in trace.stages
        ]
    grid = trace.blocks[0].grid
    return grid, [
        (f"{block.path}: {block.after}", block.map.labels().reshape(-1, *grid))
        for block in trace.blocks
        if block.grid == grid
    ]


def clusters(image: Image, labels: Int[Tensor, "rows columns"], cell: int = 16) -> Image:
    """A picture with its tokens, as in `visualise`, and nothing around it.

    Args:
        image: of any size; it is stretched to `cell` pixels per patch.
        labels: the token of every patch; -1 where it was dropped.
        cell: pixels per patch.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
    """
    pil = require("PIL.Image", "plots")
    rows, columns = labels.shape
    drawn = _tokens(_picture(image, (rows, columns), cell), labels, cell)
    picture: Image = pil.fromarray(drawn.permute(1, 2, 0).contiguous().numpy())
    return picture


def stack(strips: Sequence[Image]) -> Image:
    """Strips of one width, one below the other, as one picture."""
    pil = require("PIL.Image", "plots")
    height = sum(strip.height for strip in strips)
    page: Image = pil.new("RGB", (max(strip.width for strip in strips), height), "white")
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page


def plot_trade_off(
    axes: Axes, points: Mapping[str, Sequence[tuple[float, float]]], dense: float
) -> None:
    """Accuracy (in percent) over speed-up, one line per method; the dense model is the cross.

    Args:
        axes: where to draw.
        points: for every method, its (speed-up, accuracy) pairs.
        dense: the accuracy of the dense model.
    """
    for (name, line), marker in zip(points.items(), "osD^vPX*<>", strict=False):
        ordered = sorted(line)
        axes.plot([p[0] for p in ordered], [p[1] for p in ordered], marker=marker, label=name)
    axes.axhline(dense, color="grey", linewidth=0.8, linestyle=":")
    axes.plot([1], [dense], "kX", markersize=9, label="dense")
    axes.set_xlabel("speed-up over the dense model, measured")
    axes.set_ylabel("accuracy on held-out images, %")
    axes.grid(alpha=0.25)
    axes.legend()


def plot_front(
    axes: Axes,
    points: Mapping[str, Sequence[tuple[float, float]]],
    dense: float,
    front: Sequence[tuple[float, float]],
    label: str,
) -> None:
    """A score over speed-up, one line per method; settings that no other is both faster and better
    than are ringed, and joined by a broken line.

    Args:
        axes: where to draw.
        points: for every method, its (speed-up, score) pairs.
        dense: the score of the dense model, which is the cross.
        front: the pairs that are ringed.
        label: what the score is called.
    """
    plot_trade_off(axes, points, dense)
    across, up = [p[0] for p in front], [p[1] for p in front]
    axes.plot(across, up, "--", color="black", linewidth=0.9, alpha=0.6, zorder=1)
    axes.plot(
        across, up, "o", markersize=12, markerfacecolor="none", color="black", alpha=0.7,
        label="front", zorder=1,
    )  # fmt: skip
    axes.set_ylabel(label)
    axes.legend()


def _picture(image: Any, grid: tuple[int, int], cell: int) -> UInt8[Tensor, "3 height width"]:
    """Any image as uint8 RGB, with `cell` pixels per patch."""
    if not isinstance(image, Tensor):
        size = image.convert("RGB").size
        flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        image = flat.view(size[1], size[0], 3).permute(2, 0, 1)
    pixels = image.detach().cpu().float()
    if image.dtype != torch.uint8:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp(min=1e-6) * 255
    pixels = pixels.expand(3, -1, -1)
    shape = (grid[0] * cell, grid[1] * cell)
    pixels = F.interpolate(pixels[None], shape, mode="bilinear", antialias=True)[0]
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _tokens(
    picture: UInt8[Tensor, "3 height width"], labels: Int[Tensor, "rows columns"], cell: int
) -> UInt8[Tensor, "3 height width"]:
    rows, columns = labels.shape
    patches = picture.float().view(3, rows, cell, columns, cell)
    means = patches.mean((2, 4))  # [3, rows, columns]
    out = patches.clone()
    for label in labels.unique().tolist():
        member = labels == label
        if label < 0:
            fill = torch.tensor(_GREY, dtype=torch.float32)
        elif member.sum() == 1:
            continue
        else:
            # Hues a golden section apart: neighbours in number look unlike each other.
            red, green, blue = colorsys.hsv_to_rgb(label * 0.618 % 1, 0.75, 0.95)
            tint = torch.tensor([red, green, blue]) * 255
            fill = 0.6 * means[:, member].mean(1) + 0.4 * tint
        out.permute(0, 1, 3, 2, 4)[:, member] = fill[:, None, None, None]
    pixels = out.reshape(3, rows * cell, columns * cell)
    line = torch.tensor(_LINE, dtype=torch.float32)[:, None, None]
    for row, column in (labels[1:] != labels[:-1]).nonzero().tolist():
        across = slice(column * cell, (column + 1) * cell)
        pixels[:, (row + 1) * cell - 1 : (row + 1) * cell, across] = line
    for row, column in (labels[:, 1:] != labels[:, :-1]).nonzero().tolist():
        along = slice(row * cell, (row + 1) * cell)
        pixels[:, along, (column + 1) * cell - 1 : (column + 1) * cell] = line
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _caption(height: int) -> int:
    """Pixels of the line above pictures of this height: legible where a strip is shown smaller."""
    return max(22, height // 17 + 9)


def _strip(pictures: Sequence[UInt8[Tensor, "3 height _width"]], captions: Sequence[str]) -> Image:
    pil, draw, font = (
        require(f"PIL.{name}", "plots") for name in ("Image", "ImageDraw", "ImageFont")
    )
    height = pictures[0].shape[1]
    above = _caption(height)
    wide = sum(pixels.shape[2] + _GAP for pixels in pictures)
    strip: Image = pil.new("RGB", (wide + _GAP, height + above + _GAP), "white")
    pen = draw.Draw(strip)
    left = _GAP
    for pixels, caption in zip(pictures, captions, strict=True):
        flat = pixels.permute(1, 2, 0).contiguous()
        strip.paste(pil.fromarray(flat.numpy()), (left, above))
        pen.text((left, 3), caption, fill="black", font=font.load_default(above - 9))
        left += pixels.shape[2] + _GAP
    return strip
