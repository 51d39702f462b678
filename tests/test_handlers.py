"""What the contract leaves open: what is refused, chosen, registered, and what is computed."""

import copy
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora import adapted as core
from randlora import handlers, inject, rank_report, register, summary
from randlora.adapted import adapted_modules
from tests.test_contract import (
    ROWS,
    Experts,
    Kernel,
    Opaque,
    Scaled,
    inputs_of,
    loss_of,
    make,
    shuffled,
)
from tests.test_contract import inject as inject_row


class Held(nn.Module):
    """Parameters of many shapes, held by a module of no known class."""

    def __init__(self):
        super().__init__()
        self.matrix, self.stack = (
            nn.Parameter(torch.randn(6, 8)),
            nn.Parameter(torch.randn(2, 6, 8)),
        )
        self.vector = nn.Parameter(torch.randn(8))
        self.codes = nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.linear(x), self.matrix).sum() + F.linear(x, self.stack[1]).sum()


def parts(model):
    return {n: type(m) for n, m in model.named_modules()}, list(model.state_dict())


# --- refusals ------------------------------------------------------------------------------------


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        return torch.jit.script(nn.Linear(8, 8))


def normed(kind):
    return lambda: kind(nn.Linear(8, 8))


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Conv1d(8, 8, 3))


def with_forward(module):
    module.forward = module.forward
    return module


class Named(nn.Linear):
    rank = 7


def resized(module):
    module.weight = nn.Parameter(torch.randn(5, 4))
    return module


def sparse(module):
    module.weight = nn.Parameter(module.weight.detach().to_sparse())
    return module


def empty():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Conv1d(8, 0, 3)


PARAMETRIZED = nn.utils.parametrizations

REFUSED = {
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), "Bilinear is bilinear in two inputs"),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 4), "EmbeddingBag adds up rows"),
    "norm": (lambda: nn.LayerNorm(8), "LayerNorm is of no class .* randlora.register"),
    "scripted": (scripted, "RecursiveScriptModule is compiled by TorchScript"),
    "weight norm": (normed(PARAMETRIZED.weight_norm), "ParametrizedLinear computes its weight"),
    "spectral norm": (normed(PARAMETRIZED.spectral_norm), "ParametrizedLinear computes its weight"),
    "old weight norm": (old_weight_norm, "Conv1d computes its weights"),
    "complex linear": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "of torch.complex64"),
    "own attribute": (lambda: Named(4, 4), "Named has an attribute 'rank' of its own"),
    "other sizes": (lambda: resized(nn.Linear(4, 4)), r"weight of \(5, 4\), but says \(4, 4\)"),
    "more words": (lambda: resized(nn.Embedding(4, 4)), r"weight of \(5, 4\), but says \(4, 4\)"),
    "sparse": (lambda: sparse(nn.Linear(4, 4)), "Linear has a weight that is not dense"),
    "complex": (lambda: nn.Conv1d(4, 4, 3, dtype=torch.complex64), "weight of torch.complex64"),
    "float8": (lambda: nn.Conv1d(4, 4, 3).to(torch.float8_e4m3fn), "weight of torch.float8_e4m3fn"),
    "max norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), "Embedding has max_norm"),
    "by frequency": (lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
    "empty": (empty, "Conv1d has an empty weight"),
    "opaque, forward of its own": (lambda: with_forward(Opaque(8, 8)), "forward that is bound"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_adapted_is_refused_by_name_and_untouched(name):
    build, message = REFUSED[name]
    model = nn.ModuleDict({"one": nn.Linear(8, 8), "it": build()})
    before = parts(model)
    with pytest.raises(TypeError, match=f"'it', but .*{message}"):
        inject(model, rank=2, target_modules=["one", "it"])
    assert parts(model) == before
    assert all(p.requires_grad for p in model["one"].parameters())
    inject(model, rank=2)  # unasked it is left out
    assert [layer.name for layer in summary(model).layers] == ["one"]


@pytest.mark.parametrize("build", [lambda: nn.LazyLinear(8), lambda: nn.LazyConv2d(8, 3)])
def test_a_model_without_sizes_is_refused_until_it_has_run(build):
    model = nn.ModuleDict({"one": nn.Linear(8, 8), "it": build()})
    with pytest.raises(ValueError, match=r"'it', a Lazy.*, has none before it is run"):
        inject(model, rank=2)
    assert type(model["one"]) is nn.Linear
    assert model["one"].weight.requires_grad
    model["it"](torch.randn(2, 4, 8, 8))
    assert list(adapted_modules(inject(model, rank=2))) == ["one", "it"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("vector", "'vector', but vector of Held is neither a matrix nor a stack"),
        ("codes", "'codes', but Held has a codes of torch.int8"),
        ("linear.bias", "'linear.bias', but bias of Linear is neither"),
        ("clipped.weight", "'clipped.weight', but Embedding has max_norm"),
        ("both.weight", "'both.weight', but Bilinear is bilinear"),
        ("scripted.weight", "'scripted.weight', but .* is compiled by TorchScript"),
        ("named.extra", "'named.extra', but Named has an attribute 'rank' of its own"),
    ],
)
def test_parameters_that_cannot_be_adapted_are_refused_by_name(pattern, message):
    model = Held()
    model.clipped, model.both = nn.Embedding(9, 4, max_norm=0.1), nn.Bilinear(3, 4, 5)
    model.scripted, model.named = scripted(), Named(4, 4)
    model.named.extra = nn.Parameter(torch.randn(4, 4))
    before = parts(model)
    with pytest.raises(TypeError, match=message):
        inject(model, rank=2, target_parameters=["matrix", pattern])
    assert parts(model) == before


def test_a_parameter_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"'matrx' matches no parameter .* close to it: 'matrix'"):
        inject(Held(), rank=2, target_parameters="matrx")


