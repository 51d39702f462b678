"""RandLoRA: fine-tuning with full-rank updates at the parameter count of LoRA."""

from randlora import checkpoint, functional, peft, planning, reference
from randlora.arithmetic import add_weighted_adapter
from randlora.bases import BasisBank
from randlora.checkpoint import adapter_state_dict, load_adapter, save_adapter
from randlora.diagnostics import rank_report, summary
from randlora.handlers import register
from randlora.injection import adapter_parameters, inject
from randlora.layers import RandLoRALinear
from randlora.merging import (
    delete_adapter,
    disabled,
    merge,
    merged_state_dict,
    set_adapter,
    unload,
    unmerge,
)

__version__ = "0.1.0"

__all__ = [
    "BasisBank",
    "RandLoRALinear",
    "adapter_parameters",
    "adapter_state_dict",
    "add_weighted_adapter",
    "checkpoint",
    "delete_adapter",
    "disabled",
    "functional",
    "inject",
    "load_adapter",
    "merge",
    "merged_state_dict",
    "peft",
    "planning",
    "rank_report",
    "reference",
    "register",
    "save_adapter",
    "set_adapter",
    "summary",
    "unload",
    "unmerge",
]
