"""V, FDG and its bounds for features that fit in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _backends
from ._checks import check_alpha, check_centering, check_features, check_original, check_same_width

# A `standardized_offset` worth a warning.
FAR = 3.0


def cholesky_log_det(matrix: Tensor) -> Tensor:
    """log det of symmetric positive definite matrices (..., n, n) in nats, from their Cholesky factors; NaN where a
    matrix is not positive definite. Never waits for a GPU. Batches of small ones go to the CUDA kernel, where it can serve them."""
    kernel = _backends.log_det_kernel(matrix)
    if kernel is not None:
        values: Tensor = kernel(matrix.flatten(0, -3)).unflatten(0, matrix.shape[:-2])
        return values
    factor, failed = torch.linalg.cholesky_ex(matrix)
    value: Tensor = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return value.masked_fill(failed != 0, torch.nan)


def _diversity_nats(rows: Tensor, ridge: float) -> Tensor:
    """log det(I + rows^T rows / ridge), by the smaller of the d x d and n x n forms (equal by Sylvester's identity)."""
    gram = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    gram = gram / ridge
    gram.diagonal().add_(1.0)
    return cholesky_log_det(gram)


def _centred(x: Tensor, centering: str) -> Tensor:
    return x if centering == "none" or x.shape[0] == 0 else x - x.mean(0)


def original_diversity(original: Tensor, centering: str, alpha: float) -> Tensor:
    """log det(I + alpha C_Z) in nats, the denominator of every FDG; ValueError where it is 0, because FDG is undefined
    there."""
    n = original.shape[0]
    if centering != "none" and n == 1:
        raise ValueError(
            "original has N = 1 sample: its diversity is 0 and FDG, a ratio to it, is undefined; give at least 2"
        )
    equal = bool((original == (0.0 if centering == "none" else original[:1])).all())
    value = _diversity_nats(_centred(original, centering), n / alpha)
    if not math.isfinite(float(value.detach())):
        raise ValueError(
            f"original overflows float64 (largest magnitude {float(original.detach().abs().max()):.3g}); scale it down"
        )
    if equal or not float(value.detach()) > 0.0:
        what = "zero" if centering == "none" else "equal"
        raise ValueError(
            f"all {n} samples of original are {what} (or too close to it for float64): their diversity is 0 and FDG, a "
            "ratio to it, is undefined"
        )
    return value


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
    return _diversity_nats(x - x.mean(0), x.shape[0] / check_alpha(alpha)) / (2.0 * math.log(2.0))


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
        rows = _centred(torch.cat([z, extra]), centering)
    else:
        rows = torch.cat([_centred(z, centering), _centred(extra, centering)])
    return _diversity_nats(rows, rows.shape[0] / alpha) / base - 1.0


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
    diluted = _diversity_nats(_centred(z, centering), (z.shape[0] + n_aug) / alpha)
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
