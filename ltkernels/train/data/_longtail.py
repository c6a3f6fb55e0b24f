"""Turning a balanced labelled set into a long-tailed one: how many samples each class keeps, and which."""

import numbers
import reprlib
from collections.abc import Sequence

import numpy as np

from ltkernels._features import check_seed

_MOST = 2**53  # larger integers are no float64
PROFILES = ("exp", "step")


def class_sizes(n_max: int, num_classes: int, imbalance: float, profile: str = "exp") -> list[int]:
    """Samples per class in label order, class 0 the largest with `n_max`.

    `exp`: n_i = int(n_max * (1 / imbalance) ** (i / (C - 1))), the CIFAR-LT rule (Cao et al. 2019). `step`: the first
    C // 2 classes keep n_max, the others int(n_max / imbalance). `imbalance` = n_max / n_min >= 1. Raises ValueError
    for arguments out of range and for a profile that would leave a class empty.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    if isinstance(imbalance, bool) or not isinstance(imbalance, numbers.Real):
        raise TypeError(f"imbalance must be a number, got {type(imbalance).__name__}")
    # Comparisons of Python's integers overflow nothing, whatever their size; nan fails both.
    if not 1 <= imbalance <= _MOST:
        raise ValueError(f"imbalance must be a finite number >= 1, got {reprlib.repr(imbalance)}")
    for name, value, least in (("n_max", n_max, 1), ("num_classes", num_classes, 2)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if not least <= value <= _MOST:
            raise ValueError(f"need n_max >= 1 and at least 2 classes, got {name} {reprlib.repr(value)}")
    if profile == "exp":
        sizes = [int(n_max * (1.0 / imbalance) ** (i / (num_classes - 1))) for i in range(num_classes)]
    else:
        sizes = [n_max if i < num_classes // 2 else int(n_max / imbalance) for i in range(num_classes)]
    if min(sizes) < 2:
        raise ValueError(
            f"imbalance {imbalance} leaves {min(sizes)} of {n_max} samples to the rarest class; it needs at least 2"
        )
    return sizes


def make_long_tailed(labels: np.ndarray, imbalance: float, profile: str = "exp", seed: int = 0) -> np.ndarray:
    """Indices (int64, grouped by class) that thin `labels` to the profile.

    Class order is label order, no class shuffle. n_max is the size of the smallest class, so that the counts depend on
    the profile alone. Which samples of a class are kept follows a shuffle seeded with (seed, class).
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        raise ValueError(f"labels must be (n,) class indices >= 0, got {labels.dtype} {labels.shape}")
    if labels.max() >= len(labels):
        # Before a table of all classes is made: one forged label would make it as large as it likes.
        raise ValueError(f"labels reach {labels.max()}, of {len(labels)} samples: some class has none")
    available = np.bincount(labels)
    if available.min() < 2:  # whatever the imbalance, which may be nobody's choice
        label, count = int(available.argmin()), int(available.min())
        raise ValueError(
            f"class {label} has {count} sample{'s' * (count != 1)}: a profile begins at the smallest class, which needs at least 2"
        )
    return thinned(labels, class_sizes(int(available.min()), len(available), imbalance, profile), seed)


def thinned(labels: np.ndarray, sizes: Sequence[int], seed: int) -> np.ndarray:
    """Indices (int64, grouped by class) of sizes[c] samples of each class c, kept by a shuffle seeded with (seed, class)."""
    seed = check_seed(seed)
    rows = (np.random.default_rng([seed, c]).permutation(np.flatnonzero(labels == c)) for c in range(len(sizes)))
    return np.concatenate([of_class[:size] for of_class, size in zip(rows, sizes)])
