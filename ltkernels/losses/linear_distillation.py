"""Distillation of a student's head by a teacher's: of features and classifiers, so that neither logits matrix exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backends, _checks, _head
from .._call import NONE, Call
from .._errors import ArgumentError, DTypeError
from .._fused import Fused, Inputs, Request
from .._watch import is_dtensor, transforms, wants_gradient
from ..heads import check_chunk_rows, choose_chunk, operands
from . import _soft
from ._door import check_labels

_PLAIN = "give plain tensors, such as its to_local()"


class _Distilled(NamedTuple):
    """What stands beside the operands; the codes and names are those of `ltkernels._call.Call`."""

    temperature: float
    normalize: bool
    reduction: int
    chunk_rows: int
    backend: str


def linear_distillation(
    features: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor | None = None,
    temperature: float = 1.0,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    normalize: bool = False,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
) -> Tensor:
    r"""``distillation(F.linear(features, weight, bias), F.linear(teacher, teacher_weight, teacher_bias), temperature)`` without either
    matrix of logits: `ltkernels.functional.distillation` (Hinton et al. 2015, arXiv:1503.02531) of heads.

    Beside the gradients it allocates one chunk of `chunk_rows` x C logits of each side, and the gradient takes the student's. Only
    gradients of inputs that require them are computed. The teacher is a constant for autograd.

    Args:
        features: (..., D) of the student; float32, float64, bfloat16 or float16.
        weight: (C, D), its classifier, in the features' dtype.
        teacher: (..., E) features of the teacher; or, without `teacher_weight`, its logits (..., C). Any of the four dtypes.
        teacher_weight: (C, E), the teacher's classifier, in the dtype of `teacher`.
        temperature: T, above 0.
        bias, teacher_bias: (C,) each, in the dtype of their features.
        normalize: cosine classifier of the student: its logits are cosines (plus `bias`), as in
            `ltkernels.functional.linear_adjusted_cross_entropy`. Of a teacher with one give the unit vectors.
        shift, scale, reduction: as in `ltkernels.functional.distillation`: (C,), added to and multiplying the student's logits, and how
            rows are reduced; a mean divides by the rows, not by rows times classes.
        sample_weight: (...), a factor of each row's loss.
        chunk_rows: rows whose logits are held at a time; 0 holds all of them; None chooses: all where they are few, or no more than the
            features.

    Returns:
        The loss, float64 for float64 features and float32 for all others; (...) for ``reduction="none"``. On the CPU logits are formed in
        that dtype, whatever the teacher's; on a GPU as `torch.nn.functional.linear` forms them. Gradients are rounded once.

    Under autocast, float32 inputs are cast as `torch.nn.functional.linear` does. The plain torch reference, which holds the logits,
    computes second derivatives and gradients with respect to shift, scale and sample_weight; on a GPU the CUDA kernel or Triton's
    serves the chunks.

    Raises:
        ValueError: shapes or devices that do not fit, a temperature that is not above 0, a table or weight that is not finite.
        TypeError: a dtype that does not fit, a DTensor.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.5, -0.5]]), torch.tensor([[0.0, 1.0, 0.5]])
        >>> round(ltk.functional.linear_distillation(student, torch.eye(3), teacher, torch.eye(3), 2.0).item(), 4)
        0.3321
    """
    inputs, call, batch, _ = _checked(
        features, weight, teacher, teacher_weight, temperature, bias, teacher_bias, normalize, shift, scale, sample_weight,
        reduction, chunk_rows,
    )  # fmt: skip
    loss = _OPERATOR(inputs, call)[0]
    return loss.reshape(batch) if call.reduction == NONE else loss


def _checked(
    features: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    temperature: float,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    normalize: bool,
    shift: Tensor | None,
    scale: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    chunk_rows: int | None,
) -> tuple[Inputs, _Distilled, torch.Size, tuple[str, str]]:
    """The operator's arguments, the shape of the batch, why the torch reference computes the loss, or empty, and how the chunks came."""
    features, weight, bias = operands(features, weight, bias, ("features", "weight", "bias"), _PLAIN)
    if isinstance(teacher, Tensor) and teacher.device != features.device:
        raise ArgumentError(
            f"teacher is on {teacher.device}, features on {features.device}; both must be on one device"
        )
    if teacher_weight is None:
        if teacher_bias is not None:
            raise ArgumentError(
                "teacher_bias is given without teacher_weight: the teacher's logits have theirs in them"
            )
        _check_logits(teacher, features, weight.shape[0])
    else:
        names = ("teacher", "teacher_weight", "teacher_bias")
        teacher, teacher_weight, teacher_bias = operands(teacher, teacher_weight, teacher_bias, names, _PLAIN)
        if teacher_weight.shape[0] != weight.shape[0]:
            raise ArgumentError(
                f"teacher_weight has shape {tuple(teacher_weight.shape)}, weight {tuple(weight.shape)}; both must have one row a class"
            )
        if teacher.shape[:-1] != features.shape[:-1]:
            raise ArgumentError(
                f"teacher has shape {tuple(teacher.shape)}, features {tuple(features.shape)}; all dimensions but the last must be the same"
            )
    temperature = _checks.number("temperature", temperature, above=0.0)
    code = _checks.reduction(reduction)
    check_chunk_rows(chunk_rows)
    batch, device, real = features.shape[:-1], features.device, _checks.real_dtype(features.dtype)
    classes = weight.shape[0]
    if shift is not None:
        shift = _checks.table("shift", shift, classes, device, real)
    if scale is not None:
        scale = _checks.table("scale", scale, classes, device, real)
    if sample_weight is not None:
        sample_weight = _checks.rows("sample_weight", sample_weight, batch, device, real).reshape(-1).contiguous()
    features, teacher = (each.reshape(-1, each.shape[-1]) for each in (features, teacher.detach()))
    teacher_weight, teacher_bias = (each if each is None else each.detach() for each in (teacher_weight, teacher_bias))
    inputs = (features, weight, bias, teacher, teacher_weight, teacher_bias, shift, scale, sample_weight)
    name = _learned(inputs)
    needs_torch = f"gradient with respect to {name}" if name else ""
    backend = _backends.choose(None, device, needs_torch)
    if backend == "torch":
        chunk_rows, reason = 0, "the torch backend has no chunks"
    elif chunk_rows is None:
        chunk_rows, reason = choose_chunk(len(features), features.shape[1], classes, backend)
    else:
        reason = "asked for"
    call = _Distilled(temperature, bool(normalize), code, chunk_rows, backend)
    return inputs, call, batch, (needs_torch, reason)


