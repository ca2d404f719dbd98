"""The one rule that makes each algorithm what it is, on the micro model in milliseconds.

Clean prompts are `scale * [[3, 3], [2, 2], [1, 1]]`, corrupt ones minus that. At the last
position the heads of a layer write [1, 2] and [3, 4] times what they read.
"""

from __future__ import annotations

import pytest
import torch as t

from auto_circuit.prune_algos.ACDC import removed_edges
from auto_circuit.prune_algos.edge_pruning import train_edge_pruning
from auto_circuit.prune_algos.mask_training import warm_start_logits
from auto_circuit.prune_algos.subnetwork_probing import train_subnetwork
from auto_circuit.types import Edge
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import mask_fn_mode, patch_mode, train_mask_mode
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import CLEAN, micro_loader, micro_model


@pytest.fixture(scope="module")
def model() -> PatchableModel:
    return micro_model()


# --------------------------------------------------------------------------- ACDC


def plain_acdc(model: PatchableModel, threshold: float, cumulative: bool) -> list[Edge]:
    """Edges from the end, in the graph's order; squared errors, every circuit run anew.

    cumulative: compare with the last circuit (ACDC); else with the whole model.
    """
    patch = src_ablations(model, -CLEAN[None])

    def outputs(edges: list[Edge]) -> t.Tensor:
        with t.no_grad(), patch_mode(model, patch, edges):
            return model(CLEAN[None])[model.out_slice]

    whole, removed, last = outputs([]), [], 0.0
    for edge in sorted(model.edges, key=lambda edge: (-edge.dest.layer, edge)):
        now = float((outputs([*removed, edge]) - whole).square().mean())
        if now - last < threshold:
            removed.append(edge)
            last = now if cumulative else 0.0
    return removed


def test_acdc_compares_with_the_last_circuit(model: PatchableModel) -> None:
    threshold = 1500.0
    expected = plain_acdc(model, threshold, cumulative=True)
    assert 0 < len(expected) < model.n_edges
    assert expected != plain_acdc(model, threshold, cumulative=False)
    assert removed_edges(model, micro_loader(), threshold, "mse") == expected


# ----------------------------------------------------------------------- trainings


@pytest.mark.parametrize("circuit_size,is_free", [(None, False), (5, False), (13, True)])
def test_subnetwork_probing_pays_for_edges_above_the_allowed_size(
    model: PatchableModel, circuit_size: int | None, is_free: bool
) -> None:
    """12.1 of 13 edges: those that are too many, as a share of the size; or all."""
    training = train_subnetwork(
        model,
        micro_loader(),
        epochs=1,
        init_val=-1.0,
        regularize_lambda=3,
        circuit_size=circuit_size,
        tree_optimisation=True,
        faithfulness_target="logit_diff",
    )
    (step,) = training.steps
    share = float(t.sigmoid(1 - 2 / 3 * t.tensor(0.1 / 1.1).log()))
    n_edges = share * 13
    assert step.n_edges == pytest.approx(n_edges, rel=1e-5)
    if circuit_size is not None:
        share = max(n_edges - circuit_size, 0.0) / circuit_size
    assert step.penalty == pytest.approx(3 * share, rel=1e-5)
    assert (step.penalty == 0) == is_free
    assert step.loss == pytest.approx(step.faithfulness + step.penalty, rel=1e-5)


@pytest.mark.parametrize("tree", [True, False])
def test_edges_to_avoid_cost_their_mean_openness(
    model: PatchableModel, tree: bool
) -> None:
    """The gates are half open at first: all of them, and those to avoid."""
    (step,) = train_subnetwork(
        model,
        micro_loader(),
        epochs=1,
        mask_fn="sigmoid",
        init_val=0.0,
        regularize_lambda=3,
        tree_optimisation=tree,
        avoid_edges=list(model.edges)[:4],
        avoid_lambda=7,
    ).steps
    assert step.penalty == pytest.approx(0.5 * 3 + 0.5 * 7, rel=1e-6)


@pytest.mark.parametrize("tree", [True, False])
def test_a_training_without_a_step_gives_the_ranking_that_it_began_with(
    model: PatchableModel, tree: bool
) -> None:
    """In tree direction too, where a mask's logit is minus the gate's."""
    scores, edges = model.new_prune_scores(), list(model.edges)
    for i, edge in enumerate(edges):
        scores[edge.dest.module_name][edge.patch_idx] = (i + 1.0) * (-1) ** i
    found = train_subnetwork(
        model,
        micro_loader(),
        learning_rate=1e-9,
        epochs=1,
        tree_optimisation=tree,
        warm_start=scores,
    ).prune_scores
    ranked = sorted(edges, key=lambda edge: float(edge.prune_score(found)))
    assert ranked == edges


