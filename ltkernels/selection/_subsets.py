"""The log-determinants of all candidate subsets at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._features import (
    check_alpha,
    check_centering,
    check_features,
    check_offsets,
    check_original,
    check_same_width,
    cholesky_log_det,
    original_diversity,
)


class SizeGroup(NamedTuple):
    """The subsets of one size: their ids (k,), and the pool rows of each (k, size), both int64."""

    size: int
    ids: Tensor
    rows: Tensor


def mixed_columns(columns: Tensor, mean: Tensor, anchor: float | Tensor) -> Tensor:
    """The columns Y' with T+ = T + Y' Y'^T, for subsets `columns` (..., k, size, d) joining `anchor` samples of mean
    `mean` (..., d); the dimension k may be missing; `anchor` is a number, or a tensor (...,) of the leading shape.

    Y' = (X - mean 1^T) G^(1/2) with G = I - 11^T / (anchor + size) and G^(1/2) = I - h 11^T: the rank-`size` form of
    the merge of two scatters (Chan et al.). anchor = inf leaves X as it is ("none"); anchor = 0 centres the subset by
    itself (first "separate" step).
    """
    size = columns.shape[-2]
    keep, h = mixing(size, anchor)
    if isinstance(anchor, Tensor):
        keep, h = keep[..., None, None], h[..., None, None]
    if columns.ndim == mean.ndim + 2:
        mean = mean.unsqueeze(-2)
    return columns - (keep * mean + h * columns.sum(-2)).unsqueeze(-2)


def mixed_products(columns: Tensor, along: Tensor, mean: Tensor, anchor: float | Tensor) -> Tensor:
    """The products Y'^T Y' (..., k, size, size) of the columns of `mixed_columns`, which are not formed: a batch of runs would read and
    write every one of them once more. `along` (..., k, size) holds the products of `columns` (..., k, size, d) with `mean` (..., d).

    What is subtracted, keep * mean + h * sum, is far shorter than the columns unless anchor = 0, when it is their mean.
    """
    keep, h = mixing(columns.shape[-2], anchor)
    if isinstance(anchor, Tensor):
        keep, h = keep[..., None, None], h[..., None, None]
    inner = columns @ columns.mT
    by_mean = keep * along
    less = by_mean + h * inner.sum(-1)
    both = keep * keep * mean.square().sum(-1)[..., None, None] + h * (by_mean + less).sum(-1, keepdim=True)
    less -= 0.5 * both
    return inner.sub_(less[..., None]).sub_(less[..., None, :])


def mixing(size: int | Tensor, anchor: float | Tensor) -> tuple[Any, Any]:
    """(keep, h) of the vector keep * mean + h * (sum of the subset) that `mixed_columns` subtracts."""
    share = 1.0 - size / (anchor + size)
    h = (1.0 - (share.sqrt() if isinstance(share, Tensor) else math.sqrt(share))) / size
    return 1.0 - h * size, h


# Up to this many sizes, a Cholesky factor for each costs less than the eigenvectors that serve them all.
_FACTORS = 4


def _products(columns: Tensor) -> Tensor:
    """The smaller of the two, whose determinants with I added are equal (Sylvester)."""
    return columns @ columns.mT if columns.shape[-2] <= columns.shape[-1] else columns.mT @ columns


def grown_log_dets(
    pool: Tensor,
    groups: Sequence[SizeGroup],
    scatter: Tensor,
    mean: Tensor,
    count: float | Tensor,
    anchor: float | Tensor,
    alpha: float,
    alone: bool,
) -> Tensor:
    """log det(I + alpha T+ / n+) in nats after adding each subset alone to `count` samples of scatter T (..., d, d);
    shape (..., K). Leading dimensions are independent runs; `count` and `anchor` are numbers or have one entry per run.

    log det(s I + T + Y'Y'^T) = log det A + log det(I + Y'^T A^-1 Y') with A = s I + T, s = n+ / alpha: a determinant of
    the subset's size per candidate. Subsets of one size share A, so one Cholesky factor serves; many sizes share the
    eigenvectors of T. On a GPU there is a factor per size: eigenvectors would make the host wait. `alone`: the anchor of a run is 0.
    """
    d = pool.shape[-1]
    lead = scatter.shape[:-2]
    out = pool.new_empty(*lead, sum(group.ids.shape[0] for group in groups))
    shared = len(groups) > _FACTORS and not pool.is_cuda
    if shared:
        values, vectors = torch.linalg.eigh(scatter)
        values = values.clamp_min(0.0)  # T is positive semi-definite; rounding puts its zeros at about -1e-16
        whitened, centre = pool @ vectors, (mean.unsqueeze(-2) @ vectors).squeeze(-2)
    for group in groups:
        ridge = (count + group.size) / alpha
        if shared:
            scaled = values + (ridge[..., None] if isinstance(ridge, Tensor) else ridge)
            common = torch.log1p(values / (scaled - values)).sum(-1)
            columns = mixed_columns(whitened[..., group.rows, :], centre, anchor)
            inner = _products(columns * scaled.rsqrt()[..., None, None, :])
        else:
            inverse, common = whitening(scatter, ridge)
            # One size: its rows are the pool's, in order, and a copy of them would be a fifth of what a step moves on a GPU.
            rows = pool[..., : group.rows.numel(), :] if len(groups) == 1 else pool[..., group.rows.reshape(-1), :]
            columns = (rows @ inverse.mT).unflatten(-2, group.rows.shape)
            centre = (inverse @ mean.unsqueeze(-1)).squeeze(-1)
            if group.size <= d and not alone:
                # With the mean from the pool, which runs share, and not from the columns of each.
                along = (rows @ (inverse.mT @ centre.unsqueeze(-1))).reshape(*lead, *group.rows.shape)
                inner = mixed_products(columns, along, centre, anchor)
            else:
                inner = _products(mixed_columns(columns, centre, anchor))
        inner.diagonal(dim1=-2, dim2=-1).add_(1.0)
        out[..., group.ids] = common[..., None] + cholesky_log_det(inner)
    return out


def whitening(scatter: Tensor, ridge: float | Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 (..., n, n) of A = ridge I + scatter = L L^T, and log det(A / ridge) (...,)."""
    matrix = scatter.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None] if isinstance(ridge, Tensor) else ridge)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    n = matrix.shape[-1]
    eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    diagonal = factor.diagonal(dim1=-2, dim2=-1).square()
    common = (diagonal / (ridge[..., None] if isinstance(ridge, Tensor) else ridge)).log().sum(-1)
    common = common.masked_fill(failed != 0, torch.nan)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False), common


