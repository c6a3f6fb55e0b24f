"""Promise: the short way of a call (csrc/plain_call.h) has the bits of the long one, and takes nothing but what is what it seems to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ltkernels as ltk
from ltkernels import _C
from ltkernels._call import SUM, TABLES, Call

CE = ltk.functional.adjusted_cross_entropy

Z = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
Y = torch.arange(9) % 7
T = torch.linspace(0.5, 1.5, 7)


def plain(logits: object = Z, target: object = Y, **tables: object) -> bool:
    five, beside = (tables.get(name) for name in TABLES), (tables.get("sample_weight"), tables.get("label_scale"))
    smoothing = tables.get("smoothing", 0.0)
    found = _C.plain_call(logits, target, *five, 0.0, smoothing, -100, "mean", *beside)
    if found is not None:
        assert type(found) is Call
        for own, expected in zip(found, Call(target, **tables), strict=True):  # type: ignore[arg-type]
            assert own is expected or (not isinstance(own, Tensor) and own == expected)
    return found is not None


def results(
    rows: int, classes: int, dtype: torch.dtype, gap: int, names: tuple[str, ...], **options: object
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    logits = torch.randn(rows, classes + gap, generator=generator).to(dtype)[:, :classes].requires_grad_()
    labels = torch.randint(0, classes, (rows,), generator=generator)
    if rows > 2:
        labels[rows // 2] = options.get("ignore_index", -100)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    tables = {name: (torch.rand(classes, generator=generator) + 0.5).to(real) for name in names}
    if "label_smoothing" in tables:
        tables["label_smoothing"].clamp_(0, 1)
    if "sample_weight" in tables:
        tables["sample_weight"] = torch.rand(rows, generator=generator).to(real)
    alone = CE(logits.detach(), labels, **tables, **options)
    loss = CE(logits, labels, **tables, **options)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return [alone, loss.detach(), grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("names", "options"),
    [
        ((), {}),
        (("shift",), {}),
        (TABLES, {"focal_gamma": 1.5, "reduction": "batch_mean"}),
        (("scale", "weight"), {"label_smoothing": 0.1, "ignore_index": 3, "reduction": "sum"}),
        (("margin", "row_scale"), {"reduction": "none"}),
        (("shift",), {"grad_scale": 37.0}),
        (("sample_weight",), {}),
        (("sample_weight", "label_smoothing", "label_scale", *TABLES), {"focal_gamma": 1.5}),
        (("label_smoothing", "weight", "label_scale"), {"reduction": "none"}),
        ((), {"grad_scale": torch.tensor(0.25, dtype=torch.float64), "label_smoothing": 0.1}),
    ],
)
def test_same_bits(dtype, names, options, monkeypatch) -> None:
    shapes = [
        (1, 1, 0),
        (2, 2, 0),
        (128, 10, 0),
        (33, 100, 0),
        (33, 100, 3),
        (5, 9000, 0),
        (700, 3, 0),
    ]  # the last is beyond the stack's scratch
    short = [results(*shape[:2], dtype, shape[2], names, **options) for shape in shapes]
    asked = []
    monkeypatch.setattr(_C, "plain_call", lambda *_: asked.append(1))
    for name in ("plain_run", "plain_loss"):
        monkeypatch.setattr(_C, name, lambda *_: None)
    for shape, found in zip(shapes, short):
        for ours, expected in zip(found, results(*shape[:2], dtype, shape[2], names, **options)):
            torch.testing.assert_close(ours, expected, rtol=0.0, atol=0.0, equal_nan=True)
            assert ours.stride() == expected.stride(), shape
    assert asked


def test_one_row_with_gaps_between_its_classes() -> None:
    """Its row stride says nothing."""
    wide = torch.randn(1, 14, generator=torch.Generator().manual_seed(1))
    for row in (wide[:, ::2], wide[:, ::2].requires_grad_()):
        assert torch.equal(CE(row, Y[:1]), CE(row.detach().contiguous(), Y[:1]))
    (grad,) = torch.autograd.grad(CE(row, Y[:1]), row)
    copy = row.detach().contiguous().requires_grad_()
    assert torch.equal(grad, torch.autograd.grad(CE(copy, Y[:1]), copy)[0])


def test_plain_calls_are() -> None:
    assert plain()
    assert plain(torch.nn.Parameter(Z.clone()), Y, **dict.fromkeys(TABLES, T))
    assert plain(torch.cat([Z, Z], 1)[:, :7])  # gaps between rows
    assert plain(Z.double(), Y, shift=T.double())
    assert plain(Z.bfloat16(), Y, shift=T)
    assert plain(Z, Y, sample_weight=torch.ones(9), smoothing=T, label_scale=T)


class Sub(Tensor):
    pass


@pytest.mark.parametrize(
    "logits",
    [
        Z.as_subclass(Sub), torch._neg_view(Z), torch._efficientzerotensor(9, 7), Z.to_sparse(), Z.to("meta"), Z.t().contiguous().t(),
        Z[0], Z[None], Z[:0], Z[:, :0], Z.long(), Z.to(torch.complex64), Z.numpy(), None, 1.0, Z[:8], Z.to_mkldnn(),
        torch._to_functional_tensor(Z),
    ],
    ids=lambda z: f"{type(z).__name__}-{getattr(z, 'layout', '')}-{getattr(z, 'dtype', '')}-{getattr(z, 'shape', '')}",
)  # fmt: skip
def test_logits_that_are_not(logits) -> None:
    assert not plain(logits)
    assert plain()  # no error is left behind


@pytest.mark.parametrize(
    "target",
    [
        Y.int(),
        Y.double(),
        Y[:8],
        Y[None],
        torch.cat([Y, Y])[::2],
        Y.as_subclass(Sub),
        torch._neg_view(Y),
        (Y, Y, 0.5),
        Y.tolist(),
    ],
)
def test_targets_that_are_not(target) -> None:
    assert not plain(Z, target)


@pytest.mark.parametrize("name", [*TABLES, "smoothing", "label_scale"])
@pytest.mark.parametrize(
    "table",
    [T.double(), T[:6], T[None], torch.cat([T, T])[::2], T[:1].expand(7), T.as_subclass(Sub), torch._neg_view(T), T.to("meta"), 1.0,
     torch._efficientzerotensor(7)],
)  # fmt: skip
def test_tables_that_are_not(name, table) -> None:
    assert not plain(Z, Y, **{name: 1 if name == "smoothing" and isinstance(table, float) else table})


@pytest.mark.parametrize(
    "own",
    [
        torch.ones(9).double(),
        T,
        torch.ones(9, 1),
        torch.ones(18)[::2],
        torch.ones(1).expand(9),
        torch._neg_view(torch.ones(9)),
    ],
)
def test_sample_weights_that_are_not(own) -> None:
    assert not plain(Z, Y, sample_weight=own)


def test_memory_that_is_gone() -> None:
    gone = Z.clone()
    gone.untyped_storage().resize_(0)
    assert not plain(gone)
    loss, grad = torch.empty(()), torch.empty_like(Z)
    with pytest.raises(RuntimeError, match=r"logits is Tensor of shape \(9, 7\) without memory"):
        _C.plain_run(gone, Call(Y), loss, grad, 1)
    with pytest.raises(RuntimeError, match=r"logits is Tensor of shape \(9, 7\) without memory"):
        _C.plain_loss(gone, Call(Y), True, 1)
    table = T.clone()
    table.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"scale is Tensor of shape \(7,\) without memory"):
        _C.plain_loss(Z, Call(Y, scale=table), True, 1)


@pytest.mark.parametrize(
    "said",
    [(0, 0.0, -100, "mean"), (0.0, 1, -100, "mean"), (-0.5, 0.0, -100, "mean"), (0.0, 1.5, -100, "mean"), (float("nan"), 0.0, 0, "sum"),
     (0.0, float("nan"), 0, "sum"), (1e30, 0.0, 0, "sum"), (0.0, 0.0, 1.0, "sum"), (0.0, 0.0, True, "sum"), (0.0, 0.0, 0, "Mean"),
     (0.0, None, 0, "sum"), (0.0, 0.0, 0, 1), (0.0, 0.0, 0, None), (0.0, 0.0, 2**63, "sum")],
)  # fmt: skip
def test_options_that_need_a_look(said) -> None:
    assert _C.plain_call(Z, Y, *[None] * 5, *said, None, None) is None
    assert _C.plain_call(Z, Y, *[None] * 5, 0.5, 0.1, 2**40, "batch_mean", None, None) == Call(
        Y, focal_gamma=0.5, label_smoothing=0.1, ignore_index=2**40, reduction=2
    )


# Every field that the short way does not know closes it: an option added to the record is served by the long way, or not at all.
UNSERVED = {
    "target_b": Y, "lam": torch.ones(9), "table": T, "seed": torch.zeros(1, dtype=torch.int64),
    "numbers": torch.zeros(2, dtype=torch.float64), "form": 1, "form_options": (1.0,), "backend": "torch",
}  # fmt: skip
SERVED = {
    "target",
    *TABLES,
    "sample_weight",
    "smoothing",
    "label_scale",
    "grad_scale",
    "focal_gamma",
    "label_smoothing",
    "ignore_index",
    "reduction",
}


def test_every_field_is_served_or_closes_the_way() -> None:
    assert set(UNSERVED) | SERVED == set(Call._fields)
    assert not set(UNSERVED) & SERVED
    loss, grad = torch.empty(()), torch.empty_like(Z)
    assert _C.plain_run(Z, Call(Y, reduction=SUM), loss, grad, 1) == -1
    for name, value in UNSERVED.items():
        call = Call(Y)._replace(**{name: value})
        assert _C.plain_run(Z, call, loss, grad, 1) is None, name
        assert _C.plain_loss(Z, call, True, 1) is None, name


@pytest.mark.parametrize(
    "factor", [torch.ones(9), torch.ones((), dtype=torch.float64), torch.ones(1), torch.ones(()).expand(9)]
)
def test_factors_that_go_the_long_way(factor: Tensor) -> None:
    assert _C.plain_loss(Z, Call(Y, grad_scale=factor), True, 1) is None
    assert _C.plain_run(Z, Call(Y, grad_scale=factor), torch.empty(()), torch.empty_like(Z), 1) is None


def test_refusals_are_the_long_ways() -> None:
    with pytest.raises(ValueError, match="ignore_index is 9223372036854775808; it must be an integer of 64 bits"):
        CE(Z, Y, ignore_index=2**63)
    with pytest.raises(ValueError, match=r"target has label 7 in row 2; labels must lie in \[0, 7\)"):
        CE(Z, torch.where(Y == 2, 7, Y))
    with pytest.raises(ValueError, match=r"scale\[3\] is inf; it must be finite"):
        CE(Z.clone().requires_grad_(), Y, scale=torch.where(T[3] == T, torch.inf, T))
