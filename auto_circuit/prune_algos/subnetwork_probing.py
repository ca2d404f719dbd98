"""Subnetwork probing (Cao et al. 2021, arXiv 2104.03514), on edges.

Every edge has a random gate, hard concrete with a trained logit. The loss is how unlike the
model the circuit of open gates is, plus a penalty on the expected number of open gates (Louizos
et al. 2018, arXiv 1712.01312, equation 12).

Cost: per epoch and batch one forward and one backward pass (F + Bk); each batch costs two
forward passes (2 F) once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Literal

import torch as t
from torch import Tensor

from auto_circuit.checks import (
    check_choice,
    check_count,
    check_number,
    checked,
    seeded_generator,
)
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import ConfigError
from auto_circuit.gates import hard_concrete_expected_l0
from auto_circuit.precision import at_least_float32
from auto_circuit.prune_algos.integrated_gradients import (
    INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
)
from auto_circuit.prune_algos.mask_training import (
    MaskTraining,
    TrainingBatch,
    TrainingStep,
    check_finite,
    circuit_outputs,
    mask_optimizer,
    rate_decay,
    scores_from_logits,
    training_batches,
    training_step,
    training_steps,
    warm_start_logits,
)
from auto_circuit.prune_algos.objectives import (
    FaithfulnessTarget,
    check_objective,
    faithfulness_loss,
)
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AblationType, Edge, MaskFn, PruneScores
from auto_circuit.utils.ablation_activations import Side
from auto_circuit.utils.graph_utils import (
    mask_fn_mode,
    patch_mode,
    set_all_masks,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state, own_computation

INIT_LOGIT = 1.6094379124341003
"""log(5): gates start with minus this logit. Without noise they are then 0.1 open."""
init_mask_val = INIT_LOGIT
"""auto-circuit's name of it."""
SP_FAITHFULNESS_TARGET = FaithfulnessTarget
"""auto-circuit's name of it."""
N_VALIDATIONS = 20
# These hold no clean activations: patched into corrupt prompts, they bring no signal.
WITHOUT_CLEAN_SIGNAL = (AblationType.ZERO, AblationType.TOKENWISE_MEAN_CORRUPT)


