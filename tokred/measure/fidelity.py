"""How close a model with fewer tokens stays to the dense model; this needs no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokred.data.inputs import Inputs, call, pixels
from tokred.engine.denoising import Denoising
from tokred.host import Host, Stage, find_host
from tokred.patching import hang, reduction_of, remove, uncompiled


@dataclass(frozen=True)
class Fidelity:
    """How close a reduced model is to the dense one.

    Attributes:
        images: how many images were compared.
        cosine: the mean cosine, over patch tokens and images, between the features that leave the
            last block and those of the dense model (Liang et al. 2022, table 1).
        agreement: the share of decisions (classes of images, pixels or queries, by the largest
            score) that are the same; None if the model decides nothing.
        depth_error: the mean of `|depth - dense depth| / dense depth` over pixels; None if the
            model estimates no depth.
        divergence: the mean Kullback-Leibler divergence, over decisions and in nats, of the reduced
            model's probabilities of classes from the dense model's; None if there are none.
    """

    images: int
    cosine: float
    agreement: float | None
    depth_error: float | None
    divergence: float | None = None

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"over {self.images} images: cosine of final features {self.cosine:.4f}"
        if self.agreement is not None:
            text += f", same decision {self.agreement:.2%}"
        if self.divergence is not None:
            text += f", divergence {self.divergence:.4g}"
        if self.depth_error is not None:
            text += f", relative depth error {self.depth_error:.2%}"
        return text


def fidelity(
    model: nn.Module, batches: Inputs | Iterable[Inputs], host: Host | None = None
) -> Fidelity:
    """Compares a model to which a reduction is applied with the same model without the reduction.

    Every batch runs through both, without gradients; the model is left as it was.

    Args:
        model: the model, in evaluation mode.
        batches: one batch of what the model takes, or several.
        host: the host it was applied with, if one was given to `tokred.apply`.

    Raises:
        ValueError: no reduction is applied, features come out reduced (`full_grid=False`), or
            there are no images.
        TypeError: a batch is neither a tensor nor a mapping.
    """
    model = uncompiled(model)
    reduction = reduction_of(model)
    if reduction is None:
        raise ValueError("no reduction is applied to the model; call tokred.apply first")
    if isinstance(reduction, Denoising):
        raise ValueError("a denoiser has no final features to compare: compare images (tokred fid)")
    if not reduction.full_grid:
        raise ValueError("features come out reduced: apply with full_grid=True to compare them")
    found, _ = find_host(model, host)
    differences = []
    with seeing(model, host) as see:
        for batch in _batches(batches):
            if not isinstance(batch, Tensor | Mapping):
                raise TypeError(
                    "batches must be tensors or mappings of what the model takes, without labels, "
                    f"not {type(batch).__name__}"
                )
            reduced = see(batch)
            remove(model)
            try:
                dense = see(batch)
            finally:
                hang(model, found, reduction)
            differences.append(compare(reduced, dense))
    return total(differences)


@dataclass(frozen=True)
class Decisions:
    """What a model has decided about its images.

    Attributes:
        chosen: the class of every image, pixel or query; None if the model chooses none.
        depth: of every pixel; None if the model estimates none.
        scores: of every class, along dimension 1 for pixels and the last for images and queries;
            None if there are none.
        probabilities: whether the scores are not logits, but probabilities up to a factor.
    """

    chosen: Tensor | None
    depth: Float[Tensor, "batch height width"] | None
    scores: Tensor | None = None
    probabilities: bool = False

    def logs(self) -> Tensor | None:
        """The logarithms of the probabilities of classes, along the last dimension."""
        if self.scores is None:
            return None
        scores = self.scores.movedim(1, -1) if self.scores.ndim == 4 else self.scores
        scores = scores.float()
        if self.probabilities:
            scores = scores.clamp(min=1e-12).log()
        return scores.log_softmax(-1)


@dataclass(frozen=True)
class Outputs:
    """What a model made of one batch.

    Attributes:
        images: how many there were.
        features: the patch tokens that left the last block.
        decisions: what it decided.
    """

    images: int
    features: Float[Tensor, "batch tokens dim"]
    decisions: Decisions

    @property
    def bytes(self) -> int:
        """The memory that the tensors take."""
        d = self.decisions
        tensors = (self.features, d.scores, d.chosen, d.depth)
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    def to(self, device: torch.device | str) -> Outputs:
        """The same on another device."""
        d = self.decisions
        chosen, depth, scores = (
            None if x is None else x.to(device) for x in (d.chosen, d.depth, d.scores)
        )
        decided = Decisions(chosen, depth, scores, d.probabilities)
        return Outputs(self.images, self.features.to(device), decided)


@contextmanager
def seeing(model: nn.Module, host: Host | None = None) -> Iterator[Callable[[Inputs], Outputs]]:
    """For the length of a `with` block, a function that runs the model on a batch, without
    gradients, and with whatever reduction it then has.

    Args:
        model: the model.
        host: the host, if one was given to `tokred.apply`.
    """
    found, tower = find_host(model, host)
    layout = found.layout(tower, None)
    features: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        features.append(output[0] if isinstance(output, tuple) else output)

    def see(batch: Inputs) -> Outputs:
        features.clear()
        with torch.no_grad():
            decided = decisions(call(model, batch))
        y = _channels_last(features[-1], found)
        y = y[:, layout.prefix : y.shape[1] - layout.suffix] if y.ndim == 3 else y.flatten(1, 2)
        return Outputs(len(pixels(batch)), y, decided)

    handle = found.blocks(tower)[-1].register_forward_hook(keep)
    try:
        yield see
    finally:
        handle.remove()


def decisions(outputs: Any) -> Decisions:
    """What a model has decided, read from its outputs by their names, or by their shape.

    Scores are [batch, classes], [batch, queries, classes] or [batch, classes, height, width]. Masks
    of prompts (SAM) decide for every pixel whether it is inside.
    """
    depth = _field(outputs, "predicted_depth")
    masks = _field(outputs, "masks_queries_logits")
    scores = _field(outputs, "logits")
    prompted = _field(outputs, "pred_masks")
    if prompted is not None:
        return Decisions((prompted > 0).long(), None)
    probabilities = masks is not None
    if isinstance(outputs, Tensor):
        scores = outputs
    if masks is not None:
        # The class of a pixel, as Mask2Former makes a semantic map out of its queries. The last
        # class means "none".
        queries = _field(outputs, "class_queries_logits")
        assert queries is not None
        scores = torch.einsum("bqc,bqhw->bchw", queries.softmax(-1)[..., :-1], masks.sigmoid())
    if depth is not None or scores is None:
        return Decisions(None, depth)
    chosen = scores.argmax(1 if scores.ndim == 4 else -1)
    return Decisions(chosen, None, scores, probabilities)


@dataclass(frozen=True)
class Difference:
    """The difference between two models on one batch, as sums that can be added over batches.

    Attributes:
        images: how many images there were.
        tokens, cosine: patch tokens, and the sum of the cosines between their features.
        chosen, same: decisions, and how many of them are the same.
        scored, divergence: decisions with probabilities, and the sum of the divergences.
        depths, error: pixels with a depth, and the sum of the relative errors.
    """

    images: int = 0
    tokens: int = 0
    cosine: float = 0.0
    chosen: int = 0
    same: int = 0
    scored: int = 0
    divergence: float = 0.0
    depths: int = 0
    error: float = 0.0


def compare(ours: Outputs, theirs: Outputs, multilabel: bool = False) -> Difference:
    """How the outputs of a reduced model differ from those of the dense model on the same batch.

    Args:
        ours: outputs of the reduced model.
        theirs: outputs of the dense model.
        multilabel: whether every class has a probability of its own; then divergences are summed
            over classes.
    """
    a, b = ours.decisions, theirs.decisions
    found: dict[str, Any] = {"images": ours.images}
    cosine = F.cosine_similarity(ours.features.double(), theirs.features.double(), dim=-1)
    found |= {"tokens": cosine.numel(), "cosine": float(cosine.sum())}
    if a.chosen is not None and b.chosen is not None:
        same = a.chosen == b.chosen
        if multilabel and a.scores is not None and b.scores is not None:
            same = ((a.scores > 0) == (b.scores > 0)).all(-1)
        for scores in (a.scores, b.scores):
            if scores is not None:  # with scores that are not numbers, nothing is decided
                same = same & ~scores.isnan().any(1 if scores.ndim == 4 else -1)
        found |= {"chosen": a.chosen.numel(), "same": int(same.sum())}
    if a.scores is not None and b.scores is not None:
        divergence = (_bernoulli if multilabel else _categorical)(a, b)
        found |= {"scored": divergence.numel(), "divergence": float(divergence.double().sum())}
    if a.depth is not None and b.depth is not None:
        # In double: in half precision, an error divided by a small depth is infinite.
        ours_depth, depth = a.depth.double(), b.depth.double()
        there = depth > 0
        error = (ours_depth - depth).abs()[there] / depth[there]
        found |= {"depths": int(there.sum()), "error": float(error.sum())}
    return Difference(**found)


def _categorical(ours: Decisions, theirs: Decisions) -> Tensor:
    """KL(theirs || ours) of every decision."""
    a, b = ours.logs(), theirs.logs()
    assert a is not None and b is not None
    return _weighted(b.exp(), b - a).sum(-1).clamp(min=0)  # rounding may make it negative


def _bernoulli(ours: Decisions, theirs: Decisions) -> Tensor:
    """KL(theirs || ours), summed over classes, each of which is present or not."""
    assert ours.scores is not None and theirs.scores is not None
    a, b = ours.scores.float(), theirs.scores.float()
    yes, no = F.logsigmoid(b), F.logsigmoid(-b)
    each = _weighted(yes.exp(), yes - F.logsigmoid(a))
    return (each + _weighted(no.exp(), no - F.logsigmoid(-a))).sum(-1)


def _weighted(probability: Tensor, logs: Tensor) -> Tensor:
    """Their product; 0 where the probability is 0, although the logarithm is infinite there (for
    classes that a model has ruled out)."""
    return torch.where(probability == 0, 0, probability * logs)


def total(differences: Sequence[Difference]) -> Fidelity:
    """The means over all batches.

    Raises:
        ValueError: there is no image.
    """
    images = sum(d.images for d in differences)
    if not images:
        raise ValueError("batches must hold at least one image")

    def mean(numerator: str, denominator: str) -> float | None:
        many = sum(getattr(d, denominator) for d in differences)
        return sum(getattr(d, numerator) for d in differences) / many if many else None

    cosine = mean("cosine", "tokens")
    assert cosine is not None
    return Fidelity(
        images,
        cosine,
        mean("same", "chosen"),
        mean("error", "depths"),
        mean("divergence", "scored"),
    )


def _channels_last(y: Tensor, host: Host | Stage) -> Tensor:
    first = isinstance(host, Stage) and host.family.channels_first
    return y.movedim(1, -1) if first else y


def _batches(given: Inputs | Iterable[Inputs]) -> Iterable[Inputs]:
    if isinstance(given, Tensor | Mapping):
        return [given]
    return given


def _field(outputs: Any, name: str) -> Tensor | None:
    found = outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
    return found if isinstance(found, Tensor) else None


# `tokred.fidelity` is the function, which would hide the rest of this module behind its name.
vars(fidelity).update(decisions=decisions, Decisions=Decisions)
