"""Every line of Python in the README and the docs runs, and every command exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tokred
from tokred import reducers
from tokred.__main__ import _parser

ROOT = Path(__file__).parent.parent
NAMED_IN_PASSING = ("bench", "fid", "train", "inspect", "show", "cite", "evaluate", "advise",
                    "profile")  # fmt: skip
"""Commands that the text speaks of without what they need."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(reducers._METHODS)
    scope: dict[str, object] = {"__name__": "page"}
    try:
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec", dont_inherit=True), scope)
    finally:
        reducers._METHODS.clear()
        reducers._METHODS.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_commands_exist(page: Path) -> None:
    text = page.read_text()
    commands = [line for block in blocks(page, "sh") for line in block.split("\n")]
    commands += re.findall(r"`(tokred [^`]+)`", text)
    for line in commands:
        for command in re.findall(r"(?:^|&& )tokred ([a-z][^&#]*)", line):
            if command not in NAMED_IN_PASSING:
                _parser().parse_args(command.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_has_every_method_and_public_name() -> None:
    text = (ROOT / "README.md").read_text()
    for name in reducers.names():
        assert f"`{name}`" in text
    for name in tokred.__all__:
        assert getattr(tokred, name).__doc__, f"{name} has no docstring"
