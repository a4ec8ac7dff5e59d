"""The suite `diffusion`: UNets of Stable Diffusion, dense, with methods, cut off, and with tomesd.

UNets are built from their published configurations, with random weights, on which speed does not
depend; they are called once with latents of a size, two at a time, as guidance does. A block of the
finest level of Stable Diffusion 1.5 is measured by itself, and merging and copying back, too. All
contestants take turns. `tomesd` (https://github.com/dbolya/tomesd) is measured if it is installed,
with fixed destinations as ours; on every model at its default, and so without any effect on SDXL.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.engine.denoising import Around, Denoising, limit
from tokred.measure.cost import Arm, device_name, measure, sides, versions_of
from tokred.optional import require
from tokred.patching import apply, hang, host_of, remove
from tokred.reducers import Tokens
from tokred.reducers.tome2d import ToMe2d

_ATTENTION = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_SD: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*[_ATTENTION[0]] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *[_ATTENTION[1]] * 3),
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "sd-1.5": {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd-2.1": {
        **_SD,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", *[_ATTENTION[0]] * 2),
        "up_block_types": (*[_ATTENTION[1]] * 2, "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""What `UNet2DConditionModel` is built from, as published with the weights."""

SIDES: Mapping[str, tuple[str, Around]] = {
    "tome": ("tome", Around(0.5)),
    "tome, shared": ("tome", Around(0.5, shared=True)),
    "atc, shared": ("atc", Around(0.5, shared=True)),
    "todo": ("todo", Around(0.5)),
}
"""Methods, and where they stand."""

DENSE, LIMIT, THEIRS = "dense", "limit", "tomesd"


