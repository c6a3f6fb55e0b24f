"""Mixing and pools of images: label weights by hand, exact box areas, statistics of the draws, no host synchronisation."""

import numpy as np
import pytest
import torch

import ltkernels as ltk
from ltkernels.augment import (
    cmo,
    cmo_pool,
    crop_flip,
    cutmix,
    foreground_indices,
    mixup,
    relative_heads,
    remix,
    remix_pool,
)
from ltkernels.augment._draws import beta, spread
from ltkernels.augment.mixing import boxes


def _seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def _batch(n: int = 64, size: tuple[int, int] = (8, 6)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = _seed(7)
    return torch.randn(n, 3, *size, generator=generator, dtype=torch.float64), torch.randint(
        4, (n,), generator=generator
    )


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 2.5, 40.0])
def test_beta_has_the_moments_and_quantiles_of_its_law(alpha):
    n = 200_000
    drawn = beta(alpha, n, _seed())
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); quantiles against numpy's own sampler.
    variance = 1 / (4 * (2 * alpha + 1))
    assert float(drawn.mean()) == pytest.approx(0.5, abs=4 * (variance / n) ** 0.5)
    assert float(drawn.var()) == pytest.approx(variance, rel=0.02)
    theirs = np.random.default_rng(0).beta(alpha, alpha, n)
    grid = np.linspace(0.02, 0.98, 25)
    assert np.abs((drawn.numpy()[:, None] < grid).mean(0) - (theirs[:, None] < grid).mean(0)).max() < 0.006


def test_mixup_is_the_convex_combination_that_its_target_says():
    images, target = _batch()
    mixed, (first, second, lam) = mixup(images, target, alpha=0.7, generator=_seed())
    assert torch.equal(first, target)
    assert lam.shape == target.shape
    assert lam.dtype == torch.float64
    # The partner of each row, found from the images themselves.
    partner = [
        next(
            j for j in range(len(images))
            if torch.allclose(mixed[i], lam[i] * images[i] + (1 - lam[i]) * images[j], rtol=0, atol=1e-12)
        )
        for i in range(len(images))
    ]  # fmt: skip
    assert sorted(partner) == list(range(len(images)))
    assert torch.equal(second, target[partner])


def test_one_share_for_the_batch():
    images, target = _batch()
    for call in (mixup, cutmix):
        _, (_, _, lam) = call(images, target, per_row=False, generator=_seed())
        assert lam.shape == target.shape
        assert len(lam.unique()) == 1
        assert len(call(images, target, generator=_seed())[1][2].unique()) > 10


def test_remix_label_weights_by_hand():
    # Three classes with 900, 300 and 100 samples: ratios 3 and 9 are at or above kappa = 3.
    counts = [900, 300, 100]
    images = torch.zeros(3000, 2)
    target = torch.randint(3, (3000,), generator=_seed(1))
    _, (_, partner, lam) = mixup(images, target, generator=_seed())
    _, (first, second, weight) = remix(images, target, counts, generator=_seed())
    assert torch.equal(second, partner)
    kinds = set()
    for a, b, share, got in zip(first.tolist(), second.tolist(), lam.tolist(), weight.tolist()):
        if counts[a] >= 3 * counts[b] and share < 0.5:
            expected = 0.0  # the partner is much rarer and holds most of the image
        elif 3 * counts[a] <= counts[b] and share > 0.5:
            expected = 1.0
        else:
            expected = share
        kinds.add((a == b, expected in (0.0, 1.0)))
        assert got == expected
    assert kinds == {(True, False), (False, False), (False, True)}


def test_remix_mixes_the_images_as_mixup_does():
    images, target = _batch()
    assert torch.equal(
        mixup(images, target, generator=_seed())[0], remix(images, target, [9, 3, 2, 1], generator=_seed())[0]
    )


