"""Where the time of a small call goes, step by step, beside torch's own.

    python -m benchmarks.small_calls --out benchmarks/results/small-calls-cpu.json

All steps of a shape take turns in one process, a burst each; a row has the smallest and the median time of a call. An engine run
between two calls evicts what they need from the processor's caches: the steps alone, hot in a loop, add up to less than they cost
within a call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels.losses import _autograd, _door

from . import harness
from .losses import counts_of

SHAPES = [(2, 2), (128, 10), (128, 100)]
HEAD = (128, 64, 10)
Calls = dict[str, Callable[[], object]]


class _Empty(torch.autograd.Function):
    """What no loss written in Python can do without: a Function that makes a number and a gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.grad = torch.empty_like(z)
        return z.new_empty(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        grad, ctx.grad = ctx.grad, None
        return grad


def step(loss: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], None]:
    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return call


def agree(ours: Callable[[], Tensor], eager: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> None:
    """Raises AssertionError where loss or gradients differ: no time is worth printing then."""
    torch.testing.assert_close(ours(), eager(), rtol=1e-5, atol=1e-6)
    pairs = zip(torch.autograd.grad(ours(), leaves), torch.autograd.grad(eager(), leaves))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def loss_calls(rows: int, classes: int) -> Calls:
    """Plain cross-entropy and logit adjustment, and their steps."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, classes, generator=generator).requires_grad_()
    y = torch.randint(0, classes, (rows,), generator=generator)
    logits = z.detach()
    prior = ltk.nn.LogitAdjustedCrossEntropy(counts_of(classes))
    shift = prior.shift
    op, ce = ltk.functional.adjusted_cross_entropy, ltk.nn.CrossEntropy()
    checked = _door.checked(z, y)
    forms: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "ce": (lambda: op(z, y), lambda: F.cross_entropy(z, y)),
        "la": (lambda: op(z, y, shift=shift), lambda: F.cross_entropy(z + shift, y)),
    }
    calls: Calls = {
        "empty Function, forward + backward": step(lambda: _Empty.apply(z), (z,)),
        "ce: checks": lambda: _door.checked(z, y),
        "ce: allocation and kernel": lambda: _autograd.run(logits, checked.call, True),
        "ce: forward alone": lambda: op(logits, y),
        "ce: forward alone, eager": lambda: F.cross_entropy(logits, y),
    }
    for name, (ours, eager) in forms.items():
        agree(ours, eager, (z,))
        module = {"ce": ce, "la": prior}[name]
        calls[f"{name}: forward + backward"] = step(ours, (z,))
        calls[f"{name}: forward + backward, Module"] = step(lambda module=module: module(z, y), (z,))
        calls[f"{name}: forward + backward, eager"] = step(eager, (z,))
    return calls


def head_calls(rows: int, width: int, classes: int) -> Calls:
    generator = torch.Generator().manual_seed(0)
    sizes = ((rows, width), (classes, width), (classes,))
    leaves = tuple(torch.randn(size, generator=generator).requires_grad_() for size in sizes)
    x, weight, bias = leaves
    y = torch.randint(0, classes, (rows,), generator=generator)

    def ours() -> Tensor:
        return ltk.functional.linear_adjusted_cross_entropy(x, weight, y, bias=bias)

    def eager() -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), y)

    agree(ours, eager, leaves)
    return {"head: forward + backward": step(ours, leaves), "head: forward + backward, eager": step(eager, leaves)}


def timed(calls: Calls, rounds: int) -> dict[str, tuple[float, float]]:
    """(smallest, median) microseconds of a call, over bursts that take turns."""
    number = 200
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(number):
                call()
            found[name].append((time.perf_counter() - start) / number * 1e6)
    return {name: (min(times), statistics.median(times)) for name, times in found.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ltkernels bench small_calls", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args(argv)
    cells = [({"B": b, "C": c, "D": None}, loss_calls(b, c)) for b, c in SHAPES]
    cells.append(({"B": HEAD[0], "C": HEAD[2], "D": HEAD[1]}, head_calls(*HEAD)))
    rows = []
    for shape, calls in cells:
        print(" x ".join(str(shape[name]) for name in "BDC" if shape[name]))
        for name, (least, median) in timed(calls, 1 if options.quick else 40).items():
            print(f"  {name:42} {least:7.1f} {median:7.1f} us", flush=True)
            rows.append({**shape, "call": name, "us_min": round(least, 2), "us_p50": round(median, 2)})
    if options.out:
        options.out.write_text(
            json.dumps({"kind": "small calls", "machine": harness.machine(), "rows": rows}, indent=1) + "\n"
        )
        print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
