"""Means over seeds, against an integral of Student's density."""

from __future__ import annotations

import math
import statistics

import pytest

from auto_circuit.metrics.mean_interval import mean_interval, student_975


@pytest.mark.parametrize("degrees", [*range(1, 33), 60, 500])
def test_the_table_of_quantiles(degrees: int) -> None:
    """Within t, 95 % of the density lies. Simpson's rule over x = tan(angle)."""
    log_norm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    norm = math.exp(log_norm) / math.sqrt(degrees * math.pi)

    def height(angle: float) -> float:
        x = math.tan(angle)
        return norm * (1 + x * x / degrees) ** (-(degrees + 1) / 2) * (1 + x * x)

    end, n = math.atan(student_975(degrees)), 400
    weights = [1, *([4, 2] * (n // 2))][:n] + [1]
    area = sum(w * height(i * end / n) for i, w in enumerate(weights)) * end / n / 3
    assert 2 * area == pytest.approx(0.95, abs=1e-4)


def test_a_mean_and_its_interval() -> None:
    mean, plus_minus = mean_interval([1, 2.0, 6])
    assert mean == 3
    assert plus_minus == pytest.approx(4.303 * statistics.stdev([1, 2, 6]) / 3**0.5)
    assert mean_interval([2.0, 2.0]) == (2, 0)


def test_what_is_not_known() -> None:
    mean, plus_minus = mean_interval([4.0])
    assert mean == 4 and math.isnan(plus_minus)
    for values in ([], [1.0, None], [math.nan, 1.0, 2.0], [None]):
        assert all(map(math.isnan, mean_interval(values)))


def test_many_values() -> None:
    """The quantile of 119 degrees of freedom is scipy's."""
    values = [float(i % 3) for i in range(120)]
    mean, plus_minus = mean_interval(values)
    assert mean == 1.0
    half_width = 1.9801 * statistics.stdev(values) / 120**0.5
    assert plus_minus == pytest.approx(half_width, rel=1e-4)
