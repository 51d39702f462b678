"""Trainer, accelerate and Lightning, with the hooks of ``docs/training.md``.

Their checkpoints hold the adapter alone. A run that was resumed from one ends bit for bit as one
that was not interrupted: dropout is on, the data are shuffled and the rate warms up, so that the
random state, the optimizer and the schedule all matter.
"""

from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import randlora
from tests.support.pages import from_example
from tests.support.processes import run_in_two_processes

transformers = pytest.importorskip("transformers")
from tests.support import stack  # noqa: E402  it needs transformers


def numbers(model):
    return [p.detach().clone() for p in randlora.adapter_parameters(model)]


def equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def states(optimizer):
    return [t for state in optimizer.state_dict()["state"].values() for t in state.values()]


def check_alone(path, model):
    """The file is an adapter, and no other file of its folder is as large as the frozen weights."""
    plain = randlora.unload(stack.make_model())
    assert equal(numbers(randlora.load_adapter(plain, path)), numbers(model))
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    for file in path.parent.iterdir():
        assert file.stat().st_size < frozen, file.name


# --- transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_trainer_resumes_from_the_adapter_alone(reentrant, tmp_path):
    keywords = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = stack.make_trainer(stack.make_model(), tmp_path / "whole", **keywords)
    trainer.train()
    check_alone(tmp_path / "whole" / "checkpoint-8" / "adapter.safetensors", trainer.model)

    torch.manual_seed(99)
    resumed = stack.make_trainer(stack.make_model(), tmp_path / "resumed", **keywords)
    before = numbers(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert not any(map(torch.equal, numbers(resumed.model), before))
    assert equal(numbers(resumed.model), numbers(trainer.model))
    assert equal(states(resumed.optimizer), states(trainer.optimizer))
    assert resumed.lr_scheduler.state_dict() == trainer.lr_scheduler.state_dict()
    losses = [
        [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]
        for run in (trainer, resumed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert losses[0][-1] < losses[0][0]


def test_trainer_loads_the_best_adapter_at_the_end(tmp_path):
    keywords = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    keywords["greater_is_better"] = True  # so that an early checkpoint is the best
    trainer = stack.make_trainer(stack.make_model(), tmp_path, save_steps=2, **keywords)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    found = {f.parent.name for f in tmp_path.rglob("adapter.safetensors")}
    assert found == {f"checkpoint-{step}" for step in (2, 4, 6, 8)}
    check_alone(best / "adapter.safetensors", trainer.model)


def test_trainer_without_the_hook_resumes_too(tmp_path):
    """From checkpoints that hold the whole model."""

    def run(folder, checkpoint=None):
        trainer = stack.make_trainer(stack.make_model(), folder)
        trainer.__class__ = transformers.Trainer
        trainer.train(resume_from_checkpoint=checkpoint)
        return numbers(trainer.model)

    whole = run(tmp_path / "whole")
    torch.manual_seed(99)
    assert equal(run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4")), whole)


def test_trainer_trains_a_quantised_model_that_it_evaluates(tmp_path):
    pytest.importorskip("bitsandbytes")
    plain = randlora.unload(stack.make_model())
    plain.save_pretrained(tmp_path / "base")

    def make():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base",
            quantization_config=transformers.BitsAndBytesConfig(
                load_in_4bit=True, llm_int8_skip_modules=["classifier"]
            ),
        )
        stack.adapted(model)
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False
        return model

    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        stack.make_trainer(make(), tmp_path)

    def run(checkpoint=None):
        model = make()
        model.is_quantized = False
        trainer = stack.make_trainer(model, tmp_path / "run")
        trainer.train(resume_from_checkpoint=checkpoint)
        return numbers(model)

    whole, start = run(), numbers(make())
    assert not any(map(torch.equal, whole, start))
    assert equal(run(str(tmp_path / "run" / "checkpoint-4")), whole)


def test_two_processes_train_as_one_with_the_joined_batch(tmp_path):
    """In float64: gradients are summed in another order. 1e-9 leaves AdamW room to pass that on."""
    run_in_two_processes("tests.support.stack", tmp_path / "two")
    stack.train_together(tmp_path / "one", 1)
    two, one = (
        numbers(randlora.load_adapter(stack.make_model().double(), folder / "adapter.safetensors"))
        for folder in (tmp_path / "two", tmp_path / "one")
    )
    assert two[0].dtype == torch.float64
    assert not any(map(torch.equal, one, numbers(stack.make_model().double())))
    for got, want in zip(two, one, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# --- accelerate ----------------------------------------------------------------------------------


def test_accelerate_resumes_from_the_adapter_alone(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    given = {"Path": Path, "randlora": randlora}
    save_adapters_alone = from_example(stack.PAGE, "save_adapters_alone", **given)

    def run(folder, state=None):
        accelerator = accelerate.Accelerator(cpu=True)
        save_adapters_alone(accelerator)
        made = make_optimizer(model := stack.make_model())
        schedule = LambdaLR(made, lambda step: min(1, (step + 1) / 8))
        loader = DataLoader(stack.make_data(), 4, shuffle=True)
        model, optimizer, schedule, loader = accelerator.prepare(model, made, schedule, loader)
        if state:
            accelerator.load_state(state)
        for epoch in range(1 if state else 0, 3):
            for batch in loader:
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            accelerator.save_state(folder / str(epoch))
        return model, optimizer, schedule

    make_optimizer = stack.make_optimizer
    model, optimizer, schedule = run(tmp_path / "whole")
    check_alone(tmp_path / "whole" / "2" / "adapter.safetensors", model)
    torch.manual_seed(99)
    resumed, other_optimizer, other_schedule = run(tmp_path / "resumed", tmp_path / "whole" / "0")
    assert equal(numbers(resumed), numbers(model))
    assert equal(states(other_optimizer), states(optimizer))
    assert other_schedule.state_dict() == schedule.state_dict()


# --- Lightning -----------------------------------------------------------------------------------


# Lightning builds a leaf by a class that torch is about to remove, and gives advice.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_lightning_resumes_from_the_adapter_alone(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    given = {"torch": torch, "randlora": randlora}
    hook = from_example(stack.PAGE, "AdapterCheckpoints", **given)

    class Tuned(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = stack.make_model()

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def validation_step(self, batch, index):
            self.log("loss", self.model(**batch).loss)

        def configure_optimizers(self):
            optimizer = stack.make_optimizer(self.model)
            schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 8))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def run(folder, checkpoint=None):
        keep = lightning.callbacks.ModelCheckpoint(save_top_k=-1, filename="{epoch}")
        trainer = lightning.Trainer(
            max_epochs=3,
            callbacks=[hook(), keep],
            default_root_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loaders = DataLoader(stack.make_data(), 4, shuffle=True), DataLoader(stack.make_data(), 8)
        trainer.fit(tuned := Tuned(), *loaders, ckpt_path=checkpoint)
        return tuned, trainer

    tuned, trainer = run(tmp_path / "whole")
    first, last = (tmp_path / "whole" / "checkpoints" / f"epoch={i}.ckpt" for i in (0, 2))
    saved = torch.load(last, weights_only=True)["state_dict"]
    assert saved.keys() == randlora.adapter_state_dict(tuned).keys()
    frozen = sum(p.nbytes for p in tuned.parameters() if not p.requires_grad)
    assert last.stat().st_size < frozen
    torch.manual_seed(99)
    resumed, other = run(tmp_path / "resumed", first)
    assert equal(numbers(resumed), numbers(tuned))
    assert equal(states(other.optimizers[0]), states(trainer.optimizers[0]))
    schedules = [run.lr_scheduler_configs[0].scheduler.state_dict() for run in (trainer, other)]
    assert schedules[0] == schedules[1]
