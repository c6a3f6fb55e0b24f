"""timm: a Module of `ltkernels.nn` as the criterion of a ``ClassificationTask``, mixup and CutMix included.

from ltkernels.integrations.timm import Criterion

task = ClassificationTask(model, criterion=Criterion(ltk.nn.LDAM(class_counts)), ...)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn import AdjustedCrossEntropy


class Criterion(torch.nn.Module):
    """A loss for timm's targets: class indices (N,), or the dense (N, C) targets of ``timm.data.Mixup``.

    A dense target of mixup or CutMix is two labels and their share, which is what the fused losses take in one read of the logits,
    margins and row scales included (class probabilities have no label to choose them by). So the two labels are read back from the
    target: its two largest entries.

    Args:
        loss: any Module of `ltkernels.nn`. Smoothing belongs to it (``label_smoothing=``), not to ``Mixup``.

    Raises:
        ValueError: a dense target with more than two classes in a row, as label smoothing of ``Mixup`` makes it (checked on the CPU
            only: a GPU would have to be waited for).
    """

    def __init__(self, loss: AdjustedCrossEntropy) -> None:
        super().__init__()
        if not isinstance(loss, AdjustedCrossEntropy):
            raise TypeError(f"loss is {type(loss).__name__}; it must be a Module of ltkernels.nn")
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor, *, grad_scale: Tensor | float | None = None) -> Tensor:
        """The loss of logits (N, C) and target (N,) or (N, C); `grad_scale` as in `ltkernels.functional.adjusted_cross_entropy`."""
        if not target.is_floating_point() or target.dim() < 2 or target.shape[1] == 1:
            return self.loss(logits, target, grad_scale=grad_scale)
        share, labels = target.float().topk(2, dim=1)
        total = share.sum(dim=1)
        if total.device.type == "cpu" and not torch.allclose(total, target.float().sum(dim=1), atol=1e-4):
            row = int((total - target.float().sum(dim=1)).abs().argmax())
            raise ValueError(
                f"target has more than two classes in row {row} (the two largest hold {float(total[row]):.4f}): give the "
                "label smoothing to the loss, and smoothing=0 to Mixup"
            )
        real = torch.float64 if logits.dtype == torch.float64 else torch.float32
        mixed = (labels[:, 0], labels[:, 1], (share[:, 0] / total).to(real))
        return self.loss(logits, mixed, grad_scale=grad_scale)
