"""The compiled kernels: between guard pages on every instruction set that this processor has, and in a sanitized build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from _part import Part, Tally

from ltkernels import _C

PROGRAM = Path(__file__).with_name("_kernel_cases.py")


def child(arguments: list[str], seed: int, cases: int, environment: dict[str, str], what: str) -> Tally:
    """The program of `_kernel_cases` in this environment; a signal is a failure that shows the last case."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, str(PROGRAM), str(seed), str(cases), str(answer), *arguments]
        done = subprocess.run(
            command, env={**os.environ, **environment}, cwd=folder, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode == 0 and answer.exists():
            return Tally(**json.loads(answer.read_text()))
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        return Tally(failures=[f"{what}, seed {seed}, {cases} cases: {how}\n{done.stderr[-1800:]}"])


def together(tallies: list[Tally]) -> Tally:
    failures = [text for tally in tallies for text in tally.failures]
    return Tally(cases=sum(tally.cases for tally in tallies), faults=sum(tally.faults for tally in tallies), failures=failures)


def guard_pages(seed: int, cases: int) -> Tally:
    usable = [name for name, state in _C.info()["isas"].items() if state == "usable"]
    share = max(20, cases // len(usable))
    return together(
        [child(["guarded"], seed + k, share, {"LTKERNELS_ISA": name}, f"guard pages, {name}") for k, name in enumerate(usable)]
    )


PARTS = (
    Part("guard pages", "every kernel call on buffers between guard pages, inputs read-only, each instruction set", 1200, guard_pages),
)
