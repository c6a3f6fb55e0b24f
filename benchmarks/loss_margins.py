"""What the losses do to a boundary and to margins, as a picture for ltkernels/losses/README.md.

    python -m benchmarks.loss_margins --out benchmarks/results/loss-margins.png

Top: linear classifiers of two overlapping classes of 1000 and 20 samples, each trained to the end. Middle and bottom: by how much the
logit (the cosine) of a label with n samples must lead that of a class with 1000 for the loss of the pair to be that of a coin, log 2.
The leads are found on the losses themselves, by bisection.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

import ltkernels as ltk

COUNTS = [1000, *sorted({round(1000 / 100 ** (i / 40)) for i in range(41)}, reverse=True)]
HEAD_LOGIT, HEAD_COSINE = 2.0, 0.3
COLOURS = {
    "CrossEntropy": "#444444", "LogitAdjustedCrossEntropy": "#0072B2", "ClassBalanced": "#009E73", "Focal": "#CC79A7",
    "LogitAdjustedAdaptiveMargin": "#D55E00", "CDT": "#E69F00", "VectorScaling": "#882255",
    "CosFace": "#444444", "ArcFace": "#0072B2", "LDAM": "#D55E00", "KPS": "#009E73",
}  # fmt: skip
BOUNDARIES = {
    "CrossEntropy": {},
    "LogitAdjustedCrossEntropy": {},
    "ClassBalanced": {"beta": None, "reduction": "batch_mean"},
    "Focal": {},
}
LINEAR = ("CrossEntropy", "LogitAdjustedCrossEntropy", "LogitAdjustedAdaptiveMargin", "CDT", "VectorScaling")
COSINE = ("CosFace", "ArcFace", "LDAM", "KPS")


def samples(counts: tuple[int, int] = (1000, 20)) -> tuple[Tensor, Tensor]:
    """(n, 2) float64 points around (-1.5, 0) and (1.5, 0), and their labels."""
    y = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    x = torch.randn(len(y), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0] += 3.0 * y - 1.5
    return x, y


def boundary(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (2,) and bias of ``z_1 - z_0`` of a linear classifier trained with a loss, predicted as the loss says."""
    loss = getattr(ltk.nn, name)
    criterion = loss.make(torch.bincount(y).tolist(), **BOUNDARIES[name], table_dtype=torch.float64)
    line = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    optimizer = torch.optim.LBFGS([line], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = criterion(inputs @ line, y) + 1e-6 * line.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    found = (line[:, 1] - line[:, 0]).detach()
    return found[:2], found[2]


def lead(name: str) -> Tensor:
    """(C - 1,) what the label's logit needs over that of class 0, for every other class of `COUNTS` as the label."""
    loss = getattr(ltk.nn, name)
    criterion = loss.make(COUNTS, reduction="none", table_dtype=torch.float64)
    base = HEAD_COSINE if loss.logits == "cosine" else HEAD_LOGIT
    y = torch.arange(1, len(COUNTS))
    low = torch.zeros(len(y), dtype=torch.float64)
    high = torch.full_like(low, 1.0 - base if loss.logits == "cosine" else 50.0)
    for _ in range(60):
        middle = (low + high) / 2
        z = torch.full((len(y), len(COUNTS)), -torch.inf, dtype=torch.float64)
        z[:, 0] = base
        z[torch.arange(len(y)), y] = base + middle
        below = criterion(z, y) > math.log(2.0)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, *panels) = pyplot.subplots(3, 1, figsize=(6.2, 13.0), layout="constrained")  # readable on a phone
    x, y = samples()
    for label, colour, text in ((0, "0.75", "1000 samples"), (1, "#F0C040", "20 samples")):
        left.scatter(*x[y == label].T, s=9 if label == 0 else 22, color=colour, label=text)
    for name in BOUNDARIES:
        (a, b), c = boundary(name, x, y)
        height = torch.tensor([-3.6, 3.6], dtype=x.dtype)
        left.plot(-(b * height + c) / a, height, color=COLOURS[name], label=name)
    left.axvline(0.0, color="black", linewidth=1, linestyle=":", label="best for balanced tests")
    left.set(xlim=(-8.2, 4.6), ylim=(-3.6, 3.6), title="boundary after training, linear head", xticks=[], yticks=[])
    left.legend(loc="upper left", fontsize=9, framealpha=0.95)
    for axis, names, what in (
        (panels[0], LINEAR, f"lead of the label's logit over {HEAD_LOGIT:g}"),
        (panels[1], COSINE, f"lead of the label's cosine over {HEAD_COSINE:g}"),
    ):
        for name in names:
            axis.plot(COUNTS[1:], lead(name), color=COLOURS[name], label=name)
        axis.set(
            xscale="log", xlabel="samples of the label's class", ylabel=what, ylim=(-0.02 * axis.get_ylim()[1], None)
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    panels[0].set_title("linear heads")
    panels[1].set_title("cosine heads")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    draw(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
