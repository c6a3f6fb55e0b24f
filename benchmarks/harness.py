"""The protocol that every benchmark follows: answers first, fresh inputs, medians with spread, and one process for each
implementation, so that none runs on caches, memory pools or threads that another has left behind.

Memory: with glibc's defaults arrays above 32 MiB come fresh from the system at every call, and smaller ones now and then. The page
faults cost every implementation up to ten milliseconds an array, several times the work of the fused ones, and make times jump; so the
processes keep freed memory (`_KEEP_MEMORY`), as jemalloc and tcmalloc do.

The processes take turns: every round gives each a burst of some calls in a loop, as a training step would run it, so that a slow
second of the machine hits all of them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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


def write(path: Path, rows: list[dict[str, Any]], bandwidth: float) -> None:
    """The result file; benchmarks.report makes tables and pictures of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "copy_gbps": round(bandwidth, 2), "rows": rows}, indent=1)
    path.write_text(text + "\n")
