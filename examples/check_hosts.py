"""Tries tokred on every model name of timm and every vision model class of transformers.

    python examples/check_hosts.py                                   # all: a quarter of an hour
    python examples/check_hosts.py --library timm 'deit*'            # those that match
    python examples/check_hosts.py --jobs 2 --write docs/hosts.md    # all, and the page about it

Models are built with random weights, and as small as their constructor lets them be, with every
parameter drawn away from defaults such as 1e-5. Each one is found to be:

*accepted*: the patch keeps every promise of `tokred.measure.contract` that can be tried on the
model. Among them: with `keep_rate=1` the answer, and features where the model offers them, are
bit-identical to the dense model's; exactly the asked number of tokens reaches every MLP; what
merged and other tokens become is what the dense model computes under a mask; dropped tokens have no
part in answers; after `tokred.remove` all is bit-identical again. Where the model can have only one
of `tome`, which merges, and `topk`, which prunes, the page says so. (Models that attend in windows
can have `slic` alone, and of the promises those on answers, features and removal.)
*refused*: `tokred.apply` says why.
*not built*: no small model could be made or run, so nothing is known.
*wrong*: anything else, exceptions included. The script then exits with 1.

Not counted: models in which no block has both an attention, made of queries and keys, and an MLP.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import multiprocessing
import re
import sys
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import tokred
from tokred.data.inputs import Inputs, call
from tokred.host import Host, Stage, find_host, hosts
from tokred.measure import contract

METHODS = ("tome", "topk")
KEEP = tokred.Stages(0.5)
VERDICTS = ("accepted", "refused", "not built", "wrong")
NO_TRANSFORMER = "no transformer"
LARGEST = 300_000_000  # parameters that we are ready to draw


@dataclass
class Result:
    """What was found out about one name."""

    library: str
    name: str
    family: str
    verdict: str
    reason: str = ""
    patch: str = ""
    tower: str = ""
    notes: list[str] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pattern", nargs="?", default="*", help="names to try, such as 'deit*'")
    parser.add_argument("--library", choices=("timm", "transformers", "all"), default="all")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    parser.add_argument("--results", type=Path, help="file to keep results in, to go on from")
    parser.add_argument("--write", type=Path, help="page to write, such as docs/hosts.md")
    options = parser.parse_args()
    some = options.library != "all" or options.pattern != "*"
    if options.write and some and not options.results:
        parser.error("--write makes the page of everything: try all names, or give --results")
    results = read(options.results)
    known = {(result.library, result.name) for result in results}
    jobs = [
        (library, group, left)
        for library, group, names in listed(options.library, options.pattern)
        if (left := [name for name in names if (library, name) not in known])
    ]
    bar = tqdm(total=len(jobs), unit="job", disable=not sys.stderr.isatty())
    for found in run(jobs, options.jobs):
        bar.update()
        results += found
        for result in found:
            if result.verdict in ("wrong", "not built"):
                tqdm.write(f"{result.library} {result.name}: {result.verdict}: {result.reason}")
        if options.results:
            lines = "".join(json.dumps(asdict(result)) + "\n" for result in found)
            with options.results.open("a") as file:
                file.write(lines)
    for library in ("timm", "transformers"):
        counted = Counter(result.verdict for result in results if result.library == library)
        if counted:
            print(f"{versions()[library]}: {', '.join(f'{counted[v]} {v}' for v in VERDICTS)}")
    if not results:
        sys.exit(f"no name matches {options.pattern!r}")
    if options.write:
        options.write.write_text(page(options.write, results))
    return int(any(result.verdict == "wrong" for result in results))


def versions() -> dict[str, str]:
    return {
        "timm": f"timm {timm.__version__}",
        "transformers": f"transformers {transformers.__version__}",
    }


def read(file: Path | None) -> list[Result]:
    if file is None or not file.exists():
        return []
    return [Result(**json.loads(line)) for line in file.read_text().splitlines()]


Job = tuple[str, str, list[str]]


def listed(library: str, pattern: str) -> Iterator[Job]:
    """(library, module, names): one name at a time for timm, one module for transformers, whose
    modules take longer to import than their classes to try."""
    if library in ("timm", "all"):
        for name in timm.list_models(pattern):
            yield "timm", "", [name]
    if library in ("transformers", "all"):
        for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
            text = file.read_text()
            if "pixel_values" not in text:
                continue
            module = f"transformers.models.{file.parent.name}.{file.stem}"
            exported = text.rsplit("__all__ = ", 1)[-1].replace("'", '"').split('"')[1::2]
            names = [name for name in exported if fnmatch(name, pattern)]
            if names:
                yield "transformers", module, names


def run(jobs: list[Job], processes: int) -> Iterator[list[Result]]:
    if processes <= 1:
        prepare(torch.get_num_threads())
        yield from map(survey, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, prepare, (1,)) as pool:
        yield from pool.map(survey, jobs)


def prepare(threads: int) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)


def survey(job: Job) -> list[Result]:
    library, module, names = job
    if library == "timm":
        return [found for name in names if (found := survey_timm(name))]
    try:
        classes = vars(import_module(module))
    except Exception as error:
        return [Result("transformers", module, "", "not built", contract.said(error))]
    return [found for name in names if (found := survey_transformers(classes.get(name)))]


# ---- timm


def survey_timm(name: str) -> Result | None:
    torch.manual_seed(0)
    result = Result("timm", name, "", "not built")
    try:
        with torch.device("meta"):
            full = timm.create_model(name)
    except Exception as error:
        result.reason = contract.said(error)
        return result
    result.family = type(full).__name__
    if not is_transformer(full):
        result.verdict = NO_TRANSFORMER
        return result
    if refused_at_once(result, full):
        return result
    try:
        model, images = small_timm(name, full)
    except Exception as error:
        result.reason = contract.said(error)
        return result
    judge(result, model, images)
    return result


def small_timm(name: str, full: nn.Module) -> tuple[nn.Module, Tensor]:
    """The model with as few blocks and channels as its constructor takes, made of the same classes
    of modules; and images for it.

    Raises:
        ValueError: there is none of a size that we are ready to draw.
    """
    size: tuple[int, ...] = full.default_cfg["input_size"]  # type: ignore[assignment, index]
    embed = getattr(full, "patch_embed", None)
    image: dict[str, Any] = {}
    if getattr(embed, "grid_size", None):
        # Of a hybrid, a patch is one of the convolutions' output, not of the image.
        patch = [side // count for side, count in zip(embed.img_size, embed.grid_size, strict=True)]  # type: ignore[union-attr]
        image = {"img_size": (8 * patch[0], 8 * patch[1])}
    narrow = {"embed_dim": 128, "num_heads": 4}
    stages = {"depths": (2, 2, 4, 2), "embed_dim": 32, "num_heads": (1, 2, 4, 8)}
    tries: list[dict[str, Any]] = [
        stages,
        {"depth": 4, **narrow, **image},
        {"depth": 4, **image},
        {"depth": 4},
        {**narrow, "num_kv_heads": 2, **image},
        image,
        {},
    ]
    reasons = []
    for options in tries:
        try:
            with torch.device("meta"):
                outline = timm.create_model(name, **options)
            if kinds(outline) != kinds(full):
                continue
            if sum(parameter.numel() for parameter in outline.parameters()) > LARGEST:
                continue
            model = contract.lively(timm.create_model(name, **options)).eval()
        except Exception as error:  # what constructors raise is of all kinds
            reasons.append(contract.said(error))
            continue
        return model, torch.randn((2, size[0], *options.get("img_size", size[1:])))
    raise ValueError(
        f"no smaller model of the same modules could be made: {'; '.join(dict.fromkeys(reasons))}"
    )


# ---- transformers


def survey_transformers(cls: Any) -> Result | None:
    if not is_vision_class(cls):
        return None
    family = cls.__module__.split(".")[2]
    result = Result("transformers", cls.__name__, family, "not built")
    try:
        full = full_transformer(cls)
    except Exception as error:
        result.reason = contract.said(error)
        return result
    if not is_transformer(full):
        result.verdict = NO_TRANSFORMER
        return result
    if refused_at_once(result, full):
        return result
    try:
        for seed in range(3):
            torch.manual_seed(seed)
            model = small_transformer(cls)
            inputs = inputs_of(model)
            if any(one.unique().numel() > 1 for one in answered(model, inputs)):
                break  # a head that ends in a ReLU may say 0 whatever comes
    except Exception as error:
        result.reason = contract.said(error)
        return result
    judge(result, model, inputs)
    return result


def is_vision_class(cls: Any) -> bool:
    if not inspect.isclass(cls) or cls.__name__.endswith("PreTrainedModel"):
        return False
    if getattr(cls, "config_class", None) is None or not hasattr(cls, "main_input_name"):
        return False  # no model
    names = [str(cls.main_input_name), *inspect.signature(cls.forward).parameters]  # type: ignore[attr-defined]
    return any("pixel_values" in name for name in names)


SMALL = {
    32: "hidden_size embed_dim embed_dims d_model dim hidden_dim projection_dim "
    "encoder_hidden_size projection_hidden_size vision_hidden_size cross_attention_hidden_size "
    "decoder_hidden_size reassemble_hidden_size out_hidden_size output_hidden_size "
    "projection_size pooler_output_size reduce_dim",
    4: "num_hidden_layers num_layers depth encoder_layers decoder_layers num_frames "
    "decoder_num_hidden_layers mm_tokens_per_image",
    2: "num_attention_heads num_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads num_key_value_heads decoder_num_attention_heads",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim mlp_dim image_size "
    "decoder_intermediate_size max_position_embeddings",
    16: "patch_size head_dim",
    99: "vocab_size",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
# What the names above do not settle, by model type.
SPECIAL: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "beit": {"out_indices": [1, 2, 3, 4]},
    "clipseg": {"extract_layers": [1, 2, 3]},
    "kosmos-2": {"latent_query_num": 4},
    "llava_next": {"image_grid_pinpoints": [[64, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[64, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[64, 64]]},
    "sapiens2": {
        "num_key_value_heads_per_layer": [2, 1, 1, 2],
        "head_config": {
            "upsample_out_channels": [8],
            "conv_out_channels": [8],
            "scale_conv_out_channels": [8],
            "scale_final_hidden_sizes": [8, 8],
        },
    },
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    # Windows of 7x7 need feature maps that are larger than that.
    **{
        name: {
            "patch_size": 4,
            "image_size": 224,
            "window_size": 7,
            "embed_dim": 32,
            "num_heads": [1, 2, 4, 8],
        }
        for name in ("swin", "swinv2", "maskformer-swin")
    },
    "vipllava": {"vision_feature_layer": [-2, -1]},
}


def full_transformer(cls: Any) -> nn.Module:
    """The model of the default configuration, without weights; where that configuration lacks what
    the class needs, of the small one."""
    with torch.device("meta"):
        try:
            return cls(cls.config_class())  # type: ignore[no-any-return]
        except Exception:  # what constructors raise is of all kinds
            return cls(small_config(cls.config_class()))  # type: ignore[no-any-return]


def small_transformer(cls: Any) -> nn.Module:
    return contract.lively(cls(small_config(cls.config_class()))).eval()


def small_config(default: Any) -> Any:
    """The configuration with every size that we know the name of made small."""
    options: dict[str, Any] = default.to_diff_dict()
    for key in ("model_type", "transformers_version", "architectures"):
        options.pop(key, None)
    tokens = 3
    for key, value in sorted(vars(default).items()):
        key = key.lstrip("_")
        if isinstance(value, transformers.PreTrainedConfig):
            options[key] = small_config(value)
        elif key in SIZES and isinstance(value, int | list | tuple):
            options[key] = SIZES[key] if isinstance(value, int) else [SIZES[key]] * len(value)
        elif key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            options[key] = tokens = tokens + 1
        elif key.endswith("out_indices") and isinstance(value, list | tuple) and value:
            options[key] = list(range(4))[-len(value) :]
            options |= {"out_features": None} if hasattr(default, "out_features") else {}
        elif key == "layer_types":
            options.pop(key, None)
    if hasattr(default, "out_features") and options.get("out_indices"):
        options["out_indices"] = [at + 1 for at in options["out_indices"]]
    options |= SPECIAL.get(default.model_type, {})
    return type(default)(**options)


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Random inputs that the model can be called with.

    Raises:
        Exception: what the model says to the plainest of them.
    """
    first: Exception | None = None
    for images in (0, 1, 2):  # an image per sample; a list of one; one of known size and its part
        try:
            inputs = random_inputs(model, images)
            answered(model, inputs)
        except Exception as error:
            first = first or error
        else:
            return inputs
    assert first is not None
    raise first


