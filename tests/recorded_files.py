"""Files that a version of tokred wrote, and how they were made.

    python tests/recorded_files.py       # writes tests/recorded/artifacts-VERSION/

tests/test_recorded_files.py reads those of version 0.7.1. Like recordings of answers (see
tests/recorded.py), they are made once, by the version that they are named after.

- `models/NAME.pt.xz`: a patched model, saved whole, with inputs, its answer and the dense model's;
  `families/LIBRARY.pt.xz`: the same of the first small model of every family, with a few values of
  its answers.
- `results.pickle.xz`: what `tokred.inspect`, `tokred.flops` and `tokred.apply` returned, pickled.
- `gates.safetensors`: what `Reduction.save` wrote, for the model `svit`.
- `cache/`: that of `tokred.evaluate`; the table that it gave, as JSON and pickled, is beside it.
- `sweep/`: the folder of a sweep of `tokred.fid`, with the report on it, and `reference/`.
- `training/METHOD/`: one that was broken off, one that was not, and the weights they started from.
"""

from __future__ import annotations

import json
import lzma
import os
import pickle
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import recorded
import torch
from recorded import called, keeping, some, surroundings
from torch import Tensor, nn

import tokred
from tokred import fid, training, zoo

FOLDER = Path(__file__).parent / "recorded" / f"artifacts-{tokred.__version__}"


# Models


@torch.no_grad()
def repeated(x: Tensor, period: int = 61) -> Tensor:
    """The first values over and over, of few digits, so that files are small when compressed."""
    flat = x.flatten()[:period].bfloat16().to(x.dtype)
    return flat[torch.arange(x.numel()) % period].reshape(x.shape)


