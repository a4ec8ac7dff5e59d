"""Import paths of former versions, which go on working.

Up to version 0.7 all modules stood side by side in this folder: `tokred.zoo` is `tokred.data.zoo`
now. `MOVED` says where the names of each former module are. Importing a former module gives a
stand-in that takes every name from there, when it is asked for. So code that imports it, and models
that were pickled with it, still find what they need.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "advising": (
        "measure.advise.advising",
        "measure.advise.values",
        "measure.advise.search",
        "measure.advise.schedules",
        "measure.advise.costs",
        "measure.advise.harm",
        "measure.advise.families",
    ),
    "calibration": ("measure.calibration",),
    "citing": ("patching.citing",),
    "cost": (
        "measure.cost",
        "measure.race",
        "measure.limit",
        "measure.counting",
        "measure.conditions",
        "measure.subject",
    ),
    "denoising": ("engine.denoising", "patching.denoisers", "compat.former"),
    "drawing": ("show.drawing",),
    "evaluating": (
        "measure.evaluate",
        "measure.settings",
        "measure.work",
        "measure.batches",
        "measure.answers",
        "measure.store",
        "measure.progress",
        "measure.race",
        "data.processes",
        "data.fingerprint",
    ),
    "evaluation": ("measure.evaluation",),
    "fid": ("measure.fid",),
    "fidelity": ("measure.fidelity",),
    "inputs": ("data.inputs",),
    "losses": ("training.losses",),
    "markup": ("show.markup", "show.charts"),
    "metrics": ("measure.metrics",),
    "pictures": ("data.pictures", "data.transforms"),
    "presets": ("patching.presets",),
    "profiling": (
        "measure.profile.values",
        "measure.profile.measuring",
        "measure.profile.clock",
        "show.profiles",
    ),
    "reading": ("data.reading",),
    "report": ("show.report", "show.evaluations"),
    "run": (
        "engine.layout",
        "engine.state",
        "engine.observing",
        "engine.reduction",
        "engine.step",
        "engine.attention",
        "engine.pooling",
        "compat.former",
    ),
    "samples": ("data.samples", "data.classes", "data.parts", "data.preparing", "data.transforms"),
    "suites": ("measure.suites",),
    "suites.clustering": ("measure.suites.clustering",),
    "suites.dense": ("measure.suites.dense",),
    "suites.diffusion": ("measure.suites.diffusion",),
    "suites.gates": ("measure.suites.gates",),
    "suites.tcformer": ("measure.suites.tcformer",),
    "suites.vit": ("measure.suites.vit",),
    "tracing": ("measure.tracing",),
    "windows": ("engine.windows", "compat.former"),
    "zoo": ("data.zoo",),
}
"""Former modules of `tokred`, and the modules in which their names are now."""

RENAMED: dict[str, str] = {
    "advising.Family": "measure.advise.values.SettingFamily",
    "evaluating.Shown": "measure.progress.Progress",
    "fidelity.Seen": "measure.fidelity.Outputs",
}
"""Names that are others now, by the former module."""


class Former(ModuleType):
    """Stands in for a module that was moved, and takes its names from where they are now."""

    def __getattr__(self, name: str) -> Any:
        # Tools that look through all loaded modules (for `__file__`, say) must load nothing.
        part = f"{self.__name__}.{name}"
        if part in sys.modules:  # of a folder
            return sys.modules[part]
        if not name.startswith("__"):
            former = self.__name__.removeprefix("tokred.")
            if f"{former}.{name}" in RENAMED:
                module, _, now = RENAMED[f"{former}.{name}"].rpartition(".")
                return getattr(import_module(f"tokred.{module}"), now)
            for place in self._places():
                if hasattr(place, name):
                    return getattr(place, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({name for place in self._places() for name in dir(place)})

    def _places(self) -> list[ModuleType]:
        former = self.__name__.removeprefix("tokred.")
        return [import_module(f"tokred.{place}") for place in MOVED[former]]


def keep_former_paths() -> None:
    """Lets former modules be imported. They are no attributes of `tokred`, where functions have
    the names of some (`tokred.fidelity`); for the others see `__getattr__` of `tokred`."""
    for former in MOVED:
        sys.modules.setdefault(f"tokred.{former}", Former(f"tokred.{former}"))
    vars(sys.modules["tokred.suites"])["__path__"] = []  # it is a folder


def former(name: str) -> ModuleType:
    """A former module of `tokred`, for attribute access.

    Raises:
        AttributeError: there was none of that name.
    """
    if name not in MOVED:
        raise AttributeError(f"module 'tokred' has no attribute {name!r}")
    return sys.modules[f"tokred.{name}"]
