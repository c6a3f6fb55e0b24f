"""What the back ends share: codes, records and messages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._call import TABLES, Call
from .._errors import ArgumentError, LabelError
from .._watch import address

# enum DType of csrc/cpu/kernels.h
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
LARGEST_LOG_DET = 64  # of the CUDA kernel, a warp a matrix


def bad_label(name: str, label: int, row: int, classes: int, ignore_index: int) -> LabelError:
    return LabelError(
        f"{name} has label {label} in row {row}; labels must lie in [0, {classes}) or equal ignore_index ({ignore_index})"
    )


def find_bad_label(call: Call, classes: int) -> LabelError | None:
    """The first label of a call that is neither in [0, C) nor `ignore_index`. Looks at the labels."""
    valid = call.target != call.ignore_index
    for name, labels in (("target", call.target), ("the second target", call.target_b)):
        if labels is None:
            continue
        bad = valid & ((labels < 0) | (labels >= classes))
        if bad.any():
            row = int(bad.nonzero()[0])
            return bad_label(name, int(labels[row]), row, classes, call.ignore_index)
    return None


def _not_finite(index: int, table: Tensor) -> Tensor:
    """Where a table has what no kernel takes; -inf in the shift removes a class."""
    if TABLES[index] == "shift":
        return torch.isnan(table) | (table == torch.inf)
    return ~torch.isfinite(table)


def bad_table(index: int, call: Call) -> ArgumentError:
    """What is wrong with the table of this number, as csrc/cpu/adjusted_ce.h counts them."""
    if index >= len(TABLES):
        problem = find_bad_beside(call)
        assert problem is not None
        return problem
    name, table = TABLES[index], call.tables()[index]
    assert table is not None
    at = int(_not_finite(index, table).nonzero()[0])
    allowed = "finite or -inf" if name == "shift" else "finite"
    return ArgumentError(f"{name}[{at}] is {table[at].item()}; it must be {allowed}")


def find_bad_beside(call: Call) -> ArgumentError | None:
    """The first entry of smoothing, label scale or sample weights that no kernel takes. Looks at them."""
    smoothing, label_scale, own = call.smoothing, call.label_scale, call.sample_weight
    if smoothing is not None:
        bad = ~((smoothing >= 0) & (smoothing <= 1))
        if bad.any():
            at = int(bad.nonzero()[0])
            return ArgumentError(f"label_smoothing[{at}] is {smoothing[at].item()}; it must lie in [0, 1]")
    if label_scale is not None and not torch.isfinite(label_scale).all():
        at = int(torch.isfinite(label_scale).logical_not().nonzero()[0])
        return ArgumentError(f"label_scale[{at}] is {label_scale[at].item()}; it must be finite")
    if own is not None:
        bad = ~torch.isfinite(own)
        if not call.target.is_floating_point():
            bad &= call.target != call.ignore_index
        if bad.any():
            at = int(bad.nonzero()[0])
            return ArgumentError(f"sample_weight is {own[at].item()} in row {at}; it must be finite")
    return None


def find_bad_table(call: Call) -> ArgumentError | None:
    """The first table of a call with an entry that no kernel takes. Looks at the tables."""
    for index, table in enumerate(call.tables()):
        if table is not None and _not_finite(index, table).any():
            return bad_table(index, call)
    return find_bad_beside(call)


class ClassPart(NamedTuple):
    """A part of the classes of every row, as csrc/cpu/row_statistics.h has it; see `ltkernels.losses._two_phase`."""

    logits: Tensor
    labels: Tensor
    row_scale: Tensor
    shift: Tensor | None
    scale: Tensor | None
    weight: Tensor | None

    def addresses(self) -> tuple[int, ...]:
        """As the entry points of the kernels take it."""
        z = self.logits
        rows = (address(z, "logits"), z.stride(0), *z.shape, address(self.labels, "labels"))
        tables = (address(self.shift, "shift"), address(self.scale, "scale"), address(self.weight, "weight"))
        return (DTYPE_CODES[z.dtype], *rows, *tables, address(self.row_scale, "row_scale"))
