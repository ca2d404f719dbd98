"""Integrated gradients of edges: attribution patching that looks along a path.

An edge's score is the difference that patching makes at its source times the gradient at
its destination. Edge attribution patching takes that gradient at the clean prompt, where
it can be misleading: a saturated attention pattern or activation function has almost
none. The algorithms here take the mean gradient along a path from the patched-in
activations to the clean ones instead:

- *inputs* (Hanna et al. 2024, arXiv 2403.17806): the embeddings move from corrupt to
  clean; the differences stay those between the corrupt and the clean run.
- *activations* (Marks et al. 2024, arXiv 2403.19647): one source at a time moves, with
  everything before it clean; only its own edges are scored on its path.
- *clean-corrupt*: the path of the inputs, at its two ends only.

Cost per batch, with m points: inputs two forward passes to record and m forward and
backward passes (2 F + m (F + Bk)); activations one forward pass to record and m forward
and backward passes for each sublayer (F + m * sublayers * (F + Bk)), or for each source
("EAP-IG sources", the nearest to exact effects); clean-corrupt as inputs with 2 points
(4 F + 2 Bk).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch as t
from torch import Tensor
from torch.nn import Module

from auto_circuit.checks import checked
from auto_circuit.data import PromptDataLoader, PromptPairBatch
from auto_circuit.engine.kept_sources import kept_alone
from auto_circuit.prune_algos.algo_config import bound, takes_options
from auto_circuit.prune_algos.integration_path import PathPoints, path_shares
from auto_circuit.prune_algos.objectives import (
    AnswerConfig,
    check_objective,
)
from auto_circuit.prune_algos.prune_algo import AlgoNotes, PruneAlgo
from auto_circuit.types import AblationType, Edge, PruneScores
from auto_circuit.utils.ablation_activations import (
    Side,
    SrcOuts,
    ablation_side,
    record_src_outs,
)
from auto_circuit.utils.graph_utils import patch_mode, set_all_masks, train_mask_mode
from auto_circuit.utils.limited_passes import Passes, each_batch
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import in_own_state


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class PathConfig(AnswerConfig):
    """integrated_grad_samples, path_points: into how many steps the path is cut, and at
    which points the gradients are taken, whose plain mean counts (see `PathPoints`)."""

    integrated_grad_samples: int = 5
    path_points: PathPoints = "midpoints"

    def __post_init__(self) -> None:
        self.points()

    def points(self) -> list[float]:
        """How far from corrupt to clean each point is."""
        return path_shares(self.integrated_grad_samples, self.path_points)


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class InputIntegratedGradientsConfig(PathConfig):
    """The options of EAP-IG on the inputs.

    integrated_grad_samples, path_points: see `PathConfig`. "corrupt_end" is the rule of
        EAP-IG's published code, "clean_end" its paper's.
    ablation_type: what is patched in, and where the path begins: RESAMPLE, the corrupt
        prompts (as in the paper); ZERO, embeddings of zero.
    """

    ablation_type: AblationType = AblationType.RESAMPLE


@takes_options(InputIntegratedGradientsConfig)
@checked
@in_own_state(grad=True)
def input_integrated_gradients_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    config: InputIntegratedGradientsConfig,
) -> PruneScores:
    """EAP-IG on the inputs: corrupt - clean source times mean gradient on the input path.

    The mean over prompts. Positive: patching the edge lowers the answer function (the
    unit is its unit). The embeddings (the first source) are interpolated; tokens, and
    the attention mask of padded prompts, are those of the clean prompts.

    config: see `InputIntegratedGradientsConfig`; its options may be given one by one too.

    Raises ConfigError for fewer than one sample and for an unknown choice.
    Source: Hanna et al. 2024, arXiv 2403.17806. (Another path than that of the
    masks in `mask_gradient_prune_scores`.)
    """
    return _input_path_scores(
        model, dataloader, config, config.points(), config.ablation_type
    )


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class CleanCorruptConfig(AnswerConfig):
    """ablation_type: what is patched in, and what the corrupt end is."""

    ablation_type: AblationType = AblationType.RESAMPLE


@takes_options(CleanCorruptConfig)
@checked
@in_own_state(grad=True)
def clean_corrupt_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    config: CleanCorruptConfig,
) -> PruneScores:
    """Corrupt - clean source times the mean of the gradients at clean and at corrupt.

    The mean over prompts, in the unit of the answer function; positive: patching the
    edge lowers it. The path of `input_integrated_gradients_prune_scores` with nothing
    but its two ends. Exact for a metric that is quadratic along the path.

    config: see `CleanCorruptConfig`; its options may be given one by one too.

    Raises ConfigError for an unknown choice. Source: the "clean-corrupted" method of
    Hanna et al. 2024 (arXiv 2403.17806).
    """
    points = path_shares(1, "both_ends")
    return _input_path_scores(model, dataloader, config, points, config.ablation_type)


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class ActivationIntegratedGradientsConfig(PathConfig):
    """The options of EAP-IG on the activations.

    integrated_grad_samples, path_points: see `PathConfig`. "clean_end" is the rule of
        EAP-IG's published code.
    ablation_type, clean_corrupt: what is patched in.
    share_passes: move the heads of one attention layer together, which takes one path
        for each sublayer. Each head is still scored by its own difference; then the sum
        over the layer's edges is complete. False: a path for each source, many times
        slower.
    """

    ablation_type: AblationType = AblationType.RESAMPLE
    clean_corrupt: Side | None = "corrupt"
    share_passes: bool = True


@takes_options(ActivationIntegratedGradientsConfig)
@checked
@in_own_state(grad=True)
def activation_integrated_gradients_prune_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    official_edges: Collection[Edge] | None,
    config: ActivationIntegratedGradientsConfig,
) -> PruneScores:
    """EAP-IG on the activations: each source moves from corrupt to clean on its own.

    The mean over prompts of (corrupt - clean) source times the mean gradient at the
    destination while the source is interpolated: all of its edges at once, and nothing
    before it changed. Unit: the answer function's; positive: patching the edge lowers
    it. With many samples a source's scores add up to the effect of patching all of its
    edges (completeness). The source of an edge through attention are a head's values, or
    keys, at a position: those of all heads and positions of a block move together, or, with
    `share_passes=False`, one after another.

    config: see `ActivationIntegratedGradientsConfig`; its options may be given one by one
        too.

    Raises ConfigError for fewer than one sample and for an unknown choice.
    Source: Marks et al. 2024, arXiv 2403.19647. Differs from Hanna et al.'s code, which
    adds up the scores of all edges on every sublayer's path.
    """
    points = config.points()
    check_objective(dataloader, config.answer_function)
    side = ablation_side(config.ablation_type, config.clean_corrupt)
    scores = model.new_prune_scores()
    moving = _moving_together(model, config.share_passes)
    across = _moving_across(model, config.share_passes)

    def take_gradients(
        batch: PromptPairBatch, patch_src_outs: SrcOuts, trying: bool = False
    ) -> None:
        with patch_mode(model, patch_src_outs):
            kept = [_edges_of(model, srcs) for srcs in _kept(model, moving)]
            for edges in [*across, *kept][: 1 if trying else None]:
                for point in points[: 2 if trying else None]:
                    _patch_alone(model, edges, 1 - point)
                    config.clean_loss_sum(model, batch).backward()
                if not trying:
                    _take_gradients(model, edges, scores)

    passes = Passes(
        work=take_gradients,
        try_out=partial(take_gradients, trying=True),
        kept=kept_alone,
        units=[range(srcs.start, srcs.stop) for srcs in moving],
    )
    with train_mask_mode(model, notes=False):
        patched_in = config.ablation_type, side
        each_batch(model, dataloader, patched_in, passes, config.memory_limit)
    total = dataloader.n_prompts * len(points)
    return {name: score / total for name, score in scores.items()}


# ------------------------------------------------------------------- moving the inputs


def _input_path_scores(
    model: PatchableModel,
    dataloader: PromptDataLoader,
    config: AnswerConfig,
    points: Sequence[float],
    ablation_type: AblationType,
) -> PruneScores:
    model.check_no_crossings("A path of activations")
    check_objective(dataloader, config.answer_function)
    side = ablation_side(ablation_type, "corrupt")
    clean_outs: list[SrcOuts] = []  # their memory is used again

    def take_gradients(
        points: Sequence[float], batch: PromptPairBatch, ablated: SrcOuts
    ) -> None:
        tokens, kwargs = batch.model_input("clean")
        before = clean_outs.pop() if clean_outs else None
        if before is not None and before.shape != ablated.shape:
            before = None
        clean = record_src_outs(model, tokens, kwargs, reuse=before)
        with patch_mode(model, ablated - clean, differences=True):
            for point in points:
                start = t.lerp(ablated[0], clean[0], point)
                with _input_replaced(model, start):
                    config.clean_loss_sum(model, batch).backward()
        clean_outs.append(clean)

    def try_out(batch: PromptPairBatch, ablated: SrcOuts) -> None:
        take_gradients(points[:2], batch, ablated)
        clean_outs.clear()

    # The first source is where the path begins.
    passes = Passes(
        partial(take_gradients, points), try_out, partial(kept_alone, also=(0,))
    )
    with train_mask_mode(model, notes=False) as masks:
        set_all_masks(model, 0.0)
        patched_in = ablation_type, side
        each_batch(model, dataloader, patched_in, passes, config.memory_limit)
        total = dataloader.n_prompts * len(points)
        return {
            name: mask.grad.detach() / total
            for name, mask in masks.items()
            if mask.grad is not None
        }


@contextmanager
def _input_replaced(model: PatchableModel, value: Tensor) -> Iterator[None]:
    """Inside, the first source writes `value`, and the engine's hooks see it."""
    start = model.plan.src_ports[0]
    assert start.srcs == slice(0, 1)
    replace = partial(_replacement, value)
    handle = start.site.module.register_forward_hook(replace, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _replacement(value: Tensor, module: Module, args: Any, out: Tensor) -> Tensor:
    return value.reshape(out.shape)


# ------------------------------------------------------------------ moving activations


def _moving_together(model: PatchableModel, share_passes: bool) -> list[slice]:
    """The sources that are interpolated in the same passes, in their order."""
    if share_passes:
        return [port.srcs for port in model.plan.src_ports]
    return [slice(src, src + 1) for src in range(model.plan.n_srcs)]


def _kept(model: PatchableModel, moving: Sequence[slice]) -> list[slice]:
    """Those of the sources that the passes keep, where these are not all."""
    kept = model.plan.kept
    if kept is None:
        return list(moving)
    own = kept.own
    cut = [slice(max(s.start, own.start), min(s.stop, own.stop)) for s in moving]
    return [srcs for srcs in cut if srcs.start < srcs.stop]


EdgesOfModules = dict[str, Any]
"""Destination module name -> which entries of its mask, as an index."""


def _edges_of(model: PatchableModel, srcs: slice) -> EdgesOfModules:
    """The edges of these sources."""
    entries: EdgesOfModules = {}
    for wrapper in model.dest_wrappers:
        read = wrapper.in_srcs
        if read is None:  # it reads no sources, but other positions
            continue
        lo, hi = max(srcs.start, read.start), min(srcs.stop, read.stop)
        if lo < hi:
            columns = slice(lo - read.start, hi - read.start)
            entries[wrapper.module_name] = (..., columns)
    return entries


def _moving_across(model: PatchableModel, share_passes: bool) -> list[EdgesOfModules]:
    """The edges of keys, or of values, that are interpolated in the same passes."""
    if share_passes:
        return [
            {name: ...} for name in dict.fromkeys(d.module_name for d in model.crossings)
        ]
    heads: dict[tuple[str, str], list[int]] = {}
    for dest in model.crossings:
        assert dest.crossing is not None and dest.head_idx is not None
        # Several heads may share their keys.
        read = dest.module_name, dest.crossing.srcs[0].name
        heads.setdefault(read, []).append(dest.head_idx)
    pairs = [] if not model.crossings else _pairs(model)
    return [
        {module: (t.tensor(readers)[:, None], t.tensor(of_position))}
        for (module, _), readers in heads.items()
        for of_position in pairs
    ]


def _pairs(model: PatchableModel) -> list[list[int]]:
    """For each position the numbers of the pairs in which it is read."""
    crossing = model.crossings[0].crossing
    assert crossing is not None
    read = [come_from for _, come_from in crossing.pairs()]
    return [
        [number for number, one in enumerate(read) if one == position]
        for position in range(crossing.n_positions)
    ]


def _patch_alone(
    model: PatchableModel, edges: EdgesOfModules, share: int | float
) -> None:
    """Patch these edges by this share, and no others."""
    set_all_masks(model, 0.0)
    for name, entries in edges.items():
        model.patch_masks[name].data[entries] = share


def _take_gradients(
    model: PatchableModel, edges: EdgesOfModules, scores: PruneScores
) -> None:
    """Add the gradients of these edges' masks to the scores, and forget the others."""
    for name, entries in edges.items():
        grad = model.patch_masks[name].grad
        assert grad is not None
        scores[name][entries] += grad[entries]
    for mask in model.patch_masks.values():
        mask.grad = None


_NOTES = AlgoNotes(
    idea="As EAP, with the mean gradient while the embeddings go from corrupt to clean",
    paper="Hanna et al. 2024, arXiv 2403.17806",
    cost="2 F + m (F + B), with m = 5 points",
    use="Usually the best ranking for its price; the one to report beside EAP.",
)
INPUT_INTEGRATED_GRADIENTS_PRUNE_ALGO = PruneAlgo(
    key="Edge Attribution Patching with Integrated Gradients (Inputs)",
    name="Edge Attribution Patching with Integrated Gradients (Inputs)",
    _short_name="EAP-IG inputs",
    func=bound(input_integrated_gradients_prune_scores, InputIntegratedGradientsConfig()),
    needs_wrong_answers=True,
    scores_crossings=False,
    notes=_NOTES,
)
ACTIVATION_INTEGRATED_GRADIENTS_PRUNE_ALGO = PruneAlgo(
    key="Edge Attribution Patching with Integrated Gradients (Activations)",
    name="Edge Attribution Patching with Integrated Gradients (Activations)",
    _short_name="EAP-IG activations",
    func=bound(
        activation_integrated_gradients_prune_scores,
        ActivationIntegratedGradientsConfig(),
    ),
    needs_wrong_answers=True,
    notes=AlgoNotes(
        idea="As EAP, with the mean gradient while one sublayer's sources go to clean",
        paper="Marks et al. 2024, arXiv 2403.19647",
        cost="F + m x sublayers x (F + B), with m = 5 points",
        use="Scores that nearly add up to what patching all of a source's edges does.",
    ),
)
SOURCE_INTEGRATED_GRADIENTS_PRUNE_ALGO = PruneAlgo(
    key="Edge Attribution Patching with Integrated Gradients (Sources)",
    name="Edge Attribution Patching with Integrated Gradients (Sources)",
    _short_name="EAP-IG sources",
    # The mean of the gradients half-way and at clean: on the pocket tasks the order of
    # all exact effects is known best so.
    func=bound(
        activation_integrated_gradients_prune_scores,
        ActivationIntegratedGradientsConfig(
            share_passes=False, integrated_grad_samples=2, path_points="clean_end"
        ),
    ),
    needs_wrong_answers=True,
    notes=AlgoNotes(
        idea="As EAP-IG activations, each source on a path of its own",
        paper="Marks et al. 2024, arXiv 2403.19647",
        cost="F + m x sources x (F + B), with m = 2 points",
        use="The nearest to exact effects; dear on models of many heads.",
    ),
)
CLEAN_CORRUPT_PRUNE_ALGO = PruneAlgo(
    key="Edge Attribution Patching at Clean and Corrupt",
    name="Edge Attribution Patching at Clean and Corrupt",
    _short_name="Clean-Corrupt",
    func=bound(clean_corrupt_prune_scores, CleanCorruptConfig()),
    needs_wrong_answers=True,
    scores_crossings=False,
    notes=replace(
        _NOTES,
        idea="As EAP, with the mean of the gradients at clean and at corrupt",
        cost="4 F + 2 B",
        use="Between EAP and EAP-IG inputs, in price and in ranking.",
    ),
)
