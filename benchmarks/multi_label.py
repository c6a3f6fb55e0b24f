"""Forward + backward of multi-label losses on the CPU, against torch's binary_cross_entropy_with_logits, eager and compiled.

    python -m benchmarks.multi_label --out benchmarks/results/multi-label-cpu.json

A cell is (loss, dtype, B, C), one positive in fifty, targets in float32 as torch takes them, the loss divided by the rows. ``plain`` is
torch's call alone; ``tables`` has factors of a class' positives and negatives (its ``weight`` and ``pos_weight``) and, beside these, a
shift; ``statistics`` adds the sums of gradients that EQL v2 keeps; ``distribution-balanced`` is that loss by its equations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

from . import harness
from .losses import counts_of

OPS = ("plain", "tables", "statistics", "distribution-balanced")
SHAPES = [(128, 80), (256, 1000), (512, 1203), (1024, 8142)]
QUICK = [(128, 80), (256, 1000)]
PEERS = ("eager", "compiled")
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def tables(classes: int, dtype: torch.dtype) -> dict[str, Tensor]:
    n = torch.tensor(counts_of(classes), dtype=torch.float64)
    found = {"shift": torch.log(n / n.sum()), "positive": 1 + 1 / n, "negative": n / (n + 50), "n": n}
    return {name: table.to(dtype) for name, table in found.items()}


def ours(op: str, classes: int) -> Loss:
    own = tables(classes, torch.float32)
    if op == "distribution-balanced":
        counts = counts_of(classes)
        balanced = ltk.nn.DistributionBalanced(counts, sum(counts) + 1)
        return lambda z, hot: (balanced(z, hot), None)
    options: dict[str, Any] = {} if op == "plain" else {name: own[name] for name in ("shift", "positive", "negative")}
    if op == "statistics":
        return lambda z, hot: ltk.functional.sigmoid_cross_entropy(z, hot, statistics=True, **options)
    return lambda z, hot: (ltk.functional.sigmoid_cross_entropy(z, hot, **options), None)


def torchs(op: str, classes: int, dtype: torch.dtype) -> Loss:
    own = tables(classes, dtype)
    n, total = own["n"], own["n"].sum() + 1
    bias, share = 0.05 * torch.log(n / (total - n)), 1 / n

    def loss(z: Tensor, hot: Tensor) -> tuple[Tensor, Tensor | None]:
        if op == "plain":
            return F.binary_cross_entropy_with_logits(z, hot, reduction="sum") / len(z), None
        if op == "distribution-balanced":
            weight = 0.1 + torch.sigmoid(10 * (share / (hot @ share)[:, None] - 0.2))
            a = z + bias
            scaled = torch.where(hot == 1, a, 2 * a)
            each = F.binary_cross_entropy_with_logits(
                scaled, hot, torch.where(hot == 1, weight, weight / 2), reduction="sum"
            )
            return each / len(z), None
        a = z + own["shift"]
        positive, negative = own["positive"], own["negative"]
        found = F.binary_cross_entropy_with_logits(a, hot, negative, pos_weight=positive / negative, reduction="sum")
        if op == "tables":
            return found / len(z), None
        with torch.no_grad():
            p = torch.sigmoid(a)
            sums = torch.stack([(positive * hot * (1 - p)).sum(0), (negative * (1 - hot) * p).sum(0)])
        return found / len(z), sums

    return loss


def inputs(rows: int, classes: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Enough batches to leave the second-level cache between two calls, at most eight."""
    batches = []
    for seed in range(max(2, min(8, (64 << 20) // (rows * classes * 4)))):
        generator = torch.Generator().manual_seed(seed)
        z = (torch.randn(rows, classes, generator=generator) * 3).to(dtype).requires_grad_()
        hot = (torch.rand(rows, classes, generator=generator) < 0.02).float()
        hot[:, 0] = 1
        batches.append((z, hot))
    return batches


def step(loss: Loss, batch: tuple[Tensor, Tensor]) -> None:
    batch[0].grad = None
    loss(*batch)[0].backward()


def agrees(loss: Loss, op: str, batch: tuple[Tensor, Tensor]) -> bool:
    """Loss, statistics and gradient against torch's in float64."""
    z, hot = batch
    exact = z.detach().double().requires_grad_()
    wanted, wanted_sums = torchs(op, z.shape[1], torch.float64)(exact, hot.double())
    (slopes,) = torch.autograd.grad(wanted, exact)
    step(loss, batch)
    with torch.no_grad():
        found, sums = loss(z, hot)
    tolerance = 1e-4 if z.dtype == torch.float32 else 2e-2
    close = bool((z.grad.double() - slopes).norm() <= tolerance * slopes.norm())
    if wanted_sums is not None:
        close &= sums is not None and bool((sums - wanted_sums).norm() <= tolerance * wanted_sums.norm())
    return close and bool((found - wanted).abs() <= tolerance * wanted.abs())


def prepare(backend: str, cell: dict[str, Any]) -> harness.Prepared:
    classes, dtype = cell["C"], getattr(torch, cell["dtype"])
    torch._dynamo.reset()
    loss = ours(cell["op"], classes) if backend == "ours" else torchs(cell["op"], classes, dtype)
    if backend == "compiled":
        loss = torch.compile(loss)
    batches = inputs(cell["B"], classes, dtype)
    served = ltk.explain(ltk.functional.sigmoid_cross_entropy, *batches[0]).backend if backend == "ours" else backend
    calls = [lambda batch=batch: step(loss, batch) for batch in batches]
    return harness.Prepared(calls, agrees(loss, cell["op"], batches[0]), {"backend": served})


def main(argv: list[str] | None = None) -> int:
    options = harness.parser("multi_label", __doc__, PEERS, quick="two shapes", seconds=1.0).parse_args(argv)
    shapes = QUICK if options.quick else SHAPES
    cells = [{"op": op, "B": b, "C": c, "D": None} for b, c in shapes for op in OPS]
    # Logits and targets are read, gradients written.
    return harness.run(__spec__.name, options, prepare, cells, repeats=5, moved=lambda cell: 12 * cell["B"] * cell["C"])


if __name__ == "__main__":
    sys.exit(main())
