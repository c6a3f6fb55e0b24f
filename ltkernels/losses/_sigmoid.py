"""The general sigmoid loss: a binary cross-entropy a class with its own factors, for multi-label targets and for class indices.

`sigmoid_cross_entropy` is its door, `_sigmoid_reference` its definition; csrc/cpu/sigmoid_ce.h and triton/sigmoid.py are the kernels. The
closed form ``"sigmoid"`` of `adjusted_cross_entropy` is this loss of class indices, with mixed targets, heads and CUDA kernels; it hands on
multi-label targets (`serves`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from .. import _backends, _checks
from .._backends._shared import DTYPE_CODES, bad_label
from .._call import NONE
from .._checks import real_dtype
from .._errors import ArgumentError, DTypeError
from .._fused import Fused, Inputs, Outputs, Request, by_backend
from .._native import _C
from .._watch import address, direct, wants_gradient
from ._sigmoid_reference import SigmoidCall, reference
from ._terms import Term

if TYPE_CHECKING:
    from typing_extensions import Unpack

_TABLES = ("scale", "shift", "positive", "negative", "weight")
_NOT_CUDA = "there is no CUDA kernel for multi-label targets and the general sigmoid loss"


def _kernel(inputs: Inputs, call: SigmoidCall, request: Request) -> tuple[Outputs, list[Tensor | None]]:
    logits, scale, shift, positive, negative, weight, own = inputs
    assert logits is not None
    z = logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
    rows, classes = z.shape
    real = real_dtype(z.dtype)
    job = _C.SigmoidCe(DTYPE_CODES[z.dtype], address(z, "logits"), z.stride(0), rows, classes, call.ignore_index)
    target = call.target
    if target.dim() == 1:
        job.labels(address(target, "target"), address(weight, "weight"))
    else:
        job.multi_label(address(target, "target"), target.stride(0), target.dtype == torch.uint8)
    if not (scale is shift is positive is negative is own is None):
        job.tables(
            address(scale, "scale"),
            address(shift, "shift"),
            address(positive, "positive"),
            address(negative, "negative"),
            address(own, "sample_weight"),
        )
    if call.threshold != 0.0 or call.negative_scale != 1.0 or call.focal_gamma != 0.0:
        job.options(call.threshold, call.negative_scale, call.focal_gamma)
    if call.rebalance is not None:
        job.rebalance(address(call.rebalance, "rebalance"), *call.rebalance_map)
    row_loss = torch.empty(rows, dtype=real)
    grad, upstream, factors = None, 1.0, None
    if request.needs[0]:
        grad = torch.empty((rows, classes), dtype=real)
        if request.upstream is not None and call.reduction == NONE:
            factors = request.upstream[0].contiguous()
        elif request.upstream is not None:
            upstream = request.upstream[0].item()
        job.gradient(address(grad, "grad"), address(factors, "grad_output"))
    statistics = torch.empty((2, classes) if call.statistics else 0, dtype=real)
    if call.statistics:
        columns = torch.empty(_C.sigmoid_ce_columns(rows, classes), dtype=real)
        job.statistics(statistics.data_ptr(), columns.data_ptr())
    loss = row_loss if call.reduction == NONE else torch.empty((), dtype=real)
    status = job.run(call.reduction, upstream, row_loss.data_ptr(), loss.data_ptr(), torch.get_num_threads())
    if status != -1:
        problem = _problem(inputs, call)
        assert problem is not None, f"status {status} of the kernel without a reason"
        raise problem
    return (loss, statistics), [grad, *[None] * 6]


def _shapes(inputs: Inputs, call: SigmoidCall) -> list[tuple[int, ...]]:
    assert inputs[0] is not None
    rows, classes = inputs[0].shape
    return [(rows,) if call.reduction == NONE else (), (2, classes) if call.statistics else (0,)]


_FUSED = Fused(
    "sigmoid_ce",
    "Tensor logits, Tensor? scale, Tensor? shift, Tensor? positive, Tensor? negative, Tensor? weight, Tensor? sample_weight",
    SigmoidCall,
    1,
    by_backend(_kernel, triton="sigmoid.sigmoid_ce"),
    _shapes,
    reference,
    lambda inputs, call: call.backend != "torch",
    beside=1,
)


def _problem(inputs: Inputs, call: SigmoidCall) -> ArgumentError | None:
    """The first label, entry, table or sample weight that cannot be. Looks at them."""
    logits, *tables, own = inputs
    assert logits is not None
    target = call.target
    for name, table in zip((*_TABLES, "rebalance"), (*tables, call.rebalance), strict=True):
        if table is None:
            continue
        good = torch.isfinite(table) | (table == -torch.inf if name == "shift" else False)
        good &= table > 0 if name == "rebalance" else True
        if not good.all():
            at = int((~good).nonzero()[0])
            wanted = {"shift": "finite or -inf", "rebalance": "finite and above 0"}.get(name, "finite")
            return ArgumentError(f"{name}[{at}] is {table[at].item()}; it must be {wanted}")
    if target.dim() == 1:
        counts = target != call.ignore_index
        bad = counts & ((target < 0) | (target >= logits.shape[1]))
        if bad.any():
            row = int(bad.nonzero()[0])
            return bad_label("target", int(target[row]), row, logits.shape[1], call.ignore_index)
    else:
        ignored = (target == -1) | (target == call.ignore_index)
        bad = ~((target == 0) | (target == 1) | ignored)
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            return ArgumentError(
                f"target[{row}, {column}] is {target[row, column].item():g}; entries of multi-label targets are 0, 1 and, where they "
                f"are to be ignored, -1 or ignore_index ({call.ignore_index})"
            )
        counts = ~ignored.all(1)
    if own is not None and (bad := counts & ~torch.isfinite(own)).any():
        row = int(bad.nonzero()[0])
        return ArgumentError(f"sample_weight is {own[row].item()} in row {row}; it must be finite")
    return None


def is_multi_label(logits: object, target: object) -> bool:
    """Whether a target of the sigmoid family has an entry for every logit."""
    return (
        isinstance(logits, Tensor) and isinstance(target, Tensor) and target.dim() > 0 and target.shape == logits.shape
    )


class SigmoidOptions(TypedDict, total=False):
    """The keywords of `sigmoid_cross_entropy` but `statistics`."""

    scale: Tensor | None
    shift: Tensor | None
    positive: Tensor | None
    negative: Tensor | None
    threshold: float
    focal_gamma: float
    negative_scale: float
    rebalance: Tensor | None
    rebalance_map: tuple[float, float, float]
    weight: Tensor | None
    sample_weight: Tensor | None
    ignore_index: int
    reduction: str
    backend: str | None


class _Checked(NamedTuple):
    inputs: Inputs
    call: SigmoidCall
    shape: tuple[int, ...]
    needs_torch: str


def _checked(
    logits: Tensor,
    target: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    positive: Tensor | None = None,
    negative: Tensor | None = None,
    threshold: float = 0.0,
    focal_gamma: float = 0.0,
    negative_scale: float = 1.0,
    rebalance: Tensor | None = None,
    rebalance_map: tuple[float, float, float] = (0.1, 10.0, 0.2),
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    statistics: bool = False,
    backend: str | None = None,
) -> _Checked:
    _checks.logits(logits)
    real, device, size = real_dtype(logits.dtype), logits.device, logits.shape
    classes = size[1 if len(size) > 1 else 0]
    code = _checks.reduction(reduction)
    ignore_index = _checks.integer("ignore_index", ignore_index)
    if not isinstance(target, Tensor):
        raise DTypeError(
            f"target is {type(target).__name__}; it must be a tensor of class indices or multi-label entries"
        )
    multi = is_multi_label(logits, target)
    if multi:
        if target.device != device:
            raise ArgumentError(f"target is on {target.device}, logits on {device}; both must be on one device")
        if target.layout is not torch.strided or target.is_complex():
            raise DTypeError(f"target has layout {target.layout} and dtype {target.dtype}; it must be strided and real")
        if ignore_index in (0, 1):
            raise ArgumentError(f"ignore_index is {ignore_index}, which is what entries of multi-label targets are")
        if weight is not None:
            raise ArgumentError(
                "weight is chosen by the label, and multi-label targets have none: give positive and negative, factors of the terms"
            )
    elif 0 < target.dim() == len(size):  # class indices have a dimension less
        raise ArgumentError(
            f"target has shape {tuple(target.shape)}; multi-label targets have the logits' shape {tuple(size)}, class "
            f"indices {tuple(size[:1] + size[2:]) if len(size) > 1 else ()}"
        )
    elif _checks.target(target, logits):
        raise AssertionError("a floating-point target of the logits' shape is a multi-label one")
    given = {"scale": scale, "shift": shift, "positive": positive, "negative": negative, "weight": weight}
    tables = [None if x is None else _checks.table(name, x, classes, device, real) for name, x in given.items()]
    if rebalance is not None:
        rebalance = _checks.table("rebalance", rebalance, classes, device, real)
    rows_shape = size[:1] + size[2:] if len(size) > 1 else size[:0]
    if sample_weight is not None:
        sample_weight = _checks.rows("sample_weight", sample_weight, rows_shape, device, real).reshape(-1).contiguous()
    threshold = _checks.number("threshold", threshold, low=0.0)
    if threshold >= 1.0:
        raise ArgumentError(f"threshold is {threshold}; it must lie in [0, 1)")
    if not isinstance(rebalance_map, tuple | list) or len(rebalance_map) != 3:
        raise ArgumentError(f"rebalance_map is {rebalance_map!r}; it must be three numbers: base, steepness, centre")
    mapped = tuple(_checks.number(f"rebalance_map[{at}]", each) for at, each in enumerate(rebalance_map))
    rows, entries = _rows(logits), _rows(target) if multi else target.reshape(-1)
    if multi:
        entries = entries.view(torch.uint8) if entries.dtype == torch.bool else entries
        entries = entries if entries.dtype in (torch.uint8, torch.float32) else entries.to(torch.float32)
        entries = entries if entries.stride(1) == 1 else entries.contiguous()
    else:
        entries = entries.long().contiguous()
    call = SigmoidCall(
        entries,
        rebalance,
        mapped,
        threshold,
        _checks.number("negative_scale", negative_scale, above=0.0),
        _checks.number("focal_gamma", focal_gamma, low=0.0),
        ignore_index,
        code,
        bool(statistics),
    )
    needs_torch = ""
    if classes == 0:
        needs_torch = "there is no class"
    elif wants_gradient((*tables, sample_weight, rebalance)):
        learned = zip((*_TABLES, "sample_weight", "rebalance"), (*tables, sample_weight, rebalance), strict=True)
        name = next(name for name, x in learned if wants_gradient((x,)))
        if name == "rebalance":
            raise ArgumentError("rebalance requires a gradient; it is a constant of the loss")
        needs_torch = f"gradient with respect to {name}"
    served = _backends.choose(backend, device, needs_torch, _NOT_CUDA)
    inputs: Inputs = (rows, *tables, sample_weight)
    if served == "torch" and logits.is_cpu and direct((*inputs, *call[:2])):
        problem = _problem(inputs, call)
        if problem is not None:
            raise problem
    return _Checked(inputs, call._replace(backend=served), tuple(rows_shape), needs_torch)


_checked.__qualname__ = "sigmoid_cross_entropy"  # as a wrong keyword is reported


def _rows(tensor: Tensor) -> Tensor:
    """(C,) and (N, C, d1, ...) to one row a sample."""
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)
    return tensor if tensor.dim() == 2 else tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


@overload
def sigmoid_cross_entropy(
    logits: Tensor, target: Tensor, *, statistics: Literal[False] = False, **options: Unpack[SigmoidOptions]
) -> Tensor: ...
@overload
def sigmoid_cross_entropy(
    logits: Tensor, target: Tensor, *, statistics: Literal[True], **options: Unpack[SigmoidOptions]
) -> tuple[Tensor, Tensor]: ...
def sigmoid_cross_entropy(
    logits: Tensor, target: Tensor, *, statistics: bool = False, **options: Unpack[SigmoidOptions]
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Binary cross-entropy of every class with its own factors, summed over the classes of a row; multi-label targets or class indices.

    .. math::
        a_{ij} = \beta_j z_{ij} + \delta_j, \quad
        l_i = \sum_{j \text{ positive}} P_j w_{ij} \phi(\mathrm{softplus}(-a_{ij}))
            + \sum_{j \text{ negative}} N_j m_{ij} w_{ij} \phi(\mathrm{softplus}(\lambda a_{ij})), \quad
        \phi(l) = (1 - e^{-l})^\gamma l

    with :math:`m_{ij} = [\mathrm{sigmoid}(a_{ij}) \ge \theta]` and :math:`w_{ij}` of `rebalance`, constants of the gradient both. Loss,
    gradient and statistics come from one pass. ``F.binary_cross_entropy_with_logits`` sums and divides by N C where this divides by N.

    Args:
        logits: (N, C), (C,) or (N, C, d1, ...); float32, float64, bfloat16 or float16.
        target: multi-label entries in the logits' shape, 1 for a class that is there, 0 for one that is not, and -1 or `ignore_index` for
            one of which nothing is known; bool, uint8 (both as they are), float32 (as it is) or another dtype (copied). Or class indices
            (N,), () or (N, d1, ...), the only positive of their row.
        scale: (C,) beta, multiplies the logits.
        shift: (C,) delta, added to them; -inf removes a class as a negative.
        positive: (C,) P, factors of the positives' terms (torch's ``pos_weight``).
        negative: (C,) N, factors of the negatives' terms.
        threshold: theta in [0, 1): negatives count from this probability on; 0 for all of them.
        focal_gamma: gamma >= 0 of the focal factor of each term.
        negative_scale: lambda > 0: negatives have lambda a. Their terms are not divided by it: that is `negative`'s.
        rebalance: (C,) q > 0 of distribution-balanced loss: ``w_ij = base + sigmoid(steepness (q_j / s_i - centre))``, s_i the sum of the
            q of row i's positives; 1 + base for a row without any.
        rebalance_map: (base, steepness, centre).
        weight: (C,) alpha, factor of a row, chosen by its label: with class indices alone.
        sample_weight: a factor of each row's loss, in the shape of class indices.
        ignore_index: label of rows, or entry of multi-label targets, that count for nothing.
        reduction: ``"mean"`` divides by the sum of the rows' weights, ``"batch_mean"`` by their number (a row of ignored entries alone
            does not count); ``"sum"``; ``"none"`` keeps the shape of class indices.
        statistics: return sums over the rows of ``|d l_i / d a_ij|`` too, without `weight` and `sample_weight`: (2, C) real, of the class
            as a positive and as a negative. They carry no gradient.
        backend: None, ``"cpu"``, ``"triton"`` or ``"torch"``; see `ltkernels.explain`.

    Returns:
        The loss, float64 for float64 logits and float32 for all others; with `statistics` the pair of both.

    On a GPU Triton's kernel computes it, which does not look at targets and tables: an entry that cannot be makes its row NaN. Tables that
    require a gradient, second derivatives, function transforms, and a GPU without Triton, are the plain torch reference's.

    Raises:
        ValueError: an entry or label out of range (row and value), tables and sample weights that are not finite, a shape or device that
            does not fit, options out of range.
        TypeError: a dtype that does not fit.

    Example:
        >>> z = torch.tensor([[1.0, 0.5, -0.5]])
        >>> round(ltk.functional.sigmoid_cross_entropy(z, torch.tensor([[True, False, True]])).item(), 4)
        2.2614
    """
    checked = _checked(logits, target, statistics=statistics, **options)
    loss, sums = _FUSED(checked.inputs, checked.call)
    if checked.call.reduction == NONE:
        loss = loss.reshape(checked.shape)
    return (loss, sums) if statistics else loss


