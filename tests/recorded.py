"""What a version of tokred answers on small models of every family, and how it is written down.

    python tests/recorded.py       # writes tests/recorded/VERSION.{safetensors,json}

tests/test_recorded.py compares the code with what version 0.7.1 wrote. A recording is made once, by
the version that it is named after, and never again: what a later version computes is no reference.

Every case is a model, a setting and a form:

- a model of tests/families, or one of those below, with weights and inputs drawn behind a seed;
- a setting: a method and what it keeps;
- a form: "eager", "gradient" (of the answer, by the images), "training" (with gates: their
  masked form and its gradient), "compiled" (in one graph, by `aot_eager`) or "inductor".

Of an answer, a few values are stored, from places that are drawn once, and the SHA-256 of all of
its bytes. Of a case that is refused or raises, the name of the exception is.

Only public names of tokred are used here, so that any version can run this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import tokred

FOLDER = Path(__file__).parent / "recorded"
VALUES = 64  # of every answer, at most
LIBRARIES = (
    "torch", "numpy", "scipy", "numba", "timm", "transformers", "torchvision", "open_clip_torch",
    "diffusers",
)  # fmt: skip
WINDOWED = ("timm", "torchvision", "transformers", "timm-sam", "transformers-vitdet")

Apply = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Model:
    """A small model, and what it is recorded with.

    Attributes:
        build: makes it, in evaluation mode, behind `torch.manual_seed`.
        inputs: makes inputs for two images.
        answer: takes what is compared out of the outputs.
        settings: what to apply, by name.
        features: what the model hands out between its blocks; None if it hands out nothing.
        first: whether it is the first of its family, which is also trained and compiled.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    answer: Callable[[Any], Any]
    settings: Mapping[str, Apply]
    features: Callable[[nn.Module, Any], list[Tensor]] | None = None
    first: bool = False


# Settings


def keeping(method: Any, keep: Any = 0.5, **options: Any) -> Apply:
    """Applies a method; the gates of a learned one are drawn, so that they keep about half."""

    def applied(model: nn.Module) -> Any:
        reduction = tokred.apply(model, method, keep, **options)
        gates = getattr(reduction, "gates", None)
        if gates is not None:
            torch.manual_seed(2)
            for module in gates.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=1.0)
                    nn.init.zeros_(module.bias)
        return reduction

    return applied


TOKENS = {name: keeping(name) for name in ("tome", "atc", "topk", "svit")}
DENSE = {**TOKENS, "slic": keeping("slic")}
# The first model of all is tried with everything.
EVERYTHING = {
    **{name: keeping(name) for name in sorted(tokred.methods())},
    "tome, reduced features": keeping("tome", full_grid=False),
    "topk, reduced features": keeping("topk", full_grid=False),
    "tome, not proportional": keeping("tome", proportional_attention=False),
    "atc, nearest": keeping("atc", reconstruction="nearest"),
    "atc, single": keeping(tokred.ATC(linkage="single")),
    "evit, linear": keeping("evit", tokred.Linear(5)),
    "tome, constant": keeping("tome", tokred.Constant(3)),
    "dpc_knn, exactly": keeping("dpc_knn", tokred.Exactly((16, 9, 5, 2))),
    "slic, hourglass": keeping("slic", tokred.Hourglass(grid=(2, 2), down=1, up=3)),
    "svit, shares": keeping("svit", tokred.Shares((1, 0.75, 0.5, 0.25))),
}
DENOISING = {
    **{name: keeping(name) for name in ("tome", "atc", "todo", "mutual")},
    "tome, everywhere": keeping(
        "tome", tokred.Around(0.5, ("attention", "cross_attention", "mlp"))
    ),
    "tome, shared": keeping("tome", tokred.Around(0.5, shared=True)),
}


def in_windows(few: tuple[int, int]) -> dict[str, Apply]:
    return {
        **{name: keeping(name) for name in ("tome", "atc", "topk", "slic")},
        "slic, hourglass": keeping("slic", tokred.Hourglass(grid=few, down=1, up=3)),
    }


# Models


def of_families() -> Iterator[tuple[str, Model]]:
    """Those that tests/test_hosts.py is run on."""
    import families

    for file in sorted(Path(families.__path__[0]).glob("[a-z]*.py")):
        small = import_module(f"families.{file.stem}").SMALL
        for number, (name, one) in enumerate(small.items()):
            settings = DENSE if file.stem == "timm_adapter" else TOKENS
            if file.stem == "timm_vit" and number == 0:
                settings = EVERYTHING
            yield (
                f"{file.stem}, {name}",
                Model(
                    one.build,
                    partial(one.inputs, 2),
                    one.answer,
                    settings,
                    one.features,
                    number == 0,
                ),
            )


def of_windows() -> Iterator[tuple[str, Model]]:
    """Swin Transformers and SAM's encoders: what tests/test_windows.py is run on."""
    from families._swin import FEW, SWIN, images

    for name, one in SWIN.items():
        yield (
            f"windows, {name}",
            Model(one.build, images, one.answer, in_windows(FEW), first=name in WINDOWED),
        )
    for name in SAM:
        yield (
            f"windows, transformers {name}",
            Model(
                partial(sam, name),
                lambda: torch.randn(2, 3, 32, 32),
                lambda outputs: outputs[0],
                in_windows((3, 3)),
                states_of_sam,
                name == "sam",
            ),
        )


