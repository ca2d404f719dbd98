"""Every public function refuses what is no member of its enums and Literals.

The functions are found by walking through the package, so that a new one cannot forget it
(with `auto_circuit.checks.checked`). `tests/fuzz/test_public_arguments.py` does the same
without run-time type checks, as users' processes run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError
from auto_circuit.types import EdgeCounts, PatchType, TestEdges
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


def test_the_walk_finds_functions_of_every_kind() -> None:
    found = {f"{path}:{name}" for path, _, name, _ in CHOICES}
    assert len(found) > 80
    for expected in (
        "prune.run_circuits:patch_type",
        "robustness.Choices.__init__:ablation",
        "metrics.prune_metrics.full_model_outs.FullModelOuts.vals:side",
        "experiment_utils.ioi_circuit_single_template_logit_diff_percent:circuit",
        "utils.graph_utils.patchable_model:slice_output",
        "utils.graph_utils.mask_fn_mode:mask_fn",
        "utils.edge_counts.edge_counts_util:test_counts",
        "metrics.prune_metrics.measure_prune_metrics.measure_prune_metrics:ablation_types",
        "visualize.draw_seq_graph:orientation",
    ):
        assert f"auto_circuit.{expected}" in found


@checked
def _example(
    kind: PatchType = PatchType.EDGE_PATCH,
    side: Literal["clean", "corrupt"] | None = None,
    flag: bool = False,
    count: int = 1,
    share: int | float = 0.5,
    counts: TestEdges | None = None,
    names: list[str] | None = None,
    sizes: Sequence[int] = (),
    scores: dict[str, Tensor] | None = None,
    vals: Float[Tensor, "batch vocab"] | None = None,
    anything: Any = None,
) -> str:
    return "called"


GOOD: list[dict[str, Any]] = [
    {"kind": PatchType.TREE_PATCH, "side": "clean", "flag": np.bool_(True)},
    {"count": np.int64(4), "share": np.float32(0.5)},
    {"share": 1, "counts": EdgeCounts.ALL, "names": ("a", "b"), "scores": {}},
    {"sizes": np.array([1, 2])},
    {"counts": [1, 0.5], "vals": t.zeros(1, 2), "anything": object()},
]
WRONG: list[tuple[str, Any, str]] = [
    ("kind", "TREE_PATCH", "expected one of PatchType.EDGE_PATCH, PatchType.TREE_PATCH"),
    ("side", "Clean", "'Clean'; expected one of 'clean', 'corrupt' or None"),
    ("flag", "False", "expected True or False"),
    ("flag", 1, "expected True or False"),
    ("count", 2.0, "expected a whole number"),
    ("count", True, "True; expected a whole number"),
    ("share", "0.5", "expected a number"),
    ("counts", "ALL", "expected one of EdgeCounts.ALL"),
    ("names", "abc", "expected a list .of a text each. or None"),
    ("names", (name for name in "ab"), "a generator; expected a list"),
    ("sizes", {1: 2}, "expected a list .of a whole number .an int. each"),
    ("sizes", (size for size in (1, 2)), "a generator; expected a list"),
    ("sizes", np.ones((2, 2), dtype=int), "expected a list"),
    ("sizes", [1, 2.0], "expected a list"),
    ("scores", [t.zeros(2)], "expected a dictionary"),
    ("vals", np.zeros(2), "a ndarray; expected a Tensor .batch vocab. .float."),
    ("vals", t.zeros(2), r"a Tensor .2. .torch.float32.; expected a Tensor"),
    ("vals", t.zeros(1, 2, 3), r"a Tensor .1, 2, 3. .torch.float32.; expected a Tensor"),
    ("vals", t.zeros(1, 2).long(), r"a Tensor .1, 2. .torch.int64.; expected a Tensor"),
]


@pytest.mark.parametrize("arguments", GOOD)
def test_good_arguments_are_handed_on(arguments: dict[str, Any]) -> None:
    assert _example(**arguments) == "called"


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_arguments_are_what_annotations_say(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` is .*{message}"):
        _example(**{name: value})


def test_all_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="`kind` is None.*`flag` is 'no'"):
        _example(None, flag="no")  # type: ignore[arg-type]
