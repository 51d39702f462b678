"""The evidence is gathered as it says: equal counts, equal starts, rates chosen on a seed apart."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.support.benchmarks import imported

with (
    imported("methods") as methods,
    imported("protocol") as protocol,
    imported("runs") as runs,
    imported("training") as training,
):
    pass

SHAPES = [(24, 40), (40, 24), (24, 24)]  # as in a transformer: wide, tall, square
NAMES = [name for name in methods.METHODS if name not in ("head", "prompt")]


def chain():
    """Linear layers of these shapes, and a head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 40), nn.Tanh())
    model.append(nn.Linear(40, 24)).append(nn.Linear(24, 24))
    model.add_module("head", nn.Linear(24, 3))
    return model


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_what_it_says_and_starts_at_the_model(name):
    model = chain()
    x = torch.randn(5, 40)
    with torch.no_grad():
        before = model(x)
    shapes = list(methods.layers(model).values())
    size = methods.size_for(name, shapes, rank=6)
    methods.adapt(model, name, size, seed=1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == methods.total(name, shapes, size)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)  # W0 + 0, in another order
    model(x).square().sum().backward()
    assert any(p.grad.abs().max() > 0 for p in parameters)


def test_layers_of_nola_share_their_matrices_under_autocast_too():
    layers = [nn.Linear(12, 12, bias=False) for _ in range(2)]
    for layer in layers:
        update = methods.NoLA(layer.weight, 8, torch.Generator().manual_seed(0))
        parametrize.register_parametrization(layer, "weight", update)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        for layer in layers:
            layer(torch.ones(1, 12))
    large = {t.untyped_storage().data_ptr(): t for t in kept if t.numel() == 8 * 12 * 16}
    assert [t.dtype for t in large.values()] == [torch.bfloat16] * 2


SIZED = [n for n in NAMES if methods.METHODS[n].fixed is None]


@pytest.mark.parametrize(
    ("name", "rank"), [("isometric", 4), *((n, rank) for n in SIZED for rank in (16, 64))]
)
def test_sizes_give_the_count_of_lora_to_a_twentieth(name, rank):
    """For the layers of MiniLM, at the counts that are compared."""
    shapes = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
    count = methods.total(name, shapes, methods.size_for(name, shapes, rank))
    assert count == pytest.approx(methods.total("lora", shapes, rank), rel=0.05)


class Rows(dict):
    """Rows of runs, as if they had been performed."""

    def add(self, run, validation, test=0.0):
        self[run] = {"validation": str(validation), "test": str(test)}


POINT = protocol.Run("task", "lora", 4, 0.0)
FIRST, SECOND = protocol.PILOTS
COARSE = {3e-4: 0.1, 1e-3: 0.4, 3e-3: 0.3, 1e-2: math.nan}
HALVES = {5e-4: 0.3, 2e-3: 0.5}


def piloted(first, second=None):
    rows = Rows()
    for seed, scores in ((FIRST, first), (SECOND, second or {})):
        for rate, score in scores.items():
            rows.add(replace(POINT, rate=rate, seed=seed), score)
    return rows


@pytest.mark.parametrize(
    ("first", "second", "lacking"),
    [
        ({}, {}, {(rate, FIRST) for rate in protocol.RATES}),
        ({3e-4: 0.1, 1e-3: 0.2}, {}, {(3e-3, FIRST), (1e-2, FIRST)}),
        ({3e-4: 0.1, 1e-3: 0.2, 3e-3: 0.3, 1e-2: 0.4}, {}, {(3e-2, FIRST)}),
        ({3e-4: 0.4, 1e-3: 0.2, 3e-3: 0.3, 1e-2: 0.1}, {}, {(1e-4, FIRST)}),
        # What has learned nothing has its best anywhere.
        ({3e-4: 0.01, 1e-3: 0.02, 3e-3: 0.01, 1e-2: 0.0}, {}, {(1e-4, FIRST), (3e-2, FIRST)}),
        (COARSE, {}, {(5e-4, FIRST), (2e-3, FIRST)}),
        (COARSE | HALVES, {}, {(1e-3, SECOND), (2e-3, SECOND), (3e-3, SECOND)}),
        # The second seed moves the best to an edge of what both have.
        (COARSE | HALVES, {1e-3: 0.4, 2e-3: 0.0, 3e-3: 0.1}, {(5e-4, SECOND)}),
    ],
    ids=["none", "some", "largest", "least", "nothing learned", "inside", "halves", "edge"],
)
def test_pilots_surround_the_best_rate(first, second, lacking):
    missing, rate = protocol.choose(piloted(first, second), POINT, floor=0.05)
    assert rate is None
    assert {(run.rate, run.seed) for run in missing} == lacking


