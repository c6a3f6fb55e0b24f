"""A loss for the Trainer of Transformers, gradient accumulation included (pip install transformers accelerate).

    python transformers_trainer.py

A small BERT with random weights reads sentences of made-up words; class 0 has 400 of them, class 2 has 10. Nothing is downloaded.
Balanced test accuracy:

    cross-entropy    34.7 %
    logit adjustment 48.3 %
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import ltkernels as ltk
from ltkernels.integrations.huggingface import compute_loss_func

COUNTS = [400, 60, 10]


def sentences(counts: "list[int]", seed: int) -> "list[dict[str, torch.Tensor]]":
    """A class uses its own twenty words a little more often than the forty that all share."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for label, count in enumerate(counts):
        words = torch.ones(100)
        words[40 + 20 * label : 60 + 20 * label] += 2.0
        for row in words.expand(count, -1).multinomial(12, generator=generator):
            made.append({"input_ids": row, "labels": torch.tensor(label)})
    return made


def balanced_accuracy(loss: ltk.nn.AdjustedCrossEntropy) -> float:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=3, max_position_embeddings=16, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=8, learning_rate=3e-3, per_device_train_batch_size=16, gradient_accumulation_steps=2,
            use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=sentences(COUNTS, 0), compute_loss_func=compute_loss_func(loss)).train()
    test = sentences([100, 100, 100], 1)
    with torch.no_grad():
        logits = model.eval()(torch.stack([row["input_ids"] for row in test])).logits
    return 100 * (logits.argmax(1) == torch.stack([row["labels"] for row in test])).float().mean().item()


print(f"cross-entropy    {balanced_accuracy(ltk.nn.CrossEntropy()):.1f} %")
print(f"logit adjustment {balanced_accuracy(ltk.nn.LogitAdjustedCrossEntropy(COUNTS)):.1f} %")
