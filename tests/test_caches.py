"""What is kept on disk answers for nothing else: everything that an evaluation, a sweep or a
training depends on is changed, one thing at a time, and each change is seen. What has not changed
is known again, in other processes, too."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tokred
from tokred.data import samples
from tokred.data.digest import NoFingerprintError, digest_of
from tokred.maps import Kept
from tokred.measure import store as stores
from tokred.measure.settings import Setting
from tokred.measure.store import Store
from tokred.measure.work import Work
from tokred.training import Recipe, checkpoints

pytest.importorskip("torchmetrics")


def vit(**options: Any) -> Any:
    """Two blocks on a 4x4 grid; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        usual = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        model = VisionTransformer(**{**usual, "num_classes": 5, **options})
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.eval().register_buffer("shown", torch.zeros(2), persistent=False)
    return model


def by_norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1)


def by_mean(x: Tensor) -> Tensor:
    return x.mean(-1)


score_of = by_norm


@dataclass(frozen=True)
class Mine:
    """A method of one's own, as in a notebook."""

    largest: bool = True
    table: Any = None
    needs: ClassVar[frozenset[str]] = frozenset()
    prunes: ClassVar[bool] = True
    bibtex: ClassVar[str] = ""

    def __call__(self, tokens: Any, keep: int) -> Kept:
        order = score_of(tokens.x).argsort(dim=-1, descending=self.largest, stable=True)
        return Kept(order[:, :keep].sort(-1).values, tokens.x.shape[1])


def cell(descending: bool, sign: int = 1) -> Any:
    """A cell of a notebook that is run again after an edit: the class is made anew."""

    @dataclass(frozen=True)
    class Edited(Mine):
        def __call__(self, tokens: Any, keep: int) -> Kept:
            x = tokens.x.norm(dim=-1) if sign > 0 else -tokens.x.norm(dim=-1)
            order = x.argsort(dim=-1, descending=descending, stable=True)
            return Kept(order[:, :keep].sort(-1).values, tokens.x.shape[1])

    return Edited()


def pictures() -> Tensor:
    return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def halved(picture: Any) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 510


# --- evaluations ----------------------------------------------------------------------------------


@dataclass
class Evaluated:
    """An evaluation; each field may be changed."""

    folder: Path
    patch: pytest.MonkeyPatch
    model: Any = field(default_factory=vit)
    data: Any = field(default_factory=lambda: list(zip(pictures(), [0, 1, 2, 3] * 10, strict=True)))
    method: Any = field(default_factory=Mine)
    schedule: Any = 0.5
    transform: Any = None
    name: str = "mine"
    options: dict[str, Any] = field(
        default_factory=lambda: {"task": None, "batch": 8, "compared": 16, "seconds": 0.1}
    )
    around: Any = None

    def key(self) -> str:
        """The names of the files of the dense model and of the setting."""
        found = samples.of(self.data, self.model, self.transform)
        with self.around or torch.no_grad():
            work = Work(self.model, found, None, **self.options)
            store = Store(self.folder, False, work, work.batches.fingerprint())
        of = [None, Setting(self.name, self.method, self.schedule)]
        paths = [store.path(setting) for setting in of]
        assert None not in paths
        return " ".join(path.stem for path in paths if path)


def one_weight(e: Any) -> None:
    e.model.blocks[1].mlp.fc1.weight.data[-1, -1] += 1e-7


def a_buffer_that_is_not_saved(e: Any) -> None:
    e.model.shown[1] = 1


def an_attribute(e: Any) -> None:
    e.model.blocks[0].attn.scale *= 2


def a_function(e: Any) -> None:
    e.model.blocks[0].mlp.act = nn.GELU(approximate="tanh")


def a_hook(e: Any) -> None:
    e.model.norm.register_forward_hook(lambda module, given, found: found * 2)


def a_forward(e: Any) -> None:
    norm = e.model.norm
    norm.forward = lambda x: x + 1


def pooling(e: Any) -> None:
    e.model.global_pool = "avg"


def dtype(e: Any) -> None:
    e.model.bfloat16()


def one_pixel(e: Any) -> None:
    e.data[17][0][2, 31, 31] += 1e-6


