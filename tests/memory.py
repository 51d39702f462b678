"""What code allocates, in bytes, whatever the libraries, their pages and the load of the machine.

Resident memory would also count what a library maps, caches or has not returned yet.
"""

from __future__ import annotations

import tracemalloc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """Within it, the most that is alive at a time of tensors, arrays and bytes made within it.

    Tensors are followed by their storages, as operators return them: what an operator takes and
    frees within itself, and what a library maps from a file, is not seen. All else is
    ``tracemalloc``'s count: Python's objects, and NumPy's arrays.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._tensors = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __enter__(self):
        tracemalloc.start()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self._look()
        tracemalloc.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._look()  # at what Python and NumPy took since
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, 0)  # what was there before, or is a view of an array's memory
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
