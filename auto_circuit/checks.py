"""Checks of arguments, before long work: each says what was given and what was expected.

They hold for callers without type checking: what comes in may be of any type. `checked`
compares the arguments of a public function with its annotations; what an annotation does
not say (at least 1, finite, a share) the other functions check.
"""

from __future__ import annotations

import inspect
import math
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial, wraps
from numbers import Integral, Number, Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
import torch as t
from jaxtyping import AbstractArray
from torch import Tensor

from auto_circuit.errors import ConfigError, one_line

E = TypeVar("E", bound=Enum)
F = TypeVar("F", bound=Callable[..., Any])

_Test = Callable[[Any], bool]

# ------------------------------------------------------------------------- annotations


def checked(function: F) -> F:
    """Decorates a public function or dataclass: arguments must be what annotations say.

    Raises ConfigError that names every argument that is not. Looked at are enums, Literals,
    numbers, texts, True and False, collections (no text is one, and no generator), tensors
    and classes of this package; other annotations allow anything.
    """
    if isinstance(function, type):
        function.__init__ = _checked(
            function.__init__, partial(_scope_of_class, function)
        )
        return function  # type: ignore[return-value]
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    return _checked(function, lambda: scope)


def _scope_of_class(kind: type) -> dict[str, Any]:
    """What annotations of fields may name; inherited fields' may be of another module."""
    scope: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        scope |= vars(sys.modules[base.__module__])
    return scope


def _checked(function: F, scope_of: Callable[[], dict[str, Any]]) -> F:
    signature = inspect.signature(function)
    places = {name: place for place, name in enumerate(signature.parameters)}
    scope: dict[str, Any] = {}
    tests: dict[str, _Test] | None = None

    @wraps(function)
    def with_checks(*args: Any, **kwargs: Any) -> Any:
        nonlocal tests, scope
        if tests is None:  # when it is first called: every name is known then
            scope = scope_of()
            tests = _tests(signature, scope)
        wrong = []
        for name, test in tests.items():
            place = places[name]
            if place < len(args):
                value = args[place]
            elif name in kwargs:
                value = kwargs[name]
            else:
                continue
            if not test(value):
                annotation = evaluated(signature.parameters[name].annotation, scope)
                wrong.append(
                    f"`{name}` is {shown(value)}; expected {_words(annotation)}."
                )
        if wrong:
            raise ConfigError(" ".join(wrong))
        return function(*args, **kwargs)

    return with_checks  # type: ignore[return-value]


def _tests(signature: inspect.Signature, scope: dict[str, Any]) -> dict[str, _Test]:
    found = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        test = _test(evaluated(parameter.annotation, scope))
        if test is not None:
            found[name] = test
    return found


def evaluated(annotation: Any, scope: dict[str, Any]) -> Any:
    """The annotation itself; Any if it names what only a type checker knows."""
    if not isinstance(annotation, str):
        return Any if annotation is inspect.Parameter.empty else annotation
    try:
        return eval(annotation, scope)
    except NameError:
        return Any


