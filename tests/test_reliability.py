"""Promise: the campaign's runner runs, repeats, and reports a part that fails, crashes, hangs or raises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("reliability")
BROKEN = """
import os, signal, time
from _part import Part, Tally
def good(seed, cases): return Tally(cases=cases, faults=2)
def wrong(seed, cases): return Tally(cases=cases, failures=[f"seed {seed} case 1: 2 is not 3"])
def crash(seed, cases): os.kill(os.getpid(), signal.SIGSEGV)
def leave(seed, cases): os._exit(0)
def hang(seed, cases):
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)
def throw(seed, cases): raise KeyError("lost")
def absent(seed, cases): return Tally(skipped="no such machine")
PARTS = tuple(Part(run.__name__, "a part that is " + run.__name__, 100, run) for run in (good, wrong, crash, leave, hang, throw, absent))
"""


def campaign(folder: Path, *options: str) -> tuple[int, str, dict[str, dict]]:
    out = folder / "result.json"
    done = subprocess.run(
        [sys.executable, FOLDER, "--out", out, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=folder,
    )
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    return done.returncode, done.stdout + done.stderr, {row["part"]: row for row in rows}


def test_two_parts(tmp_path) -> None:
    options = ("--effort", "0.03", "--seed", "5", "--only", "adjustments", "inference")
    code, text, rows = campaign(tmp_path, *options)
    assert code == 0, text
    assert "seed 5" in text
    assert set(rows) == {"adjustments", "inference"}
    for row in rows.values():
        assert row["cases"] > 0
        assert row["failures"] == []
        assert row["cpu_hours"] > 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["kind"], result["effort"], result["seed"]) == ("reliability", 0.03, 5)
    assert result["machine"]["torch"]


def test_failures_are_reported(tmp_path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    code, text, rows = campaign(tmp_path, "--parts", str(tmp_path), "--effort", "0.1", "--seed", "1", "--limit", "4")
    assert code == 1
    assert rows["good"]["failures"] == []
    assert (rows["good"]["cases"], rows["good"]["faults"]) == (10, 2)
    assert rows["wrong"]["failures"] == [f"seed {rows['wrong']['seed']} case 1: 2 is not 3"]
    assert "SIGSEGV" in rows["crash"]["failures"][0]
    assert "exit code 0" in rows["leave"]["failures"][0]
    assert "no end within 4 s" in rows["hang"]["failures"][0]
    assert "KeyError: 'lost'" in rows["throw"]["failures"][0]
    assert rows["absent"]["skipped"] == "no such machine"
    assert "5 failures" in text
    again = campaign(tmp_path, "--parts", str(tmp_path), "--effort", "0.1", "--seed", "1", "--only", "wrong")[2]
    assert again["wrong"]["seed"] == rows["wrong"]["seed"], "a part's seed depends on the others"


@pytest.mark.parametrize("options", [["--only", "nothing"], ["--effort", "0"], ["--effort", "nan"]])
def test_bad_options(options, tmp_path) -> None:
    code, text, rows = campaign(tmp_path, *options)
    assert code != 0
    assert "unknown part nothing" in text or "--effort is" in text
    assert not rows


def test_readme_table(tmp_path) -> None:
    from ltkernels.benchmarks.report import main

    (tmp_path / "broken.py").write_text(BROKEN)
    campaign(tmp_path, "--parts", str(tmp_path), "--effort", "0.1", "--seed", "1", "--only", "good", "wrong", "absent")
    (tmp_path / "README.md").write_text("before\n<!-- result -->\n<!-- /result -->\nafter\n")
    main([str(tmp_path / "result.json"), "--readme", str(tmp_path / "README.md")])
    table = (tmp_path / "README.md").read_text()
    assert "| good | a part that is good | 10 | 2 | " in table
    assert "| **1** |" in table
    assert "skipped: no such machine" in table
    assert "seed 1" in table
