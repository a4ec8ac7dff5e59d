"""Goes over every model name of the installed timm that builds a VisionTransformer.

    python examples/check_timm_names.py            # all of them: some minutes
    python examples/check_timm_names.py 'deit*'    # those that match

Each is built with random weights, two blocks deep, LayerScale drawn away from its tiny default.
*Accepted*: with `keep_rate=1` the answer and the features are bit-identical to the dense model's,
and with a lower one exactly the asked number of tokens reaches every MLP, for a method that merges
and one that prunes (where pruning alone is refused, the reason is printed). *Refused*:
`tokred.apply` says why. *Wrong*: anything else. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from tqdm import tqdm

import tokred

KEEP = tokred.Stages(0.4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pattern", nargs="?", default="*", help="names to check, such as 'deit*'")
    pattern = parser.parse_args().pattern
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    modules = [
        name
        for name in timm.list_modules()
        if getattr(sys.modules[f"timm.models.{name}"], "VisionTransformer", None)
        is VisionTransformer
    ]
    listed = {name for module in modules for name in timm.list_models(pattern, module=module)}
    found: Counter[str] = Counter()
    for name in tqdm(sorted(listed), unit="model", disable=not sys.stderr.isatty()):
        model = build(name)
        if model is None:
            continue
        verdict = check(model)
        found[verdict.split(":")[0]] += 1
        if verdict != "accepted":
            tqdm.write(f"{name}: {verdict}")
    print(f"timm {timm.__version__}: {', '.join(f'{found[v]} {v}' for v in VERDICTS)}")
    return int(found["wrong"] > 0 or not found["accepted"])


VERDICTS = ("accepted", "refused", "wrong")


def build(name: str) -> nn.Module | None:
    """Two blocks of the model, or None if the name stands for another class."""
    try:
        model: nn.Module = timm.create_model(name, depth=2, img_size=224, num_classes=3)
    except (TypeError, AssertionError):
        return None  # takes no depth: not one of the family
    if not isinstance(model, VisionTransformer):
        return None
    for key, parameter in model.named_parameters():
        if key.endswith("gamma"):
            nn.init.uniform_(parameter, 0.1, 0.5)
    built: nn.Module = model.eval()
    return built


@torch.no_grad()
def check(model: nn.Module) -> str:
    images = torch.randn(1, 3, 224, 224)
    dense = model(images), model.forward_features(images)  # type: ignore[operator]
    for method in ("tome", "topk"):
        try:
            reduction = tokred.apply(model, method, keep_rate=1.0)
        except tokred.UnsupportedModelError as error:
            return (
                f"refused: {error}" if method == "tome" else f"accepted: but not {method}: {error}"
            )
        kept = model(images), model.forward_features(images)  # type: ignore[operator]
        if not all(torch.equal(a, b) for a, b in zip(kept, dense, strict=True)):
            return f"wrong: keep_rate=1 is not the dense model, with {method}"
        reduction = tokred.apply(model, method, KEEP)
        answer, seen = run_and_count(model, images)
        rows, columns = reduction.layout.grid
        asked = [reduction.layout.prefix + count for count in KEEP(rows * columns, 2)]
        if seen != asked:
            return f"wrong: {seen} tokens instead of {asked}, with {method}"
        if not answer.isfinite().all():
            return f"wrong: the answer is not finite, with {method}"
        tokred.remove(model)
        if not torch.equal(model(images), dense[0]):
            return f"wrong: not the dense model any more after {method} was removed"
    return "accepted"


def run_and_count(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The answer, and how many tokens entered the MLP of every block."""
    seen: list[int] = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for block in model.blocks  # type: ignore[union-attr]
    ]
    answer: torch.Tensor = model(images)
    for hook in hooks:
        hook.remove()
    return answer, seen


if __name__ == "__main__":
    sys.exit(main())
