"""Denoisers of diffusers: real classes from small configurations, with random weights."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models import attention_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_patching import traces
from torch import Tensor, nn

import tokred
from tokred import Around
from tokred.engine.sampling import progress_by, time_of
from tokred.reducers import Tokens, todo, tome2d

# Levels: 16x16, 8x8 and 4x4 tokens.
UNET: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "block_out_channels": (16, 32, 32),
}
SD = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}


def lively(model: nn.Module) -> nn.Module:
    """Weights under which everything matters; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                size = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A denoiser, what it is called with, and its blocks by level, those of the finest first."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    levels: dict[int, int]

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        out = model(**inputs)
        return out[0] if isinstance(out, tuple) else out.sample


def sd_inputs(batch: int, size: tuple[int, int] = (16, 16)) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, *size),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
    }


def sdxl_inputs(batch: int) -> dict[str, Any]:
    added = {"text_embeds": torch.randn(batch, 8), "time_ids": torch.randn(batch, 6)}
    return {**sd_inputs(batch), "added_cond_kwargs": added}


def pixart_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def dit_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch),
    }


def unet(**options: Any) -> nn.Module:
    return lively(diffusers.UNet2DConditionModel(**{**UNET, **options}))


def pixart() -> nn.Module:
    return lively(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=16,
            cross_attention_dim=16, caption_channels=16, in_channels=4, out_channels=8,
            use_additional_conditions=False,
        )
    )  # fmt: skip


def dit() -> nn.Module:
    return lively(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=16,
            in_channels=4, out_channels=8, num_embeds_ada_norm=10,
        )
    )  # fmt: skip


CASES = {
    "sd15": Case(lambda: unet(**SD), sd_inputs, {0: 3, 1: 3, 2: 1}),
    "sd21": Case(
        lambda: unet(**SD, use_linear_projection=True, upcast_attention=True),
        sd_inputs,
        {0: 3, 1: 3, 2: 1},
    ),
    "sdxl": Case(lambda: unet(**SDXL), sdxl_inputs, {1: 6, 2: 3 + 3 + 6}),
    "pixart": Case(pixart, pixart_inputs, {0: 3}),
    "dit": Case(dit, dit_inputs, {0: 3}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def keep_all(model: Any) -> None:
    with pytest.warns(UserWarning, match="keep_rate=1 keeps all tokens: nothing is reduced"):
        tokred.apply(model, "tome", keep_rate=1)


class Pipeline:
    """As far as tokred looks at one."""

    def __init__(self, model: nn.Module, scheduler: Any = None) -> None:
        self.unet = model
        self.scheduler = scheduler


EVERYWHERE = ("attention", "cross_attention", "mlp")


@torch.no_grad()
def test_keeping_everything_changes_no_bit(case: Case) -> None:
    model, inputs = case.build(), case.inputs(2)
    dense = case.run(model, inputs)
    keep_all(model)
    assert torch.equal(case.run(model, inputs), dense)


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "atc", "todo", "mutual", tokred.ATC("single")])
def test_fewer_tokens_give_another_answer_always_the_same(case: Case, method: Any) -> None:
    model, inputs = case.build(), case.inputs(2)
    dense = case.run(model, inputs)
    was = traces(model)
    tokred.apply(model, method, keep_rate=0.5)
    state = torch.random.get_rng_state()
    few = case.run(model, inputs)
    assert few.shape == dense.shape and few.isfinite().all()
    assert not torch.allclose(few, dense, rtol=1e-3, atol=1e-3)
    assert torch.equal(case.run(model, inputs), few)
    assert torch.equal(torch.random.get_rng_state(), state)
    tokred.remove(model)
    assert traces(model) == was
    assert torch.equal(case.run(model, inputs), dense)


