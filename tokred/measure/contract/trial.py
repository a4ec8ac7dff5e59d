"""A model that promises are tried on, and the runs of it that several promises look at."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tokred.data.inputs import Inputs, call
from tokred.engine import Layout
from tokred.host import Denoiser, Host, Stage, UnsupportedModelError, WindowedHost
from tokred.maps import take
from tokred.measure.contract.findings import UntriedError, Verdict, said
from tokred.measure.contract.probing import Probe, Standing
from tokred.measure.contract.watching import Changes, Paid, Trace, mask_of, watching
from tokred.patching import apply, remove
from tokred.reducers.slic import SLIC
from tokred.schedule import Shares

Features = Callable[[Any, Inputs], Any]
"""What a model hands out besides its answer, in any structure."""

Scores = Callable[[Any], Any]
"""What the outputs of a model say of whole images, in any structure."""

Hung = list[tuple[str, type, list[str], int]]
"""What hangs on the modules of a model: name, class, attributes and number of hooks of each."""


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


@dataclass(frozen=True)
class Run:
    """One run of a model.

    Attributes:
        outputs: what it returned.
        trace: what was seen of its blocks.
    """

    outputs: Any
    trace: Trace

    @property
    def tokens(self) -> list[tuple[str, Tensor]]:
        """The tokens in front of every block, and behind the last one."""
        last = max(self.trace.entered)
        named = [
            (f"tokens in front of block {layer}", x)
            for layer in range(last + 1)
            for x in self.trace.entered[layer]
        ]
        return named + [(f"tokens behind block {last}", x) for x in self.trace.left[last]]


@dataclass(frozen=True)
class Reduced(Run):
    """One run of a model in which a probe has reduced tokens.

    Attributes:
        probe: the probe.
        layout: the layout that the patch gives.
    """

    probe: Probe
    layout: Layout

    def standing(self, batch: int, through: int) -> Standing:
        """What is left of the tokens behind layer `through`."""
        full = self.probe.calls[min(self.probe.calls)][0]
        return self.probe.standing(batch, full, through)

    def shown(self, signal: str) -> Iterator[tuple[Any, Paid]]:
        """What the probe was shown, where it was shown this signal; and what the attention of that
        block has computed."""
        for tokens in self.probe.shown:
            if getattr(tokens, signal) is not None:
                yield tokens, self.paid(tokens.layer, tokens.x.shape[1])

    def paid(self, layer: int, tokens: int) -> Paid:
        """What the attention of a block has computed between so many patch tokens and the others.

        Raises:
            UntriedError: there is none, or more than one.
        """
        count = tokens + self.layout.others
        found = [paid for paid in self.trace.paid[layer] if paid.weights.shape[-1] == count]
        if len(found) != 1:
            raise UntriedError(
                f"block {layer} has computed {len(found)} attentions between its {count} tokens, "
                "where one can be watched"
            )
        return found[0]

    def patches(self, x: Tensor, dim: int = 1) -> Tensor:
        """The patch tokens of a sequence, whose tokens run along `dim`."""
        return x.narrow(dim, self.layout.prefix, x.shape[dim] - self.layout.others)

    def between(self, x: Tensor, patches: Tensor) -> Tensor:
        """A sequence with other patch tokens."""
        end = x.shape[1] - self.layout.suffix
        return torch.cat([x[:, : self.layout.prefix], patches, x[:, end:]], 1)

    def few(self, x: Tensor, through: int) -> Tensor:
        """The tokens of a sequence that are left behind layer `through`; `x` has these alone, or
        all."""
        standing = self.standing(len(x), through)
        if x.shape[1] != standing.labels.shape[1] + self.layout.others:
            return x
        return self.between(x, take(self.patches(x), standing.positions.to(x.device)))

    def left_of(self, run: Run) -> list[tuple[str, Tensor]]:
        """The tokens that are left, of another run, or of this: in front of every block, and behind
        the last one."""
        last = max(run.trace.entered)
        through = [layer - 1 for layer in range(last + 1) for _ in run.trace.entered[layer]]
        through += [last] * len(run.trace.left[last])
        return [
            (name, self.few(x, layer)) for layer, (name, x) in zip(through, run.tokens, strict=True)
        ]

    def as_changes(self, noise: int = 0) -> Changes:
        """How to make the unpatched model compute what this run should have: attention does not see
        tokens that are gone; behind a block, these are copies (merged ones) or noise (dropped
        ones)."""
        probe, first = self.probe, min(self.probe.calls)
        ahead = 1 if probe.place == "between" else 0

        def bias(layer: int, batch: int) -> Tensor | None:
            if layer - ahead < first:
                return None
            hidden = self.standing(batch, layer - ahead).bias(not probe.prunes)
            return nn.functional.pad(hidden, (self.layout.prefix, self.layout.suffix))

        def behind(layer: int, x: Tensor, y: Tensor) -> Tensor:
            if layer < first:
                return y
            standing = self.standing(len(y), layer)
            return self.between(y, standing.restored(self.patches(y), noise))

        return Changes(bias, behind)


@dataclass(frozen=True)
class Trial:
    """A model that promises are tried on. Runs that several promises look at are made once.

    Attributes:
        model: the model.
        inputs: what it is called with.
        given: the patch that was given, if one was.
        host: the patch, one stage of it, or the denoiser.
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
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order; none of a denoiser, whose modules are not all of one kind."""
        return () if isinstance(self.host, Denoiser) else self.host.blocks(self.tower)

    @property
    def methods(self) -> list[Any]:
        """A method that merges, and one that drops; of a model in windows or a denoiser, one that
        it can have."""
        if isinstance(self.host, Denoiser):
            return ["tome"]
        if isinstance(self.host, Stage):
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

    def look_around(self) -> None:
        """Sees what the unpatched model is like, before anything is tried."""
        # Features first: a library may hang something on the model when it is asked for them.
        _ = self.dense_features, self.hung, self.dense
        if self.blocks:
            _ = self.entering

    def needs_a_sequence(self) -> None:
        """Raises unless blocks attend to a sequence of tokens, which can be merged or dropped.

        Raises:
            UntriedError: they do not.
        """
        if isinstance(self.host, Denoiser):
            raise UntriedError("a denoiser merges around its modules alone")
        if isinstance(self.host, Stage):
            raise UntriedError("the blocks attend in windows, which are reduced one by one")

    def apply(self, method: Any, keep_rate: Any, **options: Any) -> Any:
        """Puts a method into the model.

        Raises:
            UntriedError: the patch refuses that.
        """
        with warnings.catch_warnings(), torch.random.fork_rng([]):  # gates are drawn at random
            warnings.simplefilter("ignore", UserWarning)  # that nothing is reduced
            try:
                return apply(self.model, method, keep_rate, host=self.given, **options)
            except UnsupportedModelError as error:
                raise UntriedError(str(error)) from error

    def accepted(self, keep_rate: Any, **options: Any) -> Iterator[Any]:
        """Those of `methods` that the patch accepts, each while it hangs on the model.

        Raises:
            UntriedError: it accepts none.
        """
        reasons = []
        for method in self.methods:
            try:
                self.apply(method, keep_rate, **options)
            except UntriedError as reason:
                reasons.append(reason)
            else:
                yield method
        if len(reasons) == len(self.methods):
            raise reasons[0]

    def answer(self, inputs: Inputs | None = None) -> Any:
        """What the model, as it is now, returns."""
        return _called(call, self.model, self.inputs if inputs is None else inputs)

    def handed_out(self, changes: Changes | None = None) -> Any:
        """What the model, as it is now, hands out besides its answer."""
        if changes is None:
            return _called(self.features, self.model, self.inputs)
        with watching(self.blocks, changes):
            return _called(self.features, self.model, self.inputs)

    def run(self, inputs: Inputs | None = None, changes: Changes | None = None) -> Run:
        """Runs the model as it is now, watched."""
        with watching(self.blocks, changes) as trace:
            outputs = self.answer(inputs)
        return Run(outputs, trace)

    def reduced(self, probe: Probe, changes: Changes | None = None) -> Reduced:
        """Runs the model with fewer tokens from two of its layers on.

        Raises:
            UntriedError: the patch refuses that, or does not do it. (The promise on the numbers of
                tokens tells of that.)
        """
        reduction = self.apply(probe, self.shares(0 if probe.place == "between" else 1))
        run = self.run(changes=changes)
        if not probe.calls:
            raise UntriedError("no tokens were merged or dropped")
        return Reduced(run.outputs, run.trace, probe, reduction.layout)

    def masked(self, probe: Probe) -> Reduced:
        """The same, where every block is given `mask`.

        Raises:
            UntriedError: the patch, or the model, takes no mask.
        """
        changes = Changes(masks=self.mask)
        try:
            return self.reduced(probe, changes)
        except ValueError as error:
            raise UntriedError(f"masks are refused: {error}") from error

    # The unpatched model, as `look_around` sees it

    @cached_property
    def dense(self) -> Any:
        """The answer of the unpatched model."""
        return self.answer()

    @cached_property
    def dense_features(self) -> Any:
        """What the unpatched model hands out; None if it does not."""
        try:
            return self.handed_out()
        except Exception:  # the unpatched model says so: that is no fault of its patch
            return None

    @cached_property
    def hung(self) -> Hung:
        """What hangs on the modules of the unpatched model."""
        return hanging_on(self.model)

    @cached_property
    def entering(self) -> Tensor:
        """The tokens that enter the first block."""
        return self.run().trace.entered[0][0]

    @cached_property
    def mask(self) -> Callable[[int, Tensor], Tensor]:
        """A mask over queries and keys of the full sequence, which the unpatched model can be
        given; in every block another.

        Raises:
            UntriedError: it takes none.
        """
        if any(mask_of(block) is None for block in self.blocks):
            raise UntriedError("the blocks take no mask")
        full = self.entering.shape[1]

        def drawn(layer: int, x: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(layer)
            return 2 * torch.randn(1, 1, full, full, generator=generator).to(x)

        remove(self.model)
        try:
            self.run(changes=Changes(masks=drawn))
        except Exception as error:
            raise UntriedError(f"the unpatched model takes no mask: {said(error)}") from error
        return drawn

    # The patched model

    @cached_property
    def merged(self) -> Reduced:
        """With merged tokens."""
        return self.reduced(Probe())

    @cached_property
    def merged_before(self) -> Reduced:
        """The same, by a method that stands before the block."""
        return self.reduced(Probe(place="before"))

    @cached_property
    def dropped(self) -> Reduced:
        """With dropped tokens."""
        return self.reduced(Probe(prunes=True))

    @cached_property
    def unread(self) -> dict[str, str]:
        """The signals that the patch cannot read, and why."""
        reasons = {}
        for signal in ("class_attention", "key", "value"):
            try:
                self.apply(Probe(frozenset({signal})), 0.5)
            except UntriedError as reason:
                reasons[signal] = str(reason)
        return reasons

    @property
    def signals(self) -> frozenset[str]:
        """The signals that it can read."""
        return frozenset({"class_attention", "key", "value"} - self.unread.keys())

    @cached_property
    def with_signals(self) -> list[Reduced]:
        """With a probe that reads all signals that the patch can read: of merged tokens and, if
        that can be had, of dropped ones."""
        runs = [self.reduced(Probe(self.signals))]
        with contextlib.suppress(UntriedError):
            runs.append(self.reduced(Probe(self.signals, prunes=True)))
        return runs

    def reading(self, signal: str) -> list[Reduced]:
        """The same, for one signal.

        Raises:
            UntriedError: the patch cannot read it.
        """
        if signal in self.unread:
            raise UntriedError(self.unread[signal])
        return self.with_signals

    def on_half(self, model: nn.Module, tower: nn.Module) -> Trial:
        """The same trial, on a copy of the model in bfloat16."""
        inputs = self.inputs
        if isinstance(inputs, Mapping):
            inputs = {name: _halved(x) for name, x in inputs.items()}
        else:
            inputs = _halved(inputs)
        return replace(self, model=model, tower=tower, inputs=inputs, verdicts={})


def _halved(x: Any) -> Any:
    return x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x


def _called(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function without gradients, always with the same random numbers: some models draw
    masks. The generators are left as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(1)
        if devices:
            torch.cuda.manual_seed_all(1)
        return function(*args)


def hanging_on(model: nn.Module) -> Hung:
    """All that a patch could leave behind on the modules of a model."""
    return [
        (name, type(m), sorted(vars(m)), len(m._forward_hooks) + len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


def entered(
    blocks: Sequence[nn.Module], model: nn.Module, inputs: Inputs
) -> tuple[list[int], list[int]]:
    """How many tokens enter every block, and the last part of it that is given tokens: the MLP, or
    what follows it."""
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

    with contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for module in block.modules():
                if module is not block:
                    hooks.callback(module.register_forward_pre_hook(part).remove)
        _called(call, model, inputs)
    return first, last
