"""Settings that papers have published for dense models, by name.

Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
NeurIPS 2022, https://arxiv.org/abs/2210.01035, tables 8 and 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokred.reducers import Reducer
from tokred.reducers.slic import SLIC
from tokred.schedule import Hourglass, Schedule


@dataclass(frozen=True)
class Preset:
    """A method and its schedule, as they were published for one model and one task.

    Attributes:
        reducer: the method.
        schedule: where in the model it runs. Of Swin, the layers of the third stage are counted,
            where it is applied; in the paper, those of all four stages.
        model: the model that it was published for.
        grid: the grid of its tokens, or of its windows, before the method.
    """

    reducer: Reducer
    schedule: Schedule
    model: str
    grid: tuple[int, int]


def _expedited(
    model: str,
    grid: tuple[int, int],
    few: tuple[int, int],
    down: int,
    up: int | None,
    neighbourhood: int,
    tau: float,
    k: int,
) -> Preset:
    reducer = SLIC(few, neighbourhood=neighbourhood, iterations=5, tau=tau, k=k)
    return Preset(reducer, Hourglass(grid=few, down=down, up=up), model, grid)


presets: Mapping[str, Preset] = {
    "segmenter-ade20k": _expedited("ViT-L/16", (40, 40), (28, 28), 10, None, 5, 50.0, 20),
    "segmenter-cityscapes": _expedited("ViT-L/16", (48, 48), (32, 32), 12, None, 5, 50.0, 20),
    "segmenter-pascal-context": _expedited("ViT-L/16", (30, 30), (15, 15), 14, None, 5, 50.0, 20),
    "dpt-kitti": _expedited("R50+ViT-B/16", (22, 76), (28, 28), 2, None, 5, 5.0, 20),
    "dpt-nyuv2": _expedited("R50+ViT-B/16", (30, 40), (16, 16), 3, None, 7, 2.0, 50),
    "swag-vit-h14": _expedited("ViT-H/14", (37, 37), (25, 25), 8, None, 7, 1.0, 20),
    "swag-vit-l16": _expedited("ViT-L/16", (32, 32), (22, 22), 8, None, 9, 1.0, 20),
    "mask2former-coco-panoptic": _expedited("Swin-L", (12, 12), (8, 8), 6, 18, 7, 20.0, 10),
    "mask2former-ade20k-semantic": _expedited("Swin-L", (12, 12), (8, 8), 4, 18, 5, 100.0, 10),
    "mask2former-coco-instance": _expedited("Swin-L", (12, 12), (8, 8), 8, 18, 11, 100.0, 60),
    "swinv2-htc-coco": _expedited("SwinV2-L", (32, 32), (23, 23), 8, 18, 5, 33.0, 20),
}
"""The presets by name. Iterations are five in all of them."""