@torch.no_grad()
def test_defaults_reduce_the_finest_level_that_attends(case: Case) -> None:
    model, inputs = case.build(), case.inputs(1)
    reduction = tokred.apply(model, "tome", keep_rate=0.5)
    finest = min(case.levels)
    assert f"{case.levels[finest]} blocks at level {finest}" in str(reduction)
    seen: list[int] = []
    for block in model.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            block.attn1.to_q.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape[1]))
    case.run(model, inputs)
    trace = tokred.inspect(model, inputs)
    assert len(trace.blocks) == case.levels[finest]
    assert trace.total == sum(case.levels.values())
    tokens = math.prod(trace.blocks[0].grid)
    assert seen.count(tokens // 2) >= case.levels[finest] and tokens not in seen
    assert all(block.after == tokens // 2 for block in trace.blocks)
    assert "in " in str(trace) and f"{tokens} -> {tokens // 2}" in str(trace)


@torch.no_grad()
@pytest.mark.parametrize("modules", [("attention",), ("cross_attention", "mlp"), EVERYWHERE])
def test_each_module_is_merged_called_and_copied_back(modules: tuple[str, ...]) -> None:
    """One block, written out: what enters a module is averaged over groups, what leaves it is
    copied, and nothing else changes."""
    model = unet(**SD)
    block = model.mid_block.attentions[0].transformer_blocks[0]
    tokred.apply(model, "tome", Around(0.5, modules, levels=(2,)))
    inputs = sd_inputs(2)
    seen: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    answers: list[Tensor] = []
    block.register_forward_hook(lambda _, args, y: answers.append(y))
    model(**inputs)
    x, context = seen[0], inputs["encoder_hidden_states"]
    labels = tome2d.match(x, (4, 4), 8)
    tokred.remove(model)

    def around(name: str, call: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        if name not in modules:
            return call(y)
        few = torch.stack(
            [torch.stack([y[b, labels[b] == n].mean(0) for n in range(8)]) for b in range(2)]
        )
        return torch.stack([z[label] for z, label in zip(call(few), labels, strict=True)])

    y = x + around("attention", block.attn1, block.norm1(x))
    cross = lambda z: block.attn2(z, encoder_hidden_states=context)  # noqa: E731
    y = y + around("cross_attention", cross, block.norm2(y))
    y = y + around("mlp", block.ff, block.norm3(y))
    torch.testing.assert_close(answers[0], y)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_a_shared_matching_is_that_of_the_first_block(shared: bool) -> None:
    model, inputs = unet(**SD), sd_inputs(2)
    tokred.apply(model, "tome", Around(0.5, shared=shared, levels=(0, 1)))
    blocks = tokred.inspect(model, inputs).blocks
    assert [block.level for block in blocks] == [0, 1, 1, 1, 0, 0]
    assert [block.shared for block in blocks] == [shared and n not in (0, 1) for n in range(6)]
    same = [torch.equal(block.map.labels(), blocks[0].map.labels()) for block in blocks[4:]]
    assert same == [shared, shared]


@torch.no_grad()
def test_matchings_are_kept_for_some_steps_of_one_sampling() -> None:
    model = unet(**SD)
    tokred.apply(model, "tome", Around(0.5, every=2))
    prompt = torch.randn(1, 7, 16)
    fresh = []
    for step in (900, 800, 700, 900, 800, 700):
        inputs = {**sd_inputs(1), "encoder_hidden_states": prompt.clone(), "timestep": step}
        fresh.append(not tokred.inspect(model, inputs).blocks[0].shared)
    assert fresh == [True, False, True, True, False, True]
    # Another batch has others.
    assert not tokred.inspect(model, {**sd_inputs(3), "timestep": 600}).blocks[0].shared


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "times",
    [
        (900, 800, 700, 600),
        (900, 800, 800, 700, 700, 600),  # of second order (Heun), or repeated (PNDM)
        (100, 200, 300),  # from image to noise
        (1.6, 0.4, -1.5),
    ],
)
def test_guidance_in_two_calls_is_guidance_in_one(times: tuple[float, ...], shared: bool) -> None:
    """With `every`, each prompt keeps its own matchings."""
    around = Around(0.5, every=2, shared=shared, levels=(0, 1))
    together, apart = unet(**SD), unet(**SD)
    tokred.apply(together, "tome", around)
    tokred.apply(apart, "tome", around)
    prompts = torch.randn(2, 7, 16)
    x = torch.randn(1, 4, 16, 16)
    for time in times:
        both = together(torch.cat([x, x]), time, prompts).sample
        for prompt, wanted in zip(prompts.split(1), both.split(1), strict=True):
            torch.testing.assert_close(apart(x, time, prompt).sample, wanted, rtol=1e-4, atol=1e-4)
        x = x + 0.3 * (both[1:] - 2 * both[:1])


@torch.no_grad()
def test_matchings_of_one_prompt_are_not_used_for_another() -> None:
    """Guidance ends after some steps: what was the second call of a step is the first then."""
    model = unet(**SD)
    tokred.apply(model, "tome", Around(0.5, every=4))
    x, without, text = torch.randn(1, 4, 16, 16), *torch.randn(2, 1, 7, 16)

    def shared(time: int, prompt: Tensor, batch: int = 1) -> bool:
        inputs = (x.expand(batch, -1, -1, -1), time, prompt.expand(batch, -1, -1))
        names = ("sample", "timestep", "encoder_hidden_states")
        return tokred.inspect(model, dict(zip(names, inputs, strict=True))).blocks[0].shared

    assert [shared(900, without), shared(900, text)] == [False, False]
    assert [shared(800, without), shared(800, text)] == [True, True]
    assert not shared(700, text)
    assert shared(600, text)
    # A third call of a step, and more images.
    assert [shared(999, without), shared(999, without), shared(999, text)] == [False] * 3
    assert [shared(900, without, batch=2), shared(900, without)] == [False, True]
    text.mul_(2)  # in place
    assert not shared(900, text)


@torch.no_grad()
def test_a_scheduler_that_is_set_anew_begins_another_sampling() -> None:
    model, inputs = unet(**SD), sd_inputs(1)
    pipe = Pipeline(model, diffusers.DDIMScheduler())
    tokred.apply(pipe, "tome", Around(0.5, every=8))
    fresh = []
    for start in (0, 1):  # the second one further on, as from an image
        pipe.scheduler.set_timesteps(4)
        for time in pipe.scheduler.timesteps[start : start + 2]:
            fresh.append(not tokred.inspect(pipe, {**inputs, "timestep": time}).blocks[0].shared)
    assert fresh == [True, False, True, False]


@torch.no_grad()
def test_calls_at_one_time_step_forever_are_not_all_kept() -> None:
    model, inputs = unet(**SD), sd_inputs(1)
    reduction = tokred.apply(model, "tome", Around(0.5, every=2))
    for _ in range(70):
        model(**inputs)
        known = reduction.memory.here
        # 64 of them in three blocks, and the last call.
        assert len(known.maps) <= 65 * 3 and len(known.prompts) <= 65


@torch.no_grad()
def test_tokens_are_merged_during_a_part_of_the_sampling() -> None:
    model = unet(**SD)
    inputs = sd_inputs(1)
    tokred.apply(model, "tome", Around(0.5, during=(0.2, 0.6)))
    counts = {
        step: len(tokred.inspect(model, {**inputs, "timestep": step}).blocks)
        for step in (999, 801, 799, 401, 399, 1)
    }
    assert counts == {999: 0, 801: 0, 799: 3, 401: 3, 399: 0, 1: 0}
    dense = unet(**SD)
    assert torch.equal(
        model(**{**inputs, "timestep": 1}).sample, dense(**{**inputs, "timestep": 1}).sample
    )


# What schedulers of diffusers cannot be made of their defaults, or set to a number of steps.
ODD = {
    "AmusedScheduler", "ConsistencyDecoderScheduler", "HeliosDMDScheduler", "HeliosScheduler",
    "RFD4ProteinaScheduler", "SCMScheduler", "VQDiffusionScheduler",
    "CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler",  # they need torchsde
}  # fmt: skip

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    {"shift": 3.0},
    {  # of Stable Video Diffusion
        "timestep_type": "continuous", "prediction_type": "v_prediction",
        "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0,
    },
)  # fmt: skip


def schedulers() -> list[Any]:
    found = []
    for name in dir(diffusers.schedulers):
        cls = getattr(diffusers.schedulers, name)
        if name.endswith("Scheduler") and name not in ODD and inspect.isclass(cls):
            known = inspect.signature(cls).parameters
            for options in SETTINGS:
                refused = name == "DDIMInverseScheduler" and "linspace" in options.values()
                if set(options) <= set(known) and not refused:
                    called = "-".join([name, *options])
                    found.append(pytest.param(cls, options, id=called))
    return found


def test_all_kinds_of_schedulers_are_tried() -> None:
    names = {str(one.id) for one in schedulers()}
    assert len(names) > 60
    for name in ("DDIM", "PNDM", "EulerDiscrete", "HeunDiscrete", "FlowMatchEulerDiscrete", "LCM"):
        assert f"{name}Scheduler" in names
    assert {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "DPMSolverMultistepScheduler-"
            "use_flow_sigmas-prediction_type"} <= names  # fmt: skip


@pytest.mark.parametrize(("cls", "options"), schedulers())
def test_a_sampling_goes_from_0_to_1_by_every_scheduler(cls: Any, options: Any) -> None:
    scheduler = cls(**options)
    scheduler.set_timesteps(6)
    for dtype in (torch.float64, torch.bfloat16):
        steps = torch.as_tensor(scheduler.timesteps).to(dtype)
        found = [progress_by(scheduler, time_of(step.expand(2))) for step in steps]
        assert found[0] == 0 and found[-1] >= 0.9
        # Where two time steps are nearly the same, rounding may take one for the other.
        if dtype == torch.float64:
            assert found == sorted(found) and found[-1] == 1 and len(set(found)) >= 5


@torch.no_grad()
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True,
            sigma_min=0.002, sigma_max=700.0,
        ),
        diffusers.EDMEulerScheduler(),
        diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.DDIMScheduler(),
    ],
    ids=["continuous", "edm", "karras", "flow", "ddim"],
)  # fmt: skip
def test_a_pipeline_knows_its_time_steps(scheduler: Any) -> None:
    pipe = Pipeline(unet(**SD), copy.deepcopy(scheduler))
    inputs = sd_inputs(2)

    def merged(during: tuple[float, float]) -> list[int]:
        with tokred.applied(pipe, "tome", Around(0.5, during=during)):
            # The number of steps is only known later.
            pipe.scheduler.set_timesteps(6)
            return [
                len(tokred.inspect(pipe, {**inputs, "timestep": step}).blocks)
                for step in pipe.scheduler.timesteps
            ]

    assert merged((0.0, 0.01)) == [3, 0, 0, 0, 0, 0]
    assert merged((0.0, 0.55)) == [3, 3, 3, 0, 0, 0]
    assert merged((0.55, 1.0)) == [0, 0, 0, 3, 3, 3]
    # The model alone, if it is told: by the time step.
    first, *_, last = pipe.scheduler.timesteps.tolist()
    tokred.apply(pipe.unet, "tome", Around(0.5, during=(0.2, 0.6), times=(first, last)))
    alone = [
        len(
            tokred.inspect(pipe.unet, {**inputs, "timestep": first + share * (last - first)}).blocks
        )
        for share in (0, 0.19, 0.21, 0.59, 0.61, 1)
    ]
    assert alone == [0, 0, 3, 3, 0, 0]


