"""Whoever calls the engine gets the right numbers, edge by edge, on every architecture.

The engine has many ways to save work: patches that are overwritten with differences, closed
forms of heads, differences that are given, layers that are not run again. An algorithm uses
some of them; the references here use none. They are either finite differences in float64,
or loops over `train_mask_mode` and `patch_mode` without any option, one pass in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import pytest
import torch as t
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import MemoryLimitError
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.edge_pruning import train_edge_pruning
from auto_circuit.prune_algos.head_importance import (
    edge_scores_of_nodes,
    head_importance_prune_scores,
)
from auto_circuit.prune_algos.integrated_gradients import (
    activation_integrated_gradients_prune_scores,
    clean_corrupt_prune_scores,
    input_integrated_gradients_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.prune_algos.matryoshka import train_matryoshka
from auto_circuit.prune_algos.peap import peap_prune_scores
from auto_circuit.prune_algos.prompt_scores import mask_gradient_prompt_scores
from auto_circuit.prune_algos.subnetwork_probing import train_subnetwork
from auto_circuit.types import PruneScores
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.backward_modifiers import gim_backward, relp_backward
from auto_circuit.utils.graph_utils import (
    mask_fn_mode,
    patch_mode,
    patchable_model,
    set_all_masks,
    set_mask_batch_size,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import (
    MORE_ARCHITECTURES,
    folded,
    gpt2,
    gpt2_folded,
    llama,
    mixtral,
    olmo,
    pythia,
    tokens,
)

MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "pythia": pythia,
    "llama": llama,
    "gemma2": MORE_ARCHITECTURES["gemma2"],
    "olmo": olmo,
    "mixtral": mixtral,
    # Norms that only centre and scale, of a residual stream whose mean is not 0.
    "plain norms": gpt2_folded,
}
N_PROMPTS, SEQ, ANSWER, WRONG = 3, 4, 1, 2
CLEAN, CORRUPT = tokens(N_PROMPTS, SEQ, seed=1), tokens(N_PROMPTS, SEQ, seed=2)


@cache
def make(name: str, is_folded: bool) -> PatchableModel:
    """A float64 model: made once, as every test leaves it as it was."""
    bridge = folded(MODELS[name]()) if is_folded else MODELS[name]()
    return patchable_model(bridge.double(), True, "last_seq", separate_qkv=True)


def loader(batch_size: int = 2) -> PromptDataLoader:
    """Batches of two prompts and one."""
    answers, wrong = ([t.tensor([word])] * N_PROMPTS for word in (ANSWER, WRONG))
    dataset = PromptDataset(CLEAN, CORRUPT, answers, wrong)
    return PromptDataLoader(dataset, None, 0, batch_size=batch_size)


def loss_of(logits: Tensor) -> Tensor:
    """Minus the answers' difference, per prompt, of logits at the last position."""
    return logits[:, WRONG] - logits[:, ANSWER]


def by_edge(model: PatchableModel, scores: PruneScores) -> Tensor:
    return t.stack([edge.prune_score(scores) for edge in model.edges]).double()


def assert_same(
    model: PatchableModel, found: PruneScores, expected: PruneScores | Tensor, rtol: float
) -> None:
    """Edge by edge, to a share of the largest score."""
    ours = by_edge(model, found)
    theirs = expected if isinstance(expected, Tensor) else by_edge(model, expected)
    # Not a comparison of nothing; where all is patched, only the start still differs.
    assert (theirs != 0).float().mean() > 0.01
    t.testing.assert_close(ours, theirs, atol=rtol * float(theirs.abs().max()), rtol=0.0)


# ------------------------------------------------------------------ finite differences


