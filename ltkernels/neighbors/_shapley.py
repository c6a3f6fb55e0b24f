"""Exact Shapley values of training samples for the k-nearest-neighbour classifier."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._features import check_count, check_labels
from ._search import References


def knn_shapley(
    features: Any,
    labels: Any,
    validation_features: Any,
    validation_labels: Any,
    k: int = 5,
    *,
    metric: str = "euclidean",
    average: str = "class",
    tolerance: float = 0.0,
) -> Tensor:
    """KNN-Shapley, Jia et al. 2019 (arXiv:1908.08619), theorem 1: what each training sample adds to the accuracy of the k nearest
    neighbours, exactly.

    For one validation sample, with the training samples sorted from the nearest and ``match_i = [y_i = y]``: ``s_M = match_M / max(k,
    M)``, ``s_i = s_{i+1} + (match_i - match_{i+1}) / max(k, i)``. The values are averaged over the validation samples; those of one sum to
    the share of its k nearest that match.

    Validate on a part that is held out of the training set: values that come of the test set carry it into what they select.

    Args:
        features: (M, D) float features of the training samples; a tensor or a NumPy array.
        labels: (M,) integers, class ids from 0.
        validation_features: (V, D), V >= 1.
        validation_labels: (V,) integers.
        k: neighbours that vote, at least 1.
        metric: ``"euclidean"`` or ``"cosine"``; equally near samples come in the order of their indices.
        average: ``"class"``: over each class' validation samples first, then over the classes that have any, so that classes with many
            validation samples do not decide alone; ``"sample"``: over all of them, as in the paper.
        tolerance: largest error of a value. 0 sorts all M samples for each validation sample; above 0 only the ``max(k, 1 / tolerance)``
            nearest count, and farther ones get 0.

    Returns:
        (M,) float64 on the features' device. Memory is O(M) beside the features: a block of validation samples at a time, each added in
        its turn, so that neither threads nor block sizes change a bit of the sum.

    Raises:
        TypeError, ValueError: as `nearest_neighbors`; labels that are not class ids, an empty validation set, a k above M, options out of
            range.

    Example:
        >>> values = ltk.neighbors.knn_shapley([[1.0], [2.0], [3.0]], [1, 0, 1], [[0.0]], [1], k=2)
        >>> values
        tensor([ 0.3333, -0.1667,  0.3333], dtype=torch.float64)
    """
    references = References(features, metric)
    count, device = references.count, references.rows.device
    x = references.check_queries(validation_features, "validation_features")
    if len(x) == 0:
        raise ValueError("validation_features is empty: values are averaged over validation samples")
    y = check_labels(labels, count, None, "")[0].to(device, torch.int64)
    own = check_labels(validation_labels, len(x), None, "", "validation_labels")[0].to(device, torch.int64)
    k = check_count(k, "k", 1)
    if k > count:
        raise ValueError(f"k is {k}, but there are {count} training samples")
    tolerance = _checks.number("tolerance", tolerance, low=0.0)
    if average not in ("class", "sample"):
        raise ValueError(f"average is {average!r}; it must be 'class' or 'sample'")
    share = torch.full((len(x),), 1.0 / len(x), dtype=torch.float64, device=device)
    if average == "class":
        sizes = torch.bincount(own)
        share = 1.0 / (sizes[own].double() * (sizes > 0).sum())
    counted = count if tolerance == 0.0 else min(max(k, math.ceil(1.0 / tolerance)), count)
    place = torch.arange(1, counted, dtype=torch.float64, device=device).clamp(min=k)
    values = torch.zeros(count, dtype=torch.float64, device=device)
    found = (
        references.ordered(x)
        if counted == count
        else ((at, part.indices) for at, part in references.nearest(x, counted))
    )
    for at, order in found:
        match = (y[order] == own[at : at + len(order)].unsqueeze(1)).double()
        # Of the farthest that counts; beyond a truncation its own value is taken as 0.
        last = match[:, -1:] / max(k, counted) if counted == count else torch.zeros_like(match[:, -1:])
        steps = torch.cat([(match[:, :-1] - match[:, 1:]) / place, last], dim=1)
        each = steps.flip(1).cumsum(1).flip(1) * share[at : at + len(order)].unsqueeze(1)
        values.index_add_(0, order.flatten(), each.flatten())
    return values
