"""Pretrained backbones from local files, adapters inside them, test-time views, and what a checkpoint needs to bring them back."""

import json
import shutil
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ltkernels import train
from ltkernels.augment import five_crops
from ltkernels.cli import main
from ltkernels.train import adapters, backbones, batching, config, logs, presets
from ltkernels.train.backbones import BackboneSpec, build_backbone
from ltkernels.train.data import Dataset

SIDE = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        return x + self.mlp(self.norm(x))


class Tiny(nn.Module):
    """A vision transformer of a user's, named as timm names its parts; for pictures of 16 x 16 alone."""

    def __init__(self, input_shape):
        super().__init__()
        self.patches = nn.Conv2d(input_shape[0], 8, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, 8) * 0.1)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.blocks(self.patches(x).flatten(2).mT + self.position).mean(1)


def pictures(sizes=(24, 12, 6), side=SIDE, channels=3, seed=0):
    """uint8 pictures whose channel, or brightness, tells the class."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(3), sizes)
    x = rng.integers(0, 120, (len(y), channels, side, side))
    for i, label in enumerate(y):
        x[i, label % channels] += 60 if channels > 1 else 45 * label
    return x.astype(np.uint8), y


def dataset(side=SIDE, channels=3):
    (x, y), (x_test, y_test) = pictures(side=side, channels=channels), pictures((6, 6, 6), side, channels, seed=1)
    return Dataset.from_arrays(x, y, x_test, y_test), x_test, y_test


TINY = {"model": "test_backbones:Tiny", "epochs": 2, "batch_size": 8, "threads": 1}


@pytest.fixture
def no_network(monkeypatch):
    """Fails the test where anything looked for the network, also where the library made another error of it."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a ViT and of a CLIP of Transformers, initialised at random."""
    transformers = pytest.importorskip("transformers", minversion="5")
    place, small = (
        tmp_path_factory.mktemp("models"),
        {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    )
    vision = {"hidden_size": 16, "image_size": SIDE, "patch_size": 4, **small}
    text = {"hidden_size": 16, "vocab_size": 9, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, **small}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = transformers.ViTModel(transformers.ViTConfig(**vision))
        clip = transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
        )
    vit.save_pretrained(place / "vit")
    clip.save_pretrained(place / "clip")
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (place / "vit" / "preprocessor_config.json").write_text(json.dumps(statistics))
    return place, vit.eval(), clip.eval()


# Models of Transformers


