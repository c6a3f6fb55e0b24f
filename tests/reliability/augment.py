"""Fuzzing of ltkernels.augment: shapes, dtypes, labels, shares and ranges of what it makes; bad input refused, given input untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _draw import DTYPES, Draw, loop, missing, refused
from _part import Part, Tally
from torch import Tensor

from ltkernels import augment


def images(draw: Draw, n: int, kinds: tuple[torch.dtype, ...] = (*DTYPES, torch.uint8)) -> Tensor:
    dtype = draw.say("dtype", draw.choice(kinds))
    shape = draw.say("shape", (n, draw.randint(1, 3), draw.size(12), draw.size(12)))
    x = draw.uniform(*shape) * (255 if dtype == torch.uint8 else 1)
    return draw.layout(x.to(dtype))


def labels(draw: Draw, n: int, classes: int = 4) -> Tensor:
    """Every class has a sample where n allows it."""
    y = draw.integers(0, classes, n)
    y[: min(n, classes)] = torch.arange(classes)[:n]
    return draw.layout(y)


def generator(draw: Draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw.getrandbits(31))


def between(out: Tensor, x: Tensor) -> None:
    low, high = x.amin(), x.amax()
    slack = 1e-2 * (high - low).abs().double() + 1e-3
    assert bool((out.double() >= low.double() - slack).all() & (out.double() <= high.double() + slack).all()), (
        "outside the inputs' range"
    )


def check_target(target: Any, y: Tensor, dtype: torch.dtype) -> Tensor:
    first, second, lam = target
    assert torch.equal(first, y)
    assert sorted(second.tolist()) == sorted(y.tolist()), "partners are no permutation"
    assert lam.shape == y.shape
    assert lam.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool(((lam >= 0) & (lam <= 1)).all()), f"shares {lam}"
    return lam


def bad_labels(draw: Draw, y: Tensor) -> Any:
    return draw.choice([y.double(), y.int(), torch.cat([y, y]), y.tolist(), y[None]])


def bad_alpha(draw: Draw) -> Any:
    return draw.choice([0.0, -1.0, torch.nan, torch.inf, "1", True])


def mixup(draw: Draw) -> None:
    x, options = (
        images(draw, 1 + draw.size(9), DTYPES),
        {"alpha": draw.choice([0.1, 1, 0.5, 8.0]), "per_row": draw.chance(0.5)},
    )
    y, seed = labels(draw, len(x)), draw.getrandbits(31)
    run = lambda call, *a: call(x, y, *a, **options, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    before = x.clone()
    out, target = run(augment.mixup)
    check_target(target, y, x.dtype)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    between(out, x)
    counts = draw.counts(4)
    again, remixed = run(augment.remix, counts)
    assert torch.equal(again, out), "remix and mixup make other images from one seed"
    same = (remixed[2] == target[2]) | (remixed[2] == 0) | (remixed[2] == 1)
    assert bool(same.all())
    assert torch.equal(x, before), "the images were written to"
    refused(lambda: augment.mixup(x, bad_labels(draw, y)))
    refused(lambda: augment.mixup(x, y, alpha=bad_alpha(draw)))
    refused(lambda: augment.mixup(draw.choice([x.long(), x[:0], x.tolist()]), y))
    refused(lambda: augment.remix(x, y, counts, kappa=draw.choice([0.5, torch.nan, "3"])))
    refused(lambda: augment.remix(x, y, draw.choice([[[1]], [1.0, 2.0]])))


def paste(draw: Draw) -> None:
    x, options = images(draw, 1 + draw.size(9)), {"alpha": draw.choice([0.1, 1.0, 8.0]), "per_row": draw.chance(0.5)}
    options["min_area"] = draw.say("min_area", draw.choice([0.0, 0.3, 0.9]))
    y = labels(draw, len(x))
    out, target = augment.cutmix(x, y, **options, generator=generator(draw))
    lam = check_target(target, y, x.dtype)
    assert out.shape == x.shape
    # Black backgrounds, white foregrounds: the share that is told is the share that is there.
    black, white = torch.zeros_like(x), torch.ones_like(x)
    other = labels(draw, len(x))
    pasted, (first, second, lam) = augment.cmo(black, y, white, other, **options, generator=generator(draw))
    assert torch.equal(first, y)
    assert torch.equal(second, other)
    share = pasted.double().flatten(1).mean(1)
    assert bool(((1 - lam.double() - share).abs() < 1e-6).all()), f"shares {1 - lam}, boxes {share}"
    assert bool((share > 0).all())
    assert bool((share > options["min_area"] - 1e-9).all()), f"boxes {share} below min_area"
    refused(lambda: augment.cutmix(x, y, min_area=draw.choice([1.0, -0.1, torch.nan])))
    refused(lambda: augment.cutmix(x, bad_labels(draw, y)))
    refused(lambda: augment.cmo(x, y, torch.cat([x, x]), y))
    picked = augment.foreground_indices(
        y, draw.counts(4), 7, power=draw.choice([0.0, 1.0, 2]), generator=generator(draw)
    )
    assert picked.shape == (7,)
    assert bool(((picked >= 0) & (picked < len(y))).all())
    refused(lambda: augment.foreground_indices(y, [1, 1, 1, 1], 0))


def crop_flip(draw: Draw) -> None:
    x, padding = images(draw, 1 + draw.size(9)), draw.choice([0, 1, 4])
    out = augment.crop_flip(x, padding=padding, flip=draw.chance(0.5), generator=generator(draw))
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    values = torch.cat([x.reshape(-1).double(), torch.zeros(1, dtype=torch.float64)])
    assert bool(torch.isin(out.double(), values).all()), "a pixel that is not of the image"
    refused(lambda: augment.crop_flip(x, padding=draw.choice([-1, 1.5, True])))
    refused(lambda: augment.crop_flip(x[0]))
    refused(lambda: augment.crop_flip(x, padding=1, fill=torch.zeros(x.shape[1] + 1)))


def crops(draw: Draw) -> None:
    x = images(draw, 1 + draw.size(9), (torch.float32, torch.float64))
    smallest = draw.choice([0.05, 0.5, 1.0])
    out = augment.resized_crop(x, smallest=smallest, generator=generator(draw))
    between(out, x)
    constant = torch.full_like(x, 0.5)
    views = augment.five_crops(constant)
    assert len(views) == 5
    for view in (augment.resized_crop(constant, generator=generator(draw)), *views):
        assert view.shape == x.shape
        assert view.dtype == x.dtype
        torch.testing.assert_close(view, constant)
    refused(lambda: augment.resized_crop(x, smallest=draw.choice([0.0, -1.0, 1.5, torch.nan])))
    refused(lambda: augment.resized_crop(x, stretch=draw.choice([0.5, torch.nan])))
    refused(lambda: augment.resized_crop(x[0]))


def pools(draw: Draw) -> None:
    x, n = images(draw, 12, DTYPES), 1 + draw.size(20)
    y = torch.tensor([0] * 8 + [1] * 3 + [2])
    for make in (augment.remix_pool, augment.cmo_pool):
        out = make(x, y, 2, n, generator=generator(draw))
        assert out.shape == (n, *x.shape[1:])
        assert out.dtype == x.dtype
        between(out, x)
        refused(lambda make=make: make(x, y, 3, n))
        refused(lambda make=make: make(x, y, 2, 0))
        refused(lambda make=make: make(x, bad_labels(draw, y), 2, n))
    heads = augment.relative_heads([8, 3, 1], 2, draw.choice([1.0, 3.0, 7.9]))
    assert 2 not in heads
    assert 0 in heads
    refused(lambda: augment.relative_heads([8, 3, 1], draw.choice([3, -1])))


def synthesis(draw: Draw) -> None:
    width, n = draw.size(9), 1 + draw.size(20)
    y = torch.tensor([0] * 9 + [1] * 5 + [2] * 3)
    x = draw.layout(draw.normal(17, width).to(draw.say("dtype", draw.choice(DTYPES))))
    similarity = draw.choice(["euclidean", "cosine"])
    options = {"head_classes": [0, 1], "similarity": similarity, "center": draw.choice(["class_mean", "sample"])}
    options["shrinkage"] = draw.choice([0.0, 0.1, 1.0])
    assert augment.most_similar_class(draw.given(x), draw.given(y), 2, [0, 1], similarity=similarity) in (0, 1)
    calibration = augment.calibrate(x, y, 2, **options)
    made = {"fdc": augment.fdc(draw.given(x), draw.given(y), 2, n, **options, generator=generator(draw))}
    made["smote"] = augment.smote(draw.given(x), draw.given(y), 2, n, k=draw.randint(1, 7), generator=generator(draw))
    for name, out in made.items():
        assert out.shape == (n, width), name
        assert out.dtype in (x.dtype, torch.float64), name  # as it was given
        assert bool(out.isfinite().all())
    between(made["smote"], x[y == 2])
    assert calibration.sample(n).shape == (n, width)
    for call in (lambda x, y, c, n: augment.fdc(x, y, c, n, **options), augment.smote):
        refused(lambda call=call: call(x, y, 3, n))
        refused(lambda call=call: call(x, y, 2, 0))
        refused(lambda call=call: call(x, y[1:], 2, n))
        bad = x.double().clone(memory_format=torch.contiguous_format)
        bad[0, 0] = torch.nan
        refused(lambda call=call, bad=bad: call(draw.choice([bad, x.long(), x[:, 0]]), y, 2, n))
    refused(lambda: calibration.sample(0))
    refused(lambda: augment.calibrate(x, y, 2, head_classes=[2]))
    refused(lambda: augment.calibrate(x, y, 2, head_classes=[0], shrinkage=draw.choice([-0.1, 1.1])))


def fusion(draw: Draw) -> None:
    c, h, w, n = draw.size(6), draw.size(5), draw.size(5), 1 + draw.size(12)
    dtype = draw.say("dtype", draw.choice([torch.float32, torch.float64]))
    y = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    maps = draw.layout(draw.normal(12, c, h, w).relu().to(dtype))
    weight, bias = draw.normal(3, c).to(dtype), draw.normal(3).to(dtype)
    cam = augment.class_activation_maps(maps, weight, y)
    assert cam.shape == (12, h, w)
    assert bool(((cam >= 0) & (cam <= 1 + 1e-6)).all())
    confusing = augment.confusing_classes(draw.normal(12, 3), y, 2, [0, 1], k=draw.randint(1, 4))
    assert set(confusing) <= {0, 1}
    head = torch.arange(12).roll(1)
    fused, kept = augment.fuse(maps, y, maps[head], y[head], weight, generator=generator(draw))
    assert fused.shape == maps.shape
    assert kept.shape == (12, h, w)
    assert bool(kept.flatten(1).any(1).all()), "nothing of the tail was kept"
    ours = (fused == maps) | (fused == maps[head]) | (fused == 0)
    assert bool(ours.all()), "a place is neither the tail's nor the head's nor empty"
    pool = draw.choice(["kept", "average", "none"])
    out = augment.ofa(
        maps,
        y,
        2,
        n,
        weight=weight,
        bias=draw.choice([None, bias]),
        head_classes=[0, 1],
        pool=pool,
        generator=generator(draw),
    )
    assert out.shape == ((n, c, h, w) if pool == "none" else (n, c))
    assert out.dtype == dtype
    assert bool(out.isfinite().all())
    refused(lambda: augment.ofa(maps, y, 2, n, weight=weight, head_classes=[0, 1], pool="max"))
    refused(lambda: augment.ofa(maps, y, 3, n, weight=weight, head_classes=[0, 1]))
    refused(lambda: augment.ofa(maps[0], y, 2, n, weight=weight, head_classes=[0]))
    refused(lambda: augment.fuse(maps, y, maps[:3], y[:3], weight))
    refused(lambda: augment.fuse(maps, y, maps, y, weight, tail_threshold=draw.choice([1.0, -0.1, torch.nan])))
    refused(lambda: augment.confusing_classes(draw.normal(12, 3), y, 2, [2]))


def m2m(draw: Draw) -> None:
    width, n = draw.size(6), 1 + draw.size(8)
    y = torch.tensor([0] * 8 + [1] * 4 + [2] * 2)
    x = draw.layout(draw.normal(14, width).float())
    model = torch.nn.Linear(width, 3)
    targets = draw.integers(0, 3, n)
    options = {"translator": model, "steps": draw.randint(1, 3), "confidence": draw.choice([0.0, 0.5, 1.0])}
    found = augment.m2m(x, y, targets, [8, 4, 2], **options, low=-3.0, high=3.0, generator=generator(draw))
    assert found.samples.shape == (n, width)
    assert bool(found.samples.isfinite().all())
    assert bool((y[found.sources[~found.accepted]] == targets[~found.accepted]).all()), "a real sample of another class"
    assert not bool(found.accepted[targets == 0].any()), "nothing is more frequent than class 0"
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    refused(lambda: augment.m2m(x, y, targets, [8, 4, 2], translator=model, steps=0))
    refused(lambda: augment.m2m(x, y, targets + 7, [8, 4, 2], translator=model))
    refused(lambda: augment.m2m(x, y, targets, [8, 4, 2], translator=model, beta=draw.choice([1.0, -0.1, torch.nan])))
    refused(lambda: augment.m2m(x.long(), y, targets, [8, 4, 2], translator=model))


AUGMENT: dict[Callable[[Draw], None], set[str]] = {
    mixup: {"mixup", "remix"},
    paste: {"cutmix", "cmo", "foreground_indices"},
    crop_flip: {"crop_flip"},
    crops: {"resized_crop", "five_crops"},
    pools: {"remix_pool", "cmo_pool", "relative_heads"},
    synthesis: {"Calibration", "calibrate", "fdc", "smote", "most_similar_class"},
    fusion: {"class_activation_maps", "confusing_classes", "fuse", "ofa"},
    m2m: {"m2m", "Translated"},
}


def augmentations(seed: int, cases: int) -> Tally:
    missing(set(augment.__all__), set().union(*AUGMENT.values()))
    checks = list(AUGMENT)
    return loop(seed, cases, lambda draw: checks[draw.case % len(checks)](draw))


PARTS = (
    Part(
        "augment",
        "every augmentation: shapes, dtypes, labels, shares as told, inputs untouched, bad input refused",
        250,
        augmentations,
    ),
)
