"""What a sweep is: a frozen configuration, and the tasks, algorithms and metrics it names.

What can be wrong is found here, before anything is computed: what names, numbers and prompt
files say (`check_config`, which loads no model), and what only loaded tasks can tell
(`check_tasks`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from auto_circuit.checks import (
    check_count,
    check_device,
    check_member,
    check_number,
    checked,
    shown,
)
from auto_circuit.errors import (
    ConfigError,
    DataError,
    ModelError,
    about,
    near_matches,
)
from auto_circuit.files import checked_file_name, parse_json
from auto_circuit.memory import MemoryLimit
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    PruneMetric,
    find_metric,
    with_mean_of_ratios,
)
from auto_circuit.metrics.prune_metrics.task_measurements import measured_values
from auto_circuit.prompt_files import READERS
from auto_circuit.prune_algos.prune_algos import PruneAlgo, find_prune_algo
from auto_circuit.result_names import ONLY_IF_GIVEN, NamesResults, slug
from auto_circuit.robustness import Choices, chosen_task
from auto_circuit.tasks import (
    POCKET_MODEL,
    POCKET_TASKS,
    Task,
    find_task,
    task_of_prompts,
)
from auto_circuit.types import AblationType, EdgeCounts, PatchType, TaskKey, TestEdges

MAX_SEED = 2**32 - 1
MAX_SEEDS = 31
"""More would run for days, and tell little more."""
MAX_SLUG = 200
"""Systems allow names of files of 255 bytes."""
MIN_FREE_BYTES = 8 * 2**20
"""Less room than this is too little for the results of any sweep."""


@checked
@dataclass(frozen=True)
class ExperimentConfig(Choices, NamesResults):
    """One experiment. Without arguments: the pocket tasks, which need no download."""

    name: str = "pocket"
    """The first part of the result folder's name."""
    tasks: tuple[str, ...] = tuple(task.key for task in POCKET_TASKS)
    """Keys of tasks (see auto_circuit/tasks.py), or prompt files of your own (.json, .jsonl,
    .csv): half of the prompts are for the algorithms, another half with each seed, and the
    others to test circuits."""
    algos: tuple[str, ...] = (
        *("GT", "Random", "Act Mag", "EAP", "EAP-IG inputs", "STP quick", "MAttr quick"),
    )
    """Names of prune algorithms (see auto_circuit/prune_algos/prune_algos.py). Those that
    need true edges are left out on tasks without."""
    metrics: tuple[str, ...] = ("Clean KL Div", "Logit Diff", "Logit Diff Percent")
    """Keys of metrics (see auto_circuit/metrics/prune_metrics/prune_metrics.py). Areas are of
    'Logit Diff Percent'; of accuracy, with 'Correct Answer Greater Than Incorrect Percent'."""
    edge_counts: EdgeCounts = EdgeCounts.COARSE
    """Which circuit sizes are tested: COARSE (1, 2, 4, 7, 10, 20, ...), LOGARITHMIC (1..9,
    10, 20, ...), ALL or GROUPS."""
    circuit_sizes: tuple[int, ...] = ()
    """Exactly these numbers of edges, instead of `edge_counts`."""
    circuit_shares: tuple[float, ...] = ()
    """Exactly these shares of all edges (0.05 is 5 %), instead of `edge_counts`."""
    ungroup: bool = False
    """With grouped-query attention, a key and a value for every query head (EAP-IG, MIB)?"""
    keep_positions: bool = False
    """Do zero and mean ablations keep position embeddings, as EAP-IG's tools do?"""
    seed: int = 42
    """Which prompts are picked from each task's file, and in which order, and all that
    algorithms draw at random."""
    n_seeds: int = 3
    """How many seeds (`seed`, `seed` + 1, ...): as many draws of the prompts."""
    once: tuple[str, ...] = ("ACDC quick", "STP quick", "EP quick", "MAttr quick")
    """Algorithms that run for the first seed only, because they are slow: their numbers are
    those of one draw, without an interval."""
    device: str | None = None
    """Where models run, for example "cuda"; None: a GPU if there is one."""
    model: str | None = field(default=None, metadata=ONLY_IF_GIVEN)
    """The model of tasks that are prompt files: a Hugging Face hub name or a local folder.
    None: the small one that comes with the package."""
    memory_limit: int | float | None = field(default=None, metadata=ONLY_IF_GIVEN)
    """The most memory that work on a model may take beside it: bytes (a whole number), or a
    share of what is free (0.5). Scores are the same, but for rounding."""
    checkpoint: bool = field(default=False, metadata=ONLY_IF_GIVEN)
    """With `memory_limit`: run blocks again in backward passes, instead of keeping their
    activations?"""
    spans: bool = field(default=False, metadata=ONLY_IF_GIVEN)
    """Does each span of the prompts have edges of its own: those that prompt files name, or
    tokens in a row with one label? See docs/how-to/positions.md."""
    crossing: bool = field(default=False, metadata=ONLY_IF_GIVEN)
    """Do graphs also have the edges that lead through attention, from one position or span to
    another?"""
    out: str | Path = "results"
    """The folder that holds the result folders, and all that was ever computed for them; or an
    address that fsspec knows, such as s3://bucket/results."""

    @property
    def address(self) -> str:
        """Where the results are: the same place for the same configuration."""
        return f"{str(self.out).rstrip('/')}/{self.name}-{self.digest}"

    @property
    def folder(self) -> Path:
        """The same as a folder of this machine."""
        return Path(self.address.removeprefix("file://"))

    @property
    def is_remote(self) -> bool:
        """Do the results go to another place than this machine's folders?"""
        return "://" in str(self.out) and not str(self.out).startswith("file://")

    @property
    def store(self) -> str:
        """Where all cells are, those of other experiments with the same `out` among them."""
        return f"{str(self.out).rstrip('/')}/cells"

    @property
    def seeds(self) -> range:
        """The seeds, ascending."""
        return range(self.seed, self.seed + self.n_seeds)

    @property
    def test_edges(self) -> TestEdges:
        """The circuit sizes, as the metrics take them."""
        return [*self.circuit_sizes, *self.circuit_shares] or self.edge_counts


