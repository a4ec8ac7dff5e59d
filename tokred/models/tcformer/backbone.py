"""TCFormer: a vision transformer in four stages, whose tokens are clusters from the second on.

Zeng et al., "Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering
Transformer", CVPR 2022, https://arxiv.org/abs/2204.08680, and "TCFormer: Visual Recognition via
Token Clustering Transformer", TPAMI 2024, https://arxiv.org/abs/2407.11321 (TCFormerV2, of which
no code was published). Blocks are those of Wang et al., "Pyramid Vision Transformer", ICCV 2021,
and "PVT v2", 2022: keys and values from a strided convolution, feed-forward networks with a
depth-wise one. Parameters have the names of the published checkpoints.

Differs from the published code in that the densest clusters are found without noise, that images
may be smaller than 64 pixels, and that half precision works everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokred.models.tcformer.clusterings import (
    DPCKNN,
    Clustering,
    Parts,
    check_sides,
    cluster_in_parts,
    parts_of,
)
from tokred.models.tcformer.tokens import (
    ImageTokens,
    Layout,
    from_map,
    interpolate,
    merge,
    merged,
    raster,
    resized,
    to_map,
)

GLOBAL = (1, 1, 1)
"""Parts along each side, CTM by CTM, of TCFormer (V1): every CTM clusters the whole image."""

LOCAL = (4, 2, 1)
"""The same of TCFormerV2."""


class TCFormer(nn.Module):
    """Four stages; between them, tokens are clustered to a quarter (CTM). Images may have any size.

    >>> model = tcformerv2_small(num_classes=10)
    >>> model(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 10])
    >>> [tuple(stage.x.shape) for stage in model.stages(torch.zeros(1, 3, 224, 224))]
    [(1, 3136, 64), (1, 784, 128), (1, 196, 320), (1, 49, 512)]

    Args:
        depths: blocks of every stage.
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 for no head.
        widths: width of the tokens of every stage.
        heads: attention heads of every stage; must divide the widths.
        mlp_ratios: width inside the feed-forward networks, as a multiple of the tokens' width.
        sr_ratios: the factor by which maps are reduced, along each side, for keys and values.
        parts: for every CTM, the number of parts along each side into which the image is cut for
            clustering: `GLOBAL`, `LOCAL`, or others.
        qkv_bias: whether queries, keys and values have biases.
        drop_rate: dropout in front of the head.
        drop_path_rate: the probability to leave out the last block in training. It rises linearly
            from 0 in the first block.
        global_pool: "avg"; or "" for no pooling, so that the head sees every token.
        clustering: how tokens are clustered, `DPCKNN()` if not given. The attribute may be changed
            later.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        widths: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        parts: Sequence[int] = GLOBAL,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        clustering: Clustering | None = None,
    ) -> None:
        super().__init__()
        by_stage = {"depths": depths, "widths": widths, "heads": heads, "sr_ratios": sr_ratios,
                    "mlp_ratios": mlp_ratios}  # fmt: skip
        for name, values in by_stage.items():
            if len(values) != 4 or min(values) <= 0:
                raise ValueError(f"{name} must be four positive numbers, not {tuple(values)}")
        _check_pool(global_pool)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[3]
        self.global_pool = global_pool
        self.grad_checkpointing = False
        self.num_stages = 4
        self.parts = parts
        self.clustering: Clustering = DPCKNN() if clustering is None else clustering
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**n, "module": f"norm{n + 1}"}
            for n, width in enumerate(widths)
        ]
        last = max(sum(depths) - 1, 1)
        rates = iter(drop_path_rate * n / last for n in range(sum(depths)))
        self.patch_embed1 = PatchEmbed(in_chans, widths[0])
        for n, depth in enumerate(depths):
            if n > 0:
                self.add_module(f"ctm{n}", CTM(widths[n - 1], widths[n]))
            blocks = nn.ModuleList(
                Block(
                    widths[n], heads[n], mlp_ratios[n], sr_ratios[n], "conv", qkv_bias, next(rates),
                    on_grid=n == 0,
                )
                for _ in range(depth)
            )  # fmt: skip
            self.add_module(f"block{n + 1}", blocks)
            self.add_module(f"norm{n + 1}", nn.LayerNorm(widths[n], eps=1e-6))
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(widths[3], num_classes) if num_classes > 0 else nn.Identity()
        self.apply(draw)

    @property
    def parts(self) -> tuple[int, ...]:
        """Into how many parts along each side the image is cut, CTM by CTM. May be changed.

        Raises:
            ValueError: those of a CTM are no divisors of those of the one before.
        """
        return self._parts

    @parts.setter
    def parts(self, sides: Sequence[int]) -> None:
        if len(sides) != 3:
            raise ValueError(f"parts must be three numbers, one for every CTM, not {tuple(sides)}")
        check_sides(sides)
        self._parts = tuple(sides)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """The logits of every class."""
        return self.forward_head(self.forward_features(images))

    def forward_features(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens of the last stage."""
        return self.stages(images)[-1].x

    def forward_head(
        self, x: Float[Tensor, "batch tokens dim"], pre_logits: bool = False
    ) -> Tensor:
        """Logits, from the tokens of the last stage; with `pre_logits`, what the head would see."""
        if self.global_pool == "avg":
            x = x.mean(1)
        x = self.head_drop(x)
        if pre_logits:
            return x
        logits: Tensor = self.head(x)
        return logits

    def stages(self, images: Float[Tensor, "batch channels height width"]) -> list[ImageTokens]:
        """The tokens of every stage, for a neck or for looking at."""
        pixels = self.patch_embed1(images)
        grid = (pixels.shape[2], pixels.shape[3])
        layout = raster(len(images), grid, images.device)
        plan = parts_of(grid, self.parts, images.device)
        x = self.patch_embed1.norm(pixels.flatten(2).transpose(1, 2))
        found = []
        memory: Memory | None = None
        for n in range(1, self.num_stages + 1):
            if n > 1:
                ctm: CTM = getattr(self, f"ctm{n - 1}")
                x, layout, memory = ctm(x, layout, plan[n - 2], self.clustering)
            for block in getattr(self, f"block{n}"):
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, layout, memory, use_reentrant=False)
                else:
                    x = block(x, layout, memory)
                memory = None  # only a stage's first block looks at the tokens before merging
            x = getattr(self, f"norm{n}")(x)
            found.append(ImageTokens(x, layout))
        return found

    def forward_intermediates(
        self,
        x: Float[Tensor, "batch channels height width"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of some stages, as timm asks for them (all are behind their stage's norm).

        Args:
            x: the images.
            indices: the stages, from 0; or a number, for that many at the end; or None, for all.
            norm: has no effect here.
            stop_early: has no effect here.
            output_fmt: "NCHW".
            intermediates_only: whether to return the maps alone, or the last tokens and the maps.

        Raises:
            ValueError: there is no such stage, or another format is asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"maps come as NCHW, not {output_fmt!r}")
        chosen = chosen_stages(indices, self.num_stages)
        stages = self.stages(x)
        maps = [stages[n].map() for n in chosen]
        return maps if intermediates_only else (stages[-1].x, maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drops the stages behind the last one that is asked for, and the head, as timm does for
        models that only hand out features; returns the stages."""
        chosen = chosen_stages(indices, self.num_stages)
        last = max(chosen) + 1
        for n in range(last + 1, self.num_stages + 1):
            for name in (f"ctm{n - 1}", f"block{n}", f"norm{n}"):
                delattr(self, name)
        if prune_head or last < self.num_stages:
            self.reset_classifier(0)
        self.num_stages = last
        return chosen

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by one with random weights; by none for 0 classes."""
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head.apply(draw).to(like.device, like.dtype)

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks compute their activations again in the backward pass, to save memory."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers must not decay, besides biases and norms: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters, in order, for learning rates that differ by layer."""
        return {
            "stem": r"^patch_embed1",
            "blocks": (
                r"^(?:ctm|block|norm)(\d+)"
                if coarse
                else [(r"^block(\d+)\.(\d+)", None), (r"^(?:ctm|norm)(\d+)", (99999,))]
            ),
        }


# What the first block of a stage attends to: tokens before merging, where they lie, their scores.
Memory = tuple[Tensor, Layout, Tensor]


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution. The caller applies `norm`, to tokens."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        found: Tensor = self.proj(images)
        return found


class CTM(nn.Module):
    """Clustering-based token merging (section 3.2 of the first paper): tokens are convolved to the
    next stage's width, scored, clustered and merged."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv = TokenConv(into, out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out, eps=1e-5)
        self.score = nn.Linear(out, 1)

    def forward(
        self,
        x: Float[Tensor, "batch fine into"],
        layout: Layout,
        parts: Parts,
        clustering: Clustering,
    ) -> tuple[Float[Tensor, "batch coarse out"], Layout, Memory]:
        """The merged tokens and where they lie; and what they were merged from."""
        height, width = layout.size
        size = (-(-height // 2), -(-width // 2))
        before = resized(layout, size)
        x = self.norm(self.conv(x, layout, before))
        score = self.score(x)[..., 0]
        with torch.no_grad():
            labels = cluster_in_parts(x, parts, clustering)
        out, clusters = merge(x, score, labels, parts.keep)
        # The tokens before merging are seen on maps of the new size, too. (With the former size
        # the number of multiply-adds would not be the published one.)
        return out, merged(layout, clusters, size), (x, before, score)


class TokenConv(nn.Conv2d):
    """A convolution of the tokens' map, given back to the same tokens, beside a linear layer of the
    tokens themselves (`skip`; per channel, if the convolution is)."""

    def __init__(self, into: int, out: int, kernel: int, stride: int, padding: int,
                 groups: int = 1) -> None:  # fmt: skip
        super().__init__(into, out, kernel, stride, padding, groups=groups)
        self.skip = nn.Conv1d(into, out, 1, bias=False, groups=groups)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "batch tokens into"], layout: Layout, after: Layout | None = None
    ) -> Float[Tensor, "batch tokens out"]:
        """The same tokens; `after` is their layout on the convolved map, if its size is another."""
        seen = from_map(super().forward(to_map(x, layout)), layout if after is None else after)
        weight = self.skip.weight[..., 0]
        # A convolution over one position would put the tokens into another order in memory.
        return seen + (F.linear(x, weight) if self.groups == 1 else x * weight[:, 0])


class Block(nn.Module):
    """Attention and a feed-forward network, each in front of a norm and added to what went in.

    Args:
        dim: width of the tokens.
        heads: attention heads.
        mlp_ratio: width inside the feed-forward network, as a multiple of the tokens' width.
        sr_ratio: the factor by which keys and values are reduced, along each side of the map.
        reduction: how keys and values are reduced, see `Attention`.
        qkv_bias: whether queries, keys and values have biases.
        drop_path: the probability to leave out each of the two branches in training.
        on_grid: whether tokens lie on a grid, as in the first stage.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        sr_ratio: int,
        reduction: str,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        on_grid: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, sr_ratio, reduction, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        mlp = GridMlp if on_grid else TokenMlp
        self.mlp = mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        layout: Layout,
        memory: Memory | None = None,
        last: Layout | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens, renewed.

        Args:
            x: the tokens.
            layout: where they lie.
            memory: the tokens that are attended to, if they are others, and their scores.
            last: where those of the last stage lie, for the reduction "clusters".
        """
        query = self.norm1(x)
        if memory is None:
            seen = self.attn(query, query, layout, None, last)
        else:
            others, their_layout, score = memory
            seen = self.attn(query, self.norm1(others), their_layout, score, last)
        x = x + self.drop_path(seen)
        new: Tensor = x + self.drop_path(self.mlp(self.norm2(x), layout))
        return new


class Attention(nn.Module):
    """Attention to fewer keys and values than there are tokens.

    Args:
        dim: width of the tokens.
        heads: must divide it.
        sr_ratio: the factor by which keys and values are reduced, along each side of the map.
        reduction: "conv", a strided convolution of the map and a norm; "pool", its average; or
            "clusters" (CR-MTA), the tokens of the last stage, whatever `sr_ratio` is.
        qkv_bias: whether queries, keys and values have biases.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self, dim: int, heads: int, sr_ratio: int, reduction: str, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide the width, {dim}, and {heads} do not")
        if reduction not in ("conv", "pool", "clusters"):
            raise ValueError(f"reduction must be conv, pool or clusters, not {reduction!r}")
        self.heads, self.sr_ratio, self.reduction = heads, sr_ratio, reduction
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if reduction == "conv" and sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        memory: Float[Tensor, "batch others dim"],
        layout: Layout,
        score: Float[Tensor, "batch others"] | None = None,
        last: Layout | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The output of attention for the tokens `x` (equation 4).

        Args:
            x: the tokens that become queries.
            memory: the tokens that become keys and values.
            layout: where those lie.
            score: added to the attention logits of all heads; higher = more attention.
            last: see `Block`.
        """
        memory, bias = self.reduced(memory, layout, score, last)
        query, key, value = (
            one.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for one in (self.q(x), *self.kv(memory).chunk(2, -1))
        )
        if bias is not None:
            # In the dtype of the queries: fused attention on the CPU is wrong with any other.
            bias = bias[:, None, None].to(query.dtype)
        seen = F.scaled_dot_product_attention(query, key, value, bias)
        new: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return new

    def reduced(
        self,
        x: Float[Tensor, "batch others dim"],
        layout: Layout,
        score: Float[Tensor, "batch others"] | None,
        last: Layout | None,
    ) -> tuple[Float[Tensor, "batch fewer dim"], Float[Tensor, "batch fewer"] | None]:
        """The reduced tokens, which become keys and values, and their scores."""
        if self.reduction == "clusters":
            assert last is not None and score is None
            return interpolate(x, layout, last), None
        if self.sr_ratio == 1:
            return x, score
        pixels = to_map(x, layout)
        if self.reduction == "conv":
            # As many pixels as make no whole patch are left out; but where there is none, the map
            # is padded to one.
            short = [max(self.sr_ratio - side, 0) for side in pixels.shape[2:]]
            if any(short):
                pixels = F.pad(pixels, (0, short[1], 0, short[0]))
            x = self.norm(self.sr(pixels).flatten(2).transpose(1, 2))
        else:
            x = self._pooled(pixels)
        return x, None if score is None else self._pooled(to_map(score[..., None], layout))[..., 0]

    def _pooled(
        self, pixels: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch fewer dim"]:
        height, width = pixels.shape[2:]
        patch = (min(self.sr_ratio, height), min(self.sr_ratio, width))
        return F.avg_pool2d(pixels, patch).flatten(2).transpose(1, 2)


class GridMlp(nn.Module):
    """A feed-forward network with a depth-wise convolution, for tokens that lie on a grid."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        convolution = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.dwconv = nn.ModuleDict({"dwconv": convolution})  # the name it has in checkpoints
        self.fc2 = nn.Linear(hidden, dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], layout: Layout
    ) -> Float[Tensor, "batch tokens dim"]:
        pixels = self.dwconv["dwconv"](to_map(self.fc1(x), layout))
        new: Tensor = self.fc2(F.gelu(from_map(pixels, layout)))
        return new


