"""The loss in two phases, put together from parts of the classes, as a function of a device."""

from __future__ import annotations

import itertools

import oracle
import torch

from ltkernels._checks import smooths
from ltkernels.losses import _two_phase


def in_parts(z: torch.Tensor, y: torch.Tensor, cuts: list[int], upstream: float, inplace: bool = False, **options):
    """(loss, gradient) with "sum" reduction, on the device of `z`; the classes are cut at `cuts`."""
    tables = {name: options.pop(name, None) for name in oracle.TABLES}
    real = torch.float64 if z.dtype == torch.float64 else torch.float32
    tables = {name: None if table is None else table.to(z.device, real) for name, table in tables.items()}
    classes = z.shape[1]
    sigma = torch.ones(len(z), dtype=torch.float64, device=z.device)
    if tables["row_scale"] is not None:
        sigma = tables["row_scale"].double()[torch.where(y == -100, 0, y)]
    parts, edges = [], [0, *cuts, classes]
    for begin, end in itertools.pairwise(edges):
        mine = {
            name: None if tables[name] is None else tables[name][begin:end].contiguous()
            for name in ("shift", "scale", "weight")
        }
        parts.append((z[:, begin:end], _two_phase.local_labels(y, -100, begin, end - begin), mine))
    smooth = smooths(options.get("label_smoothing", 0.0))
    rows = torch.stack(
        [_two_phase.statistics(part, label, sigma, smooth=smooth, **mine) for part, label, mine in parts]
    )
    whole = {name: tables[name] for name in ("shift", "scale", "margin", "row_scale", "weight")}
    options = {
        name: value.to(z.device) if isinstance(value, torch.Tensor) else value for name, value in options.items()
    }
    loss, terms, valid = _two_phase.finish(_two_phase.merge(rows), y, classes=classes, **whole, **options)
    assert valid.tolist() == (y != -100).tolist()
    terms[:, 1:] *= upstream
    grads = [
        _two_phase.gradient(part, label, sigma, terms, out=part if inplace else None, **mine)
        for part, label, mine in parts
    ]
    return loss, torch.cat(grads, dim=1)


def check(z: torch.Tensor, y: torch.Tensor, cuts: list[int], cond: float = 1.0, device: str = "cpu", **options) -> None:
    """Against the oracle."""
    loss, grad = (each.cpu() for each in in_parts(z.to(device), y.to(device), cuts, 0.7, **options))
    expected_loss, expected, size = oracle.adjusted_cross_entropy(z, y, reduction="none", upstream=0.7, **options)
    real = torch.float64 if z.dtype == torch.float64 else torch.float32
    oracle.assert_loss(loss.to(real), expected_loss, size, z.dtype)
    oracle.assert_gradient(grad, expected, size, y, cond)
