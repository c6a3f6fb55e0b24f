"""What a training gives, and where a job leaves it: plain records that the stages pass on."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ltkernels.losses import Loss
from ltkernels.train.checkpoint import StateStore
from ltkernels.train.engine import Fit
from ltkernels.train.logs import Logs
from ltkernels.train.models import Classifier
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
