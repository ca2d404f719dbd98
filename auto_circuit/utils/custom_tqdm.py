"""The progress bar of every loop in the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from tqdm import auto

IS_NOTEBOOK = any(kind.__name__ == "tqdm_notebook" for kind in auto.tqdm.__mro__)

_told: ContextVar[Callable[[Any], None] | None] = ContextVar("told", default=None)


class _Bar(auto.tqdm):  # type: ignore[type-arg]
    """Draws itself, unless somebody else wants to draw it."""

    def __init__(self, iterable: Any = None, *args: Any, **kwargs: Any) -> None:
        if IS_NOTEBOOK and _told.get() is not None:
            kwargs["display"] = False  # no widget of its own
        super().__init__(iterable, *args, **kwargs)

    def display(self, *args: Any, **kwargs: Any) -> Any:
        tell = _told.get()
        return super().display(*args, **kwargs) if tell is None else tell(self)


@contextmanager
def reported_to(tell: Callable[[Any], None] | None) -> Iterator[None]:
    """Inside, bars draw nothing: `tell` is called with each when it has come further.

    None: inside, they draw themselves again.
    """
    token = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(token)


tqdm = partial(_Bar, dynamic_ncols=True, disable=False if IS_NOTEBOOK else None)
"""`tqdm.auto.tqdm` that fits the width of the terminal, and is silent where there is none.

A notebook is no terminal, but shows its own kind of bar."""
