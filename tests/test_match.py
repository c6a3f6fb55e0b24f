"""`match_pool` keeps means and meets FDG on planted pools, is the random draw without constraints, and says what it cannot."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import digamma

import ltkernels as ltk
from ltkernels.diversity import FdgTarget, fdg_target, feature_diversity_gain, standardized_offset
from ltkernels.selection import _match as match
from ltkernels.selection import match_pool

WIDTH = 16


def planted(seed: int = 0, n: int = 60, rows: int = 1000, shift: float = 0.25, scale: float = 1.4):
    """A class, and a pool whose mean lies `shift` standard deviations away in every feature and that spreads `scale` wide."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH, generator=g)
    z = torch.randn(n, WIDTH, generator=g) @ mix + 5.0
    return z, (scale * torch.randn(rows, WIDTH, generator=g) + shift) @ mix + 5.0


@pytest.mark.parametrize("centering", ["joint", "separate", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_shift_and_spread_are_met(centering, dtype) -> None:
    z, pool = (x.to(dtype) for x in planted())
    drawn = match_pool(z, pool, 200, mean=None, centering=centering)
    assert drawn.offset > 1.5
    for goal in (0.15, 0.25, 0.4) if centering != "none" else (0.205, 0.225):
        found = match_pool(z, pool, 200, fdg=goal, centering=centering)
        assert found.reached
        assert found.offset < 0.15
        assert found.offset == pytest.approx(standardized_offset(z, pool[found.indices]), rel=1e-9)
        assert float(found.fdg[-1]) == pytest.approx(goal, abs=0.01)
        measured = feature_diversity_gain(z, pool[found.indices], centering=centering)
        assert float(found.fdg[-1]) == pytest.approx(float(measured), abs=1e-9)
        assert len(found.indices.unique()) == 200


@pytest.mark.parametrize("change", [-0.05, -0.02, 0.02, 0.05])
def test_many_features_do_not_hide_a_small_change_of_fdg(change) -> None:
    # With 64 features the offsets of sets that keep the mean differ by more, in the loss, than such a change is worth.
    g = torch.Generator().manual_seed(0)
    z, pool = torch.randn(100, 64, generator=g), 1.2 * torch.randn(1500, 64, generator=g) + 0.1
    goal = float(match_pool(z, pool, 300).fdg[0]) + change
    found = match_pool(z, pool, 300, fdg=goal)
    assert found.reached
    assert float(found.fdg[0]) == pytest.approx(goal, abs=0.01)
    assert found.offset < 0.25


def test_the_mean_alone_and_fdg_alone() -> None:
    z, pool = planted(1)
    mean = match_pool(z, pool, 200)
    assert mean.reached
    assert mean.offset < 0.1
    alone = match_pool(z, pool, 200, fdg=0.2, mean=None)
    assert float(alone.fdg[-1]) == pytest.approx(0.2, abs=0.01)
    assert alone.offset > 1.0


def test_a_cap_lowers_and_never_raises() -> None:
    z, pool = planted(2)
    free = match_pool(z, pool, 200)
    value = float(free.fdg[-1])
    above = match_pool(z, pool, 200, fdg=FdgTarget(value + 0.2, 0.0, {}, []))
    assert above.indices.tolist() == free.indices.tolist()
    assert above.reached
    below = match_pool(z, pool, 200, fdg=FdgTarget(value - 0.1, 0.0, {}, []))
    assert below.reached
    assert float(below.fdg[-1]) == pytest.approx(value - 0.1, abs=0.01)


@pytest.mark.parametrize("seed", [0, 7])
def test_without_constraints_it_is_the_random_draw(seed) -> None:
    z, pool = planted()
    found = match_pool(z, pool, 137, mean=None, seed=seed)
    assert found.indices.tolist() == torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:137].tolist()
    # It is the member of the family whose multipliers are zero: the n largest of the noise alone.
    order, noise = match._random_order(1000, seed, pool.device)
    assert noise.topk(137).indices.tolist() == order[:137].tolist() == found.indices.tolist()


def test_it_is_a_fixed_function_of_the_seed() -> None:
    z, pool = planted()
    once, again, other = (match_pool(z, pool, 200, fdg=0.2, seed=seed).indices.tolist() for seed in (3, 3, 4))
    assert once == again
    assert set(once) != set(other)


def test_it_changes_a_random_draw_little() -> None:
    # A pool that already has the mean and the spread of the class: most of the random draw stays.
    z, pool = planted(n=2000, shift=0.0, scale=1.0)
    drawn = set(match_pool(z, pool, 200, mean=None, seed=5).indices.tolist())
    kept = set(match_pool(z, pool, 200, seed=5).indices.tolist())
    assert len(drawn & kept) > 150


def test_probabilities_are_those_of_largest_entropy() -> None:
    # Over many seeds row i is taken with probability 1 / (1 + exp(tau - theta x_i)): the logit is linear in x.
    g = torch.Generator().manual_seed(0)
    pool = torch.randn(400, 1, generator=g, dtype=torch.float64)
    z = torch.randn(50, 1, generator=g, dtype=torch.float64) * 0.5
    z = z - z.mean() + 0.3
    taken = torch.zeros(400, dtype=torch.float64)
    for seed in range(300):
        taken[match_pool(z, pool, 120, seed=seed).indices] += 1 / 300
    logit = torch.special.logit(taken.clamp(1 / 600, 1 - 1 / 600))
    ends = [logit[(pool[:, 0] > low) & (pool[:, 0] < low + 0.5)].mean() for low in (-1.25, -0.25, 0.75)]
    assert float(ends[1] - ends[0]) == pytest.approx(float(ends[2] - ends[1]), abs=0.25)
    assert ends[2] > ends[1] + 0.2


def test_blocks_and_a_part_of_the_pool_give_the_same_means(monkeypatch) -> None:
    z, pool = planted(rows=4000)
    whole = match_pool(z, pool, 800, fdg=0.2)
    monkeypatch.setattr(match, "_WHOLE", 0)
    monkeypatch.setattr(match, "_BLOCK", 100 * WIDTH)
    assert match_pool(z, pool, 800, fdg=0.2).indices.tolist() == whole.indices.tolist()
    monkeypatch.setattr(match, "_PART", 1500)
    part = match_pool(z, pool, 800, fdg=0.2)
    assert part.reached
    assert part.offset < 0.1


MEMORY = """
import resource, torch
from ltkernels.selection import match_pool

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
torch.manual_seed(0)
original, pool = torch.randn(50, 256), torch.randn(150_000, 256)  # 146 MiB; in float64 it would be another 293
match_pool(original, pool[:500], 100, fdg=0.1)
before = peak()
found = match_pool(original, pool, 2_000, fdg=0.1, steps=8)
print(found.stats["steps"], peak() - before)
"""


def test_a_large_pool_is_read_in_blocks_and_never_copied(tmp_path) -> None:
    # In a process of its own, whose peak is that of this call. What grows with the pool are vectors of one number a row.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=tmp_path)
    steps, mebibytes = done.stdout.split()
    assert int(steps) > 8
    assert float(mebibytes) < 120.0


def test_what_cannot_be_met_is_flagged_and_nearest() -> None:
    z, pool = planted(shift=6.0, scale=0.5)
    drawn, found = match_pool(z, pool, 200, mean=None), match_pool(z, pool, 200)
    assert not found.reached
    assert found.offset < drawn.offset
    nearest = (pool.double().mean(0) - z.double().mean(0)).norm()
    assert (pool[found.indices].double().mean(0) - z.double().mean(0)).norm() < nearest
    contradictory = match_pool(*planted(3), 200, fdg=5.0)
    assert not contradictory.reached
    assert contradictory.stats["error"] < 0.0
    equal = match_pool(z, torch.ones(30, WIDTH), 10)
    assert not equal.reached
    assert math.isfinite(equal.offset)
    everything = match_pool(z, pool, len(pool))
    assert sorted(everything.indices.tolist()) == list(range(len(pool)))


def test_a_cap_alone_is_the_random_draw_until_it_binds() -> None:
    z, pool = planted(shift=0.0)
    drawn = match_pool(z, pool, 200, mean=None)
    value = float(drawn.fdg[-1])
    free = match_pool(z, pool, 200, mean=None, fdg=FdgTarget(value + 0.1, 0.0, {}, []))
    assert torch.equal(free.indices, drawn.indices)
    bound = match_pool(z, pool, 200, mean=None, fdg=FdgTarget(value - 0.1, 0.0, {}, []))
    assert bound.reached
    assert float(bound.fdg[-1]) <= value - 0.1 + 0.01


@pytest.mark.parametrize("count", [1, 5])
def test_originals_without_spread_do_not_claim_a_kept_mean(count: int) -> None:
    z, pool = planted(shift=0.0)
    found = match_pool(z[:1].expand(count, -1), pool + 50.0, 200)
    assert not found.reached
    assert "how near a mean must be" in found.stats["note"]


def test_one_sample_is_matched_by_its_mean_and_says_so() -> None:
    z, pool = planted(shift=0.0)
    for asked in ({"fdg": 0.2}, {"fdg": "auto", "heads": {0: pool}}):
        found = match_pool(z[:1], pool, 200, **asked)
        assert torch.isnan(found.fdg).all()
        assert "FDG is undefined" in found.stats["note"]
    assert (pool[found.indices].mean(0) - z[0]).norm() < (pool.mean(0) - z[0]).norm()


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": 1001}, ValueError, "n must be between 1 and the 1000 rows of pool, got 1001"),
        ({"n": 2.0}, TypeError, "n must be an integer, got float"),
        ({"mean": "pool"}, ValueError, "mean must be 'original' or None, got 'pool'"),
        ({"fdg": math.nan}, ValueError, "fdg must be finite, got nan"),
        ({"fdg": "most"}, ValueError, "got 'most'"),
        ({"fdg": "auto"}, ValueError, "give their features as heads"),
        ({"fdg": "auto", "heads": [torch.randn(9, WIDTH)]}, ValueError, "give their features as heads"),
        ({"fdg": "auto", "heads": {0: torch.randn(9, WIDTH)}}, ValueError, "no head class to calibrate FDG on"),
        ({"fdg": "auto", "heads": {7: torch.randn(99, 3)}}, ValueError, "heads: class 7 does not have the 16 features"),
        ({"fdg": FdgTarget(math.nan, 0.0, {}, [])}, ValueError, "fdg must be finite, got nan"),
        ({"original": torch.empty(0, WIDTH)}, ValueError, "original is empty: it has no mean"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"alpha": 0.0}, ValueError, "alpha must be above 0, got 0.0"),
        ({"centering": "all"}, ValueError, "unknown centering 'all'"),
        ({"pool": torch.full((1000, WIDTH), math.nan)}, ValueError, "pool holds NaN or infinity, first in row 0"),
        ({"pool": torch.ones(1000, 3)}, ValueError, "pool has 3 features per sample, original has 16"),
        ({"pool": torch.ones(1000, WIDTH, dtype=torch.int64)}, TypeError, "pool must be float16"),
    ],
)
def test_bad_arguments(keywords, error, words) -> None:
    z, pool = planted()
    arguments = {"original": z, "pool": pool, "n": 10, **keywords}
    with pytest.raises(error, match=words):
        match_pool(**arguments)


