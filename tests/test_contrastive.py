"""Promise: contrastive losses keep what every call of the package keeps (derivatives, compilers, threads, layouts, refusals), and hold no
matrix of similarities."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_contrastive_values import FIXED, KINDS, arguments, by_pairs, in_dtype
from torch import Tensor

import ltkernels as ltk

contrastive, linear_logsumexp = ltk.functional.contrastive, ltk.functional.linear_logsumexp
F64 = torch.float64


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- linear_logsumexp --------------------------------------------------------------------------------------------------

ROW_GROUP = torch.tensor([3, -1, 7, 3, 77, 0, 7])
COLUMN_GROUP = torch.arange(41) * 5 % 11 - 1
OWN_INDEX = torch.tensor([0, -1, 40, 3, 17, 5, 9])
SHIFT = torch.where(torch.arange(41) % 7 == 2, -torch.inf, noise(41, seed=3))


def plain(
    rows: Tensor, columns: Tensor, row_scale: Tensor, shift: Tensor, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    if normalize:
        rows, columns = (x / x.norm(dim=1, keepdim=True) for x in (rows, columns))
    s = row_scale[:, None] * (rows @ columns.t()) + shift
    own = ROW_GROUP[:, None] == COLUMN_GROUP
    absent = OWN_INDEX[:, None] == torch.arange(41)
    return tuple(torch.logsumexp(s.masked_fill(mask | absent, -torch.inf), 1) for mask in (own, ~own))


def inputs(scale: float = 1.0) -> list[Tensor]:
    return [noise(7, 6) * scale, noise(41, 6, seed=1), 1 + noise(7, seed=2).abs(), SHIFT.clone()]


def ours(*given: Tensor, **said) -> tuple[Tensor, Tensor]:
    rows, columns, row_scale, shift = given
    return linear_logsumexp(
        rows,
        columns,
        row_scale=row_scale,
        shift=shift,
        row_group=ROW_GROUP,
        column_group=COLUMN_GROUP,
        own_index=OWN_INDEX,
        **said,
    )


@pytest.mark.parametrize("chunk_rows", [None, 1, 3])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["near", "far"])
def test_both_sides_and_their_gradients(scale: float, normalize: bool, chunk_rows: int | None) -> None:
    """Far: similarities whose exponentials no dtype holds; a side is far below the other."""
    given = [x.requires_grad_() for x in inputs(scale)]
    exact, found = plain(*given, normalize=normalize), ours(*given, normalize=normalize, chunk_rows=chunk_rows)
    upstream = [noise(7, seed=4), noise(7, seed=5)]
    kept = torch.isfinite(exact[1])  # row 4 has no column of its group
    assert not kept.all()
    upstream[1] = torch.where(kept, upstream[1], 0)

    def total(sides: tuple[Tensor, Tensor]) -> Tensor:
        return (sides[0] * upstream[0]).sum() + (torch.where(kept, sides[1], 0) * upstream[1]).sum()

    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(total(exact), given)
    expected = [torch.nan_to_num(x) for x in expected]
    for one, other in zip(torch.autograd.grad(total(found), given), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    single = [x.detach().float() for x in given]
    size = 1e-6 * max(1.0, scale)
    for one, other in zip(ours(*single, normalize=normalize), exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=10 * size)


def test_without_groups_every_column_is_another() -> None:
    a, b = noise(5, 4), noise(9, 4, seed=1)
    other, own = linear_logsumexp(a, b)
    torch.testing.assert_close(other, torch.logsumexp(a @ b.t(), 1))
    assert (own == -torch.inf).all()
    other, own = linear_logsumexp(a, b[:0], row_scale=2.0)
    assert (other == -torch.inf).all()
    assert [len(x) for x in linear_logsumexp(a[:0], b)] == [0, 0]
    same = torch.zeros(5, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    other, own = linear_logsumexp(a, b, row_group=same[0], column_group=same[1])
    assert (other == -torch.inf).all()
    torch.testing.assert_close(own, torch.logsumexp(a @ b.t(), 1))
    removed = linear_logsumexp(a, b, shift=torch.full((9,), -torch.inf, dtype=F64))
    assert (removed[0] == -torch.inf).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_are_independent_of_each_other(bad: float) -> None:
    a, b = noise(5, 4), noise(9, 4, seed=1)
    spoiled = a.clone()
    spoiled[2, 1] = bad
    found, exact = linear_logsumexp(spoiled, b)[0], linear_logsumexp(a, b)[0]
    assert torch.equal(found[[0, 1, 3, 4]], exact[[0, 1, 3, 4]])
    assert not torch.isfinite(found[2])
    assert contrastive(spoiled, torch.tensor([0, 0, 1, 1, 1])).isnan()


def test_derivatives_of_both_sides() -> None:
    kept = [noise(3, 4), noise(5, 4, seed=1), noise(3, seed=2).abs(), noise(5, seed=3)]
    groups = {"row_group": torch.tensor([0, 1, 1]), "column_group": torch.tensor([1, 0, 1, 2, 0])}

    def sides(*given: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logsumexp(given[0], given[1], row_scale=given[2], shift=given[3], **groups)

    leaves = [x.requires_grad_() for x in kept]
    assert torch.autograd.gradcheck(sides, leaves)
    assert torch.autograd.gradgradcheck(sides, leaves)
    assert torch.autograd.gradcheck(sides, leaves, check_forward_ad=True, check_backward_ad=False)


# ---- the losses --------------------------------------------------------------------------------------------------------

FEATURES, LABELS = FIXED


def call(kind: str, features: Tensor = FEATURES, **said) -> Tensor:
    return contrastive(features, None if kind == "moco" else LABELS, kind, **{**arguments(kind, LABELS), **said})


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_that_no_kernel_has(kind: str) -> None:
    tau = torch.tensor(0.3, dtype=F64, requires_grad=True)
    leaf = FEATURES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t: call(kind, x, tau=t), (leaf, tau))
    assert torch.autograd.gradgradcheck(lambda x: call(kind, x, tau=0.3), (leaf,))

    def scalar(x: Tensor) -> Tensor:
        return call(kind, x, tau=0.3)

    (gradient,) = torch.autograd.grad(scalar(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(scalar)(FEATURES), gradient)
    tangent = noise(*FEATURES.shape, seed=8)
    torch.testing.assert_close(torch.func.jvp(scalar, (FEATURES,), (tangent,))[1], (gradient * tangent).sum())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["supcon", "balanced", "paco"])
def test_who_looks_at_a_call(kind: str, reduction: str) -> None:
    from torch.utils.checkpoint import checkpoint

    said = arguments(kind, LABELS)

    def scalar(x: Tensor) -> Tensor:
        loss = contrastive(x, LABELS, kind, reduction=reduction, **said)
        return (loss * torch.arange(len(LABELS))).sum() if reduction == "none" else loss

    def gradient(function, times: int = 1) -> Tensor:
        leaf = FEATURES.clone().requires_grad_()
        loss = function(leaf)
        for _ in range(times):
            (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        return found

    exact = gradient(scalar)
    assert torch.equal(gradient(scalar, 2), exact)
    torch.testing.assert_close(gradient(lambda x: checkpoint(scalar, x, use_reentrant=False)), exact)
    torch.testing.assert_close(gradient(torch.compile(scalar, backend="aot_eager", fullgraph=True)), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_for_any_number_of_threads(kind: str, monkeypatch) -> None:
    """Of the kernel; the bits of the products between are those of torch's own, as in the head. 64 rows: several blocks."""
    labels = torch.arange(64) % 5
    features = noise(64, 16, dtype=torch.float32)
    said = {name: in_dtype(x, torch.float32) for name, x in arguments(kind, labels, 16).items()}

    def run(threads: int) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        leaf = features.clone().requires_grad_()
        loss = contrastive(leaf, None if kind == "moco" else labels, kind, **said)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    one = run(1)
    for threads in (2, 5):
        for found, expected in zip(run(threads), one, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_and_the_names_of_classes_do_not_matter(kind: str) -> None:
    """Exactly the classes' permutation: its labels, and its rows of tables."""
    order = torch.tensor([3, 0, 4, 2, 1])  # new name of each class
    said = arguments(kind, LABELS)
    other = dict(said)
    if "queue_labels" in said:
        held = said["queue_labels"]
        other["queue_labels"] = torch.where(held < 0, held, order[held.clamp_min(0)])
    inverse = torch.argsort(order)
    if "centres" in said:
        other["centres"] = said["centres"][inverse]
    if "class_counts" in said:
        other["class_counts"] = [said["class_counts"][int(c)] for c in inverse]
    if "logits" in said:
        other["logits"] = said["logits"][:, inverse]
    labels = torch.where(LABELS < 0, LABELS, order[LABELS.clamp_min(0)])
    if kind == "moco":
        return
    found = contrastive(FEATURES, labels, kind, reduction="none", **other)
    torch.testing.assert_close(
        found, contrastive(FEATURES, LABELS, kind, reduction="none", **said), rtol=1e-13, atol=1e-13
    )


def test_layouts() -> None:
    wide = noise(23, 18)
    for view in (wide[:, ::2], wide.t().contiguous().t()[:, :9], wide[:, 3:12]):
        leaf = view.detach().requires_grad_()
        copy = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        losses = [contrastive(x, LABELS) for x in (leaf, copy)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y, x in zip(losses, (leaf, copy))))
    expanded = noise(1, 9).expand(4, 9)
    assert torch.isfinite(contrastive(expanded, torch.tensor([0, 0, 1, 1])))


