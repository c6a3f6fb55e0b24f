"""`match_pool`: samples of a pool that keep the mean of the originals, and their FDG at a target.

**What is chosen.** Give every row i of the pool a noise g_i, the logistic quantiles in random order. The n rows of largest
noise are a random draw without replacement. `match_pool` takes the set S of n rows with the largest sum of noise among those
with

    mean(S) = mean(Z),        FDG(Z, S) = t        (either may be left out).

With multipliers theta (d,) and beta, S is the n rows of largest

    theta . x_i + beta l_i + g_i,      l_i = (x_i - mu)^T (I + alpha C)^-1 (x_i - mu),

where l_i is the derivative of FDG's log-determinant by the weight of row i, C and mu those of Z with the sample that meets
the mean. theta = beta = 0 is the random draw. In expectation over the noise, row i is taken with probability
pi_i = 1 / (1 + exp(tau - theta . x_i - beta l_i)): of all designs that meet the constraints, the one of largest entropy
(Hajek's conditional Poisson sampling). So of everything that meets mean and FDG the choice is the least special one.

**How.** The dual problem is convex in theta. Newton steps on its expectation (a smooth function of theta, beta and tau) give
the start; then the residuals of the set that this noise really gives are driven down by steps with the same Hessian. A set
is finite: at most d + 2 of its n rows are undecided by the multipliers, so the residual does not vanish but is of the order
of d / n spreads of the pool. The best set met is returned, with its offset and FDG, and `reached` says whether they hold.

Kept means matter because the classifier follows the mean of what is added, which FDG does not see (`standardized_offset`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._features import (
    check_alpha,
    check_centering,
    check_features,
    check_finite,
    check_same_width,
    cholesky_log_det,
)
from ..diversity import FdgTarget, fdg_target
from ._greedy import REACHED, Selection, number

# A mean counts as kept within this share of the standard error of the originals' own mean.
OFFSET_REACHED = 0.5
# Elements of a pool that are converted to float64 together. Larger pools are read in blocks of so many, once a step.
_BLOCK = 1 << 22
# The expected dual is solved on at most this many rows, a random part of a larger pool.
_PART = 1 << 13
# Newton steps on the expected dual at most, the decrement that ends them, and values of beta that are tried.
_NEWTON, _DECREMENT, _BRACKET = 40, 1e-6, 10
# An expected FDG is near enough for the refinement to begin.
_NEAR = 3e-3
# A refinement ends after so many steps without a better set, or with a loss that small.
_PATIENCE, _ENOUGH = 6, 1e-5
# The ridge of the dual, in units of the pool's variance: it bounds theta where the mean lies outside the pool's hull.
_RIDGE = 1e-4


class _Rows:
    """The pool relative to the originals' mean, float64, in blocks; a small pool is converted once."""

    def __init__(self, pool: Tensor, origin: Tensor) -> None:
        self.pool, self.origin = pool, origin
        self.count, self.width = pool.shape
        self.step = max(1, _BLOCK // self.width)
        self.whole = pool.to(torch.float64) - origin if self.count <= self.step else None

    def blocks(self) -> Iterator[Tensor]:
        if self.whole is not None:
            yield self.whole
            return
        for block in self.pool.split(self.step):
            yield block.to(torch.float64) - self.origin

    def take(self, rows: Tensor) -> Tensor:
        return self.whole[rows] if self.whole is not None else self.pool[rows].to(torch.float64) - self.origin

    def moments(self, rows: Tensor, square: bool = True) -> tuple[Tensor, Tensor]:
        """Mean (d,) and, if wanted, mean square (d, d) of some rows."""
        total, squares = self.origin.new_zeros(self.width), self.origin.new_zeros(self.width, self.width)
        for part in rows.split(self.step):
            x = self.take(part)
            total += x.sum(0)
            if square:
                squares.addmm_(x.T, x)
        return total / rows.shape[0], squares / rows.shape[0]


class _Gain:
    """FDG of the originals with n rows of which mean and mean square are known, both about the originals' mean."""

    def __init__(self, original: Tensor, n: int, centering: str, alpha: float) -> None:
        self.mean, self.n, self.total = original.mean(0), n, original.shape[0] + n
        self.centering, self.alpha = centering, alpha
        centred = original - self.mean
        self.scatter = centred.T @ centred
        # ||mean of others - mean|| is measured in the standard error of this mean.
        self.error = math.sqrt(float(self.scatter.trace())) / original.shape[0]
        if centering == "none":
            self.scatter += original.shape[0] * torch.outer(self.mean, self.mean)
        base = float(cholesky_log_det(self._plus_one(self.scatter / original.shape[0])))
        self.base = base if math.isfinite(base) and base > 1e-12 else math.nan

    def _plus_one(self, covariance: Tensor) -> Tensor:
        matrix = self.alpha * covariance
        matrix.diagonal().add_(1.0)
        return matrix

    def matrix(self, mean: Tensor, square: Tensor) -> Tensor:
        """I + alpha C of both sets together."""
        n = self.n
        second = self.scatter + n * square
        if self.centering == "joint":
            second -= (n * n / self.total) * torch.outer(mean, mean)
        elif self.centering == "separate":
            second -= n * torch.outer(mean, mean)
        else:
            second += n * (torch.outer(mean, self.mean) + torch.outer(self.mean, mean + self.mean))
        return self._plus_one(second / self.total)

    def __call__(self, mean: Tensor, square: Tensor) -> float:
        return float(cholesky_log_det(self.matrix(mean, square))) / self.base - 1.0

    def derivative(self, x: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        """(rows,): derivative of FDG by the share that each row of x has in the n, up to one constant for all."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.matrix(mean, square)))
        if self.centering == "none":
            x, centre = x + self.mean, torch.zeros_like(mean)
        else:
            centre = mean * (self.n / self.total) if self.centering == "joint" else mean
        scale = self.alpha * self.n / (self.total * self.base)
        return ((x @ inverse) * (x - 2.0 * centre)).sum(1) * scale

    def offset(self, mean: Tensor) -> float:
        length = float(torch.linalg.vector_norm(mean))
        return length / self.error if self.error > 0.0 else math.nan if length else 0.0


class _Constraints:
    """What a set must meet, as residuals: its mean in units of the pool's spread, and its FDG above the target.

    `lean` (d, d) gives l_i = x_i^T lean x_i; None where FDG is left free.
    """

    def __init__(self, rows: _Rows, gain: _Gain, spread: Tensor, mean: bool) -> None:
        self.rows, self.gain, self.spread, self.mean = rows, gain, spread, mean
        self.lean: Tensor | None = None
        self.target = math.nan

    def aim(self, target: float, about: tuple[Tensor, Tensor]) -> None:
        """Wants an FDG of `target`. `about`: moments of the set at which it is linearised."""
        self.target = target
        self.lean = torch.cholesky_inverse(torch.linalg.cholesky(self.gain.matrix(*about)))
        # A mean of 1 or so keeps its multiplier of the size of the others.
        self.lean = self.lean / float((self.lean * about[1]).sum().clamp_min(1e-300))

    def features(self, x: Tensor) -> Tensor:
        """(rows, k): what the multipliers of the constraints stand before."""
        parts = [x / self.spread] if self.mean else []
        if self.lean is not None:
            parts.append(((x @ self.lean) * x).sum(1, keepdim=True))
        return torch.cat(parts, 1)

    def residuals(self, mean: Tensor, square: Tensor) -> Tensor:
        parts = [mean / self.spread] if self.mean else []
        if self.lean is not None:
            parts.append(mean.new_tensor([self.gain(mean, square) - self.target]))
        return torch.cat(parts)

    def loss(self, residuals: Tensor) -> float:
        """Mean square of the mean's residuals, plus that of FDG, which counts double."""
        squares = residuals.square()
        if self.lean is None:
            return float(squares.mean())
        return 4.0 * float(squares[-1]) + (float(squares[:-1].mean()) if self.mean else 0.0)


class _Expected:
    """The expected dual over the rows `part` (m, d): row i is taken with probability sigmoid(features_i . multipliers -
    tau), a `share` of the rows in all."""

    def __init__(self, constraints: _Constraints, part: Tensor, share: float) -> None:
        self.constraints, self.part, self.size = constraints, part, part.shape[0] * share
        mean = part / constraints.spread if constraints.mean else part[:, :0]
        self.linear = torch.cat([mean, part.new_ones(part.shape[0], 1)], 1)
        # Hessians need few digits: they only steer.
        self.single = self.linear.float()
        self.lean = part.new_zeros(part.shape[0])
        self.value = part.new_zeros(self.linear.shape[1])
        self.value[-1] = math.log(share / (1.0 - share))
        self.beta = 0.0
        self.ridge = torch.full_like(self.value, _RIDGE)
        self.ridge[-1] = 0.0
        self.weights = torch.sigmoid(self.linear @ self.value)

    def moments(self) -> tuple[Tensor, Tensor]:
        share = self.weights / self.weights.sum()
        return share @ self.part, (self.part * share[:, None]).T @ self.part

    def _height(self, value: Tensor) -> tuple[float, Tensor]:
        s = torch.addmv(self.lean, self.linear, value, beta=self.beta)
        penalty = 0.5 * (self.ridge * value.square()).sum() - value[-1]
        return float(torch.nn.functional.softplus(s).sum() / self.size + penalty), torch.sigmoid(s)

    def _hessian(self) -> Tensor:
        weights = (self.weights * (1.0 - self.weights) / self.size).float()
        hessian = ((self.single * weights[:, None]).T @ self.single).double()
        hessian.diagonal().add_(self.ridge + 1e-9)
        return hessian

    def solve(self) -> None:
        """Newton's method for everything but beta. With s = linear . value + beta l the function sum softplus(s) / size -
        value[-1] + ridge / 2 |value[:-1]|^2 is convex; the last feature is 1, and makes the probabilities sum to `size`."""
        level, self.weights = self._height(self.value)
        for _ in range(_NEWTON):
            gradient = self.weights @ self.linear / self.size + self.ridge * self.value
            gradient[-1] -= 1.0
            step = torch.linalg.solve(self._hessian(), gradient)
            fall = float(gradient @ step)
            length = 1.0
            while fall > _DECREMENT and length > 1e-3:
                value = self.value - length * step
                found, weights = self._height(value)
                if found <= level - 0.2 * length * fall:
                    break
                length *= 0.5
            else:
                return
            self.value, level, self.weights = value, found, weights

    def jacobian(self) -> Tensor:
        """(k, k): derivatives of the expected residuals by the multipliers where the number of rows is kept."""
        full = self._hessian()
        if self.constraints.lean is not None:
            slope = self.weights * (1.0 - self.weights) / self.size
            rate = self.constraints.gain.derivative(self.part, *self.moments()) * slope
            k = full.shape[0]
            wide = full.new_empty(k + 1, k + 1)
            wide[1:, 1:] = full
            wide[1:, 0] = self.linear.T @ (slope * self.lean)
            wide[0, 1:], wide[0, 0] = rate @ self.linear, rate @ self.lean
            # Order: the mean, FDG, the number of rows.
            places = [*range(1, k), 0, k]
            full = wide[places][:, places]
        return full[:-1, :-1] - full[:-1, -1:] @ full[-1:, :-1] / full[-1, -1]

    def aim(self) -> None:
        """Brings FDG to the constraints' target: it rises with its multiplier, which is bracketed."""
        constraints = self.constraints
        self.lean = constraints.features(self.part)[:, -1].contiguous()
        low, high = -math.inf, math.inf
        for _ in range(_BRACKET):
            miss = float(constraints.residuals(*self.moments())[-1])
            if abs(miss) < _NEAR:
                return
            low, high = (low, self.beta) if miss > 0.0 else (self.beta, high)
            full = self.jacobian()
            along = torch.linalg.solve(_ridged(full[:-1, :-1]), full[:-1, -1])
            slope = float(full[-1, -1] - full[-1, :-1] @ along)
            near = self.beta + max(-6.0, min(6.0, -miss / slope if slope > 0.0 else math.copysign(6.0, -miss)))
            if not low < near < high:
                near = 0.5 * (max(low, self.beta - 6.0) + min(high, self.beta + 6.0))
            self.value[:-1] -= (near - self.beta) * along
            self.beta = near
            self.solve()

    def multipliers(self) -> Tensor:
        return torch.cat([self.value[:-1], self.value.new_tensor([] if self.constraints.lean is None else [self.beta])])


def _ridged(matrix: Tensor) -> Tensor:
    return matrix + _RIDGE * torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)


class _Found(NamedTuple):
    """A set of rows (in order of score) with its mean about the originals' and its residuals' loss."""

    rows: Tensor
    mean: Tensor
    loss: float


def _realised(
    constraints: _Constraints, noise: Tensor, n: int, value: Tensor, jacobian: Tensor, steps: int
) -> tuple[_Found, int]:
    """The best set on the way of the multipliers from `value` to those that this noise needs, and the steps made."""
    rows = constraints.rows
    matrix = _ridged(jacobian)
    best, stale, damping, made = None, 0, 1.0, 0
    while made < steps:
        made += 1
        scores = noise + torch.cat([constraints.features(x) @ value for x in rows.blocks()])
        top = scores.topk(n)
        mean, square = rows.moments(top.indices, constraints.lean is not None)
        residual = constraints.residuals(mean, square)
        loss = constraints.loss(residual)
        if best is None or loss < best.loss:
            best, stale = _Found(top.indices, mean, loss), 0
        else:
            stale += 1
            damping *= 0.8
        if stale == _PATIENCE or best.loss < _ENOUGH:
            break
        value = value - damping * torch.linalg.solve(matrix, residual + _RIDGE * value)
    assert best is not None
    return best, made


def _search(
    constraints: _Constraints, noise: Tensor, order: Tensor, n: int, steps: int, target: float | None, cap: bool
) -> tuple[_Found, int]:
    """The set that meets the constraints, and FDG `target` (with `cap`: where it would be above)."""
    rows = constraints.rows
    some = order[:_PART].sort().values if rows.count > _PART else torch.arange(rows.count, device=order.device)
    expected = _Expected(constraints, rows.take(some), n / rows.count)
    if constraints.mean:
        expected.solve()
    about = expected.moments()
    if target is None or (cap and constraints.gain(*about) <= target):
        found, made = _realised(constraints, noise, n, expected.multipliers(), expected.jacobian(), steps)
        about = rows.moments(found.rows)
        if target is None or constraints.gain(*about) <= target:
            return found, made
    constraints.aim(target, about)
    expected.aim()
    return _realised(constraints, noise, n, expected.multipliers(), expected.jacobian(), steps)


def match_pool(
    original: Any,
    pool: Any,
    n: int,
    *,
    fdg: float | str | FdgTarget | None = None,
    mean: str | None = "original",
    heads: Mapping[Any, Any] | None = None,
    seed: int = 0,
    centering: str = "joint",
    alpha: float = 1.0,
    steps: int = 60,
) -> Selection:
    """Takes n rows of a pool at random, but for their mean, which is that of the originals, and their FDG.

    Args:
        original: (N, d) float features; pool: (P, d), P >= n, on the same device. A pool of any size is read in blocks.
        n: rows to take.
        fdg: None: FDG is what it comes to. A number: FDG of the originals with what is taken. A `FdgTarget` (of
            `ltkernels.diversity.fdg_target`): not more than its value; a sample that has less is left alone, because
            raising FDG was measured to hurt. "auto": the target calibrated on `heads`.
        mean: "original": the rows' mean is that of the originals. None: it is left free.
        heads: features (n_h, d) of the head classes, by label, for "auto".
        seed: of the random order. With `fdg` and `mean` both None the rows are `torch.randperm(P)[:n]` of it.
        centering, alpha: of FDG (see `ltkernels.diversity`).
        steps: most refinements of the multipliers.

    Returns:
        `Selection`: picked and indices (n,) rows of `pool`, best first; fdg (1,) of all of them (NaN where the originals
        have no diversity); offset, their `standardized_offset`; stats with target, reached (offset at most 0.5, FDG
        within 0.01 of a number and at most 0.01 above a cap), steps, and note (words, where something asked for was not
        done). What cannot be met gives the nearest set that the search found, with reached False.

    Raises:
        TypeError, ValueError: as `select_subsets`; n below 1 or above P, an unknown `mean`, "auto" without `heads`.

    Source: this library; the module's head derives it. Random order and Hajek's rejective sampling: Hajek (1964).
    """
    z = check_features(original, "original").detach()
    x = check_pool(pool, z)
    n = _check_count(n, x.shape[0])
    centering, alpha = check_centering(centering), check_alpha(alpha)
    if mean not in ("original", None):
        raise ValueError(f"mean must be 'original' or None, got {mean!r}")
    if isinstance(fdg, str):
        if fdg != "auto":
            raise ValueError(f"fdg must be a number, an FdgTarget, 'auto' or None, got {fdg!r}")
        if not heads:
            raise ValueError("fdg = 'auto' is calibrated on head classes: give their features as heads")
        fdg = fdg_target(heads, None, z.shape[0], added=n, seed=seed, centering=centering, alpha=alpha)
    cap = isinstance(fdg, FdgTarget)
    target = None if fdg is None else fdg.value if isinstance(fdg, FdgTarget) else number(fdg, "fdg")

    gain = _Gain(z, n, centering, alpha)
    rows = _Rows(x, gain.mean)
    order, noise = _random_order(x.shape[0], seed, x.device)
    free = _Found(order[:n], rows.moments(order[:n], False)[0], math.inf)
    found, made, notes = free, 0, []
    defined = math.isfinite(gain.base)
    if target is not None and not defined:
        notes.append("FDG is undefined for these originals (one sample, or all equal): only the mean was matched")
    if n < x.shape[0]:
        spread = _spread(rows)
        constraints = _Constraints(rows, gain, spread, mean is not None)
        wanted = target if defined else None
        if mean is not None or wanted is not None:
            found, made = _search(constraints, noise, order, n, steps, wanted, cap)
    moments = rows.moments(found.rows)
    reached = mean is None or not gain.offset(moments[0]) > OFFSET_REACHED
    stats: dict[str, Any] = {"engine": "match", "steps": made, "seed": seed, "note": "; ".join(notes)}
    value = gain(*moments) if defined else math.nan
    if target is not None:
        miss = value - target
        stats |= {"target": target, "cap": cap, "error": max(0.0, miss) if cap else miss}
        reached = reached and (not defined or abs(stats["error"]) <= REACHED)
    stats["reached"] = reached
    indices = found.rows.cpu()
    return Selection(indices, torch.tensor([value], dtype=torch.float64), indices, stats, gain.offset(moments[0]))


def check_pool(pool: Any, original: Tensor) -> Tensor:
    """The pool in its own type: a large one is not copied."""
    x = (pool if isinstance(pool, Tensor) else torch.as_tensor(pool)).detach()
    check_features(x[:0], "pool")
    check_same_width(original, x, "pool")
    step = max(1, _BLOCK // x.shape[1])
    for number_, block in enumerate(x.split(step)):
        check_finite(block, "pool", number_ * step)
    return x


def _check_count(n: Any, rows: int) -> int:
    if isinstance(n, bool) or not isinstance(n, numbers.Integral):
        raise TypeError(f"n must be an integer, got {type(n).__name__}")
    if not 1 <= n <= rows:
        raise ValueError(f"n must be between 1 and the {rows} rows of pool, got {n}")
    return int(n)


def _random_order(count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(the rows in random order, the logistic quantile of every row): the n largest are the first n of the order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    noise = torch.empty(count, dtype=torch.float64)
    noise[order] = torch.special.logit((count - torch.arange(count, dtype=torch.float64) - 0.5) / count)
    return order.to(device), noise.to(device)


def _spread(rows: _Rows) -> Tensor:
    """(d,) standard deviation of the pool about its mean; 1 where that is nothing."""
    total, squares = torch.zeros_like(rows.origin), torch.zeros_like(rows.origin)
    for x in rows.blocks():
        total += x.sum(0)
        squares += x.square().sum(0)
    mean = total / rows.count
    spread = (squares / rows.count - mean.square()).clamp_min(0.0).sqrt()
    return torch.where(spread > 1e-9 * (1.0 + mean.abs().max()), spread, torch.ones_like(spread))
