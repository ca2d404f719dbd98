"""Spans of prompts: what covers all tokens once, and one clear error for all else."""

from __future__ import annotations

from typing import Any

import pytest
import torch as t

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.spans import Spans, spans_of_labels, spans_of_prompts
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model
from tests.models import gpt2, tokens

NAMES = ("start", "middle", "end")


def loader(seed: int = 1, n_prompts: int = 2) -> PromptDataLoader:
    clean, corrupt = tokens(n_prompts, 5, seed), tokens(n_prompts, 5, seed + 50)
    mask = t.ones_like(clean)
    mask[0, 0] = 0
    answers = [t.tensor([1])] * n_prompts
    dataset = PromptDataset(clean, corrupt, answers, answers, mask, mask)
    return PromptDataLoader(dataset, None, 0, batch_size=2)


def test_labels_in_a_row_are_a_span() -> None:
    spans = spans_of_labels(["the", "cat", "cat", "and", "the", "the"])
    assert spans.names == ("the", "cat", "and", "the (2)")
    assert spans.of_prompt((0,) * 6) == [0, 1, 1, 2, 3, 3]
    with pytest.raises(DataError, match="leave out the tokens 6 to 6 of a prompt of 7"):
        spans.of_prompt((0,) * 7)
    with pytest.raises(DataError, match="in a prompt of 5 tokens"):
        spans.of_prompt((0,) * 5)


def test_padding_is_in_no_span() -> None:
    spans = Spans(NAMES, lambda text: {"start": (0, 2), "end": (2, len(text))})
    rows, mask = tokens(2, 4), t.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert spans.positions(rows, mask).tolist() == [[-1, 0, 0, 2], [0, 0, 2, 2]]
    with_prefix = t.cat([t.ones(2, 3, dtype=t.long), mask], 1)
    assert spans.positions(rows, with_prefix).tolist() == [[-1, 0, 0, 2], [0, 0, 2, 2]]


@pytest.mark.parametrize(
    "given,error",
    [
        ({"start": (0, 3), "end": (2, 5)}, "'start' and 'end' overlap: .* one span"),
        ({"start": (0, 5), "middle": (1, 2)}, "'start' and 'middle' overlap"),
        (
            {"start": (0, 2), "end": (3, 5)},
            "leave out the tokens 2 to 2 of a prompt of 5",
        ),
        ({"start": (1, 5)}, "leave out the tokens 0 to 0"),
        ({"start": (0, 4)}, "leave out the tokens 4 to 4"),
        ({}, "leave out the tokens 0 to 4"),
        ({"middle": (0, 2), "start": (2, 5)}, "come in the order"),
        ({"start": (0, 6)}, "in a prompt of 5 tokens"),
        ({"start": (3, 1)}, "in a prompt of 5 tokens"),
        ({"begin": (0, 5)}, "has a span 'begin'; the spans are named"),
        ({"start": 5}, "expected \\(its first token"),
        ({"start": (0, 2.5)}, "expected \\(its first token"),
        ([(0, 5)], "expected {name: \\(start, stop\\)}"),
    ],
)
def test_what_is_no_cover_is_one_error(given: Any, error: str) -> None:
    with pytest.raises(DataError, match=error):
        Spans(NAMES, lambda tokens: given).of_prompt((0,) * 5)


def test_names_must_be_different() -> None:
    for names in ((), ("a", "a")):
        with pytest.raises(DataError, match="no name twice"):
            Spans(names, lambda tokens: {})
    with pytest.raises(DataError, match="a label for each token"):
        spans_of_labels([])


def test_spans_of_a_loader_are_those_of_both_sides() -> None:
    prompts = loader()
    of_each = [
        {"start": (0, 1), "end": (1, 4)},
        {"start": (0, 1), "middle": (1, 3), "end": (3, 5)},
    ]
    spans = spans_of_prompts({prompts: of_each})
    assert spans.names == NAMES
    (batch,) = prompts
    for side in ("clean", "corrupt"):
        rows, kwargs = batch.model_input(side)  # type: ignore[arg-type]
        found = spans.positions(rows, kwargs["attention_mask"])
        assert found.tolist() == [[-1, 0, 2, 2, 2], [0, 1, 1, 2, 2]]
    with pytest.raises(DataError, match="whose spans nobody has given"):
        spans.of_prompt((1, 2, 3, 4))
    with pytest.raises(DataError, match="spans of 1 prompts, and the loader has 2"):
        spans_of_prompts({prompts: of_each[:1]})
    with pytest.raises(DataError, match="two different spans"):
        other = [{"start": (0, 2), "end": (2, 4)}, of_each[1]]
        spans_of_prompts({prompts: of_each, loader(): other})


def test_spans_are_looked_at_before_the_model_runs() -> None:
    bridge = gpt2(1, 2)
    with pytest.raises(ConfigError, match="not both"):
        patchable_model(bridge, True, "last_seq", 5, True, spans=spans_of_labels(["a"]))
    spans = spans_of_labels(["a", "b", "b"])
    model = patchable_model(bridge, True, "last_seq", separate_qkv=True, spans=spans)
    assert model.seq_len == 2 and model.spans is spans
    patch = src_ablations(model, tokens(2, 4))
    with (
        t.no_grad(),
        patch_mode(model, patch),
        pytest.raises(DataError, match="leave out the tokens 3 to 3"),
    ):
        model(tokens(2, 4))
