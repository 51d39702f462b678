"""The method without modules: ``ΔW``, ``W0 + ΔW`` and the linear map with it, on tensors.

Shapes and the mathematics are those of :mod:`randlora.kernel`.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit._trace import TracerWarning

from randlora.kernel import EffectiveWeight, Linear
from randlora.operators import Operator
from randlora.planning import ANY_TOKENS, AUTOMATIC, Choice, Work, choose

__all__ = ["delta_weight", "effective_weight", "randlora_linear"]


def delta_weight(
    lam: Tensor, gamma: Tensor, a: Tensor, b: Operator, *, scaling: float = 1.0, wide: bool = False
) -> Tensor:
    """Return ``ΔW``, differentiable in ``Λ`` and ``Γ`` (paper, equation 4).

    Args:
        lam: ``Λ``, shape ``(n, r)``, floating.
        gamma: ``Γ``, shape ``(n, p)``, in the dtype of ``lam``.
        a: ``A``, shape ``(r, p)``; its dtype is the one computed in and returned.
        b: ``B``, an operator of shape ``(q, n·r)``.
        scaling: the factor of the update.
        wide: whether ``out < in``.

    Returns:
        Shape ``(q, p)``, or ``(p, q)`` if wide: always ``out × in``.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    with _sizes_as_numbers():
        _check_shapes(lam, gamma, a, b)
        delta: Tensor = _run(EffectiveWeight, None, lam, gamma, a, b, scaling, wide, 0)
    return delta


def effective_weight(
    weight: Tensor,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    *,
    scaling: float = 1.0,
    wide: bool | None = None,
    token: int = 0,
) -> Tensor:
    """Return ``W0 + ΔW``, shape ``(out, in)``, differentiable in ``W0``, ``Λ`` and ``Γ``.

    Arguments and errors are those of :func:`randlora_linear`; ``wide``, by default whether ``out <
    in``, is whether ``ΔW`` is ``(B C)ᵀ``. In low precision the sum is rounded once.
    """
    with _sizes_as_numbers():
        _check_shapes(lam, gamma, a, b)
        _check_weight(weight, gamma, b)
        wide = weight.shape[0] < weight.shape[1] if wide is None else wide
        w: Tensor = _run(EffectiveWeight, weight, lam, gamma, a, b, scaling, wide, token)
    return w


def randlora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    *,
    scaling: float = 1.0,
    choice: Choice = AUTOMATIC,
    token: int = 0,
) -> Tensor:
    """Return ``x (W0 + ΔW)ᵀ + bias``, differentiable in every tensor but the bases.

    Without a weight it is the update alone, ``x ΔWᵀ``. Backward keeps one activation, ``x`` or
    ``x B``, beside ``Λ``, ``Γ`` and the weight by reference.

    Args:
        x: shape ``(..., in)`` with any number of leading dimensions, floating.
        weight: ``W0``, shape ``(out, in)``, in the dtype of ``x``, or higher under autocast; or
            None.
        bias: shape ``(out,)``, or None.
        lam: ``Λ``, shape ``(n, r)``; commonly float32 whatever the dtype of ``x``.
        gamma: ``Γ``, shape ``(n, p)``, in the dtype of ``lam``.
        a: ``A``, shape ``(r, p)``, in the dtype of ``x``.
        b: ``B``, an operator of shape ``(q, n·r)``.
        scaling: the factor of the update.
        choice: what is fixed of the plan; the planner chooses the rest by cost.
        token: a number above 0 for what is computed with. A checkpoint that recomputes the call
            with another one raises ``torch.utils.checkpoint.CheckpointError``.

    Returns:
        Shape ``(..., out)``, in the dtype of ``x``.

    Raises:
        TypeError: if ``x`` is not in the dtype of ``a``.
        ValueError: if the shapes do not fit each other.
    """
    if not isinstance(choice, Choice):
        raise TypeError(f"choice must be a planning.Choice, got {type(choice).__name__}")
    if _tracing():
        return _traced(x, weight, bias, lam, gamma, a, b, scaling)
    _check_shapes(lam, gamma, a, b)
    p, q = a.shape[1], b.shape[0]
    if weight is None:
        if bias is not None:
            raise ValueError("bias must be None without a weight: it is not the update's")
        in_features = q if isinstance(x, Tensor) and x.ndim and x.shape[-1] == q else p
    else:
        _check_weight(weight, gamma, b)
        in_features = weight.shape[1]
    check_input(x, in_features, a.dtype)
    wide = in_features > p
    on = torch.is_grad_enabled()
    work = work_of(
        _tokens(x.numel() // in_features),
        a,
        b,
        wide,
        needs_input=on and x.requires_grad,
        needs_parameters=on and (lam.requires_grad or gamma.requires_grad),
        needs_weight=on and weight is not None and weight.requires_grad,
        alone=weight is None,
    )
    # A compiler takes no caches.
    plan = (choose.__wrapped__ if torch.compiler.is_compiling() else choose)(work, choice)
    kept = _run(Linear, x, weight, bias, lam, gamma, a, b, scaling, plan, wide, token)
    y: Tensor = kept[0]
    return y


def work_of(
    tokens: int,
    a: Tensor,
    b: Operator,
    wide: bool,
    *,
    needs_input: bool = True,
    needs_parameters: bool = True,
    needs_weight: bool = False,
    alone: bool = False,
) -> Work:
    """What the planner has to know of a call."""
    return Work(
        tokens=tokens,
        p=a.shape[1],
        q=b.shape[0],
        m=b.shape[1],
        wide=wide,
        needs_input=needs_input,
        needs_parameters=needs_parameters,
        needs_weight=needs_weight,
        alone=alone,
        weight_cost=b.weight_cost,
        token_cost=b.token_cost,
    )


def known(size: int) -> bool:
    """Whether a size is a number, and not one that a graph is to be for any value of."""
    if _tracing():
        return False
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)


