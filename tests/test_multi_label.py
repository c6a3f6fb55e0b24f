"""Promise: the general sigmoid loss is its formula, of class indices and of multi-label targets, with every table, and says what it cannot
take."""

from __future__ import annotations

import math
from typing import Any

import contract
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ltkernels as ltk
from ltkernels.losses._sigmoid import _FUSED, SigmoidCall

SIGMOID = ltk.functional.sigmoid_cross_entropy
CE = ltk.functional.adjusted_cross_entropy
TABLES = ("scale", "shift", "positive", "negative")
KINDS = (torch.bool, torch.uint8, torch.float32, torch.int64)


def tables(classes: int, real: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    found = {name: (torch.rand(classes, generator=generator) + 0.5).to(real) for name in TABLES}
    found["shift"] -= 1.0
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tables": dict.fromkeys(TABLES, True),
    "threshold": {"threshold": 0.4, "scale": True},
    "focal": {"focal_gamma": 1.5, "negative": True, "shift": True},
    "balanced": {"rebalance": True, "rebalance_map": (0.1, 10.0, 0.2), "negative_scale": 2.0, "shift": True},
    "all": {
        **dict.fromkeys(TABLES, True),
        "threshold": 0.3,
        "focal_gamma": 0.5,
        "rebalance": True,
        "rebalance_map": (0.3, 4.0, 0.5),
        "negative_scale": 1.5,
    },
}


def chosen(name: str, classes: int, real: torch.dtype) -> dict[str, Any]:
    own = {**tables(classes, real), "rebalance": (1 / torch.arange(1, classes + 1, dtype=torch.float64)).to(real)}
    return {key: own[key] if value is True else value for key, value in OPTIONS[name].items()}


