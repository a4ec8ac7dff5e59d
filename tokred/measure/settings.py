"""Settings to try: which method, at which keep rate, and the line of code that applies it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokred.patching.presets import Preset, presets
from tokred.reducers import Reducer, learned, names, parse
from tokred.schedule import Schedule

METHODS = ("tome", "atc", "dpc_knn", "evit")
"""The methods that are tried if none are named: merging by pairs, by clusters, by density; and
pruning."""
DENSE_METHODS = ("slic", "tome", "atc")
"""The same, of models that answer for every pixel."""
KEEP_RATES = (0.9, 0.7, 0.5, 0.3)


@dataclass(frozen=True)
class Setting:
    """One reduction to try.

    Attributes:
        method: how it is called in the table.
        reducer: the method, or a preset.
        schedule: a keep rate or a schedule; None: what the method or preset brings.
    """

    method: str
    reducer: Reducer | Preset
    schedule: float | Schedule | None

    @property
    def keep_rate(self) -> float | None:
        """Of the schedule, if it has one."""
        rate = getattr(self.schedule, "keep_rate", self.schedule)
        return rate if isinstance(rate, float | int) else None

    @property
    def name(self) -> str:
        """Method and keep rate, or schedule."""
        if self.schedule is None:
            return self.method
        return f"{self.method} {self.schedule}"

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
    """Every method at every keep rate; presets, and methods with trained gates, once.

    Args:
        methods: names, with options after a colon (`"atc:single"`), methods or presets; or such
            with names of one's own.
        keep_rates: numbers in (0, 1], or schedules.
        schedule: what makes a schedule of a keep rate, such as `tokred.Hourglass`; if not given,
            what `tokred.apply` makes.

    Raises:
        ValueError: no method has that name, or it has no such option.
        TypeError: it is no method.
    """
    given = methods.items() if isinstance(methods, Mapping) else ((None, m) for m in methods)
    rates = [
        schedule(rate) if schedule is not None and isinstance(rate, float | int) else rate
        for rate in keep_rates
    ]
    found = []
    for name, method in given:
        reducer = method_of(method) if isinstance(method, str) else method
        text = name or (method if isinstance(method, str) else spelled(reducer))
        once = isinstance(reducer, Preset) or (learned(reducer) and _gates_in(reducer))
        for rate in [None] if once else rates:
            found.append(Setting(text, reducer, rate))
    return found


def method_of(text: str) -> Reducer | Preset:
    """A method, with options after a colon, or a preset, as they are written on the command line.

    Raises:
        ValueError: no method has that name, or it has no such option.
    """
    return presets[text] if text in presets else parse(text)


def spelled(reducer: Reducer | Preset) -> str:
    """A method as the command line has it: its name, with the options that are not the default."""
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


def _gates_in(reducer: Any) -> bool:
    return isinstance(reducer.gates, str | Path)


def _written(value: Any) -> str:
    """A value as somebody would write it."""
    if isinstance(value, Preset):
        return f'tokred.presets["{spelled(value)}"]'
    name = spelled(value) if hasattr(value, "needs") else ""
    if name in names():
        return f'"{name}"'
    ours = type(value).__module__.startswith("tokred.")
    shown = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in dataclasses.fields(value)
        if field.init and getattr(value, field.name) != field.default
    ]
    return f"{'tokred.' if ours else ''}{type(value).__name__}({', '.join(shown)})"
