"""Folds and validation sets hold out what they say, and what cannot be trained is refused before the first step, nothing trained lost."""

import sys

import numpy as np
import pytest
import torch
from small_data import SIZES, npz, one_line, vectors

from ltkernels import train
from ltkernels.cli import main
from ltkernels.train import data
from ltkernels.train.data import Dataset

# Folds


def test_folds_test_every_sample_once_and_every_class_in_each():
    x, y = vectors((20, 7, 2, 1))
    names = [f"{i}" for i in range(30)]
    whole = Dataset.from_arrays(x, y, x, y, class_names=["a", "b", "c", "d"], train_files=tuple(names))
    parts = list(data.k_fold(whole, 5, seed=1))
    assert len(parts) == 5
    assert parts[0].notes[-2:] == (
        "left out, with one sample: d",
        "tested more than once, with fewer samples than 5 folds: c",
    )
    tested = sorted(int(name) for part in parts for name in part.test_files)
    assert sorted(set(tested)) == list(range(29))
    assert [tested.count(i) for i in range(27)] == [1] * 27
    for part in parts:
        assert part.class_names == ("a", "b", "c")
        assert not set(part.train_files) & set(part.test_files)
        assert torch.bincount(part.y_test).min() >= 1
        assert part.class_counts[2] == 1
        # By what it trains on, and back to the raw samples.
        rows = [int(name) for name in part.train_files]
        expected = (x[rows] - x[rows].mean(0)) / x[rows].std(0, ddof=1)
        assert np.allclose(part.x_train.numpy(), expected, atol=1e-5)
        held = [int(name) for name in part.test_files]
        assert np.allclose(part.x_test.double().numpy() * part.std.numpy() + part.mean.numpy(), x[held], atol=1e-5)
    for folds, message in ((1, "at least 2"), (21, "has 20 samples"), (True, "got True")):
        with pytest.raises(ValueError, match=message):
            next(data.k_fold(whole, folds))


