"""How many bytes this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_UNKNOWN = 1 << 32  # where the system does not say
_SYSTEM = Path("/")


def available(device: torch.device) -> int:
    """Bytes that an allocation on `device` finds: on the CPU what the system can give without swapping (more than what lies free: caches
    are given back), and no more than what a container's limit leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_system(), *_container()])


def _system() -> int:
    try:
        lines = (_SYSTEM / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return _UNKNOWN


def _container() -> list[int]:
    """What the limits of control groups, version 2 and 1, leave; [] without any."""
    root = _SYSTEM / "sys/fs/cgroup"
    kinds = (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    left = []
    for folder, limit, used, cache in kinds:
        try:
            most = (folder / limit).read_text().strip()
            if most == "max":
                continue
            taken = int((folder / used).read_text())
            # Pages of files that nobody reads are counted as used and given back on demand.
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(max(0, int(most) - taken + int(statistics.get(cache, 0))))
        except (OSError, ValueError):
            continue
    return left