def test_auto_is_the_target_of_the_head_classes() -> None:
    z, pool = planted(scale=1.1)
    heads = {c: planted(c + 10, n=400)[0] for c in range(3)}
    target = fdg_target(heads, None, len(z), added=200, seed=2)
    assert target.held_out == []
    assert set(target.classes) == {0, 1, 2}
    found = match_pool(z, pool, 200, fdg="auto", heads=heads, seed=2)
    assert found.stats["target"] == target.value
    assert found.stats["cap"]
    assert float(found.fdg[-1]) <= target.value + 0.01


def test_the_target_of_gaussian_classes_is_the_analytic_one() -> None:
    # With a huge alpha I no longer counts, and E log det of a Wishart matrix is known: V of n samples has
    # E log det(alpha C_n) = d log alpha + log det Sigma + d log(2 / n) + sum of digamma((n - i) / 2), i = 1 ... d.
    g = torch.Generator().manual_seed(0)
    d, n, added, alpha = 6, 20, 4000, 1e8
    mix = torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(d, d, generator=g, dtype=torch.float64)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(count, d, generator=g, dtype=torch.float64) @ mix

    def expected(count: int) -> float:
        log_det = 2.0 * float(torch.linalg.slogdet(mix).logabsdet)
        return d * math.log(alpha * 2 / count) + log_det + sum(float(digamma((count - i) / 2)) for i in range(1, d + 1))

    features, held_out = {c: draw(3000) for c in range(8)}, {c: draw(added) for c in range(8)}
    found = fdg_target(features, held_out, n, repeats=100, alpha=alpha)
    analytic = expected(n + added) / expected(n) - 1.0
    errors = np.array(list(found.classes.values())) - analytic
    assert abs(errors.mean()) < 4.0 * errors.std(ddof=1) / math.sqrt(len(errors))
    assert found.value == pytest.approx(analytic, rel=0.03)
    assert found.spread == pytest.approx(errors.std(ddof=1), rel=1e-9)
    assert found.held_out == list(range(8))