def test_an_opaque_layer_without_a_gradient_says_so():
    class Detached(Opaque):
        def forward(self, x):
            return super().forward(x).detach()

    layer = inject(Detached(8, 8), rank=2)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.randlora_gamma.grad.count_nonzero()
    with pytest.raises(RuntimeError, match="Detached gives no gradient to its input"):
        layer(torch.randn(3, 8, requires_grad=True))


def test_eight_bits_of_bitsandbytes():
    """Not in the contract: by itself it computes otherwise in training than in evaluation."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    x = torch.randn(5, 64, requires_grad=True)
    base = layer(x)
    (grad,) = torch.autograd.grad(base.sum(), x)
    model = inject(layer, rank=3)
    assert torch.equal(model(x), base)
    shuffled(model)
    update = model._randlora.current["weight"]
    delta = core.delta(model, update)
    torch.testing.assert_close(model(x), base + F.linear(x, delta), rtol=1e-5, atol=1e-4)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, grad + delta.sum(0).expand_as(x), rtol=1e-5, atol=1e-4)
    assert all(p.grad.count_nonzero() for p in randlora.adapter_parameters(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Held(), "matrix"), "cls must be a class of modules, got Held"),
        ((int, "matrix"), "cls must be a class of modules, got <class 'int'>"),
        ((Held, 3), "parameters must be names, got 3 of type int"),
    ],
)
def test_registering_what_is_no_class_or_name_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        register(*arguments)
    assert Held not in handlers._TABLE


# --- what is adapted -----------------------------------------------------------------------------


def test_embeddings_are_adapted_only_where_they_are_meant():
    def model():
        return nn.ModuleDict(
            {"body": nn.ModuleDict({"e": nn.Embedding(9, 4), "l": nn.Linear(4, 4)})}
        )

    for target, expected in [
        (None, ["body.l"]),
        ("body", ["body.l"]),
        (lambda name, module: True, ["body.l"]),
        ("e", ["body.e"]),
        (["body.e", "l"], ["body.e", "body.l"]),
        (r"body\..*", ["body.e", "body.l"]),
    ]:
        adapted = inject(model(), rank=2, target_modules=target)
        assert list(adapted_modules(adapted)) == expected


def test_parameters_are_adapted_where_they_are_named_beside_the_layers():
    model = inject(Held(), rank=2, target_parameters=["stack", "matrix", "linear.weight"])
    assert [layer.name for layer in summary(model).layers] == ["stack", "matrix", "linear"]
    only = inject(Held(), rank={"stack": 3}, target_modules=[], target_parameters="stack")
    assert [(layer.name, layer.rank, layer.stack) for layer in summary(only).layers] == [
        ("stack", 3, 2)
    ]
    assert {n for n, p in only.named_parameters() if p.requires_grad} == {
        "stack_randlora_lambda",
        "stack_randlora_gamma",
    }


def test_a_subclass_has_the_handler_of_its_class():
    class Wider(nn.Conv2d):
        pass

    model = inject(nn.Sequential(Wider(3, 4, 3), Scaled(9, 4)), rank=2, target_modules=["0", "1"])
    assert isinstance(model[0], Wider)
    assert isinstance(model[1], handlers.RandLoRAEmbedding)
    assert [m._randlora_base for m in model] == [Wider, Scaled]


def test_ranks_and_tables_of_all_kinds():
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(8, 2), "c": nn.Conv1d(5, 6, 3), "x": Experts()}
    )
    inject(model, rank=4, basis="isometric", target_parameters=["up"])
    found = {layer.name: layer for layer in summary(model).layers}
    assert {n: (x.out_features, x.in_features, x.stack) for n, x in found.items()} == {
        "a.in_proj_weight": (24, 8, 0),
        "a.out_proj": (8, 8, 0),
        "c": (6, 15, 0),
        "x.up": (12, 8, 3),
    }
    assert "3 x 12 x 8" in str(summary(model))
    assert "weight, whenever it is read" in str(summary(model, tokens=9))
    shuffled(model)
    ranks = {layer.name: (layer.rank, layer.full_rank) for layer in rank_report(model)}
    assert ranks == {
        "a.in_proj_weight": (8, 8),
        "a.out_proj": (8, 8),
        "c": (6, 6),
        **{f"x.up[{e}]": (8, 8) for e in range(3)},
    }
    one = next(layer for layer in rank_report(model) if layer.name == "x.up[1]")
    module, adapter = model["x"], model["x"]._randlora.current["up"]
    exact = torch.linalg.svdvals(core.delta(module, adapter, torch.float64)[1])
    assert one.certified
    torch.testing.assert_close(one.singular_values, exact, rtol=1e-6, atol=1e-6)


def test_the_summary_says_why_a_head_is_left_out():
    model = nn.ModuleDict({"e": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "o": nn.Linear(4, 9)})
    model["o"].weight = model["e"].weight
    found = summary(inject(model, rank=2))
    assert found.left_out == {"o": "output head: its weight is an embedding's too"}
    assert "left out: o (output head: its weight is an embedding's too)" in str(found)
    some = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(3, 4, 1), nn.Linear(4, 4))
    found = summary(inject(some, rank=2, target_modules="0"))
    assert found.left_out == {"1": "not a target", "2": "not a target"}
    assert "left out: 2 more, see left_out" in str(found)


# --- what is computed ----------------------------------------------------------------------------


@pytest.fixture
def formed(monkeypatch):
    """The shapes of the effective weights that are formed."""
    shapes, whole = [], core.effective_weight

    def record(weight, *args, **keywords):
        shapes.append(tuple(weight.shape))
        return whole(weight, *args, **keywords)

    monkeypatch.setattr(core, "effective_weight", record)
    monkeypatch.setattr(handlers, "effective_weight", record)
    return shapes


@pytest.mark.parametrize(
    ("row", "shapes"),
    [
        ("attention", [(24, 8), (8, 8)]),
        ("attention of three sizes", [(8, 8), (8, 6), (8, 10), (8, 8)]),
        ("lstm", [(24, 8), (24, 6)]),
        ("convolution 2d", [(6, 36)]),
        ("experts", 3 * [(12, 8)] + 3 * [(8, 12)]),
        ("linear that reads its weight", [(12, 8)]),
    ],
)
def test_a_weight_read_many_times_is_formed_once(row, shapes, formed):
    row = next(r for r in ROWS if r.name == row)
    model = inject_row(row, make(row))
    formed.clear()
    loss_of(model(*inputs_of(row))).backward()
    assert sorted(formed) == sorted(shapes)


@pytest.mark.parametrize("basis", ["dense", "sparse", "very_sparse", "isometric"])
def test_an_embedding_forms_the_rows_looked_up_and_no_others(basis, formed):
    layer = inject(nn.Embedding(500, 16), rank=4, target_modules=".*|", basis=basis)
    layer(torch.arange(6).view(2, 3)).sum().backward()
    assert formed == [(6, 16)]
    assert layer(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 16)
    with pytest.raises(IndexError):
        layer(torch.tensor([500]))


def test_gradients_recorded_or_not_do_not_mix_within_a_call():
    class Both(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                scale = self.weight.norm()
            return F.linear(x, self.weight) / scale

    layer = inject(Both(8, 8), rank=2)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.randlora_gamma.grad.count_nonzero()


def test_an_error_within_a_call_leaves_nothing_held():
    model = inject(Experts(), rank=2, target_modules=[], target_parameters="up")
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.randn(3, 5))
    assert not model._randlora.held


@pytest.mark.parametrize("basis", ["dense", "isometric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_all_kinds_is_exact_in_every_dtype(dtype, basis):
    """A hundred times, and what was merged differs by the rounding of the weights alone."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.a = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.c, self.x = nn.Conv1d(8, 8, 1), Experts()

        def forward(self, tokens):
            h = self.e(tokens)
            h = h + self.a(h, h, h)[0]
            return self.x(self.c(h.transpose(1, 2)).transpose(1, 2))

    model = Net().to(dtype).eval()
    inject(model, 3, basis=basis, target_modules=["e", "a", "c"], target_parameters=["up", "down"])
    shuffled(model)
    tokens = torch.arange(6).view(2, 3)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        want = model(tokens)
        for _ in range(100):
            merged = randlora.merge(model)(tokens)
            randlora.unmerge(model)
        assert torch.equal(model(tokens), want)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        # The merged weight is rounded as the effective one is: here they are the same numbers.
        assert (merged - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()


def test_an_update_that_is_not_finite_leaves_the_layers_before_it_unmerged():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "c": nn.Conv1d(8, 8, 3)}).eval()
    inject(model, rank=2)
    with torch.no_grad():
        model["c"].randlora_gamma[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of 'c' must be finite"):
        randlora.merge(model)
    assert not any(
        m._randlora.merged or m._randlora.folded for m in adapted_modules(model).values()
    )
    with torch.no_grad():
        model["c"].randlora_gamma[0, 0] = 0
        model["a"].in_proj_weight_randlora_lambda[0, 0] = float("inf")
        model["a"].in_proj_weight_randlora_gamma.fill_(1)
    with pytest.raises(ValueError, match=r"weight of 'a\.in_proj_weight' must be finite"):
        randlora.unload(model, merge=True)
    assert list(adapted_modules(model)) == ["a", "a.out_proj", "c"]


def test_a_model_made_anew_on_another_device_is_what_a_fresh_one_is():
    """Base weights and updates both: neither garbage nor a base that was left out."""
    for build, reset in [
        (lambda: nn.Linear(8, 12), "reset_parameters"),
        (lambda: nn.Conv2d(3, 4, 3), "reset_parameters"),
        (lambda: nn.MultiheadAttention(8, 2), "_reset_parameters"),
        (lambda: nn.LSTM(8, 6), "reset_parameters"),
        (lambda: nn.Embedding(9, 4), "reset_parameters"),
        (lambda: Scaled(9, 4), "reset_parameters"),
    ]:
        model = inject(build(), rank=2, target_modules=".*|")
        shuffled(model)
        with torch.no_grad():
            for module in model.modules():
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.fill_(7)
        model.to("meta").to_empty(device="cpu")
        for module in model.modules():
            again = getattr(module, reset if module is model else "reset_parameters", None)
            if again is not None:
                again()
        for path, module in adapted_modules(model).items():
            for name, adapter in module._randlora.current.items():
                base = module._parameters[name]
                assert torch.equal(getattr(module, name), base), (path, name)
                assert 0 < base.std() < 2
                lam, gamma = adapter.parameters(module)
                assert torch.equal(lam, lam[:1, :1].expand_as(lam))
                assert not gamma.count_nonzero()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        "linear that reads its weight",
        "attention, no weights",
        "encoder layer",
        "convolution 2d",
        "embedding",
        "gru cell",
        "experts",
        "registered",
        "opaque, registered",
    ],
)
def test_they_compile_as_one_graph(name):
    row = next(r for r in ROWS if r.name == name)
    model = inject_row(row, make(row))
    shuffled(model)
    inputs = inputs_of(row)
    want = model(*inputs)
    torch.compiler.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    trained = randlora.adapter_parameters(model)
    torch.testing.assert_close(got, want)
    for one, other in zip(
        torch.autograd.grad(loss_of(got), trained),
        torch.autograd.grad(loss_of(want), trained),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["attention", "convolution 2d", "lstm", "experts", "embedding"])
