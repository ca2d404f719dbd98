"""Spans that prompt files name: where they are in the model's tokens, and what is an error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit.data import PromptDataLoader, load_datasets_from_json
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.prune_algos.exact_edge_patching import single_edge_effects
from auto_circuit.prune_algos.peap import peap_prune_scores
from auto_circuit.robustness import Choices, chosen_task
from auto_circuit.sweep_config import ExperimentConfig, check_config
from auto_circuit.tasks import Task, task_of_prompts
from auto_circuit.utils.graph_utils import patchable_model
from tests.texts import name_prompts, prompt, text_model, word_tokenizer, write_prompts

SHORT = prompt("Ann met Bob", "Dan met Eve") | {"spans": {"who": [0, 2], "whom": [2, 3]}}
LONG = prompt("the big Ann met Bob at the store", "the big Eve met Dan at the store") | {
    "spans": {
        "clean": {"who": [0, 4], "whom": [4, 8]},
        "corrupt": {"who": [0, 3], "whom": [3, 8]},
    }
}
MIDDLE = prompt("big Ann met Bob", "big Dan met Eve") | {
    "spans": {"who": [0, 3], "whom": [3, 4]}
}


def load(
    path: Path, *, prepend_bos: bool = False, **options: Any
) -> tuple[PromptDataLoader, PromptDataLoader]:
    return load_datasets_from_json(
        text_model(word_tokenizer()),
        path,
        prepend_bos=prepend_bos,
        batch_size=2,
        train_test_size=(2, 1),
        shuffle=False,
        **options,
    )


def numbers(loader: PromptDataLoader) -> list[list[list[int]]]:
    """The spans of clean and corrupt prompts, token by token; -1 is padding."""
    assert loader.spans is not None
    found = []
    for batch in loader:
        for side in ("clean", "corrupt"):
            rows, kwargs = batch.model_input(side)  # type: ignore[arg-type]
            found.append(loader.spans.positions(rows, kwargs["attention_mask"]).tolist())
    return found


def test_spans_are_where_the_file_says(tmp_path: Path) -> None:
    """Prompts of different lengths, each side's own, in both loaders."""
    path = write_prompts(tmp_path, [SHORT, LONG, MIDDLE])
    train, test = load(path)
    assert train.spans is test.spans
    assert train.spans is not None and train.spans.names == ("who", "whom")
    assert numbers(train) == [
        [[-1] * 5 + [0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]],
        [[-1] * 5 + [0, 0, 1], [0, 0, 0, 1, 1, 1, 1, 1]],
    ]
    assert numbers(test) == [[[-1] * 4 + [0, 0, 0, 1]]] * 2


def test_bos_is_a_span_of_its_own(tmp_path: Path) -> None:
    train, _ = load(write_prompts(tmp_path, [SHORT, LONG, MIDDLE]), prepend_bos=True)
    assert train.spans is not None and train.spans.names == ("<|BOS|>", "who", "whom")
    assert numbers(train)[0] == [[-1] * 5 + [0, 1, 1, 2], [0, 1, 1, 1, 1, 2, 2, 2, 2]]


def test_a_cached_prefix_is_in_no_span(tmp_path: Path) -> None:
    """A span that is cut has the rest of its tokens; with none it is not there."""
    spans = {"start": [0, 1], "middle": [1, 4], "end": [4, 8]}
    rows: list[Any] = name_prompts(3, "at the {} met {} at the store")
    rows = [row | {"spans": spans} for row in rows]
    train, _ = load(write_prompts(tmp_path, rows), tail_divergence=True)
    assert train.diverge_idx == 2 and train.spans is not None
    assert train.spans.names == ("middle", "end")
    (batch,) = train
    assert train.spans.positions(batch.clean).tolist() == [[0, 0, 1, 1, 1, 1]] * 2


