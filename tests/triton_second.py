"""Promise: soft targets, distillation and their heads, experts, the general sigmoid, the cloud and ProCo on Triton are those of the CPU.
Run by test_triton.py under TRITON_INTERPRET=1, in a process of its own; `triton_interpreted` puts the interpreter right."""

from __future__ import annotations

import math

import contract
import pytest
import test_experts
import test_linear_distillation
import test_multi_label
import test_proco
import test_soft_targets
import torch
from triton_interpreted import only_listed_kernels  # noqa: F401  a fixture

import ltkernels as ltk
from ltkernels import _backends
from ltkernels.losses import _terms
from ltkernels.triton import _configs, compile_all, experts, sigmoid, soft_targets
from ltkernels.triton._configs import Tile

CE, SIGMOID = ltk.functional.adjusted_cross_entropy, ltk.functional.sigmoid_cross_entropy
KD, EXPERTS = ltk.functional.distillation, ltk.functional.experts_cross_entropy
DTYPES = contract.DTYPES


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """As on a GPU: what no kernel is forced for, and what is forced to the CPU's, goes to Triton's."""
    choose = _backends.choose

    def chosen(backend, device, needs_torch="", not_cuda=""):
        if needs_torch or backend == "torch":
            return choose(backend, device, needs_torch, not_cuda)
        return choose("triton", device, needs_torch, not_cuda)

    monkeypatch.setattr(_backends, "choose", chosen)


@pytest.fixture(params=["usual tiles", "small tiles"])
def tiles(request, monkeypatch):
    """Rows of several tiles, too, at sizes that the interpreter can do."""
    if request.param == "usual tiles":
        return
    monkeypatch.setattr(soft_targets, "_HELD", ())
    for module, name, tile in (
        (soft_targets, "_STREAMED", Tile(1, 16, 1)),
        (soft_targets, "_DOUBLE", Tile(1, 16, 1)),
        (sigmoid, "_TILES", (Tile(2, 8, 1), Tile(2, 16, 1))),
        (sigmoid, "_DOUBLE", Tile(2, 16, 1)),
        (experts, "_TILES", (Tile(4, 16, 1), Tile(8, 16, 1))),
        (experts, "_DOUBLE", (Tile(4, 16, 1), Tile(8, 16, 1))),
        (_configs, "_DENSE_F64", Tile(1, 32, 1)),
        (_configs, "_SHORT", Tile(1, 32, 1)),
        (_configs, "_LONG_F64", Tile(1, 32, 1)),
    ):
        monkeypatch.setattr(module, name, tile)


