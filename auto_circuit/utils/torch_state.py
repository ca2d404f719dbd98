"""The state of torch in which models run: the same, whatever the caller's is.

Train mode, gradients switched off, inference mode, autocast, another default dtype or
default device would each change numbers, or break the next call. A pass of ours runs in one
state, and the caller's is restored after it, also if it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch as t
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import Module

AUTOCAST_DEVICES = ("cpu", "cuda", "mps")

Args = ParamSpec("Args")
Result = TypeVar("Result")


@contextmanager
def own_computation(grad: bool | None = None) -> Iterator[None]:
    """Inside: neither inference mode nor autocast, and gradients on or off.

    grad: None leaves gradients as they are (in inference mode they are off).
    """
    wants_grad = t.is_grad_enabled() if grad is None else grad
    with ExitStack() as stack:
        if t.is_inference_mode_enabled():
            stack.enter_context(t.inference_mode(False))
        if t.is_grad_enabled() != wants_grad:  # leaving inference mode turns them on
            stack.enter_context(t.enable_grad() if wants_grad else t.no_grad())
        for device_type in AUTOCAST_DEVICES:
            if t.is_autocast_enabled(device_type):
                stack.enter_context(t.autocast(device_type, enabled=False))
        yield


@contextmanager
def own_defaults() -> Iterator[None]:
    """Inside, new tensors are float32 on the CPU, if nothing else is said."""
    dtype = t.get_default_dtype()
    with ExitStack() as stack:
        # Only if need be: a device context slows every operation.
        if t.get_default_device().type != "cpu":
            stack.enter_context(t.device("cpu"))
        if dtype != t.float32:
            stack.callback(t.set_default_dtype, dtype)
            t.set_default_dtype(t.float32)
        yield


@contextmanager
def eval_mode(model: Module) -> Iterator[None]:
    """Inside, all modules are in eval mode; on exit, each is in the mode that it was in."""
    # There are thousands: only those are touched that are not as they should be.
    modules = list(all_modules(model))
    in_training = {module for module in modules if module.training}
    # Not by setattr: TransformerLens's modules hand attributes on to those that they wrap.
    try:
        for module in in_training:
            module.__dict__["training"] = False
        yield
    finally:
        # Of all: somebody may have called `model.train()` inside.
        for module in modules:
            if module.training != (module in in_training):
                module.__dict__["training"] = module in in_training


@contextmanager
def own_state(model: object, grad: bool | None = None) -> Iterator[None]:
    """Inside: all of the above, for a model (or for an object that wraps one, or is none)."""
    root = getattr(model, "wrapped_model", model)
    with ExitStack() as stack:
        stack.enter_context(own_computation(grad))
        stack.enter_context(own_defaults())
        if isinstance(root, Module):
            stack.enter_context(eval_mode(root))
        yield


def in_own_state(
    grad: bool | None = None,
) -> Callable[[Callable[Args, Result]], Callable[Args, Result]]:
    """A decorator: a function whose first argument is a model runs inside `own_state`."""

    def decorate(function: Callable[Args, Result]) -> Callable[Args, Result]:
        @wraps(function)
        def in_state(*args: Args.args, **kwargs: Args.kwargs) -> Result:
            model: Any = args[0] if args else kwargs.get("model")
            with own_state(model, grad):
                return function(*args, **kwargs)

        return in_state

    return decorate


def all_modules(model: Module) -> Iterator[Module]:
    """Every module that a model runs.

    TransformerLens keeps the Hugging Face model that it runs out of its own children, and
    does not list all of its modules (GPT-2's first dropout).
    """
    seen: set[Module] = set()
    waiting: list[Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        waiting += module._modules.values()
        waiting.append(module.__dict__.get("original_model"))
        yield module


def ordinary(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The tensor, or a copy if it was made in inference mode: autograd refuses those."""
    return tensor.clone() if tensor.is_inference() else tensor
