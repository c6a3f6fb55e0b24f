"""Promise: every loss equals the float64 oracle, value and gradient, for every dtype, reduction, layout and size.

tests/test_isa.py runs this file once for each instruction set.
"""

from __future__ import annotations

import oracle
import pytest
import torch

import ltkernels as ltk

DTYPES = list(oracle.TOLERANCES)
REDUCTIONS = ["mean", "batch_mean", "sum", "none"]
# One class, tails around every vector width (4, 8, 16 lanes), odd sizes, and around the kernel's block of 2048 columns.
SIZES = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 100, 365, 2047, 2048, 2049, 4100]
FIVE_VECTOR = [name for name, loss in ltk.LOSSES.items() if isinstance(loss.adjustment([2, 1]), ltk.Adjustment)]


def counts_of(classes: int) -> list[int]:
    """Long-tailed counts in shuffled class order."""
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(classes))
    return [int(max(2, 2000 * 0.01 ** (int(rank) / max(1, classes - 1)))) for rank in order]


def hostile_logits(rows: int, classes: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    """Ordinary, confident, shifted and masked rows."""
    generator = torch.Generator().manual_seed(seed + classes)
    z = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale
    z[0, classes // 2] += 40.0  # confident
    z[1] += 300.0  # a common offset
    if classes > 2:
        z[2, 1] = -torch.inf  # a masked class
    return z.to(dtype)


def labels_of(rows: int, classes: int) -> torch.Tensor:
    y = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(rows))
    y[0] = classes // 2
    y[2] = 0
    y[rows - 2] = -100
    return y


def check(z: torch.Tensor, y, upstream: float = 1.0, cond: float = 1.0, **options) -> None:
    """Runs the public function and compares loss and gradient with the oracle."""
    leaf = z.detach().requires_grad_()
    loss = ltk.functional.adjusted_cross_entropy(leaf, y, **options)
    up = torch.full_like(loss, upstream)
    if loss.dim():
        up = up * torch.linspace(0.5, 2.0, len(loss), dtype=loss.dtype)
    loss.backward(up)
    expected_loss, expected, size = oracle.adjusted_cross_entropy(z, y, upstream=up, **options)
    oracle.assert_loss(loss.detach(), expected_loss, size, z.dtype)
    assert leaf.grad.dtype == z.dtype
    oracle.assert_gradient(leaf.grad, expected, size, y if isinstance(y, torch.Tensor) else None, cond)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_numbers_of_the_specification(backend: str) -> None:
    """F1: the gradient of cross-entropy is the softmax less the label."""
    z, y = torch.tensor([[1, 0.5, -0.5]], dtype=torch.float64, requires_grad=True), torch.tensor([2])
    loss = ltk.functional.adjusted_cross_entropy(z, y, backend=backend)
    assert loss.item() == pytest.approx(2.104131, abs=1e-6)
    (slope,) = torch.autograd.grad(loss, z)
    assert slope[0].tolist() == pytest.approx([0.546549, 0.331499, 0.121952 - 1], abs=1e-6)
    assert ltk.nn.BalancedSoftmax([6, 3, 1], backend=backend)(z, y).item() == pytest.approx(3.584768, abs=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FIVE_VECTOR)
def test_every_loss(name: str, dtype: torch.dtype, reduction: str) -> None:
    classes = 37
    record = ltk.LOSSES[name]
    z = hostile_logits(12, classes, dtype, scale=0.3 if record.logits == "cosine" else 3.0)
    if record.logits == "cosine":
        z[1] -= 300.0
    tables = record.adjustment(counts_of(classes))._asdict()
    check(z, labels_of(12, classes), reduction=reduction, **tables)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", SIZES)
def test_every_size(classes: int, dtype: torch.dtype) -> None:
    z, y = hostile_logits(5, classes, dtype), labels_of(5, classes)
    adjustment = ltk.adjustments.vector_scaling(counts_of(classes))
    check(z, y, shift=adjustment.shift, scale=adjustment.scale)
    check(z, y)


@pytest.mark.parametrize("options", [{}, {"focal_gamma": 2.0}, {"focal_gamma": 0.5}, {"reduction": "none"}])
@pytest.mark.parametrize("classes", [2, 5, 10, 16, 40, 64])
@pytest.mark.parametrize("rows", [1, 3, 4, 15, 16, 17, 50])
def test_few_classes_many_rows(rows: int, classes: int, options: dict) -> None:
    """Short rows are handled several at a time."""
    adjustment = ltk.adjustments.kps(counts_of(classes), gradient_adjustment=True)
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(rows, classes, generator=generator)
    y = torch.randint(0, classes, (rows,), generator=generator)
    if rows > 2:
        y[1] = -100
    check(z, y, **{**adjustment._asdict(), **options})
    check(z.bfloat16(), y, weight=torch.rand(classes) + 0.5, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_label_smoothing(dtype: torch.dtype, label_smoothing: float, weighted: bool) -> None:
    classes = 21
    z, y = hostile_logits(9, classes, dtype), labels_of(9, classes)
    z[2, 1] = -1.0  # a masked class has an infinite smoothed loss, tested below
    options = {"margin": torch.rand(classes), "shift": torch.randn(classes), "row_scale": torch.rand(classes) + 0.5}
    if weighted:
        options["weight"] = torch.rand(classes) + 0.1
    # G P_j - c_j is a difference of two numbers of one size: its error is relative to the row.
    check(z, y, label_smoothing=label_smoothing, cond=2.0, **options)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0, 5.0])
