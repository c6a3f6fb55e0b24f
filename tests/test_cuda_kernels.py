"""The CUDA kernels without a GPU: the sources of csrc/cuda, compiled by g++ with the emulation of tests/cuda_host, against the oracle.

Emulated and therefore proved here: every index, tail, mask, barrier, shuffle and reduction of the kernels, the plans, the launches'
arguments, the cluster path with its distributed shared memory, the Python side. The same cases run on a GPU in tests/gpu.

Only a GPU can prove: that nvcc's code does the same (registers, spills, contracted multiply-adds; expf and logf of the device are
good to 2 ulp, glibc's to 1); memory ordering between blocks (the ticket of the last block) and between the blocks of a cluster;
that clusters of 16 blocks are granted; streams, CUDA graphs, devices; offsets past 2^31; bandwidth.
"""

from __future__ import annotations

import cuda_cases as cases
import oracle
import pytest
import torch
from cuda_host import library

from ltkernels import adjustments
from ltkernels._backends import cuda as _cuda
from ltkernels.losses import _terms

# One class, tails around a vector of 16 bytes and a warp's worth, odd sizes of real data sets.
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 255, 257, 365, 1000, 1203]


@pytest.fixture(autouse=True)
def _emulation(monkeypatch):
    library.emulate(monkeypatch)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", cases.PATHS)
def test_every_size(path: str, dtype: torch.dtype) -> None:
    for classes in SIZES:
        z, y = cases.hostile_logits(5, classes, dtype), cases.labels_of(5, classes)
        cases.check("cpu", z, y, path=path)
        cases.check("cpu", z, y, path=path, **cases.tables_of(classes, dtype, "shift", "scale"))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [8142, 21841, 40001])
def test_long_rows(dtype: torch.dtype, classes: int) -> None:
    """As planned: one block, clusters, and what a cluster of 16 cannot hold in float64."""
    z, y = cases.hostile_logits(3, classes, dtype), torch.tensor([classes // 2, classes - 1, 0])
    cases.check("cpu", z, y, **cases.tables_of(classes, dtype, "shift", "margin"))


@pytest.mark.parametrize("rows", [1, 3, 31, 32, 33, 70])
@pytest.mark.parametrize("classes", [2, 10, 37])
def test_few_classes_many_rows(rows: int, classes: int) -> None:
    z = torch.randn(rows, classes, generator=torch.Generator().manual_seed(rows))
    for dtype in (torch.float32, torch.bfloat16):
        cases.check(
            "cpu", z.to(dtype), cases.labels_of(rows, classes), **cases.tables_of(classes, dtype, *oracle.TABLES)
        )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "batch_mean", "sum", "none"])
@pytest.mark.parametrize("path", cases.PATHS)
def test_every_table_and_reduction(path: str, reduction: str, dtype: torch.dtype) -> None:
    z, y = cases.hostile_logits(9, 131, dtype), cases.labels_of(9, 131)
    for name in oracle.TABLES:
        cases.check("cpu", z, y, path=path, reduction=reduction, **cases.tables_of(131, dtype, name))
    cases.check("cpu", z, y, path=path, reduction=reduction, **cases.tables_of(131, dtype, *oracle.TABLES))


def test_many_rows_have_several_partial_denominators() -> None:
    rows = 4096 * 3 + 17
    z = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(1))
    y[5::11] = -100
    weight = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    loss, grad = cases.call("cpu", z, y, weight=weight)
    leaf = z.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, y, weight)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", cases.PATHS)
