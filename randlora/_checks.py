"""Checks of arguments: each error names the argument, what came and what was needed."""

from __future__ import annotations

import math
import operator
from typing import Any, SupportsFloat


def as_int(name: str, value: Any) -> int:
    """``value`` as an int, if it is a whole number of an integer type and no bool."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")


def as_positive_int(name: str, value: Any) -> int:
    """``value`` as an int of at least 1."""
    number = as_int(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def as_real(name: str, value: Any) -> float:
    """``value`` as a finite float, if it is a real number and no bool or string."""
    if isinstance(value, bool | str | bytes) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must be one finite number, got {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def as_scaling(alpha: Any, rank: int) -> float:
    """``alpha / rank``, if that is a number that float32 can hold, and not zero."""
    scaling = as_real("alpha", alpha) / rank
    if not scaling:
        raise ValueError("alpha must not be 0: the update would be zero, whatever is trained")
    if abs(scaling) > 3.4e38:
        raise ValueError(f"alpha must leave alpha / rank within float32, got {alpha!r} / {rank}")
    return scaling
