"""Classifier and loss together, forward + backward on the CPU, against torch's own ways and pytorch-metric-learning.

    python -m benchmarks.heads --out benchmarks/results/heads-cpu.json

A cell is (head, B, D, C). `eager` is F.linear and F.cross_entropy; `chunked` is torch's F.linear_cross_entropy with its own choice of a
chunk, which is a few rows where C is large, and `chunked256` the same with a chunk of 256 rows. `peak_mb` is the largest allocation at
one time beyond the inputs, the gradients included. `ok` says that loss and gradients agreed with float64 before anything was timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

from . import harness

SHAPES = [(256, 256, 21841), (512, 512, 21841), (1024, 256, 21841), (1024, 256, 8142), (512, 512, 1000), (128, 64, 10)]
QUICK = [(512, 512, 1000), (128, 64, 10)]
HEADS = ("linear ce", "cosine ce", "cosface")
PEERS = ("eager", "chunked", "chunked256", "pytorch-metric-learning")
SCALE, MARGIN = 30.0, 0.35  # of the cosines
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def implementation(backend: str, head: str, width: int, classes: int) -> Loss | None:
    """(features, weight, target) -> loss; None where there is none."""
    if backend == "ours":
        options = {} if head == "linear ce" else {"normalize": True, "row_scale": torch.full((classes,), SCALE)}
        if head == "cosface":
            options["margin"] = torch.full((classes,), MARGIN)
        return lambda f, w, y: ltk.functional.linear_adjusted_cross_entropy(f, w, y, **options)
    if backend == "eager" and head == "cosface":

        def cosface(f: Tensor, w: Tensor, y: Tensor) -> Tensor:
            cosines = F.linear(F.normalize(f), F.normalize(w))
            return F.cross_entropy(SCALE * (cosines - MARGIN * F.one_hot(y, w.shape[0])), y)

        return cosface
    if head != "cosface" and (backend == "eager" or hasattr(torch.nn, "LinearCrossEntropyOptions")):  # torch 2.13

        def inputs_of(f: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            return (SCALE * F.normalize(f), F.normalize(w)) if head == "cosine ce" else (f, w)

        if backend == "eager":
            return lambda f, w, y: F.cross_entropy(F.linear(*inputs_of(f, w)), y)
        if backend in ("chunked", "chunked256"):
            chunk = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256 if backend == "chunked256" else None)
            return lambda f, w, y: F.linear_cross_entropy(*inputs_of(f, w), y, options=chunk)
    if backend == "pytorch-metric-learning" and head == "cosface":
        try:
            from pytorch_metric_learning.losses import CosFaceLoss
        except ImportError:
            return None
        theirs = CosFaceLoss(classes, width, margin=MARGIN, scale=SCALE)
        del theirs.W  # its own (D, C) parameter; ours is a view of the one that all share

        def metric_learning(f: Tensor, w: Tensor, y: Tensor) -> Tensor:
            theirs.W = w.t()
            theirs.cast_types = lambda dtype, device: None
            return theirs(f, y)

        return metric_learning
    return None


def inputs(rows: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, width, generator=generator, requires_grad=True)
    weight = (torch.randn(classes, width, generator=generator) / width**0.5).requires_grad_()
    return features, weight, torch.randint(0, classes, (rows,), generator=generator)


def agrees(loss: Loss, given: tuple[Tensor, Tensor, Tensor], head: str) -> bool:
    """Loss and gradients against float64 within 1e-4 of a row's largest entry; zeros would not pass."""
    *leaves, target = given
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = implementation("eager", head, leaves[1].shape[1], len(leaves[1]))(*exact, target)
    value = loss(*given)
    close = torch.allclose(value.double(), truth, rtol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(truth, exact)):
        largest = theirs.abs().amax(dim=1, keepdim=True)
        close &= bool(((ours - theirs).abs() <= 1e-4 * largest).all() and largest.max() > 0)
    return close


def step(loss: Loss, given: tuple[Tensor, Tensor, Tensor]) -> None:
    loss(*given).backward()
    for leaf in given[:2]:
        leaf.grad = None


def prepare(backend: str, cell: dict[str, Any]) -> harness.Prepared | None:
    loss = implementation(backend, cell["op"], cell["D"], cell["C"])
    if loss is None:
        return None
    given = inputs(cell["B"], cell["D"], cell["C"])
    served = ltk.explain(ltk.functional.linear_adjusted_cross_entropy, *given).backend if backend == "ours" else backend
    row = {"backend": served, "peak_mb": round(harness.peak_mb(lambda: step(loss, given)), 1)}
    return harness.Prepared([lambda: step(loss, given)], agrees(loss, given, cell["op"]), row)


def main(argv: list[str] | None = None) -> int:
    options = harness.parser("heads", __doc__, PEERS, quick="two small shapes").parse_args(argv)
    shapes = QUICK if options.quick else SHAPES
    cells = [{"op": head, "B": b, "C": c, "D": d} for b, d, c in shapes for head in HEADS]
    return harness.run(__spec__.name, options, prepare, cells)


if __name__ == "__main__":
    sys.exit(main())
