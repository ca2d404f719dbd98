"""Arguments of any kind for loaders, tasks and hand-made prompts."""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch as t
from hypothesis import given
from hypothesis import strategies as st

from auto_circuit.data import (
    PromptDataLoader,
    PromptDataset,
    PromptPair,
    PromptPairBatch,
    collate_fn,
    load_datasets_from_json,
)
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.tasks import POCKET_IOI_TASK, POCKET_MODEL
from tests.fuzzing import only_our_errors

pocket_model = cache(lambda: load_tl_model(POCKET_MODEL))
FOLDER = Path(tempfile.mkdtemp())
TEXTS, NUMBERS = FOLDER / "texts.json", FOLDER / "numbers.json"
NAMES = [(" Mary", " John"), (" John", " Mary"), (" Anna", " Paul"), (" Paul", " Anna")]
TEXTS.write_text(
    json.dumps(
        {
            "prompts": [
                {
                    "clean": f"After{a} and{b} met,{b} gave",
                    "corrupt": f"After{b} and{a} met,{a} gave",
                    "answers": [a],
                    "wrong_answers": [b],
                }
                for a, b in NAMES
            ]
        }
    )
)
NUMBERS.write_text(
    json.dumps(
        {
            "prompts": [
                {"clean": [i, 1], "corrupt": [1, i], "answers": [1]} for i in range(2, 6)
            ]
        }
    )
)

SIZES = st.one_of(
    st.integers(-2, 5),
    st.integers(),
    st.sampled_from([np.int64(2), np.uint8(1), np.float32(2), 10**30, 2**31, 2.0, True]),
    st.floats(),
)
PAIRS = st.one_of(
    st.tuples(SIZES, SIZES),
    st.lists(SIZES, max_size=3),
    st.lists(SIZES, max_size=3).map(tuple),
)
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    SIZES,
    PAIRS,
    st.text(max_size=5),
    st.binary(max_size=5),
    st.complex_numbers(),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from(
        [Fraction(1, 2), object(), t.tensor(2), t.tensor([1, 2]), np.array([1, 2]), {1}]
    ),
)
PATHS = st.one_of(
    st.sampled_from([TEXTS, NUMBERS, str(TEXTS), FOLDER, FOLDER / "no.json", b"x.json"]),
    st.lists(st.sampled_from([TEXTS, str(TEXTS), NUMBERS, 3, None]), max_size=3),
    st.text(max_size=8).map(lambda text: f"{text}.json"),
    st.sampled_from(["\ud800.json", "\0.json", "x" * 5000 + ".json", "", "."]),
    ANYTHING,
)
DEVICES = st.one_of(
    st.sampled_from(
        ["cpu", "cuda", "cuda:99", "meta", "mps", "x", "", "cpu:7", "xla", -1, 0]
    ),
    st.just(t.device("cpu")),
    ANYTHING,
)


def mostly(good: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.just(good), st.just(good), st.just(good), strategy)


FLAGS = st.one_of(st.booleans(), ANYTHING)
ARGUMENTS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["pocket", "pocket", "none", "object", "bare"]),
        "path": mostly(TEXTS, PATHS),
    },
    optional={
        "device": mostly("cpu", DEVICES),
        "prepend_bos": mostly(None, FLAGS),
        "batch_size": mostly(2, st.one_of(SIZES, PAIRS, ANYTHING)),
        "train_test_size": mostly((2, 2), st.one_of(PAIRS, ANYTHING)),
        "return_seq_length": mostly(False, FLAGS),
        "shuffle": mostly(True, FLAGS),
        "random_seed": mostly(3, ANYTHING),
        "pad": mostly(True, FLAGS),
    },
)


@given(ARGUMENTS)
def test_load(arguments: dict[str, Any]) -> None:
    models = {"pocket": pocket_model(), "none": None, "object": object(), "bare": 3}
    arguments = {"train_test_size": (2, 2), **arguments}
    arguments["model"] = models[arguments["model"]]
    with only_our_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for loader in load_datasets_from_json(**arguments):
            assert sum(len(batch.clean) for batch in loader) == loader.n_prompts


