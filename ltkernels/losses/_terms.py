"""Losses that per-class vectors cannot express: closed forms that the kernel computes, and their definition in plain torch.

The kernel's twin of this file is csrc/cpu/closed_forms.inl and csrc/cpu/sigmoid_bce.inl.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks
from .._call import Call

FORMS = (
    "none",
    "seesaw",
    "equalization",
    "arcface",
    "sigmoid",
    "cloud",
    "vmf",
)  # the index is the code of csrc/cpu/adjusted_ce.h
DRAWING = ("equalization", "cloud")  # random numbers that are counted by row
# The tables that a form takes, beside the class weight.
TAKES = {
    "seesaw": (),
    "equalization": (),
    "arcface": ("row_scale",),
    "sigmoid": ("shift", "scale"),
    "cloud": ("row_scale", "margin"),
    "vmf": ("shift",),
}
NO_LABEL_SMOOTHING = {
    "equalization": "a masked class has probability 0, and a smoothed label would make the loss infinite",
    "sigmoid": "each class has its own binary cross-entropy, and smoothing of one-hot labels is not defined for it",
}


class Term(NamedTuple):
    """A closed form: its name, and what it is made of. Built by the builders of `ltkernels.adjustments`.

    form: ``"seesaw"``, ``"equalization"``, ``"arcface"``, ``"sigmoid"``, ``"cloud"`` or ``"vmf"``.
    table: (C,) float32, by form: log counts; 1 for classes that may be masked; none; factor of a class as a negative, or (2, C): as a
        negative and as a positive; size of a class' noise; kappa.
    seed: (1,) int64 for ``"equalization"`` and ``"cloud"``; None draws one from torch's generator at each call.
    options: three numbers, by form: p, q, log eps; probability of the mask; cos m, sin m, 1 for the straight-through gradient; the
        probability from which on a negative counts (0: always), and what a call says of the table's rows; none; number of features, tau.
    """

    form: str
    table: Tensor | None = None
    seed: Tensor | None = None
    options: tuple[float, ...] = (0.0, 0.0, 0.0)


def own_seed(seed: int | None) -> Tensor | None:
    """`Term.seed` of a builder's argument."""
    if seed is None:
        return None
    word = _checks.seed(seed)
    return torch.tensor([word - 2**64 if word >= 2**63 else word], device="cpu")  # the same 64 bits


class ClosedForm(NamedTuple):
    """A loss with a closed-form term: ``adjusted_cross_entropy(logits, target, **closed_form._asdict())`` is the loss."""

    term: Term
    row_scale: Tensor | None = None
    margin: Tensor | None = None
    weight: Tensor | None = None
    focal_gamma: float = 0.0
    shift: Tensor | None = None
    scale: Tensor | None = None


def of(call: Call) -> Term | None:
    """The closed form of a checked call; None where it has none."""
    return Term(FORMS[call.form], call.table, call.seed, call.form_options) if call.form else None


