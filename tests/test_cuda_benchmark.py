"""benchmarks/gpu.py without a GPU: its peers' answers, the whole of it on the processor (`--dry-run`), and what survives a crash."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from ltkernels.benchmarks import gpu, gpu_cells, gpu_jobs, gpu_peers
from ltkernels.benchmarks.gpu_jobs import Found, Job
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
    rows = list(gpu_cells.run("ldam", dtype, 41, meter, 100.0, 0.0))
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
        assert gpu_jobs.text(row)
    heads = list(gpu_cells.run("head", dtype, (70, 16, 50), meter, 100.0, 0.0))
    assert {row["backend"] for row in heads} >= {"ours", "eager"}
    assert all(row["ok"] for row in heads)
    assert gpu_jobs.text(heads[0])
    monkeypatch.setattr(gpu_peers, "LOSSES", ("kps",))
    hosts = list(gpu_cells.run("host", dtype, (2, 5), meter, 100.0, 0.0))
    assert {row["mode"] for row in hosts} == {"host step", "host forward"}
    assert all(isinstance(row["host_us"], float) for row in hosts)
    assert gpu_jobs.text(hosts[0])
    # A process is for one of them; the others are not even made.
    monkeypatch.setattr(gpu_peers, "steps", steps)
    only = list(gpu_cells.run("kps", dtype, 41, meter, 100.0, 0.0, "eager"))
    assert {row["backend"] for row in only} == {"eager"}
    assert not any(row["cached"] for row in only)
    assert {row["backend"] for row in gpu_cells.run("head", dtype, (7, 6, 5), meter, 100.0, 0.0, "ours")} == {"ours"}
    assert {row["backend"] for row in gpu_cells.run("host", dtype, (2, 5), meter, 100.0, 0.0, "cpu")} == {"cpu"}


def test_batches_are_beyond_the_cache_or_the_row_says_so(monkeypatch) -> None:
    meter = Dry()
    monkeypatch.setattr(Dry, "cache_bytes", lambda self: 40_000)
    assert len(gpu_cells.inputs(4, 1000, torch.float32, False, meter)) == 10
    assert len(gpu_cells.inputs(4, 10, torch.bfloat16, False, meter)) == 256
    found = [next(gpu_cells.run("ce", "bfloat16", classes, meter, 100.0, 0.0, "eager")) for classes in (10, 1000)]
    assert [row["cached"] for row in found] == [True, False]
    assert gpu_jobs.text(found[0]).endswith("in L2")


def test_the_order_of_the_processes(monkeypatch) -> None:
    """The two losses of the bar in both dtypes, ours before torch's, peers and compilers last."""
    monkeypatch.setattr(gpu_peers, "backends", lambda device: ["cuda", "triton"])
    monkeypatch.setattr(gpu_peers, "installed", lambda: ["liger-kernel"])
    todo = gpu_jobs.jobs("cuda", False, False)
    assert todo[:4] == [Job(op, dtype, "cuda") for op in ("logit_adjusted", "ce") for dtype in ("bfloat16", "float32")]
    assert todo[4:8] == [job._replace(backend="eager") for job in todo[:4]]
    assert todo[-4:] == [job._replace(backend="compiled") for job in todo[:4]]
    backends = [job.backend for job in todo if job.op == "ce"]
    assert backends.index("eager") < backends.index("triton") < backends.index("liger-kernel")
    assert len(set(todo)) == len(todo)
    assert {job.op for job in todo} == {*gpu_peers.LOSSES, "head", "host"}
    assert {job.op for job in gpu_jobs.jobs("cuda", True, False)} == {"logit_adjusted", "ce", "head", "host"}


def test_a_wrong_answer_is_seen(monkeypatch) -> None:
    steps = gpu_peers.steps
    monkeypatch.setattr(gpu_peers, "steps", lambda *a: {"half": lambda z, y, u=None: steps(*a)["eager"](z, y, u) / 2})
    assert [row["ok"] for row in gpu_cells.run("ce", "float32", 9, Dry(), 100.0, 0.0)] == [False] * 3


def test_a_crash_costs_its_own_rows_only(monkeypatch, capsys, tmp_path) -> None:
    good = gpu_cells.row("ce", "cuda", "float32", (4, 5, None), "eager", [1.0, 2.0, 3.0]) | {"ok": True}
    todo = [Job(op, dtype, "cuda") for dtype in gpu_cells.DTYPES for op in (*gpu_peers.LOSSES, "head", "host")]

    def limited(command, log, seconds, env, each):
        op, dtype, backend = command[command.index("--worker") + 1 :][:3]
        assert backend == "cuda"
        assert seconds <= 200
        lines = [json.dumps({"copy_gbps": 2.0}), "# a peer failed", json.dumps(good | {"op": op, "dtype": dtype})]
        if op == "ldam":
            lines = [lines[0], "illegal memory access"]
        elif op == "kps":
            lines.append('{"op": "kp')
        for line in lines:
            each(line)
        log.write_text("\n".join(lines))
        return {"ldam": -6, "kps": None}.get(op, 0)

    monkeypatch.setattr(gpu_jobs, "limited", limited)
    kept = []
    found = Found(lambda f: kept.append(len(f.rows)))
    gpu_jobs.measure(tmp_path, todo, ["--quick"], {}, time.time() + 200, found)
    assert [row["op"] for row in found.rows if row["dtype"] == "float32"] == [
        "ce",
        "logit_adjusted",
        "kps",
        "head",
        "host",
    ]
    assert sorted(set(kept)) == list(range(11))  # with every row, and with every failure
    assert len(found.bandwidths) == 12
    assert any("ldam bfloat16 cuda" in line and "illegal memory access" in line for line in found.failed)
    assert any("kps float32 cuda: out of time" in line for line in found.failed)
    assert any("half a line" in line for line in found.failed)
    assert "a peer failed" in found.failed
    assert "ldam" in capsys.readouterr().out


