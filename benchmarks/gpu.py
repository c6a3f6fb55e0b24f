"""Everything a GPU has to prove, in one command and under eight minutes: tests, memory safety, benchmarks.

    python -m benchmarks.gpu --out DIR [--quick] [--dry-run]

Run in a checkout (the tests are not in the wheel). Each loss and dtype is timed in a process of its own, so that a kernel that
breaks its CUDA context costs its own rows only; every process has a limit, and the run as a whole `BUDGET_S`. DIR receives gpu.json (rows
as in the other result files, with launches a call and the host's microseconds), rewritten after every process, gpu.txt (the table) and
the logs. The exit code is 0 when everything ran and agreed. `--dry-run` goes the whole way without a GPU, in tiny shapes on the
processor; its numbers mean nothing.

Protocol: an answer is compared with float64 before it is timed; inputs rotate past the second-level cache; implementations take turns;
medians with 20th and 80th percentiles of CUDA events. `pct_of_copy`: ideal bytes (each logit read once, each gradient written once) in
per cent of the copy bandwidth measured in the same process. Mode "graph" replays one CUDA graph, "eager" includes what the host costs;
"upstream" has an upstream gradient that is not 1, which ours are told (`grad_scale`); "host ..." are calls that cost the device next to
nothing (`gpu_cells.host_cell`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import gpu_cells, gpu_peers, harness
from .gpu_cells import DTYPES, Row
from .gpu_meter import Dry, Gpu

BUDGET_S = 440  # of the whole run
TESTS_S, SANITIZER_S = 150, 80
OPS = (*gpu_peers.LOSSES, "head", "host")


def limited(command: Sequence[str], log: Path, seconds: float, env: dict[str, str] | None = None) -> int | None:
    """The exit code of a command whose output goes to `log`, or None where it took longer. Its children end with it: a compiler's
    worker that outlives it would be waited for, and would hold the GPU."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **(env or {})}
        )
        try:
            return process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def module(name: str, *arguments: str) -> list[str]:
    """A command that runs a module on this process' path: `-m` would put the working folder before it (`harness`)."""
    return [sys.executable, "-c", harness._RUN.format(path=sys.path, module=name), *arguments]


def worker(op: str, dtype: str, until: float, quick: bool, meter: Gpu) -> None:
    """Prints a JSON line for each row, so that what was measured before a crash is kept."""
    bandwidth = meter.copy_gbps()
    print(json.dumps({"copy_gbps": round(bandwidth, 1)}), flush=True)
    seconds = 0.0 if isinstance(meter, Dry) else 0.04 if quick else 0.08
    for cell in gpu_cells.cells(op, quick, meter):
        if time.time() > until:
            print(f"# out of time before {op} {dtype} {cell}", flush=True)
            return
        try:
            for each in gpu_cells.run(op, dtype, cell, meter, bandwidth, seconds):
                print(json.dumps(each), flush=True)
        except Exception as error:
            gpu_cells.report(f"{op} {dtype} {cell}", error)
        meter.wait()  # raises where the context is broken, and the process ends here
        torch.compiler.reset()
        meter.free()


