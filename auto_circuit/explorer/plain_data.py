"""Frozen dataclasses as plain data (JSON) and back; arrays of numbers as base64."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from auto_circuit.errors import DataError

Kind = TypeVar("Kind")

ARRAY_TYPES = ("uint8", "uint16", "uint32", "float32")


def array_as_data(array: np.ndarray) -> dict[str, Any]:
    """An array with its numbers' bytes as base64."""
    little = array.astype(array.dtype.newbyteorder("<"), order="C")
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def as_data(
    value: Any, of_array: Callable[[np.ndarray], dict[str, Any]] = array_as_data
) -> Any:
    """A value as what JSON can hold: dataclasses as dictionaries, tuples as lists."""
    if isinstance(value, np.ndarray):
        return of_array(value)
    if is_dataclass(value):
        return {f.name: as_data(getattr(value, f.name), of_array) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: as_data(item, of_array) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_data(item, of_array) for item in value]
    return value


def of_data(kind: type[Kind], data: Any) -> Kind:
    """The dataclass that `as_data` gave this for. Raises DataError for anything else."""
    try:
        return _read(kind, data)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"This is no {kind.__name__} as plain data ({type(error).__name__}: "
            f"{error!s:.200}). Make it again."
        ) from error


def _read(kind: Any, data: Any) -> Any:
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        if not isinstance(data, Mapping) or set(data) != set(kinds):
            raise ValueError(f"expected the fields {', '.join(kinds)}")
        return kind(**{name: _read(kinds[name], data[name]) for name in kinds})  # type: ignore[operator]
    if type(None) in get_args(kind):
        (inner,) = (part for part in get_args(kind) if part is not type(None))
        return None if data is None else _read(inner, data)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is tuple:
        return _read_tuple(parts, data)
    if origin in (dict, Mapping):
        return {str(name): _read(parts[1], item) for name, item in dict(data).items()}
    if kind is np.ndarray:
        return _read_array(data)
    if not isinstance(data, kind) and not (kind is float and type(data) is int):
        raise ValueError(f"{data!r:.80} is no {kind.__name__}")
    return kind(data)


def _read_tuple(parts: tuple[Any, ...], data: Any) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise ValueError(f"{data!r:.80} is no list")
    if len(parts) == 2 and parts[1] is ...:
        return tuple(_read(parts[0], item) for item in data)
    return tuple(_read(part, item) for part, item in zip(parts, data, strict=True))


def _read_array(data: Any) -> np.ndarray:
    if data["dtype"] not in ARRAY_TYPES:
        raise ValueError(f"unknown type {data['dtype']!r:.40}")
    dtype = np.dtype(data["dtype"])
    content = base64.b64decode(data["base64"], validate=True)
    return (
        np.frombuffer(content, dtype.newbyteorder("<"))
        .astype(dtype)
        .reshape(data["shape"])
    )
