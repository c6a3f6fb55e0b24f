"""A margin loss with its cosine head, and deferred re-weighting, in Lightning (pip install lightning).

    python lightning_module.py

Balanced test accuracy on long-tailed digits after 20 epochs, class weights from epoch 16 on:

    LDAM + DRW 90.6 %
"""

import lightning.pytorch as pl
import torch

import ltkernels as ltk
from ltkernels.integrations.lightning import ScheduleCallback
from ltkernels.train import data

digits = data.load("digits-lt")


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU())
        self.head = ltk.nn.CosineLinear(64, digits.num_classes)
        self.loss = ltk.nn.LDAM(digits.class_counts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))  # cosines: their argmax is the prediction

    def training_step(self, batch: "list[torch.Tensor]", index: int) -> torch.Tensor:
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


pl.seed_everything(0, verbose=False)
module = Digits()
trainer = pl.Trainer(
    max_epochs=20,
    accelerator="cpu",
    callbacks=[ScheduleCallback(ltk.schedules.DRW(module.loss, start=16))],  # in the checkpoint, and restored from it
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
train = torch.utils.data.TensorDataset(digits.x_train, digits.y_train)
trainer.fit(module, torch.utils.data.DataLoader(train, batch_size=32, shuffle=True))
with torch.no_grad():
    accuracy = (module(digits.x_test).argmax(1) == digits.y_test).float().mean().item()  # the test set is balanced
print(f"LDAM + DRW {100 * accuracy:.1f} %")
