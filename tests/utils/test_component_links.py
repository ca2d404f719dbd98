"""What a destination feeds: against what changes with it, and where nodes say nothing."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch as t
from torch import Tensor
from torch.nn import Identity, Module, Parameter
from transformers import OlmoeConfig, OlmoeForCausalLM

from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.metrics.circuit_pruning import connected_circuit, weighted_edge_count
from auto_circuit.model_utils.micro_model_utils import (
    MICRO_MODEL_ADAPTER,
    MicroModel,
    factorized_dest_nodes,
    factorized_src_nodes,
)
from auto_circuit.model_utils.model_adapter import ModelAdapter
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
    sae_model,
)
from auto_circuit.model_utils.transformer_lens_utils import TRANSFORMER_BRIDGE_ADAPTER
from auto_circuit.prune_algos.head_importance import edge_scores_of_nodes
from auto_circuit.types import Component, DestNode, Edge, Node, SrcNode
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.component_links import component_srcs, fed_links
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from tests.model_utils.test_adapters import all_fed, changed_srcs
from tests.models import N_HEADS, SIZES, _bridge, gemma2, gpt2, llama, pythia

SEQ = 4


def with_autoencoders(make: Callable[[], Any], sae_input: Any) -> Callable[[], Any]:
    def made() -> Any:
        model = sae_model(make(), sae_input, load_pretrained=False, n_latents=4)
        for sae in model.saes.values():
            sae.latent_bias.data += 1.0  # so that every latent is active somewhere
        return model

    return made


def olmoe() -> Any:
    """A norm runs over the queries of all heads, and one over the keys; then heads add up."""
    config = OlmoeConfig(**SIZES, num_experts=2, num_experts_per_tok=1)
    config._experts_implementation = "eager"
    return _bridge(OlmoeForCausalLM(config))


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "pythia": pythia,
    "gemma2": gemma2,
    "olmoe": olmoe,
    "latents": with_autoencoders(gpt2, "mlp_post_act"),
    "parallel latents": with_autoencoders(pythia, "resid_delta_mlp"),
}
FAST = ("olmoe",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MODELS],
)
@pytest.mark.parametrize(
    "separate_qkv", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_destinations_feed_what_changes_with_them(name: str, separate_qkv: bool) -> None:
    model = patchable_model(MODELS[name](), True, None, SEQ, separate_qkv=separate_qkv)
    assert changed_srcs(model, 1, SEQ) == all_fed(model, 1, SEQ)


# ------------------------------------------------------------- nodes that say little


def adapter_of(change: Callable[[Any], Any], factorized: bool = True) -> ModelAdapter:
    """The micro model's adapter, with changed nodes."""

    def graph_nodes(model: Module, factorized: bool, separate_qkv: Any) -> Any:
        srcs, dests = MICRO_MODEL_ADAPTER.graph_nodes(model, factorized, separate_qkv)
        return [change(src) for src in srcs], [change(dest) for dest in dests]

    return replace(MICRO_MODEL_ADAPTER, name="Hand-made", graph_nodes=graph_nodes)


def micro(change: Callable[[Any], Any], seq_len: int | None = None) -> PatchableModel:
    return patchable_model(
        MicroModel(), True, adapter=adapter_of(change), seq_len=seq_len
    )


def say_nothing(node: Any) -> Any:
    return replace(node, component=None, heads=None)


def rename(node: Any) -> Any:
    """Names without a system, and another one for the two sides of a head."""
    kind = "reads" if isinstance(node, DestNode) else "writes"
    return replace(node, name=f"{kind} {node.module_name} nr {node.head_idx}")


def test_nodes_that_say_nothing_belong_together_by_equal_names() -> None:
    model, told = micro(say_nothing), micro(lambda node: node)
    assert fed_links(model) == fed_links(told)
    scores = t.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    expected = edge_scores_of_nodes(told, scores)
    for name, found in edge_scores_of_nodes(model, scores).items():
        assert t.equal(found, expected[name])


def test_names_mean_nothing_where_nodes_say_what_they_are() -> None:
    told, renamed = micro(lambda node: node), micro(rename)
    for share in (0.3, 0.6):
        generator = t.Generator().manual_seed(1)
        circuit = {
            name: t.rand(mask.shape, generator=generator) < share
            for name, mask in told.patch_masks.items()
        }
        expected = connected_circuit(told, circuit)
        for name, found in connected_circuit(renamed, circuit).items():
            assert t.equal(found, expected[name])