SAM_SIZE = {
    "image_size": 32, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "window_size": 4, "global_attn_indexes": [1, 3], "mlp_dim": 64,
    "output_channels": 16,
}  # fmt: skip
PP = {"post_conv_in_channels": 16, "post_conv_mid_channels": 8, "post_conv_out_channels": 8}
SAM = {
    "sam": "SamVision",
    "sam_hq": "SamHQVision",
    "got_ocr2": "GotOcr2Vision",
    "deepseek_ocr2": "DeepseekOcr2SamVision",
    "unlimited_ocr": "UnlimitedOcrSamVision",
    "slanext": "SLANeXtVision",
    "pp_formulanet": "PPFormulaNetVision",
}


def sam(name: str) -> nn.Module:
    from families._swin import strong

    folder = f"transformers.models.{name}"
    config = getattr(import_module(f"{folder}.configuration_{name}"), f"{SAM[name]}Config")
    modeling = import_module(f"{folder}.modeling_{name}")
    kind = "Model" if name == "pp_formulanet" else "Encoder"
    model = getattr(modeling, SAM[name] + kind)(
        config(**SAM_SIZE, **(PP if name == "pp_formulanet" else {}))
    )
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            nn.init.normal_(parameter, std=0.5 if "pos" in parameter_name else 0.2)
    return strong(model)


