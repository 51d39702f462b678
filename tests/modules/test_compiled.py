"""Whole models under ``torch.compile`` and ``torch.export``: graphs, FLOPs, changes of state.

Single modules are in ``test_graphs.py``.
"""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import randlora
from randlora import BasisBank, Choice, disabled, inject, merge, set_adapter, unload, unmerge
from randlora.core.gather import GatherOperator
from tests.support.clauses import clause
from tests.support.situations import close, trained
from tests.support.transformer import Model

pytestmark = [  # warnings of torch itself
    pytest.mark.filterwarnings("ignore:.*jit.script.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]


# --- graphs --------------------------------------------------------------------------------------


def counted(graphs):
    """``aot_eager``, which counts its graphs."""
    compile_graph = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return compile_graph(graph, inputs)

    return backend


def transformer(depth=2, **keywords):
    torch.manual_seed(0)
    model = Model(depth=depth).double()
    return trained(inject(model, **{"rank": 4, "target_modules": "blocks", **keywords}))


def tokens(batch, length):
    return torch.arange(batch * length).reshape(batch, length) % 30


def results(call, model, x):
    """The output of ``call``, and the gradients of what the model trains."""
    y = call(x)
    if not y.requires_grad:
        return [y.detach()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), trainable)]


SIZES = [(batch, 4 + batch % 5) for batch in range(2, 12)]


def check_all_sizes(call, model, eager):
    for sizes in SIZES:
        x = tokens(*sizes)
        got, want = results(call, model, x), results(eager, eager, x)
        # Equal up to the order of sums. Some gradients are thousands of times larger than others.
        assert close(got, want)


def test_a_model_takes_two_graphs_for_all_sizes():
    model, graphs = transformer(), []
    compiled = torch.compile(model, backend=counted(graphs), fullgraph=True)
    check_all_sizes(compiled, model, model)
    assert len(graphs) <= 2


def test_blocks_share_their_graphs():
    """Two graphs for the first block, whose input needs no gradient, and two for all others."""
    model, graphs = transformer(depth=3), []
    eager, backend = copy.deepcopy(model), counted(graphs)
    for block in model.blocks:
        block.compile(backend=backend, dynamic=True, fullgraph=True)
    check_all_sizes(model, model, eager)
    assert len(graphs) <= 4


VARYING = {
    "isometric": ("isometric", torch.float64, 1e-12),
    "dense": ("dense", torch.float64, 1e-12),
    # Some roundings of sums of about 30 terms. Here B is scaled by a power of two, too.
    "sparse in float16": ("sparse", torch.float16, 1e-2),
}


@pytest.mark.parametrize(("basis", "dtype", "tolerance"), VARYING.values(), ids=VARYING)
def test_numbers_that_vary_between_calls_of_the_same_code(basis, dtype, tolerance):
    """Dynamo makes symbols of numbers that were others before."""
    for d in (8, 12):
        model = nn.Sequential(nn.Linear(d, 2 * d), nn.Linear(2 * d, d)).to(dtype)
        trained(inject(model, 3, basis=basis))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        x = torch.linspace(-1, 1, 5 * d).reshape(5, d).to(dtype)
        assert close(results(compiled, model, x), results(model, model, x), tolerance)


def test_a_model_is_exported_for_any_batch_and_length():
    model = transformer().eval()
    shapes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    exported = torch.export.export(model, (tokens(3, 5),), dynamic_shapes=(shapes,)).module()
    for sizes in SIZES:
        assert close([exported(tokens(*sizes))], [model(tokens(*sizes))])


# --- multiply-adds -------------------------------------------------------------------------------


def flops(call, x, *, compiled):
    """FLOPs of a forward and a backward. Compiled code is not counted from outside."""
    counts = []

    def count(graph, _):
        def run(arguments):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                results = torch.fx.Interpreter(graph).run(*arguments)
            counts.append(counter.get_total_flops())
            return results

        run._boxed_call = True
        return run

    if compiled:
        backend = aot_autograd(fw_compiler=count, bw_compiler=count)
        torch.compile(call, backend=backend, fullgraph=True)(x).sum().backward()
        return sum(counts)
    with FlopCounterMode(display=False) as counter:
        call(x).sum().backward()
    return counter.get_total_flops()


NEEDS = {  # the gradient of the input, and of the adapter
    "all": (True, True),
    "the input's": (True, False),
    "the adapter's": (False, True),
}


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("basis", ["dense", "very_sparse", "isometric"])
def test_compiled_a_step_takes_as_many_flops(basis, needs):
    for sizes in ((192, 64), (64, 192)):  # wide, tall
        model = inject(nn.Sequential(nn.Linear(*sizes)), 8, basis=basis).double()
        for parameter in randlora.adapter_parameters(model):
            parameter.requires_grad_(needs[1])
        # Through the activations, with x B kept if wide; through the weight, which is kept.
        for count, choice in ((40, Choice()), (640, Choice(keep_weight=None))):
            model[0].choice = choice
            x = torch.ones(count, sizes[0], dtype=torch.float64, requires_grad=needs[0])
            torch._dynamo.reset()
            got, want = (flops(model, x, compiled=compiled) for compiled in (True, False))
            assert got == want


def test_compiled_few_tokens_need_no_c():
    model = inject(nn.Sequential(nn.Linear(64, 64)), 4, basis="dense").requires_grad_(False)
    n, r, p, m = 16, 4, 64, 64
    for count in (1, 2):
        x = torch.ones(count, 64, requires_grad=True)
        torch._dynamo.reset()
        got = flops(model, x, compiled=True)
        frozen, of_b, of_a = p * p, p * m, n * r * p  # and of A with x, in place of C
        assert got == 2 * 2 * count * (frozen + of_b + of_a)


