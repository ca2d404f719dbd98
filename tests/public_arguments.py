"""The parameters of all public functions that are enums or Literals, and wrong values."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from enum import Enum, EnumMeta
from importlib import import_module
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest

import auto_circuit
from auto_circuit.checks import evaluated
from auto_circuit.errors import ConfigError

ENGINE = re.compile(
    r"auto_circuit\.(engine|utils\.(edge_blocks|forward_pass|head_inputs|patch_session"
    r"|patch_wrapper)|checks|model_utils\.(model_adapter|transformer_lens\w*))\b"
)
"""What no user calls."""


def choice_parameters() -> Iterator[tuple[str, Callable[..., Any], str, Any]]:
    """(name in the package, function, parameter, annotation)"""
    for info in pkgutil.walk_packages(auto_circuit.__path__, "auto_circuit."):
        if ENGINE.match(info.name):
            continue
        module = import_module(info.name)
        for name, public in vars(module).items():
            if name.startswith("_") or getattr(public, "__module__", "") != info.name:
                continue
            for path, function in _functions(name, public):
                scope = getattr(inspect.unwrap(function), "__globals__", {})
                for parameter in inspect.signature(function).parameters.values():
                    annotation = evaluated(parameter.annotation, scope)
                    if _choices(annotation):
                        yield f"{info.name}.{path}", function, parameter.name, annotation


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
    """Is it made by functions of ours only?"""
    return public.__name__ in ("RobustnessRow", "TracrEncoding", "Variation")


def _choices(annotation: Any) -> list[Any]:
    """The enums and Literals that are in an annotation."""
    origin = get_origin(annotation)
    if origin is Literal:
        return [annotation]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [annotation]
    if origin in (Union, UnionType) or origin not in (None, dict, Callable):
        args = get_args(annotation)
        return [c for part in args if part is not ... for c in _choices(part)]
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
    for kind in _choices(annotation):
        if isinstance(kind, EnumMeta):
            member = list(kind)[0]
            wrong += [member.name, str(member)]
    return wrong


def check_refused(function: Callable[..., Any], name: str, annotation: Any) -> None:
    """A wrong value is an error of ours that names the parameter, before all else."""
    required = {
        other.name: None
        for other in inspect.signature(function).parameters.values()
        if other.default is other.empty
        and other.kind not in (other.VAR_POSITIONAL, other.VAR_KEYWORD)
    }
    for value in wrong_values(annotation):
        with pytest.raises(ConfigError, match=re.escape(f"`{name}` is ")):
            function(**{**required, name: value})
