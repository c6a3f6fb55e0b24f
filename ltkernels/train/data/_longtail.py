"""Turning a balanced labelled set into a long-tailed one: how many samples each class keeps, and which."""

import math

import numpy as np

PROFILES = ("exp", "step")


def class_sizes(n_max: int, num_classes: int, imbalance: float, profile: str = "exp") -> list[int]:
    """Samples per class in label order, class 0 the largest with `n_max`.

    `exp`: n_i = int(n_max * (1 / imbalance) ** (i / (C - 1))), the CIFAR-LT rule (Cao et al. 2019). `step`: the first
    C // 2 classes keep n_max, the others int(n_max / imbalance). `imbalance` = n_max / n_min >= 1. Raises ValueError
    for arguments out of range and for a profile that would leave a class empty.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    if not (math.isfinite(imbalance) and imbalance >= 1):
        raise ValueError(f"imbalance must be a finite number >= 1, got {imbalance}")
    if n_max < 1 or num_classes < 2:
        raise ValueError(f"need n_max >= 1 and at least 2 classes, got {n_max} and {num_classes}")
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
    available = np.bincount(labels)
    sizes = class_sizes(int(available.min()), len(available), imbalance, profile)
    kept = [
        np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))[:size]
        for label, size in enumerate(sizes)
    ]
    return np.concatenate(kept)
