"""Promise: every loss of the library goes through the head, its choice of a path is explained, and bad input is named."""

from __future__ import annotations

import math

import contract
import pytest
import torch
from test_heads import CLASSES, HEAD, LABELS, inputs
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels import heads


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", sorted(set(ltk.LOSSES) - {*contract.DRAWING}))
def test_every_loss_of_the_library(name, normalize, biased) -> None:
    """The Modules, closed forms included: the same loss and gradients as through the classifier's logits, in two batches, for
    Seesaw counts them."""
    record = ltk.LOSSES[name]
    held_loss, chunked_loss = (record.make(list(range(1, CLASSES + 1))) for _ in range(2))
    if name == "eql_v2":  # which holds the logits in training, for the gradients by class
        held_loss, chunked_loss = held_loss.eval(), chunked_loss.eval()
    features, weight, bias = inputs(torch.float32)
    shift = (bias.detach() * 0.1).requires_grad_() if biased else None  # cosines stay between -1.3 and 1.3
    leaves = (features, weight, shift) if biased else (features, weight)
    for _ in range(2):
        x, w = (F.normalize(features), F.normalize(weight)) if normalize else (features * 0.1, weight)
        held = held_loss(F.linear(x, w, shift), LABELS)
        chunked = chunked_loss.from_features(
            features if normalize else features * 0.1, weight, LABELS, bias=shift, normalize=normalize, chunk_rows=4
        )
        assert torch.allclose(chunked, held, rtol=1e-5)
        for ours, theirs in zip(*(torch.autograd.grad(each, leaves) for each in (chunked, held))):
            assert theirs.abs().max() > 0
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=2e-5 * float(theirs.abs().max()))
    assert record.name != "seesaw" or torch.equal(held_loss.seen, chunked_loss.seen)


@pytest.mark.parametrize("name", ["arcface", "seesaw", "cb_sigmoid"])
def test_closed_forms_keep_the_contract(name) -> None:
    """Upstream gradients, two backwards, double backward, compilation."""
    loss = ltk.LOSSES[name].make(list(range(1, CLASSES + 1))).eval()
    features, weight, _ = inputs(torch.float32)

    def call(f, w):
        return loss.from_features(f, w, LABELS, normalize=True, chunk_rows=4)

    value = call(features, weight)
    first = torch.autograd.grad(value, (features, weight), torch.tensor(0.5), retain_graph=True)
    again = torch.autograd.grad(value, (features, weight), torch.tensor(2.0), retain_graph=True)
    differentiable = torch.autograd.grad(value, (features, weight), create_graph=True)
    for half, double, whole in zip(first, again, differentiable):
        assert torch.allclose(4 * half, double, rtol=1e-5)
        assert torch.allclose(2 * half, whole, rtol=1e-3, atol=2e-5 * float(whole.abs().max()))
    (second,) = torch.autograd.grad(differentiable[0].square().sum(), weight)
    assert second.abs().max() > 0
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(features, weight), value)


def test_softmax_equalization_holds_the_logits() -> None:
    loss = ltk.nn.SoftmaxEqualization(list(range(1, CLASSES + 1)), seed=3)
    features, weight, _ = inputs(torch.float32)
    assert torch.equal(loss.from_features(features, weight, LABELS), loss(F.linear(features, weight), LABELS))
    with pytest.raises(ValueError, match="chunk_rows=4 is not possible: softmax equalization"):
        loss.from_features(features, weight, LABELS, chunk_rows=4)


def test_explain() -> None:
    def says(rows, width, classes, **options):
        target = torch.zeros(rows, dtype=torch.int64)
        return ltk.explain(HEAD, torch.empty(rows, width), torch.empty(classes, width), target=target, **options)

    assert says(4, 512, 365).backend.startswith("cpu-")
    assert "logits held: 365 classes are no more than 512 features" in says(1 << 16, 512, 365).reason
    assert "logits held: 128 x 1000 logits are few" in says(128, 512, 1000).reason
    assert "logits in chunks: 256 rows of 21841" in says(512, 512, 21841).reason
    assert "logits in chunks: 1048 rows of 1000" in says(4096, 512, 1000).reason
    assert "logits in chunks: asked for" in says(4, 512, 365, chunk_rows=2).reason
    assert "logits held: asked for" in says(512, 512, 21841, chunk_rows=0).reason
    assert says(512, 512, 21841, backend="torch").backend == "torch"
    head = ltk.nn.CosineLinear(4, 3)
    assert head.weight.shape == (3, 4)


