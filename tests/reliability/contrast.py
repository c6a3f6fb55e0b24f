"""Fuzzing of the contrastive calls and of the statistics of rows, against their definitions in float64; spoiled calls must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _draw import DTYPES, Draw, loop, refused
from _part import Part, Tally
from torch import Tensor

import ltkernels as ltk
from ltkernels.contrastive import _rows, _symmetric

F, NN = ltk.functional, ltk.nn
KINDS = ("ntxent", "supcon", "supcon_in", "balanced", "moco", "kcl", "gml", "paco", "gpaco", "prototypes")
FUNCTIONS = {"contrastive", "linear_logsumexp", "row_statistics", "RowStatistics"}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}

# Modules by how they are made for C classes and width D, and called.
MODULES: dict[str, tuple[Callable[..., Any], str]] = {
    "SupCon": (lambda n, d, **o: NN.SupCon(**o), "xy"),
    "NTXent": (lambda n, d, **o: NN.NTXent(**o), "xy"),
    "BalancedContrastive": (lambda n, d, **o: NN.BalancedContrastive(len(n), d, **o), "xy"),
    "PrototypeContrastive": (lambda n, d, **o: NN.PrototypeContrastive(len(n), d, **o), "xy"),
    "MoCo": (lambda n, d, **o: NN.MoCo(64, d, **o), "xk"),
    "KCL": (lambda n, d, **o: NN.KCL(64, d, **o), "xyk"),
    "GML": (lambda n, d, **o: NN.GML(n, 64, d, **o), "xyk"),
    "PaCo": (lambda n, d, **o: NN.PaCo(n, 64, d, **o), "xzyk"),
    "GPaCo": (lambda n, d, **o: NN.GPaCo(n, **o), "xzy"),
    "LDAMHinge": (lambda n, d, **o: NN.LDAMHinge(n), "zy"),
}


def _close(found: Tensor, expected: Tensor, size: float, what: str) -> None:
    found, expected = found.double(), expected.double()
    assert torch.equal(found.isnan(), expected.isnan()), what
    good = torch.isfinite(expected)
    special = ~good & ~expected.isnan()
    assert torch.equal(found[special], expected[special]), what
    gap = (found - expected)[good].abs()
    assert (gap <= size).all(), f"{what}: {gap.max().item():.2e} above {size:.2e}"


def head(draw: Draw) -> None:
    """Both log-sum-exps and their gradients."""
    n, m, d = draw.size(40, 0.05), draw.size(3000 if draw.chance(0.1) else 90, 0.05), draw.size(20)
    dtype = draw.say("dtype", draw.choice(DTYPES))
    draw.say("shape", (n, m, d))
    spread = draw.say("spread", draw.choice([0.1, 1.0, 1.0, 20.0]))
    a, b = draw.layout((draw.normal(n, d) * spread).to(dtype)), draw.layout(draw.normal(m, d).to(dtype))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    said: dict[str, Any] = {"normalize": draw.say("normalize", draw.chance(0.5))}
    if draw.chance(0.5):
        said["row_scale"] = draw.uniform(n, low=-1.0, high=draw.choice([3.0, 50.0])).to(real)
    if draw.chance(0.5):
        shift = torch.where(draw.uniform(m) < 0.1, -torch.inf, draw.normal(m) * draw.choice([1.0, 30.0]))
        said["shift"] = shift.to(real)
    if draw.chance(0.7):
        said["row_group"], said["column_group"] = draw.integers(0, 4, n), draw.integers(0, 4, m)
    if draw.chance(0.5) and m:
        said["own_index"] = draw.integers(-1, m, n)
    if draw.chance(0.3):
        said["chunk_rows"] = draw.size(n + 3)
    draw.say("said", sorted(said))
    if draw.chance(0.1):
        bad = draw.choice([{"shift": torch.zeros(m + 1)}, {"row_group": draw.integers(0, 4, n + 1)}, {"chunk_rows": 0}])
        refused(lambda: F.linear_logsumexp(a, b, **{**said, **bad}))
        return
    exact = [x.detach().double().clone().requires_grad_() for x in (a, b)]
    x, y = (torch.nn.functional.normalize(v, dim=1) for v in exact) if said["normalize"] else exact
    sigma = said.get("row_scale", torch.ones(n)).double()
    s = sigma[:, None] * (x @ y.t()) + said.get("shift", torch.zeros(m)).double()
    own = absent = torch.zeros(n, m, dtype=torch.bool)
    if "row_group" in said:
        own = said["row_group"][:, None] == said["column_group"]
    if "own_index" in said:
        absent = said["own_index"][:, None] == torch.arange(m)
    expected = [_rows.lse(s.masked_fill(mask | absent, -torch.inf)) for mask in (own, ~own)]
    leaves = [x.detach().requires_grad_() for x in (a, b)]
    found = F.linear_logsumexp(*leaves, **said)
    # A product's rounding grows with the lengths of its factors.
    lengths = [float(v.detach().norm(dim=1).max()) if len(v) else 0.0 for v in (x, y)]
    size = torch.finfo(real).eps * (64 + (8 + d) * float(sigma.abs().max() if n else 0.0) * lengths[0] * lengths[1])
    finite = s[torch.isfinite(s)].abs()
    size += 4 * torch.finfo(real).eps * (float(finite.max()) if len(finite) else 0.0)
    for one, other, side in zip(found, expected, ("other", "own"), strict=True):
        _close(one.detach(), other.detach(), size, side)
    if n == 0 or m == 0:
        return
    upstream = [draw.normal(n), draw.normal(n)]

    def total(sides: Any) -> Any:
        return sum((torch.where(torch.isfinite(v), v, 0).double() * u).sum() for v, u in zip(sides, upstream))

    pairs = zip(torch.autograd.grad(total(found), leaves), torch.autograd.grad(total(expected), exact), strict=True)
    for (one, other), length in zip(pairs, (lengths[1], lengths[0]), strict=True):
        # What probabilities that are off by `size` may make of it; the norm's derivative divides by the length.
        scale = 3 * float(sigma.abs().max()) * length * (n + 1)
        if said["normalize"]:
            shortest = min(float(v.detach().norm(dim=1).min()) for v in exact)
            scale *= 1 + 1 / max(shortest, 1e-3)
        _close(one, other, 8 * size * scale + (ROUNDING.get(dtype, 0.0) + 1e-9) * float(other.abs().max()), "gradient")


def losses(draw: Draw) -> None:
    """Every kind against its definition in torch, in float64, and its gradient."""
    if draw.chance(0.4):
        head(draw)
        return
    kind = draw.say("kind", draw.choice(KINDS))
    n, d, classes = draw.size(60), draw.size(16) + 3, draw.size(5) + 1
    dtype = draw.say("dtype", draw.choice(DTYPES))
    views = draw.say("views", draw.choice([1, 1, 2, 3])) if kind in KINDS[:4] else 1
    draw.say("shape", (n, views, d, classes))
    x = draw.layout((draw.normal(n, views, d) if views > 1 else draw.normal(n, d)).to(dtype))
    labels = draw.integers(0, classes, n)
    labels[draw.uniform(n) < 0.1] = -100
    held = draw.integers(-1, classes, draw.size(80))
    queue = {"queue": draw.normal(len(held), d).to(dtype), "queue_labels": held}
    keys, counts = draw.normal(n, d).to(dtype), {"class_counts": draw.counts(classes)}
    table, logits = {"centres": draw.normal(classes, d).to(dtype)}, {"logits": draw.normal(n, classes).to(dtype)}
    own: dict[str, dict[str, Any]] = {
        "balanced": table,
        "prototypes": table,
        "moco": {"keys": keys, "queue": queue["queue"]},
        "kcl": {"keys": keys, **queue, "positives": 1000},
        "gml": {**queue, **counts},
        "paco": {**logits, **counts, "keys": keys, **queue},
        "gpaco": {**logits, **counts},
    }
    said: dict[str, Any] = dict(own.get(kind, {}))
    tau = said["tau"] = draw.say("tau", draw.choice([0.01, 0.05, 0.1, 1.0]))
    said["reduction"] = draw.say("reduction", draw.choice(["mean", "batch_mean", "sum", "none"]))
    if draw.chance(0.4):
        said["sample_weight"] = draw.uniform(n)
    if draw.chance(0.3):
        said["chunk_rows"] = draw.size(n + 3)
    given = None if kind == "moco" else labels
    if draw.chance(0.1):
        bad = draw.choice([{"tau": -1.0}, {"reduction": "avg"}, {"sample_weight": torch.ones(n + 1)}, {"kind": "clip"}])
        refused(lambda: F.contrastive(x, given, **{"kind": kind, **said, **bad}))
        return

    leaf = x.detach().requires_grad_()
    found = F.contrastive(leaf, given, kind, **said)
    exact = x.detach().double().clone().requires_grad_()
    double = {name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in said.items()}
    kept = _rows.CONTRAST.served, _symmetric.CONTRAST_SELF.served
    try:
        _rows.CONTRAST.served = _symmetric.CONTRAST_SELF.served = lambda *_: False
        expected = F.contrastive(exact, given, kind, **double)
    finally:
        _rows.CONTRAST.served, _symmetric.CONTRAST_SELF.served = kept
    eps = torch.finfo(found.dtype).eps
    rows = n * views if said["reduction"] == "sum" else 1
    size = eps * (64 + (16 + d) / tau)
    _close(found.detach(), expected.detach(), size * rows, "loss")
    one, other = torch.autograd.grad(found.sum(), leaf)[0], torch.autograd.grad(expected.sum(), exact)[0]
    shortest = float(exact.detach().norm(dim=-1).min())
    scale = 3 / tau / max(shortest, 1e-3) * (1 if said["reduction"] in ("mean", "batch_mean") else n * views)
    _close(one, other, 8 * size * scale + (ROUNDING.get(dtype, 0.0) + 1e-9) * float(other.abs().max()), "gradient")


def modules(draw: Draw) -> None:
    """Two steps of every Module: finite, the same bits again from the state before, and nothing moved in evaluation."""
    name = draw.say("module", draw.choice(sorted(MODULES)))
    n, d, classes = draw.size(30), draw.size(12), draw.size(6) + 1
    make, call = MODULES[name]
    counts = draw.counts(classes)
    options = {
        "tau": draw.choice([0.05, 0.5]),
        "learnable_tau": draw.chance(0.3),
        "reduction": draw.choice(["mean", "none"]),
    }
    module = make(counts, d, **options)
    given = {"x": draw.normal(n, d).float(), "y": draw.integers(0, classes, n), "k": draw.normal(n, d).float()}
    given["z"] = draw.normal(n, classes).float()
    for training in (True, True, False):
        module.train(training)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        leaf = given[call[0]].clone().requires_grad_()
        arguments = [leaf, *(given[key] for key in call[1:])]
        draws = torch.get_rng_state()
        loss = module(*arguments)
        assert torch.isfinite(loss).all()
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert torch.isfinite(gradient).all()
        after = {key: value.clone() for key, value in module.state_dict().items()}
        assert training or all(torch.equal(before[key], after[key]) for key in before)
        module.load_state_dict(before)
        torch.set_rng_state(draws)
        assert torch.equal(module(*arguments), loss)
        assert all(torch.equal(after[key], value) for key, value in module.state_dict().items())


def statistics(draw: Draw) -> None:
    """`row_statistics` against torch."""
    n, classes = draw.size(30, 0.05), draw.size(3000 if draw.chance(0.2) else 70)
    dtype = draw.say("dtype", draw.choice(DTYPES))
    draw.say("shape", (n, classes))
    z = draw.normal(n, classes) * draw.choice([0.5, 3.0, 60.0])
    z[draw.uniform(n, classes) < draw.choice([0.0, 0.05, 0.5])] = -torch.inf
    z = draw.layout(z.to(dtype))
    y = draw.integers(0, classes, n)
    y[draw.uniform(n) < 0.1] = -100
    if draw.chance(0.1) and n:
        y[draw.randrange(n)] = classes
        refused(lambda: F.row_statistics(z, y))
        return
    found = F.row_statistics(z, y)
    a, label, valid = z.double(), y.clamp_min(0)[:, None], y >= 0
    outside = a.scatter(1, label, -torch.inf)
    highest, own = outside.amax(1), a.gather(1, label)[:, 0]
    first = torch.argmax((outside == highest[:, None]).int(), 1)
    assert torch.equal(found.other, torch.where(valid & (highest > -torch.inf), first, -1))
    _close(found.margin, torch.where(valid, own - highest, 0), 1e-4, "margin")
    assert torch.equal(found.correct, valid & (torch.argmax(a, 1) == y) & (own > -torch.inf))
    _close(found.loss, torch.nn.functional.cross_entropy(a, y, reduction="none"), 1e-3, "loss")


def _loop(one: Callable[[Draw], None]) -> Callable[[int, int], Tally]:
    return lambda seed, cases: loop(seed, cases, one)


PARTS = (
    Part(
        "contrast",
        "the two log-sum-exps and every contrastive loss, against definitions in float64",
        600,
        _loop(losses),
    ),
    Part("contrast modules", "two training steps and an evaluation of every Module", 200, _loop(modules)),
    Part("row statistics", "loss, margin, correctness, strongest other class, against torch", 300, _loop(statistics)),
)
