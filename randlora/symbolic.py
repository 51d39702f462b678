"""An adapted module in ``torch.fx.symbolic_trace``: one node that calls it, never its insides.

What an adapted module does depends on its state at the call: which adapter is active, whether it is
merged. As a node it goes on doing that, and training, in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import Proxy

__all__ = ["node"]


def node(module: nn.Module, args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """The node that calls ``module``, where it is called while a graph is recorded; else None.

    Raises:
        RuntimeError: if the module is itself what is traced, or has hooks, which the trace would
            record beside the node that runs them.
    """
    proxy = _proxy([*args, *keywords.values()])
    if proxy is None:
        return None
    name, tracer = type(module).__name__, proxy.tracer
    if module is getattr(tracer, "root", None):
        raise RuntimeError(
            f"{name} is adapted and cannot be traced by torch.fx by itself, only as a part of a "
            "module: trace torch.nn.Sequential(layer) instead"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise RuntimeError(
            f"{name} is adapted and has hooks, so that torch.fx cannot trace it: remove the hooks, "
            "or make it a leaf of the tracer"
        )
    path = tracer.path_of_module(module)  # type: ignore[attr-defined]
    return tracer.create_proxy("call_module", path, tuple(args), dict(keywords))


def _proxy(values: Sequence[Any]) -> Proxy | None:
    for value in values:
        if isinstance(value, tuple | list):
            value = _proxy(value)
        if isinstance(value, Proxy):
            return value
    return None
