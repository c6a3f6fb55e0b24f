"""Promise: sampled negatives are drawn uniformly, by counter, beside every class of the batch; the correction is unbiased; rate 1 is exact.

That the loss of a draw and its gradients are what `NegativeSampling` says, on 1 to 4 processes, is tested in sharded_program.py.
"""

from __future__ import annotations

import math

import pytest
import torch

import ltkernels as ltk
from ltkernels.distributed import NegativeSampling, _sampling

PART, START = 40, 1000
LABELS = torch.tensor([1003, 1003, 1017, 5, 2000, -100, 1039])
POSITIVES = [3, 17, 39]


def draw(rate=0.3, step=0, seed=0, correct=True, labels=LABELS, start=START, part=PART):
    return _sampling.draw(NegativeSampling(rate, step, seed, correct), [labels], start, part)


@pytest.mark.parametrize("correct", [True, False])
def test_labels_of_the_batch_are_always_kept(correct) -> None:
    for step in range(50):
        kept = draw(step=step, correct=correct)
        assert kept.classes[: kept.labels].tolist() == POSITIVES
        assert len(kept.classes) == len(set(kept.classes.tolist())) == math.ceil(0.3 * PART)
        assert kept.classes.min() >= 0
        assert kept.classes.max() < PART
        assert kept.place[POSITIVES].tolist() == [0, 1, 2]
        assert (kept.place >= 0).sum() == 3
        assert kept.factor == (37 / 9 if correct else 1.0)


def test_more_labels_than_the_rate_allows() -> None:
    labels = torch.arange(START, START + 30)
    paper, corrected = draw(labels=labels, correct=False), draw(labels=labels)
    assert paper.classes.tolist() == list(range(30))
    assert len(corrected.classes) == 30 + 6
    assert corrected.factor == 10 / 6
    assert draw(labels=torch.arange(START, START + PART)) is None


def test_uniform() -> None:
    """Chi squared of how often each class, and each pair of neighbours, is drawn."""
    steps = 4000
    drawn = torch.zeros(steps, PART, dtype=torch.float64)
    for step in range(steps):
        kept = draw(step=step, seed=7)
        drawn[step, kept.classes[kept.labels :]] = 1
    others = [j for j in range(PART) if j not in POSITIVES]
    p = 9 / 37
    counts = drawn[:, others].sum(dim=0)
    # A draw without replacement: the counts' covariance has one eigenvalue, p (1 - p) 37 / 36, on what sums to 0.
    chi2 = ((counts - steps * p) ** 2).sum() / (steps * p * (1 - p) * 37 / 36)
    assert 36 - 4 * 72**0.5 < chi2 < 36 + 5 * 72**0.5
    both = (drawn[:, others][:, 1:] * drawn[:, others][:, :-1]).mean(dim=0)
    pair = 9 * 8 / (37 * 36)
    assert (both - pair).abs().max() < 5 * (pair * (1 - pair) / steps) ** 0.5
    again = (drawn[1:] * drawn[:-1])[:, others].mean()  # successive steps are independent
    assert abs(again - p * p) < 5 * p / (steps * len(others)) ** 0.5


def test_a_function_of_seed_step_and_class_alone() -> None:
    first = draw(step=12, seed=3)
    torch.manual_seed(99)
    assert torch.equal(draw(step=12, seed=3).classes, first.classes)
    for other in (
        draw(step=13, seed=3),
        draw(step=12, seed=4),
        draw(step=12 << 32, seed=3),
        draw(step=12, seed=3 << 32),
    ):
        assert not torch.equal(other.classes, first.classes)
    shifted = draw(step=12, seed=3, start=START + PART, labels=LABELS + PART)  # another rank draws otherwise
    assert not torch.equal(shifted.classes, first.classes)


def test_the_correction_is_unbiased() -> None:
    """Of the sum of exp, over many draws, within five standard errors; and the plain sum is far below."""
    values = torch.randn(PART, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    estimates, plain = [], []
    for step in range(3000):
        kept = draw(step=step, seed=1)
        times = torch.full((len(kept.classes),), kept.factor, dtype=torch.float64)
        times[: kept.labels] = 1
        estimates.append(float((values[kept.classes] * times).sum()))
        plain.append(float(values[kept.classes].sum()))
    estimates, plain = torch.tensor(estimates), torch.tensor(plain)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - values.sum()) < 5 * error
    assert plain.mean() < 0.6 * values.sum()


@pytest.fixture
def _one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def call(sampling, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=generator).requires_grad_()
    w = torch.randn(200, 8, generator=generator).requires_grad_()
    y = torch.randint(0, 200, (16,), generator=generator)
    loss = ltk.distributed.sharded_linear_adjusted_cross_entropy(
        x, w, y, class_start=0, num_classes=200, sampling=sampling, **options
    )
    loss.backward()
    return loss.detach(), x.grad, w.grad


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("options", [{}, {"normalize": True, "label_smoothing": 0.1, "scale": torch.full((200,), 8.0)}])
def test_rate_1_is_exact_to_the_bit(options) -> None:
    for ours, exact in zip(call(NegativeSampling(1.0, step=5), **options), call(None, **options)):
        assert torch.equal(ours, exact)


@pytest.mark.usefixtures("_one_process")
def test_tends_to_the_exact_loss() -> None:
    """The mean over draws: corrected within a few percent, the paper's loss below by about the log of the rate."""
    exact = float(call(None)[0])
    means = {
        correct: sum(float(call(NegativeSampling(0.5, step, correct=correct))[0]) for step in range(40)) / 40
        for correct in (True, False)
    }
    assert abs(means[True] - exact) < 0.05 * exact
    assert means[False] < exact - 0.4
