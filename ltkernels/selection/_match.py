"""`match_pool`: samples of a pool that keep the mean of the originals, and their FDG at a target.

**What is chosen.** Give every row i of the pool a noise g_i, the logistic quantiles in random order. The n rows of largest
noise are a random draw without replacement. `match_pool` takes the set S of n rows with the largest sum of noise among those
with

    mean(S) = mean(Z),        FDG(Z, S) = t        (either may be left out).

With multipliers theta (d,) and beta, S is the n rows of largest

    theta . x_i + beta l_i + g_i,      l_i = (x_i - c)^T A (x_i - c),      A = s (I + alpha C)^-1,

where l_i is the derivative of FDG by the share that row i has in S (C, and the centre c, of Z and a set met on the way; s a
number). theta = beta = 0 is the random draw. In expectation over the noise, row i is taken with probability pi_i = 1 / (1 +
exp(tau - theta . x_i - beta l_i)): of all designs that meet the constraints, the one of largest entropy (Hajek's conditional
Poisson sampling). So of everything that meets mean and FDG the choice is the least special one.

**How.** The residuals are those of the set that this noise really gives, their derivatives those of the expected residuals:
with pi_i at the n-th largest score, the covariance of the features under the weights pi_i (1 - pi_i), which is the Hessian of
the convex dual problem. Steps of Levenberg and Marquardt bring down

    loss = offset^2 + ((FDG - t) / 0.5)^2        (offset: the mean's, in its standard errors),

so that a mean which can be kept is kept before an FDG that cannot be had with it; of sets with an offset below 0.25 the one that
meets FDG is the better one. A set is finite: at most d + 2 of its n rows are undecided by the multipliers, so the residual does
not vanish but is of the order of d / n spreads of the pool. The best set met is returned, with its offset and FDG, and `reached`
says whether they hold.

Kept means matter because the classifier follows the mean of what is added, which FDG does not see (`standardized_offset`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._features import (
    as_tensor,
    check_alpha,
    check_centering,
    check_count,
    check_features,
    check_number,
    check_rows,
    check_seed,
    cholesky_log_det,
)
from .._ranks import Ranks, same_arguments, together
from ..diversity import FdgTarget, fdg_target, feature_diversity_gain
from ._greedy import REACHED, Selection

# A mean counts as kept within this share of the standard error of the originals' own mean.
OFFSET_REACHED = 0.5
# Elements of a pool that is converted to float64 once. Larger ones are read once a step, in blocks that stay in the cache: fresh arrays of
# tens of megabytes cost ten times what is done with them.
_WHOLE, _BLOCK = 1 << 22, 1 << 18
# Rows that the Hessian of a step is taken from at most, a random part of a larger pool.
_PART = 1 << 13
# A search ends after so many steps without a better set, or with an offset whose square is that small (and FDG well
# within `REACHED`).
_PATIENCE, _ENOUGH = 6, 0.05**2
# The square of an offset that is well kept: of such sets the one that meets FDG is the better one.
_KEPT = (0.5 * OFFSET_REACHED) ** 2
# The difference of FDG that counts as much as a standard error of the mean.
_MISS = 0.5
# A step's ridge, as a share of the mean of the squares' diagonal; the most that it moves the scores (root mean square); what
# it is shortened by after each set that was no better; derivatives are taken anew below this share of the loss that they had.
_RIDGE, _LONGEST, _DAMPING, _FRESH = 1e-2, 3.0, 0.7, 0.9


class _Rows:
    """The pool relative to the originals' mean, float64, in blocks; a small pool is converted once.

    Over ranks each holds its own rows; rows are numbered through the whole pool. `top`, `moments`, `joined` and `agreed` are then
    collective, and give every rank the same.
    """

    def __init__(self, pool: Tensor, origin: Tensor, order: Tensor, ranks: Ranks | None, counts: Sequence[int]) -> None:
        self.pool, self.origin, self.ranks = pool, origin, ranks
        self.count, self.width = sum(counts), pool.shape[1]
        self.ends = list(itertools.accumulate(counts, initial=0))
        self.first, self.last = self.ends[ranks.rank if ranks else 0 :][:2]
        small = pool.numel() <= _WHOLE
        self.step = max(1, len(pool) if small else _BLOCK // self.width)
        self.whole = pool.to(torch.float64) - origin if small else None
        # Derivatives only steer: a random part of a large pool serves, of which `mine` are this rank's own.
        some = order[:_PART].sort().values if self.count > _PART else torch.arange(self.count, device=order.device)
        self.sizes = torch.searchsorted(some, some.new_tensor(self.ends)).diff().tolist()
        self.mine = self.own(some)

    def own(self, rows: Tensor) -> Tensor:
        """Which of some rows are this rank's, by their number here."""
        return rows if self.ranks is None else rows[(rows >= self.first) & (rows < self.last)] - self.first

    def joined(self, own: Tensor) -> Tensor:
        """(k, ...) of the whole part, from what each rank has for its own rows of it."""
        if self.ranks is None:
            return own
        padded = own.new_zeros(max(self.sizes), *own.shape[1:])
        padded[: len(own)] = own
        return torch.cat([x[:size] for x, size in zip(self.ranks.gather(padded), self.sizes)])

    def agreed(self, x: Tensor) -> Tensor:
        """Rank 0's: rounding may differ between machines, and all must go one way."""
        return x if self.ranks is None else self.ranks.broadcast(x, 0)

    def top(self, values: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The n rows of largest value, best first, and the smallest of these values."""
        found = values.topk(min(n, len(values)))
        if self.ranks is None:
            return found.indices, found.values[-1]
        padded = values.new_full((2, n), -torch.inf)
        padded[:, : len(found.values)] = torch.stack([found.values, (found.indices + self.first).to(values)])
        every = torch.cat(self.ranks.gather(padded), 1)
        best = every[0].topk(n)
        return every[1, best.indices].long(), best.values[-1]

    def take(self, rows: Tensor | slice) -> Tensor:
        return self.whole[rows] if self.whole is not None else self.pool[rows].to(torch.float64) - self.origin

    def dot(self, vector: Tensor) -> Tensor:
        """(own rows,) products of every row with `vector`."""
        return self.each(lambda x: x @ vector)

    def quadratic(self, matrix: Tensor, centre: Tensor) -> Tensor:
        """(own rows,) (x - centre)^T matrix (x - centre) of every row."""
        return self.each(lambda x: ((x - centre) @ matrix).mul_(x - centre).sum(1))

    def each(self, value: Callable[[Tensor], Tensor]) -> Tensor:
        """(own rows,) of a function that gives a number for every row of a block."""
        out = self.origin.new_empty(len(self.pool))
        for begin in range(0, len(out), self.step):
            block = slice(begin, begin + self.step)
            # In place: a small result of its own would sit in the middle of the memory that the next block needs.
            out[block] = value(self.take(block))
        return out

    def moments(self, rows: Tensor, square: bool = True) -> tuple[Tensor, Tensor]:
        """Mean (d,) and, if wanted, mean square (d, d) of some rows."""
        total, squares = self.origin.new_zeros(self.width), self.origin.new_zeros(self.width, self.width)
        for part in self.own(rows).split(self.step):
            x = self.take(part)
            total += x.sum(0)
            if square:
                squares.addmm_(x.T, x)
        if self.ranks is not None:
            total = torch.stack(self.ranks.gather(total)).sum(0)
            squares = torch.stack(self.ranks.gather(squares)).sum(0) if square else squares
        return total / rows.shape[0], squares / rows.shape[0]


class Gain:
    """FDG of one class with n added samples, of which mean and mean square are known, both about the originals' mean."""

    def __init__(self, original: Tensor, centering: str, alpha: float) -> None:
        self.original, self.centering, self.alpha = original, centering, alpha
        self.mean, self.count = original.mean(0), original.shape[0]
        centred = original - self.mean
        self.scatter = centred.T @ centred
        # ||mean of others - mean|| is measured in the standard error of this mean.
        self.error = math.sqrt(float(self.scatter.trace())) / self.count
        if centering == "none":
            self.scatter += self.count * torch.outer(self.mean, self.mean)
        base = float(cholesky_log_det(self._plus_one(self.scatter / self.count)))
        self.base = base if math.isfinite(base) and base > 1e-12 else math.nan

    @property
    def defined(self) -> bool:
        return math.isfinite(self.base)

    def _plus_one(self, covariance: Tensor) -> Tensor:
        matrix = self.alpha * covariance
        matrix.diagonal().add_(1.0)
        return matrix

    def matrix(self, n: int, mean: Tensor, square: Tensor) -> Tensor:
        """I + alpha C of both sets together."""
        total = self.count + n
        second = self.scatter + n * square
        if self.centering == "joint":
            second -= (n * n / total) * torch.outer(mean, mean)
        elif self.centering == "separate":
            second -= n * torch.outer(mean, mean)
        else:
            second += n * (torch.outer(mean, self.mean) + torch.outer(self.mean, mean + self.mean))
        return self._plus_one(second / total)

    def __call__(self, n: int, mean: Tensor, square: Tensor) -> float:
        return float(cholesky_log_det(self.matrix(n, mean, square))) / self.base - 1.0

    def of(self, added: Tensor) -> float:
        """FDG of the rows `added` (n, d); NaN where it is undefined."""
        if not self.defined:
            return math.nan
        if self.count + added.shape[0] < added.shape[1]:  # the n x n form is the smaller one
            return float(feature_diversity_gain(self.original, added, centering=self.centering, alpha=self.alpha))
        x = added - self.mean
        return self(added.shape[0], x.mean(0), x.T @ x / added.shape[0])

    def slopes(self, n: int, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """(A (d, d), c (d,)) of the derivative (x - c)^T A (x - c) of FDG by the share that a row x has in the n, up to
        one constant for all rows."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.matrix(n, mean, square)))
        share = n / (self.count + n)
        centre = {"joint": mean * share, "separate": mean, "none": -self.mean}[self.centering]
        return inverse * (self.alpha * share / self.base), centre

    def offset(self, mean: Tensor) -> float:
        length = float(torch.linalg.vector_norm(mean))
        return length / self.error if self.error > 0.0 else math.nan if length else 0.0


class _Tilt:
    """The multipliers theta and beta for one noise, and the best set that they gave."""

    def __init__(self, rows: _Rows, gain: Gain, noise: Tensor, n: int, mean: bool) -> None:
        self.rows, self.gain, self.noise, self.n, self.mean = rows, gain, noise, n, mean
        part = rows.joined(rows.take(rows.mine))
        spread = part.std(0, correction=0)
        self.spread = torch.where(spread > 1e-9 * (1.0 + part.abs().max()), spread, torch.ones_like(spread))
        self.part = (part / self.spread).float() if mean else part.new_empty(part.shape[0], 0).float()
        self.theta, self.beta = part.new_zeros(self.part.shape[1]), 0.0
        self.lean: Tensor | None = None
        # The loss counts the mean in its standard errors, so that a kept mean goes before an FDG that cannot be had with it.
        self.unit = gain.error or float(self.spread.square().sum().sqrt())
        self.made = 0

    def search(self, steps: int, target: float | None) -> Tensor:
        """The rows, in order of score, of the best set on the way to the originals' mean, where it is wanted, and to an FDG of
        `target`."""
        best: tuple[Tensor, tuple[float, float]] | None = None
        stale, damping, fresh, jacobian = 0, 1.0, math.inf, self.theta
        for _ in range(steps):
            self.made += 1
            scores = self.rows.dot(self.theta / self.spread) if self.mean else torch.zeros_like(self.noise)
            if self.lean is not None:
                scores.add_(self.lean, alpha=self.beta)
            top, threshold = self.rows.top(scores + self.noise, self.n)
            moments = self.rows.moments(top, target is not None)
            residual = moments[0] / self.unit if self.mean else moments[0][:0]
            missed = 0.0 if target is None else self.gain(self.n, *moments) - target
            loss, miss = self.rows.agreed(residual.new_tensor([float(residual.square().sum()), missed])).tolist()
            if loss < _ENOUGH and abs(miss) < 0.25 * REACHED:
                return top
            # First what misses its aim, then what comes nearer to it: where the mean is kept, FDG decides.
            rank = max(loss, _KEPT) + (max(0.0, abs(miss) - REACHED) / _MISS) ** 2, loss + (miss / _MISS) ** 2
            loss = rank[1]
            if best is None or rank < best[1]:
                best, stale = (top, rank), 0
            else:
                stale, damping = stale + 1, _DAMPING * damping
            if stale == _PATIENCE:
                break
            if target is not None:
                residual = torch.cat([residual, residual.new_tensor([miss / _MISS])])
            if loss < _FRESH * fresh:
                fresh = loss
                if target is not None:
                    self.lean = self.rows.quadratic(*self.gain.slopes(self.n, *moments))
                jacobian = self._jacobian(scores, threshold)
            self._step(jacobian, residual, damping)
        assert best is not None
        return best[0]

    def _jacobian(self, scores: Tensor, threshold: Tensor) -> Tensor:
        """(k, k) derivatives of the expected residuals by the multipliers, each in units of its feature's spread."""
        features = self.part
        if self.lean is not None:
            lean = self.rows.joined(self.lean[self.rows.mine])
            self.lean_spread = float(lean.std(correction=0)) or 1.0
            features = torch.cat([features, (lean / self.lean_spread).float()[:, None]], 1)
        weights = torch.sigmoid(self.rows.joined(scores[self.rows.mine]) - threshold).float()
        weights = weights * (1.0 - weights)
        self.features = features - (weights @ features) / weights.sum().clamp_min(1e-30)
        hessian = ((self.features * weights[:, None]).T @ self.features).double()
        units = self.spread / self.unit if self.mean else self.spread[:0]
        if self.lean is not None:
            units = torch.cat([units, units.new_tensor([self.lean_spread / _MISS])])
        return hessian * (self.rows.count / (self.n * len(features))) * units[:, None]

    def _step(self, jacobian: Tensor, residual: Tensor, damping: float) -> None:
        """A step of Levenberg and Marquardt: expected numbers of rows have the derivatives, the set has the residuals."""
        square = jacobian.T @ jacobian
        square.diagonal().add_(_RIDGE * float(square.diagonal().mean()) + 1e-300)
        step = torch.linalg.solve(square, jacobian.T @ residual)
        length = float((self.features @ step.float()).square().mean().sqrt())
        step = self.rows.agreed(step * (damping * min(1.0, _LONGEST / max(length, 1e-300))))
        if self.lean is not None:
            self.beta -= float(step[-1]) / self.lean_spread
            step = step[:-1]
        self.theta = self.theta - step


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
    group: Any = None,
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
        group: process group over whose ranks the pool is spread ("world" is the default one). Each rank gives all other
            arguments alike and its own share of the pool, none too (shape (0, d)); the pool is the shares one after the other,
            and every rank gets the same rows of the whole pool: those of one process, but that in a long search rounding may
            decide between sets that are as good. A step exchanges n scores and the moments (d^2 doubles) of each rank.

    Returns:
        `Selection`: picked and indices (n,) rows of `pool`, best first; fdg (1,) of all of them (NaN where the originals
        have no diversity); offset, their `standardized_offset`; stats with target, reached (offset at most 0.5, FDG
        within 0.01 of a number and at most 0.01 above a cap), steps, and note (words, where something asked for was not
        done). What cannot be met gives the nearest set that the search found, with reached False.

    Raises:
        TypeError, ValueError: as `select_subsets`; n below 1 or above P, an unknown `mean`, "auto" without `heads`. With `group`,
            an error of one rank is one of every rank.

    Source: this library; the module's head derives it. Random order and Hajek's rejective sampling: Hajek (1964).
    """
    ranks = None if group is None else Ranks(group)
    with together(ranks):
        z = check_features(original, "original").detach()
        if len(z) == 0:
            raise ValueError("original is empty: it has no mean")
        x = check_rows(pool, "pool", z.shape[1], "original has", max(1, _BLOCK // z.shape[1]))
        if x.device != z.device:
            raise ValueError(f"pool is on {x.device}, original is on {z.device}")
        n, seed, steps = check_count(n, "n", 1), check_seed(seed), check_count(steps, "steps", 1)
        centering, alpha = check_centering(centering), check_alpha(alpha)
        if mean not in ("original", None):
            raise ValueError(f"mean must be 'original' or None, got {mean!r}")
        if isinstance(fdg, str):
            if fdg != "auto":
                raise ValueError(f"fdg must be a number, an FdgTarget, 'auto' or None, got {fdg!r}")
            if not isinstance(heads, Mapping) or not heads:
                raise ValueError("fdg = 'auto' is calibrated on head classes: give their features as heads")
            wrong = next((label for label, x in heads.items() if as_tensor(x, "heads").shape[1:] != z.shape[1:]), None)
            if wrong is not None:
                raise ValueError(f"heads: class {wrong} does not have the {z.shape[1]} features per sample of original")
            fdg = FdgTarget(math.nan, 0.0, {}, [])  # of one sample FDG is undefined, whatever the heads say
            if len(z) > 1:
                fdg = fdg_target(heads, None, len(z), added=n, seed=seed, centering=centering, alpha=alpha)
        elif fdg is not None:
            check_number(fdg.value if isinstance(fdg, FdgTarget) else fdg, "fdg")
        cap = isinstance(fdg, FdgTarget)
        target = None if fdg is None else float(fdg.value if isinstance(fdg, FdgTarget) else fdg)
    counts = [x.shape[0]]
    if ranks is not None:
        counts = same_arguments(ranks, z, repr((n, target, cap, mean, seed, centering, alpha, steps)), x.shape[0])
    if n > sum(counts):
        raise ValueError(f"n must be between 1 and the {sum(counts)} rows of pool, got {n}")
    gain = Gain(z, centering, alpha)
    order, noise = _random_order(sum(counts), seed, x.device)
    rows = _Rows(x, gain.mean, order, ranks, counts)
    notes = []
    if target is not None and not gain.defined:
        notes.append("FDG is undefined for these originals (one sample, or all equal): only the mean was matched")
    wanted = target if gain.defined else None
    indices, made = order[:n], 0
    if n < rows.count and (mean is not None or wanted is not None):
        tilt = _Tilt(rows, gain, noise[rows.first : rows.last], n, mean is not None)
        if mean is not None:
            indices = tilt.search(steps, None)
        bends = wanted is not None
        if cap and bends:
            bends = float(rows.agreed(z.new_tensor(gain(n, *rows.moments(indices))))) > wanted
        if bends:
            indices = tilt.search(steps, wanted)
        made = tilt.made
    moments = rows.moments(indices)
    offset = gain.offset(moments[0])
    if mean is not None and math.isnan(offset):
        notes.append("these originals (one sample, or all equal) do not say how near a mean must be to count as kept")
    reached = mean is None or offset <= OFFSET_REACHED
    stats: dict[str, Any] = {"engine": "match", "steps": made, "seed": seed, "note": "; ".join(notes)}
    value = gain(n, *moments) if gain.defined else math.nan
    if target is not None:
        miss = value - target
        stats |= {"target": target, "cap": cap, "error": max(0.0, miss) if cap else miss}
        reached = reached and (not gain.defined or abs(stats["error"]) <= REACHED)
    stats["reached"] = reached
    indices = indices.cpu()
    return Selection(indices, torch.tensor([value], dtype=torch.float64), indices, stats, offset)


def _random_order(count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(the rows in random order, the logistic quantile of every row): the n largest are the first n of the order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    noise = torch.empty(count, dtype=torch.float64)
    noise[order] = torch.special.logit((count - torch.arange(count, dtype=torch.float64) - 0.5) / count)
    return order.to(device), noise.to(device)
