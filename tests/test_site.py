"""The documentation as a site: what can be told without building it, which `.ci/run` does.

That is: every page is in the table of contents, every public name in the API reference; and what
stands in tables is what was measured.
"""

from __future__ import annotations

import ast
import importlib
import json
import random
import re
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

import tokred
from tokred.measure.suites import gates

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MEASURED = sorted(
    file for file in (DOCS / "benchmarks").rglob("*.json") if file.name != "history.json"
)
PLAIN = ("tome.match", "tome2d.match", "atc.cluster", "dpc_knn.cluster", "kmedoids.cluster",
         "slic.cluster", "slic.reconstruct")  # fmt: skip


def listed(index: Path) -> set[str]:
    """The pages in the tables of contents of a page."""
    pages: list[str] = []
    for block in re.findall(r"^```\{toctree\}\n(.*?)^```", index.read_text(), re.M | re.S):
        pages += [line for line in block.split("\n") if line and not line.startswith(":")]
    assert len(set(pages)) == len(pages), f"listed twice: {pages}"
    return set(pages)


def directives() -> dict[str, str]:
    """Every name of the API reference, and the kind of its entry."""
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    entries = re.findall(r"^\.\. ([\w:]+):: ([\w.]+)", text, re.M)
    names = [name for _, name in entries]
    assert len(set(names)) == len(names), f"twice: {sorted(n for n in names if names.count(n) > 1)}"
    return {name: kind for kind, name in entries}


def test_every_page_is_in_the_table_of_contents() -> None:
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"} | {"api/index"}
    pages |= {f"notebooks/{file.stem}" for file in (ROOT / "examples").glob("*.ipynb")}
    there = listed(DOCS / "index.md")
    assert pages <= there, f"{pages - there} are in no toctree of docs/index.md"
    assert there <= pages, f"{there - pages} are listed, and not there"
    entries = {page.stem for page in (DOCS / "api").glob("*.md")} - {"index"}
    assert entries == listed(DOCS / "api" / "index.md")


def test_the_reference_has_every_public_name() -> None:
    there = directives()
    public = {f"tokred.{name}" for name in tokred.__all__} - {"tokred.zoo"}
    plain = {f"tokred.reducers.{name}" for name in PLAIN}
    assert public <= there.keys(), f"{public - there.keys()} must be put into docs/api"
    assert plain <= there.keys()
    assert {f"tokred.zoo.{name}" for name in ("load", "held_out", "gates")} <= there.keys()


def found(name: str) -> Any:
    """What a full name names: a module, or what is in one. (`tokred.fidelity` is the function, not
    the former module.)"""
    parent, _, last = name.rpartition(".")
    if parent and hasattr(found(parent), last):
        return getattr(found(parent), last)
    return importlib.import_module(name)


