"""Fuzzing of what stands beside losses and selection: neighbours and their values, k-DPP samples, Sinkhorn labels, LADER, wider heads; each
against its definition in float64, bad input refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from _draw import DTYPES, INF, NAN, Draw, loop, missing, refused
from _part import Part, Tally
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels import neighbors, selection
from ltkernels._sinkhorn import iterated

METRICS = ("cosine", "euclidean")


def rows(draw: Draw, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Features without a row of zeros; some of them twice."""
    x = draw.normal(count, width)
    if draw.chance(0.3):
        x += 20.0
    if draw.chance(0.3) and count > 1:
        x[1::2] = x[: len(x[1::2])].clone()
    x[:, 0] += (x.abs().sum(1) == 0).double()
    return draw.layout(x.to(dtype))


def similarity(q: Tensor, r: Tensor, metric: str) -> Tensor:
    q, r = q.double(), r.double()
    if metric == "cosine":
        return F.normalize(q, dim=1) @ F.normalize(r, dim=1).T
    return -((q[:, None] - r[None]) ** 2).sum(dim=2)


def search(draw: Draw) -> None:
    metric, dtype = draw.say("metric", draw.choice(METRICS)), draw.say("dtype", draw.choice(DTYPES))
    count, width = draw.say("M, D", (draw.size(3000 if draw.chance(0.1) else 90), draw.size(20)))
    r, q = rows(draw, count, width, dtype), rows(draw, draw.size(600 if draw.chance(0.05) else 12, 0.05), width, dtype)
    own = draw.integers(-1, count, len(q)) if count > 1 and draw.chance(0.4) else None
    k = draw.say("k", draw.randint(1, count - (own is not None)))
    given = None if own is None else draw.given(own)
    found = neighbors.nearest_neighbors(draw.given(q), draw.given(r), k, metric=metric, own=given)
    s = similarity(q, r, metric)
    if own is not None:
        excluded = (own >= 0).nonzero().squeeze(1)
        s[excluded, own[excluded]] = -math.inf
    wanted = s.sort(dim=1, descending=True, stable=True).values[:, :k]
    scale = 1.0 if metric == "cosine" else 4.0 * float((r.double() - r.double().mean(0)).square().sum(1).max() + 1)
    scale += (
        0.0
        if metric == "cosine" or not len(q)
        else 4.0 * float((q.double() - r.double().mean(0)).square().sum(1).max())
    )
    near = scale * (1e-13 if dtype == torch.float64 else 3e-6)
    assert bool((found.similarity.double() - wanted).abs().le(near).all()), "not the largest similarities"
    assert bool((s.gather(1, found.indices) - wanted).abs().le(2 * near).all()), "indices of other rows"
    assert all(len(set(each)) == k for each in found.indices.tolist())
    bad = r.double().clone()
    bad[draw.randrange(count), draw.randrange(width)] = draw.choice([NAN, INF, -INF])
    refused(lambda: neighbors.nearest_neighbors(q, bad, 1, metric=metric))
    refused(lambda: neighbors.nearest_neighbors(q, r, draw.choice([0, -1, count + 1, 1.0, True, None]), metric=metric))
    refused(lambda: neighbors.nearest_neighbors(q, r, 1, metric=draw.choice(["l2", None, 3])))
    refused(lambda: neighbors.nearest_neighbors(torch.cat([q, q], 1), r, 1, metric=metric))
    refused(lambda: neighbors.nearest_neighbors(q, r, 1, metric=metric, own=torch.full((len(q) + 1,), -1)))


