"""ACDC (Conmy et al. 2023, arXiv 2304.14997): take edges out one by one, from the end.

For each threshold, all edges are tried in one fixed order: destinations from the last layer to
the first, and within a layer in the graph's order. An edge is patched, and stays patched if the
outputs get worse by less than the threshold.

Cost: about a third of a forward pass (F) per edge and threshold, on the first batch: the layers
before the edge do not run again. Measured by position, a graph has many times the edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import torch as t
from torch import Tensor
from torch.nn.functional import mse_loss

from auto_circuit.checks import check_count, check_number, checked
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.precision import at_least_float32
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.algo_config import AlgoConfig, bound, makes_config
from auto_circuit.prune_algos.mask_training import (
    TrainingBatch,
    prompts_at_once,
    training_batches,
)
from auto_circuit.prune_algos.one_by_one import Trial, edges_from_the_end, trial
from auto_circuit.prune_algos.prune_algo import MSE_USE, AlgoNotes, PruneAlgo
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import (
    AblationType,
    CircuitOutputs,
    Edge,
    PatchType,
    PruneScores,
)
from auto_circuit.utils.custom_tqdm import tqdm
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.tensor_ops import multibatch_kl_div
from auto_circuit.utils.torch_state import in_own_state

AcdcTarget = Literal["kl_div", "mse"]
AfterTrial = Callable[[Sequence[Edge], Tensor], None]
"""Called after every trial with the edges that were patched in it, and the outputs."""

TEST_TOLERANCE = 1e-3
"""How far outputs may be from those of `run_circuits` in `test_mode`, as in auto-circuit."""
FEW_EDGES, DRAW_EVERY = 20, 50
"""`show_graphs` draws every trial of a graph of few edges, and one in fifty of others."""


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class AcdcConfig(AlgoConfig):
    """The options of ACDC.

    tao_exps, tao_bases: the thresholds are base * 10 ** exponent.
    faithfulness_target: "kl_div": KL(model || circuit), nats; "mse": the mean squared
        difference of the logits.
    edges_at_once: how many edges are tried in one pass, on the guess that all of them go;
        the first that stays ends it, so the result is the same. May pay where a forward
        pass costs its overhead, as on GPUs. On a CPU it does not (pocket IOI, one thread:
        102 edges per second one by one, 85 with 8 at once), so the default is 1.
    """

    tao_exps: Sequence[int] = range(-5, -1)
    tao_bases: Sequence[int | float] = (1, 3, 5, 7, 9)
    faithfulness_target: AcdcTarget = "kl_div"
    edges_at_once: int = 1

    def __post_init__(self) -> None:
        for name in ("tao_exps", "tao_bases"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_thresholds(self.thresholds)
        check_count("edges_at_once", self.edges_at_once)

    @property
    def thresholds(self) -> list[float]:
        """From the lowest to the highest."""
        return sorted(
            {
                check_number("tao_bases", base, above=0)
                * 10.0 ** check_count("tao_exps", exp, -300, 300)
                for exp in self.tao_exps
                for base in self.tao_bases
            }
        )


@makes_config(AcdcConfig)
@checked
@in_own_state(grad=False)
def acdc_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    tao_exps: Sequence[int] = range(-5, -1),
    tao_bases: Sequence[int | float] = (1, 3, 5, 7, 9),
    faithfulness_target: AcdcTarget = "kl_div",
    test_mode: bool = False,
    run_circuits_ref: Callable[..., CircuitOutputs] | None = None,
    show_graphs: bool = False,
    draw_seq_graph_ref: Callable[..., object] | None = None,
    edges_at_once: int = 1,
) -> PruneScores:
    """The lowest threshold at which each edge is taken out: the higher, the more it matters.

    Edges that no threshold takes out have the score +inf: they are the circuit of the
    highest threshold (count them with `isinf`). Clean prompts, corrupt activations patched
    in, the loader's first batch.

    tao_exps, tao_bases, faithfulness_target, edges_at_once: see `AcdcConfig`.
    test_mode: compute each trial again, by whole passes of a copy of the model, and compare.
        Very slow. run_circuits_ref: what computes it; `run_circuits` if None.
    show_graphs: draw the edges that are out, in all trials of a graph of fewer than 20
        edges, else in one of 50. draw_seq_graph_ref: what draws, which must be given:
        `auto_circuit.visualize.draw_seq_graph`.

    Raises ConfigError without thresholds above 0, and for `show_graphs` without what draws;
    GraphError if `test_mode` finds other outputs.

    The order of the edges is the same in every process.
    """
    config = AcdcConfig(
        tao_exps=tao_exps,
        tao_bases=tao_bases,
        faithfulness_target=faithfulness_target,
        edges_at_once=edges_at_once,
    )
    watchers: list[AfterTrial] = []
    if test_mode:
        run = run_circuits_ref or run_circuits
        watchers.append(_comparison(deepcopy(model), dataloader, run))
    if show_graphs:
        watchers.append(_drawing(model, draw_seq_graph_ref))
    return acdc(model, dataloader, official_edges, config, watchers)


@checked
@in_own_state(grad=False)
def acdc(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    true_edges: Collection[Edge] | None,
    config: AcdcConfig,
    watchers: Sequence[AfterTrial] = (),
) -> PruneScores:
    """What `acdc_prune_scores` does, from a config. watchers: what looks at every trial."""
    n_at_once = prompts_in_a_trial(model, dataloader, config.faithfulness_target)
    batch = first_batch(model, dataloader, n_at_once)
    scores = model.new_prune_scores(math.inf)
    thresholds = config.thresholds
    for threshold in tqdm(reversed(thresholds), total=len(thresholds), leave=False):
        for edge in take_edges_out(
            model,
            batch,
            threshold,
            config.faithfulness_target,
            config.edges_at_once,
            watchers=watchers,
        ):
            edge.set_prune_score(scores, threshold)
    return scores


@checked
@in_own_state(grad=False)
def removed_edges(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    threshold: float,
    faithfulness_target: AcdcTarget = "kl_div",
    edges_at_once: int = 1,
    edges: Collection[Edge] | None = None,
) -> list[Edge]:
    """The edges that one threshold takes out, in the order in which they go.

    edges: only these are tried; all if None. For the rest see `acdc_prune_scores`.
    """
    check_thresholds([threshold])
    check_count("edges_at_once", edges_at_once)
    model.check_edges(edges or ())
    n_at_once = prompts_in_a_trial(model, dataloader, faithfulness_target)
    batch = first_batch(model, dataloader, n_at_once)
    return take_edges_out(
        model, batch, threshold, faithfulness_target, edges_at_once, edges
    )


@checked
def prompts_in_a_trial(
    model: PatchableModel, dataloader: PromptDataLoader, target: AcdcTarget = "kl_div"
) -> int | None:
    """How many of the first batch's prompts ACDC may run at a time; see `prompts_at_once`."""

    def try_out(batch: TrainingBatch) -> None:
        with trial(model, batch, 1) as circuits:
            _distances(circuits, None, target)
            if batch.parts is None:
                _distances(circuits, edges_from_the_end(model.edges)[-1], target)

    resample = AblationType.RESAMPLE
    return prompts_at_once(model, [dataloader], resample, "clean", try_out, 1)


