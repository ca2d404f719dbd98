"""Known circuits on models of the right shape, whose weights are random and few."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch as t
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

import auto_circuit
from auto_circuit.data import PromptDataLoader, load_datasets_from_json
from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.metrics.official_circuits.circuits.circuit_tables import (
    GPT2_SMALL,
    circuit_graph,
)
from auto_circuit.metrics.official_circuits.circuits.docstring_official import (
    docstring_node_based_official_edges,
    docstring_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.greaterthan_official import (
    greaterthan_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.ioi_official import (
    ioi_head_based_official_edges,
    ioi_true_edges,
    ioi_true_edges_mlp_0_only,
)
from auto_circuit.metrics.official_circuits.circuits.sports_players_official import (
    sports_players_probe_true_edges,
    sports_players_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.tracr.reverse_official import (
    tracr_reverse_acdc_edges,
    tracr_reverse_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.tracr.xproportion_official import (
    tracr_xproportion_acdc_edges,
    tracr_xproportion_official_edges,
)
from auto_circuit.model_utils.tracr_model_utils import get_tracr_model
from auto_circuit.model_utils.transformer_lens_utils import native_bridge
from auto_circuit.prune import run_circuits
from auto_circuit.types import Edge, PatchType
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel

CircuitFunc = Callable[..., set[Edge]]

DATASETS = Path(__file__).parents[3] / "datasets"
IOI_WORDS = {"IO": 2, "S1": 4, "S1+1": 5, "S2": 10, "end": 14}
DOCSTRING_WORDS = {"A_def": 11, "B_def": 13, ",_B": 14, "C_def": 15}
DOCSTRING_WORDS |= {"A_doc": 27, "param_2": 33, "B_doc": 34, "param_3": 40}
SPORTS_WORDS = {"first_name_tok": 13, "final_name_tok": 15, "end": 19}


@cache
def gpt2_small(n_layers: int = 12, n_heads: int = 12) -> TransformerBridge:
    config = GPT2Config(
        n_layer=n_layers, n_head=n_heads, n_embd=24, vocab_size=50, n_positions=16
    )
    return build_bridge_from_module(
        GPT2LMHeadModel(config), "GPT2LMHeadModel", hf_config=config
    )


@cache
def attn_only_4l() -> TransformerBridge:
    config = TransformerBridgeConfig(
        n_layers=4,
        n_heads=8,
        d_model=16,
        d_head=2,
        n_ctx=16,
        d_vocab=50,
        attn_only=True,
        act_fn="relu",
        architecture="TransformerLensNative",
    )
    return native_bridge(config)


@cache
def pythia_2_8b() -> TransformerBridge:
    config = GPTNeoXConfig(
        num_hidden_layers=32,
        num_attention_heads=32,
        hidden_size=256,
        intermediate_size=8,
        vocab_size=50,
        max_position_embeddings=16,
    )
    return build_bridge_from_module(
        GPTNeoXForCausalLM(config), "GPTNeoXForCausalLM", hf_config=config
    )


@cache
def gpt2_graph(
    seq_len: int | None = None, separate_qkv: bool = True, factorized: bool = True
) -> PatchableModel:
    return patchable_model(
        gpt2_small(), factorized, seq_len=seq_len, separate_qkv=separate_qkv
    )


@cache
def docstring_graph(seq_len: int | None = None) -> PatchableModel:
    return patchable_model(attn_only_4l(), True, seq_len=seq_len, separate_qkv=True)


@cache
def sports_graph(seq_len: int | None = None) -> PatchableModel:
    return patchable_model(pythia_2_8b(), True, seq_len=seq_len, separate_qkv=False)


@cache
def tracr_graph(key: str, seq_len: int | None = None) -> PatchableModel:
    model, _ = get_tracr_model(key, "cpu")  # type: ignore[arg-type]
    return patchable_model(
        model, True, "not_first_seq", seq_len=seq_len, separate_qkv=True
    )


# ------------------------------------------------------------------------ edge counts


@pytest.mark.parametrize(
    ("circuit", "n_edges"),
    [
        (ioi_true_edges, 771),
        (ioi_true_edges_mlp_0_only, 242),
        (ioi_head_based_official_edges, 6540),
        (greaterthan_true_edges, 235),
    ],
)
def test_gpt2_circuits(circuit: CircuitFunc, n_edges: int) -> None:
    model = gpt2_graph()
    assert model.n_edges == 32491
    edges = circuit(model)
    assert len(edges) == n_edges
    assert edges <= model.edges


@pytest.mark.parametrize(
    ("circuit", "n_edges"),
    [
        (ioi_true_edges, 869),
        (ioi_true_edges_mlp_0_only, 266),
        (ioi_head_based_official_edges, 41328),
    ],
)
def test_gpt2_circuits_by_position(circuit: CircuitFunc, n_edges: int) -> None:
    model = gpt2_graph(seq_len=13)
    assert model.n_edges == 422383
    assert len(circuit(model, True, IOI_WORDS, seq_start_idx=2)) == n_edges


@pytest.mark.parametrize(
    ("graph", "n_edges", "positions"),
    [
        ({"separate_qkv": False}, 2340, ()),
        ({"factorized": False}, 62, ()),
        ({"factorized": False, "seq_len": 13}, 494, (True, IOI_WORDS, 2)),
    ],
)
def test_ioi_heads_in_other_graphs(
    graph: dict[str, bool | int], n_edges: int, positions: tuple[Any, ...]
) -> None:
    model = gpt2_graph(**graph)  # type: ignore[arg-type]
    edges = ioi_head_based_official_edges(model, *positions)
    assert len(edges) == n_edges
    assert edges <= model.edges


def test_docstring_circuits() -> None:
    model = docstring_graph()
    assert model.n_edges == 1281
    assert len(docstring_true_edges(model)) == 24
    assert len(docstring_node_based_official_edges(model)) == 588


def test_docstring_circuits_by_position() -> None:
    model = docstring_graph(seq_len=30)
    assert model.n_edges == 38430
    positions = (True, DOCSTRING_WORDS, 11)
    edges = docstring_true_edges(model, *positions)
    assert len(edges) == 34 and edges <= model.edges
    assert len(docstring_node_based_official_edges(model, *positions)) == 7565
    found = {repr(edge) for edge in edges if edge.name.startswith("A1.2->A3.0.K")}
    assert found == {"A1.2->A3.0.K @ 16", "A1.2->A3.0.K @ 23"}
    assert not any(edge.name == "Resid Start->A2.0.K" for edge in edges)


@pytest.mark.slow
def test_sports_players_circuits() -> None:
    model = sports_graph()
    assert model.n_edges == 542257
    assert len(sports_players_true_edges(model)) == 2276
    assert len(sports_players_probe_true_edges(model)) == 3600
    model = sports_graph(seq_len=7)
    assert model.n_edges == 3795799
    positions = (True, SPORTS_WORDS, 13)
    edges = sports_players_true_edges(model, *positions)
    assert len(edges) == 4518
    assert {edge.seq_idx for edge in edges} == {0, 1, 2, 6}
    assert len(sports_players_probe_true_edges(model, *positions)) == 5842


@pytest.mark.parametrize(
    ("key", "circuit", "n_edges", "n_positions"),
    [
        ("reverse", tracr_reverse_true_edges, 2, 4),
        ("reverse", tracr_reverse_acdc_edges, 10, 4),
        ("xproportion", tracr_xproportion_official_edges, 3, 5),
        ("xproportion", tracr_xproportion_acdc_edges, 5, 5),
    ],
)
def test_tracr_circuits(
    key: str, circuit: CircuitFunc, n_edges: int, n_positions: int
) -> None:
    assert len(circuit(tracr_graph(key))) == n_edges
    model = tracr_graph(key, seq_len=6)
    edges = circuit(model, token_positions=True)
    assert len(edges) == n_edges * n_positions
    assert edges <= model.edges
    assert 0 not in {edge.seq_idx for edge in edges}
    with pytest.raises(ConfigError, match="prompts of 6 tokens, not 5"):
        circuit(tracr_graph(key, seq_len=5), token_positions=True)


# ----------------------------------------------------------------------------- meaning


def test_ioi_edges_by_hand() -> None:
    names = {edge.name for edge in ioi_true_edges(gpt2_graph())}
    assert "A5.5->A7.3.K" in names and "A5.5->A7.3.Q" not in names
    assert "Resid Start->A9.9.V" in names and "Resid Start->A9.9.Q" not in names
    assert "A2.2->MLP 2" in names and "MLP 2->A5.5.K" in names
    assert "A9.9->Resid End" in names and "A7.3->Resid End" not in names
    # A duplicate token head of layer 0, and the MLPs up to S2 inhibition's last layer.
    assert "A0.1->MLP 7" in names and "A0.1->MLP 8" not in names


def test_ioi_mlps_before_the_output_depend_on_layers_not_on_positions() -> None:
    """auto-circuit left them out where no position of the end was given."""
    model = gpt2_graph()
    edges = ioi_true_edges(model)
    to_end = {edge.src.name for edge in edges if edge.dest.name == "Resid End"}
    assert {name for name in to_end if "MLP" in name} == {"MLP 9", "MLP 10", "MLP 11"}
    for end in (0, 9, 14):
        assert ioi_true_edges(model, word_idxs={**IOI_WORDS, "end": end}) == edges


def test_ioi_positions_count_from_the_end_of_the_prefix() -> None:
    short = ioi_true_edges(gpt2_graph(seq_len=13), True, IOI_WORDS, 2)
    long = ioi_true_edges(gpt2_graph(seq_len=15), True, IOI_WORDS)
    assert {(e.name, (e.seq_idx or 0) + 2) for e in short} == {
        (e.name, e.seq_idx) for e in long
    }
    to_end = {edge.seq_idx for edge in long if edge.dest.name == "Resid End"}
    assert to_end == {14}


def test_places_in_the_prefix_have_no_edges() -> None:
    model = gpt2_graph(seq_len=12)
    edges = ioi_true_edges(model, True, IOI_WORDS, seq_start_idx=3)
    all_edges = ioi_true_edges(gpt2_graph(seq_len=15), True, IOI_WORDS)
    assert len(edges) == sum(edge.seq_idx != IOI_WORDS["IO"] for edge in all_edges)


def test_without_token_positions_edges_are_kept_everywhere() -> None:
    names = {edge.name for edge in ioi_true_edges(gpt2_graph())}
    edges = ioi_true_edges(gpt2_graph(seq_len=3))
    assert {(edge.name, edge.seq_idx) for edge in edges} == {
        (name, seq_idx) for name in names for seq_idx in range(3)
    }
    edges = docstring_node_based_official_edges(docstring_graph(seq_len=30))
    assert len(edges) == 588 * 30


def test_a_node_circuit_leaves_out_the_other_heads_only() -> None:
    model = gpt2_graph()
    names = {edge.name for edge in ioi_head_based_official_edges(model)}
    heads = {name.partition("->")[0] for name in names if name.startswith("A")}
    assert len(heads) == 26 and {"A9.9", "A0.10", "A4.11"} <= heads
    for edge in model.edges:
        is_other_head = edge.src.head_idx is not None and edge.src.name not in heads
        assert (edge.name in names) != is_other_head


def tracr_loader(key: str, n_prompts: int = 32) -> PromptDataLoader:
    path = DATASETS / f"tracr/tracr_{key}_len_5_prompts.json"
    loader, _ = load_datasets_from_json(
        model=None,
        path=path,
        device=t.device("cpu"),
        prepend_bos=False,
        batch_size=min(n_prompts, 256),
        train_test_size=(n_prompts, 0),
    )
    return loader


def circuit_error(
    model: PatchableModel, edges: list[Edge], loader: PromptDataLoader
) -> Tensor:
    """How far each position is off, at most, when all other edges carry another prompt."""
    scores = model.circuit_prune_scores(edges)
    outs = run_circuits(model, loader, [len(edges)], scores, PatchType.TREE_PATCH)
    errors = [
        (outs[len(edges)][batch.key] - model(batch.clean)[model.out_slice]).abs()
        for batch in loader
    ]
    return t.cat(errors).amax(dim=(0, 2))


@pytest.mark.parametrize(
    ("key", "circuit"),
    [
        ("reverse", tracr_reverse_true_edges),
        ("xproportion", tracr_xproportion_official_edges),
    ],
)
@pytest.mark.parametrize("seq_len", [None, 6])
def test_the_tracr_circuits_do_the_whole_task(
    key: str, circuit: CircuitFunc, seq_len: int | None
) -> None:
    """On every input that there is, and not without any of its edges."""
    model = tracr_graph(key, seq_len)
    edges = sorted(circuit(model, token_positions=seq_len is not None))
    every_input = tracr_loader(key, {"reverse": 3**5, "xproportion": 4**5}[key])
    errors = circuit_error(model, edges, every_input)
    if key == "reverse" and seq_len is not None:
        # The published circuit leaves the middle token out, which stays where it is.
        assert errors[2] == pytest.approx(1.0, abs=1e-4)
        errors = errors[[0, 1, 3, 4]]
    assert errors.max() < 1e-5
    some_inputs = tracr_loader(key)
    for edge in edges:
        less = [other for other in edges if other != edge]
        assert circuit_error(model, less, some_inputs).max() > 0.1


# ------------------------------------------------------------------------------ errors


def test_a_model_of_another_shape() -> None:
    model = patchable_model(gpt2_small(2, 4), True, separate_qkv=True)
    for circuit in (ioi_true_edges, ioi_head_based_official_edges):
        with pytest.raises(
            ConfigError, match="12 layers of 12 heads.* 8 heads and 2 MLP"
        ):
            circuit(model)
    with pytest.raises(ConfigError, match="attn-only-4l.* 4 layers of 8 heads and 0 MLP"):
        docstring_true_edges(model)


def test_a_graph_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="Make the model.*`separate_qkv=True`"):
        greaterthan_true_edges(gpt2_graph(separate_qkv=False))
    with pytest.raises(ConfigError, match="Make the model.*`factorized=True`"):
        ioi_true_edges(gpt2_graph(factorized=False))


def test_positions_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="does not tell positions apart"):
        ioi_true_edges(gpt2_graph(), token_positions=True, word_idxs=IOI_WORDS)
    model = gpt2_graph(seq_len=13)
    with pytest.raises(ConfigError, match=r"'S1\+1', 'S2'.*lacks; it has \['IO', 'S1'"):
        ioi_true_edges(model, True, {"IO": 2, "S1": 4, "end": 14}, 2)
    with pytest.raises(ConfigError, match="position 14.*13 positions from 0 on"):
        ioi_true_edges(model, True, IOI_WORDS)


def test_edges_that_a_table_may_not_have() -> None:
    graph = circuit_graph(gpt2_graph(), GPT2_SMALL, False, {}, 0)
    with pytest.raises(GraphError, match="node 'A9.12', which the graph has not"):
        graph.edges(["A9.12->Resid End"], None)
    with pytest.raises(GraphError, match="A9.9 does not run before MLP 0"):
        graph.edges(["A9.9->MLP 0"], None)


def test_the_words_of_the_prompt_files_are_those_of_the_circuits() -> None:
    path = DATASETS / "ioi/ioi_vanilla_template_prompts.json"
    word_idxs = json.loads(path.read_text())["word_idxs"]
    with_bos = {word: idx + 1 for word, idx in word_idxs.items()}
    assert with_bos.items() >= IOI_WORDS.items()


# ------------------------------------------------------------------------------- words


def test_the_circuit_that_is_known_is_the_true_edges() -> None:
    """One word for one thing. The published library's names stay, such as `official_edges`."""
    package = Path(auto_circuit.__file__).parent
    synonyms = re.compile(r"known circuit|ground truth|official (circuit|edges)", re.I)
    of_upstream = {package / "prune_algos" / "ground_truth.py"}
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    assert {path for path, text in texts.items() if synonyms.search(text)} == of_upstream
