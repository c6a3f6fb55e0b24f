"""Fuzzing of what makes, changes and undoes the losses' tables: ltkernels.adjustments, .schedules, .inference."""

from __future__ import annotations

from typing import Any

import torch
from _calls import OPTIONS
from _draw import DTYPES, Draw, loop, missing, refused
from _part import Part, Tally

import ltkernels as ltk

BUILDERS = {loss.build.__name__: loss for loss in ltk.LOSSES.values()}
BAD_COUNTS = (
    [],
    [0, 0],
    [3, -1],
    [1.5, 2],
    [True, 2],
    [[1, 2]],
    "12",
    3,
    None,
    torch.tensor([1.0, 2.0]),
    torch.tensor([[1]]),
)
BAD_OPTIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tau", "max_margin"), (torch.nan, torch.inf, "1", True)),
    "m": (torch.nan, torch.inf, "1"),
    **dict.fromkeys(("s",), (0.0, -1.0, torch.nan, "1")),
    **dict.fromkeys(("gamma", "p", "q"), (-0.5, torch.nan, "1")),
    "beta": (1.0, 2.0, -0.1, torch.nan, "1"),
    "eps": (0.0, 1.5, torch.nan),
    "tail_frequency": (-0.1, 1.5, torch.nan),
    "seed": (2**64, -(2**63) - 1, 1.5, "7", True),
    "noise": (-0.1, torch.nan, "1"),
    "gradient": ("none", 3),
    "empty": ("drop", None),
}


def builder(draw: Draw) -> None:
    name = draw.say("builder", list(BUILDERS)[draw.case % len(BUILDERS)])
    record = BUILDERS[name]
    # Priors of negatives, which a single class has none of, be it the only one that is not empty.
    least = 3 if name in ("balanced_bce", "ecm", "distribution_balanced") else 1
    counts = draw.counts(max(least, draw.say("C", draw.size(300))))
    chosen = draw.say("options", {key: OPTIONS[key](draw) for key in record.own_options if draw.chance(0.6)})
    make = getattr(ltk.adjustments, name)
    first = (counts,) if record.first == "class_counts" else (len(counts),) if record.first == "num_classes" else ()
    if draw.chance(0.3):
        key = draw.choice([None, *record.own_options])
        if key is None and record.first:
            bad = draw.choice(BAD_COUNTS) if record.first == "class_counts" else draw.choice([0, -1, 2.5, True, "3"])
            refused(lambda: make(draw.say("bad", bad), **chosen))
        elif key in BAD_OPTIONS:
            refused(lambda: make(*first, **{**chosen, key: draw.say(f"bad {key}", draw.choice(BAD_OPTIONS[key]))}))
        return
    built = make(*first, **chosen)
    kinds = (list, torch.tensor, lambda values: torch.tensor(values, dtype=torch.int32), tuple)
    again = make(draw.choice(kinds)(counts), **chosen) if record.first == "class_counts" else make(*first, **chosen)
    for field, value in built._asdict().items():
        if isinstance(value, torch.Tensor):
            assert value.shape == (len(counts),), f"{field} has shape {tuple(value.shape)}"
            assert value.dtype == torch.float32
            assert bool(value.isfinite().all()), f"{field} is not finite: {value}"
            assert torch.equal(value, getattr(again, field)), f"{field} depends on the kind of the counts"
            if field in ("weight", "scale", "row_scale"):
                assert bool((value >= 0).all()), f"{field} is negative: {value}"
            # Equal counts, equal entries: classes differ by their counts alone.
            for count in set(counts):
                same = value[torch.tensor(counts) == count]
                assert bool((same == same[0]).all()), f"{field} differs between classes of {count} samples"
    if record.first == "class_counts" and len(counts) > 1 and "empty" in record.own_options:
        holes = [0, *counts[1:]]
        loud = {**chosen, "empty": "error"}
        refused(lambda: make(holes, **loud))
        quiet = make(holes, **{**chosen, "empty": "ignore"})
        for field in ("scale", "margin", "row_scale", "weight"):
            value = getattr(quiet, field, None)
            assert value is None or bool(value.isfinite().all()), f"{field} of an empty class is not finite"


