"""Promise: ArcFace is s cos(theta + m) at the label, with the chosen gradient and none that is infinite."""

from __future__ import annotations

import math

import contract
import pytest
import torch
from contract import CLASSES

import ltkernels as ltk

M, S = 0.5, 16.0


def call(z, y, gradient="exact", m=M, s=S, **common):
    classes = z.shape[1] if z.dim() > 1 else len(z)
    return contract.with_tables(ltk.adjustments.arcface(classes, m=m, s=s, gradient=gradient), z, y, **common)


def reference(z: torch.Tensor, y: torch.Tensor, gradient: str = "exact"):
    """With angles: theta = acos(c), slope sin(theta + m) / sin(theta)."""
    losses, grads, size = torch.zeros(len(z)).double(), torch.zeros_like(z), torch.zeros(len(z)).double()
    for i in range(len(z)):
        label = int(y[i])
        theta = math.acos(float(z[i, label]))
        slope = math.sin(theta + M) / math.sin(theta) if theta + M <= math.pi else 1.0
        own = math.cos(theta + M) if theta + M <= math.pi else math.cos(theta) - M * math.sin(M)
        a = [S * (own if j == label else float(x)) for j, x in enumerate(z[i])]
        top = max(a)
        e = [math.exp(x - top) for x in a]
        others = sum(x for j, x in enumerate(e) if j != label)
        total = others + e[label]
        losses[i] = math.log1p(others / e[label])
        grads[i] = S * torch.tensor(e, dtype=torch.float64) / total
        grads[i, label] = -S * (slope if gradient == "exact" else 1.0) * others / total
        size[i] = S
    return losses, grads, size


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("reduction", contract.REDUCTIONS)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_values(dtype, reduction, gradient) -> None:
    z, y = contract.cosines(9, CLASSES), contract.labels(9, CLASSES)
    chosen = lambda z, y, **common: call(z, y, gradient, **common)  # noqa: E731
    contract.check_values(chosen, lambda z, y: reference(z, y, gradient), z, y, dtype, reduction)
    weight = torch.linspace(0.2, 2, CLASSES)
    weighted = lambda z, y, **common: chosen(z, y, weight=weight, **common)  # noqa: E731
    contract.check_values(weighted, lambda z, y: reference(z, y, gradient), z, y, dtype, reduction, weight)


def test_exact_gradient_is_the_derivative() -> None:
    """Central differences on both sides of theta + m = pi, away from it and from cos = 1."""
    for c in (-0.99, -0.9, -0.8, 0.0, 0.6, 0.99):
        z = torch.tensor([[c, 0.1, -0.2]], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda z: call(z, torch.tensor([0])), z, eps=1e-7, atol=1e-5)
        assert torch.autograd.gradgradcheck(lambda z: call(z, torch.tensor([0])), z, eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("cosine", [1.0, -1.0, 1.0009765625])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*(("cpu", dtype) for dtype in contract.DTYPES), ("torch", torch.float64)],  # float32 log_softmax cancels here
    ids=str,
)
def test_ends(backend, dtype, cosine) -> None:
    """cos = +-1, and a cosine that rounding has pushed above 1: finite, with the documented slope."""
    z = torch.zeros(1, 3, dtype=torch.float64)
    z[0, 0] = cosine
    z = z.to(dtype)
    c = float(z[0, 0])
    loss, grad = contract.gradient(call, z, torch.tensor([0]), backend=backend)
    own = c * math.cos(M) if c > 0 else c - M * math.sin(M)
    steep = 1e7 if dtype == torch.float64 else 1e3
    slope = math.cos(M) + steep * c * math.sin(M) if c > 0 else 1.0
    others = 2 * math.exp(-S * own)
    assert loss.item() == pytest.approx(math.log1p(others), rel=1e-5)
    assert grad[0, 0].item() == pytest.approx(-S * slope * others / (1 + others), rel=1e-2)
    assert grad[0, 1].item() == pytest.approx(S * others / 2 / (1 + others), rel=1e-2)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("theta", [9e-4, 5e-4, 1e-5, 1e-6])
