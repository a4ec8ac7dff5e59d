"""What every method promises. A new method is tested here without a new line of test."""

from __future__ import annotations

import dataclasses
import pickle
import re
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tokred import reducers
from tokred.maps import Clusters, Kept, TokenMap
from tokred.reducers import Tokens, atc, evit, slic, svit, todo, tome, tome2d, truncate

every_method = pytest.mark.parametrize("method", reducers.names())
static_methods = pytest.mark.parametrize(
    "method", [name for name in reducers.names() if not reducers.traits(reducers.make(name)).varies]
)
SIGNALS = ("x", "size", "key", "value", "class_attention", "attention_received")
GRIDS = {16: (4, 4), 15: (3, 5), 2: (1, 2)}


def soft(small: TokenMap) -> bool:
    """Whether tokens go into several coarse ones, which are on a grid. Then labels say no more than
    where most of a token went, which may be nowhere for a coarse one; and what is copied up is not
    what had been merged."""
    return getattr(small, "grid", None) is not None


def fitting(method: str, keep: int, num: int) -> int:
    """The number of tokens nearest to `keep` that the method can make of these."""
    fit = reducers.traits(reducers.make(method)).fit
    return fit(keep, GRIDS[num]) if fit else keep


class Says:
    """A method that says no more than it must."""

    needs: ClassVar[frozenset[str]] = frozenset()
    bibtex: ClassVar[str] = ""

    def __call__(self, tokens: Tokens, keep: int) -> TokenMap:
        raise NotImplementedError


