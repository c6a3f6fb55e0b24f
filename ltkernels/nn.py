"""Losses as Modules, one for each record of `ltkernels.losses`, and the cosine head that the margin losses expect."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _checks
from .heads import CosineLinear, linear_adjusted_cross_entropy
from .losses import LOSSES, Adjustment, Loss, adjusted_cross_entropy
from .losses._door import Options, Target
from .losses._record import _COMMON_DEFAULTS, TABLES, built_classes, merge_weight
from .losses._terms import ClosedForm, Term
from .losses.seesaw import seesaw_options


class AdjustedCrossEntropy(torch.nn.Module):
    """`ltkernels.functional.adjusted_cross_entropy` with its vectors as buffers.

    The buffers move with ``.to(device)`` and are saved in the state dict; schedules change them in place. They stay float32
    under ``.half()`` and ``.bfloat16()``: a prior rounded to 8 bits is another loss.

    Vectors named in `learnable` are Parameters instead, under the same names and state dict keys, and start from what the loss gives
    them: neutral (0 for shift and margin, 1 for the others) where it has none. Hand them to the optimizer, without weight decay, which
    would pull a scale to 0. A prior that is learned from the formula's on::

        loss = ltk.nn.LogitAdjustedCrossEntropy(class_counts, learnable=("shift",))
        optimizer = torch.optim.SGD([{"params": model.parameters(), "weight_decay": 2e-4}, {"params": loss.parameters()}], lr=0.1)

    A temperature for each class, or one for all, fitted to a trained model's validation logits::

        loss = ltk.nn.AdjustedCrossEntropy(ltk.adjustments.Adjustment(scale=torch.ones(C)), learnable=("scale",))
        log_t = torch.zeros((), requires_grad=True)
        ltk.functional.adjusted_cross_entropy(logits, target, scale=torch.exp(-log_t).expand(C)).backward()

    Args:
        adjustment: the vectors, or the closed form of a loss that they cannot express.
        class_counts: (C,) integers, kept in the state dict so that a checkpoint made with other counts is refused; or None.
        label_smoothing, ignore_index, reduction, inplace, backend: as in the function.
        learnable: names among shift, scale, margin, row_scale and weight; every Module of this file takes it but `Seesaw`.
    """

    shift: Tensor | None
    scale: Tensor | None
    margin: Tensor | None
    row_scale: Tensor | None
    weight: Tensor | None
    class_counts: Tensor | None
    term_table: Tensor | None
    term_seed: Tensor | None
    options: dict[str, Any]  # the loss' own parameters, where a record made the Module

    if TYPE_CHECKING:  # torch declares that a Module takes and returns anything

        def __call__(self, logits: Tensor, target: Target, *, grad_scale: Tensor | float | None = None) -> Tensor: ...

    def __init__(
        self,
        adjustment: Adjustment | ClosedForm | None = None,
        *,
        class_counts: Sequence[int] | Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        inplace: bool = False,
        backend: str | None = None,
        learnable: Sequence[str] = (),
    ) -> None:
        super().__init__()
        adjustment = Adjustment() if adjustment is None else adjustment
        learned = _learned_tables(adjustment, class_counts, learnable)
        for name in TABLES:
            table = getattr(adjustment, name, None)
            if name in learned:
                self.register_parameter(name, torch.nn.Parameter(learned[name]))
            else:
                self.register_buffer(name, None if table is None else torch.as_tensor(table).clone())
        self._learns = bool(learned)
        self.closed_form = isinstance(adjustment, ClosedForm)
        term = adjustment.term if isinstance(adjustment, ClosedForm) else None
        self._term = None if term is None else (term.form, term.options)
        self.register_buffer("term_table", None if term is None or term.table is None else term.table.clone())
        self.register_buffer("term_seed", None if term is None or term.seed is None else term.seed.clone())
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

    def forward(self, logits: Tensor, target: Target, *, grad_scale: Tensor | float | None = None) -> Tensor:
        """The loss; the arguments are those of `ltkernels.functional.adjusted_cross_entropy`."""
        return self._loss(logits, target, grad_scale, self._closed_form())

    def _closed_form(self) -> Term | None:
        return None if self._term is None else Term(self._term[0], self.term_table, self.term_seed, self._term[1])

    def _loss(self, logits: Tensor, target: Target, grad_scale: Tensor | float | None, term: Term | None) -> Tensor:
        options = self.call_options()
        options["term"] = term
        return adjusted_cross_entropy(logits, target, **options, grad_scale=grad_scale)

    def call_options(self) -> Options:
        """What this loss says of a call, as keywords of `ltkernels.functional.adjusted_cross_entropy`."""
        tables: dict[str, Any] = self._buffers  # attribute access would search three dictionaries for each table
        if self._learns:
            tables = {**tables, **self._parameters}
        return {
            "shift": tables["shift"],
            "scale": tables["scale"],
            "margin": tables["margin"],
            "row_scale": tables["row_scale"],
            "weight": tables["weight"],
            "focal_gamma": self.focal_gamma,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "inplace": self.inplace,
            "backend": self.backend,
            "term": self._closed_form(),
        }

    def from_features(
        self,
        features: Tensor,
        weight: Tensor,
        target: Target,
        *,
        bias: Tensor | None = None,
        normalize: bool = False,
        chunk_rows: int | None = None,
        grad_scale: Tensor | float | None = None,
    ) -> Tensor:
        """This loss of a linear or cosine classifier, without its logits; the arguments are those of
        `ltkernels.functional.linear_adjusted_cross_entropy`."""
        options = {"bias": bias, "normalize": normalize, "chunk_rows": chunk_rows, "grad_scale": grad_scale}
        return self._from_features(features, weight, target, self._closed_form(), **options)

    def _from_features(
        self, features: Tensor, weight: Tensor, target: Target, term: Term | None, **options: Any
    ) -> Tensor:
        own = self.call_options()
        class_weight = own.pop("weight")
        own["term"] = term
        return linear_adjusted_cross_entropy(features, weight, target, class_weight=class_weight, **own, **options)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Module.half() and friends would round the tables: they follow the device only.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]

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
        sized = [getattr(self, name) for name in tables] + ([] if self.term_table is None else [self.term_table])
        classes = len(sized[0]) if sized else "any"
        learned = f", learnable=[{', '.join(self._parameters)}]" if self._learns else ""
        return f"classes={classes}, tables=[{', '.join(tables)}]{learned}, reduction={self.reduction!r}"


def _learned_tables(
    adjustment: Adjustment | ClosedForm, class_counts: Sequence[int] | Tensor | None, names: Sequence[str]
) -> dict[str, Tensor]:
    """The first values of the vectors that are learned, float32."""
    if isinstance(names, str) or not set(names) <= set(TABLES):
        raise ValueError(f"learnable is {names!r}; it must be a sequence of names among {', '.join(TABLES)}")
    classes = built_classes(adjustment)
    if classes is None and class_counts is not None:
        classes = len(class_counts)
    found = {}
    for name in names:
        if isinstance(adjustment, ClosedForm) and name not in adjustment._fields:
            raise ValueError(f"learnable names {name}, which the closed form {adjustment.term.form!r} does not have")
        table = getattr(adjustment, name)
        if table is not None:
            found[name] = torch.as_tensor(table).clone().float()
        elif classes is not None:
            found[name] = torch.full((classes,), 0.0 if name in ("shift", "margin") else 1.0)
        else:
            raise ValueError(
                f"learnable names {name}, but nothing tells the number of classes: give AdjustedCrossEntropy an adjustment with {name}"
            )
        if not torch.isfinite(found[name]).all():
            at = int(torch.isfinite(found[name]).logical_not().nonzero()[0])
            raise ValueError(f"{name}[{at}] is {found[name][at].item()}; a learnable vector must start finite")
    return found


def _short(counts: Tensor) -> str:
    values = counts.tolist()
    return str(values) if len(values) <= 6 else f"[{', '.join(map(str, values[:5]))}, ...] ({len(values)} classes)"


def _module(loss: Loss) -> type[AdjustedCrossEntropy]:
    """The Module of a record: ``(class_counts | num_classes, options, *, common, learnable)``."""
    own = loss.parameters
    common_defaults = {**_COMMON_DEFAULTS, "learnable": ()}

    def __init__(self: AdjustedCrossEntropy, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs).arguments
        adjustment = loss.build(**{name: bound[name] for name in own if name in bound})
        common = {name: value for name, value in bound.items() if name in common_defaults}
        weight = common.get("weight")
        if weight is not None and built_classes(adjustment) not in (None, len(weight)):
            raise ValueError(f"weight has {len(weight)} entries; the loss has {built_classes(adjustment)} classes")
        merged = merge_weight(loss.class_name, adjustment._asdict(), common)
        adjustment = adjustment._replace(**{name: merged.pop(name) for name in adjustment._fields})
        AdjustedCrossEntropy.__init__(self, adjustment, class_counts=bound.get("class_counts"), **merged)
        self.options = {name: bound.get(name, own[name].default) for name in loss.options}

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *own.values()]
    parameters += [inspect.Parameter(name, keyword, default=value) for name, value in common_defaults.items()]
    signature = inspect.Signature(parameters)
    __init__.__signature__ = signature  # type: ignore[attr-defined]
    arguments = (
        "class_counts: (C,) training samples per class, integers.\n        " if loss.first == "class_counts" else ""
    )
    arguments += "learnable: names of vectors to learn, as in `AdjustedCrossEntropy`."
    return type(
        loss.class_name,
        (AdjustedCrossEntropy,),
        {"__init__": __init__, "__doc__": loss.doc(arguments), "__module__": __name__},
    )


class Seesaw(AdjustedCrossEntropy):
    """Seesaw loss that counts the samples it has seen: `ltkernels.functional.seesaw` on the counts so far.

    In training mode a forward pass first adds the batch's labels to the buffer `seen` (C,) int64, as the paper; in evaluation mode it
    only reads them. Mixed samples count for the label with the larger share, ignored rows do not count, and a class without a
    sample counts as 1. The buffer is in the state dict.

    Args:
        class_counts: the number of classes, to start with nothing seen; or (C,) counts to start from.
        p, q, eps: as in `ltkernels.functional.seesaw`.
        process_group: a `torch.distributed` group whose ranks' labels are counted together, one all-reduce of (C,) a training
            step; ``"world"`` is the default group; None counts this process' labels alone.
        weight, label_smoothing, ignore_index, reduction, inplace, backend: as in `AdjustedCrossEntropy`.
    """

    seen: Tensor

    def __init__(
        self,
        class_counts: int | Sequence[int] | Tensor,
        p: float = 0.8,
        q: float = 2.0,
        eps: float = 1e-2,
        *,
        process_group: Any = None,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        inplace: bool = False,
        backend: str | None = None,
    ) -> None:
        if isinstance(class_counts, int):
            seen = torch.zeros(_checks.num_classes(class_counts), dtype=torch.int64)
        else:
            counts = _checks.class_counts(class_counts, "ignore")
            seen = torch.where(counts.empty, 0.0, counts.n).long()
        if weight is not None and len(weight) != len(seen):
            raise ValueError(f"weight has {len(weight)} entries; the loss has {len(seen)} classes")
        if isinstance(process_group, str) and process_group != "world":
            raise ValueError(f"process_group is {process_group!r}; it must be a process group, 'world' or None")
        own = seesaw_options(p, q, eps)
        super().__init__(
            ClosedForm(Term("seesaw", options=own), weight=weight),
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            inplace=inplace,
            backend=backend,
        )
        self.register_buffer("seen", seen)
        self.process_group = process_group
        self._seesaw = own
        self.options = {"p": p, "q": q, "eps": eps}

    def forward(self, logits: Tensor, target: Target, *, grad_scale: Tensor | float | None = None) -> Tensor:
        """The loss; the arguments are those of `ltkernels.functional.adjusted_cross_entropy`, class indices only."""
        return self._counting(target, lambda term: self._loss(logits, target, grad_scale, term))

    def _from_features(
        self, features: Tensor, weight: Tensor, target: Target, term: Term | None, **options: Any
    ) -> Tensor:
        of_term = super()._from_features
        return self._counting(target, lambda counted: of_term(features, weight, target, counted, **options))

    def _counting(self, target: Target, loss_of: Callable[[Term], Tensor]) -> Tensor:
        if not self.training:
            return loss_of(self._counts_term(self.seen))
        seen = self.seen + self._batch_counts(target)
        loss = loss_of(self._counts_term(seen))
        self.seen.copy_(seen)  # only now: a call that raises counts nothing
        return loss

    def _closed_form(self) -> Term:
        return self._counts_term(self.seen)

    def _counts_term(self, seen: Tensor) -> Term:
        # float64: the call rounds it to what its logits need.
        return Term("seesaw", torch.log(seen.clamp(min=1).double()), None, self._seesaw)

    def _batch_counts(self, target: Target) -> Tensor:
        """(C,) int64. Labels out of range are left to the loss, which says what is wrong with them."""
        counts = torch.zeros_like(self.seen)
        first, second, share = target if isinstance(target, tuple) and len(target) == 3 else (target, None, 1.0)
        if isinstance(first, Tensor) and not first.is_floating_point():
            labels = first
            if isinstance(second, Tensor):
                labels = torch.where(torch.as_tensor(share, device=first.device) >= 0.5, first, second)
            valid = (first != self.ignore_index) & (labels >= 0) & (labels < len(counts))
            counts.index_add_(0, torch.where(valid, labels, 0).reshape(-1).long(), valid.reshape(-1).long())
        if self.process_group is not None:
            group = None if isinstance(self.process_group, str) else self.process_group
            torch.distributed.all_reduce(counts, group=group)
        return counts

    def extra_repr(self) -> str:
        return f"classes={len(self.seen)}, seen={int(self.seen.sum())}, reduction={self.reduction!r}"


if TYPE_CHECKING:
    from ._declared.nn import *

globals().update({loss.class_name: _module(loss) for loss in LOSSES.values() if loss.class_name not in globals()})

__all__ = ["AdjustedCrossEntropy", "CosineLinear", *(loss.class_name for loss in LOSSES.values())]
