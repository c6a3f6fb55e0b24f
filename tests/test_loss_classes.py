"""Promise: a loss is a class that a reader can read, that torch can move, empty and refill, and that refuses another loss' state."""

from __future__ import annotations

import copy
import doctest
import inspect
import io
import pickle
import re
import warnings
from collections import Counter, OrderedDict

import contract
import pytest
import torch

import ltkernels as ltk
from ltkernels import adjustments, augment, inference, nn, schedules, selection, train

COUNTS = [500, 5, 50, 12]
NAMES = sorted(ltk.LOSSES)
OWN = {name: loss for name, loss in ltk.LOSSES.items() if loss.__module__.startswith("ltkernels.")}
COUNTED = [name for name, loss in OWN.items() if loss.first == "class_counts"]
COSINE = [name for name, loss in OWN.items() if loss.logits == "cosine"]
CLASSES = [nn.AdjustedCrossEntropy, *OWN.values()]
BUILDERS = [loss.build for loss in OWN.values()]
SECTION = re.compile(r"^([A-Z][A-Za-z ]*|Predict with(?=: )):( (?<=^Predict with: ).*)?$")


@pytest.fixture
def low_precision_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


# ---- what a reader sees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_source_is_the_class(name: str) -> None:
    loss = ltk.LOSSES[name]
    text = inspect.getsource(loss)
    assert text.startswith(f"class {loss.__name__}(AdjustedCrossEntropy):")
    assert "def __init__" in text
    assert loss.__module__.startswith("ltkernels.losses.")
    assert inspect.getsource(loss.build).startswith(f"def {loss.build.__name__}(")


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_argument_names_the_class(name: str) -> None:
    loss = ltk.LOSSES[name]
    with pytest.raises(TypeError, match=rf"^{loss.__name__}\.__init__\(\)"):
        loss(foo=1)
    with pytest.raises(TypeError, match=rf"^{loss.__name__}\.__init__\(\) got an unexpected keyword argument 'foo'"):
        loss.make(COUNTS, foo=1)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_loss_has_no_use_for_is_refused_by_name(name: str) -> None:
    loss = ltk.LOSSES[name]
    unused = {"class_counts": COUNTS, "num_classes": len(COUNTS)}
    unused.pop(loss.first, None)
    for argument, value in unused.items():
        with pytest.raises(TypeError, match=rf"\.__init__\(\) got .*'{argument}'"):
            loss(*loss._of_counts(COUNTS), **{argument: value})


def test_two_numbers_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes is of 3 classes; the loss has 2"):
        nn.AdjustedCrossEntropy(class_counts=[3, 4], num_classes=3)
    shift = ltk.adjustments.Adjustment(shift=torch.zeros(3))
    with pytest.raises(ValueError, match="class_counts is of 2 classes; the loss has 3"):
        nn.AdjustedCrossEntropy(shift, class_counts=[3, 4])


def test_help_spells_the_common_arguments_out() -> None:
    names = list(inspect.signature(nn.LDAM).parameters)
    assert names[:4] == ["class_counts", "max_margin", "s", "empty"]
    assert names[4:] == [
        *("weight", "label_smoothing", "ignore_index", "reduction", "inplace", "backend", "learnable", "table_dtype")
    ]


def test_names_are_joined_once() -> None:
    def defined(**attributes):
        return type("Another", (nn.AdjustedCrossEntropy,), {"__module__": "elsewhere", **attributes})

    def another(class_counts):
        return adjustments.Adjustment()

    with pytest.raises(ValueError, match="two losses have the name 'ldam'"):
        defined(name="ldam", build=staticmethod(another))
    with pytest.raises(ValueError, match="two losses have the build 'ldam'"):
        defined(name="another", build=staticmethod(adjustments.ldam))
    try:
        first = defined(name="another", build=staticmethod(another))
        second = defined(name="another", build=staticmethod(another))  # a notebook's cell, run again
        assert first is not second
        assert ltk.LOSSES["another"] is second is nn.Another
        assert adjustments.another is another
    finally:
        del ltk.LOSSES["another"]
    assert type("Mine", (nn.LDAM,), {})([3, 1]).name == "ldam", "a subclass without a name of its own is no new loss"
    with pytest.raises(AttributeError, match="no attribute 'Another'"):
        _ = nn.Another


