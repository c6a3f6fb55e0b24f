"""Promise: samples of a k-DPP have exactly the probabilities of its determinants."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ltkernels.selection import _kdpp, k_dpp_log_probability, sample_k_dpp

L = torch.tensor([[1.0, 0.8, 0.1], [0.8, 1.0, 0.1], [0.1, 0.1, 1.0]], dtype=torch.float64)


def by_determinants(kernel: Tensor, k: int) -> dict[tuple[int, ...], float]:
    found = {}
    for chosen in itertools.combinations(range(len(kernel)), k):
        at = torch.tensor(chosen)
        found[chosen] = max(float(torch.linalg.det(kernel[at][:, at])), 0.0)
    total = sum(found.values())
    return {chosen: value / total for chosen, value in found.items()}


class Replay:
    """Decides as `path` says, then for the first possibility; keeps the other ways to go, and the probability of its own."""

    def __init__(self, path: list[int]) -> None:
        self.path, self.made, self.probability = path, [], 1.0
        self.others: list[list[int]] = []

    def __call__(self, weights: Tensor) -> int:
        share = (weights / weights.sum()).tolist()
        if len(self.made) < len(self.path):
            at = self.path[len(self.made)]
        else:
            at, *rest = (i for i, p in enumerate(share) if p > 1e-13)
            self.others += [[*self.made, i] for i in rest]
        self.made.append(at)
        self.probability *= share[at]
        return at


def by_every_decision(x: Tensor, k: int) -> dict[tuple[int, ...], float]:
    """The sampler's own probabilities: it is run once for every way that its decisions can go."""
    found: dict[tuple[int, ...], float] = {}
    todo: list[list[int]] = [[]]
    while todo:
        draw = Replay(todo.pop())
        picked = tuple(_kdpp.drawn(x, k, draw).tolist())
        found[picked] = found.get(picked, 0.0) + draw.probability
        todo += draw.others
    return found


def test_three_items() -> None:
    x = torch.linalg.cholesky(L)
    expected = {(0, 1): 0.153846, (0, 2): 0.423077, (1, 2): 0.423077}
    for found in (by_every_decision(x, 2), by_determinants(L, 2)):
        assert found == pytest.approx(expected, abs=1e-6)
    for chosen, p in expected.items():
        assert math.exp(k_dpp_log_probability(x, chosen)) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize(("items", "width"), [(5, 3), (5, 5), (4, 9)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_every_subset_has_its_probability(items, width, k) -> None:
    torch.manual_seed(items)
    x, quality = torch.randn(items, width, dtype=torch.float64), torch.linspace(0.5, 2, items, dtype=torch.float64)
    for q in (None, quality):
        scaled = x if q is None else x * q[:, None]
        expected = by_determinants(scaled @ scaled.T, k)
        assert by_every_decision(scaled, k) == pytest.approx(expected, rel=1e-9)
        for chosen, p in expected.items():
            assert k_dpp_log_probability(x, chosen[::-1], quality=q) == pytest.approx(math.log(p), abs=1e-9)


def test_all_items_and_duplicates() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert sample_k_dpp(torch.eye(4), 4).tolist() == [0, 1, 2, 3]
    assert {tuple(sample_k_dpp(x, 2, seed=s).tolist()) for s in range(50)} == {(0, 2), (1, 2)}, "never both of a pair"
    assert k_dpp_log_probability(x, [0, 1]) == -math.inf
    # Rows that span no volume but for rounding, zeros, and short rows that do.
    y = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y[4], y[5], y[6] = 3.7 * y[0] - y[1], 0, 1e-12 * y[2]
    for chosen in ([0, 1, 4], [4, 3, 1, 0], [0, 5], [2, 6]):
        assert k_dpp_log_probability(y, chosen) == -math.inf
    found = k_dpp_log_probability(y, [0, 6])
    assert found == pytest.approx(k_dpp_log_probability(y, [0, 2]) + 2 * math.log(1e-12), abs=1e-9)
    assert {int(sample_k_dpp(x, 1, quality=[0, 1, 0], seed=s)) for s in range(20)} == {1}


def test_frequencies_and_seeds() -> None:
    x = torch.linalg.cholesky(L)
    draws = [tuple(sample_k_dpp(x, 2, seed=s).tolist()) for s in range(3000)]
    for chosen, p in by_determinants(L, 2).items():
        assert draws.count(chosen) / 3000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 3000))
    assert torch.equal(sample_k_dpp(x, 2, seed=5), sample_k_dpp(x.numpy(), 2, seed=5))
    state = torch.get_rng_state()
    sample_k_dpp(x, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_many_samples_of_many() -> None:
    """e_k of eigenvalues around 10^6 overflows float64 beyond 51 of them."""
    torch.manual_seed(0)
    x = torch.randn(3000, 80) * 1000
    picked = sample_k_dpp(x, 60, seed=1)
    assert len(set(picked.tolist())) == 60
    assert picked.tolist() == sorted(picked.tolist())
    assert math.isfinite(k_dpp_log_probability(x, picked))
    blocks = torch.nn.functional.one_hot(torch.arange(600) % 6, 6).double() + 1e-3 * torch.randn(600, 6).double()
    assert sorted((sample_k_dpp(blocks, 6, seed=2) % 6).tolist()) == [0, 1, 2, 3, 4, 5], "one of each direction"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sample_k_dpp(torch.eye(3), 4), ValueError, "k is 4, but there are 3 samples"),
        (lambda: sample_k_dpp(torch.ones(5, 3), 2), ValueError, "k is 2, but the features have rank 1"),
        (lambda: sample_k_dpp(torch.zeros(5, 3), 2), ValueError, "features is zero"),
        (lambda: sample_k_dpp(torch.empty(0, 3), 1), ValueError, "features is empty"),
        (lambda: sample_k_dpp(torch.eye(3), 0), ValueError, "k must be at least 1"),
        (lambda: sample_k_dpp(torch.eye(3).int(), 1), TypeError, "features must be float16"),
        (lambda: sample_k_dpp(torch.eye(3), 1, seed=0.5), TypeError, "seed must be an integer"),
        (lambda: sample_k_dpp(torch.eye(3), 1, quality=[1, 1]), ValueError, r"quality has shape \(2,\)"),
        (lambda: sample_k_dpp(torch.eye(3), 1, quality=[1, -1, 1]), ValueError, r"quality\[1\] is -1.0"),
        (lambda: sample_k_dpp(torch.eye(3) * math.nan, 1), ValueError, "features holds NaN"),
        (lambda: k_dpp_log_probability(torch.eye(3), [0, 3]), ValueError, "indices holds 3"),
        (lambda: k_dpp_log_probability(torch.eye(3), [1, 1]), ValueError, "distinct rows"),
        (lambda: k_dpp_log_probability(torch.eye(3), [0.5]), TypeError, "indices must be integers"),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
