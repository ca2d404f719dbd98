"""What `experiments.py paper` runs: a frozen configuration (`paper` runs it)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from auto_circuit.checks import checked
from auto_circuit.result_names import NamesResults
from auto_circuit.tasks import (
    DOCSTRING_TOKEN_CIRCUIT_TASK,
    GREATERTHAN_COMPONENT_CIRCUIT_TASK,
    IOI_TOKEN_CIRCUIT_TASK,
    TRACR_REVERSE_TOKEN_CIRCUIT_TASK,
)


@checked
@dataclass(frozen=True)
class PaperConfig(NamesResults):
    """The tables and figures of Miller et al. 2024 for some tasks."""

    tasks: tuple[str, ...] = (
        IOI_TOKEN_CIRCUIT_TASK.key,
        DOCSTRING_TOKEN_CIRCUIT_TASK.key,
        GREATERTHAN_COMPONENT_CIRCUIT_TASK.key,
    )
    """Keys of the tasks whose circuits are tested (see auto_circuit/tasks.py)."""
    tracr_tasks: tuple[str, ...] = (TRACR_REVERSE_TOKEN_CIRCUIT_TASK.key,)
    """Keys of tasks whose true circuit is known, and is to be found."""
    algos: tuple[str, ...] = ("ACDC quick", "STP quick", "HISP", "EAP")
    """Names of the algorithms that have to find it."""
    circuit_algo: str = "EAP"
    """What finds a circuit of a task without a published one."""
    circuit_share: float = 0.01
    """The size of that circuit, as a share of all edges."""
    model: str | None = None
    """A model instead of each task's own: a local folder or a hub name; None: its own."""
    n_prompts: int | None = None
    """How many prompts a circuit is tested on; None: as the task says."""
    seed: int = 42
    """Which prompts are picked, and all that algorithms draw at random."""
    device: str | None = None
    """Where models run, for example "cuda"; None: a GPU if there is one."""
    out: Path = Path("results")
    """The folder that holds the result folders."""

    @property
    def folder(self) -> Path:
        """Where the results are: the same folder for the same configuration."""
        return self.out / f"paper-{self.digest}"

    @property
    def store(self) -> str:
        """Where all cells are, those of other experiments with the same `out` among them."""
        return str(self.out / "cells")