def _check_logits(teacher: Tensor, features: Tensor, classes: int) -> None:
    if not isinstance(teacher, Tensor):
        raise DTypeError(f"teacher is {type(teacher).__name__}; it must be a tensor")
    if teacher.dtype not in _checks.FLOATING:
        raise DTypeError(f"teacher has dtype {teacher.dtype}; it must be float32, float64, bfloat16 or float16")
    if type(teacher) is not Tensor and is_dtensor(teacher):
        raise DTypeError(f"teacher is a DTensor; {_PLAIN}")
    wanted = (*features.shape[:-1], classes)
    if teacher.shape != wanted:
        raise ArgumentError(
            f"teacher has shape {tuple(teacher.shape)}; without teacher_weight it holds logits, of shape {wanted}"
        )


def _learned(inputs: Inputs) -> str:
    """Names what beside the student's head wants a gradient, which no kernel forms; else empty."""
    rest = zip(_OPERATOR.names[3:], inputs[3:], strict=True)
    return next((name for name, value in rest if wants_gradient((value,))), "")


def _reference(inputs: Inputs, call: _Distilled) -> tuple[Tensor]:
    """In plain torch, with both matrices of logits."""
    features, weight, bias, teacher, teacher_weight, teacher_bias, shift, scale, own = inputs
    assert features is not None
    assert weight is not None
    assert teacher is not None
    logits = _head.logits_of(features, weight, bias, call.normalize)
    if teacher_weight is not None:
        teacher = _head.logits_of(teacher, teacher_weight, teacher_bias, False)
    soft = _soft.SoftTargets(0.0, call.temperature**2, call.temperature, call.reduction)
    return _soft.reference((logits, teacher, shift, scale, None, own), soft)


def _kernel(inputs: Inputs, call: _Distilled, request: Request) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    features, weight, bias, teacher, teacher_weight, teacher_bias, shift, scale, own = inputs
    assert features is not None
    assert weight is not None
    assert teacher is not None

    def rows(z: Tensor, part: Call, needs: Sequence[bool] | None, first: int) -> tuple[Tensor, None]:
        if teacher_weight is not None:
            # As the student's logits are, unless 16 bits of one would be rounded to the other's.
            dtype = z.dtype if teacher.dtype == features.dtype else _checks.real_dtype(z.dtype)
            logits = _head.product(part.target.to(dtype), teacher_weight, z.new_empty(z.shape, dtype=dtype))
            part = part._replace(target=logits if teacher_bias is None else logits.add_(teacher_bias))
        return _soft.in_place(z, part, call.temperature, needs is not None, first), None

    said = Call(
        teacher,
        shift=shift,
        scale=scale,
        sample_weight=own,
        grad_scale=None if request.upstream is None else request.upstream[0],
        reduction=call.reduction,
        backend=call.backend,
    )
    # The kernel looks at the sample weights of a chunk when it gets there; its row would have another number.
    check_labels(said, weight.shape[0], False)
    needs = request.needs[:3]
    loss, *grads, _ = _head.in_chunks(
        features,
        weight,
        bias,
        said,
        call.normalize,
        call.chunk_rows or max(len(features), 1),
        (*needs, *[False] * 5),
        rows,
    )
    return (loss,), [*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 6]


_OPERATOR = Fused(
    "linear_distillation",
    "Tensor features, Tensor weight, Tensor? bias, Tensor teacher, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? shift, "
    "Tensor? scale, Tensor? sample_weight",
    _Distilled,
    1,
    _kernel,
    lambda inputs, call: [(inputs[0].shape[0],) if call.reduction == NONE else ()],  # type: ignore[union-attr]
    _reference,
    lambda inputs, call: call.backend != "torch" and not _learned(inputs),
)


def _explain(
    features: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor | None = None,
    temperature: float = 1.0,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    normalize: bool = False,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
) -> _backends.Explanation:
    _, call, _, (needs_torch, how) = _checked(
        features, weight, teacher, teacher_weight, temperature, bias, teacher_bias, normalize, shift, scale, sample_weight,
        reduction, chunk_rows,
    )  # fmt: skip
    kernel = _backends.explain(None, features.device, needs_torch or transforms())
    held = "logits in chunks" if call.chunk_rows else "logits held"
    return kernel._replace(reason=f"{kernel.reason}; {held}: {how}")


linear_distillation.explain = _explain  # type: ignore[attr-defined]
