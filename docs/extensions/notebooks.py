"""The notebooks of `examples` as pages of the site.

Sphinx takes pages from its own folder only, so each build copies the notebooks to `docs/notebooks`,
which git ignores, and rewrites their links.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import links

FOLDER = "notebooks"


def copy(examples: Path, docs: Path) -> list[Path]:
    """Writes the notebooks that have changed to `docs/notebooks`; returns all files there."""
    folder = docs / FOLDER
    folder.mkdir(exist_ok=True)
    written = []
    for notebook in sorted(examples.glob("*.ipynb")):
        stored = json.loads(notebook.read_text())
        for cell in stored["cells"]:
            if cell["cell_type"] == "markdown":
                text = "".join(cell["source"])
                cell["source"] = links.for_the_site(text, f"{FOLDER}/{notebook.stem}")
        text, target = json.dumps(stored), folder / notebook.name
        if not target.exists() or target.read_text() != text:  # else Sphinx would read it again
            target.write_text(text)
        written.append(target)
    for left_over in {*folder.glob("*.ipynb")} - {*written}:
        left_over.unlink()
    return written


def setup(app: Any) -> dict[str, Any]:
    docs = Path(app.srcdir)
    copy(docs.parent / "examples", docs)
    return {"parallel_read_safe": True}
