"""The loss as a function of its per-class vectors too: learned priors, temperatures, margins, weights.

The compiled CPU kernel forms the vectors' gradients in the pass that writes the logits' gradient, from the numbers it has in registers.
Sums over the finished gradient would read it once more, add rounded 16-bit numbers, and need a division by scale and row scale that
may be 0. A call whose vectors need no gradient never comes here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from . import _reference, _upstream


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
    """As ``_core._AdjustedCrossEntropy``: all gradients are formed with the loss, or in backward where `_upstream.in_backward` says so."""

    @staticmethod
    def forward(ctx, logits, shift, scale, margin, row_scale, weight, labels, options, inplace, expected=None):
        inputs = (logits, *labels, shift, scale, margin, row_scale, weight)
        ctx.options, ctx.inplace, ctx.backend = options, inplace, "cpu"
        need_logits, *needs = ctx.needs_input_grad[:6]
        ctx.grads, ctx.given = None, False
        coefficients = _upstream.row_factors(expected, len(logits))
        ctx.later = _upstream.in_backward(options[-1], logits.dtype, expected)
        if inplace:
            loss, grad_tables = _ops.learnable_ce_(*inputs, coefficients, *options, needs)
            torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(expected, grad_tables, logits)
            ctx.leaf = _upstream.is_leaf(logits)
        elif ctx.later:
            loss, _ = _ops.run_adjusted_ce(*inputs, None, *options, False, "cpu")
            ctx.save_for_backward(*inputs)
        else:
            loss, *grads = _ops.run_learnable_ce(*inputs, coefficients, *options, need_logits, needs)
            if torch.compiler.is_compiling():
                ctx.save_for_backward(*inputs, expected, *reversed(grads))
            else:  # owned and given away by the first backward, as in _core
                ctx.save_for_backward(*inputs)
                ctx.grads = grads
                _upstream.remember(ctx, expected)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        need_logits, *needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, upstream), None, None, None, None
        if torch.compiler.is_compiling() and (ctx.inplace or not ctx.later):
            expected, *grads = ctx.saved_tensors[-3:]
            grad_tables, grad = (_upstream.multiplied(each, upstream, expected) for each in grads)
        elif ctx.inplace:
            _upstream.give_once(ctx)
            expected, grad_tables, logits = ctx.saved_tensors
            grad_tables = _upstream.multiplied(grad_tables, upstream, expected)
            grad = _upstream.overwritten(ctx, logits, upstream, expected)
        elif ctx.later:
            grad, grad_tables = _recomputed(ctx, upstream)
        else:
            expected = _upstream.remembered(ctx)
            grads, ctx.grads = ctx.grads, None
            grad, grad_tables = grads = _recomputed(ctx, expected) if grads is None else grads
            for each in grads:
                _upstream.multiply_(each, upstream, "cpu", expected)
        return grad if need_logits else None, *_ops.spread(grad_tables, needs), None, None, None, None


apply = super(torch.autograd.Function, LearnableCrossEntropy).apply  # without the way through function transforms


def _recomputed(ctx, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    need_logits, *needs = ctx.needs_input_grad[:6]
    saved = ctx.saved_tensors[:9]
    coefficients = _upstream.row_factors(upstream, len(saved[0]))
    return _ops.run_learnable_ce(*saved, coefficients, *ctx.options, need_logits, needs)[1:]


def _differentiable_gradients(ctx, upstream: Tensor) -> list[Tensor | None]:
    """The gradients as differentiable functions of all inputs, for backward(create_graph=True)."""
    _upstream.check_second_derivative(ctx.inplace)
    saved = ctx.saved_tensors[:9]
    logits, labels, tables = saved[0], saved[1:4], saved[4:]
    inputs = (logits, *tables)
    needs = ctx.needs_input_grad[:6]
    with torch.enable_grad():
        # Views: the gradients stay connected to whatever the inputs came from.
        views = [given.view_as(given) if need else given for given, need in zip(inputs, needs)]
        loss = _reference.adjusted_cross_entropy(views[0], *labels, *views[1:], *ctx.options)
        wanted = [view for view, need in zip(views, needs) if need]
        found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=True))
    return [next(found) if need else None for need in needs]
