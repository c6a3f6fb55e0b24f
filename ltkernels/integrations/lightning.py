"""Lightning: schedules of `ltkernels.schedules` as callbacks, saved and restored with the checkpoint.

from ltkernels.integrations.lightning import ScheduleCallback

trainer = Trainer(callbacks=[ScheduleCallback(ltk.schedules.DRW(module.loss, start=160))], ...)
"""

from __future__ import annotations

from typing import Any

from ..schedules import Schedule

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError:
        raise ImportError("ltkernels.integrations.lightning needs Lightning: pip install lightning") from None


class ScheduleCallback(Callback):  # type: ignore[misc]
    """Steps a schedule at the start of every training epoch.

    The state dict holds the schedule's state: a checkpoint made with other counts, start or options is refused with ValueError.

    Args:
        schedule: from `ltkernels.schedules`; made before ``torch.compile``.
    """

    def __init__(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule is {type(schedule).__name__}; it must be a schedule of ltkernels.schedules")
        self.schedule = schedule

    @property
    def state_key(self) -> str:
        return f"ltkernels.{type(self.schedule).__name__}"

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.schedule.step(trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict)
