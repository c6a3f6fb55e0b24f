"""From settings to the loss with its schedule: the glue between the command line's names and `ltkernels.schedules`."""

from collections.abc import Sequence

import torch
from torch import nn

from ltkernels import schedules
from ltkernels._names import did_you_mean, plain
from ltkernels.losses import LOSSES, Loss

# The published recipes of 200 epochs defer to epoch 160; KPS adjusts gradients from epoch 120 on.
_LATE, _GA = 0.8, 0.6
# Share of the epochs after which a schedule sets in; `drs` is a matter of the sampler.
SCHEDULES: dict[str, float | None] = {"none": None, "drw": _LATE, "drs": _LATE, "ga": _GA, "tla_adrw": _LATE}


def loss_name(name: str) -> str:
    """The command-line name of a loss that is spelled so, or as its class is, in any capitals; else `name` as it is."""
    spelled = {plain(known): known for known in LOSSES} | {plain(loss.__name__): key for key, loss in LOSSES.items()}
    return spelled.get(plain(name), name)


def loss_record(name: str) -> Loss:
    """The record of a loss by its command-line name. Raises ValueError listing the known names."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}{did_you_mean(name, LOSSES)}; known: {', '.join(LOSSES)}")
    return LOSSES[name]


def parse_options(text: str) -> dict[str, float]:
    """`"tau=1.25,gamma=0.15"` -> {"tau": 1.25, "gamma": 0.15}. Raises ValueError naming the value."""
    options = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        try:
            options[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not (equals and name.strip()):
            raise ValueError(f"loss_options must be NAME=NUMBER,..., got {text!r}")
    return options


def start_epoch(schedule: str, start: int | None, epochs: int) -> int | None:
    """The first epoch (from 0) of a schedule's second part; None for `none`. Raises ValueError where it never comes."""
    share = SCHEDULES[schedule]
    if share is None:
        return None
    first = int(share * epochs) if start is None else start
    if first >= epochs:
        raise ValueError(
            f"schedule_start {first} is not below the number of epochs, {epochs}: {schedule} would never start"
        )
    return first


def build_loss(
    record: Loss,
    class_counts: Sequence[int],
    options: dict[str, float],
    schedule: str,
    start: int | None,
    nu: float,
    device: torch.device | str,
) -> tuple[nn.Module, list[schedules.Schedule]]:
    """The loss for these class counts, on `device`, and what changes its tables from epoch `start` on.

    Raises ValueError for an option that the loss does not have, TypeError for a schedule that does not fit the loss.
    """
    known = [name for name in record.own_options if name != "empty"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"loss_options: {record.name} has no option {', '.join(unknown)}; known: {', '.join(known) or 'none'}"
        )
    # A flag is written as 0 or 1.
    flags = {name for name in options if isinstance(record.own_options[name].default, bool)}
    typed = {name: bool(value) if name in flags else value for name, value in options.items()}
    criterion = record.make(class_counts, **typed).to(device)
    if schedule == "drw":
        return criterion, [schedules.DRW(criterion, start, class_counts=class_counts)]
    if schedule == "ga":
        return criterion, [schedules.GradientAdjustment(criterion, start)]
    if schedule == "tla_adrw":
        return criterion, [schedules.TLA(criterion, start, nu)]
    return criterion, []
