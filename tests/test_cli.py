"""The command line: exit codes, one line for bad input, nothing on a pipe that belongs on a terminal."""

import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from ltkernels import LOSSES
from ltkernels.cli import main
from ltkernels.commands.parts import Progress
from ltkernels.train import Config, choices, data, presets
from ltkernels.train.batching import MIXERS
from ltkernels.train.data import PROFILES
from ltkernels.train.samplers import SAMPLERS
from ltkernels.train.schedules import SCHEDULES
from ltkernels.train.stage2 import _STAGES

QUICK = ["--model", "mlp", "--epochs", "2", "--retrain-epochs", "2", "--random-repeats", "1"]


def _code(*arguments: object) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def _one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("ltkernels: error: ")
    return captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["run", *QUICK, "--out", str(out), "--quiet"]) == 0
    return out


def test_run_writes_the_four_files(finished):
    assert {p.name for p in finished.iterdir()} == {
        *("config.toml", "metrics.jsonl", "summary.json", "report.html", "checkpoints", "tables")
    }
    names = [each["name"] for each in json.loads((finished / "summary.json").read_text())["variants"]]
    assert names == ["ce", "logit_adjusted", "retrained", "fdc-mean", "fdc-max", "fdc-random"]


def test_run_prints_config_and_table_and_on_a_pipe_a_line_an_epoch(tmp_path, capsys):
    assert _code("train", *QUICK, "--out", tmp_path / "a", "--loss", "ldam") == 0
    captured = capsys.readouterr()
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    lines = captured.err.splitlines()
    assert len(lines) == len(records)
    for line, record in zip(lines, records):
        assert line.startswith(record["phase"])
        assert f"{record['epoch']}/" in line
        assert f"loss {record['train_loss']:.4g}" in line
        assert f"balanced accuracy {100 * record['test_balanced_accuracy']:.1f} %" in line
    assert "\r" not in captured.err
    assert 'loss = "ldam"\n' in captured.out
    assert "balanced" in captured.out


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_how_long_it_takes(terminal, capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((79, 24)))
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    record = {"phase": "train/ce", "epoch": 1, "train_loss": 0.51234, "lr": 0.05, "test_balanced_accuracy": 0.625}
    with Progress(quiet=False) as progress:
        for done in (250, 500):
            clock[0] += 5
            progress("decoding", done, 500, {})
        for step in range(1, 9):  # 2 s an epoch of four steps
            clock[0] += 0.5
            progress.step("train/ce", (step - 1) // 4, 10, (step - 1) % 4 + 1, 4)
            if step % 4 == 0:
                progress("train/ce", step // 4, 10, {**record, "epoch": step // 4})
        err = capsys.readouterr().err
    lines = re.split(r"[\r\n]+", err.strip("\r\n"))
    last = "loss 0.5123  balanced accuracy 62.5 %  rate 0.05"
    if terminal:
        assert "\n" not in err
        assert max(map(len, lines)) < 79
        assert lines[0].startswith("decoding ")
        assert any("1/10, step 2/4" in line and "left" in line for line in lines)
        assert capsys.readouterr().err.strip("\r ") == ""
    else:
        assert [line.split()[:2] for line in lines] == [
            ["decoding", "500/500"],
            ["train/ce", "1/10"],
            ["train/ce", "2/10"],
        ]
        assert lines[2].endswith(f"{last}  2 s each, 16 s left")
    assert not Progress(quiet=True)("a", 1, 2, {})
    assert capsys.readouterr().err == ""


def test_quiet_prints_nothing(tmp_path, capsys):
    assert _code("train", *QUICK, "--out", tmp_path / "a", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_evaluate_and_report(finished, capsys):
    assert _code("evaluate", finished) == 0
    assert "equal to summary.json" in capsys.readouterr().out
    before = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    assert _code("report", finished) == 0
    assert (finished / "report.html").read_text() == before


def test_existing_folder_needs_force(finished, capsys):
    assert _code("run", *QUICK, "--out", finished) == 2
    assert "--force" in _one_line(capsys)
    assert (finished / "summary.json").exists()


def test_config_file_and_flags_win(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('loss = "ldam"\nepochs = 2\nmodel = "mlp"\nseed = 5\n')
    assert _code("train", "--config", path, "--seed", 7, "--out", tmp_path / "out", "--quiet") == 0
    config = json.loads((tmp_path / "out" / "summary.json").read_text())["config"]
    assert (config["loss"], config["epochs"], config["seed"]) == ("ldam", 2, 7)
    # The stored settings are a config file themselves.
    stored = tmp_path / "out" / "config.toml"
    assert _code("train", "--config", stored, "--out", tmp_path / "again", "--quiet") == 0
    one, two = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("out", "again"))
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--loss", "cee"], ["cee", "known", "ldam"]),
        (["run", "--data", "imagenet"], ["imagenet", "digits-lt"]),
        (["run", "--data", "npz:/no/such.npz"], ["/no/such.npz"]),
        (["run", "--data", "fashion-mnist-lt", "--data-dir", "/no/such"], ["/no/such", "--data-dir", "apt-get"]),
        (["run", "--epochs", "zero"], ["--epochs", "zero"]),
        (["run", "--epochs", "0"], ["epochs", "0"]),
        (["run", "--sampler", "reverse"], ["--sampler", "reverse", "balanced"]),
        (["run", "--preset", "best"], ["best", "ldam-drw"]),
        (["train", "--seeds", "1,x"], ["--seeds", "1,x"]),
        (["train", "--seeds", "1,1"], ["seeds", "1,1"]),
        (["train", "--seeds", "1,2", "--seed", "3"], ["--seed", "--seeds"]),
        (["train", "--schedule", "ga"], ["GradientAdjustment", "KPS"]),
        (["train", "--loss-options", "tau"], ["loss_options", "tau"]),
        (["train", "--lr-schedule", "poly"], ["lr_schedule", "poly"]),
        (["train", "--log", "paper"], ["log", "wandb"]),
        (["train", "--stage2", "lws", "--loss", "ldam"], ["lws", "linear", "ldam"]),
        (["train", "--stage2", "ofa", "--model", "mlp"], ["average pooling"]),
        (["train", "--resume", "always"], ["--resume", "always"]),
        (["run", "--model", "vgg"], ["vgg", "resnet32"]),
        (["run", "--select", "best"], ["select", "best"]),
        (["run", "--imbalance", "1000"], ["imbalance", "1000"]),
        (["run", "--device", "abacus"], ["device", "abacus"]),
        (["run", "--loss", "ldam", "--head", "linear"], ["head", "linear", "cosine"]),
        (["run", "--config", "/no/such.toml"], ["/no/such.toml"]),
        (["run", "--epoch", "3"], ["--epoch"]),
        (["fly"], ["fly"]),
        ([], ["COMMAND"]),
        (["evaluate", "/no/such"], ["/no/such"]),
        (["report", "/no/such"], ["/no/such"]),
        (["select", "/no/such.npz"], ["/no/such.npz"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _code(*arguments) == 2
    line = _one_line(capsys)
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


def test_unknown_config_key_is_named(tmp_path, capsys):
    (tmp_path / "bad.toml").write_text("epochz = 3\n")
    assert _code("run", "--config", tmp_path / "bad.toml", "--out", tmp_path / "out") == 2
    assert "epochz" in _one_line(capsys)
    (tmp_path / "bad.toml").write_text("epochs = = 3\n")
    assert _code("run", "--config", tmp_path / "bad.toml", "--out", tmp_path / "out") == 2
    assert "bad.toml" in _one_line(capsys)


def test_select_on_own_features(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), [60, 30, 8])
    features = rng.normal(size=(98, 6)).astype(np.float32)
    np.savez(tmp_path / "features.npz", features=features, labels=labels)
    out = tmp_path / "out"
    assert _code("select", tmp_path / "features.npz", "--out", tmp_path / "half", "--select", "min") == 0
    assert "class 2: 30 added" in capsys.readouterr().out  # by default half of the largest class at most
    assert _code("select", tmp_path / "features.npz", "--out", out, "--select", "min", "--share", "1") == 0
    assert "class 2: 52 added" in capsys.readouterr().out
    added = np.load(out / "selection.npz")
    assert added["features"].shape == (52, 6)
    assert added["features"].dtype == np.float32
    assert added["labels"].tolist() == [2] * 52
    result = json.loads((out / "selection.json").read_text())
    assert result["head_classes"] == [0, 1]
    assert result["classes"][0]["arms"]["min"]["fdg"] == result["fdg_tail"]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"features": np.zeros((3, 2))}, "labels"),
        (
            {"features": np.full((3, 2), np.nan), "labels": np.arange(3)},
            "features holds NaN or infinity, first in row 0",
        ),
        ({"features": np.zeros((3, 2)), "labels": np.arange(-1, 2)}, "labels must not be negative, got -1"),
        ({"features": np.zeros((3, 2)), "labels": np.arange(4)}, "labels must hold 3"),
        ({"features": np.ones((4, 2)), "labels": np.array([0, 0, 2, 2])}, "class 1"),
    ],
)
def test_bad_features_are_named(arrays, words, tmp_path, capsys):
    np.savez(tmp_path / "features.npz", **arrays)
    assert _code("select", tmp_path / "features.npz", "--out", tmp_path / "out") == 2
    assert words in _one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_version_help_and_doctor(capsys):
    assert _code("--version") == 0
    assert capsys.readouterr().out.startswith("ltkernels 0.")
    assert _code("run", "--help") == 0
    assert "--imbalance" in capsys.readouterr().out
    assert _code("doctor") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"ltkernels", "torch", "faiss-cpu", "scikit-learn", "triton"} <= set(names)


