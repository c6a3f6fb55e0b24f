"""The jobs on the embedded digits: what a summary holds, same seed same numbers, nothing half-written."""

import json
import math

import pytest
import torch

from ltkernels import train
from ltkernels.train import rundir
from ltkernels.train.config import HEADINGS, Config, from_mapping, read_toml, to_toml
from ltkernels.train.features import complete_tail, derived_seed, head_tail_split
from ltkernels.train.jobs import load_data
from ltkernels.train.pipeline import Job
from ltkernels.train.recipe import parse_lr_schedule, rate_factor
from ltkernels.train.schedules import build_loss, loss_record, start_epoch

# The paper's recipe: clusters of largest FDG, and nothing but synthetic samples on the way to the largest class.
QUICK = Config(
    model="mlp", epochs=3, retrain_epochs=3, random_repeats=2, batch_size=64, lr=0.05, threads=1, select="max", share=1.0,
    subset_size=10,
)  # fmt: skip


def _numbers(value):
    """A summary or log without its times."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items() if "seconds" not in key}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    return train.run(QUICK, out=out), out


def test_head_tail_split_by_hand():
    # 50, 80, 90, 95 of 100: 90 is not more than 0.9.
    assert head_tail_split([10, 50, 5, 30, 5]) == ([1, 3, 0, 2], [4])
    assert head_tail_split([10, 50, 5, 30, 5], 0.79) == ([1, 3], [0, 2, 4])
    digits = [124, 88, 63, 45, 32, 23, 16, 12, 8, 6]
    assert head_tail_split(digits) == ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9])
    with pytest.raises(ValueError, match="empty: class 1"):
        head_tail_split([5, 0, 3])


def test_learning_rate_warms_up_and_decays():
    factors = [rate_factor("cosine", None, epoch, step, 10, 10) for epoch in range(10) for step in range(10)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[52] == pytest.approx(0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert 0 < factors[99] < 0.001


def test_summary_has_what_it_promises(finished):
    summary, out = finished
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    names = [v["name"] for v in summary["variants"]]
    assert names == ["ce", "logit_adjusted", "retrained", "fdc-max", "fdc-random"]
    for key in ("balanced_accuracy", "top1", "best_balanced_accuracy", "per_class_accuracy", "groups"):
        assert summary[key] == summary["variants"][1][key]
    assert [v["fdg_tail"] is None for v in summary["variants"]] == [True, True, True, False, False]
    assert summary["class_counts"] == [124, 88, 63, 45, 32, 23, 16, 12, 8, 6]
    assert summary["groups"]["many"]["classes"] == [0]
    assert summary["groups"]["few"]["classes"] == [6, 7, 8, 9]
    assert summary["seed"] == 0
    assert summary["config"]["epochs"] == 3
    assert summary["seconds"] > 0
    for v in summary["variants"]:
        assert [sum(row) for row in v["confusion"]] == [50] * 10
        assert v["best_balanced_accuracy"] >= v["balanced_accuracy"]


def test_headline_is_the_last_epoch(finished):
    summary, out = finished
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    phases = ["train/ce", "train/logit_adjusted", "retrain/retrained", "retrain/fdc-max"]
    others = ["retrain/fdc-max-1", "retrain/fdc-random", "retrain/fdc-random-1"]
    assert list(dict.fromkeys(r["phase"] for r in log)) == [*phases, *others]
    for phase, variant in zip(phases, summary["variants"]):
        records = [r for r in log if r["phase"] == phase]
        assert [r["epoch"] for r in records] == [1, 2, 3]
        assert records[-1]["test_balanced_accuracy"] == variant["balanced_accuracy"]
        assert max(r["test_balanced_accuracy"] for r in records) == variant["best_balanced_accuracy"]


def test_selection_fills_the_tail_and_orders_the_arms(finished):
    summary, _ = finished
    tail = summary["tail"]
    assert [t["label"] for t in tail["classes"]] == [7, 8, 9]
    assert [t["need"] for t in tail["classes"]] == [112, 116, 118]
    assert [t["pool"] for t in tail["classes"]] == [450, 470, 480]
    for entry in tail["classes"]:
        assert entry["similar_head"] in tail["head_classes"]
        chosen = entry["arms"]["max"]
        assert tuple(chosen["path"][-1]) == (entry["need"], chosen["fdg"])
        assert chosen["fdg"] > entry["arms"]["random-0"]["fdg"]
    fdg = {v["name"]: v["fdg_tail"] for v in summary["variants"]}
    assert fdg["fdc-max"] == pytest.approx(sum(t["arms"]["max"]["fdg"] for t in tail["classes"]) / 3)


def test_run_draws_the_chosen_selection_and_the_greedy_one_as_often_as_random_ones(tmp_path):
    config = QUICK.replace(select="mean", subset_size=None, share=0.5, loss="ce", epochs=1, retrain_epochs=1)
    summary = train.run_seeds("run", config, [0, 1], out=tmp_path / "runs")
    seeds = [json.loads((tmp_path / "runs" / f"seed-{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    for one in seeds:
        variants = {v["name"]: v for v in one["variants"]}
        assert list(variants) == ["ce", "retrained", "fdc-mean", "fdc-max", "fdc-random"]
        assert [(mode, len(draws)) for mode, draws in one["repeats"].items()] == [
            ("mean", 2),
            ("max", 2),
            ("random", 2),
        ]
        classes = one["tail"]["classes"]
        for mode, (first, second) in one["repeats"].items():
            variant, arm = variants[f"fdc-{mode}"], "random-0" if mode == "random" else mode
            assert first["balanced_accuracy"] == variant["balanced_accuracy"]
            tail = [variant["per_class_accuracy"][entry["label"]] for entry in classes]
            assert first["tail_accuracy"] == pytest.approx(sum(tail) / len(tail))
            for name in ("fdg", "offset"):
                values = [entry["arms"][arm][name] for entry in classes]
                assert first[f"{name}_tail"] == pytest.approx(sum(values) / len(values))
            assert first["fdg_tail"] != second["fdg_tail"]  # other rows
        by_mode = {mode: draws[0] for mode, draws in one["repeats"].items()}
        assert by_mode["mean"]["offset_tail"] < by_mode["random"]["offset_tail"]
        assert by_mode["max"]["fdg_tail"] > by_mode["random"]["fdg_tail"]
    # One number a seed, so that seeds are what an interval covers.
    for number, one in enumerate(seeds):
        draws = [draw["balanced_accuracy"] for draw in one["repeats"]["max"]]
        assert summary["repeats"]["max"][number]["balanced_accuracy"] == pytest.approx(sum(draws) / 2)
    for page in ("runs/report.html", "runs/seed-0/report.html"):
        assert "Selections side by side" in (tmp_path / page).read_text()


def test_same_seed_same_numbers_and_other_seed_other_numbers(finished, tmp_path):
    summary, out = finished
    again = train.run(QUICK, out=tmp_path / "again")
    assert _numbers(json.loads(json.dumps(again))) == _numbers(json.loads(json.dumps(summary)))
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
    first = torch.load(out / "checkpoints" / "fdc-max.pt", weights_only=True)["state"]
    second = torch.load(tmp_path / "again" / "checkpoints" / "fdc-max.pt", weights_only=True)["state"]
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = train.train(QUICK.replace(seed=1))
    assert other["variants"][0]["confusion"] != summary["variants"][1]["confusion"]


def test_a_run_leaves_torch_as_it_was():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train.train(QUICK.replace(epochs=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_both_trainings_start_from_one_backbone():
    data = load_data(QUICK)
    job = Job(QUICK, data)
    plain, margin = job.build(loss_record("ce")), job.build(loss_record("ldam"))
    pairs = zip(plain.backbone.parameters(), margin.backbone.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert type(margin.head).__name__ == "CosineLinear"


def test_evaluate_repeats_the_recorded_numbers(finished):
    summary, out = finished
    for again, variant in zip(train.evaluate(out), summary["variants"]):
        assert again["name"] == variant["name"]
        assert again["per_class_accuracy"] == variant["per_class_accuracy"]
        assert again["recorded_balanced_accuracy"] == variant["balanced_accuracy"]


def test_broken_checkpoint_is_named(finished, tmp_path):
    _, out = finished
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    for name in ("summary.json", "config.toml"):
        (copy / name).write_text((out / name).read_text())
    with pytest.raises(FileNotFoundError, match=r"ce\.pt"):
        train.evaluate(copy)
    (copy / "checkpoints" / "ce.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"ce\.pt: damaged"):
        train.evaluate(copy)


@pytest.mark.parametrize("loss", ["ldam", "kps", "focal", "cosface"])
def test_every_kind_of_loss_trains(loss):
    summary = train.train(QUICK.replace(loss=loss, epochs=15, batch_size=16))
    assert [v["name"] for v in summary["variants"]] == [loss]
    assert summary["balanced_accuracy"] > 0.5


def test_schedule_and_sampler_reach_the_training():
    plain = train.train(QUICK)
    drw = train.train(QUICK.replace(schedule="drw", epochs=5))
    no_drw = train.train(QUICK.replace(epochs=5))
    balanced = train.train(QUICK.replace(sampler="balanced"))
    assert drw["chosen"] == "logit_adjusted-drw"
    assert drw["variants"][0]["confusion"] != no_drw["variants"][0]["confusion"]
    assert balanced["variants"][0]["confusion"] != plain["variants"][0]["confusion"]
    with pytest.raises(ValueError, match="weight"):
        train.train(QUICK.replace(loss="class_balanced", schedule="drw"))


def test_learning_rate_of_the_published_recipes():
    # Cao et al. 2019, per epoch: rises over five epochs, then 1, 0.01 from epoch 160 and 0.0001 from epoch 180 on.
    factors = [rate_factor("step:160=0.01,180=0.0001", 5, epoch, 7, 200, 97) for epoch in range(200)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[159:161] == [1.0, 0.01]
    assert factors[179:181] == [0.01, 0.0001]
    for text in ("step:", "step:5=0", "step:9=0.1,3=0.1", "poly", "step:0=0.1"):
        with pytest.raises(ValueError, match="lr_schedule"):
            parse_lr_schedule(text)


COUNTS = [124, 88, 63, 45, 32, 23, 16, 12, 8, 6]


def test_drw_weights_hold_for_the_last_fifth_alone():
    start = start_epoch("drw", None, 10)
    assert start == 8
    criterion, (schedule,) = build_loss(loss_record("ce"), COUNTS, {}, "drw", start, 1.0, "cpu")
    schedule.step(7)
    assert criterion.weight.tolist() == [1.0] * 10
    schedule.step(8)
    # (1 - b) / (1 - b^n) at b = 0.9999 is nearly 1 / n: digit 9 (6 samples) weighs 124 / 6 times digit 0.
    assert float(criterion.weight[9] / criterion.weight[0]) == pytest.approx(124 / 6, rel=0.01)


def test_schedules_and_options_reach_the_loss():
    criterion, (schedule,) = build_loss(loss_record("kps"), COUNTS, {"s": 10.0}, "ga", 6, 1.0, "cpu")
    assert criterion.options["s"] == 10.0
    assert criterion.row_scale.tolist() == [1.0] * 10
    schedule.step(6)
    assert float(criterion.row_scale[9]) > float(criterion.row_scale[0]) >= 10.0
    criterion, (schedule,) = build_loss(loss_record("vector_scaling"), COUNTS, {}, "tla_adrw", 6, 0.5, "cpu")
    schedule.step(6)
    assert criterion.scale.tolist() == [1.0] * 10
    assert float(criterion.weight[9] / criterion.weight[0]) == pytest.approx((124 / 6) ** 0.5)
    with pytest.raises(ValueError, match="ldam has no option tau; known: max_margin, s"):
        build_loss(loss_record("ldam"), COUNTS, {"tau": 1.0}, "none", None, 1.0, "cpu")
    with pytest.raises(TypeError, match=r"GradientAdjustment needs an ltkernels\.nn\.KPS"):
        build_loss(loss_record("ce"), COUNTS, {}, "ga", 6, 1.0, "cpu")
    with pytest.raises(ValueError, match="schedule_start 10 is not below"):
        start_epoch("drw", 10, 10)


@pytest.mark.parametrize("select", ["min", "target:0.3", "random"])
def test_selection_modes(select):
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([60, 30, 8]))
    features = torch.randn(98, 6, generator=generator) + labels[:, None]
    head, tail = complete_tail(features, labels, QUICK.replace(select=select))
    assert head == [0, 1]
    arms = tail[0].arms
    assert len(tail[0].added("random-1")) == 52
    assert not torch.equal(tail[0].added("random-0"), tail[0].added("random-1"))
    if select == "min":
        assert arms["min"].fdg < arms["random-0"].fdg
    if select == "target:0.3":  # the random draws lie at 0.5
        assert abs(arms[select].fdg - 0.3) < abs(arms["random-0"].fdg - 0.3)


def test_single_sample_tail_class_is_left_out():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 5 + [3])
    head, tail = complete_tail(torch.randn(96, 4), labels, QUICK)
    assert (head, [entry.label for entry in tail]) == ([0, 1], [2])


def test_passed_data_set_and_cross_entropy_alone():
    data = train.data.Dataset.from_arrays(
        torch.randn(90, 5), torch.arange(90) % 3, torch.randn(9, 5), torch.arange(9) % 3, class_names=["a", "b", "c"]
    )
    summary = train.run(QUICK.replace(loss="ce"), data)
    # Balanced data has a tail (2 of 3 classes do not exceed 0.9, 3 do), but no class needs a sample.
    assert [v["name"] for v in summary["variants"]] == ["ce", "retrained", "fdc-max", "fdc-random"]
    assert summary["config"]["data"] == "custom"
    assert summary["tail"]["classes"] == []


def test_divergence_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"lr 1e\+30: the loss became"):
        train.train(QUICK.replace(lr=1e30), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    # And the results that it was to replace are still there.
    train.train(QUICK, out=tmp_path / "out")
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "out").iterdir() if p.is_file())
    with pytest.raises(ValueError, match="the loss became"):
        train.train(QUICK.replace(lr=1e30), out=tmp_path / "out", force=True)
    assert before == sorted((p.name, p.read_bytes()) for p in (tmp_path / "out").iterdir() if p.is_file())


def test_unknown_loss_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown loss 'cee' \(did you mean ce\?\); known: .*ldam"):
        train.train(QUICK.replace(loss="cee"))


def _work(out, force, undone=(BaseException,)):
    return rundir.open_run(out, force, resume=False, undone=undone)


def test_force_replaces_runs_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with _work(out, force=False):  # an empty folder is free
        (out / "selection.json").write_text("a")
    with pytest.raises(FileExistsError, match="--force"), _work(out, force=False):
        pass
    with _work(out, force=True):
        assert not (out / "selection.json").exists()
        (out / "selection.json").write_text("b")
        with pytest.raises(FileExistsError, match="another run is writing into it"), _work(out, force=True):
            pass
    assert (out / "selection.json").read_text() == "b"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"), _work(out, force=True):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["notes.txt", "out", "selection.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_the_work_stops(tmp_path, error):
    def work(force):
        with _work(tmp_path / "out", force):
            (tmp_path / "out" / "selection.json").write_text("half")
            raise error

    with pytest.raises(error):
        work(False)
    assert list(tmp_path.iterdir()) == []
    with _work(tmp_path / "out", False):
        (tmp_path / "out" / "selection.json").write_text("whole")
    with pytest.raises(error):
        work(True)
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["whole"]


def test_config_survives_toml(tmp_path):
    config = Config(data='npz:/a "b"\\c\n\x7fü', data_dir="/x", imbalance=50, lr=1e-7, select="target:-0.25")
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert from_mapping(read_toml(path), "x") == config
    assert read_toml(path)["imbalance"] == 50.0
    headings = [line[1:-1] for line in path.read_text().splitlines() if line.startswith("[")]
    assert headings == [heading.split()[0] for heading in HEADINGS.values()]


def test_settings_stand_in_their_table_or_at_the_top(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('seed = 3\n[model]\nloss = "LDAM"\n[data]\ndata = "Digits-LT"\n')
    assert from_mapping(read_toml(path), "x") == Config(seed=3, loss="ldam")
    for text, words in (
        ("[modle]\n", r"mine\.toml: unknown table \[modle\] \(did you mean model\?\); known: data, model"),
        ("[model]\nlr = 1\n", r"lr belongs in \[optimisation\], not in \[model\]"),
        ("lr = 1.0\n[optimisation]\nlr = 1.0\n", "lr stands there twice"),
        ("[model]\nlosss = 1\n", r"unknown key losss \(did you mean loss\?\)"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            from_mapping(read_toml(path), str(path))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"epochz": 3}, ValueError, "unknown key epochz"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": "3"}, TypeError, "epochs must be int"),
        ({"epochs": True}, TypeError, "epochs must be int"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"lr": -1}, ValueError, "lr must be positive"),
        ({"head": "square"}, ValueError, "head must be one of linear, cosine"),
        ({"select": "target:x"}, ValueError, "select must be"),
        ({"select": "most"}, ValueError, "select must be"),
        ({"head_ratio": 1.5}, ValueError, "head_ratio must be at most 1"),
    ],
)
def test_bad_settings_are_named(values, error, message):
    with pytest.raises(error, match=message):
        from_mapping(values, "file.toml")


def test_names_are_taken_with_either_dash():
    config = Config(schedule="tla-adrw", stage2="tau_norm", loss="vector_scaling")
    assert (config.schedule, config.stage2) == ("tla_adrw", "tau-norm")
    with pytest.raises(ValueError, match="schedule must be one of none, drw, drs, ga, tla_adrw, got 'tla'"):
        Config(schedule="tla")


def test_flags_are_true_or_false(tmp_path):
    (tmp_path / "a.toml").write_text(to_toml(Config(flip=True, channels_last=False)))
    values = read_toml(tmp_path / "a.toml")
    assert (values["flip"], values["channels_last"]) == (True, False)
    for bad in ({"flip": 1}, {"channels_last": "yes"}, {"epochs": True}):
        with pytest.raises(TypeError, match="must be (bool|int), got"):
            from_mapping(bad, "x")


def test_select_modes_parse():
    for mode in ("target:0.3", "target:-0.1:0.3", "min", "quantile:1"):
        assert Config(select=mode).select == mode
    for mode in ("target:0.3:0.1", "quantile:2", "min:1", "target:nan"):
        with pytest.raises(ValueError, match=f"select must be .*, got '{mode}'"):
            Config(select=mode)


def test_the_best_epochs_stand_before_what_completes_the_tail():
    """The report takes the completed variants from the end."""
    from ltkernels.train.report.run import _arms

    config = QUICK.replace(epochs=2, retrain_epochs=1, random_repeats=1, val_split=0.2, keep_best=True)
    summary = train.run(config)
    assert [v["name"] for v in summary["variants"]][2:4] == ["ce-best", "logit_adjusted-best"]
    assert [summary["variants"][i]["name"] for _, _, i in _arms(summary)] == ["fdc-max", "fdc-random"]


def test_derived_seeds_differ_by_purpose():
    assert len({derived_seed(s, p) for s in range(20) for p in range(20)}) == 400
