"""Losses as Modules, one for each record of `ltkernels.losses`, and the cosine head that the margin losses expect."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks
from .heads import CosineLinear, linear_adjusted_cross_entropy
from .losses import LOSSES, Adjustment, Loss, adjusted_cross_entropy
from .losses._core import Target
from .losses._record import _COMMON_DEFAULTS, TABLES, built_classes, merge_weight


class AdjustedCrossEntropy(torch.nn.Module):
    """`ltkernels.functional.adjusted_cross_entropy` with its vectors as buffers.

    The buffers move with ``.to(device)`` and are saved in the state dict; schedules change them in place. They stay float32
    under ``.half()`` and ``.bfloat16()``: a prior rounded to 8 bits is another loss.

    Args:
        adjustment: the vectors.
        class_counts: (C,) integers, kept in the state dict so that a checkpoint made with other counts is refused; or None.
        label_smoothing, ignore_index, reduction, inplace, backend: as in the function.
    """

    class_counts: Tensor | None

    def __init__(
        self,
        adjustment: Adjustment | None = None,
        *,
        class_counts: Sequence[int] | Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        inplace: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        adjustment = Adjustment() if adjustment is None else adjustment
        for name, table in zip(TABLES, adjustment, strict=False):
            self.register_buffer(name, None if table is None else torch.as_tensor(table).clone())
        if class_counts is not None:
            class_counts = torch.tensor([int(count) for count in class_counts])
        self.register_buffer("class_counts", class_counts)
        _checks.reduction(reduction)
        self.focal_gamma = adjustment.focal_gamma
        self.label_smoothing = _checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.inplace = inplace
        self.backend = backend

    def forward(self, logits: Tensor, target: Target) -> Tensor:
        """The loss; logits and target as in `ltkernels.functional.adjusted_cross_entropy`."""
        tables = self._buffers  # attribute access would search three dictionaries for each table
        return adjusted_cross_entropy(
            logits,
            target,
            shift=tables["shift"],
            scale=tables["scale"],
            margin=tables["margin"],
            row_scale=tables["row_scale"],
            weight=tables["weight"],
            focal_gamma=self.focal_gamma,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            inplace=self.inplace,
            backend=self.backend,
        )

    def from_features(
        self,
        features: Tensor,
        weight: Tensor,
        target: Target,
        *,
        bias: Tensor | None = None,
        normalize: bool = False,
        chunk_rows: int | None = None,
    ) -> Tensor:
        """This loss of a linear or cosine classifier, without its logits; the arguments are those of
        `ltkernels.functional.linear_adjusted_cross_entropy`."""
        return linear_adjusted_cross_entropy(
            features,
            weight,
            target,
            bias=bias,
            normalize=normalize,
            shift=self.shift,
            scale=self.scale,
            margin=self.margin,
            row_scale=self.row_scale,
            class_weight=self.weight,
            focal_gamma=self.focal_gamma,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            chunk_rows=chunk_rows,
            backend=self.backend,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> AdjustedCrossEntropy:
        # Module.half() and friends would round the tables: they follow the device only.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "class_counts")
        if (
            saved is not None
            and self.class_counts is not None
            and not torch.equal(saved.cpu(), self.class_counts.cpu())
        ):
            raise ValueError(
                f"the checkpoint's {prefix}class_counts are {_short(saved)}, this loss was made for "
                f"{_short(self.class_counts)}: its tables belong to other data"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        tables = [name for name in TABLES if getattr(self, name) is not None]
        classes = "any" if not tables else len(getattr(self, tables[0]))
        return f"classes={classes}, tables=[{', '.join(tables)}], reduction={self.reduction!r}"


def _short(counts: Tensor) -> str:
    values = counts.tolist()
    return str(values) if len(values) <= 6 else f"[{', '.join(map(str, values[:5]))}, ...] ({len(values)} classes)"


def _module(loss: Loss) -> type[AdjustedCrossEntropy]:
    """The Module of a record: ``(class_counts | num_classes, options, *, common)``."""
    own = loss.parameters

    def __init__(self: AdjustedCrossEntropy, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs).arguments
        adjustment = loss.build(**{name: bound[name] for name in own if name in bound})
        common = {name: value for name, value in bound.items() if name in _COMMON_DEFAULTS}
        weight = common.get("weight")
        if weight is not None and built_classes(adjustment) not in (None, len(weight)):
            raise ValueError(f"weight has {len(weight)} entries; the loss has {built_classes(adjustment)} classes")
        common = merge_weight(loss.class_name, dict(zip(TABLES, adjustment, strict=False)), common)
        tables = {name: common.pop(name) for name in TABLES}
        AdjustedCrossEntropy.__init__(
            self,
            Adjustment(**tables, focal_gamma=adjustment.focal_gamma),
            class_counts=bound.get("class_counts"),
            **common,
        )

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *own.values()]
    parameters += [inspect.Parameter(name, keyword, default=value) for name, value in _COMMON_DEFAULTS.items()]
    signature = inspect.Signature(parameters)
    __init__.__signature__ = signature  # type: ignore[attr-defined]
    counts = "class_counts: (C,) training samples per class, integers." if loss.first == "class_counts" else ""
    return type(
        loss.class_name,
        (AdjustedCrossEntropy,),
        {"__init__": __init__, "__doc__": loss.doc(counts), "__module__": __name__},
    )


globals().update({loss.class_name: _module(loss) for loss in LOSSES.values()})

__all__ = ["AdjustedCrossEntropy", "CosineLinear", *(loss.class_name for loss in LOSSES.values())]
