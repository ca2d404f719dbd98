"""What every test shares: the --runslow option, no network, few threads.

`auto_circuit` must not be imported here: jaxtyping's pytest hook checks shapes only in
modules that are imported after it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch: a thread that waits for another must not burn the core that it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

# Two processes of `pytest -n 2` take a core each. Who says how many threads gets as many.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


# Property tests run in processes of their own (see `tests/fuzz/conftest.py`).
collect_ignore = [] if "FUZZ" in os.environ else ["fuzz"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--runslow", action="store_true", default=False, help="run the slow tests too"
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.getoption("--runslow"):
        # The longest one first, so that no process waits for it in the end.
        items.sort(key=lambda item: "default_sweep_in_two" not in item.name)
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: needs --runslow"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C arrives, also in a job of a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright; skips, and says how to get it, where there is none."""
    from tests.browser import chromium

    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def explorer_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The explorer's JavaScript with the packages of npm that it is made and tested with."""
    from tests.browser import explorer_with_packages

    return explorer_with_packages(tmp_path_factory.mktemp("npm") / "explorer")
