"""Circuits as files: what is written can be read, by us and by people; what is wrong is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit.circuit_files import (
    load_circuit,
    load_mib_circuit,
    model_fingerprint,
    save_circuit,
    save_mib_circuit,
    scored_edges,
)
from auto_circuit.errors import ConfigError, DataError, GraphError
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
    AutoencoderTransformer,
    sae_model,
)
from auto_circuit.model_utils.transformer_lens_utils import WHOLE_ATTENTION_ADAPTER
from auto_circuit.types import PruneScores
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_model
from tests.models import ARCHITECTURES, N_HEADS, N_LAYERS, attn_only, gpt2, llama


def random_scores(model: PatchableModel, seed: int = 0) -> PruneScores:
    generator = t.Generator().manual_seed(seed)
    return {
        name: t.randn(scores.shape, generator=generator)
        for name, scores in model.new_prune_scores().items()
    }


def assert_equal(found: PruneScores, expected: PruneScores) -> None:
    assert list(found) == list(expected)
    for name, scores in expected.items():
        assert t.equal(found[name], scores), name


@pytest.fixture(scope="module")
def gpt2_model() -> PatchableModel:
    return patchable_model(gpt2(), factorized=True, separate_qkv=True)


@pytest.fixture(scope="module")
def llama_model() -> PatchableModel:
    return patchable_model(llama(), factorized=True, separate_qkv=True)


def edited(path: Path, **changes: Any) -> Path:
    """The file as somebody writes it by hand: without a checksum."""
    content = {**json.loads(path.read_text()), **changes}
    content.pop("checksum", None)
    path.write_text(json.dumps(content))
    return path


# ----------------------------------------------------------------------- scored edges


@pytest.mark.parametrize("factorized", [True, False])
@pytest.mark.parametrize("seq_len", [None, 3])
def test_scored_edges_are_those_above_the_threshold(
    factorized: bool, seq_len: int | None
) -> None:
    model = micro_model(factorized, seq_len=seq_len)
    scores = random_scores(model)
    expected = [
        (edge, float(edge.prune_score(scores)))
        for edge in model.edges
        if abs(float(edge.prune_score(scores))) >= 0.5
    ]
    assert 0 < len(expected) < model.n_edges
    assert scored_edges(model, scores, 0.5) == expected
    assert len(scored_edges(model, scores)) == model.n_edges


def test_scored_edges_makes_no_other_edges() -> None:
    model = micro_model(seq_len=4000)
    scores = model.new_prune_scores(0.001)
    scores["output"][3999, 4] = -2.0
    assert model.n_edges == 52_000
    ((edge, score),) = scored_edges(model, scores, 1)
    assert (repr(edge), score) == ("B1.1->Resid End @ 3999", -2.0)
    assert "edge_dict" not in vars(model)


def test_scores_that_do_not_fit() -> None:
    model = micro_model()
    with pytest.raises(GraphError, match="lack 3 of .* 'blocks.0.head_inputs'"):
        scored_edges(model, {})
    scores = model.new_prune_scores()
    with pytest.raises(
        GraphError, match="'output' have shape .3,.; the graph needs .5,."
    ):
        scored_edges(model, {**scores, "output": t.zeros(3)})
    with pytest.raises(GraphError, match="'outpur', which is no destination"):
        scored_edges(model, {**scores, "outpur": t.zeros(5)})
    scores["output"][0] = math.nan
    with pytest.raises(GraphError, match="'output' hold NaN"):
        scored_edges(model, scores)


# ------------------------------------------------------------------------- our format


@pytest.mark.parametrize("seq_len", [None, 3])
def test_round_trip(tmp_path: Path, seq_len: int | None) -> None:
    model = micro_model(seq_len=seq_len)
    scores = random_scores(model)
    scores["output"].view(-1)[0] = math.inf
    scores["output"].view(-1)[1] = -math.inf
    save_circuit(tmp_path / "circuit.json", model, scores)
    assert_equal(load_circuit(tmp_path / "circuit.json", model), scores)


def test_the_file_can_be_read_by_people(tmp_path: Path) -> None:
    model = micro_model(seq_len=2)
    scores = model.circuit_prune_scores(
        edge_dict={"B0.1->B1.0 @ 1": -0.25, "Resid Start->Resid End @ 0": 2.0}
    )
    save_circuit(tmp_path / "circuit.json", model, scores, task="Mine")
    content = json.loads((tmp_path / "circuit.json").read_text())
    assert content["edges"] == {
        "Resid Start->Resid End @ 0": 2.0,
        "B0.1->B1.0 @ 1": -0.25,
    }
    assert content["version"] == 1
    assert content["task"] == "Mine"
    assert content["model"]["name"] == "MicroModel"
    assert content["model"]["seq_len"] == 2
    assert content["model"]["n_edges"] == 26


def test_edges_of_a_circuit_have_score_1(tmp_path: Path) -> None:
    model = micro_model()
    save_circuit(tmp_path / "c.json", model, ["B0.0->B1.1", "B1.1->Resid End"])
    loaded = load_circuit(tmp_path / "c.json", model)
    names = {edge.name: score for edge, score in scored_edges(model, loaded)}
    assert names == {"B0.0->B1.1": 1.0, "B1.1->Resid End": 1.0}


def test_a_transformers_fingerprint(
    gpt2_model: PatchableModel, llama_model: PatchableModel
) -> None:
    fingerprint = model_fingerprint(gpt2_model)
    assert fingerprint["n_layers"] == N_LAYERS
    assert fingerprint["n_heads"] == N_HEADS
    assert fingerprint["separate_qkv"] is True
    assert model_fingerprint(llama_model)["n_key_value_heads"] == 2
    assert model_fingerprint(llama_model) != fingerprint


def test_a_circuit_of_another_model_or_graph(
    tmp_path: Path, gpt2_model: PatchableModel, llama_model: PatchableModel
) -> None:
    path = tmp_path / "circuit.json"
    save_circuit(path, gpt2_model, random_scores(gpt2_model))
    with pytest.raises(GraphError, match="made for another model.*architecture is 'GPT2"):
        load_circuit(path, llama_model)
    save_circuit(path, micro_model(seq_len=3), [])
    with pytest.raises(GraphError, match="seq_len is 3, here None"):
        load_circuit(path, micro_model())


def test_a_circuit_of_a_model_of_another_name(tmp_path: Path) -> None:
    model, path = micro_model(), tmp_path / "circuit.json"
    save_circuit(path, model, ["B0.0->B1.1"])
    edited(path, model={**model_fingerprint(model), "name": "Other"})
    with pytest.raises(GraphError, match="name is 'Other'.*any_model_name=True"):
        load_circuit(path, model)
    loaded = load_circuit(path, model, any_model_name=True)
    assert loaded["blocks.1.head_inputs"].tolist() == [[0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    "name,seq_len,message",
    [
        ("B0.0->B1.7", None, "no edge 'B0.0->B1.7'. Did you mean 'B0.0->B1"),
        ("B1.0->B0.0", None, "no edge 'B1.0->B0.0'"),
        ("B0.0->B0.0", None, "no edge 'B0.0->B0.0'"),
        ("B0.0->B0.1", None, "no edge 'B0.0->B0.1'"),
        ("B0.0->B1.1 @ 0", None, "does not tell positions apart"),
        ("B0.0->B1.1 @ 3", 3, "has 3 positions"),
        ("B0.0->B1.1 @ x", 3, "no edge 'B0.0->B1.1 @ x'"),
        ("B0.0->B1.1", 3, "has no position"),
        ("nonsense", None, "no edge 'nonsense'"),
    ],
)
def test_unknown_edges(
    tmp_path: Path, name: str, seq_len: int | None, message: str
) -> None:
    model, path = micro_model(seq_len=seq_len), tmp_path / "circuit.json"
    save_circuit(path, model, [])
    with pytest.raises(GraphError, match=message) as error:
        load_circuit(edited(path, edges={name: 1.0}), model)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"format": "else"}, "not a circuit file"),
        ({"version": 2}, "has format version 2; .* reads version 1"),
        ({"model": None}, '"model" must say'),
        ({"edges": ["B0.0->B1.1"]}, '"edges" must map'),
        ({"edges": {"B0.0->B1.1": "much"}}, "score of 'B0.0->B1.1' is 'much'"),
        ({"edges": {"B0.0->B1.1": True}}, "score of 'B0.0->B1.1' is True"),
        ({"edges": {"B0.0->B1.1": 10**400}}, "score of 'B0.0->B1.1' is 1000"),
        ({"edges": {"B0.0->B1.1": math.nan}}, "has the number NaN"),
    ],
)
def test_malformed_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model, path = micro_model(), tmp_path / "circuit.json"
    save_circuit(path, model, [])
    with pytest.raises(DataError, match=message):
        load_circuit(edited(path, **changes), model)


def test_files_that_are_not_json(tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    with pytest.raises(DataError, match="^There is no file"):
        load_circuit(path, micro_model())
    path.write_text('{"format": ')
    with pytest.raises(DataError, match="is not JSON"):
        load_circuit(path, micro_model())
    path.write_bytes(b"\xff\x00\xfe")
    with pytest.raises(DataError, match="is not JSON"):
        load_circuit(path, micro_model())
    path.write_text("[]")
    with pytest.raises(DataError, match="not a circuit file"):
        load_circuit(path, micro_model())


def test_nothing_is_written_if_the_circuit_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(GraphError):
        save_circuit(tmp_path / "c.json", micro_model(), {})
    with pytest.raises(GraphError):
        save_circuit(tmp_path / "c.json", micro_model(), ["B9.9->Resid End"])
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- MIB


def test_mib_json(tmp_path: Path, gpt2_model: PatchableModel) -> None:
    scores = gpt2_model.circuit_prune_scores(
        edge_dict={
            "Resid Start->A0.1.Q": 3.0,
            "A0.1->A1.2.K": -2.0,
            "A1.2->MLP 1": 0.5,
            "MLP 1->Resid End": 0.25,
        }
    )
    save_mib_circuit(tmp_path / "c.json", gpt2_model, scores, edge_count=2)
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["cfg"] == {
        "n_layers": N_LAYERS,
        "n_heads": N_HEADS,
        "parallel_attn_mlp": False,
        "d_model": 32,
    }
    edges = content["edges"]
    assert len(edges) == gpt2_model.n_edges
    assert edges["input->a0.h1<q>"] == {"score": 3.0, "in_graph": True}
    assert edges["a0.h1->a1.h2<k>"] == {"score": -2.0, "in_graph": True}
    assert edges["a1.h2->m1"] == {"score": 0.5, "in_graph": False}
    assert edges["m1->logits"] == {"score": 0.25, "in_graph": False}
    assert sum(edge["in_graph"] for edge in edges.values()) == 2
    nodes = {name for name, node in content["nodes"].items() if node["in_graph"]}
    assert nodes == {"input", "a0.h1", "a1.h2", "logits"}
    assert len(content["nodes"]) == 2 + N_LAYERS * (N_HEADS + 1)


def test_mib_tensors(tmp_path: Path, gpt2_model: PatchableModel) -> None:
    """Sources: input, then each layer's heads and MLP. Destinations: q, k, v, MLP."""
    scores = gpt2_model.circuit_prune_scores(
        edge_dict={"A0.1->A1.2.K": -2.0, "MLP 1->Resid End": 0.25}
    )
    save_mib_circuit(tmp_path / "c.pt", gpt2_model, scores)
    content = t.load(tmp_path / "c.pt", weights_only=True)
    n_srcs, n_dsts = 1 + 2 * (4 + 1), 2 * (3 * 4 + 1) + 1
    assert content["edges_scores"].shape == (n_srcs, n_dsts)
    assert content["src_nodes"][:7] == "input a0.h0 a0.h1 a0.h2 a0.h3 m0 a1.h0".split()
    assert content["dst_nodes"][3:6] == ["a0.h3<q>", "a0.h0<k>", "a0.h1<k>"]
    expected = t.zeros(n_srcs, n_dsts)
    expected[2, 13 + 4 + 2] = -2.0
    expected[n_srcs - 1, n_dsts - 1] = 0.25
    assert t.equal(content["edges_scores"], expected)
    assert t.equal(content["edges_in_graph"], expected != 0)
    assert content["nodes_in_graph"].nonzero().flatten().tolist() == [2, 8, 10]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "attn_only"])
