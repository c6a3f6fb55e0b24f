"""The FDG experiment: the arms are what they are called, a stopped run goes on, and the verdicts follow from the table."""

import csv
import json
import subprocess
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

import ltkernels
from ltkernels._files import commit
from ltkernels.cli import main
from ltkernels.experiments import fdg as experiment
from ltkernels.experiments.arms import RANDOM, Judge, arm_rows, make_arms
from ltkernels.experiments.fdg import Protocol, fdg_experiment
from ltkernels.experiments.findings import findings, interval, sentences
from ltkernels.selection._arms import calibrated, choose_rows, complete_class
from ltkernels.train.config import Config
from ltkernels.train.data import Dataset

QUICK = Config(model="mlp", epochs=2, threads=1, pool_factor=3.0)
PROTOCOL = Protocol(
    levels=3, sets=3, networks=2, added=40, shares=(0.5,), arms=("mean", "match", "items", "clusters-max")
)
ASKED = {"methods": ["cmo", "fdc"], "protocol": PROTOCOL, "processes": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("experiment") / "run"
    return fdg_experiment(QUICK.replace(data="fashion-mnist-lt"), out=out, **ASKED), out


def test_the_folder_holds_table_figure_and_verdicts(finished):
    summary, out = finished
    rows = json.loads((out / "table.json").read_text())
    # No augmentation once, three random draws, four arms, three levels and unseen real samples, for each of 2 methods and
    # 3 sets.
    assert len(rows) == 2 * 3 * (1 + RANDOM + 4 + 3 + 1)
    with open(out / "table.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(row["balanced_accuracy"]) for row in table] == [row["balanced_accuracy"] for row in rows]
    assert (out / "scatter.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["environment"]["commit"] == commit(Path(ltkernels.__file__).parent.parent)
    assert summary["config"]["data"] == "digits-lt"  # what ran, not what the settings held
    assert len(summary["verdicts"]) == 2 * 6 + 1
    assert any("against random samples" in line and "offset" in line for line in summary["verdicts"])


def test_results_name_the_commit_that_made_them(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    assert commit(tmp_path) is None
    git("init")
    assert commit(tmp_path) is None  # nothing committed yet
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    made = commit(tmp_path)
    assert set(made or "?") <= set("0123456789abcdef")
    assert commit(tmp_path / "package") is None  # an installed package within somebody's repository
    (tmp_path / "package" / "file").write_text("2")
    assert commit(tmp_path) == made + "-dirty"


def test_arms_share_pool_size_and_network(finished):
    _, out = finished
    rows = json.loads((out / "table.json").read_text())
    for method in ("cmo", "fdc"):
        for index in range(3):
            own = {r["arm"]: r for r in rows if (r["method"], r["set"]) == (method, index)}
            low, middle, high = (own[f"level-{i}"]["fdg_tail"] for i in range(3))
            assert low < middle < high
            assert own["mean"]["offset_tail"] < own["random-0"]["offset_tail"]
            assert own["match"]["fdg_tail"] <= own["mean"]["fdg_tail"] + 0.05
            assert own["none"]["fdg_tail"] is None
    # Sets 0 and 2 have the first network, set 1 the second: without augmentation there is nothing else.
    none = {r["set"]: r["balanced_accuracy"] for r in rows if r["arm"] == "none"}
    assert none[0] == none[2] != none[1]


def test_in_image_space_every_arm_trains_a_network(tmp_path):
    protocol = Protocol(levels=0, sets=3, networks=2, added=20, arms=("mean",), space="image")
    asked = {"methods": ["cmo", "remix"], "protocol": protocol, "processes": 1, "out": tmp_path / "run"}
    summary = fdg_experiment(QUICK.replace(epochs=1), **asked)
    rows = json.loads((tmp_path / "run" / "table.json").read_text())
    for index in range(3):
        own = {m: {r["arm"]: r for r in rows if (r["method"], r["set"]) == (m, index)} for m in asked["methods"]}
        for arms in own.values():
            assert list(arms) == ["none", "random-0", "random-1", "mean", "real"]
            assert arms["mean"]["offset_tail"] < arms["random-0"]["offset_tail"]
            assert all(r["share"] is None for r in arms.values())
        # What no method changes is the same for both.
        for arm in ("none", "real"):
            assert own["cmo"][arm]["balanced_accuracy"] == own["remix"][arm]["balanced_accuracy"]
    assert {r["arm"] for r in rows} == {*summary["results"][0]["arms"], "none", "random-0", "random-1"} - {"random"}
    with pytest.raises(ValueError, match="space image is for methods remix, cmo, got cmo,fdc"):
        fdg_experiment(QUICK, **{**asked, "methods": ["cmo", "fdc"], "out": tmp_path / "other"})


def test_run_select_and_experiment_choose_the_same_rows():
    g = torch.Generator().manual_seed(0)
    z, pool = torch.randn(30, 8, generator=g), 1.5 * torch.randn(300, 8, generator=g) + 0.3
    heads = {0: torch.randn(200, 8, generator=g)}
    target = calibrated(heads, {}, 30, 60, 4)
    for mode in ("match", "mean", "random"):
        rows = choose_rows(z, pool, 60, mode, target=target, seed=4).indices
        entry = complete_class(7, z, pool, 60, mode=mode, target=target, seed=4, n_random=1)
        assert torch.equal(entry.pool[entry.rows].float(), pool[rows])
        name = "random-0" if mode == "random" else mode
        assert torch.equal(arm_rows(name, z, pool, 60, target, 4, 10), rows)
    # The greedy arm of the experiment is that of run and select, too.
    entry = complete_class(7, z, pool, 60, mode="max", seed=4, n_random=1)
    ours = arm_rows("clusters-max", z, pool, 60, target, 4, 10)
    assert torch.equal(entry.pool[entry.rows].float(), pool[ours])


def test_arms_are_different_rows_of_the_pool():
    g = torch.Generator().manual_seed(1)
    z, pool = torch.randn(30, 8, generator=g), torch.randn(200, 8, generator=g) + 0.2
    arms = make_arms({3: z}, {3: pool}, {3: None}, {3: 50}, levels=2, seed=1, subset_size=10)
    # Without a target the arms that need one are not there.
    names = {
        "mean",
        "match",
        "clusters-max",
        "clusters-min",
        "level-0",
        "level-1",
        *(f"random-{i}" for i in range(RANDOM)),
    }
    assert set(arms) == names
    assert all(len(arm.rows[3].unique()) == 50 for arm in arms.values())
    assert arms["clusters-min"].fdg[0] < arms["random-0"].fdg[0] < arms["clusters-max"].fdg[0]


def test_the_judge_solves_the_balanced_problem():
    g = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.eye(3, 4)
    y = torch.tensor([0] * 200 + [1] * 40 + [2] * 6)
    x = torch.randn(len(y), 4, generator=g) + centres[y]
    y_test = torch.arange(3).repeat_interleave(200)
    x_test = torch.randn(600, 4, generator=g) + centres[y_test]
    judge = Judge(x, y, (x_test, y_test), [2], 3, "balanced")
    none, tail = judge.accuracy(None, 0.0)
    assert none > 0.6
    real = torch.randn(200, 4, generator=g) + centres[2]
    better, better_tail = judge.accuracy({2: real}, 0.9)
    assert better_tail > tail
    # The same rows twice, at the same share, change nothing: weights count, not counts. And the start does not matter.
    twice = judge.accuracy({2: torch.cat([real, real])}, 0.9)
    assert twice == pytest.approx((better, better_tail), abs=0.004)
    assert judge.accuracy(None, 0.0) == pytest.approx((none, tail), abs=0.004)
    # By counts the prior is in the classifier.
    literal = Judge(x, y, (x_test, y_test), [2], 3, "literal").accuracy(None, 0.0)
    assert literal[1] < tail - 0.1


def test_spare_samples_are_those_that_training_never_sees():
    config = Config(data="digits-lt", threads=1)
    data = experiment._load(config, "digits-lt")
    full = experiment._load(config.replace(imbalance=1.0), "digits-lt")
    spare = experiment.spare_samples(config, data)
    # Digits hold equal images; every other one is either trained on or spare.
    assert len(full.y_train) - len(data.y_train) - 5 <= len(spare.y_train) <= len(full.y_train) - len(data.y_train)
    used = {tuple(row) for row in (data.x_train.flatten(1) * 1e3).round().tolist()}
    assert not any(tuple(row) in used for row in (spare.x_train.flatten(1) * 1e3).round().tolist())


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
        fdg_experiment(QUICK.replace(epochs=3), out=copy, resume="auto", **ASKED)
    fdg_experiment(QUICK, out=copy, resume="auto", **{**ASKED, "processes": 2})
    assert (copy / "table.csv").read_bytes() == (out / "table.csv").read_bytes()
    assert all((copy / "items" / name).stat().st_mtime_ns == when for name, when in done.items())


def _row(arm, index, accuracy, share=0.5, fdg=0.1, offset=1.0):
    keys = ("data", "method", "set", "share", "arm", "fdg_tail", "offset_tail", "balanced_accuracy", "tail_accuracy")
    return dict(zip(keys, ("d", "m", index, share, arm, fdg, offset, accuracy, accuracy)))


def test_verdicts_follow_from_the_table():
    rows = []
    for index in range(4):
        rows += [
            _row("none", index, 0.90, share=None, fdg=None, offset=None),
            _row("random-0", index, 0.74 + 0.012 * index, offset=4.0),
            _row("random-1", index, 0.76 + 0.012 * index, offset=4.0),
            _row("match", index, 0.80 + 0.01 * index),
            _row("mean", index, 0.815 - 0.08 * (-1) ** index),
            _row("clusters-max", index, 0.6),
        ]
    (result,) = findings(rows)
    arms = result["arms"]
    verdicts = {arm: entry["minus_random"]["verdict"] for arm, entry in arms.items() if arm != "random"}
    assert verdicts == {"match": "better", "mean": "no difference shown", "clusters-max": "worse"}
    # Paired by set with the mean of its draws: 5.0, 4.8, 4.6, 4.4 points; t of 3 degrees of freedom is 3.182.
    differences = [0.05, 0.048, 0.046, 0.044]
    assert arms["match"]["minus_random"]["mean"] == pytest.approx(mean(differences))
    assert arms["match"]["minus_random"]["half"] == pytest.approx(3.1824 * stdev(differences) / 2, rel=1e-4)
    assert arms["match"]["minus_random"]["wins"] == 4
    assert arms["match"]["minus_none"]["verdict"] == "worse"
    text = sentences(result)
    assert "offset 4.00; that is above 3" in text[0]
    assert "(match) against random samples +4.70" in text[1]
    assert text[1].split("sets: ")[1].startswith("better")
    assert text[3].split("sets: ")[1].startswith("worse")


def test_interval_by_hand():
    assert interval([1.0, 2.0, 3.0]) == {"mean": 2.0, "half": pytest.approx(4.3027 / 3**0.5, rel=1e-4)}


def test_bad_requests_are_named_before_any_work(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for changes, words in (
        ({"methods": ["fdc", "gan"]}, "methods must be different ones of remix, .*, got fdc,gan"),
        ({"methods": ["fdc", "fdc"]}, "methods must be different"),
        ({"data": ["digits"]}, "unknown data set 'digits'"),
    ):
        with pytest.raises(ValueError, match=words):
            fdg_experiment(QUICK, out=out, **{**ASKED, **changes})
    for changes, words in (
        ({"levels": 1}, "levels must be 0 or at least 2, got 1"),
        ({"sets": 2}, "sets must be at least 3, got 2"),
        ({"shares": (0.5, 1.0)}, "shares must be numbers between 0 and 1"),
        ({"arms": ("mean", "best")}, "arms must be different ones of mean, match,.*got mean,best"),
        ({"classifier": "ce"}, "classifier must be one of balanced, literal, got 'ce'"),
        ({"space": "pixel"}, "space must be one of feature, image, got 'pixel'"),
        (
            {"space": "image", "classifier": "literal"},
            "space image trains networks: classifier literal is for space feature",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            Protocol(**changes)
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
    command += ["--epochs", "1", "--added", "30", "--shares", "0.5", "--model", "mlp", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "digits-lt, smote, share 0.5: random samples reach" in printed
    assert "Intervals cover the sets" in printed
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
