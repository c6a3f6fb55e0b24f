"""Greedy picks against brute force (numpy slogdet in float64, one matrix per candidate), for every mode, centring and
engine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import ltkernels as ltk
from ltkernels.selection._driver import ENGINES
from ltkernels.selection._engines.lazy import LazyEngine
from ltkernels.selection._engines.steps import StepEngine
from ltkernels.selection._subsets import Problem, start_state

CENTERINGS = ("joint", "separate", "none")


def log_det(rows: np.ndarray, alpha: float) -> float:
    small = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    return float(np.linalg.slogdet(np.eye(len(small)) + alpha / len(rows) * small)[1])


def grown(z: np.ndarray, added: np.ndarray, centering: str, alpha: float) -> float:
    if centering == "joint":
        rows = np.vstack([z, added])
        return log_det(rows - rows.mean(0), alpha)
    if centering == "separate":
        return log_det(np.vstack([z - z.mean(0), added - added.mean(0)]), alpha)
    return log_det(np.vstack([z, added]), alpha)


def brute_force(z, x, offsets, m, rule, centering, alpha):
    """Picks and FDG path of `rule` (mode, value), every candidate's d x d or n x n determinant anew each step."""
    mode, value = rule
    base = log_det(z if centering == "none" else z - z.mean(0), alpha)
    left, added, picks, path = list(range(len(offsets) - 1)), np.zeros((0, z.shape[1])), [], []
    for _ in range(m):
        parts = [np.vstack([added, x[offsets[c] : offsets[c + 1]]]) for c in left]
        fdg = np.array([grown(z, part, centering, alpha) for part in parts]) / base - 1.0
        if mode == "quantile":
            at = int(np.argsort(fdg, kind="stable")[math.floor(value * (len(left) - 1) + 0.5)])
        else:
            at = int({"max": -fdg, "min": fdg, "target": np.abs(fdg - (value or 0.0))}[mode].argmin())
        picks.append(left.pop(at))
        path.append(fdg[at])
        added = parts[at]
    return picks, path