@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
def test_label_smoothing(label_smoothing: float, path: str, dtype: torch.dtype) -> None:
    for classes in (21, 150):
        z, y = cases.hostile_logits(9, classes, dtype), cases.labels_of(9, classes)
        z[2, 1] = -1.0  # a masked class has an infinite smoothed loss, tested below
        tables = cases.tables_of(classes, dtype, "shift", "margin", "row_scale")
        # G P_j - c_j is a difference of two numbers of one size: its error is relative to the row.
        cases.check("cpu", z, y, path=path, label_smoothing=label_smoothing, cond=2.0, **tables)
        tables |= cases.tables_of(classes, dtype, "weight", "scale")
        cases.check("cpu", z, y, path=path, label_smoothing=label_smoothing, cond=2.0, **tables)
        z[2, 1] = -torch.inf
        loss, _ = cases.call("cpu", z, y, path=path, label_smoothing=label_smoothing, reduction="none")
        assert loss[2] == torch.inf
        assert loss[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0, 5.0])
def test_focal(gamma: float) -> None:
    for path in cases.PATHS:
        for classes in (11, 90):
            z, y = cases.hostile_logits(9, classes, torch.float32), cases.labels_of(9, classes)
            cases.check("cpu", z, y, path=path, focal_gamma=gamma, **cases.tables_of(classes, z.dtype, "weight"))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", cases.PATHS)
def test_mixed_labels(path: str, dtype: torch.dtype) -> None:
    for classes in (19, 90):
        z, first = cases.hostile_logits(8, classes, dtype), cases.labels_of(8, classes)
        second, lam = torch.arange(8) % classes, torch.linspace(0, 1, 8)
        second[3] = first[3]  # one label twice
        lam = lam.to(torch.float64 if dtype == torch.float64 else torch.float32)
        tables = cases.tables_of(classes, dtype, *oracle.TABLES)
        # The two labels' gradients have opposite signs at each other's place.
        cases.check("cpu", z, (first, second, lam), path=path, cond=2.0, **tables)
        cases.check("cpu", z, (first, second, lam), path=path, reduction="none", cond=2.0, focal_gamma=2.0)
        z[2, 1] = 0.0
        cases.check("cpu", z, (first, second, lam), path=path, cond=2.0, label_smoothing=0.2, **tables)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", cases.PATHS)
@pytest.mark.parametrize("names", cases.BY_LABEL.values(), ids=cases.BY_LABEL)
def test_label_scale_and_smoothing_by_label(names: tuple[str, ...], path: str, dtype: torch.dtype) -> None:
    for classes, reduction in ((19, "mean"), (150, "none"), (90, "batch_mean"), (1203, "sum")):
        cases.check_by_label("cpu", dtype, names, path, reduction, classes)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", cases.PATHS)
def test_smoothing_of_masked_classes(path: str, dtype: torch.dtype) -> None:
    cases.check_smoothing_of_masked_classes("cpu", dtype, path)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_von_mises_fisher(dtype: torch.dtype) -> None:
    """Whatever path is asked for: this form has one kernel, which reads a row twice."""
    for path, classes in zip((*cases.PATHS, "any", "any"), (1, 21, 45, 150, 2100)):
        cases.check_vmf("cpu", dtype, path, classes)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_von_mises_fisher_rows_and_layouts(dtype: torch.dtype) -> None:
    cases.check_vmf_layouts("cpu", dtype)


