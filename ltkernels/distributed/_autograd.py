"""Forward and backward of one rank: its shard's logits, in chunks of rows where they are many, and the two phases over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._call import BESIDE, NONE, TABLES, Call
from .._errors import ArgumentError
from .._head import before_unit_length, inverse_norms, off_the_ray
from .._watch import hooks_active, wants_gradient
from ..losses import _two_phase
from . import _exchange
from ._exchange import Rows
from ._sampling import Kept

# Local logits (256 MiB of float32) that are kept from forward to backward. More are computed in chunks of rows, twice.
_HELD = 1 << 26
# What `ignore_index` becomes inside: a number that no class has.
IGNORED = -100


class Part(NamedTuple):
    """The classes of this rank, and who holds the others."""

    start: int
    part: int
    classes: int
    group: Any
    world: int
    rows: Rows | None  # of a batch that is sharded too
    kept: Kept | None  # where negatives are sampled
    normalize: bool
    smooth: bool  # whether the labels are smoothed


class _Shard(NamedTuple):
    """What both phases need of this rank, in the working dtype. K: the classes of the part that are computed."""

    x: Tensor  # (N, D), of unit length with normalize
    x_norms: Tensor | None
    weight: Tensor  # (K, D)
    norms: Tensor | None  # (K,) of the class weights
    inverse: Tensor | None
    tables: dict[str, Tensor | None]  # shift, scale and weight (K,)


class Sharded(torch.autograd.Function):
    """Forward makes the losses and what the gradient needs of a row; backward the gradients. The logits wait for backward where they are
    few, and are computed again where they are many or a first backward has used them up."""

    @staticmethod
    def forward(ctx, features, weight, bias, pairs, denominator, call, options):
        tables = call.tables()
        real = _checks.real_dtype(features.dtype)
        if options.rows is not None:
            features = _exchange.gather_rows(features, options.rows, options.group)
        shard = _shard(features, weight, bias, tables, options)
        local = [_local_labels(y, options) for y, _ in pairs]
        sigmas = [row_scales(y, tables[3]) for y, _ in pairs]
        logits, statistics = None, [features.new_empty((len(pairs), 0, 4), dtype=torch.float64)]
        for at, z in _chunks(shard):
            statistics.append(
                torch.stack([_statistics(z, y[at], s[at], shard, options) for y, s in zip(local, sigmas)])
            )
            logits = z if len(z) == len(features) else None
            del z  # or the next chunk is computed while this one is still held
        local_rows = torch.cat(statistics, dim=1)
        merged = _exchange.merged(local_rows.flatten(0, 1), options.group, options.world).view_as(local_rows)
        loss, terms = finish(merged, pairs, local, call, options.classes, shard.tables["scale"])
        ctx.save_for_backward(features, weight, bias, *local, *sigmas, *terms)
        ctx.tables, ctx.options, ctx.denominator = tables, options, denominator
        ctx.logits = None if hooks_active() else logits  # who packs what is saved expects nothing beside it
        if call.reduction == NONE:
            return (loss if options.rows is None else loss[options.rows.slice_own()]).to(real)
        return (loss.sum() / denominator).to(real)

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # a gradient without a graph would be detached silently
            raise RuntimeError("the sharded loss has no second derivatives: call backward without create_graph")
        with torch.autocast(upstream.device.type, enabled=False):
            return *_gradients(ctx, upstream), None, None, None, None


def _gradients(ctx, upstream: Tensor) -> list[Tensor | None]:
    features, weight, bias, *rest = ctx.saved_tensors
    labels = len(rest) // 3
    local, sigmas, terms = rest[:labels], rest[labels : 2 * labels], rest[2 * labels :]
    options = ctx.options
    shard = _shard(features, weight, bias, ctx.tables, options)
    upstream = upstream.double()
    if options.rows is not None and upstream.dim() == 1:
        upstream = _exchange.gather_rows(upstream, options.rows, options.group)
    factor = (upstream / ctx.denominator).expand(len(features))
    terms = [torch.cat([own[:, :1], own[:, 1:] * factor[:, None]], dim=1) for own in terms]
    need_features, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_x = torch.zeros_like(shard.x) if need_features else None
    grad_weight = torch.zeros_like(shard.weight) if need_weight else None
    grad_bias = shard.x.new_zeros(len(shard.weight)) if need_bias else None
    logits, ctx.logits = ctx.logits, None
    for at, z in _chunks(shard) if logits is None else [(slice(None), logits)]:
        # The last label's gradient takes the logits' place.
        grad = None
        for k, (y, s, own) in enumerate(zip(local, sigmas, terms)):
            out = z if k == labels - 1 else None
            new = _gradient(z, y[at], s[at], own[at], out, shard, options.kept)
            grad = new if grad is None else grad.add_(new)
        if need_features:
            torch.mm(grad, shard.weight, out=grad_x[at])
        if need_weight:
            grad_weight.addmm_(grad.t(), shard.x[at])
        if need_bias:
            grad_bias += grad.sum(dim=0)
        del z, out, new, grad
    del logits
    if need_features:
        grad_x = _exchange.reduce_rows(grad_x, options.rows, options.group)
        if options.normalize:
            own = slice(None) if options.rows is None else options.rows.slice_own()
            before_unit_length(grad_x, shard.x[own], shard.x_norms[own])
    if options.normalize:
        if need_weight:
            off_the_ray(grad_weight, shard.weight, shard.norms, shard.inverse)
        if need_bias:
            grad_bias /= shard.inverse  # the gradient is that of x . w = |w| (cos + ...)
    if options.kept is not None:
        grad_weight, grad_bias = (_all_classes(grad, options) for grad in (grad_weight, grad_bias))
    grads = (grad_x, grad_weight, grad_bias)
    return [None if grad is None else grad.to(features.dtype) for grad in grads]


def finish(
    merged: Tensor,
    pairs: list[tuple[Tensor, Tensor]],
    local: list[Tensor],
    call: Call,
    classes: int,
    scale: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Losses (N,) and, for each label of a row, the terms of its gradient, from the statistics of all classes. `scale` is this rank's: it
    is known where the label is, and written there alone."""
    loss, terms = merged.new_zeros(merged.shape[1]), []
    for k, (y, share) in enumerate(pairs):
        finished = _two_phase.finish(
            merged[k],
            y,
            classes=classes,
            shift=call.shift,
            margin=call.margin,
            row_scale=call.row_scale,
            weight=call.weight,
            label_scale=call.label_scale,
            focal_gamma=call.focal_gamma,
            label_smoothing=call.eps(),
            ignore_index=IGNORED,
        )
        loss = loss + finished.loss * share
        own = finished.terms
        own[:, 1:] *= share[:, None]
        if scale is not None and len(scale):
            own[:, 3] *= scale.double()[local[k].clamp_min(0)]
        terms.append(own)
    return loss, terms