def finite_differences(model: PatchableModel, value: float) -> Tensor:
    """d loss / d mask of each edge, all masks at a value: the mean over prompts.

    One pass without gradients, in which each example has masks of its own.
    """
    steps, weights = t.tensor([-0.02, -0.01, 0.01, 0.02]), [1.0, -8.0, 8.0, -1.0]
    edges = list(model.edges)
    n_rows = len(edges) * len(steps) * N_PROMPTS
    clean = CLEAN.repeat(len(edges) * len(steps), 1)
    patch = src_ablations(model, CORRUPT).repeat(1, n_rows // N_PROMPTS, 1, 1)
    with t.no_grad(), set_mask_batch_size(model, n_rows), patch_mode(model, patch):
        set_all_masks(model, value)
        for i, edge in enumerate(edges):
            of_edge = edge.patch_mask(model).data.unflatten(0, (len(edges), 4, -1))[i]
            of_edge[(..., *edge.patch_idx)] += steps.to(of_edge)[:, None]
        losses = loss_of(model(clean)[:, -1]).unflatten(0, (len(edges), 4, -1)).mean(-1)
    return losses @ t.tensor(weights).to(losses) / 0.12


FAST_FINITE = [
    ("gpt2", True, 0.0),
    ("plain norms", False, 0.5),
    ("olmo", False, 0.0),
]
FINITE = [
    pytest.param(
        name,
        is_folded,
        value,
        marks=() if (name, is_folded, value) in FAST_FINITE else pytest.mark.slow,
    )
    for name in MODELS
    for is_folded in (False, True)
    if not (name == "plain norms" and is_folded)
    for value in (0.0, 0.3, 0.5, 1.0)
]


@pytest.mark.parametrize("name,is_folded,value", FINITE)
def test_mask_gradients_are_finite_differences(
    name: str, is_folded: bool, value: float
) -> None:
    model = make(name, is_folded)
    expected = finite_differences(model, value)
    scores = mask_gradient_prune_scores(
        model, loader(), None, "logit", "avg_diff", mask_val=value
    )
    # All but GPT-2 compute softmax or norm in float32, whatever the model's type is.
    is_exact = name in ("gpt2", "plain norms")
    assert_same(model, scores, expected, rtol=1e-4 if is_exact else 1e-3)


# ----------------------------------------------------------------------- plain loops

Masks = Callable[[PatchableModel], None]


def plain_gradients(
    model: PatchableModel,
    clean: Tensor,
    patch: Tensor,
    masks: Masks,
    loss: Callable[[Tensor], Tensor] = lambda logits: loss_of(logits).mean(),
) -> PruneScores:
    """The gradient of a loss of one pass's logits, with no option of the engine."""
    with train_mask_mode(model) as parameters, patch_mode(model, patch):
        masks(model)
        loss(model(clean)[:, -1]).backward()
        return {
            name: mask.grad.clone()
            for name, mask in parameters.items()
            if mask.grad is not None
        }


def mean_of(parts: Sequence[PruneScores]) -> PruneScores:
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}  # type: ignore[misc]


def all_at(value: float) -> Masks:
    return lambda model: set_all_masks(model, value)


def mean_at(model: PatchableModel, values: Sequence[float]) -> PruneScores:
    """Gradients at masks of these values: the mean over prompts and values."""
    patch = src_ablations(model, CORRUPT)
    return mean_of([plain_gradients(model, CLEAN, patch, all_at(v)) for v in values])


def prompt_scores_at(model: PatchableModel, value: float) -> PruneScores:
    """A row for each prompt, run alone."""
    rows = [
        plain_gradients(model, clean, src_ablations(model, corrupt), all_at(value))
        for clean, corrupt in zip(CLEAN.split(1), CORRUPT.split(1), strict=True)
    ]
    return {name: t.stack([row[name] for row in rows]) for name in rows[0]}


def head_importance(model: PatchableModel) -> PruneScores:
    """|the sum over a source's edges|, the mean over prompts, of the weaker node."""
    rows = prompt_scores_at(model, 0.0)
    by_src = t.zeros(N_PROMPTS, len(model.srcs), dtype=t.float64)
    for edge in model.edges:
        of_edge = rows[edge.dest.module_name][(slice(None), *edge.patch_idx)]
        by_src[:, edge.src.src_idx] += of_edge
    return edge_scores_of_nodes(model, by_src.abs().mean(0))


