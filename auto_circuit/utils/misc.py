"""Paths, result files, modules by name, and a look at what a model predicts.

Result files never contain code: tensors are stored as safetensors, everything else as
JSON. Nothing is pickled, and loading a file runs nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import Enum
from functools import reduce
from hashlib import sha256
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch as t
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from auto_circuit.checks import checked
from auto_circuit.errors import (
    ConfigError,
    DataError,
    FileError,
    GraphError,
    near_matches,
)
from auto_circuit.files import checked_file_name, checksum, read_bytes, write_bytes
from auto_circuit.types import AblationType, EdgeCounts, PatchType

PACKAGE_DIR = Path(__file__).resolve().parent.parent
TREE_KEY = "auto_circuit_tree"
CHECKSUM_KEY = "auto_circuit_checksum"
STORED_ENUMS: dict[str, type[Enum]] = {
    enum.__name__: enum for enum in (AblationType, EdgeCounts, PatchType)
}

# ------------------------------------------------------------------------------ paths


def repo_path_to_abs_path(path: Path | str) -> Path:
    """Where a path that is relative to the repository is on this machine.

    What exists in the checkout is meant first, then what exists in the installed
    package (which ships `datasets/`). A path that exists in neither is a new one: in
    the checkout, or in the working directory if the package is installed. An absolute
    path stays as it is.

    Differs from auto-circuit, which looked in (and wrote to) `site-packages` when it
    was installed.
    """
    root = _checkout_root()
    homes = [PACKAGE_DIR] if root is None else [root, PACKAGE_DIR]
    for home in homes:
        if (home / path).exists():
            return home / path
    return (root or Path.cwd()) / path


def _checkout_root() -> Path | None:
    """The repository that this code is in, or None if the package is installed."""
    root = PACKAGE_DIR.parent
    return root if (root / "pyproject.toml").is_file() else None


# ------------------------------------------------------------------------------ files


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
    Differs from auto-circuit: no pickle, and the path is returned.
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
    Differs from auto-circuit: pickles are not read, because loading one can run code.
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


# ---------------------------------------------------------------------------- modules


@checked
def module_by_name(model: Module, module_name: str) -> Module:
    """The submodule at a dotted name, of the wrapped model if `model` wraps one.

    At a node of a PatchableModel it is the PatchWrapper there, which has the mask, as in
    auto-circuit; of its `wrapped_model` it is always the module itself. Raises GraphError
    if there is none.
    """
    wrappers = model.__dict__.get("_wrappers_by_name", {})
    if module_name in wrappers:
        return wrappers[module_name]
    root = getattr(model, "wrapped_model", model)
    try:
        module = reduce(getattr, module_name.split(".") if module_name else [], root)
    except AttributeError:
        module = None
    if not isinstance(module, Module):
        names = [name for name, _ in root.named_modules()]
        raise GraphError(
            f"{type(root).__name__} has no module {module_name!r}."
            + near_matches(module_name, names)
        )
    return module


@checked
def set_module_by_name(model: Module, module_name: str, new_module: Module) -> None:
    """Put a module in the place of the one at a dotted name.

    Raises GraphError if there is no module at that name, or it is a node of a
    PatchableModel.
    """
    if module_name in model.__dict__.get("_wrappers_by_name", {}):
        raise GraphError(
            f"{module_name!r} is a node of this PatchableModel, whose patches go through the "
            "module that is there. Change the model first, and make it patchable then."
        )
    module_by_name(model, module_name)
    parent_name, _, name = module_name.rpartition(".")
    if not name:
        raise GraphError("The model itself cannot be replaced: give a submodule's name.")
    setattr(module_by_name(model, parent_name), name, new_module)


@contextmanager
def replaced_forward(module: Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a call of the module runs this, and the module's hooks as ever."""
    # Not by setattr: TransformerLens's modules hand some attributes on to others.
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