def sections(documented: object) -> dict[str, list[str]]:
    """The Google sections of a docstring: title to its lines."""
    found: dict[str, list[str]] = {"": []}
    title = ""
    for line in inspect.getdoc(documented).split("\n"):
        if match := SECTION.match(line):
            title = match[1]
            assert title not in found, f"section {title} twice"
            found[title] = [match[2].strip()] if match[2] else []
        else:
            assert title in ("", "Predict with") or not line or line.startswith("    "), f"{line!r} in section {title}"
            found[title].append(line[4:] if title else line)
    return found


def arguments(lines: list[str]) -> list[str]:
    """The names of an Args section."""
    heads = [line.split(":")[0] for line in lines if line and not line.startswith(" ")]
    return [name.strip(" *") for head in heads for name in head.split(",")]


@pytest.mark.parametrize("documented", [*CLASSES, *BUILDERS], ids=lambda each: each.__name__)
def test_docstrings_have_their_sections(documented) -> None:
    of_class = inspect.isclass(documented)
    found = sections(documented)
    wanted = {"Args", "Shape", "Dtype", "Raises", "Predict with", "Example"} if of_class else {"Returns", "Example"}
    function = documented.__init__ if of_class else documented
    taken = [name for name in inspect.signature(function).parameters if name not in ("self", "unknown")]
    if taken:
        wanted |= {"Args", "Raises"}
    assert set(found) - {""} == wanted
    assert arguments(found.get("Args", [])) == taken
    for title, lines in found.items():
        assert any(lines), f"section {title} is empty"
    for name in arguments(found.get("Raises", [])):
        assert issubclass(__builtins__[name], Exception)
    if of_class:
        assert found["Predict with"][0] == f"{documented.predict}."


@pytest.mark.parametrize("documented", [*CLASSES, *BUILDERS], ids=lambda each: each.__name__)
def test_examples_run(documented) -> None:
    out = io.StringIO()
    tests = doctest.DocTestFinder(recurse=False).find(documented, globs={"ltk": ltk, "torch": torch})
    assert sum(len(test.examples) for test in tests) >= (3 if inspect.isclass(documented) else 1)
    for test in tests:
        assert doctest.DocTestRunner().run(test, out=out.write).failed == 0, out.getvalue()


# ---- torch.device("meta"), default dtype, table dtype -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_built_on_meta_and_filled_again(name: str) -> None:
    options = contract.seeded(name)
    wanted = ltk.LOSSES[name].make(COUNTS, **options)
    with torch.device("meta"):
        loss = ltk.LOSSES[name].make(COUNTS, **options)
    assert all(buffer.is_meta for buffer in loss.buffers())
    loss.to_empty(device="cpu")
    for buffer in loss.buffers():
        buffer.fill_(3)
    loss.reset_parameters()
    found, expected = dict(loss.named_buffers()), dict(wanted.named_buffers())
    assert found.keys() == expected.keys()
    for key, table in expected.items():
        assert torch.equal(found[key], table)
    z, y = torch.randn(4, 4).tanh(), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(0)
    first = wanted.eval()(z, y)
    torch.manual_seed(0)
    assert torch.equal(loss.eval()(z, y), first)


def test_learned_and_scheduled_tables_are_filled_again() -> None:
    with torch.device("meta"):
        loss = nn.LogitAdjustedCrossEntropy(
            COUNTS, weight=torch.tensor([1.0, 2.0, 3.0, 4.0], device="cpu"), learnable=("shift",)
        )
        given = nn.AdjustedCrossEntropy(adjustments.Adjustment(scale=torch.full((4,), 2.0, device="cpu")))
    model = torch.nn.ModuleList([loss, given]).to_empty(device="cpu")
    for module in model:
        module.reset_parameters()
    assert torch.equal(loss.shift.detach(), adjustments.logit_adjustment(COUNTS).shift)
    assert isinstance(loss.shift, torch.nn.Parameter)
    assert loss.weight.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert given.scale.tolist() == [2.0] * 4
    kps = nn.KPS(COUNTS)
    schedule = schedules.GradientAdjustment(kps, start=1)
    kps.row_scale.fill_(9.0)
    kps.reset_parameters()
    assert kps.row_scale.tolist() == [1.0] * 4
    schedule.step(1)
    assert torch.equal(kps.row_scale, adjustments.kps_ga(COUNTS).row_scale)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("low_precision_default")
