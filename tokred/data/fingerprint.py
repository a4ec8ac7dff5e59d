"""Fingerprints: short texts that tell models and images from others.

What a tool keeps on disk (a cache, the images of a sweep, the checkpoints of a training) holds the
fingerprints of what it was made from. It is used again only if they are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokred.data.parts import parted


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
