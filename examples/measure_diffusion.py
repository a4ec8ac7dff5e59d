"""Measures how well the bundled diffusion model draws, by number of steps and guidance.

    pip install "tokred[timm,diffusers]" tqdm
    python examples/measure_diffusion.py --steps 5 10 20 --guidance 1 2 4

prints, for each setting, how many images the checkpoint `digits` reads as the digit that was asked
for, and their Frechet distance (Heusel et al., NeurIPS 2017, https://arxiv.org/abs/1706.08500) from
drawings of the held-out digits, in the 64 features that this checkpoint reads digits by. Image i is
a digit i mod 10 from noise of seed i, in every setting the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tokred.data import zoo
from tokred.models import digit_diffusion

DRAWINGS = 4
"""How often each held-out digit is drawn, for the distribution that is compared with."""

SAMPLERS = {
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=500, help="of each setting")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--steps", type=int, nargs="+", default=[10])
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0])
    parser.add_argument("--samplers", choices=sorted(SAMPLERS), nargs="+", default=["dpm"])
    parser.add_argument("--weights", type=Path, help="a file other than the bundled one")
    parser.add_argument(
        "--blind", action="store_true", help="replace self-attention at 32x32 by zeros"
    )
    options = parser.parse_args()

    pipeline = digit_diffusion.load(options.weights) if options.weights else zoo.diffusion()
    pipeline.set_progress_bar_config(disable=True)
    if options.blind:
        for block in pipeline.unet.up_blocks[-1].attentions[0].transformer_blocks:
            block.attn1.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
    classifier = zoo.load("digits")
    held_out = zoo.held_out("digits")
    generator = torch.Generator().manual_seed(0)
    drawn = [
        zoo.draw(held_out.digits, generator, "digits", digit_diffusion.IMAGE_SIZE).float() / 255
        for _ in range(DRAWINGS + 1)
    ]
    expected, answers = read(classifier, torch.cat(drawn[1:]))
    right = (answers == held_out.labels.repeat(DRAWINGS)).float().mean()
    least = frechet(read(classifier, drawn[0])[0], expected)
    print(f"held-out digits: accuracy {right:.1%}, Frechet {least:.2f} if they are drawn once more")
    print("sampler  steps  guidance  accuracy  Frechet  s/100 images")
    for name in options.samplers:
        pipeline.scheduler = SAMPLERS[name].from_config(pipeline.scheduler.config)
        for steps in options.steps:
            for guidance in options.guidance:
                begin = time.process_time()
                images = generate(pipeline, options.images, options.batch, steps, guidance)
                seconds = time.process_time() - begin
                features, answers = read(classifier, images)
                right = (answers == torch.arange(len(images)) % 10).float().mean()
                print(
                    f"{name:7}  {steps:5}  {guidance:8.1f}  {right:8.1%}  "
                    f"{frechet(features, expected):7.2f}  {100 * seconds / len(images):6.1f}",
                    flush=True,
                )


def generate(
    pipeline: Any, images: int, batch: int, steps: int, guidance: float
) -> Float[Tensor, "images 1 32 32"]:
    """Image i is a digit i mod 10, from noise of seed i."""
    parts = []
    for chunk in tqdm(torch.arange(images).split(batch), leave=False):
        seeds = chunk.tolist()
        drawn = pipeline(
            [str(seed % 10) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        )
        parts.append(drawn.images)
    return torch.cat(parts)


@torch.no_grad()
def read(
    classifier: Any, images: Float[Tensor, "images 1 32 32"]
) -> tuple[Float[Tensor, "images 64"], Tensor]:
    """The features of images from 0 to 1, and the digits that they are taken for."""
    size = (zoo.IMAGE_SIZE, zoo.IMAGE_SIZE)
    larger = F.interpolate(images, size, mode="bilinear", antialias=True) * 2 - 1
    features = torch.cat(
        [
            classifier.forward_head(classifier.forward_features(part), pre_logits=True)
            for part in larger.split(50)
        ]
    )
    return features, classifier.head(features).argmax(1)


def frechet(a: Float[Tensor, "some dim"], b: Float[Tensor, "others dim"]) -> float:
    """Between Gaussians of the same means and covariances: |m - n|^2 + tr(A + B - 2 (AB)^1/2)."""
    first, second = a.double().numpy(), b.double().numpy()
    apart = first.mean(0) - second.mean(0)
    cov_a, cov_b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # AB has the eigenvalues of the symmetric matrix A^1/2 B A^1/2.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    return float(apart @ apart + np.trace(cov_a + cov_b) - 2 * np.sqrt(mixed).sum())


if __name__ == "__main__":
    main()
