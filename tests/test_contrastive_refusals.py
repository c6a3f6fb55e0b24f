"""Promise: what a contrastive call cannot compute it refuses, with one message that names argument, row and value."""

from __future__ import annotations

import pytest
import torch

import ltkernels as ltk

contrastive, linear_logsumexp = ltk.functional.contrastive, ltk.functional.linear_logsumexp
X, Y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
QUEUE = {"queue": torch.randn(6, 3), "queue_labels": torch.tensor([0, 1, 1, 0, 0, -1])}
LSE = linear_logsumexp


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: contrastive(X, Y, "simclr"), ValueError, "kind is 'simclr'; it must be one of 'ntxent'"),
        (lambda: contrastive([1.0], Y), TypeError, "features is list"),
        (lambda: contrastive(X.long(), Y), TypeError, "features has dtype torch.int64"),
        (lambda: contrastive(X[0], Y), ValueError, r"features has shape \(3,\); it must be \(N, D\) or \(N, V, D\)"),
        (lambda: contrastive(X[:, None][:, :0], Y), ValueError, "at least one view"),
        (lambda: contrastive(X, Y[:3]), ValueError, r"labels has shape \(3,\); it must be \(4,\)"),
        (lambda: contrastive(X, Y.float()), TypeError, "labels has dtype torch.float32"),
        (lambda: contrastive(X), ValueError, "labels is missing; kind 'supcon' needs it"),
        (
            lambda: contrastive(X, kind="ntxent"),
            ValueError,
            r"labels is missing; kind 'ntxent' needs it where features are not \(N, V, D\)",
        ),
        (lambda: contrastive(X, Y, tau=0.0), ValueError, "tau is 0.0; it must be above 0"),
        (lambda: contrastive(X, Y, tau=torch.tensor(-1.0)), ValueError, "tau is -1.0; it must be finite and above 0"),
        (lambda: contrastive(X, Y, tau=torch.ones(2)), ValueError, r"tau has shape \(2,\)"),
        (lambda: contrastive(X, Y, tau="0.1"), TypeError, "tau is '0.1'"),
        (lambda: contrastive(X, Y, queue=X), ValueError, "queue is given, but kind 'supcon' does not take it"),
        (lambda: contrastive(X, Y, "balanced"), ValueError, "centres is missing; kind 'balanced' needs it"),
        (
            lambda: contrastive(X, Y, "balanced", centres=X[:1]),
            ValueError,
            r"labels is 1 in row 2; it must lie in \[0, 1\) or be -100",
        ),
        (
            lambda: contrastive(X, Y, "balanced", centres=torch.randn(3, 5)),
            ValueError,
            "centres has width 5, features 3",
        ),
        (
            lambda: contrastive(X, Y, "balanced", centres=X.double()),
            TypeError,
            "centres has dtype torch.float64, features torch.float32",
        ),
        (
            lambda: contrastive(X, Y * 0, "prototypes", centres=X[:1]),
            ValueError,
            "centres has 1 rows; kind 'prototypes' needs at least 2",
        ),
        (lambda: contrastive(X, Y, "gml", **QUEUE), ValueError, "class_counts is missing; kind 'gml' needs it"),
        (lambda: contrastive(X, Y, "gml", **QUEUE, class_counts=[3]), ValueError, "labels is 1 in row 2"),
        (
            lambda: contrastive(X, Y, "gml", **QUEUE, class_counts=[3, 0]),
            ValueError,
            "class_counts is 0 for class 1; every class must",
        ),
        (lambda: contrastive(X, Y * 0, "gml", **QUEUE, class_counts=[3]), ValueError, "queue_labels is 1 in row 1"),
        (lambda: contrastive(X, Y, "kcl", keys=X[:2], **QUEUE), ValueError, "keys has 2 rows, features 4"),
        (lambda: contrastive(X, Y, "kcl", keys=X, **QUEUE, positives=-1), ValueError, "positives is -1"),
        (
            lambda: contrastive(X, Y, "paco", logits=X[:, :2], class_counts=[1, 2, 3]),
            ValueError,
            r"logits has shape \(4, 2\); it must be \(4, 3\)",
        ),
        (
            lambda: contrastive(X, Y, "paco", logits=X, class_counts=[1, 2, 3], queue=X),
            ValueError,
            "queue_labels is missing",
        ),
        (lambda: contrastive(X, Y, "paco", logits=X, class_counts=[1, 2, 3], gamma=0.0), ValueError, "gamma is 0.0"),
        (
            lambda: contrastive(X, Y, sample_weight=torch.tensor([1, -1.0, 1, 1])),
            ValueError,
            "sample_weight is -1.0 in row 1",
        ),
        (lambda: contrastive(X, Y, sample_weight=torch.ones(3)), ValueError, r"sample_weight has shape \(3,\)"),
        (lambda: contrastive(X, Y, class_weight=torch.ones(1)), ValueError, "labels is 1 in row 2"),
        (lambda: contrastive(X, Y, class_weight=torch.tensor([1, torch.nan])), ValueError, r"class_weight\[1\] is nan"),
        (lambda: contrastive(X, Y, reduction="avg"), ValueError, "reduction is 'avg'"),
        (lambda: contrastive(X, Y, chunk_rows=0), ValueError, "chunk_rows is 0"),
        (lambda: contrastive(X, Y, group="world"), RuntimeError, "no process group"),
        (lambda: contrastive(X, Y, backend="rocm"), ValueError, "backend is 'rocm'; it must be None or one of"),
        (lambda: contrastive(X, Y, backend="cuda"), ValueError, "backend='cuda' cannot serve this call"),
        (lambda: contrastive(X, Y, backend="triton"), ValueError, "backend='triton' cannot serve this call"),
        (lambda: contrastive(X.to("meta"), Y, backend="cpu"), ValueError, "on a meta device"),
        (lambda: LSE(X, X, backend="triton"), ValueError, "backend='triton' cannot serve this call"),
        (lambda: LSE(X, X[:, :2]), ValueError, "columns has width 2, rows 3"),
        (lambda: LSE(X, X, shift=torch.zeros(3)), ValueError, r"shift has shape \(3,\); it must be \(4,\)"),
        (lambda: LSE(X, X, row_scale=float("nan")), ValueError, "row_scale is nan"),
        (lambda: LSE(X, X, row_group=Y), ValueError, "row_group and column_group must be given together"),
        (
            lambda: LSE(X, X, own_index=torch.tensor([0, 1, 2, 4])),
            ValueError,
            r"own_index is 4 in row 3; it must lie in \[-1, 4\)",
        ),
        (lambda: ltk.nn.MoCo(2, 3)(X, X), ValueError, "the queue has 2 slots; a batch has 4 keys"),
        (lambda: ltk.nn.GML([3, 0], 8, 3), ValueError, "class_counts is 0 for class 1; every class must"),
        (
            lambda: ltk.nn.NTXent(class_weight=torch.ones(2)),
            ValueError,
            "class_weight is given, but NTXent knows no classes",
        ),
        (lambda: ltk.nn.BalancedContrastive(2)(X, Y), ValueError, "centres is missing"),
        (lambda: ltk.nn.BalancedContrastive(3)(X, Y, X[:2]), ValueError, "centres has 2 rows; the loss has 3 classes"),
        (lambda: ltk.nn.SupCon(tau=-1.0), ValueError, "tau is -1.0"),
    ],
)
def test_message(run, error, message) -> None:
    with pytest.raises(error, match=message):
        run()


def test_explain() -> None:
    assert "chunks of 4 of 4 rows x 4 columns" in str(ltk.explain(contrastive, X, Y))
    assert str(ltk.explain(linear_logsumexp, X, X)).startswith("cpu-")
    assert "rows x 6 columns" in str(ltk.explain(contrastive, X, Y, "gml", **QUEUE))
    assert ltk.explain(contrastive, X.to("meta"), Y).backend == "torch"
    assert str(ltk.explain(contrastive, X, Y, backend="torch")).startswith("torch: torch's operations; chunks of 4")
    with pytest.raises(ValueError, match="backend='triton' cannot serve"):
        ltk.explain(ltk.nn.SupCon(backend="triton"), X, Y)
    assert "4 rows x 64 columns" in str(ltk.explain(ltk.nn.MoCo(64, 3), X, X))