X, W, Y = torch.randn(4, 6), torch.randn(5, 6), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HEAD([1.0], W, Y), TypeError, "features is list"),
        (lambda: HEAD(X, None, Y), TypeError, "weight is NoneType"),
        (lambda: HEAD(X, W, Y, bias=[1.0]), TypeError, "bias is list"),
        (lambda: HEAD(X.long(), W, Y), TypeError, "features has dtype torch.int64"),
        (lambda: HEAD(X, W.double(), Y), TypeError, "weight has dtype torch.float64, features torch.float32"),
        (lambda: HEAD(X, W, Y, bias=torch.ones(5).half()), TypeError, "bias has dtype torch.float16, features"),
        (lambda: HEAD(X, W.to("meta"), Y), ValueError, "weight is on meta, features on cpu"),
        (
            lambda: HEAD(X, W[:, :5], Y),
            ValueError,
            r"weight has shape \(5, 5\); features of shape \(4, 6\) need .*\(C, 6\)",
        ),
        (lambda: HEAD(X, W[0], Y), ValueError, r"weight has shape \(6,\)"),
        (lambda: HEAD(X, W[:0], Y), ValueError, r"weight has shape \(0, 6\); there must be at least one class"),
        (lambda: HEAD(torch.tensor(1.0), W, Y), ValueError, "features has no dimensions"),
        (lambda: HEAD(X, W, Y, bias=torch.ones(4)), ValueError, r"bias has shape \(4,\); it must be \(5,\)"),
        (lambda: HEAD(X, W, [0, 1, 2, 3]), TypeError, "target is list"),
        (lambda: HEAD(X, W, Y[:3]), ValueError, r"target has shape \(3,\); features of shape \(4, 6\) .*\(4,\)"),
        (lambda: HEAD(X, W, Y.float()), ValueError, r"target has shape \(4,\).*class probabilities of shape \(4, 5\)"),
        (lambda: HEAD(X, W, Y > 1), TypeError, "target has dtype torch.bool"),
        (lambda: HEAD(X, W, (Y, Y)), ValueError, "target is a tuple of 2"),
        (lambda: HEAD(X, W, (Y, Y[:2], 0.5)), ValueError, r"target\[1\] has shape \(2,\)"),
        (lambda: HEAD(X, W, (Y, Y, torch.rand(3))), ValueError, r"target\[2\] \(lam\) has shape \(3,\)"),
        (lambda: HEAD(X, W, (Y, Y, 1.5)), ValueError, r"target\[2\] \(lam\) is 1.5"),
        (lambda: HEAD(X, W, torch.tensor([0, 1, 2, 5])), ValueError, r"target has label 5 in row 3; .*\[0, 5\)"),
        (lambda: HEAD(X, W, (Y, Y - 1, 0.5)), ValueError, "the second target has label -1 in row 0"),
        (
            lambda: HEAD(X, W, Y, class_weight=torch.ones(4)),
            ValueError,
            r"class_weight has shape \(4,\); it must be \(5,\)",
        ),
        (lambda: HEAD(X, W, Y, scale=[1.0] * 5), TypeError, "scale is list"),
        (
            lambda: HEAD(X, W, Y, class_weight=torch.tensor([1, 1, math.nan, 1, 1])),
            ValueError,
            r"class_weight\[2\] is nan",
        ),
        (lambda: HEAD(X, W, Y, shift=torch.tensor([1, math.inf, 1, 1, 1])), ValueError, r"shift\[1\] is inf"),
        (lambda: HEAD(X, W, Y, scale=torch.tensor([1, 1, math.nan, 1, 1])), ValueError, r"scale\[2\] is nan"),
        (lambda: HEAD(X, W, Y, focal_gamma=-1.0), ValueError, "focal_gamma is -1.0"),
        (lambda: HEAD(X, W, Y, label_smoothing=1.1), ValueError, "label_smoothing is 1.1"),
        (lambda: HEAD(X, W, Y, reduction="avg"), ValueError, "reduction is 'avg'"),
        (lambda: HEAD(X, W, Y, backend="gpu"), ValueError, "backend is 'gpu'"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_messages(call, error, message, chunked, normalize, monkeypatch) -> None:
    """The same on both paths."""
    if chunked:
        monkeypatch.setattr(heads, "choose_chunk", lambda *sizes: (2, ""))
    function = HEAD
    monkeypatch.setitem(globals(), "HEAD", lambda *a, **k: function(*a, normalize=normalize, **k))
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("value", [-1, 1.5, True, "4"])
def test_chunk_rows(value) -> None:
    with pytest.raises(ValueError, match=f"chunk_rows is {value!r}"):
        HEAD(X, W, Y, chunk_rows=value)


def test_torch_backend() -> None:
    assert torch.allclose(HEAD(X, W, Y, backend="torch"), HEAD(X, W, Y, chunk_rows=2))
    with pytest.raises(ValueError, match=r"chunk_rows=2 is not possible: backend='torch'"):
        HEAD(X, W, Y, backend="torch", chunk_rows=2)
