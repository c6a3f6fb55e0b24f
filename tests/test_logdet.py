"""The kernel of batched log-determinants against numpy, one matrix at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ltkernels import _C


def logdet(matrices: torch.Tensor, threads: int = 1) -> np.ndarray:
    batch, n = matrices.shape[:2]
    out = torch.full((batch + 1,), -7.0, dtype=torch.float64)
    scratch = torch.empty(threads * _C.logdet_scratch(n), dtype=torch.float64)
    _C.logdet_batch(matrices.data_ptr(), batch, n, scratch.data_ptr(), out.data_ptr(), threads)
    assert float(out[-1]) == -7.0  # nothing is written past the batch
    return out[:-1].numpy()


def random_spd(batch: int, n: int) -> torch.Tensor:
    x = torch.randn(batch, n, n + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(batch * 100 + n))
    return x @ x.mT + torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 10, 33])
@pytest.mark.parametrize("batch", [1, 7, 8, 9, 130])
def test_logdet_equals_numpy(n: int, batch: int) -> None:
    matrices = random_spd(batch, n)
    want = [np.linalg.slogdet(m)[1] for m in matrices.numpy()]
    np.testing.assert_allclose(logdet(matrices), want, rtol=1e-12, atol=1e-12)


def test_logdet_by_hand() -> None:
    # det [[2, 1], [1, 2]] = 3; the upper triangle is not read.
    matrix = torch.tensor([[[2.0, math.nan], [1.0, 2.0]]], dtype=torch.float64)
    assert logdet(matrix)[0] == pytest.approx(1.0986122886681098, abs=1e-15)


def test_logdet_of_an_indefinite_matrix_is_nan() -> None:
    # Two negative pivots, whose product is positive, must not pass for a positive definite matrix.
    matrices = torch.stack([torch.diag(torch.tensor(v)) for v in ([1.0, 2.0], [-1.0, -2.0], [0.0, 1.0], [3.0, -1.0])])
    got = logdet(matrices.double())
    assert got[0] == pytest.approx(math.log(2.0))
    assert np.isnan(got[1:]).all()


def test_logdet_of_huge_pivots_does_not_overflow() -> None:
    matrix = torch.eye(9, dtype=torch.float64)[None] * 1e60
    assert logdet(matrix)[0] == pytest.approx(9 * 60 * math.log(10.0), rel=1e-14)


def test_logdet_has_the_same_bits_for_any_thread_count() -> None:
    matrices = random_spd(1000, 10)
    one = logdet(matrices, 1)
    for threads in (2, 3, 8):
        assert np.array_equal(one, logdet(matrices, threads))
