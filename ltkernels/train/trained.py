"""What a training gives, and where a job leaves it: plain records that the stages pass on."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ltkernels.losses import Loss
from ltkernels.train.checkpoint import StateStore, dump, undump, write_bytes
from ltkernels.train.engine import Fit
from ltkernels.train.logs import Logs
from ltkernels.train.models import Classifier
from ltkernels.train.rundir import SUMMARY
from ltkernels.train.schedules import loss_record
from ltkernels.train.signals import Stop


@dataclass(frozen=True)
class HeadSpec:
    """What a classifier's head is: `kind` linear or cosine, for a loss defined on `logits` (linear or cosine)."""

    kind: str
    logits: str
    shifted: bool = False


class Shifted(nn.Module):
    """A head with a constant added to its logits: post-hoc logit adjustment as part of the model."""

    def __init__(self, head: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("shift", shift)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features) + self.shift


@dataclass
class Trained:
    """One trained model with what its training recorded; `note` is kept in its entry of the summary."""

    name: str
    record: Loss
    head: HeadSpec
    model: Classifier
    fit: Fit
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """For the report: the loss's title, and what the name adds to the loss's name."""
        return " ".join([self.record.title, self.name.removeprefix(self.record.name).replace("-", " + ")]).strip()


@dataclass
class Files:
    """Where a job leaves what outlives it: checkpoints of its phases, and the logs. None: nowhere."""

    state: StateStore | None = None
    logs: Logs | None = None
    stop: Stop = field(default_factory=Stop)


def save_checkpoint(folder: Path, trained: Trained) -> str:
    """Write `NAME.pt`: plain tensors and strings, so that torch.load(weights_only=True) reads them. Returns its SHA-256."""
    state = {key: value.cpu() for key, value in trained.model.state_dict().items()}
    head = dataclasses.asdict(trained.head)
    content = dump({"format": 2, "loss": trained.record.name, "head": head, "state": state})
    write_bytes(folder / f"{trained.name}.pt", content)
    return hashlib.sha256(content).hexdigest()


def load_checkpoint(path: Path, sha256: str, build: Callable[[Loss, HeadSpec], Classifier], device: str) -> Classifier:
    """The model of a run's checkpoint, as `build` makes it for its loss and head.

    Raises FileNotFoundError or ValueError naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path}: damaged: it is not the file that the run wrote (checksum in {SUMMARY})")
    try:
        saved = undump(content, path, device)
        model = build(loss_record(saved["loss"]), HeadSpec(**saved["head"]))
        model.load_state_dict(saved["state"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint of this run: {str(error).splitlines()[0][:200]}") from error
    return model
