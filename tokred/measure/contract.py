"""What a patch promises of a model, and whether it keeps it.

>>> from tokred.measure import contract
>>> model = contract.lively(timm.create_model("deit_tiny_patch16_224", depth=4)).eval()
>>> for broken in contract.check(model, torch.randn(2, 3, 224, 224)):
...     print(broken)

Every promise is a function in `PROMISES`. None of them asks the patch or the engine what is right:
each compares the patched model with the unpatched one, whose attention is watched, and where needed
changed, from outside (see `tokred.measure.watching`). The tokens to merge or drop are drawn at
random (see `tokred.measure.probing`), so that a token's number says nothing about its position.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tokred.data.inputs import Inputs, call, pixels
from tokred.engine import Layout
from tokred.host import (
    Denoiser,
    Host,
    Stage,
    UnsupportedModelError,
    WindowedHost,
    find_denoiser,
    find_host,
)
from tokred.maps import take
from tokred.measure.probing import Probe, Standing, noise
from tokred.measure.watching import Changes, Paid, Trace, mask_of, watching
from tokred.patching import apply, reduction_of, remove
from tokred.reducers.atc import ATC
from tokred.reducers.slic import SLIC
from tokred.schedule import Exactly, Shares, Stages

Features = Callable[[Any, Inputs], Any]
"""What a model hands out besides its answer, in any structure."""

Scores = Callable[[Any], Any]
"""What the outputs of a model say of whole images, in any structure."""


@dataclass(frozen=True)
class Broken:
    """A promise that a patch does not keep.

    Attributes:
        promise: its name in `PROMISES`.
        seen: what was seen.
        expected: what should have been seen.
    """

    promise: str
    seen: str
    expected: str

    def __str__(self) -> str:
        return f"{self.promise}: {self.seen}; expected: {self.expected}"


@dataclass(frozen=True)
class Verdict:
    """What was found out about one promise.

    Attributes:
        promise: its name in `PROMISES`.
        broken: in which ways it is not kept; empty if it is, or could not be tried.
        untried: why it could not be tried; None if it was.
    """

    promise: str
    broken: tuple[Broken, ...] = ()
    untried: str | None = None


def check(
    model: nn.Module,
    inputs: Inputs,
    host: Host | WindowedHost | None = None,
    *,
    features: Features | None = None,
    scores: Scores | None = None,
    equal: Inputs | None = None,
    promises: Iterable[str] | None = None,
) -> list[Broken]:
    """Tries a model with its patch, and says which promises the patch does not keep. An exception
    in a run of the patched model is a broken promise, too. The model is left as it was.

    A promise for which the patch refuses the model (`tokred.apply` raises `UnsupportedModelError`)
    is not broken. `examine` tells which ones could not be tried.

    Args:
        model: the model, without a reduction, in evaluation mode. In weights as they are
            initialised, many mistakes do not show: see `lively`.
        inputs: what to call it with: two images or more.
        host: the patch; found from the class of the model if not given.
        features: what the model hands out besides its answer; if not given, what models of timm
            and transformers do.
        scores: what the outputs say of whole images; if not given, what is [batch, numbers] of an
            output, or of one with names, what is called logits, embeddings or the output of a
            pooler.
        equal: inputs in which every patch of an image shows one of two pictures, if the model tells
            no position from another: merging equal tokens has to give the same answer then.
        promises: which promises to try; all, if not given.

    Raises:
        UnsupportedModelError: no patch knows the model.
        ValueError: the model is training, or has a reduction; or there is no such promise.
    """
    verdicts = examine(
        model, inputs, host, features=features, scores=scores, equal=equal, promises=promises
    )
    return [broken for verdict in verdicts for broken in verdict.broken]


def examine(
    model: nn.Module,
    inputs: Inputs,
    host: Host | WindowedHost | None = None,
    *,
    features: Features | None = None,
    scores: Scores | None = None,
    equal: Inputs | None = None,
    promises: Iterable[str] | None = None,
) -> list[Verdict]:
    """The same as `check`, promise by promise, with the reason for each that could not be tried.
    See there for arguments and errors."""
    names = list(PROMISES if promises is None else promises)
    for name in names:
        if name not in PROMISES:
            raise ValueError(f"promises must be some of {', '.join(PROMISES)}, not {name!r}")
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in evaluation mode: call model.eval() first")
    if reduction_of(model) is not None:
        raise ValueError("model has a reduction already: call tokred.remove(model) first")
    denoiser = find_denoiser(model) if host is None else None
    found, tower = (denoiser, model) if denoiser else find_host(model, host)
    given = features or handed_out
    trial = Trial(model, inputs, host, found, tower, given, scores, equal)
    assert trial.hung  # seen before anything is tried
    return [_verdict(name, trial) for name in names]


def lively(model: nn.Module) -> nn.Module:
    """Draws all parameters away from values such as 0, 1 and 1e-5, so that a patch that leaves one
    out, or counts it twice, gives another answer. In place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim < 2 or name.endswith(("gamma", "lambda1", "lambda_1", "lambda_2")):
                parameter.uniform_(0.1, 0.5) if "bias" not in name else parameter.normal_(std=0.1)
            elif name.endswith("weight"):  # small ones make every attention the same average
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.5)
    return model


