"""A patched model in the loops and pipelines that people already have: transformers' pipelines and
Trainer, torchao's dynamic quantisation, merged adapters, timm's validation loop. Real classes from
small configurations, with random weights; nothing is downloaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from families._swin import strong
from PIL import Image
from test_patching import traces
from test_transformers_swin import mask2former
from torch import Tensor, nn

import tokred
from tokred.host import find_host
from tokred.patching import reduction_of

LAYERS = 4
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
SQUARE = {"height": 64, "width": 64}


def pictures(number: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 255, (72, 80, 3), dtype=np.uint8))
        for _ in range(number)
    ]


def lively(model: nn.Module) -> nn.Module:
    """Weights under which tokens matter to the answer, through convolutions too."""
    with torch.no_grad():
        for parameter in strong(model).parameters():
            if parameter.ndim == 4:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
    return model


def vit(labels: int = 5) -> nn.Module:
    """The same one at every call."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VIT, num_labels=labels)
    model: nn.Module = strong(transformers.ViTForImageClassification(config))
    return model


def vit_processor() -> Any:
    return transformers.ViTImageProcessor(size=SQUARE)


def fewer_in_mlps(model: nn.Module) -> list[int]:
    """How many tokens each MLP of the tower is given, filled in by every pass."""
    found, tower = find_host(model)
    seen: list[int] = []
    for block in found.blocks(tower):
        widening = next(
            module
            for module in block.modules()
            if isinstance(module, nn.Linear)
            and module.out_features // module.in_features in (2, 4)  # keys, queries, values are 3
        )
        widening.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].numel() // args[0].shape[-1])
        )
    return seen


# Pipelines


def positive(model: nn.Module) -> nn.Module:
    """A depth estimator that does not end in a rectified 0."""
    last = [module for module in lively(model).head.modules() if isinstance(module, nn.Conv2d)][-1]
    nn.init.constant_(last.bias, 5.0)
    return model


def depth_pipe() -> Any:
    config = transformers.DPTConfig(
        **VIT, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8
    )
    model = positive(transformers.DPTForDepthEstimation(config))
    processor = transformers.DPTImageProcessor(size=SQUARE)
    return transformers.pipeline("depth-estimation", model=model, image_processor=processor)


def depth_anything_pipe() -> Any:
    backbone = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, mlp_ratio=2,
        image_size=70, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=32,
        neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, head_hidden_size=8,
    )  # fmt: skip
    model = positive(transformers.DepthAnythingForDepthEstimation(config))
    processor = transformers.DPTImageProcessor(
        size={"height": 84, "width": 70}, ensure_multiple_of=14
    )
    return transformers.pipeline("depth-estimation", model=model, image_processor=processor)


def classification_pipe() -> Any:
    return transformers.pipeline(
        "image-classification", model=vit(), image_processor=vit_processor()
    )


def beit_pipe() -> Any:
    config = transformers.BeitConfig(
        **VIT, out_indices=[1, 2, 3, 4], num_labels=4, use_auxiliary_head=False
    )
    model = lively(transformers.BeitForSemanticSegmentation(config))
    processor = transformers.BeitImageProcessor(size=SQUARE)
    return transformers.pipeline("image-segmentation", model=model, image_processor=processor)


def mask2former_pipe() -> Any:
    processor = transformers.Mask2FormerImageProcessor(size={"height": 60, "width": 52})
    return transformers.pipeline(
        "image-segmentation", model=strong(mask2former()), image_processor=processor
    )


def words() -> Any:
    """A tokenizer of the few words that are needed."""
    known = ["<pad>", "<end>", "This", "is", "a", "photo", "of", "cat", "dog", "."]
    model = tokenizers.models.WordLevel({w: n for n, w in enumerate(known)}, unk_token="<pad>")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>"
    )


def clip_pipe() -> Any:
    text = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10,
        "intermediate_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=16)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=SQUARE)
    return transformers.pipeline(
        "zero-shot-image-classification",
        model=strong(transformers.CLIPModel(config)),
        image_processor=processor,
        tokenizer=words(),
    )