@pytest.mark.parametrize("size", [(8, 6), (1, 5), (32, 32)])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_cutmix_share_is_the_exact_area(size, alpha):
    n = 400
    # Row i holds the value i everywhere: what was pasted can be counted.
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 3, *size).contiguous()
    mixed, (first, second, lam) = cutmix(images, torch.arange(n), alpha=alpha, generator=_seed())
    own = mixed[:, 0] == images[:, 0]
    for i in range(n):
        foreign = mixed[i, 0][~own[i]]
        assert bool((foreign == second[i]).all())
        if first[i] != second[i]:
            assert float(lam[i]) == pytest.approx(float(own[i].float().mean()), abs=1e-7)
            assert not bool(own[i].all())  # no box is empty
            rows, columns = (~own[i]).any(1), (~own[i]).any(0)
            assert int((~own[i]).sum()) == int(rows.sum()) * int(columns.sum())


def test_boxes_cover_more_than_the_minimum_and_move_inside():
    share = torch.cat([torch.zeros(500), torch.rand(4000, generator=_seed(2))]).double()
    for size in ((32, 32), (7, 11), (2, 3)):
        for minimum in (0.0, 0.25, 0.5, 0.9):
            mask, area = boxes(size, share, minimum, _seed())
            assert torch.equal(mask.double().mean((1, 2)), area)
            assert bool((area > minimum).all())
        # Boxes that clipping has not touched keep the published sides.
        mask, area = boxes(size, share, 0.0, _seed())
        sides = [torch.floor(share.sqrt() * s).clamp_min(1) / s for s in size]
        assert bool((area <= sides[0] * sides[1] + 1e-12).all())
        assert float(((area - sides[0] * sides[1]).abs() < 1e-12).double().mean()) > 0.2


def test_box_centres_are_uniform_over_the_pixels():
    mask, _ = boxes((5, 4), torch.zeros(40_000).double(), 0.0, _seed())
    assert torch.allclose(mask.double().mean(0), torch.full((5, 4), 1 / 20, dtype=torch.float64), atol=0.005)


def test_cmo_pastes_the_foreground_and_labels_by_area():
    back, back_target = torch.zeros(300, 3, 8, 8), torch.zeros(300, dtype=torch.int64)
    fore, fore_target = torch.ones(300, 3, 8, 8), torch.full((300,), 5)
    images, (first, second, lam) = cmo(back, back_target, fore, fore_target, min_area=0.25, generator=_seed())
    assert torch.equal(first, back_target)
    assert torch.equal(second, fore_target)
    assert torch.equal(1 - images[:, 0].mean((1, 2)), lam)
    assert bool((lam < 0.75).all())
    assert torch.equal(back, torch.zeros_like(back))


def test_foreground_indices_have_the_requested_frequencies():
    counts = [900, 90, 10]
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    # n^(1 - power): thirds; square roots 30 : 9.49 : 3.16; samples as they come.
    for power, shares in ((1.0, [1 / 3] * 3), (0.5, [0.7034, 0.2224, 0.0741]), (0.0, [0.9, 0.09, 0.01])):
        drawn = labels[foreground_indices(labels, counts, 60_000, power=power, generator=_seed())]
        assert (torch.bincount(drawn) / 60_000).tolist() == pytest.approx(shares, abs=0.008)


def test_same_generator_same_result_and_the_next_one_differs():
    images, target = _batch()
    generator = _seed(3)
    for call in (mixup, cutmix, lambda x, y, generator: remix(x, y, [9, 3, 2, 1], generator=generator)):
        one, two = (call(images, target, generator=_seed(3)) for _ in range(2))
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1][2], two[1][2])
        call(images, target, generator=generator)
        assert not torch.equal(call(images, target, generator=generator)[0], one[0])


def test_no_call_reads_a_tensor():
    # On the meta device any look at a value raises: a call that passes never waits for an accelerator.
    images, target = torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    results = [
        mixup(images, target, alpha=0.4),
        cutmix(images, target, min_area=0.1),
        remix(images, target, [5, 4, 3]),
        cmo(images, target, images, target),
    ]
    for mixed, (first, second, lam) in results:
        assert mixed.shape == images.shape
        assert {t.device.type for t in (mixed, first, second, lam)} == {"meta"}


