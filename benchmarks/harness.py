"""The protocol that every benchmark follows: answers first, implementations interleaved, fresh inputs, medians with spread."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """What a number depends on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
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
        "commit": commit.stdout.strip() or None,
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


def interleaved(
    calls: dict[str, Callable[[Any], object]], inputs: Sequence[Any], seconds: float = 1.0, repeats: int = 5
) -> dict[str, tuple[float, float, float]]:
    """(median, 20th, 80th percentile) of milliseconds for each call.

    Every round times each call once, one after the other, on the next of `inputs`: a slow second of the machine hits all of
    them. Rounds go on for about `seconds` a call, at least `repeats`.
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
