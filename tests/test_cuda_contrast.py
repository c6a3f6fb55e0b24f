"""Promise: the CUDA kernel of contrast, compiled by g++ with the emulation of tests/cuda_host, has the values of the definitions. What only
a GPU can prove is in test_cuda_kernels.py."""

from __future__ import annotations

import pytest
import row_cases
import torch
from cuda_host import library
from test_contrastive_values import FIXED, KINDS, against_pairs, arguments
from test_cuda_waits import READS

import ltkernels as ltk
from ltkernels import _backends
from ltkernels._backends import cuda as _cuda
from ltkernels.contrastive import _contrastive, _logsumexp

contrastive = ltk.functional.contrastive
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _emulation(monkeypatch):
    library.emulate(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 16, 75, 400])
def test_the_kernel(columns: int, dtype: torch.dtype) -> None:
    """Several rows a block, and a row of several warps."""
    row_cases.check(_cuda.row_logsumexp, 6, columns, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_a_whole_block_and_more(dtype: torch.dtype) -> None:
    row_cases.check(_cuda.row_logsumexp, 3, 9001, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_cases(dtype: torch.dtype) -> None:
    row_cases.check(_cuda.row_logsumexp, 6, 40, dtype, scale=300.0)
    row_cases.check_layouts(_cuda.row_logsumexp, dtype)
    row_cases.check_special_rows(_cuda.row_logsumexp, dtype)
    row_cases.check_confident_rows(_cuda.row_logsumexp, dtype)


@pytest.mark.parametrize("tau", [0.1, 0.02])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(kind: str, dtype: torch.dtype, tau: float, monkeypatch) -> None:
    monkeypatch.setattr(_backends, "_cannot_serve", lambda backend, kind: "")
    against_pairs(kind, dtype, tau, "mean", backend="cuda", chunk_rows=9)


@pytest.mark.parametrize("kind", KINDS)
def test_no_call_waits(kind: str, monkeypatch) -> None:
    """As in test_cuda_waits.py: labels and queues are not looked at where they are on a GPU, and sorted and counted there."""
    monkeypatch.setattr(_backends, "_cannot_serve", lambda backend, kind: "")
    for module in (_contrastive, _logsumexp):
        monkeypatch.setattr(module, "readable", lambda *tensors: False)
    features, labels = FIXED
    leaf, said = features.clone().requires_grad_(), arguments(kind, labels)
    how = {"backend": "cuda", "reduction": "none", "chunk_rows": 9}
    expected = contrastive(features, None if kind == "moco" else labels, kind, reduction="none", **said)
    upstream = torch.ones_like(expected)
    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, refuse)
        loss = contrastive(leaf, None if kind == "moco" else labels, kind, **how, **said)
        loss.backward(upstream)
    torch.testing.assert_close(loss.detach(), expected)
    assert leaf.grad.abs().max() > 0


def refuse(self, *arguments):
    raise AssertionError("a read of a tensor waits for the GPU")


def test_what_is_refused() -> None:
    half = torch.zeros(2, 3, dtype=torch.bfloat16)
    (part, *_) = row_cases.parts(2, 3)
    with pytest.raises(RuntimeError, match="products are float32 or float64"):
        _cuda.row_logsumexp(half, part)
