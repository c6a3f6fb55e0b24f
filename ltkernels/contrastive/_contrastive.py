"""`contrastive`: one door for all kinds; the arguments are checked here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backends, _checks
from .._backends import Explanation
from .._errors import ArgumentError, DTypeError
from .._ranks import Ranks
from .._watch import is_dtensor
from ._kinds import KINDS, Batch
from ._logsumexp import chunk, explained, indices, matrix, readable, unit, within
from ._symmetric import serves


def contrastive(
    features: Tensor,
    labels: Tensor | None = None,
    kind: str = "supcon",
    *,
    tau: float | Tensor = 0.1,
    keys: Tensor | None = None,
    queue: Tensor | None = None,
    queue_labels: Tensor | None = None,
    centres: Tensor | None = None,
    logits: Tensor | None = None,
    class_counts: _checks.ClassCounts | Tensor | None = None,
    positives: int = 6,
    alpha: float = 0.05,
    beta: float = 1.0,
    gamma: float = 1.0,
    generator: torch.Generator | None = None,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalize: bool = True,
    group: Any = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Contrastive losses of a batch without a matrix of its similarities: loss and gradients in one pass over chunks of them.

    With ``s_ij = a_i . b_j / tau``, a row's own column absent, and ``mean_p`` the mean over the positives of the row:

    ============  =====================================================  =====================================================
    kind          columns                                                loss of a row
    ============  =====================================================  =====================================================
    ntxent        the batch; positives are the other views               lse_j s_ij - mean_p s_ip
    supcon        the batch; positives have the row's label              lse_j s_ij - mean_p s_ip
    supcon_in     the batch                                              lse_j s_ij - log mean_p exp s_ip
    balanced      the batch and one centre a class                       lse_j (s_ij - log n_j + log n_i') - mean_p s_ip
    moco          the own key and the queue                              lse_j s_ij - s_i,key
    kcl           the own key and the queue                              lse_j s_ij - mean of own key and k keys of the class
    gml           the queue                                              cross-entropy of log pi_c + log mean_{j in c} exp s_ij
    paco, gpaco   classes (logits + log pi) and samples                  lse - (beta l_y + alpha sum_p s_ip) / (beta + alpha m_i)
    prototypes    one prototype a class                                  lse_{c != y} s_ic - s_iy
    ============  =====================================================  =====================================================

    `README.md` of this folder has a section for each, with its source. In "balanced" n_j is the number of columns of the column's class,
    the centre included, and the row's own class is averaged over n - 1, for the row itself is absent.

    Args:
        features: (N, D), or (N, V, D) for V views of each sample; float32, float64, bfloat16 or float16.
        labels: (N,) integers; class ids for "balanced", "paco", "gpaco", "prototypes" and "gml". "ntxent" needs none with views;
            for (N, D) features they say which rows, of all ranks, are views of one sample.
        kind: as in the table.
        tau: temperature, above 0: a number, or a tensor () that gets a gradient.
        keys: (N, D) the momentum encoder's features of the same samples; no gradient.
        queue, queue_labels: (K, D) and (K,) earlier keys; no gradient. A label below 0 marks a slot that holds nothing yet.
        centres: (C, D) class centres or prototypes; they get a gradient.
        logits: (N, C) of a classifier, with gradient ("paco", "gpaco").
        class_counts: (C,) training samples per class, for the log prior of "gml", "paco" and "gpaco".
        positives: k of "kcl", drawn from the queue without replacement; all of them where the class has fewer.
        alpha, beta, gamma: of "paco": weights of a positive and of the label's logit, and a factor of the samples' exponentials.
        generator: of the draws of "kcl"; None is torch's default.
        sample_weight: (N,) factor of each row's loss. class_weight: (C,) factor by label.
        ignore_index: label of samples that are neither rows nor columns.
        reduction: ``"mean"`` over the weights of the rows that have a positive; ``"batch_mean"`` divides by the number of rows; ``"sum"``;
            ``"none"`` keeps (N,) or (N, V). A row without a positive has the loss 0. A batch without any has the loss 0, not NaN.
        normalize: rows, keys, queue and centres are made unit vectors. Without it they are taken as they are.
        group: a process group (or ``"world"``): the batch's columns are gathered over its ranks, the mean is that of all ranks' rows, and
            every rank returns the same loss. The gradient is scaled for `DistributedDataParallel`, which averages over the ranks. A queue
            must be the same on all ranks. Batches must have one size.
        chunk_rows: rows of a chunk of similarities; by default 2^19 similarities (2^23 on a GPU), at least 128 rows, and of a batch
            against itself up to 2^22 exponentials are kept for its gradient.
        backend: None, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``, of the kernel between the products; see `ltkernels.explain`.

    Returns:
        The loss, float64 for float64 features and float32 for all others. Gradients with respect to features, centres, logits and tau.

    Raises:
        ValueError: a shape, device, label, count or temperature that does not fit (argument, row and value); an argument that the kind
            does not take or that it misses; ranks that disagree; a backend that cannot serve the call.
        TypeError: a dtype that does not fit.

    Example:
        >>> two_views = torch.nn.functional.one_hot(torch.tensor([[0, 0], [1, 1]])).float()
        >>> round(ltk.functional.contrastive(two_views, kind="ntxent", tau=0.5).item(), 4)
        0.2395
    """
    if kind not in KINDS:
        raise ArgumentError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")
    plan = KINDS[kind]
    given: dict[str, Any] = {
        "keys": keys,
        "queue": queue,
        "queue_labels": queue_labels,
        "centres": centres,
        "logits": logits,
        "log_prior": class_counts,
    }
    for name, value in given.items():
        shown = "class_counts" if name == "log_prior" else name
        if value is not None and name not in plan.takes:
            raise ArgumentError(f"{shown} is given, but kind {kind!r} does not take it")
        if value is None and name in plan.needs:
            raise ArgumentError(f"{shown} is missing; kind {kind!r} needs it")
    for name, value in {"features": features, "labels": labels, **given}.items():
        if isinstance(value, Tensor) and type(value) is not Tensor and is_dtensor(value):
            raise DTypeError(f"{name} is a DTensor; give plain tensors, such as its to_local()")
    _checks.reduction(reduction)
    rows, views = features_by_row(features)
    real, device, n = _checks.real_dtype(features.dtype), features.device, len(rows)
    served = _backends.choose(backend, device)
    ignore_index = _checks.integer("ignore_index", ignore_index)
    ranks = None if group is None else Ranks(group)
    labels = _labels(labels, kind, features, plan.labels, 0 if ranks is None else ranks.rank)
    if labels is not None and views > 1:
        labels = labels.repeat_interleave(views)

    classes = 0
    if centres is not None:
        matrix("centres", centres, rows)
        classes = len(centres)
        given["centres"] = unit(centres) if normalize else centres.to(real)
        if kind == "prototypes" and classes < 2:
            raise ArgumentError(f"centres has {classes} rows; kind 'prototypes' needs at least 2 classes")
    if class_counts is not None:
        counts = _checks.class_counts(class_counts, option=False)
        classes = len(counts.n)
        given["log_prior"] = torch.log(counts.n / counts.total).to(device, real)
    if logits is not None:
        matrix("logits", logits)
        if logits.shape != (n, classes):
            raise ArgumentError(f"logits has shape {tuple(logits.shape)}; it must be {(n, classes)}, rows by classes")
        if logits.device != device:
            raise ArgumentError(f"logits is on {logits.device}, features on {device}")
    if classes and labels is not None:
        within("labels", labels, 0, classes, ignore_index)
    for name in ("keys", "queue"):
        value = given[name]
        if value is None:
            continue
        matrix(name, value, rows)
        if name == "keys" and len(value) != n:
            raise ArgumentError(f"keys has {len(value)} rows, features {n}; they must be of the same samples")
        value = value.detach()
        given[name] = unit(value) if normalize else value.to(real)
    if queue_labels is not None:
        if queue is None:
            raise ArgumentError("queue_labels is given without queue")
        given["queue_labels"] = indices("queue_labels", queue_labels, len(queue), device)
        if classes:
            within("queue_labels", given["queue_labels"], -(2**63), classes)
    elif queue is not None and labels is not None and plan.labels:
        raise ArgumentError(f"queue_labels is missing; kind {kind!r} needs it beside queue")

    weight = None
    if sample_weight is not None:
        own = _checks.rows("sample_weight", sample_weight, (n // views,), device, torch.float64).detach()
        own = own.repeat_interleave(views)
        if readable(own) and not bool((torch.isfinite(own) & (own >= 0)).all()):
            at = int((~(torch.isfinite(own) & (own >= 0))).nonzero()[0])
            raise ArgumentError(
                f"sample_weight is {own[at].item()} in row {at // views}; it must be finite and at least 0"
            )
        weight = own
    if class_weight is not None:
        if labels is None:
            raise ArgumentError(f"class_weight is given, but kind {kind!r} was given no labels")
        table = _class_weight(class_weight, classes, device)
        within("labels", labels, 0, len(table), ignore_index)
        of_label = table[torch.where(labels == ignore_index, 0, labels)]
        weight = of_label if weight is None else weight * of_label
    said = {name: given[name] for name in plan.takes if name in given}
    if kind == "kcl":
        if _checks.integer("positives", positives) < 0:
            raise ArgumentError(f"positives is {positives}; it must be at least 0")
        said |= {"positives": int(positives), "generator": generator}
    if "alpha" in plan.takes:
        said["alpha"] = _checks.number("alpha", alpha, low=0.0)
        said["beta"] = _checks.number("beta", beta, above=0.0)
        said["gamma"] = _checks.number("gamma", gamma, above=0.0)
    inverse_tau = _inverse_temperature(tau, device, real)
    alone = served == "cpu" and normalize and ranks is None and (not isinstance(tau, Tensor) or readable(tau))
    batch = Batch(
        rows,
        labels,
        inverse_tau,
        weight,
        ignore_index,
        bool(normalize),
        reduction,
        chunk(chunk_rows),
        served,
        ranks,
        readable(labels, queue_labels),
        alone and serves(1.0 / float(tau.detach() if isinstance(tau, Tensor) else tau)),
    )
    loss = plan.function(batch, **said)
    return loss.reshape(features.shape[:-1]) if reduction == "none" else loss


def features_by_row(features: Tensor) -> tuple[Tensor, int]:
    """(rows, D) and how many rows a sample has."""
    if not isinstance(features, Tensor):
        raise DTypeError(f"features is {type(features).__name__}; it must be a tensor")
    if features.dtype not in _checks.FLOATING:
        raise DTypeError(f"features has dtype {features.dtype}; it must be float32, float64, bfloat16 or float16")
    if features.dim() == 3:
        if features.shape[1] == 0:
            raise ArgumentError(f"features has shape {tuple(features.shape)}; a sample must have at least one view")
        return matrix("features", features.flatten(0, 1)), features.shape[1]
    if features.dim() != 2:
        raise ArgumentError(f"features has shape {tuple(features.shape)}; it must be (N, D) or (N, V, D)")
    return matrix("features", features), 1


def _labels(labels: Tensor | None, kind: str, features: Tensor, needed: bool, rank: int) -> Tensor | None:
    """(N,) labels; of views, the number of their sample among those of all ranks."""
    if labels is not None:
        return indices("labels", labels, len(features), features.device)
    if needed:
        raise ArgumentError(f"labels is missing; kind {kind!r} needs it")
    if kind != "ntxent":
        return None
    if features.dim() != 3:
        raise ArgumentError(
            "labels is missing; kind 'ntxent' needs it where features are not (N, V, D), views of samples"
        )
    return rank * len(features) + torch.arange(len(features), device=features.device)


def _class_weight(table: Tensor, classes: int, device: torch.device) -> Tensor:
    if not isinstance(table, Tensor) or table.dim() != 1:
        shape = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise ArgumentError(f"class_weight has shape {shape}; it must be (C,)")
    table = _checks.table("class_weight", table, classes or len(table), device, torch.float64).detach()
    if readable(table) and not bool((torch.isfinite(table) & (table >= 0)).all()):
        at = int((~(torch.isfinite(table) & (table >= 0))).nonzero()[0])
        raise ArgumentError(f"class_weight[{at}] is {table[at].item()}; it must be finite and at least 0")
    return table


def _inverse_temperature(tau: float | Tensor, device: torch.device, real: torch.dtype) -> Tensor:
    """1 / tau, ()."""
    if not isinstance(tau, Tensor):
        return torch.full((), 1.0 / _checks.number("tau", tau, above=0.0), dtype=real, device=device)
    if tau.dim() != 0 or not tau.is_floating_point():
        raise ArgumentError(
            f"tau has shape {tuple(tau.shape)} and dtype {tau.dtype}; it must be one floating-point number"
        )
    if tau.device != device:
        raise ArgumentError(f"tau is on {tau.device}, features on {device}")
    if readable(tau) and not (bool(torch.isfinite(tau)) and float(tau.detach()) > 0):
        raise ArgumentError(f"tau is {tau.item()}; it must be finite and above 0")
    return 1.0 / tau.to(real)


def explain(
    features: Tensor,
    labels: Tensor | None = None,
    kind: str = "supcon",
    *,
    queue: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
    **_: object,
) -> Explanation:
    rows = features.shape[:-1].numel()
    columns = 0 if queue is None else len(queue)
    if kind not in ("moco", "kcl", "gml", "prototypes"):
        columns += rows
    return explained(features, rows, columns, chunk_rows, backend)


contrastive.explain = explain  # type: ignore[attr-defined]
