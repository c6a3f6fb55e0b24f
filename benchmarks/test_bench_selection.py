"""Selection by Feature Diversity Gain against a batched Cholesky per candidate, and balanced k-means against plain FAISS.

    pytest benchmarks/test_bench_selection.py --benchmark-columns=median,iqr,rounds

Each file of numbers is one run on one machine: compare rows of one run only. Every benchmark checks its answer too.
"""

from __future__ import annotations

import pytest
import torch

import ltkernels as ltk

SUBSETS, SIZE = 500, 10


def problem(d: int, n: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Features of decaying spectrum, subsets scattered around their own centres."""
    g = torch.Generator().manual_seed(d + n)
    spectrum = (1.0 + torch.arange(d)) ** -0.5
    centres = torch.randn(SUBSETS, d, generator=g).repeat_interleave(SIZE, 0)
    pool = (centres + 0.5 * torch.randn(SUBSETS * SIZE, d, generator=g)) * spectrum
    return torch.randn(n, d, generator=g) * spectrum, pool, list(range(0, SUBSETS * SIZE + 1, SIZE))


def naive_step(original: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """log det(I + C) with each candidate added: the covariance by a rank update, then one batched d x d Cholesky."""
    z, x = original.double(), pool.double().reshape(-1, SIZE, pool.shape[1])
    n = z.shape[0] + SIZE
    total = z.sum(0) + x.sum(1)
    matrix = (z.T @ z + x.mT @ x - total[:, :, None] * total[:, None] / n) / n
    matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return 2.0 * torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)


@pytest.mark.parametrize("d", [64, 256])
def test_naive_cholesky_one_step(benchmark, d: int) -> None:
    original, pool, offsets = problem(d, 500)
    # At d = 256 a tenth of the candidates: multiply by ten.
    some = pool if d == 64 else pool[: 50 * SIZE]
    values = benchmark(naive_step, original, some)
    gains = ltk.selection.subset_gains(original, some, offsets[: some.shape[0] // SIZE + 1])
    base = 2.0 * float(ltk.diversity.feature_diversity(original)) * 0.6931471805599453
    torch.testing.assert_close(values / base - 1.0, gains, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("engine", ["full", "lazy"])
@pytest.mark.parametrize(("d", "n"), [(64, 50), (64, 500), (512, 500), (512, 5000)])
def test_select_20_steps(benchmark, d: int, n: int, engine: str, mode: str) -> None:
    """Twenty steps with their setup (packing the pool): divide by 20 for a step."""
    original, pool, offsets = problem(d, n)
    call = ltk.selection.select_subsets
    result = benchmark.pedantic(
        call, (original, pool, offsets), {"m": 20, "mode": mode, "engine": engine}, rounds=3, warmup_rounds=1
    )
    benchmark.extra_info["scored_per_step"] = result.stats["evaluations"] / 20
    first = naive_step(original, pool[: 100 * SIZE]) if d == 64 else None
    if first is not None and int(result.picked[0]) < 100:
        assert int(first.argmax() if mode == "max" else first.argmin()) == int(result.picked[0])


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("data", ["gaussian", "blobs"])
def test_kmeans_5000_rows_500_subsets(benchmark, balanced: bool, data: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 64, generator=g)
    if data == "blobs":
        x = 0.5 * x + torch.randn(500, 64, generator=g)[torch.randint(0, 500, (5000,), generator=g)]
    subsets = benchmark.pedantic(ltk.selection.kmeans_subsets, (x, 500), {"balanced": balanced}, rounds=3)
    benchmark.extra_info["objective"] = subsets.objective
    benchmark.extra_info["sizes"] = [int(subsets.offsets.diff().min()), int(subsets.offsets.diff().max())]
