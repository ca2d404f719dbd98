"""Tasks: the predefined ones, and what they say when something is missing."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch as t

from auto_circuit.data import load_datasets_from_json
from auto_circuit.errors import ConfigError, DataError, ModelError
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.model_utils.micro_model_utils import MicroModel
from auto_circuit.tasks import (
    GENERATORS,
    IOI_COMPONENT_CIRCUIT_TASK,
    POCKET_DOCSTRING_TASK,
    POCKET_IOI_TASK,
    POCKET_MODEL,
    POCKET_TASKS,
    TASK_DICT,
    TASKS,
    Task,
    find_task,
    task_of_prompts,
)
from tests.models import llama, randomize
from tests.texts import name_prompts, text_model, word_tokenizer, write_prompts

N_COMPONENT_EDGES = 1519
REPO = Path(__file__).parents[1]


@pytest.mark.parametrize("task", POCKET_TASKS, ids=lambda task: task.key)
def test_pocket_tasks_load(task: object) -> None:
    task = replace(task)  # type: ignore[type-var]
    model, train, test = task.model, task.train_loader, task.test_loader
    n_test = 64 if task.key == "Pocket Docstring" else 96
    assert (train.n_prompts, test.n_prompts) == (64, n_test)
    is_ragged = task.key == "Pocket IOI"
    assert (train.diverge_idx == test.diverge_idx == 0) == is_ragged
    seq_len = train.seq_len if task.token_circuit else None
    assert model.seq_len == seq_len
    assert model.n_edges == N_COMPONENT_EDGES * (seq_len or 1)
    if task.token_circuit:
        assert train.seq_labels is not None and len(train.seq_labels) == seq_len
        assert train.word_idxs
    clean = {
        tuple(row) for loader in (train, test) for b in loader for row in b.clean.tolist()
    }
    assert len(clean) > 100  # different prompts in both halves
    assert task.model is model and task.true_edges is None
    task.free()
    assert task.model is not model


def test_keys_are_different() -> None:
    assert len(TASK_DICT) == len(TASKS)
    with pytest.raises(
        ConfigError, match="no task 'Pocket IO'.*Did you mean.*Pocket IOI"
    ):
        find_task("Pocket IO")


def test_a_task_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        POCKET_IOI_TASK.batch_size = 3  # type: ignore[misc]


def test_a_task_is_sent_unloaded() -> None:
    """By name, not with its weights, also after it has loaded."""
    task = replace(POCKET_TASKS[0], key="sent")
    n_edges = task.model.n_edges
    sent = pickle.dumps(task)
    assert len(sent) < 5000
    again = pickle.loads(sent)
    assert again == task and "_model" in task.__dict__
    assert not {"_model", "_bare_model", "_loaders"} & again.__dict__.keys()
    assert again.model.n_edges == n_edges


def test_a_model_object_or_a_folder() -> None:
    model = load_tl_model(POCKET_MODEL)
    mine = replace(
        POCKET_DOCSTRING_TASK, _model_def=model, batch_size=(3, 2), batch_count=(2, 1)
    )
    assert mine.model.wrapped_model is model
    assert [len(batch.clean) for batch in mine.train_loader] == [3, 3]
    assert [len(batch.clean) for batch in mine.test_loader] == [2]
    assert replace(mine, _model_def=str(POCKET_MODEL)).model.n_edges == mine.model.n_edges


def test_ungrouped_keys_and_values(tmp_path: Path) -> None:
    prompt = {"clean": [1, 2], "corrupt": [1, 3], "answers": [4], "wrong_answers": [5]}
    (tmp_path / "p.json").write_text(json.dumps({"prompts": [prompt] * 2}))
    mine = replace(
        POCKET_IOI_TASK,
        _model_def=llama(),
        _dataset_name=tmp_path / "p.json",
        batch_size=1,
        batch_count=1,
    )
    assert mine.model.n_edges == 82
    assert replace(mine, ungroup=True).model.n_edges == 110


@pytest.mark.parametrize(
    ("default", "prepend_bos", "has_bos"),
    [(True, None, True), (False, None, False), (False, True, True), (True, False, False)],
)
def test_bos_is_the_models_unless_the_task_says(
    default: bool, prepend_bos: bool | None, has_bos: bool
) -> None:
    model = load_tl_model(POCKET_MODEL)
    model.cfg.default_prepend_bos = default
    mine = replace(
        POCKET_IOI_TASK,
        _model_def=model,
        batch_size=2,
        batch_count=1,
        prepend_bos=prepend_bos,
    )
    batch = next(iter(mine.train_loader))
    prefix = mine.train_loader.kv_cache
    first = batch.clean[0] if prefix is None else prefix.tokens
    assert (int(first[0]) == model.tokenizer.bos_token_id) is has_bos


def first_prompts(task: Task) -> list[list[int]]:
    return next(iter(task.train_loader)).clean.tolist()


def test_the_seed_shuffles_the_prompts(tmp_path: Path) -> None:
    model = text_model(word_tokenizer())
    path = write_prompts(tmp_path, name_prompts(20))
    one = replace(
        POCKET_IOI_TASK,
        _model_def=model,
        _dataset_name=path,
        batch_size=np.int64(5),
        batch_count=(2, np.int32(1)),
        seed=1,
    )
    train, _ = load_datasets_from_json(
        model,
        path,
        batch_size=5,
        train_test_size=(10, 5),
        tail_divergence=True,
        random_seed=1,
    )
    assert first_prompts(one) == next(iter(train)).clean.tolist()
    assert first_prompts(replace(one, seed=2)) != first_prompts(one)


def test_the_suffix_of_a_prompt_file_says_its_format(tmp_path: Path) -> None:
    model = text_model(word_tokenizer())
    files = {
        "x.csv": "clean,corrupt,answers\nAnn met Bob,Dan met Eve, Bob\n",
        "x.jsonl": '{"clean": "Ann met Bob", "corrupt": "Dan met Eve", "answers": ["Bob"]}',
    }
    task = replace(POCKET_IOI_TASK, _model_def=model, batch_size=1, batch_count=(1, 0))
    found = []
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        found.append(first_prompts(replace(task, _dataset_name=str(tmp_path / name))))
    assert found[0] == found[1]
    with pytest.raises(
        DataError, match=r"needs the prompt file .*/y.csv, which does not"
    ):
        _ = replace(task, _dataset_name=tmp_path / "y.csv").train_loader


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"batch_size": 0}, "`batch_size` is 0; expected at least 1"),
        ({"batch_count": -1}, "`batch_count` is -1; expected at least 0"),
        ({"seed": -1}, "`seed` is -1; expected at least 0"),
        ({"_dataset_name": "x" * 300}, "which cannot be a path"),
        ({"_dataset_name": "bad.json"}, "bad.json is not JSON"),
    ],
)
def test_bad_prompts_are_found_before_the_model_loads(
    fields: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    task = replace(POCKET_IOI_TASK, _model_def="no such model", **fields)
    with pytest.raises((ConfigError, DataError), match=message):
        _ = task.model


def test_two_tasks_can_share_a_model() -> None:
    """auto-circuit wrapped it twice, and the older graph then read the newer one's masks."""
    model = load_tl_model(POCKET_MODEL)
    one = replace(POCKET_IOI_TASK, _model_def=model, batch_size=4)
    other = replace(POCKET_DOCSTRING_TASK, _model_def=model, batch_size=4)
    assert one.model.wrapped_model is other.model.wrapped_model
    assert one.model.patch_masks.keys() == other.model.patch_masks.keys()
    assert one.train_loader.kv_cache is not other.train_loader.kv_cache


