"""Models whose circuits are known because they were built: which algorithms find them?"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch as t

from auto_circuit.errors import ConfigError
from auto_circuit.metrics.official_circuits.measure_roc import measure_task_roc, roc_auc
from auto_circuit.model_utils.micro_model_utils import MicroModel
from auto_circuit.prune_algos.prune_algo import with_squared_error
from auto_circuit.prune_algos.prune_algos import (
    PRUNE_ALGOS,
    PruneAlgo,
    find_prune_algo,
)
from auto_circuit.tasks import (
    TRACR_REVERSE_TOKEN_CIRCUIT_TASK,
    TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK,
)
from auto_circuit.types import PruneScores
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader

# Algorithms that ask for something else than what keeps the answers apart:
# no prompts or no answers, nodes instead of edges, a squared error (this model's outputs
# are far from what it compares them with: see the compiled program of numbers).
CANNOT = ("Random", "Act Mag", "HISP")
CANNOT += tuple(a.short_name for a in PRUNE_ALGOS if a.short_name.endswith("(MSE)"))
# These train for the wrong answer.
CANNOT += ("OTP",)
CIRCUIT = (
    "Resid Start->B0.0",
    "Resid Start->B2.1",
    "B0.0->B2.1",
    "B0.0->Resid End",
    "B2.1->Resid End",
)
# Long enough for a graph of 25 edges.
SETTINGS: dict[str, Any] = {
    "n_steps": 100,
    "epochs": 40,
    "circuit_sizes": (len(CIRCUIT),),
    "target_sparsity": 0.8,
    "integrated_grad_samples": 5,
}

# The graph has fewer than 30 edges.
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "STP quick": {"circuit_size": len(CIRCUIT)},
}


def built_model() -> PatchableModel:
    """Three layers; two heads of different layers do the task, and four write nothing.

    Both dimensions of a prompt are equal, so the direct path favours neither answer.
    """
    model = MicroModel(n_layers=3)
    for block in model.blocks:
        assert isinstance(block.weights, t.nn.Parameter)
        block.weights.data.zero_()
    model.blocks[0].weights.data[0] = t.tensor([0.1, 0.3])  # type: ignore[operator]
    model.blocks[2].weights.data[1] = t.tensor([0.2, 0.5])  # type: ignore[operator]
    return patchable_model(model, True, "last_seq")


def score(algo: PruneAlgo, model: PatchableModel, loader: Any) -> PruneScores:
    true_edges = [edge for name in CIRCUIT for edge in model.find_edges(name)]
    func = algo.func
    if isinstance(func, partial):
        parameters = inspect.signature(func.func).parameters
        options = {name: v for name, v in SETTINGS.items() if name in parameters}
        if func.keywords.get("integrated_grad_samples") is None:
            options.pop("integrated_grad_samples", None)
        func = partial(func, **options, **OWN_SETTINGS.get(algo.short_name, {}))
    return func(model, loader, true_edges)


def test_the_circuit_is_the_edges_that_have_an_effect() -> None:
    model = built_model()
    exact = score(find_prune_algo("Exact"), model, micro_loader([4.0, 8.0], 2))
    effects = {edge.name: float(edge.prune_score(exact)) for edge in model.edges}
    assert len(effects) == 25
    assert {name for name, effect in effects.items() if abs(effect) > 1e-5} == set(
        CIRCUIT
    )


@pytest.mark.parametrize(
    "algo",
    [algo for algo in PRUNE_ALGOS if algo.short_name not in CANNOT],
    ids=lambda algo: algo.key,
)
def test_the_circuit_is_found(algo: PruneAlgo) -> None:
    model = built_model()
    scores = score(algo, model, micro_loader([4.0, 8.0], 2))
    true_edges = [edge for name in CIRCUIT for edge in model.find_edges(name)]
    points = measure_task_roc(model, true_edges, scores, all_edges=True)
    assert roc_auc(points, pessimistic=True) == 1.0


TRAINED_BY_BATCH = ("EP quick", "STP quick", "MAttr quick")
"""A batch is a step of these."""


@pytest.mark.parametrize(
    "name",
    [
        *("EAP", "IEG", "EAP-IG inputs", "Clean-Corrupt"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                *("EAP-IG activations", "EAP-IG sources", "Exact", "ACDC quick"),
                *("EP quick", "STP quick", "MAttr quick"),
            )
        ),
    ],
)
def test_the_compiled_program_is_found(name: str) -> None:
    task = TRACR_REVERSE_TOKEN_CIRCUIT_TASK
    if name not in TRAINED_BY_BATCH:  # the same prompts in one batch, not 11
        n_prompts = task.train_loader.n_prompts
        task = replace(task, batch_size=n_prompts, batch_count=1)
    model, known = task.model, task.true_edges
    assert known is not None
    # The middle token stays where it is, so its edges are not in the published circuit;
    # they carry it all the same.
    names = {edge.name for edge in known}
    circuit = [edge for edge in model.edges if edge.name in names and edge.seq_idx]
    assert len(circuit) == len(known) + 2 and set(known) < set(circuit)
    algo = find_prune_algo(name)
    if name == "IEG":
        algo = PruneAlgo(
            "5", "5", partial(algo.func, integrated_grad_samples=5), "IEG of 5 points"
        )
    scores = algo.func(model, task.train_loader, None)
    points = measure_task_roc(model, circuit, scores, all_edges=True)
    assert roc_auc(points, pessimistic=True) == 1.0


# Of the trainings, a shorter one shows it too.
TRAININGS_OF_NUMBERS: dict[str, dict[str, Any]] = {
    "SEP (MSE)": {"epochs": 40},
    "STP (MSE)": {"epochs": 40},
    "CP (MSE)": {"epochs": 40, "circuit_sizes": ("true_size",)},
    "TP (MSE)": {"epochs": 40, "circuit_sizes": ("true_size",)},
    "EP (MSE)": {"n_steps": 400},
    "MAttr (MSE)": {"n_steps": 400},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fewer"), TRAININGS_OF_NUMBERS.items())
def test_the_compiled_program_of_numbers_is_found(
    name: str, fewer: dict[str, Any]
) -> None:
    """Those that do not train: see the report in tests/test_experiments.py."""
    task = TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK
    known = task.true_edges
    assert known is not None
    scores = find_prune_algo(name).func(task.model, task.train_loader, known, **fewer)
    points = measure_task_roc(task.model, known, scores, all_edges=True)
    assert roc_auc(points, pessimistic=True) == 1.0


def test_any_algorithm_with_an_objective_can_compare_numbers() -> None:
    """Its warm start too."""
    task = TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK
    quick = with_squared_error(find_prune_algo("EP quick"))
    assert (quick.short_name, quick.key) == ("EP quick (MSE)", "MSE Edge Pruning (quick)")
    scores = quick.func(task.model, task.train_loader, None, n_steps=4)
    assert any((values != 0).any() for values in scores.values())
    with pytest.raises(ConfigError, match="'Random' has no `answer_function`"):
        with_squared_error(find_prune_algo("Random"))
