"""Samples of a fixed-size determinantal point process: diverse subsets at random, with exact probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._features import check_count, check_features, check_integers, check_reals, check_seed

# Picks a place with the given probabilities: (n,) weights, not normalised -> index.
Draw = Callable[[Tensor], int]


def sample_k_dpp(features: Any, k: int, *, quality: Any = None, seed: int = 0) -> Tensor:
    """Draws k samples of a k-DPP, Kulesza & Taskar 2011 (ICML) and 2012 (arXiv:1207.6083): a subset Y has the probability ``det(L_Y) /
    e_k(eigenvalues of L)``, with ``L = diag(q) X X^T diag(q)``. Subsets that span more volume are more probable; `select_subsets` finds the
    most diverse instead.

    Everything is float64 and exact: an eigendecomposition of the smaller Gram matrix (D x D in the dual form), elementary symmetric
    polynomials in the log domain, then one sample after the other in O(M k). In plain torch, whose matrix products are all the work.

    Args:
        features: (M, D) float features x_i; a tensor or a NumPy array. Give unit rows for a choice by direction alone.
        k: samples to draw, at least 1, at most the rank of the features.
        quality: (M,) factors q_i, finite and at least 0; None is 1.
        seed: of the random numbers, which come from torch's generator of the CPU: the same seed draws the same samples.

    Returns:
        (k,) int64 rows in ascending order, on the CPU.

    Raises:
        TypeError: features that are not floating-point, a quality that is not real, k or seed that are no integers.
        ValueError: NaN or infinity (first row named), a k above M or above the rank: every such subset has probability 0.

    Example:
        >>> features = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]  # two samples that are the same never come together
        >>> 2 in ltk.selection.sample_k_dpp(features, 2)
        True
    """
    generator = torch.Generator().manual_seed(check_seed(seed))

    def draw(weights: Tensor) -> int:
        places = weights.cumsum(0)
        at = torch.rand((), dtype=torch.float64, generator=generator) * places[-1]
        found = int(torch.searchsorted(places, at, right=True))
        while found == len(weights) or weights[found] == 0:  # a rounding at the end of the sum
            found -= 1
        return found

    return drawn(_rows(features, quality), check_count(k, "k", 1), draw)


def k_dpp_log_probability(features: Any, indices: Any, *, quality: Any = None) -> float:
    """Natural logarithm of the probability that `sample_k_dpp` draws this set; -inf for one that spans no volume.

    Args:
        features, quality: as in `sample_k_dpp`.
        indices: (k,) integers, distinct rows of the features in any order.

    Returns:
        A float, at most 0.

    Raises:
        TypeError, ValueError: as `sample_k_dpp`; indices out of range or twice the same.

    Example:
        >>> features = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
        >>> [round(ltk.selection.k_dpp_log_probability(features, pair), 4) for pair in ([0, 1], [0, 2])]
        [-inf, -0.6931]
    """
    x = _rows(features, quality)
    at = check_integers(indices, "indices")
    if at.dim() != 1 or len(at) == 0 or len(at.unique()) != len(at):
        raise ValueError("indices must hold distinct rows, at least one")
    bad = (at < 0) | (at >= len(x))
    if bool(bad.any()):
        raise ValueError(f"indices holds {int(at[bad][0])}; features has {len(x)} rows")
    values, _ = _spectrum(x, len(at))
    chosen = x[at.to(x.device)]
    length = torch.linalg.vector_norm(chosen, dim=1, keepdim=True)
    if not bool(length.all()):
        return -math.inf
    # What the rows before it leave of each unit row: rounding alone, where they span it.
    left = torch.linalg.qr((chosen / length).T, mode="r").R.diagonal().abs()
    if float(left.min()) <= max(chosen.shape) * torch.finfo(torch.float64).eps:
        return -math.inf
    log_det = 2 * (left.log().sum() + length.log().sum())
    return float(log_det) - float(log_polynomials(values.log(), len(at))[len(at), -1])


def drawn(x: Tensor, k: int, draw: Draw) -> Tensor:
    """The rows that `draw` picks, one decision after the other."""
    values, vectors = _spectrum(x, k)
    basis = vectors[:, _chosen(values.log(), k, draw)]
    # Rows of an orthonormal basis: their squared lengths sum to the number of samples that are left to draw.
    weights = (basis * basis).sum(dim=1)
    directions = torch.empty(0, k, dtype=basis.dtype, device=basis.device)
    picked: list[int] = []
    for _ in range(k):
        at = draw(weights.cpu())
        picked.append(at)
        residual = basis[at]
        for _ in range(2):  # twice is enough for an orthogonal direction
            residual = residual - directions.T @ (directions @ residual)
        residual = residual / torch.linalg.vector_norm(residual)
        directions = torch.cat([directions, residual.unsqueeze(0)])
        weights = (weights - (basis @ residual) ** 2).clamp(min=0)
        weights[torch.tensor(picked, device=weights.device)] = 0
    return torch.tensor(sorted(picked), dtype=torch.int64, device="cpu")


def log_polynomials(log_values: Tensor, k: int) -> Tensor:
    """(k + 1, n + 1) logarithms of the elementary symmetric polynomials e_j of the first m values."""
    found = torch.full((k + 1, len(log_values) + 1), -math.inf, dtype=torch.float64)
    found[0] = 0.0
    for m, value in enumerate(log_values.tolist(), 1):
        found[1:, m] = torch.logaddexp(found[1:, m - 1], found[:-1, m - 1] + value)
    return found


def _chosen(log_values: Tensor, k: int, draw: Draw) -> list[int]:
    """k eigenvectors, each set with the probability of the product of its eigenvalues."""
    table = log_polynomials(log_values, k)
    chosen, left = [], k
    for m in range(len(log_values), 0, -1):
        if left == 0:
            break
        if left == m:  # all that there are
            return [*chosen, *range(m)]
        take = math.exp(float(log_values[m - 1] + table[left - 1, m - 1] - table[left, m]))
        if draw(torch.tensor([1.0 - min(take, 1.0), min(take, 1.0)], dtype=torch.float64)):
            chosen.append(m - 1)
            left -= 1
    return chosen


def _rows(features: Any, quality: Any) -> Tensor:
    x = check_features(features, "features").detach()
    if len(x) == 0:
        raise ValueError("features is empty: there is no sample to draw")
    if quality is None:
        return x
    q = check_reals(quality, "quality").to(x.device)
    if q.shape != (len(x),):
        raise ValueError(f"quality has shape {tuple(q.shape)}; features of {len(x)} rows need ({len(x)},)")
    bad = ~(torch.isfinite(q) & (q >= 0))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(f"quality[{at}] is {float(q[at])}; it must be finite and at least 0")
    return x * q.unsqueeze(1)


def _spectrum(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues above 0 of x x^T, ascending, on the CPU, and its eigenvectors (M, r)."""
    if k > len(x):
        raise ValueError(f"k is {k}, but there are {len(x)} samples")
    size = float(x.abs().max())
    if size == 0:
        raise ValueError("features is zero: no sample spans any volume")
    scaled = x / size
    dual = x.shape[1] < len(x)
    values, vectors = torch.linalg.eigh(scaled.T @ scaled if dual else scaled @ scaled.T)
    kept = values > values[-1] * max(x.shape) * torch.finfo(torch.float64).eps
    rank = int(kept.sum())
    if k > rank:
        raise ValueError(f"k is {k}, but the features have rank {rank}: every subset of {k} samples has probability 0")
    values, vectors = values[kept], vectors[:, kept]
    if dual:
        vectors = scaled @ vectors / values.sqrt()
    return (values * size * size).cpu(), vectors
