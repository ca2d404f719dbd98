"""Every public name of auto-circuit 1.0.1 is here, with its parameters' names.

`upstream_api.json` maps "module:name" to the names of the parameters (or, for what is not a
function, to a word that this test does not look at).
"""

from __future__ import annotations

import importlib
import inspect
import json
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from torch.nn import Module

API: dict[str, Any] = json.loads(
    (Path(__file__).parent / "upstream_api.json").read_text()
)
# The issues that bring them: 3 (algorithms), 4 (the evaluation half).
TO_COME = ("auto_circuit.model_utils.sparse_autoencoders.",)
PRIVATE = "__init_complete__"  # of auto-circuit's Task: not for users


def is_to_come(name: str) -> bool:
    return name.startswith(TO_COME)


@pytest.mark.parametrize("name", [name for name in API if not is_to_come(name)])
def test_published_name(name: str) -> None:
    module_name, _, attribute = name.partition(":")
    ours = getattr(importlib.import_module(module_name), attribute)
    theirs = API[name]
    if not isinstance(theirs, list) or not callable(ours):
        return
    if (isinstance(ours, type) and issubclass(ours, Enum)) or {"args", "kwargs"} == set(
        theirs
    ):
        return
    function = (
        ours.__init__ if isinstance(ours, type) and issubclass(ours, Module) else ours
    )
    parameters = inspect.signature(function).parameters
    missing = [
        parameter for parameter in theirs if parameter not in (*parameters, PRIVATE)
    ]
    assert not missing, f"{name} lacks the parameters {missing}"


def test_what_is_to_come_is_not_here_yet() -> None:
    """Who adds one of these takes it off the list above."""
    for name in filter(is_to_come, API):
        module_name, _, attribute = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError:
            continue
        assert not hasattr(module, attribute), f"{name} is here: take it off TO_COME"
