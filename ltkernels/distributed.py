"""Classifier and loss with the classes sharded over the ranks of a process group: `sharded_linear_adjusted_cross_entropy`.

Every rank holds the whole batch of features and some rows of the classifier. A rank computes the row statistics of its own classes (the
first phase of `ltkernels.losses._two_phase`), one all-gather of four numbers a row makes them those of all classes, and the second phase
gives the gradient of the rank's own logits: exact, and no rank ever sees another's logits or weights. Backward sums the feature gradient
over the ranks, once. Gloo and NCCL; all ranks must make the same calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks
from ._head import before_unit_length, check_class_weight, denominator_of, inverse_norms, off_the_ray
from .losses import _core, _two_phase
from .losses._core import Target

# Local logits (256 MiB of float32) that are kept from forward to backward. More are computed in chunks of rows, twice.
_HELD = 1 << 26
# What `ignore_index` becomes inside: a number that no class has.
_IGNORED = -100


class _Options(NamedTuple):
    start: int
    classes: int
    group: Any
    normalize: bool
    focal_gamma: float
    label_smoothing: float
    ignore_index: int
    reduction: int
    step: int  # rows of a chunk; all rows where the logits are kept


class _Shard(NamedTuple):
    """What both phases need of this rank, in the working dtype."""

    x: Tensor  # (N, D), of unit length with normalize
    x_norms: Tensor | None
    norms: Tensor | None  # (C_part,) of the class weights
    inverse: Tensor | None
    tables: dict[str, Tensor | None]  # shift, scale and weight of the part


def sharded_linear_adjusted_cross_entropy(
    features: Tensor,
    weight_shard: Tensor,
    target: Target,
    *,
    class_start: int,
    num_classes: int,
    group: Any = None,
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
) -> Tensor:
    """`ltkernels.functional.linear_adjusted_cross_entropy` with the classifier's rows split over the ranks.

    Args:
        features: (N, D), the same on every rank; float32, float64, bfloat16 or float16.
        weight_shard: (C_part, D), the classes [class_start, class_start + C_part), in the features' dtype. The shards may have different
            sizes; together they must be [0, num_classes).
        target: (N,) class indices over all classes, or ``(y_a, y_b, lam)``; the same on every rank.
        class_start, num_classes: where this rank's classes begin, and C.
        group: process group; None is the default group.
        bias: (C_part,) of this rank's classes.
        normalize: cosine classifier, as in the unsharded function.
        shift, scale, margin, row_scale, class_weight: (C,), whole on every rank.
        focal_gamma, label_smoothing, ignore_index, reduction: as in the unsharded function.

    Returns:
        The loss, the same on every rank; float64 for float64 features, else float32. The gradient of `features` is that of all classes,
        on every rank; those of `weight_shard` and `bias` are this rank's.

    Beyond 2^26 local logits they are computed in chunks of rows, a second time in backward.

    Raises:
        ValueError: shards that do not make up [0, num_classes); shapes, devices, labels or tables that do not fit.
        TypeError: a dtype that does not fit, or class probabilities as target.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "no process group: call torch.distributed.init_process_group first (one process is a group too)"
        )
    num_classes = _checks.num_classes(num_classes)
    _check_inputs(features, weight_shard, bias, class_start, num_classes)
    code = _checks.reduction(reduction)
    focal_gamma = _checks.number("focal_gamma", focal_gamma, low=0.0)
    label_smoothing = _checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    real = _checks.real_dtype(features.dtype)
    given = {"shift": shift, "scale": scale, "margin": margin, "row_scale": row_scale, "class_weight": class_weight}
    tables = tuple(_checks.table(name, table, num_classes, features.device, real) for name, table in given.items())
    for name, table in zip(given, tables):
        if table is not None and table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient; the sharded loss has none with respect to tables")
    check_class_weight(tables[-1])
    first, second, lam = _core._split_target(target, features.new_empty(()).expand(len(features), num_classes))
    if first.is_floating_point():
        raise TypeError(f"target has dtype {first.dtype}; the sharded loss takes class indices")
    _core._check_labels(first, second, num_classes, ignore_index)
    rows, part = len(features), len(weight_shard)
    step = max(1, rows) if rows * part <= _HELD else max(1, _HELD // max(1, part))
    options = _Options(
        class_start, num_classes, group, bool(normalize), focal_gamma, label_smoothing, ignore_index, code, step
    )
    return _Sharded.apply(features, weight_shard, bias, (first, second, lam), tables, options)


def _check_inputs(features: Tensor, weight: Tensor, bias: Tensor | None, start: int, classes: int) -> None:
    for name, value, dims in (("features", features, 2), ("weight_shard", weight, 2), ("bias", bias, 1)):
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; it must be a tensor")
        if value.dtype not in _checks.FLOATING or value.dtype != features.dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype}, features {features.dtype}; all must have one floating dtype"
            )
        if value.dim() != dims:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have {dims} dimensions")
        if value.device != features.device:
            raise ValueError(f"{name} is on {value.device}, features on {features.device}; both must be on one device")
    if weight.shape[1] != features.shape[1]:
        raise ValueError(f"weight_shard has shape {tuple(weight.shape)}; features have {features.shape[1]} columns")
    if bias is not None and len(bias) != len(weight):
        raise ValueError(f"bias has {len(bias)} entries; the shard has {len(weight)} classes")
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= classes - len(weight):
        raise ValueError(
            f"class_start is {start!r}; with {len(weight)} classes here and num_classes {classes} it must lie in "
            f"[0, {classes - len(weight)}]"
        )


