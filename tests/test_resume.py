"""A run that was stopped, killed or damaged goes on to the same numbers, to the bit; nothing else is ever resumed."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ltkernels import train
from ltkernels.train import checkpoint, rundir, signals
from ltkernels.train.checkpoint import PhaseStore, capture_random, restore_random
from ltkernels.train.config import Config
from ltkernels.train.data import Dataset

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and file locks")

# Everything that has a state: two-part schedule, a sampler that depends on the epoch, augmentation, mixing, pre-training.
BUSY = {
    "loss": "ldam",
    "schedule": "drw",
    "sampler": "progressive",
    "mix": "remix",
    "crop": 1,
    "flip": True,
    "pretrain": "rotation",
    "pretrain_epochs": 2,
    "epochs": 5,
    "stage2": "crt",
    "retrain_epochs": 3,
    "post_hoc": "tau",
    "model": "mlp",
    "threads": 1,
    "checkpoint_seconds": 0.02,
}


def _numbers(value):
    """A summary without its times, and without what may differ between a run and its continuation."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items() if k != "checkpoints" and "seconds" not in k}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


def _same(first, second):
    assert _numbers(rundir.read_summary(first)) == _numbers(rundir.read_summary(second))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    for path in (first / "checkpoints").iterdir():
        one, two = (torch.load(p, weights_only=True)["state"] for p in (path, second / "checkpoints" / path.name))
        assert all(torch.equal(one[key], two[key]) for key in one), path.name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.train(Config(**BUSY), out=out)
    return out


class _Interrupting:
    """A progress callback that asks for a stop after so many epochs, as a signal would."""

    def __init__(self, after):
        self.left = after

    def __call__(self, phase, done, total, record):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("after", [1, 4, 7, 8])
def test_stopped_anywhere_the_run_ends_with_the_same_numbers(whole, tmp_path, after):
    with pytest.raises(signals.Stopped, match="SIGTERM") as stopped:
        train.train(Config(**BUSY), out=tmp_path / "run", progress=_Interrupting(after))
    assert stopped.value.signum == signal.SIGTERM
    assert rundir.is_unfinished(tmp_path / "run")
    train.train(Config(**BUSY), out=tmp_path / "run", resume="auto")
    _same(whole, tmp_path / "run")
    assert not (tmp_path / "run" / "state").exists()


def test_stopped_after_every_epoch_and_in_the_middle_of_epochs(whole, tmp_path, monkeypatch):
    # A stop at every fifth look at the signal, which is after every step: inside epochs, and at their ends.
    looks = iter(range(10**9))

    class _Often(signals.Stop):
        signum = property(lambda self: signal.SIGINT if next(looks) % 5 == 4 else None, lambda self, value: None)

    stops = 0
    monkeypatch.setattr(signals, "Stop", _Often)
    while not (tmp_path / "run" / "summary.json").exists():
        try:
            train.train(Config(**BUSY), out=tmp_path / "run", resume="auto")
        except signals.Stopped:
            stops += 1
    assert stops > 15
    _same(whole, tmp_path / "run")


def test_a_finished_run_is_not_run_again(whole):
    before = (whole / "summary.json").stat().st_mtime_ns
    summary = train.train(Config(**BUSY), out=whole, resume="auto")
    assert summary == rundir.read_summary(whole)
    assert (whole / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"begun with epochs 5 \(now 6\)"):
        train.train(Config(**BUSY).replace(epochs=6), out=whole, resume="auto")
    with pytest.raises(ValueError, match="it is finished: --init .*run with another --out goes on from its model"):
        train.train(Config(**BUSY).replace(epochs=6), out=whole, resume="auto")
    with pytest.raises(ValueError, match="begun by 'ltkernels train', not 'ltkernels run'"):
        train.run(Config(**BUSY), out=whole, resume="auto")


def test_settings_that_only_follow_from_others_are_not_named(tmp_path):
    config = Config(model="mlp", epochs=2, threads=1, checkpoint_seconds=0.0)
    out = _unfinished(tmp_path, after=1, config=config)
    other = Dataset.from_arrays(
        torch.randn(40, 8), torch.arange(40) % 2, torch.randn(4, 8), torch.arange(4) % 2, name="x"
    )
    # Batches, rate and decay of vectors are others than those of digits, and nobody gave them.
    with pytest.raises(ValueError, match=r"begun with data 'digits-lt' \(now 'x'\); --force starts anew$"):
        train.train(config, other, out=out, resume="auto")
    with pytest.raises(ValueError, match=r"begun with lr 0.05 \(now 0.5\); --force"):
        train.train(config.replace(lr=0.5), out=out, resume="auto")


def test_what_was_left_by_a_run_that_died_after_its_summary_goes(whole):
    (whole / "state").mkdir()
    (whole / "state" / "old.00000001.pt").write_bytes(b"a checkpoint")
    train.train(Config(**BUSY), out=whole, resume="auto")
    assert not (whole / "state").exists()


