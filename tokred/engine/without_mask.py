"""Token sizes in attention that takes no mask: they go in with the values instead.

Where attention is proportional, a key that stands for s tokens counts s times (ToMe, equation 1).
As a mask, that is the logarithm of s, added to the logits. Flash kernels take no such mask, but

    softmax(q k^T + log s) v = softmax(q k^T) (s v) / softmax(q k^T) s,

and the right-hand side is attention without a mask, over values that have one channel more: s v
and s. Queries and keys stay as they are.

`attention_without_mask` computes it, whatever function computes attention. `SizesAsMask` lets
attention that a host computes by itself take this form, without restating it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tokred.graphs import in_a_graph

if TYPE_CHECKING:
    from tokred.engine.reduction import Reduction
    from tokred.engine.state import State

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_without_mask(
    attend: Attention,
    query: Float[Tensor, "batch heads queries key_dim"],
    key: Float[Tensor, "batch key_heads tokens key_dim"],
    value: Float[Tensor, "batch key_heads tokens value_dim"],
    bias: Float[Tensor, "batch 1 1 tokens"],
) -> Tensor:
    """Attention in which key j counts exp(bias_j) times, by a function that takes no mask.

    Args:
        attend: attention without a mask, of queries, keys and values. It gets heads of one width,
            a multiple of 8, as flash kernels want them, and so must be told the scale of the
            logits beforehand.
        query, key, value: for which the answer is wanted.
        bias: the logarithms of the token sizes; -inf for a key that nobody may see.

    Returns:
        What `attend` returns, with channels last, and as many of them as `value` has.
    """
    width = value.shape[-1]
    wide = max(query.shape[-1], width + 1)
    wide += -wide % 8
    weight = _weights(bias, value.dtype).transpose(2, 3)
    # Ones beside the values become the sizes themselves. One such channel is needed; the others
    # fill the head up.
    value = F.pad(value, (0, wide - width), value=1.0) * weight
    # Channels of zeros leave the logits as they are.
    query, key = (F.pad(x, (0, wide - x.shape[-1])) for x in (query, key))
    output = attend(query, key, value)
    return output[..., :width] / output[..., width : width + 1]


def _weights(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(bias), up to a common factor of each image, which the quotient does not see."""
    if dtype == torch.float16:
        # It ends at 65,504, which a large value times a large size would pass. Half of the largest
        # logarithm is taken off, so that neither the large nor the small ones leave its range.
        bias = bias.float() - bias.float().amax(-1, keepdim=True).clamp(min=0) / 2
    return bias.exp().to(dtype)


class SizesAsMask(Tensor):
    """A mask that says nothing but how many tokens each key stands for.

    It is the ordinary mask to all code but `scaled_dot_product_attention`, which takes the form
    without a mask instead where that is faster. A host may give the mask another shape on the way;
    what it makes of it by any other operation is an ordinary tensor.

    Attributes:
        log_sizes: the logarithms of the token sizes, [batch, 1, 1, tokens], at least float32.
    """

    log_sizes: Tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention:
                return _attend(*args, **kwargs)
            result = func(*args, **kwargs)
        if _only_shapes(func, args) and isinstance(args[0], SizesAsMask):
            return sizes_as_mask(result, args[0].log_sizes)
        return result


def sizes_as_mask(mask: Tensor, log_sizes: Float[Tensor, "batch 1 1 tokens"]) -> SizesAsMask:
    """A mask that is nothing but these logarithms of token sizes, in any shape."""
    known = mask.as_subclass(SizesAsMask)
    known.log_sizes = log_sizes
    return known


_SHAPING = (
    Tensor.view,
    Tensor.reshape,
    Tensor.expand,
    Tensor.unsqueeze,
    Tensor.contiguous,
    Tensor.to,
)


def _only_shapes(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether an operation changes nothing but the shape and the dtype of its first argument."""
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        # (If slices leave some keys out, the mask does not fit the keys any more.)
        return all(at is None or at is Ellipsis or isinstance(at, slice | int) for at in index)
    return func in _SHAPING


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` with token sizes as its mask, in the faster of two forms."""
    options: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale, **options)

    log_sizes = _sizes_of(query, key, value, attn_mask)
    # Dropout acts on the weights of attention before the quotient is taken: another thing.
    exact = log_sizes is not None and dropout_p == 0 and not is_causal
    if exact and is_faster(query, key, value):
        assert log_sizes is not None
        return attention_without_mask(attend, query, key, value, log_sizes)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options
    )