def test_views_are_rows() -> None:
    views = noise(6, 3, 5)
    ids = torch.arange(6).repeat_interleave(3)
    flat = views.flatten(0, 1)
    labels = torch.tensor([0, 1, 0, 2, 1, 1])
    assert torch.equal(contrastive(views, kind="ntxent"), contrastive(flat, ids, "ntxent"))
    assert torch.equal(contrastive(views, labels), contrastive(flat, labels.repeat_interleave(3)))
    rows = contrastive(views, labels, reduction="none", sample_weight=torch.tensor([1, 0.5, 1, 2, 0, 1]))
    assert rows.shape == (6, 3)
    assert (rows[4] == 0).all()


def test_weights_and_denominators() -> None:
    said = {"tau": 0.2}
    rows = contrastive(FEATURES, LABELS, reduction="none", **said)
    positive = torch.tensor([row is not None for row in by_pairs(FEATURES, LABELS, "supcon", said)])
    weight = noise(23, seed=9).abs()
    table = torch.tensor([1.0, 2.0, 0.5, 3.0, 9.0], dtype=F64)
    w = weight * table[LABELS.clamp_min(0)] * (LABELS >= 0)
    options = {"sample_weight": weight, "class_weight": table, **said}
    torch.testing.assert_close(contrastive(FEATURES, LABELS, reduction="none", **options), rows * w)
    torch.testing.assert_close(contrastive(FEATURES, LABELS, reduction="sum", **options), (rows * w).sum())
    torch.testing.assert_close(contrastive(FEATURES, LABELS, **options), (rows * w).sum() / w[positive].sum())
    found = contrastive(FEATURES, LABELS, reduction="batch_mean", **options)
    torch.testing.assert_close(found, (rows * w).sum() / (LABELS >= 0).sum())
    torch.testing.assert_close(contrastive(FEATURES, LABELS, **said), rows.sum() / positive.sum())


