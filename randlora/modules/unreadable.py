"""``UnreadableLinear``: linear layers whose weight cannot be read as a floating tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from randlora.core.kernel import autocast_dtype
from randlora.functional import randlora_linear
from randlora.modules.adapted import AdaptedModule
from randlora.modules.fx import call_node


class UnreadableLinear(AdaptedModule):
    """A linear layer with an unreadable (quantised) weight. ``x ΔWᵀ`` is added to its output."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of the plain layer plus ``x ΔWᵀ``, in the dtype of that output."""
        module: Any = self
        if isinstance(input, Proxy):
            return call_node(module, (input,), {})
        forward = super().forward  # type: ignore[misc]
        update = self._randlora.active_update("weight")
        if update is None:
            return forward(input)  # type: ignore[no-any-return]
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        if needs_gradient and hasattr(module, "_packed_params"):
            y = _PackedLinear.apply(input, module, forward)  # type: ignore[no-untyped-call]
        else:
            y = forward(input)
            if needs_gradient and not y.requires_grad:
                kind, hint = module._randlora_base.__name__, ""
                if getattr(module, "support_avx512bf16_for_cpu", False):  # of bitsandbytes
                    hint = "; set its support_avx512bf16_for_cpu to False before it is evaluated"
                raise RuntimeError(
                    f"{kind} gives no gradient to its input, so layers before it cannot be trained"
                    + hint
                )
        dtype, settings = autocast_dtype(input.device), update.settings
        x = input if dtype is None else input.to(dtype)
        x = F.dropout(x, settings.dropout, module.training)
        factors = update.factors(module, x.device, x.dtype)
        keywords: Any = {"scaling": settings.scaling, "token": module._randlora.checkpoint_token}
        delta = randlora_linear(x, None, None, *factors, **keywords)
        return y + delta.to(y.dtype)  # type: ignore[no-any-return]


class _PackedLinear(torch.autograd.Function):
    """Adds the gradient of the input, ``dy W``, that a packed layer of ``torch.ao`` lacks."""

    @staticmethod
    def forward(x: Tensor, layer: Any, forward: Callable[[Tensor], Tensor]) -> Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        return dy @ ctx.layer.weight().dequantize().to(dy.dtype), None, None
