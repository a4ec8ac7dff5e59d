"""TCFormer: a vision transformer whose tokens are clusters.

Zeng et al., "Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering
Transformer", CVPR 2022, https://arxiv.org/abs/2204.08680, and "TCFormer: Visual Recognition via
Token Clustering Transformer", TPAMI 2024, https://arxiv.org/abs/2407.11321 (TCFormerV2).

`backbone` has the model, `tokens` what its tokens are, `clusterings` how they are made, `necks` the
pyramids, `heads` and `detection` what can be put on them, `checkpoints` reads the published files.
Importing this registers the models with timm, if that is installed: then
`timm.create_model("tcformerv2_small", num_classes=10)` makes one.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from tokred.models.tcformer.backbone import (
    GLOBAL,
    LOCAL,
    VARIANTS,
    TCFormer,
    tcformer,
    tcformer_large,
    tcformer_light,
    tcformerv2_base,
    tcformerv2_small,
    tcformerv2_tiny,
)
from tokred.models.tcformer.checkpoints import load_released
from tokred.models.tcformer.clusterings import DPCKNN, Bipartite, Clustering, KMeans
from tokred.models.tcformer.heads import (
    HeatmapHead,
    IterativeHead,
    Keypoints,
    LikelihoodHead,
    PoseEstimator,
    SegmentationHead,
    draw_heatmaps,
    read_heatmaps,
)
from tokred.models.tcformer.necks import MTA, Pyramid
from tokred.models.tcformer.tokens import ImageTokens, Layout

__all__ = [
    "DPCKNN",
    "GLOBAL",
    "LOCAL",
    "MTA",
    "VARIANTS",
    "Bipartite",
    "Clustering",
    "HeatmapHead",
    "ImageTokens",
    "IterativeHead",
    "KMeans",
    "Keypoints",
    "Layout",
    "LikelihoodHead",
    "PoseEstimator",
    "Pyramid",
    "SegmentationHead",
    "TCFormer",
    "draw_heatmaps",
    "load_released",
    "read_heatmaps",
    "tcformer",
    "tcformer_large",
    "tcformer_light",
    "tcformerv2_base",
    "tcformerv2_small",
    "tcformerv2_tiny",
]


def _register() -> None:
    """Gives timm the names of the models."""
    # Not by name: only patches import host libraries, and this must work without.
    models = importlib.import_module("timm.models")
    # Where timm looks for them.
    globals()["default_cfgs"] = models.generate_default_cfgs(
        {
            name: {
                "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7),
                "crop_pct": 0.9, "interpolation": "bicubic", "fixed_input_size": False,
                "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
                "first_conv": "patch_embed1.proj", "classifier": "head",
            }
            for name in VARIANTS
        }
    )  # fmt: skip

    def entry(name: str) -> Any:
        def make(**options: Any) -> TCFormer | Pyramid:
            neck = options.pop("neck", None)
            return TCFormer(**options) if neck is None else Pyramid(TCFormer(**options), neck)

        def create(pretrained: bool = False, **options: Any) -> Any:
            options.pop("img_size", None)  # any will do
            return models.build_model_with_cfg(
                make,
                name,
                pretrained,
                feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
                **{**VARIANTS[name], **options},
            )

        create.__name__ = create.__qualname__ = name
        create.__module__ = __name__
        create.__doc__ = f"{name}; with `neck`, a pyramid (see `tokred.models.tcformer`)."
        return models.register_model(create)

    for name in VARIANTS:
        entry(name)


if importlib.util.find_spec("timm") is not None:
    _register()
