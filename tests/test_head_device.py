"""The head as a GPU computes it, on a machine without one: chunks of logits in the inputs' dtype around torch's matrix products, the loss'
kernel under emulation. What only a GPU can show is in tests/gpu: the products of 16-bit matrices that add up in float32."""

from __future__ import annotations

import pytest
import torch
from cuda_host import library
from test_cuda_waits import READS
from test_heads import CASES, CLASSES, HEAD, LABELS, inputs

import ltkernels as ltk
from ltkernels import _backends, _head, heads
from ltkernels._call import Call

COUNTS = list(range(1, CLASSES + 1))


@pytest.fixture(autouse=True)
def _device(monkeypatch) -> None:
    library.emulate(monkeypatch)
    monkeypatch.setattr(_backends, "_cannot_serve", lambda backend, kind: "")


def gradients(dtype, case, normalize, backend, **options):
    target, given = CASES[case]
    leaves = inputs(dtype)
    loss = HEAD(*leaves[:2], target, bias=leaves[2], normalize=normalize, backend=backend, **given, **options)
    return loss, torch.autograd.grad(loss, leaves, torch.tensor(0.5, dtype=loss.dtype))


@pytest.mark.parametrize("chunk_rows", [4, 64])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_value_and_gradients(dtype, case, normalize, chunk_rows) -> None:
    """Those of float64 inputs, within what the logits' dtype rounds away."""
    loss, grads = gradients(dtype, case, normalize, "cuda", chunk_rows=chunk_rows)
    target, given = CASES[case]
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs(dtype)]
    exact = HEAD(*leaves[:2], target, bias=leaves[2], normalize=normalize, chunk_rows=0, **given)
    expected = torch.autograd.grad(exact, leaves, torch.tensor(0.5, dtype=torch.float64))
    # Logits of up to 100 are rounded to bfloat16; elsewhere to float32.
    bound = {torch.float64: 1e-12, torch.bfloat16: 0.06, torch.float16: 2e-3}.get(dtype, 1e-5)
    assert abs(float(loss - exact)) <= bound * float(exact)
    for ours, wanted in zip(grads, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - wanted).norm() <= bound * wanted.norm()


def test_products_are_in_the_inputs_dtype(monkeypatch) -> None:
    """bfloat16 logits are never float32 anywhere, float16 ones always: their gradients would be 0."""
    seen = []
    kernel = _head.run_inplace
    monkeypatch.setattr(_head, "run_inplace", lambda z, *rest: (seen.append(z.dtype), kernel(z, *rest))[1])
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        gradients(dtype, "plain", False, "cuda", chunk_rows=64)
    assert seen == [torch.bfloat16, torch.float32, torch.float32, torch.float64]
    seen.clear()
    gradients(torch.bfloat16, "plain", False, "cpu", chunk_rows=64)
    assert seen == [torch.float32]


def test_the_weight_gradient_adds_up_in_float32(monkeypatch) -> None:
    """Chunks add to a float32 sum; where torch can, without a 16-bit product between."""
    added = []

    def addmm(into, left, right, *, beta, out_dtype, out):
        assert out is into
        added.append((left.dtype, beta))
        out.copy_(beta * into + left.float() @ right.float() if beta else left.float() @ right.float())

    monkeypatch.setattr(_head, "_adds_in_float32", lambda device: True)
    monkeypatch.setattr(_head.torch, "addmm", addmm)
    features, weight, _ = inputs(torch.bfloat16)
    features = features.detach()
    loss = HEAD(features, weight, LABELS, backend="cuda", chunk_rows=4)
    (ours,) = torch.autograd.grad(loss, [weight])
    assert added == [(torch.bfloat16, 0), (torch.bfloat16, 1), (torch.bfloat16, 1)]
    whole = HEAD(features, weight, LABELS, backend="cuda", chunk_rows=64)
    (expected,) = torch.autograd.grad(whole, [weight])
    assert (ours - expected).float().norm() <= 1e-3 * expected.float().norm()


@pytest.mark.parametrize("form", [None, "arcface", "seesaw"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_bias_gives_nan_without_a_look_at_it(value, form) -> None:
    features, weight, bias = inputs(torch.float32)
    bias.data[3] = value
    loss = HEAD if form is None else ltk.LOSSES[form].make(COUNTS, backend="cuda").from_features
    options = {"backend": "cuda"} if form is None else {}
    found = loss(features, weight, LABELS, bias=bias, chunk_rows=4, **options)
    assert found.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_nothing_waits(case, dtype, monkeypatch) -> None:
    """With a bias, norms and every table: no number is read out of a tensor between the call and its gradients."""
    # Looks of the processor's alone: their tensors are not on it then.
    for module, name in ((_head, "check_labels"), (_head, "check_tables"), (heads, "check_tables")):
        monkeypatch.setattr(module, name, lambda *arguments: None)
    target, given = CASES[case]
    leaves = inputs(dtype)
    upstream = torch.tensor(0.5)

    def refuse(name):
        def read(self, *arguments):
            raise AssertionError(f"Tensor.{name} waits for the GPU")

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, refuse(name))
        loss = HEAD(*leaves[:2], target, bias=leaves[2], normalize=True, backend="cuda", chunk_rows=4, **given)
        grads = torch.autograd.grad(loss, leaves, upstream)
    assert all(grad.abs().max() > 0 for grad in grads)


def says(rows, classes, dtype=torch.bfloat16, backend="cuda", **options) -> str:
    features, weight = torch.empty(rows, 8, dtype=dtype), torch.empty(classes, 8, dtype=dtype)
    target = torch.zeros(rows, dtype=torch.int64)
    return ltk.explain(HEAD, features, weight, target=target, backend=backend, **options).reason


def test_explain() -> None:
    """Which path a call takes on a GPU, and why."""
    assert "logits in chunks: 4096 rows of 32000 logits at a time, matrix products of torch in bfloat16" in says(
        64, 32000
    )
    assert says(64, 32000, torch.float16).endswith("in float32")
    assert "logits in chunks: asked for" in says(64, 32000, backend="triton", chunk_rows=64)
    assert "logits held: 4 x 20 logits are few" in says(4, 20)
    term = ltk.adjustments.seesaw([5] * 32000).term
    assert "no tiles: seesaw needs whole rows" in says(64, 32000, backend="triton", term=term)


def test_tiles_are_explained() -> None:
    pytest.importorskip("triton")
    assert says(64, 32000, backend="triton").endswith("logits in tiles: asked for")


def test_tiles_serve_what_they_have() -> None:
    pytest.importorskip("triton")
    features, weight, _ = inputs(torch.float32)
    operands = Call(LABELS, reduction=1, form=1, backend="triton")
    with pytest.raises(ValueError, match="tiles of logits have neither closed forms nor gradients of tables"):
        _head._kernel(features, weight, None, *operands, False, _head.TILES, (False,) * 8)
