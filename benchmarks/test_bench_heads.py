"""pytest-benchmark: classifier and loss together, forward and backward. Answers are checked first; nothing asserts a time.

pytest benchmarks/test_bench_heads.py             # a group per shape, the ratio to the fastest in brackets
pytest --benchmark-disable benchmarks             # the answers only, as CI does
"""

from __future__ import annotations

import pytest
from ltkernels.benchmarks import heads


@pytest.mark.parametrize("backend", ["ours", *heads.PEERS])
@pytest.mark.parametrize("shape", heads.QUICK, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("head", heads.HEADS)
def test_forward_backward(benchmark, head: str, shape: tuple[int, int, int], backend: str) -> None:
    loss = heads.implementation(backend, head, *shape[1:])
    if loss is None:
        pytest.skip(f"{backend} is not installed, or has no {head}")
    given = heads.inputs(*shape)
    assert heads.agrees(loss, given, head)
    benchmark.group = f"{head} " + "x".join(map(str, shape))
    benchmark(heads.step, loss, given)
