"""A trained model in use: what it predicts is what its run says that it predicts, from another folder and process."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from ltkernels import train
from ltkernels.cli import main
from ltkernels.train import predictor
from ltkernels.train.trained import FORMAT

COUNTS = (40, 20, 8)


def _vectors(sizes, seed):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(3), sizes)
    x = rng.normal(size=(len(y), 5)) + y[:, None]
    return x * [1, 1000, 1e-3, 1, 1] + [0, 50, 0, 1e6, 0], np.array(["ant", "bee", "cow"])[y]


def _rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("predict")
    x_test, y_test = _vectors((9, 9, 9), 1)
    x, y = _vectors(COUNTS, 0)
    np.savez(place / "data.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    config = train.Config(data=f"npz:{place / 'data.npz'}", model="mlp", loss="logit_adjusted", epochs=8, threads=1)
    return place, train.train(config, out=place / "run"), x_test, y_test


def test_another_process_predicts_what_the_summary_says(run, tmp_path):
    place, summary, _, y_test = run
    shutil.copytree(place / "run", tmp_path / "moved")
    command = [sys.executable, "-m", "ltkernels", "predict", "moved", place / "data.npz", "--logits"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "27 predictions in predictions.csv\n"
    rows = _rows(tmp_path / "predictions.csv")
    assert np.mean([row["class"] == label for row, label in zip(rows, y_test)]) == pytest.approx(summary["top1"])
    logits = np.array([[float(row[f"logit:{name}"]) for name in ("ant", "bee", "cow")] for row in rows])
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose([float(row["probability"]) for row in rows], expected.max(1), atol=1e-12)
    # The run's own table of the same samples.
    own = _rows(place / "run" / "tables" / "samples.csv")
    assert [row["prediction"] for row in own] == [row["class"] for row in rows]
    assert [row["label"] for row in own] == list(y_test)
    assert np.allclose([float(r["probability"]) for r in own], [float(r["probability"]) for r in rows], rtol=1e-5)
    assert np.allclose(
        [float(r["loss"]) for r in own], [-np.log(float(r["probability_of_label"])) for r in own], atol=1e-4
    )


def test_tables_of_classes_and_confusions(run):
    place, summary, _, _ = run
    confusion = np.array(summary["variants"][0]["confusion"])
    classes = _rows(place / "run" / "tables" / "classes.csv")
    for c, row in enumerate(classes):
        hits = confusion[c, c]
        assert row["class"] == summary["class_names"][c]
        assert float(row["recall"]) == pytest.approx(hits / 9, abs=1e-5)
        assert float(row["precision"]) == pytest.approx(hits / max(1, confusion[:, c].sum()), abs=1e-5)
        assert float(row["f1"]) == pytest.approx(2 * hits / (9 + confusion[:, c].sum()), abs=1e-5)
        assert (row["support"], row["training_samples"]) == ("9", str(COUNTS[c]))
    table = _rows(place / "run" / "tables" / "confusion.csv")
    assert [[int(row[name]) for name in ("ant", "bee", "cow")] for row in table] == confusion.tolist()


def test_predictions_as_parquet_are_those_of_the_csv(run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    place, _, _, _ = run
    for kind in ("csv", "parquet"):
        assert (
            main(
                [
                    "predict",
                    str(place / "run"),
                    str(place / "data.npz"),
                    "--logits",
                    "--out",
                    str(tmp_path / f"p.{kind}"),
                ]
            )
            == 0
        )
    table, rows = parquet.read_table(tmp_path / "p.parquet").to_pylist(), _rows(tmp_path / "p.csv")
    assert [{key: str(value) for key, value in row.items()} for row in table] == rows


def test_a_model_in_python(run):
    place, _, x_test, _ = run
    model = train.load(place / "run")
    assert (model.class_names, model.class_counts, model.loss) == (
        ("ant", "bee", "cow"),
        list(COUNTS),
        "logit_adjusted",
    )
    logits = model(x_test)
    assert torch.equal(model.predict(x_test), logits.argmax(1))
    assert model.features(x_test).shape == (27, 64)
    # The Module alone: raw samples in, the same logits out; also exported, and for other batch sizes.
    raw = torch.from_numpy(x_test)
    with torch.no_grad():
        assert torch.equal(model.module(raw), logits)
        program = torch.export.export(model.module, (raw,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        assert torch.allclose(program.module()(raw[:5]), logits[:5], atol=1e-6)
    # A single file is enough, in any folder.
    assert torch.equal(train.load(place / "run" / "checkpoints" / "logit_adjusted.pt")(x_test), logits)


def test_another_prior_moves_scores_by_its_logarithm(run):
    place, _, x_test, _ = run
    model = train.load(place / "run")
    shares = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    # Logit adjustment with tau 1 left no prior in the scores.
    plain = model(x_test).double()
    assert torch.allclose(model.log_probabilities(x_test, "train"), torch.log_softmax(plain + shares.log(), 1))
    assert torch.allclose(model.log_probabilities(x_test, "uniform"), torch.log_softmax(plain, 1))
    given = model.log_probabilities(x_test, [2.0, 1.0, 1.0])
    assert torch.allclose(given, torch.log_softmax(plain + torch.tensor([0.5, 0.25, 0.25]).double().log(), 1))
    for bad, message in (([1.0, 2.0], "3 positive"), ([1.0, 0.0, 1.0], "3 positive"), ("all", "uniform, train")):
        with pytest.raises((ValueError, TypeError), match=message):
            model.predict(x_test, bad)


@pytest.mark.parametrize(
    ("settings", "power"),
    [
        ({"loss": "ce"}, 1.0), ({"loss": "logit_adjusted", "loss_options": "tau=0.25"}, 0.75), ({"loss": "balanced_softmax"}, 0.0),
        ({"loss": "ldam"}, None), ({"loss": "ce", "sampler": "balanced"}, None), ({"loss": "ce", "post_hoc": "tau"}, "tau"),
    ],
)  # fmt: skip
def test_what_prior_is_in_the_scores(run, tmp_path, settings, power):
    place, _, x_test, _ = run
    config = train.Config(data=f"npz:{place / 'data.npz'}", model="mlp", epochs=1, threads=1, **settings)
    summary = train.train(config, out=tmp_path / "run")
    model = train.load(tmp_path / "run")
    if power == "tau":
        power = 1.0 - summary["variants"][-1]["tau"]
    assert model.prior_power == power
    assert np.mean(np.array(model.class_names)[model.predict(x_test)] == run[3]) == pytest.approx(summary["top1"])
    if power is None:
        with pytest.raises(ValueError, match=f"loss {settings['loss']}"):
            model.predict(x_test, "uniform")
    if settings["loss"] == "ldam":  # cosines, which its own scale makes logits of probabilities
        assert torch.allclose(model.log_probabilities(x_test), torch.log_softmax(30 * model(x_test).double(), 1))


def test_samples_that_do_not_fit_are_refused(run, tmp_path, capsys):
    place, _, x_test, _ = run
    model = train.load(place / "run")
    with pytest.raises(ValueError, match=r"samples have the shape \(4,\); the model takes \(5,\)"):
        model(x_test[:, :4])
    with pytest.raises(ValueError, match="NaN"):
        model(x_test * np.nan)
    (tmp_path / "a.png").write_bytes(b"x")
    for arguments, word in (
        ((place / "run", tmp_path / "a.png"), "trained on arrays of shape (5,)"),
        ((place / "run", tmp_path), "no image|trained on arrays"),
        ((place / "run", place / "data.npz", "--out", "x.txt"), ".csv or .parquet"),
        ((place / "run", place / "data.npz", "--out", tmp_path / "no" / "x.csv"), "no folder"),
        ((place / "run", place / "data.npz", "--variant", "ce"), "no variant 'ce'; it has logit_adjusted"),
        (
            (place / "run", place / "data.npz", "--prior", "unifrom"),
            "--prior: must be uniform, train or one number a class (P,P,...), got 'unifrom' (did you mean uniform?)",
        ),
        ((place, place / "data.npz"), "not a result folder"),
        ((place / "run", tmp_path / "none.npz"), "none.npz: no such file"),
    ):
        try:
            code = main(
                ["predict", *map(str, arguments)] + ([] if "--out" in arguments else ["--out", str(tmp_path / "p.csv")])
            )
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert (code, captured.err.count("\n")) == (2, 1), captured.err
        assert any(part in captured.err for part in word.split("|")), captured.err
    assert {path.name for path in tmp_path.iterdir()} == {"a.png"}


def test_forged_checkpoints_are_refused(run, tmp_path):
    place, _, _, _ = run
    saved = torch.load(place / "run" / "checkpoints" / "logit_adjusted.pt", weights_only=True)
    assert saved["format"] == FORMAT
    path = tmp_path / "forged.pt"
    changes = (
        {"format": 2}, {"class_names": []}, {"class_counts": [1]}, {"backbone": {"model": "no_such"}},
        {"backbone": {"model": "cnn", "views": 3}}, {"backbone": "cnn"}, {"state": {}}, {"head": {"kind": 1}},
        {"preprocessing": None}, {"preprocessing": {**saved["preprocessing"], "input_shape": [10**9, 10**9, 3]}},
        {"preprocessing": {**saved["preprocessing"], "mean": "x"}}, {"loss": "no"}, {"logit_scale": "x"},
    )  # fmt: skip
    for change in changes:
        torch.save({**saved, **change}, path)
        with pytest.raises(ValueError, match=r"forged\.pt: not "):
            train.load(path)


def test_images_from_files_are_prepared_as_in_training(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        for name, level in (("dark", 60), ("light", 190)):
            for i in range(count):
                path = tmp_path / "set" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.clip(rng.normal(level, 40, (20, 14, 3)), 0, 255).astype(np.uint8)
                image.fromarray(pixels).save(path)
    config = train.Config(data=f"folder:{tmp_path / 'set'}", image_size=8, model="cnn", epochs=4, threads=1)
    summary = train.train(config, out=tmp_path / "run")
    assert (
        main(["predict", str(tmp_path / "run"), str(tmp_path / "set" / "test"), "--out", str(tmp_path / "p.csv")]) == 0
    )
    rows = _rows(tmp_path / "p.csv")
    right = [row["class"] == row["sample"].split("/")[-2] for row in rows]
    assert (len(right), np.mean(right)) == (8, pytest.approx(summary["top1"]))
    own = _rows(tmp_path / "run" / "tables" / "samples.csv")
    assert {row["file"] for row in own} == {f"test/{name}/{i}.png" for name in ("dark", "light") for i in range(4)}
    shown = {row["sample"].split("set/")[1]: row["class"] for row in rows}
    assert {row["file"]: row["prediction"] for row in own} == shown


def test_features_of_a_run_go_into_select(run, tmp_path, capsys):
    place, _, x_test, _ = run
    out = tmp_path / "features.npz"
    assert main(["features", str(place / "run"), "--out", str(out)]) == 0
    with np.load(out) as archive:
        assert archive["features"].shape == (68, 64)
        assert np.bincount(archive["labels"]).tolist() == list(COUNTS)
        assert archive["class_names"].tolist() == ["ant", "bee", "cow"]
    assert main(["statistics", str(out)]) == 0
    assert "cow" in capsys.readouterr().out
    assert (
        main(
            [
                "select",
                str(out),
                "--out",
                str(tmp_path / "s"),
                "--head-ratio",
                "0.6",
                "--random-repeats",
                "1",
                "--quiet",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "s" / "selection.json").read_text())["class_counts"] == list(COUNTS)
    buffer = tmp_path / "x.npy"
    np.save(buffer, x_test)
    assert main(["features", str(place / "run"), str(buffer), "--out", str(out), "--force"]) == 0
    with np.load(out) as archive:
        assert np.array_equal(archive["features"], train.load(place / "run").features(x_test).numpy())
        assert archive["files"].tolist() == [str(i) for i in range(27)]


def test_what_is_wrong_with_a_file_of_samples_names_the_file(run, tmp_path, capsys):
    place, _, x_test, _ = run
    np.save(tmp_path / "narrow.npy", x_test[:, :4])
    np.savez(tmp_path / "nan.npz", x=x_test * np.nan)
    np.savez(tmp_path / "words.npz", x=x_test.astype("U"))
    for name, words in (("narrow.npy", "samples have the shape (4,)"), ("nan.npz", "NaN"), ("words.npz", "numbers")):
        for command, out in (("predict", "p.csv"), ("features", "f.npz")):
            assert main([command, str(place / "run"), str(tmp_path / name), "--out", str(tmp_path / out)]) == 2
            line = capsys.readouterr().err
            assert f"{tmp_path / name}: " in line
            assert words in line
            assert not (tmp_path / out).exists()


def test_a_place_that_is_none_and_a_package_that_is_not_there_are_named_before_the_work(
    run, tmp_path, capsys, monkeypatch
):
    place = run[0]
    (tmp_path / "file").write_text("x")
    page = place / "run" / "report.html"
    page.unlink()
    assert main(["report", str(place / "run"), "--png", str(tmp_path / "file")]) == 2
    assert f"--png {tmp_path / 'file'}: {tmp_path / 'file'} is a file, not a folder" in capsys.readouterr().err
    assert not page.exists()
    monkeypatch.setattr(predictor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(predictor, "load", lambda *_: pytest.fail("it went to work"))
    command = ["predict", str(place / "run"), str(place / "data.npz"), "--out", str(tmp_path / "p.parquet")]
    assert main(command) == 2
    assert "a .parquet file needs pyarrow" in capsys.readouterr().err


@pytest.mark.parametrize("turn", [lambda a: a.astype(">f8"), lambda a: a[::-1].copy()[::-1], np.asfortranarray, list])
def test_samples_and_priors_are_read_for_their_values(run, turn):
    model, x = train.load(run[0] / "run"), run[2]
    prior = np.array([0.2, 0.3, 0.5])
    given = turn(x) if turn is not list else x.tolist()
    assert torch.equal(model.log_probabilities(given, turn(prior)), model.log_probabilities(x, prior.tolist()))
    with pytest.raises(TypeError, match="prior must hold real numbers"):
        model.predict(x, prior * 1j)
