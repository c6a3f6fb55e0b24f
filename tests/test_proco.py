"""Promise: ProCo's logits are those of exact Bessel functions, in every dtype and for every width; its statistics are those of the samples
that it saw; and a loss of a batch needs no more memory than its cosines."""

from __future__ import annotations

import copy
import math
from typing import Any

import contract
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels.losses import _terms

CE = ltk.functional.adjusted_cross_entropy
HEAD = ltk.functional.linear_adjusted_cross_entropy
PI = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
KAPPA = torch.tensor([200.0, 50.0, 10.0], dtype=torch.float64)
COSINES = torch.tensor([[0.8, 0.3, -0.2]], dtype=torch.float64)


def log_bessel(order: float, x: float) -> float:
    """log(I_order(x) / x^order) by its power series, whose terms are all positive; about 1e-16 of the largest logarithm in it."""
    middle = (math.sqrt(order * order + x * x) - order) / 2  # where the terms are largest
    width = 12 * math.sqrt(middle + 40) + 60
    m = torch.arange(max(0, int(middle - width)), int(middle + width) + 1, dtype=torch.float64)
    logs = 2 * m * (math.log(x / 2) if x > 0 else 0) - torch.lgamma(m + 1) - torch.lgamma(m + order + 1)
    logs = logs if x > 0 else logs[:1]
    return float(torch.logsumexp(logs, 0)) - order * math.log(2)


def exact_logit(kappa: float, cosine: float, p: int, tau: float) -> float:
    """log C_p(kappa) - log C_p(kt), as C_p(k) = k^nu / (2 pi)^(p/2) / I_nu(k)."""
    kt = math.sqrt(max(0.0, kappa * kappa + 1 / tau**2 + 2 * kappa * cosine / tau))
    return log_bessel(p / 2 - 1, kt) - log_bessel(p / 2 - 1, kappa)