def test_the_allowed_size_falls_by_the_same_factor_each_step(
    model: PatchableModel,
) -> None:
    """From 13 edges to 2 in 3 of 4 steps; 12.1 of them are open all the time."""
    training = train_subnetwork(
        model,
        micro_loader(),
        learning_rate=1e-9,
        epochs=4,
        init_val=-1.0,
        regularize_lambda=3,
        circuit_size=2,
        size_warmup=0.75,
        tree_optimisation=True,
        faithfulness_target="logit_diff",
    )
    factor = (2 / 13) ** (1 / 3)
    for step, allowed in zip(
        training.steps, (13 * factor, 13 * factor**2, 2, 2), strict=True
    ):
        expected = 3 * (step.n_edges - allowed) / allowed
        assert expected > 0
        assert step.penalty == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("patience,n_epochs", [(1, 2), (2, 3), (None, 5)])
def test_patience_counts_the_epochs_after_the_best(
    model: PatchableModel, patience: int | None, n_epochs: int
) -> None:
    """Too small a step to change a gate: no loss is lower than that of the first epoch."""
    training = train_subnetwork(
        model,
        micro_loader([1.0, 2.0]),
        learning_rate=1e-9,
        epochs=5,
        mask_fn="sigmoid",
        tree_optimisation=True,
        faithfulness_target="logit_diff",
        patience=patience,
    )
    assert len(training.steps) == 2 * n_epochs


@pytest.mark.parametrize("n_steps,warmup_share,progress", [(2, 0.5, 1.0), (4, 1.0, 0.5)])
def test_the_multipliers_of_edge_pruning_climb(
    model: PatchableModel, n_steps: int, warmup_share: float, progress: float
) -> None:
    """They begin at 0; Adam's first step is the learning rate, towards a higher loss.

    Too many edges are left, so that is lower for the first and higher for the second.
    progress: so much of the way to 0.6 has the target gone when the second step is made.
    """
    training = train_edge_pruning(
        model,
        micro_loader(),
        target_sparsity=0.6,
        n_steps=n_steps,
        multiplier_learning_rate=5.0,
        warmup_share=warmup_share,
        faithfulness_target="logit_diff",
    )
    first, second, *_ = training.steps
    assert first.penalty == 0
    start = 1 - first.n_edges / 13
    excess = (1 - second.n_edges / 13) - (start + (0.6 - start) * progress)
    assert excess < -0.1
    assert second.penalty == pytest.approx(-5 * excess + 5 * excess**2, rel=1e-4)


# -------------------------------------------------------------------- small rules


def test_a_warm_start_follows_ranks(model: PatchableModel) -> None:
    """The best edge has the highest logit, the last one minus that; ties are equal.

    Logits fall with the logarithm of the rank: 1 for the best edge.
    """
    scores = model.new_prune_scores()
    edges = list(model.edges)
    n_edges = len(edges)
    for i, edge in enumerate(edges):  # ranks 1, 2, ... and the last three are tied
        size = max(n_edges - i, 3) ** 2.0  # how much larger a score is does not count
        scores[edge.dest.module_name][edge.patch_idx] = size * (-1) ** i
    logits = warm_start_logits(model, micro_loader(), scores, 2.0)
    found = [float(edge.prune_score(logits)) for edge in edges]
    ranks = [*range(1, n_edges - 1), n_edges - 2, n_edges - 2]
    log = t.tensor(ranks).double().log() / t.tensor(n_edges).double().log()
    assert found == pytest.approx((2 - 4 * log).tolist(), abs=1e-6)
    assert found[0] == 2.0
    assert found[-3:] == [found[-1]] * 3


@pytest.mark.parametrize("dropout", [0.25, 0.5])
def test_dropout_is_rescaled(dropout: float) -> None:
    """An entry is dropped, or divided by what share of them stays."""
    model = micro_model(seq_len=3)
    wrappers = list(model.dest_wrappers)
    generator = t.Generator().manual_seed(0)
    with train_mask_mode(model), mask_fn_mode(model, None, dropout, generator):
        for wrapper in wrappers:
            wrapper.mask.data.fill_(0.6)
        drawn = t.cat(
            [w.mask_weights(1).detach().flatten() for w in wrappers for _ in range(50)]
        )
    kept = drawn[drawn != 0]
    t.testing.assert_close(kept, t.full_like(kept, 0.6 / (1 - dropout)))
    assert float(drawn.mean()) == pytest.approx(0.6, rel=0.1)
