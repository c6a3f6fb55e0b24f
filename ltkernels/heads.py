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
from ._head import EPS, LinearAdjustedCrossEntropy, check_class_weight, logits_of, operator
from .losses import _core, _learnable, _terms
from .losses._adjustment import TABLES
from .losses._core import Target

# Rows of a chunk. The weight gradient is read and written once a chunk, so short chunks are slow whatever C is: at B =
# 1024, D = 256, C = 21841 on two AVX-512 cores forward + backward take 211 / 168 / 139 / 139 / 138 / 130 ms with 32 /
# 64 / 128 / 256 / 512 / 1024 rows.
_CHUNK_ROWS = 256
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
            raise ValueError(f"in_features is {in_features}; it must be at least 1")
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


class _Call(NamedTuple):
    """A checked call: two-dimensional inputs in one dtype, and who serves it."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Target
    tables: tuple[Tensor | None, ...]
    shape: torch.Size  # of the unreduced loss
    backend: str
    needs_torch: str  # why no kernel serves the call; empty where one can
    chunk_rows: int  # 0: the logits are held
    reason: str  # of chunk_rows


def linear_adjusted_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Target,
    *,
    bias: Tensor | None = None,
    normalize: bool = False,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    margin: Tensor | None = None,
    row_scale: Tensor | None = None,
    class_weight: Tensor | None = None,
    focal_gamma: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    term: _terms.Term | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
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
        shift, scale, margin, row_scale: (C,) each, as in `ltkernels.functional.adjusted_cross_entropy`.
        class_weight: (C,), that function's ``weight``; here `weight` is the classifier's.
        focal_gamma, label_smoothing, ignore_index, reduction, term: as in that function. The random numbers of softmax
            equalization are counted by row: it holds all logits.
        chunk_rows: rows whose logits are held at a time; 0 holds all of them; None chooses.
        backend: None, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``, as in that function; ``"torch"`` holds the logits.

    Returns:
        The loss, float64 for float64 features and float32 for all others; in the shape of the class indices for
        ``reduction="none"``. On the CPU logits and gradients are computed in that dtype too, and gradients rounded once
        to their input's.

    Under autocast, float32 inputs are cast as `torch.nn.functional.linear` does. Tables that require a gradient get one, from the
    chunks on the CPU; `explain` says where the plain torch reference computes it. That reference serves class probabilities and
    second derivatives too, and holds the logits.

    Raises:
        ValueError: a shape or device that does not fit, a label out of range (row and value), a table entry that is not
            finite.
        TypeError: a dtype that does not fit.
    """
    call = _prepare(
        features,
        weight,
        target,
        bias=bias,
        tables=(shift, scale, margin, row_scale, class_weight),
        chunk_rows=chunk_rows,
        backend=backend,
        term=term,
        label_smoothing=label_smoothing,
    )
    features, weight, bias = call.features, call.weight, call.bias
    if call.chunk_rows == 0:
        check_class_weight(call.tables[-1])
        loss = _core.adjusted_cross_entropy(
            logits_of(features, weight, bias, normalize),
            call.target,
            **dict(zip(TABLES, call.tables)),
            focal_gamma=focal_gamma,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=call.backend,
            term=term,
        )
        return loss.reshape(call.shape) if reduction == "none" else loss

    code = _checks.reduction(reduction)
    focal_gamma = _checks.number("focal_gamma", focal_gamma, low=0.0)
    label_smoothing = _checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    first, second, lam = _core._split_target(call.target, _stand_in(features, weight))
    form, table, seed, form_options = 0, None, None, ()
    if term is not None:
        real = _checks.real_dtype(features.dtype)
        term = _core._checked_term(term, len(weight), features.device, real, call.tables, label_smoothing, False)
        form, table, seed, form_options = _terms.FORMS.index(term.form), term.table, term.seed, term.options
    labels_and_tables = (
        first.contiguous(),
        second,
        lam,
        *call.tables,
        table,
        seed,
    )  # the kernel reads consecutive labels
    options = (focal_gamma, label_smoothing, ignore_index, code, form, list(form_options))
    inputs = (features, weight, bias)
    learned = call.tables if _core.require_grad(call.tables) else ()
    needs = tuple(given is not None and given.requires_grad for given in (*inputs, *learned))
    if torch.is_grad_enabled() and any(needs):
        loss = LinearAdjustedCrossEntropy.apply(
            *inputs, labels_and_tables, options, bool(normalize), call.chunk_rows, needs, call.backend, *learned
        )
    else:
        settings = (*options, bool(normalize), call.chunk_rows, False, False, False, [], call.backend)
        loss = operator(*inputs, *labels_and_tables, None, *settings)[0]
    return loss.reshape(call.shape) if reduction == "none" else loss


def _stand_in(features: Tensor, weight: Tensor) -> Tensor:
    """The logits' shape, dtype and device without their memory, for the checks that ask for logits."""
    return features.new_empty(()).expand(features.shape[0], weight.shape[0])


