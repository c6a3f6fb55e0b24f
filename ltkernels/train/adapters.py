"""Adapters: the few parameters that are trained inside a transformer whose own are left as they are."""

import math

import torch
from torch import Tensor, nn

from ltkernels.train.recipe import parse_adapter

_RANK = 8
# Query and value, as Hu et al. 2022: of Transformers, of its older models and Swin, of timm.
_LORA_TARGETS = (("q_proj", "v_proj"), ("query", "value"), ("qkv",))


class AdaptFormer(nn.Module):
    """A block's MLP and a bottleneck beside it (AdaptFormer, Chen et al. 2022): mlp(x) + scale * up(relu(down(x))).

    `up` starts at 0, so that the block starts as it was; the scale is learned from 1, as in LIFT (Shi et al. 2024).
    """

    def __init__(self, mlp: nn.Module, width: int, bottleneck: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.scale * self.up(torch.relu(self.down(x)))


def default_width(num_classes: int, blocks: int) -> int:
    """The bottleneck of LIFT: the power of 2 with which all adapters have no more parameters than the classifier."""
    return 2 ** max(0, math.floor(math.log2(max(1.0, num_classes / (2 * blocks)))))


def insert(backbone: nn.Module, text: str, num_classes: int) -> str:
    """Freeze `backbone` and put adapters into it, in place; returns the setting with its size. `none` does nothing.

    Raises ValueError where the backbone is no transformer whose blocks are known, ImportError for lora without peft.
    """
    kind, size = parse_adapter(text)
    if kind == "none":
        return text
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()):
        raise ValueError(f"adapter {kind} is for transformers; this backbone has batch normalisation")
    backbone.requires_grad_(False)
    if kind == "adaptformer":
        mlps = {name: module for name, module in backbone.named_modules() if name.rpartition(".")[2] == "mlp"}
        linear = {name: [m for m in mlp.modules() if isinstance(m, nn.Linear)] for name, mlp in mlps.items()}
        if not mlps or not all(linear.values()):
            raise ValueError(
                "adapter adaptformer needs a transformer whose blocks have a part called mlp; this backbone has none"
            )
        size = size or default_width(num_classes, len(mlps))
        for name, mlp in mlps.items():
            parent, _, own = name.rpartition(".")
            setattr(backbone.get_submodule(parent), own, AdaptFormer(mlp, linear[name][0].in_features, size))
    else:
        size = size or _RANK
        _insert_lora(backbone, size)
    return f"{kind}:{size}"


def _insert_lora(backbone: nn.Module, rank: int) -> None:
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapter lora needs the package: pip install peft") from error
    names = {name.rpartition(".")[2] for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    targets = next((found for found in _LORA_TARGETS if names.issuperset(found)), None)
    if targets is None:
        known = " or ".join(" and ".join(found) for found in _LORA_TARGETS)
        raise ValueError(f"adapter lora needs a transformer with layers called {known}; this backbone has none")
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), backbone)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)
