"""Circuit probing: subnetwork probing for several circuit sizes, as one ranking.

An edge's score says how small a circuit it is still in.

Cost: per size, epoch and batch one forward and one backward pass (F + Bk); per size and batch
two forward passes (2 F) once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from auto_circuit.checks import check_count, checked
from auto_circuit.circuits import circuit_of_scores
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import ConfigError
from auto_circuit.prune_algos.algo_config import bound, makes_config
from auto_circuit.prune_algos.objectives import (
    COMPARE_WITH_WRONG_ANSWERS,
    FaithfulnessTarget,
)
from auto_circuit.prune_algos.prune_algo import MSE_USE, AlgoNotes, PruneAlgo
from auto_circuit.prune_algos.subnetwork_probing import (
    INIT_LOGIT,
    ProbingConfig,
    SubnetworkProbingConfig,
    check_circuit_size,
    show_training,
    train_subnetwork,
)
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AblationType, Edge, MaskFn, PruneScores
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state

CircuitSize = int | Literal["true_size"]


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class CircuitProbingConfig(ProbingConfig):
    """The options of circuit probing.

    circuit_sizes: different numbers of edges; "true_size" is how many true edges there are.
        Ties at the end of a circuit are all in it.
    skip_larger: leave out sizes above the number of edges, instead of an error.
    The others: see `ProbingConfig`; but here the gates begin nearly open.
    """

    first_logit: int | float = INIT_LOGIT
    circuit_sizes: Sequence[CircuitSize] = ("true_size",)
    skip_larger: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "circuit_sizes", tuple(self.circuit_sizes))
        numbers = [size for size in self.circuit_sizes if size != "true_size"]
        for size in numbers:
            if isinstance(size, str):
                raise ConfigError(
                    f"`circuit_sizes` has {size!r}; expected numbers of edges or "
                    '"true_size".'
                )
            check_count("circuit_size", size)
        if not self.circuit_sizes:
            raise ConfigError("`circuit_sizes` is empty; expected numbers of edges.")
        if len(set(numbers)) < len(numbers):
            raise ConfigError(
                f"`circuit_sizes` is {list(self.circuit_sizes)}; expected different sizes."
            )

    def of_size(self, size: int) -> SubnetworkProbingConfig:
        """The config of the training of a circuit of this size."""
        shared = {f.name: getattr(self, f.name) for f in fields(ProbingConfig)}
        return SubnetworkProbingConfig(**shared, circuit_size=size)


@makes_config(CircuitProbingConfig)
@checked
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
    size_warmup: int | float = 0.0,
    warm_start: PruneAlgo | PruneScores | None = None,
    last_rate_share: int | float = 1.0,
) -> PruneScores:
    """The number of sizes, minus the place of the smallest circuit that has the edge.

    0: in none of the circuits; the highest score is that of the smallest circuit's edges.

    init_val: minus the gates' first logit; positive: they start nearly closed. The other
        options: see `CircuitProbingConfig`. validation_dataloader, show_train_graph: see
        `subnetwork_probing_prune_scores`; a figure for each size.

    Raises ConfigError for sizes that are not different or that the graph does not have,
    and for "true_size" without true edges, before any training.
    """
    config = CircuitProbingConfig.from_options(
        learning_rate=learning_rate,
        epochs=epochs,
        regularize_lambda=regularize_lambda,
        mask_fn=mask_fn,
        dropout_p=dropout_p,
        init_val=init_val,
        circuit_sizes=circuit_sizes,
        tree_optimisation=tree_optimisation,
        avoid_edges=avoid_edges,
        avoid_lambda=avoid_lambda,
        faithfulness_target=faithfulness_target,
        ablation_type=ablation_type,
        patience=patience,
        seed=seed,
        skip_larger=skip_larger,
        size_warmup=size_warmup,
        warm_start=warm_start,
        last_rate_share=last_rate_share,
    )
    return probe_circuits(
        *(model, dataloader, official_edges, config),
        validation_dataloader=validation_dataloader,
        show_train_graph=show_train_graph,
    )


@checked
@in_own_state(grad=True)
def probe_circuits(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    true_edges: Collection[Edge] | None,
    config: CircuitProbingConfig,
    validation_dataloader: PromptDataLoader | None = None,
    show_train_graph: bool = False,
) -> PruneScores:
    """Circuit probing; what `circuit_probing_prune_scores` does, from a config."""
    sizes = _sizes(model, true_edges, config)
    scores = model.new_prune_scores()
    for place, size in enumerate(sizes):
        of_size = config.of_size(size)
        training = train_subnetwork(
            model, dataloader, of_size, validation_dataloader=validation_dataloader
        )
        if show_train_graph:
            show_training(training, of_size)
        circuit = circuit_of_scores(model, training.prune_scores, size)
        for name, in_circuit in circuit.items():
            scores[name][in_circuit & (scores[name] == 0)] = len(sizes) - place
    return scores


def _sizes(
    model: PatchableModel,
    true_edges: Collection[Edge] | None,
    config: CircuitProbingConfig,
) -> list[int]:
    """The sizes of the circuits that are trained, from the smallest on."""
    if "true_size" in config.circuit_sizes and not true_edges:
        raise ConfigError(
            'The circuit size "true_size" needs true edges, but '
            "`official_edges` has no edges. Give numbers of edges instead."
        )
    sizes = set()
    for size in config.circuit_sizes:
        n_edges = len(true_edges or ()) if isinstance(size, str) else size
        if config.skip_larger and n_edges > model.n_edges:
            continue
        check_circuit_size(model, n_edges)
        sizes.add(n_edges)
    if not sizes:
        raise ConfigError(
            f"`circuit_sizes` is {list(config.circuit_sizes)}, none of which fits a graph "
            f"of {model.n_edges} edges."
        )
    return sorted(sizes)


def _probing_algo(
    name: str, short_name: str, config: CircuitProbingConfig, notes: AlgoNotes
) -> PruneAlgo:
    target = config.faithfulness_target
    return PruneAlgo(
        key=name,
        name=name,
        _short_name=short_name,
        needs_true_edges="true_size" in config.circuit_sizes,
        needs_wrong_answers=target in COMPARE_WITH_WRONG_ANSWERS,
        func=bound(circuit_probing_prune_scores, config),
        notes=notes,
    )


_EDGE_NOTES = AlgoNotes(
    idea="Subnetwork edge probing for several circuit sizes: how small a circuit has the edge",
    paper="Cao et al. 2021, arXiv 2104.03514, as in Miller et al. 2024, arXiv 2407.08734",
    cost="epochs x sizes x (F + B), and 2 F for each size",
    use="Circuits of given sizes, where the true circuit's size is known. A long training.",
)
_TREE_NOTES = replace(
    _EDGE_NOTES,
    idea="Subnetwork tree probing for several circuit sizes: how small a circuit has the edge",
)
_SHARED = CircuitProbingConfig(regularize_lambda=0.1, skip_larger=True)
_EDGE_CONFIG = replace(_SHARED, circuit_sizes=("true_size", 1000))
TREE_SIZES: tuple[CircuitSize, ...] = (100, "true_size", 1000, 10000)
_TREE_CONFIG = replace(
    _SHARED, epochs=200, tree_optimisation=True, circuit_sizes=TREE_SIZES
)
CIRCUIT_PROBING_PRUNE_ALGO = _probing_algo(
    "Circuit Probing", "CP", replace(_EDGE_CONFIG, epochs=2000), _EDGE_NOTES
)
CIRCUIT_TREE_PROBING_PRUNE_ALGO = _probing_algo(
    "Tree Probing", "TP", _TREE_CONFIG, _TREE_NOTES
)
MSE_CIRCUIT_TREE_PROBING_PRUNE_ALGO = _probing_algo(
    "MSE Tree Probing",
    "TP (MSE)",
    replace(_TREE_CONFIG, faithfulness_target="mse"),
    replace(_TREE_NOTES, idea="Tree probing of the squared error", use=MSE_USE),
)
MSE_CIRCUIT_PROBING_PRUNE_ALGO = _probing_algo(
    "MSE Circuit Probing",
    "CP (MSE)",
    replace(_EDGE_CONFIG, epochs=200, faithfulness_target="mse"),
    replace(_EDGE_NOTES, idea="Circuit probing of the squared error", use=MSE_USE),
)
OPPOSITE_TREE_PROBING_PRUNE_ALGO = _probing_algo(
    "Opposite Tree Probing",
    "OTP",
    replace(
        _TREE_CONFIG,
        epochs=100,
        circuit_sizes=("true_size", 1000, 10000),
        faithfulness_target="wrong_answer",
    ),
    replace(
        _TREE_NOTES,
        idea="Tree probing for circuits that give the wrong answer",
        use="What in the model works against the task.",
    ),
)
