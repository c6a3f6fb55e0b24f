"""Promise: a classifier sharded over 1, 2, 3 or 4 processes has the loss and the gradients of the whole one."""

from __future__ import annotations

import itertools
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


Sampling = ltk.distributed.NegativeSampling
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
        ({"num_classes": 7}, ValueError, r"hold the classes \[\(0, 5\)\]; they must make up \[0, 7\)"),
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
        ({"batch": "split"}, ValueError, "batch is 'split'"),
        ({"class_start": None}, ValueError, "class_start is missing"),
        ({"mesh_dim": "classes"}, ValueError, "mesh_dim is 'classes'"),
        ({"sampling": 0.5}, TypeError, "sampling is 0.5"),
        ({"sampling": Sampling(0.0, step=0)}, ValueError, "sampling.rate is 0.0"),
        ({"sampling": Sampling(0.5, step=-1)}, ValueError, "sampling.step is -1"),
        ({"sampling": Sampling(0.5, 0, correct=False), "label_smoothing": 0.1}, ValueError, "label_smoothing is 0.1"),
        ({"features": X[0]}, ValueError, r"features has shape \(3,\)"),
    ],
)
def test_bad_input(options, error, message) -> None:
    with pytest.raises(error, match=message):
        call(**options)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_inputs(dtype) -> None:
    """A part of larger tensors whose other entries are NaN: none of them is read. In multiples of 1/4 the products are exact: otherwise
    the last bits of a GEMM differ with the strides."""

    def strided(value: torch.Tensor) -> torch.Tensor:
        whole = torch.full([2 * size for size in value.shape], torch.nan, dtype=dtype)
        part = whole[tuple(slice(None, None, 2) for _ in value.shape)]
        return part.copy_(value)

    x, w, b = ((4 * value).round().to(dtype) / 4 for value in (X, W, torch.randn(5)))
    assert torch.equal(call(strided(x), strided(w), bias=strided(b)), call(x, w, bias=b))


@pytest.mark.usefixtures("_one_process")
def test_a_rank_without_classes() -> None:
    with pytest.raises(ValueError, match=r"the ranks hold the classes \[\(0, 0\)\]; they must make up \[0, 5\)"):
        call(weight=W[:0])


@pytest.mark.usefixtures("_one_process")
def test_double_backward_raises() -> None:
    leaf = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(call(leaf), leaf, create_graph=True)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        call()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("normalize", [False, True])
def test_autocast_is_that_of_the_unsharded_loss(normalize) -> None:
    results = []
    for loss_of in (call, ltk.functional.linear_adjusted_cross_entropy):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(x, w, Y, normalize=normalize)
            loss.backward()
        assert x.grad.dtype == w.grad.dtype == torch.float32
        results.append((loss.detach(), x.grad, w.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0.0)  # 16-bit logits would be off by more


@pytest.mark.usefixtures("_one_process")
def test_holds_one_chunk_of_logits(monkeypatch) -> None:
    rows, width, classes, chunk = 64, 4, 20_000, 16
    monkeypatch.setattr(ltk.distributed._autograd, "_HELD", classes * chunk)
    x, w = torch.randn(rows, width), torch.randn(classes, width, requires_grad=True)
    y = torch.randint(0, classes, (rows,))

    def step() -> None:
        call(x, w, y, num_classes=classes).backward()
        w.grad = None

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = list(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    logits, weights = 4 * classes * chunk, 4 * classes * width
    assert logits <= max(held) < 1.2 * logits + 2 * weights
