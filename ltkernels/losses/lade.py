"""LADE: balanced softmax with a regulariser of the logits, which becomes any target distribution's classifier by adding its log prior."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from .._errors import ArgumentError, DTypeError
from .._watch import direct
from ._door import Options, Target
from ._module import AdjustedCrossEntropy, Common
from .logit_adjustment import balanced_softmax

if TYPE_CHECKING:
    from typing_extensions import Unpack

IMPORTANCE = ("class", "sample")


def lader(
    logits: Tensor,
    target: Tensor,
    prior: Tensor,
    lam: float = 0.01,
    importance: str = "class",
    *,
    ignore_index: int = -100,
) -> Tensor:
    """LADER, the regulariser of LADE, Hong et al. 2021 (arXiv:2012.00321): ``-sum_c prior_c (mean of z_c over the rows of class c - h_c -
    lam h_c^2)``, h_c being an estimate of ``log E exp(z_c)`` under equal classes. It is the bound of Donsker and Varadhan: at its best z is
    the log density ratio, free of the training prior.

    There are two estimates. ``"sample"`` weighs each row by the importance of its label: the log of the mean over all rows of ``exp(z_ic) /
    (C prior_{y_i})``. ``"class"`` is that of the authors' code, ``exp(z_ic) / (C prior_c)``: a constant of the column, whose gradient is
    that without weights but for lam.

    A class without rows in the batch has no first term. One with prior 0, or with -inf in all rows, has none at all. In plain torch: it
    reads a column at a time, and takes about as long as the loss beside it.

    Args:
        logits: (N, C) or (N, C, d1, ...) float32, float64, bfloat16 or float16, without the prior.
        target: class indices (N,) or (N, d1, ...).
        prior: (C,) training share of each class, at least 0.
        lam: factor of the square, at least 0. The authors use 0.01 with alpha 0.1 on CIFAR-100-LT, 0.1 with 0.005 on Places-LT, 0.5 with
            0.05 on ImageNet-LT, 0.1 with 0.05 on iNaturalist 2018.
        importance: ``"class"`` or ``"sample"``.
        ignore_index: label of rows that have no part in it.

    Returns:
        () float64 for float64 logits, float32 for all others; 0 for a batch without rows. Differentiable in the logits.

    Raises:
        TypeError: logits or target of another dtype, a target that is mixed.
        ValueError: shapes that do not fit, a label out of range, a negative prior, options out of range.

    Example:
        >>> z = torch.tensor([[1.0, 0.5, -0.5], [0.2, 0.8, 0.0], [0.0, 0.3, 1.0], [0.5, -0.2, 0.1]])
        >>> prior = torch.tensor([0.6, 0.3, 0.1])
        >>> ltk.functional.lader(z, torch.tensor([0, 1, 2, 0]), prior, lam=0.1)
        tensor(-0.5056)
    """
    _checks.logits(logits)
    if logits.dim() < 2:
        raise ArgumentError(f"logits has shape {tuple(logits.shape)}; LADER takes (N, C) or (N, C, d1, ...)")
    if not isinstance(target, Tensor) or _checks.target(target, logits):
        raise DTypeError("target is mixed or holds probabilities; LADER takes class indices")
    lam = _checks.number("lam", lam, low=0.0)
    if importance not in IMPORTANCE:
        raise ArgumentError(f"importance is {importance!r}; it must be one of {', '.join(map(repr, IMPORTANCE))}")
    classes, real = logits.shape[1], _checks.real_dtype(logits.dtype)
    prior = _checks.table("prior", prior, classes, logits.device, real)
    z = logits.movedim(1, -1).reshape(-1, classes).to(real)
    labels = target.reshape(-1).long()
    valid = labels != ignore_index
    if labels.is_cpu and direct((labels, prior)):
        bad = valid & ((labels < 0) | (labels >= classes))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ArgumentError(f"target has label {int(labels[row])} in row {row}; labels must lie in [0, {classes})")
        negative = ~(prior >= 0)
        if bool(negative.any()):
            at = int(negative.nonzero()[0])
            raise ArgumentError(f"prior[{at}] is {prior[at].item()}; it must be at least 0")
    rows = valid.sum()
    labels = labels.where(valid, 0)
    counted = (prior > 0) & (z.where(valid.unsqueeze(1), -math.inf) > -math.inf).any(dim=0)
    log_prior = prior.where(prior > 0, 1.0).log()
    weight = -log_prior - math.log(classes)
    x = z + (weight if importance == "class" else weight[labels].unsqueeze(1))
    x = x.where(valid.unsqueeze(1), -math.inf).where(counted, 0.0)
    h = torch.logsumexp(x, dim=0) - rows.clamp(min=1).to(real).log() if len(x) else x.sum(dim=0)
    own = z.gather(1, labels.unsqueeze(1)).squeeze(1).where(valid & counted[labels], 0.0)
    size = torch.zeros_like(prior).index_add(0, labels, valid.to(real))
    mean = torch.zeros_like(prior).index_add(0, labels, own) / size.clamp(min=1)
    return -(prior * (mean - h - lam * h * h)).where(counted, 0.0).sum()


class LADE(AdjustedCrossEntropy):
    """LADE, Hong et al. 2021 (arXiv:2012.00321): cross-entropy of ``z + log prior`` (balanced softmax) plus `alpha` times
    `ltkernels.functional.lader`, so that the logits themselves hold no prior.

    The regulariser is a number of the whole batch: reductions are ``"mean"`` and ``"batch_mean"``. It has no name on the command line,
    whose losses are tables of the logits.

    Args:
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
        alpha: factor of the regulariser, at least 0.
        lam: factor of its square, at least 0; see `ltkernels.functional.lader` for the authors' values.
        importance: ``"class"``, as in the authors' code, or ``"sample"``, the importance of each row's own label.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it probability 0.
        **common: weight, label_smoothing, ignore_index, reduction, inplace, backend, learnable and table_dtype of `AdjustedCrossEntropy`;
            inplace must be False.

    Shape:
        logits (N, C) or (N, C, d1, ...); target class indices (N,) or (N, d1, ...); loss ().

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: counts that are not integers by class id, options that are no numbers, targets that are mixed or probabilities.
        ValueError: counts below 0 or all 0, a class without samples unless ``empty="ignore"``, options out of range, another reduction.

    Predict with: the logits, plus the log prior of the data to predict where that is not balanced.

    Example:
        >>> loss = ltk.nn.LADE([6, 3, 1], alpha=1.0, lam=0.1)
        >>> logits = torch.tensor([[1.0, 0.5, -0.5], [0.2, 0.8, 0.0]])
        >>> round(loss(logits, torch.tensor([2, 1])).item(), 4)
        2.4176
    """

    title = "LADE"
    predict = "the logits, plus the log prior of the data to predict where that is not balanced"

    if TYPE_CHECKING:

        def __call__(self, logits: Tensor, target: Target, **said: Unpack[Options]) -> Tensor: ...

    def __init__(
        self,
        class_counts: _checks.ClassCounts,
        alpha: float = 0.1,
        lam: float = 0.01,
        importance: str = "class",
        *,
        empty: str = "error",
        **common: Unpack[Common],
    ) -> None:
        built = balanced_softmax(class_counts, empty=empty, table_dtype=common.get("table_dtype") or torch.float32)
        super().__init__(built, class_counts=class_counts, **common)
        self.alpha = _checks.number("alpha", alpha, low=0.0)
        self.lam = _checks.number("lam", lam, low=0.0)
        if importance not in IMPORTANCE:
            raise ValueError(f"importance is {importance!r}; it must be one of {', '.join(map(repr, IMPORTANCE))}")
        self.importance = importance

    def forward(self, logits: Tensor, target: Target, **said: Unpack[Options]) -> Tensor:
        """The loss; arguments as of every loss."""
        reduction = said.get("reduction", self.reduction)
        if reduction not in ("mean", "batch_mean"):
            raise ArgumentError(
                f"reduction is {reduction!r}; LADE regularises a batch: it must be 'mean' or 'batch_mean'"
            )
        if said.get("inplace", self.inplace):
            raise ArgumentError("inplace is True; LADE reads the logits twice")
        if not isinstance(target, Tensor):
            raise DTypeError("target is mixed or holds probabilities; LADE takes class indices")
        loss = super().forward(logits, target, **said)
        counts = self.class_counts
        assert counts is not None
        prior = counts.to(loss.dtype) / counts.sum()
        ignored = said.get("ignore_index", self.ignore_index)
        return loss + self.alpha * lader(logits, target, prior, self.lam, self.importance, ignore_index=ignored)

    def from_features(self, features: Tensor, weight: Tensor, target: Target, **said: Any) -> Tensor:
        """As of every loss; the regulariser reads columns, so that the logits of the whole batch are formed."""
        bias, normalize = said.pop("bias", None), said.pop("normalize", False)
        said.pop("chunk_rows", None)
        if normalize:
            features, weight = (torch.nn.functional.normalize(x, dim=-1) for x in (features, weight))
        logits = torch.nn.functional.linear(features, weight, bias)
        return self(logits if logits.dim() == 2 else logits.movedim(-1, 1), target, **said)
