"""A sweep as cells: the scores of each task, algorithm and seed, and what is measured of them.

A cell's key is made from all that changes its result (`fingerprints`): the model's weights,
the prompts, the task's fields, the algorithm's options, the seed; for measurements also the
metrics and the way of testing. What is stored is read; the rest is computed by
`sweep.find_scores` and `sweep.measure_scores`, and stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch.nn import Module

from auto_circuit.cells import Outcome, Work
from auto_circuit.errors import ModelError, about
from auto_circuit.explorer.data import VERSION as VIEW_VERSION
from auto_circuit.explorer.task_view import task_view
from auto_circuit.fingerprints import (
    described,
    digest,
    digest_of_folder,
    version_of,
)
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prune_metrics import PruneMetric
from auto_circuit.origins import CellOrigin, Origin, TaskOrigin
from auto_circuit.prune_algos.prune_algos import PruneAlgo
from auto_circuit.result_names import ONLY_IF_GIVEN
from auto_circuit.store import Cell, CellResult
from auto_circuit.sweep import (
    FoundCircuit,
    FoundScores,
    ScoreMeasurements,
    TaskRun,
    algos_of_seed,
    find_scores,
    measure_scores,
)
from auto_circuit.sweep_config import ExperimentConfig, Plan
from auto_circuit.tasks import Task
from auto_circuit.types import AlgoKey, MeasurementRow, TaskKey

if TYPE_CHECKING:
    import pandas

SCORES, MEASUREMENTS, EXAMPLES = "scores", "measurements", "examples"
"""Kinds of cells."""

NOT_OF_RESULTS = (
    *("key", "name", "device", "seed", "memory_limit"),
    *("_model_def", "_dataset_name", "autoencoders"),
)
"""Fields of a Task that change no number, or that are described by what they stand for."""


# ------------------------------------------------------------------------------ the graph


@dataclass(frozen=True)
class SweepCell:
    """The two cells of one task, algorithm and seed."""

    task: TaskKey
    seed: int
    algo: AlgoKey
    algo_name: str
    scores: Work
    measurements: Work

    @property
    def works(self) -> tuple[Work, Work]:
        """The scores, and what is measured of them."""
        return self.scores, self.measurements


def sweep_cells(plan: Plan, config: ExperimentConfig) -> list[SweepCell]:
    """All cells of a sweep that was checked, in the order in which they are computed.

    Algorithms that need true edges are left out on tasks without. Raises ConfigError for
    a task, algorithm or metric of which two cannot be told apart (`described`).
    """
    cells = []
    for task in plan.tasks:
        with about(f"Task {task.key!r}"):
            description = task_description(task)
        for seed in config.seeds:
            for algo in algos_of_seed(plan, config, seed):
                if has_true_edges(task) or not algo.needs_true_edges:
                    of_task = _OfTask(task, description, seed)
                    cells.append(_sweep_cell(of_task, algo, plan.metrics, config))
    return cells


def has_true_edges(task: Task) -> bool:
    """Are they known? A task that loads in a way of its own is asked when it has loaded."""
    loads_itself = type(task).init_task is not Task.init_task
    return task._true_edge_func is not None or (
        loads_itself and task.true_edges is not None
    )


@dataclass(frozen=True)
class ExamplesCell:
    """The cell of what a report shows of a task (`task_view`), which needs its model."""

    task: Task
    seed: int
    work: Work


def examples_cells(plan: Plan, config: ExperimentConfig) -> list[ExamplesCell]:
    """One for each task, with the prompts of the first seed. Raises as `sweep_cells` does."""
    return [_examples_cell(task, config.seed) for task in plan.tasks]


def _examples_cell(task: Task, seed: int) -> ExamplesCell:
    with about(f"Task {task.key!r}"):
        what = {"task": task_description(task), "seed": seed, "version": VIEW_VERSION}
    cell = Cell(EXAMPLES, what, f"{task.key}, seed {seed}: examples")
    work = Work(cell, _ShowExamples(seed), uses=TaskInUse(task))
    return ExamplesCell(task, seed, work)


@dataclass(frozen=True)
class _OfTask:
    task: Task
    description: Mapping[str, Any]
    seed: int


def _sweep_cell(
    of_task: _OfTask,
    algo: PruneAlgo,
    metrics: Sequence[PruneMetric],
    config: ExperimentConfig,
) -> SweepCell:
    task, seed = of_task.task, of_task.seed
    scores = scores_work(task, of_task.description, seed, algo)
    measure = _Measure(algo, tuple(metrics), config, seed)
    measured = Cell(
        MEASUREMENTS,
        {"scores": scores.cell.key, **measure.description},
        f"{task.key}, seed {seed}, {algo.short_name}: measurements",
    )
    return SweepCell(
        task=task.key,
        seed=seed,
        algo=algo.key,
        algo_name=algo.short_name,
        scores=scores,
        measurements=Work(measured, measure, (scores.cell,), scores.uses),
    )


def scores_work(
    task: Task, description: Mapping[str, Any], seed: int, algo: PruneAlgo
) -> Work:
    """The scores of a task, which has a description, and an algorithm that has the seed.

    Raises ConfigError for an algorithm of which two cannot be told apart.
    """
    with about(f"Algorithm {algo.short_name!r}"):
        algo_description = described(algo.func)
    what = {"task": description, "seed": seed, "algorithm": algo_description}
    cell = Cell(SCORES, what, f"{task.key}, seed {seed}, {algo.short_name}: scores")
    return Work(cell, _Find(algo, seed), uses=TaskInUse(task))


# ---------------------------------------------------------------------------- computation


@dataclass(frozen=True)
class TaskInUse:
    """Opens a task: its model loads, and goes at the end."""

    task: Task

    @contextmanager
    def __call__(self) -> Iterator[OpenTask]:
        opened = OpenTask(self.task)
        try:
            opened.of_seed(self.task.seed)
            yield opened
        finally:
            opened.free()


class OpenTask:
    """A task at work: one model for all seeds, and the full model's outputs of the last one."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._of_seed: Task | None = None
        self._full: FullModelOuts | None = None

    def of_seed(self, seed: int) -> Task:
        """The task with the prompts of a seed."""
        if self._of_seed is None or self._of_seed.seed != seed:
            self._full = None
            self._of_seed = self._task.with_seed(seed)
        return self._of_seed

    def full_model_outs(self, seed: int) -> FullModelOuts:
        """The full model's outputs on the test prompts of a seed."""
        task = self.of_seed(seed)
        if self._full is None:
            self._full = FullModelOuts(task.model, task.test_loader)
        return self._full

    def free(self) -> None:
        """Drop all that was loaded."""
        self._of_seed = self._full = None
        self._task.free()


