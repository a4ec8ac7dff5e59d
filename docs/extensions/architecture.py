"""The house that tokred lives in: its rooms, who imports whom, and a drawing of it.

python docs/extensions/architecture.py      # writes docs/architecture.svg from the code's imports
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DRAWING = ROOT / "docs" / "architecture.svg"
RANK = {
    "maps": 0, "schedule": 0, "optional": 0, "gates": 0, "grids": 0, "kernels": 0, "moved": 0,
    "graphs": 0,
    "version": 0,
    "reducers": 1, "reconstruction": 1,
    "engine": 2, "models": 2,
    "host": 3,
    "patching": 4,
    "data": 5,
    "measure": 6,
    "show": 7,
    "training": 8,
    "cli": 9, "compat": 9, "__init__": 9, "__main__": 9,
}  # fmt: skip
"""Rooms of the house. A room imports itself, and rooms of no higher rank."""
WHAT = {
    "maps": "what became of tokens",
    "schedule": "how many tokens stay",
    "optional": "optional libraries",
    "gates": "weights of gates",
    "grids": "cells and superpixels",
    "kernels": "clustering, matching",
    "moved": "former import paths",
    "graphs": "compiled or exported?",
    "version": "the version number",
    "reducers": "one method per file",
    "reconstruction": "back to the full grid",
    "engine": "a pass with fewer tokens",
    "models": "native models",
    "host": "what a patch says of a model",
    "patching": "apply, remove",
    "data": "images, checkpoints",
    "measure": "cost, accuracy, traces",
    "show": "pictures, plots, reports",
    "training": "losses, recipe, loop",
    "cli": "one command per file",
    "compat": "code written for others",
    "patches": "one host family per file",
}


def files() -> list[Path]:
    """All files of the package `tokred`; not those of `patches`, which are installed inside."""
    found = (ROOT / "tokred").rglob("*.py")
    return sorted(file for file in found if file.relative_to(ROOT).parts[1] != "patches")


def room(file: Path) -> str:
    """The room that a file is in."""
    return file.relative_to(ROOT).parts[1].removesuffix(".py")


def name_of(file: Path) -> str:
    """The name under which a file is imported."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, inside: bool = True) -> set[str]:
    """Full names of what a file imports; without `inside`, of what it imports when it is loaded."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())) if inside else loaded(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def loaded(file: Path) -> Iterator[ast.stmt]:
    """The statements that run when a file is loaded, without those for type checkers."""
    left: list[ast.stmt] = list(ast.parse(file.read_text()).body)
    while left:
        node = left.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody"):
                left += getattr(node, name, [])


def edges(inside: bool = False) -> dict[str, set[str]]:
    """Which file of tokred imports which, when it is loaded (with `inside`: at any time)."""
    names = {name_of(file) for file in files()}
    found: dict[str, set[str]] = {}
    for file in files():
        own = (imports(file, inside) & names) - {name_of(file)}
        # `from package import file` means the file.
        meant = {name for name in own if not any(other.startswith(f"{name}.") for other in own)}
        found[name_of(file)] = meant
    return found


def rooms() -> dict[str, set[str]]:
    """Which room imports which others, at any time."""
    found: dict[str, set[str]] = {}
    for file, others in edges(inside=True).items():
        here, *there = (f"{name}.__init__".split(".")[1] for name in (file, *others))
        found.setdefault(here, set()).update({*there} - {here})
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """One circle of a graph; None if there is none."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str] | None:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return None
        for other in sorted(graph.get(node, ())):
            found = walk(other, [*trail, node])
            if found:
                return found
        done.add(node)
        return None

    return next(filter(None, (walk(node, []) for node in sorted(graph))), None)


