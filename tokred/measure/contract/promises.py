"""The promises of a patch. Each is a function that finds what is not as promised."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.data.inputs import Inputs, pixels
from tokred.host import Denoiser, Host, find_host
from tokred.measure.contract.comparing import Leaves, apart, leaves, same, structure
from tokred.measure.contract.findings import Broken, Findings, UntriedError, Verdict, said
from tokred.measure.contract.probing import Chooser, Equals, Probe, noise
from tokred.measure.contract.trial import Reduced, Run, Trial, entered, hanging_on
from tokred.measure.contract.watching import Changes
from tokred.patching import reduction_of, remove
from tokred.schedule import Exactly, Stages


def verdict_on(name: str, trial: Trial) -> Verdict:
    """Tries a promise, once."""
    if name not in trial.verdicts:
        trial.verdicts[name] = _tried(name, trial)
    return trial.verdicts[name]


def _tried(name: str, trial: Trial) -> Verdict:
    broken: list[Broken] = []
    untried = None
    try:
        for seen, expected in PROMISES[name](trial):
            one = Broken(name, seen, expected)
            if one not in broken:
                broken.append(one)
    except UntriedError as reason:
        untried = str(reason)
    except Exception as error:  # whatever it is, the patched model should not have raised it
        broken.append(Broken(name, said(error), "no exception"))
    finally:
        remove(trial.model)
    return Verdict(name, tuple(broken), None if broken else untried)


# Answers


def keeps_everything(trial: Trial) -> Findings:
    """With `keep_rate=1`, the answer and the features are the unpatched model's to the last bit."""
    dense, features = leaves(trial.dense), leaves(trial.dense_features)
    expected = "the unpatched model's, to the last bit"
    for method in trial.accepted(1.0):
        what = f"with keep_rate=1 and {method}"
        if not same(leaves(trial.answer()), dense):
            yield f"{what}, another answer", expected
        if features and not same(leaves(trial.handed_out()), features):
            yield f"{what}, other features", expected


def keeps_structure(trial: Trial) -> Findings:
    """Outputs and features have the types, names, numbers, shapes and dtypes of the unpatched
    model's. They are finite, and another answer than the unpatched model's."""
    for method in trial.accepted(trial.fewer):
        fewer = _leaves_out(trial, method)
        found = trial.answer()
        yield from _restructured(method, structure(found), structure(trial.dense), fewer)
        yield from _another(method, leaves(found), leaves(trial.dense))
        if leaves(trial.dense_features):
            features = structure(trial.handed_out())
            yield from _restructured(method, features, structure(trial.dense_features), fewer)


def runs_in_half(trial: Trial) -> Findings:
    """In bfloat16, the model runs, and outputs have the types, names, numbers, shapes and dtypes of
    the unpatched model's."""
    model = copy.deepcopy(trial.model).to(torch.bfloat16)
    tower = model if isinstance(trial.host, Denoiser) else find_host(model, trial.given)[1]
    half = trial.on_half(model, tower)
    try:
        dense = structure(half.answer())
    except Exception as error:
        raise UntriedError(f"the unpatched model does not run: {said(error)}") from error
    for method in half.accepted(half.fewer):
        fewer = _leaves_out(half, method)
        yield from _restructured(method, structure(half.answer()), dense, fewer)


def _leaves_out(trial: Trial, method: Any) -> bool:
    """Whether dropped tokens are left out of features: where they could not be told apart any
    more, and cannot be left out later."""
    hung = reduction_of(trial.model)
    averages = getattr(hung, "averages", False) and not getattr(hung, "trims", False)
    return bool(averages and getattr(method, "prunes", False))