@pytest.mark.parametrize(("side", "channels"), [(SIDE, 3), (SIDE, 1), (24, 3)])
def test_pictures_reach_the_model_as_it_was_pretrained(folders, side, channels):
    place, vit, _ = folders
    data, raw, _ = dataset(side, channels)
    pixels = (data.mean, data.std, 255.0)
    backbone, width = build_backbone(BackboneSpec(f"hf:{place / 'vit'}"), data.input_shape, 0, None, pixels=pixels)
    given = torch.from_numpy(raw).float().expand(-1, 3, -1, -1) / 255
    given = (given - torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(-1, 1, 1)
    if side != SIDE:
        given = F.interpolate(given, (SIDE, SIDE), mode="bicubic", antialias=True)
    with torch.no_grad():
        # The first token: pooling is a layer of ViT's pretraining, which other checkpoints lack.
        torch.testing.assert_close(
            backbone.eval()(data.x_test), vit(pixel_values=given).last_hidden_state[:, 0], rtol=1e-4, atol=1e-4
        )
    assert width == 16
    # The data's own statistics, where they are asked for.
    spec = BackboneSpec(f"hf:{place / 'vit'}", normalize="data")
    assert torch.equal(build_backbone(spec, data.input_shape, 0, None, pixels=pixels)[0].factor, torch.ones(3))


def test_clip_gives_the_features_that_text_embeddings_are_compared_with(folders):
    place, _, clip = folders
    data, _, _ = dataset()
    backbone, width = build_backbone(BackboneSpec(f"hf:{place / 'clip'}"), data.input_shape, 0, None)
    with torch.no_grad():
        wanted = clip.visual_projection(clip.vision_model(pixel_values=data.x_test).pooler_output)
        assert torch.equal(backbone.eval()(data.x_test), wanted)
    assert width == 12
    assert not any("text" in name for name, _ in backbone.named_modules())


@pytest.mark.parametrize(("kind", "adapter"), [("vit", "adaptformer:4"), ("clip", "lora:2")])
def test_a_fine_tuned_model_needs_no_folder_and_no_network(folders, tmp_path, no_network, kind, adapter):
    if adapter.startswith("lora"):
        pytest.importorskip("peft")
    shutil.copytree(folders[0] / kind, tmp_path / "source")
    data, raw, labels = dataset(24)
    settings = {**TINY, "model": f"hf:{tmp_path / 'source'}", "adapter": adapter, "test_views": "flip"}
    summary = train.train(train.Config(**settings), data, out=tmp_path / "run")
    assert any("24 x 24 are brought to 16 x 16" in note for note in summary["notes"])
    shutil.rmtree(tmp_path / "source")
    predicted = train.load(tmp_path / "run").predict(raw).numpy()
    assert np.mean(predicted == labels) == pytest.approx(summary["top1"])
    assert train.evaluate(tmp_path / "run", data)[0]["balanced_accuracy"] == summary["balanced_accuracy"]


def test_weights_that_are_not_there_are_one_line(folders, tmp_path, no_network, monkeypatch):
    place, vit, _ = folders
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    shape = (3, SIDE, SIDE)
    with pytest.raises(ValueError, match="model hf:nobody/nothing: no folder of a model.*nothing is downloaded"):
        build_backbone("hf:nobody/nothing", shape, 0, None)
    (tmp_path / "bare").mkdir()
    shutil.copy(place / "vit" / "config.json", tmp_path / "bare")
    with pytest.raises(ValueError, match="hf:.*bare: no folder of a model with its weights.*--weights random"):
        build_backbone(f"hf:{tmp_path / 'bare'}", shape, 0, None)
    build_backbone(f"hf:{tmp_path / 'bare'}", shape, 0, "random")
    state = {key: value for key, value in vit.state_dict().items() if "layers.1" not in key}
    vit.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(ValueError, match="its weights lack 16 tensors of the backbone, as layers.1"):
        build_backbone(f"hf:{tmp_path / 'part'}", shape, 0, None)
    with pytest.raises(ValueError, match="--model hf:FOLDER"):
        build_backbone(f"hf:{place / 'vit'}", shape, 0, "w.safetensors")
    with pytest.raises(ValueError, match=r"needs images \(channels, height, width\), the data has samples of \(20,\)"):
        build_backbone(f"hf:{place / 'vit'}", (20,), 0, None)


@pytest.mark.parametrize(
    ("model", "package"),
    [("timm:resnet18", "timm"), ("hf:x", "transformers"), ("torchvision.models:resnet18", "torchvision")],
)
def test_a_missing_package_is_named(model, package, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, package if package != "torchvision" else "torchvision.models", None)
    assert main(["train", "--model", model, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"needs the package: pip install {package}" in error
    assert not (tmp_path / "run").exists()


# timm and torchvision


def _importable(package):
    try:
        return __import__(package)
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch
        pytest.skip(f"{package} cannot be imported: {error}")


def test_a_transformer_of_timm_from_a_file(tmp_path, no_network):
    timm = _importable("timm")
    source = timm.create_model("test_vit", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    data, raw, labels = dataset(24)
    settings = {**TINY, "model": "timm:test_vit", "weights": str(tmp_path / "w.pt"), "adapter": "adaptformer:2"}
    summary = train.train(train.Config(**settings), data, out=tmp_path / "run")
    model = train.load(tmp_path / "run")
    assert np.mean(model.predict(raw).numpy() == labels) == pytest.approx(summary["top1"])
    state = model.classifier.backbone.inner.state_dict()
    kept = {key.replace(".mlp.mlp.", ".mlp."): value for key, value in state.items()}
    given = {key: value for key, value in source.state_dict().items() if not key.startswith("head.")}
    assert all(torch.equal(value, kept[key]) for key, value in given.items())
    with pytest.raises(FileNotFoundError, match="timm:test_vit: its weights are not there .*nothing is downloaded"):
        train.train(train.Config(**{**settings, "weights": None}), data)


def test_a_model_of_torchvision_without_its_classifier(tmp_path, no_network, monkeypatch):
    torchvision = _importable("torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    shape = (3, 32, 32)
    with pytest.raises(FileNotFoundError, match=r"resnet18: its weights are not there \(.*resnet18-\w+\.pth\)"):
        build_backbone("torchvision.models:resnet18", shape, 0, None)
    source = torchvision.models.resnet18()
    (tmp_path / "checkpoints").mkdir()
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(source.state_dict(), tmp_path / "checkpoints" / name)
    backbone, width = build_backbone("torchvision.models:resnet18", shape, 0, None)
    assert width == 512
    x = torch.rand(2, 3, 32, 32)
    source.fc = nn.Identity()
    torch.testing.assert_close(backbone.eval()(x), source.eval()(x))
    with pytest.raises(ValueError, match=r"resnet19 is not one of it \(did you mean resnet"):
        build_backbone("torchvision.models:resnet19", shape, 0, None)


@pytest.mark.parametrize("policy", config.POLICIES)
def test_policies_of_torchvision_change_each_picture_and_repeat(policy):
    _importable("torchvision")
    data, _, _ = dataset()
    recipe = train.pipeline.Recipe(1, 42, 0.1, 0.0, 0, augment=policy)
    pixels = batching.Pixels(data.mean, data.std)
    batches = [batching.Batches(data.x_train, data.y_train, 3, recipe, 5, pixels) for _ in range(2)]
    first, second = (b.make(torch.arange(42), 0)[0] for b in batches)
    torch.rand(3)
    assert torch.equal(first, second)
    changed = (first - data.x_train).flatten(1).abs().amax(1) > 0.05
    assert 0.2 < float(changed.float().mean()) <= 1
    assert first.dtype == torch.float32
    assert not torch.equal(batches[0].make(torch.arange(42), 0)[0], first)


# Adapters


def test_an_adapter_starts_as_nothing_and_adds_its_equation():
    torch.manual_seed(0)
    plain, x = Tiny((3, SIDE, SIDE)), torch.rand(2, 3, SIDE, SIDE)
    before = plain(x)
    assert adapters.insert(plain, "adaptformer:3", 10) == "adaptformer:3"
    assert torch.equal(plain(x), before)
    part = plain.blocks[1].mlp
    own = [name for name in dict(part.named_parameters()) if not name.startswith("mlp.")]
    for name in own:
        nn.init.normal_(part.get_parameter(name))
    given = torch.rand(4, 8)
    bottleneck = (given @ part.down.weight.T + part.down.bias).clamp(min=0)
    wanted = part.mlp(given) + part.scale * (bottleneck @ part.up.weight.T + part.up.bias)
    torch.testing.assert_close(part(given), wanted)
    assert set(own) == {"scale", "down.weight", "down.bias", "up.weight", "up.bias"}
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in own}


def test_the_width_of_the_paper():
    widths = {classes: adapters.default_width(classes, 12) for classes in (100, 365, 1000, 8142, 2)}
    assert widths == {100: 4, 365: 8, 1000: 32, 8142: 256, 2: 1}


@pytest.mark.parametrize("adapter", ["adaptformer:2", "lora:2"])
def test_only_the_adapter_and_the_head_are_trained(tmp_path, adapter):
    if adapter.startswith("lora"):
        pytest.importorskip("peft")
    torch.manual_seed(3)
    source = Tiny((3, SIDE, SIDE))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    data, raw, labels = dataset()
    settings = {**TINY, "weights": str(tmp_path / "w.pt"), "adapter": adapter, "epochs": 3, "layer_decay": 0.5}
    summary = train.train(train.Config(**settings), data, out=tmp_path / "run")
    model = train.load(tmp_path / "run")
    assert np.mean(model.predict(raw).numpy() == labels) == pytest.approx(summary["top1"])
    state = model.classifier.backbone.inner.state_dict()
    kept = {key.replace(".base_layer", "").replace(".mlp.mlp.", ".mlp."): value for key, value in state.items()}
    assert all(torch.equal(value, kept[key]) for key, value in source.state_dict().items())
    added = [value for key, value in kept.items() if key not in source.state_dict()]
    assert all(float(value.abs().max()) > 0 for value in added)
    assert len(added) == (10 if adapter.startswith("adapt") else 4)


def test_backbones_without_a_place_for_an_adapter():
    with pytest.raises(ValueError, match="this backbone has batch normalisation"):
        build_backbone(BackboneSpec("cnn", "adaptformer"), (3, 8, 8), 0)
    with pytest.raises(ValueError, match="a part called mlp"):
        adapters.insert(nn.Sequential(nn.Linear(3, 3)), "adaptformer", 3)
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="layers called q_proj and v_proj or query and value or qkv"):
        adapters.insert(nn.Sequential(nn.Linear(3, 3)), "lora", 3)


# Views


def test_crops_are_the_corners_and_the_middle():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    larger = F.interpolate(x, size=(10, 10), mode="bicubic", align_corners=False)
    crops = five_crops(x, enlarge=10 / 8)
    places = [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]
    for crop, (top, left) in zip(crops, places, strict=True):
        assert torch.equal(crop, larger[:, :, top : top + 8, left : left + 8])


@pytest.mark.parametrize("views", ["flip", "crops"])
def test_classes_are_those_of_the_mean_logits_over_the_views(views):
    data, _, _ = dataset()
    backbone, width = build_backbone(BackboneSpec("test_backbones:Tiny", views=views, unit=True), data.input_shape, 4)
    head = train.pipeline.HeadSpec("cosine", "linear").build(width, 3, 1)
    seen = [data.x_test, data.x_test.flip(3)] if views == "flip" else five_crops(data.x_test)
    backbone.eval()
    with torch.no_grad():
        logits = torch.stack([head(backbone.inner(view)) for view in seen]).mean(0)
        assert torch.equal(head(backbone(data.x_test)).argmax(1), logits.argmax(1))
        plain, _ = build_backbone(BackboneSpec("test_backbones:Tiny", views=views), data.input_shape, 4)
        mean = torch.stack([plain.inner(view) for view in seen]).mean(0)
        torch.testing.assert_close(plain.eval()(data.x_test), mean)
        # Training sees the picture alone.
        torch.testing.assert_close(plain.train()(data.x_test), plain.inner(data.x_test))


# The classifier's first rows


def test_a_head_starts_from_a_matrix(tmp_path):
    data, _, _ = dataset()
    data = replace(data, class_names=("ant", "bee", "cow"))
    rows = np.random.default_rng(0).normal(size=(3, 8))
    np.save(tmp_path / "rows.npy", rows)
    np.savez(tmp_path / "rows.npz", features=rows[[2, 0, 1]], class_names=["cow", "ant", "bee"])
    files = ["rows.npy", "rows.npz"]
    try:
        from safetensors.torch import save_file

        save_file({"text": torch.from_numpy(rows)}, str(tmp_path / "rows.safetensors"))
        files.append("rows.safetensors")
    except ImportError:
        pass
    for name in files:
        for head in ("cosine", "linear"):
            given = train.Config(**TINY, head=head, head_init=str(tmp_path / name), lr=1e-30, weight_decay=0.0)
            train.train(given, data, out=tmp_path / f"{name}-{head}")
            got = train.load(tmp_path / f"{name}-{head}").classifier.head.weight
            torch.testing.assert_close(got.detach().double(), torch.from_numpy(rows), rtol=1e-6, atol=1e-6)
    np.save(tmp_path / "other.npy", rows[:, :7])
    np.savez(tmp_path / "names.npz", features=rows, class_names=["cow", "ant", "elk"])
    np.save(tmp_path / "nan.npy", np.full((3, 8), np.nan))
    (tmp_path / "rows.pt").write_bytes(b"x")
    for name, words in (
        ("other.npy", r"holds \(3, 7\); classes and features are \(3, 8\)"), ("names.npz", "class_names lack bee"),
        ("nan.npy", "holds NaN"), ("none.npy", "no such file"), ("rows.pt", "rows.pt: not a checkpoint"), ("mean", "mean: no such"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            train.train(train.Config(**TINY, head_init=str(tmp_path / name)), data, out=tmp_path / "never")
    assert not (tmp_path / "never").exists()


# All together


def test_lift_from_a_local_checkpoint(folders, tmp_path, no_network):
    data, raw, labels = dataset()
    settings = {**presets.load("lift"), "model": f"hf:{folders[0] / 'vit'}", "batch_size": 16, "threads": 1}
    summary = train.train(train.Config(**settings), data, out=tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "logit_adjusted.pt", weights_only=True)
    assert saved["backbone"]["adapter"] == "adaptformer:1"
    assert saved["head"] == {"kind": "cosine", "logits": "linear", "shifted": False, "scale": 25.0}
    model = train.load(tmp_path / "run")
    features = model.features(raw)
    cosines = F.normalize(features, dim=1) @ F.normalize(model.classifier.head.weight, dim=1).T
    torch.testing.assert_close(model(raw), 25 * cosines.detach())
    assert np.mean(model.predict(raw).numpy() == labels) == pytest.approx(summary["top1"])


def test_settings_name_what_there_is():
    assert config.VIEWS == ("none", "flip", "crops")
    assert set(config.LOGS) == set(logs._LOGS)
    assert train.Config().head_scale == train.models.COSINE_TEMPERATURE
    for text in ("adaptformer:0", "lora:", "none:1", "bitfit", "lora:x"):
        with pytest.raises(ValueError, match="adapter must be none, adaptformer"):
            train.Config(adapter=text)
    assert set(backbones._FINDERS) == {"timm:", "hf:", "torchvision.models:"}
