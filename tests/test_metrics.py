"""Metrics against numbers worked out by hand, and models against their published sizes."""

import json

import pytest
import torch

import ltkernels as ltk
from ltkernels.train.backbones import build_backbone
from ltkernels.train.metrics import (
    class_diversity,
    class_similarity,
    classifier_norms,
    confusion_matrix,
    describe_classifier,
    describe_features,
    expected_calibration_error,
    feature_drift,
    group_of,
    principal_plane,
    relative_accuracy,
    reliability,
    summarize,
)
from ltkernels.train.models import HeadSpec, feature_maps


def test_confusion_matrix_rows_are_true_classes():
    target, predicted = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 1, 0, 1, 0, 2])
    assert confusion_matrix(target, predicted, 3).tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_group_thresholds():
    assert [group_of(n) for n in (101, 100, 20, 19)] == ["many", "medium", "medium", "few"]


def test_summary_by_hand():
    confusion = torch.tensor([[9, 1, 0], [2, 2, 0], [1, 0, 1]])
    result = summarize(confusion, [500, 50, 60])
    assert result["per_class_accuracy"] == [0.9, 0.5, 0.5]
    assert result["top1"] == 0.75  # 12 of 16
    assert result["balanced_accuracy"] == pytest.approx(1.9 / 3)
    assert result["groups"]["many"]["accuracy"] == 0.9
    assert result["groups"]["medium"]["accuracy"] == 0.5
    assert [result["groups"][name]["classes"] for name in ("many", "medium", "few")] == [[0], [1, 2], []]
    assert result["groups"]["few"] == {"accuracy": None, "se": None, "classes": []}
    # Variances of the recalls with (k + 1) / (n + 2): 10/12, 3/6, 2/4.
    variance = (10 / 12 * 2 / 12 / 10 + 0.25 / 4 + 0.25 / 2) / 9
    assert result["balanced_accuracy_se"] == pytest.approx(variance**0.5)
    assert result["groups"]["medium"]["se"] == pytest.approx((0.25 / 4 + 0.25 / 2) ** 0.5 / 2)


def _parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_resnet32_has_the_published_size():
    backbone, width = build_backbone("resnet32", (3, 32, 32), 0)
    assert _parameters(backbone, HeadSpec("linear", "linear").build(width, 10, 0)) == 464154
    assert _parameters(backbone, HeadSpec("cosine", "cosine").build(width, 10, 0)) == 464144


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet32"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28)])
def test_backbones_give_64_features_and_depend_on_the_seed_alone(name, shape):
    state = torch.get_rng_state()
    first, width = build_backbone(name, shape, 1)
    again, _ = build_backbone(name, shape, 1)
    other, _ = build_backbone(name, shape, 2)
    assert width == 64
    assert torch.equal(torch.get_rng_state(), state)
    flat = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, again, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_heads_scale_cosines_only_for_losses_on_plain_logits():
    features = torch.randn(50, 8)
    bare = HeadSpec("cosine", "cosine").build(8, 5, 0)(features)
    scaled = HeadSpec("cosine", "linear").build(8, 5, 0)(features)
    assert bare.abs().max() <= 1
    assert torch.allclose(scaled, 16 * bare)
    with pytest.raises(ValueError, match="cosine logits; use head cosine"):
        HeadSpec("linear", "cosine").build(8, 5, 0)


def test_import_path_and_bad_models():
    backbone, width = build_backbone("test_metrics:tiny", (1, 8, 8), 0)
    assert isinstance(backbone, torch.nn.Module)
    assert width == 7
    for name, message in (
        ("vgg", "known: cnn, mlp, wide, resnet32, timm:NAME"),
        ("no.such.module:Name", "cannot be imported"),
        ("test_metrics:shapeless", r"\(2, d\) features"),
    ):
        with pytest.raises(ValueError, match=message):
            build_backbone(name, (1, 8, 8), 0)
    with pytest.raises(ValueError, match="needs images"):
        build_backbone("cnn", (20,), 0)


def tiny(input_shape):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(input_shape[1] * input_shape[2], 7))


def shapeless(input_shape):
    return torch.nn.Identity()