def test_targets_go_into_the_losses():
    images, target = _batch()
    counts = [30, 20, 10, 4]
    mixed, (first, second, lam) = remix(images, target, counts, generator=_seed())
    logits = mixed.flatten(1)[:, :4].float().requires_grad_()
    tables, CE = ltk.adjustments.ldam(counts)._asdict(), ltk.functional.adjusted_cross_entropy
    loss = CE(logits, (first, second, lam), **tables)
    parts = [CE(logits, y, **tables, reduction="none") for y in (first, second)]
    assert float(loss.detach()) == pytest.approx(
        float((lam * parts[0] + (1 - lam) * parts[1]).mean().detach()), rel=1e-6
    )
    loss.backward()


def test_low_precision_and_byte_images():
    images, target = _batch()
    mixed, (_, _, lam) = mixup(images.bfloat16(), target, generator=_seed())
    assert mixed.dtype == torch.bfloat16
    assert lam.dtype == torch.float32
    whole = (images.abs() * 50).to(torch.uint8)
    assert cutmix(whole, target, generator=_seed())[0].dtype == torch.uint8
    with pytest.raises(TypeError, match="floating"):
        mixup(whole, target)


def test_relative_heads():
    assert relative_heads([300, 151, 150, 50], 3) == [0, 1]
    assert relative_heads([300, 151, 150, 50], 3, kappa=1) == [0, 1, 2]
    with pytest.raises(ValueError, match="tail_class is 4"):
        relative_heads([3, 2, 1, 1], 4)