def _tracing() -> bool:
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def _tokens(tokens: int) -> int:
    return tokens if known(tokens) else ANY_TOKENS


# --- traces --------------------------------------------------------------------------------------


def _run(function: Any, *arguments: Any) -> Any:
    """A trace follows no autograd function: it takes the operations its forward is made of."""
    tracing = _tracing()
    return (function.forward if tracing else function.apply)(*arguments)


def _sizes_as_numbers() -> AbstractContextManager[Any]:
    """A trace warns of sizes that are used as numbers. Those of weights are always the same."""
    if not _tracing():
        return nullcontext()
    return warnings.catch_warnings(action="ignore", category=TracerWarning, record=False)


# shape: x (..., in) -> (..., out)
def _traced(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    scaling: float,
) -> Tensor:
    """The linear map for a trace, which is to be for any number of tokens: through the weight."""
    if weight is not None:
        w = effective_weight(weight, lam, gamma, a, b, scaling=scaling)
    else:
        with _sizes_as_numbers():
            wide = bool(x.shape[-1] > a.shape[1])
        w = delta_weight(lam, gamma, a, b, scaling=scaling, wide=wide)
    return F.linear(x, w, bias)


# --- checks --------------------------------------------------------------------------------------


def check_input(x: Tensor, in_features: int, dtype: torch.dtype) -> None:
    """Raise unless ``x`` is a tensor of shape ``(..., in_features)`` and of the given dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"input x must be a tensor, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"input x must be a tensor of {dtype}, got {x.dtype}")
    if _tracing():
        return  # it would take the comparison of sizes for one of data
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"input x must have shape (..., {in_features}), got {tuple(x.shape)}")


def _check_shapes(lam: Tensor, gamma: Tensor, a: Tensor, b: Operator) -> None:
    (n, r), p, q = lam.shape, gamma.shape[1], b.shape[0]
    for name, got, needed in (
        ("gamma", gamma.shape, (n, p)),
        ("a", a.shape, (r, p)),
        ("b", b.shape, (q, n * r)),
    ):
        if tuple(got) != needed:
            raise ValueError(
                f"{name} must have shape {needed} beside lam of shape {(n, r)} and gamma of shape "
                f"{tuple(gamma.shape)}, got {tuple(got)}"
            )


def _check_weight(weight: Tensor, gamma: Tensor, b: Operator) -> None:
    (out, in_), q, p = weight.shape, b.shape[0], gamma.shape[1]
    # One by one: compilers do not look for sizes that they do not know in tuples.
    if not ((out == q and in_ == p) or (out == p and in_ == q)):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} does not fit bases for q={q} and p={p}"
        )
