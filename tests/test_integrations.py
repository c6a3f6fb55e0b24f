"""Promise: inside other people's trainers the losses are the losses. Tests of a framework run where it is installed (the extra
``integrations``); timm needs torchvision, so its targets are made here as its documentation describes them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch

import ltkernels as ltk
from ltkernels.integrations import huggingface, timm

COUNTS = [50, 20, 5]


def needs(name: str):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"reduction": "batch_mean", "weight": torch.tensor([1.0, 2.0, 3.0])}, {}])
def test_huggingface_micro_batches_add_up(options: dict) -> None:
    """However the rows are split, an ignored micro-batch included."""
    loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS, **options)
    function = huggingface.compute_loss_func(loss)
    z, y = torch.randn(8, 3), torch.tensor([0, 1, 2, -100, -100, -100, 1, 2])
    leaf = z.clone().requires_grad_()
    for at in (slice(0, 3), slice(3, 6), slice(6, 8)):
        function({"logits": leaf[at]}, y[at], torch.tensor(5)).backward()
    whole = z.clone().requires_grad_()
    loss(whole, y).backward()
    torch.testing.assert_close(leaf.grad, whole.grad)
    torch.testing.assert_close(function((z,), y), loss(z, y))


def test_huggingface_token_labels() -> None:
    loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS)
    z, y = torch.randn(2, 4, 3), torch.tensor([[0, 1, -100, 2], [2, -100, 1, 0]])
    torch.testing.assert_close(huggingface.compute_loss_func(loss)({"logits": z}, y, 6), loss(z.movedim(2, 1), y))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 5, 3), (2, 3, 3, 3), (2, 3, 2, 4, 3)], ids=str)
def test_huggingface_outputs_of_segmentation(shape) -> None:
    """Classes come second, also where another size is equal to theirs."""
    loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS)
    z, y = torch.randn(shape), torch.randint(0, 3, (shape[0], *shape[2:]))
    y[0, 0] = -100
    function = huggingface.compute_loss_func(loss)
    torch.testing.assert_close(function({"logits": z}, y), loss(z, y))
    rows = loss(z, y) * (y != -100).sum()
    torch.testing.assert_close(function({"logits": z}, y, torch.tensor(40)), rows / 40)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            (2, 3, 4, 4),
            (2, 8, 8),
            r"labels has shape \(2, 8, 8\); logits of shape \(2, 3, 4, 4\) need labels \(2, 4, 4\); bring the logits",
        ),
        ((2, 5, 3), (2, 3), r"labels has shape \(2, 3\); logits of shape \(2, 5, 3\) need labels \(2, 5\)$"),
        ((4, 3), (4, 3), r"labels has shape \(4, 3\); logits of shape \(4, 3\) need labels \(4,\)$"),
    ],
)
def test_huggingface_shapes_are_named_as_they_were_given(logits, labels, message) -> None:
    function = huggingface.compute_loss_func(ltk.nn.LogitAdjustedCrossEntropy(COUNTS))
    with pytest.raises(ValueError, match=message):
        function((torch.randn(logits),), torch.zeros(labels, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels has shape .* and dtype torch.float32; they must be class indices"):
        function((torch.randn(logits),), torch.zeros(labels))


def test_a_loss_that_no_adapter_can_serve_is_named() -> None:
    for loss in (ltk.nn.SADE(COUNTS), ltk.nn.DistributionBalanced(COUNTS, 100)):
        for adapter in (huggingface.compute_loss_func, timm.Criterion):
            with pytest.raises(
                TypeError, match=f"loss is {type(loss).__name__}; it must be a loss of one output and one label a row"
            ):
                adapter(loss)


def test_huggingface_bad_input() -> None:
    with pytest.raises(TypeError, match="CrossEntropyLoss"):
        huggingface.compute_loss_func(torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="'sum'"):
        huggingface.compute_loss_func(ltk.nn.LogitAdjustedCrossEntropy(COUNTS, reduction="sum"))
    with pytest.raises(ValueError, match="batch_mean"):
        huggingface.compute_loss_func(ltk.nn.ClassBalanced(COUNTS))
    with pytest.raises(ValueError, match="ignore_index is 0"):
        huggingface.compute_loss_func(ltk.nn.LogitAdjustedCrossEntropy(COUNTS, ignore_index=0))
    loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS)
    function = huggingface.compute_loss_func(loss)
    ltk.schedules.DRW(loss)
    with pytest.raises(ValueError, match="batch_mean"):
        function((torch.randn(2, 3),), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels is None"):
        function((torch.randn(2, 3),), None)
    with pytest.raises(ValueError, match="'loss'"):
        huggingface.compute_loss_func(ltk.nn.LogitAdjustedCrossEntropy(COUNTS))({"loss": 1}, torch.tensor([0]))


@needs("accelerate")
@needs("transformers")
def test_huggingface_trainer(tmp_path, monkeypatch) -> None:
    """The real Trainer, two micro-batches of unequal numbers of labels a step: one step is the step of the whole batch."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)

        def forward(self, x, labels=None):
            return {"logits": self.linear(x)}

    x, y = torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, -100, -100, 2])
    model = Model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    loss = ltk.nn.LogitAdjustedCrossEntropy(COUNTS)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    data = [{"x": a, "labels": b} for a, b in zip(x, y)]
    Trainer(model, arguments, train_dataset=data, compute_loss_func=huggingface.compute_loss_func(loss)).train()

    expected = Model()
    expected.load_state_dict(start)
    loss(expected.linear(x), y).backward()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.state_dict()[name], start[name] - 0.5 * parameter.grad)


