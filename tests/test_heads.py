"""Promise: `linear_adjusted_cross_entropy` is exact, never holds the logits, and gives every input that wants one its gradient."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import tempfile

import oracle
import pytest
import torch
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels import _head
from ltkernels._call import Call

HEAD = ltk.functional.linear_adjusted_cross_entropy
ROWS, WIDTH, CLASSES = 11, 5, 17  # no multiple of a chunk, a vector or each other
GENERATOR = torch.Generator().manual_seed(7)
TABLES = {
    "shift": torch.linspace(-2, 0, CLASSES),
    "scale": torch.linspace(0.5, 4, CLASSES),
    "margin": torch.linspace(0, 1, CLASSES),
    "row_scale": torch.linspace(0.8, 2, CLASSES),
    "class_weight": torch.linspace(0.2, 3, CLASSES),
}
LABELS = torch.randint(0, CLASSES, (ROWS,), generator=GENERATOR)
LABELS[4] = -100
MIXED = (LABELS, LABELS.flip(0).clamp_min(0), torch.linspace(0, 1, ROWS))
CASES = {
    "plain": (LABELS, {}),
    "tables": (LABELS, TABLES),
    "smoothing and focal": (LABELS, {**TABLES, "label_smoothing": 0.1, "focal_gamma": 1.5}),
    "mixed": (MIXED, {**TABLES, "label_smoothing": 0.1}),
}


def inputs(dtype: torch.dtype = torch.float64, rows: int = ROWS, classes: int = CLASSES, width: int = WIDTH):
    """Features, weight and bias: leaves that require a gradient, norms between 0.1 and 10."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(rows, width, generator=generator) * torch.logspace(-1, 1, max(rows, 1))[:rows, None]
    weight = torch.randn(classes, width, generator=generator) * torch.logspace(-1, 0.5, classes)[:, None]
    bias = torch.randn(classes, generator=generator)
    return [value.to(dtype).requires_grad_() for value in (features, weight, bias)]


def double_logits(features, weight, bias, normalize):
    if normalize:
        features, weight = F.normalize(features, dim=1), F.normalize(weight, dim=1)
    return F.linear(features, weight, bias)


def expected(given, normalize, target, options, upstream):
    """(loss, gradients, bounds): float64, the loss by the oracle and the linear part by autograd. A bound is the largest
    product sum that an entry's row consists of: what the rounding errors of its GEMM are proportional to."""
    leaves = [value.detach().double().requires_grad_() for value in given]
    z = double_logits(*leaves, normalize)
    options = {{"class_weight": "weight"}.get(name, name): value for name, value in options.items()}
    loss, dz, size = oracle.adjusted_cross_entropy(z, target, upstream=upstream, **options)
    grads = torch.autograd.grad(z, leaves, dz)
    x, w, _ = (value.detach() for value in leaves)
    x_factor, w_factor = torch.ones(len(x), 1), torch.ones(len(w), 1)
    if normalize:
        x_factor, w_factor = 1 / x.norm(dim=1, keepdim=True), 1 / w.norm(dim=1, keepdim=True)
    bounds = (
        x_factor * (dz.abs() @ (w_factor * w).abs()).amax(dim=1, keepdim=True),
        w_factor * (dz.abs().t() @ (x_factor * x).abs()).amax(dim=1, keepdim=True),
        dz.abs().sum(dim=0),
    )
    return loss, grads, bounds, size


