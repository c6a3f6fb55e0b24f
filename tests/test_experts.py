"""Promise: coupled experts get the sum of their losses and the coupling of its formula, and the gradients of both in one pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

CE = ltk.functional.adjusted_cross_entropy
EXPERTS = ltk.functional.experts_cross_entropy
NN = ltk.nn
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 1e-3}
COUPLINGS = ["mean_kl", "mutual_kl", "sum"]
COUNTS = [6, 3, 1]
Z1, Z2 = torch.tensor([[1.0, 0.5, -0.5]]).double(), torch.tensor([[0.0, 1.0, 0.5]]).double()
Y2 = torch.tensor([2])


def logits(experts: int, rows: int, classes: int, scale: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(classes)
    return [scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(experts)]


def labels(rows: int, classes: int) -> Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))


def adjustments(experts: int, classes: int, dtype: torch.dtype) -> list[ltk.losses.Adjustment | None]:
    """As different as they can be."""
    generator = torch.Generator().manual_seed(7)

    def table(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(classes, generator=generator, dtype=torch.float64)).to(dtype)

    found: list[ltk.losses.Adjustment | None] = [None]
    for e in range(1, experts):
        found.append(
            ltk.losses.Adjustment(
                shift=table(-2, 0), scale=table(0.5, 1.5) if e == 2 else None, margin=table(0, 0.5) if e == 1 else None,
                row_scale=table(0.5, 2) if e == 2 else None, weight=table(0.2, 2), focal_gamma=1.5 if e == 1 else 0.0,
            )
        )  # fmt: skip
    return found


def plain(
    z: list[Tensor], y: Tensor, tables, coupling: str, *, factor=1.0, temperature=1.0, adjusted=False, **said
) -> Tensor:
    """The formula in torch, mean over the rows that are not ignored."""
    total = sum(
        CE(a, y, **({} if t is None else t._asdict()), backend="torch", **said) for a, t in zip(z, tables, strict=True)
    )
    if coupling == "sum":
        return total + factor * CE(sum(z), y, backend="torch", **said)
    u = []
    for a, t in zip(z, tables, strict=True):
        if adjusted and t is not None:
            a = a if t.scale is None else a * t.scale
            a = a if t.shift is None else a + t.shift
        u.append((a / temperature)[y != -100])
    square = float(temperature.mean() if isinstance(temperature, Tensor) else temperature) ** 2
    log_p = [each.log_softmax(1) for each in u]
    if coupling == "mean_kl":
        mean = (sum(u) / len(u)).log_softmax(1).detach()
        rows = sum(F.kl_div(each, mean, log_target=True, reduction="none").sum(1) for each in log_p)
    else:
        pairs = [F.kl_div(q, p, log_target=True, reduction="none").sum(1) for p in log_p for q in log_p if p is not q]
        rows = sum(pairs) / (len(u) - 1)
    own = said.get("sample_weight")
    own = torch.ones(len(y)).double() if own is None else own
    own = own[y != -100]
    return total + factor * square * (rows * own).sum() / own.sum()


# ---- pinned values ----------------------------------------------------------------------------------------------------


def test_pinned_sade_and_balpoe() -> None:
    parts = EXPERTS([Z1] * 3, Y2, NN.SADE(COUNTS).adjustments(3), reduction="none")[:, 0]
    assert parts.tolist() == pytest.approx([2.104131, 3.584768, 6.909418], abs=1e-6)
    assert NN.SADE(COUNTS)([Z1] * 3, Y2).item() == pytest.approx(12.598316, abs=1e-6)
    assert ltk.losses.sade.reversed_prior(COUNTS).tolist() == pytest.approx([0.1, 0.3, 0.6])
    parts = EXPERTS([Z1] * 3, Y2, NN.BalPoE(COUNTS).adjustments(3), reduction="none")[:, 0]
    assert parts.tolist() == pytest.approx([2.104131, 3.584768, 5.230067], abs=1e-6)
    assert NN.BalPoE(COUNTS)([Z1] * 3, Y2).item() == pytest.approx(3.639655, abs=1e-6)


def test_pinned_ride() -> None:
    rows = EXPERTS([Z1, Z2], Y2, coupling="mean_kl", factor=-0.2, reduction="none")[:, 0]
    assert rows[:2].tolist() == pytest.approx([2.104131, 1.180270], abs=1e-6)
    assert rows[2].item() == pytest.approx(-0.2 * (0.085674 + 0.075828), abs=1e-6)
    assert NN.RIDE()([Z1, Z2], Y2).item() == pytest.approx(3.252100, abs=1e-6)
    one = EXPERTS([Z1, (Z1 + Z2) * 100], Y2, coupling="mean_kl", reduction="none")
    assert one.isfinite().all()
    weights = NN.RIDE(COUNTS, class_temperature=True).class_weight
    assert weights.tolist() == pytest.approx([1, 0.956731, 0.927885], abs=1e-6)


def test_pinned_ncl() -> None:
    prior = NN.NCL(COUNTS, hard=3).adjustments(2)
    rows = EXPERTS([Z1, Z2], Y2, prior, coupling="mutual_kl", adjusted=True, reduction="none")[:, 0]
    assert rows.tolist() == pytest.approx([3.584768, 2.260236, 0.307203 + 0.280621], abs=1e-6)
    # All three classes are the hardest: everything comes twice.
    assert NN.NCL(COUNTS, hard=3)([Z1, Z2], Y2).item() == pytest.approx(
        2 * (rows[:2].sum() + 0.6 * rows[2]).item(), abs=1e-6
    )


# ---- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 7), (2, 5, 1), (3, 6, 100), (3, 3, 2100), (8, 3, 33)], ids=str)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_values(coupling, shape, dtype) -> None:
    """Against the formula in float64, with tables of every kind, an ignored row, weights and smoothing."""
    experts, rows, classes = shape
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if coupling == "mutual_kl" and experts == 1:
        return
    z = [each.to(dtype) for each in logits(*shape)]
    y = labels(rows, classes)
    y[1] = -100
    own = torch.linspace(0.5, 2, rows, dtype=torch.float64)
    tables = adjustments(experts, classes, real)
    said = {"factor": -0.3, "label_smoothing": 0.1}
    if coupling != "sum":
        said |= {"temperature": 2.0, "adjusted": experts == 3}
    x = [each.clone().requires_grad_() for each in z]
    loss = EXPERTS(x, y, tables, coupling=coupling, sample_weight=own.to(real), **said)
    assert ltk.explain(EXPERTS, x, y, tables, coupling=coupling).backend != "torch"
    exact = [each.double().requires_grad_() for each in z]
    doubled = [
        t if t is None else t._replace(**{n: v.double() for n, v in t._asdict().items() if isinstance(v, Tensor)})
        for t in tables
    ]
    wanted = plain(exact, y, doubled, coupling, sample_weight=own, **said)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5 if real == torch.float32 else 1e-12)
    found, grads = torch.autograd.grad(loss, x), torch.autograd.grad(wanted, exact)
    for ours, each in zip(found, grads, strict=True):
        assert float((ours.double() - each).norm()) <= CLOSE[dtype] * float(each.norm()) + 1e-7
        assert (ours[1] == 0).all()
    stacked = torch.stack(z).requires_grad_()
    same = EXPERTS(stacked, y, tables, coupling=coupling, sample_weight=own.to(real), **said)
    assert same.item() == loss.item()
    assert torch.equal(torch.autograd.grad(same, stacked)[0], torch.stack(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 33), (3, 5, 100), (3, 4, 2100)], ids=str)
@pytest.mark.parametrize("coupling", ["mean_kl", "mutual_kl"])
@pytest.mark.parametrize("adjusted", [False, True])
def test_one_set_of_exponentials_for_losses_and_coupling(adjusted, coupling, shape, dtype) -> None:
    """Where both see the same logits; a label that towers over all others, and one far below them."""
    experts, rows, classes = shape
    real = torch.float64 if dtype == torch.float64 else torch.float32
    z, y = [each.to(dtype) for each in logits(*shape)], labels(rows, classes)
    z[0][0, y[0]], z[1][1, y[1]] = 900, -50
    tables = [None] * experts
    if adjusted:
        tables = [None if t is None else t._replace(row_scale=None) for t in adjustments(experts, classes, real)]
    said = {"factor": 0.3, "label_smoothing": 0.1, "adjusted": adjusted}
    x, exact = [each.clone().requires_grad_() for each in z], [each.double().requires_grad_() for each in z]
    loss = EXPERTS(x, y, tables, coupling=coupling, **said)
    doubled = [
        t if t is None else t._replace(**{n: v.double() for n, v in t._asdict().items() if isinstance(v, Tensor)})
        for t in tables
    ]
    wanted = plain(exact, y, doubled, coupling, **said)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5 if real == torch.float32 else 1e-12)
    for ours, each in zip(torch.autograd.grad(loss, x), torch.autograd.grad(wanted, exact), strict=True):
        for row, (found, right) in enumerate(zip(ours.double(), each, strict=True)):
            rounding = torch.finfo(real).eps * max(
                float(one[row].detach().abs().max()) for one in exact
            )  # of a log-probability
            assert float((found - right).norm()) <= CLOSE[dtype] * float(right.norm()) + rounding


def test_temperature_of_each_class() -> None:
    z, y, t = logits(3, 4, 9), labels(4, 9), torch.linspace(0.5, 2, 9, dtype=torch.float64)
    x = [each.requires_grad_() for each in z]
    for coupling in ("mean_kl", "mutual_kl"):
        loss = EXPERTS(x, y, coupling=coupling, temperature=t, factor=0.7)
        wanted = plain(x, y, [None] * 3, coupling, temperature=t, factor=0.7)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(wanted, x))


@pytest.mark.parametrize("reduction", ["mean", "batch_mean", "sum", "none"])
def test_no_coupling_is_the_sum_of_the_single_calls_to_the_bit(reduction) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        z, y = [each.float().requires_grad_() for each in logits(3, 64, 1000)], labels(64, 1000)
        tables = adjustments(3, 1000, torch.float32)
        loss = EXPERTS(z, y, tables, reduction=reduction)
        single = [
            CE(a, y, **({} if t is None else t._asdict()), reduction=reduction) for a, t in zip(z, tables, strict=True)
        ]
        wanted = torch.stack(single) if reduction == "none" else single[0] + single[1] + single[2]
        assert torch.equal(loss, wanted)
        ours, exact = (torch.autograd.grad(each.sum(), z, retain_graph=True) for each in (loss, wanted))
        assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_factors_of_the_experts() -> None:
    z, y = [each.requires_grad_() for each in logits(3, 5, 11)], labels(5, 11)
    factors = [0.5, 2.0, 0.0]
    single = [f * CE(a, y) for f, a in zip(factors, z, strict=True)]
    torch.testing.assert_close(EXPERTS(z, y, expert_factors=factors), sum(single))
    coupled = EXPERTS(z, y, coupling="mean_kl", expert_factors=factors, factor=0.3)
    wanted = sum(single) + 0.3 * (plain(z, y, [None] * 3, "mean_kl") - sum(CE(a, y) for a in z))
    torch.testing.assert_close(coupled, wanted)
    torch.testing.assert_close(torch.autograd.grad(coupled, z), torch.autograd.grad(wanted, z))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_rows_and_their_upstream_gradients(coupling) -> None:
    z, y = [each.requires_grad_() for each in logits(3, 5, 11)], labels(5, 11)
    y[0] = -100
    rows = EXPERTS(z, y, coupling=coupling, factor=0.4, reduction="none")
    assert rows.shape == (4, 5)
    assert rows[:, 0].tolist() == [0] * 4
    upstream = torch.randn(4, 5, dtype=torch.float64)
    x = [each.detach().clone().requires_grad_() for each in z]
    exact = ltk.losses._experts.reference(tuple(x), _record(x, y, coupling))[0]
    torch.testing.assert_close(rows, exact)
    torch.testing.assert_close(torch.autograd.grad(rows, z, upstream), torch.autograd.grad(exact, x, upstream))


def _record(z, y, coupling):
    return ltk.losses.experts._checked(z, y, None, coupling, 0.4, reduction="none").fused


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_what_looks_at_a_call_finds_torchs_derivatives(coupling) -> None:
    z, y = [each.requires_grad_() for each in logits(2, 3, 5)], labels(3, 5)

    def call(*given):
        return EXPERTS(list(given), y, coupling=coupling, factor=0.5, temperature=2.0)

    assert torch.autograd.gradcheck(call, z) if coupling != "mean_kl" else True  # its mean is a constant
    wanted = torch.func.grad(call, (0, 1))(*[each.detach() for each in z])
    torch.testing.assert_close(torch.autograd.grad(call(*z), z), wanted)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*z), z), wanted)
    first = torch.autograd.grad(call(*z), z, create_graph=True)
    assert torch.autograd.grad(first[0].square().sum(), z[0])[0].isfinite().all()
    shift = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    table = [ltk.losses.Adjustment(shift=shift), None]
    assert ltk.explain(EXPERTS, z, y, table, coupling=coupling) == ("torch", "gradient with respect to shift")
    assert torch.autograd.grad(EXPERTS(z, y, table, coupling=coupling), shift)[0].abs().max() > 0


def test_masked_classes() -> None:
    z, y = logits(3, 4, 9), labels(4, 8)
    for each in z:
        each[:, 8] = -torch.inf
    left = [each[:, :8].clone() for each in z]
    for coupling in COUPLINGS:
        x = [each.clone().requires_grad_() for each in z]
        loss = EXPERTS(x, y, coupling=coupling)
        torch.testing.assert_close(loss, EXPERTS(left, y, coupling=coupling))
        for grad in torch.autograd.grad(loss, x):
            assert grad.isfinite().all()
            assert (grad[:, 8] == 0).all()
    z[0][:, 8] = 0
    assert EXPERTS(z, y, coupling="mutual_kl").item() == math.inf
    z[0][:] = -torch.inf
    assert all(EXPERTS(z, y, coupling=coupling).isnan() for coupling in COUPLINGS)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_large_offsets_long_rows_threads_and_strides(coupling) -> None:
    z = [(each + torch.linspace(0, 60, 5000) + 2.0**18).float() for each in logits(3, 8, 5000)]
    y = labels(8, 5000)
    exact = [each.double().requires_grad_() for each in z]
    wanted = plain(exact, y, [None] * 3, coupling)
    grads = torch.autograd.grad(wanted, exact)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            x = [each.clone().requires_grad_() for each in z]
            loss = EXPERTS(x, y, coupling=coupling)
            found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    if coupling != "sum":  # a float32 sum of three offsets rounds
        assert found[0][0].item() == pytest.approx(wanted.item(), rel=1e-4)
        for ours, each in zip(found[0][1:], grads, strict=True):
            assert float((ours - each).norm()) <= 1e-4 * float(each.norm())
    strided = [each.t().contiguous().t() for each in z]
    assert torch.equal(EXPERTS(strided, y, coupling=coupling), found[0][0])
    empty = [each[:0] for each in z]
    assert EXPERTS(empty, y[:0], coupling=coupling).isnan()
    assert EXPERTS(empty, y[:0], coupling=coupling, reduction="sum") == 0


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_classes_and_experts_may_be_in_any_order(coupling) -> None:
    z, y, order = logits(3, 4, 40), labels(4, 40), torch.randperm(40)
    moved = EXPERTS([each[:, order] for each in z], order.argsort()[y], coupling=coupling)
    torch.testing.assert_close(moved, EXPERTS(z, y, coupling=coupling), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        EXPERTS(z[::-1], y, coupling=coupling), EXPERTS(z, y, coupling=coupling), rtol=1e-13, atol=0
    )


def test_more_experts_than_the_kernel_has() -> None:
    z, y = [each.requires_grad_() for each in logits(9, 3, 5)], labels(3, 5)
    loss = EXPERTS(z, y, coupling="mutual_kl")
    assert ltk.explain(EXPERTS, z, y, coupling="mutual_kl") == ("torch", "more than 8 experts")
    wanted = plain(z, y, [None] * 9, "mutual_kl")
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(wanted, z))


@pytest.mark.parametrize("masked", [True, False])
def test_hard_classes(masked) -> None:
    z, y, k = [each.requires_grad_() for each in logits(3, 6, 12)], labels(6, 12), 4
    y[2] = -100
    counts = list(range(1, 13))
    loss = NN.NCL(counts, factor=0.6, hard=k, hard_masked=masked)(z, y)
    prior = (torch.tensor(counts).double() / sum(counts)).log().float()
    total = plain(z, y, [ltk.losses.Adjustment(shift=prior)] * 3, "mutual_kl", factor=0.6, adjusted=True)
    rows = []
    for i in [i for i in range(6) if i != 2]:
        others = sorted((j for j in range(12) if j != y[i]), key=lambda j: -z[0][i, j].item())[: k - 1]
        hard = [int(y[i]), *others]
        a = [each[i : i + 1] + prior for each in z]
        if masked:
            rows.append(plain([each[:, hard] for each in a], torch.tensor([0]), [None] * 3, "mutual_kl", factor=0.6))
        else:
            keep = torch.zeros(12).index_fill(0, torch.tensor(hard), 1)
            rows.append(plain([each * keep for each in a], y[i : i + 1], [None] * 3, "mutual_kl", factor=0.6))
    wanted = total + sum(rows) / len(rows)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(wanted, z), rtol=1e-5, atol=1e-7)


# ---- the Modules ------------------------------------------------------------------------------------------------------


def test_reslt_by_hand() -> None:
    counts = [500, 50, 5]
    z, y = [each.requires_grad_() for each in logits(3, 6, 3)], torch.tensor([0, 0, 1, 2, 2, -100])
    own = torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0, 9.0], dtype=torch.float64)
    groups = torch.tensor([[1.0, 1, 1], [0, 1, 1], [0, 0, 1]], dtype=torch.float64)
    for given in (None, own):
        weight = (torch.ones(6).double() if given is None else own)[:5]
        shares = groups[:, y[:5]] * weight
        rows = torch.stack([F.cross_entropy(each[:5], y[:5], reduction="none") for each in z])
        together = F.cross_entropy(sum(z)[:5], y[:5], reduction="none")
        wanted = 0.9 * (rows * shares).sum() / shares.sum() + 0.1 * (together * weight).sum() / weight.sum()
        loss = NN.ResLT(counts, beta=0.9)(z, y, sample_weight=given)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(wanted, z))
    torch.testing.assert_close(NN.ResLT(counts).predict(z), sum(z))


def test_mdcs_by_hand() -> None:
    z, strong, y = logits(3, 5, 3), [each.requires_grad_() for each in logits(3, 5, 4)], labels(5, 3)
    strong = [each[:, :3] for each in strong]
    y[0] = z[0][0].argmax()
    loss = NN.MDCS(COUNTS, factor=0.6, temperature=2.0)
    n = torch.tensor(COUNTS).double()
    weak, other = ([a + t * n.log() for a, t in zip(view, (-0.5, 1.0, 2.5), strict=True)] for view in (z, strong))
    torch.testing.assert_close(loss(z, y), sum(F.cross_entropy(a, y) for a in weak), rtol=1e-6, atol=0)
    wanted = sum(F.cross_entropy(a, y) for a in weak + other) / 2
    assert any(((a.argmax(1) == y) != (b.argmax(1) == y)).any() for a, b in zip(weak, z)), "the prior decides a row"
    for a, b in zip(weak, other, strict=True):
        right = a.argmax(1) == y
        if right.any():
            log_q, log_p = (a[right] / 2).log_softmax(1), (b[right] / 2).log_softmax(1)
            wanted = wanted + 0.6 * 4 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss(z, y, strong), wanted, rtol=1e-6, atol=0)
    nobody = torch.stack([each.argmin(1) for each in z])[0]
    assert loss([z[0]] * 3, nobody, strong).isfinite()
    without = NN.MDCS([6, 3, 0], factor=0.6, temperature=2.0, empty="ignore")
    two = NN.MDCS([6, 3], factor=0.6, temperature=2.0)([a[:, :2] for a in z], y % 2, [b[:, :2] for b in strong])
    torch.testing.assert_close(without(z, y % 2, strong), two)


def test_ride_with_a_base_loss_and_class_temperatures() -> None:
    z, y = [each.requires_grad_() for each in logits(2, 5, 3)], labels(5, 3)
    base = ltk.adjustments.ldam(COUNTS, s=3.0)
    ride = NN.RIDE(COUNTS, factor=-0.45, temperature=1.5, class_temperature=True, base=base)
    temperature = 1.5 * ride.class_weight.double()
    wanted = plain(z, y, [base] * 2, "mean_kl", factor=-0.45, temperature=temperature)
    torch.testing.assert_close(ride(z, y), wanted, rtol=1e-6, atol=0)
    ride.class_temperature = False
    torch.testing.assert_close(
        ride(z, y), plain(z, y, [base] * 2, "mean_kl", factor=-0.45, temperature=1.5), rtol=1e-6, atol=0
    )


MODULES = {
    "SADE": lambda: NN.SADE(COUNTS),
    "BalPoE": lambda: NN.BalPoE(COUNTS),
    "RIDE": lambda: NN.RIDE(COUNTS, class_temperature=True, base=ltk.adjustments.ldam(COUNTS)),
    "NCL": lambda: NN.NCL(COUNTS, hard=2),
    "ResLT": lambda: NN.ResLT([600, 30, 1]),
    "MDCS": lambda: NN.MDCS(COUNTS),
}


@pytest.mark.parametrize("name", MODULES)
def test_tables_of_modules_keep_their_dtype_and_travel(name) -> None:
    z, y = logits(3, 5, 3), labels(5, 3)
    loss = MODULES[name]()
    value = loss(z, y)
    assert torch.equal(loss.half()(z, y), value)
    fresh = MODULES[name]()
    for table in fresh.buffers():
        table.zero_()
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh(z, y), value)
    assert loss.predict(z).shape == (5, 3)
    assert torch.equal(loss.predict(torch.stack(z)), loss.predict(z))
    order = torch.tensor([2, 0, 1])
    if name not in ("RIDE",):
        counts = {"ResLT": [600, 30, 1]}.get(name, COUNTS)
        options = {"hard": 2} if name == "NCL" else {}
        moved = getattr(NN, name)([counts[j] for j in order], **options)
        torch.testing.assert_close(moved([each[:, order] for each in z], order.argsort()[y]), value, rtol=1e-12, atol=0)


def test_equal_counts_share_a_reversed_prior() -> None:
    found = ltk.losses.sade.reversed_prior([5, 5, 1, 1])
    assert found.tolist() == pytest.approx([1 / 12, 1 / 12, 5 / 12, 5 / 12])
    assert ltk.losses.sade.reversed_prior([5, 5, 1]).tolist() == pytest.approx([3 / 11, 3 / 11, 5 / 11])


def test_classes_without_samples() -> None:
    z, y = logits(3, 4, 3), torch.tensor([0, 1, 0, 1])
    for name, build in (("SADE", NN.SADE), ("BalPoE", NN.BalPoE), ("MDCS", NN.MDCS)):
        with pytest.raises(ValueError, match="class_counts is 0 for class 2"):
            build([6, 3, 0])
        loss = build([6, 3, 0], empty="ignore")
        assert loss(z, y).isfinite(), name
        assert loss.shift[1, 2] == -torch.inf


def test_expert_weights_prefer_the_expert_that_is_sure_of_both_views() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (400,), generator=generator)
    right = 4.0 * F.one_hot(y, 4)
    noise = [3 * torch.randn(2, 400, 4, generator=generator) for _ in range(2)]
    views = [torch.stack([right, *noise[v]]) for v in range(2)]
    w = ltk.inference.expert_weights(*views)
    assert w.shape == (3,)
    assert w.sum().item() == pytest.approx(1)
    assert w[0] > 0.5
    assert w.min() >= 0.05
    assert torch.equal(ltk.inference.expert_weights(*views), w)
    wide = ltk.inference.expert_weights(views[0].double(), views[1].float())  # views of two dtypes
    torch.testing.assert_close(wide, w, rtol=1e-3, atol=1e-3)
    mixed = NN.SADE([4, 3, 2, 1]).predict(views[0], w)
    torch.testing.assert_close(mixed, torch.einsum("e,enc->nc", w.float(), views[0]))
    assert (mixed.argmax(1) == y).float().mean() > (views[0].mean(0).argmax(1) == y).float().mean()


# ---- bad input --------------------------------------------------------------------------------------------------------

Z, Y = [torch.randn(4, 5) for _ in range(2)], torch.tensor([0, 1, 2, 3])
BAD = ltk.losses.Adjustment(shift=torch.tensor([0.0, math.nan, 0, 0, 0]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EXPERTS([], Y), ValueError, "logits is empty; there must be at least one expert"),
        (lambda: EXPERTS(torch.empty(0, 4, 5), Y), ValueError, r"logits has shape \(0, 4, 5\); there must be at least"),
        (lambda: EXPERTS(Z[0], Y), ValueError, r"logits has shape \(4, 5\); it must be \(E, N, C\)"),
        (lambda: EXPERTS([Z[0], Z[1][:3]], Y), ValueError, r"logits\[1\] has shape \(3, 5\)"),
        (lambda: EXPERTS([Z[0], Z[1].double()], Y), ValueError, r"logits\[1\] is torch.float64"),
        (lambda: EXPERTS([1.0], Y), TypeError, "logits is list"),
        (lambda: EXPERTS(Z, Z[0].softmax(1)), TypeError, "target has dtype torch.float32; experts take class indices"),
        (lambda: EXPERTS(Z, [0]), TypeError, "target is list"),
        (lambda: EXPERTS(Z, Y[:3]), ValueError, r"target has shape \(3,\)"),
        (lambda: EXPERTS(Z, Y + 3, coupling="sum"), ValueError, "target has label 5 in row 2"),
        (lambda: EXPERTS(Z, Y, coupling="kl"), ValueError, "coupling is 'kl'; it must be one of 'none', 'mean_kl'"),
        (lambda: EXPERTS(Z, Y, [None]), ValueError, "adjustments has 1 entries; there are 2 experts"),
        (lambda: EXPERTS(Z, Y, BAD), TypeError, "adjustments is one Adjustment"),
        (lambda: EXPERTS(Z, Y, [None, 3]), TypeError, r"adjustments\[1\] is int"),
        (lambda: EXPERTS(Z, Y, [None, BAD], coupling="sum"), ValueError, r"adjustments\[1\]: shift\[1\] is nan"),
        (
            lambda: EXPERTS(Z, Y, [None, ltk.losses.Adjustment(scale=torch.ones(4))], coupling="sum"),
            ValueError,
            r"adjustments\[1\].scale has shape \(4,\)",
        ),
        (lambda: EXPERTS(Z, Y, [ltk.adjustments.seesaw([1] * 5)] * 2, coupling="sum"), ValueError, "has term, which"),
        (lambda: EXPERTS(Z, Y, expert_factors=[1.0]), ValueError, "expert_factors has 1 entries"),
        (lambda: EXPERTS(Z, Y, factor=math.nan), ValueError, "factor is nan"),
        (lambda: EXPERTS(Z, Y, joint=BAD), ValueError, "joint is given; it belongs to coupling='sum'"),
        (lambda: EXPERTS(Z, Y, adjusted=True), ValueError, "adjusted is True; it belongs to a KL"),
        (lambda: EXPERTS(Z, Y, temperature=0.0), ValueError, "temperature is 0.0; it must be above 0"),
        (lambda: EXPERTS(Z, Y, temperature=-torch.ones(5)), ValueError, r"temperature\[0\] is -1.0"),
        (lambda: EXPERTS(Z, Y, hard=6), ValueError, "hard is 6; it must be from 1 to the number of classes, 5"),
        (lambda: EXPERTS(Z, Y, hard=2, coupling="sum"), ValueError, "hard is given; the coupling 'sum'"),
        (
            lambda: EXPERTS(Z, Y, [ltk.losses.Adjustment(margin=torch.ones(5))] * 2, hard=2),
            ValueError,
            r"hard is given, and adjustments\[0\] has margin",
        ),
        (
            lambda: EXPERTS(Z, Y, coupling="sum", sample_weight=torch.tensor([1, 1, math.inf, 1])),
            ValueError,
            "^sample_weight is inf in row 2",
        ),
        (lambda: NN.SADE(COUNTS)(Z, Y), ValueError, "logits are of 2 experts; SADE was made for 3"),
        (lambda: NN.SADE(COUNTS)(Z[0], Y), ValueError, r"logits has shape \(4, 5\); it must be \(E, N, C\)"),
        *[
            (
                lambda loss=loss: loss([Z[0]] * 3, Y),
                ValueError,
                "logits are of 5 classes; .* was made for 3",
            )
            for loss in (NN.SADE(COUNTS), NN.BalPoE(COUNTS), NN.RIDE(COUNTS), NN.NCL(COUNTS, hard=2), NN.ResLT(COUNTS))
        ],
        (lambda: NN.NCL(COUNTS), ValueError, "hard is 30; it must be from 1 to the number of classes, 3"),
        (lambda: NN.RIDE(class_temperature=True), ValueError, "class_counts is None"),
        (lambda: NN.ResLT(COUNTS, reduction="none"), ValueError, "ResLT has its own denominators"),
        (lambda: NN.BalPoE(COUNTS, ()), ValueError, "tau is empty"),
        (lambda: NN.MDCS(COUNTS, ()), ValueError, "tau is empty"),
        (lambda: NN.ResLT(COUNTS, many=5), ValueError, r"few is 20; it must be at most many \(5\)"),
        (lambda: NN.ResLT(COUNTS, few="a"), TypeError, "few is 'a'"),
        (lambda: ltk.inference.expert_weights(Z, Z[:1]), ValueError, r"second_view has shape \(1, 4, 5\)"),
        (lambda: ltk.inference.expert_weights(Z, Z, epochs=0), ValueError, "epochs is 0"),
    ],
)
def test_message(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
