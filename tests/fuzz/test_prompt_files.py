"""Prompt files of any content: loaded, or an error of ours."""

from __future__ import annotations

import csv
import io
import json
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from auto_circuit.data import load_datasets_from_json
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.prompt_files import FIELDS, FILE_FIELDS, READERS
from auto_circuit.tasks import POCKET_MODEL
from tests.fuzzing import only_our_errors

pocket_model = cache(lambda: load_tl_model(POCKET_MODEL))
FOLDER = Path(tempfile.mkdtemp())

NUMBERS = st.one_of(
    st.integers(-2, 400),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**40, 1e39, 1e308]),
)
WORDS = st.one_of(
    st.sampled_from([" Mary", " John", "After", " store", "<|endoftext|>", "", "[1]"]),
    st.text(max_size=6),
    st.text(st.characters(exclude_categories=()), max_size=6),
)
TEXTS = st.lists(WORDS, max_size=5).map("".join)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from([*FIELDS, *FILE_FIELDS, "x"]), inner, max_size=4),
    ),
    max_leaves=12,
)
SENTENCE = st.sampled_from(
    [
        "After Mary and John arrived at the store, John handed a drink to",
        "After John and Mary arrived at the store, Mary handed a drink to",
        "After John arrived",
        "Mary " * 70,
        [0, 1, 2, 3],
        [5, 6, 7, 8],
        [400, 1],
    ]
)
ANSWER = st.sampled_from([" Mary", " John", 3, 4, -1, 400, " Mary John", "Zq"])
ANSWERS = st.lists(ANSWER, max_size=3)
SPAN = st.lists(st.integers(-1, 5), min_size=2, max_size=2)
ONE_SIDE = st.one_of(
    st.just({"a": [0, 2]}),
    st.dictionaries(
        st.sampled_from(["a", "b", "clean"]), st.one_of(SPAN, JSON), max_size=3
    ),
)
SPANS = st.one_of(
    ONE_SIDE, st.fixed_dictionaries({"clean": ONE_SIDE, "corrupt": ONE_SIDE}), JSON
)
GOOD_PROMPT = st.fixed_dictionaries(
    {
        "clean": SENTENCE,
        "corrupt": SENTENCE,
        "answers": ANSWERS,
        "wrong_answers": ANSWERS,
    },
    optional={"spans": SPANS},
)
NESTED = st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3), max_leaves=8)
NUMBER_PROMPT = st.fixed_dictionaries(
    {name: st.lists(NESTED, max_size=3) for name in FIELDS}
)


@st.composite
def mutated(draw: st.DrawFn, rows: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    """A prompt with some fields lost, renamed, or of any kind."""
    row = dict(draw(rows))
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=2, unique=True)):
        value = row.pop(name)
        how = draw(st.sampled_from(["lost", "renamed", "other"]))
        if how == "renamed":
            row[draw(st.sampled_from([f"{name}s", name[1:], name.upper()]))] = value
        elif how == "other":
            row[name] = draw(JSON)
    return row


def rows_of(prompts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[Any]:
    return st.lists(st.one_of(prompts, mutated(prompts), JSON), min_size=1, max_size=4)


ROWS = st.one_of(
    st.lists(GOOD_PROMPT, min_size=1, max_size=4),
    rows_of(GOOD_PROMPT),
    rows_of(NUMBER_PROMPT),
)
CONTENT = st.one_of(
    st.fixed_dictionaries(
        {"prompts": ROWS},
        optional={
            "seq_labels": st.one_of(st.lists(TEXTS, max_size=5), JSON),
            "word_idxs": st.one_of(st.dictionaries(TEXTS, st.integers(-1, 9)), JSON),
            "span_names": st.one_of(st.just(["a", "b"]), st.lists(TEXTS), JSON),
        },
    ),
    JSON,
)


def try_to_load(
    content: bytes, suffix: str, has_model: bool, positions: bool, n_train: int = 1
) -> None:
    path = FOLDER / f"prompts{suffix}"
    path.write_bytes(content)
    with only_our_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, _ = load_datasets_from_json(
            pocket_model() if has_model else None,
            path,
            prepend_bos=has_model,
            train_test_size=(n_train, 0),
            return_seq_length=positions,
        )
        assert sum(len(batch.clean) for batch in train) == n_train


@given(CONTENT, st.booleans(), st.booleans(), st.integers(1, 4))
def test_json(content: Any, has_model: bool, positions: bool, n_train: int) -> None:
    try_to_load(json.dumps(content).encode(), ".json", has_model, positions, n_train)


@given(ROWS, st.booleans(), st.integers(1, 4))
def test_json_lines(rows: list[Any], has_model: bool, n_train: int) -> None:
    content = "\n".join(json.dumps(row) for row in rows)
    try_to_load(content.encode(), ".jsonl", has_model, False, n_train)


COLUMNS = st.lists(
    st.sampled_from([*FIELDS, "answers_1", "answers_2", "wrong_answers_1", "seq_labels"]),
    min_size=1,
    max_size=6,
)
CELLS = st.one_of(TEXTS, SENTENCE.map(str), ANSWERS.map(json.dumps), JSON.map(json.dumps))


@given(
    st.one_of(st.just(list(FIELDS)), COLUMNS),
    st.lists(st.lists(CELLS, min_size=4, max_size=4), max_size=4),
    st.booleans(),
)
def test_csv(columns: list[str], rows: list[list[str]], has_model: bool) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([columns, *(row[: len(columns)] for row in rows)])
    content = file.getvalue().encode("utf-8", "surrogatepass")
    try_to_load(content, ".csv", has_model, False)


@given(st.binary(max_size=60), st.sampled_from([*READERS, ".txt"]), st.booleans())
def test_bytes(content: bytes, suffix: str, has_model: bool) -> None:
    try_to_load(content, suffix, has_model, False)


GOOD_JSON = json.dumps(
    {
        "prompts": [
            {
                "clean": "After Mary",
                "corrupt": "After John",
                "answers": [" John", 7],
                "wrong_answers": [" Mary"],
                "spans": {"a": [0, 1], "b": [1, 2]},
            }
        ],
        "span_names": ["a", "b"],
        "seq_labels": ["a", "b"],
        "word_idxs": {"a": 0},
    }
).encode()


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD_JSON) - 1), st.binary(max_size=3))),
    st.sampled_from(list(READERS)),
    st.booleans(),
)
def test_damaged_files(
    edits: list[tuple[int, bytes]], suffix: str, positions: bool
) -> None:
    content = bytearray(GOOD_JSON)
    for place, piece in edits:
        content[place : place + 1] = piece
    try_to_load(bytes(content), suffix, True, positions)
