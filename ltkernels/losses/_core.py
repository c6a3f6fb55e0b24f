"""From a public call to a kernel and back: shapes, backend, autograd. One place for every loss."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _checks, _ops
from . import _learnable, _reference, _terms, _upstream

Target = Tensor | tuple[Tensor, Tensor, Tensor | float]

_NONE = _checks.REDUCTIONS.index("none")


class _AdjustedCrossEntropy(torch.autograd.Function):
    """Scalar reductions compute the gradient together with the loss, one exp a logit, for the upstream gradient that the caller
    expects; where `_upstream.in_backward` says so, backward computes it."""

    # The labels and tables travel as one tuple: no gradient flows to them, and torch looks at every argument it is given.
    # A closed form appends its table and seed to them, and `closed` is the rest of it: (code, options), or ().
    @staticmethod
    def forward(ctx, logits, labels_and_tables, options, inplace, backend, closed=(), expected=None):
        ctx.options = options
        ctx.backend = backend
        ctx.inplace = inplace
        ctx.closed = closed
        ctx.grad = None
        ctx.given = False
        coefficients = _upstream.row_factors(expected, len(logits))
        if inplace:
            run = _ops.closed_ce_ if closed else _ops.adjusted_ce_
            loss = run(logits, *labels_and_tables, coefficients, *options, *closed, backend)
            # The operator wrote through the address; autograd must see that anyone who saved the logits holds the wrong values.
            torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(expected, logits)
            ctx.leaf = _upstream.is_leaf(logits)
            return loss
        ctx.later = _upstream.in_backward(options[-1], logits.dtype, expected)
        run = _ops.closed_ce if closed else _ops.run_adjusted_ce
        loss, grad = run(logits, *labels_and_tables, coefficients, *options, *closed, not ctx.later, backend)
        if ctx.later:
            ctx.save_for_backward(logits, *labels_and_tables)
        elif torch.compiler.is_compiling():
            ctx.save_for_backward(logits, *labels_and_tables, expected, grad)
        else:
            # Not saved but owned: the first backward gives it away, so that the upstream factor and `.grad` need no copy of it.
            ctx.save_for_backward(logits, *labels_and_tables)
            ctx.grad = grad
            _upstream.remember(ctx, expected)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            grad = _differentiable_gradient(ctx, upstream)
        elif torch.compiler.is_compiling() and (ctx.inplace or not ctx.later):
            expected, grad = ctx.saved_tensors[-2:]
            grad = _upstream.multiplied(grad, upstream, expected)
        elif ctx.inplace:
            _upstream.give_once(ctx)
            expected, logits = ctx.saved_tensors
            grad = _upstream.overwritten(ctx, logits, upstream, expected)
        elif ctx.later:
            grad = _recomputed(ctx, upstream)
        else:
            expected = _upstream.remembered(ctx)
            grad, ctx.grad = ctx.grad, None
            if grad is None:  # a second backward over a retained graph; the kernel gives the same bits again
                grad = _recomputed(ctx, expected)
            _upstream.multiply_(grad, upstream, ctx.backend, expected)
        return grad, None, None, None, None, None, None


_apply = super(torch.autograd.Function, _AdjustedCrossEntropy).apply


def _recomputed(ctx, upstream: Tensor | None) -> Tensor:
    logits, *labels_and_tables = ctx.saved_tensors
    run = _ops.closed_ce if ctx.closed else _ops.run_adjusted_ce
    coefficients = _upstream.row_factors(upstream, len(logits))
    return run(logits, *labels_and_tables, coefficients, *ctx.options, *ctx.closed, True, ctx.backend)[1]


def _differentiable_gradient(ctx, upstream: Tensor) -> Tensor:
    """The gradient as a differentiable function of logits and upstream, for backward(create_graph=True)."""
    _upstream.check_second_derivative(ctx.inplace)
    saved = ctx.saved_tensors
    logits, *labels_and_tables = saved[:9]  # a closed form's table and seed follow
    term = (
        None if not ctx.closed else _terms.Term(_terms.FORMS[ctx.closed[0]], saved[9], saved[10], tuple(ctx.closed[1]))
    )
    with torch.enable_grad():
        # A view of the saved logits: the gradient with respect to it stays connected to whatever the logits came from.
        z = logits.view_as(logits) if logits.requires_grad else logits.detach().requires_grad_()
        loss = _reference.adjusted_cross_entropy(z, *labels_and_tables, *ctx.options, term)
        (grad,) = torch.autograd.grad(loss, z, upstream, create_graph=True)
    return grad


def adjusted_cross_entropy(
    logits: Tensor,
    target: Target,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    margin: Tensor | None = None,
    row_scale: Tensor | None = None,
    weight: Tensor | None = None,
    focal_gamma: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
    term: _terms.Term | None = None,
) -> Tensor:
    r"""Softmax cross-entropy with per-class scale, shift, margin, row scale and weight: the whole long-tail family.

    .. math::
        a_{ij} = \sigma_{y_i} (\beta_j z_{ij} + \delta_j - m_{y_i} [j = y_i]), \quad
        l_i = -\log \mathrm{softmax}_j(a_i)_{y_i}, \quad
        L_i = \alpha_{y_i} (1 - e^{-l_i})^\gamma l_i

    On every input that `torch.nn.functional.cross_entropy` accepts, the call without vectors gives torch's result, with a
    float32 loss for 16-bit logits.

    Args:
        logits: (N, C), (C,) or (N, C, d1, ...); float32, float64, bfloat16 or float16.
        target: class indices (N,), () or (N, d1, ...), any integer dtype; or class probabilities in the logits' shape (then
            without margin, row_scale and focal_gamma, which a label chooses); or ``(y_a, y_b, lam)`` for mixed samples: two
            class-index tensors and the share of the first, a number or a tensor in their shape, in [0, 1]. A mixed loss is
            ``lam * L(y_a) + (1 - lam) * L(y_b)``, and a row whose `y_a` is `ignore_index` is ignored.
        shift: (C,) delta, added to the logits (a log prior); -inf removes a class.
        scale: (C,) beta, multiplies the logits.
        margin: (C,) m, subtracted from the label's logit only.
        row_scale: (C,) sigma, multiplies the whole row; chosen by the label.
        weight: (C,) alpha, class weight; chosen by the label.
        focal_gamma: gamma >= 0 of the focal factor, on the label's own term.
        label_smoothing: eps in [0, 1]: ``(1 - eps) L_i + eps / C * sum_j alpha_j l_ij`` with l_ij the cross-entropy of class j.
        ignore_index: label of rows that have no loss and gradient 0.
        reduction: ``"mean"`` divides by the sum of the weights of the rows, as torch; ``"batch_mean"`` by the number of rows;
            ``"sum"``; ``"none"`` keeps the target's shape. Ignored rows do not count.
        inplace: let the gradient overwrite the logits' memory (saves one array). The logits are garbage afterwards, and their
            version counter says so to autograd; backward runs once. Not with ``reduction="none"``. Under a loss scaler float16 logits
            need `grad_scale` then.
        backend: None, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``; see `ltkernels.explain`.
        grad_scale: what the loss will be multiplied by before its backward (a loss scaler's factor, 1 / accumulation steps, its share
            of a total): a number above 0, or a tensor of one element on the logits' device, where no host waits for it. The gradient
            is formed with it in the forward pass, so that backward needs no pass of its own over the gradient, and is rounded to
            16 bits after it. The loss does not change. Where another upstream gradient comes, backward multiplies by the quotient,
            which rounds a second time and cannot bring back what left float16's range. None expects 1, or, for float16 logits, leaves
            the gradient to backward, for rounding it before the scaler's factor would make its small entries 0: a third pass, over
            logits and tables that must still be what they were.
        term: closed form of Seesaw, softmax equalization, ArcFace or the sigmoid family, from their builders in
            `ltkernels.adjustments`; not together with shift, scale, margin, class probabilities, or `row_scale` but for ArcFace.

    Returns:
        The loss, float64 for float64 logits and float32 for all others.

    Tables are rounded to the loss' dtype. A table that requires a gradient gets one, in the kernel's own pass on the CPU (`explain` says
    where not); a temperature learned for all classes at once is ``scale=temperature.expand(C)``. Second derivatives and class
    probabilities are computed by the plain torch reference.

    Raises:
        ValueError: a label out of range (row and value), a table entry that is not finite, a shape or device that does not fit.
        TypeError: a dtype that does not fit.
    """
    _checks.logits(logits)
    reduction_code = _checks.reduction(reduction)
    if type(focal_gamma) is not float or not 0.0 <= focal_gamma < 1e30:
        focal_gamma = _checks.number("focal_gamma", focal_gamma, low=0.0)
    if type(label_smoothing) is not float or not 0.0 <= label_smoothing <= 1.0:
        label_smoothing = _checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    size = logits.shape
    dim = len(size)
    device = logits.device
    if (  # the usual case, without the calls
        type(target) is Tensor
        and target.dtype is torch.int64
        and dim == 2
        and target.dim() == 1
        and target.numel() == size[0]
        and target.device == device
    ):
        target_b = lam = None
        probabilities = False
    else:
        target, target_b, lam = _split_target(target, logits)
        probabilities = target.is_floating_point()
    classes = size[1 if dim > 1 else 0]
    if classes == 0:
        raise ValueError(f"logits has shape {tuple(size)}; there must be at least one class")
    real = _checks.real_dtype(logits.dtype)
    if shift is not None:
        shift = _checks.table("shift", shift, classes, device, real)
    if scale is not None:
        scale = _checks.table("scale", scale, classes, device, real)
    if margin is not None:
        margin = _checks.table("margin", margin, classes, device, real)
    if row_scale is not None:
        row_scale = _checks.table("row_scale", row_scale, classes, device, real)
    if weight is not None:
        weight = _checks.table("weight", weight, classes, device, real)
    tables = (shift, scale, margin, row_scale, weight)
    if term is not None:
        term = _checked_term(term, classes, device, real, tables, label_smoothing, probabilities)
    if probabilities:
        _check_probabilities(margin, row_scale, focal_gamma, ignore_index)
    learned = require_grad(tables)
    if grad_scale is not None:
        grad_scale = _checks.grad_scale(grad_scale, device, real)
    needs_torch = _needs_torch(probabilities, lam)
    if learned and not needs_torch:
        needs_torch = _learnable.needs_torch(tables, label_smoothing, term is not None, backend, device)
    backend = _backends.choose(backend, device, needs_torch)
    if inplace and (reduction_code == _NONE or backend == "torch"):
        reason = (
            "reduction='none' needs the logits in backward"
            if backend != "torch"
            else "the torch backend serves this call"
        )
        raise ValueError(f"inplace=True is not possible: {reason}")

    if dim != 2:
        shape = target.shape
        logits, target, target_b, lam = _as_rows(logits, target, target_b, lam, probabilities)
    options = (focal_gamma, label_smoothing, ignore_index, reduction_code)
    if backend == "torch":
        if not probabilities:
            _check_labels(target, target_b, classes, ignore_index)
        loss = _reference.adjusted_cross_entropy(logits, target, target_b, lam, *tables, *options, term)
    else:
        if not target.is_contiguous():
            target = target.contiguous()
        if learned:
            apply = _learnable.apply if _ops.unwatched(logits) else _learnable.LearnableCrossEntropy.apply
            loss = apply(logits, *tables, (target, target_b, lam), options, inplace, grad_scale)
        elif term is not None:
            loss = _closed_form(logits, (target, target_b, lam, *tables), options, inplace, backend, term, grad_scale)
        elif logits.requires_grad and torch.is_grad_enabled():
            # Function.apply unwraps function transforms first; without any, that is a tenth of a small loss' time.
            apply = _apply if _ops.unwatched(logits) else _AdjustedCrossEntropy.apply
            loss = apply(logits, (target, target_b, lam, *tables), options, inplace, backend, (), grad_scale)
        else:
            loss, _ = _ops.run_adjusted_ce(logits, target, target_b, lam, *tables, None, *options, False, backend)
    if dim != 2 and reduction_code == _NONE:
        loss = loss.reshape(shape[:1] + shape[2:] if probabilities and dim > 2 else shape[:0] if dim == 1 else shape)
    return loss


def _closed_form(
    logits: Tensor,
    labels_and_tables: tuple[Tensor | None, ...],
    options: tuple,
    inplace: bool,
    backend: str,
    term: _terms.Term,
    grad_scale: Tensor | None,
) -> Tensor:
    labels_and_tables = (*labels_and_tables, term.table, term.seed)
    closed = (_terms.FORMS.index(term.form), list(term.options))
    if logits.requires_grad and torch.is_grad_enabled():
        return _AdjustedCrossEntropy.apply(logits, labels_and_tables, options, inplace, backend, closed, grad_scale)
    loss, _ = _ops.closed_ce(logits, *labels_and_tables, None, *options, *closed, False, backend)
    return loss


def _checked_term(
    term: _terms.Term,
    classes: int,
    device: torch.device,
    real: torch.dtype,
    tables: tuple[Tensor | None, ...],
    label_smoothing: float,
    probabilities: bool,
) -> _terms.Term:
    """The term with its table as the kernel wants it, and a seed where it needs one."""
    if term.form not in _terms.FORMS[1:]:
        raise ValueError(f"term.form is {term.form!r}; it must be one of {', '.join(map(repr, _terms.FORMS[1:]))}")
    for name, table in zip(("shift", "scale", "margin", "row_scale"), tables, strict=False):
        if table is not None and not (name == "row_scale" and term.form == "arcface"):
            raise ValueError(f"{name} cannot be combined with the closed form {term.form!r}")
    if probabilities:
        raise ValueError(f"target holds class probabilities; the closed form {term.form!r} needs class indices")
    if label_smoothing != 0.0 and term.form in _terms.NO_LABEL_SMOOTHING:
        reason = _terms.NO_LABEL_SMOOTHING[term.form]
        raise ValueError(f"label_smoothing is {label_smoothing}; it has no meaning with {term.form}: {reason}")
    table = _checks.table("class_counts of the loss", term.table, classes, device, real)
    seed = term.seed
    if term.form == "equalization":
        seed = torch.randint(2**62, (1,), device=device) if seed is None else seed.to(device)
    return _terms.Term(term.form, table, seed, term.options)


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


def _explain(
    op: object, logits: Tensor, target: Target, *_: object, backend: str | None = None, **kwargs: object
) -> _backends.Explanation:
    _checks.logits(logits)
    first, _, lam = _split_target(target, logits)
    if isinstance(op, torch.nn.Module) and backend is None:
        backend = getattr(op, "backend", None)
    tables = tuple(kwargs.get(name, getattr(op, name, None)) for name in _backends.TABLES)
    needs_torch = _needs_torch(first.is_floating_point(), lam)
    if require_grad(tables) and not needs_torch:
        label_smoothing = kwargs.get("label_smoothing", getattr(op, "label_smoothing", 0.0))
        closed = kwargs.get("term") is not None or getattr(op, "closed_form", False)
        needs_torch = _learnable.needs_torch(tables, label_smoothing, closed, backend, logits.device)
    return _backends.explain(backend, logits.device, needs_torch)


def require_grad(tables: tuple[Tensor | None, ...]) -> bool:
    """Whether a gradient with respect to a table is wanted."""
    if torch.is_grad_enabled():
        for table in tables:
            if table is not None and table.requires_grad:
                return True
    return False


def _needs_torch(probabilities: bool, lam: Tensor | None) -> str:
    """Why no kernel can serve a call, whatever its tables; empty when one can."""
    if probabilities:
        return "class probabilities as target"
    if lam is not None and lam.requires_grad and torch.is_grad_enabled():
        return "gradient with respect to lam"
    return ""


def _split_target(target: Target, logits: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Checked (target, target_b, lam); class indices become int64, lam a tensor in the targets' shape."""
    if not isinstance(target, tuple):
        if not _checks.target(target, logits) and target.dtype != torch.int64:
            target = target.long()
        return target, None, None
    if len(target) != 3:
        raise ValueError(f"target is a tuple of {len(target)}; mixed targets are (y_a, y_b, lam)")
    first, second, lam = target
    if _checks.target(first, logits, "target[0]") or _checks.target(second, logits, "target[1]"):
        raise TypeError("target[0] and target[1] of mixed targets must hold class indices, not probabilities")
    real = _checks.real_dtype(logits.dtype)
    if isinstance(lam, Tensor):
        if lam.shape not in ((), first.shape):
            raise ValueError(f"target[2] (lam) has shape {tuple(lam.shape)}; it must be () or {tuple(first.shape)}")
        lam = lam.to(device=logits.device, dtype=real).expand(first.shape)
    else:
        lam = torch.full(
            first.shape, _checks.number("target[2] (lam)", lam, low=0.0, high=1.0), dtype=real, device=logits.device
        )
    return first.long(), second.long().contiguous(), lam.contiguous()


