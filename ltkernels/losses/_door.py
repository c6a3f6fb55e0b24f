"""The door that every form of the loss (op, head, shards) goes through: arguments in, a checked `ltkernels._call.Call` out.

An option of the loss is a field of `Call`, a keyword of `checked` and `Options`, and what a kernel makes of it. Everything between them
hands the record on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from .. import _backends, _checks
from .._call import BESIDE, NONE, Call
from .._errors import ArgumentError, DTypeError
from .._native import _C
from .._watch import direct, is_dtensor, refuse_dtensors, transforms, wants_gradient, watched
from . import _soft, _terms

if TYPE_CHECKING:
    from typing_extensions import Unpack

Target = Tensor | tuple[Tensor, Tensor, Tensor | float]


_SIGMOID, _CLOUD, _VMF = map(_terms.FORMS.index, ("sigmoid", "cloud", "vmf"))
_REALS = {dtype: _checks.real_dtype(dtype) for dtype in _checks.FLOATING}


class Shared(TypedDict, total=False):
    """The keywords that every form of the loss takes; `ltkernels.functional.adjusted_cross_entropy` describes them."""

    shift: Tensor | None
    scale: Tensor | None
    margin: Tensor | None
    row_scale: Tensor | None
    label_scale: Tensor | None
    focal_gamma: float
    label_smoothing: float | Tensor
    ignore_index: int
    reduction: str
    inplace: bool
    backend: str | None
    grad_scale: Tensor | float | None
    term: _terms.Term | None
    sample_weight: Tensor | None


class Options(Shared, total=False):
    """Those of the loss of logits, whose class weights are `weight`: a head's `weight` is its classifier."""

    weight: Tensor | None


class Checked(NamedTuple):
    """What `checked` makes of the arguments: logits (N, C), their call, whether the gradient may overwrite them, the shape that an
    unreduced loss gets where it is not (N,), why the torch reference serves the call, empty where a kernel does, `_watch.direct` of its
    tensors, and why the CUDA kernels do not serve it."""

    logits: Tensor
    call: Call
    inplace: bool
    shape: tuple[int, ...] | None
    needs_torch: str
    direct: bool
    not_cuda: str = ""


