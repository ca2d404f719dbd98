"""Graphs and their errors: names, masks, architectures, contexts."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch as t
from torch import Tensor
from torch.nn import Linear, Module

from auto_circuit.errors import ConfigError, GraphError, ModelError
from auto_circuit.model_utils.micro_model_utils import MICRO_MODEL_ADAPTER, MicroModel
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import (
    graph_edges,
    mask_fn_mode,
    patch_mode,
    patchable_model,
    set_all_masks,
    set_mask_batch_size,
    train_mask_mode,
    unpatch,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import CLEAN, micro_model
from tests.models import gpt2, llama, pythia, tokens


def model(seq_len: int | None = None) -> PatchableModel:
    return patchable_model(gpt2(), True, "last_seq", seq_len, separate_qkv=True)


# ------------------------------------------------------------------------- edge names


def test_scores_from_names_and_edges() -> None:
    graph = model()
    edge = graph.find_edges("A0.1->MLP 1")[0]
    for scores in (
        graph.circuit_prune_scores(edge_dict={"A0.1->MLP 1": 2.0}),
        graph.circuit_prune_scores(edge_dict={edge: 2.0}),
    ):
        assert float(edge.prune_score(scores)) == 2.0
        assert sum(float(values.sum()) for values in scores.values()) == 2.0
    chosen = graph.circuit_prune_scores(edges=[edge], bool=True)
    assert (
        bool(edge.prune_score(chosen)) and chosen["blocks.1.hook_mlp_in"].dtype == t.bool
    )
    with pytest.raises(ConfigError, match="Give either `edges` or `edge_dict`"):
        graph.circuit_prune_scores()


@pytest.mark.parametrize("wrong", ["A0.1->MLP1", "A0.1 -> MLP 1", "A0.9->MLP 1"])
def test_an_unknown_edge_name_has_near_matches(wrong: str) -> None:
    graph = model()
    message = rf"no edge '{wrong}'.*Did you mean.*->MLP 1"
    with pytest.raises(GraphError, match=message):
        graph.circuit_prune_scores(edges=[wrong])
    patch = src_ablations(graph, tokens(1, 5))
    with pytest.raises(GraphError, match=message), patch_mode(graph, patch, [wrong]):
        pass


def test_an_edge_of_another_graph() -> None:
    other = patchable_model(gpt2(), True, separate_qkv=False).find_edges("A0.1->A1.0")[0]
    with pytest.raises(GraphError, match="no edge"):
        model().find_edges(other)


def test_a_name_without_position_means_all_and_says_so() -> None:
    graph = model(seq_len=5)
    with pytest.warns(UserWarning, match="means the edge at all 5 positions"):
        assert len(graph.find_edges("A0.1->MLP 1")) == 5
    (edge,) = graph.find_edges("A0.1->MLP 1 @ 3")
    assert edge.seq_idx == 3
    with pytest.raises(GraphError, match="The graph has 5 positions"):
        graph.find_edges("A0.1->MLP 1 @ 5")
    with pytest.raises(GraphError, match="does not tell positions apart"):
        model().find_edges("A0.1->MLP 1 @ 3")


# ------------------------------------------------------------------------------- masks


def test_patch_masks_stay_true_when_masks_get_a_batch_dimension() -> None:
    graph = model()
    before = graph.patch_masks
    with set_mask_batch_size(graph, 3):
        now = graph.patch_masks
        assert all(now[name] is mask for name, mask in before.items())
        assert {mask.shape[0] for mask in before.values()} == {3}
        with train_mask_mode(graph) as masks:
            patch = src_ablations(graph, tokens(3, 5, seed=2))
            with patch_mode(graph, patch):
                graph(tokens(3, 5, seed=1)).square().sum().backward()
            assert all(mask.grad is not None for mask in masks.values())
            grad = masks["blocks.1.hook_mlp_in"].grad
            assert grad is not None and not t.allclose(grad[0], grad[1])
        with (
            pytest.raises(ConfigError, match="has a batch dimension already"),
            set_mask_batch_size(graph, 2),
        ):
            pass
    assert all(graph.patch_masks[name].shape == before[name].shape for name in before)
    with (
        pytest.raises(ConfigError, match="`batch_size` is 0"),
        set_mask_batch_size(graph, 0),
    ):
        pass


def test_masks_of_another_batch_or_length() -> None:
    graph = model(seq_len=5)
    patch = src_ablations(graph, tokens(2, 4))
    with (
        pytest.raises(
            GraphError, match="1 examples of 5 positions, but the input has 2 of 4"
        ),
        patch_mode(graph, patch),
    ):
        graph(tokens(2, 4))


# ----------------------------------------------------------------------- architectures


class Unknown(Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear(2, 2)


def test_an_unknown_architecture() -> None:
    with pytest.raises(
        ModelError, match="A Unknown cannot be patched.*Known: MicroModel"
    ):
        patchable_model(Unknown(), True)


class NotASum(MicroModel):
    """Its residual stream is not the sum of its sources."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        for block, resid in zip(self.blocks, self.resids, strict=True):
            x = resid(x * 2 + block(x))
        return self.output(x)


class MassiveActivations(MicroModel):
    """The first block writes 3e5, and the last one takes it away again."""

    def __init__(self) -> None:
        super().__init__()
        for block, size in ((self.blocks[0], 1e6 / 3), (self.blocks[-1], -1e6 / 3)):
            outputs: Any = block.head_outputs
            outputs.register_forward_hook(lambda _, __, out, size=size: out + size)


def test_activations_that_cancel() -> None:
    graph = patchable_model(MassiveActivations(), True)
    assert graph.n_edges == micro_model().n_edges