@pytest.mark.parametrize("reduction", ["mean", "batch_mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_batch_without_a_positive_has_the_loss_0(rows: int, reduction: str) -> None:
    leaf = noise(rows, 4).requires_grad_()
    loss = contrastive(leaf, torch.arange(rows), reduction=reduction)
    assert (loss == 0).all()
    loss.sum().backward()
    assert (leaf.grad == 0).all()
    ignored = contrastive(noise(4, 4), torch.full((4,), -100), reduction=reduction)
    assert (ignored == 0).all()


def test_one_class_in_the_batch() -> None:
    labels = torch.zeros(6, dtype=torch.int64)
    for kind in ("supcon", "supcon_in", "balanced"):
        own = {"centres": noise(3, 4, seed=1)} if kind == "balanced" else {}
        leaf = noise(6, 4).requires_grad_()
        loss = contrastive(leaf, labels, kind, **own)
        expected = torch.stack(by_pairs(noise(6, 4), labels, kind, own)).mean()
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert torch.isfinite(leaf.grad).all()


def test_only_what_is_needed_is_computed(monkeypatch) -> None:
    """Detached columns cost no third product."""
    products = []
    addmm = Tensor.addmm_
    monkeypatch.setattr(
        Tensor, "addmm_", lambda self, a, b, **k: (products.append((a.shape, b.shape)), addmm(self, a, b, **k))[1]
    )
    leaf = FEATURES.clone().requires_grad_()
    call("gml", leaf).backward()
    assert products == []
    call("paco", leaf).backward()
    assert [shape[0] for shape in products] == [(23, 23)]  # the batch's columns, not keys and queue
    products.clear()
    call("balanced", FEATURES).backward() if call("balanced", FEATURES).requires_grad else None
    assert products == []
    centres = arguments("balanced", LABELS)["centres"].requires_grad_()
    contrastive(FEATURES, LABELS, "balanced", centres=centres).backward()
    assert len(products) == 1
    assert torch.isfinite(centres.grad).all()


MEMORY = """
import resource, sys, torch, ltkernels as ltk
torch.set_num_threads(1)
kind, rows = sys.argv[1], int(sys.argv[2])
x = torch.randn(rows, 128).requires_grad_()
y = torch.arange(rows) % 100
own = {"centres": torch.randn(100, 128)} if kind == "balanced" else {}
ltk.functional.contrastive(x[:256], y[:256], kind, **own).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ltk.functional.contrastive(x, y, kind, **own).backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0
print(before // 1024, after // 1024)
"""


@pytest.mark.parametrize("kind", ["supcon", "balanced"])
def test_no_matrix_of_similarities(kind: str, tmp_path) -> None:
    """4096 rows: the similarities would be 64 MiB. (32 768 rows, whose matrix has 4 GiB, are measured by benchmarks.contrast.)"""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, kind, "4096"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after - before < 48, (before, after)


def test_largest_allocation() -> None:
    """Nothing of rows x columns: the largest tensor is a chunk."""
    x = noise(1024, 16, dtype=torch.float32).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        contrastive(x, torch.arange(1024) % 9, chunk_rows=64).backward()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes) == 64 * 1024 * 4
