"""The kinds of `contrastive`: what the columns of each are, and its linear part.

The loss of a row is a log-sum-exp over columns, which `_rows.CONTRAST` gives, less a mean of similarities with positives. That mean is
linear in the columns: it is ``sigma_i a_i . (S_g - a_i) / m_i`` with the sum S_g of the columns of the row's group and the number m_i of
its positives, so no pair is ever formed for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._call import NONE
from .._checks import REDUCTION_CODES, real_dtype
from .._ranks import Ranks
from ._gathered import gather_columns, of_all, total
from ._logsumexp import SUM, grouped, place_of, unit
from ._rows import CONTRAST, Rows
from ._symmetric import CONTRAST_SELF, SelfContrast

MINUS_INFINITY = -float("inf")


class Batch(NamedTuple):
    """What every kind starts from. Vectors beside the features are in the working dtype, of unit length where `bounded`."""

    features: Tensor  # (N, D) anchors, as they came
    labels: Tensor | None  # (N,) int64
    inverse_tau: Tensor  # () in the working dtype
    weight: Tensor | None  # (N,) float64: sample times class weight; None is 1
    ignore_index: int
    bounded: bool
    reduction: str
    chunk_rows: int
    backend: str
    ranks: Ranks | None
    looks: bool  # whether numbers in the tensors may be looked at
    symmetric: bool  # whether `CONTRAST_SELF` serves the batch against itself

    def real(self) -> torch.dtype:
        return real_dtype(self.features.dtype)

    def sigma(self) -> Tensor:
        return self.inverse_tau.expand(len(self.features))

    def rows(self) -> Tensor:
        """(N, D) the anchors as vectors."""
        return unit(self.features) if self.bounded else self.features.to(self.real())

    def valid(self) -> Tensor:
        """(N,) bool: not ignored."""
        if self.labels is None:
            return torch.ones(len(self.features), dtype=torch.bool, device=self.features.device)
        return self.labels != self.ignore_index


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1)


def _ignored_shift(batch: Batch, labels: Tensor) -> Tensor | None:
    """(M,) -inf for columns that are ignored, None where none is."""
    ignored = labels == batch.ignore_index
    if batch.looks and not bool(ignored.any()):
        return None
    return torch.where(ignored, MINUS_INFINITY, 0.0).to(batch.real())


def _add(shift: Tensor | None, more: Tensor) -> Tensor:
    return more if shift is None else shift + more


def finish(
    batch: Batch,
    z: Tensor,
    columns: Tensor,
    linear: Tensor | None,
    counted: Tensor | None = None,
    *,
    base: Tensor | None = None,
    shift: Tensor | None = None,
    order: Tensor | None = None,
    own: tuple[Tensor, Tensor] | None = None,
    absent: Tensor | None = None,
    bonus: Tensor | None = None,
    minus_own: bool = False,
    live: int = -1,
) -> Tensor:
    """The loss of the rows z (N, D) of a batch, over those that are `counted` (N,) bool; None: all."""
    valid = batch.valid()
    weight = torch.ones(len(z), dtype=torch.float64, device=z.device) if batch.weight is None else batch.weight
    weight = torch.where(valid if counted is None else counted & valid, weight, 0.0)
    if batch.reduction in ("mean", "batch_mean"):
        size = weight.sum() if batch.reduction == "mean" else valid.sum().to(torch.float64)
        size = total(size, batch.ranks)
        # A batch without a row that counts has the loss 0: it must not stop a training run.
        weight = weight / torch.where(size > 0, size, 1.0)
    kept = batch.reduction == "none"
    call = Rows(
        order,
        None if own is None else own[0],
        None if own is None else own[1],
        absent,
        weight,
        None if bonus is None else bonus.to(torch.float64),
        batch.bounded,
        minus_own,
        live,
        NONE if kept else SUM,
        batch.chunk_rows,
        batch.backend,
    )
    (loss,) = CONTRAST((z, columns, base, linear, batch.sigma(), shift), call)
    return loss if kept else of_all(loss, batch.ranks)


def _against_itself(
    batch: Batch,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 1.0,
    base: Tensor | None = None,
    linear: Tensor | None = None,
) -> Tensor:
    """The loss of a batch whose columns are its own rows; see `SelfContrast`."""
    assert batch.labels is not None
    reduction = REDUCTION_CODES[batch.reduction]
    labels, weight = batch.labels.contiguous(), None if batch.weight is None else batch.weight.contiguous()
    call = SelfContrast(labels, weight, batch.ignore_index, alpha, beta, gamma, reduction, batch.chunk_rows)
    return CONTRAST_SELF((batch.features, base, linear, batch.inverse_tau), call)[0]


def _batch_columns(batch: Batch, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The batch as columns, of all ranks; their labels; each row's own column, and its number."""
    assert batch.labels is not None
    columns, labels, own, start, n = z, batch.labels, z, 0, len(z)
    if batch.ranks is not None:
        columns, labels, start = gather_columns(z, batch.labels, batch.ranks)
        own = columns[start : start + n]
    return columns, labels, own, torch.arange(start, start + n, device=z.device)