@checked
def first_batch(
    model: PatchableModel, dataloader: PromptDataLoader, n_at_once: int | None
) -> TrainingBatch:
    """The batch that ACDC looks at, in parts of so many prompts."""
    resample = AblationType.RESAMPLE
    (batch,) = training_batches(model, dataloader, resample, "clean", 1, n_at_once)
    return batch


@checked
@in_own_state(grad=False)
def take_edges_out(
    model: PatchableModel,
    batch: TrainingBatch,
    threshold: float,
    target: AcdcTarget = "kl_div",
    edges_at_once: int = 1,
    edges: Collection[Edge] | None = None,
    only_edges: bool = False,
    watchers: Sequence[AfterTrial] = (),
) -> list[Edge]:
    """ACDC's loop: the edges that go, in the order in which they go.

    edges: those that are tried; all if None. only_edges: all others are patched, from the
    beginning. watchers: what looks at every trial. The prompts and what is patched in are
    the batch's.
    """
    edges = model.edges if edges is None else edges
    removed: list[Edge] = []
    waiting = edges_from_the_end(edges)
    if batch.parts is not None:
        edges_at_once = 1
    with trial(model, batch, edges_at_once, edges if only_edges else None) as circuits:
        ((distance, _),) = _distances(circuits, None, target)
        # Stays when it is full: it says how many edges are tested per second.
        progress = tqdm(total=len(waiting), desc=f"ACDC {threshold:.0e}", unit=" edges")
        while waiting:
            # Circuit i is without the next i + 1 edges, as if all had to go.
            tried = waiting[:edges_at_once]
            for i, edge in enumerate(tried):
                circuits.patch(edge, slice(i, None), 1.0)
            found = _distances(circuits, tried[-1], target, bool(watchers))
            n_done = 0
            for edge, (without, of_circuit) in zip(tried, found, strict=False):
                for watch in watchers:
                    watch([*removed, edge], of_circuit)
                n_done += 1
                if without - distance < threshold:
                    distance = without
                    removed.append(edge)
                    circuits.patch(edge, slice(None), 1.0)
                else:  # it stays, and what comes after it was tried without it
                    circuits.patch(edge, slice(None), 0.0)
                    break
            for edge in tried[n_done:]:
                circuits.patch(edge, slice(None), 0.0)
            waiting = waiting[n_done:]
            progress.update(n_done)
        progress.close()
    return removed