def one_label(e: Any) -> None:
    e.data[17] = (e.data[17][0], 4)


def an_image_less(e: Any) -> None:
    del e.data[-1]


def an_option_of_the_method(e: Any) -> None:
    e.method = Mine(largest=False)


def a_table_of_the_method(e: Any) -> None:
    e.method = Mine(table={"heads": [1.0, 2.0]})


def another_method(e: Any) -> None:
    e.method = tokred.ToMe()


def the_code_of_the_method(e: Any) -> None:
    e.method = cell(True)


def a_helper_of_the_method(e: Any) -> None:
    e.patch.setitem(globals(), "score_of", by_mean)


def the_schedule(e: Any) -> None:
    e.schedule = tokred.Exactly((16, 8))


def option(**changes: Any) -> Callable[[Any], None]:
    def change(e: Any) -> None:
        e.options |= changes

    change.__name__ = f"option {', '.join(changes)}"
    return change


def autocast(e: Any) -> None:
    e.around = torch.autocast("cpu", torch.bfloat16)


def threads(e: Any) -> None:
    e.patch.setattr(torch, "get_num_threads", lambda: 77)


def float32(e: Any) -> None:
    e.patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")


def version_of_timm(e: Any) -> None:
    e.patch.setattr(sys.modules["timm"], "__version__", "0.0")


def version_of_tokred(e: Any) -> None:
    e.patch.setattr(stores, "__version__", "0.0")


def source_of_tokred(e: Any) -> None:
    e.patch.setattr(stores, "sources", lambda: "+0123")


