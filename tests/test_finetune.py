"""Fine-tuning: pretrained weights from a file, frozen backbones, parameter groups, AdamW, clipping."""

import itertools
import json
import time

import numpy as np
import pytest
import torch
from torch import nn

from ltkernels import train
from ltkernels.cli import main
from ltkernels.nn import CosineLinear
from ltkernels.train.data import Dataset
from ltkernels.train.engine import optimizer_of
from ltkernels.train.models import Classifier, block_depths, cnn, mlp, resnet32
from ltkernels.train.recipe import Recipe
from ltkernels.train.weights import load_weights

RECIPE = Recipe(epochs=1, batch_size=8, lr=0.1, weight_decay=0.25, seed=0)


def _data(sizes=(40, 20, 8), features=6):
    rng = np.random.default_rng(0)
    y, y_test = np.repeat(np.arange(3), sizes), np.repeat(np.arange(3), 5)
    x, x_test = (rng.normal(size=(len(v), features)) + v[:, None] for v in (y, y_test))
    return Dataset.from_arrays(x, y, x_test, y_test)


def _groups(optimizer, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


class _Odd(nn.Module):
    """Parameters of every kind that a rule about decay must tell apart."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.position = nn.Embedding(5, 4)
        self.filters = nn.Conv1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm((2, 4))


WEIGHTS = {"filters.weight", "attention.in_proj_weight", "attention.out_proj.weight"}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_is_for_what_multiplies_features(name):
    model = Classifier(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), _Odd()), CosineLinear(4, 3))
    recipe = Recipe(**{**vars(RECIPE), "optimizer": name, "decay": "weights"})
    optimizer = optimizer_of(model, recipe)
    assert type(optimizer) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    decayed = {key for key, (_, decay) in _groups(optimizer, model).items() if decay}
    # LayerNorm over two axes has a matrix for a scale, and it is one of the three that end in "weight" and must not decay.
    assert decayed == {"backbone.0.weight", *(f"backbone.2.{key}" for key in WEIGHTS)}
    # The published recipes of SGD decay everything, AdamW by default does not.
    plain = _groups(optimizer_of(model, Recipe(**{**vars(recipe), "decay": None})), model)
    assert {key for key, (_, decay) in plain.items() if decay} == (decayed if name == "adamw" else set(plain))


def test_the_backbone_has_its_own_rate_and_frozen_parts_none():
    model = Classifier(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), CosineLinear(4, 3))
    recipe = Recipe(**{**vars(RECIPE), "optimizer": "adamw", "lr_backbone": 0.01})
    assert _groups(optimizer_of(model, recipe), model) == {
        "backbone.0.weight": (0.01, 0.25), "backbone.0.bias": (0.01, 0.0), "backbone.1.weight": (0.01, 0.0),
        "backbone.1.bias": (0.01, 0.0), "head.weight": (0.1, 0.0),
    }  # fmt: skip
    model.backbone.requires_grad_(False)
    assert set(_groups(optimizer_of(model, recipe), model)) == {"head.weight"}


def test_rates_fall_from_block_to_block():
    model = Classifier(resnet32((3, 8, 8)), nn.Linear(64, 3))
    recipe = Recipe(**{**vars(RECIPE), "lr_backbone": 0.01, "layer_decay": 0.5})
    rates = {key: rate for key, (rate, _) in _groups(optimizer_of(model, recipe), model).items()}
    assert rates["head.weight"] == 0.1
    # 15 blocks, at 3 to 17 of the Sequential; a convolution and a norm before them.
    assert rates["backbone.17.conv2.weight"] == pytest.approx(0.01 / 2)
    assert rates["backbone.3.bn1.bias"] == pytest.approx(0.01 / 2**15)
    assert rates["backbone.0.weight"] == rates["backbone.1.weight"] == pytest.approx(0.01 / 2**16)
    stages = nn.ModuleDict(
        {"stem": nn.Linear(2, 2), "blocks": nn.ModuleList([mlp((2,)), mlp((2,))]), "norm": nn.LayerNorm(2)}
    )
    depths = {name: block_depths(stages)[p] for name, p in stages.named_parameters()}
    assert (depths["stem.bias"], depths["blocks.0.1.bias"], depths["blocks.1.3.bias"], depths["norm.bias"]) == (
        3,
        2,
        1,
        0,
    )
    with pytest.raises(ValueError, match="layer_decay needs a backbone of blocks"):
        block_depths(mlp((6,)))


def test_rates_reach_the_parameters(monkeypatch):
    """One step of SGD without momentum and decay moves by rate times gradient, in either part of the model."""
    seen = []
    real = torch.optim.SGD.step

    def step(self, *args):
        before = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]
        grads = [[p.grad.clone() for p in g["params"]] for g in self.param_groups]
        real(self, *args)
        for group, old, grad in zip(self.param_groups, before, grads):
            for p, o, g in zip(group["params"], old, grad):
                assert torch.allclose(p, o - group["lr"] * g, atol=1e-7)
            seen.append(group["lr"])

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    config = train.Config(
        model="mlp", epochs=1, batch_size=68, lr=0.5, lr_backbone=0.05, momentum=0, weight_decay=0, warmup=0, threads=1
    )
    train.train(config, _data())
    assert sorted(seen) == pytest.approx([0.05, 0.5])


def test_clipping_bounds_the_step(monkeypatch):
    norms = []
    real = torch.optim.SGD.step

    def step(self, *args):
        gradients = [p.grad for g in self.param_groups for p in g["params"]]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        real(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    config = train.Config(model="mlp", epochs=2, batch_size=16, threads=1)
    train.train(config.replace(clip=0.05), _data())
    assert max(norms) == pytest.approx(0.05, rel=1e-3)
    norms.clear()
    train.train(config, _data())
    assert max(norms) > 0.2


@pytest.mark.parametrize("wrap", [None, "state_dict", "backbone.", "module."])
def test_weights_from_a_file(tmp_path, wrap):
    source = cnn((3, 8, 8))
    state = {**source.state_dict(), "fc.weight": torch.zeros(5, 64)}
    if wrap == "state_dict":
        state = {"state_dict": state, "epoch": 3}
    elif wrap:
        state = {f"{wrap}{key}": value for key, value in state.items()}
    torch.save(state, tmp_path / "w.pt")
    other = cnn((3, 8, 8))
    load_weights(other, tmp_path / "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), source.state_dict().values()))


def test_weights_that_do_not_fit_are_named(tmp_path):
    torch.save(mlp((6,)).state_dict(), tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"small\.pt: do not fit the backbone: .*size mismatch"):
        load_weights(mlp((7,)), tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"small\.pt: lacks \d+ of the backbone's \d+ tensors"):
        load_weights(cnn((3, 8, 8)), tmp_path / "small.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(mlp((6,)), tmp_path / "none.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.pt: not a checkpoint"):
        load_weights(mlp((6,)), tmp_path / "junk.pt")


def test_a_frozen_backbone_is_left_as_it_is_and_seen_once(tmp_path, monkeypatch):
    torch.manual_seed(5)
    source = mlp((6,))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    calls = []
    real = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self.out_features) or real(self, x))
    config = train.Config(
        model="mlp", weights=str(tmp_path / "w.pt"), freeze=True, head="cosine", head_init="means", epochs=5, threads=1
    )
    data = _data()
    summary = train.train(config, data, out=tmp_path / "run")
    # 128 units: when the model is looked at (twice), for the class means, for the features of both sets, and no more in 5 epochs.
    assert calls.count(128) < 10
    model = train.load(tmp_path / "run")
    backbone = model.classifier.backbone
    assert all(torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), source.state_dict().values()))
    assert summary["balanced_accuracy"] > 0.5
    assert train.evaluate(tmp_path / "run", data)[0]["balanced_accuracy"] == summary["balanced_accuracy"]


class Wide(nn.Module):
    """As many features as ViT-B has."""

    def __init__(self, input_shape):
        super().__init__()
        self.layer = nn.Linear(*input_shape, 768)

    def forward(self, x):
        return torch.relu(self.layer(x))


def test_an_epoch_on_ten_thousand_cached_samples_takes_less_than_a_second():
    """Of processor time, which other programs do not change; evaluation on a tenth as many included."""
    y = torch.arange(11_000) % 100
    x = torch.randn(11_000, 32) + 0.5 * torch.randn(100, 32)[y]
    data, marks = Dataset.from_arrays(x[:10_000], y[:10_000], x[10_000:], y[10_000:]), []
    config = train.Config(model="test_finetune:Wide", freeze=True, head="cosine", epochs=4, batch_size=128, threads=1)
    train.train(config, data, progress=lambda *_: marks.append(time.process_time()))
    assert min(late - early for early, late in itertools.pairwise(marks)) < 1.0


def test_a_cosine_head_starts_from_the_class_means(monkeypatch):
    from ltkernels.train import engine, pipeline

    class Seen(Exception):
        pass

    def fit(training):
        raise Seen(training.model)

    monkeypatch.setattr(engine.Training, "fit", fit)
    data = _data()
    config = train.jobs.resolve(train.Config(model="mlp", head="cosine", head_init="means", threads=1), data)
    job = pipeline.Job(config, data)
    with pytest.raises(Seen) as seen:
        job.train_plain()
    (model,) = seen.value.args
    features = model.backbone(job.x_train)
    means = torch.stack([features[job.y_train == c].double().mean(0) for c in range(3)])
    assert torch.allclose(model.head.weight.double(), means, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--freeze", "--data", "digits-lt", "--crop", "2"), "crop, flip, mix and pretrain"),
        (("--freeze", "--lr-backbone", "0.1"), "freeze and lr_backbone"),
        (("--head-init", "means"), "head_init means needs head cosine"),
        (("--weights", "/no/such.pt"), "/no/such.pt: no such file"),
        (("--clip", "0"), "clip must be positive"),
        (("--optimizer", "adam"), "adamw"),
        (("--patience", "3"), "patience needs a validation set: --val-split 0.1"),
        (("--keep-best",), "keep_best needs a validation set: --val-split 0.1"),
        (("--adapter", "lora:x"), "adapter must be none, adaptformer[:WIDTH] or lora[:RANK]"),
        (("--adapter", "lora", "--freeze"), "freeze does not go with it"),
        (("--freeze", "--resized-crop", "0.5"), "nor do resized_crop"),
        (("--layer-decay", "0.5", "--model", "mlp"), "layer_decay needs a backbone of blocks"),
        (("--augment", "randaug"), "randaugment"),
        (("--ema", "0"), "ema must be positive"),
        (("--head-init", "nowhere.npy"), "nowhere.npy: no such file"),
        (("--resized-crop", "2"), "resized_crop must be at most 1"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, capsys, arguments, words):
    try:
        code = main(["train", *arguments, "--out", str(tmp_path / "run")])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert (code, captured.err.count("\n")) == (2, 1), captured.err
    assert words in captured.err
    assert not (tmp_path / "run").exists()


def test_adamw_resumes_to_the_bit(tmp_path):
    config = train.Config(
        model="mlp", optimizer="adamw", lr_backbone=1e-4, clip=1.0, epochs=4, checkpoint_seconds=0, threads=1
    )
    data = _data()
    whole = train.train(config, data, out=tmp_path / "whole")

    def stop(phase, done, total, record):
        if done == 2 and phase.startswith("train"):
            raise OSError("stopped")

    with pytest.raises(OSError, match="stopped"):
        train.train(config, data, out=tmp_path / "cut", progress=stop)
    again = train.train(config, data, out=tmp_path / "cut", resume="auto")
    assert again["variants"][0]["confusion"] == whole["variants"][0]["confusion"]
    one, two = (
        torch.load(tmp_path / f / "checkpoints" / "logit_adjusted.pt", weights_only=True)["state"]
        for f in ("whole", "cut")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_backbone_of_timm(tmp_path):
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch
        pytest.skip(f"timm cannot be imported: {error}")
    source = timm.create_model("test_resnet", pretrained=False, num_classes=7)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], (12, 6))
    x = rng.integers(0, 255, (18, 32, 32, 3)).astype(np.uint8)
    data = Dataset.from_arrays(x, y, x, y)
    config = train.Config(
        model="timm:test_resnet",
        weights=str(tmp_path / "w.pt"),
        optimizer="adamw",
        lr_backbone=1e-4,
        epochs=1,
        threads=1,
    )
    summary = train.train(config, data, out=tmp_path / "run")
    assert np.mean(train.load(tmp_path / "run").predict(x).numpy() == y) == pytest.approx(summary["top1"])
    with pytest.raises(ValueError, match="timm:no_such"):
        train.train(config.replace(model="timm:no_such"), data)


def test_a_finished_run_goes_on(tmp_path):
    data, shared = _data(), {"model": "mlp", "threads": 1, "epochs": 3}
    first = train.train(train.Config(**shared), data, out=tmp_path / "first")
    more = {**shared, "init": str(tmp_path / "first"), "epochs": 1}
    # A step of nothing: the model that goes on is the finished one, classifier and all.
    same = train.train(train.Config(**more, lr=1e-30, weight_decay=0.0), data, out=tmp_path / "same")
    assert same["balanced_accuracy"] == first["balanced_accuracy"]
    one, two = (train.load(tmp_path / name)(data.x_test * data.std + data.mean) for name in ("first", "same"))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    on = train.train(train.Config(**{**more, "epochs": 4}), data, out=tmp_path / "on")
    losses = [
        [json.loads(line)["train_loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "on")
    ]
    assert losses[1][0] < losses[0][0]
    assert len(losses[1]) == 4
    assert on["config"]["init"] == str(tmp_path / "first")
    # Post-hoc adjustment is no part of the classifier that goes on.
    train.train(train.Config(**shared, post_hoc="tau", loss="ce"), data, out=tmp_path / "shifted")
    train.train(
        train.Config(**{**more, "init": str(tmp_path / "shifted"), "loss": "ce"}), data, out=tmp_path / "unshifted"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "ldam"}, "its classifier is a Linear, loss ldam asks for a CosineLinear"),
        ({"model": "wide"}, "its model is not wide"),
        ({"weights": "x.pt"}, "init brings all weights"),
        ({"init": "nowhere"}, "nowhere: not a result folder"),
    ],
)
def test_a_run_that_cannot_go_on_is_named(tmp_path, changes, words):
    data = _data()
    train.train(train.Config(model="mlp", epochs=1, threads=1), data, out=tmp_path / "first")
    config = train.Config(**{"model": "mlp", "epochs": 1, "threads": 1, "init": str(tmp_path / "first"), **changes})
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train.train(config, data, out=tmp_path / "second")
    assert not (tmp_path / "second").exists()
    with pytest.raises(ValueError, match="use train"):
        train.run(train.Config(model="mlp", epochs=1, threads=1, init=str(tmp_path / "first")), data)
    other = _data(features=7)
    with pytest.raises(ValueError, match="samples of another shape"):
        train.train(train.Config(model="mlp", epochs=1, threads=1, init=str(tmp_path / "first")), other)
