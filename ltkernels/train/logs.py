"""The epoch records of a run: metrics.jsonl always, and whatever else listens: objects of the user's, or a log by name."""

import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ltkernels.train import rundir
from ltkernels.train.checkpoint import PhaseStore
from ltkernels.train.signals import Stop


class Callback:
    """What happens along a run; a subclass, or any object with these methods, goes to `train(callbacks=[...])`.

    `on_start(settings)` comes once the settings are resolved, `on_epoch(record)` with every line of metrics.jsonl, `on_end(summary)`
    at the end, with None where the run was stopped or failed. Of the processes of torchrun, the first calls them.
    """

    def on_start(self, settings: dict[str, Any]) -> None:
        pass

    def on_epoch(self, record: dict[str, Any]) -> None:
        pass

    def on_end(self, summary: dict[str, Any] | None) -> None:
        pass


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {f"{record['phase']}/{name}": value for name, value in record.items() if isinstance(value, float)}


class _TensorBoard(Callback):
    """Events in the folder tensorboard/; of two values of one epoch (a resumed run) it shows the later."""

    def __init__(self, folder: Path, module: Any) -> None:
        self._writer = module.SummaryWriter(str(folder / rundir.TENSORBOARD))

    def on_epoch(self, record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def on_end(self, summary: dict[str, Any] | None) -> None:
        self._writer.close()


class _Wandb(Callback):
    """A run of Weights & Biases in the folder wandb/, offline where WANDB_MODE does not say otherwise; `wandb sync` sends it."""

    def __init__(self, folder: Path, module: Any) -> None:
        mode = os.environ["WANDB_MODE"]
        self._run = module.init(project="ltkernels", name=folder.name, dir=str(folder), mode=mode)

    def on_start(self, settings: dict[str, Any]) -> None:
        self._run.config.update(settings)

    def on_epoch(self, record: dict[str, Any]) -> None:
        self._run.log({**_numbers(record), "epoch": record["epoch"]})

    def on_end(self, summary: dict[str, Any] | None) -> None:
        for name in ("balanced_accuracy", "top1") if summary else ():
            self._run.summary[name] = summary[name]
        self._run.finish(exit_code=0 if summary else 1)


class _MLflow(Callback):
    """A run of MLflow in the folder mlflow/, or at MLFLOW_TRACKING_URI. By a client of its own: nothing global changes."""

    def __init__(self, folder: Path, module: Any) -> None:
        place = (folder / rundir.MLFLOW).resolve()
        # It remembers the folders that it made: in one that --force has replaced, it misses this.
        (place / ".trash").mkdir(parents=True, exist_ok=True)
        self._client = module.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", place.as_uri()))
        found = self._client.get_experiment_by_name("ltkernels")
        experiment = found.experiment_id if found else self._client.create_experiment("ltkernels")
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id

    def on_start(self, settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            if value is not None:
                self._client.log_param(self._run, name, value)

    def on_epoch(self, record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self._client.log_metric(self._run, name, value, step=record["epoch"])

    def on_end(self, summary: dict[str, Any] | None) -> None:
        for name in ("balanced_accuracy", "top1") if summary else ():
            self._client.log_metric(self._run, name, summary[name])
        self._client.set_terminated(self._run, "FINISHED" if summary else "KILLED")


# (class, module, what its environment says where the user's does not: before it is imported, and for the network nothing)
_LOGS: dict[str, tuple[Callable[[Path, Any], Callback], str, dict[str, str]]] = {
    "tensorboard": (_TensorBoard, "torch.utils.tensorboard", {}),
    "wandb": (_Wandb, "wandb", {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}),
    # MLflow 3 asks for a word before it writes files.
    "mlflow": (_MLflow, "mlflow", {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}),
}


def require(log: str) -> Any:
    """The module of a log; ImportError names the package where it is missing. None for `none`."""
    if log not in _LOGS:
        return None
    _, module, environment = _LOGS[log]
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"--log {log} needs the package: pip install {log}") from error


def named(log: str, folder: Path) -> list[Callback]:
    """The log of that name, which writes into a run's folder; of `none` none."""
    module = require(log)
    return [] if module is None else [_LOGS[log][0](folder, module)]


class Journal:
    """What a job tells while it runs (each epoch to metrics.jsonl in its folder, to callbacks and to a progress, see `engine.Progress`),
    and what its trainings ask of it: the store of a phase's checkpoints, and the signal that stops them. Of nothing given: nobody.

    Attributes:
        records: the lines of metrics.jsonl. seconds: training time of earlier processes, which checkpoints brought back.
    """

    def __init__(
        self,
        progress: Callable[..., None] | None = None,
        callbacks: Sequence[Callback] = (),
        folder: Path | None = None,
        store: Callable[[str], PhaseStore | None] = lambda phase: None,
        stop: Stop | None = None,
    ) -> None:
        self.progress, self.on_step = progress, getattr(progress, "step", None)
        self.callbacks, self.store, self.stop = callbacks, store, stop or Stop()
        self._path = None if folder is None else folder / rundir.METRICS
        self.records: list[dict[str, Any]] = []
        self.seconds = 0.0

    def epoch(self, phase: str, done: int, total: int, record: dict[str, Any]) -> None:
        """`done` of `total` epochs of a phase are done, the last with this record."""
        self.records.append(record)
        if self._path is not None:
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                # A full disk shows when the line is flushed, where Python no longer says which file it was.
                raise OSError(error.errno, f"{self._path} could not be written: {error.strerror}") from error
        for callback in self.callbacks:
            callback.on_epoch(record)
        self.done(phase, done, total, record)

    def done(self, phase: str, done: int, total: int, record: dict[str, Any] | None = None) -> None:
        """So much of a phase is done, which may count other things than epochs."""
        if self.progress:
            self.progress(phase, done, total, record or {})

    def restored(self, records: list[dict[str, Any]], seconds: float) -> None:
        """A checkpoint brought back the records of its epochs, and the time they took."""
        self.records += records
        self.seconds += seconds
        self.rewrite()

    def rewrite(self) -> None:
        """Put metrics.jsonl to the epochs that are known."""
        if self._path is not None:
            rundir.write_text(self._path, "".join(json.dumps(record) + "\n" for record in self.records))

    @contextmanager
    def told(self, settings: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Tell callbacks of a job's start and end; gives what to call with its summary."""
        ended: list[dict[str, Any]] = []
        try:
            for callback in self.callbacks:
                callback.on_start(settings)
            yield ended.append
        finally:
            for callback in self.callbacks:
                callback.on_end(ended[0] if ended else None)
