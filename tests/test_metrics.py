"""Metrics against numbers worked out by hand, and models against their published sizes."""

import pytest
import torch

from ltkernels.train.metrics import confusion_matrix, group_of, summarize
from ltkernels.train.models import build_backbone, build_head, feature_maps


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
    assert result["groups"]["many"] == {"accuracy": 0.9, "classes": [0]}
    assert result["groups"]["medium"] == {"accuracy": 0.5, "classes": [1, 2]}
    assert result["groups"]["few"] == {"accuracy": None, "classes": []}
    # Variances of the recalls with (k + 1) / (n + 2): 10/12, 3/6, 2/4.
    variance = (10 / 12 * 2 / 12 / 10 + 0.25 / 4 + 0.25 / 2) / 9
    assert result["balanced_accuracy_se"] == pytest.approx(variance**0.5)


def _parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_resnet32_has_the_published_size():
    backbone, width = build_backbone("resnet32", (3, 32, 32), 0)
    assert _parameters(backbone, build_head("linear", width, 10, "linear", 0)) == 464154
    assert _parameters(backbone, build_head("cosine", width, 10, "cosine", 0)) == 464144


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
    bare = build_head("cosine", 8, 5, "cosine", 0)(features)
    scaled = build_head("cosine", 8, 5, "linear", 0)(features)
    assert bare.abs().max() <= 1
    assert torch.allclose(scaled, 16 * bare)
    with pytest.raises(ValueError, match="cosine logits; use head cosine"):
        build_head("linear", 8, 5, "cosine", 0)


def test_import_path_and_bad_models():
    backbone, width = build_backbone("test_metrics:tiny", (1, 8, 8), 0)
    assert isinstance(backbone, torch.nn.Module)
    assert width == 7
    for name, message in (
        ("vgg", "known: cnn, mlp, resnet32"),
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
