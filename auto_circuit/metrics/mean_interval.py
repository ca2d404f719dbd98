"""The mean of a few seeds' values, and how far the true mean may be from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t that is exceeded with probability 0.025, for 1, 2, ... degrees of freedom."""
NORMAL_975 = 1.959964
"""The same of the normal distribution, which Student's comes near."""


class MeanInterval(NamedTuple):
    """A mean, and half the width of its 95 % interval, both in the values' unit.

    NaN: not known; the interval of a single value is not.
    """

    mean: float
    plus_minus: float


UNKNOWN_MEAN = MeanInterval(math.nan, math.nan)


def mean_interval(values: Sequence[int | float | None]) -> MeanInterval:
    """The mean with Student's 95 % interval: mean +- t * standard deviation / sqrt(n).

    It holds for independent draws from about a normal distribution. Unknown (NaN) without
    values, and if one of them is None or NaN: then no mean of them all is known.
    """
    known = [float(value) for value in values if value is not None]
    if not known or len(known) < len(values) or any(map(math.isnan, known)):
        return UNKNOWN_MEAN
    if len(known) == 1:
        return MeanInterval(known[0], math.nan)
    error = stdev(known) / math.sqrt(len(known))
    return MeanInterval(fmean(known), student_975(len(known) - 1) * error)


def student_975(degrees: int) -> float:
    """Student's t that is exceeded with probability 0.025, to three digits."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    # The first terms of Cornish and Fisher's series.
    z = NORMAL_975
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2
