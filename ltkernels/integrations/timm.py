"""timm: a Module of `ltkernels.nn` as the criterion of a ``ClassificationTask``, mixup and CutMix included.

from ltkernels.integrations.timm import Criterion

task = ClassificationTask(model, criterion=Criterion(ltk.nn.LDAM(class_counts)), ...)
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .. import _checks
from ..nn import AdjustedCrossEntropy


class Criterion(torch.nn.Module):
    """A loss for timm's targets: class indices (N,), or the dense (N, C) targets of ``timm.data.Mixup``.

    A dense target of mixup or CutMix is two labels and their share, which is what the fused losses take in one read of the logits,
    margins and row scales included (class probabilities have no label to choose them by). So the two labels are read back from the
    target, its two largest entries, and with them the smoothing that ``Mixup`` has put on every class: ``s / C``. The loss is then that of
    the two labels with ``label_smoothing=s``.

    Targets are checked on the CPU. On a GPU, which would have to be waited for, the first dense target alone is, and its smoothing is
    taken for that of the later ones.

    Args:
        loss: any Module of `ltkernels.nn`, with ``label_smoothing=0`` where `Mixup` smooths.
        smoothing: ``label_smoothing`` of ``Mixup``, in [0, 1); None reads it from the targets. Of two classes it cannot be read, and counts
            as 0.

    Raises:
        TypeError: a loss that is not of `ltkernels.nn`.
        ValueError: a dense target whose rows do not sum to 1 (multi-hot, empty), that has more than two classes above the smoothing in a
            row, or another smoothing than `smoothing`; a loss that smooths too.
    """

    def __init__(self, loss: AdjustedCrossEntropy, smoothing: float | None = None) -> None:
        super().__init__()
        if not isinstance(loss, AdjustedCrossEntropy):
            raise TypeError(
                f"loss is {type(loss).__name__}; it must be a loss of one output and one label a row, a subclass of "
                "ltkernels.nn.AdjustedCrossEntropy"
            )
        if smoothing is not None and _checks.number("smoothing", smoothing, low=0.0) >= 1.0:
            raise ValueError(f"smoothing is {smoothing!r}; it must be below 1")
        self.loss = loss
        self.smoothing = smoothing
        self._read: float | None = None  # of the first dense target on a GPU

    def forward(self, logits: Tensor, target: Tensor, *, grad_scale: Tensor | float | None = None) -> Tensor:
        """The loss of logits (N, C) and target (N,) or (N, C); `grad_scale` as in `ltkernels.functional.adjusted_cross_entropy`."""
        if not target.is_floating_point() or target.dim() < 2 or target.shape[1] == 1:
            return self.loss(logits, target, grad_scale=grad_scale)
        dense = target.float()
        smoothing = self._smoothing(dense, 4 * torch.finfo(target.dtype).eps)
        share, labels = dense.topk(2, dim=1)
        share = share - smoothing / target.shape[1]
        first, second = labels[:, 0], labels[:, 1]
        second = torch.where(share[:, 1] > 0, second, first)  # any class is the second largest of a row of one label
        real = torch.float64 if logits.dtype == torch.float64 else torch.float32
        mixed = (first, second, (share[:, 0] / share.sum(dim=1)).clamp(0, 1).to(real))
        loss = self.loss
        if smoothing > 0:
            if loss.label_smoothing > 0 or loss.smoothing is not None:
                own = loss.label_smoothing if loss.smoothing is None else "a table"
                raise ValueError(
                    f"target carries a smoothing of {smoothing:.4g}, and the loss has label_smoothing {own}: "
                    "one of the two must be 0"
                )
            loss = copy.copy(loss)  # the same buffers, so that what the loss counts it goes on counting
            loss.label_smoothing = smoothing
        return loss(logits, mixed, grad_scale=grad_scale)

    def _smoothing(self, dense: Tensor, rounding: float) -> float:
        if dense.device.type != "cpu":
            if self._read is None:
                self._read = self._judged(dense.cpu(), rounding)
            return self._read
        return self._judged(dense, rounding)

    def _judged(self, dense: Tensor, rounding: float) -> float:
        """The smoothing s of targets that are two labels and ``s / C`` on every class."""
        classes = dense.shape[1]
        rows = dense.movedim(1, -1).reshape(-1, classes)
        if len(rows) == 0:
            return self.smoothing or 0.0
        total = rows.sum(dim=1)
        wrong = ~((total - 1).abs() <= 1e-4 + rounding) | (rows < 0).any(dim=1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"target sums to {float(total[row]):.4g} in row {row}, least {float(rows[row].min()):.4g}: a dense target must be "
                "the shares of two labels, not below 0 and 1 in all (multi-hot targets have no such loss)"
            )
        rest = rows.sort(dim=1, descending=True).values[:, 2:]
        s = self.smoothing
        if s is None:
            s = float(rest.median()) * classes if rest.numel() else 0.0
            s = s if s > 1e-6 else 0.0
        off = (rest - s / classes).abs()
        if rest.numel() and (off * classes > 1e-4 + rounding * s).any():
            row = int(off.amax(dim=1).argmax())
            held = float(rows[row].topk(2).values.sum())
            raise ValueError(
                f"target has more than two classes in row {row} (the two largest hold {held:.4f}, the others "
                f"{float(rest[row].min()):.4g} to {float(rest[row].max()):.4g}): smoothing puts the same on every class of every row"
                + (f", {s / classes:.4g} for a smoothing of {s:.4g}" if s else "")
            )
        return s
