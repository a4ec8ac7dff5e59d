"""Who may import whom (docs/architecture.md), and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tokred.host import hosts, library_of, patch_names, summary_of
from tokred.moved import MOVED

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "extensions"))
from architecture import DRAWING, RANK, circle, drawing, edges, files, imports, room, rooms  # noqa: E402

HOSTS = {"timm", "transformers", "diffusers", "torchvision", "open_clip"}
DISCOVERY = {"moved.py", "find.py", "registry.py", "worker.py"}
"""The files that import others by computed names: former paths, patches, methods, and the package
that lies in some folder."""
FILES = files()
PATCHES = sorted((ROOT / "patches").glob("[a-z]*.py"))


def shown(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", FILES, ids=shown)
def test_imports_point_one_way(file: Path) -> None:
    own = imports(file)
    assert not {name.split(".")[0] for name in own} & HOSTS, "only patches know host libraries"
    for name in own:
        parts = name.split(".")
        if parts[0] == "tokred" and len(parts) > 1 and parts[1] in RANK:
            assert RANK[parts[1]] <= RANK[room(file)], f"{shown(file)} imports {name}"
    former = {name for name in own if name.removeprefix("tokred.") in MOVED}
    assert not former, f"{shown(file)} imports by former paths: {former}"


def test_there_are_ten_ranks() -> None:
    assert sorted(set(RANK.values())) == list(range(10))


def test_every_room_has_a_rank() -> None:
    assert {room(file) for file in FILES} == RANK.keys()


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(edges()) is None


def test_no_rooms_import_each_other_in_a_circle() -> None:
    assert circle(rooms()) is None


def test_the_drawing_of_the_house_is_that_of_the_code() -> None:
    assert DRAWING.read_text() == drawing(), "run `python docs/extensions/architecture.py`"


def test_only_discovery_imports_by_computed_names() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.endswith(("import_module", "__import__")) and file.name not in DISCOVERY:
                said = ast.unparse(node.args[0])
                assert "tokred" not in said and "__name__" not in said, f"{shown(file)}: {said}"


@pytest.mark.parametrize("file", PATCHES, ids=lambda f: f.stem)
def test_a_patch_knows_one_library_and_the_doors(file: Path) -> None:
    own = imports(file)
    assert {name.split(".")[0] for name in own} & HOSTS <= {library_of(file.stem)}
    ours = {".".join(name.split(".")[:2]) for name in own if name.startswith("tokred.")}
    assert ours <= {"tokred.host", "tokred.engine"}, "a patch sees Host and the engine's doors"


@pytest.mark.parametrize("file", sorted((ROOT / "patches").glob("*.py")), ids=lambda f: f.stem)
def test_a_patch_uses_what_the_engine_offers_and_imports_no_other_patch(file: Path) -> None:
    import tokred.engine

    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            siblings = [node.module] if node.module else [alias.name for alias in node.names]
            assert all(name.startswith("_") for name in siblings), f"{file.name}: {siblings}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokred.engine"):
            assert node.module == "tokred.engine"
            assert {alias.name for alias in node.names} <= set(tokred.engine.__all__)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("step", "reduction"):
            assert node.attr in DOORS, f"{file.name} uses {ast.unparse(node)}"


DOORS = {
    # of a step
    "attend", "bias", "grid_of", "mask", "reduce", "rotary", "rows", "rows_and_columns", "see",
    "untouched", "wants", "wants_signals", "window",
    # of a reduction
    "handing_out", "layout",
}  # fmt: skip
"""What a patch may use of the engine's objects."""


def test_a_patch_that_cannot_be_loaded_keeps_only_itself_away(tmp_path: Path) -> None:
    import timm

    import tokred
    import tokred.patches

    broken = tmp_path / "timm_broken.py"
    broken.write_text("raise AttributeError('timm has no such class')\n")
    tokred.patches.__path__.append(str(tmp_path))
    try:
        assert "timm_broken" not in hosts() and "timm_vit" in hosts()
        tokred.apply(timm.create_model("vit_tiny_patch16_224", depth=4), "tome", keep_rate=0.5)
        with pytest.raises(tokred.UnsupportedModelError, match="timm_broken cannot be loaded"):
            tokred.apply(timm.create_model("resnet18"), "tome", keep_rate=0.5)
    finally:
        tokred.patches.__path__.remove(str(tmp_path))


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tokred" / "kernels").glob("*.py")), ids=lambda f: f.stem
)
def test_a_kernel_knows_maps_and_other_kernels_alone(file: Path) -> None:
    ours = {name for name in imports(file) if name.split(".")[0] == "tokred"}
    assert all(name.startswith(("tokred.kernels", "tokred.maps")) for name in ours)


def loaded_by(program: str) -> set[str]:
    """The modules that a program loads, in a new process that has torch already."""
    program = (
        "import sys, torch\nbefore = set(sys.modules)\n"
        f"{program}\nprint(*(set(sys.modules) - before), file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(run.stderr.split())


@pytest.mark.parametrize(
    "program", ["import tokred", "from tokred.cli.main import main; main(['list'])"]
)
def test_importing_and_listing_load_neither_hosts_nor_compilers(program: str) -> None:
    loaded = loaded_by(program)
    assert {"tokred", "tokred.reducers.tome", "tokred.reducers.atc"} <= loaded
    assert not {name.split(".")[0] for name in loaded} & {
        *HOSTS, "scipy", "sklearn", "pandas", "matplotlib", "PIL", "safetensors", "tqdm", "numba",
        "triton", "sympy", "accelerate", "datasets", "torchmetrics", "profile", "cProfile",
    }  # fmt: skip
    # Half of the time that importing torch takes, if they are loaded.
    parts = ("torch._dynamo", "torch._inductor", "torch._export", "torch.utils.flop_counter")
    assert not {name for name in loaded if name.startswith(parts)}


def test_what_is_read_of_a_patch_is_what_its_host_says() -> None:
    for name in ("diffusers", "open_clip", "torchvision", "transformers", "timm"):
        pytest.importorskip(name)
    known = hosts()
    assert {name: summary_of(name) for name in patch_names()} == {
        name: host.summary for name, host in known.items()
    }
    assert all(host.summary for host in known.values())


def test_a_patch_is_not_imported_from_the_source_folder() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import patches"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1 and "imported as tokred.patches" in run.stderr


def test_every_folder_of_code_is_in_the_package_list() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    folders = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "tokred").rglob("*.py")}
    for package in {*folders, "tokred.patches"}:
        assert f'"{package}"' in text, f"{package} would be missing from an installation"


@pytest.mark.slow
def test_the_wheel_holds_everything(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(pip, check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    bundled = "tokred/data/bundled/digits"
    for file in ("tokred/patches/timm_vit.py", "tokred/reducers/atc.py", "tokred/py.typed",
                 f"{bundled}.safetensors", f"{bundled}.md"):  # fmt: skip
        assert file in names
