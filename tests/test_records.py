"""Promise: the parameter builders are the formulas, in float64 from integer counts; expected values are typed by hand."""

from __future__ import annotations

import math
import re

import pytest
import torch

import ltkernels as ltk
from ltkernels import adjustments as adj

COUNTS = [500, 5, 50]  # class ids are not sorted by count
N = 555
CE = ltk.functional.adjusted_cross_entropy


def close(table: torch.Tensor, values: list[float]) -> None:
    assert table.dtype == torch.float32
    assert table.tolist() == pytest.approx(values, rel=1e-6)


def test_logit_adjustment() -> None:
    built = adj.logit_adjustment(COUNTS, tau=2.0)
    close(built.shift, [2 * math.log(500 / N), 2 * math.log(5 / N), 2 * math.log(50 / N)])
    assert built._replace(shift=None) == adj.Adjustment()


def test_balanced_softmax() -> None:
    close(adj.balanced_softmax(COUNTS).shift, [6.214608098, 1.609437912, 3.912023005])


def test_balanced_softmax_equals_logit_adjustment() -> None:
    z, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    la, bs = (CE(z, y, **build(COUNTS)._asdict()) for build in (adj.logit_adjustment, adj.balanced_softmax))
    assert torch.allclose(la, bs, rtol=1e-6)


def test_class_balanced() -> None:
    weights = [0.1 / (1 - 0.9**n) for n in COUNTS]
    close(adj.class_balanced(COUNTS, beta=0.9).weight, [3 * w / sum(weights) for w in weights])
    close(adj.class_balanced(COUNTS, beta=None).weight, [3 * w / 0.222 for w in (0.002, 0.2, 0.02)])
    close(adj.class_balanced(COUNTS, beta=0.0).weight, [1.0, 1.0, 1.0])
    # 1 - beta^n would have lost every digit here.
    close(adj.class_balanced(COUNTS, beta=1 - 1e-14).weight, [3 * w / 0.222 for w in (0.002, 0.2, 0.02)])


def test_ldam() -> None:
    built = adj.ldam(COUNTS)
    close(built.margin, [0.5 * 0.01**0.25, 0.5, 0.5 * 0.1**0.25])
    close(built.row_scale, [30.0] * 3)


def test_cosface() -> None:
    built = adj.cosface(4)
    close(built.margin, [0.35] * 4)
    close(built.row_scale, [64.0] * 4)


def test_cdt_and_vector_scaling() -> None:
    scale = [1.0, 0.01**0.3, 0.1**0.3]
    close(adj.cdt(COUNTS, gamma=0.3).scale, scale)
    built = adj.vector_scaling(COUNTS, gamma=0.3, tau=1.0)
    close(built.scale, scale)
    close(built.shift, [math.log(n / N) for n in COUNTS])


def test_kps() -> None:
    r = [math.log(5000) / math.log(50), 1.0, math.log(500) / math.log(50)]
    m = [0.2 * math.log(50) / math.log(5000), 0.2, 0.2 * math.log(500) / math.log(5000)]
    built = adj.kps(COUNTS)
    close(built.scale, [15 * x for x in r])
    close(built.margin, [15 * x for x in m])
    adjusted = adj.kps(COUNTS, gradient_adjustment=True)
    close(adjusted.scale, r)
    close(adjusted.margin, m)
    close(adjusted.row_scale, [15.0, 15 * math.log(5000) / math.log(50), 15 * math.log(500) / math.log(50)])
    assert adj.kps([10**6, 1], gradient_adjustment=True).row_scale[1] == 50.0  # clamped


def test_kps_margins_follow_the_counts_and_not_the_class_ids() -> None:
    """The authors' code reverses r by class index: with shuffled ids the margins then get the wrong sign."""
    counts = torch.tensor([900, 3, 40, 400, 7, 100, 12])
    for seed in range(10):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        for build in (adj.kps, adj.kps_ga, adj.ldam):
            margin = build(counts[order]).margin
            assert torch.equal(margin.argsort(), counts[order].argsort(descending=True))


def test_adaptive_margin() -> None:
    built = adj.logit_adjusted_adaptive_margin(COUNTS)
    close(built.margin, [(n / N) ** -0.25 for n in COUNTS])
    close(built.shift, [math.log(n / N) for n in COUNTS])


def test_equal_counts_are_plain() -> None:
    """Without a tail the losses have nothing to correct."""
    for name in ("class_balanced", "cdt"):
        z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        loss = ltk.LOSSES[name].make([7, 7, 7])(z, y)
        assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(z, y).item(), rel=1e-6)


@pytest.mark.parametrize(
    "counts", [(500, 5, 50), torch.tensor([500, 5, 50], dtype=torch.int32), [torch.tensor(500), 5, 50]]
)
def test_kinds_of_counts(counts) -> None:
    assert torch.equal(adj.ldam(counts).margin, adj.ldam(COUNTS).margin)


def test_numpy_counts() -> None:
    numpy = pytest.importorskip("numpy")
    assert torch.equal(adj.ldam(numpy.array(COUNTS)).margin, adj.ldam(COUNTS).margin)


COUNTED = [loss.build for loss in ltk.LOSSES.values() if loss.first == "class_counts" and "empty" in loss.own_options]