sigmoid_cross_entropy.__signature__ = inspect.signature(_checked).replace(  # type: ignore[attr-defined]
    return_annotation="Tensor | tuple[Tensor, Tensor]"
)


def explain_sigmoid(logits: Tensor, target: Tensor, **options: Any) -> _backends.Explanation:
    checked = _checked(logits, target, **options)
    return _backends.explain(options.get("backend"), logits.device, checked.needs_torch, _NOT_CUDA)


sigmoid_cross_entropy.explain = explain_sigmoid  # type: ignore[attr-defined]  # what `ltkernels.explain` asks


def serves(logits: object, target: object, options: Mapping[str, Any]) -> bool:
    """Whether a call of `adjusted_cross_entropy` is this loss: the sigmoid family of multi-label targets."""
    term = options.get("term")
    if term is None or term.form != "sigmoid" or not isinstance(logits, Tensor) or not isinstance(target, Tensor):
        return False
    return 0 < target.dim() == logits.dim()  # in another shape it is refused there, as a multi-label target


_OF_BOTH = ("scale", "shift", "focal_gamma", "weight", "sample_weight", "ignore_index", "reduction", "backend")


def options_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `adjusted_cross_entropy` with a sigmoid term, for `sigmoid_cross_entropy`."""
    term: Term = options["term"]
    for name, value in options.items():
        # A grad_scale announces the upstream gradient, and this loss keeps gradients unrounded until they meet it.
        if name not in (*_OF_BOTH, "term", "grad_scale") and value is not None and (isinstance(value, Tensor) or value):
            raise ArgumentError(
                f"{name} is given, which the general sigmoid loss, of multi-label targets say, does not have"
            )
    found = {name: options[name] for name in _OF_BOTH if options.get(name) is not None}
    if term.table is not None:
        found["negative"] = term.table if term.table.dim() == 1 else term.table[0]
        if term.table.dim() == 2:
            found["positive"] = term.table[1]
    found["threshold"] = term.options[0]
    return found