def _group_sums(columns: Tensor, held: Tensor, groups: Tensor, begin: Tensor) -> Tensor:
    """(N, D) sums of the columns of each row's group, which must have one."""
    first = torch.searchsorted(held, groups)
    return torch.zeros_like(columns).index_add(0, first, columns)[begin]


def supcon(batch: Batch, inside: bool = False) -> Tensor:
    """All other columns of the batch, less the mean positive; or, with `inside`, less the log-mean-exp of the positives."""
    assert batch.labels is not None
    if batch.symmetric and not inside:
        return _against_itself(batch)
    z = batch.rows()
    columns, labels, own, own_column = _batch_columns(batch, z)
    order, held, begin, end = grouped(labels, batch.labels)
    positives = end - begin - 1
    shift = _ignored_shift(batch, labels)
    many = positives.clamp_min(1).to(batch.real())
    if inside:
        return finish(
            batch,
            z,
            columns,
            -torch.log(many),
            positives > 0,
            shift=shift,
            order=order,
            own=(begin, end),
            absent=place_of(order, own_column),
            minus_own=True,
        )
    mean = batch.sigma() * _dots(z, _group_sums(columns, held, labels, begin) - own) / many
    return finish(batch, z, columns, mean, positives > 0, shift=shift, absent=own_column)


def balanced(batch: Batch, centres: Tensor) -> Tensor:
    """BCL: batch and class centres, each column less the log of its class' number of columns; the positives' mean is unshifted."""
    assert batch.labels is not None
    z = batch.rows()
    columns, labels, own, own_column = _batch_columns(batch, z)
    columns = torch.cat([columns, centres])
    labels = torch.cat([labels, torch.arange(len(centres), device=labels.device)])
    order, held, begin, end = grouped(labels, batch.labels)
    many = (end - begin).to(batch.real())
    size = torch.searchsorted(held, labels, right=True) - torch.searchsorted(held, labels)
    shift = _add(_ignored_shift(batch, labels), -torch.log(size.to(batch.real())))
    positives = (many - 1).clamp_min(1)
    mean = batch.sigma() * _dots(z, _group_sums(columns, held, labels, begin) - own) / positives
    return finish(
        batch,
        z,
        columns,
        mean,
        many > 1,
        shift=shift,
        order=order,
        own=(begin, end),
        absent=place_of(order, own_column),
        bonus=torch.log(many.to(torch.float64) / positives),
    )


def gml(batch: Batch, queue: Tensor, queue_labels: Tensor, log_prior: Tensor) -> Tensor:
    """Class logits are log prior + log-mean-exp over the queue's columns of the class; classes without any are left out."""
    assert batch.labels is not None
    order, held, begin, end = grouped(queue_labels, batch.labels)
    size = torch.searchsorted(held, queue_labels, right=True) - torch.searchsorted(held, queue_labels)
    prior = log_prior[queue_labels.clamp(0, len(log_prior) - 1)] - torch.log(size.to(batch.real()))
    shift = torch.where(queue_labels < 0, MINUS_INFINITY, prior).to(batch.real())
    return finish(
        batch, batch.rows(), queue, None, end > begin, shift=shift, order=order, own=(begin, end), minus_own=True
    )


def moco(batch: Batch, keys: Tensor, queue: Tensor, queue_labels: Tensor | None) -> Tensor:
    """Own key and queue, less the own key."""
    z = batch.rows()
    own_key = batch.sigma() * _dots(z, keys)
    return finish(batch, z, queue, own_key, base=own_key, shift=_empty(batch, queue_labels))


