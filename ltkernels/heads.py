"""Classifier and loss in one, without the B x C logits: `linear_adjusted_cross_entropy`. And the cosine head.

The work is done in `ltkernels._head`; here are the arguments and the choice of the path.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _backends, _checks
from ._call import NONE
from ._errors import ArgumentError, DTypeError
from ._head import EPS, TILES, check_tables, logits_of, loss_in_chunks, product_dtype
from ._watch import direct, is_dtensor, wants_gradient
from .losses import _terms
from .losses._core import of_checked
from .losses._door import Checked, Shared, Target, check_options, checked, takes_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Rows of a chunk. The weight gradient is read and written once a chunk, so short chunks are slow whatever C is: at B =
# 1024, D = 256, C = 21841 on two AVX-512 cores forward + backward take 211 / 168 / 139 / 139 / 138 / 130 ms with 32 /
# 64 / 128 / 256 / 512 / 1024 rows.
_CHUNK_ROWS = 256
# On a GPU: a chunk's three products are as fast as those of all rows, and the weight gradient, in float32, is read and written
# once for 6 x 4096 operations on each of its elements.
_DEVICE_CHUNK_ROWS = 4096
# Logits (4 MiB) that are not worth saving. With few classes 256 rows would be small GEMMs (512 x 512 x 1000: 21.7 / 14.7 /
# 14.3 ms with 128 / 256 / 512 rows); and a batch of so few logits is faster with all of them held, because the chunked
# path costs 0.3 ms before it computes anything (128 x 64 x 10: 0.32 against 0.57 ms).
_SMALL = 1 << 20


class CosineLinear(torch.nn.Module):
    """Classifier whose logits are the cosines between features and class weights, in [-1, 1]; no bias.

    For training without the logits pass its weight to `ltkernels.functional.linear_adjusted_cross_entropy` with
    ``normalize=True``.

    Args:
        in_features: D.
        num_classes: C.

    Input (..., D), output (..., C) in the input's dtype. Norms are taken with eps 1e-12, as
    `torch.nn.functional.normalize`.
    """

    if TYPE_CHECKING:  # torch declares that a Module takes and returns anything

        def __call__(self, features: Tensor) -> Tensor: ...

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        if in_features < 1:
            raise ArgumentError(f"in_features is {in_features}; it must be at least 1")
        self.in_features = in_features
        self.num_classes = _checks.num_classes(num_classes)
        self.weight = torch.nn.Parameter(torch.empty(num_classes, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features, dim=-1, eps=EPS), F.normalize(self.weight, dim=1, eps=EPS))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}"


class _Path(NamedTuple):
    """A checked call of the head: two-dimensional inputs in one dtype, the loss' record, and how it is computed."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    loss: Checked
    shape: torch.Size  # of the unreduced loss
    chunk_rows: int  # 0: the logits are held; TILES
    reason: str  # of chunk_rows


