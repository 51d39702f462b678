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

    ``Λ``, ``Γ`` and a trained ``A`` are read in each call.
    """

    def __init__(self, module: Any, update: WeightUpdate) -> None:
        self.weight, self.choice = module._parameters["weight"], module.choice
        self.dtype, self.place = self.weight.dtype, self.weight.get_device()
        self.in_features, self.wide = module.in_features, update.spec.wide
        self.store = update.store(self.weight.device, self.dtype)
        a, self.b = self.store.operands(*update.sizes)
        self.drawn = self.store.drawn
        self.names, self.tensors = update.names, (self.weight, *update.parameters(module))
        _, self.lam, self.gamma, *_ = self.tensors
        self.wider = torch.promote_types(self.dtype, torch.float32)
        self.factor = update.settings.scaling * self.b.scale
        self.a = None if update.settings.train_a else self.store.scaled(a, self.factor)
        work = work_of(
            1, a, self.b, self.wide, self.dtype, needs_input=False, needs_parameters=False
        )
        by_activations = choose(work, self.choice).forward == "activations"
        few = is_few(torch.empty(1, self.in_features, device="meta"), a, update.settings.num_bases)
        self.usable = by_activations and few and not update.settings.dropout

    def fits(self, module: Any, x: Tensor) -> bool:
        """Whether the call of ``x`` without gradients can be computed by this."""
        weight = self.weight
        if not (
            self.usable
            and in_place()
            and type(x) is Tensor
            and x.dtype == weight.dtype == self.dtype
            and x.numel() == self.in_features == x.shape[-1]
            and weight.get_device() == self.place
            and self.lam.dtype == self.gamma.dtype == self.wider
            and module.choice is self.choice
            and self.store.drawn == self.drawn
            and not torch._C._is_any_autocast_enabled()
        ):
            return False
        own = module._parameters
        for name, tensor in zip(self.names, self.tensors, strict=True):
            if own.get(name) is not tensor:
                return False
        return True

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the call, which fits."""
        a = self.a
        if a is None:
            a = self.factor * cast(self.tensors[3], self.wider)
        return few_linear(x, self.weight, bias, self.lam, self.gamma, a, self.b, self.wide)[0]
