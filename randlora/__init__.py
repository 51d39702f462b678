"""RandLoRA: full-rank fine-tuning at the parameter count of LoRA."""

from randlora import checkpoint, functional, peft, planning, reference
from randlora.bases import BasisBank
from randlora.core.planning import Choice
from randlora.files.checkpoint import adapter_state_dict, load_adapter, save_adapter
from randlora.files.errors import (
    BaseModelError,
    BasesError,
    CheckpointError,
    FileError,
    MismatchError,
)
from randlora.model.injecting import inject
from randlora.model.installing import adapter_parameters
from randlora.model.merging import merge, merged_state_dict, unload, unmerge
from randlora.model.reports import rank_report, summary
from randlora.model.switching import delete_adapter, disabled, set_adapter
from randlora.modules.linear import RandLoRALinear
from randlora.modules.table import register

__version__ = "0.1.0"

__all__ = ["BaseModelError", "BasesError", "BasisBank", "CheckpointError", "Choice", "FileError"]
__all__ += ["MismatchError", "RandLoRALinear", "adapter_parameters", "adapter_state_dict"]
__all__ += ["checkpoint", "delete_adapter", "disabled", "functional", "inject", "load_adapter"]
__all__ += ["merge", "merged_state_dict", "peft", "planning", "rank_report", "reference"]
__all__ += ["register", "save_adapter", "set_adapter", "summary", "unload", "unmerge"]