def test_the_default_dtype_stays_out_of_tables(name: str) -> None:
    options = contract.seeded(name)
    loss = ltk.LOSSES[name].make(COUNTS, **options)
    torch.set_default_dtype(torch.float32)
    wanted = ltk.LOSSES[name].make(COUNTS, **options)
    assert loss.state_dict().keys() == wanted.state_dict().keys()
    for key, table in wanted.state_dict().items():
        assert loss.state_dict()[key].dtype == table.dtype
        assert torch.equal(loss.state_dict()[key], table)


@pytest.mark.usefixtures("low_precision_default")
def test_the_default_dtype_stays_out_of_metrics() -> None:
    metrics = pytest.importorskip("ltkernels.train.metrics")
    scores = metrics.summarize(torch.tensor([[499, 1], [0, 500]]), [500, 500])
    assert scores["top1"] == 0.999
    assert scores["balanced_accuracy"] == 0.999


@pytest.mark.usefixtures("low_precision_default")
def test_the_default_dtype_stays_out_of_learned_tables() -> None:
    assert nn.LDAM(COUNTS, learnable=("scale",)).scale.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_float64_tables(name: str) -> None:
    loss = ltk.LOSSES[name].make(COUNTS, table_dtype=torch.float64)
    tables = {key: table for key, table in loss.named_buffers() if table.is_floating_point()}
    assert all(table.dtype == torch.float64 for table in tables.values())
    loss.half()
    assert all(table.dtype == torch.float64 for table in loss.buffers() if table.is_floating_point())
    for key, table in ltk.LOSSES[name].make(COUNTS).named_buffers():
        if key in tables:
            assert torch.equal(tables[key].float(), table), "float32 tables are the float64 ones, rounded"
    with pytest.raises(ValueError, match="table_dtype is torch.float16; it must be torch.float32 or torch.float64"):
        ltk.LOSSES[name].make(COUNTS, table_dtype=torch.float16)


def test_float64_tables_make_the_loss_exact() -> None:
    z, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    n = torch.tensor(COUNTS, dtype=torch.float64)
    exact = torch.nn.functional.cross_entropy(z + torch.log(n / n.sum()), y)
    rounded, fine = (
        (nn.LogitAdjustedCrossEntropy(COUNTS, table_dtype=dtype)(z, y) - exact).abs() / exact
        for dtype in (torch.float32, torch.float64)
    )
    assert fine < 1e-14 < 1e-10 < rounded
    assert (
        nn.LogitAdjustedCrossEntropy(COUNTS, learnable=("shift",), table_dtype=torch.float64).shift.dtype
        == torch.float64
    )


# ---- state dicts ------------------------------------------------------------------------------------------------------

OTHER = {
    "class_balanced": {"beta": 0.9}, "focal": {"gamma": 1.0}, "kps": {"s": 10.0}, "kps_ga": {"max_margin": 0.1},
    "logit_adjusted": {"tau": 2.0}, "ldam": {"s": 20.0}, "cosface": {"m": 0.1}, "arcface": {"m": 0.1}, "seesaw": {"p": 0.5},
    "cb_sigmoid": {"beta": None}, "cb_focal": {"gamma": 2.0}, "eql": {"tail_frequency": 0.5}, "cdt": {"gamma": 0.1},
    "softmax_equalization": {"gamma": 0.5}, "vector_scaling": {"tau": 0.5}, "ala": {"s": 20.0}, "los": {"smoothing": 0.9},
    "label_aware_smoothing": {"shape": "linear"}, "gcl": {"noise": 0.1}, "eql_v2": {"mu": 0.5}, "acsl": {"threshold": 0.5},
    "balanced_bce": {"tau": 0.5},
}  # fmt: skip


def saved(loss: torch.nn.Module) -> dict:
    """The state through a file, as torch reads it without pickles of code."""
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_loss_with_options_is_tried() -> None:
    assert set(OTHER) == {name for name, loss in OWN.items() if set(loss.own_options) - {"empty"}}


