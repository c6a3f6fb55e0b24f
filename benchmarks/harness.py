"""The protocol that every benchmark follows: answers first, fresh inputs, medians with spread, and one process for each
implementation, so that none runs on caches, memory pools or threads that another has left behind.

Memory: with glibc's defaults arrays above 32 MiB come fresh from the system at every call, and smaller ones now and then. The page
faults cost every implementation up to ten milliseconds an array, several times the work of the fused ones, and make times jump; so the
processes keep freed memory (`_KEEP_MEMORY`), as jemalloc and tcmalloc do.

The processes take turns: every round gives each a burst of some calls in a loop, as a training step would run it, so that a slow
second of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ltkernels._files import commit


def machine() -> dict[str, Any]:
    """What a number depends on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:
        triton = None
    return {
        "device": "cpu",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "driver": None,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit(Path(__file__).parent.parent),
        "date": datetime.date.today().isoformat(),
    }


def copy_gbps(megabytes: int = 256) -> float:
    """Copy bandwidth in GB/s, one read and one write counted, of arrays past the last-level cache of ordinary machines."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / statistics.median(times) / 1e9


def peak_mb(call: Callable[[], object]) -> float:
    """Largest number of MiB allocated at one time during the call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0) / 2**20


class Prepared(NamedTuple):
    """What a benchmark process has ready: the calls, one for each of the rotating inputs; whether their answer was right; and what
    else the row of the result says."""

    calls: Sequence[Callable[[], object]]
    ok: bool
    row: dict[str, Any]


def serve(backend: str, prepare: Callable[[str, dict[str, Any]], Prepared | None]) -> int:
    """The loop of one implementation's process: cells and bursts come as lines of JSON, answers and times go back."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a package prints must not end up among the answers
    prepared: Prepared | None = None
    turn = 0
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict[str, Any]
        if "cell" in request:
            prepared = None  # frees the last cell's memory
            prepared = prepare(backend, request["cell"])
            if prepared is None:
                reply = {"absent": True}
            else:
                reply = {"ok": prepared.ok, "row": prepared.row, "ms": _burst(prepared.calls, 0, 3)[-1]}
        else:
            reply = {"ms": _burst(prepared.calls, turn, request["calls"])}
            turn += request["calls"]
        print(json.dumps(reply), file=answers, flush=True)
    return 0


def _burst(calls: Sequence[Callable[[], object]], turn: int, number: int) -> list[float]:
    times = []
    for index in range(turn, turn + number):
        call = calls[index % len(calls)]
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


# On this process' path: `-m` would put the working folder before it, and in a checkout that is the package without its compiled module.
_RUN = "import runpy, sys; sys.path[:] = {path!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"


def run_module(module: str) -> str:
    """A program that runs a module with this process' path."""
    return _RUN.format(path=sys.path, module=module)


_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


class Process:
    """One implementation's process, running MODULE as a program with ``--serve BACKEND``."""

    def __init__(self, module: str, backend: str) -> None:
        self.backend = backend
        self._process = subprocess.Popen(
            [sys.executable, "-c", run_module(module), "--serve", backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_KEEP_MEMORY},
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.backend} ended with code {self._process.wait()} on {request}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def processes_of(module: str, backends: Sequence[str]) -> Iterator[list[Process]]:
    """One `Process` for each backend, ended with the block."""
    processes = [Process(module, backend) for backend in backends]
    try:
        yield processes
    finally:
        for process in processes:
            process.close()


def race(processes: Sequence[Process], cell: dict[str, Any], seconds: float, repeats: int = 5) -> list[dict[str, Any]]:
    """One row for each implementation that has this cell: what it said of itself, ``ok``, and ``ms_p50``, ``ms_p20``, ``ms_p80``.

    A burst lasts about 20 ms. Rounds go on for about `seconds` an implementation, at least `repeats`.
    """
    ready: list[tuple[Process, dict[str, Any], list[float]]] = []
    for process in processes:
        reply = process.ask({"cell": cell})
        if "absent" not in reply:
            ready.append((process, reply, []))
    begin, rounds = time.perf_counter(), 0
    while rounds < repeats or time.perf_counter() - begin < seconds * len(ready):
        for process, reply, times in ready:
            # The first call of a burst finds the caches as another process left them; it is not counted.
            calls = 1 + max(1, min(200, int(20.0 / reply["ms"])))
            times += process.ask({"calls": calls})["ms"][1:]
        rounds += 1
    return [
        {**cell, "backend": process.backend, **reply["row"], "ok": reply["ok"]}
        | {f"ms_p{int(100 * share)}": round(_percentile(times, share), 5) for share in (0.5, 0.2, 0.8)}
        for process, reply, times in ready
    ]


