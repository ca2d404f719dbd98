"""The circuit track of the MIB benchmark: from a frozen configuration to data.

For one model and task, each algorithm scores the edges on prompts of the split train; the
circuits that its scores make are measured on another split, at ten sizes (`MIB_BUDGETS`):
by signed score for CPR and the accuracy area, by |score| for CMD. Which prompts count, and
what they are compared with, says `mib_prompts`; what CPR and CMD are, `faithfulness`.

The graph is the benchmark's: edges, with a key and a value for every query head; what is
patched in are the counterfactuals' activations ("patching"). Prompts begin with the
tokenizer's BOS token, if it has one.

Source: Mueller et al. 2025, MIB (arXiv 2504.13151), and the track's repository
(hannamw/MIB-circuit-track: run_attribution.py, run_evaluation.py, README.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch as t

from auto_circuit.checks import check_count, check_device, checked
from auto_circuit.circuit_files import check_mib_can_hold
from auto_circuit.data import PromptDataLoader, loader_of_prompts
from auto_circuit.errors import AutoCircuitError, ConfigError, about
from auto_circuit.files import checked_file_name
from auto_circuit.metrics.area_under_curve import accuracy_area
from auto_circuit.metrics.edge_ranks import Ranking
from auto_circuit.metrics.faithfulness import (
    FaithfulnessPoint,
    circuit_model_distance,
    circuit_performance_ratio,
    faithfulness_curves,
)
from auto_circuit.mib_config import MIB_MODELS, MibConfig
from auto_circuit.mib_prompts import (
    MibPair,
    MibPrompts,
    Split,
    find_mib_task,
    mib_prompts,
    read_mib_pairs,
)
from auto_circuit.prune_algos.prune_algos import PruneAlgo, find_prune_algo
from auto_circuit.sweep import FoundScores, find_scores
from auto_circuit.sweep_config import MAX_SEED, check_out_folder
from auto_circuit.tasks import Task
from auto_circuit.utils.custom_tqdm import tqdm
from auto_circuit.utils.graph_utils import patchable_model


@dataclass(frozen=True)
class MibResult:
    """What one algorithm found, and how faithful its circuits are.

    signed, absolute: the curves of the two rankings, of the first also the accuracy.
    """

    found: FoundScores
    signed: tuple[FaithfulnessPoint, ...]
    absolute: tuple[FaithfulnessPoint, ...]

    @property
    def cpr(self) -> float:
        """The circuit performance ratio: higher is better."""
        return circuit_performance_ratio(self.signed)

    @property
    def cmd(self) -> float:
        """The circuit-model distance: 0 is best."""
        return circuit_model_distance(self.absolute)

    @property
    def accuracy_area(self) -> float:
        """The mean accuracy over logarithmic circuit sizes, in % (see `accuracy_area`)."""
        # In a small graph, several shares are one size.
        by_size = {p.n_edges: p.accuracy for p in self.signed if p.accuracy is not None}
        return accuracy_area(list(by_size.items()))


@dataclass(frozen=True)
class MibFailure:
    """An algorithm that raised an error."""

    name: str
    error: str


@dataclass(frozen=True)
class LoadedMib:
    """A task of the benchmark, loaded. train, test: its prompts, and the rows left out."""

    task: Task
    algos: tuple[PruneAlgo, ...]
    train: MibPrompts
    test: MibPrompts


class _MibTask(Task):
    """A task whose model and loaders are set by who makes it."""

    def init_task(self) -> None:
        """There is nothing left to load."""


@checked
def check_mib_config(config: MibConfig) -> list[PruneAlgo]:
    """The algorithms that a configuration names. No model and no prompts are needed.

    Raises ConfigError for names, numbers, a device and a folder that make no sense.
    """
    find_mib_task(config.task)
    if not config.model:
        raise ConfigError("`model` is empty; give a hub name or a local folder.")
    checked_file_name("model", config.model_name)
    algos = [find_prune_algo(name) for name in config.algos]
    if not algos or len(set(algos)) < len(algos):
        raise ConfigError(
            f"`algos` is {list(config.algos)}; expected at least one algorithm, each once."
        )
    for algo in algos:
        if algo.needs_true_edges:
            raise ConfigError(
                f"{algo.short_name!r} needs true edges, and the benchmark's tasks have "
                "none. Name another algorithm, such as 'EAP'."
            )
    for field in ("n_train", "n_test"):
        if getattr(config, field) is not None:
            check_count(field, getattr(config, field))
    check_count("batch_size", config.batch_size)
    check_count("seed", config.seed, 0, MAX_SEED)
    if config.device is not None:
        check_device("device", config.device)
    check_out_folder(config.folder)
    return algos


@checked
@dataclass(frozen=True)
class MibSplit:
    """The rows of a split, before they are a model's prompts. n_prompts: how many; None: all."""

    name: Split
    pairs: tuple[MibPair, ...]
    n_prompts: int | None


