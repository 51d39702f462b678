"""The cost model of the products: the public names of :mod:`randlora.core.planning`."""

from randlora.core.planning import *  # noqa: F403
from randlora.core.planning import __all__ as __all__
