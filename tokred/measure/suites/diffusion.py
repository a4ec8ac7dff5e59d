"""The suite `diffusion`: UNets of Stable Diffusion, dense, with methods, cut off, and with tomesd.

UNets are built from their published configurations, with random weights, on which speed does not
depend. They are called once with two latents, as guidance does. A block of the finest level of
Stable Diffusion 1.5 is also measured by itself, and so are matching, merging and copying back. All
contestants take turns. The free limit is a slice in front of the modules' own forwards, without our
engine (`tokred.measure.slicing`). `tomesd` (https://github.com/dbolya/tomesd) is measured if it is
installed, with fixed destinations as our method has them, and at the same level of the model. (By
default it would merge nothing in SDXL, whose finest level does not attend.)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.engine.denoising import Around, Denoising
from tokred.measure.conditions import device_name, versions_of
from tokred.measure.limit import Entrant, limits_of, put_on
from tokred.measure.race import Arm, measure, seconds_in_turns, sides
from tokred.measure.slicing import take_off
from tokred.optional import require
from tokred.patching import apply, host_of, remove
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
"""The methods that are measured, and around which modules."""

DENSE, LIMIT, THEIRS = "dense", "limit", "tomesd"


def run(
    models: Sequence[str] = tuple(CONFIGS),
    image_sizes: Sequence[int] = (512,),
    methods: Sequence[str] = tuple(SIDES),
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
    """Measures models, block and kernels. The results are for `markdown` and JSON.

    Args:
        models: names of `configs`; there may be none.
        image_sizes: in pixels; latents are an eighth as high and wide.
        methods: names of `SIDES`. The dense model, the free limit and tomesd are always measured.
        keep_rate: the share of tokens that is kept.
        device: "cpu" or "cuda".
        dtype: of weights and latents.
        batch: latents per batch.
        rounds: measured rounds of each side.
        compile: measure compiled copies of the models (`torch.compile`); then tomesd is left out.
        configs: the configurations of the models.
        side: rows and columns of the tokens in the single block.
        on_round: called after every round with (rounds done, rounds in all), part by part.

    Raises:
        ValueError: `methods` has a name that is not in `SIDES`.
    """
    unknown = set(methods) - set(SIDES)
    if unknown:
        raise ValueError(f"methods must be some of {list(SIDES)}, not {sorted(unknown)}")
    chosen = {
        name: (SIDES[name][0], replace(SIDES[name][1], keep_rate=keep_rate)) for name in methods
    }
    versions = versions_of(nn.Module())
    versions["diffusers"] = str(require("diffusers", "diffusers").__version__)
    measured = []
    for name in models:
        unet = _unet(configs[name], device, dtype)
        for size in image_sizes:
            inputs = _inputs(unet, batch, size // 8, device, dtype)
            arms = _model(unet, inputs, chosen, rounds, compile, on_round)
            measured.append({"name": name, "image_size": size, "seconds": _seconds(arms)})
        del unet
    return {
        "models": measured,
        "block": _seconds(_block(chosen, batch, side, device, dtype, rounds)),
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
        f"{', compiled' if results['compiled'] else ''}. Cells are the speed-up over the dense "
        "model, whose seconds stand in its column, and in brackets the share of the free limit: "
        "medians of what two sides took in the same round.",
        "",
        f"| model | pixels | rounds | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for row in results["models"]:
        cells = " | ".join(_cells(row["seconds"], names))
        rounds = len(row["seconds"][DENSE])
        lines.append(f"| {row['name']} | {row['image_size']} | {rounds} | {cells} |")
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
    cells = []
    for name in names:
        if name not in seconds:
            cells.append("-")
        elif name == DENSE:
            cells.append(f"{statistics.median(seconds[DENSE]):.3g} s")
        else:
            cells.append(f"{_times(seconds, DENSE, name):.2f}")
            if name != LIMIT:
                cells[-1] += f" ({_times(seconds, LIMIT, name):.2f})"
    return cells


def _times(seconds: Mapping[str, Sequence[float]], slower: str, faster: str) -> float:
    """How many times as long one side takes as another one in the same round: the median."""
    return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True))


def _seconds(arms: Mapping[str, Arm]) -> dict[str, tuple[float, ...]]:
    return {name: arm.seconds for name, arm in arms.items()}


@contextmanager
def _making(dtype: torch.dtype) -> Iterator[None]:
    """Weights are made in a dtype, so that there is no copy in float32: that of SDXL has 10 GB."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _unet(config: Mapping[str, Any], device: str, dtype: torch.dtype) -> Any:
    with _making(dtype):
        unet = require("diffusers", "diffusers").UNet2DConditionModel(**config)
    return unet.eval().to(device=device, dtype=dtype)


def _entrants(
    model: nn.Module, chosen: Mapping[str, tuple[str, Around]], inputs: Mapping[str, Any]
) -> tuple[dict[str, Entrant], Denoising]:
    """What the model becomes in turn, and the reduction that the free limit is that of. Nothing is
    left on the model."""
    found: dict[str, Entrant] = {DENSE: None}
    for name, (method, around) in chosen.items():
        found[name] = apply(model, method, around)
    # The same numbers of tokens around the same modules, whatever methods were chosen.
    around = next(iter(chosen.values()))[1] if chosen else Around()
    first = apply(model, "tome", replace(around, shared=False))
    remove(model)
    found[LIMIT] = limits_of(model, host_of(model), inputs, first, ()).free
    return found, first


