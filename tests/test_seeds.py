"""A sweep's seed reaches all that is drawn at random, and nothing else does."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as t

import auto_circuit
from auto_circuit.prune_algos.algo_config import bound
from auto_circuit.prune_algos.edge_pruning import (
    EDGE_PRUNING_PRUNE_ALGO,
    EdgePruningConfig,
    edge_pruning_prune_scores,
    train_edge_pruning,
)
from auto_circuit.prune_algos.mask_training import MaskTraining
from auto_circuit.prune_algos.matryoshka import MATRYOSHKA_PRUNE_ALGO, train_matryoshka
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS, RANDOM_PRUNE_ALGO
from auto_circuit.prune_algos.subnetwork_probing import (
    SUBNETWORK_TREE_PROBING_PRUNE_ALGO,
    train_subnetwork,
)
from auto_circuit.sweep import TaskRun, algos_of_seed, run_task
from auto_circuit.sweep_config import ExperimentConfig, check_config
from auto_circuit.tasks import POCKET_IOI_TASK, Task

SEEDS = range(42, 45)


@pytest.fixture(scope="module")
def task() -> Iterator[Task]:
    small = replace(POCKET_IOI_TASK, batch_size=2, batch_count=1)
    yield small
    small.free()


def other_global_state(seed: int) -> None:
    """What a caller may have done before."""
    t.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def test_prompts_and_their_order(task: Task) -> None:
    by_seed = []
    for seed in SEEDS:
        other_global_state(seed % 2)
        train, test = replace(task, seed=seed).read_prompts()
        other_global_state(3)
        of_seed = task.with_seed(seed)
        assert of_seed.read_prompts() == (train, test)
        by_seed.append([prompt.where for prompt in (*train, *test)])
        # What algorithms and metrics are given.
        tokens = t.cat([batch.clean for batch in of_seed.train_loader])
        again = t.cat([batch.clean for batch in task.with_seed(seed).train_loader])
        assert t.equal(tokens, again)
        tokenizer: Any = task.model.wrapped_model.tokenizer
        for prompt, row in zip(train, tokens, strict=True):
            decoded = tokenizer.decode(row, skip_special_tokens=True)
            assert decoded.replace(" ", "") == str(prompt.clean).replace(" ", "")
    assert len({frozenset(picked) for picked in by_seed}) == len(SEEDS)
    small = replace(task, batch_count=1, batch_size=(199, 1))
    orders = [replace(small, seed=seed).read_prompts()[0] for seed in SEEDS]
    common = set.intersection(*({p.where for p in order} for order in orders))
    ranks = {tuple(p.where for p in order if p.where in common) for order in orders}
    assert len(common) > 1 and len(ranks) == len(SEEDS)


def test_the_split(task: Task) -> None:
    """A prompt that is trained on with one seed is tested on with another."""
    half = replace(task, batch_count=1, batch_size=100)
    trained, tested = (
        [
            {prompt.where for prompt in replace(half, seed=seed).read_prompts()[split]}
            for seed in SEEDS
        ]
        for split in (0, 1)
    )
    for seed, other in ((0, 1), (1, 2), (2, 0)):
        assert not trained[seed] & tested[seed]
        assert trained[seed] & tested[other] and tested[seed] & trained[other]


TRAININGS: list[tuple[PruneAlgo, Callable[..., MaskTraining], dict[str, int]]] = [
    (SUBNETWORK_TREE_PROBING_PRUNE_ALGO, train_subnetwork, {"epochs": 1}),
    (EDGE_PRUNING_PRUNE_ALGO, train_edge_pruning, {"n_steps": 1}),
    (MATRYOSHKA_PRUNE_ALGO, train_matryoshka, {"n_steps": 1}),
]


@pytest.mark.parametrize(
    ("algo", "train", "short"), TRAININGS, ids=[algo.key for algo, *_ in TRAININGS]
)
def test_the_initial_gates_of_trainings(
    algo: PruneAlgo, train: Callable[..., MaskTraining], short: dict[str, int], task: Task
) -> None:
    """The first step's loss, on the same prompts, hangs on the gates that it begins with.

    Their logits are the same for all seeds; the gates are sampled from them (of Matryoshka
    the size is).
    """
    prompts = task.train_loader

    def first_loss(seed: int) -> float:
        config = algo.with_seed(seed).config
        assert config is not None
        training = train(task.model, prompts, config.with_options(**short))
        return training.steps[0].faithfulness

    other_global_state(7)
    first, second = first_loss(42), first_loss(43)
    other_global_state(8)
    assert first_loss(42) == first != second


def test_random_edges(task: Task) -> None:
    def scores(seed: int) -> dict[str, t.Tensor]:
        return RANDOM_PRUNE_ALGO.with_seed(seed).func(task.model, task.train_loader, None)

    by_seed = []
    for seed in SEEDS:
        other_global_state(7)
        by_seed.append(scores(seed))
        other_global_state(8)
        assert _are_equal(by_seed[-1], scores(seed))
    for one, other in ((0, 1), (1, 2), (2, 0)):
        for name, of_module in by_seed[one].items():
            assert not (of_module == by_seed[other][name]).any()


def _are_equal(one: dict[str, t.Tensor], other: dict[str, t.Tensor]) -> bool:
    return list(one) == list(other) and all(t.equal(one[k], other[k]) for k in one)


def _seeds_in(description: Any) -> list[int]:
    """All seeds in a config, and in those of the algorithms that it starts from."""
    if not isinstance(description, dict):
        return []
    nested = [seed for value in description.values() for seed in _seeds_in(value)]
    return nested + ([description["seed"]] if "seed" in description else [])


FROM_RANDOM = PruneAlgo(
    key="From random",
    name="From random",
    func=bound(
        edge_pruning_prune_scores, EdgePruningConfig(warm_start=RANDOM_PRUNE_ALGO)
    ),
)


def test_the_algorithm_that_one_starts_from_is_given_the_seed() -> None:
    assert _seeds_in(FROM_RANDOM.description()) == [0, 0]
    assert _seeds_in(FROM_RANDOM.with_seed(9).description()) == [9, 9]


@pytest.mark.parametrize("algo", PRUNE_ALGOS, ids=lambda algo: algo.key)
def test_every_algorithm_that_draws_is_given_the_seed(algo: PruneAlgo) -> None:
    seeded = algo.with_seed(1234567)
    n_seeds = len(_seeds_in(algo.description()))
    assert _seeds_in(seeded.description()) == [1234567] * n_seeds
    assert (seeded is algo) == (n_seeds == 0)


def _draws(path: Path) -> Iterator[tuple[str, bool]]:
    """Each call that draws random numbers, and whether it says from what."""
    names = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal"}
    names |= {f"{name}_like" for name in ("rand", "randn", "randint")}
    names |= {"bernoulli_", "normal_", "uniform_", "exponential_", "random_"}
    text = path.read_text()
    if not re.search("rand|bernoulli|multinomial|normal|uniform_|exponential_", text):
        return
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module = ast.unparse(node.func.value)
        if node.func.attr in names:
            says = any(keyword.arg == "generator" for keyword in node.keywords)
            yield ast.unparse(node), says
        elif module in ("random", "np.random"):
            is_own = node.func.attr in ("Random", "default_rng") and bool(node.args)
            yield ast.unparse(node), is_own


def test_whatever_draws_draws_from_a_generator_of_its_own() -> None:
    """Algorithms, metrics and tests of hypotheses alike."""
    folder = Path(auto_circuit.__file__).parent
    drawn = {
        (path.relative_to(folder).as_posix(), text): says_from_what
        for path in folder.rglob("*.py")
        for text, says_from_what in _draws(path)
    }
    assert {where for (where, _), says in drawn.items() if not says} == set()
    files = {where for where, _ in drawn}
    assert {"gates.py", "circuits.py", "data.py", "prune_algos/matryoshka.py"} <= files
    assert {"metrics/hypothesis_tests.py", "metrics/stability.py"} <= files


def test_a_seed_alone_decides_its_run(task: Task, tmp_path: Path) -> None:
    """Not which seeds and algorithms ran before it, and not what the caller has drawn."""
    config = ExperimentConfig(
        tasks=("Pocket IOI",),
        algos=("EAP", "Random"),
        metrics=("Logit Diff Percent",),
        circuit_sizes=(0, 50),
        n_seeds=2,
        once=(),
        out=tmp_path,
    )

    def run(config: ExperimentConfig, seed: int) -> TaskRun:
        other_global_state(config.seed)
        plan = check_config(config)
        algos = algos_of_seed(plan, config, seed)
        return run_task(task.with_seed(seed), algos, plan.metrics, config)

    first, second = (run(config, seed) for seed in config.seeds)
    alone = run(replace(config, seed=43, n_seeds=1, algos=("Random", "EAP")), 43)
    assert second.rows != first.rows
    by_algo = {of.algo: of.rows for of in alone.measured}
    for found, measured in zip(second.found, second.measured, strict=True):
        assert _are_equal(found.scores, alone.scores[found.algo])
        assert measured.rows == by_algo[found.algo]
        assert not _are_equal(found.scores, first.scores[found.algo])
