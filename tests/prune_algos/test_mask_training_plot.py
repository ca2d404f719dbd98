"""The figure of a training shows the numbers of its steps."""

from __future__ import annotations

import pytest

from auto_circuit.errors import ConfigError
from auto_circuit.prune_algos.mask_training import TrainingStep
from auto_circuit.prune_algos.mask_training_plot import mask_training_fig

STEPS = (
    TrainingStep(0, 3.0, 1.0, 2.0, 1500.0),
    TrainingStep(1, 2.5, 1.5, 1.0, 20.0, validation=1.75),
    TrainingStep(2, 1.5, 2.0, -0.5, 0.0),
    TrainingStep(3, 1.0, 0.5, 0.5, 10.0, validation=0.0),
)


def test_curves() -> None:
    fig = mask_training_fig(STEPS, title="A training")
    traces = {trace.name: trace for trace in fig.data}
    assert {name: list(trace.y) for name, trace in traces.items()} == {
        "Loss": [3.0, 2.5, 1.5, 1.0],
        "Faithfulness": [1.0, 1.5, 2.0, 0.5],
        "Penalty": [2.0, 1.0, -0.5, 0.5],
        "Faithfulness (validation)": [1.75, 0.0],
        "Expected edges": [1500.0, 20.0, 0.5, 10.0],
    }
    validation = traces.pop("Faithfulness (validation)")
    assert list(validation.x) == [1, 3]
    assert validation.mode == "markers"
    assert all(list(trace.x) == [0, 1, 2, 3] for trace in traces.values())
    assert all(trace.mode == "lines" for trace in traces.values())
    assert fig.layout.title.text == "A training"


def test_axes() -> None:
    """Edges alone are on the right axis, which is logarithmic."""
    fig = mask_training_fig(STEPS)
    axes = {trace.name: trace.yaxis or "y" for trace in fig.data}
    assert axes.pop("Expected edges") == "y2"
    assert set(axes.values()) == {"y"}
    assert fig.layout.yaxis2.type == "log" and fig.layout.yaxis2.side == "right"
    assert fig.layout.yaxis2.tickmode == "auto"
    assert fig.layout.yaxis.type != "log"
    assert fig.layout.yaxis2.title.text == "Expected edges"
    edges = fig.data[-1]
    assert list(edges.customdata) == [1500.0, 20.0, 0.0, 10.0]
    assert len({trace.line.color or trace.marker.color for trace in fig.data}) == 5


def test_no_validation() -> None:
    fig = mask_training_fig([STEPS[0], STEPS[2]])
    names = [trace.name for trace in fig.data]
    assert names == ["Loss", "Faithfulness", "Penalty", "Expected edges"]


def test_one_step_is_seen() -> None:
    fig = mask_training_fig([STEPS[0]])
    assert {trace.mode for trace in fig.data} == {"markers"}


def test_no_steps() -> None:
    with pytest.raises(ConfigError, match="no training steps"):
        mask_training_fig([])