@contextmanager
def start_replaced(model: PatchableModel, value: Tensor) -> Iterator[None]:
    """Inside, the embeddings are these."""
    start: Any = model.wrapped_model.hook_dict["blocks.0.hook_resid_pre"]  # type: ignore[union-attr, index]
    handle = start.register_forward_hook(lambda *args: value, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def moving_inputs(model: PatchableModel, points: Sequence[float]) -> PruneScores:
    """EAP-IG on inputs: gradients where the embeddings are `point` of the way to clean.

    What is patched in there is what the sources write, plus corrupt minus clean.
    """
    parts, corrupt = [], src_ablations(model, CORRUPT)
    change = corrupt - src_ablations(model, CLEAN)
    for point in points:
        with start_replaced(model, corrupt[0] - point * change[0]):
            patch = src_ablations(model, CLEAN) + change
            parts.append(plain_gradients(model, CLEAN, patch, all_at(0.0)))
    return mean_of(parts)


def moving_activations(
    model: PatchableModel, points: Sequence[float], together: bool
) -> PruneScores:
    """EAP-IG on activations: a path for each source, or for each module's sources."""
    groups: dict[object, set[int]] = {}
    for src in model.srcs:
        key = src.module_name if together else src.name
        groups.setdefault(key, set()).add(src.src_idx)
    scores, patch = model.new_prune_scores(), src_ablations(model, CORRUPT)
    for srcs in groups.values():
        edges = [edge for edge in model.edges if edge.src.src_idx in srcs]

        def only_these(model: PatchableModel, share: float, edges: Any = edges) -> None:
            set_all_masks(model, 0.0)
            for edge in edges:
                edge.patch_mask(model).data[edge.patch_idx] = share

        gradients = mean_of(
            [
                plain_gradients(model, CLEAN, patch, partial(only_these, share=1 - point))
                for point in points
            ]
        )
        for edge in edges:
            scores[edge.dest.module_name][edge.patch_idx] = edge.prune_score(gradients)
    return scores


def mask_gradient(model: PatchableModel, **where: Any) -> PruneScores:
    return mask_gradient_prune_scores(model, loader(), None, "logit", "avg_diff", **where)


def prompt_scores(model: PatchableModel, value: float) -> PruneScores:
    return mask_gradient_prompt_scores(model, loader(), "logit", "avg_diff", value)


def with_loader(algo: Callable[..., PruneScores], **options: Any) -> Any:
    return lambda model: algo(model, loader(), None, **options)


def in_its_least(algo: Callable[..., PruneScores]) -> Any:
    """The same in the smallest memory limit that does."""

    def run(model: PatchableModel) -> PruneScores:
        with pytest.raises(MemoryLimitError) as raised:
            algo(model, memory_limit=1000)
        least = str(raised.value).split("takes ")[1].split(" ")[0]
        return algo(model, memory_limit=int(least.replace(",", "")))

    return run


# name: (what an algorithm gives, what it should give)
Caller = Callable[[PatchableModel], PruneScores]
CALLERS: dict[str, tuple[Caller, Caller]] = {
    "EAP alone": (
        with_loader(edge_attribution_patching_prune_scores),
        lambda model: mean_at(model, [0.0]),
    ),
    "PEAP": (with_loader(peap_prune_scores), lambda model: mean_at(model, [0.0])),
    **{
        f"mask at {value}": (
            partial(mask_gradient, mask_val=value),
            partial(mean_at, values=[value]),
        )
        for value in (0.3, 1.0)
    },
    "integrated": (
        partial(mask_gradient, integrated_grad_samples=2),
        partial(mean_at, values=[0.25, 0.75]),
    ),
    **{
        f"prompts at {value}": (
            partial(prompt_scores, value=value),
            partial(prompt_scores_at, value=value),
        )
        for value in (0.0, 0.5)
    },
    "PEAP, limited": (
        in_its_least(
            lambda model, **limit: with_loader(peap_prune_scores, **limit)(model)
        ),
        lambda model: mean_at(model, [0.0]),
    ),
    **{
        f"mask at {value}, limited": (
            in_its_least(partial(mask_gradient, mask_val=value)),
            partial(mean_at, values=[value]),
        )
        for value in (0.0, 0.3)
    },
    "HISP": (
        with_loader(head_importance_prune_scores, normalize=False),
        head_importance,
    ),
    "EAP-IG inputs": (
        with_loader(input_integrated_gradients_prune_scores, integrated_grad_samples=2),
        partial(moving_inputs, points=[0.25, 0.75]),
    ),
    "clean-corrupt": (
        with_loader(clean_corrupt_prune_scores),
        partial(moving_inputs, points=[0.0, 1.0]),
    ),
    "EAP-IG activations": (
        with_loader(
            activation_integrated_gradients_prune_scores,
            integrated_grad_samples=1,
            path_points="corrupt_end",
        ),
        partial(moving_activations, points=[0.0], together=True),
    ),
    "EAP-IG sources": (
        with_loader(
            activation_integrated_gradients_prune_scores,
            integrated_grad_samples=1,
            share_passes=False,
        ),
        partial(moving_activations, points=[0.5], together=False),
    ),
}
Modifier = Callable[[PatchableModel], AbstractContextManager[None]]
MODIFIERS: dict[str, Modifier] = {
    "plain": lambda model: nullcontext(),
    "gim": gim_backward,
    "relp": relp_backward,
}
# With a modifier no head has a closed form; without, OLMo's have none.
FAST = [
    ("gpt2", True, "gim", "EAP alone"),
    ("gpt2", True, "plain", "EAP-IG inputs"),
    ("llama", False, "relp", "HISP"),
    ("llama", False, "plain", "prompts at 0.5"),
    ("gemma2", True, "gim", "mask at 0.3"),
]
# A pass for each source or sublayer: not on every model.
LONG = [
    ("gpt2", True, "plain"),
    ("gpt2", True, "gim"),
    ("llama", False, "relp"),
    ("olmo", False, "plain"),
]

# A pass for each source and prompt.
LIMITED = [("gpt2", True, "gim"), ("llama", False, "relp"), ("gemma2", True, "plain")]


def cases() -> Iterator[tuple[str, bool, str, str]]:
    for name in [name for name in MODELS if name != "plain norms"]:
        kinds = [(False, "plain"), (True, "plain")]
        if name != "mixtral":  # which the modifiers refuse
            kinds += [(True, "gim"), (False, "relp")]
        for is_folded, modifier in kinds:
            for caller in CALLERS:
                is_long = caller in ("EAP-IG activations", "EAP-IG sources")
                is_limited = caller.endswith("limited")
                if is_limited and (name, is_folded, modifier) in LIMITED:
                    yield name, is_folded, modifier, caller
                if is_limited:
                    continue
                # Compared with finite differences, which are better.
                is_known = modifier == "plain" and caller.startswith(("EAP ", "mask"))
                if not is_known and (not is_long or (name, is_folded, modifier) in LONG):
                    yield name, is_folded, modifier, caller


ALL = list(cases())


@pytest.mark.parametrize(
    "name,is_folded,modifier,caller",
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in ALL],
)
def test_callers_give_what_plain_loops_give(
    name: str, is_folded: bool, modifier: str, caller: str
) -> None:
    model = make(name, is_folded)
    algo, reference = CALLERS[caller]
    with MODIFIERS[modifier](model):
        found, expected = algo(model), reference(model)
    if caller.startswith("prompts"):
        for i in range(N_PROMPTS):
            rows = [{n: s[i] for n, s in scores.items()} for scores in (found, expected)]
            assert_same(model, *rows, rtol=1e-6)
    else:
        assert_same(model, found, expected, rtol=1e-6)


