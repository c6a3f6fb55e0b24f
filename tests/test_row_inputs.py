"""Promise: sample weights, label smoothing by class and label scale are the formula in every form of the loss, and refused by name where
they are wrong; the losses on them have their papers' numbers."""

from __future__ import annotations

import math
from typing import Any

import contract
import oracle
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels import _backends
from ltkernels._backends import cpu
from ltkernels._call import Call, Out

CE = ltk.functional.adjusted_cross_entropy
HEAD = ltk.functional.linear_adjusted_cross_entropy
SIZES = [10, 31, 100, 2100]  # one a lane; rows; more than a block
EPS = "label_smoothing"


def tables(classes: int, real: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    found = {name: torch.rand(classes, generator=generator) + 0.5 for name in (*oracle.TABLES, "label_scale")}
    found[EPS] = torch.rand(classes, generator=generator)
    found[EPS][::3] = 0.0
    return {name: table.to(real) for name, table in found.items()}


def weights(rows: int, real: torch.dtype = torch.float64) -> Tensor:
    own = torch.linspace(-0.5, 2.0, rows, dtype=real)
    own[rows // 3] = 0.0
    return own


# Each new input alone, in the company that its code meets, and all at once.
SETS = {
    "own": ("sample_weight",),
    "own, tables": ("sample_weight", *oracle.TABLES),
    "eps": (EPS,),
    "eps, weight": (EPS, "weight", "scale"),
    "kappa": ("label_scale",),
    "kappa, scale": ("label_scale", "scale", "shift", "margin"),
    "all": ("sample_weight", EPS, "label_scale", *oracle.TABLES),
}


def chosen(names: tuple[str, ...], rows: int, classes: int, real: torch.dtype = torch.float64) -> dict[str, Any]:
    found = {**tables(classes, real), "sample_weight": weights(rows, real)}
    return {name: found[name] for name in names}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_values(names, dtype, mixed) -> None:
    """Loss and gradient against the float64 oracle, every reduction, in lanes, in rows and over blocks."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    rows = 15  # of 2100 classes: below the size from which torch itself takes threads, whose turns the tests would wait for
    for classes in SIZES:
        generator = torch.Generator().manual_seed(1)
        z = (torch.randn(rows, classes, generator=generator) * 3).to(dtype)
        y = torch.randint(0, classes, (rows,), generator=generator)
        y[5] = -100
        lam = torch.rand(rows, generator=generator).to(real)
        target = (y, y.flip(0).clamp_min(0), lam) if mixed else y
        options = chosen(names, rows, classes, real)
        for reduction in contract.REDUCTIONS:
            gamma = 1.5 if reduction == "sum" else 0.0
            loss, grad = contract.gradient(CE, z, target, reduction=reduction, focal_gamma=gamma, **options)
            wanted, slopes, size = oracle.adjusted_cross_entropy(
                z.double(), target, reduction=reduction, focal_gamma=gamma, **options
            )
            # Smoothing subtracts numbers of one size, mixed labels add numbers of either sign, and so do weights below 0 in a sum.
            cond = 8.0 if EPS in names or mixed else 1.0
            oracle.assert_gradient(grad, slopes, size, None if mixed else y, cond)
            near = torch.tensor(oracle.TOLERANCES[real][0] * 64 * (4 + float(size.max())))
            scale = wanted.abs().max() if wanted.dim() else wanted.abs()
            assert bool(((loss.double() - wanted).abs() <= near * (scale + 1)).all())


@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
@pytest.mark.parametrize("classes", [10, 100, 2100])
def test_gradients_of_tables(classes, names) -> None:
    """The kernel's own, beside the new inputs, against the reference's."""
    rows, reals = 40, torch.float64
    z = torch.randn(rows, classes, dtype=reals, generator=torch.Generator().manual_seed(3))
    y = torch.arange(rows) * 7 % classes
    y[3] = -100
    second = (y, y.flip(0).clamp_min(0), torch.linspace(0, 1, rows, dtype=reals))
    new = {name: value for name, value in chosen(names, rows, classes).items() if name not in oracle.TABLES}
    learned = [name for name in oracle.TABLES if name != "weight" or EPS not in names]
    for target in (y, second):
        for reduction in contract.REDUCTIONS:
            found = []
            for backend in ("cpu", "torch"):
                leaves = {name: tables(classes)[name].clone().requires_grad_() for name in learned}
                loss = CE(z, target, reduction=reduction, backend=backend, **new, **leaves)
                found.append(torch.autograd.grad(loss.sum() if loss.dim() else loss, list(leaves.values())))
            for name, ours, theirs in zip(learned, *found):
                assert theirs.abs().max() > 0
                assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), (name, reduction)


def whole(z: Tensor, y: Any, **common: Any) -> Tensor:
    """All of it at once, for any number of rows of any shape."""
    first = y[0] if isinstance(y, tuple) else y
    own = weights(40, z.dtype if z.dtype == torch.float64 else torch.float32)[: first.numel()].reshape(first.shape)
    return CE(z, y, sample_weight=own, **tables(z.shape[1]), **common)


def test_contract() -> None:
    z, y = contract.hostile_logits(8, 21), contract.labels(8, 21)
    z[2, 1] = 0.0  # a class of probability 0 under smoothing has no finite loss
    contract.check_autograd(whole, z, y)
    contract.check_backends_and_targets(whole, z, y)
    many = lambda z, y, **common: CE(z, y, sample_weight=weights(len(y)).float(), **tables(21), **common)  # noqa: E731
    contract.check_threads(many, torch.randn(900, 21), torch.arange(900) % 21)
    alone = lambda z, y, **common: CE(z, y, sample_weight=weights(40)[1 : 1 + len(y)].to(z.dtype), **common)  # noqa: E731
    contract.check_ignored_and_nan(alone, torch.randn(4, 21, dtype=torch.float64), torch.arange(4))

    def make(order: list[int]) -> Any:
        named = {name: table[order] for name, table in tables(4).items()}
        return lambda z, y, **common: CE(z, y, **named, **common)

    order = torch.tensor([3, 1, 0, 2])
    z, y = torch.randn(2, 4, dtype=torch.float64), torch.tensor([2, 3])
    _, one = contract.gradient(make([0, 1, 2, 3]), z, y)
    _, two = contract.gradient(make(order.tolist()), z[:, order], torch.argsort(order)[y])
    assert torch.allclose(two, one[:, order], rtol=1e-13, atol=1e-16)


def test_the_mean_divides_by_the_weights() -> None:
    """As torch's with class weights; a mean of equal weights is the plain mean, and ignored rows count for nothing, whatever theirs is."""
    z, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, -100, 3, 4, 1])
    alpha = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.25], dtype=torch.float64)
    of_labels = torch.where(y >= 0, alpha[y.clamp_min(0)], torch.nan)
    for reduction in ("mean", "sum", "none"):
        wanted = F.cross_entropy(z, y, alpha, reduction=reduction)
        assert torch.allclose(CE(z, y, sample_weight=of_labels, reduction=reduction), wanted, rtol=1e-14)
    assert torch.allclose(CE(z, y, sample_weight=torch.full((6,), 3.0)), F.cross_entropy(z, y), rtol=1e-14)
    batch = CE(z, y, sample_weight=of_labels, reduction="batch_mean")
    assert torch.allclose(batch, F.cross_entropy(z, y, alpha, reduction="sum") / 5, rtol=1e-14)
    # Of class probabilities torch's mean divides by the rows; with weights it is by theirs.
    q, own = torch.softmax(torch.randn(6, 5).double(), 1), torch.linspace(1, 2, 6).double()
    rows = F.cross_entropy(z, q, reduction="none")
    assert torch.allclose(CE(z, q, sample_weight=own), (rows * own).sum() / own.sum(), rtol=1e-14)
    assert torch.allclose(CE(z, q, sample_weight=own, reduction="batch_mean"), (rows * own).sum() / 6, rtol=1e-14)


