"""Hooks that others have put on a model's modules.

The engine computes some things by itself: what single heads read, the residual stream of a
run in which most edges are patched. Hooks of users are called all the same, and see what
they would see in the model as it is. What they change either takes effect or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module

from auto_circuit.errors import GraphError
from auto_circuit.utils.torch_state import all_modules

LIBRARIES = ("auto_circuit.", "transformer_lens.model_bridge.", "transformers.")
"""Hooks from here are a part of the model, or of the engine."""
WIRING = "transformer_lens.model_bridge.component_setup"
"""Where hooks come from that TransformerLens puts in as if it were a user (OPT)."""

ELSEWHERE = (
    "Remove it, or hook what is before (`hook_resid_pre`) or after (`hook_q`, `hook_k`, "
    "`hook_v`)."
)


@dataclass(frozen=True, eq=False)
class Bypassed:
    """A module that the model runs, but that the engine computes nothing from.

    gives: is that so for what it gives as well, or only for what it is given?
    """

    name: str
    module: Module
    gives: bool = True


class UserHooks:
    """Looks for users' hooks on the modules that a model has now."""

    def __init__(self, model: Module) -> None:
        # To walk through a model's modules again would take longer than all the rest.
        self._by_module = tuple(
            hooks
            for module in all_modules(model)
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        )

    def ids(self) -> list[int]:
        """What tells them apart: no two hooks of one process have the same."""
        by_module = filter(None, self._by_module)
        return [
            id for hooks in by_module for id, hook in hooks.items() if _is_users(hook)
        ]


def _is_users(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    if getattr(_given(hook), "__module__", None) == WIRING:
        return False
    return not str(getattr(hook, "__module__", "")).startswith(LIBRARIES)


def _given(hook: Any) -> Any:
    """What `HookPoint.add_hook` was given, if this hook is made by it."""
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    is_made = getattr(hook, "__qualname__", "").startswith("HookPoint.add_hook.")
    if not is_made or "hook" not in names:
        return hook
    return hook.__closure__[names.index("hook")].cell_contents


@contextmanager
def changes_refused(places: Iterable[Bypassed]) -> Iterator[None]:
    """Inside, users' hooks at these places raise GraphError if they change anything.

    Those that are there on entry; hooks that only look on are called as ever.
    """
    replaced: list[tuple[dict[int, Any], int, Any, Any]] = []
    for place in places:
        kinds = [(place.module._forward_pre_hooks, _inputs)]
        if place.gives:
            kinds.append((place.module._forward_hooks, _output))
        for hooks, passing in kinds:
            for key, hook in hooks.items():
                if _is_users(hook):
                    watched = partial(_watched, place.name, hook, passing)
                    replaced.append((hooks, key, hook, watched))
    for hooks, key, _, watched in replaced:
        # The same key: its owner's handle still removes it.
        hooks[key] = watched
    try:
        yield
    finally:
        for hooks, key, hook, watched in replaced:
            if hooks.get(key) is watched:
                hooks[key] = hook


def check_no_backward_hooks(places: Iterable[Bypassed]) -> None:
    """Raise GraphError for hooks that would see only a part of the gradients."""
    for place in places:
        if place.module._backward_hooks or place.module._backward_pre_hooks:
            raise GraphError(
                f"There is a backward hook at `{place.name}`, which would not see the "
                "gradients of heads: in `patch_mode` what heads read is computed from the "
                f"residual stream. {ELSEWHERE}"
            )


def _watched(
    name: str,
    hook: Callable[..., Any],
    passing: Callable[[tuple[Any, ...]], Any],
    module: Module,
    *args: Any,
) -> Any:
    """Call a hook, which may change neither what passes nor its gradient."""
    before = _tensors(passing(args))
    states = [_state(x) for x in before]
    result = hook(module, *args)
    after = before if result is None else _tensors(result)
    if len(after) != len(before) or [_state(x) for x in after] != states:
        raise GraphError(
            f"A hook at `{name}` changes what passes there, which heads with patched edges "
            "would not see: in `patch_mode` what they read is computed from the residual "
            f"stream. {ELSEWHERE}"
        )
    return result


def _inputs(args: tuple[Any, ...]) -> Any:
    return args  # (inputs, keyword inputs?)


def _output(args: tuple[Any, ...]) -> Any:
    return args[-1]  # of (inputs, keyword inputs?, output)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _state(x: Tensor) -> tuple[Any, ...]:
    """What changes if a tensor, or its gradient, is another one or is changed in place."""
    place = (x.data_ptr(), x.dtype, x.shape, x.stride())
    version = None if x.is_inference() else x._version
    return (*place, version, x.requires_grad, bool(x._backward_hooks))
