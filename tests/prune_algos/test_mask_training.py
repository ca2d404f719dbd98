"""Subnetwork probing, circuit probing, Edge Pruning, Matryoshka attribution."""

from __future__ import annotations

import math
import sys
from typing import Any, get_args

import pytest
import torch as t

from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import ConfigError, GraphError, TrainingError
from auto_circuit.gates import hard_concrete_expected_l0, sample_hard_concrete
from auto_circuit.prune_algos.circuit_probing import circuit_probing_prune_scores
from auto_circuit.prune_algos.edge_pruning import expected_gate, train_edge_pruning
from auto_circuit.prune_algos.mask_training import (
    circuit_outputs,
    training_batches,
    training_steps,
)
from auto_circuit.prune_algos.matryoshka import (
    soft_top_k,
    soft_top_k_gradient,
    train_matryoshka,
)
from auto_circuit.prune_algos.objectives import (
    FaithfulnessTarget,
    answer_loss,
    faithfulness_loss,
)
from auto_circuit.prune_algos.subnetwork_probing import (
    INIT_LOGIT,
    subnetwork_probing_prune_scores,
    train_subnetwork,
)
from auto_circuit.types import AblationType
from auto_circuit.utils.graph_utils import patchable_model, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_loader, micro_model
from tests.models import gpt2, state_snapshot
from tests.test_prune import token_loader

EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}


def model() -> PatchableModel:
    return patchable_model(gpt2(), True, "last_seq", separate_qkv=True)


# --------------------------------------------------------------------------- subnetworks


@pytest.mark.parametrize("side,open_mask", [("corrupt", 1.0), ("clean", 0.0)])
def test_open_gates_let_the_clean_signal_in(side: Any, open_mask: float) -> None:
    """In auto-circuit's edge direction none came in, whatever the gates were."""
    graph = model()
    batches = training_batches(graph, token_loader(), AblationType.RESAMPLE, side)
    set_all_masks(graph, open_mask)
    with training_steps(graph, batches, len(batches)) as steps:
        for _, batch in steps:
            with t.no_grad():
                outputs = circuit_outputs(graph, batch)
            t.testing.assert_close(outputs, batch.clean_outputs, **EXACT)
    set_all_masks(graph, 0.0)


@pytest.mark.parametrize("tree", [True, False])
def test_a_training_begins_at_the_model_if_gates_are_open(tree: bool) -> None:
    """And at the corrupt prompts' outputs, if they are shut; in both directions."""
    graph, loader = model(), token_loader()
    first = {}
    for init_val in (-30.0, 30.0):
        training = train_subnetwork(
            graph, loader, epochs=1, init_val=init_val, tree_optimisation=tree
        )
        first[init_val] = training.steps[0].faithfulness
    batch, *_ = training_batches(graph, loader, AblationType.RESAMPLE, "corrupt")
    with t.no_grad():
        corrupt = graph.sliced(batch.inputs, **batch.kwargs)
    shut = faithfulness_loss("kl_div", corrupt, batch.batch, batch.clean_outputs)
    assert first[-30.0] == pytest.approx(0, abs=1e-6)
    assert first[30.0] == pytest.approx(float(shut), rel=1e-3) and shut > 1e-4


