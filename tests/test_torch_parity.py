"""Promise: every input that torch's cross_entropy accepts gives torch's result, and gradients no worse than 1.5 times torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import ltkernels as ltk

CE = ltk.functional.adjusted_cross_entropy


def samples() -> list:
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [op for op in op_db if op.name == "nn.functional.cross_entropy"]
    return list(info.sample_inputs("cpu", torch.float64, requires_grad=True))


def test_opinfo_samples() -> None:
    cases = samples()
    assert len(cases) >= 20
    for case in cases:
        z, y, options = case.input, case.args[0] if case.args else case.kwargs["target"], dict(case.kwargs)
        options.pop("target", None)
        expected = F.cross_entropy(z, y, **options)
        actual = CE(z, y, **options)
        assert actual.shape == expected.shape, case
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-14, equal_nan=True), case
        leaves = [tensor for tensor in (z, y) if tensor.requires_grad]
        up = torch.rand_like(expected)
        for a, b in zip(torch.autograd.grad(actual, leaves, up), torch.autograd.grad(expected, leaves, up)):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-14, equal_nan=True), case


SHAPES = [
    ((5,), ()),
    ((4, 5), (4,)),
    ((2, 5, 3), (2, 3)),
    ((2, 5, 3, 4), (2, 3, 4)),
    ((0, 5), (0,)),
    ((2, 5, 0), (2, 0)),
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize(("shape", "labels"), SHAPES, ids=str)
def test_shapes(shape, labels, kind, reduction) -> None:
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 5, labels) if kind == "indices" else torch.softmax(torch.randn(shape, dtype=torch.float64), 0)
    for options in ({}, {"weight": torch.rand(5, dtype=torch.float64)}, {"label_smoothing": 0.2}):
        expected = F.cross_entropy(z, y, reduction=reduction, **options)
        actual = CE(z, y, reduction=reduction, **options)
        assert actual.shape == expected.shape
        assert torch.allclose(actual, expected, equal_nan=True)
        up = torch.rand_like(expected)
        (a,), (b,) = torch.autograd.grad(actual, z, up), torch.autograd.grad(expected, z, up)
        assert a.shape == z.shape
        assert torch.allclose(a, b)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("target", ["one", "mixed"])
def test_ignored_rows_need_no_class(target, reduction) -> None:
    z, y = torch.randn(3, 0, dtype=torch.float64, requires_grad=True), torch.zeros(3, dtype=torch.int64)
    expected = F.cross_entropy(z, y, reduction=reduction, ignore_index=0)
    for table in (None, torch.zeros(0, dtype=torch.float64)):
        actual = CE(z, y if target == "one" else (y, y, 0.5), reduction=reduction, ignore_index=0, margin=table)
        assert torch.equal(actual.nan_to_num(7), expected.nan_to_num(7))
        actual.sum().backward()
        assert z.grad.shape == (3, 0)


def test_integer_dtypes_of_labels() -> None:
    z = torch.randn(4, 5)
    y = torch.tensor([0, 4, 2, 1])
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        assert torch.equal(CE(z, y.to(dtype)), CE(z, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [10, 1000, 8142])
def test_gradient_error_against_torchs_own(dtype, classes) -> None:
    generator = torch.Generator().manual_seed(classes)
    z = (torch.randn(64, classes, generator=generator) * 4).to(dtype)
    y = torch.randint(0, classes, (64,), generator=generator)
    exact = z.double().requires_grad_()
    F.cross_entropy(exact, y, reduction="sum").backward()

    def error(function) -> float:
        leaf = z.clone().requires_grad_()
        function(leaf, y, reduction="sum").backward()
        return float((leaf.grad.double() - exact.grad).norm() / exact.grad.norm())

    assert error(CE) <= 1.5 * error(F.cross_entropy)
