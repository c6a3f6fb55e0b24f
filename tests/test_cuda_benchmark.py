"""benchmarks/gpu.py without a GPU: its peers' answers, its bookkeeping with a clock in place of CUDA events, and what survives a crash."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ltkernels as ltk

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import gpu, gpu_peers

sys.path.pop(0)


@pytest.mark.parametrize("name", gpu_peers.LOSSES)
def test_the_eager_forms_are_the_losses(name: str) -> None:
    counts = [400, 7, 100, 25, 6]
    tables = {key: table.double() for key, table in gpu_peers.tables_of(name, counts, "cpu").items()}
    z = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    y = torch.tensor([0, 1, 2, 3, 4, 1])
    leaf = z.clone().requires_grad_()
    ltk.LOSSES[name].make(counts)(leaf, y).backward()
    halves = {torch.float64: torch.tensor(0.5, dtype=torch.float64)}
    step = gpu_peers.differentiated(gpu_peers.eager(name, tables))
    torch.testing.assert_close(step(z, y), leaf.grad, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(step(z, y, halves), leaf.grad / 2, rtol=1e-6, atol=1e-12)


@pytest.fixture
def _clock(monkeypatch):
    def timed(calls):
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "events", timed)
    monkeypatch.setattr(gpu, "captured", lambda calls: lambda: [call() for call in calls])
    monkeypatch.setattr(gpu, "peak_mb", lambda call: call() is None or 1.0)
    monkeypatch.setattr(gpu, "launches", lambda call: 2)
    monkeypatch.setattr(gpu, "batch_of", lambda classes: 70)
    monkeypatch.setattr(gpu, "COMPILED", ())
    inputs = gpu.inputs
    monkeypatch.setattr(gpu, "inputs", lambda *arguments: inputs(*arguments)[:2])


@pytest.mark.usefixtures("_clock")
@pytest.mark.parametrize("dtype", gpu.DTYPES)
def test_cells(dtype: str, monkeypatch) -> None:
    def broken(*arguments):
        raise RuntimeError("an illegal memory access was encountered")

    steps = gpu_peers.steps
    monkeypatch.setattr(gpu_peers, "steps", lambda *a, **k: steps(*a, **k) | {"broken": broken})
    rows = gpu.loss_cell("ldam", dtype, 8142, 100.0, 0.0)
    assert {row["mode"] for row in rows} == {"eager", "graph", "upstream"}
    assert {row["backend"] for row in rows} >= {"eager"}
    assert "broken" not in {row["backend"] for row in rows}
    for row in rows:
        assert row["ok"] is True
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["ideal_gbps"] == pytest.approx(
            2 * 70 * 8142 * gpu.DTYPES[dtype].itemsize / row["ms_p50"] / 1e6, rel=0.01, abs=0.06
        )
        assert row["pct_of_copy"] == pytest.approx(row["ideal_gbps"], abs=0.1)
        assert gpu.text(row)
    heads = gpu.head_cell(dtype, (70, 16, 50), 0.0)
    assert {row["backend"] for row in heads} >= {"ours", "eager"}
    assert all(row["ok"] for row in heads)
    assert gpu.text(heads[0])


def test_a_crash_costs_its_own_rows_only(monkeypatch, capsys) -> None:
    good = gpu.row("ce", "cuda", "float32", (4, 5, None), "eager", [1.0, 2.0, 3.0])
    good |= {"ideal_gbps": 1.0, "pct_of_copy": 50.0, "launches": 2, "peak_mb": 0.0, "ok": True}

    def run(command, **options):
        op, dtype = command[4:6]
        lines = [json.dumps({"copy_gbps": 2.0}), "# a peer failed", json.dumps(good | {"op": op, "dtype": dtype})]
        if op == "ldam":
            return SimpleNamespace(stdout="\n".join(lines[:1]), stderr="illegal memory access\n", returncode=-6)
        if op == "kps":
            raise subprocess.TimeoutExpired(command, 1.0, output="\n".join(lines).encode())
        return SimpleNamespace(stdout="\n".join(lines), stderr="", returncode=0)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    rows, bandwidths, failed = gpu.measure(True, time.time() + 100)
    assert [row["op"] for row in rows if row["dtype"] == "float32"] == ["ce", "logit_adjusted", "kps", "head"]
    assert len(bandwidths) == 10
    assert any("ldam bfloat16" in line and "illegal memory access" in line for line in failed)
    assert any("kps float32" in line and "out of time" in line for line in failed)
    assert "a peer failed" in failed
    assert "ldam" in capsys.readouterr().out


def test_no_gpu_is_one_clear_message(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu.main(["--out", "unused"]) == 1
    assert capsys.readouterr().err == "benchmarks.gpu needs a CUDA device, and torch sees none on this machine\n"
