"""The errors that AutoCircuit raises for bad input.

Each message says what was wrong, what was expected and what to do. `assert` is kept for
the library's own invariants.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class AutoCircuitError(Exception):
    """Base of every error that the library raises on purpose."""


class DataError(AutoCircuitError, ValueError):
    """A prompt file, a prompt pair, a batch or a loader is not what it must be."""


class GraphError(AutoCircuitError, ValueError):
    """A node, edge, mask or score does not fit the model's computation graph."""


class ModelError(AutoCircuitError, ValueError):
    """A model cannot be loaded, or its architecture cannot be patched."""


class ConfigError(AutoCircuitError, ValueError):
    """An argument or a configuration field has a value that makes no sense."""


class MemoryLimitError(ConfigError, MemoryError):
    """A limit is below what the smallest piece of the work takes; the text says how much."""


class UnknownNameError(ConfigError, KeyError):
    """Nothing has this name; the text says what there is."""

    __str__ = Exception.__str__  # a KeyError would quote its text


class GoneError(AutoCircuitError, AttributeError):
    """An attribute of auto-circuit's that nothing here has; the text says what to use."""


class FileError(AutoCircuitError, OSError):
    """A file or folder cannot be read or written."""


class TrainingError(AutoCircuitError, ArithmeticError):
    """A training of masks has diverged."""


def nearest_names(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names that are closest to one, the closest first; none if all are far."""
    by_lower = {word.lower(): word for word in known}
    matches = difflib.get_close_matches(name.lower(), list(by_lower), n=n, cutoff=0.5)
    return [by_lower[match] for match in matches]


def near_matches(name: str, known: Iterable[str], n: int = 3) -> str:
    """A clause that names the closest known names, for the end of an error's text."""
    matches = nearest_names(name, known, n)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def one_line(text: object) -> str:
    """A text, or an error's, as one line."""
    return " ".join(str(text).split())


@contextmanager
def about(what: str) -> Iterator[None]:
    """Inside, an error's text begins with what it is about; it stays the same error."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror is not None:
            error.strerror = f"{what}: {error.strerror}"  # its text is not of its args
        else:
            error.args = (f"{what}: {text}" if text else what,)
        if what not in str(error):  # of a class that writes its text itself
            getattr(error, "add_note", lambda note: None)(what)  # Python 3.11
        raise
