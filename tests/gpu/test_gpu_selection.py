"""Selection on CUDA tensors: the picks of the processor, by batched engines that do not wait for the device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import ltkernels as ltk
from ltkernels import _backends
from ltkernels._backends import cuda as _cuda
from ltkernels._features import cholesky_log_det
from ltkernels.selection._engines.batched import BatchedEngine
from ltkernels.selection._rules import Rule
from ltkernels.selection._subsets import Problem, start_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def features(width: int, ragged: bool) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    rng = np.random.default_rng(width)
    sizes = [3, 5, 4] * 20 if ragged else [10] * 60
    offsets = [0, *np.cumsum(sizes).tolist()]
    spectrum = 1.0 / np.sqrt(1.0 + np.arange(width))
    return (
        torch.from_numpy(rng.normal(size=(80, width)) * spectrum),
        torch.from_numpy(rng.normal(size=(offsets[-1], width)) * spectrum),
        offsets,
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("width", [16, 512])
@pytest.mark.parametrize("engine", ["auto", "full"])
def test_picks_are_the_processors(engine: str, width: int, ragged: bool) -> None:
    z, x, offsets = features(width, ragged)
    for mode, more in (("max", {}), ("min", {}), ("quantile", {"q": 0.3})):
        expected = ltk.selection.select_subsets(z, x, offsets, m=12, mode=mode, **more)
        found = ltk.selection.select_subsets(z.cuda(), x.cuda(), offsets, m=12, mode=mode, engine=engine, **more)
        assert found.stats["form"] == "batched", found.stats
        assert list(found.picked) == list(expected.picked), (mode, found.stats)
        torch.testing.assert_close(found.fdg.cpu(), expected.fdg.cpu(), rtol=1e-9, atol=1e-12)


def test_small_log_determinants_go_to_the_kernel(monkeypatch) -> None:
    if _backends.cuda_problem():
        pytest.skip(_backends.cuda_problem())
    seen, kernel = [], _cuda.logdet
    monkeypatch.setattr(_cuda, "logdet", lambda matrices: (seen.append(tuple(matrices.shape)), kernel(matrices))[1])
    z, x, offsets = features(64, False)
    ltk.selection.select_subsets(z.cuda(), x.cuda(), offsets, m=3)
    assert (60, 10, 10) in seen
    matrix = torch.eye(5, dtype=torch.float64, device="cuda").expand(2, 3, 5, 5) * math.e
    torch.testing.assert_close(cholesky_log_det(matrix), torch.full((2, 3), 5.0, dtype=torch.float64, device="cuda"))


def test_no_step_waits_for_the_device() -> None:
    z, x, offsets = features(64, False)
    problem = Problem(start_state(z.cuda(), "joint", 1.0), x.cuda(), offsets, 1.0)
    engine = BatchedEngine([problem] * 2, [Rule("max"), Rule("min")], [8, 8])
    engine.commit(engine.choose(engine.score()))  # libraries make their handles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            engine.commit(engine.choose(engine.score()))
    finally:
        torch.cuda.set_sync_debug_mode(before)
