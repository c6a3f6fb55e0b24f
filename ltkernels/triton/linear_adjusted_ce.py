"""Classifier and loss without the B x C logits, through Triton: the twin of ``linear_adjusted_ce`` in `ltkernels.heads`.

Beside the gradients it holds some numbers a row, and where rows or classes alone would not fill the GPU up to eight
partial copies of a gradient, added in their order. Backward forms every tile of logits a second time for each input that
wants a gradient: 10 B C D floating-point operations against the 6 of held logits, 5 multiply-adds against 3; and the gradient
of a tile's owner goes through the second-level cache once a tile. So it is what saves memory, not time, and is served on request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._call import Call
from .._checks import real_dtype
from . import _configs, _row
from ._kernels import VECTOR
from ._linear_kernels import PARTS, STATISTICS
from .adjusted_ce import _aligned, _denominator, _launch, _or, _present, _reduce

_NONE = 0
# Programs that fill a GPU of 132 multiprocessors about twice; what a split beyond that would gain it loses in adding up.
_PROGRAMS = 256
_MOST_PARTS = 8


def _split(owners: int, tiles: int) -> tuple[int, int]:
    """(parts, tiles a part): how many programs share one owner's tiles. By the shape alone, so that results repeat."""
    parts = max(1, min(tiles, _MOST_PARTS, _PROGRAMS // max(owners, 1)))
    steps = -(-tiles // parts)
    return -(-tiles // steps), steps


def _vectors(vectors: Tensor) -> Tensor:
    """With rows that 16-byte accesses can read, filled up with zeros where they must be."""
    width = vectors.shape[1]
    if width % VECTOR.value != 0:
        return torch.nn.functional.pad(vectors, (0, -width % VECTOR.value))
    if vectors.stride(1) == 1 and _aligned(width, vectors):
        return vectors
    return vectors.clone(memory_format=torch.contiguous_format)


def _norms(vectors: Tensor, real: torch.dtype) -> Tensor:
    out = torch.empty(len(vectors), dtype=real, device=vectors.device)
    if len(vectors):
        _launch(_configs.norms(vectors.dtype), (len(vectors),), out, vectors, vectors.stride(0), vectors.shape[1])
    return out


def linear_adjusted_ce(
    features: Tensor, weight: Tensor, bias: Tensor | None, call: Call, normalize: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, grad_features, grad_weight, grad_bias) of a call without closed form and learned tables, whose weight is the class weight;
    see the operator ``ltkernels::linear_adjusted_ce`` (`ltkernels._head`).

    features (N, D), weight (C, D), bias (C,) in one dtype; loss and gradients float64 for float64 features, else
    float32; a gradient that is not needed is an empty tensor. Arguments were checked by the caller; a label out of range makes its row's
    loss and every gradient it takes part in NaN.

    float32 products follow torch.set_float32_matmul_precision: full float32 unless it says otherwise. 16-bit logits are
    float32 sums of exact products; their gradient is rounded once, to bfloat16 (bfloat16 features) or TF32 (float16), for
    the products with features and weights.
    """
    real, precision = real_dtype(features.dtype), _configs.precision(features.dtype)
    target, target_b, lam = call.target, call.target_b, call.lam
    shift, scale, margin, row_scale, class_weight = call.tables()
    focal_gamma, label_smoothing, ignore_index, reduction = (
        call.focal_gamma, call.label_smoothing, call.ignore_index, call.reduction,
    )  # fmt: skip
    row_coef = call.factor(features.shape[0])
    row_coef = None if row_coef is None else row_coef.contiguous()
    need_features, need_weight, need_bias = needs
    mixed = target_b is not None
    if mixed and real != features.dtype:  # rare, and not compiled for 16-bit dtypes
        features, weight, bias = (x if x is None else x.to(real) for x in (features, weight, bias))
        precision = "tf32"  # holds a 16-bit number exactly
    (rows, width), classes = features.shape, weight.shape[0]
    device = features.device
    features, weight = _vectors(features), _vectors(weight)
    padded = features.shape[1]  # a product takes width times as long as the copy
    variant = (mixed, precision)
    tile = _configs.linear_tile(features.dtype)
    row_blocks, class_blocks = -(-rows // tile.rows), -(-classes // tile.columns)

    loss = torch.empty(rows if reduction == _NONE else (), dtype=real, device=device)
    scalar = loss if loss.dim() else loss.view(1)
    row_loss = loss if reduction == _NONE else torch.empty(rows, dtype=real, device=device)
    by_class = need_weight or need_bias  # a bias alone is rare: the weights' gradient comes with it
    grad_features = torch.zeros((rows, padded) if need_features else 0, dtype=real, device=device)
    grad_weight = torch.zeros((classes, padded) if by_class else 0, dtype=real, device=device)
    grad_bias = torch.zeros(classes if need_bias else 0, dtype=real, device=device)
    by = _denominator(scalar, call, classes)

    if rows:
        feature_norm = _norms(features, real) if normalize else scalar
        weight_norm = _norms(weight, real) if normalize else scalar
        present = _present(shift, scale, margin, row_scale, class_weight, row_coef, None, *call.beside())
        present |= (_row.FEATURE_NORM.value | _row.WEIGHT_NORM.value) if normalize else 0
        present |= _row.BIAS.value if bias is not None else 0
        inputs = (
            features,
            features.stride(0),
            weight,
            weight.stride(0),
            _or(bias, features),
            feature_norm,
            weight_norm,
        )
        labels = (target, _or(target_b, target), _or(lam, scalar))
        tables = tuple(_or(table, scalar) for table in (shift, scale, margin, row_scale, class_weight))
        beside = tuple(_or(each, scalar) for each in call.beside())
        labels_count = 2 if mixed else 1

        parts, steps = _split(row_blocks, class_blocks)
        sums = torch.empty((labels_count, parts, PARTS.value, rows), dtype=real, device=device)
        _launch(
            _configs.tile_statistics(features.dtype, *variant),
            (row_blocks, parts),
            sums,
            *inputs,
            *labels,
            tables[0],
            tables[1],
            tables[3],
            tables[4],
            rows,
            classes,
            padded,
            ignore_index,
            present,
            steps,
        )
        stats = torch.empty((labels_count, STATISTICS.value, rows), dtype=real, device=device)
        _launch(
            _configs.combine(features.dtype),
            (-(-rows // _configs.COMBINE_ROWS),),
            stats,
            row_loss,
            sums,
            parts,
            *labels,
            *tables,
            *beside,
            rows,
            classes,
            ignore_index,
            present,
            int(mixed),
            focal_gamma,
            label_smoothing,
        )

        def gradient(by_class: bool, owners: int, tiles: int, length: int, into: Tensor) -> Tensor:
            """One input's gradient, to `into`; returns the bias' parts."""
            parts, steps = _split(owners, tiles)
            own, norm = (weight, weight_norm) if by_class else (features, feature_norm)
            direct = parts == 1 and not normalize
            out = into if direct else torch.empty((parts, length, padded), dtype=real, device=device)
            bias_out = torch.empty((parts, classes), dtype=real, device=device) if by_class else scalar
            _launch(
                _configs.input_gradient(features.dtype, by_class, *variant),
                (owners, parts),
                out,
                bias_out,
                stats,
                *by,
                *inputs,
                *labels,
                tables[0],
                tables[1],
                tables[3],
                tables[4],
                _or(row_coef, scalar),
                rows,
                classes,
                padded,
                ignore_index,
                present,
                steps,
            )
            if not direct:
                _launch(
                    _configs.gather_parts(features.dtype),
                    (length,),
                    into,
                    out,
                    parts,
                    own,
                    own.stride(0),
                    norm,
                    length,
                    padded,
                    int(normalize),
                )
            return bias_out

        if need_features:
            gradient(False, row_blocks, class_blocks, rows, grad_features)
        if by_class:
            bias_parts = gradient(True, class_blocks, row_blocks, classes, grad_weight)
            if need_bias:
                grad_bias = bias_parts.sum(dim=0)
    if reduction != _NONE:
        _reduce(scalar, row_loss, *by)
    if not need_weight:
        grad_weight = grad_weight.new_empty(0)
    if padded != width:
        grad_features, grad_weight = (
            g[:, :width].contiguous() if g.dim() == 2 else g for g in (grad_features, grad_weight)
        )
    return loss, grad_features, grad_weight, grad_bias