def _unfinished(tmp_path, after=4, config=None, data=None):
    out = tmp_path / "run"
    with pytest.raises(signals.Stopped):
        train.train(config or Config(**BUSY), data, out=out, progress=_Interrupting(after))
    return out


def test_an_unfinished_run_is_neither_overwritten_nor_mixed_up(tmp_path):
    out = _unfinished(tmp_path)
    with pytest.raises(FileExistsError, match="unfinished run; --resume auto continues it"):
        train.train(Config(**BUSY), out=out)
    with pytest.raises(ValueError, match=r"loss 'ldam' \(now 'ce'\)"):
        train.train(Config(**BUSY).replace(loss="ce"), out=out, resume="auto")
    assert rundir.is_unfinished(out)
    train.train(Config(epochs=1, model="mlp"), out=out, force=True)
    assert not rundir.is_unfinished(out)


def test_other_data_is_refused(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator), torch.arange(60) % 3
    first = Dataset.from_arrays(x, y, x, y)
    other = Dataset.from_arrays(x.flip(0), y, x, y)
    config = Config(model="mlp", epochs=4, threads=1)
    out = _unfinished(tmp_path, 2, config, first)
    with pytest.raises(ValueError, match="other data"):
        train.train(config, other, out=out, resume="auto")
    train.train(config, first, out=out, resume="auto")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, tmp_path, damage):
    out = _unfinished(tmp_path, after=4)
    newest = max((p for p in (out / "state").iterdir() if p.name.startswith("train-")), key=lambda p: p.name)
    assert len([p for p in (out / "state").iterdir() if p.name.startswith("train-")]) == 2
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
    newest.write_bytes(bytes(content) if damage == "flipped" else bytes(content[: 0 if damage == "empty" else -100]))
    train.train(Config(**BUSY), out=out, resume="auto")
    _same(whole, out)


def test_all_checkpoints_damaged_starts_the_phase_anew(whole, tmp_path):
    out = _unfinished(tmp_path, after=4)
    for path in (out / "state").iterdir():
        path.write_bytes(b"junk")
    train.train(Config(**BUSY), out=out, resume="auto")
    _same(whole, out)


def test_a_checkpoint_is_plain_data(tmp_path):
    store = PhaseStore(tmp_path / "state", "train/a b:c", "print", 0.0)
    for step in range(4):
        store.save({"step": step, "random": capture_random(torch.device("cpu"))})
    files = sorted((tmp_path / "state").iterdir())
    assert len(files) == 2
    assert torch.load(files[-1], weights_only=True)["state"]["step"] == 3
    assert store.load()["step"] == 3
    assert PhaseStore(tmp_path / "state", "train/a b-c", "print", 0.0).load() is None
    with pytest.raises(ValueError, match="other data or settings"):
        PhaseStore(tmp_path / "state", "train/a b:c", "other", 0.0).load()


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    out = _unfinished(tmp_path)
    monkeypatch.setattr(checkpoint, "FORMAT", 4)
    with pytest.raises(
        ValueError, match=r"another version of ltkernels wrote this checkpoint \(format 3, this one reads 4\)"
    ):
        train.train(Config(**BUSY), out=out, resume="auto")
    assert rundir.is_unfinished(out)


def test_the_format_number_follows_the_state(tmp_path):
    """Keys that come or go need a new `FORMAT`: a run of the old one would end in a KeyError."""
    out = _unfinished(tmp_path)
    state = torch.load(next((out / "state").iterdir()), weights_only=True)["state"]
    assert checkpoint.FORMAT == 3
    assert set(state) == {
        "model", "optimizer", "scaler", "criterion", "schedules", "random", "order", "batches", "epoch", "step", "total", "history",
        "confusion", "seconds", "evaluation_seconds", "scheduler", "average", "best",
    }  # fmt: skip


def test_random_states_come_back():
    state = capture_random(torch.device("cpu"))
    draws = [(torch.rand(3).tolist(), np.random.rand(), random.random(), random.gauss(0, 1)) for _ in range(2)]  # noqa: NPY002
    restore_random(state, torch.device("cpu"))
    assert draws[0] == (torch.rand(3).tolist(), np.random.rand(), random.random(), random.gauss(0, 1))  # noqa: NPY002


class _Noisy(torch.nn.Module):
    """A model that draws from every global random state."""

    def __init__(self, input_shape):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Dropout(0.3))

    def forward(self, x):
        noise = random.random() + np.random.rand() if self.training else 0.0  # noqa: NPY002
        return torch.relu(self.layers(x) + 0.1 * noise)


def test_models_that_use_the_global_random_states_resume_exactly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "noisy_model", sys.modules[__name__])
    config = Config(model="noisy_model:_Noisy", epochs=4, threads=1, checkpoint_seconds=0.0)
    train.train(config, out=tmp_path / "whole")
    out = _unfinished(tmp_path, 2, config)
    random.seed(99)
    torch.manual_seed(99)
    train.train(config, out=out, resume="auto")
    _same(tmp_path / "whole", out)