def checked(
    logits: Tensor,
    target: Target,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    margin: Tensor | None = None,
    row_scale: Tensor | None = None,
    weight: Tensor | None = None,
    label_scale: Tensor | None = None,
    focal_gamma: float = 0.0,
    label_smoothing: float | Tensor = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    grad_scale: Tensor | float | None = None,
    term: _terms.Term | None = None,
    sample_weight: Tensor | None = None,
    weight_name: str = "weight",
) -> Checked:
    """The record of a call, with everything that its arguments allow to check checked; the messages name the arguments,
    and the class weights as `weight_name`.

    Raises `ltkernels._errors`: ArgumentError (a ValueError and RuntimeError), DTypeError (a TypeError and RuntimeError).
    """
    if term is None and backend is None and not inplace and not watched():
        # The usual call, looked at by one C function; whatever is not as usual is told apart below.
        plain: Call | None = _C.plain_call(
            logits,
            target,
            shift,
            scale,
            margin,
            row_scale,
            weight,
            focal_gamma,
            label_smoothing,
            ignore_index,
            reduction,
            sample_weight,
            label_scale,
        )
        if plain is not None and (
            (weight is None or not weight.requires_grad or not plain.smooth())
            and (
                (sample_weight is None and label_scale is None and plain.smoothing is None)
                or not wants_gradient(plain.beside())
            )
        ):
            if grad_scale is None:
                return Checked(logits, plain, False, None, "", True)
            plain = plain._replace(grad_scale=_checks.grad_scale(grad_scale, logits.device, _REALS[logits.dtype]))
            if direct((plain.grad_scale,)):
                return Checked(logits, plain, False, None, "", True)
    _checks.logits(logits)
    real = _REALS[logits.dtype]
    code = _checks.reduction(reduction)
    if type(focal_gamma) is not float or not 0.0 <= focal_gamma < 1e30:
        focal_gamma = _checks.number("focal_gamma", focal_gamma, low=0.0)
    smoothing = None
    if isinstance(label_smoothing, Tensor):
        smoothing, label_smoothing = label_smoothing, 0.0
    elif type(label_smoothing) is not float or not 0.0 <= label_smoothing <= 1.0:
        label_smoothing = _checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        ignore_index = _checks.integer("ignore_index", ignore_index)
    size = logits.shape
    dim = len(size)
    device = logits.device
    first, target_b, lam = split_target(target, logits)
    probabilities = first.is_floating_point()
    classes = size[1 if dim > 1 else 0]
    if shift is not None:
        shift = _checks.table("shift", shift, classes, device, real)
    if scale is not None:
        scale = _checks.table("scale", scale, classes, device, real)
    if margin is not None:
        margin = _checks.table("margin", margin, classes, device, real)
    if row_scale is not None:
        row_scale = _checks.table("row_scale", row_scale, classes, device, real)
    if weight is not None:
        weight = _checks.table(weight_name, weight, classes, device, real)
    if smoothing is not None:
        smoothing = _checks.table("label_smoothing", smoothing, classes, device, real)
    if label_scale is not None:
        label_scale = _checks.table("label_scale", label_scale, classes, device, real)
    if sample_weight is not None:
        whole = size[:1] + size[2:] if dim > 1 else size[:0]
        sample_weight = _checks.rows("sample_weight", sample_weight, whole, device, real)
    tables = (shift, scale, margin, row_scale, weight)
    form, table, seed = 0, None, None
    form_options: tuple[float, ...] = ()
    if term is not None:
        if probabilities:
            raise ArgumentError(f"target holds class probabilities; the closed form {term.form!r} needs class indices")
        named = {"shift": shift, "scale": scale, "margin": margin, "row_scale": row_scale, "label_scale": label_scale}
        term = _checked_term(term, classes, device, real, named, label_smoothing if smoothing is None else smoothing)
        form, table, seed, form_options = _terms.FORMS.index(term.form), term.table, term.seed, term.options
    if probabilities:
        by_label = {
            "margin": margin,
            "row_scale": row_scale,
            "label_scale": label_scale,
            "a table as label_smoothing": smoothing,
        }
        _check_probabilities(by_label, focal_gamma, ignore_index)
    factor = None
    if grad_scale is not None:
        factor = _checks.grad_scale(grad_scale, device, real)
    call = Call(
        first, target_b, lam, *tables, table, seed, factor, sample_weight, smoothing, label_scale, None,
        focal_gamma, label_smoothing, ignore_index, code, form, form_options,
    )  # fmt: skip
    needs_torch = _needs_torch(call, backend, logits)
    not_cuda = _not_cuda(call)
    served = _backends.choose(backend, device, needs_torch, not_cuda)
    if inplace and (code == NONE or probabilities or served == "torch"):
        reason = (
            "the torch backend serves this call"
            if served == "torch"
            else "target holds class probabilities"
            if probabilities
            else "reduction='none' needs the logits in backward"
        )
        raise ArgumentError(f"inplace=True is not possible: {reason}")

    shape = None
    if dim != 2:
        if code == NONE:
            whole = first.shape
            shape = whole[:1] + whole[2:] if probabilities and dim > 2 else whole[:0] if dim == 1 else whole
        logits, first, target_b, lam = _as_rows(logits, first, target_b, lam, probabilities)
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1).contiguous()
    if not first.is_contiguous():
        first = first.contiguous()  # kernels read consecutive labels
    call = call._replace(target=first, target_b=target_b, lam=lam, sample_weight=sample_weight, backend=served)
    if served == "torch":
        refuse_dtensors(call)
        check_labels(call, classes)
    return Checked(logits, call, inplace, shape, needs_torch, direct((logits, *call.tensors())), not_cuda)


checked.__qualname__ = "adjusted_cross_entropy"  # as a wrong keyword is reported

_Function = TypeVar("_Function", bound=Callable[..., object])


