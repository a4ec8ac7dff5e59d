"""A sweep draws every image once, whoever draws it, and its figures are what a slow loop finds."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn

import tokred
from tokred.cli.main import main
from tokred.data import reading, zoo
from tokred.measure import fid
from tokred.measure.fid import Sweep, SweepBatch, SweepSetting, generation
from tokred.measure.fid import features as extraction
from tokred.patching.denoisers import NAMED

pytest.importorskip("torchmetrics")
pytest.importorskip("accelerate")

SWEEP = Sweep(("tome", "atc:single"), (1, 0.5), ("1", "2", "3"), images=7)
FOLDERS = ["dense-seed0", "tome-keep0.5-seed0", "atc-single-keep0.5-seed0"]
TIMES = ("images_per_second", "processes")


class Pipe:
    """Called as diffusers' pipelines are; draws noise, brighter where something is applied."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.unet = nn.Linear(2, 2)
        nn.init.ones_(self.unet.weight)
        nn.init.ones_(self.unet.bias)
        self.drawn: list[tuple[str, int]] = []
        self.calls = 0
        self.stop_after = stop_after
        self.applied = 0.0

    def __call__(
        self,
        prompt: list[str],
        *,
        generator: list[torch.Generator],
        output_type: str,
        num_inference_steps: int = 1,
        height: int = 8,
        width: int = 8,
    ) -> Any:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        assert output_type == "pil" and len(prompt) == len(generator)
        images = []
        for text, source in zip(prompt, generator, strict=True):
            self.drawn.append((text, source.initial_seed()))
            noise = torch.rand(height, width, generator=source) * 100 + 10 * int(text)
            pixels = (noise + 40 * self.applied).to(torch.uint8)
            images.append(Image.fromarray(pixels.numpy()))
        return SimpleNamespace(images=images)