@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_mib_round_trip(tmp_path: Path, name: str, suffix: str) -> None:
    model = patchable_model(ARCHITECTURES[name](), factorized=True, separate_qkv=True)
    scores, path = random_scores(model), tmp_path / f"circuit{suffix}"
    save_mib_circuit(path, model, scores, edge_count=20)
    assert_equal(load_mib_circuit(path, model), scores)
    circuit = load_mib_circuit(path, model, in_graph=True)
    best = sorted(scored_edges(model, scores), key=lambda item: -abs(item[1]))[:20]
    expected = model.circuit_prune_scores(edges=[edge for edge, _ in best])
    assert_equal(circuit, expected)


def test_mib_grouped_query_attention(tmp_path: Path, llama_model: PatchableModel) -> None:
    """Two query heads share a key: each has half of its score, and they add up."""
    scores = llama_model.circuit_prune_scores(
        edge_dict={"Resid Start->A0.1.K": 1.0, "Resid Start->A0.3.Q": 5.0}
    )
    path = tmp_path / "c.json"
    save_mib_circuit(path, llama_model, scores)
    edges = json.loads(path.read_text())["edges"]
    found = {name: edge["score"] for name, edge in edges.items() if edge["in_graph"]}
    assert found == {
        "input->a0.h2<k>": 0.5,
        "input->a0.h3<k>": 0.5,
        "input->a0.h3<q>": 5.0,
    }
    edges["input->a0.h2<k>"]["score"] = 2.0
    loaded = load_mib_circuit(edited(path, edges=edges), llama_model)
    assert loaded["blocks.0.hook_k_input"].tolist() == [[0.0], [2.5]]


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_mib_ungrouped_attention(tmp_path: Path, suffix: str) -> None:
    """Every key has its own score, and circuits are as large as the benchmark's."""
    model = patchable_model(llama(), factorized=True, separate_qkv=True, ungroup=True)
    scores, path = random_scores(model), tmp_path / f"circuit{suffix}"
    scores["blocks.0.hook_k_input"][:, 0] = t.tensor([10.0, 20.0, 30.0, 40.0])
    save_mib_circuit(path, model, scores, edge_count=3)
    assert_equal(load_mib_circuit(path, model), scores)
    circuit = load_mib_circuit(path, model, in_graph=True)
    assert circuit["blocks.0.hook_k_input"].tolist() == [[0.0], [1.0], [1.0], [1.0]]
    assert sum(edges.sum() for edges in circuit.values()) == 3
    if suffix == ".json":
        edges = json.loads(path.read_text())["edges"]
        assert len(edges) == model.n_edges == 110
        assert edges["input->a0.h2<k>"] == {"score": 30.0, "in_graph": True}


