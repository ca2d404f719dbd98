"""`run_circuits`: the micro model by hand, and what circuits of any model must do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch as t

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.prune import run_circuits
from auto_circuit.types import AblationType, PatchType, PruneScores
from auto_circuit.utils.ablation_activations import batch_src_ablations, src_ablations
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_mask_batch_size,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import CLEAN, micro_loader, micro_model
from tests.models import ARCHITECTURES, architectures, gpt2, llama, state_snapshot, tokens

EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}
ALL_CASES = [
    pytest.param(patch_type, reverse, id=f"{patch_type.name}{'-reversed' * reverse}")
    for patch_type in PatchType
    for reverse in (False, True)
]


def token_loader(n_prompts: int = 5, batch_size: int = 2) -> PromptDataLoader:
    one, two = tokens(n_prompts, 5, seed=1), tokens(n_prompts, 5, seed=2)
    answers = [t.tensor([1])] * n_prompts
    wrong = [t.tensor([2])] * n_prompts
    dataset = PromptDataset(one, two, answers, wrong)
    return PromptDataLoader(dataset, None, 0, batch_size=batch_size)


def random_scores(model: PatchableModel, seed: int = 0) -> PruneScores:
    generator = t.Generator().manual_seed(seed)
    return {
        name: t.randn(scores.shape, generator=generator)
        for name, scores in model.new_prune_scores().items()
    }


# ---------------------------------------------------------------------------- by hand


def test_micro_model_graphs() -> None:
    model = micro_model()
    shapes = {name: tuple(mask.shape) for name, mask in model.patch_masks.items()}
    assert shapes == {
        "blocks.0.head_inputs": (2, 1),
        "blocks.1.head_inputs": (2, 3),
        "output": (5,),
    }
    assert model.n_edges == 13
    assert {edge.name for edge in micro_model(factorized=False).edges} == {
        "Resid Start->Resid Post 0",
        "B0.0->Resid Post 0",
        "B0.1->Resid Post 0",
        "Resid Post 0->Resid End",
        "B1.0->Resid End",
        "B1.1->Resid End",
    }


@pytest.mark.parametrize("seq_len", [None, 3])
def test_micro_model_by_hand(seq_len: int | None) -> None:
    model = micro_model(seq_len=seq_len)
    suffix = "" if seq_len is None else " @ 2"
    names = ["B0.1->Resid End", "B0.0->B1.1", "Resid Start->B0.0"]
    scores = model.circuit_prune_scores(
        edge_dict={name + suffix: 3.0 - i for i, name in enumerate(names)}
    )
    (outputs,) = zip(
        *(
            by_batch.values()
            for by_batch in run_circuits(
                model, micro_loader(), [0, 1, 2, 3, model.n_edges], scores
            ).values()
        ),
        strict=True,
    )
    by_hand = [
        [-25.0, -49.0],
        [-19.0, -41.0],
        [-13.0, -25.0],
        [-9.0, -13.0],
        [25.0, 49.0],
    ]
    assert [out.tolist()[0] for out in outputs] == by_hand


def test_micro_model_by_hand_at_another_position() -> None:
    model = micro_model(slice_output=None, seq_len=3)
    scores = model.circuit_prune_scores(edges=["Resid Start->Resid End @ 0"])
    outputs = run_circuits(model, micro_loader(), [1], scores)
    ((out,),) = [list(by_batch.values()) for by_batch in outputs.values()]
    assert out[0].tolist() == [[-69.0, -141.0], [-50.0, -98.0], [-25.0, -49.0]]


@pytest.mark.parametrize(
    "ablation_type,expected",
    [
        (AblationType.RESAMPLE, [[-3.0], [-2.0], [-1.0]]),
        (AblationType.ZERO, [[0.0], [0.0], [0.0]]),
        (AblationType.TOKENWISE_MEAN_CLEAN, [[6.0], [4.0], [2.0]]),
        (AblationType.TOKENWISE_MEAN_CORRUPT, [[-6.0], [-4.0], [-2.0]]),
        (AblationType.TOKENWISE_MEAN_CLEAN_AND_CORRUPT, [[0.0], [0.0], [0.0]]),
        (AblationType.BATCH_TOKENWISE_MEAN, [[-6.0], [-4.0], [-2.0]]),
        (AblationType.BATCH_ALL_TOK_MEAN, [[-4.0], [-4.0], [-4.0]]),
    ],
)
def test_ablations_by_hand(
    ablation_type: AblationType, expected: list[list[float]]
) -> None:
    """The source "Resid Start", prompts of scales 1 and 3, corrupt ones patched in."""
    model = micro_model()
    loader = micro_loader([1.0, 3.0], batch_size=2)
    side = "corrupt" if ablation_type.name.startswith(("RES", "BATCH")) else None
    ((key, patch),) = batch_src_ablations(model, loader, ablation_type, side).items()
    assert patch.shape == (5, 2, 3, 2)
    assert patch[0, 0].tolist() == [row * 2 for row in expected]
    assert [batch.key for batch in loader] == [key]
    alone = (
        src_ablations(model, loader, ablation_type)
        if ablation_type.mean_over_dataset
        else src_ablations(model, next(iter(loader)).corrupt, ablation_type)
    )
    assert t.equal(alone, patch)


def test_data_set_means_are_the_same_for_every_batch_size() -> None:
    model = patchable_model(gpt2(), True, separate_qkv=True)
    mean = AblationType.TOKENWISE_MEAN_CLEAN_AND_CORRUPT
    one, all_ = (
        src_ablations(model, token_loader(5, size), mean)[:, 0] for size in (1, 5)
    )
    t.testing.assert_close(one, all_, **EXACT)


# ------------------------------------------------------------------------- every model


def all_outputs(
    model: PatchableModel, loader: PromptDataLoader, **options: object
) -> dict[int, t.Tensor]:
    scores = random_scores(model)
    counts = [0, model.n_edges // 2, model.n_edges]
    outputs = run_circuits(model, loader, counts, scores, **options)  # type: ignore[arg-type]
    return {n: t.cat(list(by_batch.values())) for n, by_batch in outputs.items()}


def plain_outputs(model: PatchableModel, loader: PromptDataLoader) -> dict[str, t.Tensor]:
    with t.no_grad():
        return {
            "clean": t.cat([model(b.clean)[model.out_slice] for b in loader]),
            "corrupt": t.cat([model(b.corrupt)[model.out_slice] for b in loader]),
        }


@pytest.mark.parametrize("name", architectures())
@pytest.mark.parametrize("seq_len", [None, 5], ids=["all", "positions"])
@pytest.mark.parametrize("patch_type,reverse", ALL_CASES)
def test_no_edges_and_all_edges(
    name: str, seq_len: int | None, patch_type: PatchType, reverse: bool
) -> None:
    model = patchable_model(
        ARCHITECTURES[name](), True, "last_seq", seq_len, separate_qkv=True
    )
    loader = token_loader()
    plain = plain_outputs(model, loader)
    assert (plain["clean"] - plain["corrupt"]).abs().max() > 0.01
    outputs = all_outputs(
        model, loader, patch_type=patch_type, reverse_clean_corrupt=reverse
    )
    none, all_ = ("clean", "corrupt") if reverse else ("corrupt", "clean")
    t.testing.assert_close(outputs[0], plain[none], **EXACT)
    t.testing.assert_close(outputs[model.n_edges], plain[all_], **EXACT)
    for side in plain:
        assert (outputs[model.n_edges // 2] - plain[side]).abs().max() > 1e-5


def test_edges_of_the_complement_with_sides_swapped_are_the_tree() -> None:
    model = patchable_model(llama(), True, "last_seq", separate_qkv=True)
    loader = token_loader()
    scores = random_scores(model)
    complement = {name: 1 / score.abs() for name, score in scores.items()}
    tree = run_circuits(model, loader, [9], scores, PatchType.TREE_PATCH)[9]
    rest = model.n_edges - 9
    edge = run_circuits(
        model,
        loader,
        [rest],
        complement,
        PatchType.EDGE_PATCH,
        reverse_clean_corrupt=True,
    )[rest]
    assert list(tree) == list(edge)
    for key, out in tree.items():
        t.testing.assert_close(edge[key], out, **EXACT)


@pytest.mark.parametrize("ablation_type", list(AblationType))
@pytest.mark.parametrize("factorized", [True, False], ids=["edges", "nodes"])
def test_batch_size_changes_no_output(
    ablation_type: AblationType, factorized: bool
) -> None:
    if ablation_type.name.startswith("BATCH"):
        return  # these ablations depend on the batch by definition
    model = patchable_model(gpt2(), factorized, "last_seq", separate_qkv=True)
    one, all_ = (
        all_outputs(model, token_loader(5, size), ablation_type=ablation_type)
        for size in (1, 5)
    )
    for n_edges, out in one.items():
        t.testing.assert_close(all_[n_edges], out, **EXACT)


def test_circuits_do_not_depend_on_how_edges_are_named_or_ordered() -> None:
    """Patching an edge by name is the circuit of that edge."""
    model = patchable_model(gpt2(), True, "last_seq", separate_qkv=True)
    loader = token_loader(2)
    (batch,) = loader
    scores = model.circuit_prune_scores(edges=["A0.1->A1.2.K"])
    out = run_circuits(model, loader, [1], scores)[1][batch.key]
    patch = src_ablations(model, batch.clean)
    with t.no_grad(), patch_mode(model, patch, ["A0.1->A1.2.K"]):
        by_name = model(batch.corrupt)[model.out_slice]
    t.testing.assert_close(out, by_name, **EXACT)


def test_unfactorized_node_is_all_its_outgoing_edges() -> None:
    edges = patchable_model(gpt2(), True, "last_seq", separate_qkv=True)
    nodes = patchable_model(edges.wrapped_model, False, "last_seq", separate_qkv=True)
    clean, corrupt = tokens(2, 5, seed=1), tokens(2, 5, seed=2)
    outs = []
    for model in (edges, nodes):
        outgoing = [edge for edge in model.edges if edge.src.name == "A0.1"]
        with t.no_grad(), patch_mode(model, src_ablations(model, corrupt), outgoing):
            outs.append(model(clean)[model.out_slice])
    with t.no_grad():
        assert (outs[0] - edges(clean)[edges.out_slice]).abs().max() > 1e-4
    t.testing.assert_close(outs[0], outs[1], **EXACT)


def test_masks_and_state_are_restored() -> None:
    model = patchable_model(gpt2(), True, "last_seq", separate_qkv=True)
    before = state_snapshot(model)
    all_outputs(model, token_loader())
    assert state_snapshot(model) == before


# ------------------------------------------------------------------- sizes, ties, errors


def test_infinite_scores_are_not_in_a_circuit_of_no_edges() -> None:
    model = micro_model()
    scores = model.new_prune_scores(math.inf)
    assert list(run_circuits(model, micro_loader(), [0], scores)) == [0]


def test_all_ties_are_in_the_circuit_and_the_key_says_so() -> None:
    model = micro_model()
    scores = model.circuit_prune_scores(
        edges=["B0.1->Resid End", "B0.0->Resid End", "B0.0->B1.1"]
    )
    assert list(run_circuits(model, micro_loader(), [0, 1, 2], scores)) == [0, 3]


@pytest.fixture
def micro() -> Iterator[PatchableModel]:
    yield micro_model()


@pytest.mark.parametrize(
    "counts,change,message",
    [
        ([14], lambda scores: scores, "14 edges was asked for; the graph has 13"),
        ([-1], lambda scores: scores, "-1"),
        ([1], lambda scores: {"blocks.0.head_input": scores["output"]}, "Did you mean"),
        ([1], lambda scores: scores | {"output": t.zeros(4)}, r"shape \(4,\).*\(5,\)"),
        ([1], lambda scores: {"output": scores["output"]}, "lack 2 of the graph's 3"),
        ([1], lambda scores: scores | {"output": t.full((5,), t.nan)}, "NaN"),
    ],
)
def test_bad_sizes_and_scores(
    micro: PatchableModel,
    counts: list[int],
    change: Callable[[PruneScores], PruneScores],
    message: str,
) -> None:
    scores = change(micro.new_prune_scores())
    with pytest.raises((GraphError, ConfigError), match=message):
        run_circuits(micro, micro_loader(), counts, scores)


def test_masks_of_single_examples_are_not_circuits() -> None:
    model = micro_model()
    with (
        set_mask_batch_size(model, 2),
        pytest.raises(ConfigError, match=r"Each of 2 examples has masks of its own"),
    ):
        run_circuits(model, micro_loader([1, 2], 2), [3], random_scores(model))


def test_activations_of_another_size() -> None:
    model = micro_model()
    patch = src_ablations(model, CLEAN[None])
    with (
        pytest.raises(GraphError, match=r"shape \(5, 1, 3, 2\).*\(5, 2, 3, 2\)"),
        patch_mode(model, patch),
    ):
        model(t.stack([CLEAN, CLEAN]))


def test_src_ablations_need_the_right_sample() -> None:
    model, loader = micro_model(), micro_loader()
    with pytest.raises(ConfigError, match="must be a PromptDataLoader, not a Tensor"):
        src_ablations(model, CLEAN[None], AblationType.TOKENWISE_MEAN_CLEAN)
    with pytest.raises(ConfigError, match="`sample` must be a Tensor of tokens"):
        src_ablations(model, loader, AblationType.RESAMPLE)
    with pytest.raises(ConfigError, match="needs `clean_corrupt`: 'clean' or 'corrupt'"):
        batch_src_ablations(model, loader, AblationType.RESAMPLE)
    with pytest.raises(ConfigError, match="does not depend on `clean_corrupt`"):
        batch_src_ablations(model, loader, AblationType.ZERO, "clean")
