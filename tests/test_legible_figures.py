"""Every figure can be read at 1000 px: no text overlaps another or leaves the figure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import plotly.graph_objects as go
import pytest

from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.metrics.area_under_curve_plot import average_auc_plot
from auto_circuit.metrics.completeness_metrics.same_under_knockouts_plot import (
    same_under_knockouts_fig,
)
from auto_circuit.metrics.official_circuits.roc_plot import roc_plot
from auto_circuit.metrics.prune_metrics.prune_metrics import CLEAN_KL_DIV_METRIC
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_PERCENT_METRIC as PERCENT,
)
from auto_circuit.metrics.prune_metrics.prune_metrics_plot import edge_patching_plot
from auto_circuit.metrics.prune_scores_similarity_plot import similarity_fig
from auto_circuit.paper import GridRow
from auto_circuit.paper_plot import grid_fig
from auto_circuit.prune_algos.mask_training import TrainingStep
from auto_circuit.prune_algos.mask_training_plot import mask_training_fig
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS
from auto_circuit.robustness import Choices, RobustnessRow, variations
from auto_circuit.robustness_plot import robustness_fig
from auto_circuit.tasks import POCKET_MODEL, TASKS
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.visualize import draw_seq_graph
from tests.legible import browser_page, problems

SIZES = (0, 1, 5, 20, 100, 500, 1519)


def tasks(n: int) -> list[str]:
    return sorted((task.key for task in TASKS), key=len, reverse=True)[:n]


def algos(n: int) -> list[str]:
    """The longest names first, of which there may not be enough."""
    names = sorted((algo.short_name for algo in PRUNE_ALGOS), key=len, reverse=True)
    return [
        *names,
        *(f"{name} (2)" for name in names),
        "\u05d0\u05dc\u05d2\u05d5",
        "\U0001f600 algo",
    ][:n]


def curves(n_algos: int, n_tasks: int, seed: int = 0) -> Any:
    rng = random.Random(seed)
    return {
        task: {
            algo: [(n, 100 * rng.random() + i) for i, n in enumerate(SIZES)]
            for algo in algos(n_algos)
        }
        for task in tasks(n_tasks)
    }


def rocs(n_algos: int, n_tasks: int, seed: int = 0) -> Any:
    rng = random.Random(seed)
    return {
        task: {algo: [(0, 0), (0.2, rng.random()), (1, 1)] for algo in algos(n_algos)}
        for task in tasks(n_tasks)
    }


def measurements(n_algos: int, n_tasks: int) -> go.Figure:
    found = curves(n_algos, n_tasks)
    seeds = [found, curves(n_algos, n_tasks, 1)]
    title = "Clean KL Divergence, Tokenwise Mean Corrupt Ablation"
    return edge_patching_plot(found, CLEAN_KL_DIV_METRIC, title, None, seeds)


def percents(n_algos: int, n_tasks: int) -> go.Figure:
    return edge_patching_plot(curves(n_algos, n_tasks), PERCENT, "Logit Diff Percent")


def single_points(n_algos: int, n_tasks: int) -> go.Figure:
    found = curves(n_algos, n_tasks)
    for by_algo in found.values():
        by_algo |= {"GT": [(100, 50.0)], "Another Known Circuit": [(110, 51.0)]}
    return edge_patching_plot(found, PERCENT, "Logit Diff Percent")


def areas(n_algos: int, n_tasks: int) -> go.Figure:
    found = curves(n_algos, n_tasks)
    for by_algo in found.values():  # without 0 edges there is no area
        by_algo |= {algo: points[1:] for algo, points in [*by_algo.items()][1::2]}
    seeds = [found, curves(n_algos, n_tasks, 1)]
    title = "Area under Curve: Logit Diff Percent, Resample Ablation"
    return average_auc_plot(found, True, False, title=title, of_seeds=seeds)


def roc(n_algos: int, n_tasks: int) -> go.Figure:
    found = rocs(n_algos, n_tasks)
    shares = {(task, algo): 0.5 for task, of in found.items() for algo in of}
    seeds = [found, rocs(n_algos, n_tasks, 1)]
    return roc_plot(found, areas=shares, of_seeds=seeds)


def similarities(n_algos: int, n_tasks: int) -> go.Figure:
    names = algos(n_algos)
    by_algo = {a: {b: 0.25 for b in names[i:]} for i, a in enumerate(names)}
    return similarity_fig({task: {10: by_algo, 1000: by_algo} for task in tasks(n_tasks)})


def robustness(n_algos: int, n_tasks: int) -> go.Figure:
    rng = random.Random(0)
    rows = [
        RobustnessRow(task, algo, v.choice, v.value, v.is_base, share, 10, p, p)
        for task in tasks(n_tasks)
        for algo in algos(n_algos)
        for v in variations(Choices(token_positions=True))
        for share in (0.001, 0.01, 0.1)
        for p in [rng.uniform(-100, 200)]
    ]
    return robustness_fig(rows, {algo: algo for algo in algos(n_algos)})


SPREAD = (50.0, 60.0, 9.0, 40.0, 50.0, 60.0)


def grid(n_algos: int, n_tasks: int) -> go.Figure:
    return grid_fig(
        [
            GridRow(task, "published", unit, where, how, 9, 99, *SPREAD, 9)
            for task in tasks(n_tasks)
            for unit in ("edges", "nodes")
            for where in ("told apart", "all alike")
            for how in ("Resample", "Mean Corrupt", "Zero")
        ]
    )


def knockouts(n_algos: int, n_tasks: int) -> go.Figure:
    found = {algo: [(1234, 567, 0.5, 0.7)] for algo in algos(n_algos)}
    return same_under_knockouts_fig({task: found for task in tasks(n_tasks)})


def training(n_algos: int, n_tasks: int) -> go.Figure:
    steps = [
        TrainingStep(i, 1.0 / (i + 1), 1.0, 0.5, 1000.0 / (i + 1), validation=0.5)
        for i in range(40)
    ]
    return mask_training_fig(steps, "Subnetwork Edge Probing, Pocket IOI, seed 42")


@cache
def pocket(positions: int | None) -> Any:
    return patchable_model(
        load_tl_model(POCKET_MODEL), True, "last_seq", positions, separate_qkv=True
    )


LABELS = [
    *(
        "When the indirect object's name comes",
        "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u05d0\u05e8\u05d5\u05da",
    ),
    *(
        "\U0001f600\U0001f680 emoji \U0001f469\u200d\U0001f680",
        "<b>bold?</b>",
        "5",
        "a" * 60,
    ),
]


def circuit(n_edges: int, positions: bool, **how: Any) -> go.Figure:
    model = pocket(len(LABELS) if positions else None)
    rng = random.Random(0)
    edges = rng.sample(sorted(model.edges), min(n_edges, len(model.edges)))
    scores = model.new_prune_scores()
    for edge in edges:
        scores[edge.dest.module_name][edge.patch_idx] = rng.uniform(-1, 1)
    labels = LABELS if positions else None
    return draw_seq_graph(model, scores, seq_labels=labels, **how)


DRAWN = {
    f"{draw.__name__}-{n_algos}-{n_tasks}": (draw, n_algos, n_tasks)
    for draw, counts in {
        measurements: [(3, 1), (8, 3), (42, 9)],
        percents: [(1, 1), (13, 3)],
        single_points: [(3, 1), (8, 3)],
        areas: [(1, 1), (8, 3), (42, 9)],
        roc: [(3, 1), (8, 3), (42, 9)],
        similarities: [(1, 9), (8, 3), (42, 1)],
        knockouts: [(1, 1), (8, 3), (42, 1)],
        robustness: [(1, 1), (3, 9)],
        grid: [(1, 1), (1, 3), (1, 9)],
        training: [(1, 1)],
    }.items()
    for n_algos, n_tasks in counts
}
CIRCUITS = {
    "empty": (0, False, {}),
    "positions": (40, True, {}),
    "vertical": (40, False, {"orientation": "v"}),
    "vertical positions": (40, True, {"orientation": "v"}),
    "vertical queries": (40, False, {"orientation": "v", "merge_qkv": False}),
    "queries and positions": (40, True, {"merge_qkv": False}),
    "many edges": (500, False, {}),
    "all edges": (1519, False, {}),
    "spaced": (40, True, {"layer_spacing": True}),
    "many edges and positions": (500, True, {}),
}


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with browser_page() as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_figures_of_many(page: Any, tmp_path_factory: Any, name: str) -> None:
    draw, *counts = DRAWN[name]
    folder = tmp_path_factory.getbasetemp()
    assert problems(page, draw(*counts), folder, name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CIRCUITS)
def test_figures_of_circuits(page: Any, tmp_path_factory: Any, name: str) -> None:
    n_edges, positions, how = CIRCUITS[name]
    folder = tmp_path_factory.getbasetemp()
    assert problems(page, circuit(n_edges, positions, **how), folder, name) == []
