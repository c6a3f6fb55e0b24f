"""Soft targets, distillation and coupled experts, forward + backward on the CPU, against eager and compiled torch.

    python -m benchmarks.soft_targets --out benchmarks/results/soft-targets-cpu.json

A cell is (op, B, C); experts are three, as a list of logits. `pct_of_copy` is the bandwidth of the ideal traffic (every logit, and every
target or teacher's logit, read once, every gradient written once) in per cent of the copy bandwidth measured in the same run. `ok` says
that loss and gradients agreed with float64 before anything was timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

from . import harness
from .losses import counts_of

SHAPES = [(128, 100), (256, 1000), (1024, 8142), (512, 21841)]
QUICK = [(128, 100), (256, 1000)]
EXPERT_SHAPES = [(128, 100), (256, 1000), (256, 8142)]
SOFT = ("soft targets", "soft targets, prior", "distillation")
EXPERTS = ("SADE", "RIDE", "NCL mutual", "ResLT sum")
PEERS = ("eager", "compiled")
T = 2.0
Loss = Callable[[Sequence[Tensor], Tensor], Tensor]  # (logits, labels or a row over the classes) -> loss


def eager(op: str, classes: int) -> Loss:
    """As a user of torch writes it."""
    prior = torch.tensor(counts_of(classes), dtype=torch.float64)
    prior = (prior / prior.sum()).log()

    def of(z: Tensor) -> Tensor:
        return prior.to(z.dtype)

    shifts = ltk.nn.SADE(counts_of(classes)).shift

    def sade(z: Sequence[Tensor], y: Tensor) -> Tensor:
        return sum(F.cross_entropy(a + shift.to(a.dtype), y) for a, shift in zip(z, shifts))

    def ride(z: Sequence[Tensor], y: Tensor) -> Tensor:
        with torch.no_grad():
            mean = (sum(z) / len(z)).softmax(1)
        return sum(F.cross_entropy(a, y) - 0.2 * F.kl_div(a.log_softmax(1), mean, reduction="batchmean") for a in z)

    def mutual(z: Sequence[Tensor], y: Tensor) -> Tensor:
        a = [each + of(each) for each in z]
        log_p = [each.log_softmax(1) for each in a]
        pairs = [F.kl_div(q, p, log_target=True, reduction="batchmean") for p in log_p for q in log_p if p is not q]
        return sum(F.cross_entropy(each, y) for each in a) + 0.6 / (len(z) - 1) * sum(pairs)

    forms: dict[str, Loss] = {
        "soft targets": lambda z, q: F.cross_entropy(z[0], q),
        "soft targets, prior": lambda z, q: F.cross_entropy(z[0] + of(z[0]), q),
        "distillation": lambda z, t: (
            T**2 * F.kl_div((z[0] / T).log_softmax(1), (t / T).log_softmax(1), log_target=True, reduction="batchmean")
        ),
        "SADE": sade,
        "RIDE": ride,
        "NCL mutual": mutual,
        "ResLT sum": lambda z, y: sum(F.cross_entropy(a, y) for a in z) + F.cross_entropy(sum(z), y),
    }
    return forms[op]


def ours(op: str, classes: int) -> Loss:
    counts = counts_of(classes)
    shift = ltk.adjustments.logit_adjustment(counts).shift
    cross_entropy, experts = ltk.functional.adjusted_cross_entropy, ltk.functional.experts_cross_entropy
    prior = [ltk.losses.Adjustment(shift=shift)] * 3
    forms: dict[str, Loss] = {
        "soft targets": lambda z, q: cross_entropy(z[0], q),
        "soft targets, prior": lambda z, q: cross_entropy(z[0], q, shift=shift),
        "distillation": lambda z, t: ltk.functional.distillation(z[0], t, T),
        "RIDE": lambda z, y: experts(z, y, coupling="mean_kl", factor=-0.2),
        "NCL mutual": lambda z, y: experts(z, y, prior, coupling="mutual_kl", adjusted=True, factor=0.6),
        "ResLT sum": lambda z, y: experts(z, y, coupling="sum"),
    }
    return ltk.nn.SADE(counts) if op == "SADE" else forms[op]


def implementation(backend: str, op: str, classes: int) -> Loss:
    if backend == "ours":
        return ours(op, classes)
    return torch.compile(eager(op, classes), dynamic=False) if backend == "compiled" else eager(op, classes)


def inputs(op: str, rows: int, classes: int) -> list[tuple[list[Tensor], Tensor]]:
    """Enough different batches to leave the caches between two calls, at most eight."""
    many = 3 if op in EXPERTS else 1
    found = []
    for seed in range(max(2, min(8, (64 << 20) // (many * rows * classes * 4)))):
        generator = torch.Generator().manual_seed(seed)
        z = [3 * torch.randn(rows, classes, generator=generator) for _ in range(many)]
        if op in EXPERTS:
            target = torch.randint(0, classes, (rows,), generator=generator)
        else:
            target = 3 * torch.randn(rows, classes, generator=generator)
            target = target if op == "distillation" else target.softmax(1)
        found.append(([each.requires_grad_() for each in z], target))
    return found


def step(loss: Loss, given: tuple[list[Tensor], Tensor]) -> None:
    for each in given[0]:
        each.grad = None
    loss(*given).backward()


def agrees(loss: Loss, given: tuple[list[Tensor], Tensor], op: str) -> bool:
    """Loss and gradients against the eager form in float64; zeros would not pass."""
    z, target = given
    exact = [each.detach().double().requires_grad_() for each in z]
    truth = eager(op, z[0].shape[1])(exact, target.double() if target.is_floating_point() else target)
    step(loss, given)
    close = bool((loss(*given).double() - truth).abs() <= 1e-4 * truth.abs())
    for each, wanted in zip(z, torch.autograd.grad(truth, exact), strict=True):
        close &= bool((each.grad.double() - wanted).norm() <= 1e-4 * wanted.norm()) and bool(wanted.norm() > 0)
    return close


def prepare(backend: str, cell: dict[str, Any]) -> harness.Prepared | None:
    torch._dynamo.reset()
    op, classes = cell["op"], cell["C"]
    loss = implementation(backend, op, classes)
    batches = inputs(op, cell["B"], classes)
    ok = agrees(loss, batches[0], op)
    served = f"cpu-{ltk._C.info()['isa']}" if backend == "ours" else backend
    return harness.Prepared([lambda batch=batch: step(loss, batch) for batch in batches], ok, {"backend": served})


def main(argv: list[str] | None = None) -> int:
    parser = harness.parser("soft_targets", __doc__, PEERS, quick="two small shapes", seconds=1.0)
    parser.add_argument("--ops", nargs="+", default=[*SOFT, *EXPERTS], choices=[*SOFT, *EXPERTS])
    options = parser.parse_args(argv)
    cells = [
        {"op": op, "B": b, "C": c, "D": None}
        for op in options.ops
        for b, c in (QUICK if options.quick else EXPERT_SHAPES if op in EXPERTS else SHAPES)
    ]

    def moved(cell: dict[str, Any]) -> float:
        return 4 * cell["B"] * cell["C"] * (6 if cell["op"] in EXPERTS else 3)

    return harness.run(__spec__.name, options, prepare, cells, moved=moved)


if __name__ == "__main__":
    sys.exit(main())
