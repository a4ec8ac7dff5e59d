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
    "maps": 0, "schedule": 0, "optional": 0, "markup": 0, "reading": 0.1,
    "kernels": 0.5, "gates": 0.7,
    "reducers": 1, "inputs": 1, "presets": 1.5, "models": 2, "run": 2, "windows": 2.5, "host": 3,
    "denoising": 3.5, "patching": 4, "tracing": 5, "cost": 5, "fidelity": 5, "citing": 5, "zoo": 5,
    "calibration": 5, "losses": 5.5, "drawing": 6, "fid": 6, "suites": 6, "training": 6,
    "pictures": 5.8, "samples": 5.9, "metrics": 5.85, "evaluation": 6.2, "evaluating": 6.5,
    "profiling": 6, "report": 6.6, "compat": 6.5, "advising": 6.8, "__init__": 7, "__main__": 8,
}  # fmt: skip


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
            allowed = RANK[parts[1]] < RANK[layer(file)] or parts[1] == layer(file)
            assert allowed, f"{file.name} imports {name}"


@pytest.mark.parametrize("file", sorted((ROOT / "patches").glob("[a-z]*.py")), ids=lambda f: f.stem)
def test_a_patch_knows_one_library_and_the_seam(file: Path) -> None:
    own = imports(file)
    assert {name.split(".")[0] for name in own} & HOSTS <= {library_of(file.stem)}
    ours = {name.split(".")[1] for name in own if name.startswith("tokred.")}
    assert ours <= {"host", "run", "windows", "patches"}
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
    for file in ("tokred/patches/timm_vit.py", "tokred/reducers/atc.py", "tokred/py.typed",
                 "tokred/zoo/digits.safetensors", "tokred/zoo/digits.md"):  # fmt: skip
        assert file in names
