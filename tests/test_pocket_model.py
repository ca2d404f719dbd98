"""The pocket models can do what the pocket tasks ask, on prompts that they never saw."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch as t
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_circuit.circuits import all_edges, circuit_of_edges
from auto_circuit.data import load_datasets_from_json
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.files import repo_path_to_abs_path
from auto_circuit.metrics.circuit_outs import circuit_prompt_vals
from auto_circuit.metrics.path_lengths import faithfulness_of_short_paths, path_depth
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC,
)
from auto_circuit.prune_algos.exact_edge_patching import edge_effects
from auto_circuit.tasks import (
    POCKET_DOCSTRING_TASK,
    POCKET_GEMMA_MODEL,
    POCKET_GEMMA_TASKS,
    POCKET_GREATERTHAN_TASK,
    POCKET_IOI_TASK,
    POCKET_IOI_TOKEN_TASK,
    POCKET_LLAMA_MODEL,
    POCKET_LLAMA_TASKS,
    POCKET_MODEL,
    POCKET_TASKS,
    TASKS,
    Task,
)
from auto_circuit.types import AblationType, Edge
from auto_circuit.utils.tensor_ops import batch_avg_answer_diff, indices_vals

REPO = Path(__file__).parents[1]
N_PROMPTS = 250
OTHER_MODELS = {"llama": POCKET_LLAMA_MODEL, "gemma2": POCKET_GEMMA_MODEL}
OTHER_TASKS = (*POCKET_LLAMA_TASKS, *POCKET_GEMMA_TASKS)
INDUCTION_TASKS = [task for task in OTHER_TASKS if task.key.endswith("Induction")]
pocket_model = cache(load_tl_model)
by_key = partial(pytest.mark.parametrize, "task", ids=lambda task: task.key)


def last_logits(task: Task) -> tuple[t.Tensor, list[t.Tensor], list[t.Tensor]]:
    """(logits, answers, wrong answers) of half of the prompts of a task's file."""
    model = pocket_model(task._model_def)
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


@by_key(OTHER_TASKS)
def test_the_other_models_do_every_task(task: Task) -> None:
    logits, answers, _ = last_logits(task)
    best = logits.argmax(-1)
    right = [bool((b == a).any()) for b, a in zip(best, answers, strict=True)]
    assert sum(right) / len(right) > 0.95


DEPTH_PAGE = REPO / "docs" / "how-to" / "depth.md"
OF_DEPTHS, _, OF_SIZES = DEPTH_PAGE.read_text().partition("\n## How large they are\n")
SIZES = re.compile(r"^\| `(.+?)` \| (\d+) \| (-?\d+) \|((?: \d+ \|)+)$", re.M)
LEFT_BY_CORRUPT_PROMPTS = {
    key: int(percent) for key, _, percent, _ in SIZES.findall(OF_SIZES)
}


@by_key([*POCKET_TASKS, *OTHER_TASKS])
def test_corrupt_prompts_do_not_have_the_answer(task: Task) -> None:
    """But those of the Llama's Greaterthan, of which the documentation says why."""
    (batch,) = task.test_loader
    diffs = {}
    for side in ("clean", "corrupt"):
        tokens, kwargs = batch.model_input(side)
        with t.no_grad():
            logits = task.model(tokens, **kwargs)[task.model.out_slice]
        diffs[side] = float(batch_avg_answer_diff(logits, batch))
    assert diffs["clean"] > 2.0
    percent = 100 * diffs["corrupt"] / diffs["clean"]
    assert percent == pytest.approx(LEFT_BY_CORRUPT_PROMPTS[task.key], abs=1)
    assert percent < 50 or task.key == "Pocket Llama Greaterthan"


DEPTHS = re.compile(r"^\| `(.+?)` \|((?: -?\d+ \|)+) (\d+) \|$", re.M)
MEASURED = {
    key: ([int(percent) for percent in percents.split("|")[:-1]], int(depth))
    for key, percents, depth in DEPTHS.findall(OF_DEPTHS)
}


@pytest.mark.slow
@by_key([*POCKET_TASKS, *OTHER_TASKS])
def test_a_task_is_as_deep_as_it_and_the_documentation_say(task: Task) -> None:
    found = faithfulness_of_short_paths(task.model, task.test_loader)
    percents, depth = MEASURED[task.key]
    assert path_depth(found) == depth == task.depth
    assert [100 * value for value in found[: len(percents)]] == pytest.approx(
        percents, abs=1
    )
    assert found[-1] == pytest.approx(1, abs=1e-3)


def test_the_documentation_has_the_depth_of_every_task() -> None:
    assert {key: depth for key, (_, depth) in MEASURED.items()} == {
        task.key: task.depth for task in TASKS if task.depth is not None
    }
    assert all(task.depth is not None for task in (*POCKET_TASKS, *OTHER_TASKS))


every_model = pytest.mark.parametrize(
    "folder", [POCKET_MODEL, *OTHER_MODELS.values()], ids=lambda folder: folder.name
)


@every_model
def test_it_is_small_and_has_every_file_that_hugging_face_needs(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(sizes)
    assert sum(sizes.values()) < (5e6 if folder == POCKET_MODEL else 3e6)
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in sizes)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_the_script_makes_such_a_model(name: str) -> None:
    folder = OTHER_MODELS[name]
    config = training().MODELS[name]
    assert config.out == folder
    said = json.loads((folder / "training.json").read_text())
    assert said == json.loads(json.dumps(training().as_json(config)))
    tokenizer = training().make_tokenizer()
    trained = AutoModelForCausalLM.from_pretrained(folder)
    made = training().make_model(config, len(tokenizer))
    assert type(made) is type(trained)
    assert shapes(made) == shapes(trained)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    batches = next(training().steps(tokenizer, config))
    with t.no_grad():
        losses, untrained = (
            [float(training().loss_on(model, *batch)) for batch in batches]
            for model in (trained, made)
        )
    assert all(ours < 0.7 * other for ours, other in zip(losses, untrained, strict=True))


