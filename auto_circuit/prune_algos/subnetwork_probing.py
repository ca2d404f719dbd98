"""Subnetwork probing (Cao et al. 2021, arXiv 2104.03514), on edges.

Every edge has a random gate, hard concrete with a trained logit. The loss is how unlike the
model the circuit of open gates is, plus a penalty on the expected number of open gates (Louizos
et al. 2018, arXiv 1712.01312, equation 12).

Cost: per epoch and batch one forward and one backward pass (F + Bk); each batch costs two
forward passes (2 F) once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, TypeVar

import torch as t
from torch import Tensor
from torch.nn import Parameter

from auto_circuit.checks import (
    check_choice,
    check_count,
    check_number,
    check_seed,
    checked,
    seeded_generator,
)
from auto_circuit.data import PromptDataLoader
from auto_circuit.errors import ConfigError
from auto_circuit.gates import hard_concrete_expected_l0
from auto_circuit.prune_algos.algo_config import (
    AlgoConfig,
    bound,
    makes_config,
    takes_options,
)
from auto_circuit.prune_algos.integrated_gradients import (
    INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
)
from auto_circuit.prune_algos.mask_training import (
    Losses,
    MaskTraining,
    PatchedEdges,
    TrainingBatch,
    TrainingStep,
    batch_faithfulness,
    circuit_logits,
    first_logits,
    mask_optimizer,
    prompts_at_once,
    rate_decay,
    scores_from_masks,
    set_circuit_logits,
    take_step,
    training_batches,
    training_steps,
)
from auto_circuit.prune_algos.objectives import (
    FaithfulnessTarget,
    check_objective,
)
from auto_circuit.prune_algos.prune_algo import MSE_USE, AlgoNotes, PruneAlgo
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AblationType, Edge, MaskFn, PruneScores
from auto_circuit.utils.ablation_activations import Side
from auto_circuit.utils.graph_utils import mask_fn_mode, train_mask_mode
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state, own_computation

C = TypeVar("C", bound="ProbingConfig")

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
@dataclass(frozen=True, eq=False, kw_only=True)
class ProbingConfig(AlgoConfig):
    """How subnetwork and circuit probing train their gates.

    learning_rate: of the gates (Adam). epochs: how often all prompts are seen.
    regularize_lambda: weight of the penalty, (expected edges - size) / size, or expected
        edges / all edges where no size is given.
    mask_fn: what makes a mask of a logit. dropout_p: the share of the masks' entries that is
        dropped in each pass.
    first_logit: the logit that all gates begin with; negative: the circuit begins nearly
        empty. (`init_val` of the functions with the published parameters is minus this.)
    tree_optimisation: True: clean prompts, all edges but the circuit's are patched.
        False: corrupt prompts, the circuit's edges are patched with clean activations.
    avoid_edges, avoid_lambda: lowers the mean openness of these edges, with this weight.
    faithfulness_target: see `objectives.faithfulness_loss`.
    ablation_type: what is patched in.
    patience: stop after so many epochs without a lower mean loss; None: never.
    seed: of the gates' noise.
    size_warmup: the share of the steps in which the allowed size falls from all edges to
        the circuit's, by the same factor each step. 0: it is the circuit's at once,
        and a strong penalty then shuts all gates before they know which matter.
    warm_start: an algorithm (or its scores) whose ranking the gates begin with, between
        plus and minus `first_logit`: see `warm_start_logits`.
    last_rate_share: the learning rate falls linearly to this share of it, so that the
        ranking of edges that are equally good settles. 1: it stays as it is.
    """

    learning_rate: int | float = 0.1
    epochs: int = 20
    regularize_lambda: int | float = 10
    mask_fn: MaskFn = "hard_concrete"
    dropout_p: int | float = 0.0
    first_logit: int | float = -INIT_LOGIT
    tree_optimisation: bool = False
    avoid_edges: Collection[Edge] | None = ()
    avoid_lambda: int | float = 1.0
    faithfulness_target: FaithfulnessTarget = "kl_div"
    ablation_type: AblationType = AblationType.RESAMPLE
    patience: int | None = None
    seed: int = 0
    size_warmup: int | float = 0.0
    warm_start: PruneAlgo | PruneScores | None = None
    last_rate_share: int | float = 1.0

    def __post_init__(self) -> None:
        # A set has no order, which descriptions need.
        avoided = tuple(sorted(self.avoid_edges or (), key=repr))
        object.__setattr__(self, "avoid_edges", avoided)
        check_choice("mask_fn", self.mask_fn, Literal["hard_concrete", "sigmoid"])
        check_count("epochs", self.epochs)
        check_number("learning_rate", self.learning_rate, above=0)
        for name in ("regularize_lambda", "avoid_lambda", "first_logit"):
            check_number(name, getattr(self, name))
        for name in ("size_warmup", "last_rate_share", "dropout_p"):
            check_number(name, getattr(self, name), 0, 1)
        if self.patience is not None:
            check_count("patience", self.patience)
        check_seed(self.seed)
        if not self.tree_optimisation and self.ablation_type in WITHOUT_CLEAN_SIGNAL:
            raise ConfigError(
                f"The ablation {self.ablation_type} patches no clean activations into the "
                "corrupt prompts, so no circuit could do the task. Use "
                "tree_optimisation=True, or AblationType.RESAMPLE."
            )

    @property
    def patched(self) -> PatchedEdges:
        """What the patched edges are."""
        return "others" if self.tree_optimisation else "circuit"

    @property
    def input_side(self) -> Side:
        """The prompts that the model runs on."""
        return "clean" if self.tree_optimisation else "corrupt"

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """By the published names: `init_val` for `first_logit`, with the other sign."""
        return _by_published_names(super().option_defaults())

    @classmethod
    def from_options(cls: type[C], **options: Any) -> C:
        """A config from options by their published names, or by its own."""
        if "init_val" in options:
            init_val = options.pop("init_val")
            check_number("init_val", init_val)
            options["first_logit"] = -init_val
        return cls(**options)

    def options(self) -> dict[str, Any]:
        """By their published names."""
        return _by_published_names(super().options())


def _by_published_names(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "init_val" if name == "first_logit" else name: (
            -value if name == "first_logit" else value
        )
        for name, value in options.items()
    }


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class SubnetworkProbingConfig(ProbingConfig):
    """The options of subnetwork probing.

    circuit_size: penalise edges only above this number; None: penalise all.
    The others: see `ProbingConfig`.
    """

    circuit_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.circuit_size is not None:
            check_count("circuit_size", self.circuit_size)


@makes_config(SubnetworkProbingConfig)
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
    size_warmup: int | float = 0.0,
    warm_start: PruneAlgo | PruneScores | None = None,
    last_rate_share: int | float = 1.0,
) -> PruneScores:
    """Each edge's trained logit, shifted so that the lowest is 0. See `train_subnetwork`.

    The higher, the surer the edge is in the circuit; the unit is that of a logit.
    init_val: minus the gates' first logit; positive: they start nearly closed. The other
        options: see `SubnetworkProbingConfig`.
    show_train_graph: show the figure of the training (`mask_training_plot`), in a notebook
        or the browser; `train_subnetwork` returns what it draws.
    """
    config = SubnetworkProbingConfig.from_options(
        learning_rate=learning_rate,
        epochs=epochs,
        regularize_lambda=regularize_lambda,
        mask_fn=mask_fn,
        dropout_p=dropout_p,
        init_val=init_val,
        circuit_size=circuit_size,
        tree_optimisation=tree_optimisation,
        avoid_edges=avoid_edges,
        avoid_lambda=avoid_lambda,
        faithfulness_target=faithfulness_target,
        ablation_type=ablation_type,
        patience=patience,
        seed=seed,
        size_warmup=size_warmup,
        warm_start=warm_start,
        last_rate_share=last_rate_share,
    )
    training = train_subnetwork(
        model, dataloader, config, validation_dataloader=validation_dataloader
    )
    if show_train_graph:
        show_training(training, config)
    return training.prune_scores


def show_training(training: MaskTraining, config: SubnetworkProbingConfig) -> None:
    """Show the figure of a training, in a notebook or the browser."""
    # Imported when asked for: it takes plotly.
    from auto_circuit.prune_algos.mask_training_plot import mask_training_fig

    title = "Subnetwork Probing"
    if config.circuit_size is not None:
        title += f", {config.circuit_size} Edges"
    mask_training_fig(training.steps, title).show()


@takes_options(SubnetworkProbingConfig)
@checked
@in_own_state(grad=True)
def train_subnetwork(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    config: SubnetworkProbingConfig,
    validation_dataloader: PromptDataLoader | None = None,
) -> MaskTraining:
    """Train a gate for each edge; the scores and the record of the training.

    config: see `SubnetworkProbingConfig`; its options may be given one by one too.
    validation_dataloader: prompts on which the faithfulness loss is measured now and then.

    Raises ConfigError for options that make no sense, GraphError for edges to avoid that
    do not exist, TrainingError if the loss becomes NaN.

    The penalty is on the expected number of edges; in edge direction clean activations are
    patched in; Adam's memory is short (see `mask_optimizer`).
    """
    check_circuit_size(model, config.circuit_size)
    for loader in (dataloader, validation_dataloader):
        check_objective(loader or (), config.faithfulness_target)
    avoided = model.circuit_prune_scores(edges=config.avoid_edges or (), bool=True)
    objective = _Objective(model, config, list(avoided.values()))
    loaders = [dataloader, validation_dataloader]
    n_at_once = objective.prompts_at_once([o for o in loaders if o is not None])
    first = first_logits(
        model, dataloader, config.warm_start, config.first_logit, abs(config.first_logit)
    )
    batches = objective.training_batches(dataloader, n_at_once)
    validation = (
        []
        if validation_dataloader is None
        else objective.training_batches(validation_dataloader, n_at_once)
    )
    device = next(model.wrapped_model.parameters()).device
    generator = seeded_generator(config.seed, device)
    n_steps = config.epochs * len(batches)
    steps: list[TrainingStep] = []
    validations: dict[int, float] = {}

    def validate(n_done: int) -> None:
        epoch = n_done // len(batches)
        if epoch % math.ceil(config.epochs / N_VALIDATIONS) == 0:
            validations[n_done - 1] = objective.validation(validation)

    with (
        train_mask_mode(model, notes=False) as masks,
        mask_fn_mode(model, config.mask_fn, float(config.dropout_p), generator),
        training_steps(
            model, batches, n_steps, validate if validation else None
        ) as all_steps,
    ):
        set_circuit_logits(masks, first, config.patched)
        optimizer = mask_optimizer(masks, config.learning_rate)
        decay = rate_decay(optimizer, config.last_rate_share, n_steps)
        for step, batch in all_steps:
            losses = objective.losses(batch, masks, (step + 1) / n_steps)
            steps.append(take_step(step, losses, config.learning_rate, [optimizer]))
            decay.step()
            is_last = (step + 1) % len(batches) == 0
            if is_last and _is_over(steps, len(batches), config.patience):
                break
        scores = scores_from_masks(masks, config.patched, config.learning_rate)
    return MaskTraining(
        scores, tuple(replace(s, validation=validations.get(s.step)) for s in steps)
    )


@checked
def check_circuit_size(model: PatchableModel, circuit_size: int | None) -> None:
    """Raise ConfigError for a circuit of no edges or of more than the graph has."""
    if circuit_size is not None:
        check_count("circuit_size", circuit_size, at_most=model.n_edges)


@dataclass(frozen=True, eq=False)
class _Objective:
    """What a training lowers. avoided: for each mask, which edges are to be avoided."""

    model: PatchableModel
    config: SubnetworkProbingConfig
    avoided: Sequence[Tensor]

    def prompts_at_once(self, loaders: Sequence[PromptDataLoader]) -> int | None:
        config, device = self.config, next(self.model.wrapped_model.parameters()).device

        def try_out(batch: TrainingBatch) -> None:
            noise = seeded_generator(config.seed, device)
            with (
                train_mask_mode(self.model, notes=False) as masks,
                mask_fn_mode(self.model, config.mask_fn, float(config.dropout_p), noise),
                batch.patches(self.model),
            ):
                losses = self.losses(batch, masks, 1.0)
                (losses.faithfulness + losses.penalty).backward()

        rest = config.ablation_type, config.input_side
        return prompts_at_once(self.model, loaders, *rest, try_out)

    def training_batches(
        self, dataloader: PromptDataLoader, n_at_once: int | None
    ) -> list[TrainingBatch]:
        rest = self.config.ablation_type, self.config.input_side
        return training_batches(self.model, dataloader, *rest, None, n_at_once)

    def faithfulness(self, batch: TrainingBatch) -> Tensor:
        return batch_faithfulness(self.model, batch, self.config.faithfulness_target)

    def losses(
        self, batch: TrainingBatch, masks: Mapping[str, Parameter], progress: float
    ) -> Losses:
        """progress: the share of the training that is over with this step."""
        config = self.config
        faithfulness = self.faithfulness(batch)
        gates = list(circuit_logits(masks, config.patched).values())
        n_edges = _expected_edges(gates, config.mask_fn)
        penalty = config.regularize_lambda * _size_penalty(
            n_edges, self._allowed_edges(progress), self.model.n_edges
        )
        if config.avoid_edges:
            openness = _openness(gates, self.avoided, config.mask_fn)
            penalty = penalty + config.avoid_lambda * openness
        return Losses(faithfulness, penalty, n_edges)

    def _allowed_edges(self, progress: float) -> int | float | None:
        """The number of edges that costs nothing, at this share of the training."""
        size, size_warmup = self.config.circuit_size, self.config.size_warmup
        if size is None or progress >= size_warmup:
            return size
        n_all = self.model.n_edges
        return n_all * (size / n_all) ** (progress / size_warmup)

    def validation(self, batches: Sequence[TrainingBatch]) -> float:
        """The mean faithfulness loss of the circuit as it is."""
        losses = []
        for batch in batches:
            with (
                own_computation(grad=False),
                batch.patches(self.model),
            ):
                losses.append(float(self.faithfulness(batch)))
        return fmean(losses)


def _expected_edges(gates: Sequence[Tensor], mask_fn: MaskFn) -> Tensor:
    return t.stack([_openness_of(gate, mask_fn).sum() for gate in gates]).sum()


def _openness_of(gate: Tensor, mask_fn: MaskFn) -> Tensor:
    return (
        hard_concrete_expected_l0(gate) if mask_fn == "hard_concrete" else t.sigmoid(gate)
    )


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


_NOTES = AlgoNotes(
    idea="Gates trained so that the circuit does as the model, at a price for each open gate",
    paper="Cao et al. 2021, arXiv 2104.03514",
    cost="epochs x (F + B), and 2 F",
    use="A circuit in the edge direction: the edges that bring the answer about alone.",
)
_TREE_NOTES = replace(
    _NOTES,
    use="A circuit in the tree direction: the edges that suffice, with a long training.",
)
SUBNETWORK_EDGE_PROBING_PRUNE_ALGO = PruneAlgo(
    key="Subnetwork Edge Probing",
    name="Subnetwork Edge Probing",
    _short_name="SEP",
    func=bound(
        subnetwork_probing_prune_scores,
        SubnetworkProbingConfig(epochs=200, regularize_lambda=0.5),
    ),
    notes=_NOTES,
)
SUBNETWORK_TREE_PROBING_PRUNE_ALGO = PruneAlgo(
    key="Subnetwork Tree Probing",
    name="Subnetwork Tree Probing",
    _short_name="STP",
    func=bound(
        subnetwork_probing_prune_scores,
        SubnetworkProbingConfig(
            epochs=2000, regularize_lambda=0.5, tree_optimisation=True
        ),
    ),
    notes=_TREE_NOTES,
)


def _squared_error_algo(
    key: str, short_name: str, regularize_lambda: float, tree_optimisation: bool
) -> PruneAlgo:
    # auto-circuit's gates start nearly shut. A squared error (of proportions, say)
    # is small beside the penalty, which then shuts all before any is needed.
    config = SubnetworkProbingConfig(
        epochs=200,
        regularize_lambda=regularize_lambda,
        first_logit=INIT_LOGIT,
        tree_optimisation=tree_optimisation,
        faithfulness_target="mse",
    )
    return PruneAlgo(
        key=key,
        name=key,
        _short_name=short_name,
        func=bound(subnetwork_probing_prune_scores, config),
        notes=replace(_NOTES, idea="Gates trained for the squared error", use=MSE_USE),
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
    func=bound(
        subnetwork_probing_prune_scores,
        SubnetworkProbingConfig(
            learning_rate=0.2,
            epochs=16,
            regularize_lambda=20,
            first_logit=-2.5,
            circuit_size=30,
            size_warmup=0.4,
            last_rate_share=0.3,
            tree_optimisation=True,
            faithfulness_target="logit_diff",
            warm_start=INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO,
        ),
    ),
    needs_wrong_answers=True,
    notes=replace(
        _TREE_NOTES,
        use="The same in 16 epochs from EAP-IG's ranking on: small models, first looks.",
    ),
)
"""For small models and first looks: few steps, from EAP-IG's ranking on, and trained for
what the metrics of logit differences measure, with a circuit of 30 edges."""
