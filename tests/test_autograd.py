"""Promise: the autograd contract. Every gradient exact, whatever the upstream, how often, and for whichever input."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels._call import Call

CE = ltk.functional.adjusted_cross_entropy
ROWS, CLASSES = 7, 13
TABLES = {
    "shift": torch.linspace(-2, 0, CLASSES),
    "scale": torch.linspace(0.5, 1.5, CLASSES),
    "margin": torch.linspace(0, 1, CLASSES),
    "row_scale": torch.linspace(0.8, 2, CLASSES),
    "weight": torch.linspace(0.2, 3, CLASSES),
}


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    y[3] = -100
    return z, y


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_twice_with_different_upstreams(data, reduction) -> None:
    z, y = data
    loss = CE(z, y, reduction=reduction, **TABLES)
    (one,) = torch.autograd.grad(loss, z, retain_graph=True)
    (three,) = torch.autograd.grad(loss, z, torch.tensor(3.0, dtype=torch.float64), retain_graph=True)
    (again,) = torch.autograd.grad(loss, z)
    assert one.abs().max() > 0
    assert torch.equal(three, one * 3)
    assert torch.equal(again, one)


def test_editing_a_gradient_does_not_reach_the_second_backward(data) -> None:
    """The first backward gives its gradient away; a second one computes it again, bit for bit."""
    z, y = data
    loss = CE(z, y)
    (one,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = one.clone()
    one.mul_(10)
    (again,) = torch.autograd.grad(loss, z)
    assert torch.equal(again, kept)


def test_leaf_gradients_are_not_copied() -> None:
    """`.grad` takes the kernel's own memory over: a copy would cost a pass over the logits."""
    z, y = torch.randn(64, 500, requires_grad=True), torch.arange(64)
    with torch.profiler.profile(profile_memory=True) as profile:
        CE(z, y).backward()
    copies = [
        event
        for event in profile.events()
        if event.name in ("aten::clone", "aten::copy_") and event.cpu_memory_usage > 64 * 500
    ]
    assert not copies
    assert z.grad.abs().max() > 0


