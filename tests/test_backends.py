"""Promise: one place chooses the backend; a forced one is never replaced, and falling to torch is said."""

from __future__ import annotations

import warnings

import pytest
import torch

import ltkernels as ltk
from ltkernels import _backends

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """Pretends that the CUDA part or Triton is there, or not; an empty problem means that it is."""

    def pretend(cuda: str, triton: str) -> None:
        monkeypatch.setattr(_backends, "cuda_problem", lambda: cuda)
        monkeypatch.setattr(_backends, "triton_problem", lambda kind: triton)

    _backends._accelerator.cache_clear()
    yield pretend
    _backends._accelerator.cache_clear()


def test_cpu_tensors() -> None:
    assert _backends.choose(None, CPU) == "cpu"
    assert _backends.choose(None, CPU, "some reason") == "torch"
    assert _backends.choose("torch", CPU) == "torch"


@pytest.mark.parametrize(
    ("cuda", "triton", "expected"), [("", "", "cuda"), ("", "no", "cuda"), ("no CUDA part", "", "triton")]
)
def test_cuda_tensors(machine, cuda: str, triton: str, expected: str) -> None:
    machine(cuda, triton)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backends.choose(None, CUDA) == expected
    says = _backends.explain(None, CUDA)
    assert says.backend == expected
    assert cuda in says.reason


@pytest.mark.parametrize(
    ("cuda", "triton", "expected"),
    [("", "", "triton"), ("", "no Triton", "torch"), ("no CUDA part", "", "triton")],
)
def test_what_has_no_cuda_kernel(machine, cuda: str, triton: str, expected: str) -> None:
    """Triton's serves it, beside the CUDA part; without Triton torch does, and says why. A forced CUDA is refused."""
    machine(cuda, triton)
    reason = "there is no CUDA kernel for it"
    assert _backends.choose(None, CUDA, not_cuda=reason) == expected
    assert _backends.choose(None, CUDA, "a gradient", reason) == "torch"
    assert _backends.choose(None, CPU, not_cuda=reason) == "cpu"
    says = _backends.explain(None, CUDA, not_cuda=reason)
    assert says.backend == expected
    assert (cuda or reason) in says.reason
    assert triton in says.reason
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call: there is no CUDA kernel for it"):
        _backends.choose("cuda", CUDA, not_cuda=reason)
    if not triton:
        assert _backends.choose("triton", CUDA, not_cuda=reason) == "triton"


def test_falling_to_torch_is_said_once(machine) -> None:
    machine("no CUDA part", "no Triton")
    with pytest.warns(UserWarning, match=r"torch serves cuda tensors.*no CUDA part; no Triton"):
        assert _backends.choose(None, CUDA) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backends.choose(None, CUDA) == "torch"
    assert "no Triton" in _backends.explain(None, CUDA).reason


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("cuda", CPU, "backend='cuda' cannot serve this call: (this build has no CUDA part|there is no CUDA device)"),
        ("cpu", CUDA, "backend='cpu' cannot serve this call: the logits are on a cuda device"),
        ("rocm", CPU, "backend is 'rocm'; it must be None or one of 'cpu', 'cuda', 'triton', 'torch'"),
    ],
)
def test_a_forced_backend_is_never_replaced(backend, device, message) -> None:
    with pytest.raises(ValueError, match=message):
        _backends.choose(backend, device)


def test_triton_needs_a_gpu_or_its_interpreter(machine, monkeypatch) -> None:
    monkeypatch.setattr("ltkernels.triton.available", lambda: (True, "Triton 3.9"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="Triton's interpreter is off"):
        ltk.functional.adjusted_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), backend="triton")
    assert _backends.triton_problem("cuda") == ""
    assert _backends.triton_problem("mps") == "they have no mps target"
    monkeypatch.setattr("ltkernels.triton.available", lambda: (False, "not installed"))
    assert _backends.triton_problem("cuda") == "not installed"


def test_doctor_says_what_is_there() -> None:
    names = [name for name, _ in ltk.doctor_report()]
    assert {"cuda", "triton", "torch"} <= set(names)
