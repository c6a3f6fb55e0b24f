"""Every reader of files under hostile files: the right answer, or one clear error that names the file.

A case is a reader's valid file that was damaged anywhere, damaged below its checksums, or forged (`_mutate.py`, `_readers.py`).
Anything but ValueError, TypeError and OSError, a message that does not name the file or fills the screen, a hang, more than a
bounded memory, a program started, a file read or written outside the folder is a failure.
"""

from __future__ import annotations

import functools
import importlib.util
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from _part import Part, Tally

if TYPE_CHECKING:
    from _guard import Spy

_SECONDS = 30.0
_MAX_MESSAGE = 5000  # a setting and a path of 4096


def _case(name: str, seed: int, case: int, spy: Spy) -> str:
    """What went wrong in one case, or ""."""
    import _readers

    reader = _readers.READERS[name]
    rng = random.Random(f"{seed} {name} {case}")
    with tempfile.TemporaryDirectory(prefix="fuzz") as place:
        folder = Path(place).resolve() / "given"
        kind, files = _readers.mutated(reader, f"{spy.canary}/secret.png", rng)
        folder.mkdir()
        _readers.write(folder, files)
        where = f"seed {seed} case {case} ({kind})"
        spy.seen.clear()
        spy.folder = place
        try:
            value = reader.read(folder)
            problem = reader.right(value)
        except (ValueError, TypeError, OSError) as error:
            problem = _message(error, folder, files)
            if kind == "whole":
                problem = f"refused a whole file: {error}"
        except BaseException as error:
            problem = f"raised {type(error).__name__}: {str(error)[:300]}"
        finally:
            spy.folder = ""
        if not problem and spy.seen:
            problem = f"reached out: {spy.seen[:3]}"
        strangers = [
            p.name
            for p in (*Path(place).iterdir(), *Path(spy.canary).iterdir())
            if p.name not in ("given", "secret.png")
        ]
        if not problem and strangers:
            problem = f"left {strangers}"
    return f"{where}: {problem}" if problem else ""


def _message(error: BaseException, folder: Path, files: dict[str, bytes]) -> str:
    text = str(error)
    known = {str(folder), *files, *(Path(name).name for name in files), *(f.rsplit(".tar", 1)[0] for f in files)}
    # Parts of an archive are named by their place in it; what samples are too few for, by class or setting.
    known |= {"cifar-10-batches", "data_batch", "test_batch", "batches.meta", "imbalance", "class "}
    if not any(name in text for name in known):
        return f"names no file: {type(error).__name__}: {text[:300]}"
    return f"a message of {len(text)} characters: {text[:200]}" if len(text) > _MAX_MESSAGE else ""


def _fuzz(name: str, seed: int, cases: int) -> Tally:
    import torch
    from _guard import guarded

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        import _readers

        if name == "run folder":
            _readers.make_run(Path(scratch) / "run")
        failures = guarded(functools.partial(_case, name, seed), cases, _SECONDS, name)
    return Tally(cases=cases, faults=cases, failures=failures)


# Cases at 1x, by what a case costs.
_CASES = {
    "idx": 100, "idx.gz": 100, "cifar-binary": 60, "cifar-binary.tar.gz": 60, "cifar-python": 80, "cifar-python.tar.gz": 60,
    "pickle": 300, "npz": 200,
    "table.csv": 100, "list": 40, "features.npz": 200, "features.npz, deflated": 60, "features.npy": 100, "select": 30, "audit": 30,
    "statistics": 100, "selection checkpoint": 100, "image folder": 60, "images.tar": 80, "images.tar.gz": 80, "images.tar.bz2": 30,
    "images.tar.xz": 30, "images.zip": 80, "training checkpoint": 100, "run folder": 60, "unfinished run": 20, "config": 300,
}  # fmt: skip


def _all(seed: int, cases: int) -> Tally:
    """Every reader in turn, each its share of the cases."""
    total = Tally()
    whole = sum(_CASES.values())
    for name, share in _CASES.items():
        tally = _fuzz(name, seed, max(1, round(share * cases / whole)))
        total.cases += tally.cases
        total.faults += tally.faults
        total.failures += tally.failures
    return total


def _guided(seed: int, cases: int) -> Tally:
    """The readers of plain bytes, mutated by libFuzzer towards code that was not reached before."""
    if importlib.util.find_spec("atheris") is None:
        return Tally(skipped="atheris is not installed (pip install atheris): the seeded mutations of 'readers' alone")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("_guided.py")), str(cases), str(seed), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [p.read_bytes()[:300] for p in Path(folder).iterdir() if p.name.startswith(("crash", "timeout", "oom"))]
        # Not the exit code: libFuzzer's own timer may end the process as it leaves.
        if f"Done {cases} in" in done.stderr and not found:
            return Tally(cases=cases, faults=cases)
        return Tally(cases=cases, faults=cases, failures=[f"seed {seed} input {found!r}: {done.stderr[-1500:]}"])


PARTS = (
    Part("readers", "damaged and forged files of every kind that is read", sum(_CASES.values()), _all),
    Part("readers: guided", "mutations guided by coverage, of the files that are read byte by byte", 3000, _guided),
)
