import math

import pytest
import torch
from torch import nn

from randlora import diagnostics, inject, rank_report, summary
from randlora.planning import Choice


def model():
    torch.manual_seed(0)
    body = {"up": nn.Linear(8, 20), "down": nn.Linear(20, 8), "head": nn.Linear(8, 3)}
    return inject(nn.ModuleDict(body), rank=3)


def set_delta(monkeypatch, layer, delta):
    def read(module, adapter, dtype):
        return delta if module is layer else torch.zeros(8, 20, dtype=dtype)

    monkeypatch.setattr(diagnostics, "delta", read)


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


def test_summary_prints_a_table():
    assert str(summary(model())) == (
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
    """A spectrum over ten decades: float32 would lose its end, even where all is stored in it."""
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