EVALUATED: list[Callable[[Any], None]] = [
    one_weight, a_buffer_that_is_not_saved, an_attribute, a_function, a_hook, a_forward, pooling,
    dtype, one_pixel, one_label, an_image_less, an_option_of_the_method, a_table_of_the_method,
    another_method, the_code_of_the_method, a_helper_of_the_method, the_schedule, option(batch=4),
    option(compared=8), option(seconds=0.2), option(task="multilabel"), autocast, threads, float32,
    version_of_timm, version_of_tokred, source_of_tokred,
]  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The key of the evaluation as it is."""
    return Evaluated(tmp_path_factory.mktemp("known"), pytest.MonkeyPatch()).key()


@pytest.mark.parametrize("change", EVALUATED, ids=lambda change: change.__name__)
def test_an_evaluation_sees_every_change(
    change: Callable[[Any], None], known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = Evaluated(tmp_path, monkeypatch)
    change(evaluated)
    key = evaluated.key()
    dense, setting = zip(known.split(), key.split(), strict=True)
    assert setting[0] != setting[1]
    of_method = change.__name__.endswith("method") or change is the_schedule
    assert (dense[0] == dense[1]) == of_method  # else the dense model's row has changed, too


def test_an_evaluation_that_is_repeated_is_known(known: str, tmp_path: Path) -> None:
    evaluated = Evaluated(tmp_path, pytest.MonkeyPatch())
    assert evaluated.key() == known
    evaluated.model = copy.deepcopy(evaluated.model)
    evaluated.data = list(evaluated.data)
    assert evaluated.key() == known == evaluated.key()
    with tokred.applied(evaluated.model, "tome", 0.5):
        pass
    assert evaluated.key() == known
    evaluated.method = cell(True)
    first = evaluated.key()
    evaluated.method = cell(True)  # made anew, and the same
    assert evaluated.key() == first
    evaluated.method = cell(False)  # the same text, another value in it
    second = evaluated.key()
    evaluated.method = cell(True, -1)
    assert len({first, second, evaluated.key()}) == 3


def svit(model: Any) -> Any:
    """Gates of SViT for a model, as modules."""
    torch.manual_seed(3)
    gates = tokred.apply(model, tokred.SViT(), keep_rate=0.5).gates
    tokred.remove(model)
    return gates


@pytest.mark.filterwarnings("ignore:.*gates.*random")
def test_gates_count_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = Evaluated(tmp_path, monkeypatch, schedule=None)
    gates = svit(evaluated.model)
    evaluated.method = tokred.SViT(gates)
    first = evaluated.key()
    assert evaluated.key() == first
    next(gates.parameters()).data[0] += 1e-6
    assert evaluated.key() != first
    reduction = tokred.apply(evaluated.model, tokred.SViT(gates), keep_rate=0.5)
    evaluated.method = tokred.SViT(tmp_path / "gates.safetensors")
    keys = []
    for _ in range(2):
        reduction.save(tmp_path / "gates.safetensors")
        keys.append(evaluated.key())
        next(reduction.gates.parameters()).data[0] += 1e-6
    assert keys[0] != keys[1]


def quantised(model: nn.Module) -> nn.Module:
    pytest.importorskip("torch.ao.quantization")
    import torch.ao.quantization as quantization

    return quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore")
def test_one_packed_weight_counts() -> None:
    digests = []
    for change in (0.0, 0.0, 0.5):
        model = vit()
        model.blocks[1].mlp.fc2.weight.data[3, 5] += change
        digests.append(digest_of(quantised(model)))
    assert digests[0] == digests[1] != digests[2]


def to_tensor(picture: Any) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def test_one_pixel_of_one_file_and_preprocessing_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    for kind, value in (("cat", 10), ("dog", 200)):
        (folder / kind).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 32), (value, number, 0)).save(folder / kind / f"{number}.bmp")
    evaluated = Evaluated(
        tmp_path, monkeypatch, vit(num_classes=2), folder, transform=to_tensor
    )  # fmt: skip
    first = evaluated.key()
    assert evaluated.key() == first
    evaluated.transform = halved
    keys = [first, evaluated.key()]
    evaluated.transform = to_tensor
    file = folder / "dog" / "1.bmp"
    about = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))  # same name, size and time
    keys.append(evaluated.key())
    (folder / "cat" / "2.bmp").rename(folder / "dog" / "3.bmp")  # another label
    keys.append(evaluated.key())
    assert len(set(keys)) == 4
    # Where a transform cannot be told from others, what it makes of the pictures is.
    lock = threading.Lock()
    evaluated.transform = lambda picture: to_tensor(picture) * (lock is not None)
    with pytest.raises(NoFingerprintError):
        digest_of(evaluated.transform)
    keys.append(evaluated.key())
    evaluated.transform = lambda picture: halved(picture) * (lock is not None)
    keys.append(evaluated.key())
    assert len(set(keys)) == 6


def test_another_process_knows_it(known: str, tmp_path: Path) -> None:
    program = (
        "import sys, pytest, test_caches as t\n"
        "from pathlib import Path\n"
        "e = t.Evaluated(Path(sys.argv[1]), pytest.MonkeyPatch())\n"
        "print(e.key())\n"
        "e.method = t.cell(True)\n"
        "print(e.key())\n"
        "print(t.digest_of({'a', 'b', 'c', 'd'}, t.Mine(table={object(): frozenset('xyz')})))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    edited = Evaluated(tmp_path, pytest.MonkeyPatch(), method=cell(True))
    sets = digest_of({"d", "c", "b", "a"}, Mine(table={object(): frozenset("xyz")}))
    assert run.stdout.split("\n")[:3] == [known, edited.key(), sets]


# --- what cannot be told --------------------------------------------------------------------------


def evaluate(*arguments: Any, **options: Any) -> Any:
    usual = {"seconds": 0.01, "progress": False, "batch": 16}
    return tokred.evaluate(*arguments, **{**usual, **options})


def test_what_cannot_be_told_is_not_kept_and_named(tmp_path: Path) -> None:
    model, images = vit(), pictures()[:4]
    model.blocks[1].norm1.lock = threading.Lock()
    with pytest.warns(UserWarning) as told:
        evaluate(model, images, [Mine()], [0.5], cache=tmp_path)
    (warning,) = [one for one in told if "no results are kept" in str(one.message)]
    assert str(warning.message) == (
        "no results are kept for another time: model.blocks.1.norm1.lock, a "
        "_thread.lock, cannot be told from others of its kind (cannot pickle '_thread.lock' object)"
    )
    assert not [*tmp_path.rglob("*.json")]
    del model.blocks[1].norm1.lock
    with pytest.warns(
        UserWarning,
        match=r"no results of mine 0\.5 are kept .*: method\.table, a builtins\.generator",
    ):
        evaluate(model, images, {"mine": Mine(table=(x for x in ""))}, [0.5], cache=tmp_path)
    assert len([*tmp_path.rglob("*.json")]) == 1  # of the dense model


@pytest.mark.parametrize(
    "thing",
    [threading.Lock(), (x for x in ""), open(os.devnull), threading.local(), memoryview(b"")],  # noqa: PTH123, SIM115
    ids=lambda thing: type(thing).__name__,
)
def test_opaque_things_have_no_digest(thing: Any) -> None:
    for inside in (thing, {"a": [thing]}, SimpleNamespace(a=thing), lambda: thing):
        with pytest.raises(NoFingerprintError, match="cannot be told from others of its kind"):
            digest_of(inside)


# --- from end to end ------------------------------------------------------------------------------


def gates_as_modules() -> Iterator[tuple[Any, ...]]:
    model = vit()
    gates = svit(model)
    yield model, pictures(), {"svit": tokred.SViT(gates)}
    for parameter in gates.parameters():
        nn.init.normal_(parameter, std=2.0)
    yield model, pictures(), {"svit": tokred.SViT(gates)}


def an_edited_cell() -> Iterator[tuple[Any, ...]]:
    yield vit(), pictures(), {"mine": cell(True)}
    yield vit(), pictures(), {"mine": cell(False)}


def images_in_between() -> Iterator[tuple[Any, ...]]:
    images = pictures()
    yield vit(), images, ["tome"]
    images = images.clone()
    images[17] = 0
    yield vit(), images, ["tome"]


def pooled_otherwise() -> Iterator[tuple[Any, ...]]:
    yield vit(global_pool="avg"), pictures(), ["tome"]
    yield vit(global_pool="max"), pictures(), ["tome"]


@pytest.mark.filterwarnings("ignore:.*gates.*random")
@pytest.mark.parametrize(
    "two", [gates_as_modules, an_edited_cell, images_in_between, pooled_otherwise]
)
def test_a_table_is_never_that_of_something_else(
    two: Callable[[], Iterator[tuple[Any, ...]]], tmp_path: Path
) -> None:
    found = []
    for arguments in two():
        table = evaluate(*arguments, [0.5], cache=tmp_path)
        again = evaluate(*arguments, [0.5], cache=tmp_path)
        truth = evaluate(*arguments, [0.5], cache=False)
        assert table.rows == again.rows  # with speeds: it was not measured again
        assert table.rows[1].kl == truth.rows[1].kl
        found.append(table.rows[1].kl)
    assert found[0] != found[1]


# --- sweeps ---------------------------------------------------------------------------------------


class Pipeline:
    """A pipeline of one's own."""

    def __init__(self) -> None:
        self.components = {"unet": vit(), "tokenizer": {"a": 1}, "scheduler": Scheduler()}
        self.unet = self.components["unet"]

    @property
    def scheduler(self) -> Any:
        return self.components["scheduler"]

    def __call__(self, prompt: list[str], **options: Any) -> Any:
        noise = [torch.rand(8, 8, generator=source) for source in options["generator"]]
        grey = [Image.fromarray((255 * x).byte().numpy()) for x in noise]
        return SimpleNamespace(images=grey)


