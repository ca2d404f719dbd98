"""What every test shares: the --runslow option, no network, few threads.

`auto_circuit` must not be imported here: jaxtyping's pytest hook checks shapes only in
modules that are imported after it.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from importlib import import_module
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


IMPORTED_FIRST = (
    *("IPython", "anywidget", "datasets", "ipywidgets", "pandas", "plotly.express"),
    *("plotly.io", "torch._dynamo", "transformer_lens.model_bridge", "tyro"),
)
"""Packages of others that `auto_circuit` and the tests import.

Inside of a module that jaxtyping checks, Python looks for the bytecode of all that is imported
under jaxtyping's name for it, finds none, and compiles 2,200 modules again: 10 seconds.
"""


def pytest_configure(config: pytest.Config) -> None:
    starts_workers = config.getoption("numprocesses", None)
    only_starts_workers = starts_workers and not hasattr(config, "workerinput")
    if only_starts_workers or not config.getoption("jaxtyping_packages", None):
        return
    import_module("tests.typechecked").check_quickly()
    for name in IMPORTED_FIRST:
        import_module(name)
    gc.disable()  # what is collected stays


def pytest_collection_finish() -> None:
    """What is there now is there to the end: no collection of garbage looks at it again."""
    gc.freeze()
    gc.enable()


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
