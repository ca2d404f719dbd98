"""Who runs a module: one thread at a time, and one PatchableModel's hooks at a time.

Patches act through hooks on the module, so they would act in everybody's pass. What is in
use is written on the module itself while it lasts, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

from torch.nn import Module

from auto_circuit.errors import GraphError

KEY = "_auto_circuit_use"


class ModuleUse:
    """What is going on with a module.

    thread, depth: the thread that has put hooks on it, and how many times.
    patched_by: the PatchableModel that patches it.
    readers: thread -> how many plain passes it is in.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.is_over = False
        self.thread: int | None = None
        self.depth = 0
        self.patched_by: object | None = None
        self.readers: dict[int, int] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> ModuleUse:
        """A copied module is in nobody's use."""
        return ModuleUse()


@contextmanager
def in_use(model: Any, by: object, patches: bool = False) -> Iterator[None]:
    """Inside, this thread alone may run the module, and put hooks on it.

    by: the PatchableModel. patches: will its hooks patch? Raises GraphError if another
    thread runs the module, or another PatchableModel patches it.
    """
    module, me = _module_that_runs(model), get_ident()
    with _changed(module) as use:
        _check(use, by, me, use.readers)
        use.thread, use.depth = me, use.depth + 1
        before = use.patched_by
        use.patched_by = by if patches else before
    try:
        yield
    finally:
        with _changed(module) as use:
            use.patched_by = before
            use.depth -= 1
            use.thread = me if use.depth else None


def is_in_use(model: Any) -> bool:
    """Does anybody run the module, or have hooks on it?"""
    use = _module_that_runs(model).__dict__.get(KEY)
    return use is not None and bool(use.depth or use.readers)


@contextmanager
def being_read(model: Any, by: object) -> Iterator[None]:
    """Inside, a plain pass runs, which others may run too, but without hooks."""
    module, me = _module_that_runs(model), get_ident()
    with _changed(module) as use:
        _check(use, by, me, {})
        use.readers[me] = use.readers.get(me, 0) + 1
    try:
        yield
    finally:
        with _changed(module) as use:
            use.readers[me] -= 1
            if not use.readers[me]:
                del use.readers[me]


def _check(use: ModuleUse, by: object, me: int, readers: dict[int, int]) -> None:
    if use.thread not in (None, me) or any(reader != me for reader in readers):
        raise GraphError(
            "Another thread runs this model. Edges are patched by hooks on the model "
            "itself, which would act in both threads' passes. Run one after the other "
            "(with a lock), or give each thread a copy of its own: "
            "`copy.deepcopy(patchable_model)`."
        )
    if use.patched_by is not None and use.patched_by is not by:
        raise GraphError(
            "Another PatchableModel over the same model is in `patch_mode`, and its "
            "patches would act in this pass too. Leave its `patch_mode` first, or work "
            "on a copy: `copy.deepcopy(patchable_model)`."
        )


@contextmanager
def _changed(module: Any) -> Iterator[ModuleUse]:
    """The module's use, to look at and to change; taken off the module when it is over."""
    while True:
        use = module.__dict__.setdefault(KEY, ModuleUse())
        with use.lock:
            if use.is_over:
                continue  # somebody has just taken it off
            try:
                yield use
            finally:
                if not use.depth and not use.readers:
                    use.is_over = True
                    module.__dict__.pop(KEY, None)
            return


def _module_that_runs(module: Any) -> Any:
    """The innermost one: a bridge, or a model with autoencoders, may share it."""
    while True:
        if not isinstance(module, Module):
            return module  # a stand-in of a test, say
        inner = module.__dict__.get(
            "original_model", module._modules.get("wrapped_model")
        )
        if inner is None:
            return module
        module = inner
