"""Seesaw loss: each negative class is damped by its rarity and boosted where it is confused with the label."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from ._adjustment import rounded
from ._door import Options, Target
from ._module import AdjustedCrossEntropy, Common
from ._terms import ClosedForm, Term

if TYPE_CHECKING:
    from typing_extensions import Unpack


def seesaw(
    class_counts: _checks.ClassCounts,
    p: float = 0.8,
    q: float = 2.0,
    eps: float = 1e-2,
    *,
    empty: str = "error",
    table_dtype: torch.dtype = torch.float32,
) -> ClosedForm:
    """Seesaw loss, Wang et al. 2021 (arXiv:2008.10032): softmax cross-entropy of ``z + D`` with ``D_ij = p min(0, log n_j - log n_y) + q
    max(0, log P_ij - log max(P_iy, eps))``, ``P = softmax(z)`` held constant.

    The paper counts the samples seen so far in training; `ltkernels.nn.Seesaw` does that.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        p: exponent of the mitigation factor, at least 0: rarer classes than the label are punished less.
        q: exponent of the compensation factor, at least 0: classes that outweigh the label are punished more.
        eps: floor of the label's probability in the compensation, in (0, 1].
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` counts it as 1, as the authors' code.
        table_dtype: torch.float32, or torch.float64 for a model in float64.

    Returns:
        The closed form, for `ltkernels.functional.adjusted_cross_entropy`.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range.

    Example:
        >>> ltk.adjustments.seesaw([500, 50, 5]).term.table
        tensor([6.2146, 3.9120, 1.6094])
    """
    counts = _checks.class_counts(class_counts, empty)
    n = torch.where(counts.empty, 1.0, counts.n)
    return rounded(ClosedForm(Term("seesaw", torch.log(n), None, _term_options(p, q, eps))), table_dtype)


class Seesaw(AdjustedCrossEntropy):
    """Seesaw loss, Wang et al. 2021 (arXiv:2008.10032), which counts the samples it has seen: `ltkernels.adjustments.seesaw` on the counts
    so far.

    In training mode a forward pass first adds the batch's labels to the buffer `seen` (C,) int64, as the paper; in evaluation mode it
    only reads them. Mixed samples count for the label with the larger share, ignored rows do not count, and a class without a
    sample counts as 1. The buffer is in the state dict.

    Args:
        class_counts: the number of classes, to start with nothing seen; or (C,) counts to start from: a sequence, a tensor, or a mapping
            from every class id to its count.
        p: exponent of the mitigation factor, at least 0: rarer classes than the label are punished less.
        q: exponent of the compensation factor, at least 0: classes that outweigh the label are punished more.
        eps: floor of the label's probability in the compensation, in (0, 1].
        process_group: a `torch.distributed` group whose ranks' labels are counted together, one all-reduce of (C,) a training
            step; ``"world"`` is the default group; None counts this process' labels alone.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target class indices or mixed targets, and loss, as in `AdjustedCrossEntropy`.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers.
        ValueError: counts below 0 or all 0, options out of range.

    Predict with: the logits as they are.

    Example:
        >>> loss = ltk.nn.Seesaw(3)
        >>> round(loss(torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0])).item(), 4)
        0.2413
        >>> loss.seen
        tensor([1, 0, 0])
    """

    name = "seesaw"
    title = "Seesaw"
    build = staticmethod(seesaw)

    seen: Tensor

    def __init__(
        self,
        class_counts: int | _checks.ClassCounts,
        p: float = 0.8,
        q: float = 2.0,
        eps: float = 1e-2,
        *,
        process_group: Any = None,
        **common: Unpack[Common],
    ) -> None:
        if isinstance(class_counts, int):
            start = torch.zeros(_checks.num_classes(class_counts), dtype=torch.int64, device="cpu")
        else:
            start = torch.tensor(_checks.count_list(class_counts), device="cpu")
            _checks.class_counts(class_counts, "ignore")
        if isinstance(process_group, str) and process_group != "world":
            raise ValueError(f"process_group is {process_group!r}; it must be a process group, 'world' or None")
        own = _term_options(p, q, eps)
        super().__init__(ClosedForm(Term("seesaw", options=own)), num_classes=len(start), **common)
        self._table("seen", start, made=False)
        self._counted: Tensor | None = None  # with the batch at hand
        self.process_group = process_group
        self._seesaw = own
        self.options = {"p": p, "q": q, "eps": eps}

    def forward(self, logits: Tensor, target: Target, **said: Unpack[Options]) -> Tensor:
        """The loss; as of every loss, for class indices only."""
        of_term = super().forward
        return self._counting(target, lambda: of_term(logits, target, **said))

    def from_features(self, features: Tensor, weight: Tensor, target: Target, **options: Any) -> Tensor:
        of_term = super().from_features
        return self._counting(target, lambda: of_term(features, weight, target, **options))

    def _counting(self, target: Target, loss: Callable[[], Tensor]) -> Tensor:
        if not self.training:
            return loss()
        self._counted = self.seen + self._batch_counts(target)
        try:
            found = loss()
            self.seen.copy_(self._counted)  # only now: a call that raises counts nothing
        finally:
            self._counted = None
        return found

    def _closed_form(self) -> Term:
        seen = self.seen if self._counted is None else self._counted
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


def _term_options(p: float, q: float, eps: float) -> tuple[float, float, float]:
    """Checked options of the term."""
    p = _checks.number("p", p, low=0.0)
    q = _checks.number("q", q, low=0.0)
    return p, q, math.log(_checks.number("eps", eps, above=0.0, high=1.0))
