"""Only errors of ours come out of public functions, whatever goes in (see `tests/fuzz`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
FILES = sorted(map(str, FUZZ.glob("test_*.py")))


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_five_hundred_examples_of_each_property(half: int) -> None:
    """In two processes: to start one for each file takes as long as half of its examples."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "--import-mode=importlib",
        *FILES[half::2],
    ]
    environment = {**os.environ, "FUZZ": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    result = subprocess.run(
        command,
        cwd=FUZZ.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