def test_a_circuit_of_groups_is_not_one_of_heads(
    tmp_path: Path, llama_model: PatchableModel
) -> None:
    """The node "A0.1.K" is another one in each."""
    path = tmp_path / "c.json"
    save_circuit(path, llama_model, ["Resid Start->A0.1.K"])
    model = patchable_model(llama(), factorized=True, separate_qkv=True, ungroup=True)
    with pytest.raises(GraphError, match="n_edges is 82, here 110"):
        load_circuit(path, model)


def test_mib_circuit_without_scores(tmp_path: Path, gpt2_model: PatchableModel) -> None:
    path = tmp_path / "c.json"
    content = {
        "cfg": {"n_layers": 2},
        "nodes": {"m0": {"in_graph": True}},
        "edges": {"m0->m1": {"in_graph": True}, "m0->logits": {"in_graph": False}},
    }
    path.write_text(json.dumps(content))
    expected = gpt2_model.circuit_prune_scores(edges=["MLP 0->MLP 1"])
    assert_equal(load_mib_circuit(path, gpt2_model), expected)


def test_mib_cannot_hold_every_graph(tmp_path: Path) -> None:
    bridge = gpt2()
    saes = sae_model(bridge, "resid_delta_mlp", load_pretrained=False, n_latents=2).saes
    with_latents = AutoencoderTransformer(bridge, {1: saes[1]})
    graphs = [
        (micro_model(), "is not a transformer's"),
        (patchable_model(bridge, True, None, 3, True), "tells positions apart"),
        (patchable_model(bridge, False, separate_qkv=True), "is not factorized"),
        (patchable_model(bridge, True, separate_qkv=False), "query, key and value"),
        (patchable_model(attn_only(), True, separate_qkv=True), "has no MLPs"),
        (
            patchable_model(
                gpt2(), True, separate_qkv=True, adapter=WHOLE_ATTENTION_ADAPTER
            ),
            "whole attention layers as sources",
        ),
        (patchable_model(with_latents, True, separate_qkv=True), "parts of MLPs"),
    ]
    for model, message in graphs:
        with pytest.raises(ConfigError, match=message):
            save_mib_circuit(tmp_path / "c.pt", model, model.new_prune_scores())
    assert list(tmp_path.iterdir()) == []


