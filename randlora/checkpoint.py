"""Adapters as files: the public names of :mod:`randlora.files.checkpoint`."""

from randlora.files.checkpoint import *  # noqa: F403
from randlora.files.checkpoint import __all__ as __all__