class Scheduler:
    def __init__(self) -> None:
        self.config = {"steps": 10, "_use": ["b", "a"]}
        self.betas = torch.linspace(0, 1, 4)
        self.timesteps: Any = None


class AnotherPipeline(Pipeline):
    pass


@dataclass
class Swept:
    """A sweep; each field may be changed."""

    patch: pytest.MonkeyPatch
    pipe: Any = field(default_factory=Pipeline)
    sweep: dict[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> Any:
        from tokred.measure import fid

        usual = {"methods": ("tome",), "keep_rates": (0.5,), "prompts": ("1", "2"), "images": 4}
        return fid.Sweep(**{**usual, **self.sweep})

    def key(self) -> str:
        from tokred.measure import fid

        return json.dumps(fid.pins(self.pipe, self.plan, "ours"), sort_keys=True)


def a_weight_of_the_denoiser(s: Any) -> None:
    one_weight(SimpleNamespace(model=s.pipe.unet))


def an_attribute_of_the_denoiser(s: Any) -> None:
    an_attribute(SimpleNamespace(model=s.pipe.unet))


def dtype_of_the_denoiser(s: Any) -> None:
    s.pipe.unet.half()


def the_tokenizer(s: Any) -> None:
    s.pipe.components["tokenizer"]["a"] = 2


def the_schedulers_configuration(s: Any) -> None:
    s.pipe.scheduler.config["steps"] = 20


def the_schedulers_noise(s: Any) -> None:
    s.pipe.scheduler.betas[0] = 0.5


def the_code_of_the_pipeline(s: Any) -> None:
    s.patch.setattr(Pipeline, "__call__", lambda self, prompt, **options: None)


def the_class_of_the_pipeline(s: Any) -> None:
    s.pipe.__class__ = AnotherPipeline


def the_code_of_a_method(s: Any) -> None:
    module = sys.modules["tokred.measure.fid.pins"]
    s.patch.setattr(module, "parse", lambda text, named: cell(True))


def a_library(s: Any) -> None:
    s.patch.setattr(sys.modules["timm"], "__version__", "0.0")


def of_the_sweep(**changes: Any) -> Callable[[Any], None]:
    def change(s: Any) -> None:
        s.sweep |= changes

    change.__name__ = f"option {', '.join(changes)}"
    return change


SWEPT: list[Callable[[Any], None]] = [
    a_weight_of_the_denoiser, an_attribute_of_the_denoiser, dtype_of_the_denoiser, the_tokenizer,
    the_schedulers_configuration, the_schedulers_noise, the_code_of_the_pipeline,
    the_class_of_the_pipeline, the_code_of_a_method, a_library, float32,
    of_the_sweep(prompts=("1", "3")), of_the_sweep(steps=3), of_the_sweep(guidance=2.0),
    of_the_sweep(size=16), of_the_sweep(around=tokred.Around(every=2)),
]  # fmt: skip


@pytest.mark.parametrize("change", SWEPT, ids=lambda change: change.__name__)
def test_a_sweep_sees_every_change(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    swept, same = Swept(monkeypatch), Swept(monkeypatch)
    before = swept.key()
    same.pipe.scheduler.timesteps = torch.arange(3)  # where it was in the last image
    assert same.key() == before
    change(swept)
    assert swept.key() != before


def test_the_scale_of_an_adapter_counts() -> None:
    peft = pytest.importorskip("peft")
    unet = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["qkv"]), vit()
    )
    layer = unet.blocks[0].attn.qkv
    first = digest_of(unet)
    layer.scaling["default"] *= 0.1
    second = digest_of(unet)
    layer.scaling["default"] /= 0.1
    assert first == digest_of(unet) != second
    layer.enable_adapters(False)
    assert digest_of(unet) != first


