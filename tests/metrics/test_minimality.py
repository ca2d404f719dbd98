"""The effect of removing each edge of a circuit, by hand on the micro model."""

from __future__ import annotations

import pytest

from auto_circuit.errors import ConfigError
from auto_circuit.metrics.minimality import removal_effects
from auto_circuit.metrics.prune_metrics.prune_metrics import PruneMetric
from auto_circuit.prune import run_circuits
from auto_circuit.types import AblationType, PatchType
from tests.micro import micro_loader, micro_model
from tests.models import state_snapshot

# Nothing but this gives the logit difference -24 + 2 (see test_faithfulness).
PATH = ("Resid Start->B1.1", "B1.1->Resid End")


def test_micro_effects() -> None:
    model = micro_model()
    names = (*PATH, "Resid Start->Resid End", "B0.0->B1.0")
    circuit = model.circuit_prune_scores(names, bool=True)
    before = state_snapshot(model)
    effects = removal_effects(model, micro_loader(), circuit)
    assert state_snapshot(model) == before
    assert [e.edge for e in effects] == [e for e in model.edges if e.name in names]
    assert {e.edge.name: e.effect for e in effects} == {
        "Resid Start->B1.1": pytest.approx(2.0),
        "B1.1->Resid End": pytest.approx(2.0),
        "Resid Start->Resid End": pytest.approx(0.0),
        "B0.0->B1.0": pytest.approx(0.0),
    }


def test_effects_are_means_over_prompts_however_batched() -> None:
    model = micro_model()
    circuit = model.circuit_prune_scores(PATH, bool=True)
    for batch_size in (1, 2, 3):
        loader = micro_loader([1.0, 2.0, 6.0], batch_size)
        effects = [e.effect for e in removal_effects(model, loader, circuit)]
        assert effects == pytest.approx([6.0, 6.0])  # 2 * (1 + 2 + 6) / 3


def test_effects_under_zero_ablation() -> None:
    model = micro_model()
    circuit = model.circuit_prune_scores(PATH, bool=True)
    effects = removal_effects(
        model, micro_loader(), circuit, ablation_type=AblationType.ZERO
    )
    assert [e.effect for e in effects] == pytest.approx([1.0, 1.0])  # 4 - 3


def test_removing_from_everything_is_what_run_circuits_does() -> None:
    model = micro_model()
    everything = {name: mask == 0 for name, mask in model.patch_masks.items()}
    effects = removal_effects(model, micro_loader(), everything)
    for edge_effect in effects:
        scores = model.circuit_prune_scores([edge_effect.edge])
        outs = run_circuits(
            model,
            micro_loader(),
            [1],
            scores,
            PatchType.EDGE_PATCH,
            reverse_clean_corrupt=True,
        )
        ((wrong, right),) = next(iter(outs[1].values())).tolist()
        assert edge_effect.effect == pytest.approx(24.0 - (right - wrong))


def test_errors() -> None:
    model = micro_model()
    empty = model.circuit_prune_scores([], bool=True)
    with pytest.raises(ConfigError, match="has no edges"):
        removal_effects(model, micro_loader(), empty)
    circuit = model.circuit_prune_scores(PATH, bool=True)
    metric = PruneMetric("Mine", "Mine", lambda model, loader, outs: [])
    with pytest.raises(ConfigError, match="no value for single prompts"):
        removal_effects(model, micro_loader(), circuit, metric)