def handed_out(model: Any, inputs: Inputs) -> Any:
    """What models of timm and of transformers hand out besides their answer: intermediate features,
    hidden states."""
    if hasattr(model, "config") and isinstance(inputs, Mapping):
        return model(**inputs, output_hidden_states=True)
    found = []
    if hasattr(model, "forward_features"):
        found.append(model.forward_features(inputs))
    if hasattr(model, "forward_intermediates"):
        found.append(model.forward_intermediates(inputs, intermediates_only=True))
    return found


# ---- how promises are tried


class _UntriedError(Exception):
    """A promise cannot be tried on this model; the message says why."""


def _verdict(name: str, trial: Trial) -> Verdict:
    """Tries a promise; what was found out is kept for others to ask."""
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
    except _UntriedError as reason:
        untried = str(reason)
    except Exception as error:  # whatever it is, the patched model should not have raised it
        broken.append(Broken(name, said(error), "no exception"))
    finally:
        remove(trial.model)
    return Verdict(name, tuple(broken), None if broken else untried)


def said(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@dataclass(frozen=True)
class Run:
    """One run of the model.

    Attributes:
        outputs: what it returned.
        trace: what was seen of its blocks.
        probe: the method that was applied, if it was a probe.
        layout: the layout that the patch gives.
        averages: whether the patch says that tokens are averaged outside of the tower.
    """

    outputs: Any
    trace: Trace
    probe: Probe = field(default_factory=Probe)
    layout: Layout | None = None
    averages: bool = False


@dataclass(frozen=True)
class Trial:
    """A model, and the runs that several promises look at. Each is made once.

    Attributes:
        model: the model.
        inputs: what it is called with.
        given: the host that was given, if one was.
        host: the host, one stage of it, or the denoiser.
        tower: the part of the model that it is for.
        features: what the model hands out besides its answer.
        scores: what outputs say of whole images; None for what can be told from their shapes.
        equal: inputs with equal patches, if there are any.
        verdicts: what was found out so far.
    """

    model: nn.Module
    inputs: Inputs
    given: Host | WindowedHost | None
    host: Host | Stage | Denoiser
    tower: nn.Module
    features: Features
    scores: Scores | None
    equal: Inputs | None
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def windowed(self) -> bool:
        """Whether blocks attend in windows."""
        return isinstance(self.host, Stage)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order; none of a denoiser, whose modules are not all of one kind."""
        return () if isinstance(self.host, Denoiser) else self.host.blocks(self.tower)

    @property
    def methods(self) -> list[Any]:
        """A method that merges, and one that drops; of a model in windows or a denoiser, one that
        it can have."""
        if isinstance(self.host, Denoiser):
            return ["tome"]
        if self.windowed:
            return [SLIC(tau=5.0)]
        return [Probe(), Probe(prunes=True)]

    @property
    def fewer(self) -> Any:
        """A keep rate or a schedule for `methods`, under which tokens become fewer."""
        return self.shares(0) if isinstance(self.host, Host) else 0.5

    def shares(self, first: int) -> Shares:
        """Three quarters of the tokens from layer `first` on, half of them half-way behind it."""
        layers = len(self.blocks)
        first = min(first, layers - 1)
        second = max(first + 1, first + layers // 2)
        return Shares(
            tuple(1.0 if at < first else 0.75 if at < second else 0.5 for at in range(layers))
        )

    def apply(self, method: Any, keep_rate: Any, **options: Any) -> Any:
        """Puts a method into the model.

        Raises:
            _UntriedError: the patch refuses that.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nothing is reduced
            try:
                return apply(self.model, method, keep_rate, host=self.given, **options)
            except UnsupportedModelError as error:
                raise _UntriedError(str(error)) from error

    def answer(self, inputs: Inputs | None = None) -> Any:
        """What the model, as it is now, returns."""
        return _called(call, self.model, self.inputs if inputs is None else inputs)

    def run(self, inputs: Inputs | None = None, changes: Changes | None = None) -> Run:
        """The same, watched."""
        with watching(self.blocks, changes) as trace:
            outputs = self.answer(inputs)
        return Run(outputs, trace)

    def reduced(self, probe: Probe, changes: Changes | None = None, full_grid: bool = True) -> Run:
        """Runs the model with fewer tokens from two of its layers on.

        Raises:
            _UntriedError: the patch refuses that, or does not do it, which is for `counts_tokens`
                to say.
        """
        reduction = self.apply(probe, self.shares(0 if probe.place == "between" else 1))
        run = self.run(changes=changes)
        if not probe.calls:
            raise _UntriedError("no tokens were merged or dropped")
        return replace(run, probe=probe, layout=reduction.layout, averages=reduction.averages)

    @cached_property
    def dense(self) -> Any:
        """The answer of the unpatched model."""
        remove(self.model)
        return self.answer()

    @cached_property
    def hung(self) -> list[tuple[str, type, list[str], int]]:
        """What hangs on the modules of the unpatched model, also of what its library hangs there
        when features are asked for."""
        _ = self.dense_features
        return _hung(self.model)

    @cached_property
    def entering(self) -> Tensor:
        """The tokens that enter the first block, the same in both."""
        remove(self.model)
        return self.run().trace.entered[0][0]

    @cached_property
    def dense_features(self) -> Any:
        """What the unpatched model hands out; None if it does not."""
        remove(self.model)
        try:
            return self.handed_out()
        except Exception:  # the unpatched model's own word on that it has no such features
            return None

    def handed_out(self, changes: Changes | None = None) -> Any:
        """What the model, as it is now, hands out besides its answer."""
        if changes is None:
            return _called(self.features, self.model, self.inputs)
        with watching(self.blocks, changes):
            return _called(self.features, self.model, self.inputs)

    @cached_property
    def unread(self) -> dict[str, str]:
        """The signals that the patch cannot read, and why."""
        reasons = {}
        for signal in ("class_attention", "key", "value"):
            try:
                self.apply(Probe(frozenset({signal})), 0.5)
            except _UntriedError as reason:
                reasons[signal] = str(reason)
        return reasons

    @property
    def signals(self) -> frozenset[str]:
        """The signals that it can read."""
        return frozenset({"class_attention", "key", "value"} - self.unread.keys())

    @cached_property
    def read(self) -> list[Run]:
        """With a probe that reads all signals that the patch can read: of merged tokens and, if
        that can be had, of dropped ones."""
        runs = [self.reduced(Probe(self.signals))]
        with contextlib.suppress(_UntriedError):
            runs.append(self.reduced(Probe(self.signals, prunes=True)))
        return runs

    def masked(self, probe: Probe) -> Run:
        """The same as `reduced`, where every block is given `mask`.

        Raises:
            _UntriedError: the patch, or the model, takes no mask.
        """
        changes = Changes(masks=self.mask)
        try:
            return self.reduced(probe, changes)
        except ValueError as error:
            raise _UntriedError(f"masks are refused: {error}") from error

    @cached_property
    def mask(self) -> Callable[[int, Tensor], Tensor]:
        """A mask over queries and keys of the full sequence that the unpatched model can be given,
        in every block another.

        Raises:
            _UntriedError: it takes none.
        """
        if any(mask_of(block) is None for block in self.blocks):
            raise _UntriedError("the blocks take no mask")
        full = self.entering.shape[1]

        def drawn(layer: int, x: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(layer)
            return 2 * torch.randn(1, 1, full, full, generator=generator).to(x)

        remove(self.model)
        try:
            self.run(changes=Changes(masks=drawn))
        except Exception as error:
            raise _UntriedError(f"the unpatched model takes no mask: {said(error)}") from error
        return drawn

    @cached_property
    def merged(self) -> Run:
        """With merged tokens."""
        return self.reduced(Probe())

    @cached_property
    def merged_before(self) -> Run:
        """The same, by a method that stands before the block."""
        return self.reduced(Probe(place="before"))

    @cached_property
    def dropped(self) -> Run:
        """With dropped tokens."""
        return self.reduced(Probe(prunes=True))


def _called(function: Callable[..., Any], *args: Any) -> Any:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.no_grad(), torch.random.fork_rng(devices):
        # Some models draw masks.
        torch.default_generator.manual_seed(1)
        if devices:
            torch.cuda.manual_seed_all(1)
        return function(*args)


Findings = Iterator[tuple[str, str]]
"""What was seen, and what is expected, for everything that is not as promised."""


# ---- the promises


def keeps_everything(trial: Trial) -> Findings:
    """With `keep_rate=1`, the answer and the features are the unpatched model's to the last bit."""
    dense, features = leaves(trial.dense), leaves(trial.dense_features)
    expected = "the unpatched model's, to the last bit"
    for method in _accepted(trial, lambda method: trial.apply(method, 1.0)):
        what = f"with keep_rate=1 and {method}"
        if not same(leaves(trial.answer()), dense):
            yield f"{what}, another answer", expected
        if features and not same(leaves(trial.handed_out()), features):
            yield f"{what}, other features", expected


def counts_tokens(trial: Trial) -> Findings:
    """Exactly as many tokens as the schedule says enter the MLP of every block (or, where a block
    reduces at its end, the block behind it)."""
    _needs_a_sequence(trial)
    remove(trial.model)
    full = entered(trial.blocks, trial.model, trial.inputs)[0][0]
    schedule = Stages(0.5)
    for method in _accepted(trial, lambda method: trial.apply(method, schedule)):
        layout = reduction_of(trial.model).layout
        counts = schedule(full - layout.others, layout.layers)
        asked = [count + layout.others for count in counts]
        blocks, last = entered(trial.blocks, trial.model, trial.inputs)
        between = [*last, *asked[-1:]] == [full, *asked] and blocks == last
        if last != asked and not between:
            yield f"with {method}, {last} tokens enter the MLPs", f"{asked}"


def lays_out(trial: Trial) -> Findings:
    """Prefix and suffix tokens are those that do not depend on the image; the others stand on the
    grid row by row."""
    _needs_a_sequence(trial)
    run = trial.reduced(Probe(frozenset({"grid"})))
    layout = run.layout
    assert layout is not None and isinstance(trial.host, Host)
    remove(trial.model)
    image = _image(trial.inputs)
    dense = trial.entering
    moved = _moved(trial, image + noise(image, 0)) > 0
    if layout.class_token and not layout.prefix:
        yield "a class token, but no token in front", "a prefix of at least 1"
    end = dense.shape[1] - layout.suffix
    for name, part in (("front", moved[: layout.prefix]), ("the end", moved[end:])):
        if bool(part.any()):
            yield (
                f"of {len(part)} tokens at {name}, {int(part.sum())} depend on the image",
                "tokens that are never touched to be the same for every image",
            )
    for name, at in (("first", layout.prefix), ("last", end - 1)):
        if not moved[at]:
            yield (
                f"the {name} patch token is the same for every image",
                f"{layout.prefix} tokens in front and {layout.suffix} at the end to be all of them",
            )
    if layout.raster:
        yield from _stands_on_grid(trial, run, image, end - layout.prefix)


def _stands_on_grid(trial: Trial, run: Run, image: Tensor, tokens: int) -> Findings:
    assert isinstance(trial.host, Host) and run.layout is not None
    if image.ndim < 4:  # patches, not pixels: their order is the caller's
        return
    height, width = image.shape[-2:]
    grids = {
        "of the layout, for these images": trial.host.layout(trial.tower, (height, width)).grid,
        "that methods are shown": run.probe.shown[0].grid,
    }
    if run.probe.shown[0].grid is None and tokens < run.layout.patches:
        return  # the model leaves patches out, so that the others stand on no grid
    for what, grid in grids.items():
        if grid is None:
            continue
        rows, columns = grid
        if rows * columns != tokens:
            yield f"a grid of {rows}x{columns} {what}", f"{tokens} patch tokens"
            continue
        for side, many, across in (("right", columns, True), ("lower", rows, False)):
            if many < 2:
                continue
            strip = image.clone()
            part = strip[..., -(width // many) :] if across else strip[..., -(height // many) :, :]
            part += noise(part, 0)
            moved = _moved(trial, strip)[run.layout.prefix :][:tokens].view(rows, columns)
            moved = moved if across else moved.t()
            if not bool(moved[:, -1].min() > moved[:, 0].max()):
                yield (
                    f"on the grid of {rows}x{columns} {what}, another picture at the {side} edge "
                    f"does not change the tokens at the {side} edge most",
                    "patch tokens to stand row by row",
                )


def reads_class_attention(trial: Trial) -> Findings:
    """The class attention that a method sees is what attention has computed: with rotation, masks,
    relative positions, and the sizes of merged tokens."""
    _needs_a_sequence(trial)
    for run in _runs(trial, "class_attention"):
        yield from _attended(run, "in")
    with contextlib.suppress(_UntriedError):
        yield from _attended(trial.masked(Probe(trial.signals)), "under a mask, in")


def _attended(run: Run, where: str) -> Findings:
    layout = run.layout
    assert layout is not None
    rows = slice(0, 1) if layout.class_token else slice(None)
    for shown, paid in _shown(run, "class_attention"):
        weights = _patches(layout, paid.weights, 3)[:, :, rows].mean(2)
        if difference := apart(shown.class_attention, weights):
            yield f"{where} block {shown.layer}, {difference}", _PAID
            return


_PAID = "the attention that was computed"


def reads_keys(trial: Trial) -> Findings:
    """The keys that a method sees are those that attention compares, before any rotation."""
    yield from _read(trial, "key")


def reads_values(trial: Trial) -> Findings:
    """The values that a method sees are those that attention adds up."""
    yield from _read(trial, "value")


def _read(trial: Trial, signal: str) -> Findings:
    _needs_a_sequence(trial)
    tried = False
    for run in _runs(trial, signal):
        assert run.layout is not None
        for shown, paid in _shown(run, signal):
            there: Tensor | None = getattr(paid, signal)
            found: Tensor = getattr(shown, signal)
            if there is None:
                continue
            tried = True
            there = _patches(run.layout, there, 2)
            there = there.repeat_interleave(found.shape[1] // there.shape[1], 1)
            difference = apart(found, there)
            if difference and signal == "key" and run.layout.by_position:
                difference = apart(found.norm(dim=-1), there.norm(dim=-1))  # a rotation keeps it
            if difference:
                yield f"in block {shown.layer}, {difference}", f"the {signal}s of attention"
    if not tried:
        raise _UntriedError(f"the {signal}s of attention were not seen")


def reads_attention_received(trial: Trial) -> Findings:
    """The attention that tokens have received in the block before, as a method sees it, is what
    attention has computed there."""
    _needs_a_sequence(trial)
    run = trial.reduced(Probe(frozenset({"attention_received"}), place="before"))
    assert run.layout is not None
    for shown in run.probe.shown:
        if shown.layer == 0:
            continue
        paid = _paid(run.trace, shown.layer - 1, shown.x.shape[1] + run.layout.others)
        received = _patches(run.layout, paid.weights.sum((1, 2)))
        if shown.attention_received is None:
            yield f"before block {shown.layer}, nothing", _PAID
        elif difference := apart(shown.attention_received, received):
            yield f"before block {shown.layer}, {difference}", _PAID


def merges(trial: Trial) -> Findings:
    """A model with merged tokens computes what the unpatched model does whose attention sees each
    merged token where its first member stands, as often as it has members, and nothing else. Its
    features are full grids of copies."""
    _needs_a_sequence(trial)
    for run in (trial.merged, trial.merged_before):
        remove(trial.model)
        changes = _as_reduced(run)
        yield from _compared(run, trial.run(changes=changes))
    if not leaves(trial.dense_features):
        return
    expected = leaves(trial.handed_out(_as_reduced(trial.merged)))
    trial.reduced(Probe())
    for (path, got), (_, want) in zip(leaves(trial.handed_out()), expected, strict=False):
        # Whether they have the shapes of full grids is another promise.
        if got.shape == want.shape and (difference := apart(got, want)):
            yield f"feature {path}: {difference}", _HIDDEN
            return


def prunes(trial: Trial) -> Findings:
    """A model with dropped tokens computes, for the others, what the unpatched model does in which
    attention does not see them."""
    _needs_a_sequence(trial)
    run = trial.dropped
    remove(trial.model)
    yield from _compared(run, _with_noise(trial, run, Changes()), answers=False)


def follows_masks(trial: Trial) -> Findings:
    """A mask of the full sequence that blocks are given counts for the tokens that are left,
    wherever they stand now. (Tried only where tokens are right without a mask.)"""
    _needs_a_sequence(trial)
    changes = Changes(masks=trial.mask)
    if any(_verdict(name, trial).broken for name in ("merging", "pruning")):
        raise _UntriedError("tokens are not right without a mask, either")
    run = trial.masked(Probe())
    remove(trial.model)
    hidden = trial.run(changes=replace(_as_reduced(run), masks=changes.masks))
    yield from _compared(run, hidden)
    with contextlib.suppress(_UntriedError):  # merged tokens alone will do
        run = trial.masked(Probe(prunes=True))
        remove(trial.model)
        yield from _compared(run, _with_noise(trial, run, changes), answers=False)


def _with_noise(trial: Trial, run: Run, changes: Changes) -> Run:
    """The unpatched model, in which attention does not see dropped tokens, and noise takes their
    places.

    Raises:
        _UntriedError: they have a part in what becomes of the others all the same.
    """
    hidden, again = (
        trial.run(changes=replace(_as_reduced(run, noise), masks=changes.masks)) for noise in (0, 1)
    )
    pairs = zip(_tokens(run, hidden.trace), _tokens(run, again.trace), strict=True)
    if any(apart(one, other) for (_, one), (_, other) in pairs):
        raise _UntriedError("the model mixes tokens between its blocks, dropped ones, too")
    return hidden


def ignores_dropped(trial: Trial) -> Findings:
    """What a model says of whole images does not depend on what stands in the places of dropped
    tokens, whatever its head pools."""
    _needs_a_sequence(trial)
    wanted = _of_images(trial, trial.dropped.outputs)
    if not wanted:
        raise _UntriedError("the model says nothing of whole images")
    noisy = trial.reduced(Probe(prunes=True, noisy=True))
    for (path, got), (_, want) in zip(_of_images(trial, noisy.outputs), wanted, strict=True):
        if difference := apart(got, want):
            yield (
                f"with noise in the places of dropped tokens, {path}: {difference}",
                "the same answer, whatever stands there",
            )


def hands_out_few(trial: Trial) -> Findings:
    """With `full_grid=False`, features keep their width and dtype, and what the model says of whole
    images stays the same. (Where the rest of a model cannot do without the full grid, what leaves
    its tower is looked at.)"""
    _needs_a_sequence(trial)
    schedule = trial.fewer
    remove(trial.model)
    _, whole_left = _leaving(trial)
    for method in _accepted(trial, lambda method: trial.apply(method, schedule, full_grid=False)):
        found, left = _leaving(trial)
        pairs = [(left, whole_left)]
        if found is not None:
            pairs.append((found, trial.dense))
            if leaves(trial.dense_features):
                pairs.append((trial.handed_out(), trial.dense_features))
        allowed = _token_counts(trial)
        for got, want in pairs:
            yield from _narrower(method, leaves(got), leaves(want), allowed)
        if found is None:
            continue
        trial.apply(method, schedule)
        whole = _of_images(trial, trial.answer())
        for (path, one), (_, other) in zip(_of_images(trial, found), whole, strict=False):
            if difference := apart(one, other, 10):
                yield (
                    f"with {method}, {path or 'the output'} is {difference}",
                    "the same as with full_grid=True",
                )


def _leaving(trial: Trial) -> tuple[Any, list[Any]]:
    """The answer of the model, None if what stands behind the tower raises; and what has left the
    tower."""
    left: list[Any] = []
    hook = trial.tower.register_forward_hook(lambda module, args, output: left.append(output))
    try:
        return trial.answer(), left
    except Exception:
        if trial.tower is trial.model or not left:
            raise
        return None, left
    finally:
        hook.remove()


def _token_counts(trial: Trial) -> Mapping[int, set[int]]:
    """What may become of so many tokens, the patches alone or all of a sequence, under `fewer`."""
    layout = reduction_of(trial.model).layout
    full = trial.entering.shape[1] - layout.others
    counts = {full, *trial.fewer(full, layout.layers)}
    return {full: counts, full + layout.others: {count + layout.others for count in counts}}


def _narrower(
    method: Any,
    found: list[tuple[str, Tensor]],
    dense: list[tuple[str, Tensor]],
    allowed: Mapping[int, set[int]],
) -> Findings:
    """What is wrong with features that came out reduced."""
    if len(found) != len(dense):
        yield f"with {method}, {len(found)} tensors", f"{len(dense)}"
    for (path, got), (_, want) in zip(found, dense, strict=False):
        what = f"with {method}, {path or 'the output'}"
        if got.dtype != want.dtype:
            yield f"{what} is {got.dtype}", f"{want.dtype}"
            return
        sizes = [*got.shape], [*want.shape]
        right = sizes[0] == sizes[1]
        if want.ndim == got.ndim == 3:  # tokens
            right = got.shape[::2] == want.shape[::2] and (
                got.shape[1] == want.shape[1] or got.shape[1] in allowed.get(want.shape[1], ())
            )
        elif want.ndim == 4 and got.ndim == 3:  # tokens, which are no map any more
            right = got.shape[2] in (want.shape[1], want.shape[3])
        if not right:
            yield f"{what} has shape {sizes[0]}", f"fewer tokens, but the width of {sizes[1]}"
            return


def keeps_structure(trial: Trial) -> Findings:
    """Outputs and features have the types, names, numbers, shapes and dtypes of the unpatched
    model's; they are finite, and another answer than the unpatched model's."""
    for method in _accepted(trial, lambda method: trial.apply(method, trial.fewer)):
        # Where dropped tokens could not be told apart any more, they are left out.
        averages = getattr(reduction_of(trial.model), "averages", False)
        fewer = averages and getattr(method, "prunes", False)
        found = trial.answer()
        yield from _restructured(method, structure(found), structure(trial.dense), fewer)
        yield from _another(method, leaves(found), leaves(trial.dense))
        if leaves(trial.dense_features):
            features = structure(trial.handed_out())
            yield from _restructured(method, features, structure(trial.dense_features), fewer)


def _restructured(
    method: Any, found: Mapping[str, str], dense: Mapping[str, str], fewer: bool
) -> Findings:
    for path in sorted(found.keys() | dense.keys()):
        one, other = found.get(path, "nothing"), dense.get(path, "nothing")
        if one != other and not (fewer and one.split("[")[0] == other.split("[")[0]):
            yield f"with {method}, {path or 'the output'} is {one}", other
            return


def _another(
    method: Any, found: list[tuple[str, Tensor]], dense: list[tuple[str, Tensor]]
) -> Findings:
    pairs = [(path, one, other) for (path, one), (_, other) in zip(found, dense, strict=False)]
    for path, one, other in pairs:
        if one.shape == other.shape and bool((other.isfinite() & ~one.isfinite()).any()):
            yield f"with {method}, {path} is not finite", "finite numbers"
    if all(apart(one, other, 0.1) is None for _, one, other in pairs):
        yield f"with {method}, the unpatched model's answer", "another one, of fewer tokens"


def runs_in_half(trial: Trial) -> Findings:
    """In bfloat16, the model runs, and outputs have the types, shapes and dtypes of the unpatched
    model's."""
    inputs = trial.inputs
    if isinstance(inputs, Mapping):
        inputs = {name: _halved(x) for name, x in inputs.items()}
    else:
        inputs = _halved(inputs)
    model = copy.deepcopy(trial.model).to(torch.bfloat16)
    tower = model if isinstance(trial.host, Denoiser) else find_host(model, trial.given)[1]
    half = replace(trial, model=model, tower=tower, inputs=inputs, verdicts={})
    try:
        dense = structure(half.answer())
    except Exception as error:
        raise _UntriedError(f"the unpatched model does not run: {said(error)}") from error
    for method in _accepted(half, lambda method: half.apply(method, half.fewer)):
        averages = getattr(reduction_of(model), "averages", False)
        fewer = averages and getattr(method, "prunes", False)
        yield from _restructured(method, structure(half.answer()), dense, fewer)


def _halved(x: Any) -> Any:
    return x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x


def merges_equal_tokens(trial: Trial) -> Findings:
    """Where equal tokens are merged, the answer is the unpatched model's."""
    _needs_a_sequence(trial)
    if trial.equal is None:
        raise _UntriedError("no inputs with equal patches were given")
    remove(trial.model)
    dense = leaves(trial.answer(trial.equal))
    layers = len(trial.blocks)
    schedule = Exactly((9, 5, 5) + (2,) * (layers - 3))
    trial.apply(ATC(), schedule)
    for (path, got), (_, want) in zip(leaves(trial.answer(trial.equal)), dense, strict=True):
        if difference := apart(got, want):
            yield f"{path}: {difference}", "the unpatched model's"


def leaves_no_trace(trial: Trial) -> Findings:
    """After `tokred.remove`, the model is what it was: its answer, its weights, what hangs on its
    modules."""
    dense = leaves(trial.dense)
    before, weights = trial.hung, list(trial.model.state_dict())
    for method in _accepted(trial, lambda method: trial.apply(method, 0.5)):
        trial.answer()
        if list(trial.model.state_dict()) != weights:
            yield f"with {method}, another state dict", "the unpatched model's"
        remove(trial.model)
        after = _hung(trial.model)
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
    "dropped tokens": ignores_dropped,
    "full_grid=False": hands_out_few,
    "outputs": keeps_structure,
    "half precision": runs_in_half,
    "equal tokens": merges_equal_tokens,
    "removal": leaves_no_trace,
}
"""Every promise, by its name."""


# ---- what promises are tried with


def _needs_a_sequence(trial: Trial) -> None:
    if isinstance(trial.host, Denoiser):
        raise _UntriedError("a denoiser merges around its modules alone")
    if trial.windowed:
        raise _UntriedError("the blocks attend in windows, which are reduced one by one")


def _accepted(trial: Trial, put: Callable[[Any], Any]) -> Iterator[Any]:
    """The methods that can be had, each while it hangs on the model."""
    reasons = []
    for method in trial.methods:
        try:
            put(method)
        except _UntriedError as reason:
            reasons.append(reason)
        else:
            yield method
    if len(reasons) == len(trial.methods):
        raise reasons[0]


def _runs(trial: Trial, signal: str) -> list[Run]:
    """The runs in which a signal was read."""
    if signal in trial.unread:
        raise _UntriedError(trial.unread[signal])
    return trial.read


def _shown(run: Run, signal: str) -> Iterator[tuple[Any, Paid]]:
    """What the probe was shown, and what the attention of that block has computed."""
    assert run.layout is not None
    for shown in run.probe.shown:
        if getattr(shown, signal) is not None:
            yield shown, _paid(run.trace, shown.layer, shown.x.shape[1] + run.layout.others)


def _paid(trace: Trace, layer: int, tokens: int) -> Paid:
    """The one attention of a block between all its tokens."""
    found = [paid for paid in trace.paid[layer] if paid.weights.shape[-1] == tokens]
    if len(found) != 1:
        raise _UntriedError(
            f"block {layer} has computed {len(found)} attentions between its {tokens} tokens, "
            "where one can be watched"
        )
    return found[0]


def _patches(layout: Layout, x: Tensor, dim: int = 1) -> Tensor:
    return x.narrow(dim, layout.prefix, x.shape[dim] - layout.others)


def _standing(run: Run, batch: int, through: int) -> Standing:
    full = run.probe.calls[min(run.probe.calls)][0]
    return run.probe.standing(batch, full, through)


def _as_reduced(run: Run, noise: int = 0) -> Changes:
    """How to make the unpatched model compute what the patched one did: attention does not see the
    tokens that are gone; behind a block, they are copies (merged ones) or noise (dropped ones)."""
    layout, probe = run.layout, run.probe
    assert layout is not None
    ahead = 1 if probe.place == "between" else 0

    def bias(layer: int, batch: int) -> Tensor | None:
        if layer - ahead < min(probe.calls):
            return None
        hidden = _standing(run, batch, layer - ahead).bias(not probe.prunes)
        return nn.functional.pad(hidden, (layout.prefix, layout.suffix))

    def behind(layer: int, x: Tensor) -> Tensor:
        if layer < min(probe.calls):
            return x
        restored = _standing(run, len(x), layer).restored(_patches(layout, x), noise)
        end = x.shape[1] - layout.suffix
        return torch.cat([x[:, : layout.prefix], restored, x[:, end:]], 1)

    return Changes(bias, behind)


def _few(run: Run, x: Tensor, through: int) -> Tensor:
    """The tokens that are left behind a layer, of these, which may be all."""
    layout = run.layout
    assert layout is not None
    standing = _standing(run, len(x), through)
    if x.shape[1] != standing.labels.shape[1] + layout.others:
        return x
    end = x.shape[1] - layout.suffix
    few = take(_patches(layout, x), standing.positions.to(x.device))
    return torch.cat([x[:, : layout.prefix], few, x[:, end:]], 1)


def _tokens(run: Run, trace: Trace) -> Iterator[tuple[str, Tensor]]:
    """The tokens that are left, in front of every block and behind the last one."""
    last = max(trace.entered)
    for layer in range(last + 1):
        for x in trace.entered[layer]:
            yield f"tokens in front of block {layer}", _few(run, x, layer - 1)
    for x in trace.left[last]:
        yield f"tokens behind block {last}", _few(run, x, last)


def _compared(run: Run, hidden: Run, answers: bool = True) -> Findings:
    """What differs first between the patched model and the unpatched one with hidden tokens."""
    found, wanted = [*_tokens(run, run.trace)], [*_tokens(run, hidden.trace)]
    if answers:
        found += [(f"output {path}", one) for path, one in leaves(run.outputs)]
        wanted += [(f"output {path}", one) for path, one in leaves(hidden.outputs)]
    if len(found) != len(wanted):
        yield f"{len(found)} tensors", f"{len(wanted)}"
    for (path, got), (_, want) in zip(found, wanted, strict=False):
        if difference := apart(got, want):
            yield f"{path}: {difference}", _HIDDEN
            return


_HIDDEN = "what the unpatched model computes where attention does not see tokens that are gone"


def _image(inputs: Inputs) -> Tensor:
    try:
        image = pixels(inputs)
    except ValueError as error:
        raise _UntriedError(str(error)) from error
    if not image.is_floating_point():
        raise _UntriedError(f"images are {image.dtype}, and cannot be changed a little")
    return image


def _moved(trial: Trial, image: Tensor) -> Tensor:
    """How much each token in front of the first block changes with another image, [tokens]."""
    inputs, before = trial.inputs, _image(trial.inputs)
    if isinstance(inputs, Mapping):
        changed: Inputs = {name: image if x is before else x for name, x in inputs.items()}
    else:
        changed = image
    moved = trial.run(changed).trace.entered[0][0] - trial.entering
    return moved.float().abs().mean((0, 2))


def _of_images(trial: Trial, outputs: Any) -> list[tuple[str, Tensor]]:
    """What a model says of whole images."""
    if trial.scores is not None:
        return leaves(trial.scores(outputs))
    batch = len(_image(trial.inputs))
    names = ("", "logits", "logits_per_image", "image_embeds", "pooler_output")
    return [
        (path, one)
        for path, one in leaves(outputs)
        if one.ndim == 2
        and len(one) == batch
        and (path.split(".")[-1] in names or not isinstance(outputs, Mapping))
    ]


def entered(
    blocks: Sequence[nn.Module], model: nn.Module, inputs: Inputs
) -> tuple[list[int], list[int]]:
    """How many tokens enter every block, and its last part that is given tokens: the MLP, or what
    follows it."""
    first: list[int] = []
    last: list[int] = []
    batch: list[int] = []

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        first.append(x.shape[1])
        last.append(x.shape[1])
        batch[:] = [x.shape[0]]

    def part(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[0] == batch[0]:
            last[-1] = x.shape[1]

    hooks = []
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        parts = [module for module in block.modules() if module is not block]
        hooks += [module.register_forward_pre_hook(part) for module in parts]
    _called(call, model, inputs)
    for hook in hooks:
        hook.remove()
    return first, last


def _hung(model: nn.Module) -> list[tuple[str, type, list[str], int]]:
    """All that a patch could leave behind on the modules of a model."""
    return [
        (name, type(m), sorted(vars(m)), len(m._forward_hooks) + len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


# ---- comparing


def leaves(output: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """All tensors of floating point in an output, with their paths in it."""
    if isinstance(output, Tensor):
        return [(path, output)] if output.is_floating_point() else []
    return [one for name, part in _parts(output) for one in leaves(part, _joined(path, name))]


def structure(output: Any, path: str = "") -> dict[str, str]:
    """What an output is made of: for every path, the type, and of tensors dtype and shape."""
    if isinstance(output, Tensor):
        return {path: f"{output.dtype} {list(output.shape)}"}
    found = {path: type(output).__name__}
    for name, part in _parts(output):
        found |= structure(part, _joined(path, name))
    return found


def _parts(output: Any) -> list[tuple[str, Any]]:
    if isinstance(output, Mapping):
        return [(str(name), part) for name, part in output.items()]
    if isinstance(output, list | tuple):
        return [(str(number), part) for number, part in enumerate(output)]
    return []


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def apart(found: Tensor, wanted: Tensor, times: float = 1.0) -> str | None:
    """How two tensors differ; None if by no more than rounding does, or so many times of it."""
    if found.shape != wanted.shape:
        return f"shape {list(found.shape)} instead of {list(wanted.shape)}"
    if not wanted.numel():
        return None
    coarsest = max(torch.finfo(x.dtype).eps for x in (found, wanted))
    share = times * 1e-4 * coarsest / torch.finfo(torch.float32).eps
    one, other = (x.double().nan_to_num(0, 0, 0) for x in (found, wanted))
    most, largest = float((one - other).abs().max()), float(other.abs().max())
    if most <= min(share, 0.1) * largest:
        return None
    return f"off by {most:.1e}, where the largest is {largest:.1e}"


def same(found: list[tuple[str, Tensor]], wanted: list[tuple[str, Tensor]]) -> bool:
    """Whether two outputs are equal to the last bit."""
    return len(found) == len(wanted) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for (_, a), (_, b) in zip(found, wanted, strict=True)
    )
