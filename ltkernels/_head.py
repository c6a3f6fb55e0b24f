"""The operator of the head, chunk by chunk, and its gradients.

Each chunk's logits are a vendor GEMM into one buffer, the fused kernel replaces them by their gradient, and two more GEMMs turn
that into the chunk's feature gradient and its addition to the weight gradient. So forward does all the work, and backward
multiplies by the upstream gradient. Nothing is filtered and nothing is atomic: the same call gives the same bits.

The kernel is that of the loss of labels or of class probabilities; `losses.linear_distillation` brings its own.

Biases and the norms of the class weights cost no pass over logits or weights: ``x . w / |w| + b`` is ``scale = 1 / |w|`` and
``shift = b`` of the kernel, whose gradient is then the one with respect to ``x . w``. Closed forms have no scale and shift, and a label
scale multiplies the bias too: they get the logits themselves.

On the CPU everything is computed in float32 (float64 for float64 features), 16-bit weights converted block by block: processors
without 16-bit matrix units multiply float32 three times faster than bfloat16 and a hundred times faster than float16, and the logits are
not rounded to 16 bits. On a GPU the products and the logits are in the inputs' dtype, as those of `torch.nn.functional.linear`, but for
float16, in which the gradients of a batch's tail classes would be 0; the gradients of weights and features add up in float32. Nothing
there waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _backends, _checks, _ops
from ._call import NONE, TENSORS, Call, denominator_of
from ._errors import ArgumentError
from ._fused import differentiable
from ._watch import batched, direct, hooks_active, refuse_dtensors, transforms, wants_gradient
from .losses import _reference, _soft
from .losses._autograd import as_operands, give, own, run, run_inplace
from .losses._door import check_labels

EPS = 1e-12  # of both norms, as torch.nn.functional.normalize
# Elements of a block of class weights that is converted or projected while it sits in the second-level cache.
_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 24  # where a block costs a launch and not a trip to memory
TILES = -1  # as chunk_rows: tiles of logits in Triton's kernel, which holds none


def _blocks(weight: Tensor, real: torch.dtype, whole: bool) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of classes in the working dtype; one block where nothing needs converting and `whole` is asked for."""
    classes, width = weight.shape
    block = _BLOCK if weight.is_cpu else _DEVICE_BLOCK
    step = classes if whole and weight.dtype == real else max(1, block // max(width, 1))
    for begin in range(0, classes, step):
        at = slice(begin, min(begin + step, classes))
        yield at, weight[at].to(real)


def product_dtype(dtype: torch.dtype, backend: str) -> torch.dtype:
    """Of the logits of a chunk and of the products around them."""
    narrow = backend in _backends.ON_DEVICE and dtype == torch.bfloat16
    return dtype if narrow else _checks.real_dtype(dtype)


def product(rows: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``rows @ weight.T`` in `out`, whose dtype is that of `rows`."""
    for classes_at, w in _blocks(weight, rows.dtype, whole=True):
        torch.mm(rows, w.t(), out=out[:, classes_at])
    return out


@functools.cache
def _adds_in_float32(device: torch.device) -> bool:
    """Whether a product of 16-bit matrices can be added to a float32 one (torch 2.8 cannot, nor can the CPU)."""
    sides = torch.zeros(8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(sides.float(), sides, sides, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def _add_product(into: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """``into += left @ right``, or ``=`` for the `first` of a sum."""
    beta = 0 if first else 1
    if left.dtype == into.dtype:
        into.addmm_(left, right, beta=beta)
    elif _adds_in_float32(left.device):
        torch.addmm(into, left, right, beta=beta, out_dtype=into.dtype, out=into)
    elif first:
        into.copy_(torch.mm(left, right))  # rounded once a product, as torch's own gradient is
    else:
        into.add_(torch.mm(left, right))


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


def check_tables(call: Call) -> None:
    """The kernel's check of the class weight, under the name that the table has here, before the first chunk."""
    weight = call.weight
    if weight is None or not weight.is_cpu or not direct((weight,)):
        return
    bad = torch.isfinite(weight).logical_not()
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ArgumentError(f"class_weight[{index}] is {weight[index].item()}; it must be finite")


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # loss; gradients of features, weight, bias, tables
# (a chunk's logits, its call, which tables' gradients, number of its first row) -> row losses, gradients of tables. The gradient takes the
# logits' place, unless the third is None: no gradient is needed.
Rows = Callable[[Tensor, Call, Sequence[bool] | None, int], tuple[Tensor, Tensor | None]]


def _rows(z: Tensor, call: Call, needs: Sequence[bool] | None, first: int) -> tuple[Tensor, Tensor | None]:
    if call.target.is_floating_point():
        return _soft.in_place(z, call, 0.0, needs is not None, first), None
    return (run(z, call)[0], None) if needs is None else run_inplace(z, call, needs)


def _kernel(features: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Outputs:
    *operands, normalize, chunk_rows, needs = arguments
    call = Call(*operands).with_numbers()
    if chunk_rows == TILES:
        from .triton import linear_adjusted_ce as tiled

        if call.form or any(needs[3:]):
            raise ArgumentError("tiles of logits have neither closed forms nor gradients of tables")
        found = tiled.linear_adjusted_ce(features, weight, bias, call, normalize, needs[:3])
        return *found, found[0].new_empty(0, weight.shape[0])
    # The kernel checks the labels of a chunk when it gets there; a caller expects to hear of row 1000 before row 0 is
    # computed. Class probabilities are as many as the logits, and wait for their chunk.
    check_labels(call, weight.shape[0], False)
    check_tables(call)
    return in_chunks(features, weight, bias, call, normalize, chunk_rows, needs)


def in_chunks(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: Call,
    normalize: bool,
    chunk_rows: int,
    needs: Sequence[bool],
    rows: Rows = _rows,
) -> Outputs:
    """Loss and gradients of checked arguments; `needs` says which of features, weight, bias and the five tables."""
    # Under autocast a float32 GEMM would be cast down, and with it the weight gradient.
    with torch.autocast(features.device.type, enabled=False):
        return _chunks(features, weight, bias, call, normalize, chunk_rows, needs, rows)


def _chunks(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: Call,
    normalize: bool,
    chunk_rows: int,
    needs: Sequence[bool],
    of_rows: Rows,
) -> Outputs:
    need_features, need_weight, need_bias, *need_tables = needs
    learned, scale, shift = any(need_tables), call.scale, call.shift
    whole = call.form != 0 or call.label_scale is not None  # the kernel needs the logits themselves
    real, narrow = _checks.real_dtype(features.dtype), product_dtype(features.dtype, call.backend)
    (rows, width), classes = features.shape, weight.shape[0]
    if weight.stride(0) != 1 and weight.stride(1) != 1:
        weight = weight.contiguous()  # once: a GEMM would copy it for every chunk

    inverse = norms = stray = folded = None  # stray: what is added to the logits themselves
    if normalize:
        norms = torch.cat([torch.linalg.vector_norm(w, dim=1) for _, w in _blocks(weight, real, whole=False)])
        inverse = inverse_norms(norms)
    if bias is not None and whole:
        stray = bias.to(real)
    elif bias is not None:
        folded = bias.to(real) if scale is None else bias.to(real) * scale
        # A bias that diverged makes a NaN loss, as in torch, and no error about a table; on a GPU tables are not looked at.
        if call.backend not in _backends.ON_DEVICE:
            foldable = torch.isfinite(folded) | (folded == -torch.inf)
            if not foldable.all():
                stray = bias.to(real).where(~foldable, 0)
                folded = folded.where(foldable, 0)
        shift = folded.contiguous() if shift is None else shift + folded
    if inverse is not None and not whole:
        scale = inverse if scale is None else scale * inverse

    need_grad = need_features or need_weight or need_bias or learned
    # The kernel's shift is shift + bias * scale: with a bias the scale's gradient takes the shift's along.
    of_kernel = [need_tables[0] or (need_tables[1] and folded is not None), *need_tables[1:]] if learned else []
    denominator = denominator_of(call)
    factor = call.factor(rows)
    if need_grad and call.reduction != NONE:
        every = (1 / denominator).to(real)
        factor = every.repeat(rows) if factor is None else every * factor
    step = min(chunk_rows, max(rows, 1))
    chunk = features.new_empty((step, classes), dtype=narrow)
    losses = features.new_empty(rows, dtype=real)
    grad_features = features.new_empty((rows, width) if need_features else 0, dtype=real)
    grad_weight = features.new_empty((classes, width) if need_weight else 0, dtype=real)
    grad_bias = features.new_zeros(classes if need_bias else 0, dtype=real)
    grad_tables = features.new_zeros((sum(of_kernel), classes), dtype=real)
    unreduced = call._replace(shift=shift, scale=scale, reduction=NONE)

    for begin in range(0, max(rows, 1), step):
        at = slice(begin, min(begin + step, rows))
        x = features[at].to(real if normalize else narrow)
        if normalize:
            x_norms = torch.linalg.vector_norm(x, dim=1)
            x = x * inverse_norms(x_norms)[:, None]
        factors = x.to(narrow)  # of the products
        z = product(factors, weight, chunk[: len(x)])
        if inverse is not None and whole:
            z.mul_(inverse)  # the cosines
        if stray is not None:
            z.add_(stray)
        part = unreduced._replace(
            target=call.target[at],
            target_b=None if call.target_b is None else call.target_b[at],
            lam=None if call.lam is None else call.lam[at],
            grad_scale=None if factor is None else factor[at],
            sample_weight=None if call.sample_weight is None else call.sample_weight[at],
        )
        losses[at], shares = of_rows(z, part, of_kernel if need_grad else None, begin)
        if not need_grad:
            continue
        if shares is not None:
            grad_tables.add_(shares)
        if need_bias:
            grad_bias.add_(z.sum(dim=0, dtype=real))
        if inverse is not None and whole:
            z.mul_(inverse)  # from the cosines' gradient to that of x . w
        if need_features:
            gradient = grad_features[at]
            for classes_at, w in _blocks(weight, narrow, whole=True):
                _add_product(gradient, z[:, classes_at], w, classes_at.start == 0)
            if normalize:
                before_unit_length(gradient, x, x_norms)
        if need_weight:
            _add_product(grad_weight, z.t(), factors, begin == 0)

    if norms is not None and inverse is not None:
        if need_weight:
            for classes_at, w in _blocks(weight, real, whole=False):
                off_the_ray(grad_weight[classes_at], w, norms[classes_at], inverse[classes_at])
        if need_bias and not whole:
            grad_bias.div_(inverse)  # the kernel's gradient is that of x . w = |w| (cos + ...)
    if learned and need_tables[1]:  # from those of the kernel's scale and shift to that of scale itself
        of_shift, of_scale, *_ = _ops.spread(grad_tables, of_kernel)
        if inverse is not None and of_scale is not None and not whole:
            of_scale.mul_(inverse)
        if folded is not None and bias is not None and of_scale is not None and of_shift is not None:
            of_scale.addcmul_(of_shift, torch.where(torch.isfinite(bias), bias, 0).to(real))
            if not need_tables[0]:
                grad_tables = grad_tables[1:].contiguous()
    loss = losses if call.reduction == NONE else (losses.double().sum() / denominator).to(real)
    return loss, grad_features, grad_weight, grad_bias, grad_tables


def _fake(features: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Outputs:
    *operands, _, _, needs = arguments
    need_features, need_weight, need_bias, *need_tables = needs
    (rows, width), classes = features.shape, weight.shape[0]
    real = _checks.real_dtype(features.dtype)
    return (
        features.new_empty((rows,) if Call(*operands).reduction == NONE else (), dtype=real),
        features.new_empty((rows, width) if need_features else 0, dtype=real),
        features.new_empty((classes, width) if need_weight else 0, dtype=real),
        features.new_empty(classes if need_bias else 0, dtype=real),
        features.new_empty((sum(need_tables), classes), dtype=real),
    )


_INPUTS = 8  # features, weight, bias and the five tables


class _LinearAdjustedCrossEntropy(torch.autograd.Function):
    """``(features, weight, bias, *tables, call, normalize, chunk_rows, below) -> loss``; as ``losses._autograd._AdjustedCrossEntropy``.

    Scalar reductions compute all gradients with the loss. Only a second backward over a retained graph computes them again. Unreduced
    losses know their upstream gradient in backward only and compute the logits there a second time. float16 needs no second time: the
    gradients are formed in float32, and rounded after the upstream factor.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        features, weight, bias, *_, call, normalize, chunk_rows, below = arguments
        ctx.call, ctx.settings = call, (normalize, chunk_rows)
        ctx.later = call.reduction == NONE or (below is None and hooks_active())
        needs = (False,) * _INPUTS if ctx.later else ctx.needs_input_grad[:_INPUTS]
        found = (below or _kernel)(features, weight, bias, *call, normalize, chunk_rows, needs)
        loss: Tensor = found[0]
        saved = (features, weight, bias, *call[:TENSORS])
        if below is None or ctx.later:
            own(ctx, found[1:], call)
            ctx.save_for_backward(*saved)
        else:
            ctx.saved = len(found) - 1
            ctx.save_for_backward(*saved, *found[1:])
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        needs = ctx.needs_input_grad[:_INPUTS]
        rest = (None,) * 4
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, upstream), *rest
        grads = _recomputed(ctx, upstream) if ctx.later else give(ctx, upstream, _recomputed)
        # One rounding, after the upstream factor: float16 gradients under a loss scale would otherwise underflow first.
        dtype = ctx.saved_tensors[0].dtype
        of_inputs = [grad.to(dtype) if need else None for grad, need in zip(grads[:3], needs)]
        return *of_inputs, *_ops.spread(grads[3], needs[3:]), *rest


_apply: Callable[..., Any] = super(torch.autograd.Function, _LinearAdjustedCrossEntropy).apply


def _operands_of(ctx: Any) -> tuple[tuple[Tensor, Tensor, Tensor | None], Call]:
    features, weight, bias, *tensors = ctx.saved_tensors[: 3 + TENSORS]
    return (features, weight, bias), Call(*tensors, *ctx.call[TENSORS:])


def _recomputed(ctx: Any, upstream: Tensor | None) -> Any:
    inputs, call = _operands_of(ctx)
    needs = ctx.needs_input_grad[:_INPUTS]
    if transforms() or (upstream is not None and batched(upstream)):
        grads = _differentiable_gradients(ctx, upstream, create_graph=False)
        tables = [grad for grad in grads[3:] if grad is not None]
        none = inputs[0].new_empty(0, inputs[1].shape[0])
        return *grads[:3], torch.stack(tables) if tables else none
    call = call._replace(grad_scale=upstream)
    return (_kernel if direct((upstream, *inputs)) else operator)(*inputs, *call, *ctx.settings, needs)[1:]


def _differentiable_gradients(ctx: Any, upstream: Tensor | None, create_graph: bool = True) -> list[Tensor | None]:
    """The gradients as differentiable functions of inputs and upstream, for backward(create_graph=True)."""
    inputs, call = _operands_of(ctx)

    def of_inputs(*given: Any) -> Tensor:
        features, weight, bias = given[:3]
        logits = logits_of(features, weight, bias, ctx.settings[0])
        return _reference.adjusted_cross_entropy(logits, call.with_tables(given[3:]))

    return differentiable(of_inputs, (*inputs, *call.tables()), ctx.needs_input_grad[:_INPUTS], upstream, create_graph)


def _autograd(below: Any, features: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Any:
    *operands, normalize, chunk_rows, needs = arguments
    call = Call(*operands)
    if transforms():
        if any(needs):
            raise RuntimeError(
                f"the gradients that ltkernels::linear_adjusted_ce gives have no derivative for {transforms()}"
            )
        loss = _reference.adjusted_cross_entropy(logits_of(features, weight, bias, normalize), call)
    elif wants_gradient((features, weight, bias, *call.tables())):
        loss = _apply(features, weight, bias, *call.tables(), call, normalize, chunk_rows, below)
        if any(needs):  # a graph that was traced with them in it is traced again under autograd
            return loss, *below(features, weight, bias, *arguments)[1:]
    else:
        return below(features, weight, bias, *arguments)
    none = features.new_empty(0)
    return loss, none, none, none, features.new_empty(0, weight.shape[0])


# features (N, D), weight (C, D), bias (C,) in one dtype, and the fields of `Call`, whose weight is the class weight; the loss and all
# gradients in float64 for float64 features, else float32. `Call.grad_scale` (N,) is the upstream gradient of reduction "none". `needs` says
# which of features, weight, bias and the five tables; a gradient that is not needed is an empty tensor, and those of tables are rows.
operator = _ops.define(
    f"linear_adjusted_ce(Tensor features, Tensor classifier, Tensor? bias, {_ops.operands(Call)}, bool normalize, int chunk_rows, "
    "bool[] needs) -> (Tensor loss, Tensor grad_features, Tensor grad_weight, Tensor grad_bias, Tensor grad_tables)",
    _kernel,
    _fake,
    _autograd,
)


def loss_in_chunks(
    features: Tensor, weight: Tensor, bias: Tensor | None, call: Call, normalize: bool, chunk_rows: int
) -> Tensor:
    """The loss of a checked call without the logits; differentiable in features, weight, bias and tables."""
    inputs = (features, weight, bias)
    if not direct((*inputs, *call.tensors())):
        refuse_dtensors(call)
        loss: Tensor = operator(*inputs, *as_operands(call), normalize, chunk_rows, (False,) * _INPUTS)[0]
    elif wants_gradient((*inputs, *call.tables())):
        loss = _apply(*inputs, *call.tables(), call, normalize, chunk_rows, None)
    else:
        loss = _kernel(*inputs, *call, normalize, chunk_rows, (False,) * _INPUTS)[0]
    return loss


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
