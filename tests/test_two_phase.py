"""Promise: the loss in two phases, its classes in any number of parts, is the loss in one; value and gradient, every option."""

from __future__ import annotations

import math

import cuda_cases
import pytest
import torch
from cuda_host import library
from test_loss_values import DTYPES, counts_of, hostile_logits, labels_of, stairs
from two_phase_cases import check, in_parts

import ltkernels as ltk
from ltkernels import _backends
from ltkernels._backends import cuda as _cuda


@pytest.fixture(params=["cpu", "cuda on the host", "torch"])
def _phases(request, monkeypatch) -> None:
    """The kernels of the two phases, and their form in plain torch."""
    if request.param == "torch":
        monkeypatch.setattr(_backends, "two_phase_kernels", lambda device: None)
    elif request.param != "cpu":
        library.emulate(monkeypatch)
        kernels = (_cuda.row_statistics, _cuda.gradient_from_statistics)
        monkeypatch.setattr(_backends, "two_phase_kernels", lambda device: kernels)


@pytest.mark.usefixtures("_phases")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "cuts", [[], [1], [18], [5, 6, 30], [0], [9, 9, 37]]
)  # the last two have parts without classes
@pytest.mark.parametrize("name", ["ce", "kps_ga", "vector_scaling", "class_balanced", "focal"])
def test_parts(name: str, cuts: list[int], dtype: torch.dtype) -> None:
    classes = 37
    record = ltk.LOSSES[name]
    z = hostile_logits(12, classes, dtype, scale=0.3 if record.logits == "cosine" else 3.0)
    if record.logits == "cosine":
        z[1] -= 300.0
    check(z, labels_of(12, classes), cuts, **record.adjustment(counts_of(classes))._asdict())


@pytest.mark.usefixtures("_phases")
@pytest.mark.parametrize("weighted", [False, True])
def test_label_smoothing(weighted: bool) -> None:
    z, y = hostile_logits(9, 21, torch.float32), labels_of(9, 21)
    z[2, 1] = -1.0
    options = {"margin": torch.rand(21), "shift": torch.randn(21), "row_scale": torch.rand(21) + 0.5}
    if weighted:
        options["weight"] = torch.rand(21) + 0.1
    check(z, y, [4, 15], label_smoothing=0.1, cond=2.0, **options)


@pytest.mark.usefixtures("_phases")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", cuda_cases.BY_LABEL.values(), ids=cuda_cases.BY_LABEL)
def test_label_scale_and_smoothing_by_label(names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Of the label, so that `finish` has them and the kernels of the parts need not."""
    for classes, cuts in ((21, [4, 15]), (1203, [5, 401])):
        z, y = hostile_logits(9, classes, dtype), labels_of(9, classes)
        smooth = "label_smoothing" in names
        if smooth:
            z[2, 1] = -1.0
        check(z, y, cuts, cond=2.0 if smooth else 1.0, **cuda_cases.tables_of(classes, dtype, *names))


@pytest.mark.usefixtures("_phases")
def test_smoothing_by_label_of_masked_classes() -> None:
    """As in the fused kernel: infinite where the label is smoothed, and as if there were no smoothing where it is not."""
    z, y, eps = torch.zeros(2, 6), torch.tensor([0, 1]), torch.tensor([0.0, 0.5, 0, 0, 0, 0])
    z[:, 4] = -torch.inf
    loss, grad = in_parts(z, y, [3], 1.0, label_smoothing=eps)
    assert loss[0].item() == pytest.approx(math.log(5))
    torch.testing.assert_close(grad[0], torch.tensor([-0.8, 0.2, 0.2, 0.2, 0.0, 0.2]))
    assert loss[1] == torch.inf


@pytest.mark.usefixtures("_phases")
@pytest.mark.parametrize("kind", ["low first columns", "masked first block", "rising", "falling"])
@pytest.mark.parametrize("offset", [0.0, 2000.0])
def test_references_that_differ_between_the_parts(kind: str, offset: float) -> None:
    z = stairs(kind, 4500)
    y = torch.tensor([3, 2047, 2048, 4499])
    z[torch.arange(4), y] = torch.where(z[torch.arange(4), y].isinf(), 0.0, z[torch.arange(4), y]) + offset
    check(z.float(), y, [40, 2500])


@pytest.mark.usefixtures("_phases")
def test_special_values() -> None:
    """As the truth table of the fused kernel."""
    y = torch.tensor([0, 0, 1, 1])
    z = torch.zeros(4, 6)
    z[0] = -torch.inf
    z[1, 0] = -torch.inf
    z[2, 5] = torch.nan
    z[3, 4] = -torch.inf
    loss, grad = in_parts(z, y, [3], 1.0)
    leaf = z.clone().requires_grad_()
    expected = ltk.functional.adjusted_cross_entropy(leaf, y, reduction="none")
    expected.backward(torch.ones(4))
    torch.testing.assert_close(loss.float(), expected.detach(), equal_nan=True)
    torch.testing.assert_close(grad, leaf.grad, equal_nan=True)


@pytest.mark.usefixtures("_phases")
@pytest.mark.parametrize("classes", [1, 2, 7, 31, 64, 257, 1203])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_alignments(dtype: torch.dtype, classes: int) -> None:
    """Views with any row stride and offset; nothing beside the gradient is written."""
    wide = hostile_logits(5, classes + 9, dtype)
    for offset in range(0, 9, 1 if classes < 100 else 4):
        z, y = wide[:, offset : offset + classes], labels_of(5, classes)
        check(z, y, [], shift=torch.linspace(-2, 0, classes), scale=torch.linspace(0.5, 1.5, classes))
        memory = wide.clone()
        part = memory[:, offset : offset + classes]
        _, expected = in_parts(z, y, [], 1.0)
        _, grad = in_parts(part, y, [], 1.0, inplace=True)
        torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)
        memory[:, offset : offset + classes] = z
        assert torch.equal(memory, wide)


def test_in_place_and_threads_agree_bitwise() -> None:
    z, y = torch.randn(300, 700), torch.randint(0, 700, (300,))
    before, results = torch.get_num_threads(), []
    for threads, inplace in ((1, False), (2, False), (2, True)):
        torch.set_num_threads(threads)
        results.append(in_parts(z.clone(), y, [256], 1.0, inplace))
    torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])
