"""The Module that every loss is, and the registry that its subclasses join."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypedDict

import torch
from torch import Tensor

from .. import _checks
from .._call import TABLES
from .._errors import ArgumentError
from .._tables import KeepsTables
from ..heads import linear_adjusted_cross_entropy
from ._adjustment import NEUTRAL, Adjustment, Smoothed, built_classes, rounded
from ._core import adjusted_cross_entropy, of_checked
from ._door import Options, Target, checked
from ._range import CosineRange
from ._terms import TAKES, ClosedForm, Term

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

LOSSES: dict[str, type[AdjustedCrossEntropy]] = {}
"""Every loss by its name on the command line."""


class Common(TypedDict, total=False):
    """The keyword arguments that all losses take; `AdjustedCrossEntropy` says what they mean."""

    weight: Tensor | None
    label_smoothing: float | Tensor
    ignore_index: int
    reduction: str
    inplace: bool
    backend: str | None
    learnable: Sequence[str]
    table_dtype: torch.dtype | None


class AdjustedCrossEntropy(KeepsTables):
    """`ltkernels.functional.adjusted_cross_entropy` with its vectors as buffers; every loss is a subclass of it.

    The buffers move with ``.to(device)`` and are saved in the state dict; schedules change them in place. They keep their dtype under
    ``.half()`` and ``.bfloat16()``: a prior rounded to 8 bits is another loss.

    Vectors named in `learnable` are Parameters instead, under the same names and state dict keys, and start from what the loss gives
    them: neutral (0 for shift and margin, 1 for the others) where it has none. Hand them to the optimizer, without weight decay, which
    would pull a scale to 0. A prior that is learned from the formula's on::

        loss = ltk.nn.LogitAdjustedCrossEntropy(class_counts, learnable=("shift",))
        optimizer = torch.optim.SGD([{"params": model.parameters(), "weight_decay": 2e-4}, {"params": loss.parameters()}], lr=0.1)

    A temperature for each class, or one for all, fitted to a trained model's validation logits::

        loss = ltk.nn.AdjustedCrossEntropy(ltk.adjustments.Adjustment(scale=torch.ones(C)), learnable=("scale",))
        log_t = torch.zeros((), requires_grad=True)
        ltk.functional.adjusted_cross_entropy(logits, target, scale=torch.exp(-log_t).expand(C)).backward()

    A model may be built under ``torch.device("meta")``: after ``to_empty`` `reset_parameters` fills the tables, and a schedule's
    ``step`` its own.

    A subclass that sets `name` and `build` is a loss: it joins `LOSSES`, and with it the command line. Its constructor hands the
    builder's options on, as those of the files of `ltkernels.losses` do.

    Args:
        adjustment: the vectors, or the closed form of a loss that they cannot express; None where `options` are given.
        class_counts: (C,) training samples per class, integers: a sequence, a tensor, or a mapping from every class id to its count.
            Kept in the state dict so that a checkpoint made with other counts is refused. None: not known.
        num_classes: the number of classes, for a loss without class counts.
        options: by name, what the builder takes besides the counts or the number of classes; for subclasses. The state dict holds them,
            and one made with others is refused.
        weight: (C,) class weights, floating-point, where the loss has none of its own.
        label_smoothing: as in the function, where the loss has none of its own; a table is a buffer, `smoothing`.
        ignore_index, reduction, inplace, backend: as in the function.
        learnable: names among shift, scale, margin, row_scale and weight.
        table_dtype: torch.float32 or torch.float64. A model in float64 wants float64 tables; those of float32 cost its loss 4e-8. None:
            float32 for a loss that builds its tables, the dtype they have for tables that are given.

    Shape:
        logits (N, C), (C,) or (N, C, d1, ...); target class indices (N,), () or (N, d1, ...), mixed targets ``(y_a, y_b, lam)``, or
        class probabilities in the logits' shape; loss () or, with ``reduction="none"``, in the shape of the indices.

    Dtype:
        logits float32, float64, bfloat16 or float16; loss float64 for float64 logits, float32 for all others; gradient as the logits.

    Raises:
        TypeError: arguments of the wrong kind, named with their value.
        ValueError: values out of range, or of another number of classes than the loss'.

    Predict with: the logits as they are.

    Example:
        >>> adjustment = ltk.adjustments.Adjustment(shift=torch.tensor([0.0, -1.0]))
        >>> loss = ltk.nn.AdjustedCrossEntropy(adjustment)
        >>> round(loss(torch.zeros(1, 2), torch.tensor([1])).item(), 4)
        1.3133
    """

    # What a loss is, besides its constructor and its docstring.
    name: ClassVar[str] = ""  # on the command line and in `LOSSES`
    title: ClassVar[str] = ""  # for reports
    logits: ClassVar[str] = "linear"  # or "cosine", where the loss expects the cosines of a `CosineLinear` head
    predict: ClassVar[str] = "the logits as they are"  # what to take the argmax of
    build: ClassVar[Callable[..., Adjustment | ClosedForm | Smoothed]] = Adjustment
    # Of the builder's signature, set for every subclass.
    first: ClassVar[str | None] = None  # "class_counts", "num_classes" or None: what it needs to know of the data
    __signature__: ClassVar[inspect.Signature]
    own_options: ClassVar[dict[str, inspect.Parameter]] = {}  # the loss' own parameters, by name

    shift: Tensor | None
    scale: Tensor | None
    margin: Tensor | None
    row_scale: Tensor | None
    weight: Tensor | None
    label_scale: Tensor | None
    smoothing: Tensor | None  # a table in place of `label_smoothing`
    class_counts: Tensor | None
    term_table: Tensor | None
    term_seed: Tensor | None
    options: dict[str, Any]  # the values of `own_options` that the loss was made with

    if TYPE_CHECKING:  # torch declares that a Module takes and returns anything

        def __call__(self, logits: Tensor, target: Target, **said: Unpack[Options]) -> Tensor: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            parameters = dict(inspect.signature(cls.build).parameters)
            cls.first = next((name for name in parameters if name in ("class_counts", "num_classes")), None)
            left = {cls.first, "table_dtype"}
            cls.own_options = {name: value for name, value in parameters.items() if name not in left}
            cls.__signature__ = _signature(cls)  # for help(): with the common arguments spelt out
            _register(cls)

    def __init__(
        self,
        adjustment: Adjustment | ClosedForm | Smoothed | None = None,
        *,
        class_counts: _checks.ClassCounts | None = None,
        num_classes: int | None = None,
        options: Mapping[str, Any] | None = None,
        weight: Tensor | None = None,
        label_smoothing: float | Tensor = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        inplace: bool = False,
        backend: str | None = None,
        learnable: Sequence[str] = (),
        table_dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        refused = list(unknown)
        if options is not None:  # a loss that builds its tables takes what its builder needs to know of the data
            given = {"class_counts": class_counts is not None, "num_classes": num_classes is not None}
            refused += [name for name, there in given.items() if there and name != self.first]
        for name in refused:  # Python's own message would name this class, whatever class was called
            raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}")
        counts = None if class_counts is None else torch.tensor(_checks.count_list(class_counts), device="cpu")
        if options is not None:
            adjustment = self._built(class_counts if num_classes is None else num_classes, options, table_dtype)
        adjustment = Adjustment() if adjustment is None else adjustment
        classes = built_classes(adjustment)
        for name, number in (("class_counts", None if counts is None else len(counts)), ("num_classes", num_classes)):
            if classes is not None and number not in (None, classes):
                raise ValueError(f"{name} is of {number} classes; the loss has {classes}")
            classes = number if classes is None else classes
        if isinstance(adjustment, Smoothed):
            if _checks.smooths(label_smoothing):
                raise ValueError(f"label_smoothing is given, but {type(self).__name__} sets the smoothing itself")
            label_smoothing, adjustment = adjustment.label_smoothing, Adjustment()
        if isinstance(label_smoothing, Tensor):
            if label_smoothing.dim() != 1 or classes not in (None, len(label_smoothing)):
                raise ValueError(
                    f"label_smoothing has shape {tuple(label_smoothing.shape)}; it must be ({classes or 'C'},), one entry per class"
                )
            if table_dtype is not None:
                label_smoothing = rounded(Smoothed(label_smoothing), table_dtype).label_smoothing
        if weight is not None:
            if adjustment.weight is not None:
                raise ValueError(f"weight is given, but {type(self).__name__} sets the class weights itself")
            if classes not in (None, len(weight)):
                raise ValueError(f"weight has {len(weight)} entries; the loss has {classes} classes")
            adjustment = adjustment._replace(weight=weight)
        if table_dtype is not None:
            adjustment = rounded(adjustment, table_dtype)
        learned = _learned_tables(adjustment, classes, learnable, table_dtype or torch.float32)
        term = adjustment.term if isinstance(adjustment, ClosedForm) else None
        # The options in the state dict say whether its tables are those of this loss.
        for name in TABLES:
            first = learned.get(name, getattr(adjustment, name, None))
            self._table(name, _tensor(first), made=False, learned=name in learned)
        for name, value in {
            "label_scale": getattr(adjustment, "label_scale", None),
            "smoothing": label_smoothing if isinstance(label_smoothing, Tensor) else None,
            "term_table": None if term is None else term.table,
            "term_seed": None if term is None else term.seed,
            "class_counts": counts,
        }.items():
            self._table(name, _tensor(value), made=False)
        self.closed_form = term is not None
        self._term = ("none", ()) if term is None else (term.form, term.options)
        self._learns = bool(learned)
        self._range = CosineRange(type(self).__name__) if self.logits == "cosine" else None
        self.options = {} if options is None else dict(options)
        self.table_dtype = table_dtype or (torch.float32 if options is not None else None)
        _checks.reduction(reduction)
        self.focal_gamma = adjustment.focal_gamma
        self.label_smoothing = 0.0
        if not isinstance(label_smoothing, Tensor):
            self.label_smoothing = _checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.inplace = inplace
        self.backend = backend

    @classmethod
    def adjustment(cls, class_counts: _checks.ClassCounts, **options: Any) -> Adjustment | ClosedForm | Smoothed:
        """The loss' tables for these class counts, whatever its builder takes of them."""
        return cls.build(*cls._of_counts(class_counts), **options)

    @classmethod
    def make(cls, class_counts: _checks.ClassCounts, **options: Any) -> Self:
        """The loss for these class counts, whatever its constructor takes of them."""
        return cls(*cls._of_counts(class_counts), **options)

    @classmethod
    def _of_counts(cls, class_counts: _checks.ClassCounts) -> tuple[Any, ...]:
        if cls.first is None:
            return ()
        return (class_counts,) if cls.first == "class_counts" else (len(_checks.count_list(class_counts)),)

    def _built(
        self, data: Any, options: Mapping[str, Any], table_dtype: torch.dtype | None
    ) -> Adjustment | ClosedForm | Smoothed:
        takes_dtype = "table_dtype" in inspect.signature(self.build).parameters
        dtype = {"table_dtype": table_dtype} if takes_dtype and table_dtype is not None else {}
        built = self.build(*(() if data is None else (data,)), **options, **dtype)
        if table_dtype not in (None, torch.float32) and not takes_dtype and built_classes(built) is not None:
            raise TypeError(f"table_dtype is {table_dtype}, but {self.build.__name__} builds its tables in float32")
        return built

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Puts the tables that the loss was made with back in place, learned ones included: after ``to_empty`` they hold anything.

        Tables that a schedule has added get their neutral value; its ``step`` sets them.
        """
        super().reset_parameters()
        for name in TABLES:
            held = getattr(self, name)
            if held is not None and name not in self._start:
                held.fill_(NEUTRAL[name])

    def get_extra_state(self) -> Tensor:
        """What the loss was made with, as the bytes of a JSON text: a tensor, which every format of checkpoints can hold."""
        text = json.dumps({"loss": self.name, "table_dtype": str(self.table_dtype), **self.options}, default=_plain)
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError where the state is of another loss, or of one with other options: its tables would be others."""
        self._refuse_others(state, "")

    def _refuse_others(self, state: object, prefix: str) -> None:
        try:
            saved: dict[str, Any] = json.loads(bytes(state.tolist()))  # type: ignore[attr-defined]
            of = saved["loss"]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"the checkpoint's {prefix}_extra_state is not what a loss of ltkernels writes") from None
        own = json.loads(bytes(self.get_extra_state().tolist()))
        if of and self.name and saved != own:  # tables that were given have no options to compare
            names = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
            theirs, ours = (
                ", ".join(f"{name} {each[name]!r}" for name in names if name in each) for each in (saved, own)
            )
            raise ValueError(
                f"the checkpoint's {prefix.rstrip('.') or 'loss'} was made with {theirs}, this loss with {ours}: its tables are others"
            )

    def forward(self, logits: Tensor, target: Target, **said: Unpack[Options]) -> Tensor:
        """The loss; the arguments are those of `ltkernels.functional.adjusted_cross_entropy`. What is said here counts for this call, in
        place of what the loss was made with; of a closed form's tables nothing can be."""
        if self._range is not None and not torch.compiler.is_compiling():
            self._range.look(logits)
        options = self.call_options()
        if said:
            options.update(said)
        try:
            if type(logits) is Tensor and not self.closed_form:  # a call less for each of many small losses
                return of_checked(checked(logits, target, **options))
            return adjusted_cross_entropy(logits, target, **options)
        except ArgumentError:
            if type(logits) is Tensor:  # a shard of the classes is not one
                self._fits("logits", logits.shape[:2])
            raise

    def call_options(self) -> Options:
        """What this loss says of a call, as keywords of `ltkernels.functional.adjusted_cross_entropy`."""
        tables: dict[str, Any] = self._buffers  # attribute access would search three dictionaries for each table
        if self._learns:
            tables = {**tables, **self._parameters}
        return {
            "shift": tables["shift"],
            "scale": tables["scale"],
            "margin": tables["margin"],
            "row_scale": tables["row_scale"],
            "weight": tables["weight"],
            "label_scale": tables["label_scale"],
            "focal_gamma": self.focal_gamma,
            "label_smoothing": self.label_smoothing if tables["smoothing"] is None else tables["smoothing"],
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "inplace": self.inplace,
            "backend": self.backend,
            "term": self._closed_form() if self.closed_form else None,
        }

    def _fits(self, name: str, shape: Sequence[int]) -> None:
        """Refuses another number of classes, last in `shape`, than there are counts: the op would name a table that nobody gave."""
        counts = self._buffers["class_counts"]
        if counts is not None and len(shape) and shape[-1] != len(counts):
            raise ArgumentError(f"{name} is of {shape[-1]} classes; class_counts has {len(counts)}") from None

    def _closed_form(self) -> Term:
        form, options = self._term
        return Term(form, self.term_table, self.term_seed, options)

    def from_features(
        self,
        features: Tensor,
        weight: Tensor,
        target: Target,
        *,
        bias: Tensor | None = None,
        normalize: bool = False,
        chunk_rows: int | None = None,
        **said: Any,
    ) -> Tensor:
        """This loss of a linear or cosine classifier `weight`, without its logits; the arguments are those of
        `ltkernels.functional.linear_adjusted_cross_entropy`, and count as in `forward`. Class weights are the loss' own."""
        if type(weight) is Tensor:
            self._fits("weight", weight.shape[:1])
        options: Any = self.call_options() | said
        class_weight = options.pop("weight")
        return linear_adjusted_cross_entropy(
            features,
            weight,
            target,
            bias=bias,
            normalize=normalize,
            chunk_rows=chunk_rows,
            class_weight=class_weight,
            **options,
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Before anything is copied: a refused state leaves the loss as it was.
        saved = state_dict.get(prefix + "class_counts")
        if (
            saved is not None
            and self.class_counts is not None
            and not torch.equal(saved.cpu(), self.class_counts.cpu())
        ):
            raise ValueError(
                f"the checkpoint's {prefix}class_counts are {_short(saved)}, this loss was made for "
                f"{_short(self.class_counts)}: its tables belong to other data"
            )
        options = prefix + "_extra_state"
        if options in state_dict:
            self._refuse_others(state_dict[options], prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if options in missing_keys:  # a state that was saved before options were in it
            missing_keys.remove(options)

    def extra_repr(self) -> str:
        tables = [name for name in (*TABLES, "label_scale", "smoothing") if getattr(self, name) is not None]
        sized = [getattr(self, name) for name in tables] + ([] if self.term_table is None else [self.term_table])
        classes = sized[0].shape[-1] if sized else "any"
        learned = f", learnable=[{', '.join(self._parameters)}]" if self._learns else ""
        return f"classes={classes}, tables=[{', '.join(tables)}]{learned}, reduction={self.reduction!r}"


def _register(loss: type[AdjustedCrossEntropy]) -> None:
    """A class that is defined again, in a notebook say, takes the place of its former self."""
    names = _names(loss)
    for other in list(LOSSES.values()):
        if (other.__module__, other.__qualname__) == (loss.__module__, loss.__qualname__):
            del LOSSES[other.name]
            continue
        for attribute, own in names.items():
            if _names(other)[attribute] == own:
                raise ValueError(f"two losses have the {attribute} {own!r}")
    LOSSES[loss.name] = loss


def _names(loss: type[AdjustedCrossEntropy]) -> dict[str, str]:
    """On the command line, in `ltkernels.nn` and in `ltkernels.adjustments`."""
    return {"name": loss.name, "class_name": loss.__name__, "build": loss.build.__name__}


def _signature(loss: type[AdjustedCrossEntropy]) -> inspect.Signature:
    """The constructor's signature, ``**common`` spelt out."""
    common = inspect.signature(AdjustedCrossEntropy.__init__).parameters
    own = [value for name, value in inspect.signature(loss.__init__).parameters.items() if name != "self"]
    if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD and own[-1].name == "common":
        own[-1:] = [common[name] for name in Common.__annotations__]
    return inspect.Signature(own)


def _learned_tables(
    adjustment: Adjustment | ClosedForm, classes: int | None, names: Sequence[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The first values of the vectors that are learned."""
    if isinstance(names, str) or not set(names) <= set(TABLES):
        raise ValueError(f"learnable is {names!r}; it must be a sequence of names among {', '.join(TABLES)}")
    found = {}
    for name in names:
        if isinstance(adjustment, ClosedForm) and name not in ("weight", *TAKES[adjustment.term.form]):
            raise ValueError(f"learnable names {name}, which the closed form {adjustment.term.form!r} does not have")
        table = getattr(adjustment, name)
        if table is not None:
            found[name] = _tensor(table).clone().to(dtype)
        elif classes is not None:
            found[name] = torch.full((classes,), NEUTRAL[name], dtype=dtype, device="cpu")
        else:
            raise ValueError(
                f"learnable names {name}, but nothing tells the number of classes: give AdjustedCrossEntropy an adjustment with {name}"
            )
        if not torch.isfinite(found[name]).all():
            at = int(torch.isfinite(found[name]).logical_not().nonzero()[0])
            raise ValueError(f"{name}[{at}] is {found[name][at].item()}; a learnable vector must start finite")
    return found


def _short(counts: Tensor) -> str:
    values = counts.tolist()
    return str(values) if len(values) <= 6 else f"[{', '.join(map(str, values[:5]))}, ...] ({len(values)} classes)"


def _tensor(value: Any) -> Any:
    """A tensor stays where it is: torch.as_tensor would move it to torch's default device."""
    return value if value is None or isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _plain(value: Any) -> Any:
    """A number of NumPy's or a tensor as JSON knows it."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
