"""Classifier and loss in one, without the B x C logits: `linear_adjusted_cross_entropy`. And the cosine head.

The batch goes through in chunks of rows. Each chunk's logits are a vendor GEMM into one buffer, the fused kernel
replaces them by their gradient, and two more GEMMs turn that into the chunk's feature gradient and its addition to the
weight gradient. So forward does all the work, and backward multiplies by the upstream gradient. Nothing is filtered and
nothing is atomic: the same call gives the same bits.

Biases and the norms of the class weights cost no pass over logits or weights: ``x . w / |w| + b`` is
``scale = 1 / |w|`` and ``shift = b`` of the kernel, whose gradient is then the one with respect to ``x . w``.

Everything is computed in float32 (float64 for float64 features), 16-bit weights converted block by block: processors
without 16-bit matrix units multiply float32 three times faster than bfloat16 and a hundred times faster than float16,
and the logits are not rounded to 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _backends, _checks, _ops
from .losses import _core, _reference, _terms
from .losses._core import Target
from .losses._record import TABLES

_EPS = 1e-12  # of both norms, as torch.nn.functional.normalize

# Rows of a chunk. The weight gradient is read and written once a chunk, so short chunks are slow whatever C is: at B =
# 1024, D = 256, C = 21841 on two AVX-512 cores forward + backward take 211 / 168 / 139 / 139 / 138 / 130 ms with 32 /
# 64 / 128 / 256 / 512 / 1024 rows.
_CHUNK_ROWS = 256
# Logits (4 MiB) that are not worth saving. With few classes 256 rows would be small GEMMs (512 x 512 x 1000: 21.7 / 14.7 /
# 14.3 ms with 128 / 256 / 512 rows); and a batch of so few logits is faster with all of them held, because the chunked
# path costs 0.3 ms before it computes anything (128 x 64 x 10: 0.32 against 0.57 ms).
_SMALL = 1 << 20
# Elements of a block of class weights that is converted or projected while it sits in the second-level cache.
_BLOCK = 1 << 18

_MEAN, _BATCH_MEAN = _checks.REDUCTIONS.index("mean"), _checks.REDUCTIONS.index("batch_mean")
_NONE = _checks.REDUCTIONS.index("none")


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
        return F.linear(F.normalize(features, dim=-1, eps=_EPS), F.normalize(self.weight, dim=1, eps=_EPS))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}"


# ---- the operator ----------------------------------------------------------------------------------------------------


def _blocks(weight: Tensor, real: torch.dtype, whole: bool) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of classes in the working dtype; one block where nothing needs converting and `whole` is asked for."""
    classes, width = weight.shape
    step = classes if whole and weight.dtype == real else max(1, _BLOCK // max(width, 1))
    for begin in range(0, classes, step):
        at = slice(begin, min(begin + step, classes))
        yield at, weight[at].to(real)


def _inverse_norms(norms: Tensor) -> Tensor:
    """1 / max(norm, eps). A norm that is not finite gives 0, which the kernel accepts as a scale: the cosine is then 0,
    or NaN where an entry is not finite, as in torch."""
    return torch.where(torch.isfinite(norms), 1 / norms.clamp_min(_EPS), 0)


def _off_the_ray(gradient: Tensor, vectors: Tensor, norms: Tensor, inverse: Tensor) -> Tensor:
    """In place: takes the part along each of `vectors` (rows) out of its gradient, which is what the norm's derivative
    does. A norm below eps counts as constant."""
    share = (vectors * gradient).sum(dim=1) * inverse * inverse
    share = torch.where(norms >= _EPS, share, 0)
    return gradient.addcmul_(vectors, share[:, None], value=-1)


def _denominator(
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """What the reduction divides by, over the whole batch; float64."""
    valid = target != ignore_index
    if reduction == _BATCH_MEAN or (reduction == _MEAN and class_weight is None):
        return valid.sum().double()
    if reduction != _MEAN:
        return torch.ones((), dtype=torch.float64, device=target.device)
    table = class_weight.double()
    weights = table[target.where(valid, 0)]
    if target_b is not None:
        share = lam.double()
        weights = share * weights + (1 - share) * table[target_b.where(valid, 0)]
    return weights.where(valid, 0).sum()


def _check_class_weight(class_weight: Tensor | None) -> None:
    """The kernel's check, under the name that the table has here."""
    if class_weight is None or class_weight.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = torch.isfinite(class_weight).logical_not()
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ValueError(f"class_weight[{index}] is {class_weight[index].item()}; it must be finite")


def _linear_adjusted_ce(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    margin: Tensor | None,
    row_scale: Tensor | None,
    class_weight: Tensor | None,
    table: Tensor | None,
    seed: Tensor | None,
    row_coef: Tensor | None,
    focal_gamma: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    form: int,
    form_options: list[float],
    normalize: bool,
    chunk_rows: int,
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The kernel checks the labels of a chunk when it gets there; a caller expects to hear of row 1000 before row 0 is
    # computed.
    _core._check_labels(target, target_b, weight.shape[0], ignore_index)
    _check_class_weight(class_weight)
    # Under autocast a float32 GEMM would be cast down, and with it the weight gradient.
    with torch.autocast(features.device.type, enabled=False):
        real = _checks.real_dtype(features.dtype)
        (rows, width), classes = features.shape, weight.shape[0]
        if weight.stride(0) != 1 and weight.stride(1) != 1:
            weight = weight.contiguous()  # once: a GEMM would copy it for every chunk

        inverse = norms = stray = None  # stray: what is added to the logits themselves
        if normalize:
            norms = torch.cat([torch.linalg.vector_norm(w, dim=1) for _, w in _blocks(weight, real, whole=False)])
            inverse = _inverse_norms(norms)
        if bias is not None and form:
            stray = bias.to(real)
        elif bias is not None:
            folded = bias.to(real) if scale is None else bias.to(real) * scale
            foldable = torch.isfinite(folded) | (folded == -torch.inf)
            if not foldable.all():  # a bias that diverged makes a NaN loss, as in torch, and no error about a table
                stray = bias.to(real).where(~foldable, 0)
                folded = folded.where(foldable, 0)
            shift = folded.contiguous() if shift is None else shift + folded
        if normalize and not form:
            scale = inverse if scale is None else scale * inverse
        tables = (shift, scale, margin, row_scale, class_weight)
        options = (focal_gamma, label_smoothing, ignore_index, _NONE)
        closed = (form, form_options) if form else ()
        extra = (table, seed) if form else ()
        run, run_ = (_ops.closed_ce, _ops.closed_ce_) if form else (_ops.adjusted_ce, _ops.adjusted_ce_)

        need_grad = need_features or need_weight or need_bias
        denominator = _denominator(target, target_b, lam, class_weight, ignore_index, reduction)
        if need_grad and row_coef is None:
            row_coef = (1 / denominator).to(real).repeat(rows)
        step = min(chunk_rows, max(rows, 1))
        chunk = features.new_empty((step, classes), dtype=real)
        losses = features.new_empty(rows, dtype=real)
        grad_features = features.new_empty((rows, width) if need_features else 0, dtype=real)
        grad_weight = features.new_empty((classes, width) if need_weight else 0, dtype=real)
        grad_bias = features.new_zeros(classes if need_bias else 0, dtype=real)

        for begin in range(0, max(rows, 1), step):
            at = slice(begin, min(begin + step, rows))
            x = features[at].to(real)
            if normalize:
                x_norms = torch.linalg.vector_norm(x, dim=1)
                x_inverse = _inverse_norms(x_norms)
                x = x * x_inverse[:, None]
            z = chunk[: len(x)]
            for classes_at, w in _blocks(weight, real, whole=True):
                torch.mm(x, w.t(), out=z[:, classes_at])
            if normalize and form:
                z.mul_(inverse)  # a closed form needs the cosines themselves
            if stray is not None:
                z.add_(stray)
            labels = (target[at], None if target_b is None else target_b[at], None if lam is None else lam[at])
            if not need_grad:
                losses[at] = run(z, *labels, *tables, *extra, None, *options, *closed, False, backend)[0]
                continue
            losses[at] = run_(z, *labels, *tables, *extra, row_coef[at], *options, *closed, backend)
            if need_bias:
                grad_bias.add_(z.sum(dim=0))
            if normalize and form:
                z.mul_(inverse)  # from the cosines' gradient to that of x . w
            if need_features:
                gradient = grad_features[at]
                for classes_at, w in _blocks(weight, real, whole=True):
                    gradient.addmm_(z[:, classes_at], w, beta=0 if classes_at.start == 0 else 1)
                if normalize:
                    ones = torch.ones_like(x_norms)  # x has unit length already
                    _off_the_ray(gradient, x, x_norms, ones).mul_(x_inverse[:, None])
            if need_weight:
                grad_weight.addmm_(z.t(), x, beta=0 if begin == 0 else 1)

        if normalize and need_weight:
            for classes_at, w in _blocks(weight, real, whole=False):
                _off_the_ray(grad_weight[classes_at], w, norms[classes_at], inverse[classes_at])
        if normalize and need_bias and not form:
            grad_bias.div_(inverse)  # the kernel's gradient is that of x . w = |w| (cos + ...)
        if reduction == _NONE:
            return losses, grad_features, grad_weight, grad_bias
        return (losses.double().sum() / denominator).to(real), grad_features, grad_weight, grad_bias


def _linear_adjusted_ce_fake(
    features: Tensor, weight: Tensor, *arguments: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reduction, need_features, need_weight, need_bias = arguments[-9], *arguments[-4:-1]
    (rows, width), classes = features.shape, weight.shape[0]
    real = _checks.real_dtype(features.dtype)
    return (
        features.new_empty((rows,) if reduction == _NONE else (), dtype=real),
        features.new_empty((rows, width) if need_features else 0, dtype=real),
        features.new_empty((classes, width) if need_weight else 0, dtype=real),
        features.new_empty(classes if need_bias else 0, dtype=real),
    )


# features (N, D), weight (C, D), bias (C,) in one dtype; the loss and all gradients in float64 for float64 features,
# else float32. table, seed, form and form_options are those of closed_ce (form 0: none). row_coef (N,) is the upstream
# gradient of reduction "none". A gradient that is not needed is an empty tensor.
_operator = _ops.define(
    "linear_adjusted_ce(Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor? target_b, Tensor? lam, "
    "Tensor? shift, Tensor? scale, Tensor? margin, Tensor? row_scale, Tensor? class_weight, Tensor? table, "
    "Tensor? seed, Tensor? row_coef, float focal_gamma, float label_smoothing, int ignore_index, int reduction, int form, "
    "float[] form_options, bool normalize, int chunk_rows, "
    "bool need_features, bool need_weight, bool need_bias, str backend) "
    "-> (Tensor loss, Tensor grad_features, Tensor grad_weight, Tensor grad_bias)",
    _linear_adjusted_ce,
    _linear_adjusted_ce_fake,
)


# ---- autograd --------------------------------------------------------------------------------------------------------


class _LinearAdjustedCrossEntropy(torch.autograd.Function):
    """Scalar reductions compute all gradients with the loss; backward multiplies them by the upstream gradient. Only a
    second backward over a retained graph computes them again.

    Unreduced losses know their upstream gradient in backward only and compute the logits there a second time."""

    @staticmethod
    def forward(ctx, features, weight, bias, labels_and_tables, options, normalize, chunk_rows, needs, backend):
        ctx.arguments = (options, normalize, chunk_rows, needs, backend)
        now = needs if options[3] != _NONE else (False, False, False)
        loss, *grads = _operator(
            features, weight, bias, *labels_and_tables, None, *options, normalize, chunk_rows, *now, backend
        )
        # The first backward gives these gradients away: `.grad` takes their memory, and the upstream factor needs no copy of
        # them. Were they saved, `.grad` could take them just the same and then accumulate into what is saved.
        ctx.grads = None
        if (
            torch.compiler.is_compiling()
        ):  # traced code can carry tensors to backward in no other way, and copies them there
            ctx.save_for_backward(features, weight, bias, *labels_and_tables, *grads)
        else:
            ctx.save_for_backward(features, weight, bias, *labels_and_tables)
            if options[3] != _NONE:
                ctx.grads = grads
        return loss

    @staticmethod
    def backward(ctx, upstream):
        options, normalize, chunk_rows, needs, backend = ctx.arguments
        features, weight, bias, *rest = ctx.saved_tensors
        labels_and_tables = rest[:10]
        inputs = (features, weight, bias)
        settings = (*options, normalize, chunk_rows, *needs, backend)
        if torch.is_grad_enabled():
            grads = _differentiable_gradients(inputs, needs, labels_and_tables, options, normalize, upstream)
        elif options[3] == _NONE:
            _, *grads = _operator(*inputs, *labels_and_tables, upstream.contiguous(), *settings)
        elif torch.compiler.is_compiling():
            grads = [grad * upstream for grad in rest[10:]]
        else:
            grads, ctx.grads = ctx.grads, None
            if grads is None:  # a second backward over a retained graph
                _, *grads = _operator(*inputs, *labels_and_tables, None, *settings)
            for grad in grads:
                _core.multiply(grad, upstream, backend)
        # One rounding, after the upstream factor: float16 gradients under a loss scale would otherwise underflow first.
        grads = [grad.to(given.dtype) if need else None for grad, given, need in zip(grads, inputs, needs)]
        return *grads, None, None, None, None, None, None


def _differentiable_gradients(
    inputs: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    labels_and_tables: list[Tensor | None],
    options: tuple,
    normalize: bool,
    upstream: Tensor,
) -> list[Tensor | None]:
    """The gradients as differentiable functions of inputs and upstream, for backward(create_graph=True)."""
    with torch.enable_grad():
        # Views: the gradients stay connected to whatever the inputs came from.
        views = [given.view_as(given) if need else given for given, need in zip(inputs, needs)]
        *labels_and_tables, table, seed = labels_and_tables
        *options, form, form_options = options
        term = _terms.Term(_terms.FORMS[form], table, seed, tuple(form_options)) if form else None
        loss = _reference.adjusted_cross_entropy(_logits(*views, normalize), *labels_and_tables, *options, term)
        found = iter(
            torch.autograd.grad(loss, [view for view, need in zip(views, needs) if need], upstream, create_graph=True)
        )
    return [next(found) if need else None for need in needs]


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    """The B x C logits, differentiable. On the CPU in the working dtype of the chunked path: both give one result."""
    device = features.device.type
    if torch.is_autocast_enabled(device):  # the inputs are cast already; entering the context costs 10 us
        with torch.autocast(device, enabled=False):
            return _logits(features, weight, bias, normalize)
    if device == "cpu":
        real = _checks.real_dtype(features.dtype)
        features, weight = features.to(real), weight.to(real)
        bias = None if bias is None else bias.to(real)
    if normalize:
        features, weight = F.normalize(features, dim=1, eps=_EPS), F.normalize(weight, dim=1, eps=_EPS)
    return F.linear(features, weight, bias)


# ---- the public function ---------------------------------------------------------------------------------------------


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

    Under autocast, float32 inputs are cast as `torch.nn.functional.linear` does. Gradients with respect to a table and
    class probabilities are computed by the plain torch reference, and so are second derivatives; all three hold the
    logits.

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
    )
    features, weight, bias = call.features, call.weight, call.bias
    if call.chunk_rows == 0:
        _check_class_weight(call.tables[-1])
        loss = _core.adjusted_cross_entropy(
            _logits(features, weight, bias, normalize),
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
    if torch.is_grad_enabled() and any(given is not None and given.requires_grad for given in inputs):
        needs = tuple(given is not None and given.requires_grad for given in inputs)
        loss = _LinearAdjustedCrossEntropy.apply(
            *inputs, labels_and_tables, options, bool(normalize), call.chunk_rows, needs, call.backend
        )
    else:
        settings = (*options, bool(normalize), call.chunk_rows, False, False, False, call.backend)
        loss = _operator(*inputs, *labels_and_tables, None, *settings)[0]
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
    needs_torch = _core._needs_torch(first.is_floating_point(), lam, tables)
    served = _backends.choose(backend, device, needs_torch)
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
    )
    kernel = _backends.explain(backend, features.device, call.needs_torch)
    path = "logits held" if call.chunk_rows == 0 else "logits in chunks"
    return kernel._replace(reason=f"{kernel.reason}; {path}: {call.reason}")


linear_adjusted_cross_entropy.explain = _explain  # type: ignore[attr-defined]
