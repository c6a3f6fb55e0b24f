"""Promise: bad input gets one message that names the argument and the value."""

from __future__ import annotations

import math

import pytest
import torch

import ltkernels as ltk

CE = ltk.functional.adjusted_cross_entropy
Z, Y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CE([1.0], Y), TypeError, "logits is list"),
        (lambda: CE(Z.long(), Y), TypeError, "logits has dtype torch.int64"),
        (lambda: CE(torch.tensor(1.0), Y), ValueError, "logits has no dimensions"),
        (lambda: CE(torch.empty(4, 0), Y), ValueError, r"target has label 0 in row 0; labels must lie in \[0, 0\)"),
        (lambda: CE(Z, [0, 1, 2, 3]), TypeError, "target is list"),
        (lambda: CE(Z, Y[:3]), ValueError, r"target has shape \(3,\).*\(4,\)"),
        (lambda: CE(Z, Y > 1), TypeError, "target has dtype torch.bool"),
        (lambda: CE(Z, Z[:, 1:] > 0), TypeError, r"dtype torch.bool and shape \(4, 4\).* logits' shape \(4, 5\)"),
        (lambda: ltk.nn.BalancedSoftmax([3, 2, 1, 1])(Z, Y), ValueError, "logits is of 5 classes; class_counts has 4"),
        (
            lambda: ltk.nn.BalancedSoftmax([3, 2, 1, 1])(Z[0], Y[0]),
            ValueError,
            "logits is of 5 classes; class_counts has 4",
        ),
        (lambda: ltk.nn.LDAM([3, 2]).from_features(Z, Z, Y), ValueError, "weight is of 4 classes; class_counts has 2"),
        (lambda: ltk.nn.EQL([3, 2, 1, 1])(Z, Y), ValueError, "logits is of 5 classes; class_counts has 4"),
        (lambda: ltk.nn.BalancedBCE([1] * 5)(Z, Z[:, 1:] > 0), ValueError, r"target has shape \(4, 4\); multi-label"),
        (lambda: CE(Z, Y.float()), ValueError, r"target has shape \(4,\) and dtype torch.float32"),
        (lambda: CE(Z, Y.to("meta")), ValueError, "target is on meta, logits on cpu"),
        (lambda: CE(Z, (Y, Y)), ValueError, "target is a tuple of 2"),
        (lambda: CE(Z, (Y, Y, 1.5)), ValueError, r"target\[2\] \(lam\) is 1.5"),
        (lambda: CE(Z, (Y, Y, torch.rand(3))), ValueError, r"target\[2\] \(lam\) has shape \(3,\)"),
        (lambda: CE(Z, (Z, Z, 0.5)), TypeError, r"target\[0\]"),
        (lambda: CE(Z, Y, shift=[0.0] * 5), TypeError, "shift is list"),
        (lambda: CE(Z, Y, scale=torch.ones(4)), ValueError, r"scale has shape \(4,\); it must be \(5,\)"),
        (lambda: CE(Z, Y, margin=torch.ones(5, dtype=torch.int64)), TypeError, "margin has dtype torch.int64"),
        (lambda: CE(Z, Y, row_scale=torch.ones(5, device="meta")), ValueError, "row_scale is on meta"),
        (lambda: CE(Z, Y, weight=torch.tensor([1, 1, math.nan, 1, 1])), ValueError, r"weight\[2\] is nan"),
        (lambda: CE(Z, Y, shift=torch.tensor([1, math.inf, 1, 1, 1])), ValueError, r"shift\[1\] is inf.*-inf"),
        (lambda: CE(Z, Y, scale=torch.tensor([1, -math.inf, 1, 1, 1])), ValueError, r"scale\[1\] is -inf"),
        (lambda: CE(Z, Y, margin=torch.tensor([math.inf, 1, 1, 1, 1])), ValueError, r"margin\[0\] is inf"),
        (lambda: CE(Z, Y, row_scale=torch.tensor([1, 1, 1, 1, math.nan])), ValueError, r"row_scale\[4\] is nan"),
        (lambda: CE(Z, Y, focal_gamma=-1.0), ValueError, "focal_gamma is -1.0"),
        (lambda: CE(Z, Y, focal_gamma="2"), TypeError, "focal_gamma is '2'"),
        (lambda: CE(Z, Y, label_smoothing=1.1), ValueError, "label_smoothing is 1.1"),
        (lambda: CE(Z, Y, label_smoothing=math.nan), ValueError, "label_smoothing is nan"),
        (lambda: CE(Z, Y, reduction="avg"), ValueError, "reduction is 'avg'.*'batch_mean'"),
        (lambda: CE(Z, Y, backend="gpu"), ValueError, "backend is 'gpu'"),
        (lambda: CE(Z, Z.softmax(1), margin=torch.ones(5)), ValueError, "margin is chosen by the label"),
        (lambda: CE(Z, Z.softmax(1), focal_gamma=1.0), ValueError, "focal_gamma is chosen by the label"),
        (lambda: ltk.explain(len, Z, Y), TypeError, "op is <built-in function len>"),
    ],
)
def test_message(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_integer_options_are_numbers_too() -> None:
    assert torch.equal(CE(Z, Y, focal_gamma=2, label_smoothing=0), CE(Z, Y, focal_gamma=2.0))


def test_explain() -> None:
    assert ltk.explain(CE, Z, Y).backend.startswith("cpu-")
    assert ltk.explain(CE, Z, Y, backend="torch") == ("torch", "asked for")
    assert ltk.explain(CE, Z, Z.softmax(1)).backend.startswith("cpu-")
    assert ltk.explain(ltk.nn.LDAM([3, 2, 1, 1, 1]), Z, Y).backend.startswith("cpu-")
