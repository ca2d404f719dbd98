"""ROCs by hand on the micro model, and their areas."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch as t

from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.metrics.official_circuits.measure_roc import (
    measure_roc,
    measure_roc_auc,
    measure_task_roc,
    roc_auc,
)
from auto_circuit.metrics.official_circuits.roc_plot import roc_plot, task_roc_plot
from auto_circuit.prune_algos.ground_truth import ground_truth_prune_scores
from auto_circuit.tasks import POCKET_IOI_TASK
from auto_circuit.types import Edge, Measurements, PruneScores
from auto_circuit.utils.patchable_model import PatchableModel
from tests.micro import micro_model

# 13 edges. The best five, in order; the others have a score of 0.
SCORES = {
    "B0.0->B1.0": 5.0,
    "B0.1->B1.0": -4.0,
    "Resid Start->B1.1": 3.0,
    "B1.0->Resid End": -3.0,
    "B1.1->Resid End": 1.0,
}
OFFICIAL = ["B0.0->B1.0", "B1.0->Resid End", "B0.0->Resid End"]


def micro_edges(model: PatchableModel, names: list[str]) -> list[Edge]:
    return [edge for name in names for edge in model.find_edges(name)]


def micro_roc(scores: PruneScores | None = None, all_edges: bool = True) -> Measurements:
    model = micro_model()
    scores = scores or model.circuit_prune_scores(edge_dict=SCORES)
    return measure_task_roc(model, micro_edges(model, OFFICIAL), scores, all_edges)


def test_roc_by_hand() -> None:
    # 3 true and 10 other edges. Circuits of 1, 2, 4 (a tie), 5 and 13 edges.
    expected = [
        *((0, 0), (0, 1 / 3)),
        *((0.1, 1 / 3), (0.2, 2 / 3)),
        *((0.3, 2 / 3), (1, 1)),
    ]
    assert t.allclose(t.tensor(micro_roc()), t.tensor(expected))
    assert micro_roc(all_edges=False) == micro_roc()


def test_area_by_hand() -> None:
    # Of 30 pairs: edge 1 wins 10; edge 3 loses one, ties with one, wins 8; the last
    # true edge loses 3 and ties with the other 7.
    assert roc_auc(micro_roc()) == pytest.approx((10 + 8.5 + 3.5) / 30)
    assert roc_auc(micro_roc(), pessimistic=True) == pytest.approx((10 + 8 + 0) / 30)


def test_circuits_that_grow_from_the_output_by_hand() -> None:
    """`B1.0->Resid End` opens the way for the two best edges; 9 others come before the third."""
    model = micro_model()
    official = micro_edges(model, OFFICIAL)
    scores = model.circuit_prune_scores(edge_dict=SCORES)
    points = measure_task_roc(model, official, scores, True, selection="greedy")
    assert points[:3] == [(0.0, 0.0), (0.0, 1 / 3), (0.0, 2 / 3)]
    assert roc_auc(points) == pytest.approx((10 + 10 + 1) / 30)


def test_area_is_the_probability_of_the_right_order() -> None:
    model = micro_model()
    official = micro_edges(model, OFFICIAL)
    generator = t.Generator().manual_seed(0)
    for _ in range(5):
        scores = {
            name: t.randint(-3, 4, mask.shape, generator=generator) * 1.0
            for name, mask in model.patch_masks.items()
        }
        by_edge = {e: abs(e.prune_score(scores).item()) for e in model.edges}
        true = [by_edge[edge] for edge in official]
        other = [by_edge[edge] for edge in model.edges if edge not in official]
        wins = sum((a > b) + 0.5 * (a == b) for a in true for b in other)
        points = measure_task_roc(model, official, scores, all_edges=True)
        assert roc_auc(points) == pytest.approx(wins / len(true) / len(other))


def test_perfect_opposite_and_constant_scores() -> None:
    model = micro_model()
    official = micro_edges(model, OFFICIAL)
    perfect = ground_truth_prune_scores(model, None, official)
    assert micro_roc(perfect) == [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    assert roc_auc(micro_roc(perfect)) == 1.0
    opposite = {name: 1 - scores for name, scores in perfect.items()}
    assert roc_auc(micro_roc(opposite)) == 0.0
    constant = model.new_prune_scores(2.0)
    assert roc_auc(micro_roc(constant)) == 0.5
    assert roc_auc(micro_roc(constant), pessimistic=True) == 0.0


def test_scores_of_other_types_and_orders() -> None:
    model = micro_model()
    official = micro_edges(model, OFFICIAL)
    is_true = model.circuit_prune_scores(official, bool=True)
    assert roc_auc(micro_roc(is_true)) == 1.0
    scores = model.circuit_prune_scores(edge_dict=SCORES)
    turned = dict(reversed(scores.items()))
    assert micro_roc(turned) == micro_roc(scores)
    halves = {name: value.to(t.bfloat16) for name, value in scores.items()}
    assert micro_roc(halves) == micro_roc(scores)
    scores["output"][1] = t.inf  # B0.0->Resid End, as ACDC scores what it never removes
    assert roc_auc(micro_roc(scores)) == pytest.approx((10 + 10 + 8.5) / 30)


def test_a_figure_of_a_large_graph_has_few_points() -> None:
    model = POCKET_IOI_TASK.model
    generator = t.Generator().manual_seed(0)
    scores = {
        name: t.rand(mask.shape, generator=generator)
        for name, mask in model.patch_masks.items()
    }
    official = list(model.edges)[::10]
    exact = measure_task_roc(model, official, scores, all_edges=True)
    assert len(exact) == model.n_edges + 1
    few = measure_task_roc(model, official, scores)
    assert 20 < len(few) < 40 and set(few) <= set(exact)
    assert roc_auc(exact) == pytest.approx(0.5, abs=0.06)
    assert roc_auc(few) == pytest.approx(roc_auc(exact), abs=0.02)


# ------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class MicroTask:
    key: str = "Micro"
    model: PatchableModel = field(default_factory=micro_model)
    official: tuple[str, ...] | None = tuple(OFFICIAL)

    @property
    def true_edges(self) -> list[Edge] | None:
        if self.official is None:
            return None
        return micro_edges(self.model, list(self.official))

    @property
    def true_edge_count(self) -> int | None:
        return None if self.official is None else len(self.official)


def test_roc_of_tasks() -> None:
    task: Any = MicroTask()
    perfect = ground_truth_prune_scores(task.model, None, task.true_edges)
    scores = {"Micro": {"EAP": task.model.circuit_prune_scores(edge_dict=SCORES)}}
    scores["Micro"]["GT"] = perfect
    measured = measure_roc(scores, tasks=[task])
    assert measured == {"Micro": {"EAP": micro_roc(), "GT": micro_roc(perfect)}}
    assert measure_roc_auc(scores, tasks=[task]) == {
        "Micro": {"EAP": pytest.approx(22 / 30), "GT": 1.0}
    }
    pessimistic = measure_roc_auc(scores, tasks=[task], pessimistic=True)
    assert pessimistic["Micro"]["EAP"] == pytest.approx(18 / 30)


def test_tasks_without_a_known_circuit() -> None:
    task: Any = MicroTask()
    unknown: Any = replace(task, key="Unknown", official=None)
    with pytest.raises(
        ConfigError, match="No true edges are known for the tasks 'Unknown'"
    ):
        measure_roc({"Micro": {}, "Unknown": {}}, tasks=[task, unknown])
    with pytest.raises(ConfigError, match="no such task. Did you mean 'Micro'"):
        measure_roc({"Mikro": {}}, tasks=[task])
    with pytest.raises(ConfigError, match="No true edges are known for.*'Pocket IOI'"):
        measure_roc({"Pocket IOI": {}})


# ------------------------------------------------------------------------------ errors


def test_circuits_and_scores_that_do_not_fit() -> None:
    model = micro_model()
    scores = model.new_prune_scores()
    for edges in ([], list(model.edges)):
        with pytest.raises(
            ConfigError, match=rf"{len(edges)} of the graph's 13 edges are true"
        ):
            measure_task_roc(model, edges, scores)
    official = micro_edges(model, OFFICIAL)
    with pytest.raises(
        GraphError, match="'output' have shape .5,.; the graph needs .3,."
    ):
        measure_task_roc(
            micro_model(factorized=False), official, {"output": scores["output"]}
        )
    other = micro_edges(micro_model(seq_len=2), ["B0.0->B1.0 @ 1"])
    with pytest.raises(GraphError, match="no edge 'B0.0->B1.0 @ 1'"):
        measure_task_roc(model, other, scores)
    scores["output"][0] = t.nan
    with pytest.raises(GraphError, match="are NaN"):
        measure_task_roc(model, official, scores)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(0.0, 0.0)],
        [(0.1, 0.0), (1.0, 1.0)],
        [(0.0, 0.0), (0.5, 0.6), (0.4, 0.7), (1.0, 1.0)],
    ],
)
def test_points_that_are_no_roc(points: Measurements) -> None:
    with pytest.raises(ConfigError, match="The points are no ROC"):
        roc_auc(points)


# ----------------------------------------------------------------------------- figures


def test_the_figures() -> None:
    points: Measurements = [(0.0, 0.0), (0.2, 0.9), (1.0, 1.0)]
    rocs = {
        "First": {"EAP": points, "GT": points},
        "Second": {"GT": points},
    }
    fig = roc_plot(rocs, variable_width=True, algo_names={"GT": "Ground Truth"})
    assert [title.text for title in fig.layout.annotations] == ["First", "Second"]
    lines = [trace for trace in fig.data if trace.name is not None]
    assert [line.name for line in lines] == ["EAP", "Ground Truth", "Ground Truth"]
    assert list(lines[0].x) == [0.0, 0.2, 1.0] and list(lines[0].y) == [0.0, 0.9, 1.0]
    assert [line.line.width for line in lines] == [4, 2, 2]
    assert lines[1].line.color == lines[2].line.color != lines[0].line.color
    assert [line.showlegend for line in lines] == [True, True, False]
    widths = {trace.line.width for trace in roc_plot(rocs).data if trace.name}
    assert widths == {2}
    one = task_roc_plot(rocs["First"], title="First")
    assert [trace.name for trace in one.data if trace.name] == ["EAP", "GT"]
    assert one.layout.annotations[0].text == "First"


def test_areas_in_the_figure() -> None:
    points: Measurements = [(0.0, 0.0), (0.2, 0.9), (1.0, 1.0)]
    areas = {("First", "EAP"): 0.85, ("Second", "EAP"): 0.75}
    one = roc_plot({"First": {"EAP": points, "GT": points}}, areas=areas)
    lines = [trace for trace in one.data if trace.name is not None]
    assert [line.name for line in lines] == ["EAP (0.850)", "GT"]
    assert lines[0].hovertemplate.endswith("AUROC 0.850")
    # In a legend for two tasks there is no place for two numbers.
    two = roc_plot({key: {"EAP": points} for key in ("First", "Second")}, areas=areas)
    lines = [trace for trace in two.data if trace.name is not None]
    assert [line.name for line in lines] == ["EAP", "EAP"]
    assert lines[1].hovertemplate.endswith("AUROC 0.750")


def test_lines_of_many_algorithms_differ() -> None:
    """Up to 12 of them; of more, all after the 11th are one group, named where the mouse is."""
    points: Measurements = [(0.0, 0.0), (1.0, 1.0)]
    for n in (12, 26):
        fig = roc_plot({"Task": {f"algo {i}": points for i in range(n)}})
        lines = [trace for trace in fig.data if trace.name]
        assert len(lines) == n
        styles = {(trace.line.color, trace.line.dash) for trace in lines}
        assert len(styles) == 12
        in_legend = [trace.name for trace in lines if trace.showlegend]
        assert len(in_legend) == 12
    assert in_legend[:2] == ["algo 0", "algo 1"] and in_legend[-1].startswith("15 more")
    for i, trace in enumerate(lines[11:], start=11):
        assert trace.legendgroup == "others"
        assert trace.hovertemplate.endswith(f"<extra>algo {i}</extra>")
