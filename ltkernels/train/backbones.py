"""Backbones by name: our own, those of timm, Transformers and torchvision, and a user's; with their weights, and what stands around
them: the pictures that the weights expect, adapters, views of test pictures.

Nothing is downloaded: weights are in a file that the user names, or in the cache that the library keeps.
"""

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltkernels._names import did_you_mean
from ltkernels.augment import five_crops
from ltkernels.train import adapters
from ltkernels.train.models import BACKBONES
from ltkernels.train.weights import load_weights

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LIBRARIES = ("timm:", "hf:", "torchvision.models:")


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone is beside its weights: enough to build it again from a checkpoint, without the files it came from.

    `adapter`, `views` (test_views) and `normalize` are the settings of these names; with `unit`, views are averaged as directions,
    which gives a cosine classifier the order of the mean logits. `architecture` is the configuration of a model of
    Transformers, as JSON.
    """

    model: str
    adapter: str = "none"
    views: str = "none"
    normalize: str = "model"
    unit: bool = False
    architecture: str = ""

    @property
    def bare(self) -> bool:
        """Whether nothing stands around the module."""
        plain = (self.adapter, self.views) == ("none", "none") and self.normalize != "imagenet"
        return plain and not self.model.startswith(_LIBRARIES)


@dataclass
class _Found:
    """A library's backbone: the statistics of the pixels (in 0..1) that it was trained on, the side of its pictures, the file of
    its weights where they are not loaded yet, and in words where that would lie, and its configuration."""

    module: nn.Module
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    side: int | None = None
    file: Path | None = None
    place: str = ""
    architecture: str = ""


class Prepared(nn.Module):
    """A backbone of pictures that come standardised by the data's statistics.

    They are brought to the channels, statistics and side that `inner` expects. In evaluation, features are means over views.
    """

    def __init__(self, spec: BackboneSpec, inner: nn.Module, channels: int, repeat: int, side: int | None) -> None:
        super().__init__()
        self.spec, self.inner, self.repeat, self.side = spec, inner, repeat, side
        self.register_buffer("factor", torch.ones(channels * repeat))
        self.register_buffer("offset", torch.zeros(channels * repeat))

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.spec.views == "none":
            return self.inner(self._picture(x))
        views = [x, x.flip(3)] if self.spec.views == "flip" else five_crops(self._sized(x))
        features = torch.stack([self.inner(self._picture(view)) for view in views])
        return (F.normalize(features, dim=2) if self.spec.unit else features).mean(0)

    def _sized(self, x: Tensor) -> Tensor:
        if self.side is None or x.shape[2:] == (self.side, self.side):
            return x
        return F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True)

    def _picture(self, x: Tensor) -> Tensor:
        x = self._sized(x).repeat_interleave(self.repeat, 1) if self.repeat > 1 else self._sized(x)
        return x * self.factor.to(x.dtype).view(-1, 1, 1) + self.offset.to(x.dtype).view(-1, 1, 1)

    def expect(
        self, data: tuple[Tensor, Tensor], top: float, wanted: tuple[tuple[float, ...], tuple[float, ...]]
    ) -> None:
        """Turn pictures standardised by `data` (mean and std of pixels from 0 to `top`) into pixels standardised as `wanted`."""
        if len(wanted[0]) != len(self.factor):
            raise ValueError(
                f"model {self.spec.model} takes pictures of {len(wanted[0])} channels, the data has {len(data[0])}"
            )
        mean, std = (part.double().cpu() for part in data)
        to_mean, to_std = (torch.tensor(part, dtype=torch.float64) for part in wanted)
        mean, std = mean.repeat_interleave(self.repeat), std.repeat_interleave(self.repeat)
        self.factor.copy_(std / top / to_std)
        self.offset.copy_((mean / top - to_mean) / to_std)


class _Encoder(nn.Module):
    """A vision model of Transformers as a backbone: the pooled output; the first token where pooling is a layer that only
    pretraining used (ViT); of models of pictures and text the side of the pictures, in the space that both share."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)
        self.projection = getattr(model, "visual_projection", nn.Identity())
        if hasattr(getattr(self.model, "pooler", None), "dense"):
            self.model.pooler = None

    def forward(self, x: Tensor) -> Tensor:
        found = self.model(pixel_values=x)
        pooled = getattr(found, "pooler_output", None)
        return self.projection(found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1))