@pytest.mark.parametrize("name", ["seesaw", "arcface", "cb_focal", *contract.DRAWING])
def test_closed_forms_take_sample_weights(name) -> None:
    built = ltk.LOSSES[name].adjustment([60, 30, 5, 9, 2], **contract.seeded(name))
    z, y, own = torch.rand(7, 5).double(), torch.arange(7) % 5, weights(7)
    for target in (y, (y, y.flip(0), torch.linspace(0, 1, 7).double())):
        (rows, slopes) = contract.gradient(CE, z, target, reduction="none", **built._asdict())
        loss, grad = contract.gradient(CE, z, target, reduction="none", sample_weight=own, **built._asdict())
        assert torch.allclose(loss, own * rows, rtol=1e-13)
        assert torch.allclose(grad, own[:, None] * slopes, rtol=1e-13)
        torch_loss = CE(z, target, backend="torch", sample_weight=own, **built._asdict())
        assert torch.allclose(CE(z, target, sample_weight=own, **built._asdict()), torch_loss, rtol=1e-12)


def test_gradients_with_respect_to_the_new_inputs() -> None:
    """By the reference, `explain` says why: that of a sample weight is the row's loss."""
    z, y = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, -100, 3, 4, 1])
    own = weights(6).requires_grad_()
    (slope,) = torch.autograd.grad(CE(z, y, sample_weight=own, reduction="sum"), own)
    assert torch.allclose(slope, CE(z, y, reduction="none"), rtol=1e-13)
    for name, value in {**tables(5), "sample_weight": own}.items():
        if name in oracle.TABLES:
            continue
        leaf = value.detach().clamp(0.1, 0.9).requires_grad_()
        assert torch.autograd.gradcheck(lambda leaf, name=name: CE(z, y, **{name: leaf}), leaf)
        said = ltk.explain(CE, z, y, **{name: leaf})
        assert (said.backend, said.reason) == ("torch", f"gradient with respect to {name}")
        with pytest.raises(ValueError, match=f"backend='cpu' cannot serve this call: gradient with respect to {name}"):
            CE(z, y, **{name: leaf}, backend="cpu")
        assert ltk.explain(CE, z, y, **{name: leaf.detach()}).backend.startswith("cpu-")


