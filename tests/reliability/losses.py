"""Fuzzing of every public loss: functions, Modules, heads and the sharded loss against the float64 oracle, closed forms against the plain
torch reference in float64; spoiled calls must be refused."""

from __future__ import annotations

import copy
import math
import tempfile
from typing import Any

import beside
import contrast
import oracle
import torch
from _calls import (
    OPTIONS,
    Call,
    answer,
    check,
    check_refused,
    check_shape,
    loss_call,
    options_of,
    rounded,
    sample_weights,
    smoothed,
    undecided,
    worst,
)
from _draw import Draw, loop, missing, refused
from _part import Part, Tally
from torch import Tensor

import ltkernels as ltk
from ltkernels import _checks

F, NN = ltk.functional, ltk.nn
BY_CLASS = {loss.__name__: loss for loss in ltk.LOSSES.values()}


def tables_of(draw: Draw, classes: int) -> dict[str, Any]:
    """Vectors of any kind, in any floating dtype and layout; the values are those that the call will see."""
    out: dict[str, Any] = {}
    ranges = {
        "shift": (-8.0, 1.0),
        "scale": (0.1, 2.0),
        "margin": (-1.0, 3.0),
        "row_scale": (0.5, 4.0),
        "weight": (0.1, 3.0),
    }
    for name, (low, high) in ranges.items():
        if draw.chance(0.6):
            continue
        table = draw.uniform(classes, low=low, high=high)
        special = draw.randrange(6)
        if special == 0:
            table[draw.randrange(classes)] = {"shift": -torch.inf, "margin": 500.0}.get(name, 0.0)
        elif special == 1 and name in ("scale", "row_scale"):
            table[draw.randrange(classes)] *= -1.0
        elif special == 2:
            table[:] = table[0].item()
        out[name] = draw.layout(table.to(draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])))
    if draw.chance(0.3):
        out["focal_gamma"] = draw.choice([0.3, 0.5, 1, 2.0, 5.0])
    if draw.chance(0.3):
        out["label_smoothing"] = draw.choice([0.01, 0.1, 1.0])
    if draw.chance(0.15):
        out["label_smoothing"] = draw.uniform(classes)
        out["label_smoothing"][draw.uniform(classes) < 0.3] = 0.0
    if draw.chance(0.2):
        out["label_scale"] = draw.layout(
            draw.uniform(classes, low=-0.5, high=2.0).to(draw.choice([torch.float32, torch.float64]))
        )
    draw.say("tables", {name: getattr(value, "dtype", value) for name, value in out.items()})
    return out


def seen_by(call: Call, tables: dict[str, Any]) -> dict[str, Any]:
    """The tables as the kernel reads them: rounded to the loss' dtype."""
    real = _checks.real_dtype(call.z.dtype)
    return {name: value.to(real) if isinstance(value, Tensor) else value for name, value in tables.items()}


def five_vectors(draw: Draw) -> None:
    call, kind = loss_call(draw)
    tables = tables_of(draw, call.rows.shape[1]) if kind not in ("huge", "denormal") else {}
    if isinstance(call.labels, tuple) or not draw.chance(0.5):
        make = lambda z, y, **common: F.adjusted_cross_entropy(z, y, **{**tables, **common})  # noqa: E731
    else:
        vectors = {name: tables[name] for name in tables if name not in ("label_smoothing",)}
        own = {name: value for name, value in call.common.items() if name == "sample_weight"}
        of_module = {name: value for name, value in call.common.items() if name not in own}
        module = NN.AdjustedCrossEntropy(ltk.Adjustment(**vectors), **{**of_module, **smoothing(tables)})
        make = lambda z, y, **common: (module_with(module, common) if common else module)(z, y, **own)  # noqa: E731
    if draw.chance(0.15):
        check_refused(draw, make, call)
        if tables and draw.chance(0.5):
            bad_table(draw, call, tables)
        return
    check(lambda z: make(z, call.target, **call.common), call, seen_by(call, tables), kind)


def smoothing(tables: dict[str, Any]) -> dict[str, Any]:
    return {"label_smoothing": tables["label_smoothing"]} if "label_smoothing" in tables else {}