# ---- Lightning -------------------------------------------------------------------------------------------------------


@needs("lightning")
def test_lightning_steps_and_restores_the_schedule(tmp_path) -> None:
    import lightning.pytorch as pl

    from ltkernels.integrations.lightning import ScheduleCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.loss, self.seen = torch.nn.Linear(4, 3), ltk.nn.LDAM(COUNTS), []

        def training_step(self, batch, index):
            self.seen.append(self.loss.weight.tolist())
            return self.loss(self.linear(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(epochs: int, checkpoint=None, counts=COUNTS):
        module = Module()
        callback = ScheduleCallback(ltk.schedules.DRW(module.loss, start=1))
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False,
            default_root_dir=tmp_path, enable_model_summary=False,
        )  # fmt: skip
        data = torch.utils.data.TensorDataset(torch.randn(6, 4), torch.arange(6) % 3)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=6), ckpt_path=checkpoint)
        return module, callback, trainer

    module, callback, trainer = fit(2)
    assert module.seen == [[1.0, 1.0, 1.0], callback.schedule._after["weight"].tolist()]
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    module, callback, _ = fit(3, tmp_path / "two.ckpt")
    assert callback.schedule.epoch == 2
    assert module.seen == [callback.schedule._after["weight"].tolist()]


def test_lightning_says_what_is_missing() -> None:
    """A fresh process in which Lightning cannot be imported."""
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['lightning.pytorch'] = sys.modules['pytorch_lightning'] = None\n"
        "import ltkernels.integrations.lightning"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "pip install lightning" in result.stderr


# ---- timm ------------------------------------------------------------------------------------------------------------


