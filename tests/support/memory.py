"""Counts the bytes that code allocates, independent of libraries and of the machine's load.

Resident memory would also count what a library maps, caches or has not returned yet.
"""

from __future__ import annotations

import tracemalloc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Allocated(TorchDispatchMode):
    """Measures ``peak``: the most bytes that tensors, arrays and objects take within this context.

    Tensors are counted by storage when an operator returns them. Memory that an operator uses only
    internally, and files that a library maps, are not counted. ``tracemalloc`` counts Python
    objects and NumPy arrays.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._tensors = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __enter__(self):
        with _Mode():  # what torch imports for its first mode is not counted
            torch.ones(1)
        tracemalloc.start()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self._look()
        tracemalloc.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._look()  # memory of Python and NumPy since the last look
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, 0)  # it existed before, or is a view of an array: 0 bytes
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._follow(tensor, tensor.untyped_storage().nbytes())
        self._look()
        return result

    def _follow(self, tensor, size):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._tensors += size

        def freed(_):
            del self._known[key]
            self._tensors -= size

        self._known[key] = weakref.ref(storage, freed)

    def _look(self):
        _, highest = tracemalloc.get_traced_memory()
        self.peak = max(self.peak, self._tensors + highest)
        tracemalloc.reset_peak()


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if type(leaf) in (torch.Tensor, torch.nn.Parameter)]
