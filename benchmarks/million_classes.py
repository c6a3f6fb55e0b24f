"""A classifier of one million classes, sharded over two processes of this machine, in bounded memory.

    python -m benchmarks.million_classes

Every process holds half of the classes and gathers the other's rows of the batch. Cosine classifier, logit adjustment by the class
counts (Zipf's law), plain SGD, which keeps nothing beside weight and gradient. The data are made from the class ids: a class is a corner
of the 64-dimensional cube, a sample its class with noise. Printed are the loss, the largest resident memory of each process, and what
the same step takes in one process with the logits of the whole batch (`--eager` measures that too).
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels.losses._terms import mix32

WIDTH = 64
SCALE = 16.0
MIB = 2**20


def peak_mb() -> float:
    """MiB resident at most in this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure begins with that of the parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


def counts_of(classes: int) -> Tensor:
    return (classes / torch.arange(1, classes + 1, dtype=torch.float64)).ceil().long()


def samples(classes: int, number: int) -> tuple[Tensor, Tensor]:
    """(number, 64) features and labels, drawn as `counts_of` says, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shares = counts_of(classes).double().cumsum(0)
    drawn = torch.rand(number, generator=generator, dtype=torch.float64) * shares[-1]
    labels = torch.searchsorted(shares, drawn).clamp_max(classes - 1)
    corners = (mix32(labels[:, None] * WIDTH + torch.arange(WIDTH) + 1) & 1) * 2.0 - 1.0
    return corners + 0.5 * torch.randn(number, WIDTH, generator=generator), labels


def train(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    """One rank; `options.ranks` 0 is the whole classifier by eager torch in one process."""
    torch.set_num_threads(max(1, torch.get_num_threads() // max(1, options.ranks)))
    eager = options.ranks == 0
    if not eager:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=options.ranks)
    world = max(1, options.ranks)
    start, end = (options.classes * r // world for r in (rank, rank + 1))
    generator = torch.Generator().manual_seed(1 + rank)
    weight = torch.empty(end - start, WIDTH).normal_(std=WIDTH**-0.5, generator=generator).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=options.lr)
    features, labels = samples(options.classes, 4 * options.rows)
    counts = counts_of(options.classes).double()
    shift = (counts / counts.sum()).log().float()
    scale = torch.full((options.classes,), SCALE)
    del counts
    sampling = None
    before = peak_mb()
    losses, times = [], []
    for step in range(options.steps):
        begin = time.perf_counter()
        rows = torch.arange(options.rows) + step % 4 * options.rows
        optimizer.zero_grad()
        if eager:
            logits = F.linear(F.normalize(features[rows]), F.normalize(weight))
            loss = F.cross_entropy(logits.mul_(scale).add_(shift), labels[rows])
            del logits
        else:
            if options.rate < 1.0:
                sampling = ltk.distributed.NegativeSampling(options.rate, step)
            own = rows[options.rows * rank // world : options.rows * (rank + 1) // world]
            loss = ltk.distributed.sharded_linear_adjusted_cross_entropy(
                features[own],
                weight,
                labels[own],
                class_start=start,
                num_classes=options.classes,
                batch="sharded",
                normalize=True,
                shift=shift,
                scale=scale,
                sampling=sampling,
            )
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        times.append(time.perf_counter() - begin)
        if rank == 0 and (step % 4 == 0 or step == options.steps - 1):
            print(f"{'eager' if eager else 'step'} {step:3}  loss {losses[-1]:7.4f}  {times[-1]:5.2f} s", flush=True)
    for turn in range(world):  # one line after the other
        if turn == rank:
            name = "eager, one process" if eager else f"rank {rank}"
            print(f"{name}: {peak_mb():.0f} MiB at most, {before:.0f} before the first step", flush=True)
        if not eager:
            dist.barrier()
    if not losses[-1] < losses[0]:
        raise SystemExit(f"the loss did not fall: {losses[0]:.4f} to {losses[-1]:.4f}")
    if not eager:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="million_classes", description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--rows", type=int, default=256, help="rows of the batch, of all ranks together")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=8.0)
    parser.add_argument("--rate", type=float, default=1.0, help="part of the negative classes that is computed")
    parser.add_argument("--eager", action="store_true", help="then the same unsharded, two steps by eager torch")
    options = parser.parse_args(argv)
    for name in ("classes", "ranks", "rows", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    logits, weight = 4 * options.rows * options.classes / MIB, 4 * WIDTH * options.classes / MIB
    print(
        f"{options.classes} classes x {WIDTH}, {options.rows} rows, {options.ranks} processes: {weight / options.ranks:.0f} MiB of "
        f"weights a process\nunsharded eager: weight and gradient 2 x {weight:.0f} MiB, logits and log-probabilities "
        f"2 x {logits:.0f} MiB; {2 * weight + 2 * logits:.0f} MiB and more",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (options, f"file://{folder}/ranks"), nprocs=options.ranks)
        if options.eager:
            options.ranks, options.steps = 0, 5
            mp.spawn(train, (options, ""), nprocs=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
