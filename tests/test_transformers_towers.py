"""Vision towers inside larger models of transformers, and what else of transformers they meet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families.transformers_clip import SIZE, SMALL, TEXT, captioned
from families.transformers_vit import SMALL as VIT
from PIL import Image
from test_patching import traces
from torch import Tensor, nn

import tokred

pytestmark = pytest.mark.filterwarnings("ignore:.*keeps all .* tokens")


def dual_encoders() -> dict[str, nn.Module]:
    siglip = transformers.SiglipConfig(
        text_config={**TEXT, "projection_size": 32}, vision_config=SIZE
    )
    return {"clip": SMALL["clip, dual"].build(), "siglip": transformers.SiglipModel(siglip).eval()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_of_two_encoders_only_the_one_of_images_is_reduced(name: str) -> None:
    model, inputs = dual_encoders()[name], captioned(2)
    text = model.text_model
    was, dense = traces(text), model(**inputs)
    tokred.apply(model, "tome", keep_rate=1.0)
    kept = model(**inputs)
    assert torch.equal(kept.image_embeds, dense.image_embeds)
    assert torch.equal(kept.logits_per_image, dense.logits_per_image)
    tokred.apply(model, "tome", keep_rate=0.5)
    reduced = model(**inputs)
    assert not torch.allclose(reduced.image_embeds, dense.image_embeds)
    assert torch.equal(reduced.text_embeds, dense.text_embeds)
    assert [(one[0], one[1], one[3]) for one in traces(text)] == [
        (one[0], one[1], one[3]) for one in was
    ]
    assert all("forward" not in vars(module) for module in text.modules())
    tokred.remove(model)
    assert torch.equal(model(**inputs).image_embeds, dense.image_embeds)


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_a_captioner_reads_a_reduced_image(method: str) -> None:
    words = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32, add_cross_attention=True
    )
    encoder = VIT["vit"].build()
    model = transformers.VisionEncoderDecoderModel(
        encoder=encoder, decoder=transformers.GPT2LMHeadModel(words)
    ).eval()
    inputs = {
        "pixel_values": torch.randn(2, 3, 64, 64),
        "decoder_input_ids": torch.tensor([[1, 5, 9], [1, 7, 3]]),
    }
    dense = model(**inputs)
    tokred.apply(model, method, keep_rate=1.0)
    assert torch.equal(model(**inputs).logits, dense.logits)
    tokred.apply(model, method, keep_rate=0.5)
    reduced = model(**inputs)
    assert reduced.logits.shape == dense.logits.shape
    assert not torch.allclose(reduced.logits, dense.logits)
    assert reduced.encoder_last_hidden_state.shape == dense.encoder_last_hidden_state.shape
    said = model.generate(
        inputs["pixel_values"],
        max_new_tokens=4,
        do_sample=False,
        decoder_start_token_id=1,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert said.shape == (2, 5)


IMAGE = 49
"""The token that stands for a patch, among the words."""


def llava(vision: Any, **options: Any) -> nn.Module:
    words = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=50,
        max_position_embeddings=64,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=words, image_token_id=IMAGE, **options
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "topk"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_language_model_gets_as_many_image_features_as_it_has_places(
    tower: str, method: str
) -> None:
    if tower == "clip":
        model = llava(
            transformers.CLIPVisionConfig(**SIZE),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    else:
        model = llava(
            transformers.SiglipVisionConfig(**SIZE, vision_use_head=False),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    inputs = {
        "pixel_values": torch.randn(2, 3, 64, 64),
        "input_ids": torch.tensor([[1] + [IMAGE] * 16 + [5, 6], [1] + [IMAGE] * 16 + [7, 8]]),
    }
    dense = model(**inputs).logits
    tokred.apply(model, method, keep_rate=1.0)
    assert torch.equal(model(**inputs).logits, dense)
    tokred.apply(model, method, keep_rate=0.5)
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    assert [len(one) for one in features] == [16, 16]
    logits = model(**inputs).logits
    assert logits.shape == dense.shape and logits.isfinite().all()
    assert not torch.allclose(logits, dense)


def classifier() -> nn.Module:
    return VIT["vit, classifier"].build()


def test_a_pipeline_answers() -> None:
    model = classifier()
    processor = transformers.ViTImageProcessor(size={"height": 64, "width": 64})
    pipeline = transformers.pipeline("image-classification", model=model, image_processor=processor)
    noise = torch.randint(0, 256, (80, 70, 3), dtype=torch.uint8).numpy()
    picture = Image.fromarray(noise)
    dense = pipeline(picture)
    tokred.apply(model, "tome", keep_rate=0.5)
    reduced = pipeline([picture, picture], batch_size=2)
    assert len(reduced) == 2 and len(reduced[0]) == 5
    assert reduced[0] != dense
    tokred.remove(model)
    assert pipeline(picture) == dense


class Labelled(torch.utils.data.Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": index % 5}


def test_a_trainer_trains_through_fewer_tokens(tmp_path: Path) -> None:
    model = classifier()
    tokred.apply(model, "tome", keep_rate=0.5)
    before = copy.deepcopy(model.state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=5,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Labelled(torch.randn(5, 3, 64, 64))
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    # Gradients arrive in every layer.
    stayed = [
        name for name, value in model.state_dict().items() if torch.equal(value, before[name])
    ]
    assert not [name for name in stayed if "q_proj.weight" in name or "mlp" in name]


@torch.no_grad()
def test_a_reduced_model_is_saved_as_the_plain_one(tmp_path: Path) -> None:
    model, images = classifier(), torch.randn(2, 3, 64, 64)
    dense = model(images).logits
    tokred.apply(model, "tome", keep_rate=0.5)
    reduced = model(images).logits
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path).eval()
    assert list(back.state_dict()) == list(model.state_dict())
    assert torch.equal(back(images).logits, dense)
    assert torch.equal(model(images).logits, reduced)
    assert not torch.allclose(reduced, dense)
