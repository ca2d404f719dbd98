"""`explore`: the circuits of a task, in a notebook or as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_circuit.checks import checked
from auto_circuit.errors import ConfigError
from auto_circuit.explorer.data import TaskView, algorithm_view
from auto_circuit.explorer.page import write_explorer
from auto_circuit.explorer.picture import first_picture
from auto_circuit.explorer.task_view import task_view
from auto_circuit.tasks import Task
from auto_circuit.types import MeasurementRow, PruneScores

HOW_TO_INSTALL = (
    "The explorer in a notebook needs anywidget, which is not installed: "
    "`pip install anywidget`, or write a page instead: "
    '`explore(task, scores).write("circuits.html")`.'
)


class CircuitExplorer:
    """The explorer of some tasks: shown in a notebook, or written as a page.

    Last in a notebook's cell it is shown there, as a widget (extra `notebook`).
    views: what it shows, as data.
    """

    def __init__(self, views: Sequence[TaskView]) -> None:
        self.views = tuple(views)

    def write(self, path: Path | str) -> Path:
        """Write it as a page that needs no network; returns the path."""
        names = ", ".join(view.name for view in self.views)
        return write_explorer(path, self.views, f"Circuits: {names}")

    def widget(self) -> Any:
        """It as a notebook's widget. Raises ConfigError if anywidget is not installed."""
        try:
            from auto_circuit.explorer.widget import explorer_widget
        except ModuleNotFoundError as error:
            if error.name != "anywidget":
                raise
            raise ConfigError(HOW_TO_INSTALL) from None
        return explorer_widget(self.views)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = self.widget()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        # Where a notebook is read and not run, a picture.
        still = {"text/html": first_picture(self.views), "text/plain": repr(self)}
        return {**data, **still}, metadata

    def __repr__(self) -> str:
        shown = [
            f"{view.key!r}: {', '.join(one.name for one in view.algorithms)}"
            for view in self.views
        ]
        return f"CircuitExplorer({'; '.join(shown)}); .write(path) makes a page of it"


@checked
def explore(
    task: Task | Sequence[TaskView],
    scores: Mapping[str, PruneScores | Sequence[PruneScores]] | None = None,
    measurements: Mapping[str, Sequence[MeasurementRow]] | None = None,
) -> CircuitExplorer:
    """Look at circuits: which edges, how strong, what its heads attend to and write.

    task: a Task, whose model loads; or views that were made before (`task_view`,
        `algorithm_view`), and no scores.
    scores: algorithm's name -> its scores, or a list with those of several seeds.
    measurements: algorithm's name -> what was measured of its circuits, by one way of
        testing; their sizes are those of the slider. Without any, sizes from 0 to all.

    In a notebook the result shows itself; `.write("circuits.html")` makes a page of it.
    Raises ConfigError for measurements of an algorithm without scores, GraphError for
    scores that are not of the task's graph.
    """
    if not isinstance(task, Task):
        if scores is not None or measurements is not None:
            raise ConfigError(
                "`scores` and `measurements` are of a Task; views have theirs already. "
                "Leave them out, or give the Task."
            )
        return CircuitExplorer(task)
    if not scores:
        raise ConfigError(
            "`scores` is empty; expected the scores of at least one algorithm, such as "
            '{"EAP": find_prune_algo("EAP").func(task.model, task.train_loader, None)}.'
        )
    measurements = measurements or {}
    if unknown := [name for name in measurements if name not in scores]:
        raise ConfigError(
            f"`measurements` names {unknown[0]!r}, which `scores` does not: {list(scores)}."
        )
    view = task_view(task)
    algorithms = [
        algorithm_view(
            view.graph,
            name,
            [of_algorithm] if isinstance(of_algorithm, Mapping) else of_algorithm,
            measurements.get(name, ()),
        )
        for name, of_algorithm in scores.items()
    ]
    return CircuitExplorer([view.with_algorithms(algorithms)])