def _test(annotation: Any) -> _Test | None:
    """Does a value fit an annotation? None: every value does."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        tests = [_test(part) for part in _wide_parts(annotation)]
        known = [test for test in tests if test is not None]
        return (
            (lambda v: any(test(v) for test in known))
            if len(known) == len(tests)
            else None
        )
    if origin is Literal:
        return lambda v: any(_is_choice(v, choice) for choice in get_args(annotation))
    if annotation is None or annotation is type(None):
        return lambda v: v is None
    if origin is not None:
        return _test_of_container(origin, get_args(annotation))
    return _test_of_class(annotation) if isinstance(annotation, type) else None


def _test_of_container(origin: Any, parts: tuple[Any, ...]) -> _Test | None:
    if origin is Callable:
        return callable
    if not isinstance(origin, type) or not issubclass(origin, Iterable):
        return None
    if issubclass(origin, Mapping):
        return lambda v: isinstance(v, Mapping)
    if not issubclass(origin, Collection):
        return lambda v: isinstance(v, Iterable) and not isinstance(v, (str, bytes))
    if origin is tuple and any(
        isinstance(part, type) and issubclass(part, Enum) for part in parts
    ):
        of_parts = [_test(part) for part in parts]
        return lambda v: isinstance(v, tuple) and all(
            test is None or test(item) for test, item in zip(of_parts, v, strict=False)
        )
    # Only of few and simple items: edges, say, are looked at where they are found.
    of_item = _test(parts[0]) if len(parts) == 1 and _is_simple(parts[0]) else None
    array_fits = len(parts) == 1 and not {int, float}.isdisjoint(_parts(parts[0]))

    def fits(value: Any) -> bool:
        if isinstance(value, (np.ndarray, Tensor)):
            is_collection = array_fits and value.ndim == 1
        else:
            is_collection = isinstance(value, Collection)
        # No text is one, and no generator, which is empty once read; no dictionary either,
        # whose values would be lost, unless names are asked for.
        others = (str, bytes) if parts == (str,) else (str, bytes, Mapping)
        is_other = isinstance(value, others)
        return (
            is_collection and not is_other and (not of_item or all(map(of_item, value)))
        )

    return fits


def _wide_parts(annotation: Any) -> list[Any]:
    """The parts of a union; a whole number is a number."""
    parts = get_args(annotation)
    return [part for part in parts if part is not int or float not in parts]


def _parts(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _is_simple(annotation: Any) -> bool:
    """May all items of a collection be looked at? (Of numbers, functions say more.)"""
    if len(_parts(annotation)) > 1:
        return all(map(_is_simple, _parts(annotation)))
    is_enum = isinstance(annotation, type) and issubclass(annotation, Enum)
    return is_enum or get_origin(annotation) is Literal or annotation in (int, str)


def _test_of_class(kind: type) -> _Test | None:
    if kind is bool:
        return lambda v: isinstance(v, (bool, np.bool_))
    if kind is int:
        return is_whole_number
    if kind is float:
        return is_number
    if issubclass(kind, AbstractArray):
        return _test_of_tensor(kind)
    is_ours = kind.__module__.partition(".")[0] == __package__
    if getattr(kind, "_is_protocol", False) or not (is_ours or kind in (str, Tensor)):
        return None
    return lambda v: isinstance(v, kind)


def _test_of_tensor(kind: Any) -> _Test:
    """Is it a tensor of that kind of numbers and of so many dimensions?

    Not by jaxtyping's own check, which would bind the names of dimensions for the caller.
    """
    dims = kind.dim_str.split()
    n_dims = sum(not dim.startswith(("*", "...")) for dim in dims)
    is_open = n_dims < len(dims)
    is_of_kind = {
        "Float": lambda v: v.is_floating_point(),
        "Bool": lambda v: v.dtype == t.bool,
        "Int": lambda v: not (
            v.is_floating_point() or v.is_complex() or v.dtype == t.bool
        ),
    }.get(kind.dtype.__name__, lambda v: True)

    def fits(value: Any) -> bool:
        if not isinstance(value, Tensor) or not is_of_kind(value):
            return False
        return value.ndim >= n_dims if is_open else value.ndim == n_dims

    return fits


def _words(annotation: Any) -> str:
    """What an annotation allows, in words."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        words = [_words(part) for part in _wide_parts(annotation)]
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        choices = [repr(choice) for choice in get_args(annotation)]
        return f"one of {', '.join(choices)}"
    if origin is not None:
        return _words_for_container(origin, get_args(annotation))
    if annotation is None or annotation is type(None):
        return "None"
    if issubclass(annotation, AbstractArray):
        kind = annotation.dtype.__name__.replace("Shaped", "any")
        return f"a Tensor [{annotation.dim_str}] ({kind.lower()})"
    if issubclass(annotation, Enum):
        return f"one of {', '.join(_member_names(annotation))}"
    simple: dict[type, str] = {
        bool: "True or False",
        int: "a whole number (an int)",
        float: "a number",
        str: "a text",
    }
    return simple.get(annotation, f"a {annotation.__name__}")


def _words_for_container(origin: Any, parts: tuple[Any, ...]) -> str:
    if origin is Callable:
        return "a function"
    if issubclass(origin, Mapping):
        return "a dictionary"
    kind = "list" if issubclass(origin, Sequence) else "collection"
    if not parts or not _is_simple(parts[0]):
        return f"a {kind}"
    return f"a {kind} (of {_words(parts[0])} each)"


