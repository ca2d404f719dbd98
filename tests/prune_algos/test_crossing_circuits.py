"""Circuits with edges through attention, of a trained Llama, whose outputs are recomputed.

What algorithms find is run by the library and by a Llama written out in plain torch, in which
keys and values of other spans are those of the corrupt run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch as t
from torch import Tensor
from transformers import LlamaForCausalLM

from auto_circuit.circuit_files import load_circuit, save_circuit
from auto_circuit.circuits import circuit_of_scores
from auto_circuit.data import PromptDataLoader, load_datasets_from_json
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRICS
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.ACDC import removed_edges
from auto_circuit.prune_algos.circuit_probing import circuit_probing_prune_scores
from auto_circuit.prune_algos.edge_pruning import edge_pruning_prune_scores
from auto_circuit.prune_algos.matryoshka import matryoshka_prune_scores
from auto_circuit.prune_algos.peap import peap_prune_scores
from auto_circuit.prune_algos.subnetwork_probing import (
    subnetwork_probing_prune_scores,
)
from auto_circuit.spans import spans_of_labels
from auto_circuit.tasks import find_task
from auto_circuit.types import Edge, PatchType, PruneScores
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.visualize import draw_seq_graph
from tests.plain_circuits import PlainLlama

N_PROMPTS, SPANS = 2, ("names", "end")


@dataclass(frozen=True)
class Subject:
    """A model with two spans, its prompts, and the same model in plain torch."""

    model: PatchableModel
    loader: PromptDataLoader
    plain: PlainLlama

    def expected(self, kept: Collection[Edge]) -> Tensor:
        """The log-probabilities of the circuit of these edges, in plain torch."""
        (batch,) = self.loader
        patched = {repr(edge) for edge in self.model.edges} - set(map(repr, kept))
        logits = self.plain.circuit(batch.clean, batch.corrupt, patched)
        return logits[:, -1].log_softmax(-1)

    def found(self, n_edges: int, scores: PruneScores) -> Tensor:
        """Those that the library measures."""
        outs = run_circuits(
            self.model, self.loader, [n_edges], scores, PatchType.TREE_PATCH
        )
        ((logits,),) = (of_batches.values() for of_batches in outs.values())
        return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    task = find_task("Pocket Llama IOI Tokens")
    folder: Any = task._model_def
    bridge = load_tl_model(folder, "cpu")
    loader, _ = load_datasets_from_json(
        bridge,
        task.prompt_path,
        batch_size=N_PROMPTS,
        train_test_size=(N_PROMPTS, 0),
        return_seq_length=True,
    )
    assert loader.seq_len is not None
    numbers = [int(i >= 5) for i in range(loader.seq_len)]
    spans = spans_of_labels([SPANS[i] for i in numbers])
    model = patchable_model(
        bridge, True, "last_seq", None, True, spans=spans, crossing=True
    )
    hf_model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return Subject(model, loader, PlainLlama(hf_model.eval(), numbers))


def names(edges: Sequence[Edge]) -> list[str]:
    return [repr(edge) for edge in edges]


def kept_of_scores(of: Subject, scores: PruneScores, n_edges: int) -> list[Edge]:
    """The best edges by |score|, ranked here."""
    every = list(of.model.edges)
    falling = sorted(every, key=lambda edge: -abs(float(edge.prune_score(scores))))
    return falling[:n_edges]


def check_circuit(of: Subject, scores: PruneScores, n_edges: int) -> None:
    """It has crossing edges, not all of them, and does what plain torch says it does."""
    kept = kept_of_scores(of, scores, n_edges)
    n_crossing = sum(edge.is_crossing for edge in kept)
    assert 0 < n_crossing < sum(edge.is_crossing for edge in of.model.edges)
    found, expected = of.found(n_edges, scores), of.expected(kept)
    t.testing.assert_close(found, expected, atol=1e-4, rtol=0.0)
    # Neither the whole model nor the corrupt run.
    for other in (of.model.edges, []):
        assert (expected - of.expected(list(other))).abs().max() > 0.1


@pytest.mark.slow
def test_any_circuit_is_what_plain_torch_says(subject: Subject) -> None:
    """Of PEAP's scores, and of random edges, as files and as they are."""
    model = subject.model
    scores = peap_prune_scores(model, subject.loader, None)
    check_circuit(subject, scores, 60)
    kept = random.Random(0).sample(list(model.edges), 200)
    ones = model.new_prune_scores()
    for edge in kept:
        edge.set_prune_score(ones, 1.0)
    found, expected = subject.found(200, ones), subject.expected(kept)
    t.testing.assert_close(found, expected, atol=1e-4, rtol=0.0)


@pytest.mark.slow
def test_every_metric_measures_them_and_figures_say_what_they_leave_out(
    subject: Subject, tmp_path: Path
) -> None:
    model, loader = subject.model, subject.loader
    scores = peap_prune_scores(model, loader, None)
    save_circuit(tmp_path / "circuit.json", model, scores)
    loaded = load_circuit(tmp_path / "circuit.json", model)
    outs, again = (
        run_circuits(model, loader, [0, 60], one, PatchType.TREE_PATCH)
        for one in (scores, loaded)
    )
    for metric in PRUNE_METRICS:
        values = metric.measure(model, loader, outs)
        assert [size for size, _ in values] == [0, 60]
        assert values == metric.measure(model, loader, again)
    threshold = float(abs(kept_of_scores(subject, scores, 60)[-1].prune_score(scores)))
    circuit = circuit_of_scores(model, scores, 60)
    n_crossing = sum(edge.is_crossing for edge in circuit.edges)
    figure = draw_seq_graph(model, scores, threshold, seq_labels=list(SPANS))
    title = str(figure.layout.title.text)
    assert f"without {n_crossing} edges through attention" in title


@pytest.mark.slow
def test_acdc_finds_circuits_with_crossing_edges(subject: Subject) -> None:
    model = subject.model
    gone = set(names(removed_edges(model, subject.loader, 0.3, edges_at_once=16)))
    kept = [edge for edge in model.edges if repr(edge) not in gone]
    scores = model.new_prune_scores()
    for edge in kept:
        edge.set_prune_score(scores, 1.0)
    check_circuit(subject, scores, len(kept))


TRAININGS: dict[str, Callable[..., PruneScores]] = {
    "SEP": partial(
        subnetwork_probing_prune_scores,
        epochs=8,
        circuit_size=60,
        tree_optimisation=False,
    ),
    "CP": partial(circuit_probing_prune_scores, epochs=4, circuit_sizes=(60, 120)),
    "EP": partial(edge_pruning_prune_scores, n_steps=8),
    "MAttr": partial(matryoshka_prune_scores, n_steps=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", TRAININGS)
def test_trained_masks_have_crossing_edges(subject: Subject, algorithm: str) -> None:
    model, loader = subject.model, subject.loader
    scores = TRAININGS[algorithm](model, loader, None)
    numbers = model.in_edge_order(scores)
    n_edges = 60
    ranked = numbers.abs().sort(descending=True).values
    while ranked[n_edges - 1] == ranked[n_edges]:  # a whole group of equal scores
        n_edges += 1
    check_circuit(subject, scores, n_edges)