def test_focal(gamma: float) -> None:
    z, y = hostile_logits(9, 11, torch.float32), labels_of(9, 11)
    check(z, y, focal_gamma=gamma, weight=torch.rand(11) + 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_lam", [False, True])
def test_mixed_targets(dtype: torch.dtype, row_lam: bool) -> None:
    classes, rows = 19, 8
    z = hostile_logits(rows, classes, dtype)
    first = labels_of(rows, classes)
    second = torch.arange(rows) % classes
    lam = torch.linspace(0, 1, rows, dtype=torch.float64).to(oracle_real(dtype)) if row_lam else torch.tensor(0.3)
    adjustment = ltk.adjustments.kps(counts_of(classes), gradient_adjustment=True)._asdict()
    adjustment["weight"] = torch.rand(classes) + 0.5
    lam = lam.to(oracle_real(dtype))
    # The two labels' gradients have opposite signs at each other's place.
    check(z, (first, second, lam), cond=2.0, **adjustment)


def oracle_real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["strided rows", "transposed", "expanded", "offset", "misaligned", "every other"])
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    rows, classes = 6, 35
    y = labels_of(rows, classes)
    base = hostile_logits(rows, classes, dtype)
    if layout == "strided rows":
        z = torch.cat([base, base], dim=1)[:, :classes]
    elif layout == "transposed":
        z = base.t().contiguous().t()
    elif layout == "expanded":
        z = base[:1].expand(rows, classes)
    elif layout == "offset":
        z = torch.cat([base, base])[rows - 1 : 2 * rows - 1]
    elif layout == "misaligned":
        z = torch.empty(rows * classes + 1, dtype=dtype)[1:].view(rows, classes).copy_(base)
    else:
        z = base.repeat_interleave(2, dim=1)[:, ::2]
    before = z.clone()
    check(z, y, scale=torch.rand(classes) + 0.5)
    assert torch.equal(z, before), "the logits were written to"
    leaf = z.detach().requires_grad_()
    ltk.functional.adjusted_cross_entropy(leaf, y).backward()
    same = before.detach().contiguous().requires_grad_()
    ltk.functional.adjusted_cross_entropy(same, y).backward()
    assert torch.equal(leaf.grad, same.grad)