def adjustments(seed: int, cases: int) -> Tally:
    missing(set(ltk.adjustments.__all__), {"Adjustment", "vmf", *BUILDERS})  # vmf, which is of no counts: losses.py
    return loop(seed, cases, builder)


# ---- schedules -------------------------------------------------------------------------------------------------------


def make_schedule(draw: Draw, name: str, counts: list[int], start: int) -> tuple[Any, Any]:
    """(loss, schedule)"""
    if name == "GradientAdjustment":
        loss = ltk.nn.KPS(counts, s=draw.choice([5.0, 15.0]))
        return loss, ltk.schedules.GradientAdjustment(loss, start)
    if name == "TLA":
        loss = ltk.nn.VectorScaling(counts)
        return loss, ltk.schedules.TLA(loss, start, nu=draw.choice([0.0, 0.5, 1.0]))
    if name == "DRW":
        loss = draw.choice([ltk.nn.LDAM, ltk.nn.BalancedSoftmax, ltk.nn.CDT])(counts)
        return loss, ltk.schedules.DRW(loss, start, draw.choice([0.9, 0.9999, None]))
    loss = ltk.nn.LogitAdjustedCrossEntropy(counts)
    before, after = ({"weight": draw.uniform(len(counts)).float()} for _ in range(2))
    return loss, ltk.schedules.Schedule(loss, start, counts, before, after, {})


def schedule(draw: Draw) -> None:
    name = draw.say("schedule", ltk.schedules.__all__[draw.case % len(ltk.schedules.__all__)])
    counts, start = draw.counts(draw.size(30)), draw.say("start", draw.choice([0, 1, 5, 160]))
    loss, made = make_schedule(draw, name, counts, start)
    tables = lambda: {key: value.clone() for key, value in loss.named_buffers()}  # noqa: E731
    addresses = {key: value.data_ptr() for key, value in loss.named_buffers()}
    epochs = [draw.choice([0, start, max(0, start - 1), start + 1, 10**6]) for _ in range(5)]
    seen: dict[bool, dict[str, torch.Tensor]] = {}
    for epoch in epochs:
        made.step(epoch)
        assert made.active == (epoch >= start)
        now = tables()
        assert all(bool(value.isfinite().all()) for value in now.values())
        for key, value in seen.setdefault(made.active, now).items():
            assert torch.equal(value, now[key]), f"{key} depends on the epochs before"
    assert addresses == {key: value.data_ptr() for key, value in loss.named_buffers()}, "a buffer was replaced"
    state = made.state_dict()
    made.step(0)
    made.load_state_dict(state)
    assert made.epoch == epochs[-1]
    kept = tables()
    refused(lambda: made.step(draw.choice([-1, 1.5, True, "3", None])))
    refused(lambda: made.load_state_dict({**state, "start": start + 1}))
    refused(lambda: made.load_state_dict({key: value for key, value in state.items() if key != "class_counts"}))
    refused(lambda: made.load_state_dict({**state, "epoch": -1}))
    assert all(torch.equal(value, kept[key]) for key, value in loss.named_buffers()), "a refused call changed a table"


def schedules(seed: int, cases: int) -> Tally:
    missing(set(ltk.schedules.__all__), {"DRW", "TLA", "GradientAdjustment", "Schedule"})
    return loop(seed, cases, schedule)


# ---- inference -------------------------------------------------------------------------------------------------------


def logit_adjust(draw: Draw) -> None:
    shape, dim = shape_of(draw)
    z, counts = draw.layout((draw.normal(*shape) * 5).to(draw.choice(DTYPES))), draw.counts(shape[dim])
    tau = draw.choice([0.0, 1.0, -1.0, 2.5])
    out = ltk.inference.logit_adjust(z, counts, tau)
    n = torch.tensor(counts).double()
    wanted = z.double().movedim(dim, -1) - tau * torch.log(n / n.sum())
    torch.testing.assert_close(out.double().movedim(dim, -1), wanted, rtol=3e-7, atol=1e-5)
    assert out.shape == z.shape
    refused(lambda: ltk.inference.logit_adjust(z, [*counts, 1]))
    refused(lambda: ltk.inference.logit_adjust(z, draw.choice(BAD_COUNTS)))
    refused(lambda: ltk.inference.logit_adjust(draw.choice([z.long(), z.tolist(), z.new_zeros(())]), counts))


