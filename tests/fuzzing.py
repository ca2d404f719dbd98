"""What the property tests in `tests/fuzz` share."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from auto_circuit.errors import AutoCircuitError

PACKAGE = str(Path(__file__).resolve().parent.parent / "auto_circuit")
MAX_SECONDS = 60


@contextmanager
def no_hang(seconds: int = MAX_SECONDS) -> Iterator[None]:
    """Inside, what takes longer raises TimeoutError."""

    def hang(signal_number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def only_our_errors() -> Iterator[None]:
    """Inside, anything but an error of ours fails the test, and so does a hang.

    A TypeError passes if our own code raises it by name, not Python for us.
    """
    try:
        # A warning of ours is no error: a name without a position, a doubled prompt.
        with no_hang(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except AutoCircuitError as error:
        assert str(error).strip(), "an error without a text"
    except TypeError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        assert last.filename.startswith(PACKAGE) and "raise" in (
            last.line or ""
        ), f"a raw TypeError: {error!r}"
