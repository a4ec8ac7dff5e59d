"""`tome.patch`: token merging in a model, by as many tokens a layer as its attribute `r` says.

`r` is an attribute of the model itself, which the schedule looks at whenever a pass begins. So no
class is changed, a copy of the model has an `r` of its own, and compiled code is compiled again
when `r` has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokred.compat.tome.observer import OnModel
from tokred.compat.tome.utils import parse_r
from tokred.engine import Reduction
from tokred.graphs import compiling
from tokred.host import UnsupportedModelError, module_of
from tokred.patching import hang, reduction_for
from tokred.schedule import removing


def timm(model: nn.Module, trace_source: bool = False, prop_attn: bool = True) -> None:
    """Makes a model merge `model.r` tokens in every layer; `r` is 0 until it is set. In place.

    Args:
        model: a ViT of timm; or any other model in which `tokred.apply` can merge tokens.
        trace_source: whether `model._tome_info["source"]` tells, after a pass, which patches each
            token was made of.
        prop_attn: whether a token that stands for s tokens counts s times in attention. Models
            that were pretrained with masks (MAE) and not fine-tuned are better without.

    Raises:
        TypeError: an option is not a bool.
        ValueError: the model has something else that is called `r`.
        UnsupportedModelError: there is no patch for the model.
    """
    _patch(model, trace_source, prop_attn)


def swag(model: nn.Module, trace_source: bool = False, prop_attn: bool = True) -> None:
    """The same, for the SWAG checkpoints as torchvision has them:
    `torchvision.models.vit_b_16(weights="IMAGENET1K_SWAG_E2E_V1")`. See `timm`."""
    try:
        _patch(model, trace_source, prop_attn)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error}. SWAG's own classes are not known; torchvision has the same weights: "
            'torchvision.models.vit_b_16(weights="IMAGENET1K_SWAG_E2E_V1")'
        ) from error


def mae(model: nn.Module, trace_source: bool = False, prop_attn: bool = True) -> None:
    """The same, for models pretrained with masks, as timm has them:
    `timm.create_model("vit_base_patch16_224.mae", global_pool="avg")`. See `timm`."""
    inside = module_of(model)
    if hasattr(inside, "fc_norm") and not hasattr(inside, "norm"):
        raise UnsupportedModelError(
            f"{type(inside).__qualname__} averages tokens by itself and has no norm, as in MAE's "
            'repository: load its weights into timm\'s "vit_base_patch16_224.mae" with '
            'global_pool="avg", whose parameters have the same names'
        )
    _patch(model, trace_source, prop_attn)


@dataclass(frozen=True, eq=False)
class AsSet:
    """A schedule: what the attribute `r` of a model says when it is asked.

    Attributes:
        attributes: where `r` is.
    """

    attributes: OnModel

    def __call__(self, tokens: int, layers: int) -> list[int]:
        return removing(parse_r(layers, self.attributes.get("r")), tokens)

    def __repr__(self) -> str:
        return f"r={self.attributes.get('r')!r}"


@dataclass(eq=False)
class TomeInfo(Mapping[str, Any]):
    """`model._tome_info`, which can only be read. Its keys:

    - "r": how many tokens each layer is to remove in the next pass, before the limit of one half.
    - "size": for each token that left the last block, how many patches it stands for, [B, N, 1].
      Of the last pass in this thread; None if nothing was merged, or before the first pass.
    - "source": for each of these tokens, which tokens of the full sequence it was made of,
      [B, N, all], 1 or 0. Also None if `trace_source` is off.
    - "trace_source", "prop_attn": as they were given.
    - "class_token", "distill_token": whether the model has one.

    Attributes:
        reduction: what hangs on the model.
        trace_source: whether "source" is given.
        distill_token: whether the model has a distillation token.
    """

    reduction: Reduction = field(repr=False)  # with the whole model in it
    trace_source: bool
    distill_token: bool

    @property
    def on_model(self) -> OnModel:
        """What goes with the reduction."""
        assert isinstance(self.reduction.observer, OnModel)
        return self.reduction.observer

    def __getitem__(self, name: str) -> Any:
        if name == "r":
            return parse_r(self.reduction.layout.layers, self.on_model.get("r"))
        if name == "size":
            source = self._source()
            return None if source is None else source.sum(2, keepdim=True)
        if name == "source":
            return self._source() if self.trace_source else None
        if name == "prop_attn":
            return self.reduction.proportional_attention
        if name == "class_token":
            return self.reduction.layout.class_token
        if name in ("trace_source", "distill_token"):
            return getattr(self, name)
        raise KeyError(f"_tome_info has {', '.join(_NAMES)}, not {name!r}")

    def __setitem__(self, name: str, value: Any) -> NoReturn:
        raise TypeError(
            f"_tome_info[{name!r}] cannot be set: set model.r, or call tome.patch again with "
            "other options"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)

    def _source(self) -> Float[Tensor, "batch tokens all"] | None:
        records = self.on_model.last_pass()
        if not records:
            return None
        index: Tensor | None = None
        for record in records:
            assert record.map is not None, "nothing rises here"
            onward = record.map.labels()
            index = onward if index is None else onward.gather(1, index)
        assert index is not None and records[-1].map is not None
        few = F.one_hot(index, records[-1].map.num_coarse).transpose(1, 2).float()
        layout = self.reduction.layout
        others, full = layout.others, few.shape[2] + layout.others
        source = few.new_zeros(len(few), few.shape[1] + others, full)
        inside = slice(layout.prefix, full - layout.suffix)
        source[:, layout.prefix : source.shape[1] - layout.suffix, inside] = few
        for token in range(others):
            at = token if token < layout.prefix else token - others
            source[:, at, at] = 1
        return source


InFront = OnModel
"""What version 0.7 called it in files of models."""

_NAMES = ("r", "size", "source", "trace_source", "prop_attn", "class_token", "distill_token")


def _patch(model: nn.Module, trace_source: bool, prop_attn: bool) -> None:
    for name, value in {"trace_source": trace_source, "prop_attn": prop_attn}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r}")
    if compiling():
        raise RuntimeError("tome.patch cannot be compiled: call it outside torch.compile's code")
    model = module_of(model)
    # What torch.compile returns passes attributes on to the model inside.
    holder: nn.Module = getattr(model, "_orig_mod", model)
    taken = {*holder._modules, *holder._parameters, *holder._buffers, *dir(type(holder))}
    if "r" in taken:
        raise ValueError(f"{type(holder).__qualname__} has an r of its own: use tokred.apply")
    on_model = OnModel(holder, {"r": 0})
    host, reduction = reduction_for(
        model,
        "tome",
        AsSet(on_model),
        proportional_attention=prop_attn,
        full_grid=False,  # tokens come out as "source" and "size" describe them
    )
    distilled = getattr(holder, "dist_token", None) is not None
    on_model.values["_tome_info"] = TomeInfo(reduction, trace_source, distilled)
    reduction.observer = on_model
    hang(model, host, reduction)