def test_target_in_one_dimension_by_quadrature() -> None:
    # d = 1, alpha = 1: E log(1 + s chi^2_{n-1} / n), by integration over the density.
    from scipy.integrate import quad
    from scipy.stats import chi2

    g = torch.Generator().manual_seed(1)
    n, added, variance, repeats = 20, 3000, 2.5, 1500
    features = {0: math.sqrt(variance) * torch.randn(20000, 1, generator=g, dtype=torch.float64)}
    held_out = {0: math.sqrt(variance) * torch.randn(30000, 1, generator=g, dtype=torch.float64)}
    gains = fdg_target(features, held_out, n, added=added, repeats=repeats).value
    first, second = (
        quad(lambda x, k=k: chi2.pdf(x, n - 1) * (math.log1p(variance) / math.log1p(variance * x / n)) ** k, 0, 120)[0]
        for k in (1, 2)
    )
    # Four standard errors of the draws.
    assert gains == pytest.approx(first - 1.0, abs=4.0 * math.sqrt((second - first**2) / repeats))
    assert gains > 0.03


def test_held_out_samples_of_a_memorised_class_give_a_larger_target() -> None:
    g = torch.Generator().manual_seed(0)
    close = {c: 0.5 * torch.randn(300, 8, generator=g) for c in range(3)}
    held = {c: torch.randn(100, 8, generator=g) for c in range(3)}
    assert fdg_target(close, held, 30).value > fdg_target(close, None, 30).value + 0.3


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"n": 1}, ValueError, "n must be at least 2, got 1"),
        ({"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
        ({"n": 5.0}, TypeError, "n must be an integer, got float"),
        ({"held_out": {9: torch.ones(3, 4)}}, ValueError, "held_out has class 9, features has not"),
        ({"n": 99}, ValueError, "no head class to calibrate FDG on: none of 1 has 99 samples"),
        ({"features": [torch.randn(40, 4)]}, TypeError, "features must be a mapping from labels to features, got list"),
        ({"held_out": torch.ones(3, 4)}, TypeError, "held_out must be a mapping from labels to features, got Tensor"),
    ],
)
def test_bad_calibration(arguments, error, words) -> None:
    keywords = {"features": {0: torch.randn(40, 4)}, "held_out": None, "n": 10, **arguments}
    with pytest.raises(error, match=words):
        fdg_target(**keywords)


