"""Promise: statistics and selections over 1, 2, 3 or 4 processes are those of one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ltkernels as ltk
from ltkernels.selection._rules import Rule, choose
from ltkernels.selection._sharded import nominees, settle

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
WORLD = 4
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_equals_one_process(tmp_path) -> None:
    """Each of four gloo processes runs every check in groups of 1 to 4 of them, with uneven and empty shares."""
    program = Path(__file__).with_name("ranks_program.py")
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(WORLD), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=ALONE,
        )
        for rank in range(WORLD)
    ]
    results = [process.communicate(timeout=600) for process in processes]
    errors = "\n".join(errors for _, errors in results)
    for rank, (output, _) in enumerate(results):
        assert re.search(rf"passed {8 * (WORLD - rank) - (rank == 0)}\b", output), errors


MANY_TIES = st.lists(st.integers(0, 6), min_size=1, max_size=40)


@given(MANY_TIES, st.integers(1, 5), st.sampled_from(["max", "min", "target"]), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_nominees_decide_as_all_scores_do(steps, ranks, mode, seed) -> None:
    """Scores that differ by fractions of a tie, where a rank's own best is not always what it must nominate."""
    tie = 1e-3
    generator = np.random.default_rng(seed)
    values = 1.0 + np.array(steps) * tie / 3
    rule = Rule(mode, low=1.0 + tie / 2, high=1.0 + tie, tie=tie)
    free = generator.random(len(values)) < 0.8
    free[generator.integers(len(values))] = True
    edges = np.sort(generator.integers(0, len(values) + 1, ranks - 1))
    found = []
    for begin, end in zip([0, *edges], [*edges, len(values)]):
        if free[begin:end].any():
            part = nominees(values[begin:end], free[begin:end], rule)
            part[:, 0] += begin
            found.append(part)
    best = choose(values, free, rule)
    assert settle(np.concatenate(found), rule) == (best, values[best])


def test_without_a_process_group() -> None:
    x = torch.randn(6, 2)
    for call in (
        lambda: ltk.diversity.FeatureStatistics(2).all_reduce(),
        lambda: ltk.diversity.class_diversities(x, torch.zeros(6).long(), group="world"),
        lambda: ltk.selection.select_subsets(x, x, [0, 3, 6], m=1, group="world"),
    ):
        with pytest.raises(RuntimeError, match="init_process_group"):
            call()
    with pytest.raises(ValueError, match="group is 'all'; it must be a process group, 'world' or None"):
        ltk.selection.select_subsets(x, x, [0, 3, 6], m=1, group="all")


def start(folder: Path, processes: int, *arguments: str) -> subprocess.Popen:
    launcher = (
        [] if processes == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    )
    command = [sys.executable, "-m", *launcher, "ltkernels", "select", "f.npz", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=ALONE, **pipes)


def test_select_under_torchrun_writes_the_files_of_one_process(tmp_path) -> None:
    """The classes are dealt over two processes, and one writes; what ends one process ends both, in words."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), [60, 40, 12, 6, 3, 1])
    features = (generator.normal(size=(len(labels), 5)) + labels[:, None]).astype(np.float32)
    np.savez(tmp_path / "f.npz", features=features, labels=labels)
    flags = ["--classes", "2", "3", "4", "--sets", "4", "--subset-size", "4", "--random-repeats", "3"]
    running = {
        "one": start(tmp_path, 1, *flags, "--out", "one"),
        "two": start(tmp_path, 2, *flags, "--out", "two"),
        # Class 5, which the second process gets, has a single sample.
        "bad": start(tmp_path, 2, "--classes", "2", "5", "--out", "bad"),
    }
    ended = {name: (process.communicate(timeout=300), process.returncode) for name, process in running.items()}
    for name in ("one", "two"):
        assert ended[name][1] == 0, ended[name][0][1]
    assert ended["bad"][1] != 0
    said = {line for line in ended["bad"][0][1].splitlines() if line.startswith("ltkernels: error: ")}
    message = "class 5 has one sample: its feature diversity gain is undefined"
    assert said == {f"ltkernels: error: f.npz: {message}", f"ltkernels: error: f.npz: rank 1: {message}"}
    assert ended["two"][0][0].count("class 2: ") == 1  # one process speaks
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npz", "one", "two"]
    with np.load(tmp_path / "one" / "selection.npz") as a, np.load(tmp_path / "two" / "selection.npz") as b:
        assert a.files == b.files
        assert "sets_4" in a.files
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])
    one, two = (json.loads((tmp_path / name / "selection.json").read_text()) for name in ("one", "two"))
    del one["seconds"], two["seconds"]
    assert one == two
    assert [entry["label"] for entry in two["classes"]] == [2, 3, 4]
