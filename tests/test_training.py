"""What the training loop feeds the model and the loss: samplers, schedules, parts of a step, crop, flip, mixing."""

import pytest
import torch

import ltkernels as ltk
from ltkernels import train
from ltkernels.train.batching import Pixels, denominator, rotate
from ltkernels.train.config import Config
from ltkernels.train.engine import Training
from ltkernels.train.recipe import Recipe
from ltkernels.train.samplers import SAMPLERS, Sampler, batches, class_probabilities

COUNTS = [400, 100, 25, 5]
LABELS = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))[
    torch.randperm(530, generator=torch.Generator().manual_seed(3))
]


class Recording(ltk.nn.CrossEntropy):
    """Cross-entropy that keeps the labels of every step, the weights that held, and the factor that was announced."""

    def __init__(self, weight=None):
        super().__init__(weight=weight)
        self.targets, self.weights, self.factors = [], [], []

    def forward(self, logits, target, *, grad_scale=None):
        self.targets.append(target)
        self.factors.append(None if grad_scale is None else float(grad_scale))
        self.weights.append(None if self.weight is None else self.weight.clone())
        return super().forward(logits, target, grad_scale=grad_scale)


class Seen(torch.nn.Module):
    """A linear classifier that keeps the batches it is called with in training."""

    def __init__(self, features=3, classes=4):
        super().__init__()
        self.linear = torch.nn.Linear(features, classes)
        self.batches = []

    def forward(self, x):
        if self.training:
            self.batches.append(x)
        return self.linear(x.flatten(1))


def _recipe(**changes):
    settings = dict(epochs=10, batch_size=50, lr=0.01, weight_decay=0.0, seed=7)  # noqa: C408
    return Recipe(**{**settings, **changes})


def _fit(recipe, criterion=None, model=None, x=None, schedules=()):
    x = torch.arange(530.0)[:, None].expand(530, 3) / 530 if x is None else x
    model, criterion = model or Seen(x[0].numel()), criterion or Recording()
    test = (torch.zeros(4, *x.shape[1:], dtype=x.dtype), torch.arange(4))
    Training(model, criterion, (x, LABELS), test, 4, recipe, "test", schedules).fit()
    return model, criterion


@pytest.mark.parametrize("name", SAMPLERS)
def test_emitted_class_frequencies_are_the_requested_ones(name):
    model, criterion = _fit(_recipe(sampler=name, epochs=60))
    labels = torch.cat(criterion.targets)
    assert len(labels) == 60 * 530
    # Samples reach the model with their own labels.
    rows = (torch.cat(model.batches)[:, 0] * 530).round().long()
    assert torch.equal(LABELS[rows], labels)
    wanted = torch.stack([class_probabilities(name, COUNTS, epoch / 59) for epoch in range(60)]).mean(0)
    observed = torch.bincount(labels, minlength=4).double() / len(labels)
    sigma = (wanted * (1 - wanted) / len(labels)).sqrt()
    assert ((observed - wanted).abs() < 4 * sigma).all(), (observed, wanted)
    # And inside a class every sample comes equally often.
    for label in range(4):
        times = torch.bincount(rows, minlength=530)[label == LABELS].double()
        assert (times - times.mean()).abs().max() < 5 * times.mean().sqrt()


def test_requested_frequencies_by_hand():
    assert class_probabilities("instance", [8, 2]).tolist() == [0.8, 0.2]
    assert class_probabilities("balanced", [8, 2, 0]).tolist() == [0.5, 0.5, 0.0]
    assert class_probabilities("sqrt", [16, 4]).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert class_probabilities("progressive", [8, 2], 0.0).tolist() == [0.8, 0.2]
    assert class_probabilities("progressive", [8, 2], 0.5).tolist() == pytest.approx([0.65, 0.35])
    assert class_probabilities("progressive", [8, 2], 1.0).tolist() == [0.5, 0.5]
    # E(n) = (1 - 0.9999^n) / 0.0001 is n for small n, and 6 321.2 for n = 10 000: n / E(n) = 1 and 1.5820.
    assert class_probabilities("effective", [10000, 1]).tolist() == pytest.approx(
        [1.5820 / 2.5820, 1 / 2.5820], rel=1e-4
    )
    with pytest.raises(ValueError, match="sampler must be one of instance"):
        class_probabilities("none", [1, 2])


