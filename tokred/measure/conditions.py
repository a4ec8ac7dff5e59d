"""What a measurement depends on besides the model: the device, and the versions of libraries."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys

import torch
from torch import nn


def versions_of(model: nn.Module) -> dict[str, str]:
    """The versions of the libraries that a measurement of this model depends on."""
    library = type(model).__module__.split(".")[0]
    versions = {"torch": str(torch.__version__)}
    if hasattr(sys.modules.get(library), "__version__"):
        versions[library] = sys.modules[library].__version__
    for name in ("numba", "triton"):  # by what is installed: a method may import them later
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def device_name(device: torch.device) -> str:
    """The name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    return f"{device.type} {name} {torch.backends.cpu.get_cpu_capability()}"