@pytest.mark.parametrize(
    "change,error",
    [
        (
            {"who": [0, 2], "whom": [1, 3]},
            r"prompt 1, field 'spans' \(clean\): .* overlap",
        ),
        ({"who": [0, 1], "whom": [2, 3]}, "leave out the tokens 1 to 1 of a prompt of 3"),
        ({"who": [0, 2], "whom": [2, 4]}, r"\(2, 4\), in a prompt of 3 tokens"),
        ({"who": [-1, 2], "whom": [2, 3]}, "in a prompt of 3 tokens"),
        ({"whom": [0, 2], "who": [2, 3]}, "come in the order"),
        ({"who": [0, 3], "whom": [3, 3]}, r"\(3, 3\), which is empty"),
        ({"who": [0, 3]}, "lacks the span 'whom', and the first prompt's are"),
        ({"who": [0, 2], "whom": [2, 3], "why": [3, 3]}, "has the span 'why'"),
        ({"who": [0, 2], "whom": 3}, r"expected \{name: \[its first token"),
        ({"who": [0, 2.5], "whom": [2, 3]}, r"expected \{name: \[its first token"),
        ({}, r"expected \{name: \[its first token"),
        ([[0, 3]], r"expected \{name: \[its first token"),
        ({"clean": {"who": [0, 2], "whom": [2, 3]}}, "expected those of 'clean' and"),
        (None, "prompt 1 has no field 'spans'"),
    ],
)
def test_what_is_no_cover_is_one_error(tmp_path: Path, change: Any, error: str) -> None:
    """With file, prompt and field, in tokens as the file counts them, before the model runs."""
    path = write_prompts(tmp_path, [LONG, SHORT | {"spans": change}, MIDDLE])
    with pytest.raises(DataError, match=error):
        load(path, prepend_bos=True)


def test_names_that_a_prompt_may_lack_are_listed(tmp_path: Path) -> None:
    rows = [SHORT | {"spans": {"whom": [0, 3]}}, LONG, MIDDLE]
    train, _ = load(write_prompts(tmp_path, rows, span_names=["who", "whom"]))
    assert numbers(train)[0][0] == [-1] * 5 + [1, 1, 1]
    for names, error in (
        (["whom", "who"], "come in the order"),
        (["whom"], "has the span 'who'"),
        (["who", "who"], "list of different texts"),
        ([], "list of different texts"),
    ):
        with pytest.raises(DataError, match=error):
            load(write_prompts(tmp_path, rows, span_names=names))
    with pytest.raises(DataError, match="unknown field 'span'. Did you mean 'spans'"):
        load(
            write_prompts(tmp_path, [prompt("Ann met Bob", "Dan met Eve") | {"span": {}}])
        )


def test_names_stand_once_and_in_every_file(tmp_path: Path) -> None:
    doubled = '{"prompts": [{"clean": [1], "spans": {"a": [0, 1], "a": [0, 1]}}]}'
    path = tmp_path / "doubled.json"
    path.write_text(doubled)
    with pytest.raises(DataError, match="the key 'a' twice"):
        load(path)
    paths = [
        write_prompts(tmp_path, [SHORT, MIDDLE], "one"),
        write_prompts(tmp_path, name_prompts(2), "two"),
    ]
    with pytest.raises(DataError, match="expected the same names in all files"):
        load_datasets_from_json(text_model(word_tokenizer()), paths)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_other_formats_name_spans_too(tmp_path: Path, suffix: str) -> None:
    rows = [SHORT, MIDDLE, LONG]
    path = tmp_path / f"prompts{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        path.write_text(
            "clean,corrupt,answers,wrong_answers,spans\n"
            + "\n".join(
                ",".join(
                    [row["clean"], row["corrupt"], row["answers"][0]]
                    + [row["wrong_answers"][0]]
                    + ['"' + json.dumps(row["spans"]).replace('"', '""') + '"']
                )
                for row in rows
            )
        )
    train, _ = load(path)
    assert [row[-4:] for row in numbers(train)[0]] == [[-1, 0, 0, 1], [0, 0, 0, 1]]


# ------------------------------------------------------------------------------- tasks


