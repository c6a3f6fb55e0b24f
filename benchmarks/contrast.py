"""Contrastive losses, forward + backward on the CPU, against eager and compiled torch and the packages that have them.

    python -m benchmarks.contrast --out benchmarks/results/contrast-cpu.json

A cell is (loss, B, D, C): B rows of width D, C columns. `peak_mb` is the largest allocation at one time beyond the inputs, the gradients
included. `ok` says that loss and gradients agreed with float64 before anything was timed. `--large` adds 32 768 rows, once, ours alone, in
a process of its own whose resident memory is `peak_mb` then: the similarities of the others would be 4 GiB a matrix.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

from . import harness

SHAPES = [(256, 128), (1024, 128), (4096, 128)]
QUICK = [(256, 128)]
LOSSES = ("nt-xent", "supcon", "balanced", "moco")
PEERS = ("eager", "compiled", "pytorch-metric-learning", "lightly", "info-nce-pytorch")
LARGE = 32768
LARGEST_OF_PAIRS = 512  # rows: a matrix of positive pairs by negative pairs takes 272 MiB at 256 rows, 16 GiB at 1024
TAU, CLASSES, QUEUE = 0.1, 100, 16384
Loss = Callable[[dict[str, Tensor]], Tensor]


def nt_xent(g: dict[str, Tensor]) -> Tensor:
    z = F.normalize(g["x"])
    s = (z @ z.t() / TAU).fill_diagonal_(-torch.inf)
    half = len(z) // 2
    return F.cross_entropy(s, torch.arange(len(z)).roll(half))


def supcon(g: dict[str, Tensor]) -> Tensor:
    """As in the authors' code: a mask of positives, the maximum subtracted, the diagonal masked out."""
    z, y = F.normalize(g["x"]), g["y"]
    s = z @ z.t() / TAU
    s = s - s.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), dtype=s.dtype)
    positive = (y[:, None] == y).to(s.dtype) * others
    log_p = s - torch.log((torch.exp(s) * others).sum(1, keepdim=True))
    return -((positive * log_p).sum(1) / positive.sum(1)).mean()


def balanced(g: dict[str, Tensor]) -> Tensor:
    """As in the authors' code: exponentials divided by the number of columns of their class."""
    z, y = F.normalize(g["x"]), g["y"]
    columns = torch.cat([z, F.normalize(g["centres"])])
    labels = torch.cat([y, torch.arange(CLASSES)])
    s = z @ columns.t() / TAU
    others = 1 - torch.eye(len(z), len(columns), dtype=s.dtype)
    same = (y[:, None] == labels).to(s.dtype)
    positive = same * others
    size = torch.bincount(labels, minlength=CLASSES)[labels].to(s.dtype) - same
    s = s - s.max(dim=1, keepdim=True).values.detach()
    total = (torch.exp(s) * others / size.clamp_min(1)).sum(1, keepdim=True)
    return -((positive * (s - torch.log(total))).sum(1) / positive.sum(1)).mean()


def moco(g: dict[str, Tensor]) -> Tensor:
    z, keys = F.normalize(g["x"]), F.normalize(g["keys"])
    s = torch.cat([(z * keys).sum(1, keepdim=True), z @ F.normalize(g["queue"]).t()], dim=1) / TAU
    return F.cross_entropy(s, torch.zeros(len(z), dtype=torch.int64))


EAGER: dict[str, Loss] = {"nt-xent": nt_xent, "supcon": supcon, "balanced": balanced, "moco": moco}


