"""Patches with one mistake each, made of the real ones, and the promises that each of them breaks.

What tests/test_contract.py is run on. A mistake that a check does not notice is a check that could
be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from families import Small, visible
from families import timm_eva as eva
from families import timm_relpos as relpos
from families import timm_vit as vit
from families import transformers_blip as blip
from families import transformers_clip as clip
from families import transformers_dinov2 as dinov2
from families import transformers_maskless as maskless
from families import transformers_vit as hf_vit
from torch import Tensor, nn

from tokred.engine import Layout, Reduction, Step
from tokred.host import Host
from tokred.patches import (
    _timm,
    timm_eva,
    timm_relpos,
    timm_vit,
    transformers_blip,
    transformers_clip,
    transformers_dinov2,
    transformers_maskless,
    transformers_vit,
)


@dataclass(frozen=True)
class Wrong:
    """A patch with a mistake.

    Attributes:
        small: the model that it is for.
        right: the patch without the mistake.
        changes: the fields of it that are wrong.
        breaks: the promises that it breaks.
        raises: of a patch whose model notices the mistake as soon as it runs, what it says then.
            Other promises are broken by that, too.
    """

    small: Small
    right: Host
    changes: Mapping[str, Any]
    breaks: frozenset[str]
    raises: str | None = None

    @property
    def host(self) -> Host:
        return replace(self.right, **self.changes)


def wrong(
    small: Small, right: Host, *breaks: str, raises: str | None = None, **changes: Any
) -> Wrong:
    return Wrong(small, right, changes, frozenset(breaks), raises)


def forwards(host: Host, forward: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The same forward for every class of block."""
    return dict.fromkeys(host.forwards, forward)


def laid_out(host: Host, **changes: Any) -> Callable[..., Layout]:
    """The host's layout with a mistake."""

    def layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
        return replace(host.layout(model, image_size), **changes)

    return layout


# ---- timm's VisionTransformer


def block(
    block: Any, step: Step, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
    *, mistake: str,
) -> Tensor:  # fmt: skip
    """timm's `Block.forward` with a mistake."""
    few = not step.untouched
    if mistake == "reduces before attention":
        x = step.reduce(x)
    mask = step.bias(x, attn_mask)
    if mistake == "no sizes, told":
        mask = step.mask = None if attn_mask is None else step.rows_and_columns(attn_mask)
    elif mistake == "no sizes":
        mask = None if attn_mask is None else step.rows_and_columns(attn_mask)
    elif mistake == "cuts masks by position" and few and attn_mask is not None:
        sizes = step.bias(x)
        cut = attn_mask[..., : x.shape[1], : x.shape[1]]
        mask = step.mask = cut if sizes is None else cut + sizes
    elif mistake == "leaves masks out once tokens are few" and few:
        mask = step.bias(x)
    y = block.attn(block.norm1(x), attn_mask=mask)
    first, second = block.ls1, block.ls2
    if mistake == "no LayerScale":
        first = nn.Identity()
    if mistake == "no LayerScale once tokens are few" and few:
        second = nn.Identity()
    x = x + block.drop_path1(first(y))
    if mistake not in ("reduces before attention", "never reduces"):
        x = step.reduce(x)
    if mistake == "keeps something":
        block.attn.last = y
    y = x if mistake == "no norm" else block.norm2(x)
    if mistake == "float32":
        return x.float() + block.drop_path2(second(block.mlp(y)))
    return x + block.drop_path2(second(block.mlp(y)))


