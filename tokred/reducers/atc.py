"""Agglomerative token clustering.

Haurum et al., "Agglomerative Token Clustering", ECCV 2024, https://arxiv.org/abs/2409.11923,
section 3. Bottom-up hierarchical clustering of the tokens on the cosine distance of their keys,
until as many clusters are left as tokens shall stay. Differs from the published code in that
exactly the asked number of clusters comes out (there: one too many per block when there is a
class token, too few when heights are tied), and in that all prefix tokens are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tokred.maps import Clusters
from tokred.reducers import Tokens, register
from tokred.reducers.tome import mean_over_heads

LINKAGES = ("single", "complete", "average")
BACKENDS = ("auto", "scipy")


@register("atc")
@dataclass(frozen=True)
class ATC:
    """Merges the closest clusters of tokens until few enough are left.

    Tokens are compared by the cosine of their keys, averaged over heads.

    Args:
        linkage: how far apart two clusters are: as their closest members ("single", equation 1),
            their furthest members ("complete", equation 2), or on average ("average", equation 3).
        backend: see `cluster`.
    """

    linkage: str = "average"
    backend: str = "auto"

    needs: ClassVar[frozenset[str]] = frozenset({"key"})
    bibtex: ClassVar[str] = """@inproceedings{haurum2024atc,
  title     = {Agglomerative Token Clustering},
  author    = {Haurum, Joakim Bruslund and Escalera, Sergio and Taylor, Graham W. and
               Moeslund, Thomas B.},
  booktitle = {European Conference on Computer Vision},
  year      = {2024}
}"""

    def __post_init__(self) -> None:
        _check_options(self.linkage, self.backend)

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        assert tokens.key is not None
        labels = cluster(mean_over_heads(tokens.key), keep, self.linkage, self.backend)
        return Clusters(labels, keep)


def cluster(
    features: Float[Tensor, "batch tokens dim"],
    num_clusters: int,
    linkage: str = "average",
    backend: str = "auto",
) -> Int[Tensor, "batch tokens"]:
    """Clusters every sample on cosine distance; returns the cluster of every token.

    Exact: the partition of `scipy.cluster.hierarchy.linkage` cut at `num_clusters`, and exactly
    that many clusters, also where heights are tied (there, the merges that absorb the earlier
    tokens come first). Clusters are numbered in the order of their first tokens. A row of zeros
    has distance 1 to every other row.

    Args:
        features: what tokens are compared by; need not be normalised.
        num_clusters: in [1, tokens].
        linkage: "single", "complete" or "average".
        backend: "scipy" runs on the CPU, one sample at a time; "auto" is the fastest there is.

    Raises:
        ValueError: an argument is out of range, or a feature is NaN or infinite.
    """
    _check_options(linkage, backend)
    if not 1 <= num_clusters <= features.shape[1]:
        raise ValueError(
            f"num_clusters must be in [1, {features.shape[1]}] for {features.shape[1]} tokens, "
            f"not {num_clusters}"
        )
    labels: Tensor = _cluster_with_scipy(features, num_clusters, linkage)
    return labels


# An opaque operator, so that a compiled model has no graph break here.
@torch.library.custom_op(
    "tokred::cluster_with_scipy",
    mutates_args=(),
    schema="(Tensor features, int num_clusters, str linkage) -> Tensor",
)
def _cluster_with_scipy(features: Tensor, num_clusters: int, linkage: str) -> Tensor:
    unit = F.normalize(features.detach().cpu().to(torch.float64), dim=-1)
    labels = [_cluster_one(sample, num_clusters, linkage) for sample in unit]
    return torch.tensor(labels, dtype=torch.int64).view(unit.shape[:2]).to(features.device)


@_cluster_with_scipy.register_fake
def _(features: Tensor, num_clusters: int, linkage: str) -> Tensor:
    return features.new_empty(features.shape[:2], dtype=torch.int64)


def _cluster_one(unit: Float[Tensor, "tokens dim"], num_clusters: int, linkage: str) -> list[int]:
    """The partition of one sample, from SciPy's dendrogram."""
    # SciPy is slow to import, and not needed by other methods.
    from scipy.cluster import hierarchy
    from scipy.spatial import distance

    num = len(unit)
    if num == 1:
        return [0]
    # Rounded to float32, so that equal tokens are exactly equally far from everything even if
    # the matrix product summed their rows in another order.
    far = (1 - (unit @ unit.T).float()).clamp_(min=0).double().numpy()
    try:
        merges = hierarchy.linkage(distance.squareform(far, checks=False), linkage)
    except ValueError as error:  # SciPy takes finite distances only
        raise ValueError("features must be finite, but some are NaN or infinite") from error

    # Name every cluster by its first token. Then each token but the first is absorbed once, by
    # an earlier one (`into`), at some height; the lowest of these merges are the ones to do.
    first = list(range(num))
    into, height = [0] * num, [0.0] * num
    pairs = merges[:, :2].astype(int).tolist()
    for (left, right), at in zip(pairs, merges[:, 2].tolist(), strict=True):
        stays, absorbed = first[left], first[right]
        if stays > absorbed:
            stays, absorbed = absorbed, stays
        first.append(stays)
        into[absorbed], height[absorbed] = stays, at
    order = sorted(range(1, num), key=height.__getitem__)  # stable: ties by token
    merged = set(order[: num - num_clusters])

    labels: list[int] = []
    clusters = 0
    for token in range(num):
        if token in merged:
            labels.append(labels[into[token]])
        else:
            labels.append(clusters)
            clusters += 1
    return labels


def _check_options(linkage: str, backend: str) -> None:
    if linkage not in LINKAGES:
        raise ValueError(f"linkage must be one of {', '.join(LINKAGES)}, not {linkage!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
