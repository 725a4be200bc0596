"""The encoder's first layer for float32 on a CPU, computed from the non-zero counts only.

In `log1p(counts) @ weight.T` and in the gradient of the weights, `slopes.T @ log1p(counts)`, a count of 0 adds nothing.
If a tenth of the counts are non-zero, a tenth of the multiplications remain. Each multiplication takes longer than in a
dense product, so `measure` finds the faster of the two.

The weights are processed in tiles of 128 inputs x 64 hidden units: a tile stays in the cache while it is multiplied
with all cells. For this, the non-zeros of a minibatch are first sorted by tile, and within a tile by cell. The batch is
an input like a gene, with the value 1. This equals scvi-tools' one-hot matrix without its zeros.

numba compiles the functions. The innermost loops are written as LLVM vector instructions: LLVM would not keep the sums
of a Python loop in registers, because the arrays might overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from numba.core.base import BaseContext
from numba.extending import intrinsic

from census_scvi.counts.minibatch import SparseCounts
from census_scvi.model.compiled import in_threads, require_equal, works

_TILE = 128  # inputs; a position within it is stored as uint8
_WIDTH = 64  # hidden units: eight AVX2 registers, or four of AVX-512

_compiled = numba.njit(error_model="numpy", nogil=True, cache=True)


def sparse_layer(
    counts: SparseCounts, batch: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """`log1p(counts) @ weight.T + bias`, with gradients with respect to weight and bias.

    Parameters
    ----------
    counts
        Counts of the cells, on the CPU.
    batch
        int64 (cells,): the batch of each cell, if the inputs of the layer are genes and one-hot batches; None if they
        are genes only.
    weight
        float32 (n_hidden, genes + batches), or (n_hidden, genes).
    bias
        float32 (n_hidden,).

    Returns
    -------
    float32 (cells, n_hidden).
    """
    return _SparseLayer.apply(counts, batch, weight, bias)


class _Inputs(NamedTuple):
    """Non-zero inputs of some cells, sorted by tile and within a tile by cell.

    Attributes
    ----------
    starts
        int64 (tiles, cells + 1): position of each cell's first input, and the end of the last cell's inputs.
    places
        uint8 (inputs,): column within the tile.
    values
        float32 (inputs,).
    """

    starts: npt.NDArray[np.int64]
    places: npt.NDArray[np.uint8]
    values: npt.NDArray[np.float32]


class _SparseLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, counts: SparseCounts, batch: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        n_cells, n_inputs = len(counts), weight.shape[1]
        parts = max(1, min(torch.get_num_threads(), n_cells))
        ctx.cells = [slice(n_cells * part // parts, n_cells * (part + 1) // parts) for part in range(parts)]
        ctx.inputs, ctx.n_inputs = [None] * parts, n_inputs
        last = counts.n_detected.cumsum(0)
        per_cell = [(last - counts.n_detected).numpy(), last.numpy()]
        codes = np.empty(0, np.int64) if batch is None else batch.numpy() + counts.n_genes
        entries = [counts.genes.numpy(), counts.counts.to(torch.float32).log1p().numpy()]
        made = torch.empty(n_cells, len(weight))
        arrays = [each.detach().numpy() for each in (weight, bias, made)]

        def work(part: int) -> None:
            cells = ctx.cells[part]
            inputs = _Inputs(*_sorted(*(each[cells] for each in per_cell), *entries, codes[cells], n_inputs))
            ctx.inputs[part] = inputs
            _outputs(*inputs, *arrays[:2], arrays[2][cells])

        in_threads(work, parts)
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_made: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slopes = of_made.contiguous().numpy()
        of_weight = torch.empty(slopes.shape[1], ctx.n_inputs)
        tiles, parts = len(ctx.inputs[0].starts), len(ctx.inputs)

        def work(part: int) -> None:
            some = tiles * part // parts, tiles * (part + 1) // parts
            for number, (cells, inputs) in enumerate(zip(ctx.cells, ctx.inputs, strict=True)):
                _weight_gradient(*inputs, slopes[cells], *some, number > 0, of_weight.numpy())

        in_threads(work, parts)
        return None, None, of_weight, of_made.sum(0)


@_compiled
def _sorted(first, last, genes, values, codes, n_inputs):  # type: ignore[no-untyped-def]  # numba infers the types
    """`_Inputs` of cells: their non-zeros `first` to before `last`, and a 1 in column `codes` if there are codes."""
    n_cells, n_tiles = len(first), (n_inputs + _TILE - 1) // _TILE
    starts = np.zeros((n_tiles, n_cells + 1), np.int64)
    for cell in range(n_cells):
        for i in range(first[cell], last[cell]):
            starts[genes[i] // _TILE, cell + 1] += 1
        if len(codes):
            starts[codes[cell] // _TILE, cell + 1] += 1
    total = 0
    for tile in range(n_tiles):
        starts[tile, 0] = total
        for cell in range(n_cells):
            total += starts[tile, cell + 1]
            starts[tile, cell + 1] = total
    free = starts[:, 0].copy()
    places, sorted_values = np.empty(total, np.uint8), np.empty(total, np.float32)
    for cell in range(n_cells):
        for i in range(first[cell], last[cell]):
            tile = genes[i] // _TILE
            places[free[tile]], sorted_values[free[tile]] = genes[i] - tile * _TILE, values[i]
            free[tile] += 1
        if len(codes):
            tile = codes[cell] // _TILE
            places[free[tile]], sorted_values[free[tile]] = codes[cell] - tile * _TILE, 1
            free[tile] += 1
    return starts, places, sorted_values


@_compiled
def _outputs(starts, places, values, weight, bias, out):  # type: ignore[no-untyped-def]  # numba infers the types
    n_cells, n_hidden = out.shape
    tile, sums = np.zeros((_TILE, _WIDTH), np.float32), np.empty((n_cells, _WIDTH), np.float32)
    for left in range(0, n_hidden, _WIDTH):
        width = min(_WIDTH, n_hidden - left)
        sums[:] = 0
        for number in range(len(starts)):
            some = weight[left : left + width, number * _TILE : (number + 1) * _TILE]
            for unit in range(width):
                for place in range(some.shape[1]):
                    tile[place, unit] = some[unit, place]
            for cell in range(n_cells):
                _add_rows(sums[cell], tile, places, values, starts[number, cell], starts[number, cell + 1])
        for cell in range(n_cells):
            for unit in range(width):
                out[cell, left + unit] = sums[cell, unit] + bias[left + unit]


@_compiled
def _weight_gradient(starts, places, values, slopes, first, last, add, out):  # type: ignore[no-untyped-def]  # numba infers the types
    """`slopes.T @ inputs` for the tiles `first` to before `last`, written to `out`, or added to it if `add`."""
    n_cells, n_hidden = slopes.shape
    tile, some_slopes = np.zeros((_TILE, _WIDTH), np.float32), np.zeros((n_cells, _WIDTH), np.float32)
    for left in range(0, n_hidden, _WIDTH):
        width = min(_WIDTH, n_hidden - left)
        some_slopes[:, :width] = slopes[:, left : left + width]
        for number in range(first, last):
            some = out[left : left + width, number * _TILE : (number + 1) * _TILE]
            for unit in range(width):
                for place in range(some.shape[1]):
                    tile[place, unit] = some[unit, place] if add else 0
            for cell in range(n_cells):
                _add_to_rows(some_slopes[cell], tile, places, values, starts[number, cell], starts[number, cell + 1])
            for unit in range(width):
                for place in range(some.shape[1]):
                    some[unit, place] = tile[place, unit]


def _loop_over_inputs(body: Callable[..., ir.Value]) -> Any:
    """A function `(cell, tile, places, values, first, last)` that loops over the inputs `first` to before `last`.

    `cell` is float32 (64,), `tile` float32 (128, 64). The arguments of `body` are the instruction builder, the value of
    an input (repeated 64 times), its row of the tile (values and pointer), and the cell's values. It returns the new
    values of the cell.
    """
    vector, index = ir.VectorType(ir.FloatType(), _WIDTH), ir.IntType(64)

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        arrays = zip(signature.args[:4], arguments[:4], strict=True)
        cell, tile, places, values = (context.make_array(kind)(context, builder, array).data for kind, array in arrays)
        bounds = zip(signature.args[4:], arguments[4:], strict=True)
        first, last = (context.cast(builder, bound, kind, types.int64) for kind, bound in bounds)

        def pointer(data: ir.Value, start: ir.Value) -> ir.Value:
            return builder.bitcast(builder.gep(data, [start]), vector.as_pointer())

        whole = pointer(cell, index(0))
        before, head = builder.block, builder.append_basic_block("head")
        inside, after = builder.append_basic_block("inside"), builder.append_basic_block("after")
        initial = builder.load(whole, align=4)
        builder.branch(head)
        builder.position_at_end(head)
        i, held = builder.phi(index), builder.phi(vector)
        i.add_incoming(first, before)
        held.add_incoming(initial, before)
        builder.cbranch(builder.icmp_signed("<", i, last), inside, after)
        builder.position_at_end(inside)
        place = builder.zext(builder.load(builder.gep(places, [i])), index)
        value = builder.load(builder.gep(values, [i]))
        undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), _WIDTH), None)
        repeated = builder.insert_element(undefined, value, ir.IntType(32)(0))
        repeated = builder.shuffle_vector(repeated, undefined, zeros)
        row = pointer(tile, builder.mul(place, index(_WIDTH)))
        held.add_incoming(body(builder, repeated, builder.load(row, align=4), row, held), inside)
        i.add_incoming(builder.add(i, index(1)), inside)
        builder.branch(head)
        builder.position_at_end(after)
        builder.store(held, whole, align=4)
        return context.get_dummy_value()

    def typed(typing_context: Any, cell: Any, tile: Any, places: Any, values: Any, first: Any, last: Any) -> Any:
        return types.void(cell, tile, places, values, first, last), generate

    return intrinsic(typed)


def _multiply_add(builder: ir.IRBuilder, one: ir.Value, other: ir.Value, summand: ir.Value) -> ir.Value:
    """`one * other + summand`, in one instruction if the processor has it."""
    fused = ("contract",)
    return builder.fadd(builder.fmul(one, other, flags=fused), summand, flags=fused)


def _add_row(builder: ir.IRBuilder, value: ir.Value, row: ir.Value, place: ir.Value, cell: ir.Value) -> ir.Value:
    return _multiply_add(builder, value, row, cell)


def _add_to_row(builder: ir.IRBuilder, value: ir.Value, row: ir.Value, place: ir.Value, cell: ir.Value) -> ir.Value:
    builder.store(_multiply_add(builder, value, cell, row), place, align=4)
    return cell


# They compute cell += value * tile[place], and tile[place] += value * cell.
_add_rows, _add_to_rows = _loop_over_inputs(_add_row), _loop_over_inputs(_add_to_row)


@cache
def usable() -> bool:
    """Whether the layer compiles on this machine and its results equal torch's dense products."""
    return works(_compare, "the encoder's layer for sparse counts")


def _compare() -> None:
    """ArithmeticError if the layer's results differ from dense products on a few cells."""
    n_genes, n_batches, n_hidden = _TILE + 20, 3, _WIDTH + 5
    genes = torch.arange(n_genes)
    few = SparseCounts(
        torch.tensor([100, 0, n_genes - 100]), genes.to(torch.uint16), (1 + genes % 7).to(torch.uint16), n_genes
    )
    batch = torch.tensor([0, 2, 1])
    one_hot = torch.nn.functional.one_hot(batch, n_batches).float()
    weight = torch.arange(n_hidden * (n_genes + n_batches)).sin().view(n_hidden, -1)
    bias, slopes = torch.arange(n_hidden).cos(), torch.arange(3 * n_hidden).cos().view(3, -1)
    dense = torch.cat([few.dense(log1p=True), one_hot], 1)
    with torch.enable_grad():
        weight.requires_grad_()
        made = sparse_layer(few, batch, weight, bias)
        (of_weight,) = torch.autograd.grad(made, weight, slopes)
    expected = torch.nn.functional.linear(dense, weight.detach(), bias), slopes.T @ dense
    for found, wanted in zip((made.detach(), of_weight), expected, strict=True):
        require_equal(found, wanted, 1e-5)
