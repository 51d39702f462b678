"""RandLoRA on tensors, without modules: ``ΔW``, ``W0 + ΔW`` and the linear map with ``W0 + ΔW``.

With ``p = min(out, in)``, ``q = max(out, in)``, rank ``r`` and ``n`` bases, all functions take

    lam      ``Λ``, shape ``(n, r)``, floating, usually float32
    gamma    ``Γ``, shape ``(n, p)``, in the dtype of ``lam``
    a        ``A``, shape ``(r, p)``
    b        ``B``, an operator of shape ``(q, n·r)``
    dtype    that of the computation, of ``b`` and of the result, by default the one of ``a``; a
             trained ``a`` may be wider
    scaling  the factor of the update

The equations are in :mod:`randlora.core.kernel`.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.jit._trace import TracerWarning

from randlora.core.kernel import EffectiveWeight, Linear
from randlora.core.machine import machine_of
from randlora.core.matmul import is_static, transforming
from randlora.core.operators import Operator
from randlora.core.planning import AUTOMATIC, UNKNOWN_TOKENS, Choice, Work, choose

__all__ = ["delta_weight", "effective_weight", "randlora_linear"]


def delta_weight(
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    dtype: torch.dtype | None = None,
    *,
    scaling: float = 1.0,
    wide: bool = False,
) -> Tensor:
    """Return ``ΔW``, differentiable in ``Λ``, ``Γ`` and ``A`` (paper, equation 4).

    Returns:
        Shape ``(q, p)``, or ``(p, q)`` if ``wide``, which says that ``out < in``.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    with _sizes_as_numbers():
        dtype = _dtype_or_default(dtype, a)
        check_shapes(lam, gamma, a, b)
        delta: Tensor = _run(EffectiveWeight, None, lam, gamma, a, b, dtype, scaling, wide, 0)
    return delta


