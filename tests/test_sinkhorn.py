"""Promise: Sinkhorn labels have the prescribed class shares, whatever epsilon; they are those of the plain iteration in float64."""

from __future__ import annotations

import math

import pytest
import torch

import ltkernels as ltk
from ltkernels import _sinkhorn
from ltkernels.functional import sinkhorn

S = torch.tensor([[0.9, 0.2, -0.1], [0.6, 0.5, 0.0], [0.1, 0.4, 0.3], [0.0, 0.1, 0.8]], dtype=torch.float64)
PI = [0.5, 0.3, 0.2]
EXPECTED = torch.tensor(
    [
        [0.810667, 0.147662, 0.041671],
        [0.581681, 0.351774, 0.066545],
        [0.343344, 0.462108, 0.194548],
        [0.264308, 0.238456, 0.497236],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_labels(dtype) -> None:
    found = sinkhorn(S.to(dtype), PI, epsilon=0.5, tol=1e-7)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.labels.dtype == real
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 5e-4}[dtype]
    assert (found.labels - EXPECTED).abs().max() < tolerance
    assert torch.allclose(found.labels.sum(1), torch.ones(4, dtype=real))
    share = found.labels.double().mean(0)
    assert found.error == pytest.approx((share - torch.tensor(PI).double()).abs().sum().item(), abs=1e-7)
    assert found.error <= 1e-6
    assert 3 < found.iterations < 60


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 1.0])
@pytest.mark.parametrize(("rows", "classes"), [(64, 10), (7, 33), (1, 4), (5, 1)])
def test_the_kernel_is_the_plain_iteration(rows, classes, epsilon, dtype) -> None:
    torch.manual_seed(rows)
    s = torch.rand(rows, classes, dtype=torch.float64) * 2 - 1
    prior = torch.rand(classes, dtype=torch.float64) + 0.01
    prior /= prior.sum()
    for limit in (0, 1, 25):
        expected = _sinkhorn.iterated(s.to(dtype).double(), prior, epsilon, 0.0, limit)
        found = sinkhorn(s.to(dtype), prior, epsilon, tol=0.0, max_iterations=limit)
        size = 1e-13 if dtype == torch.float64 else 2e-7
        assert (found.labels - expected.labels).abs().max() < 60 * size / epsilon
        assert found.error == pytest.approx(expected.error, abs=60 * size / epsilon)
        if classes > 1:  # else the error is 0 at once
            assert found.iterations == expected.iterations == limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_small_epsilon_neither_overflows_nor_kills_a_class(dtype) -> None:
    """One class is nobody's choice by 200 / epsilon: exp of that is 0 in every type, its log -inf."""
    s = torch.zeros(40, 4, dtype=dtype)
    s[:, 0] = 1.0
    s[torch.arange(40), 1 + torch.arange(40) % 2] = 0.9
    s[:, 3] = -1.0
    s[5, 3] = -0.5
    found = sinkhorn(s, [0.7, 0.1, 0.1, 0.1], epsilon=1e-3, tol=1e-4, max_iterations=2000)
    assert torch.isfinite(found.labels).all()
    assert found.labels.double().mean(0).tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=1e-3)
    expected = _sinkhorn.iterated(s.double(), torch.tensor([0.7, 0.1, 0.1, 0.1]).double(), 1e-3, 1e-4, 2000)
    assert abs(found.iterations - expected.iterations) <= 1


def test_optimum() -> None:
    """The plan maximises <S, Q> + eps H(Q): moves that keep both marginals lower it."""
    found = sinkhorn(S, PI, epsilon=0.3, tol=1e-12, max_iterations=1000)
    q = found.labels / 4

    def value(x):
        return (x * S).sum() - 0.3 * (x * x.log()).sum()

    for i, j, a, b in ((0, 1, 0, 1), (0, 3, 1, 2), (2, 3, 0, 2)):
        for size in (1e-3, -1e-3):
            moved = q.clone()
            moved[i, a] += size
            moved[j, b] += size
            moved[i, b] -= size
            moved[j, a] -= size
            assert value(moved) < value(q)


