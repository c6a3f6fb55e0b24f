"""Several processes on one training: the numbers of one process on the same batches, up to rounding."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ltkernels import train
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


# Unequal weights in the two processes' rows, batch normalisation, augmentation and mixed targets; batches of odd sizes. One
# epoch: rounding is then still small against the numbers, and any wrong sum is not.
CONFIGS = {
    "weighted": Config(loss="class_balanced", epochs=1, batch_size=33, threads=1, crop=1, flip=True, accumulate=2),
    "margins": Config(loss="ldam", schedule="drw", schedule_start=0, epochs=1, batch_size=50, threads=1, mix="mixup"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_give_the_numbers_of_one(tmp_path, name):
    config = CONFIGS[name]
    output = _finish(_torchrun(tmp_path, *_flags(config), "--out", "two"))
    assert output.count("loss = ") == 1  # one process speaks
    train.train(config, out=tmp_path / "one")
    one, two = (torch.load(next((tmp_path / n / "checkpoints").iterdir()), weights_only=True) for n in ("one", "two"))
    for key, value in one["state"].items():
        assert torch.allclose(value, two["state"][key], rtol=2e-4, atol=2e-5), key
    for a, b in zip(rundir.read_metrics(tmp_path / "one"), rundir.read_metrics(tmp_path / "two")):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    assert rundir.read_summary(tmp_path / "two")["config"] == rundir.read_summary(tmp_path / "one")["config"]


def test_two_processes_stop_and_resume(tmp_path):
    config = CONFIGS["weighted"].replace(model="mlp", epochs=60, accumulate=1, checkpoint_seconds=0.1)
    whole = _torchrun(tmp_path, *_flags(config), "--out", "whole")
    stopped = _torchrun(tmp_path, *_flags(config), "--out", "run")
    while stopped.poll() is None and not list((tmp_path / "run").glob("state/*.pt")):
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    stopped.wait(60)
    assert rundir.is_unfinished(tmp_path / "run")
    before = rundir.read_metrics(tmp_path / "run")
    assert 0 < len(before) < 60
    _finish(_torchrun(tmp_path, *_flags(config), "--out", "run", "--resume", "auto"))
    _finish(whole)
    records = rundir.read_metrics(tmp_path / "run")
    assert records[: len(before)] == before
    # The same processes, the same order of additions: to the bit.
    assert records == rundir.read_metrics(tmp_path / "whole")
