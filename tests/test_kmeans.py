"""k-means subsets: a partition, deterministic, no empty subset; equal sizes near the objective of plain FAISS."""

from __future__ import annotations

import builtins
import math
import sys

import numpy as np
import pytest
import torch

import ltkernels as ltk

kmeans_subsets = ltk.selection.kmeans_subsets


def check_partition(x: torch.Tensor, k: int, subsets, spherical: bool = False) -> list[int]:
    """The promises that hold for every result; returns the sizes."""
    n = x.shape[0]
    assert sorted(subsets.order.tolist()) == list(range(n))
    assert subsets.offsets.shape == (k + 1,)
    assert int(subsets.offsets[0]) == 0
    assert int(subsets.offsets[-1]) == n
    assert subsets.order.dtype == subsets.offsets.dtype == torch.int64
    assert subsets.centroids.shape == (k, x.shape[1])
    sizes = subsets.offsets.diff().tolist()
    assert min(sizes) >= 1
    rows = torch.nn.functional.normalize(x.double()) if spherical else x.double()
    total = 0.0
    for c, part in enumerate(subsets.order.split(sizes)):
        assert (part.diff() > 0).all()
        mean = rows[part].mean(0)
        if spherical:
            mean = torch.nn.functional.normalize(mean, dim=0)
        torch.testing.assert_close(subsets.centroids[c].double(), mean, rtol=1e-5, atol=1e-5 * float(rows.abs().max()))
        total += float((rows[part] - mean).square().sum())
    assert subsets.objective == pytest.approx(total, rel=1e-5, abs=1e-9)
    return sizes


def blobs(n: int, d: int, centres: int, spread: float, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(centres, generator=g) ** 2 + 0.01
    at = torch.multinomial(weights, n, True, generator=g)
    return torch.randn(centres, d, generator=g)[at] + spread * torch.randn(n, d, generator=g)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(("n", "k"), [(200, 20), (203, 20), (19, 19), (50, 1), (30, 29)])
def test_partition(balanced: bool, spherical: bool, n: int, k: int) -> None:
    x = blobs(n, 6, 9, 0.4) + 2.0
    sizes = check_partition(x, k, kmeans_subsets(x, k, balanced=balanced, spherical=spherical), spherical)
    if balanced:
        assert sorted(sizes) == [n // k] * (k - n % k) + [n // k + 1] * (n % k)


def test_hand_case() -> None:
    # Pairs far apart: {0, 2}, {1, 3}; each pair's squared distances to its middle are 2 * 0.25.
    x = torch.tensor([[0.0], [100.0], [1.0], [101.0]])
    for balanced in (False, True):
        subsets = kmeans_subsets(x, 2, balanced=balanced)
        assert sorted(p.tolist() for p in subsets.order.split(2)) == [[0, 2], [1, 3]]
        assert subsets.objective == pytest.approx(1.0)
    # Three on the left, one on the right: equal sizes must move the nearest of the three.
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    subsets = kmeans_subsets(x, 2, balanced=True)
    assert sorted(p.tolist() for p in subsets.order.split(2)) == [[0, 1], [2, 3]]
    assert subsets.objective == pytest.approx(0.5 + 32.0)


@pytest.mark.parametrize("balanced", [False, True])
def test_deterministic_by_seed(balanced: bool) -> None:
    x = blobs(400, 8, 12, 0.5)
    first, again = (kmeans_subsets(x, 40, balanced=balanced, seed=3) for _ in range(2))
    assert torch.equal(first.order, again.order)
    assert torch.equal(first.offsets, again.offsets)
    assert torch.equal(first.centroids, again.centroids)
    other = kmeans_subsets(x, 40, balanced=balanced, seed=4)
    assert not torch.equal(first.order, other.order)


@pytest.mark.parametrize("balanced", [False, True])
def test_duplicates_leave_no_subset_empty(balanced: bool) -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).repeat(20, 1)
    sizes = check_partition(x, 12, kmeans_subsets(x, 12, balanced=balanced))
    if balanced:
        assert sizes == [5] * 12
    check_partition(torch.ones(30, 4), 7, kmeans_subsets(torch.ones(30, 4), 7, balanced=balanced))


def test_balanced_objective_is_near_plain_faiss() -> None:
    for x in (torch.randn(1500, 16, generator=torch.Generator().manual_seed(2)), blobs(1500, 16, 60, 0.6, 3)):
        plain, equal = kmeans_subsets(x, 150), kmeans_subsets(x, 150, balanced=True)
        assert set(equal.offsets.diff().tolist()) == {10}
        assert equal.objective <= 1.05 * plain.objective
        # A random equal-size partition is far worse: the bound above is not idle.
        rows = x[torch.randperm(1500, generator=torch.Generator().manual_seed(4))].reshape(150, 10, 16)
        assert float((rows - rows.mean(1, keepdim=True)).square().sum()) > 1.5 * plain.objective


def test_far_rows_do_not_stall_the_auction() -> None:
    # Without scaling of epsilon this price war took minutes.
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(5))
    x[:7] *= 1e4
    assert set(kmeans_subsets(x, 100, balanced=True).offsets.diff().tolist()) == {10}