def strong(model: nn.Module) -> nn.Module:
    """With weights under which tokens differ, in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
            parameter.copy_(repeated(parameter))
    return model.eval()


def vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    size: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_classes": 5, "depth": 4}
    size |= {"embed_dim": 16, "num_heads": 2, "mlp_ratio": 2}
    return strong(VisionTransformer(**{**size, **options}))


def swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return strong(
        SwinTransformer(
            img_size=(40, 36), patch_size=2, embed_dim=8, depths=(1, 4), num_heads=(1, 2),
            window_size=6, num_classes=5, mlp_ratio=2, strict_img_size=False,
        )
    )  # fmt: skip


def adapter() -> nn.Module:
    from tokred.models.vit_adapter import ViTAdapter

    inside = vit(img_size=64, patch_size=16, dynamic_img_size=True, embed_dim=8)
    return strong(ViTAdapter(inside, 2, heads=2, stem_width=4))


def vit_of_transformers() -> nn.Module:
    import transformers

    return strong(
        transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
                image_size=32, patch_size=8, num_labels=5,
            )
        )
    )  # fmt: skip


def unet() -> nn.Module:
    import diffusers

    return strong(
        diffusers.UNet2DConditionModel(
            sample_size=8, layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
            norm_num_groups=2, block_out_channels=(4, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )  # fmt: skip


def images(rows: int = 32, columns: int = 32, batch: int = 2) -> Tensor:
    return repeated(torch.randn(batch, 3, rows, columns), 997)


def latents() -> dict[str, Any]:
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 5, 8),
    }


def as_tome(model: nn.Module) -> None:
    import tokred.compat.tome as tome

    tome.patch.timm(model)
    model.r = 4


def as_tomesd(model: nn.Module) -> None:
    import tokred.compat.tomesd as tomesd

    tomesd.apply_patch(model, ratio=0.5, merge_mlp=True, use_rand=False)


FEW = tokred.Hourglass(grid=(4, 4), down=1, up=3)
Made = tuple[Callable[[], nn.Module], Callable[[], Any], Callable[[nn.Module], Any]]
# How each is built, what it is called with, and what is done to it. The library is that whose
# classes are pickled.
MODELS: dict[str, tuple[str, Made]] = {
    "tome": ("timm", (vit, images, keeping("tome"))),
    "atc": ("timm", (vit, images, keeping("atc"))),
    "topk": ("timm", (partial(vit, global_pool="avg"), images, keeping("topk"))),
    "svit": ("timm", (vit, images, keeping("svit"))),
    "nearest": ("timm", (vit, images, keeping("slic", reconstruction="nearest"))),
    "compat-tome": ("timm", (vit, images, as_tome)),
    "windows": ("timm", (swin, partial(images, 40, 36), keeping("slic", FEW))),
    "adapter": ("timm", (adapter, partial(images, 64, 64, 1), keeping("tome"))),
    "transformers": ("transformers", (vit_of_transformers, images, keeping("tome"))),
    "unet": ("diffusers", (unet, latents, keeping("tome"))),
    "compat-tomesd": ("diffusers", (unet, latents, as_tomesd)),
}


@torch.no_grad()
def answered(model: nn.Module, inputs: Any) -> Tensor:
    """All that a model puts out, as one tensor."""
    outputs = called(model, inputs)
    if isinstance(outputs, Tensor):
        return outputs
    parts = outputs.values() if hasattr(outputs, "values") else outputs
    return torch.cat([part.flatten() for part in parts])


def family(name: str) -> Made:
    """The first small model of a family, with weights and images that repeat themselves."""
    one = recorded.models()[name]

    def build() -> nn.Module:
        model = one.build()
        for parameter in model.parameters():
            parameter.data = repeated(parameter.data)
        return model

    def inputs() -> Any:
        x = one.inputs()
        if isinstance(x, Tensor):
            return repeated(x, 997)
        return {
            key: repeated(value, 997) if isinstance(value, Tensor) and value.ndim == 4 else value
            for key, value in x.items()
        }

    return build, inputs, one.settings["slic, hourglass" if "windows" in name else "tome"]


LIBRARIES = {
    "timm": ("timm_", "windows, timm"),
    "transformers": ("transformers_", "windows, transformers"),
    "torchvision": ("torchvision_", "windows, torchvision"),
    "open_clip_torch": ("openclip_",),
}


def kept(made: Made) -> dict[str, Any]:
    """A patched model that nobody has run, and what it answers."""
    build, inputs, change = made
    torch.manual_seed(0)
    model, x = build(), inputs()
    # What transformers hooks on at the first run cannot be pickled: another is run.
    torch.manual_seed(0)
    twin = build()
    dense = answered(twin, x)
    for one in (twin, model):
        change(one)
    return {"model": model, "inputs": x, "dense": dense, "reduced": answered(twin, x)}


def save_models(folder: Path) -> None:
    folder.mkdir()
    for name, (_, made) in MODELS.items():
        with lzma.open(folder / f"{name}.pt.xz", "wb") as file:
            torch.save(kept(made), file)


def save_families(folder: Path) -> None:
    folder.mkdir()
    first = [name for name, one in recorded.models().items() if one.first]
    for library, begins in LIBRARIES.items():
        whole = {name: kept(family(name)) for name in first if name.startswith(begins)}
        for one in whole.values():
            one.update({name: some(one[name]) for name in ("dense", "reduced")})
        with lzma.open(folder / f"{library}.pt.xz", "wb", preset=9) as file:
            torch.save(whole, file)


# Results


def digits(many: int = 24) -> list[tuple[Tensor, int]]:
    held_out = zoo.held_out("digits")
    shown = zoo.normalise(held_out.images[:many])
    return list(zip(shown, held_out.labels[:many].tolist(), strict=True))


def evaluated(cache: Path) -> Any:
    """The table of the bundled checkpoint, from the cache where it is in it."""
    return tokred.evaluate(
        zoo.load("digits"), digits(), ["tome", "topk"], [0.5], batch=8, seconds=0.01, cache=cache,
        progress=False,
    )  # fmt: skip


def save_results(file: Path) -> None:
    found: dict[str, Any] = {"traces": {}, "flops": {}, "reductions": {}, "counts": {}}
    for name in ("tome", "atc", "topk", "svit", "nearest", "windows", "unet"):
        build, inputs, change = MODELS[name][1]
        torch.manual_seed(0)
        model, x = build(), inputs()
        reduction = change(model)
        found["traces"][name] = tokred.inspect(model, x)
        found["reductions"][name] = reduction
        if name != "unet":
            side = 6 if name == "windows" else 4
            found["counts"][name] = reduction.counts(side**2, (side, side))
            found["flops"][name] = tokred.flops(model, x)
    with lzma.open(file, "wb") as opened:
        pickle.dump(found, opened)


# A sweep

SWEEP = fid.Sweep(("tome", "atc:complete"), (0.5,), ("1", "2", "3"), images=3, steps=1)


def pipeline() -> Any:
    pipe = zoo.diffusion()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_sweep(out: Path, reference: Path) -> None:
    from PIL import Image

    reference.mkdir()
    for number, image in enumerate(zoo.held_out("digits").images[:6, 0].numpy()):
        Image.fromarray(image).resize((32, 32)).save(reference / f"{number}.png")
    fid.generate(pipeline(), SWEEP, out, model="digits_diffusion", batch=2)
    scores = fid.score(SWEEP, out, reference, fid.DigitFeatures())
    fid.report(SWEEP, out, scores)
    for shown in ("fid.png", "contact.png"):  # nobody reads these again
        (out / shown).unlink()
    # Where the reference was is nobody's business.
    told = json.loads((out / "fid.json").read_text())
    told["reference"]["folder"] = "reference"
    (out / "fid.json").write_text(json.dumps(told, indent=1))


# Training


class Digits:
    """A few of the bundled images, with noise that differs by epoch and sample."""

    def __init__(self, many: int = 26) -> None:
        self.pairs = digits(many)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.pairs[index]
        return image + 0.1 * torch.randn(1, 56, 56), label


def to_train(method: str, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """A small model that `method` is applied to, with these weights."""
    torch.manual_seed(0)
    model = vit(img_size=56, in_chans=1, num_classes=10, embed_dim=8, num_heads=1)
    if weights is not None:
        model.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that gates are random
        tokred.apply(model, method, keep_rate=0.7)
    return model


def recipe(method: str) -> training.Recipe:
    frozen = method == "svit"
    return training.Recipe(
        epochs=2, batch=8, lr=1e-3, gate_lr=1e-2, frozen=frozen, kl=1.0 if frozen else 0.0
    )


def fitted(model: nn.Module, method: str, out: Path, **options: Any) -> training.Fitted:
    return training.fit(
        model, Digits(), recipe(method), out, validate=Digits(9), every=2, bar=False, **options
    )


def stop(step: int, row: object) -> None:
    if step == 5:  # a step after the last checkpoint
        raise KeyboardInterrupt


def save_training(folder: Path) -> None:
    from safetensors.torch import save_file

    for method in ("tome", "svit"):
        (folder / method).mkdir(parents=True)
        start = to_train(method)
        save_file(start.state_dict(), folder / method / "start.safetensors")
        fitted(start, method, folder / method / "whole")
        with suppress(KeyboardInterrupt):
            fitted(to_train(method), method, folder / method / "parts", on_step=stop)
        for shown in (folder / method).glob("*/curve.png"):
            shown.unlink()
        for run in ("whole", "parts"):  # the last checkpoint alone is read
            for old in sorted((folder / method / run / "checkpoint").glob("*.pt"))[:-1]:
                old.unlink()


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    FOLDER.mkdir(parents=True)
    about = {"version": tokred.__version__, **surroundings()}
    (FOLDER / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    save_models(FOLDER / "models")
    save_families(FOLDER / "families")
    torch.manual_seed(0)
    model = vit()
    images()
    keeping("svit")(model).save(FOLDER / "gates.safetensors")
    save_results(FOLDER / "results.pickle.xz")
    table = evaluated(FOLDER / "cache")
    (FOLDER / "evaluation.json").write_text(json.dumps(table.as_dict(), indent=1) + "\n")
    with (FOLDER / "evaluation.pickle").open("wb") as file:
        pickle.dump(table, file)
    save_sweep(FOLDER / "sweep", FOLDER / "reference")
    save_training(FOLDER / "training")


if __name__ == "__main__":
    main()
