"""Schedules: change the vectors of a loss at an epoch, in place.

A schedule makes every buffer it needs when it is constructed; `step` only copies into them. Compiled code and CUDA graphs that read
the buffers go on working, without recompilation. Construct the schedule before ``torch.compile`` and before loading a state dict.

    loss = ltk.nn.LDAM(class_counts)
    schedule = ltk.schedules.DRW(loss, start=160)
    for epoch in range(200):
        schedule.step(epoch)
        ...
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from . import _checks, adjustments, nn
from .losses._adjustment import NEUTRAL


class Schedule:
    """Two sets of tables for one loss: one before epoch `start`, one from it on.

    Args:
        loss: the Module whose buffers change.
        start: first epoch (counted from 0) of the second set.
        class_counts: (C,) integers that the tables are made of.
        before, after: tables by buffer name; both name the same buffers, (C,) each.
        options: what else the tables depend on; kept in the state dict.
    """

    def __init__(
        self,
        loss: nn.AdjustedCrossEntropy,
        start: int,
        class_counts: _checks.ClassCounts,
        before: dict[str, Tensor],
        after: dict[str, Tensor],
        options: dict[str, Any],
    ) -> None:
        self.loss = loss
        self.start = _epoch("start", start)
        self.options = options
        self._class_counts = _checks.count_list(class_counts)
        self._before, self._after = before, after
        device = next((buffer.device for buffer in loss.buffers()), torch.device("cpu"))
        for name, table in before.items():
            buffer = getattr(loss, name)
            if isinstance(buffer, torch.nn.Parameter):
                raise ValueError(f"loss learns its {name} (learnable); {type(self).__name__} sets it itself")
            if buffer is None:
                loss.register_buffer(name, torch.full_like(table, NEUTRAL[name], dtype=torch.float32, device=device))
            elif buffer.shape != table.shape:
                raise ValueError(f"class_counts has {len(table)} entries; the loss' {name} has {len(buffer)}")
        self.step(0)

    @property
    def active(self) -> bool:
        """Whether the second set of tables is in place."""
        return self.epoch >= self.start

    @torch.no_grad()
    def step(self, epoch: int) -> None:
        """Puts the tables of `epoch` (counted from 0) in place. Depends on `epoch` alone, not on earlier calls."""
        self.epoch = _epoch("epoch", epoch)
        for name, table in (self._after if self.active else self._before).items():
            getattr(self.loss, name).copy_(table)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, in plain Python values."""
        return {
            "schedule": type(self).__name__,
            "epoch": self.epoch,
            "start": self.start,
            "class_counts": list(self._class_counts),
            "options": dict(self.options),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the saved epoch, with the tables of it in place.

        Raises ValueError where the state is of another schedule, start, counts or options: its tables would be others.
        """
        for name, own in self.state_dict().items():
            if name not in state:
                raise ValueError(f"the schedule's state has no {name!r}")
            if name != "epoch" and state[name] != own:
                raise ValueError(f"the state's {name} is {state[name]!r}; this schedule was made with {own!r}")
        self.step(state["epoch"])


class DRW(Schedule):
    """Deferred re-weighting, Cao et al. 2019 (arXiv:1906.07413), algorithm 1: class-balanced weights from epoch `start` on, none before.

    Args:
        loss: a Module of `ltkernels.nn` without class weights of its own.
        start: epoch, counted from 0, of the first weighted step; the paper takes 160 of 200.
        beta: of `ltkernels.adjustments.class_balanced`; None for weights ``1 / n``.
        class_counts: (C,) integers; None takes those that the loss was made with.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it weight 0.
    """

    def __init__(
        self,
        loss: nn.AdjustedCrossEntropy,
        start: int = 160,
        beta: float | None = 0.9999,
        *,
        class_counts: _checks.ClassCounts | None = None,
        empty: str = "error",
    ) -> None:
        counts = _counts_of(loss, class_counts)
        _no_weight(loss, "DRW")
        weight = adjustments.class_balanced(counts, beta, empty=empty)._asdict()["weight"]
        before = {"weight": torch.ones_like(weight)}
        super().__init__(loss, start, counts, before, {"weight": weight}, {"beta": beta})


class GradientAdjustment(Schedule):
    """Gradient adjustment of KPS, Li, Cheung and Hu 2022 (doi:10.1109/TPAMI.2022.3196044): from epoch `start` on the temperature of a
    row grows with the rarity of its label. Scale ``s r`` and margin ``s m`` become scale ``r``, margin ``m`` and row scale
    ``clamp(s log(50 n_max / n) / log 50, s, 50)``.

    Args:
        loss: an `ltkernels.nn.KPS` with ``gradient_adjustment=False``; its counts and options are used.
        start: epoch, counted from 0; the paper takes 120 of 200.
    """

    def __init__(self, loss: nn.AdjustedCrossEntropy, start: int = 120) -> None:
        if not isinstance(loss, nn.KPS) or loss.options["gradient_adjustment"]:
            raise TypeError(
                f"loss is {_name(loss)}; GradientAdjustment needs an ltkernels.nn.KPS without gradient adjustment"
            )
        counts = _counts_of(loss, None)
        names = ("scale", "margin", "row_scale")
        first = adjustments.kps(counts, **loss.options)._asdict()
        second = adjustments.kps(counts, **{**loss.options, "gradient_adjustment": True})._asdict()
        before = {**first, "row_scale": torch.ones_like(first["scale"])}
        super().__init__(
            loss,
            start,
            counts,
            {name: before[name] for name in names},
            {name: second[name] for name in names},
            dict(loss.options),
        )


class TLA(Schedule):
    """Truncated logit adjustment with aligned deferred re-weighting (VS + ADRW + TLA), Wang et al. 2023 (arXiv:2310.04752): from
    epoch `start` on the VS loss drops its multiplicative scale and weighs classes by ``pi^-nu``; the log prior stays.

    Args:
        loss: an `ltkernels.nn.VectorScaling`; its counts and options are used.
        start: epoch, counted from 0.
        nu: exponent of the weights, which are scaled to sum to the number of non-empty classes; 0 leaves them 1.
    """

    def __init__(self, loss: nn.AdjustedCrossEntropy, start: int = 160, nu: float = 1.0) -> None:
        if not isinstance(loss, nn.VectorScaling):
            raise TypeError(f"loss is {_name(loss)}; TLA needs an ltkernels.nn.VectorScaling")
        _no_weight(loss, "TLA")
        nu = _checks.number("nu", nu)
        counts = _counts_of(loss, None)
        checked = _checks.class_counts(counts, loss.options["empty"])
        weight = ((checked.n / checked.total) ** -nu).masked_fill(checked.empty, 0.0)
        weight = (weight * (int((~checked.empty).sum()) / weight.sum())).float()
        scale = adjustments.vector_scaling(counts, **loss.options)._asdict()["scale"]
        before = {"scale": scale, "weight": torch.ones_like(weight)}
        after = {"scale": torch.ones_like(scale), "weight": weight}
        super().__init__(loss, start, counts, before, after, {**loss.options, "nu": nu})


def _epoch(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if value < 0:
        raise ValueError(f"{name} is {value}; epochs count from 0")
    return int(value)


def _name(loss: object) -> str:
    return type(loss).__name__


def _counts_of(loss: nn.AdjustedCrossEntropy, given: _checks.ClassCounts | None) -> list[int]:
    if not isinstance(loss, nn.AdjustedCrossEntropy):
        raise TypeError(f"loss is {_name(loss)}; it must be a Module of ltkernels.nn")
    own = None if loss.class_counts is None else loss.class_counts.tolist()
    if given is None:
        if own is None:
            raise ValueError(f"class_counts is None, and {_name(loss)} was made without class counts")
        return own
    _checks.class_counts(given, "ignore")
    counts = _checks.count_list(given)
    if own is not None and counts != own:
        raise ValueError(f"class_counts is {counts}; the loss was made with {own}")
    return counts


def _no_weight(loss: nn.AdjustedCrossEntropy, schedule: str) -> None:
    if loss.weight is not None:
        raise ValueError(
            f"loss has class weights (weight is {loss.weight.tolist()[:6]}...); {schedule} sets them itself"
        )


__all__ = ["DRW", "TLA", "GradientAdjustment", "Schedule"]
