"""Promise: DisAlign is its formula and learns nothing but its own parameters; ISDA's logits are those of a linear head of twice the width,
and the class variances are those of the samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels.functional import isda_head, linear_adjusted_cross_entropy

H = torch.tensor([[1.0, 0.5], [1.0, 0.5]], dtype=torch.float64)
W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)


# ---- DisAlign ------------------------------------------------------------------------------------------------------------


def aligned() -> ltk.nn.DisAlign:
    """alpha (1, 1.2, 1.5), beta (0, .1, .2), and a confidence of 0.7 for the feature 1."""
    align = ltk.nn.DisAlign(1, 3).double()
    with torch.no_grad():
        align.scale.copy_(torch.tensor([1.0, 1.2, 1.5]))
        align.shift.copy_(torch.tensor([0.0, 0.1, 0.2]))
        align.confidence.fill_(math.log(0.7 / 0.3))
    return align


def test_published_formula() -> None:
    z = torch.tensor([[1.0, 0.5, -0.5]], dtype=torch.float64)
    found = aligned()(z, torch.ones(1, 1, dtype=torch.float64))
    assert found[0].tolist() == pytest.approx([1.0, 0.64, -0.535], abs=1e-6)
    assert F.cross_entropy(found, torch.tensor([2])).item() == pytest.approx(2.183742, abs=1e-6)


def test_weights() -> None:
    weights = ltk.nn.DisAlign.class_weights
    assert weights([6, 3, 1]).tolist() == pytest.approx([0.161940, 0.458036, 2.380024], abs=1e-6)
    assert weights([6, 3, 1], rho=1.2).tolist() == pytest.approx([0.252457, 0.579994, 2.167549], abs=1e-6)
    assert weights([6, 3, 1], rho=0.0).tolist() == [1.0, 1.0, 1.0]
    assert weights([6, 0, 6], empty="ignore").tolist() == [1.0, 0.0, 1.0]
    assert weights([10**15, 1], rho=20.0).tolist() == [0.0, 2.0], "no power overflows"
    with pytest.raises(ValueError, match="rho is -1"):
        weights([1, 2], rho=-1.0)


def test_disalign_starts_as_the_identity_and_learns_its_own() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.randint(0, 3, (60,))
    network = torch.nn.Linear(4, 3)
    logits = network(x)
    align = ltk.nn.DisAlign(4, 3)
    assert torch.equal(align(logits, x), logits)
    criterion = ltk.nn.CrossEntropy(weight=ltk.nn.DisAlign.class_weights([30, 20, 10]))
    optimizer = torch.optim.SGD(align.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = criterion(align(logits.detach(), x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {name for name, _ in align.named_parameters()} == {"scale", "shift", "confidence"}
    assert align.confidence.abs().max() > 0
    assert network.weight.grad is None
    align.reset_parameters()
    assert torch.equal(align(logits, x), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_disalign_dtypes(dtype) -> None:
    align, z, x = aligned(), torch.randn(5, 3).to(dtype), torch.randn(5, 1).to(dtype)
    found = align.float()(z, x)
    assert found.dtype == dtype
    expected = aligned()(z.double(), x.double())
    assert torch.allclose(found.double(), expected, rtol=torch.finfo(dtype).eps * 2, atol=torch.finfo(dtype).eps * 2)
    leaf = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(aligned(), (leaf, features))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 4), torch.ones(2, 1)), ValueError, r"logits has shape \(2, 4\); it must be \(N, 3\)"),
        ((torch.ones(2, 3), torch.ones(2, 2)), ValueError, r"features has shape \(2, 2\)"),
        ((torch.ones(2, 3), torch.ones(1, 1)), ValueError, "logits has 2 rows, features 1"),
        ((torch.ones(2, 3).int(), torch.ones(2, 1)), TypeError, "logits is torch.int32"),
        ((torch.ones(2, 3), [1.0, 2.0]), TypeError, "features is list"),
    ],
)
def test_disalign_bad_input(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        ltk.nn.DisAlign(1, 3)(*arguments)
    with pytest.raises(ValueError, match="num_features is 0"):
        ltk.nn.DisAlign(0, 3)


# ---- ISDA ----------------------------------------------------------------------------------------------------------------


def isda_logits(h, w, y, variance, lam):
    """The definition, with its N x C x D tensor."""
    difference = w[None] - w[y][:, None]
    return h @ w.T + lam / 2 * (difference**2 * variance[y][:, None]).sum(dim=2)


def test_isda_values() -> None:
    y = torch.tensor([0, 2])
    variance = torch.tensor([0.2, 0.4], dtype=torch.float64)
    a = isda_logits(H, W, y, variance.expand(3, 2), 0.5)
    assert a[0].tolist() == pytest.approx([1.0, 0.65, -0.2], abs=1e-6)
    assert a[1].tolist() == pytest.approx([1.3, 0.55, -0.5], abs=1e-6)
    wide, weights = isda_head(H, W, y, variance, 0.5)
    assert (wide.shape, weights.shape) == ((2, 4), (3, 4))
    losses = linear_adjusted_cross_entropy(wide, weights, y, reduction="none")
    assert losses.tolist() == pytest.approx([0.696084, 2.293272], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_isda_is_its_definition(dtype) -> None:
    torch.manual_seed(0)
    h, w, bias = torch.randn(40, 6).to(dtype), torch.randn(11, 6).to(dtype), torch.randn(11).to(dtype)
    variance, y = torch.rand(11, 6, dtype=torch.float64), torch.randint(0, 11, (40,))
    wide, weights = isda_head(h, w, y, variance, 0.4)
    a = isda_logits(h.double(), w.double(), y, variance, 0.4)
    ours = wide.double() @ weights.double().T
    gap = (ours - a) - (ours - a)[:, :1]
    tolerance = {torch.float64: 1e-14, torch.float32: 5e-6, torch.bfloat16: 0.2}[dtype]
    assert gap.abs().max() < tolerance, "the same up to a number of the row"
    loss = linear_adjusted_cross_entropy(wide, weights, y, bias=bias, chunk_rows=16)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    assert loss.item() == pytest.approx(F.cross_entropy(a + bias.double(), y).item(), abs=tolerance)


def test_isda_gradients() -> None:
    torch.manual_seed(1)
    h, w = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    variance, y = torch.rand(5, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 5, (7,))
    loss = linear_adjusted_cross_entropy(*isda_head(h, w, y, variance, 0.3), y)
    found = torch.autograd.grad(loss, (h, w))
    expected = torch.autograd.grad(F.cross_entropy(isda_logits(h, w, y, variance.detach(), 0.3), y), (h, w))
    for one, two in zip(found, expected):
        assert torch.allclose(one, two, rtol=1e-11, atol=1e-14)
    ignored = torch.where(torch.arange(7) == 2, -100, y)
    loss = linear_adjusted_cross_entropy(*isda_head(h, w, ignored, variance, 0.3), ignored)
    kept = torch.arange(7) != 2
    expected_loss = F.cross_entropy(isda_logits(h, w, y, variance, 0.3)[kept], y[kept])
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    wide = isda_head(h, w, y, variance, 0.0)[0]
    assert torch.equal(wide[:, :4], h)
    assert torch.equal(wide[:, 4:], torch.zeros(7, 4, dtype=torch.float64))
    assert isda_head(h[:0], w, y[:0], variance, 0.1)[0].shape == (0, 8)


def test_class_variances() -> None:
    torch.manual_seed(2)
    x, y = torch.randn(200, 3) * 5 + 1e4, torch.randint(0, 4, (200,))
    y[y == 3] = 5  # class 3 has no sample
    y[7], y[9] = -100, 6
    found = ltk.nn.ClassVariances(3, 6)
    for part in (slice(0, 50), slice(50, 50), slice(50, 51), slice(51, 200)):
        found.update(x[part], y[part])
    for c in range(6):
        own = x[y == c].double()
        assert found.count[c] == len(own)
        expected = own.var(dim=0, correction=0) if len(own) else torch.zeros(3).double()
        assert torch.allclose(found.variance[c], expected, rtol=1e-10)
    other = ltk.nn.ClassVariances(3, 6)
    other.load_state_dict(found.state_dict())
    assert torch.equal(other.half().variance, found.variance)
    before = found.variance.clone()
    with pytest.raises(ValueError, match="features holds NaN or infinity, first in row 1"):
        found.update(torch.tensor([[0.0] * 3, [math.nan] * 3]), torch.tensor([0, 0]))
    assert torch.equal(found.variance, before)


def test_the_whole_recipe_trains() -> None:
    torch.manual_seed(3)
    y = torch.arange(90) % 3
    x = F.one_hot(y, 3).float() * 2 + torch.randn(90, 3)
    head, variances = torch.nn.Linear(3, 3), ltk.nn.ClassVariances(3, 3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    losses = []
    for step in range(30):
        variances.update(x, y)
        wide, weights = isda_head(x, head.weight, y, variances.variance, 0.5 * step / 30)
        loss = linear_adjusted_cross_entropy(wide, weights, y, bias=head.bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(F.cross_entropy(head(x), y).item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lam": -1.0}, ValueError, "lam is -1.0"),
        ({"variance": torch.ones(3, 3)}, ValueError, r"variance has shape \(3, 3\); it must be \(3, 2\) or \(2,\)"),
        ({"features": H.float()}, TypeError, "features has dtype torch.float32, weight torch.float64"),
        ({"weight": torch.ones(3, 3).double()}, ValueError, "features has shape"),
        ({"target": torch.tensor([0.0, 1.0])}, ValueError, "target is torch.float32"),
        ({"target": torch.tensor([0])}, ValueError, "target is torch.int64"),
        ({"variance": 0.5}, TypeError, "variance is float"),
    ],
)
def test_isda_bad_input(change, error, message) -> None:
    given = {"features": H, "weight": W, "target": torch.tensor([0, 2]), "variance": torch.ones(2), "lam": 0.5}
    with pytest.raises(error, match=message):
        isda_head(**{**given, **change})
