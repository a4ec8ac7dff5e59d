"""`tokred.cite`: the papers behind the methods in use."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokred.host import module_of
from tokred.patching import reduction_of
from tokred.reducers import make


def cite(method: Any) -> str:
    """The BibTeX entry of a method (its name, or a reducer), or of the method that is applied to a
    model or a pipeline.

    >>> print(cite("tome").splitlines()[0])
    @inproceedings{bolya2023tome,

    Raises:
        ValueError: no method has that name, or nothing is applied to the model.
    """
    method = module_of(method)
    if isinstance(method, nn.Module):
        reduction = reduction_of(method)
        if reduction is None:
            raise ValueError("model has no reduction to cite; call tokred.apply(model, ...) first")
        method = reduction.reducer
    reducer = make(method)
    return reducer.bibtex or f"% {type(reducer).__name__} is a baseline, with no paper to cite."