def random_inputs(model: Any, images: int) -> dict[str, Tensor]:
    taken = inspect.signature(model.forward).parameters
    required = [name for name, one in taken.items() if one.default is inspect.Parameter.empty]
    config = model.config
    vision = vision_config(config)
    inputs: dict[str, Tensor] = {}
    height, width = 64, 64
    if "pixel_values" in taken or "pixel_values_videos" in taken:
        size = getattr(vision, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else size
        frames = getattr(vision, "num_frames", None) or getattr(vision, "frames_per_clip", None)
        several = (images,) if images else (int(frames),) if frames else ()
        channels = getattr(vision, "num_channels", None) or getattr(vision, "in_chans", None) or 3
        name = "pixel_values" if "pixel_values" in taken else "pixel_values_videos"
        inputs[name] = torch.randn(2, *several, channels, height, width)
    if "image_sizes" in taken and images == 2:
        inputs["image_sizes"] = torch.tensor([[height, width]] * 2)
    if "high_res_pixel_values" in taken:
        inputs["high_res_pixel_values"] = torch.randn(2, channels, height, width)
    if "spatial_shapes" in taken:  # images come as patches
        patch = vision.patch_size
        rows, columns = height // patch, width // patch
        inputs["pixel_values"] = torch.randn(2, rows * columns, 3 * patch * patch)
        inputs["spatial_shapes"] = torch.tensor([[rows, columns]] * 2)
        inputs["pixel_attention_mask"] = torch.ones(2, rows * columns, dtype=torch.long)
    if "input_ids" in taken:
        ids = torch.randint(40, 90, (2, 8))
        image, count = image_tokens(model, inputs)
        if count:
            ids = torch.cat([torch.full((2, count), image), ids], 1)
        inputs["input_ids"] = ids
        if "attention_mask" in taken:
            inputs["attention_mask"] = torch.ones_like(ids)
        if "image_embeds_position_mask" in taken:
            mask = torch.arange(ids.shape[1]) < getattr(config, "latent_query_num", 0)
            inputs["image_embeds_position_mask"] = mask.expand_as(ids).long()
    if "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = torch.randint(40, 90, (2, 4))
    if "bool_masked_pos" in required:  # two of four patches; neither the first nor the last one
        count = height // vision.patch_size * (width // vision.patch_size)
        count *= getattr(vision, "num_frames", 1) // getattr(vision, "tubelet_size", 1)
        inputs["bool_masked_pos"] = (torch.arange(count).expand(2, -1) + 1) % 4 > 1
    return inputs


@torch.no_grad()
def image_tokens(model: Any, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """The placeholder of images among the text, and how many of it each image takes, if any."""
    for part in model.modules():
        if hasattr(part, "get_image_features"):
            for name in ("image_token_id", "image_token_index"):
                if getattr(part.config, name, None) is not None:
                    taken = inspect.signature(part.get_image_features).parameters
                    given = {key: value for key, value in inputs.items() if key in taken}
                    features = part.get_image_features(**given)
                    features = getattr(features, "pooler_output", features)
                    count = sum(one.numel() // one.shape[-1] for one in features) // 2
                    return getattr(part.config, name), int(count)
    return 0, 0


def vision_config(config: Any) -> Any:
    for name in ("vision_config", "backbone_config", "encoder", "image_encoder_config"):
        if isinstance(getattr(config, name, None), transformers.PreTrainedConfig):
            return getattr(config, name)
    return config


# ---- the same for both

QUERY = re.compile(
    r"(to_|w_|projection_)?(q|k|qk|kv|qkv|query|key|query_key_value|queries_keys_values|in|c_attn)"
    r"s?(_proj|_lin|_linear|_conv)?s?"
)
MLP = re.compile(
    r"mlp|ffn|\bff\b|layerff|feed_?forward|fc_?1|linear_?1|lin1|intermediate", re.IGNORECASE
)


def is_transformer(model: nn.Module) -> bool:
    """Whether some block has both an attention and an MLP."""
    for block in model.modules():
        parts = dict(block.named_children())
        if (asks(block) or any(asks(part, 2) for part in parts.values())) and any(
            MLP.search(f"{name} {type(part).__name__}")
            or any("mlp" in type(inner).__name__.lower() for inner in part.children())
            for name, part in parts.items()
        ):
            return True
    return False


def asks(module: nn.Module, deep: int = 0) -> bool:
    """Whether a module, or one at most so deep in it, makes queries and keys."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    parts = dict(module.named_children())
    return any(QUERY.fullmatch(name) for name in parts) or (
        deep > 0 and any(asks(part, deep - 1) for part in parts.values())
    )


def kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


@torch.no_grad()
def answered(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(1)  # some models draw masks
    return [one for _, one in contract.leaves(call(model, inputs))]


def refused_at_once(result: Result, model: nn.Module) -> bool:
    """Whether every method is refused; which needs no weights."""
    reasons = []
    methods: tuple[str, ...] = METHODS
    with contextlib.suppress(tokred.UnsupportedModelError):
        methods = methods_of(find_host(model)[0])
    for method in methods:
        try:
            tokred.apply(model, method, None if method == "slic" else KEEP)
        except tokred.UnsupportedModelError as error:
            reasons.append(str(error))
        except Exception:  # that is for `judge` to find
            return False
        else:
            tokred.remove(model)
            return False
    result.verdict, result.reason = "refused", reasons[0]
    with contextlib.suppress(tokred.UnsupportedModelError):
        host, tower = find_host(model)
        result.patch, result.tower = name_of(host), type(tower).__name__
    return True


def name_of(host: Host | Stage) -> str:
    """The file of a patch."""
    return next(name for name, one in hosts().items() if one is host.family)


def methods_of(host: Host | Stage) -> tuple[str, ...]:
    """The methods to try: of a model in windows, the one that it can have."""
    return ("slic",) if isinstance(host, Stage) else METHODS


def judge(result: Result, model: nn.Module, inputs: Inputs) -> None:
    """Fills in the verdict, and why."""
    host, tower = find_host(model)
    result.patch, result.tower = name_of(host), type(tower).__name__
    try:
        verdicts = contract.examine(model, inputs)
        describe(result, model, inputs)
    except Exception as error:
        result.verdict, result.reason = "wrong", contract.said(error)
        return
    finally:
        tokred.remove(model)
    broken = [str(one) for verdict in verdicts for one in verdict.broken]
    result.verdict = "wrong" if broken else "accepted"
    result.reason = "; ".join(dict.fromkeys(broken))[:600]


def describe(result: Result, model: nn.Module, inputs: Inputs) -> None:
    """Fills in what the page tells of a model: which methods it cannot have, and its layout."""
    host, tower = find_host(model)
    reduction = None
    for method in methods_of(host):
        try:
            reduction = tokred.apply(model, method, 0.5 if isinstance(host, Stage) else KEEP)
        except tokred.UnsupportedModelError as error:
            result.notes.append(f"not {method}: {plainly(str(error))}")
    if reduction is None:
        return
    if isinstance(host, Stage):
        result.notes.append("slic, in the windows of its longest stage")
    else:
        blocks, mlps = contract.entered(host.blocks(tower), model, inputs)
        if blocks == mlps:
            result.notes.append("reduced between blocks")
    inside = any(name in host.family.methods for name in ("pool", "_pool", "forward_head"))
    if isinstance(host, Host):
        inside = inside or bool(host.pools(tower))
    layout = reduction.layout
    result.layout = {
        "prefix": layout.prefix,
        "suffix": layout.suffix,
        "positions": "by token" if layout.by_position else "before",
        "pooling": "outside" if reduction.averages else "inside" if inside else "none",
    }


def plainly(reason: str) -> str:
    """A reason without what it says to everybody."""
    reason = re.sub(r"; (supported: .*|docs/adding-a-host.md.*)", "", reason)
    return re.sub(r"^[\w.]+: ", "", reason)


# ---- the page

MARK = "<!-- From here on written by examples/check_hosts.py. -->"


def page(file: Path, results: list[Result]) -> str:
    """The page: what a person has written above the mark, and what was found below."""
    head = file.read_text().split(MARK)[0].rstrip() if file.exists() else "# Hosts"
    lines = [head, "", MARK, ""]
    for library, version in versions().items():
        found = sorted((one for one in results if one.library == library), key=lambda r: r.name)
        if found:
            lines += section(library, version, found)
    return "\n".join(lines).rstrip() + "\n"


def section(library: str, version: str, results: list[Result]) -> list[str]:
    by_verdict: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_verdict[result.verdict].append(result)
    counted = ", ".join(f"{len(by_verdict[verdict])} {verdict}" for verdict in VERDICTS)
    lines = [f"## {version}", "", f"{counted}; not counted: {len(by_verdict[NO_TRANSFORMER])} "
             "without transformer blocks.", ""]  # fmt: skip
    lines += summary(results)
    for name, group in grouped(by_verdict["accepted"], lambda result: result.patch).items():
        lines += [f"### Accepted by `{name}`", ""]
        lines += (names_by_class if library == "timm" else rows)(group)
    if by_verdict["refused"]:
        lines += ["### Refused", "", *refused(by_verdict["refused"])]
    for verdict in ("not built", "wrong"):
        if by_verdict[verdict]:
            lines += [f"### {verdict.capitalize()}", ""]
            for reason, group in grouped(by_verdict[verdict], lambda one: one.reason).items():
                names = ", ".join(f"`{one.name}`" for one in group)
                lines += wrapped(f"- {names}: {reason}", "  ")
            lines.append("")
    return lines


def grouped(results: Iterable[Result], key: Callable[[Result], str]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return dict(sorted(groups.items()))


def summary(results: list[Result]) -> list[str]:
    lines = [
        "| patch | towers | accepted | refused | wrong | never touched | positions | pooling |",
        "| --- | --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for name, group in grouped((one for one in results if one.patch), lambda r: r.patch).items():
        counted = Counter(one.verdict for one in group)
        accepted = [one for one in group if one.layout]
        front = span(one.layout["prefix"] for one in accepted)
        back = span(one.layout["suffix"] for one in accepted)
        untouched = f"{front} in front" + (f", {back} at the end" if back != "0" else "")
        ways = [sorted({one.layout[what] for one in accepted}) for what in ("positions", "pooling")]
        towers = ", ".join(f"`{tower}`" for tower in sorted({one.tower for one in group}))
        lines.append(
            f"| `{name}` | {towers} | {counted['accepted']} | {counted['refused']} | "
            f"{counted['wrong']} | {untouched} | {' | '.join(', '.join(way) for way in ways)} |"
        )
    return [*lines, ""]


def span(numbers: Iterable[int]) -> str:
    ordered = sorted(set(numbers))
    return (
        " to ".join(str(one) for one in dict.fromkeys((ordered[0], ordered[-1]))) if ordered else ""
    )


def names_by_class(results: list[Result]) -> list[str]:
    lines = []
    for family, group in grouped(results, lambda result: result.family).items():
        names = ", ".join(f"`{one.name}`" for one in group)
        lines += [*wrapped(f"{family} ({len(group)}): {names}."), ""]
    return lines


def rows(results: list[Result]) -> list[str]:
    lines = ["| class | reduced in | notes |", "| --- | --- | --- |"]
    for result in results:
        lines.append(f"| `{result.name}` | `{result.tower}` | {'; '.join(result.notes)} |")
    return [*lines, ""]


def refused(results: list[Result]) -> list[str]:
    no_patch = [one for one in results if "no patch for" in one.reason]
    lines = []
    if no_patch:
        families = ", ".join(
            f"`{family}` ({len(group)})"
            for family, group in grouped(no_patch, lambda one: one.family).items()
        )
        lines += [*wrapped(f"No patch yet ({len(no_patch)}): {families}."), ""]
    others = [one for one in results if one not in no_patch]
    for reason, group in grouped(others, lambda one: plainly(one.reason)).items():
        names = ", ".join(f"`{one.name}`" for one in group)
        lines += wrapped(f"- {names}: {reason}", "  ")
    return [*lines, ""]


def wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    sys.exit(main())
