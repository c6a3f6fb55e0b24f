"""Selection by Feature Diversity Gain, log-determinant greedy and k-means on the CPU, against what there is.

    python -m benchmarks.selection --out benchmarks/results/selection-cpu.json

A row's B is the number of subsets (of rows for k-means and items), C the samples per subset (clusters; picks), D the features;
`ms_p50` is the time of one greedy step, of one call elsewhere. `ok` says that the answer agreed with float64 (the same picks, the
same value, or for k-means the objective named in `mode`) before it was timed. `note` says what a row stands for where that is not
plain: a sample of the candidates, or another objective.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ltkernels as ltk

from . import harness

SUBSETS, SIZE = 500, 10


def problem(d: int, n: int, seed: int = 0, subsets: int = SUBSETS) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Features of decaying spectrum, subsets scattered around their own centres."""
    g = torch.Generator().manual_seed(1000 * d + n + seed)
    spectrum = (1.0 + torch.arange(d)) ** -0.5
    centres = torch.randn(subsets, d, generator=g).repeat_interleave(SIZE, 0)
    pool = (centres + 0.5 * torch.randn(subsets * SIZE, d, generator=g)) * spectrum
    return torch.randn(n, d, generator=g) * spectrum, pool, list(range(0, subsets * SIZE + 1, SIZE))


