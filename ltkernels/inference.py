"""Corrections at prediction time: of logits, probabilities or classifier weights. Plain torch, differentiable, nothing in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks


def logit_adjust(
    logits: Tensor, class_counts: _checks.ClassCounts, tau: float = 1.0, *, empty: str = "error"
) -> Tensor:
    """Post-hoc logit adjustment, Menon et al. 2021 (arXiv:2007.07314), equation 9: ``logits - tau * log(n / N)``.

    For models trained with plain cross-entropy; one trained with the logit-adjusted loss has the correction in it already.

    Args:
        logits: (N, C), (C,) or (N, C, d1, ...), floating-point.
        class_counts: (C,) training samples per class, integers.
        tau: strength; the paper tunes it on held-out data.
        empty: ``"error"`` raises for a class without samples; ``"ignore"`` gives it -inf: it is never predicted.

    Returns:
        Adjusted logits in the same shape, float64 for float64 logits and float32 for all others, so that rounding to 16 bits
        does not decide the argmax.
    """
    _checks.logits(logits)
    tau = _checks.number("tau", tau)
    counts = _checks.class_counts(class_counts, empty)
    dim = 1 if logits.dim() > 1 else 0
    if logits.shape[dim] != len(counts.n):
        raise ValueError(f"class_counts has {len(counts.n)} entries; the logits have {logits.shape[dim]} classes")
    prior = (tau * torch.log(counts.n / counts.total)).masked_fill(counts.empty, torch.inf)
    real = _checks.real_dtype(logits.dtype)
    return logits.to(real) - _along(prior.to(device=logits.device, dtype=real), dim, logits.dim())


def threshold_move(probs: Tensor, cost: Tensor | Sequence[float]) -> Tensor:
    """Threshold moving, Zhou and Liu 2006 (doi:10.1109/TKDE.2006.17): scores whose argmax is the cheapest prediction.

    Args:
        probs: (N, C), (C,) or (N, C, d1, ...) class probabilities, floating-point.
        cost: (C,) cost of missing each class: the scores are ``probs * cost``. Or (C, C), with ``cost[i, j]`` the cost of
            predicting class j for a sample of class i: the score of j is what predicting it saves, in expectation, over the
            worst prediction, ``sum_i probs_i * (max_k cost[i, k] - cost[i, j])``. A vector c is the matrix with c_i off
            the diagonal of row i, and 0 on it. Costs are finite and not negative.

    Returns:
        Scores in the shape of `probs`, not normalised; float64 for float64 probabilities, float32 for all others.
    """
    if not isinstance(probs, Tensor) or probs.dtype not in _checks.FLOATING or probs.dim() == 0:
        raise TypeError("probs must be a floating-point tensor of shape (N, C), (C,) or (N, C, d1, ...)")
    real = _checks.real_dtype(probs.dtype)
    dim = 1 if probs.dim() > 1 else 0
    classes = probs.shape[dim]
    cost = torch.as_tensor(cost, dtype=torch.float64).to(probs.device)
    if cost.shape not in ((classes,), (classes, classes)):
        raise ValueError(f"cost has shape {tuple(cost.shape)}; it must be ({classes},) or ({classes}, {classes})")
    bad = ~(torch.isfinite(cost) & (cost >= 0))
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"cost{at} is {cost[tuple(at)].item()}; costs must be finite and not negative")
    if cost.dim() == 1:
        return probs.to(real) * _along(cost.to(real), dim, probs.dim())
    saving = (cost.amax(dim=1, keepdim=True) - cost).to(real)
    return torch.movedim(torch.movedim(probs.to(real), dim, -1) @ saving, -1, dim)


def tau_normalize(weight: Tensor, tau: float = 1.0) -> Tensor:
    """Tau-normalised classifier, Kang et al. 2020 (arXiv:1910.09217): ``w_i / |w_i|^tau``. Use it without a bias.

    Args:
        weight: (C, D) class weights, floating-point.
        tau: 0 leaves the weights as they are, 1 makes them unit vectors; the paper tunes it on held-out data.

    Returns:
        (C, D) in the dtype of `weight`, computed in float32 at least. A row of zeros stays zero.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in _checks.FLOATING:
        raise TypeError("weight must be a floating-point tensor of shape (C, D)")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (C, D)")
    tau = _checks.number("tau", tau)
    w = weight.to(_checks.real_dtype(weight.dtype))
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    return (w * torch.where(norm > 0, norm, 1.0) ** -tau).to(weight.dtype)


def _along(vector: Tensor, dim: int, dims: int) -> Tensor:
    """A (C,) vector that broadcasts along dimension `dim` of `dims`."""
    return vector.view([-1 if axis == dim else 1 for axis in range(dims)])


__all__ = ["logit_adjust", "tau_normalize", "threshold_move"]
