"""Heads that pool patch tokens, on every family: what they must not see, they do not see."""

from __future__ import annotations

import pytest
import torch
from test_hosts import SMALL, answered

import tokred

POOLING = (
    "openclip_vit-coca", "openclip_vit-averaging", "openclip_vit-averaging-norm-after",
    "openclip_vit-pooling-by-attention",
    "timm_beit-beit", "timm_eva-eva", "timm_eva-post-norm", "timm_relpos-mlp",
    "timm_naflex-averaging", "timm_naflex-map", "timm_naflex-map-with-prefix", "timm_naflex-axial",
    "timm_vit-average-pooling", "timm_vit-siglip-attention-pooling",
    "transformers_aimv2-aimv2", "transformers_beit-beit-bias-in-every-layer",
    "transformers_clip-clip-averaging", "transformers_clip-siglip",
    "transformers_clip-siglip-averaging", "transformers_dinov2-dinov2-classifier",
    "transformers_maskless-videomae-averaging", "transformers_vit-ijepa-averaging",
)  # fmt: skip
"""By attention, as an average, in a method, in a module, and where nobody can be told."""
OTHERS = (
    "openclip_vit-clip", "timm_eva-eva02-class-token", "timm_naflex-class-token", "timm_vit-deit",
    "transformers_clip-clip", "transformers_vit-vit-classifier",
)  # fmt: skip
"""Heads that take a class token."""


@pytest.mark.parametrize("name", POOLING)
@pytest.mark.filterwarnings("ignore:the gates of:UserWarning")
def test_a_method_that_hides_tokens_in_training_is_refused_where_they_are_pooled(name: str) -> None:
    """In training DynamicViT keeps the tokens that it is going to drop; a head would pool them."""
    torch.manual_seed(0)
    model, inputs = SMALL[name].build(), SMALL[name].inputs(2)
    tokred.apply(model, "dynamicvit", keep_rate=0.5)
    model.train()
    with pytest.raises(ValueError, match="cannot be trained on a model that pools"):
        answered(SMALL[name], model, inputs)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:the gates of:UserWarning")
def test_it_is_trained_where_the_head_takes_a_class_token(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = SMALL[name].build(), SMALL[name].inputs(2)
    tokred.apply(model, "dynamicvit", keep_rate=0.5)
    model.train()
    assert answered(SMALL[name], model, inputs).isfinite().all()
