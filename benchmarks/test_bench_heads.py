"""pytest-benchmark: classifier and loss together, forward and backward. Answers are checked first; nothing asserts a time.

pytest benchmarks/test_bench_heads.py             # a group per shape, the ratio to the fastest in brackets
pytest --benchmark-disable benchmarks             # the answers only, as CI does

`eager` is F.linear and F.cross_entropy; `chunked` is torch's F.linear_cross_entropy with its own choice of a chunk, which is a
few rows where C is large, and `chunked256` the same with our chunk. ``peak_mb`` in the JSON is the largest allocation at one
time beyond the inputs, the gradients included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

HEAD = ltk.functional.linear_adjusted_cross_entropy
SHAPES = [(256, 256, 21841), (512, 512, 21841), (1024, 256, 21841), (1024, 256, 8142), (512, 512, 1000), (128, 64, 10)]
SCALE = 30.0  # of the cosines
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def losses(classes: int, cosine: bool) -> dict[str, Loss]:
    """name: (features, weight, target) -> loss."""

    def logits_of(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return (SCALE * F.normalize(features), F.normalize(weight)) if cosine else (features, weight)

    def chunked(rows: int | None) -> Loss:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return lambda f, w, y: F.linear_cross_entropy(*logits_of(f, w), y, options=options)

    scale = torch.full((classes,), SCALE) if cosine else None
    found: dict[str, Loss] = {
        "ours": lambda f, w, y: HEAD(f, w, y, normalize=cosine, scale=scale),
        "eager": lambda f, w, y: F.cross_entropy(F.linear(*logits_of(f, w)), y),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        found |= {"chunked": chunked(None), "chunked256": chunked(256)}
    return found


def inputs(rows: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, width, generator=generator, requires_grad=True)
    weight = (torch.randn(classes, width, generator=generator) / width**0.5).requires_grad_()
    return features, weight, torch.randint(0, classes, (rows,), generator=generator)


def agrees(loss: Loss, given: tuple[Tensor, Tensor, Tensor], cosine: bool) -> bool:
    """Loss and gradients against float64 within 1e-4 of a row's largest entry; zeros would not pass."""
    *leaves, target = given
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = losses(1, cosine)["eager"](*exact, target)
    value = loss(*given)
    close = torch.allclose(value.double(), truth, rtol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(truth, exact)):
        largest = theirs.abs().amax(dim=1, keepdim=True)
        close &= bool(((ours - theirs).abs() <= 1e-4 * largest).all() and largest.max() > 0)
    return close


def peak_mb(call: Callable[[], None]) -> float:
    """Largest number of MiB allocated at one time during the call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0) / 2**20


def step(loss: Loss, given: tuple[Tensor, Tensor, Tensor]) -> None:
    loss(*given).backward()
    for leaf in given[:2]:
        leaf.grad = None


@pytest.mark.parametrize("backend", ["ours", "eager", "chunked", "chunked256"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_forward_backward(benchmark, head: str, shape: tuple[int, int, int], backend: str) -> None:
    given = inputs(*shape)
    found = losses(shape[2], head == "cosine")
    if backend not in found:
        pytest.skip("this torch has no F.linear_cross_entropy with chunks")
    if not benchmark.enabled and shape[2] > 10000:
        pytest.skip("torch's own chunks take 5 s here; the smaller shapes check the answers")
    loss = found[backend]
    assert agrees(loss, given, head == "cosine")
    benchmark.group = f"{head} " + "x".join(map(str, shape))
    benchmark.extra_info["peak_mb"] = round(peak_mb(lambda: step(loss, given)), 1)
    if shape[2] > 10000:
        benchmark.pedantic(step, (loss, given), rounds=3, warmup_rounds=1)
    else:
        benchmark(step, loss, given)