@pytest.mark.parametrize("name", FIVE_VECTOR)
def test_permuting_class_ids_permutes_gradients_exactly(name: str) -> None:
    """Up to the order of a sum of four: the tables are exactly permuted, the probabilities to the last bit or two."""
    counts = [400, 100, 25, 6]
    z = torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.0, 1.0, -0.5, 0.125]])
    y = torch.tensor([2, 3])
    order = torch.tensor([3, 1, 0, 2])  # new class k is old class order[k]
    rank = torch.argsort(order)
    record = ltk.LOSSES[name]

    def gradient(z, y, counts):
        leaf = z.double().requires_grad_()
        record.make(counts)(leaf, y).backward()
        return leaf.grad

    one = gradient(z, y, counts)
    two = gradient(z[:, order], rank[y], [counts[k] for k in order.tolist()])
    assert torch.allclose(two, one[:, order], rtol=1e-14, atol=0)
    assert not torch.allclose(two, one, rtol=1e-3), "the permutation must matter"


def test_huge_margins_do_not_underflow() -> None:
    """The row's maximum excludes the label's margin: a margin of 500 must not push every exponential to 0."""
    z = torch.tensor([[20.0, 0.0, -5.0]])
    check(z, torch.tensor([0]), margin=torch.full((3,), 500.0))
    check(z, torch.tensor([0]), margin=torch.full((3,), -500.0))


def test_negative_row_scale() -> None:
    check(torch.randn(4, 9) * 30, torch.arange(4), row_scale=torch.full((9,), -2.0))


def test_threads_agree_bitwise() -> None:
    z, y = torch.randn(700, 333), torch.randint(0, 333, (700,))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        leaf = z.clone().requires_grad_()
        loss = ltk.functional.adjusted_cross_entropy(leaf, y, shift=torch.linspace(-3, 0, 333))
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def stairs(kind: str, classes: int) -> torch.Tensor:
    """Rows whose maximum is far from their first columns, which give the kernel its first reference."""
    z = torch.randn(4, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if kind == "low first columns":
        z[:, :40] -= 200.0
    elif kind == "masked first columns":
        z[:, :40] = -torch.inf
    elif kind == "masked first block":
        z[:, :2048] = -torch.inf
    elif kind == "rising":
        z += 35.0 * (torch.arange(classes) // 700)
    elif kind == "falling":
        z -= 35.0 * (torch.arange(classes) // 700)
    elif kind == "just inside the headroom":
        z[:, 100] = 25.0
    elif kind == "only the label is left":
        z[:] = -torch.inf
        z[:, 3] = 1.0
    return z


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("label_offset", "label_smoothing"), [(0.0, 0.0), (2000.0, 0.0), (-300.0, 0.0), (0.0, 0.1)])
@pytest.mark.parametrize(
    "kind",
    [
        "low first columns",
        "masked first columns",
        "masked first block",
        "rising",
        "falling",
        "just inside the headroom",
        "only the label is left",
    ],
)
def test_reference_far_from_the_maximum(
    kind: str, label_offset: float, label_smoothing: float, dtype: torch.dtype
) -> None:
    z = stairs(kind, 4500)
    y = torch.tensor([3, 2047, 2048, 4499]) if kind != "only the label is left" else torch.full((4,), 3)
    z[torch.arange(4), y] = torch.where(z[torch.arange(4), y].isinf(), 0.0, z[torch.arange(4), y]) + label_offset
    if label_smoothing and z.isinf().any():
        z[z.isinf()] = -50.0  # a masked class has an infinite smoothed loss
    check(z.to(dtype), y, label_smoothing=label_smoothing, cond=2.0 if label_smoothing else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_large_gradients(dtype: torch.dtype, offset: int) -> None:
    """Beyond 24 MiB the gradient is written past the caches, in whole aligned vectors: rows of odd length start anywhere."""
    classes = (26 << 20) // (3 * dtype.itemsize) | 1
    z = (
        torch.randn(3 * classes + offset, generator=torch.Generator().manual_seed(2))[offset:]
        .view(3, classes)
        .to(dtype)
    )
    z[1, 7] += 20.0
    check(z, torch.tensor([classes - 1, 7, -100]), reduction="sum")