@takes_options
def linear_adjusted_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Target,
    *,
    bias: Tensor | None = None,
    normalize: bool = False,
    class_weight: Tensor | None = None,
    chunk_rows: int | None = None,
    **options: Unpack[Shared],
) -> Tensor:
    """``adjusted_cross_entropy(F.linear(features, weight, bias), target, ...)`` without the B x C logits.

    Beside the gradients it allocates one chunk of `chunk_rows` x C logits. Only gradients of inputs that require them
    are computed, each on its own: frozen features or a frozen classifier cost nothing. Where holding the logits is
    cheaper the call does that: ``ltkernels.explain(linear_adjusted_cross_entropy, features, weight, target, ...)``
    says so.

    Args:
        features: (..., D); float32, float64, bfloat16 or float16.
        weight: (C, D), the classifier, in the features' dtype.
        target: class indices (...); class probabilities (..., C); or ``(y_a, y_b, lam)``; as in
            `ltkernels.functional.adjusted_cross_entropy`.
        bias: (C,), in the features' dtype.
        normalize: cosine classifier: the logits are the cosines between features and class weights (plus `bias`), with
            norms of at least 1e-12. Gradients go through both norms.
        shift, scale, margin, row_scale, label_scale: (C,) each, as in `ltkernels.functional.adjusted_cross_entropy`.
        class_weight: (C,), that function's ``weight``; here `weight` is the classifier's.
        sample_weight: (...), a factor of each row's loss, as in that function.
        focal_gamma, label_smoothing, ignore_index, reduction, grad_scale, term: as in that function. The random numbers of softmax
            equalization are counted by row: it holds all logits.
        inplace: as in that function, for the logits that are held where they are not computed in chunks, whose gradient always takes
            their place.
        chunk_rows: rows whose logits are held at a time; 0 holds all of them; None chooses.
        backend: None, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``, as in that function; ``"torch"`` holds the logits, and
            ``"triton"`` without `chunk_rows` forms them tile by tile: least memory, and every tile a second time for each gradient.

    Returns:
        The loss, float64 for float64 features and float32 for all others; in the shape of the class indices for
        ``reduction="none"``. Logits and gradients are computed in that dtype too, and gradients rounded once to their input's; on
        a GPU the logits of bfloat16 features and their gradient are bfloat16, as those of `torch.nn.functional.linear`.

    Under autocast, float32 inputs are cast as `torch.nn.functional.linear` does. Tables that require a gradient get one, from the
    chunks on the CPU; `explain` says where the plain torch reference computes it. That reference serves second derivatives too, and holds
    the logits.

    Raises:
        ValueError: a shape or device that does not fit, a label out of range (row and value), a table entry that is not
            finite.
        TypeError: a dtype that does not fit.
    """
    check_options("linear_adjusted_cross_entropy", options)
    if chunk_rows is None and class_weight is None and _is_plain(features, weight, target, bias):
        logits = logits_of(features, weight, bias, normalize) if normalize else F.linear(features, weight, bias)
        return of_checked(checked(logits, target, **options))
    path = _prepare(features, weight, target, bias, class_weight, chunk_rows, options)
    features, weight, bias = path.features, path.weight, path.bias
    call = path.loss.call
    if path.chunk_rows:
        loss = loss_in_chunks(features, weight, bias, call, bool(normalize), path.chunk_rows)
    else:
        check_tables(call)
        logits = logits_of(features, weight, bias, normalize)
        loss = of_checked(path.loss._replace(logits=logits, shape=None, direct=path.loss.direct and direct((logits,))))
    return loss.reshape(path.shape) if call.reduction == NONE else loss


def _is_plain(features: Tensor, weight: Tensor, target: Target, bias: Tensor | None) -> bool:
    """Whether a call is a small one on the CPU with nothing to convert, flatten or refuse in it: the loss of logits does the rest, and what
    `_prepare` looks at would take a third of its time. Nobody's watching either, who might see another operator than the head's."""
    if not (isinstance(features, Tensor) and isinstance(weight, Tensor) and type(target) is Tensor):
        return False
    if bias is not None and not isinstance(bias, Tensor):
        return False
    dtype, size, of_weight = features.dtype, features.shape, weight.shape
    return (
        (dtype is torch.float32 or dtype is torch.float64)
        and len(size) == 2
        and len(of_weight) == 2
        and size[1] == of_weight[1]
        and of_weight[0] > 0
        and choose_chunk(*size, of_weight[0], "cpu")[0] == 0
        and weight.dtype is dtype
        and (bias is None or (bias.dtype is dtype and bias.shape == of_weight[:1]))
        and target.dtype is torch.int64
        and target.shape == size[:1]
        and features.is_cpu
        and direct((features, weight, target, bias))
        and weight.is_cpu
        and (bias is None or bias.is_cpu)
        and not torch.is_autocast_enabled("cpu")
    )


