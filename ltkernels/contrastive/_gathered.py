"""Columns of all ranks: rows stay where they are, columns are gathered, and their gradients summed over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._errors import ArgumentError
from .._ranks import Ranks


class _Gather(torch.autograd.Function):
    """``(local, ranks) -> `` the rows of every rank, by rank."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.rows = ranks, len(local)
        return torch.cat(ranks.gather(local))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a loss over ranks has no second derivatives: call backward without create_graph")
        ranks, rows = ctx.ranks, ctx.rows
        total = upstream.to(ranks.device).contiguous().clone()
        dist.all_reduce(total, group=ranks.group)
        return total[ranks.rank * rows : (ranks.rank + 1) * rows].to(upstream.device), None


_gather: Callable[[Tensor, Ranks], Tensor] = _Gather.apply


def gather_columns(local: Tensor, labels: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, int]:
    """The rows and labels of all ranks, and where this rank's begin. Raises ValueError on every rank where shapes or kinds differ."""
    own: list[Any] = [list(local.shape), str(local.dtype)]
    for rank, other in enumerate(ranks.share(own)):
        if other != own:
            raise ArgumentError(
                f"rank {rank} has features {tuple(other[0])} of {other[1]}, rank {ranks.rank} {tuple(own[0])} of {own[1]}; all ranks must "
                "have the same shape"
            )
    return _gather(local, ranks), torch.cat(ranks.gather(labels)), ranks.rank * len(local)


def total(value: Tensor, ranks: Ranks | None) -> Tensor:
    """A number summed over the ranks, without gradient."""
    if ranks is None:
        return value
    found = value.detach().to(ranks.device).clone()
    dist.all_reduce(found, group=ranks.group)
    return found.to(value.device)


def of_all(loss: Tensor, ranks: Ranks | None) -> Tensor:
    """From this rank's share of a loss to its value over all ranks. The gradient is that of the share times the number of ranks, by which
    DistributedDataParallel divides."""
    if ranks is None:
        return loss
    return total(loss, ranks) + ranks.size * (loss - loss.detach())
