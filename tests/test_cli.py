"""The command line prints what it names and writes what it says."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import tokred
from tokred import reducers
from tokred.cli.demo import HEAD
from tokred.cli.main import main
from tokred.measure.cost import Bench
from tokred.measure.race import Arm
from tokred.measure.suites import dense, diffusion, vit
from tokred.measure.suites import tcformer as tcformer_suite

TRAIN = ["train", "tome", "--model", "digits", "--out", "never"]


def test_list_names_every_method_and_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in reducers.names():
        assert re.search(rf"^  {name} +\w.*\.$", out, re.MULTILINE)
    assert re.search(r"^  timm_vit +ViT, DeiT", out, re.MULTILINE)


@pytest.mark.slow
def test_the_demo_ends_with_the_table_and_the_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "demo.png"
    assert main(["demo", "--limit", "20", "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert all(title in out for title in HEAD)
    about = {name: reducers.traits(reducers.make(name)) for name in reducers.names()}
    staged = [name for name in about if not about[name].own_schedule]
    staged.remove("svit")  # whose gates are for one keep rate
    known = "|".join(staged)
    rows = [line for line in out.split("\n") if re.match(rf"({known}) ", line)]
    assert len(rows) == 4 * (len(staged) + 1)
    assert len(re.findall(r"^svit +0\.7 +~ 137 96 67 ", out, re.M)) == 1
    assert re.search(r"^tome +0.5 +98 49 24 +[\d.]+% +[+-][\d.]+ +8\d\.\d +2\.1\dx", out, re.M)
    assert Image.open(picture).size[0] > 1000


def test_the_suite_writes_json_and_tables(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["bench", "--suite", "vit", "--models", "vit_tiny_patch16_224:64", "--batches", "1",
                 "--methods", "tome", "ats", "--keep-rates", "0.5", "0.25", "--rounds", "3",
                 "--out", str(tmp_path)]  # fmt: skip
    assert main(arguments) == 0
    results = json.loads((tmp_path / "vit-cpu-float32.json").read_text())
    (group,) = results["groups"]
    assert [(cell["method"], cell["keep_rate"]) for cell in group["cells"]] == [
        ("tome", 0.5), ("ats", 0.5), ("tome", 0.25), ("ats", 0.25)
    ]  # fmt: skip
    for cell in group["cells"]:
        assert cell["efficiency"] == pytest.approx(cell["speed_up"] / cell["free_limit"])
        assert cell["bookkeeping"] > -0.9 and cell["why_seamed"] == ""
        assert cell["counts"][-1] <= 2
    text = (tmp_path / "vit-cpu-float32.md").read_text()
    assert text in capsys.readouterr().out
    first = group["cells"][0]
    assert f"{first['speed_up']:.2f} ({first['efficiency']:.2f})" in text
    assert f"| of it bookkeeping | {first['bookkeeping']:.2f} |" in text
    former = {**results, "format": 1}
    assert "bookkeeping" not in vit.markdown(former), "it was not known in version 1"


def test_a_group_that_would_take_too_long_is_skipped_in_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["bench", "--suite", "vit", "--models", "vit_tiny_patch16_224:64", "--batches", "1",
                 "--methods", "tome", "--seconds", "0.0001"]  # fmt: skip
    assert main(arguments) == 0
    assert "Not measured: three rounds would take about" in capsys.readouterr().out


def test_the_suite_of_clustering_compares_backends_with_loops(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["bench", "--suite", "clustering", "--tokens", "16", "--rounds", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for data in ("smooth", "clustered", "hub-ridden"):
        for what in ("SciPy, a loop", "scipy", "torch"):
            assert f"| 16 | 8 | {data} | {what} |" in out


def test_bench_says_in_words_when_nothing_is_gained() -> None:
    arm = Arm((1.0, 1.0), None)
    slow = {"dense": arm, "reduced": Arm((1.5, 1.5), None), "limit": arm}
    rest = {field.name: None for field in dataclasses.fields(Bench) if field.name not in slow}
    bench = Bench(**{**rest, **slow})  # type: ignore[arg-type]
    (warning,) = bench.warnings()
    assert "SLOWER than the dense model: even tokens cut off" in warning
    fast = Bench(**{**rest, **slow, "limit": Arm((0.5, 0.5), None)})  # type: ignore[arg-type]
    assert "deciding which tokens go costs more" in fast.warnings()[0]


def test_bench_prints_ratios_first(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "digits", "--method", "atc", "--option", "linkage=complete",
                 "--keep-rate", "0.25", "--rounds", "2", "--batch", "2"]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    head = r"[\d.]+x as fast as dense; free limit [\d.]+x; of limit [\d.]+, "
    assert re.match(head + r"of it bookkeeping -?[\d.]+\n", out)
    assert "ATC(linkage='complete', backend='auto')" in out and "fewer multiply-adds" in out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch"] == 2


def test_bench_takes_any_timm_name(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "test_vit", "--rounds", "1", "--batch", "1", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    assert "bfloat16" in capsys.readouterr().out


def test_profile_prints_and_writes_every_layer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "profile.html"
    arguments = ["profile", "digits", "--method", "atc", "--option", "linkage=single",
                 "--rounds", "1", "--batch", "1", "--html", str(page)]  # fmt: skip
    assert main([*arguments, "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert stored["method"].startswith("ATC(linkage='single'")
    assert stored["layers"][3]["after"] == 98 and stored["layers"][3]["matching"] > 0
    assert "196 → 98" in page.read_text() and "Profile of digits" in page.read_text()
    assert main(arguments[:-2]) == 0
    assert len(re.findall(r"^ +\d+ .*\|", capsys.readouterr().out, re.MULTILINE)) == 12


def test_inspect_tells_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "digits", "--method", "tome", "--keep-rate", "0.7"]) == 0
    out = capsys.readouterr().out
    assert "196 -> 137" in out and "96 -> 67" in out


def test_show_draws_the_bundled_images(tmp_path: Path) -> None:
    out = tmp_path / "tokens.png"
    assert main(["show", "digits", "--images", "2", "--out", str(out)]) == 0
    assert Image.open(out).size == (4 * 232 + 8, 2 * 254)


def test_show_draws_pictures_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, out = tmp_path / "photo.jpg", tmp_path / "tokens.png"
    Image.linear_gradient("L").resize((300, 200)).save(photo)
    arguments = ["show", "test_vit", "--image", str(photo), "--out", str(out)]
    assert main(arguments) == 0
    assert out.exists()
    assert "random weights" in capsys.readouterr().err


def test_cite_prints_bibtex(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cite", "tome"]) == 0
    assert capsys.readouterr().out.strip() == tokred.cite("tome")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "digits", "--method", "tomme"], "unknown method 'tomme' (did you mean 'tome'?)"),
        (["bench", "digits", "--keep-rate", "1.5"], "keep_rate must be in (0, 1]"),
        (["bench", "no_such_model"], "Unknown model (no_such_model)"),
        (["bench", "resnet18"], "no patch for timm.models.resnet.ResNet"),
        (["inspect", "test_vit"], "give pictures with --image FILE"),
        (["show", "test_vit", "--image", "missing.png"], "No such file"),
        (["inspect", "digits", "--pretrained"], "comes with its own images and weights"),
        (["bench", "digits", "--option", "links=3"], "tome has no option 'links'"),
        ([*TRAIN, "--data", "no_such_folder"], "there is no folder no_such_folder"),
        ([*TRAIN, "--data", ".", "--epochs", "0"], "epochs must be at least 1, not 0"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]  # \r: a bar that is gone
    assert error.startswith("tokred: error: ") and message in error


def test_the_module_can_be_run() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tokred", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == f"tokred {tokred.__version__}"


def test_the_dense_suite_measures_models_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tokred.Preset(
        tokred.SLIC((2, 2), tau=5.0), tokred.Hourglass(grid=(2, 2), down=4), "ViT-Ti/16", (4, 4)
    )
    monkeypatch.setitem(tokred.presets, "few", few)  # type: ignore[arg-type]
    results = dense.run([("vit_tiny_patch16_224", (64, 64), "few")], ((10, 5),), rounds=2)
    (model,) = results["models"]
    assert model["reduced_macs"] < model["dense_macs"] and model["counts"] == (16,) * 4 + (4,) * 8
    assert model["speed_up"] == pytest.approx(model["efficiency"] * model["free_limit"])
    assert [row["kernel"] for row in results["kernels"]] == ["cluster", "reconstruct"]
    assert all(len(took) == 2 for row in results["kernels"] for took in row["seconds"].values())
    table = dense.markdown(results)
    assert "| vit_tiny_patch16_224, 64x64 | few |" in table and "| 10x10 | 5x5 |" in table


def test_the_tcformer_suite_measures_both_versions_and_what_they_do_inside() -> None:
    small = {"depths": (1, 1, 1, 1), "widths": (8, 16, 24, 32), "heads": (1, 2, 3, 4)}
    plain = tcformer_suite.backbone.merge
    results = tcformer_suite.run((64, 40), rounds=2, memory=None, **small)
    assert tcformer_suite.backbone.merge is plain
    named = [(row["name"], row["size"]) for row in results["models"]]
    assert named == [(name, size) for size in (64, 40) for name in ("tcformer", "tcformerv2_small")]
    for row in results["models"]:
        assert list(row["seconds"]) == ["all", "clustering", "merging", "conversion"]
        assert all(len(took) == 2 for took in row["seconds"].values())
        for whole, *parts in zip(*row["seconds"].values(), strict=True):
            assert min(parts) > 0 and sum(parts) < whole
    whole_image, in_parts = (row["macs"] for row in results["models"][:2])
    assert in_parts < whole_image  # fewer distances
    table = tcformer_suite.markdown(results)
    assert "| tcformerv2_small | 64 |" in table and "| tcformer | 40 |" in table


def test_show_draws_the_tokens_of_a_tcformer(tmp_path: Path) -> None:
    for name, options in (
        ("digits_tcformer", ["--images", "2"]),
        ("tcformerv2_tiny", ["--image", str(tmp_path / "in.png"), "--image-size", "64"]),
    ):
        Image.new("RGB", (80, 60), "red").save(tmp_path / "in.png")
        out = tmp_path / f"{name}.png"
        assert main(["show", name, *options, "--out", str(out)]) == 0
        with Image.open(out) as picture:
            assert picture.width > 3 * picture.height / (2 if "digits" in name else 1)
    assert main(["inspect", "digits_tcformer", "--images", "1"]) == 0


def test_fidelity_tells_how_close_each_setting_is(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--methods", "atc", "random", "--keep-rates", "0.5", "--images", "4", "--hourglass"]
    assert main(["fidelity", "digits", *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.split("\n")[2:4]]
    assert [row[:2] for row in rows] == [["atc", "0.5"], ["random", "0.5"]]
    assert 1 > float(rows[0][2]) > float(rows[1][2]) and rows[0][-2:] == ["196", "98"]


def test_the_diffusion_suite_measures_models_a_block_and_kernels() -> None:
    tiny = {
        **diffusion.CONFIGS["sd-1.5"],
        "block_out_channels": (32, 32, 32, 32),
        "cross_attention_dim": 16,
        "layers_per_block": 1,
    }
    run = partial(diffusion.run, rounds=1, batch=1, configs={"tiny": tiny}, side=16)
    results = run(["tiny"], (128,))
    (row,) = results["models"]
    assert {"dense", "limit", *diffusion.SIDES} <= set(row["seconds"])
    assert row["seconds"].keys() == results["block"].keys()
    assert set(results["kernels"]) == {"matching", "merging and copying back"}
    table = diffusion.markdown(results)
    assert "| tiny | 128 | 1 |" in table and "| one block, 256 x 320 |" in table
    (row,) = run(["tiny"], (128,), ["tome"], dtype=torch.bfloat16)["models"]
    assert row["seconds"].keys() - {"tomesd"} == {"dense", "limit", "tome"}
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ValueError, match=r"methods must be some of .*, not \['atc'\]"):
        run([], methods=["atc"])