def _covariances(original: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """I + C with each candidate added, (K, d, d) float64: the covariance by a rank update."""
    z, x = original.double(), pool.double().reshape(-1, SIZE, pool.shape[1])
    n = z.shape[0] + SIZE
    total = z.sum(0) + x.sum(1)
    matrix = (z.T @ z + x.mT @ x - total[:, :, None] * total[:, None] / n) / n
    matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return matrix


def naive_cholesky(original: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """log det(I + C) with each candidate added, one d x d factor each, in one batch."""
    return 2.0 * torch.linalg.cholesky(_covariances(original, pool)).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def naive_slogdet(original: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """The same by torch's batched LU, which is what the definition suggests (and is wrong on some CPUs)."""
    return torch.linalg.slogdet(_covariances(original, pool))[1]


def row(
    op: str, backend: str, shape: tuple[int, int, int], mode: str, times: tuple[float, float, float], ok: bool, **more
):
    p50, p20, p80 = times
    return {
        "op": op,
        "backend": backend,
        "dtype": "float32",
        "B": shape[0],
        "C": shape[1],
        "D": shape[2],
        "mode": mode,
        "ms_p50": round(p50, 5),
        "ms_p20": round(p20, 5),
        "ms_p80": round(p80, 5),
        "ideal_gbps": None,
        "pct_of_copy": None,
        "peak_mb": None,
        "ok": bool(ok),
        **more,
    }


def scaled(times: tuple[float, float, float], factor: float) -> tuple[float, float, float]:
    return tuple(t * factor for t in times)


def steps(d: int, n: int, m: int, seconds: float, mode: str = "max") -> list[dict[str, Any]]:
    """A greedy step: ours in m steps with all set-up, divided by m; the naive ones as one step on (a sample of) the pool."""
    inputs = [problem(d, n, seed) for seed in range(3)]
    sample = SUBSETS if d <= 64 else 25
    engines = ["auto", "full", "lazy"] if d > 64 else ["auto"]
    select = functools.partial(ltk.selection.select_subsets, mode=mode, q=0.5 if mode == "quantile" else None)
    calls: dict[str, Callable[[Any], object]] = {
        f"ours:{engine}": lambda p, engine=engine: select(*p, m=m, engine=engine) for engine in engines
    }
    calls["torch batched cholesky"] = lambda p: naive_cholesky(p[0], p[1][: sample * SIZE])
    calls["torch batched slogdet"] = lambda p: naive_slogdet(p[0], p[1][: sample * SIZE])

    original, pool, offsets = inputs[0]
    part = pool[: sample * SIZE]
    exact = naive_cholesky(original, part)
    base = math.log(4.0) * float(ltk.diversity.feature_diversity(original))
    gains = ltk.selection.subset_gains(original, part, offsets[: sample + 1])
    right = bool(torch.allclose((1.0 + gains) * base, exact, rtol=1e-8))
    paths = {engine: select(*inputs[0], m=m, engine=engine) for engine in engines}
    same = all(torch.equal(p.picked, paths[engines[0]].picked) for p in paths.values())
    if sample == SUBSETS and mode == "max":
        same = same and int(paths[engines[0]].picked[0]) == int(exact.argmax())
    ok = dict.fromkeys(calls, right and same)
    ok["torch batched slogdet"] = bool(torch.allclose(naive_slogdet(original, part), exact, rtol=1e-8))
    found = []
    note = None if sample == SUBSETS else f"{sample} of {SUBSETS} candidates, times {SUBSETS // sample}"
    for name, times in harness.interleaved(calls, inputs, seconds, repeats=3).items():
        ours = name.startswith("ours:")
        times = scaled(times, 1.0 / m if ours else SUBSETS / sample)
        more = {"note": f"mean of {m} steps, set-up included"} if ours else {"note": note}
        if ours:
            engine = name.removeprefix("ours:")
            picked = paths[engine].stats["engine"]
            name = f"cpu-{engine}" if engine != "auto" else f"cpu-auto ({picked})"
        found.append(
            row(
                "select step",
                name,
                (SUBSETS, SIZE, d),
                f"{mode}, N={n}",
                times,
                ok[f"ours:{engine}" if ours else name],
                **more,
            )
        )
    return found


def textbook_map(x: np.ndarray, k: int) -> list[int]:
    """Fast greedy MAP as Chen, Zhang & Zhou (2018) state it, algorithm 1, on a dense kernel."""
    kernel = x @ x.T + np.eye(len(x))
    c = np.zeros((k, len(x)))
    d2 = kernel.diagonal().copy()
    picked = [int(d2.argmax())]
    while len(picked) < k:
        j, t = picked[-1], len(picked) - 1
        e = (kernel[j] - c[:t, j] @ c[:t]) / math.sqrt(d2[j])
        c[t] = e
        d2 = d2 - e**2
        d2[j] = -np.inf
        picked.append(int(d2.argmax()))
    return picked


def items(n: int, d: int, k: int, seconds: float) -> list[dict[str, Any]]:
    """k of n single items by greedy log det(I + F_S F_S^T)."""
    inputs = []
    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=(n, d)) / np.sqrt(1.0 + np.arange(d))
        x -= x.mean(0)
        inputs.append(x)
    calls: dict[str, Callable[[Any], Any]] = {
        # alpha / k = 1 gives the kernel I + F F^T that the others take.
        "cpu-representatives": lambda x: ltk.diversity.select_representatives(x, k, alpha=float(k)).indices.tolist(),
        "textbook fast greedy MAP (numpy)": lambda x: textbook_map(x, k),
    }
    notes = {"textbook fast greedy MAP (numpy)": "Chen, Zhang & Zhou 2018, algorithm 1, with its n x n kernel"}
    if importlib.util.find_spec("submodlib"):
        from submodlib import LogDeterminantFunction

        def submodlib(x: np.ndarray) -> list[int]:
            function = LogDeterminantFunction(n=n, mode="dense", lambdaVal=1.0, sijs=x @ x.T)
            found = function.maximize(
                budget=k, optimizer="LazyGreedy", stopIfZeroGain=False, stopIfNegativeGain=False, show_progress=False
            )
            return [int(i) for i, _ in found]

        calls["submodlib LogDeterminant"] = submodlib
        notes["submodlib LogDeterminant"] = "LazyGreedy on a dense kernel"
    if importlib.util.find_spec("apricot"):
        from apricot import FacilityLocationSelection

        calls["apricot FacilityLocation"] = lambda x: (
            FacilityLocationSelection(k, metric="precomputed", optimizer="lazy")
            .fit(x @ x.T - (x @ x.T).min())
            .ranking.tolist()
        )
        notes["apricot FacilityLocation"] = "another objective: apricot has no log-determinant"
    x = inputs[0]

    def value(picked: list[int]) -> float:
        return float(np.linalg.slogdet(np.eye(k) + x[picked] @ x[picked].T)[1])

    best = value(calls["cpu-representatives"](x))
    ok = {name: abs(value(call(x)) - best) <= 1e-6 * best for name, call in calls.items()}
    return [
        row("k of n items", name, (n, k, d), "greedy log det", times, ok[name], note=notes.get(name))
        for name, times in harness.interleaved(calls, inputs, seconds, repeats=3).items()
    ]


def clusters(n: int, k: int, d: int, seconds: float) -> list[dict[str, Any]]:
    """k-means of n rows into k clusters; the objective of each, over that of plain FAISS, is in the row."""
    import faiss
    from sklearn.cluster import KMeans

    inputs = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        centres = torch.randn(k, d, generator=g)[torch.randint(0, k, (n,), generator=g)]
        inputs.append((0.5 * torch.randn(n, d, generator=g) + centres).numpy())

    def plain_faiss(x: np.ndarray) -> float:
        run = faiss.Kmeans(d, k, niter=25, seed=0, min_points_per_centroid=1, max_points_per_centroid=n)
        run.train(x)
        return float(run.index.search(x, 1)[0].sum())

    def sklearn(x: np.ndarray) -> float:
        return float(KMeans(k, init="random", n_init=1, max_iter=25, tol=0.0, random_state=0).fit(x).inertia_)

    calls: dict[str, Callable[[Any], float]] = {
        "cpu-kmeans": lambda x: ltk.selection.kmeans_subsets(x, k).objective,
        "cpu-kmeans balanced": lambda x: ltk.selection.kmeans_subsets(x, k, balanced=True).objective,
        "faiss": plain_faiss,
        "scikit-learn": sklearn,
    }
    if importlib.util.find_spec("k_means_constrained"):
        from k_means_constrained import KMeansConstrained

        def constrained(x: np.ndarray) -> float:
            sizes = {"size_min": n // k, "size_max": -(-n // k)}
            return float(
                KMeansConstrained(k, **sizes, init="random", n_init=1, max_iter=25, random_state=0).fit(x).inertia_
            )

        calls["k-means-constrained"] = constrained
    objective = {name: call(inputs[0]) for name, call in calls.items()}
    sizes = ltk.selection.kmeans_subsets(inputs[0], k, balanced=True).offsets.diff()
    even = int(sizes.max() - sizes.min()) <= 1
    found = []
    for name, times in harness.interleaved(calls, inputs, seconds, repeats=3).items():
        ratio = objective[name] / objective["faiss"]
        good = not name.startswith("cpu-") or (ratio <= 1.05 and (even or name == "cpu-kmeans"))
        what = "equal sizes" if "balanced" in name or "constrained" in name else "any size"
        found.append(row("k-means", name, (n, k, d), what, times, good, objective_over_faiss=round(ratio, 4)))
    return found


# (classes, largest class, imbalance factor): CIFAR-10-LT and CIFAR-100-LT at 10, 50 and 100.
DATASETS = [(10, 5000, 10), (10, 5000, 50), (10, 5000, 100), (100, 500, 10), (100, 500, 50), (100, 500, 100)]
METHODS, SETS = 4, 50


def workload(runs: int) -> dict[str, Any]:
    """The paper's whole selection (every tail class, 4 methods, 50 sets each, d = 64), from a measured sample: per data set, the
    middle tail class in `runs` quantile runs side by side."""
    total, measured, parts, steps_total = 0.0, 0.0, [], 0
    for classes, largest, factor in DATASETS:
        counts = [int(largest * factor ** (-c / (classes - 1))) for c in range(classes)]
        _, tail = ltk.selection.head_tail_split(counts)
        label = tail[len(tail) // 2]
        m = math.ceil((largest - counts[label]) / SIZE)
        # The paper's 500 subsets; the few classes that need more get as many as they need.
        original, pool, offsets = problem(64, counts[label], subsets=max(SUBSETS, m))
        start = time.perf_counter()
        ltk.selection.select_subsets_batched(
            original, pool, offsets, m=m, mode=["quantile"] * runs, q=np.linspace(0, 1, runs).tolist()
        )
        seconds = time.perf_counter() - start
        measured += seconds
        wanted = len(tail) * METHODS * SETS
        total += seconds / runs * wanted
        steps_total += wanted * m
        parts.append({"classes": classes, "imbalance": factor, "tail": len(tail), "N": counts[label], "m": m,
                      "runs": wanted, "ms_per_run": round(1e3 * seconds / runs, 3)})  # fmt: skip
    return {
        "op": "paper workload",
        "runs": sum(p["runs"] for p in parts),
        "steps": steps_total,
        "minutes_extrapolated": round(total / 60, 2),
        "seconds_measured": round(measured, 2),
        "sample": f"{runs} runs of the middle tail class of each data set",
        "parts": parts,
    }


def stream(n: int, d: int) -> dict[str, Any]:
    """V of n x d features in blocks that never sit in memory together, against two passes over the same blocks in float64."""
    block = 20000

    def blocks():
        for seed in range(n // block):
            g = torch.Generator().manual_seed(seed)
            yield torch.randn(block, d, generator=g) * (1.0 + torch.arange(d)) ** -0.5 + 3.0

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, inside = time.perf_counter(), 0.0
    statistics = ltk.diversity.FeatureStatistics(d)
    for part in blocks():
        begin = time.perf_counter()
        statistics.update(part)
        inside += time.perf_counter() - begin
    wall = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    mean = sum(part.double().sum(0) for part in blocks()) / n
    scatter = torch.zeros(d, d, dtype=torch.float64)
    for part in blocks():
        centred = part.double() - mean
        scatter += centred.T @ centred
    matrix = scatter / n
    matrix.diagonal().add_(1.0)
    direct = float(torch.linalg.cholesky(matrix).diagonal().log().sum()) / math.log(2.0)
    error = abs(float(statistics.diversity()) - direct) / direct
    return {
        "op": "streamed V",
        "backend": "cpu-stream",
        "B": n,
        "D": d,
        "seconds": round(inside, 3),
        "seconds_with_making_the_features": round(wall, 3),
        "peak_mb": round(grown, 1),
        "relative_error": error,
        "ok": error <= 1e-6,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ltkernels bench selection", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--quick", action="store_true", help="one cell of each kind, seconds in all")
    parser.add_argument("--seconds", type=float, default=2.0, help="time a cell and implementation")
    options = parser.parse_args(argv)
    quick, seconds = options.quick, 0.1 if options.quick else options.seconds
    streamed = stream(40000 if quick else 1000000, 256)  # first: the peak of memory so far is what it is measured from
    bandwidth = harness.copy_gbps()
    rows: list[dict[str, Any]] = []
    print(f"copy {bandwidth:.1f} GB/s, {torch.get_num_threads()} threads")

    def show(found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        ours = found[0]["ms_p50"]
        for entry in found:
            good = "" if entry["ok"] else "  DIFFERS"
            print(
                f"{entry['op']:13} {entry['mode']:15} B={entry['B']:<5} C={entry['C']:<4} D={entry['D']:<4} "
                f"{entry['backend']:34} {entry['ms_p50']:10.3f} ms {entry['ms_p50'] / ours:8.1f}x{good}",
                flush=True,
            )

    for d, n in [(64, 500)] if quick else [(64, 50), (64, 500), (64, 5000), (512, 50), (512, 500), (512, 5000)]:
        show(steps(d, n, 10 if quick else 45, seconds))
    if not quick:
        show(steps(512, 500, 45, seconds, mode="quantile"))
    show(items(500 if quick else 2000, 64, 20 if quick else 100, seconds))
    show(clusters(1500 if quick else 5000, 150 if quick else 500, 64, seconds))
    others = [workload(2 if quick else 10), streamed]
    for entry in others:
        print({key: value for key, value in entry.items() if key != "parts"}, flush=True)
    if options.out:
        harness.write(options.out, rows + others, bandwidth)
        print(f"wrote {options.out}")
    ours = [entry for entry in rows + others if entry.get("backend", "").startswith("cpu-")]
    return 0 if all(entry["ok"] for entry in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
