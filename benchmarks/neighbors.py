"""Nearest neighbours, KNN-Shapley values, Sinkhorn labels and GCL on the CPU, against scikit-learn, FAISS and plain torch.

    python -m benchmarks.neighbors --out benchmarks/results/neighbors-cpu.json

A row has B queries (rows of a batch), C references (classes), D features; `mode` says the options. `torch` is the
definition with its whole matrix of distances, its loop of iterations, its array of noise. `ok` says that the answer agreed with float64
before it was timed (GCL of torch, which draws other numbers: that its loss is within 5 %).
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels._sinkhorn import iterated

from . import harness

CELLS = [
    ("k-NN votes", "k=5", 1000, 128, 50_000),
    ("k-NN votes", "k=20", 2000, 512, 20_000),
    ("k-NN votes", "k=200", 1000, 64, 50_000),
    ("k-NN votes", "k=5", 200, 32, 2000),
    ("KNN-Shapley", "k=5", 200, 64, 20_000),
    ("KNN-Shapley", "k=5, tolerance=0.001", 200, 64, 20_000),
    ("Sinkhorn labels", "300 iterations", 512, None, 100),
    ("GCL", "forward+backward", 256, None, 1000),
    ("GCL", "forward+backward", 128, None, 100),
]
PEERS = ("scikit-learn", "faiss", "torch")
CLASSES = 100
Call = Callable[[Tensor], object]


def options_of(mode: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", mode)}


def classes_of(count: int) -> Tensor:
    """Labels of a long tail."""
    return (torch.rand(count, generator=torch.Generator().manual_seed(1)) ** 2 * CLASSES).long()


def distances(q: Tensor, r: Tensor) -> Tensor:
    return (q * q).sum(1, keepdim=True) - 2 * q @ r.T + (r * r).sum(1)


def votes(indices: Tensor, y: Tensor) -> Tensor:
    found = torch.zeros(len(indices), CLASSES, dtype=torch.float64)
    return found.scatter_add_(1, y[indices], torch.ones(indices.shape, dtype=torch.float64))


def nearest_votes(backend: str, r: Tensor, y: Tensor, k: int) -> Call | None:
    """(queries) -> (Q, CLASSES) votes."""
    if backend == "ours":
        return ltk.neighbors.KNeighborsClassifier(r, y, k, metric="euclidean", num_classes=CLASSES).scores
    if backend == "torch":
        return lambda q: votes(distances(q, r).topk(k, dim=1, largest=False).indices, y)
    if importlib.util.find_spec({"faiss": "faiss", "scikit-learn": "sklearn"}[backend]) is None:
        return None
    if backend == "faiss":
        import faiss

        index = faiss.IndexFlatL2(r.shape[1])
        index.add(r.numpy())
        return lambda q: votes(torch.from_numpy(index.search(q.numpy(), k)[1]), y)
    from sklearn.neighbors import KNeighborsClassifier

    theirs = KNeighborsClassifier(k, algorithm="brute").fit(r.numpy(), y.numpy())
    here = torch.from_numpy(theirs.classes_)

    def scores(q: Tensor) -> Tensor:
        found = torch.zeros(len(q), CLASSES, dtype=torch.float64)
        found[:, here] = torch.from_numpy(theirs.predict_proba(q.numpy())) * k
        return found

    return scores


def shapley(q: Tensor, r: Tensor, y: Tensor, own: Tensor, k: int) -> Tensor:
    """The recursion on the whole matrix of distances."""
    order = distances(q, r).argsort(dim=1, stable=True)
    match = (y[order] == own[:, None]).double()
    place = torch.arange(1, len(r), dtype=torch.float64).clamp(min=k)
    last = match[:, -1:] / max(k, len(r))
    steps = torch.cat([(match[:, :-1] - match[:, 1:]) / place, last], dim=1)
    each = steps.flip(1).cumsum(1).flip(1)
    return torch.zeros(len(q), len(r), dtype=torch.float64).scatter_(1, order, each).mean(0)


def gcl_eager(z: Tensor, y: Tensor, table: Tensor) -> Tensor:
    noise = (torch.randn_like(z) / 3).clamp(-1, 1).abs()
    return F.cross_entropy(30.0 * (z - noise * table), y)


def prepare(backend: str, cell: dict[str, Any]) -> harness.Prepared | None:
    g = torch.Generator().manual_seed(0)
    rows, width, count = cell["B"], cell["D"], cell["C"]
    told = options_of(cell["mode"])
    k = int(told.get("k", 0))
    row = {"backend": f"cpu-{ltk._C.info()['isa']}" if backend == "ours" else backend}
    if cell["op"] in ("k-NN votes", "KNN-Shapley"):
        r, q, y = torch.randn(count, width, generator=g), torch.randn(rows, width, generator=g), classes_of(count)
        if cell["op"] == "k-NN votes":
            call = nearest_votes(backend, r, y, k)
            if call is None:
                return None
            found = call(q)
            truth = votes(distances(q.double(), r.double()).topk(k, dim=1, largest=False).indices, y)
            # Near ties may fall either way in float32: one vote in a thousand.
            ok = isinstance(found, Tensor) and float((found - truth).abs().sum()) <= 2e-3 * k * rows
            return harness.Prepared([lambda: call(q)], ok, row)
        own, tolerance = classes_of(rows), told.get("tolerance", 0.0)
        if backend == "ours":
            value: Call = lambda q: ltk.neighbors.knn_shapley(  # noqa: E731
                r, y, q, own, k, average="sample", tolerance=tolerance
            )
        elif backend == "torch":
            value = lambda q: shapley(q, r, y, own, k)  # noqa: E731
        else:
            return None
        error = (value(q) - shapley(q.double(), r.double(), y, own, k)).abs().max()
        return harness.Prepared([lambda: value(q)], float(error) <= max(tolerance, 1e-5), row)
    if backend not in ("ours", "torch"):
        return None
    if cell["op"] == "Sinkhorn labels":
        s = F.normalize(torch.randn(rows, 32, generator=g)) @ F.normalize(torch.randn(count, 32, generator=g)).T
        prior = 0.97 ** torch.arange(count, dtype=torch.float64)
        prior /= prior.sum()

        def labels() -> Tensor:
            if backend == "ours":
                return ltk.functional.sinkhorn(s, prior, 0.05, tol=0.0, max_iterations=300).labels
            return iterated(s, prior, 0.05, 0.0, 300).labels

        truth = iterated(s.double(), prior, 0.05, 0.0, 300).labels
        return harness.Prepared([labels], float((labels() - truth).abs().max()) < 1e-4, row)
    z = torch.rand(rows, count, generator=g).requires_grad_()
    y = torch.randint(0, count, (rows,), generator=g)
    loss = ltk.nn.GCL([int(1000 * 0.995**c) + 1 for c in range(count)])
    table = loss.term_table

    def step() -> Tensor:
        z.grad = None
        value = loss(z, y) if backend == "ours" else gcl_eager(z, y, table)
        value.backward()
        return value

    torch.manual_seed(0)
    truth = torch.stack([gcl_eager(z.detach().double(), y, table.double()) for _ in range(20)]).mean()
    return harness.Prepared([step], abs(float(step().detach() / truth) - 1) < 0.05, row)


def main(argv: list[str] | None = None) -> int:
    options = harness.parser("neighbors", __doc__, PEERS).parse_args(argv)
    cells = [{"op": op, "B": b, "C": c, "D": d, "mode": mode} for op, mode, b, d, c in CELLS]
    return harness.run(__spec__.name, options, prepare, cells, kind="neighbors")


if __name__ == "__main__":
    sys.exit(main())
