"""Promise: every contrastive loss has the value of its definition, worked out from pairs, on every instruction set and in every dtype."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ltkernels as ltk
from ltkernels.contrastive import _kinds, _rows, _symmetric

contrastive = ltk.functional.contrastive
F64 = torch.float64
PI = torch.tensor([0.6, 0.3, 0.1], dtype=F64)
COUNTS = [6, 3, 1]


def at(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees, dtype=F64) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], 1)


# The fixtures of the specification: rows, centres and keys in the plane.
ROWS, CENTRES, KEYS = at(0, 60, 90, 150), at(0, 90, 180), at(10, 80, 100, 170, 20, 200)
KEY_LABELS = torch.tensor([0, 1, 1, 2, 0, 2])
TWO, THREE_ONE, SINGLES = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 2])
HIDDEN = torch.tensor([[1, 0.2], [0.5, 0.5], [0.1, 0.9], [-0.3, 0.4]], dtype=F64)
LOGITS = HIDDEN @ torch.tensor([[1, 0], [0, 1], [-1, 0]], dtype=F64).t()


def close(found: Tensor, expected: float | list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-6)


def test_numbers_of_the_specification() -> None:
    def rows(labels: Tensor, kind: str = "supcon", **said) -> Tensor:
        return contrastive(ROWS, labels, kind, **{"tau": 0.5, "reduction": "none", **said})

    def mean(labels: Tensor, kind: str = "supcon", **said) -> Tensor:
        return contrastive(ROWS, labels, kind, **{"tau": 0.5, **said})

    close(contrastive(ROWS.reshape(2, 2, 2), kind="ntxent", tau=0.5), 0.798657)
    close(contrastive(ROWS, TWO, "ntxent", tau=0.5), 0.798657)
    close(mean(TWO), 0.798657)
    close(rows(SINGLES), [0.359746, 1.237568, 0, 0])
    close(mean(SINGLES), 0.798657)
    close(mean(SINGLES, reduction="batch_mean"), 0.399328)
    close(rows(THREE_ONE), [0.859746, 0.871543, 1.371543, 0])
    close(rows(TWO, "balanced", centres=CENTRES), [0.277431, 0.972364, 0.652275, 1.177226])
    close(mean(TWO, "balanced", centres=CENTRES), 0.769824)
    close(rows(THREE_ONE, "balanced", centres=CENTRES), [0.487551, 0.756146, 1.574925, 1.239490])
    close(mean(THREE_ONE, "balanced", centres=CENTRES), 1.014528)
    queue = {"queue": KEYS, "queue_labels": KEY_LABELS}
    close(rows(TWO, "gml", class_counts=COUNTS, **queue), [0.077786, 0.526163, 0.417770, 0.577313])
    close(mean(TWO, "gml", class_counts=COUNTS, **queue), 0.399758)
    one = {"keys": at(10), "queue": at(80, 20, 200, 100), "queue_labels": torch.tensor([1, 0, 2, 1]), "positives": 1}
    close(contrastive(ROWS[:1], TWO[:1], "kcl", tau=0.5, **one), 0.847583)
    for kind in ("paco", "gpaco"):
        own = {"logits": LOGITS, "class_counts": COUNTS, "tau": 0.2, "alpha": 0.05, "beta": 1.0}
        close(rows(TWO, kind, **own), [2.138329, 4.398610, 4.677212, 3.301479])
        close(mean(TWO, kind, **own), 3.628907)


def test_columns_of_logits_that_are_not_held() -> None:
    """The head with its roles swapped: classes are the rows, samples the columns; what LADER sums over the batch."""
    weight = torch.tensor([[1, 0], [0, 1], [-1, 0]], dtype=F64)
    other, _ = ltk.functional.linear_logsumexp(weight, HIDDEN)
    torch.testing.assert_close(other, torch.logsumexp(HIDDEN @ weight.t(), 0))


# ---- definitions, pair by pair, in float64 ---------------------------------------------------------------------------


def units(x: Tensor) -> Tensor:
    return x.double() / x.double().norm(dim=1, keepdim=True)


def lse(values: list[Tensor]) -> Tensor:
    return torch.logsumexp(torch.stack(values), 0)


def by_pairs(features: Tensor, labels: Tensor, kind: str, said: dict) -> list[Tensor | None]:
    """The loss of every row, None for a row without a positive."""
    z, tau = units(features), said.get("tau", 0.1)
    n = len(z)
    losses: list[Tensor | None] = []
    counts = torch.tensor(said.get("class_counts", [1]), dtype=F64)
    pi = counts / counts.sum()
    queue = units(said["queue"]) if "queue" in said else None
    centres = units(said["centres"]) if "centres" in said else None
    keys = units(said["keys"]) if "keys" in said else None
    for i in range(n):
        y = int(labels[i])
        if y == -100:
            losses.append(None)
            continue
        batch = [j for j in range(n) if j != i and int(labels[j]) != -100]
        s = {j: z[i] @ z[j] / tau for j in batch}
        same = [j for j in batch if int(labels[j]) == y]
        if kind in ("supcon", "supcon_in"):
            if not same:
                losses.append(None)
                continue
            everyone = lse([s[j] for j in batch])
            inside = lse([s[j] for j in same]) - math.log(len(same))
            losses.append(everyone - (torch.stack([s[j] for j in same]).mean() if kind == "supcon" else inside))
        elif kind == "balanced":
            terms, positive = [], []
            for c in range(len(centres)):
                members = [s[j] for j in batch if int(labels[j]) == c] + [z[i] @ centres[c] / tau]
                terms.append(lse(members) - math.log(len(members)))
                if c == y:
                    positive = members
            losses.append(lse(terms) - torch.stack(positive).mean())
        elif kind == "moco":
            own = z[i] @ keys[i] / tau
            losses.append(lse([own, *(queue @ z[i] / tau)]) - own)
        elif kind == "kcl":
            own = z[i] @ keys[i] / tau
            members = [z[i] @ q / tau for q, c in zip(queue, said["queue_labels"]) if int(c) == y]
            losses.append(lse([own, *(queue @ z[i] / tau)]) - torch.stack([own, *members]).mean())
        elif kind == "gml":
            terms = {}
            for c in range(len(pi)):
                members = [z[i] @ q / tau for q, k in zip(queue, said["queue_labels"]) if int(k) == c]
                if members:
                    terms[c] = pi[c].log() + lse(members) - math.log(len(members))
            losses.append(lse(list(terms.values())) - terms[y] if y in terms else None)
        elif kind == "paco":
            a = said["logits"][i].double() + pi.log()
            others = [(s[j], int(labels[j])) for j in batch]
            if keys is not None:
                others += [(z[i] @ k / tau, int(c)) for k, c in zip(keys, labels) if int(c) != -100]
            if queue is not None:
                others += [(z[i] @ q / tau, int(c)) for q, c in zip(queue, said["queue_labels"]) if int(c) >= 0]
            alpha, beta, gamma = said["alpha"], said["beta"], said["gamma"]
            positive = [v for v, c in others if c == y]
            everyone = lse([*a, *(v + math.log(gamma) for v, _ in others)])
            weighted = beta * a[y] + alpha * sum(positive)
            losses.append(everyone - weighted / (beta + alpha * len(positive)))
        elif kind == "prototypes":
            t = centres @ z[i] / tau
            losses.append(lse([t[c] for c in range(len(t)) if c != y]) - t[y])
    return losses


def drawn(rows: int = 23, width: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) * 7 % 5
    labels[labels == 4] = 1
    labels[3], labels[5] = 4, -100  # a class of one, and an ignored row
    return torch.randn(rows, width, generator=generator, dtype=F64), labels


def arguments(kind: str, labels: Tensor, width: int = 9) -> dict:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    n = len(labels)
    held = torch.arange(31) * 3 % 5
    held[held == 3] = 2  # class 3 is not in the queue
    queue = {"queue": noise(31, width), "queue_labels": held}
    keys = {"keys": noise(n, width)}
    classes = {"class_counts": [40, 1, 12, 3, 7]}
    own = {
        "balanced": {"centres": noise(5, width)},
        "prototypes": {"centres": noise(5, width)},
        "moco": {**keys, "queue": queue["queue"]},
        "kcl": {**keys, **queue, "positives": 100},  # all of them: no draw
        "gml": {**queue, **classes},
        "paco": {"logits": noise(n, 5), **classes, **keys, **queue, "alpha": 0.3, "beta": 0.7, "gamma": 1.5},
    }
    own["paco"]["queue_labels"] = torch.where(torch.arange(31) % 6 == 0, -1, held)
    return own.get(kind, {})


FIXED = drawn()
KINDS = ["supcon", "supcon_in", "balanced", "moco", "kcl", "gml", "paco", "prototypes"]
LEAVES = {"balanced": "centres", "prototypes": "centres", "paco": "logits"}
TOLERANCES = {F64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def in_dtype(value, dtype: torch.dtype):
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tau", [0.1, 0.02])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_against_pairs(kind: str, dtype: torch.dtype, tau: float, reduction: str) -> None:
    """tau .02 leaves the range of a fixed reference. 16-bit inputs are compared with what they hold."""
    against_pairs(kind, dtype, tau, reduction)


def against_pairs(kind: str, dtype: torch.dtype, tau: float, reduction: str, **how) -> None:
    """`how` is said to our call alone."""
    features, labels = drawn()
    if kind == "moco":
        labels = torch.zeros_like(labels)
    said = {name: in_dtype(value, dtype) for name, value in arguments(kind, labels).items()}
    features, said["tau"] = features.to(dtype), tau
    leaves = {"features": features, **({LEAVES[kind]: said[LEAVES[kind]]} if kind in LEAVES else {})}

    exact = {name: value.double().requires_grad_() for name, value in leaves.items()}
    rows = by_pairs(exact["features"], labels, kind, {**said, **exact})
    counted = [row for row in rows if row is not None]
    upstream = torch.linspace(0.5, 2, len(rows), dtype=F64)
    if reduction == "mean":
        value = expected = torch.stack(counted).mean()
    else:
        expected = torch.stack([torch.zeros((), dtype=F64) if row is None else row for row in rows])
        value = (expected * upstream).sum()
    value.backward()

    ours = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    loss = contrastive(
        ours["features"],
        None if kind == "moco" else labels,
        kind,
        reduction=reduction,
        **{**said, **{k: v for k, v in ours.items() if k != "features"}, **how},
    )
    assert loss.dtype == (F64 if dtype == F64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    (loss.sum() if reduction == "mean" else (loss * upstream).sum()).backward()
    for name, leaf in ours.items():
        assert leaf.grad.dtype == dtype
        size = exact[name].grad.abs().max()
        rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
        bound = (TOLERANCES[dtype] / tau * 0.1) * size + rounding * exact[name].grad.abs() + 1e-7 * rounding
        assert ((leaf.grad.double() - exact[name].grad).abs() <= bound).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_in_torch_and_the_torch_chunks_agree(kind: str, monkeypatch) -> None:
    features, labels = drawn()
    said = arguments(kind, labels)

    def run(backend: str | None = None) -> list[Tensor]:
        leaves = [features.clone().requires_grad_(), torch.tensor(0.2, dtype=F64, requires_grad=True)]
        how = {"tau": leaves[1], "chunk_rows": 5, "backend": backend}
        loss = contrastive(leaves[0], None if kind == "moco" else labels, kind, **how, **said)
        return [loss, *torch.autograd.grad(loss, leaves)]

    ours = run()
    chunks = run("torch")
    for operator in (_rows.CONTRAST, _symmetric.CONTRAST_SELF):
        monkeypatch.setattr(operator, "served", lambda *_: False)
    for found in (chunks, run()):
        torch.testing.assert_close(found, ours, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 100])
@pytest.mark.parametrize("kind", ["supcon", "supcon_in", "balanced"])
def test_chunks_of_a_batch_without_ignored_rows(kind: str, chunk_rows: int) -> None:
    """No column is shifted then, which is a way of its own through the kernels."""
    features, labels = FIXED[0], torch.where(FIXED[1] < 0, 2, FIXED[1])
    said = arguments(kind, labels)
    ours, exact = features.clone().requires_grad_(), features.clone().requires_grad_()
    loss = contrastive(ours, labels, kind, chunk_rows=chunk_rows, **said)
    expected = torch.stack([row for row in by_pairs(exact, labels, kind, said) if row is not None]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    pairs = torch.autograd.grad(loss, ours)[0], torch.autograd.grad(expected, exact)[0]
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("held", [0, 200, 1 << 22])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_exponentials_that_are_kept_for_the_gradient(dtype: torch.dtype, held: int, monkeypatch) -> None:
    """None of the chunks, the first two, or all: the others are computed again."""
    monkeypatch.setattr(_symmetric, "_ROWS", 4)
    monkeypatch.setattr(_symmetric, "_HELD", held)
    against_pairs("supcon", dtype, 0.1, "none")


@pytest.mark.parametrize("reduction", ["mean", "batch_mean", "sum"])
def test_the_batch_against_itself_and_against_columns_agree(reduction: str, monkeypatch) -> None:
    """The symmetric way, the one of columns that are given, and the definition: weights, ignored rows, gradients of all inputs."""
    features, labels = FIXED
    generator = torch.Generator().manual_seed(3)
    logits, weight = (torch.rand(23, k, dtype=F64, generator=generator) for k in (5, 1))
    counts = [9, 7, 5, 3, 2]

    def run(backend: str | None) -> list[Tensor]:
        leaves = [
            features.clone().requires_grad_(),
            logits.clone().requires_grad_(),
            torch.tensor(0.2, dtype=F64, requires_grad=True),
        ]
        said = {"logits": leaves[1], "class_counts": counts, "tau": leaves[2], "alpha": 0.3, "beta": 1.2, "gamma": 0.7}
        table = torch.tensor(counts, dtype=F64)
        options = {"reduction": reduction, "sample_weight": weight[:, 0], "class_weight": table, "backend": backend}
        loss = contrastive(leaves[0], labels, "gpaco", **said, **options)
        return [loss, *torch.autograd.grad(loss, leaves)]

    ours = run(None)
    torch.testing.assert_close(ours, run("torch"), rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(_symmetric.CONTRAST_SELF, "served", lambda *_: False)
    torch.testing.assert_close(ours, run(None), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [0.0, 1e-13, 1.0])
def test_a_row_of_no_length(length: float) -> None:
    """As torch.nn.functional.normalize has it: below 1e-12 a row keeps its length, and has a gradient along it."""
    features = FIXED[0].clone()
    at = int((FIXED[1] >= 0).nonzero()[0])
    features[at] *= length / features[at].norm()
    ours, exact = features.clone().requires_grad_(), features.clone().requires_grad_()
    loss, z = contrastive(ours, FIXED[1]), torch.nn.functional.normalize(exact)
    torch.testing.assert_close(loss, contrastive(z, FIXED[1], normalize=False))
    pairs = torch.autograd.grad(loss, ours)[0], torch.autograd.grad(contrastive(z, FIXED[1], normalize=False), exact)[0]
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-12)
    assert pairs[0][at].abs().max() > 0


def test_kcl_draws_without_replacement() -> None:
    sizes = torch.tensor([0, 1, 3, 6, 50]).repeat(2000)
    drawn = _kinds.sample_ranges(sizes, 6, torch.Generator().manual_seed(0))
    for size, row in zip(sizes.tolist()[:500], drawn.tolist()):
        found = [number for number in row if number >= 0]
        assert len(found) == min(size, 6)
        assert len(set(found)) == len(found)
        assert all(number < size for number in found)
    # Every number of 50 as often as the others: 2000 draws of 6.
    often = torch.bincount(drawn[4::5].flatten(), minlength=50).double()
    assert abs(often - 240).max() < 5 * 240**0.5
    features, labels = FIXED
    said = arguments("kcl", labels) | {"positives": 2}
    seeded = [
        contrastive(features, labels, "kcl", generator=torch.Generator().manual_seed(seed), **said).item()
        for seed in (1, 1, 2)
    ]
    assert seeded[0] == seeded[1] != seeded[2]


def test_the_recipe_of_sbcl() -> None:
    """The function in the guide, against pairs; a cluster that the queue does not hold has its own key alone."""
    guide = (Path(__file__).parent.parent / "ltkernels" / "contrastive" / "README.md").read_text()
    (recipe,) = re.findall(r"```python\n(def sbcl.*?)```", guide, flags=re.S)
    scope = {"torch": torch, "ltk": ltk}
    exec(recipe, scope)
    generator = torch.Generator().manual_seed(3)
    z, key, queue = (units(torch.randn(n, 5, generator=generator, dtype=F64)) for n in (6, 6, 20))
    label_of = torch.tensor([0, 0, 0, 1, 1, 2])  # of a cluster
    cluster, held = torch.tensor([0, 1, 2, 3, 5, 4]), torch.arange(20) % 4
    leaves = [z.clone().requires_grad_() for _ in range(2)]
    found = scope["sbcl"](leaves[0], key, cluster, label_of[cluster], queue, held, label_of[held])
    rows = []
    for i in range(6):
        c, y = int(cluster[i]), int(label_of[cluster[i]])
        for tau, factor, columns, positive in (
            (0.07, 1.0, range(20), [j for j in range(20) if held[j] == c]),
            (
                0.12,
                0.2,
                [j for j in range(20) if held[j] != c],
                [j for j in range(20) if label_of[held[j]] == y and held[j] != c],
            ),
        ):
            s = [leaves[1][i] @ k / tau for k in (key[i], *queue)]
            mean = torch.stack([s[0], *(s[1 + j] for j in positive)]).mean()
            rows.append(factor * (lse([s[0], *(s[1 + j] for j in columns)]) - mean))
    expected = torch.stack(rows).sum() / 6
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip((found, expected), leaves)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-13)