def effective_weight(
    weight: Tensor,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    dtype: torch.dtype | None = None,
    *,
    scaling: float = 1.0,
    wide: bool | None = None,
    token: int = 0,
) -> Tensor:
    """Return ``W0 + ΔW``, differentiable in ``W0``, ``Λ``, ``Γ`` and ``A``.

    In low precision the sum is rounded once.

    Args:
        weight: ``W0``, shape ``(out, in)``, in ``dtype``; under autocast it may be wider.
        wide: whether ``ΔW`` is ``(B C)ᵀ`` instead of ``B C``. By default, true if ``out < in``.
        token: see :func:`randlora_linear`.

    Returns:
        Shape ``(out, in)``, in ``dtype``.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    with _sizes_as_numbers():
        check_shapes(lam, gamma, a, b)
        dtype = _dtype_or_default(dtype, a)
        _check_weight(weight, gamma, b)
        wide = weight.shape[0] < weight.shape[1] if wide is None else wide
        w: Tensor = _run(EffectiveWeight, weight, lam, gamma, a, b, dtype, scaling, wide, token)
    return w


def randlora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    dtype: torch.dtype | None = None,
    *,
    scaling: float = 1.0,
    choice: Choice = AUTOMATIC,
    token: int = 0,
) -> Tensor:
    """Return ``x (W0 + ΔW)ᵀ + bias``, differentiable in every tensor except ``B``.

    Without a weight the result is the update alone, ``x ΔWᵀ``. For backward one activation is
    saved, ``x`` or ``x B``. ``Λ``, ``Γ``, a trained ``A`` and the weight are saved by reference.

    Args:
        x: shape ``(..., in)`` with any number of leading dimensions, in ``dtype``.
        weight: ``W0``, shape ``(out, in)``, in the dtype of ``x``, or None. Under autocast its
            dtype may be wider.
        bias: shape ``(out,)``, or None.
        choice: the fixed parts of the plan. The planner chooses the other parts by cost.
        token: a number above 0 that identifies the active adapter, or 0 for no check. An activation
            checkpoint that recomputes the call with another token raises
            ``torch.utils.checkpoint.CheckpointError``.

    Returns:
        Shape ``(..., out)``, in the dtype of ``x``.

    Raises:
        TypeError: if ``choice`` is not a :class:`Choice`, or ``x`` is not a tensor in ``dtype``.
        ValueError: if the shapes do not fit each other, or if a bias is given without a weight.
    """
    if not isinstance(choice, Choice):
        raise TypeError(f"choice must be a planning.Choice, got {type(choice).__name__}")
    dtype = _dtype_or_default(dtype, a)
    if not _tracing():
        check_shapes(lam, gamma, a, b)
        p, q = a.shape[1], b.shape[0]
        if weight is not None:
            _check_weight(weight, gamma, b)
            in_features = weight.shape[1]
        elif bias is not None:
            raise ValueError(f"bias must be None without a weight, got shape {tuple(bias.shape)}")
        else:
            in_features = q if isinstance(x, Tensor) and x.ndim and x.shape[-1] == q else p
        check_input(x, in_features, dtype)
    return checked_linear(x, weight, bias, lam, gamma, a, b, dtype, scaling, choice, token)


def checked_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    dtype: torch.dtype,
    scaling: float,
    choice: Choice,
    token: int,
) -> Tensor:
    """:func:`randlora_linear`, with arguments that are known to fit each other."""
    compiling, p = torch.compiler.is_compiling(), a.shape[1]
    if _tracing():  # through the weight, for any number of tokens
        if weight is not None:
            w = effective_weight(weight, lam, gamma, a, b, dtype, scaling=scaling)
        else:
            with _sizes_as_numbers():
                wide = bool(x.shape[-1] > p)
            w = delta_weight(lam, gamma, a, b, dtype, scaling=scaling, wide=wide)
        return F.linear(x, w, bias)
    recorded, in_features = torch.is_grad_enabled(), x.shape[-1]
    tokens, wide = x.numel() // in_features, in_features > p
    if compiling and not is_static(tokens):
        tokens = UNKNOWN_TOKENS
    work = work_of(
        tokens,
        a,
        b,
        wide,
        dtype,
        needs_input=recorded and x.requires_grad,
        needs_parameters=recorded and (lam.requires_grad or gamma.requires_grad or a.requires_grad),
        needs_weight=recorded and weight is not None and weight.requires_grad,
        alone=weight is None,
    )
    # torch.compile warns about cached functions, so it gets the function behind the cache.
    plan = (choose.__wrapped__ if compiling else choose)(work, choice)
    y: Tensor = _run(Linear, x, weight, bias, lam, gamma, a, b, scaling, plan, wide, token)[0]
    return y


def work_of(
    tokens: int,
    a: Tensor,
    b: Operator,
    wide: bool,
    dtype: torch.dtype | None = None,
    *,
    needs_input: bool = True,
    needs_parameters: bool = True,
    needs_weight: bool = False,
    alone: bool = False,
) -> Work:
    """Describe a call to the planner.

    ``dtype`` is that of the products, by default the one of ``a``. The rest are the fields of
    :class:`Work`.
    """
    (r, p), (q, m) = a.shape, b.shape
    balance = machine_of(a.device).balance
    moving = 1000 * balance.get((dtype or a.dtype).itemsize, 0) if balance else 0
    needs = needs_input, needs_parameters, needs_weight, alone
    costs = b.weight_cost, b.token_cost, b.half, b.half_token_cost, b.half_weight_cost
    return Work(tokens, p, q, m, m // r, wide, *needs, *costs, moving)


def _tracing() -> bool:
    return torch._C._get_tracing_state() is not None and not torch.compiler.is_compiling()


def _run(function: Any, *arguments: Any) -> Any:
    """Call an autograd function, or its forward alone as operations that torch differentiates.

    The latter for traces and transforms, which cannot take in a function, and if there is nothing
    to record: calling a function takes longer than a small layer.
    """
    if transforming() or _tracing():
        return function.forward(*arguments)
    if torch.compiler.is_compiling():
        # Dynamo may make a symbol of a number, and fails if it meets it within the function first.
        return function.apply(*[float(a) if isinstance(a, float) else a for a in arguments])
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    if not torch.is_grad_enabled():
        return function.forward(*arguments)
    # As `function.apply` does, which first takes the signature of `forward` apart. That takes
    # longer than a small layer, too.
    arguments = tuple(unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


def _sizes_as_numbers() -> AbstractContextManager[Any]:
    """Suppress the warnings of ``torch.jit.trace`` about sizes that are used as numbers.

    The sizes of weights and bases are the same in every call.
    """
    if not _tracing():
        return nullcontext()
    return warnings.catch_warnings(action="ignore", category=TracerWarning, record=False)


def _dtype_or_default(dtype: torch.dtype | None, a: Tensor) -> torch.dtype:
    if dtype is None:
        return a.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
    return dtype


def check_input(x: Tensor, in_features: int, dtype: torch.dtype) -> None:
    """Raise an error unless ``x`` is a tensor of shape ``(..., in_features)`` in ``dtype``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"input x must be a tensor, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"input x must be a tensor of {dtype}, got {x.dtype}")
    if _tracing():
        return  # in a trace sizes are tensors: comparing them would raise a warning
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"input x must have shape (..., {in_features}), got {tuple(x.shape)}")


def check_shapes(lam: Tensor, gamma: Tensor, a: Tensor, b: Operator) -> None:
    """Raise an error unless the factors fit each other."""
    if _tracing():
        return  # as in `check_input`
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
    # Compared one by one: compilers do not search a tuple for a symbolic size.
    if not ((out == q and in_ == p) or (out == p and in_ == q)):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} does not fit: needed is {(q, p)} or {(p, q)}"
        )