# ---- who looks at a call -----------------------------------------------------------------------------------------------


def test_transforms() -> None:
    z, v = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    y, named = torch.arange(6) % 5, {**tables(5), "sample_weight": weights(6)}
    function = lambda z: CE(z, y, **named)  # noqa: E731
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(leaf), leaf)
    value, tangent = torch.func.jvp(function, (z,), (v,))
    assert torch.allclose(value, function(z), rtol=1e-13)
    assert torch.allclose(tangent, (slope * v).sum(), rtol=1e-11)
    assert torch.allclose(torch.func.grad(function)(z), slope, rtol=1e-10, atol=1e-14)
    # A loss a row, each with a weight of its own.
    by_label = tables(5)
    one = lambda z, y, w: CE(z[None], y[None], sample_weight=w[None], reduction="sum", **by_label)  # noqa: E731
    rows = torch.vmap(one)(z, y, weights(6))
    assert torch.allclose(rows, CE(z, y, reduction="none", **named), rtol=1e-12)


def test_compile_and_export() -> None:
    torch._dynamo.reset()
    y = torch.tensor([0, 1, -100, 3, 4, 1])
    named = tables(5, torch.float32)

    class Program(torch.nn.Module):
        def forward(self, z: Tensor, y: Tensor, own: Tensor) -> Tensor:
            return CE(z, y, sample_weight=own, **named)

    program, own = Program(), weights(6, torch.float32)
    results = []
    for call in (program, torch.compile(program, fullgraph=True, backend="aot_eager")):
        leaf = torch.linspace(-2, 2, 30).reshape(6, 5).requires_grad_()
        loss = call(leaf, y, own)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    exported = torch.export.export(program, (leaf.detach(), y, own))
    assert torch.equal(exported.module()(leaf.detach(), y, own), results[0][0])
    torch._dynamo.reset()