@dataclass(frozen=True)
class Piped:
    """A pipeline, and what to do with it.

    Attributes:
        build: makes it.
        all: what keeps all tokens, and
        few: what does not: method and schedule.
        given: tokens that all MLPs of the blocks that are reduced are given, for one picture,
            dense and with few.
        options: what it is called with.
    """

    build: Callable[[], Any]
    all: tuple[Any, Any]
    few: tuple[Any, Any]
    given: tuple[int, int]
    options: dict[str, Any]


TOME = (("tome", 1.0), ("tome", 0.5))
SLIC = (("slic", tokred.Hourglass(1.0)), ("slic", tokred.Hourglass(0.5, down=1, up=3)))
# The third stage has four blocks, on 8x8 tokens (the processor pads): 2x2 windows of 4x4.
WINDOWS = tuple(("slic", tokred.Hourglass(grid=grid, down=1, up=3)) for grid in ((4, 4), (3, 3)))
# One class token, and 16 patches become 16, 8, 4, 2.
STAGED = (4 * 17, 4 + 16 + 8 + 4 + 2)

PIPES = {
    "classification": Piped(classification_pipe, *TOME, STAGED, {"top_k": 5}),
    "depth": Piped(depth_pipe, *SLIC, (4 * 17, 2 * 17 + 2 * 10), {}),
    "depth anything": Piped(depth_anything_pipe, *TOME, (4 * 31, 4 + 30 + 15 + 7 + 3), {}),
    "semantic segmentation": Piped(beit_pipe, *TOME, STAGED, {}),
    "panoptic segmentation": Piped(
        mask2former_pipe, *WINDOWS, (4 * 64, 2 * 64 + 2 * 36), {"threshold": 0.0}
    ),
    "zero-shot": Piped(clip_pipe, *TOME, STAGED, {"candidate_labels": ["cat", "dog"]}),
}


def comparable(result: Any) -> Any:
    """What a pipeline has returned, as something that `==` compares."""
    if isinstance(result, Tensor):
        return result.tolist()
    if isinstance(result, Image.Image):
        return result.size, result.tobytes()
    if isinstance(result, dict):
        return {name: comparable(value) for name, value in result.items()}
    return [comparable(one) for one in result] if isinstance(result, list) else result


@pytest.mark.parametrize("task", PIPES)
def test_a_pipeline_runs_on_fewer_tokens(task: str) -> None:
    case = PIPES[task]
    pipe = case.build()
    model, one = pipe.model, pictures(1)[0]

    def results(of: Any) -> Any:
        return comparable(of(one, **case.options))

    dense = results(pipe)
    was = traces(model)  # transformers hangs hooks of its own on a model when it first runs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tokred.apply(model, *case.all)
    assert results(pipe) == dense

    tokred.apply(pipe, *case.few)  # the pipeline, or the model in it
    few = results(pipe)
    assert few != dense
    tokred.apply(model, *case.few)
    assert results(pipe) == few
    parts = {"model": model, "image_processor": pipe.image_processor}
    if pipe.tokenizer is not None:
        parts["tokenizer"] = pipe.tokenizer
    afterwards = transformers.pipeline(pipe.task, **parts)  # around a model that is patched
    assert results(afterwards) == few

    twin = copy.deepcopy(model)
    seen = fewer_in_mlps(twin)
    transformers.pipeline(pipe.task, **{**parts, "model": twin})(one, **case.options)
    assert sum(seen) == case.given[1] < case.given[0]
    tokred.remove(twin)
    seen.clear()
    transformers.pipeline(pipe.task, **{**parts, "model": twin})(one, **case.options)
    assert sum(seen) == case.given[0]

    tokred.remove(pipe)
    assert traces(model) == was and results(pipe) == dense


def test_a_pipeline_gives_what_its_parts_give() -> None:
    pipe = classification_pipe()
    tokred.apply(pipe, "tome", keep_rate=0.5)
    inputs = vit_processor()(pictures(), return_tensors="pt")
    with torch.no_grad():
        scores = pipe.model(**inputs).logits.softmax(-1)
    for batch_size in (1, 2):
        for found, expected in zip(
            pipe(pictures(), top_k=5, batch_size=batch_size), scores, strict=True
        ):
            by_label = {one["label"]: one["score"] for one in found}
            torch.testing.assert_close(
                torch.tensor([by_label[f"LABEL_{n}"] for n in range(5)]), expected
            )
    assert "16 -> 8" in str(tokred.inspect(pipe, inputs["pixel_values"]))