def test_no_time_left_is_said(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpu_jobs, "limited", lambda *arguments: pytest.fail("a process was started"))
    todo, found = gpu_jobs.jobs("cpu", True, False), Found()
    gpu_jobs.measure(tmp_path, todo, [], {}, time.time() + 1, found)
    assert found.failed == [f"out of time before {job}" for job in todo]


def test_lines_are_seen_while_the_process_runs(tmp_path) -> None:
    """A process that is killed has lost nothing of what it said."""
    seen = []
    assert gpu.limited(["sh", "-c", "echo one; echo two; sleep 600"], tmp_path / "log", 1.0, each=seen.append) is None
    assert seen == ["one", "two"]
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


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
    """A loss, the head and the bare kernels in processes of their own; the files are there and say what ran."""
    few = [Job("kps", "float32", "cpu"), Job("head", "float32", "ours")]
    monkeypatch.setattr(gpu_jobs, "jobs", lambda *arguments: few)
    parts = ["--part", "times", "--part", "sanitizer"]
    assert gpu.main(["--out", str(tmp_path), "--dry-run", *parts]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["failed"] == []
    assert result["machine"]["device"] == "dry run, no GPU"
    assert {row["op"] for row in result["rows"]} == {"kps", "linear_ce"}
    assert (tmp_path / "gpu.txt").read_text().count("\n") == len(result["rows"]) + 2
    assert (tmp_path / "memcheck.log").read_text().count("cpu ") == len(gpu_cells.SAFE)
    # Another call on the same machine and commit adds to what is there.
    monkeypatch.setattr(gpu_jobs, "jobs", lambda *arguments: [Job("ce", "float32", "eager")])
    assert gpu.main(["--out", str(tmp_path), "--dry-run", "--part", "times"]) == 0
    after = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert after[: len(result["rows"])] == result["rows"]
    assert {row["op"] for row in after} == {"kps", "linear_ce", "ce"}


def commands_of(monkeypatch, answer) -> list[tuple[list[str], dict[str, str]]]:
    """What a part would run; `answer` gives each command's exit code."""
    commands = []

    def limited(command, log, seconds, env=None, each=None):
        commands.append((command, env or {}))
        log.write_text("12 passed")
        return answer(command)

    monkeypatch.setattr(gpu, "limited", limited)
    return commands


def test_the_gpu_tests_are_run(tmp_path, monkeypatch) -> None:
    """They are all skipped here; what is run is pytest, in a checkout, on the installed package, and what failed once more."""
    monkeypatch.setattr(gpu, "CHECKOUT", Path(__file__).parent.parent)
    commands = commands_of(monkeypatch, lambda command: 1 if "kernels" in command[-1] else 0)
    found = Found()
    gpu.run_tests(tmp_path, False, False, time.time() + 100, found)
    files = [Path(command[-1]).name for command, _ in commands]
    assert files == [
        "test_gpu_contrast.py", "test_gpu_kernels.py", "test_gpu_kernels.py", "test_gpu_selection.py", "test_gpu_training.py",
    ]  # fmt: skip
    assert commands[2][1] == {"CUDA_LAUNCH_BLOCKING": "1"}
    assert "--last-failed" in commands[2][0]
    assert found.failed == [f"test_gpu_kernels{again}: 1, see test_gpu_kernels{again}.log" for again in ("", "-again")]
    monkeypatch.setattr(gpu, "CHECKOUT", tmp_path)
    gpu.run_tests(tmp_path, False, False, time.time() + 100, found)
    assert found.failed[-1] == "the GPU tests are not here: run in a checkout"


def test_sanitizer_and_profiler(tmp_path, monkeypatch) -> None:
    commands = commands_of(monkeypatch, lambda command: 0)
    gpu.run_sanitizer(tmp_path, False, False, time.time() + 100, Found())
    gpu.run_ncu(tmp_path, False, False, time.time() + 100, Found())
    tools = [command[:3] for command, _ in commands]
    assert tools[:2] == [["compute-sanitizer", "--tool", tool] for tool in ("memcheck", "racecheck")]
    assert tools[2:] == [["ncu", "--clock-control", "none"]] * 4
    assert json.loads(commands[1][0][-1]) == [list(case) for case in gpu_cells.SAFE[:2]]


def test_the_trainer_runs_three_epochs_before_all(tmp_path, monkeypatch) -> None:
    commands, found = commands_of(monkeypatch, lambda command: 0), Found()
    gpu.run_trainer(tmp_path, Path("pictures"), False, time.time() + 100, found)
    epochs = [command[command.index("--epochs") + 1] for command, _ in commands]
    assert epochs == ["3", "200"]
    assert all(command[command.index("--data-dir") + 1] == "pictures" for command, _ in commands)
    (tmp_path / "trainer-200").mkdir()
    gpu.run_trainer(tmp_path, Path("pictures"), False, time.time() + 100, found)
    assert commands[-1][0][-2:] == ["--resume", "auto"]
    gpu.run_trainer(tmp_path, None, False, time.time() + 100, found)
    assert len(found.failed) == 1
    assert "needs --data-dir" in found.failed[0]


def test_setup_says_how_to_build_for_the_device() -> None:
    told = gpu.setup((10, 0))
    assert "CMAKE_CUDA_ARCHITECTURES=100" in told
    assert "-e ." in told
    assert "92 MB" in told


def test_no_gpu_is_one_clear_message(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu.main(["--out", "unused"]) == 1
    assert capsys.readouterr().err == "benchmarks.gpu needs a CUDA device, and torch sees none on this machine\n"