def seesaw_logits(rows: int, classes: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(rows, classes, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3).to(dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", cases.PATHS)
@pytest.mark.parametrize("form", _terms.FORMS[1:5])  # the von Mises-Fisher form takes no mixed labels
def test_closed_forms(form: str, path: str, dtype: torch.dtype) -> None:
    for classes in (5, 21, 150):
        rows = 7
        generator = torch.Generator().manual_seed(classes)
        counts = torch.randint(2, 900, (classes,), generator=generator).tolist()
        y, z = cases.labels_of(rows, classes), seesaw_logits(rows, classes, dtype)
        options = {}
        if form == "seesaw":
            term = adjustments.seesaw(counts).term
        elif form == "equalization":
            term = _terms.Term(
                form, (torch.arange(classes) % 3 != 0).float(), torch.tensor([2**40 + 7]), (0.6, 0.0, 0.0)
            )
        elif form == "arcface":
            z = (torch.rand(rows, classes, generator=generator) * 1.9 - 0.95).to(dtype)
            z[0, y[0]], z[1, y[1]] = -0.998, 0.5
            term = _terms.Term(form, None, None, (torch.tensor(0.5).cos().item(), torch.tensor(0.5).sin().item(), 0.0))
            options = {"row_scale": torch.full((classes,), 30.0)}
        else:
            term = _terms.Term(form, torch.rand(classes, generator=generator) + 0.1)
            options = {"focal_gamma": 1.5}
        real = torch.float64 if dtype == torch.float64 else torch.float32
        term = term._replace(table=None if term.table is None else term.table.to(real))
        options = {k: v.to(real) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        weight = cases.tables_of(classes, dtype, "weight")
        for reduction in ("none", "mean"):
            cases.check_term("cpu", z, y, term, path=path, reduction=reduction, **options, **weight)
        second, lam = torch.arange(rows) % classes, torch.linspace(0.1, 0.9, rows, dtype=real)
        cases.check_term("cpu", z, (y, second, lam), term, path=path, **options, **weight)
        if form == "sigmoid":
            cases.check_term("cpu", z, y, term._replace(table=None), path=path)
        elif form != "equalization":
            by_label = cases.tables_of(classes, dtype, "label_smoothing")["label_smoothing"]
            for eps in (0.1, by_label):
                cases.check_term("cpu", z, y, term, path=path, label_smoothing=eps, **options)
            cases.check_term("cpu", z, (y, second, lam), term, path=path, label_smoothing=by_label, **options, **weight)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", cases.PATHS)
def test_layouts(path: str, dtype: torch.dtype) -> None:
    cases.check_layouts("cpu", dtype, path, rows=3, classes=45)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", cases.PATHS)
@pytest.mark.parametrize("classes", [3, 40, 1300])
def test_special_rows(classes: int, path: str, dtype: torch.dtype) -> None:
    cases.check_special_rows("cpu", dtype, classes, path)


@pytest.mark.parametrize("path", cases.PATHS)
def test_nothing_to_do(path: str) -> None:
    cases.check_nothing("cpu", path)


@pytest.mark.parametrize("path", cases.PATHS)
def test_huge_margins_do_not_underflow(path: str) -> None:
    z = torch.tensor([[20.0, 0.0, -5.0]])
    for margin in (500.0, -500.0):
        cases.check("cpu", z, torch.tensor([0]), path=path, margin=torch.full((3,), margin))
    cases.check("cpu", torch.randn(4, 9) * 30, torch.arange(4), path=path, row_scale=torch.full((9,), -2.0))


@pytest.mark.parametrize("path", cases.PATHS)
def test_confident_rows_keep_the_label_in_double(path: str) -> None:
    """0.9 * 80.3 is no float32: rounded before it is an exponent, it would cost the loss five of its digits."""
    sigma, z = torch.tensor([0.9, 0.9]), torch.tensor([[80.3, 0.0]])
    loss, grad = cases.call("cpu", z, torch.tensor([0]), path=path, row_scale=sigma)
    expected = torch.exp(-sigma[0].double() * z[0, 0].double()).item()
    assert loss.item() == pytest.approx(expected, rel=5e-7, abs=0.0)
    assert grad[0, 1].item() == pytest.approx(expected * 0.9, rel=5e-7, abs=0.0)


@pytest.mark.parametrize("path", cases.PATHS)
def test_masked_stretches(path: str) -> None:
    """Whole threads, vectors and warps of -inf: a running maximum of -inf must not turn into NaN."""
    z = torch.full((2, 1300), -torch.inf)
    z[:, 1100:] = torch.randn(2, 200)
    cases.check("cpu", z, torch.tensor([1200, 1299]), path=path, **cases.tables_of(1300, z.dtype, "scale"))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_scale_gradient(dtype: torch.dtype) -> None:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for n in (1, 7, 8, 9, 1000, 9001):
        memory = torch.randn(n + 9).to(dtype)
        for offset in range(9):
            there = memory.clone()
            part = there[offset : offset + n]
            assert _cuda.scale_gradient(part, torch.tensor(0.3, dtype=real)) is part
            expected = memory.clone()
            expected[offset : offset + n] = (expected[offset : offset + n].to(real) * torch.tensor(0.3, dtype=real)).to(
                dtype
            )
            assert torch.equal(there, expected)
    ones = torch.tensor([torch.nan, 1.0]).to(dtype)
    assert _cuda.scale_gradient(ones, torch.ones((), dtype=real))[1] == 1.0
    known = torch.tensor(0.3, dtype=real)
    assert _cuda.scale_gradient(ones, known, known)[1] == 1.0
    assert _cuda.scale_gradient(torch.ones(9).to(dtype), 4 * known, known).tolist() == [4.0] * 9
    with pytest.raises(ValueError, match="contiguous"):
        _cuda.scale_gradient(torch.ones(4, 4)[:, :2], torch.ones(()))
    with pytest.raises(ValueError, match=r"upstream has shape \(2,\)"):
        _cuda.scale_gradient(torch.ones(4), torch.ones(2))
    with pytest.raises(ValueError, match=r"expected has shape \(2,\)"):
        _cuda.scale_gradient(torch.ones(4), torch.ones(()), torch.ones(2))


@pytest.mark.parametrize("path", ["registers", "cluster", "memory"])
def test_one_factor_for_all_rows(path: str) -> None:
    """An announced upstream gradient: one number that every row reads, with its tables and closed forms."""
    z, y = torch.randn(5, 40), torch.tensor([3, 0, -100, 39, 7])
    for term in (None, _terms.Term("sigmoid", torch.ones(40))):
        given = {"path": path, "term": term}
        _, one = cases.call("cpu", z, y, **given)
        _, factor = cases.call("cpu", z, y, row_coef=torch.tensor(8.0).expand(5), **given)
        assert one.abs().max() > 0
        assert torch.equal(factor, 8 * one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logdet(dtype: torch.dtype) -> None:
    for n in (1, 2, 3, 5, 10, 31, 32, 33, 64):
        for batch in (1, 8, 9) if n > 10 else (1, 7, 8, 9, 130):
            generator = torch.Generator().manual_seed(batch * 100 + n)
            x = torch.randn(batch, n, n + 2, dtype=torch.float64, generator=generator)
            matrices = x @ x.mT + torch.eye(n, dtype=torch.float64)
            expected = torch.linalg.slogdet(matrices).logabsdet
            lower = matrices.tril() + torch.full((n, n), torch.nan).triu(1)  # the upper triangle is not read
            lower = torch.where(torch.ones(n, n).tril().bool(), matrices, torch.nan)
            tolerance = 1e-12 if dtype == torch.float64 else 2e-5
            torch.testing.assert_close(
                _cuda.logdet(lower.to(dtype)).double(), expected, rtol=tolerance, atol=tolerance * n
            )
    bad = torch.stack([torch.diag(torch.tensor(v)) for v in ([1.0, 2.0], [-1.0, -2.0], [0.0, 1.0], [3.0, -1.0])])
    got = _cuda.logdet(bad.to(dtype))
    assert got[0].item() == pytest.approx(0.6931472)
    assert got[1:].isnan().all()
    assert _cuda.logdet(torch.empty(0, 3, 3, dtype=dtype)).shape == (0,)
    with pytest.raises(ValueError, match=r"n in \[1, 64\]"):
        _cuda.logdet(torch.empty(1, 65, 65))


def test_the_same_bits_again() -> None:
    z, y = cases.hostile_logits(40, 700, torch.float32), cases.labels_of(40, 700)
    results = [cases.call("cpu", z, y, path=path) for path in (*cases.PATHS, *cases.PATHS)]
    for (loss, grad), (again, grad_again) in zip(results[:3], results[3:]):
        assert torch.equal(loss, again)
        assert torch.equal(grad, grad_again)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_plans_hold_their_rows(dtype: torch.dtype) -> None:
    """Every plan has room for every vector of the row, and the borders are where csrc/cuda/job.h says."""
    width, held = 16 // dtype.itemsize, 4 if dtype == torch.float64 else 8
    block = 128 if dtype.itemsize == 2 else 256
    cpu = torch.device("cpu")
    for classes in [*range(1, 600), 1000, 4096, 8142, 8192, 16384, 16385, 21841, 32768, 65537, 128256, 262144, 300000]:
        for aligned in (False, True):
            plan = _cuda.plan(dtype, classes, aligned=aligned, device=cpu)
            vectors, ends = classes // width, classes % width if aligned else min(classes, 2 * (width - 1))
            assert plan.block % 32 == 0
            assert plan.block % plan.threads == 0
            assert plan.threads & (plan.threads - 1) == 0
            assert plan.block <= 512
            if plan.path == "memory":
                assert vectors > 16 * 512 * held
            else:
                assert plan.threads * plan.cluster * held >= vectors
                assert plan.threads * plan.cluster * (1 if dtype == torch.float64 else 2) >= ends
                assert plan.cluster == 1 or plan.block == plan.threads >= block
    if dtype != torch.float64:
        assert _cuda.plan(dtype, 100, device=cpu) == ("registers", 4, 128, 1)
        assert _cuda.plan(dtype, 1000, device=cpu) == ("registers", 128 // width, 128, 1)
        assert _cuda.plan(dtype, 8192, device=cpu) == ("registers", block, block, 1)
        assert _cuda.plan(dtype, 8192, aligned=False, device=cpu) == ("registers", block, block, 1)
        assert _cuda.plan(dtype, 128256, device=cpu) == ("cluster", block, block, 16)
        assert _cuda.plan(dtype, 262144, device=cpu) == ("cluster", 2 * block, 2 * block, 16)


def test_every_kernel_asks_for_large_clusters() -> None:
    """Permission for more than 8 blocks belongs to a kernel: what the first one was granted says nothing about the next."""
    mixed = (torch.tensor([5, 262143]), torch.tensor([7, 0]), torch.tensor(0.5))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = cases.hostile_logits(2, 262144, dtype)
        assert _cuda.plan(dtype, 262144, device=torch.device("cpu")).cluster == 16
        cases.check("cpu", z, torch.tensor([5, 262143]))
        cases.call("cpu", z, mixed)


def test_code_older_than_clusters_has_none(monkeypatch) -> None:
    """A device of sm_90 may run code that was compiled for sm_80, in which a cluster's blocks would all do the first part of a row."""
    monkeypatch.setattr(_cuda, "library", library.emulated(80))
    for path in ("any", "cluster"):
        for dtype in (torch.float32, torch.bfloat16):
            assert _cuda.plan(dtype, 40001, path=path, device=torch.device("cpu")).cluster == 1
            z, y = cases.hostile_logits(2, 40001, dtype), torch.tensor([40000, 3])
            cases.check("cpu", z, y, path=path)


def test_debug_switch_raises(monkeypatch) -> None:
    monkeypatch.setenv("LTKERNELS_CUDA_DEBUG", "1")
    z, y = torch.randn(4, 5), torch.tensor([0, 1, 5, 1])
    with pytest.raises(ValueError, match=r"target has label 5 in row 2.*\[0, 5\)"):
        cases.call("cpu", z, y)
    good = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="the second target has label 5 in row 2"):
        cases.call("cpu", z, (good, y, torch.tensor(0.5)))
    with pytest.raises(ValueError, match=r"weight\[1\] is nan"):
        cases.call("cpu", z, good, weight=torch.tensor([1.0, torch.nan, 1, 1, 1]))
    cases.call("cpu", z, good, ignore_index=5, shift=torch.tensor([0.0, -torch.inf, 0, 0, 0]))


def test_a_refused_launch_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(_cuda.library, "cuda_adjusted_ce", lambda *arguments: "no kernel image is available")
    with pytest.raises(RuntimeError, match="not launched: no kernel image is available"):
        cases.call("cpu", torch.randn(2, 3), torch.tensor([0, 1]))
