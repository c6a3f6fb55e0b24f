"""Fuzzing of soft targets, distillation, both with their heads, and coupled experts: the kernels against the plain torch references in
float64; spoiled calls must be refused."""

from __future__ import annotations

import math
from typing import Any

import torch
from _calls import REDUCTIONS
from _draw import DTYPES, Draw, loop, refused
from _part import Part, Tally
from torch import Tensor

import ltkernels as ltk

F, NN = ltk.functional, ltk.nn
# Of an array's largest entry: one rounding to 16 bits, or the exponentials of float32 and their sums.
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 3e-3}


def shape_of(draw: Draw) -> tuple[int, int]:
    big = draw.chance(0.05)
    classes = draw.say("C", draw.choice([2047, 2048, 2049, 4100]) if big else draw.size(130))
    return draw.say("N", draw.size(3 if big else 12, 0.05)), classes


def logits_of(draw: Draw, rows: int, classes: int, dtype: torch.dtype, masked: Tensor | None = None) -> Tensor:
    z = draw.normal(rows, classes) * draw.choice([0.1, 1.0, 3.0, 10.0]) + draw.choice([0.0, 0.0, 40.0])
    if masked is not None:
        z[:, masked] = -torch.inf
    return z.to(dtype)


def table(draw: Draw, classes: int, low: float, high: float, real: torch.dtype) -> Tensor:
    return draw.layout(draw.uniform(classes, low=low, high=high).to(real))


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, what: str, extra: float = 0.0) -> None:
    wanted = wanted.detach().double()
    size = float(wanted.abs().nan_to_num(posinf=0.0, neginf=0.0).amax()) if wanted.numel() else 0.0
    torch.testing.assert_close(
        found.detach().double(),
        wanted,
        rtol=CLOSE[dtype],
        atol=CLOSE[dtype] * (size + 1e-3) + extra,
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )


def compare(
    draw: Draw, call: Any, leaves: list[Tensor], dtype: torch.dtype, extra: float = 0.0, slope: float = 1.0
) -> None:
    """`call` of the leaves as they are, and of the leaves in float64, with a random upstream gradient. A gradient is a difference of
    probabilities, which may cancel: `slope` is the factor that multiplies it, whose rounding is allowed for."""
    x = [draw.layout(leaf).requires_grad_() for leaf in leaves]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    loss, wanted = call(x, False), call(exact, True)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == wanted.shape
    close(loss, wanted, torch.float32 if dtype != torch.float64 else dtype, "loss", extra)
    upstream = draw.normal(*loss.shape) + 1.5
    slope *= 8 * torch.finfo(loss.dtype).eps * float(upstream.abs().max()) if upstream.numel() else 0.0
    found = torch.autograd.grad(loss, x, upstream.to(loss.dtype))
    for a, b in zip(found, torch.autograd.grad(wanted, exact, upstream.to(loss.dtype).double()), strict=True):
        assert a.dtype == dtype
        close(a, b, dtype, "gradient", slope)


def doubled(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}


def options_of(draw: Draw, rows: int, classes: int, real: torch.dtype) -> dict[str, Any]:
    out: dict[str, Any] = {"reduction": draw.say("reduction", draw.choice(REDUCTIONS))}
    if draw.chance(0.4):
        out["shift"] = table(draw, classes, -8.0, 1.0, real)
    if draw.chance(0.4):
        out["scale"] = table(draw, classes, 0.1, 2.0, real)
    if rows and draw.chance(0.4):
        out["sample_weight"] = table(draw, rows, 0.1, 2.0, real)
    return out


def largest(options: dict[str, Any]) -> float:
    """The largest factor of a gradient among them."""
    tables = [options.get(name) for name in ("scale", "sample_weight", "weight")]
    return math.prod(float(each.max()) for each in tables if each is not None and each.numel())


