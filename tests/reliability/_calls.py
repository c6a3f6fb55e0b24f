"""Loss calls at random: logits, targets and options of every kind, their float64 answer by the oracle, and ways to spoil a good call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import oracle
import torch
from _draw import DTYPES, INF, NAN, Draw, refused
from torch import Tensor

REDUCTIONS = ("mean", "batch_mean", "sum", "none")
LOGITS = (
    "normal",
    "normal",
    "wide",
    "confident",
    "shifted",
    "equal",
    "denormal",
    "huge",
    "nan",
    "inf",
    "-inf",
    "all -inf",
)

# A value for every parameter of every loss; a new parameter without one fails the part.
OPTIONS: dict[str, Callable[[Draw], Any]] = {
    "tau": lambda draw: draw.uniform(1, low=-1.0, high=2.0).item(),
    "beta": lambda draw: draw.choice([None, 0.0, 0.5, 0.9999, 1 - 1e-12]),
    "gamma": lambda draw: draw.choice([0.0, 0.3, 0.5, 1.0]),
    "max_margin": lambda draw: draw.choice([0.0, 0.2, 0.5, -0.1]),
    "s": lambda draw: draw.choice([1, 15.0, 30.0, 50]),
    "m": lambda draw: draw.choice([0.0, 0.35, 0.5, 1.5]),
    "p": lambda draw: draw.choice([0.0, 0.8, 2]),
    "q": lambda draw: draw.choice([0.0, 1.0, 2.0]),
    "eps": lambda draw: draw.choice([1e-2, 0.5, 1.0]),
    "tail_frequency": lambda draw: draw.choice([None, 0.0, 0.1, 1.0]),
    "head": lambda draw: draw.choice([0.4, 1.0, 0.0]),
    "tail": lambda draw: draw.choice([0.1, 1, 0.0]),
    "shape": lambda draw: draw.choice(["concave", "linear", "convex", "exp"]),
    "power": lambda draw: draw.choice([0.5, 2, 3.0]),
    "threshold": lambda draw: draw.choice([0.0, 0.5, 0.7]),
    "mu": lambda draw: draw.choice([0.8, 0.0, 100.0]),
    "alpha": lambda draw: draw.choice([4.0, 0.0]),
    "smoothing": lambda draw: draw.choice([0.98, 0.5, 1.0]),
    "noise": lambda draw: draw.choice([0.5, 0.0, 1]),
    "seed": lambda draw: draw.choice([0, 7, -(2**63), 2**63 - 1, 2**63, 2**64 - 1]),
    "gradient": lambda draw: draw.choice(["exact", "straight_through"]),
    "gradient_adjustment": lambda draw: draw.choice([False, True]),
    "empty": lambda draw: draw.choice(["error", "ignore"]),
}


class Call(NamedTuple):
    """The arguments of a loss, and what a row of it is."""

    z: Tensor  # in the public shape, maybe strided
    target: Any
    common: dict[str, Any]  # reduction, ignore_index, label_smoothing
    rows: Tensor  # (N, C) float64, one row a sample
    labels: Any  # the target of `rows`
    to_rows: Callable[[Tensor], Tensor]


def options_of(draw: Draw, parameters: Any, cosine: bool) -> dict[str, Any]:
    """Some of a loss' own options; those left out keep their defaults."""
    chosen = {name: OPTIONS[name](draw) for name in parameters if draw.chance(0.5) or name == "seed"}
    if not cosine and chosen.get("gamma") and draw.chance(0.3):
        chosen["gamma"] = 0.9
    return draw.say("options", chosen)


