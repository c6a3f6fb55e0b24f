"""Several processes on one training: the numbers of one process on the same batches, up to rounding."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ltkernels.train import rundir
from ltkernels.train.config import Config

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def _torchrun(folder, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "ltkernels",
        "train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *arguments], cwd=folder, env=environment, **pipes)


def _finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def _flags(config):
    default = Config().to_dict()
    for name, value in config.to_dict().items():
        if value != default[name]:
            yield f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")


# Float64, in which rounding stays small: float32 flips a ReLU here and there, and the numbers part. Unequal weights in the two
# processes' rows, batch normalisation, augmentation, mixed targets, a seesaw that counts the batch, batches of odd sizes.
SCRIPT = """
import os
import sys
import torch
import ltkernels as ltk
from ltkernels.train import distributed
from ltkernels.train.engine import Training
from ltkernels.train.models import cnn
from ltkernels.train.recipe import Recipe

counts = [60, 30, 9, 4]
generator = torch.Generator().manual_seed(0)
x = torch.randn(103, 1, 8, 8, dtype=torch.float64, generator=generator)
y = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
results = {}
with distributed.joined("cpu") as world:
    group = "world" if world.size > 1 else None
    for name, (criterion, changes) in {
        "weighted": (ltk.nn.ClassBalanced(counts, beta=None), {"crop": 1, "flip": True}),
        "parts": (ltk.nn.ClassBalanced(counts, beta=None), {"sampler": "balanced", "accumulate": 2}),
        "mixed": (ltk.nn.ClassBalanced(counts, beta=None), {"mix": "mixup"}),
        "rows": (ltk.nn.LogitAdjustedCrossEntropy(counts, reduction="batch_mean"), {}),
        "seesaw": (ltk.nn.Seesaw(4, process_group=group), {}),
        "eql_v2": (ltk.nn.EQLv2(4, process_group=group, table_dtype=torch.float64), {}),
    }.items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(cnn((1, 8, 8)), torch.nn.Linear(64, 4)).double()
        recipe = Recipe(**{"epochs": 2, "batch_size": 31, "lr": 0.05, "weight_decay": 1e-3, "seed": 1, **changes})
        result = Training(model, criterion, (x, y), (x[::10], y[::10]), 4, recipe, name).fit()
        results[name] = (model.state_dict(), [record["train_loss"] for record in result.history])
    torch.manual_seed(0)  # the same start everywhere
    contrast = ltk.nn.ProCo(counts, 64, process_group=group)
    for begin in range(0, 96, 32):
        rows = slice(begin + world.rank * 32 // world.size, begin + (world.rank + 1) * 32 // world.size)
        contrast(x.reshape(-1, 64)[rows], y[rows])
        if begin == 32:
            contrast.next_epoch()
    results["proco"] = (contrast.state_dict(), [])
    if world.is_main:
        torch.save(results, sys.argv[1])
# A thread of the group that lives when the interpreter ends can abort the process.
tasks = "/proc/self/task"
names = [open(f"{tasks}/{task}/comm").read().strip() for task in os.listdir(tasks)] if os.path.isdir(tasks) else []
assert "pt_gloo_runloop" not in names, names
"""


def test_two_processes_give_the_numbers_of_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    alone = [sys.executable, "script.py", "one.pt"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "script.py",
        "two.pt",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        for command in (alone, torchrun)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert len(one) == 7
    for name in one:
        (state, losses), (other_state, other_losses) = one[name], two[name]
        assert losses == pytest.approx(other_losses, rel=1e-6), name  # summed in float32
        for key, value in state.items():
            assert torch.allclose(value, other_state[key], rtol=1e-6, atol=1e-8), (name, key)


def test_two_processes_stop_and_resume(tmp_path):
    config = Config(model="mlp", epochs=20, loss="class_balanced", batch_size=33, threads=1, checkpoint_seconds=0.0)
    whole = _torchrun(tmp_path, *_flags(config), "--out", "whole")
    stopped = _torchrun(tmp_path, *_flags(config), "--out", "run")
    while stopped.poll() is None and not list((tmp_path / "run").glob("state/*.pt")):
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    stopped.wait(60)
    assert rundir.is_unfinished(tmp_path / "run")
    before = rundir.read_metrics(tmp_path / "run")
    assert 0 < len(before) < 20
    output = _finish(_torchrun(tmp_path, *_flags(config), "--out", "run", "--resume", "auto"))
    assert output.count("loss = ") == 1  # one process speaks
    _finish(whole)
    records = rundir.read_metrics(tmp_path / "run")
    assert records[: len(before)] == before
    # The same processes, the same order of additions: to the bit.
    assert records == rundir.read_metrics(tmp_path / "whole")
