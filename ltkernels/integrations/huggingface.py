"""Hugging Face Transformers: a Module of `ltkernels.nn` as the Trainer's loss.

from ltkernels.integrations.huggingface import compute_loss_func

trainer = Trainer(model, args, compute_loss_func=compute_loss_func(ltk.nn.LogitAdjustedCrossEntropy(class_counts)), ...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..nn import AdjustedCrossEntropy


def compute_loss_func(loss: AdjustedCrossEntropy) -> Callable[..., Tensor]:
    """The function that ``transformers.Trainer(compute_loss_func=...)`` calls with ``(outputs, labels, num_items_in_batch)``.

    Under gradient accumulation and data parallelism the Trainer says how many labels there are in all micro-batches together, and
    the loss is then the sum over the rows divided by that number: exactly ``reduction="batch_mean"`` of the whole batch, however it
    was split. Where it says nothing, the loss' own reduction holds. A weighted ``"mean"`` would need the whole batch' sum of weights,
    which the Trainer does not tell: with class weights use ``reduction="batch_mean"``.

    Args:
        loss: any Module of `ltkernels.nn` with ``reduction="mean"`` (without class weights) or ``"batch_mean"``, and
            ``ignore_index=-100``, which is what the Trainer counts by.

    Returns:
        A function of outputs (with ``logits``, as attribute, key or first entry), labels and num_items_in_batch (a number, a 0-dim
        tensor or None). Logits are (N, C) with labels (N,), (N, T, C) with labels (N, T) as token classifiers give them, or (N, C, H,
        W) with labels (N, H, W) as segmentation models do, and further dimensions likewise.

    Raises:
        TypeError: `loss` is no such Module. ValueError: another reduction, a weighted mean, or another ignore_index; later, labels that
            are no class indices in one of these shapes.
    """
    if not isinstance(loss, AdjustedCrossEntropy):
        raise TypeError(
            f"loss is {type(loss).__name__}; it must be a loss of one output and one label a row, a subclass of "
            "ltkernels.nn.AdjustedCrossEntropy"
        )
    if loss.reduction not in ("mean", "batch_mean"):
        raise ValueError(f"loss.reduction is {loss.reduction!r}; it must be 'mean' or 'batch_mean'")
    _unweighted(loss)
    if loss.ignore_index != -100:
        raise ValueError(f"loss.ignore_index is {loss.ignore_index}; the Trainer counts the labels that are not -100")

    def function(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        if labels is None:
            raise ValueError("labels is None; the batch must have labels")
        _unweighted(loss)  # a schedule may have brought weights since
        logits, labels = _rows(_logits(outputs), labels)
        if any(buffer.device != logits.device for buffer in loss.buffers()):
            loss.to(logits.device)
        own = loss(logits, labels)
        if num_items_in_batch is None:
            return own
        here = (labels != -100).sum()
        # A micro-batch of ignored labels alone has the mean 0 / 0.
        return torch.where(here > 0, own, 0.0) * (here / num_items_in_batch)

    return function


def _unweighted(loss: AdjustedCrossEntropy) -> None:
    if loss.reduction == "mean" and loss.weight is not None:
        raise ValueError("loss has class weights and reduction='mean'; use reduction='batch_mean' with the Trainer")


def _rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, C) and (rows,). Where the classes are is told by the number of dimensions, never by sizes that may be equal by chance."""
    if labels.is_floating_point():
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; they must be class indices: what the Trainer counts and "
            "divides by is labels"
        )
    dense = logits.dim() > 3
    expected = (*logits.shape[:1], *logits.shape[2:]) if dense else tuple(logits.shape[:-1])
    if labels.shape != expected:
        hint = "; bring the logits to the labels' size" if dense and labels.dim() == len(expected) else ""
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; logits of shape {tuple(logits.shape)} need labels {expected}{hint}"
        )
    if dense:
        logits = logits.movedim(1, -1)
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, dict):  # a ModelOutput is one
        if "logits" not in outputs:
            raise ValueError(f"outputs has the keys {sorted(outputs)}; it must have 'logits'")
        return outputs["logits"]  # type: ignore[no-any-return]
    if isinstance(outputs, Tensor):
        return outputs
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]  # type: ignore[no-any-return]
