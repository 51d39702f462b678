"""The random bases: the format of their entries, and the banks that draw and hold them."""

from randlora.bases.bank import BasisBank

__all__ = ["BasisBank"]
