"""Loops that numba's compiler would not turn into vector instructions by itself, written as such.

Every function is an intrinsic: its body builds LLVM code, on vectors of as many numbers as a
register of this machine holds. LLVM makes instructions of it on every machine; with other registers
it is slower, and gives the same. numba must be installed to import this module.

Arrays are contiguous. Nothing is checked: whoever calls must not read or write beyond their ends.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic

PANEL = 32
"""Tokens whose features stand together, so that a product reads them in order."""

UNITS = 2.0**24
"""Distances are multiples of 1 / UNITS: one minus a float32 cosine is."""

_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


def _lanes() -> int:
    """How many float32 a register holds."""
    try:
        features = get_host_cpu_features()
    except RuntimeError:  # not known on this system
        features = {}
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx") else 4


LANES = _lanes()

# A tile has this many rows, and two registers of columns. The sums and what is multiplied must fit
# into the registers: there are 32 with AVX-512 and on ARM, and 16 otherwise.
ROWS = 8 if LANES == 16 or platform.machine().lower() in ("arm64", "aarch64") else 4
COLUMNS = 2 * LANES

Code = Callable[[Any, ir.IRBuilder, Any, Any], Any]
Typed = tuple[Any, Code]


@intrinsic  # type: ignore[untyped-decorator]
def products(
    typing: Any,
    panels: Any,
    one: Any,
    other: Any,
    dim: Any,
    least: Any,
    out: Any,
    row: Any,
    column: Any,
    stride: Any,
) -> Typed:
    """Distances of ROWS tokens to COLUMNS others, to both places of a symmetric matrix.

    Every sum runs over the features in their order. So it depends on the two tokens alone, and
    equal tokens have equal distances.

    Args:
        panels: features, float32. Of PANEL tokens, first all that have index 0, then index 1 ...
        one: where the first feature of the first row's token stands; those of the others follow.
        other: the same for the columns.
        dim: how many features a token has.
        least: per token, what its distances are at least, int32.
        out: matrix of int32, in multiples of 1 / UNITS.
        row: the token of the first row, and thereby where the tile is written to.
        column: the token of the first column.
        stride: how many numbers a row of the matrix has.
    """
    signature = types.void(panels, one, other, dim, least, out, row, column, stride)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        source, low, target = (
            context.make_array(signature.args[k])(context, builder, values[k]).data
            for k in (0, 4, 5)
        )
        place, across, count = (
            builder.sext(value, _LONG) if value.type != _LONG else value
            for value in (values[6], values[7], values[8])
        )
        sums = _sums(builder, source, values[1], values[2], values[3])
        tile = []
        for r in range(ROWS):
            floor = _spread(builder, builder.load(_at(builder, low, place, r)))
            line = builder.mul(builder.add(place, _LONG(r)), count)
            for half in range(2):
                here = builder.add(across, _LONG(half * LANES))
                distance = _distance(builder, sums[2 * r + half])
                for bound in (floor, _load(builder, _at(builder, low, here), _INT)):
                    below = builder.icmp_signed("<", distance, bound)
                    distance = builder.select(below, bound, distance)
                tile.append(distance)
                _store(builder, distance, _at(builder, target, builder.add(line, here)))
        for half in range(2):
            for top in range(0, ROWS, 4):
                four = [tile[2 * (top + r) + half] for r in range(4)]
                for c, part in enumerate(_turned(builder, four)):
                    here = builder.add(across, _LONG(half * LANES + c))
                    line = builder.add(builder.mul(here, count), builder.add(place, _LONG(top)))
                    _store(builder, part, _at(builder, target, line))
        return context.get_dummy_value()

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def least_three(typing: Any, row: Any, kind: Any, far: Any, num: Any) -> Typed:
    """The least and the second-least of the numbers of kind 0, and the least of kind 1.

    Args:
        row: int32 or int64.
        kind: of every number, int32.
        far: what is returned if there is none; no less than any that counts. Of the type of `row`.
        num: how many numbers there are, a multiple of 16.
    """
    signature = types.UniTuple(row.dtype, 3)(row, kind, row.dtype, num)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        numbers, kinds = (
            context.make_array(signature.args[k])(context, builder, values[k]).data for k in (0, 1)
        )
        element = ir.IntType(row.dtype.bitwidth)
        nothing = _spread(builder, values[2])
        first, second, other = (cgutils.alloca_once_value(builder, nothing) for _ in range(3))
        steps = builder.sdiv(values[3], values[3].type(LANES))
        with cgutils.for_range(builder, steps) as loop:
            at = builder.mul(loop.index, loop.index.type(LANES))
            found = _load(builder, _at(builder, numbers, at), element)
            what = _load(builder, _at(builder, kinds, at), _INT)
            zero, one = (
                builder.icmp_signed("==", what, _spread(builder, _INT(value))) for value in (0, 1)
            )
            found_zero = builder.select(zero, found, nothing)
            former = builder.load(first)
            higher = _pick(builder, ">", former, found_zero)
            builder.store(_pick(builder, "<", builder.load(second), higher), second)
            builder.store(_pick(builder, "<", former, found_zero), first)
            found_one = builder.select(one, found, nothing)
            builder.store(_pick(builder, "<", builder.load(other), found_one), other)
        lowest = builder.load(first)
        least = _reduced(builder, lowest)
        # The second-least of all may be the least of another lane than the least of all.
        where = _bits(builder, builder.icmp_signed("==", lowest, _spread(builder, least)))
        lane = builder.trunc(builder.cttz(where, ir.IntType(1)(0)), _INT)
        rest = builder.insert_element(lowest, values[2], lane)
        runner_up = _reduced(builder, _pick(builder, "<", rest, builder.load(second)))
        return context.make_tuple(
            builder,
            signature.return_type,
            (least, runner_up, _reduced(builder, builder.load(other))),
        )

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def up_to(typing: Any, row: Any, kind: Any, which: Any, start: Any, limit: Any) -> Typed:
    """Which of the 64 numbers from `start` on are of kind `which` and no greater than `limit`: an
    integer with a bit for each, the lowest for the first.

    Args:
        row: int32 or int64.
        kind: of every number, int32.
        which: int32.
        start: at least 64 numbers follow.
        limit: of the type of `row`.
    """
    signature = types.uint64(row, kind, types.int32, start, row.dtype)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        numbers, kinds = (
            context.make_array(signature.args[k])(context, builder, values[k]).data for k in (0, 1)
        )
        element = ir.IntType(row.dtype.bitwidth)
        wanted, bound = _spread(builder, values[2]), _spread(builder, values[4])
        bits = _LONG(0)
        for offset in range(0, 64, LANES):
            found = _load(builder, _at(builder, numbers, values[3], offset), element)
            what = _load(builder, _at(builder, kinds, values[3], offset), _INT)
            near = builder.icmp_signed("<=", found, bound)
            both = builder.and_(near, builder.icmp_signed("==", what, wanted))
            bits = builder.or_(bits, builder.shl(_bits(builder, both), _LONG(offset)))
        return bits

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def among(typing: Any, row: Any, start: Any, one: Any, other: Any) -> Typed:
    """Which of the 64 int32 from `start` on are `one` or `other`, as `up_to` says it."""
    signature = types.uint64(row, start, types.int32, types.int32)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        numbers = context.make_array(signature.args[0])(context, builder, values[0]).data
        wanted = [_spread(builder, value) for value in values[2:]]
        bits = _LONG(0)
        for offset in range(0, 64, LANES):
            found = _load(builder, _at(builder, numbers, values[1], offset), _INT)
            first, second = (builder.icmp_signed("==", found, value) for value in wanted)
            either = _bits(builder, builder.or_(first, second))
            bits = builder.or_(bits, builder.shl(either, _LONG(offset)))
        return bits

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def lowest(typing: Any, bits: Any) -> Typed:
    """The position of the lowest bit that is set; at least one must be."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        return builder.cttz(values[0], ir.IntType(1)(1))

    return types.int64(types.uint64), code


