"""Several seeds in a figure: bands around curves and ROCs, error bars on bars."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import pytest

from auto_circuit.metrics.area_under_curve import curve_interval, task_areas
from auto_circuit.metrics.area_under_curve_plot import average_auc_plot
from auto_circuit.metrics.mean_interval import MeanInterval
from auto_circuit.metrics.official_circuits.measure_roc import roc_auc
from auto_circuit.metrics.official_circuits.roc_plot import mean_roc, roc_plot
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    CLEAN_KL_DIV_METRIC,
    LOGIT_DIFF_PERCENT_METRIC,
)
from auto_circuit.metrics.prune_metrics.prune_metrics_plot import (
    edge_patching_plot,
    measurement_figs,
)
from auto_circuit.summary import mean_measurements, seed_measurements
from auto_circuit.types import (
    AblationMeasurements,
    AblationType,
    MeasurementRow,
    Measurements,
    TaskMeasurements,
)

T_2 = 4.303
"""Student's t of two degrees of freedom."""


def half_width(values: Sequence[int | float]) -> float:
    return T_2 * statistics.stdev(values) / 3**0.5


def curve(value: float) -> Measurements:
    return [(0, 0.0), (10, value), (100, 100.0)]


SEEDS: list[TaskMeasurements] = [
    {
        "First": {"EAP": curve(50.0 + seed), "GT": curve(80.0)},
        "Second": {"EAP": curve(20.0 + 3 * seed**2)},
    }
    for seed in range(3)
]
for later in SEEDS[1:]:
    del later["First"]["GT"]
MEAN: TaskMeasurements = {
    "First": {"EAP": curve(51.0), "GT": curve(80.0)},
    "Second": {"EAP": curve(25.0)},
}


def bands_of(fig: go.Figure) -> list[tuple[Any, Any]]:
    """The lower and upper lines of each band."""
    upper = [i for i, trace in enumerate(fig.data) if trace.fill == "tonexty"]
    return [(fig.data[i - 1], fig.data[i]) for i in upper]


def test_the_interval_of_curves_is_that_of_their_values() -> None:
    """At a size that one has not measured, its largest circuit that is not larger counts."""
    curves: list[Measurements] = [[(0, 1.0), (4, 5.0)], [(0, 2.0), (9, 9.0)], [(0, 6.0)]]
    expected = [half_width(values) for values in ([1, 2, 6], [5, 2, 6], [5, 9, 6])]
    found = curve_interval(curves)
    assert [size for size, _ in found] == [0, 4, 9]
    assert [value for _, value in found] == pytest.approx(expected)


def test_curves_have_bands() -> None:
    fig = edge_patching_plot(MEAN, LOGIT_DIFF_PERCENT_METRIC, "Title", None, SEEDS)
    (low, high), (low_2, high_2) = bands_of(fig)
    assert list(low.x) == list(high.x) == [0.5, 10, 100]
    half = half_width([50, 51, 52])
    assert list(low.y) == pytest.approx([0, 51 - half, 100])
    assert list(high.y) == pytest.approx([0, 51 + half, 100])
    half = half_width([20, 23, 32])
    assert list(high_2.y) == pytest.approx([0, 25 + half, 100])
    assert (low.xaxis, low_2.xaxis) == ("x", "x2")
    lines = {(trace.name, trace.xaxis): trace for trace in fig.data if trace.name}
    line = lines["EAP", "x"]
    assert list(line.y) == [0, 51, 100] and low.legendgroup == line.legendgroup
    assert low.line.shape == high.line.shape == line.line.shape == "hv"
    assert line.line.color.replace("rgb(", "")[:-1] in high.fillcolor
    assert " ± " in line.hovertemplate and line.customdata[1][2] == pytest.approx(
        half_width([50, 51, 52])
    )
    assert " ± " not in lines["GT", "x"].hovertemplate  # it ran once
    assert "95 % intervals" in fig.layout.title.text


def test_one_seed_has_no_band_and_no_error_bars() -> None:
    for seeds in ([], SEEDS[:1]):
        fig = edge_patching_plot(MEAN, LOGIT_DIFF_PERCENT_METRIC, "Title", None, seeds)
        assert not bands_of(fig) and fig.layout.title.text == "Title"
        assert [trace.name for trace in fig.data] == ["EAP", "GT", "EAP"]
        bars = average_auc_plot(MEAN, True, False, of_seeds=seeds)
        assert {trace.type for trace in bars.data} == {"bar"}
        rocs = [{"Task": {"EAP": ROCS[0]}}] if seeds else []
        fig = roc_plot({"Task": {"EAP": ROCS[0]}}, of_seeds=rocs)
        assert not bands_of(fig) and fig.layout.title.text is None


def test_bands_stay_above_the_lowest_value_of_a_logarithmic_axis() -> None:
    seeds: list[TaskMeasurements] = [
        {"Task": {"EAP": [(0, value), (9, 0.0)]}} for value in (0.01, 0.1, 1.0)
    ]
    fig = edge_patching_plot(
        {"Task": {"EAP": [(0, 0.37), (9, 0.0)]}}, CLEAN_KL_DIV_METRIC, None, None, seeds
    )
    ((low, high),) = bands_of(fig)
    assert list(low.y) == [CLEAN_KL_DIV_METRIC.y_min] * 2
    assert high.y[0] == pytest.approx(0.37 + half_width([0.01, 0.1, 1.0]))