def soft(seed: int, cases: int) -> Tally:
    def one(draw: Draw) -> None:
        dtype = draw.say("dtype", draw.choice(DTYPES))
        real = torch.float64 if dtype == torch.float64 else torch.float32
        rows, classes = shape_of(draw)
        masked = draw.uniform(classes) < 0.1 if draw.say("masked", draw.chance(0.2)) else None
        if masked is not None and bool(masked.all()):
            masked = None
        z = logits_of(draw, rows, classes, dtype, masked)
        options = options_of(draw, rows, classes, real)
        if draw.say("teacher", draw.chance(0.5)):
            t = draw.layout(logits_of(draw, rows, classes, draw.choice([dtype, torch.float32]), masked))
            temperature = draw.say("T", draw.choice([0.5, 1, 2.0, 8.0]))
            if draw.chance(0.15):
                refused(lambda: F.distillation(z, t, draw.choice([0.0, -1.0, math.nan])))
                refused(lambda: F.distillation(z, torch.zeros(rows + 1, classes)))
                refused(lambda: F.distillation(z, t, shift=torch.full((classes,), torch.nan)))
                return

            def call(leaves: list[Tensor], exact: bool) -> Tensor:
                if not exact:
                    return F.distillation(leaves[0], t, temperature, **options)
                # A gradient of the teacher comes from the reference.
                teacher = t.double().requires_grad_()
                return F.distillation(leaves[0], teacher, temperature, detach_teacher=False, **doubled(options))

            # A divergence is the difference of two sums, each of up to log C, that the temperature's square multiplies.
            rounding = 2 * torch.finfo(real).eps * temperature**2 * math.log(max(classes, 2)) * max(rows, 1)
            compare(draw, call, [z], dtype, rounding, temperature * largest(options))
            return
        q = draw.uniform(rows, classes, high=draw.choice([1.0, 1.0 / classes]))
        q[draw.uniform(rows, classes) < draw.choice([0.0, 0.5, 0.95])] = 0.0
        if masked is not None:
            q[:, masked] = 0.0
        q = q.to(draw.choice([dtype, torch.float32]))
        if masked is None and draw.chance(0.3):
            options["label_smoothing"] = 0.1
        if draw.chance(0.3):
            options["weight"] = table(draw, classes, 0.1, 2.0, real)
        if rows and draw.chance(0.2):
            bad = q.clone()
            bad[draw.randrange(rows), draw.randrange(classes)] = draw.choice([-1e-3, math.nan, math.inf])
            for backend in (None, "torch"):
                refused(lambda backend=backend: F.adjusted_cross_entropy(z, bad, backend=backend))
            return
        given = draw.layout(q)

        def with_q(leaves: list[Tensor], exact: bool) -> Tensor:
            said = {**doubled(options), "backend": "torch"} if exact else options
            return F.adjusted_cross_entropy(leaves[0], q.double() if exact else given, **said)

        compare(draw, with_q, [z], dtype, slope=largest(options) * float(q.sum(1).max()) if rows else 0.0)

    return loop(seed, cases, one)


