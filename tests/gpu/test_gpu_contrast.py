"""Contrast on a GPU: the cases of tests/row_cases.py for the CUDA and the Triton kernel, and the losses beside the CPU's."""

from __future__ import annotations

import pytest
import row_cases
import torch
from test_contrastive_values import FIXED, KINDS, LEAVES, arguments, in_dtype
from torch import Tensor

import ltkernels as ltk
from ltkernels import _backends
from ltkernels.contrastive import _rows

BACKENDS = [] if not torch.cuda.is_available() else [
    name for name, problem in (("cuda", _backends.cuda_problem()), ("triton", _backends.triton_problem("cuda"))) if not problem
]  # fmt: skip
pytestmark = [
    pytest.mark.skipif(not BACKENDS, reason="needs a GPU with the CUDA part of the build, or Triton"),
    pytest.mark.parametrize("backend", BACKENDS or ["none"]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kernel(backend: str, dtype: torch.dtype) -> None:
    kernel = _rows._kernel_between(backend)
    for columns in (1, 7, 16, 75, 1000, 1030, 9001):
        row_cases.check(kernel, 6, columns, dtype, device="cuda")
    row_cases.check(kernel, 6, 40, dtype, scale=300.0, device="cuda")
    for check in (row_cases.check_layouts, row_cases.check_special_rows, row_cases.check_confident_rows):
        check(kernel, dtype, device="cuda")


@pytest.mark.parametrize("tau", [0.1, 0.02])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(backend: str, kind: str, tau: float) -> None:
    features, labels = FIXED

    def run(device: str, backend: str) -> list[Tensor]:
        said = {name: in_dtype(x, torch.float64) for name, x in arguments(kind, labels).items()}
        said = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in said.items()}
        leaf = features.to(device).requires_grad_()
        leaves = [leaf] if kind not in LEAVES else [leaf, said[LEAVES[kind]].requires_grad_()]
        given = None if kind == "moco" else labels.to(device)
        loss = ltk.functional.contrastive(leaf, given, kind, tau=tau, chunk_rows=9, backend=backend, **said)
        return [x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, leaves))]

    for found, expected in zip(run("cuda", backend), run("cpu", "cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_large(backend: str) -> None:
    """Many rows a chunk and long rows, in float32, beside float64."""
    x = torch.randn(3000, 64, device="cuda")
    y = torch.arange(3000, device="cuda") % 50
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        ltk.functional.contrastive(leaf, y, "supcon_in", backend=backend).backward()
        grads.append(leaf.grad.double())
    assert (grads[0] - grads[1]).abs().max() <= 1e-4 * grads[1].abs().max()