def module_with(module: torch.nn.Module, common: dict[str, Any]) -> torch.nn.Module:
    """A copy with other common options, checked as the constructor checks them."""
    options = {
        name: common.get(name, getattr(module, name)) for name in ("label_smoothing", "ignore_index", "reduction")
    }
    fresh = NN.AdjustedCrossEntropy(**{**options, "backend": common.get("backend")})
    out = copy.copy(module)
    out.__dict__.update({name: fresh.__dict__[name] for name in (*options, "backend")})
    return out


def bad_table(draw: Draw, call: Call, tables: dict[str, Any]) -> None:
    vectors = [name for name, value in tables.items() if isinstance(value, Tensor)]
    if not vectors or call.rows.shape[0] == 0:
        return
    name = draw.say("bad table", draw.choice(vectors))
    table = tables[name].clone()
    kind = draw.randrange(4)
    if kind == 0:
        table[draw.randrange(len(table))] = draw.choice([torch.nan, torch.inf])
    bad = [table, table[None], table.long(), table.tolist()][kind]
    refused(lambda: F.adjusted_cross_entropy(call.z, call.target, **{**tables, **call.common, name: bad}))


def probabilities(draw: Draw) -> None:
    """Class probabilities as target: torch's own function in float64."""
    call, kind = loss_call(draw, mixed=False)
    if kind in ("huge", "nan", "inf", "-inf", "all -inf") or call.common["reduction"] == "batch_mean":
        return
    q = torch.softmax(draw.normal(*call.z.shape), dim=1 if call.z.dim() > 1 else 0)
    weight = draw.uniform(call.rows.shape[1], low=0.1, high=2.0).float()
    options = {"label_smoothing": draw.choice([0.0, 0.2]), "reduction": call.common["reduction"]}
    loss, grad = answer(lambda z: F.adjusted_cross_entropy(z, q, weight=weight, **options), call, 1.0)
    leaf = call.z.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(leaf, q, weight=weight.double(), **options)
    wanted.backward(torch.ones_like(wanted))
    check_shape(loss, call)
    size = 1.0 + float(call.rows.abs().max()) if call.rows.numel() else 1.0
    close = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}[call.z.dtype] * size
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=min(close, 1e-4), atol=1e-6 * size, equal_nan=True)
    torch.testing.assert_close(grad.double(), call.to_rows(leaf.grad), rtol=close, atol=1e-6 * size, equal_nan=True)


def named(draw: Draw, name: str, of_class: bool) -> None:
    """A loss of the registry, as the op with its tables or as a Module."""
    record = BY_CLASS[name]
    draw.say("loss", name)
    cosine = record.logits == "cosine"
    call, kind = loss_call(draw, cosine=cosine)
    classes = call.rows.shape[1]
    if kind == "huge":
        return  # the options' tables would round what the reference does not
    counts = draw.counts(classes)
    if "empty" in record.own_options and classes > 1 and draw.chance(0.2):
        counts[draw.randrange(classes)] = 0
    chosen = options_of(draw, record.own_options, cosine)
    common = dict(call.common)
    built = lambda: record.adjustment(counts, **chosen)  # noqa: E731
    given = (
        {"class_counts": counts if draw.chance(0.5) else torch.tensor(counts)} if record.first == "class_counts" else {}
    )

    def run(z: Any, y: Any, **common: Any) -> Tensor:
        first = (given["class_counts"],) if given else (classes,) if record.first == "num_classes" else ()
        if not of_class:
            return F.adjusted_cross_entropy(z, y, **{**record.build(*first, **chosen)._asdict(), **common})
        options = {key: value for key, value in chosen.items() if key not in ("empty",) or name != "Seesaw"}
        own = {key: common.pop(key) for key in ("sample_weight",) if key in common}
        module = getattr(NN, name)(*first, **options, **common)
        if draw.chance(0.5):
            module = module.eval().half()  # the tables stay as they are
        return module.eval()(z, y, **own)

    if record.name in ("ecm", "balanced_bce") and max(counts) == sum(counts):  # no negative
        refused(lambda: run(call.z, call.target, **common))
        return
    if 0 in counts and chosen.get("empty") != "ignore" and not (of_class and name == "Seesaw"):
        refused(lambda: run(call.z, call.target, **common))
        return
    adjustment = (
        record.adjustment(counts, **{**chosen, **({"empty": "ignore"} if 0 in counts else {})})
        if 0 in counts
        else built()
    )
    if getattr(adjustment, "weight", None) is None and draw.chance(0.3):
        common["weight"] = draw.uniform(classes, low=0.1, high=2.0).float()
    if draw.chance(0.12):
        check_refused(draw, lambda z, y, **other: run(z, y, **{**common, **other}), call)
        return
    if not isinstance(adjustment, ltk.losses.ClosedForm):
        tables = {key: value for key, value in adjustment._asdict().items() if value is not None}
        if "label_smoothing" not in tables and draw.chance(0.2):
            common["label_smoothing"] = tables["label_smoothing"] = 0.1
        if "weight" in common:
            tables["weight"] = common["weight"]
        check(lambda z: run(z, call.target, **common), call, tables, kind)
        return
    closed_form(call, adjustment, common, lambda z, backend: run(z, call.target, **common, backend=backend))


