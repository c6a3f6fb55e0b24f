"""Promise: the Triton kernels compute what the oracle says. Run by test_triton.py under TRITON_INTERPRET=1, in a process of its own.

The interpreter executes the kernels with NumPy. It truncates float32 to bfloat16 where hardware rounds to nearest even, multiplies
the bits of bfloat16 operands, and prepares its language again for each inner function: the three are put right here.
"""

from __future__ import annotations

import contract
import numpy as np
import oracle
import pytest
import torch
import triton.language as tl
from test_heads import double_logits
from torch import Tensor
from triton.runtime import interpreter

import ltkernels as ltk
from ltkernels._call import Call, Out
from ltkernels.losses import _reference, _terms
from ltkernels.triton import _autotune, _configs, adjusted_ce, compile_all, linear_adjusted_ce
from ltkernels.triton._configs import Tile

assert hasattr(interpreter.InterpretedFunction, "rewrite")
INF, NAN = torch.inf, torch.nan
DTYPES = list(oracle.TOLERANCES)
REDUCTIONS = ("none", "mean", "batch_mean", "sum")
_cast, _dot = interpreter.InterpreterBuilder.cast_impl, interpreter.InterpreterBuilder.create_dot


def _rounding_cast(self, src, dst_type):
    if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
        return _cast(self, src, dst_type)
    bits = src.data.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return interpreter.TensorHandle(np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def _float_dot(self, a, b, d, *options):
    a, b = (_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, d, *options)


_prepared: set[int] = set()


def _call(self, *args, **kwargs):
    """The launch has prepared the kernels' own `tl`; the language's library uses another module of it, once is enough."""
    namespace = self.fn.__globals__
    if namespace.get("tl") is not tl and id(namespace) not in _prepared:
        interpreter._patch_lang(self.fn)
        _prepared.add(id(namespace))
    return self.rewrite()(*args, **kwargs)


interpreter.InterpreterBuilder.create_fp_trunc = _rounding_cast
interpreter.InterpreterBuilder.create_dot = _float_dot
interpreter.InterpretedFunction.__call__ = _call
np.seterr(all="ignore")  # NaN and infinity are part of the truth table


def real_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.fixture(autouse=True)
def only_listed_kernels(monkeypatch):
    """What the launchers launch is what compile_all compiles."""
    launched = set()
    for module in (adjusted_ce, linear_adjusted_ce, *compile_all.OF_THEIR_OWN):
        launch = module._launch
        monkeypatch.setattr(module, "_launch", lambda s, *a, launch=launch: (launched.add(s), launch(s, *a)))
    yield launched
    compile_all.everything.cache_clear()  # tiles may be those of a test
    listed = set(compile_all.everything())
    assert launched <= (listed | set(_configs.every_neighbour()) if _autotune.enabled() else listed)


@pytest.fixture
def small_tiles(monkeypatch):
    """Long rows and several tiles at sizes that the interpreter can do."""
    monkeypatch.setattr(_configs, "_ROWS", (Tile(2, 16, 1),))
    for name in ("_LONG", "_LONG_F64", "_SHORT"):
        monkeypatch.setattr(_configs, name, Tile(1, 32, 1))
    monkeypatch.setattr(_configs, "_PLAIN", Tile(1, 32, 1))
    monkeypatch.setattr(_configs, "DENOMINATOR_BLOCK", 4)
    monkeypatch.setattr(_configs, "LOSS_BLOCK", 4)


def run(z, y, *, reduction="mean", upstream=None, closed=None, need_grad=True, inplace=False, **options):
    """(loss, gradient) of the entry point."""
    real = real_of(z.dtype)
    first, second, lam = y if isinstance(y, tuple) else (y, None, None)
    lam = lam if lam is None else lam.to(real)
    tables = [None if options.get(name) is None else options[name].to(real) for name in oracle.TABLES]
    gamma, smoothing = options.get("focal_gamma", 0.0), options.get("label_smoothing", 0.0)
    code = REDUCTIONS.index(reduction)
    grad = z if inplace else torch.full(z.shape, 77.0, dtype=z.dtype) if need_grad else None
    labels = (first, second, lam)
    beside = beside_of(options, real)
    loss = torch.full((len(first),) if code == 0 else (), 77.0, dtype=real)
    call = Call(
        *labels,
        *tables,
        grad_scale=upstream,
        focal_gamma=gamma,
        label_smoothing=0.0 if isinstance(smoothing, Tensor) else smoothing,
        reduction=code,
        **beside,
        **(closed or {}),
    )
    adjusted_ce.adjusted_ce(z, call, Out(loss, grad))
    return loss, grad


def beside_of(options: dict, real: torch.dtype) -> dict[str, Tensor]:
    """Sample weights, smoothing as a table and label scale, as `Call` has them."""
    names = {"sample_weight": "sample_weight", "label_scale": "label_scale", "label_smoothing": "smoothing"}
    given = {name: options[name] for name in names if isinstance(options.get(name), Tensor)}
    return {names[name]: value.to(real) for name, value in given.items()}


def tables_of(classes: int) -> dict[str, Tensor]:
    return {
        "shift": torch.linspace(-5, 0, classes),
        "scale": torch.linspace(0.5, 2, classes),
        "margin": torch.linspace(0, 2, classes),
        "row_scale": torch.linspace(0.7, 3, classes),
        "weight": torch.linspace(0.2, 3, classes),
    }


CASES = ("plain", "shift", "tables", "smoothing", "mixed", "row inputs", "table of smoothing", "all of it, mixed")


def case_of(case: str, z: Tensor, y: Tensor):
    """(logits, target, options, widening of the tolerance: see test_loss_values.py)."""
    rows, classes = z.shape
    tables = tables_of(classes)
    if case == "plain":
        return z, y, {}, 1.0
    if case == "shift":
        return z, y, {"shift": tables["shift"], "focal_gamma": 0.5}, 1.0
    if case == "tables":
        return z, y, {**tables, "focal_gamma": 2.0}, 1.0
    if case == "smoothing":
        z[2, 1 % classes] = -1.0  # a masked class has an infinite smoothed loss
        return z, y, {**tables, "label_smoothing": 0.1}, 2.0
    second = torch.arange(rows) % classes
    own = {"sample_weight": torch.linspace(0.0, 2.0, rows), "label_scale": torch.linspace(1.5, 0.5, classes)}
    if case == "row inputs":
        own["sample_weight"][y == -100] = NAN  # what an ignored row's holds counts for nothing
        return z, y, {**tables, **own, "focal_gamma": 1.5}, 1.0
    if case != "mixed":
        z[2, 1 % classes] = -1.0
        by_label = torch.linspace(0.0, 0.3, classes)
        target = y if case == "table of smoothing" else (y, second, torch.linspace(0, 1, rows))
        return z, target, {**tables, **own, "label_smoothing": by_label}, 8.0
    return z, (y, second, torch.linspace(0, 1, rows)), tables, 2.0


def check(z, y, case, reduction) -> None:
    z, target, options, cond = case_of(case, z, y)
    upstream = torch.linspace(0.5, 2.0, len(y), dtype=real_of(z.dtype)) if reduction == "none" else None
    wanted_loss, wanted, size = oracle.adjusted_cross_entropy(
        z, target, reduction=reduction, upstream=1.0 if upstream is None else upstream, **options
    )
    loss, grad = run(z, target, reduction=reduction, upstream=upstream, **options)
    oracle.assert_loss(loss, wanted_loss, size, z.dtype)
    oracle.assert_gradient(grad, wanted, size, target if isinstance(target, Tensor) else None, cond)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(dtype, case) -> None:
    """Every tail: one class, one less and more than a tile, a whole tile (16-byte accesses), the odd sizes of real data."""
    sizes = (1, 31, 32, 365) if dtype == torch.float32 else (19, 64)
    for index, classes in enumerate(sizes):
        z = contract.hostile_logits(7, classes).to(dtype)
        if classes == 1 and case == "smoothing":
            continue  # one class has loss 0: nothing for a tolerance to be relative to
        check(z, contract.labels(7, classes), case, REDUCTIONS[(index + CASES.index(case)) % 4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rows_in_several_tiles(small_tiles, dtype, case) -> None:
    """81 classes in tiles of 32: 32, 32 and 17; the first tile of one row is masked altogether."""
    z = contract.hostile_logits(7, 81).to(dtype)
    if case != "smoothing":
        z[3, :32] = -INF
    check(z, contract.labels(7, 81), case, REDUCTIONS[1 + CASES.index(case) % 3])


# ---- closed forms ----------------------------------------------------------------------------------------------------


def forms(classes: int) -> dict[str, tuple[_terms.Term, dict]]:
    counts, tail = torch.linspace(7, 0, classes), (torch.arange(classes) % 3 > 0).float()
    weight = {"weight": torch.linspace(0.5, 2, classes)}
    return {
        "seesaw": (_terms.Term("seesaw", counts, None, (0.8, 2.0, -4.6)), {**weight, "label_smoothing": 0.1}),
        "equalization": (
            _terms.Term("equalization", tail, torch.tensor([2**40 + 12345]), (0.7, 0.0, 0.0)),
            {**weight, "focal_gamma": 2.0},
        ),
        "arcface": (
            _terms.Term("arcface", None, None, (0.8775825618903728, 0.479425538604203, 0.0)),
            {**weight, "row_scale": torch.full((classes,), 16.0)},
        ),
        "arcface straight": (
            _terms.Term("arcface", None, None, (0.877, 0.48, 1.0)),
            {"row_scale": torch.full((classes,), 16.0)},
        ),
        "sigmoid": (_terms.Term("sigmoid", torch.linspace(0.1, 1, classes)), {**weight, "focal_gamma": 1.5}),
        "sigmoid plain": (_terms.Term("sigmoid"), {}),
    }


@pytest.mark.parametrize("form", forms(3))
@pytest.mark.parametrize("how", ["one tile", "several tiles", "mixed", "mixed bfloat16"])
def test_closed_forms(form, how, request) -> None:
    """Against the reference in float64, one row's gradient at a time by autograd; float64 where rows are confident, because
    autograd's P_y - 1 cancels there."""
    if how != "one tile":
        request.getfixturevalue("small_tiles")
    classes, dtype = (21, torch.float64) if how == "one tile" else (45, torch.float32)
    dtype = torch.bfloat16 if "bfloat16" in how else dtype
    term, options = forms(classes)[form]
    z = (contract.cosines if form.startswith("arcface") else contract.hostile_logits)(7, classes)
    z = z.to(dtype)
    if not form.startswith("arcface"):
        z[0, 3] -= 36.0  # autograd's cancellation again
        if "label_smoothing" in options:
            z[2, 1] = -1.0
    y = contract.labels(7, classes)
    target = (y, torch.arange(7) * 5 % classes, torch.linspace(0.1, 0.9, 7)) if "mixed" in how else y
    first, second, lam = target if isinstance(target, tuple) else (target, None, None)
    double = [None if options.get(name) is None else options[name].double() for name in oracle.TABLES]
    leaf = z.double().requires_grad_()
    closed = {"seed": term.seed, "form": _terms.FORMS.index(term.form), "form_options": tuple(term.options)}
    call = Call(
        first, second, None if lam is None else lam.double(), *double, None if term.table is None else term.table.double(),
        focal_gamma=options.get("focal_gamma", 0.0), label_smoothing=options.get("label_smoothing", 0.0), reduction=0, **closed,
    )  # fmt: skip
    wanted_loss = _reference.adjusted_cross_entropy(leaf, call)
    upstream = torch.linspace(0.5, 2.0, 7, dtype=real_of(dtype))
    (wanted,) = torch.autograd.grad(wanted_loss, leaf, upstream.double())
    table = None if term.table is None else term.table.to(real_of(dtype))
    loss, grad = run(
        z,
        target,
        reduction="none",
        upstream=upstream,
        closed={**closed, "table": table},
        saved=how == "saved statistics",
        **options,
    )
    size = torch.where(z.isfinite(), z, 0).abs().amax(dim=1).double() * (16 if "arcface" in form else 3) + 8
    oracle.assert_loss(loss, wanted_loss.detach(), size, dtype)
    oracle.assert_gradient(grad, wanted, size, y, cond=4.0 if "mixed" in how or "label_smoothing" in options else 1.0)


# ---- truth table -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["registers", "tiles"])
def either_kernel(request):
    if request.param == "tiles":
        request.getfixturevalue("small_tiles")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(either_kernel, dtype) -> None:
    z = torch.randn(9, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.ones(9, dtype=torch.int64)
    z[0] = -INF
    z[1, 1] = -INF
    z[2, 0] = -INF
    z[3, 0], z[4, 1], z[5, 39] = INF, NAN, INF
    z[6], y[6] = NAN, -100
    y[7] = 2**40
    loss, grad = run(z, y, reduction="none")
    assert loss.isnan().tolist() == [True, False, False, True, True, True, False, True, False]
    assert grad.isnan().all(dim=1).tolist() == [True, False, False, True, True, True, False, True, False]
    assert loss[1] == INF
    assert grad[1, 1] == -1.0
    assert grad[1, 0] > 0
    assert loss[2].isfinite()
    assert grad[2, 0] == 0
    assert grad[2].isfinite().all()
    assert loss[6] == 0
    assert not grad[6].any()
    wanted_loss, wanted, size = oracle.adjusted_cross_entropy(z[8:], y[8:], reduction="none")
    oracle.assert_loss(loss[8:], wanted_loss, size, dtype)
    oracle.assert_gradient(grad[8:], wanted, size, y[8:])


@pytest.mark.parametrize("bad", [-1, 40, 2**31 + 1, -(2**62)])
def test_labels_out_of_range(either_kernel, bad) -> None:
    """The row is NaN and so is the reduced loss; the others' gradients stay; nothing outside is read (it would crash)."""
    z, y = torch.randn(3, 40), torch.tensor([0, bad, 2])
    weight = torch.rand(40) + 0.5
    for target in (y, (torch.zeros(3, dtype=torch.int64), y, torch.full((3,), 0.5))):
        loss, grad = run(z, target, weight=weight)
        assert loss.isnan()
        assert grad[1].isnan().all()
        assert grad[[0, 2]].isfinite().all()
        assert grad[[0, 2]].abs().amax() > 0


def test_all_rows_ignored_and_empty_batches(either_kernel) -> None:
    z, y = torch.randn(5, 20), torch.full((5,), -100)
    for reduction, wanted in (("mean", NAN), ("batch_mean", NAN), ("sum", 0.0)):
        loss, grad = run(z, y, reduction=reduction)
        assert torch.equal(loss.nan_to_num(7.0), torch.tensor(wanted).nan_to_num(7.0))
        assert torch.equal(grad, torch.zeros_like(z))
        loss, grad = run(z[:0], y[:0], reduction=reduction)
        assert torch.equal(loss.nan_to_num(7.0), torch.tensor(wanted).nan_to_num(7.0))
        assert grad.shape == (0, 20)
    assert run(z[:0], y[:0], reduction="none")[0].shape == (0,)


def test_one_class_and_one_row(either_kernel) -> None:
    loss, grad = run(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64))
    assert loss == 0
    assert not grad.any()
    check(contract.hostile_logits(7, 40).float()[:1], contract.labels(7, 40)[:1], "plain", "mean")


def test_layouts(either_kernel) -> None:
    """Rows with a stride, an odd offset, and a gradient in place of the logits; the memory around is not touched."""
    dtype = torch.bfloat16
    z, y = contract.hostile_logits(7, 48).to(dtype), contract.labels(7, 48)
    loss, grad = run(z, y)
    for left, right in ((0, 0), (0, 16), (3, 2)):  # the second keeps 16-byte accesses, the third has odd rows
        memory = torch.full((7, left + 48 + right), 5.0, dtype=dtype)
        view = memory[:, left : left + 48]
        view.copy_(z)
        other, other_grad = run(view, y)
        assert torch.equal(other, loss)
        assert torch.equal(other_grad, grad)
        other, _ = run(view, y, inplace=True)
        assert torch.equal(other, loss)
        assert torch.equal(view, grad)
        assert (memory[:, :left] == 5).all()
        assert (memory[:, left + 48 :] == 5).all()


def test_loss_alone(either_kernel) -> None:
    z, y = contract.hostile_logits(7, 40).double(), contract.labels(7, 40)
    for options in ({}, tables_of(40)):
        assert torch.allclose(run(z, y, need_grad=False, **options)[0], run(z, y, **options)[0], rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_gradient(dtype) -> None:
    grad = torch.randn(3, 2500).to(dtype)
    for view in (grad.clone(), grad.clone()[:, 1:2400]):
        before = view.clone()
        one, factor = (torch.tensor(value, dtype=real_of(dtype)) for value in (1.0, 0.3))
        adjusted_ce.scale_gradient(view, one)
        assert torch.equal(view, before)
        adjusted_ce.scale_gradient(view, factor)
        assert torch.equal(view, (before.to(real_of(dtype)) * factor).to(dtype))
        after = view.clone()
        adjusted_ce.scale_gradient(view, factor, factor)
        assert torch.equal(view, after)
        adjusted_ce.scale_gradient(view, 4 * factor, factor)
        assert torch.equal(view, (after.to(real_of(dtype)) * 4).to(dtype))


def test_one_factor_for_all_rows(either_kernel) -> None:
    """An announced upstream gradient: one number that every row reads."""
    z, y = torch.randn(5, 40), torch.tensor([3, 0, -100, 39, 7])
    one, other = run(z, y)[1], run(z, y, upstream=torch.tensor(8.0).expand(5))[1]
    assert one.abs().max() > 0
    assert torch.equal(other, 8 * one)


def test_one_launch_more_for_each_sum(only_listed_kernels) -> None:
    for reduction, launches in (("none", 1), ("sum", 2), ("mean", 3)):
        only_listed_kernels.clear()
        run(torch.randn(5, 20), torch.zeros(5, dtype=torch.int64), reduction=reduction)
        assert len(only_listed_kernels) == launches


# ---- the head --------------------------------------------------------------------------------------------------------

# What one product rounds: nothing, or the logits' gradient to bfloat16; TF32's 2^-11 for float16 is not interpreted.
OPERAND = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 0.0}
ROWS, WIDTH, CLASSES = 17, 19, 21  # a tile and a tail each
WANT_ALL = (True, True, True)


@pytest.fixture
def small_linear_tiles(monkeypatch):
    for dtype, (*_, warps, stages) in _configs._LINEAR.items():
        monkeypatch.setitem(_configs._LINEAR, dtype, (16, 16, 16, warps, stages))
    monkeypatch.setattr(_configs, "COMBINE_ROWS", 16)
    monkeypatch.setattr(_configs, "NORM_BLOCK", 16)
    monkeypatch.setattr(_configs, "PARTS_BLOCK", 16)


def head_inputs(dtype, width=WIDTH):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(ROWS, width, generator=generator) * torch.logspace(-1, 0.5, ROWS)[:, None]
    weight = torch.randn(CLASSES, width, generator=generator) * torch.logspace(-1, 0.3, CLASSES)[:, None]
    return [x.to(dtype) for x in (features, weight, torch.randn(CLASSES, generator=generator))]


def run_head(given, target, normalize, reduction, upstream, wants=WANT_ALL, **options):
    real = real_of(given[0].dtype)
    first, second, lam = target if isinstance(target, tuple) else (target, None, None)
    tables = [None if options.get(name) is None else options[name].to(real) for name in oracle.TABLES]
    call = Call(
        first, second, None if lam is None else lam.to(real), *tables, grad_scale=upstream,
        focal_gamma=options.get("focal_gamma", 0.0), reduction=REDUCTIONS.index(reduction), **beside_of(options, real),
        label_smoothing=0.0 if isinstance(options.get("label_smoothing"), Tensor) else options.get("label_smoothing", 0.0),
    )  # fmt: skip
    return linear_adjusted_ce.linear_adjusted_ce(*given, call, normalize, wants)


def check_head(dtype, case, normalize, reduction, width=WIDTH) -> None:
    given = head_inputs(dtype, width)
    y = contract.labels(ROWS, CLASSES)
    _, target, options, _ = case_of(case, torch.zeros(ROWS, CLASSES), y)
    upstream = torch.linspace(0.5, 2, ROWS, dtype=real_of(dtype)) if reduction == "none" else None
    leaves = [value.double().requires_grad_() for value in given]
    z = double_logits(*leaves, normalize)
    wanted_loss, dz, size = oracle.adjusted_cross_entropy(
        z, target, reduction=reduction, upstream=1.0 if upstream is None else upstream, **options
    )
    wanted = torch.autograd.grad(z, leaves, dz)
    x, w, _ = (value.detach() for value in leaves)
    by_x, by_w = (1 / v.norm(dim=1, keepdim=True) if normalize else torch.ones(len(v), 1) for v in (x, w))
    # The largest sum of magnitudes that an entry's row consists of: what rounding errors are proportional to.
    bounds = (
        by_x * (dz.abs() @ (by_w * w).abs()).amax(dim=1, keepdim=True),
        by_w * (dz.abs().t() @ (by_x * x).abs()).amax(dim=1, keepdim=True),
        dz.abs().sum(dim=0),
    )
    loss, *grads = run_head(given, target, normalize, reduction, upstream, **options)
    oracle.assert_loss(loss, wanted_loss, 4 * size + 8, dtype)
    epsilon, factor, *_ = oracle.TOLERANCES[real_of(dtype)]
    for name, got, exact, bound in zip(("features", "weight", "bias"), grads, wanted, bounds):
        rounded = 0.0 if name == "bias" else OPERAND[dtype]
        allowed = (2 * factor * epsilon * (8 + 2 * size.max()) + rounded) * bound + 1e-300

        def fits(candidate, exact=exact, allowed=allowed) -> bool:
            return bool(((candidate - exact).abs() <= allowed).all())

        half = exact.clone()
        half[len(half) // 2 :] = 0
        for wrong in (torch.zeros_like(exact), 2 * exact, half):
            assert not fits(wrong), f"{name}: the tolerance would accept a wrong gradient"
        assert got.dtype == real_of(dtype)
        assert fits(got.double()), f"{name}: {float(((got - exact).abs() / allowed).max())} times the tolerance"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_head(small_linear_tiles, dtype, normalize) -> None:
    check_head(dtype, "tables", normalize, "mean")
    check_head(dtype, "plain", normalize, "none", width=32)  # 16-byte accesses


@pytest.mark.parametrize("case", ["smoothing", "mixed", "row inputs", "table of smoothing", "all of it, mixed"])
def test_head_smoothing_and_mixed(small_linear_tiles, case) -> None:
    check_head(torch.float64, case, True, "batch_mean")


def test_head_wants_only_what_is_wanted(small_linear_tiles) -> None:
    given, y = head_inputs(torch.float64), contract.labels(ROWS, CLASSES)
    whole = run_head(given, y, True, "mean", None)
    for wants in ((False, False, False), (True, False, False), (False, True, False), (False, False, True)):
        part = run_head(given, y, True, "mean", None, wants)
        assert torch.equal(part[0], whole[0])
        for got, all_of_it, want in zip(part[1:], whole[1:], wants):
            assert torch.equal(got, all_of_it) if want else got.numel() == 0


def test_head_special_values(small_linear_tiles) -> None:
    """A zero vector, ignored rows that hold NaN, a label out of range, an empty batch."""
    features, weight, bias = head_inputs(torch.float32)
    y = contract.labels(ROWS, CLASSES)
    features[3] = 0
    features[ROWS - 2] = NAN
    loss, *grads = run_head((features, weight, None), y, True, "mean", None, (True, True, False))
    keep = y != -100
    leaves = [features[keep].double().requires_grad_(), weight.double().requires_grad_()]
    z = torch.nn.functional.normalize(leaves[0]) @ torch.nn.functional.normalize(leaves[1]).t()
    truth = torch.nn.functional.cross_entropy(z, y[keep])
    truth.backward()
    assert torch.allclose(loss.double(), truth, rtol=1e-6)
    assert not grads[0][~keep].any()
    assert torch.allclose(grads[0][keep].double(), leaves[0].grad, rtol=1e-4, atol=1e-6)
    assert leaves[1].grad.abs().max() > 1e-2
    assert torch.allclose(grads[1].double(), leaves[1].grad, rtol=1e-4, atol=1e-6)
    y[0] = 2**40
    loss, *grads = run_head((features, weight, bias), y, False, "sum", None)
    assert loss.isnan()
    assert grads[0][0].isnan().all()
    assert grads[0][1].isfinite().all()
    loss, *grads = run_head((features[:0], weight, bias), y[:0], False, "mean", None)
    assert loss.isnan()
    assert not grads[1].any()
    assert not grads[2].any()


def test_head_steps_over_several_tiles(small_linear_tiles, monkeypatch) -> None:
    """One program for all tiles of an owner, and one a tile: the parts are added in their order."""
    for most in (1, 8):
        monkeypatch.setattr(linear_adjusted_ce, "_MOST_PARTS", most)
        check_head(torch.float32, "tables", False, "sum")


def test_spills_and_shared_memory_are_reported() -> None:
    from ltkernels.triton import compile_all

    good = compile_all.Usage(128, 0, 1 << 16)
    assert compile_all.problem(good, 90) == ""
    assert "spills 64 bytes" in compile_all.problem(good._replace(spilled=64), 90)
    assert "shared memory" in compile_all.problem(good._replace(shared=200 << 10), 80)
    assert compile_all.problem(good._replace(shared=200 << 10), 90) == ""
    assert "16-byte" in compile_all.problem(good._replace(narrow=True), 90)


def test_the_list_is_short_enough_for_ci() -> None:
    """1 848 of them were compiled by nobody."""
    assert len([*_configs.every(), *_configs.every_linear()]) <= 180


# ---- autotuning ------------------------------------------------------------------------------------------------------


def test_autotuning_changes_the_tile_and_nothing_else(monkeypatch, only_listed_kernels) -> None:
    z, y = contract.hostile_logits(40, 100).float(), contract.labels(40, 100)
    options = {**tables_of(100), "focal_gamma": 2.0}
    expected = run(z, y, **options)
    listed = _configs.rows(torch.float32, 100, True, False)
    assert listed in only_listed_kernels
    timed = []

    def seconds(tried, listed, device, launch) -> float:
        launch(tried)
        timed.append(tried)
        return -len(timed)  # the last is the fastest

    monkeypatch.setattr(_autotune, "_found", {})
    monkeypatch.setattr(_autotune, "_seconds", seconds)
    run(z, y, **options)
    assert timed == []
    assert "timed" not in ltk.explain(ltk.functional.adjusted_cross_entropy, z, y, backend="triton").reason
    monkeypatch.setenv(_autotune.VARIABLE, "1")
    run(z.clone(), y, inplace=True, **options)
    assert timed == []  # a second run would read gradients
    only_listed_kernels.clear()
    found = run(z, y, **options)
    assert timed == list(_configs.alternatives(listed))
    assert timed[0] == listed
    assert len({(each.rows, each.warps) for each in timed}) == len(timed) >= 4
    only_listed_kernels.clear()
    again = run(z, y, **options)
    assert timed[-1] in only_listed_kernels
    assert listed not in only_listed_kernels
    inplace = z.clone()
    run(inplace, y, inplace=True, **options)
    for loss, grad in (found, again):
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad, expected[1])
    assert torch.equal(inplace, expected[1])
    assert len(timed) == len(_configs.alternatives(listed))
    assert "timed" in ltk.explain(ltk.functional.adjusted_cross_entropy, z, y, backend="triton").reason


def test_a_tile_that_cannot_be_launched_is_not_chosen(monkeypatch) -> None:
    listed = _configs.rows(torch.float32, 100, True, False)
    monkeypatch.setattr(_autotune, "_found", {})

    def launch(each) -> None:
        if each != listed:
            raise RuntimeError("out of resources")

    assert _autotune.choose(listed, torch.device("cpu"), 9, True, launch) == listed
    with pytest.raises(RuntimeError, match="out of resources"):
        _autotune.choose(_configs.rows(torch.float32, 100, True, True), torch.device("cpu"), 9, True, launch)


# ---- the public functions, on their way here -------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["logit_adjusted", "kps_ga", "seesaw", "cb_focal"])
def test_public_losses(name: str, reduction: str) -> None:
    counts = [40, 3, 11, 7, 2, 19, 5]
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(5, 7, generator=generator), torch.tensor([0, 6, -100, 3, 2])
    results = []
    for backend in ("cpu", "triton"):
        leaf = z.clone().requires_grad_()
        loss = ltk.LOSSES[name].make(counts, reduction=reduction, backend=backend).eval()(leaf, y)
        upstream = torch.full_like(loss, 0.4)
        loss.backward(upstream, retain_graph=True)
        loss.backward(upstream)  # the first has given its gradient away
        results.append((loss.detach(), leaf.grad))
    assert results[0][1].abs().max() > 0
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    says = ltk.explain(ltk.functional.adjusted_cross_entropy, z, y, backend="triton")
    assert says.backend == "triton"


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["ldam", "arcface"])
def test_public_head(name: str, normalize: bool) -> None:
    """In chunks, and as it comes without `chunk_rows`: in tiles, but for the closed form."""
    counts = [40, 3, 11, 7, 2, 19, 5]
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(6, 4, generator=generator) * 0.2, torch.randn(7, 4, generator=generator)
    y = torch.tensor([0, 6, -100, 3, 2, 5])
    results = []
    for backend, chunk_rows in (("cpu", 4), ("triton", 4), ("triton", None)):
        leaves = [features.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = ltk.LOSSES[name].make(counts, backend=backend)
        value = loss.from_features(*leaves, y, normalize=normalize, chunk_rows=chunk_rows)
        value.backward(torch.tensor(0.4))
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for ours, chunked, tiled in zip(*results):
        assert ours.abs().max() > 0
        torch.testing.assert_close(chunked, ours, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(tiled, ours, rtol=1e-4, atol=1e-6)
