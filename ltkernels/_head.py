"""The operator of the head, chunk by chunk, and its gradients.

Each chunk's logits are a vendor GEMM into one buffer, the fused kernel replaces them by their gradient, and two more GEMMs turn
that into the chunk's feature gradient and its addition to the weight gradient. So forward does all the work, and backward
multiplies by the upstream gradient. Nothing is filtered and nothing is atomic: the same call gives the same bits.

Biases and the norms of the class weights cost no pass over logits or weights: ``x . w / |w| + b`` is ``scale = 1 / |w|`` and
``shift = b`` of the kernel, whose gradient is then the one with respect to ``x . w``. Closed forms have no scale and shift: they
get the cosines themselves.

Everything is computed in float32 (float64 for float64 features), 16-bit weights converted block by block: processors without
16-bit matrix units multiply float32 three times faster than bfloat16 and a hundred times faster than float16, and the logits are
not rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _checks, _ops
from .losses import _core, _reference, _terms, _upstream

EPS = 1e-12  # of both norms, as torch.nn.functional.normalize
# Elements of a block of class weights that is converted or projected while it sits in the second-level cache.
_BLOCK = 1 << 18

_MEAN, _BATCH_MEAN = _checks.REDUCTIONS.index("mean"), _checks.REDUCTIONS.index("batch_mean")
_NONE = _checks.REDUCTIONS.index("none")


def _blocks(weight: Tensor, real: torch.dtype, whole: bool) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of classes in the working dtype; one block where nothing needs converting and `whole` is asked for."""
    classes, width = weight.shape
    step = classes if whole and weight.dtype == real else max(1, _BLOCK // max(width, 1))
    for begin in range(0, classes, step):
        at = slice(begin, min(begin + step, classes))
        yield at, weight[at].to(real)


def inverse_norms(norms: Tensor) -> Tensor:
    """1 / max(norm, eps). A norm that is not finite gives 0, which the kernel accepts as a scale: the cosine is then 0,
    or NaN where an entry is not finite, as in torch."""
    return torch.where(torch.isfinite(norms), 1 / norms.clamp_min(EPS), 0)


def off_the_ray(gradient: Tensor, vectors: Tensor, norms: Tensor, inverse: Tensor) -> Tensor:
    """In place: takes the part along each of `vectors` (rows) out of its gradient, which is what the norm's derivative
    does. A norm below eps counts as constant."""
    share = (vectors * gradient).sum(dim=1) * inverse * inverse
    share = torch.where(norms >= EPS, share, 0)
    return gradient.addcmul_(vectors, share[:, None], value=-1)


def before_unit_length(gradient: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """In place: the gradient with respect to rows of these norms, from that with respect to the same rows of length 1."""
    return off_the_ray(gradient, unit, norms, torch.ones_like(norms)).mul_(inverse_norms(norms)[:, None])


def denominator_of(
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


def check_class_weight(class_weight: Tensor | None) -> None:
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
    need_tables: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    learned = any(need_tables)
    if backend == "triton" and not form:
        from .triton import linear_adjusted_ce as tiled

        if not tiled.unsupported(features.dtype):
            tables = (shift, scale, margin, row_scale, class_weight)
            settings = (focal_gamma, label_smoothing, ignore_index, reduction, normalize, chunk_rows)
            outputs = tiled.linear_adjusted_ce(
                features,
                weight,
                bias,
                target,
                target_b,
                lam,
                *tables,
                row_coef,
                *settings,
                need_features,
                need_weight,
                need_bias,
            )
            return *outputs, outputs[0].new_empty(0, weight.shape[0])
    # The kernel checks the labels of a chunk when it gets there; a caller expects to hear of row 1000 before row 0 is
    # computed.
    _core._check_labels(target, target_b, weight.shape[0], ignore_index)
    check_class_weight(class_weight)
    # Under autocast a float32 GEMM would be cast down, and with it the weight gradient.
    with torch.autocast(features.device.type, enabled=False):
        real = _checks.real_dtype(features.dtype)
        (rows, width), classes = features.shape, weight.shape[0]
        if weight.stride(0) != 1 and weight.stride(1) != 1:
            weight = weight.contiguous()  # once: a GEMM would copy it for every chunk

        inverse = norms = stray = folded = None  # stray: what is added to the logits themselves
        if normalize:
            norms = torch.cat([torch.linalg.vector_norm(w, dim=1) for _, w in _blocks(weight, real, whole=False)])
            inverse = inverse_norms(norms)
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

        need_grad = need_features or need_weight or need_bias or learned
        # The kernel's shift is shift + bias * scale: with a bias the scale's gradient takes the shift's along.
        of_kernel = [need_tables[0] or (need_tables[1] and folded is not None), *need_tables[1:]] if learned else []
        denominator = denominator_of(target, target_b, lam, class_weight, ignore_index, reduction)
        if need_grad and row_coef is None:
            row_coef = (1 / denominator).to(real).repeat(rows)
        step = min(chunk_rows, max(rows, 1))
        chunk = features.new_empty((step, classes), dtype=real)
        losses = features.new_empty(rows, dtype=real)
        grad_features = features.new_empty((rows, width) if need_features else 0, dtype=real)
        grad_weight = features.new_empty((classes, width) if need_weight else 0, dtype=real)
        grad_bias = features.new_zeros(classes if need_bias else 0, dtype=real)
        grad_tables = features.new_zeros((sum(of_kernel), classes), dtype=real)

        for begin in range(0, max(rows, 1), step):
            at = slice(begin, min(begin + step, rows))
            x = features[at].to(real)
            if normalize:
                x_norms = torch.linalg.vector_norm(x, dim=1)
                x = x * inverse_norms(x_norms)[:, None]
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
            if learned:
                losses[at], shares = _ops.learnable_ce_(z, *labels, *tables, row_coef[at], *options, of_kernel)
                grad_tables.add_(shares)
            else:
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
                    before_unit_length(gradient, x, x_norms)
            if need_weight:
                grad_weight.addmm_(z.t(), x, beta=0 if begin == 0 else 1)

        if normalize and need_weight:
            for classes_at, w in _blocks(weight, real, whole=False):
                off_the_ray(grad_weight[classes_at], w, norms[classes_at], inverse[classes_at])
        if normalize and need_bias and not form:
            grad_bias.div_(inverse)  # the kernel's gradient is that of x . w = |w| (cos + ...)
        if learned and need_tables[1]:  # from those of the kernel's scale and shift to that of scale itself
            of_shift, of_scale, *_ = _ops.spread(grad_tables, of_kernel)
            if normalize:
                of_scale.mul_(inverse)
            if folded is not None:
                of_scale.addcmul_(of_shift, torch.where(torch.isfinite(bias), bias, 0).to(real))
            if not need_tables[0] and folded is not None:
                grad_tables = grad_tables[1:].contiguous()
        if reduction != _NONE:
            losses = (losses.double().sum() / denominator).to(real)
        return losses, grad_features, grad_weight, grad_bias, grad_tables


def _linear_adjusted_ce_fake(
    features: Tensor, weight: Tensor, *arguments: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reduction, need_features, need_weight, need_bias, need_tables = arguments[-10], *arguments[-5:-1]
    (rows, width), classes = features.shape, weight.shape[0]
    real = _checks.real_dtype(features.dtype)
    return (
        features.new_empty((rows,) if reduction == _NONE else (), dtype=real),
        features.new_empty((rows, width) if need_features else 0, dtype=real),
        features.new_empty((classes, width) if need_weight else 0, dtype=real),
        features.new_empty(classes if need_bias else 0, dtype=real),
        features.new_empty((sum(need_tables), classes), dtype=real),
    )


# features (N, D), weight (C, D), bias (C,) in one dtype; the loss and all gradients in float64 for float64 features,
# else float32. table, seed, form and form_options are those of closed_ce (form 0: none). row_coef (N,) is the upstream
# gradient of reduction "none". A gradient that is not needed is an empty tensor. need_tables and grad_tables are those of learnable_ce;
# nothing or all False where no table is learned.
operator = _ops.define(
    "linear_adjusted_ce(Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor? target_b, Tensor? lam, "
    "Tensor? shift, Tensor? scale, Tensor? margin, Tensor? row_scale, Tensor? class_weight, Tensor? table, "
    "Tensor? seed, Tensor? row_coef, float focal_gamma, float label_smoothing, int ignore_index, int reduction, int form, "
    "float[] form_options, bool normalize, int chunk_rows, "
    "bool need_features, bool need_weight, bool need_bias, bool[] need_tables, str backend) "
    "-> (Tensor loss, Tensor grad_features, Tensor grad_weight, Tensor grad_bias, Tensor grad_tables)",
    _linear_adjusted_ce,
    _linear_adjusted_ce_fake,
)


class LinearAdjustedCrossEntropy(torch.autograd.Function):
    """Scalar reductions compute all gradients with the loss; backward multiplies them by the upstream gradient. Only a
    second backward over a retained graph computes them again.

    Unreduced losses know their upstream gradient in backward only and compute the logits there a second time."""

    # `needs` says which of features, weight and bias, and of the five tables where one is learned, require a gradient; the tables then
    # come a second time, as `learned`, for autograd to see them.
    @staticmethod
    def forward(
        ctx, features, weight, bias, labels_and_tables, options, normalize, chunk_rows, needs, backend, *learned
    ):
        ctx.arguments = (options, normalize, chunk_rows, needs, backend)
        now = needs if options[3] != _NONE else (False,) * len(needs)
        loss, *grads = operator(
            features,
            weight,
            bias,
            *labels_and_tables,
            None,
            *options,
            normalize,
            chunk_rows,
            *now[:3],
            now[3:],
            backend,
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
        inputs = (features, weight, bias, *(labels_and_tables[3:8] if needs[3:] else ()))
        arguments = (features, weight, bias, *labels_and_tables)
        settings = (*options, normalize, chunk_rows, *needs[:3], needs[3:], backend)
        if torch.is_grad_enabled():
            grads = _differentiable_gradients(inputs, needs, labels_and_tables, options, normalize, upstream)
            return *grads[:3], None, None, None, None, None, None, *grads[3:]
        if options[3] == _NONE:
            _, *grads = operator(*arguments, upstream.contiguous(), *settings)
        elif torch.compiler.is_compiling():
            grads = [grad * upstream for grad in rest[10:]]
        else:
            grads, ctx.grads = ctx.grads, None
            if grads is None:  # a second backward over a retained graph
                _, *grads = operator(*arguments, None, *settings)
            for grad in grads:
                _upstream.multiply_(grad, upstream, backend)
        # One rounding, after the upstream factor: float16 gradients under a loss scale would otherwise underflow first.
        of_inputs = [grad.to(given.dtype) if need else None for grad, given, need in zip(grads, inputs, needs)]
        return *of_inputs[:3], None, None, None, None, None, None, *_ops.spread(grads[3], needs[3:])


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
        labels_and_tables[3:] = views[3:] or labels_and_tables[3:]
        *options, form, form_options = options
        term = _terms.Term(_terms.FORMS[form], table, seed, tuple(form_options)) if form else None
        loss = _reference.adjusted_cross_entropy(logits_of(*views[:3], normalize), *labels_and_tables, *options, term)
        found = iter(
            torch.autograd.grad(loss, [view for view, need in zip(views, needs) if need], upstream, create_graph=True)
        )
    return [next(found) if need else None for need in needs]


def logits_of(features: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    """The B x C logits, differentiable. On the CPU in the working dtype of the chunked path: both give one result."""
    device = features.device.type
    if torch.is_autocast_enabled(device):  # the inputs are cast already; entering the context costs 10 us
        with torch.autocast(device, enabled=False):
            return logits_of(features, weight, bias, normalize)
    if device == "cpu":
        real = _checks.real_dtype(features.dtype)
        features, weight = features.to(real), weight.to(real)
        bias = None if bias is None else bias.to(real)
    if normalize:
        features, weight = F.normalize(features, dim=1, eps=EPS), F.normalize(weight, dim=1, eps=EPS)
    return F.linear(features, weight, bias)
