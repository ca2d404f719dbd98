"""What users of auto-circuit 1.0.1 do, on the model that comes with the package.

Numbers are checked against things known otherwise: the plain model, or other ways to get
the same circuit. That they are the published version's: `test_contract_parity.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit.data import PromptDataLoader, PromptDataset, load_datasets_from_json
from auto_circuit.metrics.prune_metrics.answer_diff import measure_answer_diff
from auto_circuit.metrics.prune_metrics.kl_div import measure_kl_div
from auto_circuit.model_utils.micro_model_utils import MicroModel
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.ACDC import acdc_prune_scores
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.types import AblationType, PatchType
from auto_circuit.utils.ablation_activations import batch_src_ablations, src_ablations
from auto_circuit.utils.graph_utils import (
    edge_counts_util,
    patch_mode,
    patchable_model,
    set_all_masks,
)
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.visualize import draw_seq_graph
from tests.upstream.our_models import pocket_model
from tests.upstream.parity_models import POCKET_PROMPTS

CIRCUIT = ["Resid Start->MLP 0", "MLP 0->A2.1.Q", "A2.1->MLP 3", "MLP 3->Resid End"]


def loaders(**options: Any) -> tuple[PromptDataLoader, PromptDataLoader]:
    return load_datasets_from_json(
        model=pocket_model(),
        path=POCKET_PROMPTS,
        device=t.device("cpu"),
        prepend_bos=True,
        batch_size=4,
        train_test_size=(8, 8),
        **options,
    )


@pytest.fixture(scope="module")
def train_loader() -> PromptDataLoader:
    return loaders()[0]


@pytest.fixture(scope="module")
def test_loader() -> PromptDataLoader:
    return loaders()[1]


@pytest.fixture
def model() -> Iterator[PatchableModel]:
    yield patchable_model(
        pocket_model(),
        factorized=True,
        slice_output="last_seq",
        separate_qkv=True,
        device=t.device("cpu"),
    )


def drawn(figure: Any) -> set[str]:
    return {name for sankey in figure.data for name in sankey.link.label if name}


def test_patch_some_edges_and_draw_them(
    model: PatchableModel, test_loader: PromptDataLoader, tmp_path: Path
) -> None:
    ablations = src_ablations(model, test_loader, AblationType.TOKENWISE_MEAN_CORRUPT)
    with patch_mode(model, ablations, CIRCUIT):
        outs = [model(batch.clean) for batch in test_loader]
        shown = draw_seq_graph(model, display_ipython=False)
        prune_scores = {
            name: mask.clone()
            for name, mask in model.current_patch_masks_as_prune_scores().items()
        }
    assert drawn(shown) == set(CIRCUIT)
    file = tmp_path / "circuit.html"
    again = draw_seq_graph(
        model, prune_scores, display_ipython=False, file_path=str(file)
    )
    assert drawn(again) == set(CIRCUIT) and file.stat().st_size > 0

    listed = model.circuit_prune_scores(edges=CIRCUIT)
    masks = run_circuits(
        *(model, test_loader, [len(CIRCUIT)], listed, PatchType.EDGE_PATCH),
        AblationType.TOKENWISE_MEAN_CORRUPT,
        reverse_clean_corrupt=True,
    )
    for batch, out in zip(test_loader, outs, strict=True):
        t.testing.assert_close(out[:, -1], masks[len(CIRCUIT)][batch.key])
        assert (out - model(batch.clean)).abs().max() > 0.1


def test_zero_ablate_an_edge(model: PatchableModel) -> None:
    tokens = pocket_model().to_tokens("After Dennis and Mark arrived")
    ablations = src_ablations(model, tokens, AblationType.ZERO)
    with patch_mode(model, ablations, ["MLP 3->Resid End"]):
        without = model(tokens)
    # The last MLP is read by the last residual stream only.
    hook = ("blocks.3.hook_mlp_out", lambda out, hook: 0 * out)
    other = pocket_model().run_with_hooks(tokens, fwd_hooks=[hook])
    t.testing.assert_close(without, other)
    assert (without - model(tokens)).abs().max() > 0.1


def test_find_a_circuit_and_draw_what_is_above_a_threshold(
    model: PatchableModel, train_loader: PromptDataLoader
) -> None:
    scores = mask_gradient_prune_scores(
        model=model,
        dataloader=train_loader,
        official_edges=None,
        grad_function="logit",
        answer_function="avg_diff",
        mask_val=0.0,
    )
    flat = t.cat([value.flatten() for value in scores.values()]).abs()
    threshold = float(flat.sort(descending=True).values[20])
    figure = draw_seq_graph(
        model,
        scores,
        threshold,
        layer_spacing=True,
        orientation="v",
        display_ipython=False,
    )
    assert len(drawn(figure)) == int((flat >= threshold).sum()) == 21


def test_a_circuit_of_positions(tmp_path: Path) -> None:
    train_loader, test_loader = loaders(return_seq_length=True)
    model = patchable_model(
        pocket_model(),
        factorized=True,
        slice_output="last_seq",
        seq_len=test_loader.seq_len,
        separate_qkv=True,
    )
    (name,) = CIRCUIT[-1:]
    scores = model.new_prune_scores()
    last = (test_loader.seq_len or 0) - 1
    edge = model.edge_name_dict[last][name]
    scores[edge.dest.module_name][edge.patch_idx] = 1.0
    figure = draw_seq_graph(
        model, scores, 0.5, seq_labels=train_loader.seq_labels, display_ipython=False
    )
    assert [edge.name for edge in model.edge_dict[last]].count(name) == 1
    assert len(drawn(figure)) == 1
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert train_loader.seq_labels is not None
    assert sum(train_loader.seq_labels[-1] in text for text in texts) == 1

    outs = run_circuits(model, test_loader, [1], scores, PatchType.EDGE_PATCH)
    ablations = batch_src_ablations(model, test_loader, clean_corrupt="clean")
    for batch in test_loader:
        with patch_mode(model, ablations[batch.key], [edge]):
            expected = model(batch.corrupt)[model.out_slice]
        t.testing.assert_close(outs[1][batch.key], expected)


def test_a_prefix_cache_changes_no_number() -> None:
    scores = None
    found = []
    for tail_divergence in (False, True):
        _, test_loader = loaders(tail_divergence=tail_divergence)
        model = patchable_model(
            pocket_model(),
            factorized=True,
            slice_output="last_seq",
            separate_qkv=True,
            kv_caches=(test_loader.kv_cache, test_loader.kv_cache),
        )
        assert (test_loader.kv_cache is not None) == tail_divergence
        scores = scores or model.circuit_prune_scores(
            edge_dict={name: 1.0 + idx for idx, name in enumerate(CIRCUIT)}
        )
        outs = run_circuits(
            model=model,
            dataloader=test_loader,
            test_edge_counts=edge_counts_util(model.edges, prune_scores=scores),
            prune_scores=scores,
            patch_type=PatchType.EDGE_PATCH,
            ablation_type=AblationType.RESAMPLE,
        )
        found.append(
            t.tensor(
                [
                    *measure_kl_div(model, test_loader, outs),
                    *measure_answer_diff(model, test_loader, outs, "logits"),
                ]
            )
        )
    t.testing.assert_close(*found)
    assert len(found[0]) == 2 * (len(CIRCUIT) + 2)


def micro_loader(**options: Any) -> PromptDataLoader:
    clean = t.tensor([[[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]]).repeat(2, 1, 1)
    clean[1] *= 2
    answers = [t.tensor([1])] * 2
    dataset = PromptDataset(clean, -clean, answers, [t.tensor([0])] * 2)
    return PromptDataLoader(dataset, seq_len=None, diverge_idx=0, **options)


def test_acdc_counts_its_circuit_by_infinite_scores() -> None:
    model = patchable_model(MicroModel(), True, "last_seq", separate_qkv=True)
    loader = micro_loader(batch_size=1)
    scores = acdc_prune_scores(
        model, loader, None, tao_exps=[-1], tao_bases=[1], faithfulness_target="mse"
    )
    flat = t.cat([value.flatten() for value in scores.values()])
    # By hand: every edge of this model carries something, so that none may go.
    assert flat.isinf().all() and (flat > 0).all() and len(flat) == model.n_edges == 13
    outs = run_circuits(model, loader, [13], scores, PatchType.TREE_PATCH)
    for batch in loader:
        t.testing.assert_close(
            outs[13][batch.key], batch.clean[:, -1] * t.tensor([25.0, 49.0])
        )


def test_deepcopies_are_patched_by_themselves() -> None:
    """Also after the model ran: two graphs of one model give the same node circuit."""
    bare = MicroModel()
    tokens, other = t.rand(2, 4, 3, 2).unbind(0)
    clean = bare(tokens)
    outs = []
    for factorized in (True, False):
        model = patchable_model(deepcopy(bare), factorized=factorized, seq_len=3)
        ablations = src_ablations(model, other, AblationType.RESAMPLE)
        set_all_masks(model, 0.0)
        for edge in model.edges:
            if edge.src.name == "B0.1":
                edge.patch_mask(model).data[edge.patch_idx] = 1.0
        with patch_mode(model, ablations):
            outs.append(model(tokens))
        copy = deepcopy(model)
        with patch_mode(copy, ablations):
            t.testing.assert_close(copy(tokens), outs[-1])
        set_all_masks(model, 0.0)
        with patch_mode(copy, ablations):
            t.testing.assert_close(copy(tokens), outs[-1])
    t.testing.assert_close(outs[0], outs[1])
    assert (outs[0] - clean).abs().max() > 0.1
