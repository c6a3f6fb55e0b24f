"""What the engines promise beyond their picks (test_selection.py): certified float32 scores, batches equal to single runs,
no host synchronisation, budgets, resuming."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import ltkernels as ltk
from ltkernels.selection import _driver
from ltkernels.selection._driver import step_by_step
from ltkernels.selection._engines import loop
from ltkernels.selection._engines.batched import BatchedEngine
from ltkernels.selection._engines.steps import StepEngine
from ltkernels.selection._rules import Rule
from ltkernels.selection._subsets import Problem, mixed_columns, mixed_products, start_state

select = ltk.selection.select_subsets
CENTERINGS = ("joint", "separate", "none")


def features(seed: int, n: int, d: int, sizes, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    rng = np.random.default_rng(seed)
    spectrum = scale / np.sqrt(1.0 + np.arange(d))
    offsets = [0, *np.cumsum(sizes).tolist()]
    centres = np.repeat(rng.normal(size=(len(sizes), d)), sizes, axis=0)
    z = rng.normal(size=(n, d)) * spectrum
    x = (centres * 0.8 + rng.normal(size=(offsets[-1], d)) * 0.5) * spectrum
    return torch.from_numpy(z), torch.from_numpy(x), offsets


def problem_of(z, x, offsets, centering: str = "joint", alpha: float = 1.0) -> Problem:
    return Problem(start_state(z, centering, alpha), x, list(offsets), alpha)


def reference(problem: Problem, rule: Rule, steps: int) -> tuple[list[int], list[float]]:
    return step_by_step(StepEngine(problem), rule, steps)


RULES = [Rule("max"), Rule("min"), Rule("quantile", 0.37), Rule("target", 0.0, 3.0, 3.5)]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.mode)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("ragged", [False, True])
def test_float32_scores_never_decide(rule: Rule, scale: float, ragged: bool) -> None:
    # Near-ties that float32 cannot tell apart: every other subset repeats its neighbour but for 1e-9 of a feature.
    sizes = [3, 5, 3, 5] * 10 if ragged else [4] * 40
    z, x, offsets = features(1, 12, 20, sizes, scale)
    for a, b in itertools.pairwise(range(0, len(sizes), 2 if not ragged else 4)):
        rows = offsets[a + 1] - offsets[a]
        x[offsets[b] : offsets[b] + rows] = x[offsets[a] : offsets[a] + rows] * (1.0 + 1e-9 * (b % 3 - 1))
    problem = problem_of(z, x, offsets)
    want, values = reference(problem, rule, 15)
    for single in (True, False):
        run = loop.Run(problem, rule, 15, single=single)
        loop.run_all([run])
        assert run.picked == want
        np.testing.assert_allclose(run.values, values, rtol=1e-10, atol=1e-12)


def test_float32_settles_most_scores_and_gives_up_where_it_cannot() -> None:
    z, x, offsets = features(2, 60, 32, [6] * 120)
    picked = select(z, x, offsets, m=40)
    assert picked.stats["scores"] == "float32, decided in float64"
    assert picked.stats["evaluations"] < 1.1 * sum(range(81, 121))
    raw = select(z * 255.0, x * 255.0, offsets, m=5)
    assert raw.stats["scores"].startswith("float64 (condition number")
    assert raw.picked.tolist() == reference(problem_of(z * 255.0, x * 255.0, offsets), Rule("max"), 5)[0]


def test_overflowing_features_are_refused_in_words() -> None:
    z, x, offsets = features(3, 10, 4, [2] * 6)
    with pytest.raises(ValueError, match="original overflows float64"):
        select(z * 1e200, x * 1e200, offsets, m=2)
    for engine in ("full", "lazy"):
        with pytest.raises(ValueError, match="not finite; scale the features"):
            select(z, x * 1e200, offsets, m=2, engine=engine)


def batch_of_runs(ragged: bool) -> tuple[list[Problem], list[Rule], list[int]]:
    problems, rules, steps = [], [], []
    for i, rule in enumerate(RULES * 2):
        sizes = [3, 1, 4, 4] * 5 if ragged else [4] * (20 if i % 2 else 16)
        z, x, offsets = features(i if not ragged else 7, 9 + 3 * i, 24, sizes)
        problems.append(problem_of(z, x, offsets))
        rules.append(rule)
        steps.append(8 + i % 3)
    return problems, rules, steps


@pytest.mark.parametrize("ragged", [False, True])
def test_batches_equal_single_runs(ragged: bool) -> None:
    problems, rules, steps = batch_of_runs(ragged)
    batch = BatchedEngine(problems, rules, steps)
    for problem, rule, wanted, (picks, values) in zip(problems, rules, steps, batch.run()):
        want, path = reference(problem, rule, wanted)
        assert picks == want
        np.testing.assert_allclose(values, path, rtol=1e-9, atol=1e-10)


def test_runs_of_a_batch_end_when_they_have_no_subsets_left() -> None:
    problems = [problem_of(*features(i, 20, 24, [4] * subsets)) for i, subsets in enumerate((3, 12))]
    rules, steps = [Rule("quantile", 0.3), Rule("quantile", 0.9)], [3, 12]
    for problem, rule, wanted, (picks, _) in zip(problems, rules, steps, BatchedEngine(problems, rules, steps).run()):
        assert picks == reference(problem, rule, wanted)[0]


@pytest.mark.parametrize("anchor", [0.0, 3.0, 500.0, math.inf])
def test_products_of_mixed_columns(anchor: float) -> None:
    rng = torch.Generator().manual_seed(0)
    columns, mean = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((3, 7, 5, 9), (3, 9)))
    for at in (anchor, torch.tensor([anchor, anchor + 1.0, anchor + 2.0], dtype=torch.float64)):
        y = mixed_columns(columns, mean, at)
        found = mixed_products(columns, (columns @ mean[:, None, :, None]).squeeze(-1), mean, at)
        torch.testing.assert_close(found, y @ y.mT, rtol=1e-12, atol=1e-13)


def test_the_loop_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    problems, rules, steps = batch_of_runs(False)
    batch = BatchedEngine(problems, rules, steps)

    def refuse(self, *_, **__):
        raise AssertionError("the host waits for the device here")

    reads = ("item", "tolist", "__bool__", "__int__", "__float__", "numpy", "nonzero", "__index__")
    with monkeypatch.context() as patch:
        for name in reads:
            patch.setattr(torch.Tensor, name, refuse)
        for _ in range(max(steps)):
            picked = batch.choose(batch.score())
            batch.commit(picked)


def test_dispatcher_gives_its_reasons() -> None:
    def plan(n, d, sizes, mode="max", engine="auto", budget=1 << 40):
        z, x, offsets = features(5, n, d, sizes)
        return _driver.plan(problem_of(z, x, offsets), mode, engine, budget)

    assert plan(10, 16, [4] * 10)[:2] == ("full", "loop")
    assert plan(300, 300, [4] * 10)[:2] == ("lazy", "steps")
    assert plan(300, 300, [4] * 10, mode="quantile")[:2] == ("full", "steps")  # it needs every score
    assert plan(8, 300, [4] * 40)[:2] == ("lazy", "steps")
    assert plan(10, 16, [200] * 2)[:2] == ("full", "batched")
    assert plan(10, 16, [4] * 10, engine="lazy").reason == "asked for"
    with pytest.raises(ValueError, match="memory_budget = 1000 bytes .* is too small: engine full"):
        plan(10, 16, [4] * 10, budget=1000)


def test_an_engine_that_cannot_serve_is_refused_by_name() -> None:
    z, x, offsets = features(5, 10, 16, [129, 4])
    with pytest.raises(ValueError, match='engine "lazy" works for subsets of at most 128 rows, got cpu and 129 rows'):
        select(z, x, offsets, m=1, engine="lazy")
    with pytest.raises(ValueError, match="unknown engine 'B'; known: auto, full, lazy"):
        select(z, x, offsets, m=1, engine="B")


def test_batched_call_equals_single_calls() -> None:
    z, x, offsets = features(6, 15, 12, [3] * 30)
    z2, x2, offsets2 = features(7, 9, 12, [3] * 25)
    runs = ltk.selection.select_subsets_batched(
        [z, z, z2, z],
        [x, x, x2, x],
        [offsets, offsets, offsets2, offsets],
        m=[10, 5, 7, 30],
        mode=["max", "quantile", "min", "target"],
        q=[None, 0.5, None, None],
        target=[None, None, None, (0.1, 0.12)],
        tol=[None, None, None, 0.0],
    )
    assert runs[0].picked.tolist() == select(z, x, offsets, m=10).picked.tolist()
    assert runs[1].picked.tolist() == select(z, x, offsets, m=5, mode="quantile", q=0.5).picked.tolist()
    assert runs[2].picked.tolist() == select(z2, x2, offsets2, m=7, mode="min").picked.tolist()
    alone = select(z, x, offsets, m=30, mode="target", target=(0.1, 0.12), tol=0.0)
    assert runs[3].picked.tolist() == alone.picked.tolist()
    shared = ltk.selection.select_subsets_batched(z, x, offsets, m=4, mode=["max", "min"])
    assert [s.picked.tolist() for s in shared] == [
        select(z, x, offsets, m=4, mode=mode).picked.tolist() for mode in ("max", "min")
    ]
    with pytest.raises(ValueError, match="run 1: m = 31 subsets are wanted, but the pool has 30"):
        ltk.selection.select_subsets_batched(z, x, offsets, m=[1, 31])
    with pytest.raises(ValueError, match="lists of different lengths: m 2, mode 3"):
        ltk.selection.select_subsets_batched(z, x, offsets, m=[1, 2], mode=["max"] * 3)


def test_target_range() -> None:
    z, x, offsets = features(8, 20, 10, [4] * 60)
    top = float(select(z, x, offsets, m=12).fdg[-1])
    low, high = 0.4 * top, 0.5 * top
    got = select(z, x, offsets, m=40, mode="target", target=(low, high), tol=0.0)
    assert low <= float(got.fdg[-1]) <= high
    assert got.stats["reached"]
    assert got.stats["error"] == 0.0
    for bad, error in (((0.2, 0.1), ValueError), ((0.1,), ValueError), (("a", 1), TypeError)):
        with pytest.raises(error, match="target must be"):
            select(z, x, offsets, m=2, mode="target", target=bad)


@pytest.mark.parametrize("engine", ["full", "lazy"])
def test_an_interrupted_run_goes_on(engine: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltkernels.selection._driver.EVERY", 5)
    z, x, offsets = features(9, 10, 14, [3, 2] * 15)
    want = select(z, x, offsets, m=22, engine=engine)
    path = tmp_path / "run.npz"

    def stop(done: int, _: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select(z, x, offsets, m=22, engine=engine, checkpoint=path, progress=stop)
    with np.load(path) as saved:
        assert saved["picked"].tolist() == want.picked[:10].tolist()
    seen = []
    got = select(z, x, offsets, m=22, engine=engine, checkpoint=path, progress=lambda done, _: seen.append(done))
    assert seen[0] > 10
    assert got.picked.tolist() == want.picked.tolist()
    np.testing.assert_allclose(got.fdg.numpy(), want.fdg.numpy(), rtol=1e-9)
    # Everything is there: nothing is computed again.
    assert select(z, x, offsets, m=22, engine=engine, checkpoint=path).stats["evaluations"] == 0
    with pytest.raises(ValueError, match="belongs to another selection"):
        select(z, x, offsets, m=22, mode="min", checkpoint=path)
    path.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"checkpoint .*run\.npz"):
        select(z, x, offsets, m=22, checkpoint=path)


def test_progress_counts_to_the_end() -> None:
    z, x, offsets = features(10, 300, 300, [2] * 20)
    for keywords in ({}, {"engine": "full"}):
        seen: list[tuple[int, int]] = []
        select(z, x, offsets, m=6, progress=lambda *now, seen=seen: seen.append(now), **keywords)
        assert seen[-1] == (6, 6)
        assert seen == sorted(seen)


def brute_force_step(z, x, offsets, left, added, rule, centering, alpha) -> tuple[int, float]:
    """The pick of one step by n x n or d x d determinants in float64, one candidate at a time."""

    def log_det(rows: np.ndarray, centred: bool) -> float:
        rows = rows - rows.mean(0) if centred else rows
        small = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        return float(np.linalg.slogdet(np.eye(len(small)) + alpha / len(rows) * small)[1])

    values = []
    for c in left:
        new = np.vstack([added, x[offsets[c] : offsets[c + 1]]])
        if centering == "separate":
            values.append(log_det(np.vstack([z - z.mean(0), new - new.mean(0)]), False))
        else:
            values.append(log_det(np.vstack([z, new]), centering == "joint"))
    values = np.array(values)
    if rule.mode == "quantile":
        at = int(np.argsort(values, kind="stable")[math.floor(rule.q * (len(left) - 1) + 0.5)])
    else:
        loss = {
            "max": -values,
            "min": values,
            "target": np.maximum(0, np.maximum(values - rule.high, rule.low - values)),
        }
        at = int(loss[rule.mode].argmin())
    return left[at], values[at]


@pytest.mark.parametrize("case", range(60))
def test_random_cases_equal_brute_force(case: int) -> None:
    # N from 5 to 5000, d up to 512, any engine, mode, centring, alpha and sizes; three steps of each.
    rng = np.random.default_rng(1000 + case)
    d = int(rng.choice([1, 2, 7, 16, 33, 64, 100, 130, 260, 512]))
    n = int(rng.choice([5, 6, 20, 50, 200, 700, 5000] if d < 100 else [5, 12, 40, 60]))
    count = int(rng.integers(4, 14))
    sizes = rng.integers(1, 13, count) if case % 2 else np.full(count, int(rng.integers(1, 11)))
    z, x, offsets = features(case, n, d, sizes, float(rng.choice([0.1, 1.0, 5.0])))
    z, x = z + 2.0, x + 2.0
    centering, engine = CENTERINGS[case % 3], ("full", "lazy", "auto")[case // 12 % 3]
    alpha = float(rng.choice([1.0, 0.3, 4.0]))
    mode = ("max", "min", "quantile", "target")[case // 3 % 4]
    keywords = {"quantile": {"q": 0.4}, "target": {"target": 0.1}}.get(mode, {})
    got = select(z, x, offsets, m=3, mode=mode, centering=centering, alpha=alpha, engine=engine, **keywords)
    base = got.stats["diversity"]
    rule = Rule(mode, 0.4, 1.1 * base, 1.1 * base)
    z, x = z.numpy(), x.numpy()
    left, added = list(range(count)), np.zeros((0, d))
    for pick, fdg in zip(got.picked.tolist(), got.fdg.tolist()):
        want, value = brute_force_step(z, x, offsets, left, added, rule, centering, alpha)
        assert pick == want
        assert fdg == pytest.approx(value / base - 1.0, rel=1e-8, abs=1e-9)
        left.remove(want)
        added = np.vstack([added, x[offsets[want] : offsets[want + 1]]])


def test_sets_that_no_budget_holds_are_refused_before_they_are_begun() -> None:
    x, offsets = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), range(0, 41, 4)
    for n_sets, budget in ((2**31, None), (2**63 - 1, None), (10**6, 2**20)):
        with pytest.raises(
            ValueError, match=f"n_sets = {n_sets} of 2 subsets take .* MiB, memory_budget is .*: ask for fewer"
        ):
            ltk.selection.uniform_fdg_sets(x[:9], x, list(offsets), m=2, n_sets=n_sets, memory_budget=budget)
