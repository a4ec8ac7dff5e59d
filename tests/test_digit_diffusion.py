"""The bundled diffusion model draws digits that the bundled classifier reads, and its pipeline does
what diffusers' pipelines do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tokred
from tokred.data import zoo

diffusers = pytest.importorskip("diffusers")

from tokred.models import digit_diffusion  # noqa: E402
from tokred.models.digit_diffusion import NO_CLASS, read_digit  # noqa: E402


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = zoo.diffusion()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def read(images: torch.Tensor) -> torch.Tensor:
    """The digits that the checkpoint `digits` takes images from 0 to 1 for."""
    larger = F.interpolate(images, (zoo.IMAGE_SIZE, zoo.IMAGE_SIZE), mode="bilinear")
    answers: torch.Tensor = zoo.load("digits")(larger * 2 - 1).argmax(1)
    return answers


@torch.no_grad()
def share_read(pipeline: Any, num: int) -> float:
    """Of `num` images by the default settings, as many of each digit."""
    wanted = torch.arange(num) % 10
    prompts = [str(digit) for digit in wanted.tolist()]
    drawn = pipeline(prompts, generator=seeded(*range(num)), output_type="pt").images
    return float((read(drawn) == wanted).float().mean())


def test_draws_digits_that_can_be_read(pipeline: Any) -> None:
    assert share_read(pipeline, 10) >= 0.8


@pytest.mark.slow
def test_draws_digits_that_can_be_read_nearly_always(pipeline: Any) -> None:
    assert share_read(pipeline, 200) >= 0.95


def test_an_image_does_not_depend_on_those_beside_it(pipeline: Any) -> None:
    options = {"num_inference_steps": 3, "output_type": "pt"}
    together = pipeline(["1", "5", "8"], generator=seeded(3, 4, 5), **options).images
    alone = pipeline("5", generator=seeded(4), **options).images
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=0)
    assert (together[1] - together[2]).abs().max() > 0.1


def test_the_same_noise_gives_the_same_image(pipeline: Any) -> None:
    options = {"num_inference_steps": 2, "output_type": "pt"}
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(7))
    by_seed = pipeline("5", generator=torch.Generator().manual_seed(7), **options).images
    by_noise = pipeline("5", latents=noise, **options).images
    torch.testing.assert_close(by_seed, by_noise)


def test_leaves_the_global_random_state_alone(pipeline: Any) -> None:
    before = torch.get_rng_state()
    pipeline("3", num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_hands_out_pictures_arrays_and_tensors(pipeline: Any) -> None:
    drawn = {
        kind: pipeline(
            ["1", "2"], num_inference_steps=1, generator=seeded(0, 1), output_type=kind
        ).images
        for kind in ("pil", "np", "pt")
    }
    tensor, array = drawn["pt"], drawn["np"]
    assert tensor.shape == (2, 1, 32, 32) and array.shape == (2, 32, 32, 1)
    assert float(tensor.min()) >= 0 and float(tensor.max()) <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    for picture, values in zip(drawn["pil"], array, strict=True):
        assert (picture.mode, picture.size) == ("L", (32, 32))
        np.testing.assert_array_equal(np.asarray(picture), (values[..., 0] * 255).round())


def test_draws_several_images_of_a_prompt(pipeline: Any) -> None:
    options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt"}
    twice = pipeline(["1", "2"], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), **options)
    written_out = pipeline(["1", "1", "2", "2"], generator=seeded(0, 1, 2, 3), **options)
    assert torch.equal(twice.images, written_out.images)
    as_tuple = pipeline(
        ["1", "1", "2", "2"], generator=seeded(0, 1, 2, 3), return_dict=False, **options
    )
    assert torch.equal(as_tuple[0], written_out.images)


@torch.no_grad()
def test_guidance_is_what_the_class_adds_in_one_batch_of_both(pipeline: Any) -> None:
    noise = torch.randn(2, 1, 32, 32)
    batches: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt", "latents": noise}
    pipeline(["4", "9"], guidance_scale=1.0, **options)
    guided = pipeline(["4", "9"], guidance_scale=3.0, **options).images
    hook.remove()
    assert batches == [2, 4]

    scheduler = digit_diffusion.build_scheduler()
    scheduler.set_timesteps(1)
    time = scheduler.timesteps[0]
    without, given = (
        pipeline.unet(noise, time, pipeline.embedder(torch.tensor(classes))).sample
        for classes in ([NO_CLASS, NO_CLASS], [4, 9])
    )
    expected = scheduler.step(without + 3 * (given - without), time, noise).prev_sample
    torch.testing.assert_close(guided, (expected / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
def test_other_samplers_serve_as_well(scheduler: str) -> None:
    pipeline = zoo.diffusion()
    pipeline.set_progress_bar_config(disable=True)
    other = getattr(diffusers, scheduler)
    pipeline.scheduler = other.from_config(pipeline.scheduler.config)
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    first, again = (pipeline(["2", "3"], generator=seeded(0, 1), **options).images for _ in "12")
    assert torch.isfinite(first).all() and torch.equal(first, again)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("DDIMScheduler", {}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        ("FlowMatchEulerDiscreteScheduler", {}),
    ],
)
def test_merges_in_the_part_of_the_sampling_that_was_asked_for(
    scheduler: str, options: dict[str, Any]
) -> None:
    pipeline = zoo.diffusion()
    pipeline.set_progress_bar_config(disable=True)
    made = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **options)
    if not hasattr(made, "scale_model_input"):  # of flow matching, which the pipeline is not for
        made.init_noise_sigma = 1.0
        made.scale_model_input = lambda x, time: x
    steps: list[float] = []
    merged: list[float] = []

    def seen(module: torch.nn.Module, args: Any) -> None:
        steps.append(float(args[1]))

    def fewer(module: torch.nn.Module, args: Any) -> None:
        if args[0].shape[1] < 1024:
            merged.append(steps[-1])

    hooks = [pipeline.unet.register_forward_pre_hook(seen)]
    for block in pipeline.unet.up_blocks[1].attentions[0].transformer_blocks:
        hooks.append(block.attn1.to_q.register_forward_pre_hook(fewer))
    pipeline.scheduler = made
    for during, count in (((0.0, 0.01), 1), ((0.99, 1.0), 1), ((0.0, 1.0), 4)):
        steps.clear()
        merged.clear()
        with tokred.applied(pipeline, "tome", tokred.Around(0.5, during=during, every=2)):
            pipeline("7", num_inference_steps=4, generator=seeded(0), output_type="pt")
        assert len(steps) == 4 and len(set(merged)) == count and len(merged) == 2 * count
        assert during[0] > 0 or merged[0] == steps[0]
        assert during[1] < 1 or merged[-1] == steps[-1]


def test_shows_its_progress_unless_it_is_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = digit_diffusion.build()
    pipeline("0", num_inference_steps=1)
    assert "1/1" in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    pipeline("0", num_inference_steps=1)
    assert capsys.readouterr().err == ""


def test_is_saved_and_loaded_as_pipelines_are(tmp_path: Path, pipeline: Any) -> None:
    pipeline.save_pretrained(tmp_path)
    again = digit_diffusion.DigitPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt"}
    images, expected = (
        each("6", generator=seeded(1), **options).images for each in (again, pipeline)
    )
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize("prompt", ["7", "a handwritten 7", "7!", "digit7"])
def test_reads_the_digit_of_a_prompt(prompt: str) -> None:
    assert read_digit(prompt) == 7


@pytest.mark.parametrize("prompt", ["", "seven", "77", "3 or 4", "\u0667"])
def test_a_prompt_without_one_digit_is_refused(pipeline: Any, prompt: str) -> None:
    for each in (prompt, ["1", prompt]):
        with pytest.raises(ValueError, match=r"must name one digit, such as .* not "):
            pipeline(each)


def test_arguments_out_of_range_are_refused(pipeline: Any) -> None:
    for prompt in (7, [], ("7",), None):
        with pytest.raises(ValueError, match="prompt must be a string or a list of strings, not"):
            pipeline(prompt)
    with pytest.raises(ValueError, match=r"must name one digit, .* not 7"):
        pipeline(["1", 7])
    with pytest.raises(ValueError, match="generators must hold one for each image: 2, not 1"):
        pipeline(["1", "2"], generator=seeded(0))
    with pytest.raises(ValueError, match='output_type must be "pil", "np" or "pt", not \'latent\''):
        pipeline("1", output_type="latent")
    with pytest.raises(ValueError, match=r"latents must have shape \(1, 1, 32, 32\), not \(2, 1"):
        pipeline("1", latents=torch.zeros(2, 1, 32, 32))


def test_has_self_attention_over_pixels_and_over_fours_of_them(pipeline: Any) -> None:
    tokens: list[int] = []
    blocks = [module for name, module in pipeline.unet.named_modules() if name.endswith(".attn1")]
    hooks = [
        block.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
        for block in blocks
    ]
    pipeline("0", num_inference_steps=1)
    for hook in hooks:
        hook.remove()
    assert sorted(tokens) == [256] * 3 + [1024] * 2


def test_the_zoo_does_not_import_diffusers_until_it_is_asked() -> None:
    program = "import sys\nfrom tokred import zoo\nassert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