def test_silent_on_small_clusters(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    kmeans_subsets(torch.randn(60, 4, generator=torch.Generator().manual_seed(6)), 20, balanced=True)
    out, err = capfd.readouterr()
    assert out == err == ""
    assert len(recwarn) == 0


def test_float64_numpy_and_half_are_accepted() -> None:
    x = np.random.default_rng(7).normal(size=(40, 3))
    assert torch.equal(kmeans_subsets(x, 4).order, kmeans_subsets(torch.from_numpy(x), 4).order)
    assert kmeans_subsets(torch.from_numpy(x).half(), 4).order.shape == (40,)


@pytest.mark.parametrize(
    ("x", "k", "keywords", "error", "message"),
    [
        (torch.zeros(5, 2), 6, {}, ValueError, "k = 6 subsets of 5 rows"),
        (torch.zeros(5, 2), 0, {}, ValueError, "k must be at least 1, got 0"),
        (torch.zeros(5, 2), 2.0, {}, TypeError, "k must be an integer, got float"),
        (torch.zeros(5, 2), 2, {"niter": 0}, ValueError, "niter must be at least 1, got 0"),
        (torch.zeros(5, 2), 2, {"device": "tpu"}, ValueError, 'device must be "cpu" or "cuda", got'),
        (torch.zeros(5, 2), 2, {"float16": True}, ValueError, 'float16 is for device="cuda"'),
        (torch.zeros(5, 2), 2, {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        (torch.tensor([[0.0], [math.nan]]), 1, {}, ValueError, "features holds NaN or infinity, first in row 1"),
        (torch.zeros(5), 2, {}, ValueError, r"features must have shape \(samples, features\), got \(5,\)"),
        (torch.zeros(5, 2, dtype=torch.int32), 2, {}, TypeError, "got torch.int32"),
        (torch.full((5, 2), 1e19), 2, {}, ValueError, "features overflow float32: squared distances"),
        (torch.full((5, 2), 1e300, dtype=torch.float64), 2, {}, ValueError, "features overflow float32"),
    ],
)
def test_bad_input(x, k, keywords, error, message) -> None:
    with pytest.raises(error, match=message):
        kmeans_subsets(x, k, **keywords)


def test_missing_faiss_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_faiss(name, *args, **keywords):
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real(name, *args, **keywords)

    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(ImportError, match=r'pip install "ltkernels\[select\]"'):
        kmeans_subsets(torch.zeros(5, 2), 2)


def test_cuda_says_what_is_missing() -> None:
    import faiss

    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        plain = kmeans_subsets(blobs(300, 8, 9, 0.4), 30, device="cuda", balanced=True)
        assert set(plain.offsets.diff().tolist()) == {10}
        return
    with pytest.raises((ImportError, RuntimeError), match="GPU"):
        kmeans_subsets(torch.zeros(5, 2), 2, device="cuda")


def test_more_restarts_are_no_worse() -> None:
    x = blobs(400, 8, 30, 0.5)
    once, more = kmeans_subsets(x, 30, niter=5), kmeans_subsets(x, 30, niter=5, nredo=5)
    assert more.objective <= once.objective * (1 + 1e-6)
