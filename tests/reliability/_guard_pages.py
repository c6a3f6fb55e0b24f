"""Kernels between guard pages: every call into the compiled module runs on copies of its buffers that end, or begin, exactly at a page that
nobody may touch; what a kernel only reads is mapped read-only. The extents are those that the headers in csrc/cpu promise.

`install` replaces the functions of ltkernels._C, so that whatever calls a kernel is checked; a kernel without extents here is an error.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Callable
from typing import Any

from ltkernels._native import _C
from ltkernels.losses import _terms

PAGE = mmap.PAGESIZE
_SIGMOID, _VMF = map(_terms.FORMS.index, ("sigmoid", "vmf"))
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NONE, _READ, _WRITE = 0, 1, 2

# Bytes of a logit, and of what goes with it, by dtype code.
_ITEM, _REAL = (4, 8, 2, 2), (4, 8, 4, 4)

# name -> extents: (arguments) -> {index or (index, inner index): (bytes, written)}
Extents = dict[Any, tuple[int, bool]]


def _rows(rows: int, stride: int, columns: int, item: int) -> int:
    return 0 if rows == 0 or columns == 0 else ((rows - 1) * stride + columns) * item


def _part(a: tuple[Any, ...]) -> Extents:
    item, real, rows, classes = _ITEM[a[0]], _REAL[a[0]], a[3], a[4]
    out: Extents = {1: (_rows(rows, a[2], classes, item), False), 5: (8 * rows, False), 9: (8 * rows, False)}
    return out | dict.fromkeys((6, 7, 8), (real * classes, False))


def _sinkhorn(a: tuple[Any, ...]) -> Extents:
    real, rows, classes = 4 if a[0] else 8, a[3], a[4]
    out: Extents = {1: (_rows(rows, a[2], classes, real), False), 5: (8 * classes, False)}
    return out | {
        9: (real * rows * classes, True),
        10: (8 * classes, True),
        11: (real * classes, True),
        12: (8 * classes, True),
    }


EXTENTS: dict[str, Callable[[tuple[Any, ...]], Extents]] = {
    "exp_f32": lambda a: {0: (4 * a[2], False), 1: (4 * a[2], True)},
    "row_statistics": lambda a: _part(a) | {11: (32 * a[3], True)},
    "row_maxima": lambda a: _part(a) | {10: (32 * a[3], True), 11: (8 * a[3], True)},
    "self_contrast_start": lambda a: {
        1: (_rows(a[3], a[2], a[4], _REAL[a[0]]), False), 5: (8 * a[3], False), 8: (_REAL[a[0]] * a[3] * a[4], True),
        9: (8 * a[3], True), 10: (24 * a[3], True), 11: (8 * a[3], True), 12: (2 * _REAL[a[0]] * a[13] * a[4], True),
    },
    "self_contrast_products": lambda a: {
        1: (_rows(a[3], a[2], a[4], _REAL[a[0]]), True), 6: (8 * a[3], True), 7: (_REAL[a[0]] * a[4], False),
    },
    "self_contrast_losses": lambda a: {
        3: (24 * a[2], False), 8: (8 * a[1], False), 9: (8 * a[1], False), 17: (_REAL[a[0]] * a[1], True), 18: (8 * a[1], True),
        **dict.fromkeys((10, 11, 12, 13), (8 * a[2], False)), **dict.fromkeys((14, 15, 16), (8 * a[2], True)),
    },
    "self_contrast_gradient": lambda a: {
        4: (_REAL[a[0]] * a[1] * a[3], False), 5: (8 * a[1], False), 6: (24 * a[2], False), 8: (8 * a[1], False),
        9: (_REAL[a[0]] * a[1] * a[3], True), 10: (8 * a[1], True), 11: (_REAL[a[0]] * a[2] * a[3], True),
        12: (2 * _REAL[a[0]] * a[13] * a[3], True),
    },
    "gradient_from_statistics": lambda a: _part(a) | {10: (32 * a[3], False), 11: (_rows(a[3], a[12], a[4], _ITEM[a[0]]), True)},
    "logdet_batch": lambda a: {
        0: (8 * a[1] * a[2] ** 2, False), 3: (8 * a[5] * _C.logdet_scratch(a[2]), True), 4: (8 * a[1], True)
    },
    "balance": lambda a: {
        0: (4 * a[1] * a[3], False), 4: (8 * a[2], False), 6: (4 * a[3], True), 7: (8 * a[1], True), 8: (16 * (a[1] + a[2]), True),
        9: (4 * a[1], True),
    },
    "sinkhorn": _sinkhorn,
}  # fmt: skip
# What takes no buffers, and what has a class of its own below.
HARMLESS = {"info", "adjusted_ce_scratch", "logdet_scratch", "greedy_scratch", "greedy_packed",
            "vector_gradients_scratch", "experts_scratch", "sigmoid_ce_columns", "plain_call", "plain_setup"}  # fmt: skip
# What hands a tensor's memory on from C++; closed, so that every call goes the long way, through AdjustedCe.
SHORT_WAY = {"plain_run", "plain_loss"}
OWN = {
    "AdjustedCe",
    "Experts",
    "Greedy",
    "Nearest",
    "RowLogsumexp",
    "SigmoidCe",
    "SoftTargets",
    "greedy_runs",
} | SHORT_WAY


def _numbers(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address)) if count else []


class Guarded:
    """Copies of the buffers of one call."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.maps: list[tuple[int, int]] = []
        self.written: list[tuple[int, int, int]] = []  # original, copy, bytes

    def all(self, wanted: list[tuple[int, int, bool]]) -> dict[int, int]:
        """Original addresses to those of their copies. One address that comes twice is one buffer, written if either use is."""
        merged: dict[int, tuple[int, bool]] = {}
        for address, size, written in wanted:
            if address:
                before = merged.get(address, (0, False))
                merged[address] = (max(size, before[0]), written or before[1])
        return {address: self._copy(address, *rest) for address, rest in merged.items()}

    def _copy(self, address: int, size: int, written: bool) -> int:
        inner = -(-size // PAGE) * PAGE
        total = inner + 2 * PAGE
        base = _libc.mmap(None, total, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if base in (None, ctypes.c_void_p(-1).value):
            raise MemoryError("mmap failed")
        self.maps.append((base, total))
        first = base + PAGE
        at = first if self.dice.random() < 0.5 else first + inner - size
        if size == 0:
            return first  # nothing may be touched at all
        _libc.mprotect(first, inner, _READ | _WRITE)
        ctypes.memset(first, 0xFF, inner)  # NaN where a kernel reads what lies beside the buffer on its own page
        ctypes.memmove(at, address, size)
        if written:
            self.written.append((address, at, size))
        else:
            _libc.mprotect(first, inner, _READ)
        return at

    def close(self) -> None:
        for address, at, size in self.written:
            ctypes.memmove(address, at, size)
        for base, total in self.maps:
            _libc.munmap(base, total)


def _wrapped(
    real: Callable[..., Any], extents: Callable[[tuple[Any, ...]], Extents], dice: random.Random
) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        wanted = extents(arguments)
        given = {k: arguments[k[0]][k[1]] if isinstance(k, tuple) else arguments[k] for k in wanted}
        guarded = Guarded(dice)
        moved = guarded.all([(given[k], *wanted[k]) for k in wanted])
        fresh = list(arguments)
        for k in wanted:
            if isinstance(k, tuple):
                inner = list(fresh[k[0]])
                inner[k[1]] = moved.get(given[k], 0)
                fresh[k[0]] = tuple(inner)
            else:
                fresh[k] = moved.get(given[k], 0)
        try:
            return real(*fresh)
        finally:
            guarded.close()

    return call


def _adjusted_ce(dice: random.Random) -> type:
    real_class = _C.AdjustedCe

    class AdjustedCe:
        """The real one on copies: what its methods are told is kept until `run`, which knows all extents."""

        def __init__(
            self, dtype: int, logits: int, stride: int, rows: int, classes: int, target: int, ignore_index: int
        ) -> None:
            self.told: dict[str, tuple[Any, ...]] = {}
            self.target, self.ignore_index = target, ignore_index
            self.shape = (dtype, stride, rows, classes)
            item, self.real = _ITEM[dtype], _REAL[dtype]
            self.wanted = [(logits, _rows(rows, stride, classes, item), False), (target, 8 * rows, False)]
            self.logits = logits

        def _tell(self, name: str, arguments: tuple[Any, ...], *wanted: tuple[int, int, bool]) -> None:
            self.told[name] = arguments
            self.wanted += wanted

        def mixed(self, target_b: int, lam: int) -> None:
            rows = self.shape[2]
            self._tell("mixed", (target_b, lam), (target_b, 8 * rows, False), (lam, self.real * rows, False))

        def tables(self, *tables: int) -> None:
            self._tell("tables", tables, *((table, self.real * self.shape[3], False) for table in tables))

        def inputs(self, sample_weight: int, smoothing: int, label_scale: int) -> None:
            _, _, rows, classes = self.shape
            tables = ((table, self.real * classes, False) for table in (smoothing, label_scale))
            own = (sample_weight, self.real * rows, False)
            self._tell("inputs", (sample_weight, smoothing, label_scale), own, *tables)

        def options(self, *numbers: float) -> None:
            self._tell("options", numbers)

        def closed(self, form: int, table: int, seed: int, *options: float) -> None:
            tables = 3 if form == _VMF else 2 if form == _SIGMOID and options[1] else 1
            extent = (table, tables * self.real * self.shape[3], False)
            self._tell("closed", (form, table, seed, *options), extent, (seed, 8, False))

        def gradient(self, grad: int, stride: int, row_coef: int) -> None:
            dtype, _, rows, classes = self.shape
            grads = (grad, _rows(rows, stride, classes, _ITEM[dtype]), True)
            self._tell("gradient", (grad, stride, row_coef), grads, (row_coef, self.real * rows, False))

        def gradients_of_tables(self, scratch: int, *tables: int) -> None:
            dtype, _, rows, classes = self.shape
            columns = (tables[0] != 0) + (tables[1] != 0)
            doubles = _C.vector_gradients_scratch(rows, classes, columns, 2 if "mixed" in self.told else 1, dtype == 1)
            every = ((table, self.real * classes, True) for table in tables)
            self._tell("gradients_of_tables", (scratch, *tables), (scratch, 8 * doubles, True), *every)

        def on(self, moved: dict[int, int]) -> Any:
            """The real one on the copies."""
            dtype, stride, rows, classes = self.shape
            labels = moved.get(self.target, 0)
            job = real_class(dtype, moved.get(self.logits, 0), stride, rows, classes, labels, self.ignore_index)
            addresses = {"mixed": (0, 1), "tables": range(5), "inputs": range(3), "options": (), "closed": (1, 2),
                         "gradient": (0, 2), "gradients_of_tables": range(6)}  # fmt: skip
            for name, arguments in self.told.items():
                getattr(job, name)(*(moved.get(a, 0) if k in addresses[name] else a for k, a in enumerate(arguments)))
            return job

        def run(self, reduction: int, row_loss: int, loss: int, scratch: int, threads: int) -> int:
            _, _, rows, classes = self.shape
            guarded = Guarded(dice)
            moved = guarded.all(
                [
                    *self.wanted,
                    (row_loss, self.real * rows, True),
                    (loss, self.real * (rows if reduction == 0 else 1), True),
                    (scratch, self.real * threads * _C.adjusted_ce_scratch(classes), True),
                ]
            )
            job = self.on(moved)
            try:
                return int(
                    job.run(reduction, moved.get(row_loss, 0), moved.get(loss, 0), moved.get(scratch, 0), threads)
                )
            finally:
                guarded.close()

    _complete(real_class, AdjustedCe)
    return AdjustedCe


def _complete(real: type, ours: type) -> None:
    if unknown := {name for name in vars(real) if name[0] != "_"} - set(vars(ours)):
        raise TypeError(f"{real.__name__} has methods whose buffers are not guarded: {', '.join(sorted(unknown))}")


def _soft_targets(dice: random.Random) -> type:
    real_class = _C.SoftTargets

    class SoftTargets:
        def __init__(self, dtype: int, logits: int, stride: int, rows: int, classes: int) -> None:
            self.item, self.real, self.shape = _ITEM[dtype], _REAL[dtype], (rows, classes)
            self.made = (dtype, logits, stride, rows, classes)
            self.wanted = [(logits, _rows(rows, stride, classes, self.item), False)]
            self.told: dict[str, tuple[tuple[Any, ...], int]] = {}  # arguments, and how many of the first are addresses

        def target(self, target: int, stride: int, real_target: bool, teacher: bool) -> None:
            item = self.real if real_target else self.item
            self.wanted.append((target, _rows(self.shape[0], stride, self.shape[1], item), False))
            self.told["target"] = (target, stride, real_target, teacher), 1

        def tables(self, *tables: int) -> None:
            self.wanted += [(table, self.real * self.shape[1], False) for table in tables]
            self.told["tables"] = tables, 3

        def options(self, *numbers: float) -> None:
            self.told["options"] = numbers, 0

        def rows(self, *numbers: int) -> None:
            self.wanted += [(each, self.real * self.shape[0], False) for each in numbers]
            self.told["rows"] = numbers, 2

        def run(self, reduction: int, row_loss: int, loss: int, grad: int, scratch: int, threads: int) -> int:
            rows, classes = self.shape
            guarded = Guarded(dice)
            moved = guarded.all(
                [
                    *self.wanted,
                    (row_loss, self.real * rows, True),
                    (loss, self.real * (rows if reduction == 0 else 1), True),
                    (grad, self.real * rows * classes, True),
                    (scratch, self.real * threads * _C.adjusted_ce_scratch(classes), True),
                ]
            )
            dtype, logits, *rest = self.made
            job = real_class(dtype, moved.get(logits, 0), *rest)
            for name, (arguments, addresses) in self.told.items():
                getattr(job, name)(*(moved.get(a, 0) if k < addresses else a for k, a in enumerate(arguments)))
            out = (moved.get(each, 0) for each in (row_loss, loss, grad, scratch))
            try:
                return int(job.run(reduction, *out, threads))
            finally:
                guarded.close()

    _complete(real_class, SoftTargets)
    return SoftTargets


def _experts(dice: random.Random) -> type:
    real_class = _C.Experts

    class Experts:
        def __init__(self, dtype: int, coupling: int, adjusted: bool, sharpness: float, inverse: int) -> None:
            self.made, self.inverse = (dtype, coupling, adjusted, sharpness), inverse
            self.jobs: list[tuple[Any, float]] = []

        def add(self, job: Any, factor: float) -> None:
            self.jobs.append((job, factor))

        def joint(self, job: Any, factor: float) -> None:
            self.jobs.append((job, factor))

        def run(self, reduction: int, row_loss: int, loss: int, scratch: int, threads: int) -> int:
            *experts, (joint, factor) = self.jobs
            (_, _, rows, classes), real = joint.shape, joint.real
            guarded = Guarded(dice)
            every = real * rows * len(self.jobs)
            # Gradients are reals here, whatever the logits are.
            grads = [(job.told["gradient"][0], real * rows * classes, True) for job, _ in experts]
            moved = guarded.all(
                [
                    *(each for job, _ in self.jobs for each in job.wanted),
                    *grads,
                    (self.inverse, real * classes, False),
                    (row_loss, every, True),
                    (loss, every if reduction == 0 else real, True),
                    (scratch, real * threads * _C.experts_scratch(len(experts), classes), True),
                ]
            )
            call = real_class(*self.made, moved.get(self.inverse, 0))
            for job, each in experts:
                call.add(job.on(moved), each)
            call.joint(joint.on(moved), factor)
            out = (moved.get(each, 0) for each in (row_loss, loss, scratch))
            try:
                return int(call.run(reduction, *out, threads))
            finally:
                guarded.close()

    _complete(real_class, Experts)
    return Experts


def _sigmoid_ce(dice: random.Random) -> type:
    real_class = _C.SigmoidCe
    # Method -> of each argument: what it is the address of ("rows", "classes", ...), or None.
    buffers = {
        "labels": ("labels", "classes"), "multi_label": ("hot", None, None), "tables": (*["classes"] * 4, "rows"),
        "options": (None, None, None), "rebalance": ("classes", None, None, None), "gradient": ("grad", "rows"),
        "statistics": ("statistics", "columns"),
    }  # fmt: skip
    if unknown := {name for name in vars(real_class) if name[0] != "_"} - set(buffers) - {"run"}:
        raise TypeError(f"SigmoidCe has methods whose buffers are not guarded: {', '.join(sorted(unknown))}")

    class SigmoidCe:
        """The real one on copies: what its methods are told is kept until `run`."""

        def __init__(self, dtype: int, logits: int, stride: int, rows: int, classes: int, ignore_index: int) -> None:
            self.arguments = (dtype, logits, stride, rows, classes, ignore_index)
            self.told: dict[str, tuple[Any, ...]] = {}

        def __getattr__(self, name: str) -> Callable[..., None]:
            if name not in buffers:
                raise AttributeError(name)
            return lambda *arguments: self.told.__setitem__(name, arguments)

        def extent(self, kind: str) -> tuple[int, bool]:
            dtype, _, _, rows, classes, _ = self.arguments
            real = _REAL[dtype]
            if kind == "hot":
                _, stride, single = self.told["multi_label"]
                return _rows(rows, stride, classes, 1 if single else 4), False
            sizes = {"labels": 8 * rows, "classes": real * classes, "rows": real * rows, "grad": real * rows * classes,
                     "statistics": 2 * real * classes, "columns": real * _C.sigmoid_ce_columns(rows, classes)}  # fmt: skip
            return sizes[kind], kind in ("grad", "statistics", "columns")

        def run(self, reduction: int, upstream: float, row_loss: int, loss: int, threads: int) -> int:
            dtype, logits, stride, rows, classes, ignore_index = self.arguments
            real = _REAL[dtype]
            wanted = [(logits, _rows(rows, stride, classes, _ITEM[dtype]), False), (row_loss, real * rows, True)]
            wanted.append((loss, real * (rows if reduction == 0 else 1), True))
            for name, arguments in self.told.items():
                wanted += [(at, *self.extent(kind)) for at, kind in zip(arguments, buffers[name], strict=True) if kind]
            guarded = Guarded(dice)
            moved = guarded.all(wanted)
            job = real_class(dtype, moved.get(logits, 0), stride, rows, classes, ignore_index)
            for name, arguments in self.told.items():
                there = zip(arguments, buffers[name], strict=True)
                getattr(job, name)(*(moved.get(each, 0) if kind else each for each, kind in there))
            try:
                return int(job.run(reduction, upstream, moved.get(row_loss, 0), moved.get(loss, 0), threads))
            finally:
                guarded.close()

    return SigmoidCe


def _row_logsumexp(dice: random.Random) -> type:
    real_class = _C.RowLogsumexp

    class RowLogsumexp:
        """The real one on copies that live for one run."""

        def __init__(self, dots: int, stride: int, rows: int, columns: int, *tables: int) -> None:
            self.dots, self.shape, self.tables = dots, (stride, rows, columns), tables  # shift, row scale, reference
            self.told: dict[str, tuple[Any, ...]] = {}

        def groups(self, *addresses: int) -> None:
            self.told["groups"] = addresses

        def loss(self, loss: int, weight: int, base: int, bonus: int, minus_own: bool, grad_base: int) -> None:
            self.minus_own = minus_own
            self.told["loss"] = (loss, weight, base, bonus, grad_base)

        def values(self, *addresses: int) -> None:
            self.told["values"] = addresses

        def run(self, dtype: int, coefficients: bool, threads: int) -> None:
            (stride, rows, columns), real = self.shape, _REAL[dtype]
            written = {*self.told.get("values", ())[:2], *self.told.get("loss", ())[::4]}
            of_rows = {at for found in self.told.values() for at in found} | {*self.tables[1:]}
            wanted = [(at, 8 * rows, at in written) for at in sorted(of_rows) if at]
            # Without coefficients the products are read alone.
            wanted.append((self.dots, _rows(rows, stride, columns, real), coefficients))
            if self.tables[0]:
                wanted.append((self.tables[0], real * columns, False))
            guarded = Guarded(dice)
            moved = guarded.all(wanted)
            job = real_class(moved.get(self.dots, 0), *self.shape, *(moved.get(at, 0) for at in self.tables))
            for name, found in self.told.items():
                fresh: list[Any] = [moved.get(at, 0) for at in found]
                if name == "loss":
                    fresh.insert(4, self.minus_own)
                getattr(job, name)(*fresh)
            try:
                job.run(dtype, coefficients, threads)
            finally:
                guarded.close()

    if unknown := {name for name in vars(real_class) if name[0] != "_"} - set(vars(RowLogsumexp)):
        raise TypeError(f"RowLogsumexp has methods whose buffers are not guarded: {', '.join(sorted(unknown))}")
    return RowLogsumexp


def _greedy(dice: random.Random) -> tuple[type, Callable[..., None]]:
    real_class, real_runs = _C.Greedy, _C.greedy_runs

    class Greedy:
        """The real one on copies that live for one call; numbers of the state are the real one's."""

        def __init__(self, d: int, subsets: int, groups: int, single: bool, alpha: float) -> None:
            self.shape = (d, subsets, groups, single)
            self.real = real_class(d, subsets, groups, single, alpha)

        def pool(self, *addresses: int) -> None:
            self.pool_at = addresses

        def state(self, *arguments: Any) -> None:
            self.state_at, self.numbers, self.scratch_at = arguments[:5], arguments[5:7], arguments[7]

        def rule(self, *arguments: Any) -> None:
            self.real.rule(*arguments)

        def steps(self, steps: int, picked: int, values: int) -> None:
            self.steps_at = (steps, picked, values)

        def wanted(self, threads: int) -> list[tuple[int, int, bool]]:
            d, subsets, groups, single = self.shape
            offsets, sizes = _numbers(self.pool_at[1], subsets + 1), _numbers(self.pool_at[3], groups)
            begins, packed = _numbers(self.pool_at[4], groups + 1), _numbers(self.pool_at[5], groups)
            packs = packed[-1] + _C.greedy_packed(d, begins[-1] - begins[-2], sizes[-1], single)
            pool = (
                8 * offsets[-1] * d,
                8 * (subsets + 1),
                8 * subsets,
                8 * groups,
                8 * (groups + 1),
                8 * groups,
                8 * subsets,
            )
            state = (8 * subsets, 8 * groups, (4 if single else 8) * packs, 8 * d * d, 8 * d)
            out = [(at, size, False) for at, size in zip(self.pool_at, pool, strict=True)]
            out += [(at, size, True) for at, size in zip(self.state_at, state, strict=True)]
            if threads:
                out.append((self.scratch_at, 8 * _C.greedy_scratch(d, subsets, groups, max(sizes), threads), True))
                out += [(at, 8 * self.steps_at[0], True) for at in self.steps_at[1:]]
            return out

        def point(self, moved: dict[int, int], run: bool) -> None:
            self.real.pool(*(moved.get(at, 0) for at in self.pool_at))
            self.real.state(*(moved.get(at, 0) for at in self.state_at), *self.numbers, moved.get(self.scratch_at, 0))
            if run:
                self.real.steps(self.steps_at[0], *(moved.get(at, 0) for at in self.steps_at[1:]))

        def pack(self) -> None:
            guarded = Guarded(dice)
            self.point(guarded.all(self.wanted(0)), False)
            self.real.pack()
            guarded.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    def greedy_runs(runs: list[Greedy], threads: int) -> None:
        guarded = Guarded(dice)
        for run in runs:
            run.point(guarded.all(run.wanted(threads if len(runs) == 1 else 1)), True)
        real_runs([run.real for run in runs], threads)
        guarded.close()
        for run in runs:
            run.numbers = (run.real.count, run.real.anchor)

    return Greedy, greedy_runs


def _nearest(dice: random.Random) -> type:
    real_class = _C.Nearest

    class Nearest:
        """The state of a search lies between guard pages for the length of a call."""

        def __init__(self, rows: int, k: int, room: int, *state: int) -> None:
            self.sizes, self.state = (rows, k, room), state

        def _run(self, single: bool, call: Callable[[Any, dict[int, int]], None], *more: tuple[int, int, bool]) -> None:
            rows, _, room = self.sizes
            real = 4 if single else 8
            sizes = (real * rows * room, 8 * rows * room, 8 * rows, real * rows)
            guarded = Guarded(dice)
            state = [(address, size, True) for address, size in zip(self.state, sizes, strict=True)]
            moved = guarded.all([*state, *more])
            try:
                call(real_class(*self.sizes, *(moved[address] for address in self.state)), moved)
            finally:
                guarded.close()

        def add(self, single: bool, scores: int, stride: int, columns: int, first: int, threads: int) -> None:
            size = _rows(self.sizes[0], stride, columns, 4 if single else 8)
            self._run(
                single,
                lambda job, at: job.add(single, at[scores], stride, columns, first, threads),
                (scores, size, False),
            )

        def sort(self, single: bool, threads: int) -> None:
            self._run(single, lambda job, at: job.sort(single, threads))

    return Nearest


def install(seed: int) -> None:
    names = {name for name in dir(_C) if not name.startswith(("_", "cuda_")) and callable(getattr(_C, name))}
    if names != set(EXTENTS) | HARMLESS | OWN:
        raise AssertionError(
            f"kernels without extents, or extents without kernel: {sorted(names ^ (set(EXTENTS) | HARMLESS | OWN))}"
        )
    dice = random.Random(seed)
    for name, extents in EXTENTS.items():
        setattr(_C, name, _wrapped(getattr(_C, name), extents, dice))
    for name in SHORT_WAY:
        setattr(_C, name, lambda *_: None)
    _C.SoftTargets, _C.Experts = _soft_targets(dice), _experts(dice)
    _C.AdjustedCe = _adjusted_ce(dice)
    _C.Nearest = _nearest(dice)
    _C.SigmoidCe = _sigmoid_ce(dice)
    _C.RowLogsumexp = _row_logsumexp(dice)
    _C.Greedy, _C.greedy_runs = _greedy(dice)
