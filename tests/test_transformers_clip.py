"""What is special about CLIP, SigLIP and the towers of transformers that are built like theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from families.transformers_clip import SIZE, SMALL, captioned, dual
from torch import Tensor, nn
from transformers.models.janus.configuration_janus import JanusVisionConfig

import tokred
from tokred.host import find_host

pytestmark = pytest.mark.filterwarnings("ignore:.*keeps all .* tokens")

SHAPES = [(4, 4), (3, 4), (4, 2)]
LENGTHS = [rows * columns for rows, columns in SHAPES]


def siglip2(attention: str = "sdpa") -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and three images of different shapes, padded to one length."""
    model = SMALL["siglip2"].build()
    model.set_attn_implementation(attention)
    longest = max(LENGTHS) + 2
    inputs = {
        "pixel_values": torch.randn(3, longest, 3 * 16 * 16),
        "pixel_attention_mask": (torch.arange(longest) < torch.tensor(LENGTHS)[:, None]).int(),
        "spatial_shapes": torch.tensor(SHAPES),
    }
    return model, inputs


def without_padding(inputs: dict[str, Tensor], image: int) -> dict[str, Tensor]:
    one = {name: value[image : image + 1] for name, value in inputs.items()}
    for name in ("pixel_values", "pixel_attention_mask"):
        one[name] = one[name][:, : LENGTHS[image]]
    return one


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["tome", "atc", "topk", "evit"])
def test_a_padded_image_gives_what_it_gives_alone(method: str, attention: str) -> None:
    model, inputs = siglip2(attention)
    tokred.apply(model, method, keep_rate=0.5)
    batch = model(**inputs)
    for image, length in enumerate(LENGTHS):
        alone = model(**without_padding(inputs, image))
        torch.testing.assert_close(
            batch.last_hidden_state[image, :length], alone.last_hidden_state[0]
        )
        torch.testing.assert_close(batch.pooler_output[image], alone.pooler_output[0])


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "atc"])
def test_what_stands_in_the_padding_does_not_matter(method: str) -> None:
    model, inputs = siglip2()
    tokred.apply(model, method, keep_rate=0.5)
    before = model(**inputs).pooler_output
    padding = inputs["pixel_attention_mask"] == 0
    inputs["pixel_values"][padding] = 10 * torch.randn(int(padding.sum()), 3 * 16 * 16)
    torch.testing.assert_close(model(**inputs).pooler_output, before)


@torch.no_grad()
def test_padding_is_masked_as_before_while_nothing_is_reduced() -> None:
    model, inputs = siglip2()
    dense = model(**inputs).pooler_output
    tokred.apply(model, "tome", keep_rate=1.0)
    assert torch.equal(model(**inputs).pooler_output, dense)


@torch.no_grad()
@pytest.mark.parametrize("name", ["idefics2", "idefics3", "smolvlm"])
def test_an_image_with_padding_at_its_side_gives_what_it_gives_alone(name: str) -> None:
    model, images = SMALL[name].build(), torch.randn(2, 3, 64, 64)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, :, 3] = False
    tokred.apply(model, "tome", keep_rate=0.5)
    batch = model(images, patch_attention_mask=mask).last_hidden_state
    alone = model(images[1:, :, :, :48]).last_hidden_state
    torch.testing.assert_close(batch[1][mask[1].flatten()], alone[0])
    torch.testing.assert_close(batch[:1], model(images[:1]).last_hidden_state)


@torch.no_grad()
def test_a_tower_that_makes_masks_compiles_with_graph_breaks() -> None:
    """How many tokens are padding is not known to the compiler."""
    model, images = SMALL["idefics3"].build(), torch.randn(2, 3, 64, 64)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, :, 3] = False
    try:
        torch.compile(model, backend="eager")(images, patch_attention_mask=mask)
    except TypeError:
        pytest.skip("this version of torch cannot compile the dense model either")
    tokred.apply(model, "tome", keep_rate=0.5)
    expected = model(images, patch_attention_mask=mask).last_hidden_state
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    got = compiled(images, patch_attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_segmentation_keeps_its_shape_and_reads_full_grids(method: str) -> None:
    config = dual(
        transformers.CLIPSegConfig,
        projection_dim=16,
        extract_layers=[1, 2, 3],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    model, inputs = transformers.CLIPSegForImageSegmentation(config).eval(), captioned(2)
    dense = model(**inputs)
    tokred.apply(model, method, keep_rate=1.0)
    assert torch.equal(model(**inputs).logits, dense.logits)
    tokred.apply(model, method, keep_rate=0.5)
    reduced = model(**inputs)
    assert reduced.logits.shape == dense.logits.shape
    assert not torch.allclose(reduced.logits, dense.logits)
    got, want = reduced.vision_model_output.hidden_states, dense.vision_model_output.hidden_states
    for ours, theirs in zip(got, want, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.shape == theirs.shape


NAMES: dict[str, Callable[[], nn.Module]] = {
    "CLIPModel": SMALL["clip, dual"].build,
    "CLIPVisionModelWithProjection": SMALL["clip, projected"].build,
    "CLIPForImageClassification": SMALL["clip, averaging"].build,
    "SiglipForImageClassification": SMALL["siglip, averaging"].build,
    "Siglip2ForImageClassification": SMALL["siglip2, averaging"].build,
    "Owlv2ForObjectDetection": SMALL["owlv2"].build,
    "GitVisionModel": SMALL["git"].build,
}


@pytest.mark.parametrize("name", NAMES)
def test_one_tower_is_found_in_every_wrapper(name: str) -> None:
    model = NAMES[name]()
    assert type(model).__name__ == name
    _, tower = find_host(model)
    assert tower is not model
    assert "Vision" in type(tower).__name__


def test_keys_that_are_normed_are_refused() -> None:
    config = JanusVisionConfig(**SIZE, use_qk_norm=True)
    with pytest.raises(tokred.UnsupportedModelError, match="norms its keys"):
        tokred.apply(transformers.JanusVisionModel(config), "tome", keep_rate=0.5)


def test_text_towers_are_not_matched() -> None:
    model = transformers.CLIPTextModel(dual(transformers.CLIPConfig).text_config)
    with pytest.raises(tokred.UnsupportedModelError, match="no patch for"):
        tokred.apply(model, "tome", keep_rate=0.5)


def test_a_detector_that_lays_its_features_out_as_a_grid_needs_the_full_one() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.OwlViTConfig(
        text_config={**sizes, "num_hidden_layers": 1, "vocab_size": 64},
        vision_config={**sizes, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    model = transformers.OwlViTForObjectDetection(config).eval()
    with pytest.raises(tokred.UnsupportedModelError, match="lay the features out as a grid"):
        tokred.apply(model, "tome", keep_rate=0.5, full_grid=False)
    tokred.apply(model, "tome", keep_rate=0.5)
