"""What short paths do: by hand, and against circuits that have just these paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch as t

from auto_circuit.circuits import circuit_of_edges
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.metrics.circuit_outs import circuit_prompt_vals
from auto_circuit.metrics.path_lengths import faithfulness_of_short_paths, path_depth
from auto_circuit.metrics.prune_metrics.prune_metrics import LOGIT_DIFF_METRIC
from auto_circuit.model_utils.micro_model_utils import MicroModel
from auto_circuit.types import Edge
from auto_circuit.utils.graph_utils import patchable_model
from tests.micro import CLEAN, micro_loader
from tests.models import MORE_ARCHITECTURES, gpt2, llama, tokens


def test_by_hand() -> None:
    """A block maps x to x + a x, with a = 4 and 6: three of them have 3 a + 3 a² + a³."""
    model = patchable_model(MicroModel(3), True, "last_seq")
    found = faithfulness_of_short_paths(model, micro_loader([1.0, 2.0], batch_size=1))
    differences = [0, 3 * 2, 3 * 2 + 3 * (36 - 16), 7**3 - 5**3]
    assert found == pytest.approx([d / differences[-1] for d in differences], abs=1e-6)
    shares = (0, 0.02, 0.3, 0.5, 0.999)
    assert [path_depth(found, share) for share in shares] == [0, 1, 2, 3, 3]


def loader() -> PromptDataLoader:
    answers, wrong = ([t.tensor([word])] * 3 for word in (1, 2))
    dataset = PromptDataset(tokens(3, 5, seed=1), tokens(3, 5, seed=2), answers, wrong)
    return PromptDataLoader(dataset, None, 0, batch_size=2)


def is_direct(edge: Edge) -> bool:
    """From the start, or to the end: no edge between two nodes."""
    return edge.src.kind == "embed" or edge.dest.kind == "unembed"


@pytest.mark.parametrize(
    ("make", "positions", "longest"),
    [
        (gpt2, None, 4),
        (llama, 5, 4),
        pytest.param(MORE_ARCHITECTURES["gemma2"], None, 4, marks=pytest.mark.slow),
    ],
)
def test_one_node_is_the_circuit_of_direct_edges(
    make: Any, positions: int | None, longest: int
) -> None:
    model = patchable_model(
        make().double(), True, "last_seq", positions, separate_qkv=True
    )
    before = {name: mask.clone() for name, mask in model.patch_masks.items()}
    found = faithfulness_of_short_paths(model, loader())
    assert len(found) == longest + 1 and found[-1] == pytest.approx(1, abs=1e-6)
    edges = list(model.edges)
    circuits = [
        circuit_of_edges(model, [e for e in edges if keeps(e)])
        for keeps in (
            lambda e: False,
            lambda e: e.src.kind == "embed" and e.dest.kind == "unembed",
            is_direct,
            lambda e: True,
        )
    ]
    vals = circuit_prompt_vals(model, loader(), circuits, LOGIT_DIFF_METRIC).mean(1)
    nothing, start, direct, whole = vals.tolist()
    expected = [(value - nothing) / (whole - nothing) for value in (start, direct)]
    assert found[:2] == pytest.approx(expected, abs=1e-6) and abs(found[1] - 1) > 1e-3
    assert all(t.equal(before[n], mask) for n, mask in model.patch_masks.items())


def test_what_cannot_be_measured() -> None:
    model = patchable_model(MicroModel(), True, "last_seq")
    answer, wrong = [t.tensor([1])], [t.tensor([0])]
    same = PromptDataset([CLEAN], [CLEAN], answer, wrong)
    with pytest.raises(DataError, match="equal within rounding"):
        faithfulness_of_short_paths(model, PromptDataLoader(same, None, 0, batch_size=1))
    with pytest.raises(ConfigError, match="`share` is 1.5"):
        path_depth([0.0, 1.0], 1.5)
    with pytest.raises(ConfigError, match="ends below the share 0.8"):
        path_depth([0.0, 0.9, 0.7])


def test_a_share_that_is_lost_again_does_not_count() -> None:
    assert path_depth([0.0, 0.9, 0.7, 1.0]) == 3
    assert path_depth([0.8]) == 0
