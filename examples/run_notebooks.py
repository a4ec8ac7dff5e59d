"""Runs the notebooks in kernels, and stores them with what they show.

    python examples/run_notebooks.py visualise dense

What kernels say on the error stream (warnings of libraries, with the paths of this machine) is left
out, and of a picture that is there as PNG and as JPEG, the JPEG.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all, if not given")
    names = parser.parse_args().names
    for file in [HERE / f"{name}.ipynb" for name in names] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(run(file), file)
        print(f"{file.stem}: {file.stat().st_size / 1000:.0f} kB")


def run(file: Path) -> Any:
    """The notebook as it is after all of its cells have run, in an empty folder."""
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        cell.metadata = {}
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, resources=where, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def kept(outputs: list[Any]) -> list[Any]:
    """Outputs of a cell without the error stream; what it printed bit by bit, in one piece."""
    found: list[Any] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if found and found[-1].output_type == "stream":
                found[-1].text += output.text
                continue
        if "data" in output:
            output.data.pop("image/jpeg", None)
        found.append(output)
    return found


if __name__ == "__main__":
    main()