def _sizes_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Float[Tensor, "batch 1 1 tokens"] | None:
    """What a mask says of sizes, if queries, keys and mask are those of the batch it is about."""
    if not isinstance(mask, SizesAsMask):
        return None
    batch, tokens = mask.log_sizes.shape[0], mask.log_sizes.shape[3]
    whole = all(x.ndim == 4 and x.shape[0] == batch for x in (query, key, value))
    return mask.log_sizes if whole and mask.shape[-1] == key.shape[2] == tokens else None


def knowing_sizes(
    reduction: Reduction, state: State, bias: Tensor | None, given: Tensor | None
) -> Tensor | None:
    """The bias of a block as a mask that knows the sizes, where attention may take another form.

    That is with `attention="fastest"`, on CUDA, if the bias says nothing but sizes: the host has
    no mask of its own, and no image is padded. In compiled code it is the ordinary mask, because
    nothing can be measured there.

    Args:
        reduction: what is applied.
        state: what the tokens stand for.
        bias: what is added to the logits of attention.
        given: the host's own mask.
    """
    if reduction.attention != "fastest" or bias is None or given is not None:
        return bias
    if state.bias is None or not reduction.proportional_attention:
        return bias
    if state.ragged or state.each is not None or not _offered(bias) or in_a_graph(bias):
        return bias
    return sizes_as_mask(bias, state.bias)


def _offered(bias: Tensor) -> bool:
    """Whether attention may take the form without a mask on this device."""
    return bias.device.type == "cuda"


# Which form is faster


class Case(NamedTuple):
    """Attention of about the same cost: what is measured once."""

    device: torch.device
    dtype: torch.dtype
    gradients: bool
    sequences: int
    tokens: int
    key_dim: int
    value_dim: int


_FASTER: dict[Case, bool] = {}
"""What was measured. It is a property of the machine, so that all models share it."""

_MARGIN = 0.95
"""The form without a mask is taken if it needs at most this share of the other one's time, so that
noise does not decide."""


def case_of(query: Tensor, key: Tensor, value: Tensor) -> Case:
    """Heads of all images together are rounded up to a power of two, and tokens to a multiple of
    64, which is about what kernels work on at a time."""
    heads = query.shape[0] * query.shape[1]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return Case(
        query.device,
        query.dtype,
        learns,
        1 << max(0, heads - 1).bit_length(),
        -(-key.shape[2] // 64) * 64,
        query.shape[3],
        value.shape[3],
    )


def is_faster(
    query: Float[Tensor, "batch heads queries key_dim"],
    key: Float[Tensor, "batch key_heads tokens key_dim"],
    value: Float[Tensor, "batch key_heads tokens value_dim"],
) -> bool:
    """Whether attention with token sizes is faster without a mask. (Measured on first use, which
    takes some milliseconds and waits for the device; never while a CUDA graph is captured, whose
    warm-up has measured it.)
    """
    case = case_of(query, key, value)
    if case not in _FASTER:
        if case.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        took = seconds_of_both(case)
        _FASTER[case] = took["without"] <= _MARGIN * took["mask"]
    return _FASTER[case]


def seconds_of_both(case: Case, rounds: int = 7, calls: int = 5) -> dict[str, float]:
    """How long attention takes with token sizes as a "mask" and "without": medians of `rounds`
    turns, each of so many `calls` one after another, as a model makes them.
    """
    # Zeros, because numbers drawn at random would be missing from the user's own sequence.
    shape = 1, case.sequences, case.tokens
    like: dict[str, Any] = {
        "dtype": case.dtype,
        "device": case.device,
        "requires_grad": case.gradients,
    }
    query, key = (torch.zeros(*shape, case.key_dim, **like) for _ in range(2))
    value = torch.zeros(*shape, case.value_dim, **like)
    log_sizes = torch.zeros(1, 1, 1, case.tokens, device=case.device)
    mask, scale = log_sizes.to(case.dtype), case.key_dim**-0.5

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    def without() -> Tensor:
        return attention_without_mask(plain, query, key, value, log_sizes)

    def turn(form: Callable[[], Tensor]) -> float:
        start = _now(case.device)
        for _ in range(calls):
            output = form()
            if case.gradients:
                torch.autograd.grad(output.sum(), (query, key, value))
        return (_now(case.device) - start) / calls

    forms = {"mask": masked, "without": without}
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, form in forms.items():
            seconds = turn(form)
            if number > 0:  # kernels are loaded in the first round
                taken[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
