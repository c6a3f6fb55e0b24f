"""The loss written plainly in float64, its gradient by hand, and the only tolerance table of the loss tests.

The gradient at the label is minus the sum of the other probabilities and the loss uses log1p: float64 autograd itself cancels to 0
on confident rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative error of an element, in units of (4 + largest |a| of the row) float32 (float64 for float64) epsilons: a rounding error of an
# adjusted logit a is eps * |a|, and a probability inherits it as a relative error. `out` is one rounding to the gradient's dtype, `floor`
# the absolute error that underflow of that dtype is allowed; for float32 the kernel's exp flushing below e^-86.5 = 2.7e-38, times row
# scales and weights up to 100.
TOLERANCES = {
    # dtype: (working epsilon, factor, output epsilon, floor)
    torch.float64: (2.2e-16, 4.0, 2.2e-16, 1e-300),
    torch.float32: (1.2e-7, 2.0, 1.2e-7, 4e-36),
    torch.bfloat16: (1.2e-7, 2.0, 3.9e-3, 4e-36),
    torch.float16: (1.2e-7, 2.0, 4.9e-4, 3.0e-8),
}

TABLES = ("shift", "scale", "margin", "row_scale", "weight")


def adjusted_cross_entropy(
    logits: Tensor,
    target: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    margin: Tensor | None = None,
    row_scale: Tensor | None = None,
    weight: Tensor | None = None,
    label_scale: Tensor | None = None,
    sample_weight: Tensor | None = None,
    focal_gamma: float = 0.0,
    label_smoothing: float | Tensor = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    upstream: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient, largest |a| of each row) of (N, C) logits, all float64, one row at a time."""
    z = logits.detach().double()
    rows, classes = z.shape
    one, zero = torch.ones(classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    beta = one if scale is None else scale.double()
    delta = zero if shift is None else shift.double()
    m = zero if margin is None else margin.double()
    sigma = one if row_scale is None else row_scale.double()
    alpha = one if weight is None else weight.double()
    kappa = one if label_scale is None else label_scale.double()
    eps = label_smoothing.double() if isinstance(label_smoothing, Tensor) else one * label_smoothing
    own = torch.ones(rows, dtype=torch.float64) if sample_weight is None else sample_weight.double().reshape(-1)
    if isinstance(target, tuple):
        first, second, lam = target
        labels = [(first, lam.double().expand(rows)), (second, 1 - lam.double().expand(rows))]
    else:
        first = target
        labels = [(target, torch.ones(rows, dtype=torch.float64))]

    losses, grads = torch.zeros(rows, dtype=torch.float64), torch.zeros_like(z)
    weights, size, valid = 0.0, torch.zeros(rows, dtype=torch.float64), 0
    for i in range(rows):
        if first[i] == ignore_index:
            continue
        valid += 1
        for each, share in labels:
            y, share_i = int(each[i]), float(share[i])
            a = beta * z[i] + delta
            if label_scale is not None:
                a[y] = float(kappa[y]) * beta[y] * z[i, y] + delta[y]
            a[y] -= m[y]
            a = float(sigma[y]) * a
            finite = a[torch.isfinite(a)].abs()
            size[i] = max(float(size[i]), float(finite.max()) if len(finite) else 0.0)
            e = torch.exp(a - a.max())
            others = float(torch.cat([e[:y], e[y + 1 :]]).sum())
            if not torch.isfinite(a.max()):  # NaN or infinity in the row, or every class masked: there is no softmax
                e, others = torch.full_like(a, torch.nan), torch.nan
            if float(a[y]) == float(a.max()):
                nll = torch.log1p(torch.tensor(others, dtype=torch.float64))
            else:
                nll = torch.log(e.sum()) - (a[y] - a.max())
            p = e / e.sum()
            q = -torch.expm1(-nll)  # 1 - p_y
            slope = torch.tensor(1.0)
            phi = nll
            if focal_gamma and q > 0:
                phi = q**focal_gamma * nll
                tail = focal_gamma * nll * p[y] * q ** (focal_gamma - 1) if p[y] > 0 else 0.0
                slope = q**focal_gamma + tail
            elif focal_gamma and q == 0:
                phi, slope = nll * 0, nll * 0
            share_i *= float(own[i])
            hard = (1 - eps[y]) * alpha[y] * share_i
            soft = eps[y] / classes * share_i
            losses[i] += hard * phi
            grad = hard * slope * p
            grad[y] = -hard * slope * (others / float(e.sum()))
            if eps[y]:
                log_p = a - a.max() - torch.log(e.sum())
                losses[i] -= soft * (alpha * log_p).sum()
                grad = grad + soft * (alpha.sum() * p - alpha)
            grad[y] *= kappa[y]
            grads[i] += float(sigma[y]) * beta * grad
            weights += share_i * float(alpha[y])
    denominator = {"mean": weights, "batch_mean": float(valid), "sum": 1.0, "none": 1.0}[reduction]
    scale_by = torch.as_tensor(upstream, dtype=torch.float64).expand(rows)
    if denominator == 0:
        loss = torch.tensor(float("nan"), dtype=torch.float64)
    else:
        loss = losses if reduction == "none" else losses.sum() / denominator
        grads = grads / denominator
    return loss, grads * scale_by[:, None], size


def gradient_fits(candidate: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype, cond: float = 1.0) -> bool:
    """Whether every element is within the table; arguments as in `assert_gradient`."""
    epsilon, factor, out, floor = TOLERANCES[dtype]
    scale = expected.abs().amax(dim=1, keepdim=True)
    allowed = cond * (factor * epsilon * (4 + size[:, None]) + out) * expected.abs() + floor
    if cond > 1:  # cancellation: relative to the row's largest entry
        allowed = allowed + factor * epsilon * (4 + size[:, None]) * scale
    same = (candidate == expected) | (candidate.isnan() & expected.isnan())
    return bool((same | ((candidate - expected).abs() <= allowed)).all())


def assert_gradient(
    actual: Tensor, expected: Tensor, size: Tensor, labels: Tensor | None = None, cond: float = 1.0
) -> None:
    """Elementwise relative error within the table; first, that the table would reject typical wrong gradients.

    `size` (N,) is the rows' largest |a|. `cond` widens the table where the formula itself cancels (label smoothing subtracts
    two numbers of one size); a test that passes it says why.
    """
    floor = TOLERANCES[actual.dtype][3]

    def fits(candidate: Tensor) -> bool:
        return gradient_fits(candidate, expected, size, actual.dtype, cond)

    got = actual.double()
    finite = torch.nan_to_num(expected)
    if finite.abs().max() > 1e3 * floor:
        assert not fits(torch.zeros_like(expected)), "the tolerance would accept a zero gradient"
        assert not fits(2 * expected), "the tolerance would accept a doubled gradient"
        if labels is not None and expected.shape[1] > 1:
            only = torch.zeros_like(expected)
            rows = torch.arange(len(labels))
            inside = (labels >= 0) & (labels < expected.shape[1])
            only[rows[inside], labels[inside]] = expected[rows[inside], labels[inside]]
            assert not fits(only), "the tolerance would accept a gradient at the labels alone"
    assert got.shape == expected.shape
    assert fits(got), (
        f"largest error {float((got - expected).abs().nan_to_num().max()):.3g} of {float(finite.abs().max()):.3g}"
    )


def assert_loss(actual: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """Relative error of the loss within the table; the loss of 16-bit logits is float32."""
    epsilon, factor, _, floor = TOLERANCES[torch.float64 if dtype == torch.float64 else torch.float32]
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    limit = size if actual.dim() else size.max() if len(size) else torch.tensor(0.0)
    allowed = factor * epsilon * (4 + limit) * expected.abs() + floor
    got = actual.double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert bool((same | ((got - expected).abs() <= allowed)).all()), f"{actual} is not {expected}"


def assert_sums(actual: Tensor, expected: Tensor, magnitude: Tensor, size: float, cond: float = 1.0) -> None:
    """A table's gradient: the error of a sum relative to `magnitude`, the sum of its terms' absolute values. Terms have a row's error, and
    adding them up in slices another few roundings. `size` is the rows' largest |a|, `cond` as in `assert_gradient`."""
    epsilon, factor, _, floor = TOLERANCES[actual.dtype]
    allowed = cond * factor * epsilon * (8 + size) * magnitude + floor
    assert actual.shape == expected.shape
    for wrong in (torch.zeros_like(expected), 2 * expected):
        if magnitude.max() > 1e3 * floor and expected.abs().max() > 1e-3 * magnitude.max():
            assert not bool(((wrong - expected).abs() <= allowed).all()), "the tolerance would accept a wrong gradient"
    error = (actual.double() - expected).abs()
    assert bool((error <= allowed).all()), (
        f"largest error {float((error / magnitude.clamp_min(floor)).max()):.3g} of its terms"
    )