# Trainer


def examples(number: int = 5) -> list[dict[str, Any]]:
    images = vit_processor()(pictures(number), return_tensors="pt")["pixel_values"]
    return [{"pixel_values": image, "labels": n % 3} for n, image in enumerate(images)]


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        per_device_eval_batch_size=2, per_device_train_batch_size=5, dataloader_pin_memory=False,
        **options,
    )  # fmt: skip


def test_evaluation_by_a_trainer_is_that_of_a_loop(tmp_path: Path) -> None:
    model = vit(3)
    found = {}
    for keep_rate in (None, 0.5):
        if keep_rate:
            tokred.apply(model, "tome", keep_rate)
        trainer = transformers.Trainer(
            model,
            arguments(tmp_path),
            eval_dataset=examples(),
            compute_metrics=lambda out: {
                "accuracy": float((out.predictions.argmax(1) == out.label_ids).mean()),
                "logits": out.predictions.tolist(),
            },
        )
        metrics = trainer.evaluate()
        logits = []
        with torch.no_grad():
            for start in (0, 2, 4):
                batch = torch.stack([one["pixel_values"] for one in examples()[start : start + 2]])
                logits.append(model(pixel_values=batch).logits)
        expected = torch.cat(logits)
        labels = torch.tensor([one["labels"] for one in examples()])
        torch.testing.assert_close(torch.tensor(metrics["eval_logits"]), expected)
        right = (expected.argmax(1) == labels).double().mean()
        assert metrics["eval_accuracy"] == pytest.approx(float(right))
        loss = float(F.cross_entropy(expected, labels))
        assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
        found[keep_rate] = expected
    assert reduction_of(model) is not None
    assert not torch.allclose(found[None], found[0.5], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_by_a_trainer_is_that_of_a_loop(tmp_path: Path, checkpointing: bool) -> None:
    model, twin = vit(3), vit(3)
    for one in (model, twin):
        tokred.apply(one, "tome", keep_rate=0.5)
    seen = fewer_in_mlps(model)
    trainer = transformers.Trainer(
        model,
        arguments(
            tmp_path, max_steps=1, max_grad_norm=0.0, lr_scheduler_type="constant",
            gradient_checkpointing=checkpointing,
        ),
        train_dataset=examples(),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )  # fmt: skip
    loss = trainer.train().training_loss
    assert sum(seen) == 5 * STAGED[1] * (2 if checkpointing else 1)

    twin.train()
    images = torch.stack([one["pixel_values"] for one in examples()])
    labels = torch.tensor([one["labels"] for one in examples()])
    step = torch.optim.SGD(twin.parameters(), lr=0.1)
    expected = twin(pixel_values=images, labels=labels).loss
    expected.backward()
    step.step()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for got, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(next(model.parameters()), next(vit(3).parameters()))

    trainer.save_model(str(tmp_path / "saved"))
    back = transformers.ViTForImageClassification.from_pretrained(tmp_path / "saved").eval()
    tokred.remove(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(back(images).logits, model(images).logits), "a plain checkpoint"


# Quantised and adapted weights. (More: tests/test_composition.py.)


@pytest.mark.parametrize(
    "weights", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_quantised_before_or_after_is_the_same(weights: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = getattr(quantization, weights)()
    plain, before, after = vit(), vit(), vit()
    inputs = vit_processor()(pictures(), return_tensors="pt")
    tokred.apply(plain, "tome", keep_rate=0.5)
    tokred.apply(after, "tome", keep_rate=0.5)
    for model in (before, after):
        quantization.quantize_(model, config)
    assert any(type(p.data) is not Tensor for p in before.parameters())
    with torch.no_grad():
        dense = before(**inputs).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            tokred.apply(before, "tome", keep_rate=1.0)
        assert torch.equal(before(**inputs).logits, dense)
        tokred.apply(before, "tome", keep_rate=0.5)
        few = before(**inputs).logits
        assert torch.equal(after(**inputs).logits, few)
        error = float((few - plain(**inputs).logits).norm() / few.norm())
        assert 0 < error < 0.2, "the rounding of eight bits"
        for model in (before, after):
            seen = fewer_in_mlps(model)
            model(**inputs)
            assert sum(seen) == 3 * STAGED[1]
            tokred.remove(model)
            assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("first", ["lora", "tokred"])
def test_adapters_are_merged_under_a_patch(first: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"],
        modules_to_save=["classifier"], init_lora_weights=False,
    )  # fmt: skip
    inputs = vit_processor()(pictures(), return_tensors="pt")
    model = vit()
    with torch.no_grad():
        plain = model(**inputs).logits
        if first == "tokred":
            tokred.apply(model, "tome", keep_rate=0.5)
        adapted = peft.get_peft_model(model, config).eval()
        if first == "lora":
            tokred.apply(adapted, "tome", keep_rate=0.5)
        few = adapted(**inputs).logits
        with adapted.disable_adapter():
            unadapted = adapted(**inputs).logits
        assert not torch.allclose(few, unadapted, rtol=1e-2, atol=1e-2)
        adapted.save_pretrained(tmp_path)
        merged = adapted.merge_and_unload()
        assert type(merged) is type(model) and reduction_of(merged) is not None
        seen = fewer_in_mlps(merged)
        torch.testing.assert_close(merged(**inputs).logits, few, rtol=1e-4, atol=1e-4)
        assert sum(seen) == 3 * STAGED[1]
        tokred.remove(merged)
        dense = merged(**inputs).logits
        assert not torch.allclose(dense, plain, rtol=1e-2, atol=1e-2), "the adapters are in it"
        loaded = peft.PeftModel.from_pretrained(vit(), tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs).logits, dense, rtol=1e-4, atol=1e-4)
        tokred.apply(loaded, "tome", keep_rate=0.5)
        torch.testing.assert_close(loaded(**inputs).logits, few, rtol=1e-4, atol=1e-4)


# timm


def test_a_validation_loop_of_timm(tmp_path: Path) -> None:
    """A folder of pictures, timm's dataset, loader, transforms and meters."""
    import timm
    from timm.utils import AverageMeter, accuracy

    for number, picture in enumerate(pictures(6)):
        folder = tmp_path / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{number}.png")
    model = strong(
        timm.create_model(
            "vit_tiny_patch16_224", img_size=64, depth=LAYERS, num_classes=3, embed_dim=48
        )
    )
    options = timm.data.resolve_data_config({"img_size": 64}, model=model)

    def validate() -> tuple[float, Tensor]:
        loader = timm.data.create_loader(
            timm.data.create_dataset("", root=str(tmp_path)), input_size=options["input_size"],
            batch_size=4, use_prefetcher=False, mean=options["mean"], std=options["std"],
            crop_pct=options["crop_pct"], interpolation=options["interpolation"], num_workers=0,
            device=torch.device("cpu"),
        )  # fmt: skip
        top1, logits = AverageMeter(), []
        with torch.inference_mode():
            for images, labels in loader:
                logits.append(model(images))
                top1.update(accuracy(logits[-1], labels)[0].item(), len(images))
        return top1.avg, torch.cat(logits)

    _, dense = validate()
    tokred.apply(model, "tome", keep_rate=0.5)
    seen = fewer_in_mlps(model)
    percent, few = validate()
    assert sum(seen) == 6 * STAGED[1]
    transform = timm.data.create_transform(**options)
    dataset = timm.data.create_dataset("", root=str(tmp_path), transform=transform)
    images, labels = zip(*dataset, strict=True)
    with torch.no_grad():
        expected = torch.cat([model(torch.stack(images[:4])), model(torch.stack(images[4:]))])
    torch.testing.assert_close(few, expected)
    assert percent == pytest.approx(
        100 * float((expected.argmax(1) == torch.tensor(labels)).float().mean())
    )
    tokred.remove(model)
    assert torch.equal(validate()[1], dense) and not torch.allclose(few, dense, atol=1e-3)
