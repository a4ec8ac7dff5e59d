"""Images and targets as a model takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokred.data import reading
from tokred.data.code import version_of
from tokred.data.digest import NoFingerprintError, digest_of, told
from tokred.data.fingerprint import identity_of
from tokred.data.parts import WITHOUT, is_picture, parted
from tokred.data.reading import IGNORED
from tokred.data.transforms import Processed, Transform, own_transform
from tokred.optional import require

Sample = tuple[Any, Tensor | None]
"""What the model takes for one image, without a batch axis, and its target if it has one."""


@dataclass
class Prepare:
    """Samples as a model takes them.

    Attributes:
        items: samples as they come, see `tokred.data.parts`.
        model: the model that takes them; None: any that takes images without a name.
        transform: from a picture to a tensor; None: as the model's library says.
        labelled: whether targets are wanted.
    """

    items: Any
    model: nn.Module | None
    transform: Transform | None
    labelled: bool
    _own: Transform | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        image, given = parted(self.items[index])
        target = _target(given if self.labelled else None)
        classless = getattr(self.model, "num_classes", None) == 0
        if classless and target is not None and target.ndim == 0:
            raise ValueError(f"the model has no classes (num_classes=0) for labels: {WITHOUT}")
        if isinstance(image, Mapping):
            return _one(image), target
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            image = torch.from_numpy(image.copy())
        if isinstance(image, Tensor):
            if not image.is_floating_point():
                raise ValueError(
                    "images that are tensors must be of fractions, as the model takes them, not "
                    f"{image.dtype} of {tuple(image.shape)}: give pictures instead"
                )
            if image.ndim == 4 and len(image) == 1:  # a batch of one, as processors give it
                image = image[0]
        else:
            image = self._prepared(image)
            if target is not None and target.ndim == 2:
                target = self._as_processed(target)
        name = input_name(self.model)
        return (image if name is None else {name: image}), target

    def _prepared(self, picture: Any) -> Tensor:
        """A picture, its path or its bytes, as a tensor [channels, height, width]."""
        if isinstance(picture, str | Path):
            picture = reading.picture(Path(picture))
        elif isinstance(picture, np.ndarray):
            picture = require("PIL.Image", "evaluate").fromarray(picture)
        if self._own is None:
            given = self.transform
            self._own = own_transform(self.model) if given is None else given
            self._own = getattr(self._own, "image_processor", self._own)  # of a whole processor
            if hasattr(self._own, "preprocess"):  # an image processor
                self._own = Processed(self._own)
        if is_picture(picture) and (self.transform is None or isinstance(self._own, Processed)):
            picture = reading.coloured(picture)
        prepared: Tensor = self._own(picture)
        if not isinstance(prepared, Tensor) or prepared.ndim != 3:
            raise ValueError(
                "transform must make a tensor [channels, height, width] of a picture, not "
                f"{tuple(prepared.shape) if isinstance(prepared, Tensor) else type(prepared)}"
            )
        return prepared

    def _as_processed(self, target: Tensor) -> Tensor:
        """A map with the changes that the processor of its picture makes to maps."""
        processor = getattr(self._own, "processor", None)
        if getattr(processor, "do_center_crop", False):
            raise ValueError(
                f"{type(processor).__name__} crops pictures, and maps of labels are of the whole: "
                "give as transform a processor with do_center_crop=False"
            )
        if getattr(processor, "do_reduce_labels", False) and not target.is_floating_point():
            # In the file, 0 does not count and the first class is 1, as in ADE20K.
            target = torch.where((target == 0) | (target == IGNORED), IGNORED, target - 1)
        return target

    def identity(self, numbers: Sequence[int]) -> str | None:
        """See `tokred.data.fingerprint.identity_of`: what the items are, and how they are prepared.
        None if either cannot be told without preparing them."""
        items = identity_of(self.items, numbers)
        if items is None:
            return None
        try:
            if self._own is None and len(self):
                self[0]  # only then is it known how pictures are prepared
            how, versions = told([self._own, input_name(self.model), self.labelled])
        except NoFingerprintError:
            return None
        return digest_of(items, how, versions, version_of("PIL"))


def _one(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs for one image without the batch axis that processors put before it."""
    tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
    alone = all(x.ndim and len(x) == 1 for x in tensors) and any(x.ndim >= 4 for x in tensors)
    if not alone:
        return inputs
    return {name: x[0] if isinstance(x, Tensor) else x for name, x in inputs.items()}


def input_name(model: Any) -> str | None:
    """What a model calls its images; None if it takes them without a name."""
    name = getattr(model, "main_input_name", None)
    # If a model also takes text, this is the name of the text.
    return {"input_ids": "pixel_values"}.get(name, name) if isinstance(name, str) else None


def _target(target: Any) -> Tensor | None:
    """A target as a tensor: int64, or as it is if it has fractions."""
    if target is None:
        return None
    if is_picture(target):
        return reading.depth_map(target) if target.mode == "F" else reading.class_map(target)
    if not isinstance(target, Tensor):
        try:
            # A copy of arrays, which may be read-only.
            target = torch.as_tensor(np.array(target) if hasattr(target, "shape") else target)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                "labels must be numbers or maps of them, not "
                f"{type(target).__name__} ({str(target)[:60]}): {WITHOUT}"
            ) from error
    if target.ndim == 3 and len(target) == 1:  # a map, as transforms leave it
        target = target[0]
    kept: Tensor = target if target.is_floating_point() else target.long()
    return kept
