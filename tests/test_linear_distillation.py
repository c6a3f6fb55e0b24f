"""Promise: a head's distillation and its class probabilities are those of the logits, with gradients of features, weight and bias, and one
chunk of logits in memory."""

from __future__ import annotations

import itertools
import math

import pytest
import test_soft_targets
import torch
from test_heads import peak
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ltkernels as ltk
from ltkernels import _head
from ltkernels._errors import DTypeError

HEAD = ltk.functional.linear_adjusted_cross_entropy
KD, CE = ltk.functional.linear_distillation, ltk.functional.adjusted_cross_entropy
DTYPES = test_soft_targets.DTYPES
random = test_soft_targets.random
ROWS, WIDTH, OTHER, CLASSES = 11, 5, 7, 37
NAMES = ("features", "weight", "bias")
# Of an array's norm: one rounding to the dtype, and products and exponentials of float32.
CLOSE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def student(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    found = random(ROWS, WIDTH), random(CLASSES, WIDTH, seed=1), random(CLASSES, seed=2)
    return [each.to(dtype).requires_grad_() for each in found]


def teacher(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        each.to(dtype)
        for each in (random(ROWS, OTHER, seed=3), random(CLASSES, OTHER, seed=4), random(CLASSES, seed=5))
    ]


def tables(real: torch.dtype = torch.float64) -> dict[str, Tensor]:
    own = torch.linspace(0, 2, ROWS)
    return {
        "shift": random(CLASSES, seed=6).to(real),
        "scale": random(CLASSES, seed=7).abs().to(real) + 0.5,
        "sample_weight": own,
    }


def logits_of(features: Tensor, weight: Tensor, bias: Tensor | None = None, normalize: bool = False) -> Tensor:
    if normalize:
        features, weight = F.normalize(features, dim=1), F.normalize(weight, dim=1)
    return F.linear(features, weight, bias)


def formula(
    z: Tensor, t: Tensor, temperature: float, reduction: str, shift=0.0, scale=1.0, sample_weight=None
) -> Tensor:
    log_p, log_q = ((scale * z + shift) / temperature).log_softmax(1), (t / temperature).log_softmax(1)
    own = torch.ones(len(z), dtype=torch.float64) if sample_weight is None else sample_weight.double()
    rows = temperature**2 * F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1) * own
    if reduction == "none":
        return rows
    return rows.sum() / {"mean": own.sum(), "batch_mean": len(z), "sum": 1.0}[reduction]


def compare(call, leaves: list[Tensor], wanted, dtype: torch.dtype) -> None:
    """`call` of the leaves, and `wanted` of them in float64: loss, and gradients for a random upstream gradient."""
    loss = call(*leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = wanted(*exact)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == real
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss.double(), expected, rtol=CLOSE[real] * 5, atol=CLOSE[real] * 5)
    upstream = random(*loss.shape, seed=9) + 1.5
    found = torch.autograd.grad(loss, leaves, upstream.to(real))
    for name, ours, theirs in zip(NAMES, found, torch.autograd.grad(expected, exact, upstream), strict=True):
        assert ours.dtype == dtype
        error = float((ours.double() - theirs).norm())
        assert error <= CLOSE[dtype] * float(theirs.norm()), f"{name}: {error} of {float(theirs.norm())}"


# ---- distillation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("given", ["plain", "tables"])
def test_values_and_gradients(dtype, normalize, given) -> None:
    options = tables() if given == "tables" else {}
    t = teacher(dtype)
    exact = logits_of(*(each.double() for each in t))
    for reduction, chunk_rows in itertools.product(("mean", "batch_mean", "sum", "none"), (None, 0, 4)):
        compare(
            lambda x, w, b, reduction=reduction, chunk_rows=chunk_rows: KD(
                x, w, t[0], t[1], 3.0, bias=b, teacher_bias=t[2], normalize=normalize, reduction=reduction, chunk_rows=chunk_rows, **options
            ),
            student(dtype),
            lambda x, w, b, reduction=reduction: formula(logits_of(x, w, b, normalize), exact, 3.0, reduction, **options),
            dtype,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float64)],
)
def test_a_teacher_in_another_dtype(ours, theirs) -> None:
    features, weight, _ = teacher(theirs)
    z = logits_of(features.double(), weight.double())
    for given in ((features, weight), (z.to(theirs), None)):
        exact = z if given[1] is not None else given[0].double()
        compare(
            lambda x, w, b, given=given: KD(x, w, *given, 2.0, bias=b, chunk_rows=4),
            student(ours),
            lambda x, w, b, exact=exact: formula(logits_of(x, w, b), exact, 2.0, "mean"),
            ours,
        )


