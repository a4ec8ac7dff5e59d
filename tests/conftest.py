"""Small host models with random weights, and the bundled checkpoint. Nothing is downloaded."""

from __future__ import annotations

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # there is a process for every core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else a name that does not exist is asked for again and again, for as long as 20 seconds.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import timm
import torch
from torch import nn

from tokred.data import zoo

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# What tests measure is nobody else's.
_CACHE = tempfile.TemporaryDirectory()
os.environ["TOKRED_CACHE"] = _CACHE.name

# The real classes, narrowed: wide layers test nothing more and cost minutes.
SMALL: dict[str, object] = {"embed_dim": 192, "num_heads": 3}

# The name in timm, its options, and the image size that makes a 4x4 or 5x5 grid.
HOSTS: dict[str, tuple[str, dict[str, object], int]] = {
    "vit": ("vit_tiny_patch16_224", {}, 64),
    "deit": ("deit_tiny_patch16_224", {}, 64),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, 64),
    "deit3, LayerScale": ("deit3_small_patch16_224", SMALL, 64),
    "augreg": ("vit_small_patch32_224", SMALL, 128),
    "mae, average pooling": ("vit_tiny_patch16_224", {"global_pool": "avg"}, 64),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 64),
    "clip, norm before": ("vit_base_patch32_clip_224", SMALL, 128),
    "siglip, attention pooling": ("vit_base_patch16_siglip_224", SMALL, 64),
    "dinov2, LayerScale": ("vit_small_patch14_dinov2", SMALL, 70),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", SMALL, 70),
    "QK-norm": ("vit_tiny_patch16_224", {"qk_norm": True}, 64),
    "registers, average pooling": ("vit_wee_patch16_reg1_gap_256", {**SMALL, "num_heads": 3}, 64),
    "hybrid": ("vit_tiny_r_s16_p8_224", {}, 128),
    "rectangular": ("vit_tiny_patch16_224", {"img_size": (64, 96)}, 64),
}


# What the fixture `digits` gives: model, images and labels, afresh at every call.
Digits = Callable[[], tuple[nn.Module, torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "accelerate" in sys.modules:  # a Trainer leaves a state behind that is the process's
        sys.modules["accelerate"].state.AcceleratorState._reset_state()


def small(name: str) -> nn.Module:
    """A host of 4 blocks with 10 classes, in evaluation mode, LayerScale made visible."""
    return copy.deepcopy(_small(name))


@cache
def _small(name: str) -> nn.Module:
    """Made once: drawing the weights takes longer than most tests."""
    timm_name, options, size = HOSTS[name]
    options = {"img_size": size, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(timm_name, depth=4, num_classes=10, **options)
        make_visible(model)
    return model.eval()


def make_visible(model: nn.Module) -> None:
    """Draws LayerScale and the final latent away from the tiny values that they start with, so
    that a patch which drops or doubles them cannot hide."""
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.1, 0.5)
        if name.endswith(("cls_token", "reg_token", "dist_token", "latent")):
            nn.init.normal_(parameter, std=0.5)


def images_for(model: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size)


@pytest.fixture(params=HOSTS, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def vit(request: pytest.FixtureRequest) -> nn.Module:
    return small(request.param)


@pytest.fixture
def images(request: pytest.FixtureRequest) -> torch.Tensor:
    """Images for `vit` where the test has one, for the plain ViT otherwise."""
    if "vit" in request.fixturenames:
        return images_for(request.getfixturevalue("vit"))
    return torch.randn(2, 3, 64, 64)


@pytest.fixture
def plain() -> nn.Module:
    return small("vit")


@pytest.fixture(scope="session")
def digits() -> Digits:
    """The bundled checkpoint (a fresh copy at every call), its images and their labels."""
    held_out = zoo.held_out()
    images = zoo.normalise(held_out.images)
    return lambda: (zoo.load(), images, held_out.labels)


# Every method is tried on these hosts, which differ in what surrounds the patches, and these
# methods, one of each kind, on every host. All others together take minutes: `pytest -m slow`.
HOSTS_FOR_ALL = ("vit", "distilled", "siglip, attention pooling", "registers, average pooling")
METHODS_FOR_ALL = ("tome", "atc", "topk", "evit", "svit")


# Tests that take long, and of whose cases every n-th is enough in every run.
SPARED = {
    ("test_composition", "test_some_blocks_may_be_compiled_and_others_not"): 3,
    ("test_composition", "test_blocks_compiled_one_by_one_share_their_code"): 3,
    ("test_composition", "test_fully_sharded_on_one_rank"): 2,
    ("test_diffusers", "test_a_patched_unet_compiles_in_one_graph"): 2,
    ("test_hosts", "test_compiles_in_one_graph_without_recompiling"): 3,
    ("test_hosts", "test_tapping_does_not_change_the_answer"): 4,
    ("test_hosts", "test_intermediate_features_are_full_grids_in_order"): 4,
    ("test_hosts", "test_removing_leaves_no_trace"): 4,
    ("test_waits_for_nothing", "test_a_denoiser_waits_for_nothing"): 4,
    ("test_waits_for_nothing", "test_a_family_waits_for_nothing"): 3,
    ("test_waits_for_nothing", "test_windows_wait_for_nothing"): 4,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    for item in items:
        if item.get_closest_marker("slow"):
            continue
        test = item.path.stem, getattr(item, "originalname", item.name)
        if seen[test] % SPARED.get(test, 1):
            item.add_marker(pytest.mark.slow)
        seen[test] += 1
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if {"vit", "method"} <= parameters.keys():
            known = parameters["vit"] in HOSTS_FOR_ALL or parameters["method"] in METHODS_FOR_ALL
            if not known:
                item.add_marker(pytest.mark.slow)
