"""OFA and M2m: fusion against loops, activation maps against gradients, translation that reaches its class."""

import pytest
import torch

from ltkernels.augment import class_activation_maps, confusing_classes, fuse, m2m, ofa
from ltkernels.augment.fusion import pooled
from ltkernels.augment.translation import source_probabilities


def _seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def _maps(n: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    maps = torch.rand(n, 5, 4, 3, generator=_seed(1), dtype=torch.float64)
    return maps, torch.arange(n) % 4, torch.randn(4, 5, generator=_seed(2), dtype=torch.float64)


def test_activation_maps_are_grad_cam():
    maps, labels, weight = _maps()
    maps = maps.requires_grad_()
    score = (maps.mean((2, 3)) @ weight.T).gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, maps)
    cam = (gradient.mean((2, 3), keepdim=True) * maps).sum(1).relu().detach()
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    assert torch.allclose(class_activation_maps(maps.detach(), weight, labels), (cam - low) / (high - low), atol=1e-12)


def test_confusing_classes_by_hand():
    # Mean probabilities of class 2's two samples: class 0 0.3, class 1 0.1, class 3 0.35; one sample of class 0 is ignored.
    p = torch.tensor([[0.5, 0.05, 0.25, 0.2], [0.1, 0.15, 0.25, 0.5], [0.0, 1.0, 0.0, 0.0]])
    labels = torch.tensor([2, 2, 0])
    assert confusing_classes(p.log(), labels, 2, [0, 1, 2, 3], k=2) == [3, 0]
    assert confusing_classes(p.log(), labels, 2, [0, 1], k=5) == [0, 1]
    with pytest.raises(ValueError, match="other than tail_class"):
        confusing_classes(p.log(), labels, 2, [2])


def test_fused_maps_take_each_place_from_the_right_sample():
    maps, labels, weight = _maps(400)
    heads, head_labels = maps.flip(0), labels.flip(0)
    fused, kept = fuse(maps, labels, heads, head_labels, weight, generator=_seed())
    tail_cam = class_activation_maps(maps, weight, labels)
    head_cam = class_activation_maps(heads, weight, head_labels)
    from_tail, from_head = 0, 0
    for i in range(400):
        constant = bool(tail_cam[i].max() == 0)
        for y in range(4):
            for x in range(3):
                value = fused[i, :, y, x]
                if torch.equal(value, maps[i, :, y, x]):
                    assert constant or tail_cam[i, y, x] > 0.8
                    from_tail += 1
                elif torch.equal(value, heads[i, :, y, x]):
                    assert head_cam[i, y, x] < 0.2
                    from_head += 1
                else:
                    assert bool((value == 0).all())
                    assert not kept[i, y, x]
                    continue
                assert kept[i, y, x]
        peak = tail_cam[i].flatten().argmax()
        assert torch.equal(fused[i].flatten(1)[:, peak], maps[i].flatten(1)[:, peak])
    assert min(from_tail, from_head) > 300


def test_a_single_place_keeps_the_tail_sample():
    maps = torch.rand(6, 5, 1, 1, generator=_seed())
    fused, kept = fuse(
        maps, torch.zeros(6).long(), maps.flip(0), torch.ones(6).long(), torch.randn(2, 5), generator=_seed()
    )
    assert torch.equal(fused, maps)
    assert bool(kept.all())


def test_pooling():
    fused = torch.zeros(1, 2, 2, 2)
    fused[0, :, 0, 0], fused[0, :, 1, 1] = torch.tensor([4.0, 8.0]), torch.tensor([2.0, 0.0])
    kept = torch.tensor([[[True, False], [False, True]]])
    assert pooled(fused, kept, "kept").tolist() == [[3.0, 4.0]]
    assert pooled(fused, kept, "average").tolist() == [[1.5, 2.0]]
    assert pooled(fused, kept, "none") is fused