class Means(nn.Module):
    """Features of images that are quick to have: the mean of each row of pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 3)) / 255


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def applied(pipe: Pipe, method: Any, around: tokred.Around) -> Iterator[None]:
        pipe.applied = (1 - around.keep_rate) * (1 if isinstance(method, tokred.ToMe2d) else 0.5)
        yield
        pipe.applied = 0.0

    real = generation.applied
    monkeypatch.setattr(
        generation,
        "applied",
        lambda pipe, *rest: (applied if isinstance(pipe, Pipe) else real)(pipe, *rest),
    )


def contents(out: Path) -> dict[str, str]:
    """What every image holds."""
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.glob("*-seed*/*"))
    }


def features(num: int, dim: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(num, dim)) @ random.normal(size=(dim, dim)) + random.normal(size=dim)


def slow_frechet(ours: np.ndarray, theirs: np.ndarray) -> float:
    def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = sum(x) / len(x)
        return mean, sum(np.outer(row - mean, row - mean) for row in x) / (len(x) - 1)

    (m, a), (n, b) = moments(ours), moments(theirs)
    root = scipy.linalg.sqrtm(a @ b)
    return float(((m - n) ** 2).sum() + np.trace(a + b - 2 * root.real))


def test_the_frechet_distance_is_that_of_a_slow_loop() -> None:
    ours, theirs = features(40, 6, seed=0), features(30, 6, seed=1)
    expected = slow_frechet(ours, theirs)
    assert fid.frechet_distance(ours, theirs) == pytest.approx(expected, rel=1e-10)
    assert fid.frechet_distance(ours, ours) == pytest.approx(0, abs=1e-6)
    moved = fid.frechet_distance(ours, ours + 2)  # same covariance: the means alone
    assert moved == pytest.approx(4 * 6, rel=1e-8)


def test_the_frechet_distance_is_that_of_torchmetrics_on_images(tmp_path: Path) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = Means()
    extractor.num_features = 8  # type: ignore[assignment]
    theirs = FrechetInceptionDistance(extractor)
    images = torch.randint(256, (2, 20, 3, 8, 8), dtype=torch.uint8)
    theirs.update(images[0], real=True)
    theirs.update(images[1], real=False)
    ours = fid.frechet_distance(*(extractor(part).numpy() for part in images))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-5)  # which ends in float32


def test_few_images_have_a_distance_too() -> None:
    ours, theirs = features(5, 12, seed=0), features(7, 12, seed=1)
    singular = slow_frechet(ours, theirs)
    assert fid.frechet_distance(ours, theirs) == pytest.approx(singular, rel=1e-5)


def test_the_kernel_distance_is_that_of_a_slow_loop() -> None:
    ours, theirs = features(12, 5, seed=0), features(12, 5, seed=1)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 5 + 1) ** 3)

    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    expected = sum(kernel(x[i], x[j]) for x in (ours, theirs) for i, j in pairs) / len(pairs)
    expected -= 2 * sum(kernel(x, y) for x in ours for y in theirs) / 144
    mean, std = fid.kernel_distance(ours, theirs, 12)  # the one subset of all
    assert mean == pytest.approx(expected, rel=1e-9) and std == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_is_always_the_same_and_leaves_the_random_state_alone() -> None:
    ours, theirs = features(20, 5, seed=0), features(20, 5, seed=1)
    before = torch.get_rng_state()
    first = fid.kernel_distance(ours, theirs, 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert fid.kernel_distance(ours, theirs, 10) == first and first[1] > 0


def test_every_setting_has_the_same_prompts_and_seeds(tmp_path: Path) -> None:
    pipe = Pipe()
    sweep = replace(SWEEP, seeds=(0, 3))
    fid.generate(pipe, sweep, tmp_path, batch=4)
    once = [(str(i % 3 + 1), seed * fid.SEEDS + i) for seed in (0, 3) for i in range(7)]
    assert pipe.drawn == once * 3
    folders = {file.split("/")[0] for file in contents(tmp_path)}
    assert folders == {*FOLDERS, *(name.replace("seed0", "seed3") for name in FOLDERS)}
    dense, tome, _ = (tmp_path / name / "000005.png" for name in FOLDERS)
    by_hand = torch.rand(8, 8, generator=torch.Generator().manual_seed(5)) * 100 + 30
    assert np.array_equal(np.asarray(Image.open(dense)), by_hand.to(torch.uint8).numpy())
    assert np.asarray(Image.open(tome)).mean() > np.asarray(Image.open(dense)).mean() + 15


def test_images_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    for batch in (1, 3, 20):
        fid.generate(Pipe(), SWEEP, tmp_path / str(batch), batch=batch)
    one, three, all_at_once = (contents(tmp_path / name) for name in ("1", "3", "20"))
    assert one == three == all_at_once and len(one) == 3 * 7


def test_a_sweep_that_was_stopped_goes_on_and_draws_nothing_twice(tmp_path: Path) -> None:
    fid.generate(Pipe(), SWEEP, tmp_path / "whole", batch=3)
    stopped = Pipe(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        fid.generate(stopped, SWEEP, tmp_path / "out", batch=3)
    assert len(contents(tmp_path / "out")) == len(stopped.drawn) == 3 + 3 + 1 + 3
    resumed, again = Pipe(), Pipe()
    fid.generate(resumed, SWEEP, tmp_path / "out", batch=3)
    fid.generate(again, SWEEP, tmp_path / "out", batch=3)
    assert len(resumed.drawn) == 21 - len(stopped.drawn) and not again.drawn
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_batch_that_was_half_written_keeps_its_bounds(tmp_path: Path) -> None:
    fid.generate(Pipe(), SWEEP, tmp_path, batch=4)
    (tmp_path / FOLDERS[1] / "000001.png").unlink()
    (tmp_path / FOLDERS[1] / "000006.png").unlink()
    (tmp_path / FOLDERS[2] / "000006.png").rename(tmp_path / FOLDERS[2] / "000006.part")
    tome, atc = SweepSetting("tome", 0.5, 0), SweepSetting("atc:single", 0.5, 0)
    assert fid.plan(SWEEP, tmp_path, 4) == [
        SweepBatch(tome, (1,)),
        SweepBatch(tome, (6,)),
        SweepBatch(atc, (6,)),
    ]


def test_more_images_methods_and_keep_rates_may_be_added(tmp_path: Path) -> None:
    fid.generate(Pipe(), SWEEP, tmp_path, batch=4)
    pipe = Pipe()
    wider = replace(SWEEP, images=8, methods=("tome", "random"), keep_rates=(0.5, 0.7))
    fid.generate(pipe, wider, tmp_path, batch=4)
    # Of a batch that has one image more, all are drawn; those that are there stay.
    assert len(pipe.drawn) == 4 + (4 + 8) + (8 + 8)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"steps": 3}, "steps was None, and is 3"),
        ({"size": 16}, "size was None, and is 16"),
        ({"guidance": 2.0}, "guidance was None, and is 2.0"),
        ({"prompts": ("1", "2")}, r"prompts was \['1', '2', '3'\], and is \['1', '2'\]"),
    ],
)
def test_images_of_another_sweep_are_not_mixed(
    tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    fid.generate(Pipe(), SWEEP, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds images of another sweep: {difference}"):
        fid.generate(Pipe(), replace(SWEEP, **change), tmp_path)
    assert contents(tmp_path) == before


def test_images_of_another_model_are_not_mixed(tmp_path: Path) -> None:
    fid.generate(Pipe(), SWEEP, tmp_path, model="one")
    with pytest.raises(ValueError, match="model was 'one', and is 'other'"):
        fid.generate(Pipe(), SWEEP, tmp_path, model="other")
    trained = Pipe()
    nn.init.zeros_(trained.unet.bias)
    with pytest.raises(ValueError, match=r"weights\.denoiser was '"):
        fid.generate(trained, SWEEP, tmp_path, model="one")
    file = tmp_path / "sweep.json"
    pinned = json.loads(file.read_text())
    pinned["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(pinned))
    with pytest.raises(ValueError, match=r"versions\.torch was '1\.0', and is '"):
        fid.generate(Pipe(), SWEEP, tmp_path, model="one")


def test_a_sweep_of_a_former_version_is_refused_for_its_version(tmp_path: Path) -> None:
    fid.generate(Pipe(), SWEEP, tmp_path)
    file = tmp_path / "sweep.json"
    pinned = json.loads(file.read_text())
    assert pinned["weights"]["denoiser"].startswith("3:")
    pinned["versions"]["tokred"] = "0.7.0"
    pinned["weights"]["denoiser"] = "0123456789abcdef"  # which cannot be compared
    file.write_text(json.dumps(pinned))
    with pytest.raises(
        ValueError, match=r"another sweep: versions\.tokred was '0\.7\.0', and is "
    ) as no:
        fid.generate(Pipe(), SWEEP, tmp_path)
    assert "weights" not in str(no.value)


def test_shares_are_everything_once_and_alike(tmp_path: Path) -> None:
    batches = fid.plan(SWEEP, tmp_path, 2)
    for processes in (1, 2, 3, 5):
        shares = [fid.share(batches, process, processes) for process in range(processes)]
        assert sorted(map(repr, itertools.chain(*shares))) == sorted(map(repr, batches))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_shares_are_the_images_of_one_process(tmp_path: Path) -> None:
    fid.generate(Pipe(), SWEEP, tmp_path / "one", batch=2)
    two = tmp_path / "two"
    batches = fid.plan(SWEEP, two, 2)
    for process in range(2):
        mine, times = fid.share(batches, process, 2), two / "times" / f"run-{process}.jsonl"
        two.mkdir(exist_ok=True)
        fid.draw(Pipe(), SWEEP, two, mine, times=times)
    assert contents(two) == contents(tmp_path / "one")
    assert {speed["processes"] for speed in fid.speeds_in(two / "times").values()} == {2}


def test_speeds_are_of_one_run_and_of_all_its_processes(tmp_path: Path) -> None:
    def write(name: str, *seconds: float) -> None:
        line = {"setting": "dense-seed0", "images": 4, "device": "cuda:0"}
        lines = [json.dumps({**line, "seconds": took}) for took in seconds]
        (tmp_path / name).write_text("\n".join(lines) + "\n")

    write("20260101-1-0.jsonl", 1, 1)
    write("20260102-1-0.jsonl", 9, 2, 2)  # the first batch warms up
    write("20260102-1-1.jsonl", 4, 4, 9)
    assert fid.speeds_in(tmp_path) == {
        "dense-seed0": {
            "images_per_second": 4 / 2 + 4 / 4,
            "timed_images": 24,
            "processes": 2,
            "device": "cuda",
        }
    }


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    folder = tmp_path / "reference"
    for kind in ("a", "b"):
        (folder / kind).mkdir(parents=True)
        for number in range(10):
            noise = np.random.default_rng(number + 10 * (kind == "b")).integers(0, 140, (8, 8))
            Image.fromarray(noise.astype(np.uint8)).save(folder / kind / f"{number}.png")
    return folder


def scored(sweep: Sweep, out: Path, reference: Path, **options: Any) -> fid.SweepScores:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ images for 8 features")
        return fid.score(sweep, out, reference, Means(), **options)


def test_scores_are_of_the_files(tmp_path: Path, reference: Path) -> None:
    out = tmp_path / "out"
    fid.generate(Pipe(), SWEEP, out)
    with pytest.warns(UserWarning, match="7 images for 8 features: .* far too large"):
        scores = fid.score(SWEEP, out, reference, Means())

    def read(folder: Path) -> np.ndarray:
        return np.stack([np.asarray(Image.open(f)) for f in sorted(folder.rglob("*.png"))]) / 255

    dense, theirs = read(out / FOLDERS[0]), read(reference)
    assert [(row.method, row.keep_rate) for row in scores.rows] == [
        ("dense", 1), ("tome", 0.5), ("atc:single", 0.5)
    ]  # fmt: skip
    for row, name, pixels in zip(scores.rows, FOLDERS, scores.pixels, strict=True):
        ours = read(out / name)
        expected = fid.frechet_distance(ours.mean(2), theirs.mean(2))
        assert row.fid == pytest.approx(expected, rel=1e-4)
        apart = np.sqrt(((ours - dense) ** 2).mean((1, 2)))
        np.testing.assert_allclose(pixels, apart, atol=1e-12)
        assert row.pixel_distance == pytest.approx(apart.mean())
        moved = np.linalg.norm((ours - dense).mean(2), axis=1).mean()
        assert row.feature_distance == pytest.approx(moved, abs=1e-6)
        assert row.images_per_second is not None and row.images_per_second > 0
        assert (row.timed_images, row.processes, row.device) == (7, 1, "cpu")
    assert scores.rows[0].pixel_distance == scores.rows[0].feature_distance == 0
    assert scores.reference == (str(reference), 20) and scores.features == ("Means", 8)


def test_features_are_kept_until_files_or_the_extractor_change(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, looks = tmp_path / "out", []
    read = extraction._read
    monkeypatch.setattr(
        extraction, "_read", lambda paths, size: looks.append(1) or read(paths, size)
    )
    fid.generate(Pipe(), SWEEP, out)
    first = scored(SWEEP, out, reference)
    before = len(looks)
    again = scored(SWEEP, out, reference)
    assert len(looks) == before and again.rows == first.rows
    Image.new("L", (8, 8), 3).save(out / FOLDERS[1] / "000002.png")
    with pytest.warns(UserWarning, match="tome-keep0.5-seed0: 1 of 7 images have a single colour"):
        changed = scored(SWEEP, out, reference)
    assert [now == was for now, was in zip(changed.rows, first.rows, strict=True)] == [
        True, False, True
    ]  # fmt: skip


def cut(file: Path, kept: int | None = None) -> None:
    """Leaves the beginning of a file, as a full disk does."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2 if kept is None else kept])


