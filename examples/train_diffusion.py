"""Trains the bundled diffusion model again, in about an hour on one core.

    pip install "tokred[timm,diffusers]" scikit-learn tqdm
    python examples/train_diffusion.py --minutes 60

writes digits_diffusion.safetensors (the averaged weights, float16). A checkpoint is written every
minute; `--resume` goes on from it. Every random number follows from `--seed`; how many steps there
are follows from `--minutes`, which count the time that the processor works, not pauses.

The recipe: images are drawn anew for every step. A part of the time goes to images of 16x16 pixels,
for which the same weights serve (the net has no positions) at a fifth of the cost; then come
images of 32x32. The loss is the mean square of v, which weighs all noise levels about alike; those
of a batch are spread evenly. One image in eight is shown without its class. AdamW, a warm-up, then
half a cosine; an exponential average of the weights is what is kept, and nothing is selected.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from train_digits import split

from tokred.data import zoo
from tokred.models import digit_diffusion
from tokred.models.digit_diffusion import IMAGE_SIZE, NO_CLASS

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder to write to")
    parser.add_argument("--minutes", type=float, default=60.0, help="of work, pauses left out")
    parser.add_argument("--small", type=float, default=0.25, help="part of them at 16x16")
    parser.add_argument("--rate", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    pipeline = digit_diffusion.build()
    model = nn.ModuleDict({"unet": pipeline.unet, "embedder": pipeline.embedder})
    average = train(model, pipeline.scheduler.alphas_cumprod, options)
    weights = {name: value.half().contiguous() for name, value in average.items()}
    save_file(weights, options.out / "digits_diffusion.safetensors")


def train(model: nn.ModuleDict, alphas: Tensor, options: argparse.Namespace) -> dict[str, Tensor]:
    """Trains the UNet and the embedder, and returns the average of their weights.

    Args:
        model: has `unet` and `embedder`.
        alphas: the share of the image in the variance at every time, `alphas_cumprod`.
        options: those of the command.
    """
    seen = split()[0]
    generator = torch.Generator().manual_seed(options.seed)
    optimiser = adam(model)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    step, minutes, smooth = 0, 0.0, 1.0
    so_far = options.out / "digits_diffusion_so_far.pt"
    if options.resume:
        kept = torch.load(so_far)
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        generator.set_state(kept["generator"])
        average, smooth = kept["average"], kept["smooth"]
        step, minutes = kept["step"], kept["minutes"]

    unet: Any = model["unet"]
    clock, saved = worked(), minutes
    with tqdm(total=options.minutes, unit="min", mininterval=10) as bar:
        while minutes < options.minutes:
            small = minutes < options.small * options.minutes
            side = IMAGE_SIZE // 2 if small else IMAGE_SIZE
            noisy, times, shown, v = drawn(*seen, generator, side, alphas)
            rate = options.rate * schedule(step, minutes / options.minutes)
            for group in optimiser.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16, enabled=not small):
                tokens = model["embedder"](shown)
                predicted = unet(noisy, times, encoder_hidden_states=tokens).sample
            loss = (predicted.float() - v).square().mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            with torch.no_grad():
                follow = max(1 - 0.999, 9 / (10 + step))  # at first, the average keeps up
                for name, value in model.state_dict().items():
                    average[name].lerp_(value, follow)

            smooth += (loss.item() - smooth) * max(0.01, 1 / step)
            now = worked()
            minutes, clock = minutes + now - clock, now
            bar.update(min(minutes, options.minutes) - bar.n)
            bar.set_postfix_str(f"step {step}, {side}x{side}, loss {smooth:.4f}", refresh=False)
            if minutes - saved > 1 or minutes >= options.minutes:
                saved = minutes
                kept = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
                kept |= {"generator": generator.get_state(), "average": average}
                kept |= {"smooth": smooth, "step": step, "minutes": minutes}
                torch.save(kept, so_far.with_suffix(".tmp"))
                so_far.with_suffix(".tmp").replace(so_far)
    print(f"{step} steps, seed {options.seed}, loss of the last hundred or so: {smooth:.4f}")
    return average


def adam(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
    )


def drawn(
    digits: Tensor, classes: Tensor, generator: torch.Generator, side: int, alphas: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch: noisy images, their times, the classes that the model is told, and v."""
    chosen = torch.randint(len(digits), (BATCH,), generator=generator)
    images = zoo.normalise(zoo.draw(digits[chosen], generator, "digits", side))
    shown = classes[chosen]
    shown[torch.rand(BATCH, generator=generator) < 1 / 8] = NO_CLASS

    spread = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    times = (spread * len(alphas)).long()
    noise = torch.randn(images.shape, generator=generator)
    share = alphas[times, None, None, None]
    noisy = share.sqrt() * images + (1 - share).sqrt() * noise
    v = share.sqrt() * noise - (1 - share).sqrt() * images
    return noisy, times, shown, v


def worked() -> float:
    """Minutes that this process has worked, on all its threads at once."""
    return time.process_time() / torch.get_num_threads() / 60


def schedule(step: int, done: float) -> float:
    """The learning rate, as a share of the highest: 100 steps of warm-up, half a cosine."""
    return min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))


if __name__ == "__main__":
    main()