def ours(name: str) -> Loss:
    contrastive = ltk.functional.contrastive
    return {
        # Rows i and i + B / 2 are views of one sample.
        "nt-xent": lambda g: contrastive(g["x"], torch.arange(len(g["x"])) % (len(g["x"]) // 2), "ntxent", tau=TAU),
        "supcon": lambda g: contrastive(g["x"], g["y"], tau=TAU),
        "balanced": lambda g: contrastive(g["x"], g["y"], "balanced", centres=g["centres"], tau=TAU),
        "moco": lambda g: contrastive(g["x"], kind="moco", keys=g["keys"], queue=g["queue"], tau=TAU),
    }[name]


def implementation(backend: str, name: str) -> Loss | None:
    """``(inputs) -> loss``; None where there is none."""
    if backend == "ours":
        return ours(name)
    if backend == "eager":
        return EAGER[name]
    if backend == "compiled":
        return torch.compile(EAGER[name], dynamic=False)
    try:
        if backend == "pytorch-metric-learning" and name in ("nt-xent", "supcon"):
            from pytorch_metric_learning import losses

            if name == "supcon":
                theirs = losses.SupConLoss(temperature=TAU)
                return lambda g: theirs(g["x"], g["y"])
            theirs = losses.NTXentLoss(temperature=TAU)
            return lambda g: theirs(g["x"], torch.arange(len(g["x"])) % (len(g["x"]) // 2))
        if backend == "lightly" and name == "nt-xent":
            from lightly.loss.ntx_ent_loss import NTXentLoss

            theirs = NTXentLoss(temperature=TAU)
            return lambda g: theirs(*g["x"].chunk(2))
        if backend == "info-nce-pytorch" and name == "moco":
            from info_nce import InfoNCE

            theirs = InfoNCE(temperature=TAU)
            return lambda g: theirs(g["x"], g["keys"], g["queue"])
    except ImportError:
        pass
    return None


def inputs(rows: int, width: int) -> dict[str, Tensor]:
    """A long-tailed batch with at least two rows of every class that it has."""
    generator = torch.Generator().manual_seed(0)
    share = torch.logspace(0, -2, CLASSES)
    half = torch.multinomial(share, rows // 2, replacement=True, generator=generator)

    def noise(count: int) -> Tensor:
        return torch.randn(count, width, generator=generator)

    x = noise(rows).requires_grad_()
    given = {"x": x, "y": half.repeat(2), "keys": noise(rows), "queue": noise(QUEUE)}
    return {**given, "centres": noise(CLASSES).requires_grad_()}


def leaves(given: dict[str, Tensor], name: str) -> list[str]:
    return ["x", "centres"] if name == "balanced" else ["x"]


def agrees(loss: Loss, given: dict[str, Tensor], name: str) -> bool:
    """Loss and gradients against float64 within 1e-4 of a row's largest entry; zeros would not pass."""
    names = leaves(given, name)
    exact = {
        key: x.detach().double().requires_grad_(key in names) if x.is_floating_point() else x
        for key, x in given.items()
    }
    truth, value = EAGER[name](exact), loss(given)
    close = torch.allclose(value.double(), truth, rtol=1e-5)
    grads = torch.autograd.grad(value, [given[key] for key in names])
    for found, expected in zip(grads, torch.autograd.grad(truth, [exact[key] for key in names])):
        largest = expected.abs().amax(dim=1, keepdim=True)
        close &= bool(((found - expected).abs() <= 1e-4 * largest).all() and largest.max() > 0)
    return close


def step(loss: Loss, given: dict[str, Tensor]) -> None:
    loss(given).backward()
    for value in given.values():
        value.grad = None


def prepare(backend: str, cell: dict[str, Any]) -> harness.Prepared | None:
    torch._dynamo.reset()
    loss = implementation(backend, cell["op"])
    if loss is None:
        return None
    if backend == "pytorch-metric-learning" and cell["op"] == "nt-xent" and cell["B"] > LARGEST_OF_PAIRS:
        return None
    given = inputs(cell["B"], cell["D"])
    ok = agrees(loss, given, cell["op"])
    served = ltk.explain(ltk.functional.contrastive, given["x"]).backend if backend == "ours" else backend
    row = {"backend": served, "peak_mb": round(harness.peak_mb(lambda: step(loss, given)), 1)}
    return harness.Prepared([lambda: step(loss, given)], ok, row)


def columns_of(name: str, rows: int) -> int:
    return {"balanced": rows + CLASSES, "moco": QUEUE}.get(name, rows)


def large(name: str, width: int) -> None:
    """One call with `LARGE` rows, in this process: prints milliseconds and MiB of resident memory, the package included."""
    import resource
    import time

    given, loss = inputs(LARGE, width), ours(name)
    start = time.perf_counter()
    step(loss, given)
    print(1e3 * (time.perf_counter() - start), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(argv: list[str] | None = None) -> int:
    parser = harness.parser("contrast", __doc__, PEERS, quick="one small shape")
    parser.add_argument("--large", action="store_true", help=f"also {LARGE} rows")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.once:
        large(options.once, 128)
        return 0
    cells = [
        {"op": name, "B": b, "C": columns_of(name, b), "D": width}
        for b, width in (QUICK if options.quick else SHAPES)
        for name in options.losses
    ]
    return harness.run(__spec__.name, options, prepare, cells, after=add_large if options.large else lambda rows: None)


def add_large(rows: list[dict[str, Any]]) -> None:
    for name in ("supcon", "balanced"):
        command = [sys.executable, "-c", harness.run_module(__spec__.name), "--once", name]
        ms, mib = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        own = {"op": name, "B": LARGE, "C": columns_of(name, LARGE), "D": 128, "peak_mb": round(mib, 1)}
        common = {key: rows[0][key] for key in ("dtype", "mode", "backend", "ideal_gbps", "pct_of_copy")}
        rows.append({**common, **own, "ok": True, "ms_p50": round(ms, 1)})
        print(f"{name:22} {LARGE}x128 {ms:9.1f} ms, {mib:.0f} MiB resident", flush=True)


if __name__ == "__main__":
    sys.exit(main())
