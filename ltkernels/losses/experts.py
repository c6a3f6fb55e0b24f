"""Several experts on one batch: their cross-entropies, each with tables of its own, and what couples them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends, _checks
from .._errors import ArgumentError, DTypeError
from .._watch import transforms
from . import _experts
from ._adjustment import Adjustment
from ._core import adjusted_cross_entropy, explain
from ._experts import COUPLINGS, TABLES

Adjustments = Sequence[Adjustment | Mapping[str, Any] | None]
_NOT_CUDA = "there is no CUDA kernel for coupled experts"


def experts_cross_entropy(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    adjustments: Adjustments | None = None,
    *,
    coupling: str = "none",
    factor: float = 1.0,
    temperature: float | Tensor = 1.0,
    adjusted: bool = False,
    joint: Adjustment | None = None,
    expert_factors: Sequence[float] | None = None,
    hard: int | None = None,
    hard_factor: float | None = None,
    hard_masked: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""The cross-entropies of E experts, each with its own tables, plus `factor` times a term that couples them:

    .. math::
        L_i = \sum_e f_e \, \mathrm{CE}(z_{ei}; \text{adjustment}_e) + \lambda K_i

    With ``p_e = softmax(z_e / T)`` the coupling K is

    - ``"none"``: 0 (SADE, BalPoE). The loss is the sum of the single calls, to the bit;
    - ``"mean_kl"``: ``T^2 sum_e KL(p || p_e)``, p the softmax of the mean of the experts' ``z / T``, a constant for autograd (RIDE);
    - ``"mutual_kl"``: ``T^2 / (E - 1) sum over e != f of KL(p_f || p_e)``, both sides with their gradients (NCL); 0 for one expert;
    - ``"sum"``: the cross-entropy, with the tables `joint`, of the sum of the experts' logits (ResLT).

    A row's E x C logits are read from memory once, and every expert's gradient is formed beside the loss.

    Args:
        logits: E tensors (N, C), or one (E, N, C); float32, float64, bfloat16 or float16. The kernel takes up to 8 experts.
        target: (N,) class indices.
        adjustments: one for each expert, from the builders of `ltkernels.adjustments`, or None for plain cross-entropy. Closed forms
            only without coupling.
        coupling: as above.
        factor: lambda; it may be negative (RIDE pushes its experts apart).
        temperature: T, above 0; or (C,), by which each class' logits are divided, and whose mean takes the place of T in T^2 (RIDE).
        adjusted: whether the coupling compares the logits with each expert's scale and shift (NCL), or as they are.
        joint: tables of the loss of the sum, for ``coupling="sum"``.
        expert_factors: f_e, one for each expert; None is 1.
        hard: adds the same loss once more on the `hard` classes alone that are hardest in each row: the label and those with the largest
            logits of the first expert (NCL). Adjustments of shift and scale only.
        hard_factor: the coupling's factor there; None is `factor`.
        hard_masked: whether the other classes are left out. False multiplies their adjusted logits by 0, as the public code of NCL
            does, after which each still weighs exp(0).
        label_smoothing, ignore_index, reduction, sample_weight: as in `adjusted_cross_entropy`, for every expert. Each expert's loss is
            reduced by itself, and so is the coupling, whose mean divides by the sum of the sample weights. ``"none"`` gives the rows.

    Returns:
        The loss, float64 for float64 logits and float32 for all others; with ``reduction="none"`` the experts' rows, (E, N), and with a
        coupling one row more, (E + 1, N), for the coupling; the factors are in them.

    A KL is infinite where an expert has removed a class that another has not. On a GPU Triton's kernel computes coupled experts. Second
    derivatives, gradients with respect to tables, experts with different focal_gamma on a GPU, and a GPU without Triton, are the plain
    torch reference's; `ltkernels.explain` says so.

    Raises:
        ValueError: no experts, shapes or devices that differ, an unknown coupling, options that do not belong to it or are out of range,
            a label out of range, a table entry that is not finite.
        TypeError: a dtype that does not fit.

    Example:
        >>> logits = torch.tensor([[[1.0, 0.5, -0.5]], [[0.0, 1.0, 0.5]]])
        >>> loss = ltk.functional.experts_cross_entropy(logits, torch.tensor([2]), coupling="mean_kl", factor=-0.2)
        >>> round(loss.item(), 4)
        3.2521
    """
    call = _checked(
        logits, target, adjustments, coupling, factor, temperature, adjusted, joint, expert_factors, label_smoothing,
        ignore_index, reduction, sample_weight,
    )  # fmt: skip
    loss = _separate(call) if call.fused is None else _experts.run(call.given, call.fused)
    if hard is None:
        return loss
    return loss + _of_hard_classes(call, hard, factor if hard_factor is None else hard_factor, hard_masked)