def heads(seed: int, cases: int) -> Tally:
    """Distillation of a head, and class probabilities of one, in chunks of any size, against the logits' in float64."""

    def one(draw: Draw) -> None:
        dtype = draw.say("dtype", draw.choice(DTYPES))
        real = torch.float64 if dtype == torch.float64 else torch.float32
        rows, classes = shape_of(draw)
        normalize = draw.say("normalize", draw.chance(0.3))
        # The cosine of two numbers is a sign, whose gradient is nothing but rounding.
        width = draw.say("D", draw.size(20) + normalize)
        options = options_of(draw, rows, classes, real)
        leaves = [draw.normal(rows, width).to(dtype), draw.normal(classes, width).to(dtype)]
        if draw.say("bias", draw.chance(0.5)):
            leaves.append(draw.normal(classes).to(dtype))
        chunk_rows = draw.say("chunk_rows", draw.choice([None, 0, 1, 2, 5]))
        most = max([float(leaf.abs().max()) for leaf in leaves if leaf.numel()], default=1.0)

        def logits(given: list[Tensor]) -> Tensor:
            x, w = (torch.nn.functional.normalize(each, dim=1) if normalize else each for each in given[:2])
            return torch.nn.functional.linear(x, w, given[2] if len(given) > 2 else None)

        def operands(given: list[Tensor]) -> dict[str, Any]:
            bias = given[2] if len(given) > 2 else None
            return {"features": given[0], "weight": given[1], "bias": bias, "normalize": normalize}

        if draw.say("teacher", draw.chance(0.6)):
            kind = draw.choice([dtype, torch.float32])
            t, v = draw.normal(rows, 3).to(kind), draw.normal(classes, 3).to(kind)
            teacher_bias = draw.normal(classes).to(kind) if draw.chance(0.5) else None
            exact_t = torch.nn.functional.linear(t.double(), v.double())
            exact_t = exact_t if teacher_bias is None else exact_t + teacher_bias.double()
            given: dict[str, Any] = {
                "teacher": draw.layout(t),
                "teacher_weight": draw.layout(v),
                "teacher_bias": teacher_bias,
            }
            if draw.say("teacher's logits", draw.chance(0.2)):
                t = exact_t.to(kind)
                given, exact_t = {"teacher": draw.layout(t)}, t.double()
            temperature = draw.say("T", draw.choice([0.5, 1, 2.0, 8.0]))
            if draw.chance(0.15):
                run = lambda **other: F.linear_distillation(**{**operands(leaves), **given, **other})  # noqa: E731
                refused(lambda: run(temperature=draw.choice([0.0, -1.0, math.nan])))
                refused(lambda: run(teacher=torch.zeros(rows + 1, 3)))
                refused(lambda: run(chunk_rows=-1))
                refused(lambda: run(shift=torch.full((classes + 1,), 0.0)))
                return

            def distill(given_leaves: list[Tensor], exact: bool) -> Tensor:
                if exact:
                    teacher = exact_t.clone().requires_grad_()  # whose gradient the reference computes
                    z = logits(given_leaves)
                    return F.distillation(z, teacher, temperature, detach_teacher=False, **doubled(options))
                own = operands(given_leaves)
                return F.linear_distillation(**own, **given, temperature=temperature, chunk_rows=chunk_rows, **options)

            rounding = 2 * torch.finfo(real).eps * temperature**2 * 8 * math.log(max(classes, 2)) * max(rows, 1)
            compare(draw, distill, leaves, dtype, rounding, temperature * largest(options) * most)
            return
        q = draw.uniform(rows, classes)
        q[draw.uniform(rows, classes) < 0.5] = 0.0
        q = q.to(draw.choice([dtype, torch.float32]))
        if rows and draw.chance(0.2):
            bad = q.clone()
            bad[draw.randrange(rows), draw.randrange(classes)] = draw.choice([-1e-3, math.nan, math.inf])
            refused(lambda: F.linear_adjusted_cross_entropy(**operands(leaves), target=bad, chunk_rows=chunk_rows))
            return
        probabilities = draw.layout(q)

        def soft_head(given_leaves: list[Tensor], exact: bool) -> Tensor:
            if exact:
                return F.adjusted_cross_entropy(logits(given_leaves), q.double(), backend="torch", **doubled(options))
            own = operands(given_leaves)
            return F.linear_adjusted_cross_entropy(**own, target=probabilities, chunk_rows=chunk_rows, **options)

        compare(draw, soft_head, leaves, dtype, slope=largest(options) * most * float(q.sum(1).max()) if rows else 0.0)

    return loop(seed, cases, one)


