"""Cells of work, computed once: what is stored is read, the rest computed and stored.

A cell that fails is told with its error, and the others go on. Several processes may work on
one store: each cell is claimed by the one that computes it, and the others come back to it.
Where cells are computed is up to `Workers`: in this process, or on many (`ray_workers`).
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from auto_circuit.errors import AutoCircuitError, one_line
from auto_circuit.store import Cell, CellResult, Store

WAIT_SECONDS = 0.2
"""How often a cell that another process computes is looked at."""

Use = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Work:
    """A cell and how to compute it; it can be sent to another process.

    uses: opens what it works on, such as a task whose model has to be loaded. It stays open
        for the next work, if that `uses` something equal.
    compute: is given what was opened, if it uses something, and then the results of the
        cells that it needs.
    """

    cell: Cell
    compute: Callable[..., CellResult] = field(compare=False)
    needs: tuple[Cell, ...] = ()
    uses: Use | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: a result, or the error that it ended with, or neither.

    is_new: was it computed now, and not read?
    """

    cell: Cell
    result: CellResult | None = None
    error: str = ""
    is_new: bool = False


@dataclass(frozen=True)
class Failure:
    """The error, in a line, that a work has ended with."""

    error: str


# ------------------------------------------------------------------- where it is computed


@runtime_checkable
class Workers(Protocol):
    """What computes works. `n`: how many at once."""

    n: int

    def start(self, work: Work, needed: Sequence[CellResult]) -> None:
        """Begin a work, given the results of the cells that it needs."""
        ...

    def finished(self) -> tuple[Work, CellResult | Failure]:
        """Wait for the next of the works that were begun, whichever that is."""
        ...

    def close(self) -> None:
        """Give up what has not finished, and whatever is open."""
        ...


class Worker:
    """Computes one work after the other; what they use stays open from one to the next."""

    def __init__(self) -> None:
        self._uses: Use | None = None
        self._open: Any = None
        self._error: Exception | None = None
        self._closing = ExitStack()

    def result(self, work: Work, needed: Sequence[CellResult]) -> CellResult | Failure:
        """The work's result, with what it cost; or how it failed."""
        try:
            used = () if work.uses is None else (self._opened(work.uses),)
            start = time.perf_counter()
            result = work.compute(*used, *needed)
            seconds = time.perf_counter() - start
        except Exception as error:  # a user's algorithm may raise anything
            return Failure(_in_a_line(error))
        return replace(result, cost={**_cost(seconds), **result.cost})

    def _opened(self, uses: Use) -> Any:
        """What the work uses; what could not be opened is not tried again for each work."""
        if self._uses is None or self._uses != uses:
            self.close()
            self._uses = uses
            try:
                self._open = self._closing.enter_context(uses())
            except Exception as error:
                self._error = error
        if self._error is not None:
            raise self._error
        return self._open

    def close(self) -> None:
        """Close what is open."""
        self._uses = self._open = self._error = None
        self._closing.close()


class InThisProcess:
    """One work at a time, here."""

    n = 1

    def __init__(self) -> None:
        self._worker = Worker()
        self._begun: deque[tuple[Work, Sequence[CellResult]]] = deque()

    def start(self, work: Work, needed: Sequence[CellResult]) -> None:
        """As `Workers.start`."""
        self._begun.append((work, needed))

    def finished(self) -> tuple[Work, CellResult | Failure]:
        """As `Workers.finished`: computes it now."""
        work, needed = self._begun.popleft()
        return work, self._worker.result(work, needed)

    def close(self) -> None:
        """As `Workers.close`."""
        self._worker.close()