def blocks(mistake: str) -> dict[str, Callable[..., Any]]:
    """For every class of block, a function that can be given such a mistake."""

    def forward(
        module: Any, step: Step, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return block(module, step, x, attn_mask, is_causal, mistake=mistake)

    return forwards(timm_vit.HOST, forward)


def without(methods: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: method for name, method in methods.items() if name not in names}


def unnormed(module: Any, output: Tensor, which: int) -> Tensor:
    """Queries, keys or values from the one projection that makes them, before any norm."""
    return output.unflatten(-1, (3, module.attn.num_heads, -1))[:, :, which].transpose(1, 2)


def half_intermediates(
    reduction: Reduction, original: Any, model: Any, *args: Any, **kwargs: Any
) -> Any:
    """Intermediate features in another dtype than the model's."""
    right = timm_vit.HOST.methods["forward_intermediates"]
    return [one.half() for one in right(reduction, original, model, *args, **kwargs)]


def late_intermediates(
    reduction: Reduction, original: Any, model: Any, *args: Any, **kwargs: Any
) -> Any:
    """The full grid one layer too late."""
    late = frozenset(range(1, reduction.layout.layers))
    return reduction.handing_out(late, original, model, *args, **kwargs)


VIT, TIMM = vit.SMALL, timm_vit.HOST
OF_TIMM_VIT = {
    "leaves out LayerScale": wrong(
        VIT["deit3"], TIMM, "keep_rate=1", "merging", "pruning",
        forwards=blocks("no LayerScale"),
    ),
    "leaves out LayerScale once tokens are few": wrong(
        VIT["deit3"], TIMM, "merging", "pruning",
        forwards=blocks("no LayerScale once tokens are few"),
    ),
    "leaves out a norm": wrong(
        VIT["deit"], TIMM, "keep_rate=1", "merging", "pruning", forwards=blocks("no norm"),
    ),
    "reduces before attention": wrong(
        VIT["deit"], TIMM, "class attention", "keys", "values", "attention received", "merging",
        "pruning", forwards=blocks("reduces before attention"),
    ),
    "leaves out the sizes": wrong(
        VIT["deit"], TIMM, "merging", forwards=blocks("no sizes, told")
    ),
    "leaves out the sizes, but not for methods": wrong(
        VIT["deit"], TIMM, "class attention", "attention received", "merging",
        forwards=blocks("no sizes"),
    ),
    "cuts masks by position": wrong(
        VIT["deit"], TIMM, "masks", forwards=blocks("cuts masks by position")
    ),
    "leaves masks out once tokens are few": wrong(
        VIT["deit"], TIMM, "masks", forwards=blocks("leaves masks out once tokens are few")
    ),
    "never reduces": wrong(
        VIT["deit"], TIMM, "token counts", "attention received", "outputs",
        forwards=blocks("never reduces"),
    ),
    "leaves something behind": wrong(
        VIT["deit"], TIMM, "removal", forwards=blocks("keeps something")
    ),
    "adds up in float32": wrong(VIT["deit"], TIMM, "half precision", forwards=blocks("float32")),
    "averages dropped tokens": wrong(
        VIT["average pooling"], TIMM, "dropped tokens", "full_grid=False",
        methods=without(TIMM.methods, "pool"),
    ),
    "pools dropped tokens by attention": wrong(
        VIT["siglip, attention pooling"], TIMM, "dropped tokens", "full_grid=False",
        methods=without(TIMM.methods, "pool"),
    ),
    "does not name the last norm": wrong(
        VIT["siglip, attention pooling"], TIMM, "dropped tokens", "full_grid=False",
        raises="features of which nothing is known", passes=lambda model: (),
    ),
    "hands out few tokens": wrong(
        VIT["deit"], TIMM, "full_grid=False", "outputs",
        methods=without(TIMM.methods, "forward_intermediates"),
    ),
    "hands out full grids one layer too late": wrong(
        VIT["deit"], TIMM, "full_grid=False", "outputs",
        methods={**TIMM.methods, "forward_intermediates": late_intermediates},
    ),
    "hands out another dtype": wrong(
        VIT["deit"], TIMM, "keep_rate=1", "full_grid=False", "outputs",
        methods={**TIMM.methods, "forward_intermediates": half_intermediates},
    ),
    "a prefix that is too short": wrong(
        VIT["dinov2, registers"], TIMM, "layout",
        raises="Tokens that this model adds", layout=laid_out(TIMM, prefix=4),
    ),
    "a prefix that is too long": wrong(
        VIT["deit"], TIMM, "layout", layout=laid_out(TIMM, prefix=2)
    ),
    "no prefix": wrong(VIT["deit"], TIMM, "layout", "dropped tokens", "full_grid=False",
        raises="Tokens that this model adds", layout=laid_out(TIMM, prefix=0)),
    "another scale": wrong(
        VIT["deit"], TIMM, "class attention", "attention received",
        scale=lambda block: 1.0,
    ),
    "reads keys in front of their norm": wrong(
        VIT["QK-norm"], TIMM, "keys", "class attention", "attention received",
        taps={**TIMM.taps, "key": "attn.qkv"},
        reads={**TIMM.reads, "key": partial(unnormed, which=1)},
    ),
    "reads keys as values": wrong(
        VIT["deit"], TIMM, "values", reads={**TIMM.reads, "value": partial(unnormed, which=1)}
    ),
    "reads keys as queries": wrong(
        VIT["deit"], TIMM, "class attention", "attention received",
        taps={**TIMM.taps, "query": "attn.k_norm"},
    ),
}  # fmt: skip


# ---- rotary positions


def rotary_block(
    block: Any, step: Step, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
    is_causal: bool = False, *, by_position: bool = False,
) -> Tensor:  # fmt: skip
    """timm's `EvaBlock.forward`, which does not tell methods of rotation."""
    mask = step.bias(x, attn_mask)
    prefix = block.attn.num_prefix_tokens
    rope = rope[: x.shape[1] - prefix] if by_position else step.rows(rope)
    y = block.attn(block.norm1(x), rope=rope, attn_mask=mask)
    if by_position and step.wants_signals:
        step.rotate = lambda heads: _timm.rotated(block.attn, heads, rope)
    x = x + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)
    x = step.reduce(x)
    y = block.mlp(block.norm2(x))
    return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)


