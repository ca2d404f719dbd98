"""Blocks that keep only their inputs, and run again in the backward pass.

A block's hooks act twice then, in the pass and when it runs again. The second time what its
sources write is known, and the slots of the buffer belong to what comes after them: nothing is
recorded, and what a slot held is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch as t
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


def run_twice(
    first: Callable[..., Any],
    again: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What `first` gives; `again` runs in the backward pass, to make what that needs.

    Keys and values that an earlier pass left (a prefix's) are put back for it, as a block adds
    its own to them.
    """
    if not t.is_grad_enabled():
        return first(*args, **kwargs)
    caches = _caches([*args, *kwargs.values()])
    states = [_state(cache) for cache in caches]
    has_run = False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal has_run
        if not has_run:
            has_run = True
            return first(*args, **kwargs)
        for cache, state in zip(caches, states, strict=True):
            _put_back(cache, state)
        return again(*args, **kwargs)

    # To the end: what is half done would hold on to memory.
    with set_checkpoint_early_stop(False):
        return checkpoint(run, *args, use_reentrant=False, **kwargs)


def kept_as_they_are() -> AbstractContextManager[Any]:
    """Inside, tensors that a backward pass needs are kept, whatever runs again."""
    return t.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)


@contextmanager
def flagged(owner: Any, name: str) -> Iterator[None]:
    """Inside, an attribute is True."""
    before = getattr(owner, name)
    setattr(owner, name, True)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _caches(values: list[Any]) -> list[Any]:
    return [v for v in values if isinstance(getattr(v, "layers", None), list)]


def _state(cache: Any) -> list[tuple[Any, dict[str, Any]]]:
    return [(layer, dict(vars(layer))) for layer in cache.layers]


def _put_back(cache: Any, state: list[tuple[Any, dict[str, Any]]]) -> None:
    cache.layers[:] = [layer for layer, _ in state]
    for layer, values in state:
        vars(layer).clear()
        vars(layer).update(values)