def classify(draw: Draw) -> None:
    metric, classes = draw.say("metric", draw.choice(METRICS)), draw.say("C", draw.size(9))
    count, width = draw.say("M, D", (1 + draw.size(60), draw.size(9)))
    x, q, y = rows(draw, count, width, torch.float64), draw.normal(5, width) + 0.01, draw.integers(0, classes, count)
    k, balance = draw.say("k", draw.randint(1, count)), draw.say("balance", draw.choice([0.0, 0.5, 1.0]))
    temperature = draw.say("temperature", draw.choice([None, 0.07, 1.0, 1e-300]))
    knn = neighbors.KNeighborsClassifier(
        draw.given(x),
        draw.given(draw.layout(y)),
        k,
        metric=metric,
        balance=balance,
        temperature=temperature,
        num_classes=classes,
    )
    scores = knn.scores(q)
    assert bool(scores.isfinite().all())
    assert bool((scores >= 0).all())
    if temperature is None:
        counts = torch.bincount(y, minlength=classes).clamp(min=1).double() ** balance
        assert torch.allclose((scores * counts).sum(1), torch.full((5,), float(k), dtype=torch.float64))
    assert torch.equal(knn.predict(q), scores.argmax(1))
    ncm = neighbors.NearestClassMean(width, classes, metric=metric)
    for part in torch.tensor_split(torch.arange(count), [draw.randint(0, count)]):
        ncm.update(draw.given(x[part]), draw.given(y[part]))
    present = sorted(set(y.tolist()))
    means = torch.stack([x[y == c].mean(0) for c in present])
    s = similarity(q, means, metric)
    top = s.topk(min(2, len(present)), dim=1).values
    clear = (top[:, 0] - top[:, -1] > 1e-9 * (1 + s.abs().amax(1))) | (len(present) == 1)
    assert torch.equal(ncm.predict(q)[clear], torch.tensor(present)[s.argmax(1)][clear])
    refused(lambda: neighbors.KNeighborsClassifier(x, y[:-1], 1))
    refused(lambda: neighbors.KNeighborsClassifier(x, y.double(), 1))
    refused(lambda: neighbors.KNeighborsClassifier(x, y - classes, 1))
    refused(
        lambda: neighbors.KNeighborsClassifier(
            x, y, 1, **draw.choice([{"balance": -1}, {"temperature": 0}, {"num_classes": 0}])
        )
    )
    refused(lambda: ncm.update(x, y + classes))


def values(draw: Draw) -> None:
    count, width, k = draw.say("M, D, k", (1 + draw.size(80), draw.size(5), draw.size(9)))
    k = min(k, count)
    x, y = rows(draw, count, width, torch.float64), draw.integers(0, 3, count)
    v, w = draw.normal(draw.size(9), width), draw.integers(0, 3, 9)
    w = w[: len(v)]
    each = neighbors.knn_shapley(draw.given(x), draw.given(y), draw.given(v), draw.given(w), k, average="sample")
    indices = neighbors.nearest_neighbors(v, x, k, metric="euclidean").indices
    share = (y[indices] == w[:, None]).double().mean()
    assert abs(float(each.sum() - share)) < 1e-9, "the values do not sum to the share of neighbours that match"
    error = draw.say("tolerance", draw.choice([0.5, 0.1, 0.01]))
    gap = neighbors.knn_shapley(x, y, v, w, k, average="sample", tolerance=error) - each
    assert float(gap.abs().max()) <= error + 1e-12
    balanced = neighbors.knn_shapley(x, y, v, w, k)
    parts = [neighbors.knn_shapley(x, y, v[w == c], w[w == c], k) for c in sorted(set(w.tolist()))]
    assert torch.allclose(balanced, torch.stack(parts).mean(0), rtol=1e-9, atol=1e-12)
    refused(lambda: neighbors.knn_shapley(x, y, v, w, draw.choice([0, count + 1, 1.5])))
    refused(lambda: neighbors.knn_shapley(x, y, v, w, k, tolerance=draw.choice([-1.0, NAN, "1"])))
    refused(lambda: neighbors.knn_shapley(x, y, v, torch.cat([w, w]), k))