# ---- soft targets and distillation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "scale", "all"])
def test_class_probabilities(tiles, kind, dtype) -> None:
    for classes in (1, 17, 100):
        test_soft_targets.test_values(classes, dtype, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distillation(tiles, dtype) -> None:
    for classes, temperature in ((1, 1.0), (17, 0.5), (100, 4.0)):
        test_soft_targets.test_distillation_is_torchs_kl_div(classes, temperature, dtype)


@pytest.mark.parametrize("classes", [128, 1024, 1032])
def test_whole_tiles_and_long_rows(classes) -> None:
    """Of 16-byte accesses too."""
    test_soft_targets.test_values(classes, torch.float32, "all")
    test_soft_targets.test_distillation_is_torchs_kl_div(classes, 2.0, torch.bfloat16)


@pytest.mark.parametrize(
    "test",
    [
        test_soft_targets.test_pinned_values,
        test_soft_targets.test_a_mean_divides_by_the_rows_and_not_by_the_classes,
        test_soft_targets.test_the_teacher_gets_no_gradient_unless_asked,
        test_soft_targets.test_masked_classes,
        test_soft_targets.test_strides_empty_batches_and_shapes,
        test_soft_targets.test_classes_may_be_in_any_order,
        test_experts.test_pinned_sade_and_balpoe,
        test_experts.test_pinned_ride,
        test_experts.test_pinned_ncl,
        test_experts.test_temperature_of_each_class,
        test_experts.test_factors_of_the_experts,
        test_experts.test_masked_classes,
        test_experts.test_more_experts_than_the_kernel_has,
        test_experts.test_reslt_by_hand,
        test_multi_label.test_torchs_own_loss_is_a_special_case,
        test_multi_label.test_hostile_logits,
        test_proco.test_the_numbers_of_the_specification,
    ],
    ids=lambda test: test.__name__,
)
def test_as_the_cpu(test) -> None:
    test()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads(monkeypatch, dtype) -> None:
    """Chunks of logits between torch's products. Of bfloat16 they are rounded to it, as those of `torch.nn.functional.linear` are."""
    if dtype == torch.bfloat16:
        monkeypatch.setitem(test_linear_distillation.CLOSE, torch.bfloat16, 3e-2)
        monkeypatch.setitem(test_linear_distillation.CLOSE, torch.float32, 5e-3)
    test_linear_distillation.test_values_and_gradients(dtype, False, "tables")
    test_linear_distillation.test_class_probabilities_in_chunks(dtype, True, "tables")


def test_a_head_s_teacher_in_another_dtype() -> None:
    test_linear_distillation.test_a_teacher_in_another_dtype(torch.float16, torch.float64)


@pytest.mark.parametrize("reduction", contract.REDUCTIONS)
def test_reductions_and_upstream_gradients(tiles, reduction) -> None:
    test_soft_targets.test_reductions_and_upstream_gradients(reduction)


def test_dtypes_that_differ() -> None:
    """A teacher in another dtype than the student, and probabilities in the logits' own."""
    z, t = torch.randn(4, 40), torch.randn(4, 40)
    for student, teacher in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        found = KD(z.to(student), t.to(teacher), 2.0)
        torch.testing.assert_close(found, KD(z.to(student).double(), t.to(teacher).double(), 2.0).float())
    q = torch.rand(4, 40).bfloat16()
    torch.testing.assert_close(CE(z.bfloat16(), q), CE(z.bfloat16().double(), q.double()).float())


def test_a_row_that_is_not_finite_stays_alone() -> None:
    """Nobody looks at the target on a GPU: the rows say it."""
    z, q = torch.randn(3, 9), torch.rand(3, 9)
    q[1, 2] = math.nan
    loss, grad = contract.gradient(CE, z, q, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, False]


# ---- experts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_focal_factor(monkeypatch):
    whole = test_experts.adjustments

    def alike(*arguments):
        return [None if each is None else each._replace(focal_gamma=0.0) for each in whole(*arguments)]

    monkeypatch.setattr(test_experts, "adjustments", alike)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 7), (2, 5, 1), (3, 6, 100), (3, 3, 600), (8, 3, 33)], ids=str)
@pytest.mark.parametrize("coupling", test_experts.COUPLINGS)
def test_experts_values(one_focal_factor, coupling, shape, dtype) -> None:
    test_experts.test_values(coupling, shape, dtype)


@pytest.mark.parametrize("coupling", test_experts.COUPLINGS)
def test_experts_in_several_tiles(tiles, one_focal_factor, coupling) -> None:
    for dtype in (torch.float32, torch.float64):
        test_experts.test_values(coupling, (3, 3, 40), dtype)
    test_experts.test_rows_and_their_upstream_gradients(coupling)


def test_experts_with_focal_factors_that_differ_are_refused_by_name() -> None:
    z, y = test_experts.logits(2, 3, 5), torch.tensor([0, 1, 2])
    tables = [ltk.losses.Adjustment(focal_gamma=1.0), None]
    meta = [each.to("meta") for each in z]
    assert "different focal_gamma" in ltk.explain(EXPERTS, meta, y.to("meta"), tables, coupling="sum").reason


def test_experts_of_bad_labels_and_ignored_rows() -> None:
    """The row is NaN, and no other."""
    z, y = [each.float().requires_grad_() for each in test_experts.logits(3, 4, 7)], torch.tensor([0, 9, -100, 3])
    for coupling in test_experts.COUPLINGS:
        rows = EXPERTS(z, y, coupling=coupling, reduction="none")
        assert rows.isnan().all(0).tolist() == rows.isnan().any(0).tolist() == [False, True, False, False]
        assert not rows[:, 2].any()
        for grad in torch.autograd.grad(rows.sum(), z):
            assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == [False, True, False, False]
            assert not grad[2].any()
        nobody = torch.full((4,), -100)
        assert EXPERTS(z, nobody, coupling=coupling).isnan()
        assert EXPERTS(z, nobody, coupling=coupling, reduction="sum") == 0


# ---- the general sigmoid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", test_multi_label.OPTIONS)
def test_multi_label_values(name, dtype) -> None:
    test_multi_label.test_values(dtype, name)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_class_indices_are_one_hot_targets(name) -> None:
    test_multi_label.test_class_indices_are_one_hot_targets(name)


