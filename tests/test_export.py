"""A model outside of this package: the exported file has the logits of the run, and the file beside says what they mean."""

import json

import numpy as np
import pytest
import torch

from ltkernels import train
from ltkernels.cli import main
from ltkernels.train.export import export


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [20, 10])
    x = rng.normal(size=(30, 5)) + y[:, None] + 1e6
    data = train.data.Dataset.from_arrays(x, y, class_names=["ant", "bee"])
    train.train(train.Config(epochs=2, threads=1), data, out=place / "run")
    return place / "run", x


def _expected(run, x):
    with torch.no_grad():
        return train.load(run)(x)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_program_of_torch_export(run, tmp_path, rows):
    place, x = run
    assert main(["export", str(place), "--out", str(tmp_path / "m.pt2")]) == 0
    program = torch.export.load(tmp_path / "m.pt2").module()
    assert torch.allclose(program(torch.from_numpy(x[:rows])), _expected(place, x[:rows]), atol=1e-5)
    described = json.loads((tmp_path / "m.pt2.json").read_text())
    assert described["class_names"] == ["ant", "bee"]
    assert described["input"] == {"name": "samples", "shape": ["batch", 5], "dtype": "float64"}
    assert (described["prior_power"], described["probabilities"]) == (0.0, "softmax(1 * logits)")


def test_onnx(run, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    place, x = run
    export(place, tmp_path / "m.onnx")
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    for rows in (1, 7):
        (found,) = session.run(["logits"], {"samples": x[:rows]})
        assert np.allclose(found, _expected(place, x[:rows]), atol=1e-5)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights(run, tmp_path, kind):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    place, x = run
    export(place, tmp_path / f"m.{kind}")
    model = train.load(place)
    if kind == "pt":
        state = torch.load(tmp_path / "m.pt", weights_only=True)
    else:
        from safetensors.torch import load_file

        state = load_file(tmp_path / "m.safetensors")
    expected = _expected(place, x)
    for value in model.module.parameters():
        value.data.zero_()
    model.module.load_state_dict(state)
    assert torch.equal(model(x), expected)


def test_pictures_say_how_they_are_prepared(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for i in range(6):
            path = tmp_path / "set" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).save(path)
    config = train.Config(data=f"folder:{tmp_path / 'set'}", image_size=8, model="cnn", epochs=1, threads=1)
    train.train(config, out=tmp_path / "run")
    described = json.loads(export(tmp_path / "run", tmp_path / "m.pt2").read_text())
    assert described["input"] == {"name": "samples", "shape": ["batch", 3, 8, 8], "dtype": "uint8"}
    assert len(described["before"]) == 3
    files = [str(tmp_path / "set" / "a" / f"{i}.png") for i in range(2)]
    model = train.load(tmp_path / "run")
    pixels = torch.from_numpy(model._decoded([*map(__import__("pathlib").Path, files)]))
    program = torch.export.load(tmp_path / "m.pt2").module()
    assert torch.allclose(program(pixels), model(files), atol=1e-5)


def test_what_cannot_be_written_is_said_and_nothing_is(run, tmp_path, capsys, monkeypatch):
    place, _ = run
    (tmp_path / "there.pt2").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    for out, word in (
        ("m.bin", ".pt2 or .onnx or .safetensors or .pt"), ("there.pt2", "--force replaces"), ("m.onnx", "pip install onnx onnxscript"),
    ):  # fmt: skip
        assert main(["export", str(place), "--out", str(tmp_path / out)]) == 2
        err = capsys.readouterr().err
        assert word in err
        assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]