def test_operator() -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    named = {"smoothing": torch.rand(5), "label_scale": torch.rand(5), "sample_weight": torch.rand(4)}
    operands = (torch.rand(4, 5), *Call(torch.arange(4), **named), True, [False] * 5)
    torch.library.opcheck(torch.ops.ltkernels.adjusted_ce.default, operands, test_utils=tests)


def test_a_kernel_without_sample_weights_gets_them() -> None:
    """How the GPU's kernels have them: factors of row losses and of the rows' gradients."""
    asked = []

    def without(logits: Tensor, call: Call, out: Out) -> None:
        asked.append(call)
        assert call.sample_weight is None
        cpu.adjusted_ce(logits, call, out)

    z, y = torch.randn(9, 5), torch.arange(9) % 5
    y[2] = -100
    own = weights(9, torch.float32)
    own[2] = torch.nan
    for reduction in range(4):
        for scale in (None, torch.tensor(4.0)):
            call = Call(y, weight=torch.rand(5), sample_weight=own, reduction=reduction, grad_scale=scale)
            found = []
            for kernel in (cpu.adjusted_ce, _backends.weighing_rows(without)):
                out = Out(torch.empty(9) if reduction == 0 else torch.empty(()), torch.empty(9, 5))
                kernel(z, call, out)
                found.append(out)
            assert torch.allclose(found[0].loss, found[1].loss, rtol=1e-6)
            assert torch.allclose(found[0].grad, found[1].grad, rtol=1e-5, atol=1e-8)
    assert len(asked) == 8


# ---- forms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_head(names, biased, normalize) -> None:
    """In chunks as with the logits held, learned tables included."""
    rows, classes, width = 11, 9, 4
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, classes, (rows,), generator=generator)
    y[4] = -100
    target = (y, y.flip(0).clamp_min(0), torch.rand(rows, generator=generator).double())
    given = [
        torch.randn(*shape, generator=generator).double() for shape in ((rows, width), (classes, width), (classes,))
    ]
    options = chosen(names, rows, classes)
    if "weight" in options:
        options["class_weight"] = options.pop("weight")
    for labels in (y, target):
        for learned in ((), ("shift", "scale", "margin", "row_scale")):
            for reduction in contract.REDUCTIONS:
                found = []
                for chunk_rows in (0, 4):
                    x, w, b = (value.clone().requires_grad_() for value in given)
                    leaves = {name: tables(classes)[name].clone().requires_grad_() for name in learned}
                    loss = HEAD(
                        x, w, labels, bias=b if biased else None, normalize=normalize, chunk_rows=chunk_rows,
                        reduction=reduction, **{**options, **leaves},
                    )  # fmt: skip
                    inputs = [x, w, *([b] if biased else []), *leaves.values()]
                    upstream = torch.linspace(0.5, 2, rows).double() if loss.dim() else None
                    found.append((loss, *torch.autograd.grad(loss, inputs, upstream)))
                for held, chunked in zip(*found):
                    assert held.abs().max() > 0
                    assert torch.allclose(chunked, held, rtol=1e-9, atol=1e-12)