class Start(NamedTuple):
    """What FDG starts from: origin (d,) subtracted from everything, rows (N, d) whose columns make the scatter, their
    mean (d,), counts, and base, the log-determinant of the original set in nats."""

    origin: Tensor
    rows: Tensor
    mean: Tensor
    count: int
    anchor: float
    base: Tensor

    @property
    def scatter(self) -> Tensor:
        """(d, d), computed anew each time."""
        return self.rows.mT @ self.rows


def start_state(original: Tensor, centering: str, alpha: float) -> Start:
    """The state before anything is added. The origin is the mean of `original`, so that a common offset costs no
    digits."""
    base = original_diversity(original, centering, alpha)
    zero = original.new_zeros(original.shape[1])
    origin = zero if centering == "none" else original.mean(0)
    rows = original - origin
    if centering != "none":
        rows = rows - rows.mean(0)
    n = original.shape[0]
    anchor = {"joint": float(n), "separate": 0.0, "none": math.inf}[centering]
    return Start(origin, rows, zero, n, anchor, base)


class Problem:
    """A selection problem as the engines see it, checked once and shared by every run over the same pool.

    Attributes:

    start: the state before anything is added (`_subsets.Start`).
    rows: (P, d) float64, the pool relative to start.origin, contiguous.
    bounds: the offsets, a list; alpha; largest: the size of the largest subset.
    groups: the subsets by size, ascending; group_of: (K,) int64, on the CPU, which of them each subset is in.
    layout: what `_engines.loop` prepares once for all of its runs.
    """

    def __init__(self, start: Start, pool: Tensor, bounds: list[int], alpha: float) -> None:
        self.start = start
        self.rows = (pool - start.origin).contiguous()
        self.bounds = bounds
        self.alpha = alpha
        offsets = torch.tensor(bounds)
        sizes, self.group_of = offsets.diff().unique(return_inverse=True)
        self.groups: list[SizeGroup] = []
        for group, size in enumerate(sizes.tolist()):
            ids = (self.group_of == group).nonzero()[:, 0]
            rows = offsets[ids][:, None] + torch.arange(size)
            self.groups.append(SizeGroup(size, ids.to(pool.device), rows.to(pool.device)))
        self.largest = self.groups[-1].size
        self.layout: Any = None

    @property
    def subsets(self) -> int:
        return len(self.bounds) - 1

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """All that it is made of."""
        return self.start.origin, self.start.rows, self.start.anchor, self.rows, self.bounds, self.alpha


def prepare(original: Any, candidates: Any, offsets: Any, centering: str, alpha: float) -> Problem:
    """The checked problem; `subset_gains` says what is refused."""
    z = check_original(original).detach()
    pool = check_features(candidates, "candidates").detach()
    check_same_width(z, pool, "candidates")
    bounds = check_offsets(offsets, pool.shape[0])
    alpha = check_alpha(alpha)
    return Problem(start_state(z, check_centering(centering), alpha), pool, bounds, alpha)


def subset_gains(
    original: Any,
    candidates: Any,
    offsets: Tensor | Sequence[int],
    *,
    centering: str = "joint",
    alpha: float = 1.0,
) -> Tensor:
    """FDG of the original samples plus each subset alone, all subsets at once.

    Args:
        original: (N, d) features, N >= 2 and not all equal.
        candidates: (P, d) features of the pool.
        offsets: (K + 1,) integers; subset c is rows offsets[c]:offsets[c + 1] of `candidates`. Sizes may differ; the
            result is exact.
        centering, alpha: as in `feature_diversity_gain`.

    Returns:
        (K,) float64, on the device of the inputs: entry c equals ``feature_diversity_gain(original,
        candidates[offsets[c]:offsets[c + 1]])``.

    Raises:
        TypeError, ValueError: as `feature_diversity_gain`; also an empty pool or subset, and offsets that do not rise
            from 0 to P.

    One d x d factorisation for the pool and a determinant of the subset's own size per candidate, in place of K of size
    d x d.
    """
    problem = prepare(original, candidates, offsets, centering, alpha)
    start = problem.start
    state = start.scatter, start.mean, start.count, start.anchor
    values = grown_log_dets(problem.rows, problem.groups, *state, problem.alpha, start.anchor == 0.0)
    return values / start.base - 1.0