def test_multi_label_in_several_tiles(tiles) -> None:
    test_multi_label.test_values(torch.float32, "all")


@pytest.mark.parametrize("kind", test_multi_label.KINDS, ids=str)
def test_kinds_and_layouts_of_targets(kind) -> None:
    test_multi_label.test_kinds_and_layouts_of_targets(kind)


def test_sums_over_many_programs(monkeypatch) -> None:
    """Each program adds its rows' gradients up, several tiles of rows one after the other."""
    monkeypatch.setattr(sigmoid, "_PROGRAMS", 3)
    monkeypatch.setattr(sigmoid, "_TILES", (Tile(2, 128, 1), Tile(2, 128, 1)))
    z, hot = test_multi_label.drawn(23, 37)
    loss, sums = SIGMOID(z, hot, statistics=True)
    wanted, exact = SIGMOID(z.double(), hot, statistics=True, backend="torch")
    torch.testing.assert_close(loss.double(), wanted)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=1e-6)


# ---- closed forms that CUDA has no kernel for -------------------------------------------------------------------------


def check_closed_form(z, y, dtype, options) -> None:
    """Loss and gradient, and those of mixed labels, against the reference in float64 of the same 16-bit logits."""
    z = z.to(dtype)
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    mixed = (y, (y + 1).clamp(min=0) % z.shape[1], torch.linspace(0.1, 0.9, len(y)))
    close = 1e-11 if dtype == torch.float64 else 2e-5
    for target, reduction in ((y, "mean"), (mixed, "none")):
        upstream = torch.linspace(0.5, 2.0, len(y)) if reduction == "none" else 0.25
        loss, grad = contract.gradient(CE, z, target, upstream, reduction=reduction, **options)
        wanted, exact = contract.gradient(
            CE, z.double(), target, upstream, reduction=reduction, backend="torch", **wide
        )
        assert ltk.explain(CE, z, target, **options).backend == "triton"
        assert grad.dtype == dtype
        torch.testing.assert_close(loss.double(), wanted, rtol=close, atol=close)
        rounding = test_soft_targets.CLOSE[dtype] if dtype in contract.HALVES else close
        assert float((grad.double() - exact).norm()) <= rounding * float(exact.norm())
        assert (grad[y == -100] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["tables", "threshold", "focal", "positive", "shift"])
def test_the_closed_form_of_the_sigmoid_with_tables(monkeypatch, name, dtype) -> None:
    for tile in ("_SHORT", "_LONG_F64"):
        monkeypatch.setattr(_configs, tile, Tile(1, 32, 1))
    classes = 37
    z, _ = test_multi_label.drawn(12, classes)
    y = torch.arange(12) * 5 % classes
    y[3] = -100
    real = torch.float64 if dtype == torch.float64 else torch.float32
    alone = {"positive": "tables", "shift": "tables"}
    options = test_multi_label.chosen(alone.get(name, name), classes, real)
    options = {each: value for each, value in options.items() if name not in alone or each == name}
    table = None
    if "positive" in options or "negative" in options:
        table = torch.stack([options.get(each, torch.ones(classes, dtype=real)) for each in ("negative", "positive")])
    term = ltk.losses.Term("sigmoid", table, None, (options.get("threshold", 0.0), 0, 0))
    own = {each: options[each] for each in ("scale", "shift", "focal_gamma") if each in options}
    own["weight"] = torch.linspace(0.5, 2.0, classes, dtype=real)
    check_closed_form(z, y, dtype, {"term": term, "sample_weight": torch.linspace(0.2, 3.0, 12, dtype=real), **own})