def unrotated(
    block: Any, step: Step, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    return rotary_block(block, step, x, rope, attn_mask, is_causal)


def rotated_by_position(
    block: Any, step: Step, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    return rotary_block(block, step, x, rope, attn_mask, is_causal, by_position=True)


EVA = timm_eva.HOST
OF_ROTARY = {
    "tells methods of no rotation": wrong(
        eva.SMALL["eva02, class token"], EVA, "class attention", "attention received",
        forwards=forwards(EVA, unrotated), shows=frozenset(),
    ),
    "rotates by position": wrong(
        eva.SMALL["eva02, class token"], EVA, "merging", "pruning",
        forwards=forwards(EVA, rotated_by_position), shows=frozenset(),
    ),
}  # fmt: skip


# ---- others


def relative_attention(
    attention: Any, step: Step, x: Tensor, shared_rel_pos: Tensor | None = None
) -> Tensor:
    """timm's `RelPosAttention.forward`, with the biases of the first tokens of the full grid."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    step.see(query=query, key=key, value=value)
    bias = attention.rel_pos.get_bias()[..., : x.shape[1], : x.shape[1]]
    sizes = step.bias(x)
    mask = step.mask = bias if sizes is None else bias + sizes
    y = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.proj(y.transpose(1, 2).flatten(2))


def told_twice(attention: Any, step: Step, *args: Any, **kwargs: Any) -> Any:
    """BLIP's attention, in which tokens of all images attend to each other where they are laid end
    to end."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if step.flat:
        parts = attention.qkv(hidden_states).unflatten(-1, (3, attention.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(query.clone(), key, value)
        whole = (query @ key.transpose(-1, -2) * attention.scale).softmax(-1) @ value
        return attention.projection((0 * y + whole).transpose(1, 2).flatten(2)), None
    return transformers_blip.attend(attention, step, *args, **kwargs)


RELPOS, CLIP, HF = timm_relpos.HOST, transformers_clip.HOST, transformers_vit.HOST
MASKLESS, DINO, BLIP = transformers_maskless.HOST, transformers_dinov2.HOST, transformers_blip.HOST
OF_OTHERS = {
    "relative positions by position": wrong(
        relpos.SMALL["class token"], RELPOS, "merging", "pruning",
        attend=relative_attention,
    ),
    "forgets the tokens at the end": wrong(
        maskless.SMALL["yolos"], MASKLESS, "layout",
        raises="Tokens that this model adds", layout=laid_out(MASKLESS, suffix=0),
    ),
    "does not say that positions are given to blocks": wrong(
        dinov2.SMALL["dinov3"], DINO, "gates", "keys", layout=laid_out(DINO, by_position=False)
    ),
    "mixes images that are laid end to end": wrong(
        blip.SMALL["blip2"], BLIP, "gates", attend=told_twice
    ),
    "a grid of columns and rows": wrong(
        maskless.SMALL["yolos"], MASKLESS, "layout", layout=laid_out(MASKLESS, grid=(6, 4))
    ),
    "does not say that the model shuffles": wrong(
        hf_vit.SMALL["vit-mae"], HF, "layout", layout=laid_out(HF, raster=True)
    ),
    "does not say that tokens are averaged": wrong(
        hf_vit.SMALL["ijepa, averaging"], HF, "dropped tokens", "full_grid=False",
        averages_output=lambda root, model: False,
    ),
    "does not name what pools": wrong(
        clip.SMALL["siglip"], CLIP, "dropped tokens", "full_grid=False", pools=lambda model: ()
    ),
    "does not know which hidden states are handed out": wrong(
        hf_vit.SMALL["vit"], HF, "outputs", tapped=None
    ),
}  # fmt: skip

# ---- timm's DeepseekVit, by somebody who knows of blocks alone


def deepseek_block(block: Any, step: Step, x: Tensor, rope: Tensor | None = None) -> Tensor:
    """timm's `DeepseekVitBlock.forward`, with the seam, but nothing said of rotation."""
    mask = step.bias(x)
    y = block.attn(block.norm1(x), rope=step.rows(rope), attn_mask=mask)
    x = x + block.drop_path1(y)
    x = step.reduce(x)
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def deepseek_layout(model: Any, image_size: tuple[int, int] | None) -> Layout:
    rows, columns = model.patch_embed.grid_size
    if image_size is not None:
        rows, columns = model.patch_embed.dynamic_feat_size(image_size)
    return Layout(
        prefix=0, layers=len(model.blocks), grid=(rows, columns), class_token=False,
        by_position=True,
    )  # fmt: skip


def deepseek(cls: str, **options: Any) -> Small:
    def build() -> nn.Module:
        module = pytest.importorskip("timm.models.deepseek_vit")
        made = getattr(module, cls)(
            img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, **options
        )
        return eva.strong(visible(made))

    return Small(build, vit.images)


_DEEPSEEK = "timm.models.deepseek_vit.DeepseekVit"
NAIVE = Host(
    models=(f"{_DEEPSEEK}Encoder",),
    forwards={f"{_DEEPSEEK}Block": deepseek_block},
    blocks=lambda model: list(model.blocks),
    layout=deepseek_layout,
    scale=lambda block: float(block.attn.scale),
    taps={"key": "attn.k_norm", "query": "attn.q_norm"},
    methods={"forward_intermediates": TIMM.methods["forward_intermediates"]},
)
OF_DEEPSEEK = {
    "deepseek_vit, features": wrong(
        deepseek("DeepseekVitEncoder", global_pool=""), NAIVE, "class attention",
        "attention received", "full_grid=False",
    ),
    "deepseek_vit, classifier": wrong(
        deepseek("DeepseekVitClassifier", num_classes=5), NAIVE, "class attention",
        "attention received", "dropped tokens", "full_grid=False",
    ),
}  # fmt: skip

WRONG: dict[str, Wrong] = {**OF_TIMM_VIT, **OF_ROTARY, **OF_OTHERS, **OF_DEEPSEEK}
