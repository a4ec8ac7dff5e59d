"""From a picture to the tensor that a model takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tokred.data import zoo
from tokred.host import module_of
from tokred.optional import require

Transform = Callable[[Any], Any]
"""From a picture to a tensor [C, H, W]: a function, or an image processor of transformers."""


def own_transform(model: Any) -> Transform:
    """The transform that the model's library has for it: by timm's data configuration, or by the
    image processor that transformers keeps beside the checkpoint.

    Raises:
        ValueError: the library has none.
    """
    model = module_of(model)
    config = getattr(model, "pretrained_cfg", None)
    if config:
        data = require("timm.data", "timm")
        settings = data.resolve_data_config({}, model=model)
        # timm tells the size of the checkpoint, not that which the model was made for.
        embed = getattr(model, "patch_embed", None)
        size = getattr(embed, "img_size", None)
        if isinstance(size, tuple) and getattr(embed, "strict_img_size", False):
            settings["input_size"] = (settings["input_size"][0], *size)
        transform: Transform = data.create_transform(**settings)
        return transform
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name:
        processor = require("transformers", "transformers").AutoImageProcessor
        try:
            return Processed(processor.from_pretrained(name))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name} has no image processor ({str(error).splitlines()[0]}): give transform="
            ) from error
    raise ValueError(
        f"{type(model).__name__} does not say how it wants its pictures: give transform=, a "
        "function from a picture to a tensor [channels, height, width] or an image processor, or "
        "give tensors"
    )


@dataclass(frozen=True)
class Processed:
    """An image processor of transformers as a transform.

    Attributes:
        processor: the processor.
        resize: whether it may resize and crop.
    """

    processor: Any
    resize: bool = True

    def __call__(self, picture: Any) -> Float[Tensor, "channels height width"]:
        left_out = {} if self.resize else {"do_resize": False, "do_center_crop": False}
        options = {key: value for key, value in left_out.items() if hasattr(self.processor, key)}
        found: Tensor = self.processor(picture, return_tensors="pt", **options)["pixel_values"][0]
        return found


@dataclass(frozen=True)
class Augmented:
    """A random crop of a picture, mirrored at random, of the size that the model takes; then all
    other steps.

    Attributes:
        size: height and width.
        rest: the other steps, from a picture of this size to a tensor.
    """

    size: tuple[int, ...]
    rest: Callable[[Any], Tensor]

    def __call__(self, picture: Any) -> Float[Tensor, "channels height width"]:
        transforms = require("torchvision.transforms.v2", "train")
        bicubic = require("torchvision.transforms", "train").InterpolationMode.BICUBIC
        cut = transforms.RandomResizedCrop(self.size, interpolation=bicubic)
        return self.rest(transforms.RandomHorizontalFlip()(cut(picture)))


@dataclass(frozen=True)
class Digits:
    """A picture as the bundled checkpoints take it: in grey, resized, with ink 1 and paper -1.

    Attributes:
        side: height and width.
    """

    side: int

    def __call__(self, picture: Any) -> Float[Tensor, "1 side side"]:
        grey = picture.convert("L")
        if grey.size != (self.side, self.side):
            grey = grey.resize((self.side, self.side))
        return zoo.normalise(torch.from_numpy(np.array(grey))[None])
