"""The edges of a graph as a sequence of which no list is kept."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch as t
from ordered_set import OrderedSet

from auto_circuit.circuit_files import load_circuit, save_circuit, scored_edges
from auto_circuit.circuits import all_edges, circuit_of_edges, circuit_of_scores
from auto_circuit.errors import GoneError, GraphError
from auto_circuit.types import Edge
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_model
from tests.models import gpt2, llama, pythia

GRAPHS: dict[str, Callable[[], PatchableModel]] = {
    "micro": micro_model,
    "micro, positions": lambda: micro_model(seq_len=3),
    "nodes": lambda: patchable_model(gpt2(), False, separate_qkv=True),
    "gpt2, positions": lambda: patchable_model(gpt2(), True, None, 2, separate_qkv=True),
    "parallel": lambda: patchable_model(pythia(), True, separate_qkv=False),
    "grouped queries": lambda: patchable_model(llama(), True, None, 2, separate_qkv=True),
    "ungrouped": lambda: patchable_model(llama(), True, separate_qkv=True, ungroup=True),
}


@cache
def graph(name: str) -> PatchableModel:
    return GRAPHS[name]()


def sorted_list(model: PatchableModel) -> list[Edge]:
    """All edges, by what masks have entries, put in order by what an edge says of itself."""
    dests = {(dest.module_name, dest.head_idx): dest for dest in model.dests}
    found = []
    for module_name, mask in model.patch_masks.items():
        for place in t.ones_like(mask).nonzero().tolist():
            seq_idx = None if model.seq_len is None else place.pop(0)
            src_idx = place.pop()
            dest = dests[module_name, place[0] if place else None]
            src = next(s for s in model.srcs if s.src_idx == src_idx + dest.min_src_idx)
            found.append(Edge(src, dest, seq_idx))
    return sorted(found)


@pytest.mark.parametrize("name", GRAPHS)
def test_it_is_the_list_of_all_edges(name: str) -> None:
    model, rng = graph(name), random.Random(0)
    edges, expected = model.edges, sorted_list(graph(name))
    assert len(edges) == model.n_edges == len(expected) > 10
    assert list(edges) == expected and edges == expected
    assert list(reversed(edges)) == expected[::-1]
    assert [edges.index(edge) for edge in expected] == list(range(len(expected)))
    assert [edges[i] for i in range(-len(expected), 0)] == expected
    for _ in range(50):
        a, b = (rng.randint(-len(expected) - 3, len(expected) + 3) for _ in range(2))
        step = rng.choice([None, 1, 2, 7, -1, -3])
        part = edges[a:b:step]
        assert list(part) == expected[a:b:step]
        assert list(part[1:-1]) == expected[a:b:step][1:-1]
        outside = set(expected) - set(expected[a:b:step])
        assert not any(edge in part for edge in outside)
        assert all(edge in part and part.count(edge) == 1 for edge in part)
    assert [len(part) for part in model.edge_dict.values()] == [
        sum(edge.seq_idx == at for edge in expected) for at in model.edge_dict
    ]
    assert [edge for part in model.edge_dict.values() for edge in part] == expected
    for edge in expected:
        assert model.edge_name_dict[edge.seq_idx][edge.name] == edge
        assert model.find_edges(repr(edge)) == model.find_edges(edge) == [edge]


@pytest.mark.parametrize("name", GRAPHS)
def test_values_in_the_order_of_edges(name: str) -> None:
    model = graph(name)
    scores = {key: t.randn_like(mask) for key, mask in model.patch_masks.items()}
    expected = [float(edge.prune_score(scores)) for edge in sorted_list(model)]
    assert model.in_edge_order(scores).tolist() == expected
    circuit = circuit_of_scores(model, scores, len(expected) // 3)
    chosen = [edge for edge in model.edges if edge.prune_score(circuit)]
    assert circuit.edges == chosen and len(chosen) == len(expected) // 3
    assert scored_edges(model, circuit.scores) == [(edge, 1.0) for edge in chosen]


def test_it_is_a_set_as_it_was() -> None:
    model = micro_model(seq_len=2)
    edges, listed = model.edges, OrderedSet(model.edges)
    part = OrderedSet([listed[5], listed[2]])
    operations: tuple[Callable[[Any], Any], ...] = (
        lambda e: e - part,
        lambda e: part - e,
        lambda e: e & part,
        lambda e: e | part,
        lambda e: e ^ part,
        lambda e: e.difference(part, [listed[1]]),
        lambda e: e.intersection(part),
        lambda e: e.union(part),
        lambda e: e.symmetric_difference(part),
        lambda e: e.copy(),
        lambda e: e[[3, 1]],
        lambda e: e[1:3],
        lambda e: e.issuperset(part),
        lambda e: e.issubset(part),
        lambda e: (e > set(part), e >= part, e < part, part < e, e.isdisjoint(part)),
        lambda e: (set(e) == e, e == set(e), e == list(e), e == list(e)[::-1]),
        lambda e: (len(e), sorted(e, key=repr), max(e), bool(e), set(part) - e),
        lambda e: random.Random(0).sample(e, 4),
        lambda e: random.Random(0).choice(e),
    )
    for operation in operations:
        assert operation(edges) == operation(listed)
    of_positions: list[Any] = list(model.edge_dict.values())
    assert sum(of_positions, []) == of_positions[0] + of_positions[1] == list(listed)
    with pytest.raises(GoneError, match=r"cannot be changed.*`model.edges.copy\(\)`"):
        edges.add(listed[0])  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="unhashable"):
        hash(edges)


def test_what_is_no_edge_of_the_graph() -> None:
    model, other = micro_model(seq_len=2), micro_model()
    (edge,) = other.find_edges("B0.1->B1.0")
    backwards = Edge(edge.src, model.dests[0], 0)
    for wrong in (
        edge,
        Edge(edge.src, edge.dest, 2),
        Edge(edge.src, edge.dest, -1),
        backwards,
        "B0.1->B1.0 @ 0",
        None,
    ):
        assert wrong not in model.edges and model.edges.count(wrong) == 0
    assert Edge(edge.src, edge.dest, 0) in model.edges
    assert Edge(edge.src, edge.dest, 0) not in model.edge_dict[1]
    with pytest.raises(GraphError, match="'?B0.1->B1.0'? is none of these 26 edges"):
        model.edges.index(edge)
    with pytest.raises(IndexError):
        model.edges[26]
    for no_number in ("B0.1->B1.0 @ 0", 1.0, None, ["B0.1"]):
        with pytest.raises(GraphError, match="from 0 to 25.*`model.find_edges"):
            model.edges[no_number]  # type: ignore[call-overload]
    assert model.edges[t.tensor([3, 1])] == [model.edges[3], model.edges[1]]  # type: ignore[call-overload]
    assert "B0.1->B1.0 @ 0" not in model.edge_name_dict[0]
    assert "B0.1->B1.0" in model.edge_name_dict[0]
    assert repr(model.edges).startswith("EdgeSequence(26: Resid Start->B0.0 @ 0, ")


def test_errors_name_what_is_near_without_all_names() -> None:
    model = micro_model()
    for wrong, hint in (
        ("B0.1->B1.9", "Did you mean 'B0.1->B1."),
        ("B0.1->Resid Ent", "Did you mean 'B0.1->Resid End'"),
        ("B1.0->B0.1", "There are both nodes, but B0.1 does not read B1.0"),
        ("B0.1->", "It names no destination"),
        ("B0.1 B1.0", 'name of an edge is "source->destination", such as "Resid Start->'),
    ):
        with pytest.raises(GraphError, match="no edge") as error:
            model.find_edges(wrong)
        assert hint in str(error.value)


def test_only_a_users_own_loop_makes_all_edges(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = micro_model(seq_len=4000)
    n_made, make = 0, Edge.__init__

    def counted(self: Edge, *args: Any, **kwargs: Any) -> None:
        nonlocal n_made
        n_made += 1
        make(self, *args, **kwargs)

    monkeypatch.setattr(Edge, "__init__", counted)
    names = ["B0.1->B1.0 @ 3999", "Resid Start->Resid End @ 7"]
    circuit = circuit_of_edges(model, names)
    assert circuit.names == sorted(names, key=lambda name: name.endswith("3999"))
    assert circuit.in_graph(micro_model()).n_edges == 2
    save_circuit(tmp_path / "circuit.json", model, circuit.scores)
    assert load_circuit(tmp_path / "circuit.json", model)["output"].sum() == 1
    assert all_edges(model).n_edges == len(model.edges) == 52_000
    assert len(model.edge_dict) == len(model.edge_name_dict) == 4000
    model.check_edges(model.edges[-3:])
    assert model.edges[-1] in model.edges
    with pytest.raises(GraphError, match="Did you mean"):
        model.find_edges("B0.1->B1.7 @ 1")
    assert n_made < 100