def problem(seed: int, n: int, d: int, sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features with a decaying spectrum and an offset, as a network's are, and subsets scattered around their own
    centres."""
    rng = np.random.default_rng(seed)
    spectrum = 1.0 / np.sqrt(1.0 + np.arange(d))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    centres = np.repeat(rng.normal(size=(len(sizes), d)), sizes, axis=0)
    z = rng.normal(size=(n, d)) * spectrum
    x = (centres * rng.uniform(0.2, 1.5) + rng.normal(size=(offsets[-1], d)) * rng.uniform(0.1, 1.0)) * spectrum
    return z + 3.0, x + 3.0, offsets


RULES = [("max", None), ("min", None), ("quantile", 0.3), ("target", 0.15)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r[0])
def test_picks_equal_brute_force(engine: str, centering: str, rule) -> None:
    # n, d, equal sizes or not; n below and above d, one feature, originals fewer than a subset.
    shapes = [(5, 3, False), (40, 8, True), (6, 20, False), (25, 48, True), (300, 16, False), (9, 1, True)]
    for case, (n, d, ragged) in enumerate(shapes):
        rng = np.random.default_rng(case)
        sizes = rng.integers(1, 9, 14) if ragged else np.full(14, 5)
        z, x, offsets = problem(case, n, d, sizes)
        alpha = [1.0, 0.3, 8.0][case % 3]
        want, path = brute_force(z, x, offsets, 8, rule, centering, alpha)
        keyword = {"quantile": {"q": rule[1]}, "target": {"target": rule[1]}}.get(rule[0], {})
        got = ltk.selection.select_subsets(
            z, x, offsets, m=8, mode=rule[0], centering=centering, alpha=alpha, engine=engine, **keyword
        )
        assert got.picked.tolist() == want, (n, d, ragged)
        np.testing.assert_allclose(got.fdg.numpy(), path, rtol=1e-9, atol=1e-11)
        rows = np.concatenate([np.arange(offsets[c], offsets[c + 1]) for c in want])
        assert got.indices.tolist() == rows.tolist()


@pytest.mark.parametrize("mode", ["max", "min"])
def test_picks_at_512_features(mode: str) -> None:
    # Fewer samples than features keep the brute force in its n x n form, 50 x 50 here.
    z, x, offsets = problem(1, 20, 512, np.full(20, 10))
    want, _ = brute_force(z, x, offsets, 3, (mode, None), "joint", 1.0)
    for engine in ENGINES:
        got = ltk.selection.select_subsets(z, x, offsets, m=3, mode=mode, engine=engine)
        assert got.picked.tolist() == want, engine


def test_picks_at_5000_originals() -> None:
    z, x, offsets = problem(2, 5000, 24, np.full(20, 10))
    want, _ = brute_force(z, x, offsets, 3, ("max", None), "joint", 1.0)
    for engine in ENGINES:
        assert ltk.selection.select_subsets(z, x, offsets, m=3, engine=engine).picked.tolist() == want, engine


@pytest.mark.parametrize("mode", ["max", "min", "target"])
@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("ragged", [False, True])
def test_engines_agree_until_the_pool_is_empty(mode: str, centering: str, ragged: bool) -> None:
    # Tight antipodal subsets: those on which a stale score used as a bound picks wrong.
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 12, 40) if ragged else np.full(40, 6)
    z, x, offsets = problem(6, 8, 24, sizes)
    mean = z.mean(0)
    x[: offsets[20]] = mean + (x[: offsets[20]] - mean) * 0.01 + 4.0
    x[offsets[20] :] = mean + (x[offsets[20] :] - mean) * 0.01 - 4.0
    runs = [
        ltk.selection.select_subsets(
            z, x, offsets, m=40, mode=mode, centering=centering, engine=e, target=0.5 if mode == "target" else None
        )
        for e in ENGINES
    ]
    for run in runs[1:]:
        assert run.picked.tolist() == runs[0].picked.tolist()
        np.testing.assert_allclose(run.fdg.numpy(), runs[0].fdg.numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("n", [4, 400])
def test_lazy_bounds_hold_however_stale(centering: str, ragged: bool, n: int) -> None:
    # Everything is scored once; then subsets join in a fixed order, the far ones in turn on opposite sides, with no new
    # score.
    rng = np.random.default_rng(n)
    sizes = rng.integers(1, 9, 24) if ragged else np.full(24, 5)
    z, x, offsets = problem(18, n, 15, sizes)
    for c in range(0, 24, 3):
        x[offsets[c] : offsets[c + 1]] += rng.normal(size=15) * 6.0
    start = start_state(torch.from_numpy(z), centering, 1.0)
    problem_ = Problem(start, torch.from_numpy(x), offsets.tolist(), 1.0)
    lazy, exact = LazyEngine(problem_), StepEngine(problem_)
    lazy.prepare()
    lazy.measure(np.arange(24), np.empty(24))
    widths = []
    for c in range(12):
        for engine in (lazy, exact):
            engine.take(c)
            engine.join(engine.rows(c))
        lazy.prepare()
        lazy.extend_path()
        low, high = (b[12:] for b in lazy.bounds())
        values = exact.score().numpy()[12:]
        assert (low <= values).all()
        assert (values <= high).all()
        widths.append(float((high - low).max()))
    assert np.isfinite(widths).all()


def test_lazy_scores_fewer_candidates() -> None:
    z, x, offsets = problem(7, 2000, 24, np.full(300, 5))
    for mode in ("max", "min"):
        got = ltk.selection.select_subsets(z, x, offsets, m=15, mode=mode, engine="lazy")
        # The first step must score all; later ones a few batches.
        assert got.stats["evaluations"] < 300 + 14 * 150, mode


def test_large_subsets_take_the_torch_path() -> None:
    sizes = [200, 3, 150, 40]
    z, x, offsets = problem(8, 30, 12, sizes)
    want, path = brute_force(z, x, offsets, 3, ("max", None), "joint", 1.0)
    got = ltk.selection.select_subsets(z, x, offsets, m=3)
    assert got.picked.tolist() == want
    np.testing.assert_allclose(got.fdg.numpy(), path, rtol=1e-9)


def test_hand_case() -> None:
    # One feature, originals at -1 and 1 (variance 1). Adding {3}: variance 8/3; {0}: 2/3; {-2}: squares 2 + 4, mean
    # -2/3: 14/9.
    z, x = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.0], [3.0], [-2.0]])
    assert ltk.selection.select_subsets(z, x, [0, 1, 2, 3], m=1).picked.tolist() == [1]
    assert ltk.selection.select_subsets(z, x, [0, 1, 2, 3], m=1, mode="min").picked.tolist() == [0]
    middle = ltk.selection.select_subsets(z, x, [0, 1, 2, 3], m=1, mode="quantile", q=0.5)
    assert middle.picked.tolist() == [2]
    assert float(middle.fdg[0]) == pytest.approx(math.log2(1 + 14 / 9) - 1, abs=1e-14)
    assert middle.indices.tolist() == [2]


@pytest.mark.parametrize("engine", ENGINES)
def test_ties_go_to_the_lowest_index(engine: str) -> None:
    z, x, _ = problem(9, 12, 7, np.full(1, 4))
    pool = np.vstack(
        [x[::-1] * 0.9 + 0.3, x, x[::-1], x, x]
    )  # subsets 1 to 4 hold the same samples, one in another order
    offsets = [0, 4, 8, 12, 16, 20]
    first = ltk.selection.select_subsets(z, pool, offsets, m=1, mode="max", engine=engine)
    second = ltk.selection.select_subsets(z, pool, offsets, m=1, mode="min", engine=engine)
    assert {first.picked.tolist()[0], second.picked.tolist()[0]} == {0, 1}
    q = 1.0 if first.picked.tolist()[0] == 1 else 0.0
    third = ltk.selection.select_subsets(z, pool, offsets, m=1, mode="quantile", q=q, engine=engine)
    assert third.picked.tolist() == [1]


def test_quantile_ends_are_min_and_max() -> None:
    z, x, offsets = problem(10, 20, 10, np.full(30, 4))
    for q, mode in ((0.0, "min"), (1.0, "max")):
        by_q = ltk.selection.select_subsets(z, x, offsets, m=10, mode="quantile", q=q)
        assert by_q.picked.tolist() == ltk.selection.select_subsets(z, x, offsets, m=10, mode=mode).picked.tolist()


def test_target_stops_at_its_tolerance_and_flags_the_unreachable() -> None:
    z, x, offsets = problem(11, 30, 10, np.full(60, 5))
    top = float(ltk.selection.select_subsets(z, x, offsets, m=10).fdg[-1])
    early = ltk.selection.select_subsets(z, x, offsets, m=50, mode="target", target=top / 2, tol=0.02 * abs(top))
    assert early.stats["reached"]
    assert early.stats["stopped_early"]
    assert len(early.picked) == len(early.fdg) < 50
    assert abs(float(early.fdg[-1]) - top / 2) <= 0.02 * abs(top)
    full = ltk.selection.select_subsets(z, x, offsets, m=10, mode="target", target=top / 2)
    assert len(full.picked) == 10
    far = ltk.selection.select_subsets(z, x, offsets, m=3, mode="target", target=1e3)
    assert not far.stats["reached"]
    assert far.stats["error"] < -900
    assert far.picked.tolist() == ltk.selection.select_subsets(z, x, offsets, m=3, mode="max").picked.tolist()


def test_thread_count_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    for sizes in (np.full(100, 6), np.random.default_rng(12).integers(1, 10, 100)):
        z, x, offsets = problem(12, 40, 33, sizes)
        results = []
        try:
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                results.append(ltk.selection.select_subsets(z, x, offsets, m=15, engine="full"))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert other.picked.tolist() == results[0].picked.tolist()
            np.testing.assert_allclose(other.fdg.numpy(), results[0].fdg.numpy(), rtol=1e-12)


def test_repeated_calls_and_input_kinds_agree() -> None:
    z, x, offsets = problem(13, 15, 9, np.full(25, 4))
    first = ltk.selection.select_subsets(z, x, offsets, m=6)
    again = ltk.selection.select_subsets(
        torch.from_numpy(z).T.contiguous().T, torch.from_numpy(x), torch.from_numpy(offsets), m=6
    )
    assert torch.equal(first.picked, again.picked)
    assert torch.equal(first.fdg, again.fdg)
    assert torch.equal(first.indices, again.indices)
    half = ltk.selection.select_subsets(torch.from_numpy(z).half(), torch.from_numpy(x).half(), offsets, m=6)
    want, _ = brute_force(
        z.astype(np.float16).astype(float), x.astype(np.float16).astype(float), offsets, 6, RULES[0], "joint", 1.0
    )
    assert half.picked.tolist() == want


def test_large_offset_costs_no_picks() -> None:
    # 1e5 away from the origin and of unit scale: the state is kept about the originals' mean.
    z, x, offsets = problem(14, 20, 12, np.full(30, 5))
    near = ltk.selection.select_subsets(z, x, offsets, m=10)
    far = ltk.selection.select_subsets(z + 1e5, x + 1e5, offsets, m=10)
    assert near.picked.tolist() == far.picked.tolist()
    np.testing.assert_allclose(near.fdg.numpy(), far.fdg.numpy(), rtol=1e-7)


GOOD = np.random.default_rng(15).normal(size=(6, 3))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"m": 4}, ValueError, "m = 4 subsets are wanted, but the pool has 3"),
        ({"m": 0}, ValueError, "m must be at least 1, got 0"),
        ({"m": 1.5}, TypeError, "m must be an integer, got float"),
        ({"m": 1, "mode": "best"}, ValueError, "unknown mode 'best'; known: max, min, quantile, target"),
        ({"m": 1, "mode": "quantile"}, ValueError, 'mode "quantile" needs q'),
        ({"m": 1, "mode": "quantile", "q": 1.5}, ValueError, r"q must be in \[0, 1\], got 1.5"),
        ({"m": 1, "mode": "quantile", "q": math.nan}, ValueError, "q must be finite, got nan"),
        ({"m": 1, "q": 0.5}, ValueError, "q = 0.5 is for mode \"quantile\", but mode is 'max'"),
        ({"m": 1, "mode": "target"}, ValueError, 'mode "target" needs target'),
        ({"m": 1, "target": 0.5}, ValueError, 'target = 0.5 is for mode "target"'),
        ({"m": 1, "tol": 0.5}, ValueError, 'tol = 0.5 is for mode "target"'),
        ({"m": 1, "mode": "target", "target": 0.1, "tol": -1.0}, ValueError, "tol must not be negative, got -1.0"),
        ({"m": 1, "mode": "target", "target": "x"}, TypeError, "target must be a number, got str"),
        ({"m": 1, "engine": "Z"}, ValueError, "unknown engine 'Z'; known: auto, full"),
        ({"m": 1, "centering": "all"}, ValueError, "unknown centering 'all'"),
        ({"m": 1, "alpha": -1.0}, ValueError, "alpha must be above 0, got -1.0"),
    ],
)
def test_bad_arguments(keywords, error, message) -> None:
    with pytest.raises(error, match=message):
        ltk.selection.select_subsets(GOOD, GOOD, [0, 2, 4, 6], **keywords)


def test_bad_features() -> None:
    nan = GOOD.copy()
    nan[4, 1] = np.nan
    select = ltk.selection.select_subsets
    with pytest.raises(ValueError, match="candidates holds NaN or infinity, first in row 4"):
        select(GOOD, nan, [0, 6], m=1)
    with pytest.raises(ValueError, match="N = 1"):
        select(GOOD[:1], GOOD, [0, 6], m=1)
    with pytest.raises(ValueError, match="candidates is empty"):
        select(GOOD, GOOD[:0], [0], m=1)
    with pytest.raises(ValueError, match="candidates has 2 features per sample, original has 3"):
        select(GOOD, GOOD[:, :2], [0, 6], m=1)
    with pytest.raises(ValueError, match="subset 0 is empty"):
        select(GOOD, GOOD, [0, 0, 6], m=1)


def test_uniform_sets() -> None:
    z, x, offsets = problem(16, 30, 8, np.full(80, 4))
    sets = ltk.selection.uniform_fdg_sets(z, x, offsets, m=12, n_sets=9)
    assert len(sets.selections) == 9
    gaps = np.diff(sets.targets.numpy())
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)
    for mode, end in (("min", 0), ("max", -1)):
        want = ltk.selection.select_subsets(z, x, offsets, m=12, mode=mode)
        assert sets.selections[end].picked.tolist() == want.picked.tolist()
        assert float(sets.fdg[end]) == float(want.fdg[-1])
    assert sets.spacing_error == pytest.approx(float((sets.fdg - sets.targets).abs().max()) / gaps[0])
    assert sets.spacing_error <= 0.05
    assert sets.runs < 9 * 6
    assert (sets.fdg.diff() > 0).all()
    with pytest.raises(ValueError, match="n_sets must be at least 2, got 1"):
        ltk.selection.uniform_fdg_sets(z, x, offsets, m=12, n_sets=1)
