"""Wrong arguments of public functions are errors of ours where nothing else checks types."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from enum import EnumMeta
from typing import Any, get_args

import numpy as np
import pytest
import torch as t
from hypothesis import given
from hypothesis import strategies as st

from auto_circuit.errors import ConfigError
from auto_circuit.types import AblationType, EdgeCounts, PatchType
from tests.public_arguments import (
    check_refused,
    checked_functions,
    choice_parameters,
    choices_in,
    required_parameters,
)

CHOICES = list(choice_parameters())
FUNCTIONS = list(checked_functions())


class Nonsense:
    """What fits no annotation."""

    def __repr__(self) -> str:
        raise RuntimeError("whatever shows it must not ask it")


class SomeText(str):
    """A text that is no plain one."""


NUMBERS = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.builds(lambda: -(10**5000)),  # which Python does not show
    st.sampled_from([10**400, np.int64(3), np.float32("nan"), np.bool_(1)]),
)
TEXTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["\ud800", "clean", "Clean", "logit", "EDGE_PATCH", SomeText("clean")]
    ),
)
PLAIN = st.one_of(
    NUMBERS, TEXTS, st.none(), st.binary(max_size=3), st.builds(Nonsense), st.just(...)
)
OBJECTS = st.sampled_from(
    [
        *(*PatchType, *AblationType, *EdgeCounts, PatchType, int),
        *(t.ones(2), t.ones(2, 3), t.ones(0), t.tensor(1), t.ones(2).bool()),
        *(t.ones(2, device="meta"), t.ones(2, 2).to_sparse(), t.ones(1).cfloat()),
        *(np.ones(2), np.array(["a"]), np.array(None), np.ones((2, 2), "i8")),
        *(range(3), range(10**12), t.nn.Linear(1, 1), lambda: None),
    ]
)
VALUES = st.recursive(
    st.one_of(PLAIN, OBJECTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(iter),
        st.dictionaries(st.text(max_size=3), inner, max_size=2),
    ),
    max_leaves=4,
)


@pytest.mark.parametrize(
    ("function", "name", "annotation"),
    [case[1:] for case in CHOICES],
    ids=[f"{path}:{name}" for path, _, name, _ in CHOICES],
)
def test_wrong_choices_are_refused(
    function: Callable[..., Any], name: str, annotation: Any
) -> None:
    check_refused(function, name, annotation)


@given(case=st.sampled_from(CHOICES), value=VALUES)
def test_any_value_is_a_choice_or_is_refused(case: Any, value: Any) -> None:
    _, function, name, annotation = case
    known = [
        choice
        for kind in choices_in(annotation)
        for choice in (list(kind) if isinstance(kind, EnumMeta) else get_args(kind))
    ]
    is_text = isinstance(value, str)
    if any(value is one or (is_text and value == one) for one in known):
        return
    if isinstance(annotation, type) or not (value is None or is_many(value)):
        with pytest.raises(ConfigError, match=f"`{name}` is "):
            function(**{**required_parameters(function), name: value})


def is_many(value: Any) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, str)


@given(case=st.sampled_from(FUNCTIONS), data=st.data())
def test_a_wrong_argument_is_named_whatever_the_others_are(
    case: Any, data: st.DataObject
) -> None:
    function, names = case
    wrong = data.draw(st.sampled_from(names))
    parameters = inspect.signature(function).parameters
    values = {
        name: data.draw(VALUES)
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    with pytest.raises(ConfigError, match=re.escape(f"`{wrong}` is a Nonsense; exp")):
        function(**{**values, wrong: Nonsense()})
