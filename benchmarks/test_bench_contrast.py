"""pytest-benchmark: contrastive losses, forward and backward. Answers are checked first; nothing asserts a time.

pytest benchmarks/test_bench_contrast.py          # a group per loss, the ratio to the fastest in brackets
pytest --benchmark-disable benchmarks             # the answers only, as CI does
"""

from __future__ import annotations

import pytest
from ltkernels.benchmarks import contrast


@pytest.mark.parametrize("backend", ["ours", *contrast.PEERS])
@pytest.mark.parametrize("loss", contrast.LOSSES)
def test_forward_backward(benchmark, loss: str, backend: str) -> None:
    run = contrast.implementation(backend, loss)
    if run is None:
        pytest.skip(f"{backend} is not installed, or has no {loss}")
    given = contrast.inputs(*contrast.QUICK[0])
    assert contrast.agrees(run, given, loss)
    benchmark.group = loss
    benchmark(contrast.step, run, given)