def test_cross_validation_leaves_the_test_set_alone(tmp_path):
    x, y = vectors((40, 20, 10))
    whole = Dataset.from_arrays(x, y, x[:0:-1][:3], [0, 1, 2])
    config = train.Config(epochs=3, threads=1)
    summary = train.cross_validate(config, whole, folds=3, out=tmp_path / "cv")
    assert (summary["folds"], len(summary["runs"])) == (3, 3)
    confusion = np.array(summary["variants"][0]["confusion"])
    assert confusion.sum(1).tolist() == [40, 20, 10]
    accuracies = [run["variants"][0]["balanced_accuracy"] for run in summary["runs"]]
    assert summary["balanced_accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["std"]["balanced_accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    assert sum(summary["variants"][0]["reliability"]["samples"]) == 70
    again = train.cross_validate(config, whole, folds=3, out=tmp_path / "cv", resume="auto")
    assert again["runs"] == summary["runs"]
    assert train.load(tmp_path / "cv" / "fold-2").class_names == ("0", "1", "2")


# Validation


def test_with_a_validation_set_the_test_set_is_read_once(tmp_path):
    name = npz(tmp_path / "d.npz", (40, 20, 1))
    config = train.Config(data=name, epochs=3, threads=1, val_split=0.25, loss="ce")
    said = []
    summary = train.train(config, out=tmp_path / "run", on_notes=said.extend)
    assert (
        said[-2:]
        == summary["notes"][-2:]
        == [
            "validated on 15 of 61 training samples, 0.25 of every class, at least one of each",
            "not among them, with one sample: 2",
        ]
    )
    from ltkernels.train.rundir import read_metrics

    records = read_metrics(tmp_path / "run")
    assert all("val_balanced_accuracy" in r and "test_balanced_accuracy" not in r for r in records)
    assert summary["best_balanced_accuracy"] is None
    # 10 and 5 are held out; the single sample stays in training.
    assert train.load(tmp_path / "run").class_counts == [30, 15, 1]
    # The numbers of the last epoch do not depend on what is looked at along the way.
    x, y = vectors((40, 20, 1))
    data_set = data.load(name)
    val = Dataset.from_arrays(x, y, data_set.x_test, data_set.y_test, x_val=x[:5], y_val=y[:5])
    with_val, without = (
        train.train(train.Config(epochs=2, threads=1, loss="ce"), d)
        for d in (val, Dataset.from_arrays(x, y, data_set.x_test, data_set.y_test))
    )
    assert with_val["variants"][0]["confusion"] == without["variants"][0]["confusion"]
    assert with_val["best_balanced_accuracy"] is None
    assert without["best_balanced_accuracy"] is not None


# Refusals come before the first step


@pytest.mark.parametrize(
    ("sizes", "arguments", "words"),
    [
        ((30, 10), ("train", "--warmup", "99"), "warmup 99 is not below the number of epochs, 80"),
        ((30, 1), ("train", "--relative"), "relative"),
        ((30, 10), ("train", "--crop", "2"), "crop and flip need images"),
    ],
)
def test_counts_and_settings_are_refused_before_training(tmp_path, capsys, monkeypatch, sizes, arguments, words):
    from ltkernels.train import engine

    monkeypatch.setattr(engine.Training, "fit", lambda *_: pytest.fail("it trained"))
    name = npz(tmp_path / "d.npz", sizes)
    line = one_line(capsys, *arguments, "--data", name, "--epochs", 80, "--out", tmp_path / "run")
    assert words in line
    assert not (tmp_path / "run").exists()


def test_a_log_without_its_package_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in one_line(
        capsys, "train", "--log", "tensorboard", "--epochs", 1, "--out", tmp_path / "r"
    )
    assert not (tmp_path / "r").exists()
    (tmp_path / "file").write_text("x")
    assert "file is a file, not a folder" in one_line(capsys, "train", "--epochs", 1, "--out", tmp_path / "file" / "x")


@pytest.mark.parametrize("command", [("audit",), ("statistics",), ("statistics", "--merge")])
def test_a_file_that_cannot_be_there_is_named_before_the_work(tmp_path, capsys, command):
    (tmp_path / "file").write_text("x")
    line = one_line(capsys, *command, tmp_path / "absent.npz", "--out", tmp_path / "file" / "x")
    assert f"--out {tmp_path / 'file' / 'x'}: {tmp_path / 'file'} is a file, not a folder" in line


@pytest.mark.parametrize(
    ("sizes", "flags", "words"),
    [
        ((60, 20, 1), ["--head-ratio", "0.5"], "not completed, with one sample: 2: its diversity gain is undefined"),
        ((60, 20), ["--head-ratio", "1.0"], "no class was completed: none beyond the head (head_ratio 1)"),
        ((30, 30), ["--head-ratio", "0.4"], "no class was completed: none beyond the head (head_ratio 0.4)"),
    ],
)
def test_what_a_run_leaves_out_is_said_on_the_screen(tmp_path, capsys, sizes, flags, words):
    name = npz(tmp_path / "d.npz", sizes)
    shared = [
        "--model",
        "mlp",
        "--epochs",
        "1",
        "--threads",
        "1",
        "--random-repeats",
        "1",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main(["run", "--data", name, "--retrain-epochs", "1", *shared, *flags]) == 0
    assert capsys.readouterr().out.count(f"note: {words}") == 1


def test_a_selection_without_a_class_to_complete_says_so(tmp_path, capsys):
    x, y = vectors((20, 20))
    np.savez(tmp_path / "f.npz", features=x, labels=y)
    assert main(["select", str(tmp_path / "f.npz"), "--head-ratio", "0.4", "--out", str(tmp_path / "s")]) == 0
    assert "note: no class is completed: none beyond the head (head_ratio 0.4)" in capsys.readouterr().out


def test_a_step_that_never_comes_is_said(tmp_path, capsys):
    flags = [
        "--model",
        "mlp",
        "--epochs",
        "2",
        "--threads",
        "1",
        "--lr-schedule",
        "step:1=0.1,160=0.01",
        "--out",
        str(tmp_path),
    ]
    assert main(["train", *flags]) == 0
    words = "note: lr_schedule: epoch 160 of step:1=0.1,160=0.01 will not come: the run has 2"
    assert capsys.readouterr().out.count(words) == 1


def test_a_model_that_may_end_in_logits_is_asked_about(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def logits(input_shape): return nn.Linear(input_shape[0], 3)\n"
        "def features(input_shape): return nn.Linear(input_shape[0], 8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = npz(tmp_path / "d.npz", (60, 20, 8))
    for model, times in (("logits", 1), ("features", 0)):
        flags = ["--model", f"own_models:{model}", "--epochs", "1", "--threads", "1", "--out", str(tmp_path / model)]
        assert main(["train", "--data", name, *flags]) == 0
        words = f"note: own_models:{model} gives as many features as there are classes, 3: if they are logits"
        assert capsys.readouterr().out.count(words) == times


def test_a_class_too_small_for_a_profile_is_named(tmp_path, capsys):
    name = npz(tmp_path / "d.npz", (60, 20, 1))
    line = one_line(capsys, "train", "--data", name, "--relative", "--epochs", 1, "--out", tmp_path / "r")
    assert "class 2 has 1 sample: a profile begins at the smallest class, which needs at least 2" in line
    assert "imbalance" not in line


def test_a_class_of_one_sample_is_left_out_of_the_selection(tmp_path):
    name = npz(tmp_path / "d.npz", (60, 20, 8, 1))
    summary = train.run(
        train.Config(data=name, epochs=2, retrain_epochs=1, random_repeats=1, head_ratio=0.5, threads=1)
    )
    assert [entry["label"] for entry in summary["tail"]["classes"]] == [1, 2]
    assert any("with one sample: 3" in note for note in summary["notes"])


@pytest.mark.parametrize(("sizes", "ratio"), [((60,), 0.9), ((40, 20), 1.0), ((40, 1), 0.9)])
def test_without_a_tail_class_to_complete_a_run_ends_well(tmp_path, sizes, ratio):
    name = npz(tmp_path / "d.npz", sizes)
    config = train.Config(data=name, epochs=1, retrain_epochs=1, random_repeats=3, head_ratio=ratio, threads=1)
    summary = train.run(config, out=tmp_path / "run")
    assert summary["tail"]["classes"] == []
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_was_trained_stays_when_a_later_phase_fails(tmp_path, capsys):
    name = npz(tmp_path / "d.npz")
    out = tmp_path / "run"
    line = one_line(
        capsys,
        "run",
        "--data",
        name,
        "--epochs",
        2,
        "--quiet",
        "--retrain-lr",
        1e30,
        "--head-ratio",
        0.5,
        "--random-repeats",
        1,
        "--out",
        out,
    )
    assert f"what was trained is kept: {out / 'checkpoints'}, ce.pt, logit_adjusted.pt" in line
    for variant in ("ce", "logit_adjusted"):
        assert train.load(out / "checkpoints" / f"{variant}.pt").class_counts == list(SIZES)
    # A training that failed by itself leaves nothing, as before.
    one_line(capsys, "train", "--data", name, "--epochs", 2, "--lr", 1e30, "--quiet", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