def run(
    models: Sequence[str] = tuple(CONFIGS),
    image_sizes: Sequence[int] = (512,),
    *,
    keep_rate: float = 0.5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    rounds: int = 5,
    compile: bool = False,
    configs: Mapping[str, Mapping[str, Any]] = CONFIGS,
    side: int = 64,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures everything. Returns what `markdown` and JSON take.

    Args:
        models: names of `configs`.
        image_sizes: in pixels; latents have an eighth.
        keep_rate: the share of tokens kept.
        device: "cpu" or "cuda".
        dtype: of weights and latents.
        batch: latents at a time.
        rounds: measured rounds of each side.
        compile: measure copies under `torch.compile` (models only; not tomesd).
        configs: what the models are built from.
        side: rows and columns of the tokens of the single block.
        on_round: called after every round with (rounds done, rounds in all), part by part.
    """
    measured = []
    for name in models:
        unet = require("diffusers", "diffusers").UNet2DConditionModel(**configs[name])
        unet = unet.eval().to(device=device, dtype=dtype)
        for size in image_sizes:
            inputs = _inputs(unet, batch, size // 8, device, dtype)
            arms = _model(unet, inputs, keep_rate, rounds, compile, on_round)
            measured.append({"name": name, "image_size": size, "seconds": _seconds(arms)})
        versions = versions_of(unet)
        del unet
    return {
        "models": measured,
        "block": _seconds(_block(keep_rate, batch, side, device, dtype, rounds)),
        "kernels": kernels(keep_rate, batch, side, device, dtype, max(rounds, 9)),
        "keep_rate": keep_rate,
        "batch": batch,
        "tokens": side * side,
        "device": device_name(torch.device(device)),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "compiled": compile,
        "versions": {**versions, **_version_of_theirs()},
    }


def markdown(results: Mapping[str, Any]) -> str:
    """Three tables: models, the block, the kernels."""
    names = list(dict.fromkeys(n for row in results["models"] for n in row["seconds"]))
    lines = [
        f"Keep rate {results['keep_rate']:g}, batch {results['batch']}, {results['dtype']}, "
        f"{results['device']}, {results['threads']} threads"
        f"{', compiled' if results['compiled'] else ''}; speed-up over the dense model, whose "
        "seconds stand in its column.",
        "",
        f"| model | pixels | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for row in results["models"]:
        cells = " | ".join(_cells(row["seconds"], names))
        lines.append(f"| {row['name']} | {row['image_size']} | {cells} |")
    block = results["block"]
    lines += [
        "",
        f"| one block, {results['tokens']} x 320 | {' | '.join(list(block)[1:])} |",
        f"|---|{'---|' * (len(block) - 1)}",
        f"| {' | '.join(_cells(block, list(block)))} |",
        "",
        f"| kernel, {results['tokens']} x 320 | ms | tomesd, ms | ratio |",
        "|---|---|---|---|",
    ]
    for name, row in results["kernels"].items():
        ours, theirs = (
            statistics.median(row[of]) * 1e3 if of in row else float("nan")
            for of in ("ours", THEIRS)
        )
        lines.append(f"| {name} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |")
    return "\n".join(lines)


def _cells(seconds: Mapping[str, Sequence[float]], names: Sequence[str]) -> list[str]:
    dense = statistics.median(seconds[DENSE])
    cells = []
    for name in names:
        if name not in seconds:
            cells.append("-")
        elif name == DENSE:
            cells.append(f"{dense:.3g} s")
        else:
            cells.append(f"{dense / statistics.median(seconds[name]):.2f}")
    return cells


def _seconds(arms: Mapping[str, Arm]) -> dict[str, tuple[float, ...]]:
    return {name: arm.seconds for name, arm in arms.items()}


def _reductions(model: nn.Module, keep_rate: float) -> dict[str, Denoising]:
    """What is hung on the model in turn; it is left without any."""
    found: dict[str, Denoising] = {}
    for name, (method, around) in SIDES.items():
        found[name] = apply(model, method, replace(around, keep_rate=keep_rate))
    found[LIMIT] = limit(found["tome"])
    remove(model)
    return found


def _model(
    model: nn.Module,
    inputs: Mapping[str, Any],
    keep_rate: float,
    rounds: int,
    compile: bool,
    on_round: Callable[[int, int], None] | None,
) -> dict[str, Arm]:
    reductions = _reductions(model, keep_rate)
    contestants: Mapping[str, tuple[Callable[..., Any], Callable[[], None]]]
    contestants = sides(model, host_of(model), {DENSE: None, **reductions}, compile)
    if not compile and find_spec(THEIRS):
        contestants = _with_theirs(model, contestants, keep_rate)
    return measure(contestants, inputs, rounds, 1, on_round)


def _with_theirs(
    model: nn.Module,
    contestants: Mapping[str, tuple[Callable[..., Any], Callable[[], None]]],
    keep_rate: float,
    info: Callable[[], None] = lambda: None,
) -> dict[str, tuple[Callable[..., Any], Callable[[], None]]]:
    """The contestants and tomesd, each of which takes away what the other has left."""
    tomesd = import_module(THEIRS)

    def ours(prepare: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            tomesd.remove_patch(model)
            prepare()

        return both

    def theirs() -> None:
        remove(model)
        tomesd.apply_patch(model, ratio=1 - keep_rate, use_rand=False)
        info()

    with_theirs = {name: (target, ours(do)) for name, (target, do) in contestants.items()}
    return {**with_theirs, THEIRS: (_by_position(next(iter(contestants.values()))[0]), theirs)}


def _by_position(target: Callable[..., Any]) -> Callable[..., Any]:
    """tomesd looks for latents among the positional arguments."""

    def run(**inputs: Any) -> Any:
        if "sample" not in inputs:
            return target(**inputs)
        first = [inputs.pop(name) for name in ("sample", "timestep", "encoder_hidden_states")]
        return target(*first, **inputs)

    return run


def _inputs(unet: Any, batch: int, side: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Latents whose neighbours are alike, a time step, and a text of 77 tokens."""
    coarse = torch.randn(batch, 4, side // 8, side // 8)
    latents = F.interpolate(coarse, (side, side), mode="bilinear") + 0.3 * torch.randn(
        batch, 4, side, side
    )
    to: dict[str, Any] = {"device": device, "dtype": dtype}
    inputs: dict[str, Any] = {
        "sample": latents.to(**to),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": torch.randn(batch, 77, unet.config.cross_attention_dim).to(**to),
    }
    if unet.config.addition_embed_type == "text_time":
        text = unet.config.projection_class_embeddings_input_dim
        text -= 6 * unet.config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, text).to(**to),
            "time_ids": torch.full((batch, 6), side * 8.0).to(**to),
        }
    return inputs