@pytest.mark.parametrize("after", [2, 7, 12])
def test_the_whole_pipeline_resumes(tmp_path, after):
    config = Config(model="mlp", epochs=3, retrain_epochs=3, random_repeats=1, threads=1, stage2="lws")
    train.run(config, out=tmp_path / "whole")
    out = tmp_path / "run"
    with pytest.raises(signals.Stopped):
        train.run(config, out=out, progress=_Interrupting(after))
    # The time of the first process counts as well.
    resumed = train.run(config, out=out, resume="auto")
    assert resumed["seconds"] >= sum(v["seconds"] for v in resumed["variants"])
    _same(tmp_path / "whole", out)


def test_several_seeds_stop_and_resume(tmp_path):
    config = Config(model="mlp", epochs=3, threads=1)
    whole = train.run_seeds("train", config, [3, 4], out=tmp_path / "whole")
    with pytest.raises(signals.Stopped):
        train.run_seeds("train", config, [3, 4], out=tmp_path / "run", progress=_Interrupting(4))
    assert rundir.is_unfinished(tmp_path / "run")
    resumed = train.run_seeds("train", config, [3, 4], out=tmp_path / "run", resume="auto")
    assert _numbers(resumed) == _numbers(whole)


def _command(out, **changes):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**BUSY, **changes}.items() if k != "flip"]
    return [sys.executable, "-m", "ltkernels", "train", *flags, "--flip", "--out", str(out)]


def test_killed_at_random_moments_the_run_ends_with_the_same_numbers(whole, tmp_path):
    # A server that has imported everything forks the processes: each starts at once, so that many can be killed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ltkernels.train", "torch._dynamo", "sklearn.datasets"])
    out, kills, lengths = tmp_path / "run", 0, random.Random(5)
    while True:
        life = context.Process(target=train.train, args=(Config(**BUSY),), kwargs={"out": out, "resume": "auto"})
        life.start()
        # Short lives, counted from when the folder is open; later ones are let finish.
        while life.exitcode is None and not (out / ".lock").exists():
            time.sleep(0.002)
        life.join(lengths.uniform(0.0, 0.1) if kills < 8 else 300)
        if life.exitcode is None:
            life.kill()
            life.join()
        if life.exitcode == 0:
            break
        assert life.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    _same(whole, out)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_line_an_exit_code_and_a_state(tmp_path, signum, code):
    out = tmp_path / "run"
    command = _command(out, epochs=100000)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("state/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    said = [line for line in errors.splitlines() if not line.startswith(("train/", "pretrain/"))]  # a line an epoch
    assert said == [f"ltkernels: stopped by {signum.name}; --resume auto continues it"]
    assert rundir.is_unfinished(out)
    assert not (out / ".lock").exists()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # How far it came when the signal arrived, nobody knows: the epochs of each phase it entered, from 1, none twice.
    for phase in {record["phase"] for record in records}:
        epochs = [record["epoch"] for record in records if record["phase"] == phase]
        assert epochs == list(range(1, len(epochs) + 1)), phase


def test_two_runs_on_one_folder_are_refused(tmp_path):
    with rundir.open_run(tmp_path / "out", force=False, resume=False):
        for resume in ("never", "auto"):
            with pytest.raises(FileExistsError, match="another run is writing into it"):
                train.train(Config(model="mlp", epochs=1), out=tmp_path / "out", resume=resume)
        (tmp_path / "out" / "summary.json").write_text("{}")


def test_a_full_disk_is_one_line_and_leaves_the_state(tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "ltkernels", "train", "--model", "mlp", "--out", "out", "--quiet"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=small_files)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert "could not be written: File too large" in result.stderr
    assert rundir.is_unfinished(tmp_path / "out")
    assert not [p for p in (tmp_path / "out").rglob("*") if "partial" in p.name]
    train.train(Config(model="mlp"), out=tmp_path / "out", resume="auto")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr("pathlib.Path.mkdir", refused)
    with pytest.raises(PermissionError, match="Permission denied"):
        train.train(Config(model="mlp", epochs=1), out=tmp_path / "out")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_force_leaves_other_peoples_files(tmp_path):
    out = tmp_path / "out"
    train.train(Config(model="mlp", epochs=1), out=out)
    (out / "plot.png").write_text("mine")
    with pytest.raises(ValueError, match=r"plot\.png, not written by a run"):
        train.train(Config(model="mlp", epochs=1), out=out, force=True)
    (out / "plot.png").unlink()
    (out / "checkpoints" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"checkpoints/notes\.txt, not written by a run"):
        train.train(Config(model="mlp", epochs=1), out=out, force=True)
    assert (out / "summary.json").exists()
