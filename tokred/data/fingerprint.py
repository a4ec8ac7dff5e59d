"""Fingerprints: short texts that tell models and images from others.

What a tool keeps on disk (a cache, the images of a sweep, the checkpoints of a training) holds the
fingerprints of what it was made from. It is used again only if they are the same.

The fingerprint of a model begins with the number of the format, so that files can tell a model that
has changed from a format that has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokred.data.parts import parted

FORMAT = 2
"""The format of a model's fingerprint; 1 is that of version 0.7, which had no number in it."""


def fingerprint(model: nn.Module) -> str:
    """The fingerprint of a model: of its structure, as it is printed, and of all its weights and
    buffers, bit by bit."""
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # addresses differ between processes
    digest = hashlib.sha256(structure.encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(getattr(value, 'shape', ()))}".encode())
        if isinstance(value, Tensor):
            digest.update(str(value.dtype).encode())
            try:
                digest.update(_bytes(value))
            except (RuntimeError, NotImplementedError, AttributeError):  # of a quantised tensor
                digest.update(repr(value).encode())
    return f"{FORMAT}:{digest.hexdigest()[:16]}"


def is_of(pinned: object, model: nn.Module) -> bool:
    """Whether a fingerprint that a training has written is that of a model; it may be one of
    version 0.7."""
    return pinned == (_in_format_1 if in_former_format(pinned) else fingerprint)(model)


def in_former_format(pinned: object) -> bool:
    """Whether a fingerprint is of a former format, and so cannot be compared with those of now."""
    return isinstance(pinned, str) and ":" not in pinned


def _in_format_1(model: nn.Module) -> str:
    """What trainings of version 0.7 have written: names, shapes and the first 64 values of all
    weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def samples_fingerprint(samples: Any, looked_at: int = 16) -> str:
    """The fingerprint of samples: of their number, of their stamp, and of a few of them, spread
    evenly, bit by bit.

    Args:
        samples: `tokred.data.samples.Samples`.
        looked_at: how many samples are looked at.
    """
    digest = hashlib.sha256(f"{len(samples)} {stamp_of(samples.items)}".encode())
    many = min(looked_at, len(samples))
    for i in range(many):
        inputs, target = samples[i * (len(samples) - 1) // max(1, many - 1)]
        parts = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
        for part in [*parts, target]:
            if isinstance(part, Tensor):
                digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
                digest.update(_bytes(part))
            else:
                digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def stamp_of(items: Any) -> str:
    """What tells items from others without a look at their images: their labels, and the names and
    sizes of files. Empty if nothing of this kind is known.

    Args:
        items: a sequence of samples. If it has a method `stamp`, that is asked.
    """
    stamp = getattr(items, "stamp", None)
    if stamp is not None:
        return str(stamp())
    if isinstance(items, list | tuple):
        return str([_plain(parted(sample)[1]) for sample in items])
    targets = getattr(items, "targets", None)  # as torchvision's datasets have them
    return "" if targets is None else str(_plain(targets))


def stamp_of_files(files: Sequence[Path]) -> str:
    """The names of files and their sizes in bytes."""
    return str([(file.name, file.stat().st_size) for file in files])


def _plain(target: Any) -> Any:
    """A target as numbers and names, whose text is the same in every process; None if it is
    something else."""
    if isinstance(target, Tensor):
        target = target.detach().cpu().numpy()
    if isinstance(target, np.ndarray):  # maps are large
        small = target.ndim < 2
        return target.tolist() if small else hashlib.sha256(target.tobytes()).hexdigest()
    if isinstance(target, list | tuple):
        return [_plain(one) for one in target]
    return target if isinstance(target, int | float | str) else None


def _bytes(tensor: Tensor) -> Any:
    """The values of a tensor as they are stored."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
