"""Promise: an operator built by `_fused.Fused` gives torch's derivatives to whoever looks at it, and asks its kernel for what is needed."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ltkernels._call import MEAN, NONE
from ltkernels._errors import DTypeError
from ltkernels._fused import Fused, Request

ASKED: list[tuple[bool, ...]] = []


class Softplus(NamedTuple):
    """row_weight: (N,) real."""

    row_weight: Tensor
    sharpness: float = 1.0
    reduction: int = MEAN


def reference(inputs, call: Softplus):
    x, bias = inputs
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    a = x.to(real) if bias is None else x.to(real) + bias.to(real)
    rows = call.row_weight * torch.nn.functional.softplus(a * call.sharpness).sum(1)
    return (rows if call.reduction == NONE else rows.mean(),)


def kernel(inputs, call: Softplus, request: Request):
    ASKED.append(request.needs)
    outputs = reference(inputs, call)
    if not any(request.needs):
        return outputs, (None, None)
    x, bias = inputs
    rows = len(x)
    if call.reduction == NONE:
        upstream = request.upstream[0]
    else:
        upstream = torch.full((rows,), 1 / rows, dtype=outputs[0].dtype)
        if request.upstream is not None:
            upstream = upstream * request.upstream[0]
    a = x.to(outputs[0].dtype) if bias is None else x.to(outputs[0].dtype) + bias.to(outputs[0].dtype)
    grad = torch.sigmoid(a * call.sharpness) * call.sharpness * (call.row_weight * upstream)[:, None]
    return outputs, (grad if request.needs[0] else None, grad.sum(0) if request.needs[1] else None)


TOY = Fused(
    "toy_softplus",
    "Tensor x, Tensor? bias",
    Softplus,
    1,
    kernel,
    lambda inputs, call: [(len(inputs[0]),) if call.reduction == NONE else ()],
    reference,
)
X = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
BIAS = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
REDUCTIONS = {"mean": MEAN, "none": NONE}


def toy(x: Tensor, bias: Tensor | None, reduction: int = MEAN) -> Tensor:
    return TOY(
        (x, bias), Softplus(WEIGHT.to(torch.float64 if x.dtype == torch.float64 else torch.float32), 1.5, reduction)
    )[0]


def plain(x: Tensor, bias: Tensor | None, reduction: int = MEAN) -> Tensor:
    return reference((x, bias), Softplus(WEIGHT, 1.5, reduction))[0]


def grads(function, reduction: int, factor: float = 1.0):
    x, bias = X.clone().requires_grad_(), BIAS.clone().requires_grad_()
    loss = (
        function(x, bias, reduction) * torch.arange(1, 5) if reduction == NONE else function(x, bias, reduction)
    ).sum()
    return torch.autograd.grad(loss * factor, (x, bias))


@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
def test_reverse_mode(reduction, factor) -> None:
    for ours, exact in zip(grads(toy, reduction, factor), grads(plain, reduction, factor), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
def test_derivatives_that_no_kernel_has(reduction) -> None:
    def scalar(x, bias):
        return toy(x, bias, reduction).sum()

    def exact(x, bias):
        return plain(x, bias, reduction).sum()

    ones = torch.ones_like(X)
    torch.testing.assert_close(
        torch.func.jvp(scalar, (X, BIAS), (ones, BIAS))[1], torch.func.jvp(exact, (X, BIAS), (ones, BIAS))[1]
    )
    torch.testing.assert_close(torch.func.grad(scalar)(X, BIAS), torch.func.grad(exact)(X, BIAS))
    torch.testing.assert_close(torch.func.hessian(scalar)(X, BIAS), torch.func.hessian(exact)(X, BIAS))
    stacked = torch.stack([X, 2 * X])
    torch.testing.assert_close(
        torch.vmap(scalar, (0, None))(stacked, BIAS), torch.vmap(exact, (0, None))(stacked, BIAS)
    )
    assert torch.autograd.gradgradcheck(scalar, (X.clone().requires_grad_(), BIAS.clone().requires_grad_()))


@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("way", ["compile", "checkpoint", "twice", "batched"])
def test_who_looks_at_a_call(reduction, way) -> None:
    if way == "compile":
        compiled = torch.compile(toy, backend="aot_eager", fullgraph=True)
        found = grads(compiled, reduction)
    elif way == "checkpoint":
        found = grads(lambda *a: checkpoint(toy, *a, use_reentrant=False), reduction)
    else:
        x, bias = X.clone().requires_grad_(), BIAS.clone().requires_grad_()
        rows = toy(x, bias, reduction)
        loss = (rows * torch.arange(1, 5)).sum() if reduction == NONE else rows
        if way == "batched":
            batch = torch.autograd.grad(loss, (x, bias), torch.ones(2, dtype=X.dtype), is_grads_batched=True)
            found = [each[1] for each in batch]
        else:
            torch.autograd.grad(loss, (x, bias), retain_graph=True)
            found = torch.autograd.grad(loss, (x, bias))
    for ours, exact in zip(found, grads(plain, reduction), strict=True):
        torch.testing.assert_close(ours, exact)


def test_only_what_is_needed_is_asked_for() -> None:
    ASKED.clear()
    toy(X, BIAS)
    assert ASKED == [(False, False)]
    ASKED.clear()
    toy(X, BIAS.clone().requires_grad_()).backward()
    assert ASKED == [(False, True)]
    ASKED.clear()
    toy(X.clone().requires_grad_(), None, NONE).sum().backward()
    assert ASKED == [(False, False), (True, False)]


def test_half_precision_gradients_are_rounded_after_the_upstream_factor() -> None:
    x = (-10 + X).half().requires_grad_()
    (toy(x, None) * 2.0**16).backward()
    exact = x.detach().double().requires_grad_()
    (plain(exact, None) * 2.0**16).backward()
    torch.testing.assert_close(x.grad, exact.grad.half(), rtol=2e-3, atol=0)
    assert (x.grad != 0).all()


def test_a_dtensor_is_refused_by_name(monkeypatch) -> None:
    class Fake(Tensor):
        pass

    monkeypatch.setattr("ltkernels._fused.is_dtensor", lambda value: isinstance(value, Fake))
    with pytest.raises(DTypeError, match="row_weight is a DTensor"):
        TOY((X, BIAS), Softplus(WEIGHT.as_subclass(Fake)))