@dataclass(frozen=True)
class _Find:
    """The scores of an algorithm, which draws from the seed already."""

    algo: PruneAlgo
    seed: int

    def __call__(self, opened: OpenTask) -> CellResult:
        task = opened.of_seed(self.seed)
        task.model  # loads now, so that no algorithm's time includes it  # noqa: B018
        found = find_scores(task, self.algo)
        return CellResult(found.scores, cost={"scoring_seconds": found.seconds})


@dataclass(frozen=True)
class _ShowExamples:
    """What a report shows of a task."""

    seed: int

    def __call__(self, opened: OpenTask) -> CellResult:
        return CellResult(numbers=task_view(opened.of_seed(self.seed)).as_data())


@dataclass(frozen=True)
class _Measure:
    """What is measured of the circuits that scores make."""

    algo: PruneAlgo
    metrics: tuple[PruneMetric, ...]
    config: ExperimentConfig
    seed: int

    @property
    def description(self) -> dict[str, Any]:
        """All that changes the measurements but the scores."""
        config = self.config
        return {
            "metrics": [described(metric) for metric in self.metrics],
            "ablation": described(config.ablation),
            "patch_type": described(config.patch_type),
            "reverse_clean_corrupt": config.reverse_clean_corrupt,
            "sizes": described(config.test_edges),
            "with_circuit": self.seed == config.seed,
        }

    def __call__(self, opened: OpenTask, scores: CellResult) -> CellResult:
        task = opened.of_seed(self.seed)
        found = found_scores(task, self.algo, scores)
        full = opened.full_model_outs(self.seed)
        measured = measure_scores(task, found, self.metrics, self.config, full)
        return _result_of(measured)