def refuse_unsharded(options: Mapping[str, Any]) -> None:
    """Raises where a caller's options hold what the loss on parts of the classes has not."""
    term = options.get("term")
    if term is not None:
        raise ArgumentError(
            f"term is the closed form {term.form!r}; the sharded loss has none: it exchanges the statistics of a softmax"
        )
    for name in (*TABLES, "class_weight", *BESIDE):
        value = options.get(name)
        if isinstance(value, Tensor) and wants_gradient((value,)):
            raise ArgumentError(
                f"{name} requires a gradient; the sharded loss has none with respect to tables and rows"
            )


def label_pairs(call: Call) -> list[tuple[Tensor, Tensor]]:
    """(labels, share of the loss) of each; a row whose first label is `ignore_index` has the label `IGNORED` in both."""
    first, second, lam = call[:3]
    valid = first != call.ignore_index
    own = torch.ones(len(first), dtype=torch.float64, device=first.device)
    if call.sample_weight is not None:
        own = torch.where(valid, call.sample_weight.double(), 0.0)
    if second is None:
        return [(torch.where(valid, first, IGNORED), own)]
    shares = ((first, own * lam.double()), (second, own * (1 - lam.double())))
    return [(torch.where(valid, y, IGNORED), s) for y, s in shares]


def _local_labels(target: Tensor, options: Part) -> Tensor:
    local = _two_phase.local_labels(target, IGNORED, options.start, options.part)
    if options.kept is None:
        return local
    return torch.where(local >= 0, options.kept.place[local.clamp_min(0)], local)


def row_scales(target: Tensor, row_scale: Tensor | None) -> Tensor:
    if row_scale is None:
        return torch.ones(len(target), dtype=torch.float64, device=target.device)
    return row_scale.double()[target.clamp_min(0)]


