"""The cost model, and the choice of how each product of a layer is computed.

A layer computes three products for ``T`` tokens: the forward, the gradient of its input, and the
gradients of ``Λ`` and ``Γ``. Each is computed *through the weight*, by forming ``ΔW`` or
``G = dyᵀ x``, or *through the activations*, by applying ``B`` to tokens. These are the two ways to
bracket ``x (B C)ᵀ``, ``dy (B C)`` and ``Bᵀ (dyᵀ x)``. The table gives the multiply-adds beyond
those of the frozen layer. ``β_w m q p`` is the cost of applying ``B`` to a matrix of the weight's
shape, and ``β_a m q T`` the cost of applying ``B`` to tokens:

    product             through the weight      through the activations
    ------------------  ----------------------  ------------------------------------------------
    forward             β_w m q p               β_a m q T + T m p
    gradient of x       β_w m q p, or 0 (kept)  β_a m q T + T m p
    gradients of Λ, Γ   T p q + β_w m q p       β_a m q T + T m p

A ``B`` of two factors can give ``P`` in halves: one factor is applied to tokens, and the other to
the ``p`` columns of what they give, which are fewer if ``p < T``. This is possible if nothing else
needs the product of ``B`` with these tokens.

A product with ``B`` that is needed twice is computed once. In a tall layer, ``dy B`` serves both
gradients. In a wide layer, ``x B`` serves the forward and the gradients of ``Λ`` and ``Γ``. ``β_w``
and ``β_a`` are 1 for a dense basis. An operator that is cheaper to apply states its own.

On an accelerator, moving numbers can take longer than multiplying them. There a product costs the
larger of its multiply-adds and of the numbers that it reads and writes, times the ``balance`` of
the machine (:mod:`randlora.core.machine`). A product with ``C`` forms it first, and one that gives
``P`` leaves it to be read. For :func:`few` tokens, neither is formed.

Costs are integers, and this module does not import torch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

__all__ = ["AUTOMATIC", "UNKNOWN_TOKENS", "WAYS", "Choice", "Plan", "Way", "Work"]
__all__ += ["choose", "cost", "few", "plans", "saved_numel"]

Way: TypeAlias = Literal["weight", "activations"]
WAYS: tuple[Way, Way] = ("weight", "activations")
FEW_FOR_GRADS = 8  # see `few`
UNKNOWN_TOKENS = 4096  # assumed if the number is unknown, as in a graph for any batch size


class Work(NamedTuple):  # one is made and hashed in each call, faster than a dataclass
    """One call of a layer: its sizes, the gradients that it needs, and the costs of its ``B``."""

    tokens: int  # T
    p: int  # min(out, in)
    q: int  # max(out, in)
    m: int  # the columns of B, n·r
    n: int  # the number of bases
    wide: bool  # whether out < in
    needs_input: bool = True  # whether the gradient of x is needed
    needs_parameters: bool = True  # whether the gradient of Λ or Γ is needed
    needs_weight: bool = False  # whether the gradient of W0 is needed
    alone: bool = False  # without a frozen weight (dropout): x ΔWᵀ is a product of its own
    weight_cost: int = 1000  # β_w in thousandths
    token_cost: int = 1000  # β_a in thousandths
    half: int = 0  # the columns between the two factors of B; 0 if it has no factors
    half_token_cost: int = 0  # of one factor with tokens, in thousandths of m q T
    half_weight_cost: int = 0  # of the other with what they give, in thousandths of m q p
    balance: int = 0  # thousandths of multiply-adds that take as long as moving a number


@dataclass(frozen=True)
class Plan:
    """How each product is computed, and what is kept for backward."""

    forward: Way = "weight"
    grad_input: Way = "weight"  # for the gradient of x
    grad_parameters: Way = "weight"  # for the gradients of Λ and Γ
    keeps: Literal["x", "xb"] = "x"  # xb, in wide layers only: x B, (T, m), instead of x, (T, q)
    keep_weight: bool = False  # whether W0 + ΔW is kept from forward to backward
    halves: bool = False  # whether P is computed in halves; with xb, one half of x B is kept


@dataclass(frozen=True)
class Choice:
    """The fields of a :class:`Plan` that a user fixes. None leaves a field to the planner.

    ``keep_weight`` is False by default: keeping ``W0 + ΔW`` saves time, but takes ``out × in``
    numbers of memory for each layer.

    Raises:
        ValueError: if a field has a value that :class:`Plan` does not allow.
    """

    forward: Way | None = None
    grad_input: Way | None = None
    grad_parameters: Way | None = None
    keeps: Literal["x", "xb"] | None = None
    keep_weight: bool | None = False
    halves: bool | None = None

    def __post_init__(self) -> None:
        for name in ("forward", "grad_input", "grad_parameters"):
            way = getattr(self, name)
            if way not in (None, *WAYS):
                raise ValueError(f"{name} must be one of {WAYS} or None, got {way!r}")
        if self.keeps not in (None, "x", "xb"):
            raise ValueError(f"keeps must be 'x', 'xb' or None, got {self.keeps!r}")
        for name in ("keep_weight", "halves"):
            value = getattr(self, name)
            if value not in (None, True, False):
                raise ValueError(f"{name} must be True, False or None, got {value!r}")


AUTOMATIC = Choice()


def few(tokens: int, n: int, times: int = 2) -> bool:
    """Whether tokens are so few that products with ``C`` are faster without it, from ``A ∘ x``.

    It has ``T r p`` numbers, ``C`` has ``n r p``. Without ``C`` the products are smaller, so their
    rate is lower; measured on two cores (``benchmarks/README.md``). The gradients of ``Λ`` and
    ``Γ`` take two products instead of one without ``P``, so for them ``times`` is
    :data:`FEW_FOR_GRADS`.
    """
    return times * tokens <= min(n, 64)


def plans(work: Work) -> list[Plan]:
    """All plans that are possible for ``work``."""
    found = []
    for forward, grad_input, grad_parameters in itertools.product(WAYS, repeat=3):
        if grad_input == "activations" and not work.needs_input:
            continue  # a gradient that is not needed is listed once, as "weight"
        if grad_parameters == "activations" and not work.needs_parameters:
            continue
        can_keep_xb = work.wide and grad_parameters == "activations" and not work.needs_weight
        can_keep_weight = forward == grad_input == "weight" and work.needs_input
        for keep_weight in (False, True)[: 1 + can_keep_weight]:
            for keeps in ("xb", "x") if can_keep_xb else ("x",):
                shared = forward == "activations" and keeps == "xb"  # x B
                if not work.wide:
                    shared = grad_input == "activations"  # dy B
                can_halve = work.half and grad_parameters == "activations" and not shared
                for halves in (False, True)[: 1 + bool(can_halve)]:
                    ways = forward, grad_input, grad_parameters
                    found.append(Plan(*ways, keeps, keep_weight, halves))
    return found


def cost(work: Work, plan: Plan) -> int:
    """The cost of ``plan`` beyond the frozen layer's own, in thousandths of multiply-adds.

    Of those multiply-adds that take as long, on a machine where moving numbers counts.
    """
    t, p, q, m = work.tokens, work.p, work.q, work.m

    def price(macs: int, moved: int) -> int:
        return max(macs, work.balance * moved)

    between = 2 * work.half  # written and read between two factors
    add_weight = price(work.weight_cost * m * q * p, p * (2 * m + 2 * q + between))  # B C
    weight = price(work.weight_cost * m * q * p, p * (2 * m + q + between))  # Bᵀ G
    tokens = price(work.token_cost * m * q * t, t * (q + m + between))  # x B, dy B, or h Bᵀ
    with_c = price(1000 * t * m * p, t * (m + p) + 2 * m * p)  # with C, or P from tokens
    without = price(1000 * t * m * p, t * (m + p) + 2 * t * (m // work.n) * p + work.n * p)
    product = without if few(t, work.n) else with_c
    gradients = 2 * without if few(t, work.n, FEW_FOR_GRADS) else with_c
    for_p = tokens
    if plan.halves:
        h = work.half
        for_p = price(work.half_token_cost * m * q * t, t * (q + h))
        gradients = price(1000 * t * h * p, t * (h + p) + h * p)
        gradients += price(work.half_weight_cost * m * q * p, p * (h + 2 * m))
    # G; as much as a product of the frozen layer
    gradient = price(1000 * t * p * q, t * (p + q) + p * q)
    ways = plan.forward, plan.grad_input, plan.grad_parameters
    forward, grad_input, grad_parameters = [way == "activations" for way in ways]
    total = product * (forward + grad_input) + gradients * grad_parameters
    if not forward:
        total += add_weight + gradient * work.alone
    if work.needs_input and not grad_input:
        total += add_weight * (not plan.keep_weight) + gradient * work.alone
    if work.needs_parameters and not grad_parameters:
        total += weight
    if work.needs_weight or (work.needs_parameters and not grad_parameters):
        total += gradient
    if not work.wide:  # dy B serves both gradients
        total += tokens * forward
        return total + (for_p if grad_parameters else tokens * grad_input)
    total += tokens * grad_input
    if plan.keeps == "xb":  # x B serves the forward and the gradients of Λ and Γ
        return total + for_p
    return total + tokens * forward + for_p * grad_parameters


def saved_numel(work: Work, plan: Plan) -> int:
    """How many numbers ``plan`` saves from forward to backward, besides parameters."""
    activation = 0
    if plan.keeps == "xb":
        activation = work.half if plan.halves else work.m
    elif work.needs_parameters or work.needs_weight:
        activation = work.q if work.wide else work.p
    return work.tokens * activation + work.p * work.q * plan.keep_weight


@lru_cache(maxsize=4096)
def choose(work: Work, choice: Choice = AUTOMATIC) -> Plan:
    """Among the allowed plans near the cheapest, the one that saves the least for backward.

    Near means within 1/64 of the whole work of the layer, including the frozen layer's own. The
    costs are not exact enough to tell such plans apart. A field of ``choice`` has no effect if it
    concerns a gradient that is not needed, or if no plan has it together with the fields before it
    (``x B`` kept in a tall layer, or a weight kept that is never formed).
    """
    allowed = plans(work)
    for name in ("forward", "grad_input", "grad_parameters", "keeps", "keep_weight", "halves"):
        fixed = getattr(choice, name)
        if fixed is not None:
            allowed = [plan for plan in allowed if getattr(plan, name) == fixed] or allowed
    least = min(cost(work, plan) for plan in allowed)
    t, p, q = work.tokens, work.p, work.q
    frozen = max(1000 * t * p * q, work.balance * (t * (p + q) + p * q))
    frozen *= (1 + work.needs_input) * (not work.alone)
    good = [plan for plan in allowed if 64 * (cost(work, plan) - least) <= frozen + least]
    best = good[0]
    for plan in good[1:]:  # not min() of tuples: torch.compile traces this and cannot order them
        more = saved_numel(work, plan) - saved_numel(work, best)
        if more < 0 or (more == 0 and cost(work, plan) < cost(work, best)):
            best = plan
    return best