def assert_close(actual, wanted, bound, size, name="") -> None:
    """Within rounding errors of the working dtype, and one rounding to the gradient's. Wrong gradients would not fit."""
    epsilon, factor, out, floor = oracle.TOLERANCES[actual.dtype]
    allowed = 2 * factor * epsilon * (4 + size.max()) * bound + out * wanted.abs() + floor

    def fits(candidate) -> bool:
        return bool(((candidate - wanted).abs() <= allowed).all())

    assert not fits(torch.zeros_like(wanted)), f"{name}: the tolerance would accept a zero gradient"
    assert not fits(2 * wanted), f"{name}: the tolerance would accept a doubled gradient"
    only = torch.zeros_like(wanted)
    only[: len(wanted) // 2] = wanted[: len(wanted) // 2]
    assert not fits(only), f"{name}: the tolerance would accept half of the rows"
    assert actual.shape == wanted.shape
    assert fits(actual.double()), (
        f"{name}: {float(((actual.double() - wanted).abs() / allowed).max())} times the tolerance"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(dtype, normalize, case) -> None:
    target, options = CASES[case]
    for reduction, chunk_rows in itertools.product(("mean", "batch_mean", "sum", "none"), (0, 1, 4, 100)):
        given = inputs(dtype)
        upstream = torch.linspace(0.5, 2, ROWS) if reduction == "none" else torch.tensor(0.37)
        loss = HEAD(
            *given[:2],
            target,
            bias=given[2],
            normalize=normalize,
            reduction=reduction,
            chunk_rows=chunk_rows,
            **options,
        )
        loss.backward(upstream.to(loss.dtype))
        wanted, grads, bounds, size = expected(given, normalize, target, {"reduction": reduction, **options}, upstream)
        # The logits carry the rounding errors of their dot products.
        oracle.assert_loss(loss.detach(), wanted, 4 * size + 8, dtype)
        for name, leaf, grad, bound in zip(("features", "weight", "bias"), given, grads, bounds):
            assert leaf.grad.dtype == dtype
            assert_close(leaf.grad, grad, bound, size, f"{name}, {reduction}, chunks of {chunk_rows}")


@pytest.mark.parametrize("normalize", [False, True])
def test_many_classes_in_chunks_by_choice(normalize) -> None:
    """Sizes that the automatic choice chunks, the class weight's denominator spanning chunks."""
    rows, classes, width = 301, 4099, 6
    given = inputs(torch.float32, rows, classes, width)
    target = torch.randint(0, classes, (rows,), generator=GENERATOR)
    weight = torch.rand(classes, generator=GENERATOR) + 0.1
    assert "in chunks: 256 rows" in str(ltk.explain(HEAD, *given[:2], target, bias=given[2]))
    loss = HEAD(*given[:2], target, bias=given[2], normalize=normalize, class_weight=weight)
    loss.backward()
    leaves = [value.detach().double().requires_grad_() for value in given]
    truth = F.cross_entropy(double_logits(*leaves, normalize), target, weight.double())
    truth.backward()
    assert torch.allclose(loss.double(), truth, rtol=1e-6)
    for leaf, exact in zip(given, leaves):
        scale = exact.grad.abs().amax(dim=-1, keepdim=True)
        assert ((leaf.grad - exact.grad).abs() <= 2e-5 * scale).all()
        assert exact.grad.abs().max() > 0


@pytest.mark.parametrize("chunk_rows", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanting", [w for w in itertools.product((False, True), repeat=3) if any(w)])
def test_every_subset_of_inputs_may_want_a_gradient(wanting, reduction, chunk_rows) -> None:
    def grads(wanting):
        given = [value.detach().requires_grad_(want) for value, want in zip(inputs(), wanting)]
        HEAD(
            *given[:2], LABELS, bias=given[2], normalize=True, reduction=reduction, chunk_rows=chunk_rows
        ).sum().backward()
        return [value.grad for value in given]

    for part, whole, want in zip(grads(wanting), grads((True, True, True)), wanting):
        assert (part is not None) == want
        if want:
            assert torch.equal(part, whole)
            assert part.abs().max() > 0


def test_nothing_wants_a_gradient() -> None:
    given = inputs()
    with torch.no_grad():
        assert not HEAD(*given[:2], LABELS, chunk_rows=4).requires_grad
    held = HEAD(*given[:2], LABELS, chunk_rows=0)
    assert torch.allclose(HEAD(given[0].detach(), given[1].detach(), LABELS, chunk_rows=4), held, rtol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice_with_different_upstreams(reduction) -> None:
    given = inputs()
    loss = HEAD(*given[:2], LABELS, bias=given[2], normalize=True, reduction=reduction, chunk_rows=4, **TABLES)
    one = torch.autograd.grad(loss, given, torch.ones_like(loss), retain_graph=True)
    four = torch.autograd.grad(loss, given, torch.full_like(loss, 4.0), retain_graph=True)
    again = torch.autograd.grad(loss, given, torch.ones_like(loss))
    for a, b, c in zip(one, four, again):
        assert a.abs().max() > 0
        assert torch.equal(b, 4 * a)
        assert torch.equal(c, a)


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_grad_fields_accumulate_over_three_backwards(upstream) -> None:
    """Gradients that are kept for a second backward must not be the memory that ``.grad`` accumulates in."""
    given = inputs()
    loss = HEAD(*given[:2], LABELS, chunk_rows=4)
    one = torch.autograd.grad(loss, given[:2], retain_graph=True)
    for _ in range(3):
        loss.backward(torch.tensor(upstream, dtype=torch.float64), retain_graph=True)
    for leaf, grad in zip(given, one):
        assert torch.equal(leaf.grad, upstream * grad + upstream * grad + upstream * grad)


def test_the_same_call_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        given = inputs(torch.float32, 300, 4099, 6)
        target = torch.arange(300) % 7
        loss = HEAD(*given[:2], target, bias=given[2], normalize=True, chunk_rows=64)
        results.append((loss, *torch.autograd.grad(loss, given)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_and_double_backward(normalize, reduction) -> None:
    given = inputs(rows=3, classes=3, width=2)
    target = torch.tensor([0, -100, 2])

    def loss(features, weight, bias):
        return HEAD(
            features,
            weight,
            target,
            bias=bias,
            normalize=normalize,
            reduction=reduction,
            chunk_rows=2,
            label_smoothing=0.1,
        )

    assert torch.autograd.gradcheck(loss, given)
    assert torch.autograd.gradgradcheck(loss, given)


def test_a_gradient_penalty_reaches_what_the_features_came_from() -> None:
    def penalty(chunked: bool):
        features, weight, _ = inputs()
        hidden = features.tanh()
        if chunked:
            loss = HEAD(hidden, weight, LABELS, chunk_rows=4)
        else:
            loss = F.cross_entropy(F.linear(hidden, weight), LABELS)
        (grad,) = torch.autograd.grad(loss, features, create_graph=True)
        assert grad.requires_grad
        return torch.autograd.grad(grad.square().sum(), (features, weight))

    for ours, theirs in zip(penalty(True), penalty(False)):
        assert theirs.abs().max() > 0
        assert torch.allclose(ours, theirs, rtol=1e-10)


def test_class_probabilities() -> None:
    features, weight, bias = inputs()
    target = torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=GENERATOR).softmax(1)
    ours = HEAD(features, weight, target, bias=bias, label_smoothing=0.1)
    theirs = F.cross_entropy(F.linear(features, weight, bias), target, label_smoothing=0.1)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    shaped = HEAD(features[:6].reshape(2, 3, WIDTH), weight, target[:6].reshape(2, 3, CLASSES), reduction="none")
    assert shaped.shape == (2, 3)


@pytest.mark.parametrize("chunk_rows", [0, 4])
def test_shapes(chunk_rows) -> None:
    features, weight, bias = inputs()
    options = {"bias": bias, "chunk_rows": chunk_rows, "normalize": True}
    rows = HEAD(features[:6], weight, LABELS[:6], reduction="none", **options)
    assert torch.equal(
        HEAD(features[:6].reshape(2, 3, WIDTH), weight, LABELS[:6].reshape(2, 3), reduction="none", **options),
        rows.reshape(2, 3),
    )
    one = HEAD(features[1], weight, LABELS[1], reduction="none", **options)
    assert one.shape == ()
    assert torch.allclose(one, rows[1], rtol=1e-12)
    lam = torch.rand(2, 3, dtype=torch.float64)
    pairs = (LABELS[:6].reshape(2, 3), LABELS[5:11].reshape(2, 3), lam)
    flat = tuple(value.reshape(-1) for value in pairs)
    assert torch.equal(
        HEAD(features[:6].reshape(2, 3, WIDTH), weight, pairs, **options), HEAD(features[:6], weight, flat, **options)
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("chunk_rows", [0, 4])
def test_empty_single_and_ignored(normalize, chunk_rows) -> None:
    options = {"normalize": normalize, "chunk_rows": chunk_rows}
    given = inputs(rows=0)
    none = torch.empty(0, dtype=torch.int64)
    assert HEAD(*given[:2], none, reduction="none", **options).shape == (0,)
    assert HEAD(*given[:2], none, reduction="sum", **options) == 0
    loss = HEAD(*given[:2], none, bias=given[2], **options)
    assert loss.isnan()
    loss.backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in given)

    given = inputs(classes=1)
    loss = HEAD(*given[:2], torch.zeros(ROWS, dtype=torch.int64), bias=given[2], **options)
    assert loss == 0
    loss.backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in given)

    given = inputs()
    loss = HEAD(*given[:2], torch.full((ROWS,), -100), bias=given[2], **options)
    assert loss.isnan()
    loss.backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in given)


def test_any_strides() -> None:
    features, weight, bias = (value.detach() for value in inputs())
    target = LABELS
    plain = HEAD(features, weight, target, bias=bias, chunk_rows=4)

    def spread(value):
        wide = value.new_empty([2 * size for size in value.shape])
        view = wide[tuple(slice(None, None, 2) for _ in value.shape)]
        view.copy_(value)
        return view

    for change in (lambda v: v.t().contiguous().t() if v.dim() == 2 else v, spread):
        leaves = [change(value).requires_grad_() for value in (features, weight, bias)]
        loss = HEAD(leaves[0], leaves[1], spread(target), bias=leaves[2], chunk_rows=4)
        assert torch.allclose(loss, plain, rtol=1e-13)
        straight = [value.clone().requires_grad_() for value in (features, weight, bias)]
        wanted = torch.autograd.grad(HEAD(*straight[:2], target, bias=straight[2], chunk_rows=4), straight)
        for a, b in zip(torch.autograd.grad(loss, leaves), wanted):
            assert torch.allclose(a, b, rtol=1e-11)
    row = features[:1].expand(ROWS, WIDTH)
    assert torch.allclose(HEAD(row, weight, target, chunk_rows=4), HEAD(row.contiguous(), weight, target, chunk_rows=0))


def test_norms_at_the_edge() -> None:
    """A zero vector has cosine 0 with everything; below eps the norm counts as constant, as in torch."""
    for factor in (0.0, 1e-14, 1e-3, 1e15):
        results = []
        for chunk_rows in (4, 0):
            features, weight, _ = inputs()
            with torch.no_grad():
                features[2] *= factor
                weight[5] *= factor
            loss = HEAD(features, weight, LABELS, normalize=True, chunk_rows=chunk_rows)
            results.append((loss, *torch.autograd.grad(loss, (features, weight))))
        for ours, theirs in zip(*results):
            assert ours.isfinite().all()
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-25)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_model_gives_the_loss_that_torch_gives(normalize, value) -> None:
    """And not an error about a table that the caller never passed."""
    for place in range(3):
        given = [leaf.detach() for leaf in inputs()]
        given[place][3] = value
        loss = HEAD(*given[:2], LABELS, bias=given[2], normalize=normalize, chunk_rows=4)
        truth = F.cross_entropy(double_logits(*given, normalize), LABELS)
        assert torch.allclose(loss, truth, equal_nan=True, rtol=1e-12), (place, loss, truth)


def test_float16_gradients_survive_a_loss_scale() -> None:
    """Rounded to float16 before the factor 65536 they would be 0."""
    given = inputs(torch.float16, 300, 400, 4)
    target = torch.arange(300)
    shift = torch.where(torch.arange(400) < 300, 0.0, -12.0)
    loss = HEAD(*given[:2], target, shift=shift, chunk_rows=64)
    (loss * 65536).backward()
    exact = [value.detach().double().requires_grad_() for value in given[:2]]
    F.cross_entropy(F.linear(*exact) + shift, target).backward()
    small = exact[1].grad.abs() < 1e-8  # below half of float16's smallest number
    assert small.sum() > 20
    assert (given[1].grad[small] != 0).float().mean() > 0.9
    assert torch.allclose(given[1].grad.double() / 65536, exact[1].grad, rtol=2e-2, atol=2e-12)


def test_autocast() -> None:
    features, weight, bias = inputs(torch.float32)
    for chunk_rows in (0, 4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = HEAD(features, weight, LABELS, bias=bias, normalize=True, chunk_rows=chunk_rows)
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss, (features, weight, bias))
        assert all(grad.dtype == torch.float32 for grad in grads)
        rounded = [value.detach().bfloat16().requires_grad_() for value in (features, weight, bias)]
        same = HEAD(*rounded[:2], LABELS, bias=rounded[2], normalize=True, chunk_rows=chunk_rows)
        assert torch.equal(loss, same)
        for ours, theirs in zip(grads, torch.autograd.grad(same, rounded)):
            assert torch.equal(ours.bfloat16(), theirs)


def test_inputs_are_not_written() -> None:
    given = inputs()
    before = [value.detach().clone() for value in given]
    HEAD(*given[:2], LABELS, bias=given[2], normalize=True, chunk_rows=4, **TABLES).backward()
    assert all(torch.equal(a, b) and a._version == 0 for a, b in zip(given, before))


def peak(call) -> int:
    """Largest number of bytes that were allocated at one time during the call, beyond those before it; as the profiler counts them, so the
    number is the same on every run."""
    call()  # caches fill
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    most = now = 0
    for event in allocations(profile):
        now += event
        most = max(most, now)
    return most


def allocations(profile) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    found = [event for event in trace["traceEvents"] if event["name"] == "[memory]"]
    return [
        event["args"]["Bytes"]
        for event in sorted(found, key=lambda event: (event["ts"], event["args"].get("Ev Idx", 0)))
    ]


class TestMemory:
    ROWS, CLASSES, WIDTH, CHUNK = 512, 4099, 64, 128

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("normalize", [False, True])
    def test_one_chunk_and_the_weight_gradient(self, dtype, reduction, normalize) -> None:
        features, weight, bias = inputs(dtype, self.ROWS, self.CLASSES, self.WIDTH)
        target = torch.arange(self.ROWS)

        def call(chunk_rows=self.CHUNK):
            loss = HEAD(
                features, weight, target, bias=bias, normalize=normalize, reduction=reduction, chunk_rows=chunk_rows
            )
            loss.backward(torch.full_like(loss, 0.37))  # no copy of the gradients, neither for the factor nor for .grad
            features.grad = weight.grad = bias.grad = None

        chunk = 4 * self.CHUNK * self.CLASSES
        gradients = 4 * (self.CLASSES * self.WIDTH + self.CLASSES + self.ROWS * self.WIDTH)
        if dtype == torch.bfloat16:
            gradients += gradients // 2  # the float32 sums and their 16-bit results exist together
        # Vectors over classes and rows, a chunk's features twice, blocks of weights in the second-level cache.
        slack = 4 * (16 * (self.CLASSES + self.ROWS) + 2 * self.CHUNK * self.WIDTH) + 3 * 4 * _head._BLOCK
        found = peak(call)
        assert found <= chunk + gradients + slack
        assert found >= gradients  # the profiler saw the call
        logits = 4 * self.ROWS * self.CLASSES
        if dtype == torch.float32:
            assert peak(lambda: call(0)) >= 2 * logits
        assert found < 0.75 * logits + gradients

    def test_a_frozen_classifier_costs_one_chunk(self) -> None:
        features, weight, _ = inputs(torch.float32, self.ROWS, self.CLASSES, self.WIDTH)
        weight.requires_grad_(False)
        target = torch.arange(self.ROWS)
        found = peak(lambda: HEAD(features, weight, target, chunk_rows=self.CHUNK).backward())
        assert found <= 4 * (self.CHUNK * self.CLASSES + 4 * self.ROWS * self.WIDTH + 8 * self.CLASSES)


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)])
def test_compiled_is_eager(reduction, chunk_rows, frozen) -> None:
    def call(features, weight, bias):
        return HEAD(
            features * 2,
            weight,
            LABELS,
            bias=bias,
            normalize=True,
            reduction=reduction,
            chunk_rows=chunk_rows,
            **TABLES,
        )

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        given = inputs(torch.float32)
        for place in frozen:
            given[place].requires_grad_(False)
        loss = function(*given)
        loss.backward(torch.full_like(loss, 0.37))
        results.append([loss.detach(), *(value.grad for value in given)])
    for place, (eager, compiled) in enumerate(zip(*results)):
        if place - 1 in frozen:
            assert eager is None
            assert compiled is None
        else:
            assert eager.abs().max() > 0
            assert torch.equal(eager, compiled)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_with_changing_batches() -> None:
    compiled = torch.compile(
        lambda f, w, t: HEAD(f, w, t, chunk_rows=4), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows in (2, 5, 12):
        features, weight, _ = inputs(torch.float32, rows)
        target = torch.arange(rows)
        target[0] = -100
        loss, truth = compiled(features, weight, target), HEAD(features, weight, target, chunk_rows=4)
        assert torch.equal(loss, truth)
        for ours, theirs in zip(*(torch.autograd.grad(each, (features, weight)) for each in (loss, truth))):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (False, False, False)])
@pytest.mark.parametrize("reduction", [0, 1])  # none, mean
def test_opcheck(needs, reduction) -> None:
    features, weight, bias = (value.detach() for value in inputs(torch.float32))
    upstream = torch.rand(ROWS) if reduction == 0 else None
    for w, rows in ((weight, ROWS), (weight.t().contiguous().t(), ROWS), (weight, 0), (weight, 1)):
        if rows == 0 and reduction == 1:
            continue  # the mean of nothing is NaN, which opcheck cannot compare
        tables_learned = [needs[0], True, needs[1], True, False] if needs[2] else [False] * 5
        factor = None if upstream is None else upstream[:rows]
        call = Call(
            LABELS[:rows], None, None, *TABLES.values(), grad_scale=factor, label_smoothing=0.1, reduction=reduction
        )
        for learned in (False, True):  # training through the operator keeps the gradient
            inputs_of = (features[:rows], w.requires_grad_(learned), bias)
            torch.library.opcheck(_head.operator, (*inputs_of, *call, True, 4, [*needs, *tables_learned]))
