"""Tiles by timing instead of by the table, where ``LTKERNELS_TRITON_AUTOTUNE=1`` asks for it.

The first call of a kernel, device and size of batch times the table's tile and its neighbours (`_configs.neighbours`) on the caller's
own tensors, which compiles them and waits for the device; what it finds is kept in memory for this process. Not while a CUDA graph is
captured, and not where the gradient replaces the logits, which a second run would read: those take what was found before, else the table's.
The result is that of the table's tile but for the order of the sums inside a row.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable

import torch

from . import _configs
from ._configs import Specialisation

VARIABLE = "LTKERNELS_TRITON_AUTOTUNE"
_RUNS = 10
_found: dict[tuple[Specialisation, torch.device, int], Specialisation] = {}


def enabled() -> bool:
    return os.environ.get(VARIABLE) == "1"


def choose(
    listed: Specialisation,
    device: torch.device,
    rows: int,
    repeatable: bool,
    launch: Callable[[Specialisation], object],
) -> Specialisation:
    """`listed`, or a neighbour that ran faster. `launch` runs a specialisation; `repeatable`: it may be run more than once."""
    key = (listed, device, rows.bit_length())
    if key not in _found:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not repeatable or capturing:
            return listed
        _found[key] = min(_configs.alternatives(listed), key=lambda each: _seconds(each, listed, device, launch))
    return _found[key]


def _seconds(
    tried: Specialisation, listed: Specialisation, device: torch.device, launch: Callable[[Specialisation], object]
) -> float:
    try:
        launch(tried)  # compiles
    except Exception:
        if tried == listed:
            raise
        return float("inf")  # more than a block can have
    if device.type != "cuda":
        begin = time.perf_counter()
        launch(tried)
        return time.perf_counter() - begin
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_RUNS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        launch(tried)
        mark.record()
    torch.cuda.synchronize(device)
    return min(first.elapsed_time(second) for first, second in itertools.pairwise(marks)) / 1e3