@pytest.mark.parametrize("name", list(OTHER))
def test_a_state_of_other_options_is_refused(name: str) -> None:
    one, two = ltk.LOSSES[name].make(COUNTS), ltk.LOSSES[name].make(COUNTS, **OTHER[name])
    before = {key: value.clone() for key, value in two.state_dict().items()}
    (option,) = OTHER[name]
    with pytest.raises(ValueError, match=rf"the checkpoint's loss was made with {option} .*, this loss with {option} "):
        two.load_state_dict(saved(one))
    assert all(torch.equal(before[key], value) for key, value in two.state_dict().items()), "nothing half-loaded"
    two.load_state_dict(saved(two))
    with pytest.raises(ValueError, match=rf"the checkpoint's 1 was made with {option} "):
        torch.nn.Sequential(torch.nn.Identity(), two).load_state_dict(
            saved(torch.nn.Sequential(torch.nn.Identity(), one))
        )


def test_a_state_of_another_loss_or_dtype_is_refused() -> None:
    other = nn.LogitAdjustedCrossEntropy(COUNTS)
    with pytest.raises(ValueError, match="made with loss 'balanced_softmax', this loss with loss 'logit_adjusted'"):
        other.load_state_dict(saved(nn.BalancedSoftmax(COUNTS)))
    fine = nn.LDAM(COUNTS, table_dtype=torch.float64)
    with pytest.raises(ValueError, match="table_dtype 'torch.float32', this loss with table_dtype 'torch.float64'"):
        fine.load_state_dict(saved(nn.LDAM(COUNTS)))


def test_states_without_options_and_damaged_ones() -> None:
    loss = nn.LDAM(COUNTS)
    old = saved(loss)
    del old["_extra_state"]
    assert str(loss.load_state_dict(old)) == "<All keys matched successfully>"
    for damaged in (torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([1.5]), None, {"s": 1}):
        with pytest.raises(ValueError, match="_extra_state is not what a loss of ltkernels writes"):
            loss.load_state_dict({**old, "_extra_state": damaged})
    # Tables that were given have no options to compare.
    nn.AdjustedCrossEntropy(adjustments.ldam(COUNTS), class_counts=COUNTS).load_state_dict(saved(loss))


def test_copies_and_pickles() -> None:
    loss = nn.KPS(COUNTS, s=10.0)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.options == loss.options
        other.scale.zero_()
        other.reset_parameters()
        assert torch.equal(other.scale, loss.scale)
        loss.load_state_dict(saved(other))


# ---- class counts -----------------------------------------------------------------------------------------------------

MAPPINGS = [
    dict(enumerate(COUNTS)), OrderedDict((key, COUNTS[key]) for key in (2, 0, 3, 1)), Counter({3: 12, 0: 500, 2: 50, 1: 5}),
    {torch.tensor(key).item(): torch.tensor(COUNTS[key]) for key in range(4)},
]  # fmt: skip
NO_COUNTS = [
    (Counter({1: 5000, 2: 812, 3: 131}), r"class_counts is a Counter with keys 1, 2, 3; .*\(missing: 0\)"),
    ({"ant": 3, "bee": 4}, "keys 'ant', 'bee'"), ({0: 3, True: 4}, "keys 0, True"), ({5000, 812, 131}, "is a set"),
    (frozenset({3, 4}), "is a frozenset"), (dict(enumerate(COUNTS)).keys(), "is a dict_keys"),
    (dict(enumerate(COUNTS)).values(), "is a dict_values"), (dict(enumerate(COUNTS)).items(), "is a dict_items"),
    (b"\x05\x03", "is a bytes"), (bytearray(b"\x05\x03"), "is a bytearray"),
]  # fmt: skip