def used(code: str) -> set[str]:
    """The full names of what a piece of code takes from tokred."""
    tree, modules, names = ast.parse(code), {"tokred": "tokred"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokred":
            for each in node.names:
                full = f"{node.module}.{each.name}"
                modules[each.asname or each.name] = full
                names.add(full)
        elif isinstance(node, ast.Import):
            modules |= {each.asname: each.name for each in node.names if each.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id, "")
            if module.startswith("tokred") and isinstance(found(module), ModuleType):
                names.add(f"{module}.{node.attr}")
    return names


def test_the_reference_has_every_name_that_examples_use() -> None:
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    code = {page.name: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
            for page in pages}  # fmt: skip
    for file in (ROOT / "examples").glob("*.ipynb"):
        cells = json.loads(file.read_text())["cells"]
        code[file.name] = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    there = {id(found(name)) for name in directives()}
    for where, blocks in code.items():
        # In one piece: a block goes on from where the one before it has stopped.
        for name in used("\n".join(blocks)):
            thing = found(name)
            known = isinstance(thing, ModuleType) or id(thing) in there
            assert known, f"{where} uses {name}, which must be put into docs/api"


def test_what_the_reference_names_exists_and_says_what_it_is() -> None:
    for name in directives():
        assert found(name).__doc__, name


def test_docstrings_keep_their_sentences_and_get_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    docstrings = importlib.import_module("docstrings")
    lines = ["Reduces.", ":returns: a `Reduction`", "   or none.", ":rtype: What it did", ""]
    made = ["Reduces.", ":returns: What it did: a `Reduction`", "   or none.", ""]
    assert docstrings.sentences(lines) == made
    lines = ["the share of each gate.", "", ":type: Of a learned method"]
    assert docstrings.sentences(lines) == ["Of a learned method: the share of each gate.", ""]
    # `cluster` is another function in each module; `tokens` is a parameter, and nothing to link to.
    (line,) = docstrings.linked(["see `cluster` and `tokens`"], tokred.ATC)
    assert line == "see :py:obj:`cluster <tokred.reducers.atc.cluster>` and `tokens`"
    (line,) = docstrings.linked(["see `cluster`"], tokred.KMedoids)
    assert line == "see :py:obj:`cluster <tokred.reducers.kmedoids.cluster>`"


@pytest.mark.parametrize("file", MEASURED, ids=lambda f: str(f.relative_to(DOCS).with_suffix("")))
def test_tables_are_what_the_suite_makes_of_the_figures(file: Path) -> None:
    suite = importlib.import_module(f"tokred.measure.suites.{file.stem.split('-')[0]}")
    made = suite.markdown(json.loads(file.read_text()))
    assert file.with_suffix(".md").read_text().rstrip("\n") == made.rstrip("\n")


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table with this head, on a page of the docs or the README."""
    lines = (ROOT / page).read_text().split("\n")
    begin = lines.index(head) + 2
    end = next(n for n in range(begin, len(lines)) if not lines[n].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin:end]]


def cells(*names: str) -> dict[tuple[str, int, int, str, str], tuple[dict[str, Any], int]]:
    """What the suite `vit` has measured at keep rate .5: by model, pixels, batch, dtype and method,
    the cell and the number of rounds."""
    measured = {}
    for name in names:
        results = json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())
        for group in results["groups"]:
            model = group["model"].removesuffix("_patch16_224")
            where = (model, group["image_size"], group["batch"], results["dtype"])
            for cell in group["cells"]:
                if cell["keep_rate"] == 0.5:
                    measured[(*where, cell["method"])] = (cell, group["rounds"])
    return measured


def short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def test_the_extracts_of_the_benchmarks_are_what_was_measured() -> None:
    others = "batch-1/vit-cpu-float32", "batch-32/vit-cpu-float32"
    measured = cells("vit-cpu-float32", "vit-cpu-bfloat16", *others)
    told = rows("docs/benchmarks.md", "| model | pixels | dtype | rounds | `tome` | `atc` |")
    for model, pixels, dtype, rounds, *shares in told:
        for method, share in zip(("tome", "atc"), shares, strict=True):
            cell, run = measured[model, int(pixels), 8, dtype, method]
            assert (share, int(rounds)) == (short(cell["efficiency"]), run)
    told = rows("docs/benchmarks.md", "| model | batch | rounds | free limit | `tome` | `atc` |")
    for model, batch, rounds, limit, *speeds in told:
        for method, speed in zip(("tome", "atc"), speeds, strict=True):
            cell, run = measured[model, 224, int(batch), "float32", method]
            assert (limit, int(rounds)) == (short(cell["free_limit"]), run)
            assert speed == f"{short(cell['speed_up'])} ({short(cell['efficiency'])})"


def test_the_readme_has_the_speeds_that_were_measured() -> None:
    measured = cells("all-methods/keep-half/vit-cpu-float32")
    head = "| keep rate .5 | accuracy, `digits_cluttered` | speed-up, DeiT-S | of the free limit |"
    _, *methods = rows("README.md", head)
    assert len(methods) == len(measured)
    for name, _, speed_up, share in methods:
        cell, _ = measured["deit_small", 224, 8, "float32", name.strip("`")]
        assert (speed_up, share) == (short(cell["speed_up"]), short(cell["efficiency"]))


def test_the_table_of_decisions_has_figures_of_the_pages_that_it_links_to() -> None:
    head = "| you want | take | measured |"
    for want, _, measured in rows("docs/choosing-a-method.md", head):
        links = re.findall(r"\]\(([\w./-]+)\)", measured)
        linked = " ".join((DOCS / link).read_text() for link in links)
        linked = re.sub(r"\b0\.", ".", linked)
        figures = re.findall(r"(?<![\w.-])\d*\.\d+", re.sub(r"\]\(.*?\)", "]", measured))
        assert links and figures, want
        for figure in figures:
            if figure not in (".5", ".25"):  # keep rates
                pattern = rf"(?<![\w.]){re.escape(figure)}(?!\d)"
                assert re.search(pattern, linked), f"{figure} is not on {links}"


def test_the_table_of_tcformer_is_what_was_measured() -> None:
    file = DOCS / "benchmarks" / "tcformer-cpu-float32.md"
    made = [line for line in file.read_text().split("\n") if line.startswith("|")]
    assert "\n".join(made) in (DOCS / "tcformer.md").read_text()


def test_the_table_of_gates_is_what_was_measured() -> None:
    results = json.loads((DOCS / "benchmarks" / "gates-cpu-float32.json").read_text())
    head = "| model | batch | SViT | padded | free limit | of it | over padded |"
    told = rows("docs/gates.md", head)
    assert len(told) == len(results["groups"])
    for (_, batch, *shown), group in zip(told, results["groups"], strict=True):
        took = {side: statistics.median(seconds) for side, seconds in group["seconds"].items()}
        dense, ours, padded, limit = (
            took[side] for side in (gates.DENSE, gates.OURS, gates.PADDED, gates.LIMIT)
        )
        expected = [dense / ours, dense / padded, dense / limit, limit / ours, padded / ours]
        assert int(batch) == group["batch"]
        assert shown == [short(value) for value in expected]


def test_links_lead_on_the_site_where_they_lead_in_the_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    links = importlib.import_module("links")
    page = "[a](dense.md) [b](../examples/dense.ipynb) [c](benchmarks/batch-1/vit-cpu-float32.md)"
    made = links.for_the_site(page, "benchmarks")
    assert made == "[a](dense.md) [b](notebooks/dense.ipynb) [c](#tables-batch-1-vit-cpu-float32)"
    notebook = links.for_the_site("[a](../docs/dense.md#methods)", "notebooks/dense")
    assert notebook == "[a](../dense.md#methods)"


def test_plots_have_a_mark_for_everything_that_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    benchmarks = importlib.import_module("benchmarks")
    for name in benchmarks.names():
        assert benchmarks.head(name) and benchmarks.conditions(benchmarks.results(name))
        drawn = re.findall(r"<svg.*?</svg>", benchmarks.drawn(name))
        if benchmarks.suite_of(name) != "vit":
            assert not drawn
            continue
        measured = [cell for g in benchmarks.results(name)["groups"] for cell in g["cells"]]
        *speed_ups, shares = [ElementTree.fromstring(svg) for svg in drawn]
        assert len(shares.findall(".//title")) == len(measured)
        marks = sum(len(plot.findall(".//title")) for plot in speed_ups)  # one plot for each group
        assert marks == (len(measured) if speed_ups else 0)
        rates = {cell["keep_rate"] for cell in measured}
        assert bool(speed_ups) == (len(rates) > 1)


def jittered(value: Any, draw: random.Random, key: str = "") -> Any:
    """The same results with other figures."""
    if isinstance(value, dict):
        return {name: jittered(each, draw, name) for name, each in value.items()}
    if isinstance(value, list):
        return [jittered(each, draw, key) for each in value]
    return value * draw.uniform(1, 2) if isinstance(value, float) and key != "keep_rate" else value


def test_the_page_of_tables_follows_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    benchmarks = importlib.import_module("benchmarks")
    for name in benchmarks.names():
        before, results = benchmarks.section(name), benchmarks.results(name)
        results = jittered(results, random.Random(0))
        if benchmarks.suite_of(name) == "vit":
            results["groups"][0]["cells"][0]["speed_up"] = 9.87
        file = tmp_path / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results))
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(benchmarks, "FOLDER", tmp_path)
            after = benchmarks.section(name)
        assert after != before, name
        assert ("9.87 (" in after) == (benchmarks.suite_of(name) == "vit")
