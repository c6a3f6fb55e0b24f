"""The examples do what they show: every command of every file, in order, in this process."""

import ast
import csv
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltkernels.cli import main

EXAMPLES = Path(__file__).parents[1] / "benchmarks" / "examples"


def _make(kind: str, folder: str) -> None:
    spec = importlib.util.spec_from_file_location("make_data", EXAMPLES / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.KINDS[kind](Path(folder))


@pytest.mark.parametrize(
    ("name", "package", "rows"),
    [("pictures", "PIL", 9), ("table", None, 15), ("dataset", "datasets", 9), ("list", "PIL", 15)],
)
def test_every_command_of_an_example_runs(name, package, rows, tmp_path, monkeypatch, capsys):
    if package:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    lines = (EXAMPLES / f"{name}.sh").read_text(encoding="utf-8").splitlines()
    commands = [shlex.split(line) for line in lines if line and not line.startswith(("#", "set "))]
    assert [words[0] for words in commands] == ["python", "ltkernels", "ltkernels", "ltkernels"]
    _make(*commands[0][2:])
    for words in commands[1:]:
        assert main([*words[1:], *(["--threads", "1"] if words[1] == "train" else [])]) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
    assert summary["balanced_accuracy"] > 0.6
    with (tmp_path / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == rows
    assert {row["class"] for row in found} <= set(summary["class_names"])
    # New samples come in the order of their classes, equally many of each.
    wanted = [summary["class_names"][i * 3 // rows] for i in range(rows)]
    assert sum(row["class"] == label for row, label in zip(found, wanted)) >= 0.6 * rows
    assert (tmp_path / "runs" / name / "report.html").stat().st_size > 10_000
    assert (name == "pictures") == (tmp_path / "charts").is_dir()


def test_every_example_is_listed_and_run():
    files = {path.stem for path in EXAMPLES.glob("*.sh")}
    assert files == {"pictures", "table", "dataset", "list"}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name}.sh)" in readme for name in files)


# Scripts by the packages that they need.
SCRIPTS = {
    "plain_pytorch": ["sklearn"],
    "transformers_trainer": ["transformers", "accelerate"],
    "lightning_module": ["lightning", "sklearn"],
    "lift": ["transformers"],
    "timm_finetune": ["torchvision", "timm", "sklearn"],
    "select_images": ["PIL", "sklearn"],
    "sharded_classes": [],
    "contrastive_pretraining": ["sklearn"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_what_it_says(name, tmp_path, monkeypatch, capfd):
    """The last block of its docstring, numbers to a twentieth: the last figures differ between machines."""
    path = EXAMPLES / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    for package in SCRIPTS[name]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    if name == "sharded_classes":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
        subprocess.run(command, check=True, timeout=300)
    else:
        if "make_data.py pictures" in text:
            _make("pictures", "pictures")
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [str(path)])
        with torch.random.fork_rng():
            runpy.run_path(str(path), run_name="__main__")
    printed = capfd.readouterr().out.splitlines()
    promised = ast.get_docstring(ast.parse(text)).split("\n\n")[-1].splitlines()
    number = re.compile(r"\d+\.\d+")
    for line in promised:
        (found,) = [out for out in printed if number.sub("#", out) == number.sub("#", line.removeprefix("    "))]
        for one, other in zip(number.findall(found), number.findall(line)):
            assert float(one) == pytest.approx(float(other), rel=0.05, abs=0.1), found


def test_every_script_is_listed_and_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, "make_data"}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name}.py)" in readme for name in SCRIPTS)
