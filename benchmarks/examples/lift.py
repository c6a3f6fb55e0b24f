"""LIFT with the trainer: adapters in a frozen vision transformer from a local folder (pip install transformers).

    python lift.py                      # a small ViT with random weights, made here
    python lift.py FOLDER               # a model of Transformers with its weights, as CLIP ViT-B/16; nothing is downloaded

Random weights show how it is used, not what it reaches: the paper's numbers were not reproduced here.

    ViT with adaptformer:8, five crops of each test picture: 100.0 % of 60
    2.2 % of the parameters were trained
"""

import sys
from pathlib import Path

import numpy as np
import torch
from make_data import COUNTS, NAMES, picture

from ltkernels import train

folder = Path(*sys.argv[1:])
if not sys.argv[1:]:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    folder = Path("vit")
    ViTModel(ViTConfig(**size, image_size=24, patch_size=4, initializer_range=0.1)).save_pretrained(folder)

rng = np.random.default_rng(0)
labels, test_labels = np.repeat(range(3), COUNTS), np.repeat(range(3), 20)
pictures, test_pictures = (np.stack([picture(label, rng) for label in part]) for part in (labels, test_labels))
data = train.data.Dataset.from_arrays(pictures, labels, test_pictures, test_labels, class_names=NAMES)
settings = {
    **train.presets.load("lift"),
    "model": f"hf:{folder}",
    "adapter": "adaptformer:8",
    "batch_size": 16,
    "threads": 1,
}
settings |= {} if sys.argv[1:] else {"epochs": 20, "lr": 0.05}  # random features have more to learn
train.train(train.Config(**settings), data, out="runs/lift", force=True)

model = train.load("runs/lift")  # needs neither the folder nor the data
right = (model.predict(test_pictures) == torch.from_numpy(test_labels)).double().mean().item()
weights = model.module.state_dict()
trained = sum(
    v.numel() for name, v in weights.items() if "head" in name or (".mlp." in name and ".mlp.mlp." not in name)
)
print(f"ViT with {settings['adapter']}, five crops of each test picture: {100 * right:.1f} % of {len(test_labels)}")
print(f"{100 * trained / sum(v.numel() for v in weights.values()):.1f} % of the parameters were trained")