WRONG_TIMES: dict[str, tuple[Any, Any, str]] = {
    "fraction": (None, 964.55, "the time step 964.55 is not a whole number, as it is expected to"),
    "noise level": (None, torch.tensor([0.9, 0.9]), "is not a whole number"),
    "negative": (None, -1, r"the time step -1 is not between 1000 \(the first step\) and 0"),
    "too late": (None, 1024, "the time step 1024 is not between 1000"),
    "not a number": (None, float("nan"), "the time step nan is not"),
    "none": (None, None, "timestep must be given"),
    "several": (None, torch.tensor([900, 100]), "timestep must be the same for all images of a b"),
    "out of its own": ((1.6, -1.5), 2, r"not between 1.6 \(the first step\) and -1.5"),
    "another scheduler": (diffusers.DDIMScheduler(), 0.5, "is none of the 1000 of DDIMScheduler"),
    "another setting": (diffusers.EDMEulerScheduler(), 900, "is none of the 1001 of EDMEulerSch"),
}


@pytest.mark.parametrize("case", WRONG_TIMES)
def test_a_time_step_that_cannot_be_read_is_an_error(case: str) -> None:
    given, time, message = WRONG_TIMES[case]
    times = given if isinstance(given, tuple) else None
    pipe = Pipeline(dit(), None if times else given)
    tokred.apply(pipe, "tome", Around(0.5, during=(0.2, 0.8), times=times))
    with pytest.raises(ValueError, match=message) as error:
        pipe.unet(**{**dit_inputs(2), "timestep": time})
    assert case in ("none", "several") or "Around(..., times=(first, last))" in str(error.value)


@torch.no_grad()
def test_stable_video_diffusion_has_time_steps_of_its_own() -> None:
    build, shapes = VIDEO["svd"]
    model = lively(build())
    tokred.apply(model, "tome", Around(0.5, during=(0.0, 0.5)))
    counts = [
        len(tokred.inspect(model, {**shapes, "timestep": torch.tensor(time)}).blocks)
        for time in (1.6377, 0.5, -0.5, -1.5536)
    ]
    assert counts == [3, 3, 0, 0]
    with pytest.raises(ValueError, match="the time step 500 is not between"):
        model(**shapes, timestep=torch.tensor(500))


