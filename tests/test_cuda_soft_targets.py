"""Promise: the CUDA kernel of soft targets and distillation, compiled by g++ with the emulation of tests/cuda_host, passes the tests of the
CPU's kernel. What only a GPU can prove is in test_cuda_kernels.py."""

from __future__ import annotations

import math

import contract
import cuda_cases
import pytest
import test_linear_distillation as of_heads
import test_soft_targets
import torch
from cuda_host import library
from test_cuda_waits import READS

import ltkernels as ltk
from ltkernels import _backends

CE, KD = ltk.functional.adjusted_cross_entropy, ltk.functional.distillation


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch):
    """As on a GPU: what no kernel is forced for, and what is forced to the CPU's, goes to CUDA's."""
    library.emulate(monkeypatch)
    choose = _backends.choose
    monkeypatch.setattr(_backends, "_cannot_serve", lambda backend, kind: "")

    def chosen(backend, device, needs_torch="", not_cuda=""):
        return choose(backend if needs_torch or backend == "torch" else "cuda", device, needs_torch, not_cuda)

    monkeypatch.setattr(_backends, "choose", chosen)


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "shift", "scale", "all"])
def test_class_probabilities(kind, dtype) -> None:
    for classes in (1, 3, 17, 100, 1024, 2100):
        test_soft_targets.test_values(classes, dtype, kind)


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_distillation(dtype) -> None:
    for classes, temperature in ((1, 1.0), (17, 0.5), (100, 4.0), (1024, 1.0), (2100, 2.0)):
        test_soft_targets.test_distillation_is_torchs_kl_div(classes, temperature, dtype)


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_the_kernel(temperature, dtype) -> None:
    for classes in (2, 45, 1203):
        cuda_cases.check_soft_targets("cpu", dtype, classes, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_heads_of_both(dtype) -> None:
    """The gradient takes the logits' place. Logits of 16 bits are rounded on a GPU, and their gradient has memory of its own."""
    of_heads.test_values_and_gradients(dtype, False, "tables")
    of_heads.test_class_probabilities_in_chunks(dtype, True, "plain")


@pytest.mark.parametrize("reduction", contract.REDUCTIONS)
def test_reductions_and_upstream_gradients(reduction) -> None:
    test_soft_targets.test_reductions_and_upstream_gradients(reduction)


@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_logits_that_grow_along_a_row(spread) -> None:
    test_soft_targets.test_logits_that_grow_along_a_row(spread)


@pytest.mark.parametrize(
    "test",
    [
        test_soft_targets.test_pinned_values,
        test_soft_targets.test_a_mean_divides_by_the_rows_and_not_by_the_classes,
        test_soft_targets.test_a_student_that_is_its_teacher_loses_no_more_than_rounding,
        test_soft_targets.test_the_teacher_gets_no_gradient_unless_asked,
        test_soft_targets.test_masked_classes,
        test_soft_targets.test_strides_empty_batches_and_shapes,
        test_soft_targets.test_classes_may_be_in_any_order,
        test_soft_targets.test_the_head_takes_probabilities,
    ],
    ids=lambda test: test.__name__,
)
def test_as_the_cpu(test) -> None:
    test()


def test_dtypes_that_differ() -> None:
    """A teacher in another dtype than the student, and probabilities in the logits' own."""
    z, t = torch.randn(4, 41), torch.randn(4, 41)
    for student, teacher in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        found = KD(z.to(student), t.to(teacher), 2.0)
        torch.testing.assert_close(found, KD(z.to(student).double(), t.to(teacher).double(), 2.0).float())
    q = torch.rand(4, 41).bfloat16()
    torch.testing.assert_close(CE(z.bfloat16(), q), CE(z.bfloat16().double(), q.double()).float())


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_offsets_and_strides(dtype) -> None:
    """Logits and targets of any alignment, each its own; the same rows give the same numbers."""
    z, q, t = torch.randn(3, 45).to(dtype), torch.rand(3, 45), torch.randn(3, 45).to(dtype)
    wanted = [contract.gradient(f, z, x, reduction="none") for f, x in ((CE, q), (KD, t))]
    for offset in range(9):
        for other in (0, 1, offset):
            wide, beside = torch.zeros(3, 60, dtype=dtype), torch.zeros(3, 61)
            x = wide[:, offset : offset + 45].copy_(z)
            for f, target, (loss, grad) in ((CE, q, wanted[0]), (KD, t, wanted[1])):
                y = beside.to(target.dtype)[:, other : other + 45].copy_(target)
                again, got = contract.gradient(f, x, y, reduction="none")
                torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(got, grad, rtol=1e-5 if dtype.itemsize > 2 else 8e-3, atol=1e-6)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    """Nobody looks at the target on a GPU: the rows say it."""
    z, q = torch.randn(3, 9), torch.rand(3, 9)
    q[1, 2] = math.nan
    loss, grad = contract.gradient(CE, z, q, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, False]


def test_nothing_waits_for_the_gpu(monkeypatch) -> None:
    z, q, own = torch.randn(4, 9, requires_grad=True), torch.rand(4, 9), torch.rand(4)
    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, lambda self, *arguments: pytest.fail("something waits for the GPU"))
        losses = CE(z, q, sample_weight=own), KD(z, q, 2.0, sample_weight=own)
        # A number's backward looks at the upstream gradient on the CPU alone; that of rows looks at nothing.
        CE(z, q, sample_weight=own, reduction="none").sum().backward()
    assert all(loss.isfinite() for loss in losses)
    assert z.grad.abs().max() > 0
