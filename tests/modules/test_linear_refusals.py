"""Errors of ``RandLoRALinear``: bad arguments, layers and inputs."""

import math

import pytest
import torch
from torch import nn

from randlora import RandLoRALinear


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": -3}, ValueError, "rank must be at least 1, got -3"),
        ({"rank": 13}, ValueError, r"rank must be at most min\(.*\) = 12 .* got 13"),
        ({"rank": 4.0}, TypeError, "rank must be an integer, got 4.0 of type float"),
        ({"rank": True}, TypeError, "rank must be an integer, got True"),
        ({"rank": "4"}, TypeError, "rank must be an integer, got '4'"),
        ({"rank": 4, "alpha": math.nan}, ValueError, "alpha must be finite, got nan"),
        ({"rank": 4, "alpha": math.inf}, ValueError, "alpha must be finite, got inf"),
        ({"rank": 4, "alpha": "8"}, TypeError, "alpha must be a number, got '8'"),
        ({"rank": 4, "dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1"),
        ({"rank": 4, "dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
        ({"rank": 4, "dropout": math.nan}, ValueError, "dropout must be finite, got nan"),
        ({"rank": 4, "num_bases": 0}, ValueError, "num_bases must be at least 1, got 0"),
        ({"rank": 4, "num_bases": 4}, ValueError, r"num_bases must be at most ceil\(12 / 4\) = 3"),
        ({"rank": 4, "num_bases": 1.5}, TypeError, "num_bases must be an integer, got 1.5"),
        ({"rank": 4, "bank": "dense"}, TypeError, "bank must be a BasisBank, got str"),
        ({"rank": 4, "train_a": 1}, TypeError, "train_a must be True or False, got 1"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_changed(keywords, error, message):
    linear = nn.Linear(12, 20)
    with pytest.raises(error, match=message):
        RandLoRALinear(12, 20, **keywords)
    with pytest.raises(error, match=message):
        RandLoRALinear.from_linear(linear, **keywords)
    assert linear.weight.requires_grad


class Planned(nn.Linear):
    def plan(self):
        return "mine"


def with_scaling():
    linear = nn.Linear(12, 20)
    linear.scaling = 3.0
    return linear


def with_buffer():
    linear = nn.Linear(12, 20)
    linear.register_buffer("randlora_lambda", torch.zeros(3))
    return linear


def with_forward(linear):
    linear.forward = linear.forward
    return linear


def quantised():
    linear = nn.Linear(12, 20)
    linear.weight = nn.Parameter(torch.zeros(20, 12, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv1d(3, 4, 1), "must be an nn.Linear, got Conv1d"),
        (lambda: nn.Bilinear(3, 4, 5), "must be an nn.Linear, got Bilinear"),
        (lambda: RandLoRALinear(3, 4, rank=1), "RandLoRALinear is adapted already"),
        (lambda: nn.Linear(0, 4), "Linear has an empty weight"),
        (with_buffer, "linear has an attribute 'randlora_lambda', which the update would need"),
        (with_scaling, "Linear has an attribute 'scaling' of its own"),
        (lambda: Planned(3, 4), "Planned has an attribute 'plan' of its own"),
        (lambda: with_forward(nn.Linear(3, 4)), "its forward is bound to it"),
        (lambda: nn.LazyLinear(4), "LazyLinear is lazy: its sizes are unknown until it is run"),
        (quantised, "Linear has a weight of torch.int8, but must have one of float64"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
            "ParametrizedLinear computes its weight",
        ),
    ],
)
def test_what_is_no_plain_linear_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        RandLoRALinear.from_linear(make(), rank=1)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 11), ValueError, r"x must have shape \(\.\.\., 12\), got \(3, 11\)"),
        (torch.zeros(()), ValueError, r"x must have shape \(\.\.\., 12\), got \(\)"),
        (torch.zeros(3, 12).long(), TypeError, "x must be a tensor of torch.float32, got .*int64"),
        (torch.zeros(3, 12).double(), TypeError, "x must be a tensor of .*32, got torch.float64"),
        ([0.0] * 12, TypeError, "x must be a tensor, got list"),
    ],
)
def test_bad_inputs_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        RandLoRALinear(12, 20, rank=4)(x)
    with pytest.raises(error, match=message):
        RandLoRALinear(12, 20, rank=4, dropout=0.5)(x)