# --- transforms ----------------------------------------------------------------------------------


def loss(layer):
    return lambda x: layer(x).sin().sum()


TRANSFORMS = {
    "grad": lambda layer: grad(loss(layer)),
    "grad of grad": lambda layer: grad(lambda x: grad(loss(layer))(x).square().sum()),
    "vmap of grad": lambda layer: vmap(grad(loss(layer))),
    "jvp": lambda layer: lambda x: jvp(layer, (x,), (x,))[1],
    "jvp, no_grad": lambda layer: torch.no_grad()(lambda x: jvp(layer, (x,), (x,))[1]),
}
BANKS = {  # of the second, B is applied by gathering
    "isometric": BasisBank("isometric"),
    "gathering": BasisBank("very_sparse", sparsity=50),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bank", BANKS.values(), ids=BANKS)
def test_transforms_are_those_of_the_dense_layer(bank, transform):
    for sizes in ((96, 400), (400, 96)):
        layer = randlora.RandLoRALinear(*sizes, rank=48, bank=bank).double()
        trained(layer)
        gathers = isinstance(layer.operands(torch.float64)[1], GatherOperator)
        assert gathers == (bank is BANKS["gathering"])
        dense = randlora.unload(copy.deepcopy(nn.Sequential(layer)), merge=True)
        x = torch.linspace(-1, 1, 3 * sizes[0], dtype=torch.float64).reshape(3, -1) / 20
        want = transform(dense)(x)
        assert close([transform(layer)(x)], [want])
        torch._dynamo.reset()
        assert close([torch.compile(transform(layer), backend="eager", fullgraph=True)(x)], [want])


# --- changes of state ----------------------------------------------------------------------------

TARGETS = ["0", "1"]


def network(value):
    """A planned layer, one whose weight is read, statistics, and a layer trained in full."""
    torch.manual_seed(0)
    parts = nn.Linear(8, 12), nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5), nn.Linear(12, 3)
    model = inject(nn.Sequential(*parts), 2, target_modules=TARGETS, modules_to_save="3")
    for parameter in randlora.adapter_parameters(model):
        nn.init.normal_(parameter, value)
    return model.double()


def add_second(model, folder):
    inject(model, 4, target_modules=TARGETS, modules_to_save="3", adapter="second")


def activate_second(model, folder):
    trained(set_adapter(model, "second"))


def load(model, folder, adapter="default"):
    randlora.save_adapter(network(0.3), folder / "a.pt")
    randlora.load_adapter(model, folder / "a.pt", adapter=adapter)


def choose(model, folder):
    model[0].choice = Choice("activations", "activations", "activations")


def load_third(model, folder):
    load(model, folder, "third")
    set_adapter(model, "third")


def inject_anew(model, folder):
    """Updates of the names that the first ones had, with other sizes and another scaling."""
    trained(inject(model, 4, target_modules=TARGETS, modules_to_save="3"))


CHANGES = {
    "step": lambda m, _: trained(m),
    "merge": lambda m, _: merge(m),
    "load_state_dict while merged": lambda m, _: m.load_state_dict(network(0.2).state_dict()),
    "unmerge": lambda m, _: unmerge(m),
    "add a second adapter": add_second,
    "activate it": activate_second,
    "merge it": lambda m, _: merge(m),
    "activate the first again": lambda m, _: set_adapter(unmerge(m), "default"),
    "load_adapter": load,
    "load_state_dict, assigned": lambda m, _: m.load_state_dict(
        {**m.state_dict(), **network(0.4).state_dict()}, assign=True
    ),
    "freeze": lambda m, _: m[0].randlora_gamma.requires_grad_(False),
    "choose": choose,
    "load a third adapter": load_third,
    "delete_adapter": lambda m, _: randlora.delete_adapter(m, "default"),
    "another dtype": lambda m, _: m.float(),
    "unload": lambda m, _: unload(m).double(),
    "inject anew": inject_anew,
    "unload, merged": lambda m, _: unload(m, merge=True),
}


TRAINING, EVALUATION = (True, True), (False, False)  # and whether gradients are recorded


def outcome(call, model, x, mode):
    """What a model gives, and the statistics that it moves, which are put back."""
    training, recorded = mode
    statistics = {n: t.clone() for n, t in model.train(training).named_buffers()}
    with torch.set_grad_enabled(recorded):
        try:
            found = [*results(call, model, x), *map(torch.clone, model.buffers())]
        except Exception as error:  # of torch, if traced code raises one
            found = [torch.full((), 1.0 if "is merged, so" in str(error) else torch.nan)]
    for name, buffer in model.named_buffers():
        buffer.copy_(statistics[name])
    return found


@torch._dynamo.config.patch(recompile_limit=64)
def test_compiled_code_sees_every_change_of_state(tmp_path):
    model = network(0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.linspace(-1, 1, 4 * 5 * 8, dtype=torch.float64).reshape(4, 5, 8)

    def check(mode):
        given = x.to(model[2].running_mean.dtype)
        got, want = outcome(compiled, model, given, mode), outcome(model, model, given, mode)
        # The same operations, except that compiled code overwrites no result.
        assert close(got, want, 1e-12 if given.dtype == torch.float64 else 1e-5)
        return want

    for name, change in {"nothing": lambda *_: None, **CHANGES}.items():
        change(model, tmp_path)
        for mode in (TRAINING, EVALUATION):
            with clause(f"after {name}, (training, gradients) {mode}"):
                want = check(mode)
            if name not in ("nothing", "merge", "activate it"):
                continue
            with clause(f"disabled, after {name}, (training, gradients) {mode}"):
                with disabled(model):
                    assert not close(check(mode)[:1], want[:1])
                check(mode)