def shortest(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The arrows of a graph without those that follow from others (its transitive reduction)."""

    def reached(node: str) -> set[str]:
        found: set[str] = set()
        for other in graph.get(node, ()):
            found |= {other} | reached(other)
        return found

    return {
        node: {
            other
            for other in others
            if not any(other in reached(between) for between in others - {other})
        }
        for node, others in graph.items()
    }


# The drawing

WIDTH, HEIGHT, ACROSS, DOWN = 168, 46, 20, 34


def drawing() -> str:
    """The house as SVG: a floor per rank, the lowest at the bottom, and arrows to what a room
    imports, without those that follow from others."""
    graph = {name: {*others} for name, others in rooms().items() if not name.startswith("__")}
    graph["patches"] = {"host", "engine"}
    rank = {**RANK, "patches": RANK["host"]}
    floors = [
        sorted(name for name in graph if rank[name] == number)
        for number in sorted({*rank.values()})
    ]
    floors = [floor for floor in floors if floor]
    wide = max(len(floor) for floor in floors) * (WIDTH + ACROSS) + 5 * ACROSS
    tall = len(floors) * (HEIGHT + DOWN) + DOWN
    places: dict[str, tuple[float, float]] = {}
    for number, floor in enumerate(floors):
        left = (wide - len(floor) * (WIDTH + ACROSS) + ACROSS) / 2
        for column, name in enumerate(floor):
            top = tall - (number + 1) * (HEIGHT + DOWN)
            places[name] = left + column * (WIDTH + ACROSS), top
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {tall:g}" '
        f'width="{wide:g}" height="{tall:g}" font-family="sans-serif" role="img" '
        'aria-label="Rooms of tokred and which imports which">',
        '<defs><marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto">'
        '<path d="M0,0 L6,3 L0,6 z" fill="#7a8699"/></marker></defs>',
        f'<rect width="{wide:g}" height="{tall:g}" fill="#ffffff"/>',
    ]
    for name, others in sorted(shortest(graph).items()):
        lines += [_arrow(places[name], places[other], wide / 2) for other in sorted(others)]
    lines += [_box(name, places[name]) for name in sorted(places)]
    return "\n".join([*lines, "</svg>", ""])


def _arrow(start: tuple[float, float], end: tuple[float, float], middle: float) -> str:
    """An arrow from a box to another: down to the next floor, along the floor, or, where it passes
    floors, around the boxes at the side that the other is nearer to."""
    x, y = start[0] + WIDTH / 2, start[1] + HEIGHT
    to_x, to_y = end[0] + WIDTH / 2, end[1] - 1
    bend = (y + to_y) / 2
    path = f"M{x:g},{y:g} C{x:g},{bend:g} {to_x:g},{bend:g} {to_x:g},{to_y:g}"
    if start[1] == end[1]:
        right = end[0] > start[0]
        x, to_x = (start[0] + WIDTH, end[0]) if right else (start[0], end[0] + WIDTH)
        path = f"M{x:g},{y - HEIGHT / 2:g} L{to_x:g},{to_y + 1 + HEIGHT / 2:g}"
    elif to_y - y > 2 * DOWN:
        right = start[0] + end[0] + WIDTH >= 2 * middle
        edge, out = (WIDTH, 60) if right else (0, -60)
        x, to_x = start[0] + edge, end[0] + edge
        y, to_y = y - HEIGHT / 2, to_y + 1 + HEIGHT / 2
        far = max(x, to_x) + out if right else min(x, to_x) + out
        path = f"M{x:g},{y:g} C{far:g},{y:g} {far:g},{to_y:g} {to_x:g},{to_y:g}"
    return (
        f'<path d="{path}" fill="none" stroke="#7a8699" stroke-width="1.2" marker-end="url(#tip)"/>'
    )


def _box(name: str, place: tuple[float, float]) -> str:
    x, y = place
    folder = (ROOT / "tokred" / name).is_dir() or name == "patches"
    fill = "#e8f0fe" if folder else "#f5f5f5"
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" '
        'stroke="#44546a"/>'
        f'<text x="{x + WIDTH / 2:g}" y="{y + 19:g}" text-anchor="middle" font-size="13" '
        f'font-weight="bold" fill="#1b2430">{escape(name)}{"/" if folder else ".py"}</text>'
        f'<text x="{x + WIDTH / 2:g}" y="{y + 36:g}" text-anchor="middle" font-size="9.5" '
        f'fill="#44546a">{escape(WHAT[name])}</text>'
    )


if __name__ == "__main__":
    DRAWING.write_text(drawing())
    print(f"{DRAWING.relative_to(ROOT)} drawn")
