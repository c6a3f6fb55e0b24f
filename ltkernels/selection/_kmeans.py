"""k-means subsets of a feature pool on FAISS, plain or of equal size."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._features import check_count, check_features, check_seed
from .._native import _C

_MOST = 2**31 - 1  # FAISS counts in C ints

# Epsilon, the auction's smallest raise, ends at this share of the mean distance to the nearest centroid: 10 % was as
# good as 0.3 % on every data set tried. It starts at no less than this share of the largest distance and is divided by
# 8 until it is there: a price war lasts about cost / epsilon bids, and a few far rows made it minutes. The floor is
# what float32 prices resolve.
_EPSILON, _EPSILON_START, _EPSILON_FLOOR = 0.1, 0.02, 1e-6
# Assign-and-move rounds; they stop earlier, once one improves the objective by less than `_SETTLED`.
_ROUNDS, _SETTLED = 8, 0.005
# FAISS's iterations between two looks at the objective.
_PART = 3


class Subsets(NamedTuple):
    """A pool cut into k subsets.

    Attributes:
        order: (n,) int64, rows of the features, subset after subset, ascending within each: ``features[order]`` goes
            with `offsets`.
        offsets: (k + 1,) int64; subset c is order[offsets[c]:offsets[c + 1]].
        centroids: (k, d) float32, the mean of each subset (of unit length when spherical).
        objective: sum of squared distances of the rows to their centroids (rows of unit length when spherical).
    """

    order: Tensor
    offsets: Tensor
    centroids: Tensor
    objective: float


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError('kmeans_subsets needs FAISS: pip install "ltkernels[select]"') from error
    return faiss


def _fill_empty(labels: np.ndarray, distances: np.ndarray, k: int) -> None:
    """Gives each empty cluster one row, in place: the row farthest from its centroid in a cluster that has another."""
    sizes = np.bincount(labels, minlength=k)
    if sizes.min() > 0:
        return
    order = np.argsort(-distances, kind="stable")
    position = 0
    for empty in np.flatnonzero(sizes == 0):
        while sizes[labels[order[position]]] < 2:
            position += 1
        row = order[position]
        sizes[labels[row]] -= 1
        labels[row] = empty
        sizes[empty] = 1
        position += 1


def _summary(
    x: np.ndarray, labels: np.ndarray, k: int, spherical: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """order, offsets, centroids (k, d) float64 and objective of a labelling in which every cluster has a row."""
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=k)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    centroids = np.add.reduceat(x[order].astype(np.float64), offsets[:-1], axis=0) / sizes[:, None]
    if spherical:
        centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    objective = float(np.square(x[order] - np.repeat(centroids, sizes, axis=0)).sum())
    return order, offsets, centroids, objective


def _assign(x: Tensor, centroids: Tensor, capacity: Tensor) -> Tensor:
    """Labels of the rows of x (n, d) float32 with exactly capacity[c] of them in cluster c, at near-minimal sum of
    squared distances."""
    n, k = x.shape[0], centroids.shape[0]
    stride = -(-k // 16) * 16
    cost = torch.full((n, stride), torch.inf)
    view = cost[:, :k]
    torch.addmm(centroids.square().sum(1), x, centroids.T, alpha=-2.0, out=view)
    view.add_(x.square().sum(1, keepdim=True)).clamp_(min=0.0)
    largest = float(view.max())
    least = max(_EPSILON * float(view.min(1).values.mean()), _EPSILON_FLOOR * largest, 1e-30)
    epsilon = max(least, _EPSILON_START * largest)
    label = torch.empty(n, dtype=torch.int64)
    price, bid, scratch = torch.zeros(stride), torch.empty(n), torch.empty(2 * (n + k), dtype=torch.int64)
    while True:
        _C.balance(
            cost.data_ptr(),
            n,
            k,
            stride,
            capacity.data_ptr(),
            epsilon,
            price.data_ptr(),
            label.data_ptr(),
            scratch.data_ptr(),
            bid.data_ptr(),
        )
        if epsilon <= least:
            return label
        epsilon = max(least, epsilon / 8.0)


def _balance(x: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Labels with floor(n / k) or ceil(n / k) rows each, from FAISS's labels: alternately move the centroids and assign
    under capacities."""
    n = x.shape[0]
    capacity = np.full(k, n // k)
    # The larger size goes to the clusters that were largest, lowest index first.
    capacity[np.argsort(-np.bincount(labels, minlength=k), kind="stable")[: n % k]] += 1
    # Distances survive a shift and a scale; both keep their squares within float32.
    shifted = torch.from_numpy(x).double()
    shifted -= shifted.mean(0)
    shifted /= shifted.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    rows, sizes = shifted.float(), torch.from_numpy(capacity)
    total = float(shifted.square().sum())
    best, best_objective = torch.from_numpy(labels), math.inf
    label, count = best, torch.from_numpy(np.bincount(labels, minlength=k))
    for _ in range(_ROUNDS + 1):
        centroids = shifted.new_zeros(k, shifted.shape[1]).index_add_(0, label, shifted) / count[:, None]
        if count is sizes:
            objective = total - float((centroids.square().sum(1) * count).sum())
            settled = objective > best_objective * (1.0 - _SETTLED)
            if objective < best_objective:
                best, best_objective = label, objective
            if settled:
                break
        label, count = _assign(rows, centroids.float(), sizes), sizes
    return best.numpy()


def _index(faiss: Any, d: int, spherical: bool, device: str, float16: bool) -> Any:
    if device == "cpu":
        return (faiss.IndexFlatIP if spherical else faiss.IndexFlatL2)(d)
    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError('device="cuda" needs a FAISS with GPU support: pip install faiss-gpu-cu12, not faiss-cpu')
    if faiss.get_num_gpus() == 0:
        raise RuntimeError('device="cuda": FAISS finds no GPU')
    resources, options = faiss.StandardGpuResources(), faiss.GpuIndexFlatConfig()
    options.useFloat16 = float16
    return (faiss.GpuIndexFlatIP if spherical else faiss.GpuIndexFlatL2)(resources, d, options)


def _faiss_labels(
    faiss: Any, index: Any, x: np.ndarray, k: int, niter: int, nredo: int, spherical: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(n, 1) distances (similarities if spherical) and labels of the rows after FAISS's k-means."""
    n, d = x.shape
    parameters = faiss.ClusteringParameters()
    parameters.niter, parameters.nredo, parameters.spherical = niter, nredo, spherical
    parameters.seed = (seed ^ seed >> 31 ^ seed >> 62) & _MOST  # a smaller seed is itself
    # 1 silences FAISS's warning below 39 rows a cluster; the other keeps it from sampling the rows.
    parameters.min_points_per_centroid, parameters.max_points_per_centroid = 1, n
    clustering = faiss.Clustering(d, k, parameters)
    if nredo == 1:
        # A few iterations at a time, each part from the centroids of the last: the same iterations, until they settle.
        left, objective = niter, math.inf
        while left > 0:
            clustering.niter = min(_PART, left)
            clustering.train(x, index)
            found = clustering.iteration_stats.at(clustering.iteration_stats.size() - 1).obj
            settled = abs(found - objective) <= _SETTLED * abs(found)
            left, objective = left - _PART, found
            if settled:
                break
    else:
        clustering.train(x, index)
    index.reset()
    index.add(faiss.vector_to_array(clustering.centroids).reshape(k, d))
    distances, labels = index.search(x, 1)
    return distances, labels


def kmeans_subsets(
    features: Any,
    k: int,
    *,
    balanced: bool = False,
    niter: int = 25,
    nredo: int = 1,
    spherical: bool = False,
    seed: int = 0,
    device: str = "cpu",
    float16: bool = False,
) -> Subsets:
    """Cuts a pool of features into k subsets by FAISS k-means.

    Args:
        features: (n, d) float16, bfloat16, float32 or float64 features, n >= k; a tensor or a numpy array. Clustering
            runs in float32.
        k: number of subsets.
        balanced: equal sizes, floor(n / k) or ceil(n / k): starting from FAISS's centroids, rows are assigned under
            these capacities by an auction and the centroids moved, until the objective settles. Takes n * k * 4 bytes.
        niter, nredo: FAISS's iterations at most, and restarts of which the best is kept. Without restarts they end once three
            of them improve the objective by less than 0.5 %.
        spherical: rows and centroids are scaled to unit length (cosine similarity).
        seed: of FAISS's initial centroids; the same seed gives the same subsets on one device.
        device: "cpu", or "cuda" for FAISS's GPU index (the capacities are still met on the CPU).
        float16: the GPU index keeps its rows in half precision.

    Returns:
        `Subsets` (order, offsets, centroids, objective), on the CPU. No subset is empty: where FAISS leaves one (fewer
        than k distinct rows), it gets the row that lies farthest from its own centroid.

    Raises:
        ImportError: FAISS, or for "cuda" a FAISS with GPU support, is missing; the message names what to install.
        RuntimeError: device "cuda" without a GPU.
        TypeError, ValueError: wrong dtype or shape, NaN or infinity, squared distances beyond float32, k below 1 or above n.
    """
    x64 = check_features(features, "features")
    n = x64.shape[0]
    k = check_count(k, "k", 1)
    niter = check_count(niter, "niter", 1, _MOST)
    nredo = check_count(nredo, "nredo", 1, _MOST)
    seed = check_seed(seed)
    if k > n:
        raise ValueError(f"k = {k} subsets of {n} rows: k must not be above the number of rows")
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda", got {device!r}')
    if float16 and device == "cpu":
        raise ValueError('float16 is for device="cuda": on the CPU, FAISS computes in float32')
    faiss = _faiss()
    x = np.ascontiguousarray(x64.detach().to(torch.float32).cpu().numpy())
    # Distances are at most twice the largest norm. FAISS ends the process where one overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", x, x)
    if not squares.max() < np.finfo(np.float32).max / 4:
        raise ValueError(
            f"features overflow float32: squared distances of rows of magnitude up to {float(x64.abs().max()):.3g}; scale them down"
        )
    if spherical:
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    index = _index(faiss, x.shape[1], spherical, device, float16)
    distances, labels = _faiss_labels(faiss, index, x, k, niter, nredo, spherical, seed)
    labels = labels[:, 0].astype(np.int64)
    distances = distances[:, 0] if not spherical else 1.0 - distances[:, 0]
    _fill_empty(labels, distances, k)
    if balanced:
        labels = _balance(x, labels, k)
    order, offsets, centroids, objective = _summary(x, labels, k, spherical)
    return Subsets(
        torch.from_numpy(order), torch.from_numpy(offsets), torch.from_numpy(centroids.astype(np.float32)), objective
    )
