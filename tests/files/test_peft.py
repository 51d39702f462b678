"""PEFT's RandLora adapters load here, and ours load there; both give the same outputs."""

import itertools
import json

import pytest
import torch
from torch import nn

import randlora
from randlora import (
    CheckpointError,
    MismatchError,
    adapter_parameters,
    inject,
    load_adapter,
    save_adapter,
)
from randlora.model.index import adapted_modules
from randlora.modules.effective import delta_of
from tests.support.peft import FLAGS, MODELS, RANKS, back, close, edit, mlp, outputs, peft, theirs

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT gives many warnings


@torch.no_grad()
@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", MODELS)
def test_peft_and_this_package_read_each_other(name, rank, kind, tmp_path):
    for pattern, projection in itertools.product((False, True), repeat=2):
        folder = tmp_path / f"{pattern}-{projection}"
        model = theirs(name, rank, kind, pattern, save_projection=projection, randlora_alpha=7)
        model.save_pretrained(folder / "theirs")
        want = outputs(name, model)
        plain = outputs(name, MODELS[name][0]())
        assert not close(want, plain)

        ours = randlora.peft.load_adapter(MODELS[name][0](), folder / "theirs")
        assert close(outputs(name, ours), want)
        assert all(m._randlora.active_updates["weight"].bank.entries is None for m in adapted(ours))

        randlora.peft.save_adapter(ours, folder / "ours", save_projection=projection)
        again = back(name, folder / "ours")
        assert close(outputs(name, again), want)
        trained = {n: p for n, p in model.named_parameters() if "randlora_" in n}
        assert trained.keys() == {n for n, _ in again.named_parameters() if "randlora_" in n}
        assert all(torch.equal(again.get_parameter(n), p) for n, p in trained.items())


