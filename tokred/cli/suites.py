"""`tokred bench --suite`: many models and methods at once, as tables and files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from tokred import reducers
from tokred.cli.shared import bar
from tokred.data.writing import write_text
from tokred.measure.suites import clustering, dense, diffusion, gates, memory, overhead, vit

Results: TypeAlias = dict[str, Any]
Suite: TypeAlias = Callable[[argparse.Namespace, Any], tuple[Results, str]]
"""Measures with these options, and a bar to be moved on; returns the results, and as Markdown."""


def run(options: argparse.Namespace) -> None:
    """Measures one suite, prints its tables and writes its files."""
    with bar(0, "rounds") as rounds:
        results, text = SUITES[options.suite](options, rounds)
    whole = json.dumps(results, indent=1)
    print(whole if options.json else text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        device = "cuda" if options.device.startswith("cuda") else "cpu"
        stem = f"{options.suite}-{device}-{results['dtype']}"
        stem += "-compiled" if options.compile else ""
        for suffix, content in (("json", whole), ("md", text)):
            path = options.out / f"{stem}.{suffix}"
            write_text(path, content)
            print(f"wrote {path}", file=sys.stderr)


def _vit(options: argparse.Namespace, rounds: Any) -> tuple[Results, str]:
    models = [
        (name, int(pixels or 224))
        for name, _, pixels in (given.partition(":") for given in options.models or ())
    ]

    untrained = [
        name for name in reducers.names() if reducers.traits(reducers.make(name)).learned is None
    ]

    def done(group: vit.Group) -> None:
        what = f"{group.model}, {group.image_size} px, batch {group.batch}"
        rounds.write(f"{what}: {group.skipped or f'{group.rounds} rounds'}", file=sys.stderr)

    results = vit.run(
        models or vit.MODELS,
        options.batches or vit.BATCHES,
        options.methods or untrained,
        options.keep_rates or vit.KEEP_RATES,
        compile=options.compile,
        seconds=options.seconds,
        on_group=done,
        **_common(options, rounds),
    )
    return results, vit.markdown(results)


def _clustering(options: argparse.Namespace, rounds: Any) -> tuple[Results, str]:
    common = _common(options, rounds)
    del common["dtype"]  # distances are float32
    tokens = options.tokens or clustering.TOKENS
    results = clustering.run(tokens, batches=options.batches, **common)
    return results, clustering.markdown(results)


def _dense(options: argparse.Namespace, rounds: Any) -> tuple[Results, str]:
    results = dense.run(**_common(options, rounds))
    return results, dense.markdown(results)


def _diffusion(options: argparse.Namespace, rounds: Any) -> tuple[Results, str]:
    results = diffusion.run(
        options.models or tuple(diffusion.CONFIGS),
        (options.image_size or 512,),
        options.methods or tuple(diffusion.SIDES),
        keep_rate=options.keep_rate or 0.5,
        batch=(options.batches or (2,))[0],
        compile=options.compile,
        **_common(options, rounds),
    )
    return results, diffusion.markdown(results)


def _gates(options: argparse.Namespace, rounds: Any) -> tuple[Results, str]:
    results = gates.run(
        options.models or gates.MODELS,
        options.batches or gates.BATCHES,
        **_common(options, rounds),
    )
    return results, gates.markdown(results)


def _tcformer(options: argparse.Namespace, rounds: Any) -> tuple[Results, str]:
    from tokred.measure.suites import tcformer  # registers models with timm: only when asked for

    results = tcformer.run(
        (options.image_size,) if options.image_size else tcformer.SIZES,
        batch=(options.batches or (1,))[0],
        memory=None if options.image_size else tcformer.MEMORY,
        **_common(options, rounds),
    )
    return results, tcformer.markdown(results)


def _memory(options: argparse.Namespace, rounds: Any) -> tuple[Results, str]:
    common = _common(options, rounds)
    del common["device"], common["rounds"]  # memory of the CPU, which is the same in every round
    results = memory.run(
        options.methods or reducers.names(),
        batches=options.batches or memory.BATCHES,
        keep_rate=(options.keep_rates or (0.5,))[0],
        **common,
    )
    return results, memory.markdown(results)


def _overhead(options: argparse.Namespace, rounds: Any) -> tuple[Results, str]:
    results = overhead.run(
        options.models or overhead.MODELS,
        options.methods or overhead.METHODS,
        keep_rate=(options.keep_rates or (0.5,))[0],
        batch=(options.batches or (1,))[0],
        **_common(options, rounds),
    )
    return results, overhead.markdown(results)


def _common(options: argparse.Namespace, rounds: Any) -> dict[str, Any]:
    """What nearly every suite takes."""

    def on_round(number: int, of: int) -> None:
        rounds.total, rounds.n = of, number
        rounds.refresh()

    return {
        "device": options.device,
        "dtype": getattr(torch, options.dtype),
        "rounds": options.rounds,
        "on_round": on_round,
    }


SUITES: dict[str, Suite] = {
    "vit": _vit,
    "clustering": _clustering,
    "dense": _dense,
    "diffusion": _diffusion,
    "gates": _gates,
    "memory": _memory,
    "tcformer": _tcformer,
    "overhead": _overhead,
}
