"""Which images a batch holds, where something between two blocks has changed it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tokred.engine.state import Ahead, Reduced, State, unrolled
from tokred.maps import TokenMap


def same_images(
    before: Float[Tensor, "batch tokens dim"], after: Float[Tensor, "chosen tokens dim"]
) -> Int[Tensor, " chosen"] | None:
    """Which images of a batch another batch holds.

    Images whose tokens are what they were are found in any order, and if some are missing. Images
    whose tokens were changed (by a cast, by a bias that is added, by an adapter) must all be there
    and in order: each must resemble itself more than any other image.

    Args:
        before: the tokens of a batch.
        after: what was made of them.

    Returns:
        For each image of `after`, which one of `before` it is, on the CPU; None if that cannot be
        told.
    """
    after = after.detach().to(before.device)
    before = before.detach()
    in_order = torch.arange(len(before))
    as_many = len(after) == len(before)
    if as_many and len(before) == 1:
        return in_order
    alike = _alike(before, after, as_many)
    best = alike.argmax(1)
    if as_many:
        own = alike.diagonal()
        same = own >= alike.amax(1) - 1e-6
        best = torch.where(same, in_order, best)
        if bool(same.all()):
            return in_order
    exact = torch.equal(before[best.to(before.device)].nan_to_num(), after.nan_to_num())
    return best if exact else None


def _alike(before: Tensor, after: Tensor, as_many: bool) -> Float[Tensor, "chosen batch"]:
    """How much each image after resembles each one before: cosines of their mean tokens and first
    tokens, without what all images have in common. On the CPU, float64."""
    seen = []
    for x in (before, after):
        wide = x.double().nan_to_num(posinf=0.0, neginf=0.0)
        seen.append(torch.cat([wide.mean(1), wide[:, 0]], 1).cpu())
    if as_many:
        seen = [x - x.mean(0) for x in seen]
        first, second = (F.normalize(x, dim=1) for x in seen)
        return second @ first.T
    return -torch.cdist(seen[1], seen[0])


def images_of(state: State, images: Int[Tensor, " chosen"], batch: int) -> State:
    """The state of some images of a batch.

    Args:
        state: that of all images.
        images: which images, in which order.
        batch: how many images there were.

    Raises:
        TypeError: a map does not keep what belongs to an image apart.
    """

    def chosen(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[images.to(x.device)]

    def counts(each: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if each is None else tuple(each[n] for n in images.tolist())

    trail: Reduced | None = None
    for reduced in unrolled(state.trail):
        trail = Reduced(
            map=map_of(reduced.map, images, batch),
            asked=reduced.asked,
            size=chosen(reduced.size),
            bias=chosen(reduced.bias),
            index=chosen(reduced.index),
            grid=reduced.grid,
            stale=chosen(reduced.stale),
            former=trail,
            each=counts(reduced.each),
        )
    ahead: Ahead | None = None
    for link in _links(state.ahead):
        ahead = Ahead(link.keep, link.tapped, link.left, ahead, counts(link.each))
    return state.but(
        ahead=ahead,
        trail=trail,
        size=chosen(state.size),
        bias=chosen(state.bias),
        received=chosen(state.received),
        index=chosen(state.index),
        each=counts(state.each),
        aside=chosen(state.aside),
        kept=chosen(state.kept),
    )


def _links(ahead: Ahead | None) -> list[Ahead]:
    """What a pass still has to do, the last block first."""
    found: list[Ahead] = []
    while ahead is not None:
        found.insert(0, ahead)
        ahead = ahead.rest
    return found


def map_of(token_map: TokenMap, images: Int[Tensor, " chosen"], batch: int) -> TokenMap:
    """The map of some images of a batch, see `images_of`."""
    if not is_dataclass(token_map):
        raise TypeError(
            f"{type(token_map).__name__} is no dataclass: what of it belongs to which image is not "
            "known"
        )
    changed: dict[str, Any] = {}
    for field in fields(token_map):
        value = getattr(token_map, field.name)
        if isinstance(value, Tensor):
            if value.shape[:1] not in ((batch,), (1,)):
                raise TypeError(
                    f"{type(token_map).__name__}.{field.name} has the shape {tuple(value.shape)}: "
                    f"what of it belongs to which of {batch} images is not known"
                )
            if len(value) == batch:
                changed[field.name] = value[images.to(value.device)]
        elif isinstance(value, TokenMap):
            changed[field.name] = map_of(value, images, batch)
    return replace(token_map, **changed)
