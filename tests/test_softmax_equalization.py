"""Promise: softmax equalization masks tail classes at the stated rate, never the label; forward, backward and reference see one mask."""

from __future__ import annotations

import math

import contract
import pytest
import torch
from contract import CLASSES, COUNTS

import ltkernels as ltk

SEED = 0x123456789ABCDEF0
GAMMA = 0.6


def call(z, y, counts=COUNTS, gamma=GAMMA, seed=SEED, **common):
    built = ltk.adjustments.softmax_equalization(counts, gamma=gamma, tail_frequency=0.02, seed=seed)
    return contract.with_tables(built, z, y, **common)


def mix(x: int) -> int:
    """lowbias32, in Python integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def masked(seed: int, row: int, column: int, gamma: float) -> bool:
    key = mix(mix(mix(seed % 2**32) ^ (seed >> 32) % 2**32) ^ row)
    return mix(mix((column + 0x9E3779B9) % 2**32) ^ key) / 2**32 < gamma


def reference(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    losses, grads, size = torch.zeros(len(z)).double(), torch.zeros_like(z), torch.zeros(len(z)).double()
    for i in range(len(z)):
        label = int(y[i])
        kept = [
            j == label or COUNTS[j] / sum(COUNTS) >= 0.02 or not masked(SEED, i, j, GAMMA) for j in range(z.shape[1])
        ]
        a = [float(x) if keep else -math.inf for x, keep in zip(z[i], kept)]
        top = max(a)
        e = [math.exp(x - top) for x in a]
        others = sum(x for j, x in enumerate(e) if j != label)
        total = others + e[label]
        losses[i] = math.log1p(others / e[label])
        grads[i] = torch.tensor(e, dtype=torch.float64) / total
        grads[i, label] = -others / total
        size[i] = max(abs(x) for x in a if math.isfinite(x))
    return losses, grads, size


@pytest.mark.parametrize("reduction", contract.REDUCTIONS)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_values(dtype, reduction) -> None:
    z, y = contract.hostile_logits(9, CLASSES), contract.labels(9, CLASSES)
    contract.check_values(call, reference, z, y, dtype, reduction)
    weight = torch.linspace(0.2, 2, CLASSES)
    weighted = lambda z, y, **common: call(z, y, weight=weight, **common)  # noqa: E731
    contract.check_values(weighted, reference, z, y, dtype, reduction, weight)


def test_contract() -> None:
    z, y = contract.hostile_logits(8, CLASSES), contract.labels(8, CLASSES)
    contract.check_autograd(call, z, y)
    contract.check_backends_and_targets(call, z, y)
    contract.check_threads(call, torch.randn(300, CLASSES), torch.arange(300) % CLASSES)
    contract.check_ignored_and_nan(call, torch.randn(4, CLASSES, dtype=torch.float64), torch.arange(4))
    contract.check_operator(2, torch.ones(5), torch.tensor([7]), [0.5, 0.0, 0.0])


def test_permutation() -> None:
    """With gamma = 1 every tail class is masked; below, the class id itself decides."""
    z = torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.0, 1.0, -0.5, 0.125]], dtype=torch.float64)
    make = lambda counts: lambda z, y, **common: call(z, y, counts, gamma=1.0, **common)  # noqa: E731
    contract.check_permutation(make, z, [400, 100, 25, 6])


def gradient_mask(rows: int, counts: list[int], label: int, **options) -> torch.Tensor:
    """Which classes a batch of zeros leaves out: their gradient is exactly 0."""
    _, grad = contract.gradient(
        call, torch.zeros(rows, len(counts)), torch.full((rows,), label), counts=counts, **options
    )
    return grad == 0


def test_rate_and_independence() -> None:
    counts = [10**6, *[1] * 199]
    mask = gradient_mask(4000, counts, 5, gamma=0.9).double()
    assert mask[:, 0].sum() == 0, "a head class was masked"
    assert mask[:, 5].sum() == 0, "the label was masked"
    tail = mask[:, torch.arange(200) > 5]
    assert tail.mean().item() == pytest.approx(0.9, abs=0.001)  # 3 standard errors
    assert (tail.mean(0) - 0.9).abs().max() < 0.022
    assert (tail.mean(1) - 0.9).abs().max() < 0.1
    centred = (tail - 0.9) / 0.3
    assert (centred[1:] * centred[:-1]).mean().abs() < 0.004
    assert (centred[:, 1:] * centred[:, :-1]).mean().abs() < 0.004


def test_seeds() -> None:
    counts = [10**6, *[1] * 50]
    torch.manual_seed(3)
    one, two = (gradient_mask(20, counts, 0, seed=None) for _ in range(2))
    assert not torch.equal(one, two), "without a seed each call draws another mask"
    torch.manual_seed(3)
    assert torch.equal(gradient_mask(20, counts, 0, seed=None), one)
    assert torch.equal(gradient_mask(20, counts, 0, seed=11), gradient_mask(20, counts, 0, seed=11))
    assert not torch.equal(gradient_mask(20, counts, 0, seed=11), gradient_mask(20, counts, 0, seed=11 + 2**32))
    assert gradient_mask(20, counts, 0, seed=-1).any()


def test_gamma_ends() -> None:
    z, y = torch.randn(6, CLASSES, dtype=torch.float64), torch.arange(6)
    assert torch.allclose(call(z, y, gamma=0.0), torch.nn.functional.cross_entropy(z, y), rtol=1e-13)
    head = torch.tensor([n / sum(COUNTS) >= 0.02 for n in COUNTS])
    kept = head.expand(6, -1) | (torch.arange(CLASSES) == y[:, None])
    expected = torch.nn.functional.cross_entropy(z.masked_fill(~kept, -torch.inf), y)
    assert torch.allclose(call(z, y, gamma=1.0), expected, rtol=1e-13)


def test_default_tail() -> None:
    """0.3 / C: classes below 3e-3 of a hundred."""
    counts = [5000, *[100] * 98, 20]
    table = ltk.adjustments.softmax_equalization(counts).term.table
    assert table.tolist() == [0.0] * 99 + [1.0]
    assert ltk.adjustments.softmax_equalization([10, 0], empty="ignore").term.table.tolist() == [0.0, 1.0]


def test_module_draws_anew_and_compiles() -> None:
    loss = ltk.nn.SoftmaxEqualization(COUNTS, tail_frequency=0.02)
    z, y = torch.randn(50, CLASSES), torch.zeros(50, dtype=torch.int64)
    assert loss(z, y) != loss(z, y)
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert step(z, y) != step(z, y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": 1.5}, ValueError, "gamma is 1.5"),
        ({"tail_frequency": -0.1}, ValueError, "tail_frequency is -0.1"),
        ({"seed": 0.5}, TypeError, "seed is 0.5"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616; it must be an integer of 64 bits"),
    ],
)
def test_bad_input(options, error, message) -> None:
    with pytest.raises(error, match=message):
        ltk.nn.SoftmaxEqualization(COUNTS, **options)


def test_label_smoothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing is 0.1.*probability 0"):
        call(torch.zeros(1, CLASSES), torch.tensor([0]), label_smoothing=0.1)