def _restructured(
    method: Any, found: Mapping[str, str], dense: Mapping[str, str], fewer: bool
) -> Findings:
    """The first difference between what two outputs are made of.

    Args:
        method: the method that is applied.
        found: what one is made of.
        dense: what the other one is made of.
        fewer: whether shapes may differ.
    """
    for path in sorted(found.keys() | dense.keys()):
        one, other = found.get(path, "nothing"), dense.get(path, "nothing")
        if one != other and not (fewer and one.split("[")[0] == other.split("[")[0]):
            yield f"with {method}, {path or 'the output'} is {one}", other
            return


def _another(method: Any, found: Leaves, dense: Leaves) -> Findings:
    pairs = [(path, one, other) for (path, one), (_, other) in zip(found, dense, strict=False)]
    for path, one, other in pairs:
        if one.shape == other.shape and bool((other.isfinite() & ~one.isfinite()).any()):
            yield f"with {method}, {path or 'the output'} is not finite", "finite numbers"
    if all(apart(one, other, 0.1) is None for _, one, other in pairs):
        yield f"with {method}, the unpatched model's answer", "another one, of fewer tokens"


# Where tokens stand, and how many


def counts_tokens(trial: Trial) -> Findings:
    """Exactly as many tokens as the schedule says enter the MLP of every block (or, where a block
    reduces at its end, the block behind it)."""
    trial.needs_a_sequence()
    full = trial.entering.shape[1]
    schedule = Stages(0.5)
    for method in trial.accepted(schedule):
        layout = reduction_of(trial.model).layout
        counts = schedule(full - layout.others, layout.layers)
        asked = [count + layout.others for count in counts]
        blocks, last = entered(trial.blocks, trial.model, trial.inputs)
        at_the_end = [*last, *asked[-1:]] == [full, *asked] and blocks == last
        if last != asked and not at_the_end:
            yield f"with {method}, {last} tokens enter the MLPs", f"{asked}"


def lays_out(trial: Trial) -> Findings:
    """Prefix and suffix tokens are those that do not depend on the image. The others stand on the
    grid row by row."""
    trial.needs_a_sequence()
    run = trial.reduced(Probe(frozenset({"grid"})))
    layout = run.layout
    remove(trial.model)
    image = _image(trial.inputs)
    moved = _moved(trial, image + noise(image, 0)) > 0
    if layout.class_token and not layout.prefix:
        yield "a class token, but no token in front", "a prefix of at least 1"
    end = len(moved) - layout.suffix
    for name, part in (("in front", moved[: layout.prefix]), ("at the end", moved[end:])):
        if bool(part.any()):
            yield (
                f"of {len(part)} tokens {name}, {int(part.sum())} depend on the image",
                "prefix and suffix tokens that are the same for every image",
            )
    for name, at in (("first", layout.prefix), ("last", end - 1)):
        if not moved[at]:
            yield (
                f"behind {layout.prefix} tokens in front and before {layout.suffix} at the end, "
                f"the {name} patch token is the same for every image",
                "patch tokens that depend on the image",
            )
    if layout.raster:
        yield from _stands_on_grid(trial, run, image, end - layout.prefix)


def _stands_on_grid(trial: Trial, run: Reduced, image: Tensor, tokens: int) -> Findings:
    assert isinstance(trial.host, Host)
    shown = run.probe.shown[0].grid
    if image.ndim < 4:  # patches, not pixels: their order is the caller's
        return
    if shown is None and tokens < run.layout.patches:
        return  # the model leaves patches out, so that the others stand on no grid
    size = (int(image.shape[-2]), int(image.shape[-1]))
    grids = {
        "of the layout for these images": trial.host.layout(trial.tower, size).grid,
        "that methods are shown": shown,
    }
    for what, grid in grids.items():
        if grid is None:
            continue
        rows, columns = grid
        if rows * columns != tokens:
            yield f"a grid of {rows}x{columns} {what}", f"{tokens} patch tokens"
            continue
        for edge in ("right", "lower"):
            count = columns if edge == "right" else rows
            if count < 2:
                continue
            moved = _moved(trial, _other_edge(image, edge, count))[run.layout.prefix :][:tokens]
            lines = moved.view(rows, columns) if edge == "right" else moved.view(rows, columns).t()
            if not bool(lines[:, -1].min() > lines[:, 0].max()):
                yield (
                    f"on the grid of {rows}x{columns} {what}, the tokens at the {edge} edge are "
                    f"not those that change with the {edge} edge of the image",
                    "patch tokens that stand row by row",
                )