def k_dpp(draw: Draw) -> None:
    """Of `ltkernels.selection`; its part of the campaign calls it."""
    count, width = draw.say("M, D", (draw.randint(1, 7), draw.randint(1, 7)))
    x = draw.normal(count, width)
    k = draw.say("k", draw.randint(1, min(count, width)))
    quality = draw.uniform(count, low=0.1, high=3.0) if draw.chance(0.5) else None
    seed = draw.any_seed()
    picked = selection.sample_k_dpp(draw.layout(x), k, quality=quality, seed=seed)
    assert len(set(picked.tolist())) == k
    assert torch.equal(picked, selection.sample_k_dpp(draw.given(x), k, quality=quality, seed=seed))
    total = sum(
        math.exp(selection.k_dpp_log_probability(draw.given(x), draw.given(torch.tensor(chosen)), quality=quality))
        for chosen in itertools.combinations(range(count), k)
    )
    assert abs(total - 1) < 1e-6, f"the probabilities sum to {total}"
    refused(lambda: selection.sample_k_dpp(x, draw.choice([0, count + 1, 1.5, True])))
    refused(lambda: selection.sample_k_dpp(x[:1].expand(count + 1, -1), 2))
    refused(
        lambda: selection.sample_k_dpp(x, k, quality=draw.choice([[NAN] * count, [-1.0] * count, [1.0] * (count + 1)]))
    )
    refused(lambda: selection.k_dpp_log_probability(x, draw.choice([[0, 0], [count], [-1], []])))


def labels(draw: Draw) -> None:
    dtype, size = draw.say("dtype", draw.choice(DTYPES)), draw.say("B, K", (draw.size(60), draw.size(40)))
    epsilon, limit = draw.say("epsilon, limit", (draw.choice([0.01, 0.05, 1.0]), draw.choice([0, 1, 20])))
    s = draw.uniform(*size, low=-1.0).to(dtype)
    prior = draw.uniform(size[1], low=0.01)
    found = ltk.functional.sinkhorn(draw.layout(s), draw.given(prior), epsilon, 0.0, limit)
    wanted = iterated(s.double(), prior / prior.sum(), epsilon, 0.0, limit)
    near = (1e-11 if dtype == torch.float64 else 2e-5) / epsilon
    assert float((found.labels - wanted.labels).abs().max()) < near
    assert abs(found.error - wanted.error) < near
    bad = s.double().clone()
    bad[draw.randrange(size[0]), draw.randrange(size[1])] = draw.choice([NAN, INF, -INF])
    refused(lambda: ltk.functional.sinkhorn(bad, prior, epsilon))
    refused(lambda: ltk.functional.sinkhorn(s, prior * draw.choice([0.0, -1.0, NAN, INF]), epsilon))
    refused(lambda: ltk.functional.sinkhorn(s, torch.cat([prior, prior]), epsilon))
    refused(lambda: ltk.functional.sinkhorn(s, prior, draw.choice([0.0, -1.0, NAN, INF, "1", True])))
    refused(lambda: ltk.functional.sinkhorn(draw.choice([s[:0], s[0], s.long()]), prior, epsilon))


def regularised(draw: Draw) -> None:
    classes, count = draw.say("C, N", (draw.size(20), draw.size(12)))
    dtype, importance = draw.choice(DTYPES), draw.say("importance", draw.choice(["class", "sample"]))
    z, y = draw.normal(count, classes).to(dtype), draw.integers(0, classes, count)
    y[draw.uniform(count) < 0.2] = -100
    counts = draw.counts(classes)
    prior = torch.tensor(counts).double() / sum(counts)
    total, kept = 0.0, (y != -100).nonzero().squeeze(1)
    for c in range(classes) if len(kept) else ():
        weight = (prior[c] if importance == "class" else prior[y[kept]]).log() + math.log(classes)
        h = float(torch.logsumexp(z[kept, c].double() - weight, 0)) - math.log(len(kept))
        own = z[y == c, c].double()
        total -= float(prior[c]) * ((float(own.mean()) if len(own) else 0.0) - h - 0.2 * h * h)
    found = ltk.functional.lader(draw.layout(z), draw.layout(y), prior.to(torch.float32), 0.2, importance)
    assert abs(float(found) - total) <= 1e-5 * (10 + abs(total)), f"{float(found)} is not {total}"
    if len(kept):
        loss = ltk.nn.LADE(counts, alpha=0.5, lam=0.2, importance=importance)
        plain = F.cross_entropy(z.double() + prior.log(), y)
        assert abs(float(loss(z, y)) - float(plain) - 0.5 * total) <= 2e-5 * (10 + abs(total))
    refused(lambda: ltk.functional.lader(z, y.where(y < 0, classes), prior) if len(kept) else _refuse())
    refused(lambda: ltk.functional.lader(z, y, -prior))
    refused(lambda: ltk.functional.lader(z, y, prior, draw.choice([-1.0, NAN, "1"])))
    refused(lambda: ltk.nn.LADE(counts)(z, y, reduction=draw.choice(["none", "sum"])))


