"""Checks of arguments: what passes, and what errors say."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch as t

from auto_circuit.checks import (
    check_choice,
    check_count,
    check_member,
    check_number,
    seeded_generator,
)
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


@pytest.mark.parametrize("value", [True, 1.0, np.int64(1), "1"])
def test_what_is_only_equal_is_no_choice(value: object) -> None:
    check_choice("n", 1, Literal[1, 2])
    with pytest.raises(ConfigError, match="expected one of 1, 2"):
        check_choice("n", value, Literal[1, 2])


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


def test_the_ends_of_ranges() -> None:
    assert check_count("n", 10, at_most=10) == 10 and check_count("n", 1) == 1
    assert [check_number("x", end, 0, 1) for end in (0, 1)] == [0, 1]
    for end in (0, 1):
        with pytest.raises(ConfigError, match="a finite number, above 0 and below 1"):
            check_number("x", end, above=0, below=1)
    for value in (math.inf, -math.inf):
        with pytest.raises(ConfigError, match="expected a finite number"):
            check_number("x", value)


def test_seeds_are_whole_numbers_of_63_bits() -> None:
    before = t.get_rng_state()
    for seed in (0, 7, 2**63 - 1):
        draws = [t.rand(3, generator=seeded_generator(seed)) for _ in range(2)]
        assert t.equal(*draws)
    assert t.equal(t.get_rng_state(), before)
    for wrong in (-1, 2**63, 1.0, True, None):
        with pytest.raises(ConfigError, match="`seed` is .*; expected at least 0 and at"):
            seeded_generator(wrong)