def takes_options(function: _Function) -> _Function:
    """For a public function that hands ``**options`` on to `checked`: shows them in its signature."""
    own = inspect.signature(function)
    options = [p for p in inspect.signature(checked).parameters.values() if p.name in Options.__annotations__]
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    taken = {p.name for p in named} | ({"weight"} if "class_weight" in own.parameters else set())
    function.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*named, *(p for p in options if p.name not in taken)]
    )
    return function


def check_options(name: str, options: Shared) -> None:
    """Raises TypeError for a keyword that is no option, naming the public function that it was given to."""
    for option in options:
        if option not in Shared.__annotations__:
            raise TypeError(f"{name}() got an unexpected keyword argument {option!r}")


def _needs_torch(call: Call, backend: str | None, logits: Tensor) -> str:
    """Why no kernel can serve a call; empty when one can."""
    lam, tables = call.lam, call.tables()
    if logits.shape[-1 if logits.dim() == 1 else 1] == 0:
        return "there is no class"
    reason = "" if torch.compiler.is_compiling() else transforms()
    if reason:
        return reason
    if call.target.is_floating_point():
        shift, scale, _, _, weight = call.tables()
        name = _soft.learned((logits, call.target, shift, scale, weight, call.sample_weight))
        return f"gradient with respect to {name} beside class probabilities as target" if name else ""
    if lam is not None and lam.requires_grad and torch.is_grad_enabled():
        return "gradient with respect to lam"
    if wants_gradient(call.beside()):
        learned = [name for name, value in zip(BESIDE, call.beside(), strict=True) if wants_gradient((value,))]
        return f"gradient with respect to {learned[0]}"
    on_cpu = logits.is_cpu and backend != "triton"
    if wants_gradient(tables):
        if not on_cpu:
            return "gradient with respect to a table, which the CPU kernel alone computes"
        if call.form:
            return "gradient with respect to a table of a closed form"
        if call.smooth() and wants_gradient((call.weight,)):
            return "gradient with respect to the class weight under label smoothing"
    if call.form == _VMF and lam is not None:
        return "the von Mises-Fisher form, whose kernels take plain labels"
    return ""


def _not_cuda(call: Call) -> str:
    """Why the CUDA kernels cannot serve a call that Triton's can."""
    if call.form == _CLOUD:
        return "there is no CUDA kernel for the cloud of GCL"
    general = any(call.form_options[:2]) or call.shift is not None or call.scale is not None
    if call.form == _SIGMOID and general:
        return "there is no CUDA kernel for the sigmoid loss with a threshold, factors of positives, shift or scale"
    return ""


def _checked_term(
    term: _terms.Term,
    classes: int,
    device: torch.device,
    real: torch.dtype,
    tables: Mapping[str, Tensor | None],
    label_smoothing: float | Tensor,
) -> _terms.Term:
    """The term with its table as the kernel wants it, and a seed where it needs one."""
    if term.form not in _terms.FORMS[1:]:
        raise ArgumentError(f"term.form is {term.form!r}; it must be one of {', '.join(map(repr, _terms.FORMS[1:]))}")
    for name, table in tables.items():
        if table is not None and name not in _terms.TAKES[term.form]:
            raise ArgumentError(f"{name} cannot be combined with the closed form {term.form!r}")
    if term.form in _terms.NO_LABEL_SMOOTHING and _checks.smooths(label_smoothing):
        reason = _terms.NO_LABEL_SMOOTHING[term.form]
        given = "a table" if isinstance(label_smoothing, Tensor) else label_smoothing
        raise ArgumentError(f"label_smoothing is {given}; it has no meaning with {term.form}: {reason}")
    table, options = None, term.options
    if term.table is not None and term.form == "sigmoid" and term.table.dim() == 2:  # one row after the other
        if term.table.shape != (2, classes):
            raise ArgumentError(f"the loss' table has shape {tuple(term.table.shape)}; it must be (2, {classes})")
        table = _checks.table("the loss' table", term.table.reshape(-1), 2 * classes, device, real)
        options = (options[0], 1.0, 0.0)
    elif term.form == "vmf":
        if term.table is None or term.table.shape != (classes,):
            shape = None if term.table is None else tuple(term.table.shape)
            raise ArgumentError(f"kappa has shape {shape}; it must be ({classes},), one entry per class")
        features = _checks.number("features of the loss", options[0], low=3.0)
        options = (features, _checks.number("tau", options[1], above=0.0), 0.0)
        table = _terms.vmf_constants(term.table, features).reshape(-1).to(device=device, dtype=real)
    elif term.table is not None:
        table = _checks.table("class_counts of the loss", term.table, classes, device, real)
    seed = term.seed
    if term.form in _terms.DRAWING:
        seed = torch.randint(2**62, (1,), device=device) if seed is None else seed.to(device)
    return _terms.Term(term.form, table, seed, options)


