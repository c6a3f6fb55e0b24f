"""The public call: arguments, their checks on this rank and over the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _backends, _checks
from .._call import Call, denominator_of
from .._errors import ArgumentError, DTypeError
from .._head import check_tables
from .._watch import is_dtensor, transforms, wants_gradient
from ..losses._door import Shared, Target, check_labels, check_options, checked, takes_options
from . import _autograd, _exchange, _placement, _sampling

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BATCHES = ("replicated", "sharded")


@takes_options
def sharded_linear_adjusted_cross_entropy(
    features: Tensor,
    weight_shard: Tensor,
    target: Target,
    *,
    class_start: int | None = None,
    num_classes: int | None = None,
    group: Any = None,
    mesh_dim: str | int | None = None,
    batch: str = "replicated",
    sampling: _sampling.NegativeSampling | None = None,
    bias: Tensor | None = None,
    normalize: bool = False,
    class_weight: Tensor | None = None,
    **options: Unpack[Shared],
) -> Tensor:
    """`ltkernels.functional.linear_adjusted_cross_entropy` with the classifier's rows split over the ranks.

    Args:
        features: (N, D); float32, float64, bfloat16 or float16.
        weight_shard: (C_part, D), the classes [class_start, class_start + C_part), in the features' dtype. The shards may have different
            sizes, 0 too; together they must be [0, num_classes). Or a DTensor (C, D) on a mesh of one dimension with placement
            ``Shard(0)``: its local shard is used, and its gradient is a DTensor of the same placement.
        target: (N,) class indices over all classes, or ``(y_a, y_b, lam)``.
        class_start, num_classes: where this rank's classes begin, and C. A DTensor knows both.
        group: process group or `DeviceMesh`; None is the mesh of a DTensor weight, else the default group.
        mesh_dim: the dimension of the mesh, by name or number, over which the classes are sharded; of a mesh with several.
        batch: ``"replicated"``: every rank gives the same rows. ``"sharded"``: every rank gives rows of its own, any number of them;
            features and labels are gathered, and the loss is over the rows of all ranks.
        sampling: computes a random part of the negative classes: an estimate, see `NegativeSampling`.
        bias: (C_part,) of this rank's classes; a DTensor like `weight_shard` where that is one.
        normalize: cosine classifier, as in the unsharded function.
        shift, scale, margin, row_scale, label_scale, class_weight: (C,), whole on every rank.
        sample_weight: (N,), of the rows that the rank gives.
        focal_gamma, label_smoothing, ignore_index, reduction: as in the unsharded function. Denominators are those of the whole batch.
        inplace, grad_scale: accepted, without effect: the gradient always replaces the rank's own logits, in backward, where the upstream
            gradient is known.
        backend: None, or the name of the one that would be chosen.
        term: refused; so are tables that require a gradient.

    Returns:
        The loss over all classes and all rows, the same on every rank (``"none"`` with a sharded batch: of the rank's own rows); float64
        for float64 features, else float32. The gradient of `features` is that of all classes, for the rows that the rank gave; those of
        `weight_shard` and `bias` are this rank's and must not be averaged over the group. Every rank must call backward, with the same
        upstream gradient. A wrapper that averages the backbone's gradients over W ranks, as DistributedDataParallel does, turns the sum
        over the rows of a sharded batch into 1 / W of it: ``features.register_hook(lambda grad: grad * W)`` before the call undoes that.

    Beyond 2^26 local logits they are computed in chunks of rows, a second time in backward. One exchange of 32 bytes a row makes the
    statistics those of all classes: an all-gather up to 2 MiB from all ranks, beyond it the two halves of an all-reduce. On the CPU, and
    with a sharded batch, an exchange of six integers before it checks that the ranks agree; on other devices it would make each call
    wait for the device. Under autocast, float32 inputs are cast as `torch.nn.functional.linear` does.

    Raises:
        ValueError: shards that do not make up [0, num_classes); ranks that disagree; shapes, devices, labels, tables, placements or
            meshes that do not fit. What one rank alone can see it alone raises: the others wait for it until their timeout.
        TypeError: a dtype that does not fit, or class probabilities as target.
        RuntimeError: no process group.
    """
    place = _placement.resolve(weight_shard, bias, class_start, num_classes, group, mesh_dim)
    weight, bias, classes = place.weight, place.bias, _checks.num_classes(place.classes)
    features, weight, bias = _checked_inputs(features, weight, bias, place.start, classes)
    if batch not in _BATCHES:
        raise ArgumentError(f"batch is {batch!r}; it must be one of {', '.join(map(repr, _BATCHES))}")
    call = _checked_call(features, target, classes, class_weight, options)
    device = features.device
    sampling = _sampling.checked(sampling, call.eps())

    rows = None
    if device.type == "cpu" or batch == "sharded":
        rows = _agreed_rows(place, features, call, (batch, bool(normalize), sampling), batch == "sharded")
    if rows is not None:
        labels = _exchange.gather_labels(call[:3], rows, place.group, call.ignore_index)
        own = call.sample_weight
        own = own if own is None else _exchange.gather_rows(own, rows, place.group)
        call = call._replace(target=labels[0], target_b=labels[1], lam=labels[2], sample_weight=own)
    denominator = denominator_of(call)
    pairs = _autograd.label_pairs(call)
    drawn_from = [y for y, _ in pairs]
    kept = None if sampling is None else _sampling.draw(sampling, drawn_from, place.start, len(weight))
    part = _autograd.Part(
        place.start,
        len(weight),
        classes,
        place.group,
        place.world,
        rows,
        kept,
        bool(normalize),
        call.smooth(),
    )
    with torch.autocast(device.type, enabled=False):  # it would cast the working dtype down
        loss: Tensor = _autograd.Sharded.apply(features, weight, bias, pairs, denominator, call, part)
    return loss


def _checked_call(features: Tensor, target: Target, classes: int, class_weight: Tensor | None, options: Shared) -> Call:
    """The loss' record; raises where the sharded loss has not what the others have."""
    check_options("sharded_linear_adjusted_cross_entropy", options)
    if transforms():
        raise ArgumentError(
            f"the sharded loss has no derivatives for {transforms()}; its backward is reverse-mode alone"
        )
    _autograd.refuse_unsharded({**options, "class_weight": class_weight})
    lam = target[2] if isinstance(target, tuple) and len(target) == 3 else None
    if isinstance(lam, Tensor) and wants_gradient((lam,)):
        raise ArgumentError("target[2] (lam) requires a gradient; the sharded loss has none with respect to it")
    if isinstance(target, Tensor) and target.is_floating_point():
        raise DTypeError(f"target has dtype {target.dtype}; the sharded loss takes class indices")
    # The logits' shape, dtype and device without their memory; their kernels are others, and nothing of theirs is in place.
    stand_in = features.new_empty(()).expand(len(features), classes)
    rest: Shared = {**options, "inplace": False}
    call = checked(stand_in, target, weight=class_weight, weight_name="class_weight", **rest).call
    served = "torch" if _backends.two_phase_kernels(features.device) is None else features.device.type
    if options.get("backend") not in (None, served):
        raise ArgumentError(
            f"backend={call.backend!r} cannot serve this call: the sharded loss is computed by {served} kernels here"
        )
    check_tables(call)
    check_labels(call, classes)
    return call


def _agreed_rows(
    place: _placement.Placement, features: Tensor, call: Call, more: tuple[object, ...], sharded: bool
) -> _exchange.Rows | None:
    """Who has which rows of a sharded batch; None for a replicated one. Raises ValueError where the ranks do not agree."""
    labels, tables = (*call[:3], call.sample_weight), (*call.tables(), call.smoothing, call.label_scale)
    settings = (
        *more,
        *(call.focal_gamma, call.label_smoothing, call.ignore_index, call.reduction),
        features.dtype,
        features.shape[1],
        features.requires_grad and torch.is_grad_enabled(),
        labels[1] is None,
        labels[3] is None,
    )
    if features.is_cpu:
        order = torch.arange(1, 1 + len(features))
        bits = [
            y
            if y is None or not y.is_floating_point()
            else y.view(torch.int64 if y.dtype == torch.float64 else torch.int32)
            for y in labels
        ]
        label_bits = _exchange.fingerprint(*(y if y is None else y * order for y in bits))
        settings_bits = _exchange.fingerprint(*settings, *tables)
    else:  # their contents would have to be waited for
        label_bits, settings_bits = 0, _exchange.fingerprint(*settings, *(table is None for table in tables))
    claim = _exchange.Claim(place.start, len(place.weight), place.classes, len(features), settings_bits, label_bits)
    claims = _exchange.claims(claim, place.group, features.device)
    _exchange.check(claims, replicated=not sharded)
    if not sharded:
        return None
    return _exchange.Rows(len(features), max(other.rows for other in claims), place.rank, place.world)


def _checked_inputs(
    features: Tensor, weight: Tensor, bias: Tensor | None, start: int, classes: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast for autocast."""
    inputs = {"features": features, "weight_shard": weight, "bias": bias}
    for name, value in inputs.items():
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor):
            raise DTypeError(f"{name} is {type(value).__name__}; it must be a tensor")
        if is_dtensor(value):
            raise DTypeError(f"{name} is a DTensor; give the rank's rows: a plain tensor, such as its to_local()")
        if value.dtype not in _checks.FLOATING:
            raise DTypeError(f"{name} has dtype {value.dtype}; it must be float32, float64, bfloat16 or float16")
        if value.device != features.device:
            raise ArgumentError(
                f"{name} is on {value.device}, features on {features.device}; both must be on one device"
            )
        dims = 1 if name == "bias" else 2
        if value.dim() != dims:
            raise ArgumentError(f"{name} has shape {tuple(value.shape)}; it must have {dims} dimensions")
    if torch.is_autocast_enabled(features.device.type):
        lower = torch.get_autocast_dtype(features.device.type)
        for name, value in inputs.items():
            inputs[name] = value if value is None or value.dtype == torch.float64 else value.to(lower)
    features, weight, bias = inputs.values()
    for name in ("weight_shard", "bias"):
        if inputs[name] is not None and inputs[name].dtype != features.dtype:
            raise DTypeError(
                f"{name} has dtype {inputs[name].dtype}, features {features.dtype}; all must have one floating dtype"
            )
    if weight.shape[1] != features.shape[1]:
        raise ArgumentError(f"weight_shard has shape {tuple(weight.shape)}; features have {features.shape[1]} columns")
    if bias is not None and len(bias) != len(weight):
        raise ArgumentError(f"bias has {len(bias)} entries; the shard has {len(weight)} classes")
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= classes - len(weight):
        raise ArgumentError(
            f"class_start is {start!r}; with {len(weight)} classes here and num_classes {classes} it must lie in "
            f"[0, {classes - len(weight)}]"
        )
    return features, weight, bias


__all__ = ["sharded_linear_adjusted_cross_entropy"]