def test_mib_bad_arguments(tmp_path: Path, gpt2_model: PatchableModel) -> None:
    scores = gpt2_model.new_prune_scores()
    with pytest.raises(ConfigError, match=r"\.json or a \.pt"):
        save_mib_circuit(tmp_path / "c.pkl", gpt2_model, scores)
    with pytest.raises(GraphError, match="edges"):
        save_mib_circuit(tmp_path / "c.pt", gpt2_model, scores, edge_count=10**6)
    scores["blocks.0.hook_mlp_in"][0] = math.inf
    with pytest.raises(GraphError, match="infinite"):
        save_mib_circuit(tmp_path / "c.pt", gpt2_model, scores)
    with pytest.raises(DataError, match="There is no file"):
        load_mib_circuit(tmp_path / "c.pt", gpt2_model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"cfg": {"n_layers": 12}}, GraphError, "n_layers is 12, here 2"),
        ({"cfg": None}, DataError, 'has no "cfg"'),
        ({"edges": None}, DataError, '"edges" must be'),
        ({"edges": {"m0": {}}}, GraphError, "the edge 'm0', which"),
        (
            {"edges": {"m0->a0.h1<q>": {"score": 1.0, "in_graph": True}}},
            GraphError,
            "the edge 'm0->a0.h1<q>', which this model does not have",
        ),
        ({"nodes": {"a9.h9": {}}}, GraphError, "the node 'a9.h9'"),
        ({"nodes": 5}, DataError, '"nodes" must be a dictionary'),
        ({"edges": {"m0->m1": 1.0}}, DataError, "'m0->m1' needs"),
        (
            {"edges": {"m0->m1": {"score": None, "in_graph": True}}},
            DataError,
            "score of 'm0->m1' is None",
        ),
        (
            {"edges": {"m0->m1": {"score": math.inf, "in_graph": True}}},
            DataError,
            "has the number Infinity",
        ),
    ],
)
def test_mib_malformed_json(
    tmp_path: Path,
    gpt2_model: PatchableModel,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    path = tmp_path / "c.json"
    save_mib_circuit(path, gpt2_model, gpt2_model.new_prune_scores())
    with pytest.raises(error, match=message):
        load_mib_circuit(edited(path, **changes), gpt2_model)


def test_mib_malformed_tensors(tmp_path: Path, gpt2_model: PatchableModel) -> None:
    path = tmp_path / "c.pt"
    save_mib_circuit(path, gpt2_model, gpt2_model.new_prune_scores())
    content = t.load(path, weights_only=True)

    def check(error: type[Exception], message: str, **changes: Any) -> None:
        t.save({**content, **changes}, path)
        with pytest.raises(error, match=message):
            load_mib_circuit(path, gpt2_model)

    no_edge = content["edges_scores"].clone()
    no_edge[-1, 0] = 1.0
    check(GraphError, "from 'm1' to 'a0.h0<q>'", edges_scores=no_edge)
    nan = content["edges_scores"].clone()
    nan[0, 0] = math.nan
    check(DataError, "'input->a0.h0<q>' is nan", edges_scores=nan)
    check(DataError, '"edges_scores" must be', edges_scores=t.zeros(3, 3))
    check(DataError, '"edges_in_graph" must be', edges_in_graph=None)
    check(DataError, "must be lists of names", src_nodes=None)
    names = ["a7.h0", *content["src_nodes"][1:]]
    check(GraphError, "the node 'a7.h0'", src_nodes=names)
    for side in ("src_nodes", "dst_nodes"):
        doubled = [*content[side][:-1], content[side][0]]
        check(DataError, f"has the node '{doubled[0]}' twice", **{side: doubled})
    twos = 2 * t.ones_like(content["edges_scores"])
    check(DataError, "must be true or false everywhere", edges_in_graph=twos)
    member = content["edges_in_graph"].clone()
    member[-1, 0] = True
    check(GraphError, "from 'm1' to 'a0.h0<q>'", edges_in_graph=member)
    masked = t.where(content["edges_scores"] == 0, 0.0, 0.0)
    masked[-1, 0] = -math.inf
    t.save({**content, "edges_scores": masked}, path)
    assert_equal(load_mib_circuit(path, gpt2_model), gpt2_model.new_prune_scores())


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("ran").touch, ())