def middle_of(file: Path) -> None:
    """Changes a byte in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


REMADE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "an image": (f"{FOLDERS[1]}/000003.png", cut, "000003.png is broken: it is drawn again"),
    "an empty image": (f"{FOLDERS[0]}/000000.png", lambda file: cut(file, 0), "it is drawn again"),
    "a byte of an image": (f"{FOLDERS[1]}/000006.png", middle_of, "it is drawn again"),
    "times": ("times/*.jsonl", lambda file: cut(file, -20), r"last line of .*jsonl is cut off"),
    "features": ("features/reference.npz", cut, r"reference.npz is broken: its features are"),
    "no features": ("features/reference.npz", lambda file: cut(file, 0), "are extracted again"),
    "a byte of features": (f"features/{FOLDERS[0]}.npz", middle_of, "are extracted again"),
}


@pytest.mark.parametrize("what", REMADE)
def test_broken_files_that_can_be_made_again_are(
    what: str, tmp_path: Path, reference: Path
) -> None:
    def figures() -> list[fid.Score]:
        rows = scored(SWEEP, out, reference).rows
        fid.report(SWEEP, out, scored(SWEEP, out, reference))
        return [replace(row, images_per_second=0, timed_images=0) for row in rows]

    out = tmp_path / "out"
    fid.generate(Pipe(), SWEEP, out, batch=2)
    whole, before = contents(out), figures()
    name, change, told = REMADE[what]
    (file,) = out.glob(name)
    change(file)
    with pytest.warns(UserWarning, match=told):
        fid.generate(Pipe(), SWEEP, out, batch=2)
        again = figures()
    assert (contents(out), again) == (whole, before)


def test_broken_files_that_cannot_be_made_again_are_named(tmp_path: Path, reference: Path) -> None:
    out = tmp_path / "out"
    fid.generate(Pipe(), SWEEP, out)
    picture = sorted(reference.rglob("*.png"))[3]
    kept = picture.read_bytes()
    cut(picture)
    with pytest.raises(ValueError, match=r"a/3\.png cannot be read .*: replace it, or"):
        scored(SWEEP, out, reference)
    picture.write_bytes(kept)
    for number in (0, 2):  # the first of all tells the size
        image = out / FOLDERS[0] / f"00000{number}.png"
        kept = image.read_bytes()
        cut(image)
        with pytest.raises(ValueError, match=rf"{number}\.png cannot be .*: generate again, which"):
            scored(SWEEP, out, reference)
        image.write_bytes(kept)
    (times,) = (out / "times").iterdir()
    kept = times.read_bytes()
    times.write_bytes(b"{" + kept)
    with pytest.raises(ValueError, match=r"line 1 of .*\.jsonl is broken .*: delete the line or"):
        scored(SWEEP, out, reference)
    times.write_bytes(kept)
    file = out / "sweep.json"
    for change in (cut, lambda file: cut(file, 0), lambda file: file.write_text("[]")):
        change(file)
        for call in (
            lambda: fid.generate(Pipe(), SWEEP, out),
            lambda: fid.report(SWEEP, out, scored(SWEEP, out, reference)),
        ):
            with pytest.raises(ValueError, match=r"sweep\.json is broken .*Put a copy of it back"):
                call()
    file.unlink()
    with pytest.raises(ValueError, match=r"holds images, and no sweep\.json that says what they"):
        fid.generate(Pipe(), SWEEP, out)


def killed(out: Path, kills: int) -> None:
    program = str(Path(__file__).with_name("killed_sweep.py"))
    path = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        [sys.executable, program, str(out), str(kills), "0"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.split("\n")[-2:] == ["the same", ""], run.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each run is forked")
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_sweep_that_was_killed_ends_in_the_same_figures(kills: int, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    killed(tmp_path, kills)


def test_a_reference_of_other_sizes_is_cut_and_resized(tmp_path: Path, reference: Path) -> None:
    out = tmp_path / "out"
    fid.generate(Pipe(), SWEEP, out)
    as_it_is = scored(SWEEP, out, reference).rows
    for file in sorted(reference.rglob("*.png")):
        image = Image.open(file).resize((16, 16), Image.Resampling.NEAREST)
        wide = Image.new("L", (32, 16))
        wide.paste(image, (8, 0))
        wide.save(file)
    resized = scored(SWEEP, out, reference).rows
    for ours, theirs in zip(resized, as_it_is, strict=True):
        assert ours.fid == pytest.approx(theirs.fid, rel=0.2)


def test_a_reference_may_be_the_first_of_every_folder(tmp_path: Path, reference: Path) -> None:
    chosen = fid.reference_pictures(reference, 3)
    assert [str(file.relative_to(reference)) for file in chosen] == [
        f"{kind}/{number}.png" for kind in "ab" for number in range(3)
    ]
    with pytest.raises(ValueError, match="at least 11 pictures"):
        fid.reference_pictures(reference, 11)
    with pytest.raises(ValueError, match="holds 0 pictures"):
        fid.reference_pictures(tmp_path / "nowhere")


def test_a_reference_has_no_hidden_files_and_every_format(tmp_path: Path) -> None:
    grey = Image.new("L", (8, 8), 100)
    for name in ("a.png", "b.tif", "c.TIFF", "d.jpg", "deep/e.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        grey.save(tmp_path / name)
    for name in ("._a.png", ".hidden/f.png", "__MACOSX/g.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "folder.png").mkdir()
    found = fid.reference_pictures(tmp_path)
    names = ["a.png", "b.tif", "c.TIFF", "d.jpg", "deep/e.webp"]
    assert [str(file.relative_to(tmp_path)) for file in found] == names
    assert found == reading.pictures_in(tmp_path)


def test_a_reference_is_decoded_as_all_pictures_are(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "16.tif")
    turned = Image.fromarray(np.rot90(pixels).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    images = extraction._read(reading.pictures_in(tmp_path), (8, 8))
    assert (images == torch.from_numpy(pixels)).all()


def test_what_is_missing_is_not_scored(tmp_path: Path, reference: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fid.generate(Pipe(stop_after=1), SWEEP, tmp_path / "out", batch=4)
    with pytest.raises(ValueError, match="dense-seed0 lacks 3 of 7 images: generate them first"):
        scored(SWEEP, tmp_path / "out", reference)


def test_the_report_has_a_row_for_every_setting(tmp_path: Path, reference: Path) -> None:
    out, sweep = tmp_path / "out", replace(SWEEP, keep_rates=(1, 0.7, 0.5), seeds=(0, 1))
    fid.generate(Pipe(), sweep, out, model="noise")
    scores = scored(sweep, out, reference)
    files = fid.report(sweep, out, scores)
    assert [file.name for file in files] == [
        "fid.csv", "fid.json", "distances.csv", "fid.png", "contact.png"
    ]  # fmt: skip
    rows = list(csv.DictReader(files[0].open()))
    assert len(rows) == len(scores.rows) == 2 * (1 + 2 * 2)
    assert [(row["method"], row["keep_rate"], row["seed"]) for row in rows[:4]] == [
        ("dense", "1.0", "0"), ("dense", "1.0", "1"), ("tome", "0.7", "0"), ("tome", "0.7", "1")
    ]  # fmt: skip
    assert [float(row["fid"]) for row in rows] == [row.fid for row in scores.rows]
    whole = json.loads(files[1].read_text())
    assert whole["sweep"]["model"] == "noise" and len(whole["rows"]) == 10
    assert whole["kid"] == {"subsets": 100, "subset": 3}
    distances = list(csv.DictReader(files[2].open()))
    assert len(distances) == 10 * 7 and distances[4]["prompt"] == "2"
    assert Image.open(files[3]).width > 500
    sheet = np.asarray(Image.open(files[4]))
    assert sheet.shape[0] == 24 + 5 * 100 and (sheet[24:] < 250).any((1, 2)).mean() > 0.9
    table = fid.markdown(scores)
    assert table.count("\n| ") == 10 and "| atc:single | 0.5 | 1 |" in table
    assert "drawn by 1 process on cpu" in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"methods": ("tomme",)},
            "unknown method 'tomme' .*; known methods: atc, .* todo, tome",
        ),
        ({"methods": ("atc:sigle",)}, "linkage must be one of single, complete, average"),
        ({"methods": ("atc:link=single",)}, r"has no option 'link'; it has \['linkage', 'backend"),
        ({"methods": ("atc:,",)}, "',' are no options: write atc:VALUE or atc:NAME=VALUE"),
        ({"methods": ("todo:1",)}, r"are too many options: todo has none"),
        ({"keep_rates": (0.0,)}, r"keep rates must be in \(0, 1\], the share of tokens, not 0.0"),
        ({"prompts": ()}, "prompts must hold at least one"),
        ({"images": 1}, "images must be 2 to 1,000,000 of each setting, not 1"),
        ({"seeds": (-1,)}, "seeds must be one or more, from 0 on"),
        ({"methods": ("atc:single", "atc single")}, "unknown method 'atc single'"),
        ({"methods": ("atc:single", "atc:'single'")}, "two settings have the same name"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SWEEP, **change)


def test_methods_are_spelled_as_calls() -> None:
    assert tokred.reducers.parse("tome") == tokred.ToMe()
    assert tokred.reducers.parse("tome", NAMED) == tokred.ToMe2d()
    assert tokred.reducers.parse("atc:single") == tokred.ATC(linkage="single")
    assert tokred.reducers.parse("atc:backend=numba") == tokred.ATC(backend="numba")
    assert tokred.reducers.parse("slic:grid=(4,6),tau=5.0") == tokred.SLIC((4, 6), tau=5.0)


def test_the_preset_has_the_thousand_classes() -> None:
    preset = fid.presets["imagenet"]
    prompts = preset.prompts()
    assert len(set(prompts)) == 1000 and prompts[1] == "a photo of a goldfish"
    assert preset.images == 2 * len(prompts) and preset.per_folder == 5
    assert (preset.size, preset.steps, preset.guidance) == (512, 50, 7.5)


def test_inception_needs_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give it with --weights PATH"):
        fid.inception(None)
    pytest.importorskip("torch_fidelity")
    with pytest.raises(FileNotFoundError):
        fid.inception(tmp_path / "none.pth")


def test_features_of_digits_tell_them_apart() -> None:
    held_out = tokred.zoo.held_out("digits")
    extractor = fid.DigitFeatures().eval()
    images = held_out.images[:40].expand(-1, 3, -1, -1)
    with torch.no_grad():
        features = extractor(images)
        answers = extractor.model.head(features).argmax(1)
    assert features.shape == (40, 64) and (answers == held_out.labels[:40]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "give --prompts: a file, or one of digits, imagenet"),
        (["nowhere", "--prompts", "digits"], "give --reference"),
        (["digits_diffusion", "--methods", "tomme"], "unknown method 'tomme' (did you mean"),
        (["digits_diffusion", "--features", "inception"], "give it with --weights PATH"),
        (["digits_diffusion", "--prompts", "missing.txt"], "No such file"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fid", *arguments]) == 1
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("tokred: error: ") and message in error


@pytest.fixture
def digits(tmp_path: Path) -> list[str]:
    """Arguments for few images of few steps, and a few to compare with."""
    pytest.importorskip("diffusers")
    folder = tmp_path / "digits"
    folder.mkdir()
    for number, image in enumerate(tokred.zoo.held_out("digits").images[:10, 0].numpy()):
        Image.fromarray(image).resize((32, 32)).save(folder / f"{number}.png")
    return ["fid", "digits_diffusion", "--methods", "tome", "atc:complete", "--keep-rates", "0.5",
            "--images", "5", "--batch", "2", "--steps", "1", "--reference", str(folder),
            "--device", "cpu"]  # fmt: skip


@pytest.mark.filterwarnings("ignore:[0-9]+ images for 64 features")
def test_the_command_sweeps_the_bundled_pipeline(
    digits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*digits, "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.split("\n")[2:5]] == [
        "| dense", "| tome", "| atc:complete"
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "fid.csv").open()))
    assert float(rows[1]["pixel_distance"]) > 0 and float(rows[2]["pixel_distance"]) > 0
    before = contents(tmp_path / "out")
    assert main(arguments) == 0 and capsys.readouterr().out == table
    assert contents(tmp_path / "out") == before
    assert main([*arguments, "--steps", "2"]) == 1
    assert "steps was 1, and is 2" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_images_and_figures_of_one(
    digits: list[str], tmp_path: Path
) -> None:
    # On machines without a GPU, too, that is how accelerate starts several processes.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    for name, how in (("one", []), ("two", launch)):
        program = [sys.executable, *how, "-m", "tokred", *digits, "--out", str(tmp_path / name)]
        subprocess.run(program, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one == two and len(one) == 3 * 5
    assert len(list((tmp_path / "two" / "times").iterdir())) == 2
    files = [(tmp_path / name / "distances.csv").read_text() for name in ("one", "two")]
    assert files[0] == files[1]
    tables = [list(csv.DictReader((tmp_path / n / "fid.csv").open())) for n in ("one", "two")]
    for row, other in zip(*tables, strict=True):
        assert {**row, **dict.fromkeys(TIMES)} == {**other, **dict.fromkeys(TIMES)}
        assert (row["processes"], other["processes"]) == ("1", "2")


@pytest.mark.slow
def test_inception_gives_2048_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patched:  # of random weights: the published are not at hand
        patched.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patched.setattr(network, "load_state_dict", lambda *_, **__: None)
        torch.save(network("random", ["2048"]).state_dict(), tmp_path / "random.pth")
    extractor = fid.inception(tmp_path / "random.pth")
    with torch.no_grad():
        features = extractor(torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8))
    assert features.shape == (2, 2048) and features.isfinite().all()


def test_where_tokens_are_merged_is_part_of_a_sweep(tmp_path: Path) -> None:
    pipe = zoo.diffusion()
    pipe.set_progress_bar_config(disable=True)
    sweep = Sweep(("tome",), (0.5,), ("1",), images=2, steps=2, around=tokred.Around(shared=True))
    shared: list[bool] = []
    own = tokred.denoising.Denoising._match

    def counted(self: Any, *args: Any) -> Any:
        shared.append(self.around.shared)
        return own(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokred.denoising.Denoising, "_match", counted)
        fid.generate(pipe, sweep, tmp_path)
    assert shared == [True] * 2, "once in each step, for two blocks"
    other = Sweep(("tome",), (0.5,), ("1",), images=2, steps=2)
    with pytest.raises(ValueError, match=r"around.shared was True, and is None"):
        fid.generate(pipe, other, tmp_path)