def check_thresholds(thresholds: Sequence[int | float]) -> None:
    """Raise ConfigError unless there are thresholds, all of them finite and above 0."""
    if not thresholds:
        raise ConfigError("There are no thresholds; expected some, all above 0.")
    for threshold in thresholds:
        check_number("threshold", threshold, above=0)


def _comparison(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    run: Callable[..., CircuitOutputs],
) -> AfterTrial:
    """Compares a trial's outputs, of the first batch, with what `run` says of a copy."""

    def compare(patched: Sequence[Edge], outputs: Tensor) -> None:
        scores = model.new_prune_scores(1.0)
        for edge in patched:
            edge.set_prune_score(scores, 0.0)
        n_edges = model.n_edges - len(patched)
        expected = run(
            model=model,
            dataloader=dataloader,
            test_edge_counts=[n_edges],
            prune_scores=scores,
            patch_type=PatchType.TREE_PATCH,
        )[n_edges][next(iter(dataloader)).key]
        relative = max(1e-5, 8 * t.finfo(outputs.dtype).eps)
        if not t.allclose(outputs, expected, relative, TEST_TOLERANCE):
            raise GraphError(
                f"Without {patched[-1]!r} and {len(patched) - 1} other edges ACDC's outputs "
                f"are up to {float((outputs - expected).abs().max()):.3g} from those of "
                "`run_circuits_ref`: one of the two does not patch these edges. Report it."
            )

    return compare


def _drawing(
    model: PatchableModel, draw_seq_graph: Callable[..., object] | None
) -> AfterTrial:
    """Draws the edges that are out in some of the trials."""
    if draw_seq_graph is None:
        raise ConfigError(
            "`show_graphs` needs what draws: give `draw_seq_graph_ref` the function "
            "`auto_circuit.visualize.draw_seq_graph`."
        )
    trials = count()

    def draw(patched: Sequence[Edge], outputs: Tensor) -> None:
        if next(trials) % DRAW_EVERY == 0 or model.n_edges < FEW_EDGES:
            draw_seq_graph(
                model=model,
                prune_scores=model.circuit_prune_scores(patched),
                show_all_seq_pos=True,
                display_ipython=True,
            )

    return draw


def _distances(
    circuits: Trial, first: Edge | None, target: AcdcTarget, keeps_outputs: bool = False
) -> list[tuple[float, Tensor]]:
    """(The distance, the outputs if they are kept) of each circuit; see `Trial.by_part`."""
    n_prompts = len(circuits.batch.batch.clean)
    totals: list[float] = []
    kept: list[Tensor] = []
    for outputs, clean_outputs in circuits.by_part(first):
        # Means over prompts, which weigh as many as they are of.
        share = len(clean_outputs) / n_prompts
        distances = [share * _distance(out, clean_outputs, target) for out in outputs]
        before = totals or [0.0] * len(distances)
        totals = [a + b for a, b in zip(before, distances, strict=True)]
        kept.append(outputs if keeps_outputs else outputs[:, :0])
    return list(zip(totals, t.cat(kept, 1), strict=True))


def _distance(outputs: Tensor, clean_outputs: Tensor, target: AcdcTarget) -> float:
    outputs, clean_outputs = map(at_least_float32, (outputs, clean_outputs))
    if target == "mse":
        return float(mse_loss(outputs, clean_outputs))
    kl_div = multibatch_kl_div(outputs.log_softmax(-1), clean_outputs.log_softmax(-1))
    return float(kl_div)


_NOTES = AlgoNotes(
    idea="The lowest threshold at which the edge is taken out, edge after edge from the end",
    paper="Conmy et al. 2023, arXiv 2304.14997",
    cost="about F / 3 for each edge and threshold, on the first batch only",
    use="Small graphs, and to compare with published circuits. Slow: see ACDC after EAP.",
)
ACDC_PRUNE_ALGO = PruneAlgo(
    key="ACDC",
    name="ACDC",
    func=bound(acdc_prune_scores, AcdcConfig(tao_exps=range(-6, -2), tao_bases=(1,))),
    notes=_NOTES,
)
MSE_ACDC_PRUNE_ALGO = PruneAlgo(
    key="MSE ACDC",
    name="MSE ACDC",
    _short_name="ACDC (MSE)",
    func=bound(
        acdc_prune_scores,
        AcdcConfig(tao_exps=range(-10, 0), tao_bases=(1,), faithfulness_target="mse"),
    ),
    notes=replace(_NOTES, idea="ACDC of the squared error", use=MSE_USE),
)