def _smooth(batch: int, side: int, device: str, dtype: torch.dtype) -> Tensor:
    """Tokens of a square whose neighbours are alike, [batch, side * side, 320]."""
    image = F.interpolate(torch.randn(batch, 320, 8, 8), (side, side), mode="bilinear")
    image = image + 0.3 * torch.randn(batch, 320, side, side)
    return image.flatten(2).transpose(1, 2).contiguous().to(device=device, dtype=dtype)


def _block(
    keep_rate: float, batch: int, side: int, device: str, dtype: torch.dtype, rounds: int
) -> dict[str, Arm]:
    """A block of the finest level of Stable Diffusion 1.5. Where blocks share a matching, it is
    there already."""
    options = dict(CONFIGS["sd-1.5"])
    options.update(
        block_out_channels=(320, 640),
        down_block_types=(_ATTENTION[0], "DownBlock2D"),
        up_block_types=("UpBlock2D", _ATTENTION[1]),
        layers_per_block=1,
    )
    unet = require("diffusers", "diffusers").UNet2DConditionModel(**options)
    unet = unet.eval().to(device=device, dtype=dtype)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    context = torch.randn(batch, 77, 768).to(device=device, dtype=dtype)
    inputs = {
        "hidden_states": _smooth(batch, side, device, dtype),
        "encoder_hidden_states": context,
    }
    host, reductions = host_of(unet), _reductions(unet, keep_rate)

    def prepared(reduction: Denoising | None) -> Callable[[], None]:
        def prepare() -> None:
            remove(unet)
            if reduction is None:
                return
            hang(unet, host, reduction)
            reduction.end()
            for place in reduction.places:
                reduction.set_grid(place.owner, (side, side))
            if reduction.around.shared:
                with torch.no_grad():
                    block(**inputs)

        return prepare

    def size() -> None:
        unet._tome_info["size"] = (side, side)

    arms: dict[str, Denoising | None] = {DENSE: None, **reductions}
    contestants = {name: (block, prepared(reduction)) for name, reduction in arms.items()}
    if find_spec(THEIRS):
        theirs = _with_theirs(unet, contestants, keep_rate, size)
        contestants = {name: (block, prepare) for name, (_, prepare) in theirs.items()}
    return measure(contestants, inputs, rounds, 1)


def kernels(
    keep_rate: float, batch: int, side: int, device: str, dtype: torch.dtype, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of matching, and of merging and copying back, ours and those of tomesd."""
    x = _smooth(batch, side, device, dtype)
    num = x.shape[1]
    keep = Around(keep_rate).keep(num)
    view = Tokens(x, torch.ones(batch, num, device=device), grid=(side, side))
    token_map = ToMe2d()(view, keep)
    contestants: dict[str, dict[str, Callable[[], Any]]] = {
        "matching": {"ours": lambda: ToMe2d()(view, keep)},
        "merging and copying back": {
            "ours": lambda: token_map.up(token_map.down(x, view.size), None)
        },
    }
    if find_spec(THEIRS):
        match = import_module(f"{THEIRS}.merge").bipartite_soft_matching_random2d

        def matched() -> Any:
            return match(x, side, side, 2, 2, num - keep, no_rand=True)

        merge, unmerge = matched()
        contestants["matching"][THEIRS] = matched
        contestants["merging and copying back"][THEIRS] = lambda: unmerge(merge(x))
    found: dict[str, dict[str, list[float]]] = {}
    with torch.no_grad():
        for kernel, by_name in contestants.items():
            found[kernel] = {name: [] for name in by_name}
            for number in range(rounds + 1):
                for name, work in by_name.items():
                    _wait(device)
                    start = time.perf_counter()
                    work()
                    _wait(device)
                    if number > 0:  # the first round warms up
                        found[kernel][name].append(time.perf_counter() - start)
    return found


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _version_of_theirs() -> dict[str, str]:
    return {THEIRS: version(THEIRS)} if find_spec(THEIRS) else {}
