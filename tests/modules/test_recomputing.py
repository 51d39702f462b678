"""An activation checkpoint recomputes with the same adapter, or raises an error."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from randlora import adapter_parameters, disabled, inject, set_adapter
from tests.support.moving import ROWS, adapted, norms, shuffle
from tests.support.situations import close


class Embedded(nn.Module):
    """A frozen embedding before a checkpointed part, whose first layer is adapted."""

    def __init__(self):
        super().__init__()
        self.embedding, self.part = nn.Embedding(5, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, tokens, **keywords):
        x = self.embedding(tokens)
        return checkpoint(self.part, x, **keywords) if keywords else self.part(x)


def two():
    model = adapted(num_bases=1)
    inject(model, rank=2, num_bases=1, adapter="two")
    set_adapter(model, "two")
    shuffle(model)
    return set_adapter(model, "default")


@pytest.mark.parametrize("before", ["nothing", "the other"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_a_part_is_not_computed_again_with_another_adapter(reentrant, before, read):
    model = two()
    part = (lambda x: F.linear(x, model[1].weight)) if read else model
    x = ROWS.clone().requires_grad_()
    if before == "the other":  # it must not count as the adapter of this part
        set_adapter(model, "two")
        checkpoint(part, x, use_reentrant=reentrant).sum().backward()
        set_adapter(model, "default")
    y = checkpoint(part, x, use_reentrant=reentrant)
    set_adapter(model, "two")
    with pytest.raises((RuntimeError, CheckpointError), match=r"backward recomputes it|metadata"):
        y.sum().backward()
    set_adapter(model, "default")
    y = checkpoint(part, x, use_reentrant=reentrant)
    with disabled(model), pytest.raises((RuntimeError, CheckpointError), match="recomputes it"):
        y.sum().backward()
    # With the same adapter, the gradients are right.
    x.grad = None
    checkpoint(part, x, use_reentrant=reentrant).sum().backward()
    (want,) = torch.autograd.grad(part(x).sum(), x)
    assert torch.equal(x.grad, want)


def test_a_reference_without_the_adapter_does_not_disturb_a_checkpoint():
    for reentrant in (False, True):
        model = adapted()
        x = ROWS.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant)
        with disabled(model), torch.no_grad():
            reference = checkpoint(model, x, use_reentrant=reentrant)
        (y - reference).square().sum().backward()
        assert x.grad.count_nonzero()


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimiser_does_not_move_what_was_switched_off(optimiser):
    model = two()
    parameters = adapter_parameters(model)
    step = optimiser(parameters, lr=0.1).step
    model(ROWS).sum().backward()
    before = [p.detach().clone() for p in parameters]
    set_adapter(model, "two")
    step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize("names", [("1",), ("2",), ("3",)])
@pytest.mark.parametrize("other", ["another adapter", "none"])
def test_what_is_trained_in_full_is_not_computed_again_with_another_adapter(other, names):
    model = inject(norms(), 2, target_modules="0", modules_to_save=names)
    inject(model, 2, target_modules="0", modules_to_save=names, adapter="b")
    shuffle(set_adapter(model, "b"))
    part = model[int(names[0])]
    x = ROWS.clone().requires_grad_()
    set_adapter(model, "default")
    y = checkpoint(part, x, use_reentrant=False)
    if other == "none":
        with disabled(model):
            with torch.no_grad():
                checkpoint(part, x, use_reentrant=False)  # must not hide the error
            with pytest.raises(CheckpointError, match=r"metadata|different number"):
                y.sum().backward()
        return
    set_adapter(model, "b")
    with torch.no_grad():
        part(x)
    with pytest.raises(CheckpointError, match="metadata"):
        y.sum().backward()
    checkpoint(part, x, use_reentrant=False).add_(1).sum().backward()
    (want,) = torch.autograd.grad(part(x).sum(), x)
    assert torch.equal(x.grad, want)


def test_a_reentrant_checkpoint_needs_an_input_that_requires_a_gradient():
    """Torch's own condition, which a frozen embedding does not meet."""
    model, tokens = adapted(Embedded().double()).double(), torch.arange(4)
    parameters = adapter_parameters(model)
    want = torch.autograd.grad(model(tokens).sum(), parameters)
    y = model(tokens, use_reentrant=False)
    assert close(torch.autograd.grad(y.sum(), parameters), want)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        assert not model(tokens, use_reentrant=True).requires_grad
    # As `enable_input_require_grads` of transformers does.
    model.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    model(tokens, use_reentrant=True).sum().backward()
    assert close([p.grad for p in parameters], want)
