"""Promise: class-balanced sigmoid, class-balanced focal and EQL are their papers' sums of binary cross-entropies."""

from __future__ import annotations

import functools
import math

import contract
import pytest
import torch
from contract import CLASSES, COUNTS
from torch.nn import functional as F

import ltkernels as ltk

TAIL = 0.02
BUILT = {
    "cb_sigmoid": ltk.adjustments.class_balanced_sigmoid(COUNTS, beta=0.99),
    "cb_focal": ltk.adjustments.class_balanced_focal(COUNTS, beta=0.99, gamma=2.0),
    "cb_focal_half": ltk.adjustments.class_balanced_focal(COUNTS, beta=0.99, gamma=0.5),
    "eql": ltk.adjustments.eql(COUNTS, tail_frequency=TAIL),
}
CALLS = {name: functools.partial(contract.with_tables, built) for name, built in BUILT.items()}
GAMMAS = {"cb_sigmoid": 0.0, "cb_focal": 2.0, "cb_focal_half": 0.5, "eql": 0.0}


def class_weights() -> torch.Tensor:
    weight = torch.tensor([0.01 / (1 - 0.99**n) for n in COUNTS], dtype=torch.float64)
    return (weight * CLASSES / weight.sum()).float()


def reference(name: str):
    gamma = GAMMAS[name]

    def rows(z: torch.Tensor, y: torch.Tensor):
        losses, grads, size = torch.zeros(len(z)).double(), torch.zeros_like(z), torch.zeros(len(z)).double()
        for i in range(len(z)):
            for j in range(z.shape[1]):
                positive = j == int(y[i])
                if name == "eql" and not positive and COUNTS[j] / sum(COUNTS) < TAIL:
                    continue
                x = -float(z[i, j]) if positive else float(z[i, j])  # the loss of a class is softplus(x)
                bce = max(x, 0.0) + math.log1p(math.exp(-abs(x)))
                p = 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
                q = 1 / (1 + math.exp(x)) if x < 0 else math.exp(-x) / (1 + math.exp(-x))
                losses[i] += p**gamma * bce
                slope = p**gamma * (p + gamma * q * bce)
                grads[i, j] = -slope if positive else slope
                # A power p^gamma of a small p magnifies the rounding of its exponent gamma * x.
                size[i] = max(float(size[i]), (1 + gamma) * abs(x) if math.isfinite(x) else 0.0)
        return losses, grads, size

    return rows


@pytest.mark.parametrize("reduction", contract.REDUCTIONS)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("name", list(CALLS))
def test_values(name, dtype, reduction) -> None:
    z, y = contract.hostile_logits(9, CLASSES), contract.labels(9, CLASSES)
    weight = None if name == "eql" else class_weights()
    contract.check_values(CALLS[name], reference(name), z, y, dtype, reduction, weight)


def test_batch_mean_is_the_papers() -> None:
    """The sum over classes and rows, each row with its label's weight, divided by the number of rows."""
    z, y = torch.randn(7, CLASSES), torch.arange(7)
    hot = F.one_hot(y, CLASSES).float()
    bce = F.binary_cross_entropy_with_logits(z, hot, reduction="none")
    rows = class_weights()[y] * bce.sum(1)
    assert torch.allclose(CALLS["cb_sigmoid"](z, y, reduction="batch_mean"), rows.sum() / 7, rtol=1e-6)
    assert torch.allclose(CALLS["cb_sigmoid"](z, y), rows.sum() / class_weights()[y].sum(), rtol=1e-6)
    p_t = torch.where(hot == 1, z.sigmoid(), 1 - z.sigmoid())
    rows = class_weights()[y] * ((1 - p_t) ** 2 * bce).sum(1)
    assert torch.allclose(CALLS["cb_focal"](z, y, reduction="batch_mean"), rows.sum() / 7, rtol=1e-5)