@torch.no_grad()
def test_a_pipelines_scheduler_goes_along_with_its_model() -> None:
    pipe = Pipeline(unet(**SD), diffusers.EDMEulerScheduler())
    pipe.scheduler.set_timesteps(4)
    tokred.apply(pipe, "tome", Around(0.5, during=(0.0, 0.5)))
    file = io.BytesIO()
    torch.save(pipe.unet, file)
    file.seek(0)
    for twin in (copy.deepcopy(pipe.unet), torch.load(file, weights_only=False)):
        for step in pipe.scheduler.timesteps:
            inputs = {**sd_inputs(1), "timestep": step}
            assert torch.equal(twin(**inputs).sample, pipe.unet(**inputs).sample)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 40)])
def test_latents_of_other_sizes(size: tuple[int, int]) -> None:
    model, inputs = unet(**SD), sd_inputs(2, size)
    for method in ("tome", "atc", "todo"):
        tokred.apply(model, method, Around(0.5, levels=(0, 1)))
        trace = tokred.inspect(model, inputs)
        assert trace.blocks[0].grid == size
        assert model(**inputs).sample.isfinite().all()


@torch.no_grad()
def test_images_do_not_mix_and_names_and_positions_are_the_same() -> None:
    model, inputs = unet(**SD), sd_inputs(3)
    tokred.apply(model, "tome", Around(0.5, EVERYWHERE))
    together = model(**inputs).sample
    by_position = model(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
    assert torch.equal(by_position.sample, together)
    for b in range(3):
        alone = {k: v[b : b + 1] if v.ndim else v for k, v in inputs.items()}
        torch.testing.assert_close(model(**alone).sample[0], together[b], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_destinations_are_drawn_from_the_generator_alone() -> None:
    model, inputs = unet(**SD), sd_inputs(1)
    answers = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        tokred.apply(model, tokred.ToMe2d(generator=generator), 0.5)
        state = torch.random.get_rng_state()
        answers.append(model(**inputs).sample)
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


def test_gradients_are_the_same_when_checkpointed() -> None:
    model, inputs = unet(**SD), sd_inputs(1)
    generator = torch.Generator()
    tokred.apply(model, tokred.ToMe2d(generator=generator), Around(0.5, EVERYWHERE, shared=True))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        generator.manual_seed(3)
        first = model(**inputs).sample.square().mean()
        # Another call before the backward pass, on another grid.
        second = model(**{**sd_inputs(1, (8, 16)), "sample": inputs["sample"][..., :8, :]})
        (first + second.sample.square().mean()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    torch.manual_seed(0)
    expected = gradients()
    model.enable_gradient_checkpointing()
    torch.manual_seed(0)
    for got, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@torch.no_grad()
def test_lora_may_be_there_before_or_come_behind() -> None:
    inputs = sd_inputs(1)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    before, behind = unet(**SD), unet(**SD)
    torch.manual_seed(1)
    before.add_adapter(config)
    dense = before(**inputs).sample
    keep_all(before)
    assert torch.equal(before(**inputs).sample, dense)
    tokred.apply(before, "tome", 0.5)
    tokred.apply(behind, "tome", 0.5)
    torch.manual_seed(1)
    behind.add_adapter(config)
    assert torch.equal(behind(**inputs).sample, before(**inputs).sample)


@torch.no_grad()
def test_a_controlnet_beside_it_or_reduced_itself() -> None:
    model, inputs = unet(**SD), sd_inputs(1)
    control = lively(
        diffusers.ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(4, 8))
    )
    image = torch.randn(1, 3, 32, 32)

    def run() -> Tensor:
        down, mid = control(
            inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"],
            controlnet_cond=image, return_dict=False,
        )  # fmt: skip
        return model(
            **inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample

    dense = run()
    keep_all(model)
    keep_all(control)
    assert torch.equal(run(), dense)
    tokred.apply(model, "tome", 0.5)
    beside = run()
    tokred.apply(control, "tome", 0.5)
    both = run()
    assert not torch.equal(beside, dense) and not torch.equal(both, beside)


@torch.no_grad()
def test_copies_and_saved_models_stand_on_their_own(tmp_path: Path) -> None:
    model, inputs = unet(**SD), sd_inputs(1)
    dense = model(**inputs).sample
    tokred.apply(model, "tome", 0.5)
    few = model(**inputs).sample
    model.save_pretrained(tmp_path)
    back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    for name, value in back.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    torch.testing.assert_close(back(**inputs).sample, dense)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    tokred.remove(model)
    for twin in twins:
        assert torch.equal(twin(**inputs).sample, few)
        tokred.remove(twin)
        assert torch.equal(twin(**inputs).sample, dense)


@torch.no_grad()
def test_models_that_were_pickled_by_former_versions_learn_what_is_new() -> None:
    """Of a host, version 0.8 kept less."""
    model = unet(**SD)
    tokred.apply(model, "tome", Around(0.5, during=(0.0, 0.5)))
    hook = next(h for h in model._forward_pre_hooks.values() if type(h).__name__ == "Begins")
    host, former = hook.host, copy.copy(hook.host)
    for name in ("timestep", "prompt", "beside", "keys", "times"):
        vars(former).pop(name)
    vars(former)["progress"] = importlib.import_module("tokred.patches._diffusers").progress
    hook.__setstate__({"reduction": hook.reduction, "host": former})
    assert hook.host == host
    counts = [len(tokred.inspect(model, {**sd_inputs(1), "timestep": t}).blocks) for t in (9, 900)]
    assert counts == [0, 3]


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "todo"])
def test_a_patched_unet_compiles_in_one_graph(method: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, inputs = unet(**SD), sd_inputs(2)
    tokred.apply(model, method, Around(0.5, shared=method == "tome"))
    expected = model(**inputs).sample
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).sample, expected)
    other = sd_inputs(2)
    compiled(**other)
    assert counter.frame_count == 1
    tokred.apply(model, method, Around(0.5, every=2))
    with pytest.raises(Exception, match="every > 1 keeps matchings from call to call"):
        torch.compile(model, backend="eager", fullgraph=True)(**other)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = unet(**SD).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in sd_inputs(1).items()}
    tokred.apply(model, "tome", Around(0.5, EVERYWHERE))
    few = model(**inputs).sample
    assert few.dtype == dtype and few.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(**sd_inputs(1)).sample.isfinite().all()


