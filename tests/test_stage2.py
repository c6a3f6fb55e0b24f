"""Second stages, post-hoc adjustment, several seeds, presets and logs."""

import json
import sys
from statistics import mean, stdev

import numpy as np
import pytest
import torch

import ltkernels as ltk
from ltkernels import train
from ltkernels.train import presets, rundir, stage2
from ltkernels.train.choices import STAGES
from ltkernels.train.config import Config
from ltkernels.train.engine import apply
from ltkernels.train.jobs import load_data, resolve
from ltkernels.train.logs import require
from ltkernels.train.pipeline import Job
from ltkernels.train.schedules import loss_record, parse_options

QUICK = Config(loss="ce", epochs=3, retrain_epochs=8, random_repeats=1, threads=1)


def _trained(**changes):
    config = QUICK.replace(**changes)
    data = load_data(config)
    job = Job(resolve(config, data), data)
    return job, job.train_chosen()


@pytest.fixture(scope="module")
def base():
    return _trained(stage2="tau-norm")


def test_every_stage_has_its_function():
    assert set(stage2._STAGES) == set(STAGES)


@pytest.mark.parametrize("name", ["crt", "lws", "ncm", "ofa", "fdc"])
def test_a_second_stage_changes_the_head_alone_and_helps_plain_training(base, name):
    job, first = base
    before = {k: v.clone() for k, v in first.model.state_dict().items()}
    second = stage2._STAGES[name](job, first)
    assert all(torch.equal(v, before[k]) for k, v in first.model.state_dict().items())
    assert second.model.backbone is first.model.backbone
    recall = [float((t.fit.confusion.diagonal() / t.fit.confusion.sum(1)).mean()) for t in (first, second)]
    # Three epochs of plain cross-entropy miss the tail; each of the methods is there to bring it back.
    assert recall[1] > recall[0] + 0.02


def test_crt_is_balanced_and_plain(base, monkeypatch):
    job, first = base
    seen = {}
    monkeypatch.setattr(job, "retrain", lambda base, name, **kwargs: seen.update(kwargs) or base)
    stage2.crt(job, first)
    assert (seen["sampler"], seen["record"].name) == ("balanced", "ce")


def test_lws_folds_its_factors_into_the_classifier(base):
    job, first = base
    second = stage2.lws(job, first)
    old, new = first.model.head, second.model.head
    factors = new.weight / old.weight
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-5)
    assert torch.allclose(new.bias, factors[:, 0] * old.bias, rtol=1e-5)
    predicted = apply(second.model, job.x_test).argmax(1)
    assert int((predicted == job.y_test).sum()) == int(second.fit.confusion.diagonal().sum())


def test_ncm_predicts_the_mean_with_the_largest_cosine(base):
    job, first = base
    second = stage2.ncm(job, first)
    features, test = job.features(first)
    means = torch.stack([features[job.y_train == c].double().mean(0) for c in range(10)])
    cosine = torch.nn.functional.cosine_similarity(test.double()[:, None], means[None], dim=2)
    assert torch.equal(apply(second.model, job.x_test).argmax(1), cosine.argmax(1))


def test_held_out_samples_are_not_trained_on(base):
    job, _ = base
    data = job.data
    assert torch.bincount(job.y_held).tolist() == [12, 9, 6, 4, 3, 2, 2, 1, 1, 1]
    assert job.class_counts == [n - h for n, h in zip(data.class_counts, torch.bincount(job.y_held).tolist())]
    trained, held = ({tuple(x.flatten().tolist()) for x in part} for part in (job.x_train, job.x_held))
    assert not trained & held
    assert len(Job(resolve(QUICK, data), data).x_train) == len(data.x_train)


def test_tau_norm_takes_the_tau_that_suits_the_held_out_samples(base):
    job, first = base
    second = stage2.tau_norm(job, first)
    scores = dict(second.note["tau_on_held_out"])
    assert scores[second.note["tau"]] == max(scores.values())
    expected = ltk.inference.tau_normalize(first.model.head.weight.detach(), second.note["tau"])
    assert torch.equal(second.model.head.weight, expected)
    assert not second.model.head.bias.any()
    # By hand at tau = 0: the plain classifier without its bias.
    held = apply(first.model.backbone, job.x_held) @ first.model.head.weight.detach().T
    right = (held.argmax(1) == job.y_held).double()
    recalls = [float(right[job.y_held == c].mean()) for c in range(10)]
    assert scores[0.0] == pytest.approx(mean(recalls))


