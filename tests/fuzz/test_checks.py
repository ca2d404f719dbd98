"""Checks of arguments, for values of any type."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from auto_circuit.checks import check_choice, check_count, check_member, check_number
from auto_circuit.types import MaskFn, PatchType
from tests.fuzzing import only_our_errors

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.sampled_from([*PatchType, "sigmoid"]),
)


@given(value=ANYTHING)
def test_checks(value: Any) -> None:
    for check in (
        lambda: check_choice("x", value, MaskFn),
        lambda: check_member("x", value, PatchType),
        lambda: check_count("x", value, 1, 10),
        lambda: check_number("x", value, 0, 1),
    ):
        with only_our_errors():
            check()
