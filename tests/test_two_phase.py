"""Promise: the loss in two phases, its classes in any number of parts, is the loss in one; value and gradient, every option."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from test_loss_values import DTYPES, counts_of, hostile_logits, labels_of, stairs

import ltkernels as ltk
from ltkernels.losses import _two_phase


def in_parts(z: torch.Tensor, y: torch.Tensor, cuts: list[int], upstream: float, inplace: bool = False, **options):
    """(loss, gradient) with "sum" reduction; the classes are cut at `cuts`."""
    tables = {name: options.pop(name, None) for name in oracle.TABLES}
    real = torch.float64 if z.dtype == torch.float64 else torch.float32
    tables = {name: None if table is None else table.to(real) for name, table in tables.items()}
    classes = z.shape[1]
    sigma = torch.ones(len(z), dtype=torch.float64)
    if tables["row_scale"] is not None:
        sigma = tables["row_scale"].double()[torch.where(y == -100, 0, y)]
    parts, edges = [], [0, *cuts, classes]
    for begin, end in itertools.pairwise(edges):
        mine = {
            name: None if tables[name] is None else tables[name][begin:end].contiguous()
            for name in ("shift", "scale", "weight")
        }
        parts.append((z[:, begin:end], _two_phase.local_labels(y, -100, begin, end - begin), mine))
    smooth = options.get("label_smoothing", 0.0) != 0.0
    rows = torch.stack(
        [_two_phase.statistics(part, label, sigma, smooth=smooth, **mine) for part, label, mine in parts]
    )
    whole = {name: tables[name] for name in ("scale", "margin", "row_scale", "weight")}
    loss, terms, valid = _two_phase.finish(_two_phase.merge(rows), y, classes=classes, **whole, **options)
    assert valid.tolist() == (y != -100).tolist()
    terms[:, 1:] *= upstream
    grads = [
        _two_phase.gradient(part, label, sigma, terms, out=part if inplace else None, **mine)
        for part, label, mine in parts
    ]
    return loss, torch.cat(grads, dim=1)


def check(z: torch.Tensor, y: torch.Tensor, cuts: list[int], cond: float = 1.0, **options) -> None:
    loss, grad = in_parts(z, y, cuts, 0.7, **options)
    expected_loss, expected, size = oracle.adjusted_cross_entropy(z, y, reduction="none", upstream=0.7, **options)
    real = torch.float64 if z.dtype == torch.float64 else torch.float32
    oracle.assert_loss(loss.to(real), expected_loss, size, z.dtype)
    oracle.assert_gradient(grad, expected, size, y, cond)


@pytest.fixture(params=["kernel", "torch"])
def _phases(request, monkeypatch) -> None:
    """The kernels of the two phases, and their form in plain torch."""
    if request.param == "torch":

        def statistics(z, y, sigma, *, shift=None, scale=None, weight=None, smooth=False):
            return _two_phase.torch_statistics(z, y, sigma, shift, scale, weight, smooth)

        def gradient(z, y, sigma, terms, *, shift=None, scale=None, weight=None, out=None):
            return _two_phase.torch_gradient(z, y, sigma, terms, shift, scale, weight)

        monkeypatch.setattr(_two_phase, "statistics", statistics)
        monkeypatch.setattr(_two_phase, "gradient", gradient)


@pytest.mark.usefixtures("_phases")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "cuts", [[], [1], [18], [5, 6, 30], [0], [9, 9, 37]]
)  # the last two have parts without classes
@pytest.mark.parametrize("name", ["ce", "kps_ga", "vector_scaling", "class_balanced", "focal"])
def test_parts(name: str, cuts: list[int], dtype: torch.dtype) -> None:
    classes = 37
    record = ltk.LOSSES[name]
    z = hostile_logits(12, classes, dtype, scale=0.3 if record.logits == "cosine" else 3.0)
    if record.logits == "cosine":
        z[1] -= 300.0
    check(z, labels_of(12, classes), cuts, **record.adjustment(counts_of(classes))._asdict())


@pytest.mark.usefixtures("_phases")
@pytest.mark.parametrize("weighted", [False, True])
def test_label_smoothing(weighted: bool) -> None:
    z, y = hostile_logits(9, 21, torch.float32), labels_of(9, 21)
    z[2, 1] = -1.0
    options = {"margin": torch.rand(21), "shift": torch.randn(21), "row_scale": torch.rand(21) + 0.5}
    if weighted:
        options["weight"] = torch.rand(21) + 0.1
    check(z, y, [4, 15], label_smoothing=0.1, cond=2.0, **options)


@pytest.mark.usefixtures("_phases")
@pytest.mark.parametrize("kind", ["low first columns", "masked first block", "rising", "falling"])
@pytest.mark.parametrize("offset", [0.0, 2000.0])
def test_references_that_differ_between_the_parts(kind: str, offset: float) -> None:
    z = stairs(kind, 4500)
    y = torch.tensor([3, 2047, 2048, 4499])
    z[torch.arange(4), y] = torch.where(z[torch.arange(4), y].isinf(), 0.0, z[torch.arange(4), y]) + offset
    check(z.float(), y, [40, 2500])


def test_special_values() -> None:
    """As the truth table of the fused kernel."""
    y = torch.tensor([0, 0, 1, 1])
    z = torch.zeros(4, 6)
    z[0] = -torch.inf
    z[1, 0] = -torch.inf
    z[2, 5] = torch.nan
    z[3, 4] = -torch.inf
    loss, grad = in_parts(z, y, [3], 1.0)
    leaf = z.clone().requires_grad_()
    expected = ltk.functional.adjusted_cross_entropy(leaf, y, reduction="none")
    expected.backward(torch.ones(4))
    torch.testing.assert_close(loss.float(), expected.detach(), equal_nan=True)
    torch.testing.assert_close(grad, leaf.grad, equal_nan=True)


def test_in_place_and_threads_agree_bitwise() -> None:
    z, y = torch.randn(300, 700), torch.randint(0, 700, (300,))
    before, results = torch.get_num_threads(), []
    for threads, inplace in ((1, False), (2, False), (2, True)):
        torch.set_num_threads(threads)
        results.append(in_parts(z.clone(), y, [256], 1.0, inplace))
    torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])