def test_post_hoc_adjusts_the_logits_by_the_chosen_tau(base):
    job, first = base
    second = stage2.post_hoc(job, first)
    tau = second.note["tau"]
    logits = apply(first.model, job.x_test)
    expected = ltk.inference.logit_adjust(logits, job.class_counts, tau)
    prediction = apply(second.model, job.x_test)
    assert torch.equal(prediction.argmax(1), expected.argmax(1))
    assert tau > 0
    few = second.fit.confusion.diagonal()[6:].sum() - first.fit.confusion.diagonal()[6:].sum()
    assert few > 0


@pytest.mark.parametrize("stage", ["lws", "tau-norm", "ncm"])
def test_checkpoints_of_computed_heads_evaluate_to_the_same_numbers(tmp_path, stage):
    config = QUICK.replace(model="mlp", stage2=stage, post_hoc="tau", epochs=2, retrain_epochs=2)
    summary = train.train(config, out=tmp_path / "run")
    assert [v["name"] for v in summary["variants"]] == ["ce", f"ce-{stage}", f"ce-{stage}-post-hoc"]
    assert summary["chosen"] == f"ce-{stage}-post-hoc"
    for again, variant in zip(train.evaluate(tmp_path / "run"), summary["variants"]):
        assert again["per_class_accuracy"] == variant["per_class_accuracy"]


def test_the_scale_of_cosines_stays_under_a_shift(tmp_path):
    """A checkpoint of the adjusted model holds the scale that it was trained with."""
    config = QUICK.replace(model="mlp", head="cosine", head_scale=4.0, post_hoc="tau", epochs=2)
    summary = train.train(config, out=tmp_path / "run")
    for again, variant in zip(train.evaluate(tmp_path / "run"), summary["variants"]):
        assert again["per_class_accuracy"] == variant["per_class_accuracy"]
    plain, shifted = (train.load(tmp_path / "run", v["name"]).module.classifier.head for v in summary["variants"])
    assert (plain.scale, shifted.head.scale) == (4.0, 4.0)


def test_several_seeds_give_means_deviations_and_resume(tmp_path, monkeypatch):
    config = Config(model="mlp", epochs=2, threads=1, post_hoc="tau", holdout=0.3)
    out = tmp_path / "run"
    summary = train.run_seeds("train", config, [0, 1, 2], out=out)
    singles = [rundir.read_summary(out / f"seed-{seed}") for seed in range(3)]
    values = [s["balanced_accuracy"] for s in singles]
    assert len(set(values)) > 1
    assert summary["balanced_accuracy"] == pytest.approx(mean(values))
    assert summary["std"]["balanced_accuracy"] == pytest.approx(stdev(values))
    assert [s["seed"] for s in singles] == summary["seeds"] == [0, 1, 2]
    taus = [s["variants"][1]["tau"] for s in singles]
    assert summary["variants"][1]["tau"] == pytest.approx(mean(taus))
    assert values[1] == train.train(config.replace(seed=1))["balanced_accuracy"]
    assert [sum(row) for row in summary["variants"][0]["confusion"]] == [150] * 10
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (out / "report.html").stat().st_size > 1000
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in records] == [0, 0, 1, 1, 2, 2]
    # The report is that of the first seed's curves, then and when it is made again.
    report = (out / "report.html").read_text()
    assert train.rebuild_report(out).read_text() == report
    with pytest.raises(ValueError, match=r"several seeds; evaluate .*seed-0"):
        train.evaluate(out)
    # As if the run had been killed in its third seed: two are not run again.
    (out / "summary.json").unlink()
    (out / "seed-2" / "summary.json").unlink()
    done = {seed: (out / f"seed-{seed}" / "summary.json").stat().st_mtime_ns for seed in range(2)}
    again = train.run_seeds("train", config, [0, 1, 2], out=out, resume="auto")
    assert again["balanced_accuracy"] == summary["balanced_accuracy"]
    assert done == {seed: (out / f"seed-{seed}" / "summary.json").stat().st_mtime_ns for seed in range(2)}
    with pytest.raises(ValueError, match="was begun with '# ltkernels train, seeds 0,1,2'"):
        train.run_seeds("train", config, [0, 1], out=out, resume="auto")
    with pytest.raises(FileExistsError, match="--force"):
        train.run_seeds("train", config, [0, 1], out=out)


