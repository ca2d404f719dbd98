"""The progress bar of every loop in the library."""

from __future__ import annotations

from functools import partial

from tqdm import auto

tqdm = partial(auto.tqdm, dynamic_ncols=True)
"""`tqdm.auto.tqdm` that fits the width of the terminal."""
