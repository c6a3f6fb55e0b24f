"""A subset to look at: greedy MAP inference of a determinantal point process."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._features import check_alpha, check_count, check_features


class Representatives(NamedTuple):
    """indices (k,) int64 rows in the order of picking; diversity (k,) float64, V of the first 1..k picks about the
    mean of all rows, with the final k as the divisor, in log2 units."""

    indices: Tensor
    diversity: Tensor


def select_representatives(features: Any, k: int, *, alpha: float = 1.0) -> Representatives:
    """The k samples that a person should look at: diverse ones, far from each other and from the mean.

    Greedily maximises log det(I + (alpha / k) F_S F_S^T) over the picks S, F centred on the mean of all samples: the
    MAP of a determinantal point process. The function is monotone submodular, so greedy reaches 1 - 1/e of the best.

    Args:
        features: (n, d) float features; a tensor or a numpy array.
        k: samples to pick, 1 <= k <= n.
        alpha: factor of the covariance, above 0.

    Returns:
        `Representatives` on the device of `features`; ties go to the lowest row.

    Raises:
        TypeError, ValueError: as `feature_diversity`; k not an integer in [1, n].

    Source: the FDG paper, section 5.3; the incremental Cholesky of Chen, Zhang & Zhou (NeurIPS 2018), O(n (d + k)) a
    step, with no n x n matrix.
    """
    x = check_features(features, "features").detach()
    n = x.shape[0]
    if check_count(k, "k", 1) > n:
        raise ValueError(f"k must be between 1 and the {n} rows of features, got {k}")
    rows = (x - x.mean(0)) * math.sqrt(check_alpha(alpha) / k)
    left = 1.0 + rows.square().sum(1)  # the squared pivot that each row would add
    factor = x.new_zeros(k, n)
    indices = torch.empty(k, dtype=torch.int64, device=x.device)
    logs = x.new_empty(k)
    for step in range(k):
        # Rounding makes equal rows differ by about 1e-15: a tie is one of the lowest index.
        top = left.max()
        best = (left >= top - 1e-12 * top.abs()).to(torch.uint8).argmax()
        pivot = left[best]
        indices[step], logs[step] = best, pivot.log()
        row = rows @ rows[best]
        row[best] += 1.0
        row -= factor[:step, best] @ factor[:step]
        factor[step] = row * pivot.rsqrt()
        left = left - factor[step].square()
        left[best] = -torch.inf
    return Representatives(indices, logs.cumsum(0) / (2.0 * math.log(2.0)))