class Odds(nn.Module):
    """A gate for any learned method, random but of no parameters."""

    def forward(self, x: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
        scores: torch.Tensor = x[..., :2].float().log_softmax(-1)
        return scores


def some_tokens(batch: int = 2, num: int = 16, dtype: torch.dtype = torch.float32) -> Tokens:
    return Tokens(
        x=torch.randn(batch, num, 12, dtype=dtype),
        size=torch.randint(1, 4, (batch, num)).float(),
        key=torch.randn(batch, 3, num, 4, dtype=dtype),
        value=torch.randn(batch, 3, num, 4, dtype=dtype),
        class_attention=torch.rand(batch, 3, num).softmax(-1),
        attention_received=torch.rand(batch, num),
        grid=GRIDS[num],
        layer=1,
        layers=4,
        before=1,
        gate=Odds(),
    )


def one(tokens: Tokens, b: int) -> Tokens:
    """One sample of a batch."""
    return dataclasses.replace(
        tokens, **{name: getattr(tokens, name)[b : b + 1] for name in SIGNALS}
    )


@every_method
@pytest.mark.parametrize(("num", "keep"), [(16, 15), (16, 8), (16, 3), (16, 1), (15, 7), (2, 1)])
def test_keeps_exactly_as_many_as_asked(method: str, num: int, keep: int) -> None:
    tokens = some_tokens(num=num)
    made = reducers.make(method)
    keep = fitting(method, keep, num)
    small = made(tokens, keep)
    assert isinstance(small, TokenMap)
    assert small.ragged == reducers.traits(made).varies
    down = small.down(tokens.x, tokens.size)
    assert down.shape == (2, small.num_coarse, 12)
    assert small.up(down, tokens.x).shape == tokens.x.shape
    if soft(small):
        assert small.num_coarse == keep
        assert small.representatives().shape == (2, keep)
        return
    first = [row.index(group) for row in small.labels().tolist() for group in range(max(row) + 1)]
    if not small.ragged:
        assert small.representatives().flatten().tolist() == first
    groups = [sorted(set(row) - {-1}) for row in small.labels().tolist()]
    assert groups == [list(range(len(row))) for row in groups]
    if small.ragged:
        assert max(map(len, groups)) == small.num_coarse
        assert small.num_coarse <= keep or reducers.traits(made).learned  # as many as gates like
        assert (small.total(tokens.size) > 0).sum(1).tolist() == list(map(len, groups))
    else:
        assert [len(row) for row in groups] == [keep, keep] == [small.num_coarse] * 2


@every_method
def test_tokens_keep_the_order_of_their_first_members(method: str) -> None:
    small = reducers.make(method)(some_tokens(), fitting(method, 7, 16))
    if soft(small):
        pytest.skip("coarse tokens have the order of their grid")
    for labels in small.labels().tolist():
        first = [labels.index(group) for group in range(max(labels) + 1)]
        assert first == sorted(first)


@every_method
def test_conserves_size_or_drops_it_openly(method: str) -> None:
    tokens = some_tokens()
    small = reducers.make(method)(tokens, fitting(method, 6, 16))
    went = small.labels() >= 0
    torch.testing.assert_close(small.total(tokens.size).sum(1), (tokens.size * went).sum(1))
    assert went.all() == small.merges


@every_method
def test_leaves_equal_tokens_alone(method: str) -> None:
    tokens = some_tokens()
    same = torch.full_like(tokens.x, 3.5)
    small = reducers.make(method)(tokens, fitting(method, 5, 16))
    few = same[:, : small.num_coarse]
    torch.testing.assert_close(small.down(same, tokens.size), few)
    torch.testing.assert_close(small.up(few, same), same)


@every_method
def test_goes_up_and_down_again_without_a_change(method: str) -> None:
    tokens = some_tokens()
    small = reducers.make(method)(tokens, fitting(method, 6, 16))
    if soft(small):
        pytest.skip("what is copied up is not what had been merged")
    few = torch.randn(2, small.num_coarse, 12)
    again = small.down(small.up(few, tokens.x), tokens.size)
    there = (small.total(tokens.size) > 0)[..., None]
    torch.testing.assert_close(torch.where(there, again, 0), torch.where(there, few, 0))


@every_method
def test_treats_samples_apart(method: str) -> None:
    tokens = some_tokens(batch=3)
    reduce = reducers.make(method)
    keep = fitting(method, 7, 16)
    together = reduce(tokens, keep)
    for b in range(3):
        assert torch.equal(reduce(one(tokens, b), keep).labels()[0], together.labels()[b])


@every_method
def test_is_deterministic_and_leaves_the_random_stream_alone(method: str) -> None:
    tokens = some_tokens()
    before = torch.get_rng_state()
    keep = fitting(method, 7, 16)
    first, second = (reducers.make(method)(tokens, keep).labels() for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype(method: str, dtype: torch.dtype) -> None:
    tokens = some_tokens(dtype=dtype)
    small = reducers.make(method)(tokens, fitting(method, 7, 16))
    assert small.down(tokens.x, tokens.size).dtype == dtype
    assert small.total(tokens.size).dtype == torch.float32


@every_method
def test_exact_duplicates_and_zeros_are_no_trouble(method: str) -> None:
    tokens = some_tokens()
    same = {}
    for name in SIGNALS:
        signal = getattr(tokens, name)
        axis = 2 if name in ("key", "value", "class_attention") else 1
        same[name] = signal.narrow(axis, 0, 1).expand_as(signal).clone()
        if name in ("x", "key", "value"):
            same[name].narrow(axis, 8, 8).zero_()
    flat = dataclasses.replace(tokens, **same)
    for keep in (15, 9, 4, 1):
        made, keep = reducers.make(method), fitting(method, keep, 16)
        small = made(flat, keep)
        if not reducers.traits(made).varies:
            assert small.num_coarse == keep
        elif not reducers.traits(made).learned:
            assert small.num_coarse <= keep
        assert small.down(flat.x, flat.size).isfinite().all()


@every_method
def test_is_a_value(method: str) -> None:
    made = reducers.make(method)
    assert made == reducers.make(method)
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.needs = frozenset()  # type: ignore[misc]


@every_method
def test_says_what_it_is_in_one_line(method: str) -> None:
    summary = (type(reducers.make(method)).__doc__ or "").split("\n")[0]
    assert summary.endswith(".") and len(summary) < 100


@static_methods
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles_in_one_graph_and_once(method: str, backend: str) -> None:
    torch._dynamo.reset()
    reduce, keep, gate = reducers.make(method), fitting(method, 5, 16), Odds()

    def run(*signals):  # type: ignore[no-untyped-def]
        named = dict(zip(SIGNALS, signals, strict=True))
        tokens = Tokens(**named, grid=(4, 4), layer=1, layers=4, before=1, gate=gate)
        return reduce(tokens, keep).down(tokens.x, tokens.size)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    counter = CompileCounterWithBackend(backend)
    counted = torch.compile(run, fullgraph=True, backend=counter)
    for _ in range(2):
        tokens = some_tokens()
        arguments = [getattr(tokens, name) for name in SIGNALS]
        torch.testing.assert_close(compiled(*arguments), run(*arguments))
        counted(*arguments)
    assert counter.frame_count == 1


def test_an_unknown_method_names_the_known_ones() -> None:
    known = ", ".join(reducers.names())
    message = f"unknown method 'tomme' (did you mean 'tome'?); known methods: {known}"
    with pytest.raises(ValueError, match=re.escape(message)):
        reducers.make("tomme")


@pytest.mark.parametrize("method", [None, 3, reducers.tome.ToMe, len])
def test_what_is_no_method_is_refused(method: object) -> None:
    with pytest.raises(TypeError, match="method must be a name or a reducer"):
        reducers.make(method)  # type: ignore[arg-type]


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="'tome' is registered already"):
        reducers.register("tome")(lambda: reducers.make("atc"))
    assert reducers.register("tome")(reducers.tome.ToMe) is reducers.tome.ToMe


@every_method
def test_its_maps_do_what_it_says(method: str) -> None:
    tokens, made = some_tokens(), reducers.make(method)
    reducers.check_map(made, made(tokens, fitting(method, 7, 16)))


def test_every_method_of_the_folder_does_what_it_says() -> None:
    """Those without a name, too, and with other options."""
    tokens = some_tokens()
    for made, keep in [
        (truncate.Truncate(), 7), (truncate.Truncate("before"), 7), (todo.ToDo(), 4),
        (tome2d.ToMe2d(), 7), (tome.ToMe(threshold=0.5), 7), (evit.EViT(published=True), 7),
        (svit.SViT(fixed=True), 7), (svit.SViT(reactivate=False), 7), (slic.SLIC(iterations=0), 4),
        (svit.SViT(reactivate=False, preserve=False), 7),
    ]:  # fmt: skip
        reducers.check_map(made, made(tokens, keep))


def test_the_defaults_of_traits_are_those_of_a_method_that_says_nothing() -> None:
    said = reducers.traits(Says())
    assert said == reducers.Traits(needs=frozenset(), bibtex="")
    assert (said.place, said.varies, said.prunes, said.proportional) == (
        "between",
        False,
        False,
        True,
    )
    assert not said.own_schedule and not said.drops


def test_options_that_came_later_are_told_where_they_are_set() -> None:
    """Files of former versions name methods as they were written then."""
    assert repr(tome.ToMe()) == "ToMe(threshold=None)"
    assert repr(tome.ToMe(weighted=False)) == "ToMe(threshold=None, weighted=False)"
    assert repr(atc.ATC()) == "ATC(linkage='average', backend='auto')"
    assert repr(reducers.make("ats")) == "ATS()"
    assert repr(slic.SLIC()).endswith("k=20)")
    assert repr(slic.SLIC(copies="assigned")).endswith("k=20, copies='assigned')")
    for written in (tome.ToMe(weighted=False), slic.SLIC(copies="assigned"), tome.ToMe(0.5)):
        assert eval(repr(written), vars(tome) | vars(slic)) == written


def test_traits_are_read_off_options_too() -> None:
    assert reducers.traits(svit.SViT()).place == "around"
    dropping = reducers.traits(svit.SViT(reactivate=False, preserve=False, fixed=True))
    assert (dropping.place, dropping.prunes, dropping.varies) == ("before", True, False)
    assert dropping.remembers and dropping.learned == "svit" and dropping.gates is None
    assert reducers.traits(tome.ToMe(threshold=0.9)).varies
    assert reducers.traits(tome2d.ToMe2d(cell=(4, 2))).least == 1 / 8
    assert reducers.traits(todo.ToDo()).keys_only
    assert reducers.traits(slic.SLIC()).open_grid
    set_grid = reducers.traits(slic.SLIC(grid=(2, 2), k=7))
    assert not set_grid.open_grid and set_grid.own_schedule
    assert set_grid.reconstruction == slic.Nearest(7) and set_grid.fit is not None
    assert set_grid.fit(9, (4, 4)) == 4
    on = reducers.traits(atc.ATC()).on
    assert on is not None and on(torch.device("cpu")) != atc.ATC()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"place": "behind"}, "Says.place must be one of between, before, around, not 'behind'"),
        ({"needs": frozenset({"keys"})}, r"Says.needs must be .*'class_attention'.*, not .*'keys'"),
        ({"needs": {"key"}}, "Says.needs must be a frozenset"),
        ({"prunes": "yes"}, "Says.prunes must be True or False, not 'yes'"),
        ({"varies": None}, "Says.varies must be True or False, not None"),
        ({"least": 2}, r"Says.least must be a keep rate in \[0, 1\], not 2"),
        ({"fit": 3}, "Says.fit must be something that can be called, not 3"),
        (
            {"learned": "says"},
            "Says.learned is 'says', but .* needs gates, remembers, layers, gate",
        ),
    ],
)
def test_what_a_method_says_must_make_sense(
    said: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in said.items():
        monkeypatch.setattr(Says, name, value, raising=False)
    with pytest.raises(ValueError, match=message):
        reducers.traits(Says())


CLUSTERS = Clusters(torch.tensor([[0, 0, 1]]), 2)
KEPT = Kept(torch.tensor([[0, 2]]), 3)
RAGGED = Kept(torch.tensor([[0, 2]]), 3, counts=torch.tensor([1]))


@pytest.mark.parametrize(
    ("said", "returned", "message"),
    [
        ({}, KEPT, r"Says returned Kept, which drops .* add the line `prunes: ClassVar\[bool\]"),
        (
            {"prunes": True},
            CLUSTERS,
            "Says says that it prunes, but returned Clusters, which merge",
        ),
        ({"place": "around"}, CLUSTERS, 'Says says place = "around", but returned Clusters'),
        ({"prunes": True}, RAGGED, r"different numbers .* `varies: ClassVar\[bool\] = True`"),
        ({}, CLUSTERS, None),
        ({"prunes": True}, KEPT, None),
        ({"prunes": True, "varies": True}, RAGGED, None),
        ({"place": "around"}, KEPT, None),
        ({"keys_only": True}, KEPT, None),
        ({"limit": True}, KEPT, None),
    ],
)
def test_a_map_must_do_what_its_method_says(
    said: dict[str, object],
    returned: TokenMap,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in said.items():
        monkeypatch.setattr(Says, name, value, raising=False)
    if message is None:
        reducers.check_map(Says(), returned)
    else:
        with pytest.raises(ValueError, match=message):
            reducers.check_map(Says(), returned)
