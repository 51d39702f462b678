"""Checks of arguments. Each error names the argument, the value received and what is needed."""

from __future__ import annotations

import math
import operator
from typing import Any, SupportsFloat


def as_int(name: str, value: Any) -> int:
    """Return ``value`` as an int. Raise TypeError if it is a bool or not an integer."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")


def as_positive_int(name: str, value: Any) -> int:
    """Return ``value`` as an int, see :func:`as_int`. Raise ValueError if it is less than 1."""
    number = as_int(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def as_real(name: str, value: Any) -> float:
    """Return ``value`` as a float. Raise TypeError or ValueError unless it is one finite number."""
    if isinstance(value, bool | str | bytes) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must be one finite number, got {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def as_positive_real(name: str, value: Any) -> float:
    """Return ``value`` as a float, see :func:`as_real`. Raise ValueError if it is not positive."""
    number = as_real(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {number:g}")
    return number


def as_scaling(alpha: Any, rank: int) -> float:
    """Return ``alpha / rank``. Raise ValueError if it is 0, or if float32 cannot hold it."""
    scaling = as_real("alpha", alpha) / rank
    if not scaling:
        raise ValueError("alpha must not be 0, because the update would always be zero, got 0")
    if abs(scaling) > 3.4e38:
        raise ValueError(f"alpha must leave alpha / rank within float32, got {alpha!r} / {rank}")
    return scaling
