"""The true edges of a task, as scores. Costs nothing."""

from __future__ import annotations

from collections.abc import Collection

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import ConfigError
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.types import Edge, PruneScores
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state


@checked
@in_own_state(grad=False)
def ground_truth_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader | None,
    official_edges: Collection[Edge] | None,
) -> PruneScores:
    """1 for every true edge, 0 for all others.

    Raises ConfigError if there are no true edges, GraphError if one is an edge that
    the graph has not.
    """
    if official_edges is None:
        raise ConfigError(
            "There are no true edges: `official_edges` is None. The task needs a "
            "`_true_edge_func`; leave this algorithm out for tasks without."
        )
    return model.circuit_prune_scores(edges=official_edges)


GROUND_TRUTH_PRUNE_ALGO = PruneAlgo(
    key="Official Circuit",
    name="Ground Truth",
    _short_name="GT",
    func=ground_truth_prune_scores,
    needs_true_edges=True,
    notes=AlgoNotes(
        idea="1 for the edges of the known circuit, 0 for all others",
        paper="that of the task's circuit",
        cost="none",
        use="To test a known circuit, and as the line to compare with.",
    ),
)
