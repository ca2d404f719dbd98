"""Does a circuit need each of its edges?"""

from __future__ import annotations

from dataclasses import dataclass

from auto_circuit.checks import checked
from auto_circuit.circuits import CircuitMasks, as_circuit
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import ConfigError
from auto_circuit.metrics.circuit_outs import circuit_prompt_vals
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_METRIC,
    PruneMetric,
)
from auto_circuit.types import AblationType, Edge
from auto_circuit.utils.patchable_model import PatchableModel


@dataclass(frozen=True)
class EdgeEffect:
    """What removing an edge of a circuit does to the metric.

    effect: m(circuit) - m(circuit without the edge), in the metric's unit. Positive:
        the edge raises the metric; about 0: the circuit does not need it.
    """

    edge: Edge
    effect: float


@checked
def removal_effects(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    circuit: CircuitMasks,
    metric: PruneMetric = LOGIT_DIFF_METRIC,
    ablation_type: AblationType = AblationType.RESAMPLE,
) -> list[EdgeEffect]:
    """The effect of removing each edge of a circuit, one at a time, in graph order.

    The metric is the mean over prompts; the input is clean, and the ablation is patched in
    along all edges that are not in the circuit.

    Cost: a forward pass per edge and batch. Raises GraphError for a circuit of another
    graph, ConfigError for one without edges or a metric without `prompt_func`.
    """
    circuit = as_circuit(model, circuit)
    edges = circuit.edges
    if not edges:
        raise ConfigError(
            "The circuit has no edges, so none can be removed. Give a circuit with at "
            "least one."
        )
    circuits = [circuit, *(circuit.without_edges([edge]) for edge in edges)]
    vals = circuit_prompt_vals(model, dataloader, circuits, metric, ablation_type)
    whole, *reduced = vals.mean(1).tolist()
    return [
        EdgeEffect(edge, whole - value)
        for edge, value in zip(edges, reduced, strict=True)
    ]


edge_effects = removal_effects
"""The name that it had, which is also that of another function: the effects of patching
single edges, in `prune_algos.exact_edge_patching`."""
