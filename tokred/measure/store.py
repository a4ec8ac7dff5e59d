"""Finished settings on disk, which are not measured again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tokred.data.fingerprint import fingerprint
from tokred.measure.conditions import device_name, versions_of
from tokred.measure.evaluation import Row, row_from
from tokred.measure.settings import Setting
from tokred.measure.work import Work
from tokred.version import __version__


class Store:
    """Finished settings, in a small JSON file each. The name of a file depends on everything that
    the result depends on.

    Args:
        where: the folder; True: the user's cache folder; False: nothing is kept.
        fresh: whether to ignore the files that are there.
        work: measures settings on the model and the images.
    """

    def __init__(self, where: str | Path | bool, fresh: bool, work: Work) -> None:
        self.folder: Path | None = None
        if where is False:
            return
        if where is True:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            where = os.environ.get("TOKRED_CACHE") or Path(home) / "tokred"
        self.folder = Path(where) / "evaluate"
        self.fresh = fresh
        self.about = {
            "model": fingerprint(work.model),
            "data": work.batches.samples.fingerprint(),
            "task": work.answers.task.name if work.answers.task else None,
            "batch": work.batches.size,
            "compared": work.answers.compared,
            "seconds": work.seconds,
            "device": device_name(work.batches.device),
            "dtype": str(work.batches.dtype),
            "threads": torch.get_num_threads(),
            "versions": {
                "tokred": __version__,
                "python": sys.version.split()[0],
                **versions_of(work.model),
            },
        }

    def get(self, setting: Setting | None) -> Row | None:
        """The row of a setting (None: the dense model), if it was measured in the same way."""
        path = self._path(setting)
        if path is None or self.fresh or not path.is_file():
            return None
        try:
            return row_from(json.loads(path.read_text())["row"])
        except (ValueError, KeyError, TypeError):  # the file is not whole, or of another version
            return None

    def put(self, setting: Setting | None, row: Row) -> None:
        """Keeps the row of a setting. No file is ever written in part."""
        path = self._path(setting)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")  # another process may write the same file
        text = {"about": self.about, "row": dataclasses.asdict(row)}
        partial.write_text(json.dumps(text, indent=1))
        partial.replace(path)

    def _path(self, setting: Setting | None) -> Path | None:
        if self.folder is None:
            return None
        key: dict[str, Any] = dict(self.about)
        if setting is not None:
            key["setting"] = [setting.method, repr(setting.reducer), repr(setting.schedule)]
            if setting.gates is not None:
                key["gates"] = hashlib.sha256(Path(setting.gates).read_bytes()).hexdigest()
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:24]}.json"
