"""Agglomerative token clustering.

Haurum et al., "Agglomerative Token Clustering", ECCV 2024, https://arxiv.org/abs/2409.11923,
section 3. Bottom-up hierarchical clustering of the tokens on the cosine distance of their keys,
until as many clusters are left as tokens shall stay. Differs from the published code in that
exactly the asked number of clusters comes out (there: one too many per block when there is a
class token, too few when heights are tied), and in that all prefix tokens are left alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from types import ModuleType
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokred.graphs import is_plain
from tokred.maps import Clusters, refuse_onnx
from tokred.optional import installed, require
from tokred.reducers.protocol import ADDED, Tokens, brief
from tokred.reducers.registry import register
from tokred.reducers.tome import mean_over_heads

_AT_ONCE = 2**21
"""How many distances are worked on at once on the CPU."""

LINKAGES = ("single", "complete", "average")
BACKENDS = ("auto", "numba", "scipy", "torch", "triton")


@register("atc")
@dataclass(frozen=True)
class ATC:
    """Merges the closest clusters of tokens until few enough are left.

    Tokens are compared by the cosine of their keys, averaged over heads.

    Args:
        linkage: how far apart two clusters are: as their closest members ("single", equation 1),
            their furthest members ("complete", equation 2), or on average ("average", equation 3).
        backend: see `cluster`.
        weighted: whether the mean of a cluster weighs its members by the number of original tokens
            that they stand for, or all alike.
    """

    linkage: str = "average"
    backend: str = "auto"
    weighted: bool = field(default=True, metadata=ADDED)

    needs: ClassVar[frozenset[str]] = frozenset({"key"})
    variants: ClassVar[tuple[str, ...]] = ("complete",)
    bibtex: ClassVar[str] = """@inproceedings{haurum2024atc,
  title     = {Agglomerative Token Clustering},
  author    = {Haurum, Joakim Bruslund and Escalera, Sergio and Taylor, Graham W. and
               Moeslund, Thomas B.},
  booktitle = {European Conference on Computer Vision},
  year      = {2024}
}"""

    __repr__ = brief

    def __post_init__(self) -> None:
        _check_options(self.linkage, self.backend)

    def on(self, device: torch.device | str) -> ATC:
        """The same method, with the backend that "auto" means on a device."""
        return dataclasses.replace(self, backend=choose(device, self.backend))

    def __call__(self, tokens: Tokens, keep: int) -> Clusters:
        assert tokens.key is not None
        labels = cluster(mean_over_heads(tokens.key), keep, self.linkage, self.backend)
        clusters = Clusters(labels, keep)
        return clusters if self.weighted else clusters.alike(tokens.size)


def cluster(
    features: Float[Tensor, "batch tokens dim"],
    num_clusters: int,
    linkage: str = "average",
    backend: str = "auto",
) -> Int[Tensor, "batch tokens"]:
    """Clusters every sample on cosine distance; returns the cluster of every token, int64.

    Exact: the partition of `scipy.cluster.hierarchy.linkage` cut at `num_clusters`, and exactly
    that many clusters, also where heights are tied. There, the least (height, first token of one
    cluster, first token of the other) is merged first, or, with single linkage, the least
    (distance, token, later token); all backends but "scipy" agree on that to the last bit, given
    the same distances. Clusters are numbered in the order of their first tokens. A row of zeros has
    distance 1 to every other row.

    Args:
        features: what tokens are compared by, any floating dtype; need not be normalised. Tokens
            with NaN or infinity have distance 2, the largest, to all others.
        num_clusters: in [1, tokens].
        linkage: "single", "complete" or "average".
        backend: "numba" and "scipy" run on the CPU (features elsewhere are copied there and the
            labels back), "torch" on any device, "triton" on CUDA devices. "auto" is what `choose`
            says.

    Raises:
        ValueError: an argument is out of range, or "triton" is asked for on the CPU without its
            interpreter (`TRITON_INTERPRET=1`).
        ModuleNotFoundError: the backend is not installed; the message says how to get it.
    """
    _check_options(linkage, backend)
    if not 1 <= num_clusters <= features.shape[1]:
        raise ValueError(
            f"num_clusters must be in [1, {features.shape[1]}] for {features.shape[1]} tokens, "
            f"not {num_clusters}"
        )
    labels: Tensor
    if is_plain(features):
        labels = _clustered(features, num_clusters, linkage, backend)
    else:
        labels = _cluster(features, num_clusters, linkage, backend)
    return labels


def choose(device: torch.device | str, backend: str = "auto") -> str:
    """The backend that "auto" means on a device; any other backend is returned as it is.

    "auto" is "triton" on CUDA devices if it is installed (3.3 or later), on the CPU "numba" if it
    is installed and otherwise "scipy", and "torch" in all other cases.

    Raises:
        ValueError: no backend has that name, or it cannot run on that device.
        ModuleNotFoundError: it is not installed; the message says how to get it.
    """
    _check_options("average", backend)
    kind = torch.device(device).type
    if backend == "auto":
        if kind == "cpu":
            return "numba" if _installed("numba") else "scipy"
        return "triton" if kind == "cuda" and _installed("triton") else "torch"
    if backend == "numba":
        require("numba", "cpu")
    if backend == "triton":
        if not _installed("triton"):
            raise ModuleNotFoundError(
                "this needs triton >= 3.3, which comes with torch >= 2.7 for CUDA on Linux"
            )
        if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f'backend "triton" needs features on a CUDA device, not on {kind}: choose "auto", '
                "or set TRITON_INTERPRET=1 to try it slowly"
            )
    return backend


@cache
def _installed(library: str) -> bool:
    if not installed(library):
        return False
    # The interpreter of Triton 3.2 (torch 2.6) writes where it must not when it runs our kernel.
    return library != "triton" or _version("triton") >= (3, 3)


def _version(library: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(library).split(".")[:2])


def cosine_distance(
    features: Float[Tensor, "batch tokens dim"],
) -> Float[Tensor, "batch tokens tokens"]:
    """1 - cos of all pairs of tokens, float32, in [0, 2].

    Tokens are normalised, and multiplied, in at least float32, also under autocast. A token of
    zeros is at distance 1 to all others; one with NaN or infinity at distance 2. Results are
    multiples of 2**-24, so that float64 sums of them are exact. The diagonal means nothing. Entries
    below it may differ from those above in the last bit.
    """
    return _distance(*_unit(features))


def _unit(
    features: Float[Tensor, "batch tokens dim"],
) -> tuple[Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"] | None]:
    """Tokens of length 1, in at least float32; zeros stay zeros, and tokens with NaN or infinity
    become zeros. And which tokens have neither; None if no token has."""
    x = features.detach()
    # The lengths of rows whose entries are not contiguous take eight times as long.
    x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if x.device.type == "cpu" and x.numel() > 0:
        shortest, longest = torch.aminmax(length)
        if shortest > 2**-40 and longest < 2**40:
            return x / length, None
    # The squares of some features overflow or vanish, so tokens are scaled first. On the CPU, by a
    # power of two, which changes no bit of the result: so a token does not depend on whether other
    # tokens of its batch need scaling.
    scale = x.abs().amax(-1, keepdim=True)
    if x.device.type == "cpu":
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent.clamp(-100, 100))
    finite = x.isfinite().all(-1)
    x = torch.where(finite[..., None], x / torch.where(scale == 0, 1, scale), 0)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length == 0, 1, length), finite


def _distance(
    unit: Float[Tensor, "batch tokens dim"], finite: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, "batch tokens tokens"]:
    """The distances of what `_unit` gives."""
    # The product is rounded before it is subtracted from 1: results of a single operation
    # (`baddbmm`) need not be multiples of 2**-24. Equal tokens get equal products, because the
    # libraries that we know sum every entry in the same order. Products in float64 would guarantee
    # it, but take two to three times as long.
    with torch.autocast(unit.device.type, enabled=False):
        distance = _one_minus((unit @ unit.mT).float())
    return _apart(distance, finite)


def _apart(
    distance: Float[Tensor, "batch tokens tokens"], finite: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, "batch tokens tokens"]:
    """Puts tokens that are not finite as far as can be from all others, in place."""
    if finite is None:
        return distance
    return distance.masked_fill_(~(finite[:, None] & finite[..., None]), 2)


def _upper_distance(
    unit: Float[Tensor, "batch tokens dim"], distance: Float[Tensor, "batch tokens tokens"]
) -> Float[Tensor, "batch tokens tokens"]:
    """The same for tokens on the CPU, all of them finite, written to `distance`. Only entries above
    the diagonal are right."""
    batch, num, _ = unit.shape
    # A few rows at a time, from the diagonal on. That is half of the work, and the result is still
    # in the cache when it is subtracted from 1. With fewer rows, products would be small and slow.
    rows = max(256, _AT_ONCE // 2 // max(1, batch * num))
    for start in range(0, num, rows):
        block = distance[:, start : start + rows, start:]
        left, right = unit[:, start : start + rows], unit[:, start:].mT
        if unit.dtype == block.dtype:
            torch.bmm(left, right, out=block)
        else:
            block.copy_(left @ right)
        _one_minus(block)
    return distance


def _one_minus(
    cosine: Float[Tensor, "batch rows columns"],
) -> Float[Tensor, "batch rows columns"]:
    """1 - cosine, cut to [0, 2], in place."""
    torch.sub(cosine.new_ones(()), cosine, out=cosine)
    return cosine.clamp_(0, 2)


def _kernel(backend: str) -> ModuleType:
    """The module of a backend, imported when it is used: each needs a library of its own."""
    if backend == "numba":
        from tokred.kernels import agglomerative_numba

        return agglomerative_numba
    if backend == "scipy":
        from tokred.kernels import agglomerative_scipy

        return agglomerative_scipy
    if backend == "triton":
        from tokred.kernels import agglomerative_triton

        return agglomerative_triton
    from tokred.kernels import agglomerative_torch

    return agglomerative_torch


def _clustered(features: Tensor, num_clusters: int, linkage: str, backend: str) -> Tensor:
    """The operator `tokred::cluster`."""
    chosen = choose(features.device, backend)
    x = features.detach()
    if chosen in ("numba", "scipy"):
        x = x.cpu()
    kernel = _kernel(chosen)
    if x.device.type != "cpu":
        there: Tensor = kernel.cluster(_distance(*_unit(x)), num_clusters, linkage)
        return there
    labels: Tensor
    if chosen == "numba" and x.dtype != torch.float64:
        labels = kernel.cluster_features(x.float(), num_clusters, linkage)
    else:
        parts = [
            kernel.cluster(distance, num_clusters, linkage) for distance in _in_parts(x, chosen)
        ]
        labels = parts[0] if len(parts) == 1 else torch.cat(parts)
    return labels.to(features.device)


def _in_parts(
    x: Float[Tensor, "batch tokens dim"], backend: str
) -> Iterator[Float[Tensor, "some tokens tokens"]]:
    """The distances of a few samples at a time, on the CPU: as many as there are threads, or more
    if they fit into the cache. Only entries above the diagonal are right."""
    num = x.shape[1]
    at_once = max(torch.get_num_threads(), _AT_ONCE // max(1, num) ** 2)
    for part in x.split(at_once):
        # Where numba is installed, all backends get the distances that it gets.
        if x.dtype != torch.float64 and (backend == "numba" or _installed("numba")):
            from tokred.kernels import cosine_numba

            yield cosine_numba.distances(part.float().contiguous())
        else:
            unit, finite = _unit(part)
            fresh = part.new_empty((len(part), num, num), dtype=torch.float32)
            yield _apart(_upper_distance(unit, fresh), finite)


# A custom operator, which is opaque to torch.compile, so that a compiled model has no graph break.
@torch.library.custom_op(
    "tokred::cluster",
    mutates_args=(),
    schema="(Tensor features, int num_clusters, str linkage, str backend) -> Tensor",
)
def _cluster(features: Tensor, num_clusters: int, linkage: str, backend: str) -> Tensor:
    return _clustered(features, num_clusters, linkage, backend)


@_cluster.register_fake
def _(features: Tensor, num_clusters: int, linkage: str, backend: str) -> Tensor:
    refuse_onnx("atc")  # here, where it is asked in whatever way the model is exported
    return features.new_empty(features.shape[:2], dtype=torch.int64)


def _check_options(linkage: str, backend: str) -> None:
    if linkage not in LINKAGES:
        raise ValueError(f"linkage must be one of {', '.join(LINKAGES)}, not {linkage!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