def test_autocast_computes_in_its_dtype(name):
    row = next(r for r in ROWS if r.name == name)
    inputs = [x.float() if x.is_floating_point() else x for x in row.inputs]
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    try:
        with autocast:
            make(row).float()(*inputs)
    except RuntimeError as error:
        if name != "lstm":  # by oneDNN on processors without AVX-512
            raise
        pytest.skip(f"the plain module cannot do it here: {str(error)[:60]}")
    model = inject_row(row, make(row)).float()
    shuffled(model)
    want = model(*inputs)
    with autocast:
        got = model(*inputs)
    loss_of(got.float()).backward()
    assert all(p.grad.count_nonzero() for p in randlora.adapter_parameters(model))
    assert (got - want).abs().max() <= 0.1 * want.abs().max()


# --- what reviews found --------------------------------------------------------------------------


def adapted(module, rank=2, **keywords):
    model = inject(nn.Sequential(module), rank, **keywords)
    shuffled(model)
    return model


def test_a_merged_layer_sees_every_weight_it_is_given():
    model, x = randlora.merge(adapted(nn.Linear(8, 8)).eval()), torch.randn(3, 8)
    delta = model[0].delta_weight()
    with torch.no_grad():
        for _ in range(5):  # a tensor that is freed leaves its id to the next
            weight = torch.randn(8, 8)
            got = torch.func.functional_call(model, {"0.weight": weight}, (x,))
            torch.testing.assert_close(got, F.linear(x, weight + delta, model[0].bias))
            del weight


