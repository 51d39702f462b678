"""``summary`` and ``rank_report``: the figures, and how they are printed."""

import math

import pytest
import torch
from torch import nn

import randlora
from randlora import Choice, inject, rank_report, summary
from randlora.model import reports
from randlora.modules import effective
from tests.support.rows import (
    Experts,
    shuffled,
)
from tests.support.small import adapted


def model(**keywords):
    torch.manual_seed(0)
    body = {"up": nn.Linear(8, 20), "down": nn.Linear(20, 8), "head": nn.Linear(8, 3)}
    return inject(nn.ModuleDict(body), rank=3, **{"basis": "dense", **keywords})


def set_delta(monkeypatch, layer, delta):
    def read(module, adapter, dtype):
        return delta if module is layer else torch.zeros(8, 20, dtype=dtype)

    monkeypatch.setattr(reports, "delta_of", read)


def test_summary_holds_the_figures():
    found = summary(model())
    assert [layer.name for layer in found.layers] == ["up", "down"]
    up = found.layers[0]
    assert (up.out_features, up.in_features, up.rank, up.num_bases) == (20, 8, 3, 3)
    assert up.trained == 3 * (3 + 8)
    assert found.trained == 2 * up.trained
    assert found.total == (8 * 20 + 20) + (20 * 8 + 8) + (8 * 3 + 3) + found.trained
    assert found.bank_bytes == 4 * (3 * 8 + 20 * 9)
    assert found.percentage == pytest.approx(100 * 66 / 441)


def test_the_numbers_of_a_trained_a_are_counted():
    found = summary(model(train_a=True))
    assert [layer.trained for layer in found.layers] == 2 * [3 * (3 + 8) + 3 * 8]
    assert found.trained == sum(layer.trained for layer in found.layers)
    assert found.bank_bytes == summary(model()).bank_bytes  # the frozen A stays


def test_summary_prints_a_table():
    assert str(summary(model(alpha=3))) == (
        "layer  out x in  rank  bases  scaling  trained\n"
        "-----  --------  ----  -----  -------  -------\n"
        "up       20 x 8     3      3        1       33\n"
        "down     8 x 20     3      3        1       33\n"
        "left out: head (output head: the last layer, called 'head')\n"
        "BasisBank('dense', seed=0): 0.00 MiB for 2 layers\n"
        "trained 66 of 441 parameters (14.97 %)"
    )


def test_summary_tells_the_plan_for_a_number_of_tokens():
    adapted = model()
    assert summary(adapted).layers[0].plan is None
    few, many = summary(adapted, tokens=2), summary(adapted, tokens=2000)
    assert few.layers[0].plan == adapted["up"].plan(2)
    assert few.layers[0].plan.forward == "activations"
    assert many.layers[1].plan.forward == "weight"
    assert "weight weight weight, keeps x" in str(many)
    adapted["down"].choice = Choice(forward="activations", keeps="xb")
    assert "activations weight activations, keeps xb" in str(summary(adapted, tokens=2000))


def test_summary_says_where_a_rank_was_lowered():
    both = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    found = summary(inject(both, rank=3))
    assert [layer.rank for layer in found.layers] == [3, 2]
    assert "2 (of 3)" in str(found)


def test_rank_report_of_a_known_spectrum(monkeypatch):
    adapted = model()
    u, _ = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    sigma = torch.tensor([4.0, 2, 2, 1, 0, 0, 0, 0], dtype=torch.float64)
    set_delta(monkeypatch, adapted["up"], u @ torch.diag(sigma) @ v)
    up, down = rank_report(adapted)
    assert up.name == "up"
    assert torch.allclose(up.singular_values, sigma, atol=1e-14)
    assert (up.rank, up.full_rank) == (4, 8)
    assert up.stable_rank == pytest.approx((16 + 4 + 4 + 1) / 16)
    shares = [4 / 9, 2 / 9, 2 / 9, 1 / 9]
    assert up.effective_rank == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))
    assert up.condition > 1e15
    assert (down.rank, down.stable_rank, down.effective_rank, down.condition) == (0, 0, 0, 0)


def test_rank_is_judged_in_float64(monkeypatch):
    """Singular values over ten decades: in float32 the smallest would be lost in rounding."""
    adapted = model()
    sigma = torch.logspace(0, -10, 8, dtype=torch.float64)
    set_delta(monkeypatch, adapted["up"], torch.eye(20, 8, dtype=torch.float64) * sigma)
    report = rank_report(adapted)
    assert report.layers[0].rank == 8
    assert report.layers[0].condition == pytest.approx(1e10, rel=1e-5)
    assert report.layers[0].singular_values.dtype == torch.float64


def test_rank_report_prints_a_table():
    lines = str(rank_report(model())).splitlines()
    assert lines[0].split() == [
        *("layer", "rank", "stable", "rank", "effective", "rank", "largest", "condition", "by")
    ]
    assert lines[2].split()[:4] == ["up", "0", "of", "8"]
    assert len(lines) == 4


def test_reports_leave_the_bank_as_it_was():
    adapted = model()
    held = adapted["up"].bank.nbytes
    rank_report(adapted)
    assert adapted["up"].bank.nbytes == held


@pytest.mark.parametrize("report", [summary, rank_report])
def test_plain_models_are_refused(report):
    with pytest.raises(ValueError, match="model must be adapted"):
        report(nn.Linear(2, 2))


@pytest.mark.parametrize("train_a", [False, True])
def test_ranks_and_tables_of_all_kinds(train_a):
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(8, 2), "c": nn.Conv1d(5, 6, 3), "x": Experts()}
    )
    inject(model, rank=4, basis="isometric", target_parameters=["up"], train_a=train_a)
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
    reports = {layer.name: layer for layer in rank_report(model)}
    for name, module, parameter in (
        ("x.up[1]", model["x"], "up"),
        ("a.in_proj_weight", model["a"], "in_proj_weight"),
    ):
        delta = effective.delta_of(
            module, module._randlora.active_updates[parameter], torch.float64
        )
        exact = torch.linalg.svdvals(delta[1] if delta.ndim == 3 else delta)
        assert reports[name].certified
        torch.testing.assert_close(reports[name].singular_values, exact, rtol=1e-6, atol=1e-6)


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


class GateUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.ones(3, 12, 6)), nn.Parameter(torch.ones(3, 6))


def test_stacks_that_stay_frozen_are_named():
    model = nn.ModuleDict({"l": nn.Linear(6, 6), "a": GateUp(), "b": GateUp()})
    found = randlora.summary(inject(model, rank=2))
    why = "a stack of matrices, 3 x 12 x 6, which target_parameters adapts"
    assert found.left_out == {"a.gate_up": why, "b.gate_up": why}
    assert f"left out: a.gate_up ({why}), and 1 more such" in str(found)
    model = nn.ModuleDict({"l": nn.Linear(6, 6), "a": GateUp()})
    found = randlora.summary(inject(model, rank=2, target_parameters="gate_up"))
    assert not found.left_out


def test_a_rank_report_can_be_of_some_layers():
    model = inject(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), rank=2)
    (layer,) = randlora.rank_report(model, "1")
    assert layer.name == "1"
    assert [layer.name for layer in randlora.rank_report(model)] == ["0", "1"]
    with pytest.raises(ValueError, match="target_modules='2' matches no module"):
        randlora.rank_report(model, "2")
    with pytest.raises(ValueError, match="target_modules must match an adapted layer, but"):
        randlora.rank_report(model, lambda name, module: False)
