"""The upstream gradient of a scalar loss: forward forms the gradient for the factor that the caller expects (1 where nothing is said),
backward multiplies by the quotient of what came and what was expected, which nearly always is 1 and costs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backends, _checks

_NONE = _checks.REDUCTIONS.index("none")


def in_backward(reduction: int, dtype: torch.dtype, expected: Tensor | None, inplace: bool = False) -> bool:
    """Whether the gradient is formed in backward, where the upstream gradient is known.

    It is for unreduced losses, and for float16 logits where nothing was said of it: rounded to float16 before a loss scaler's factor,
    the small gradients would be the zeros that the scaler is there to prevent.
    """
    return reduction == _NONE or (dtype is torch.float16 and expected is None and not inplace)


def row_factors(upstream: Tensor | None, rows: int) -> Tensor | None:
    """The upstream gradient of a loss, one number or one a row, as the kernels' `row_coef`."""
    return None if upstream is None else upstream.expand(rows) if upstream.dim() == 0 else upstream.contiguous()


def remaining(upstream: Tensor, expected: Tensor | None) -> Tensor:
    """What the gradient that was formed for `expected` must still be multiplied by."""
    return upstream if expected is None else upstream / expected


def multiplied(grad: Tensor, upstream: Tensor, expected: Tensor | None) -> Tensor:
    """In the loss' precision, rounded once: a 16-bit upstream factor would be rounded itself."""
    return (grad.to(upstream.dtype) * remaining(upstream, expected)).to(grad.dtype)


def multiply_(grad: Tensor, upstream: Tensor, backend: str, expected: Tensor | None = None) -> None:
    """In place; free where `upstream` is what was expected, without a wait for a GPU."""
    if backend in _backends.ON_DEVICE:
        if grad.numel() > 0:
            _backends.scale_kernel(backend)(grad, upstream, expected)
    elif not grad.is_cpu:
        grad.mul_(remaining(upstream, expected))
    elif upstream.item() != (1.0 if expected is None else expected.item()):
        grad.mul_(remaining(upstream, expected))  # torch multiplies 16-bit numbers by a float32 scalar in float32


def overwritten(ctx: Any, upstream: Tensor) -> Tensor:
    """The gradient of a loss whose logits' memory holds it: that memory itself, once.

    `ctx` saved (expected, logits) and says `given` and `backend`.
    """
    if ctx.given:
        raise RuntimeError(
            "a second backward needs the logits, and inplace=True has overwritten them; pass inplace=False"
        )
    expected: Tensor | None = ctx.saved_tensors[0]
    grad: Tensor = ctx.saved_tensors[-1].detach()
    ctx.given = True
    if not grad.is_contiguous() and ctx.backend in _backends.ON_DEVICE:  # whose kernels multiply consecutive elements
        return multiplied(grad, upstream, expected)
    multiply_(grad, upstream, ctx.backend, expected)
    return grad


def check_second_derivative(inplace: bool) -> None:
    """Raises RuntimeError where backward(create_graph=True) misses the logits."""
    if inplace:
        raise RuntimeError(
            "double backward needs the logits, and inplace=True has overwritten them; pass inplace=False"
        )
