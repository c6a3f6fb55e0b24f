"""Another loss in a plain PyTorch loop: one line differs.

    python plain_pytorch.py

Balanced test accuracy on long-tailed digits (124 images of digit 0 down to 2 of digit 9; needs scikit-learn):

    CrossEntropyLoss            79.2 %
    LogitAdjustedCrossEntropy   87.6 %
"""

import torch

import ltkernels as ltk
from ltkernels.train import data

digits = data.load("digits-lt", data.DataRequest(imbalance=60))
batches = torch.utils.data.TensorDataset(digits.x_train, digits.y_train)


def balanced_accuracy(model: torch.nn.Module) -> float:
    with torch.no_grad():
        right = model(digits.x_test).argmax(1) == digits.y_test  # the raw logits
    return (
        100 * torch.stack([right[digits.y_test == c].float().mean() for c in range(digits.num_classes)]).mean().item()
    )


def train(criterion: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, digits.num_classes)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        for x, y in torch.utils.data.DataLoader(batches, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    return model


for criterion in (torch.nn.CrossEntropyLoss(), ltk.nn.LogitAdjustedCrossEntropy(digits.class_counts)):
    print(f"{type(criterion).__name__:<27} {balanced_accuracy(train(criterion)):.1f} %")