def test_stop_rule() -> None:
    few, many = (sinkhorn(S, PI, 0.1, tol=0.0, max_iterations=n) for n in (3, 30))
    assert (few.iterations, many.iterations) == (3, 30)
    assert many.error < few.error
    stopped = sinkhorn(S, PI, 0.1, tol=few.error, max_iterations=30)
    assert stopped.iterations <= 3
    assert stopped.error <= few.error
    none = sinkhorn(S, PI, 0.1, tol=10.0)
    assert none.iterations == 0
    assert torch.allclose(none.labels, torch.softmax(S / 0.1 + torch.tensor(PI).double().log(), 1), rtol=1e-12)


def test_forms_of_input() -> None:
    expected = sinkhorn(S, PI, 0.5)
    for given in (S.T.contiguous().T, torch.cat([S, S], 1)[:, :3], torch.cat([S, S])[::1][:4]):
        assert torch.equal(sinkhorn(given, PI, 0.5).labels, expected.labels)
    assert torch.allclose(sinkhorn(torch._neg_view(-S), PI, 0.5).labels, expected.labels, atol=1e-9)
    assert torch.allclose(sinkhorn(S, [5, 3, 2], 0.5).labels, expected.labels, atol=1e-9), "shares of any sum"
    assert torch.allclose(sinkhorn(S + 7.0, PI, 0.5).labels, expected.labels, atol=1e-9)
    order = [2, 0, 1]
    permuted = sinkhorn(S[:, order], [PI[k] for k in order], 0.5)
    assert torch.allclose(permuted.labels, expected.labels[:, order], atol=1e-9)
    assert not sinkhorn(S.clone().requires_grad_(), torch.tensor(PI), 0.5).labels.requires_grad
    assert torch.equal(S, S.clone())
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(sinkhorn(S, PI, 0.5).labels, expected.labels)
    torch.set_num_threads(before)
    cross = torch.nn.functional.cross_entropy(S.float(), expected.labels.float())
    assert math.isfinite(cross)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sinkhorn(S, [0.5, 0.5, 0.0]), ValueError, r"prior\[2\] is 0.0"),
        (lambda: sinkhorn(S, [0.5, -0.5, 1.0]), ValueError, r"prior\[1\] is -0.5"),
        (lambda: sinkhorn(S, [0.5, math.nan, 1.0]), ValueError, r"prior\[1\] is nan"),
        (lambda: sinkhorn(S, [0.5, 0.5]), ValueError, r"prior has shape \(2,\)"),
        (lambda: sinkhorn(S, PI, 0.0), ValueError, "epsilon is 0.0"),
        (lambda: sinkhorn(S.float(), PI, 1e-38), ValueError, "epsilon is 1e-38"),
        (lambda: sinkhorn(S, PI, tol=-1.0), ValueError, "tol is -1.0"),
        (lambda: sinkhorn(S, PI, max_iterations=-1), ValueError, "max_iterations is -1"),
        (lambda: sinkhorn(S, PI, max_iterations=1.5), TypeError, "max_iterations is 1.5"),
        (lambda: sinkhorn(S[:0], PI), ValueError, r"similarities has shape \(0, 3\)"),
        (lambda: sinkhorn(S[0], PI), ValueError, r"similarities has shape \(3,\)"),
        (lambda: sinkhorn(S.int(), PI), TypeError, "similarities is torch.int32"),
        (lambda: sinkhorn(S.tolist(), PI), TypeError, "similarities is list"),
        (lambda: sinkhorn(S.index_fill(0, torch.tensor(2), math.inf), PI), ValueError, "infinity, first in row 2"),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_it_is_public() -> None:
    assert ltk.functional.SinkhornLabels is _sinkhorn.SinkhornLabels