@checked
def config_of_json(text: str, out: str | Path) -> ExperimentConfig:
    """The configuration whose `json` is `text`, with results in `out`, which that leaves out.

    Raises ConfigError for fields that there are not, and for values that they cannot have;
    DataError for what is no JSON.
    """
    content = parse_json(text, "The configuration")
    if not isinstance(content, dict):
        raise DataError("The configuration is no object of JSON.")
    kinds = get_type_hints(ExperimentConfig)
    unknown = [name for name in content if name not in kinds or name == "out"]
    if unknown:
        hints = "".join(near_matches(name, kinds) for name in unknown)
        raise ConfigError(
            f"An experiment has no field {', '.join(map(repr, unknown))}.{hints} It has "
            f"{', '.join(name for name in kinds if name != 'out')}."
        )
    read = {name: _as_kind(name, value, kinds[name]) for name, value in content.items()}
    return ExperimentConfig(**read, out=out)


def _as_kind(name: str, value: Any, kind: Any) -> Any:
    """A value of JSON as the field has it; what it cannot be, stays, for the checks."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        members = kind.__members__
        if value not in list(members):
            raise ConfigError(
                f"`{name}` is {shown(value)}; expected one of {', '.join(members)}."
                f"{near_matches(str(value), members)}"
            )
        return members[value]
    return tuple(value) if isinstance(value, list) else value


@checked
@dataclass(frozen=True)
class RunOptions:
    """How an experiment runs. It changes no result."""

    force: bool = False
    """Compute everything again, also what is stored."""
    only: tuple[str, ...] = ()
    """Names of the experiment's tasks and algorithms: compute only their cells, and take of
    the others what is stored. A task and an algorithm: only the cells of both."""
    workers: int = 0
    """How many processes compute, with Ray. 0: this one does; with `ray_address`, as many as
    there is room for."""
    ray_address: str | None = None
    """The address of a Ray cluster to compute on, such as auto or 10.0.0.1:6379."""
    threads: int | None = None
    """CPU threads of each process. None: as PyTorch chooses here. Another number can change
    the last digits of results."""


# ------------------------------------------------------------- checks, before any work


class Plan(NamedTuple):
    """The tasks, algorithms and metrics that a configuration names."""

    tasks: list[Task]
    algos: list[PruneAlgo]
    metrics: list[PruneMetric]


def check_config(config: ExperimentConfig) -> Plan:
    """What the configuration names. Raises for all that is wrong without loading a model.

    ConfigError for names, numbers, devices and folders; DataError for a prompt file that is
    not there, is not as it must be, or has not what an algorithm or a metric compares with.
    """
    checked_file_name("name", config.name)
    _check_numbers(config)
    tasks = [_task(key, config) for key in config.tasks]
    algos = [find_prune_algo(name) for name in config.algos]
    metrics = [find_metric(key) for key in config.metrics]
    for name in config.once:
        find_prune_algo(name)
    _check_not_empty(config)
    _check_prompt_files(config)
    _check_circuits_are_known(tasks, algos)
    _check_crossings(tasks, algos)
    _check_prompts(tasks, algos, metrics, config)
    if config.device is not None:
        check_device("device", config.device)
    _check_out_folder(config)
    if config.mean_of_ratios:
        metrics = [with_mean_of_ratios(metric) for metric in metrics]
    return Plan(tasks, algos, metrics)


def _check_prompts(
    tasks: Sequence[Task],
    algos: Sequence[PruneAlgo],
    metrics: Sequence[PruneMetric],
    config: ExperimentConfig,
) -> None:
    """Do the prompts have what algorithms and metrics compare? As their files have them."""
    for task, seed in product(tasks, config.seeds):
        train, test = replace(task, seed=seed).read_prompts()
        with about(f"Task {task.key!r}"):
            for algo in algos:
                algo.check_prompts(train)
            for metric in metrics:
                metric.check_prompts(test)


def _check_crossings(tasks: Sequence[Task], algos: Sequence[PruneAlgo]) -> None:
    """Do all algorithms score edges through attention, if a graph has them?"""
    unknown = [algo.short_name for algo in algos if not algo.scores_crossings]
    for task in tasks:
        if task.crossing and unknown:
            raise ConfigError(
                f"The graph of task {task.key!r} has edges through attention (`crossing`), "
                f"of which these algorithms know nothing: {', '.join(unknown)}. Leave them "
                "out of `algos`, or set `crossing` to False."
            )


def is_prompt_file(task: TaskKey) -> bool:
    """Does a configuration mean a prompt file by this, and no key of a task?"""
    return Path(task).suffix.lower() in READERS


def _task(key: TaskKey, config: ExperimentConfig) -> Task:
    if is_prompt_file(key):
        task = task_of_prompts(
            key, POCKET_MODEL if config.model is None else config.model
        )
    else:
        task = find_task(key)
    ungroup = task.ungroup or config.ungroup
    keep_positions = task.keep_positions or config.keep_positions
    task = replace(
        task,
        device=config.device,
        ungroup=ungroup,
        keep_positions=keep_positions,
        memory_limit=_limit(config) or task.memory_limit,
        crossing=task.crossing or config.crossing,
    )
    if config.spans:
        task = replace(task, token_circuit=False, span_circuit=True)
    return chosen_task(task, config)


def _limit(config: ExperimentConfig) -> MemoryLimit | None:
    if config.memory_limit is not None:
        return MemoryLimit(config.memory_limit, config.checkpoint)
    if config.checkpoint:
        raise ConfigError(
            "`checkpoint` goes with a `memory_limit`, and there is none. Give one: 0.8 is 80 % "
            "of what is free."
        )
    return None


def _check_numbers(config: ExperimentConfig) -> None:
    _limit(config)
    check_member("ablation", config.ablation, AblationType)
    check_member("patch_type", config.patch_type, PatchType)
    check_member("edge_counts", config.edge_counts, EdgeCounts)
    check_count("n_seeds", config.n_seeds, 1, MAX_SEEDS)
    check_count("seed", config.seed, 0, MAX_SEED + 1 - config.n_seeds)
    for size in config.circuit_sizes:
        check_count("circuit_sizes", size, 0)
    for share in config.circuit_shares:
        check_number("circuit_shares", share, 0, 1)


def check_options(options: RunOptions, plan: Plan) -> None:
    """Raise ConfigError for numbers that make no sense and names that `plan` has not."""
    check_count("workers", options.workers, 0)
    if options.threads is not None:
        check_count("threads", options.threads, 1)
    known = [task.key for task in plan.tasks] + [algo.short_name for algo in plan.algos]
    for name in options.only:
        if name not in known:
            raise ConfigError(
                f"`only` names {name!r}, which is no task or algorithm of this experiment."
                f"{near_matches(name, known)} It has {', '.join(map(repr, known))}."
            )


def _check_not_empty(config: ExperimentConfig) -> None:
    for of in ("tasks", "algos", "metrics"):
        names: tuple[str, ...] = getattr(config, of)
        if not names:
            raise ConfigError(f"`{of}` is empty; name at least one.")
        if len(set(names)) < len(names):
            raise ConfigError(f"`{of}` names one of {list(names)} twice.")
    algos = [find_prune_algo(name) for name in config.algos]
    if len(set(algos)) < len(algos):
        raise ConfigError(
            f"`algos` names an algorithm of {list(config.algos)} in two ways."
        )


def _check_prompt_files(config: ExperimentConfig) -> None:
    """Can results be called after them, and is `model` for any of them?"""
    if config.model is not None and not any(map(is_prompt_file, config.tasks)):
        raise ConfigError(
            f"`model` is {config.model!r}, but each of the tasks {list(config.tasks)} has a "
            f"model of its own. It is for tasks that are prompt files ({', '.join(READERS)})."
        )
    slugs: dict[str, TaskKey] = {}
    for task in filter(is_prompt_file, config.tasks):
        other = slugs.setdefault(slug(task), task)
        if other != task or len(slug(task).encode()) > MAX_SLUG:
            raise ConfigError(
                f"Results cannot be named after the prompt file {task!r:.300}: expected paths "
                f"of at most {MAX_SLUG} bytes, no two of which differ in signs alone. Rename "
                "the file, or give a shorter path."
            )


def _check_circuits_are_known(tasks: Sequence[Task], algos: Sequence[PruneAlgo]) -> None:
    """Algorithms that need true edges are left out of tasks without."""
    if not all(algo.needs_true_edges for algo in algos):
        return
    for task in tasks:
        if task._true_edge_func is None:
            raise ConfigError(
                f"{algos[0].short_name!r} needs true edges, and task {task.key!r} has "
                "none. Add another algorithm, such as 'EAP', or leave the task out."
            )


def _check_out_folder(config: ExperimentConfig) -> None:
    if not config.is_remote:  # else `open_store` says what can be said about it
        check_out_folder(config.folder)


def check_out_folder(folder: Path) -> None:
    """Raise ConfigError unless the results' folder can be made, with room for what is in it."""
    out = folder.parent
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
        n_free = shutil.disk_usage(out).free
    except (OSError, ValueError) as error:  # ValueError: NUL characters
        raise ConfigError(
            f"Results cannot be written to the folder {str(out)!r:.300} ({error}). "
            "Choose another one with `out`."
        ) from error
    if n_free < MIN_FREE_BYTES and not folder.exists():
        raise ConfigError(
            f"Only {n_free / 2**20:.1f} MiB are free for results in {str(out)!r:.300}; "
            f"figures alone take {MIN_FREE_BYTES / 2**20:.0f} MiB. Make room, or choose "
            "another folder with `out`."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"Results cannot be written to the folder {folder}: there is a file of that "
            "name. Move it away, or choose another `out`."
        )


