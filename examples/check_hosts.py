"""Tries tokred on every model name of timm and every vision model class of transformers.

    python examples/check_hosts.py                                   # all: a quarter of an hour
    python examples/check_hosts.py --library timm 'deit*'            # those that match
    python examples/check_hosts.py --jobs 2 --write docs/hosts.md    # all, and the page about it

Models are built with random weights, and as small as their constructor lets them be, with every
parameter drawn away from defaults such as 1e-5. Each one is found to be:

*accepted*: with `keep_rate=1` its answer, and its features where it offers them, are bit-identical
to the dense model's; with `keep_rate=0.5` exactly the asked number of tokens reaches every MLP, and
the answer is finite and another one, in which dropped tokens have no part; after `tokred.remove` it
is bit-identical again. All of that for a method that merges (`tome`) and one that prunes (`topk`);
where one of the two is refused, the page says so. (Models that attend in windows can have `slic`
alone: they are tried with that, and their tokens are not counted.)
*refused*: `tokred.apply` says why.
*not built*: no small model could be made or run, so nothing is known.
*wrong*: anything else. The script then exits with 1.

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import tokred
from tokred.data.inputs import Inputs, call
from tokred.host import Host, find_host, hosts

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
        return [Result("transformers", module, "", "not built", said(error))]
    return [found for name in names if (found := survey_transformers(classes.get(name)))]


# ---- timm


def survey_timm(name: str) -> Result | None:
    torch.manual_seed(0)
    result = Result("timm", name, "", "not built")
    try:
        with torch.device("meta"):
            full = timm.create_model(name)
    except Exception as error:
        result.reason = said(error)
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
        result.reason = said(error)
        return result
    judge(result, model, images, timm_features)
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
    for options in tries:
        try:
            with torch.device("meta"):
                outline = timm.create_model(name, **options)
            if kinds(outline) != kinds(full):
                continue
            if sum(parameter.numel() for parameter in outline.parameters()) > LARGEST:
                continue
            model = visible(timm.create_model(name, **options))
        except Exception:  # what constructors raise is of all kinds
            continue
        return model, torch.randn((2, size[0], *options.get("img_size", size[1:])))
    raise ValueError("no smaller model of the same modules could be made")


def timm_features(model: Any, images: Inputs) -> list[Tensor]:
    return [
        *tensors(model.forward_features(images)),
        *tensors(model.forward_intermediates(images, intermediates_only=True)),
    ]


# ---- transformers


def survey_transformers(cls: Any) -> Result | None:
    if not is_vision_class(cls):
        return None
    family = cls.__module__.split(".")[2]
    result = Result("transformers", cls.__name__, family, "not built")
    try:
        full = full_transformer(cls)
    except Exception as error:
        result.reason = said(error)
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
        result.reason = said(error)
        return result
    judge(result, model, inputs, hidden_states)
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
    return visible(cls(small_config(cls.config_class())))


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
    if "bool_masked_pos" in required:  # every second patch
        count = height // vision.patch_size * (width // vision.patch_size)
        count *= getattr(vision, "num_frames", 1) // getattr(vision, "tubelet_size", 1)
        inputs["bool_masked_pos"] = torch.arange(count).expand(2, -1) % 2 == 1
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


def hidden_states(model: Any, inputs: Inputs) -> list[Tensor]:
    assert isinstance(inputs, Mapping)
    return tensors(model(**inputs, output_hidden_states=True))


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


def visible(model: nn.Module) -> nn.Module:
    """Draws parameters away from defaults such as 0, 1 and 1e-5, so that a patch that drops or
    doubles one cannot hide; in evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim < 2 or name.endswith(("gamma", "lambda1", "lambda_1", "lambda_2")):
                parameter.uniform_(0.1, 0.5) if "bias" not in name else parameter.normal_(std=0.1)
            elif name.endswith("weight"):  # small ones make every attention the same average
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.5)
    return model.eval()


