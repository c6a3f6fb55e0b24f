"""Pictures and data sets that do not fit into memory: the numbers of a run are those of the run that holds everything, to the bit."""

import gc
import io
import re
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from ltkernels import train
from ltkernels.cli import main
from ltkernels.train import data
from ltkernels.train.data import DataRequest, _images, _lazy
from ltkernels.train.data._lazy import LazySamples

COUNTS = {"dark": 30, "light": 12}


@pytest.fixture
def tree(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, level in (("dark", 60), ("light", 190)):
            for i in range(COUNTS[name] if split == "train" else 5):
                path = tmp_path / "set" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.clip(rng.normal(level, 70, (20, 16, 3)), 0, 255).astype(np.uint8)
                image.fromarray(pixels).save(path)
    return tmp_path / "set"


@pytest.fixture
def tiny(monkeypatch):
    """No room for any picture."""
    return lambda: monkeypatch.setattr(_lazy, "MAX_IN_MEMORY", 100)


def _config(tree, **settings):
    return train.Config(
        data=f"folder:{tree}",
        image_size=8,
        model="cnn",
        epochs=3,
        batch_size=8,
        threads=1,
        crop=1,
        flip=True,
        **settings,
    )


@pytest.mark.parametrize(
    ("workers", "settings"), [(0, {"mix": "cmo", "epochs": 8}), (2, {"val_split": 0.2}), (1, {"freeze": True})]
)
def test_a_run_from_files_has_the_numbers_of_one_in_memory(tree, tmp_path, tiny, workers, settings):
    settings = {**settings, **({"crop": 0, "flip": False} if "freeze" in settings else {})}
    config = _config(tree).replace(**settings)
    held = train.train(config, out=tmp_path / "held")
    tiny()
    lazy = train.train(config.replace(workers=workers), out=tmp_path / "lazy")
    assert isinstance(data.load(config.data, DataRequest(image_size=8)).x_train, LazySamples)
    for key in ("variants", "features"):
        strip = [{k: v for k, v in entry.items() if "seconds" not in k} if key == "variants" else entry
                 for one in (held, lazy) for entry in (one[key] if key == "variants" else [one[key]])]  # fmt: skip
        assert strip[0] == strip[len(strip) // 2]
    a, b = (torch.load(next((tmp_path / n / "checkpoints").glob("*.pt")), weights_only=True) for n in ("held", "lazy"))
    assert all(torch.equal(a["state"][key], b["state"][key]) for key in a["state"])
    assert main(["features", str(tmp_path / "lazy"), "--out", str(tmp_path / "f.npz")]) == 0
    with np.load(tmp_path / "f.npz") as found:
        assert found["features"].shape == (42, 64)
        assert found["files"][0] == "train/dark/0.png"


class _Stop:
    def __init__(self, after):
        self.after = after

    def __call__(self, phase, done, total, record):
        if record and (record["phase"], record["epoch"]) == self.after:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_from_files_goes_on_after_a_stop(tree, tmp_path, tiny):
    tiny()
    whole = train.train(_config(tree, workers=1), out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train.train(_config(tree, workers=1), out=tmp_path / "cut", progress=_Stop(("train/logit_adjusted", 1)))
    again = train.train(_config(tree, workers=0), out=tmp_path / "cut", resume="auto")
    assert again["variants"][0]["confusion"] == whole["variants"][0]["confusion"]
    sums = [next(iter(s["checkpoints"].values())) for s in (whole, again)]
    assert sums[0] == sums[1]


def test_reading_draws_from_no_global_random_state(tree, tiny):
    """A run that goes on in the middle of an epoch opens its files once more than the one that was not stopped."""
    tiny()
    samples = data.load(f"folder:{tree}", DataRequest(image_size=8, workers=1)).x_train
    before = torch.get_rng_state()
    assert sum(map(len, samples.split(10))) == 42
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cache_is_made_once_and_read_by_others(tree, tmp_path, tiny, monkeypatch):
    plain = data.load(f"folder:{tree}", DataRequest(image_size=8))
    seen = []
    request = DataRequest(image_size=8, cache=tmp_path / "cache", progress=lambda *now: seen.append(now[:3]))
    first = data.load(f"folder:{tree}", request)
    assert seen[-1] == ("decoding", 52, 52)
    assert torch.equal(first.x_train, plain.x_train)
    (file,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(_images, "decode", None)
    tiny()
    again = data.load(f"folder:{tree}", request)
    assert isinstance(again.x_train, LazySamples)
    assert torch.equal(again.x_train[torch.arange(42)], plain.x_train)
    assert torch.equal(torch.cat(list(again.x_test.split(3))), plain.x_test)
    # A file that changed is another file: its picture is not the one in the cache.
    monkeypatch.undo()
    (tree / "test" / "dark" / "0.png").write_bytes((tree / "test" / "light" / "0.png").read_bytes())
    changed = data.load(f"folder:{tree}", request)
    assert torch.equal(changed.x_test[0], changed.x_test[5])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    file.write_bytes(b"x")
    monkeypatch.setattr("ltkernels.train.data._images._digest", lambda parts: [*parts] and bytes.fromhex(file.stem[9:]))
    with pytest.raises(ValueError, match=r"pictures-.*\.npy: not a usable"):
        data.load(f"folder:{tree}", request)


def test_what_cannot_be_read_in_any_order_asks_for_a_cache(tree, tmp_path, tiny):
    import shutil

    path = shutil.make_archive(str(tmp_path / "set"), "zip", tree)
    plain = data.load(f"folder:{path}", DataRequest(image_size=8))
    tiny()
    with pytest.raises(ValueError, match=r"52 images of 8 x 8 .* --cache"):
        data.load(f"folder:{path}", DataRequest(image_size=8))
    cached = data.load(f"folder:{path}", DataRequest(image_size=8, cache=tmp_path / "cache"))
    assert torch.equal(cached.x_train[torch.arange(42)], plain.x_train)


def test_refusals_of_files_come_before_the_first_step(tree, tmp_path, tiny, capsys):
    tiny()
    (tree / "train" / "light" / "3.png").write_bytes(b"")
    assert main(["train", "--data", f"folder:{tree}", "--image-size", "8", "--out", str(tmp_path / "run")]) == 2
    assert "3.png: not a usable image: the file is empty" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tree / "train" / "light" / "3.png").unlink()
    flags = ["--image-size", "8", "--pretrain", "rotation", "--out", str(tmp_path / "run")]
    assert main(["train", "--data", f"folder:{tree}", *flags]) == 2
    assert "pretrain rotation needs all images in memory" in capsys.readouterr().err


def test_a_damaged_picture_is_named_and_what_was_trained_goes_on(tree, tmp_path, tiny, capsys):
    tiny()
    path = tree / "train" / "light" / "3.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    arguments = [
        "train",
        "--data",
        f"folder:{tree}",
        "--image-size",
        "8",
        "--epochs",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    for workers in ("0", "1"):
        assert main([*arguments, "--workers", workers]) == 2
        err = capsys.readouterr().err
        assert re.fullmatch(r"ltkernels: error: \S+3\.png: not a usable image: [^:]{,80}\n", err.splitlines(True)[-1])


class Squares(torch.utils.data.Dataset):
    classes = ("one", "two")
    reads = 0

    def __init__(self, targets=True):
        rng = np.random.default_rng(0)
        self.y = np.repeat([0, 1], [20, 10])
        self.x = rng.integers(0, 256, (30, 3, 6, 6), np.uint8)
        if targets:
            self.targets = self.y.tolist()

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return torch.from_numpy(self.x[i]), int(self.y[i])


@pytest.mark.parametrize("targets", [True, False])
def test_a_torch_dataset_is_read_batch_by_batch(tiny, targets):
    held = data.from_torch(Squares(targets))
    tiny()
    lazy = data.from_torch(Squares(targets), workers=0)
    assert isinstance(lazy.x_train, LazySamples)
    assert torch.equal(lazy.x_train[slice(None)], held.x_train)
    assert torch.equal(lazy.y_test, held.y_test)
    assert lazy.class_names == ("one", "two")
    summary = train.train(train.Config(model="mlp", epochs=1, threads=1, workers=0), lazy)
    assert summary["class_counts"] == [16, 8]


def test_many_samples_have_the_moments_of_some(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (3000, 3, 4, 4), np.uint8)
    monkeypatch.setattr("ltkernels.train.data._lazy._SHARE", 100)
    raw = _lazy.LazySamples(_lazy.Mapped(x, b""))
    loaded = data.Dataset.from_arrays(raw, np.repeat([0, 1], 1500), name="some")
    assert loaded.notes[-1] == "mean and standard deviation are those of 1024 of the 2400 training samples"
    assert torch.allclose(loaded.mean, torch.full((3,), 127.5).double(), atol=2)
    with pytest.raises(ValueError, match="needs all samples in memory, and 2400 of"):
        loaded.x_train.rot90(1, (2, 3))


def test_what_reads_ahead_ends_with_the_samples():
    """Its processes end with the last reference, not when the collector of cycles next comes by."""
    samples = _lazy.LazySamples(_lazy.Mapped(np.zeros((9, 3), np.uint8), b""))
    samples.ahead([torch.arange(4), torch.arange(2)])
    assert samples[torch.arange(4)].shape == (4, 3)
    there = weakref.ref(samples)
    gc.disable()
    try:
        del samples
        assert there() is None
    finally:
        gc.enable()


def test_sources_of_one_name_are_told_apart(tmp_path):
    """A cache indexes files by their place, also where one file is in the list twice."""
    image = pytest.importorskip("PIL.Image")
    sources = []
    for i in range(3):
        buffer = io.BytesIO()
        image.new("RGB", (2, 2), (i, i, i)).save(buffer, "png")
        sources.append(_images.Source("same", partial(io.BytesIO, buffer.getvalue()), stamp=str(i)))
    pixels = _images.pictures([sources[i] for i in (2, 0, 1, 0)], None, cache=tmp_path)
    assert pixels[:, 0, 0, 0].tolist() == [2, 0, 1, 0]
