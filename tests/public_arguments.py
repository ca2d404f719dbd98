"""The parameters of all public functions whose annotations say something, and wrong values."""

from __future__ import annotations

import collections.abc
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from enum import Enum, EnumMeta
from importlib import import_module
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from jaxtyping import AbstractArray
from torch import Tensor

import auto_circuit
from auto_circuit.checks import checked, evaluated
from auto_circuit.errors import ConfigError

ENGINE = re.compile(
    r"auto_circuit\.(engine|utils\.patch_wrapper|checks|model_utils\.(model_adapter"
    r"|transformer_lens\w*))\b"
)
"""What no user calls."""


def choice_parameters() -> Iterator[tuple[str, Callable[..., Any], str, Any]]:
    """(name in the package, function, parameter, annotation)"""
    for path, function in public_functions():
        for name, annotation in annotated(function).items():
            if choices_in(annotation):
                yield path, function, name, annotation


def checked_functions() -> Iterator[tuple[Callable[..., Any], list[str]]]:
    """(a function that is `checked`, its parameters that not everything fits)"""
    for _, function in public_functions():
        is_checked = function.__code__ is checked(lambda: None).__code__  # type: ignore[attr-defined]
        names = [n for n, kind in annotated(function).items() if _says_something(kind)]
        if is_checked and names:
            yield function, names


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """(name in the package, function or method that users call)"""
    for info in pkgutil.walk_packages(auto_circuit.__path__, "auto_circuit."):
        if ENGINE.match(info.name):
            continue
        module = import_module(info.name)
        for name, public in vars(module).items():
            if name.startswith("_") or getattr(public, "__module__", "") != info.name:
                continue
            for path, function in _functions(name, public):
                yield f"{info.name}.{path}", function


def annotated(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameter -> annotation, without *args and **kwargs."""
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    return {
        parameter.name: evaluated(parameter.annotation, scope)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _says_something(annotation: Any) -> bool:
    """Is there anything that does not fit?"""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return all(map(_says_something, get_args(annotation)))
    if origin is not None:
        is_many = isinstance(origin, type) and issubclass(origin, Iterable)
        return is_many or origin in (Literal, Callable, collections.abc.Callable)
    if annotation in (None, bool, int, float, str, Tensor):
        return True
    if not isinstance(annotation, type) or getattr(annotation, "_is_protocol", False):
        return False
    is_ours = annotation.__module__.startswith("auto_circuit")
    return is_ours or issubclass(annotation, AbstractArray)


def _functions(name: str, public: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The function, or the methods of a class that users make or call."""
    if inspect.isfunction(public):
        yield name, public
    elif inspect.isclass(public) and not issubclass(public, Enum):
        for method_name, method in vars(public).items():
            is_public = not method_name.startswith("_") or method_name == "__init__"
            if is_public and inspect.isfunction(method) and not _is_result(public):
                yield f"{name}.{method_name}", method


def _is_result(public: type) -> bool:
    """Is it made by functions of ours only, or checked with the graph that it is part of?"""
    made = ("RobustnessRow", "TracrEncoding", "Variation")
    return public.__name__ in (*made, "Component", "SrcNode", "DestNode")


def choices_in(annotation: Any) -> list[Any]:
    """The enums and Literals that are in an annotation."""
    origin = get_origin(annotation)
    if origin is Literal:
        return [annotation]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [annotation]
    if origin in (Union, UnionType) or origin not in (None, dict, Callable):
        args = get_args(annotation)
        return [c for part in args if part is not ... for c in choices_in(part)]
    return []


def wrong_values(annotation: Any) -> list[Any]:
    """Values that no choice of the annotation is."""
    if get_origin(annotation) not in (
        Literal,
        Union,
        UnionType,
        None,
    ):  # a list of choices
        return [[value] for value in wrong_values(get_args(annotation)[0])]
    others = get_args(annotation)
    wrong: list[Any] = ["nonsense", object(), 1.5]
    wrong += [value for value in (1, True) if int not in others]
    wrong += [None] if type(None) not in others else []
    for kind in choices_in(annotation):
        if isinstance(kind, EnumMeta):
            member = list(kind)[0]
            wrong += [member.name, str(member)]
    return wrong


def check_refused(function: Callable[..., Any], name: str, annotation: Any) -> None:
    """A wrong value is an error of ours that names the parameter, before all else."""
    required = required_parameters(function)
    for value in wrong_values(annotation):
        with pytest.raises(ConfigError, match=re.escape(f"`{name}` is ")):
            function(**{**required, name: value})


def required_parameters(function: Callable[..., Any]) -> dict[str, None]:
    """The parameters without a default, as None."""
    return {
        other.name: None
        for other in inspect.signature(function).parameters.values()
        if other.default is other.empty
        and other.kind not in (other.VAR_POSITIONAL, other.VAR_KEYWORD)
    }