def test_small_angles_are_exact_in_float64(theta: float, backend: str) -> None:
    """sin(theta + m) / sin(theta); the cosine that is given has the angle 2 asin(sqrt((1 - c) / 2))."""
    z = torch.tensor([[math.cos(theta), 0.3, -0.2]], dtype=torch.float64)
    angle = 2 * math.asin(math.sqrt((1 - float(z[0, 0])) / 2))
    loss, grad = contract.gradient(call, z, torch.tensor([0]), backend=backend)
    own = S * math.cos(angle + M)
    others = sum(math.exp(S * float(x)) for x in z[0, 1:])
    assert loss.item() == pytest.approx(math.log1p(others / math.exp(own)), rel=1e-9)
    share = others / (others + math.exp(own))
    assert grad[0, 0].item() == pytest.approx(-S * share * math.sin(angle + M) / math.sin(angle), rel=1e-9)


@pytest.mark.parametrize("below", [1e-7, 1e-9, 1e-12])
def test_gradient_of_a_certain_row_keeps_its_digits(below: float) -> None:
    """Near the cosine 1 a label is certain and the slope steep: p - 1, rounded, would keep seven digits of the gradient."""
    mpmath = pytest.importorskip("mpmath")
    z = torch.tensor([[1 - below, -0.5, -0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    ltk.nn.ArcFace(4, s=30.0)(z, torch.tensor([0])).backward()
    with mpmath.workdps(50):
        c, *others = [mpmath.mpf(value) for value in z[0].tolist()]
        sine, margin = mpmath.sqrt(1 - c * c), mpmath.mpf(0.5)
        rest = sum(mpmath.exp(30 * other) for other in others)
        share = rest / (rest + mpmath.exp(30 * (c * mpmath.cos(margin) - sine * mpmath.sin(margin))))
        expected = float(-30 * share * (mpmath.cos(margin) + c / sine * mpmath.sin(margin)))
    assert float(z.grad[0, 0]) == pytest.approx(expected, rel=1e-13)


def test_gradient_through_a_cosine_head() -> None:
    """Features on top of their class weight: the product with the derivative of the cosine stays finite."""
    head = ltk.nn.CosineLinear(4, 3)
    features = head.weight.detach().clone().requires_grad_()
    call(head(features), torch.arange(3)).backward()
    assert features.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


def test_zero_margin_is_scaled_cross_entropy() -> None:
    z, y = contract.cosines(6, CLASSES), torch.arange(6)
    assert torch.allclose(call(z, y, m=0.0), torch.nn.functional.cross_entropy(S * z, y), rtol=1e-12)


def test_contract() -> None:
    z, y = contract.cosines(8, CLASSES), contract.labels(8, CLASSES)
    for gradient in ("exact", "straight_through"):
        chosen = lambda z, y, gradient=gradient, **common: call(z, y, gradient, **common)  # noqa: E731
        contract.check_autograd(chosen, z, y)
        contract.check_backends_and_targets(chosen, z, y)
    contract.check_threads(call, torch.rand(300, CLASSES), torch.arange(300) % CLASSES)
    contract.check_ignored_and_nan(call, contract.cosines(4, CLASSES), torch.arange(4))
    contract.check_operator(3, None, None, [math.cos(M), math.sin(M), 0.0])


def test_permutation() -> None:
    z = torch.tensor([[0.5, -0.25, 0.75, 0.25], [0.125, 0.5, -0.5, 0.0]], dtype=torch.float64)
    contract.check_permutation(lambda counts: call, z, [4, 3, 2, 1])


def test_label_smoothing_uses_the_adjusted_logits() -> None:
    z, y = contract.cosines(6, CLASSES), torch.arange(6)
    a = S * z.clone()
    a[torch.arange(6), y] = S * torch.cos(torch.acos(z[torch.arange(6), y]) + M)
    expected = torch.nn.functional.cross_entropy(a, y, label_smoothing=0.2)
    assert torch.allclose(call(z, y, label_smoothing=0.2), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": -0.1}, "m is -0.1"),
        ({"m": 2.0}, "m is 2.0"),
        ({"s": 0.0}, "s is 0.0"),
        ({"gradient": "ste"}, "gradient is 'ste'"),
    ],
)
def test_bad_input(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ltk.nn.ArcFace(5, **options)