def exact(z: Tensor, hot: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses, gradients and statistics (2, C), float64, entry by entry; -1 in `hot` is ignored."""
    rows, classes = z.shape
    one = torch.ones(classes, dtype=torch.float64)
    beta, delta, pos, neg = (
        options[name].double() if name in options else fallback
        for name, fallback in zip(TABLES, (one, 0 * one, one, one), strict=True)
    )
    gamma, lam, theta = (
        options.get("focal_gamma", 0.0),
        options.get("negative_scale", 1.0),
        options.get("threshold", 0.0),
    )
    q, (base, steep, centre) = options.get("rebalance"), options.get("rebalance_map", (0.0, 0.0, 0.0))
    losses, grads, sums = (
        torch.zeros(rows).double(),
        torch.zeros(rows, classes).double(),
        torch.zeros(2, classes).double(),
    )
    for i in range(rows):
        share = math.inf if q is None else sum(float(q[j]) for j in range(classes) if hot[i, j] == 1)
        for j in range(classes):
            if hot[i, j] == -1:
                continue
            positive = hot[i, j] == 1
            a = float(beta[j]) * float(z[i, j]) + float(delta[j])
            x = -a if positive else lam * a
            e = math.exp(-abs(x))
            bce, p, other = max(x, 0.0) + math.log1p(e), (1 if x > 0 else e) / (1 + e), (e if x > 0 else 1) / (1 + e)
            slope = p**gamma * (p + gamma * other * bce)
            factor = float(pos[j]) if positive else float(neg[j])
            if not positive and theta and 1 / (1 + math.exp(-a)) < theta:
                factor = 0.0
            if q is not None:
                r = float(q[j]) / share if share else math.inf
                factor *= base + (1.0 if r == math.inf else 1 / (1 + math.exp(-steep * (r - centre))))
            losses[i] += factor * p**gamma * bce
            along = -slope if positive else lam * slope
            grads[i, j] = factor * along * float(beta[j])
            sums[0 if positive else 1, j] += factor * abs(along)
    return losses, grads, sums


def drawn(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(rows, classes, generator=generator) * 3
    hot = (torch.rand(rows, classes, generator=generator) < 0.2).float()
    hot[1] = 0  # a row without positives
    hot[:, 0] = 0  # a class without
    return z, hot


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_values(dtype, name) -> None:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for rows, classes in ((5, 1), (19, 10), (7, 37)):
        z, hot = drawn(rows, classes)
        hot[3, 0] = hot[4] = -1  # an entry; a row
        z = z.to(dtype)
        z[4] = torch.nan
        options = chosen(name, classes, real)
        if "threshold" in options:  # an entry on the threshold's edge may fall on either side
            a = z.double() * options["scale"].double() + (options["shift"].double() if "shift" in options else 0)
            edge = math.log(options["threshold"] / (1 - options["threshold"]))
            z = torch.where((a - edge).abs() < 0.05, z + 0.5, z)
        losses, grads, sums = exact(z, hot, options)
        own = torch.linspace(0.5, 2.0, rows, dtype=real)
        valid = (hot != -1).any(1)
        weights = torch.where(valid, own.double(), 0)
        eps = {torch.float64: 1e-12, torch.float32: 4e-6}[real]
        rounding = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, eps)
        for reduction in contract.REDUCTIONS:
            leaf = z.clone().requires_grad_()
            loss, found = SIGMOID(leaf, hot, reduction=reduction, sample_weight=own, statistics=True, **options)
            assert loss.dtype == found.dtype == real
            over = {"mean": weights.sum(), "batch_mean": valid.sum(), "sum": 1.0, "none": 1.0}[reduction]
            wanted = losses * weights if reduction == "none" else (losses * weights).sum() / over
            torch.testing.assert_close(loss.double(), wanted, rtol=eps, atol=eps)
            torch.testing.assert_close(found.double(), sums, rtol=eps, atol=eps)
            up = torch.linspace(-1, 1, rows) if reduction == "none" else torch.tensor(0.25)
            loss.backward(up.to(real))
            wanted = grads * (weights / over * up.double())[:, None]
            assert leaf.grad.dtype == dtype
            torch.testing.assert_close(
                leaf.grad.double(), wanted, rtol=rounding, atol=rounding * float(wanted.abs().max())
            )
            assert not leaf.grad[4].any()


@pytest.mark.parametrize("name", OPTIONS)
def test_class_indices_are_one_hot_targets(name) -> None:
    z, _ = drawn(12, 37)
    y = torch.arange(12) * 5 % 37
    y[3] = -100
    hot = F.one_hot(y.clamp(min=0), 37).float()
    hot[3] = -1
    options = chosen(name, 37, torch.float64)
    for backend in ("cpu", "torch"):
        for reduction in contract.REDUCTIONS:
            one, two = (
                contract.gradient(SIGMOID, z.double(), t, reduction=reduction, backend=backend, **options)
                for t in (y, hot)
            )
            torch.testing.assert_close(one[0], two[0], rtol=1e-12, atol=0)
            torch.testing.assert_close(one[1], two[1], rtol=1e-12, atol=1e-15)
        sums = [SIGMOID(z.double(), t, statistics=True, backend=backend, **options)[1] for t in (y, hot)]
        torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["plain", "tables", "threshold", "focal"])
def test_the_closed_form_of_the_op_is_this_loss(name) -> None:
    """`adjusted_cross_entropy` with a term, forced on either back end; and with a multi-label target it hands on."""
    z, hot = drawn(12, 37)
    z = z.double()
    y = torch.arange(12) * 5 % 37
    y[3] = -100
    options = chosen(name, 37, torch.float64)
    own = {"positive": torch.ones(37).double(), "negative": torch.ones(37).double(), **options}
    term = ltk.losses.Term(
        "sigmoid", torch.stack([own["negative"], own["positive"]]), None, (options.get("threshold", 0.0), 0, 0)
    )
    common = {key: options[key] for key in ("scale", "shift", "focal_gamma") if key in options}
    alpha = torch.linspace(0.5, 2, 37).double()
    for reduction in contract.REDUCTIONS:
        wanted = contract.gradient(SIGMOID, z, y, weight=alpha, reduction=reduction, backend="torch", **options)
        for backend in ("cpu", "torch"):
            found = contract.gradient(CE, z, y, term=term, weight=alpha, reduction=reduction, backend=backend, **common)
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
        found = contract.gradient(CE, z, hot, term=term, reduction=reduction, **common)
        torch.testing.assert_close(found, contract.gradient(SIGMOID, z, hot, reduction=reduction, **options))
    head = torch.randn(37, 6).double()
    x = torch.randn(12, 6).double()
    found = ltk.functional.linear_adjusted_cross_entropy(
        x, head, y, term=term, class_weight=alpha, chunk_rows=5, **common
    )
    torch.testing.assert_close(found, SIGMOID(x @ head.T, y, weight=alpha, **options), rtol=1e-12, atol=0)


def test_torchs_own_loss_is_a_special_case() -> None:
    z, hot = drawn(20, 33)
    pos, column = torch.rand(33) + 0.5, torch.rand(33) + 0.5
    wanted = F.binary_cross_entropy_with_logits(z, hot, weight=column, pos_weight=pos, reduction="sum") / 20
    torch.testing.assert_close(SIGMOID(z, hot, positive=column * pos, negative=column), wanted)
    torch.testing.assert_close(SIGMOID(z, hot), F.binary_cross_entropy_with_logits(z, hot) * 33)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_kinds_and_layouts_of_targets(kind) -> None:
    z, hot = drawn(20, 33)
    wanted = contract.gradient(SIGMOID, z, hot)
    hot = hot.to(kind)
    for t in (hot, hot.t().contiguous().t(), torch.cat([hot, hot], 1)[:, :33], torch.cat([hot[:1], hot])[1:]):
        found = contract.gradient(SIGMOID, z, t)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
    for layout in (z.t().contiguous().t(), torch.cat([z, z], 1)[:, :33]):
        assert torch.equal(contract.gradient(SIGMOID, layout, hot)[1], wanted[1])
    images = z.reshape(10, 2, 33).transpose(1, 2), hot.reshape(10, 2, 33).transpose(1, 2)
    rows = SIGMOID(*images, reduction="none")
    assert torch.equal(rows.reshape(-1), SIGMOID(z, hot, reduction="none"))
    assert SIGMOID(z[0], hot[0], reduction="none").shape == ()
    if kind == torch.uint8:
        blank = torch.where(torch.arange(33) == 5, 255, hot)
        ignored = contract.gradient(SIGMOID, z, blank, ignore_index=255)[1]
        assert not ignored[:, 5].any()
        assert torch.equal(ignored[:, 6:], wanted[1][:, 6:])


def test_whoever_looks_at_a_call() -> None:
    z, hot = drawn(6, 9)
    z, options = z.double(), chosen("all", 9, torch.float64)
    call = lambda z: SIGMOID(z, hot, **options)  # noqa: E731
    plain = lambda z: SIGMOID(z, hot, backend="torch", **options)  # noqa: E731
    leaf = z.clone().requires_grad_()
    assert torch.autograd.gradcheck(plain, (leaf,))
    assert torch.autograd.gradgradcheck(call, (leaf,))
    wanted = torch.autograd.grad(plain(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(call)(z), wanted)
    torch.testing.assert_close(torch.func.jvp(call, (z,), (z,))[1], (wanted * z).sum())
    torch.testing.assert_close(torch.vmap(call)(torch.stack([z, z]))[1], plain(z))
    compiled = torch.compile(lambda z: SIGMOID(z, hot, statistics=True, **options), backend="aot_eager", fullgraph=True)
    loss, sums = compiled(leaf)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], wanted)
    torch.testing.assert_close(sums, SIGMOID(z, hot, statistics=True, backend="torch", **options)[1])
    assert not sums.requires_grad
    recomputed = checkpoint(call, leaf, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed, leaf)[0], wanted)
    loss = call(leaf)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, leaf, torch.tensor(2.0).double())[0], 2 * first)


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_learn(name) -> None:
    z, hot = drawn(6, 9)
    own = tables(9)
    own[name].requires_grad_()
    assert "gradient with respect to " + name in str(ltk.explain(SIGMOID, z.double(), hot, **own))
    assert torch.autograd.gradcheck(lambda t: SIGMOID(z.double(), hot, **{**own, name: t}), (own[name],))
    with pytest.raises(ValueError, match="backend='cpu' cannot serve"):
        SIGMOID(z.double(), hot, backend="cpu", **own)


def test_threads_and_permutation() -> None:
    z, hot = drawn(300, 130)
    own = tables(130, torch.float32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        leaf = z.clone().requires_grad_()
        loss, sums = SIGMOID(leaf, hot, statistics=True, **own)
        loss.backward()
        found.append((loss.detach(), leaf.grad, sums))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    named = {name: table[order] for name, table in own.items()}
    leaf = z[:, order].clone().requires_grad_()
    loss, sums = SIGMOID(leaf, hot[:, order], statistics=True, **named)
    loss.backward()
    assert torch.equal(sums, found[0][2][:, order])
    assert torch.equal(leaf.grad, found[0][1][:, order])


def test_hostile_logits() -> None:
    """Infinite logits on the right side cost nothing, on the wrong side infinitely much; NaN stays with its row; a removed class has no
    negatives; nothing to average is NaN with gradient 0."""
    hot = torch.tensor([[1.0, 0.0, 0.0]] * 4)
    z = torch.tensor([[math.inf, -math.inf, 0.0], [-math.inf, 0.0, 0.0], [0.0, math.nan, 0.0], [0.0, 0.0, 0.0]])
    for options in ({}, {"threshold": 0.3}, {"focal_gamma": 2.0}):
        loss, grad = contract.gradient(SIGMOID, z, hot, reduction="none", **options)
        assert loss.isfinite().tolist() == [True, False, False, True]
        assert loss[1] == math.inf
        assert grad[[0, 3]].isfinite().all()
        assert (
            options.get("focal_gamma") or grad[1].isfinite().all()
        )  # the focal factor's slope there is 0 times infinity
        assert grad[2].isnan().tolist() == [False, True, False]
    removed = torch.tensor([0.0, -math.inf, 0.0])
    loss, grad = contract.gradient(SIGMOID, z[3:], hot[3:], shift=removed)
    assert loss.item() == pytest.approx(2 * math.log(2))
    assert grad[0, 1] == 0
    nothing = torch.full((4, 3), -1.0)
    loss, grad = contract.gradient(SIGMOID, z, nothing)
    assert loss.isnan()
    assert not grad.any()
    assert SIGMOID(z[:0], hot[:0], reduction="none").shape == (0,)
    assert SIGMOID(z[:0], hot[:0], reduction="sum") == 0
    assert contract.gradient(SIGMOID, z[:0], hot[:0])[1].shape == (0, 3)


def test_what_cannot_be_is_refused_by_name() -> None:
    z, hot = drawn(5, 4)
    bad = hot.clone()
    bad[2, 3] = 0.5
    one = torch.ones(4)
    last = torch.tensor([1.0, 1.0, 1.0, math.nan])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"target": bad}, r"target\[2, 3\] is 0.5"),
        ({"target": (hot * 3).to(torch.uint8)}, r"target\[\d, \d\] is 3"),
        ({"target": torch.where(hot == 1, math.nan, 0)}, r"target\[\d, \d\] is nan"),
        ({"target": torch.tensor([0, 1, 4, 0, 0])}, "label 4 in row 2"),
        ({"target": hot[:, :3]}, r"target has shape \(5, 3\); multi-label targets have the logits' shape \(5, 4\)"),
        ({"weight": one}, "weight is chosen by the label"),
        ({"ignore_index": 1}, "ignore_index is 1, which is what entries"),
        ({"threshold": 1.0}, r"threshold is 1.0; it must lie in \[0, 1\)"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"negative_scale": 0.0}, "negative_scale is 0.0"),
        ({"focal_gamma": -1.0}, "focal_gamma is -1.0"),
        ({"positive": last}, r"positive\[3\] is nan"),
        ({"negative": last}, r"negative\[3\] is nan"),
        ({"shift": -last}, r"shift\[3\] is nan"),
        ({"rebalance": 1 - one}, r"rebalance\[0\] is 0.0; it must be finite and above 0"),
        ({"rebalance": one, "rebalance_map": (1.0,)}, "it must be three numbers"),
        ({"scale": torch.ones(3)}, r"scale has shape \(3,\)"),
        ({"sample_weight": torch.tensor([1, 1, math.inf, 1, 1])}, "sample_weight is inf in row 2"),
        ({"reduction": "avg"}, "reduction is 'avg'"),
        ({"backend": "cuda"}, "backend='cuda' cannot serve"),
    ]  # fmt: skip
    for backend in (None, "torch"):
        for options, message in cases:
            said = {"backend": backend, **options}
            with pytest.raises(ValueError, match=message):
                SIGMOID(z, said.pop("target", hot), **said)
    for options, message in (
        ({"target": (hot, hot, 0.5)}, "target is tuple"),
        ({"positive": torch.ones(4, dtype=torch.int64)}, "positive has dtype"),
        ({"threshold": True}, "threshold is True"),
    ):
        with pytest.raises(TypeError, match=message):
            SIGMOID(z, options.pop("target", hot), **options)
    with pytest.raises(ValueError, match="label_smoothing is given, which the general sigmoid loss"):
        CE(z, hot, label_smoothing=0.1, **ltk.adjustments.balanced_bce([3, 2, 1, 1])._asdict())
    with pytest.raises(ValueError, match="weight is chosen by the label"):
        ltk.nn.ClassBalancedSigmoid([3, 2, 1, 1])(z, hot)
    with pytest.raises(ValueError, match="margin cannot be combined"):
        CE(z, torch.zeros(5).long(), **ltk.adjustments.ecm([3, 2, 1, 1])._replace(margin=one)._asdict())


def test_the_operator() -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for hot in (torch.rand(4, 5).round(), torch.rand(4, 5) < 0.5, torch.tensor([0, 1, -100, 4])):
        entries = hot.to(torch.uint8) if hot.dtype == torch.bool else hot
        call = SigmoidCall(entries, statistics=True)
        arguments = (torch.randn(4, 5), None, torch.randn(5), *[None] * 4, *call, None, (True, *[False] * 6))
        torch.library.opcheck(_FUSED.operator, arguments, test_utils=checks)