def threshold_move(draw: Draw) -> None:
    shape, dim = shape_of(draw)
    p = draw.layout(draw.normal(*shape).softmax(dim).to(draw.choice(DTYPES)))
    classes = shape[dim]
    cost = draw.uniform(classes) if draw.chance(0.5) else draw.uniform(classes, classes)
    out = ltk.inference.threshold_move(p, cost if draw.chance(0.7) else cost.tolist())
    moved = p.double().movedim(dim, -1)
    wanted = moved * cost if cost.dim() == 1 else moved @ (cost.amax(1, keepdim=True) - cost)
    torch.testing.assert_close(out.double().movedim(dim, -1), wanted, rtol=1e-5, atol=1e-6)
    bad = cost.clone()
    bad.view(-1)[0] = draw.choice([-1.0, torch.nan, torch.inf])
    refused(lambda: ltk.inference.threshold_move(p, bad))
    refused(lambda: ltk.inference.threshold_move(p, torch.ones(classes + 1)))
    refused(lambda: ltk.inference.threshold_move(draw.choice([p.long(), p.tolist(), None]), cost))


def tau_normalize(draw: Draw) -> None:
    w = draw.layout((draw.normal(draw.size(9, 0.1), draw.size(9)) * 3).to(draw.choice(DTYPES)))
    if len(w):
        w[0] = 0
    tau = draw.choice([0.0, 0.5, 1.0])
    out = ltk.inference.tau_normalize(w, tau)
    norm = w.double().norm(dim=1, keepdim=True)
    close = {torch.float64: 1e-12, torch.float32: 1e-5}.get(w.dtype, 1e-2)
    torch.testing.assert_close(
        out.double(), w.double() / torch.where(norm > 0, norm, 1.0) ** tau, rtol=close, atol=1e-6
    )
    assert out.dtype == w.dtype
    refused(lambda: ltk.inference.tau_normalize(draw.choice([w.long(), w[None], w.tolist()])))
    refused(lambda: ltk.inference.tau_normalize(w, draw.choice([torch.nan, "1", None])))


def expert_weights(draw: Draw) -> None:
    shape = draw.say("E, N, C", (draw.size(4), draw.size(12), draw.size(9)))
    first, second = (draw.layout((draw.normal(*shape) * 3).to(draw.choice(DTYPES))) for _ in range(2))
    options = {
        "epochs": draw.choice([1, 2, 3]),
        "batch_size": draw.choice([1, 4, 128]),
        "seed": draw.choice([0, 5, 2**64 - 1]),
    }
    out = ltk.inference.expert_weights(first, second, **options)
    assert out.shape == shape[:1]
    assert out.dtype == torch.float64
    assert bool((out > 0).all())
    torch.testing.assert_close(out.sum(), torch.ones((), dtype=torch.float64))
    assert torch.equal(out, ltk.inference.expert_weights(list(first), list(second), **options))
    refused(lambda: ltk.inference.expert_weights(first, second[:, :, :-1]))
    refused(lambda: ltk.inference.expert_weights(first, draw.choice([second.long(), second[0], None, []])))
    refused(lambda: ltk.inference.expert_weights(first[:, :0], second[:, :0]))


def shape_of(draw: Draw) -> tuple[tuple[int, ...], int]:
    classes = draw.size(40)
    shape = draw.choice([(classes,), (draw.size(9, 0.1), classes), (2, classes, 3), (2, classes, 1, 2)])
    return draw.say("shape", shape), 0 if len(shape) == 1 else 1


INFERENCE = {
    "expert_weights": expert_weights,
    "logit_adjust": logit_adjust,
    "threshold_move": threshold_move,
    "tau_normalize": tau_normalize,
}


def inference(seed: int, cases: int) -> Tally:
    missing(set(ltk.inference.__all__), set(INFERENCE))
    checks = list(INFERENCE.values())
    return loop(seed, cases, lambda draw: checks[draw.case % len(checks)](draw))


PARTS = (
    Part(
        "adjustments",
        "every builder of tables: finite, a function of the counts alone, bad counts and options refused",
        500,
        adjustments,
    ),
    Part("schedules", "every schedule: in place, by the epoch alone, refused states change nothing", 100, schedules),
    Part("inference", "corrections at prediction time against float64", 300, inference),
)
