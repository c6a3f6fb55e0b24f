"""Processes of the GPU benchmark: what runs in which order, how their lines are read while they run, and where a row is kept at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import gpu_cells, gpu_peers, harness
from .gpu_cells import DTYPES, Row

FIRST = ("logit_adjusted", "ce")
COMPILED = "compiled"


class Job(NamedTuple):
    """One process: a loss, the head or the host's share, in one dtype, on one back end."""

    op: str
    dtype: str
    backend: str

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {self.backend}"


def jobs(device: str, quick: bool, dry: bool) -> list[Job]:
    """What is wanted most comes first, and what takes longest to start last: ours, torch's, peers', torch.compile's."""
    ours = gpu_peers.backends(device)
    peers = gpu_peers.installed()
    rest = tuple(name for name in gpu_peers.LOSSES if name not in FIRST)
    dtypes = ("bfloat16",) if dry else tuple(DTYPES)

    def over(ops: Sequence[str], backends: Sequence[str]) -> Iterator[Job]:
        return (Job(op, dtype, backend) for backend in backends for op in ops for dtype in dtypes)

    best = ours[:1]
    found = [*over(FIRST, [*best, "eager"])]
    if dry:
        found = [Job("logit_adjusted", dtype, best[0]) for dtype in DTYPES] + [*over(FIRST[1:], ["eager"])]
    found += over(["head"], gpu_peers.head_names(peers)[: 2 if dry else None])
    found += over(["host"], [*best, "eager"][: 1 if dry else None])
    if not dry:
        found += [*over(FIRST, [f"{name}-kernel" for name in best]), *over(FIRST, [*ours[1:], *peers])]
    if not quick:
        found += over(rest[:1] if dry else rest, [*best, "eager"][: 1 if dry else None])
    return [*found, *over(FIRST[: 1 if dry else None], [COMPILED])]


def limited(
    command: Sequence[str],
    log: Path,
    seconds: float,
    env: dict[str, str] | None = None,
    each: Callable[[str], object] | None = None,
) -> int | None:
    """The exit code of a command whose output goes to `log`, line by line also to `each`, or None where it took longer. Its children end
    with it: a compiler's worker that outlives it would be waited for, and would hold the GPU."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            env={**os.environ, **(env or {})},
        )  # fmt: skip

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                if each is not None:
                    each(line.rstrip("\n"))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            return process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(10)


def module(name: str, *arguments: str) -> list[str]:
    """A command that runs a module on this process' path: `-m` would put the working folder before it (`harness`)."""
    return [sys.executable, "-u", "-c", harness._RUN.format(path=sys.path, module=name), *arguments]


class Found:
    """What the processes have printed so far; `keep` is called after each row and each failure."""

    def __init__(self, keep: Callable[[Found], object] = lambda found: None) -> None:
        self.rows: list[Row] = []
        self.bandwidths: list[float] = []
        self.failed: list[str] = []
        self._keep = keep

    def fail(self, line: str) -> None:
        self.failed.append(line)
        print("# " + line, flush=True)
        self._keep(self)

    def take(self, line: str) -> None:
        if line.startswith("# "):
            self.fail(line[2:])
        elif line.startswith("{"):
            try:
                each = json.loads(line)
            except json.JSONDecodeError:  # cut short by the end of its process
                self.fail(f"half a line: {line[:80]}")
                return
            if "copy_gbps" in each:
                self.bandwidths.append(each["copy_gbps"])
            else:
                self.rows.append(each)
                print(text(each), flush=True)
                self._keep(self)


def measure(
    out: Path, todo: Sequence[Job], flags: Sequence[str], env: dict[str, str], end: float, found: Found
) -> None:
    """All processes, one after the other. What one does not use of its share of the time is the others'."""
    for index, job in enumerate(todo):
        left = end - time.time()
        if left < 5:
            found.fail(f"out of time before {job}")
            continue
        share = max(15.0, 2 * left / (len(todo) - index))
        command = module(f"{__package__}.gpu", "--worker", *job, str(time.time() + 0.8 * min(share, left)), *flags)
        log = out / f"{'-'.join(job)}.log"
        code = limited(command, log, min(share, left), env, found.take)
        if code is None:
            found.fail(f"{job}: out of time, see {log.name}")
        elif code != 0:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            found.fail(f"{job}: the process ended with {code}, see {log.name}: {' '.join(last)[:200]}")


def work(job: Job, until: float, quick: bool, meter: gpu_cells.Gpu) -> None:
    """Of one process: prints a JSON line for each row, so that what was measured before a crash is kept."""
    bandwidth = meter.copy_gbps()
    print(json.dumps({"copy_gbps": round(bandwidth, 1)}), flush=True)
    seconds = 0.0 if isinstance(meter, gpu_cells.Dry) else 0.04 if quick else 0.08
    for cell in gpu_cells.cells(job.op, quick, meter):
        if job.backend == COMPILED and not gpu_cells.compiles(job.op, cell, meter):
            continue
        if time.time() > until:
            print(f"# out of time before {job} {cell}", flush=True)
            return
        try:
            for each in gpu_cells.run(job.op, job.dtype, cell, meter, bandwidth, seconds, job.backend):
                print(json.dumps(each), flush=True)
        except Exception as error:
            gpu_cells.report(f"{job} {cell}", error)
        meter.wait()  # raises where the context is broken, and the process ends here
        meter.free()


HEADER = (
    f"{'op':15} {'dtype':9} {'B x C':>14} {'mode':13} {'backend':21} {'ms':>9} {'GB/s':>8} {'% copy':>7} {'launches':>9} "
    f"{'peak MB':>9} {'host us':>8}"
)


def text(r: Row) -> str:
    numbers = [r["ideal_gbps"], r["pct_of_copy"], r["launches"], r["peak_mb"], r["host_us"]]
    cells = ["-" if number is None else f"{number:g}" for number in numbers]
    notes = ("" if r["ok"] else "  DIFFERS") + ("  in L2" if r.get("cached") else "")
    return (
        f"{r['op']:15} {r['dtype']:9} {r['B']:>5} x {r['C']:<6} {r['mode']:13} {r['backend']:21} {r['ms_p50']:9.4f} "
        f"{cells[0]:>8} {cells[1]:>7} {cells[2]:>9} {cells[3]:>9} {cells[4]:>8}{notes}"
    )
