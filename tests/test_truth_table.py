"""Promise: the truth table of special inputs, row by row: as torch's cross_entropy, or better."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import ltkernels as ltk

CE = ltk.functional.adjusted_cross_entropy
INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CLASSES = [3, 40, 3000]  # one register, several, several blocks


def run(z: torch.Tensor, y: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = z.detach().clone().requires_grad_()
    loss = CE(leaf, y, **options)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.fixture(params=CLASSES, ids=lambda classes: f"C={classes}")
def classes(request) -> int:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_all_minus_inf(dtype, classes) -> None:
    loss, grad = run(torch.full((1, classes), -INF, dtype=dtype), torch.tensor([1]))
    assert loss.isnan()
    assert grad.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_inf_at_the_target(dtype, classes) -> None:
    z = torch.zeros(1, classes, dtype=dtype)
    z[0, 1] = -INF
    loss, grad = run(z, torch.tensor([1]), weight=torch.full((classes,), 2.0), reduction="sum")
    assert loss == INF
    assert grad[0, 1] == -2.0
    assert torch.allclose(grad[0, 0].float(), torch.tensor(2.0 / (classes - 1)), rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_inf_elsewhere(dtype, classes) -> None:
    z = torch.randn(1, classes).to(dtype)
    z[0, 0] = -INF
    loss, grad = run(z, torch.tensor([2]))
    assert loss.isfinite()
    assert grad[0, 0] == 0.0
    assert grad.isfinite().all()
    assert grad[0, 2] < 0


def test_a_whole_masked_block() -> None:
    """2048 masked columns in front: a running maximum of -inf must not turn into NaN."""
    z = torch.full((1, 2100), -INF)
    z[0, 2050:] = torch.randn(50)
    loss, grad = run(z, torch.tensor([2060]))
    expected, expected_grad = run(z[:, 2050:], torch.tensor([10]))
    assert torch.allclose(loss, expected)
    assert torch.equal(grad[0, :2050], torch.zeros(2050))
    assert torch.allclose(grad[0, 2050:], expected_grad[0])


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("where", [0, 1, -1], ids=["before", "target", "last"])
def test_inf_or_nan_anywhere(value, where, classes) -> None:
    z = torch.randn(2, classes)
    z[0, where] = value
    y = torch.tensor([1, 1])
    loss, grad = run(z, y, reduction="none")
    assert loss[0].isnan()
    assert loss[1].isfinite()
    assert grad[0].isnan().all()
    assert grad[1].isfinite().all()


def test_all_rows_ignored(classes) -> None:
    z, y = torch.randn(3, classes), torch.full((3,), -100)
    loss, grad = run(z, y)
    assert loss.isnan()
    assert F.cross_entropy(z, y).isnan()
    assert torch.equal(grad, torch.zeros_like(z))
    assert run(z, y, reduction="batch_mean")[0].isnan()
    assert run(z, y, reduction="sum")[0] == 0
    assert torch.equal(run(z, y, reduction="none")[0], torch.zeros(3))


def test_empty_batch(classes) -> None:
    z, y = torch.empty(0, classes), torch.empty(0, dtype=torch.int64)
    assert run(z, y)[0].isnan()
    assert run(z, y, reduction="sum")[0] == 0
    loss, grad = run(z, y, reduction="none")
    assert loss.shape == (0,)
    assert grad.shape == (0, classes)


@pytest.mark.parametrize("bad", [-1, 99999, 2**40, -(2**62)])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_label_out_of_range(bad, backend, classes) -> None:
    z = torch.randn(4, classes, requires_grad=True)
    y = torch.tensor([0, 1, bad, 1])
    with pytest.raises(ValueError, match=rf"label {bad} in row 2.*\[0, {classes}\)"):
        CE(z, y, backend=backend)
    with pytest.raises(ValueError, match="second target.*row 2"):
        CE(z, (torch.zeros(4, dtype=torch.int64), y, 0.5), backend=backend)
    assert z.grad is None


def test_custom_ignore_index(classes) -> None:
    z, y = torch.randn(4, classes), torch.tensor([0, 1, 1, 2])
    loss, grad = run(z, y, ignore_index=1)
    keep = torch.tensor([0, 3])
    expected, _ = run(z[keep], y[keep])
    assert torch.equal(loss, expected)
    assert torch.equal(grad[1:3], torch.zeros(2, classes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_class(dtype) -> None:
    loss, grad = run(torch.randn(3, 1).to(dtype), torch.zeros(3, dtype=torch.int64))
    assert loss == 0
    assert torch.equal(grad, torch.zeros(3, 1, dtype=dtype))


def test_ignored_rows_hide_their_nan(classes) -> None:
    z = torch.randn(2, classes)
    z[0] = NAN
    loss, grad = run(z, torch.tensor([-100, 1]))
    assert loss.isfinite()
    assert torch.equal(grad[0], torch.zeros(classes))


def test_confident_rows_keep_their_gradient() -> None:
    """P_y - 1 would be 0 in float32; minus the sum of the others is not, and log1p keeps the loss."""
    z = torch.zeros(1, 10)
    z[0, 3] = 30.0
    loss, grad = run(z, torch.tensor([3]))
    expected = 9 * math.exp(-30.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert grad[0, 3].item() == pytest.approx(-expected, rel=1e-5)


def test_bf16_loss_is_float32() -> None:
    z = torch.zeros(1, 5000, dtype=torch.bfloat16)
    loss, _ = run(z, torch.tensor([0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(5000), rel=1e-6)


def test_more_than_2_to_the_31_elements() -> None:
    """Row 4 starts past 2^31 elements; the pages in between are never touched."""
    z = torch.empty(5, 2**29 + 7)[:, :1000]
    y = torch.arange(5) * 199
    for row in range(5):
        z[row] = torch.linspace(-1, 1, 1000) * (row + 1)
    loss = CE(z, y, reduction="none")
    assert torch.allclose(loss, F.cross_entropy(z.clone(), y, reduction="none"), rtol=1e-5)
