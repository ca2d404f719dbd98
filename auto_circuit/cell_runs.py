"""Running cells in the way that an experiment's options say.

Where they are computed (in this process, or on workers), with how many threads, which of them;
and what an interruption says of those that are stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import torch as t

from auto_circuit.cells import Choice, InThisProcess, Outcome, Work, Workers
from auto_circuit.errors import ConfigError
from auto_circuit.ray_workers import RayOptions, RayWorkers
from auto_circuit.store import Cell, Store
from auto_circuit.sweep_config import RunOptions

if TYPE_CHECKING:
    from auto_circuit.progress import Watch

AS_IT_COMES = RunOptions()

CellNames = tuple[str, Collection[str]]
"""Of a cell: its task, and the names of its algorithm, if it is one algorithm's."""


def choice_of(options: RunOptions, names: Mapping[Cell, CellNames]) -> Choice:
    """The cells that the options name: of some tasks, of some algorithms, or of both."""
    only = {*options.only}
    tasks = only & {task for task, _ in names.values()}
    algos = only - tasks
    chosen = {
        cell
        for cell, (task, of_algo) in names.items()
        if (not tasks or task in tasks) and (not algos or algos & {*of_algo})
    }
    return Choice(only=chosen.__contains__, force=options.force)


@contextmanager
def at_work(options: RunOptions, device: str | None) -> Iterator[Workers]:
    """Inside, cells can be computed. Raises ConfigError, before any work, if they cannot."""
    with _threads(options.threads), _workers(options, device) as workers:
        yield workers


@contextmanager
def _workers(options: RunOptions, device: str | None) -> Iterator[Workers]:
    if not (options.workers or options.ray_address):
        yield InThisProcess()
        return
    if device is not None and device.startswith("cuda:"):
        raise ConfigError(
            f"`device` is {device!r}; with workers, each of which sees the GPUs that it was "
            "given alone, expected 'cuda' or 'cpu'."
        )
    n_gpus = 0 if device == "cpu" else None
    where = RayOptions(options.workers or None, options.ray_address, gpus=n_gpus)
    with closing(RayWorkers(where)) as workers:
        yield workers


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = t.get_num_threads()
    t.set_num_threads(before if n is None else n)
    try:
        yield
    finally:
        t.set_num_threads(before)


@contextmanager
def kept(works: Sequence[Work], store: Store, address: str) -> Iterator[None]:
    """An interruption says what is stored, and where: earlier runs' and other processes' too."""
    try:
        yield
    except KeyboardInterrupt as error:
        n = sum(store.holds(work.cell) for work in works)
        error.args = (
            f"{n} of {len(works)} cells are finished, and kept in {address}: the same "
            "command goes on from there.",
        )
        raise


def watched(
    running: Iterator[Outcome],
    works: Sequence[Work],
    watch: Watch,
    store: Store,
    address: str,
) -> dict[str, Outcome]:
    """The outcome of every cell, by its key; `watch` is told of each."""
    outcomes: dict[str, Outcome] = {}
    with watch.watching(len(works)), kept(works, store, address):
        for outcome in running:
            outcomes[outcome.cell.key] = outcome
            watch.ended(outcome, None)
    return outcomes
