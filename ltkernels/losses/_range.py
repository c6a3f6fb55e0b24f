"""Whether the logits of a margin loss can be cosines: a mistake that trains badly without a word."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .._watch import direct

_FAR = 1.5  # cosines go up to 1; a 16-bit one may be rounded a little above


class CosineRange:
    """Looks at the logits of calls 1, 2, 4, 8, ... until it has warned: a head that starts small leaves [-1, 1] later.

    On a GPU nothing waits: the largest logit comes over behind the kernels, and a later call reads it if it is there.
    """

    def __init__(self, loss: str) -> None:
        self._loss = loss
        self._calls = 0
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CosineRange, (self._loss,)  # an event is of its process

    def look(self, logits: Tensor) -> None:
        self._calls += 1
        if self._calls & (self._calls - 1) == 0 and self._calls > 0:
            self._judge(logits)

    def _judge(self, logits: Tensor) -> None:
        if (
            not isinstance(logits, Tensor)
            or not logits.numel()
            or not logits.is_floating_point()
            or not direct((logits,))
        ):
            return
        if logits.is_cpu:
            self._say(_largest(logits))
        elif logits.is_cuda and not torch.cuda.is_current_stream_capturing():
            if self._coming is not None and self._coming[1].query():
                self._say(self._coming[0])
            arrived = torch.empty((), dtype=torch.float32, pin_memory=True)
            arrived.copy_(_largest(logits), non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(logits.device))
            self._coming = arrived, event

    def _say(self, largest: Tensor) -> None:
        if largest.item() > _FAR:
            self._calls = -(2**62)  # never again
            warnings.warn(
                f"{self._loss} got a logit of magnitude {largest.item():.3g}: it takes cosines, in [-1, 1], and multiplies them by its own "
                "temperature. Give it a cosine head (ltkernels.nn.CosineLinear)",
                stacklevel=8,
            )


@torch.no_grad()
def _largest(logits: Tensor) -> Tensor:
    """() the largest magnitude that is a number: -inf masks a class."""
    return torch.nan_to_num(logits.detach(), nan=0.0, posinf=0.0, neginf=0.0).abs().amax().float()
