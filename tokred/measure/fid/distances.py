"""Distances between two sets of images, by their features; computed by torchmetrics in float64."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokred.optional import require

KID_SUBSETS = 100
"""How many subsets of the images the kernel distance is averaged over."""


def frechet_distance(
    ours: Float[np.ndarray, "some dim"], theirs: Float[np.ndarray, "others dim"]
) -> float:
    """The Frechet distance between two Gaussians that have the means m and n and the covariances A
    and B of the two sets: `|m - n|^2 + tr(A + B - 2 (AB)^1/2)`.

    Computed by torchmetrics' `FrechetInceptionDistance`, in float64.
    """
    torchmetrics = require("torchmetrics.image.fid", "fid")
    # The main process computes scores alone: it must not wait for the others.
    metric = torchmetrics.FrechetInceptionDistance(_Given(ours.shape[1]), sync_on_compute=False)
    metric.update(torch.from_numpy(theirs).double(), real=True)
    metric.update(torch.from_numpy(ours).double(), real=False)
    return float(metric.compute())


def kernel_distance(
    ours: Float[np.ndarray, "some dim"], theirs: Float[np.ndarray, "others dim"], subset: int
) -> tuple[float, float]:
    """The kernel distance: the squared maximum mean discrepancy with the kernel (x.y / dim + 1)^3,
    unbiased. Its mean and its standard deviation over 100 subsets of `subset` images; every call
    chooses the same subsets.

    Computed by torchmetrics' `KernelInceptionDistance`, in float64.
    """
    torchmetrics = require("torchmetrics.image.kid", "fid")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that features are kept in memory
        metric = torchmetrics.KernelInceptionDistance(
            _Given(ours.shape[1]), KID_SUBSETS, subset, sync_on_compute=False
        )
    metric.update(torch.from_numpy(theirs).double(), real=True)
    metric.update(torch.from_numpy(ours).double(), real=False)
    before = torch.get_rng_state()  # the stream from which it draws the subsets
    try:
        torch.default_generator.manual_seed(0)
        mean, std = metric.compute()
    finally:
        torch.set_rng_state(before)
    return float(mean), float(std)


class _Given(nn.Module):
    """Stands in for a network: it is given features, and returns them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        return features
