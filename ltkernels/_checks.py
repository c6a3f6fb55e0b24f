"""Every argument check of the public functions and its message, once.

Nothing here reads tensor contents on an accelerator: that would make each call wait for the device.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence, Set, ValuesView
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ._errors import ArgumentError, DTypeError

REDUCTIONS = ("none", "mean", "batch_mean", "sum")  # the index is the code of csrc/cpu/adjusted_ce.h
REDUCTION_CODES = {name: code for code, name in enumerate(REDUCTIONS)}
_LIMITS = {real: torch.finfo(real) for real in (torch.float32, torch.float64)}
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ClassCounts: TypeAlias = Sequence[int] | Mapping[int, int] | Tensor


class Counts(NamedTuple):
    """Checked class counts: ``n`` (C,) float64 on the CPU with empty classes replaced by the rarest non-empty count,
    ``empty`` (C,) bool, ``total`` the sum of the true counts."""

    n: Tensor
    empty: Tensor
    total: float


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses, tables and accumulators: float64 for float64 logits, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def class_counts(counts: ClassCounts, empty: str = "error", *, option: bool = True) -> Counts:
    """Checks integer class counts; see `Counts`. `empty` is ``"error"`` or ``"ignore"``; `option` says whether the user may choose."""
    if empty not in ("error", "ignore"):
        raise ValueError(f"empty is {empty!r}; it must be 'error' or 'ignore'")
    values = count_list(counts)
    zeros = [index for index, value in enumerate(values) if value == 0]
    if len(zeros) == len(values):
        raise ValueError("class_counts holds zeros only; at least one class must have samples")
    if zeros and empty == "error":
        shown = ", ".join(map(str, zeros[:10])) + (", ..." if len(zeros) > 10 else "")
        advice = "pass empty='ignore' to give such classes probability 0" if option else "every class must have samples"
        raise ValueError(f"class_counts is 0 for class {shown}; {advice}")
    rarest = min(value for value in values if value > 0)
    # On the CPU whatever torch's default device is: on "meta" there would be nothing to compute with.
    n = torch.tensor([value if value > 0 else rarest for value in values], dtype=torch.float64, device="cpu")
    mask = torch.tensor([value == 0 for value in values], device="cpu")
    return Counts(n, mask, float(sum(values)))


def count_list(counts: ClassCounts) -> list[int]:
    """The counts by class id as Python integers, at least one, none of them negative."""
    if hasattr(counts, "keys"):  # a pandas Series is a mapping too: value_counts() sorts it by count
        counts = _by_class_id(type(counts).__name__, dict(counts))
    if isinstance(counts, Tensor):
        if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
            raise TypeError(f"class_counts has dtype {counts.dtype}; counts must be integers")
        if counts.dim() != 1:
            raise ValueError(f"class_counts has shape {tuple(counts.shape)}; it must be (C,)")
        values = [int(value) for value in counts.tolist()]
    else:
        if isinstance(counts, str | numbers.Number) or not hasattr(counts, "__len__"):
            # Not the repr of a generator or an iterator, which is its address.
            found = repr(counts) if isinstance(counts, str | numbers.Number) else f"a {type(counts).__name__}"
            raise TypeError(f"class_counts is {found}; it must be a sequence of C integers, one count per class")
        if isinstance(counts, Set | ValuesView | bytes | bytearray):  # keys and items of a mapping are sets
            raise TypeError(
                f"class_counts is a {type(counts).__name__}, whose order is not that of the class ids; it must be a sequence of C "
                "integers, or a mapping from every class id to its count"
            )
        values = []
        for index, value in enumerate(counts):
            if isinstance(value, bool) or not (isinstance(value, numbers.Integral) or _is_integer_scalar(value)):
                raise TypeError(f"class_counts[{index}] is {value!r}; counts must be integers")
            values.append(int(value))
    if not values:
        raise ValueError("class_counts is empty; it must hold one count per class")
    for index, value in enumerate(values):
        if value < 0:
            raise ValueError(f"class_counts[{index}] is {value}; counts must not be negative")
        if value >= 2**63:
            raise ValueError(f"class_counts[{index}] has {len(str(value))} digits; counts must be below 2^63")
    return values


def _by_class_id(kind: str, counts: dict[int, int]) -> list[int]:
    ids = range(len(counts))
    if any(isinstance(key, bool) for key in counts) or set(counts) != set(ids):
        missing = [str(key) for key in ids if key not in counts]
        raise TypeError(
            f"class_counts is a {kind} with keys {', '.join(map(repr, list(counts)[:6]))}"
            f"{', ...' if len(counts) > 6 else ''}; a mapping must have the class ids 0 to C - 1 as its keys"
            + (f" (missing: {', '.join(missing[:6])})" if missing else "")
        )
    return [counts[key] for key in ids]


def _is_integer_scalar(value: object) -> bool:
    """A NumPy integer or a 0-dim integer tensor."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_floating_point() and value.dtype != torch.bool
    return False