# Pieces of the code above


def _sums(builder: ir.IRBuilder, source: Any, one: Any, other: Any, dim: Any) -> list[Any]:
    """The scalar products of a tile: of every row, two registers."""
    zero = ir.Constant(ir.VectorType(_FLOAT, LANES), [0.0] * LANES)
    places = [cgutils.alloca_once_value(builder, zero) for _ in range(2 * ROWS)]
    kind = ir.FunctionType(zero.type, [zero.type] * 3)
    add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    with cgutils.for_range(builder, dim) as loop:
        step = builder.mul(loop.index, loop.index.type(PANEL))
        left, right = builder.add(one, step), builder.add(other, step)
        halves = [_load(builder, _at(builder, source, right, k * LANES), _FLOAT) for k in (0, 1)]
        for r in range(ROWS):
            feature = _spread(builder, builder.load(_at(builder, source, left, r)))
            for place, half in zip(places[2 * r : 2 * r + 2], halves, strict=True):
                builder.store(builder.call(add, [feature, half, builder.load(place)]), place)
    return [builder.load(place) for place in places]


def _distance(builder: ir.IRBuilder, cosine: Any) -> Any:
    """1 - cosine, rounded to float32 and cut to [0, 2], in multiples of 1 / UNITS."""

    def all_of(value: float) -> Any:
        return ir.Constant(cosine.type, [value] * LANES)

    distance = builder.fsub(all_of(1.0), cosine)
    for sign, end in (("<", 0.0), (">", 2.0)):
        beyond = builder.fcmp_ordered(sign, distance, all_of(end))
        distance = builder.select(beyond, all_of(end), distance)
    scaled = builder.fmul(distance, all_of(UNITS))
    return builder.fptosi(scaled, ir.VectorType(_INT, LANES))