class _Sharded(torch.autograd.Function):
    """Forward makes the losses and what the gradient needs of a row; backward the gradients. The logits wait for backward where they are
    few, and are computed again where they are many or a first backward has used them up."""

    @staticmethod
    def forward(ctx, features, weight, bias, labels, tables, options):
        shard = _shard(features, weight, bias, tables, options)
        pairs = _pairs(labels, options.ignore_index)
        local = [_two_phase.local_labels(y, _IGNORED, options.start, len(weight)) for y, _ in pairs]
        sigmas = [_row_scale(y, tables[3]) for y, _ in pairs]
        smooth = options.label_smoothing != 0.0
        logits, statistics = None, [features.new_empty((len(pairs), 0, 4), dtype=torch.float64)]
        for at, z in _chunks(shard, weight, options):
            each = [
                _two_phase.statistics(z, y[at], s[at], smooth=smooth, **shard.tables) for y, s in zip(local, sigmas)
            ]
            statistics.append(torch.stack(each))
            logits = z if len(z) == len(features) else None
        parts = _gathered(torch.cat(statistics, dim=1), options, len(weight))
        loss, terms = 0.0, []
        whole = {"margin": tables[2], "row_scale": tables[3], "weight": tables[4]}
        settings = {"classes": options.classes, "focal_gamma": options.focal_gamma}
        settings |= {"label_smoothing": options.label_smoothing, "ignore_index": _IGNORED}
        for k, (y, share) in enumerate(pairs):
            finished = _two_phase.finish(_two_phase.merge(parts[:, k]), y, **whole, **settings)
            loss = loss + finished.loss * share
            own = finished.terms
            own[:, 1:] *= share[:, None]
            if shard.tables["scale"] is not None:  # known where the label is, and written there alone
                own[:, 3] *= shard.tables["scale"].double()[local[k].clamp_min(0)]
            terms.append(own)
        first, second, lam = labels
        denominator = denominator_of(first, second, lam, tables[4], options.ignore_index, options.reduction)
        ctx.save_for_backward(features, weight, bias, *local, *sigmas, *terms)
        ctx.tables, ctx.options, ctx.denominator, ctx.logits = tables, options, denominator, logits
        real = _checks.real_dtype(features.dtype)
        if _checks.REDUCTIONS[options.reduction] == "none":
            return loss.to(real)
        return (loss.sum() / denominator).to(real)

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # a gradient without a graph would be detached silently
            raise RuntimeError("the sharded loss has no second derivatives: call backward without create_graph")
        features, weight, bias, *rest = ctx.saved_tensors
        labels = len(rest) // 3
        local, sigmas, terms = rest[:labels], rest[labels : 2 * labels], rest[2 * labels :]
        options = ctx.options
        shard = _shard(features, weight, bias, ctx.tables, options)
        factor = (upstream.double() / ctx.denominator).expand(len(features))
        terms = [torch.cat([own[:, :1], own[:, 1:] * factor[:, None]], dim=1) for own in terms]
        need_features, need_weight, need_bias = ctx.needs_input_grad[:3]
        real = shard.x.dtype
        w = weight.to(real)
        grad_x = torch.zeros_like(shard.x) if need_features else None
        grad_weight = torch.zeros_like(w) if need_weight else None
        grad_bias = torch.zeros(len(weight), dtype=real, device=weight.device) if need_bias else None
        logits, ctx.logits = ctx.logits, None
        for at, z in _chunks(shard, weight, options) if logits is None else [(slice(None), logits)]:
            # The last label's gradient takes the logits' place.
            grad = None
            for k, (y, s, own) in enumerate(zip(local, sigmas, terms)):
                out = z if k == labels - 1 else None
                new = _two_phase.gradient(z, y[at], s[at], own[at], out=out, **shard.tables)
                grad = new if grad is None else grad.add_(new)
            if need_features:
                grad_x[at] = grad @ w
            if need_weight:
                grad_weight.addmm_(grad.t(), shard.x[at])
            if need_bias:
                grad_bias += grad.sum(dim=0)
        if need_features:
            dist.all_reduce(grad_x, group=options.group)
            if options.normalize:
                before_unit_length(grad_x, shard.x, shard.x_norms)
        if options.normalize:
            if need_weight:
                off_the_ray(grad_weight, w, shard.norms, shard.inverse)
            if need_bias:
                grad_bias /= shard.inverse  # the gradient is that of x . w = |w| (cos + ...)
        grads = (grad_x, grad_weight, grad_bias)
        return *(None if grad is None else grad.to(features.dtype) for grad in grads), None, None, None


