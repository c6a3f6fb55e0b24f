"""Promise: torch.compile(fullgraph=True) gives what eager gives, ignored rows, table changes and changing shapes included."""

from __future__ import annotations

import contract
import pytest
import torch

import ltkernels as ltk

COUNTS = [300, 100, 30, 10, 3]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def both(function, z: torch.Tensor, y, upstream: float = 1.0, backend: str = "aot_eager") -> None:
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = []
    for call in (function, compiled):
        leaf = z.detach().clone().requires_grad_()
        loss = call(leaf, y)
        loss.backward(torch.full_like(loss, upstream))
        results.append((loss.detach(), leaf.grad))
    (loss, grad), (compiled_loss, compiled_grad) = results
    assert grad.abs().max() > 0
    assert torch.equal(loss, compiled_loss)
    assert torch.equal(grad, compiled_grad)


def data(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(rows) % 5
    y[1] = -100
    return torch.randn(rows, 5), y


@pytest.mark.parametrize("name", list(ltk.LOSSES))
def test_every_module(name) -> None:
    # eval(): Seesaw counts the samples of each training call; seed: every call of some draws other numbers.
    options = contract.seeded(name)
    both(ltk.LOSSES[name].make(COUNTS, **options).eval(), *data())


@pytest.mark.parametrize("name", ["ce", "focal", "logit_adjusted", "ldam", "kps_ga", "class_balanced", "cosface"])
def test_functional_forms(name) -> None:
    record = ltk.LOSSES[name]
    tables = record.adjustment(COUNTS)._asdict()
    both(lambda z, y: ltk.functional.adjusted_cross_entropy(z, y, **tables), *data())


@pytest.mark.parametrize("reduction", ["none", "mean", "batch_mean", "sum"])
def test_reductions_and_upstream(reduction) -> None:
    loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS, reduction=reduction, label_smoothing=0.1)
    both(loss, *data(), upstream=0.37)


def test_inductor() -> None:
    loss = ltk.nn.KPS(COUNTS)
    both(lambda z, y: loss(z * 2, y) * 3, *data(), backend="inductor")


def test_dynamic_shapes() -> None:
    loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 6, 11, 64):
        z, y = data(rows)
        assert torch.equal(compiled(z, y), loss(z, y))


def test_a_table_changed_in_place_is_seen() -> None:
    loss = ltk.nn.ClassBalanced(COUNTS)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z, y = data()
    before = compiled(z, y)
    loss.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert torch.equal(compiled(z, y), loss(z, y))
    assert not torch.equal(compiled(z, y), before)


def test_bad_label_still_raises() -> None:
    compiled = torch.compile(ltk.nn.CrossEntropy(), fullgraph=True, backend="aot_eager")
    z, y = data()
    y[2] = 7
    with pytest.raises(ValueError, match="label 7 in row 2"):
        compiled(z, y)
