"""Coupled experts in one pass: the operator behind `ltkernels.functional.experts_cross_entropy`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends
from .._call import BATCH_MEAN, NONE, SUM, Call
from .._checks import real_dtype
from .._fused import Fused, Inputs, Request, by_backend
from .._native import _C
from .._watch import address, wants_gradient
from . import _reference
from ._soft import both

COUPLINGS = ("none", "mean_kl", "mutual_kl", "sum")  # the index is the code of csrc/cpu/experts.h
SUMMED = COUPLINGS.index("sum")
TABLES = ("shift", "scale", "margin", "row_scale", "weight", "label_scale")
MOST: int = _C.EXPERTS  # logits of the kernel


class Experts(NamedTuple):
    """A checked call on E experts' logits (N, C). Tables are (E, C) real, or (E + 1, C) with those of the sum's loss last, where the
    coupling is the sum; None is neutral.

    target: (N,) int64, contiguous.
    sample_weight: (N,) real.
    inverse_temperature: (C,) real, on the logits that the coupling compares; None is 1.
    focal_gamma: as many as the tables have rows.
    factors: E and the coupling's.
    sharpness: factor on the logits that the coupling compares, 1 / T.
    adjusted: whether it compares ``scale * logits + shift``.
    backend: whose kernel computes it, of `ltkernels._backends.BACKENDS`; there is none for CUDA.
    """

    target: Tensor
    shift: Tensor | None
    scale: Tensor | None
    margin: Tensor | None
    row_scale: Tensor | None
    weight: Tensor | None
    label_scale: Tensor | None
    sample_weight: Tensor | None
    inverse_temperature: Tensor | None
    focal_gamma: tuple[float, ...]
    factors: tuple[float, ...]
    label_smoothing: float
    ignore_index: int
    reduction: int
    coupling: int
    sharpness: float
    adjusted: bool
    backend: str = "cpu"

    def tables(self) -> tuple[Tensor | None, ...]:
        return self.shift, self.scale, self.margin, self.row_scale, self.weight, self.label_scale

    def of(self, expert: int) -> Call:
        """The call of one expert alone, or of the sum's loss after the last."""
        tables: dict[str, Any] = {
            n: None if t is None else t[expert] for n, t in zip(TABLES, self.tables(), strict=True)
        }
        return Call(
            self.target,
            **tables,
            sample_weight=self.sample_weight,
            focal_gamma=self.focal_gamma[expert],
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


def experts_of(inputs: Inputs) -> list[Tensor]:
    """E logits (N, C) from one (E, N, C) or E tensors."""
    first = inputs[0]
    assert first is not None
    return list(first.unbind(0)) if first.dim() == 3 else [each for each in inputs if each is not None]


def run(logits: Sequence[Tensor], call: Experts) -> Tensor:
    """The loss of checked arguments; `logits` is one (E, N, C) or up to `MOST` (N, C)."""
    given: list[Tensor | None] = [*logits, *[None] * (MOST - len(logits))]
    return _OPERATOR(tuple(given), call)[0]


def reference(inputs: Inputs, call: Experts) -> tuple[Tensor]:
    """In plain torch."""
    logits = experts_of(inputs)
    terms = [
        factor * _reference.adjusted_cross_entropy(z, call.of(e))
        for e, (z, factor) in enumerate(zip(logits, call.factors, strict=False))
    ]
    terms.append(call.factors[-1] * _coupling(logits, call))
    return (torch.stack(terms) if call.reduction == NONE else _add_up(terms),)


def _add_up(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _coupling(logits: list[Tensor], call: Experts) -> Tensor:
    real = real_dtype(logits[0].dtype)
    if call.coupling == SUMMED:
        return _reference.adjusted_cross_entropy(_add_up([z.to(real) for z in logits]), call.of(len(logits)))
    u = []
    for e, z in enumerate(logits):
        a = z.to(real)
        if call.adjusted:
            a = a if call.scale is None else a * call.scale[e]
            a = a if call.shift is None else a + call.shift[e]
        elif call.inverse_temperature is not None:
            a = a * call.inverse_temperature
        u.append(a * call.sharpness)
    log_p = [torch.log_softmax(a, dim=1) for a in u]
    if COUPLINGS[call.coupling] == "mean_kl":
        mean = torch.log_softmax(_add_up(u) / len(u), dim=1).detach()
        rows = _add_up([_kl(mean, each) for each in log_p])
    else:
        pairs = [_kl(p, q) for p in log_p for q in log_p if p is not q]
        rows = _add_up(pairs) / (len(u) - 1) if pairs else log_p[0].sum(dim=1) * 0
    valid = call.target != call.ignore_index
    own = torch.ones_like(rows) if call.sample_weight is None else call.sample_weight
    own = torch.where(valid, own, 0)
    rows = torch.where(valid, rows * own, 0)
    if call.reduction == NONE:
        return rows
    if call.reduction == SUM:
        return rows.sum()
    return rows.sum() / (valid.sum() if call.reduction == BATCH_MEAN else own.sum())


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N,) KL(p || q); a class that p does not have adds nothing."""
    p = log_p.exp()
    return (p * torch.where(p == 0, 0, log_p - log_q)).sum(dim=1)


def needs_torch(logits: Tensor, call: Experts) -> str:
    """Why no kernel serves a call; empty where one does. `logits` is one expert's, or those of all."""
    if logits.shape[-1] == 0:
        return "there is no class"
    if logits.dim() == 3 and logits.shape[0] > MOST:
        return f"more than {MOST} experts"
    for name, table in zip((*TABLES, "sample_weight", "temperature"), call[1:9], strict=True):
        if wants_gradient((table,)):
            return f"gradient with respect to {name}"
    if not logits.is_cpu and len(set(call.focal_gamma)) > 1:
        return "experts with different focal_gamma, which the CPU kernel alone computes"
    return ""


def _kernel(inputs: Inputs, call: Experts, request: Request) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    logits = [z if z.stride(1) == 1 or z.shape[1] == 1 else z.contiguous() for z in experts_of(inputs)]
    first = logits[0]
    rows, classes = first.shape
    real = real_dtype(first.dtype)
    dtype = _backends.DTYPE_CODES[first.dtype]
    grads: list[Tensor | None] = [
        torch.empty(x.shape, dtype=real) if need and x is not None else None
        for x, need in zip(inputs, request.needs, strict=True)
    ]
    together = inputs[0] is not None and inputs[0].dim() == 3
    of_experts: list[Tensor | None] = grads[: len(logits)]
    if together:
        whole = grads[0]
        of_experts = [None] * len(logits) if whole is None else list(whole.unbind(0))
    coef: Sequence[Tensor | None] = [None] * (len(logits) + 1)
    if request.upstream is not None:
        upstream = request.upstream[0].to(real)
        coef = list(upstream.expand(len(coef), rows).contiguous().unbind(0))
    own = None if call.sample_weight is None else call.sample_weight.to(real).contiguous()
    held: list[Any] = []  # tables that the jobs point at
    given = any(table is not None for table in call.tables())

    def job(e: int, z: Tensor | None, grad: Tensor | None) -> Any:
        where = (0, 0) if z is None else (address(z, f"logits[{e}]"), z.stride(0))
        made = _C.AdjustedCe(dtype, *where, rows, classes, address(call.target, "target"), call.ignore_index)
        label_scale = 0
        if z is not None or call.coupling == SUMMED:
            made.options(call.focal_gamma[e], call.label_smoothing)
            if given:
                tables = [None if t is None else t[e].to(real).contiguous() for t in call.tables()]
                tables[:2] = both(tables[0], tables[1], classes, real)
                held.append(tables)
                *five, label_scale = (address(t, name) for t, name in zip(tables, TABLES, strict=True))
                made.tables(*five)
        made.inputs(address(own, "sample_weight"), 0, label_scale)
        to = (0, 0) if grad is None else (address(grad, "gradient"), classes)
        made.gradient(*to, address(coef[e], "the upstream gradient"))
        return made

    inverse = None if call.inverse_temperature is None else call.inverse_temperature.to(real).contiguous()
    together_job = _C.Experts(dtype, call.coupling, call.adjusted, call.sharpness, address(inverse, "temperature"))
    for e, (z, grad) in enumerate(zip(logits, of_experts, strict=True)):
        together_job.add(job(e, z, grad), call.factors[e])
    together_job.joint(job(len(logits), None, None), call.factors[-1])
    threads = torch.get_num_threads()
    per_thread = _C.experts_scratch(len(logits), classes)
    count = (len(logits) + 1) * rows
    unreduced = call.reduction == NONE
    loss = torch.empty((len(logits) + 1, rows) if unreduced else (), dtype=real)
    scratch = torch.empty(threads * per_thread + (0 if unreduced else count), dtype=real)
    row_loss = loss if unreduced else scratch[threads * per_thread :]
    status = together_job.run(call.reduction, row_loss.data_ptr(), loss.data_ptr(), scratch.data_ptr(), threads)
    if status != -1:
        raise _refusal(status, call, classes)
    return (loss,), grads


def _refusal(status: int, call: Experts, classes: int) -> Exception:
    if status >= 0:
        return _backends.bad_label("target", int(call.target[status]), status, classes, call.ignore_index)
    expert, table = divmod(-2 - status, len(TABLES) + 2)  # label smoothing and sample weights are counted too
    found = _backends.bad_table(table, call.of(expert))
    return found if "sample_weight" in str(found) else type(found)(f"adjustments[{expert}]: {found}")


_OPERATOR = Fused(
    "experts",
    "Tensor logits, " + ", ".join(f"Tensor? logits{e}" for e in range(1, MOST)),
    Experts,
    1,
    by_backend(_kernel, triton="experts.experts"),
    lambda inputs, call: [(len(experts_of(inputs)) + 1, call.target.shape[0]) if call.reduction == NONE else ()],
    reference,
    lambda inputs, call: call.backend != "torch",
)
