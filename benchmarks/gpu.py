"""Everything a GPU has to prove, in one command and under eight minutes: tests, memory safety, benchmarks.

    python -m benchmarks.gpu --out DIR [--quick]

Run in a checkout (the tests are not in the wheel). Each loss and dtype is timed in a process of its own, so that a kernel that
breaks its CUDA context costs its own rows only. DIR receives gpu.json (rows as in the other result files, with launches a call), gpu.txt
(the table) and the logs of the tests. The exit code is 0 when everything ran and agreed.

Protocol: an answer is compared with float64 before it is timed; inputs rotate past the second-level cache; implementations take turns;
medians with 20th and 80th percentiles of CUDA events. `pct_of_copy`: ideal bytes (each logit read once, each gradient written once) in
per cent of the copy bandwidth measured in the same process. Mode "graph" replays one CUDA graph, "eager" includes what the host costs;
"upstream" has an upstream gradient that is not 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gpu_peers, harness

CLASSES = (100, 365, 1000, 1203, 8142, 8192, 21841, 32000, 128256)
QUICK = (1000, 8142, 8192, 32000)
COMPILED = (1000, 8142, 32000)  # a compilation takes seconds
HEAD = ((4096, 512, 8142), (4096, 1024, 32000), (2048, 1024, 128256))  # B, D, C
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BUDGET_S = 460  # of the whole run
DEVICE = "cuda"  # the tests of this file have none
Row = dict[str, Any]


def batch_of(classes: int) -> int:
    return 4096 if classes <= 32000 else 1024


def copy_gbps() -> float:
    """Bytes read plus bytes written a second of a 1 GiB copy."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (statistics.median(events([lambda: target.copy_(source)] * 20)) * 1e-3) / 1e9


def events(calls: list[Callable[[], object]]) -> list[float]:
    """Milliseconds of each call on the device; the device is busy until the last begins."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for call, mark in zip(calls, marks[1:]):
        call()
        mark.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]


def captured(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """The calls as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def interleaved(calls: dict[str, list[Callable[[], object]]], seconds: float, graph: bool) -> dict[str, list[float]]:
    """Milliseconds a call: every round times each implementation's list of calls once."""
    if not calls:
        return {}
    replays: dict[str, list[Callable[[], object]]] = {}
    for name, each in calls.items():
        for call in each[:2]:
            call()
        replays[name] = [captured(each)] if graph else each
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while len(next(iter(times.values()))) < 5 or time.perf_counter() - begin < seconds:
        for name, each in replays.items():
            times[name].append(sum(events(each)) / len(calls[name]))
    return times