def test_vector_upstream(data) -> None:
    z, y = data
    up = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    loss = CE(z, y, reduction="none", **TABLES)
    (got,) = torch.autograd.grad(loss, z, up, retain_graph=True)
    rows = [torch.autograd.grad(loss[i], z, retain_graph=True)[0] for i in range(ROWS)]
    assert torch.allclose(got, sum(u * g for u, g in zip(up, rows)), rtol=1e-14, atol=0)
    assert torch.equal(got[3], torch.zeros(CLASSES, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_upstream_that_16_bits_cannot_hold(dtype) -> None:
    """1/3 is rounded in float32, not first to the logits' dtype; float16 gradients are rounded only after it."""
    z, y = torch.randn(5, 9).to(dtype).requires_grad_(), torch.arange(5)
    loss = CE(z, y, reduction="sum")
    (unit,) = torch.autograd.grad(loss, z, retain_graph=True)
    (third,) = torch.autograd.grad(loss, z, torch.tensor(1 / 3))
    assert third.dtype == dtype
    if dtype == torch.float16:
        rows = CE(z, y, reduction="none")
        (expected,) = torch.autograd.grad(rows, z, torch.full((5,), 1 / 3))
    else:
        expected = (unit.float() * torch.tensor(1 / 3)).to(dtype)
    assert torch.equal(third, expected)


def test_gradcheck(data) -> None:
    z, y = data
    for reduction in ("none", "mean", "batch_mean", "sum"):
        options = {"reduction": reduction, "focal_gamma": 1.5, "label_smoothing": 0.1}
        assert torch.autograd.gradcheck(lambda z, r=options: CE(z, y, **TABLES, **r), (z,))


def test_double_backward_is_exact(data) -> None:
    z, y = data
    assert torch.autograd.gradgradcheck(lambda z: CE(z, y, **TABLES), (z,))
    assert torch.autograd.gradgradcheck(lambda z: CE(z, y, reduction="none", label_smoothing=0.1), (z,))


def test_double_backward_reaches_what_the_logits_came_from(data) -> None:
    """A gradient penalty: the first gradient as a function of the features."""
    _, y = data
    features = torch.randn(ROWS, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(CLASSES, 4, dtype=torch.float64, requires_grad=True)

    def penalty(loss_of):
        (grad,) = torch.autograd.grad(loss_of(features @ weight.t()), features, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (features, weight))

    ours = penalty(lambda z: CE(z, y))
    theirs = penalty(lambda z: F.cross_entropy(z, y))
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=1e-10)


def test_no_gradient_wanted(data) -> None:
    z, y = data
    with torch.no_grad():
        assert not CE(z, y).requires_grad
    assert not CE(z.detach(), y).requires_grad


def test_public_functions_go_through_autograd(data) -> None:
    """The raw operator carries no gradient: a loss that came from it directly would detach silently."""
    z, y = data
    counts = list(range(1, CLASSES + 1))
    for record in ltk.LOSSES.values():
        loss = record.make(counts)(z, y)
        assert loss.requires_grad, record.name
        (grad,) = torch.autograd.grad(loss, z)
        assert grad.abs().max() > 0, record.name


def test_inputs_are_not_written(data) -> None:
    z, y = data
    before = z.detach().clone()
    version = z._version
    CE(z, y).backward()
    assert torch.equal(z, before)
    assert z._version == version


def test_inplace_bumps_the_version_counter() -> None:
    base = torch.randn(5, 8, requires_grad=True)
    y = torch.arange(5)
    (expected,) = torch.autograd.grad(CE(base * 1.0, y), base)
    z = base * 1.0
    saved = z.exp()  # saves its result, not z
    loss = CE(z, y, inplace=True)
    assert z._version == 1
    (grad,) = torch.autograd.grad(loss, base)
    assert torch.equal(grad, expected)
    assert saved.requires_grad

    z = base * 1.0
    other = z.square().sum()  # saves z
    loss = CE(z, y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_inplace_refusals() -> None:
    z, y = torch.randn(5, 8, requires_grad=True), torch.arange(5)
    with pytest.raises(ValueError, match=r"inplace=True is not possible: reduction='none'"):
        CE(z, y, inplace=True, reduction="none")
    with pytest.raises(ValueError, match="inplace=True is not possible: the torch backend"):
        CE(z, y, inplace=True, backend="torch")
    doubled = z * 1.0
    with pytest.raises(RuntimeError, match="double backward needs the logits"):
        torch.autograd.grad(CE(doubled, y, inplace=True), z, create_graph=True)


def test_inplace_layouts() -> None:
    base = torch.randn(8, 5).t()  # (5, 8), class stride 5
    y = torch.arange(5)
    z = base.clone().requires_grad_()
    CE(z, y).backward()
    strided = base.requires_grad_() * 1.0
    (grad,) = torch.autograd.grad(CE(strided, y, inplace=True), strided)
    assert torch.equal(grad, z.grad)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_func_transforms(data, backend) -> None:
    z, y = data
    assert torch.allclose(
        torch.func.grad(lambda z: CE(z, y, backend=backend))(z.detach()),
        torch.autograd.grad(CE(z, y), z)[0],
        rtol=1e-12,
    )
    with pytest.raises(ValueError, match="backend='cpu' cannot serve this call: a function transform"):
        torch.func.grad(lambda z: CE(z, y, backend="cpu"))(z.detach())


def test_autocast_gives_a_float32_loss() -> None:
    features, weight = torch.randn(6, 4), torch.randn(9, 4, requires_grad=True)
    y = torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = features @ weight.t()
        loss = CE(logits, y)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.abs().max() > 0


def test_opcheck() -> None:
    """torch's own checks of schema, fake implementation and dispatch, on layouts that give them something to find."""
    op = torch.ops.ltkernels.adjusted_ce.default
    y = torch.tensor([0, 2, -100, 4])
    call = Call(y, label_smoothing=0.1)
    no_tables = [False] * 5
    for z in (
        torch.randn(4, 5),
        torch.randn(5, 4).t(),  # dense, permuted
        torch.randn(4, 10)[:, ::2],
        torch.randn(4, 9)[:, 2:7],
        torch.randn(4, 5, dtype=torch.float64),
        torch.randn(4, 5).bfloat16(),
    ):
        for reduction in (0, 1):
            for need_grad in (True, False):
                reduced = call._replace(reduction=reduction)
                torch.library.opcheck(op, (z, *reduced, need_grad, no_tables))
            torch.library.opcheck(op, (z.clone().requires_grad_(), *reduced, False, no_tables))  # keeps the gradient
        torch.library.opcheck(torch.ops.ltkernels.adjusted_ce_.default, (z.clone(), *call, no_tables))
    for rows, classes in ((0, 5), (1, 1)):  # "sum": the mean of no rows is NaN, which opcheck finds unequal to itself
        zeros = Call(torch.zeros(rows, dtype=torch.int64), reduction=3)
        torch.library.opcheck(op, (torch.randn(rows, classes), *zeros, True, no_tables))