def test_a_sum_is_checked_in_half_precision() -> None:
    bridge = gpt2().to(t.bfloat16)
    patchable_model(bridge, True, separate_qkv=True)
    bridge.blocks[0].hook_out.register_forward_hook(lambda _, __, out: 3 * out)
    with pytest.raises(ModelError, match="is not the sum of its sources"):
        patchable_model(bridge, True, separate_qkv=True)


def test_a_token_that_is_embedded_as_zeros() -> None:
    """As the padding token of a model that was trained with one: nothing is written there."""
    bridge = llama()
    with t.no_grad():
        bridge.original_model.model.embed_tokens.weight[0] = 0
    graph = patchable_model(bridge, True, separate_qkv=True)
    assert graph.n_edges == patchable_model(llama(), True, separate_qkv=True).n_edges


class SkipsABlock(MicroModel):
    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.input(x))


def test_a_model_that_is_not_what_its_adapter_says() -> None:
    with pytest.raises(ModelError, match="sum"):
        patchable_model(NotASum(), True, adapter=MICRO_MODEL_ADAPTER)
    with pytest.raises(ModelError, match="blocks.0.head_"):
        patchable_model(SkipsABlock(), True, adapter=MICRO_MODEL_ADAPTER)


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="is a PatchableModel already"):
        patchable_model(micro_model(), True)
    with pytest.raises(ConfigError, match="`separate_qkv`"):
        patchable_model(gpt2(), True)
    with pytest.raises(ConfigError, match="`seq_len` is 0"):
        patchable_model(MicroModel(), True, seq_len=0)


def test_parallel_attention_has_a_node_graph() -> None:
    graph = patchable_model(pythia(), False, separate_qkv=True)
    names = {edge.name for edge in graph.edges}
    assert {"A0.1->Resid Post 0", "MLP 0->Resid Post 0"} <= names


def test_graph_edges() -> None:
    nodes, srcs, dests, edge_dict, edges, seq_dim, seq_len = graph_edges(
        gpt2(), factorized=True, separate_qkv=True, seq_len=3
    )
    assert (seq_dim, seq_len) == (1, 3)
    assert set(nodes) == {*srcs, *dests}
    assert [edge for position in edge_dict.values() for edge in position] == list(edges)


# ---------------------------------------------------------------------------- contexts


def test_contexts_that_cannot_be_nested() -> None:
    graph = micro_model()
    patch = src_ablations(graph, CLEAN[None])
    with patch_mode(graph, patch):
        with pytest.raises(GraphError, match="`patch_mode` inside of"):
            with patch_mode(graph, patch):
                pass
        with pytest.raises(GraphError, match="leave the context first"):
            unpatch(graph)


def test_the_differences_of_a_pass_do_not_outlive_it() -> None:
    """They are the largest tensors; they must not wait for the garbage collector."""
    graph = model()
    clean, patch = tokens(2, 5, seed=1), src_ablations(graph, tokens(2, 5, seed=2))
    gc.disable()
    try:
        with train_mask_mode(graph), patch_mode(graph, patch):
            output = graph(clean)
            output.square().sum().backward()
            session = graph.patch_session
            assert session is not None and session.forward_pass is not None
            differences = weakref.ref(session.forward_pass.diff)
            assert differences() is not None
        assert differences() is None
    finally:
        gc.enable()


def test_a_pass_can_be_differentiated_after_the_context() -> None:
    graph = model()
    clean, patch = tokens(2, 5, seed=1), src_ablations(graph, tokens(2, 5, seed=2))
    grads = []
    with train_mask_mode(graph) as masks:
        for inside in (True, False):
            with patch_mode(graph, patch):
                loss = graph(clean).square().sum()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            grads.append({name: mask.grad for name, mask in masks.items()})
            for mask in masks.values():
                mask.grad = None
    for name, grad in grads[0].items():
        assert grad is not None and (grad != 0).any()
        t.testing.assert_close(grads[1][name], grad)


def test_hooks_that_would_never_be_called_are_an_error() -> None:
    bridge = gpt2()
    model = patchable_model(bridge, True, separate_qkv=True)
    inputs = tokens(2, 5)
    handle = bridge.blocks[1].attn.hook_q_input.register_forward_hook(lambda *_: None)
    text = r"a hook at `blocks.1.attn.hook_q_input`.*not pass while edges are patched"
    with pytest.raises(ModelError, match=text):
        src_ablations(model, inputs)
    handle.remove()
    assert src_ablations(model, inputs).isfinite().all()


def test_dropout_acts_in_train_mode_only() -> None:
    model = micro_model()
    wrapper = model.wrapper("output")
    with train_mask_mode(model, requires_grad=False), mask_fn_mode(model, None, 0.5):
        set_all_masks(model, 0.6)
        wrapper.eval()
        weights = wrapper.mask_weights(1).clone()
    t.testing.assert_close(weights, t.full_like(weights, 0.6))


def test_a_wrapper_keeps_the_mask_of_the_first_example() -> None:
    wrapper = micro_model().wrapper("output")
    wrapper.set_mask_batch_size(2)
    wrapper.mask.data.copy_(t.tensor([0.2, 0.7])[:, None].expand(2, 5))
    wrapper.set_mask_batch_size(None)
    t.testing.assert_close(wrapper.mask.data, t.full((5,), 0.2))


def test_masks_go_to_a_device_that_is_there() -> None:
    with pytest.raises(ConfigError, match="`device` is 'cuda:99', which cannot be used"):
        patchable_model(micro_model().wrapped_model, True, device="cuda:99")
