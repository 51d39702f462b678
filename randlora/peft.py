"""Adapters of PEFT: the public names of :mod:`randlora.files.peft`."""

from randlora.files.peft import *  # noqa: F403
from randlora.files.peft import __all__ as __all__