def num_classes(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"num_classes is {value!r}; it must be an integer of at least 1")
    return int(value)


def number(
    name: str, value: float, *, low: float | None = None, high: float | None = None, above: float | None = None
) -> float:
    """A finite real number within [low, high], or strictly above `above`."""
    # An abstract class takes a microsecond to ask.
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise DTypeError(f"{name} is {value!r}; it must be a number")
    result = float(value)
    if not -math.inf < result < math.inf:  # math.isfinite would break a torch.compile graph
        raise ArgumentError(f"{name} is {value!r}; it must be finite")
    if low is not None and result < low:
        raise ArgumentError(f"{name} is {value!r}; it must be at least {low}")
    if high is not None and result > high:
        raise ArgumentError(f"{name} is {value!r}; it must be at most {high}")
    if above is not None and result <= above:
        raise ArgumentError(f"{name} is {value!r}; it must be above {above}")
    return result


def integer(name: str, value: int, below: int = 2**63) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise DTypeError(f"{name} is {value!r}; it must be an integer")
    if not -(2**63) <= value < below:
        raise ArgumentError(f"{name} is {value}; it must be an integer of 64 bits")
    return int(value)


def seed(value: int) -> int:
    """A seed as torch's generators take it: an integer of 64 bits, with or without a sign."""
    return integer("seed", value, 2**64)


def grad_scale(value: Tensor | float, device: torch.device, real: torch.dtype) -> Tensor:
    """A factor above 0 as a tensor () in the loss' dtype, the caller's memory where that is possible; what a tensor on an accelerator
    holds is not looked at."""
    if not isinstance(value, Tensor):
        # Not torch.full: its number would be a constant of a compiled graph, and every other number a graph of its own.
        return torch.ones((), dtype=real, device=device) * _factor(value, real)
    if value.numel() != 1 or not value.is_floating_point():
        raise ArgumentError(
            f"grad_scale has shape {tuple(value.shape)} and dtype {value.dtype}; it must be one floating-point number"
        )
    if value.device != device:
        raise ArgumentError(f"grad_scale is on {value.device}, logits on {device}; both must be on one device")
    if not torch.compiler.is_compiling() and type(value) is Tensor:
        if value.is_cpu and not _LIMITS[real].tiny <= value.item() <= _LIMITS[real].max:
            _factor(value.item(), real)  # says what is wrong
        if value.is_inference():  # which has no version to see a change by
            value = value.clone()
    if value.dim() == 0 and value.dtype == real and not value.requires_grad:
        return value
    return value.detach().reshape(()).to(real)


def _factor(value: float, real: torch.dtype) -> float:
    result = number("grad_scale", value, above=0.0)
    limits = _LIMITS[real]
    if not limits.tiny <= result <= limits.max:
        raise ArgumentError(
            f"grad_scale is {value!r}; it must lie in [{limits.tiny}, {limits.max}], the range of {real}"
        )
    return result