def closed_form(call: Call, form: Any, common: dict[str, Any], run: Any) -> None:
    """The kernel against the torch reference in float64. That one subtracts probabilities from 1 where the kernel does not, so it is
    trusted to a rounding error of 1 in a row's gradient; and rows that are not finite are left to the truth table's tests."""
    real = _checks.real_dtype(call.z.dtype)
    loss, grad = answer(lambda z: run(z, None), call, 1.0)
    check_shape(loss, call)
    if undecided(call, {"weight": common.get("weight", form.weight)}):
        return
    leaf = call.z.double().requires_grad_()
    wanted = run(leaf, "torch")
    wanted.backward(torch.ones_like(wanted))
    wanted, slopes = wanted.detach(), call.to_rows(leaf.grad)
    sigma = 1.0 if form.row_scale is None else float(form.row_scale.max())
    # Seesaw adds (q + 1) times log-probabilities; ArcFace's slope reaches 1000 where the cosine is 1, in float64 1 / sine: the plain
    # reference's p - 1 is rounded to 1e-16 before that factor (ours keeps all digits: tests/test_arcface.py).
    steep = torch.tensor({"seesaw": 8.0, "arcface": 1e3}.get(form.term.form, 1.0), dtype=torch.float64)
    if form.term.form == "arcface" and real == torch.float64 and call.rows.numel():
        sine2 = (1 - call.rows) * (1 + call.rows)
        steep = steep.maximum(1 / sine2.clamp(min=1e-14).sqrt().nan_to_num(1.0).amin(dim=1))
    size = (
        call.rows.abs().nan_to_num(posinf=0.0).amax(dim=1) * sigma * steep
        if call.rows.numel()
        else torch.zeros(len(call.rows))
    )
    weight = common.get("weight", form.weight)
    heavy = (1.0 if weight is None else float(weight.max())) * (2.0 if "sample_weight" in common else 1.0)
    epsilon, factor, out, floor = oracle.TOLERANCES[call.z.dtype]
    finite = call.rows.isfinite().all(dim=1)
    if form.term.form == "arcface" and real == torch.float32:
        # Where the sine is below 1e-3 the slope's floor depends on the dtype (tests/test_arcface.py has both ends).
        finite = finite & (1 - call.rows.double().square() > 1e-6).all(dim=1)
    if common["reduction"] != "none" and not bool(finite.all()):
        return
    near = factor * epsilon * (4 + size) + 4e-16 * steep
    steep = steep[:, None] if steep.dim() else steep
    rows_ok = finite.reshape(wanted.shape) if common["reduction"] == "none" else torch.tensor(True)
    limit = (
        near.reshape(wanted.shape) if common["reduction"] == "none" else near.max() if len(near) else torch.tensor(0.0)
    )
    target = rounded(wanted, real)
    gap = (loss.double() - target).abs()
    fine = (
        (gap <= 2 * limit * (target.abs() + heavy) + floor)
        | (loss.double() == target)
        | (loss.isnan() & target.isnan())
    )
    assert bool((fine | ~rows_ok).all()), f"{loss} is not {target}"
    slopes = rounded(slopes, call.z.dtype)
    top = slopes.abs().nan_to_num().amax(dim=1, keepdim=True) if slopes.numel() else slopes
    allowed = (2 * near[:, None] + out) * slopes.abs() + 2 * near[:, None] * top + 4e-16 * sigma * heavy * steep + floor
    gap = (grad.double() - slopes).abs()
    fine = (gap <= allowed) | (grad.double() == slopes) | (grad.isnan() & slopes.isnan())
    assert bool((fine | ~finite[:, None]).all()), worst(
        torch.where(finite[:, None], grad, 0), torch.where(finite[:, None], slopes, 0)
    )


