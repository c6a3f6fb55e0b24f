"""The result folder: written under a temporary name beside its place and renamed at the end, all or nothing."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG, METRICS, SUMMARY, REPORT, CHECKPOINTS = (
    "config.toml",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "checkpoints",
)
SELECTION, SELECTION_ROWS, SELECTION_PICTURE = "selection.json", "selection.npz", "selection.png"
_OURS = {CONFIG, METRICS, SUMMARY, REPORT, CHECKPOINTS, SELECTION, SELECTION_ROWS, SELECTION_PICTURE}


def check_free(out: Path, force: bool) -> None:
    """Raise where `out` cannot become a result folder, before any work is done.

    FileExistsError if it exists and is not empty without `force`; ValueError if it is no folder, or holds anything
    that a run of ours did not write: `force` replaces results, never other people's files.
    """
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise ValueError(f"--out {out}: exists and is not a folder")
    entries = {entry.name: entry for entry in out.iterdir()}
    foreign = sorted(set(entries) - _OURS)
    if CHECKPOINTS in entries and entries[CHECKPOINTS].is_dir():
        foreign += sorted(f"{CHECKPOINTS}/{p.name}" for p in entries[CHECKPOINTS].iterdir() if p.suffix != ".pt")
    if entries and not force:
        raise FileExistsError(f"--out {out}: exists; --force replaces the results in it")
    if foreign:
        raise ValueError(
            f"--out {out}: holds {', '.join(foreign[:3])}, not written by a run; --force leaves such folders"
        )


@contextmanager
def new_folder(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes when it does not (Ctrl-C too)."""
    check_free(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename stays on one file system and is atomic.
    work = out.parent / f".{out.name}.partial-{secrets.token_hex(6)}"
    try:
        # Inside the try: a Ctrl-C between making the folder and entering the block left it behind.
        work.mkdir()
        yield work
        check_free(out, force)
        if out.exists():
            old = work.with_name(work.name.replace("partial", "old"))
            out.rename(old)
            work.rename(out)
            shutil.rmtree(old)
        else:
            work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary sibling, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (a NaN is an error: it would not load elsewhere)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json of a result folder. Raises FileNotFoundError or ValueError naming the file."""
    path = run_dir / SUMMARY
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir}: not a result folder (no {SUMMARY})")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("variants"), list):
        raise ValueError(f"{path}: not the summary of a run")
    return summary


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, one per epoch and phase. Raises FileNotFoundError or ValueError naming the file."""
    path = run_dir / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir}: not a result folder (no {METRICS})")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: not a file of JSON lines: {error}") from error
