"""A small text classifier, its data, and runs of transformers' Trainer with the hook of the page.

``python -m tests.support.stack FOLDER`` is one of several processes that train together.
"""

import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import randlora
from tests.support.pages import ROOT, from_example
from tests.support.processes import disconnect
from tests.support.tiny import VOCABULARY, sizes

PAGE = ROOT / "docs" / "training.md"
AdapterTrainer = from_example(PAGE, "AdapterTrainer", randlora=randlora)
TOGETHER = 8  # samples in a batch of all processes


def make_model(**config):
    """The same model in every process and run, whatever the state of the random generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(**sizes(num_labels=3, hidden_size=64, **config))
        model = BertForSequenceClassification(config)
    return adapted(model)


def adapted(model):
    """With far fewer trained than frozen numbers."""
    return randlora.inject(model, rank=16, modules_to_save="classifier")


def make_optimizer(model):
    multipliers = {"modules_to_save": 0.5}
    return torch.optim.AdamW(randlora.adapter_parameters(model, lr=1e-2, multipliers=multipliers))


def make_data():
    """The sum of the tokens decides the label."""
    tokens = torch.randint(VOCABULARY, (24, 7), generator=torch.Generator().manual_seed(1))
    labels = tokens.sum(1) % 3
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def make_trainer(model, folder, **arguments):
    """A trainer for 8 steps, one epoch and a third, that evaluates after every second one."""
    given = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 4,
        "warmup_steps": 3,
        "activation_checkpointing": True,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    data = make_data()
    return AdapterTrainer(
        model,
        TrainingArguments(str(folder), **given),
        train_dataset=data,
        eval_dataset=data[:6],
        optimizers=(make_optimizer(model), None),
    )


def train_together(folder, processes):
    """Train in float64 without dropout, so that the number of processes changes only rounding."""
    model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    arguments = {
        "per_device_train_batch_size": TOGETHER // processes,
        # Trainer would multiply the loss of this model, a mean over the batch of one process.
        "average_tokens_across_devices": False,
    }
    trainer = make_trainer(model, folder, **arguments)
    assert trainer.args.world_size == processes
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    train_together(Path(sys.argv[1]), 2)
    disconnect()
