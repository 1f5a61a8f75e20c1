"""Products of small matrices inside Numba kernels, for arrays that stay in a core's cache.

A tile of the result is held in registers: LLVM does not find that form by itself, so the innermost loop is written as
vector instructions. Every element is the sum of its terms in their order, whatever the tiles are. Arrays have room for
whole tiles (:func:`whole`); what lies beyond the rows and columns asked for has no meaning.
"""

from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ssmscan.ops._numba.compiled import compiled

# A vector in bytes; LLVM makes it of two or four where the processor's are shorter.
VECTOR = 64
# Rows of a tile: as many vectors as hide the latency of their additions, without running out of registers.
ROWS = 8 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4


def _tile(context: Any, out: Any, a: Any, b: Any, i: Any, j: Any, begin: Any, end: Any) -> Any:
    """out[i:i+ROWS, j:j+lanes] += a[i:i+ROWS, begin:end] · b[begin:end, j:j+lanes]; rows of out and b are dense."""
    signature = types.void(out, a, b, *(types.intp,) * 4)

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [target.make_array(t)(target, builder, v) for t, v in zip(signature.args[:3], arguments, strict=False)]
        i, j, begin, end = arguments[3:]
        scalar = target.get_data_type(out.dtype)
        size = target.get_abi_sizeof(scalar)
        vector = ir.VectorType(scalar, VECTOR // size)
        fused = ("contract",)

        def pointer(array: Any, row: Any, column: Any, kind: Any) -> Any:
            bytes_ = builder.bitcast(array.data, ir.IntType(8).as_pointer())
            strides = cgutils.unpack_tuple(builder, array.strides, 2)
            offset = builder.add(builder.mul(row, strides[0]), builder.mul(column, strides[1]))
            return builder.bitcast(builder.gep(bytes_, [offset]), kind.as_pointer())

        rows = [builder.add(i, ir.Constant(i.type, r)) for r in range(ROWS)]
        targets = [pointer(arrays[0], row, j, vector) for row in rows]
        sums = [cgutils.alloca_once_value(builder, builder.load(p, align=size)) for p in targets]
        with cgutils.for_range_slice(builder, begin, end, ir.Constant(i.type, 1), i.type) as (k, _):
            terms = builder.load(pointer(arrays[2], k, j, vector), align=size)
            for row, total in zip(rows, sums, strict=True):
                factor = builder.load(pointer(arrays[1], row, k, scalar))
                single = builder.insert_element(ir.Constant(vector, None), factor, ir.Constant(ir.IntType(32), 0))
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
                product = builder.fmul(builder.shuffle_vector(single, single, zeros), terms, flags=fused)
                builder.store(builder.fadd(builder.load(total), product, flags=fused), total)
        for p, total in zip(targets, sums, strict=True):
            builder.store(builder.load(total), p, align=size)
        return target.get_dummy_value()

    return signature, generate


_add_tile: Any = intrinsic(_tile)


@compiled
def whole(size):
    """The size up to whole tiles, in either direction and any dtype."""
    return (size + 15) // 16 * 16


@compiled
def add_product(out, a, b, rows, inner, columns):
    """out[:rows, :columns] += a[:rows, :inner] · b[:inner, :columns]."""
    for j in range(0, columns, VECTOR // out.itemsize):
        for i in range(0, rows, ROWS):
            _add_tile(out, a, b, i, j, 0, inner)


@compiled
def add_product_of_lower(out, a, b, rows, columns):
    """The same for a square ``a`` of zeros above its diagonal."""
    for j in range(0, columns, VECTOR // out.itemsize):
        for i in range(0, rows, ROWS):
            _add_tile(out, a, b, i, j, 0, min(i + ROWS, rows))


@compiled
def add_product_of_upper(out, a, b, rows, columns):
    """The same for a square ``a`` of zeros below its diagonal."""
    for j in range(0, columns, VECTOR // out.itemsize):
        for i in range(0, rows, ROWS):
            _add_tile(out, a, b, i, j, i, rows)


@compiled
def add_product_by_lower(out, a, b, rows, inner):
    """The same for a square ``b`` of zeros above its diagonal."""
    for j in range(0, inner, VECTOR // out.itemsize):
        for i in range(0, rows, ROWS):
            _add_tile(out, a, b, i, j, j, inner)


@compiled
def add_lower_product(out, a, b, rows, inner):
    """Of a square ``out`` the tiles up to the diagonal."""
    for i in range(0, rows, ROWS):
        for j in range(0, min(i + ROWS, rows), VECTOR // out.itemsize):
            _add_tile(out, a, b, i, j, 0, inner)
