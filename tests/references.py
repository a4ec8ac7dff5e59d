"""The methods in slow, obvious Python and float64: one image, one token at a time.

Written from the papers' steps, with none of the library's code. Only tests import it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def tome(metric: np.ndarray, merges: int, before: int = 0) -> list[int]:
    """Groups after one bipartite matching, numbered by their first tokens (ToMe, section 3)."""
    length = np.linalg.norm(metric, axis=-1, keepdims=True)
    unit = metric / np.where(length == 0, 1, length)
    a = [n for n in range(len(metric)) if (n + before) % 2 == 0]
    b = [n for n in range(len(metric)) if (n + before) % 2 == 1]
    proposals = []
    for i in a:
        partner = max(b, key=lambda j: (unit[i] @ unit[j], -j)) if b else None
        proposals.append((-(unit[i] @ unit[partner]) if b else 0.0, i, partner))
    joins = {i: j for _, i, j in sorted(proposals)[:merges]}
    return renumber([joins.get(n, n) for n in range(len(metric))])


def cut(merges: np.ndarray, keep: int) -> list[int]:
    """The clusters that are left when only the first merges of a SciPy dendrogram are made.

    (`fcluster` is no reference: it returns fewer clusters than asked for where heights are tied,
    and before SciPy 1.11 also for two points.)"""
    num = len(merges) + 1
    members = {point: [point] for point in range(num)}
    for step, (left, right) in enumerate(merges[: num - keep, :2].astype(int).tolist()):
        members[num + step] = members.pop(left) + members.pop(right)
    labels = [0] * num
    for cluster, points in members.items():
        for point in points:
            labels[point] = cluster
    return renumber(labels)


def renumber(labels: list[int]) -> list[int]:
    """The same groups, numbered in the order of their first members."""
    number: dict[int, int] = {}
    return [number.setdefault(label, len(number)) for label in labels]


def merge(x: np.ndarray, size: np.ndarray, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Size-weighted means of the groups, and their sizes."""
    groups = max(labels) + 1
    total = np.zeros(groups)
    summed = np.zeros((groups, x.shape[1]))
    for token, label in enumerate(labels):
        total[label] += size[token]
        summed[label] += size[token] * x[token]
    return summed / total[:, None], total


def vit_logits(model: nn.Module, image: Tensor, counts: list[int], method: str) -> np.ndarray:
    """What a plain timm ViT (class token, no LayerScale) answers for one image when tokens are
    reduced between attention and MLP, with proportional attention: the model in float64, layer
    by layer, its attention written out."""
    model = model.double()
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(image[None].double()))[0]
        sizes = np.ones(len(x) - 1)
        for block, keep in zip(model.blocks, counts, strict=True):
            y = block.norm1(x)
            heads = block.attn.num_heads
            q, k, v = block.attn.qkv(y).view(len(y), 3, heads, -1).permute(1, 2, 0, 3)
            logits = q @ k.transpose(1, 2) * (k.shape[2] ** -0.5)
            logits += torch.tensor(np.log(np.concatenate([[1.0], sizes])))
            attention = logits.softmax(-1)
            if method == "ats":  # inside attention: only the queries of sampled tokens go on
                if keep < len(x) - 1:
                    significance = (attention[:, 0] * v.norm(dim=-1)).sum(0)[1:].numpy()
                    drawn = [0, *(1 + n for n in ats(significance, keep))]
                    x, attention, sizes = x[drawn], attention[:, drawn], np.ones(len(drawn) - 1)
                x = x + block.attn.proj((attention @ v).transpose(0, 1).reshape(len(x), -1))
                x = x + block.mlp(block.norm2(x))
                continue
            x = x + block.attn.proj((attention @ v).transpose(0, 1).reshape(len(y), -1))
            metric = k.mean(0)[1:].numpy()
            tokens = x[1:].numpy()
            if method == "topk":
                score = attention[:, 0, 1:].mean(0).numpy()
                kept = sorted(sorted(range(len(tokens)), key=lambda n: (-score[n], n))[:keep])
                tokens, sizes = tokens[kept], sizes[kept]
            elif method == "evit":
                if keep < len(tokens):
                    _, tokens = evit(tokens, attention[:, 0, 1:].mean(0).numpy(), keep, False)
                sizes = np.ones(keep)
            else:
                size = sizes
                while len(tokens) > keep:
                    merges = min(len(tokens) - keep, len(tokens) // 2)
                    labels = tome(metric, merges, before=1)
                    tokens, sizes = merge(tokens, size, labels)
                    metric, size = merge(metric, size, labels)
            x = torch.cat([x[:1], torch.tensor(tokens)])
            x = x + block.mlp(block.norm2(x))
        return model.head(model.norm(x)[0]).numpy()


def ats(significance: np.ndarray, num: int, published: bool = False) -> list[int]:
    """ATS, section 3.2: the tokens whose entries in the cumulative sum are nearest to the fixed
    points, each once, in order. Published: the points of one more, without the last."""
    cumulative = np.cumsum(significance / significance.sum())
    of = num + 1 if published else num
    points = [(2 * k - 1) / (2 * of) for k in range(1, of + 1)][:num]
    return sorted({int(np.argmin(np.abs(cumulative - point))) for point in points})


def evit(
    x: np.ndarray, attention: np.ndarray, keep: int, published: bool
) -> tuple[list[int], np.ndarray]:
    """EViT, section 3.2, equations 3 and 4: labels, and the tokens that are left."""
    by_score = sorted(range(len(x)), key=lambda n: (-attention[n], n))
    kept, fused = sorted(by_score[: keep - 1]), sorted(by_score[keep - 1 :])
    token = sum(attention[n] * x[n] for n in fused)
    if not published:
        token = token / sum(attention[n] for n in fused)
    labels = renumber([n if n in kept else fused[0] for n in range(len(x))])
    out = np.zeros((keep, x.shape[1]))
    for n in kept:
        out[labels[n]] = x[n]
    out[labels[fused[0]]] = token
    return labels, out


def divprune(x: np.ndarray, num: int) -> list[int]:
    """DivPrune: the token whose nearest other token is farthest, then again and again the token
    that is farthest from the nearest of those taken; distances are 1 - cos."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = x / np.where(length == 0, 1, length)
    everyone = range(len(x))

    def apart(token: int, others: list[int]) -> float:
        return min((1 - unit[token] @ unit[other] for other in others), default=0.0)

    taken: list[int] = []
    while len(taken) < num:
        left = [n for n in everyone if n not in taken]
        others = {n: taken or [m for m in everyone if m != n] for n in left}
        taken.append(max(left, key=lambda n: (apart(n, others[n]), -n)))
    return sorted(taken)
