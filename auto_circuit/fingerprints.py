"""What a result depends on, as plain data that a cell's key is made from.

Equal descriptions mean equal results: weights and tensors count by their values, prompt files
by their bytes, functions of users by the text of their file. The library's own functions count
by their names and by `store.RESULTS_VERSION`, so that a new version that gives the same
numbers computes nothing again.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from importlib import metadata
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch as t
from torch import Tensor
from torch.nn import Module

from auto_circuit.errors import ConfigError

OURS = "auto_circuit."
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")
"""What a folder of a model's weights and tokenizer holds."""


def described(value: Any) -> Any:
    """Plain data (JSON) that is equal for values that give equal results, in every process.

    Raises ConfigError for what cannot be told apart (an open file, an object of a class that
    is no dataclass).
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value.hex()  # infinite ones too, which are not JSON
    if isinstance(value, (Path, t.dtype, t.device)):
        return str(value)
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (Tensor, Module)):
        return digest_of_tensors(_tensors_of(value))
    if isinstance(value, (list, tuple, range)):
        return [described(item) for item in value]
    if isinstance(value, (Set, Mapping)):
        return _described_unordered(value)
    if isinstance(value, (FunctionType, MethodType, type, partial)):
        return _described_function(value)
    if is_dataclass(value):
        values = {f.name: described(getattr(value, f.name)) for f in fields(value)}
        return {"type": _name_of(type(value)), **values}
    raise ConfigError(
        f"{value!r:.80} is a {type(value).__name__}: two of them cannot be told apart by what "
        "they do, so that no result that depends on it can be kept. Use plain values, tensors, "
        "functions or a frozen dataclass of them."
    )


def _described_unordered(value: Any) -> Any:
    """Mappings keep no order; the texts of their keys are sorted."""
    if isinstance(value, Mapping):
        pairs = [[described(k), described(v)] for k, v in value.items()]
        return {"mapping": sorted(pairs, key=str)}
    return {"set": sorted((described(item) for item in value), key=str)}


def _described_function(value: Any) -> Any:
    if isinstance(value, partial):
        parts = {"args": value.args, "keywords": value.keywords}
        return {"partial": described(value.func), **described_fields(parts)}
    if isinstance(value, MethodType):
        return {"method": _name_of(value), "of": described(value.__self__)}
    found = {"function": _name_of(value)}
    if not f"{value.__module__}.".startswith(OURS):
        found["source"] = _source_digest(value)
    closure = inspect.getclosurevars(value).nonlocals if _has_closure(value) else {}
    return found | described_fields(closure)


def described_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Each value described."""
    return {name: described(value) for name, value in values.items()}


def _has_closure(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__closure__ is not None


def _name_of(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _source_digest(value: Any) -> str:
    """Of the file in which it stands: it may call others there. In a notebook, of its text."""
    try:
        path = inspect.getsourcefile(value)
        if path is not None and Path(path).is_file():
            return digest(Path(path).read_bytes())
        return digest(inspect.getsource(value).encode())
    except (OSError, TypeError):
        code = getattr(value, "__code__", None)
        return digest(
            b"" if code is None else code.co_code + repr(code.co_consts).encode()
        )


# ----------------------------------------------------------------------- weights, prompts


def digest(content: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _tensors_of(value: Tensor | Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield "", value
    else:
        yield from value.named_parameters()
        yield from value.named_buffers()


def digest_of_tensors(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """A hash over names, shapes, types and values."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        total.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        total.update(values.reshape(-1).view(t.uint8).numpy().tobytes())
    return total.hexdigest()


def digest_of_folder(folder: Path) -> str:
    """A hash over a model's files: names and contents."""
    total = hashlib.sha256()
    paths = {path for pattern in WEIGHT_FILES for path in folder.glob(pattern)}
    for path in sorted(paths):
        total.update(f"{path.name} ".encode())
        total.update(_digest_of_file(path).encode())
    return total.hexdigest()


def _digest_of_file(path: Path) -> str:
    real = path.resolve()
    if real.parent.name == "blobs":  # the hub's cache names a file by its content's hash
        return real.name
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            total.update(chunk)
    return total.hexdigest()


def version_of(package: str) -> str:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