def test_mib_file_cannot_run_code(
    tmp_path: Path, gpt2_model: PatchableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.pt"
    t.save({"cfg": _Runs()}, path)
    with pytest.raises(DataError, match="could run code"):
        load_mib_circuit(path, gpt2_model)
    assert not (tmp_path / "ran").exists()
    save_mib_circuit(path, gpt2_model, gpt2_model.new_prune_scores())
    whole = path.read_bytes()
    for damaged in (b"not a file of tensors", b"hello", whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="not a file of tensors"):
            load_mib_circuit(path, gpt2_model)


def test_folders_that_are_not_there(tmp_path: Path, gpt2_model: PatchableModel) -> None:
    scores = gpt2_model.new_prune_scores()
    for suffix, save in (
        ("json", save_circuit),
        ("json", save_mib_circuit),
        ("pt", save_mib_circuit),
    ):
        with pytest.raises(ConfigError, match="there is no folder"):
            save(tmp_path / "nothing" / f"c.{suffix}", gpt2_model, scores)


def test_the_hint_is_for_another_name_only(tmp_path: Path) -> None:
    model, path = micro_model(), tmp_path / "circuit.json"
    save_circuit(path, model, [])
    fingerprint = json.loads(path.read_text())["model"]
    renamed = edited(path, model={**fingerprint, "name": "another"})
    with pytest.raises(GraphError, match="pass `any_model_name=True`"):
        load_circuit(renamed, model)
    other_key = next(key for key in fingerprint if key != "name")
    changed = {**fingerprint, "name": "another", other_key: "else"}
    with pytest.raises(GraphError) as error:
        load_circuit(edited(path, model=changed), model, any_model_name=True)
    assert "any_model_name" not in str(error.value)


def test_a_damaged_name_of_a_field_hides_no_damage(tmp_path: Path) -> None:
    model, path = micro_model(), tmp_path / "circuit.json"
    save_circuit(path, model, model.new_prune_scores(1.5))
    text = path.read_text().replace('"checksum"', '"checksun"').replace("1.5", "1.25", 1)
    path.write_text(text)
    with pytest.raises(DataError, match="'checksun'.*Did you mean 'checksum'"):
        load_circuit(path, model)
