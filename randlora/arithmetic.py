"""Weighted sums of adapters, where a sum of updates is an update.

An update is bilinear: block ``j`` of its coefficients is the outer product of ``Λ_j`` and ``Γ_j``,
entry by entry times ``A``. A sum of such blocks is one again only where they share a side:

    Σ_i w_i Λ_j Γ_ij = Λ_j (Σ_i w_i Γ_ij)        and likewise with the sides exchanged.

So a sum is exact, up to one rounding of the numbers, of a single adapter (scaled, negated), of
adapters of which only ``Γ`` was trained from a common start, and of adapters of different layers.
Others have to be added to the weights: ``unload(model, merge={"one": 0.7, "other": 0.3})``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from randlora.adapted import Adaptation, adapted_modules, set_copy
from randlora.adapters import Adapter, check_adapter_name, weight_name
from randlora.injection import adapt
from randlora.merging import check_weights, weighted_copies
from randlora.targets import Place

__all__ = ["add_weighted_adapter"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def add_weighted_adapter(model: ModelT, weights: Mapping[str, float], adapter: str) -> ModelT:
    """Give ``model`` one more adapter, whose updates are ``Σ w ΔW`` of others; it is not active.

    So are the differences of what the others trained in full to the originals. Buffers that moved
    are averaged by the weights (integer ones are those of the adapter with the most). Dropout is
    the first one's.

    Args:
        model: an adapted model.
        weights: how much of which adapter, by name.
        adapter: the name of the new one.

    Returns:
        ``model``.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if no layer is adapted, an adapter is not known, the new name is, or the sum of
            the updates of a weight is no update: other bases, ranks or numbers of bases, or a block
            in which they share neither ``Λ`` nor ``Γ``. Nothing is changed then.
    """
    modules = adapted_modules(model)
    weights = check_weights("weights", weights, modules)
    check_adapter_name(adapter)
    if any(adapter in module._randlora.names for module in modules.values()):
        raise ValueError(f"adapter must be a new name, but the model has {adapter!r}")
    updates, numbers = {}, {}
    for path, module in modules.items():
        found: dict[str, list[tuple[float, Adapter]]] = {}
        for name, weight in weights.items():
            for parameter, update in module._randlora.adapters.get(name, {}).items():
                found.setdefault(parameter, []).append((weight, update))
        for parameter, terms in found.items():
            terms.sort(
                key=lambda term: not term[1].settings.scaling
            )  # the sum gets the first one's
            first = terms[0][1]
            place = Place(module, first.site)
            updates[place] = first.settings, first.bank
            numbers[place] = _sum(weight_name(path, parameter), module, terms)
            if not all(side.float().isfinite().all() for side in numbers[place]):
                raise ValueError(
                    f"weights must give finite numbers, but the sum for "
                    f"{weight_name(path, parameter)!r} has others"
                )
    made: dict[Any, Tensor] = {}
    copies = {module: weighted_copies(module, weights, made) for module in modules.values()}
    in_full = [m for m in modules.values() if m._randlora.in_full & weights.keys()]
    adapt(model, adapter, updates, in_full, copies, freeze=False)
    with torch.no_grad():
        for module, tensors in copies.items():
            for name, value in tensors.items():
                set_copy(module, module._randlora.copies[adapter][name], value)
        for (module, site), values in numbers.items():
            state: Adaptation = vars(module)["_randlora"]
            ours = state.adapters[adapter][site.parameter]
            for parameter, value in zip(ours.parameters(module), values, strict=True):
                parameter.copy_(value)
    return model


# shape: -> (n, r), (n, p); of a stack (stack, n, r), (stack, n, p)
def _sum(name: str, module: nn.Module, terms: list[tuple[float, Adapter]]) -> tuple[Tensor, Tensor]:
    """``Λ`` and ``Γ`` of the sum, in float64."""
    instead = "unload(model, merge={name: weight, …}) adds such a sum to the weights"
    first = terms[0][1]
    for _, other in terms:
        if other.sizes != first.sizes or not other.bank.same_recipe(first.bank):
            raise ValueError(
                f"the updates of {name!r} must be of one rank, number of bases and bank to be "
                f"summed, but are {first.settings} of {first.bank!r} and {other.settings} of "
                f"{other.bank!r}; {instead}"
            )
    sides = zip(*(update.parameters(module) for _, update in terms), strict=True)
    # (terms, blocks, r) and (terms, blocks, p): the blocks of a stack one after the other.
    lam, gamma = (torch.stack([t.detach().double().flatten(0, -2) for t in side]) for side in sides)
    scaling = first.settings.scaling or 1.0
    factors = [weight * update.settings.scaling / scaling for weight, update in terms]
    factor = torch.tensor(factors, dtype=lam.dtype, device=lam.device)[:, None, None]
    # A term that is zero shares whatever the others have.
    used = (factor[..., 0] != 0) & (lam != 0).any(-1) & (gamma != 0).any(-1)
    of, blocks = used.int().argmax(0), torch.arange(lam.shape[1], device=lam.device)
    one_lam, one_gamma = lam[of, blocks], gamma[of, blocks]
    same_lam, same_gamma = (
        ((side == one).all(-1) | ~used).all(0) for side, one in ((lam, one_lam), (gamma, one_gamma))
    )
    if not (same_lam | same_gamma).all():
        block = int((same_lam | same_gamma).int().argmin())
        raise ValueError(
            f"the updates of {name!r} must share the lambda or the gamma of each block to be "
            f"summed, but share neither in block {block}; {instead}"
        )
    factor = factor * used.unsqueeze(-1)
    by_lam = same_lam.unsqueeze(-1)
    lam_sum, gamma_sum = (factor * lam).sum(0), (factor * gamma).sum(0)
    return (
        torch.where(by_lam, one_lam, lam_sum).view(first.shapes[0]),
        torch.where(by_lam, gamma_sum, one_gamma).view(first.shapes[1]),
    )
