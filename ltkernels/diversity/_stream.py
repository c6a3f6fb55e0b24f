"""V and FDG of features that never sit in memory together: mergeable statistics, and V of every class at once."""

from __future__ import annotations

import math
import numbers
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import check_alpha, check_centering, check_features, check_finite
from ._measures import cholesky_log_det

_LOG4 = 2.0 * math.log(2.0)
# Rows centred and multiplied at a time, in elements: a batch of any size needs no second copy of itself.
_BLOCK = 1 << 21


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

    count: int
    mean: Tensor
    scatter: Tensor

    def __init__(self, width: int, *, device: Any = None) -> None:
        """Statistics of no samples of `width` features."""
        if isinstance(width, bool) or not isinstance(width, numbers.Integral):
            raise TypeError(f"width must be an integer, got {type(width).__name__}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.count = 0
        self.mean = torch.zeros(int(width), dtype=torch.float64, device=device)
        self.scatter = torch.zeros(int(width), int(width), dtype=torch.float64, device=device)

    @property
    def width(self) -> int:
        return self.mean.shape[0]

    def update(self, batch: Any) -> FeatureStatistics:
        """Adds a batch (n, d) of float features, n >= 0; returns self.

        TypeError, ValueError as `feature_diversity`, and for a different d; a refused batch changes nothing.
        """
        rows = batch.detach() if isinstance(batch, Tensor) else torch.as_tensor(batch)
        check_features(rows[:0], "batch")  # dtype and shape, before any row is looked at
        if rows.shape[1] != self.width:
            raise ValueError(f"batch has {rows.shape[1]} features per sample, the statistics have {self.width}")
        step = max(1, _BLOCK // self.width)
        blocks = rows.split(step) if len(rows) else ()
        for number, block in enumerate(blocks):
            check_finite(block, "batch", number * step)
        for block in blocks:
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

        Two reductions of d + 1 and d^2 doubles. Every rank must call it; a rank that has seen nothing takes part.
        """
        import torch.distributed as dist

        widths = torch.tensor([self.width, -self.width], device=self.mean.device)
        dist.all_reduce(widths, op=dist.ReduceOp.MAX, group=group)
        if int(widths[0]) != -int(widths[1]):
            raise ValueError(f"ranks disagree on the number of features: {-int(widths[1])} to {int(widths[0])}")
        sums = torch.cat([self.mean * self.count, self.mean.new_tensor([float(self.count)])])
        dist.all_reduce(sums, group=group)
        total = round(float(sums[-1]))
        mean = sums[:-1] / max(total, 1)
        delta = self.mean - mean
        self.scatter.addr_(delta, delta, alpha=float(self.count))
        dist.all_reduce(self.scatter, group=group)
        self.count, self.mean = total, mean
        return self

    def save(self, path: str | Path) -> None:
        """Writes count, mean and scatter to an .npz file."""
        with Path(path).open("wb") as file:
            np.savez(file, count=self.count, mean=self.mean.cpu().numpy(), scatter=self.scatter.cpu().numpy())

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Reads what `save` wrote; nothing is unpickled. ValueError names the file and what is wrong with it."""
        try:
            with np.load(Path(path), allow_pickle=False) as archive:
                count, mean, scatter = (archive[name] for name in ("count", "mean", "scatter"))
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path}: not a file of feature statistics: {error}") from error
        d = mean.shape[0] if mean.ndim == 1 else -1
        good = mean.dtype == scatter.dtype == np.float64 and count.shape == () and count.dtype.kind in "iu"
        if not (good and d > 0 and scatter.shape == (d, d) and count >= 0):
            raise ValueError(f"{path}: count, mean (d,) and scatter (d, d) do not fit together")
        if not (np.isfinite(mean).all() and np.isfinite(scatter).all()):
            raise ValueError(f"{path}: holds NaN or infinity")
        out = cls(d)
        out.count, out.mean, out.scatter = int(count), torch.from_numpy(mean), torch.from_numpy(scatter)
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


def class_diversities(
    features: Any, labels: Any, *, num_classes: int | None = None, alpha: float = 1.0, max_bytes: int = 1 << 28
) -> Tensor:
    """V of every class in batched calls: the semantic scale of each class, whose spread over the classes is the
    semantic-scale imbalance.

    Args:
        features: (n, d) float features.
        labels: (n,) integers in [0, num_classes).
        num_classes: C; by default the largest label plus 1.
        alpha: factor of the covariance, above 0.
        max_bytes: of one batch of classes; a class of its own needs what it needs.

    Returns:
        (C,) float64 on the device of `features`, in log2 units: entry c is ``feature_diversity(features[labels == c])``,
        0 for a single sample and NaN for a class without samples.

    Raises:
        TypeError, ValueError: as `feature_diversity`; labels of another length, negative or not below num_classes.
    """
    x = check_features(features, "features").detach()
    y = torch.as_tensor(labels)
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {y.dtype}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"labels must have shape ({x.shape[0]},), got {tuple(y.shape)}")
    alpha = check_alpha(alpha)
    largest = int(y.max()) if len(y) else -1
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"labels must not be negative, got {int(y.min())}")
    classes = largest + 1 if num_classes is None else num_classes
    if classes <= largest:
        raise ValueError(f"labels must be below num_classes = {classes}, got {largest}")
    y = y.to(x.device)
    counts = torch.bincount(y, minlength=classes)
    rows = torch.argsort(y, stable=True)
    begins = (counts.cumsum(0) - counts).tolist()
    out = x.new_full((classes,), torch.nan)
    # Classes of about one size go together, padded with rows of zeros, which add nothing to a scatter.
    buckets: dict[int, list[int]] = {}
    for c, count in enumerate(counts.tolist()):
        if count:
            buckets.setdefault(max(8, 1 << (count - 1).bit_length()), []).append(c)
    d = x.shape[1]
    for size, members in buckets.items():
        step = max(1, max_bytes // (8 * (size * d + min(size, d) ** 2)))
        for first in range(0, len(members), step):
            ids = torch.tensor(members[first : first + step], device=x.device)
            n = counts[ids]
            at = torch.tensor([begins[c] for c in members[first : first + step]], device=x.device)[:, None]
            place = torch.arange(size, device=x.device)
            real = place < n[:, None]
            block = x[rows[torch.where(real, at + place, at)]] * real[:, :, None]
            block = (block - block.sum(1, keepdim=True) / n[:, None, None]) * real[:, :, None]
            gram = block @ block.mT if size < d else block.mT @ block
            gram = gram * (alpha / n.to(torch.float64))[:, None, None]
            gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
            out[ids] = cholesky_log_det(gram) / _LOG4
    return out
