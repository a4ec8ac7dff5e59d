"""The notebooks of `examples` run, on the bundled checkpoints and on others, by changing one name.

Here their cells run one after the other in this process, as a kernel would run them, because the
start of a kernel and all imports take longer than the cells; the slow run starts kernels. What they
are stored with is written by `examples/run_notebooks.py`.
"""

from __future__ import annotations

import ast
import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tokred import reducers
from tokred.data import zoo

pyplot = pytest.importorskip("matplotlib.pyplot")
Figure = pytest.importorskip("matplotlib.figure").Figure
Image = pytest.importorskip("PIL.Image")

FILES = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def cells(file: Path, kind: str) -> list[dict[str, Any]]:
    stored = json.loads(file.read_text())
    return [cell for cell in stored["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def pictures_in(outputs: list[dict[str, Any]]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def run(code: str, scope: dict[str, Any]) -> int:
    """Runs a cell; returns how many pictures it shows: figures that are open when it ends, and its
    last value, if it is one."""
    tree = ast.parse(code)
    last = tree.body[-1] if tree.body else None
    shown = 0
    if isinstance(last, ast.Expr) and not code.rstrip().endswith(";"):
        exec(compile(ast.Module(tree.body[:-1], []), "cell", "exec"), scope)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), scope)
        for told in ("__repr__", "_repr_html_", "_repr_png_"):  # what a front end asks for
            getattr(value, told, lambda: None)()
        shown += hasattr(value, "_repr_png_")
        if isinstance(value, Figure):
            value.canvas.draw()
            shown += 1
    else:
        exec(compile(tree, "cell", "exec"), scope)
    for number in pyplot.get_fignums():
        pyplot.figure(number).canvas.draw()
        shown += 1
    pyplot.close("all")
    return shown


@pytest.fixture
def scope(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """Where cells run: in an empty folder; methods that they register are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKRED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["notebook"])
    pyplot.switch_backend("agg")
    before = dict(reducers._METHODS)
    request.addfinalizer(lambda: reducers._METHODS.update(before))
    request.addfinalizer(reducers._METHODS.clear)
    return {"__name__": "__main__"}


@every_notebook
def test_runs_and_shows_what_it_is_stored_with(file: Path, scope: dict[str, Any]) -> None:
    for cell in cells(file, "code"):
        assert run(source(cell), scope) == pictures_in(cell["outputs"]), source(cell)


@every_notebook
def test_is_stored_with_its_outputs_and_nothing_else(file: Path) -> None:
    assert file.stat().st_size < 1_000_000
    code = cells(file, "code")
    assert sum(pictures_in(cell["outputs"]) for cell in code), "a notebook without a picture"
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        prints = "print(" in source(cell)
        assert bool(cell["outputs"]) >= prints, f"not executed: {source(cell)}"
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data", "execute_result")
            assert output.get("name", "stdout") == "stdout", output
            told = "".join(
                "".join(text)
                for text in (output.get("text", ""), *output.get("data", {}).values())
                if not str(text).startswith("iVBOR")  # a picture
            )
            assert not re.search(r"(^|[\s'\"=(])/[a-z]+/|[A-Z]:\\", told), f"a path: {told}"
            assert socket.gethostname() not in told


@every_notebook
def test_links_of_notebooks_lead_somewhere(file: Path) -> None:
    for cell in cells(file, "markdown"):
        for target in re.findall(r"\]\(([^)#:]+)", source(cell)):
            assert (file.parent / target).exists(), f"{file.name} links to {target}"


def tiny_classifier(folder: Path) -> None:
    """What transformers saves: a ViT with random weights, and its image processor."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        patch_size=8,
        num_labels=3,
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)


def tiny_depth(folder: Path) -> None:
    """The same: a DPT."""
    import transformers

    config = transformers.DPTConfig(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        patch_size=8,
        backbone_out_indices=[1, 2, 4, 5],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
    )
    torch.manual_seed(0)
    transformers.DPTForDepthEstimation(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    transformers.DPTImageProcessor(size=size, do_resize=True).save_pretrained(folder)


def tiny_diffusion(folder: Path) -> None:
    """A pipeline of Stable Diffusion, with a tokenizer that knows three letters."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    letters = ["a", "b", "c", "a</w>", "b</w>", "c</w>", "<|startoftext|>", "<|endoftext|>"]
    text = transformers.CLIPTextConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=len(letters),
        bos_token_id=6,
        eos_token_id=7,
    )
    channels = {"block_out_channels": (32, 32), "norm_num_groups": 8}
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **channels,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(
            vocab={letter: number for number, letter in enumerate(letters)},
            merges=[],
            model_max_length=77,
        ),
        unet=diffusers.UNet2DConditionModel(
            sample_size=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            **channels,
        ),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


OTHERS = {
    "visualise": tiny_classifier,
    "validate": tiny_classifier,
    "benchmark": tiny_classifier,
    "dense": tiny_depth,
    "diffusion": tiny_diffusion,
    "add_your_own_method": tiny_classifier,
}
IN_EVERY_RUN = (("visualise", False), ("dense", True))


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        pytest.param(
            name,
            folder,
            marks=[] if (name, folder) in IN_EVERY_RUN else pytest.mark.slow,
            id=f"{name}, a folder" if folder else name,
        )
        for name in OTHERS
        for folder in (False, True)
        if (name, folder) != ("diffusion", True)
    ],
)
def test_runs_on_another_model_by_changing_its_name(
    name: str, folder: bool, scope: dict[str, Any], tmp_path: Path
) -> None:
    """And, if there is a folder of pictures, that one's."""
    OTHERS[name](tmp_path / "checkpoint")
    changes = [('^MODEL = "[a-z_]+"', 'MODEL = "checkpoint"')]
    if folder:
        (tmp_path / "photos").mkdir()
        for number, image in enumerate(zoo.held_out("digits_scenes").images[:12]):
            Image.fromarray(image[0].numpy()).save(tmp_path / "photos" / f"{number}.png")
        changes.append(("^IMAGES = None", 'IMAGES = "photos"'))
    if name == "diffusion":  # one prompt is enough, too; this tokenizer knows no digits
        changes.append((r"^PROMPTS = \[.*\]", 'PROMPTS = ["abc"]'))
    run_changed(name, changes, scope)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, kind in OTHERS.items() if kind is tiny_classifier])
def test_runs_on_models_of_timm(
    name: str, scope: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(  # nothing is downloaded: random weights
        timm, "create_model", lambda name, pretrained: create(name, depth=6, img_size=96)
    )
    run_changed(name, [('^MODEL = "[a-z_]+"', 'MODEL = "vit_tiny_patch16_224"')], scope)


def run_changed(name: str, changes: list[tuple[str, str]], scope: dict[str, Any]) -> None:
    """Runs a notebook with some of its lines changed, each of which it has once."""
    file = next(file for file in FILES if file.stem == name)
    changed = []
    for cell in cells(file, "code"):
        code = source(cell)
        for was, now in changes:
            code, number = re.subn(was, now, code, flags=re.MULTILINE)
            changed += [now] * number
        run(code, scope)
    assert sorted(changed) == sorted(now for _, now in changes)


@pytest.mark.slow
@every_notebook
def test_runs_in_a_kernel(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel")
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.setenv("TOKRED_CACHE", str(tmp_path))
    ran = pytest.importorskip("run_notebooks").run(file)
    shown = [pictures_in(cell.outputs) for cell in ran.cells if cell.cell_type == "code"]
    assert shown == [pictures_in(cell["outputs"]) for cell in cells(file, "code")]
