"""The epoch records of a run as files: metrics.jsonl always, TensorBoard events where asked for."""

import json
from pathlib import Path
from typing import Any

from ltkernels.train import rundir


def require(log: str) -> None:
    """Raise ImportError naming the package where TensorBoard is asked for and missing: before anything is written."""
    if log == "tensorboard":
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError("--log tensorboard needs the package: pip install tensorboard") from error


class Logs:
    """Appends a line an epoch; `rewrite` puts a resumed run's file back to the epochs that its checkpoints hold (TensorBoard
    keeps the later of two values of one epoch by itself)."""

    def __init__(self, folder: Path, log: str = "none") -> None:
        self._path, self._writer = folder / rundir.METRICS, None
        require(log)
        if log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / rundir.TENSORBOARD))

    def rewrite(self, records: list[dict[str, Any]]) -> None:
        rundir.write_text(self._path, "".join(json.dumps(record) + "\n" for record in records))

    def append(self, record: dict[str, Any]) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            # A full disk shows when the line is flushed, where Python no longer says which file it was.
            raise OSError(error.errno, f"{self._path} could not be written: {error.strerror}") from error
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{record['phase']}/{name}", value, record["epoch"])
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