def sigmoid(draw: Draw) -> None:
    """The general sigmoid loss, multi-label and of class indices, against its torch reference in float64; what it must refuse."""
    call, kind = loss_call(draw, mixed=False)
    if kind in ("huge", "nan", "inf", "-inf", "all -inf"):
        return
    classes = call.rows.shape[1]
    real = _checks.real_dtype(call.z.dtype)
    options: dict[str, Any] = {}
    for name, low in (("scale", 0.5), ("shift", -3.0), ("positive", 0.0), ("negative", 0.0), ("rebalance", 0.1)):
        if draw.chance(0.4):
            options[name] = draw.layout(draw.uniform(classes, low=low, high=2.0).to(real))
    if draw.chance(0.3):
        options["focal_gamma"] = draw.choice([0.5, 2.0])
    if draw.chance(0.3):
        options["negative_scale"] = draw.choice([0.5, 3.0])
    ignore = call.common["ignore_index"]
    target = call.target
    if draw.say("multi-label", draw.chance(0.7)):
        entries = (draw.uniform(*call.z.shape) < 0.2).float()
        ignore = draw.choice([-100, -1, 7])
        kinds = [torch.float32, torch.float64, torch.int64] if draw.chance(0.5) else [torch.bool, torch.uint8]
        if torch.bool not in kinds:
            entries[draw.uniform(*call.z.shape) < 0.1] = draw.choice([-1.0, float(ignore)])
        target = draw.layout(entries.to(draw.say("entries", draw.choice(kinds))))
    options |= {"reduction": call.common["reduction"], "ignore_index": ignore}
    if "sample_weight" in call.common:
        options["sample_weight"] = call.common["sample_weight"].nan_to_num(posinf=1.0)
    run = lambda z, **other: F.sigmoid_cross_entropy(z, target, **{**options, **other})  # noqa: E731
    if draw.chance(0.15):
        wrong = draw.choice(
            [{"threshold": 1.0}, {"reduction": "avg"}, {"positive": torch.full((classes,), torch.nan)}, {"negative_scale": 0},
             {"scale": [1.0]}, {"backend": "cuda"}, {"focal_gamma": -1.0}, {"rebalance": torch.zeros(classes)},
             {"shift": torch.zeros(classes + 1)}]
        )  # fmt: skip
        refused(lambda: run(call.z, **wrong))
        return
    loss, grad = answer(run, call, 1.0)
    _, sums = run(call.z, statistics=True)
    leaf = call.z.double().requires_grad_()
    wanted, wanted_sums = run(leaf, statistics=True, backend="torch")
    wanted.backward(torch.ones_like(wanted))
    check_shape(loss, call)
    size = 1.0 + float(call.rows.detach().abs().max()) if call.rows.numel() else 1.0
    work = {torch.float64: 1e-12}.get(real, 4e-6) * size
    for found, exact, near in (
        (loss, wanted.detach(), work),
        (sums, wanted_sums, work),
        (grad, call.to_rows(leaf.grad), max(work, {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(call.z.dtype, 0.0))),
    ):
        top = float(exact.abs().nan_to_num().max()) if exact.numel() else 0.0
        small = 1e-7 if call.z.dtype == torch.float16 else 0.0
        torch.testing.assert_close(found.double(), exact, rtol=near, atol=near * top + 1e-12 + small, equal_nan=True)


def von_mises_fisher(draw: Draw) -> None:
    """ProCo's form against its torch reference in float64, held and in the head's chunks."""
    call, _ = loss_call(draw, cosine=True, mixed=False, two_dimensional=True)
    if not bool(call.rows.isfinite().all()) or (call.rows.numel() and float(call.rows.abs().max()) > 1):
        return
    classes = call.rows.shape[1]
    width = draw.say("p", draw.choice([3, 16, 17, 128, 1024]))
    kappa = draw.uniform(classes) ** 3 * draw.choice([1.0, 50.0, 1e5])
    tau = draw.say("tau", draw.choice([0.05, 0.1, 1.0]))
    shift = draw.uniform(classes, low=-5.0, high=0.0).float()
    run = lambda z, **other: F.adjusted_cross_entropy(  # noqa: E731
        z, call.target, shift=shift, term=ltk.adjustments.vmf(kappa, width, tau).term, **call.common, **other
    )
    loss, grad = answer(run, call, 1.0)
    leaf = call.z.double().requires_grad_()
    wanted = run(leaf, backend="torch")
    wanted.backward(torch.ones_like(wanted))
    check_shape(loss, call)
    near = {torch.float64: 1e-10}.get(call.z.dtype, 4e-5 * (1 + 1 / tau))
    rounding = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(call.z.dtype, 0.0)
    slopes = call.to_rows(leaf.grad)
    top = float(slopes.abs().nan_to_num().max()) if slopes.numel() else 0.0
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=near, atol=near, equal_nan=True)
    torch.testing.assert_close(
        grad.double(), slopes, rtol=near + rounding, atol=near * top + 1e-12 + (1e-7 if rounding else 0), equal_nan=True
    )