def interleaved(
    calls: dict[str, Callable[[Any], object]], inputs: Sequence[Any], seconds: float = 1.0, repeats: int = 5
) -> dict[str, tuple[float, float, float]]:
    """(median, 20th, 80th percentile) of milliseconds for each call, all in this process: for calls of milliseconds and more.

    Every round times each call once, one after the other, on the next of `inputs`. Rounds go on for about `seconds` a call, at least
    `repeats`.
    """
    for call in calls.values():
        for index in range(2):
            call(inputs[index % len(inputs)])
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds = time.perf_counter(), 0
    while rounds < repeats or time.perf_counter() - begin < seconds * len(calls):
        argument = inputs[rounds % len(inputs)]
        for name, call in calls.items():
            start = time.perf_counter()
            call(argument)
            times[name].append((time.perf_counter() - start) * 1e3)
        rounds += 1
    return {name: tuple(_percentile(values, share) for share in (0.5, 0.2, 0.8)) for name, values in times.items()}


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def parser(name: str, doc: str, peers: Sequence[str], quick: str = "", seconds: float = 2.0) -> argparse.ArgumentParser:
    """The flags that every benchmark of racing implementations has."""
    made = argparse.ArgumentParser(prog=f"ltkernels bench {name}", description=doc.splitlines()[0])
    made.add_argument("--out", type=Path, help="result file (JSON)")
    if quick:
        made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--seconds", type=float, default=seconds, help="time a cell and implementation")
    made.add_argument("--peers", nargs="+", default=list(peers), choices=peers)
    made.add_argument("--serve", help=argparse.SUPPRESS)
    return made


def run(
    module: str,
    options: argparse.Namespace,
    prepare: Callable[[str, dict[str, Any]], Prepared | None],
    cells: Iterable[dict[str, Any]],
    *,
    repeats: int = 3,
    moved: Callable[[dict[str, Any]], float] | None = None,
    kind: str | None = None,
    after: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> int:
    """A benchmark's program, or with ``--serve`` one implementation's process of it; returns the exit code, 1 where an answer of ours was
    wrong.

    Args:
        cells: op, B, C and D (None where there is no width); dtype and mode where they are not float32 and forward+backward.
        moved: bytes that a cell cannot do without, for ``ideal_gbps``.
        kind: of the result file, for `benchmarks.report`.
        after: sees all rows before they are written, and may add some.
    """
    if options.serve:
        return serve(options.serve, prepare)
    bandwidth = copy_gbps()
    print(f"copy {bandwidth:.1f} GB/s, {torch.get_num_threads()} threads", flush=True)
    rows: list[dict[str, Any]] = []
    with processes_of(module, ("ours", *options.peers)) as processes:
        for given in cells:
            cell = {"dtype": "float32", "mode": "forward+backward"} | given
            found = race(processes, cell, options.seconds, repeats)
            for row in found:
                ideal = None if moved is None else moved(row) / (row["ms_p50"] * 1e-3) / 1e9
                row["ideal_gbps"] = None if ideal is None else round(ideal, 3)
                row["pct_of_copy"] = None if ideal is None else round(100 * ideal / bandwidth, 1)
                row.setdefault("peak_mb", None)
            rows += found
            print(_line(found), flush=True)
    after(rows)
    if options.out:
        write(options.out, rows, bandwidth, kind)
        print(f"wrote {options.out}")
    return 0 if all(row["ok"] for row in rows if row["backend"].startswith("cpu-")) else 1


def _line(found: list[dict[str, Any]]) -> str:
    ours = found[0]

    def said(row: dict[str, Any]) -> str:
        return ("" if row["peak_mb"] is None else f" {row['peak_mb']} MiB") + ("" if row["ok"] else " DIFFERS")

    shape = "x".join(str(ours[name]) for name in "BDC" if ours[name] is not None)
    others = "  ".join(f"{row['backend']} {row['ms_p50'] / ours['ms_p50']:.2f}x{said(row)}" for row in found[1:])
    return (
        f"{ours['op']:22} {ours['dtype']:9} {shape:15} {ours['ms_p50']:10.4f} ms{said(ours)}   {others}  {ours['mode']}"
    )


def write(path: Path, rows: list[dict[str, Any]], bandwidth: float, kind: str | None = None) -> None:
    """The result file; benchmarks.report makes tables and pictures of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {} if kind is None else {"kind": kind}
    text = json.dumps({**named, "machine": machine(), "copy_gbps": round(bandwidth, 2), "rows": rows}, indent=1)
    path.write_text(text + "\n")
