"""The prune algorithms, and how to run several on several tasks."""

from __future__ import annotations

from collections.abc import Sequence

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError, near_matches
from auto_circuit.metrics.protocols import PrunableTask
from auto_circuit.prune_algos.ACDC import ACDC_PRUNE_ALGO, MSE_ACDC_PRUNE_ALGO
from auto_circuit.prune_algos.acdc_after_eap import (
    ACDC_AFTER_EAP_PRUNE_ALGO,
    QUICK_ACDC_PRUNE_ALGO,
)
from auto_circuit.prune_algos.activation_magnitude import ACT_MAG_PRUNE_ALGO
from auto_circuit.prune_algos.circuit_probing import (
    CIRCUIT_PROBING_PRUNE_ALGO,
    CIRCUIT_TREE_PROBING_PRUNE_ALGO,
    MSE_CIRCUIT_PROBING_PRUNE_ALGO,
    MSE_CIRCUIT_TREE_PROBING_PRUNE_ALGO,
    OPPOSITE_TREE_PROBING_PRUNE_ALGO,
)
from auto_circuit.prune_algos.edge_attribution_patching import (
    EDGE_ATTR_PATCH_PRUNE_ALGO,
)
from auto_circuit.prune_algos.edge_pruning import (
    EDGE_PRUNING_PRUNE_ALGO,
    QUICK_EDGE_PRUNING_PRUNE_ALGO,
)
from auto_circuit.prune_algos.exact_edge_patching import EXACT_EDGE_PATCHING_PRUNE_ALGO
from auto_circuit.prune_algos.ground_truth import GROUND_TRUTH_PRUNE_ALGO
from auto_circuit.prune_algos.head_importance import HEAD_IMPORTANCE_PRUNE_ALGO
from auto_circuit.prune_algos.integrated_gradients import (
    ACTIVATION_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    CLEAN_CORRUPT_PRUNE_ALGO,
    INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    SOURCE_INTEGRATED_GRADIENTS_PRUNE_ALGO,
)
from auto_circuit.prune_algos.mask_gradient import (
    INTEGRATED_EDGE_GRADS_LOGIT_DIFF_PRUNE_ALGO,
    LOGIT_DIFF_GRAD_PRUNE_ALGO,
    LOGIT_MSE_GRAD_PRUNE_ALGO,
    LOGPROB_DIFF_GRAD_PRUNE_ALGO,
    LOGPROB_GRAD_PRUNE_ALGO,
)
from auto_circuit.prune_algos.matryoshka import (
    MATRYOSHKA_PRUNE_ALGO,
    QUICK_MATRYOSHKA_PRUNE_ALGO,
)
from auto_circuit.prune_algos.peap import PEAP_PRUNE_ALGO
from auto_circuit.prune_algos.prune_algo import PruneAlgo, with_squared_error
from auto_circuit.prune_algos.random_edges import RANDOM_PRUNE_ALGO
from auto_circuit.prune_algos.subnetwork_probing import (
    MSE_SUBNETWORK_EDGE_PROBING_PRUNE_ALGO,
    MSE_SUBNETWORK_TREE_PROBING_PRUNE_ALGO,
    QUICK_SUBNETWORK_TREE_PROBING_PRUNE_ALGO,
    SUBNETWORK_EDGE_PROBING_PRUNE_ALGO,
    SUBNETWORK_TREE_PROBING_PRUNE_ALGO,
)
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AlgoKey, PruneScores, TaskPruneScores
from auto_circuit.utils.custom_tqdm import tqdm

__all__ = [
    "CIRCUIT_TREE_PROBING_PRUNE_ALGO",
    "GROUND_TRUTH_PRUNE_ALGO",
    "LOGIT_DIFF_GRAD_PRUNE_ALGO",
    "PRUNE_ALGOS",
    "PRUNE_ALGO_DICT",
    "PruneAlgo",
    "RANDOM_PRUNE_ALGO",
    "find_prune_algo",
    "run_prune_algos",
]

SQUARED_ERROR_PRUNE_ALGOS: tuple[PruneAlgo, ...] = tuple(
    with_squared_error(algo)
    for algo in (
        EXACT_EDGE_PATCHING_PRUNE_ALGO,
        INTEGRATED_EDGE_GRADS_LOGIT_DIFF_PRUNE_ALGO,
        INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
        ACTIVATION_INTEGRATED_GRADIENTS_PRUNE_ALGO,
        SOURCE_INTEGRATED_GRADIENTS_PRUNE_ALGO,
        CLEAN_CORRUPT_PRUNE_ALGO,
        HEAD_IMPORTANCE_PRUNE_ALGO,
        EDGE_PRUNING_PRUNE_ALGO,
        MATRYOSHKA_PRUNE_ALGO,
    )
)
"""For models whose output is a number. The others of that kind, by auto-circuit's names,
are in the files of their algorithms."""

