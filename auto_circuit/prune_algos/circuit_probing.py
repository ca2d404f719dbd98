"""Circuit probing: subnetwork probing for several circuit sizes, as one ranking.

An edge's score says how small a circuit it is still in.

Cost: per size, epoch and batch one forward and one backward pass (F + Bk); per size and batch
two forward passes (2 F) once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal

from auto_circuit.checks import checked
from auto_circuit.circuits import circuit_of_scores
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import ConfigError
from auto_circuit.prune_algos.objectives import (
    COMPARE_WITH_WRONG_ANSWERS,
    FaithfulnessTarget,
)
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.prune_algos.subnetwork_probing import (
    INIT_LOGIT,
    check_circuit_size,
    subnetwork_probing_prune_scores,
)
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AblationType, Edge, MaskFn, PruneScores
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state

CircuitSize = int | Literal["true_size"]


@checked
@in_own_state(grad=True)
def circuit_probing_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    learning_rate: int | float = 0.1,
    epochs: int = 20,
    regularize_lambda: int | float = 10,
    mask_fn: MaskFn = "hard_concrete",
    dropout_p: int | float = 0.0,
    init_val: int | float = -INIT_LOGIT,
    show_train_graph: bool = False,
    circuit_sizes: Sequence[CircuitSize] = ("true_size",),
    tree_optimisation: bool = False,
    avoid_edges: Collection[Edge] | None = None,
    avoid_lambda: int | float = 1.0,
    faithfulness_target: FaithfulnessTarget = "kl_div",
    validation_dataloader: PromptDataLoader | None = None,
    ablation_type: AblationType = AblationType.RESAMPLE,
    patience: int | None = None,
    seed: int = 0,
    skip_larger: bool = False,
    size_warmup: float = 0.0,
    warm_start: PruneAlgo | PruneScores | None = None,
    last_rate_share: float = 1.0,
) -> PruneScores:
    """The number of sizes, minus the place of the smallest circuit that has the edge.

    0: in none of the circuits; the highest score is that of the smallest circuit's edges.

    circuit_sizes: numbers of edges; "true_size" is that of `official_edges`. The others:
    see `train_subnetwork`. Ties at the end of a circuit are all in it.
    skip_larger: leave out sizes above the number of edges, instead of an error.

    Raises ConfigError for sizes that are not different or that the graph does not have,
    and for "true_size" without a known circuit, before any training.
    """
    sizes = _sizes(model, official_edges, circuit_sizes, skip_larger)
    scores = model.new_prune_scores()
    for place, size in enumerate(sizes):
        trained = subnetwork_probing_prune_scores(
            model,
            dataloader,
            official_edges,
            learning_rate,
            epochs,
            regularize_lambda,
            mask_fn,
            dropout_p,
            init_val,
            show_train_graph,
            size,
            tree_optimisation,
            avoid_edges,
            avoid_lambda,
            faithfulness_target,
            validation_dataloader,
            ablation_type,
            patience,
            seed,
            size_warmup,
            warm_start,
            last_rate_share,
        )
        for name, in_circuit in circuit_of_scores(model, trained, size).items():
            scores[name][in_circuit & (scores[name] == 0)] = len(sizes) - place
    return scores


def _sizes(
    model: PatchableModel,
    official_edges: Collection[Edge] | None,
    circuit_sizes: Sequence[CircuitSize],
    skip_larger: bool,
) -> list[int]:
    sizes = []
    for size in circuit_sizes:
        if size == "true_size":
            if not official_edges:
                raise ConfigError(
                    'The circuit size "true_size" needs a known circuit, but '
                    "`official_edges` has no edges. Give numbers of edges instead."
                )
            size = len(official_edges)
        if isinstance(size, str):
            raise ConfigError(
                f'`circuit_sizes` has {size!r}; expected numbers of edges or "true_size".'
            )
        if skip_larger and size > model.n_edges:
            continue
        check_circuit_size(model, size)
        sizes.append(size)
    if not sizes:
        raise ConfigError(
            f"`circuit_sizes` is {list(circuit_sizes)}, none of which fits a graph of "
            f"{model.n_edges} edges."
        )
    numbers = [size for size in circuit_sizes if size != "true_size"]
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"`circuit_sizes` is {sizes}; expected different sizes.")
    return sorted(set(sizes))


def _probing_algo(
    key: str,
    short_name: str,
    epochs: int,
    circuit_sizes: tuple[CircuitSize, ...],
    tree_optimisation: bool = True,
    faithfulness_target: FaithfulnessTarget = "kl_div",
) -> PruneAlgo:
    return PruneAlgo(
        key=key,
        name=key,
        _short_name=short_name,
        needs_true_edges="true_size" in circuit_sizes,
        needs_wrong_answers=faithfulness_target in COMPARE_WITH_WRONG_ANSWERS,
        func=partial(
            circuit_probing_prune_scores,
            learning_rate=0.1,
            epochs=epochs,
            regularize_lambda=0.1,
            circuit_sizes=circuit_sizes,
            skip_larger=True,
            tree_optimisation=tree_optimisation,
            faithfulness_target=faithfulness_target,
        ),
    )


TREE_SIZES: tuple[CircuitSize, ...] = (100, "true_size", 1000, 10000)
CIRCUIT_PROBING_PRUNE_ALGO = _probing_algo(
    "Circuit Probing", "CP", 2000, ("true_size", 1000), tree_optimisation=False
)
CIRCUIT_TREE_PROBING_PRUNE_ALGO = _probing_algo("Tree Probing", "TP", 200, TREE_SIZES)
MSE_CIRCUIT_TREE_PROBING_PRUNE_ALGO = _probing_algo(
    "MSE Tree Probing", "TP (MSE)", 200, TREE_SIZES, faithfulness_target="mse"
)
MSE_CIRCUIT_PROBING_PRUNE_ALGO = _probing_algo(
    "MSE Circuit Probing",
    "CP (MSE)",
    200,
    ("true_size", 1000),
    tree_optimisation=False,
    faithfulness_target="mse",
)
OPPOSITE_TREE_PROBING_PRUNE_ALGO = _probing_algo(
    "Opposite Tree Probing",
    "OTP",
    100,
    ("true_size", 1000, 10000),
    faithfulness_target="wrong_answer",
)
