"""Promise: contrast through Triton has the values of the definitions. Run by test_triton.py under TRITON_INTERPRET=1, in a process of its
own."""

from __future__ import annotations

import pytest
import row_cases
import test_contrastive
import torch
import triton_interpreted  # noqa: F401  puts the interpreter right
from test_contrastive_values import FIXED, KINDS, TOLERANCES, against_pairs, arguments
from torch import Tensor

import ltkernels as ltk
from ltkernels.contrastive import _rows
from ltkernels.triton import row_logsumexp
from ltkernels.triton._configs import Tile

contrastive = ltk.functional.contrastive
F64 = torch.float64
DTYPES = (torch.float32, F64)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """What is launched is what compile_all compiles."""
    found, launch = [], row_logsumexp._launch
    monkeypatch.setattr(row_logsumexp, "_launch", lambda s, *a: (found.append(s), launch(s, *a)))
    yield found
    assert set(found) <= set(row_logsumexp.every())


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles a row at sizes that the interpreter can do."""
    for name, columns in (("_SHORT", 16), ("_LONG", 32), ("_LONG_F64", 16)):
        monkeypatch.setattr(row_logsumexp, name, Tile(1, columns, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 16, 75])
def test_the_kernel(columns: int, dtype: torch.dtype, small_tiles) -> None:
    row_cases.check(row_logsumexp.row_logsumexp, 6, columns, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarities_that_no_exponential_holds(dtype: torch.dtype, small_tiles) -> None:
    row_cases.check(row_logsumexp.row_logsumexp, 6, 40, dtype, scale=300.0)


def test_tiles_as_they_are() -> None:
    row_cases.check(row_logsumexp.row_logsumexp, 3, 1000, torch.float32)
    row_cases.check(row_logsumexp.row_logsumexp, 3, 1030, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_special_rows(dtype: torch.dtype, small_tiles) -> None:
    row_cases.check_layouts(row_logsumexp.row_logsumexp, dtype)
    row_cases.check_special_rows(row_logsumexp.row_logsumexp, dtype)
    row_cases.check_confident_rows(row_logsumexp.row_logsumexp, dtype)


@pytest.mark.parametrize(("tau", "reduction"), [(0.1, "mean"), (0.02, "none")])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(kind: str, dtype: torch.dtype, tau: float, reduction: str, launched) -> None:
    against_pairs(kind, dtype, tau, reduction, backend="triton", chunk_rows=9)
    assert launched


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["near", "far"])
@pytest.mark.parametrize("normalize", [False, True])
def test_both_sides_and_their_gradients(normalize: bool, scale: float, launched) -> None:
    given = [x.requires_grad_() for x in test_contrastive.inputs(scale)]

    def run(backend: str) -> list[Tensor]:
        other, own = test_contrastive.ours(*given, normalize=normalize, backend=backend, chunk_rows=3)
        total = (other * torch.arange(7)).sum() + torch.where(own.isfinite(), own, 0).sum()
        return [other, own, *torch.autograd.grad(total, given)]

    for found, expected in zip(run("triton"), run("cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert launched


def test_batches_that_are_small() -> None:
    """Nothing, one row, no positive, no queue yet."""
    features, labels = FIXED
    for rows in (0, 1, 3):
        leaf = features[:rows].clone().requires_grad_()
        loss = contrastive(leaf, torch.arange(rows), backend="triton")
        loss.backward()
        assert loss == 0
        assert (leaf.grad == 0).all()
    said = arguments("gml", labels) | {"queue_labels": torch.full((31,), -1)}
    assert contrastive(features, labels, "gml", backend="triton", **said) == 0


def test_who_looks_at_a_call() -> None:
    """A compiler sees an operator, and a function transform the definition."""
    features, labels = FIXED
    said = arguments("balanced", labels)

    def scalar(x: Tensor) -> Tensor:
        return contrastive(x, labels, "balanced", backend="triton", **said)

    def gradient(function) -> Tensor:
        leaf = features.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    exact = gradient(scalar)
    compiled = torch.compile(scalar, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled), exact)
    torch.testing.assert_close(torch.func.grad(scalar)(features), exact)


def test_what_serves_a_call() -> None:
    features, labels = FIXED
    said = str(ltk.explain(contrastive, features, labels, backend="triton"))
    assert said == "triton: Triton kernel between matrix products; chunks of 23 of 23 rows x 23 columns"
    assert ltk.nn.SupCon(backend="triton").explain(features).backend == "triton"
    assert ltk.nn.SupCon(backend="triton")(features, labels) == contrastive(features, labels, backend="triton")
    assert _rows.chunk_rows_of(65536, 65536, 0, "triton") == 128
    assert _rows.chunk_rows_of(65536, 4096, 0, "triton") == 2048
