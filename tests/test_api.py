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
PRIVATE = "__init_complete__"  # of auto-circuit's Task: not for users


@pytest.mark.parametrize("name", API)
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
