"""V and FDG of features that never sit in memory together: mergeable statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._features import check_alpha, check_centering, check_count, check_rows, cholesky_log_det
from .._ranks import Ranks
from ._files import read_statistics, write_statistics

_LOG4 = 2.0 * math.log(2.0)
# Rows centred and multiplied at a time, in elements: a batch of any size needs no second copy of itself.
BLOCK = 1 << 21


class FeatureStatistics:
    """Count, mean and scatter of a stream of features: all that V and FDG need.

    Batches, files, processes and ranks may be merged in any order; the result differs from the direct one by rounding
    only. State and sums are float64 whatever the features are, so that raw pixels (condition numbers far above 1e3) are
    safe; memory is d^2 + O(d) doubles.

    Attributes:
        count: samples seen.
        mean: (d,) float64.
        scatter: (d, d) float64, sum of (x - mean)(x - mean)^T.

    Source: the pairwise merge of Chan, Golub & LeVeque (1979).
    """

    def __init__(self, width: int, *, device: Any = None) -> None:
        """Statistics of no samples of `width` features."""
        width = check_count(width, "width", 1)
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    @property
    def width(self) -> int:
        return self.mean.shape[0]

    def update(self, batch: Any) -> FeatureStatistics:
        """Adds a batch (n, d) of float features, n >= 0; returns self.

        TypeError, ValueError as `feature_diversity`, and for a different d; a refused batch changes nothing.
        """
        step = max(1, BLOCK // self.width)
        rows = check_rows(batch, "batch", self.width, "the statistics have", step)
        for block in rows.split(step) if len(rows) else ():
            part = block.to(self.mean.device, torch.float64)
            mean = part.mean(0)
            centred = part - mean
            self._merge(part.shape[0], mean, centred.mT @ centred)
        return self

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if count == 0:
            return
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Adds the samples that `other` has seen (it stays as it is); returns self."""
        if other.width != self.width:
            raise ValueError(f"other has {other.width} features per sample, these statistics have {self.width}")
        self._merge(other.count, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))
        return self

    def all_reduce(self, group: Any = None) -> FeatureStatistics:
        """Merges the statistics of every rank of a `torch.distributed` process group, on every rank; returns self.

        Exactly the merges that `merge` makes, in the order of the ranks: the result is the same on every rank and from
        run to run, to the bit. It takes a gather of two integers, one of d and one of d^2 doubles a rank (the last in
        blocks of rows, so that memory stays O(d^2) however many ranks there are). Every rank must call it; one that has
        seen nothing takes part.

        Args:
            group: process group; None and "world" are the default one.

        Raises:
            ValueError: on every rank, where they disagree on the number of features.
        """
        ranks = Ranks(group)
        check_widths([int(width) for width in ranks.gather(torch.tensor(self.width))])
        merge_ranks(ranks, [self])
        return self

    def save(self, path: str | Path) -> None:
        """Writes count, mean and scatter to an .npz file, whole or not at all."""
        write_statistics(Path(path), [self])

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Reads what `save` wrote; see `read_statistics` for what is refused."""
        _, ((count, mean, scatter),) = read_statistics(Path(path), False)
        return cls._from_values(count, mean, scatter)

    @classmethod
    def _from_values(cls, count: int, mean: Tensor, scatter: Tensor) -> FeatureStatistics:
        """Statistics of known values; nothing is checked or copied."""
        out = cls.__new__(cls)
        out.count, out.mean, out.scatter = count, mean, scatter
        return out

    def _log_det(self, centred: bool, alpha: float) -> Tensor:
        matrix = self.scatter.clone()
        if not centred:
            matrix.addr_(self.mean, self.mean, alpha=float(self.count))
        matrix *= alpha / self.count
        matrix.diagonal().add_(1.0)
        return cholesky_log_det(matrix)

    def diversity(self, *, alpha: float = 1.0) -> Tensor:
        """V of everything seen, as `feature_diversity` of all rows at once; ValueError when nothing was."""
        if self.count == 0:
            raise ValueError("no samples were seen: the diversity of no samples is undefined")
        return self._log_det(True, check_alpha(alpha)) / _LOG4

    def gain(self, augmented: FeatureStatistics, *, centering: str = "joint", alpha: float = 1.0) -> Tensor:
        """FDG of adding the samples of `augmented` to these, as `feature_diversity_gain` of all rows at once.

        ValueError where these statistics hold fewer than two samples, or equal ones: FDG is undefined there.
        """
        check_centering(centering)
        alpha = check_alpha(alpha)
        if augmented.width != self.width:
            raise ValueError(f"augmented has {augmented.width} features per sample, original has {self.width}")
        if self.count < 2 and centering != "none":
            raise ValueError(
                f"original has N = {self.count} samples: its diversity is 0 and FDG, a ratio to it, is undefined; "
                "give at least 2"
            )
        base = self._log_det(centering != "none", alpha) if self.count else self.mean.new_zeros(())
        if not float(base) > 0.0:
            raise ValueError("the original samples have zero diversity: FDG, a ratio to it, is undefined")
        both = FeatureStatistics(self.width, device=self.mean.device).merge(self)
        if centering == "separate":
            both.scatter += augmented.scatter.to(both.mean.device)
            both.count += augmented.count
        else:
            both.merge(augmented)
        return both._log_det(centering != "none", alpha) / base - 1.0


def check_widths(widths: Sequence[int]) -> None:
    """ValueError unless every rank has as many features."""
    if min(widths) != max(widths):
        raise ValueError(f"ranks disagree on the number of features: {min(widths)} to {max(widths)}")


def merge_ranks(ranks: Ranks, parts: Sequence[FeatureStatistics]) -> None:
    """Merges each of `parts` over the ranks; all ranks have as many, of one width."""
    counts = torch.stack(ranks.gather(torch.tensor([part.count for part in parts])), 1).tolist()
    means = ranks.gather(torch.stack([part.mean for part in parts]))
    for c, own in enumerate(parts):
        total, mean, moves = 0, torch.zeros_like(own.mean), []
        for count, other in zip(counts[c], means):
            delta = other[c] - mean if count else torch.zeros_like(mean)
            moves.append((delta, total * count / max(1, total + count)))
            total += count
            mean += delta * (count / max(1, total))
        if total == 0:
            continue
        scatter = torch.zeros_like(own.scatter)
        step = max(1, BLOCK // (own.width * ranks.size))
        for begin in range(0, own.width, step):
            rows = scatter[begin : begin + step]
            for part, (delta, weight) in zip(ranks.gather(own.scatter[begin : begin + step]), moves):
                rows += part
                rows.addr_(delta[begin : begin + step], delta, alpha=weight)
        own.count, own.mean, own.scatter = total, mean, scatter
