"""Types and shapes, checked at run time, in less time.

jaxtyping wraps every function: it binds the arguments by name, remembers the dimensions that
shapes have named, and has beartype look at the arguments twice. Most functions have no shapes,
and need beartype alone, which looks at the same types.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

with_shapes = jaxtyping.jaxtyped
types_alone = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def check_quickly() -> None:
    """From here on, what jaxtyping's import hook finds is checked as `jaxtyped` does it."""
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """As jaxtyping's own, but for functions without shapes."""

    def decorate(checked: Any) -> Any:
        if inspect.isclass(checked) and hasattr(checked.__init__, "__wrapped__"):
            return checked  # as jaxtyping, which wraps no `__init__` twice
        hints = known_hints(checked)
        if hints is None or any(map(has_shape, hints.values())):
            return with_shapes(typechecker=typechecker)(checked)
        texts = checked.__annotations__
        checked.__annotations__ = hints
        try:
            quick = types_alone(checked)
        finally:
            checked.__annotations__ = texts
        quick.__annotations__ = texts
        return quick

    return decorate


def known_hints(checked: Any) -> dict[str, Any] | None:
    """The types of a function's arguments; None where beartype alone would not do the same.

    jaxtyping leaves out a type whose name is not there yet, and looks at a generator's
    arguments when it is called, not when it begins.
    """
    if not inspect.isfunction(checked) or inspect.isgeneratorfunction(checked):
        return None
    try:
        return get_type_hints(checked, include_extras=True)
    except NameError:
        return None


def has_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(has_shape, get_args(hint)))