@pytest.mark.parametrize("name", presets.names())
def test_presets_are_valid_settings_of_losses_that_know_their_options(name):
    config = Config(**presets.load(name))
    record = loss_record(config.loss)
    criterion = record.make([5000, 100, 50], **parse_options(config.loss_options))
    # LIFT is a way to tune whatever transformer is there.
    assert config.model == (None if name == "lift" else "resnet32")
    if name == "lift":
        assert (config.epochs, config.lr, config.weight_decay, config.momentum, config.batch_size) == (
            10,
            0.01,
            5e-4,
            0.9,
            128,
        )
        assert (config.adapter, config.head, config.head_scale, config.test_views) == (
            "adaptformer",
            "cosine",
            25.0,
            "crops",
        )
    elif name != "fast":
        assert (config.epochs, config.lr, config.weight_decay, config.momentum) == (200, 0.1, 2e-4, 0.9)
        assert config.batch_size == (64 if name == "kps" else 128)
    assert criterion is not None


def test_presets_make_the_published_tables():
    counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    data = train.data.Dataset.from_arrays(
        torch.randn(12406, 2), torch.repeat_interleave(torch.arange(10), torch.tensor(counts)), *_few()
    )
    for name in ("ldam-drw", "kps", "ddc"):
        config = Config(**presets.load(name)).replace(model="mlp", crop=0, flip=False)
        job = Job(resolve(config, data), data)
        record = loss_record(config.loss)
        criterion, (schedule,) = job._criterion(record, job.class_counts, config.schedule)
        assert schedule.start == (120 if name == "kps" else 160)
        schedule.step(199)
        if name == "ldam-drw":
            assert float(criterion.margin[9]) == pytest.approx(0.5)
            assert float(criterion.margin[0]) == pytest.approx(0.5 * 0.01**0.25)
            assert float(criterion.row_scale[0]) == 30.0
        if name == "ddc":
            assert float(criterion.weight[9] / criterion.weight[0]) == pytest.approx(100**0.15)


def _few():
    return torch.randn(10, 2), torch.arange(10)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="unknown preset 'best'; known: ddc, fast, kps, ldam-drw, lift, vs"):
        presets.load("best")


def test_tensorboard_log_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        require("tensorboard")


def test_custom_data_in_two_lines(tmp_path, monkeypatch):
    x, y = torch.randn(90, 5), torch.arange(90) % 3
    from ltkernels.train.data import _LOADERS

    monkeypatch.setattr("ltkernels.train.data._LOADERS", dict(_LOADERS))
    train.data.register("mine", lambda request: train.data.Dataset.from_arrays(x, y, x, y))
    summary = train.train(Config(data="mine", model="mlp", epochs=1), out=tmp_path / "run")
    assert summary["config"]["data"] == "mine"


def test_relative_accuracy_is_that_of_an_equally_large_balanced_set(tmp_path):
    config = QUICK.replace(model="mlp", epochs=8, relative=True, stage2="ncm", holdout=0.2)
    summary = train.train(config, out=tmp_path / "run")
    twin = summary["balanced_run"]
    assert twin["class_counts"] == [42] * 10  # 417 samples in all
    for variant, balanced in zip(summary["variants"], twin["balanced_accuracy"]):
        assert variant["relative_accuracy"] == pytest.approx(variant["balanced_accuracy"] / balanced)
    assert summary["variants"][0]["relative_accuracy"] < 1
    phases = list(dict.fromkeys(r["phase"] for r in rundir.read_metrics(tmp_path / "run")))
    assert phases == ["train/ce", "balanced/train/ce"]
    with pytest.raises(ValueError, match=r"relative: .* needs"):
        train.train(config.replace(data="npz:" + _natural_tail(tmp_path)))


def _natural_tail(folder):
    x, y = np.random.default_rng(0).normal(size=(60, 4)), np.array([0] * 50 + [1] * 10)
    np.savez(folder / "tail.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return str(folder / "tail.npz")
