"""Wrong enums and Literals are errors of ours where nothing else checks types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.public_arguments import check_refused, choice_parameters

CHOICES = list(choice_parameters())


@pytest.mark.parametrize(
    ("function", "name", "annotation"),
    [case[1:] for case in CHOICES],
    ids=[f"{path}:{name}" for path, _, name, _ in CHOICES],
)
def test_wrong_choices_are_refused(
    function: Callable[..., Any], name: str, annotation: Any
) -> None:
    check_refused(function, name, annotation)