def logits_of(draw: Draw, rows: int, classes: int, dtype: torch.dtype, kind: str, cosine: bool) -> Tensor:
    """(rows, classes) in `dtype`."""
    z = draw.normal(rows, classes) * (0.3 if cosine else 3.0)
    if cosine and kind in ("wide", "confident", "shifted"):
        z = draw.uniform(rows, classes, low=-1.0, high=1.0)
        z[draw.uniform(rows, classes) < 0.1] = 1.0
        z[draw.uniform(rows, classes) < 0.1] = -1.0
    elif kind == "wide":
        z *= 20.0
    elif kind == "confident":
        z[draw.uniform(rows, classes) < 1.5 / classes] += 40.0
    elif kind == "shifted":
        z += draw.choice([300.0, -300.0])
    elif kind == "equal":
        z[:] = draw.choice([0.0, 1.0, -7.0])
    elif kind == "denormal":
        z *= torch.finfo(dtype).tiny / 16
    elif kind == "huge":
        # Powers of two: their differences are exact in every precision, or far beyond where exp is 0.
        top = 2.0 ** draw.randint(6, math.frexp(torch.finfo(dtype).max)[1] - 1)  # the logarithm of float64's rounds up
        z = top * draw.integers(-1, 2, rows, classes).double() * 0.5
    elif kind in ("nan", "inf", "-inf"):
        z[draw.uniform(rows, classes) < 0.5 / classes] = {"nan": NAN, "inf": INF, "-inf": -INF}[kind]
        if kind == "-inf" and rows:
            z[draw.randrange(rows), : draw.randint(0, classes)] = -INF
    elif kind == "all -inf" and rows:
        z[draw.randrange(rows)] = -INF
    return z.to(dtype)


def loss_call(draw: Draw, cosine: bool = False, mixed: bool = True, two_dimensional: bool = False) -> tuple[Call, str]:
    """A good call, and the kind of its logits."""
    dtype = draw.say("dtype", draw.choice(DTYPES))
    kind = draw.say("logits", draw.choice(LOGITS))
    big = draw.chance(0.04)
    classes = draw.say("C", draw.choice([2047, 2048, 2049, 4100]) if big else draw.size(130))
    most = 3 if big else 40 if classes <= 16 else 9
    dims = 2 if two_dimensional else draw.say("dims", draw.choice([1, 2, 2, 2, 2, 3, 4]))
    outer = {1: (), 2: (draw.size(most, 0.05),), 3: (draw.randint(0, 3), 3), 4: (2, 1, draw.randint(1, 3))}[dims]
    rows = draw.say("N", math.prod(outer))
    flat = logits_of(draw, rows, classes, dtype, kind, cosine)

    def to_rows(value: Tensor) -> Tensor:
        return value.reshape(1, -1) if value.dim() == 1 else value.movedim(1, -1).reshape(-1, value.shape[1])

    z = flat.reshape(*outer, classes)
    z = draw.layout(z.movedim(-1, 1) if dims > 1 else z)
    if dims == 2 and rows and draw.chance(0.05):
        z = draw.say("expanded", z[:1].expand(rows, classes))
    ignore = draw.say("ignore_index", draw.choice([-100, -100, -1, 0, classes - 1, classes, 2**40]))
    y = draw.integers(0, classes, *outer)
    if rows:
        y.view(-1)[draw.randrange(rows)] = draw.choice([0, classes - 1])
    y = torch.where(draw.uniform(*outer) < 0.15, ignore, y)
    common = {"ignore_index": ignore, "reduction": draw.say("reduction", draw.choice(REDUCTIONS))}
    if draw.say("sample_weight", draw.chance(0.25)):
        common["sample_weight"] = draw.layout(sample_weights(draw, y, ignore, dtype))
    if mixed and draw.chance(0.2):
        draw.say("target", "mixed")
        second = draw.integers(0, classes, *outer)
        lam = draw.uniform(*outer) if draw.chance(0.7) else torch.tensor(draw.choice([0.0, 0.25, 1.0]))
        # What the call rounds it to.
        lam = lam.to(torch.float64 if dtype == torch.float64 else torch.float32)
        target: Any = (draw.layout(y), draw.layout(second), lam)
        labels: Any = (y.reshape(-1), second.reshape(-1), lam.double().expand(outer).reshape(-1))
    else:
        kinds = [torch.int64, torch.int64, torch.int32, torch.int16]
        kinds = [one for one in kinds if torch.iinfo(one).max > max(classes, abs(ignore))]
        target = draw.layout(y.to(draw.say("labels", draw.choice(kinds))))
        labels = y.reshape(-1)
    call = Call(z, target, common, to_rows(z).double(), labels, to_rows)
    return call, kind


def sample_weights(draw: Draw, y: Tensor, ignore: int, dtype: torch.dtype) -> Tensor:
    """In the loss' dtype, some of them 0; anything at all on ignored rows."""
    own = draw.uniform(*y.shape, low=0.1, high=2.0)
    own = torch.where(draw.uniform(*y.shape) < 0.1, 0.0, own)
    own = torch.where(y == ignore, draw.choice([NAN, INF, 1.0]), own)
    return own.to(torch.float64 if dtype == torch.float64 else torch.float32)


