"""docs/coming-from-auto-circuit.md: the code in its tables runs, or says what to do.

(Its code block runs in tests/test_readme.py.) What is written now runs; what was written there
runs too, or raises an error of ours, or warns.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit import data, experiment_utils, prune, tasks, types, visualize
from auto_circuit.errors import AutoCircuitError
from auto_circuit.metrics import (
    area_under_curve,
    area_under_curve_plot,
    prune_scores_similarity,
)
from auto_circuit.metrics.prune_metrics import kl_div, prune_metrics
from auto_circuit.prune_algos import (
    ACDC,
    activation_magnitude,
    mask_gradient,
    random_edges,
    subnetwork_probing,
)
from auto_circuit.tasks import POCKET_IOI_TASK, POCKET_MODEL
from auto_circuit.utils import ablation_activations, edge_counts, graph_utils, misc
from tests.micro import micro_loader, micro_model

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-auto-circuit.md"
MODULES = (
    *(data, experiment_utils, prune, tasks, types, visualize, area_under_curve),
    *(area_under_curve_plot, prune_scores_similarity, kl_div, prune_metrics, ACDC),
    *(activation_magnitude, mask_gradient, random_edges, subnetwork_probing),
    *(ablation_activations, edge_counts, graph_utils, misc),
)
CHANGELOG = PAGE.parents[1] / "CHANGELOG.md"
TABLE = re.compile(r"^\| what you wrote .*\n\|[-|]+\n((?:\|.*\n)+)", re.M)
CODE = re.compile(r"^`([^`]+)`$")


def _rows() -> list[tuple[str, str]]:
    """(code there, code here) of each row; "the same" is the code there."""
    rows = []
    for table in TABLE.findall(PAGE.read_text()):
        for line in table.splitlines():
            there, here, _ = (cell.strip() for cell in line.strip("|").split(" | ", 2))
            code = CODE.match(there)
            assert code, f"no code in {there!r}"
            now = code if here == "the same" else CODE.match(here)
            assert now, f"neither code nor 'the same' in {here!r}"
            rows.append((code[1], now[1]))
    return rows


ROWS = _rows()


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page says that there is, and what it calls by name."""
    task = replace(POCKET_IOI_TASK, batch_size=4, batch_count=1)
    model, loader = task.model, task.train_loader
    batch = next(iter(loader))
    scores, other = (
        random_edges.random_prune_scores(model, None, None, s) for s in (0, 1)
    )
    points = [(0, 3.0), (10, 2.0), (1519, 1.0)]
    return {
        **{name: value for module in MODULES for name, value in vars(module).items()},
        **{"task": task, "model": model, "loader": loader, "batch": batch},
        **{
            "dataset": loader.prompt_dataset,
            "x": batch.clean,
            "t": t,
            "replace": replace,
        },
        **{"micro": micro_model(), "micro_loader": micro_loader()},
        "acts": ablation_activations.src_ablations(model, batch.corrupt),
        **{"edges": ["A0.0->MLP 1"], "scores": scores, "other": other, "points": points},
        "infinite": {name: score / 0 for name, score in scores.items()},
        "by_task": {task.key: {"Random": points, "EAP": points}},
        **{
            "bridge": experiment_utils.load_tl_model(POCKET_MODEL),
            "cpu": t.device("cpu"),
        },
        "path": misc.repo_path_to_abs_path("datasets/pocket/ioi_prompts.json"),
    }


def _run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, PAGE.name, "exec"), dict(names))


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda figure: None)


@pytest.mark.parametrize("code", [now for _, now in ROWS])
def test_what_is_written_now_runs(code: str, names: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run(code, names)


@pytest.mark.parametrize("code", [there for there, now in ROWS if there != now])
def test_what_was_written_runs_or_says_what_to_do(
    code: str, names: dict[str, Any]
) -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            _run(code, names)
        except (AutoCircuitError, ImportError) as error:
            assert len(str(error)) > 20


def test_every_table_is_found() -> None:
    assert len(ROWS) == sum(
        line.startswith("| `") and line.count(" | ") == 2
        for line in PAGE.read_text().split("## Names that are gone")[0].splitlines()
    )
    assert len(ROWS) > 20


def test_the_mistakes_are_numbered_as_in_the_changelog() -> None:
    numbers = re.findall(r"^\| (\d+) \| ", PAGE.read_text(), re.M)
    assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1))
    named = re.findall(r"\((\d+(?:, \d+)*)\)", CHANGELOG.read_text())
    assert len(named) > 20
    assert {n for found in named for n in found.split(", ")} <= set(numbers)
