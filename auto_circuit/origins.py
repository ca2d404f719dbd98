"""Where the numbers of a sweep come from: what its tasks are made of, and what its cells cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from auto_circuit.errors import DataError
from auto_circuit.types import AlgoKey, TaskKey


@dataclass(frozen=True)
class TaskOrigin:
    """What a task is made of.

    name: for people. model, prompts: what it names: a hub name, a folder, a file.
    what: all that changes its results, weights and prompts by the hash of their content.
    """

    name: str
    model: str
    prompts: str
    what: Mapping[str, Any]


@dataclass(frozen=True)
class CellOrigin:
    """A cell: its place in the store, what it is of, and what it cost.

    algo: None for a cell that is of no algorithm. cost: seconds, memory, versions, machine.
    """

    kind: str
    key: str
    label: str
    task: TaskKey
    seed: int
    algo: AlgoKey | None
    cost: Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """Of all tasks and finished cells of a sweep."""

    tasks: Mapping[TaskKey, TaskOrigin] = field(default_factory=dict)
    cells: tuple[CellOrigin, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """As plain data (JSON)."""
        return asdict(self)

    @staticmethod
    def of_data(data: Any) -> Origin:
        """What `as_data` gave this for. Raises DataError for anything else."""
        try:
            return Origin(
                {key: TaskOrigin(**task) for key, task in data["tasks"].items()},
                tuple(CellOrigin(**cell) for cell in data["cells"]),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(
                f"This says of no sweep where it comes from: {error}."
            ) from None

    @cached_property
    def seconds(self) -> dict[tuple[TaskKey, int, AlgoKey | None], float]:
        """How long algorithms took to score the edges, as far as it is known."""
        return {
            (cell.task, cell.seed, cell.algo): float(cell.cost["scoring_seconds"])
            for cell in self.cells
            if cell.cost.get("scoring_seconds") is not None
        }

    def peak_bytes(self, task: TaskKey, algo: AlgoKey) -> int | None:
        """The most memory that a process had by the end of one of an algorithm's cells."""
        return max(self._memory(task, algo), default=None)

    def _memory(self, task: TaskKey, algo: AlgoKey) -> Iterable[int]:
        for cell in self.cells:
            memory = cell.cost.get("memory", {})
            if (cell.task, cell.algo) == (task, algo) and "peak_bytes" in memory:
                yield int(memory["peak_bytes"])
