"""Promise: the vector exp has the accuracy that simd.h states."""

from __future__ import annotations

import torch

from ltkernels import _C


def vector_exp(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _C.exp_f32(x.data_ptr(), y.data_ptr(), len(x))
    return y


def ulps(actual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Distance from the correctly rounded result, in units in the last place."""
    exact = torch.exp(x.double())
    rounded = exact.float()
    spacing = torch.nextafter(rounded, torch.tensor(torch.inf)).double() - rounded.double()
    return (actual.double() - exact).abs() / spacing


def test_exp_ulp() -> None:
    # 4 million floats of [-86.5, 0], uniform in value, then uniform in representation near 0.
    dense = torch.linspace(-86.5, 0, 4_000_001)
    near = -torch.logspace(-30, 0, 100_001)
    for x in (dense, near, torch.linspace(0, 88, 100_001)):
        assert ulps(vector_exp(x), x).max() <= 1.5


def test_exp_special_values() -> None:
    x = torch.tensor([0.0, -0.0, -torch.inf, torch.nan, -86.6, -1000.0, -86.4])
    y = vector_exp(x)
    assert y[0] == 1
    assert y[1] == 1
    assert y[2] == 0
    assert y[3].isnan()
    assert y[4] == 0
    assert y[5] == 0
    assert y[6] > 0
