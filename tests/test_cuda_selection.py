"""The batched log-determinant kernel in selection, on the emulation: which batches it gets, and that the picks stay."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from cuda_host import library

from ltkernels import _backends
from ltkernels._backends import cuda as _cuda
from ltkernels._features import cholesky_log_det
from ltkernels.selection._driver import step_by_step
from ltkernels.selection._engines.batched import BatchedEngine
from ltkernels.selection._engines.steps import StepEngine
from ltkernels.selection._rules import Rule
from ltkernels.selection._subsets import Problem, start_state

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is compiled by g++")


class OnGpu:
    """A tensor's facts with another device: what `log_det_kernel` looks at."""

    def __init__(self, tensor: torch.Tensor, is_cuda: bool = True) -> None:
        self.dim, self.numel, self.shape, self.dtype = tensor.dim, tensor.numel, tensor.shape, tensor.dtype
        self.requires_grad, self.is_cuda = tensor.requires_grad, is_cuda


@pytest.fixture
def built(monkeypatch) -> None:
    monkeypatch.setattr(_backends, "cuda_problem", lambda: "")


@pytest.mark.usefixtures("built")
def test_which_batches_the_kernel_gets(monkeypatch) -> None:
    gets = _backends.log_det_kernel
    for shape in ((3, 1, 1), (2, 5, 64, 64)):
        for dtype in (torch.float32, torch.float64):
            assert gets(OnGpu(torch.empty(shape, dtype=dtype))) is _cuda.logdet
    for shape in ((5, 5), (3, 65, 65), (0, 4, 4), (3, 0, 0)):
        assert gets(OnGpu(torch.empty(shape))) is None
    assert gets(OnGpu(torch.empty(3, 4, 4, dtype=torch.float16))) is None
    assert gets(OnGpu(torch.empty(3, 4, 4), is_cuda=False)) is None
    wanted = torch.empty(3, 4, 4, requires_grad=True)
    assert gets(OnGpu(wanted)) is None
    with torch.no_grad():
        assert gets(OnGpu(wanted)) is _cuda.logdet
    monkeypatch.setattr(_backends, "cuda_problem", lambda: "this build has no CUDA part")
    assert gets(OnGpu(torch.empty(3, 4, 4))) is None


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Batches on the processor go to the emulated kernel; their shapes."""
    shapes: list[tuple[int, ...]] = []
    library.emulate(monkeypatch)

    def logdet(matrices):
        shapes.append(tuple(matrices.shape))
        return _cuda.logdet(matrices)

    monkeypatch.setattr(_backends, "log_det_kernel", lambda m: logdet if m.dim() > 2 and m.shape[-1] <= 64 else None)
    return shapes


@pytest.mark.parametrize("ragged", [False, True])
def test_picks_stay(ragged: bool, calls: list[tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    sizes = [3, 5] * 6 if ragged else [4] * 12
    offsets = [0, *np.cumsum(sizes).tolist()]
    z, x = (torch.from_numpy(rng.normal(size=(n, 24)) / np.sqrt(1 + np.arange(24))) for n in (30, offsets[-1]))
    problem = Problem(start_state(z, "joint", 1.0), x, offsets, 1.0)
    for rule in (Rule("max"), Rule("min")):
        expected, reached = step_by_step(StepEngine(problem), rule, 5)
        [(picked, values)] = BatchedEngine([problem], [rule], [5]).run()
        assert picked == expected
        np.testing.assert_allclose(values, reached, rtol=1e-10)
    assert all(shape[-1] in (3, 4, 5) for shape in calls)
    assert len(calls) >= 5


def test_batches_of_batches_keep_their_shape(calls: list[tuple[int, ...]]) -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices = x @ x.mT
    matrices[1, 2] = -1.0
    expected = torch.linalg.slogdet(matrices).logabsdet
    found = cholesky_log_det(matrices)
    assert calls == [(6, 4, 4)]
    assert found[1, 2].isnan()
    expected[1, 2] = found[1, 2] = 0.0
    torch.testing.assert_close(found, expected)
