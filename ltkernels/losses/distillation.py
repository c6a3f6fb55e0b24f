"""Distillation: the student's softmax towards the teacher's, which is formed in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backends, _checks
from .._call import NONE
from .._errors import ArgumentError, DTypeError
from .._watch import transforms
from . import _soft
from ._door import as_rows


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    detach_teacher: bool = True,
) -> Tensor:
    r"""Distillation with a temperature, Hinton et al. 2015 (arXiv:1503.02531): a row's loss is

    .. math::
        l_i = T^2 \, \mathrm{KL}(\mathrm{softmax}(t_i / T) \,\|\, \mathrm{softmax}(a_i / T)), \quad a_{ij} = \beta_j z_{ij} + \delta_j

    and the gradient with respect to z is ``T beta (p - q)`` at these two softmaxes p and q. A mean divides by the rows; the ``"mean"`` of
    `torch.nn.functional.kl_div` divides by rows times classes, and its ``"batchmean"`` by the rows. Neither softmax exists as a matrix.

    Args:
        logits: (N, C), (C,) or (N, C, d1, ...) of the student; float32, float64, bfloat16 or float16.
        teacher_logits: the same shape, any floating-point dtype.
        temperature: T, above 0.
        shift: (C,) delta, added to the student's logits; -inf removes a class (the loss is infinite where the teacher has it).
        scale: (C,) beta, multiplies the student's logits.
        sample_weight: a factor of each row's loss, in the shape of the class indices; 0 masks a row whose loss is finite.
        reduction: ``"mean"`` divides by the sum of the sample weights; ``"batch_mean"`` by the number of rows; ``"sum"``; ``"none"`` keeps
            the shape of the class indices.
        detach_teacher: whether the teacher is a constant for autograd. False gives it its gradient, by the plain torch reference.

    Returns:
        The loss, float64 for float64 logits and float32 for all others.

    A row of nothing but -inf, in either, gives NaN. On a GPU it is the CUDA kernel's or Triton's, as the losses are; gradients with
    respect to shift, scale and sample_weight are the plain torch reference's, and `ltkernels.explain` says so.

    Raises:
        ValueError: shapes or devices that do not fit, a temperature that is not above 0, a table or weight that is not finite.
        TypeError: a dtype that does not fit.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.5, -0.5]]), torch.tensor([[0.0, 1.0, 0.5]])
        >>> round(ltk.functional.distillation(student, teacher, 2.0).item(), 4)
        0.3321
    """
    inputs, soft, shape, _ = _checked(
        logits, teacher_logits, temperature, shift, scale, sample_weight, reduction, detach_teacher
    )
    loss = _soft.soft_targets(*inputs, soft)
    return loss if shape is None else loss.reshape(shape)


_Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, None, Tensor | None]


def _checked(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    shift: Tensor | None,
    scale: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    detach_teacher: bool,
) -> tuple[_Inputs, _soft.SoftTargets, torch.Size | None, str]:
    """The operator's arguments, the shape of an unreduced loss that is not (N,), and why the torch reference computes it, or empty."""
    _checks.logits(logits)
    if not isinstance(teacher_logits, Tensor):
        raise DTypeError(f"teacher_logits is {type(teacher_logits).__name__}; it must be a tensor")
    if not teacher_logits.is_floating_point():
        raise DTypeError(f"teacher_logits has dtype {teacher_logits.dtype}; it must be a floating-point tensor")
    if teacher_logits.shape != logits.shape:
        raise ArgumentError(
            f"teacher_logits has shape {tuple(teacher_logits.shape)}; it must have the logits' shape {tuple(logits.shape)}"
        )
    if teacher_logits.device != logits.device:
        raise ArgumentError(
            f"teacher_logits is on {teacher_logits.device}, logits on {logits.device}; both must be on one device"
        )
    temperature = _checks.number("temperature", temperature, above=0.0)
    code = _checks.reduction(reduction)
    size, device, real = logits.shape, logits.device, _checks.real_dtype(logits.dtype)
    classes = size[1 if len(size) > 1 else 0]
    if shift is not None:
        shift = _checks.table("shift", shift, classes, device, real)
    if scale is not None:
        scale = _checks.table("scale", scale, classes, device, real)
    whole = size[:1] + size[2:] if len(size) > 1 else size[:0]
    if sample_weight is not None:
        sample_weight = _checks.rows("sample_weight", sample_weight, whole, device, real).reshape(-1)
    teacher = teacher_logits.detach() if detach_teacher else teacher_logits
    inputs: _Inputs = (as_rows(logits), as_rows(teacher), shift, scale, None, sample_weight)
    name = _soft.learned(inputs)
    needs_torch = f"gradient with respect to {'teacher_logits' if name == 'target' else name}" if name else ""
    needs_torch = needs_torch or ("" if classes else "there is no class")
    backend = _backends.choose(None, device, needs_torch)
    soft = _soft.SoftTargets(0.0, temperature**2, temperature, code, backend)
    return inputs, soft, whole if code == NONE and len(size) != 2 else None, needs_torch


def _explain(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    detach_teacher: bool = True,
) -> _backends.Explanation:
    *_, needs_torch = _checked(
        logits, teacher_logits, temperature, shift, scale, sample_weight, reduction, detach_teacher
    )
    return _backends.explain(None, logits.device, needs_torch or transforms())


distillation.explain = _explain  # type: ignore[attr-defined]
