"""`tome.utils`: how many tokens each layer removes, and how fast a model is."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import nn

from tokred.schedule import Linear


def parse_r(
    num_layers: int, r: SupportsIndex | Sequence[SupportsIndex] | tuple[int, float]
) -> list[int]:
    """How many tokens each layer is to remove. (A layer removes at most half of its tokens; that
    limit is not applied here.)

    >>> parse_r(4, 8), parse_r(4, (8, -1.0)), parse_r(4, [8, 4])
    ([8, 8, 8, 8], [16, 10, 5, 0], [8, 4, 0, 0])

    Args:
        num_layers: blocks of the model.
        r: the same number for every layer; or (number, inflection), where an inflection of -1
            falls from twice the number to nothing, 0 is constant and 1 rises (`tokred.Linear`);
            or a list with a number for each layer; layers after its end remove nothing.

    Raises:
        TypeError: `r` is none of these.
        ValueError: a number is below 0, there are more of them than layers, or the inflection is
            not in [-1, 1].
    """
    if isinstance(r, tuple) and len(r) == 2:
        return Linear(_number(r[0]), float(r[1])).removed(num_layers)
    if not isinstance(r, (tuple, list)):
        return [_number(r)] * num_layers  # type: ignore[arg-type]
    if len(r) > num_layers:
        raise ValueError(
            f"r has {len(r)} numbers, but the model has {num_layers} layers: leave out the last "
            f"{len(r) - num_layers}"
        )
    return [_number(one) for one in r] + [0] * (num_layers - len(r))


def benchmark(
    model: nn.Module,
    device: torch.device | str | int = 0,
    input_size: tuple[int, int, int] = (3, 224, 224),
    batch_size: int = 64,
    runs: int = 40,
    throw_out: float = 0.25,
    use_fp16: bool = False,
    verbose: bool = False,
) -> float:
    """Images per second on random images, over all runs that are counted. Moves the model to the
    device, and into evaluation mode. (`tokred.bench` runs the dense model, the reduced one and the
    free limit in turns, and also gives the spread.)

    Args:
        model: called with `batch_size` images at a time.
        device: where to run.
        input_size: channels, height and width.
        batch_size: images in a run.
        runs: how often to run, including the runs that are not counted.
        throw_out: the share of the runs that is not counted: the first ones.
        use_fp16: run under float16 autocast.
        verbose: print the figure.

    Returns:
        Images per second.

    Raises:
        ValueError: there is nothing to count, or no such device.
    """
    skipped = int(runs * throw_out)
    if not 0 <= skipped < runs:
        raise ValueError(f"throw_out must leave some of {runs} runs to count, not {throw_out!r}")
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device {device!r} is a GPU, and there is none: device="cpu"')
    model = model.eval().to(where)
    images = torch.rand(batch_size, *input_size, device=where)
    begin = 0.0
    with torch.no_grad(), torch.autocast(where.type, dtype=torch.float16, enabled=use_fp16):
        for run in range(runs):
            if run == skipped:
                _finish(where)
                begin = time.perf_counter()
            model(images)
    _finish(where)
    speed = batch_size * (runs - skipped) / (time.perf_counter() - begin)
    if verbose:
        print(f"Throughput: {speed:.2f} im/s")
    return speed


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _number(r: SupportsIndex) -> int:
    try:
        number = operator.index(r)
    except TypeError:
        raise TypeError(
            f"r must be whole numbers of tokens, (number, inflection), or a list, not {r!r}. For "
            "a share of the tokens: tokred.apply(model, keep_rate=...)"
        ) from None
    if number < 0:
        raise ValueError(f"r must be at least 0 tokens, not {number}")
    return number
