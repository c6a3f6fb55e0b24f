"""Promise: a classifier sharded over 1, 2, 3 or 4 processes has the loss and the gradients of the whole one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ltkernels as ltk

WORLD = 4


def test_equals_the_unsharded_loss(tmp_path) -> None:
    """Each of four gloo processes runs every case in groups of 1 to 4 of them, with shards of unequal sizes."""
    program = Path(__file__).with_name("sharded_program.py")
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(WORLD), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in range(WORLD)
    ]
    results = [process.communicate(timeout=600) for process in processes]
    for output, errors in results:
        assert re.search(r"passed \d\d", output), errors


@pytest.fixture
def _one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


X, W, Y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 4])


def call(features=X, weight=W, target=Y, **options):
    options = {"class_start": 0, "num_classes": 5, **options}
    return ltk.distributed.sharded_linear_adjusted_cross_entropy(features, weight, target, **options)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_start": 1}, ValueError, r"class_start is 1; .* \[0, 0\]"),
        ({"class_start": -1}, ValueError, "class_start is -1"),
        ({"num_classes": 7}, ValueError, "the ranks hold 5 classes; num_classes is 7"),
        ({"num_classes": 4}, ValueError, "class_start is 0; with 5 classes here"),
        ({"weight": torch.randn(5, 4)}, ValueError, r"weight_shard has shape \(5, 4\)"),
        ({"weight": W.double()}, TypeError, "weight_shard has dtype torch.float64, features torch.float32"),
        ({"bias": torch.zeros(4)}, ValueError, "bias has 4 entries"),
        ({"target": torch.tensor([0, 1, 2, 5])}, ValueError, "label 5 in row 3"),
        ({"target": torch.rand(4, 5)}, TypeError, "takes class indices"),
        ({"shift": torch.zeros(4)}, ValueError, r"shift has shape \(4,\)"),
        ({"shift": torch.zeros(5, requires_grad=True)}, ValueError, "shift requires a gradient"),
        ({"class_weight": torch.full((5,), torch.nan)}, ValueError, r"class_weight\[0\] is nan"),
        ({"reduction": "total"}, ValueError, "'total'"),
        ({"features": X[0]}, ValueError, r"features has shape \(3,\)"),
    ],
)
def test_bad_input(options, error, message) -> None:
    with pytest.raises(error, match=message):
        call(**options)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_inputs(dtype) -> None:
    """A part of larger tensors whose other entries are NaN: none of them is read."""

    def strided(value: torch.Tensor) -> torch.Tensor:
        whole = torch.full([2 * size for size in value.shape], torch.nan, dtype=dtype)
        part = whole[tuple(slice(None, None, 2) for _ in value.shape)]
        return part.copy_(value)

    x, w, b = X.to(dtype), W.to(dtype), torch.randn(5, dtype=dtype)
    assert torch.equal(call(strided(x), strided(w), bias=strided(b)), call(x, w, bias=b))


@pytest.mark.usefixtures("_one_process")
def test_a_rank_without_classes() -> None:
    with pytest.raises(ValueError, match="the ranks hold 0 classes; num_classes is 5"):
        call(weight=W[:0])


@pytest.mark.usefixtures("_one_process")
def test_double_backward_raises() -> None:
    leaf = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(call(leaf), leaf, create_graph=True)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        call()