# ------------------------------------------------------------------------ results <-> data


def _result_of(measured: ScoreMeasurements) -> CellResult:
    import pandas

    numbers: dict[str, Any] = {"roc": measured.roc, "auroc": measured.auroc}
    if measured.circuit is not None:
        circuit = measured.circuit
        as_data = {f.name: getattr(circuit, f.name) for f in fields(circuit)}
        numbers["circuit"] = as_data | {"drawing": circuit.drawing.as_data()}
    rows = pandas.DataFrame(
        [asdict(row) for row in measured.rows],
        columns=[f.name for f in fields(MeasurementRow)],
    )
    return CellResult(rows=rows, numbers=numbers)


def found_scores(task: Task, algo: PruneAlgo, scores: CellResult) -> FoundScores:
    """What the cell of an algorithm's scores holds."""
    named = (task.key, task.seed, algo.key, algo.short_name)
    seconds = float(scores.cost["scoring_seconds"])
    return FoundScores(*named, dict(scores.tensors), seconds)


def _measured_of(result: CellResult, cell: SweepCell) -> ScoreMeasurements:
    assert result.rows is not None
    rows = [
        replace(row, task=cell.task, algo=cell.algo)
        for row in measurement_rows(result.rows)
    ]
    circuit, roc = result.numbers.get("circuit"), result.numbers["roc"]
    if circuit is not None:
        from auto_circuit.visualize import Drawing

        drawing = Drawing.of_data(circuit["drawing"])
        circuit = FoundCircuit(**{**circuit, "drawing": drawing})
    return ScoreMeasurements(
        algo=cell.algo,
        rows=tuple(rows),
        circuit=circuit,
        roc=None if roc is None else [(x, y) for x, y in roc],
        auroc=result.numbers["auroc"],
    )


def measurement_rows(table: pandas.DataFrame) -> list[MeasurementRow]:
    """The rows of a table, in which a number that is missing is NaN."""
    return [_row(record) for record in table.to_dict("records")]


def _row(record: Mapping[Any, Any]) -> MeasurementRow:
    row: dict[str, Any] = {
        name: None if name != "value" and value != value else value
        for name, value in record.items()
    }
    for name in ("n_prompts", "seed"):
        row[name] = None if row[name] is None else int(row[name])
    return MeasurementRow(**row)


@dataclass
class FinishedCells:
    """What a sweep's cells have given so far; it grows while the sweep runs."""

    cells: Sequence[SweepCell]
    of_examples: Sequence[ExamplesCell] = ()
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """One more has come to its end."""
        self.outcomes[outcome.cell.key] = outcome

    @property
    def failed(self) -> dict[str, str]:
        """The label of each that ended with an error -> the error."""
        return {o.cell.label: o.error for o in self.outcomes.values() if o.error}

    @property
    def keys(self) -> tuple[str, ...]:
        """Of those that have a result."""
        done = [key for key, o in self.outcomes.items() if o.result is not None]
        return tuple(sorted(done))

    @property
    def examples(self) -> dict[TaskKey, Mapping[str, Any]]:
        """What there is to show of each task."""
        found = {one.task.key: self._result(one.work) for one in self.of_examples}
        return {task: one.numbers for task, one in found.items() if one is not None}

    @property
    def origin(self) -> Origin:
        """What the tasks are made of, and what each finished cell has cost."""
        cells = [
            self._cell_origin(work, one.task, one.seed, one.algo)
            for one in self.cells
            for work in one.works
        ] + [
            self._cell_origin(one.work, one.task.key, one.seed, None)
            for one in self.of_examples
        ]
        tasks = {one.task.key: _task_origin(one) for one in self.of_examples}
        return Origin(tasks, tuple(cell for cell in cells if cell is not None))

    def _cell_origin(
        self, work: Work, task: TaskKey, seed: int, algo: AlgoKey | None
    ) -> CellOrigin | None:
        result, cell = self._result(work), work.cell
        if result is None:
            return None
        return CellOrigin(cell.kind, cell.key, cell.label, task, seed, algo, result.cost)

    def runs(self) -> list[TaskRun]:
        """The run of each task and seed, of the algorithms that have been measured."""
        runs: dict[tuple[TaskKey, int], list[SweepCell]] = {}
        for cell in self.cells:
            if self._result(cell.measurements) is not None:
                runs.setdefault((cell.task, cell.seed), []).append(cell)
        return [self._run(task, seed, cells) for (task, seed), cells in runs.items()]

    def _run(self, task: TaskKey, seed: int, cells: Sequence[SweepCell]) -> TaskRun:
        found, measured = [], []
        for cell in cells:
            scores, rows = self._result(cell.scores), self._result(cell.measurements)
            assert scores is not None and rows is not None
            seconds = float(scores.cost["scoring_seconds"])
            named = (task, seed, cell.algo, cell.algo_name)
            found.append(FoundScores(*named, dict(scores.tensors), seconds))
            measured.append(_measured_of(rows, cell))
        return TaskRun(task, seed, tuple(found), tuple(measured))

    def _result(self, work: Work) -> CellResult | None:
        outcome = self.outcomes.get(work.cell.key)
        return None if outcome is None else outcome.result