def proco(draw: Draw) -> None:
    """In training and not; what came in stays finite, and a refused batch leaves nothing."""
    classes, rows, width = draw.say("C, N, p", (draw.size(40), draw.size(12), draw.randint(3, 40)))
    loss = NN.ProCo(
        draw.counts(classes), width, draw.choice([0.07, 0.5]), reduction=draw.choice(["mean", "sum", "none"])
    )
    x = draw.layout(draw.normal(rows, width, dtype=torch.float32) * 10.0 ** draw.randint(-6, 6))
    y = torch.where(draw.uniform(rows) < 0.2, -100, draw.integers(0, classes, rows))
    for _ in range(draw.randint(1, 3)):
        leaf = x.detach().requires_grad_()
        found = loss([leaf, leaf] if draw.chance(0.5) else leaf, y)
        found.sum().backward()
        counted = bool((y != -100).any())
        assert bool(found.isfinite().all()) or (loss.reduction == "mean" and not counted)
        assert bool(leaf.grad.isfinite().all())
        assert bool((loss.kappa <= 1e5).all())
        assert torch.allclose(loss.direction.norm(dim=1), torch.ones(classes), rtol=1e-5)
        if draw.chance(0.3):
            loss.next_epoch()
    before = [each.clone() for each in loss.buffers()]
    refused(lambda: loss(x[:, 1:], y))
    refused(lambda: loss(x, torch.full_like(y, classes)) if rows else loss(x, y.float()))
    assert all(torch.equal(a, b) for a, b in zip(before, loss.buffers(), strict=True))


def functions(seed: int, cases: int) -> Tally:
    elsewhere = {
        "linear_adjusted_cross_entropy",
        "linear_distillation",
        "distillation",
        "experts_cross_entropy",
    }  # soft_targets.py
    elsewhere |= contrast.FUNCTIONS | beside.FUNCTIONS
    missing(set(F.__all__), {"adjusted_cross_entropy", "sigmoid_cross_entropy", *elsewhere})
    names = ["adjusted_cross_entropy", *BY_CLASS]
    for loss in ltk.LOSSES.values():
        missing(set(loss.own_options) | set(OPTIONS), set(OPTIONS))

    def one(draw: Draw) -> None:
        name = names[draw.case % len(names)]
        if draw.chance(0.1):
            (sigmoid if draw.chance(0.7) else von_mises_fisher)(draw)
        elif name == "adjusted_cross_entropy" or draw.chance(0.3):
            (probabilities if draw.chance(0.1) else five_vectors)(draw)
        else:
            named(draw, name, of_class=False)

    return loop(seed, cases, one)


def modules(seed: int, cases: int) -> Tally:
    of_experts = {"ExpertsLoss", "SADE", "BalPoE", "RIDE", "NCL", "ResLT", "MDCS"}  # soft_targets.py
    whole = {"AdjustedCrossEntropy", "CosineLinear", "InfluenceBalanced", "DistributionBalanced", "ProCo"}
    missing(set(NN.__all__), {*whole, *of_experts, *contrast.MODULES, *beside.MODULES, *BY_CLASS})
    names = list(BY_CLASS)

    def one(draw: Draw) -> None:
        if draw.chance(0.1):
            cosine_linear(draw)
        elif draw.chance(0.05):
            influence_balanced(draw)
        elif draw.chance(0.05):
            proco(draw)
        else:
            named(draw, names[draw.case % len(names)], of_class=True)

    return loop(seed, cases, one)


