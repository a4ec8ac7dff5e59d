"""Every line of Python in the README and the docs runs, and every command is understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import tokred
from tokred import reducers
from tokred.cli.main import _parser, main

ROOT = Path(__file__).parent.parent
NAMED_IN_PASSING = ("bench", "fid", "train", "inspect", "show", "cite", "evaluate", "advise",
                    "profile")  # fmt: skip
"""Commands that the text speaks of without what they need."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, *sorted((ROOT / "docs" / "api").glob("*.md"))]
CHEAP = (
    "tokred show digits_cluttered --method atc",
    "tokred show digits_cluttered --method svit --what usage",
    "tokred show digits_tcformer",
    "tokred fidelity digits",
)
"""Commands of the pages that run as they stand; `test_cli` has the others, with less to do."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


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


def shell(page: Path) -> list[str]:
    """The commands of a page: lines of its shell blocks, and what stands in the text."""
    text = page.read_text()
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").split("\n")
    starts = r"(?:tokred|python|pip|accelerate|torchrun|sphinx-build)"
    lines += [" ".join(span.split()) for span in re.findall(rf"`({starts} [^`]+)`", text)]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def test_every_block_is_of_a_language_that_is_tested() -> None:
    for page in TEXTS:
        languages = re.findall(r"^ *```(?=\S)(.*)$", page.read_text(), re.MULTILINE)
        for language in languages:  # text is what something printed, or a drawing
            assert language.startswith("{") or language in ("python", "sh", "text"), page.name
        indented = re.findall(r"^ +```(?:python|sh)$", page.read_text(), re.MULTILINE)
        assert not indented, f"{page.name}: a block in a list, which no test would see"


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_the_commands_exist(page: Path) -> None:
    """And take these options. What downloads, trains or measures for minutes is not run."""
    _, part = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")
    extras = re.findall(r"^(\w+) = \[", part.split("\n[")[0], re.MULTILINE)
    for line in shell(page):
        command = re.search(r"(?:^| -m )tokred ([a-z].*)", line)
        script = re.match(r"python (examples/\w+\.py)(.*)", line)
        if command and command[1] not in NAMED_IN_PASSING and "..." not in command[1]:
            _parser().parse_args(shlex.split(command[1], comments=True))
        elif script:
            code = (ROOT / script[1]).read_text()
            for option in re.findall(r"--[\w-]+", script[2]):
                assert f'"{option}"' in code, f"{page.name}: {script[1]} knows no {option}"
        elif line.startswith("pip install") and "natten" not in line:
            named = re.findall(r"[\w-]+", (re.findall(r"\[(.*?)\]", line) or [""])[0])
            assert {*named} <= {*extras}, f"{page.name}: {line}"


@pytest.mark.parametrize("line", CHEAP)
def test_the_cheap_commands_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert any(line in shell(page) for page in TEXTS), f"no page has `{line}`"
    monkeypatch.chdir(tmp_path)
    assert main(line.split()[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_the_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_method_of_ours_is_told_to_readers() -> None:
    """docs/adding-a-method.md promises that this names what is missing."""
    texts = {
        "README.md": "`{name}`",
        "docs/api/methods.md": "autoclass:: tokred.{cls}\n",
    }
    for name in reducers.names():
        cls = type(reducers.make(name)).__name__
        assert cls in tokred.__all__, f"tokred/__init__.py does not export {cls}"
        for file, line in texts.items():
            line = line.format(name=name, cls=cls)
            assert line in (ROOT / file).read_text(), f"{file} lacks {line}"


def test_every_public_name_is_documented() -> None:
    for name in tokred.__all__:
        assert getattr(tokred, name).__doc__, f"{name} has no docstring"
