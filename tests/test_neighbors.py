"""Promise: nearest neighbours are exact with ties to the smaller index, votes and KNN-Shapley values are what enumeration says, and no
matrix of all queries by all references is formed."""

from __future__ import annotations

import itertools
import math
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import ltkernels as ltk
from ltkernels.diversity import ClassStatistics
from ltkernels.neighbors import KNeighborsClassifier, NearestClassMean, _search, knn_shapley, nearest_neighbors

METRICS = ("cosine", "euclidean")
LINE = [[0.0], [1.0], [2.0], [10.0]]


def similarities(q: Tensor, r: Tensor, metric: str) -> Tensor:
    q, r = q.double(), r.double()
    if metric == "cosine":
        return torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(r, dim=1).T
    return -((q[:, None] - r[None]) ** 2).sum(dim=2)


def ordered(s: Tensor, k: int) -> Tensor:
    return torch.sort(s, dim=1, descending=True, stable=True).indices[:, :k]


# ---- the search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("queries", "references", "width", "k"), [(7, 50, 3, 5), (600, 3000, 20, 17), (3, 9, 4, 9), (2, 1, 1, 1)]
)
def test_neighbors_are_those_of_the_whole_matrix(queries, references, width, k, dtype, metric) -> None:
    torch.manual_seed(0)
    q, r = torch.randn(queries, width).to(dtype) + 1, torch.randn(references, width).to(dtype) + 1
    found = nearest_neighbors(q, r, k, metric=metric)
    s = similarities(q, r, metric)
    assert found.similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert torch.allclose(found.similarity.double(), s.gather(1, ordered(s, k)), rtol=tolerance, atol=tolerance)
    assert torch.allclose(s.gather(1, found.indices), found.similarity.double(), rtol=tolerance, atol=tolerance)
    assert all(len(set(row)) == k for row in found.indices.tolist())
    if dtype == torch.float64 and metric == "euclidean":
        assert torch.equal(found.indices, ordered(s, k))


@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_smaller_index(metric) -> None:
    """Integer coordinates, whose products are exact: all that decides is the rule. Duplicates lie on both sides of a chunk's border."""
    torch.manual_seed(1)
    r = torch.randint(-1, 2, (5000, 2)).double() * 4
    r[r.abs().sum(1) == 0] = 4.0
    q = torch.tensor([[4.0, 0.0], [0.0, -4.0], [4.0, 4.0]], dtype=torch.float64)
    r, shift = (r, 0.0) if metric == "cosine" else (torch.cat([r, -r]), 0.0)  # the mean is 0: centring is exact
    found = nearest_neighbors(q, r, 300, metric=metric).indices
    s = similarities(q, r, metric).mul(1e6).round()
    assert torch.equal(found, ordered(s, 300)), shift


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_rows_come_by_index(dtype, metric) -> None:
    """Whatever the products round them to: at the edges of their blocks equal rows get other last digits."""
    torch.manual_seed(13)
    distinct = torch.randn(30, 7, dtype=dtype) + 1
    which = torch.randint(0, 30, (171,))
    which[:5] = 3
    r, q = distinct[which], torch.randn(40, 7, dtype=dtype)
    s = similarities(q, distinct, metric)[:, which]
    order = ordered(s, 171)
    for k in (1, 2, 30, 100, 171):
        assert torch.equal(nearest_neighbors(q, r, k, metric=metric).indices, order[:, :k])
    own = torch.randint(-1, 171, (40,))
    rows = torch.arange(40)[own >= 0]
    s[rows, own[own >= 0]] = -math.inf
    for k in (1, 50, 170):
        assert torch.equal(nearest_neighbors(q, r, k, metric=metric, own=own).indices, ordered(s, k))
    y = torch.randint(0, 2, (171,))
    exact = knn_shapley(r, y, q, y[:40], 5, metric=metric)
    assert (knn_shapley(r, y, q, y[:40], 5, metric=metric, tolerance=0.01) - exact).abs().max() <= 0.01
    zeros = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, 1.0]], dtype=dtype)
    assert nearest_neighbors(zeros, zeros, 3, metric=metric).indices.tolist() == [[0, 1, 2]] * 3


