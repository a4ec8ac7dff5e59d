"""Where samples come from, and how one sample is taken apart into an image and its target.

A target is what is known about an image: the number of its class, zeros and ones for several
classes, or a map with the class or the depth of every pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MASKS = ("labels", "masks", "annotations", "segmentations")
"""Names of a folder beside `images` that holds the class of every pixel."""
DEPTHS = ("depth", "depths")
"""Names of a folder beside `images` that holds depths: `.npy` files, or pictures in 16 or 32 bits,
in the model's unit."""
IMAGES = ("image", "img", "images", "pixel_values")
"""Names of columns and keys that hold images."""
LABELS = ("labels", "label")
"""Names of columns and keys that hold targets of any kind."""
MAPS = ("annotation", "mask", "segmentation", "depth_map", *MASKS[1:], *DEPTHS)
"""Names of columns and keys that hold maps of classes or depths."""

WITHOUT = "give labelled=False (--unlabelled) to compare with the dense model alone"
"""What somebody can do whose labels cannot be used."""


@dataclass(frozen=True)
class Source:
    """Samples before they are prepared for a model.

    Attributes:
        items: a sequence of samples, each an image, (image, target), or a mapping.
        name: what they are, in words.
        picture: from a number to the image as people look at it.
    """

    items: Any
    name: str
    picture: Callable[[int], Any]


def is_picture(x: Any) -> bool:
    """Whether this is an image of Pillow."""
    return type(x).__module__.split(".")[0] == "PIL"


def parted(sample: Any) -> tuple[Any, Any]:
    """The image of a sample and its target, None if it has none. If a mapping holds several inputs
    of the model, all of them stand in the image's place."""
    if not isinstance(sample, Mapping):
        if not isinstance(sample, tuple | list):
            return sample, None
        return sample[0], sample[1] if len(sample) > 1 else None
    inputs = dict(sample)
    labels = [inputs.pop(name) for name in LABELS if name in inputs]
    raw = [name for name, x in inputs.items() if is_picture(x)]
    if raw:  # a row of a dataset: no model takes what else is in it
        named = [name for name in IMAGES if name in raw]
        image = (named or [name for name in raw if name not in MAPS] or raw)[0]
        labels += [inputs[name] for name in MAPS if name in inputs and name != image]
        return inputs[image], labels[0] if labels else None
    target = labels[0] if labels else None
    return (next(iter(inputs.values())) if len(inputs) == 1 else inputs), target
