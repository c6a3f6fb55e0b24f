"""The promises that every loss outside the five vectors keeps, as functions; each test file brings its own float64 reference.

A reference maps float64 logits (N, C) and labels (N,) to (row losses, row gradients, size): size (N,) is the largest number whose
rounding error reaches the row's exponents, for the tolerance table of `oracle`.
"""

from __future__ import annotations

from collections.abc import Callable

import oracle
import torch
from torch import Tensor

import ltkernels as ltk
from ltkernels import _call as ltk_call

Call = Callable[..., Tensor]  # (logits, target, **common) -> loss
Reference = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

DTYPES = list(oracle.TOLERANCES)
HALVES = (torch.bfloat16, torch.float16)
REDUCTIONS = ["mean", "batch_mean", "sum", "none"]
COUNTS = [900, 2, 310, 17, 55, 4, 120, 1200, 9, 33, 700, 26, 3, 81, 210, 14, 6, 450, 40, 11, 5]  # not sorted
CLASSES = len(COUNTS)
DRAWING = ("gcl", "softmax_equalization")  # losses with random numbers of each call


def seeded(name: str) -> dict[str, int]:
    """Options that make two calls of a loss one: the same random numbers."""
    return {"seed": 7} if name in DRAWING else {}


def hostile_logits(rows: int, classes: int, scale: float = 3.0) -> Tensor:
    """Ordinary, confident, wrong, shifted and masked rows; float64 values that every dtype but bfloat16 and float16 holds."""
    generator = torch.Generator().manual_seed(classes)
    z = (torch.randn(rows, classes, generator=generator) * scale).double()
    z[0, 3 % classes] += 40.0  # confident
    z[1, 3 % classes] += 25.0  # confident and wrong
    z[4] += 100.0
    if classes > 2:
        z[2, 1] = -torch.inf
    return z


def cosines(rows: int, classes: int) -> Tensor:
    """Cosines in (-1, 1), some of them next to both ends."""
    generator = torch.Generator().manual_seed(classes)
    z = (torch.rand(rows, classes, generator=generator) * 1.9 - 0.95).double()
    z[0, 3 % classes], z[1, 0] = 0.996, -0.998
    return z


def labels(rows: int, classes: int) -> Tensor:
    y = torch.arange(rows) * 7 % classes
    y[0] = 3 % classes
    y[1] = y[4] = 0
    y[rows - 2] = -100
    return y


def with_tables(built, z: Tensor, y, **common) -> Tensor:
    """The functional form of a loss: the op with what its builder made."""
    return ltk.functional.adjusted_cross_entropy(z, y, **{**built._asdict(), **common})


