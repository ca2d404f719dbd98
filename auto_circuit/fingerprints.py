"""What a result depends on, as plain data that a cell's key is made from.

Equal descriptions mean equal results: weights and tensors count by their values, prompt files
by their bytes, functions of users by the text of their file. The library's own functions count
by their names and by `store.RESULTS_VERSION`, so that a new version that gives the same
numbers computes nothing again.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from importlib import metadata
from pathlib import Path
from types import (
    BuiltinFunctionType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch as t
from torch import Tensor
from torch.nn import Module

from auto_circuit.errors import ConfigError

OURS = "auto_circuit."
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")
"""What a folder of a model's weights and tokenizer holds."""
LIBRARIES = tuple(
    Path(sysconfig.get_path(kind)).resolve()
    for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)
"""Where functions do not change from one day to the next."""
FOR_READERS = MappingProxyType({"for_readers": True})
"""The metadata of a dataclass's field that says something and changes no result."""


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
    if isinstance(value, Tensor):
        return digest_of_tensors([("", value)])
    if isinstance(value, Module):
        return _described_module(value)
    if isinstance(value, (list, tuple, range)):
        return [described(item) for item in value]
    if isinstance(value, (Set, Mapping)):
        return _described_unordered(value)
    if isinstance(value, (BuiltinFunctionType, FunctionType, MethodType, type, partial)):
        return _described_function(value)
    if is_dataclass(value):
        counting = [f.name for f in fields(value) if not f.metadata.get("for_readers")]
        values = {name: described(getattr(value, name)) for name in counting}
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


def _described_module(module: Module) -> dict[str, Any]:
    """Its values, and its structure as it is printed."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    config = getattr(getattr(module, "original_model", module), "config", None)
    shown = [repr(module), getattr(config, "to_json_string", str)()]
    structure = re.sub("0x[0-9a-f]+", "", " ".join(shown))  # addresses
    return {
        "tensors": digest_of_tensors(tensors),
        "structure": digest(structure.encode()),
    }


# ------------------------------------------------------------------------------ functions


def _described_function(value: Any) -> Any:
    if isinstance(value, partial):
        parts = {"args": value.args, "keywords": value.keywords}
        return {"partial": described(value.func), **described_fields(parts)}
    if isinstance(value, MethodType):
        return {"method": _name_of(value), "of": described(value.__self__)}
    found = {"function": _name_of(value)}
    is_ours = f"{value.__module__}.".startswith(OURS)
    if not is_ours and not isinstance(value, BuiltinFunctionType):
        found |= _described_source(value)
    if not is_ours and isinstance(value, FunctionType):
        found["defaults"] = described([value.__defaults__, value.__kwdefaults__])
    # What our own decorators enclose says nothing that the function's name does not say.
    if isinstance(value, FunctionType) and not (
        is_ours and hasattr(value, "__wrapped__")
    ):
        enclosed = inspect.getclosurevars(value).nonlocals
        # One that calls itself encloses itself.
        found |= described_fields({k: v for k, v in enclosed.items() if v is not value})
    return found


def described_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Each value described."""
    return {name: described(value) for name, value in values.items()}


def _name_of(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _described_source(value: Any) -> dict[str, Any]:
    """The text of the user's files that it can reach; in a notebook, of what it calls."""
    module = sys.modules.get(value.__module__)
    if _file_of(module) is not None:
        return {"source": sorted(map(_digest_of_file, _own_files(module)))}
    if not isinstance(value, FunctionType):
        return {"source": [_text_digest(value)]}
    functions, values = _reached_in_notebook(value)
    return {"source": [_text_digest(f) for f in functions], **described_fields(values)}


def _file_of(module: ModuleType | None) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if name and Path(name).is_file() else None


def _own_files(module: ModuleType | None) -> list[Path]:
    """Its file, and those of the user's own modules that it has imported from."""
    found: dict[Path, None] = {}
    todo = [module]
    while todo:
        one = todo.pop()
        path = _file_of(one)
        if path is None or path in found or not _is_own(path):
            continue
        found[path] = None
        todo += [_module_of(value) for value in vars(one).values()]
    return list(found)


def _module_of(value: Any) -> ModuleType | None:
    kind = type(value)  # some objects answer `isinstance` with a warning
    if issubclass(kind, ModuleType):
        return value
    is_code = issubclass(kind, (FunctionType, type))
    return sys.modules.get(value.__module__) if is_code else None


def _is_own(path: Path) -> bool:
    ours = Path(__file__).resolve().parent
    return not any(path.is_relative_to(folder) for folder in (*LIBRARIES, ours))


def _reached_in_notebook(
    function: FunctionType,
) -> tuple[list[FunctionType], dict[str, Any]]:
    """The functions of the notebook that it calls, and the values that these use."""
    functions, values = [function], {}
    for one in functions:  # it grows meanwhile
        for name, value in inspect.getclosurevars(one).globals.items():
            if not isinstance(value, FunctionType) or value.__module__ != one.__module__:
                if not isinstance(value, ModuleType):
                    values[name] = value
            elif value not in functions:
                functions.append(value)
    return functions, dict(sorted(values.items()))


def _text_digest(value: Any) -> str:
    try:
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


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
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