def mix32(x: Tensor) -> Tensor:
    """lowbias32 of Chris Wellons' hash prospector on int64 tensors that hold 32-bit words."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _draws(seed: Tensor, rows: int, classes: int) -> Tensor:
    """(rows, classes) 32-bit words in int64: ``mix(mix(class + 0x9e3779b9) ^ row_key)`` with ``row_key = mix(mix(mix(low half of seed) ^
    high half) ^ row)``."""
    word = 0xFFFFFFFF
    seed_key = mix32(mix32(seed & word) ^ ((seed >> 32) & word))
    row_key = mix32(seed_key ^ (torch.arange(rows, device=seed.device) & word))
    class_key = mix32((torch.arange(classes, device=seed.device) + 0x9E3779B9) & word)
    return mix32(class_key ^ row_key.unsqueeze(1))


def equalization_mask(seed: Tensor, rows: int, classes: int, probability: float) -> Tensor:
    """(rows, classes) bool, True with the given probability: the first 24 bits of the draw, over 2^24, are below it."""
    return (_draws(seed, rows, classes) >> 8) < round(probability * 2**24)


def cloud_sizes(seed: Tensor, rows: int, classes: int) -> Tensor:
    """(rows, classes) float64 sizes ``|z| / 3``, at most 1, of normal numbers z, by Box and Muller's formula: ``|z| = sqrt(-2 log u) sin(pi
    v / 2)``, u in (0, 1] of the draw's first 24 bits and v in [0, 1) of those of the draw's own hash."""
    first = _draws(seed, rows, classes)
    second = mix32((first + 0x9E3779B9) & 0xFFFFFFFF)
    u, v = ((first >> 8) + 1).double() / 2**24, (second >> 8).double() / 2**24
    return (torch.sqrt(-2 * torch.log(u)) * torch.sin(math.pi / 2 * v) / 3).clamp(max=1)


def add_term(a: Tensor, z: Tensor, labels: Tensor, term: Term) -> Tensor:
    """The adjusted logits (N, C) with the term of Seesaw, softmax equalization or the cloud, constant for autograd."""
    at = labels.unsqueeze(1)
    if term.form == "seesaw":
        p, q, log_eps = term.options
        log_p = torch.log_softmax(z.detach(), dim=1)
        own = log_p.gather(1, at).clamp(min=log_eps)
        assert term.table is not None
        counts = term.table
        rarer = (counts - counts[at]).clamp(max=0)
        # A masked class (-inf) stays masked, whatever the label's probability.
        ahead = (log_p - own).clamp(min=0)
        return a + (p * rarer + q * ahead)
    assert term.seed is not None
    rows, classes = z.shape
    if term.form == "cloud":
        assert term.table is not None
        return a - cloud_sizes(term.seed, rows, classes).to(a.dtype) * term.table
    mask = equalization_mask(term.seed, rows, classes, term.options[0]) & (term.table != 0)
    return a.masked_fill(mask.scatter(1, at, False), -torch.inf)


def arcface_logit(c: Tensor, term: Term) -> Tensor:
    """cos(theta + m) of cosines (N,), with the gradient that the term chooses."""
    cos_m, sin_m, straight = term.options
    sine2, floor = 1 - c * c, 1e-3
    if c.dtype == torch.float64:  # tells smaller angles apart, where the difference above would keep few digits
        sine2, floor = torch.where(sine2 < 1e-6, (1 - c) * (1 + c), sine2), 1e-7
    safe = sine2.clamp(min=floor**2).sqrt()
    exact = c * cos_m - safe * sin_m
    at_tip = (c * cos_m - sine2.clamp(min=0).sqrt() * sin_m).detach()
    tip = at_tip + (c - c.detach()) * (cos_m + c / floor * sin_m).detach()
    beyond = c - math.atan2(sin_m, cos_m) * sin_m
    value = torch.where(c <= -cos_m, beyond, torch.where(sine2 > floor**2, exact, tip))
    return c + (value - c).detach() if straight else value


def vmf_constants(kappa: Tensor, features: float) -> Tensor:
    """What the kernel of the von Mises-Fisher form reads of each class: (3, C) float64 kappa, sqrt(1 + x^2) and log S."""
    kappa = kappa.double()
    nu = features / 2 - 1
    root = (1 + (kappa / nu) ** 2).sqrt()
    return torch.stack([kappa, root, torch.log1p(_series(1 / root, nu))])


def _series(t: Tensor, nu: float) -> Tensor:
    """S - 1 of Debye's expansion: `ltkernels.adjustments.vmf`."""
    x = t * t
    u1 = (3 - 5 * x) / 24
    u2 = (81 + x * (-462 + x * 385)) / 1152
    u3 = (30375 + x * (-369603 + x * (765765 - x * 425425))) / 414720
    return t * (u1 / nu + t * (u2 / nu**2 + t * u3 / nu**3))


def vmf_logits(cosine: Tensor, term: Term) -> Tensor:
    """ProCo's logits (N, C) of cosines, differentiable in them; `term` is that of a checked call."""
    assert term.table is not None
    features, tau, _ = term.options
    nu = features / 2 - 1
    kappa, root, log_series = term.table.unflatten(0, (3, -1))
    d2 = (1 / tau**2 + 2 / tau * kappa * cosine) / nu**2
    st = (root * root + d2).clamp(min=1).sqrt()
    ds = d2 / (st + root)
    g = nu * (ds - torch.log1p(ds / (1 + root))) - torch.log1p(ds / root) / 2
    found: Tensor = g + (torch.log1p(_series(1 / st, nu)) - log_series)
    return found


def sigmoid_rows(a: Tensor, labels: Tensor, weight: Tensor | None, focal_gamma: float | Tensor, term: Term) -> Tensor:
    """Row losses (N,) of the sigmoid family for one label a row, from logits that are scaled and shifted."""
    at = labels.unsqueeze(1)
    x = a * torch.ones_like(a).scatter(1, at, -1.0)
    each = -F.logsigmoid(-x)  # softplus(x): the class' binary cross-entropy
    if isinstance(focal_gamma, Tensor) or focal_gamma != 0.0:
        each = torch.exp(focal_gamma * F.logsigmoid(x)) * each
    theta, both, _ = term.options
    if term.table is not None:
        negative, positive = term.table.unflatten(0, (2, -1)) if both else (term.table, None)
        own = torch.ones_like(at, dtype=a.dtype) if positive is None else positive[at]
        each = each * negative.expand_as(a).scatter(1, at, own)
    if theta > 0.0:
        rare = (a.detach() < math.log(theta / (1 - theta))).scatter(1, at, False)
        each = torch.where(rare, 0, each)
    row = each.sum(dim=1)
    return row if weight is None else row * weight[labels]