def logits_of(cosines: Tensor, kappa: Tensor, p: float, tau: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """g by the kernel: its loss against a class that is not a form's, so that a difference of losses is a difference of logits."""
    term = ltk.adjustments.vmf(kappa, p, tau).term
    table = _terms.vmf_constants(term.table, p).reshape(-1).to(dtype)
    return _terms.vmf_logits(cosines.to(dtype), term._replace(table=table))


def test_the_numbers_of_the_specification() -> None:
    g = logits_of(COSINES, KAPPA, 128, 0.1)
    assert g[0].tolist() == pytest.approx([5.948129, 1.367669, 0.232572], abs=1e-6)
    one = logits_of(torch.tensor([[0.5]]).double(), torch.tensor([50.0]).double(), 128, 0.1)
    assert one.item() == pytest.approx(2.043225, abs=1e-6)
    for backend in ("cpu", "torch"):
        found = CE(
            COSINES.repeat(3, 1), torch.arange(3), shift=PI.log(), term=ltk.adjustments.vmf(KAPPA, 128).term, reduction="none",
            backend=backend,
        )  # fmt: skip
        assert found.tolist() == pytest.approx([0.005658, 5.279265, 7.512974], abs=1e-6)


@pytest.mark.parametrize(("p", "error"), [(128, 1.2e-9), (129, 1.2e-9), (256, 1e-10), (1024, 1e-11), (16, 5e-6)])
def test_against_exact_bessel_functions(p, error) -> None:
    """Beside the expansion's error, the series' own rounding counts: some 1e-16 of logarithms that grow with kappa."""
    for kappa in (0.0, 1e-3, 1.0, 30.0, 300.0, 5e3, 1e5):
        for cosine in (-1.0, -0.3, 0.0, 0.7, 1.0):
            for tau in (0.07, 0.1, 0.5):
                found = logits_of(
                    torch.tensor([[cosine]], dtype=torch.float64), torch.tensor([kappa], dtype=torch.float64), p, tau
                ).item()
                wanted = exact_logit(kappa, cosine, p, tau)
                assert found == pytest.approx(
                    wanted, abs=error + 4e-15 * max(kappa, 100) * math.log(max(kappa, 10)) ** 2
                ), (kappa, cosine, tau)


def test_slope_and_limit() -> None:
    """d g / d cos = kappa A(kt) / (tau kt), A the ratio of Bessel functions; of a class in one point, g is cos / tau."""
    for kappa, cosine in ((0.5, 0.2), (50.0, 0.5), (2000.0, -0.6)):
        at = torch.tensor([[cosine]], dtype=torch.float64, requires_grad=True)
        logits_of(at, torch.tensor([kappa], dtype=torch.float64), 128, 0.1).backward()
        kt = math.sqrt(kappa**2 + 100 + 20 * kappa * cosine)
        ratio = kt * math.exp(log_bessel(64, kt) - log_bessel(63, kt))
        assert at.grad is not None
        assert at.grad.item() == pytest.approx(kappa * ratio / (0.1 * kt), rel=1e-8), (kappa, cosine)
    far = logits_of(COSINES, torch.full((3,), 1e12, dtype=torch.float64), 128, 0.1)
    assert far[0].tolist() == pytest.approx([8, 3, -2], abs=1e-6)


@pytest.mark.parametrize("p", [16, 128, 1024])
def test_the_kernel_is_as_good_as_its_floats(p) -> None:
    """float32 logits from the kernel against the formula in float64; both small and large kappa and temperatures."""
    kappa = torch.tensor([0.0, 1e-3, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5])
    cosines = torch.linspace(-1, 1, 41)[:, None].repeat(1, len(kappa) + 1)
    for tau in (0.02, 0.07, 0.1, 0.5):
        wanted = logits_of(cosines[:, :-1].double(), kappa.double(), p, tau)
        # The last class is kappa = 0, whose logit is a constant: log p_j - log p_last = g_j - g_last.
        own = torch.cat([kappa, kappa[:1]])
        term = ltk.adjustments.vmf(own, p, tau).term
        columns = []
        for j in range(len(own)):
            columns.append(CE(cosines, torch.full((41,), j), term=term, reduction="none"))
        found = columns[-1][:, None] - torch.stack(columns[:-1], 1) + wanted[:, :1]
        scale = 4e-6 + 2e-6 * float(wanted.abs().max())
        assert (found - wanted).abs().max() < scale, (tau, (found - wanted).abs().max())


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_values(dtype, shifted) -> None:
    """Loss and gradient against torch's derivatives of the formula in float64: every reduction, weights, smoothing, ignored rows."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    rows = 19
    for classes in (5, 100, 2100):
        generator = torch.Generator().manual_seed(classes)
        z = (torch.rand(rows, classes, generator=generator) * 2 - 1).to(dtype)
        y = torch.randint(0, classes, (rows,), generator=generator)
        y[5] = -100
        kappa = torch.rand(classes, generator=generator).double() ** 3 * 1e3
        kappa[0] = 0
        term = ltk.adjustments.vmf(kappa.to(real), 64, 0.1).term
        options: dict[str, Any] = {"weight": torch.rand(classes, generator=generator) + 0.5, "label_smoothing": 0.1}
        if shifted:
            options["shift"] = torch.randn(classes, generator=generator)
        options["sample_weight"] = torch.linspace(0.5, 2, rows)
        options = {name: value.to(real) if isinstance(value, Tensor) else value for name, value in options.items()}
        wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
        for reduction in contract.REDUCTIONS:
            up = torch.linspace(0.5, 2, rows) if reduction == "none" else torch.tensor(0.25)
            loss, grad = contract.gradient(CE, z, y, up, reduction=reduction, term=term, **options)
            exact = z.double().requires_grad_()
            g = logits_of(exact, term.table.double(), 64, 0.1)
            wanted = CE(g, y, reduction=reduction, backend="torch", **wide)
            (slopes,) = torch.autograd.grad(wanted, exact, up.double().expand_as(wanted))
            near = {torch.float64: 1e-11}.get(dtype, 2e-5)
            rounding = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, near)
            torch.testing.assert_close(loss.double(), wanted.detach(), rtol=near, atol=near)
            torch.testing.assert_close(
                grad.double(), slopes, rtol=rounding + near, atol=near * float(slopes.abs().max())
            )


def call(z: Tensor, y: Any, **common: Any) -> Tensor:
    kappa = torch.linspace(0, 300, z.shape[1], dtype=torch.float64)
    return CE(
        z, y, term=ltk.adjustments.vmf(kappa, 32).term, shift=torch.linspace(0, -3, z.shape[1]).to(kappa), **common
    )


def test_contract() -> None:
    z, y = contract.cosines(8, 21), contract.labels(8, 21)
    contract.check_autograd(call, z, y)
    for reduction in contract.REDUCTIONS:
        a, b = (contract.gradient(call, z, y, backend=x, reduction=reduction) for x in ("cpu", "torch"))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    contract.check_threads(call, contract.cosines(300, 21), torch.arange(300) % 21)
    mixed = (y, (y + 1).clamp(min=0) % 21, 0.3)
    assert "von Mises-Fisher" in str(
        ltk.explain(CE, z, mixed, term=ltk.adjustments.vmf(torch.ones(21).double(), 32).term)
    )
    kept = (y != -100).double()
    blend = 0.3 * call(z, y, reduction="none") + 0.7 * call(z, torch.where(y == -100, y, mixed[1]), reduction="none")
    torch.testing.assert_close(call(z, mixed, reduction="none"), blend * kept)
    table = _terms.vmf_constants(torch.rand(5) * 9, 32).reshape(-1).float()
    contract.check_operator(_terms.FORMS.index("vmf"), table, None, [32.0, 0.1, 0.0])
    leaf = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: call(z, torch.tensor([0, 3, -100]), backend="torch"), (leaf,))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(contract.gradient(compiled, z, y), contract.gradient(call, z, y))


def test_bad_input() -> None:
    for kappa, message in (([1.0, -1.0], r"kappa\[1\] is -1.0"), ([math.nan, 1.0], r"kappa\[0\] is nan")):
        with pytest.raises(ValueError, match=message):
            ltk.adjustments.vmf(torch.tensor(kappa), 8)
    with pytest.raises(TypeError, match="kappa is list"):
        ltk.adjustments.vmf([1.0], 8)
    with pytest.raises(ValueError, match="features is 2"):
        ltk.adjustments.vmf(torch.ones(2), 2)
    with pytest.raises(ValueError, match="tau is 0"):
        ltk.adjustments.vmf(torch.ones(2), 8, 0)
    form = ltk.adjustments.vmf(torch.ones(3), 8)
    with pytest.raises(ValueError, match=r"kappa has shape \(3,\); it must be \(2,\)"):
        CE(torch.zeros(1, 2), torch.zeros(1).long(), term=form.term)
    with pytest.raises(ValueError, match="margin cannot be combined with the closed form 'vmf'"):
        CE(torch.zeros(1, 3), torch.zeros(1).long(), term=form.term, margin=torch.zeros(3))
    loss = ltk.nn.ProCo([3, 2, 1], 8)
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    state = copy.deepcopy(loss.state_dict())
    for features, target, message in (
        (x[:, :7], y, r"features has shape \(4, 7\); it must be \(4, 8\)"),
        ([x, x[:3]], y, r"features\[1\] has shape \(3, 8\)"),
        (x, torch.tensor([0, 1, 3, 0]), "label 3 in row 2"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(features, target)
    for features, target, message in (
        ([], y, "features is empty"),
        ("x", y, "features is str"),
        (x, y.float(), "target is .* it must hold class indices"),
    ):
        with pytest.raises(TypeError, match=message):
            loss(features, target)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), loss.state_dict().values(), strict=True))
    for options, message in (
        ({"features": 2}, "features is 2"),
        ({"features": 8.0}, "features is 8.0"),
        ({"features": 8, "tau": -1.0}, "tau is -1.0"),
        ({"features": 8, "process_group": "all"}, "process_group is 'all'"),
        ({"features": 8, "reduction": "avg"}, "reduction is 'avg'"),
    ):
        with pytest.raises(ValueError, match=message):
            ltk.nn.ProCo([3, 2, 1], **options)
    with pytest.raises(ValueError, match="class_counts is 0 for class 1"):
        ltk.nn.ProCo([3, 0, 1], 8)


# ---- the Module -------------------------------------------------------------------------------------------------------


def estimate(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Directions and concentrations of samples, from the paper's equations."""
    p = x.shape[1]
    unit = F.normalize(x.double(), dim=1)
    mean = torch.stack([unit[y == c].mean(0) for c in range(classes)])
    length = mean.norm(dim=1)
    return mean / length[:, None], (p * length / (1 - length**2)).clamp(max=1e5)


def test_statistics_are_those_of_two_epochs() -> None:
    torch.manual_seed(0)
    loss = ltk.nn.ProCo([6, 3, 1], 128)
    torch.testing.assert_close(loss.kappa, torch.full((3,), 90 * 128 / 19))
    torch.testing.assert_close(loss.direction.norm(dim=1), torch.ones(3))
    start = loss.direction.clone()
    epochs = [[(torch.randn(10, 128) + 1, torch.randint(0, 2, (10,))) for _ in range(3)] for _ in range(3)]
    seen: list[tuple[Tensor, Tensor]] = []
    for number, epoch in enumerate(epochs):
        last = seen if number == 0 else epochs[number - 1]
        for at, (x, y) in enumerate(epoch):
            loss(x, y)
            x, y = (torch.cat(each) for each in zip(*last, *epoch[: at + 1], strict=True))
            direction, kappa = estimate(x, y, 2)
            torch.testing.assert_close(loss.direction[:2].double(), direction, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(loss.kappa[:2].double(), kappa, rtol=1e-6, atol=0)
        loss.next_epoch()
    assert torch.equal(loss.direction[2], start[2]), "nothing is known of class 2"
    assert loss.kappa[2] == pytest.approx(90 * 128 / 19)
    # R .5 gives kappa 85.33, R .9 606.3 at 128 features; one sample alone, the largest.
    for length, wanted in ((0.5, 85.3333), (0.9, 606.3158), (1.0, 1e5)):
        angle = math.acos(length)
        x = torch.zeros(2, 128)
        x[:, 0], x[0, 1], x[1, 1] = length, math.sin(angle), -math.sin(angle)
        fresh = ltk.nn.ProCo([6, 3, 1], 128)
        fresh(x, torch.tensor([1, 1]))
        assert fresh.kappa[1].item() == pytest.approx(wanted, rel=1e-5)


def test_loss_is_the_heads() -> None:
    torch.manual_seed(1)
    loss = ltk.nn.ProCo([6, 3, 1], 128)
    one, two, y = torch.randn(5, 128), torch.randn(5, 128), torch.tensor([0, 2, 1, -100, 0])
    loss([one, two], y)
    loss.eval()
    g = [
        logits_of(F.normalize(x.double()) @ loss.direction.double().T, loss.kappa.double(), 128, 0.1) + PI.log()
        for x in (one, two)
    ]
    rows = torch.stack([F.cross_entropy(each, y, reduction="none") for each in g]).mean(0)
    for reduction, wanted in (("mean", rows.sum() / 4), ("sum", rows.sum()), ("none", rows)):
        loss.reduction = reduction
        torch.testing.assert_close(loss([one, two], y).double(), wanted, rtol=1e-5, atol=1e-5)
    loss.reduction = "mean"
    leaf = one.clone().requires_grad_()
    loss([leaf, two], y).backward()
    wide = one.double().requires_grad_()
    exact = logits_of(F.normalize(wide) @ loss.direction.double().T, loss.kappa.double(), 128, 0.1) + PI.log()
    (F.cross_entropy(exact, y) / 2).backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)
    assert "cpu" in ltk.explain(loss, [one, two], y).backend


def test_state_and_what_stays_out_of_it() -> None:
    torch.manual_seed(2)
    loss = ltk.nn.ProCo([6, 3, 0], 16, empty="ignore")
    x, y = torch.randn(8, 16), torch.tensor([0, 1, 0, 1, -100, 0, 1, 1])
    spoilt = x.clone()
    spoilt[2] = math.nan
    loss(spoilt, y)
    clean = copy.deepcopy(loss)
    assert loss.seen.tolist() == [2, 4, 0]
    assert torch.isfinite(loss.direction).all()
    again = ltk.nn.ProCo([6, 3, 0], 16, empty="ignore")
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again(x, y), loss(x, y))
    for a, b in zip(again.buffers(), loss.buffers(), strict=True):
        assert torch.equal(a, b)
    clean.eval()
    before = clean.state_dict()["sums"].clone()
    clean(x, y)
    assert torch.equal(clean.sums, before)
    assert torch.isfinite(clean(x, y))  # a class without samples has probability 0
    half = copy.deepcopy(clean).half()
    assert half(x.half(), y).dtype == torch.float32


