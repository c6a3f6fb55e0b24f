"""V, FDG and its bounds for features that fit in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._features import (
    centred,
    check_alpha,
    check_centering,
    check_features,
    check_original,
    check_same_width,
    diversity_nats,
    original_diversity,
)

# A `standardized_offset` worth a warning.
FAR = 3.0


def feature_diversity(features: Any, *, alpha: float = 1.0) -> Tensor:
    """Diversity of a set of features, in log2 units: V = 1/2 log2 det(I + (alpha / n) F F^T) with F mean-centred.

    Args:
        features: (n, d) float16, bfloat16, float32 or float64; a tensor on any device, or a numpy array.
        alpha: factor of the covariance, above 0.

    Returns:
        A float64 scalar tensor on the device of `features`, differentiable; 0 for a single sample or equal samples.

    Raises:
        TypeError: `features` is not floating point.
        ValueError: wrong shape, no rows, NaN or infinity (the message names the first such row), alpha not above 0.

    Source: Definition 2 of the FDG paper (see the module's head). Computed in float64 by Cholesky, in the smaller of
        the d x d and n x n forms.
    """
    x = check_features(features, "features")
    if x.shape[0] == 0:
        raise ValueError("features is empty: the diversity of no samples is undefined")
    return diversity_nats(x - x.mean(0), x.shape[0] / check_alpha(alpha)) / (2.0 * math.log(2.0))


def feature_diversity_gain(original: Any, augmented: Any, *, centering: str = "joint", alpha: float = 1.0) -> Tensor:
    """FDG = V([original, augmented]) / V(original) - 1: the relative change of diversity that the augmented samples
    bring.

    Args:
        original: (N, d) features of the original samples, N >= 2 and not all equal.
        augmented: (N', d) features of the added samples; N' = 0 gives exactly 0 (Principle 1).
        centering: "joint", "separate" or "none"; the module's head says what each means.
        alpha: factor of the covariance, above 0.

    Returns:
        A float64 scalar tensor, no unit; never at or below -N'/(N+N') (`fdg_lower_bound`), nor below `fdg_infimum`.

    Raises:
        TypeError, ValueError: as `feature_diversity`; also different feature counts, and an original set of zero
            diversity.

    Source: Definition 4 of the FDG paper.
    """
    z = check_original(original)
    extra = check_features(augmented, "augmented")
    check_same_width(z, extra, "augmented")
    check_centering(centering)
    alpha = check_alpha(alpha)
    base = original_diversity(z, centering, alpha)
    if extra.shape[0] == 0:
        return base * 0.0
    if centering == "joint":
        rows = centred(torch.cat([z, extra]), centering)
    else:
        rows = torch.cat([centred(z, centering), centred(extra, centering)])
    return diversity_nats(rows, rows.shape[0] / alpha) / base - 1.0


def fdg_lower_bound(n: int, n_aug: int) -> float:
    """The paper's lower bound of FDG, -N'/(N+N') for N = `n` original and N' = `n_aug` added samples. It is never
    attained.

    Raises ValueError when n < 1 or n_aug < 0. Source: Principle 2 and its proof in the FDG paper.
    """
    if n < 1 or n_aug < 0:
        raise ValueError(f"n must be at least 1 and n_aug at least 0, got n = {n}, n_aug = {n_aug}")
    return -n_aug / (n + n_aug)


def fdg_infimum(original: Any, n_aug: int, alpha: float = 1.0, *, centering: str = "joint") -> float:
    """The tight lower bound of FDG over every possible set of `n_aug` added samples, strictly above `fdg_lower_bound`.

    log det(I + a alpha C_Z) / log det(I + alpha C_Z) - 1 with a = N/(N+N') and C_Z the covariance of `original` (N, d):
    the value when all added samples equal the mean of the original ones (zero under "none"), where they only dilute.
    The same number serves "joint" and "separate". Errors as `feature_diversity_gain`; ValueError when n_aug < 0.
    """
    z = check_original(original)
    alpha = check_alpha(alpha)
    check_centering(centering)
    if n_aug < 0:
        raise ValueError(f"n_aug must be at least 0, got {n_aug}")
    base = original_diversity(z, centering, alpha)
    diluted = diversity_nats(centred(z, centering), (z.shape[0] + n_aug) / alpha)
    return float(diluted / base - 1.0)


def standardized_offset(original: Any, augmented: Any) -> float:
    """How far the added samples lie from the originals, in standard errors of the originals' mean.

    || mean(Z') - mean(Z) || / sqrt(tr(C_Z) / N), with C_Z the covariance of `original` (N, d) by 1/N; `augmented` (N', d)
    has at least one row. Samples of the class itself lie at about sqrt(1 + N / N'). Above `FAR` the added samples stand
    somewhere else, which FDG hardly sees where N' >> N and a classifier does. NaN where all originals are equal and the
    added ones lie elsewhere. Errors as `feature_diversity_gain`.
    """
    z, extra = check_original(original), check_features(augmented, "augmented")
    check_same_width(z, extra, "augmented")
    if extra.shape[0] == 0:
        raise ValueError("augmented is empty: it has no mean")
    mean = z.mean(0)
    error = math.sqrt(float((z - mean).square().sum())) / z.shape[0]
    length = float(torch.linalg.vector_norm(extra.mean(0) - mean))
    return length / error if error > 0.0 else math.nan if length else 0.0
