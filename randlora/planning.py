"""Which way to bracket the three products: costs in, association out. Integers only, no torch.

For ``T`` tokens a layer needs the forward product, the gradient of its input and the gradients of
``Λ`` and ``Γ``. Each can be taken *through the weight*, by forming ``ΔW`` or ``G = dyᵀ x``, or
*through the activations*, by applying ``B`` to them (the pure bracketings of ``x (B C)ᵀ``,
``dy (B C)`` and ``Bᵀ (dyᵀ x)``). In multiply-adds beyond the frozen layer's own, with ``β_w m q p``
for ``B`` applied to a matrix of the weight's shape and ``β_a m q T`` for ``B`` applied to tokens:

    product             through the weight      through the activations
    ------------------  ----------------------  ------------------------------------------------
    forward             β_w m q p               β_a m q T + T m p
    gradient of x       β_w m q p, or 0 (kept)  β_a m q T + T m p
    gradients of Λ, Γ   T p q + β_w m q p       β_a m q T + T m p

and what is computed once serves twice: in a tall layer ``dy B``, for both gradients; in a wide one
``x B``, for the forward and the gradients of ``Λ`` and ``Γ``. ``β_w`` and ``β_a`` are 1 for a dense
basis, and what a basis says of itself for one that is cheaper to apply.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

__all__ = ["ANY_TOKENS", "AUTOMATIC", "Choice", "Plan", "Work", "choose", "cost", "kept", "plans"]

Way: TypeAlias = Literal["weight", "activations"]
WAYS: tuple[Way, Way] = ("weight", "activations")


# What a call is planned for whose tokens are not known: one of a graph for any batch.
ANY_TOKENS = 4096


@dataclass(frozen=True)
class Work:
    """One call of a layer: its sizes, what is asked for, and what applying its ``B`` costs.

    ``weight_cost`` and ``token_cost`` are ``β_w`` and ``β_a`` in thousandths. ``alone`` is whether
    there is no frozen weight, as under dropout: ``x ΔWᵀ`` then takes a product of its own.
    """

    tokens: int
    p: int
    q: int
    m: int
    wide: bool
    needs_input: bool = True
    needs_parameters: bool = True
    needs_weight: bool = False
    alone: bool = False
    weight_cost: int = 1000
    token_cost: int = 1000


@dataclass(frozen=True)
class Plan:
    """The way of each product, and what is kept for backward.

    ``keeps`` is ``"xb"`` where ``x B``, ``(T, m)``, is kept instead of ``x``, ``(T, q)``: of use in
    a wide layer alone. ``keep_weight`` is whether ``W0 + ΔW`` is kept from forward to backward.
    """

    forward: Way = "weight"
    grad_input: Way = "weight"
    grad_parameters: Way = "weight"
    keeps: Literal["x", "xb"] = "x"
    keep_weight: bool = False


@dataclass(frozen=True)
class Choice:
    """What a user fixes of a :class:`Plan`, field by field; None leaves it to the planner.

    ``keep_weight`` is False by default: it trades ``out × in`` numbers of memory for speed, for
    each layer, and None lets the planner do so.

    Raises:
        ValueError: if a value is not one of those of :class:`Plan`.
    """

    forward: Way | None = None
    grad_input: Way | None = None
    grad_parameters: Way | None = None
    keeps: Literal["x", "xb"] | None = None
    keep_weight: bool | None = False

    def __post_init__(self) -> None:
        for name in ("forward", "grad_input", "grad_parameters"):
            way = getattr(self, name)
            if way not in (None, *WAYS):
                raise ValueError(f"{name} must be one of {WAYS} or None, got {way!r}")
        if self.keeps not in (None, "x", "xb"):
            raise ValueError(f"keeps must be 'x', 'xb' or None, got {self.keeps!r}")
        if self.keep_weight not in (None, True, False):
            raise ValueError(f"keep_weight must be True, False or None, got {self.keep_weight!r}")


AUTOMATIC = Choice()


def plans(work: Work) -> list[Plan]:
    """Every plan that is possible for this work."""
    found = []
    for forward, grad_input, grad_parameters in itertools.product(WAYS, repeat=3):
        if grad_input == "activations" and not work.needs_input:
            continue  # what is not asked for has no way
        if grad_parameters == "activations" and not work.needs_parameters:
            continue
        xb = work.wide and grad_parameters == "activations" and not work.needs_weight
        kept = forward == grad_input == "weight" and work.needs_input
        for keep_weight in (False, True)[: 1 + kept]:
            for keeps in ("xb", "x") if xb else ("x",):
                found.append(Plan(forward, grad_input, grad_parameters, keeps, keep_weight))
    return found


def cost(work: Work, plan: Plan) -> int:
    """Thousandths of multiply-adds that ``plan`` takes beyond the frozen layer's own."""
    weight = work.weight_cost * work.m * work.q * work.p  # B C, or Bᵀ G
    tokens = work.token_cost * work.m * work.q * work.tokens  # x B, dy B, or back
    small = 1000 * work.tokens * work.m * work.p  # between the two sides of B, by tokens
    gradient = 1000 * work.tokens * work.p * work.q  # G, and as much as the frozen layer's own
    forward = plan.forward == "activations"
    grad_input = plan.grad_input == "activations"
    grad_parameters = plan.grad_parameters == "activations"

    total = small * (forward + grad_input + grad_parameters)
    if not forward:
        total += weight + gradient * work.alone
    if work.needs_input and not grad_input:
        total += weight * (not plan.keep_weight) + gradient * work.alone
    if work.needs_parameters and not grad_parameters:
        total += weight
    if work.needs_weight or (work.needs_parameters and not grad_parameters):
        total += gradient
    if not work.wide:  # dy B serves both gradients
        return total + tokens * (forward + (grad_input or grad_parameters))
    if plan.keeps == "xb":  # x B serves the forward and the gradients of Λ and Γ
        return total + tokens * (1 + grad_input)
    return total + tokens * (forward + grad_input + grad_parameters)


def kept(work: Work, plan: Plan) -> int:
    """How many numbers ``plan`` keeps from forward to backward, beside parameters."""
    activation = 0
    if plan.keeps == "xb":
        activation = work.m
    elif work.needs_parameters or work.needs_weight:
        activation = work.q if work.wide else work.p
    return work.tokens * activation + work.p * work.q * plan.keep_weight


@lru_cache(maxsize=4096)
def choose(work: Work, choice: Choice = AUTOMATIC) -> Plan:
    """The plan that keeps least of those ``choice`` allows that are as good as the cheapest one.

    As good means within 1/64 of the layer's whole work, the frozen layer's own included: less than
    the costs are exact to. A choice for what is not asked for, or that cannot be had with the rest
    (``x B`` in a tall layer, a weight kept that is never formed), gives way.
    """
    allowed = plans(work)
    for name in ("forward", "grad_input", "grad_parameters", "keeps", "keep_weight"):
        fixed = getattr(choice, name)
        if fixed is not None:
            allowed = [plan for plan in allowed if getattr(plan, name) == fixed] or allowed
    least = min(cost(work, plan) for plan in allowed)
    own = 1000 * work.tokens * work.p * work.q * (1 + work.needs_input) * (not work.alone)
    good = [plan for plan in allowed if 64 * (cost(work, plan) - least) <= own + least]
    best = good[0]
    for plan in good[1:]:  # one by one: a compiler that traces this knows no order of tuples
        more = kept(work, plan) - kept(work, best)
        if more < 0 or (more == 0 and cost(work, plan) < cost(work, best)):
            best = plan
    return best