@pytest.mark.parametrize("tree", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_circuit_of_the_right_size_is_learned(tree: bool) -> None:
    graph = model()
    training = train_subnetwork(
        graph,
        token_loader(5, 5),
        epochs=60,
        circuit_size=20,
        regularize_lambda=1,
        init_val=-1.6,
        tree_optimisation=tree,
    )
    first, last = training.steps[0], training.steps[-1]
    assert first.n_edges > 0.9 * graph.n_edges
    assert last.n_edges < 0.5 * graph.n_edges
    assert last.loss < first.loss
    assert last.loss == pytest.approx(last.faithfulness + last.penalty, rel=1e-4)
    assert min(float(s.min()) for s in training.prune_scores.values()) == 0.0


def test_the_penalty_is_the_expected_number_of_edges() -> None:
    graph = model()
    loader = token_loader()
    training = train_subnetwork(
        graph, loader, epochs=1, regularize_lambda=2, init_val=0.0
    )
    # P(gate > 0) at logit 0: sigmoid(-2/3 log(0.1 / 1.1)).
    share = 1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1)))
    assert training.steps[0].n_edges == pytest.approx(share * graph.n_edges, rel=1e-5)
    assert training.steps[0].penalty == pytest.approx(2 * share, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tree", [True, False])
def test_avoided_edges_score_lower(tree: bool) -> None:
    graph = model()
    avoided = [edge for edge in graph.edges if edge.src.name == "Resid Start"]
    means = []
    for weight in (0.0, 50.0):
        scores = subnetwork_probing_prune_scores(
            graph,
            token_loader(),
            None,
            epochs=25,
            regularize_lambda=0.1,
            init_val=0.0,
            tree_optimisation=tree,
            avoid_edges=avoided,
            avoid_lambda=weight,
        )
        mean = sum(float(s.mean()) for s in scores.values()) / len(scores)
        ours = sum(float(edge.prune_score(scores)) for edge in avoided) / len(avoided)
        means.append(ours - mean)
    assert means[1] < means[0] - 0.2


@pytest.mark.slow
def test_validation_patience_and_seeds() -> None:
    graph, loader = model(), token_loader()
    training = train_subnetwork(graph, loader, epochs=40, validation_dataloader=loader)
    measured = [step.validation for step in training.steps if step.validation is not None]
    assert len(measured) == 20
    stopped = train_subnetwork(
        graph, loader, epochs=40, patience=1, learning_rate=1e-9, regularize_lambda=0
    )
    assert len(stopped.steps) < 40 * len(loader)
    one, same, other = (
        subnetwork_probing_prune_scores(graph, loader, None, epochs=2, seed=seed)
        for seed in (0, 0, 1)
    )
    assert all(t.equal(one[name], same[name]) for name in one)
    assert not all(t.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_the_allowed_size_falls() -> None:
    """Without a warm-up a strong penalty shuts nearly all gates, wanted or not."""
    graph = model()
    sizes = {}
    for warmup in (0.0, 0.8):
        steps = train_subnetwork(
            graph,
            token_loader(),
            epochs=30,
            circuit_size=20,
            init_val=-INIT_LOGIT,
            tree_optimisation=True,
            learning_rate=0.3,
            size_warmup=warmup,
        ).steps
        sizes[warmup] = [step.n_edges for step in steps]
    assert sizes[0.8][30] > 1.5 * sizes[0.0][30]
    assert sizes[0.8][-1] < 25


def test_circuit_probing_ranks_by_the_smallest_circuit() -> None:
    graph = model()
    scores = circuit_probing_prune_scores(
        graph, token_loader(), None, epochs=3, circuit_sizes=(10, 40)
    )
    values = t.cat([score.flatten() for score in scores.values()])
    assert int((values == 2).sum()) == 10
    assert int((values == 1).sum()) >= 30  # ties are in, and the first 10 may be others
    assert set(values.tolist()) == {0.0, 1.0, 2.0}


# -------------------------------------------------------------------------- Edge Pruning


@pytest.mark.slow
def test_edge_pruning_meets_its_target() -> None:
    graph = model()
    training = train_edge_pruning(
        graph,
        token_loader(),
        target_sparsity=0.9,
        n_steps=250,
        learning_rate=0.3,
        warmup_share=0.5,
    )
    sparsity = 1 - training.steps[-1].n_edges / graph.n_edges
    assert sparsity == pytest.approx(0.9, abs=0.005)


# ---------------------------------------------------------------------------- Matryoshka


@pytest.mark.parametrize("size", [1, 7, 50, 99])
def test_soft_top_k(size: int) -> None:
    scores = t.randn(100, generator=t.Generator().manual_seed(0), dtype=t.float64)
    shares = soft_top_k(scores, size, 0.5)
    assert float(shares.sum()) == pytest.approx(size, rel=1e-6)
    assert t.equal(shares.argsort(), scores.argsort())
    weights = t.randn(100, generator=t.Generator().manual_seed(1), dtype=t.float64)
    grad = soft_top_k_gradient(shares, weights, 0.5)
    for edge in (0, 17):
        step = t.zeros_like(scores)
        step[edge] = 1e-5
        ahead, behind = (soft_top_k(scores + s * step, size, 0.5) for s in (1, -1))
        difference = ((ahead - behind) @ weights) / 2e-5
        assert float(grad[edge]) == pytest.approx(float(difference), abs=1e-6)


def test_matryoshka_learns() -> None:
    graph = model()
    training = train_matryoshka(graph, token_loader(), n_steps=60)
    losses = [step.loss for step in training.steps]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert len({step.n_edges for step in training.steps}) > 20


def test_a_circuit_below_the_allowed_size_costs_nothing() -> None:
    graph, loader = micro_model(), micro_loader([0.1])
    for size, costs in ((12, False), (3, True)):
        training = train_subnetwork(graph, loader, epochs=1, circuit_size=size)
        (step,) = training.steps
        assert 3 < step.n_edges < 12 and (step.penalty > 0) == costs
        assert step.penalty >= 0


def test_edge_prunings_multipliers_climb() -> None:
    """They raise the loss as long as the target is not met: there are too many edges."""
    training = train_edge_pruning(
        *(micro_model(), micro_loader([0.1])),
        target_sparsity=0.9,
        n_steps=6,
        learning_rate=1e-3,
        multiplier_learning_rate=1.0,
    )
    penalties = [step.penalty for step in training.steps]
    assert penalties[0] == 0.0
    assert penalties == sorted(penalties) and penalties[-1] > penalties[1] > 0


@pytest.mark.slow
def test_half_precision_counts_its_edges_exactly() -> None:
    """A sum of bfloat16 numbers has three digits; a sparsity needs more."""
    graph = patchable_model(gpt2().bfloat16(), True, "last_seq", separate_qkv=True)
    loader = token_loader()
    probing = train_subnetwork(graph, loader, epochs=1, regularize_lambda=0, init_val=0.0)
    share = float(hard_concrete_expected_l0(t.zeros(())))
    assert probing.steps[0].n_edges == pytest.approx(share * graph.n_edges, rel=1e-5)
    pruning = train_edge_pruning(
        graph,
        loader,
        target_sparsity=0.9,
        n_steps=300,
        multiplier_learning_rate=20,
        warmup_share=0.5,
        warmup="geometric",
    )
    sparsity = 1 - pruning.steps[-1].n_edges / graph.n_edges
    assert sparsity == pytest.approx(0.9, abs=0.005)


def test_the_expected_gate_is_the_mean_of_samples() -> None:
    generator = t.Generator().manual_seed(0)
    logits = t.tensor([-4.0, -1.0, 0.0, 0.5, 3.0])
    samples = sample_hard_concrete(logits, 100_000, generator=generator)
    t.testing.assert_close(expected_gate(logits), samples.mean(0), atol=4e-3, rtol=0)


def test_a_warm_start_from_another_graph() -> None:
    with pytest.raises(GraphError, match="The scores name .*, which is no destination"):
        train_subnetwork(
            model(), token_loader(), warm_start=micro_model().new_prune_scores()
        )


# ------------------------------------------------------------------- losses and bad input


def test_faithfulness_losses() -> None:
    (batch,) = token_loader(3, 3)
    clean = t.randn(3, 40, generator=t.Generator().manual_seed(0))
    assert float(faithfulness_loss("kl_div", clean, batch, clean)) == pytest.approx(
        0, abs=1e-6
    )
    assert float(faithfulness_loss("logit_diff_percent", clean, batch, clean)) == 0
    halved = faithfulness_loss("logit_diff_percent", clean / 2, batch, clean)
    assert float(halved) == pytest.approx(50)
    outputs = clean.clone().requires_grad_()
    loss = faithfulness_loss("correct_percent", outputs, batch, clean)
    loss.backward()
    assert outputs.grad is not None
    assert -1 < loss.item() < 0
    assert (outputs.grad[:, 1] < 0).all()  # a higher answer lowers the loss
    # The answer is word 1 of 40: the squared error to 1 there, and to 0 elsewhere.
    error = clean.square().sum() + (1 - 2 * clean[:, 1]).sum()
    assert float(faithfulness_loss("mse", clean, batch, clean)) == pytest.approx(
        float(error / clean.numel())
    )
    best = answer_loss(clean, batch, "logit", "max_diff")
    assert float(best) == pytest.approx(float((clean[:, 2] - clean[:, 1]).mean()))


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"circuit_size": 0}, ConfigError, "`circuit_size` is 0; expected at least 1"),
        (
            {"circuit_size": 10**6},
            ConfigError,
            "`circuit_size` is 1000000; .* at most 110",
        ),
        ({"epochs": 0}, ConfigError, "`epochs` is 0"),
        ({"learning_rate": 0}, ConfigError, "`learning_rate` is 0"),
        ({"ablation_type": AblationType.ZERO}, ConfigError, "no clean activations"),
        (
            {"size_warmup": 1.5},
            ConfigError,
            "`size_warmup` is 1.5; .*at least 0 and at most 1",
        ),
        ({"avoid_edges": list(micro_model().edges)[:1]}, GraphError, "no edge"),
        ({"regularize_lambda": math.inf}, ConfigError, "`regularize_lambda` is inf"),
        ({"learning_rate": math.inf}, ConfigError, "`learning_rate` is inf"),
        ({"learning_rate": math.nan}, ConfigError, "`learning_rate` is nan"),
        ({"patience": 0}, ConfigError, "`patience` is 0; expected at least 1"),
        (
            {"dropout_p": 1.5},
            ConfigError,
            "`dropout_p` is 1.5; .*at least 0 and at most 1",
        ),
    ],
)
def test_bad_options(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    graph = model()
    before = state_snapshot(graph)
    with pytest.raises(error, match=message):
        train_subnetwork(graph, token_loader(), **options)
    assert state_snapshot(graph) == before


def test_bad_options_of_the_others() -> None:
    graph, loader = model(), token_loader()
    with pytest.raises(ConfigError, match='"true_size" needs true edges'):
        circuit_probing_prune_scores(graph, loader, None)
    with pytest.raises(ConfigError, match="expected different sizes"):
        circuit_probing_prune_scores(graph, loader, None, circuit_sizes=(5, 5))
    with pytest.raises(ConfigError, match="`target_sparsity` is 1.5"):
        train_edge_pruning(graph, loader, target_sparsity=1.5)
    with pytest.raises(ConfigError, match="`n_steps` is 0"):
        train_matryoshka(graph, loader, n_steps=0)
    with pytest.raises(ConfigError, match="`circuit_size` is 0; expected at least 1"):
        circuit_probing_prune_scores(graph, loader, None, circuit_sizes=(0, 5))
    for train in (train_edge_pruning, train_matryoshka):
        with pytest.raises(ConfigError, match="`learning_rate` is -1"):
            train(graph, loader, learning_rate=-1.0)


@pytest.mark.parametrize("train", [train_edge_pruning, train_matryoshka])
def test_a_training_that_diverges_stops(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = model()
    before = state_snapshot(graph)
    n_calls = 0

    def diverging(*args: Any) -> t.Tensor:
        nonlocal n_calls
        n_calls += 1
        return circuit_outputs(*args) * (math.nan if n_calls == 3 else 1.0)

    monkeypatch.setattr(
        sys.modules[circuit_outputs.__module__], "circuit_outputs", diverging
    )
    with pytest.raises(
        TrainingError, match="is nan at step 2: .*Lower the learning rate"
    ):
        train(graph, token_loader(), n_steps=10)
    assert state_snapshot(graph) == before


@pytest.mark.parametrize("tree", [True, False])
def test_every_target_trains_and_is_what_is_validated(tree: bool) -> None:
    """auto-circuit validated all of them by the logit difference of log-probabilities."""
    graph, loader = model(), token_loader(4, 4)
    targets = get_args(FaithfulnessTarget)
    found = {}
    for target in targets:
        (step,) = train_subnetwork(
            graph,
            loader,
            epochs=1,
            # The same outputs for each target: no noise, and no step before.
            mask_fn="sigmoid",
            learning_rate=1e-9,
            init_val=0.5,
            tree_optimisation=tree,
            faithfulness_target=target,
            validation_dataloader=loader,
        ).steps
        assert step.validation == pytest.approx(step.faithfulness, rel=1e-4)
        found[target] = step.validation
    assert len(set(found.values())) == len(targets)


def test_losses_of_several_answers_and_of_positions() -> None:
    """By hand: the best of several answers of each prompt, and at each position."""
    tokens = t.zeros(2, 1, dtype=t.long)

    def batch(answers: Any, wrong_answers: Any) -> PromptPairBatch:
        prompts = tokens[: len(answers)]
        return PromptPairBatch(0, 0, prompts, prompts, answers, wrong_answers)

    several = batch(
        [t.tensor([1, 2]), t.tensor([3])], [t.tensor([0]), t.tensor([4, 0, 1])]
    )
    outputs = t.tensor([[0.0, 1.0, 5.0, 2.0, 3.0], [1.0, 7.0, 0.0, 4.0, 6.0]])
    # 5 - 0 and 4 - 7; the best others of all are 3 and 7.
    assert float(answer_loss(outputs, several, "logit", "max_diff")) == -1.0
    margins = t.tensor([5.0 - 3.0, 4.0 - 7.0])
    loss = faithfulness_loss("correct_percent", outputs, several, outputs)
    t.testing.assert_close(loss, -t.sigmoid(margins).mean())

    by_position = batch(t.tensor([[[2], [1]]]), t.tensor([[[0], [4]]]))
    outputs = outputs.unsqueeze(0)
    # 5 - 0 and 7 - 6.
    assert float(answer_loss(outputs, by_position, "logit", "max_diff")) == -3.0
    margins = t.tensor([5.0 - 3.0, 7.0 - 6.0])
    loss = faithfulness_loss("correct_percent", outputs, by_position, outputs)
    t.testing.assert_close(loss, -t.sigmoid(margins).mean())


@pytest.mark.parametrize(
    "train", [train_edge_pruning, train_matryoshka, train_subnetwork]
)
def test_a_training_that_diverges_in_its_last_step_gives_no_scores(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(optimizer: t.optim.Adam) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(math.nan)

    monkeypatch.setattr(t.optim.Adam, "step", explode)
    steps = {"epochs": 1} if train is train_subnetwork else {"n_steps": 1}
    with pytest.raises(TrainingError, match="After the last step .* not finite"):
        train(model(), token_loader(2, 2), **steps)


def test_matryoshka_in_half_precision_tells_edges_apart() -> None:
    bridge = gpt2().to(t.bfloat16)
    graph = patchable_model(bridge, True, "last_seq", separate_qkv=True)
    scores = train_matryoshka(graph, token_loader(4, 2), n_steps=20).prune_scores
    values = t.cat([score.flatten() for score in scores.values()])
    assert values.dtype == t.float32
    assert len(values.unique()) > 0.95 * graph.n_edges
