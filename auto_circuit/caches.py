"""Result files: anything made of tensors, numbers and texts, with a checksum.

Result files never contain code: tensors are stored as safetensors, everything else as
JSON. Nothing is pickled, and loading a file runs nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from hashlib import sha256
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch as t
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.errors import (
    DataError,
    FileError,
)
from auto_circuit.files import (
    checked_file_name,
    checksum,
    read_bytes,
    repo_path_to_abs_path,
    write_bytes,
)
from auto_circuit.types import AblationType, EdgeCounts, PatchType

STORED_ENUMS: dict[str, type[Enum]] = {
    enum.__name__: enum for enum in (AblationType, EdgeCounts, PatchType)
}

TREE_KEY = "auto_circuit_tree"


CHECKSUM_KEY = "auto_circuit_checksum"


@checked
def save_cache(
    data_dict: Mapping[Any, Any], folder_name: str, base_filename: str
) -> Path:
    """Save nested results in a new file and return its path.

    data_dict: dicts, lists and tuples, nested at will, of tensors, numbers, text, None,
        AblationType, PatchType and EdgeCounts; the dicts' keys too. So PruneScores,
        TaskPruneScores, Measurements and AblationMeasurements.
    folder_name: a folder of the repository, made if need be (`repo_path_to_abs_path`).
    base_filename: the file is `<base>-dd-mm-YYYY_HH-MM-SS.safetensors`, or `.json` if
        there are no tensors. No existing file is overwritten.

    Raises DataError for a value of another type (it says where it is), ConfigError for a
    name that leaves the folder, FileError if nothing can be written there.
    """
    checked_file_name("base_filename", base_filename)
    tensors: dict[str, Tensor] = {}
    content = _file_content(data_dict, tensors)
    timestamp = datetime.now().strftime("%d-%m-%Y_%H-%M-%S")
    suffix = ".safetensors" if tensors else ".json"
    path = _new_file(folder_name, f"{base_filename}-{timestamp}", suffix)
    try:
        write_bytes(path, content)
    except FileError:
        path.unlink(missing_ok=True)
        raise
    return path


def _file_content(data: Mapping[Any, Any], tensors: dict[str, Tensor]) -> bytes:
    """The data as the bytes of a file; its tensors are put into `tensors`."""
    try:
        tree = _to_tree(data, (), tensors)
        if not tensors:
            return json.dumps({"checksum": checksum(tree), "tree": tree}).encode()
        text = json.dumps(tree, allow_nan=False)
        metadata = {TREE_KEY: text, CHECKSUM_KEY: _checksum(text, tensors)}
        return save(tensors, metadata)
    except DataError:
        raise
    except (RecursionError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise DataError(f"Cannot save these data: {error}.") from error


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """What changes if a tensor, its name or type, or the text changes."""
    digest = sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(t.uint8).numpy().tobytes())
    return digest.hexdigest()


@checked
def load_cache(folder_name: str, filename: str) -> dict[Any, Any]:
    """Load what `save_cache` saved: equal values, equal types, tensors on the CPU.

    Raises DataError if there is no such file, `save_cache` did not write it, or it is
    damaged; FileError for what cannot be read.
    Pickles, such as auto-circuit wrote, are not read: loading one can run code.
    """
    path = repo_path_to_abs_path(Path(folder_name) / filename)
    content = read_bytes(path)
    try:
        if path.suffix == ".json":
            return _json_content(content)
        if path.suffix == ".safetensors":
            return _safetensors_content(content)
    except (
        AttributeError,
        DataError,
        KeyError,
        OverflowError,
        RecursionError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        raise DataError(
            f"{path} is not a file of `save_cache`, or it is damaged ({error})."
        ) from error
    raise DataError(
        f"{path} is neither .safetensors nor .json. Pickles (.pkl, .pt) are not "
        "loaded, because they can run code."
    )


def _json_content(content: bytes) -> dict[Any, Any]:
    found = json.loads(content.decode())
    if found["checksum"] != checksum(found["tree"]):
        raise DataError("its checksum is wrong")
    return _from_tree(found["tree"], {})


def _safetensors_content(content: bytes) -> dict[Any, Any]:
    tensors = load(content)
    header_size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + header_size])["__metadata__"]
    text = metadata[TREE_KEY]
    if metadata[CHECKSUM_KEY] != _checksum(text, tensors):
        raise DataError("its checksum is wrong")
    return _from_tree(json.loads(text), tensors)


def _new_file(folder_name: Path | str, stem: str, suffix: str) -> Path:
    """A path in the folder, `stem` and a number if need be, at which no file was."""
    folder = repo_path_to_abs_path(folder_name)
    n_tries = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = folder / f"{stem}{f'-{n_tries}' if n_tries else ''}{suffix}"
            try:
                path.touch(exist_ok=False)
                return path
            except FileExistsError:
                n_tries += 1
    except (OSError, ValueError) as error:
        raise FileError(f"Cannot write into the folder {folder}: {error}.") from error


def _to_tree(value: Any, where: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, in which {kind: content} stands for what JSON does not have.

    Tensors go to `tensors`, under a name made of the keys that lead to them.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Enum):
        return {"enum": [_enum_name(value, where), value.name]}
    if isinstance(value, Tensor):
        return {"tensor": _store(value, where, tensors)}
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else {"float": str(number)}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [_to_tree(k, where, tensors), _to_tree(v, (*where, str(k)), tensors)]
                for k, v in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        items = [_to_tree(v, (*where, str(i)), tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise _cannot_save(value, where)


def _enum_name(value: Enum, where: tuple[str, ...]) -> str:
    name = type(value).__name__
    if STORED_ENUMS.get(name) is not type(value):
        raise _cannot_save(value, where)
    return name


def _store(value: Tensor, where: tuple[str, ...], tensors: dict[str, Tensor]) -> str:
    name = "/".join(where)
    while name in tensors:
        name += "'"
    # A copy of its own: safetensors refuses tensors that share memory.
    tensors[name] = value.detach().cpu().clone(memory_format=t.contiguous_format)
    return name


def _cannot_save(value: Any, where: Sequence[str]) -> DataError:
    return DataError(
        f"Cannot save {value!r} (a {type(value).__name__}) at {'/'.join(where)!r}. "
        "Results may hold dicts, lists, tuples, tensors, numbers, text, None and "
        "members of "
        f"{', '.join(STORED_ENUMS)}."
    )


def _from_tree(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_to_tree` made JSON of."""
    if isinstance(tree, list):
        return [_from_tree(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "enum":
        class_name, name = content
        return STORED_ENUMS[class_name][name]
    if kind == "tuple":
        return tuple(_from_tree(item, tensors) for item in content)
    if kind == "dict":
        return {_from_tree(k, tensors): _from_tree(v, tensors) for k, v in content}
    raise KeyError(kind)
