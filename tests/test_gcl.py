"""Promise: GCL's noise is half-normal, of each row and class its own, the same in forward, backward and reference; values of the paper's
formula; balanced counts have none."""

from __future__ import annotations

import math

import contract
import pytest
import torch
from contract import CLASSES, COUNTS

import ltkernels as ltk
from ltkernels.losses import _terms

SEED = 0x123456789ABCDEF0


def call(z, y, counts=COUNTS, seed=SEED, m=0.1, noise=0.5, s=30.0, **common):
    built = ltk.adjustments.gcl(counts, s=s, noise=noise, m=m, seed=seed, table_dtype=torch.float64)
    return contract.with_tables(built, z, y, **common)


def mix(x: int) -> int:
    """lowbias32, in Python integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def size(seed: int, row: int, column: int) -> float:
    key = mix(mix(mix(seed % 2**32) ^ (seed >> 32) % 2**32) ^ row)
    first = mix(mix((column + 0x9E3779B9) % 2**32) ^ key)
    second = mix((first + 0x9E3779B9) % 2**32)
    u, v = ((first >> 8) + 1) / 2**24, (second >> 8) / 2**24
    return min(math.sqrt(-2 * math.log(u)) * math.sin(math.pi / 2 * v) / 3, 1.0)


def rarity(counts) -> list[float]:
    top, span = math.log(max(counts)), math.log(max(counts)) - math.log(min(counts))
    return [(top - math.log(n)) / span for n in counts]


def reference(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    losses, grads, sizes = torch.zeros(len(z)).double(), torch.zeros_like(z), torch.zeros(len(z)).double()
    for i in range(len(z)):
        label = int(y[i])
        a = [
            30 * (float(c) - 0.1 * (j == label) - 0.5 * size(SEED, i, j) * rare)
            for j, (c, rare) in enumerate(zip(z[i], rarity(COUNTS)))
        ]
        top = max(a)
        e = [math.exp(x - top) for x in a]
        others = sum(x for j, x in enumerate(e) if j != label)
        losses[i] = (
            math.log(others + e[label]) - (a[label] - top) if others > e[label] else math.log1p(others / e[label])
        )
        grads[i] = 30 * torch.tensor(e, dtype=torch.float64) / (others + e[label])
        grads[i, label] = -30 * others / (others + e[label])
        sizes[i] = max(abs(x) for x in a if math.isfinite(x))
    return losses, grads, sizes


@pytest.mark.parametrize("reduction", contract.REDUCTIONS)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_values(dtype, reduction) -> None:
    z, y = contract.cosines(9, CLASSES), contract.labels(9, CLASSES)
    contract.check_values(call, reference, z, y, dtype, reduction)
    weight = torch.linspace(0.2, 2, CLASSES)
    weighted = lambda z, y, **common: call(z, y, weight=weight, **common)  # noqa: E731
    contract.check_values(weighted, reference, z, y, dtype, reduction, weight)


def test_contract() -> None:
    z, y = contract.cosines(8, CLASSES), contract.labels(8, CLASSES)
    contract.check_autograd(call, z, y)
    contract.check_backends_and_targets(call, z, y)
    contract.check_threads(call, torch.rand(300, CLASSES), torch.arange(300) % CLASSES)
    contract.check_ignored_and_nan(call, torch.rand(4, CLASSES, dtype=torch.float64), torch.arange(4))
    contract.check_operator(_terms.FORMS.index("cloud"), torch.ones(5), torch.tensor([7]), [0.0, 0.0, 0.0])


def test_published_formula() -> None:
    """Counts (6, 3, 1), cosines (.8, .5, .2), noise (.3, .6, .9) of a largest 1."""
    built = ltk.adjustments.gcl([6, 3, 1], s=30.0, noise=0.5, table_dtype=torch.float64)
    assert (built.term.table / 0.5).tolist() == pytest.approx([0.0, 0.386853, 1.0], abs=1e-6)
    assert built.margin is None
    cosines = torch.tensor([[0.8, 0.5, 0.2]], dtype=torch.float64)
    drawn = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    a = built.row_scale * (cosines - built.term.table * drawn)
    assert a[0].tolist() == pytest.approx([24.0, 11.518325, -7.5], abs=1e-6)
    loss = ltk.functional.adjusted_cross_entropy(
        cosines, torch.tensor([2]), row_scale=built.row_scale, shift=-built.term.table * drawn
    )
    assert loss.item() == pytest.approx(31.500004, abs=1e-6)
    stage2 = ltk.adjustments.gcl([6, 3, 1], s=20.0, m=0.1)
    assert stage2.margin.tolist() == pytest.approx([0.1] * 3)


def test_balanced_counts_have_no_noise() -> None:
    z, y = torch.rand(6, 4, dtype=torch.float64), torch.arange(6) % 4
    plain = torch.nn.functional.cross_entropy(30 * z, y)
    assert torch.equal(ltk.adjustments.gcl([7] * 4).term.table, torch.zeros(4))
    assert call(z, y, counts=[7] * 4, m=0.0).item() == pytest.approx(plain.item(), rel=1e-13)
    assert call(z, y, counts=[9, 1, 5, 3], m=0.0, noise=0.0).item() == pytest.approx(plain.item(), rel=1e-13)
    assert ltk.adjustments.gcl([4, 0, 1], noise=1.0, empty="ignore").term.table.tolist() == [0.0, 1.0, 1.0]


def noise(rows: int, classes: int, dtype: torch.dtype = torch.float32, seed: int | None = SEED) -> torch.Tensor:
    """What the kernel subtracts, read off row losses: of two classes, the first without noise, log(e^loss - 1) is the difference."""
    term = _terms.Term("cloud", torch.ones(classes, dtype=dtype), None if seed is None else torch.tensor([seed]))
    found = torch.empty(rows, classes, dtype=torch.float64)
    for j in range(classes):
        z = torch.full((rows, classes), -torch.inf, dtype=dtype)
        z[:, j] = z[:, (j + 1) % classes] = 0.0
        # Without its own noise the other would need one more unknown: its table entry is 0.
        one = term._replace(table=torch.zeros(classes, dtype=dtype).index_fill(0, torch.tensor(j), 1.0))
        loss = ltk.functional.adjusted_cross_entropy(z, torch.full((rows,), j), term=one, reduction="none")
        found[:, j] = torch.log(torch.expm1(loss.double()))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)], ids=str)
def test_the_kernel_draws_what_the_formula_says(dtype, tolerance) -> None:
    expected = torch.tensor([[size(SEED, i, j) for j in range(40)] for i in range(50)], dtype=torch.float64)
    assert (_terms.cloud_sizes(torch.tensor([SEED]), 50, 40) - expected).abs().max() < 1e-14
    assert (noise(50, 40, dtype) - expected).abs().max() < tolerance
    assert (expected == 1).sum() < 20


def test_noise_is_half_normal_and_independent() -> None:
    drawn = _terms.cloud_sizes(torch.tensor([5]), 2000, 200) * 3
    n = drawn.numel()
    for bound in (0.1, 0.5, 1.0, 2.0, 2.9):
        p = math.erf(bound / math.sqrt(2))
        assert (drawn < bound).double().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))
    assert (drawn == 3).double().mean().item() == pytest.approx(
        1 - math.erf(3 / math.sqrt(2)), abs=4 * 0.052 / math.sqrt(n)
    )
    unit = (drawn - drawn.mean()) / drawn.std()
    for shifted in (unit[1:] * unit[:-1], unit[:, 1:] * unit[:, :-1], unit[2:, 2:] * unit[:-2, :-2]):
        assert shifted.mean().abs() < 4 / math.sqrt(n)
    assert drawn.mean(0).std() < 3 / math.sqrt(2000)


def test_seeds() -> None:
    z, y = torch.rand(20, CLASSES), torch.arange(20) % CLASSES
    torch.manual_seed(3)
    one, two = (call(z, y, seed=None) for _ in range(2))
    assert one != two
    torch.manual_seed(3)
    assert torch.equal(call(z, y, seed=None), one)
    assert torch.equal(call(z, y, seed=11), call(z, y, seed=11))
    assert call(z, y, seed=11) != call(z, y, seed=11 + 2**32)
    rows = call(z, y, seed=11, reduction="none")
    assert torch.equal(call(z[:5], y[:5], seed=11, reduction="none"), rows[:5]), "the row's number decides"


def test_permutation() -> None:
    """The class id decides a number's noise, the count its size: with the noise added beforehand, classes may change places."""
    z, y = torch.rand(6, 4, dtype=torch.float64), torch.arange(6) % 4
    order, counts = torch.tensor([2, 0, 3, 1]), [9, 3, 5, 1]
    rank = torch.argsort(order)
    drawn = _terms.cloud_sizes(torch.tensor([SEED]), 6, 4)
    values = []
    for at, of in ((torch.arange(4), y), (order, rank[y])):
        own = [counts[k] for k in at.tolist()]
        table = ltk.adjustments.gcl(own, table_dtype=torch.float64).term.table
        values.append(call(z[:, at] + drawn * table, of, counts=own, m=0.0).item())
        assert call(z[:, at], of, counts=own, m=0.0).item() != pytest.approx(values[-1], rel=1e-3)
    plain = torch.nn.functional.cross_entropy(30 * z, y).item()
    assert values == pytest.approx([plain, plain], rel=1e-12)


