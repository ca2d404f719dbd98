"""Equal descriptions for what gives equal results, and for nothing else."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit.errors import ConfigError
from auto_circuit.fingerprints import described, digest_of_folder
from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRICS
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS
from auto_circuit.types import AblationType, PatchType


@dataclass(frozen=True)
class Pair:
    x: Any
    y: Any = None


@dataclass(frozen=True)
class Other:
    x: Any
    y: Any = None


def text(value: Any) -> str:
    return json.dumps(described(value), allow_nan=False)


VALUES = [
    *(None, True, False, 0, 1, 1.0, -1, 0.1, float("inf"), float("nan"), "", "1", "None"),
    *([], [1], [[1]], [1, 2], [2, 1], {1, 2}, {"a": 1}, {"a": 2}, {1: "a"}),
    *(AblationType.ZERO, AblationType.RESAMPLE, PatchType.EDGE_PATCH),
    *(Pair(1), Pair(1, 2), Pair(2), Other(1), Pair(Pair(1)), Path("a"), t.float32),
    *(t.zeros(2), t.zeros(1, 2), t.zeros(2).double(), t.tensor([0.0, 1.0]), t.zeros(0)),
    *(len, print, Pair, partial(print, 1), partial(print, end=""), t.nn.Linear(1, 1)),
]


def test_what_differs_is_described_differently() -> None:
    texts = [text(value) for value in VALUES]
    for i, one in enumerate(texts):
        same = [VALUES[j] for j, other in enumerate(texts) if other == one and j != i]
        assert not same, (VALUES[i], same)


def test_what_is_the_same_is_described_the_same() -> None:
    assert text({"a": 1, "b": [2]}) == text({"b": (2,), "a": 1})
    assert text({3, 1, 2}) == text({2, 3, 1})
    assert text(t.arange(6).view(2, 3).T) == text(t.arange(6).view(2, 3).T.contiguous())
    assert text(t.ones(2).requires_grad_()) == text(t.ones(2))
    t.manual_seed(0)
    first = t.nn.Linear(2, 2)
    t.manual_seed(0)
    assert text(first) == text(t.nn.Linear(2, 2))


def test_what_cannot_be_told_apart_is_refused() -> None:
    for value in (object(), iter([]), sys.stdout, [object()], {"a": object()}):
        with pytest.raises(ConfigError, match="cannot be told apart"):
            described(value)


def closing_over(value: Any) -> Any:
    return lambda model: value


def test_what_a_function_encloses_and_its_defaults_count() -> None:
    assert text(closing_over(1)) != text(closing_over(2))
    assert text(closing_over([1])) == text(closing_over([1]))
    assert text(lambda x=1: x) != text(lambda x=2: x)


def test_all_algorithms_and_metrics_can_be_described() -> None:
    algos = {text(algo.with_seed(3).func) for algo in PRUNE_ALGOS}
    assert len(algos) == len(PRUNE_ALGOS)
    assert len({text(metric) for metric in PRUNE_METRICS}) == len(PRUNE_METRICS)


SCRIPT = """
import json, sys
sys.path.insert(0, ".")
from mine import score
from auto_circuit.fingerprints import described
print(json.dumps(described([score, {"b", "a"}])))
"""


def of_script(folder: Path, hash_seed: int) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def users_files(folder: Path, helper: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(
        "from helper import half\ndef score(m): return half(m)"
    )
    (folder / "helper.py").write_text(helper)
    return folder


def of_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of the user's function, whose files were not imported before."""
    with monkeypatch.context() as patched:
        patched.syspath_prepend(folder)
        for name in ("mine", "helper"):
            patched.delitem(sys.modules, name, raising=False)
        return text(importlib.import_module("mine").score)


def test_a_users_files_count_also_those_that_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, third = "def half(x): return x / 2", "def half(x): return x / 3"
    texts = []
    for name, helper in (("a", half), ("b", half), ("c", third)):
        folder = users_files(tmp_path / name, helper)
        texts.append(of_files(folder, monkeypatch))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
def test_a_users_files_count_in_every_process_alike(tmp_path: Path) -> None:
    users_files(tmp_path, "def half(x): return x / 2")
    before = of_script(tmp_path, 1)
    assert of_script(tmp_path, 2) == before
    (tmp_path / "helper.py").write_text("def half(x): return x / 3")
    assert of_script(tmp_path, 1) != before


NOTEBOOK = """
import torch
factor = {factor}
def half(x):
    return x * factor
def score(model):
    return half(model) + torch.ones(1)
"""


def in_notebook(source: str) -> Any:
    """The function `score` of a notebook: no file has it."""
    names: dict[str, Any] = {"__name__": "__no_file__"}
    exec(compile(source, "<cell>", "exec"), names)
    return names["score"]


def test_what_a_notebooks_function_reaches_counts() -> None:
    one = in_notebook(NOTEBOOK.format(factor=2))
    assert text(one) == text(in_notebook(NOTEBOOK.format(factor=2)))
    assert text(one) != text(in_notebook(NOTEBOOK.format(factor=3)))
    other = NOTEBOOK.replace("x * factor", "x / factor")
    assert text(one) != text(in_notebook(other.format(factor=2)))


def test_a_folder_of_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    before = digest_of_folder(tmp_path)
    (tmp_path / "README.md").write_text("no part of the model")
    assert digest_of_folder(tmp_path) == before
    (tmp_path / "config.json").write_text("{ }")
    assert digest_of_folder(tmp_path) != before


def test_what_is_said_to_readers_is_no_part_of_a_key() -> None:
    (warm,) = (algo for algo in PRUNE_ALGOS if algo.short_name == "EP quick")
    start = warm.func.keywords["warm_start"]  # type: ignore[attr-defined]
    silent = replace(start, notes=replace(start.notes, idea=""))
    assert start.notes.idea and text(silent) == text(start)
    metric = PRUNE_METRICS[0]
    assert metric.question and text(replace(metric, question="")) == text(metric)
    assert text(replace(metric, log_x=not metric.log_x)) != text(metric)
