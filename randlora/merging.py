"""The update folded into the weight, left out, or taken away; always all layers or none.

The frozen weights are never written. A merged layer computes with a weight of its own, ``W0 + ΔW``
rounded once, beside ``W0``. So un-merging is exact in every dtype and after any number of times,
what shares the weight (a tied embedding) does not move, and a ``state_dict`` is the same, merged or
not: loading it can apply no update twice. What that costs is the memory of the adapted weights once
more, until :func:`unload`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from randlora.injection import SAVED
from randlora.layers import RandLoRALinear, adapted_layers, plain_class, remove

__all__ = ["disabled", "merge", "unload", "unmerge"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def merge(model: ModelT) -> ModelT:
    """Have every adapted layer compute with ``W0 + ΔW``, formed once: no cost beyond a plain model.

    Merged layers do not train: in training mode, with gradients recorded, using one is an error. A
    merged layer whose parameters are changed, by loading a ``state_dict`` say, forms its weight
    again. Layers that are merged already stay so.

    Returns:
        ``model``.

    Raises:
        ValueError: if no layer of ``model`` is adapted, or an effective weight is not finite; then
            nothing is merged.
    """
    layers = adapted_layers(model)
    _fold_all(layers)
    for layer in layers.values():
        layer.merged = True
    return model


def unmerge(model: ModelT) -> ModelT:
    """Take :func:`merge` back: ``W0`` is what it was to the bit, and the updates can be trained.

    Layers that are not merged stay as they are.

    Returns:
        ``model``.

    Raises:
        ValueError: if no layer of ``model`` is adapted.
    """
    for layer in adapted_layers(model).values():
        layer.merged = False
        layer._folded = None
    return model


@contextmanager
def disabled(model: ModelT) -> Iterator[ModelT]:
    """Within it, ``model`` computes as if it had not been adapted, to the bit, merged or not.

    ``modules_to_save`` are what they were trained to.

    Raises:
        ValueError: if no layer of ``model`` is adapted.
    """
    before = {layer: layer.enabled for layer in adapted_layers(model).values()}
    try:
        for layer in before:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def unload(model: ModelT, *, merge: bool = False) -> ModelT:
    """Give back the plain model: each layer the class it had, its hooks and buffers kept.

    Args:
        model: an adapted model.
        merge: whether the updates go into the weights, each rounded once to its dtype, instead of
            being discarded. The weights that took them up are new parameters: what shared the old
            one keeps it.

    Returns:
        ``model``. What ``inject`` froze stays frozen, ``modules_to_save`` stay trained.

    Raises:
        TypeError: if ``merge`` is not a bool, or a layer is of a subclass of
            :class:`RandLoRALinear` of your own, which was never plain.
        ValueError: if no layer of ``model`` is adapted, or a weight would not be finite; then
            nothing is changed.
    """
    if not isinstance(merge, bool):
        raise TypeError(f"merge must be True or False, got {merge!r}")
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if plain_class(layer) is None:
            raise TypeError(
                f"model must have layers that were plain before, but {name!r} is a "
                f"{type(layer).__name__}, a subclass of RandLoRALinear"
            )
    if merge:
        _fold_all(layers)
    for layer in layers.values():
        remove(layer, merge=merge)
    for module in model.modules():
        vars(module).pop(SAVED, None)
    return model


def _fold_all(layers: dict[str, RandLoRALinear]) -> None:
    """Form all effective weights, or raise and keep none that was not there."""
    for name, layer in layers.items():
        if not layer.fold().isfinite().all():
            for other in layers.values():
                if not other.merged:
                    other._folded = None
            raise ValueError(
                f"the effective weight of {name or 'the model'!r} must be finite to be merged, but "
                "has values that are infinite or no number"
            )
