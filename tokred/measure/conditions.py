"""What a measurement depends on besides the model: the device, and the versions of libraries."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys

import torch
from torch import nn

from tokred.data.code import OURS


def versions_of(model: nn.Module) -> dict[str, str]:
    """The versions of the libraries that a measurement of this model depends on."""
    versions = {"torch": str(torch.__version__)}
    for library in sorted({type(module).__module__.split(".")[0] for module in model.modules()}):
        if hasattr(sys.modules.get(library), "__version__") and library != OURS:
            versions[library] = str(sys.modules[library].__version__)
    for name in ("numba", "triton"):  # by what is installed: a method may import them later
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def switches() -> dict[str, str]:
    """The switches of PyTorch that the answers or the speed of a model depend on."""
    found = {
        "float32": torch.get_float32_matmul_precision(),
        "default": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "autocast": [
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        ],
    }
    return {name: str(value) for name, value in found.items()}


def device_name(device: torch.device) -> str:
    """The name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    return f"{device.type} {name} {torch.backends.cpu.get_cpu_capability()}"
