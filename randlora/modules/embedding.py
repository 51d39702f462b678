"""``RandLoRAEmbedding``: an ``nn.Embedding`` with a frozen weight and a full-rank update.

Its forward computes only those rows of ``W0 + ΔW`` that are looked up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from randlora.core.matmul import is_static
from randlora.functional import effective_weight
from randlora.modules.adapted import AdaptedModule, reset
from randlora.modules.effective import active_tensor, frozen_weight
from randlora.modules.fx import call_node


class RandLoRAEmbedding(AdaptedModule, nn.Embedding):
    """An ``nn.Embedding`` with an update of its weight.

    The row of ``padding_idx`` gets no update, as it gets no gradient in ``nn.Embedding``.
    """

    _randlora_base = nn.Embedding

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The effective weight ``W0 + ΔW``, shape ``(num_embeddings, embedding_dim)``."""
        return active_tensor(self, "weight")

    def reset_parameters(self) -> None:
        """Initialise the base weight again, and set all adapters to ``ΔW = 0``."""
        reset(self, super().reset_parameters)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of ``W0 + ΔW`` with the indices ``input``, which may have any shape."""
        if isinstance(input, Proxy):
            return call_node(self, (input,), {})
        state = self._randlora
        update = state.active_update("weight")
        if update is None:
            return super().forward(input)
        indices, count = input.dtype in (torch.int32, torch.int64), input.numel()
        # A trace for any batch size must not depend on `count`. Dynamo may: it guards conditions.
        any_batch = not (is_static(count) or torch.compiler.is_dynamo_compiling())
        if state.merged or not indices or any_batch or not 0 < count < self.num_embeddings:
            # `sparse` is not passed on: the gradient of W0 + ΔW is always dense.
            return F.embedding(input, self.weight, self.padding_idx)
        base = frozen_weight(self, "weight")
        lam, gamma, a, b, dtype = update.factors(self, base.device, base.dtype)
        rows, wide = input.flatten(), update.spec.wide
        frozen = F.embedding(rows, base)  # this raises if an index is out of range
        if wide:  # the vocabulary is p: the rows of ΔW are columns of A and Γ
            a, gamma = a[:, rows], gamma[:, rows]
        else:
            b = b.rows(rows, dtype)
        keywords: Any = {"scaling": update.settings.scaling, "token": state.checkpoint_token}
        w = effective_weight(frozen, lam, gamma, a, b, dtype, wide=wide, **keywords)
        if self.padding_idx is not None:
            w = torch.where((rows == self.padding_idx).unsqueeze(1), frozen, w)
        return w.view(*input.shape, -1)
