"""Files of the benchmark's data sets with any content: prompts, or an error of ours."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pandas
from hypothesis import given
from hypothesis import strategies as st

from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.mib_prompts import MIB_TASKS, find_mib_task, mib_prompts, read_mib_pairs
from auto_circuit.tasks import POCKET_MODEL
from tests.fuzzing import only_our_errors

HOME = Path(tempfile.mkdtemp())
tokenizer = cache(lambda: load_tl_model(POCKET_MODEL).tokenizer)

LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-3, 9), st.floats()),
    st.text(max_size=5),
    st.sampled_from(["Mary", " John", "A", "+", "-", "12", ""]),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["prompt", "label", "text", "answerKey", "x"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)
TEXT = st.sampled_from(
    ["Mary and John", "John and Mary", "Mary", "Zyx \u202e \U0001f642"]
)
WORD = st.sampled_from(["Mary", "John", "A", "B", "store", "Zyx"])


def asked(word: st.SearchStrategy[str]) -> dict[str, st.SearchStrategy[Any]]:
    """The fields of a question, of all tasks at once."""
    choices = st.fixed_dictionaries(
        {"label": st.lists(word, min_size=2, max_size=3), "text": st.just(["x", "y"])}
    )
    return {
        "prompt": TEXT,
        "choices": choices,
        "answerKey": st.integers(0, 1),
        "label": word,
        "operator": st.sampled_from(["+", "-"]),
    }


FIELDS = {
    **asked(WORD),
    "metadata": st.fixed_dictionaries(
        {"indirect_object": WORD, "subject": WORD, "random_c": WORD}
    ),
    **{
        f"{kind}_counterfactual": st.fixed_dictionaries(asked(WORD))
        for kind in ("s2_io_flip", "symbol", "random")
    },
}
ROW = st.fixed_dictionaries(FIELDS)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A row in which some fields are lost, renamed, or of any kind; at any depth."""
    row = draw(ROW)
    for _ in range(draw(st.integers(0, 2))):
        inside = row
        while True:
            name = draw(st.sampled_from(sorted(inside)))
            if not isinstance(inside[name], dict) or not inside[name]:
                break
            inside = inside[name]
            if draw(st.booleans()):
                name = draw(st.sampled_from(sorted(inside)))
                break
        value = inside.pop(name)
        how = draw(st.sampled_from(["lost", "renamed", "other"]))
        if how != "lost":
            inside[f"{name}s" if how == "renamed" else name] = (
                value if how == "renamed" else draw(JSON)
            )
        if not inside:
            break
    return row


ROWS = st.lists(st.one_of(ROW, mutated(), JSON), min_size=1, max_size=4)
SUFFIXES = st.sampled_from([".json", ".jsonl", ".parquet"])
TASKS = st.sampled_from(sorted(MIB_TASKS))


def file_of(rows: list[Any], suffix: str) -> bytes:
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    buffer = io.BytesIO()
    try:
        pandas.DataFrame([row for row in rows if isinstance(row, dict)]).to_parquet(
            buffer
        )
    except Exception:  # rows that no table can hold
        return b""
    return buffer.getvalue()


def try_to_read(task: str, content: bytes, suffix: str, n_prompts: int | None) -> None:
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    (HOME / f"train{suffix}").write_bytes(content)
    with only_our_errors():
        pairs = read_mib_pairs(find_mib_task(task), "train", HOME)
        assert pairs
        found = mib_prompts(pairs, tokenizer(), n_prompts)
        assert n_prompts is None or len(found.prompts) == n_prompts


@given(TASKS, ROWS, SUFFIXES, st.one_of(st.none(), st.integers(-1, 4)))
def test_rows(task: str, rows: list[Any], suffix: str, n_prompts: int | None) -> None:
    try_to_read(task, file_of(rows, suffix), suffix, n_prompts)


@given(
    TASKS,
    st.lists(ROW, min_size=1, max_size=2),
    SUFFIXES,
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), min_size=1, max_size=3),
)
def test_damaged_files(
    task: str, rows: list[Any], suffix: str, edits: list[tuple[float, bytes]]
) -> None:
    content = bytearray(file_of(rows, suffix))
    for place, piece in edits:
        start = int(place * max(0, len(content) - 1))
        content[start : start + 1] = piece
    try_to_read(task, bytes(content), suffix, None)


@given(
    st.text(max_size=12), st.text(max_size=8), st.one_of(st.none(), st.text(max_size=8))
)
def test_names(task: str, folder: str, counterfactual: str | None) -> None:
    with only_our_errors():
        found = find_mib_task(task)
        read_mib_pairs(found, "train", folder, counterfactual)
