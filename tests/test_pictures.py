"""`tokred train` reads folders and Hugging Face datasets, and trains models of every library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import tokred
from tokred import training
from tokred.cli.main import main
from tokred.data import pictures, zoo
from tokred.training import checkpoints

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "bundled" not in request.node.name:  # drawing takes longer than the training
        monkeypatch.setattr(checkpoints, "plot", lambda out: None)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out digits as files: of each class 2 to train on, of the first five 1 to validate on."""
    root = tmp_path_factory.mktemp("digits")
    held_out = zoo.held_out("digits")
    for label in range(10):
        numbers = (held_out.labels == label).nonzero()[: 3 if label < 5 else 2, 0].tolist()
        for place, number in enumerate(numbers):
            folder = root / ("val" if place == 2 else "train") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(held_out.images[number, 0].numpy()).save(folder / f"{number}.png")
    return root


def train(
    data: object, out: Path, *options: str, method: str = "tome", model: str = "digits"
) -> int:
    start = ["train", method, "--model", model, "--data", str(data), "--out", str(out)]
    return main([*start, "--epochs", "1", "--batch", "10", "--workers", "0", *options])


def test_folders_are_read_class_by_class(digits: Path) -> None:
    data, held_out = pictures.read(str(digits))
    assert held_out is not None
    assert (len(data), len(held_out)) == (20, 5)
    assert data.classes == held_out.classes == tuple("0123456789")
    image, label = data[19]
    assert (image.mode, image.size, label) == ("RGB", (56, 56), 9)
    alone, nothing = pictures.read(str(digits / "train"))
    assert len(alone) == 20 and nothing is None
    x = pictures.Digits(56)(image)
    same = zoo.normalise(zoo.held_out("digits").images)
    assert any(torch.equal(x, each) for each in same)


def test_folders_that_do_not_fit_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a folder of pictures for each class"):
        pictures.read(str(tmp_path))
    with pytest.raises(ValueError, match="has the class '0', which is not among those"):
        pictures.folder(digits / "train", ["cat", "dog"])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        pictures.read(str(tmp_path / "none"))


@pytest.mark.parametrize("splits", [True, False])
def test_datasets_are_read_by_their_features(digits: Path, tmp_path: Path, splits: bool) -> None:
    datasets = pytest.importorskip("datasets")
    data, held_out = pictures.read(str(digits))
    features = datasets.Features(
        {"number": datasets.Value("int32"), "picture": datasets.Image(),
         "digit": datasets.ClassLabel(names=list(data.classes))}
    )  # fmt: skip

    def table(given: pictures.Pictures) -> object:
        rows = [given[number] for number in range(len(given))]
        columns = {"number": [*range(len(rows))], "picture": [image for image, _ in rows],
                   "digit": [label for _, label in rows]}  # fmt: skip
        return datasets.Dataset.from_dict(columns, features=features)

    assert held_out is not None
    whole = table(data)
    if splits:
        whole = datasets.DatasetDict(train=whole, validation=table(held_out))
    whole.save_to_disk(str(tmp_path / "saved"))
    read, validation = pictures.read(f"hf:{tmp_path / 'saved'}")
    assert read.classes == data.classes and len(read) == 20
    assert (validation is not None) == splits and (validation is None or len(validation) == 5)
    (image, label), (other, number) = read[17], data[17]
    assert label == number and image.tobytes() == other.tobytes()
    unlabelled = datasets.Dataset.from_dict({"number": [1, 2]})
    unlabelled.save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"it has number \(Value\)"):
        pictures.read(f"hf:{tmp_path / 'other'}")


def test_the_command_trains_a_bundled_model(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(digits, tmp_path, "--keep-rate", "0.25") == 0
    out = capsys.readouterr().out
    assert "tome on digits, 1 epochs, 2 steps" in out and "on 5 pictures, " in out
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"checkpoint", "classes.json", "curve.png", "log.csv", "model.safetensors",
                     "recipe.json", "validation.csv"}  # fmt: skip
    assert train(digits, tmp_path, "--keep-rate", "0.25") == 0
    assert "went on from step 2" in capsys.readouterr().out
    assert train(digits, tmp_path, "--keep-rate", "0.25", "--lr", "0.1") == 1
    assert "lr was 1e-05, and is 0.1" in capsys.readouterr().err


def test_the_command_trains_gates_alone_and_they_can_be_applied(
    digits: Path, tmp_path: Path
) -> None:
    assert train(digits, tmp_path, "--frozen", "--precision", "bf16", method="svit") == 0
    assert not (tmp_path / "model.safetensors").exists()
    recipe = json.loads((tmp_path / "recipe.json").read_text())["recipe"]
    assert (recipe["frozen"], recipe["rate"], recipe["per_image"]) == (True, 4.0, False)
    model = zoo.load("digits")
    reduction = tokred.apply(model, tokred.SViT(gates=tmp_path / "gates.safetensors"))
    assert reduction.state_dict().keys() == load_file(tmp_path / "gates.safetensors").keys()
    model(zoo.normalise(zoo.held_out("digits").images[:2]))


