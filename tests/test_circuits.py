"""Circuits: what is in one, and what can be made of it; on the micro model, by hand."""

from __future__ import annotations

import pytest
import torch as t

from auto_circuit.circuits import (
    Circuit,
    all_edges,
    as_circuit,
    circuit_jaccard,
    circuit_of_edges,
    circuit_of_scores,
)
from auto_circuit.errors import ConfigError, GraphError
from tests.micro import micro_model

PATH = ["Resid Start->B0.1", "B0.1->B1.0", "B1.0->Resid End"]


def seeded(seed: int) -> t.Generator:
    return t.Generator().manual_seed(seed)


def test_what_is_in_a_circuit() -> None:
    model = micro_model()
    circuit = circuit_of_edges(model, PATH)
    assert circuit.n_edges == 3
    assert circuit.names == PATH
    assert [edge.name for edge in circuit.edges] == PATH
    assert repr(circuit) == "Circuit(3 of 13 edges)"
    assert circuit.scores["output"].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]


def test_positions_are_in_the_names() -> None:
    model = micro_model(seq_len=3)
    circuit = circuit_of_edges(model, ["B0.1->B1.0 @ 2"])
    assert circuit.names == ["B0.1->B1.0 @ 2"] and circuit.n_edges == 1


def test_circuits_of_scores() -> None:
    model = micro_model()
    scores = model.circuit_prune_scores(
        edge_dict={PATH[0]: -3.0, PATH[1]: 2.0, PATH[2]: 2.0}
    )
    assert circuit_of_scores(model, scores, 0).n_edges == 0
    assert circuit_of_scores(model, scores, 1).names == PATH[:1]
    # Equal scores come in together.
    assert circuit_of_scores(model, scores, 2).names == PATH
    assert circuit_of_scores(model, scores, 13) == all_edges(model)
    with pytest.raises(GraphError, match="14 edges was asked for"):
        circuit_of_scores(model, scores, 14)


def test_operations() -> None:
    model = micro_model()
    first, second = circuit_of_edges(model, PATH[:2]), circuit_of_edges(model, PATH[1:])
    assert first.union(second).names == PATH
    assert first.intersection(second).names == PATH[1:2]
    assert first.without(second).names == PATH[:1]
    assert first.without_edges(PATH[:1]).names == PATH[1:2]
    assert first.complement().n_edges == 11
    assert not set(first.complement().names) & set(PATH[:2])
    assert first.jaccard(second) == 1 / 3
    assert first.union(first.complement()) == all_edges(model)
    # None of these changed the circuits that they were made of.
    assert first.names == PATH[:2] and second.names == PATH[1:]


def test_a_mapping_is_a_circuit_too() -> None:
    model = micro_model()
    masks = model.circuit_prune_scores(PATH, bool=True)
    circuit = as_circuit(model, masks)
    assert as_circuit(model, circuit) is circuit
    assert dict(circuit) == circuit.masks == masks
    assert circuit == circuit_of_edges(model, PATH) != all_edges(model)
    assert circuit.union(all_edges(model).masks) == all_edges(model)


def test_samples() -> None:
    everywhere = all_edges(micro_model())
    counts = {name: t.zeros(mask.shape) for name, mask in everywhere.items()}
    for seed in range(300):
        sample = everywhere.sample(4, seeded(seed))
        assert sample.n_edges == 4
        for name, mask in sample.items():
            counts[name] += mask
    frequencies = t.cat([count.flatten() for count in counts.values()]) / 300
    assert (frequencies - 4 / 13).abs().max() < 0.1
    some = circuit_of_edges(everywhere.model, PATH)
    assert some.sample(3, seeded(0)) == some
    with pytest.raises(ConfigError, match="4 edges .* out of 3"):
        some.sample(4, seeded(0))


def test_circuits_of_other_graphs() -> None:
    model, other = micro_model(), micro_model(seq_len=3)
    circuit = circuit_of_edges(model, PATH)
    with pytest.raises(GraphError, match="expected torch.bool of shape"):
        as_circuit(other, circuit)
    with pytest.raises(GraphError, match="lacks the destination"):
        Circuit(model, {})
    with pytest.raises(GraphError, match="no destination of this graph"):
        circuit.union({**circuit, "blocks.7": t.ones(1, dtype=t.bool)})
    with pytest.raises(GraphError, match="are of different graphs"):
        circuit_jaccard(circuit, all_edges(other))
    with pytest.raises(GraphError, match="no edge 'Resid Start->B0.7'"):
        circuit.without_edges(["Resid Start->B0.7"])
