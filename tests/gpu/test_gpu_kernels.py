"""The CUDA kernels on a GPU: the cases of tests/cuda_cases.py, and what only a GPU can prove (listed in tests/test_cuda_kernels.py)."""

from __future__ import annotations

import cuda_cases as cases
import oracle
import pytest
import torch
import two_phase_cases
from torch.nn import functional as F

from ltkernels import adjustments
from ltkernels._backends import ClassPart
from ltkernels._backends import cuda as _cuda
from ltkernels._call import Call, Out
from ltkernels.losses import _terms

READY, REASON = _cuda.available()
pytestmark = pytest.mark.skipif(not READY, reason=f"needs a GPU: {REASON}")
SIZES = [1, 2, 3, 7, 8, 9, 31, 33, 65, 100, 365, 1000, 1203, 4099]
ALL_PATHS = ("any", *cases.PATHS)


def has_clusters() -> bool:
    return torch.cuda.get_device_capability()[0] >= 9


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_every_size(path: str, dtype: torch.dtype) -> None:
    for classes in SIZES:
        z, y = cases.hostile_logits(5, classes, dtype), cases.labels_of(5, classes)
        cases.check("cuda", z, y, path=path)
        cases.check("cuda", z, y, path=path, **cases.tables_of(classes, dtype, *oracle.TABLES))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [8142, 8192, 21841, 32000, 65537, 128256, 262144, 300001])
def test_long_rows(dtype: torch.dtype, classes: int) -> None:
    z, y = cases.hostile_logits(3, classes, dtype), torch.tensor([classes // 2, classes - 1, 0])
    for tables in ({}, cases.tables_of(classes, dtype, *oracle.TABLES)):
        cases.check("cuda", z, y, **tables)


def test_long_rows_go_to_clusters() -> None:
    """On sm_90 and up, in every size that csrc/cuda/job.h promises; two passes elsewhere."""
    for classes, cluster in ((16384, 2), (65536, 8), (131072, 16), (262144, 16)):
        plan = _cuda.plan(torch.bfloat16, classes)
        if has_clusters() and (cluster <= 8 or torch.cuda.get_device_capability()[0] in (9, 10)):
            assert plan.path == "cluster"
            assert plan.cluster == cluster
        elif not has_clusters():
            assert plan.path == ("registers" if classes <= 16384 else "memory")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "batch_mean", "sum", "none"])
def test_every_table_and_reduction(reduction: str, dtype: torch.dtype) -> None:
    z, y = cases.hostile_logits(9, 1203, dtype), cases.labels_of(9, 1203)
    for path in ALL_PATHS:
        for names in (*((name,) for name in oracle.TABLES), oracle.TABLES):
            cases.check("cuda", z, y, path=path, reduction=reduction, **cases.tables_of(1203, dtype, *names))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_smoothing_focal_and_mixed_labels(path: str, dtype: torch.dtype) -> None:
    for classes in (21, 1203):
        z, y = cases.hostile_logits(9, classes, dtype), cases.labels_of(9, classes)
        z[2, 1] = -1.0
        tables = cases.tables_of(classes, dtype, *oracle.TABLES)
        second, lam = torch.arange(9) % classes, torch.linspace(0, 1, 9, dtype=tables["shift"].dtype)
        cases.check("cuda", z, y, path=path, label_smoothing=0.1, cond=2.0, **tables)
        cases.check("cuda", z, y, path=path, focal_gamma=2.0, **tables)
        cases.check("cuda", z, (y, second, lam), path=path, cond=2.0, **tables)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_closed_forms(path: str, dtype: torch.dtype) -> None:
    for classes in (21, 1203):
        generator = torch.Generator().manual_seed(classes)
        counts = torch.randint(2, 900, (classes,), generator=generator).tolist()
        real = torch.float64 if dtype == torch.float64 else torch.float32
        z = (torch.randn(7, classes, generator=generator, dtype=torch.float64) * 3).to(dtype)
        y = cases.labels_of(7, classes)
        seesaw = adjustments.seesaw(counts).term
        mask = _terms.Term(
            "equalization", (torch.arange(classes) % 3 != 0).to(real), torch.tensor([99]), (0.6, 0.0, 0.0)
        )
        sigmoid = _terms.Term("sigmoid", torch.rand(classes, generator=generator).to(real) + 0.1)
        for term in (seesaw._replace(table=seesaw.table.to(real)), mask, sigmoid):
            cases.check_term("cuda", z, y, term, path=path)
            cases.check_term("cuda", z, (y, torch.arange(7), torch.linspace(0.1, 0.9, 7, dtype=real)), term, path=path)
        arcface = _terms.Term("arcface", None, None, (0.8775825618903728, 0.479425538604203, 0.0))
        cases.check_term(
            "cuda",
            (z / 30).clamp(-0.95, 0.95),
            y,
            arcface,
            path=path,
            row_scale=torch.full((classes,), 30.0, dtype=real),
        )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_label_scale_and_smoothing_by_label(path: str, dtype: torch.dtype) -> None:
    for names in cases.BY_LABEL.values():
        for classes, reduction in ((21, "mean"), (1203, "none")):
            cases.check_by_label("cuda", dtype, names, path, reduction, classes)
    cases.check_smoothing_of_masked_classes("cuda", dtype, path)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_von_mises_fisher(dtype: torch.dtype) -> None:
    for classes in (1, 21, 45, 1203, 8142):
        cases.check_vmf("cuda", dtype, "any", classes)
    cases.check_vmf_layouts("cuda", dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_soft_targets(temperature: float, dtype: torch.dtype) -> None:
    for classes in (2, 45, 1203, 9001):
        cases.check_soft_targets("cuda", dtype, classes, temperature)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_memory_safety_of_layouts(path: str, dtype: torch.dtype) -> None:
    """Also what benchmarks.gpu runs under compute-sanitizer."""
    cases.check_layouts("cuda", dtype, path, rows=3, classes=45)
    if dtype == torch.bfloat16:
        cases.check_layouts("cuda", dtype, path, rows=3, classes=1203)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_memory_safety_of_special_rows(path: str, dtype: torch.dtype) -> None:
    for classes in (3, 40, 1300):
        cases.check_special_rows("cuda", dtype, classes, path)
    cases.check_nothing("cuda", path)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [[], [5, 401], [0, 1000]])
