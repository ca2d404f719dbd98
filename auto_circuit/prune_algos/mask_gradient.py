"""The gradient of the task's loss with respect to each edge's mask.

At mask 0 this is edge attribution patching (Syed et al. 2023, arXiv 2310.10348): the
first-order estimate of the effect of patching each edge, summed over positions and
dimensions of gradient times difference of activations. Averaged over masks from 0 to 1
it is integrated gradients along the path that patches all edges together (the "mask
path"), whose scores add up to the effect of patching everything.

Cost per batch: one forward pass to record, and one forward and one backward pass per
point (F + points * (F + Bk)).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from auto_circuit.checks import check_number, checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.errors import ConfigError
from auto_circuit.memory import Limit
from auto_circuit.prune_algos.algo_config import bound, makes_config
from auto_circuit.prune_algos.integration_path import PathPoints, path_shares
from auto_circuit.prune_algos.objectives import (
    COMPARE_WITH_WRONG_ANSWERS,
    AnswerConfig,
    AnswerFunction,
    GradFunction,
    check_objective,
)
from auto_circuit.prune_algos.prune_algo import MSE_USE, AlgoNotes, PruneAlgo
from auto_circuit.published_names import published_name as __getattr__  # noqa: F401
from auto_circuit.types import AblationType, Edge, PruneScores
from auto_circuit.utils.ablation_activations import (
    Side,
    SrcOuts,
    ablation_side,
)
from auto_circuit.utils.graph_utils import patch_mode, set_all_masks, train_mask_mode
from auto_circuit.utils.limited_passes import Passes, each_batch, kept_at
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class MaskGradientConfig(AnswerConfig):
    """The options of mask gradients.

    mask_val: the mask's value where the gradient is taken; 0 is edge attribution
        patching. integrated_grad_samples: instead, cut the path of masks from 1 (corrupt)
        to 0 (clean) into so many steps, and average the gradient. Give exactly one.
    ablation_type, clean_corrupt: what is patched in.
    path_points: at which masks the gradients are taken, whose plain mean counts:
        "midpoints", (k + 1/2) / N; "both_ends", k / N for k = 0 ... N, one more, which
        are auto-circuit's; others: see `PathPoints`. Only with integrated_grad_samples.
    """

    mask_val: int | float | None = None
    integrated_grad_samples: int | None = None
    ablation_type: AblationType = AblationType.RESAMPLE
    clean_corrupt: Side | None = "corrupt"
    path_points: PathPoints = "midpoints"

    def __post_init__(self) -> None:
        if (self.mask_val is None) == (self.integrated_grad_samples is None):
            raise ConfigError(
                "Give exactly one of `mask_val` (0.0 for edge attribution patching) and "
                "`integrated_grad_samples` (for integrated gradients); got "
                f"mask_val={self.mask_val}, "
                f"integrated_grad_samples={self.integrated_grad_samples}."
            )
        if self.mask_val is not None and self.path_points != "midpoints":
            check_number("mask_val", self.mask_val)
            raise ConfigError(
                f"`path_points` is {self.path_points!r}, but with `mask_val` there is no "
                "path; it goes with `integrated_grad_samples`."
            )
        self.mask_vals()

    def mask_vals(self) -> list[float]:
        """The values of all masks at which the gradient is taken."""
        if self.mask_val is not None:
            return [check_number("mask_val", self.mask_val)]
        assert self.integrated_grad_samples is not None
        shares = path_shares(self.integrated_grad_samples, self.path_points)
        return [1 - share for share in reversed(shares)]


@makes_config(MaskGradientConfig)
@checked
def mask_gradient_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    grad_function: GradFunction,
    answer_function: AnswerFunction,
    mask_val: float | None = None,
    integrated_grad_samples: int | None = None,
    ablation_type: AblationType = AblationType.RESAMPLE,
    clean_corrupt: Side | None = "corrupt",
    path_points: PathPoints = "midpoints",
    memory_limit: Limit = None,
) -> PruneScores:
    """d loss / d mask for every edge: the mean over prompts. The input is clean.

    Positive: patching the edge makes the answer worse. The unit is that of the answer
    function (logits, probabilities, ...). The options: see `MaskGradientConfig`.

    Raises ConfigError for arguments that do not go together.

    The score is the mean over prompts and points; N samples cost N passes (with
    path_points="both_ends" N + 1).
    """
    config = MaskGradientConfig(
        grad_function=grad_function,
        answer_function=answer_function,
        mask_val=mask_val,
        integrated_grad_samples=integrated_grad_samples,
        ablation_type=ablation_type,
        clean_corrupt=clean_corrupt,
        path_points=path_points,
        memory_limit=memory_limit,
    )
    return mask_gradients(model, dataloader, official_edges, config)


@checked
@in_own_state(grad=True)
def mask_gradients(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    true_edges: Collection[Edge] | None,
    config: MaskGradientConfig,
) -> PruneScores:
    """What `mask_gradient_prune_scores` does, from a config."""
    check_objective(dataloader, config.answer_function)
    points = config.mask_vals()
    side = ablation_side(config.ablation_type, config.clean_corrupt)

    def take_gradients(
        points: Sequence[float], batch: PromptPairBatch, patch_src_outs: SrcOuts
    ) -> None:
        once = len(points) == 1
        with patch_mode(model, patch_src_outs, overwrite_patch=once):
            for point in points:
                set_all_masks(model, point)
                config.clean_loss_sum(model, batch).backward()

    passes = Passes(
        work=partial(take_gradients, points),
        # A second point finds the memory of the first, but for what is overwritten.
        try_out=partial(take_gradients, points[:2]),
        kept=kept_at(model, points),
    )
    with train_mask_mode(model, notes=False) as masks:
        patched_in = config.ablation_type, side
        each_batch(model, dataloader, patched_in, passes, config.memory_limit)
        total = dataloader.n_prompts * len(points)
        return {
            module_name: mask.grad.detach() / total
            for module_name, mask in masks.items()
            if mask.grad is not None
        }


EAP_NOTES = AlgoNotes(
    idea="Source's difference times gradient at the destination: the effect, to first order",
    paper="Syed et al. 2023, arXiv 2310.10348",
    cost="2 F + B",
    use="The first one to try: the cheapest that looks at the answers.",
)
"""Of edge attribution patching, which is the mask gradient at mask 0."""


def _gradient_algo(
    key: str,
    grad_function: GradFunction,
    answer_function: AnswerFunction,
    short_name: str | None = None,
    integrated_grad_samples: int | None = None,
    notes: AlgoNotes = EAP_NOTES,
) -> PruneAlgo:
    config = MaskGradientConfig(
        grad_function=grad_function,
        answer_function=answer_function,
        mask_val=0.0 if integrated_grad_samples is None else None,
        integrated_grad_samples=integrated_grad_samples,
    )
    return PruneAlgo(
        key=key,
        name=key,
        _short_name=short_name,
        needs_wrong_answers=answer_function in COMPARE_WITH_WRONG_ANSWERS,
        func=bound(mask_gradient_prune_scores, config),
        notes=notes,
    )


_NO_WRONG = "Prompts that have no wrong answers."
LOGIT_DIFF_GRAD_PRUNE_ALGO = _gradient_algo(
    "Edge Answer Logit Diff Gradient At Clean", "logit", "avg_diff", "EAP"
)
LOGIT_MSE_GRAD_PRUNE_ALGO = _gradient_algo(
    "Edge Answer Logit MSE Gradient At Clean",
    "logit",
    "mse",
    "EAP (MSE)",
    notes=replace(EAP_NOTES, idea="EAP of the squared error", use=MSE_USE),
)
PROB_GRAD_PRUNE_ALGO = _gradient_algo(
    "Edge Answer Prob Gradient At Clean", "prob", "avg_val"
)
LOGIT_EXP_GRAD_PRUNE_ALGO = _gradient_algo(
    "Edge Answer Logit Exp Gradient At Clean", "logit_exp", "avg_val"
)
LOGPROB_GRAD_PRUNE_ALGO = _gradient_algo(
    "Edge Answer Log Prob Gradient At Clean",
    "logprob",
    "avg_val",
    "EAP (log prob)",
    notes=replace(EAP_NOTES, idea="EAP of the answers' log-probability", use=_NO_WRONG),
)
LOGPROB_DIFF_GRAD_PRUNE_ALGO = _gradient_algo(
    "Edge Answer Log Prob Diff Gradient At Clean",
    "logprob",
    "avg_diff",
    "EAP (log prob diff)",
    notes=replace(
        EAP_NOTES,
        idea="EAP of the difference of log-probabilities",
        use="Where the answers are compared as probabilities.",
    ),
)
_PATH_NOTES = AlgoNotes(
    idea="The mean gradient while all edges together go from clean to patched",
    paper="Sundararajan et al. 2017, arXiv 1703.01365, as in Miller et al. 2024, arXiv 2407.08734",
    cost="F + m (F + B), with m = 50 points",
    use="Scores that add up to the effect of patching everything.",
)
INTEGRATED_EDGE_GRADS_PRUNE_ALGO = _gradient_algo(
    "Integrated Edge Gradients (Logit Grad)",
    "logit",
    "avg_val",
    "IEG (Answer Logit)",
    integrated_grad_samples=50,
    notes=replace(_PATH_NOTES, use=_NO_WRONG),
)
# auto-circuit: 1000 points, which the rule of midpoints does not need.
INTEGRATED_EDGE_GRADS_LOGIT_DIFF_PRUNE_ALGO = _gradient_algo(
    "Integrated Edge Gradients (Logit Diff)",
    "logit",
    "avg_diff",
    "IEG",
    integrated_grad_samples=50,
    notes=_PATH_NOTES,
)
