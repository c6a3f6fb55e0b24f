"""What the launchers of the second family (soft targets, experts, the general sigmoid) share.

Their gradients are in the loss' precision: `ltkernels._fused` rounds them, after the upstream factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._call import NONE, SUM
from .._fused import Request
from . import _row
from .adjusted_ce import _reduce


def unit(tensor: Tensor) -> Tensor:
    """With classes next to each other, as kernels read them."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def upstream(request: Request, real: torch.dtype) -> tuple[Tensor | None, int]:
    """The rows' upstream gradients, or one for all of them, and what the kernels' bits say of that."""
    if request.upstream is None:
        return None, 0
    given = request.upstream[0].to(real).contiguous()
    return given, _row.ONE_COEF.value if given.dim() == 0 else 0


def reduced(row_loss: Tensor, reduction: int, denominator: Tensor | None = None) -> Tensor:
    """The sum of row losses over a denominator of one element; None is 1."""
    if reduction == NONE:
        return row_loss
    loss = torch.empty((), dtype=row_loss.dtype, device=row_loss.device)
    if row_loss.numel() == 0:
        return loss.fill_(0.0 if reduction == SUM else torch.nan)
    one = loss.view(1)
    _reduce(one, row_loss.view(-1), one if denominator is None else denominator, 0 if denominator is None else 1)
    return loss
