"""What attention without a mask is given, and what stands around patch tokens or between layers."""

from __future__ import annotations

import pytest
import torch
import transformers
from families.transformers_maskless import SMALL, VIDEO, lively
from torch import Tensor

import tokred


@torch.no_grad()
def test_merged_tokens_get_the_mean_of_the_positions_that_are_added_between_layers() -> None:
    model = SMALL["yolos, positions between"].build()
    inputs = SMALL["yolos, positions between"].inputs(2)
    try:
        model.vit.encoder.interpolation((64, 96))
    except TypeError:
        pytest.skip("this version of transformers cannot interpolate them for another size")
    layers = model.vit.encoder.layer
    between: list[Tensor] = []
    after: list[Tensor] = []
    layers[1].register_forward_hook(lambda _, args, output: between.append(output))
    layers[2].layernorm_before.register_forward_pre_hook(lambda _, args: after.append(args[0]))
    reduction = tokred.apply(model, "tome", keep_rate=0.5)
    with reduction.recording() as records:
        model(**inputs)
    assert between[0].shape == (2, 1 + 24 + 3, 32)
    added = model.vit.encoder.interpolation((64, 96))[1]
    labels = records[0].map.labels()
    for sample in range(2):
        for token in range(records[0].map.num_coarse):
            members = 1 + (labels[sample] == token).nonzero()[:, 0]
            expected = between[0][sample, members[0]] + added[0, members].mean(0)
            torch.testing.assert_close(after[0][sample, 1 + token], expected)
    torch.testing.assert_close(after[0][:, -3:], between[0][:, -3:] + added[:, -3:])


@torch.no_grad()
def test_eager_attention_is_the_same_and_shows_its_weights() -> None:
    model = SMALL["dpt"].build()
    inputs = SMALL["dpt"].inputs(2)
    tokred.apply(model, "topk", keep_rate=0.5)
    fused = model(**inputs).last_hidden_state
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True)
    torch.testing.assert_close(out.last_hidden_state, fused)
    assert [weights.shape[-1] for weights in out.attentions] == [17, 17, 9, 5]


@torch.no_grad()
def test_attention_that_takes_no_bias_is_not_used_silently() -> None:
    model = SMALL["dpt"].build()
    tokred.apply(model, "tome", keep_rate=0.5)
    model.config._attn_implementation = "flex_attention"
    for layer in model.encoder.layer:
        layer.attention.attention.config = model.config
    with pytest.raises(ValueError, match="takes no bias by key"):
        model(**SMALL["dpt"].inputs(2))


@torch.no_grad()
def test_pretraining_on_masked_videos_reduces_the_visible_patches() -> None:
    model = lively(transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**VIDEO)))
    inputs = {
        **SMALL["videomae"].inputs(2),
        "bool_masked_pos": torch.tensor([False, True] * 8).expand(2, -1),
    }
    dense = model(**inputs).logits
    tokred.apply(model, "tome", keep_rate=0.5)
    few = model(**inputs).logits
    assert few.shape == dense.shape and not torch.allclose(few, dense)
    with pytest.warns(UserWarning, match="nothing is reduced"):
        tokred.apply(model, "tome", keep_rate=1.0)
    assert torch.equal(model(**inputs).logits, dense)
