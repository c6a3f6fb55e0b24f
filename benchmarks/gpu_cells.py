"""The cells of the GPU benchmark: one loss, dtype and shape, one head, or the host's share of a call; each gives rows of the result, one
by one, as they are timed. `only` names the one implementation that a process is for.

A cell checks every answer against float64 before it times it. An implementation that fails costs its own rows and is reported in a
line that begins with ``#``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import gpu_peers
from .gpu_meter import Call, Dry, Gpu

CLASSES = (8142, 8192, 1000, 32000, 128256, 365, 100, 1203, 21841)  # where time runs out, the last are missing
QUICK = CLASSES[:4]
COMPILED = (8142,)  # a compilation takes seconds
UPSTREAM = 8142  # with an upstream gradient that is not 1
HEAD = ((4096, 512, 8142), (4096, 1024, 32000), (2048, 1024, 128256))  # B, D, C
HOST = (16, 100)  # B, C of the calls that cost the device next to nothing
DRY = (9, 40)
# Of the sanitizer and the profiler: loss, dtype, rows, classes.
SAFE = (("logit_adjusted", "float32", 5, 1203), ("logit_adjusted", "bfloat16", 5, 20011), ("ldam", "bfloat16", 9, 37),
        ("ce", "float32", 3, 70001), ("kps", "float32", 9, 365), ("logit_adjusted", "bfloat16", 33, 100))  # fmt: skip
PROFILED = (("logit_adjusted", "float32", 4096, 8142), ("logit_adjusted", "bfloat16", 4096, 8142),
            ("logit_adjusted", "bfloat16", 1024, 128256), ("logit_adjusted", "float32", 4096, 1000))  # fmt: skip
DRY_HEAD = ((6, 8, 9),)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Row = dict[str, Any]


def cells(op: str, quick: bool, meter: Gpu) -> list[Any]:
    """What a process for `op` goes through."""
    if op == "host":
        return [HOST]
    if isinstance(meter, Dry):
        return list(DRY_HEAD if op == "head" else DRY)
    if op == "head":
        return list(HEAD[: 1 if quick else None])
    return list(QUICK if quick else CLASSES)


def compiles(op: str, cell: Any, meter: Gpu) -> bool:
    return op in gpu_peers.LOSSES and (isinstance(meter, Dry) or cell in COMPILED)


def run(
    op: str, dtype: str, cell: Any, meter: Gpu, bandwidth: float, seconds: float, only: str | None = None
) -> Iterator[Row]:
    if op == "host":
        return host_cell(dtype, cell, meter, seconds, only)
    if op == "head":
        return head_cell(dtype, cell, meter, seconds, only)
    return loss_cell(op, dtype, cell, meter, bandwidth, seconds, only)


def kernels(cases: Sequence[Sequence[Any]], meter: Gpu) -> None:
    """Calls of the best back end's bare kernel, for tools that look at every access of it."""
    best = gpu_peers.backends(meter.device)[0]
    for name, dtype, rows, classes in cases:
        rows, classes = (3, 40) if isinstance(meter, Dry) else (rows, classes)
        z = torch.randn(rows, classes, device=meter.device, dtype=DTYPES[dtype])
        y = torch.arange(rows, device=meter.device) % classes
        steps = gpu_peers.steps(name, counts_of(classes), meter.device, None, f"{best}-kernel")
        for step in steps.values():
            for _ in range(3):
                step(z, y)
        meter.wait()
        print(f"{best} {name} {dtype} {rows} x {classes}", flush=True)