@pytest.mark.parametrize("classes", [1, 2, 15, 17, 2049, 4100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes(classes, dtype) -> None:
    counts = (COUNTS * (classes // CLASSES + 1))[:classes]
    z, y = contract.hostile_logits(5, classes).to(dtype), contract.labels(5, classes)
    for build in (ltk.adjustments.class_balanced_focal, ltk.adjustments.eql):
        call = functools.partial(contract.with_tables, build(counts))
        (a, da), (b, db) = (contract.gradient(call, z, y, backend=x) for x in ("cpu", "torch"))
        assert torch.allclose(a, b, rtol=1e-5)
        assert torch.allclose(da.float(), db.float(), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-20)
        assert da.abs().max() > 0


@pytest.mark.parametrize("name", list(CALLS))
def test_contract(name) -> None:
    z, y = contract.hostile_logits(8, CLASSES), contract.labels(8, CLASSES)
    call = CALLS[name]
    contract.check_autograd(call, z.clamp(min=-60), y)
    contract.check_backends_and_targets(call, z.clamp(min=-60), y)
    contract.check_threads(call, torch.randn(300, CLASSES), torch.arange(300) % CLASSES)
    contract.check_ignored_and_nan(call, torch.randn(4, CLASSES, dtype=torch.float64), torch.arange(4))


def test_operator() -> None:
    contract.check_operator(4, None, None, [0.0, 0.0, 0.0])
    contract.check_operator(4, torch.rand(5), None, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("name", ["class_balanced_sigmoid", "class_balanced_focal", "eql"])
def test_permutation(name) -> None:
    z = torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.0, 1.0, -0.5, 0.125]], dtype=torch.float64)
    build = getattr(ltk.adjustments, name)
    make = lambda counts: functools.partial(contract.with_tables, build(counts))  # noqa: E731
    contract.check_permutation(make, z, [400, 100, 25, 6])


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_confident_and_infinite_logits(dtype) -> None:
    """A sure and right row keeps its small loss and gradient; infinite logits on the right side cost nothing."""
    z = torch.full((1, 3), -12.0, dtype=dtype)
    z[0, 0] = 12.0
    loss, grad = contract.gradient(
        functools.partial(contract.with_tables, ltk.adjustments.eql([9, 9, 9])), z, torch.tensor([0])
    )
    assert loss.item() == pytest.approx(3 * math.log1p(math.exp(-12)), rel=1e-5)
    assert grad.tolist()[0] == pytest.approx([-math.exp(-12), math.exp(-12), math.exp(-12)], rel=5e-3)
    z[0] = torch.tensor([torch.inf, -torch.inf, -torch.inf])
    for build in (ltk.adjustments.eql, ltk.adjustments.class_balanced_focal):
        loss, grad = contract.gradient(functools.partial(contract.with_tables, build([9, 9, 9])), z, torch.tensor([0]))
        assert loss == 0
        assert grad.tolist() == [[0.0, 0.0, 0.0]]


def test_eql_spares_tail_classes() -> None:
    _, grad = contract.gradient(CALLS["eql"], torch.zeros(2, CLASSES), torch.tensor([0, 1]), reduction="sum")
    tail = torch.tensor([n / sum(COUNTS) < TAIL for n in COUNTS])
    assert torch.equal(grad[0] == 0, tail)
    assert grad[1, 1] == -0.5, "a tail label keeps its positive term"


@pytest.mark.parametrize("name", list(CALLS))
def test_bad_input(name) -> None:
    z, y = torch.zeros(1, CLASSES), torch.tensor([0])
    with pytest.raises(ValueError, match=r"label_smoothing is 0.1"):
        CALLS[name](z, y, label_smoothing=0.1)
    with pytest.raises(ValueError, match="multi-label"):
        CALLS[name](z, torch.rand(1, CLASSES))
    with pytest.raises(ValueError, match="label 21 in row 0"):
        CALLS[name](z, torch.tensor([21]))
    if name != "eql":
        with pytest.raises(ValueError, match="sets the class weights itself"):
            ltk.LOSSES[name.removesuffix("_half")](COUNTS, weight=torch.ones(CLASSES))
    with pytest.raises(ValueError, match="margin cannot be combined"):
        ltk.functional.adjusted_cross_entropy(z, y, margin=torch.zeros(CLASSES), term=ltk.adjustments.eql(COUNTS).term)