def shown(value: Any) -> str:
    """A value as an error shows it: short, whatever it is."""
    if value is None:
        return "None"
    is_plain = isinstance(value, (str, bytes, Number, Enum, list, tuple, set, range))
    if isinstance(value, Tensor):
        return f"a Tensor {list(value.shape)} ({value.dtype})"
    try:
        return reprlib.repr(value) if is_plain else f"a {type(value).__name__}"
    except ValueError:  # Python writes no number of more than 4300 digits
        return f"a {type(value).__name__} of very many digits"


# ------------------------------------------------------------------------ single values


def is_number(value: Any) -> bool:
    """Is it a real number, of a size that a float can have? numpy's are; True is not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def is_whole_number(value: Any) -> bool:
    """Is it an integer? numpy's are; True and 2.0 are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ConfigError unless `value` is one of a Literal's values (or of several's)."""
    known = _literal_values(choices)
    if not any(_is_choice(value, choice) for choice in known):
        texts = ", ".join(repr(choice) for choice in known)
        raise ConfigError(f"`{name}` is {shown(value)}; expected one of {texts}.")


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


def _is_choice(value: Any, choice: Any) -> bool:
    is_text = isinstance(value, str) and isinstance(choice, str)
    return value is choice or (is_text and value == choice)


def check_member(name: str, value: Any, kind: type[E]) -> E:
    """The value, a member of an Enum. Raises ConfigError for anything else, texts too."""
    if not isinstance(value, kind):
        members = ", ".join(str(member) for member in _member_names(kind))
        raise ConfigError(f"`{name}` is {shown(value)}; expected one of {members}.")
    return value


def _member_names(kind: type[Enum]) -> list[str]:
    return [f"{kind.__name__}.{member.name}" for member in kind]


def check_count(
    name: str, value: Any, at_least: int = 1, at_most: int | None = None
) -> int:
    """The value as an int. Raises ConfigError for other types and what is out of range.

    numpy's integers are integers; True and 2.0 are not.
    """
    is_count = is_whole_number(value)
    count = int(value) if is_count else at_least
    if not is_count or count < at_least or (at_most is not None and count > at_most):
        upper = "" if at_most is None else f" and at most {at_most}"
        raise ConfigError(
            f"`{name}` is {shown(value)}; expected at least {at_least}{upper}"
            f"{'' if is_count else ', a whole number (an int)'}."
        )
    return count


def check_number(
    name: str,
    value: Any,
    low: int | float = -math.inf,
    high: int | float = math.inf,
    above: int | float = -math.inf,
    below: int | float = math.inf,
) -> float:
    """The value as a float. Raises ConfigError unless it is finite and in the range.

    low, high: may be equal to it. above, below: may not.
    """
    number = float(value) if is_number(value) else math.nan
    is_inside = low <= number <= high and above < number < below
    if not math.isfinite(number) or not is_inside:
        ends = {"above": above, "at least": low, "at most": high, "below": below}
        named = [
            f"{end} {limit:g}" for end, limit in ends.items() if abs(limit) < math.inf
        ]
        between = f", {' and '.join(named)}" if named else ""
        raise ConfigError(
            f"`{name}` is {shown(value)}; expected a finite number{between}."
        )
    return number


def check_device(name: str, value: Any) -> t.device:
    """The value as a device that holds tensors. Raises ConfigError for all others."""
    try:
        device = t.device(value)
        t.zeros(1, device=device).tolist()
    except Exception as error:  # each kind of device has errors of its own
        raise ConfigError(
            f"`{name}` is {value!r:.100}, which cannot be used ({one_line(error):.200}). "
            f"Expected 'cpu'{', or cuda' if t.cuda.is_available() else ''}."
        ) from None
    return device


def seeded_generator(seed: Any, device: t.device | str = "cpu") -> t.Generator:
    """A generator of random numbers of its own. Raises ConfigError for what is no seed."""
    return t.Generator(device).manual_seed(check_seed(seed))


def check_seed(seed: Any) -> int:
    """The seed as an int. Raises ConfigError for what no generator could be given."""
    return check_count("seed", seed, 0, 2**63 - 1)
