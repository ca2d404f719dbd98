"""What every prune algorithm must do. A new line in PRUNE_ALGOS is tested by this."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import AutoCircuitError, ConfigError
from auto_circuit.prune_algos.prune_algos import (
    PRUNE_ALGO_DICT,
    PRUNE_ALGOS,
    PruneAlgo,
    find_prune_algo,
    run_prune_algos,
)
from auto_circuit.ranking import flat_prune_scores
from auto_circuit.tasks import POCKET_IOI_TASK, Task
from auto_circuit.types import PruneScores
from auto_circuit.utils.graph_utils import patchable_model, set_mask_batch_size
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.models import gpt2, llama, state_snapshot
from tests.test_prune import token_loader

GRAPHS = {
    "small": lambda: patchable_model(gpt2(1, 2), True, "last_seq", separate_qkv=True),
    "gpt2": lambda: patchable_model(gpt2(), True, "last_seq", separate_qkv=True),
    "llama": lambda: patchable_model(llama(), True, "last_seq", separate_qkv=False),
    "positions": lambda: patchable_model(gpt2(), True, "last_seq", 5, separate_qkv=True),
    "nodes": lambda: patchable_model(gpt2(), False, "last_seq", separate_qkv=True),
    "micro positions": lambda: micro_model(seq_len=3),
}
# Trainings, cut short: what they must do here does not depend on how long they last.
SHORT = {
    "epochs": 2,
    "n_steps": 3,
    "integrated_grad_samples": 3,
    "circuit_size": 5,
    "circuit_sizes": (5, 10),
    "n_candidates": 50,
    "all_edges_up_to": 0,
    "tao_exps": (-6, -2),
}
# A forward pass for each edge: not on the largest graphs.
ONE_BY_ONE = ("ACDC", "MSE ACDC", "Exact Edge Patching", "MSE Exact Edge Patching")
ONE_BY_ONE_GRAPHS = ("small", "gpt2", "nodes", "micro positions")
# On the small graph every algorithm is tested without --runslow, but for those that are
# another one with a squared error.
SLOW = tuple(algo.key for algo in PRUNE_ALGOS if algo.key.startswith("MSE "))
on_all_algos = pytest.mark.parametrize("algo", PRUNE_ALGOS, ids=lambda algo: algo.key)


def score(
    algo: PruneAlgo, model: PatchableModel, loader: PromptDataLoader | None = None
) -> PruneScores:
    func = algo.func
    if isinstance(func, partial):
        parameters = inspect.signature(func.func).parameters
        short = {name: value for name, value in SHORT.items() if name in parameters}
        for name in ("integrated_grad_samples", "circuit_size"):
            if func.keywords.get(name) is None:
                short.pop(name, None)
        func = partial(func, **short)
    if loader is None:
        is_text = is_transformer(model)
        loader = token_loader(3, 2) if is_text else micro_loader([1, 2, 5], 2)
    return func(model, loader, list(model.edges)[::7])


@on_all_algos
def test_an_algorithm_says_what_those_who_choose_it_must_know(algo: PruneAlgo) -> None:
    notes = algo.notes
    assert all(asdict(notes).values()), f"{algo.key} has an empty field in its notes"
    assert re.search(r"arXiv \d{4}\.\d{4,5}\b|^(none|that of)", notes.paper), notes.paper
    assert re.search(r"\b[FB]\b|^none$", notes.cost), notes.cost
    assert len(notes.idea) <= 90 and not notes.idea.endswith(".")
    assert notes.use.endswith(".")


def test_an_algorithm_of_ones_own_need_not_say_it() -> None:
    mine = PruneAlgo("Mine", "Mine", lambda model, *_: model.new_prune_scores())
    assert mine.notes.idea == "" and mine == replace(mine, notes=PRUNE_ALGOS[0].notes)


def is_transformer(model: PatchableModel) -> bool:
    return model.adapter.is_transformer


def algos_and_graphs() -> list[Any]:
    """All pairs; without --runslow every fast algorithm on the small graph."""
    return [
        pytest.param(
            algo,
            graph,
            id=f"{algo.key}-{graph}",
            marks=() if graph == "small" and algo.key not in SLOW else pytest.mark.slow,
        )
        for algo in PRUNE_ALGOS
        for graph in GRAPHS
        if graph in ONE_BY_ONE_GRAPHS or algo.key not in ONE_BY_ONE
    ]


@pytest.mark.parametrize("algo,graph", algos_and_graphs())
def test_scores_fit_the_graph_and_the_model_is_left_alone(
    algo: PruneAlgo, graph: str
) -> None:
    model = GRAPHS[graph]()
    before = state_snapshot(model)
    scores = score(algo, model)
    assert state_snapshot(model) == before
    expected = model.new_prune_scores()
    assert list(scores) == list(expected)
    for name, values in scores.items():
        assert values.shape == expected[name].shape
        assert values.dtype == expected[name].dtype
        assert not values.isnan().any()
        # Infinite are the edges that ACDC never takes out.
        assert values.isfinite().all() or "ACDC" in algo.key
        assert not values.requires_grad
    assert any((values != 0).any() for values in scores.values())
    again = score(algo, model)
    assert all(t.equal(scores[name], again[name]) for name in scores)


DRAWING = [a for a in PRUNE_ALGOS if "seed" in inspect.signature(a.func).parameters]


QUICKLY_DRAWING = ("Random", "EP", "MAttr", "STP")


@pytest.mark.parametrize(
    "algo,graph",
    [
        pytest.param(
            *(algo, "micro positions" if is_quick else "gpt2"),
            id=algo.key,
            marks=() if is_quick else pytest.mark.slow,
        )
        for algo in DRAWING
        for is_quick in (algo.short_name in QUICKLY_DRAWING,)
    ],
)
def test_an_algorithm_that_draws_follows_the_seed(algo: PruneAlgo, graph: str) -> None:
    def scores(seed: int) -> t.Tensor:
        model = GRAPHS[graph]()
        return flat_prune_scores(score(algo.with_seed(seed), model))

    one = scores(1)
    assert t.equal(one, scores(1))
    # A circuit's edges can be the same ones for two seeds, but not for this many.
    assert any(not t.equal(one, scores(seed)) for seed in (2, 3, 4, 5))


def test_a_warm_start_that_draws_follows_the_seed() -> None:
    def func(model: object, loader: object, edges: object, warm_start: Any = None) -> Any:
        return warm_start.func(None, None, None)

    def drawing(*args: object, seed: int = 0) -> Any:
        return seed

    start = PruneAlgo(key="Start", name="Start", func=drawing)
    warm = PruneAlgo(key="Warm", name="Warm", func=partial(func, warm_start=start))
    assert warm.with_seed(7).func(None, None, None) == 7
    assert warm.func(None, None, None) == 0


def test_an_algorithm_that_draws_nothing_has_no_seed() -> None:
    algo = find_prune_algo("EAP")
    assert algo.with_seed(7) is algo
    assert {*QUICKLY_DRAWING, "SEP", "CP", "EP quick"} <= {a.short_name for a in DRAWING}


def print_digests() -> None:
    """A line for each algorithm: its key, and the hash of its scores."""
    for algo in PRUNE_ALGOS:
        scores = score(algo, GRAPHS["gpt2"]())
        digest = hashlib.sha256()
        for name, values in scores.items():
            digest.update(name.encode() + values.numpy().tobytes())
        print("digest", algo.key, digest.hexdigest())


@pytest.mark.slow
def test_the_same_scores_in_every_process() -> None:
    """In auto-circuit the order of edges, and so random scores, came from sets."""
    code = f"from {__name__} import print_digests; print_digests()"
    found = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        lines = done.stdout.splitlines()
        found.append([line for line in lines if line.startswith("digest")])
    assert len(found[0]) == len(PRUNE_ALGOS)
    assert found[0] == found[1]


@cache
def shared_graph(name: str) -> PatchableModel:
    """For tests that look whether its state is the same after each algorithm."""
    return GRAPHS[name]()


LOOKS_AT_NO_PROMPTS = ("Official Circuit", "Random")


@on_all_algos
def test_no_prompts(algo: PruneAlgo) -> None:
    if algo.key in LOOKS_AT_NO_PROMPTS:
        return
    rows = t.zeros(0, 5, dtype=t.long)
    loader = PromptDataLoader(PromptDataset(rows, rows, [], []), None, 0)
    model = shared_graph("gpt2")
    before = state_snapshot(model)
    with pytest.raises(AutoCircuitError, match="no prompts"):
        algo.func(model, loader, list(model.edges)[:3])
    assert state_snapshot(model) == before


@on_all_algos
def test_masks_of_single_examples(algo: PruneAlgo) -> None:
    """Who looks at prompts refuses them, and says where scores of every prompt are.

    They fit the batch, so that without the refusal there would be wrong scores, and no error.
    """
    model = shared_graph("small")
    before = state_snapshot(model)
    with set_mask_batch_size(model, 2):
        if algo.key in LOOKS_AT_NO_PROMPTS:
            scores = score(algo, model)
            expected = model.new_prune_scores()
            assert list(scores) == list(expected)
            assert all(scores[name].shape == expected[name].shape for name in scores)
        else:
            message = "Each of 2 examples has masks.*`mask_gradient_prompt_scores`"
            with pytest.raises(ConfigError, match=message):
                score(algo, model, token_loader(2, 2))
    assert state_snapshot(model) == before


def test_keys_are_different_and_lead_to_their_algorithms() -> None:
    assert len(PRUNE_ALGO_DICT) == len(PRUNE_ALGOS)
    for algo in PRUNE_ALGOS:
        for name in (algo.key, algo.name, algo.short_name):
            assert find_prune_algo(name) is algo


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="no prune algorithm 'EAPP'.*Did you mean.*EAP"):
        find_prune_algo("EAPP")


def test_run_prune_algos_takes_any_task_and_algorithm() -> None:
    mine = PruneAlgo(key="Mine", name="Mine", func=lambda m, *_: m.new_prune_scores(2.0))
    edges = ["Resid Start->MLP 0", "MLP 0->Resid End"]
    known = replace(
        POCKET_IOI_TASK,
        key="Known",
        batch_size=2,
        _true_edge_func=lambda model: [e for n in edges for e in model.find_edges(n)],
    )
    unknown = Task(
        key="Unknown",
        name="Unknown",
        batch_size=2,
        batch_count=1,
        token_circuit=False,
        _model_def=known.model.wrapped_model,
        _dataset_name="pocket/ioi_prompts",
    )
    truth = find_prune_algo("GT")
    scores = run_prune_algos([known, unknown], [mine, truth])
    assert list(scores) == ["Known", "Unknown"]
    assert list(scores["Known"]) == ["Mine", "Official Circuit"]
    assert list(scores["Unknown"]) == ["Mine"]
    official = scores["Known"]["Official Circuit"]
    assert sum(float(values.sum()) for values in official.values()) == 2.0
    assert known.true_edge_count == 2


def test_the_ground_truth_of_an_unknown_circuit() -> None:
    with pytest.raises(ConfigError, match="There are no true edges"):
        find_prune_algo("GT").func(GRAPHS["gpt2"](), token_loader(), None)