def test_the_kernel_keeps_what_a_sort_keeps() -> None:
    """Scores in rising, falling, equal and random order, chunks of any width."""
    torch.manual_seed(2)
    n = 900
    rows = [torch.arange(n), torch.arange(n).flip(0), torch.zeros(n), torch.randint(0, 5, (n,)), torch.randn(n)]
    for dtype in (torch.float32, torch.float64):
        scores = torch.stack([row.to(dtype) for row in rows])
        for k in (1, 7, 64, 200, 899):
            for width in (1, 33, 900):
                one, two = _search._Kernel(5, k, scores), _search._Sorted(5, k, scores)
                for begin in range(0, n, width if k < 64 else max(width, 33)):
                    part = scores[:, begin : begin + max(width, 33 if k >= 64 else 1)].contiguous()
                    one.add(part, begin)
                    two.add(part, begin)
                for a, b in zip(one.found(), two.found()):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("metric", METRICS)
def test_own_rows_stay_out(metric) -> None:
    torch.manual_seed(3)
    r = torch.randn(40, 6, dtype=torch.float64)
    found = nearest_neighbors(r, r, 39, metric=metric, own=torch.arange(40))
    s = similarities(r, r, metric).fill_diagonal_(-math.inf)
    assert torch.equal(found.indices, ordered(s, 39))
    some = torch.where(torch.arange(40) % 2 == 0, torch.arange(40), -1)
    indices = nearest_neighbors(r, r, 1, metric=metric, own=some).indices[:, 0]
    assert torch.equal(indices[1::2], torch.arange(1, 40, 2)), "a query without an own row finds itself"
    assert (indices[::2] != torch.arange(0, 40, 2)).all()


def test_threads_and_layouts_change_nothing() -> None:
    torch.manual_seed(4)
    q, r = torch.randn(100, 16), torch.randn(2000, 16)
    expected = nearest_neighbors(q, r, 10)
    for given in (r.T.contiguous().T, torch.cat([r, r], 1)[:, :16], r.numpy(), r.clone().requires_grad_()):
        found = nearest_neighbors(q, given, 10)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.similarity, expected.similarity)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found = nearest_neighbors(q, r, 10)
        assert torch.equal(found.indices, expected.indices)
    torch.set_num_threads(before)


def test_no_queries() -> None:
    found = nearest_neighbors(torch.empty(0, 3), torch.ones(4, 3), 2)
    assert found.similarity.shape == found.indices.shape == (0, 2)
    assert KNeighborsClassifier(torch.ones(4, 3), [0, 1, 1, 0], 2).scores(torch.empty(0, 3)).shape == (0, 2)


def test_far_from_the_origin() -> None:
    """Float32 features whose differences are a millionth of their size."""
    torch.manual_seed(5)
    r = (torch.randn(300, 5, dtype=torch.float64) + 1e4).float()
    s = similarities(r, r, "euclidean").fill_diagonal_(-math.inf)
    found = nearest_neighbors(r, r, 3, metric="euclidean", own=torch.arange(300))
    assert torch.allclose(found.similarity.double(), s.gather(1, ordered(s, 3)), rtol=1e-4)