@checked
def subnetwork_probing_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    learning_rate: int | float = 0.1,
    epochs: int = 20,
    regularize_lambda: int | float = 10,
    mask_fn: MaskFn = "hard_concrete",
    dropout_p: int | float = 0.0,
    init_val: int | float = INIT_LOGIT,
    show_train_graph: bool = False,
    circuit_size: int | None = None,
    tree_optimisation: bool = False,
    avoid_edges: Collection[Edge] | None = None,
    avoid_lambda: int | float = 1.0,
    faithfulness_target: FaithfulnessTarget = "kl_div",
    validation_dataloader: PromptDataLoader | None = None,
    ablation_type: AblationType = AblationType.RESAMPLE,
    patience: int | None = None,
    seed: int = 0,
    size_warmup: float = 0.0,
    warm_start: PruneAlgo | PruneScores | None = None,
    last_rate_share: float = 1.0,
) -> PruneScores:
    """Each edge's trained logit, shifted so that the lowest is 0. See `train_subnetwork`.

    The higher, the surer the edge is in the circuit; the unit is that of a logit.
    show_train_graph: show the figure of the training (`mask_training_plot`), in a notebook
        or the browser; `train_subnetwork` returns what it draws.
    """
    training = train_subnetwork(
        model,
        dataloader,
        learning_rate,
        epochs,
        regularize_lambda,
        mask_fn,
        dropout_p,
        init_val,
        circuit_size,
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
    if show_train_graph:
        # Imported when asked for: it takes plotly.
        from auto_circuit.prune_algos.mask_training_plot import mask_training_fig

        title = "Subnetwork Probing"
        if circuit_size is not None:
            title += f", {circuit_size} Edges"
        mask_training_fig(training.steps, title).show()
    return training.prune_scores


@checked
@in_own_state(grad=True)
def train_subnetwork(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    learning_rate: int | float = 0.1,
    epochs: int = 20,
    regularize_lambda: int | float = 10,
    mask_fn: MaskFn = "hard_concrete",
    dropout_p: int | float = 0.0,
    init_val: int | float = INIT_LOGIT,
    circuit_size: int | None = None,
    tree_optimisation: bool = False,
    avoid_edges: Collection[Edge] | None = None,
    avoid_lambda: int | float = 1.0,
    faithfulness_target: FaithfulnessTarget = "kl_div",
    validation_dataloader: PromptDataLoader | None = None,
    ablation_type: AblationType = AblationType.RESAMPLE,
    patience: int | None = None,
    seed: int = 0,
    size_warmup: float = 0.0,
    warm_start: PruneAlgo | PruneScores | None = None,
    last_rate_share: float = 1.0,
) -> MaskTraining:
    """Train a gate for each edge; the scores and the record of the training.

    tree_optimisation: True: clean prompts, all edges but the circuit's are patched.
        False: corrupt prompts, the circuit's edges are patched with clean activations.
    circuit_size: penalise edges only above this number; None: penalise all.
    regularize_lambda: weight of the penalty, (expected edges - size) / size, or expected
        edges / all edges.
    init_val: minus the gates' first logit; positive: they start nearly closed.
    avoid_edges, avoid_lambda: lowers the mean openness of these edges, with this weight.
    faithfulness_target: see `objectives.faithfulness_loss`.
    validation_dataloader: prompts on which that loss is measured now and then.
    patience: stop after so many epochs without a lower mean loss; None: never.
    seed: of the gates' noise.
    size_warmup: the share of the steps in which the allowed size falls from all edges to
        `circuit_size`, by the same factor each step. 0: it is `circuit_size` at once,
        and a strong penalty then shuts all gates before they know which matter.
    warm_start: an algorithm (or its scores) whose ranking the gates begin with, between
        plus and minus `init_val`: see `warm_start_logits`.
    last_rate_share: the learning rate falls linearly to this share of it, so that the
        ranking of edges that are equally good settles. 1: it stays as it is.

    Raises ConfigError for arguments that make no sense, GraphError for edges to avoid that
    do not exist, TrainingError if the loss becomes NaN.

    Differs from auto-circuit: the ablation is a parameter, and in edge direction clean
    activations really come in; the penalty is the expected number of edges, not that of
    one more sample; Adam's memory is short (see `mask_optimizer`); size_warmup and
    warm_start are new.
    """
    check_choice("mask_fn", mask_fn, Literal["hard_concrete", "sigmoid"])
    _check(model, epochs, circuit_size, learning_rate, tree_optimisation, ablation_type)
    for name, weight in (
        ("regularize_lambda", regularize_lambda),
        ("avoid_lambda", avoid_lambda),
        ("init_val", init_val),
    ):
        check_number(name, weight)
    for name, share in (
        ("size_warmup", size_warmup),
        ("last_rate_share", last_rate_share),
        ("dropout_p", dropout_p),
    ):
        check_number(name, share, 0, 1)
    if patience is not None:
        check_count("patience", patience)
    for loader in (dataloader, validation_dataloader):
        check_objective(loader or (), faithfulness_target)
    avoided = model.circuit_prune_scores(edges=avoid_edges or (), bool=True)
    # In tree direction a mask of 1 takes the edge out: gates are masks of other sign.
    sign = -1 if tree_optimisation else 1
    side: Side = "clean" if tree_optimisation else "corrupt"
    batches = training_batches(model, dataloader, ablation_type, side)
    first_logits = (
        {}
        if warm_start is None
        else warm_start_logits(model, dataloader, warm_start, abs(init_val))
    )
    validation = (
        []
        if validation_dataloader is None
        else training_batches(model, validation_dataloader, ablation_type, side)
    )
    generator = seeded_generator(seed, next(model.wrapped_model.parameters()).device)
    steps: list[TrainingStep] = []
    validations: dict[int, float] = {}

    def after_epoch(n_steps: int) -> None:
        epoch = n_steps // len(batches)
        if epoch % math.ceil(epochs / N_VALIDATIONS) == 0:
            validations[n_steps - 1] = _validate(model, validation, faithfulness_target)

    with (
        train_mask_mode(model, notes=False) as masks,
        mask_fn_mode(model, mask_fn, float(dropout_p), generator),
        training_steps(
            model, batches, epochs * len(batches), after_epoch if validation else None
        ) as all_steps,
    ):
        set_all_masks(model, float(-sign * init_val))
        for name, logits in first_logits.items():
            masks[name].data.copy_(sign * logits)
        optimizer = mask_optimizer(masks, learning_rate)
        decay = rate_decay(optimizer, last_rate_share, epochs * len(batches))
        for step, batch in all_steps:
            outputs = circuit_outputs(model, batch)
            faithfulness = faithfulness_loss(
                faithfulness_target, outputs, batch.batch, batch.clean_outputs
            )
            # In half precision a sum over so many gates would mean little.
            gates = [at_least_float32(sign * mask) for mask in masks.values()]
            n_edges = _expected_edges(gates, mask_fn)
            progress = (step + 1) / (epochs * len(batches))
            allowed = _allowed_edges(model, circuit_size, progress, size_warmup)
            penalty = regularize_lambda * _size_penalty(n_edges, allowed, model.n_edges)
            if avoid_edges:
                penalty = penalty + avoid_lambda * _openness(
                    gates, list(avoided.values()), mask_fn
                )
            loss = faithfulness + penalty
            check_finite(loss, step, learning_rate)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            steps.append(training_step(step, loss, faithfulness, penalty, n_edges))
            if (step + 1) % len(batches) == 0 and _is_over(steps, len(batches), patience):
                break
        trained = {name: sign * mask.detach() for name, mask in masks.items()}
        scores = scores_from_logits(trained, learning_rate)
    return MaskTraining(
        scores, tuple(replace(s, validation=validations.get(s.step)) for s in steps)
    )


def _check(
    model: PatchableModel,
    epochs: int,
    circuit_size: int | None,
    learning_rate: int | float,
    tree_optimisation: bool,
    ablation_type: AblationType,
) -> None:
    check_count("epochs", epochs)
    check_number("learning_rate", learning_rate, above=0)
    check_circuit_size(model, circuit_size)
    if not tree_optimisation and ablation_type in WITHOUT_CLEAN_SIGNAL:
        raise ConfigError(
            f"The ablation {ablation_type} patches no clean activations into the corrupt "
            "prompts, so no circuit could do the task. Use tree_optimisation=True, or "
            "AblationType.RESAMPLE."
        )


@checked
def check_circuit_size(model: PatchableModel, circuit_size: int | None) -> None:
    """Raise ConfigError for a circuit of no edges or of more than the graph has."""
    if circuit_size is not None:
        check_count("circuit_size", circuit_size, at_most=model.n_edges)


def _expected_edges(gates: Sequence[Tensor], mask_fn: MaskFn) -> Tensor:
    return t.stack([_openness_of(gate, mask_fn).sum() for gate in gates]).sum()


def _openness_of(gate: Tensor, mask_fn: MaskFn) -> Tensor:
    return (
        hard_concrete_expected_l0(gate) if mask_fn == "hard_concrete" else t.sigmoid(gate)
    )


def _allowed_edges(
    model: PatchableModel, circuit_size: int | None, progress: float, size_warmup: float
) -> int | float | None:
    """The number of edges that costs nothing, at this share of the training."""
    if circuit_size is None or progress >= size_warmup:
        return circuit_size
    return model.n_edges * (circuit_size / model.n_edges) ** (progress / size_warmup)


def _size_penalty(n_edges: Tensor, allowed: int | float | None, n_all: int) -> Tensor:
    if allowed is None:
        return n_edges / n_all
    return t.relu(n_edges - allowed) / allowed


def _openness(
    gates: Sequence[Tensor], chosen: Sequence[Tensor], mask_fn: MaskFn
) -> Tensor:
    pairs = zip(gates, chosen, strict=True)
    return t.cat([_openness_of(gate, mask_fn)[edges] for gate, edges in pairs]).mean()


def _is_over(steps: Sequence[TrainingStep], epoch_len: int, patience: int | None) -> bool:
    """Was the mean loss of none of the last epochs lower than the best one before?"""
    if patience is None:
        return False
    epochs = [
        fmean(step.loss for step in steps[i : i + epoch_len])
        for i in range(0, len(steps), epoch_len)
    ]
    return len(epochs) > patience and min(epochs[-patience:]) >= min(epochs[:-patience])


def _validate(
    model: PatchableModel, batches: Sequence[TrainingBatch], target: FaithfulnessTarget
) -> float:
    losses = []
    for batch in batches:
        with own_computation(grad=False), patch_mode(model, batch.patch_src_outs):
            outputs = circuit_outputs(model, batch)
        loss = faithfulness_loss(target, outputs, batch.batch, batch.clean_outputs)
        losses.append(float(loss))
    return fmean(losses)


SUBNETWORK_EDGE_PROBING_PRUNE_ALGO = PruneAlgo(
    key="Subnetwork Edge Probing",
    name="Subnetwork Edge Probing",
    _short_name="SEP",
    func=partial(
        subnetwork_probing_prune_scores,
        learning_rate=0.1,
        epochs=200,
        regularize_lambda=0.5,
        tree_optimisation=False,
    ),
)
SUBNETWORK_TREE_PROBING_PRUNE_ALGO = PruneAlgo(
    key="Subnetwork Tree Probing",
    name="Subnetwork Tree Probing",
    _short_name="STP",
    func=partial(
        subnetwork_probing_prune_scores,
        learning_rate=0.1,
        epochs=2000,
        regularize_lambda=0.5,
        tree_optimisation=True,
    ),
)


def _squared_error_algo(
    key: str, short_name: str, regularize_lambda: float, tree_optimisation: bool
) -> PruneAlgo:
    return PruneAlgo(
        key=key,
        name=key,
        _short_name=short_name,
        func=partial(
            subnetwork_probing_prune_scores,
            learning_rate=0.1,
            epochs=200,
            regularize_lambda=regularize_lambda,
            # auto-circuit's gates start nearly shut. A squared error (of proportions, say)
            # is small beside the penalty, which then shuts all before any is needed.
            init_val=-INIT_LOGIT,
            tree_optimisation=tree_optimisation,
            faithfulness_target="mse",
        ),
    )


MSE_SUBNETWORK_TREE_PROBING_PRUNE_ALGO = _squared_error_algo(
    "MSE Subnetwork Tree Probing", "STP (MSE)", 0.5, tree_optimisation=True
)
# Not in auto-circuit. With its penalty of 0.5 an edge costs more here than it is worth.
MSE_SUBNETWORK_EDGE_PROBING_PRUNE_ALGO = _squared_error_algo(
    "MSE Subnetwork Edge Probing", "SEP (MSE)", 0.05, tree_optimisation=False
)
QUICK_SUBNETWORK_TREE_PROBING_PRUNE_ALGO = PruneAlgo(
    key="Subnetwork Tree Probing (quick)",
    name="Subnetwork Tree Probing (quick)",
    _short_name="STP quick",
    func=partial(
        subnetwork_probing_prune_scores,
        learning_rate=0.2,
        epochs=32,
        regularize_lambda=20,
        init_val=2.5,
        circuit_size=30,
        size_warmup=0.4,
        last_rate_share=0.3,
        tree_optimisation=True,
        faithfulness_target="logit_diff",
        warm_start=INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
    ),
    needs_wrong_answers=True,
)
"""For small models and first looks: few steps, from EAP-IG's ranking on, and trained for
what the metrics of logit differences measure, with a circuit of 30 edges."""
