"""What the CUDA kernels promise, as functions of a device: ``cpu`` under the host emulation, ``cuda`` on a GPU.

Every case calls `ltkernels._backends.cuda` and compares with the float64 oracle on the CPU.
"""

from __future__ import annotations

import functools
import math

import oracle
import pytest
import torch
from torch import Tensor

from ltkernels import _checks
from ltkernels._backends import cuda as _cuda
from ltkernels._backends import weighing_rows
from ltkernels._call import Call, Out
from ltkernels._checks import REDUCTIONS, real_dtype
from ltkernels._fused import Request
from ltkernels.losses import _reference, _soft, _terms

DTYPES = list(oracle.TOLERANCES)
PATHS = ("registers", "cluster", "memory")


def hostile_logits(rows: int, classes: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    """Ordinary, confident, shifted and masked rows, as in tests/test_loss_values.py."""
    z = torch.randn(rows, classes, generator=torch.Generator().manual_seed(classes), dtype=torch.float64) * scale
    z[0, classes // 2] += 40.0
    if rows > 1:
        z[1] += 300.0
    if rows > 2 and classes > 2:
        z[2, 1] = -torch.inf
    return z.to(dtype)


def labels_of(rows: int, classes: int) -> Tensor:
    y = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(rows))
    y[0] = classes // 2
    if rows > 2:
        y[2] = 0
        y[rows - 2] = -100
    return y


def tables_of(classes: int, dtype: torch.dtype, *names: str) -> dict[str, Tensor]:
    """Per-class tables of ordinary size; the first entry of a shift stays finite, and every third label is not smoothed."""
    generator = torch.Generator().manual_seed(classes)
    ranges = {
        "shift": (-4, 4),
        "scale": (0.5, 1),
        "margin": (0, 1),
        "row_scale": (0.5, 1),
        "weight": (0.5, 1.5),
        "label_scale": (0.5, 1),
        "label_smoothing": (0, 0.9),
    }
    found = {
        name: (torch.rand(classes, generator=generator) * ranges[name][1] + ranges[name][0]).to(real_dtype(dtype))
        for name in names
    }
    if "label_smoothing" in found:
        found["label_smoothing"][::3] = 0.0
    return found


def closed_fields(term: _terms.Term | None, there=lambda tensor: tensor) -> dict:
    """A closed form as fields of `Call`."""
    if term is None:
        return {}
    options = tuple(map(float, term.options))
    return {
        "table": there(term.table),
        "seed": there(term.seed),
        "form": _terms.FORMS.index(term.form),
        "form_options": options,
    }


def smoothing_fields(label_smoothing: float | Tensor, there=lambda tensor: tensor) -> dict:
    """Label smoothing as fields of `Call`: a number for all labels, or a table."""
    if isinstance(label_smoothing, Tensor):
        return {"smoothing": there(label_smoothing)}
    return {"label_smoothing": label_smoothing}


def call(
    device: str,
    z: Tensor,
    y: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    path: str = "any",
    reduction: str = "mean",
    row_coef: Tensor | None = None,
    term: _terms.Term | None = None,
    need_grad: bool = True,
    inplace: bool = False,
    grad: Tensor | None = None,
    ignore_index: int = -100,
    focal_gamma: float = 0.0,
    label_smoothing: float | Tensor = 0.0,
    label_scale: Tensor | None = None,
    sample_weight: Tensor | None = None,
    **tables: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """(loss, gradient) on the CPU; `z` may be a view with any row stride and stays where it is."""
    real = real_dtype(z.dtype)

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    first, second, lam = y if isinstance(y, tuple) else (y, None, None)
    rows = z.shape[0]
    # The sentinels say whether everything was written, and nothing behind it.
    loss = torch.full((rows + 1,) if reduction == "none" else (2,), -7.0, dtype=real, device=device)
    if inplace:
        grad = z
    elif need_grad and grad is None:
        grad = torch.full((rows + 1, z.shape[1]), -7.0, dtype=z.dtype, device=device)[:rows]
    record = Call(
        there(first),
        there(second),
        None if lam is None else there(lam.to(real).expand(rows).contiguous()),
        **{name: there(tables.get(name)) for name in oracle.TABLES},
        grad_scale=None if row_coef is None else there(row_coef.to(real)),
        sample_weight=there(sample_weight),
        label_scale=there(label_scale),
        focal_gamma=focal_gamma,
        ignore_index=ignore_index,
        reduction=REDUCTIONS.index(reduction),
        **smoothing_fields(label_smoothing, there),
        **closed_fields(term, there),
    )
    kernel = weighing_rows(functools.partial(_cuda.adjusted_ce, path=path))
    kernel(z, record, Out(loss[:-1] if reduction == "none" else loss[0], grad))
    assert loss[-1] == -7.0, "a loss too many was written"
    loss = loss[:-1] if reduction == "none" else loss[0]
    return loss.cpu(), None if grad is None else grad.cpu()


def check(
    device: str, z: Tensor, y, *, path: str = "any", reduction: str = "mean", cond: float = 1.0, **options
) -> None:
    """Loss and gradient against the oracle, with another upstream gradient for each row."""
    row_coef = torch.linspace(0.5, 2.0, z.shape[0], dtype=torch.float64).to(real_dtype(z.dtype))
    loss, grad = call(device, z.to(device), y, path=path, reduction=reduction, row_coef=row_coef, **options)
    expected_loss, expected, size = oracle.adjusted_cross_entropy(
        z, y, reduction=reduction, upstream=row_coef, **options
    )
    oracle.assert_loss(loss, expected_loss, size, z.dtype)
    assert grad.dtype == z.dtype
    oracle.assert_gradient(grad, expected, size, y if isinstance(y, Tensor) else None, cond)
    only, _ = call(device, z.to(device), y, path=path, reduction=reduction, need_grad=False, **options)
    assert torch.equal(only.nan_to_num(nan=-1.0), loss.nan_to_num(nan=-1.0)), "forward alone gives another loss"


def check_term(
    device: str, z: Tensor, y, term: _terms.Term, *, path: str = "any", reduction: str = "mean", **options
) -> None:
    """A closed form against the plain reference in float64 and its autograd."""
    exact = z.detach().cpu().double().requires_grad_()
    double = term._replace(table=None if term.table is None else term.table.double())
    first, second, lam = y if isinstance(y, tuple) else (y, None, None)
    tables = {n: options[n].double() for n in oracle.TABLES if options.get(n) is not None}
    lam = None if lam is None else lam.double().expand(len(first))
    smoothing = options.get("label_smoothing", 0.0)
    own = options.get("sample_weight")
    record = Call(
        first, second, lam, **tables, sample_weight=None if own is None else own.double(),
        focal_gamma=options.get("focal_gamma", 0.0), reduction=REDUCTIONS.index(reduction),
        **smoothing_fields(smoothing.double() if isinstance(smoothing, Tensor) else smoothing), **closed_fields(double),
    )  # fmt: skip
    expected_loss = _reference.adjusted_cross_entropy(exact, record)
    row_coef = torch.linspace(0.5, 2.0, len(first), dtype=torch.float64).to(real_dtype(z.dtype))
    expected_loss.sum().backward()
    loss, grad = call(device, z.to(device), y, path=path, reduction=reduction, term=term, row_coef=row_coef, **options)
    size = exact.detach().nan_to_num(neginf=0.0).abs().amax(1)
    if term.form == "seesaw":  # its term is as large as the log counts and the log probabilities
        size = 4 * size + 2 * term.table.abs().max() + 10
    if (
        term.form == "vmf"
    ):  # differences of numbers up to 1 / tau, and of logarithms as large; the slope has roundings of its own
        size = 4 * size + 4 / term.options[1]
    if options.get("row_scale") is not None:
        size = size * options["row_scale"].max()
    oracle.assert_loss(loss, expected_loss.detach(), size, z.dtype)
    # Mixed labels and smoothing subtract; so does 1 - c^2 of ArcFace next to 1.
    cond = 2.0 if second is not None or _checks.smooths(smoothing) or term.form == "arcface" else 1.0
    oracle.assert_gradient(grad, exact.grad * row_coef.double()[:, None], size, None, cond)


# What the label chooses beside the five tables: alone, in the company that its code meets, and all at once.
BY_LABEL = {
    "kappa": ("label_scale",),
    "kappa, tables": ("label_scale", "scale", "shift", "margin"),
    "eps": ("label_smoothing",),
    "eps, weight": ("label_smoothing", "weight", "scale"),
    "all": ("label_scale", "label_smoothing", *oracle.TABLES),
}


def check_by_label(
    device: str, dtype: torch.dtype, names: tuple[str, ...], path: str, reduction: str, classes: int
) -> None:
    """A label scale and a table of label smoothing, of plain and mixed labels, beside sample weights and a focal factor."""
    z, y = hostile_logits(9, classes, dtype), labels_of(9, classes)
    real = real_dtype(dtype)
    options = {**tables_of(classes, dtype, *names), "path": path, "reduction": reduction}
    smooth = "label_smoothing" in names
    if smooth:
        z[2, 1] = -1.0  # a masked class has an infinite smoothed loss: `check_smoothing_of_masked_classes`
    own = torch.linspace(0.5, 2.0, 9, dtype=real)
    own[-3] = 0.0
    # Smoothing subtracts two numbers of one size, and so do two labels at each other's place.
    check(device, z, y, cond=2.0 if smooth else 1.0, **options)
    check(device, z, y, cond=2.0 if smooth else 1.0, sample_weight=own, focal_gamma=1.5, **options)
    mixed = (y, torch.arange(9) % classes, torch.linspace(0, 1, 9, dtype=real))
    check(device, z, mixed, cond=2.0, **options)
    check(device, z, mixed, cond=2.0, sample_weight=own, **options)


def check_smoothing_of_masked_classes(device: str, dtype: torch.dtype, path: str) -> None:
    """A class of -inf makes the loss of a smoothed label infinite, and that of one that is not smoothed counts without it."""
    z, y = torch.zeros(2, 40, dtype=dtype), torch.tensor([0, 1])
    z[:, 7] = -torch.inf
    eps = torch.zeros(40, dtype=real_dtype(dtype))
    eps[1] = 0.5
    loss, grad = call(device, z.to(device), y, path=path, label_smoothing=eps, reduction="none")
    assert loss[0].item() == pytest.approx(math.log(39), rel=1e-5)
    assert grad[0].isfinite().all()
    assert loss[1] == torch.inf


def vmf_term(classes: int, dtype: torch.dtype, features: int = 64, tau: float = 0.1) -> _terms.Term:
    """The von Mises-Fisher form as a checked call has it, a class without a direction among the classes."""
    kappa = torch.rand(classes, generator=torch.Generator().manual_seed(classes), dtype=torch.float64) ** 3 * 1e3
    kappa[0] = 0.0
    table = _terms.vmf_constants(kappa, features).reshape(-1).to(real_dtype(dtype))
    return _terms.Term("vmf", table, None, (features, tau, 0.0))


def check_vmf(device: str, dtype: torch.dtype, path: str, classes: int, rows: int = 9) -> None:
    """Every reduction; shift, weight, focal factor, smoothing by a number and by label, sample weights."""
    generator = torch.Generator().manual_seed(classes)
    z = (torch.rand(rows, classes, generator=generator) * 2 - 1).to(dtype)
    y, term = labels_of(rows, classes), vmf_term(classes, dtype)
    tables = tables_of(classes, dtype, "shift", "weight")
    own = torch.linspace(0.5, 2.0, rows, dtype=real_dtype(dtype))
    for reduction in REDUCTIONS:
        check_term(device, z, y, term, path=path, reduction=reduction)
        check_term(device, z, y, term, path=path, reduction=reduction, sample_weight=own, **tables)
    for eps in (0.1, tables_of(classes, dtype, "label_smoothing")["label_smoothing"]):
        check_term(device, z, y, term, path=path, label_smoothing=eps)
        check_term(device, z, y, term, path=path, label_smoothing=eps, focal_gamma=1.5, **tables)


def check_vmf_layouts(device: str, dtype: torch.dtype) -> None:
    """Offsets, strides, the gradient in the cosines' place, ignored rows, bad labels, NaN."""
    classes, rows = 45, 5
    options = {**tables_of(classes, dtype, "shift", "weight"), "term": vmf_term(classes, dtype), "label_smoothing": 0.1}
    base = (torch.rand(rows, classes, generator=torch.Generator().manual_seed(2)) * 2 - 1).to(dtype)
    base[3, 4] = torch.nan
    y = torch.tensor([44, 0, -100, 7, 45])
    loss, grad = call(device, base.to(device), y, reduction="none", **options)
    assert loss.isnan().tolist() == [False, False, False, True, True]
    assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == [False, False, False, True, True]
    assert loss[2] == 0
    assert not grad[2].any()
    for offset in range(16 // dtype.itemsize + 1):
        for stride in (classes, classes + 1):
            there = torch.full((offset + rows * stride + 64,), -7.0, dtype=dtype, device=device)
            view = there[offset : offset + rows * stride].view(rows, stride)[:, :classes]
            view.copy_(base)
            again, got = call(device, view, y, reduction="none", **options)
            # Another alignment adds the row up in another order.
            torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6, equal_nan=True)
            near = 2 * oracle.TOLERANCES[dtype][2] + 1e-5
            torch.testing.assert_close(got, grad, rtol=near, atol=1e-5, equal_nan=True)
            _, replaced = call(device, view, y, reduction="none", inplace=True, **options)
            assert torch.equal(replaced.nan_to_num(nan=9.0), got.nan_to_num(nan=9.0))
            view.fill_(-7.0)
            assert (there == -7.0).all(), "something beside the rows was written"


def check_soft_targets(device: str, dtype: torch.dtype, classes: int, temperature: float) -> None:
    """Probabilities (temperature 0), or a teacher's logits, with rows that have upstream gradients of their own, against the reference."""
    generator = torch.Generator().manual_seed(classes)
    z, y = ((torch.randn(5, classes, generator=generator) * 3).to(dtype) for _ in range(2))
    real = real_dtype(dtype)
    own, upstream = torch.linspace(0.5, 2, 5, dtype=real), torch.linspace(2, 1, 5, dtype=real)
    tables = tables_of(classes, dtype, "shift", "scale", "weight")
    weight = None if temperature else tables["weight"]
    target = y if temperature else y.to(real).abs()
    inputs = (z, target, tables["shift"], tables["scale"], weight, own)
    soft = _soft.SoftTargets(0.0 if temperature else 0.1, 1.5, temperature, REDUCTIONS.index("none"), "cuda")
    exact = [None if each is None else each.double() for each in inputs]
    exact[0].requires_grad_()
    (wanted,) = _soft.reference(tuple(exact), soft)
    wanted.backward(upstream.double())
    there = tuple(None if each is None else each.to(device) for each in inputs)
    request = Request((True, *(False,) * 5), (upstream.to(device),))
    (loss,), (grad, *_) = _cuda.soft_targets(there, soft, request)
    near = 1e-11 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(loss.cpu().double(), wanted.detach(), rtol=near, atol=near)
    slopes = exact[0].grad
    torch.testing.assert_close(grad.cpu().double(), slopes, rtol=near, atol=near * float(slopes.abs().max()))


def check_special_rows(device: str, dtype: torch.dtype, classes: int, path: str) -> None:
    """The truth table: all -inf, -inf at the label, -inf elsewhere, +inf, NaN, bad labels, ignored rows; each beside a good row."""
    inf, nan = math.inf, math.nan
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(10, classes, generator=generator).to(dtype)
    y = torch.full((10,), 1)
    z[0] = -inf
    z[1, 1] = -inf
    z[2, 0] = -inf
    z[3, classes - 1] = inf
    z[4, 1] = inf
    z[5, 0] = nan
    y[6], y[7] = classes, -(2**62)
    y[8], z[8] = -100, nan
    loss, grad = call(device, z.to(device), y, reduction="none", path=path)
    assert loss[[0, 3, 4, 5, 6, 7]].isnan().all()
    assert grad[[0, 3, 4, 5, 6, 7]].isnan().all()
    assert loss[1] == inf
    assert grad[1, 1] == -1.0
    rest = [k for k in range(classes) if k != 1]
    expected = torch.softmax(z[1, rest].double(), 0)
    assert torch.allclose(grad[1, rest].double(), expected, rtol=1e-2)
    assert loss[2].isfinite()
    assert grad[2, 0] == 0.0
    assert grad[2].isfinite().all()
    assert loss[8] == 0.0
    assert torch.equal(grad[8], torch.zeros(classes, dtype=dtype))
    assert loss[9].isfinite()
    assert grad[9].isfinite().all()
    assert grad[9].abs().max() > 0
    # A bad label poisons the scalar loss and its own row alone.
    mean, rows = call(device, z[6:].to(device), y[6:], path=path)
    assert mean.isnan()
    assert rows[:2].isnan().all()
    assert torch.allclose(rows[3].float(), grad[9].float(), rtol=1e-2)
    mixed, _ = call(
        device, z[9:].to(device), (y[9:], torch.tensor([classes + 5]), torch.tensor(0.5)), reduction="none", path=path
    )
    assert mixed.isnan()


def check_nothing(device: str, path: str) -> None:
    """All rows ignored; an empty batch; one class; one row."""
    z, ignored = torch.randn(3, 40), torch.full((3,), -100)
    for reduction, value in (("mean", math.nan), ("batch_mean", math.nan), ("sum", 0.0)):
        loss, grad = call(device, z.to(device), ignored, reduction=reduction, path=path)
        assert loss.isnan() if math.isnan(value) else loss == value
        assert torch.equal(grad, torch.zeros_like(z))
        loss, grad = call(device, z[:0].to(device), ignored[:0], reduction=reduction, path=path)
        assert loss.isnan() if math.isnan(value) else loss == value
        assert grad.shape == (0, 40)
    loss, grad = call(device, torch.randn(3, 1).to(device), torch.zeros(3, dtype=torch.int64), path=path)
    assert loss == 0
    assert torch.equal(grad, torch.zeros(3, 1))


def check_layouts(device: str, dtype: torch.dtype, path: str, rows: int = 5, classes: int = 77) -> None:
    """Views of any offset and row stride, gradients of another alignment than the logits, and the gradient in the logits' memory;
    nothing beside the rows is touched."""
    y = labels_of(rows, classes)
    base = hostile_logits(rows, classes, dtype)
    tables = tables_of(classes, dtype, "shift", "scale", "weight")
    expected_loss, expected, size = oracle.adjusted_cross_entropy(base, y, **tables)
    for offset in range(16 // dtype.itemsize + 1):
        for stride in (classes, classes + 1, 2 * classes):
            memory = torch.full((offset + rows * stride + 64,), -7.0, dtype=dtype)
            view = memory[offset : offset + rows * stride].view(rows, stride)[:, :classes]
            view.copy_(base)
            there = memory.to(device)
            placed = there[offset : offset + rows * stride].view(rows, stride)[:, :classes]
            for inplace in (False, True):
                got_loss, got = call(device, placed, y, path=path, inplace=inplace, **tables)
                oracle.assert_loss(got_loss, expected_loss, size, dtype)
                oracle.assert_gradient(got, expected, size, y)
            view.copy_(got)
            assert torch.equal(there.cpu(), memory), "something beside the rows was written"