def _prepare(
    features: Tensor,
    weight: Tensor,
    target: Target,
    *,
    bias: Tensor | None,
    tables: tuple[Tensor | None, ...],
    chunk_rows: int | None,
    backend: str | None,
    term: _terms.Term | None = None,
    label_smoothing: float = 0.0,
) -> _Call:
    """Checks what the logits' loss cannot check, flattens the batch, casts for autocast and chooses the path."""
    for name, value in (("features", features), ("weight", weight), ("bias", bias)):
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; it must be a tensor")
        if value.dtype not in _checks.FLOATING:
            raise TypeError(f"{name} has dtype {value.dtype}; it must be float32, float64, bfloat16 or float16")
        if value.device != features.device:
            raise ValueError(f"{name} is on {value.device}, features on {features.device}; both must be on one device")
    if features.dim() == 0:
        raise ValueError("features has no dimensions; it must be (..., D)")
    if weight.dim() != 2 or weight.shape[1] != features.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; features of shape {tuple(features.shape)} need a weight of shape "
            f"(C, {features.shape[-1]})"
        )
    classes = weight.shape[0]
    if classes == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; there must be at least one class")
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({classes},), one entry per class")
    device = features.device
    if torch.is_autocast_enabled(device.type):
        lower = torch.get_autocast_dtype(device.type)
        features, weight, bias = (
            value if value is None or value.dtype == torch.float64 else value.to(lower)
            for value in (features, weight, bias)
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != features.dtype:
            raise TypeError(f"{name} has dtype {value.dtype}, features {features.dtype}; both must have one dtype")
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 0):
        raise ValueError(f"chunk_rows is {chunk_rows!r}; it must be None or an integer of at least 0")

    names = (*TABLES[:-1], "class_weight")
    real = _checks.real_dtype(features.dtype)
    tables = tuple(_checks.table(name, table, classes, device, real) for name, table in zip(names, tables))
    batch = features.shape[:-1]
    target = _flatten_target(target, features, classes)
    features = features.reshape(-1, features.shape[-1])
    first = target[0] if isinstance(target, tuple) else target
    lam = target[2] if isinstance(target, tuple) and isinstance(target[2], Tensor) else None
    needs_torch = _core._needs_torch(first.is_floating_point(), lam)
    if _core.require_grad(tables) and not needs_torch:
        needs_torch = _learnable.needs_torch(tables, label_smoothing, term is not None, backend, device)
    served = _backends.choose(backend, device, needs_torch)
    if backend is None and served == "cuda" and not _backends.triton_problem("cuda"):
        served = "triton"  # its head forms tiles of logits; the compiled kernels would need them whole, or float32 chunks of them
    if served == "torch":
        if chunk_rows:
            reason = needs_torch or ("backend='torch'" if backend else f"there is no kernel for {device.type} tensors")
            raise ValueError(f"chunk_rows={chunk_rows} is not possible: {reason}, which holds the logits")
        return _Call(
            features, weight, bias, target, tables, batch, served, needs_torch, 0, "the torch backend has no chunks"
        )
    if term is not None and term.form == "equalization":
        if chunk_rows:
            raise ValueError(
                f"chunk_rows={chunk_rows} is not possible: softmax equalization counts its random numbers by row"
            )
        chunk_rows, reason = 0, "softmax equalization counts its random numbers by row"
    elif tables[-1] is not None and _core.require_grad(tables[-1:]):
        if chunk_rows:
            raise ValueError(
                f"chunk_rows={chunk_rows} is not possible: the gradient of class_weight needs the loss of all rows"
            )
        chunk_rows, reason = 0, "the gradient of class_weight needs the loss of all rows"
    elif chunk_rows is None:
        chunk_rows, reason = _choose_chunk(features.shape[0], features.shape[1], classes)
    else:
        reason = "asked for"
    return _Call(features, weight, bias, target, tables, batch, served, needs_torch, chunk_rows, reason)


def _choose_chunk(rows: int, width: int, classes: int) -> tuple[int, str]:
    """(rows of a chunk, or 0 to hold all logits; why)."""
    if classes <= width:
        return 0, f"{classes} classes are no more than {width} features, so the logits are no larger than the features"
    if rows * classes <= _SMALL:
        return 0, f"{rows} x {classes} logits are few"
    chunk = max(_CHUNK_ROWS, _SMALL // classes)
    return chunk, f"{chunk} rows of {classes} logits at a time"


def _flatten_target(target: Target, features: Tensor, classes: int) -> Target:
    """The target of (N, D) features."""
    batch = features.shape[:-1]
    if isinstance(target, tuple):
        if len(target) != 3:
            raise ValueError(f"target is a tuple of {len(target)}; mixed targets are (y_a, y_b, lam)")
        first, second, lam = target
        labels = [_flatten_labels(f"target[{i}]", each, features, classes) for i, each in enumerate((first, second))]
        if isinstance(lam, Tensor) and lam.dim() > 0:
            if lam.shape != batch:
                raise ValueError(f"target[2] (lam) has shape {tuple(lam.shape)}; it must be () or {tuple(batch)}")
            lam = lam.reshape(-1)
        return labels[0], labels[1], lam
    return _flatten_labels("target", target, features, classes)


def _flatten_labels(name: str, value: Tensor, features: Tensor, classes: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; it must be a tensor")
    batch = tuple(features.shape[:-1])
    wanted = (*batch, classes) if value.is_floating_point() else batch
    if value.shape != wanted:
        kind = "class probabilities" if value.is_floating_point() else "class indices"
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; features of shape {tuple(features.shape)} need {kind} of shape {wanted}"
        )
    return value.reshape(-1, classes) if value.is_floating_point() else value.reshape(-1)


def _explain(
    features: Tensor,
    weight: Tensor,
    target: Target,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
    **kwargs: object,
) -> _backends.Explanation:
    """`ltkernels.explain` of the head."""
    tables = tuple(kwargs.get(name) for name in (*TABLES[:-1], "class_weight"))
    call = _prepare(
        features,
        weight,
        target,
        bias=bias,
        tables=tables,
        chunk_rows=chunk_rows,
        backend=backend,
        term=kwargs.get("term"),
        label_smoothing=kwargs.get("label_smoothing", 0.0),
    )
    kernel = _backends.explain(backend, features.device, call.needs_torch)
    path = "logits held" if call.chunk_rows == 0 else "logits in chunks"
    return kernel._replace(reason=f"{kernel.reason}; {path}: {call.reason}")


linear_adjusted_cross_entropy.explain = _explain  # type: ignore[attr-defined]
