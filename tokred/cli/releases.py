"""`tokred bench --suite release`: this release against another one, and the history of all."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tokred.cli.shared import bar
from tokred.data.writing import write_text
from tokred.measure.suites import release

FOLDER, FILE = Path("docs/benchmarks"), "history.json"


def run(options: argparse.Namespace) -> None:
    """Times the cells, prints the history with this release at its end, and writes it if asked."""
    if options.against is None:
        raise ValueError("the suite release needs --against VERSION_OR_FOLDER")
    out: Path | None = options.out
    if options.record and out is None:
        if not FOLDER.is_dir():
            raise ValueError(f"there is no folder {FOLDER} here: use --out FOLDER, not --record")
        out = FOLDER
    rows = release.history((out or FOLDER) / FILE)
    with (
        release.release_in(options.against) as against,
        release.release_in(options.of or str(release.HERE)) as measured,
        bar(0, "rounds") as rounds,
    ):
        row = release.run(
            against,
            measured=measured,
            rounds=options.rounds,
            seconds=options.seconds,
            on_round=lambda done, of: _show(rounds, done, of),
        )
    rows = release.with_row(rows, row)
    print(json.dumps(row, indent=1) if options.json else release.markdown(rows))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / FILE, release.as_text(rows))
        print(f"wrote {out / FILE}", file=sys.stderr)


def _show(rounds: Any, done: int, of: int) -> None:
    rounds.total, rounds.n = of, done
    rounds.refresh()