def test_the_pinned_value_and_shapes() -> None:
    x, w, b = student()
    t = teacher()
    rows = KD(x, w, t[0], t[1], 2.0, bias=b, teacher_bias=t[2], reduction="none", chunk_rows=4)
    assert rows.shape == (ROWS,)
    shaped = KD(
        x[:6].reshape(2, 3, -1), w, t[0][:6].reshape(2, 3, -1), t[1], 2.0, bias=b, teacher_bias=t[2], reduction="none"
    )
    torch.testing.assert_close(shaped, rows[:6].reshape(2, 3))
    one = KD(x[0], w, t[0][0], t[1], 2.0, bias=b, teacher_bias=t[2], sample_weight=torch.tensor(3.0))
    torch.testing.assert_close(one, rows[0])
    assert KD(x[:0], w, t[0][:0], t[1]).isnan()
    assert KD(x[:0], w, t[0][:0], t[1], reduction="sum") == 0
    spread = [torch.stack([each, each], -1)[..., 0] for each in (x, w, *t)]
    found = KD(spread[0], spread[1], spread[2], spread[3], 2.0, bias=b, teacher_bias=spread[4], reduction="none")
    torch.testing.assert_close(found, rows)


def few(*tensors: Tensor) -> list[Tensor]:
    """Five rows, or classes, of each, as leaves: a check of second derivatives takes the square of all entries."""
    return [each.detach()[:5].clone().requires_grad_(each.requires_grad) for each in tensors]


def test_what_looks_at_a_call_finds_torchs_derivatives() -> None:
    leaves, t = few(*student()), few(*teacher())
    given = dict(zip(tables(), few(*tables().values()), strict=True))

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return KD(x, w, t[0], t[1], 2.0, bias=b, chunk_rows=2, **given)

    def rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return KD(x, w, t[0], t[1], 2.0, bias=b, normalize=True, reduction="none", chunk_rows=2)

    for function in (call, rows):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)
        exact = torch.func.grad(lambda *a, f=function: f(*a).sum(), argnums=(0, 1, 2))(*(x.detach() for x in leaves))
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        for seen in (function, compiled, lambda *a, f=function: checkpoint(f, *a, use_reentrant=False)):
            found = torch.autograd.grad(seen(*leaves).sum(), leaves)
            for ours, theirs in zip(found, exact, strict=True):
                torch.testing.assert_close(ours, theirs)
        plain = tuple(x.detach() for x in leaves)
        assert torch.func.jvp(function, plain, plain)[1].isfinite().all()
        loss = function(*leaves).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        for one, two in zip(first, torch.autograd.grad(loss, leaves), strict=True):
            assert torch.equal(one, two)


def test_only_what_is_wanted_is_computed(monkeypatch) -> None:
    asked = []
    chunks = _head._chunks
    monkeypatch.setattr(_head, "_chunks", lambda *given: (asked.append(given[6][:3]), chunks(*given))[1])
    x, w, b = student()
    t = teacher()
    for wanted in itertools.product((False, True), repeat=3):
        given = [each.detach().requires_grad_(want) for each, want in zip((x, w, b), wanted, strict=True)]
        loss = KD(given[0], given[1], t[0], t[1].requires_grad_(), bias=given[2])
        assert asked.pop() == wanted
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        assert [each.grad is not None for each in given] == list(wanted)
    assert t[1].grad is None  # the teacher is a constant