class TokenMlp(nn.Module):
    """A feed-forward network with a depth-wise convolution of the tokens' map."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = TokenConv(hidden, hidden, 3, stride=1, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], layout: Layout
    ) -> Float[Tensor, "batch tokens dim"]:
        new: Tensor = self.fc2(F.gelu(self.dwconv(self.fc1(x), layout)))
        return new


class DropPath(nn.Module):
    """Leaves a branch out for some samples, in training (Huang et al., "Deep Networks with
    Stochastic Depth", ECCV 2016); for the others it counts that much more.

    Raises:
        ValueError: the rate is not in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path must be in [0, 1), not {rate}")
        self.rate = rate

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        if self.rate == 0 or not self.training:
            return x
        stays = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate)
        return x * (stays / (1 - self.rate))


def draw(module: nn.Module) -> None:
    """Initial weights: of linear layers as in vision transformers, of convolutions as in ResNet."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        seen_by = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2 * module.groups / seen_by))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool must be 'avg' or '', not {global_pool!r}")


def chosen_stages(indices: int | Sequence[int] | None, num: int) -> list[int]:
    """Stages from 0, in the ways that timm lets them be told."""
    if indices is None:
        indices = num
    if isinstance(indices, int):
        if not 1 <= indices <= num:
            raise ValueError(f"there are {num} stages, not {indices}")
        return list(range(num - indices, num))
    wrong = [n for n in indices if not -num <= n < num]
    if wrong:
        raise ValueError(f"stages must be in [{-num}, {num - 1}], not {wrong}")
    return [n % num for n in indices]


LIGHT, BASE, LARGE = (2, 2, 2, 2), (3, 4, 6, 3), (3, 8, 27, 3)

VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tcformer_light": {"depths": LIGHT, "parts": GLOBAL},
        "tcformer": {"depths": BASE, "parts": GLOBAL},
        "tcformer_large": {"depths": LARGE, "parts": GLOBAL},
        "tcformerv2_tiny": {"depths": LIGHT, "parts": LOCAL},
        "tcformerv2_small": {"depths": BASE, "parts": LOCAL},
        "tcformerv2_base": {"depths": LARGE, "parts": LOCAL},
    }
)
"""What the models of the papers differ in."""


def tcformer_light(**options: Any) -> TCFormer:
    """TCFormer-Light, 14.2 M parameters; options are those of `TCFormer`."""
    return TCFormer(**{**VARIANTS["tcformer_light"], **options})


def tcformer(**options: Any) -> TCFormer:
    """TCFormer, 25.6 M parameters; options are those of `TCFormer`."""
    return TCFormer(**{**VARIANTS["tcformer"], **options})


def tcformer_large(**options: Any) -> TCFormer:
    """TCFormer-Large, 62.8 M parameters; options are those of `TCFormer`."""
    return TCFormer(**{**VARIANTS["tcformer_large"], **options})


def tcformerv2_tiny(**options: Any) -> TCFormer:
    """TCFormerV2-Tiny, 14.2 M parameters; options are those of `TCFormer`."""
    return TCFormer(**{**VARIANTS["tcformerv2_tiny"], **options})


def tcformerv2_small(**options: Any) -> TCFormer:
    """TCFormerV2-Small, 25.6 M parameters; options are those of `TCFormer`."""
    return TCFormer(**{**VARIANTS["tcformerv2_small"], **options})


def tcformerv2_base(**options: Any) -> TCFormer:
    """TCFormerV2-Base, 62.8 M parameters; options are those of `TCFormer`."""
    return TCFormer(**{**VARIANTS["tcformerv2_base"], **options})
