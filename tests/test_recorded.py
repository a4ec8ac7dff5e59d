"""The code computes what version 0.7.1 computed (tests/recorded.py says how that was recorded).

Values are compared everywhere, with a tolerance for rounding. Bits are compared where the libraries
and the kernels of the CPU are those of the recording: where the dense model, in which tokred has no
part, gives the recorded bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from recorded import Model, Recorded, digest, run, some, surroundings, tolerance
from safetensors.torch import load_file
from torch import Tensor

RECORD = Path(__file__).parent / "recorded" / "0.7.1.json"
WRITTEN: dict[str, Any] = json.loads(RECORD.read_text())
# With other versions of these, a small model may be another, or missing.
LIBRARIES = {
    name: (was, surroundings()["libraries"][name])
    for name, was in WRITTEN["libraries"].items()
    if was != surroundings()["libraries"][name]
}
OTHERWISE = {
    name: (WRITTEN[name], here)
    for name, here in surroundings().items()
    if name != "libraries" and WRITTEN[name] != here
} | LIBRARIES


@cache
def values() -> dict[str, Tensor]:
    return load_file(RECORD.with_suffix(".safetensors"))


@cache
def models() -> dict[str, Model]:
    return recorded.models()


# Answers that were wrong: the model takes its first patch for all of them, and it may be dropped.
REFUSED_SINCE = {
    ("transformers_clip, janus", "topk"),
    ("transformers_maskless, videomae, first token", "topk"),
}

# Features that came without the tokens that were dropped: they are full grids now.
FULL_SINCE = {
    ("transformers_clip, clip, averaging", "topk"),
    ("transformers_clip, siglip, averaging", "topk"),
    ("transformers_dinov2, dinov2, classifier", "topk"),
    ("transformers_dinov2, dinov2, registers, classifier", "topk"),
    ("transformers_maskless, videomae, averaging", "topk"),
    ("transformers_vit, ijepa, averaging", "topk"),
}

# Methods that merge. Without gradients, one kernel adds their tokens up since version 0.10, which
# rounds otherwise than the operators did: values are compared, and bits where the operators run.
ADDED_OTHERWISE_SINCE = {
    "tome",
    "atc",
    "mutual",
    "dpc_knn",
    "evit",
    "kmedoids",
    "pitome",
    "random",
}


def wrong(name: str, case: str, done: Recorded, bits: bool) -> Iterator[str]:
    """What is not as it was recorded."""
    setting, form = case.rsplit(", ", 1)
    if form == "eager" and setting.split(",")[0] in ADDED_OTHERWISE_SINCE:
        bits = False
    was = WRITTEN["models"][name]["cases"][case]
    since = (name, setting) in REFUSED_SINCE
    raised = "UnsupportedModelError" if since else was.get("raises")
    if done.raised != raised:
        yield f"{case}: raised {done.raised}, not {raised}"
        return
    if since:
        return
    if done.outputs.keys() != was.keys() - {"raises"}:
        yield f"{case}: gave {sorted(done.outputs)}, not {sorted(was)}"
        return
    for kind, output in done.outputs.items():
        shape = list(output.shape)
        if kind == "features" and (name, setting) in FULL_SINCE:
            full = WRITTEN["models"][name]["cases"][case.replace(setting, "tome")][kind]["shape"]
            if shape != full:
                yield f"{case}: {kind} is {shape}, not {full}"
            continue
        if shape != was[kind]["shape"] or output.dtype != torch.float32:
            yield f"{case}: {kind} is {shape} in {output.dtype}, not {was[kind]['shape']}"
            continue
        want = values()[f"{name}, {case}, {kind}"]
        got = some(output)
        rtol, atol = tolerance(setting, want)
        if not torch.allclose(got, want, rtol, atol):
            off = float((got - want).abs().max())
            yield f"{case}: {kind} is off by {off:.1e}, of at most {float(want.abs().max()):.1e}"
        elif bits and digest(output) != was[kind]["sha256"]:
            yield f"{case}: {kind} has other bits, within the tolerance"


def dense(name: str) -> bool:
    """Whether the dense model's bits are those that were recorded; skips if the model is another,
    for the libraries are."""
    one = models().get(name)
    if one is None:
        assert LIBRARIES, f"{name} was recorded, but is in tests/families no more"
        pytest.skip(f"not made with these versions: {LIBRARIES}")
    done = run(one, "dense", "eager", WRITTEN["models"][name]["seed"])
    off = list(wrong(name, "dense, eager", done, False))
    if off and LIBRARIES:
        pytest.skip(f"the dense model is another with these versions: {LIBRARIES}")
    assert not off, f"the dense model is not the one that was recorded: {off}"
    was = WRITTEN["models"][name]["cases"]["dense, eager"]
    return not OTHERWISE and all(
        digest(output) == was[kind]["sha256"] for kind, output in done.outputs.items()
    )


def check(name: str, forms: tuple[str, ...]) -> None:
    written = WRITTEN["models"][name]
    bits = dense(name)
    found: list[str] = []
    for case, was in written["cases"].items():
        setting, form = case.rsplit(", ", 1)
        if form not in forms:
            continue
        # What could not be compiled may be some day, and a host may differ in what it needs.
        if "raises" in was and (form in recorded.SLOW or LIBRARIES):
            continue
        # Gates decide by noise, which is not the same in every version of torch.
        if form == "training" and "torch" in LIBRARIES:
            continue
        done = run(models()[name], setting, form, written["seed"])
        found += wrong(name, case, done, bits)
    assert not found, "\n".join([f"{name} is not as it was recorded:", *found])


@pytest.mark.parametrize("name", WRITTEN["models"])
def test_models_compute_what_they_computed(name: str) -> None:
    check(name, ("eager", "gradient", "training"))


COMPILED = [
    name
    for name, written in WRITTEN["models"].items()
    if any(case.endswith(recorded.SLOW) for case in written["cases"])
]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models_compute_what_they_computed(name: str) -> None:
    check(name, recorded.SLOW)


def test_bits_are_compared_where_they_can_be() -> None:
    """Not a promise about a machine: it tells, by being skipped, that only values are compared."""
    if OTHERWISE:
        pytest.skip(f"recorded with other versions or kernels (then, now): {OTHERWISE}")
    names = [name for name in WRITTEN["models"] if name.startswith("timm_vit")]
    if not all(map(dense, names)):
        pytest.skip("the kernels of this CPU round otherwise than those of the recording")


def test_every_small_model_is_recorded() -> None:
    if LIBRARIES:
        pytest.skip(f"recorded with other versions (then, now): {LIBRARIES}")
    assert set(WRITTEN["models"]) <= set(models())
    assert {name for name in WRITTEN["models"] if models()[name].first} == set(COMPILED)


def test_the_recording_is_of_the_version_it_is_named_after() -> None:
    assert WRITTEN["version"] == RECORD.stem == "0.7.1"
    names = {
        f"{name}, {case}, {kind}"
        for name, written in WRITTEN["models"].items()
        for case, was in written["cases"].items()
        for kind in was
        if kind != "raises"
    }
    assert names == values().keys()