TASK_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "batch_size": mostly(2, st.one_of(SIZES, PAIRS, ANYTHING)),
        "batch_count": mostly((1, 1), st.one_of(SIZES, PAIRS, ANYTHING)),
        "_dataset_name": mostly(TEXTS, PATHS),
        "seed": mostly(3, ANYTHING),
        "token_circuit": st.booleans(),
    },
)


@given(TASK_FIELDS)
def test_task(fields: dict[str, Any]) -> None:
    fields = {"batch_size": 2, "batch_count": 1, "_dataset_name": TEXTS, **fields}
    with only_our_errors():
        task = replace(POCKET_IOI_TASK, _model_def=pocket_model(), **fields)
        assert task.train_loader.n_prompts + task.test_loader.n_prompts <= 4


SHAPES = st.lists(st.integers(0, 3), max_size=3)
DTYPES = st.sampled_from(
    [t.int64, t.int64, t.int64, t.int32, t.float32, t.bfloat16, t.bool, t.complex64]
)


@st.composite
def tensors(draw: st.DrawFn) -> Any:
    device = draw(st.sampled_from(["cpu"] * 9 + ["meta"]))
    return t.ones(draw(SHAPES), dtype=draw(DTYPES), device=device)


PARTS = st.one_of(
    st.just(t.tensor([1, 2])), tensors(), st.lists(tensors(), max_size=2), ANYTHING
)
LONG = st.one_of(
    st.just(t.tensor([[1, 2], [3, 4]])), st.just([t.tensor([1]), t.tensor([2])]), PARTS
)


@st.composite
def parts_of(draw: st.DrawFn, good: Any, other: st.SearchStrategy[Any]) -> list[Any]:
    """Tensors that fit together, some of them replaced by others."""
    parts = [good] * 4 + [None] * 2
    for place in draw(st.lists(st.integers(0, 5), max_size=3)):
        parts[place] = draw(other)
    return parts


@given(parts_of(t.tensor([1, 2]), PARTS), st.integers(4, 6))
def test_pairs(parts: list[Any], n: int) -> None:
    with only_our_errors():
        collate_fn([PromptPair(*parts[:n]), PromptPair(*parts[:n], idx=1)])


@given(parts_of(t.tensor([[1, 2], [3, 4]]), LONG), st.integers(4, 6))
def test_batches(parts: list[Any], n: int) -> None:
    with only_our_errors():
        PromptPairBatch(0, 0, *parts[:n]).model_input("clean")


@given(
    parts_of(t.tensor([[1, 2], [3, 4]]), LONG),
    st.integers(4, 6),
    mostly(None, st.one_of(SIZES, ANYTHING)),
    mostly(0, st.one_of(SIZES, ANYTHING)),
    mostly(None, ANYTHING),
    mostly(None, ANYTHING),
    st.fixed_dictionaries(
        {},
        optional={
            "batch_size": mostly(2, st.one_of(SIZES, ANYTHING)),
            "num_workers": mostly(0, st.sampled_from([-1, 1.5, "x", None])),
            "shuffle": mostly(False, ANYTHING),
            "drop_last": mostly(False, ANYTHING),
            "nonsense": st.just(1),
        },
    ),
)
def test_hand_made_loaders(
    parts: list[Any],
    n: int,
    seq_len: Any,
    diverge_idx: Any,
    labels: Any,
    idxs: Any,
    options: dict[str, Any],
) -> None:
    with only_our_errors():
        dataset = PromptDataset(*parts[:n])
        loader = PromptDataLoader(
            dataset, seq_len, diverge_idx, None, labels, idxs, **options
        )
        assert sum(len(batch.clean) for batch in loader) == loader.n_prompts