def smoothed(options: dict[str, Any]) -> bool:
    """Whether labels are smoothed, by a number or by a table."""
    eps = options.get("label_smoothing", 0.0)
    return isinstance(eps, Tensor) or eps != 0.0


def answer(run: Callable[[Tensor], Tensor], call: Call, upstream: float) -> tuple[Tensor, Tensor]:
    """Loss, and gradient as rows, of ``run(logits)``; the logits must stay as they are."""
    leaf = call.z.detach().requires_grad_()
    before = call.z.clone()
    loss = run(leaf)
    loss.backward(torch.full_like(loss, upstream))
    assert torch.equal(call.z.nan_to_num(), before.nan_to_num()), "the logits were written to"
    assert leaf.grad.shape == call.z.shape
    assert leaf.grad.dtype == call.z.dtype
    return loss.detach(), call.to_rows(leaf.grad)


def check(run: Callable[[Tensor], Tensor], call: Call, tables: dict[str, Any], kind: str) -> None:
    """Loss and gradient of ``run(logits)`` against the oracle with these tables and options."""
    dtype = call.z.dtype
    reduction = call.common["reduction"]
    # A power of two, because a gradient of 16 bits is rounded before it is multiplied; 1 for float16, which has a small range.
    upstream = 1.0 if dtype == torch.float16 else 0.25
    expected, gradient, size = oracle.adjusted_cross_entropy(
        call.rows, call.labels, **tables, **call.common, upstream=upstream
    )
    loss, grad = answer(run, call, upstream)
    check_shape(loss, call)
    if not smoothed(call.common) and undecided(call, tables):
        return
    if kind == "huge":
        size = torch.zeros_like(size)
    expected, gradient = rounded(expected, loss.dtype), rounded(gradient, dtype)
    cond = 2.0 if smoothed(tables) or isinstance(call.labels, tuple) else 1.0
    got = loss.reshape(-1) if reduction == "none" else loss
    if cond > 1:
        # A probability and its share of a soft label can cancel altogether, in every column at once: what is left is the rounding of
        # each, in the working type, under the row's coefficient, which is at most this.
        top = 1.0
        for name in ("weight", "scale", "row_scale", "label_scale"):
            if tables.get(name) is not None:
                top *= max(1.0, float(tables[name].abs().max()))
        left = (
            4
            * torch.finfo(loss.dtype).eps
            * upstream
            * top
            / max(1, len(call.rows) if reduction == "batch_mean" else 1)
        )
        grad = torch.where((grad.double() - gradient).abs() <= left, gradient, grad.double())
    if not (smoothed(tables) and not bool(call.rows.isfinite().all())):
        if smoothed(tables):  # soft sum(alpha) p - soft alpha, where they cancel altogether: with one class, say
            weight = tables.get("weight")
            gone = 4e-16 * (1.0 if weight is None else float(weight.max())) * call.rows.shape[1]
            top = 1.0 + float(size.max()) if len(size) else 1.0
            grad = torch.where((grad.double() - gradient).abs() <= gone, gradient, grad.double())
            gone *= top * max(1, len(call.rows))
            got = torch.where((got.double() - expected).abs() <= gone, expected.to(got.dtype), got)
        oracle.assert_loss(got, expected, size, dtype)
        assert oracle.gradient_fits(grad.double(), gradient, size, dtype, cond), worst(grad, gradient)
    else:  # a smoothed label at a masked class: infinite or undefined, and never a finite number
        finite = expected.isfinite()
        assert bool((got.isfinite() == finite).all()), f"{got} is not {expected}"


def check_shape(loss: Tensor, call: Call) -> None:
    shape = call.z.shape[:1] + call.z.shape[2:] if call.z.dim() > 1 else ()
    assert loss.shape == (shape if call.common["reduction"] == "none" else ()), f"shape {tuple(loss.shape)}"
    assert loss.dtype == (torch.float64 if call.z.dtype == torch.float64 else torch.float32)


