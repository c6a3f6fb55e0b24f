"""Promise: one read of the logits gives loss, margin, correctness and the strongest other class, exactly; LDAM-HG stands on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ltkernels as ltk
from ltkernels.losses import _row_statistics

statistics = ltk.functional.row_statistics
F64 = torch.float64
Z, PI = torch.tensor([[1, 0.5, -0.5]], dtype=F64), torch.tensor([0.6, 0.3, 0.1], dtype=F64)


def test_numbers_of_the_specification() -> None:
    found = statistics(Z, torch.tensor([2]))
    assert found.margin.item() == -1.5
    assert (found.correct.item(), found.other.item()) == (False, 0)
    torch.testing.assert_close(found.loss, torch.tensor([2.104131], dtype=F64), rtol=0, atol=1e-6)
    prior = statistics(Z, torch.tensor([2]), shift=PI.log())
    torch.testing.assert_close(prior.loss, torch.tensor([3.584768], dtype=F64), rtol=0, atol=1e-6)
    loss = ltk.nn.LDAMHinge([6, 3, 1], reduction="none")
    torch.testing.assert_close(loss.margin, torch.tensor([0.319472, 0.379918, 0.5], dtype=F64), rtol=0, atol=1e-6)
    rows = loss(Z.expand(3, 3), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(rows, torch.tensor([0, 0.879918, 2.0], dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 3, 17, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_torch(dtype: torch.dtype, classes: int) -> None:
    """Ties (16-bit logits have many), labels at the ends of blocks, masked classes, ignored rows, rows of any stride."""
    rows = 40
    z = (torch.randn(rows, 2 * classes, generator=torch.Generator().manual_seed(classes)) * 3).to(dtype)[:, :classes]
    y = torch.arange(rows) * 997 % classes
    y[0], y[1], y[2], y[3] = classes - 1, min(2047, classes - 1), min(2048, classes - 1), -100
    z[4] = 1.0  # all equal
    z[5, min(1, classes - 1)] = -torch.inf
    z[6] = -torch.inf
    z[6, y[6]] = 0.5
    z[7] += 200.0
    found = statistics(z, y)
    a = z.double()
    label = y.clamp_min(0)[:, None]
    own = a.gather(1, label)[:, 0]
    outside = a.scatter(1, label, -torch.inf)
    highest = outside.amax(1)
    first = torch.argmax((outside == highest[:, None]).int(), 1)  # the lowest of equal ones
    valid = y >= 0
    assert torch.equal(found.other, torch.where(valid & (highest > -torch.inf), first, -1))
    margin = torch.where(valid, own - highest, 0)
    torch.testing.assert_close(found.margin.double(), margin, rtol=1e-6, atol=1e-6, equal_nan=True)
    plain = torch.argmax(a, 1) == y
    assert torch.equal(found.correct, valid & plain & (own > -torch.inf))
    expected = torch.nn.functional.cross_entropy(a, y, reduction="none")
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert found.loss.dtype == (F64 if dtype == F64 else torch.float32)


def test_tables_and_the_definition_in_torch(monkeypatch) -> None:
    z, y = torch.randn(30, 21), torch.arange(30) % 21
    shift, scale = torch.randn(21), torch.rand(21) + 0.5
    shift[4] = -torch.inf
    found = statistics(z, y, shift=shift, scale=scale)
    a = (z * scale + shift).double()
    outside = a.scatter(1, y[:, None], -torch.inf)
    torch.testing.assert_close(
        found.margin.double(), a.gather(1, y[:, None])[:, 0] - outside.amax(1), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(found.other, outside.argmax(1))
    for direct in (found, statistics(z, y, ignore_index=3)):
        monkeypatch.setattr(_row_statistics, "direct", lambda *_: False)
        said = {"shift": shift, "scale": scale} if direct is found else {"ignore_index": 3}
        torch.testing.assert_close(statistics(z, y, **said), direct, rtol=1e-5, atol=1e-5)
        monkeypatch.undo()


def test_special_values() -> None:
    y = torch.tensor([0])
    nan = statistics(torch.tensor([[1.0, torch.nan, 2.0]]), y)
    assert nan.margin.isnan()
    assert nan.loss.isnan()
    assert (nan.correct.item(), nan.other.item()) == (False, -1)
    assert statistics(torch.tensor([[torch.nan, 1.0]]), y).margin.isnan()
    infinite = statistics(torch.tensor([[1.0, torch.inf]]), y)
    assert (infinite.margin.item(), infinite.other.item(), infinite.correct.item()) == (-torch.inf, 1, False)
    empty = statistics(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert [len(x) for x in empty] == [0, 0, 0, 0]


def test_the_same_bits_for_any_number_of_threads(monkeypatch) -> None:
    z, y = torch.randn(300, 700), torch.arange(300)
    one = statistics(z, y)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(one, statistics(z, y), strict=True))


def test_hinge_gradient_and_reductions() -> None:
    counts = [6, 3, 1, 40]
    z = torch.randn(50, 4, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.arange(50) % 4
    y[7] = -100
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])

    def plain(x: Tensor) -> Tensor:
        n = torch.tensor(counts, dtype=F64)
        margin = 0.5 * (n.min() / n) ** 0.25
        label = y.clamp_min(0)[:, None]
        gap = x.scatter(1, label, -torch.inf).amax(1) - x.gather(1, label)[:, 0] + margin[label[:, 0]]
        return torch.where(y >= 0, gap.clamp_min(0) * weight.double()[label[:, 0]], 0)

    w = torch.where(y >= 0, weight.double()[y.clamp_min(0)], 0)
    for reduction, size in {"sum": 1.0, "mean": w.sum(), "batch_mean": 49.0}.items():
        loss = ltk.nn.LDAMHinge(counts, weight=weight, reduction=reduction)(z, y)
        torch.testing.assert_close(loss, plain(z).sum() / size)
        torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.autograd.grad(plain(z).sum() / size, z)[0])
    compiled = torch.compile(ltk.nn.LDAMHinge(counts), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z, y), ltk.nn.LDAMHinge(counts)(z, y))
    tie = torch.zeros(1, 4, requires_grad=True)
    ltk.nn.LDAMHinge(counts)(tie, torch.tensor([2])).backward()
    assert tie.grad.tolist() == [[1, 0, -1, 0]]
    assert ltk.nn.LDAMHinge([4])(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64)) == 0


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: statistics([1.0], torch.tensor([0])), TypeError, "logits is list"),
        (lambda: statistics(Z[0], torch.tensor(0)), ValueError, r"logits has shape \(3,\); it must be \(N, C\)"),
        (lambda: statistics(Z, torch.tensor([3])), IndexError, "target has label 3 in row 0"),
        (lambda: statistics(Z, Z), TypeError, "target holds class probabilities"),
        (lambda: statistics(Z, torch.tensor([0]), shift=PI[:2]), ValueError, r"shift has shape \(2,\)"),
        (lambda: ltk.nn.LDAMHinge([3, 0]), ValueError, "class_counts is 0 for class 1"),
        (
            lambda: ltk.nn.LDAMHinge([3, 1], weight=torch.ones(3)),
            ValueError,
            "weight has 3 entries; the loss has 2 classes",
        ),
        (
            lambda: ltk.nn.LDAMHinge([3, 1])(Z, torch.tensor([0])),
            ValueError,
            "logits has 3 columns; the loss has 2 classes",
        ),
    ],
)
def test_message(run, error, message) -> None:
    with pytest.raises(error, match=message):
        run()
