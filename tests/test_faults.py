"""What the reliability campaign found the trainer to lack: words for a full disk, no remains of killed writers, one run a folder."""

import errno
import logging
import multiprocessing
import os

import numpy as np
import pytest

from ltkernels import cli, train
from ltkernels.experiments import fdg as experiment
from ltkernels.selection._checkpoint import drop_damaged
from ltkernels.train import rundir
from ltkernels.train.config import Config
from ltkernels.train.logs import Journal

pytestmark = pytest.mark.skipif(os.name != "posix", reason="file locks")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_names_the_log(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics\.jsonl could not be written: No space left") as raised:
        Journal(folder=tmp_path).epoch("train/ce", 1, 1, {"phase": "train/ce", "epoch": 1})
    assert raised.value.errno == errno.ENOSPC


def test_a_failed_write_of_arrays_names_the_file(tmp_path, monkeypatch):
    from ltkernels._npz import write_npz

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"x\.npz could not be written: No space left"):
        write_npz(tmp_path / "x.npz", a=np.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_leave_goes_when_the_run_goes_on(tmp_path):
    out = tmp_path / "run"
    left = [
        out / "state" / ".a.00000001.0.pt.partial-1",
        out / ".summary.json.partial-7",
        out / "checkpoints" / ".b.pt.partial-3",
    ]
    for path in (*left, out / "config.toml", out / "state" / "whole.pt"):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"begun")
    with rundir.open_run(out, force=False, resume=True) as resumed:
        assert resumed
        assert not [path for path in left if path.exists()]
        assert (out / "state" / "whole.pt").exists()


def test_killed_before_it_had_begun_a_run_can_go_on(tmp_path):
    (tmp_path / ".config.toml.partial-12").write_bytes(b"half")
    train.train(Config(model="mlp", epochs=1, threads=1), out=tmp_path, resume="auto")
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def features(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 5))
    np.savez(tmp_path / "x.npz", features=x, labels=np.repeat(np.arange(2), (40, 20)))
    return tmp_path / "x.npz"


def test_two_selections_on_one_folder_are_refused(features, tmp_path):
    out, config = tmp_path / "out", Config(head_ratio=0.6, random_repeats=1)
    second = []

    def on_progress(*_):
        with pytest.raises(FileExistsError, match="another run is writing into it"):
            train.select_features(features, config, out=out)
        second.append(1)

    train.select_features(features, config, out=out, n_sets=3, progress=on_progress)
    assert second
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x.npz"]


def test_a_damaged_checkpoint_of_a_selection_is_selected_anew(features, tmp_path, caplog):
    config, seen = Config(head_ratio=0.6, random_repeats=1), []

    def stop(*_):
        seen.extend(tmp_path.glob(".run.select-*/*.npz"))
        if seen:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.select_features(features, config, out=tmp_path / "run", n_sets=3, progress=stop)
    content = bytearray(seen[0].read_bytes())
    content[len(content) // 2] ^= 1
    seen[0].write_bytes(content)
    with caplog.at_level(logging.WARNING):
        train.select_features(features, config, out=tmp_path / "run", n_sets=3)
    assert f"{seen[0]} is damaged" in caplog.text
    train.select_features(features, config, out=tmp_path / "whole", n_sets=3)
    one, two = (np.load(tmp_path / name / "selection.npz") for name in ("run", "whole"))
    assert all(np.array_equal(one[key], two[key]) for key in two.files)


def test_whole_checkpoints_of_a_selection_stay(tmp_path):
    np.savez(tmp_path / "a.npz", key="k", picked=np.arange(3))
    (tmp_path / "b.npz").write_bytes(b"junk")
    drop_damaged(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


class _Dead:
    @staticmethod
    def is_alive():
        return False


def test_the_worker_of_a_killed_experiment_writes_nothing(tmp_path, monkeypatch):
    out = tmp_path / "run"
    protocol = experiment.Protocol(levels=2, sets=3)
    options = {"data": ["digits-lt"], "methods": ["smote"], "protocol": protocol, "processes": 1, "out": out}
    config = Config(model="mlp", epochs=1, retrain_epochs=1, threads=1, head_ratio=0.97)
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing, "parent_process", lambda: _Dead)
        with pytest.raises(OSError, match="smote"):
            experiment.fdg_experiment(config, **options)
    assert list((out / "items").iterdir()) == []


def test_what_a_killed_selection_leaves_is_no_result(tmp_path):
    (tmp_path / "selection.npz").write_bytes(b"half")
    with rundir.open_run(tmp_path, force=False, resume=False):
        assert not (tmp_path / "selection.npz").exists()
        (tmp_path / "selection.npz").write_bytes(b"whole")
        (tmp_path / "selection.json").write_text("{}")
    with pytest.raises(FileExistsError, match="--force replaces"):
        rundir.check_free(tmp_path, force=False)


def test_memory_that_is_not_there_is_one_line(monkeypatch, capsys):
    def job(_):
        raise MemoryError

    monkeypatch.setattr(cli, "_doctor", job)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "ltkernels: error: out of memory\n"