def _timm(name: str, channels: int, random: bool, _: str) -> _Found:
    timm = _imported("timm", f"model timm:{name}")
    try:
        module = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    except RuntimeError as error:
        raise ValueError(f"model timm:{name}: {str(error)[:200]}") from error
    about = module.pretrained_cfg
    found = _Found(module, about.get("mean"), about.get("std"), (about.get("input_size") or (0, 0, None))[2])
    if not random:
        from huggingface_hub import try_to_load_from_cache

        repository = about.get("hf_hub_id") or "none/none"
        files = [try_to_load_from_cache(repository, file) for file in ("model.safetensors", "pytorch_model.bin")]
        found.file = next((Path(file) for file in files if isinstance(file, str)), None)
        found.place = f"{repository} in the cache of Hugging Face"
    return found


def _huggingface(name: str, channels: int, random: bool, architecture: str) -> _Found:
    transformers = _imported("transformers", f"model hf:{name}")
    folder = str(Path(name).expanduser())
    with _alone(transformers):
        try:
            if architecture:
                given = json.loads(architecture)
                config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
            else:
                config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            if random:
                whole, missing = transformers.AutoModel.from_config(config), ()
            else:
                whole, info = transformers.AutoModel.from_pretrained(
                    folder, config=config, local_files_only=True, output_loading_info=True
                )
                missing = info["missing_keys"]
        except (OSError, ValueError, KeyError) as error:
            # Of a name that is in no cache, the library says that it has no network.
            reason = f": {str(error).strip().splitlines()[0][:200]}" if Path(folder).is_dir() else ""
            raise ValueError(
                f"model hf:{name}: no folder of a model with its weights, nor in the cache of Hugging Face, and nothing is downloaded "
                f"(--weights random starts without){reason}"
            ) from error
    module = _Encoder(whole)
    kept = {id(value) for value in module.parameters()}
    lacking = sorted(key for key, value in whole.named_parameters() if id(value) in kept and key in missing)
    if lacking:
        raise ValueError(f"model hf:{name}: its weights lack {len(lacking)} tensors of the backbone, as {lacking[0]}")
    if getattr(module.model, "main_input_name", "") != "pixel_values":
        raise ValueError(f"model hf:{name} is a {type(whole).__name__}, which does not take pictures")
    size = getattr(module.model.config, "image_size", None)
    with _alone(transformers):
        about = {} if architecture else _json(folder, "preprocessor_config.json")
    return _Found(
        module,
        about.get("image_mean"),
        about.get("image_std"),
        size if isinstance(size, int) else None,
        architecture=architecture or _plain(config),
    )


def _plain(config: Any) -> str:
    """Whole, defaults included, which other versions change; without the folder that it came from."""
    return json.dumps({key: value for key, value in config.to_dict().items() if key != "_name_or_path"}, default=str)