def test_head_of_sequences_and_modules() -> None:
    x, w = torch.randn(2, 3, 4), torch.randn(5, 4)
    y, own = torch.tensor([[0, 1, 4], [2, -100, 3]]), weights(6, torch.float32).reshape(2, 3)
    wanted = CE((x @ w.t()).movedim(-1, 1), y, sample_weight=own, reduction="none")
    assert torch.allclose(HEAD(x, w, y, sample_weight=own, reduction="none"), wanted, rtol=1e-5)
    loss = ltk.nn.LabelAwareSmoothing([60, 30, 5, 9, 2])
    assert torch.allclose(
        loss.from_features(x, w, y, sample_weight=own, chunk_rows=2),
        loss((x @ w.t()).movedim(-1, 1), y, sample_weight=own),
        rtol=1e-5,
    )
    with pytest.raises(ValueError, match=r"sample_weight has shape \(6,\); it must be \(2, 3\)"):
        HEAD(x, w, y, sample_weight=own.reshape(-1))


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_bad_values_are_named(backend) -> None:
    z, y = torch.zeros(4, 3), torch.tensor([0, -100, 2, 1])

    def refused(message: str, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=message):
            CE(z, y, backend=backend, **options)
        with pytest.raises(error, match=message):
            HEAD(torch.zeros(4, 2), torch.zeros(3, 2), y, backend=backend, chunk_rows=None, **options)

    good = torch.ones(4)
    for value in (torch.nan, torch.inf, -torch.inf):
        own = good.clone()
        own[2] = value
        refused(rf"sample_weight is {value} in row 2; it must be finite", sample_weight=own)
        own[2], own[1] = 1.0, value
        assert CE(z, y, sample_weight=own, backend=backend).isfinite(), "of an ignored row nothing counts"
    refused(r"sample_weight has shape \(3,\); it must be \(4,\)", sample_weight=good[:3])
    refused("sample_weight has dtype torch.int64", TypeError, sample_weight=good.long())
    refused("sample_weight is list", TypeError, sample_weight=[1.0] * 4)
    for value in (-0.1, 1.1, torch.nan):
        refused(
            rf"label_smoothing\[1\] is {value}", label_smoothing=torch.tensor([0.0, value, 1.0], dtype=torch.float64)
        )
    refused(r"label_smoothing has shape \(2,\)", label_smoothing=torch.zeros(2))
    refused("label_smoothing is None", TypeError, label_smoothing=None)
    refused(r"label_scale\[2\] is inf; it must be finite", label_scale=torch.tensor([1.0, 1.0, torch.inf]))
    refused(
        r"label_scale has dtype torch.int64|label_scale has shape", (TypeError, ValueError), label_scale=good[:3].long()
    )  # type: ignore[arg-type]


def test_what_cannot_be_combined() -> None:
    z, y, q = torch.zeros(4, 3), torch.tensor([0, 1, 2, 1]), torch.full((4, 3), 1 / 3)
    arcface, sigmoid = ltk.adjustments.arcface(3)._asdict(), ltk.adjustments.class_balanced_sigmoid([3, 2, 1])._asdict()
    table = torch.full((3,), 0.5)
    for target, options, message in (
        (q, {"label_scale": table}, "label_scale is chosen by the label"),
        (q, {EPS: table}, "a table as label_smoothing is chosen by the label"),
        (y, {**arcface, "label_scale": table}, "label_scale cannot be combined with the closed form 'arcface'"),
        (y, {**sigmoid, EPS: table}, "label_smoothing is a table; it has no meaning with sigmoid"),
    ):
        with pytest.raises(ValueError, match=message):
            CE(z, target, **options)
    assert CE(z, y, **{**arcface, EPS: table}).isfinite()


# ---- the losses --------------------------------------------------------------------------------------------------------

COUNTS = [6, 3, 1]
LOGITS = torch.tensor([[1.0, 0.5, -0.5]], dtype=torch.float64)


