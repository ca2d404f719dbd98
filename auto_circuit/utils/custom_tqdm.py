"""The progress bar of every loop in the library."""

from __future__ import annotations

from functools import partial

from tqdm import auto

IS_NOTEBOOK = any(kind.__name__ == "tqdm_notebook" for kind in auto.tqdm.__mro__)

tqdm = partial(auto.tqdm, dynamic_ncols=True, disable=False if IS_NOTEBOOK else None)
"""`tqdm.auto.tqdm` that fits the width of the terminal, and is silent where there is none.

A notebook is no terminal, but shows its own kind of bar."""
