"""The FDG experiment: the arms are what they are called, a stopped run goes on, and the verdicts follow from the table."""

import csv
import json
from statistics import mean, stdev

import pytest
import torch

from ltkernels.cli import main
from ltkernels.train import experiment
from ltkernels.train.config import Config
from ltkernels.train.data import Dataset
from ltkernels.train.experiment import _log_loss, fdg_experiment
from ltkernels.train.experiment_report import findings, interval, sentences

QUICK = Config(epochs=3, retrain_epochs=3, threads=1)
ASKED = {"methods": ["fdc", "cmo"], "levels": 3, "sets": 3, "processes": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("experiment") / "run"
    return fdg_experiment(QUICK.replace(data="fashion-mnist-lt"), out=out, **ASKED), out


def test_the_folder_holds_table_figure_and_verdicts(finished):
    summary, out = finished
    rows = json.loads((out / "table.json").read_text())
    # 3 levels, none, random, full for each of 2 methods and 3 sets.
    assert len(rows) == 2 * 3 * 6
    with open(out / "table.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(row["balanced_accuracy"]) for row in table] == [row["balanced_accuracy"] for row in rows]
    assert (out / "scatter.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["config"]["data"] == "digits-lt"  # what ran, not what the settings held
    assert len(summary["verdicts"]) == 2 * 4 + 1
    assert any("against random samples" in line and "95 % interval" in line for line in summary["verdicts"])


def test_levels_are_spaced_uniformly_and_arms_share_their_pool(finished):
    _, out = finished
    rows = json.loads((out / "table.json").read_text())
    for method in ("fdc", "cmo"):
        for index in range(3):
            own = {(r["arm"], r["level"]): r for r in rows if (r["method"], r["set"]) == (method, index)}
            low, middle, high = (own["fdg", level]["fdg_tail"] for level in range(3))
            assert low < own["random", None]["fdg_tail"] < high
            assert middle == pytest.approx((low + high) / 2, abs=0.06 * (high - low))
            assert own["none", None]["fdg_tail"] is None
    # Without augmentation the method does not matter, but the set does: it has its own seed.
    none = [r["balanced_accuracy"] for r in rows if r["arm"] == "none"]
    assert len(set(none)) > 1


def test_arms_add_what_they_say(finished):
    _, out = finished
    config = QUICK.replace(loss="ce", post_hoc="tau")
    context = experiment._context(str(out), config)
    assert context.tail == [6, 7, 8, 9]
    made = experiment._pool(context, "smote", 9, 3, 11)
    need = max(context.job.class_counts) - context.job.class_counts[9]
    assert [len(features) for features, _ in made["fdg"]] == [need] * 3
    assert len(made["random"][0]) == need
    assert len(made["full"][0]) >= 4 * need
    pool = {tuple(row) for row in made["full"][0].tolist()}
    for features, _ in (*made["fdg"], made["random"]):
        assert len(features.unique(dim=0)) == len(features)
        assert {tuple(row) for row in features.tolist()} <= pool


def test_a_stopped_experiment_goes_on_and_processes_change_nothing(finished, tmp_path, monkeypatch):
    _, out = finished
    copy = tmp_path / "run"
    calls = []
    real = experiment._work

    def stops(item):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(item)
        real(item)

    monkeypatch.setattr(experiment, "_work", stops)
    with pytest.raises(KeyboardInterrupt):
        fdg_experiment(QUICK, out=copy, **ASKED)
    monkeypatch.undo()
    done = {path.name: path.stat().st_mtime_ns for path in (copy / "items").iterdir()}
    assert len(done) == 3
    with pytest.raises(FileExistsError, match="unfinished run; --resume auto"):
        fdg_experiment(QUICK, out=copy, **ASKED)
    with pytest.raises(ValueError, match="other settings"):
        fdg_experiment(QUICK.replace(epochs=2), out=copy, resume="auto", **ASKED)
    fdg_experiment(QUICK, out=copy, resume="auto", **{**ASKED, "processes": 2})
    assert (copy / "table.csv").read_bytes() == (out / "table.csv").read_bytes()
    assert all((copy / "items" / name).stat().st_mtime_ns == when for name, when in done.items())


def _row(arm, level, index, accuracy, log_loss=0.5, fdg=0.1):
    keys = (
        "data",
        "method",
        "set",
        "arm",
        "level",
        "fdg_tail",
        "balanced_accuracy",
        "tail_accuracy",
        "held_out_accuracy",
        "held_out_log_loss",
    )
    return dict(zip(keys, ("d", "m", index, arm, level, fdg, accuracy, accuracy, 0.9, log_loss)))


def test_verdicts_follow_from_the_table():
    rows = []
    for index in range(4):
        rows += [
            _row("fdg", 0, index, 0.80 + 0.01 * index, log_loss=0.5, fdg=0.1),
            # Best on the test set, but the held-out samples chose the other level: it is not what is reported.
            _row("fdg", 1, index, 0.95, log_loss=0.6, fdg=0.9),
            _row("random", None, index, 0.75 + 0.012 * index),
            _row("full", None, index, 0.815 - 0.03 * (-1) ** index),
            _row("none", None, index, 0.90, fdg=None),
        ]
    (result,) = findings(rows)
    assert (result["chosen_level"], result["best_level_on_test"]) == (0, 1)
    verdicts = {arm: d["verdict"] for arm, d in result["differences"].items()}
    assert verdicts == {"random": "better", "full": "no difference shown", "none": "worse"}
    # Paired by set: 5.0, 4.8, 4.6, 4.4 points; t of 3 degrees of freedom is 3.182.
    differences = [0.05, 0.048, 0.046, 0.044]
    assert result["differences"]["random"]["mean"] == pytest.approx(mean(differences))
    assert result["differences"]["random"]["half"] == pytest.approx(3.1824 * stdev(differences) / 2, rel=1e-4)
    text = sentences(result)
    assert "level 1 of 2" in text[0]
    assert "against random samples +4.7 points" in text[1]
    assert text[1].endswith("FDG-selected is better.")
    assert text[3].endswith("FDG-selected is worse.")


def test_the_log_loss_of_held_out_samples_weighs_classes_alike():
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 2])
    each = torch.logsumexp(scores.double(), 1) - scores.double()[torch.arange(4), labels]
    assert _log_loss(scores, labels) == pytest.approx(float((each[:3].mean() + each[3]) / 2), rel=1e-12)


def test_interval_by_hand():
    assert interval([1.0, 2.0, 3.0]) == {"mean": 2.0, "half": pytest.approx(4.3027 / 3**0.5, rel=1e-4)}


def test_bad_requests_are_named_before_any_work(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for changes, words in (
        ({"methods": ["fdc", "gan"]}, "methods must be different ones of remix, .*, got fdc,gan"),
        ({"methods": ["fdc", "fdc"]}, "methods must be different"),
        ({"levels": 1}, "levels must be at least 2, got 1"),
        ({"sets": 2}, "sets must be at least 3, got 2"),
        ({"data": ["digits"]}, "unknown data set 'digits'"),
    ):
        with pytest.raises(ValueError, match=words):
            fdg_experiment(QUICK, out=out, **{**ASKED, **changes})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="not spread over processes by torchrun"):
        fdg_experiment(QUICK, out=out, **ASKED)
    monkeypatch.undo()
    from ltkernels.train.data import _LOADERS

    x, y = torch.randn(96, 5), torch.tensor([0] * 60 + [1] * 30 + [2] * 4 + [3] * 2)
    single = Dataset.from_arrays(x, y, x, y)
    monkeypatch.setattr("ltkernels.train.data._LOADERS", {**_LOADERS, "vectors": lambda request: single})
    # Of two samples, one is held out.
    with pytest.raises(ValueError, match="class 3 has one sample to train on"):
        fdg_experiment(QUICK.replace(model="mlp"), data=["vectors"], out=out, **ASKED)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_verdicts(tmp_path, capsys):
    command = ["experiment", "fdg", "--methods", "smote", "--levels", "2", "--sets", "3", "--processes", "1"]
    command += ["--epochs", "1", "--retrain-epochs", "1", "--model", "mlp", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "digits-lt, smote: FDG-selected is level" in printed
    assert "Intervals cover the sets" in printed
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
