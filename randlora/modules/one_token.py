"""Calls with one token and without gradients, as text is generated, are prepared.

Such a call takes a few dozen microseconds, and checking and planning it anew would take as many. So
they are done once. Later calls compare what the outcome depended on, and touch few objects: between
two calls of a layer, the weights of all others pass through the processor's caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from randlora.core.kernel import few_linear
from randlora.core.matmul import cast, in_place
from randlora.core.planning import choose
from randlora.core.update import is_few
from randlora.functional import work_of
from randlora.modules.weight_update import WeightUpdate


class OneToken:
    """What a linear layer needs to compute one token, through the activations and without ``C``.

    It holds no tensors of the module, which may be replaced or offloaded: each call reads them.
    """

    def __init__(self, module: Any, update: WeightUpdate, weight: Tensor) -> None:
        self.adapter, self.choice = module._randlora.active, module.choice
        self.names, self.in_features = update.names, module.in_features
        (r, p, _, m), self.wide = update.sizes, update.spec.wide
        self.lam_shape, self.gamma_shape, self.a_shape = (m // r, r), (m // r, p), (r, p)
        self.sizes, self.dtype, self.place = update.sizes, weight.dtype, weight.get_device()
        self.wider = torch.promote_types(self.dtype, torch.float32)
        self.store = update.store(weight.device, self.dtype)
        a, b = self.store.operands(*self.sizes)
        self.factor = update.settings.scaling * b.scale
        self.a = None if update.settings.train_a else self.store.scaled(a, self.factor)
        needs = {"needs_input": False, "needs_parameters": False}
        plan = choose(work_of(1, a, b, self.wide, self.dtype, **needs), self.choice)
        few = is_few(torch.empty(1, self.in_features, device="meta"), a, m // r)
        self.usable = plan.forward == "activations" and few

    def call(self, module: Any, x: Tensor) -> Tensor | None:
        """Compute a call without gradients, or return None if it is not as it was prepared."""
        if not (
            self.usable
            and in_place()
            and type(x) is Tensor
            and not x.is_nested
            and x.dtype == self.dtype
            and x.numel() == self.in_features == x.shape[-1]
            and module.choice is self.choice
            and module._randlora.active == self.adapter
            and not torch._C._is_any_autocast_enabled()
            and (found := self.store.found(*self.sizes)) is not None
        ):
            return None
        own = module._parameters
        weight, lam, gamma, *trained = [own.get(name) for name in self.names]
        if (
            weight is None
            or lam is None
            or gamma is None
            or weight.dtype != self.dtype
            or weight.get_device() != self.place
            or lam.shape != self.lam_shape
            or gamma.shape != self.gamma_shape
            or (lam.dtype == torch.float64 and self.dtype != torch.float64)
        ):
            return None
        a = self.a
        if a is None:
            a = trained[0]
            if a is None or a.shape != self.a_shape:
                return None
            if a.dtype == torch.float64 and self.dtype != torch.float64:
                return None
            a = self.factor * cast(a, self.wider)
        lam, gamma = cast(lam, self.wider), cast(gamma, self.wider)
        return few_linear(x, weight, module.bias, lam, gamma, a, found[1], self.wide)[0]


def prepare(module: Any, update: WeightUpdate, x: Tensor, weight: Tensor) -> OneToken | None:
    """Prepare calls like this one, of ``x`` without gradients, or return None if that is no use."""
    before: OneToken | None = module._randlora.one_token
    if before is not None and not before.usable and before.choice is module.choice:
        return before
    if (
        not in_place()
        or type(x) is not Tensor
        or x.numel() != module.in_features
        or update.settings.dropout
        or torch._C._is_any_autocast_enabled()
        or any(name not in module._parameters for name in update.names)
        or (weight.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    return OneToken(module, update, weight)