def test_a_merged_layer_made_in_inference_mode_computes():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 5))
    randlora.merge(inject(model, 2)).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 6)).shape == (2, 5)


def test_a_merged_layer_that_is_not_trained_computes_in_training_mode():
    model, x = adapted(nn.Linear(6, 5)), torch.randn(2, 6)
    want = model(x).detach()
    for parameter in randlora.adapter_parameters(model):
        parameter.requires_grad_(False)
    torch.testing.assert_close(randlora.merge(model).train()(x), want)


@pytest.mark.parametrize("build", [lambda: nn.LSTM(8, 6), lambda: nn.Linear(8, 6)])
def test_copies_of_a_merged_model_have_weights_of_their_own(build):
    model = randlora.merge(adapted(build()))
    ours = model[0]._randlora.folded
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        theirs = copied[0]._randlora.folded
        assert copied[0]._randlora.merged
        for name, (_, weight) in ours.items():
            assert torch.equal(theirs[name][1], weight)
            assert theirs[name][1] is not weight


def test_ids_out_of_range_are_refused_as_before():
    layer = adapted(nn.Embedding(20, 4), target_modules="0")
    for ids in (torch.tensor([-1]), torch.tensor([20])):
        with pytest.raises(IndexError):
            layer(ids)
    with pytest.raises(RuntimeError, match="indices"):
        layer(torch.tensor([1, 0], dtype=torch.uint8))


