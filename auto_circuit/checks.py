"""Checks of arguments, before long work: each says what was given and what was expected.

They hold for callers without type checking: what comes in may be of any type.
"""

from __future__ import annotations

import math
from enum import Enum
from numbers import Integral, Real
from typing import Any, TypeVar, get_args

import torch as t

from auto_circuit.errors import ConfigError

E = TypeVar("E", bound=Enum)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ConfigError unless `value` is one of a Literal's values (or of several's)."""
    known = _literal_values(choices)
    if not any(value is choice or _equal_texts(value, choice) for choice in known):
        texts = ", ".join(repr(choice) for choice in known)
        raise ConfigError(f"`{name}` is {value!r}; expected one of {texts}.")


def _literal_values(choices: Any) -> list[Any]:
    """The values of a Literal, or of a union of Literals and None."""
    values: list[Any] = []
    for part in get_args(choices):
        if part is type(None):
            values.append(None)
        elif get_args(part):
            values += _literal_values(part)
        else:
            values.append(part)
    return values


def _equal_texts(value: Any, choice: Any) -> bool:
    return isinstance(value, str) and isinstance(choice, str) and value == choice


def check_member(name: str, value: Any, kind: type[E]) -> E:
    """The value, a member of an Enum. Raises ConfigError for anything else, texts too."""
    if not isinstance(value, kind):
        members = ", ".join(str(member) for member in _member_names(kind))
        raise ConfigError(f"`{name}` is {value!r}; expected one of {members}.")
    return value


def _member_names(kind: type[Enum]) -> list[str]:
    return [f"{kind.__name__}.{member.name}" for member in kind]


def check_count(
    name: str, value: Any, at_least: int = 1, at_most: int | None = None
) -> int:
    """The value as an int. Raises ConfigError for other types and what is out of range.

    numpy's integers are integers; True and 2.0 are not.
    """
    is_count = isinstance(value, Integral) and not isinstance(value, bool)
    count = int(value) if is_count else at_least
    if not is_count or count < at_least or (at_most is not None and count > at_most):
        upper = "" if at_most is None else f" and at most {at_most}"
        raise ConfigError(
            f"`{name}` is {value!r}; expected at least {at_least}{upper}"
            f"{'' if is_count else ', a whole number (an int)'}."
        )
    return count


def check_number(
    name: str, value: Any, low: int | float = -math.inf, high: int | float = math.inf
) -> float:
    """The value as a float. Raises ConfigError unless it is finite and in [low, high]."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        ends = [f"at least {low:g}"] if low > -math.inf else []
        ends += [f"at most {high:g}"] if high < math.inf else []
        between = f", {' and '.join(ends)}" if ends else ""
        raise ConfigError(f"`{name}` is {value!r}; expected a finite number{between}.")
    return number


def check_device(name: str, value: Any) -> t.device:
    """The value as a device that holds tensors. Raises ConfigError for all others."""
    try:
        device = t.device(value)
        t.zeros(1, device=device).tolist()
    except Exception as error:  # each kind of device has errors of its own
        raise ConfigError(
            f"`{name}` is {value!r:.100}, which cannot be used ({str(error):.200}). "
            f"Expected 'cpu'{', or cuda' if t.cuda.is_available() else ''}."
        ) from None
    return device