def mixed_targets(share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As timm.data.Mixup makes them: every sample with its mirror image in the batch."""
    y = torch.tensor([0, 1, 2, 2])
    other = y.flip(0)
    hot = torch.nn.functional.one_hot(y, 3) * share + torch.nn.functional.one_hot(other, 3) * (1 - share)
    return y, other, hot.float()


@pytest.mark.parametrize("share", [1.0, 0.75, 0.5, 0.1])
def test_timm_targets_of_mixup(share: float) -> None:
    loss = ltk.nn.LDAM(COUNTS)
    z = torch.randn(4, 3)
    first, second, dense = mixed_targets(share)
    expected = loss(z, (first, second, share))
    torch.testing.assert_close(timm.Criterion(loss)(z, dense), expected)
    torch.testing.assert_close(timm.Criterion(loss)(z, first), loss(z, first))


def test_timm_bad_input() -> None:
    with pytest.raises(TypeError, match="MSELoss"):
        timm.Criterion(torch.nn.MSELoss())
    three = mixed_targets(0.7)[2]
    three[2] = torch.tensor([0.5, 0.3, 0.2])
    with pytest.raises(ValueError, match=r"more than two classes in row 2 .*smoothing"):
        timm.Criterion(ltk.nn.LDAM(COUNTS))(torch.randn(4, 3), three)
    smoothed = mixed_targets(0.7)[2] * 0.9 + 0.1 / 3
    with pytest.raises(ValueError, match=r"carries a smoothing of 0.1, and the loss has label_smoothing 0.05"):
        timm.Criterion(ltk.nn.LDAM(COUNTS, label_smoothing=0.05))(torch.randn(4, 3), smoothed)
    with pytest.raises(ValueError, match=r"more than two classes in row \d .*, 0.06667 for a smoothing of 0.2"):
        timm.Criterion(ltk.nn.LDAM(COUNTS), smoothing=0.2)(torch.randn(4, 3), smoothed)
    with pytest.raises(ValueError, match=r"smoothing is 1.0; it must be below 1"):
        timm.Criterion(ltk.nn.LDAM(COUNTS), smoothing=1.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.0, 1.0, 0.0], "sums to 2 in row 1"),
        ([0.0, 0.0, 0.0], "sums to 0 in row 1"),
        ([0.25, 0.25, 0.0], "sums to 0.5"),
        ([1.5, -0.5, 0.0], "sums to 1 in row 1, least -0.5"),
        ([torch.nan, 0.0, 0.0], "sums to nan in row 1"),
    ],
)
def test_timm_rows_that_are_no_shares(row, message: str) -> None:
    dense = torch.eye(3)[[0, 1, 2, 0]]
    dense[1] = torch.tensor(row)
    with pytest.raises(ValueError, match=message):
        timm.Criterion(ltk.nn.CrossEntropy())(torch.randn(4, 3), dense)


@pytest.mark.parametrize("share", [1.0, 0.75, 0.4])
@pytest.mark.parametrize("smoothing", [0.1, 0.02])
def test_timm_targets_that_carry_smoothing(share: float, smoothing: float) -> None:
    """on = 1 - s + s / C and off = s / C, mixed with the batch in reverse order, as timm's mixup_target."""
    y, classes = torch.tensor([0, 1, 2, 2, 4, 2]), 6
    one_hot = torch.nn.functional.one_hot(y, classes).float()
    smooth = one_hot * (1 - smoothing) + smoothing / classes
    dense = smooth * share + smooth.flip(0) * (1 - share)
    z = torch.randn(6, classes).tanh().requires_grad_()
    for make in (ltk.nn.LDAM, ltk.nn.LogitAdjustedCrossEntropy):
        counts = [90, 40, 20, 9, 5, 2]
        expected = make(counts, label_smoothing=smoothing)(z, (y, y.flip(0), share))
        for criterion in (timm.Criterion(make(counts)), timm.Criterion(make(counts), smoothing=smoothing)):
            ours = criterion(z, dense)
            torch.testing.assert_close(ours, expected)
            for one, two in zip(torch.autograd.grad(ours, z), torch.autograd.grad(expected, z, retain_graph=True)):
                torch.testing.assert_close(one, two)
            assert criterion.loss.label_smoothing == 0.0
    # Against torch, for a loss without margins.
    torch.testing.assert_close(
        timm.Criterion(ltk.nn.CrossEntropy())(z, dense), torch.nn.functional.cross_entropy(z, dense)
    )


def test_timm_seesaw_counts_through_smoothing() -> None:
    dense = torch.nn.functional.one_hot(torch.tensor([0, 2, 2, 3]), 4) * 0.9 + 0.1 / 4
    loss = ltk.nn.Seesaw(4)
    timm.Criterion(loss)(torch.randn(4, 4), dense)
    assert loss.seen.tolist() == [1, 0, 2, 1]


@needs("torchvision")
@needs("timm")
def test_timm_classification_task() -> None:
    from timm.task import ClassificationTask

    loss = ltk.nn.LDAM(COUNTS)
    task = ClassificationTask(torch.nn.Linear(4, 3), criterion=timm.Criterion(loss), device=torch.device("cpu"))
    x, dense = torch.randn(4, 4), mixed_targets(0.7)[2]
    torch.testing.assert_close(task(x, dense)["loss"], timm.Criterion(loss)(task.trainable_module(x), dense))


# ---- losses of other packages ----------------------------------------------------------------------------------------

PLUGIN = """
import torch
from ltkernels.losses import AdjustedCrossEntropy, Adjustment
def halved_prior(class_counts):
    "Half the log prior."
    n = torch.tensor(class_counts, dtype=torch.float64)
    return Adjustment(shift=(0.5 * torch.log(n / n.sum())).float())
class HalvedPrior(AdjustedCrossEntropy):
    name, title, build = "halved", "Halved prior", staticmethod(halved_prior)
    def __init__(self, class_counts, **common):
        super().__init__(class_counts=class_counts, options={}, **common)
LOSSES = (HalvedPrior,)
"""


def plugin(tmp_path, entry: str, code: str = PLUGIN) -> subprocess.CompletedProcess:
    """`import ltkernels` in a process that sees a package with this entry point."""
    (tmp_path / "some_plugin.py").write_text(code)
    info = tmp_path / "some_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ltkernels.losses]\nmine = {entry}\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, ltkernels as ltk\n"
        "print(sorted(ltk.LOSSES))\n"
        "print(float(ltk.nn.HalvedPrior([9, 1])(torch.zeros(1, 2), torch.tensor([0]))))\n"
        "tables = ltk.adjustments.halved_prior([9, 1])._asdict()\n"
        "print(float(ltk.functional.adjusted_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), **tables)))\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")