def reduction(value: str) -> int:
    """The kernel's code of a reduction."""
    code = REDUCTION_CODES.get(value) if isinstance(value, str) else None
    if code is None:
        raise ArgumentError(f"reduction is {value!r}; it must be one of {', '.join(map(repr, REDUCTIONS))}")
    return code


def logits(value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise DTypeError(f"logits is {type(value).__name__}; it must be a tensor")
    if value.dtype not in FLOATING:
        raise DTypeError(f"logits has dtype {value.dtype}; it must be float32, float64, bfloat16 or float16")
    if value.layout is not torch.strided:
        raise DTypeError(f"logits has layout {value.layout}; it must be strided")
    if value.dim() == 0:
        raise ArgumentError("logits has no dimensions; it must be (N, C), (C,) or (N, C, d1, ...)")


def target(value: Tensor, logits: Tensor, name: str = "target") -> bool:
    """Checks a target against its logits. True for class probabilities, False for class indices."""
    if not isinstance(value, Tensor):
        raise DTypeError(f"{name} is {type(value).__name__}; it must be a tensor")
    if value.device != logits.device:
        raise ArgumentError(f"{name} is on {value.device}, logits on {logits.device}; both must be on one device")
    if value.layout is not torch.strided:
        raise DTypeError(f"{name} has layout {value.layout}; it must be strided")
    shape = logits.shape
    if value.is_floating_point():
        if value.shape != shape:
            raise ArgumentError(
                f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; class probabilities must have the "
                f"logits' shape {tuple(shape)}, class indices an integer dtype"
            )
        return True
    if value.is_complex() or value.dtype == torch.bool:
        raise DTypeError(
            f"{name} has dtype {value.dtype} and shape {tuple(value.shape)}; it must hold class indices (int64) or, in the "
            f"logits' shape {tuple(shape)}, class probabilities"
        )
    wanted = shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]
    if value.shape != wanted:
        raise ArgumentError(
            f"{name} has shape {tuple(value.shape)}; logits of shape {tuple(shape)} need class indices of shape "
            f"{tuple(wanted)}"
        )
    return False


def table(name: str, value: Tensor, classes: int, device: torch.device, real: torch.dtype) -> Tensor:
    """A per-class vector, contiguous and in the kernel's dtype."""
    if (  # the usual case first: building shapes to compare takes a microsecond a table
        type(value) is Tensor
        and value.dtype is real
        and value.dim() == 1
        and value.numel() == classes
        and value.device == device
        and value.is_contiguous()
    ):
        return value
    value = _numbers(name, value, (classes,), "entry per class", device, real)
    return value if value.is_contiguous() else value.contiguous()


def rows(name: str, value: Tensor, shape: Sequence[int], device: torch.device, real: torch.dtype) -> Tensor:
    """One number a row, in the kernel's dtype; `shape` is that of the class indices."""
    return _numbers(name, value, tuple(shape), "number per row", device, real)


def _numbers(
    name: str, value: Tensor, shape: tuple[int, ...], each: str, device: torch.device, real: torch.dtype
) -> Tensor:
    if not isinstance(value, Tensor):
        raise DTypeError(f"{name} is {type(value).__name__}; it must be a tensor of shape {shape}")
    if value.shape != shape:
        raise ArgumentError(f"{name} has shape {tuple(value.shape)}; it must be {shape}, one {each}")
    if value.device != device:
        raise ArgumentError(f"{name} is on {value.device}, logits on {device}; both must be on one device")
    if value.layout is not torch.strided:
        raise DTypeError(f"{name} has layout {value.layout}; it must be strided")
    if not value.is_floating_point():
        raise DTypeError(f"{name} has dtype {value.dtype}; it must be a floating-point tensor")
    return value.to(real)


def smooths(label_smoothing: float | Tensor) -> bool:
    """Whether labels are smoothed by a number or, chosen by the label, by a table."""
    return isinstance(label_smoothing, Tensor) or label_smoothing != 0.0