def test_two_phases_of_parts(cuts: list[int], dtype: torch.dtype) -> None:
    z, y = cases.hostile_logits(9, 1203, dtype), cases.labels_of(9, 1203)
    tables = cases.tables_of(1203, dtype, *oracle.TABLES)
    two_phase_cases.check(z, y, cuts, device="cuda", **tables)
    z[2, 1] = -1.0
    two_phase_cases.check(z, y, cuts, device="cuda", cond=2.0, label_smoothing=0.1, **tables)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_scale_gradient(dtype: torch.dtype) -> None:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(100_003, device="cuda").to(dtype)
    expected = (x.to(real) * 0.3).to(dtype)
    assert torch.equal(_cuda.scale_gradient(x.clone(), torch.full((), 0.3, dtype=real, device="cuda")), expected)
    assert torch.equal(_cuda.scale_gradient(x.clone(), torch.ones((), dtype=real, device="cuda")), x)
    known = torch.full((), 0.3, dtype=real, device="cuda")
    assert torch.equal(_cuda.scale_gradient(x.clone(), known, known), x)
    assert torch.equal(_cuda.scale_gradient(x.clone(), 4 * known, known), (x.to(real) * 4).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 10, 33, 64])
def test_logdet(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(4000, n, n + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    matrices = x @ x.mT + torch.eye(n, dtype=torch.float64)
    expected = torch.linalg.cholesky(matrices).diagonal(dim1=-2, dim2=-1).log().sum(-1) * 2
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    torch.testing.assert_close(
        _cuda.logdet(matrices.to("cuda", dtype)).cpu().double(), expected, rtol=tolerance, atol=tolerance * n
    )


def test_many_rows_and_the_same_bits_every_time() -> None:
    """The blocks finish in any order; the loss does not depend on it."""
    z = torch.randn(40_000, 100, device="cuda")
    y = torch.randint(0, 100, (40_000,), device="cuda")
    weight = torch.rand(100, device="cuda") + 0.5
    first = cases.call("cuda", z, y, weight=weight)
    assert torch.allclose(first[0], F.cross_entropy(z.double(), y, weight.double()).float().cpu(), rtol=1e-5)
    for _ in range(20):
        again = cases.call("cuda", z, y, weight=weight)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


def test_more_than_2_to_the_31_elements() -> None:
    rows, classes = 16_500, 131_072  # 2.16e9 bfloat16 logits; the gradient replaces them
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs 12 GiB of device memory")
    z = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(4, classes, generator=torch.Generator().manual_seed(0)).bfloat16()
    z[-4:] = tail.cuda()
    y = torch.arange(rows, device="cuda") * 7 % classes
    loss = torch.empty(rows, device="cuda")
    _cuda.adjusted_ce(z, Call(y, reduction=0), Out(loss, z))
    expected_loss, expected, size = oracle.adjusted_cross_entropy(tail, y[-4:].cpu(), reduction="none")
    oracle.assert_loss(loss[-4:].cpu(), expected_loss, size, torch.bfloat16)
    oracle.assert_gradient(z[-4:].cpu(), expected, size, y[-4:].cpu())


def test_current_stream_is_used() -> None:
    """A kernel on another stream would not wait for the copy that a long sleep holds back."""
    source = torch.randn(512, 1000, device="cuda")
    y = torch.randint(0, 1000, (512,), device="cuda")
    z = torch.zeros_like(source)
    loss, grad = torch.empty((), device="cuda"), torch.empty_like(z)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        z.copy_(source)
        _cuda.adjusted_ce(z, Call(y), Out(loss, grad))
    side.synchronize()
    assert torch.allclose(loss, F.cross_entropy(source, y), rtol=1e-5)


def test_other_device_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    z, y = torch.randn(4, 100, device="cuda:1"), torch.arange(4, device="cuda:1")
    loss, grad = torch.empty((), device="cuda:1"), torch.empty_like(z)
    _cuda.adjusted_ce(z, Call(y), Out(loss, grad))
    assert torch.allclose(loss, F.cross_entropy(z, y), rtol=1e-5)
    assert torch.cuda.current_device() == 0


def test_no_call_waits_for_the_device() -> None:
    z, y = torch.randn(512, 1000, device="cuda"), torch.randint(0, 1000, (512,), device="cuda")
    loss, grad = torch.empty((), device="cuda"), torch.empty_like(z)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _cuda.adjusted_ce(z, Call(y), Out(loss, grad))
        _cuda.scale_gradient(grad, loss)
        ones, rows = (
            torch.ones(512, dtype=torch.float64, device="cuda"),
            torch.empty(512, 4, dtype=torch.float64, device="cuda"),
        )
        part = ClassPart(z, y, ones, None, None, None)
        _cuda.row_statistics(part, False, rows)
        _cuda.gradient_from_statistics(part, rows, grad)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_training_step_in_a_graph_follows_its_schedule() -> None:
    """Captured once; replayed after the class weights and row scales changed in their buffers, it gives what eager gives."""
    torch.manual_seed(0)
    classes, rows = 365, 64
    tables = {name: table.cuda() for name, table in cases.tables_of(classes, torch.float32, *oracle.TABLES).items()}
    x, y = torch.randn(rows, 32, device="cuda"), torch.randint(0, classes, (rows,), device="cuda")
    weight = torch.randn(classes, 32, device="cuda") / 6
    start = weight.clone()
    loss = torch.empty((), device="cuda")

    def step() -> None:
        logits = x @ weight.T
        grad = torch.empty_like(logits)
        _cuda.adjusted_ce(logits, Call(y).with_tables(tuple(tables[n] for n in oracle.TABLES)), Out(loss, grad))
        weight.sub_(grad.T @ x, alpha=0.5)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def train(run) -> tuple[list[float], torch.Tensor]:
        weight.copy_(start)
        tables["weight"].fill_(1.0)
        tables["row_scale"].fill_(1.0)
        losses = []
        for epoch in range(4):
            if epoch == 2:  # the schedule's switch, in place
                tables["weight"].copy_(torch.linspace(0.5, 2.0, classes))
                tables["row_scale"].copy_(torch.linspace(0.5, 1.5, classes))
            run()
            losses.append(loss.item())
        return losses, weight.clone()

    eager, replayed = train(step), train(graph.replay)
    assert eager[0] == replayed[0]
    assert torch.equal(eager[1], replayed[1])
    assert eager[0][0] != eager[0][1] != eager[0][2]


def test_a_bad_launch_is_a_runtime_error() -> None:
    z = torch.randn(2, 3, device="cuda")
    loss, y = torch.empty((), device="cuda"), torch.tensor([0, 1], device="cuda")
    with pytest.raises(RuntimeError, match="not launched"):
        _cuda._raise(_cuda.library.cuda_scale(99, 0, 0, z.data_ptr(), 6, loss.data_ptr()))
    _cuda.adjusted_ce(z, Call(y), Out(loss, torch.empty_like(z)))
    assert loss.isfinite()