@torch.no_grad()
def test_attention_may_be_sliced() -> None:
    model, inputs = unet(**SD), sd_inputs(2)
    tokred.apply(model, "tome", 0.5)
    expected = model(**inputs).sample
    model.set_attention_slice("max")
    torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_grounded_blocks_have_their_fuser() -> None:
    model, inputs = unet(**SD, attention_type="gated"), sd_inputs(1)
    gligen = {
        "boxes": torch.rand(1, 2, 4),
        "positive_embeddings": torch.randn(1, 2, 16),
        "masks": torch.ones(1, 2),
    }
    kwargs = {"cross_attention_kwargs": {"gligen": gligen}}
    for block in model.modules():
        if hasattr(block, "fuser"):
            nn.init.constant_(block.fuser.alpha_attn, 0.5)
            nn.init.constant_(block.fuser.alpha_dense, 0.5)
    dense = model(**inputs, **copy.deepcopy(kwargs)).sample
    keep_all(model)
    assert torch.equal(model(**inputs, **copy.deepcopy(kwargs)).sample, dense)
    tokred.apply(model, "tome", 0.5)
    few = model(**inputs, **copy.deepcopy(kwargs)).sample
    assert not torch.equal(few, dense) and not torch.equal(few, model(**inputs).sample)


@torch.no_grad()
def test_motion_modules_are_left_alone() -> None:
    motion = diffusers.MotionAdapter(
        block_out_channels=(16, 32, 32), motion_layers_per_block=1, motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )  # fmt: skip
    model = diffusers.UNetMotionModel.from_unet2d(unet(**SD), motion).eval()
    inputs = {
        "sample": torch.randn(1, 4, 3, 16, 16),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(3, 7, 16),  # one for each frame
    }
    dense = model(**inputs).sample
    keep_all(model)
    assert torch.equal(model(**inputs).sample, dense)
    tokred.apply(model, "tome", 0.5)
    few = model(**inputs).sample
    assert few.shape == dense.shape and not torch.equal(few, dense)
    trace = tokred.inspect(model, inputs)
    assert {block.grid for block in trace.blocks} == {(16, 16)}
    assert not any("motion" in block.path for block in trace.blocks)