def states_of_sam(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(model(x, output_hidden_states=True).hidden_states)


def of_denoisers() -> Iterator[tuple[str, Model]]:
    import diffusers

    unet = diffusers.UNet2DConditionModel
    size: dict[str, Any] = {
        "sample_size": 16, "layers_per_block": 1, "cross_attention_dim": 16,
        "attention_head_dim": 2, "norm_num_groups": 4, "block_out_channels": (16, 32, 32),
    }  # fmt: skip
    sd = {
        **size,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    sdxl = {
        **size,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    }  # fmt: skip
    transformer = {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 16,
        "in_channels": 4, "out_channels": 8,
    }  # fmt: skip
    pixart = {
        **transformer, "cross_attention_dim": 16, "caption_channels": 16,
        "use_additional_conditions": False,
    }  # fmt: skip
    kinds = {
        "sd15": (unet, sd, latents),
        "sd21": (unet, {**sd, "use_linear_projection": True, "upcast_attention": True}, latents),
        "sdxl": (unet, sdxl, latents_of_sdxl),
        "pixart": (diffusers.PixArtTransformer2DModel, pixart, latents_of_pixart),
        "dit": (
            diffusers.DiTTransformer2DModel,
            {**transformer, "num_embeds_ada_norm": 10},
            latents_of_dit,
        ),
    }
    for name, (cls, options, inputs) in kinds.items():
        yield f"denoiser, {name}", Model(
            partial(denoiser, cls, options), inputs, lambda outputs: outputs[0], DENOISING,
            first=name in ("sd15", "dit"),
        )  # fmt: skip


def denoiser(cls: Any, options: dict[str, Any]) -> nn.Module:
    """With weights under which everything matters, in evaluation mode."""
    model: nn.Module = cls(**options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                parameter.normal_(std=scale)
    return model.eval()


def latents() -> dict[str, Any]:
    return {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 7, 16),
    }


def latents_of_sdxl() -> dict[str, Any]:
    added = {"text_embeds": torch.randn(2, 8), "time_ids": torch.randn(2, 6)}
    return {**latents(), "added_cond_kwargs": added}


def latents_of_pixart() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def latents_of_dit() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.full((2,), 500),
        "class_labels": torch.arange(2),
    }


def models() -> dict[str, Model]:
    """All whose libraries are there, and new enough to have them."""
    made: dict[str, Model] = {}
    for some_of_them in (of_families, of_windows, of_denoisers):
        try:
            made |= dict(some_of_them())
        except ImportError as error:
            warnings.warn(f"{some_of_them.__name__}: {error}", stacklevel=1)
    return made


# Forms


def called(model: Callable[..., Any], inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def images_of(inputs: Any) -> Tensor:
    """The first floating-point input: images or latents."""
    if isinstance(inputs, Tensor):
        return inputs
    tensors = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
    return max(tensors, key=lambda x: x.ndim)


@torch.no_grad()
def eager(one: Model, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    found = {"answer": one.answer(called(model, inputs))}
    if one.features is not None:
        torch.manual_seed(1)
        taken = one.features(model, inputs)
        found["features"] = torch.cat([feature.flatten() for feature in taken])
    return found


def gradient(one: Model, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    images = images_of(inputs).requires_grad_()
    one.answer(called(model, inputs)).square().mean().backward()
    assert images.grad is not None
    return {"gradient": images.grad}


def training(one: Model, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    images = images_of(inputs).requires_grad_()
    answer = one.answer(called(model.train(), inputs))
    answer.square().mean().backward()
    assert images.grad is not None
    return {"answer": answer.detach(), "gradient": images.grad}


@torch.no_grad()
def compiled(backend: str, one: Model, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(1)
    answer = one.answer(called(torch.compile(model, fullgraph=True, backend=backend), inputs))
    torch._dynamo.reset()
    return {"answer": answer}


FORMS: dict[str, Callable[[Model, nn.Module, Any], dict[str, Tensor]]] = {
    "eager": eager,
    "gradient": gradient,
    "training": training,
    "compiled": partial(compiled, "aot_eager"),
    "inductor": partial(compiled, "inductor"),
}
SLOW = ("compiled", "inductor")


def cases(name: str, one: Model) -> Iterator[tuple[str, str]]:
    """The settings and forms of a model."""
    yield "dense", "eager"
    for setting in one.settings:
        yield setting, "eager"
        if one.first:
            yield setting, "gradient"
            yield setting, "compiled"
            if setting in ("svit", "dynamicvit"):
                yield setting, "training"
        if name == "timm_vit, deit" and setting in ("tome", "topk"):
            yield setting, "inductor"


# Records


@dataclass(frozen=True)
class Recorded:
    """What a case gave: tensors by name, or the name of the exception.

    Attributes:
        outputs: tensors of float32.
        raised: the class of the exception, if one was raised.
    """

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    raised: str | None = None


def shaken(inputs: Any, by: float, generator: torch.Generator) -> Any:
    """Inputs whose values are changed by about so much of themselves."""
    if isinstance(inputs, Mapping):
        return {name: shaken(value, by, generator) for name, value in inputs.items()}
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return inputs * (1 + by * torch.randn(inputs.shape, generator=generator))
    return inputs


def run(
    one: Model, setting: str, form: str, seed: int, change: Callable[[Any], Any] = lambda x: x
) -> Recorded:
    """Runs one case from nothing but its seed; the state of random numbers is left as it was."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            model = one.build()
            inputs = change(one.inputs())
            if setting != "dense":
                one.settings[setting](model)
            return Recorded(FORMS[form](one, model, inputs))
        except Exception as error:
            return Recorded(raised=type(error).__name__)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are made in the same order whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def digest(x: Tensor) -> str:
    x = x.detach().contiguous()
    return hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).hexdigest()


def some(x: Tensor) -> Tensor:
    """A few values, from places that depend on nothing but how many there are."""
    flat = x.detach().flatten().float()
    if flat.numel() <= VALUES:
        return flat.clone()
    places = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))
    return flat[places[:VALUES].sort().values]


def tolerance(setting: str, recorded: Tensor) -> tuple[float, float]:
    """Relative and absolute, for values that are the same but for rounding.

    SLIC weighs by exponentials of distances, and the nearest reconstruction drops the weights of
    all but so many: both make rounding errors some 50 times larger.
    """
    atol = 5e-4 if setting.startswith("slic") or "nearest" in setting else 1e-5
    return 1e-4, atol * max(1.0, float(recorded.abs().max()))


def surroundings() -> dict[str, Any]:
    """What bits may depend on, besides tokred."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library).split("+")[0]
        except PackageNotFoundError:
            versions[library] = None
    return {
        "libraries": versions,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": 1,
    }


def steady(one: Model, seed: int) -> bool:
    """Whether no choice of a method stands so near to another that rounding could decide it."""
    generator = torch.Generator().manual_seed(seed)
    for setting in ("dense", *one.settings):
        first = run(one, setting, "eager", seed)
        for _ in range(4):
            other = run(one, setting, "eager", seed, lambda x: shaken(x, 1e-6, generator))
            for name, output in first.outputs.items():
                rtol, atol = tolerance(setting, output)
                if not torch.allclose(other.outputs[name], output, rtol / 2, atol / 2):
                    return False
    return True


def main() -> None:
    record: dict[str, Any] = {"version": tokred.__version__, **surroundings(), "models": {}}
    tensors: dict[str, Tensor] = {}
    for name, one in models().items():
        seed = next(seed for seed in range(100) if steady(one, seed))
        told: dict[str, Any] = {}
        for setting, form in cases(name, one):
            done = run(one, setting, form, seed)
            print(name, setting, form, seed, done.raised or "", file=sys.stderr, flush=True)
            if done.raised is not None:
                told[f"{setting}, {form}"] = {"raises": done.raised}
                continue
            told[f"{setting}, {form}"] = {
                kind: {"shape": list(output.shape), "sha256": digest(output)}
                for kind, output in done.outputs.items()
            }
            for kind, output in done.outputs.items():
                tensors[f"{name}, {setting}, {form}, {kind}"] = some(output)
        record["models"][name] = {"seed": seed, "cases": told}
    from safetensors.torch import save_file

    FOLDER.mkdir(exist_ok=True)
    save_file(tensors, FOLDER / f"{tokred.__version__}.safetensors")
    with (FOLDER / f"{tokred.__version__}.json").open("w") as file:
        json.dump(record, file, indent=0, separators=(",", ":"))


if __name__ == "__main__":
    main()
