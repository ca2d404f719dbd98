"""Similarities of circuits by hand, with and without ties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch as t

from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.metrics.prune_scores_similarity import (
    prune_score_similarities,
    prune_score_similarities_plotly,
    task_prune_scores_similarities,
)
from auto_circuit.types import PruneScores

N_EDGES = 6


def scores(*values: float) -> PruneScores:
    """Six scores in two modules."""
    assert len(values) == N_EDGES
    return {"a": t.tensor(values[:2]), "b": t.tensor([values[2:4], values[4:]])}


ONE = scores(6.0, -5.0, 4.0, 3.0, 2.0, 1.0)
OTHER = scores(5.0, 1.0, -6.0, 2.0, 4.0, 3.0)  # its best: edges 2, 0, 4, 5, 3, 1
ALGOS = {"One": ONE, "Other": OTHER}


@pytest.mark.parametrize(
    ("edge_count", "similarity"),
    [(0, 1.0), (1, 0.0), (2, 1 / 2), (3, 2 / 3), (4, 2 / 4), (5, 4 / 5), (6, 1.0)],
)
def test_similarity_by_hand(edge_count: int, similarity: float) -> None:
    found = prune_score_similarities(ALGOS, [edge_count])
    assert found == {
        edge_count: {
            "One": {"One": 1.0, "Other": pytest.approx(similarity)},
            "Other": {"Other": 1.0},
        }
    }


def test_circuits_with_ties_are_as_large_as_they_are_run() -> None:
    # Its circuit of 2 edges has the 4 best: one edge, and three that tie.
    tied = scores(9.0, 0.0, -2.0, 2.0, 2.0, 0.0)
    found = prune_score_similarities({"One": ONE, "Tied": tied}, [1, 2, 4])
    assert found[1]["One"]["Tied"] == 1.0
    # Edges {0, 1} and {0, 2, 3, 4}; then {0, 1, 2, 3} and {0, 2, 3, 4}.
    assert found[2]["One"]["Tied"] == pytest.approx(1 / 4)
    assert found[4]["One"]["Tied"] == pytest.approx(3 / 4)
    assert found[2]["Tied"]["Tied"] == 1.0


def test_infinite_scores_are_in_no_circuit_of_0_edges() -> None:
    infinite = scores(t.inf, t.inf, 0.0, 0.0, 0.0, 0.0)
    found = prune_score_similarities({"ACDC": infinite, "One": ONE}, [0, 2])
    assert found[0]["ACDC"]["One"] == 1.0
    assert found[2]["ACDC"]["One"] == 1.0


def test_the_order_of_modules_does_not_matter() -> None:
    turned = dict(reversed(OTHER.items()))
    found = prune_score_similarities({"One": ONE, "Other": turned}, [3])
    assert found[3]["One"]["Other"] == pytest.approx(2 / 3)


def test_sizes_can_be_shares() -> None:
    assert prune_score_similarities(ALGOS, [0.5]) == prune_score_similarities(ALGOS, [3])


def test_random_circuits_share_what_is_expected() -> None:
    generator = t.Generator().manual_seed(0)
    algos = {name: {"a": t.rand(10_000, generator=generator)} for name in "ab"}
    found = prune_score_similarities(algos, [1000])
    assert found[1000]["a"]["b"] == pytest.approx(0.1, abs=0.03)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="`edge_counts` is empty"):
        prune_score_similarities(ALGOS, [])
    with pytest.raises(ConfigError, match="`algo_prune_scores` is empty"):
        prune_score_similarities({}, [1])
    with pytest.raises(GraphError, match="`edge_counts` has 7, .* only 6 edges"):
        prune_score_similarities(ALGOS, [7])
    with pytest.raises(ConfigError, match="`edge_counts` has 1.5; a float is a share"):
        prune_score_similarities(ALGOS, [1.5])
    with pytest.raises(GraphError, match="are NaN"):
        prune_score_similarities({"One": scores(t.nan, 0, 0, 0, 0, 0)}, [1])
    with pytest.raises(GraphError, match="'One' and of 'Small' are of different graphs"):
        prune_score_similarities({"One": ONE, "Small": {"a": t.ones(2)}}, [1])


@dataclass(frozen=True)
class SizedTask:
    key: str
    true_edge_count: int | None

    @property
    def true_edges(self) -> list[int] | None:
        n_edges = self.true_edge_count
        return None if n_edges is None else list(range(n_edges))


def test_tasks() -> None:
    task_scores = {"First": ALGOS, "Second": {"One": ONE}}
    found = task_prune_scores_similarities(task_scores, [3])
    assert found["First"] == prune_score_similarities(ALGOS, [3])
    assert found["Second"] == {3: {"One": {"One": 1.0}}}


def test_the_sizes_of_known_circuits() -> None:
    tasks: Any = [SizedTask("First", 5), SizedTask("Second", 2), SizedTask("None", None)]
    task_scores = {"First": ALGOS, "Second": ALGOS}
    found = task_prune_scores_similarities(task_scores, [], True, tasks=tasks)
    assert {key: list(by_count) for key, by_count in found.items()} == {
        "First": [5],
        "Second": [2],
    }
    assert found["Second"][2]["One"]["Other"] == pytest.approx(1 / 2)
    with pytest.raises(ConfigError, match="No true edges are known for the tasks 'None'"):
        task_prune_scores_similarities({"None": ALGOS}, [1], True, tasks=tasks)


def test_the_figure() -> None:
    tasks: Any = [SizedTask("First", 5), SizedTask("Second", 3)]
    fig: Any = prune_score_similarities_plotly(
        {"First": ALGOS, "Second": ALGOS},
        [3],
        ground_truths=True,
        tasks=tasks,
        algo_names={"Other": "The Other"},
    )
    titles = [title.text for title in fig.layout.annotations]
    assert titles == ["First<br>3 edges", "Second<br>3 edges", "First<br>5 edges"]
    assert len(fig.data) == 3
    of_5_edges = fig.data[1]
    assert list(of_5_edges.x) == list(of_5_edges.y) == ["One", "The Other"]
    assert list(of_5_edges.z[0]) == [1.0, pytest.approx(4 / 5)]
    assert list(of_5_edges.z[1]) == [None, 1.0]
    assert fig.layout.coloraxis.cmin == 0 and fig.layout.coloraxis.cmax == 1


def test_the_order_of_modules_does_not_count() -> None:
    scores = {"a": t.tensor([3.0, 0.0, 1.0]), "b": t.tensor([0.0, 2.0])}
    turned = dict(reversed(scores.items()))
    for by_algo in prune_score_similarities({"x": scores, "y": turned}, [1, 2]).values():
        assert by_algo["x"]["y"] == 1.0
