"""Exact nearest neighbours: scores a chunk at a time by matrix products, of which every row keeps its k largest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._features import as_tensor, check_count, check_features, check_integers, check_rows
from .._native import _C

METRICS = ("cosine", "euclidean")
# Elements of one chunk of scores: it stays in a processor's second-level cache, or nearly.
_SCORES = 2**20
_QUERIES = 512
# Rows that are looked at, converted and centred at a time.
_BLOCK = 2**22


class Neighbors(NamedTuple):
    """What `nearest_neighbors` finds.

    Attributes:
        similarity: (Q, k) float32, or float64 for float64 features, falling along each row: the cosine, or minus the squared
            Euclidean distance.
        indices: (Q, k) int64, rows of the references; of equal similarities the smaller index comes first.
    """

    similarity: Tensor
    indices: Tensor


class References:
    """Checked references in the form that the products take."""

    def __init__(self, features: Any, metric: str) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(map(repr, METRICS))}")
        given = as_tensor(features, "references").detach()
        check_features(given[:0], "references")
        if len(given) == 0:
            raise ValueError("references is empty: there must be a row to be near to")
        self.metric, self.width = metric, given.shape[1]
        self.step = max(_BLOCK // self.width, 1)
        given = check_rows(given, "references", self.width, "references has", self.step)
        self.real = torch.float64 if given.dtype == torch.float64 else torch.float32
        # Distances do not change with the origin; |q|^2 - 2 q.r + |r|^2 keeps most digits near the middle of the data.
        self.centre = None
        if metric == "euclidean":
            total = torch.zeros(self.width, dtype=torch.float64, device=given.device)
            for part in given.split(self.step):
                total += part.contiguous().sum(dim=0, dtype=torch.float64)
            self.centre = total / len(given)
        rows = torch.cat([self.placed(part, "references", at) for at, part in self.parts(given)])
        self.count = len(rows)
        self.groups = Groups.of(rows, self.step)
        self.rows = rows if self.groups is None else rows[self.groups.first]
        self.half = None if metric == "cosine" else (self.rows * self.rows).sum(dim=1) / 2

    def parts(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        for at in range(0, len(x), self.step):
            yield at, x[at : at + self.step]

    def placed(self, x: Tensor, name: str, first: int = 0) -> Tensor:
        """Rows as the products take them: unit vectors, or centred."""
        if self.centre is not None:
            moved = (x.to(torch.float64).contiguous() - self.centre).to(self.real)
            large = (moved * moved).sum(dim=1)
            if not bool(torch.isfinite(large).all()):
                row = first + int(torch.isfinite(large).logical_not().nonzero()[0])
                raise ValueError(f"{name} is too large in row {row}: its squared distance overflows {self.real}")
            return moved
        x = x.to(torch.float64).contiguous()  # one memory order: the length of equal rows has equal bits
        x = x / x.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)  # a square may overflow
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        if bool((norm == 0).any()):
            row = first + int((norm == 0).nonzero()[0, 0])
            raise ValueError(f"{name} is zero in row {row}: it has no cosine")
        return torch.div(x, norm).to(self.real)

    def scores(self, queries: Tensor, begin: int, end: int, out: Tensor) -> Tensor:
        """(q, end - begin), larger for nearer rows (each row once): the cosine, or ``q.r - |r|^2 / 2``."""
        if self.half is None:
            return torch.mm(queries, self.rows[begin:end].T, out=out)
        return torch.addmm(self.half[begin:end], queries, self.rows[begin:end].T, beta=-1, out=out)

    def similarity(self, queries: Tensor, scores: Tensor) -> Tensor:
        if self.half is None:
            return scores.clamp_(-1, 1)
        return scores.mul_(2).sub_((queries * queries).sum(dim=1, keepdim=True)).clamp_(max=0)

    def check_queries(self, queries: Any, name: str = "queries") -> Tensor:
        """Rows that stay in their own type until `placed` takes a part of them."""
        x = check_rows(queries, name, self.width, "references has", self.step)
        if x.device != self.rows.device:
            raise ValueError(f"{name} is on {x.device}, references is on {self.rows.device}")
        return x

    def nearest(self, queries: Tensor, k: int, own: Tensor | None = None) -> Iterator[tuple[int, Neighbors]]:
        """(first query, its block's neighbours), a block of queries at a time. `own` (Q,) is a reference that is left out for each."""
        wanted = k if own is None else k + 1  # the own row is one of them at most
        distinct = len(self.rows)
        kept = min(wanted, distinct)
        block = min(_QUERIES, max(len(queries), 1))
        columns = min(max(_SCORES // block, 1), distinct)
        buffer = torch.empty(block * columns, dtype=self.real, device=self.rows.device)
        for at in range(0, len(queries), block):
            q = self.placed(queries[at : at + block], "queries", at)
            keep: Any = (_Kernel if self.rows.is_cpu else _Sorted)(len(q), kept, self.rows)
            for begin in range(0, distinct, columns):
                end = min(begin + columns, distinct)
                out = buffer[: len(q) * (end - begin)].view(len(q), end - begin)
                keep.add(self.scores(q, begin, end, out), begin)
            scores, indices = keep.found()
            if self.groups is not None:
                scores, indices = self.groups.expanded(scores, indices, wanted)
            if own is not None:
                others = indices != own[at : at + block].unsqueeze(1)
                others[others.all(dim=1), -1] = False
                scores, indices = scores[others].view(len(q), k), indices[others].view(len(q), k)
            yield at, Neighbors(self.similarity(q, scores), indices)

    def ordered(self, queries: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first query, (block, M) rows of the references from the nearest to the farthest)."""
        block = max(_BLOCK // self.count, 1)
        for at in range(0, len(queries), block):
            q = self.placed(queries[at : at + block], "queries", at)
            scores = self.scores(
                q, 0, len(self.rows), torch.empty(len(q), len(self.rows), dtype=self.real, device=q.device)
            )
            if self.groups is not None:
                scores = scores[:, self.groups.of_row]
            yield at, torch.sort(scores, dim=1, descending=True, stable=True).indices


class Groups(NamedTuple):
    """Rows that are equal. A matrix product rounds them differently, by where they stand; so each is multiplied once, or their order would
    be an accident.

    Attributes:
        first: (U,) first row of each group, ascending.
        of_row: (M,) group of each row.
        members: (M,) rows by group, ascending within it.
        begin, size: (U,) where each group stands in `members`.
    """

    first: Tensor
    of_row: Tensor
    members: Tensor
    begin: Tensor
    size: Tensor

    @classmethod
    def of(cls, rows: Tensor, step: int) -> Groups | None:
        """The groups of rows (M, D); None where all rows differ."""
        kind = torch.int64 if rows.dtype == torch.float64 else torch.int32
        generator = torch.Generator().manual_seed(0)
        factors = (2 * torch.randint(2**62, (rows.shape[1],), generator=generator) + 1).to(rows.device)
        # A hash of the bits, 0.0 and -0.0 being one number. Rows of one hash are compared below.
        keys = torch.cat([((part + 0.0).view(kind).long() * factors).sum(dim=1) for part in rows.split(step)])
        keys, order = torch.sort(keys, stable=True)
        pairs = (keys[1:] == keys[:-1]).nonzero().squeeze(1)
        same = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for part in pairs.split(step):
            same[part + 1] = (rows[order[part]] == rows[order[part + 1]]).all(dim=1)
        if not bool(same.any()):
            return None
        first = order[~same]
        rank = torch.argsort(torch.argsort(first))
        of_row = torch.empty_like(order)
        of_row[order] = rank[(~same).cumsum(0) - 1]
        members = torch.argsort(of_row, stable=True)
        size = torch.bincount(of_row)
        return cls(first.sort().values, of_row, members, size.cumsum(0) - size, size)

    def expanded(self, scores: Tensor, groups: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best rows of the best groups (Q, at most k): larger scores first, then smaller rows."""
        queries, width = groups.shape
        # Every better group has a member that comes first, so that of group p (from 0) no more than k - p can be wanted.
        counts = self.size[groups].minimum(k - torch.arange(width, device=groups.device))
        flat = counts.flatten()
        place = torch.arange(int(flat.sum()), device=flat.device)
        rank = place - (flat.cumsum(0) - flat).repeat_interleave(flat)
        rows = self.members[self.begin[groups].flatten().repeat_interleave(flat) + rank]
        values = scores.flatten().repeat_interleave(flat)
        query = torch.arange(queries, device=flat.device).repeat_interleave(counts.sum(dim=1))
        order = torch.argsort(rows, stable=True)
        order = order[torch.argsort(values[order], descending=True, stable=True)]
        order = order[torch.argsort(query[order], stable=True)]
        total = counts.sum(dim=1)
        best = (total.cumsum(0) - total).unsqueeze(1) + torch.arange(k, device=flat.device)
        best = order[best]
        return values[best], rows[best]


class _Kernel:
    """The k best of each row, by the compiled kernel."""

    def __init__(self, rows: int, k: int, like: Tensor) -> None:
        self.k, self.single = k, like.dtype == torch.float32
        room = 2 * k + 64
        self.score = torch.empty(rows, room, dtype=like.dtype)
        self.column = torch.empty(rows, room, dtype=torch.int64)
        self.kept = torch.zeros(rows, dtype=torch.int64)
        self.least = torch.full((rows,), -math.inf, dtype=like.dtype)
        held = (self.score, self.column, self.kept, self.least)
        self.job = _C.Nearest(rows, k, room, *(each.data_ptr() for each in held))

    def add(self, scores: Tensor, first: int) -> None:
        threads = torch.get_num_threads()
        self.job.add(self.single, scores.data_ptr(), scores.stride(0), scores.shape[1], first, threads)

    def found(self) -> tuple[Tensor, Tensor]:
        self.job.sort(self.single, torch.get_num_threads())
        return self.score[:, : self.k].clone(), self.column[:, : self.k].clone()


class _Sorted:
    """The same in torch's operations, for tensors on an accelerator; a stable sort keeps the smaller index first."""

    def __init__(self, rows: int, k: int, like: Tensor) -> None:
        self.k = k
        self.score = like.new_empty(rows, 0)
        self.column = torch.empty(rows, 0, dtype=torch.int64, device=like.device)

    def add(self, scores: Tensor, first: int) -> None:
        columns = torch.arange(first, first + scores.shape[1], device=scores.device).expand_as(scores)
        score, column = torch.cat([self.score, scores], dim=1), torch.cat([self.column, columns], dim=1)
        self.score, order = torch.sort(score, dim=1, descending=True, stable=True)
        self.score, order = self.score[:, : self.k], order[:, : self.k]
        self.column = column.gather(1, order)

    def found(self) -> tuple[Tensor, Tensor]:
        return self.score.contiguous(), self.column


def nearest_neighbors(
    queries: Any, references: Any, k: int, *, metric: str = "cosine", own: Tensor | None = None
) -> Neighbors:
    """The k most similar references of every query, by brute force: exact, and never all Q x M similarities at once.

    Args:
        queries: (Q, D) float16, bfloat16, float32 or float64; a tensor or a NumPy array.
        references: (M, D), likewise, on the queries' device.
        k: 1 <= k <= M, or M - 1 with `own`.
        metric: ``"cosine"``, or ``"euclidean"``, whose similarity is minus the squared distance.
        own: (Q,) integers: the reference that a query is itself, which is left out; -1 for none.

    Returns:
        `Neighbors`. Products are float64 for float64 references and float32 for all others (Euclidean ones of features centred on
        the references' mean): two references whose similarities differ by less than that rounding may come in either order. On the CPU
        a compiled kernel keeps the k best; on other devices torch sorts each chunk.

    Raises:
        TypeError: features that are not floating-point, a k or own that is not of integers.
        ValueError: NaN or infinity (first row named), a row of zeros under the cosine, different widths or devices, a k out of
            range, an own outside [-1, M).

    Example:
        >>> found = ltk.neighbors.nearest_neighbors([[1.2]], [[0.0], [1.0], [2.0], [10.0]], 2, metric="euclidean")
        >>> found.indices, found.similarity
        (tensor([[1, 2]]), tensor([[-0.0400, -0.6400]], dtype=torch.float64))
    """
    found = References(references, metric)
    x = found.check_queries(queries)
    own = check_own(own, len(x), found.count, found.rows.device)
    k = check_k(k, found.count, own is not None)
    similarity = torch.empty(len(x), k, dtype=found.real, device=found.rows.device)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=found.rows.device)
    for at, part in found.nearest(x, k, own):
        similarity[at : at + len(part.indices)], indices[at : at + len(part.indices)] = part
    return Neighbors(similarity, indices)


def check_k(k: int, count: int, without_own: bool) -> int:
    k = check_count(k, "k", 1)
    most = count - without_own
    if k > most:
        rest = " beside a query's own row" if without_own else ""
        raise ValueError(f"k is {k}, but there are {most} references{rest}")
    return k


def check_own(own: Any, queries: int, count: int, device: torch.device) -> Tensor | None:
    if own is None:
        return None
    rows = check_integers(own, "own").to(device)
    if rows.shape != (queries,):
        raise ValueError(f"own has shape {tuple(rows.shape)}; {queries} queries need ({queries},)")
    bad = (rows < -1) | (rows >= count)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(f"own[{at}] is {int(rows[at])}; it must lie in [-1, {count})")
    return rows.contiguous()
