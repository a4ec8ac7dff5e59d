"""`tome.vis`: merged tokens drawn over a picture. Needs Pillow: `pip install "tokred[plots]"`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from tokred.show.drawing import clusters

if TYPE_CHECKING:
    from PIL.Image import Image


def make_visualization(
    img: Image,
    source: Float[Tensor, "1 tokens all"],
    patch_size: int = 16,
    class_token: bool = True,
) -> Image:
    """The picture, cut to whole patches; every merged token has an outline and a colour of its own.

    Args:
        img: the picture that the model has seen, at its size.
        source: `model._tome_info["source"]` after a pass of that one picture.
        patch_size: pixels of a patch, along each side.
        class_token: whether tokens stand in front of the patches.

    Raises:
        ValueError: `source` is not that of one picture of this size.
        ModuleNotFoundError: Pillow is not installed.
    """
    rows, columns = img.height // patch_size, img.width // patch_size
    if source is None or source.ndim != 3 or len(source) != 1:
        given = None if source is None else tuple(source.shape)
        raise ValueError(
            f"source must be that of one picture, [1, tokens, all], not {given}: patch with "
            "trace_source=True, set model.r, run the picture alone or take source[i : i + 1]"
        )
    prefix = source.shape[2] - rows * columns
    if prefix != 0 if not class_token else prefix < 1:
        raise ValueError(
            f"source is of {source.shape[2]} tokens; a picture of {img.width}x{img.height} pixels "
            f"has {rows}x{columns} patches of {patch_size} pixels, "
            f"{'behind a class token' if class_token else 'and no class token'}"
        )
    labels = source[0, :, prefix:].argmax(0).view(rows, columns)
    cut = img.crop((0, 0, columns * patch_size, rows * patch_size))
    return clusters(cut, labels.cpu(), patch_size)
