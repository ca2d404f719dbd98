"""Under pytest every function of the package checks its types and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch as t
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from auto_circuit.summary import slug
from auto_circuit.utils.tensor_ops import multibatch_kl_div
from tests.typechecked import jaxtyped

checked = jaxtyped(typechecker=beartype)


@checked
def no_shapes(count: int, names: list[str] | None = None) -> str:
    return names[0] if names else count  # type: ignore[return-value]


@checked
def shapes(a: Float[Tensor, "n"], b: list[Float[Tensor, "n"]]) -> Float[Tensor, "n n"]:
    return a + b[0]


@checked
def generator(count: int) -> Iterator[int]:
    yield count


@checked
def not_there_yet(count: int, later: Later) -> int:  # type: ignore[name-defined] # noqa: F821
    return count


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (no_shapes, ("1", ["x"])),
        (no_shapes, (1, [2])),
        (no_shapes, (1,)),  # what it returns
        (shapes, (t.ones(2), [t.ones(3)])),
        (shapes, (t.ones(2), [t.ones(2)])),  # what it returns
        (generator, ("1",)),
        (not_there_yet, ("1", 2)),
        (slug, (1,)),
        (multibatch_kl_div, (t.ones(2, 3), t.ones(2, 4))),
    ],
)
def test_a_wrong_type_or_shape_is_an_error(func: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(TypeCheckError):
        func(*args)


def test_right_ones_are_none() -> None:
    assert no_shapes(1, ["x"]) == "x"
    assert list(generator(1)) == [1] and not_there_yet(1, 2) == 1
    assert no_shapes.__annotations__["count"] == "int"
