"""What a loss is: a record. The functional form, the Module and the command line name all come from it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _core
from ._terms import ClosedForm, Term

if TYPE_CHECKING:
    from ..nn import AdjustedCrossEntropy


class Adjustment(NamedTuple):
    """The per-class vectors of a loss, (C,) float32 on the CPU each, or None for the neutral value.

    ``adjusted_cross_entropy(logits, target, **adjustment._asdict())`` is the loss.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    margin: Tensor | None = None
    row_scale: Tensor | None = None
    weight: Tensor | None = None
    focal_gamma: float = 0.0


TABLES = Adjustment._fields[:5]


def float32(table: Tensor) -> Tensor:
    """A finished float64 table in the dtype that kernels read."""
    return table.to(torch.float32)


COMMON = """
        weight: (C,) class weights, where the loss has none of its own.
        label_smoothing, ignore_index, reduction, inplace, backend: as in
            `ltkernels.functional.adjusted_cross_entropy`.
"""
_COMMON_DEFAULTS: dict[str, Any] = {
    "weight": None,
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "reduction": "mean",
    "inplace": False,
    "backend": None,
}
# What a call of a loss takes, a function's as well as a Module's.
_CALL_DEFAULTS: dict[str, Any] = {"grad_scale": None}


@dataclass(frozen=True)
class Loss:
    """A loss of the family.

    Attributes:
        name: on the command line and in `LOSSES`.
        title: for reports.
        function: name in `ltkernels.functional`.
        class_name: name in `ltkernels.nn`.
        build: from class counts, or a number of classes, or neither, and options, to an `Adjustment`. Its first parameter's name
            (``class_counts``, ``num_classes`` or anything else) says which. `ltkernels.adjustments` has it under its own name.
            A loss that five vectors cannot express gives a `ClosedForm`.
        logits: ``"linear"``, or ``"cosine"`` where the loss expects the cosines of a `CosineLinear` head.
        predict: what to take the argmax of.
    """

    name: str
    title: str
    function: str
    class_name: str
    build: Callable[..., Adjustment | ClosedForm]
    logits: str = "linear"
    predict: str = "the logits as they are"

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.build).parameters)

    @property
    def first(self) -> str | None:
        """``"class_counts"``, ``"num_classes"`` or None: what the builder needs to know of the data."""
        name = next(iter(self.parameters), None)
        return name if name in ("class_counts", "num_classes") else None

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The loss' own parameters, by name."""
        return {name: parameter for name, parameter in self.parameters.items() if name != self.first}

    def adjustment(self, class_counts: Sequence[int] | Tensor, **options: Any) -> Adjustment | ClosedForm:
        """The vectors for these class counts, whatever the builder's first parameter is."""
        if self.first == "class_counts":
            return self.build(class_counts, **options)
        if self.first == "num_classes":
            return self.build(len(class_counts), **options)
        return self.build(**options)

    def make(self, class_counts: Sequence[int] | Tensor, **options: Any) -> AdjustedCrossEntropy:
        """The Module for these class counts, whatever the loss needs of them."""
        from .. import nn

        module: Callable[..., AdjustedCrossEntropy] = getattr(nn, self.class_name)
        if self.first == "class_counts":
            return module(class_counts, **options)
        return module(len(class_counts), **options) if self.first == "num_classes" else module(**options)

    def functional(self) -> Callable[..., Tensor]:
        """The function ``(logits, target, [class_counts,] *, options, common) -> loss``."""
        takes_counts = self.first == "class_counts"
        own = set(self.options)
        shared = {**_COMMON_DEFAULTS, **_CALL_DEFAULTS}

        def function(logits: Tensor, target: _core.Target, *args: Any, **kwargs: Any) -> Tensor:
            bound = signature.bind(logits, target, *args, **kwargs).arguments
            options = {name: value for name, value in bound.items() if name in own}
            common = {name: value for name, value in bound.items() if name in shared}
            if not isinstance(logits, Tensor) or logits.dim() == 0:
                return _core.adjusted_cross_entropy(logits, target, **common)  # says what is wrong with the logits
            classes = logits.shape[1 if logits.dim() > 1 else 0]
            built = self.build(*_first_argument(self.first, bound.get("class_counts"), classes), **options)
            if takes_counts and built_classes(built) not in (None, classes):
                raise ValueError(f"class_counts has {built_classes(built)} entries; the logits have {classes} classes")
            own_fields = {name: _moved(value, logits.device) for name, value in built._asdict().items()}
            return _core.adjusted_cross_entropy(logits, target, **merge_weight(self.function, own_fields, common))

        keyword = inspect.Parameter.KEYWORD_ONLY
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter("logits", positional), inspect.Parameter("target", positional)]
        if takes_counts:
            parameters.append(inspect.Parameter("class_counts", positional))
        parameters += [parameter.replace(kind=keyword) for parameter in self.options.values()]
        parameters += [inspect.Parameter(name, keyword, default=value) for name, value in shared.items()]
        signature = inspect.Signature(parameters, return_annotation=Tensor)
        function.__signature__ = signature  # type: ignore[attr-defined]
        built = inspect.signature(self.build).return_annotation
        function.closed_form = built in ("ClosedForm", ClosedForm)  # type: ignore[attr-defined]  # for explain
        function.__name__ = function.__qualname__ = self.function
        function.__module__ = "ltkernels.functional"
        function.__doc__ = self.doc(
            "logits, target, grad_scale: as in `ltkernels.functional.adjusted_cross_entropy`.\n"
            + ("        class_counts: (C,) training samples per class, integers.\n" if takes_counts else "")
        )
        return function

    def doc(self, arguments: str) -> str:
        """The builder's docstring, with the arguments that all losses share."""
        text = inspect.getdoc(self.build) or self.title
        return f"{text}\n\n    Shared arguments:\n        {arguments}{COMMON.rstrip()}\n\n    Predict with: {self.predict}.\n"


def _first_argument(first: str | None, counts: Any, classes: int) -> tuple[Any, ...]:
    if first is None:
        return ()
    return (counts,) if first == "class_counts" else (classes,)


def _moved(value: Any, device: torch.device) -> Any:
    """A field of an adjustment, its tables on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Term) and value.table is not None:
        return Term(value.form, value.table.to(device), value.seed, value.options)
    return value


def built_classes(adjustment: Adjustment | ClosedForm) -> int | None:
    """Number of classes of an adjustment, None where it has no table."""
    tables = [getattr(adjustment, name, None) for name in TABLES]
    if isinstance(adjustment, ClosedForm):
        tables.append(adjustment.term.table)
    return next((len(table) for table in tables if table is not None), None)


def merge_weight(name: str, fields: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """A loss' own fields and the common arguments together; a class weight may come from one side only."""
    weight = common.pop("weight", None)
    if weight is not None:
        if fields["weight"] is not None:
            raise ValueError(f"weight is given, but {name} sets the class weights itself")
        fields = {**fields, "weight": weight}
    return {**fields, **common}