def kcl(
    batch: Batch,
    keys: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
    positives: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Own key and queue, less the mean of the own key and up to k of the queue's columns of the class, drawn without replacement."""
    assert batch.labels is not None
    z = batch.rows()
    own_key = batch.sigma() * _dots(z, keys)
    order, _, begin, end = grouped(queue_labels, batch.labels)
    drawn = sample_ranges(end - begin, positives, generator)  # (N, k), -1 where the class has no more
    there = drawn >= 0
    place = (begin[:, None] + drawn).clamp(0, max(len(order) - 1, 0))
    chosen = queue[order[place]] if len(order) else queue.new_zeros(*drawn.shape, queue.shape[1])
    sums = (batch.sigma()[:, None] * torch.where(there, (z[:, None] * chosen).sum(dim=-1), 0)).sum(dim=1)
    mean = (own_key + sums) / (1 + there.sum(dim=1))
    return finish(batch, z, queue, mean, base=own_key, shift=_empty(batch, queue_labels))


def _empty(batch: Batch, queue_labels: Tensor | None) -> Tensor | None:
    """(K,) -inf for slots of a queue that hold nothing yet, which have a label below 0."""
    if queue_labels is None or (batch.looks and not bool((queue_labels < 0).any())):
        return None
    return torch.where(queue_labels < 0, MINUS_INFINITY, 0.0).to(batch.real())


def sample_ranges(sizes: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """(N, k) different numbers below each row's size, -1 where it has none left: Floyd's sampling, for all rows at once."""
    drawn = torch.full((len(sizes), k), -1, dtype=torch.int64, device=sizes.device)
    for turn in range(k):
        # The turns of a row end with its size: the last of k draws from all, those of a size below k are all its numbers.
        top = sizes - torch.clamp_max(sizes, k) + turn  # (N,) the largest number of this turn
        there = top < sizes
        fraction = torch.rand(len(sizes), generator=generator, dtype=torch.float64, device=sizes.device)
        number = torch.minimum((fraction * (top + 1)).to(torch.int64), top)
        taken = (drawn == number[:, None]).any(dim=1)
        drawn[:, turn] = torch.where(there, torch.where(taken, top, number), -1)
    return drawn


def paco(
    batch: Batch,
    logits: Tensor,
    log_prior: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
    keys: Tensor | None = None,
    queue: Tensor | None = None,
    queue_labels: Tensor | None = None,
) -> Tensor:
    """One softmax over the classifier's logits + log prior and the samples; a weighted mean of the label's logit and the positives."""
    assert batch.labels is not None
    a = logits.to(batch.real()) + log_prior
    label = torch.where(batch.valid(), batch.labels, 0)
    of_label = a.gather(1, label[:, None])[:, 0]
    base = torch.logsumexp(a, dim=1)
    if batch.symmetric and keys is queue is None:
        return _against_itself(batch, alpha, beta, gamma, base, of_label)
    z = batch.rows()
    columns, labels, own, own_column = _batch_columns(batch, z)
    live = len(columns)
    if keys is not None:
        key_labels = batch.labels
        if batch.ranks is not None:
            keys, key_labels, _ = gather_columns(keys, key_labels, batch.ranks)
        columns, labels = torch.cat([columns, keys]), torch.cat([labels, key_labels])
    if queue is not None and queue_labels is not None:
        slots = torch.where(queue_labels < 0, batch.ignore_index, queue_labels)
        columns, labels = torch.cat([columns, queue]), torch.cat([labels, slots])
    _, held, begin, end = grouped(labels, batch.labels)
    positives = (end - begin - 1).clamp_min(0).to(batch.real())
    shift = _ignored_shift(batch, labels)
    if gamma != 1.0:
        shift = _add(shift, torch.full_like(columns[:, 0], gamma).log())
    sums = batch.sigma() * _dots(z, _group_sums(columns, held, labels, begin) - own)
    mean = (beta * of_label + alpha * sums) / (beta + alpha * positives)
    return finish(batch, z, columns, mean, base=base, shift=shift, absent=own_column, live=live)


def prototypes(batch: Batch, centres: Tensor) -> Tensor:
    """The other classes' prototypes, less the own one."""
    assert batch.labels is not None
    z, label = batch.rows(), torch.where(batch.valid(), batch.labels, 0)
    own = batch.sigma() * _dots(z, centres[label])
    out = torch.full((len(z),), MINUS_INFINITY, dtype=torch.float64, device=z.device)
    return finish(batch, z, centres, own, own=(label, label + 1), bonus=out)


class Kind(NamedTuple):
    """A kind: its function, the names of its own arguments, and which of these must be given."""

    function: Callable[..., Tensor]
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    labels: bool = True


def _supcon_in(batch: Batch, **said: Any) -> Tensor:
    return supcon(batch, inside=True, **said)


_QUEUE = ("queue", "queue_labels")
KINDS: dict[str, Kind] = {
    "ntxent": Kind(supcon, labels=False),
    "supcon": Kind(supcon),
    "supcon_in": Kind(_supcon_in),
    "balanced": Kind(balanced, ("centres",), ("centres",)),
    "moco": Kind(moco, ("keys", *_QUEUE), ("keys", "queue"), labels=False),
    "kcl": Kind(kcl, ("keys", *_QUEUE, "positives", "generator"), ("keys", *_QUEUE)),
    "gml": Kind(gml, (*_QUEUE, "log_prior"), (*_QUEUE, "log_prior")),
    "paco": Kind(
        paco,
        ("logits", "log_prior", "keys", *_QUEUE, "alpha", "beta", "gamma"),
        ("logits", "log_prior"),
    ),
    "gpaco": Kind(paco, ("logits", "log_prior", "alpha", "beta", "gamma"), ("logits", "log_prior")),
    "prototypes": Kind(prototypes, ("centres",), ("centres",)),
}