# ------------------------------------------------ checks of loaded tasks, before any cell


def check_tasks(plan: Plan, config: ExperimentConfig) -> list[ModelError]:
    """Load each task, and look at what is only known then, before the first one runs.

    Returns the errors of models that cannot be had: their cells will fail, the others go on.
    Raises, of every error saying which task it is of, DataError for prompts that the model's
    tokenizer or graph has no place for and for metrics that cannot be measured on the model's
    outputs, ConfigError for sizes that the graph does not have, and ModelError if no model
    at all can be had.
    """
    errors = []
    for task in plan.tasks:
        try:
            with about(f"Task {task.key!r}"):
                for seed in config.seeds:
                    _check_task(task.with_seed(seed), plan, config)
        except ModelError as error:
            errors.append(error)
        # One alone stays for the sweep; of several, one is in memory at a time.
        if len(plan.tasks) > 1:
            task.free()
    if errors and len(errors) == len(plan.tasks):
        raise errors[0]
    return errors


def _check_task(task: Task, plan: Plan, config: ExperimentConfig) -> None:
    task.test_loader.check_complete()
    for algo in plan.algos:
        algo.check_prompts(task.train_loader)
    for metric in plan.metrics:
        metric.check_prompts(task.test_loader)
    n_edges = task.model.n_edges
    for size in config.circuit_sizes:
        if size > n_edges:
            raise ConfigError(
                f"`circuit_sizes` asks for {size} edges, but the graph of task "
                f"{task.key!r} has {n_edges}. Leave this size out, or give "
                "`circuit_shares`, which fit every graph."
            )
    if task.seed == config.seed:
        _check_outputs(task, plan.metrics)


def _check_outputs(task: Task, metrics: Sequence[PruneMetric]) -> None:
    """Can the metrics be measured on what the model itself gives for a few prompts?"""
    batch = next(iter(task.test_loader))
    full = FullModelOuts(task.model, [batch])
    outs = {task.model.n_edges: {batch.key: full.vals(batch, "clean")}}
    with warnings.catch_warnings():
        # What numbers may warn of, they say when they are the ones that count.
        warnings.simplefilter("ignore")
        for metric in metrics:
            measured_values(metric, task.model, [batch], outs, full)