def _check_probabilities(
    margin: Tensor | None, row_scale: Tensor | None, focal_gamma: float, ignore_index: int
) -> None:
    if margin is not None or row_scale is not None or focal_gamma != 0.0:
        name = "margin" if margin is not None else "row_scale" if row_scale is not None else "focal_gamma"
        raise ValueError(f"{name} is chosen by the label; it cannot be used with class probabilities as target")
    if ignore_index >= 0:
        raise ValueError(f"ignore_index is {ignore_index}; it has no meaning with class probabilities as target")


def _as_rows(
    logits: Tensor, target: Tensor, target_b: Tensor | None, lam: Tensor | None, probabilities: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(C,) and (N, C, d1, ...) to one row a sample; differentiable."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.movedim(1, -1).reshape(-1, tensor.shape[1])

    return (
        rows(logits),
        rows(target) if probabilities else target.reshape(-1),
        None if target_b is None else target_b.reshape(-1),
        None if lam is None else lam.reshape(-1),
    )


def _check_labels(target: Tensor, target_b: Tensor | None, classes: int, ignore_index: int) -> None:
    """The kernel's label check for the reference. On the CPU only: reading labels back would make each call wait for a GPU."""
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    valid = target != ignore_index
    for name, labels in (("target", target), ("the second target", target_b)):
        if labels is None:
            continue
        bad = valid & ((labels < 0) | (labels >= classes))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} has label {int(labels[row])} in row {row}; labels must lie in [0, {classes}) or equal "
                f"ignore_index ({ignore_index})"
            )