def _prepare(
    features: Tensor,
    weight: Tensor,
    target: Target,
    bias: Tensor | None,
    class_weight: Tensor | None,
    chunk_rows: int | None,
    options: Shared,
) -> _Path:
    """Checks what the loss cannot check, flattens the batch, casts for autocast and chooses the path."""
    sharded = (
        "a classifier sharded by classes goes to ltkernels.distributed.sharded_linear_adjusted_cross_entropy, others as plain "
        "tensors, such as their to_local()"
    )
    features, weight, bias = operands(features, weight, bias, ("features", "weight", "bias"), sharded)
    check_chunk_rows(chunk_rows)
    classes, device, batch = weight.shape[0], features.device, features.shape[:-1]
    target = _flatten_target(target, features, classes)
    if len(batch) != 1:
        features = features.reshape(-1, features.shape[-1])
    # The logits' shape, dtype and device without their memory, for the checks that ask for logits.
    stand_in = features.new_empty(()).expand(features.shape[0], classes)
    own = options.get("sample_weight")
    if own is not None:
        own = _checks.rows("sample_weight", own, batch, device, _checks.real_dtype(features.dtype))
        options = {**options, "sample_weight": own.reshape(-1)}
    loss = checked(stand_in, target, weight=class_weight, weight_name="class_weight", **options)
    call, backend = loss.call, options.get("backend")
    held = _holds_logits(loss, backend, device)
    if held:
        if chunk_rows:
            raise ArgumentError(f"chunk_rows={chunk_rows} is not possible: {held[1]}")
        return _Path(features, weight, bias, loss, batch, 0, held[0])
    reason = "asked for"
    if chunk_rows is None:
        chunk_rows, reason = choose_chunk(features.shape[0], features.shape[1], classes, call.backend)
        if backend == "triton" and (why := _no_tiles(loss)):
            reason = f"{reason}; no tiles: {why}"
        elif backend == "triton":
            chunk_rows, reason = TILES, "asked for"
    return _Path(features, weight, bias, loss, batch, chunk_rows, reason)


def operands(
    features: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str], instead: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of a linear head, called `names`, checked and cast for autocast; `instead` says what to do with a DTensor."""
    for name, value in zip(names, (features, weight, bias), strict=True):
        if value is None and name == names[2]:
            continue
        if not isinstance(value, Tensor):
            raise DTypeError(f"{name} is {type(value).__name__}; it must be a tensor")
        if value.dtype not in _checks.FLOATING:
            raise DTypeError(f"{name} has dtype {value.dtype}; it must be float32, float64, bfloat16 or float16")
        if value.device != features.device:
            raise ArgumentError(
                f"{name} is on {value.device}, {names[0]} on {features.device}; both must be on one device"
            )
        if type(value) is not Tensor and is_dtensor(value):
            raise DTypeError(f"{name} is a DTensor; {instead}")
    if features.dim() == 0:
        raise ArgumentError(f"{names[0]} has no dimensions; it must be (..., D)")
    if weight.dim() != 2 or weight.shape[1] != features.shape[-1]:
        raise ArgumentError(
            f"{names[1]} has shape {tuple(weight.shape)}; {names[0]} of shape {tuple(features.shape)} need a weight of shape "
            f"(C, {features.shape[-1]})"
        )
    classes = weight.shape[0]
    if classes == 0:
        raise ArgumentError(f"{names[1]} has shape {tuple(weight.shape)}; there must be at least one class")
    if bias is not None and bias.shape != (classes,):
        raise ArgumentError(f"{names[2]} has shape {tuple(bias.shape)}; it must be ({classes},), one entry per class")
    device = features.device
    if torch.is_autocast_enabled(device.type):
        lower = torch.get_autocast_dtype(device.type)
        features, weight = (value if value.dtype == torch.float64 else value.to(lower) for value in (features, weight))
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(lower)
    for name, value in zip(names[1:], (weight, bias), strict=True):
        if value is not None and value.dtype != features.dtype:
            raise DTypeError(f"{name} has dtype {value.dtype}, {names[0]} {features.dtype}; both must have one dtype")
    return features, weight, bias


def check_chunk_rows(chunk_rows: int | None) -> None:
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 0):
        raise ArgumentError(f"chunk_rows is {chunk_rows!r}; it must be None or an integer of at least 0")


def _holds_logits(loss: Checked, backend: str | None, device: torch.device) -> tuple[str, str] | None:
    """Why a call needs all logits at once: as `ltkernels.explain` says it, and as the refusal of `chunk_rows` does."""
    call = loss.call
    if call.backend == "torch":
        reason = loss.needs_torch or ("backend='torch'" if backend else f"there is no kernel for {device.type} tensors")
        return "the torch backend has no chunks", f"{reason}, which holds the logits"
    if _terms.FORMS[call.form] in _terms.DRAWING:
        kind = "softmax equalization" if _terms.FORMS[call.form] == "equalization" else "the cloud"
        reason = f"{kind} counts its random numbers by row"
        return reason, reason
    if wants_gradient((call.weight,)):
        reason = "the gradient of class_weight needs the loss of all rows"
        return reason, reason
    return None


def _no_tiles(loss: Checked) -> str:
    """Why Triton's tiles cannot serve a call; empty where they can."""
    if loss.call.target.is_floating_point():
        return "class probabilities as target need whole rows"
    if loss.call.form:
        return f"{_terms.FORMS[loss.call.form]} needs whole rows"
    if wants_gradient(loss.call.tables()):
        return "a table requires a gradient"
    return ""