def test_attributes_of_a_module_are_its_authors():
    class Own(nn.Conv1d):
        base_class = "mine"

        def __init__(self):
            super().__init__(4, 4, 1)
            self.choice, self.rank, self.scaling = "mine", "mine", "mine"

    model = adapted(Own())
    for _ in range(2):
        one = model[0]
        assert {one.choice, one.rank, one.scaling, one.base_class} == {"mine"}
        if isinstance(one, core.Adapted):
            randlora.unload(model)


def test_what_one_adapter_trains_in_full_another_may_update():
    x = torch.randn(3, 8)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    want = plain(x)
    model = inject(plain, 2, modules_to_save="0")
    inject(model, 2, adapter="b")
    inject(model, 2, adapter="c", target_modules="0", modules_to_save="1")
    outputs = {}
    for name in ("default", "b", "c"):
        randlora.set_adapter(model, name)
        assert torch.equal(model(x), want)
        for parameter in randlora.adapter_parameters(model):
            nn.init.normal_(parameter)
        outputs[name] = model(x)
    for name, output in outputs.items():
        assert torch.equal(randlora.set_adapter(model, name)(x), output)
        torch.testing.assert_close(randlora.merge(model).eval()(x), output)
        randlora.unmerge(model).train()
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), output)
    with randlora.disabled(model):
        assert torch.equal(model(x), want)