def _shard(
    features: Tensor, weight: Tensor, bias: Tensor | None, tables: tuple[Tensor | None, ...], options: Part
) -> _Shard:
    real = _checks.real_dtype(features.dtype)
    at = slice(options.start, options.start + options.part)
    if options.kept is not None:
        weight = weight[options.kept.classes]
        bias = None if bias is None else bias[options.kept.classes]
        at = options.start + options.kept.classes
    shift, scale, _, _, class_weight = (None if table is None else table[at].contiguous() for table in tables)
    x, weight, x_norms, norms, inverse = features.to(real), weight.to(real), None, None, None
    if bias is not None:
        folded = bias.to(real).contiguous()  # the kernels read consecutive entries
        folded = folded if scale is None else folded * scale
        shift = folded if shift is None else shift + folded
    if options.normalize:
        x_norms = torch.linalg.vector_norm(x, dim=1)
        x = x * inverse_norms(x_norms)[:, None]
        norms = torch.linalg.vector_norm(weight, dim=1)
        inverse = inverse_norms(norms)
        scale = inverse if scale is None else scale * inverse
    return _Shard(x, x_norms, weight, norms, inverse, {"shift": shift, "scale": scale, "weight": class_weight})


def _chunks(shard: _Shard):
    """(rows, their logits on this rank's classes)."""
    rows, classes = len(shard.x), len(shard.weight)
    step = max(1, rows if rows * classes <= _HELD else _HELD // max(1, classes))
    for begin in range(0, rows, step):
        at = slice(begin, min(begin + step, rows))
        yield at, shard.x[at] @ shard.weight.t()


def _statistics(z: Tensor, labels: Tensor, row_scale: Tensor, shard: _Shard, options: Part) -> Tensor:
    """(rows, 4) of this rank's classes; a drawn class counts as many times as the classes it stands for."""
    parts = []
    for at, y, factor, tables in _runs(labels, shard, options.kept):
        if at.stop == at.start:
            part = z.new_tensor([-torch.inf, 0.0, -torch.inf, 0.0], dtype=torch.float64).expand(len(z), 4)
        else:
            part = _two_phase.statistics(z[:, at], y, row_scale, smooth=options.smooth, **tables)
        if factor != 1.0:
            part = part * part.new_tensor([1.0, factor, 1.0, factor])
        parts.append(part)
    return parts[0] if len(parts) == 1 else _two_phase.merge(torch.stack(parts))


def _gradient(
    z: Tensor, labels: Tensor, row_scale: Tensor, terms: Tensor, out: Tensor | None, shard: _Shard, kept: Kept | None
) -> Tensor:
    """With respect to `z`; into `out`, which may be `z`, where the device's kernel does that."""
    runs = _runs(labels, shard, kept)
    if len(runs) > 1 and out is None:
        out = torch.empty_like(z)
    for at, y, factor, tables in runs:
        if at.stop == at.start:
            continue
        there = None if out is None else out[:, at]
        scaled = terms if factor == 1.0 else terms * terms.new_tensor([1.0, factor, factor, 1.0])
        new = _two_phase.gradient(z[:, at], y, row_scale, scaled, out=there, **tables)
        if len(runs) == 1:
            return new
        if new is not there:
            there.copy_(new)
    return z if out is None else out


def _runs(
    labels: Tensor, shard: _Shard, kept: Kept | None
) -> list[tuple[slice, Tensor, float, dict[str, Tensor | None]]]:
    """(classes, labels, how many classes one stands for, tables) of the runs of classes that count alike."""
    count = len(shard.weight)
    if kept is None or kept.factor == 1.0:
        return [(slice(0, count), labels, 1.0, shard.tables)]
    elsewhere = labels.clamp_max(-1)  # ignored rows stay ignored
    runs = []
    for at, y, factor in ((slice(0, kept.labels), labels, 1.0), (slice(kept.labels, count), elsewhere, kept.factor)):
        runs.append((at, y, factor, {k: None if table is None else table[at] for k, table in shard.tables.items()}))
    return runs


def _all_classes(grad: Tensor | None, options: Part) -> Tensor | None:
    """The gradient of all classes of the part from that of the kept ones."""
    if grad is None:
        return None
    return grad.new_zeros((options.part, *grad.shape[1:])).index_copy_(0, options.kept.classes, grad)