def _image(inputs: Inputs) -> Tensor:
    try:
        image = pixels(inputs)
    except ValueError as error:
        raise UntriedError(str(error)) from error
    if not image.is_floating_point():
        raise UntriedError(f"images are {image.dtype}, and cannot be changed a little")
    return image


def _other_edge(image: Tensor, edge: str, count: int) -> Tensor:
    """The image with another picture in the last of its `count` columns ("right") or rows
    ("lower")."""
    changed = image.clone()
    height, width = image.shape[-2:]
    if edge == "right":
        part = changed[..., width - width // count :]
    else:
        part = changed[..., height - height // count :, :]
    part += noise(part, 0)
    return changed


def _moved(trial: Trial, image: Tensor) -> Tensor:
    """How much each token in front of the first block changes with another image, [tokens]."""
    inputs, before = trial.inputs, _image(trial.inputs)
    if isinstance(inputs, Mapping):
        changed: Inputs = {name: image if x is before else x for name, x in inputs.items()}
    else:
        changed = image
    moved = trial.run(changed).trace.entered[0][0] - trial.entering
    return moved.float().abs().mean((0, 2))


# What methods are shown


def reads_class_attention(trial: Trial) -> Findings:
    """The class attention that a method sees is what attention has computed: with rotation, masks,
    relative positions, and the sizes of merged tokens."""
    trial.needs_a_sequence()
    for run in trial.reading("class_attention"):
        yield from _attended(run, "in")
    with contextlib.suppress(UntriedError):
        yield from _attended(trial.masked(Probe(trial.signals)), "under a mask, in")


def _attended(run: Reduced, where: str) -> Findings:
    rows = slice(0, 1) if run.layout.class_token else slice(None)
    for shown, paid in run.shown("class_attention"):
        weights = run.patches(paid.weights, 3)[:, :, rows].mean(2)
        if difference := apart(shown.class_attention, weights):
            yield f"{where} block {shown.layer}, {difference}", _PAID
            return


_PAID = "the attention that was computed"


def reads_keys(trial: Trial) -> Findings:
    """The keys that a method sees are those that attention compares, before any rotation."""
    yield from _reads(trial, "key")


def reads_values(trial: Trial) -> Findings:
    """The values that a method sees are those that attention adds up."""
    yield from _reads(trial, "value")


def _reads(trial: Trial, signal: str) -> Findings:
    trial.needs_a_sequence()
    tried = False
    for run in trial.reading(signal):
        for shown, paid in run.shown(signal):
            there: Tensor | None = getattr(paid, signal)
            found: Tensor = getattr(shown, signal)
            if there is None:
                continue
            tried = True
            there = run.patches(there, 2)
            there = there.repeat_interleave(found.shape[1] // there.shape[1], 1)
            difference = apart(found, there)
            if difference and signal == "key" and run.layout.by_position:
                difference = apart(found.norm(dim=-1), there.norm(dim=-1))  # a rotation keeps it
            if difference:
                yield f"in block {shown.layer}, {difference}", f"the {signal}s of attention"
    if not tried:
        raise UntriedError(f"the {signal}s of attention were not seen")


def reads_attention_received(trial: Trial) -> Findings:
    """The attention that tokens have received in the block before, as a method sees it, is what
    attention has computed there."""
    trial.needs_a_sequence()
    run = trial.reduced(Probe(frozenset({"attention_received"}), place="before"))
    for shown in run.probe.shown:
        if shown.layer == 0:
            continue
        weights = run.paid(shown.layer - 1, shown.x.shape[1]).weights
        if shown.attention_received is None:
            yield f"before block {shown.layer}, nothing", _PAID
        elif difference := apart(shown.attention_received, run.patches(weights.sum((1, 2)))):
            yield f"before block {shown.layer}, {difference}", _PAID


# What becomes of tokens


def merges(trial: Trial) -> Findings:
    """With merged tokens, the model computes what the unpatched model does if its attention sees,
    of every merged token, only the first member, as often as it has members. Features are full
    grids of copies."""
    trial.needs_a_sequence()
    for run in (trial.merged, trial.merged_before):
        remove(trial.model)
        yield from _compared(run, trial.run(changes=run.as_changes()))
    if not leaves(trial.dense_features):
        return
    expected = leaves(trial.handed_out(trial.merged.as_changes()))
    trial.reduced(Probe())
    for (path, got), (_, want) in zip(leaves(trial.handed_out()), expected, strict=False):
        # Whether they have the shapes of full grids is another promise.
        if got.shape == want.shape and (difference := apart(got, want)):
            yield f"feature {path}: {difference}", _HIDDEN
            return


def prunes(trial: Trial) -> Findings:
    """With dropped tokens, the model computes for all others what the unpatched model does if its
    attention does not see the dropped ones."""
    trial.needs_a_sequence()
    run = trial.dropped
    remove(trial.model)
    yield from _compared(run, _with_noise(trial, run, Changes()), answers=False)


def follows_masks(trial: Trial) -> Findings:
    """A mask over the full sequence that is given to blocks counts for the tokens that are left,
    wherever they stand now. (Tried where merging and pruning are right.)"""
    trial.needs_a_sequence()
    changes = Changes(masks=trial.mask)
    _needs_right_tokens(trial)
    run = trial.masked(Probe())
    remove(trial.model)
    hidden = trial.run(changes=replace(run.as_changes(), masks=changes.masks))
    yield from _compared(run, hidden)
    with contextlib.suppress(UntriedError):  # merged tokens alone will do
        run = trial.masked(Probe(prunes=True))
        remove(trial.model)
        yield from _compared(run, _with_noise(trial, run, changes), answers=False)


def gates_blocks(trial: Trial) -> Findings:
    """Where gates choose the tokens that go through a block, the others are neither seen nor
    changed in it. (Tried where merging and pruning are right.)"""
    trial.needs_a_sequence()
    _needs_right_tokens(trial)
    chooser = Chooser()
    layout = trial.apply(chooser, trial.fewer).layout
    run = trial.run()
    if not chooser.chosen:
        raise UntriedError("no gate has chosen tokens")
    remove(trial.model)

    def around(layer: int, value: float) -> Tensor:
        return F.pad(chooser.chosen[layer], (layout.prefix, layout.suffix), value=value)

    def bias(layer: int, batch: int) -> Tensor | None:
        return around(layer, 1.0).log() if layer in chooser.chosen else None

    def behind(layer: int, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(around(layer, 1.0)[..., None] > 0, y, x)

    hidden = trial.run(changes=Changes(bias, behind))
    found = [*run.tokens, *leaves(run.outputs)]
    wanted = [*hidden.tokens, *leaves(hidden.outputs)]
    for (path, got), (_, want) in zip(found, wanted, strict=True):
        if difference := apart(got, want):
            yield (
                f"{path or 'the output'}: {difference}",
                "what the unpatched model computes if attention does not see the others",
            )
            return


def _needs_right_tokens(trial: Trial) -> None:
    for name in ("merging", "pruning"):
        if verdict_on(name, trial).broken:
            raise UntriedError(f"{name} is not right, either")


def merges_equal_tokens(trial: Trial) -> Findings:
    """Where equal tokens are merged, the answer is the unpatched model's."""
    trial.needs_a_sequence()
    if trial.equal is None:
        raise UntriedError("no inputs with equal patches were given")
    remove(trial.model)
    run = trial.run(trial.equal)
    assert isinstance(trial.host, Host)
    layout = trial.host.layout(trial.tower, None)
    patches = run.trace.entered[0][0].shape[1] - layout.others
    counts = [max(2, patches // 2), *[max(2, patches // 4)] * (layout.layers - 1)]
    counts[-1] = 2
    trial.apply(Equals(), Exactly(tuple(counts)))
    merged = leaves(trial.answer(trial.equal))
    for (path, got), (_, want) in zip(merged, leaves(run.outputs), strict=True):
        if difference := apart(got, want):
            yield f"{path or 'the output'}: {difference}", "the unpatched model's"


_HIDDEN = "what the unpatched model computes if attention does not see tokens that are gone"


def _compared(run: Reduced, hidden: Run, answers: bool = True) -> Findings:
    """The first difference between the patched model and the unpatched one, in which tokens are
    hidden."""
    found, wanted = run.left_of(run), run.left_of(hidden)
    if answers:
        found += [(f"output {path}", one) for path, one in leaves(run.outputs)]
        wanted += [(f"output {path}", one) for path, one in leaves(hidden.outputs)]
    if len(found) != len(wanted):
        yield f"{len(found)} tensors", f"{len(wanted)}"
    for (path, got), (_, want) in zip(found, wanted, strict=False):
        if difference := apart(got, want):
            yield f"{path}: {difference}", _HIDDEN
            return


def _with_noise(trial: Trial, run: Reduced, changes: Changes) -> Run:
    """The unpatched model, in which attention does not see dropped tokens, and noise takes their
    places.

    Raises:
        UntriedError: they have a part in what becomes of the others all the same.
    """
    hidden, again = (
        trial.run(changes=replace(run.as_changes(seed), masks=changes.masks)) for seed in (0, 1)
    )
    pairs = zip(run.left_of(hidden), run.left_of(again), strict=True)
    if any(apart(one, other) for (_, one), (_, other) in pairs):
        raise UntriedError("the model mixes tokens between its blocks, dropped ones, too")
    return hidden


# What leaves the model


def ignores_dropped(trial: Trial) -> Findings:
    """What a model says of whole images does not depend on what stands in the places of dropped
    tokens, whatever its head pools."""
    trial.needs_a_sequence()
    wanted = _of_images(trial, trial.dropped.outputs)
    if not wanted:
        raise UntriedError("the model says nothing of whole images")
    noisy = trial.reduced(Probe(prunes=True, noisy=True))
    for (path, got), (_, want) in zip(_of_images(trial, noisy.outputs), wanted, strict=True):
        if difference := apart(got, want):
            yield (
                "with noise in the places of dropped tokens, "
                f"{path or 'the output'} is {difference}",
                "the same answer, whatever stands there",
            )


def hands_out_few(trial: Trial) -> Findings:
    """With `full_grid=False`, features keep their width and dtype, and what the model says of whole
    images stays the same. (Where the rest of a model cannot do without the full grid, only what
    leaves its tower is looked at.)"""
    trial.needs_a_sequence()
    remove(trial.model)
    _, dense_left = _leaving(trial)
    for method in trial.accepted(trial.fewer, full_grid=False):
        found, left = _leaving(trial)
        pairs = [(left, dense_left)]
        if found is not None:
            pairs.append((leaves(found), leaves(trial.dense)))
            if leaves(trial.dense_features):
                pairs.append((leaves(trial.handed_out()), leaves(trial.dense_features)))
        gone = _tokens_gone(trial)
        for got, want in pairs:
            yield from _narrower(method, got, want, gone)
        if found is None:
            continue
        trial.apply(method, trial.fewer)
        whole = _of_images(trial, trial.answer())
        for (path, one), (_, other) in zip(_of_images(trial, found), whole, strict=False):
            if difference := apart(one, other, 10):
                yield (
                    f"with {method}, {path or 'the output'} is {difference}",
                    "the same as with full_grid=True",
                )


def _of_images(trial: Trial, outputs: Any) -> Leaves:
    """What a model says of whole images."""
    if trial.scores is not None:
        return leaves(trial.scores(outputs))
    batch = len(_image(trial.inputs))
    names = ["logits_per_image", "image_embeds"]
    if not isinstance(trial.inputs, Mapping) or "input_ids" not in trial.inputs:
        names += ["logits", "pooler_output"]  # else they may be of text
    return [
        (path, one)
        for path, one in leaves(outputs)
        if one.ndim == 2
        and len(one) == batch
        and (not isinstance(outputs, Mapping) or path.split(".")[-1] in names)
    ]


def _leaving(trial: Trial) -> tuple[Any, Leaves]:
    """The answer of the model, None if what stands behind the tower raises; and what has left the
    tower."""
    left: Leaves = []

    def leave(module: Any, args: Any, output: Any) -> None:
        left.extend(leaves(output))  # now: the rest of the model may change it

    hook = trial.tower.register_forward_hook(leave)
    try:
        return trial.answer(), left
    except Exception:
        if trial.tower is trial.model or not left:
            raise
        return None, left
    finally:
        hook.remove()


def _tokens_gone(trial: Trial) -> set[int]:
    """How many tokens may be missing, in front of any block or behind the last one, under
    `fewer`."""
    layout = reduction_of(trial.model).layout
    full = trial.entering.shape[1] - layout.others
    return {0, *(full - count for count in trial.fewer(full, layout.layers))}


def _narrower(method: Any, found: Leaves, dense: Leaves, gone: set[int]) -> Findings:
    """The first of the features that came out reduced in which more than tokens is missing."""
    if len(found) != len(dense):
        yield f"with {method}, {len(found)} tensors", f"{len(dense)}"
    for (path, got), (_, want) in zip(found, dense, strict=False):
        what = f"with {method}, {path or 'the output'}"
        if got.dtype != want.dtype:
            yield f"{what} is {got.dtype}", f"{want.dtype}"
            return
        right = got.shape == want.shape
        if want.ndim == got.ndim == 3:  # tokens
            right = got.shape[::2] == want.shape[::2] and want.shape[1] - got.shape[1] in gone
        elif want.ndim == 4 and got.ndim == 3:  # tokens, which are no map any more
            right = got.shape[2] in (want.shape[1], want.shape[3])
        if not right:
            yield (
                f"{what} has shape {list(got.shape)}",
                f"fewer tokens, but the width of {list(want.shape)}",
            )
            return


def leaves_no_trace(trial: Trial) -> Findings:
    """After `tokred.remove`, the model is what it was: its answer, its weights, what hangs on its
    modules."""
    dense = leaves(trial.dense)
    before, weights = trial.hung, list(trial.model.state_dict())
    for method in trial.accepted(0.5):
        trial.answer()
        if list(trial.model.state_dict()) != weights:
            yield f"with {method}, another state dict", "the unpatched model's"
        remove(trial.model)
        after = hanging_on(trial.model)
        changed = [one[0] for one, other in zip(after, before, strict=False) if one != other]
        if after != before:
            yield f"after {method}, something is left at {changed[:3]}", "nothing"
        if not same(leaves(trial.answer()), dense):
            yield f"after {method}, another answer", "the unpatched model's, to the last bit"


PROMISES: dict[str, Callable[[Trial], Findings]] = {
    "keep_rate=1": keeps_everything,
    "token counts": counts_tokens,
    "layout": lays_out,
    "class attention": reads_class_attention,
    "keys": reads_keys,
    "values": reads_values,
    "attention received": reads_attention_received,
    "merging": merges,
    "pruning": prunes,
    "masks": follows_masks,
    "gates": gates_blocks,
    "dropped tokens": ignores_dropped,
    "full_grid=False": hands_out_few,
    "outputs": keeps_structure,
    "half precision": runs_in_half,
    "equal tokens": merges_equal_tokens,
    "removal": leaves_no_trace,
}
"""Every promise, by its name."""