def choose_chunk(rows: int, width: int, classes: int, backend: str) -> tuple[int, str]:
    """(rows of a chunk, or 0 to hold all logits; why)."""
    if classes <= width:
        return 0, f"{classes} classes are no more than {width} features, so the logits are no larger than the features"
    if rows * classes <= _SMALL:
        return 0, f"{rows} x {classes} logits are few"
    least = _DEVICE_CHUNK_ROWS if backend in _backends.ON_DEVICE else _CHUNK_ROWS
    chunk = max(least, _SMALL // classes)
    return chunk, f"{chunk} rows of {classes} logits at a time"


def _flatten_target(target: Target, features: Tensor, classes: int) -> Target:
    """The target of (N, D) features."""
    batch = features.shape[:-1]
    if isinstance(target, tuple):
        if len(target) != 3:
            raise ArgumentError(f"target is a tuple of {len(target)}; mixed targets are (y_a, y_b, lam)")
        first, second, lam = target
        labels = [_flatten_labels(f"target[{i}]", each, features, classes) for i, each in enumerate((first, second))]
        if isinstance(lam, Tensor) and lam.dim() > 0:
            if lam.shape != batch:
                raise ArgumentError(f"target[2] (lam) has shape {tuple(lam.shape)}; it must be () or {tuple(batch)}")
            lam = lam.reshape(-1)
        return labels[0], labels[1], lam
    return _flatten_labels("target", target, features, classes)


def _flatten_labels(name: str, value: Tensor, features: Tensor, classes: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise DTypeError(f"{name} is {type(value).__name__}; it must be a tensor")
    batch = tuple(features.shape[:-1])
    wanted = (*batch, classes) if value.is_floating_point() else batch
    if value.shape != wanted:
        kind = "class probabilities" if value.is_floating_point() else "class indices"
        raise ArgumentError(
            f"{name} has shape {tuple(value.shape)}; features of shape {tuple(features.shape)} need {kind} of shape {wanted}"
        )
    return value.reshape(-1, classes) if value.is_floating_point() else value.reshape(-1)


def _explain(
    features: Tensor,
    weight: Tensor,
    target: Target,
    *,
    bias: Tensor | None = None,
    normalize: bool = False,
    class_weight: Tensor | None = None,
    chunk_rows: int | None = None,
    **options: Unpack[Shared],
) -> _backends.Explanation:
    """`ltkernels.explain` of the head."""
    path = _prepare(features, weight, target, bias, class_weight, chunk_rows, options)
    kernel = _backends.explain(options.get("backend"), features.device, path.loss.needs_torch, path.loss.not_cuda)
    call = path.loss.call
    how = {0: "logits held", TILES: "logits in tiles"}.get(path.chunk_rows, "logits in chunks")
    reason = f"{kernel.reason}; {how}: {path.reason}"
    if path.chunk_rows > 0 and call.backend in _backends.ON_DEVICE:
        dtype = product_dtype(path.features.dtype, call.backend)
        reason += f", matrix products of torch in {str(dtype).removeprefix('torch.')}"
    return kernel._replace(reason=reason)


linear_adjusted_cross_entropy.explain = _explain  # type: ignore[attr-defined]