def test_two_models_on_one_data_set_do_not_share_its_cache() -> None:
    """auto-circuit cached data sets by file, whatever the model."""
    mine = replace(POCKET_DOCSTRING_TASK, batch_size=4)
    randomized = load_tl_model(POCKET_MODEL)
    randomize(randomized)
    caches = [
        task.train_loader.kv_cache
        for task in (mine, replace(mine, _model_def=randomized))
    ]
    assert caches[0] is not None and caches[1] is not None
    assert not t.allclose(caches[0].keys[0], caches[1].keys[0])


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"needs the prompt file .*nothing.json, which does not"
    ):
        _ = replace(POCKET_IOI_TASK, _dataset_name="nothing").model
    with pytest.raises(
        ModelError, match="Cannot load the model 'gpt2'.*network connection"
    ):
        _ = IOI_COMPONENT_CIRCUIT_TASK._bare_model
    with pytest.raises(ModelError, match="local folder needs config.json"):
        _ = replace(POCKET_IOI_TASK, _model_def=tmp_path).model
    with pytest.raises(ModelError, match="There is no autoencoder .*pocket_model_resid"):
        _ = replace(POCKET_IOI_TASK, autoencoder_input="resid_delta_mlp").model
    micro = replace(
        POCKET_IOI_TASK,
        _model_def=MicroModel(),
        _dataset_name="micro_model_inputs",
        batch_size=8,
        batch_count=1,
        autoencoder_input="resid_delta_mlp",
    )
    with pytest.raises(ConfigError, match="autoencoders .*, but a MicroModel has none"):
        _ = micro.model


@pytest.mark.parametrize("name", GENERATORS)
def test_files_that_need_a_tokenizer_of_the_hub_name_their_generator(name: str) -> None:
    task = next(task for task in TASKS if task._dataset_name == name)
    command = re.escape(GENERATORS[name])
    with pytest.raises(DataError, match=f"not part of the repo.*with `python {command}"):
        _ = task.prompt_path
    script, *options = GENERATORS[name].split()
    done = subprocess.run(
        [sys.executable, REPO / script, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(option in done.stdout for option in options if option.startswith("--"))


@pytest.mark.parametrize(
    "n_prompts,batch_size,batch_count",
    [(2, 1, 1), (3, 1, 1), (128, 64, 1), (131, 32, 2), (400, 50, 4)],
)
def test_a_task_of_a_prompt_file(
    n_prompts: int, batch_size: int, batch_count: int, tmp_path: Path
) -> None:
    path = write_prompts(tmp_path, name_prompts(n_prompts), name="mine")
    task = task_of_prompts(path, text_model(word_tokenizer()))
    assert (task.key, task.name) == (str(path), "mine")
    assert (task.batch_size, task.batch_count) == (batch_size, batch_count)
    n_half = batch_size * batch_count
    assert n_prompts // 2 - batch_count < n_half <= n_prompts // 2
    assert task.train_loader.n_prompts == task.test_loader.n_prompts == n_half
    assert task_of_prompts(str(path))._model_def == POCKET_MODEL


def test_a_prompt_file_that_makes_no_task(tmp_path: Path) -> None:
    one = write_prompts(tmp_path, name_prompts(1))
    with pytest.raises(DataError, match="has one prompt; expected two or more"):
        task_of_prompts(one)
    with pytest.raises(DataError, match="There is no prompt file .*none.csv"):
        task_of_prompts(tmp_path / "none.csv")
