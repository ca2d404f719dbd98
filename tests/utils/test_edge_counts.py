"""The circuit sizes of a sweep."""

from __future__ import annotations

import pytest
import torch as t
from hypothesis import given
from hypothesis import strategies as st

from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.types import EdgeCounts, TestEdges
from auto_circuit.utils.edge_counts import edge_counts_util, listed_edge_counts

EDGES = range(13)
EQUAL_SCORES = {"a": t.ones(10), "b": -t.ones(3)}
GROUPED_SCORES = {"a": t.tensor([2.0, -2.0, 0.0]), "b": t.tensor([5.0, 0.0, 2.0])}


def test_small_graphs_are_tested_at_every_size() -> None:
    assert edge_counts_util(EDGES) == list(range(14))
    assert edge_counts_util(range(200)) == list(range(201))


def test_large_graphs_are_tested_at_one_digit_sizes() -> None:
    counts = [*range(10), *range(10, 100, 10), 100, 200, 201]
    assert edge_counts_util(range(201)) == counts
    assert edge_counts_util(range(201), EdgeCounts.LOGARITHMIC) == counts


def test_logarithmic_sizes_are_below_the_number_of_edges() -> None:
    counts = edge_counts_util(
        range(100), EdgeCounts.LOGARITHMIC, zero_edges=False, all_edges=False
    )
    assert counts == [*range(1, 10), *range(10, 100, 10)]


def test_coarse_sizes_are_some_of_the_logarithmic_ones() -> None:
    counts = edge_counts_util(range(60), EdgeCounts.COARSE)
    assert counts == [0, 1, 2, 4, 7, 10, 20, 40, 60]
    of_50 = edge_counts_util(range(50), EdgeCounts.COARSE, zero_edges=False)
    assert of_50 == [1, 2, 4, 7, 10, 20, 40, 50]


def test_lists_have_numbers_and_shares() -> None:
    assert edge_counts_util(EDGES, [0.0, 0.5, 1.0]) == [0, 6, 13]
    assert edge_counts_util(EDGES, [5, 1]) == [1, 5]
    assert edge_counts_util(EDGES, [1, 1.0]) == [1, 13]
    assert edge_counts_util(EDGES, [3, 2, 5, 0.25]) == [0, 2, 3, 5, 13]


def test_a_share_is_not_rounded_below_a_whole_number() -> None:
    assert [int(100 * 0.29), *edge_counts_util(range(100), [0.29])] == [28, 29]


def test_groups_end_where_ties_end() -> None:
    edges = range(6)
    assert edge_counts_util(edges, EdgeCounts.GROUPS, GROUPED_SCORES) == [0, 1, 4, 6]
    assert edge_counts_util(
        edges, EdgeCounts.GROUPS, GROUPED_SCORES, zero_edges=False, all_edges=False
    ) == [1, 4]


@pytest.mark.parametrize("test_counts", [None, EdgeCounts.GROUPS])
def test_groups_of_equal_scores(test_counts: TestEdges | None) -> None:
    def counts(zero_edges: bool | None, all_edges: bool | None) -> list[int]:
        return edge_counts_util(EDGES, test_counts, EQUAL_SCORES, zero_edges, all_edges)

    assert counts(None, None) == []
    assert counts(None, False) == []
    assert counts(None, True) == [13]
    assert counts(True, None) == [0]
    assert counts(True, True) == [0, 13]
    assert counts(True, False) == [0]


def test_the_default_is_groups_only_if_there_are_few() -> None:
    scores = {"a": t.arange(13.0)}
    assert edge_counts_util(EDGES, prune_scores=scores) == list(range(14))
    scores = {"a": t.tensor([1.0] * 300 + [2.0] * 30 + [3.0])}
    assert edge_counts_util(range(331), prune_scores=scores) == [0, 1, 31, 331]


def test_ends_are_kept_out_when_told_so() -> None:
    assert edge_counts_util(EDGES, [0, 5, 13], zero_edges=False) == [5, 13]
    assert edge_counts_util(EDGES, [0, 5, 13], all_edges=False) == [0, 5]
    assert edge_counts_util(EDGES, [0, 13]) == [0, 13]


def test_the_true_size_is_put_in() -> None:
    assert edge_counts_util(EDGES, [2, 5], true_edge_count=4) == [2, 4, 5]
    assert edge_counts_util(EDGES, [2, 5], true_edge_count=5) == [2, 5]


def test_a_list_as_it_is() -> None:
    assert listed_edge_counts(13, [5, 1, 0.5, 5]) == [1, 5, 6]


@given(st.integers(0, 3000), st.sampled_from([None, *list(EdgeCounts)[:2]]))
def test_counts_are_ascending_sizes(n_edges: int, rule: EdgeCounts | None) -> None:
    counts = edge_counts_util(range(n_edges), rule)
    assert counts == sorted(set(counts))
    assert all(0 <= count <= n_edges for count in counts)


def test_groups_need_scores() -> None:
    with pytest.raises(ConfigError, match="give `prune_scores`"):
        edge_counts_util(EDGES, EdgeCounts.GROUPS)


def test_scores_of_another_graph() -> None:
    with pytest.raises(GraphError, match="13 prune scores but 12 edges"):
        edge_counts_util(range(12), EdgeCounts.GROUPS, EQUAL_SCORES)


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (14, GraphError, "has 14, but the graph has only 13 edges"),
        (-1, ConfigError, "has -1; a number of edges is 0 or more"),
        (1.5, ConfigError, "has 1.5; a float is a share of all edges"),
        (-0.1, ConfigError, "has -0.1; a float is a share"),
        (float("nan"), ConfigError, "has nan; a float is a share"),
        (True, ConfigError, "has True, which is not a number"),
    ],
)
def test_bad_counts(count: int | float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        edge_counts_util(EDGES, [count])


def test_bad_true_size() -> None:
    with pytest.raises(GraphError, match="`true_edge_count` has 20"):
        edge_counts_util(EDGES, true_edge_count=20)