def _task_origin(one: ExamplesCell) -> TaskOrigin:
    task, model = one.task, one.task._model_def
    is_named = not isinstance(model, Module)
    return TaskOrigin(
        name=task.name,
        model=_short_place(model) if is_named else type(model).__name__,
        prompts=_short_place(task._dataset_name),
        what=one.work.cell.what["task"],
    )


def _short_place(place: Any) -> str:
    """A name, or the last part of a path, which is another on every machine."""
    return place.name if isinstance(place, Path) else str(place)


# -------------------------------------------------------------------- what a task is made of


def task_description(task: Task) -> dict[str, Any]:
    """All of a task that changes a result but its seed: weights and prompts by content."""
    rest = {
        f.name: getattr(task, f.name)
        for f in fields(task)
        if f.metadata != ONLY_IF_GIVEN or getattr(task, f.name) != f.default
    }
    rest = {name: described(v) for name, v in rest.items() if name not in NOT_OF_RESULTS}
    if task.autoencoders is not None:
        folders = [p for p in Path(task.autoencoders).glob("*") if p.is_dir()]
        rest["autoencoders"] = {p.name: digest_of_folder(p) for p in sorted(folders)}
    if type(task).init_task is not Task.init_task:
        loaded = [task.model.wrapped_model, *_batches(task)]
        return {"class": described(type(task)), "loaded": described(loaded), **rest}
    prompts = digest(task.prompt_path.read_bytes())
    return {"weights": weights_description(task), "prompts": prompts, **rest}


def _batches(task: Task) -> list[Any]:
    batches = [*task.train_loader, *task.test_loader]
    return [[b.clean, b.corrupt, b.answers, b.wrong_answers] for b in batches]


def weights_description(task: Task) -> Any:
    """A task's weights by their content; of a compiled model, what it is compiled from."""
    model = task._model_def
    if isinstance(model, Module):
        return described(model)
    if Path(model).is_dir():
        return digest_of_folder(Path(model))
    if (of_files := _hub_folder(str(model))) is not None:
        return of_files
    # It imports TransformerLens, which takes seconds.
    from auto_circuit.model_utils.tracr_model_utils import TRACR_TASK_KEY

    if model in get_args(TRACR_TASK_KEY):
        return {"program": str(model), "tracr": version_of("tracr-pypi")}
    return _downloaded(task) or {"unavailable": str(model)}


def _hub_folder(name: str) -> str | None:
    """The digest of a hub model's files, if they are on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return digest_of_folder(Path(path).parent) if isinstance(path, str) else None


def _downloaded(task: Task) -> Any:
    """The digest of what loading the model brings; None if it cannot be had."""
    try:
        model = task._bare_model
    except (ModelError, OSError):
        return None  # its cells will say so, and nothing is stored
    return _hub_folder(str(task._model_def)) or described(model)