def shapes(model: t.nn.Module) -> dict[str, t.Size]:
    return {name: weight.shape for name, weight in model.named_parameters()}


@cache
def training() -> Any:
    """The script that trains the models, as a module."""
    before = list(sys.path)
    try:
        return import_module("scripts.train_pocket_model")
    finally:
        sys.path[:] = before


@every_model
def test_hugging_face_loads_it_and_gives_the_same_probabilities(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ours = pocket_model(folder)
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
    assert len(written) == 5


def test_the_prompts_were_held_out() -> None:
    sys.path.insert(0, str(REPO / "datasets" / "pocket"))
    try:
        from prompt_file import is_held_out  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    for prompt in prompts("ioi"):
        names = (prompt["answers"][0].strip(), prompt["wrong_answers"][0].strip())
        assert is_held_out("ioi", *sorted(names))
    for prompt in prompts("induction"):
        assert is_held_out(
            "induction", prompt["clean"].split()[-1], prompt["answers"][0].strip()
        )


def prompts(name: str) -> list[dict[str, Any]]:
    path = REPO / "datasets" / "pocket" / f"{name}_prompts.json"
    return json.loads(path.read_text())["prompts"]


# ---------------------------------------------------------------------------- induction


def test_an_induction_prompt_differs_in_which_word_stands_before_which() -> None:
    for prompt in prompts("induction"):
        (*clean, asked), (*corrupt, same) = (
            prompt["clean"].split(),
            prompt["corrupt"].split(),
        )
        assert asked == same and sorted(clean) == sorted(corrupt)
        assert len(set(clean)) == len(clean) == 10
        assert sum(a != b for a, b in zip(clean, corrupt, strict=True)) == 2
        assert prompt["answers"] == [f" {clean[clean.index(asked) + 1]}"]
        assert prompt["wrong_answers"] == [f" {corrupt[corrupt.index(asked) + 1]}"]


@pytest.mark.slow
@by_key(INDUCTION_TASKS)
def test_no_single_layer_does_induction(task: Task) -> None:
    """Without edges between nodes the corrupt prompt's answer is given, or none (means)."""
    model, loader = task.model, task.test_loader
    direct = [
        edge
        for edge in model.edges
        if edge.src.kind == "embed" or edge.dest.kind == "unembed"
    ]
    circuits = [circuit_of_edges(model, direct), all_edges(model)]
    right = {
        ablation: circuit_prompt_vals(
            model,
            loader,
            circuits,
            CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC,
            ablation,
        )
        .mean(1)
        .tolist()
        for ablation in (AblationType.RESAMPLE, AblationType.TOKENWISE_MEAN_CORRUPT)
    }
    assert all(whole > 97 for _, whole in right.values())
    assert right[AblationType.RESAMPLE][0] < 10
    assert 30 < right[AblationType.TOKENWISE_MEAN_CORRUPT][0] < 70
    task.free()


@pytest.mark.slow
@by_key(INDUCTION_TASKS)
def test_the_strongest_edges_of_induction_go_from_layer_to_layer(task: Task) -> None:
    """Of the exact effects: a previous-token head writes to an induction head's keys."""
    few = replace(task, batch_size=(8, 1), batch_count=1)
    effects = edge_effects(few.model, few.train_loader, few.model.edges, edges_at_once=16)
    ranked = sorted(effects, key=lambda edge: -abs(effects[edge]))
    print([(edge.name, round(effects[edge], 2)) for edge in ranked[:12]])
    best = next(e for e in ranked if e.src.kind == e.dest.kind == "attention")
    assert ranked.index(best) < 5 and effects[best] > 1
    assert best.dest.head_input == "key" and blocks(best)[0] < blocks(best)[1]
    to_previous, to_follower = attention_to_previous_and_follower(best, few._model_def)
    assert to_previous > 0.5 and to_follower > 0.5
    few.free()


def blocks(edge: Edge) -> tuple[int, int]:
    source, destination = edge.src.component, edge.dest.component
    assert source is not None and source.block is not None
    assert destination is not None and destination.block is not None
    return source.block, destination.block


def attention_to_previous_and_follower(edge: Edge, folder: Any) -> tuple[float, float]:
    """Where the edge's heads look, in the plain model: the mean over prompts.

    The source, from each word to the one before; the destination, from the last word to the
    one that followed it before. Of several heads, that which looks there most.
    """
    few = prompts("induction")[:50]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    texts = [f"<bos> {prompt['clean']}" for prompt in few]
    tokens = tokenizer(texts, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with t.no_grad():
        source, destination = (
            plain(tokens, output_attentions=True).attentions[block]
            for block in blocks(edge)
        )
    by_head = source.diagonal(-1, dim1=2, dim2=3)[..., 1:].mean((0, 2))
    to_previous = (
        by_head.max() if edge.src.heads is None else by_head[[*edge.src.heads]].max()
    )
    follower = t.tensor(
        [p["clean"].split().index(p["clean"].split()[-1]) + 2 for p in few]
    )
    at_follower = destination[t.arange(len(few)), :, -1, follower].mean(0)
    assert edge.dest.heads is not None
    return float(to_previous), float(at_follower[[*edge.dest.heads]].max())
