"""From scores to rows, nested measurements and figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import plotly.io as pio
import pytest
import torch as t

from auto_circuit.errors import ConfigError
from auto_circuit.metrics.prune_metrics import task_measurements
from auto_circuit.metrics.prune_metrics.measure_prune_metrics import (
    measure_prune_metrics,
    measurement_figs,
    measurement_rows,
)
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    CLEAN_KL_DIV_METRIC,
    LOGIT_DIFF_METRIC,
    PRUNE_METRICS,
    PruneMetric,
)
from auto_circuit.types import (
    COLOR_PALETTE,
    AblationMeasurements,
    AblationType,
    CircuitOutputs,
    EdgeCounts,
    Measurements,
    PatchType,
    TestEdges,
)

SCORES = {"module": t.arange(12.0).reshape(2, 6)}
N_EDGES = 12


@dataclass
class FakeTask:
    """A task without data sets."""

    key: str
    model: Any
    test_loader: Any
    true_edge_count: int | None = None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of `run_circuits`, which mixes clean and corrupt outputs here."""
    calls: list[tuple[Any, ...]] = []

    def run(model: Any, loader: Any, counts: list[int], *args: Any) -> CircuitOutputs:
        calls.append((counts, *args))
        outs: CircuitOutputs = {}
        for count in counts:
            share = count / N_EDGES
            outs[count] = {
                batch.key: share * model.logits[batch.clean[:, -1]]
                + (1 - share) * model.logits[batch.corrupt[:, -1]]
                for batch in loader
            }
        return outs

    monkeypatch.setattr(task_measurements, "run_circuits", run)
    return calls


@pytest.fixture
def task(model: Any, batches: Any) -> FakeTask:
    """A task with 12 edges, 7 of them in the true circuit."""
    model.n_edges = N_EDGES
    return FakeTask("Task", model, batches, true_edge_count=7)


def test_measurements_are_nested(task: FakeTask, calls: list[Any]) -> None:
    measurements = measure_prune_metrics(
        [AblationType.RESAMPLE, AblationType.ZERO],
        [CLEAN_KL_DIV_METRIC, LOGIT_DIFF_METRIC],
        {"Task": {"EAP": SCORES, "Random": SCORES}},
        PatchType.TREE_PATCH,
        test_edge_counts=[0, 3, 0.5, 12],
        tasks=[task],
    )
    assert list(measurements) == [AblationType.RESAMPLE, AblationType.ZERO]
    assert list(measurements[AblationType.ZERO]) == ["Clean KL Div", "Logit Diff"]
    points = measurements[AblationType.ZERO]["Clean KL Div"]["Task"]["Random"]
    assert [n_edges for n_edges, _ in points] == [0, 3, 6, 12]
    assert points[-1][1] == pytest.approx(0.0, abs=1e-6)
    assert points[0][1] > points[1][1] > points[2][1]


def test_circuits_are_run_once_for_all_metrics(task: FakeTask, calls: list[Any]) -> None:
    rows = measurement_rows(
        [AblationType.ZERO],
        PRUNE_METRICS,
        {"Task": {"EAP": SCORES}},
        PatchType.EDGE_PATCH,
        reverse_clean_corrupt=True,
        test_edge_counts=[5],
        tasks=[task],
    )
    ((counts, scores, patch_type, ablation_type, reverse),) = calls
    assert (counts, patch_type) == ([5], PatchType.EDGE_PATCH)
    assert (ablation_type, reverse) == (AblationType.ZERO, True)
    assert scores is SCORES
    assert task.model.n_runs == 2 * len(task.test_loader)
    assert [row.metric for row in rows] == [metric.key for metric in PRUNE_METRICS]
    assert {row.patch_type for row in rows} == {"EDGE_PATCH_REVERSED"}
    assert {row.ablation for row in rows} == {"ZERO"}
    assert {row.n_prompts for row in rows} == {6}
    assert all(row.std is not None and row.std >= 0 for row in rows)


@pytest.mark.parametrize(
    ("test_edge_counts", "counts"),
    [
        (None, list(range(13))),
        (EdgeCounts.LOGARITHMIC, [*range(11), 12]),
        ([1, 2, 3], [1, 2, 3]),
        ([0.5], [6]),
    ],
)
def test_sizes(
    test_edge_counts: TestEdges | None,
    counts: list[int],
    task: FakeTask,
    calls: list[Any],
) -> None:
    measure_prune_metrics(
        [AblationType.ZERO],
        [LOGIT_DIFF_METRIC],
        {"Task": {"EAP": SCORES}},
        PatchType.EDGE_PATCH,
        test_edge_counts=test_edge_counts,
        tasks=[task],
    )
    assert calls[0][0] == counts


def test_the_known_circuits_size_is_measured(task: FakeTask, calls: list[Any]) -> None:
    scores = {"module": t.tensor([1.0] * 4 + [0.0] * 8)}
    measure_prune_metrics(
        [AblationType.ZERO],
        [LOGIT_DIFF_METRIC],
        {"Task": {"GT": scores}},
        PatchType.EDGE_PATCH,
        tasks=[task],
    )
    # Scores that make one circuit have its size alone.
    assert calls[0][0] == [4, 7]


