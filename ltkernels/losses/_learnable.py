"""The loss as a function of its per-class vectors too: learned priors, temperatures, margins, weights.

The compiled CPU kernel forms the vectors' gradients in the pass that writes the logits' gradient, from the numbers it has in registers.
Sums over the finished gradient would read it once more, add rounded 16-bit numbers, and need a division by scale and row scale that
may be 0. A call whose vectors need no gradient never comes here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _ops
from . import _reference

_NONE = _checks.REDUCTIONS.index("none")


def needs_torch(
    tables: tuple[Tensor | None, ...], label_smoothing: float, closed: bool, backend: str | None, device: torch.device
) -> str:
    """Why no kernel can give the gradients of those of `tables` that require one; empty where one can."""
    if device.type != "cpu" or backend == "triton":
        return "gradient with respect to a table, which the CPU kernel alone computes"
    if closed:
        return "gradient with respect to a table of a closed form"
    weight = tables[-1]
    if label_smoothing != 0.0 and weight is not None and weight.requires_grad:
        return "gradient with respect to the class weight under label smoothing"
    return ""


class LearnableCrossEntropy(torch.autograd.Function):
    """As ``_core._AdjustedCrossEntropy``: scalar reductions compute all gradients with the loss, unreduced losses in backward."""

    @staticmethod
    def forward(ctx, logits, shift, scale, margin, row_scale, weight, labels, options, inplace):
        tables = (shift, scale, margin, row_scale, weight)
        ctx.options, ctx.inplace = options, inplace
        need_logits, *needs = ctx.needs_input_grad[:6]
        ctx.grads = None
        if inplace:
            loss, grad_tables = _ops.learnable_ce_(logits, *labels, *tables, None, *options, needs)
            torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(logits, grad_tables)
            return loss
        if options[-1] == _NONE:
            loss, _ = _ops.run_adjusted_ce(logits, *labels, *tables, None, *options, False, "cpu")
            ctx.save_for_backward(logits, *labels, *tables)
            return loss
        loss, *grads = _ops.run_learnable_ce(logits, *labels, *tables, None, *options, need_logits, needs)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(logits, *labels, *tables, *grads)
        else:  # owned and given away by the first backward, as in _core
            ctx.save_for_backward(logits, *labels, *tables)
            ctx.grads = grads
        return loss

    @staticmethod
    def backward(ctx, upstream):
        need_logits, *needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, upstream), None, None, None
        if ctx.options[-1] == _NONE:
            grad, grad_tables = _recomputed(ctx, upstream.contiguous())
        elif ctx.inplace or torch.compiler.is_compiling():
            grad, grad_tables = ctx.saved_tensors[-2:]
            grad, grad_tables = (grad.to(upstream.dtype) * upstream).to(grad.dtype), grad_tables * upstream
        else:
            grads, ctx.grads = ctx.grads, None
            grad, grad_tables = _recomputed(ctx, None) if grads is None else grads
            if upstream.item() != 1.0:
                grad.mul_(upstream)
                grad_tables.mul_(upstream)
        return grad if need_logits else None, *_ops.spread(grad_tables, needs), None, None, None


apply = super(torch.autograd.Function, LearnableCrossEntropy).apply  # without the way through function transforms


def _recomputed(ctx, row_coef: Tensor | None) -> tuple[Tensor, Tensor]:
    need_logits, *needs = ctx.needs_input_grad[:6]
    saved = ctx.saved_tensors[:9]
    return _ops.run_learnable_ce(*saved, row_coef, *ctx.options, need_logits, needs)[1:]


def _differentiable_gradients(ctx, upstream: Tensor) -> list[Tensor | None]:
    """The gradients as differentiable functions of all inputs, for backward(create_graph=True)."""
    if ctx.inplace:
        raise RuntimeError(
            "double backward needs the logits, and inplace=True has overwritten them; pass inplace=False"
        )
    logits, *labels = ctx.saved_tensors[:4]
    inputs = (logits, *ctx.saved_tensors[4:9])
    needs = ctx.needs_input_grad[:6]
    with torch.enable_grad():
        # Views: the gradients stay connected to whatever the inputs came from.
        views = [given.view_as(given) if need else given for given, need in zip(inputs, needs)]
        loss = _reference.adjusted_cross_entropy(views[0], *labels, *views[1:], *ctx.options)
        wanted = [view for view, need in zip(views, needs) if need]
        found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=True))
    return [next(found) if need else None for need in needs]