@contextmanager
def remove_hooks() -> Iterator[set[RemovableHandle]]:
    """A set for the handles of hooks, all of which are removed on exit."""
    handles: set[RemovableHandle] = set()
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@checked
def percent_gpu_mem_used(total_gpu_mib: int | float | None = None) -> str:
    """How much of the GPU's memory torch has allocated, such as "12.5%".

    total_gpu_mib: the memory in MiB; what the current device reports if None.
    "0.0%" without a GPU.
    """
    if not t.cuda.is_available():
        return "0.0%"
    if total_gpu_mib is None:
        total_gpu_mib = t.cuda.mem_get_info()[1] / 2**20
    return f"{100 * t.cuda.memory_allocated() / 2**20 / total_gpu_mib:.1f}%"


# ------------------------------------------------------------------------ predictions


class TokenRank(NamedTuple):
    """A token's place among a model's predictions; the most likely has rank 0."""

    rank: int
    token: str
    logit: float
    prob: float


@checked
def top_tokens(
    model: Any, logits: Float[Tensor, "vocab"], top_k: int = 10
) -> list[TokenRank]:
    """The `top_k` tokens with the highest logits, best first."""
    ids = logits.topk(min(top_k, logits.numel())).indices.tolist()
    return [_token_rank(model, logits, token_id) for token_id in ids]


def _token_rank(model: Any, logits: Tensor, token_id: int) -> TokenRank:
    rank = int((logits > logits[token_id]).sum())
    prob = float(logits.float().softmax(-1)[token_id])
    token = model.to_str_tokens(t.tensor([token_id]))[0]
    return TokenRank(rank, token, float(logits[token_id]), prob)


@checked
def run_prompt(
    model: Any,
    prompt: str,
    answer: str | None = None,
    top_k: int = 10,
    prepend_bos: bool = False,
) -> None:
    """Print a model's best next tokens for a prompt, and the rank of an answer.

    Raises DataError if the answer is not one token.
    """
    tokens = model.to_tokens(prompt, prepend_bos=prepend_bos)
    print("Prompt:", model.to_str_tokens(tokens[0]))
    with t.no_grad():
        logits = model(tokens)[0, -1]
    get_most_similar_embeddings(model, logits, answer, top_k)


@checked
def get_most_similar_embeddings(
    model: Any,
    out: Float[Tensor, "d"],
    answer: str | None = None,
    top_k: int = 10,
    apply_ln_final: bool = False,
    apply_unembed: bool = False,
    apply_embed: bool = False,
) -> None:
    """Print the tokens whose embeddings are most similar to a vector.

    out: logits, or a residual-stream vector with `apply_unembed` (compare with the
        unembedding) or `apply_embed` (with the embedding).
    answer: a token whose rank is printed too. apply_ln_final: normalise first.

    Raises ConfigError for both embeddings at once, DataError if the answer is not one
    token.
    """
    if apply_unembed and apply_embed:
        raise ConfigError("Give `apply_unembed` or `apply_embed`, not both.")
    with t.no_grad():
        vector = out[None, None]
        if apply_ln_final:
            vector = model.ln_final(vector)
        if apply_unembed:
            vector = model.unembed(vector)
        if apply_embed:
            vector = vector @ model.W_E.T
    logits = vector[0, 0]
    for row in top_tokens(model, logits, top_k):
        _print_rank(row)
    if answer is not None:
        print("Answer:")
        _print_rank(_token_rank(model, logits, _single_token(model, answer)))


def _single_token(model: Any, answer: str) -> int:
    ids = model.to_tokens(answer, prepend_bos=False)[0].tolist()
    if len(ids) != 1:
        raise DataError(f"The answer {answer!r} is {len(ids)} tokens; give a single one.")
    return ids[0]


def _print_rank(row: TokenRank) -> None:
    print(
        f"{row.rank:>6}  {row.token!r:<20} logit {row.logit:8.3f}  prob {row.prob:7.2%}"
    )