def _pairs(labels: tuple[Tensor, Tensor | None, Tensor | None], ignore_index: int) -> list[tuple[Tensor, Tensor]]:
    """(labels, share) of each; a row whose first label is `ignore_index` has the label `_IGNORED` in both."""
    first, second, lam = labels
    valid = first != ignore_index
    if second is None:
        ones = torch.ones(len(first), dtype=torch.float64, device=first.device)
        return [(torch.where(valid, first, _IGNORED), ones)]
    return [(torch.where(valid, y, _IGNORED), s) for y, s in ((first, lam.double()), (second, 1 - lam.double()))]


def _row_scale(target: Tensor, row_scale: Tensor | None) -> Tensor:
    if row_scale is None:
        return torch.ones(len(target), dtype=torch.float64, device=target.device)
    return row_scale.double()[target.clamp_min(0)]


def _shard(
    features: Tensor, weight: Tensor, bias: Tensor | None, tables: tuple[Tensor | None, ...], options: _Options
) -> _Shard:
    real = _checks.real_dtype(features.dtype)
    at = slice(options.start, options.start + len(weight))
    shift, scale, _, _, class_weight = (None if table is None else table[at].contiguous() for table in tables)
    x, x_norms, norms, inverse = features.to(real), None, None, None
    if bias is not None:
        folded = bias.to(real).contiguous()  # the kernels read consecutive entries
        folded = folded if scale is None else folded * scale
        shift = folded if shift is None else shift + folded
    if options.normalize:
        x_norms = torch.linalg.vector_norm(x, dim=1)
        x = x * inverse_norms(x_norms)[:, None]
        norms = torch.linalg.vector_norm(weight.to(real), dim=1)
        inverse = inverse_norms(norms)
        scale = inverse if scale is None else scale * inverse
    return _Shard(x, x_norms, norms, inverse, {"shift": shift, "scale": scale, "weight": class_weight})


def _chunks(shard: _Shard, weight: Tensor, options: _Options):
    """(rows, their logits on this rank's classes)."""
    w = weight.to(shard.x.dtype).t()
    for begin in range(0, len(shard.x), options.step):
        at = slice(begin, min(begin + options.step, len(shard.x)))
        yield at, shard.x[at] @ w


def _gathered(statistics: Tensor, options: _Options, part: int) -> Tensor:
    """(P, labels, N, 4) of all ranks. Each rank says its range of classes in a row of its own: one collective for both."""
    own = statistics.new_tensor([options.start, part, options.classes, 0.0]).expand(len(statistics), 1, 4)
    mine = torch.cat([own, statistics], dim=1).contiguous()
    world = dist.get_world_size(options.group)
    parts = mine.new_empty((world, *mine.shape))
    dist.all_gather(list(parts.unbind(0)), mine, group=options.group)
    if parts.device.type == "cpu":  # elsewhere it would make every call wait for the device
        expected = 0
        for start, size, classes, _ in sorted(parts[:, 0, 0].tolist()):
            if start != expected or classes != options.classes:
                ranges = [(int(start), int(start + size)) for start, size, *_ in parts[:, 0, 0].tolist()]
                raise ValueError(f"the ranks hold the classes {ranges}; they must make up [0, {options.classes})")
            expected = start + size
        if expected != options.classes:
            raise ValueError(f"the ranks hold {int(expected)} classes; num_classes is {options.classes}")
    return parts[:, :, 1:]


__all__ = ["sharded_linear_adjusted_cross_entropy"]