def test_a_class_that_is_removed_from_the_sigmoid_costs_nothing() -> None:
    z, y, shift = torch.randn(6, 40), torch.arange(6) + 10, torch.zeros(40)
    shift[3] = -torch.inf
    loss, grad = contract.gradient(CE, z, y, term=ltk.losses.Term("sigmoid"), shift=shift)
    left = [j for j in range(40) if j != 3]
    wanted, exact = contract.gradient(CE, z[:, left], y - 1, term=ltk.losses.Term("sigmoid"), shift=shift[left])
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad[:, left], exact)
    assert (grad[:, 3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["plain", "all"])
def test_the_cloud(tiles, how, dtype) -> None:
    """The same noise as the reference's, of the label's logit too."""
    classes = 45
    z, y = contract.cosines(7, classes), contract.labels(7, classes)
    made = ltk.adjustments.gcl(list(range(1, classes + 1)), s=4.0, noise=0.9, m=0.1, seed=2**40 + 12345)._asdict()
    options = {name: value for name, value in made.items() if value is not None}
    if how == "all":
        options |= {
            "weight": torch.linspace(0.5, 2, classes),
            "label_smoothing": 0.1,
            "sample_weight": torch.linspace(0.5, 2, 7),
        }
    check_closed_form(z, y, dtype, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_noise_is_the_cpus(dtype) -> None:
    """Taken out of the gradient of a row whose logits are 0: of the others it is exp(-size) over the sum, whose logarithm is the loss."""
    rows, classes, seed = 3, 3000, torch.tensor([987654321])
    table = torch.ones(classes)
    table[0] = 0.0
    z, y = torch.zeros(rows, classes, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    loss, grad = contract.gradient(CE, z, y, term=ltk.losses.Term("cloud", table, seed), reduction="none")
    found = -(grad[:, 1:].double().log() + loss.double()[:, None])
    exact = _terms.cloud_sizes(seed, rows, classes)[:, 1:]
    assert float((found - exact).abs().max()) < (1e-12 if dtype == torch.float64 else 3e-6)
    assert exact.max() == 1.0  # some are clamped
    assert exact.min() < 1e-3


def test_heads_of_the_sigmoid_with_tables() -> None:
    """In chunks, by the closed form; the bias goes into the logits."""
    x, w, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((9, 4), (31, 4), (31,)))
    y, prior = torch.arange(9) * 3, torch.linspace(-3, 0, 31)
    term = ltk.losses.Term("sigmoid", torch.rand(2, 31), None, (0.2, 0, 0))
    given = {"shift": prior, "scale": torch.linspace(0.5, 2, 31), "term": term}
    head = ltk.functional.linear_adjusted_cross_entropy
    assert "logits in chunks" in ltk.explain(head, x, w, y, bias=b, chunk_rows=4, **given).reason
    found = torch.autograd.grad(head(x, w, y, bias=b, chunk_rows=4, **given), (x, w, b))
    wanted = torch.autograd.grad(CE(torch.nn.functional.linear(x, w, b), y, backend="torch", **given), (x, w, b))
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, exact)


def test_an_entry_that_cannot_be_is_nan() -> None:
    z, hot = torch.randn(3, 9), torch.zeros(3, 9)
    hot[1, 4] = 0.5
    loss, grad = contract.gradient(SIGMOID, z, hot, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().nonzero().tolist() == [[1, 4]]
    loss, grad = contract.gradient(SIGMOID, z, torch.tensor([0, 9, -100]), reduction="none")
    assert loss.isnan().tolist() == grad.isnan().all(1).tolist() == [False, True, False]
    assert loss[2] == 0
    assert not grad[2].any()


# ---- ProCo ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_von_mises_fisher(tiles, dtype, shifted) -> None:
    term = ltk.adjustments.vmf(torch.rand(45, generator=torch.Generator().manual_seed(1)) * 900, 64).term
    z, y = contract.cosines(7, 45).to(dtype), contract.labels(7, 45)
    options = {"shift": torch.linspace(0, -3, 45)} if shifted else {}
    options |= {
        "weight": torch.linspace(0.5, 2, 45),
        "label_smoothing": 0.1,
        "sample_weight": torch.linspace(0.5, 2, 7),
    }
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    for reduction in contract.REDUCTIONS:
        loss, grad = contract.gradient(CE, z, y, term=term, reduction=reduction, backend="triton", **options)
        wanted, slopes = contract.gradient(CE, z.double(), y, term=term, reduction=reduction, backend="torch", **wide)
        near = 1e-11 if dtype == torch.float64 else 2e-5
        rounding = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, near)
        torch.testing.assert_close(loss.double(), wanted, rtol=near, atol=near)
        torch.testing.assert_close(grad.double(), slopes, rtol=rounding + near, atol=near * float(slopes.abs().max()))


def test_the_list_is_short_enough_for_ci() -> None:
    compile_all.everything.cache_clear()
    assert sum(len(list(module.every())) for module in compile_all.OF_THEIR_OWN) <= 110
