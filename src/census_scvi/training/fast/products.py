"""Matrix products of the network; float32 products on a CPU use the library that is faster on the processor.

torch multiplies float32 matrices on a CPU with its BLAS library, which is MKL in its x86 builds. These builds also
include oneDNN, which takes less than half of the time on some processors and more time on others. `measure` finds the
faster library.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

# The oneDNN operator that torch.compile uses for linear layers.
_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

Library = Literal["torch", "onednn"]


@dataclass(frozen=True)
class Libraries:
    """The library for each kind of matrix product.

    Attributes
    ----------
    forward, input_gradient, weight_gradient
        The library; "torch" is torch's default.
    counts
        Input of the encoder's first layer: "dense" multiplies the dense matrix with the libraries above, "sparse" only
        the non-zero counts with `sparse_layer`.
    """

    forward: Library = "torch"
    input_gradient: Library = "torch"
    weight_gradient: Library = "torch"
    counts: Literal["dense", "sparse"] = "dense"

    def __str__(self) -> str:
        return ", ".join(f"{kind.replace('_', ' ')} {library}" for kind, library in asdict(self).items())


_used = Libraries()


def use(libraries: Libraries) -> None:
    """Use these libraries in this process from now on."""
    global _used
    _used = libraries


def used() -> Libraries:
    """The libraries that are in use."""
    return _used


def onednn_available() -> bool:
    """Whether torch provides oneDNN's matrix products on this machine."""
    return _onednn is not None and torch.backends.mkldnn.is_available()


def layer_output(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T + bias`: (cells, outputs) from (cells, inputs), (outputs, inputs) and (outputs,).

    In this and the next functions the matrices may be views, and autograd records nothing.
    """
    return times_transposed(_used.forward, x, weight, bias)


def input_gradient(slopes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`slopes @ weight`: (cells, inputs) from (cells, outputs) and (outputs, inputs)."""
    return times_transposed(_used.input_gradient, slopes, weight.T)


def weight_gradient(slopes: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`slopes.T @ x`: (outputs, inputs) from (cells, outputs) and (cells, inputs)."""
    return times_transposed(_used.weight_gradient, slopes.T, x.T)


def times_transposed(
    library: Library, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`left @ right.T + bias`: (n, m) from (n, k), (m, k) and (m,); by torch if oneDNN cannot multiply the operands."""
    if (
        library == "torch"
        or left.device.type != "cpu"
        or left.dtype != torch.float32
        or not onednn_available()
        or not _plain(left)
        or not _plain(right)
    ):
        return functional.linear(left, right, bias)
    if bias is None and not left.is_contiguous() and len(left) > len(right):  # oneDNN would copy `left` first
        return _onednn(right, left, None, "none", [], "").T.contiguous()
    return _onednn(left, right, bias, "none", [], "")


def _plain(matrix: torch.Tensor) -> bool:
    """Whether oneDNN has a fast routine for the memory layout of a matrix."""
    return matrix.is_contiguous() or matrix.T.is_contiguous()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.linear` for matrices, with gradients."""
    if torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, weight, bias)  # autocast needs torch's own gradients
    return _Linear.apply(x, weight, bias)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of matrix products of values of `dtype`: autocast's dtype if autocast is active."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return layer_output(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_result: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = input_gradient(of_result, weight) if ctx.needs_input_grad[0] else None
        return of_x, weight_gradient(of_result, x), of_result.sum(0)