def test_a_wrapper_that_passes_attributes_on_is_not_saved_for_what_it_holds():
    class Wrap(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.extra = nn.Linear(8, 8), nn.Linear(8, 8)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    model = nn.Sequential(nn.Linear(8, 8), Wrap())
    inject(model, 2, target_modules="0", modules_to_save="inner")
    grad = {n for n, p in model.named_parameters() if p.requires_grad}
    assert grad == {
        "0.randlora_lambda",
        "0.randlora_gamma",
        "1.inner.randlora_copy_weight",
        "1.inner.randlora_copy_bias",
    }


def test_a_scripted_module_cannot_be_trained_in_full():
    model = nn.ModuleDict({"one": nn.Linear(8, 8), "other": nn.ModuleList([scripted()])})
    before = parts(model)
    with pytest.raises(TypeError, match=r"'other\.0' has code compiled by TorchScript"):
        inject(model, 2, target_modules="one", modules_to_save="other")
    assert parts(model) == before


def test_a_module_that_guards_its_attributes_is_adapted_and_given_back():
    class Guarded(nn.Conv1d):
        ready = False

        def __setattr__(self, name, value):
            if self.ready:
                raise AttributeError("frozen")
            super().__setattr__(name, value)

    module = Guarded(4, 4, 1)
    vars(module)["ready"] = True
    model = adapted(nn.Sequential(nn.Linear(4, 4), module))
    assert isinstance(module, core.Adapted)
    randlora.unload(model)
    assert type(module) is Guarded


def test_a_model_with_a_parametrized_embedding_and_no_single_head_is_adapted():
    embedding = nn.utils.parametrizations.spectral_norm(nn.Embedding(9, 4))
    model = nn.ModuleDict({"e": embedding, "a": nn.MultiheadAttention(4, 2), "l": nn.Linear(4, 4)})
    model.get_output_embeddings = lambda: [model["l"]]
    layers = summary(inject(model, 2)).layers
    assert [layer.name for layer in layers] == ["a.in_proj_weight", "a.out_proj", "l"]
    assert summary(model).left_out == {
        "e": "ParametrizedEmbedding computes its weight instead of holding it as a parameter"
    }


def test_a_part_of_a_call_can_be_recomputed_in_backward():
    class Part(nn.Linear):
        def body(self, x):
            return F.linear(x, self.weight, self.bias).tanh()

        def forward(self, x):
            y = checkpoint(self.body, x, use_reentrant=False)
            y = checkpoint(self.body, y, use_reentrant=False)
            return y + F.linear(x, self.weight)

    model = adapted(Part(8, 8)).double()
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    weight, bias = model[0].delta_weight() + model[0].base_weight, model[0].bias
    one = F.linear(x, weight, bias).tanh()
    want = F.linear(one, weight, bias).tanh() + F.linear(x, weight)
    trained = randlora.adapter_parameters(model)
    for got, expected in zip(
        torch.autograd.grad(model(x).sum(), trained),
        torch.autograd.grad(want.sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_threads_do_not_share_a_call():
    model, x = adapted(nn.LSTM(8, 6)), torch.randn(5, 2, 8)
    trained = randlora.adapter_parameters(model)
    want = torch.autograd.grad(model(x)[0].sum(), trained)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            step = lambda _: torch.autograd.grad(model(x)[0].sum(), trained)  # noqa: E731
            for got in pool.map(step, range(24)):
                torch.testing.assert_close(got, want)
    finally:
        sys.setswitchinterval(interval)


def test_a_call_within_a_call_forms_a_weight_once(monkeypatch):
    class Again(nn.Linear):
        def forward(self, x, depth=2):
            y = F.linear(x, self.weight)
            return self.forward(x, depth - 1) + F.linear(x, self.weight) if depth else y

    formed, compute = [], core._compute
    monkeypatch.setattr(core, "_compute", lambda *a: (formed.append(1), compute(*a))[1])
    inject(nn.Sequential(Again(4, 4)), 2)(torch.randn(2, 4))
    assert len(formed) == 1


def test_half_an_adapter_of_a_model_does_not_load():
    model = adapted(nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)))
    linear = ["0.0.randlora_lambda", "0.0.randlora_gamma"]
    for keys in (linear, ["0.1.in_proj_weight_randlora_lambda"]):
        state = model.state_dict()
        for key in keys:
            del state[key]
        with pytest.raises(RuntimeError, match=f"Missing key.*{keys[0]}"):
            model.load_state_dict(state)


@pytest.mark.parametrize(
    ("build", "layout"),
    [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)],
)
def test_a_kernel_keeps_its_layout(build, layout):
    conv = adapted(build(4, 6, 3).to(memory_format=layout))[0]
    assert conv.weight.stride() == conv._parameters["weight"].stride()


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_go_through_a_linear_layer(layout):
    model = adapted(nn.Linear(8, 6))
    rows = [torch.randn(2, 8), torch.randn(3, 8)]
    got = model(torch.nested.nested_tensor(rows, layout=layout))
    for one, row in zip(got.unbind(), rows, strict=True):
        torch.testing.assert_close(one, model(row))


