"""Areas by hand, for rising, falling and logarithmic curves."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_circuit.errors import ConfigError
from auto_circuit.metrics.area_under_curve import (
    accuracy_area,
    algo_measurements_auc,
    area_share,
    edges_for_share,
    mean_curve,
    mean_height,
    measurements_auc,
    metric_measurements_auc,
    task_areas,
    task_measurements_auc,
)
from auto_circuit.metrics.area_under_curve_plot import average_auc_plot
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC,
)
from auto_circuit.prune import run_circuits
from auto_circuit.types import Measurements
from tests.micro import micro_loader, micro_model

RISING: Measurements = [(0, 1.0), (2, 3.0), (10, 5.0)]
KL: Measurements = [(0, 10.0), (1, 10.0), (10, 1.0), (100, 0.1), (1000, 0.01)]


def test_linear_area_by_hand() -> None:
    # Heights 0, 2, 4: (0+2)/2 * 2 + (2+4)/2 * 8 = 26, over a width of 10.
    assert measurements_auc(RISING) == pytest.approx(26)
    assert mean_height(RISING) == pytest.approx(2.6)
    # Steps: 0 from 1 edge to 2, then 2 up to 10 edges, of a full height of 4.
    assert area_share(RISING) == pytest.approx(2 * 8 / 9 / 4)


def test_a_falling_curve_has_a_negative_area() -> None:
    falling: Measurements = [(x, -y) for x, y in RISING]
    assert measurements_auc(falling) == pytest.approx(-26)
    assert mean_height(falling) == pytest.approx(-2.6)
    assert area_share(falling) == pytest.approx(area_share(RISING))


def test_logarithmic_sizes_by_hand() -> None:
    points: Measurements = [(0, 1.0), (1, 2.0), (10, 4.0), (1000, 5.0)]
    # Heights 1, 3, 4 at X = 0, 1, 3: (1+3)/2 * 1 + (3+4)/2 * 2 = 9, over a width of 3.
    assert measurements_auc(points, log_x=True) == pytest.approx(9.0)
    assert mean_height(points, log_x=True) == pytest.approx(3.0)
    # Steps: 1 for a decade and 3 for two, of 4.
    assert area_share(points, log_x=True) == pytest.approx((1 + 2 * 3) / 3 / 4)


def test_a_curve_that_starts_after_1_edge() -> None:
    points: Measurements = [(0, 0.0), (10, 4.0), (1000, 6.0)]
    # Its own two decades: (4+6)/2.
    assert mean_height(points, log_x=True) == pytest.approx(5.0)
    # All three decades: 0 in the first, 4 of 6 in the others.
    assert area_share(points, log_x=True) == pytest.approx(2 * 4 / 6 / 3)


def test_logarithmic_values_by_hand() -> None:
    # Decades below the value at 0 edges: 0, 1, 2, 3 at X = 0, 1, 2, 3.
    area = measurements_auc(KL, log_x=True, log_y=True, y_min=1e-2)
    assert area == pytest.approx(-4.5)
    assert mean_height(KL, True, True, 1e-2) == pytest.approx(-1.5)
    # With a higher floor: 0, 1, 2, 2.
    area = measurements_auc(KL, log_x=True, log_y=True, y_min=0.1)
    assert area == pytest.approx(-(0.5 + 1.5 + 2))


def test_two_different_divergence_curves_have_different_areas() -> None:
    slow: Measurements = [(0, 10.0), (1, 10.0), (10, 9.0), (100, 8.0), (1000, 0.01)]
    fast_share = area_share(KL, True, True, 1e-2)
    slow_share = area_share(slow, True, True, 1e-2)
    # 0, 1 and 2 of 3 decades below the value at 0 edges.
    assert fast_share == pytest.approx(1 / 3)
    assert 0 < slow_share < 0.05
    assert measurements_auc(KL, True, True, 1e-2) < measurements_auc(
        slow, True, True, 1e-2
    )


def test_a_least_area() -> None:
    """The area of RISING is 26, that of its mirror image -26."""
    falling: Measurements = [(x, -y) for x, y in RISING]
    for points, eps, area in (
        (RISING, 25, 26),
        (RISING, 27, 27),
        (falling, 0.001, 0.001),
    ):
        assert measurements_auc(points, eps=eps) == pytest.approx(area)
    assert math.isnan(measurements_auc([(0, 0.0), (1, math.nan)], eps=0.5))


def test_points_may_come_in_any_order() -> None:
    assert measurements_auc(RISING[::-1]) == measurements_auc(RISING)


ACDC: Measurements = [(0, 0.0), (80, 82.0), (900, 99.0), (1519, 100.0)]
"""Three sizes above 0, as few thresholds make them."""
EAP: Measurements = [(0, 0.0), (1, 5.0), (9, 35.0), (20, 60.0), (50, 82.0)]
EAP += [(400, 97.0), (1519, 100.0)]
OVERSHOOT: Measurements = [(0, 0.0), (5, 150.0), (1000, 160.0), (1519, 100.0)]


def areas_by_brute_force(points: Measurements, n_edges: int) -> tuple[float, float]:
    """Size after size, over log10(size): the circuit that one has is the last measured."""
    start, full = (dict(points)[size] for size in (0, n_edges))
    height, kept, off = 0.0, 0.0, 0.0
    for size in range(1, n_edges):
        for at, value in points:
            if at == size or (size == 1 and at == 0):
                height = (value - start) / (full - start)
        width = math.log10((size + 1) / size) / math.log10(n_edges)
        kept += width * height
        off += width * abs(1 - height)
    return kept, off


def test_all_algorithms_are_compared_over_the_same_sizes() -> None:
    """A curve of few sizes once won: nobody looked at what it does between them."""
    curves = {"ACDC": ACDC, "EAP": EAP, "Overshoot": OVERSHOOT, "GT": [(30, 90.0)]}
    areas = task_areas(curves, log_x=True)
    for algo in ("ACDC", "EAP", "Overshoot"):
        kept, off = areas_by_brute_force(curves[algo], 1519)
        assert areas[algo].kept == pytest.approx(kept)
        assert areas[algo].off == pytest.approx(off)
    assert areas["EAP"].kept > areas["ACDC"].kept
    assert areas["EAP"].off < areas["ACDC"].off
    # Who does most is not who is nearest to the model.
    assert areas["Overshoot"].kept > 1 > areas["EAP"].kept
    assert areas["Overshoot"].off > areas["EAP"].off
    assert math.isnan(areas["GT"].kept) and math.isnan(areas["GT"].off)


def test_a_curve_that_ends_early_is_a_share_of_all_edges() -> None:
    areas = task_areas({"short": [(0, 0.0), (10, 50.0)], "EAP": EAP}, log_x=True)
    beyond_10 = 1 - 1 / math.log10(1519)
    assert areas["short"].kept == pytest.approx(0.5 * beyond_10)
    assert areas["short"].off == pytest.approx(1 - 0.5 * beyond_10)


@given(st.data())
def test_areas_of_random_curves(data: st.DataObject) -> None:
    sizes = data.draw(st.sets(st.integers(1, 59), max_size=6)) | {0, 60}
    values = st.floats(-200, 200).map(lambda value: round(value, 3))
    points: Measurements = [(size, data.draw(values)) for size in sorted(sizes)]
    points[-1] = (60, points[0][1] + 50)
    kept, off = areas_by_brute_force(points, 60)
    (areas,) = task_areas({"it": points[::-1]}, log_x=True).values()
    assert areas.kept == pytest.approx(kept, abs=1e-9)
    assert areas.off == pytest.approx(off, abs=1e-9)


def test_the_mean_of_curves_with_different_sizes() -> None:
    curves: list[Measurements] = [[(0, 0.0), (4, 10.0), (9, 12.0)], [(6, 30.0), (0, 2.0)]]
    assert mean_curve(curves) == [(0, 1.0), (4, 6.0), (6, 20.0), (9, 21.0)]
    assert mean_curve([[(5, 1.0)], [(7, 2.0)]]) == [(7, 1.5)]
    assert mean_curve([EAP]) == EAP


HEIGHTS = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


@given(HEIGHTS, st.floats(-50, 50), st.floats(-5, 5))
def test_area_is_linear_in_the_values(
    ys: list[float], shift: float, scale: float
) -> None:
    points: Measurements = [(2 * i, y) for i, y in enumerate(ys)]
    changed: Measurements = [(x, scale * y + shift) for x, y in points]
    expected = scale * measurements_auc(points)
    assert measurements_auc(changed) == pytest.approx(expected, abs=1e-9)


@given(HEIGHTS)
def test_area_is_between_the_lowest_and_highest_height(ys: list[float]) -> None:
    points: Measurements = list(enumerate(ys))
    heights = [y - ys[0] for y in ys]
    area = mean_height(points)
    assert min(heights) - 1e-9 <= area <= max(heights) + 1e-9


@given(st.floats(0.1, 10), st.booleans())
def test_a_flat_curve_at_the_full_value_has_share_1(height: float, log_x: bool) -> None:
    points: Measurements = [(0, 0.0), (1, height), (10, height), (50, height)]
    assert area_share(points, log_x) == pytest.approx(1.0)


def test_values_that_are_not_numbers() -> None:
    assert math.isnan(measurements_auc([(0, 1.0), (1, math.nan), (2, 1.0)]))
    assert math.isnan(measurements_auc(KL + [(3, math.nan)], True, True, 1e-2))


def test_a_share_of_no_height_is_nan_and_warns() -> None:
    with pytest.warns(UserWarning, match="share of the area is undefined"):
        assert math.isnan(area_share([(0, 1.0), (1, 3.0), (2, 1.0)]))


@pytest.mark.parametrize(
    ("points", "log_x", "message"),
    [
        (
            [(1, 1.0), (2, 2.0)],
            False,
            r"0 edges, which is missing; the sizes are \[1, 2",
        ),
        ([], False, "which is missing"),
        ([(0, 1.0)], False, "at least one size above 0 edges"),
        ([(0, 1.0), (5, 1.0)], True, r"at least two sizes above 0 edges.*\[0, 5\]"),
        ([(0, 1.0), (5, 1.0), (5, 2.0)], False, "has two values"),
    ],
)
def test_points_without_an_area(points: Measurements, log_x: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measurements_auc(points, log_x)


def test_one_edge_has_no_area() -> None:
    with pytest.raises(ConfigError, match=r"a size above 1 edge.*\[0, 1\]"):
        area_share([(0, 0.0), (1, 1.0)])
    assert math.isnan(task_areas({"it": [(0, 0.0), (1, 1.0)]})["it"].kept)
    assert task_areas({}) == {}


@pytest.mark.parametrize("y_min", [None, 0.0])
def test_logarithmic_values_need_a_minimum(y_min: float | None) -> None:
    with pytest.raises(ConfigError, match="needs a `y_min` above 0"):
        measurements_auc(RISING, log_y=True, y_min=y_min)


def test_nested_areas() -> None:
    algos = {"EAP": RISING, "Official": [(3, 1.0)]}
    areas = algo_measurements_auc(algos)
    assert areas["EAP"] == pytest.approx(26) and math.isnan(areas["Official"])
    assert task_measurements_auc({"Task": {"EAP": RISING}}) == {"Task": {"EAP": 26.0}}
    by_metric = metric_measurements_auc({"Clean KL Div": {"Task": {"EAP": KL}}})
    assert by_metric["Clean KL Div"]["Task"]["EAP"] == pytest.approx(-4.5)
    linear = metric_measurements_auc(
        {"Clean KL Div": {"T": {"EAP": RISING}}}, False, False
    )
    assert linear["Clean KL Div"]["T"]["EAP"] == pytest.approx(26)
    with pytest.raises(ConfigError, match="There is no metric"):
        metric_measurements_auc({"KL": {"Task": {"EAP": KL}}})


def test_edges_for_a_share() -> None:
    percents: Measurements = [(0, 0.0), (10, 85.0), (20, 70.0), (50, 90.0), (99, 100.0)]
    assert edges_for_share(percents, 0.8) == 10
    assert edges_for_share(percents, 0.8, stay=True) == 50
    assert edges_for_share(percents, 0.8, target=100) == 10
    assert edges_for_share(percents, 0.8, target=200) is None
    assert edges_for_share(percents, 1.0) == 99


def test_edges_for_a_share_of_a_fall() -> None:
    assert edges_for_share(KL, 0.8, target=0, baseline=10) == 10
    assert edges_for_share(KL, 0.99, target=0, baseline=10) == 100
    assert edges_for_share(KL, 1.0, target=0, baseline=10) is None


def test_shares_of_nothing() -> None:
    with pytest.raises(ConfigError, match="no measurements"):
        edges_for_share([])
    with pytest.raises(ConfigError, match="both 0"):
        edges_for_share([(0, 0.0), (1, 0.0)])


def test_the_figure_of_areas() -> None:
    fig = average_auc_plot(
        {
            "First": {"EAP": KL, "Official": [(3, 1.0)]},
            "Second": {"EAP": KL, "Random": KL},
        },
        log_x=True,
        log_y=True,
        y_min=1e-2,
        title="Areas",
        algo_names={"EAP": "Edge Attribution"},
    )
    first, second, first_off, second_off = fig.data
    assert (first.name, second.name) == ("First", "Second")
    assert list(first.x) == ["Edge Attribution"]
    assert list(first.y) == pytest.approx([1 / 6])
    assert list(first_off.y) == pytest.approx([1 / 3])  # 1 - 1/3 is off, half of it here
    assert list(second.x) == list(second_off.x) == ["Edge Attribution", "Random"]
    assert fig.layout.barmode == "relative"
    assert fig.layout.title.text == "Areas<br><sub>No area for: Official</sub>"


# ------------------------------------------------------------------------ accuracy area


def test_accuracy_area_by_hand() -> None:
    points: Measurements = [(1000, 90.0), (1, 20.0), (0, 5.0), (10, 40.0)]
    # Over decades: one from 20 to 40, two from 40 to 90. The circuit of 0 edges is left out.
    assert accuracy_area(points) == pytest.approx((30.0 + 2 * 65.0) / 3)
    assert accuracy_area([(3, 70.0), (50, 70.0)]) == pytest.approx(70.0)


def test_accuracy_area_of_the_micro_model() -> None:
    """The direct path favours neither answer; what B1.1 writes on clean, the right one."""
    model = micro_model()
    scores = model.circuit_prune_scores(
        edge_dict={"Resid Start->Resid End": 2.0, "B1.1->Resid End": 1.0}
    )
    outs = run_circuits(model, micro_loader(), [1, 2, 13], scores)
    metric = CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC
    points = metric.metric_func(model, micro_loader(), outs)
    assert dict(points) == {1: 0.0, 2: 100.0, 13: 100.0}
    area = 50 * math.log10(2) + 100 * math.log10(13 / 2)
    assert accuracy_area(points) == pytest.approx(area / math.log10(13))


@pytest.mark.parametrize(
    "points,message",
    [
        ([(1, 50.0), (10, 101.0)], "accuracy is 101; expected 0 to 100"),
        ([(0, 50.0), (10, 60.0)], "at least two sizes above 0 edges"),
        ([(1, 5.0), (1, 6.0), (2, 7.0)], "has two values"),
    ],
)
def test_no_accuracy_area(points: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        accuracy_area(points)