@checked
def mib_splits(config: MibConfig) -> tuple[MibSplit, MibSplit]:
    """What circuits are found on, and measured on. Raises DataError as `read_mib_pairs` does."""
    task = find_mib_task(config.task)
    train, test = (
        tuple(read_mib_pairs(task, split, config.data, config.counterfactual))
        for split in ("train", config.split)
    )
    n_train = config.n_train
    if n_train is None and task.n_train is not None and task.n_train <= len(train):
        n_train = task.n_train
    return MibSplit("train", train, n_train), MibSplit(config.split, test, config.n_test)


@checked
def unloaded_mib_task(config: MibConfig) -> Task:
    """The task that a configuration names, whose model is not loaded."""
    task = find_mib_task(config.task)
    return _MibTask(
        key=f"MIB {task.name}",
        name=f"MIB {task.name}",
        batch_size=config.batch_size,
        batch_count=1,
        token_circuit=False,
        _model_def=MIB_MODELS.get(config.model, config.model),
        _dataset_name=task.repository,
        dtype=getattr(t, config.dtype),
        device=config.device,
        ungroup=True,
        seed=config.seed,
    )


@checked
def load_mib(config: MibConfig) -> LoadedMib:
    """The task that a configuration names, ready for its algorithms.

    Raises, before anything is computed, ConfigError as `check_mib_config` does and for a
    model whose graph is not the benchmark's; DataError for prompts that cannot be had, are
    not as they must be (with file, row and field) or do not fit the model; ModelError for a
    model that cannot be had.
    """
    algos = check_mib_config(config)
    splits = mib_splits(config)
    task: Any = unloaded_mib_task(config)
    bridge = task._bare_model
    model = patchable_model(
        bridge, factorized=True, slice_output="last_seq", separate_qkv=True, ungroup=True
    )
    check_mib_can_hold(model)
    (train, train_loader), (test, test_loader) = (
        _loaded_split(split, task, config) for split in splits
    )
    task._model, task._true_edges = model, None
    task._train_loader, task._test_loader = train_loader, test_loader
    return LoadedMib(task, tuple(algos), train, test)


def _loaded_split(
    split: MibSplit, task: Any, config: MibConfig
) -> tuple[MibPrompts, PromptDataLoader]:
    bridge = task._bare_model
    with about(f"Split {split.name!r} of {find_mib_task(config.task).name!r}"):
        found = mib_prompts(split.pairs, bridge.tokenizer, split.n_prompts)
        batch_size, device = config.batch_size, task._device
        return found, loader_of_prompts(found.prompts, bridge, True, batch_size, device)


@checked
def run_mib(config: MibConfig) -> list[MibResult | MibFailure]:
    """Each algorithm's result. Raises as `load_mib` does; writes and prints nothing."""
    return list(iter_mib(load_mib(config)))


@checked
def iter_mib(loaded: LoadedMib) -> Iterator[MibResult | MibFailure]:
    """The results of a loaded task, one algorithm after the other.

    An algorithm that raises an error is a MibFailure, and the next one follows.
    """
    for algo in tqdm(loaded.algos, desc=loaded.task.key):
        try:
            yield mib_result(loaded, algo)
        except (AutoCircuitError, RuntimeError, ArithmeticError, MemoryError) as error:
            yield MibFailure(
                algo.short_name,
                f"{type(error).__name__}: {' '.join(str(error).split())}",
            )


@checked
def mib_result(loaded: LoadedMib, algo: PruneAlgo) -> MibResult:
    """One algorithm's scores, on the train prompts, and the curves of its circuits."""
    return mib_curves(loaded, find_mib_scores(loaded, algo))


@checked
def find_mib_scores(loaded: LoadedMib, algo: PruneAlgo) -> FoundScores:
    """One algorithm's scores, on the train prompts."""
    task = loaded.task
    algo.check_prompts(task.train_loader)
    return find_scores(task, algo.with_seed(task.seed))


@checked
def mib_curves(loaded: LoadedMib, found: FoundScores) -> MibResult:
    """The curves of the circuits that scores make, on the test prompts."""
    task = loaded.task
    with about(f"{task.key}, algorithm {found.name!r}"):
        rankings: tuple[Ranking, Ranking] = ("signed", "absolute")
        curves = faithfulness_curves(
            task.model, task.test_loader, found.scores, rankings, accuracy=True
        )
    return MibResult(found, tuple(curves["signed"]), tuple(curves["absolute"]))