def cosine_linear(draw: Draw) -> None:
    width, classes = draw.say("D", draw.size(40)), draw.say("C", draw.size(40))
    head = NN.CosineLinear(width, classes)
    x = draw.layout(draw.normal(draw.size(5, 0.1), width, dtype=torch.float32) * 10.0 ** draw.randint(-20, 15))
    out = head(x)
    assert out.shape == (len(x), classes)
    assert bool((out.abs() <= 1 + 1e-5).all())
    refused(lambda: NN.CosineLinear(draw.choice([0, -1]), classes))
    refused(lambda: NN.CosineLinear(width, draw.choice([0, -1, 2.5, True])))


def influence_balanced(draw: Draw) -> None:
    """Against the oracle with the factors that the formula gives; held and in chunks."""
    classes, rows, width = draw.say("C, N, D", (draw.size(40), draw.size(12), draw.size(8)))
    h, w, y = draw.normal(rows, width), draw.normal(classes, width), draw.integers(0, classes, rows)
    loss = NN.InfluenceBalanced(draw.counts(classes), eps=draw.choice([1e-3, 1.0]), table_dtype=torch.float64)
    x, head = h.clone().requires_grad_(), w.clone().requires_grad_()
    z = x @ head.t()
    p = torch.softmax(z.detach(), 1)
    apart = 2 * (p.sum(1) - p.gather(1, y[:, None])[:, 0])
    factors = loss.alpha / (apart * h.abs().sum(1) + loss.eps)
    wanted, slope, _ = oracle.adjusted_cross_entropy(
        z.detach(), y, weight=loss.weight, sample_weight=factors, reduction="batch_mean"
    )
    close = {"rtol": 1e-6, "atol": 1e-9, "equal_nan": True}
    for value in (loss(z, y, features=x), loss.from_features(x, head, y, chunk_rows=draw.choice([1, 3, 0]))):
        grads = torch.autograd.grad(value, (x, head), retain_graph=True)
        torch.testing.assert_close(value.detach(), wanted, **close)
        torch.testing.assert_close(grads[0], slope @ w, **close)
        torch.testing.assert_close(grads[1], slope.t() @ h, **close)
    refused(lambda: loss(z, y))
    refused(lambda: loss(z, y, features=h[None]))
    refused(lambda: loss(z, (y, y, 0.5), features=h))


# ---- classifier and loss in one --------------------------------------------------------------------------------------


def head_inputs(draw: Draw) -> tuple[list[Tensor | None], Any, dict[str, Any], dict[str, Any]]:
    """[features, weight, bias], target, options for the call, and what the oracle takes of them."""
    dtype = draw.say("dtype", draw.choice([torch.float32, torch.float64, torch.bfloat16]))
    rows, width, classes = draw.say("N, D, C", (draw.size(12, 0.05), draw.size(24), draw.size(60)))
    given: list[Tensor | None] = [draw.normal(rows, width), draw.normal(classes, width)]
    given.append(draw.normal(classes) if draw.chance(0.5) else None)
    kind = draw.say("values", draw.choice(["normal", "normal", "tiny", "zero row", "equal", "large"]))
    for value in given[:2]:
        if kind == "tiny":
            value *= 1e-6
        elif kind == "zero row" and len(value):
            value[draw.randrange(len(value))] = 0.0
        elif kind == "equal" and len(value):
            value[:] = value[0].clone()
        elif kind == "large":
            value *= 5.0
    given = [None if value is None else draw.layout(value.to(dtype)) for value in given]
    ignore = draw.choice([-100, 0, classes])
    y = torch.where(draw.uniform(rows) < 0.15, ignore, draw.integers(0, classes, rows))
    target: Any = y
    if draw.chance(0.2):
        lam = draw.uniform(rows).to(torch.float64 if dtype == torch.float64 else torch.float32)
        target = (y, draw.integers(0, classes, rows), lam)
    tables = seen_by(Call(given[0], None, {}, None, None, None), tables_of(draw, classes))
    tables = {
        name: value for name, value in tables.items() if not isinstance(value, Tensor) or bool(value.isfinite().all())
    }
    common = {
        "ignore_index": ignore,
        "reduction": draw.say("reduction", draw.choice(["mean", "batch_mean", "sum", "none"])),
    }
    if draw.say("sample_weight", draw.chance(0.25)):
        common["sample_weight"] = sample_weights(draw, y, ignore, dtype)
    options = {{"weight": "class_weight"}.get(name, name): value for name, value in (tables | common).items()}
    return given, target, options, tables | common


