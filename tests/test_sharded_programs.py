"""Promise: the programs about sharded classes run, and say what they measured and what they did not."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest


def run(tmp_path, program: str, *flags: str) -> str:
    command = [sys.executable, "-m", f"ltkernels.benchmarks.{program}", *flags]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_classes_over_two_processes(tmp_path) -> None:
    """The program itself fails where the loss does not fall."""
    output = run(tmp_path, "million_classes", "--classes", "3000", "--rows", "32", "--steps", "5", "--eager")
    peaks = re.findall(r"^rank (\d): (\d+) MiB at most, (\d+) before", output, flags=re.M)
    assert [rank for rank, *_ in peaks] == ["0", "1"]
    assert all(int(before) <= int(peak) for _, peak, before in peaks)
    assert "eager, one process: " in output


def test_the_cost_model_and_its_check(tmp_path) -> None:
    out = tmp_path / "result.json"
    output = run(
        tmp_path, "sharding_cost", "--measure", "--quick", "--rounds", "3", "--ranks", "1", "2", "--out", str(out)
    )
    model, measured = output.split("MEASURED")
    assert "MODEL, not measured: 10000000 classes" in model
    assert re.search(r"^ 1024 +9765 ", model, flags=re.M)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["ranks"], row["rank"]) for row in rows] == [(world, r) for world in (1, 2) for r in range(world)]
    assert measured.count("ratio") == len(rows)
    for row in rows:
        assert row["ok"]
        assert sum(row["predicted_parts_ms"].values()) == pytest.approx(row["predicted_ms"], abs=0.01)
        assert row["predicted_over_measured"] == pytest.approx(row["predicted_ms"] / row["ms_p50"], rel=0.01, abs=0.01)
