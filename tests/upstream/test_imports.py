"""Every name that a module of auto-circuit imports from another can be had from ours too."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

# Module -> what it imports from auto_circuit; made by `list_imports.py`.
IMPORTS: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "imports.json").read_text()
)


@pytest.mark.parametrize("module_name", IMPORTS)
def test_imported_names(module_name: str) -> None:
    module = importlib.import_module(f"auto_circuit.{module_name}")
    missing = [name for name in IMPORTS[module_name] if not hasattr(module, name)]
    # `types` is at the bottom, and imports nothing of ours.
    assert missing == (["module_by_name"] if module_name == "types" else [])


def test_they_are_the_same_objects() -> None:
    prune = importlib.import_module("auto_circuit.prune")
    ablations = importlib.import_module("auto_circuit.utils.ablation_activations")
    assert prune.src_ablations is ablations.src_ablations
    with pytest.raises(AttributeError, match="no attribute 'src_ablation'"):
        _ = prune.src_ablation
    with pytest.raises(ImportError, match="cannot import name 'src_ablation'"):
        exec("from auto_circuit.prune import src_ablation")