def test_bars_have_the_mean_of_areas_and_its_interval() -> None:
    fig = average_auc_plot(MEAN, True, False, of_seeds=SEEDS)
    areas = {
        task: [task_areas(m[task], True)["EAP"].kept for m in SEEDS] for task in MEAN
    }
    first, second, marks, first_off, second_off, marks_off = fig.data
    assert list(first.x) == ["EAP", "GT"] and list(second.x) == ["EAP"]
    for bar, task in ((first, "First"), (second, "Second")):
        assert bar.y[0] == pytest.approx(statistics.mean(areas[task]) / 2)
    totals = [(a + b) / 2 for a, b in zip(areas["First"], areas["Second"], strict=True)]
    assert list(marks.x) == ["EAP"]
    assert marks.y[0] == pytest.approx(statistics.mean(totals))
    assert marks.y[0] == pytest.approx(first.y[0] + second.y[0])
    assert marks.error_y.array[0] == pytest.approx(half_width(totals))
    assert marks_off.y[0] == pytest.approx(first_off.y[0] + second_off.y[0])
    assert marks.showlegend and not marks_off.showlegend


def test_the_interval_of_a_bar_is_of_seeds_with_all_of_its_tasks() -> None:
    """The third seed's second task failed."""
    seeds: list[TaskMeasurements] = [*SEEDS[:2], {"First": SEEDS[2]["First"]}]
    *_, marks = average_auc_plot(MEAN, True, False, of_seeds=seeds).data
    offs = [
        [task_areas(m[task], True)["EAP"].off for task in ("First", "Second")]
        for m in SEEDS[:2]
    ]
    totals = [statistics.mean(of_seed) for of_seed in offs]
    assert marks.y[0] == pytest.approx(statistics.mean(totals))
    half = 12.706 * statistics.stdev(totals) / 2**0.5
    assert marks.error_y.array[0] == pytest.approx(half)


def test_areas_of_seeds_are_not_the_area_of_the_mean_curve() -> None:
    """Too much for one seed and too little for another is off for both."""
    seeds: list[TaskMeasurements] = [
        {"Task": {"EAP": [(0, 0.0), (1, value), (10, 100.0)]}} for value in (50.0, 150.0)
    ]
    mean: TaskMeasurements = {"Task": {"EAP": [(0, 0.0), (1, 100.0), (10, 100.0)]}}
    _, _, off, _ = average_auc_plot(mean, True, False, of_seeds=seeds).data
    assert off.y[0] == pytest.approx(0.5)


ROCS: list[Measurements] = [
    [(0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0)],
    [(0.0, 0.0), (0.25, 0.5), (0.25, 0.75), (1.0, 1.0)],
    [(0.0, 0.0), (1.0, 1.0)],
]


def test_the_mean_roc_by_hand() -> None:
    """Averaged upwards; a jump of one of them stays a jump."""
    rates = {
        0.0: ([0.0, 0.0, 0.0], [0.5, 0.0, 0.0]),
        0.25: ([0.75, 0.5, 0.25], [0.75, 0.75, 0.25]),
        0.5: ([1.0, 5 / 6, 0.5], [1.0, 5 / 6, 0.5]),
        1.0: ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    }
    expected = [
        (x, statistics.mean(values), half_width(values))
        for x, both in rates.items()
        for values in both
    ]
    found = mean_roc(ROCS)
    assert len(found) == 6  # equal ones only once
    for point in expected:
        assert any(point == pytest.approx(one) for one in found)
    points: Measurements = [(x, y) for x, y, _ in found]
    areas = [roc_auc(one) for one in ROCS]
    assert roc_auc(points) == pytest.approx(statistics.mean(areas))
    assert [(x, y) for x, y, _ in mean_roc([ROCS[0]] * 2)] == ROCS[0]


def test_rocs_have_bands() -> None:
    seeds: list[TaskMeasurements] = [{"Task": {"EAP": points}} for points in ROCS]
    seeds[0]["Task"]["GT"] = ROCS[0]
    fig = roc_plot(
        seeds[0],
        areas={
            ("Task", "EAP"): MeanInterval(0.7, 0.05),
            ("Task", "GT"): MeanInterval(0.8, float("nan")),
        },
        of_seeds=seeds,
    )
    ((low, high),) = bands_of(fig)
    found = mean_roc(ROCS)
    assert list(high.y) == pytest.approx([y + half for _, y, half in found])
    assert list(low.y) == pytest.approx([y - half for _, y, half in found])
    lines = {trace.name: trace for trace in fig.data if trace.name}
    assert list(lines) == ["EAP (0.700 ± 0.050)", "GT (0.800)"]
    assert list(lines["EAP (0.700 ± 0.050)"].y) == [y for _, y, _ in found]
    assert list(lines["GT (0.800)"].x) == [x for x, _ in ROCS[0]]


def test_from_rows_to_bands() -> None:
    rows = [
        MeasurementRow(
            *(task, algo, "Logit Diff Percent", "RESAMPLE", "TREE_PATCH"),
            n_edges=int(n_edges),
            value=float(value),
            seed=seed,
        )
        for seed, measurements in enumerate(SEEDS)
        for task, by_algo in measurements.items()
        for algo, points in by_algo.items()
        for n_edges, value in points
    ]
    of_seeds: list[AblationMeasurements] = seed_measurements(rows)
    assert [m[AblationType.RESAMPLE]["Logit Diff Percent"] for m in of_seeds] == SEEDS
    curves, bars = measurement_figs(mean_measurements(rows), True, of_seeds=of_seeds)
    assert len(bands_of(curves)) == 2
    assert [trace.type for trace in bars.data] == ["bar", "bar", "scatter"] * 2
    assert not bands_of(measurement_figs(mean_measurements(rows))[0])