def tensors(output: Any) -> list[Tensor]:
    """All that a model has put out, as far as it is numbers with a fraction."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [one for part in output.values() for one in tensors(part)]
    if isinstance(output, list | tuple):
        return [one for part in output for one in tensors(part)]
    return []


@torch.no_grad()
def answered(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(1)  # some models draw masks
    return tensors(call(model, inputs))


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


def name_of(host: Host) -> str:
    """The file of a patch."""
    return next(name for name, one in hosts().items() if one is (host.base or host))


def methods_of(host: Host) -> tuple[str, ...]:
    """The methods to try: of a model in windows, the one that it can have."""
    return ("slic",) if host.stages else METHODS


Features = Callable[[Any, Inputs], list[Tensor]]


def judge(result: Result, model: nn.Module, inputs: Inputs, features: Features) -> None:
    """Fills in the verdict, and why."""
    host, tower = find_host(model)
    result.patch, result.tower = name_of(host), type(tower).__name__
    dense = answered(model, inputs)
    hidden = offered(features, model, inputs)
    result.verdict = "accepted"
    for method in methods_of(host):
        try:
            problem = tried(result, model, inputs, method, dense, hidden, features)
        except tokred.UnsupportedModelError as error:
            result.notes.append(f"not {method}: {plainly(str(error))}")
            continue
        except Exception as error:
            problem = said(error)
        finally:
            tokred.remove(model)
        if problem:
            result.verdict, result.reason = "wrong", f"{method}: {problem}"
            return


def tried(
    result: Result,
    model: nn.Module,
    inputs: Inputs,
    method: str,
    dense: list[Tensor],
    hidden: list[Tensor] | None,
    features: Features,
) -> str | None:
    """What is wrong with one method; None if nothing is."""
    full, _ = entered(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nothing is reduced
        tokred.apply(model, method, keep_rate=1.0)
    if not same(answered(model, inputs), dense):
        return "keep_rate=1 is not the dense model"
    if hidden is not None and not same(offered(features, model, inputs), hidden):
        return "with keep_rate=1, the features are not the dense model's"
    if method == "slic":  # in windows: feature maps have no sequence whose tokens could be counted
        reduction = tokred.apply(model, tokred.SLIC(tau=5.0), 0.5)
        layout = reduction.layout
        result.notes.append("slic, in the windows of its longest stage")
    else:
        reduction = tokred.apply(model, method, KEEP)
        layout = reduction.layout
        asked = [n + layout.others for n in KEEP(full[0] - layout.others, layout.layers)]
        blocks, mlps = entered(model, inputs)
        if mlps != asked:
            if [*mlps, *asked[-1:]] != [full[0], *asked] or blocks != mlps:
                return f"{mlps} tokens enter the MLPs instead of {asked}"
            result.notes.append("reduced between blocks")
    reduced = answered(model, inputs)
    if hidden is not None and offered(features, model, inputs) is None:
        return "features cannot be had"
    shapes = [one.shape for one in reduced], [one.shape for one in dense]
    if shapes[0] != shapes[1] and not reduction.averages:
        return f"the answer has shapes {shapes[0]} instead of {shapes[1]}"
    if any(
        got.shape == want.shape and bool((want.isfinite() & ~got.isfinite()).any())
        for got, want in zip(reduced, dense, strict=True)
    ):
        return "the answer is not finite"
    if all(close(got, want) for got, want in zip(reduced, dense, strict=True)):
        return "fewer tokens give the dense model's answer"
    if method == "topk":
        # Scores of whole images must not depend on what stands in for dropped tokens in features.
        wanted = offered(scores, model, inputs)
        tokred.apply(model, method, KEEP, full_grid=False)
        found = offered(scores, model, inputs)  # none, if the head needs the full grid
        if wanted and found and not all(map(close, found, wanted, repeat(1e-3))):
            return "tokens that were dropped are pooled"
    tokred.remove(model)
    if not same(answered(model, inputs), dense):
        return "not the dense model any more after it was removed"
    host, tower = find_host(model)
    inside = bool(host.pools(tower)) or any(
        name in host.methods for name in ("pool", "_pool", "forward_head")
    )
    result.layout = {
        "prefix": layout.prefix,
        "suffix": layout.suffix,
        "positions": "by token" if layout.by_position else "before",
        "pooling": "outside" if reduction.averages else "inside" if inside else "none",
    }
    return None


def entered(model: nn.Module, inputs: Inputs) -> tuple[list[int], list[int]]:
    """How many tokens entered every block, and its last part that was given tokens: the MLP, or
    what follows it."""
    host, tower = find_host(model)
    first: list[int] = []
    last: list[int] = []
    batch: list[int] = []

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        first.append(x.shape[1])
        last.append(x.shape[1])
        batch[:] = [x.shape[0]]

    def part(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[0] == batch[0]:
            last[-1] = x.shape[1]

    hooks = []
    for block in host.blocks(tower):
        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        parts = [module for module in block.modules() if module is not block]
        hooks += [module.register_forward_pre_hook(part) for module in parts]
    answered(model, inputs)
    for hook in hooks:
        hook.remove()
    return first, last


def scores(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What the model says of whole images."""
    output = call(model, inputs)
    if isinstance(output, Mapping):
        output = [output.get(name) for name in ("logits", "logits_per_image", "image_embeds")]
    return [one for one in tensors(output) if one.ndim == 2]


@torch.no_grad()
def offered(features: Features, model: nn.Module, inputs: Inputs) -> list[Tensor] | None:
    """What the model hands out besides its answer; None if it does not."""
    torch.manual_seed(1)
    try:
        return features(model, inputs)
    except Exception:
        return None


def close(found: Tensor, wanted: Tensor, share: float = 1e-5) -> bool:
    """Whether two tensors differ by less than a share of the largest finite value."""
    if found.shape != wanted.shape or not wanted.numel():
        return found.shape == wanted.shape
    found, wanted = found.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0)
    return bool((found - wanted).abs().max() <= share * wanted.abs().max())


def same(found: list[Tensor] | None, wanted: list[Tensor]) -> bool:
    return (
        found is not None
        and len(found) == len(wanted)
        and all(
            a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(found, wanted, strict=True)
        )
    )


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


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