def test_names_of_a_transformer_mean_nothing() -> None:
    def graph_nodes(model: Module, factorized: bool, separate_qkv: Any) -> Any:
        nodes = TRANSFORMER_BRIDGE_ADAPTER.graph_nodes(model, factorized, separate_qkv)
        return [rename(src) for src in nodes[0]], [rename(dest) for dest in nodes[1]]

    adapter = replace(TRANSFORMER_BRIDGE_ADAPTER, graph_nodes=graph_nodes)
    told, renamed = (
        patchable_model(llama(), True, "last_seq", 3, True, adapter=used)
        for used in (None, adapter)
    )
    generator = t.Generator().manual_seed(1)
    circuit = {
        name: t.rand(mask.shape, generator=generator) < 0.2
        for name, mask in told.patch_masks.items()
    }
    expected = connected_circuit(told, circuit)
    n_edges = sum(int(edges.sum()) for edges in expected.values())
    assert 0 < n_edges < sum(int(edges.sum()) for edges in circuit.values())
    for name, found in connected_circuit(renamed, circuit).items():
        assert t.equal(found, expected[name])


def test_nodes_that_say_nothing_and_share_no_name() -> None:
    model = micro(lambda node: rename(say_nothing(node)))
    circuit = model.circuit_prune_scores([], bool=True)
    with pytest.raises(
        GraphError, match=r"source 'writes.*in the middle.*says no compon"
    ):
        connected_circuit(model, circuit)
    with pytest.raises(GraphError, match=r"`component=Component\(kind, block, positions"):
        edge_scores_of_nodes(model, t.zeros(5))
    # What does not need to know works.
    assert model.n_edges == 13
    assert all(fed == () for fed in component_srcs(model).values())


def test_a_component_that_only_one_side_says() -> None:
    def half(node: Any) -> Any:
        return say_nothing(node) if isinstance(node, SrcNode) else node

    with pytest.raises(GraphError, match="'B0.0' is in the middle.*says no component"):
        fed_links(micro(half))

    def misspelt(node: Any) -> Any:
        if isinstance(node, DestNode) and node.component and node.kind == "heads":
            return replace(node, component=replace(node.component, kind="head"))
        return node

    with pytest.raises(GraphError, match="no destination feeds it: it is of Component"):
        fed_links(micro(misspelt))


def test_a_component_of_two_blocks() -> None:
    def one_for_all(node: Any) -> Any:
        if node.kind != "heads":
            return node
        return replace(node, component=Component("heads"))

    with pytest.raises(GraphError, match="layer 1, before the destination in layer 2"):
        fed_links(micro(one_for_all))


def test_heads_that_nobody_says() -> None:
    model = micro(lambda node: replace(node, heads=None))
    with pytest.raises(GraphError, match="a `head_idx`, but not both say which `heads`"):
        fed_links(model)


def test_positions_that_nobody_says() -> None:
    names = ["Resid Start->B0.1 @ 1", "B0.1->Resid End @ 1"]
    model = micro(say_nothing, seq_len=3)
    circuit = model.circuit_prune_scores(names, bool=True)
    with pytest.raises(
        GraphError, match=r"tells positions apart.*`positions` is \"own\""
    ):
        weighted_edge_count(model, circuit)
    told = micro(lambda node: node, seq_len=3)
    assert weighted_edge_count(told, circuit) == 2.0


def test_words_that_mean_nothing() -> None:
    def late(node: Any) -> Any:
        return forced(node, component=forced(node.component, positions="later"))

    with pytest.raises(
        ConfigError, match=r"`Resid Start.component.positions` is 'later'"
    ):
        micro(late)

    def short(node: Any) -> Any:
        return forced(node, head_input="q") if isinstance(node, DestNode) else node

    with pytest.raises(ConfigError, match=r"`B0.0.head_input` is 'q'; expected one of"):
        micro(short)


def forced(data: Any, **changes: Any) -> Any:
    """A changed copy, as an adapter without type checks would make it."""
    changed = copy(data)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    return changed


def test_what_nodes_say_is_no_part_of_their_identity() -> None:
    """Nodes of code that was written for auto-circuit are those of the graph."""
    model = micro(lambda node: node)
    (known,) = model.find_edges("B0.1->Resid End")
    src = SrcNode("B0.1", "blocks.0.head_outputs", 1, 1, 2, None, None, 2)
    dest = DestNode("Resid End", "output", 3, None, None, None, None, 0)
    assert (src, dest) == (known.src, known.dest)
    assert model.find_edges(Edge(src, dest)) == [known]
    assert Node("x", "y", 0).component is None


