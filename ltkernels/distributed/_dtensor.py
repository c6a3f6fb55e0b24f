"""The loss of DTensor logits: replicated, sharded by rows, or sharded by classes, as tensor parallelism leaves them (inside
``loss_parallel`` or not). Every rank computes on its own part; no logits cross."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._call import NONE, SUM, TABLES, Call, denominator_of
from .._errors import ArgumentError, DTypeError
from .._watch import is_dtensor, wants_gradient
from ..losses import _core, _two_phase
from ..losses._door import Options, Target, checked
from . import _autograd, _exchange

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PLACEMENTS = "they must be Replicate, Shard(0) (rows) or Shard(1) (classes) on one dimension of the mesh, Replicate on all others"


class _ShardedLogits(torch.autograd.Function):
    """``(local logits (N, C_part), call, start, classes, group, world) -> loss``, the same on every rank; backward gives this rank's
    part."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, call: Call, start: int, classes: int, group: Any, world: int) -> Tensor:
        at = slice(start, start + z.shape[1])
        shift, scale, weight = (
            None if t is None else t[at].contiguous() for t in (call.shift, call.scale, call.weight)
        )
        tables = {"shift": shift, "scale": scale, "weight": weight}
        pairs = _autograd.label_pairs(call)
        local = [_two_phase.local_labels(y, _autograd.IGNORED, start, z.shape[1]) for y, _ in pairs]
        sigmas = [_autograd.row_scales(y, call.row_scale) for y, _ in pairs]
        z = z.contiguous()
        smooth = call.smooth()
        rows = torch.stack([_two_phase.statistics(z, y, s, smooth=smooth, **tables) for y, s in zip(local, sigmas)])
        merged = _exchange.merged(rows.flatten(0, 1), group, world).view_as(rows)
        loss, terms = _autograd.finish(merged, pairs, local, call, classes, scale)
        denominator = denominator_of(call)
        ctx.save_for_backward(z, denominator, *local, *sigmas, *terms)
        ctx.tables = tables
        real = torch.float64 if z.dtype == torch.float64 else torch.float32
        return (loss if call.reduction == NONE else loss.sum() / denominator).to(real)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():  # a gradient without a graph would be detached silently
            raise RuntimeError("the sharded loss has no second derivatives: call backward without create_graph")
        z, denominator, *rest = ctx.saved_tensors
        labels = len(rest) // 3
        factor = (upstream.double() / denominator).expand(len(z))
        grad = None
        for y, s, terms in zip(rest[:labels], rest[labels : 2 * labels], rest[2 * labels :]):
            scaled = torch.cat([terms[:, :1], terms[:, 1:] * factor[:, None]], dim=1)
            new = _two_phase.gradient(z, y, s, scaled, **ctx.tables)
            grad = new if grad is None else grad + new
        return grad, None, None, None, None, None


def adjusted_cross_entropy(logits: Any, target: Target, **options: Unpack[Options]) -> Tensor:
    """`ltkernels.functional.adjusted_cross_entropy` of DTensor logits.

    Labels are DTensors of the logits' mesh, or plain tensors that every rank holds whole (not with rows sharded: whose would they be?);
    tables are plain, (C,) and whole, or replicated DTensors. Returns a replicated DTensor; with ``reduction="none"`` and sharded rows, one
    that is sharded as they are.

    Raises:
        ValueError: placements that are none of the three, ``inplace=True``, tables that require a gradient where classes are sharded.
        TypeError: a DTensor where a plain tensor must be.
    """
    from torch.distributed.tensor import Replicate

    mesh, placements = logits.device_mesh, logits.placements
    sharded = [k for k, placement in enumerate(placements) if not placement.is_replicate()]
    kind = None
    if not sharded:
        kind = "whole"
    elif len(sharded) == 1 and type(placements[sharded[0]]).__name__ == "Shard" and logits.dim() > 1:
        kind = {0: "rows", 1: "classes"}.get(placements[sharded[0]].dim % logits.dim())
    if kind is None:
        raise ArgumentError(f"logits are a DTensor with placements {tuple(placements)}; {_PLACEMENTS}")
    if options.get("inplace"):
        raise ArgumentError("inplace=True is not possible: the logits are a DTensor")
    plain: Options = {**options}
    for name in (*TABLES, "label_scale", "label_smoothing", "grad_scale"):
        if is_dtensor(options.get(name)):
            plain[name] = _whole(name, options[name])  # type: ignore[literal-required]
    replicated = [Replicate()] * mesh.ndim
    of_rows = placements if kind == "rows" else replicated
    labels = _local_target(target, "target", mesh, of_rows)
    if options.get("sample_weight") is not None:
        plain["sample_weight"] = _local_target(options["sample_weight"], "sample_weight", mesh, of_rows)
    local = logits.to_local()
    if kind == "whole":
        loss = _core.adjusted_cross_entropy(local, labels, **plain)
        return _wrapped(loss, mesh, replicated)
    dim = sharded[0]
    if kind == "rows":
        return _of_rows(local, labels, plain, mesh, placements, dim, logits.shape)
    return _wrapped(_of_classes(local, labels, plain, mesh, dim, logits.shape), mesh, replicated)


