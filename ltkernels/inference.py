"""Corrections at prediction time: of logits, probabilities or classifier weights. Plain torch, differentiable, nothing in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks
from ._features import check_reals


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
    cost = check_reals(cost, "cost").to(probs.device)
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


def expert_weights(
    first_view: Tensor | Sequence[Tensor],
    second_view: Tensor | Sequence[Tensor],
    *,
    epochs: int = 5,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    stop_below: float = 0.05,
    seed: int = 0,
) -> Tensor:
    """Test-time weights of experts, Zhang et al. 2022 (arXiv:2107.09249): ``softmax(w)`` that makes the predictions of two augmented views
    of the test data agree most, in the mean cosine of the softmaxes of the weighted sums of the experts' logits.

    **This reads unlabelled test data.** Accuracies with such weights are transductive: report them apart from those without, and choose
    nothing by them. Give it the data of one test set, whose class prior the weights then fit.

    Args:
        first_view, second_view: the experts' logits on two augmentations of the same N samples: E tensors (N, C) or one (E, N, C).
        epochs, lr, weight_decay, batch_size: of SGD on w with Nesterov momentum 0.9, in a shuffled order; the authors' values.
        stop_below: stops, before the step that would do so, where a weight would fall below it; 0 never does.
        seed: of the order.

    Returns:
        (E,) weights, positive, of sum 1, float64 on the CPU. ``loss.predict(logits, weights)`` uses them.

    Raises:
        ValueError: views that are not alike, no samples, options out of range.
        TypeError: logits that are not floating-point.

    Example:
        >>> steady = torch.eye(3).repeat(200, 1) * 5  # one expert says the same of both views, the other does not
        >>> weights = ltk.inference.expert_weights([steady, steady], [steady, steady.flip(1)])
        >>> bool(weights[0] > weights[1])
        True
    """
    views = []
    for name, view in (("first_view", first_view), ("second_view", second_view)):
        if not isinstance(view, Tensor):
            if not isinstance(view, Sequence) or not view or not all(isinstance(each, Tensor) for each in view):
                raise TypeError(f"{name} is {type(view).__name__}; it must be (E, N, C), or E tensors (N, C)")
            view = torch.stack(list(view))
        if view.dtype not in _checks.FLOATING:
            raise TypeError(f"{name} has dtype {view.dtype}; it must be floating-point")
        if view.dim() != 3 or 0 in view.shape:
            raise ValueError(f"{name} has shape {tuple(view.shape)}; it must be (E, N, C), none of them 0")
        views.append(view.detach().to(_checks.real_dtype(view.dtype)))
    first, second = views
    wider = torch.promote_types(first.dtype, second.dtype)
    views = [first.to(wider), second.to(wider)]
    if first.shape != second.shape:
        raise ValueError(
            f"second_view has shape {tuple(second.shape)}; it must be that of first_view, {tuple(first.shape)}"
        )
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if _checks.integer(name, value) < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    lr = _checks.number("lr", lr, above=0.0)
    weight_decay = _checks.number("weight_decay", weight_decay, low=0.0)
    stop_below = _checks.number("stop_below", stop_below, low=0.0, high=1.0 / len(first))
    samples = first.shape[1]
    order = torch.Generator().manual_seed(_checks.seed(seed))
    with torch.enable_grad():
        w = torch.full((len(first),), 1 / len(first), dtype=torch.float64, requires_grad=True)
        sgd = torch.optim.SGD([w], lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)
        for _ in range(epochs):
            for rows in torch.randperm(samples, generator=order).split(batch_size):
                before = w.detach().clone()
                share = torch.softmax(w, 0).to(first.device, wider)
                p, q = (torch.einsum("e,enc->nc", share, view[:, rows.to(view.device)]).softmax(1) for view in views)
                sgd.zero_grad()
                (-torch.cosine_similarity(p, q, dim=1).mean()).backward()
                sgd.step()
                if torch.softmax(w.detach(), 0).min() < stop_below:
                    return torch.softmax(before, 0)
    return torch.softmax(w.detach(), 0)


def _along(vector: Tensor, dim: int, dims: int) -> Tensor:
    """A (C,) vector that broadcasts along dimension `dim` of `dims`."""
    return vector.view([-1 if axis == dim else 1 for axis in range(dims)])


__all__ = ["expert_weights", "logit_adjust", "tau_normalize", "threshold_move"]
