"""Arithmetic of attention: masks, biases, and the attention that tokens receive."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokred.graphs import recorded
from tokred.maps import wide


def mean_attention(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    scale: float,
    bias: Tensor | None = None,
    asking: Float[Tensor, "batch rows"] | None = None,
) -> Float[Tensor, "batch heads tokens"]:
    """The attention that each key gets from the given queries: softmax(scale * q k^T + bias), mean
    over the queries, at least float32. Head by head if the queries are many, so that the whole map
    of all heads never exists.

    Args:
        query: of whom.
        key: of all tokens.
        scale: what logits are multiplied by.
        bias: what is added to them, or bool (True: may be seen); [batch or 1, heads or 1,
            rows or 1, tokens].
        asking: the weight of each query in the mean; all alike if not given.
    """
    query, key = wide(query), wide(key)
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, -torch.inf)
    if query.shape[2] == 1:
        logits = (query @ key.transpose(2, 3)) * scale
        return (logits if bias is None else logits + bias).softmax(-1).squeeze(2)
    somes = [slice(None)]
    if query.device.type == "cpu" and not recorded(query):  # as many maps as fit into the cache
        images = max(1, 2**20 // max(1, query.shape[2] * key.shape[2]))
        somes = [slice(n, n + images) for n in range(0, max(1, query.shape[0]), images)]
    heads = []
    for head in range(query.shape[1]):
        own = None if bias is None else bias[:, min(head, bias.shape[1] - 1)]
        parts = []
        for some in somes:
            its = own if own is None or own.shape[0] == 1 else own[some]
            asked = None if asking is None else asking[some]
            parts.append(_of_one_head(query[some, head], key[some, head], scale, its, asked))
        heads.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    return torch.stack(heads, 1)


def _of_one_head(
    query: Float[Tensor, "batch rows head_dim"],
    key: Float[Tensor, "batch tokens head_dim"],
    scale: float,
    bias: Tensor | None,
    asking: Float[Tensor, "batch rows"] | None,
) -> Float[Tensor, "batch tokens"]:
    """See `mean_attention`. A function of its own, so that no map is kept for the next head."""
    logits = (query @ key.transpose(1, 2)) * scale
    if bias is not None:
        logits = logits + bias
    paid = logits.softmax(-1)
    if asking is None:
        return paid.mean(1)
    return (paid * asking[:, :, None]).sum(1) / asking.sum(1, keepdim=True)


def added(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias and a mask (bool, True: may be seen; or added to the logits) in one."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return bias + mask


def queries_by_keys(mask: Tensor, batch: int) -> Tensor:
    """A mask of two dimensions is [batch, tokens], but if it is square, and not as long as the
    batch, [queries, tokens]: that with two dimensions more."""
    if mask.ndim == 2 and mask.shape[0] == mask.shape[1] != batch:
        return mask[None, None]
    return mask


def visible(mask: Tensor, batch: int) -> Bool[Tensor, "batch tokens"]:
    """Which tokens any query may see, by an attention mask: [batch or 1, heads or 1, queries or 1,
    tokens], without the batch, or just [batch, tokens]; bool, of integers (0: hidden) or added to
    the logits."""
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    seen = queries_by_keys(mask, batch) != 0
    if seen.ndim == 3:
        seen = seen[None]
    if seen.ndim == 4:
        seen = seen.flatten(1, 2).any(1)
    return seen.expand(batch, -1)


def explicit_is_faster(x: Float[Tensor, "batch tokens dim"], heads: int) -> bool:
    """Whether attention is faster as two matrix products and a softmax than fused.

    It is on CPUs, in bfloat16, where sequences are of middling length and all weights of one block
    together few enough to stay in the cache (measured on AVX-512).
    """
    batch, tokens, _ = x.shape
    few = batch * heads * tokens**2 <= 2**20
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and tokens >= 40 and few