def test_the_fast_cases_are_cases() -> None:
    assert set(FAST) <= set(ALL)


# -------------------------------------------------------------------------- trainings


@contextmanager
def steps_of(n_params: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(parameters, gradients), flat, before each step of an optimizer of so many."""
    steps: list[tuple[Tensor, Tensor]] = []

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        values, grads = (
            [part.detach().flatten() for part in parts]
            for parts in (params, [p.grad for p in params])
        )
        if sum(map(len, values)) == n_params:
            steps.append((t.cat(values).clone(), t.cat(grads).clone()))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield steps
    finally:
        handle.remove()


def set_masks(model: PatchableModel, values: Tensor) -> None:
    masks = list(model.patch_masks.values())
    for mask, part in zip(masks, values.split([m.numel() for m in masks]), strict=True):
        mask.data.copy_(part.view_as(mask))


def flat(model: PatchableModel, scores: PruneScores) -> Tensor:
    return t.cat([scores[name].flatten() for name in model.patch_masks])


def kl_to_clean(model: PatchableModel, clean: Tensor) -> Callable[[Tensor], Tensor]:
    with t.no_grad():
        target = model(clean)[:, -1].log_softmax(-1)
    return lambda logits: (
        (target.exp() * (target - logits.log_softmax(-1))).sum(-1).mean()
    )


def gate_gradients(
    model: PatchableModel, logits: Sequence[Tensor], tree: bool, seed: int
) -> list[Tensor]:
    """Of KL(model || circuit) with hard concrete gates, batch after batch.

    The noise goes on from batch to batch. tree: clean prompts, and 1 patches corrupt ones
    in; else the other way round.
    """
    generator, found = t.Generator().manual_seed(seed), []
    batches = zip(CLEAN.split(2), CORRUPT.split(2), strict=True)
    for values, (clean, corrupt) in zip(logits, batches, strict=True):
        inputs, others = (clean, corrupt) if tree else (corrupt, clean)
        with mask_fn_mode(model, "hard_concrete", 0.0, generator):
            gradients = plain_gradients(
                model,
                inputs,
                src_ablations(model, others),
                partial(set_masks, values=values),
                kl_to_clean(model, clean),
            )
        found.append(flat(model, gradients))
    return found


def open_gates(logits: Tensor) -> Tensor:
    """The chance that a hard concrete gate is above 0."""
    return (logits - 2 / 3 * t.tensor(0.1 / 1.1).log()).sigmoid()


def subnetwork_steps(model: PatchableModel, tree: bool) -> tuple[list, list]:
    with steps_of(model.n_edges) as steps:
        train_subnetwork(
            model,
            loader(),
            epochs=1,
            init_val=0.3,
            regularize_lambda=2,
            circuit_size=20,
            tree_optimisation=tree,
            seed=5,
        )
    logits, found = zip(*steps, strict=True)
    expected = gate_gradients(model, logits, tree, 5)
    for values, gradient in zip(logits, expected, strict=True):
        gates = (-values if tree else values).clone().requires_grad_()
        penalty = 2 * t.relu(open_gates(gates).sum() - 20) / 20
        (of_gates,) = t.autograd.grad(penalty, gates)
        gradient += -of_gates if tree else of_gates
    return list(found), expected


def edge_pruning_steps(model: PatchableModel) -> tuple[list, list]:
    with steps_of(model.n_edges) as steps, steps_of(2) as multiplier_steps:
        train_edge_pruning(
            model, loader(), target_sparsity=0.5, n_steps=2, warmup_share=0.5, seed=5
        )
    logits, found = zip(*steps, strict=True)
    expected = gate_gradients(model, logits, True, 5)
    points = (t.arange(16) + 0.5) / 16
    for values, gradient, (multipliers, _) in zip(
        logits, expected, multiplier_steps, strict=True
    ):
        gates = -values.clone().requires_grad_()
        offsets = 2 / 3 * ((points + 0.1) / (1.1 - points)).log()
        sparsity = 1 - (gates[:, None] - offsets).sigmoid().mean()
        excess = sparsity - 0.5  # the warm-up is over at the first of two steps
        penalty = multipliers[0] * excess + multipliers[1] * excess**2
        gradient -= t.autograd.grad(penalty, gates)[0]
    return list(found), expected


def matryoshka_steps(model: PatchableModel) -> tuple[list, list]:
    with steps_of(model.n_edges) as steps:
        training = train_matryoshka(model, loader(), n_steps=2, temperature=0.5, seed=3)
    expected = []
    batches = zip(CLEAN.split(2), CORRUPT.split(2), strict=True)
    for (values, _), step, (clean, corrupt) in zip(
        steps, training.steps, batches, strict=True
    ):
        scores = values.clone().requires_grad_()
        tau = t.zeros((), dtype=scores.dtype)
        for _ in range(60):  # Newton's, of which the last step carries the gradient
            tau = tau.detach()
            excess = ((scores - tau) / 0.5).sigmoid().sum() - step.n_edges
            slope = ((scores - tau) / 0.5).sigmoid() * ((tau - scores) / 0.5).sigmoid()
            tau = tau + (excess / slope.detach().sum() * 0.5).clamp(-1, 1)
        kept = ((scores - tau) / 0.5).sigmoid()
        gradients = plain_gradients(
            model,
            clean,
            src_ablations(model, corrupt),
            partial(set_masks, values=1 - kept.detach()),
        )
        kept.backward(-flat(model, gradients))
        assert scores.grad is not None
        expected.append(scores.grad)
    return [grad for _, grad in steps], expected


TRAININGS: dict[str, Callable[[PatchableModel], tuple[list, list]]] = {
    "probing": partial(subnetwork_steps, tree=False),
    "tree probing": partial(subnetwork_steps, tree=True),
    "Edge Pruning": edge_pruning_steps,
    "Matryoshka": matryoshka_steps,
}
FAST_TRAININGS = [("gpt2", True, "probing")]


@pytest.mark.parametrize(
    "name,is_folded,training",
    [
        pytest.param(
            name,
            is_folded,
            training,
            marks=(
                () if (name, is_folded, training) in FAST_TRAININGS else pytest.mark.slow
            ),
        )
        for name in MODELS
        for is_folded in (False, True)
        if name != "plain norms"
        for training in TRAININGS
    ],
)
def test_trainings_go_down_the_gradient_of_their_loss(
    name: str, is_folded: bool, training: str
) -> None:
    """At the first two steps, on a batch of two prompts and on one of one."""
    found, expected = TRAININGS[training](make(name, is_folded))
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert (theirs != 0).float().mean() > 0.2  # a gate that is wide open has none
        atol = 1e-5 * float(theirs.abs().max())
        t.testing.assert_close(ours, theirs, atol=atol, rtol=0.0)