def _model(
    model: nn.Module,
    inputs: Mapping[str, Any],
    chosen: Mapping[str, tuple[str, Around]],
    rounds: int,
    compile: bool,
    on_round: Callable[[int, int], None] | None,
) -> dict[str, Arm]:
    entrants, reduction = _entrants(model, chosen, inputs)
    contestants: Mapping[str, tuple[Callable[..., Any], Callable[[], None]]]
    contestants = sides(model, host_of(model), entrants, compile)
    if not compile and find_spec(THEIRS):
        contestants = _with_theirs(model, contestants, reduction)
    return measure(contestants, inputs, rounds, 1, on_round)


def _with_theirs(
    model: nn.Module,
    contestants: Mapping[str, tuple[Callable[..., Any], Callable[[], None]]],
    reduction: Denoising,
    info: Callable[[], None] = lambda: None,
) -> dict[str, tuple[Callable[..., Any], Callable[[], None]]]:
    """The contestants and tomesd, which merges as many tokens at the same level; each removes the
    other's changes before it runs."""
    tomesd = import_module(THEIRS)

    def ours(prepare: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            tomesd.remove_patch(model)
            prepare()

        return both

    def theirs() -> None:
        take_off(model)
        tomesd.apply_patch(
            model,
            ratio=1 - reduction.around.keep_rate,
            max_downsample=2 ** max(place.level for place in reduction.places),
            use_rand=False,
        )
        info()

    with_theirs = {name: (target, ours(do)) for name, (target, do) in contestants.items()}
    return {**with_theirs, THEIRS: (_by_position(next(iter(contestants.values()))[0]), theirs)}


def _by_position(target: Callable[..., Any]) -> Callable[..., Any]:
    """A model that is called with positional arguments, among which tomesd looks for latents."""

    def run(**inputs: Any) -> Any:
        if "sample" not in inputs:
            return target(**inputs)
        first = [inputs.pop(name) for name in ("sample", "timestep", "encoder_hidden_states")]
        return target(*first, **inputs)

    return run


def _inputs(unet: Any, batch: int, side: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Smooth latents, a time step, and a text of 77 tokens."""
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
    """The tokens of a smooth square image, [batch, side * side, 320]."""
    image = F.interpolate(torch.randn(batch, 320, 8, 8), (side, side), mode="bilinear")
    image = image + 0.3 * torch.randn(batch, 320, side, side)
    return image.flatten(2).transpose(1, 2).contiguous().to(device=device, dtype=dtype)


def _block(
    chosen: Mapping[str, tuple[str, Around]],
    batch: int,
    side: int,
    device: str,
    dtype: torch.dtype,
    rounds: int,
) -> dict[str, Arm]:
    """Measures a block of the finest level of Stable Diffusion 1.5. If blocks share a matching, it
    was made before."""
    options = dict(CONFIGS["sd-1.5"])
    options.update(
        block_out_channels=(320, 640),
        down_block_types=(_ATTENTION[0], "DownBlock2D"),
        up_block_types=("UpBlock2D", _ATTENTION[1]),
        layers_per_block=1,
    )
    unet = _unet(options, device, dtype)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    context = torch.randn(batch, 77, 768).to(device=device, dtype=dtype)
    inputs = {
        "hidden_states": _smooth(batch, side, device, dtype),
        "encoder_hidden_states": context,
    }
    host = host_of(unet)
    entrants, reduction = _entrants(unet, chosen, _inputs(unet, batch, side, device, dtype))

    def prepared(entrant: Entrant) -> Callable[[], None]:
        def prepare() -> None:
            put_on(unet, host, entrant)
            if not isinstance(entrant, Denoising):
                return
            entrant.end()
            for place in entrant.places:
                entrant.set_grid(place.owner, (side, side))
            if entrant.around.shared:
                with torch.no_grad():
                    block(**inputs)

        return prepare

    def size() -> None:
        unet._tome_info["size"] = (side, side)

    contestants = {name: (block, prepared(entrant)) for name, entrant in entrants.items()}
    if find_spec(THEIRS):
        theirs = _with_theirs(unet, contestants, reduction, size)
        contestants = {name: (block, prepare) for name, (_, prepare) in theirs.items()}
    return measure(contestants, inputs, rounds, 1)


def kernels(
    keep_rate: float, batch: int, side: int, device: str, dtype: torch.dtype, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Measures matching, and merging with copying back: the seconds of ours and of tomesd's."""
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
    with torch.no_grad():
        return {
            kernel: seconds_in_turns(works, torch.device(device), rounds)
            for kernel, works in contestants.items()
        }


def _version_of_theirs() -> dict[str, str]:
    return {THEIRS: version(THEIRS)} if find_spec(THEIRS) else {}
