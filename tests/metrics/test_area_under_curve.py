"""Areas by hand, for rising, falling and logarithmic curves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_circuit.errors import ConfigError
from auto_circuit.metrics.area_under_curve import (
    algo_measurements_auc,
    area_share,
    edges_for_share,
    measurements_auc,
    metric_measurements_auc,
    task_measurements_auc,
)
from auto_circuit.metrics.area_under_curve_plot import average_auc_plot
from auto_circuit.types import Measurements

RISING: Measurements = [(0, 1.0), (2, 3.0), (10, 5.0)]
KL: Measurements = [(0, 10.0), (1, 10.0), (10, 1.0), (100, 0.1), (1000, 0.01)]


def test_linear_area_by_hand() -> None:
    # Heights 0, 2, 4: (0+2)/2 * 2 + (2+4)/2 * 8 = 26, over a width of 10.
    assert measurements_auc(RISING) == pytest.approx(2.6)
    assert area_share(RISING) == pytest.approx(2.6 / 4)


def test_a_falling_curve_has_a_negative_area() -> None:
    falling: Measurements = [(x, -y) for x, y in RISING]
    assert measurements_auc(falling) == pytest.approx(-2.6)
    assert area_share(falling) == pytest.approx(2.6 / 4)


def test_logarithmic_sizes_by_hand() -> None:
    points: Measurements = [(0, 1.0), (1, 2.0), (10, 4.0), (1000, 5.0)]
    # Heights 1, 3, 4 at X = 0, 1, 3: (1+3)/2 * 1 + (3+4)/2 * 2 = 9, over a width of 3.
    assert measurements_auc(points, log_x=True) == pytest.approx(3.0)


def test_logarithmic_values_by_hand() -> None:
    # Decades below the value at 0 edges: 0, 1, 2, 3 at X = 0, 1, 2, 3.
    area = measurements_auc(KL, log_x=True, log_y=True, y_min=1e-2)
    assert area == pytest.approx(-1.5)
    # With a higher floor: 0, 1, 2, 2.
    area = measurements_auc(KL, log_x=True, log_y=True, y_min=0.1)
    assert area == pytest.approx(-(0.5 + 1.5 + 2) / 3)


def test_two_different_divergence_curves_have_different_areas() -> None:
    slow: Measurements = [(0, 10.0), (1, 10.0), (10, 9.0), (100, 8.0), (1000, 0.01)]
    fast_share = area_share(KL, True, True, 1e-2)
    slow_share = area_share(slow, True, True, 1e-2)
    assert fast_share == pytest.approx(0.5)
    assert 0 < slow_share < 0.25
    assert measurements_auc(KL, True, True, 1e-2) < measurements_auc(
        slow, True, True, 1e-2
    )


def test_points_may_come_in_any_order() -> None:
    assert measurements_auc(RISING[::-1]) == measurements_auc(RISING)


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
    area = measurements_auc(points)
    assert min(heights) - 1e-9 <= area <= max(heights) + 1e-9


@given(st.floats(0.1, 10), st.booleans())
def test_a_flat_curve_at_the_full_value_has_share_1(height: float, log_x: bool) -> None:
    points: Measurements = [(0, 0.0), (1, height), (10, height), (50, height)]
    share = area_share(points, log_x)
    # On a linear axis the rise from 0 to 1 edge takes a fiftieth of the width.
    assert share == pytest.approx(1.0 if log_x else 0.99)


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


@pytest.mark.parametrize("y_min", [None, 0.0])
def test_logarithmic_values_need_a_minimum(y_min: float | None) -> None:
    with pytest.raises(ConfigError, match="needs a `y_min` above 0"):
        measurements_auc(RISING, log_y=True, y_min=y_min)


def test_nested_areas() -> None:
    algos = {"EAP": RISING, "Official": [(3, 1.0)]}
    areas = algo_measurements_auc(algos)
    assert areas["EAP"] == pytest.approx(2.6) and math.isnan(areas["Official"])
    assert task_measurements_auc({"Task": {"EAP": RISING}}) == {"Task": {"EAP": 2.6}}
    by_metric = metric_measurements_auc({"Clean KL Div": {"Task": {"EAP": KL}}})
    assert by_metric["Clean KL Div"]["Task"]["EAP"] == pytest.approx(-1.5)
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
    first, second = fig.data
    assert (first.name, second.name) == ("First", "Second")
    assert list(first.x) == ["Edge Attribution"]
    assert list(first.y) == pytest.approx([0.25])
    assert list(second.x) == ["Edge Attribution", "Random"]
    assert fig.layout.barmode == "relative"
    assert fig.layout.title.text == "Areas<br><sub>No area for: Official</sub>"
