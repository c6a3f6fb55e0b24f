"""The memory layout of the C++ scorer (csrc/cpu/subset_scores.h): subsets of one size, eight to a pack, one per
lane."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._native import _C
from .._subsets import SizeGroup

LANES = 8


class Packs:
    """Subsets copied into packs, and the call that scores them all."""

    def __init__(self, pool: Tensor, groups: Sequence[SizeGroup]) -> None:
        """`pool` (P, d) float64 on the CPU; `groups` says which rows form which subset. Group g reads row g of
        `scales`."""
        self.width = pool.shape[1]
        self.largest = max(group.size for group in groups)
        parts, starts, sizes, scales, slots, position = [], [], [], [], [], 0
        for g, (size, _, rows) in enumerate(groups):
            count = rows.shape[0]
            packs = -(-count // LANES)
            # Lanes past the last subset repeat it: their scores are computed and never read.
            lanes = torch.arange(packs * LANES).clamp_(max=count - 1)
            part = pool[rows[lanes].reshape(packs, LANES, size)]
            parts.append(part.permute(0, 3, 2, 1).reshape(-1))
            starts += [position + p * self.width * size * LANES for p in range(packs)]
            position += packs * self.width * size * LANES
            slots.append(len(sizes) * LANES + torch.arange(count))
            sizes += [size] * packs
            scales += [g] * packs
        self.data = torch.cat(parts)
        self.starts, self.sizes, self.scale_rows = torch.tensor(starts), torch.tensor(sizes), torch.tensor(scales)
        self.slots = torch.cat(slots)
        self.ids = torch.cat([group.ids for group in groups])
        self.out = torch.empty(len(sizes) * LANES, dtype=torch.float64)
        self.scratch = self.out[:0]

    def score(self, basis: Tensor, lower: bool, scales: Tensor | None, centre: Tensor, anchor: float) -> Tensor:
        """J = log det(I + Y'^T A^-1 Y') of each subset, in the order of `ids`.

        A^-1 = B^T diag(scale^2) B for `basis` B (d, d), lower triangular if `lower`, and `scales` (groups, d) or None;
        `centre` (d,) is B times the current mean, `anchor` the samples that it stands for.
        """
        threads = torch.get_num_threads()
        need = threads * _C.subset_scores_scratch(self.width, self.largest)
        if self.scratch.numel() < need:
            self.scratch = torch.empty(need, dtype=torch.float64)
        _C.subset_scores(
            self.data.data_ptr(),
            self.starts.data_ptr(),
            self.sizes.data_ptr(),
            self.scale_rows.data_ptr(),
            self.sizes.shape[0],
            self.width,
            basis.data_ptr(),
            lower,
            0 if scales is None else scales.data_ptr(),
            centre.data_ptr(),
            anchor,
            self.scratch.data_ptr(),
            self.out.data_ptr(),
            0,
            False,
            threads,
        )
        return self.out[self.slots]