def test_memory_is_that_of_a_chunk(tmp_path) -> None:
    """30 000 x 30 000 float32 scores would be 3.4 GiB."""
    program = """
import resource, torch
from ltkernels.neighbors import KNeighborsClassifier, knn_shapley
torch.manual_seed(0)
x, y = torch.randn(30_000, 8), torch.randint(0, 10, (30_000,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
KNeighborsClassifier(x, y, 20, num_classes=10).leave_one_out()
knn_shapley(x, y, x[:300], y[:300], 5)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=tmp_path)
    assert int(run.stdout) < 400, run.stdout
    assert resource.RUSAGE_SELF == 0


# ---- votes ---------------------------------------------------------------------------------------------------------------


def test_votes_of_the_line() -> None:
    """Votes 2 : 1; 1/3 : 1 where the training set has 6 and 1 samples."""
    plain = KNeighborsClassifier(LINE, [0, 0, 1, 1], 3, metric="euclidean")
    assert plain.scores([[1.2]]).tolist() == [[2.0, 1.0]]
    assert plain.predict([[1.2]]).tolist() == [0]
    balanced = KNeighborsClassifier(LINE, [0, 0, 1, 1], 3, metric="euclidean", balance=1.0)
    assert balanced.scores([[1.2]]).tolist() == [[1.0, 0.5]]
    assert balanced.predict([[1.2]]).tolist() == [0]
    given = KNeighborsClassifier(LINE, [0, 0, 1, 1], 3, metric="euclidean", balance=1.0, class_counts=[6, 1])
    assert given.scores([[1.2]])[0].tolist() == pytest.approx([1 / 3, 1.0], abs=1e-12)
    assert given.predict([[1.2]]).tolist() == [1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [None, 0.07, 5.0])
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_votes(balance, temperature, metric) -> None:
    torch.manual_seed(6)
    x, y = torch.randn(80, 5, dtype=torch.float64), torch.randint(0, 4, (80,)) ** 2  # classes 0, 1, 4, 9: others absent
    q = torch.randn(11, 5, dtype=torch.float64)
    knn = KNeighborsClassifier(x, y, 12, metric=metric, temperature=temperature, balance=balance, num_classes=12)
    s, counts = similarities(q, x, metric), torch.bincount(y, minlength=12).double()
    expected = torch.zeros(11, 12, dtype=torch.float64)
    for i, order in enumerate(ordered(s, 12)):
        for at in order:
            vote = 1.0 if temperature is None else math.exp((s[i, at] - s[i, order[0]]) / temperature)
            expected[i, y[at]] += vote / counts[y[at]] ** balance
    assert torch.allclose(knn.scores(q), expected, rtol=1e-9)
    assert torch.equal(knn.predict(q), expected.argmax(1))


def test_leave_one_out_and_ties() -> None:
    knn = KNeighborsClassifier(LINE, [1, 1, 0, 0], 2, metric="euclidean")
    assert knn.leave_one_out().tolist() == [[1.0, 1.0], [1.0, 1.0], [0.0, 2.0], [1.0, 1.0]]
    assert knn.predict([[0.9]]).tolist() == [1]
    assert knn.predict([[1.4]], own=[1]).tolist() == [0], "one vote each: the smaller class"
    assert knn.predict([[1.4]], own=[-1]).tolist() == [0]


@pytest.mark.parametrize("k", [1, 5, 20])
def test_scikit_learn_agrees(k) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    torch.manual_seed(7)
    x, y, q = torch.randn(500, 6).double(), torch.randint(0, 5, (500,)), torch.randn(200, 6).double()
    theirs = neighbors.KNeighborsClassifier(k, algorithm="brute").fit(x.numpy(), y.numpy())
    ours = KNeighborsClassifier(x, y, k, metric="euclidean")
    assert np.allclose(ours.scores(q).numpy() / k, theirs.predict_proba(q.numpy()))
    assert np.array_equal(ours.predict(q).numpy(), theirs.predict(q.numpy()))


# ---- class means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_nearest_class_mean(metric) -> None:
    torch.manual_seed(8)
    x, y, q = torch.randn(90, 4) + 5, torch.randint(0, 3, (90,)), torch.randn(20, 4) + 5
    y[y == 1] = 4  # classes 1 and 3 have no samples
    y[y == 0] = 2
    ncm = NearestClassMean(4, 5, metric=metric)
    for part in (slice(0, 31), slice(31, 31), slice(31, 90)):
        ncm.update(x[part], y[part])
    present = [2, 4]
    means = torch.stack([x[y == c].double().mean(0) for c in present])
    assert torch.allclose(ncm.means[present], means, rtol=1e-12)
    assert ncm.counts.tolist() == torch.bincount(y, minlength=5).tolist()
    distance = (-similarities(q, means, metric)) if metric == "cosine" else torch.cdist(q.double(), means)
    assert torch.equal(ncm.predict(q), torch.tensor(present)[distance.argmin(1)])
    logits = ncm.logits(q)
    assert (logits[:, [0, 1, 3]] == -math.inf).all()
    weight, bias = ncm.linear()
    given = torch.nn.functional.normalize(q.double()) if metric == "cosine" else q.double()
    assert torch.allclose(torch.nn.functional.linear(given, weight, bias)[:, present], logits[:, present], rtol=1e-12)
    statistics = ClassStatistics(4, 5).update(x, y)
    other = NearestClassMean.from_statistics(statistics, metric=metric)
    assert torch.allclose(other.logits(q)[:, present], logits[:, present], rtol=1e-12)
    if metric == "euclidean":
        s = (q.double() ** 2).sum(1, keepdim=True) - logits[:, present]
        assert torch.allclose(s, torch.cdist(q.double(), means) ** 2, rtol=1e-9)


# ---- Shapley values ------------------------------------------------------------------------------------------------------


def by_enumeration(match: list[float], k: int) -> list[float]:
    """Shapley values of the utility "share of k among the nearest k of a coalition that match"."""
    n = len(match)

    def utility(coalition: tuple[int, ...]) -> float:
        return sum(match[i] for i in sorted(coalition)[:k]) / k

    values = [0.0] * n
    for size in range(n):
        share = 1 / (n * math.comb(n - 1, size))
        for i in range(n):
            for others in itertools.combinations([j for j in range(n) if j != i], size):
                values[i] += share * (utility((*others, i)) - utility(others))
    return values


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [5 / 6, -1 / 6, 1 / 3]), (2, [1 / 3, -1 / 6, 1 / 3]), (3, [1 / 3, 0.0, 1 / 3])]
)
def test_shapley_of_three(k, expected) -> None:
    values = knn_shapley([[1.0], [2.0], [3.0]], [1, 0, 1], [[0.0]], [1], k)
    assert values.tolist() == pytest.approx(expected, abs=1e-12)
    assert by_enumeration([1.0, 0.0, 1.0], k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("average", ["class", "sample"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_shapley_is_the_mean_of_enumerations(k, average) -> None:
    torch.manual_seed(9)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 3, (8,))
    v, w = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 2, 2, 5])  # 5: no training sample has it
    each = torch.zeros(7, 8, dtype=torch.float64)
    for i in range(7):
        order = ordered(similarities(v[i : i + 1], x, "euclidean"), 8)[0]
        each[i, order] = torch.tensor(by_enumeration((y[order] == w[i]).double().tolist(), k), dtype=torch.float64)
    expected = each.mean(0)
    if average == "class":
        expected = torch.stack([each[w == c].mean(0) for c in (0, 2, 5)]).mean(0)
    found = knn_shapley(x, y, v, w, k, average=average)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found, knn_shapley(x, y, v, w, k, average="sample" if average == "class" else "class"))


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.02])
def test_truncation_is_within_its_bound(tolerance) -> None:
    torch.manual_seed(10)
    x, y = torch.randn(400, 3, dtype=torch.float64), torch.randint(0, 2, (400,))
    exact = knn_shapley(x, y, x[:1], y[:1], 5)
    error = (knn_shapley(x, y, x[:1], y[:1], 5, tolerance=tolerance) - exact).abs().max()
    assert 0 < error <= tolerance
    assert torch.equal(knn_shapley(x, y, x[:1], y[:1], 5, tolerance=1e-3), exact), "1000 are more than there are"


def test_values_sum_to_the_accuracy_and_blocks_change_nothing(monkeypatch) -> None:
    torch.manual_seed(11)
    x, y, v, w = torch.randn(60, 4), torch.randint(0, 4, (60,)), torch.randn(50, 4), torch.randint(0, 4, (50,))
    values = knn_shapley(x, y, v, w, 5, average="sample")
    indices = nearest_neighbors(v, x, 5, metric="euclidean").indices
    share = (y[indices] == w[:, None]).double().mean()
    # The utility counts a vote a k-th, whoever is missing: of all samples together it is the share of matching neighbours.
    assert values.sum().item() == pytest.approx(share.item(), abs=1e-12)
    monkeypatch.setattr(_search, "_BLOCK", 60 * 7)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(knn_shapley(x, y, v, w, 5, average="sample"), values)
    torch.set_num_threads(before)


def test_a_mislabelled_sample_is_worth_least() -> None:
    torch.manual_seed(12)
    y = torch.arange(60) % 3
    x = torch.nn.functional.one_hot(y, 3).float() * 4 + torch.randn(60, 3)
    wrong = y.clone()
    wrong[:4] = (wrong[:4] + 1) % 3
    values = knn_shapley(x[:40], wrong[:40], x[40:], y[40:], 3)
    assert set(values.argsort()[:4].tolist()) == {0, 1, 2, 3}


# ---- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nearest_neighbors(torch.ones(2, 3), torch.ones(4, 3), 5), ValueError, "k is 5, but there are 4 references"),
        (lambda: nearest_neighbors(torch.ones(4, 3), torch.ones(4, 3), 4, own=torch.arange(4)), ValueError, "own row"),
        (lambda: nearest_neighbors(torch.ones(2, 3), torch.ones(4, 2), 1), ValueError, "queries has 3 features"),
        (lambda: nearest_neighbors(torch.ones(2, 3), torch.empty(0, 3), 1), ValueError, "references is empty"),
        (lambda: nearest_neighbors(torch.ones(2, 3), torch.zeros(4, 3), 1), ValueError, "references is zero in row 0"),
        (lambda: nearest_neighbors(torch.ones(2, 3), torch.ones(4, 3), 1, metric="l1"), ValueError, "metric is 'l1'"),
        (lambda: nearest_neighbors(torch.ones(2, 3).int(), torch.ones(4, 3), 1), TypeError, "queries must be float16"),
        (lambda: nearest_neighbors(torch.ones(2, 3), torch.ones(4, 3), True), TypeError, "k must be an integer"),
        (lambda: nearest_neighbors(torch.tensor([[1.0], [math.nan]]), [[1.0]], 1), ValueError, "queries holds NaN .* row 1"),
        (lambda: nearest_neighbors(torch.full((2, 1), 1e30), torch.zeros(1, 1), 1, metric="euclidean"), ValueError, "too large in row 0"),
        (lambda: nearest_neighbors([[1.0]], [[1.0]], 1, own=[1]), ValueError, r"own\[0\] is 1"),
        (lambda: nearest_neighbors([[1.0]], [[1.0], [2.0]], 1, own=[0.0]), TypeError, "own must be integers"),
        (lambda: KNeighborsClassifier(LINE, [0, 0, 1], 1, metric="euclidean"), ValueError, r"labels must have shape \(4,\)"),
        (lambda: KNeighborsClassifier(LINE[1:], [0, -1, 1], 1), ValueError, "labels must not be negative"),
        (lambda: KNeighborsClassifier(LINE[1:], [0, 2, 1], 1, num_classes=2), ValueError, "labels must be below num_classes"),
        (lambda: KNeighborsClassifier(LINE[1:], [0, 2, 1], 1, temperature=0.0), ValueError, "temperature is 0.0"),
        (lambda: KNeighborsClassifier(LINE[1:], [0, 2, 1], 1, balance=-1.0), ValueError, "balance is -1.0"),
        (lambda: KNeighborsClassifier(LINE[1:], [0, 0, 1], 1, class_counts=[3, 0]), ValueError, "class_counts is 0 for class 1"),
        (lambda: KNeighborsClassifier(LINE[1:], [0, 0, 1], 1, class_counts=[3]), ValueError, "class_counts has 1 entries"),
        (lambda: KNeighborsClassifier(LINE[1:], [0, 0, 1], 3).leave_one_out(), ValueError, "k is 3, but there are 2"),
        (lambda: NearestClassMean(2, 3).predict([[1.0, 2.0]]), ValueError, "has seen no sample"),
        (lambda: NearestClassMean(2, 3).update([[1.0, 2.0]], [3]), ValueError, "labels must be below"),
        (lambda: NearestClassMean(2, 3).update([[1.0]], [0]), ValueError, "features has 1 features"),
        (lambda: NearestClassMean(2, 3, metric=""), ValueError, "metric is ''"),
        (lambda: knn_shapley(LINE, [0, 0, 1, 1], torch.empty(0, 1), [], 1), ValueError, "validation_features is empty"),
        (lambda: knn_shapley(LINE, [0, 0, 1, 1], [[0.0]], [0], 5), ValueError, "k is 5, but there are 4"),
        (lambda: knn_shapley(LINE, [0, 0, 1, 1], [[0.0]], [0, 1], 1), ValueError, "validation_labels must have shape"),
        (lambda: knn_shapley(LINE, [0, 0, 1, 1], [[0.0]], [0], 1, tolerance=-1.0), ValueError, "tolerance is -1.0"),
        (lambda: knn_shapley(LINE, [0, 0, 1, 1], [[0.0]], [0], 1, average="x"), ValueError, "average is 'x'"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_refused_batch_changes_nothing() -> None:
    ncm = NearestClassMean(2, 3).update([[1.0, 2.0]], [1])
    before = ncm.means.clone()
    with pytest.raises(ValueError, match="NaN"):
        ncm.update([[1.0, math.nan]], [1])
    assert torch.equal(ncm.means, before)
    assert ncm.counts.tolist() == [0, 1, 0]


def test_it_is_found_from_the_package() -> None:
    assert ltk.neighbors.nearest_neighbors is nearest_neighbors