def test_a_key_of_a_group_and_a_query() -> None:
    model = patchable_model(llama(), True, None, separate_qkv=True)
    links = fed_links(model)
    fed = {dest.name: [link.src.name for link in links[dest]] for dest in model.dests}
    assert fed["A0.1.K"] == ["A0.2", "A0.3"]
    assert fed["A0.1.Q"] == ["A0.1"]
    assert fed["MLP 1"] == ["MLP 1"]
    assert fed["Resid End"] == []
    assert len(fed) == 2 * (N_HEADS + 2 * 2 + 1) + 1


# ------------------------------------------------------------ a cut residual stream


class CutModel(MicroModel):
    """Its residual stream after the first block is coded: latents and an error replace it."""

    def __init__(self) -> None:
        super().__init__()
        generator = t.Generator().manual_seed(0)
        self.directions = Parameter(t.randn(3, 2, generator=generator))
        self.latents, self.error = Identity(), Identity()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        x = self.input(x)
        x = self.resids[0](x + first(x))
        parts = (x @ self.directions.T).relu().unsqueeze(-1) * self.directions
        x = self.latents(parts).sum(2) + self.error(x - parts.sum(2))
        return self.output(self.resids[1](x + second(x)))


def cut_nodes(model: Module, factorized: bool, separate_qkv: Any) -> Any:
    code = Component("code", 0, "own")
    start, a, b, c, d = factorized_src_nodes(model)  # type: ignore[arg-type]
    latents = [
        SrcNode(f"L{i}", "latents", 2, i, 2, src_idx=3 + i, component=code)
        for i in range(3)
    ]
    error = SrcNode("Rest", "error", 2, src_idx=6, component=code)
    late = [replace(head, layer=3, src_idx=head.src_idx + 4) for head in (c, d)]
    *heads, end = factorized_dest_nodes(model)  # type: ignore[arg-type]
    cut = DestNode("Stream", "resids.0", 2, component=code)
    after = [replace(dest, layer=3, min_src_idx=3) for dest in heads[2:]]
    dests = [*heads[:2], cut, *after, replace(end, layer=4, min_src_idx=3)]
    return [start, a, b, *latents, error, *late], dests


CUT_ADAPTER = replace(MICRO_MODEL_ADAPTER, name="Cut", graph_nodes=cut_nodes)
CUT_CLEAN, CUT_CORRUPT = t.randn(2, 4, 3, 2, generator=t.Generator().manual_seed(3))


@pytest.mark.parametrize("seq_len", [None, 3])
def test_a_cut_of_the_residual_stream(seq_len: int | None) -> None:
    """Its code is fed by the stream, and is all that later destinations read."""
    model = patchable_model(CutModel(), True, None, seq_len, adapter=CUT_ADAPTER)
    patch = src_ablations(model, CUT_CORRUPT)
    for value, expected in ((0.0, CUT_CLEAN), (1.0, CUT_CORRUPT)):
        set_all_masks(model, value)
        with t.no_grad(), patch_mode(model, patch):
            found = model(CUT_CLEAN)
        t.testing.assert_close(found, model.wrapped_model(expected), rtol=1e-5, atol=1e-4)
    assert [edge.name for edge in model.edges if edge.src.name == "B0.1"][
        0
    ] == "B0.1->Stream"
    sizes = [0, 0]
    for seed in range(4):
        generator = t.Generator().manual_seed(seed)
        circuit = {
            name: t.rand(mask.shape, generator=generator) < 0.6
            for name, mask in model.patch_masks.items()
        }
        outs = []
        for i, kept in enumerate([circuit, connected_circuit(model, circuit)]):
            sizes[i] += sum(int(edges.sum()) for edges in kept.values())
            edges = [e for e in model.edges if not kept[e.dest.module_name][e.patch_idx]]
            with t.no_grad(), patch_mode(model, patch, edges):
                outs.append(model(CUT_CLEAN))
        t.testing.assert_close(*outs, rtol=1e-5, atol=1e-4)
    assert 0 < sizes[1] < sizes[0]


def test_each_latent_is_fed_by_the_cut_stream() -> None:
    model = patchable_model(CutModel(), True, None, adapter=CUT_ADAPTER)

    def n_live(*names: str) -> float:
        return weighted_edge_count(model, model.circuit_prune_scores(names, bool=True))

    assert n_live("Resid Start->Stream", "L1->Resid End") == 2
    assert n_live("Resid Start->Stream", "L1->B1.0", "B1.0->Resid End") == 3
    assert n_live("L1->Resid End", "Rest->Resid End") == 0
    assert n_live("Resid Start->Stream", "B0.0->Stream") == 0
    scores = edge_scores_of_nodes(model, t.tensor([9.0, 8, 7, 1, -5, 2, 3, 6, 4]))
    (into_stream,) = model.find_edges("B0.1->Stream")
    assert float(into_stream.prune_score(scores)) == -5.0
