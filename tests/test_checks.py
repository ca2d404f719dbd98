"""Checks of arguments: what passes, and what errors say."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from auto_circuit.checks import check_choice, check_count, check_member, check_number
from auto_circuit.errors import ConfigError
from auto_circuit.types import MaskFn, PatchType


def test_choices_of_a_union_with_none() -> None:
    for value in ("hard_concrete", "sigmoid", None):
        check_choice("mask_fn", value, MaskFn)
    with pytest.raises(ConfigError, match="`mask_fn` is 'x'; .*'sigmoid', None"):
        check_choice("mask_fn", "x", MaskFn)


@pytest.mark.parametrize("value", [True, 1, [], {}, float("nan"), np.ones(2)])
def test_other_types_are_no_choice(value: object) -> None:
    with pytest.raises(ConfigError, match="expected one of 'a', 'b'"):
        check_choice("letter", value, Literal["a", "b"])


@pytest.mark.parametrize("value", ["TREE_PATCH", None, 1, True, 2])
def test_only_members_are_members(value: object) -> None:
    with pytest.raises(ConfigError, match="expected one of PatchType.EDGE_PATCH, "):
        check_member("patch_type", value, PatchType)
    assert check_member("p", PatchType.TREE_PATCH, PatchType) is PatchType.TREE_PATCH


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None, float("nan"), 11])
def test_counts_are_whole_numbers_in_range(value: object) -> None:
    with pytest.raises(
        ConfigError, match="`n` is .*; expected at least 1 and at most 10"
    ):
        check_count("n", value, at_most=10)


def test_counts_of_numpy_are_ints() -> None:
    count = check_count("n", np.int64(4))
    assert count == 4 and type(count) is int


@pytest.mark.parametrize(
    "value", ["1", None, True, float("nan"), float("inf"), -0.1, 1.1]
)
def test_numbers_are_finite_and_in_range(value: object) -> None:
    with pytest.raises(ConfigError, match="`x` is .*a finite number, at least 0 and at"):
        check_number("x", value, 0, 1)


def test_numbers_of_numpy_are_floats() -> None:
    assert type(check_number("x", np.float32(0.5), 0, 1)) is float
