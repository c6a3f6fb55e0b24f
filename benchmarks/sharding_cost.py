"""What a step of the class-sharded loss costs: a model on paper for GPUs, and the same formula checked on this machine's CPU ranks.

    python -m benchmarks.sharding_cost                    # model only: 10 million classes on 8 to 1 024 GPUs
    python -m benchmarks.sharding_cost --measure --out benchmarks/results/sharding-cpu.json

The table is a model: nothing in it was measured on a GPU. Its machine is `GPU`, each number an assumption that is named there. What
`--measure` prints was measured: times of 1, 2 and 4 gloo processes here beside what the formula says with this machine's own constants
(rate of matrix products, seconds a logit, memory and link bandwidth, the time of a call with next to no work), taken at other shapes, in
the same processes, at the same time.

The formula (`step_seconds`), a cosine head of C classes over W ranks, L = C / W of them here, N rows in all, D features, float32,
forward, backward and plain SGD. Chunks of rows hold at most 2^26 logits.

    matrix products   2 N D L each: logits, feature gradient, weight gradient, and the logits again where there are several chunks. Each
                      moves the logits once and its weights once a chunk (the weight gradient twice): at the same time on a GPU, so that
                      the longer of the two counts; one after the other on a core
    logits            statistics and gradient: time a logit each, statistics once
    weights           passes over L x D: 1 to clear the gradient, 2 for the norms, 7 for their derivative, 3 for SGD
    exchange          N D float32 gathered, N labels, 4 float64 a row of statistics (of all ranks up to 2 MiB, else as an all-reduce), N D
                      float32 of feature gradient reduced (gloo: all-reduced)
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ltkernels as ltk
from ltkernels.distributed import _autograd, _exchange
from ltkernels.losses import _two_phase

from . import harness

GIB = 2**30
WEIGHT_PASSES = 13


class Machine(NamedTuple):
    """Rates of one rank; seconds, bytes, flop."""

    flops: float  # of matrix products out of a cache
    overlaps: bool  # products compute while they move data
    memory: float  # bytes a second, read or written
    statistics: float  # seconds a logit
    gradient: float
    link: float  # bytes a second that leave, and enter, a rank
    call: float  # what a call takes without any work, latencies of the collectives included
    reduce: int  # how many times the feature gradient crosses the link: 1 reduce-scatter, 2 all-reduce


def step_seconds(m: Machine, world: int, rows: int, width: int, classes: int, rate: float = 1.0) -> dict[str, float]:
    """Parts of a step on one rank. `rate`: of the classes that are computed (negative sampling)."""
    local = classes / world * rate
    chunks = -(-rows * local // _autograd._HELD)
    combined = max if m.overlaps else lambda compute, move: compute + move
    compute, logits, weights = (
        2 * rows * width * local / m.flops,
        4 * rows * local / m.memory,
        4 * width * local / m.memory,
    )
    gemm = (2 + (chunks > 1)) * combined(compute, logits + chunks * weights)
    gemm += combined(compute, logits + 2 * chunks * weights)
    statistics = 32 * rows * (world if 32 * rows * world <= _exchange._GATHERED else 2)
    sent = (4 * width * rows * (1 + m.reduce) + 8 * rows + statistics) * (world - 1) / world
    # Clearing the gradient and SGD take all classes of the rank, whatever the rate.
    passes = 4 * width * classes / world * (4 + (WEIGHT_PASSES - 4) * rate) / m.memory
    return {
        "products": gemm,
        "logits": rows * local * (m.statistics + m.gradient),
        "weights": passes,
        "exchange": sent / m.link,
        "call": m.call,
    }


def memory_bytes(world: int, rows: int, width: int, classes: int) -> float:
    """Weight and gradient, one chunk of logits, features three times (gathered, of unit length, gradient), statistics."""
    local = classes / world
    return 8 * width * local + 4 * min(rows * local, _autograd._HELD) + 12 * width * rows + 32 * rows * 4


# ---- the model: a GPU on paper ---------------------------------------------------------------------------------------

# Assumptions, none measured here. Arithmetic: 67 TFLOP/s of float32 without tensor cores (H100 SXM data sheet), 80 % of it reached.
# Memory: 3.35 TB/s (data sheet), 80 %. Links: 450 GB/s a direction within a node of 8, and 8 x 50 GB/s out of a node, which a ring
# crosses once, 80 % of both. A hop of the ring: 1 us within a node, 5 us between nodes (trees have fewer, where the library takes them).
# The host: 0.5 ms a call.
FLOPS, MEMORY, NODE, HOST = 0.8 * 67e12, 0.8 * 3.35e12, 8, 0.5e-3
# The two phases in plain torch, without the CUDA part of the build: 14 and 20 reads or writes of 4 bytes a logit, counted in
# ltkernels/losses/_two_phase.py (with scale and shift). The CUDA kernels make 1 and 2.
PLAIN, FUSED = (14, 20), (1, 2)


def gpu(world: int, rows: int, accesses: tuple[int, int]) -> Machine:
    nodes = -(-world // NODE)
    ring = 1e-6 * (world - nodes) + 5e-6 * (nodes - 1)
    # Agreement, labels, features, statistics and feature gradient; the statistics twice where they travel as an all-reduce.
    collectives = 5 + (32 * rows * world > _exchange._GATHERED)
    link = 0.8 * (450e9 if nodes == 1 else 8 * 50e9)
    return Machine(FLOPS, True, MEMORY, *(4 * count / MEMORY for count in accesses), link, HOST + collectives * ring, 1)


def print_model(classes: int, width: int, rows_of: Callable[[int], int]) -> None:
    print(
        " GPUs  classes/GPU    rows  GiB/GPU | products  logits weights exchange    call |  step ms   fused  fused, rate 0.1"
    )
    for world in (8, 16, 32, 64, 128, 256, 512, 1024):
        rows = rows_of(world)
        parts = step_seconds(gpu(world, rows, PLAIN), world, rows, width, classes)
        fused = sum(step_seconds(gpu(world, rows, FUSED), world, rows, width, classes).values())
        sampled = sum(step_seconds(gpu(world, rows, FUSED), world, rows, width, classes, rate=0.1).values())
        cells = " ".join(f"{1e3 * parts[name]:7.2f}" for name in ("logits", "weights"))
        print(
            f"{world:5} {classes // world:12} {rows:7} {memory_bytes(world, rows, width, classes) / GIB:8.2f} | "
            f"{1e3 * parts['products']:8.2f} {cells} {1e3 * parts['exchange']:8.2f} {1e3 * parts['call']:7.2f} | "
            f"{1e3 * sum(parts.values()):8.2f} {1e3 * fused:7.2f} {1e3 * sampled:9.2f}"
        )


# ---- the check: CPU ranks of this machine ----------------------------------------------------------------------------

# (rows, width, classes); the second has several chunks of logits on one rank.
SHAPES = ((256, 64, 60_000), (512, 64, 160_000), (128, 256, 40_000))
QUICK = ((32, 16, 2_000),)
# Where the constants are taken: (rows, width, classes) of products that stay in a cache, rows and classes of logits that do not.
PRODUCT, LOGITS = (192, 256, 2_000), (200, 60_000)


# Calls in a row of each probe: a burst lasts about as long as a step, so that whatever else runs on the machine slows both alike.
BURSTS = {"products": 8, "memory": 16, "statistics": 16, "gradient": 16, "link": 200, "call": 60}


def loss_of(features, weight, labels, start: int, classes: int, tables: dict[str, torch.Tensor]) -> torch.Tensor:
    return ltk.distributed.sharded_linear_adjusted_cross_entropy(
        features, weight, labels, class_start=start, num_classes=classes, batch="sharded", normalize=True, **tables
    )


def stepper(rank: int, world: int, rows: int, width: int, classes: int) -> tuple[Callable[[], None], bool]:
    """A training step of this rank, and whether its loss is the unsharded one's."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, width, generator=generator)
    whole = torch.randn(classes, width, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    tables = {"scale": torch.full((classes,), 16.0), "shift": torch.rand(classes, generator=generator)}
    start, end = (classes * r // world for r in (rank, rank + 1))
    own = slice(rows * rank // world, rows * (rank + 1) // world)
    x, weight = features[own].clone().requires_grad_(), whole[start:end].clone().requires_grad_()
    with torch.no_grad():
        exact = ltk.functional.linear_adjusted_cross_entropy(features, whole, labels, normalize=True, **tables)
        ok = torch.allclose(loss_of(x, weight, labels[own], start, classes, tables), exact, rtol=1e-5)
    optimizer = torch.optim.SGD([weight], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        loss_of(x, weight, labels[own], start, classes, tables).backward()
        optimizer.step()

    return step, ok


def probes(rank: int, world: int) -> dict[str, Callable[[], None]]:
    """What a constant is the time of."""
    rows, width, classes = PRODUCT
    x, w, z = torch.randn(rows, width), torch.randn(classes, width), torch.randn(rows, classes)
    grad_w, out = torch.zeros(classes, width), torch.empty(rows, classes)
    rows, classes = LOGITS
    many, other = torch.randn(rows, classes), torch.zeros(rows, classes)
    labels, sigma = torch.randint(0, classes, (rows,)), torch.ones(rows, dtype=torch.float64)
    tables = {"scale": torch.ones(classes), "shift": torch.zeros(classes), "weight": None}
    terms = torch.rand(rows, 4, dtype=torch.float64)
    message = torch.zeros(1 << 16)
    tiny = stepper(rank, world, 4 * world, 4, 4 * world)[0]

    def products() -> None:
        torch.mm(x, w.t(), out=out)
        torch.mm(z, w)
        grad_w.addmm_(z.t(), x)

    return {
        "products": products,
        "memory": lambda: other.add_(many),  # 2 reads and 1 write
        "statistics": lambda: _two_phase.statistics(many, labels, sigma, **tables),
        "gradient": lambda: _two_phase.gradient(many, labels, sigma, terms, out=other, **tables),
        "link": lambda: dist.all_reduce(message),
        "call": tiny,
    }


def machine_of(seconds: dict[str, float], world: int) -> Machine:
    rows, width, classes = PRODUCT
    logits = LOGITS[0] * LOGITS[1]
    crossed = 2 * 4 * (1 << 16) * (world - 1) / world
    return Machine(
        flops=6 * rows * width * classes / seconds["products"],
        overlaps=False,
        memory=12 * logits / seconds["memory"],
        statistics=seconds["statistics"] / logits,
        gradient=seconds["gradient"] / logits,
        link=crossed / seconds["link"] if world > 1 else math.inf,
        call=seconds["call"],
        reduce=2,
    )


@contextmanager
def keep_memory() -> Iterator[None]:
    """Processes that are started here keep freed memory, as those of the other benchmarks do."""
    before = dict(os.environ)
    os.environ.update(harness._KEEP_MEMORY)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def median(values: list[float], share: float = 0.5) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def rank_main(rank: int, world: int, rendezvous: str, rounds: int, shapes, answers) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    calls: dict[object, Callable[[], None]] = dict(probes(rank, world))
    correct = {}
    for shape in shapes:
        calls[shape], correct[shape] = stepper(rank, world, *shape)
    times: dict[object, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):  # the first is for the caches
        for name, call in calls.items():
            bursts = 1 if shapes == QUICK else BURSTS.get(name, 1)
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(bursts):
                call()
            if turn:
                times[name].append((time.perf_counter() - begin) / bursts)
    machine = machine_of({name: median(values) for name, values in times.items() if isinstance(name, str)}, world)
    machines: list = [None] * world
    dist.all_gather_object(machines, machine)
    found = []
    for shape in shapes:
        each = [step_seconds(one, world, *shape) for one in machines]
        parts = max(each, key=lambda parts: sum(parts.values()))  # a step lasts as long as on the slowest rank
        measured = median(times[shape])
        row = {"op": "sharded cosine logit_adjusted", "backend": "cpu", "dtype": "float32"}
        row |= {
            "B": shape[0],
            "C": shape[2],
            "D": shape[1],
            "mode": "forward+backward+sgd",
            "ranks": world,
            "rank": rank,
        }
        row |= {f"ms_p{int(100 * s)}": round(1e3 * median(times[shape], s), 3) for s in (0.5, 0.2, 0.8)}
        row |= {"predicted_ms": round(1e3 * sum(parts.values()), 3)}
        row |= {"predicted_over_measured": round(sum(parts.values()) / measured, 3)}
        row |= {"predicted_parts_ms": {name: round(1e3 * value, 3) for name, value in parts.items()}}
        row |= {
            "constants": {
                name: float(f"{value:.4g}") for name, value in machine._asdict().items() if math.isfinite(value)
            }
        }
        row |= {"load_average": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
        found.append({**row, "ideal_gbps": None, "pct_of_copy": None, "peak_mb": None, "ok": correct[shape]})
    gathered: list = [None] * world
    dist.all_gather_object(gathered, found)
    if rank == 0:
        answers.put([row for rows in gathered for row in rows])
    dist.destroy_process_group()


def measure(rounds: int, shapes, worlds) -> list[dict]:
    rows = []
    for world in worlds:
        answers = mp.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder, keep_memory():
            mp.spawn(rank_main, (world, f"file://{folder}/ranks", rounds, shapes, answers), nprocs=world)
        found = answers.get()
        for row in sorted(found, key=lambda row: (shapes.index((row["B"], row["D"], row["C"])), row["rank"])):
            shape = f"{row['B']} x {row['D']} x {row['C']}"
            print(
                f"{world} ranks, rank {row['rank']}, {shape:18} measured {row['ms_p50']:9.2f} ms ({row['ms_p20']:.2f} to "
                f"{row['ms_p80']:.2f}), model {row['predicted_ms']:9.2f} ms, ratio {row['predicted_over_measured']:.2f}"
                f"{'' if row['ok'] else '  DIFFERS'}",
                flush=True,
            )
        rows += found
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sharding_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=10_000_000)
    parser.add_argument("--width", type=int, default=512, help="features D")
    parser.add_argument("--measure", action="store_true", help="time 1, 2 and 4 processes here beside the model")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes of --measure")
    parser.add_argument("--rounds", type=int, default=15, help="of --measure")
    parser.add_argument("--quick", action="store_true", help="--measure at one small shape")
    parser.add_argument("--out", type=Path, help="result file (JSON) of --measure")
    options = parser.parse_args(argv)
    if options.out and not options.measure:
        parser.error("--out is for what --measure measures")
    for title, rows_of in (("128 rows a GPU", lambda world: 128 * world), ("4 096 rows in all", lambda world: 4096)):
        print(f"\nMODEL, not measured: {options.classes} classes, D {options.width}, {title}")
        print_model(options.classes, options.width, rows_of)
    print(
        "\nstep: with the two phases in plain torch, without the CUDA part. fused: with its kernels. Assumptions: see GPU constants."
    )
    if not options.measure:
        return 0
    print("\nMEASURED here, beside the model with constants of this machine (each process one thread):")
    rows = measure(options.rounds, QUICK if options.quick else SHAPES, options.ranks)
    if options.out:
        harness.write(options.out, rows, harness.copy_gbps())
        print(f"wrote {options.out}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
