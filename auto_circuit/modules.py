"""Modules by name, and stand-ins for what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from auto_circuit.checks import checked
from auto_circuit.errors import (
    GraphError,
    near_matches,
)


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


@contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the owner has this attribute. Not by setattr, as above."""
    attributes = owner.__dict__
    had, before = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        if had:
            attributes[name] = before