class _Checked(NamedTuple):
    """experts: E logits (N, C). given: what the operator gets, one (E, N, C) or the experts. fused: its record, None without coupling.
    options: the keywords of each expert's own call."""

    experts: list[Tensor]
    given: Sequence[Tensor]
    target: Tensor
    options: list[dict[str, Any]]
    factors: list[float]
    coupling: str
    temperature: float | Tensor
    shared: dict[str, Any]
    fused: _experts.Experts | None


def _checked(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    adjustments: Adjustments | None = None,
    coupling: str = "none",
    factor: float = 1.0,
    temperature: float | Tensor = 1.0,
    adjusted: bool = False,
    joint: Adjustment | None = None,
    expert_factors: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> _Checked:
    experts, given = _logits(logits)
    first = experts[0]
    if not isinstance(target, Tensor):
        raise DTypeError(f"target is {type(target).__name__}; it must be a tensor of class indices")
    if _checks.target(target, first):
        raise DTypeError(f"target has dtype {target.dtype}; experts take class indices")
    if coupling not in COUPLINGS:
        raise ArgumentError(f"coupling is {coupling!r}; it must be one of {', '.join(map(repr, COUPLINGS))}")
    options = _options(adjustments, len(experts))
    factor = _checks.number("factor", factor)
    factors = [1.0] * len(experts)
    if expert_factors is not None:
        if len(expert_factors) != len(experts):
            raise ArgumentError(f"expert_factors has {len(expert_factors)} entries; there are {len(experts)} experts")
        factors = [_checks.number(f"expert_factors[{e}]", value) for e, value in enumerate(expert_factors)]
    if joint is not None and coupling != "sum":
        raise ArgumentError(f"joint is given; it belongs to coupling='sum', and coupling is {coupling!r}")
    if adjusted and coupling not in ("mean_kl", "mutual_kl"):
        raise ArgumentError(f"adjusted is True; it belongs to a KL, and coupling is {coupling!r}")
    real = _checks.real_dtype(first.dtype)
    sharpness, inverse, square = _temperature(temperature, first, adjusted)
    shared = {
        "label_smoothing": _checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0),
        "ignore_index": _checks.integer("ignore_index", ignore_index),
        "reduction": reduction,
        "sample_weight": sample_weight,
    }
    code = _checks.reduction(reduction)
    fused = None
    if coupling != "none":
        every = [*options, {} if joint is None else dict(joint._asdict())] if coupling == "sum" else options
        names = [f"adjustments[{e}]" for e in range(len(options))] + ["joint"]
        own = sample_weight
        if own is not None:
            own = _checks.rows("sample_weight", own, target.shape, first.device, real).contiguous()
        for whose, each in zip(names, every, strict=False):
            for name in each:
                if name not in (*TABLES, "focal_gamma"):
                    raise ArgumentError(f"{whose} has {name}, which coupled experts do not take")
        tables = [_stack(name, every, names, first, real) for name in TABLES]
        gammas = [_checks.number("focal_gamma", each.get("focal_gamma", 0.0), low=0.0) for each in every]
        fused = _experts.Experts._make(
            (
                target.long().contiguous(), *tables, own, inverse, tuple(gammas),
                (*factors, factor * (1.0 if coupling == "sum" else square)), shared["label_smoothing"],
                shared["ignore_index"], code, COUPLINGS.index(coupling), sharpness, adjusted, "cpu",
            )
        )  # fmt: skip
        backend = _backends.choose(None, first.device, _experts.needs_torch(given[0], fused), _NOT_CUDA)
        fused = fused._replace(backend=backend)
    return _Checked(experts, given, target, options, factors, coupling, temperature, shared, fused)


