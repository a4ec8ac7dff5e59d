"""Finished settings on disk, which are not measured again."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tokred.data.code import OURS, sources
from tokred.data.digest import NoFingerprintError, content_of, digest_of, told
from tokred.data.writing import write_text
from tokred.measure.conditions import device_name, switches, versions_of
from tokred.measure.evaluation import Row, row_from
from tokred.measure.settings import Setting
from tokred.measure.work import Work
from tokred.version import __version__


def folder_of(where: str | Path | bool) -> Path | None:
    """The folder in which finished settings are kept; None if they are not.

    Args:
        where: see `tokred.evaluate`.
    """
    if where is False:
        return None
    if where is True:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        where = os.environ.get("TOKRED_CACHE") or Path(home) / "tokred"
    return Path(where) / "evaluate"


class Store:
    """Finished settings, in a small JSON file each. The name of a file depends on everything that
    the result depends on. If something of it cannot be told from others of its kind, nothing is
    kept, and a warning names it.

    Args:
        folder: where they are kept; None: nowhere.
        fresh: whether to ignore the files that are there.
        work: measures settings on the model and the images.
        data: the fingerprint of the images.
    """

    def __init__(self, folder: Path | None, fresh: bool, work: Work, data: str) -> None:
        self.folder, self.fresh = folder, fresh
        self._paths: dict[int, Path | None] = {}
        if folder is None:
            return
        try:
            self.about = about(work, data)
        except NoFingerprintError as error:
            self._give_up("", error)
            self.folder = None

    def get(self, setting: Setting | None) -> Row | None:
        """The row of a setting (None: the dense model), if it was measured in the same way."""
        path = self.path(setting)
        if path is None or self.fresh or not path.is_file():
            return None
        try:
            return row_from(json.loads(path.read_text())["row"])
        except (ValueError, KeyError, TypeError, AttributeError):
            warnings.warn(f"{path} is broken: its setting is measured again", stacklevel=2)
            return None

    def put(self, setting: Setting | None, row: Row) -> None:
        """Keeps the row of a setting. No file is ever written in part."""
        path = self.path(setting)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        text = {"about": self.about, "row": dataclasses.asdict(row)}
        write_text(path, json.dumps(text, indent=1))

    def path(self, setting: Setting | None) -> Path | None:
        """The file of a setting, as it was when it was first asked for: methods may change while
        they are measured."""
        if self.folder is None:
            return None
        if id(setting) not in self._paths:
            try:
                key = digest_of(self.about, None if setting is None else about_setting(setting))
                self._paths[id(setting)] = self.folder / f"{key[:24]}.json"
            except NoFingerprintError as error:
                self._paths[id(setting)] = None
                assert setting is not None
                self._give_up(f" of {setting.name}", error)
        return self._paths[id(setting)]

    def _give_up(self, what: str, error: NoFingerprintError) -> None:
        warnings.warn(f"no results{what} are kept for another time: {error}", stacklevel=2)


def about(work: Work, data: str) -> dict[str, Any]:
    """All that results depend on, besides the setting.

    Args:
        work: measures settings on the model and the images.
        data: the fingerprint of the images.

    Raises:
        NoFingerprintError: something cannot be told from others of its kind.
    """
    model, libraries = told({"model": work.model, "patch": work.patch})
    return {
        "model": model,
        "data": data,
        "task": work.answers.task.name if work.answers.task else None,
        "batch": work.batches.size,
        "compared": work.answers.compared,
        "seconds": work.seconds,
        "device": device_name(work.batches.device),
        "dtype": str(work.batches.dtype),
        "threads": torch.get_num_threads(),
        "switches": switches(),
        "versions": {
            **libraries,
            OURS: f"{__version__}{sources()}",
            "python": sys.version.split()[0],
            **versions_of(work.model),
        },
    }


def about_setting(setting: Setting) -> tuple[Any, ...]:
    """All that the results of a setting depend on, besides what `about` says: also the weights of
    its gates, wherever they are, and the code of a method of one's own.

    Raises:
        NoFingerprintError: something cannot be told from others of its kind.
    """
    gates = setting.gates
    weights = None if gates is None else content_of(gates)
    named = (re.sub(r" at 0x[0-9a-f]+", "", name) for name in (setting.method, setting.code))
    parts = {"method": setting.reducer, "schedule": setting.schedule}
    return (*named, weights, *told(parts))
