"""The result folder: who may write it, what an unfinished run leaves in it, and what `--force` may replace.

A run works inside its folder under a lock. `summary.json` is written last: a folder without it holds an unfinished run,
whose checkpoints lie in `state/`. Results that `--force` replaces wait in `.replaced/` until the new ones are there.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ltkernels.train.checkpoint import write_bytes

CONFIG, METRICS, SUMMARY = "config.toml", "metrics.jsonl", "summary.json"
REPORT, CHECKPOINTS = "report.html", "checkpoints"
SELECTION, SELECTION_ROWS, SELECTION_TABLE = "selection.json", "selection.npz", "selection.csv"
SELECTION_PICTURE = "selection.png"
TENSORBOARD, WANDB, MLFLOW, STATE = "tensorboard", "wandb", "mlflow", "state"
TABLES = "tables"
TABLE_CSV, TABLE_JSON, SCATTER, ITEMS, BASES = "table.csv", "table.json", "scatter.png", "items", "bases"
_LOCK, _REPLACED = ".lock", ".replaced"
_OURS = {CONFIG, METRICS, SUMMARY, REPORT, CHECKPOINTS, SELECTION, SELECTION_ROWS, TENSORBOARD, WANDB, MLFLOW, STATE}
_OURS |= {TABLES, SELECTION_PICTURE, SELECTION_TABLE, TABLE_CSV, TABLE_JSON, SCATTER, ITEMS, BASES}
_HIDDEN = {_LOCK, _REPLACED}
_SEED = r"seed-\d+"
_PARTIAL = r"\.(.+)\.partial-\d+"
# Folders of ours and the names of files that may lie in them; anything else there is someone else's.
_INSIDE = {
    CHECKPOINTS: r".+\.pt",
    TABLES: r".+\.csv",
    STATE: r"\.?.+\.pt(\.partial-\d+)?",
    TENSORBOARD: r"events\.out\..+",
    ITEMS: r"\.?.+\.json(\.partial-\d+)?",
}


def _is_ours(name: str) -> bool:
    """Whether a run of ours may have written an entry of this name; `.NAME.partial-PID` is what a killed one left."""
    whole = re.sub(f"^{_PARTIAL}$", r"\1", name)
    return whole in _OURS | _HIDDEN or re.fullmatch(_SEED, whole) is not None


def _foreign(out: Path) -> list[str]:
    entries = {entry.name: entry for entry in out.iterdir()}
    foreign = sorted(name for name in entries if not _is_ours(name))
    for folder, pattern in _INSIDE.items():
        if folder in entries and entries[folder].is_dir():
            foreign += sorted(
                f"{folder}/{p.name}" for p in entries[folder].iterdir() if not re.fullmatch(pattern, p.name)
            )
    runs = [entry for name, entry in entries.items() if re.fullmatch(_SEED, name)]
    runs += list(entries[BASES].iterdir()) if BASES in entries else []
    for entry in runs:
        foreign += (
            [f"{entry.relative_to(out)}/{inside}" for inside in _foreign(entry)] if entry.is_dir() else [entry.name]
        )
    return foreign


def is_unfinished(out: Path) -> bool:
    """Whether `out` holds a run that began and has no summary yet."""
    return (out / CONFIG).is_file() and not (out / SUMMARY).is_file()


def check_file(out: str | Path | None, force: bool) -> None:
    """Raise FileExistsError where the file `out` is there and `force` does not allow to replace it, or where it is a folder; ValueError
    where it cannot be there."""
    if out is None:
        return
    check_parents(Path(out))
    if Path(out).is_dir() or (Path(out).exists() and not force):
        raise FileExistsError(f"--out {out}: exists; --force replaces a file")


def check_parents(out: Path, flag: str = "--out", *, folder: bool = False) -> None:
    """Raise ValueError where a file stands in the place of a folder above `out`, or of `out` itself where that is a `folder`."""
    places = (out, *out.parents) if folder else out.parents
    blocked = next((place for place in places if place.exists() and not place.is_dir()), None)
    if blocked is not None:
        raise ValueError(f"{flag} {out}: {blocked} is a file, not a folder")


def check_free(out: Path, force: bool, resume: bool = False) -> None:
    """Raise where `out` cannot become a result folder, before any work is done.

    FileExistsError if it exists and is not empty without `force` (or `resume`); ValueError if it is no folder, or holds
    anything that a run of ours did not write: `force` replaces results, never other people's files.
    """
    check_parents(out)
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise ValueError(f"--out {out}: exists and is not a folder")
    # A run that was killed before it had begun leaves at most a half-written file, a selection its files without the last.
    entries = {entry.name for entry in out.iterdir() if not re.fullmatch(_PARTIAL, entry.name)} - _HIDDEN
    if SELECTION not in entries:
        entries -= {SELECTION_ROWS, SELECTION_TABLE, SELECTION_PICTURE}
    if not entries or (resume and (out / CONFIG).is_file()):
        return
    if not force:
        if is_unfinished(out):
            raise FileExistsError(
                f"--out {out}: holds an unfinished run; --resume auto continues it, --force replaces it"
            )
        more = "; --init goes on from its model in another folder" if (out / CHECKPOINTS).is_dir() else ""
        raise FileExistsError(f"--out {out}: exists; --force replaces the results in it{more}")
    foreign = _foreign(out)
    if foreign:
        raise ValueError(
            f"--out {out}: holds {', '.join(foreign[:3])}, not written by a run; --force leaves such folders"
        )


@contextmanager
def open_run(
    out: Path, force: bool, resume: bool, undone: tuple[type[BaseException], ...] = (ValueError, TypeError)
) -> Iterator[bool]:
    """Lock `out` and make it ready for a run, which works inside it; a block that ends well has written its summary. Gives whether
    `out` held an unfinished run, which goes on.

    An error of the kinds `undone` (bad input, if nothing else is said) in a fresh run removes what it wrote and puts replaced results
    back, unless a model was trained; everything else (a signal, a full disk, a bug) leaves the state for `resume`. Raises as
    `check_free`, and FileExistsError where another run has the lock.
    """
    check_free(out, force, resume)
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        check_free(out, force, resume)
        resumed = resume and is_unfinished(out)
        _drop_partial(out)
        if not resumed:
            _set_aside(out)
        try:
            yield resumed
        except undone:
            if not (resumed or any((out / CHECKPOINTS).glob("*.pt"))):
                _remove(out)
                _put_back(out)
                if not existed and not any(entry.name != _LOCK for entry in out.iterdir()):
                    shutil.rmtree(out)
            raise
        tidy(out)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of `out`. The kernel drops it when the process ends, however that happens: no stale locks. (filelock leaves its
    file behind, in folders that others list.)"""
    path = out / _LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held it may have unlinked the file between our open and our lock.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                break
        except BlockingIOError as error:
            os.close(descriptor)
            raise FileExistsError(f"--out {out}: another run is writing into it") from error
        os.close(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _drop_partial(out: Path) -> None:
    """Remove what writers that were killed left half-written: under the lock nobody else writes here."""
    for folder in (out, out / STATE, out / CHECKPOINTS, out / TABLES, out / ITEMS):
        for path in folder.glob(".*.partial-*"):
            path.unlink(missing_ok=True)


def _set_aside(out: Path) -> None:
    """Finished results go to `.replaced/`; the remains of an unfinished run go for good."""
    replaced = out / _REPLACED
    if any((out / last).is_file() for last in (SUMMARY, SELECTION)):
        shutil.rmtree(replaced, ignore_errors=True)
        replaced.mkdir()
        for entry in _visible(out):
            entry.rename(replaced / entry.name)
    else:
        _remove(out)


def _put_back(out: Path) -> None:
    replaced = out / _REPLACED
    if replaced.is_dir():
        for entry in replaced.iterdir():
            entry.rename(out / entry.name)
        replaced.rmdir()


def _remove(out: Path) -> None:
    for entry in _visible(out):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _visible(out: Path) -> list[Path]:
    return [entry for entry in out.iterdir() if entry.name not in _HIDDEN]


def finished(out: Path) -> dict[str, Any] | None:
    """The summary of a run that is finished, whose folder is tidied; else None."""
    if not (out / SUMMARY).is_file():
        return None
    tidy(out)
    return read_summary(out)


def tidy(out: Path) -> None:
    """Remove what a finished run no longer needs. Its last process may have ended, or failed, between its summary and this."""
    shutil.rmtree(out / STATE, ignore_errors=True)
    shutil.rmtree(out / _REPLACED, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all; see `checkpoint.write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (a NaN is an error: it would not load elsewhere)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {str(error)[:200]}") from error


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json of a result folder. Raises FileNotFoundError or ValueError naming the file."""
    path = run_dir / SUMMARY
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir}: not a result folder (no {SUMMARY})")
    summary = read_json(path)
    if not isinstance(summary, dict) or not isinstance(summary.get("variants"), list):
        raise ValueError(f"{path}: not the summary of a run")
    with judged(path):
        names = [variant["name"] for variant in summary["variants"]]
        # They name files of checkpoints/: nothing that leads elsewhere.
        bad = next((name for name in names if not re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]*", name)), None)
        if bad is not None:
            raise ValueError(f"{bad!r:.80} is no name of a variant")
        if summary["chosen"] not in names:
            raise ValueError(f"chosen is {summary['chosen']!r:.80}, which no variant is called")
    return summary


@contextmanager
def judged(path: Path) -> Iterator[None]:
    """What a file of other content than a run writes makes its readers raise becomes a ValueError that names `path`."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = str(error)[:200]
        raise ValueError(f"{path}: not what a run writes ({type(error).__name__}: {reason})") from error


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, one per epoch and phase. Raises FileNotFoundError or ValueError naming the file."""
    path = run_dir / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir}: not a result folder (no {METRICS})")
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a file of JSON lines: {str(error)[:200]}") from error
    if not all(isinstance(record, dict) and isinstance(record.get("phase"), str) for record in records):
        raise ValueError(f"{path}: not the records of a run: a line without a phase")
    return records