class Found:
    """What the processes have printed so far."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.bandwidths: list[float] = []
        self.failed: list[str] = []

    def fail(self, line: str) -> None:
        self.failed.append(line)
        print("# " + line, flush=True)

    def take(self, output: str) -> None:
        for line in output.splitlines():
            if line.startswith("# "):
                self.fail(line[2:])
            elif line.startswith("{"):
                try:
                    each = json.loads(line)
                except json.JSONDecodeError:  # cut short by the end of its process
                    self.fail(f"half a line: {line[:80]}")
                    continue
                if "copy_gbps" in each:
                    self.bandwidths.append(each["copy_gbps"])
                else:
                    self.rows.append(each)
                    print(text(each), flush=True)


def measure(
    out: Path, quick: bool, dry: bool, end: float, keep: Callable[[Found], object], ops: Sequence[str] = OPS
) -> Found:
    """All processes, one after the other; `keep` is called after each."""
    found = Found()
    jobs = [(op, dtype) for dtype in DTYPES for op in ops]
    flags = [*(["--quick"] if quick else []), *(["--dry-run"] if dry else [])]
    env = {"TRITON_INTERPRET": "1"} if dry else {}
    for index, (op, dtype) in enumerate(jobs):
        left = end - time.time()
        if left < 5:
            found.fail(f"out of time before {op} {dtype}")
            continue
        share = max(10.0, left / (len(jobs) - index))
        command = module(f"{__package__}.gpu", "--worker", op, dtype, str(time.time() + 0.8 * share), *flags)
        log = out / f"{op}-{dtype}.log"
        code = limited(command, log, min(share + 20, left), env)
        output = log.read_text(errors="replace")
        found.take(output)
        if code is None:
            found.fail(f"{op} {dtype}: out of time, see {log.name}")
        elif code != 0:
            last = [line for line in output.splitlines() if line.strip()][-1:]
            found.fail(f"{op} {dtype}: the process ended with {code}, see {log.name}: {' '.join(last)[:200]}")
        keep(found)
    return found


HEADER = (
    f"{'op':15} {'dtype':9} {'B x C':>14} {'mode':13} {'backend':21} {'ms':>9} {'GB/s':>8} {'% copy':>7} {'launches':>9} "
    f"{'peak MB':>9} {'host us':>8}"
)


def text(r: Row) -> str:
    numbers = [r["ideal_gbps"], r["pct_of_copy"], r["launches"], r["peak_mb"], r["host_us"]]
    cells = ["-" if number is None else f"{number:g}" for number in numbers]
    wrong = "" if r["ok"] else "  DIFFERS"
    return (
        f"{r['op']:15} {r['dtype']:9} {r['B']:>5} x {r['C']:<6} {r['mode']:13} {r['backend']:21} {r['ms_p50']:9.4f} "
        f"{cells[0]:>8} {cells[1]:>7} {cells[2]:>9} {cells[3]:>9} {cells[4]:>8}{wrong}"
    )


def run_tests(out: Path, quick: bool, end: float) -> list[str]:
    """The GPU tests, and those marked for it under compute-sanitizer where it is installed. What failed, in words."""
    tests = Path(__file__).parent.parent / "tests" / "gpu"
    if not tests.exists():
        return ["the GPU tests are not here: run in a checkout"]
    root = f"--rootdir={tests.parent.parent}"
    config = ["-c", str(tests.parent.parent / "pyproject.toml"), root, "-p", "no:cacheprovider"]
    failed = []
    commands = {"tests": (module("pytest", "-q", "--maxfail=25", "-rf", *config, str(tests)), TESTS_S)}
    if shutil.which("compute-sanitizer") and not quick:
        only = module("pytest", "-q", "-x", *config, str(tests), "-k", "memory_safety")
        commands["compute-sanitizer"] = (["compute-sanitizer", "--error-exitcode", "86", *only], SANITIZER_S)
    else:
        print("compute-sanitizer: not run" + ("" if quick else ", it is not installed"), flush=True)
    for name, (command, seconds) in commands.items():
        log = out / f"{name}.log"
        try:
            code = limited(command, log, min(seconds, end - time.time()))
        except OSError as error:
            failed.append(f"{name}: {error}")
            continue
        print(f"{name}: {log.read_text(errors='replace').strip().splitlines()[-1:]}", flush=True)
        if code != 0:
            failed.append(f"{name}: {'no answer in time' if code is None else code}, see {log.name}")
    return failed


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines() or [None])[0]


def machine(meter: Gpu) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("ltkernels", "liger-kernel", "quack-kernels", "cut-cross-entropy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found = harness.machine() | {"device": meter.name(), "driver": driver(), "cuda": torch.version.cuda}
    return found | {"versions": versions, "ours": gpu_peers.backends(meter.device), "threads": os.cpu_count()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result folder")
    parser.add_argument("--quick", action="store_true", help="four class counts, one head, no compute-sanitizer")
    parser.add_argument("--dry-run", action="store_true", help="the whole way without a GPU; the numbers mean nothing")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    meter = Dry() if options.dry_run else Gpu()
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch sees none on this machine", file=sys.stderr)
        return 1
    if options.worker:
        op, dtype, until = options.worker
        worker(op, dtype, float(until), options.quick, meter)
        return 0
    if options.out is None:
        parser.error("--out DIR is required")
    begin = time.time()
    end = begin + BUDGET_S
    options.out.mkdir(parents=True, exist_ok=True)
    about = machine(meter)
    failed = run_tests(options.out, options.quick or options.dry_run, end)

    def keep(found: Found) -> list[str]:
        """Writes what there is; returns the summary."""
        wrong = [
            f"{r['op']} {r['dtype']} C={r['C']} {r['backend']} differs from float64" for r in found.rows if not r["ok"]
        ]
        every = [*failed, *found.failed, *wrong]
        copy = round(statistics.median(found.bandwidths), 1) if found.bandwidths else None
        seconds = round(time.time() - begin)
        result = {"machine": about, "copy_gbps": copy, "rows": found.rows, "failed": every, "seconds": seconds}
        (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        summary = [f"{about['device']}, copy {copy} GB/s, {seconds} s", *(f"FAILED: {line}" for line in every)]
        (options.out / "gpu.txt").write_text("\n".join([HEADER, *map(text, found.rows), *summary]) + "\n")
        return summary

    print(HEADER)
    summary = keep(measure(options.out, options.quick, options.dry_run, end, keep))
    print("\n".join(summary))
    return 1 if len(summary) > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
