"""ProCo's loss of a batch of features, forward + backward on the CPU, against the published formulation.

    python -m benchmarks.proco --out benchmarks/results/proco-cpu.json

``published`` forms ``kappa_j mu_j + x_i / tau`` for every row and class, B x C x D numbers, and the logarithmic Bessel functions of their
norms by Miller's backward recurrence in float64, whose derivative is a ratio of two neighbours. ``closed form`` is ours in torch's
operations: Debye's expansion of the cosines. Statistics are no part of a call. `ok` says that loss and gradient agreed with the published
formulation in float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels.losses import _terms

from . import harness
from .losses import counts_of

SHAPES = [(256, 128, 100), (256, 128, 1000), (256, 1024, 1000)]
QUICK = [(32, 128, 100)]
PEERS = ("published", "closed form")
TAU = 0.1
Loss = Callable[[Tensor, Tensor], Tensor]


class LogBessel(torch.autograd.Function):
    """log I_order(x) for an integer order, float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: int) -> Tensor:
        start = math.ceil(math.sqrt(order * order + 80 * float(x.max()))) + 20
        above, here = torch.zeros_like(x), torch.full_like(x, 1e-300)
        scale = torch.zeros_like(x)  # logarithm of what `here` was divided by
        log_order = next_order = torch.zeros_like(x)
        for k in range(start, 0, -1):
            above, here = here, 2 * k / x * here + above
            if k % 16 == 0:
                large = here > 1e100
                here, above = torch.where(large, here * 1e-100, here), torch.where(large, above * 1e-100, above)
                scale = torch.where(large, scale + 100 * math.log(10), scale)
            if k - 1 == order:
                log_order, next_order = here.log() + scale, above / here
        ctx.save_for_backward(x, next_order)
        ctx.order = order
        return torch.special.i0e(x).log() + x + log_order - (here.log() + scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        x, ratio = ctx.saved_tensors
        return upstream * (ratio + ctx.order / x), None


def log_normaliser(x: Tensor, width: int) -> Tensor:
    """-log C_p up to a constant."""
    order = width // 2 - 1
    x = x.double()
    return LogBessel.apply(x, order) - order * x.log()


def data(width: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Directions, concentrations of means of length 0.3 to 0.9, and log prior, float32."""
    generator = torch.Generator().manual_seed(1)
    mu = F.normalize(torch.randn(classes, width, generator=generator), dim=1)
    length = torch.linspace(0.3, 0.9, classes)
    n = torch.tensor(counts_of(classes), dtype=torch.float64)
    return mu, width * length / (1 - length**2), torch.log(n / n.sum()).float()


def implementation(backend: str, width: int, classes: int, dtype: torch.dtype = torch.float32) -> Loss:
    mu, kappa, prior = (each.to(dtype) for each in data(width, classes))
    if backend == "ours":
        term = ltk.adjustments.vmf(kappa, width, TAU).term
        head = ltk.functional.linear_adjusted_cross_entropy
        return lambda x, y: head(x, mu, y, normalize=True, shift=prior, term=term)
    if backend == "closed form":
        table = _terms.vmf_constants(kappa, width).reshape(-1).to(dtype)
        form = _terms.Term("vmf", table, None, (width, TAU, 0.0))
        return lambda x, y: F.cross_entropy(_terms.vmf_logits(F.normalize(x) @ mu.T, form) + prior, y)
    own = log_normaliser(kappa, width)

    def published(x: Tensor, y: Tensor) -> Tensor:
        whole = kappa[:, None] * mu + F.normalize(x)[:, None, :] / TAU
        return F.cross_entropy(log_normaliser(whole.norm(dim=2), width) - own + prior, y)

    return published


def inputs(rows: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator, requires_grad=True), torch.randint(
        0, classes, (rows,), generator=generator
    )


def step(loss: Loss, given: tuple[Tensor, Tensor]) -> None:
    given[0].grad = None
    loss(*given).backward()


def agrees(loss: Loss, given: tuple[Tensor, Tensor], classes: int) -> bool:
    """On eight rows, whose published formulation fits in memory in float64."""
    x, y = given[0].detach()[:8], given[1][:8]
    found = []
    for function, leaf in ((loss, x), (implementation("published", x.shape[1], classes, torch.float64), x.double())):
        leaf = leaf.clone().requires_grad_()
        value = function(leaf, y)
        found.append((value.detach().double(), torch.autograd.grad(value, leaf)[0].double()))
    (value, grad), (wanted, slopes) = found
    return bool((value - wanted).abs() <= 1e-4 * wanted.abs() and (grad - slopes).norm() <= 1e-3 * slopes.norm())


def prepare(backend: str, cell: dict[str, Any]) -> harness.Prepared:
    loss = implementation(backend, cell["D"], cell["C"])
    given = inputs(cell["B"], cell["D"], cell["C"])
    row = {"backend": backend}
    if backend == "ours":
        mu, kappa, _ = data(cell["D"], cell["C"])
        term = ltk.adjustments.vmf(kappa, cell["D"], TAU).term
        of_head = ltk.functional.linear_adjusted_cross_entropy
        row["backend"] = ltk.explain(of_head, given[0], mu, given[1], normalize=True, term=term).backend
    row["peak_mb"] = round(harness.peak_mb(lambda: step(loss, given)), 1)
    return harness.Prepared([lambda: step(loss, given)], agrees(loss, given, cell["C"]), row)


def main(argv: list[str] | None = None) -> int:
    options = harness.parser("proco", __doc__, PEERS, quick="one small shape").parse_args(argv)
    cells = [{"op": "proco", "B": b, "C": c, "D": d} for b, d, c in (QUICK if options.quick else SHAPES)]
    return harness.run(__spec__.name, options, prepare, cells)


if __name__ == "__main__":
    sys.exit(main())
