"""The pocket model can do what the pocket tasks ask, on prompts that it never saw."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch as t
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_circuit.data import load_datasets_from_json
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.files import repo_path_to_abs_path
from auto_circuit.metrics.path_lengths import faithfulness_of_short_paths, path_depth
from auto_circuit.tasks import (
    POCKET_DOCSTRING_TASK,
    POCKET_GREATERTHAN_TASK,
    POCKET_IOI_TASK,
    POCKET_IOI_TOKEN_TASK,
    POCKET_MODEL,
    POCKET_TASKS,
    TASKS,
    Task,
)
from auto_circuit.utils.tensor_ops import batch_avg_answer_diff, indices_vals

REPO = Path(__file__).parents[1]
N_PROMPTS = 250


def last_logits(task: Task) -> tuple[t.Tensor, list[t.Tensor], list[t.Tensor]]:
    """(logits, answers, wrong answers) of half of the prompts of a task's file."""
    model = load_tl_model(POCKET_MODEL)
    path = repo_path_to_abs_path(f"datasets/{task._dataset_name}.json")
    loader, _ = load_datasets_from_json(
        model, path, batch_size=N_PROMPTS, train_test_size=(N_PROMPTS, 0)
    )
    (batch,) = loader
    tokens, kwargs = batch.model_input("clean")
    with t.no_grad():
        logits = model(tokens, **kwargs)[:, -1]
    return logits, list(batch.answers), list(batch.wrong_answers)


def accuracy(task: Task) -> float:
    """How often the answer is the likeliest of all words."""
    logits, answers, _ = last_logits(task)
    return float((logits.argmax(-1) == t.stack(answers)[:, 0]).float().mean())


@pytest.mark.parametrize("task", [POCKET_IOI_TASK, POCKET_IOI_TOKEN_TASK])
def test_indirect_object_identification(task: Task) -> None:
    assert accuracy(task) >= 0.99


def test_greater_than() -> None:
    logits, answers, wrong = last_logits(POCKET_GREATERTHAN_TASK)
    probs = logits.softmax(-1)
    right = t.stack(
        [indices_vals(p, a).sum() for p, a in zip(probs, answers, strict=True)]
    )
    false = t.stack([indices_vals(p, w).sum() for p, w in zip(probs, wrong, strict=True)])
    assert float((right - false).mean()) >= 0.9


def test_docstring_completion() -> None:
    assert accuracy(POCKET_DOCSTRING_TASK) >= 0.95


@pytest.mark.parametrize("task", POCKET_TASKS, ids=lambda task: task.key)
def test_corrupt_prompts_do_not_have_the_answer(task: Task) -> None:
    (batch,) = task.test_loader
    diffs = {}
    for side in ("clean", "corrupt"):
        tokens, kwargs = batch.model_input(side)
        with t.no_grad():
            logits = task.model(tokens, **kwargs)[task.model.out_slice]
        diffs[side] = float(batch_avg_answer_diff(logits, batch))
    assert diffs["clean"] > 2.0
    assert diffs["corrupt"] < 0.5 * diffs["clean"]


DEPTHS = re.compile(r"^\| `(.+?)` \|((?: \d+ \|)+) (\d+) \|$", re.M)
DEPTH_PAGE = REPO / "docs" / "how-to" / "depth.md"
MEASURED = {
    key: ([int(percent) for percent in percents.split("|")[:-1]], int(depth))
    for key, percents, depth in DEPTHS.findall(DEPTH_PAGE.read_text())
}


@pytest.mark.slow
@pytest.mark.parametrize("task", POCKET_TASKS, ids=lambda task: task.key)
def test_a_task_is_as_deep_as_it_and_the_documentation_say(task: Task) -> None:
    few = replace(task, batch_size=(1, 48), batch_count=1)
    found = faithfulness_of_short_paths(few.model, few.test_loader)
    percents, depth = MEASURED[task.key]
    assert path_depth(found) == depth == task.depth
    assert [100 * value for value in found[: len(percents)]] == pytest.approx(
        percents, abs=5
    )
    assert found[-1] == pytest.approx(1, abs=1e-3)


def test_the_documentation_has_the_depth_of_every_task() -> None:
    assert {key: depth for key, (_, depth) in MEASURED.items()} == {
        task.key: task.depth for task in TASKS if task.depth is not None
    }
    assert all(task.depth is not None for task in POCKET_TASKS)


def test_it_is_small_and_has_every_file_that_hugging_face_needs() -> None:
    sizes = {path.name: path.stat().st_size for path in POCKET_MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(sizes)
    assert sum(sizes.values()) < 5e6
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in sizes)


def test_hugging_face_loads_it_and_gives_the_same_probabilities() -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET_MODEL)
    plain = AutoModelForCausalLM.from_pretrained(POCKET_MODEL)
    ours = load_tl_model(POCKET_MODEL)
    text = "<bos> After Mary and John arrived at the store, John handed a drink to"
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with t.no_grad():
        expected = plain(tokens).logits.softmax(-1)
        t.testing.assert_close(ours(tokens).softmax(-1), expected, atol=1e-5, rtol=1e-4)
    assert tokenizer.decode(expected[0, -1].argmax()) == "Mary"


def test_generators_write_the_committed_files_again(tmp_path: Path) -> None:
    folder = REPO / "datasets" / "pocket"
    copy = tmp_path / "pocket"
    copy.mkdir()
    for path in (*folder.glob("*.py"), folder.parent / "prompt_writer.py"):
        place = copy if path.parent == folder else tmp_path
        (place / path.name).write_text(path.read_text())
    for path in sorted(copy.glob("*_generator.py")):
        environment = {**os.environ, "PYTHONHASHSEED": "7"}
        subprocess.run([sys.executable, path], check=True, env=environment)
    written = {p.name: p.read_bytes() for p in copy.glob("*.json")}
    assert written == {p.name: p.read_bytes() for p in folder.glob("*.json")}
    assert len(written) == 4


def test_the_prompts_were_held_out() -> None:
    sys.path.insert(0, str(REPO / "datasets" / "pocket"))
    try:
        from prompt_file import is_held_out  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    path = REPO / "datasets" / "pocket" / "ioi_prompts.json"
    for prompt in json.loads(path.read_text())["prompts"]:
        names = (prompt["answers"][0].strip(), prompt["wrong_answers"][0].strip())
        assert is_held_out("ioi", *sorted(names))
