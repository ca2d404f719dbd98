"""How much memory work may take, how much it does take, and how to cut it to fit.

Memory here is that of tensors: what is alive at the same time beside what was there before.
The plan of limited work is measured, not guessed: one prompt is worked on (with as few sources
as possible, where these can be taken a few at a time), then as much more as surely fits.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as t
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from auto_circuit.checks import check_count, check_number, checked, is_whole_number
from auto_circuit.errors import ConfigError, MemoryLimitError

MARGIN = 0.95
"""Pieces are planned for this share of a limit: kernels need a little that nobody sees."""
MAX_TRIES = 10
"""How often larger pieces are tried."""
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may use."""


@checked
@dataclass(frozen=True)
class MemoryLimit:
    """The most memory that work on a model may take beside the model itself.

    limit: bytes (an int), or a share of what is free when the work begins (a float above 0,
        at most 1.0).
    checkpoint: keep of each block's activations only what goes in, and run the block again
        in the backward pass. A backward pass then costs a forward pass more, and one block's
        activations, instead of all blocks', which is most of a long prompt's.

    Work is cut to fit: first into fewer prompts at a time, then, where gradients of masks are
    taken, into fewer sources, with the passes of a prompt once for each. Scores are the same
    but for rounding. What is returned does not count. Raises ConfigError for another number.
    """

    limit: int | float
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if is_whole_number(self.limit):
            check_count("memory_limit", self.limit)
        else:
            check_number("memory_limit", self.limit, above=0, high=1)

    def n_bytes(self, device: t.device) -> int:
        """The limit in bytes, now, of work on a device."""
        if is_whole_number(self.limit):
            return int(self.limit)
        return int(self.limit * free_bytes(device))


Limit = int | float | MemoryLimit | None
"""What functions take as a memory limit; None: what the model has, which may be none."""


@checked
def as_limit(limit: Limit) -> MemoryLimit | None:
    """The limit as a MemoryLimit. Raises ConfigError for a number that is none."""
    if limit is None or isinstance(limit, MemoryLimit):
        return limit
    return MemoryLimit(limit)


# ------------------------------------------------------------------------- what is free


def free_bytes(device: t.device) -> int:
    """What a device has free. Raises ConfigError where nobody knows."""
    if device.type == "cuda":
        free, _ = t.cuda.mem_get_info(device)
        # What torch holds and no tensor uses is free to us.
        unused = t.cuda.memory_reserved(device) - t.cuda.memory_allocated(device)
        return int(free + unused)
    found = [n for n in (_free_of_system(), _free_of_container()) if n is not None]
    if device.type != "cpu" or not found:
        raise ConfigError(
            f"How much memory is free on the device {str(device)!r} is not known. Give the "
            "`memory_limit` in bytes, as an int."
        )
    return min(found)


def _free_of_system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _free_of_container() -> int | None:
    try:
        most = (CGROUP / "memory.max").read_text().strip()
        used = (CGROUP / "memory.current").read_text().strip()
        return None if most == "max" else max(int(most) - int(used), 0)
    except (OSError, ValueError):
        return None


# ---------------------------------------------------------------------- what work takes


class PeakMemory(TorchDispatchMode):
    """Inside, the most memory that tensors take which are made inside: `n_bytes`.

    Each storage counts once, from the operation that makes it until nothing holds it. What a
    kernel allocates for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0
        self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.layout == t.strided
        }
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout == t.strided:
                self._count(leaf, given)
        return out

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        # One that went in, and is not ours, was there before.
        if key in self._sizes or key in given:
            return
        self._sizes[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.n_bytes = max(self.n_bytes, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)


# ------------------------------------------------------------------------- what fits


@dataclass(frozen=True)
class Sizes:
    """How much is worked on at a time.

    n_srcs: sources. Fewer than all only with one prompt at a time.
    """

    n_prompts: int
    n_srcs: int


Peak = Callable[[Sizes], int]
"""Work on so much -> the memory that it took."""


def fitting_sizes(peak: Peak, limit: int, least: Sizes, most: Sizes) -> Sizes:
    """The largest pieces whose memory is within a limit; first in sources, then in prompts.

    least, most: between which they are. Raises MemoryLimitError if the least do not fit.
    """
    least_peak = peak(least)
    if least_peak > limit:
        raise _too_small(least_peak, limit)
    n_srcs, srcs_peak = _more_srcs(peak, limit * MARGIN, (least, least_peak), most.n_srcs)
    if n_srcs < most.n_srcs:
        # As many chunks as there must be, all of about one size.
        n_chunks = -(-most.n_srcs // n_srcs)
        return Sizes(1, max(-(-most.n_srcs // n_chunks), least.n_srcs))
    n_prompts = _more_prompts(peak, limit * MARGIN, n_srcs, srcs_peak, most.n_prompts)
    return Sizes(n_prompts, n_srcs)


def _more_srcs(
    peak: Peak, limit: float, smallest: tuple[Sizes, int], most: int
) -> tuple[int, int]:
    """(How many sources fit, with one prompt; the memory that they take)"""
    (least, n_bytes), n = smallest, smallest[0].n_srcs
    # A few sources more are little beside a pass; later, half of what is left is used.
    for_one = 0.05 * n_bytes / least.n_srcs
    for _ in range(MAX_TRIES):
        more = min(n + int((limit - n_bytes) / max(for_one, 1.0)), 3 * n, most)
        if more <= n:
            break
        n_more = peak(Sizes(1, more))
        if n_more > limit:
            break
        for_one = 2 * (n_more - n_bytes) / (more - n)
        n, n_bytes = more, n_more
    return n, n_bytes


def _more_prompts(peak: Peak, limit: float, n_srcs: int, n_bytes: int, most: int) -> int:
    """How many prompts fit, if one takes `n_bytes`."""
    n = 1
    for _ in range(MAX_TRIES):
        # At each moment n prompts take a + b n bytes, with a and b at least 0: k times as
        # many take at most k times as much. (Of the first one, half is there once.)
        more = min(max(int(n * limit / n_bytes), 2 if n == 1 else 0), most)
        if more <= n or (n == 1 and 1.5 * n_bytes > limit):
            break
        n_more = peak(Sizes(more, n_srcs))
        if n_more > limit:
            break
        n, n_bytes = more, n_more
    return n


def _too_small(least: int, limit: int) -> MemoryLimitError:
    return MemoryLimitError(
        f"`memory_limit` is {limit:,} bytes, but the smallest piece of this work, a single "
        f"prompt, takes {least:,} bytes beside the model. Give at least that much, use "
        "shorter prompts, or keep less for the backward pass: "
        "`memory_limit=MemoryLimit(..., checkpoint=True)`. (A share of what is free is a "
        "float: 1.0 is all of it.)"
    )
