"""ACDC on the edges that edge attribution patching does not rule out.

ACDC (Conmy et al. 2023, arXiv 2304.14997) runs the model once for each edge, and a graph with
positions has tens of thousands. Here edge attribution patching (Syed et al. 2023, arXiv
2310.10348) picks the candidates; all other edges are patched from the start, and ACDC tries
to take out the candidates one by one.

Cost: edge attribution patching (2 F + 1 Bk per batch), then about half a forward pass (F) for each
candidate and threshold, on the first batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from auto_circuit.checks import check_count, checked
from auto_circuit.circuits import circuit_of_scores
from auto_circuit.data import PromptDataLoader
from auto_circuit.prune_algos.ACDC import (
    check_thresholds,
    first_batch,
    prompts_in_a_trial,
    take_edges_out,
)
from auto_circuit.prune_algos.algo_config import AlgoConfig, bound, takes_options
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.types import Edge, PruneScores
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class AcdcAfterEapConfig(AlgoConfig):
    """The options of ACDC after edge attribution patching.

    n_candidates: the edges with the largest |score| of edge attribution patching, and all
        that tie with the last of them; all edges, if there are no more.
    thresholds: each is the rise of KL(model || circuit), in nats, below which an edge goes.
    all_edges_up_to: in a graph of no more edges than this, all are candidates: then it is
        ACDC itself.
    edges_at_once: see `AcdcConfig`. The result is the same.
    """

    n_candidates: int = 200
    thresholds: Sequence[int | float] = (1e-3, 1e-2)
    all_edges_up_to: int = 0
    edges_at_once: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        check_count("n_candidates", self.n_candidates)
        check_count("all_edges_up_to", self.all_edges_up_to, at_least=0)
        check_count("edges_at_once", self.edges_at_once)
        check_thresholds(self.thresholds)


@takes_options(AcdcAfterEapConfig)
@checked
@in_own_state(grad=False)
def acdc_after_eap_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    config: AcdcAfterEapConfig,
) -> PruneScores:
    """The lowest threshold at which each candidate is taken out; 0 for all other edges.

    The higher, the more the edge matters; a candidate that no threshold takes out has the
    score +inf, as in `acdc_prune_scores`. Clean prompts, corrupt activations patched in, the
    loader's first batch.

    config: see `AcdcAfterEapConfig`; its options may be given one by one too.

    Raises ConfigError for fewer than 1 candidate, and without thresholds above 0. Not in
    auto-circuit.
    """
    n_at_once = prompts_in_a_trial(model, dataloader)
    if model.n_edges <= max(config.n_candidates, config.all_edges_up_to):
        candidates = list(model.edges)
    else:
        candidates = _best_edges(model, dataloader, config.n_candidates)
    batch = first_batch(model, dataloader, n_at_once)
    scores = model.new_prune_scores()
    for edge in candidates:
        edge.set_prune_score(scores, math.inf)
    for threshold in sorted(config.thresholds, reverse=True):
        removed = take_edges_out(
            model,
            batch,
            threshold,
            edges_at_once=config.edges_at_once,
            edges=candidates,
            only_edges=True,
        )
        for edge in removed:
            edge.set_prune_score(scores, threshold)
    return scores


def _best_edges(
    model: PatchableModel, dataloader: PromptDataLoader, n_edges: int
) -> list[Edge]:
    eap = edge_attribution_patching_prune_scores(model, dataloader, None)
    return circuit_of_scores(model, eap, n_edges).edges


_NOTES = AlgoNotes(
    idea="ACDC on the 200 edges that EAP ranks highest; all others are out from the start",
    paper="Conmy et al. 2023, arXiv 2304.14997, after Syed et al. 2023, arXiv 2310.10348",
    cost="2 F + B, and about F / 2 for each candidate and threshold, on the first batch only",
    use="A minimal circuit of a graph that is too large for ACDC.",
)
ACDC_AFTER_EAP_PRUNE_ALGO = PruneAlgo(
    key="ACDC after Edge Attribution Patching",
    name="ACDC after Edge Attribution Patching",
    _short_name="ACDC after EAP",
    func=bound(acdc_after_eap_prune_scores, AcdcAfterEapConfig(n_candidates=200)),
    needs_wrong_answers=True,
    notes=_NOTES,
)
QUICK_ACDC_PRUNE_ALGO = PruneAlgo(
    key="ACDC (quick)",
    name="ACDC (quick)",
    _short_name="ACDC quick",
    func=bound(
        acdc_after_eap_prune_scores,
        AcdcAfterEapConfig(n_candidates=200, all_edges_up_to=2000, edges_at_once=4),
    ),
    needs_wrong_answers=True,
    notes=replace(
        _NOTES,
        idea="ACDC: on all edges of a graph of up to 2,000, else on EAP's best 200",
        use="ACDC in a sweep: in a minute on a small model.",
    ),
)
"""ACDC on all edges of a small graph, and on 200 candidates of a larger one."""
