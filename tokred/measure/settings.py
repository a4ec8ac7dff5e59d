"""Settings to try: which method, at which keep rate, and the line of code that applies it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokred.patching.presets import Preset, presets
from tokred.reducers import Reducer, make, names, parse
from tokred.reducers.protocol import traits
from tokred.schedule import Schedule

METHODS = ("tome", "atc", "dpc_knn", "evit")
"""The methods that are tried if none are named, one of each kind: merging by pairs, by clusters and
by density, and pruning."""
DENSE_METHODS = ("slic", "tome", "atc")
"""The methods that are tried on models that answer for every pixel."""
KEEP_RATES = (0.9, 0.7, 0.5, 0.3)
"""The keep rates that are tried if none are given."""


@dataclass(frozen=True)
class Setting:
    """One reduction to try.

    Attributes:
        method: its name in the table.
        reducer: the method, or a preset.
        schedule: a keep rate or a schedule; None: the one that the method or preset has.
    """

    method: str
    reducer: Reducer | Preset
    schedule: float | Schedule | None

    @property
    def keep_rate(self) -> float | None:
        """The keep rate of the schedule, if it has one."""
        rate = getattr(self.schedule, "keep_rate", self.schedule)
        return rate if isinstance(rate, float | int) else None

    @property
    def name(self) -> str:
        """Method and keep rate, or schedule."""
        if self.schedule is None:
            return self.method
        return f"{self.method} {self.schedule}"

    @property
    def gates(self) -> str | Path | None:
        """The file of trained gates that the method has been given, if it has."""
        gates = None if isinstance(self.reducer, Preset) else traits(self.reducer).gates
        return gates if isinstance(gates, str | Path) else None

    @property
    def code(self) -> str:
        """The line that applies it."""
        arguments = [_written(self.reducer)]
        if isinstance(self.schedule, float | int):
            arguments.append(f"keep_rate={self.schedule:g}")
        elif self.schedule is not None:
            arguments.append(_written(self.schedule))
        return f"tokred.apply(model, {', '.join(arguments)})"


def settings_of(
    methods: Iterable[str | Reducer | Preset] | Mapping[str, Reducer | Preset],
    keep_rates: Iterable[float | Schedule],
    schedule: Callable[[float], Schedule] | None = None,
) -> list[Setting]:
    """Every method at every keep rate. Presets, and methods with trained gates, stand once: they
    have a schedule.

    Args:
        methods: a list of names, with options after a colon (`"atc:single"`), of methods or of
            presets; or a mapping to them from names of one's own.
        keep_rates: numbers in (0, 1], or schedules.
        schedule: makes a schedule out of a keep rate, such as `tokred.Hourglass`; if not given, the
            schedule is that of `tokred.apply`.

    Raises:
        ValueError: no method has that name, or it has no such option.
        TypeError: something is no method.
    """
    given = methods.items() if isinstance(methods, Mapping) else ((None, m) for m in methods)
    rates = [
        schedule(rate) if schedule is not None and isinstance(rate, float | int) else rate
        for rate in keep_rates
    ]
    found = []
    for name, method in given:
        reducer = method if isinstance(method, Preset) else _method(method)
        text = name or (method if isinstance(method, str) else spelled(reducer))
        once = Setting(text, reducer, None)
        if isinstance(reducer, Preset) or once.gates is not None:
            found.append(once)
        else:
            found += [Setting(text, reducer, rate) for rate in rates]
    return found


def _method(method: str | Reducer) -> Reducer | Preset:
    return method_of(method) if isinstance(method, str) else make(method)


def method_of(text: str) -> Reducer | Preset:
    """A method or preset, as it is written on the command line: options stand after a colon.

    Raises:
        ValueError: no method has that name, or it has no such option.
    """
    return presets[text] if text in presets else parse(text)


def spelled(reducer: Reducer | Preset) -> str:
    """A method as it is written on the command line: its name, and options that differ from the
    default."""
    for name, preset in presets.items():
        if preset is reducer:
            return name
    for name in names():
        usual: Any = parse(name)
        same = type(reducer) is type(usual)
        if same:
            changed = [
                f"{field.name}={getattr(reducer, field.name)}"
                for field in dataclasses.fields(usual)
                if field.compare and getattr(reducer, field.name) != getattr(usual, field.name)
            ]
            return f"{name}:{','.join(changed)}" if changed else name
    return str(reducer)


def _written(value: Any) -> str:
    """Code for a value."""
    if isinstance(value, Preset):
        return f'tokred.presets["{spelled(value)}"]'
    name = spelled(value) if isinstance(value, Reducer) else ""
    if name in names():
        return f'"{name}"'
    ours = type(value).__module__.startswith("tokred.")
    shown = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in dataclasses.fields(value)
        if field.init and getattr(value, field.name) != field.default
    ]
    return f"{'tokred.' if ours else ''}{type(value).__name__}({', '.join(shown)})"