def test_a_prompt_file_with_spans_is_a_task_of_spans(tmp_path: Path) -> None:
    """Its graph has positions for them; prompts of other lengths are the same but for padding."""
    rows = [SHORT, MIDDLE, LONG, SHORT | {"clean": "Eve met Bob"}]
    model = text_model(word_tokenizer())
    task = task_of_prompts(write_prompts(tmp_path, rows), model)
    assert task.span_circuit and not task.token_circuit
    crossing, loader = replace(task, crossing=True).model, task.train_loader
    assert crossing.spans is not None
    assert crossing.position_labels(None) == ["<|BOS|>", "who", "whom"]
    scores = peap_prune_scores(crossing, loader, None)
    (edge,) = crossing.find_edges("A1.0.V[1]->A1.0 by value @ 2")
    assert edge.prune_score(scores) != 0
    assert single_edge_effects(crossing, loader, [edge])[edge] != 0
    alike = chosen_task(task, Choices(token_positions=False))
    assert not alike.tells_positions_apart
    assert chosen_task(task, Choices(token_positions=True)) == task


def labelled(path: Path, **options: Any) -> Task:
    model = text_model(word_tokenizer())
    options = {"token_circuit": False, "span_circuit": True, **options}
    return Task("k", "n", 2, 1, _model_def=model, _dataset_name=path, **options)


def test_labels_of_tokens_are_spans_too(tmp_path: Path) -> None:
    labels = ["who", "met", "whom", "end", "end", "end"]
    path = write_prompts(tmp_path, name_prompts(4), seq_labels=labels)
    model = labelled(path, prepend_bos=False, crossing=True).model
    assert model.spans is not None and model.spans.names[-2:] == ("whom", "end")


@pytest.mark.parametrize(
    "options,error",
    [
        ({"token_circuit": True}, "`token_circuit` and `span_circuit`; expected one"),
        ({"span_circuit": False, "crossing": True}, "or `span_circuit=True` too"),
        ({"crossing": True, "factorized": False}, "Give it `factorized=True` too"),
        ({"crossing": True, "separate_qkv": False}, "Give it `separate_qkv=True` too"),
    ],
)
def test_what_does_not_fit_is_one_error(
    tmp_path: Path, options: dict[str, Any], error: str
) -> None:
    """Before the model is looked at, also for who only reads the prompts."""
    task = labelled(write_prompts(tmp_path, [SHORT, MIDDLE, LONG, SHORT]), **options)
    for look in (task.read_prompts, lambda: task.model):
        with pytest.raises(ConfigError, match=error):
            look()


def test_a_file_without_spans_is_one_error(tmp_path: Path) -> None:
    task = labelled(write_prompts(tmp_path, name_prompts(4)))
    for look in (task.read_prompts, lambda: task.model):
        with pytest.raises(DataError, match="names no spans: give each prompt"):
            look()


@pytest.mark.parametrize(
    "options,error",
    [
        (
            {"algos": ("EAP", "HISP")},
            r"`crossing`\), of which .* know nothing: HISP. Leave",
        ),
        ({"tasks": ("Pocket IOI",), "spans": False}, "or `span_circuit=True` too"),
        ({"nodes": True}, "Give it `factorized=True` too"),
        ({"token_positions": False}, "or `span_circuit=True` too"),
    ],
)
def test_a_sweep_refuses_what_does_not_fit_before_it_begins(
    options: dict[str, Any], error: str, tmp_path: Path
) -> None:
    fits = {"tasks": ("Pocket IOI Tokens",), "algos": ("EAP",), "spans": True}
    plan = check_config(ExperimentConfig(**fits, crossing=True, out=tmp_path))
    assert plan.tasks[0].span_circuit and plan.tasks[0].crossing
    with pytest.raises(ConfigError, match=error):
        check_config(ExperimentConfig(**{**fits, **options}, crossing=True, out=tmp_path))


def test_spans_of_another_file_are_refused(tmp_path: Path) -> None:
    """A prompt whose spans nobody knows does not run."""
    train, _ = load(write_prompts(tmp_path, [SHORT, MIDDLE, LONG]))
    bridge = text_model(word_tokenizer())
    model = patchable_model(
        bridge, True, "last_seq", separate_qkv=True, spans=train.spans, crossing=True
    )
    other, _ = load(write_prompts(tmp_path, name_prompts(3), "other"))
    with pytest.raises(DataError, match="whose spans nobody has given"):
        peap_prune_scores(model, other, None)
    assert t.is_grad_enabled()
