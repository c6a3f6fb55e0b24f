"""The op: `adjusted_cross_entropy`, and `explain`, which says who would serve a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .. import _backends
from .._watch import is_dtensor
from . import _autograd, _reference, _sigmoid, _soft
from ._door import Checked, Options, Target, checked, takes_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options
def adjusted_cross_entropy(logits: Tensor, target: Target, **options: Unpack[Options]) -> Tensor:
    r"""Softmax cross-entropy with per-class scale, shift, margin, row scale and weight: the whole long-tail family.

    .. math::
        a_{ij} = \sigma_{y_i} (\beta_j \kappa_{y_i}^{[j = y_i]} z_{ij} + \delta_j - m_{y_i} [j = y_i]), \quad
        l_i = -\log \mathrm{softmax}_j(a_i)_{y_i}, \quad
        L_i = \alpha_{y_i} (1 - e^{-l_i})^\gamma l_i

    On every input that `torch.nn.functional.cross_entropy` accepts, the call without vectors gives torch's result, with a
    float32 loss for 16-bit logits.

    Args:
        logits: (N, C), (C,) or (N, C, d1, ...); float32, float64, bfloat16 or float16.
        target: class indices (N,), () or (N, d1, ...), any integer dtype; or class probabilities q in the logits' shape, in any
            floating-point dtype: ``L_i = -sum_j alpha_j q_ij log softmax_j(a_i)``, the gradient ``(sum_j q_ij) p - q`` where nothing else
            is given. A row of q may have any sum, and 0 log 0 is 0 (then without margin, row_scale, label_scale, focal_gamma and a
            table as label_smoothing, which a label chooses); or
            ``(y_a, y_b, lam)`` for mixed samples: two class-index tensors and the share of the first, a number or a tensor in their
            shape, in [0, 1]. A mixed loss is ``lam * L(y_a) + (1 - lam) * L(y_b)``, and a row whose `y_a` is `ignore_index` is ignored.
        shift: (C,) delta, added to the logits (a log prior); -inf removes a class.
        scale: (C,) beta, multiplies the logits.
        margin: (C,) m, subtracted from the label's logit only.
        row_scale: (C,) sigma, multiplies the whole row; chosen by the label.
        weight: (C,) alpha, class weight; chosen by the label.
        label_scale: (C,) kappa, multiplies the label's logit only; chosen by the label.
        focal_gamma: gamma >= 0 of the focal factor, on the label's own term.
        label_smoothing: eps in [0, 1]: ``(1 - eps) L_i + eps / C * sum_j alpha_j l_ij`` with l_ij the cross-entropy of class j; or (C,),
            an eps for each class, chosen by the label.
        ignore_index: label of rows that have no loss and gradient 0.
        reduction: ``"mean"`` divides by the sum of the weights of the rows (class weights, as torch, times sample weights);
            ``"batch_mean"`` by the number of rows; ``"sum"``; ``"none"`` keeps the target's shape. Ignored rows do not count.
        inplace: let the gradient overwrite the logits' memory (saves one array). The logits are garbage afterwards, and their
            version counter says so to autograd; backward runs once. Not with ``reduction="none"`` or class probabilities. Under a
            loss scaler float16 logits need `grad_scale` then.
        backend: None, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``; see `ltkernels.explain`.
        grad_scale: what the loss will be multiplied by before its backward (a loss scaler's factor, 1 / accumulation steps, its share
            of a total): a number above 0, or a tensor of one element on the logits' device, where no host waits for it. The gradient
            is formed with it in the forward pass, so that backward needs no pass of its own over the gradient, and is rounded to
            16 bits after it. The loss does not change. Where another upstream gradient comes, backward multiplies by the quotient,
            which rounds a second time and cannot bring back what left float16's range. None expects 1, or, for float16 logits, leaves
            the gradient to backward, for rounding it before the scaler's factor would make its small entries 0: a third pass, over
            logits and tables that must still be what they were.
        term: closed form of Seesaw, softmax equalization, ArcFace or the sigmoid family, from their builders in
            `ltkernels.adjustments`; not together with margin, label_scale, class probabilities, shift and scale but for the sigmoid
            family, or `row_scale` but for ArcFace. With the sigmoid family a target in the logits' shape is a multi-label one: see
            `ltkernels.functional.sigmoid_cross_entropy`.
        sample_weight: a factor of each row's loss, in the shape of the class indices. A mean of equal weights is the mean without them.

    Returns:
        The loss, float64 for float64 logits and float32 for all others.

    Tables are rounded to the loss' dtype. A table that requires a gradient gets one, in the kernel's own pass on the CPU (`explain` says
    where not); a temperature learned for all classes at once is ``scale=temperature.expand(C)``. Second derivatives, gradients with
    respect to lam, sample_weight, label_scale, label_smoothing and class probabilities, and those of tables beside class probabilities or
    on a GPU are computed by the plain torch reference.

    Raises:
        ValueError: a label out of range (row and value), a class probability that is negative or not finite, a table entry or sample
            weight that is not finite, a smoothing outside [0, 1], a shape or device that does not fit.
        TypeError: a dtype that does not fit.
    """
    if type(logits) is not Tensor and is_dtensor(logits):
        from ..distributed._dtensor import adjusted_cross_entropy as of_dtensor

        return of_dtensor(logits, target, **options)
    if options.get("term") is not None and _sigmoid.serves(logits, target, options):
        found: Tensor = _sigmoid.sigmoid_cross_entropy(logits, cast("Tensor", target), **_sigmoid.options_of(options))
        return found
    return of_checked(checked(logits, target, **options))


def of_checked(checked: Checked) -> Tensor:
    """The loss of what the door let in."""
    logits, call, inplace, shape, _, direct, _ = checked
    if call.backend == "torch":
        loss = _reference.adjusted_cross_entropy(logits, call)
    elif call.target.is_floating_point():
        loss = _soft.loss(logits, call)
    else:
        loss = _autograd.loss(logits, call, inplace, direct)
    return loss if shape is None else loss.reshape(shape)


def explain(op: object, *args: Any, **kwargs: Any) -> _backends.Explanation:
    """Which backend would serve a loss call, and why; nothing is computed.

    Args:
        op: a function of `ltkernels.functional`, or a Module of `ltkernels.nn`.
        args, kwargs: the arguments of the call.

    Returns:
        ``(backend, reason)``; prints as ``"cpu-avx512: compiled kernel on 2 thread(s)"``.
    """
    if not callable(op) or not getattr(op, "__module__", "").startswith("ltkernels."):
        raise TypeError(f"op is {op!r}; it must be a function of ltkernels.functional or a Module of ltkernels.nn")
    # An operation that chooses more than a backend explains itself.
    return getattr(op, "explain", functools.partial(_explain, op))(*args, **kwargs)


def _explain(op: object, logits: Tensor, target: Target, *_: object, **kwargs: Any) -> _backends.Explanation:
    """`explain` of the op, or of a Module, whose own tables and options count."""
    options = {name: kwargs[name] for name in Options.__annotations__ if name in kwargs}
    if isinstance(op, torch.nn.Module):
        own = cast("Callable[[], Options]", op.call_options)()
        options = {**own, **options}
    if _sigmoid.serves(logits, target, options):
        return _sigmoid.sigmoid_cross_entropy.explain(logits, target, **_sigmoid.options_of(options))  # type: ignore[attr-defined,no-any-return]
    term = options.get("term")
    if term is not None and term.seed is None:  # a question draws no random number
        options["term"] = term._replace(seed=torch.zeros(1, dtype=torch.int64))
    found = checked(logits, target, **options)
    return _backends.explain(options.get("backend"), logits.device, found.needs_torch, found.not_cuda)