PRUNE_ALGOS: tuple[PruneAlgo, ...] = (
    GROUND_TRUTH_PRUNE_ALGO,
    ACT_MAG_PRUNE_ALGO,
    RANDOM_PRUNE_ALGO,
    EDGE_ATTR_PATCH_PRUNE_ALGO,
    ACDC_PRUNE_ALGO,
    MSE_ACDC_PRUNE_ALGO,
    ACDC_AFTER_EAP_PRUNE_ALGO,
    QUICK_ACDC_PRUNE_ALGO,
    EXACT_EDGE_PATCHING_PRUNE_ALGO,
    INTEGRATED_EDGE_GRADS_LOGIT_DIFF_PRUNE_ALGO,
    LOGPROB_GRAD_PRUNE_ALGO,
    LOGPROB_DIFF_GRAD_PRUNE_ALGO,
    LOGIT_DIFF_GRAD_PRUNE_ALGO,
    LOGIT_MSE_GRAD_PRUNE_ALGO,
    INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    ACTIVATION_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    SOURCE_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    CLEAN_CORRUPT_PRUNE_ALGO,
    HEAD_IMPORTANCE_PRUNE_ALGO,
    SUBNETWORK_EDGE_PROBING_PRUNE_ALGO,
    CIRCUIT_PROBING_PRUNE_ALGO,
    SUBNETWORK_TREE_PROBING_PRUNE_ALGO,
    CIRCUIT_TREE_PROBING_PRUNE_ALGO,
    MSE_SUBNETWORK_EDGE_PROBING_PRUNE_ALGO,
    MSE_SUBNETWORK_TREE_PROBING_PRUNE_ALGO,
    MSE_CIRCUIT_PROBING_PRUNE_ALGO,
    MSE_CIRCUIT_TREE_PROBING_PRUNE_ALGO,
    OPPOSITE_TREE_PROBING_PRUNE_ALGO,
    QUICK_SUBNETWORK_TREE_PROBING_PRUNE_ALGO,
    EDGE_PRUNING_PRUNE_ALGO,
    QUICK_EDGE_PRUNING_PRUNE_ALGO,
    MATRYOSHKA_PRUNE_ALGO,
    QUICK_MATRYOSHKA_PRUNE_ALGO,
    PEAP_PRUNE_ALGO,
    *SQUARED_ERROR_PRUNE_ALGOS,
)
PRUNE_ALGO_DICT: dict[AlgoKey, PruneAlgo] = {algo.key: algo for algo in PRUNE_ALGOS}


@checked
def find_prune_algo(name: str) -> PruneAlgo:
    """The algorithm with this key, name or short name. Raises ConfigError for others."""
    for algo in PRUNE_ALGOS:
        if name in (algo.key, algo.name, algo.short_name):
            return algo
    names = [algo.short_name for algo in PRUNE_ALGOS]
    raise ConfigError(
        f"There is no prune algorithm {name!r}.{near_matches(name, names)} "
        f"Known: {', '.join(names)}."
    )


@checked
def run_prune_algo(task: PrunableTask, algo: PruneAlgo) -> PruneScores:
    """One algorithm's scores on one task's training prompts.

    What it draws at random it draws from its own seed: see `PruneAlgo.with_seed`.
    """
    return algo.func(task.model, task.train_loader, task.true_edges)


@checked
def run_prune_algos(
    tasks: Sequence[PrunableTask], prune_algos: Sequence[PruneAlgo]
) -> TaskPruneScores:
    """{task key: {algorithm key: scores}}, for any tasks and algorithms.

    Algorithms that need true edges are left out on tasks without. To save
    memory, run one task at a time and call its `free()` in between. Raises DataError,
    before any algorithm runs, for one that needs wrong answers on a task without.
    """
    for task in tasks:
        for algo in prune_algos:
            algo.check_prompts(task.train_loader)
    return {
        task.key: {
            algo.key: run_prune_algo(task, algo)
            for algo in tqdm(prune_algos, desc=task.name)
            if task.true_edges is not None or not algo.needs_true_edges
        }
        for task in tasks
    }
