"""What cells are computed, and processes that are killed between two of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from typing import Any

import pytest

from auto_circuit import experiments
from auto_circuit.cells import Worker

FORKED = multiprocessing.get_context("fork")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the cells that have been computed in this process, in order."""
    labels: list[str] = []
    result = Worker.result

    def counted(self: Worker, work: Any, needed: Any) -> Any:
        labels.append(work.cell.label)
        return result(self, work, needed)

    monkeypatch.setattr(Worker, "result", counted)
    return labels


def killed_in_second_cell(command: Sequence[str]) -> int | None:
    """Run a command in a process that is killed in the second cell that it computes.

    Its exit code.
    """
    process = FORKED.Process(target=_run, args=(command,))
    process.start()
    process.join(300)
    return process.exitcode


def _run(command: Sequence[str]) -> None:
    result = Worker.result
    n_begun = 0

    def killed(self: Worker, work: Any, needed: Any) -> Any:
        nonlocal n_begun
        n_begun += 1
        if n_begun == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result(self, work, needed)

    Worker.result = killed  # type: ignore[method-assign]
    experiments.main(command)