def report(what: str, error: Exception) -> None:
    print(f"# {what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)


def batch_of(classes: int, meter: Gpu) -> int:
    return 4 if isinstance(meter, Dry) else 4096 if classes <= 32000 else 1024


def interleaved(
    calls: dict[str, list[Call]], meter: Gpu, seconds: float, graph: bool, what: str
) -> dict[str, list[float]]:
    """Milliseconds a call: every round times each implementation's list of calls once. Whoever fails is left out."""
    replays: dict[str, list[Call]] = {}
    for name, each in calls.items():
        try:
            meter.events(each)
            replays[name] = [meter.captured(each)] if graph else each
            meter.wait()
        except Exception as error:
            report(f"{what} {name}{' in a CUDA graph' if graph else ''}", error)
    times: dict[str, list[float]] = {name: [] for name in replays}
    begin, rounds = time.perf_counter(), 0
    while replays and (rounds < meter.rounds or time.perf_counter() - begin < seconds * len(replays)):
        for name, each in replays.items():
            times[name].append(sum(meter.events(each)) / len(calls[name]))
        rounds += 1
    return times


def inputs(rows: int, classes: int, dtype: torch.dtype, cosine: bool, meter: Gpu) -> list[tuple[Tensor, Tensor]]:
    """Batches that together are four times the second-level cache, at least two and at most 256."""
    number = max(2, min(256, -(-4 * meter.cache_bytes() // (rows * classes * dtype.itemsize))))
    generator = torch.Generator(device=meter.device).manual_seed(classes)

    def one() -> tuple[Tensor, Tensor]:
        z = torch.randn(rows, classes, device=meter.device, generator=generator, dtype=dtype) * (0.3 if cosine else 3.0)
        return z, torch.randint(0, classes, (rows,), device=meter.device, generator=generator)

    return [one() for _ in range(number)]


def agrees(
    step: gpu_peers.Step, exact: gpu_peers.Step, z: Tensor, y: Tensor, dtype: torch.dtype, upstream: gpu_peers.Upstream
) -> bool:
    """With the upstream gradient 1, and with `upstream`."""
    errors = []
    for each in (None, upstream):
        few = z[:64].clone()  # some peers overwrite it
        truth = exact(few.double(), y[:64], each)
        errors.append((step(few, y[:64], each).double() - truth).norm() / truth.norm())
    return bool(max(errors) <= (2e-2 if dtype == torch.bfloat16 else 1e-4))


def facts_of(call: Call, ok: bool, meter: Gpu, what: str) -> Row:
    """What a row says beside its times."""
    call()
    try:
        launches = meter.launches(call)
    except Exception as error:
        report(f"{what}: launches not counted", error)
        launches = None
    return {"peak_mb": round(meter.peak_mb(call), 1), "launches": launches, "ok": ok}


def row(op: str, backend: str, dtype: str, shape: tuple[int, int, int | None], mode: str, times: list[float]) -> Row:
    ordered = sorted(times)
    at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.2, 0.8)]
    found: Row = {"op": op, "backend": backend, "dtype": dtype}
    found |= {"B": shape[0], "C": shape[1], "D": shape[2], "mode": mode}
    found |= {f"ms_{name}": round(value, 5) for name, value in zip(("p50", "p20", "p80"), at)}
    return found | {"ideal_gbps": None, "pct_of_copy": None, "launches": None, "peak_mb": None, "host_us": None}


def counts_of(classes: int) -> list[int]:
    return [max(1, int(5000 * 0.01 ** (k / max(1, classes - 1)))) for k in range(classes)]


def loss_cell(
    name: str, dtype: str, classes: int, meter: Gpu, bandwidth: float, seconds: float, only: str | None
) -> Iterator[Row]:
    rows, what = batch_of(classes, meter), f"{name} {dtype} C={classes}"
    batches = inputs(rows, classes, DTYPES[dtype], name in ("ldam", "kps"), meter)
    tables = {k: table.double() for k, table in gpu_peers.tables_of(name, counts_of(classes), meter.device).items()}
    exact = gpu_peers.differentiated(gpu_peers.eager(name, tables))
    dry = isinstance(meter, Dry)
    compiler = ("eager" if dry else "inductor") if compiles(name, classes, meter) else None
    found = gpu_peers.steps(name, counts_of(classes), meter.device, compiler, only)
    half = {each: torch.tensor(0.5, device=meter.device, dtype=each) for each in (*DTYPES.values(), torch.float64)}
    facts: dict[str, Row] = {}
    for backend, step in list(found.items()):
        try:
            ok = agrees(step, exact, *batches[0], DTYPES[dtype], half)
            facts[backend] = facts_of(lambda step=step: step(*batches[0]), ok, meter, f"{what} {backend}")
        except Exception as error:
            report(f"{what} {backend}", error)
            del found[backend]
    ideal = 2 * rows * classes * DTYPES[dtype].itemsize
    cached = len(batches) * ideal / 2 < 4 * meter.cache_bytes()
    for mode in ("eager", "graph", "upstream")[: 3 if dry or classes == UPSTREAM else 2]:
        upstream = half if mode == "upstream" else None
        calls = {
            backend: [lambda z=z, y=y, step=step, upstream=upstream: step(z, y, upstream) for z, y in batches]
            for backend, step in found.items()
        }
        times_of = interleaved(calls, meter, seconds, mode == "graph", what)
        for backend, times in times_of.items():
            gbps = ideal / (statistics.median(times) * 1e-3) / 1e9
            share = {"ideal_gbps": round(gbps, 1), "pct_of_copy": round(100 * gbps / bandwidth, 1), "cached": cached}
            yield row(name, backend, dtype, (rows, classes, None), mode, times) | share | facts[backend]


def head_cell(dtype: str, shape: tuple[int, int, int], meter: Gpu, seconds: float, only: str | None) -> Iterator[Row]:
    rows, width, classes = shape
    what, device = f"head {dtype} {shape}", meter.device
    generator = torch.Generator(device=device).manual_seed(0)
    features = torch.randn(rows, width, device=device, generator=generator, dtype=DTYPES[dtype]).requires_grad_()
    weight = torch.randn(classes, width, device=device, generator=generator, dtype=DTYPES[dtype]) / width**0.5
    weight = weight.detach().requires_grad_()
    target = torch.randint(0, classes, (rows,), device=device, generator=generator)
    few = [features[:64].detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    truth = torch.autograd.grad(torch.nn.functional.cross_entropy(few[0] @ few[1].T, target[:64]), few)
    calls: dict[str, list[Call]] = {}
    facts: dict[str, Row] = {}
    for backend, loss in gpu_peers.heads(only).items():
        try:
            some = features[:64].detach().requires_grad_()
            got = torch.autograd.grad(loss(some, weight, target[:64]), (some, weight))
            limit = 4e-2 if dtype == "bfloat16" else 2e-3  # float32 products may be TF32
            ok = all(bool((a.double() - b).norm() <= limit * b.norm()) for a, b in zip(got, truth))
            call = lambda loss=loss: torch.autograd.grad(loss(features, weight, target), (features, weight))  # noqa: E731
            facts[backend] = facts_of(call, ok, meter, f"{what} {backend}")
            calls[backend] = [call]
        except Exception as error:
            report(f"{what} {backend}", error)
    times_of = interleaved(calls, meter, seconds, False, what)
    for backend, times in times_of.items():
        yield row("linear_ce", backend, dtype, (rows, classes, width), "eager", times) | facts[backend]


def host_cell(dtype: str, shape: tuple[int, int], meter: Gpu, seconds: float, only: str | None) -> Iterator[Row]:
    """What the host spends on a call: wall time a call of a long run of tiny ones, less what the same calls take on the device in a
    CUDA graph, in microseconds. The milliseconds of these rows are wall time."""
    rows, classes = shape
    for name in gpu_peers.LOSSES:
        [(z, y), *_] = inputs(rows, classes, DTYPES[dtype], False, meter)
        calls: dict[tuple[str, str], Call] = {}
        for backend, step in gpu_peers.steps(name, counts_of(classes), meter.device, None, only).items():
            calls[backend, "step"] = lambda step=step, z=z, y=y: step(z, y)
        for backend, loss in gpu_peers.forwards(name, counts_of(classes), meter.device, only).items():
            calls[backend, "forward"] = lambda loss=loss, z=z, y=y: loss(z, y)
        for (backend, mode), call in calls.items():
            what = f"host {name} {dtype} {backend} {mode}"
            try:
                facts = facts_of(call, True, meter, what)
                wall = wall_ms(call, meter, seconds)
                on_device = statistics.median(meter.events([meter.captured([call] * meter.burst)] * 5)) / meter.burst
                found = row(name, backend, dtype, (rows, classes, None), f"host {mode}", wall)
            except Exception as error:
                report(what, error)
                continue
            yield found | facts | {"host_us": round(1e3 * (found["ms_p50"] - on_device), 2)}


def wall_ms(call: Call, meter: Gpu, seconds: float) -> list[float]:
    """Milliseconds a call of the host's clock, in bursts that end with a wait."""
    times = []
    begin = time.perf_counter()
    while len(times) < meter.rounds or time.perf_counter() - begin < seconds:
        meter.wait()
        start = time.perf_counter()
        for _ in range(meter.burst):
            call()
        meter.wait()
        times.append((time.perf_counter() - start) * 1e3 / meter.burst)
    return times
