"""Tables and plots of the benchmarks, made from the JSON that `tokred bench --suite` has written.

A page has the comment `<!-- benchmarks: all -->` where all tables and plots belong, and `<!--
benchmarks: NAME -->` where the plots of one file belong. NAME is the path of the file below
`docs/benchmarks`, without the suffix. In the repository these stay comments, and one reads the
files themselves.
"""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import plots

FOLDER = Path(__file__).parents[1] / "benchmarks"
_MARK = re.compile(r"^<!-- benchmarks: ([\w./-]+) -->$", re.MULTILINE)
_SAID_ABOVE = re.compile(r"# |\d+ threads, Python ")
_HEADS = {
    "vit": "Vision transformers",
    "gates": "Gates",
    "tcformer": "TCFormer",
    "clustering": "Clustering alone",
    "dense": "Dense prediction",
    "diffusion": "Diffusion",
    "overhead": "Bookkeeping",
}
_FOLDERS = {
    "": "",
    "batch-1": ", one image at a time",
    "batch-32": ", batches of 32",
    "all-methods/keep-half": ", all methods at keep rate .5",
}


def names() -> list[str]:
    """The names of all files, in the order in which the page has them."""
    found = [
        str(file.relative_to(FOLDER).with_suffix("").as_posix())
        for file in FOLDER.rglob("*.json")
        if file.name != "history.json"  # of all releases: `tokred bench --suite release` prints it
    ]
    suites = list(_HEADS)
    return sorted(found, key=lambda name: (suites.index(suite_of(name)), "all" not in name, name))


def suite_of(name: str) -> str:
    """The suite that has written a file."""
    return name.split("/")[-1].split("-")[0]


