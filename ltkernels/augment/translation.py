"""M2m: majority samples moved by a few gradient steps until a classifier takes them for a minority class.

Kim, Jeong and Shin 2020, "M2m: Imbalanced Classification via Major-to-minor Translation" (arXiv:2004.00431), section 3.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltkernels import _checks
from ltkernels.augment import _draws
from ltkernels.augment._draws import Generator

Model = Callable[[Tensor], Tensor]


class Translated(NamedTuple):
    """`samples` (n, ...), row i of class targets[i]; `accepted` (n,) bool: translated, or else a real sample of the
    class; `sources` (n,) int64: the row of the input that it was made from, or that it is."""

    samples: Tensor
    accepted: Tensor
    sources: Tensor


def m2m(
    samples: Tensor,
    labels: Tensor,
    targets: Tensor,
    class_counts: _checks.ClassCounts,
    *,
    translator: Model,
    classifier: Model | None = None,
    beta: float = 0.999,
    steps: int = 10,
    step_size: float = 0.1,
    repulsion: float = 0.5,
    confidence: float = 0.9,
    noise: float = 0.5,
    low: float | None = None,
    high: float | None = None,
    generator: Generator = None,
) -> Translated:
    """A sample of class targets[i] for each i, translated from a sample of a more frequent class.

    For a target class k, a source class j with N_j > N_k is drawn with probability proportional to
    1 - beta^(N_j - N_k), and one of its samples uniformly. From x0 plus noise of L2 norm `noise`, `steps` steps of L2
    length `step_size` descend L(g(x), k) + repulsion * f_j(x), with g the translator, f the logits of the classifier in
    training and L cross-entropy. The result is accepted where g gives class k at least `confidence`; otherwise, and
    where no class is more frequent, a random real sample of class k takes its place, as in the paper.

    Args:
        samples: (m, ...) floating images or features; labels: (m,) int64.
        targets: (n,) int64, the class wanted for each new sample.
        class_counts: (C,) integers.
        translator: g, a classifier trained before on the imbalanced data; classifier: f, or None for the translator.
            Modules run in evaluation mode, and their mode and gradients are left as they were.
        beta: in [0, 1); larger prefers classes that are more frequent by more samples.
        low, high: range that every step clamps to (0 and 1 for images in that range); None leaves a side open.
        generator: of any device; None is the global CPU generator.

    Returns:
        `Translated`. Raises TypeError or ValueError naming the argument.
    """
    _draws.check_floating(samples, "samples")
    _draws.check_labels(labels, len(samples), "labels")
    _draws.check_labels(targets, len(targets), "targets")
    counts = _checks.class_counts(class_counts, "ignore")
    beta = _checks.number("beta", beta, low=0.0)
    if beta >= 1:
        raise ValueError(f"beta is {beta}; it must be below 1")
    if steps < 1 or len(targets) == 0:
        raise ValueError(f"steps ({steps}) and the number of targets ({len(targets)}) must be at least 1")
    step_size = _checks.number("step_size", step_size, above=0.0)
    noise = _checks.number("noise", noise, low=0.0)
    repulsion = _checks.number("repulsion", repulsion, low=0.0)
    confidence = _checks.number("confidence", confidence, low=0.0, high=1.0)

    sources, movable = _sources(labels, targets, counts.n.masked_fill(counts.empty, 0.0), beta, generator)
    x0 = samples[sources]
    if noise > 0:
        device = _draws.device_of(generator)
        direction = torch.randn(x0.shape, generator=generator, device=device, dtype=torch.float32).to(x0)
        x0 = _clamped(x0 + noise * _unit(direction), low, high)
    with ExitStack() as stack:
        for model in (translator, classifier):
            if isinstance(model, nn.Module):
                stack.enter_context(_evaluating(model))
        moved, probability = _descend(
            x0, targets, labels[sources], translator, classifier or translator, steps, step_size, repulsion, (low, high)
        )
    accepted = movable & (probability >= confidence)
    real = _real(labels, targets, generator)
    shape = (-1, *[1] * (samples.dim() - 1))
    chosen = torch.where(accepted.view(shape), moved, samples[real])
    return Translated(chosen, accepted, torch.where(accepted, sources, real))


def source_probabilities(counts: Tensor, target: int, beta: float) -> Tensor:
    """(C,) float64: how likely class j is the source for class `target`; all 0 where no class is more frequent."""
    weight = 1 - torch.as_tensor(beta, dtype=torch.float64) ** (counts.double() - counts[target]).clamp_min(0)
    return weight / weight.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _sources(
    labels: Tensor, targets: Tensor, counts: Tensor, beta: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """(n,) rows of `labels` to start from, and (n,) bool: whether a more frequent class was there to draw from."""
    present = torch.bincount(labels, minlength=len(counts)).cpu()
    sources = torch.zeros_like(targets)
    movable = torch.zeros_like(targets, dtype=torch.bool)
    for target in targets.unique().tolist():
        if not 0 <= target < len(counts):
            raise ValueError(f"targets holds class {target}; there are {len(counts)} classes")
        places = (targets == target).nonzero().flatten()
        share = source_probabilities(counts, target, beta) * (present > 0)
        if not float(share.sum()) > 0:
            continue
        # A sample's weight: its class's share over the class's samples at hand.
        weights = (share / present.clamp_min(1)).to(labels.device)[labels].to(_draws.device_of(generator))
        drawn = torch.multinomial(weights, len(places), replacement=True, generator=generator)
        sources[places] = drawn.to(sources.device)
        movable[places] = True
    return sources, movable


def _real(labels: Tensor, targets: Tensor, generator: Generator) -> Tensor:
    """(n,) rows of random samples of the target classes."""
    rows = torch.empty_like(targets)
    for target in targets.unique().tolist():
        own = _draws.members(labels, target)
        places = (targets == target).nonzero().flatten()
        rows[places] = own[_draws.integers(len(own), len(places), generator).to(own.device)]
    return rows


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their L2 norm; a zero row stays zero."""
    norm: Tensor = x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return x / norm.view(-1, *[1] * (x.dim() - 1))


def _clamped(x: Tensor, low: float | None, high: float | None) -> Tensor:
    return x if low is None and high is None else x.clamp(low, high)


def _descend(
    x: Tensor,
    targets: Tensor,
    source_classes: Tensor,
    translator: Model,
    classifier: Model,
    steps: int,
    step_size: float,
    repulsion: float,
    bounds: tuple[float | None, float | None],
) -> tuple[Tensor, Tensor]:
    """The moved samples, and the translator's probability of their targets."""
    for _ in range(steps):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = translator(x)
            other = logits if classifier is translator else classifier(x)
            repelled = other.gather(1, source_classes[:, None]).sum()
            objective = F.cross_entropy(logits, targets, reduction="sum") + repulsion * repelled
            (gradient,) = torch.autograd.grad(objective, x)
        x = _clamped(x.detach() - step_size * _unit(gradient), *bounds)
    with torch.no_grad():
        return x, translator(x).softmax(1).gather(1, targets[:, None])[:, 0]


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