def head_answer(given: list[Tensor | None], target: Any, normalize: bool, options: dict[str, Any]) -> tuple[Any, ...]:
    """(loss, gradients, their bounds, bound of the loss), float64: the loss by the oracle, the linear part by autograd. A bound is the
    product sum that the rounding errors of an entry's matrix products are proportional to."""
    leaves = [None if value is None else value.detach().double().requires_grad_() for value in given]
    x, w, b = leaves
    if normalize:
        x, w = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(w, dim=1)
    z = torch.nn.functional.linear(x, w, b)
    labels = (*target[:2], target[2].double()) if isinstance(target, tuple) else target
    loss, dz, _ = oracle.adjusted_cross_entropy(z, labels, **options)
    used = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(z, used, dz)
    products = x.detach().abs() @ w.detach().abs().t() + (0 if b is None else b.detach().abs())
    big = [float(options[name].abs().max()) if name in options else 1.0 for name in ("scale", "row_scale")]
    if "label_scale" in options:
        big[0] *= max(1.0, float(options["label_scale"].abs().max()))
    offsets = sum(float(options[name].abs().max()) if name in options else 0.0 for name in ("shift", "margin"))
    size = (float(products.max()) * big[0] + offsets) * big[1] if products.numel() else 0.0
    # A smoothed label's gradient is a difference, which may cancel; the error is that of its parts.
    eps = 1.0 if isinstance(options.get("label_smoothing"), Tensor) else options.get("label_smoothing", 0.0)
    parts = dz.abs() + eps / max(1, w.shape[0]) * heavy_of(options) * big[0] * big[1]
    ways = []
    for leaf, other, total in ((x, w, parts), (w, x, parts.t())):
        norm = torch.linalg.vector_norm(given[0 if leaf is x else 1].double(), dim=1, keepdim=True).clamp_min(1e-12)
        bound = (
            (total @ other.detach().abs()).amax(dim=1, keepdim=True) if other.numel() else total.sum(1, keepdim=True)
        )
        ways.append(2 * bound / norm if normalize else bound)
    ways.append(parts.sum(dim=0))
    return loss, grads, ways, size


def heavy_of(options: dict[str, Any]) -> float:
    """The largest weight of a row's terms; label smoothing adds those of all classes."""
    weight, own = options.get("weight"), 2.0 if "sample_weight" in options else 1.0
    if weight is None:
        return own
    return own * max(1.0, float(weight.max()) * (len(weight) if smoothed(options) else 1))


def head_check(
    run: Any, given: list[Tensor | None], target: Any, normalize: bool, wanted_options: dict[str, Any]
) -> None:
    leaves = [None if value is None else value.detach().requires_grad_() for value in given]
    loss = run(*leaves)
    loss.backward(torch.ones_like(loss))
    wanted, grads, bounds, size = head_answer(given, target, normalize, wanted_options)
    dtype = given[0].dtype
    real = torch.float64 if dtype == torch.float64 else torch.float32
    _, factor, out, floor = oracle.TOLERANCES[dtype]
    work = oracle.TOLERANCES[real]
    near = 4 * factor * work[0] * (8 + size)
    heavy = heavy_of(wanted_options)
    rows = 1 if wanted_options["reduction"] != "sum" else max(1, len(given[0]))
    gap = (loss.detach().double() - wanted).abs()
    # The mean over rows of no weight divides by 0: NaN, or infinite where label smoothing leaves a loss.
    same = ~loss.detach().isfinite() & wanted.isnan()
    assert loss.dtype == real
    assert bool((same | (gap <= near * (wanted.abs() + heavy * rows))).all()), f"{loss} is not {wanted}"
    if bool(wanted.isnan().any()):
        return
    for name, leaf, grad, bound in zip(
        ("features", "weight", "bias"), [leaf for leaf in leaves if leaf is not None], grads, bounds, strict=False
    ):
        allowed = near * bound + out * grad.abs() + floor
        gap = (leaf.grad.double() - grad).abs()
        assert leaf.grad.dtype == dtype
        assert bool((gap <= allowed).all()), f"{name}: {float((gap / allowed).max()):.3g} times the tolerance"


