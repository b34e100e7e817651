"""The domains of hyper-parameters, checked while they are still Python numbers."""

from __future__ import annotations

import numbers
from typing import Any


def check_domain(name: str, value: Any, interval: str) -> None:
    """Raise ValueError unless the number ``value`` lies in ``interval``.

    Traced values and arrays pass unchecked: looking at them would force a transfer.

    >>> check_domain("beta", 1.5, "[0, 1]")
    Traceback (most recent call last):
    ...
    ValueError: beta must lie in [0, 1], got 1.5
    """
    if not isinstance(value, numbers.Real):
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name} must lie in {interval}, got {value}")


def static_number(name: str, value: Any) -> float:
    """``value`` as a Python float; ValueError where it is none, or not known yet.

    >>> static_number("temperature", None)
    Traceback (most recent call last):
    ...
    ValueError: temperature must be a number while the loss is traced, got None
    """
    try:
        return float(value)
    except (TypeError, ValueError):  # of a tracer it is a TypeError
        raise ValueError(
            f"{name} must be a number while the loss is traced, got {value!r}"
        ) from None


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the switch ``value`` is one of ``choices``.

    >>> check_choice("terminal", "absorb", ("drop", "anchor"))
    Traceback (most recent call last):
    ...
    ValueError: terminal must be one of drop, anchor, got 'absorb'
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
