"""A diffusion model that draws digits: a small UNet of diffusers, and a pipeline around it.

The UNet is diffusers' `UNet2DConditionModel`, the class that Stable Diffusion is made of, on pixels
instead of latents: 32x32 pixels are 1,024 tokens, and in place of a text it is given four learned
tokens per class. There are blocks with self-attention at 32x32 and at 16x16, and few convolutions
beside them. `zoo.diffusion()` has it with trained weights.

It predicts v (Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR
2022, section 4, https://arxiv.org/abs/2202.00512) under the cosine schedule of Nichol & Dhariwal
("Improved Denoising Diffusion Probabilistic Models", ICML 2021, https://arxiv.org/abs/2102.09672);
images are drawn by DPM-Solver++ (Lu et al., 2022, https://arxiv.org/abs/2211.01095) with
classifier-free guidance (Ho & Salimans, 2022, https://arxiv.org/abs/2207.12598).

Importing this module needs diffusers (`pip install "tokred[diffusers]"`).
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokred.optional import require

diffusers: Any = require("diffusers", "diffusers")

ModelMixin: Any = diffusers.ModelMixin  # `from_pretrained` looks for it beside the embedder's class

IMAGE_SIZE = 32
"""Height and width of an image, in pixels."""

CLASSES = 10
NO_CLASS = CLASSES
"""The number that stands for "no class"; guidance leads away from it."""

_TOKENS, _DIM = 4, 32
"""Every class is this many tokens, of this width."""


def build() -> DigitPipeline:
    """The pipeline with random weights."""
    return DigitPipeline(build_unet(), ClassEmbedder(), build_scheduler())


def load(file: Path) -> DigitPipeline:
    """The pipeline with the weights of a safetensors file, in evaluation mode, float32."""
    weights = require("safetensors.torch", "diffusers").load_file(file)
    pipeline = build()
    modules = nn.ModuleDict({"unet": pipeline.unet, "embedder": pipeline.embedder})
    modules.load_state_dict({key: value.float() for key, value in weights.items()})
    modules.eval()
    return pipeline


def build_unet() -> nn.Module:
    """The UNet with random weights, for images [batch, 1, 32, 32] from -1 (paper) to 1 (ink).

    Self-attention is expensive at 32x32, so there is only one transformer, of two blocks, on the
    way up. At 16x16 there are three, one on the way down and two on the way up.
    """
    unet: nn.Module = diffusers.UNet2DConditionModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        layers_per_block=(0, 1),  # on the way up there is one more
        transformer_layers_per_block=(2, 1),
        attention_head_dim=(1, 3),  # the number of heads, in spite of its name
        cross_attention_dim=_DIM,
        norm_num_groups=8,
    )
    return unet


def build_scheduler() -> Any:
    """The sampler, a `DPMSolverMultistepScheduler`. It adds no noise on its way."""
    return diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",  # the first step is the one that sees noise alone
    )


class ClassEmbedder(ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc]
    """Four learned tokens for each class, and for "no class" (`NO_CLASS`)."""

    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, classes: int = CLASSES, tokens: int = _TOKENS, dim: int = _DIM) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(classes + 1, tokens, dim))

    def forward(self, classes: Int[Tensor, " batch"]) -> Float[Tensor, "batch tokens dim"]:
        """The tokens of every class, 0 to 9 or `NO_CLASS`."""
        tokens: Tensor = self.embedding[classes]
        return tokens


class DigitPipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """Draws handwritten digits; called as diffusers' `StableDiffusionPipeline` is.

    Args:
        unet: a `UNet2DConditionModel` that takes the tokens of `embedder`.
        embedder: from classes [batch] to tokens [batch, tokens, dim].
        scheduler: any of diffusers' for v-prediction.
    """

    model_cpu_offload_seq = "embedder->unet"

    def __init__(self, unet: nn.Module, embedder: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, embedder=embedder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        num_inference_steps: int = 10,
        guidance_scale: float = 2.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "images 1 height width"] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draws the digit that each prompt names.

        Args:
            prompt: a text with one digit in it ("7", "a handwritten 7"), or a list of such.
            num_inference_steps: how often the UNet runs.
            guidance_scale: how strongly images are led to their class. With 1 or less there is no
                guidance, and the UNet runs on half as many images.
            num_images_per_prompt: the number of images for each prompt; they follow one another.
            generator: where the noise comes from. With a list, one for each image, an image does
                not depend on those that are drawn with it.
            latents: the noise itself, instead of a generator.
            output_type: "pil" for pictures; "np" for an array [images, 32, 32, 1], "pt" for a
                tensor [images, 1, 32, 32], both from 0 (paper) to 1 (ink).
            return_dict: whether to return an `ImagePipelineOutput`, or a tuple of its one field.

        Raises:
            ValueError: a prompt does not name one digit, or another argument is out of range.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type must be "pil", "np" or "pt", not {output_type!r}')
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts:
            raise ValueError(f"prompt must be a string or a list of strings, not {prompt!r}")
        digits = [read_digit(text) for text in prompts for _ in range(num_images_per_prompt)]
        if isinstance(generator, list) and len(generator) != len(digits):
            raise ValueError(
                f"a list of generators must hold one for each image: {len(digits)}, not "
                f"{len(generator)}"
            )

        classes = torch.tensor(digits, device=self._execution_device)
        if guidance_scale > 1:
            classes = torch.cat([torch.full_like(classes, NO_CLASS), classes])
        tokens = self.embedder(classes)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        noise = self._noise(len(digits), tokens.dtype, generator, latents)
        images: Any = (self._denoised(noise, tokens, guidance_scale, generator) / 2 + 0.5).clamp(
            0, 1
        )
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return diffusers.ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(
        self,
        number: int,
        dtype: torch.dtype,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Float[Tensor, "images 1 height width"] | None,
    ) -> Float[Tensor, "images 1 height width"]:
        """What sampling starts from, as large as the scheduler wants it: the given latents, or
        noise from the generator.

        Raises:
            ValueError: the latents are of another shape.
        """
        device, side = self._execution_device, self.unet.config.sample_size
        shape = (number, self.unet.config.in_channels, side, side)
        if latents is None:
            latents = diffusers.utils.torch_utils.randn_tensor(
                shape, generator=generator, device=device, dtype=dtype
            )
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, not {tuple(latents.shape)}")
        noise: Tensor = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        return noise

    def _denoised(
        self,
        x: Float[Tensor, "images 1 height width"],
        tokens: Float[Tensor, "batch tokens dim"],
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Float[Tensor, "images 1 height width"]:
        """Runs the sampler over all its steps.

        Args:
            x: the noise.
            tokens: what the UNet attends to; with guidance, first for no class, then for the
                classes.
            guidance_scale: see `__call__`.
            generator: for samplers that add noise on their way.
        """
        guided = guidance_scale > 1
        noisy = "generator" in inspect.signature(self.scheduler.step).parameters
        source = {"generator": generator} if noisy else {}
        for time in self.progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, time)
            v = self.unet(seen, time, encoder_hidden_states=tokens).sample
            if guided:
                without, with_class = v.chunk(2)
                v = without + guidance_scale * (with_class - without)
            x = self.scheduler.step(v, time, x, **source).prev_sample
        return x


def read_digit(prompt: str) -> int:
    """The one digit in a prompt.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = re.findall("[0-9]", prompt) if isinstance(prompt, str) else []
    if len(found) != 1:
        raise ValueError(
            f'a prompt must name one digit, such as "7" or "a handwritten 7", not {prompt!r}'
        )
    return int(found[0])