def undecided(call: Call, tables: dict[str, Any]) -> bool:
    """Whether every row that counts has weight 0, so that the mean is 0 / 0."""
    weight, own = tables.get("weight"), call.common.get("sample_weight")
    if (weight is None and own is None) or call.common["reduction"] != "mean":
        return False
    weight = torch.ones(call.rows.shape[1]) if weight is None else weight
    first = call.labels[0] if isinstance(call.labels, tuple) else call.labels
    valid = first != call.common["ignore_index"]
    if isinstance(call.labels, tuple):
        a, b = (weight.double()[torch.where(valid, y, 0)] for y in call.labels[:2])
        each = call.labels[2] * a + (1 - call.labels[2]) * b
    else:
        each = weight.double()[torch.where(valid, first, 0)]
    if own is not None:
        each = each * own.reshape(-1)
    return bool(valid.any()) and float(torch.where(valid, each, 0.0).sum()) == 0.0


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` with what lies beyond the range of `dtype` made infinite, as storing it does."""
    return torch.where(value.abs() > torch.finfo(dtype).max, value.to(dtype).double(), value)


def worst(actual: Tensor, expected: Tensor) -> str:
    gap = (actual.double() - expected).abs() / (expected.abs() + 1e-300)
    at = int(torch.nan_to_num(gap, nan=INF).argmax()) if gap.numel() else 0
    row, column = divmod(at, expected.shape[1])
    return f"gradient[{row}, {column}] is {actual[row, column].item()}, not {expected[row, column].item()}"


def spoil(draw: Draw, call: Call) -> tuple[Any, Any, dict[str, Any]] | None:
    """(logits, target, common) that no loss accepts; None where the drawn fault does not apply."""
    z, target, common = call.z, call.target, dict(call.common)
    plain = target[0] if isinstance(target, tuple) else target
    kind = draw.say(
        "fault",
        draw.choice(
            ["label high", "label low", "label type", "label shape", "label list", "logits type", "logits list", "no classes", "smoothing",
             "reduction", "lam", "tuple", "backend", "second"]
        ),
    )  # fmt: skip
    if kind in ("label high", "label low", "second"):
        if plain.numel() == 0 or common["ignore_index"] == z.shape[1 if z.dim() > 1 else 0]:
            return None
        bad = plain.long().clone(memory_format=torch.contiguous_format)
        high = z.shape[1 if z.dim() > 1 else 0]
        bad.view(-1)[draw.randrange(bad.numel())] = high if kind != "label low" else -3
        if kind == "second":
            good = torch.zeros_like(bad)
            if common["ignore_index"] == 0:
                return None
            return z, (good, bad, 0.5), common
        return z, bad, common
    if kind == "label type":
        return z, plain.bool(), common
    if kind == "label shape":
        return z, plain.reshape(-1)[None, None, None].expand(2, 2, 2, -1), common
    if kind == "label list":
        return z, plain.tolist(), common
    if kind == "logits type":
        return z.nan_to_num().clamp(-9, 9).to(draw.choice([torch.int64, torch.bool, torch.complex64])), target, common
    if kind == "logits list":
        return None, target, common
    if kind == "no classes":
        # An ignored row needs no class.
        return z.new_empty(3, 0), torch.full((3,), int(common["ignore_index"] == 0)), common
    if kind == "smoothing":
        return z, target, {**common, "label_smoothing": draw.choice([-0.1, 1.5, NAN, INF, "0.1", None, True])}
    if kind == "reduction":
        return z, target, {**common, "reduction": draw.choice(["avg", "", None, 3])}
    if kind == "lam":
        return z, (plain.long(), plain.long(), draw.choice([-0.5, 1.5, NAN, torch.rand(7, 7), "1"])), common
    if kind == "tuple":
        return z, (plain, plain), common
    return z, target, {**common, "backend": draw.choice(["gpu", "cuda", 3])}


def check_refused(draw: Draw, run: Callable[..., Tensor], call: Call) -> None:
    """``run(logits, target, **common)`` refuses a spoiled call, with and without a gradient, and leaves the logits alone."""
    bad = spoil(draw, call)
    if bad is None:
        return
    z, target, common = bad
    if isinstance(z, Tensor) and z.is_floating_point():
        before = z.clone()
        leaf = z.detach().requires_grad_(draw.chance(0.5))
        refused(lambda: run(leaf, target, **common))
        assert torch.equal(z.nan_to_num(), before.nan_to_num()), "a refused call wrote to the logits"
    else:
        refused(lambda: run(z, target, **common))
