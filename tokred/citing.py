"""`tokred.cite`: the papers behind the methods in use."""

from __future__ import annotations

from torch import nn

from tokred.patching import reduction_of
from tokred.reducers import Reducer, make


def cite(method: str | Reducer | nn.Module) -> str:
    """The BibTeX entry of a method, or of the method that is applied to a model.

    >>> print(cite("tome").splitlines()[0])
    @inproceedings{bolya2023tome,

    Raises:
        ValueError: no method has that name, or nothing is applied to the model.
    """
    if isinstance(method, nn.Module):
        reduction = reduction_of(method)
        if reduction is None:
            raise ValueError("model has no reduction to cite; call tokred.apply(model, ...) first")
        method = reduction.reducer
    reducer = make(method)
    return reducer.bibtex or f"% {type(reducer).__name__} is a baseline, with no paper to cite."
