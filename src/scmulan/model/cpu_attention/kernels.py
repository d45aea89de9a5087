"""Inner loops of attention on a CPU in float32: matrix products in vectors of LLVM, and the softmax between them.

The sum C += A B of a few rows of A and a tile B stays in registers from the first row of B to the last. It is written
in LLVM's own vectors for that: from loops over arrays the compiler makes one that goes through memory for every
product, as it cannot know that C and B lie apart. Sums are taken in the order of B's rows whatever the number of rows
of A: what a row gives does not depend on those beside it. Tests compare the products with those of numpy.
"""

from functools import partial
from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from scmulan._numba import compiled

_untyped: Any = intrinsic
FAST: Any = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp", "nnan"}}
# Tokens in a tile of keys, whose products are summed together.
TILE = 64
# Rows of A whose sums are kept in registers at once.
PANEL_ROWS = 4
# Whether the machine has 32 registers of 512 bits, enough for the sums of four rows of 64 columns.
AVX512 = bool(llvmlite.binding.get_host_cpu_features().get("avx512f", False))


class Matrix(NamedTuple):
    """Part of a float32 matrix in memory."""

    address: int
    """Address of its first number, in bytes."""
    step: int
    """Numbers from the start of one row to that of the next."""


def _panel(rows: int, columns: int) -> Any:
    """Make the product of a panel: ``rows`` rows of A and ``columns`` columns of B.

    Returns
    -------
    function
        Of ``(a, a_step, b, b_step, inner, c, c_step)``: addresses in bytes, steps in numbers.
    """
    lanes = [16] * (columns // 16) + [8] * (columns % 16 // 8) + [1] * (columns % 8)
    firsts = [sum(lanes[:i]) for i in range(len(lanes))]
    real, whole, index = ir.FloatType(), ir.IntType(64), ir.IntType(32)
    vectors = [ir.VectorType(real, n) for n in lanes]
    every = range(len(lanes))

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        a, a_step, b, b_step, inner, c, c_step = arguments
        number = partial(ir.Constant, whole)
        names = [f"llvm.fma.v{n}f32" for n in lanes]
        fma = [
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(v, [v] * 3), name)
            for v, name in zip(vectors, names, strict=True)
        ]

        def at(base: Any, row: Any, step: Any, column: Any, kind: Any) -> Any:
            offset = builder.mul(builder.add(builder.mul(row, step), column), number(4))
            return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

        def broadcast(one: Any, kind: Any) -> Any:
            first = builder.insert_element(ir.Constant(kind, ir.Undefined), one, ir.Constant(index, 0))
            return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(index, kind.count), [0] * kind.count))

        cells = [(r, v) for r in range(rows) for v in every]
        targets = [at(c, number(r), c_step, number(firsts[v]), vectors[v]) for r, v in cells]
        start = [builder.load(target, align=4) for target in targets]
        before, loop, after = builder.block, builder.append_basic_block("sum"), builder.append_basic_block("summed")
        builder.cbranch(builder.icmp_signed(">", inner, number(0)), loop, after)

        builder.position_at_end(loop)
        k = builder.phi(whole)
        sums = [builder.phi(vectors[v]) for _, v in cells]
        tile = [builder.load(at(b, k, b_step, number(firsts[v]), vectors[v]), align=4) for v in every]
        ones = [builder.load(at(a, number(r), a_step, k, real), align=4) for r in range(rows)]
        added = [
            builder.call(fma[v], [broadcast(ones[r], vectors[v]), tile[v], total])
            for (r, v), total in zip(cells, sums, strict=True)
        ]
        following = builder.add(k, number(1))
        for phi, first, then in zip([k, *sums], [number(0), *start], [following, *added], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, loop)
        builder.cbranch(builder.icmp_signed("<", following, inner), loop, after)

        builder.position_at_end(after)
        ends = [builder.phi(vectors[v]) for _, v in cells]
        for phi, first, then in zip(ends, start, added, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, loop)
        for end, target in zip(ends, targets, strict=True):
            builder.store(end, target, align=4)
        return context.get_dummy_value()

    @_untyped
    def panel(typing: Any, a: Any, a_step: Any, b: Any, b_step: Any, inner: Any, c: Any, c_step: Any) -> Any:
        return numba.void(*[numba.int64] * 7), emit

    return panel


_four_64, _four_56, _four_32, _four_16, _four_8, _four_1 = (_panel(PANEL_ROWS, n) for n in (64, 56, 32, 16, 8, 1))
_one_64, _one_56, _one_32, _one_16, _one_8, _one_1 = (_panel(1, n) for n in (64, 56, 32, 16, 8, 1))


