"""Random merging: the baseline that every method must beat."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from tokred.maps import Clusters, in_order_of_first_member
from tokred.reducers.protocol import Tokens
from tokred.reducers.registry import register


@register("random")
@dataclass(frozen=True)
class Random:
    """Merges tokens at random, whatever is in them.

    The draw depends on the seed, the layer and the number of tokens alone: it is the same for every
    image of a batch, and for every pass. The global random stream is not touched.
    """

    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset()
    baseline: ClassVar[bool] = True
    bibtex: ClassVar[str] = ""

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        batch, num, _ = tokens.x.shape
        seed = self.seed + 1009 * tokens.layer
        if torch.onnx.is_in_onnx_export():
            labels = _constant(num, keep, seed)
        else:
            labels = partition(num, keep, seed)
        return Clusters(labels.to(tokens.x.device).repeat(batch, 1), keep)


# A custom operator: a generator cannot be part of a compiled graph.
@torch.library.custom_op(
    "tokred::random_partition",
    mutates_args=(),
    schema="(int tokens, int num_clusters, int seed) -> Tensor",
)
def partition(tokens: int, num_clusters: int, seed: int) -> Tensor:
    """Draws `num_clusters` tokens; every other token joins one of them. Labels [tokens], int64."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens, generator=generator)
    labels: Int[Tensor, " tokens"] = torch.empty(tokens, dtype=torch.int64)
    labels[order[:num_clusters]] = torch.arange(num_clusters)
    others = (tokens - num_clusters,)
    labels[order[num_clusters:]] = torch.randint(num_clusters, others, generator=generator)
    return in_order_of_first_member(labels[None])[0]


@partition.register_fake
def _(tokens: int, num_clusters: int, seed: int) -> Tensor:
    return torch.empty(tokens, dtype=torch.int64)


def _constant(tokens: int, num_clusters: int, seed: int) -> Int[Tensor, " tokens"]:
    """`partition` for ONNX, which has no operator like ours: the labels themselves."""
    # In another thread, which draws numbers rather than records that they are to be drawn.
    with ThreadPoolExecutor(1) as elsewhere:
        drawn = elsewhere.submit(lambda: partition(tokens, num_clusters, seed).tolist())
    return torch.tensor(drawn.result())