def rows_of(loss: torch.nn.Module, logits: Tensor = LOGITS, **more: Any) -> list[float]:
    return [loss(logits, torch.tensor([y]), **more).item() for y in range(3)]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_published_numbers(backend) -> None:
    exact: dict[str, Any] = {"backend": backend, "table_dtype": torch.float64}
    near = {"rel": 0, "abs": 1e-6}
    mislas = ltk.nn.LabelAwareSmoothing(COUNTS, **exact)
    assert mislas.smoothing.tolist() == pytest.approx([0.4, 0.276336, 0.1], **near)
    assert rows_of(mislas) == pytest.approx([0.870797, 1.150187, 2.020797], **near)
    assert rows_of(ltk.nn.LOS(backend=backend))[2] == pytest.approx(1.287464, **near)
    ala = ltk.nn.ALA(COUNTS, **exact)
    assert (2 * ala.margin).tolist() == pytest.approx([0.513898, 0.721348, 1.442695], **near)
    cosines = torch.tensor([[0.8, 0.5, 0.2]], dtype=torch.float64)
    assert rows_of(ala, cosines) == pytest.approx([0.000577, 14.410107, 35.312464], **near)
    influence = ltk.nn.InfluenceBalanced(COUNTS, **exact)
    features = torch.tensor([[0.5, -1.5]], dtype=torch.float64)
    assert influence.weight.tolist() == pytest.approx([1 / 3, 2 / 3, 2.0])
    loss = influence(LOGITS, torch.tensor([2]), features=features).item() / 2.0
    assert loss == pytest.approx(598.922510, **near)
    assert loss / F.cross_entropy(LOGITS, torch.tensor([2])).item() == pytest.approx(284.641319, **near)


def test_shapes_of_label_aware_smoothing() -> None:
    def built(**options: Any) -> list[float]:
        return ltk.adjustments.label_aware_smoothing(
            COUNTS, 0.4, 0.1, table_dtype=torch.float64, **options
        ).label_smoothing.tolist()

    assert built(shape="linear") == pytest.approx([0.4, 0.22, 0.1])
    assert built(shape="convex") == pytest.approx([0.4, 0.1 + 0.3 * (1 - math.cos(0.2 * math.pi)), 0.1])
    assert built(shape="exp", power=3.0) == pytest.approx([0.4, 0.1 + 0.3 * 0.064, 0.1])
    balanced = ltk.adjustments.label_aware_smoothing([5, 5, 5]).label_smoothing
    assert torch.allclose(balanced, torch.full((3,), 0.4)), "no division by 0"
    # eps / (C - 1) on the others alone is eps C / (C - 1) on all.
    eps = 1.5 * ltk.adjustments.label_aware_smoothing(COUNTS, table_dtype=torch.float64).label_smoothing
    others = CE(LOGITS.expand(3, 3), torch.arange(3), label_smoothing=eps, reduction="none")
    assert others.tolist() == pytest.approx([1.004131, 1.173214, 1.979131], abs=1e-6)
    with pytest.raises(ValueError, match="shape is 'round'; it must be one of 'concave', 'linear'"):
        built(shape="round")
    for name in ("head", "tail"):
        with pytest.raises(ValueError, match=f"{name} is 1.5"):
            ltk.nn.LabelAwareSmoothing(COUNTS, **{name: 1.5})


def test_a_smoothing_of_98_percent_in_float16() -> None:
    """Nearly all of the loss is a sum over 100 000 classes."""
    z = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0)).half()
    y = torch.tensor([5, 99_999, 7])
    loss, grad = contract.gradient(ltk.nn.LOS(reduction="sum"), z, y, upstream=1024.0)
    leaf = z.double().requires_grad_()
    wanted = F.cross_entropy(leaf, y, label_smoothing=0.98, reduction="sum")
    (slope,) = torch.autograd.grad(wanted * 1024, leaf)
    assert torch.allclose(loss.double(), wanted.detach(), rtol=1e-6)
    assert torch.allclose(grad.double(), slope, rtol=1e-3, atol=1e-7)