@pytest.mark.parametrize("basis", ["dense", "isometric"])
def test_the_rank_of_an_embedding_counts_no_padding(basis):
    embedding = nn.Embedding(16, 4, padding_idx=3)
    model = adapted(embedding, target_modules="0", basis=basis).double()
    (layer,) = rank_report(model)
    assert not layer.certified
    difference = (model[0].weight - model[0]._parameters["weight"]).detach()
    torch.testing.assert_close(layer.singular_values, torch.linalg.svdvals(difference))


def test_the_rank_of_few_isometric_bases():
    (layer,) = rank_report(adapted(nn.Linear(8, 16), basis="isometric", num_bases=1))
    assert (layer.certified, len(layer.singular_values), layer.rank) == (True, 8, 2)


def test_the_update_of_a_transposed_weight_is_out_by_in():
    model = adapted(Kernel(8, 12))
    update = core.delta(model[0], model[0]._randlora.current["kernel"])
    assert update.shape == (12, 8)
    torch.testing.assert_close(model[0].kernel, model[0]._parameters["kernel"] + update.T)


class Codes(nn.Linear):
    """As quantised layers are: a linear layer with codes for a weight."""

    returns = torch.float32

    def __init__(self):
        super().__init__(8, 6)
        codes = torch.randint(-9, 9, (6, 8), dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype)).to(self.returns)


def test_an_opaque_layer_draws_bases_for_what_it_is_given_and_returns_its_dtype():
    class Half(Codes):
        returns = torch.bfloat16

    for build, returns in ((Codes, torch.float32), (Half, torch.bfloat16)):
        model = adapted(build())
        (update,) = model[0]._randlora.all()
        assert model(torch.randn(3, 8)).dtype == returns
        assert {dtype for _, dtype in update._stores} == {torch.float32}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randn(3, 8))
        assert {dtype for _, dtype in update._stores} == {torch.float32, torch.bfloat16}
        model.double()
        assert not update._stores


def test_dropout_of_an_opaque_layer_is_on_its_update_in_training():
    model, x = adapted(Codes(), dropout=0.5), torch.randn(64, 8)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    with randlora.disabled(model):
        assert torch.equal(model.train()(x), model(x))


def test_an_opaque_layer_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(Opaque(8, 8))
    with pytest.raises(ValueError, match="'0' is on the meta device"):
        inject(model, 2)


def test_a_bank_of_another_sparsity_is_another_bank():
    model = adapted(nn.Linear(8, 8), basis=randlora.BasisBank("sparse", sparsity=4.0))
    inject(model, 2, basis="sparse", adapter="two")
    assert [bank.sparsity for bank in summary(model).banks] == [4.0, 6.0]


@pytest.mark.parametrize("argument", ["exclude_modules", "modules_to_save"])
def test_parameters_are_left_out_with_their_module(argument):
    model = nn.ModuleDict({"a": Floats(), "b": Floats()})
    inject(model, 2, target_parameters="matrix", **{argument: "a"})
    assert not any("randlora_gamma" in name for name in model["a"].state_dict())
    assert "matrix_randlora_lambda" in model["b"].state_dict()


def test_updates_are_not_adapted_themselves():
    model = inject(Floats(), 2, target_parameters="matrix")
    inject(model, 2, target_parameters=r".*matrix.*", adapter="two")
    assert all(name.count("randlora") < 2 for name in model.state_dict())


class Floats(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.matrix = nn.Linear(8, 6), nn.Parameter(torch.randn(6, 8))
