"""Support for ``torch.fx.symbolic_trace``: an adapted module becomes one ``call_module`` node.

What the module computes depends on its state when it is called (the active adapter, whether it is
merged, training mode). A node that calls it follows that state; traced operations would not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import Proxy


def call_node(module: nn.Module, args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """Record a call of ``module`` in the graph that is traced. Return the proxy of the new node.

    If no argument is a proxy, nothing is traced, and the result is None.
    """
    proxy = _find_proxy([*args, *keywords.values()])
    if proxy is None:
        return None
    name, tracer = type(module).__name__, proxy.tracer
    if module is getattr(tracer, "root", None):
        raise RuntimeError(
            f"{name} is adapted and cannot be traced by torch.fx by itself, only as a part of "
            "another module; trace torch.nn.Sequential(layer) instead"
        )
    # The trace would record what hooks do, and the node would run them once more.
    if module._forward_hooks or module._forward_pre_hooks:
        raise RuntimeError(
            f"{name} is adapted and has hooks, so torch.fx cannot trace it; remove the hooks, or "
            "make the module a leaf of the tracer"
        )
    path = tracer.path_of_module(module)  # type: ignore[attr-defined]
    return tracer.create_proxy("call_module", path, tuple(args), dict(keywords))


def _find_proxy(values: Sequence[Any]) -> Proxy | None:
    """Return the first proxy among values and nested tuples and lists, or None."""
    for value in values:
        if isinstance(value, (tuple, list)):  # Dynamo of torch 2.9 does not know `tuple | list`
            value = _find_proxy(value)
        if isinstance(value, Proxy):
            return value
    return None