def adapted(model):
    return list(adapted_modules(model).values())


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("name", MODELS)
def test_five_steps_here_and_there_give_the_same(name, kind, tmp_path):
    there = theirs(name, 5, kind, randlora_alpha=1).train()
    there.save_pretrained(tmp_path)
    start = {n: p.clone() for n, p in there.named_parameters() if p.requires_grad}
    here = randlora.peft.load_adapter(MODELS[name][0](), tmp_path).train()
    for model in (here, there):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(parameters, lr=1e-3 if name == "mlp" else 0.1, momentum=0.9)
        for _ in range(5):
            optimiser.zero_grad()
            outputs(name, model).square().mean().backward()
            optimiser.step()
    moved = [(p - start[n]).norm() / p.norm() for n, p in there.named_parameters() if n in start]
    assert max(moved) > 1e-3
    # Five steps; each gradient has an error of some tens of roundings.
    for path, module in adapted_modules(here).items():
        layer = there.get_submodule(f"base_model.model.{path}")
        lam, gamma = module._randlora.active_updates["weight"].parameters(module)
        torch.testing.assert_close(layer.randlora_lambda["default"].T, lam, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.randlora_gamma["default"], gamma, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("name", MODELS)
def test_injection_starts_as_peft_does(name, kind):
    """The same Λ, Γ and bases, so that training is the same from the first step."""
    targets = MODELS[name][2][0]
    there = peft.get_peft_model(
        MODELS[name][0](),
        peft.RandLoraConfig(
            r=5, target_modules=targets, projection_prng_key=3, randlora_alpha=10, **FLAGS[kind]
        ),
    )
    here = inject(
        MODELS[name][0](), 5, alpha=10, basis=kind, seed=3, target_modules=targets,
        exclude_modules=None if name != "bert" else "classifier",
    )  # fmt: skip
    layers = adapted_modules(here)
    count = sum(1 for n, _ in there.named_parameters() if n.endswith("lambda.default"))
    assert len(layers) == count
    for path, module in layers.items():
        layer = there.get_submodule(f"base_model.model.{path}")
        adapter = module._randlora.active_updates["weight"]
        lam, gamma = adapter.parameters(module)
        assert torch.equal(layer.randlora_lambda["default"].T, lam)
        assert torch.equal(layer.randlora_gamma["default"], gamma)
        with torch.no_grad():
            for one, other in ((lam, layer.randlora_lambda), (gamma, layer.randlora_gamma)):
                one.normal_()
                other["default"].copy_(one if one is gamma else one.T)
            want = layer.get_delta_weight("default")
            got = delta_of(module, adapter)
            assert close(got.T if adapter.spec.transposed else got, want)


@torch.no_grad()
def test_dropout_and_modules_trained_in_full_come_along(tmp_path):
    model = theirs("mlp", 4, modules_to_save=["head"], randlora_dropout=0.25)
    model.save_pretrained(tmp_path / "theirs")
    ours = randlora.peft.load_adapter(mlp(), tmp_path / "theirs")
    assert close(outputs("mlp", ours), outputs("mlp", model))
    assert ours.tall._randlora.active_updates["weight"].settings.dropout == 0.25
    head = {id(ours.head.weight), id(ours.head.bias)}
    assert head <= {id(p) for p in adapter_parameters(ours)}
    randlora.peft.save_adapter(ours, tmp_path / "ours")
    again = back("mlp", tmp_path / "ours")
    assert close(outputs("mlp", again), outputs("mlp", model))
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["randlora_dropout"] == 0.25


def test_the_bases_are_written_once(tmp_path):
    ours = inject(mlp(), 4, basis="peft")
    theirs("mlp", 4).save_pretrained(tmp_path / "theirs")
    randlora.peft.save_adapter(ours, tmp_path / "ours")
    randlora.peft.save_adapter(ours, tmp_path / "none", save_projection=False)
    size = {
        folder: (tmp_path / folder / "adapter_model.safetensors").stat().st_size
        for folder in ("theirs", "ours", "none")
    }
    bases = 4 * (4 * 24 + 24 * 24)  # A' and B', in float32
    assert size["none"] < size["ours"] - bases < size["none"] + 200
    assert size["theirs"] > size["none"] + 4 * bases


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, [0], []])
def test_layers_are_chosen_by_number(layers, tmp_path):
    model = theirs("llama", 4, layers_to_transform=layers)
    model.save_pretrained(tmp_path)
    ours = randlora.peft.load_adapter(MODELS["llama"][0](), tmp_path)
    assert len(adapted(ours)) == (8 if layers == [] else 4)
    assert close(outputs("llama", ours), outputs("llama", model))
    last = next(n for n in adapted_modules(ours) if n.endswith("down_proj"))
    edit(tmp_path, lambda c, t: [t.pop(n) for n in list(t) if f"{last}.randlora_" in n])
    with pytest.raises(MismatchError, match=f"has {last} in the model, but the folder has nothing"):
        randlora.peft.load_adapter(MODELS["llama"][0](), tmp_path)


@torch.no_grad()
def test_a_model_in_low_precision(tmp_path):
    """PEFT computes the update in float32. This package rounds W0 + ΔW to bfloat16."""
    model = theirs("mlp", 4, randlora_alpha=1).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    ours = randlora.peft.load_adapter(mlp().bfloat16(), tmp_path)
    x = MODELS["mlp"][1]["x"].bfloat16()
    want = model(x).float()
    assert (ours(x).float() - want).norm() <= 4 * 2**-8 * want.norm()  # four layers


def test_a_module_of_two_names_is_refused(tmp_path):
    def shared():
        model = mlp()
        model.again = model.square
        return model

    theirs("mlp", 4).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"'square' is one module with \['again'\]"):
        randlora.peft.load_adapter(shared(), tmp_path)
    with pytest.raises(ValueError, match=r"each by one name.*\['square', 'again'\]"):
        randlora.peft.save_adapter(inject(shared(), 4, basis="peft"), tmp_path / "ours")
    with pytest.raises(ValueError, match="must have its layers beneath it"):
        randlora.peft.save_adapter(inject(nn.Linear(4, 4), 2, basis="peft"), tmp_path / "ours")