def test_a_sweep_that_cannot_be_told_is_not_gone_on_with(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from tokred.measure import fid

    swept = Swept(pytest.MonkeyPatch(), sweep={"methods": (), "keep_rates": (1.0,)})
    swept.pipe.components["tokenizer"] = {"vocabulary": threading.Lock()}
    with pytest.warns(
        UserWarning, match=r"cannot go on if it is stopped: dict\.vocabulary, a _thr"
    ):
        fid.generate(swept.pipe, swept.plan, tmp_path)
    with pytest.raises(ValueError, match=r"of another sweep: dict\.vocabulary, a _thread\.lock"):
        fid.generate(swept.pipe, swept.plan, tmp_path)


class Pixels(nn.Module):
    """Features of an image; which ones is an attribute that no weight tells of."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((1, self.axis))


@pytest.mark.filterwarnings("ignore:.*images for 8 features")
def test_features_are_never_those_of_another_network_or_file(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from tokred.measure import fid

    swept = Swept(pytest.MonkeyPatch(), sweep={"methods": (), "keep_rates": (1.0,)})
    out = tmp_path / "out"
    fid.generate(swept.pipe, swept.plan, out)
    reference = tmp_path / "reference"
    reference.mkdir()
    for number in range(4):
        noise = torch.rand(8, 8, generator=torch.Generator().manual_seed(number))
        Image.fromarray((200 * noise).byte().numpy()).save(reference / f"{number}.bmp")

    def figures(axis: int, folder: Path = out) -> float:
        return fid.score(swept.plan, folder, reference, Pixels(axis)).rows[0].fid

    first, second = figures(2), figures(3)
    kept = (out / "features" / "reference.npz").read_bytes()
    assert figures(3) == second != first
    assert (out / "features" / "reference.npz").read_bytes() == kept
    file = reference / "2.bmp"
    about, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(content)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert figures(3) != second
    network = Pixels(3)
    network.lock = threading.Lock()
    with pytest.warns(UserWarning, match="features are not kept for another time: .*lock"):
        fid.score(swept.plan, out, reference, network)


# --- trainings ------------------------------------------------------------------------------------


class Seen:
    """Samples to train on."""

    def __init__(self) -> None:
        self.images = pictures()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % 5


class SeenDark(Seen):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] / 2, index % 5


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def another_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return 2 * nn.functional.cross_entropy(outputs, targets)


@dataclass
class TrainedOn:
    """A training; each field may be changed."""

    patch: pytest.MonkeyPatch
    model: Any = field(default_factory=vit)
    method: Any = field(default_factory=Mine)
    recipe: Any = field(default_factory=lambda: Recipe(frozen=True))
    data: Any = field(default_factory=Seen)
    task: Any = loss
    collate: Any = torch.utils.data.default_collate

    def begin(self, out: Path) -> None:
        checkpoints.begin(out, self.pins(), 0)

    def pins(self) -> Any:
        reduction = tokred.apply(self.model, self.method, 0.5)
        parts = self.model, reduction, self.recipe, self.data, self.task, self.collate
        return checkpoints.pins(*parts)


def the_recipe(t: Any) -> None:
    t.recipe = dataclasses.replace(t.recipe, lr=0.5)


def the_loss(t: Any) -> None:
    t.task = another_loss


def the_collate(t: Any) -> None:
    t.collate = lambda samples: samples


def what_is_trained(t: Any) -> None:
    t.model.head.bias.requires_grad_(False)


def one_sample_less(t: Any) -> None:
    t.data.images = t.data.images[1:]


REFUSED: list[Callable[[Any], None]] = [
    one_weight, a_buffer_that_is_not_saved, an_attribute, a_function, pooling, dtype,
    an_option_of_the_method, another_method, the_code_of_the_method, a_helper_of_the_method,
    the_recipe, the_loss, the_collate, what_is_trained, one_sample_less,
]  # fmt: skip


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_training_refuses_what_is_another(
    change: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TrainedOn(monkeypatch).begin(tmp_path)
    same = TrainedOn(monkeypatch, model=vit().train())
    checkpoints.compare(tmp_path, same.pins(), same.model)
    other = TrainedOn(monkeypatch)
    change(other)
    if change is not one_sample_less:  # the number is refused, the content is told
        with pytest.raises(ValueError, match="holds a checkpoint of another training: "):
            checkpoints.compare(tmp_path, other.pins(), other.model)
        return
    with pytest.raises(ValueError, match="samples was 40, and is 39"):
        checkpoints.compare(tmp_path, other.pins(), other.model)


def one_pixel_of_a_sample(t: Any) -> None:
    t.data.images[17, 0, 31, 31] += 1e-6


def the_code_of_the_data(t: Any) -> None:
    t.data = SeenDark()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (one_pixel_of_a_sample, "data: the samples"),
        (the_code_of_the_data, "data: the samples"),
        (version_of_timm, "versions was"),
    ],
)
def test_a_training_tells_what_may_change(
    change: Callable[[Any], None], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TrainedOn(monkeypatch).begin(tmp_path)
    other = TrainedOn(monkeypatch)
    change(other)
    with pytest.warns(UserWarning, match=f"goes on, though not all is as it was: {told}"):
        checkpoints.compare(tmp_path, other.pins(), other.model)
    lock = threading.Lock()
    untold = TrainedOn(monkeypatch, collate=lambda samples: (lock, samples))
    with pytest.warns(UserWarning, match="whether collate are what they were cannot be told"):
        checkpoints.compare(tmp_path, untold.pins(), untold.model)
