"""Soft labels whose class shares are prescribed, by Sinkhorn's iterations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._errors import ArgumentError, DTypeError
from ._features import check_reals
from ._native import _C
from ._watch import address, direct, is_dtensor


class SinkhornLabels(NamedTuple):
    """What `sinkhorn` finds.

    Attributes:
        labels: (B, K) float64 for float64 similarities, float32 for all others; every row sums to 1.
        error: sum over the classes of |mean of their labels - prior|, of these labels.
        iterations: how often the class' potentials were changed.
    """

    labels: Tensor
    error: float
    iterations: int


@torch.no_grad()
def sinkhorn(
    similarities: Tensor,
    prior: Tensor | Sequence[float],
    epsilon: float = 0.05,
    tol: float = 1e-6,
    max_iterations: int = 300,
) -> SinkhornLabels:
    """Balanced soft labels: B times the plan Q that maximises ``<similarities, Q> + epsilon H(Q)`` among those whose rows sum to 1 / B and
    whose columns to `prior`.

    Cuturi 2013 (arXiv:1306.0895) in the log domain: ``labels = softmax(similarities / epsilon + v)``, the potentials v changed by ``log
    prior - log of the labels' mean`` until the means are the prior. No `epsilon` overflows, and no class dies of a rounding to 0. On the
    CPU all iterations are one call of a compiled kernel, on one thread; on other devices torch's operations, whose error the host waits for
    at each iteration. Labels are constants: they have no gradient.

    Args:
        similarities: (B, K) float32, float64, bfloat16 or float16, finite.
        prior: (K,) share of each class, above 0; divided by its sum.
        epsilon: temperature of the labels, above 0; large values make all rows the prior.
        tol: iterations end as soon as the error is at most this; at least 0.
        max_iterations: they end at this number too, at least 0. The error says what was reached; it is no exception.

    Returns:
        `SinkhornLabels`.

    Raises:
        TypeError: similarities that are no floating-point tensor, options that are no numbers.
        ValueError: an empty batch, a prior of another length, a share that is not finite and above 0 (its class would get no sample
            whatever the similarities say: leave the class out), similarities that are not finite (first row named), options out of range.

    Example:
        >>> found = ltk.functional.sinkhorn(torch.tensor([[0.9, 0.2], [0.6, 0.5]]), [0.5, 0.5], epsilon=0.5)
        >>> found.labels
        tensor([[0.6457, 0.3543],
                [0.3543, 0.6457]])
    """
    if not isinstance(similarities, Tensor) or similarities.dtype not in _checks.FLOATING:
        found = similarities.dtype if isinstance(similarities, Tensor) else type(similarities).__name__
        raise DTypeError(f"similarities is {found}; it must be a float32, float64, bfloat16 or float16 tensor")
    if is_dtensor(similarities):
        raise DTypeError("similarities is a DTensor; give a plain tensor, such as its to_local()")
    if similarities.dim() != 2 or 0 in similarities.shape:
        raise ArgumentError(f"similarities has shape {tuple(similarities.shape)}; it must be (B, K), neither of them 0")
    epsilon = _checks.number("epsilon", epsilon, above=0.0)
    tol = _checks.number("tol", tol, low=0.0)
    limit = _checks.integer("max_iterations", max_iterations)
    if limit < 0:
        raise ArgumentError(f"max_iterations is {limit}; it must be at least 0")
    classes = similarities.shape[1]
    share = check_reals(prior, "prior").to(similarities.device)
    if share.shape != (classes,):
        raise ArgumentError(
            f"prior has shape {tuple(share.shape)}; similarities of {classes} classes need ({classes},)"
        )
    bad = ~(torch.isfinite(share) & (share > 0))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ArgumentError(f"prior[{at}] is {share[at].item()}; every share must be finite and above 0")
    s = similarities.to(_checks.real_dtype(similarities.dtype))
    if not math.isfinite(float(s.sum())):
        finite = torch.isfinite(s).all(dim=1)
        if not bool(finite.all()):
            raise ArgumentError(f"similarities holds NaN or infinity, first in row {int((~finite).nonzero()[0])}")
    largest = float(s.abs().max()) / epsilon
    if not largest < torch.finfo(s.dtype).max / 4:
        raise ArgumentError(f"epsilon is {epsilon}; similarities / epsilon reach {largest:.3g}, beyond {s.dtype}")
    share = share / share.sum()
    find = _kernel if s.is_cpu and direct((s, share)) else iterated
    return find(s, share, epsilon, tol, limit)


def _kernel(s: Tensor, prior: Tensor, epsilon: float, tol: float, limit: int) -> SinkhornLabels:
    rows, classes = s.shape
    s = s if s.stride(1) == 1 else s.contiguous()
    labels = torch.empty(rows, classes, dtype=s.dtype)
    shift = torch.empty(classes, dtype=s.dtype)
    scratch = torch.empty(2, classes, dtype=torch.float64)
    at = (labels.data_ptr(), scratch[0].data_ptr(), shift.data_ptr(), scratch[1].data_ptr())
    error, iterations = _C.sinkhorn(
        s.dtype == torch.float32,
        address(s, "similarities"),
        s.stride(0),
        rows,
        classes,
        address(prior, "prior"),
        1.0 / epsilon,
        tol,
        limit,
        *at,
    )
    return SinkhornLabels(labels, error, iterations)


def iterated(s: Tensor, prior: Tensor, epsilon: float, tol: float, limit: int) -> SinkhornLabels:
    """The same in torch's operations: the definition, and what serves accelerators."""
    target, v = prior.log(), prior.log()
    iterations = 0
    while True:
        log_labels = torch.log_softmax(s / epsilon + (v - v.max()).to(s.dtype), dim=1)
        log_mean = torch.logsumexp(log_labels.double(), dim=0) - math.log(len(s))
        error = float((log_mean.exp() - prior).abs().sum())
        if error <= tol or iterations == limit:
            return SinkhornLabels(log_labels.exp(), error, iterations)
        v = v + (target - log_mean)
        iterations += 1
