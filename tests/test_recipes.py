"""What a recipe can do beside rates and batches: averaged weights, early stopping, objects of the user's, callbacks; all resumable."""

import json
import signal
import socket
import sys
import types

import numpy as np
import pytest
import torch
from test_backbones import TINY, dataset
from torch import nn

from ltkernels import train
from ltkernels.augment import resized_crop
from ltkernels.cli import main
from ltkernels.train import logs, rundir, signals
from ltkernels.train.data import Dataset
from ltkernels.train.engine import Training
from ltkernels.train.recipe import Own, Recipe

FAST = {"model": "mlp", "batch_size": 16, "threads": 1}


def _vectors(sizes=(40, 20, 8), features=6, noise=1.0):
    rng = np.random.default_rng(0)
    y, y_test = np.repeat(np.arange(3), sizes), np.repeat(np.arange(3), 5)
    x, x_test = (noise * rng.normal(size=(len(v), features)) + v[:, None] for v in (y, y_test))
    return Dataset.from_arrays(x, y, x_test, y_test)


def _weights(folder, name="logit_adjusted"):
    return torch.load(folder / "checkpoints" / f"{name}.pt", weights_only=True)["state"]


def _records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Averaged weights


def test_averages_are_those_of_the_formula():
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), train.jobs.loss_record("ce").make([1, 1])
    x, y = torch.randn(24, 3), torch.arange(24) % 2
    seen = [{key: value.clone() for key, value in model.state_dict().items()}]

    class Watched(torch.optim.SGD):
        def step(self, *args):
            super().step(*args)
            seen.append({key: value.clone() for key, value in model.state_dict().items()})

    def optimizer(groups):
        return Watched(groups, lr=0.1)

    recipe = Recipe(epochs=3, batch_size=8, lr=0.1, weight_decay=0.0, seed=0, ema=0.6)
    Training(model, criterion, (x, y), (x, y), 2, recipe, "test", own=Own(optimizer=optimizer)).fit()
    average = {key: value.double() for key, value in seen[1].items()}
    for t, state in enumerate(seen[2:], 1):
        share = 1 - min(0.6, (1 + t) / (10 + t))
        for key, value in state.items():
            average[key] = (
                value.double() if key.endswith("tracked") else average[key] + share * (value.double() - average[key])
            )
    assert len(seen) == 10
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value.double(), average[key], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model[0].weight, seen[-1]["0.weight"], atol=1e-3)


def test_a_run_keeps_and_evaluates_the_average(tmp_path):
    data = _vectors()
    summary = train.train(train.Config(**FAST, epochs=3, ema=0.99), data, out=tmp_path / "run")
    assert train.evaluate(tmp_path / "run", data)[0]["balanced_accuracy"] == summary["balanced_accuracy"]
    train.train(train.Config(**FAST, epochs=3), data, out=tmp_path / "plain")
    one, two = _weights(tmp_path / "run"), _weights(tmp_path / "plain")
    assert all(not torch.equal(one[key], two[key]) for key in one)


# Early stopping and the best epoch