def test_two_batches_before_one_backward() -> None:
    torch.manual_seed(5)
    loss = ltk.nn.ProCo([6, 3, 1], 16)
    again = copy.deepcopy(loss)
    x, y = torch.randn(8, 16, requires_grad=True), torch.arange(8) % 3
    wanted = [torch.autograd.grad(again(x * k, y), x)[0] for k in (1, -1)]
    (loss(x, y) + loss(-x, y)).backward()
    torch.testing.assert_close(x.grad, sum(wanted))


def test_merged_statistics_start_it() -> None:
    torch.manual_seed(3)
    x, y = F.normalize(torch.randn(40, 8) + 0.5), torch.arange(40) % 3
    parties = [ltk.diversity.ClassStatistics(8, 3).update(x[at], y[at]) for at in (slice(0, 15), slice(15, 40))]
    loss = ltk.nn.ProCo([14, 13, 13], 8)
    loss.start_from(parties[0].merge(parties[1]))
    direction, kappa = estimate(x, y, 3)
    torch.testing.assert_close(loss.direction.double(), direction, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.kappa.double(), kappa, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="statistics are of 3 classes and 8 features"):
        ltk.nn.ProCo([1, 1], 8).start_from(parties[0])


def test_threads_give_the_same_bits() -> None:
    torch.manual_seed(4)
    start = ltk.nn.ProCo([50] * 40, 64)
    x, y = torch.randn(300, 64), torch.randint(0, 40, (300,))
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        loss = copy.deepcopy(start)
        value = loss(x, y)
        found.append((value, loss.direction, loss.kappa, loss.sums))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_array_is_larger_than_a_chunk_of_cosines(monkeypatch) -> None:
    """Nothing of B x C x p, and with many classes not even B x C."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for each in found if isinstance(found, tuple | list) else [found]:
                if isinstance(each, Tensor) and not each._is_view():
                    largest = max(largest, each.untyped_storage().nbytes() // each.element_size())
            return found

    loss = ltk.nn.ProCo([5] * 5000, 32)
    x, y = torch.randn(2048, 32, requires_grad=True), torch.arange(2048)
    with Watch():
        loss(x, y).backward()
    assert largest < 2048 * 5000 // 2, largest
