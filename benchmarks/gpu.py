"""Everything a GPU has to prove, in parts of under ten minutes, so that a borrowed machine can be used at once:

    python -m benchmarks.gpu --setup                   # the command that builds this checkout for the GPU at hand, and what to carry
    python -m benchmarks.gpu --out DIR                 # times: the losses, the head, what the host spends
    python -m benchmarks.gpu --out DIR --part tests    # tests/gpu
    python -m benchmarks.gpu --out DIR --part sanitizer --part ncu
    python -m benchmarks.gpu --out DIR --part trainer --data-dir FOLDER

Run in a checkout (the tests are not in the wheel). Each loss, dtype and back end is timed in a process of its own, so that a kernel that
breaks its CUDA context costs its own rows only; every process has a limit, and so has every part (`PARTS`; `--budget` says another). DIR
receives gpu.json (rows as in the other result files, with launches a call and the host's microseconds), written again with every row,
gpu.txt (the table) and the logs. The exit code is 0 when everything ran and agreed. `--dry-run` goes the whole way without a GPU, in tiny
shapes on the processor; its numbers mean nothing.

Protocol: an answer is compared with float64 before it is timed; inputs and gradients rotate past the second-level cache, and a row whose
batches are too few for that is marked (`cached`); medians with 20th and 80th percentiles of CUDA events. `pct_of_copy`: ideal bytes (each
logit read once, each gradient written once) in per cent of the copy bandwidth measured in the same process. Mode "graph" replays one CUDA
graph, "eager" includes what the host costs; "upstream" has an upstream gradient that is not 1, which ours are told (`grad_scale`);
"host ..." are calls that cost the device next to nothing (`gpu_cells.host_cell`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import gpu_cells, gpu_jobs, gpu_peers, harness
from .gpu_jobs import HEADER, Found, Job, limited, module, text
from .gpu_meter import Dry, Gpu

PARTS = {"times": 540, "tests": 420, "sanitizer": 240, "ncu": 180, "trainer": 560}  # seconds
DRY_S = 300  # of all parts together
CHECKOUT = Path(__file__).parent.parent
SECTIONS = ("SpeedOfLight", "WarpStateStats", "LaunchStats")


def setup(capability: tuple[int, int] | None) -> str:
    """What to do on the machine, in words that can be pasted."""
    architecture = "90" if capability is None else f"{capability[0]}{capability[1]}"
    build = "LTKERNELS_CUDA=ON python -m pip install --no-build-isolation --no-deps -e . "
    lines = [
        "Build this checkout, editable and for one architecture (scikit-build-core, pybind11, cmake, ninja and nvcc are wanted):",
        f"  {build}-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}",
        "Peers that travel as wheels (python -m pip download --no-deps NAME; those that are not there are left out):",
        *(f"  {name}: {size}" for name, size in gpu_peers.WHEELS.items()),
    ]
    return "\n".join(lines)


def run_times(out: Path, quick: bool, dry: bool, end: float, found: Found) -> None:
    flags = [*(["--quick"] if quick else []), *(["--dry-run"] if dry else [])]
    todo = gpu_jobs.jobs("cpu" if dry else "cuda", quick, dry)
    gpu_jobs.measure(out, todo, flags, {"TRITON_INTERPRET": "1"} if dry else {}, end, found)


def told(name: str, command: Sequence[str], out: Path, seconds: float, found: Found, **more: Any) -> bool:
    """Whether a command of a part ended well; its last line is printed."""
    log = out / f"{name}.log"
    try:
        code = limited(command, log, seconds, **more)
    except OSError as error:
        found.fail(f"{name}: {error}")
        return False
    print(f"{name}: {log.read_text(errors='replace').strip().splitlines()[-1:]}", flush=True)
    if code != 0:
        found.fail(f"{name}: {'no answer in time' if code is None else code}, see {log.name}")
    return code == 0


def run_tests(out: Path, quick: bool, dry: bool, end: float, found: Found) -> None:
    """The kernels first, and no further than the first failure: what comes after a broken context says nothing. That one is run again
    with every launch waited for, which names the kernel."""
    tests = CHECKOUT / "tests" / "gpu"
    if not tests.exists():
        found.fail("the GPU tests are not here: run in a checkout")
        return
    config = ["-c", str(CHECKOUT / "pyproject.toml"), f"--rootdir={CHECKOUT}", "-o", f"cache_dir={out / 'pytest'}"]
    for file in sorted(tests.glob("test_*.py"))[: 1 if quick or dry else None]:
        command = module("pytest", "-q", "-x", "-rf", *config, str(file))
        if not told(file.stem, command, out, end - time.time(), found):
            again = module("pytest", "-q", "-x", "--last-failed", *config, str(file))
            told(f"{file.stem}-again", again, out, min(60, end - time.time()), found, env={"CUDA_LAUNCH_BLOCKING": "1"})


def run_sanitizer(out: Path, quick: bool, dry: bool, end: float, found: Found) -> None:
    """Memory accesses of a few cases, and races in shared memory of two."""
    for tool, cases in (("memcheck", gpu_cells.SAFE), ("racecheck", gpu_cells.SAFE[:2])):
        worker = module(f"{__package__}.gpu", "--worker", "kernels", json.dumps(cases), *(["--dry-run"] if dry else []))
        command = worker if dry else ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86", *worker]
        told(tool, command, out, end - time.time(), found)


def run_ncu(out: Path, quick: bool, dry: bool, end: float, found: Found) -> None:
    """What limits the main kernel in four shapes: the share of each unit, and what its warps wait for."""
    for case in gpu_cells.PROFILED:
        name = f"ncu-{'-'.join(map(str, case))}"
        worker = module(
            f"{__package__}.gpu", "--worker", "kernels", json.dumps([case]), *(["--dry-run"] if dry else [])
        )
        sections = [word for section in SECTIONS for word in ("--section", section)]
        profiler = ["ncu", "--clock-control", "none", *sections, "-k", "regex:adjusted_ce", "-c", "3"]
        told(name, worker if dry else [*profiler, *worker], out, end - time.time(), found)


def run_trainer(out: Path, data: Path | None, dry: bool, end: float, found: Found) -> None:
    """The published recipe for CIFAR-10-LT: three epochs, which say how long the whole takes, then 200. The trainer keeps its numbers and
    checkpoints as it goes, so that a run that is cut short has its epochs, and another call goes on with it."""
    if data is None and not dry:
        found.fail(
            "--part trainer needs --data-dir: the folder of CIFAR-10's files, or one with train/CLASS and test/CLASS"
        )
        return
    if dry:
        source = ["--data", "digits-lt"]
    elif (folder := data) is not None and (folder / "train").is_dir():
        source = ["--preset", "ldam-drw", "--data", f"folder:{folder}"]
    else:
        source = ["--preset", "ldam-drw", "--data", "cifar10-lt", "--data-dir", str(data)]
    how = [] if dry else ["--device", "cuda", "--precision", "bf16", "--compile", "reduce-overhead"]
    for epochs in (1,) if dry else (3, 200):
        name = f"trainer-{epochs}"
        folder = out / name
        more = ["--resume", "auto"] if folder.exists() and epochs == 200 else ["--force"]
        short = [] if epochs == 200 or dry else ["--schedule-start", "2"]
        command = module(
            "ltkernels", "train", *source, *how, *short, "--epochs", str(epochs), "--out", str(folder), *more
        )
        if not told(name, command, out, end - time.time(), found) and epochs != 200:
            return


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines() or [None])[0]


def machine(meter: Gpu) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("ltkernels", *gpu_peers.WHEELS):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found = harness.machine() | {"device": meter.name(), "driver": driver(), "cuda": torch.version.cuda}
    return found | {"versions": versions, "ours": gpu_peers.backends(meter.device), "threads": os.cpu_count()}


def kept(out: Path, about: dict[str, Any], begin: float) -> Callable[[Found], list[str]]:
    """Writes what there is, with what earlier calls left in DIR; returns the summary."""
    path = out / "gpu.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = "machine" in earlier and all(earlier["machine"][key] == about[key] for key in ("commit", "device"))
    rows = earlier["rows"] if same else []

    def keep(found: Found) -> list[str]:
        every = [*rows, *found.rows]
        wrong = [
            f"{r['op']} {r['dtype']} C={r['C']} {r['backend']} differs from float64" for r in found.rows if not r["ok"]
        ]
        failed = [*found.failed, *wrong]
        copy = round(statistics.median(found.bandwidths), 1) if found.bandwidths else None
        if same and copy is None:
            copy = earlier["copy_gbps"]
        seconds = round(time.time() - begin)
        result = {"machine": about, "copy_gbps": copy, "rows": every, "failed": failed, "seconds": seconds}
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        unfinished.replace(path)
        summary = [f"{about['device']}, copy {copy} GB/s, {seconds} s", *(f"FAILED: {line}" for line in failed)]
        (out / "gpu.txt").write_text("\n".join([HEADER, *map(text, every), *summary]) + "\n")
        return summary

    return keep


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result folder")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated (default: times; dry run: all)")
    parser.add_argument("--budget", type=float, help="seconds of each part")
    parser.add_argument(
        "--data-dir", type=Path, help="trainer: CIFAR-10's files, or a folder with train/CLASS and test/CLASS"
    )
    parser.add_argument("--quick", action="store_true", help="four class counts, one head, two losses")
    parser.add_argument("--dry-run", action="store_true", help="the whole way without a GPU; the numbers mean nothing")
    parser.add_argument("--setup", action="store_true", help="print the build command and the wheels of the peers")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    meter = Dry() if options.dry_run else Gpu()
    there = torch.cuda.is_available()
    if options.setup:
        print(setup(torch.cuda.get_device_capability() if there else None))
        return 0
    if not options.dry_run and not there:
        print("benchmarks.gpu needs a CUDA device, and torch sees none on this machine", file=sys.stderr)
        return 1
    if options.worker and options.worker[0] == "kernels":
        gpu_cells.kernels(json.loads(options.worker[1]), meter)
        return 0
    if options.worker:
        *job, until = options.worker
        gpu_jobs.work(Job(*job), float(until), options.quick, meter)
        return 0
    if options.out is None:
        parser.error("--out DIR is required")
    if not options.dry_run and "cuda" not in gpu_peers.backends("cuda"):
        print(
            "the CUDA part is not built; without it, Triton's and torch's rows alone\n"
            + setup(torch.cuda.get_device_capability())
        )
    begin = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    keep = kept(options.out, machine(meter), begin)
    found = Found(keep)
    print(HEADER)
    parts = options.part or (list(PARTS) if options.dry_run else ["times"])
    for part in parts:
        seconds = options.budget or PARTS[part]
        end = min(time.time() + seconds, begin + DRY_S) if options.dry_run else time.time() + seconds
        if part == "trainer":
            run_trainer(options.out, options.data_dir, options.dry_run, end, found)
        else:
            run = {"times": run_times, "tests": run_tests, "sanitizer": run_sanitizer, "ncu": run_ncu}[part]
            run(options.out, options.quick, options.dry_run, end, found)
    summary = keep(found)
    print("\n".join(summary))
    return 1 if len(summary) > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