@pytest.mark.parametrize("freeze", [False, True])
def test_patience_ends_a_run_and_the_headline_stays_the_last_epoch(tmp_path, freeze):
    data = _vectors(noise=3.0)
    settings = {**FAST, "epochs": 40, "val_split": 0.3, "patience": 3, "keep_best": True, "freeze": freeze}
    summary = train.train(train.Config(**settings), data, out=tmp_path / "run")
    values = [record["val_balanced_accuracy"] for record in _records(tmp_path / "run")]
    best = values.index(max(values)) + 1
    assert len(values) == best + 3 < 40
    last, kept = summary["variants"]
    assert (summary["chosen"], last["name"], kept["name"]) == (
        "logit_adjusted",
        "logit_adjusted",
        "logit_adjusted-best",
    )
    assert (summary["balanced_accuracy"], kept["epoch"]) == (last["balanced_accuracy"], best)
    saved = (torch.load(p, weights_only=True) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert [state["prior_power"] for state in saved] == [0.0, 0.0]
    again = train.evaluate(tmp_path / "run", data)
    assert [entry["balanced_accuracy"] for entry in again] == [v["balanced_accuracy"] for v in summary["variants"]]
    model = train.load(tmp_path / "run", "logit_adjusted-best")
    raw = data.x_test.double() * data.std + data.mean
    assert np.mean((model.predict(raw) == data.y_test).numpy()) == pytest.approx(kept["top1"])
    one, two = (_weights(tmp_path / "run", name)["head.weight"] for name in ("logit_adjusted", "logit_adjusted-best"))
    assert not torch.equal(one, two)


def test_the_best_epoch_is_the_one_that_a_shorter_run_ends_with(tmp_path):
    """Constant rates: epoch 4 of 12 is what a run of 4 epochs gives, to the bit."""
    data = _vectors(noise=3.0)
    settings = {**FAST, "val_split": 0.3, "keep_best": True, "lr_schedule": "step:90=0.1"}
    train.train(train.Config(**settings, epochs=12), data, out=tmp_path / "long")
    values = [record["val_balanced_accuracy"] for record in _records(tmp_path / "long")]
    best = values.index(max(values)) + 1
    assert 1 < best < 12
    train.train(train.Config(**settings, epochs=best), data, out=tmp_path / "short")
    one, two = _weights(tmp_path / "long", "logit_adjusted-best"), _weights(tmp_path / "short")
    assert all(torch.equal(one[key], two[key]) for key in one)


# Objects of the user's


def test_own_optimizer_scheduler_and_transform(tmp_path):
    rates, shapes = [], []

    def optimizer(groups):
        assert [group["lr"] for group in groups] == [0.01, 0.1]
        return torch.optim.RMSprop(groups)

    class Halving(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            rates.append([group["lr"] for group in self.optimizer.param_groups])
            return [group["lr"] * 0.5 if self.last_epoch else group["lr"] for group in self.optimizer.param_groups]

    def scheduler(optimizer, steps):
        shapes.append(steps)
        return Halving(optimizer)

    def transform(x):
        shapes.append(tuple(x.shape))
        return x + 0.1 * torch.randn_like(x)

    given = {"optimizer": optimizer, "scheduler": scheduler, "transform": transform}
    config = train.Config(**FAST, epochs=2, lr=0.1, lr_backbone=0.01)
    first = train.train(config, _vectors(), out=tmp_path / "a", **given)
    # 68 samples make 5 batches; the last has 4.
    assert shapes[0] == 10
    assert set(shapes[1:]) == {(16, 6), (4, 6)}
    assert rates[1] == [0.01, 0.1]
    assert rates[-1] == pytest.approx([0.01 * 0.5**9, 0.1 * 0.5**9])
    second = train.train(config, _vectors(), out=tmp_path / "b", **given)
    assert first["variants"][0]["confusion"] == second["variants"][0]["confusion"]
    one, two = _weights(tmp_path / "a"), _weights(tmp_path / "b")
    assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(ValueError, match="nor do resized_crop, augment and transform"):
        train.train(config.replace(freeze=True, lr_backbone=None), _vectors(), transform=transform)


def _given():
    return {
        "optimizer": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
        "scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps),
        "transform": lambda x: x + 0.01 * torch.randn_like(x),
    }


def test_stopped_at_many_steps_the_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Averages, an adapter, patience, the best epoch, and a user's optimizer, schedule and transform, all with a state."""
    data = dataset()[0]
    busy = {
        **TINY,
        "adapter": "adaptformer:2",
        "epochs": 6,
        "ema": 0.9,
        "val_split": 0.3,
        "patience": 4,
        "keep_best": True,
    }
    config = train.Config(**busy, resized_crop=0.5, flip=True, test_views="flip", head="cosine", head_init="means")
    whole = train.train(config, data, out=tmp_path / "whole", **_given())
    looks = iter(range(10**9))

    class _Often(signals.Stop):
        signum = property(lambda self: signal.SIGINT if next(looks) % 3 == 2 else None, lambda self, value: None)

    stops = 0
    monkeypatch.setattr(signals, "Stop", _Often)
    while not (tmp_path / "cut" / "summary.json").exists():
        try:
            train.train(config, data, out=tmp_path / "cut", resume="auto", **_given())
        except signals.Stopped:
            stops += 1
    assert stops > 6
    again = rundir.read_summary(tmp_path / "cut")
    for one, two in zip(whole["variants"], again["variants"], strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in two.items() if "seconds" not in k
        }
    assert _records(tmp_path / "whole") == _records(tmp_path / "cut")
    for name in ("logit_adjusted", "logit_adjusted-best"):
        one, two = _weights(tmp_path / "whole", name), _weights(tmp_path / "cut", name)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_does_not_go_on_without_its_objects_or_with_other_weights(tmp_path):
    data, file = _vectors(), tmp_path / "w.pt"
    torch.save(train.models.mlp((6,)).state_dict(), file)
    config = train.Config(**FAST, epochs=3, weights=str(file))

    def stop(phase, done, total, record):
        raise OSError("stopped")

    transform = _given()["transform"]
    with pytest.raises(OSError, match="stopped"):
        train.train(
            config.replace(checkpoint_seconds=0), data, out=tmp_path / "run", progress=stop, transform=transform
        )
    with pytest.raises(ValueError, match="of other data or settings"):
        train.train(config, data, out=tmp_path / "run", resume="auto")
    torch.save(train.models.mlp((6,)).state_dict(), file)
    with pytest.raises(ValueError, match="of other data or settings"):
        train.train(config, data, out=tmp_path / "run", resume="auto", transform=transform)


# Callbacks and logs


class _Told(logs.Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, settings):
        self.calls.append(("start", settings["epochs"]))

    def on_epoch(self, record):
        self.calls.append(("epoch", record["epoch"]))

    def on_end(self, summary):
        self.calls.append(("end", summary and summary["top1"]))


@pytest.mark.parametrize("kept", [False, True])
def test_callbacks_are_told(tmp_path, kept):
    told, out = _Told(), tmp_path / "run" if kept else None
    summary = train.train(train.Config(**FAST, epochs=2), _vectors(), out=out, callbacks=[told])
    assert told.calls == [("start", 2), ("epoch", 1), ("epoch", 2), ("end", summary["top1"])]

    def stop(*_):
        raise OSError("stopped")

    failed = _Told()
    with pytest.raises(OSError, match="stopped"):
        train.train(train.Config(**FAST, epochs=2), _vectors(), callbacks=[failed], progress=stop)
    assert failed.calls == [("start", 2), ("epoch", 1), ("end", None)]


@pytest.mark.parametrize("log", ["wandb", "mlflow", "tensorboard"])
def test_a_log_without_its_package_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, log):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if log == "tensorboard" else log, None)
    assert main(["train", "--epochs", "1", "--log", log, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"ltkernels: error: --log {log} needs the package: pip install {log}\n"
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=f"log {log} writes into the result folder"):
        train.train(train.Config(**FAST, log=log), _vectors())


def test_what_wandb_is_asked_to_do(tmp_path, monkeypatch):
    """By a module in its place, which knows the calls of the real one that are used here."""
    seen = []
    run = types.SimpleNamespace(
        config={}, summary={}, log=lambda values: seen.append(values), finish=lambda exit_code: seen.append(exit_code)
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **how: seen.append(how) or run))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    summary = train.train(train.Config(**FAST, epochs=1, log="wandb"), _vectors(), out=tmp_path / "run")
    assert seen[0] == {"project": "ltkernels", "name": "run", "dir": str(tmp_path / "run"), "mode": "offline"}
    assert set(seen[1]) == {
        f"train/logit_adjusted/{k}" for k in ("train_loss", "lr", "test_balanced_accuracy", "test_top1")
    } | {"epoch"}
    assert seen[2:] == [0]
    assert run.config["epochs"] == 1
    assert run.summary["top1"] == summary["top1"]


