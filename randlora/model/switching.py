"""Disable, switch and delete adapters of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from randlora.model.index import (
    ModelT,
    adapted_modules,
    check_adapter_exists,
    refuse_wrapped,
    require_groups,
)
from randlora.model.installing import train
from randlora.modules.adapted import uninstall
from randlora.modules.disabling import disabled_scope
from randlora.modules.sharding import leave


@contextmanager
def disabled(model: ModelT) -> Iterator[ModelT]:
    """Within this context, ``model`` computes bit for bit what it did before it was adapted.

    That includes ``modules_to_save`` and the statistics of a BatchNorm; if training moves such
    statistics within the context, the change is lost at its end. It makes no difference whether the
    model is merged.

    Adapters are disabled only in the :mod:`contextvars` context, and so in the thread, of the
    ``with`` block (in compiled code: in its thread). Other threads still use the adapter. A copy of
    the model that is made within the block is not disabled.

    Raises:
        ValueError: if no layer of ``model`` is adapted.
    """
    with disabled_scope(
        [module._randlora for module in adapted_modules(model, called=True).values()]
    ):
        yield model


def set_adapter(model: ModelT, adapter: str) -> ModelT:
    """Activate this adapter and make it trainable.

    The parameters of other adapters are frozen and lose their gradients. A layer for which this
    adapter has no update computes as the plain layer does. Make a new optimiser from
    :func:`adapter_parameters` afterwards. Do not switch between a forward and its backward: a
    checkpointed part would be recomputed with another adapter, which is an error.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``adapter`` is not a string.
        ValueError: if no layer has an adapter of this name, or the model is merged.
    """
    modules = adapted_modules(model)
    check_adapter_exists(modules, adapter)
    if any(module._randlora.merged for module in modules.values()):
        raise ValueError("model must not be merged while its adapter is changed; unmerge it first")
    if any(module._randlora.active != adapter for module in modules.values()):
        refuse_wrapped(model, "change its adapter")
    require_groups(model, modules)
    for module in modules.values():
        module._randlora.activate(adapter)
    train(model)
    return model


def delete_adapter(model: ModelT, adapter: str) -> ModelT:
    """Delete an adapter with its parameters. It must not be the active one.

    Layers that have no other adapter become plain layers.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``adapter`` is not a string.
        ValueError: if no layer has an adapter of this name, or it is the active one.
    """
    modules = adapted_modules(model)
    check_adapter_exists(modules, adapter)
    if any(module._randlora.active == adapter for module in modules.values()):
        raise ValueError(
            f"adapter must not be the active one, got {adapter!r}; activate another adapter first "
            "with set_adapter, or call unload"
        )
    require_groups(model, modules)
    for module in modules.values():
        uninstall(module, adapter)
    leave(model)
    return model