def _wrapped(local: Tensor, mesh: Any, placements: Any, size: Any = None) -> Tensor:
    """`size`: of the whole, where the parts may differ."""
    from torch.distributed.tensor import DTensor

    whole = {} if size is None else {"shape": size, "stride": torch.empty(size, device="meta").stride()}
    made: Tensor = DTensor.from_local(local, mesh, placements, run_check=False, **whole)
    return made


def _whole(name: str, table: Any) -> Tensor:
    if not all(placement.is_replicate() for placement in table.placements):
        raise ArgumentError(f"{name} is a DTensor with placements {tuple(table.placements)}; it must be replicated")
    local: Tensor = table.to_local()
    return local


def _local_target(target: Any, name: str, mesh: Any, placements: Any) -> Any:
    """This rank's labels, whatever they are."""
    if isinstance(target, tuple):
        return tuple(
            _local_target(each, f"{name}[{k}]", mesh, placements) if isinstance(each, Tensor) and each.dim() else each
            for k, each in enumerate(target)
        )
    if is_dtensor(target):
        if target.device_mesh != mesh:
            raise ArgumentError(f"{name} is a DTensor on another mesh than the logits")
        return target.redistribute(mesh, placements).to_local()
    if not all(placement.is_replicate() for placement in placements):
        raise DTypeError(
            f"{name} is a plain tensor and the logits' rows are sharded over the ranks; give a DTensor, such as "
            "DTensor.from_local(labels, mesh, logits.placements)"
        )
    return target


def _of_rows(local: Tensor, labels: Any, plain: Options, mesh: Any, placements: Any, dim: int, size: Any) -> Tensor:
    """Each rank's rows are its own; the denominator is that of all of them."""
    import torch.distributed as dist
    from torch.distributed.tensor import Partial, Replicate

    wanted = plain.get("reduction", "mean")
    if wanted == "none":
        loss = _core.adjusted_cross_entropy(local, labels, **plain)
        return _wrapped(loss, mesh, placements, size[:1] + size[2:])
    for name in ("weight", "sample_weight"):
        if wanted == "mean" and wants_gradient((plain.get(name),)):  # type: ignore[arg-type]
            raise ArgumentError(f"{name} requires a gradient; of a mean over sharded rows it has none")
    summed: Options = {**plain, "reduction": "sum"}
    loss = _core.adjusted_cross_entropy(local, labels, **summed)
    stand_in = local.detach()
    call = checked(stand_in, labels, **{**plain, "grad_scale": None}).call
    denominator = denominator_of(call)
    if call.reduction != SUM:
        denominator = denominator.clone()
        dist.all_reduce(denominator, group=mesh.get_group(dim))
    else:
        denominator = torch.ones_like(denominator)
    parts = list(placements)
    parts[dim] = Partial()
    part = _wrapped((loss.double() / denominator).to(loss.dtype), mesh, parts)
    whole: Tensor = part.redistribute(mesh, [Replicate()] * mesh.ndim)  # type: ignore[attr-defined]
    return whole


def _of_classes(local: Tensor, labels: Any, plain: Options, mesh: Any, dim: int, size: Any) -> Tensor:
    """Each rank's classes are its own; four numbers a row cross."""
    _autograd.refuse_unsharded(plain)
    first = labels[0] if isinstance(labels, tuple) else labels
    if first.is_floating_point():
        raise DTypeError(f"target has dtype {first.dtype}; the sharded loss takes class indices")
    if local.dim() > 2:
        local = local.movedim(1, -1).reshape(-1, local.shape[1])
        flat = [each.reshape(-1) if isinstance(each, Tensor) and each.dim() else each for each in labels]
        labels = tuple(flat) if isinstance(labels, tuple) else first.reshape(-1)
        if plain.get("sample_weight") is not None:
            plain["sample_weight"] = plain["sample_weight"].reshape(-1)  # type: ignore[union-attr]
    classes = size[1]
    # The logits' shape, dtype and device without their memory, for the checks that ask for logits.
    call = checked(local.new_empty(()).expand(local.shape[0], classes), labels, **plain).call
    step = -(-classes // mesh.size(dim))  # as torch shards
    start = min(classes, mesh.get_local_rank(dim) * step)
    if local.shape[1] != min(classes - start, step):
        raise ArgumentError(
            f"logits are a DTensor with {local.shape[1]} of {classes} classes here, which is not how torch shards them "
            f"({min(classes - start, step)})"
        )
    loss: Tensor = _ShardedLogits.apply(local, call, start, classes, mesh.get_group(dim), mesh.size(dim))
    return loss.reshape(first.shape) if call.reduction == NONE else loss