@pytest.mark.parametrize(
    ("package", "folder"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("tensorboard", "tensorboard")]
)
def test_real_logs_stay_in_the_run_folder_and_go_with_it(tmp_path, monkeypatch, package, folder):
    pytest.importorskip(package)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    asked, real = [], socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: asked.append(host) or real(host, *rest, **more)
    )
    for force in (False, True):
        config = train.Config(**FAST, epochs=2, log=package)
        train.train(config, _vectors(), out=tmp_path / "run", force=force)
        assert any(path.is_file() for path in (tmp_path / "run" / folder).rglob("*"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not [host for host in asked if host not in ("localhost", "127.0.0.1", None)]


# Crops


def test_resized_crops_are_boxes_of_the_picture():
    height, width = 12, 20
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ramps = torch.stack([(x + 0.5) / width, (y + 0.5) / height]).expand(400, 2, height, width).contiguous()
    out = resized_crop(ramps, smallest=0.25, generator=torch.Generator().manual_seed(0))
    assert out.shape == ramps.shape
    # Of a ramp from 0 to 1, a crop is a ramp: its slope is the box's side, its middle the box's centre.
    middle = out[:, :, 2:-2, 2:-2]
    wide = (middle[:, 0, :, 1:] - middle[:, 0, :, :-1]).mean((1, 2)) * width
    high = (middle[:, 1, 1:] - middle[:, 1, :-1]).mean((1, 2)) * height
    area, ratio = wide * high, wide / high
    assert 0.22 < float(area.min()) < 0.32
    assert float(area.max()) > 0.9
    assert 0.7 < float(ratio.min()) < 0.85
    assert 1.2 < float(ratio.max()) < 1.42
    assert abs(float(area.mean()) - 0.6) < 0.05
    assert float(out.min()) >= 0
    assert torch.allclose(resized_crop(ramps, smallest=1.0)[:, 0].mean(1)[:, 9], ramps[:, 0].mean(1)[:, 9], atol=0.15)
    for bad, words in ((ramps[0], "images must be"), (ramps.byte(), "images must be")):
        with pytest.raises(ValueError, match=words):
            resized_crop(bad)
    for changes in ({"smallest": 0.0}, {"smallest": 1.5}, {"stretch": 0.5}):
        with pytest.raises(ValueError, match="smallest must be in"):
            resized_crop(ramps, **changes)


def test_a_policy_without_torchvision_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    assert main(["train", "--augment", "randaugment", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "augment randaugment needs torchvision: pip install torchvision" in error
    assert not (tmp_path / "run").exists()
