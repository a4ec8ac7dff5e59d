"""Fingerprints: short texts that tell models and data from others.

What a tool keeps on disk (a cache, the images of a sweep, the checkpoints of a training) holds the
fingerprints of what it was made from. It is used again only if they are the same. All of them are
digests (`tokred.data.digest`), of everything that a result depends on.

The fingerprint of a model begins with the number of the format, so that files can tell a model that
has changed from a format that has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.data.digest import NoFingerprintError, content_of, digest_of
from tokred.patching import reduction_of

__all__ = [
    "FORMAT",
    "NoFingerprintError",
    "dense_fingerprint",
    "fingerprint",
    "identity_of",
    "in_former_format",
    "is_of",
    "samples_fingerprint",
    "stamp_of_files",
]

FORMAT = 3
"""The format of a model's fingerprint; 2 is that of version 0.8, and 1 that of version 0.7, which
had no number in it."""

_OF_A_REDUCTION = (
    "reducer", "schedule", "around", "layout", "proportional_attention", "full_grid", "attention",
    "averages", "reconstruction", "gates", "padded", "windows",
)  # fmt: skip
"""What the answers of a reduced model depend on."""


def fingerprint(model: nn.Module) -> str:
    """The fingerprint of a model: of all its weights and buffers, bit by bit, and of everything
    else that its forward can see: attributes, hooks, adapters, its own code, and the reduction that
    is applied to it.

    Raises:
        NoFingerprintError: something in it cannot be told from others of its kind.
    """
    reduction = reduction_of(model)
    about = {name: getattr(reduction, name, None) for name in _OF_A_REDUCTION}
    return f"{FORMAT}:{digest_of(model, about)}"


def dense_fingerprint(model: nn.Module) -> str:
    """The fingerprint of a model without the reduction that is applied to it, whether it is in
    training mode or not.

    Raises:
        NoFingerprintError: something in it cannot be told from others of its kind.
    """
    return f"{FORMAT}:{digest_of(model, mode=False)}"


def is_of(pinned: object, model: nn.Module) -> bool:
    """Whether a fingerprint that a training has written is that of a model, without its reduction;
    it may be one of a former version."""
    if not isinstance(pinned, str):
        return False
    former = {"1": _in_format_1, "2": _in_format_2}.get(_format_of(pinned), dense_fingerprint)
    return pinned == former(model)


def in_former_format(pinned: object) -> bool:
    """Whether a fingerprint is of a former format, and so cannot be compared with those of now."""
    return isinstance(pinned, str) and _format_of(pinned) != str(FORMAT)


def _format_of(pinned: str) -> str:
    number, colon, _ = pinned.partition(":")
    return number if colon else "1"


def _in_format_1(model: nn.Module) -> str:
    """What trainings of version 0.7 have written: names, shapes and the first 64 values of all
    weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _in_format_2(model: nn.Module) -> str:
    """What trainings of version 0.8 have written: the structure of a model, as it is printed, and
    all weights and buffers that are saved."""
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    digest = hashlib.sha256(structure.encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(getattr(value, 'shape', ()))}".encode())
        if isinstance(value, Tensor):
            digest.update(str(value.dtype).encode())
            try:
                digest.update(_bytes(value))
            except (RuntimeError, NotImplementedError, AttributeError):  # of a quantised tensor
                digest.update(repr(value).encode())
    return f"2:{digest.hexdigest()[:16]}"


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def samples_fingerprint(samples: Any) -> str:
    """The fingerprint of samples: of all that a model is given, and of all targets, bit by bit.

    Args:
        samples: `tokred.data.samples.Samples`. They are read, unless they are files.
    """
    known = identity_of(samples.items)
    if known is not None:
        return known
    return digest_of([digest_of(samples[i]) for i in range(len(samples))])


def identity_of(items: Any, numbers: Sequence[int] | None = None) -> str | None:
    """What tells items from others without preparing them: of files, their content. None if
    that can be told by reading them alone.

    Args:
        items: a sequence of samples. If it has a method `identity`, that is asked.
        numbers: which of them; all, if not given.
    """
    ask = getattr(items, "identity", None)
    if ask is None:
        return None
    found: str | None = ask(range(len(items)) if numbers is None else numbers)
    return found


def stamp_of_files(files: Sequence[Path]) -> str:
    """The names of files and the digests of their contents.

    Raises:
        FileNotFoundError: a file is missing.
    """
    digests = []
    for file in files:
        found = content_of(file)
        if found is None:
            raise FileNotFoundError(f"{file} cannot be read")
        digests.append((file.name, found))
    return digest_of(digests)