def results(name: str) -> dict[str, Any]:
    """The results of a suite."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def table(name: str) -> str:
    """The Markdown that the suite makes out of its results; the same stands beside the JSON."""
    made: str = import_module(f"tokred.measure.suites.{suite_of(name)}").markdown(results(name))
    return made.rstrip("\n") + "\n"


def anchor(name: str) -> str:
    """The anchor of the section of a file."""
    return "tables-" + re.sub(r"[^a-z0-9]+", "-", name.lower())


def head(name: str) -> str:
    """The title of the section of a file."""
    folder, _, stem = f"/{name}".rpartition("/")
    device, dtype = stem.split("-", 2)[1:]
    return f"{_HEADS[suite_of(name)]}{_FOLDERS[folder.strip('/')]}: {device.upper()}, {dtype}"


def section(name: str) -> str:
    """Head, conditions, plots and tables of one file, as Markdown."""
    tables = compact(results(name)) if suite_of(name) == "vit" else ""
    if not tables:  # the suite's own tables, without its head, which stands above
        told = [line for line in table(name).splitlines() if not _SAID_ABOVE.match(line)]
        tables = re.sub("^## ", "### ", "\n".join(told), flags=re.MULTILINE)
    return "\n".join(
        [
            f"({anchor(name)})=",
            f"## {head(name)}",
            "",
            conditions(results(name)),
            "",
            drawn(name),
            tables,
            "",
        ]
    )


def compact(found: dict[str, Any]) -> str:
    """One table of the suite `vit` with a row for each group, if there is only one keep rate;
    otherwise empty."""
    groups = [group for group in found["groups"] if group["cells"]]
    rates = {cell["keep_rate"] for group in groups for cell in group["cells"]}
    if len(rates) > 1 or len(groups) == 1:
        return ""
    # Version 1 did not know of bookkeeping.
    books = "of it bookkeeping | " if found["format"] > 1 else ""
    methods = list(dict.fromkeys(cell["method"] for group in groups for cell in group["cells"]))
    lines = [
        f"Keep rate {rates.pop():g}:",
        "",
        f"| model | dense, ms | rounds | free limit | {books}{' | '.join(methods)} |",
        f"|---|---|---|---|{'---|' * (len(methods) + bool(books))}",
    ]
    for group in groups:
        cells = {cell["method"]: cell for cell in group["cells"]}
        share = group["cells"][0].get("bookkeeping")
        told = [
            f"{group['model'].removesuffix('_patch16_224')}, {group['image_size']} px, "
            f"batch {group['batch']}",
            f"{group['milliseconds']:.0f}",
            str(group["rounds"]),
            f"{group['cells'][0]['free_limit']:.2f}",
            *(["not known" if share is None else f"{share:.2f}"] if books else []),
            *(
                f"{cells[method]['speed_up']:.2f} ({cells[method]['efficiency']:.2f})"
                for method in methods
            ),
        ]
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def conditions(found: dict[str, Any]) -> str:
    """One line that tells what the results were measured on."""
    device = found["device"]
    told = [device, found["dtype"], f"{found['threads']} threads"]
    if "compiled" in found:
        told.append("compiled" if found["compiled"] else "eager")
    rounds = _rounds(found)
    told.append(f"{rounds[0]} to {rounds[-1]} rounds" if len(rounds) > 1 else f"{rounds[0]} rounds")
    if "python" in found:
        told.append(f"Python {found['python']}")
    told += [f"{name} {version}" for name, version in found.get("versions", {}).items()]
    return f"*Measured on: {', '.join(told)}.*"


def _rounds(found: dict[str, Any]) -> list[int]:
    if "rounds" in found:
        return [found["rounds"]]
    measured = found.get("groups") or found["results"]
    each = {
        row["rounds"]
        if "rounds" in row
        else min(len(seconds) for seconds in row["seconds"].values())
        for row in measured
    }
    return sorted(each - {0})


def drawn(name: str) -> str:
    """The plots of a file, as HTML in Markdown; empty for suites that have tables only."""
    if suite_of(name) != "vit":
        return ""
    found = results(name)
    groups = [group for group in found["groups"] if group["cells"]]
    figures = []
    for group in groups:
        if len({cell["keep_rate"] for cell in group["cells"]}) > 1:
            figures.append(_captioned([group], _speed_ups(group)))
    figures.append(_captioned(groups, _shares(groups)))
    return "```{raw} html\n" + "\n".join(figures) + "\n```\n"


def _captioned(groups: list[dict[str, Any]], figure: str) -> str:
    """A plot below a caption that tells what all groups have in common."""
    first = groups[0]
    told = [first["model"].removesuffix("_patch16_224")] if len(groups) == 1 else []
    for each, text in (("image_size", "{} px"), ("batch", "batch {}")):
        if len({group[each] for group in groups}) == 1:
            told.append(text.format(first[each]))
    rates = {cell["keep_rate"] for group in groups for cell in group["cells"]}
    if len(rates) == 1:
        told.append(f"keep rate {rates.pop():g}")
    return f'<p class="caption">{", ".join(told)}</p>{figure}'


def _label(group: dict[str, Any], groups: list[dict[str, Any]]) -> str:
    """The name of a group's model, with what distinguishes it from other groups of the file."""
    told = [group["model"].removesuffix("_patch16_224")]
    if len({each["image_size"] for each in groups}) > 1:
        told.append(f"{group['image_size']} px")
    if len({each["batch"] for each in groups}) > 1:
        told.append(f"batch {group['batch']}")
    return ", ".join(told)


def _speed_ups(group: dict[str, Any]) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    limit: dict[float, float] = {}
    for cell in sorted(group["cells"], key=lambda cell: cell["keep_rate"]):
        series.setdefault(cell["method"], []).append((cell["keep_rate"], cell["speed_up"]))
        limit.setdefault(cell["keep_rate"], cell["free_limit"])
    ordered = {name: series[name] for name in dict.fromkeys(c["method"] for c in group["cells"])}
    return plots.lines(ordered, "keep rate", "speed-up", ("free limit", sorted(limit.items())))


def _shares(groups: list[dict[str, Any]]) -> str:
    """The shares of the free limit. With one group: a row for each method, a mark for each keep
    rate. With several: a row for each group, a mark for each method."""
    values: dict[str, list[tuple[str, float]]] = {}
    for group in groups:
        for cell in group["cells"]:
            rate, method = f"keep {cell['keep_rate']:g}", cell["method"]
            row, kind = (method, rate) if len(groups) == 1 else (_label(group, groups), method)
            values.setdefault(row, []).append((kind, cell["efficiency"]))
    return plots.rows(values, "share of the free limit", line=1.0, low=0.75)


def _fill(app: Any, page: str, source: list[str]) -> None:
    def made(found: re.Match[str]) -> str:
        shown = names() if found[1] == "all" else [found[1]]
        for name in shown:  # so that the page is made again when a file changes
            app.env.note_dependency(str(FOLDER / f"{name}.json"))
        return "\n".join(map(section if found[1] == "all" else drawn, shown))

    source[0] = _MARK.sub(made, source[0])


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "env_version": 1}