def launches(call: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that one call sends to the device."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum(1 for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    except Exception as error:
        print(f"# launches not counted: {error}", flush=True)
        return None


def peak_mb(call: Callable[[], object]) -> float:
    """MiB allocated at most by one call, beyond its inputs."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def inputs(rows: int, classes: int, dtype: torch.dtype, cosine: bool) -> list[tuple[Tensor, Tensor]]:
    """Batches that together are four times a 50 MiB cache, at least two and at most 32."""
    number = max(2, min(32, (200 << 20) // (rows * classes * dtype.itemsize)))
    generator = torch.Generator(device=DEVICE).manual_seed(classes)

    def one() -> tuple[Tensor, Tensor]:
        z = torch.randn(rows, classes, device=DEVICE, generator=generator, dtype=dtype) * (0.3 if cosine else 3.0)
        return z, torch.randint(0, classes, (rows,), device=DEVICE, generator=generator)

    return [one() for _ in range(number)]


def agrees(step: gpu_peers.Step, exact: gpu_peers.Step, z: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    few = z[:64].clone()
    truth = exact(few.double(), y[:64])
    error = (step(few, y[:64]).double() - truth).norm() / truth.norm()
    return bool(error <= (2e-2 if dtype == torch.bfloat16 else 1e-4))


def row(op: str, backend: str, dtype: str, shape: tuple[int, int, int | None], mode: str, times: list[float]) -> Row:
    ordered = sorted(times)
    at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.2, 0.8)]
    found: Row = {
        "op": op,
        "backend": backend,
        "dtype": dtype,
        "B": shape[0],
        "C": shape[1],
        "D": shape[2],
        "mode": mode,
    }
    return found | {f"ms_{name}": round(value, 5) for name, value in zip(("p50", "p20", "p80"), at)}


def loss_cell(name: str, dtype: str, classes: int, bandwidth: float, seconds: float) -> list[Row]:
    rows = batch_of(classes)
    counts = [max(1, int(5000 * 0.01 ** (k / max(1, classes - 1)))) for k in range(classes)]
    batches = inputs(rows, classes, DTYPES[dtype], name in ("ldam", "kps"))
    tables = {key: table.double() for key, table in gpu_peers.tables_of(name, counts, DEVICE).items()}
    exact = gpu_peers.differentiated(gpu_peers.eager(name, tables))
    found = gpu_peers.steps(name, counts, DEVICE, compiled=classes in COMPILED)
    facts: dict[str, Row] = {}
    for backend, step in list(found.items()):
        try:
            ok = agrees(step, exact, *batches[0], DTYPES[dtype])
            call = lambda step=step: step(*batches[0])  # noqa: E731
            call()
            facts[backend] = {"peak_mb": round(peak_mb(call), 1), "launches": launches(call), "ok": ok}
        except Exception as error:  # a peer that fails costs its own rows
            print(f"# {name} {dtype} {classes} {backend}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            del found[backend]
    half = {each: torch.tensor(0.5, device=DEVICE, dtype=each) for each in (*DTYPES.values(), torch.float64)}
    ideal = 2 * rows * classes * DTYPES[dtype].itemsize
    results = []
    for mode in ("eager", "graph", "upstream"):
        if mode == "upstream" and classes != 8142:
            continue
        calls = {
            backend: [lambda z=z, y=y, step=step: step(z, y, half if mode == "upstream" else None) for z, y in batches]  # noqa: B023
            for backend, step in found.items()
        }
        if mode == "graph":
            calls = {backend: each for backend, each in calls.items() if _captures(backend, each)}
        for backend, times in interleaved(calls, seconds * len(calls), mode == "graph").items():
            gbps = ideal / (statistics.median(times) * 1e-3) / 1e9
            results.append(
                row(name, backend, dtype, (rows, classes, None), mode, times)
                | {"ideal_gbps": round(gbps, 1), "pct_of_copy": round(100 * gbps / bandwidth, 1)}
                | facts[backend]
            )
    return results


def _captures(backend: str, calls: list[Callable[[], object]]) -> bool:
    try:
        captured(calls[:1])
    except Exception as error:
        print(f"# {backend} cannot be captured in a CUDA graph: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    return True


def head_cell(dtype: str, shape: tuple[int, int, int], seconds: float) -> list[Row]:
    rows, width, classes = shape
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    features = torch.randn(rows, width, device=DEVICE, generator=generator, dtype=DTYPES[dtype]).requires_grad_()
    weight = torch.randn(classes, width, device=DEVICE, generator=generator, dtype=DTYPES[dtype]) / width**0.5
    weight = weight.detach().requires_grad_()
    target = torch.randint(0, classes, (rows,), device=DEVICE, generator=generator)
    few = [features[:64].detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    truth = torch.autograd.grad(torch.nn.functional.cross_entropy(few[0] @ few[1].T, target[:64]), few)
    calls: dict[str, list[Callable[[], object]]] = {}
    facts: dict[str, Row] = {}
    for backend, loss in gpu_peers.heads(DEVICE).items():
        try:
            some = features[:64].detach().requires_grad_()
            got = torch.autograd.grad(loss(some, weight, target[:64]), (some, weight))
            limit = 4e-2 if dtype == "bfloat16" else 2e-3  # float32 products may be TF32
            ok = all(bool((a.double() - b).norm() <= limit * b.norm()) for a, b in zip(got, truth))
            call = lambda loss=loss: torch.autograd.grad(loss(features, weight, target), (features, weight))  # noqa: E731
            call()
            facts[backend] = {"peak_mb": round(peak_mb(call), 1), "launches": launches(call), "ok": ok}
            calls[backend] = [call]
        except Exception as error:
            print(f"# head {dtype} {shape} {backend}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return [
        row("linear_ce", backend, dtype, (rows, classes, width), "eager", times)
        | {"ideal_gbps": None, "pct_of_copy": None}
        | facts[backend]
        for backend, times in interleaved(calls, seconds * len(calls), False).items()
    ]


def worker(op: str, dtype: str, quick: bool, until: float) -> None:
    """Prints a JSON line for each row, so that what was measured before a crash is kept."""
    bandwidth = copy_gbps()
    print(json.dumps({"copy_gbps": round(bandwidth, 1)}), flush=True)
    seconds = 0.05 if quick else 0.15
    for cell in HEAD[: 1 if quick else None] if op == "head" else QUICK if quick else CLASSES:
        if time.time() > until:
            print(f"# out of time before {op} {dtype} {cell}", flush=True)
            return
        found = head_cell(dtype, cell, seconds) if op == "head" else loss_cell(op, dtype, cell, bandwidth, seconds)
        for each in found:
            print(json.dumps(each), flush=True)
        torch.cuda.empty_cache()


def measure(quick: bool, end: float) -> tuple[list[Row], list[float], list[str]]:
    """(rows, copy bandwidths, what failed) of all workers."""
    jobs = [(op, dtype) for dtype in DTYPES for op in (*gpu_peers.LOSSES, "head")]
    rows: list[Row] = []
    bandwidths: list[float] = []
    failed: list[str] = []
    for index, (op, dtype) in enumerate(jobs):
        share = max(10.0, (end - time.time()) / (len(jobs) - index))
        command = [sys.executable, "-m", "benchmarks.gpu", "--worker", op, dtype, str(time.time() + 0.8 * share)]
        try:
            done = subprocess.run(
                [*command, *(["--quick"] if quick else [])],
                capture_output=True,
                text=True,
                timeout=share + 20,
                check=False,
            )
            out, error, code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as expired:
            out = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
            error, code = "out of time", -1
        for line in out.splitlines():
            if line.startswith("#"):
                failed.append(line[2:])
                print(line, flush=True)
            elif line.startswith('{"copy_gbps"'):
                bandwidths.append(json.loads(line)["copy_gbps"])
            elif line.startswith("{"):
                rows.append(json.loads(line))
                print(text(rows[-1]), flush=True)
        if code != 0:
            failed.append(f"{op} {dtype}: the process ended with {code}: {error.strip().splitlines()[-1:]}")
            print("# " + failed[-1], flush=True)
    return rows, bandwidths, failed


HEADER = f"{'op':15} {'dtype':9} {'B x C':>13} {'mode':9} {'backend':21} {'ms':>9} {'GB/s':>8} {'% copy':>7} {'launches':>9} {'peak MB':>9}"


def text(r: Row) -> str:
    numbers = [r["ideal_gbps"], r["pct_of_copy"], r["launches"], r["peak_mb"]]
    cells = ["-" if number is None else f"{number:g}" for number in numbers]
    wrong = "" if r["ok"] else "  DIFFERS"
    return (
        f"{r['op']:15} {r['dtype']:9} {r['B']:>5} x {r['C']:<6}{r['mode']:9} {r['backend']:21} {r['ms_p50']:9.4f} "
        f"{cells[0]:>8} {cells[1]:>7} {cells[2]:>9} {cells[3]:>9}{wrong}"
    )


def run_tests(out: Path, quick: bool) -> list[str]:
    """The GPU tests, and those marked for it under compute-sanitizer where it is installed. What failed, in words."""
    tests = Path(__file__).parent.parent / "tests" / "gpu"
    if not tests.exists():
        return ["the GPU tests are not here: run in a checkout"]
    failed = []
    commands = {"tests": ([sys.executable, "-m", "pytest", "-q", "-x", str(tests)], 150)}
    if shutil.which("compute-sanitizer") and not quick:
        only = [sys.executable, "-m", "pytest", "-q", str(tests), "-k", "memory_safety"]
        commands["compute-sanitizer"] = (["compute-sanitizer", "--error-exitcode", "86", *only], 90)
    for name, (command, limit) in commands.items():
        with (out / f"{name}.log").open("w") as log:
            try:
                code = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False, cwd=tests.parent.parent
                ).returncode
            except subprocess.TimeoutExpired:
                code = "no answer in time"
        tail = (out / f"{name}.log").read_text().strip().splitlines()[-1:]
        print(f"{name}: {tail}", flush=True)
        if code != 0:
            failed.append(f"{name}: {code}, see {name}.log")
    if "compute-sanitizer" not in commands:
        print("compute-sanitizer: not run" + ("" if quick else ", it is not installed"), flush=True)
    return failed


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines() or [None])[0]


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("ltkernels", "liger-kernel", "quack-kernels", "cut-cross-entropy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result folder")
    parser.add_argument("--quick", action="store_true", help="four class counts, one head, no compute-sanitizer")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch sees none on this machine", file=sys.stderr)
        return 1
    if options.worker:
        worker(options.worker[0], options.worker[1], options.quick, float(options.worker[2]))
        return 0
    if options.out is None:
        parser.error("--out DIR is required")
    begin = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = run_tests(options.out, options.quick)
    print(HEADER)
    rows, bandwidths, more = measure(options.quick, begin + BUDGET_S)
    failed += more
    failed += [f"{r['op']} {r['dtype']} C={r['C']} {r['backend']} differs from float64" for r in rows if not r["ok"]]
    properties = torch.cuda.get_device_properties(0)
    machine = harness.machine() | {
        "device": properties.name,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "versions": versions(),
        "threads": os.cpu_count(),
    }
    copy = round(statistics.median(bandwidths), 1) if bandwidths else None
    result = {
        "machine": machine,
        "copy_gbps": copy,
        "rows": rows,
        "failed": failed,
        "seconds": round(time.time() - begin),
    }
    (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    summary = [f"{properties.name}, copy {copy} GB/s, {result['seconds']} s", *(f"FAILED: {line}" for line in failed)]
    (options.out / "gpu.txt").write_text("\n".join([HEADER, *map(text, rows), *summary]) + "\n")
    print("\n".join(summary))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