def _cost(seconds: float) -> dict[str, Any]:
    import torch

    memory = _peak_memory_bytes()
    if torch.cuda.is_available():
        memory["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return {
        "seconds": seconds,
        "memory": memory,
        "machine": {"host": platform.node(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _peak_memory_bytes() -> dict[str, int]:
    """The most that the process has had so far."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": peak if sys.platform == "darwin" else peak * 1024}


def _in_a_line(error: Exception) -> str:
    text = one_line(error)
    is_ours = isinstance(error, AutoCircuitError)
    return text if is_ours else f"{type(error).__name__}: {text}"


# ------------------------------------------------------------------------------ the cells


@dataclass(frozen=True)
class Choice:
    """Which cells are computed. The others are read, where they are stored.

    only: those for which it is true. force: these even if they are stored.
    """

    only: Callable[[Cell], bool] = lambda cell: True
    force: bool = False


def is_missing(cell: Cell, store: Store, choice: Choice) -> bool:
    """Does the cell have to be computed?"""
    return choice.only(cell) and (choice.force or not store.holds(cell))


def run_cells(
    works: Sequence[Work],
    store: Store,
    choice: Choice | None = None,
    workers: Workers | None = None,
) -> Iterator[Outcome]:
    """The outcome of every cell, as it comes; those that others need stand before them.

    Raises FileError if the store cannot be read or written: what is finished is kept.
    """
    workers = workers or InThisProcess()
    run = _Run(store, choice or Choice(), workers)
    with store.at_work(), closing(run), closing(workers):
        yield from run.outcomes(works)


class _Run:
    """A run of cells: which of them have a result, and the claims on those at work."""

    def __init__(self, store: Store, choice: Choice, workers: Workers) -> None:
        self.store, self.choice, self.workers = store, choice, workers
        self.is_sound: dict[Cell, bool] = {}
        self.claims: dict[Cell, ExitStack] = {}

    def close(self) -> None:
        """Let go of what has not finished."""
        for claim in self.claims.values():
            claim.close()

    def outcomes(self, works: Sequence[Work]) -> Iterator[Outcome]:
        waiting = deque(works)
        while waiting or self.claims:
            before = len(waiting) + len(self.claims)
            yield from self._begin(waiting)
            if self.claims:
                yield self._ended(self._end_one())
            elif len(waiting) == before:
                time.sleep(WAIT_SECONDS)  # other processes compute all that is left

    def _begin(self, waiting: deque[Work]) -> Iterator[Outcome]:
        """Start works until all workers are busy; those that have to wait stay in order."""
        postponed = []
        while waiting and len(self.claims) < self.workers.n:
            work = waiting.popleft()
            if not all(cell in self.is_sound for cell in work.needs):
                postponed.append(work)
            elif (outcome := self._without_work(work)) is not None:
                yield self._ended(outcome)
            elif not self._is_started(work):
                postponed.append(work)
        waiting.extendleft(reversed(postponed))

    def _without_work(self, work: Work) -> Outcome | None:
        """The outcome of what is stored, or cannot or shall not be computed."""
        is_chosen = self.choice.only(work.cell)
        if not (is_chosen and self.choice.force):
            if (result := self.store.read(work.cell)) is not None:
                return Outcome(work.cell, result)
        if not is_chosen:
            return Outcome(work.cell)
        for cell in work.needs:
            if not self.is_sound[cell]:
                return Outcome(
                    work.cell, error=f"it needs {cell.label!r}, which is not there"
                )
        return None

    def _is_started(self, work: Work) -> bool:
        """False if another process has it, or has just finished it."""
        with ExitStack() as claim:
            if not claim.enter_context(self.store.claimed(work.cell)):
                return False
            # Another process may have finished it between the look and the claim.
            if not self.choice.force and self.store.read(work.cell) is not None:
                return False
            needed = []
            for cell in work.needs:
                if (result := self.store.read(cell)) is None:
                    self.is_sound[cell] = (
                        False  # it has been damaged, or taken away, since
                    )
                    return False
                needed.append(result)
            self.workers.start(work, needed)
            self.claims[work.cell] = claim.pop_all()
        return True

    def _end_one(self) -> Outcome:
        work, result = self.workers.finished()
        with self.claims.pop(work.cell):
            if isinstance(result, Failure):
                return Outcome(work.cell, error=result.error)
            try:
                self.store.write(work.cell, result)
            except (
                TypeError,
                ValueError,
            ) as error:  # what is no data, such as NaN in JSON
                return Outcome(
                    work.cell, error=f"it cannot be stored: {_in_a_line(error)}"
                )
        return Outcome(work.cell, result, is_new=True)

    def _ended(self, outcome: Outcome) -> Outcome:
        self.is_sound[outcome.cell] = outcome.result is not None
        return outcome
