"""The published TCFormer (V1) checkpoints."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.models.tcformer.backbone import GLOBAL, TCFormer
from tokred.models.tcformer.heads import PoseEstimator
from tokred.models.tcformer.necks import Pyramid
from tokred.optional import require


def load_released(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    neck: str | None = None,
    parts: Sequence[int] | None = None,
) -> nn.Module:
    """A published checkpoint, in evaluation mode, float32, on the CPU.

    Every weight must fit, and none may be left: names are those of the published files, under
    "model" or "state_dict" or at the top, with or without the prefix "module.".

    Args:
        path: a `.pth` file, of which nothing but tensors and plain values is read, or
            `.safetensors`.
        model: where the weights go. If not given, a model is made from the shapes in the file: a
            `TCFormer`; a `Pyramid` if there is a neck; a `PoseEstimator` if there is a keypoint
            head, too.
        neck: of a model that is made here, its neck, see `MTA`. Must be given where the weights fit
            two: "mta_pool" and "cr_mta" have the same.
        parts: of a model that is made here, into which parts it cuts images, see `TCFormer`;
            `GLOBAL` if not given, as in all published files. No weight tells. Must be given with
            "cr_mta", which is TCFormerV2's neck.

    Raises:
        ValueError: the file is no such checkpoint, or does not fit; the message lists what is
            missing, what is left, and what has another shape. Or its weights do not tell what
            model they are of.
        ModuleNotFoundError: safetensors is not installed, for a file of that kind.
    """
    if model is not None and (neck is not None or parts is not None):
        raise ValueError("neck and parts must not be given with a model, which has its own")
    weights = read_released(path)
    if model is None:
        model = _model_for(weights, path, neck, parts)
    elif not any(name.startswith("backbone.") for name in model.state_dict()):
        weights = {name.removeprefix("backbone."): value for name, value in weights.items()}
    wanted = model.state_dict()
    problems = [f"missing: {name}" for name in wanted if name not in weights]
    problems += [f"left: {name}" for name in weights if name not in wanted]
    fitting = {}
    for name in wanted.keys() & weights.keys():
        value, shape = weights[name], wanted[name].shape
        # A 1x1 convolution may be stored as a linear layer, and the other way round.
        if _without_ones(value.shape) != _without_ones(shape):
            problems.append(f"shape: {name} is {tuple(value.shape)}, not {tuple(shape)}")
        else:
            fitting[name] = value.reshape(shape)
    if problems:
        told = "\n  ".join(sorted(problems)[:40])
        more = f"\n  and {len(problems) - 40} more" if len(problems) > 40 else ""
        kind = type(model).__qualname__
        raise ValueError(
            f"{path} does not fit this {kind} in {len(problems)} places:\n  {told}{more}"
        )
    model.load_state_dict(fitting)
    return model.eval()


def read_released(path: str | Path) -> dict[str, Tensor]:
    """The weights in a published file, by the names they have here.

    Raises:
        ValueError: the file holds no weights, or objects that cannot be read safely.
        ModuleNotFoundError: safetensors is not installed, for a file of that kind.
    """
    content: Any
    if Path(path).suffix == ".safetensors":
        content = require("safetensors.torch", "timm").load_file(path)
    else:
        try:
            # Options of the training script lie beside the weights; they are plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds more than weights, which is not read: {error}"
            ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no weights")
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{path} holds no weights alone, but also {', '.join(strange[:5])}")
    return {str(name).removeprefix("module."): value.float() for name, value in content.items()}


def _model_for(
    weights: Mapping[str, Tensor],
    path: str | Path,
    neck: str | None,
    parts: Sequence[int] | None,
) -> nn.Module:
    """A model of the sizes that the weights have."""
    prefix = "backbone." if any(name.startswith("backbone.") for name in weights) else ""
    blocks = [re.match(rf"{prefix}block(\d)\.(\d+)\.", name) for name in weights]
    depths = [
        1 + max((int(one[2]) for one in blocks if one and int(one[1]) == n), default=-1)
        for n in (1, 2, 3, 4)
    ]
    stem = weights.get(f"{prefix}patch_embed1.proj.weight")
    if stem is None or min(depths) == 0:
        raise ValueError(
            f"{path} holds no TCFormer: there is no {prefix}patch_embed1.proj.weight, or there are "
            f"no blocks in one of four stages; it begins with {', '.join(list(weights)[:5])}"
        )

    lateral = weights.get("neck.lateral_convs.0.conv.weight")
    neck = _neck_of(weights, path, neck, parts)

    def shape(name: str, stage: int) -> torch.Size:
        found = weights.get(f"{prefix}block{stage}.0.{name}")
        return torch.Size((1, 1, 1, 1)) if found is None else found.shape

    widths = [shape("norm1.weight", n)[0] for n in (1, 2, 3, 4)]
    head = weights.get(f"{prefix}head.weight")
    backbone = TCFormer(
        depths,
        in_chans=stem.shape[1],
        num_classes=0 if head is None else head.shape[0],
        widths=widths,
        heads=[max(width // 64, 1) for width in widths],
        mlp_ratios=[shape("mlp.fc1.weight", n)[0] / widths[n - 1] for n in (1, 2, 3, 4)],
        sr_ratios=[shape("attn.sr.weight", n)[-1] for n in (1, 2, 3, 4)],
        parts=GLOBAL if parts is None else parts,
    )
    if lateral is None:
        return Pyramid(backbone) if prefix else backbone
    channels = lateral.shape[0]
    keypoints = weights.get("keypoint_head.final_layer.weight")
    if keypoints is None:
        return Pyramid(backbone, neck, channels)
    return PoseEstimator(backbone, keypoints.shape[0], neck, channels)


def _neck_of(
    weights: Mapping[str, Tensor],
    path: str | Path,
    neck: str | None,
    parts: Sequence[int] | None,
) -> str:
    """The name of the neck.

    Raises:
        ValueError: the weights do not tell, and nobody has said it; or there is none.
    """
    strided = any(re.match(r"neck\.merge_blocks\.\d+\.attn\.sr\.", name) for name in weights)
    if "neck.lateral_convs.0.conv.weight" not in weights:
        if neck is not None:
            raise ValueError(f"neck must not be given: {path} has no weights of one")
        return "mta"
    if neck is None and not strided:
        raise ValueError(
            f'neck must be given: the weights in {path} fit two of them. Say neck="mta_pool" (keys '
            'and values are averages), or neck="cr_mta" (they are the clusters of the last stage, '
            "as in TCFormerV2), then with parts=LOCAL or parts=GLOBAL"
        )
    if neck == "cr_mta" and parts is None:
        raise ValueError(
            'parts must be given with neck="cr_mta", for no weight tells how images are clustered: '
            "parts=LOCAL (in parts, as in TCFormerV2) or parts=GLOBAL (as a whole)"
        )
    return neck or "mta"


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    sides = list(shape)
    while len(sides) > 1 and sides[-1] == 1:
        sides.pop()
    return tuple(sides)
