"""Fine-tuning a model of timm with a margin loss, its cosine head, and mixup (pip install timm torchvision safetensors).

    python timm_finetune.py                                   # timm's test_resnet with random weights
    python timm_finetune.py resnet18 WEIGHTS.safetensors      # weights from a local file; nothing is downloaded

Balanced test accuracy on long-tailed digits, enlarged to 32 x 32 pixels:

    test_resnet, LDAM: 88.2 %
"""

import sys

import timm
import torch
from timm.data import Mixup

import ltkernels as ltk
from ltkernels.integrations.timm import Criterion
from ltkernels.train import data

name, *weights = sys.argv[1:] or ["test_resnet"]
digits = data.load("digits-lt")


def pictures(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(x, size=32, mode="bilinear").expand(-1, 3, -1, -1)


torch.manual_seed(0)
backbone = timm.create_model(name, num_classes=0)
if weights:
    from safetensors.torch import load_file

    backbone.load_state_dict(load_file(weights[0]), strict=False)  # without the classifier
head = ltk.nn.CosineLinear(backbone.num_features, digits.num_classes)  # LDAM takes cosines
model = torch.nn.Sequential(backbone, head)
criterion = Criterion(ltk.nn.LDAM(digits.class_counts))  # class indices, or the dense targets of Mixup
mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.0, num_classes=digits.num_classes)
optimizer = torch.optim.AdamW(
    [{"params": backbone.parameters(), "lr": 1e-4 if weights else 2e-3}, {"params": head.parameters(), "lr": 5e-3}]
)
train = torch.utils.data.TensorDataset(pictures(digits.x_train), digits.y_train)
for _ in range(15):
    for x, y in torch.utils.data.DataLoader(train, batch_size=32, shuffle=True, drop_last=True):
        mixed, target = mixup(x.clone(), y)  # it mixes in place
        optimizer.zero_grad()
        criterion(model(mixed), target).backward()
        optimizer.step()
model.eval()
with torch.no_grad():
    accuracy = (model(pictures(digits.x_test)).argmax(1) == digits.y_test).float().mean().item()
print(f"{name}, LDAM: {100 * accuracy:.1f} %")