@pytest.mark.parametrize("build", COUNTED, ids=lambda build: build.__name__)
class TestBadCounts:
    @pytest.mark.parametrize(
        ("counts", "error", "message"),
        [
            ([3, 0, 2, 0], ValueError, "class_counts is 0 for class 1, 3"),
            ([3, -1], ValueError, r"class_counts\[1\] is -1"),
            ([3, 2.5], TypeError, r"class_counts\[1\] is 2.5"),
            ([3, True], TypeError, r"class_counts\[1\] is True"),
            ([3, 10**400], ValueError, "class_counts.1. has 401 digits; counts must be below 2.63"),
            ([], ValueError, "class_counts is empty"),
            ([0, 0], ValueError, "zeros only"),
            (7, TypeError, "class_counts is 7"),
            (torch.tensor([1.0, 2.0]), TypeError, "dtype torch.float32"),
            (torch.tensor([1.0, 2.0]).half(), TypeError, "dtype torch.float16"),
            (torch.tensor([[1, 2]]), ValueError, r"shape \(1, 2\)"),
        ],
    )
    def test_message(self, build, counts, error, message) -> None:
        with pytest.raises(error, match=message):
            build(counts)

    def test_empty_classes_on_request(self, build) -> None:
        counts = [400, 0, 20, 3]
        built = build(counts, empty="ignore")
        for name, table in built._asdict().items():
            if not isinstance(table, torch.Tensor):
                continue
            assert not table.isnan().any()
            if name == "shift":
                assert table[1] == -torch.inf
            elif name == "weight":
                assert table[1] == 0
            else:
                assert table[1] == table[3], f"{name} of an empty class is the rarest class'"
            assert table[[0, 2, 3]].isfinite().all()
        with pytest.raises(ValueError, match="empty is 'skip'"):
            build(counts, empty="skip")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adj.logit_adjustment(COUNTS, tau=math.nan), "tau is nan"),
        (lambda: adj.ldam(COUNTS, s=0.0), "s is 0.0; it must be above 0"),
        (lambda: adj.ldam(COUNTS, max_margin=math.inf), "max_margin is inf"),
        (lambda: adj.kps(COUNTS, s=51.0), "s is 51.0"),
        (lambda: adj.cdt(COUNTS, gamma=-0.1), "gamma is -0.1"),
        (lambda: adj.class_balanced(COUNTS, beta=1.0), "beta is 1.0"),
        (lambda: adj.focal(gamma=-1.0), "gamma is -1.0"),
        (lambda: adj.cosface(0), "num_classes is 0"),
        (lambda: adj.ldam(COUNTS, s="30"), "s is '30'"),
    ],
)
def test_bad_options(call, message) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call()


def test_function_and_module_come_from_one_builder() -> None:
    z, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    module = ltk.nn.LDAM(COUNTS, 0.3, s=20.0, reduction="sum", label_smoothing=0.1)
    tables = adj.ldam(COUNTS, max_margin=0.3, s=20.0)._asdict()
    function = CE(z, y, **tables, reduction="sum", label_smoothing=0.1)
    assert torch.equal(module(z, y), function)
    assert ltk.nn.CosFace(3, m=0.1)(z, y) == CE(z, y, **adj.cosface(3, m=0.1)._asdict())
    assert ltk.nn.Focal(gamma=1.0)(z, y) == CE(z, y, **adj.focal(gamma=1.0)._asdict())
    with pytest.raises(TypeError, match="margin"):
        ltk.nn.LDAM(COUNTS, margin=0.3)


def test_class_weights() -> None:
    z, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    weight = torch.tensor([1.0, 2.0, 3.0])
    expected = ltk.functional.adjusted_cross_entropy(z, y, shift=adj.balanced_softmax(COUNTS).shift, weight=weight)
    assert torch.equal(ltk.nn.BalancedSoftmax(COUNTS, weight=weight)(z, y), expected)
    with pytest.raises(ValueError, match="ClassBalanced sets the class weights itself"):
        ltk.nn.ClassBalanced(COUNTS, weight=weight)
    with pytest.raises(ValueError, match="weight has 2 entries; the loss has 3 classes"):
        ltk.nn.BalancedSoftmax(COUNTS, weight=weight[:2])


def test_number_of_classes_must_fit() -> None:
    z, y = torch.randn(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"margin has shape \(3,\); it must be \(4,\)"):
        CE(z, y, **adj.ldam(COUNTS)._asdict())
    with pytest.raises(ValueError, match="logits is of 4 classes; class_counts has 3"):
        ltk.nn.LDAM(COUNTS)(z, y)


def test_module_state() -> None:
    module = ltk.nn.KPS(COUNTS)
    assert set(module.state_dict()) == {"scale", "margin", "class_counts", "_extra_state"}
    module.half()
    assert module.scale.dtype == torch.float32, "tables are float32 whatever the model's dtype"
    other = ltk.nn.KPS([500, 5, 51])
    with pytest.raises(ValueError, match=r"class_counts are \[500, 5, 50\].*made for \[500, 5, 51\]"):
        other.load_state_dict(module.state_dict())
    same = ltk.nn.KPS(COUNTS)
    same.scale.zero_()
    same.load_state_dict(module.state_dict())
    assert torch.equal(same.scale, module.scale)
    assert "tables=[scale, margin]" in repr(module)


def test_every_record_is_complete() -> None:
    for loss in ltk.LOSSES.values():
        assert getattr(ltk.nn, loss.__name__) is loss
        assert getattr(ltk.adjustments, loss.build.__name__) is loss.build
        assert loss.__name__ in ltk.nn.__all__
        assert loss.build.__name__ in ltk.adjustments.__all__
        assert loss.title
        assert issubclass(loss, ltk.nn.AdjustedCrossEntropy)
        assert loss.logits in ("linear", "cosine")
        assert loss.__doc__
        assert isinstance(loss.make(COUNTS), torch.nn.Module)