def _refuse() -> None:
    ltk.functional.lader(torch.zeros(1, 1), torch.tensor([1]), torch.ones(1))


def wider(draw: Draw) -> None:
    classes, count, width = draw.say("C, N, D", (draw.size(20), draw.size(12), draw.size(9)))
    h, w, y = draw.normal(count, width), draw.normal(classes, width), draw.integers(0, classes, count)
    lam = draw.say("lam", draw.choice([0.0, 0.25, 1]))
    x = draw.normal(classes * 5, width)
    variance = ltk.nn.ClassVariances(width, classes).update(x, torch.arange(classes * 5) % classes).variance
    own = torch.stack([x[c::classes].var(dim=0, correction=0) for c in range(classes)])
    assert torch.allclose(variance, own, rtol=1e-9)
    wide, weights = ltk.functional.isda_head(draw.layout(h), draw.layout(w), draw.layout(y), draw.layout(variance), lam)
    loss = ltk.functional.linear_adjusted_cross_entropy(wide, weights, y)
    a = h @ w.T + lam / 2 * ((w[None] - w[y][:, None]) ** 2 * variance[y][:, None]).sum(dim=2)
    assert abs(float(loss - F.cross_entropy(a, y))) < 1e-10 * (1 + float(a.abs().max()))
    align = ltk.nn.DisAlign(width, classes).double()
    with torch.no_grad():
        for parameter in align.parameters():
            parameter.copy_(draw.normal(*parameter.shape))
    z, c = draw.normal(count, classes), torch.sigmoid(h @ align.confidence.detach()).unsqueeze(1)
    wanted = c * (align.scale * z + align.shift) + (1 - c) * z
    assert torch.allclose(align(draw.layout(z), draw.layout(h)), wanted, rtol=1e-10, atol=1e-12)
    refused(lambda: align(z, torch.cat([h, h], 1)))
    refused(lambda: ltk.functional.isda_head(h, w, y, variance, draw.choice([-1.0, NAN, "1"])))
    refused(lambda: ltk.functional.isda_head(h, w, y, torch.cat([variance, variance]), lam))
    refused(lambda: ltk.nn.DisAlign.class_weights(draw.choice([[0, 1], [], [1.5]])))


NEIGHBORS: dict[Callable[[Draw], None], set[str]] = {
    search: {"nearest_neighbors", "Neighbors", "METRICS"},
    classify: {"KNeighborsClassifier", "NearestClassMean"},
    values: {"knn_shapley"},
}
# Of ltkernels.functional and ltkernels.nn; the parts of losses.py have the others.
FUNCTIONS = {"sinkhorn", "SinkhornLabels", "lader", "isda_head"}
MODULES = {"LADE", "DisAlign", "ClassVariances"}


def of_neighbors(seed: int, cases: int) -> Tally:
    missing(set(neighbors.__all__), set().union(*NEIGHBORS.values()))
    checks = list(NEIGHBORS)
    return loop(seed, cases, lambda draw: checks[draw.case % len(checks)](draw))


def of_losses(seed: int, cases: int) -> Tally:
    checks = (labels, regularised, wider)
    return loop(seed, cases, lambda draw: checks[draw.case % len(checks)](draw))


PARTS = (
    Part(
        "neighbors", "neighbours, votes, class means and KNN-Shapley values against whole matrices", 150, of_neighbors
    ),
    Part("labels and heads", "Sinkhorn labels, LADER, ISDA and DisAlign against their definitions", 150, of_losses),
)
