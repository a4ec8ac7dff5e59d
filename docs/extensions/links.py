"""Rewrites the links of pages for the site.

In the repository a page links to files beside it. On the site, tables of the benchmarks are
sections of one page, notebooks are pages of their own, and the README is the quick start. Any other
file is a download, which MyST makes by itself.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import benchmarks

_TABLE = re.compile(r"\]\((?:docs/)?benchmarks/([\w./-]+)\.(?:md|json)\)")
_NOTEBOOK = re.compile(r"\]\((?:\.\./)?examples/([\w-]+)\.ipynb\)")
_README = re.compile(r"\]\(\.\./README\.md(#[\w-]+)?\)")
_PAGE_OF_DOCS = re.compile(r"\]\(\.\./docs/([\w./#-]+)\)")


def for_the_site(text: str, page: str = "") -> str:
    """The Markdown of a page, with its links as they are on the site.

    Args:
        text: the Markdown.
        page: the name of the page, such as "dense" or "notebooks/dense".
    """
    up = "../" * (len(PurePosixPath(page).parts) - 1)
    text = _TABLE.sub(lambda found: f"](#{benchmarks.anchor(found[1])})", text)
    text = _NOTEBOOK.sub(lambda found: f"]({up}notebooks/{found[1]}.ipynb)", text)
    text = _README.sub(lambda found: f"]({up}quick-start.md{found[1] or ''})", text)
    return _PAGE_OF_DOCS.sub(lambda found: f"]({up}{found[1]})", text)


def _read(app: Any, page: str, source: list[str]) -> None:
    source[0] = for_the_site(source[0], page)


def _included(app: Any, path: Any, page: str, source: list[str]) -> None:
    source[0] = for_the_site(source[0], page)


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", _read)
    app.connect("include-read", _included)
    return {"parallel_read_safe": True}
