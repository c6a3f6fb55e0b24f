"""Everything that crosses ranks: whether they agree, rows of the batch, row statistics, the feature gradient."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..losses import _two_phase

# Bytes of the statistics of all ranks up to which one all-gather brings them. It is the faster way while they are few, and grows with
# the number of ranks; the two halves of an all-reduce, the other way, do not.
_GATHERED = 1 << 21


class Rows(NamedTuple):
    """A batch of which every rank holds `own` rows, padded with ignored ones to `per`; None where all ranks hold all rows."""

    own: int
    per: int
    rank: int
    world: int

    def slice_own(self) -> slice:
        return slice(self.rank * self.per, self.rank * self.per + self.own)


class Claim(NamedTuple):
    """What a rank says before the first exchange whose size depends on it."""

    start: int
    part: int
    classes: int
    rows: int
    settings: int
    labels: int


def fingerprint(*values: object) -> int:
    """A number below 2^32 for plain values and the bits of float32 and float64 tensors; sums of integers, so it is exact."""
    parts = [
        int(value.view(torch.int32 if value.element_size() == 4 else torch.int64).sum())
        if isinstance(value, Tensor)
        else value
        for value in values
    ]
    return zlib.crc32(repr(parts).encode())


def claims(own: Claim, group: Any, device: torch.device) -> list[Claim]:
    """Of all ranks, by rank."""
    mine = torch.tensor(own, dtype=torch.int64, device=device)
    return [Claim(*row) for row in _all_gather(mine, group).tolist()]


def check(ranks: Sequence[Claim], replicated: bool) -> None:
    """Raises ValueError, on every rank, where the ranks cannot compute one loss together."""
    ranges = [(claim.start, claim.start + claim.part) for claim in ranks]
    classes = {claim.classes for claim in ranks}
    if len(classes) > 1:
        raise ValueError(f"num_classes differs over the ranks: {[claim.classes for claim in ranks]}")
    expected, total = 0, classes.pop()
    for start, end in sorted(ranges):
        if start != expected and start != end:
            raise ValueError(f"the ranks hold the classes {ranges}; they must make up [0, {total})")
        expected = max(expected, end)
    if expected != total:
        raise ValueError(f"the ranks hold the classes {ranges}; they must make up [0, {total})")
    if len({claim.settings for claim in ranks}) > 1:
        raise ValueError(
            "the ranks were called with different options or tables, or with features that differ in dtype, width or whether they "
            "require a gradient; all but weight_shard, bias and class_start must be the same"
        )
    if replicated and len({(claim.rows, claim.labels) for claim in ranks}) > 1:
        raise ValueError(
            f"target differs over the ranks, with {[claim.rows for claim in ranks]} rows; with batch='replicated' every rank must give "
            "the same rows (batch='sharded' takes each rank's own)"
        )


def gather_rows(own: Tensor, rows: Rows, group: Any) -> Tensor:
    """(own, ...) of every rank to (world * per, ...); padding is 0."""
    return _all_gather(_padded(own, rows, 0), group).flatten(0, 1)


def gather_labels(
    labels: tuple[Tensor, Tensor | None, Tensor | None], rows: Rows, group: Any, ignored: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(first, second, lam) of the whole batch, in one collective; padding is ignored rows."""
    first, second, lam = labels
    first = _padded(first, rows, ignored)
    if second is None:
        return _all_gather(first, group).flatten(0, 1), None, None
    bits = _padded(lam.double(), rows, 0).view(torch.int64)
    parts = _all_gather(torch.stack([first, _padded(second, rows, 0), bits]), group)
    first, second, bits = (parts[:, k].flatten() for k in range(3))
    return first, second, bits.view(torch.float64).to(lam.dtype)


def _padded(own: Tensor, rows: Rows, value: int) -> Tensor:
    if rows.own == rows.per:
        return own.contiguous()
    return torch.cat([own, own.new_full((rows.per - rows.own, *own.shape[1:]), value)])


def merged(statistics: Tensor, group: Any, world: int) -> Tensor:
    """(R, 4) statistics of this rank's classes to those of all classes: one all-reduce whose operator is `_two_phase.merge`.

    As one all-gather while that is small. Otherwise in its two halves, each rank merging 1 / world of the rows in between.
    """
    if world == 1:
        return statistics
    if statistics.numel() * 8 * world <= _GATHERED:
        return _two_phase.merge(_all_gather(statistics, group))
    count = len(statistics)
    per = -(-count // world)
    if per * world != count:
        statistics = torch.cat([statistics, statistics.new_zeros((per * world - count, 4))])
    parts = torch.empty_like(statistics)
    dist.all_to_all_single(parts, statistics.contiguous(), group=group)
    mine = _two_phase.merge(parts.view(world, per, 4))
    return _all_gather(mine, group).flatten(0, 1)[:count]


def reduce_rows(grad: Tensor, rows: Rows | None, group: Any) -> Tensor:
    """The sum over the ranks: of all rows where every rank holds them, else of this rank's own."""
    if rows is None:
        dist.all_reduce(grad, group=group)
        return grad
    if grad.is_cpu:  # gloo's reduce-scatter is an all-reduce inside, where it exists
        dist.all_reduce(grad, group=group)
        return grad[rows.slice_own()]
    own = torch.empty_like(grad[: rows.per])
    dist.reduce_scatter(own, list(grad.chunk(rows.world)), group=group)
    return own[: rows.own]


def _all_gather(own: Tensor, group: Any) -> Tensor:
    """(world, *shape)."""
    parts = own.new_empty((dist.get_world_size(group), *own.shape))
    dist.all_gather(list(parts.unbind(0)), own.contiguous(), group=group)
    return parts