def gradient(call: Call, z: Tensor, y, upstream: Tensor | float | None = None, **common) -> tuple[Tensor, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    loss = call(leaf, y, **common)
    up = torch.ones_like(loss) if upstream is None else torch.as_tensor(upstream, dtype=loss.dtype).expand_as(loss)
    loss.backward(up)
    return loss.detach(), leaf.grad


def check_values(
    call: Call,
    reference: Reference,
    z: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    reduction: str,
    weight: Tensor | None = None,
) -> None:
    """Loss and gradient against the reference; the upstream gradient is not 1. For a scalar loss of bfloat16 logits it multiplies a
    gradient that was rounded already: so it is a power of two."""
    z = z.to(dtype)
    valid = y != -100
    losses, grads, size = reference(z.double(), torch.where(valid, y, 0))
    alpha = torch.ones(z.shape[1], dtype=torch.float64) if weight is None else weight.double()
    row = torch.where(valid, alpha[torch.where(valid, y, 0)], 0.0)
    losses, grads = torch.where(valid, row * losses, 0.0), torch.where(valid[:, None], row[:, None] * grads, 0.0)
    denominator = {"mean": row.sum(), "batch_mean": valid.sum(), "sum": 1.0, "none": 1.0}[reduction]
    upstream = torch.linspace(0.5, 2.0, len(y)) if reduction == "none" else torch.tensor(0.25)
    expected = grads / denominator * upstream.double().expand(len(y))[:, None]
    expected_loss = losses if reduction == "none" else losses.sum() / denominator
    loss, grad = gradient(call, z, y, upstream, reduction=reduction)
    oracle.assert_loss(loss, expected_loss, size, dtype)
    assert grad.dtype == dtype
    oracle.assert_gradient(grad, expected, size, y)


def check_autograd(call: Call, z: Tensor, y: Tensor) -> None:
    """Backward twice, vector upstream, double backward, frozen logits, inputs untouched, in place."""
    leaf = z.detach().clone().requires_grad_()
    loss = call(leaf, y)
    (one,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (three,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0, dtype=loss.dtype), retain_graph=True)
    assert one.abs().max() > 0
    assert torch.equal(three, 3 * one)
    assert torch.equal(leaf, z)
    assert torch.equal(call(z, y), loss.detach())

    rows = call(leaf, y, reduction="none")
    up = torch.linspace(-1, 2, len(y), dtype=rows.dtype)
    (vector,) = torch.autograd.grad(rows, leaf, up, retain_graph=True)
    (total,) = torch.autograd.grad((call(leaf, y, reduction="none") * up).sum(), leaf)
    assert torch.equal(vector, total)

    def second(backend: str) -> Tensor:
        (first,) = torch.autograd.grad(call(leaf, y, backend=backend), leaf, create_graph=True)
        (result,) = torch.autograd.grad((first * torch.linspace(-1, 1, z.shape[1], dtype=z.dtype)).sum(), leaf)
        return result

    assert second("torch").abs().max() > 0
    assert torch.allclose(second("cpu"), second("torch"), rtol=1e-10, atol=1e-14)

    base = z.detach().clone().requires_grad_()
    overwritten = base * 1.0
    version = overwritten._version
    in_place = call(overwritten, y, inplace=True)
    in_place.backward()
    assert overwritten._version > version
    assert torch.equal(in_place, loss)
    assert torch.equal(base.grad, one)


def check_backends_and_targets(call: Call, z: Tensor, y: Tensor) -> None:
    """The torch reference gives what the kernel gives; mixed labels are the blend; shapes and strides do not matter."""
    second, lam = (y + 1).clamp(min=0) % z.shape[1], torch.linspace(0.1, 0.9, len(y), dtype=z.dtype)
    for target in (y, (y, second, lam)):
        for reduction in REDUCTIONS:
            (a, da), (b, db) = (gradient(call, z, target, backend=x, reduction=reduction) for x in ("cpu", "torch"))
            assert torch.allclose(a, b, rtol=1e-12)
            assert torch.allclose(da, db, rtol=1e-9, atol=1e-13)
            assert db.abs().max() > 0
    mixed, _ = gradient(call, z, (y, second, lam), reduction="none")
    kept = y != -100
    blend = lam * call(z, y, reduction="none") + (1 - lam) * call(z, torch.where(kept, second, -100), reduction="none")
    assert torch.allclose(mixed, blend, rtol=1e-12)

    loss, grad = gradient(call, z, y)
    for layout in (z.t().contiguous().t(), torch.cat([z, z], 1)[:, : z.shape[1]], torch.cat([z[:1], z])[1:]):
        leaf = layout.detach().requires_grad_()
        other = call(leaf, y)
        other.backward()
        assert torch.equal(other, loss)
        assert torch.equal(leaf.grad, grad)
    rows = (len(y) // 2) * 2
    images = z[:rows].reshape(rows // 2, 2, -1).transpose(1, 2)
    pixels, pixel_grad = gradient(call, images, y[:rows].reshape(-1, 2), reduction="none")
    flat, flat_grad = gradient(call, z[:rows], y[:rows], reduction="none")
    assert torch.equal(pixels.reshape(-1), flat)
    assert torch.equal(pixel_grad.transpose(1, 2).reshape(rows, -1), flat_grad)


def check_threads(call: Call, z: Tensor, y: Tensor) -> None:
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(gradient(call, z, y))
    torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def check_permutation(make: Callable[[list[int]], Call], z: Tensor, counts: list[int]) -> None:
    """New class k is old class order[k]: the gradient follows, to the last bits that the order of a sum leaves."""
    order = torch.tensor([3, 1, 0, 2])
    rank = torch.argsort(order)
    y = torch.tensor([2, 3])
    _, one = gradient(make(counts), z, y)
    _, two = gradient(make([counts[k] for k in order.tolist()]), z[:, order], rank[y])
    assert torch.allclose(two, one[:, order], rtol=1e-14, atol=0)
    assert not torch.allclose(two, one, rtol=1e-3), "the permutation must matter"


def check_ignored_and_nan(call: Call, z: Tensor, y: Tensor) -> None:
    """All rows ignored, an empty batch, NaN in one row, -inf at a class that is not the label."""
    nothing = torch.full_like(y, -100)
    loss, grad = gradient(call, z, nothing)
    assert loss.isnan()
    assert torch.equal(grad, torch.zeros_like(z))
    assert gradient(call, z, nothing, reduction="sum")[0] == 0
    loss, grad = gradient(call, z[:0], y[:0], reduction="none")
    assert loss.shape == (0,)
    assert grad.shape == (0, z.shape[1])

    z, y = z[:3].clone(), torch.tensor([0, 0, 0])
    z[1, 2] = torch.nan
    loss, grad = gradient(call, z, y, reduction="none")
    assert loss.isfinite().tolist() == [True, False, True]
    assert grad[[0, 2]].isfinite().all()
    assert grad[1, 2].isnan()

    z[1, 2] = -torch.inf
    loss, grad = gradient(call, z, y, reduction="none")
    assert loss.isfinite().all()
    assert grad[1, 2] == 0
    assert grad.isfinite().all()


def check_operator(form: int, table: Tensor | None, seed: Tensor | None, options: list[float]) -> None:
    """opcheck of the raw operator on dense, permuted, single and empty logits."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for z in (torch.rand(4, 5), torch.rand(5, 4).t(), torch.rand(1, 5), torch.rand(0, 5)):
        record = ltk_call.Call(
            torch.arange(z.shape[0]), table=table, seed=seed, reduction=3, form=form, form_options=tuple(options)
        )
        operands = (z, *record, True, [False] * 5)
        torch.library.opcheck(torch.ops.ltkernels.adjusted_ce.default, operands, test_utils=tests)