def test_tables_that_require_a_gradient_get_the_references() -> None:
    x, w, b = student()
    t = teacher()
    shift, scale = (each.requires_grad_() for each in list(tables().values())[:2])
    assert ltk.explain(KD, x, w, t[0], t[1], shift=shift) == (
        "torch",
        "gradient with respect to shift; logits held: the torch backend has no chunks",
    )
    assert torch.autograd.gradcheck(
        lambda *g: KD(x, w, t[0], t[1], 2.0, bias=b, shift=g[0], scale=g[1]), (shift, scale)
    )
    own = tables()["sample_weight"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda g: KD(x, w, t[0], t[1], 2.0, sample_weight=g), (own,))


def test_autocast() -> None:
    leaves, t = student(torch.float32), teacher(torch.float32)
    half = [each.detach().bfloat16().requires_grad_() for each in leaves]
    low = [each.bfloat16() for each in t]
    wanted = KD(half[0], half[1], low[0], low[1], 2.0, bias=half[2], teacher_bias=low[2], chunk_rows=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = KD(leaves[0], leaves[1], t[0], t[1], 2.0, bias=leaves[2], teacher_bias=t[2], chunk_rows=4)
    assert torch.equal(found, wanted)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, half), strict=True):
        assert torch.equal(ours, theirs.float())


def test_a_bias_that_diverged_gives_nan_and_a_masked_class_counts_for_nothing() -> None:
    x, w, b = (each.detach() for each in student())
    t = teacher()
    bad = b.clone()
    bad[3] = math.nan
    assert KD(x, w, t[0], t[1], bias=bad).isnan()
    shift, gone = torch.zeros(CLASSES, dtype=torch.float64), t[2].clone()
    shift[5] = gone[5] = -torch.inf
    left = [j for j in range(CLASSES) if j != 5]
    found = KD(x, w, t[0], t[1], 2.0, bias=b, teacher_bias=gone, shift=shift, chunk_rows=4)
    torch.testing.assert_close(found, KD(x, w[left], t[0], t[1][left], 2.0, bias=b[left], teacher_bias=t[2][left]))


def test_threads_give_the_same_bits() -> None:
    x, w, t, v = torch.randn(64, 8), torch.randn(3000, 8), torch.randn(64, 16), torch.randn(3000, 16)
    threads, found = torch.get_num_threads(), []
    leaves = [x.requires_grad_(), w.requires_grad_()]
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            loss = KD(x, w, t, v, 2.0, chunk_rows=16)
            found.append((loss, *torch.autograd.grad(loss, leaves)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_explain() -> None:
    x, w, t = torch.empty(64, 8), torch.empty(32000, 8), torch.empty(64, 32000)
    assert "logits in chunks: 256 rows of 32000 logits at a time" in ltk.explain(KD, x, w, t).reason
    assert ltk.explain(KD, x, w, t, chunk_rows=8).reason.endswith("logits in chunks: asked for")
    assert (
        "logits held: 4 x 5 logits are few"
        in ltk.explain(KD, torch.ones(4, 3), torch.ones(5, 3), torch.ones(4, 5)).reason
    )


# ---- class probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("given", ["plain", "tables"])
def test_class_probabilities_in_chunks(dtype, normalize, given) -> None:
    q = random(ROWS, CLASSES, seed=8).abs()
    q[q < 0.5] = 0
    options = {**tables(), "label_smoothing": 0.1} if given == "tables" else {}
    alpha = random(CLASSES, seed=10).abs() if given == "tables" else None
    for reduction, kind in itertools.product(("mean", "batch_mean", "sum", "none"), (dtype, torch.float32)):
        p = q.to(kind)

        def wanted(x: Tensor, w: Tensor, b: Tensor, p=p, reduction=reduction) -> Tensor:
            z = logits_of(x, w, b, normalize)
            return CE(z, p.double(), weight=alpha, reduction=reduction, backend="torch", **options)

        def call(x: Tensor, w: Tensor, b: Tensor, p=p, reduction=reduction) -> Tensor:
            return HEAD(
                x, w, p, bias=b, normalize=normalize, class_weight=alpha, reduction=reduction, chunk_rows=4, **options
            )

        compare(call, student(dtype), wanted, dtype)
        assert "logits in chunks: asked for" in ltk.explain(HEAD, *student(dtype)[:2], p, chunk_rows=4).reason


def test_derivatives_of_class_probabilities_in_chunks() -> None:
    leaves, q = few(*student()), random(5, 5, seed=8).abs()
    for reduction in ("mean", "none"):

        def call(x: Tensor, w: Tensor, b: Tensor, reduction=reduction) -> Tensor:
            return HEAD(x, w, q, bias=b, reduction=reduction, chunk_rows=2, label_smoothing=0.1)

        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)
        found = torch.autograd.grad(torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves).sum(), leaves)
        for ours, theirs in zip(found, torch.autograd.grad(call(*leaves).sum(), leaves), strict=True):
            torch.testing.assert_close(ours, theirs)
    learned = q.clone().requires_grad_()
    with pytest.raises(ValueError, match="chunk_rows=4 is not possible: gradient with respect to target"):
        HEAD(*leaves[:2], learned, chunk_rows=4)