def test_instance_sampler_takes_every_sample_once():
    sampler = Sampler(LABELS, 4)
    order = sampler.epoch("instance", torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(530))


def test_a_small_last_batch_joins_the_one_before():
    assert [len(b) for b in batches(torch.arange(101), 50)] == [50, 51]
    assert [len(b) for b in batches(torch.arange(102), 50)] == [50, 50, 2]
    assert [len(b) for b in batches(torch.arange(103), 50, least=4)] == [50, 53]
    assert [len(b) for b in batches(torch.arange(1), 50)] == [1]


def test_drs_balances_from_its_epoch_on():
    _, criterion = _fit(_recipe(balanced_from=8))
    per_epoch = len(criterion.targets) // 10
    shares = [torch.bincount(torch.cat(criterion.targets[e * per_epoch :][:per_epoch]), minlength=4) for e in range(10)]
    assert all(share.tolist() == COUNTS for share in shares[:8])
    assert all(share.min() > 90 for share in shares[8:])


def test_schedules_change_the_loss_at_their_epoch():
    criterion = Recording()
    schedule = ltk.schedules.DRW(criterion, 6, class_counts=COUNTS)
    _fit(_recipe(), criterion, schedules=[schedule])
    per_epoch = len(criterion.weights) // 10
    assert all(w.tolist() == [1.0] * 4 for w in criterion.weights[: 6 * per_epoch])
    expected = ltk.adjustments.class_balanced(COUNTS).weight
    assert all(torch.equal(w, expected) for w in criterion.weights[6 * per_epoch :])


