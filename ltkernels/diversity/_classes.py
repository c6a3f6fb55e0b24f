"""Statistics of every class of a labelled stream, and V of every class at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._arrays import text
from .._features import check_alpha, check_features, check_labels, check_rows, diversity_nats
from .._ranks import Ranks, together
from ._files import check_names, read_statistics, write_statistics
from ._stream import BLOCK, FeatureStatistics, check_widths, merge_ranks

_LOG4 = 2.0 * math.log(2.0)


class ClassStatistics:
    """`FeatureStatistics` of every class: what V of the classes, and FDG between parties, need of a labelled set.

    One party writes its statistics to a file, others merge the files; no sample leaves its party. What does leave is the
    count, the mean and the covariance of every class, exactly. That is not private in the sense of differential privacy:
    a class of one sample is its mean, two sets of statistics that differ by a sample give that sample away, and means and
    covariances can show whether a known sample took part. Add noise, or leave small classes out, before the file is
    written where that matters.

    Attributes:
        names: names of the classes; classes are matched by name when statistics are merged.
        classes: the `FeatureStatistics` of each, (d^2 + d) doubles a class.
    """

    def __init__(self, width: int, names: Sequence[str] | int, *, device: Any = None) -> None:
        """Statistics of no samples of `width` features. `names`: of the classes, or their number (then they are "0",
        "1", ...)."""
        if isinstance(names, int | Integral):  # NumPy's are none of Python's
            names = [str(c) for c in range(int(names))]
        else:
            names = [text(name) for name in names]
        if not names:
            raise ValueError("names is empty: there must be a class")
        check_names(names, "names")
        self.names = names
        self.classes = [FeatureStatistics(width, device=device) for _ in names]

    @property
    def width(self) -> int:
        return self.classes[0].width

    @property
    def counts(self) -> list[int]:
        return [part.count for part in self.classes]

    def update(self, batch: Any, labels: Any) -> ClassStatistics:
        """Adds a batch (n, d) of float features with labels (n,), positions in `names`; returns self.

        TypeError, ValueError as `FeatureStatistics.update` and `class_diversities`; a refused batch changes nothing.
        """
        rows = check_rows(batch, "batch", self.width, "the statistics have", BLOCK // self.width + 1)
        y = check_labels(labels, len(rows), len(self.names), "the number of classes")[0]
        counts = torch.bincount(y, minlength=len(self.names)).tolist()
        for part, own in zip(self.classes, torch.argsort(y, stable=True).to(rows.device).split(counts)):
            if len(own):
                part.update(rows[own])
        return self

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Adds the samples that `other` has seen (it stays as it is), class by class of one name; returns self.

        Classes that are new here come last, in the order of `other`. ValueError for another number of features.
        """
        if other.width != self.width:
            raise ValueError(f"other has {other.width} features per sample, these statistics have {self.width}")
        at = {name: c for c, name in enumerate(self.names)}
        for name, part in zip(other.names, other.classes):
            if name not in at:
                at[name] = len(self.names)
                self.names.append(name)
                self.classes.append(FeatureStatistics(self.width, device=self.classes[0].mean.device))
            self.classes[at[name]].merge(part)
        return self

    def all_reduce(self, group: Any = None) -> ClassStatistics:
        """Merges the statistics of every rank of a process group, on every rank, as `FeatureStatistics.all_reduce`;
        returns self. ValueError on every rank where features or class names are not the same everywhere."""
        ranks = Ranks(group)
        widths, names = zip(*ranks.share([self.width, self.names]))
        check_widths(widths)
        for rank, own in enumerate(names):
            if own != names[0]:
                raise ValueError(f"ranks disagree on the class names: those of rank {rank} are not those of rank 0")
        merge_ranks(ranks, self.classes)
        return self

    def diversity(self, *, alpha: float = 1.0) -> Tensor:
        """(C,) float64: V of every class in log2 units, as `class_diversities`; NaN for a class without samples."""
        alpha = check_alpha(alpha)
        return torch.tensor(
            [float(part.diversity(alpha=alpha)) if part.count else math.nan for part in self.classes],
            dtype=torch.float64,
        )

    def save(self, path: str | Path) -> None:
        """Writes the statistics to an .npz file, whole or not at all; see the class for what such a file reveals."""
        write_statistics(Path(path), self.classes, self.names)

    @classmethod
    def load(cls, path: str | Path) -> ClassStatistics:
        """Reads what `save` wrote. FileNotFoundError, or ValueError naming the file: see `read_statistics`."""
        names, parts = read_statistics(Path(path), True)
        out = cls.__new__(cls)
        out.names = names
        out.classes = [FeatureStatistics._from_values(*part) for part in parts]
        return out


def class_diversities(
    features: Any, labels: Any, *, num_classes: int | None = None, alpha: float = 1.0, group: Any = None
) -> Tensor:
    """V of every class: the semantic scale of each class, whose spread over the classes is the semantic-scale imbalance.

    Args:
        features: (n, d) float features.
        labels: (n,) integers in [0, num_classes).
        num_classes: C; by default the largest label plus 1.
        alpha: factor of the covariance, above 0.
        group: process group over whose ranks the samples are spread ("world" is the default one), each rank giving its
            own features and labels, possibly none: every rank gets V of all of them, the same to the bit. One class at
            a time is merged, as `FeatureStatistics.all_reduce` does it. None: these samples alone.

    Returns:
        (C,) float64 on the device of `features`, in log2 units: entry c is ``feature_diversity(features[labels == c])``,
        0 for a single sample and NaN for a class without samples.

    Raises:
        TypeError, ValueError: as `feature_diversity`; labels of another length, negative or not below num_classes; with
            `group`, on every rank where it happens on one.
    """
    ranks = None if group is None else Ranks(group)
    with together(ranks):
        x = check_features(features, "features").detach()
        alpha = check_alpha(alpha)
        y, classes = check_labels(labels, len(x), num_classes, "num_classes")
    if ranks is not None:
        widths, numbers = zip(*ranks.share([x.shape[1], num_classes if num_classes is None else classes]))
        check_widths(widths)
        if len(set(numbers)) > 1:
            raise ValueError(f"ranks disagree on num_classes: {list(numbers)}")
        classes = max(ranks.share(classes))
    out = x.new_full((classes,), torch.nan)
    counts = torch.bincount(y, minlength=classes).tolist()
    for c, own in enumerate(torch.argsort(y, stable=True).to(x.device).split(counts)):
        rows = x[own]
        if ranks is not None:
            part = FeatureStatistics(x.shape[1], device=x.device).update(rows)
            merge_ranks(ranks, [part])
            if part.count:
                out[c] = part.diversity(alpha=alpha)
        elif len(rows):
            out[c] = diversity_nats(rows - rows.mean(0), len(rows) / alpha) / _LOG4
    return out