VIDEO: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "3d": (
        lambda: diffusers.UNet3DConditionModel(
            sample_size=16, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=16,
            attention_head_dim=4, norm_num_groups=4,
        ),
        {"sample": torch.ones(1, 4, 3, 16, 16), "encoder_hidden_states": torch.ones(1, 7, 16)},
    ),
    "svd": (
        lambda: diffusers.UNetSpatioTemporalConditionModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, num_frames=3,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=16, num_attention_heads=(2, 4), addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
        ),
        {
            "sample": torch.ones(1, 3, 8, 16, 16), "added_time_ids": torch.ones(1, 3),
            "encoder_hidden_states": torch.ones(1, 1, 16),
        },
    ),
    "i2vgen": (
        lambda: diffusers.I2VGenXLUNet(
            sample_size=16, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=16,
            attention_head_dim=4, num_attention_heads=None, norm_num_groups=4,
        ),
        {
            "sample": torch.ones(1, 4, 3, 16, 16), "fps": torch.ones(1),
            "image_latents": torch.ones(1, 4, 3, 16, 16), "image_embeddings": torch.ones(1, 16),
            "encoder_hidden_states": torch.ones(1, 7, 16),
        },
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", VIDEO)
def test_other_models_of_videos(name: str) -> None:
    build, shapes = VIDEO[name]
    model = lively(build())
    inputs = {key: torch.randn_like(value) for key, value in shapes.items()}
    inputs["timestep"] = torch.tensor(500)
    dense = model(**inputs)[0]
    keep_all(model)
    assert torch.equal(model(**inputs)[0], dense)
    tokred.apply(model, "tome", 0.5)
    few = model(**inputs)[0]
    assert few.shape == dense.shape and not torch.equal(few, dense)
    assert [block.grid for block in tokred.inspect(model, inputs).blocks] == [(16, 16)] * 3


@torch.no_grad()
def test_a_pipeline_is_accepted_where_its_denoiser_is_meant() -> None:
    model, inputs = unet(**SD), sd_inputs(1)
    pipe = Pipeline(model)
    dense = model(**inputs).sample
    with tokred.applied(pipe, "tome", 0.5):
        assert not torch.equal(model(**inputs).sample, dense)
        assert len(tokred.inspect(pipe, inputs).blocks) == 3
        assert tokred.flops(pipe, inputs).ratio > 1
        assert "bolya2023tomesd" in tokred.cite(pipe)
    assert torch.equal(model(**inputs).sample, dense)
    tokred.apply(pipe, "tome", 0.5)
    tokred.remove(pipe)
    assert torch.equal(model(**inputs).sample, dense)


@torch.no_grad()
def test_a_compiled_model_is_the_model_inside() -> None:
    model, inputs = unet(**SD), sd_inputs(1)
    compiled = torch.compile(model, backend="eager")
    with tokred.applied(compiled, "tome", 0.5):
        assert len(tokred.inspect(compiled, inputs).blocks) == 3
        few = model(**inputs).sample
        torch.testing.assert_close(compiled(**inputs).sample, few)
    assert not torch.equal(model(**inputs).sample, few)


@torch.no_grad()
def test_it_is_measured_against_the_dense_model_and_the_limit() -> None:
    model, inputs = unet(**SD), sd_inputs(2)
    found = tokred.bench(model, inputs, "tome", Around(0.5, EVERYWHERE), rounds=2, warmup=1)
    assert found.tokens == 256 and found.counts == (128, 128, 128) and found.batch == 2
    assert found.speed_up == pytest.approx(found.efficiency * found.free_limit)
    tokred.apply(model, "todo", 0.5)
    assert tokred.flops(model, inputs).reduced < tokred.flops(model, inputs).dense
    with pytest.raises(tokred.UnsupportedModelError, match=r"tokred\.bench measures it"):
        tokred.profile(model, inputs, "tome")


# What attention is called with, and what it makes of it


IP_ADAPTERS = (
    attention_processor.IPAdapterAttnProcessor,
    attention_processor.IPAdapterAttnProcessor2_0,
)


def with_adapter(cls: Any, pictures: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    """A UNet with an IP-adapter of four tokens for each picture, and its inputs."""
    model, processors = unet(**SD).requires_grad_(False), {}
    for name, processor in model.attn_processors.items():
        if "attn2" in name:
            attention = model.get_submodule(name.removesuffix(".processor"))
            processor = lively(cls(attention.to_q.in_features, 16, num_tokens=(4,)))
        processors[name] = processor
    model.set_attn_processor(processors)
    inputs = sd_inputs(2)
    text = inputs["encoder_hidden_states"]
    inputs["encoder_hidden_states"] = (text, [torch.randn(2, pictures, 4, 16)])
    return model, inputs


@torch.no_grad()
@pytest.mark.parametrize("cls", IP_ADAPTERS)
@pytest.mark.parametrize("method", ["tome", "atc"])
def test_masks_of_adapters_go_with_the_tokens(cls: Any, method: str) -> None:
    """One attention, written out. It is linear in the mask: what it gives without one, and so much
    of what the adapter adds as the members of a merged token have on average."""
    model, inputs = with_adapter(cls, pictures=2)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    tokred.apply(model, method, Around(0.5, ("cross_attention",)))
    attention = model.get_submodule(path)
    seen: list[Any] = []
    attention.register_forward_pre_hook(lambda _, a, k: seen.append((a, k)), with_kwargs=True)
    answers: list[Tensor] = []
    attention.register_forward_hook(lambda _, args, y: answers.append(y))
    masks = torch.rand(2, 16, 16)
    for shape in ((1, 2, 16, 16), (2, 2, 16, 16)):  # one for all images, one for each
        seen.clear(), answers.clear()
        given = masks.expand(shape).clone()
        given[1:] += 1
        inputs["cross_attention_kwargs"] = {"ip_adapter_masks": [given]}
        blocks = tokred.inspect(model, inputs).blocks
        labels = blocks[0].map.labels()
        x, context = seen[0][0][0], inputs["encoder_hidden_states"]
        tokred.remove(model)
        for image in range(2):
            groups = nn.functional.one_hot(labels[image]).float()
            groups = groups / groups.sum(0)
            few = groups.T @ x[image]
            part = (context[0][image : image + 1], [context[1][0][image : image + 1]])

            def run(*on: float, few: Tensor = few, part: Any = part) -> Tensor:
                mask = torch.tensor(on).float()[None, :, None, None].expand(1, 2, 8, 16)
                return attention(few[None], part, ip_adapter_masks=[mask])[0]

            none = run(0, 0)
            mask = given[image if len(given) > 1 else 0].flatten(1) @ groups  # [pictures, few]
            wanted = none + mask[0, :, None] * (run(1, 0) - none)
            wanted = wanted + mask[1, :, None] * (run(0, 1) - none)
            torch.testing.assert_close(
                answers[0][image], wanted[labels[image]], rtol=1e-4, atol=1e-4
            )
        tokred.apply(model, method, Around(0.5, ("cross_attention",)))


@torch.no_grad()
def test_an_adapter_does_nothing_outside_of_its_mask() -> None:
    model, inputs = with_adapter(IP_ADAPTERS[1])
    left = torch.zeros(1, 1, 64, 64)
    left[..., :32] = 1
    attention = model.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    seen: list[Tensor] = []
    attention.register_forward_hook(lambda _, args, y: seen.append(y))
    inputs["sample"] = inputs["sample"] / 10
    inputs["sample"][..., 8:] += 4  # so that tokens of the halves are not merged
    tokred.apply(model, "tome", Around(0.5, ("cross_attention",)))
    for masks in ([left], left, [0 * left], 0 * left):  # both forms
        model(**inputs, cross_attention_kwargs={"ip_adapter_masks": masks})
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    change = (seen[0] - seen[2]).abs().mean((0, 2)).view(16, 16)
    assert change[:, :7].mean() > 20 * change[:, 9:].mean()


class Positions:
    """A processor that scales every token, by a tensor that it is called with."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        scales: Any = None,
    ) -> Tensor:
        return hidden_states if scales is None else hidden_states * scales


@torch.no_grad()
@pytest.mark.parametrize("module", ["attention", "cross_attention"])
def test_tensors_that_may_go_by_tokens_are_refused(module: str) -> None:
    model, inputs = unet(**SD), sd_inputs(1)
    tokred.apply(model, "tome", Around(0.5, (module,)))
    plain = model(**inputs).sample
    kwargs = {"scales": torch.rand(1, 256, 1)}
    # Processors of diffusers are not given what they do not name.
    assert torch.equal(model(**inputs, cross_attention_kwargs=kwargs).sample, plain)
    part = model.down_blocks[0].attentions[0].transformer_blocks[0]
    (part.attn1 if module == "attention" else part.attn2).set_processor(Positions())
    with pytest.raises(ValueError, match="scales of cross_attention_kwargs may go by all tokens"):
        model(**inputs, cross_attention_kwargs={"scales": [torch.rand(1, 256, 1)]})
    model(**inputs, cross_attention_kwargs={"scales": None})
    tokred.remove(model)


@torch.no_grad()
def test_a_mask_of_the_text_for_each_token_is_refused() -> None:
    model, inputs = pixart(), pixart_inputs(1)
    tokred.apply(model, "tome", Around(0.5, EVERYWHERE))
    model(**inputs, encoder_attention_mask=torch.ones(1, 7))
    with pytest.raises(ValueError, match="a mask of all tokens cannot be used"):
        model(**inputs, encoder_attention_mask=torch.zeros(1, 64, 7))


PAG = (
    (attention_processor.PAGIdentitySelfAttnProcessor2_0, 2),
    (attention_processor.PAGCFGIdentitySelfAttnProcessor2_0, 3),
)

BLIND = {
    "pag": (PAG[0][0](), "PAGIdentitySelfAttnProcessor2_0 is not known to use"),
    "pag with guidance": (PAG[1][0](), "PAGCFGIdentitySelfAttnProcessor2_0 is not known to use"),
    "fused": (None, r"call unfuse_qkv_projections\(\)"),
    "its own": (Positions(), "Positions is not known to use"),
    "custom diffusion": (
        attention_processor.CustomDiffusionAttnProcessor2_0(
            train_kv=False, train_q_out=False, hidden_size=16
        ),
        "CustomDiffusionAttnProcessor2_0 is not known to use",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", BLIND)
def test_fewer_keys_are_refused_where_attention_would_not_use_them(name: str) -> None:
    processor, message = BLIND[name]
    model, inputs = unet(**SD), sd_inputs(6)

    def exchange() -> None:
        if processor is None:
            model.fuse_qkv_projections()
        else:
            attention = model.up_blocks[2].attentions[1].transformer_blocks[0].attn1
            attention.set_processor(processor)

    plain = model.attn_processors
    tokred.apply(model, "todo", 0.5)
    few = model(**inputs).sample
    exchange()
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    tokred.remove(model)
    was = traces(model)
    with pytest.raises(tokred.UnsupportedModelError, match=message):
        tokred.apply(model, "todo", 0.5)
    assert traces(model) == was
    # At another level it may be.
    if processor is not None:
        assert "at level 1" in str(tokred.apply(model, "todo", Around(0.5, levels=(1,))))
    # Other methods do not mind.
    tokred.apply(model, "tome", 0.5)
    assert model(**inputs).sample.isfinite().all()
    if processor is None:
        model.unfuse_qkv_projections()
    model.set_attn_processor(plain)
    tokred.apply(model, "todo", 0.5)
    assert torch.equal(model(**inputs).sample, few)


@torch.no_grad()
def test_fewer_keys_are_used_by_the_usual_processors() -> None:
    model, inputs = unet(**SD), sd_inputs(2)
    tokred.apply(model, "todo", 0.5)
    few = model(**inputs).sample
    for processor in (
        attention_processor.AttnProcessor(),
        attention_processor.AttnProcessor2_0(),
        attention_processor.SlicedAttnProcessor(1),
    ):
        model.set_attn_processor(processor)
        torch.testing.assert_close(model(**inputs).sample, few, rtol=1e-4, atol=1e-4)
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    calls = attention.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "encoder_hidden_states": args[0]}),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match="attention is called with others to make them of"):
        model(**inputs)
    calls.remove()


@torch.no_grad()
@pytest.mark.parametrize(("cls", "parts"), PAG)
def test_perturbed_guidance_is_that_of_merged_tokens(cls: Any, parts: int) -> None:
    """The batch has parts that attention treats differently: what is not perturbed is as without
    it, and in the rest every token attends to itself."""
    plain, perturbed, inputs = unet(**SD), unet(**SD), sd_inputs(parts)
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    answers: list[Tensor] = []
    seen: list[Any] = []
    for model in (plain, perturbed):
        tokred.apply(model, "tome", 0.5)
        attention = model.get_submodule(block)
        attention.register_forward_hook(lambda _, args, y: answers.append(y))
        attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    attention.set_processor(cls())
    plain(**inputs)
    labels = tokred.inspect(perturbed, inputs).blocks[0].map.labels()
    torch.testing.assert_close(answers[1][:-1], answers[0][:-1])
    groups = nn.functional.one_hot(labels[-1]).float()
    few = (groups / groups.sum(0)).T @ seen[1][-1]
    wanted = attention.to_out[0](attention.to_v(few))[labels[-1]]
    torch.testing.assert_close(answers[1][-1], wanted)


@torch.no_grad()
def test_fused_projections_may_come_before_or_behind() -> None:
    inputs = sd_inputs(2)
    before, behind = unet(**SD), unet(**SD)
    around = Around(0.5, EVERYWHERE)
    tokred.apply(behind, "tome", around)
    wanted = behind(**inputs).sample
    behind.fuse_qkv_projections()
    before.fuse_qkv_projections()
    tokred.apply(before, "tome", around)
    for model in (before, behind):
        torch.testing.assert_close(model(**inputs).sample, wanted, rtol=1e-4, atol=1e-4)
        model.unfuse_qkv_projections()
        assert torch.equal(model(**inputs).sample, wanted)


@torch.no_grad()
def test_blocks_are_told_of_where_their_modules_ran() -> None:
    """A block that something else skips is not told of."""
    model, inputs = unet(**SD), sd_inputs(1)
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    tokred.apply(model, "tome", 0.5)
    for _ in range(2):
        paths = [block.path for block in tokred.inspect(model, inputs).blocks]
        assert len(paths) == 2 and all(path.startswith("up_blocks") for path in paths)


# Refusals


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "limit": (
        lambda m: tokred.apply(m, "tome", 0.2),
        ValueError,
        r"keep_rate must be at least 0.25 for .*, as one token in 4 is a destination",
    ),
    "level": (
        lambda m: tokred.apply(m, "tome", Around(0.5, levels=(0,))),
        ValueError,
        r"levels must be some of \[1, 2\]",
    ),
    "pruning": (
        lambda m: tokred.apply(m, "topk", 0.5),
        tokred.UnsupportedModelError,
        "cannot be used around single modules",
    ),
    "schedule": (
        lambda m: tokred.apply(m, "tome", tokred.Constant(8)),
        TypeError,
        r"keep_rate must be a number or tokred.Around",
    ),
    "option": (
        lambda m: tokred.apply(m, "tome", 0.5, stage=1),
        ValueError,
        "stage must be left out for UNet2DConditionModel",
    ),
    "full grid": (
        lambda m: tokred.apply(m, "tome", 0.5, full_grid=False),
        ValueError,
        "full_grid must be left out for UNet2DConditionModel",
    ),
    "keys of what": (
        lambda m: tokred.apply(m, "todo", Around(0.5, EVERYWHERE)),
        ValueError,
        r"modules must be \('attention',\) for ToDo",
    ),
    "method": (
        lambda m: tokred.apply(m, "tomm", 0.5),
        ValueError,
        "unknown method 'tomm'",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_changes(reason: str) -> None:
    model = unet(**SDXL)
    was = traces(model)
    call, error, message = REFUSED[reason]
    with pytest.raises(error, match=message):
        call(model)
    assert traces(model) == was


def test_a_unet_without_attention_is_refused() -> None:
    model = diffusers.UNet2DConditionModel(
        **{**UNET, **SD}, only_cross_attention=True, mid_block_type=None
    )
    with pytest.raises(tokred.UnsupportedModelError, match="has no block with attention"):
        tokred.apply(model, "tome", 0.5)
    assert "3 blocks at level 0" in str(tokred.apply(model, "tome", Around(0.5, ("mlp",))))


def test_values_for_denoisers_mean_nothing_elsewhere(plain: nn.Module) -> None:
    with pytest.raises(TypeError, match="which is for denoisers"):
        tokred.apply(plain, "tome", Around(0.5))
    for options, message in (
        ({"modules": ("attn1",)}, "modules must be some of"),
        ({"levels": (-1,)}, "levels must be integers from 0 on"),
        ({"every": 0}, "every must be at least 1"),
        ({"during": (0.8, 0.2)}, "during must be"),
        ({"times": (1.0, 1.0)}, "times must be the time steps of the first and of the last step"),
        ({"times": (float("inf"), 0.0)}, "times must be"),
        ({"keep_rate": 0.0}, "keep_rate must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            Around(**options)


def test_masks_of_all_tokens_and_chunks_of_them_are_refused() -> None:
    model, inputs = unet(**SD), sd_inputs(1)
    tokred.apply(model, "tome", Around(0.5, EVERYWHERE))
    with pytest.raises(ValueError, match="a mask of all tokens cannot be used"):
        model(**inputs, attention_mask=torch.ones(1, 256))
    for block in model.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            block.set_chunk_feed_forward(64, dim=1)
    with pytest.raises(RuntimeError, match="Chunked feed-forward layers cannot be merged around"):
        model(**inputs)
    tokred.remove(model)


# The methods


def slow_match(metric: np.ndarray, grid: tuple[int, int], merges: int, at: list[int]) -> list[int]:
    """The matching by given destinations, token by token, in float64."""
    unit = metric / np.maximum(np.linalg.norm(metric, axis=1, keepdims=True), 1e-12)
    sources = [n for n in range(len(unit)) if n not in at]
    proposals = []
    for n in sources:
        similar = [float(unit[n] @ unit[m]) for m in at]
        best = max(range(len(at)), key=lambda m: (similar[m], -m))
        proposals.append((-similar[best], n, at[best]))
    group = list(range(len(unit)))
    for _, n, m in sorted(proposals)[:merges]:
        group[n] = m
    order: dict[int, int] = {}
    return [order.setdefault(g, len(order)) for g in group]


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(2, 9), st.integers(2, 9)),
    st.sampled_from([(2, 2), (1, 2), (2, 1), (3, 2)]),
    st.booleans(),
    st.integers(0, 2**31),
    st.data(),
)
def test_matching_is_that_of_the_slow_loop(
    grid: tuple[int, int], cell: tuple[int, int], drawn: bool, seed: int, data: st.DataObject
) -> None:
    if grid[0] < cell[0] or grid[1] < cell[1]:
        return
    num = grid[0] * grid[1]
    metric = torch.randn(2, num, 5, generator=torch.Generator().manual_seed(seed)).double()
    generator = torch.Generator().manual_seed(seed) if drawn else None
    at = tome2d.destinations(grid, cell, metric.device, generator).tolist()
    rows, columns = grid[0] // cell[0], grid[1] // cell[1]
    cells = {(n // grid[1] // cell[0], n % grid[1] // cell[1]) for n in at}
    assert cells == {(i, j) for i in range(rows) for j in range(columns)}
    merges = data.draw(st.integers(0, num - len(at)))
    generator = torch.Generator().manual_seed(seed) if drawn else None
    labels = tome2d.match(metric, grid, merges, cell, generator)
    for b in range(2):
        assert labels[b].tolist() == slow_match(metric[b].numpy(), grid, merges, at)
    with pytest.raises(ValueError, match=r"merges must be in"):
        tome2d.match(metric, grid, num - len(at) + 1, cell)


@given(st.tuples(st.integers(1, 12), st.integers(1, 12)), st.integers(1, 144))
def test_keys_are_those_of_nearest_neighbour_resampling(grid: tuple[int, int], keep: int) -> None:
    num = grid[0] * grid[1]
    method = tokred.ToDo()
    keep = method.fit(min(keep, num), grid)
    x = torch.arange(num)[None, :, None].float()
    token_map = method(Tokens(x, torch.ones(1, num), grid=grid), keep)
    few = todo.nearest_grid(keep, grid)
    expected = nn.functional.interpolate(x.view(1, 1, *grid), few, mode="nearest").flatten()
    assert torch.equal(token_map.down(x, torch.ones(1, num)).flatten(), expected)


@torch.no_grad()
def test_merged_tokens_are_drawn() -> None:
    model, inputs = unet(**SD), sd_inputs(2)
    tokred.apply(model, "atc", Around(0.5, levels=(0, 1)))
    trace = tokred.inspect(model, inputs)
    strips = tokred.visualise(trace, torch.rand(2, 3, 64, 64), cell=8)
    assert len(strips) == 2 and strips[0].width > 4 * 16 * 8  # the image, and three blocks
    keep_all(model)
    with pytest.raises(ValueError, match="no reductions to draw"):
        tokred.visualise(tokred.inspect(model, inputs), torch.rand(2, 3, 64, 64))