@pytest.mark.parametrize("mix", ["none", "mixup"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(parts, weighted, mix):
    # Unequal parts with unequal sums of weights: the mean of the parts' means would be another number.
    weights = torch.tensor([0.01, 0.5, 2.0, 7.0]) if weighted else None
    x = torch.randn(530, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    models = []
    for accumulate in (1, parts):
        torch.manual_seed(0)
        recipe = _recipe(accumulate=accumulate, mix=mix, epochs=2, lr=0.5)
        models.append(_fit(recipe, Recording(weights), Seen().double(), x)[0])
    assert len(models[0].batches) < len(models[1].batches)
    for one, two in zip(models[0].parameters(), models[1].parameters()):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-14)


def test_denominators_by_hand():
    weight = torch.tensor([1.0, 10.0])
    target = torch.tensor([0, 1, 1])
    assert denominator(None, target) == 3
    assert float(denominator(weight, target)) == 21.0
    mixed = (target, torch.tensor([1, 1, 0]), torch.tensor([0.5, 1.0, 0.25]))
    assert float(denominator(weight, mixed)) == 5.5 + 10.0 + 0.25 * 10 + 0.75


def test_crop_and_flip_reach_the_model_with_the_fill():
    images = torch.rand(530, 1, 4, 4) + 1
    test = (images[:4], torch.arange(4))
    model = Seen(16)
    Training(
        model,
        Recording(),
        (images, LABELS),
        test,
        4,
        _recipe(crop=1, flip=True, epochs=2),
        "test",
        pixels=Pixels(torch.tensor([14.0]), torch.tensor([2.0])),
    ).fit()
    seen = torch.cat(model.batches)
    filled = (seen == -7.0).flatten(1).sum(1)
    # Shifts by one pixel on each axis bring in 0, 4 or 7 pixels, with probabilities 1/9, 4/9 and 4/9.
    assert set(filled.tolist()) == {0, 4, 7}
    assert abs(float((filled == 0).float().mean()) - 1 / 9) < 0.04
    assert bool(((seen >= 1) | (seen == -7.0)).all())


def test_rotation_turns_as_torch_does():
    images, turns = torch.rand(8, 2, 3, 3), torch.arange(8) % 4
    for image, turned, k in zip(images, rotate(images, turns), turns.tolist()):
        assert torch.equal(turned, image.rot90(k, (1, 2)))


def test_pretraining_learns_turns_and_hands_its_backbone_on():
    config = Config(model="mlp", epochs=1, pretrain_epochs=20, pretrain="rotation", threads=1, lr=0.1)
    log = []
    pretrained = train.train(config, progress=lambda phase, done, total, record: log.append(record))
    turns = [r["test_top1"] for r in log if r["phase"] == "pretrain/rotation"]
    assert len(turns) == 20
    assert turns[-1] > 0.8  # chance is 0.25
    plain = train.train(config.replace(pretrain="none"))
    assert pretrained["chosen"] == "logit_adjusted-rotation"
    assert pretrained["variants"][0]["confusion"] != plain["variants"][0]["confusion"]


@pytest.mark.parametrize("mix", ["mixup", "remix", "cutmix", "cmo"])
def test_mixed_batches_reach_the_loss_with_two_targets(mix):
    images = torch.rand(530, 1, 4, 4)
    _, criterion = _fit(_recipe(mix=mix, mix_prob=1.0, epochs=8), x=images)
    per_epoch = len(criterion.targets) // 8
    mixed = [isinstance(target, tuple) for target in criterion.targets]
    if mix == "cmo":
        # Not in epochs 0 to 3, nor in the last three: epoch 4 alone.
        assert mixed == [epoch == 4 for epoch in range(8) for _ in range(per_epoch)]
        foreground = torch.cat([t[1] for t in criterion.targets if isinstance(t, tuple)])
        assert torch.bincount(foreground, minlength=4).min() > 90
    else:
        assert all(mixed)


def test_mixing_happens_with_its_probability():
    _, criterion = _fit(_recipe(mix="cutmix", epochs=40), x=torch.rand(530, 1, 4, 4))
    share = sum(isinstance(target, tuple) for target in criterion.targets) / len(criterion.targets)
    assert 0.4 < share < 0.6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crop": 2}, "crop and flip need images"),
        ({"mix": "cutmix"}, "mix cutmix needs images"),
        ({"task": "rotation"}, "needs square images"),
    ],
)
def test_image_settings_on_vectors_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        _fit(_recipe(**changes))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains(precision):
    config = Config(model="mlp", epochs=6, threads=1, lr=0.1)
    full = train.train(config)["balanced_accuracy"]
    reduced = train.train(config.replace(precision=precision))["balanced_accuracy"]
    assert reduced > 0.5
    assert abs(full - reduced) < 0.1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_hears_of_the_scaler_before_it_rounds(accumulate):
    """The gradients of float16 logits are formed with the loss scaler's factor, and the share of a part of the step."""
    criterion = _fit(_recipe(precision="fp16", accumulate=accumulate, epochs=1), Recording())[1]
    sizes = [len(target) for target in criterion.targets]
    steps = [sum(sizes[i : i + accumulate]) for i in range(0, len(sizes), accumulate)]
    first = 65536.0 / (1 if accumulate == 1 else steps[0])
    assert criterion.factors[:accumulate] == pytest.approx([first] * accumulate)
    assert _fit(_recipe(epochs=1), Recording())[1].factors[0] is None


def test_memory_layout_changes_no_more_than_rounding():
    config = Config(epochs=1, threads=1)
    one, two = (train.train(config.replace(channels_last=layout)) for layout in (True, False))
    assert abs(one["balanced_accuracy"] - two["balanced_accuracy"]) < 0.05


def test_compilation_serves_the_training_steps(monkeypatch):
    compiled = []

    def compile(module, mode):
        compiled.append(mode)
        return lambda x: module(2 * x)

    monkeypatch.setattr(torch, "compile", compile)
    model, _ = _fit(_recipe(compile="reduce-overhead", epochs=1))
    assert compiled == ["reduce-overhead"]
    assert float(torch.cat(model.batches).max()) == pytest.approx(2 * 529 / 530)
    _fit(_recipe(compile="default", epochs=1))
    assert compiled == ["reduce-overhead", None]
