"""One test over a table: the contract of every module that can be adapted, in every situation.

Injection changes nothing; the gradients are those that autograd gives to a dense ``ΔW`` added by
hand; training, evaluation, merging, copies, ``state_dict`` and unloading agree. A failure names the
clause of the contract that is broken.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import randlora
from randlora import reference
from randlora.model.index import adapted_modules
from randlora.modules.adapted import AdaptedModule
from tests.support.clauses import clause
from tests.support.rows import ROWS, inject, inputs_of, loss_of, make, recomputed, shuffled


def by_hand(row, plain, model, numbers):
    """Trained numbers as float64 leaves, and the dense ``ΔW`` of each adapted parameter by them."""
    leaves = {n: t.detach().double().requires_grad_() for n, t in numbers.items()}
    replaced = {}
    for name in row.adapted:
        path, _, parameter = f"inner.{name}".rpartition(".")
        module = model.get_submodule(path)
        adapter = module._randlora.updates["default"][parameter]
        lam, gamma, *own = (leaves[f"{path}.{key}"] for key in adapter.parameter_names)
        r, p, q, m = adapter.sizes
        b = adapter.bank.b(q, m, torch.float64)
        if row.unreadable:
            shape = row.unreadable(plain.inner).shape
        else:
            shape = plain.get_parameter(f"inner.{name}").shape
        stack = len(shape) == 3 and "target_parameters" in row.keywords
        rows, columns = shape[-2:] if stack else (shape[0], shape[1:].numel())
        out, in_ = (columns, rows) if row.transposed else (rows, columns)

        def one(lam, gamma, a, out=out, in_=in_, b=b, scaling=adapter.settings.scaling):
            return reference.delta_weight(a, b, lam, gamma, scaling=scaling, wide=out < in_)

        if not own:
            shared = adapter.bank.a(r, p).double()
            own = [shared.expand(len(lam), r, p) if stack else shared]
        parts = zip(lam, gamma, *own, strict=True) if stack else [(lam, gamma, *own)]
        deltas = [one(*part).T if row.transposed else one(*part) for part in parts]
        delta = (torch.stack(deltas) if stack else deltas[0]).view(shape)
        padding = getattr(plain.get_submodule(path), "padding_idx", None)
        if padding is not None:
            delta = delta.index_fill(0, torch.tensor(padding), 0)
        replaced[f"inner.{name}"] = delta
    return leaves, replaced


def call_plain(row, plain, deltas, inputs, weight):
    if row.unreadable:
        y = plain(*inputs).detach()  # the plain output, with the gradient of the dense weight
        straight = F.linear(inputs[0], weight.to(row.dtype))
        (delta,) = deltas.values()
        return y + (straight - straight.detach()) + F.linear(inputs[0], delta.to(row.dtype))
    weights = {
        name: plain.get_parameter(name).detach() + delta.to(row.dtype)
        for name, delta in deltas.items()
    }
    plain.inner.sparse = False  # embeddings: W0 + ΔW has no sparse gradient
    if row.call is recomputed:  # backward would recompute with the plain weights
        plain.call = nn.Module.__call__
    return torch.func.functional_call(plain, weights, inputs, tie_weights=False)


def close(got, want, row):
    eps = torch.finfo(row.dtype).eps
    size = want.abs().max().clamp_min(1e-3)
    return bool((got - want).abs().max() <= 1000 * eps * size)  # sums of some hundred terms


def state(model):
    return {n: copy.copy(t) for n, t in model.state_dict().items()}


def same_state(one, other):
    def equal(a, b):
        return a is b or not isinstance(a, torch.Tensor) or torch.equal(dense(a), dense(b))

    return list(one) == list(other) and all(equal(one[name], other[name]) for name in one)


def dense(tensor):
    return tensor.dequantize() if hasattr(tensor, "tensor_data_names") else tensor


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:.*API settings to control TF32:UserWarning")  # torchao's call
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_the_contract(row):
    """Compare each output with that of a plain module after the same calls in the same order.

    The order matters: a call can change what the plain module computes later, see ``Repacked``.
    """
    plain, model = make(row), make(row)
    x = inputs_of(row)
    classes = [type(m) for m in model.modules()]

    with clause("after inject the output is the plain one's to the bit"):
        for mode in (True, False):
            with torch.no_grad():
                one = make(row).train(mode)
                before = one(*x)
                assert torch.equal(inject(row, one)(*x), before)
        assert inject(row, model) is model
        with torch.no_grad():
            output = plain(*x)
            assert torch.equal(model(*x), output)

    with clause("inject adapts the targets and nothing else"):
        adapted = {
            f"{name}.{parameter}"
            for name, module in adapted_modules(model).items()
            for parameter in module._randlora.active_updates
        }
        assert adapted == {f"inner.{name}" for name in row.adapted}

    if row.dtype == torch.float64:
        model.double()  # Λ, Γ and A, too
    numbers = shuffled(model)
    leaves, deltas = by_hand(row, plain, model, numbers)
    weight = row.unreadable(plain.inner) if row.unreadable else None
    for training in (True, False):
        mode = "training" if training else "evaluation"
        inputs = inputs_of(row, True)
        want = call_plain(row, plain.train(training), deltas, inputs, weight)
        wanted = [*leaves.values(), *(t for t in inputs if t.requires_grad)]
        want_grads = torch.autograd.grad(loss_of(want), wanted, retain_graph=True)
        inputs = inputs_of(row, True)
        with clause(f"in {mode} the output is that of W0 + a dense ΔW"):
            got = model.train(training)(*inputs)
            assert close(got, want, row)
        asked = [*numbers.values(), *(t for t in inputs if t.requires_grad)]
        names = [*numbers, *(f"input {i}" for i, t in enumerate(inputs) if t.requires_grad)]
        with clause(f"in {mode} the gradients are those that autograd gives to a dense ΔW"):
            loss_of(got).backward()
            for name, tensor, want_grad in zip(names, asked, want_grads, strict=True):
                with clause(f"the gradient of {name}"):
                    assert tensor.grad.isfinite().all()
                    assert tensor.grad.count_nonzero()
                    assert close(tensor.grad.double(), want_grad.double(), row)
                tensor.grad = None
    with clause("only Λ, Γ, a trained A and the input get gradients"):
        assert not any(t.grad is not None for t in model.parameters())
    with clause("the update changes the output"):  # else the clauses above prove nothing
        assert not close(want.detach(), output, row)

    for training in (True, False):
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with clause(f"train({training}) under {context.__name__} gives the same output"):
                with context():
                    got = model.train(training)(*x).clone()
                    drift = plain.train(training)(*x) - output
                # An unreadable layer adds its update to what the plain layer returns in this mode.
                assert close(got - drift if row.unreadable else got, want, row)

    model.eval(), plain.eval()
    adapted_state, plain_state = state(model), state(plain)
    with torch.no_grad():
        want = model(*x)
        duplicates = {"deepcopy": copy.deepcopy}
        if row.pickles:
            duplicates["pickle"] = lambda model: pickle.loads(pickle.dumps(model))
        copies = {name: duplicate(model) for name, duplicate in duplicates.items()}
        for name, copied in copies.items():
            with clause(f"a {name} computes the same and is of the same classes"):
                assert torch.equal(copied(*x), want)
                assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]

        with clause("another model that loads the state computes the same"):
            other = inject(row, make(row).eval())
            if row.dtype == torch.float64:
                other.double()
            if row.loads:
                other.load_state_dict(model.state_dict())
                assert torch.equal(other(*x), want)

        before = plain(*x)
        with clause("disabled the output is the plain one's to the bit"), randlora.disabled(model):
            assert torch.equal(model(*x), before)
        if row.unreadable:
            with clause("what cannot be read cannot be merged"):
                with pytest.raises(TypeError, match="cannot be merged"):
                    randlora.merge(model)
                with pytest.raises(TypeError, match="cannot be merged"):
                    randlora.unload(model, merge=True)
        else:
            for times in ("once", "twice"):
                with clause(f"merged {times} the output is the same"):
                    merged = randlora.merge(model)(*x)
                    assert close(merged, want, row)
                about = f"merged {times} and disabled the output is the plain one's to the bit"
                with clause(about), randlora.disabled(model):
                    assert torch.equal(model(*x), before)
            with clause("merging changes no state"):
                assert same_state(state(model), adapted_state)
            with clause("unload(merge=True) gives a plain module of the merged output"):
                folded = randlora.unload(copy.deepcopy(model), merge=True)
                assert [type(m) for m in folded.modules()] == classes
                assert torch.equal(folded(*x), merged)
            with clause("unmerge gives back the state"):
                randlora.unmerge(model)
                assert same_state(state(model), adapted_state)
        with clause("disabled, merged and unmerged the output is to the bit what it was"):
            assert torch.equal(model(*x), want)

        with clause("unload gives back the classes, and nothing of an adapter is left"):
            assert randlora.unload(model) is model
            assert [type(m) for m in model.modules()] == classes
            assert not any(
                isinstance(m, AdaptedModule) or "_randlora" in vars(m) for m in model.modules()
            )
        with clause("unloaded the output is the plain one's to the bit"):
            assert torch.equal(model(*x), before)
        with clause("unloaded the state is the plain one's to the bit"):
            assert same_state(state(model), state(plain))
            assert row.unreadable or same_state(state(plain), plain_state)
        if row.pickles:
            with clause("unloaded it is pickled as the plain one is"):
                assert torch.equal(pickle.loads(pickle.dumps(model))(*x), plain(*x))