def test_offset_by_hand() -> None:
    z = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    # Covariance is I: trace 2, so a standard error of the mean is sqrt(2 / 4).
    assert standardized_offset(z, z + torch.tensor([3.0, 4.0])) == pytest.approx(5.0 / math.sqrt(0.5))
    assert standardized_offset(z[:1], z[:1]) == 0.0
    assert math.isnan(standardized_offset(z[:1], z))
    with pytest.raises(ValueError, match="augmented is empty"):
        standardized_offset(z, z[:0])


def test_location_has_the_stated_weight() -> None:
    # The covariance of both sets is N/(N+N') C_Z + N'/(N+N') C_Z' + N N'/(N+N')^2 d d^T.
    g = torch.Generator().manual_seed(0)
    z, extra = torch.randn(54, 3, generator=g).double(), torch.randn(5346, 3, generator=g).double() + 2.0
    n, m, d = 54, 5346, extra.mean(0) - z.mean(0)
    c_z, c_x = torch.cov(z.T, correction=0), torch.cov(extra.T, correction=0)
    both = n / (n + m) * c_z + m / (n + m) * c_x + n * m / (n + m) ** 2 * torch.outer(d, d)
    expected = torch.linalg.slogdet(torch.eye(3) + both)[1] / torch.linalg.slogdet(torch.eye(3) + c_z)[1] - 1.0
    assert float(feature_diversity_gain(z, extra)) == pytest.approx(float(expected), rel=1e-9)
    assert n * m / (n + m) ** 2 == pytest.approx(0.01, abs=1e-3)
    assert ltk.diversity.FAR == 3.0
