"""The upstream gradient of a scalar loss: forward forms the gradient for the factor that the caller expects (1 where nothing is said),
backward multiplies by the quotient of what came and what was expected, which nearly always is 1 and costs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backends, _checks

_NONE = _checks.REDUCTIONS.index("none")


def in_backward(reduction: int, dtype: torch.dtype, expected: Tensor | None) -> bool:
    """Whether the gradient is formed in backward, where the upstream gradient is known.

    It is for unreduced losses, and for float16 logits where nothing was said of it: rounded to float16 before a loss scaler's factor,
    the small gradients would be the zeros that the scaler is there to prevent.
    """
    return reduction == _NONE or (dtype is torch.float16 and expected is None)


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
    elif not grad.is_cpu or upstream.item() != (1.0 if expected is None else expected.item()):
        grad.mul_(remaining(upstream, expected))  # torch multiplies 16-bit numbers by a float32 scalar in float32


def remember(ctx: Any, expected: Tensor | None) -> None:
    """For `remembered` in backward. Not among the saved tensors, whose unpacking costs a small loss microseconds."""
    ctx.expected = expected
    ctx.expected_version = None if expected is None else expected._version


def remembered(ctx: Any) -> Tensor | None:
    """What forward formed the gradient for. Raises RuntimeError where its memory holds something else by now."""
    expected: Tensor | None = ctx.expected
    if expected is not None and expected._version != ctx.expected_version:
        raise RuntimeError("grad_scale was changed in place between the loss and its backward; pass a clone of it")
    return expected


def give_once(ctx: Any) -> None:
    """Before the gradient of ``inplace=True`` is read. Raises RuntimeError in a second backward."""
    if ctx.given:
        raise RuntimeError(
            "a second backward needs the logits, and inplace=True has overwritten them; pass inplace=False"
        )
    ctx.given = True


def is_leaf(logits: Tensor) -> bool:
    """Whether autograd may keep a gradient that it is given for `logits`, as the ``.grad`` of them or of what they are a view of."""
    return logits.is_leaf or (logits._base is not None and logits._base.is_leaf)


def overwritten(ctx: Any, logits: Tensor, upstream: Tensor, expected: Tensor | None) -> Tensor:
    """The gradient that lies in the logits' memory: that memory itself.

    Not where it would become the ``.grad`` of a leaf, whose memory it is; nor where a GPU's kernel, which multiplies consecutive
    elements, would meet gaps.
    """
    grad = logits.detach()
    if ctx.leaf or (not grad.is_contiguous() and ctx.backend in _backends.ON_DEVICE):
        return multiplied(grad, upstream, expected)
    multiply_(grad, upstream, ctx.backend, expected)
    return grad


def check_second_derivative(inplace: bool) -> None:
    """Raises RuntimeError where backward(create_graph=True) misses the logits."""
    if inplace:
        raise RuntimeError(
            "double backward needs the logits, and inplace=True has overwritten them; pass inplace=False"
        )