def _pool_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Class c holds the value 10^c: what a pooled image is made of can be read off it. 40, 12, 4 and 3 samples."""
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([40, 12, 4, 3]))
    return (10.0 ** labels.double()).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous(), labels


def test_remix_pool_takes_less_than_half_from_a_much_larger_class():
    images, labels = _pool_data()
    pool = remix_pool(images, labels, 3, 2000, generator=_seed())
    # Relative heads of 3 samples: classes 0 and 1 (more than 9 samples); class 2 has 4.
    share = (1000 - pool[:, 0, 0, 0]) / 999  # if the head was class 0
    other = (1000 - pool[:, 0, 0, 0]) / 990  # if it was class 1
    assert bool((share < 0.5).all())
    assert float(other.mean()) == pytest.approx(0.25, abs=0.01)  # min(lam, 1 - lam) of a uniform lam
    with pytest.raises(ValueError, match="no class has more than kappa = 20 times"):
        remix_pool(images, labels, 3, 5, kappa=20)


def test_pools_use_tail_samples_equally_and_never_the_own_class_as_partner():
    images, labels = _pool_data()
    images = images + torch.arange(len(labels)).view(-1, 1, 1, 1) * 1e-5  # tells samples apart
    pool = cmo_pool(images, labels, 3, 30, generator=_seed())
    corner = [image[0][image[0] > 999] for image in pool]
    sources = [round((float(values[0]) - 1000) * 1e5) for values in corner]
    assert sorted(sources) == sorted([56, 57, 58] * 10)
    for image in pool:
        # More than half of the pixels are the tail's; the others come from one sample of another class.
        assert int((image[0] > 999).sum()) > 32
        assert len(image[0][image[0] < 999].unique()) <= 1
    backgrounds = torch.cat([image[0][image[0] < 999].unique() for image in cmo_pool(images, labels, 3, 3000)])
    shares = [float(((backgrounds / 10.0**c - 1).abs() < 0.01).double().mean()) for c in range(3)]
    assert shares == pytest.approx([40 / 56, 12 / 56, 4 / 56], abs=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: mixup(x, y[:5]), r"target has shape \(5,\)"),
        (lambda x, y: mixup(x, y.int()), "target has dtype"),
        (lambda x, y: mixup(x, y, alpha=0.0), "alpha is 0"),
        (lambda x, y: cutmix(x[:, 0, 0], y), "images has shape"),
        (lambda x, y: cutmix(x, y, min_area=1.0), "min_area is 1"),
        (lambda x, y: remix(x, y, [3, 2, 1], kappa=0.5), "kappa"),
        (lambda x, y: cmo(x, y, x[:3], y), "they must agree"),
        (lambda x, y: cmo_pool(x, y, 9, 5), "no sample of class 9"),
        (lambda x, y: cmo_pool(x, y, 0, 5, background_classes=[0, 1]), "tail class 0 itself"),
        (lambda x, y: remix_pool(x, y, 0, 5, head_classes=[7]), "no sample of the classes 7"),
    ],
)
def test_bad_arguments_are_named(call, message):
    images, target = _batch()
    with pytest.raises((ValueError, TypeError), match=message):
        call(images, target)


def test_spread_uses_every_index_equally():
    counts = torch.bincount(spread(35, 10, _seed()), minlength=10)
    assert int(counts.sum()) == 35
    assert set(counts.tolist()) == {3, 4}


def test_crop_flip_against_padding_and_slicing():
    images = torch.randn(50, 3, 6, 5, generator=_seed(4))
    fill = torch.tensor([1.0, 2.0, 3.0])
    out = crop_flip(images, padding=2, fill=fill, generator=_seed())
    assert out.is_contiguous(memory_format=torch.channels_last)
    padded = fill.view(3, 1, 1).expand(3, 10, 9).repeat(50, 1, 1, 1)
    padded[:, :, 2:8, 2:7] = images
    seen = set()
    for i in range(50):
        places = [
            (y, x, flipped)
            for y in range(5) for x in range(5) for flipped in (False, True)
            if torch.equal(out[i], padded[i, :, y : y + 6, x : x + 5].flip(2) if flipped else padded[i, :, y : y + 6, x : x + 5])
        ]  # fmt: skip
        assert len(places) == 1
        seen.add(places[0])
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(5))
    assert {flipped for _, _, flipped in seen} == {False, True}


def test_crop_flip_frequencies_and_off_switches():
    images = torch.zeros(9000, 1, 3, 3)
    images[:, 0, 1, 0] = 1.0
    out = crop_flip(images, padding=1, generator=_seed())
    # 3 rows; across: left out of the image, in place, or on the centre, and the mirror images of these.
    assert torch.allclose(out.mean((0, 1)), torch.tensor([[1 / 18, 2 / 18, 1 / 18]] * 3), atol=0.013)
    assert torch.equal(crop_flip(images, padding=0, flip=False), images)
    colour = images.expand(-1, 3, -1, -1)
    assert torch.equal(crop_flip(colour, generator=_seed()), crop_flip(colour, generator=_seed()))
    assert crop_flip(torch.empty(4, 3, 8, 8, device="meta"), fill=torch.zeros(3)).shape == (4, 3, 8, 8)
    for change, message in (({"padding": -1}, "padding"), ({"fill": torch.zeros(2)}, "fill has shape")):
        with pytest.raises(ValueError, match=message):
            crop_flip(images, **change)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, y: ltk.augment.five_crops(x), "images"),
        (lambda x, y: ltk.augment.class_activation_maps(x, torch.ones(2, 3), y), "maps"),
        (lambda x, y: ltk.augment.class_activation_maps(torch.from_numpy(x), torch.ones(2, 3), y), "classes"),
        (
            lambda x, y: ltk.augment.class_activation_maps(torch.from_numpy(x), np.ones((2, 3)), torch.from_numpy(y)),
            "weight",
        ),
        (lambda x, y: ltk.augment.confusing_classes(x[:, :2, 0, 0], y, 1, [0]), "logits"),
        (lambda x, y: ltk.augment.confusing_classes(torch.from_numpy(x[:, :2, 0, 0]), y, 1, [0]), "labels"),
        (lambda x, y: ltk.augment.mixup(x, y), "images"),
        (lambda x, y: ltk.augment.cmo_pool(x, y, 1, 2), "images"),
    ],
)
def test_what_takes_tensors_alone_says_so(call, name):
    with pytest.raises(TypeError, match=f"{name} is ndarray; it must be a tensor"):
        call(np.ones((4, 3, 8, 8), "f4"), np.array([0, 1, 0, 1]))