def split_target(target: Target, logits: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Checked (target, target_b, lam); class indices become int64, lam a tensor in the targets' shape."""
    if not isinstance(target, tuple):
        if not _checks.target(target, logits) and target.dtype != torch.int64:
            target = target.long()
        return target, None, None
    if len(target) != 3:
        raise ArgumentError(f"target is a tuple of {len(target)}; mixed targets are (y_a, y_b, lam)")
    first, second, lam = target
    if _checks.target(first, logits, "target[0]") or _checks.target(second, logits, "target[1]"):
        raise DTypeError("target[0] and target[1] of mixed targets must hold class indices, not probabilities")
    real = _checks.real_dtype(logits.dtype)
    if isinstance(lam, Tensor):
        if lam.shape not in ((), first.shape):
            raise ArgumentError(f"target[2] (lam) has shape {tuple(lam.shape)}; it must be () or {tuple(first.shape)}")
        if is_dtensor(lam):
            raise DTypeError("target[2] (lam) is a DTensor; it must be a plain tensor, such as its to_local()")
        lam = lam.to(device=logits.device, dtype=real).expand(first.shape)
    else:
        share = _checks.number("target[2] (lam)", lam, low=0.0, high=1.0)
        # Not torch.full, whose number would be a constant of a compiled graph: lam is another one at each step.
        lam = torch.ones(first.shape, dtype=real, device=logits.device) * share
    return first.long(), second.long().contiguous(), lam.contiguous()


def _check_probabilities(by_label: Mapping[str, Tensor | None], focal_gamma: float, ignore_index: int) -> None:
    given = [name for name, table in by_label.items() if table is not None]
    if given or focal_gamma != 0.0:
        name = given[0] if given else "focal_gamma"
        raise ArgumentError(f"{name} is chosen by the label; it cannot be used with class probabilities as target")
    if ignore_index >= 0:
        raise ArgumentError(f"ignore_index is {ignore_index}; it has no meaning with class probabilities as target")


def as_rows(tensor: Tensor) -> Tensor:
    """(C,) and (N, C, d1, ...) to one row a sample; differentiable."""
    if tensor.dim() == 2:
        return tensor
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


def _as_rows(
    logits: Tensor, target: Tensor, target_b: Tensor | None, lam: Tensor | None, probabilities: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return (
        as_rows(logits),
        as_rows(target) if probabilities else target.reshape(-1),
        None if target_b is None else target_b.reshape(-1),
        None if lam is None else lam.reshape(-1),
    )


def check_labels(call: Call, classes: int, probabilities: bool = True) -> None:
    """The kernel's check of labels, class probabilities, sample weights and smoothing for the reference. On the CPU only: reading them back
    would make each call wait for a GPU. Traced and transformed ones have no values to look at; torch's own gather raises IndexError for
    labels. `probabilities`: those too, three bytes an entry."""
    if probabilities and call.target.is_floating_point():
        _soft.check_target(call.target)
    if (
        torch.compiler.is_compiling()
        or not call.target.is_cpu
        or not direct((call.target, call.target_b, *call.beside()))
    ):
        return
    soft = call.target.is_floating_point()
    problem = (None if soft else _backends.find_bad_label(call, classes)) or _backends.find_bad_beside(call)
    if problem is not None:
        raise problem


if TYPE_CHECKING:

    def _options_are_those_of_checked(logits: Tensor, target: Target, **options: Unpack[Options]) -> Checked:
        return checked(logits, target, **options)
