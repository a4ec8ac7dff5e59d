"""What a patch promises of a model, and whether it keeps its promises.

>>> from tokred.measure import contract
>>> model = contract.lively(timm.create_model("deit_tiny_patch16_224", depth=4)).eval()
>>> for broken in contract.check(model, torch.randn(2, 3, 224, 224)):
...     print(broken)

Every promise is a function in `PROMISES`. None of them asks the patch or the engine what is right:
each compares the patched model with the unpatched one. Attention is watched from outside, and
where needed changed (`watching`). The tokens to merge or drop are drawn at random (`probing`), so
that the number of a token says nothing about its position.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tokred.data.inputs import Inputs
from tokred.host import Host, WindowedHost, find_denoiser, find_host
from tokred.measure.contract.comparing import leaves
from tokred.measure.contract.findings import Broken, Verdict, said
from tokred.measure.contract.promises import PROMISES, verdict_on
from tokred.measure.contract.trial import Features, Scores, Trial, entered, handed_out
from tokred.patching import reduction_of

__all__ = [
    "PROMISES",
    "Broken",
    "Features",
    "Scores",
    "Verdict",
    "check",
    "entered",
    "examine",
    "handed_out",
    "leaves",
    "lively",
    "said",
]


def check(
    model: nn.Module,
    inputs: Inputs,
    host: Host | WindowedHost | None = None,
    *,
    features: Features = handed_out,
    scores: Scores | None = None,
    equal: Inputs | None = None,
    promises: Iterable[str] | None = None,
) -> list[Broken]:
    """Tries a model with its patch, and says which promises the patch does not keep. An exception
    in a run of the patched model is a broken promise, too. The model is left as it was.

    A promise for which the patch refuses the model (`tokred.apply` raises `UnsupportedModelError`)
    is not broken. `examine` tells which promises could not be tried.

    Args:
        model: the model, without a reduction, in evaluation mode. With weights as they are
            initialised, many mistakes do not show: see `lively`.
        inputs: what to call it with: two images or more, without padding.
        host: the patch; found from the class of the model if not given.
        features: `features(model, inputs)`: what the model hands out besides its answer; if not
            given, what models of timm and transformers do.
        scores: `scores(outputs)`: what the outputs say of whole images. If not given: outputs of
            [batch, numbers]; where outputs have names, those that are called logits, embeddings or
            the output of a pooler.
        equal: inputs in which every patch of an image shows one of two pictures, for a model that
            does not tell positions apart. Merging equal tokens then has to give the same answer.
        promises: which promises to try; all, if not given.

    Raises:
        UnsupportedModelError: no patch knows the model.
        ValueError: the model is training, or has a reduction; or there is no such promise.
        Exception: what the unpatched model raises.
    """
    verdicts = examine(
        model, inputs, host, features=features, scores=scores, equal=equal, promises=promises
    )
    return [broken for verdict in verdicts for broken in verdict.broken]


def examine(
    model: nn.Module,
    inputs: Inputs,
    host: Host | WindowedHost | None = None,
    *,
    features: Features = handed_out,
    scores: Scores | None = None,
    equal: Inputs | None = None,
    promises: Iterable[str] | None = None,
) -> list[Verdict]:
    """The same as `check`, promise by promise, with the reason for each that could not be tried.
    See there for arguments and errors."""
    names = list(PROMISES if promises is None else promises)
    for name in names:
        if name not in PROMISES:
            raise ValueError(f"promises must be some of {', '.join(PROMISES)}, not {name!r}")
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in evaluation mode: call model.eval() first")
    if reduction_of(model) is not None:
        raise ValueError("model has a reduction already: call tokred.remove(model) first")
    denoiser = find_denoiser(model) if host is None else None
    found, tower = (denoiser, model) if denoiser else find_host(model, host)
    trial = Trial(model, inputs, host, found, tower, features, scores, equal)
    trial.look_around()
    return [verdict_on(name, trial) for name in names]


def lively(model: nn.Module) -> nn.Module:
    """Draws all parameters away from values such as 0, 1 and 1e-5, so that a patch that leaves one
    out, or counts it twice, gives another answer. In place."""
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
    return model
