"""Every module of torch's test database is adapted by contract, or refused by name."""

import copy
import importlib
import warnings
from contextlib import contextmanager
from functools import reduce

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import randlora
from tests.support.clauses import clause


@contextmanager
def no_traces():
    """Undo what importing torch's tests changes: frozen backend flags, wrapped TorchScript calls.

    Without this, other tests in this process would see them.
    """
    flags = torch.backends.flags_frozen.__globals__  # the globals of the module
    before = dict(flags)
    calls = [(cls, cls.__call__) for cls in (torch._C.ScriptFunction, torch._C.ScriptMethod)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        flags.update(before)
        for cls, call in calls:
            cls.__call__ = call


with no_traces():
    module_db = importlib.import_module("torch.testing._internal.common_modules").module_db

SAMPLES = 3  # about as many of torch's inputs for a module are used, evenly spread
EPS = torch.finfo(torch.float64).eps

# Modules that have a matrix parameter but are refused. The test asserts that all others with a
# matrix parameter are adapted, and that all without one are refused.
REFUSED = {
    "nn.Bilinear": "Bilinear is bilinear in two inputs",
    "nn.LayerNorm": "LayerNorm is not of a class that can be adapted",
    "nn.RMSNorm": "RMSNorm is not of a class that can be adapted",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning"),
]


class Within(nn.Module):
    """A model that contains the module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **keywords):
        return self.inner(*args, **keywords)


def samples(info, training):
    """Modules with their inputs, in float64."""
    torch.manual_seed(0)
    keywords = {"device": "cpu", "dtype": torch.float64, "requires_grad": False}
    found = info.module_inputs_func(info, training=training, **keywords)
    step = max(1, (len(found) - 1) // (SAMPLES - 1))
    for sample in found[::step]:
        made, given = sample.constructor_input, sample.forward_input
        module = info.module_cls(*made.args, **made.kwargs).double().train(training)
        yield module, (given.args, given.kwargs)


def run(model, inputs):
    """The output's tensors, with the same random numbers each time."""
    torch.manual_seed(1)
    args, keywords = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
    return [y for y in tree_leaves(model(*args, **keywords)) if isinstance(y, torch.Tensor)]


def same(some, others):
    """Equal bits. NaN equals NaN."""
    return len(some) == len(others) and all(
        torch.equal(one.isnan(), other.isnan())
        and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
        for one, other in zip(some, others, strict=True)
    )


def close(some, others):
    """Equal up to the rounding of sums of a few hundred terms."""
    for one, other in zip(some, others, strict=True):
        size = other.nan_to_num().abs().max().clamp_min(1e-3) if other.numel() else 0
        if not torch.allclose(one, other, rtol=0, atol=1000 * EPS * float(size), equal_nan=True):
            return False
    return True


def looks(model):
    """The classes, parameters and state names of a model."""
    classes = [(name, type(m)) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return classes, parameters, list(model.state_dict())


def bits(model):
    return [t.clone() for t in model.state_dict().values() if isinstance(t, torch.Tensor)]


def adapt(model, inner):
    """Adapt the module: alone with the shared A, within a model with a trained A of its own."""
    targets = ["inner"] if inner else [r".*|"]
    return randlora.inject(model, rank=2, alpha=2, target_modules=targets, train_a=inner)


def read(model, name):
    """The effective parameter, as reading the attribute gives it."""
    return reduce(getattr, name.split("."), model)


def refused(model, inner, message):
    lazy = any(nn.parameter.is_lazy(p) for p in model.parameters())
    before, content = looks(model), None if lazy else bits(model)
    with pytest.raises((TypeError, ValueError), match=message):
        adapt(model, inner)
    if not lazy:
        with pytest.raises(ValueError, match="must leave a layer to adapt, but leave none"):
            randlora.inject(model, rank=2)
        assert same(bits(model), content)
    assert looks(model) == before


@pytest.mark.parametrize("inner", [False, True], ids=["alone", "within"])
@pytest.mark.parametrize("info", module_db, ids=[info.name for info in module_db])
def test_a_module_of_torch_is_adapted_or_refused_by_name(info, inner):
    kind, tried = info.module_cls.__name__, 0
    for training in (True, False) if info.train_and_eval_differ else (True,):
        for module, inputs in samples(info, training):
            model = Within(module) if inner else module
            if info.is_lazy:
                refused(
                    model, inner, f"'{'inner' * inner}', a {kind}, has no sizes before it is run"
                )
                model(*inputs[0], **inputs[1])  # from now on it is an ordinary module
            model.requires_grad_(False)
            matrices = any(p.ndim > 1 for p in model.parameters())
            reason = REFUSED.get(info.name, "") if matrices else f"{kind} is not of a class"
            if reason:
                refused(model, inner, f"'{'inner' * inner}', but {reason}")
            else:
                contract(model, inputs, inner)
            tried += 1
    assert tried


def contract(model, inputs, inner):
    plain, before = copy.deepcopy(model), looks(model)
    names = [name for name, _ in plain.named_parameters()]
    with torch.no_grad():
        output = run(plain, inputs)
        assert same(run(plain, inputs), output)  # else the comparison proves nothing

        with clause("after inject the output is the plain one's to the bit"):
            assert adapt(model, inner) is model
            assert same(run(model, inputs), output)
        with clause("inject leaves nothing to train but the adapter"):
            numbers = [p for p in model.parameters() if p.requires_grad]
            assert {id(p) for p in numbers} == {id(p) for p in randlora.adapter_parameters(model)}
        for p in model.double().parameters():
            if p.requires_grad:
                p.copy_(0.5 * torch.randn_like(p))

        dense, bases = copy.deepcopy(plain), dict(plain.named_parameters())
        for name in names:
            dense.get_parameter(name).copy_(read(model, name))
        adapted = [n for n in names if not torch.equal(dense.get_parameter(n), bases[n])]
        assert adapted
        with clause("the output is that of the plain module with the weights that are read"):
            want = run(model, inputs)
            assert close(want, run(dense, inputs))
        changed = not same(want, output)

    with clause("the gradients are those of the plain module with the weights that are read"):
        numbers = [p for p in model.parameters() if p.requires_grad]
        weights = {name: read(model, name) for name in adapted}
        got = gradients(run(model, inputs), numbers)
        wanted = gradients(
            run(lambda *a, **k: torch.func.functional_call(dense, weights, a, k), inputs), numbers
        )
        assert close(got, wanted)
        numeric = not any(y.isnan().any() for y in want)
        assert changed or not numeric or not any(g.count_nonzero() for g in wanted)
        if numeric and changed:
            assert all(g.isfinite().all() for g in got)
            assert any(g.count_nonzero() for g in got)

    with torch.no_grad():
        with clause("a copy computes the same to the bit"):
            assert same(run(copy.deepcopy(model), inputs), want)
        with clause("disabled the output is the plain one's to the bit"), randlora.disabled(model):
            assert same(run(model, inputs), output)
        with clause("merged the output is the same"):
            assert close(run(randlora.merge(model), inputs), want)
        with clause("unload(merge=True) gives the same output"):
            assert close(run(randlora.unload(copy.deepcopy(model), merge=True), inputs), want)
        with clause("unmerged the output is to the bit what it was"):
            assert same(run(randlora.unmerge(model), inputs), want)
        with clause("unload gives back the plain module, its state and its output to the bit"):
            assert randlora.unload(model) is model
            assert looks(model) == before
            assert same(bits(model), bits(plain))
            assert same(run(model, inputs), output)


def gradients(outputs, numbers):
    generator = torch.Generator().manual_seed(2)
    loss = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
        for y in outputs
        if y.requires_grad
    )
    return torch.autograd.grad(loss, numbers, allow_unused=True, materialize_grads=True)
