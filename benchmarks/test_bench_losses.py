"""pytest-benchmark: the losses against eager torch. The answer is checked before it is timed; nothing asserts a time.

pytest benchmarks/test_bench_losses.py            # tables by pytest-benchmark
pytest --benchmark-disable benchmarks             # the answers only, as CI does
"""

from __future__ import annotations

import pytest
import torch
from ltkernels.benchmarks import baselines, losses, small_calls


@pytest.mark.parametrize("backend", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("shape", [(128, 10), (256, 1000)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", baselines.TIMED)
def test_forward_backward(benchmark, name: str, shape: tuple[int, int], backend: str) -> None:
    counts = losses.counts_of(shape[1])
    batches = losses.inputs(*shape, torch.float32, cosine=name in ("ldam", "kps"))
    torch._dynamo.reset()
    loss = baselines.implementation(backend, name, counts)
    assert losses.agrees(loss, batches[0], name, counts)
    benchmark.group = f"{name} {shape[0]}x{shape[1]}"
    turn = iter(range(10**9))
    benchmark(lambda: losses.step(loss, batches[next(turn) % len(batches)]))


@pytest.mark.parametrize("backend", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("shape", [(128, 10), (256, 1000)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_learned_prior(benchmark, shape: tuple[int, int], backend: str) -> None:
    counts = losses.counts_of(shape[1])
    batches = losses.inputs(*shape, torch.float32, cosine=False)
    torch._dynamo.reset()
    loss = baselines.learned_prior(backend, counts)
    assert losses.learns(loss, batches[0], counts)
    benchmark.group = f"learned prior {shape[0]}x{shape[1]}"
    turn = iter(range(10**9))
    benchmark(lambda: losses.learning_step(loss, batches[next(turn) % len(batches)]))


def test_small_calls_are_checked_before_they_are_timed(capsys) -> None:
    assert small_calls.main(["--quick"]) == 0
    assert capsys.readouterr().out.count("eager") == 3 * 3 + 1