@pytest.mark.parametrize("name", ["cnn", "resnet32"])
def test_channels_last_holds_through_the_network(name):
    backbone, _ = build_backbone(name, (3, 32, 32), 0)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    backbone.eval()
    expected = backbone(x)
    layouts = []
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _, inputs, out: layouts.extend(
                    t.is_contiguous(memory_format=torch.channels_last) for t in (inputs[0], out)
                )
            )
    backbone.to(memory_format=torch.channels_last)
    got = backbone(x.to(memory_format=torch.channels_last))
    assert len(layouts) >= 6
    assert all(layouts)
    assert torch.allclose(got, expected, atol=1e-5)


def test_resnet32_shortcuts_subsample_and_pad_with_zeros():
    backbone, _ = build_backbone("resnet32", (3, 32, 32), 0)
    block = next(m for m in backbone if getattr(m, "stride", 1) == 2)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    out = block.eval()(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not bool(out[:, :8].any() or out[:, 24:].any())


@pytest.mark.parametrize("name", ["cnn", "resnet32"])
def test_feature_maps_average_to_the_features(name):
    backbone, width = build_backbone(name, (3, 32, 32), 0)
    backbone.eval()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    maps = feature_maps(backbone)(x)
    assert maps.dim() == 4
    assert maps.shape[1] == width
    assert torch.allclose(maps.mean((2, 3)), backbone(x), atol=1e-6)
    mlp, _ = build_backbone("mlp", (1, 8, 8), 0)
    with pytest.raises(ValueError, match="average pooling"):
        feature_maps(mlp)


def test_means_of_recalls_and_f1_by_hand():
    confusion = torch.tensor([[9, 1, 0], [2, 2, 0], [1, 0, 1]])
    result = summarize(confusion, [500, 50, 60])
    assert result["worst_class"] == {"label": 1, "accuracy": 0.5}
    assert result["g_mean"] == pytest.approx((0.9 * 0.5 * 0.5) ** (1 / 3))
    assert result["harmonic_mean"] == pytest.approx(3 / (1 / 0.9 + 2 + 2))
    # Predicted 12, 3 and 1 times; F1 = 2 * right / (true + predicted).
    assert result["macro_f1"] == pytest.approx((18 / 22 + 4 / 7 + 2 / 3) / 3)
    # A hopeless class: the floor in place of 0.
    hopeless = summarize(torch.tensor([[4, 0], [4, 0]]), [5, 5])
    assert hopeless["g_mean"] == pytest.approx(1e-3**0.5)
    assert hopeless["recall_floor"] == 1e-3
    assert hopeless["macro_f1"] == pytest.approx((8 / 12) / 2)


def test_a_class_without_a_test_sample_is_named():
    with pytest.raises(ValueError, match="confusion has no sample of class 1: its recall is undefined"):
        summarize(torch.tensor([[9, 1, 0], [0, 0, 0], [1, 0, 1]]), [500, 50, 60])


def test_calibration_error_by_hand():
    # Confidence 0.9 twice (one right), 0.6 once (right): |1 - 1.8| + |1 - 0.6| over 3 samples.
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    assert expected_calibration_error(reliability(p, torch.tensor([0, 1, 1]))) == pytest.approx(1.2 / 3)
    # A value on a bin's upper edge belongs to it: 0.6 and 0.55 share the bin (0.5, 0.6] of ten.
    q = torch.tensor([[0.6, 0.4], [0.55, 0.45]], dtype=torch.float64)
    assert expected_calibration_error(reliability(q, torch.tensor([0, 1]), bins=10)) == pytest.approx(0.15 / 2)
    sure = torch.eye(3, dtype=torch.float64)
    assert expected_calibration_error(reliability(sure, torch.arange(3))) == 0
    with pytest.raises(ValueError, match="target"):
        expected_calibration_error(reliability(p, torch.tensor([0])))


def test_calibrated_probabilities_have_a_small_error():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(50_000, 1, generator=generator, dtype=torch.float64)
    target = (torch.rand(50_000, generator=generator, dtype=torch.float64) < p[:, 0]).long()
    assert expected_calibration_error(reliability(torch.cat([1 - p, p], 1), target)) < 0.01
    assert expected_calibration_error(reliability(torch.cat([p, 1 - p], 1), target)) > 0.4


def test_relative_accuracy_and_norms():
    assert relative_accuracy(0.6, 0.8) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="balanced_run"):
        relative_accuracy(0.6, 0.0)
    norms, variance = classifier_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]]))
    assert norms == [5, 1, 0]
    assert variance == pytest.approx(14 / 3)


