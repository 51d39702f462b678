"""``BasisBank``: its recipe, the arguments that it refuses, copies and pickles."""

import copy
import pickle

import pytest
import torch

from randlora import BasisBank


def test_copies_share_and_pickles_hold_only_the_recipe():
    bank = BasisBank("sparse", seed=9, sparsity=4)
    bank.store(torch.device("cpu"), torch.float32).operands(2, 100, 1000, 100)
    assert copy.deepcopy([bank, bank])[0] is bank
    data = pickle.dumps([bank, bank])
    assert len(data) < 1000
    first, second = pickle.loads(data)
    assert first is second
    assert repr(first) == repr(bank) == "BasisBank('sparse', seed=9, sparsity=4)"
    assert torch.equal(first.b(9, 9), bank.b(9, 9))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"kind": "gaussian"}, ValueError, "kind must be one of dense, .* got 'gaussian'"),
        ({"kind": 3}, TypeError, "kind must be a string, got 3 of type int"),
        ({"kind": "sparse", "sparsity": 1.9}, ValueError, r"sparsity must be in \[2, .* got 1.9"),
        ({"kind": "sparse", "sparsity": float("inf")}, ValueError, "sparsity must be finite"),
        ({"kind": "sparse", "sparsity": float("nan")}, ValueError, "sparsity must be finite"),
        ({"kind": "sparse", "sparsity": 10**400}, ValueError, "sparsity must be one finite number"),
        ({"kind": "sparse", "sparsity": "6"}, TypeError, "sparsity must be a number, got '6'"),
        ({"kind": "dense", "sparsity": 6}, ValueError, "sparsity=6 .* 'dense' has none"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got 1.0 of type float"),
        ({"seed": True}, TypeError, "seed must be an integer, got True of type bool"),
    ],
)
def test_bad_recipes_are_refused(keywords, error, message):
    with pytest.raises(error, match=message):
        BasisBank(**keywords)


def test_bad_sizes_are_refused():
    bank = BasisBank()
    with pytest.raises(ValueError, match=r"q must be at least 1, got 0"):
        bank.b(0, 4)
    with pytest.raises(TypeError, match=r"p must be an integer, got 2\.5"):
        bank.a(1, 2.5)
