"""Averages of the weights of adapted models: ``torch.optim.swa_utils``, and an EMA by hand."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

import randlora
from randlora import adapter_parameters, disabled, inject, load_adapter, save_adapter
from tests.support.moving import ROWS, adapted, norms, same
from tests.support.situations import close, input_of, make, rows, trained

MULTI = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}


class ByData(torch.nn.Module):
    """An EMA as it is often written by hand."""

    def __init__(self, model):
        super().__init__()
        self.module, self.steps = copy.deepcopy(model), 0

    def forward(self, x):
        return self.module(x)

    def update_parameters(self, model):
        decay = 0.9 if self.steps else 0.0
        for mean, parameter in zip(self.module.parameters(), model.parameters(), strict=True):
            mean.data.mul_(decay).add_(parameter.data, alpha=1 - decay)
        self.steps += 1


AVERAGES = {  # and the share of the old average in the new one, by the number of steps before
    "mean": (AveragedModel, lambda steps: steps / (steps + 1)),
    "ema": (lambda model: AveragedModel(model, **MULTI), lambda steps: 0.9),
    "ema, one by one": (
        lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9)),
        lambda steps: 0.9,
    ),
    "ema by data": (ByData, lambda steps: 0.9),
}


@pytest.mark.parametrize(("make_average", "share"), AVERAGES.values(), ids=AVERAGES)
@rows
def test_the_average_computes_with_the_averaged_numbers(row, make_average, share):
    plain, model = make(row)
    trained(model.double())  # averages are rounded
    x, parameters = input_of(row), adapter_parameters(model)
    average, want = make_average(model), []
    average(x)  # what an earlier call computed must not count
    for step in range(3):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter) / 8)
        average.update_parameters(model)
        new, kept = [p.detach().clone() for p in parameters], share(step) if step else 0.0
        want = [kept * w + (1 - kept) * n for w, n in zip(want or new, new, strict=True)]
    with torch.no_grad():
        for parameter, value in zip(parameters, want, strict=True):
            parameter.copy_(value)
        assert close([average(x)], [model(x)])
        with disabled(average):
            assert close([average(x)], [plain(x)])


def moved(base, **keywords):
    """An adapted model, and a step of training, which moves the statistics of its BatchNorm."""
    model = adapted(base, modules_to_save="3")

    def step():
        with torch.no_grad():
            model.train()(3 + 2 * ROWS)
            for parameter in adapter_parameters(model):
                parameter.add_(torch.randn_like(parameter) / 8)
        return model.eval()

    return model, step


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_is_saved_loaded_and_disabled_as_the_adapter_is(use_buffers, tmp_path):
    base = norms()
    before = base(ROWS)
    model, step = moved(copy.deepcopy(base))
    average = AveragedModel(model, **MULTI, use_buffers=use_buffers)
    means = []
    for _ in range(3):
        average.update_parameters(step())
        means.append(model[2].running_mean.clone())
    want = means[-1]
    if use_buffers:  # else those of the last step are copied
        want = torch.lerp(torch.lerp(means[0], means[1], 1 - 0.9), means[2], 1 - 0.9)
    torch.testing.assert_close(average.module[2].running_mean, want)
    # Averaging equal frozen numbers changes no bit of them.
    with disabled(average):
        assert torch.equal(average(ROWS), before)
    save_adapter(average, tmp_path / "average.pt")
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "average.pt")
    assert torch.equal(loaded.eval()(ROWS), average(ROWS))
    state = randlora.unload(copy.deepcopy(average)).module.state_dict()
    assert same(state, base.state_dict())


def test_statistics_are_computed_anew_for_the_average():
    base = norms()
    before = base(ROWS)
    model, step = moved(copy.deepcopy(base))
    average = AveragedModel(step())
    average.update_parameters(model)
    update_bn([ROWS], average)
    inputs = model[:2](ROWS)
    torch.testing.assert_close(average.module[2].running_mean, inputs.mean(0))
    with disabled(average):
        assert torch.equal(average.eval()(ROWS), before)


def test_a_merged_average_is_merged_again_by_merge_alone():
    model = randlora.merge(inject(norms(), 2))
    average = AveragedModel(model, **MULTI)
    before = average(ROWS)
    for parameter in adapter_parameters(model):
        torch.nn.init.normal_(parameter)
    average.update_parameters(model)
    assert torch.equal(average(ROWS), before)
    merged = randlora.merge(average)(ROWS)
    assert not torch.allclose(merged, before)
    torch.testing.assert_close(randlora.unmerge(average)(ROWS), merged)