def test_module() -> None:
    loss = ltk.nn.GCL(COUNTS, noise=0.4, seed=1)
    z = torch.rand(50, CLASSES, requires_grad=True)
    y = torch.arange(50) % CLASSES
    value = loss(z, y)
    value.backward()
    drawn = _terms.cloud_sizes(torch.tensor([1]), 50, CLASSES) * loss.term_table.double()
    expected = torch.nn.functional.cross_entropy(30 * (z.detach().double() - drawn), y)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    blend = loss(z, (y, y.flip(0), 0.3)).item()
    assert blend == pytest.approx((0.3 * loss(z, y) + 0.7 * loss(z, y.flip(0))).item(), rel=1e-5)
    anew = ltk.nn.GCL(COUNTS)
    assert anew(z, y) != anew(z, y)
    step = torch.compile(anew, fullgraph=True, backend="aot_eager")
    assert step(z, y) != step(z, y)


def test_explain() -> None:
    loss, z, y = ltk.nn.GCL(COUNTS, seed=1), torch.rand(5, CLASSES), torch.arange(5)
    assert ltk.explain(loss, z, y).backend.startswith("cpu-")
    with pytest.raises(
        ValueError, match="backend='cuda' cannot serve this call: there is no CUDA kernel for the cloud"
    ):
        call(z, y, backend="cuda")


def test_the_head_holds_the_logits() -> None:
    loss = ltk.nn.GCL(COUNTS, seed=3)
    features, weight, y = torch.randn(12, 5), torch.randn(CLASSES, 5), torch.arange(12) % CLASSES
    held = loss.from_features(features, weight, y, normalize=True)
    logits = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(weight).T
    assert held.item() == pytest.approx(loss(logits, y).item(), rel=1e-5)
    with pytest.raises(ValueError, match="chunk_rows=4 is not possible: the cloud counts its random numbers by row"):
        loss.from_features(features, weight, y, normalize=True, chunk_rows=4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"s": 0.0}, ValueError, "s is 0.0"),
        ({"noise": -0.1}, ValueError, "noise is -0.1"),
        ({"m": math.nan}, ValueError, "m is nan"),
        ({"seed": 0.5}, TypeError, "seed is 0.5"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616; it must be an integer of 64 bits"),
    ],
)
def test_bad_input(options, error, message) -> None:
    with pytest.raises(error, match=message):
        ltk.nn.GCL(COUNTS, **options)