@compiled()
def add_product(a: Matrix, b: Matrix, c: Matrix, rows: int, inner: int, columns: int, wide: bool) -> None:
    """Add the product of two matrices to a third: C += A B, for A ``[rows, inner]`` and B ``[inner, columns]``.

    ``wide``: as many sums as 32 registers of 512 bits hold (:data:`AVX512`); otherwise as many as 16 of 256 bits.
    """
    for r in range(0, rows - rows % PANEL_ROWS, PANEL_ROWS):
        n = 0
        while n < columns:
            remaining = columns - n
            x, y, z = a.address + 4 * r * a.step, b.address + 4 * n, c.address + 4 * (r * c.step + n)
            if wide and remaining >= 64:
                _four_64(x, a.step, y, b.step, inner, z, c.step)
                n += 64
            elif wide and remaining >= 56:
                _four_56(x, a.step, y, b.step, inner, z, c.step)
                n += 56
            elif wide and remaining >= 32:
                _four_32(x, a.step, y, b.step, inner, z, c.step)
                n += 32
            elif remaining >= 16:
                _four_16(x, a.step, y, b.step, inner, z, c.step)
                n += 16
            elif remaining >= 8:
                _four_8(x, a.step, y, b.step, inner, z, c.step)
                n += 8
            else:
                _four_1(x, a.step, y, b.step, inner, z, c.step)
                n += 1
    for r in range(rows - rows % PANEL_ROWS, rows):
        n = 0
        while n < columns:
            remaining = columns - n
            x, y, z = a.address + 4 * r * a.step, b.address + 4 * n, c.address + 4 * (r * c.step + n)
            if remaining >= 64:
                _one_64(x, a.step, y, b.step, inner, z, c.step)
                n += 64
            elif remaining >= 56:
                _one_56(x, a.step, y, b.step, inner, z, c.step)
                n += 56
            elif remaining >= 32:
                _one_32(x, a.step, y, b.step, inner, z, c.step)
                n += 32
            elif remaining >= 16:
                _one_16(x, a.step, y, b.step, inner, z, c.step)
                n += 16
            elif remaining >= 8:
                _one_8(x, a.step, y, b.step, inner, z, c.step)
                n += 8
            else:
                _one_1(x, a.step, y, b.step, inner, z, c.step)
                n += 1


@_untyped
def next_number(typing: Any, address: Any) -> Any:
    """Add one to the int64 at an address atomically and return what it was: the next piece of work."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        whole = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], whole.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(whole, 1), "monotonic")

    return numba.int64(numba.int64), emit


@_untyped
def pointer_to(typing: Any, address: Any) -> Any:
    """Convert an address to a pointer for :func:`numba.carray`."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(numba.int64), emit


@compiled(**FAST)
def softmax(score: np.ndarray, number: int, end: int, scale: float, exponent: np.ndarray) -> Any:
    """Replace scores by the numerators of their softmax, and return one over their sum.

    Parameters
    ----------
    score
        float32: the first ``number`` are replaced by exp(scale × (score − largest)), those up to ``end`` by zero.
    number, end
        Scores that count, and scores that are written.
    scale
        Factor of the scores.
    exponent
        int32, at least ``number``: scratch.

    Notes
    -----
    exp(x) = 2^n · 2^f with n whole and |f| ≤ ½; 2^f by its Taylor polynomial of degree 6, right to float32's last bit.
    """
    largest = score[0]
    for j in range(1, number):
        largest = max(largest, score[j])
    power = exponent.view(np.float32)
    per_log2 = np.float32(scale * np.float32(1.4426950408889634))
    total = np.float32(0)
    for j in range(number):
        x = max((score[j] - largest) * per_log2, np.float32(-126))
        n = np.floor(x + np.float32(0.5))
        exponent[j] = (np.int32(n) + np.int32(127)) << np.int32(23)
        f = (x - n) * np.float32(0.6931471805599453)
        p = np.float32(1 / 720) * f + np.float32(1 / 120)
        p = p * f + np.float32(1 / 24)
        p = p * f + np.float32(1 / 6)
        p = p * f + np.float32(0.5)
        p = p * f + np.float32(1)
        score[j] = p * f + np.float32(1)
    for j in range(number):
        score[j] *= power[j]
        total += score[j]
    for j in range(number, end):
        score[j] = 0
    return np.float32(1) / total