def experts(seed: int, cases: int) -> Tally:
    def one(draw: Draw) -> None:
        dtype = draw.say("dtype", draw.choice(DTYPES))
        real = torch.float64 if dtype == torch.float64 else torch.float32
        rows, classes = shape_of(draw)
        many = draw.say("E", draw.randint(1, 8 if classes < 200 else 3))
        coupling = draw.say("coupling", draw.choice(["mean_kl", "mutual_kl", "sum"]))
        z = [logits_of(draw, rows, classes, dtype) for _ in range(many)]
        y = draw.integers(0, classes, rows)
        y = torch.where(draw.uniform(rows) < 0.15, -100, y)
        ranges = {
            "shift": (-8.0, 1.0),
            "scale": (0.1, 2.0),
            "margin": (-1.0, 3.0),
            "row_scale": (0.5, 2.0),
            "weight": (0.1, 3.0),
        }
        tables = [
            {name: table(draw, classes, *span, real) for name, span in ranges.items() if draw.chance(0.3)} for _ in z
        ]
        options: dict[str, Any] = {
            "coupling": coupling,
            "factor": draw.say("factor", draw.choice([-0.2, 0.6, 1.0])),
            "reduction": draw.say("reduction", draw.choice(REDUCTIONS)),
            "label_smoothing": draw.choice([0.0, 0.1]),
        }
        if rows and draw.chance(0.3):
            options["sample_weight"] = table(draw, rows, 0.1, 2.0, real)
        if draw.chance(0.3):
            options["expert_factors"] = [draw.choice([0.0, 0.5, 1.0]) for _ in z]
        if coupling != "sum":
            options["adjusted"] = draw.say("adjusted", draw.chance(0.4))
            by_class = not options["adjusted"] and draw.chance(0.3)
            options["temperature"] = table(draw, classes, 0.5, 3.0, real) if by_class else draw.choice([1.0, 2.0])
        if draw.chance(0.1):
            run = lambda **other: F.experts_cross_entropy(z, y, tables, **{**options, **other})  # noqa: E731
            refused(lambda: run(coupling="kl"))
            refused(lambda: run(temperature=0.0))
            refused(lambda: F.experts_cross_entropy([], y))
            refused(lambda: F.experts_cross_entropy(z, y, tables[1:]))
            if many > 1:
                refused(lambda: F.experts_cross_entropy([*z[1:], z[0][:, :0]], y))
            if rows:
                refused(lambda: F.experts_cross_entropy(z, y.clone().fill_(classes), tables, **options))
            return

        def call(leaves: list[Tensor], exact: bool) -> Tensor:
            if not exact:
                given = torch.stack(leaves) if draw.chance(0.3) else leaves
                return F.experts_cross_entropy(given, y, tables, **options)
            said = doubled(options)
            weights = said.pop("expert_factors", None)
            made = ltk.losses.experts._checked(
                leaves, y, [doubled(each) for each in tables], expert_factors=weights, **said
            )
            return ltk.losses._experts.reference(tuple(leaves), made.fused)[0]

        # A divergence is a difference of logits, whatever they have in common.
        most = max([float(each.abs().max()) for each in z if each.numel()], default=0.0)
        compare(draw, call, z, dtype, 8 * torch.finfo(real).eps * most * many, 2.0 * many)

    return loop(seed, cases, one)


def expert_modules(seed: int, cases: int) -> Tally:
    names = ("SADE", "BalPoE", "RIDE", "NCL", "ResLT", "MDCS")

    def one(draw: Draw) -> None:
        name = draw.say("loss", names[draw.case % len(names)])
        classes, rows = draw.say("C", draw.size(40)), draw.say("N", draw.randint(1, 6))
        counts = draw.counts(classes)
        dtype = draw.choice(DTYPES)
        options = {"hard": draw.randint(1, classes), "hard_masked": draw.chance(0.5)} if name == "NCL" else {}
        loss = getattr(NN, name)(counts, **options)
        z = [logits_of(draw, rows, classes, dtype).requires_grad_() for _ in range(3)]
        y = draw.integers(0, classes, rows)
        if name == "MDCS" and draw.chance(0.5):
            value = loss(z, y, [each.detach() + 1 for each in z])
        else:
            value = loss(z, y)
        assert bool(value.isfinite()), f"{value}"
        assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(value, z))
        assert loss.predict(z).shape == (rows, classes)
        refused(lambda: getattr(NN, name)([*counts, -1], **options))
        if classes > 1:
            refused(lambda: loss([each.detach() for each in z], y.clone().fill_(classes)))

    return loop(seed, cases, one)


PARTS = (
    Part(
        "soft targets",
        "class probabilities and distillation against torch in float64, spoiled calls refused",
        400,
        soft,
    ),
    Part("soft heads", "both of a classifier in chunks, the same", 300, heads),
    Part("experts", "coupled experts, the same", 300, experts),
    Part("expert modules", "the Modules of experts, for finite answers and refusals", 120, expert_modules),
)