def _json(folder: str, name: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    try:
        return json.loads(Path(cached_file(folder, name, local_files_only=True)).read_text(encoding="utf-8"))
    except (OSError, TypeError):
        return {}


@contextlib.contextmanager
def _alone(transformers: Any) -> Iterator[None]:
    """Without the network, for which local_files_only is not enough (it asks for a list of clients); without bars and reports:
    what is wrong becomes an error of ours."""
    constants = importlib.import_module("huggingface_hub.constants")
    log = transformers.utils.logging
    before = constants.HF_HUB_OFFLINE, log.get_verbosity()
    constants.HF_HUB_OFFLINE = True
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before[0]
        log.set_verbosity(before[1])
        log.enable_progress_bar()


def _torchvision(name: str, channels: int, random: bool, _: str) -> _Found:
    models = _imported("torchvision.models", f"model torchvision.models:{name}")
    if name not in models.list_models(models):
        raise ValueError(
            f"model torchvision.models:{name} is not one of it{did_you_mean(name, models.list_models(models))}"
        )
    module = models.get_model(name)
    last = [key for key, part in module.named_modules() if isinstance(part, nn.Linear)][-1]
    module.set_submodule(last, nn.Identity())
    found = _Found(module, *_IMAGENET, side=224)
    if not random:
        file = Path(models.get_model_weights(name).DEFAULT.url).name
        found.file = Path(torch.hub.get_dir()) / "checkpoints" / file
        found.place = str(found.file)
    return found


def _imported(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        name = package.partition(".")[0]
        reason = str(error).splitlines()[0][:200]
        raise ImportError(f"{what} needs the package: pip install {name} ({reason})") from error


_FINDERS = dict(zip(_LIBRARIES, (_timm, _huggingface, _torchvision)))


def _by_path(name: str) -> Callable[[tuple[int, ...]], nn.Module]:
    if name in BACKBONES:
        return BACKBONES[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(
            f"unknown model {name!r}{did_you_mean(name, BACKBONES)}; known: {', '.join(BACKBONES)}, timm:NAME, hf:NAME, or an import "
            "path package.module:Name"
        )
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {name!r} cannot be imported: {error}") from error


def _of_user(name: str, input_shape: tuple[int, ...]) -> nn.Module:
    factory = _by_path(name)
    contract = f"model {name!r}: it is called with input_shape={input_shape}, one sample's shape, and gives a Module to features (n, d)"
    try:
        module = factory(input_shape)
    except TypeError as error:
        raise ValueError(f"{contract}; {error}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{contract}; it gave a {type(module).__name__}")
    return module


def build_backbone(
    spec: BackboneSpec | str,
    input_shape: tuple[int, ...],
    seed: int,
    weights: str | None = "random",
    num_classes: int = 0,
    pixels: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[nn.Module, int]:
    """The backbone, initialised from `seed`, and its number of features d.

    `weights`: a file, `random`, or None for those that the library keeps. `num_classes` gives an adapter its default width;
    `pixels` are mean, std and largest value of the data's pixels, by which pictures were standardised. The global random state is
    left as it was. Raises ValueError for an unknown name (listing the known) or where the module does not map (2, *input_shape)
    to (2, d), FileNotFoundError for weights that are not there, ImportError for a missing package.
    """
    spec = BackboneSpec(spec) if isinstance(spec, str) else spec
    library = next((prefix for prefix in _LIBRARIES if spec.model.startswith(prefix)), None)
    if not spec.bare and len(input_shape) != 3:
        raise ValueError(
            f"model {spec.model} needs images (channels, height, width), the data has samples of {input_shape}"
            if library
            else f"adapter, test_views and normalize imagenet need images, the data has samples of {input_shape}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if library:
            channels = 3 if input_shape[0] == 1 else input_shape[0]
            found = _FINDERS[library](
                spec.model.removeprefix(library), channels, weights is not None, spec.architecture
            )
        else:
            found = _Found(_of_user(spec.model, input_shape))
        if weights not in (None, "random") and library == "hf:":
            raise ValueError(
                f"weights {weights}: a model of Transformers is a folder with its weights: --model hf:FOLDER"
            )
        if found.place and not (found.file and found.file.is_file()):
            raise FileNotFoundError(
                f"model {spec.model}: its weights are not there ({found.place}), and nothing is downloaded: give --weights FILE, or "
                "--weights random"
            )
        if weights not in (None, "random") or found.file:
            load_weights(found.module, found.file or Path(weights).expanduser())
        adapter = adapters.insert(found.module, spec.adapter, num_classes)
    backbone = found.module
    if not spec.bare:
        spec = replace(spec, adapter=adapter, architecture=found.architecture)
        repeat = 3 if library and input_shape[0] == 1 else 1
        side = None if _takes(found.module, (input_shape[0] * repeat, *input_shape[1:])) else found.side
        backbone = Prepared(spec, found.module, input_shape[0], repeat, side)
        wanted = (found.mean, found.std) if spec.normalize == "model" else _IMAGENET
        if pixels is not None and spec.normalize != "data" and None not in wanted:
            backbone.expect(pixels[:2], pixels[2], wanted)
    return backbone, _width(spec.model, backbone, input_shape)


@torch.no_grad()
def _tried(module: nn.Module, shape: tuple[int, ...]) -> Any:
    try:
        return module.eval()(torch.zeros(2, *shape))
    finally:
        module.train()


def _takes(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a model takes pictures of this shape: transformers are built for one side."""
    try:
        _tried(module, shape)
    except (ValueError, RuntimeError, AssertionError):
        return False
    return True


def _width(name: str, backbone: nn.Module, input_shape: tuple[int, ...]) -> int:
    features = _tried(backbone, input_shape)
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"model {name!r} must map (2, ...) samples to (2, d) features, got {shape}")
    return features.shape[1]


def spec_of(backbone: nn.Module, model: str) -> BackboneSpec:
    """What a checkpoint says of a backbone that was built by the name `model`."""
    return backbone.spec if isinstance(backbone, Prepared) else BackboneSpec(model)
