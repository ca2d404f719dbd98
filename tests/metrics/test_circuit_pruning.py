"""Dead ends: by hand, against another way to find them, and without effect on outputs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch as t

from auto_circuit.circuits import Circuit, CircuitMasks, as_circuit, circuit_of_edges
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.errors import GraphError
from auto_circuit.metrics.circuit_outs import iter_circuit_outs
from auto_circuit.metrics.circuit_pruning import (
    connected_circuit,
    greedy_ranks,
    selection_ranks,
    weighted_edge_count,
)
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
    AutoencoderTransformer,
    sae_model,
)
from auto_circuit.model_utils.transformer_lens_utils import WHOLE_ATTENTION_ADAPTER
from auto_circuit.ranking import circuit_mask
from auto_circuit.types import Edge
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_model
from tests.models import ARCHITECTURES, gemma2, gpt2, llama, pythia, tokens

SEQ = 4


def circuit_of(model: PatchableModel, *names: str) -> Circuit:
    return circuit_of_edges(model, names)


def names_in(model: PatchableModel, circuit: CircuitMasks) -> set[str]:
    return set(as_circuit(model, circuit).names)


def random_circuit(model: PatchableModel, share: float, seed: int) -> Circuit:
    generator = t.Generator().manual_seed(seed)
    masks = {
        name: t.rand(mask.shape, generator=generator) < share
        for name, mask in model.patch_masks.items()
    }
    return Circuit(model, masks)


def bridge(make: Callable[[], Any], seq_len: int | None = None, **kwargs: Any):
    options = {"factorized": True, "separate_qkv": True, **kwargs}
    return patchable_model(make(), slice_output="last_seq", seq_len=seq_len, **options)


# ---------------------------------------------------------------------------- by hand


def test_dead_ends_of_the_micro_model() -> None:
    model = micro_model()
    live = {"Resid Start->B1.1", "B1.1->Resid End"}
    nothing_in = {"B0.0->Resid End", "B0.0->B1.1"}
    nothing_out = {"Resid Start->B0.1", "B0.1->B1.0"}
    circuit = circuit_of(model, *live, *nothing_in, *nothing_out)
    before = {name: edges.clone() for name, edges in circuit.items()}
    connected = connected_circuit(model, circuit)
    assert names_in(model, connected) == live
    assert weighted_edge_count(model, circuit) == 2.0
    assert all(t.equal(circuit[name], before[name]) for name in circuit)


def test_unfactorized_heads_live_on_the_residual_stream() -> None:
    model = micro_model(factorized=False)
    alone = circuit_of(model, "B1.0->Resid End")
    assert weighted_edge_count(model, alone) == 0.0
    fed = circuit_of(model, "B0.1->Resid Post 0", "B1.0->Resid End")
    assert weighted_edge_count(model, fed) == 2.0
    into_nothing = circuit_of(model, "B0.1->Resid Post 0", "Resid Start->Resid Post 0")
    assert weighted_edge_count(model, into_nothing) == 0.0


def test_key_value_heads_feed_their_group() -> None:
    model = bridge(llama)  # 4 heads, 2 key-value heads
    circuit = circuit_of(
        model, "Resid Start->A0.1.K", *(f"A0.{h}->Resid End" for h in range(4))
    )
    expected = {"Resid Start->A0.1.K", "A0.2->Resid End", "A0.3->Resid End"}
    assert names_in(model, connected_circuit(model, circuit)) == expected


def test_attention_that_is_one_source_reads_all_its_heads() -> None:
    adapter = WHOLE_ATTENTION_ADAPTER
    model = patchable_model(gemma2(), True, separate_qkv=True, adapter=adapter)
    circuit = circuit_of(model, "Resid Start->A0.3.Q", "A0->Resid End")
    assert weighted_edge_count(model, circuit) == 2.0


@pytest.mark.parametrize(
    ("edges", "lives"),
    [
        (["Resid Start->A0.0.V @ 1", "A0.0->Resid End @ 3"], True),
        (["Resid Start->A0.0.K @ 3", "A0.0->Resid End @ 3"], True),
        (["Resid Start->A0.0.Q @ 1", "A0.0->Resid End @ 3"], False),
        (["Resid Start->A0.0.Q @ 3", "A0.0->Resid End @ 3"], True),
        (["Resid Start->MLP 0 @ 1", "MLP 0->Resid End @ 3"], False),
        (["Resid Start->MLP 0 @ 2", "MLP 0->A1.1.K @ 2", "A1.1->Resid End @ 3"], True),
        (["Resid Start->A0.0.V @ 2", "A0.0->A1.1.V @ 1", "A1.1->Resid End @ 3"], False),
        (["Resid Start->Resid End @ 2"], False),
        (["Resid Start->Resid End @ 3"], True),
    ],
)
def test_only_attention_moves_between_positions(edges: list[str], lives: bool) -> None:
    model = bridge(gpt2, SEQ)
    connected = connected_circuit(model, circuit_of(model, *edges))
    assert names_in(model, connected) == (set(edges) if lives else set())


def bidirectional() -> Any:
    model: Any = gpt2()
    model.cfg.attention_dir = "bidirectional"
    return model


@pytest.mark.parametrize(("make", "n_edges"), [(gpt2, 0.0), (bidirectional, 3.0)])
def test_bidirectional_attention_moves_backwards_too(make: Any, n_edges: float) -> None:
    model = bridge(make, SEQ)
    edges = ["Resid Start->A0.0.V @ 2", "A0.0->A1.1.V @ 1", "A1.1->Resid End @ 3"]
    assert weighted_edge_count(model, circuit_of(model, *edges)) == n_edges


def latents(
    make: Callable[[], Any] = gpt2,
    blocks: tuple[int, ...] = (0, 1),
    sae_input: Any = "resid_delta_mlp",
) -> Callable[[], Any]:
    """A transformer whose MLPs in some blocks are seen through autoencoders."""

    def made() -> Any:
        saes = sae_model(make(), sae_input, load_pretrained=False, n_latents=3).saes
        kept = {block: saes[block] for block in blocks}
        return AutoencoderTransformer(make(), kept, sae_input)

    return made


@cache
def model_of_latents(seq_len: int | None) -> PatchableModel:
    return bridge(latents(), seq_len)


@pytest.mark.parametrize(
    ("edges", "n_live"),
    [
        (["Resid Start->MLP 0", "MLP 0 Latent 2->Resid End"], 2),
        (["Resid Start->MLP 0", "MLP 0 Error->Resid End"], 2),
        (["MLP 0 Latent 2->Resid End", "MLP 0 Error->MLP 1"], 0),  # read nothing
        (["Resid Start->MLP 0", "Resid Start->MLP 1"], 0),  # nothing reads them
        (["Resid Start->MLP 0", "MLP 1 Latent 2->Resid End"], 0),  # another MLP's
        (["Resid Start->MLP 0", "MLP 0 Latent 0->MLP 1", "MLP 1 Error->Resid End"], 3),
        (["Resid Start->A0.1.V", "A0.1->MLP 0", "MLP 0 Latent 1->Resid End"], 3),
    ],
)
def test_an_mlp_feeds_its_latents_and_its_error(edges: list[str], n_live: int) -> None:
    for seq_len in (None, SEQ):
        model = model_of_latents(seq_len)
        names = [f"{name} @ 3" for name in edges] if seq_len else edges
        assert weighted_edge_count(model, circuit_of(model, *names)) == n_live


# ------------------------------------------------------------------------------- laws


def peeled(model: PatchableModel, circuit: Circuit) -> set[Edge]:
    """Take away edges that hang in the air until none is left: another algorithm."""
    edges = {e for e in model.edges if circuit[e.dest.module_name][e.patch_idx]}
    while True:
        sources = {e.src.name for e in edges} | {"Resid End"}
        dests = {e.dest.name for e in edges} | {"Resid Start"}
        kept = {e for e in edges if e.dest.name in sources and e.src.name in dests}
        if kept == edges:
            return edges
        edges = kept


@pytest.mark.parametrize("seed", range(20))
def test_same_as_peeling_off_dead_ends(seed: int) -> None:
    model = micro_model()
    circuit = random_circuit(model, 0.4, seed)
    connected = connected_circuit(model, circuit)
    assert names_in(model, connected) == {repr(e) for e in peeled(model, circuit)}
    again = connected_circuit(model, connected)
    assert all(t.equal(again[name], connected[name]) for name in connected)


CASES = [(name, make, True, None) for name, make in ARCHITECTURES.items()] + [
    ("gemma2", gemma2, True, None),
    ("gpt2", gpt2, False, None),
    ("gpt2", gpt2, True, SEQ),
    ("llama", llama, True, SEQ),
    ("gpt2", gpt2, False, SEQ),
    ("latents", latents(sae_input="mlp_post_act"), True, SEQ),
    ("latents of one block", latents(blocks=(1,)), True, None),
    ("parallel latents", latents(pythia), True, None),
]
SLOW = ("latents of one block", "parallel latents")


@pytest.mark.parametrize(
    ("make", "factorized", "seq_len"),
    [
        pytest.param(*case, marks=pytest.mark.slow if name in SLOW else ())
        for name, *case in CASES
    ],
    ids=[f"{name}-{'nodes' * (not f)}-{seq}" for name, _, f, seq in CASES],
)
def test_dead_ends_have_no_effect(
    make: Callable[[], Any], factorized: bool, seq_len: int | None
) -> None:
    model = bridge(make, seq_len, factorized=factorized)
    dataset = PromptDataset(
        tokens(3, SEQ, seed=1),
        tokens(3, SEQ, seed=2),
        [t.tensor([1])] * 3,
        [t.tensor([2])] * 3,
    )
    loader = PromptDataLoader(dataset, seq_len, 0, batch_size=3)
    circuits = [random_circuit(model, share, 0) for share in (0.1, 0.3, 0.6)]
    connected = [circuit.connected() for circuit in circuits]
    # The test is about something: there are dead ends, and not only these.
    sizes = [sum(c.n_edges for c in found) for found in (circuits, connected)]
    assert 0 < sizes[1] < sizes[0]
    outs = [out for _, _, out in iter_circuit_outs(model, loader, circuits + connected)]
    for out, pruned_out in zip(outs[:3], outs[3:], strict=True):
        t.testing.assert_close(pruned_out, out, atol=1e-5, rtol=0)


def test_all_edges_are_connected() -> None:
    model = micro_model()
    everything = {name: mask == 0 for name, mask in model.patch_masks.items()}
    assert weighted_edge_count(model, everything) == model.n_edges == 13


# ------------------------------------------------------------------------------ errors


def test_circuit_of_another_graph() -> None:
    circuit = micro_model(factorized=False).circuit_prune_scores([], bool=True)
    with pytest.raises(GraphError, match="no destination of this graph"):
        connected_circuit(micro_model(), circuit)


def test_scores_are_no_circuit() -> None:
    model = micro_model()
    with pytest.raises(GraphError, match=r"float32 .* expected torch.bool"):
        connected_circuit(model, model.new_prune_scores())
    with pytest.raises(GraphError, match="lacks the destination"):
        connected_circuit(model, {})


# ------------------------------------------------------------- grown from the output


def feeds(model: PatchableModel, dest: str, at: int, src: str, position: int) -> bool:
    """Does a destination at one position feed a source at another? By their names."""
    head = re.fullmatch(r"(A\d+)\.(\d+)\.([QKV])", dest)
    if head is None:  # an MLP or its latents, or a head of the micro model
        return at == position and (dest == src or src.startswith(f"{dest} "))
    block, idx, letter = head.groups()
    n_inputs = sum(
        d.name.startswith(block + ".") and d.name.endswith(letter) for d in model.dests
    )
    srcs = [s.name for s in model.srcs if re.fullmatch(block + r"(\.\d+)?", s.name)]
    group = max(len(srcs) // n_inputs, 1)
    # A norm of the heads' sum (Gemma 2): what one head reads changes what all heads write.
    is_normed = model.cfg.architecture.startswith("Gemma2")
    is_of_head = src in srcs and (is_normed or srcs.index(src) // group == int(idx))
    return is_of_head and (at == position if letter == "Q" else at <= position)


def grown_by_looking_at_all_edges(
    model: PatchableModel, key: Callable[[Edge], float]
) -> list[Edge]:
    """The order of the greedy circuit: each step looks at every edge again."""
    circuit: list[Edge] = []
    left = list(model.edges)
    last = (model.seq_len or 1) - 1
    places = [(src.name, at) for src in model.srcs for at in range(last + 1)]
    fed = {
        (dest.name, at): {p for p in places if feeds(model, dest.name, at, *p)}
        for dest in model.dests
        for at in range(last + 1)
    }
    fed["Resid End", last].add(("the output", last))
    while True:
        sources = {(edge.src.name, edge.seq_idx or 0) for edge in circuit}
        sources.add(("the output", last))
        into_the_circuit = [
            edge for edge in left if fed[edge.dest.name, edge.seq_idx or 0] & sources
        ]
        if not into_the_circuit:
            return circuit
        best = max(into_the_circuit, key=key)
        circuit.append(best)
        left.remove(best)


SMALL_GRAPHS = [
    pytest.param(micro_model, id="micro"),
    pytest.param(lambda: bridge(gpt2), id="gpt2"),
    pytest.param(lambda: bridge(llama), id="llama"),
    pytest.param(lambda: bridge(gemma2), id="gemma2"),
    pytest.param(lambda: bridge(llama, ungroup=True), id="ungrouped"),
    pytest.param(lambda: bridge(llama, 2), id="positions"),
    pytest.param(lambda: bridge(latents()), id="latents"),
    pytest.param(
        lambda: bridge(latents(), 2), id="latents-positions", marks=pytest.mark.slow
    ),
    pytest.param(
        lambda: bridge(latents(pythia, (0,))),
        id="parallel-latents",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        lambda: bridge(latents(llama), ungroup=True),
        id="ungrouped-latents",
        marks=pytest.mark.slow,
    ),
]


def live_edges(model: PatchableModel, circuit: Circuit) -> set[str]:
    """The edges on a path from the start to the end, by following each of them."""
    edges = {e for e in model.edges if circuit[e.dest.module_name][e.patch_idx]}
    last = (model.seq_len or 1) - 1

    def follows(edge: Edge, other: Edge) -> bool:
        return feeds(
            model, edge.dest.name, edge.seq_idx or 0, other.src.name, other.seq_idx or 0
        )

    after = {edge: [o for o in edges if follows(edge, o)] for edge in edges}
    forwards = {e for e in edges if e.src.name == "Resid Start"}
    backwards = {
        e for e in edges if e.dest.name in ("Resid End",) and (e.seq_idx or 0) == last
    }
    for _ in edges:
        forwards |= {other for edge in forwards for other in after[edge]}
        backwards |= {edge for edge in edges if backwards.intersection(after[edge])}
    return {repr(edge) for edge in forwards & backwards}


@pytest.mark.parametrize("make", SMALL_GRAPHS)
def test_same_as_following_every_edge(make: Any) -> None:
    model = make()
    n_live = 0
    for share in (0.05, 0.2, 0.6):
        circuit = random_circuit(model, share, 2)
        found = names_in(model, connected_circuit(model, circuit))
        assert found == live_edges(model, circuit)
        n_live += len(found)
    assert n_live > 3


@pytest.mark.parametrize("make", SMALL_GRAPHS)
@pytest.mark.parametrize("ranking", ["signed", "absolute"])
def test_greedy_ranks_against_looking_at_all_edges(make: Any, ranking: Any) -> None:
    model = make()
    generator = t.Generator().manual_seed(1)
    scores = {
        name: t.randn(mask.shape, generator=generator)
        for name, mask in model.patch_masks.items()
    }
    sign = abs if ranking == "absolute" else float
    expected = grown_by_looking_at_all_edges(
        model, lambda edge: sign(float(edge.prune_score(scores)))
    )
    ranks = greedy_ranks(model, scores, ranking)
    order = sorted(model.edges, key=lambda edge: -float(edge.prune_score(ranks)))
    assert order[: len(expected)] == expected
    found = sorted(float(edge.prune_score(ranks)) for edge in model.edges)
    assert found == list(range(1, model.n_edges + 1))
    keys = [sign(float(edge.prune_score(scores))) for edge in order]
    assert keys != sorted(keys, reverse=True)
    rest = keys[len(expected) :]
    assert rest == sorted(rest, reverse=True)
    assert bool(rest) is (model.seq_len is not None)


def test_a_greedy_circuit_by_hand() -> None:
    model = micro_model()
    scores = model.circuit_prune_scores(
        edge_dict={
            "Resid Start->B0.0": -9.0,  # the best, but into nothing at first
            "B0.0->B1.1": 7.0,
            "B1.1->Resid End": 1.0,
            "B0.1->Resid End": -2.0,
        }
    )
    sizes = {1: {"B0.1->Resid End"}, 2: {"B1.1->Resid End"}, 3: {"B0.0->B1.1"}}
    sizes[4] = {"Resid Start->B0.0"}
    ranks, expected = greedy_ranks(model, scores), set()
    for size, new in sizes.items():
        expected |= new
        circuit, n_edges = circuit_mask(ranks, size)
        assert (names_in(model, circuit), n_edges) == (expected, size)


def test_equal_scores_go_by_the_order_of_the_graph() -> None:
    model = micro_model()
    ones = model.new_prune_scores(1.0)
    turned = dict(reversed(ones.items()))
    ranks = greedy_ranks(model, ones)
    expected = grown_by_looking_at_all_edges(model, lambda edge: 1.0)  # the first of all
    order = sorted(model.edges, key=lambda edge: -float(edge.prune_score(ranks)))
    assert order == expected
    other = greedy_ranks(model, turned)
    assert all(t.equal(other[name], ranks[name]) for name in ranks)


def test_greedy_circuits_lead_to_the_output() -> None:
    """Only sources that nothing reaches are dead ends; of the best edges, many lead nowhere."""
    model = bridge(gpt2)
    generator = t.Generator().manual_seed(0)
    scores = {
        name: t.randn(mask.shape, generator=generator)
        for name, mask in model.patch_masks.items()
    }
    kept = {}
    for selection in ("best", "greedy"):
        ranks = selection_ranks(model, scores, selection, "absolute")  # type: ignore[arg-type]
        circuit, _ = circuit_mask(ranks, 15)
        kept[selection] = names_in(model, circuit)
        everything_in = circuit_mask(ranks, 15)[0]
        everything_in["blocks.0.hook_q_input"][:] = True  # every head reads something
        everything_in["blocks.0.hook_mlp_in"][:] = True
        everything_in["blocks.1.hook_q_input"][:, 0] = True
        everything_in["blocks.1.hook_mlp_in"][0] = True
        live = names_in(model, connected_circuit(model, everything_in))
        assert (kept[selection] <= live) is (selection == "greedy")


def test_bad_selections() -> None:
    model = micro_model()
    with pytest.raises(GraphError, match="scores lack"):
        greedy_ranks(model, {"output": t.zeros(5)})
    with pytest.raises(GraphError, match="NaN"):
        greedy_ranks(model, model.new_prune_scores(math.nan))
