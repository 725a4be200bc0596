"""Matrix products of the network, by the fastest exact float32 routine at hand.

torch multiplies float32 matrices on a CPU with MKL, which on AMD's processors reaches less than half of what oneDNN
does, and oneDNN is in every torch for x86: it is asked where torch offers it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

# torch's compiler makes linear layers of it.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def times_transposed(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`left @ right.T + bias`, (n, m) of (n, k), (m, k) and (m,); the matrices may be views, without gradients."""
    if (
        _onednn is not None
        and left.device.type == "cpu"
        and left.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and _plain(left)
        and _plain(right)
    ):
        if bias is None and not left.is_contiguous() and len(left) > len(right):  # it would be copied first
            return _onednn(right, left, None, "none", [], "").T.contiguous()
        return _onednn(left, right, bias, "none", [], "")
    return functional.linear(left, right, bias)


def _plain(matrix: torch.Tensor) -> bool:
    """Whether oneDNN has a routine for the layout; for others it has a slow one."""
    return matrix.is_contiguous() or matrix.T.is_contiguous()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.linear` for matrices, gradients included."""
    if torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, weight, bias)  # autocast has gradients of its own
    return _Linear.apply(x, weight, bias)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that matrix products with `x` are to be computed in: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return times_transposed(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_result: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = times_transposed(of_result, weight.T) if ctx.needs_input_grad[0] else None
        return of_x, times_transposed(of_result.T, x.T), of_result.sum(0)