def test_class_diversity_is_that_of_each_class():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % 3
    assert class_diversity(x, y, 4) == [
        *(pytest.approx(float(ltk.diversity.feature_diversity(x[y == c]))) for c in range(3)),
        None,
    ]


def test_class_similarity_by_hand():
    # Means (11, 10), (10, 11), (9, 9) about (10, 10): directions (1, 0), (0, 1), (-1, -1).
    x = torch.tensor([[12.0, 10.0], [10.0, 10.0], [10.0, 11.0], [9.0, 9.0]])
    root = 0.5**0.5
    expected = torch.tensor([[1, 0, -root], [0, 1, -root], [-root, -root, 1]], dtype=torch.float64)
    assert torch.allclose(class_similarity(x, torch.tensor([0, 0, 1, 2]), 3), expected)


def test_principal_plane_finds_the_widest_directions():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 5.0, 0.1, 2.0, 0.1])
    y = torch.arange(400) % 4
    place, label = principal_plane(x, y, 10)
    assert torch.bincount(label).tolist() == [10] * 4
    first = torch.cat([(y == c).nonzero().flatten()[:10] for c in range(4)])
    assert torch.allclose(place, (x - x.mean(0))[first][:, [1, 3]], atol=0.6)


def test_drift_is_about_one_without_any_and_grows_with_a_shift():
    generator = torch.Generator().manual_seed(0)
    shifts = []
    for _ in range(200):
        one, two = (torch.randn(n, 8, generator=generator) for n in (40, 25))
        zeros = [torch.zeros(len(x), dtype=torch.int64) for x in (one, two)]
        shifts.append(feature_drift((one, zeros[0]), (two, zeros[1]), 1)["shift"][0])
    # Chi-squared with 8 degrees of freedom over 8: standard deviation 1/2.
    assert sum(shifts) / 200 == pytest.approx(1.0, abs=4 * 0.5 / 200**0.5)
    moved = feature_drift((one, zeros[0]), (2 * two + 3.0, zeros[1]), 2)
    assert moved["shift"][0] > 20
    assert moved["diversity_ratio"][0] > 1.3
    assert moved["shift"][1] is None
    assert moved["share_after"] == [1.0, 0.0]


def test_descriptions_are_plain_json():
    head = HeadSpec("linear", "linear").build(6, 3, 0)
    x, y = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    scores = torch.log_softmax(head(x).detach().double(), 1)
    classifier = describe_classifier(head, scores, y)
    features = describe_features((x, y), (x, y), 3, points=30)
    for result in (classifier, features):
        assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert len(features["embedding"]["x"]) == 30
    assert classifier["ece"] == pytest.approx(expected_calibration_error(reliability(scores.exp(), y)))
    assert len(classifier["classifier_norms"]) == 3
    bare = describe_classifier(HeadSpec("cosine", "cosine").build(6, 3, 0), scores, y)
    assert (bare["classifier_norms"], bare["classifier_norm_variance"]) == (None, None)
    assert describe_features((x[:, :1], y), (x[:, :1], y), 3)["embedding"] is None
    assert describe_classifier(torch.nn.Sequential(head), scores, y)["classifier_norms"] is None


def test_reliability_counts_by_confidence():
    # Confidences 0.9, 0.7, 0.7, 0.5; the first two are right.
    probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.7, 0.3], [0.5, 0.5]])
    found = reliability(probabilities, torch.tensor([0, 1, 1, 1]), bins=2)
    assert (found["samples"], found["right"]) == ([1, 3], [0, 2])
    assert found["confidence"] == pytest.approx([0.5, 2.3])
    assert expected_calibration_error(found) == pytest.approx((0.5 + 0.3) / 4)
