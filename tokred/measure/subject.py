"""What is measured: a model with a reduction in it, which is put back as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tokred.host.host import Host
from tokred.patching.patching import hang, host_of, reduction_of, remove


def check_method(method: Any, keep_rate: Any, schedule: Any) -> None:
    """What is measured without a method is the reduction that is applied, as it is.

    Raises:
        ValueError: a keep rate or a schedule is given without a method.
    """
    if method is None and (keep_rate is not None or schedule is not None):
        raise ValueError(
            f"method must be given with keep_rate={keep_rate} and schedule={schedule}: the "
            "reduction that is applied has its own"
        )


@contextmanager
def put_back(model: nn.Module, host: Host | None) -> Iterator[None]:
    """Whatever happens inside, the model ends with the reduction that it began with."""
    former = reduction_of(model)
    try:
        yield
    finally:
        remove(model)
        if former is not None:
            hang(model, host_of(model, host), former)