def test_losses_of_another_package(tmp_path) -> None:
    result = plugin(tmp_path, "some_plugin:LOSSES")
    assert result.returncode == 0, result.stderr
    names, module, function = result.stdout.splitlines()
    assert "halved" in names
    # exp(0.5 log 0.9) : exp(0.5 log 0.1) = 3 : 1
    assert float(module) == pytest.approx(0.287682072)
    assert float(function) == pytest.approx(0.287682072)


@pytest.mark.parametrize(
    ("entry", "code", "message"),
    [
        ("some_plugin:MISSING", PLUGIN, "no attribute 'MISSING'"),
        ("some_plugin:LOSSES", PLUGIN.replace('"halved"', '"ldam"'), "two losses have the name 'ldam'"),
        ("some_plugin:LOSSES", "LOSSES = (1,)", "1 is no ltkernels.losses.Loss"),
    ],
)
def test_a_broken_package_does_not_break_ours(tmp_path, entry: str, code: str, message: str) -> None:
    result = plugin(tmp_path, entry, code)
    assert message in result.stderr
    assert entry in result.stderr
    assert "'ldam'" in result.stdout


@needs("tensorboard")
def test_tensorboard_reads_back_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ltkernels import train

    config = train.Config(model="mlp", epochs=2, threads=1, log="tensorboard")
    summary = train.train(config, out=tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    scalars = events.Scalars("train/logit_adjusted/test_balanced_accuracy")
    assert [event.step for event in scalars] == [1, 2]
    assert scalars[-1].value == pytest.approx(summary["balanced_accuracy"], rel=1e-6)