def heads(seed: int, cases: int) -> Tally:
    def one(draw: Draw) -> None:
        given, target, options, wanted = head_inputs(draw)
        normalize = draw.say("normalize", draw.chance(0.4))
        chunk = draw.say("chunk_rows", draw.choice([None, 0, 1, 3, 256]))
        head = F.linear_adjusted_cross_entropy
        if draw.chance(0.15):
            spoiled_head(draw, lambda *a, **k: head(*a, **{**options, **k}), given, target)
            return
        call = lambda x, w, b: head(x, w, target, bias=b, normalize=normalize, chunk_rows=chunk, **options)  # noqa: E731
        head_check(call, given, target, normalize, wanted)

    return loop(seed, cases, one)


def spoiled_head(draw: Draw, run: Any, given: list[Tensor | None], target: Any) -> None:
    x, w, _ = given
    kind = draw.say("fault", draw.choice(["width", "weight type", "bias", "features", "labels", "label", "no classes"]))
    if kind == "width":
        refused(lambda: run(x, torch.cat([w, w], 1), target))
    elif kind == "weight type":
        refused(lambda: run(x, w.to(torch.float16), target))
    elif kind == "bias":
        refused(lambda: run(x, w, target, bias=torch.zeros(len(w) + 1, dtype=x.dtype)))
    elif kind == "features":
        refused(lambda: run(draw.choice([x.long(), x.tolist(), x.new_zeros(()), None]), w, target))
    elif kind == "labels":
        refused(lambda: run(x, w, draw.choice([[0], torch.zeros(len(x) + 1, dtype=torch.int64), (target, target)])))
    elif kind == "label" and len(x):
        refused(lambda: run(x, w, torch.full((len(x),), len(w) + 5)))
    elif kind == "no classes":
        refused(lambda: run(x, w[:0], target))


def sampled(draw: Draw, run: Any) -> None:
    """All negatives are the exact loss, and a draw depends on seed and step alone."""
    some = ltk.distributed.NegativeSampling(draw.choice([0.1, 0.5, 0.9]), draw.randrange(1000), draw.randrange(9))
    same = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(run(some._replace(rate=1.0)), run(None), **same)
    torch.testing.assert_close(run(some), run(some), **same)
    refused(lambda: run(some._replace(rate=draw.choice([0.0, 1.5, math.nan, -0.1, "half"]))))
    refused(lambda: run(draw.choice([some._replace(step=-1), some._replace(step=0.5), 0.5, (0.5, 1)])))


def sharded(seed: int, cases: int) -> Tally:
    """At one process; tests/test_sharded.py has more of them."""
    missing(set(ltk.distributed.__all__), {"sharded_linear_adjusted_cross_entropy", "NegativeSampling"})
    with tempfile.TemporaryDirectory() as folder:
        refused_before = False
        try:
            ltk.distributed.sharded_linear_adjusted_cross_entropy(
                torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1).long(), class_start=0, num_classes=1
            )
        except RuntimeError as error:
            refused_before = "process group" in str(error)
        assert refused_before, "without a process group the call must say so"
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/one", rank=0, world_size=1)

        def one(draw: Draw) -> None:
            given, target, options, wanted = head_inputs(draw)
            normalize = draw.say("normalize", draw.chance(0.4))
            whole = {"class_start": 0, "num_classes": len(given[1])}
            shard = ltk.distributed.sharded_linear_adjusted_cross_entropy
            if draw.chance(0.15):
                spoiled_head(draw, lambda *a, **k: shard(*a, **{**whole, **options, **k}), given, target)
                refused(lambda: shard(*given[:2], target, **{**whole, "class_start": 1}))
                refused(lambda: shard(*given[:2], target, **{**whole, "num_classes": len(given[1]) + 1}))
                return
            call = lambda x, w, b: shard(x, w, target, bias=b, normalize=normalize, **whole, **options)  # noqa: E731
            head_check(call, given, target, normalize, wanted)
            if draw.chance(0.3):
                sampled(draw, lambda s: shard(*given[:2], target, normalize=normalize, sampling=s, **whole, **options))

        tally = loop(seed, cases, one)
        torch.distributed.destroy_process_group()
    return tally


PARTS = (
    Part(
        "loss functions",
        "every function of ltkernels.functional against the float64 oracle, spoiled calls refused",
        1200,
        functions,
    ),
    Part("loss modules", "every Module of ltkernels.nn, the same", 500, modules),
    Part(
        "linear heads", "classifier and loss in one, any chunking, against oracle and autograd in float64", 300, heads
    ),
    Part("sharded loss", "the class-sharded loss at one process, the same", 200, sharded),
)
