"""Promise: class probabilities and teachers' logits get the loss and gradient of their formulas, from a kernel that reads them once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

CE = ltk.functional.adjusted_cross_entropy
KD = ltk.functional.distillation
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Relative error of the gradient's norm: one rounding to the dtype, and the exponentials of float32.
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 1e-3}
CLASSES = [1, 3, 17, 100, 2048, 2100, 5000]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grads(loss: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(loss, z)[0]


def tables(classes: int) -> dict[str, dict[str, Tensor | float]]:
    shift, scale, weight = random(classes), random(classes, seed=1).abs() + 0.5, random(classes, seed=2).abs()
    return {
        "none": {},
        "shift": {"shift": shift},
        "scale": {"scale": scale},
        "all": {"shift": shift, "scale": scale, "weight": weight, "label_smoothing": 0.1},
    }


def in_dtype(options: dict, dtype: torch.dtype) -> dict:
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in options.items()}


def test_pinned_values() -> None:
    z = torch.tensor([[1.0, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    loss = CE(z, torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64))
    assert loss.item() == pytest.approx(1.504131, abs=1e-6)
    assert grads(loss, z)[0].tolist() == pytest.approx([0.346549, 0.031499, -0.378048], abs=1e-6)


@pytest.mark.parametrize("kind", ["none", "shift", "scale", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_values(classes, dtype, kind) -> None:
    """Against the formula in float64; q does not sum to 1."""
    z, q = random(5, classes, scale=4).to(dtype), random(5, classes, seed=3).abs()
    options = tables(classes)[kind]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for given in (q.to(dtype), q.float()):
        x = z.clone().requires_grad_()
        loss = CE(x, given, **in_dtype(options, real))
        assert ltk.explain(CE, x, given, **in_dtype(options, real)).backend != "torch"
        exact = z.double().requires_grad_()
        said = in_dtype(options, real)
        a = exact * said.get("scale", torch.ones(1)).double() + said.get("shift", torch.zeros(1)).double()
        t = given.double() * (1 - said.get("label_smoothing", 0)) + said.get("label_smoothing", 0) / classes
        t = t * said.get("weight", torch.ones(1)).double()
        wanted = -(t * a.log_softmax(1)).sum() / 5
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5 if real == torch.float32 else 1e-12, abs=1e-6)
        found, grad = grads(loss, x), grads(wanted, exact)
        assert float((found.double() - grad).norm()) <= CLOSE[dtype] * float(grad.norm()) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("classes", CLASSES)
def test_distillation_is_torchs_kl_div(classes, temperature, dtype) -> None:
    z, t = random(5, classes, scale=3).to(dtype), random(5, classes, seed=1, scale=3).to(dtype)
    own = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    for weights in (None, own):
        x = z.clone().requires_grad_()
        loss = KD(x, t, temperature, sample_weight=None if weights is None else weights.float())
        exact = z.double().requires_grad_()
        log_p, log_q = ((each / temperature).log_softmax(1) for each in (exact, t.double()))
        rows = temperature**2 * F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1)
        wanted = rows.mean() if weights is None else (rows * weights).sum() / weights.sum()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=2e-6)
        found, grad = grads(loss, x), grads(wanted, exact)
        assert float((found.double() - grad).norm()) <= CLOSE[dtype] * float(grad.norm()) + 1e-7


def test_a_mean_divides_by_the_rows_and_not_by_the_classes() -> None:
    z, t = random(4, 6), random(4, 6, seed=1)
    log_p, log_q = (z / 2).log_softmax(1), (t / 2).log_softmax(1)
    assert float(KD(z, t, 2.0)) == pytest.approx(
        4 * float(F.kl_div(log_p, log_q, log_target=True, reduction="batchmean"))
    )
    rows = KD(z, t, 2.0, reduction="none")
    assert rows.shape == (4,)
    own = torch.tensor([1.0, 0.0, 3.0, 1.0], dtype=torch.float64)
    assert float(KD(z, t, 2.0, sample_weight=own)) == pytest.approx(float((rows * own).sum() / 5))
    assert float(KD(z, t, 2.0, sample_weight=own, reduction="batch_mean")) == pytest.approx(
        float((rows * own).sum() / 4)
    )
    assert float(KD(z, t, 2.0, reduction="sum")) == pytest.approx(float(rows.sum()))


def test_a_student_that_is_its_teacher_loses_no_more_than_rounding() -> None:
    z = random(3, 3000, scale=5).float().requires_grad_()
    loss = KD(z, z.detach().clone(), 2.0)
    assert abs(loss.item()) < 1e-6
    assert grads(loss, z).abs().max() < 1e-8


def test_the_teacher_gets_no_gradient_unless_asked() -> None:
    z, t = random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()
    KD(z, t).backward()
    assert t.grad is None
    loss = KD(z, t, detach_teacher=False)
    assert ltk.explain(KD, z, t, detach_teacher=False) == ("torch", "gradient with respect to teacher_logits")
    assert torch.autograd.gradcheck(lambda *a: KD(*a, 3.0, detach_teacher=False), (z, t))
    assert grads(loss, t).abs().max() > 0


@pytest.mark.parametrize("reduction", ["mean", "batch_mean", "sum", "none"])
def test_reductions_and_upstream_gradients(reduction) -> None:
    z, q = random(4, 30).requires_grad_(), random(4, 30, seed=1).abs()
    own = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    loss = CE(z, q, sample_weight=own, reduction=reduction, shift=random(30))
    wanted = CE(z, q, sample_weight=own, reduction=reduction, shift=random(30), backend="torch")
    torch.testing.assert_close(loss, wanted)
    upstream = random(*loss.shape, seed=9)
    torch.testing.assert_close(torch.autograd.grad(loss, z, upstream)[0], torch.autograd.grad(wanted, z, upstream)[0])


def test_what_looks_at_a_call_finds_torchs_derivatives() -> None:
    z, q, t = random(3, 5).requires_grad_(), random(3, 5, seed=1).abs(), random(3, 5, seed=2)
    shift = random(5, seed=3)
    for call in (lambda x: CE(x, q, shift=shift), lambda x: KD(x, t, 2.0, shift=shift, reduction="none")):
        assert torch.autograd.gradcheck(call, (z,))
        assert torch.autograd.gradgradcheck(call, (z,))
        exact = torch.func.grad(lambda x, call=call: call(x).sum())(z.detach())
        torch.testing.assert_close(grads(call(z).sum(), z), exact)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(grads(compiled(z).sum(), z), exact)
        assert torch.func.jvp(call, (z.detach(),), (q,))[1].isfinite().all()
    learned = shift.clone().requires_grad_()
    assert "gradient with respect to shift" in ltk.explain(CE, z, q, shift=learned).reason
    assert torch.autograd.gradcheck(lambda x, s, p: CE(x, p, shift=s), (z, learned, q.clone().requires_grad_()))


def test_masked_classes() -> None:
    """0 log 0 is 0: a class without a share may have a logit or a shift of -inf."""
    z, q = random(2, 40).float(), random(2, 40, seed=1).abs().float()
    q[:, 7] = 0
    left = [j for j in range(40) if j != 7]
    for masked, shift in ((z.clone(), None), (z, torch.zeros(40))):
        if shift is None:
            masked[:, 7] = -torch.inf
        else:
            shift[7] = -torch.inf
        for backend in ("cpu", "torch"):
            x = masked.clone().requires_grad_()
            loss = CE(x, q, shift=shift, backend=backend)
            torch.testing.assert_close(loss, CE(z[:, left], q[:, left]))
            grad = grads(loss, x)
            assert (grad[:, 7] == 0).all()
            torch.testing.assert_close(
                grad[:, left], grads(CE(y := z[:, left].clone().requires_grad_(), q[:, left]), y)
            )
        x = masked.clone().requires_grad_()
        teacher = z.clone()
        teacher[:, 7] = -torch.inf
        torch.testing.assert_close(KD(x, teacher, shift=shift), KD(z[:, left], teacher[:, left]))
        assert grads(KD(x, teacher, shift=shift), x).isfinite().all()
        assert CE(masked, torch.ones(2, 40), shift=shift).item() == math.inf
    nothing = torch.full((2, 40), -torch.inf)
    assert CE(nothing, q).isnan()
    assert KD(z, nothing).isnan()
    assert KD(nothing, z).isnan()


@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_logits_that_grow_along_a_row(spread) -> None:
    """The reference moves from block to block; a common offset of 2^20 cancels nothing."""
    z = (torch.linspace(0, spread, 5000) + random(2, 5000).float()).double()
    q, t = random(2, 5000, seed=1).abs(), random(2, 5000, seed=2, scale=10)
    for offset in (0.0, 2.0**20):
        given = (z + offset).float()
        x, exact = given.clone().requires_grad_(), given.double().requires_grad_()
        for ours, wanted in (
            (CE(x, q.float()), CE(exact, q, backend="torch")),
            (KD(x, t.float()), KD(exact, t.float().double())),
        ):
            assert ours.item() == pytest.approx(wanted.item(), rel=1e-5)
            found, grad = grads(ours, x), grads(wanted, exact)
            assert float((found - grad).norm()) <= 2e-6 * float(grad.norm())


def test_strides_empty_batches_and_shapes() -> None:
    z, q = random(6, 8), random(6, 8, seed=1).abs()
    wanted = CE(z, q)
    for x, p in (
        (z.t().contiguous().t(), q),
        (z, q.t().contiguous().t()),
        (z.repeat(1, 2)[:, :8], q.repeat(1, 3)[:, 8:16]),
    ):
        torch.testing.assert_close(CE(x, p), wanted)
    torch.testing.assert_close(CE(z, q[:1].expand(6, 8)), CE(z, q[:1].repeat(6, 1)))
    assert CE(z[:0], q[:0]).isnan()
    assert CE(z[:0], q[:0], reduction="sum") == 0
    assert KD(z[:0], q[:0], reduction="none").shape == (0,)
    images, teacher = random(2, 5, 3, 4), random(2, 5, 3, 4, seed=1)
    rows = KD(images, teacher, 2.0, reduction="none")
    assert rows.shape == (2, 3, 4)
    torch.testing.assert_close(rows[1, 2, 3], KD(images[1, :, 2, 3], teacher[1, :, 2, 3], 2.0))


def test_threads_give_the_same_bits() -> None:
    z, q = random(64, 3000).float().requires_grad_(), random(64, 3000, seed=1).abs().float()
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for loss in (CE(z, q, shift=random(3000).float()), KD(z, q, 2.0)):
                found.append((loss.detach(), grads(loss, z)))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(found[:2], found[2:], strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_classes_may_be_in_any_order() -> None:
    z, q, order = random(4, 300), random(4, 300, seed=1).abs(), torch.randperm(300)
    torch.testing.assert_close(CE(z[:, order], q[:, order]), CE(z, q), rtol=1e-13, atol=0)
    torch.testing.assert_close(KD(z[:, order], q[:, order]), KD(z, q), rtol=1e-13, atol=0)


def test_no_teacher_probabilities_are_allocated() -> None:
    z, t = torch.randn(64, 20000), torch.randn(64, 20000)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        KD(z, t, 2.0)
    largest = max(event.self_cpu_memory_usage for event in seen.key_averages())
    assert largest < z.numel() * 4 / 4


def test_the_head_takes_probabilities() -> None:
    x, w, q = random(5, 8), random(20, 8, seed=1).requires_grad_(), random(5, 20, seed=2).abs()
    head = ltk.functional.linear_adjusted_cross_entropy(x, w, q)
    torch.testing.assert_close(grads(head, w), grads(CE(x @ w.t(), q), w))


Z, Q = torch.randn(4, 5), torch.rand(4, 5)


def changed(value: float) -> Tensor:
    q = Q.clone()
    q[2, 3] = q[3, 1] = value
    return q


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CE(Z, changed(-0.5)), ValueError, r"target has -0.5 for class 3 in row 2; class probabilities"),
        (lambda: CE(Z, changed(math.nan)), ValueError, "target has nan for class 3 in row 2"),
        (lambda: CE(Z, changed(math.inf)), ValueError, "target has inf for class 3 in row 2"),
        (lambda: CE(Z, changed(-0.5), backend="torch"), ValueError, "target has -0.5 for class 3 in row 2"),
        (lambda: CE(Z, Q, shift=torch.full((5,), math.nan)), ValueError, r"shift\[0\] is nan"),
        (lambda: CE(Z, Q, weight=torch.full((5,), math.inf)), ValueError, r"weight\[0\] is inf"),
        (
            lambda: CE(Z, Q, sample_weight=torch.tensor([1, math.nan, 1, 1])),
            ValueError,
            "sample_weight is nan in row 1",
        ),
        (lambda: CE(Z, Q, inplace=True), ValueError, "inplace=True is not possible: target holds class probabilities"),
        (lambda: CE(Z, Q[:3]), ValueError, r"target has shape \(3, 5\)"),
        (
            lambda: KD(Z, Q[:3]),
            ValueError,
            r"teacher_logits has shape \(3, 5\); it must have the logits' shape \(4, 5\)",
        ),
        (lambda: KD(Z, [1.0]), TypeError, "teacher_logits is list"),
        (lambda: KD(Z, Q.long()), TypeError, "teacher_logits has dtype torch.int64"),
        (lambda: KD(Z, Q.to("meta")), ValueError, "teacher_logits is on meta"),
        (lambda: KD(Z, Q, 0.0), ValueError, "temperature is 0.0; it must be above 0"),
        (lambda: KD(Z, Q, math.nan), ValueError, "temperature is nan"),
        (lambda: KD(Z, Q, reduction="batchmean"), ValueError, "reduction is 'batchmean'"),
        (lambda: KD(Z, Q, scale=torch.ones(4)), ValueError, r"scale has shape \(4,\)"),
        (lambda: KD(Z, Q, sample_weight=torch.ones(5)), ValueError, r"sample_weight has shape \(5,\)"),
    ],
)
def test_message(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
