"""Forward + backward of the losses on the CPU, against eager and compiled torch and the packages that have them.

    python -m benchmarks.losses --out benchmarks/results/losses-cpu.json

A cell is (loss, dtype, B, C). `pct_of_copy` is the bandwidth of the ideal traffic (each logit read once, each gradient written once)
in per cent of the copy bandwidth measured in the same run. `ok` says that the answer agreed with float64 before it was timed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

import ltkernels as ltk

from . import baselines, harness

# The way from a call to the kernel and back may take this much of eager torch's; an empty autograd Function in Python is most of it.
OVERHEAD_BUDGET = 1.75
SHAPES = [(128, 10), (128, 100), (256, 1000), (1024, 8142), (512, 21841), (64, 128256)]
QUICK = [(128, 10), (256, 1000)]


def counts_of(classes: int) -> list[int]:
    return [max(1, int(5000 * 0.01 ** (k / max(1, classes - 1)))) for k in range(classes)]


def inputs(
    rows: int, classes: int, dtype: torch.dtype, cosine: bool, warm: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Enough different batches to leave the second-level cache between two calls, at most eight; or one batch, `warm`."""
    number = 1 if warm else max(2, min(8, (64 << 20) // (rows * classes * 4)))
    batches = []
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(rows, classes, generator=generator) * (0.3 if cosine else 3.0)
        y = torch.randint(0, classes, (rows,), generator=generator)
        batches.append((z.to(dtype).requires_grad_(), y))
    return batches


def step(
    loss: baselines.Loss,
    batch: tuple[torch.Tensor, torch.Tensor],
    upstream: torch.Tensor | None = None,
    **said: torch.Tensor,
) -> None:
    z, y = batch
    z.grad = None
    loss(z, y, **said).backward(upstream)


def learning_step(loss: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    for parameter in loss.parameters():
        parameter.grad = None
    step(loss, batch)


def learns(loss: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], counts: list[int]) -> bool:
    """`agrees`, and the gradient of the log prior against the eager form in float64."""
    z, y = batch
    exact = baselines.LearnedPrior(counts).double()
    exact(z.detach().double(), y).backward()
    learning_step(loss, batch)
    found, expected = loss.get_parameter("shift").grad.double(), exact.shift.grad
    return bool((found - expected).norm() <= 1e-4 * expected.norm()) and agrees(loss, batch, "logit_adjusted", counts)


def agrees(
    loss: baselines.Loss,
    batch: tuple[torch.Tensor, torch.Tensor],
    name: str,
    counts: list[int],
    upstream: torch.Tensor | None = None,
    **said: torch.Tensor,
) -> bool:
    """Loss and gradient against the eager form in float64."""
    z, y = batch
    exact = z.detach().double().requires_grad_()
    expected = baselines.eager(name, counts)(exact, y)
    expected.backward(None if upstream is None else upstream.double())
    step(loss, batch, upstream, **said)
    value = loss(z, y).detach().double()
    tolerance = 1e-4 if z.dtype == torch.float32 else 2e-2
    close = (z.grad.double() - exact.grad).norm() <= tolerance * exact.grad.norm()
    return bool(close) and bool((value - expected).abs() <= tolerance * expected.abs())


def prepare(backend: str, cell: dict[str, Any]) -> harness.Prepared | None:
    """The calls of one implementation; None where it has no such loss."""
    name, classes, dtype = cell["op"], cell["C"], getattr(torch, cell["dtype"])
    counts = counts_of(classes)
    torch._dynamo.reset()
    learned = "learnable" in cell["mode"]
    loss = baselines.learned_prior(backend, counts) if learned else baselines.implementation(backend, name, counts)
    if loss is None:
        return None
    batches = inputs(cell["B"], classes, dtype, ltk.LOSSES[name].logits == "cosine", "warm" in cell["mode"])
    upstream = torch.tensor(0.37) if "upstream" in cell["mode"] else None
    said = {"grad_scale": upstream} if "announced" in cell["mode"] and backend == "ours" else {}
    calls = [lambda batch=batch: step(loss, batch, upstream, **said) for batch in batches]
    if learned:
        calls = [lambda batch=batch: learning_step(loss, batch) for batch in batches]
    served = ltk.explain(loss, *batches[0]).backend if backend == "ours" else backend
    ok = learns(loss, batches[0], counts) if learned else agrees(loss, batches[0], name, counts, upstream, **said)
    return harness.Prepared(calls, ok, {"backend": served})


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is timed: every loss at every shape; logit adjustment also at 2 x 2, which is nothing but the way to the kernel and back, with
    an upstream gradient that is not 1, ours told of it (`grad_scale`) or not, and with its log prior learned."""
    found = []
    mode = "forward+backward, warm" if options.warm else "forward+backward"
    for dtype in ("float32",) if options.quick else ("float32", "bfloat16"):
        for rows, classes in QUICK if options.quick else SHAPES:
            for name in options.losses:
                found.append({"op": name, "dtype": dtype, "B": rows, "C": classes, "D": None, "mode": mode})
    if "logit_adjusted" in options.losses and not options.warm:
        own = {"op": "logit_adjusted", "dtype": "float32", "D": None}
        found.append({**own, "B": 2, "C": 2, "mode": "forward+backward"})
        if not options.quick:
            for mode in ("upstream 0.37", "announced upstream 0.37", "learnable shift"):
                found += [{**own, "B": b, "C": c, "mode": f"forward+backward, {mode}"} for b, c in SHAPES]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = harness.parser("losses", __doc__, baselines.PEERS, quick="two shapes, float32", seconds=1.0)
    parser.add_argument(
        "--warm", action="store_true", help="one batch again and again, as when the layer before wrote it"
    )
    parser.add_argument("--losses", nargs="+", default=list(baselines.TIMED), choices=baselines.TIMED)
    options = parser.parse_args(argv)

    def moved(cell: dict[str, Any]) -> float:
        return 2 * cell["B"] * cell["C"] * getattr(torch, cell["dtype"]).itemsize

    def overhead(rows: list[dict[str, Any]]) -> None:
        small = [row for row in rows if row["B"] * row["C"] == 4]
        if len(small) > 1:
            ratio = small[0]["ms_p50"] / small[1]["ms_p50"]
            verdict = "within" if ratio <= OVERHEAD_BUDGET else "OVER"
            print(f"overhead of a call: {ratio:.2f}x {small[1]['backend']}, {verdict} the budget of {OVERHEAD_BUDGET}x")

    return harness.run(__spec__.name, options, prepare, cells(options), repeats=5, moved=moved, after=overhead)


if __name__ == "__main__":
    sys.exit(main())