def test_importing_the_library_does_not_import_the_trainer(tmp_path):
    code = "import sys, ltkernels; print([m for m in ('ltkernels.train', 'sklearn', 'faiss') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip() == "[]"


def test_missing_scikit_learn_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert _code("run", "--out", tmp_path / "out") == 2
    assert 'pip install "ltkernels[train]"' in _one_line(capsys)


def test_bench_checks_its_answers_and_writes_a_result(tmp_path, capsys) -> None:
    out = tmp_path / "result.json"
    assert (
        main(
            [
                "bench",
                "losses",
                "--quick",
                "--seconds",
                "0.01",
                "--losses",
                "logit_adjusted",
                "--peers",
                "eager",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert {row["backend"].partition("-")[0] for row in result["rows"]} == {"cpu", "eager"}
    assert all(row["ok"] and row["ms_p50"] > 0 for row in result["rows"])
    assert result["machine"]["cpu"]


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ([], "COMMAND (run, train, "),
        (["trian"], "did you mean train?"),
        (["train", "--loss-option", "tau=1"], "did you mean --loss-options?"),
        (["train", "--loss", "logit_adjsted"], "did you mean logit_adjusted?"),
        (["train", "--preset", "ldma-drw"], "did you mean ldam-drw?"),
        (["train", "--model", "restnet32"], "did you mean resnet32?"),
        (["train", "--data", "fashion_mnist"], "did you mean fashion-mnist-lt?"),
        (["train", "--schedule", "drww"], "did you mean drw?"),
        (["train", "--model", "cli_model:Net"], "called with input_shape=(1, 8, 8)"),
    ],
)  # fmt: skip
def test_a_misspelt_name_is_met_with_the_right_one(arguments, meant, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("cli_model")
    module.Net = type("Net", (torch.nn.Module,), {"__init__": lambda self: None})
    monkeypatch.setitem(sys.modules, "cli_model", module)
    assert _code(*arguments) == 2
    assert meant in _one_line(capsys)


def test_capitals_and_class_names_do_not_matter():
    for given, name in (
        ("LDAM", "ldam"),
        ("LogitAdjustedCrossEntropy", "logit_adjusted"),
        ("Balanced-Softmax", "balanced_softmax"),
    ):
        assert Config(loss=given).loss == name
    assert Config(schedule="DRW").schedule == "drw"


def test_help_has_headings_and_examples(capsys):
    assert _code("train", "--help") == 0
    text = capsys.readouterr().out
    places = [
        text.index(f"\n{heading}:\n") for heading in ("data", "model and loss", "optimisation", "machine", "examples")
    ]
    assert places == sorted(places)
    assert _code("select", "--help") == 0


COMMANDS = (
    *("run", "train", "evaluate", "report", "predict", "features", "export", "select", "audit", "statistics", "experiment"),
    *("bench", "doctor"),
)  # fmt: skip


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_help_comes_without_torch(command, tmp_path):
    words = [sys.executable, "-X", "importtime", "-m", "ltkernels", *([command] if command else []), "--help"]
    result = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.startswith("usage: ltkernels")
    assert command == "doctor" or "\nexamples:\n  ltkernels " in result.stdout
    assert command or all(f"\n    {name}" in result.stdout for name in COMMANDS)
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "ltkernels.cli" in loaded
    assert not loaded & {"torch", "numpy", "ltkernels.losses"}


def test_the_command_finds_all_that_an_import_brings(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import ltkernels as ltk\nprint(ltk.nn.LDAM, ltk.LOSSES['ldam'], ltk.explain)\n0 / 0\n"
    )
    (tmp_path / "ltkernels").write_text("import sys\nfrom ltkernels.cli import main\nsys.exit(main())\n")
    for words in ([str(tmp_path / "ltkernels")], ["-m", "ltkernels"]):
        command = [sys.executable, *words, "train", "--model", "mine:x", "--out", "a"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert result.stdout.count("LDAM") == 2, result.stderr
        assert "ZeroDivisionError" in result.stderr


def test_the_choices_that_help_lists_are_those_that_there_are():
    own = {name for name, loss in LOSSES.items() if loss.__module__.startswith("ltkernels.")}
    assert set(choices.LOSSES) == own
    assert len(choices.LOSSES) == len(own)
    assert (*SAMPLERS,) == choices.SAMPLERS
    assert (*SCHEDULES,) == choices.SCHEDULES
    assert (*MIXERS,) == choices.MIXERS
    assert PROFILES == choices.PROFILES
    built_in = [name for name in data.names() if name.removesuffix("PATH") in data._LOADERS]
    assert built_in[: len(choices.DATA_SETS)] == list(choices.DATA_SETS)  # a test may have registered more
    assert (*_STAGES,) == choices.STAGES


@pytest.mark.parametrize("arguments", [["Train", "--LOSS", "LDAM"], ["TRAIN", "--Loss=Ldam", "--Batch_Size", "32"]])
def test_commands_and_flags_in_any_capitals(arguments, tmp_path):
    out = tmp_path / "a"
    assert _code(*arguments, *QUICK, "--data", "Digits-LT", "--out", out) == 0
    config = json.loads((out / "summary.json").read_text())["config"]
    assert (config["loss"], config["data"]) == ("ldam", "digits-lt")
    assert presets.load("LDAM_DRW") == presets.load("ldam-drw")