def _logits(logits: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
    """The experts' logits (N, C), and the tensors to hand on: one (E, N, C), or the experts."""
    if isinstance(logits, Tensor):
        _checks.logits(logits)
        if logits.dim() != 3:
            raise ArgumentError(f"logits has shape {tuple(logits.shape)}; it must be (E, N, C), or E tensors (N, C)")
        if logits.shape[0] == 0:
            raise ArgumentError(f"logits has shape {tuple(logits.shape)}; there must be at least one expert (E)")
        return list(logits.unbind(0)), [logits]
    if not isinstance(logits, Sequence) or not all(isinstance(each, Tensor) for each in logits):
        raise DTypeError(f"logits is {type(logits).__name__}; it must be a tensor (E, N, C) or E tensors (N, C)")
    if not logits:
        raise ArgumentError("logits is empty; there must be at least one expert")
    first = logits[0]
    for e, each in enumerate(logits):
        _checks.logits(each)
        if each.dim() != 2 or each.shape != first.shape:
            wanted = "(N, C)" if e == 0 or first.dim() != 2 else f"{tuple(first.shape)}, that of logits[0]"
            raise ArgumentError(f"logits[{e}] has shape {tuple(each.shape)}; it must be {wanted}")
        if each.dtype != first.dtype or each.device != first.device:
            raise ArgumentError(
                f"logits[{e}] is {each.dtype} on {each.device}, logits[0] {first.dtype} on {first.device}; all must be alike"
            )
    experts = list(logits)
    return experts, experts if len(experts) <= _experts.MOST else [torch.stack(experts)]


def _options(adjustments: Adjustments | None, experts: int) -> list[dict[str, Any]]:
    if adjustments is None:
        return [{} for _ in range(experts)]
    if isinstance(adjustments, tuple) and hasattr(adjustments, "_asdict"):
        raise DTypeError(f"adjustments is one {type(adjustments).__name__}; it must be a sequence, one for each expert")
    if len(adjustments) != experts:
        raise ArgumentError(f"adjustments has {len(adjustments)} entries; there are {experts} experts")
    found = []
    for e, each in enumerate(adjustments):
        given: Any = {} if each is None else each if isinstance(each, Mapping) else getattr(each, "_asdict", None)
        if given is None:
            raise DTypeError(f"adjustments[{e}] is {type(each).__name__}; it must be an Adjustment or None")
        given = given() if callable(given) else given
        found.append({name: value for name, value in given.items() if value is not None})
    return found


def _temperature(temperature: float | Tensor, like: Tensor, adjusted: bool) -> tuple[float, Tensor | None, float]:
    """1 / T or 1; (C,) of 1 / T_j or None; T^2."""
    if not isinstance(temperature, Tensor):
        number = _checks.number("temperature", temperature, above=0.0)
        return 1 / number, None, number**2
    if adjusted:
        raise ArgumentError("temperature is a table; with adjusted=True it must be a number")
    table = _checks.table("temperature", temperature, like.shape[1], like.device, _checks.real_dtype(like.dtype))
    if not torch.compiler.is_compiling() and table.is_cpu:
        bad = ~((table > 0) & (table < torch.inf))
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ArgumentError(f"temperature[{at}] is {table[at].item()}; it must be above 0 and finite")
    return 1.0, 1 / table, float(table.detach().double().mean()) ** 2


def _stack(
    name: str, every: Sequence[Mapping[str, Any]], names: Sequence[str], like: Tensor, real: torch.dtype
) -> Tensor | None:
    """(E, C) of one table of all experts, None where none has it."""
    if not any(name in each for each in every):
        return None
    classes = like.shape[1]
    found = [
        _checks.table(f"{whose}.{name}", each[name], classes, like.device, real) if name in each else None
        for whose, each in zip(names, every, strict=False)
    ]
    if found[0] is not None and all(table is found[0] for table in found):
        return found[0].expand(len(found), classes)
    neutral = torch.full((classes,), 0.0 if name in ("shift", "margin") else 1.0, dtype=real, device=like.device)
    return torch.stack([neutral if table is None else table for table in found])


def _separate(call: _Checked) -> Tensor:
    """The experts' own losses, each by a call of its own."""
    losses = []
    for z, options, factor in zip(call.experts, call.options, call.factors, strict=True):
        ahead = factor > 0 and factor != 1.0 and call.shared["reduction"] != "none"
        said = {**call.shared, **options, **({"grad_scale": factor} if ahead else {})}
        loss = adjusted_cross_entropy(z, call.target, **said)
        losses.append(loss if factor == 1.0 else factor * loss)
    if call.shared["reduction"] == "none":
        return torch.stack(losses)
    return list(itertools.accumulate(losses))[-1]


def _of_hard_classes(call: _Checked, hard: int, factor: float, masked: bool) -> Tensor:
    """The loss once more, of each row's hardest classes."""
    classes = call.experts[0].shape[1]
    hard = _checks.integer("hard", hard)
    if not 1 <= hard <= classes:
        raise ArgumentError(f"hard is {hard}; it must be from 1 to the number of classes, {classes}")
    if call.coupling == "sum":
        raise ArgumentError("hard is given; the coupling 'sum' has no hard classes")
    for e, options in enumerate(call.options):
        for name in options:
            if name not in ("shift", "scale") and not (name == "focal_gamma" and options[name] == 0.0):
                raise ArgumentError(f"hard is given, and adjustments[{e}] has {name}; it takes shift and scale alone")
    ignored = call.shared["ignore_index"]
    valid = call.target != ignored
    label = torch.where(valid, call.target, 0).unsqueeze(1)
    # The label comes first of all, whatever its logit.
    chosen = call.experts[0].detach().scatter(1, label, torch.inf).topk(hard, dim=1).indices
    real = _checks.real_dtype(call.experts[0].dtype)
    inside = None if masked else torch.zeros_like(call.experts[0], dtype=torch.bool).scatter(1, chosen, True)
    logits = []
    for z, options in zip(call.experts, call.options, strict=True):
        a = z.to(real)
        a = a * options["scale"] if "scale" in options else a
        a = a + options["shift"] if "shift" in options else a
        logits.append(a.gather(1, chosen) if inside is None else torch.where(inside, a, 0))
    return experts_cross_entropy(
        logits,
        torch.where(valid, 0, ignored) if masked else call.target,
        coupling=call.coupling,
        factor=factor,
        temperature=call.temperature,
        expert_factors=call.factors,
        **call.shared,
    )


def _explain(logits: Tensor | Sequence[Tensor], target: Tensor, *arguments: Any, **options: Any) -> Any:
    """`ltkernels.explain` of the call."""
    for name in ("hard", "hard_factor", "hard_masked"):
        options.pop(name, None)
    call = _checked(logits, target, *arguments, **options)
    if call.fused is None:
        own = {name: value for name, value in call.shared.items() if value is not None}
        return explain(adjusted_cross_entropy, call.experts[0], call.target, **{**own, **call.options[0]})
    reason = transforms() or _experts.needs_torch(call.given[0], call.fused)
    return _backends.explain(None, call.experts[0].device, reason, _NOT_CUDA)


experts_cross_entropy.explain = _explain  # type: ignore[attr-defined]