def _turned(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """The columns of four rows, each a vector of four numbers."""
    undefined = ir.Constant(rows[0].type, ir.Undefined)

    def shuffled(one: Any, other: Any, mask: list[int]) -> Any:
        constant = ir.Constant(ir.VectorType(_INT, len(mask)), mask)
        return builder.shuffle_vector(one, other, constant)

    # Within each group of four columns, which is as far as cheap shuffles reach: first pairs of
    # rows, then pairs of pairs.
    fours = range(0, LANES, 4)
    low = [k + offset for k in fours for offset in (0, LANES, 1, LANES + 1)]
    high = [k + offset for k in fours for offset in (2, LANES + 2, 3, LANES + 3)]
    left = [k + offset for k in fours for offset in (0, 1, LANES, LANES + 1)]
    right = [k + offset for k in fours for offset in (2, 3, LANES + 2, LANES + 3)]
    quarters = []
    for pairs in (low, high):
        above, below = shuffled(rows[0], rows[1], pairs), shuffled(rows[2], rows[3], pairs)
        quarters += [shuffled(above, below, left), shuffled(above, below, right)]
    return [
        shuffled(quarters[c % 4], undefined, [c // 4 * 4 + r for r in range(4)])
        for c in range(LANES)
    ]


def _at(builder: ir.IRBuilder, data: Any, index: Any, more: int = 0) -> Any:
    place = builder.add(index, index.type(more)) if more else index
    return builder.gep(data, [place])


def _load(builder: ir.IRBuilder, pointer: Any, element: Any) -> Any:
    vector = ir.VectorType(element, LANES)
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=_bytes(element))


def _bytes(element: Any) -> int:
    return 4 if element == _FLOAT else int(element.width) // 8


def _store(builder: ir.IRBuilder, vector: Any, pointer: Any) -> None:
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=4)


def _spread(builder: ir.IRBuilder, value: Any) -> Any:
    """A vector of one number."""
    vector = ir.VectorType(value.type, LANES)
    start = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _INT(0))
    mask = ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES)
    return builder.shuffle_vector(start, start, mask)


def _pick(builder: ir.IRBuilder, sign: str, one: Any, other: Any) -> Any:
    """Number by number, the lesser ("<") or the greater (">")."""
    return builder.select(builder.icmp_signed(sign, one, other), one, other)


def _reduced(builder: ir.IRBuilder, vector: Any) -> Any:
    """The least of a vector's numbers."""
    kind = ir.FunctionType(vector.type.element, [vector.type])
    name = f"llvm.vector.reduce.smin.v{LANES}i{vector.type.element.width}"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [vector])


def _bits(builder: ir.IRBuilder, truths: Any) -> Any:
    """A vector of truths as an integer."""
    return builder.zext(builder.bitcast(truths, ir.IntType(LANES)), _LONG)
