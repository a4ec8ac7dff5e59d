"""Images of every kind that somebody may have, with what is true of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small
from PIL import Image
from torch import Tensor, nn

from tokred.data import samples
from tokred.data.classes import class_numbers

Picture = Image.Image


def to_tensor(picture: Picture) -> Tensor:
    return torch.from_numpy(np.asarray(picture.resize((16, 16))).copy()).permute(2, 0, 1) / 255


def noise(seed: int = 0, size: tuple[int, int] = (6, 8)) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def save(path: Path, pixels: Any = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise() if pixels is None else pixels).save(path, **options)
    return path


def named(kind: str = "Model", **config: Any) -> nn.Module:
    """A model of a class that is called so, with this configuration."""
    model: nn.Module = type(kind, (nn.Module,), {})()
    model.config = SimpleNamespace(**config)  # type: ignore[assignment]
    return model


def labels(found: samples.Samples) -> list[Any]:
    targets = [found[i][1] for i in range(len(found))]
    return [None if target is None else target.tolist() for target in targets]


# --- folders --------------------------------------------------------------------------------------


def test_what_is_hidden_is_no_picture_and_no_class(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "deep" / "down" / "A.PNG")
    save(tmp_path / "cat" / "b.JPEG")
    save(tmp_path / "dog" / "c.tiff")
    (tmp_path / "cat" / "._b.jpeg").write_bytes(b"of macOS")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    save(tmp_path / ".ipynb_checkpoints" / "c.png")
    save(tmp_path / "__MACOSX" / "c.png")
    (tmp_path / "emu").mkdir()  # a class of which there is no picture
    save(tmp_path / "fox" / "d.webp")
    found = samples.of(tmp_path, None, to_tensor)
    assert labels(found) == [0, 0, 1, 3]
    assert len(samples.of(tmp_path, None, to_tensor, labelled=False)) == 4
    for name in ("cat", "dog", "fox", "emu"):
        shutil.rmtree(tmp_path / name)
    save(tmp_path / "e.png")  # beside hidden folders: pictures without classes
    assert labels(samples.of(tmp_path, None, to_tensor)) == [None]


def test_pictures_beside_classes_are_not_left_out_in_silence(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png")
    save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is beside folders, and so in no class"):
        samples.of(tmp_path, None, to_tensor)
    assert len(samples.of(tmp_path, None, to_tensor, labelled=False)) == 2


def test_what_was_held_out_is_taken_with_the_classes_of_training(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cat"):
        save(tmp_path / "train" / name / "a.png")
    save(tmp_path / "val" / "cat" / "a.png")
    save(tmp_path / "test" / "ant" / "a.png")
    assert labels(samples.of(tmp_path, named(num_labels=3), to_tensor)) == [2]
    shutil.rmtree(tmp_path / "train")
    assert labels(samples.of(tmp_path, None, to_tensor)) == [0]
    shutil.rmtree(tmp_path / "val")
    found = samples.of(tmp_path, named(num_labels=1), to_tensor)
    assert (found.name, labels(found)) == (str(tmp_path / "test"), [0])


def test_folders_are_classes_by_any_of_their_names() -> None:
    tench = {0: "tench, Tinca tinca", 1: "crane", 2: "great white shark, white shark", 3: "crane"}
    model = named(id2label=tench, label2id=None, num_labels=4)
    assert class_numbers(["Tinca_tinca", "White shark"], model, "folders") == [0, 2]
    # In the order of id2label, not of the alphabet.
    model = named(id2label={0: "dog", 1: "cat"}, label2id=None, num_labels=2)
    assert class_numbers(["cat", "dog"], model, "folders") == [1, 0]
    with pytest.raises(ValueError, match=r"partly as the model's classes \('cat'\).*\('dogs'\)"):
        class_numbers(["cat", "dogs"], model, "folders")
    of_imagenet = named(num_labels=1000)
    assert class_numbers(["n01443537", "n01440764"], of_imagenet, "folders") == [1, 0]


@pytest.mark.parametrize("kind", ["labels", "annotations"])
def test_maps_are_found_whatever_lies_beside_them(tmp_path: Path, kind: str) -> None:
    classes = np.arange(48, dtype=np.uint8).reshape(6, 8)
    for split in ("training", "validation"):
        save(tmp_path / "images" / split / "a.v1.JPG")
        save(tmp_path / kind / split / "a.v1.png", classes)
    (tmp_path / kind / "validation" / "a.v1.txt").write_text("no map")
    found = samples.of(tmp_path, None, to_tensor)
    assert labels(found) == [classes.tolist()]  # of those that were held out
    save(tmp_path / kind / "validation" / "a.v1.png", classes.T.copy())
    with pytest.raises(ValueError, match=r"a\.v1\.png must be as wide for its height as"):
        found[0]


def test_depths_keep_their_fractions(tmp_path: Path) -> None:
    depth = np.linspace(0.1, 9.9, 48, dtype=np.float32).reshape(6, 8)
    save(tmp_path / "images" / "a.png")
    save(tmp_path / "depth" / "a.tiff", depth)
    save(tmp_path / "labels" / "a.png", np.zeros((6, 8), np.uint8))
    model = named("SomethingForDepthEstimation")
    target = samples.of(tmp_path, model, to_tensor)[0][1]
    torch.testing.assert_close(target, torch.from_numpy(depth))
    assert not samples.of(tmp_path, None, to_tensor)[0][1].is_floating_point()  # type: ignore[union-attr]
    (tmp_path / "depth" / "a.tiff").unlink()
    np.save(tmp_path / "depth" / "a.npy", depth[None])
    target = samples.of(tmp_path, model, to_tensor)[0][1]
    torch.testing.assert_close(target, torch.from_numpy(depth))


# --- pictures -------------------------------------------------------------------------------------


def seen(path: Path) -> Any:
    """The picture as a transform gets it."""
    kept: list[Picture] = []

    def keep(picture: Picture) -> Tensor:
        kept.append(picture)
        return to_tensor(picture)

    for data in ([path], [(path, 0)], path.parent):
        samples.of(data, None, keep)[0]
    assert {picture.mode for picture in kept} == {"RGB"}
    first, *others = (np.asarray(picture).astype(int) for picture in kept)
    assert all((first == other).all() for other in others)
    return first


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_every_mode_are_in_colour(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(noise()).convert(mode)
    picture.save(tmp_path / "a.tiff")
    assert (seen(tmp_path / "a.tiff") == np.asarray(picture.convert("RGB"))).all()


def test_pictures_of_16_bits_are_not_white(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    found = seen(save(tmp_path / "a.png", grey))
    assert np.abs(found - grey[..., None] / 65535 * 255).max() <= 0.5
    save(tmp_path / "b" / "a.tiff", grey.astype(np.float32))
    with pytest.raises(ValueError, match=r"a\.tiff: pictures must have 8 or 16 bits"):
        samples.of(tmp_path / "b", None, to_tensor)[0]


def test_pictures_are_the_right_way_up(tmp_path: Path) -> None:
    pixels = np.repeat(np.repeat(noise(size=(2, 3)), 16, 0), 16, 1)
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was turned: the first row is the right-hand side
    found = seen(save(tmp_path / "a.png", pixels, exif=exif))
    assert (found == np.rot90(pixels, -1)).all()


@pytest.mark.parametrize("size", [0, 10, 200])
def test_a_broken_file_is_named(tmp_path: Path, size: int) -> None:
    file = save(tmp_path / "cat" / "a.png", noise(size=(64, 64)))
    file.write_bytes(file.read_bytes()[:size])
    for data in (tmp_path, [file]):
        with pytest.raises(ValueError, match=r"cat/a\.png cannot be read as a picture"):
            samples.of(data, None, to_tensor)[0]
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        samples.of([tmp_path / "nothing.png"], None, to_tensor)[0]
    with pytest.raises(FileNotFoundError, match=r"a\.png is a file: give its folder"):
        samples.of(file)


# --- datasets, lists, loaders ---------------------------------------------------------------------


def hub(columns: dict[str, tuple[Any, list[Any]]]) -> Any:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    values = {name: values for name, (_, values) in columns.items()}
    return datasets.Dataset.from_dict(values, features=kinds)


def test_labels_of_hugging_face_are_found_whatever_their_kind() -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(noise(i)) for i in range(2)]
    image = (datasets.Image(), pictures)
    number, name = datasets.Value("int64"), datasets.ClassLabel(names=["dog", "cat"])
    several = getattr(datasets, "List", datasets.Sequence)  # since datasets 4
    model = named(id2label={0: "cat", 1: "bird", 2: "dog"}, num_labels=3)

    def found(**columns: tuple[Any, list[Any]]) -> list[Any]:
        return labels(samples.of(hub({"image": image, **columns}), model, to_tensor))

    assert found(label=(number, [2, 0])) == [2, 0]
    assert found(label=(name, [0, 1])) == [2, 0]
    assert found(animal=(name, [1, 1])) == [0, 0]
    coarse = datasets.ClassLabel(names=[f"kind {i}" for i in range(9)])
    assert found(coarse=(coarse, [1, 1]), fine=(name, [0, 1])) == [2, 0]
    assert found(label=(several(name), [[0, 1], []])) == [[1, 0, 1], [0, 0, 0]]
    assert found(labels=(several(number), [[2], [0, 1]])) == [[0, 0, 1], [1, 1, 0]]
    assert found(labels=(several(number), [[0, 0, 1], [1, 1, 0]])) == [[0, 0, 1], [1, 1, 0]]
    assert found(caption=(datasets.Value("string"), ["a", "b"])) == [None, None]
    with pytest.raises(ValueError, match="row 1 has the label -1, which is none"):
        found(label=(name, [0, -1]))  # as in test splits
    with pytest.raises(ValueError, match="row 1 has no label"):
        found(label=(name, [0, None]))
    with pytest.raises(ValueError, match="row 0 has 3 among its labels"):
        found(labels=(several(number), [[3], [0]]))
    with pytest.raises(ValueError, match="class_encode_column"):
        found(label=(datasets.Value("string"), ["cat", "dog"]))


def test_maps_of_hugging_face_are_of_the_kind_that_the_model_gives() -> None:
    datasets = pytest.importorskip("datasets")
    classes = np.arange(48, dtype=np.uint8).reshape(6, 8)
    depth = np.linspace(1, 2, 48, dtype=np.float32).reshape(6, 8)
    scene = datasets.ClassLabel(names=["in", "out"])
    rows = hub({
        "annotation": (datasets.Image(), [Image.fromarray(classes)]),
        "depth_map": (datasets.Image(), [Image.fromarray(depth)]),
        "image": (datasets.Image(), [Image.fromarray(noise())]),
        "scene": (scene, [1]),
    })  # fmt: skip

    def found(kind: str, **config: Any) -> Any:
        taken = samples.of(rows, named(kind, **config), to_tensor)
        torch.testing.assert_close(taken[0][0], to_tensor(Image.fromarray(noise())))
        return taken[0][1]

    assert found("ForSemanticSegmentation", num_labels=48).tolist() == classes.tolist()
    torch.testing.assert_close(found("ForDepthEstimation"), torch.from_numpy(depth))
    assert int(found("ForImageClassification", num_labels=2)) == 1


def test_rows_are_the_same_in_every_form_that_can_be_had() -> None:
    datasets = pytest.importorskip("datasets")
    image = [Image.fromarray(noise(i)) for i in range(3)]
    name = datasets.ClassLabel(names=["a", "b"])
    rows = hub({"image": (datasets.Image(), image), "label": (name, [0, 1, 1])})
    expected = torch.stack([to_tensor(picture) for picture in image])

    def same(data: Any, transform: Any = to_tensor) -> None:
        found = samples.of(data, None, transform)
        assert labels(found) == [0, 1, 1]
        torch.testing.assert_close(torch.stack([found[i][0] for i in range(3)]), expected)
        assert found.picture is not None
        assert np.asarray(found.picture(1)).shape[-1] in (3, 16)

    def prepared(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = [to_tensor(picture) for picture in batch["image"]]
        return {"pixel_values": pixels, "label": batch["label"]}

    for form in ("torch", "numpy", None):
        same(rows.with_format(form))
    same(datasets.DatasetDict({"train": rows, "validation": rows}))
    same(rows.with_transform(prepared))
    same(rows.map(prepared, batched=True, remove_columns=["image"]))
    same(list(rows))  # mappings
    same(list(rows.add_column("id", ["x", "y", "z"])))  # with what no model takes
    same(list(rows.to_iterable_dataset().take(3)))
    same(torch.utils.data.DataLoader(rows, batch_size=2))
    with pytest.raises(TypeError, match="is streamed, and so has no length"):
        samples.of(rows.to_iterable_dataset(), None, to_tensor)
    loader = torch.utils.data.DataLoader(rows, 2, collate_fn=lambda batch: (
        torch.stack([to_tensor(row["image"]) for row in batch]),
        torch.tensor([row["label"] for row in batch]),
    ))  # fmt: skip
    same(loader, None)
    loader = torch.utils.data.DataLoader(rows, 2, collate_fn=lambda batch: {
        "pixel_values": torch.stack([to_tensor(row["image"]) for row in batch]),
        "labels": torch.tensor([row["label"] for row in batch]),
    })  # fmt: skip
    same(loader, None)
    same([(np.asarray(picture), label) for picture, label in zip(image, [0, 1, 1], strict=True)])
    same({"pixel_values": expected, "labels": torch.tensor([0, 1, 1])}, None)
    same([(x.numpy(), y) for x, y in zip(expected, np.array([0, 1, 1]), strict=True)], None)


def test_arrays_are_pictures_or_what_the_model_takes() -> None:
    pixels = np.stack([noise(0), noise(1)])
    found = samples.of(pixels, None, to_tensor)
    torch.testing.assert_close(found[1][0], to_tensor(Image.fromarray(noise(1))))
    fractions = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    assert (samples.of(fractions)[1][0].numpy() == fractions[1]).all()
    with pytest.raises(ValueError, match=r"must be of fractions.*torch\.uint8 of \(3, 8, 8\)"):
        samples.of([torch.zeros(3, 8, 8, dtype=torch.uint8)])[0]


def test_a_batch_of_one_is_one_image() -> None:
    x, words = torch.rand(1, 3, 8, 8), torch.ones(1, 5)
    assert samples.of([x, x])[0][0].shape == (3, 8, 8)
    assert samples.of([{"pixel_values": x, "label": 1}])[0][0].shape == (3, 8, 8)
    both = samples.of([{"pixel_values": x, "input_ids": words}])[0][0]
    assert [tuple(part.shape) for part in both.values()] == [(3, 8, 8), (5,)]
    frames = samples.of([{"pixel_values": torch.rand(4, 3, 8, 8), "mask": words}])[0][0]
    assert frames["pixel_values"].shape == (4, 3, 8, 8)


def test_what_has_no_numbers_is_refused() -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            yield torch.zeros(3, 8, 8)

    class Counted(Stream):
        def __len__(self) -> int:
            return 1

    for data in (Stream(), Counted(), torch.utils.data.DataLoader(Stream()), {"a": 1}):
        with pytest.raises(TypeError, match="data must be a folder, a dataset with a length"):
            samples.of(data)
    with pytest.raises(ValueError, match="empty"):
        samples.of([])


def test_labels_that_are_none_are_told_as_such() -> None:
    x = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match="labels must be numbers or maps of them, not dict"):
        samples.of([(x, {"boxes": [1]})])[0]
    with pytest.raises(ValueError, match="some samples have labels and others have none"):
        samples.of([(x, 1), (x, None)]).batch([0, 1])
    with pytest.raises(ValueError, match=r"has no classes \(num_classes=0\)"):
        samples.of([(x, 1)], _headless())[0]
    assert samples.of([(x, 1)], _headless(), labelled=False)[0][1] is None
    classes = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    for mask in (classes, np.asarray(classes), torch.arange(48).view(1, 6, 8)):
        target = samples.of([(x, mask)])[0][1]
        assert target is not None and target.dtype == torch.long
        assert target.tolist() == np.asarray(classes).tolist()


def _headless() -> nn.Module:
    model = small("vit")
    model.reset_classifier(0)  # type: ignore[operator]
    return model


# --- preparing ------------------------------------------------------------------------------------


def test_pictures_are_of_the_size_that_the_model_was_made_for() -> None:
    found = samples.of([Image.fromarray(noise()).convert("L")], small("vit"))
    assert found[0][0].shape == (3, 64, 64)
    assert samples.of([Image.fromarray(noise())], small("rectangular"))[0][0].shape == (3, 64, 96)


def test_maps_become_what_the_processor_says() -> None:
    import transformers

    picture = Image.fromarray(noise(size=(40, 60)))
    classes = np.full((40, 60), 7, np.uint8)
    classes[:10], classes[10:20], classes[20:30] = 0, 255, 1
    processor = transformers.BeitImageProcessor(
        do_reduce_labels=True, do_center_crop=False, size={"height": 32, "width": 32}
    )
    target = samples.of([(picture, Image.fromarray(classes))], None, processor)[0][1]
    assert target is not None
    assert target[::10, 0].tolist() == [255, 255, 0, 6]
    own = processor(picture, segmentation_maps=Image.fromarray(classes), do_resize=False)["labels"]
    assert target.tolist() == np.asarray(own[0]).tolist()
    processor.do_center_crop = True
    with pytest.raises(ValueError, match="do_center_crop=False"):
        samples.of([(picture, Image.fromarray(classes))], None, processor)[0]
    assert samples.of([(picture, 3)], None, processor)[0][1] == 3


def test_a_whole_processor_prepares_images() -> None:
    import transformers

    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24)
    whole = SimpleNamespace(image_processor=processor, tokenizer=None)
    picture = Image.fromarray(noise())
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    dual = named("CLIPModel")
    dual.main_input_name = "input_ids"  # type: ignore[assignment]
    found = samples.of([picture], dual, whole)  # type: ignore[arg-type]
    torch.testing.assert_close(found[0][0]["pixel_values"], expected)


def test_images_of_several_sizes_are_several_batches() -> None:
    sizes = [(16, 24), (16, 16), (16, 24)]
    data = [(torch.randn(3, *size), i) for i, size in enumerate(sizes)]
    batches = samples.of(data).batch([0, 1, 2])
    assert [(tuple(x.shape), [int(t) for t in y or ()]) for x, y in batches] == [  # type: ignore[union-attr]
        ((2, 3, 16, 24), [0, 2]),
        ((1, 3, 16, 16), [1]),
    ]


# --- telling data apart ---------------------------------------------------------------------------


def test_another_label_of_any_image_is_other_data(tmp_path: Path) -> None:
    images = torch.randn(40, 3, 8, 8)
    numbers = [i % 5 for i in range(40)]
    others = [*numbers[:17], 4, *numbers[18:]]  # of an image that is not looked at

    def print_of(targets: Any) -> str:
        return samples.of(list(zip(images, targets, strict=True))).fingerprint()

    assert print_of(numbers) != print_of(others)
    assert print_of(numbers) == print_of(torch.tensor(numbers))
    maps = torch.zeros(40, 4, 4).long()
    before = print_of(maps)
    maps[17, 0, 0] = 1
    assert print_of(maps) != before
    datasets = pytest.importorskip("datasets")
    pictures = (datasets.Image(), [Image.fromarray(noise(i)) for i in range(40)])
    prints = {
        samples.of(
            hub({"image": pictures, "label": (datasets.Value("int64"), targets)}), None, to_tensor
        ).fingerprint()
        for targets in (numbers, others)
    }
    assert len(prints) == 2
    for i in range(40):
        save(tmp_path / "cat" / f"{i:02}.png", noise(i))
        save(tmp_path / "dog" / f"{i:02}.png", noise(i))
    before = samples.of(tmp_path, None, to_tensor).fingerprint()
    save(tmp_path / "cat" / "17.png", noise(size=(20, 20)))
    assert samples.of(tmp_path, None, to_tensor).fingerprint() != before


def test_the_same_data_made_again_is_known() -> None:
    made = []  # all are kept, so that no two are in the same place
    for _ in range(2):
        pictures = [Image.fromarray(np.full((8, 8, 3), i, np.uint8)) for i in range(3)]
        rows = [{"image": picture, "label": picture.convert("L")} for picture in pictures]
        made.append([pictures, [(picture, {"box": object()}) for picture in pictures], rows])
    for data in zip(*made, strict=True):
        prints = [samples.of(x, None, to_tensor, labelled=False).fingerprint() for x in data]
        assert prints[0] == prints[1]


def test_tensors_of_any_kind_have_a_fingerprint() -> None:
    images = torch.randn(2, 3, 8, 8)
    plain = samples.of(images).fingerprint()
    assert samples.of(images.clone().requires_grad_()).fingerprint() == plain
    assert samples.of(images.bfloat16()).fingerprint() != plain