# ---- memory -----------------------------------------------------------------------------------------------------------


class TestMemory:
    ROWS, CLASSES, WIDTH, CHUNK = 512, 4099, 64, 128

    def heads(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        rows, classes, width = self.ROWS, self.CLASSES, self.WIDTH
        own = [torch.randn(rows, width), torch.randn(classes, width), torch.randn(classes)]
        other = [torch.randn(rows, 2 * width), torch.randn(classes, 2 * width), torch.randn(classes)]
        return [each.to(dtype).requires_grad_() for each in own], [each.to(dtype) for each in other]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("normalize", [False, True])
    def test_a_chunk_of_each_side(self, dtype, reduction, normalize) -> None:
        (features, weight, bias), other = self.heads(dtype)
        q = torch.rand(self.ROWS, self.CLASSES)

        def distill() -> Tensor:
            return KD(
                features, weight, other[0], other[1], 2.0, bias=bias, teacher_bias=other[2], normalize=normalize, reduction=reduction,
                chunk_rows=self.CHUNK,
            )  # fmt: skip

        def soft() -> Tensor:
            return HEAD(features, weight, q, bias=bias, normalize=normalize, reduction=reduction, chunk_rows=self.CHUNK)

        chunk = 4 * self.CHUNK * self.CLASSES
        gradients = 4 * (self.CLASSES * self.WIDTH + self.CLASSES + self.ROWS * self.WIDTH)
        if dtype == torch.bfloat16:
            gradients += gradients // 2  # the float32 sums and their 16-bit results exist together
        # Vectors over classes and rows, the kernel's scratch, a chunk's features, blocks of weights in the second-level cache.
        slack = 4 * (40 * (self.CLASSES + self.ROWS) + 4 * self.CHUNK * self.WIDTH) + 3 * 4 * _head._BLOCK
        logits = 4 * self.ROWS * self.CLASSES
        for call, chunks in ((distill, 2), (soft, 1)):

            def step(call=call) -> None:
                loss = call()
                loss.backward(torch.full_like(loss, 0.37))
                features.grad = weight.grad = bias.grad = None

            found = peak(step)
            assert gradients <= found <= chunks * chunk + gradients + slack
            assert found < 0.75 * logits + gradients


# ---- what is refused --------------------------------------------------------------------------------------------------

X, W, T, V = torch.randn(4, 3), torch.randn(5, 3), torch.randn(4, 2), torch.randn(5, 2)
Q = torch.rand(4, 5)


def spoiled(value: float) -> Tensor:
    q = Q.clone()
    q[3, 1] = value
    return q


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: KD([1.0], W, T, V), TypeError, "features is list"),
        (lambda: KD(X, W, [1.0], V), TypeError, "teacher is list"),
        (lambda: KD(X, W, [1.0]), TypeError, "teacher is list"),
        (lambda: KD(X, W, Q.long()), TypeError, "teacher has dtype torch.int64"),
        (lambda: KD(X, W, T.long(), V), TypeError, "teacher has dtype torch.int64"),
        (lambda: KD(X, W, T, V.double()), TypeError, "teacher_weight has dtype torch.float64, teacher torch.float32"),
        (lambda: KD(X, W, T, V, bias=torch.ones(4)), ValueError, r"bias has shape \(4,\); it must be \(5,\)"),
        (lambda: KD(X, W, T, V, teacher_bias=torch.ones(4)), ValueError, r"teacher_bias has shape \(4,\)"),
        (lambda: KD(X, W, Q, teacher_bias=torch.ones(5)), ValueError, "teacher_bias is given without teacher_weight"),
        (lambda: KD(X, W, T), ValueError, r"teacher has shape \(4, 2\); without teacher_weight .* of shape \(4, 5\)"),
        (lambda: KD(X, W, T[:3], V), ValueError, r"teacher has shape \(3, 2\), features \(4, 3\)"),
        (lambda: KD(X, W, T, V[:4]), ValueError, r"teacher_weight has shape \(4, 2\), weight \(5, 3\)"),
        (lambda: KD(X, W, X, V), ValueError, r"teacher_weight has shape \(5, 2\); teacher of shape \(4, 3\) need"),
        (lambda: KD(X, W[:0], T, V), ValueError, "there must be at least one class"),
        (lambda: KD(X, W, Q.to("meta")), ValueError, "teacher is on meta"),
        (lambda: KD(X, W, T.to("meta"), V.to("meta")), ValueError, "teacher is on meta"),
        (lambda: KD(X, W, T, V, 0.0), ValueError, "temperature is 0.0; it must be above 0"),
        (lambda: KD(X, W, T, V, math.nan), ValueError, "temperature is nan"),
        (lambda: KD(X, W, T, V, reduction="batchmean"), ValueError, "reduction is 'batchmean'"),
        (lambda: KD(X, W, T, V, chunk_rows=-1), ValueError, "chunk_rows is -1"),
        (lambda: KD(X, W, T, V, scale=torch.ones(4)), ValueError, r"scale has shape \(4,\)"),
        (lambda: KD(X, W, T, V, shift=torch.full((5,), math.nan)), ValueError, r"shift\[0\] is nan"),
        (lambda: KD(X, W, T, V, sample_weight=torch.ones(5)), ValueError, r"sample_weight has shape \(5,\)"),
        (
            lambda: KD(X, W, T, V, sample_weight=torch.tensor([1, 1, 1, math.nan]), chunk_rows=2),
            ValueError,
            "sample_weight is nan in row 3",
        ),
        (lambda: HEAD(X, W, spoiled(-0.5), chunk_rows=2), ValueError, "target has -0.5 for class 1 in row 3"),
        (lambda: HEAD(X, W, spoiled(math.nan), chunk_rows=2), ValueError, "target has nan for class 1 in row 3"),
        (
            lambda: HEAD(X, W, Q, chunk_rows=2, sample_weight=torch.tensor([1, 1, 1, math.inf])),
            ValueError,
            "sample_weight is inf in row 3",
        ),
        (
            lambda: HEAD(X, W, Q, chunk_rows=2, class_weight=torch.full((5,), math.nan)),
            ValueError,
            r"class_weight\[0\] is nan",
        ),
    ],
)
def test_message(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensors_are_refused_by_name(mesh) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    given = {
        "features": X, "weight": W, "teacher": T, "teacher_weight": V, "bias": torch.ones(5), "teacher_bias": torch.ones(5),
        "shift": torch.ones(5), "scale": torch.ones(5), "sample_weight": torch.ones(4),
    }  # fmt: skip
    for name, value in given.items():
        spread = distribute_tensor(value, mesh, [Replicate()])
        with pytest.raises(DTypeError, match=rf"^{name} is a DTensor; give plain tensors"):
            KD(**{**given, name: spread})
    with pytest.raises(DTypeError, match="^teacher is a DTensor; give plain tensors"):
        KD(X, W, distribute_tensor(Q, mesh, [Replicate()]))
