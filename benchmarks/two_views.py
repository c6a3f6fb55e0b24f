"""Two views a sample on Fashion-MNIST-LT: does contrast beside balanced softmax help the same network?

    python -m benchmarks.two_views --out benchmarks/results/two-views-fashion-mnist-lt.json

All arms see the same views in the same order, start from the same weights and take the same steps; only the loss differs. Factors and
temperatures were fixed before anything was trained.

    balanced softmax   the mean over both views
    + bcl              and `nn.BalancedContrastive` of the projected views, centres from the classifier's weights
    + proco            and `nn.ProCo` of the projected views
    + null             as + bcl, with the batch's labels permuted: what a contrast that knows nothing does
    full               balanced softmax, as many steps on the whole balanced training set: what cannot be beaten

Accuracy of the last epoch on the balanced test set, in per cent: the mean over classes, and that of the three smallest classes. `probe` is
what the features are good for: the accuracy of a linear classifier fitted, on the frozen features, to the whole balanced training set. An
interval is paired over seeds, 95 %. A file that exists is completed: finished trainings are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

import ltkernels as ltk
from ltkernels.train import data
from ltkernels.train.metrics import difference

from . import harness

WIDTH, PROJECTED = 128, 64
BCL_FACTOR, PROCO_FACTOR, TAU = 0.35, 1.0, 0.1
MEASURED = ("balanced", "tail", "probe")
ARMS = ("balanced softmax", "+ bcl", "+ proco", "+ null", "full")


class Network(nn.Module):
    """Three strided convolutions, a linear classifier, a projector for features and one for classifier weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (1, 32, 64, WIDTH)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(WIDTH, classes)
        self.project = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PROJECTED))
        self.project_centres = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PROJECTED))


def views(x: Tensor) -> Tensor:
    """(2 N, 1, S, S): two copies of every picture, each moved by up to 3 pixels, mirrored or not, with other contrast."""
    x = x.repeat(2, 1, 1, 1)
    many, size = len(x), x.shape[-1]
    flip = torch.where(torch.rand(many) < 0.5, -1.0, 1.0)
    moves = (torch.rand(many, 2) * 2 - 1) * 6 / size
    boxes = torch.zeros(many, 2, 3)
    boxes[:, 0, 0], boxes[:, 1, 1], boxes[:, :, 2] = flip, 1.0, moves
    moved = F.grid_sample(x - x.min(), F.affine_grid(boxes, list(x.shape), align_corners=False), align_corners=False)
    return moved * (0.7 + 0.6 * torch.rand(many, 1, 1, 1)) + x.min()


def loss_of(
    arm: str, counts: list[int], network: Network
) -> tuple[Callable[[Tensor, Tensor], Tensor], nn.Module | None]:
    """loss(features of two views one after the other, labels of one view), and the Module whose epochs have to be told."""
    classify = ltk.nn.BalancedSoftmax(counts)
    contrast: nn.Module | None = None
    if arm in ("+ bcl", "+ null"):
        contrast = ltk.nn.BalancedContrastive(len(counts), tau=TAU)
    elif arm == "+ proco":
        contrast = ltk.nn.ProCo(counts, PROJECTED, tau=TAU)

    def loss(features: Tensor, y: Tensor) -> Tensor:
        value = classify(network.head(features), y.repeat(2))
        if contrast is None:
            return value
        first, second = network.project(features).chunk(2)
        if arm == "+ proco":
            return value + PROCO_FACTOR * contrast([first, second], y)
        labels = y[torch.randperm(len(y))] if arm == "+ null" else y
        centres = network.project_centres(network.head.weight)
        return value + BCL_FACTOR * contrast(torch.stack([first, second], 1), labels, centres)

    return loss, contrast if arm == "+ proco" else None


def train(arm: str, seed: int, epochs: int, batch: int, imbalance: float) -> dict[str, Any]:
    thin = data.load("fashion-mnist-lt", data.DataRequest(imbalance=imbalance))
    steps = epochs * (len(thin.y_train) // batch)
    whole = data.load("fashion-mnist-lt", data.DataRequest(imbalance=1.0))
    used = whole if arm == "full" else thin
    torch.manual_seed(seed)
    network = Network(used.num_classes)
    loss, keeps = loss_of(arm, used.class_counts, network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        for rows in torch.randperm(len(used.y_train), generator=order).split(batch):
            if len(rows) < batch or done == steps:
                break
            torch.manual_seed(seed * 1_000_003 + done)  # the same views in every arm, whatever its loss draws
            x, y = views(used.x_train[rows]), used.y_train[rows]
            optimizer.zero_grad()
            loss(network.body(x), y).backward()
            optimizer.step()
            schedule.step()
            done += 1
        if keeps is not None:
            keeps.next_epoch()
    network.eval()
    with torch.no_grad():
        seen, unseen = (torch.cat([network.body(x) for x in of.split(1000)]) for of in (whole.x_train, thin.x_test))
        found = network.head(unseen).argmax(1)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, tol=1e-3, max_iter=1000)).fit(
        seen.numpy(), whole.y_train.numpy()
    )
    recall, probed = (
        torch.stack([(each[thin.y_test == c] == c).double().mean() for c in range(thin.num_classes)])
        for each in (found, torch.from_numpy(probe.predict(unseen.numpy())))
    )
    tail = torch.tensor(thin.class_counts).argsort()[:3]
    means = {"balanced": recall.mean(), "tail": recall[tail].mean(), "probe": probed.mean()}
    return {name: 100 * mean.item() for name, mean in means.items()}


def summary(rows: list[dict[str, Any]], seeds: range) -> dict[str, Any]:
    """Of each arm the means over seeds, and the paired differences from balanced softmax."""
    by_arm = {arm: {row["seed"]: row for row in rows if row["arm"] == arm} for arm in ARMS}
    out: dict[str, Any] = {}
    for arm, found in by_arm.items():
        if set(seeds) <= set(found):
            out[arm] = {}
            for name in MEASURED:
                values = [found[seed][name] for seed in seeds]
                out[arm][name] = {"accuracy": sum(values) / len(values)}
                if arm != ARMS[0] and set(seeds) <= set(by_arm[ARMS[0]]):
                    gain = difference(values, [by_arm[ARMS[0]][seed][name] for seed in seeds])
                    out[arm][name]["over balanced softmax"] = gain
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_views", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON); its finished trainings are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--imbalance", type=float, default=100.0)
    options = parser.parse_args(arguments)
    settings = {"epochs": options.epochs, "batch": options.batch, "imbalance": options.imbalance}
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if before["settings"] != settings:
            parser.error(f"{options.out} was made with {before['settings']}")
        rows = before["rows"]
    for seed in range(options.seeds):
        for arm in ARMS:
            if not any(row["seed"] == seed and row["arm"] == arm for row in rows):
                rows.append({"arm": arm, "seed": seed, **train(arm, seed, **settings)})
                print(
                    f"seed {seed} {arm:<17} {rows[-1]['balanced']:.2f} {rows[-1]['tail']:.2f} {rows[-1]['probe']:.2f}",
                    flush=True,
                )
                found = {"kind": "two-views", "machine": harness.machine(), "settings": settings, "rows": rows}
                found["summary"] = summary(rows, range(options.seeds))
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
