"""The epoch records of a run as files: metrics.jsonl always, metrics.csv and TensorBoard events where asked for."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from ltkernels.train import rundir

KINDS = ("csv", "tensorboard")


def parse_logs(text: str) -> list[str]:
    """`"csv,tensorboard"` -> ["csv", "tensorboard"]. Raises ValueError naming the value."""
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"log must be csv, tensorboard or both, got {text!r}")
    return kinds


def require(kinds: list[str]) -> None:
    """Raise ImportError naming the package where TensorBoard is asked for and missing: before anything is written."""
    if "tensorboard" in kinds:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError("--log tensorboard needs the package: pip install tensorboard") from error


class Logs:
    """Appends a line an epoch; `rewrite` puts a resumed run's files back to the epochs that its checkpoints hold."""

    def __init__(self, folder: Path, kinds: list[str]) -> None:
        self._folder, self._csv = folder, "csv" in kinds
        self._writer = None
        require(kinds)
        if "tensorboard" in kinds:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / rundir.TENSORBOARD))

    def rewrite(self, records: list[dict[str, Any]]) -> None:
        """Make the files hold exactly `records` (TensorBoard keeps the later of two values of one epoch by itself)."""
        rundir.write_text(self._folder / rundir.METRICS, "".join(json.dumps(record) + "\n" for record in records))
        if self._csv:
            header = list(records[0]) if records else []
            text = "".join(_csv_line(row) for row in ([header] if header else []) + [list(r.values()) for r in records])
            rundir.write_text(self._folder / rundir.METRICS_CSV, text)

    def append(self, record: dict[str, Any]) -> None:
        self._add(self._folder / rundir.METRICS, json.dumps(record) + "\n")
        if self._csv:
            path = self._folder / rundir.METRICS_CSV
            new = not path.exists() or path.stat().st_size == 0
            self._add(path, (_csv_line(list(record)) if new else "") + _csv_line(list(record.values())))
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{record['phase']}/{name}", value, record["epoch"])
            self._writer.flush()

    @staticmethod
    def _add(path: Path, text: str) -> None:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            # A full disk shows when the line is flushed, where Python no longer says which file it was.
            raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _csv_line(values: list[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