@pytest.mark.parametrize("counts", MAPPINGS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("name", NAMES)
def test_mappings_are_read_by_class_id(name: str, counts) -> None:
    wanted, loss = ltk.LOSSES[name].make(COUNTS), ltk.LOSSES[name].make(counts)
    for key, table in wanted.state_dict().items():
        assert torch.equal(loss.state_dict()[key], table)
    if name in COUNTED:
        for one, two in zip(ltk.LOSSES[name].build(counts), ltk.LOSSES[name].build(COUNTS)):
            assert not isinstance(one, torch.Tensor) or torch.equal(one, two)


def test_mappings_in_what_splits_and_makes_up_classes() -> None:
    x, y = torch.randn(40, 3), torch.arange(4).repeat_interleave(10)
    data = train.data.Dataset.from_arrays(x, y, x, y)
    for read in (
        lambda n: augment.relative_heads(n, 1),
        selection.head_tail_split,
        lambda n: augment.foreground_indices(y, n, 20, generator=torch.Generator().manual_seed(0)).tolist(),
        lambda n: train.data.with_counts(data, {3: 1, 0: 2, 2: 2, 1: 1} if isinstance(n, dict) else [2, 1, 2, 1]).class_counts,
        lambda n: [e.rows.tolist() for c in selection.fdg_recipe(
            {c: x[y == c] for c in range(4)}, lambda c, rows: x[:rows].repeat(60, 1)[:rows], n, n_sets=0, n_random=1, mode="random",
        ).classes for e in c.arms.values()],
    ):  # fmt: skip
        assert read(MAPPINGS[1]) == read(COUNTS)
    for read in (
        lambda n: augment.relative_heads(n, 1),
        selection.head_tail_split,
        lambda n: train.data.with_counts(data, n),
    ):
        for counts, message in NO_COUNTS:
            with pytest.raises(TypeError, match=message):
                read(counts)


def test_what_is_no_sequence_of_counts_is_named_without_its_address() -> None:
    for given, kind in (
        ((n for n in COUNTS), "a generator"),
        (iter(COUNTS), "a list_iterator"),
        (object(), "a object"),
    ):
        with pytest.raises(TypeError, match=f"class_counts is {kind}; it must be a sequence of C integers"):
            nn.LDAM(given)


def test_mappings_elsewhere() -> None:
    counts = MAPPINGS[1]
    z = torch.randn(3, 4)
    assert torch.equal(inference.logit_adjust(z, counts), inference.logit_adjust(z, COUNTS))
    assert schedules.DRW(nn.CrossEntropy(), start=1, class_counts=counts).state_dict()["class_counts"] == COUNTS
    schedules.DRW(nn.LDAM(COUNTS), start=1, class_counts=counts)
    assert nn.AdjustedCrossEntropy(class_counts=counts).class_counts.tolist() == COUNTS


def test_a_pandas_series_is_read_by_its_index() -> None:
    pandas = pytest.importorskip("pandas")
    labels = pandas.Series([0] * 5 + [1] * 9 + [2] * 2)
    assert nn.LDAM(labels.value_counts()).class_counts.tolist() == [5, 9, 2]  # value_counts() starts with class 1


@pytest.mark.parametrize(("counts", "message"), NO_COUNTS, ids=lambda each: type(each).__name__)
def test_what_has_no_order_of_class_ids_is_refused(counts, message: str) -> None:
    for take in (
        *(ltk.LOSSES[name].make for name in COUNTED),
        *(ltk.LOSSES[name].build for name in COUNTED),
        lambda given: nn.AdjustedCrossEntropy(class_counts=given),
        lambda given: schedules.DRW(nn.CrossEntropy(), class_counts=given),
        lambda given: inference.logit_adjust(torch.zeros(2, len(given)), given),
    ):
        with pytest.raises(TypeError, match=message):
            take(counts)


# ---- logits that cannot be cosines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COSINE)
def test_raw_logits_of_a_margin_loss_are_named_once(name: str) -> None:
    loss, y = ltk.LOSSES[name].make(COUNTS), torch.tensor([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(torch.tensor([[1.0, -1.0, 0.5, -torch.inf], [0.0, 1.001, torch.nan, 0.0]]), y)
    with pytest.warns(
        UserWarning, match=rf"^{type(loss).__name__} got a logit of magnitude 10: it takes cosines"
    ) as found:
        [loss(torch.full((2, 4), -10.0), y) for _ in range(20)]
    assert len(found) == 1
    assert found[0].filename == __file__, "it points at the call"


def test_other_losses_and_traced_calls_say_nothing() -> None:
    z, y = torch.full((2, 4), 10.0), torch.tensor([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, loss in OWN.items():
            if name not in COSINE:
                loss.make(COUNTS)(z, y)
        torch.vmap(nn.LDAM(COUNTS, reduction="none", backend="torch"), in_dims=(0, None))(z[None], y)
        nn.LDAM(COUNTS)(z[:0], y[:0])
