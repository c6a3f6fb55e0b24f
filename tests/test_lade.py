"""Promise: LADER and LADE are their formulas, in both forms of the importance weights, with the gradient of the formula."""

from __future__ import annotations

import math

import pytest
import torch

import ltkernels as ltk
from ltkernels.functional import lader
from ltkernels.losses import lade

Z = torch.tensor([[1.0, 0.5, -0.5], [0.2, 0.8, 0.0], [0.0, 0.3, 1.0], [0.5, -0.2, 0.1]], dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0])
PI = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
COUNTS = [6, 3, 1]


def plain(z, y, prior, lam, importance) -> float:
    """By hand, a class and a row at a time."""
    total = 0.0
    for c in range(z.shape[1]):
        weight = [1 / (len(prior) * float(prior[c if importance == "class" else y[i]])) for i in range(len(y))]
        h = math.log(sum(w * math.exp(float(z[i, c])) for i, w in enumerate(weight)) / len(y))
        own = [float(z[i, c]) for i in range(len(y)) if int(y[i]) == c]
        total -= float(prior[c]) * ((sum(own) / len(own) if own else 0.0) - h - lam * h * h)
    return total


def test_estimates_of_the_partition() -> None:
    """The h of both forms: LADER of one class alone, whose share is 1, without its first term."""
    for importance, expected in (
        ("class", (-0.088770, 0.517942, 1.509615)),
        ("sample", (0.576130, 0.735148, 1.022720)),
    ):
        for c, h in enumerate(expected):
            one = lader(Z, Y, PI, 0.0, importance)
            other = lader(Z + torch.nn.functional.one_hot(torch.tensor(c), 3), Y, PI, 0.1, importance)
            # A shift of a column by 1 moves its mean and its h by 1: what is left of the difference is lam (h + 1)^2, and the others'.
            rest = sum(float(PI[k]) * 0.1 * expected[k] ** 2 for k in range(3) if k != c)
            assert (other - one - rest).item() == pytest.approx(float(PI[c]) * 0.1 * (h + 1) ** 2, abs=1e-6)


def test_fake_tensors_and_tracers_pass() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        z = mode.from_tensor(Z).requires_grad_()
        lader(z, Y, PI).backward()
        assert z.grad.shape == Z.shape
    traced = make_fx(torch.func.grad(lambda z: lader(z, Y, PI)))(Z)
    z = Z.clone().requires_grad_()
    lader(z, Y, PI).backward()
    torch.testing.assert_close(traced(Z), z.grad, rtol=1e-12, atol=0)


def test_values() -> None:
    assert lader(Z, Y, PI, 0.1, "class").item() == pytest.approx(-0.505608, abs=1e-6)
    assert lader(Z, Y, PI, 0.1, "sample").item() == pytest.approx(-0.074917, abs=1e-6)


@pytest.mark.parametrize("importance", lade.IMPORTANCE)
def test_formula_and_gradient(importance) -> None:
    torch.manual_seed(0)
    z, y = torch.randn(9, 5, dtype=torch.float64), torch.tensor([0, 0, 3, 4, 4, 4, 0, 3, 0])  # 1 and 2 are absent
    prior = torch.tensor([0.4, 0.05, 0.25, 0.2, 0.1], dtype=torch.float64)
    assert lader(z, y, prior, 0.3, importance).item() == pytest.approx(plain(z, y, prior, 0.3, importance), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: lader(x, y, prior, 0.3, importance), z.clone().requires_grad_())
    order = torch.tensor([3, 1, 0, 4, 2])
    permuted = lader(z[:, order], torch.argsort(order)[y], prior[order], 0.3, importance)
    assert permuted.item() == pytest.approx(lader(z, y, prior, 0.3, importance).item(), rel=1e-12)