@torch.no_grad()
def test_modules_trained_in_full_are_those_whose_names_end_so(tmp_path):
    def build():
        model = mlp()
        model.lm_head = nn.Sequential(nn.Linear(2, 2))
        return model

    config = peft.RandLoraConfig(r=4, target_modules=["tall"], modules_to_save=["head"])
    model = peft.get_peft_model(build(), config)
    model.save_pretrained(tmp_path)
    ours = randlora.peft.load_adapter(build(), tmp_path)
    assert ours.lm_head[0].weight.requires_grad
    assert ours.head.weight.requires_grad


@pytest.mark.parametrize(("alpha", "rank"), [(7, 25), (1, 49), (640, 32), (2.5, 4)])
def test_alpha_comes_back_as_it_was(alpha, rank, tmp_path):
    model = inject(nn.Sequential(nn.Linear(50, 60)), rank, alpha=alpha, basis="peft")
    randlora.peft.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["randlora_alpha"] == alpha


@torch.no_grad()
def test_a_model_loaded_so_is_loaded_into_again_and_as_one_of_several(tmp_path):
    model = theirs("gpt2", 5)
    model.save_pretrained(tmp_path)
    ours = randlora.peft.load_adapter(MODELS["gpt2"][0](), tmp_path)
    for parameter in adapter_parameters(ours):
        parameter.normal_()
    randlora.peft.load_adapter(ours, tmp_path)
    assert close(outputs("gpt2", ours), outputs("gpt2", model))
    several = inject(MODELS["gpt2"][0](), 3)
    randlora.peft.load_adapter(several, tmp_path, adapter="other")
    randlora.set_adapter(several, "other")
    assert close(outputs("gpt2", several), outputs("gpt2", model))
    randlora.peft.save_adapter(several, tmp_path / "again")
    assert close(outputs("gpt2", back("gpt2", tmp_path / "again")), outputs("gpt2", model))


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bases_of_other_making_are_kept_as_they_are(tmp_path, suffix):
    model = theirs("mlp", 4)
    for base in ("randlora_A", "randlora_B"):
        getattr(model.base_model, base)["default"].mul_(1.5)
    model.save_pretrained(tmp_path / "theirs")
    ours = randlora.peft.load_adapter(mlp(), tmp_path / "theirs")
    want = outputs("mlp", ours)
    assert close(want, outputs("mlp", model))
    assert ours.tall._randlora.active_updates["weight"].bank.entries is not None
    save_adapter(ours, tmp_path / f"file{suffix}")
    assert torch.equal(outputs("mlp", load_adapter(mlp(), tmp_path / f"file{suffix}")), want)
    load_adapter(ours, tmp_path / f"file{suffix}")
    with pytest.raises(ValueError, match="save_projection must be True"):
        randlora.peft.save_adapter(ours, tmp_path / "ours", save_projection=False)
    randlora.peft.save_adapter(ours, tmp_path / "ours")
    assert close(outputs("mlp", back("mlp", tmp_path / "ours")), want)
    # An adapter with other entries has another bank.
    inject_like = randlora.peft.load_adapter(mlp(), tmp_path / "theirs")
    theirs("mlp", 4).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError):
        randlora.peft.load_adapter(inject_like, tmp_path / "plain")


@torch.no_grad()
@pytest.mark.parametrize("train_a", [False, True])
@pytest.mark.parametrize("kind", FLAGS)
def test_files_of_this_package_hold_such_adapters(kind, train_a, tmp_path):
    keywords = {"target_modules": MODELS["mlp"][2][0], "train_a": train_a}
    ours = inject(mlp(), 20, basis=kind, seed=2, **keywords)
    assert torch.equal(outputs("mlp", ours), outputs("mlp", mlp()))
    for parameter in adapter_parameters(ours):
        parameter.normal_()
    save_adapter(ours, tmp_path / "file.pt")
    other = load_adapter(mlp(), tmp_path / "file.pt")
    assert torch.equal(outputs("mlp", other), outputs("mlp", ours))
    assert other.tall._randlora.active_updates["weight"].bank.same_recipe(
        ours.tall._randlora.active_updates["weight"].bank
    )
    assert repr(other.tall._randlora.active_updates["weight"].bank).startswith(f"PeftBank('{kind}'")
