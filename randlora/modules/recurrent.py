"""``AdaptedRNN``: recurrent layers (``nn.RNN``, ``nn.LSTM``, ``nn.GRU``) with adapted weights.

Their forward takes the weights from the list ``_flat_weights``. Here this list is a property, which
reads each weight by its name and so contains effective weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from randlora.modules.adapted import AdaptedModule
from randlora.modules.state import base_tensors


class AdaptedRNN(AdaptedModule):
    """A recurrent layer with updates or copies."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        pass  # the getter builds the list

    def _init_flat_weights(self) -> None:
        pass

    def _weights_have_changed(self) -> bool:
        return False

    def flatten_parameters(self) -> None:
        """Do nothing: effective weights are new in each call and cannot share cuDNN's buffer."""

    @staticmethod
    def _randlora_removed(module: Any) -> None:
        module._init_flat_weights()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # `nn.RNNBase.__setstate__` reads the weights; this must not compute effective ones.
        with base_tensors(state["_randlora"]):
            super().__setstate__(state)
