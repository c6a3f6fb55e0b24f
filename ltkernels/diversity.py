"""Feature diversity V and Feature Diversity Gain (FDG): what an augmented set adds to the spread of a class's features.

Source: "data-centric long-tailed recognition by Feature Diversity Gain", Definitions 2-4 and Principles 1-2. With F the
(d, n) matrix of mean-centred features,

    V(F) = 1/2 log2 det(I + (alpha / n) F F^T),        FDG(Z, Z') = V([Z, Z']) / V(Z) - 1.

``alpha = 1`` is the paper's form; ``alpha = d / eps**2`` is the rate of maximal coding rate reduction (MCR2).

What Definition 4 means by "perform mean normalization on Z, Z' and F" is open, so the reading is an argument,
``centering``:

* ``"joint"`` (default): F = [Z, Z'] is centred by its own mean. FDG sees that Z' lies away from Z.
* ``"separate"``: Z and Z' are each centred by their own mean before they are put side by side, which is what the
  paper's proof uses. Moving the whole of Z' by a vector changes nothing.
* ``"none"``: nothing is subtracted; both sets are taken as they are given, the original's V too. Subtract the mean of Z
  from both beforehand to have everything centred on the original set.

The paper's lower bound -N'/(N+N') holds for all three and is never attained; `fdg_infimum` is the tight one.

Determinants come from Cholesky factors in float64. LU is not used anywhere: torch's batched CPU ``slogdet`` returns
log-determinants that are wrong by several nats from d of about 150 on, with two threads or more and no error (pytorch
#142815, torch 2.13).
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["fdg_infimum", "fdg_lower_bound", "feature_diversity", "feature_diversity_gain", "subset_gains"]

CENTERINGS = ("joint", "separate", "none")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Argument checks, shared with ltkernels.selection ---------------------------------------------------------------------


def check_features(features: Any, name: str) -> Tensor:
    """The (n, d) float64 tensor of `features` (a tensor or anything numpy-like), on the device it came from; n may be
    0."""
    x = features if isinstance(features, Tensor) else torch.as_tensor(features)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (samples, features), got {tuple(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} has no features: shape {tuple(x.shape)}")
    finite = torch.isfinite(x.detach()).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{name} holds NaN or infinity, first in row {row}")
    return x.to(torch.float64).contiguous()  # one memory order, so that equal values give equal bits


def check_original(features: Any) -> Tensor:
    """`original` as float64, with at least one row."""
    x = check_features(features, "original")
    if x.shape[0] == 0:
        raise ValueError(
            "original is empty: FDG compares with the diversity of the original samples, so at least 2 are needed"
        )
    return x


def check_same_width(original: Tensor, other: Tensor, name: str) -> None:
    if original.shape[1] != other.shape[1]:
        raise ValueError(f"{name} has {other.shape[1]} features per sample, original has {original.shape[1]}")
    if original.device != other.device:
        raise ValueError(f"{name} is on {other.device}, original is on {original.device}")


def check_alpha(alpha: float) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be finite and above 0, got {alpha}")
    return float(alpha)


def check_centering(centering: str) -> str:
    if centering not in CENTERINGS:
        raise ValueError(f"unknown centering {centering!r}; known: {', '.join(CENTERINGS)}")
    return centering


def check_offsets(offsets: Tensor | Sequence[int], rows: int) -> list[int]:
    """`offsets` as a list: 0 = offsets[0] < ... < offsets[K] = rows, so that every subset has a member."""
    if rows == 0:
        raise ValueError("candidates is empty: the pool must hold at least one subset")
    x = torch.as_tensor(offsets)
    if x.dtype.is_floating_point or x.dtype == torch.bool or x.dtype.is_complex:
        raise TypeError(f"offsets must be integers, got {x.dtype}")
    if x.ndim != 1 or x.shape[0] < 2:
        raise ValueError(f"offsets must have shape (subsets + 1,) with at least one subset, got {tuple(x.shape)}")
    values: list[int] = x.tolist()
    if values[0] != 0:
        raise ValueError(f"offsets must start at 0, got offsets[0] = {values[0]}")
    for c, (begin, end) in enumerate(itertools.pairwise(values)):
        if end == begin:
            raise ValueError(f"subset {c} is empty: offsets[{c}] = offsets[{c + 1}] = {begin}")
        if end < begin:
            raise ValueError(f"offsets must increase: offsets[{c}] = {begin}, offsets[{c + 1}] = {end}")
    if values[-1] != rows:
        raise ValueError(
            f"offsets must end at the {rows} rows of candidates, got offsets[{len(values) - 1}] = {values[-1]}"
        )
    return values


# Measures ------------------------------------------------------------------------------------------------------------


def cholesky_log_det(matrix: Tensor) -> Tensor:
    """log det of symmetric positive definite matrices (..., n, n) in nats, from their Cholesky factors."""
    return 2.0 * torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)


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


# All subsets at once --------------------------------------------------------------------------------------------------


class SizeGroup(NamedTuple):
    """The subsets of one size: their ids (k,), and the pool rows of each (k, size), both int64."""

    size: int
    ids: Tensor
    rows: Tensor


def group_by_size(offsets: Sequence[int], device: torch.device) -> list[SizeGroup]:
    """The subsets of a pool, grouped by size, sizes and ids ascending."""
    members: dict[int, list[int]] = {}
    for c, (begin, end) in enumerate(itertools.pairwise(offsets)):
        members.setdefault(end - begin, []).append(c)
    groups = []
    for size in sorted(members):
        ids = torch.tensor(members[size])
        rows = torch.tensor([offsets[c] for c in members[size]])[:, None] + torch.arange(size)
        groups.append(SizeGroup(size, ids.to(device), rows.to(device)))
    return groups


def mixed_columns(columns: Tensor, mean: Tensor, anchor: float) -> Tensor:
    """The columns Y' with T+ = T + Y' Y'^T, for subsets `columns` (k, size, d) joining `anchor` samples of mean `mean`
    (d,).

    Y' = (X - mean 1^T) G^(1/2) with G = I - 11^T / (anchor + size) and G^(1/2) = I - h 11^T: the rank-`size` form of
    the merge of two scatters (Chan et al.). anchor = inf leaves X as it is ("none"); anchor = 0 centres the subset by
    itself (first "separate" step).
    """
    size = columns.shape[-2]
    h = (1.0 - math.sqrt(1.0 - size / (anchor + size))) / size
    return columns - ((1.0 - h * size) * mean + h * columns.sum(-2)).unsqueeze(-2)


def grown_log_dets(
    pool: Tensor, groups: Sequence[SizeGroup], scatter: Tensor, mean: Tensor, count: int, anchor: float, alpha: float
) -> Tensor:
    """log det(I + alpha T+ / n+) in nats after adding each subset alone to `count` samples of scatter T (d, d); shape
    (K,).

    log det(s I + T + Y'Y'^T) = log det A + log det(I + Y'^T A^-1 Y') with A = s I + T, s = n+ / alpha: a determinant of
    the subset's size per candidate. Subsets of one size share A, so one Cholesky factor serves; several sizes share the
    eigenvectors of T.
    """
    d = pool.shape[1]
    out = pool.new_empty(sum(group.ids.shape[0] for group in groups))
    if len(groups) == 1:
        ridge = (count + groups[0].size) / alpha
        matrix = scatter.clone()
        matrix.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(matrix)
        eye = torch.eye(d, dtype=pool.dtype, device=pool.device)
        basis = torch.linalg.solve_triangular(factor, eye, upper=False)
        commons = [2.0 * factor.diagonal().log().sum() - d * math.log(ridge)]
        scales = [None]
    else:
        values, vectors = torch.linalg.eigh(scatter)
        values = values.clamp_min(0.0)  # T is positive semi-definite; rounding puts its zeros at about -1e-16
        basis = vectors.T
        ridges = [(count + group.size) / alpha for group in groups]
        commons = [torch.log1p(values / ridge).sum() for ridge in ridges]
        scales = [torch.rsqrt(values + ridge) for ridge in ridges]
    whitened = pool @ basis.T
    centre = basis @ mean
    for group, common, scale in zip(groups, commons, scales):
        columns = mixed_columns(whitened[group.rows], centre, anchor)
        if scale is not None:
            columns = columns * scale
        inner = columns @ columns.mT if group.size <= d else columns.mT @ columns
        inner.diagonal(dim1=-2, dim2=-1).add_(1.0)
        out[group.ids] = common + cholesky_log_det(inner)
    return out


class Start(NamedTuple):
    """What FDG starts from: origin (d,) subtracted from everything, scatter (d, d) and mean (d,) about it, counts, base
    in nats."""

    origin: Tensor
    scatter: Tensor
    mean: Tensor
    count: int
    anchor: float
    base: Tensor


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
    return Start(origin, rows.T @ rows, zero, n, anchor, base)


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
    z = check_original(original).detach()
    pool = check_features(candidates, "candidates").detach()
    check_same_width(z, pool, "candidates")
    bounds = check_offsets(offsets, pool.shape[0])
    check_centering(centering)
    alpha = check_alpha(alpha)
    start = start_state(z, centering, alpha)
    groups = group_by_size(bounds, pool.device)
    values = grown_log_dets(pool - start.origin, groups, start.scatter, start.mean, start.count, start.anchor, alpha)
    return values / start.base - 1.0