def test_the_rate_is_the_best_of_two_seeds_and_the_others_are_reported():
    # The first seed's best collapses.
    rows = piloted(COARSE | HALVES, {5e-4: 0.2, 1e-3: 0.4, 2e-3: 0.0, 3e-3: 0.1})
    assert protocol.choose(rows, POINT) == ([], 1e-3)
    assert protocol.found(rows, POINT, range(2)) is None
    for seed in range(2):
        rows.add(replace(POINT, rate=1e-3, seed=seed), 0.9, test=seed)
        rows.add(replace(POINT, rate=2e-3, seed=seed), 0.9, test=10.0)
    found = protocol.found(rows, POINT, range(2))
    assert found.rate == 1e-3
    assert found.values() == {0: 0, 1: 1}


def test_what_is_kept_is_compared_where_as_much_is_learned():
    curve = [
        protocol.Found(POINT, rate, {0: {"test": test, "kept": kept}})
        for rate, test, kept in [(1e-3, "0.5", "0.9"), (2e-3, "0.7", "0.5"), (3e-3, "0.6", "0.1")]
    ]
    assert protocol.kept_at(0.4, curve, 0) == 0.9
    assert protocol.kept_at(0.6, curve, 0) == pytest.approx(0.7)  # not where it falls again
    assert protocol.kept_at(0.7, curve, 0) == 0.5
    assert math.isnan(protocol.kept_at(0.8, curve, 0))


@pytest.mark.parametrize(
    ("rate", "head", "moved"), [(0.0, 0.1, {"head"}), (0.1, 0.0, {"0", "head"})]
)
def test_a_head_has_a_rate_of_its_own_or_that_of_the_method(rate, head, moved):
    model = nn.Sequential(nn.Linear(3, 3))
    model.add_module("head", nn.Linear(3, 2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    training.train(model, (model(x).square().sum() for _ in range(3)), 3, rate, head)
    after = dict(model.named_parameters())
    assert {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])} == moved


def test_a_rate_for_a_head_that_is_not_there_is_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="found none"):
        training.train(model, iter(()), 3, 0.1, head=0.1)


def test_an_interval_is_students():
    """Of 1, 2, 3, 4, 5: mean 3, error √(2.5 / 5), quantile 2.776 for 4 degrees of freedom."""
    mean, half = protocol.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * math.sqrt(0.5))
    assert all(map(math.isnan, protocol.interval([1.0, math.nan])))


@dataclass(frozen=True)
class Small:
    """A run that a process of its own can unpickle."""

    size: int = 1
    exact: bool = False


def square(run, device):
    if run.size < 0:
        raise ValueError(run.size)
    return {"square": run.size**2}


def test_runs_go_on_where_they_stopped(tmp_path):
    path = tmp_path / "rows.csv"
    wanted = [Small(1), Small(2), Small(2, exact=True)]

    def perform(count):
        return runs.perform_all(lambda rows: wanted[:count], Small, square, ["square"], path)

    assert len(perform(2)) == 2
    assert len(perform(3)) == 3
    rows = runs.read(path, Small)
    assert [rows[run]["square"] for run in wanted] == ["1", "4", "4"]
    assert len(path.read_text().splitlines()) == 4  # a header, and each run once


def test_rows_are_not_added_under_other_columns(tmp_path):
    """A file from before a field was added can be read, and must be given the column first."""
    path = tmp_path / "rows.csv"
    path.write_text(text := "size,square\n3,9\n")
    assert runs.read(path, Small)[Small(3)]["square"] == "9"
    with pytest.raises(ValueError, match="must have the columns"):
        runs.perform_all(lambda rows: [Small(2)], Small, square, ["square"], path)
    assert path.read_text() == text


def test_a_run_that_fails_does_not_stop_the_others_and_a_cut_line_is_written_anew(tmp_path):
    path = tmp_path / "rows.csv"

    def perform(wanted):
        return runs.perform_all(lambda rows: wanted, Small, square, ["square"], path)

    with pytest.raises(ValueError, match="-1"):
        perform([Small(-1), Small(2), Small(11)])
    text = path.read_text()
    assert sorted(text.splitlines()[1:]) == ["11,False,121", "2,False,4"]
    path.write_text(text[:-2])
    assert len(runs.read(path, Small)) == 1
    assert len(perform([Small(2), Small(11)])) == 2
    assert sorted(path.read_text().splitlines()) == sorted(text.splitlines())
