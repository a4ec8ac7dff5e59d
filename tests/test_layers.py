"""Who may import whom (docs/architecture.md), and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tokred.host import library_of

ROOT = Path(__file__).parent.parent
HOSTS = {"timm", "transformers", "diffusers", "torchvision", "open_clip"}
RANK = {
    "maps": 0, "schedule": 0, "optional": 0, "gates": 0, "kernels": 0, "moved": 0,
    "reducers": 1,
    "engine": 2, "models": 2,
    "host": 3,
    "patching": 4,
    "data": 5,
    "measure": 6,
    "show": 7,
    "training": 8,
    "cli": 9, "compat": 9, "__init__": 9, "__main__": 9,
}  # fmt: skip
"""Rooms of the house; each imports itself and what is not above it (docs/architecture.md)."""


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def layer(file: Path) -> str:
    return file.relative_to(ROOT / "tokred").parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", sorted((ROOT / "tokred").rglob("*.py")), ids=lambda f: f.stem)
def test_imports_point_one_way(file: Path) -> None:
    own = imports(file)
    assert not {name.split(".")[0] for name in own} & HOSTS, "only patches know host libraries"
    for name in own:
        parts = name.split(".")
        if parts[0] == "tokred" and len(parts) > 1 and parts[1] in RANK:
            allowed = RANK[parts[1]] <= RANK[layer(file)]
            assert allowed, f"{file.name} imports {name}"


@pytest.mark.parametrize("file", sorted((ROOT / "patches").glob("[a-z]*.py")), ids=lambda f: f.stem)
def test_a_patch_knows_one_library_and_the_seam(file: Path) -> None:
    own = imports(file)
    assert {name.split(".")[0] for name in own} & HOSTS <= {library_of(file.stem)}
    ours = {name.split(".")[1] for name in own if name.startswith("tokred.")}
    assert ours <= {"host", "engine", "patches"}
    assert not any(name.startswith("tokred.patches.") and "._" not in name for name in own)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tokred" / "kernels").glob("*.py")), ids=lambda f: f.stem
)
def test_a_kernel_knows_maps_and_other_kernels_alone(file: Path) -> None:
    ours = {name for name in imports(file) if name.split(".")[0] == "tokred"}
    assert all(name.startswith(("tokred.kernels", "tokred.maps")) for name in ours)


def test_every_module_has_a_rank() -> None:
    assert {layer(file) for file in (ROOT / "tokred").rglob("*.py")} == RANK.keys()


def test_importing_tokred_loads_neither_hosts_nor_scipy() -> None:
    program = (
        "import torch, sys\nbefore = set(sys.modules)\nimport tokred\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    assert "tokred" in loaded
    assert not loaded & (HOSTS | {"scipy", "matplotlib", "PIL", "safetensors", "tqdm", "numba"})


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
