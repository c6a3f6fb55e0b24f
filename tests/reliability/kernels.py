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
            command,
            env={**os.environ, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == 0 and answer.exists():
            return Tally(**json.loads(answer.read_text()))
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        return Tally(failures=[f"{what}, seed {seed}, {cases} cases: {how}\n{done.stderr[-1800:]}"])


def together(tallies: list[Tally]) -> Tally:
    failures = [text for tally in tallies for text in tally.failures]
    return Tally(
        cases=sum(tally.cases for tally in tallies), faults=sum(tally.faults for tally in tallies), failures=failures
    )


def guard_pages(seed: int, cases: int) -> Tally:
    usable = [name for name, state in _C.info()["isas"].items() if state == "usable"]
    share = max(20, cases // len(usable))
    return together(
        [
            child(["guarded"], seed + k, share, {"LTKERNELS_ISA": name}, f"guard pages, {name}")
            for k, name in enumerate(usable)
        ]
    )


# sanitizer: (libraries to load before everything else, options)
SANITIZERS = {
    "address": (
        ("libasan.so", "libubsan.so"),
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
    ),
    "thread": (
        ("libtsan.so",),
        {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0:suppressions={suppressions}"},
    ),
}


def sanitized(name: str) -> Path | None:
    """The folder of a build with this sanitizer among those that --sanitized names."""
    mark = {"address": b"__asan_init", "thread": b"__tsan_init"}[name]
    for folder in filter(None, os.environ.get("LTKERNELS_SANITIZED", "").split(os.pathsep)):
        for module in Path(folder, "ltkernels").glob("_C*.so"):
            if mark in module.read_bytes():
                return Path(folder)
    return None


def under(name: str, program: list[str], seed: int, cases: int) -> Tally:
    folder = sanitized(name)
    if folder is None:
        return Tally(skipped=f"no build with -fsanitize={name}: see --sanitized")
    libraries, options = SANITIZERS[name]
    found = [
        subprocess.run(["gcc", f"-print-file-name={one}"], capture_output=True, text=True, check=True).stdout.strip()
        for one in libraries
    ]
    suppressions = Path(__file__).with_name("tsan.supp")
    environment = {key: value.format(suppressions=suppressions) for key, value in options.items()}
    environment |= {"LD_PRELOAD": " ".join(found), "LTKERNELS_FROM": str(folder), "OMP_NUM_THREADS": "4"}
    return child(program, seed, cases, environment, f"{name} sanitizer")


def address(seed: int, cases: int) -> Tally:
    return under("address", [], seed, cases)


def thread(seed: int, cases: int) -> Tally:
    return under("thread", ["threads"], seed, cases)


PARTS = (
    Part(
        "guard pages",
        "every kernel call on buffers between guard pages, inputs read-only, each instruction set",
        200,
        guard_pages,
    ),
    Part(
        "address sanitizer",
        "the same calls in a build with AddressSanitizer and UndefinedBehaviorSanitizer",
        200,
        address,
    ),
    Part(
        "thread sanitizer",
        "row-parallel losses, greedy selection and balanced k-means on four threads under ThreadSanitizer",
        40,
        thread,
    ),
)
