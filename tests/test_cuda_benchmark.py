"""benchmarks/gpu.py without a GPU: its peers' answers, the whole of it on the processor (`--dry-run`), and what survives a crash."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from ltkernels.benchmarks import gpu, gpu_cells, gpu_peers
from ltkernels.benchmarks.gpu_meter import Dry

import ltkernels as ltk


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


@pytest.mark.parametrize("dtype", gpu_cells.DTYPES)
def test_cells(dtype: str, monkeypatch, capsys) -> None:
    """Every line around the numbers, and what a peer that fails costs: before it is timed, and while it is."""
    calls = 0

    def broken(*arguments):
        raise RuntimeError("an illegal memory access was encountered")

    def later(z, y, upstream=None):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("out of memory")
        return torch.zeros_like(z)

    steps = gpu_peers.steps
    monkeypatch.setattr(gpu_peers, "steps", lambda *a, **k: steps(*a, **k) | {"broken": broken, "later": later})
    meter = Dry()
    rows = gpu_cells.run("ldam", dtype, 41, meter, 100.0, 0.0)
    told = capsys.readouterr().out
    assert f"# ldam {dtype} C=41 broken: RuntimeError: an illegal memory access" in told
    assert f"# ldam {dtype} C=41 later: RuntimeError: out of memory" in told
    assert {row["mode"] for row in rows} == {"eager", "graph", "upstream"}
    assert {row["backend"] for row in rows} == {"cpu", "cpu-kernel", "eager", "compiled"}
    for row in rows:
        assert row["ok"] is True
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["ideal_gbps"] == pytest.approx(
            2 * 4 * 41 * gpu_cells.DTYPES[dtype].itemsize / row["ms_p50"] / 1e6, rel=0.01, abs=0.06
        )
        assert row["pct_of_copy"] == pytest.approx(row["ideal_gbps"], abs=0.1)
        assert gpu.text(row)
    heads = gpu_cells.run("head", dtype, (70, 16, 50), meter, 100.0, 0.0)
    assert {row["backend"] for row in heads} >= {"ours", "eager"}
    assert all(row["ok"] for row in heads)
    assert gpu.text(heads[0])
    monkeypatch.setattr(gpu_peers, "LOSSES", ("kps",))
    hosts = gpu_cells.run("host", dtype, (2, 5), meter, 100.0, 0.0)
    assert {row["mode"] for row in hosts} == {"host step", "host forward"}
    assert all(isinstance(row["host_us"], float) for row in hosts)
    assert gpu.text(hosts[0])


def test_a_wrong_answer_is_seen(monkeypatch) -> None:
    steps = gpu_peers.steps
    monkeypatch.setattr(gpu_peers, "steps", lambda *a: {"half": lambda z, y, u=None: steps(*a)["eager"](z, y, u) / 2})
    assert [row["ok"] for row in gpu_cells.run("ce", "float32", 9, Dry(), 100.0, 0.0)] == [False] * 3


def test_a_crash_costs_its_own_rows_only(monkeypatch, capsys, tmp_path) -> None:
    good = gpu_cells.row("ce", "cuda", "float32", (4, 5, None), "eager", [1.0, 2.0, 3.0]) | {"ok": True}

    def limited(command, log, seconds, env):
        op, dtype = command[4:6]
        assert seconds <= 200
        lines = [json.dumps({"copy_gbps": 2.0}), "# a peer failed", json.dumps(good | {"op": op, "dtype": dtype})]
        if op == "ldam":
            log.write_text("\n".join([lines[0], "illegal memory access"]))
            return -6
        log.write_text("\n".join(lines) + ('\n{"op": "kp' if op == "kps" else ""))
        return None if op == "kps" else 0

    monkeypatch.setattr(gpu, "limited", limited)
    kept = []
    found = gpu.measure(tmp_path, True, False, time.time() + 200, lambda f: kept.append(len(f.rows)))
    assert [row["op"] for row in found.rows if row["dtype"] == "float32"] == [
        "ce",
        "logit_adjusted",
        "kps",
        "head",
        "host",
    ]
    assert kept == [1, 2, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10]
    assert len(found.bandwidths) == 12
    assert any("ldam bfloat16" in line and "illegal memory access" in line for line in found.failed)
    assert any("kps float32: out of time" in line for line in found.failed)
    assert any("half a line" in line for line in found.failed)
    assert "a peer failed" in found.failed
    assert "ldam" in capsys.readouterr().out


def test_no_time_left_is_said(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpu, "limited", lambda *arguments: pytest.fail("a process was started"))
    found = gpu.measure(tmp_path, False, False, time.time() + 1, lambda f: None)
    assert found.failed == [f"out of time before {op} {dtype}" for dtype in gpu_cells.DTYPES for op in gpu.OPS]


def test_a_process_ends_with_its_children(tmp_path) -> None:
    """A compiler's worker that outlives its parent would hold the GPU, whether the parent was stopped or went by itself."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    log = tmp_path / "log"
    for script, limit, code in (("sleep 600 & echo $!; wait", 1.0, None), ("sleep 600 & echo $!; exit 3", 20.0, 3)):
        assert gpu.limited(["sh", "-c", script], log, limit) == code
        child = int(log.read_text())
        end = time.monotonic() + 20
        while alive(child) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive(child)


def test_the_dry_run_goes_the_whole_way(tmp_path, monkeypatch) -> None:
    """One loss, the head and the host in processes of their own; the files are there and say what ran."""
    monkeypatch.setattr(gpu, "run_tests", lambda *arguments: [])
    monkeypatch.setattr(gpu, "DTYPES", {"float32": torch.float32})
    measure = gpu.measure
    monkeypatch.setattr(gpu, "measure", lambda *arguments: measure(*arguments, ops=("kps", "head")))
    assert gpu.main(["--out", str(tmp_path), "--dry-run"]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["failed"] == []
    assert result["machine"]["device"] == "dry run, no GPU"
    assert {row["op"] for row in result["rows"]} == {"kps", "linear_ce"}
    assert (tmp_path / "gpu.txt").read_text().count("\n") == len(result["rows"]) + 2


def test_the_gpu_tests_are_run(tmp_path, monkeypatch) -> None:
    """They are all skipped here; what is run is pytest, in a checkout, on the installed package."""
    commands = []

    def limited(command, log, seconds):
        commands.append(command)
        log.write_text("12 passed")
        return 1 if command[0] == "compute-sanitizer" else 0

    monkeypatch.setattr(gpu, "limited", limited)
    # The checkout's, wherever the package is installed.
    monkeypatch.setattr(gpu, "__file__", str(Path(__file__).parent.parent / "benchmarks" / "gpu.py"))
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/usr/bin/" + name)
    assert gpu.run_tests(tmp_path, False, time.time() + 100) == ["compute-sanitizer: 1, see compute-sanitizer.log"]
    assert commands[0][-1].endswith("tests/gpu")
    assert commands[1][:3] == ["compute-sanitizer", "--error-exitcode", "86"]
    assert gpu.run_tests(tmp_path, True, time.time() + 100) == []


def test_no_gpu_is_one_clear_message(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu.main(["--out", "unused"]) == 1
    assert capsys.readouterr().err == "benchmarks.gpu needs a CUDA device, and torch sees none on this machine\n"
