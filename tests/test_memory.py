"""Promise: a budget of memory is a share of what is available, in a container of what its limit leaves, and not of what lies free."""

from __future__ import annotations

import torch

from ltkernels import _memory

CPU = torch.device("cpu")


def system(folder, monkeypatch, available: int | None = 8 << 20, **files: str) -> int:
    """What is available on a system of these files; `available` in KiB."""
    if available is not None:
        (folder / "proc").mkdir(exist_ok=True)
        (folder / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemFree: 1024 kB\nMemAvailable: {available} kB\n")
    for name, text in files.items():
        place = folder / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    monkeypatch.setattr(_memory, "_SYSTEM", folder)
    return _memory.available(CPU)


def test_caches_count_as_available(tmp_path, monkeypatch) -> None:
    assert system(tmp_path, monkeypatch) == 8 << 30


def test_a_container_s_limit_counts_without_its_file_cache(tmp_path, monkeypatch) -> None:
    files = {
        "memory_dot_max": f"{4 << 30}\n",
        "memory_dot_current": f"{3 << 30}\n",
        "memory_dot_stat": f"anon 5\ninactive_file {1 << 30}\n",
    }
    assert system(tmp_path, monkeypatch, **files) == 2 << 30


def test_the_older_control_groups_count_too(tmp_path, monkeypatch) -> None:
    files = {
        "memory__memory_dot_limit_in_bytes": f"{4 << 30}\n",
        "memory__memory_dot_usage_in_bytes": f"{5 << 30}\n",
        "memory__memory_dot_stat": "total_inactive_file 0\n",
    }
    assert system(tmp_path, monkeypatch, **files) == 0


def test_no_limit_and_unreadable_files_leave_the_system_s_number(tmp_path, monkeypatch) -> None:
    assert (
        system(tmp_path, monkeypatch, memory_dot_max="max\n", memory_dot_current="7\n", memory_dot_stat="") == 8 << 30
    )
    assert system(tmp_path, monkeypatch, memory_dot_max="words\n") == 8 << 30


def test_a_system_that_does_not_say_is_asked_another_way(tmp_path, monkeypatch) -> None:
    assert system(tmp_path, monkeypatch, available=None) > 0
