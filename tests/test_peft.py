"""PEFT's RandLora in the same process: what one of the two writes, the other computes with."""

import copy
import itertools
import json
import warnings
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

import randlora
from randlora import adapter_parameters, inject, load_adapter, save_adapter
from randlora.adapted import adapted_modules, delta
from randlora.checkpoint import CheckpointError, FileError, MismatchError
from randlora.peft_bases import PeftBank
from tests.test_checkpoint import same, snapshot
from tests.test_models import GPT, LLAMA, TEXT, sizes

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

FLAGS = {
    "peft": {},
    "peft_sparse": {"sparse": True},
    "peft_very_sparse": {"very_sparse": True},
}
# PEFT computes x B' and then times A', ours adds to the weight first: some tens of roundings.
CLOSE = 1e-5


class Mlp(nn.Module):
    """A tall, a square, a wide and a narrow layer, and a head to be trained in full."""

    def __init__(self):
        super().__init__()
        self.tall, self.square = nn.Linear(10, 24), nn.Linear(24, 24)
        self.wide, self.narrow = nn.Linear(24, 12, bias=False), nn.Linear(12, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = self.square(self.tall(x).relu()).relu()
        return self.head(self.narrow(self.wide(x).relu()))


def make(config, cls, keywords):
    def build():
        torch.manual_seed(0)
        return getattr(transformers, cls)(getattr(transformers, config)(**keywords)).eval()

    return build


def mlp():
    torch.manual_seed(0)
    return Mlp().eval()


# What makes the model, what it is called with, two ways to say its targets, and what is read.
MODELS = {
    "mlp": (
        mlp,
        {"x": torch.linspace(-1, 1, 70).view(7, 10)},
        (["tall", "square", "wide", "narrow"], r"(tall|square|wide|narrow)"),
        lambda out: out,
    ),
    "bert": (
        make("BertConfig", "BertForSequenceClassification", sizes()),
        TEXT,
        (["query", "value", "dense"], r".*layer\.\d+.*\.(query|value|dense)|bert.pooler.dense"),
        lambda out: out.logits,
    ),
    "gpt2": (
        make("GPT2Config", "GPT2LMHeadModel", GPT),
        TEXT,
        (["c_attn", "c_proj", "c_fc"], r"transformer\.h\.\d+\..*c_\w+"),
        lambda out: out.logits,
    ),
    "llama": (
        make("LlamaConfig", "LlamaForCausalLM", LLAMA),
        TEXT,
        (["q_proj", "k_proj", "up_proj", "down_proj"], r".*\.[qk]_proj|.*(up|down)_proj"),
        lambda out: out.logits,
    ),
}
RANKS = 4, 5, 20  # one that divides most sizes, one that divides none, one above some


def outputs(name, model):
    _, inputs, _, read = MODELS[name]
    return read(model(**inputs) if name != "mlp" else model(inputs["x"]))


@pytest.fixture(autouse=True)
def quiet():
    """PEFT warns of much; pytest makes errors of warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs(name, rank, kind="peft", pattern=False, **keywords):
    """A model that PEFT adapted, with numbers as if trained."""
    config = peft.RandLoraConfig(
        r=rank, target_modules=MODELS[name][2][pattern], **FLAGS[kind], **keywords
    )
    model = peft.get_peft_model(MODELS[name][0](), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "randlora_lambda" in parameter_name:
                parameter.normal_()
            elif "randlora_gamma" in parameter_name:
                parameter.add_(0.02 * torch.randn_like(parameter))
            elif "modules_to_save" in parameter_name:
                parameter.add_(0.1)
    return model.eval()


def close(one, other):
    return (one - other).norm() <= CLOSE * other.norm()


def back(name, folder):
    return peft.PeftModel.from_pretrained(MODELS[name][0](), folder).eval()


# --- both ways -----------------------------------------------------------------------------------


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
        assert all(m._randlora.current["weight"].bank.entries is None for m in adapted(ours))

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
    # Five steps, each with a gradient that is exact to some tens of roundings.
    for path, module in adapted_modules(here).items():
        layer = there.get_submodule(f"base_model.model.{path}")
        lam, gamma = module._randlora.current["weight"].parameters(module)
        torch.testing.assert_close(layer.randlora_lambda["default"].T, lam, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.randlora_gamma["default"], gamma, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("name", MODELS)
def test_injection_starts_as_peft_does(name, kind):
    """The same parameters and the same bases, so that training is the same from the first step."""
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
        adapter = module._randlora.current["weight"]
        lam, gamma = adapter.parameters(module)
        assert torch.equal(layer.randlora_lambda["default"].T, lam)
        assert torch.equal(layer.randlora_gamma["default"], gamma)
        with torch.no_grad():
            for one, other in ((lam, layer.randlora_lambda), (gamma, layer.randlora_gamma)):
                one.normal_()
                other["default"].copy_(one if one is gamma else one.T)
            want = layer.get_delta_weight("default")
            got = delta(module, adapter)
            assert close(got.T if adapter.site.transposed else got, want)


@torch.no_grad()
def test_dropout_and_modules_trained_in_full_come_along(tmp_path):
    model = theirs("mlp", 4, modules_to_save=["head"], randlora_dropout=0.25)
    model.save_pretrained(tmp_path / "theirs")
    ours = randlora.peft.load_adapter(mlp(), tmp_path / "theirs")
    assert close(outputs("mlp", ours), outputs("mlp", model))
    assert ours.tall._randlora.current["weight"].settings.dropout == 0.25
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
    """PEFT computes updates in float32 there; here they are rounded with the weight."""
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


# --- bases ---------------------------------------------------------------------------------------

SIZES = {"rank": 5, "smaller": 12, "larger": 24}


@pytest.mark.parametrize("kind", FLAGS)
def test_layers_of_all_widths_take_their_columns_by_the_rule(kind):
    """Against the flattening of the slices, as it is written down in `peft_bases`."""
    bank = PeftBank(kind, **SIZES, seed=4)
    a, b = bank.projections(12, 24)  # (r, 1, p'), (q', N, r)
    assert (a.shape, b.shape) == ((5, 1, 12), (24, 3, 5))
    for q, p, n in ((24, 12, 3), (20, 10, 2), (7, 3, 1)):
        lam, gamma = torch.randn(n, 5).double(), torch.randn(n, p).double()
        flat_b = b[:q, :n].flatten(1).double()
        flat_a = (a[:, :, :p].double() * lam.T[:, :, None] * gamma).flatten(0, 1)
        want = flat_b @ flat_a
        bases = bank.a(5, p).double(), bank.b(q, n * 5, torch.float64)
        got = randlora.reference.delta_weight(*bases, lam, gamma, scaling=1.0, wide=False)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        held_a, held_b = bank.store(torch.device("cpu"), torch.float64).operands(5, p, q, n * 5)
        torch.testing.assert_close(held_a, bases[0], rtol=0, atol=0)
        dense = held_b.mm(torch.eye(n * 5, dtype=torch.float64)) * held_b.scale
        torch.testing.assert_close(dense, bases[1], rtol=1e-15, atol=0)


@pytest.mark.parametrize("kind", FLAGS)
def test_the_entries_are_peft_s_whatever_the_defaults(kind):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(9)
        one = PeftBank(kind, **SIZES, seed=4).digest(())
    finally:
        torch.set_default_dtype(before)
    assert one == PeftBank(kind, **SIZES, seed=4).digest(())
    assert one != PeftBank(kind, **SIZES, seed=5).digest(())
    assert one[:16] == GOLDEN[kind]


GOLDEN = {
    "peft": "dc9734c986cea1cc",
    "peft_sparse": "60e08bd434f34a6a",
    "peft_very_sparse": "a42c939ddf6a5249",
}


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
    assert ours.tall._randlora.current["weight"].bank.entries is not None
    save_adapter(ours, tmp_path / f"file{suffix}")
    assert torch.equal(outputs("mlp", load_adapter(mlp(), tmp_path / f"file{suffix}")), want)
    load_adapter(ours, tmp_path / f"file{suffix}")
    with pytest.raises(ValueError, match="save_projection must be True"):
        randlora.peft.save_adapter(ours, tmp_path / "ours", save_projection=False)
    randlora.peft.save_adapter(ours, tmp_path / "ours")
    assert close(outputs("mlp", back("mlp", tmp_path / "ours")), want)
    # Other entries are another bank.
    inject_like = randlora.peft.load_adapter(mlp(), tmp_path / "theirs")
    theirs("mlp", 4).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError):
        randlora.peft.load_adapter(inject_like, tmp_path / "plain")


@torch.no_grad()
@pytest.mark.parametrize("kind", FLAGS)
def test_files_of_this_package_hold_such_adapters(kind, tmp_path):
    ours = inject(mlp(), 20, basis=kind, seed=2, target_modules=MODELS["mlp"][2][0])
    for parameter in adapter_parameters(ours):
        parameter.normal_()
    save_adapter(ours, tmp_path / "file.pt")
    other = load_adapter(mlp(), tmp_path / "file.pt")
    assert torch.equal(outputs("mlp", other), outputs("mlp", ours))
    assert other.tall._randlora.current["weight"].bank.same_recipe(
        ours.tall._randlora.current["weight"].bank
    )
    assert repr(other.tall._randlora.current["weight"].bank).startswith(f"PeftBank('{kind}'")


# --- what does not fit ---------------------------------------------------------------------------


def edit(folder, change):
    """Change the configuration and the tensors of a folder of PEFT's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


TALL = "base_model.model.tall.randlora_"
TAMPERED = {
    "another method": (FileError, lambda c, t: c.update(peft_type="LORA")),
    "no method": (FileError, lambda c, t: c.pop("peft_type")),
    "trained biases": (FileError, lambda c, t: c.update(bias="all")),
    "no rank": (FileError, lambda c, t: c.pop("r")),
    "a rank of no number": (FileError, lambda c, t: c.update(r="4")),
    "another rank": (FileError, lambda c, t: c.update(r=3)),
    "a seed of no number": (FileError, lambda c, t: c.update(projection_prng_key=None)),
    "a dropout of 2": (FileError, lambda c, t: c.update(randlora_dropout=2)),
    "an alpha of no number": (FileError, lambda c, t: c.update(randlora_alpha="x")),
    "targets of no names": (FileError, lambda c, t: c.update(target_modules=5)),
    "targets of no pattern": (FileError, lambda c, t: c.update(target_modules="(")),
    "more targets": (MismatchError, lambda c, t: c["target_modules"].append("head")),
    "no lambda": (FileError, lambda c, t: t.pop(TALL + "lambda")),
    "no gamma": (FileError, lambda c, t: t.pop(TALL + "gamma")),
    "neither": (MismatchError, lambda c, t: (t.pop(TALL + "lambda"), t.pop(TALL + "gamma"))),
    "nothing": (FileError, lambda c, t: t.clear()),
    "a layer too many": (
        MismatchError,
        lambda c, t: t.update(
            {f"base_model.model.x.randlora_{n}": torch.ones(4, 4) for n in ("lambda", "gamma")}
        ),
    ),
    "a foreign tensor": (FileError, lambda c, t: t.update(other=torch.ones(2))),
    "a base weight": (
        MismatchError,
        lambda c, t: t.update({"base_model.model.head.weight": torch.ones(2, 3)}),
    ),
    "not a number": (FileError, lambda c, t: t[TALL + "gamma"].view(-1)[3:4].fill_(torch.nan)),
    "other shapes": (MismatchError, lambda c, t: t.update({TALL + "gamma": torch.ones(3, 9)})),
    "transposed": (MismatchError, lambda c, t: t.update({TALL + "lambda": torch.ones(3, 4)})),
    "several bases": (FileError, lambda c, t: t[TALL + "B"].add_(1)),
    "one base": (FileError, lambda c, t: [t.pop(n) for n in list(t) if n.endswith("_B")]),
    "no bases": (FileError, lambda c, t: [t.pop(n) for n in list(t) if n[-2:] in ("_A", "_B")]),
    "bases of any size": (
        FileError,
        lambda c, t: t.update(
            {
                n: torch.ones(10**9, 0) if n[-1] == "B" else torch.ones(4, 1, 10**5)
                for n in t
                if n[-2:] in ("_A", "_B")
            }
        ),
    ),
    "bases too small": (
        FileError,
        lambda c, t: t.update({n: v[:20].clone() for n, v in t.items() if n.endswith("_B")}),
    ),
    "bases of another rank": (
        FileError,
        lambda c, t: t.update({n: v[:2].clone() for n, v in t.items() if n.endswith("_A")}),
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_folder_that_was_changed_is_refused(name, tmp_path):
    error, change = TAMPERED[name]
    theirs("mlp", 4).save_pretrained(tmp_path)
    edit(tmp_path, change)
    plain, so_already = mlp(), inject(mlp(), 4, alpha=640, basis="peft")
    for model in (plain, so_already):
        before = snapshot(model)
        with pytest.raises(error):
            randlora.peft.load_adapter(model, tmp_path)
        assert same(snapshot(model), before)


def test_paths_and_files_that_are_not_there(tmp_path):
    with pytest.raises(TypeError, match="folder must be a path, got 3"):
        randlora.peft.load_adapter(mlp(), 3)
    with pytest.raises(TypeError, match="model must be"):
        randlora.peft.load_adapter(None, tmp_path)
    with pytest.raises(FileError, match="folder must be a folder"):
        randlora.peft.load_adapter(mlp(), tmp_path / "none")
    with pytest.raises(OSError, match="adapter_config"):
        randlora.peft.load_adapter(mlp(), tmp_path)
    theirs("mlp", 4).save_pretrained(tmp_path)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    for cut in (0, 8, len(whole) // 2, len(whole) - 1):
        (tmp_path / "adapter_model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(FileError, match="no whole adapter"):
            randlora.peft.load_adapter(mlp(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="adapter_model"):
        randlora.peft.load_adapter(mlp(), tmp_path)


class WithConv(Mlp):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3)


REFUSED = {
    "other bases": (lambda: inject(mlp(), 4), "one bank, of a kind of PEFT's"),
    "other layers": (
        lambda: inject(WithConv(), 2, basis="peft"),
        "of linear layers and Conv1D only.*'conv.weight' in a RandLoRAConv1d",
    ),
    "fewer bases": (lambda: inject(mlp(), 4, num_bases=2, basis="peft"), "ceil.*'tall.weight'"),
    "a name that ends another's": (
        lambda: inject(copy.copy(nested()), 4, basis="peft", modules_to_save="head"),
        "modules_to_save must be the only ones.*'other_head'",
    ),
    "a plain model": (mlp, "must be adapted"),
}


def nested():
    model = mlp()
    model.other_head = nn.Linear(3, 3)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_could_not_have_made_is_not_written(name, tmp_path):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        randlora.peft.save_adapter(build(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_several_alphas_are_not_written(tmp_path):
    model = inject(mlp(), 4, basis="peft")
    update = model.tall._randlora.current["weight"]
    update.settings = replace(update.settings, scaling=2.0)
    with pytest.raises(ValueError, match="one scaling and one dropout"):
        randlora.peft.save_adapter(model, tmp_path)


def test_arguments_of_injection_and_banks_are_checked():
    with pytest.raises(TypeError, match="rank must be"):
        inject(mlp(), {"tall": 4, ".*": 3}, basis="peft")
    with pytest.raises(ValueError, match="basis must be"):
        inject(mlp(), 4, basis="pef")
    bank = PeftBank(rank=4, smaller=12, larger=24)
    with pytest.raises(ValueError, match=r"must fit a layer of rank 4, p=24"):
        inject(mlp(), 4, basis=bank)
    with pytest.raises(ValueError, match=r"must fit a layer of rank 3"):
        inject(mlp(), 3, basis=bank, target_modules="narrow")
    for keywords, message in (
        ({"kind": "dense"}, "kind must be one of peft"),
        ({"dtype": "float32"}, "dtype must be one of"),
        ({"smaller": 30}, "smaller must be at most larger=24"),
        ({"rank": 0}, "rank must be"),
        ({"seed": -1}, "seed must be"),
        ({"entries": (torch.ones(4, 12), torch.ones(24, 11))}, "entries must be"),
        ({"entries": (torch.ones(4, 12), torch.ones(24, 12)), "kind": "peft_sparse"}, "entries"),
    ):
        with pytest.raises(ValueError, match=message):
            PeftBank(**{"rank": 4, "smaller": 12, "larger": 24, **keywords})