def test_losses_of_dynamicvit_are_its_own(digits: Path, tmp_path: Path) -> None:
    assert train(digits, tmp_path, "--kl", "0.25", method="dynamicvit") == 0
    recipe = json.loads((tmp_path / "recipe.json").read_text())["recipe"]
    assert [recipe[name] for name in ("rate", "per_image", "kl", "distill")] == [2, True, 0.25, 0.5]
    (row, *_) = training.read_table(tmp_path / "log.csv")
    assert {"task", "rate", "kl", "distill", "kept_3", "kept_6", "kept_9"} <= row.keys()


def test_a_timm_model_gets_a_head_for_the_classes(digits: Path, tmp_path: Path) -> None:
    assert train(digits, tmp_path, method="atc:single", model="test_vit") == 0
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["head.weight"].shape[0] == 10
    model = timm.create_model("test_vit", num_classes=10)
    model.load_state_dict(weights)
    # What was fine-tuned is where the next training begins.
    options = ("--weights", str(tmp_path / "model.safetensors"), "--augment", "none")
    assert train(digits, tmp_path / "next", *options, method="none", model="test_vit") == 0


def test_a_model_of_transformers_is_given_images_by_name(digits: Path, tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=64, num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "model")
    assert train(digits, tmp_path / "out", model=str(tmp_path / "model")) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["classifier.weight"].shape == (10, 32)
    _, prepared = pictures.load(str(tmp_path / "model"), 10)
    image = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    assert prepared.train(image).shape == prepared.evaluate(image).shape == (3, 32, 32)
    assert not torch.equal(prepared.train(image), prepared.train(image))
    assert float(prepared.train(image).min()) >= -1 and prepared.name == "pixel_values"


def test_models_are_opened_by_name_whatever_they_do(tmp_path: Path) -> None:
    assert type(pictures.open_model("digits_scenes")).__name__ == "Segmenter"
    ours = pictures.open_model("test_vit", pretrained=False)
    assert isinstance(ours, timm.models.VisionTransformer) and not ours.training
    config = transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        num_detection_tokens=2,
    )
    transformers.YolosForObjectDetection(config).save_pretrained(tmp_path)
    found = pictures.open_model(str(tmp_path))
    assert isinstance(found, transformers.YolosForObjectDetection) and not found.training


@pytest.mark.slow
def test_the_command_trains_in_two_processes(digits: Path, tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    for name, how in (("one", []), ("two", launch)):
        program = [sys.executable, *how, "-m", "tokred", "train", "svit", "--model", "digits",
                   "--data", str(digits), "--out", str(tmp_path / name), "--epochs", "2",
                   "--batch", "10", "--workers", "1", "--augment", "crop"]  # fmt: skip
        done = subprocess.run(
            program, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("accuracy") == 1  # one process speaks
    for file in ("log.csv", "validation.csv"):
        tables = [training.read_table(tmp_path / name / file) for name in ("one", "two")]
        assert len(tables[0]) == len(tables[1]) > 0
        for row, other in zip(*tables, strict=True):
            speed = {"images_per_second": 0.0}
            assert {**row, **speed} == pytest.approx({**other, **speed}, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("svit", "--model", "test_vit", "--frozen"), "test_vit tells 1000 classes apart"),
        (("tome", "--model", "no_such_model"), "no model is called 'no_such_model'"),
        (("tome", "--model", "digits_scenes"), "gives a class to every pixel"),
        (("none", "--model", "digits", "--keep-rate", "0.5"), "the dense model keeps all tokens"),
        (("tome", "--model", "digits", "--frozen"), "and there are none: apply a method that"),
        (("tome", "--model", "resnet18"), "no patch for timm.models.resnet.ResNet"),
        (("tome", "--model", "digits", "--weights", "WRONG"), "does not fit digits"),
        (("tome", "--model", "digits", "--batch", "64"), "20 samples, fewer than a batch of 64"),
    ],
)
def test_mistakes_are_one_line(
    options: tuple[str, ...], message: str, digits: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save_file({"odd": torch.zeros(1)}, tmp_path / "WRONG")
    method, *rest = (str(tmp_path / word) if word == "WRONG" else word for word in options)
    out = tmp_path / "out"
    assert main(["train", method, "--data", str(digits), "--out", str(out), *rest]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("tokred: error: ") and message in error
    assert not out.exists()