def test_a_loss_keeps_its_own_smoothing() -> None:
    for make in (lambda **o: ltk.nn.LOS(**o), lambda **o: ltk.nn.LabelAwareSmoothing(COUNTS, **o)):
        for given in (0.1, torch.full((3,), 0.1)):
            with pytest.raises(ValueError, match="label_smoothing is given, but .* sets the smoothing itself"):
                make(label_smoothing=given)
    table = torch.tensor([0.1, 0.2, 0.3])
    loss = ltk.nn.LDAM(COUNTS, label_smoothing=table)
    assert "smoothing" in loss.state_dict()
    assert "smoothing" in repr(loss)
    fresh = ltk.nn.LDAM(COUNTS, label_smoothing=torch.zeros(3))
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh.smoothing, table)
    z = torch.rand(2, 3)
    assert torch.equal(fresh(z, torch.tensor([0, 2])), loss(z, torch.tensor([0, 2])))
    assert loss.half().smoothing.dtype == torch.float32
    with pytest.raises(ValueError, match=r"label_smoothing has shape \(2,\); it must be \(3,\)"):
        ltk.nn.LDAM(COUNTS, label_smoothing=torch.zeros(2))
    arcface = ltk.nn.ArcFace(3, label_smoothing=table)
    assert torch.equal(
        arcface(z, torch.tensor([0, 2])),
        CE(z, torch.tensor([0, 2]), **ltk.adjustments.arcface(3)._asdict(), label_smoothing=table),
    )


# ---- influence -----------------------------------------------------------------------------------------------------------


def influence(z: Tensor, h: Tensor, y: Tensor, detach: bool) -> Tensor:
    """The formula in float64."""
    weight = torch.tensor([1 / 3, 2 / 3, 2.0], dtype=torch.float64)
    kept = (z.detach(), h.detach()) if detach else (z, h)
    apart = (torch.softmax(kept[0], 1) - F.one_hot(y, 3)).abs().sum(1)
    factor = 1000.0 / (apart * kept[1].abs().sum(1) + 1e-3)
    return (weight[y] * factor * F.cross_entropy(z, y, reduction="none")).mean()


@pytest.mark.parametrize("detach", [True, False])
def test_influence_balanced(detach) -> None:
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(7, 4, generator=generator).double(), torch.randn(3, 4, generator=generator).double()
    y = torch.arange(7) % 3
    loss = ltk.nn.InfluenceBalanced(COUNTS, detach=detach, table_dtype=torch.float64)
    found = []
    for number in range(3):
        x, head = h.clone().requires_grad_(), w.clone().requires_grad_()
        if number == 2:
            value = loss.from_features(x, head, y, chunk_rows=2 if detach else None)
        else:
            z = x @ head.t()
            value = loss(z, y, features=x) if number else influence(z, x, y, detach)
        found.append((value, *torch.autograd.grad(value, (x, head))))
    for wanted, held, chunked in zip(*found):
        assert torch.allclose(held, wanted, rtol=1e-9)
        assert torch.allclose(chunked, wanted, rtol=1e-9)


def test_influence_balanced_refuses() -> None:
    loss, z, y, h = ltk.nn.InfluenceBalanced(COUNTS), torch.zeros(4, 3), torch.tensor([0, 1, -100, 2]), torch.ones(4, 2)
    with pytest.raises(TypeError, match="needs the features"):
        loss(z, y)
    with pytest.raises(TypeError, match="target is mixed"):
        loss(z, (y, y, 0.5), features=h)
    with pytest.raises(ValueError, match=r"features has shape \(3, 2\); targets of shape \(4,\)"):
        loss(z, y, features=h[:3])
    for name in ("alpha", "eps"):
        with pytest.raises(ValueError, match=f"{name} is 0.0"):
            ltk.nn.InfluenceBalanced(COUNTS, **{name: 0.0})
    own = torch.tensor([1.0, 0.0, 5.0, 2.0])
    rows = loss(z, y, features=h, reduction="none")
    assert torch.allclose(loss(z, y, features=h, reduction="none", sample_weight=own), own * rows)
