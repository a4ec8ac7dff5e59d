"""YOLOS, VideoMAE, ViTPose and DPT of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from families import Small, hidden_states, two_pictures, visible

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
YOLOS = {**SIZE, "image_size": [64, 96], "num_detection_tokens": 3, "num_labels": 5}
VIDEO = {**SIZE, "image_size": 32, "num_frames": 8, "num_labels": 5}
POSE = {**SIZE, "image_size": (64, 64), "patch_size": (16, 16), "out_features": ["stage4"]}
DPT = {
    **SIZE,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 16, 16],
    "fusion_hidden_size": 16,
    "num_labels": 5,
}


def images(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 64, 64)}


def wide(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 64, 96)}


def videos(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 8, 3, 32, 32)}


def blank(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("position_embeddings"):
            nn.init.zeros_(parameter)


def twins(model: nn.Module) -> dict[str, Tensor]:
    blank(model)
    return {"pixel_values": two_pictures((64, 64), (16, 16))}


def wide_twins(model: nn.Module) -> dict[str, Tensor]:
    blank(model)
    return {"pixel_values": two_pictures((64, 96), (16, 16))}


def video_twins(model: nn.Module) -> dict[str, Tensor]:
    for module in model.modules():
        if module.__class__.__name__ == "VideoMAEEmbeddings":
            module.position_embeddings.zero_()  # neither a parameter nor a buffer
    frame = two_pictures((32, 32), (16, 16))
    return {"pixel_values": frame[:, None].expand(-1, 8, -1, -1, -1).clone()}


def pose_twins(model: nn.Module) -> dict[str, Tensor]:
    for module in model.modules():
        if module.__class__.__name__ == "VitPoseBackbonePatchEmbeddings":
            module.projection.padding = (0, 0)  # patches would show what is beside them
    return twins(model)


def lively(model: nn.Module) -> nn.Module:
    """Weights large enough for heads of many layers to answer differently to different tokens."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight)
    return visible(model)


def make(cls: Any, config: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: lively(cls(config()))


def yolos(cls: Any, between: bool) -> Small:
    def config() -> Any:
        return transformers.YolosConfig(**YOLOS, use_mid_position_embeddings=between)

    return Small(make(cls, config), wide, wide_twins, hidden_states, counted="intermediate")


def videomae(cls: Any, mean: bool) -> Small:
    def config() -> Any:
        return transformers.VideoMAEConfig(**VIDEO, use_mean_pooling=mean)

    first = cls is transformers.VideoMAEForVideoClassification and not mean
    return Small(
        make(cls, config),
        videos,
        video_twins,
        hidden_states,
        counted="intermediate",
        refuses={"topk": "takes its first patch"} if first else None,
    )


def experts(batch: int) -> dict[str, Tensor]:
    return {**images(batch), "dataset_index": torch.arange(batch) % 3}


def experts_twins(model: nn.Module) -> dict[str, Tensor]:
    return {**pose_twins(model), "dataset_index": torch.tensor([2, 0])}


def pose(num_experts: int, inputs: Any, equal: Any) -> Small:
    def build() -> nn.Module:
        config = transformers.VitPoseConfig(
            backbone_config=transformers.VitPoseBackboneConfig(
                **POSE, num_experts=num_experts, part_features=8
            ),
            num_labels=5,
        )
        return lively(transformers.VitPoseForPoseEstimation(config))

    return Small(build, inputs, equal, hidden_states, answer=lambda outputs: outputs.heatmaps)


def depth(cls: Any, taken: str) -> Small:
    def config() -> Any:
        return transformers.DPTConfig(**DPT)

    return Small(
        make(cls, config),
        images,
        twins,
        hidden_states,
        counted="intermediate",
        answer=lambda outputs: getattr(outputs, taken),
    )


SMALL = {
    "yolos": yolos(transformers.YolosModel, between=False),
    "yolos, detector": yolos(transformers.YolosForObjectDetection, between=False),
    "yolos, positions between": yolos(transformers.YolosForObjectDetection, between=True),
    "videomae": videomae(transformers.VideoMAEModel, mean=False),
    "videomae, averaging": videomae(transformers.VideoMAEForVideoClassification, mean=True),
    "videomae, first token": videomae(transformers.VideoMAEForVideoClassification, mean=False),
    "vitpose": pose(1, images, pose_twins),
    "vitpose, experts": pose(3, experts, experts_twins),
    "dpt": depth(transformers.DPTModel, "last_hidden_state"),
    "dpt, depth": depth(transformers.DPTForDepthEstimation, "predicted_depth"),
    "dpt, segmentation": depth(transformers.DPTForSemanticSegmentation, "logits"),
}