@pytest.mark.parametrize("importance", lade.IMPORTANCE)
def test_special_rows_and_classes(importance) -> None:
    ignored = torch.cat([Z, torch.full((2, 3), 7.0)]), torch.cat([Y, torch.tensor([-100, -100])])
    expected = lader(Z, Y, PI, 0.1, importance)
    assert lader(*ignored, PI, 0.1, importance).item() == pytest.approx(expected.item(), rel=1e-14)
    pixels = Z.reshape(2, 2, 3).transpose(1, 2), Y.reshape(2, 2)
    assert lader(*pixels, PI, 0.1, importance).item() == pytest.approx(expected.item(), rel=1e-14)
    z = Z.clone().requires_grad_()
    for rows in (z[:0], z):
        nothing = lader(rows, torch.full((len(rows),), -100), PI, 0.1, importance)
        assert nothing == 0
        nothing.backward()
    assert torch.equal(z.grad, torch.zeros_like(z))
    # A class that is removed everywhere, or has no share, is left out.
    removed = torch.cat([Z, torch.full((4, 1), -math.inf)], 1).requires_grad_()
    wide = torch.tensor([0.6, 0.3, 0.1, 0.5], dtype=torch.float64)
    for prior in (wide, wide * torch.tensor([1, 1, 1, 0])):
        loss = lader(removed, Y, prior, 0.0, importance)
        shift = math.log(4 / 3) * PI.sum().item()  # 1 / C is another one
        assert loss.item() == pytest.approx(lader(Z, Y, PI, 0.0, importance).item() - shift, abs=1e-12)
        (grad,) = torch.autograd.grad(loss, removed)
        assert grad.isfinite().all()
    large = lader(Z * 1000, Y, PI, 0.1, importance)
    assert large.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype) -> None:
    z = Z.to(dtype).requires_grad_()
    loss = lader(z, Y, PI.float(), 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(lader(z.detach().double(), Y, PI, 0.1).item(), abs=1e-6)
    loss.backward()
    assert z.grad.dtype == dtype


@pytest.mark.parametrize("importance", lade.IMPORTANCE)
def test_module(importance) -> None:
    loss = ltk.nn.LADE(COUNTS, alpha=0.7, lam=0.1, importance=importance, table_dtype=torch.float64)
    z = Z.clone().requires_grad_()
    value = loss(z, Y)
    expected = torch.nn.functional.cross_entropy(Z + PI.log(), Y) + 0.7 * lader(Z, Y, PI, 0.1, importance)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: loss(x, Y), z)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, Y), z)
    assert ltk.nn.LADE(COUNTS, alpha=0.0)(Z, Y).item() == pytest.approx(ltk.nn.BalancedSoftmax(COUNTS)(Z, Y).item())
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert step(Z, Y).item() == pytest.approx(expected.item(), rel=1e-12)
    features, weight = torch.randn(4, 2).double(), torch.randn(3, 2).double()
    for normalize in (False, True):
        unit = torch.nn.functional.normalize if normalize else (lambda x, dim=-1: x)
        logits = unit(features, dim=-1) @ unit(weight, dim=-1).T
        assert loss.from_features(features, weight, Y, normalize=normalize).item() == pytest.approx(
            loss(logits, Y).item()
        )
    empty = ltk.nn.LADE([6, 3, 0], empty="ignore")
    assert empty(Z, Y.where(Y != 2, 0)).isfinite()


def test_state_dict() -> None:
    loss = ltk.nn.LADE(COUNTS)
    other = ltk.nn.LADE(COUNTS)
    other.load_state_dict(loss.state_dict())
    with pytest.raises(ValueError, match="class_counts"):
        ltk.nn.LADE([6, 3, 2]).load_state_dict(loss.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ltk.nn.LADE(COUNTS, alpha=-1.0), ValueError, "alpha is -1.0"),
        (lambda: ltk.nn.LADE(COUNTS, importance="row"), ValueError, "importance is 'row'"),
        (lambda: ltk.nn.LADE(COUNTS)(Z, Y, reduction="none"), ValueError, "reduction is 'none'"),
        (lambda: ltk.nn.LADE(COUNTS, reduction="sum")(Z, Y), ValueError, "reduction is 'sum'"),
        (lambda: ltk.nn.LADE(COUNTS)(Z, (Y, Y, 0.5)), TypeError, "target is mixed"),
        (lambda: ltk.nn.LADE(COUNTS)(Z, Y, inplace=True), ValueError, "inplace is True"),
        (lambda: lader(Z, torch.softmax(Z, 1), PI), TypeError, "target is mixed or holds probabilities"),
        (lambda: lader(Z, Y + 1, PI), ValueError, "target has label 3 in row 2"),
        (lambda: lader(Z, Y, -PI), ValueError, r"prior\[0\] is -0.6"),
        (lambda: lader(Z, Y, PI[:2]), ValueError, r"prior has shape \(2,\)"),
        (lambda: lader(Z, Y, PI, lam=-1.0), ValueError, "lam is -1.0"),
        (lambda: lader(Z[0], Y[0], PI), ValueError, r"logits has shape \(3,\)"),
        (lambda: lader(Z.int(), Y, PI), TypeError, "logits has dtype torch.int32"),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
