"""The examples do what they show: every command of every file, in order, in this process."""

import csv
import importlib.util
import json
import shlex
from pathlib import Path

import pytest

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