def test_a_metric_of_ones_own(task: FakeTask, calls: list[Any]) -> None:
    def count_edges(
        model: Any, dataloader: Any, circuit_outs: CircuitOutputs
    ) -> Measurements:
        return [(n_edges, 2 * n_edges) for n_edges in circuit_outs]

    metric = PruneMetric("Mine", "My Metric", count_edges)
    measure = (
        [AblationType.ZERO],
        [metric],
        {"Task": {"EAP": SCORES}},
        PatchType.EDGE_PATCH,
        False,
        [2, 4],
    )
    rows = measurement_rows(*measure, tasks=[task])
    assert [(row.n_edges, row.value, row.std) for row in rows] == [
        (2, 4, None),
        (4, 8, None),
    ]
    measurements = measure_prune_metrics(*measure, tasks=[task])
    (fig,) = measurement_figs(measurements, metrics=[metric])
    assert list(fig.data[0].y) == [4, 8]
    with pytest.raises(ConfigError, match="no metric 'Mine'.*`metrics=`"):
        measurement_figs(measurements)


def test_scores_of_an_unknown_task(task: FakeTask, calls: list[Any]) -> None:
    with pytest.raises(ConfigError, match="'Tusk'.*Did you mean 'Task'.*`tasks=`"):
        measure_prune_metrics(
            [AblationType.ZERO],
            [LOGIT_DIFF_METRIC],
            {"Task": {"EAP": SCORES}, "Tusk": {"EAP": SCORES}},
            PatchType.EDGE_PATCH,
            tasks=[task],
        )
    assert not calls


# ----------------------------------------------------------------------------- figures

CURVE: Measurements = [(100, 0.001), (0, 5.0), (10, 0.5)]
MEASUREMENTS: AblationMeasurements = {
    AblationType.RESAMPLE: {
        "Clean KL Div": {
            "First": {"EAP": CURVE, "Official": [(7, 0.3)]},
            "Second": {"Random": CURVE, "EAP": CURVE},
        }
    }
}


def test_the_figure_has_a_panel_per_task_and_a_line_per_algorithm() -> None:
    (fig,) = measurement_figs(MEASUREMENTS, algo_names={"EAP": "Edge Attribution"})
    assert [trace.name for trace in fig.data] == [
        "Edge Attribution",
        "Official",
        "Random",
        "Edge Attribution",
    ]
    assert [trace.showlegend for trace in fig.data] == [True, True, True, False]
    assert [trace.xaxis for trace in fig.data] == ["x", "x", "x2", "x2"]
    assert [trace.line.color for trace in fig.data] == [
        COLOR_PALETTE[i] for i in (0, 1, 2, 0)
    ]
    assert [note.text for note in fig.layout.annotations] == ["First", "Second"]
    assert fig.layout.title.text == "KL(Clean || Circuit), Resample Ablation"
    assert fig.layout.yaxis.title.text == "KL(Clean || Circuit)"
    assert fig.layout.xaxis.title.text == "Circuit Edges"


def test_points_on_logarithmic_axes() -> None:
    (fig,) = measurement_figs(MEASUREMENTS)
    assert (fig.layout.xaxis.type, fig.layout.yaxis2.type) == ("log", "log")
    line, cross = fig.data[:2]
    assert list(line.x) == [0.5, 10, 100]
    assert list(line.y) == [5.0, 0.5, 0.01]
    assert [tuple(point) for point in line.customdata] == sorted(CURVE)
    assert line.mode == "lines+markers"
    assert list(fig.layout.xaxis.tickvals)[:2] == [0.5, 1]
    assert list(fig.layout.xaxis.ticktext)[:2] == ["0", "1"]
    assert (cross.mode, cross.marker.symbol) == ("markers+text", "x")
    assert list(cross.text) == ["Official"]


def test_linear_axes_show_the_values_as_they_are() -> None:
    metric = PruneMetric("Mine", "Mine", lambda *_: [])
    (fig,) = measurement_figs(
        {AblationType.ZERO: {"Mine": {"Task": {"EAP": [(0, -1.0), (3, math.nan)]}}}},
        metrics=[metric],
    )
    assert list(fig.data[0].x) == [0, 3]
    assert fig.data[0].y[0] == -1.0 and math.isnan(fig.data[0].y[1])
    assert fig.layout.xaxis.type is None


def test_more_algorithms_than_colours() -> None:
    algos = {f"algo {i}": CURVE for i in range(len(COLOR_PALETTE) + 1)}
    (fig,) = measurement_figs({AblationType.ZERO: {"Logit Diff": {"Task": algos}}})
    assert fig.data[0].line.color == fig.data[-1].line.color
    assert (fig.data[0].line.dash, fig.data[-1].line.dash) == ("solid", "dash")


def test_area_figures_follow_each_figure() -> None:
    fig, area_fig = measurement_figs(MEASUREMENTS, auc_plots=True)
    assert {trace.type for trace in fig.data} == {"scatter"}
    assert {trace.type for trace in area_fig.data} == {"bar"}
    assert "No area for: Official" in area_fig.layout.title.text


def test_plotlys_defaults_are_left_alone() -> None:
    before = (pio.templates.default, list(pio.templates))
    measurement_figs(MEASUREMENTS, auc_plots=True)
    assert before == (pio.templates.default, list(pio.templates))