def test_offline_ofa_uses_its_classes_alone():
    # Channel c is on for class c alone: what a fused vector is made of can be read off it.
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([30, 20, 10, 3]))
    noise = torch.rand(63, 4, 4, 4, generator=_seed())
    maps = torch.nn.functional.one_hot(labels, 4).float()[:, :, None, None] * (0.5 + noise)
    # Class 3 is taken for 1 more than for 0 or 2.
    weight = torch.eye(4)
    weight[1, 3], weight[0, 3] = 0.5, 0.1
    options = {"weight": weight, "head_classes": [0, 1, 2], "num_confusing": 1}
    drawn = ofa(maps, labels, 3, 60, **options, generator=_seed())
    assert drawn.shape == (60, 4)
    assert bool((drawn[:, 3] > 0).all())
    assert bool((drawn[:, [0, 2]] == 0).all())
    assert bool((drawn[:, 1] > 0).any())
    assert torch.equal(drawn, ofa(maps, labels, 3, 60, **options, generator=_seed()))
    assert ofa(maps, labels, 3, 5, **options, pool="none").shape == (5, 4, 4, 4)
    for change, message in (
        ({"pool": "max"}, "kept, average, none"),
        ({"weight": torch.eye(3)}, r"need \(C, 4\)"),
        ({"tail_class": 8}, "no sample of class 8"),
        ({"tail_threshold": 1.0}, "tail_threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            ofa(**{"maps": maps, "labels": labels, "tail_class": 3, "n": 5, **options, **change})


def _blobs() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Three classes around the corners of a triangle, 200, 50 and 5 samples."""
    counts = [200, 50, 5]
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    return centres[labels] + 0.3 * torch.randn(255, 2, generator=_seed()), labels, counts


def _nearest(x: torch.Tensor) -> torch.Tensor:
    """A classifier that is right: logits fall with the squared distance from the class's centre."""
    return -(torch.cdist(x, torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], dtype=x.dtype)) ** 2)


def test_source_probabilities_by_hand():
    # 1 - 0.9^(100 - 2), 1 - 0.9^(5 - 2) = 0.271, and none from classes that are not more frequent.
    a, b = 1 - 0.9**98, 1 - 0.9**3
    got = source_probabilities(torch.tensor([100, 5, 2, 1]), 2, 0.9)
    assert got.tolist() == pytest.approx([a / (a + b), b / (a + b), 0, 0])
    assert source_probabilities(torch.tensor([5, 5, 2]), 0, 0.9).tolist() == [0, 0, 0]


def test_translation_reaches_the_target_class():
    x, y, counts = _blobs()
    targets = torch.tensor([2] * 40 + [1] * 40 + [0] * 5)
    out = m2m(x, y, targets, counts, translator=_nearest, steps=12, step_size=0.4, generator=_seed())
    translated = out.samples[out.accepted]
    assert int(out.accepted.sum()) == 80
    assert torch.equal(_nearest(translated).argmax(1), targets[out.accepted])
    assert bool((torch.tensor(counts)[y[out.sources[:80]]] > torch.tensor(counts)[targets[:80]]).all())
    # Class 0 is the most frequent: real samples of it.
    assert not bool(out.accepted[80:].any())
    assert torch.equal(out.samples[80:], x[out.sources[80:]])
    assert set(y[out.sources[80:]].tolist()) == {0}


def test_failed_translations_become_real_samples():
    x, y, counts = _blobs()
    targets = torch.full((30,), 2)
    out = m2m(x, y, targets, counts, translator=_nearest, steps=1, step_size=0.01, generator=_seed())
    assert not bool(out.accepted.any())
    assert torch.equal(out.samples, x[out.sources])
    assert set(y[out.sources].tolist()) == {2}


def test_one_step_by_hand():
    # Logits (x, 0), target class 1: the gradient of -log p1 + repulsion * logit_0 is p0 + repulsion > 0, so x falls by a step.
    x, y = torch.tensor([[3.0], [9.0]]), torch.tensor([0, 1])

    def model(z):
        return torch.cat([z, torch.zeros_like(z)], 1)

    out = m2m(
        x, y, torch.tensor([1]), [10, 1], translator=model, steps=4, step_size=1.5, noise=0.0, confidence=0.5, low=-2.5
    )
    assert out.samples.tolist() == [[-2.5]]  # 3 - 4 * 1.5 = -3, clamped
    assert out.accepted.tolist() == [True]


def test_models_keep_their_mode_and_gradients():
    x, y, counts = _blobs()
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    model.train()
    model[3].eval()
    mean = model[1].running_mean.clone()
    one, two = (m2m(x, y, torch.full((6,), 2), counts, translator=model, generator=_seed()) for _ in range(2))
    assert torch.equal(one.samples, two.samples)
    assert [m.training for m in model] == [True, True, True, False]
    assert torch.equal(model[1].running_mean, mean)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 1.0}, "beta is 1"),
        ({"steps": 0}, "steps"),
        ({"targets": torch.tensor([9])}, "class 9"),
        ({"confidence": 2.0}, "confidence"),
        ({"labels": torch.zeros(3).long()}, "labels has shape"),
    ],
)
def test_m2m_refusals(change, message):
    x, y, counts = _blobs()
    arguments = {
        "samples": x,
        "labels": y,
        "targets": torch.tensor([2]),
        "class_counts": counts,
        "translator": _nearest,
    }
    with pytest.raises(ValueError, match=message):
        m2m(**{**arguments, **change})
