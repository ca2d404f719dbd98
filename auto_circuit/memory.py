"""How much memory work may take, how much it does take, and how to cut it to fit.

Memory here is that of tensors: what is alive at the same time beside what was there before.
The plan of limited work is measured, not guessed: one prompt is worked on (with as few sources
as possible, where these can be taken a few at a time), then as much more as surely fits.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
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


class OverLimit(Exception):
    """Work was stopped before it took more memory than its guard allows."""


@dataclass(frozen=True)
class Taken:
    """What work took.

    n_bytes: the most that there was at the same time.
    largest: the most that one call of each operation made.
    """

    n_bytes: int
    largest: Mapping[Any, int]


@dataclass(frozen=True)
class Guard:
    """Stops work that is larger than some that was measured.

    most: the bytes that it may take. smaller: what the smaller work took. times: how many
    times as large this one is; an operation then makes at most so many times as much.
    """

    most: float
    smaller: Taken
    times: float

    def check(self, operation: Any, n_bytes: int) -> None:
        """Raise OverLimit if the operation, with so much there, could be too much."""
        largest = self.smaller.largest
        made = largest.get(operation)
        if made is None:
            made = max(largest.values(), default=0)
        if n_bytes + self.times * made > self.most:
            raise OverLimit


class PeakMemory(TorchDispatchMode):
    """Inside, the most memory that tensors take which are made inside: `n_bytes`.

    Each storage counts once, from the operation that makes it until nothing holds it. What a
    kernel allocates for itself is not seen; on CUDA devices, where the allocator counts (with
    what it adds to fill its blocks), it is seen where it was the most so far.

    guard: stops the work before it takes too much; see `Guard`.
    """

    def __init__(self, guard: Guard | None = None) -> None:
        super().__init__()
        self.n_bytes = 0
        self.largest: dict[Any, int] = {}
        self._guard = guard
        self._on_cpu = 0
        self._sizes: dict[int, int] = {}
        self._cuda = _CudaMemory()

    @property
    def taken(self) -> Taken:
        """What was taken so far."""
        return Taken(self.n_bytes, self.largest)

    @property
    def n_left(self) -> int:
        """What is still there of it, in bytes."""
        return self._on_cpu + self._cuda.now

    def __enter__(self) -> PeakMemory:
        """Begin to count."""
        self._cuda = _CudaMemory()
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        """End to count."""
        super().__exit__(*args)
        self.n_bytes = max(self.n_bytes, self._cuda.new_peak())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.check(func, self.n_left)
        # It stops work once: contexts that are left then put back what they changed.
        self._guard = guard
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.layout == t.strided
        }
        out = func(*args, **kwargs)
        made = sum(
            self._count(leaf, given)
            for leaf in tree_leaves(out)
            if isinstance(leaf, Tensor) and leaf.layout == t.strided
        )
        if made:  # not after views, and what is done in place
            self._cuda.update()
            self.n_bytes = max(self.n_bytes, self.n_left)
            self.largest[func] = max(self.largest.get(func, 0), made)
        return out

    def _count(self, tensor: Tensor, given: set[int]) -> int:
        """The bytes of a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key, n_bytes = storage._cdata, storage.nbytes()
        # One that went in, and is not ours, was there before.
        if key in self._sizes or key in given:
            return 0
        if not tensor.is_cuda:  # its allocator counts
            self._sizes[key] = n_bytes
            self._on_cpu += n_bytes
            weakref.finalize(storage, self._forget, key)
        return n_bytes

    def _forget(self, key: int) -> None:
        self._on_cpu -= self._sizes.pop(key, 0)


class _CudaMemory:
    """What CUDA's allocator has given out since this was made, on all devices together.

    now: at the last `update`.
    """

    def __init__(self) -> None:
        # A process that has not used CUDA must not begin to.
        is_used = t.cuda.is_available() and t.cuda.is_initialized()
        self._devices = range(t.cuda.device_count()) if is_used else range(0)
        self._first = self._all(_allocated)
        self._first_peaks = self._all(t.cuda.max_memory_allocated)
        self.now = 0

    def update(self) -> None:
        if self._devices:
            self.now = sum(self._all(_allocated)) - sum(self._first)

    def new_peak(self) -> int:
        """The most so far, if it was since then; the user's own statistics stay as they are."""
        peaks = self._all(t.cuda.max_memory_allocated)
        rows = zip(peaks, self._first_peaks, self._first, strict=True)
        return sum(peak - first for peak, before, first in rows if peak > before)

    def _all(self, read: Callable[[int], int]) -> list[int]:
        return [read(device) for device in self._devices]


def _allocated(device: int) -> int:
    # As `torch.cuda.memory_allocated`, which sorts a hundred statistics for each answer.
    found = t.cuda.memory_stats_as_nested_dict(device)
    return int(found["allocated_bytes"]["all"]["current"])


# ------------------------------------------------------------------------- what fits


@dataclass(frozen=True)
class Sizes:
    """How much is worked on at a time.

    n_srcs: sources. Fewer than all only with one prompt at a time.
    """

    n_prompts: int
    n_srcs: int


Peak = Callable[[Sizes, Guard | None], Taken | None]
"""Work on so much -> what it took; None if it was stopped."""


def fitting_sizes(
    peak: Peak, limit: int, least: Sizes, most: Sizes, held: int = 0
) -> Sizes:
    """The largest pieces whose memory is within a limit; first in sources, then in prompts.

    least, most: between which they are. held: bytes that are there besides. Raises
    MemoryLimitError if the least do not fit. No other work is tried that could take more
    than the limit: it is stopped before.
    """
    taken = peak(least, None)
    assert taken is not None, "nothing guards the least"
    if held + taken.n_bytes > limit:
        raise _too_small(held + taken.n_bytes, limit)
    limits = (peak, limit * MARGIN - held)
    n_srcs, taken = _more_srcs(*limits, (least, taken), most.n_srcs)
    if n_srcs < most.n_srcs:
        # As many chunks as there must be, all of about one size.
        n_chunks = -(-most.n_srcs // n_srcs)
        return Sizes(1, max(-(-most.n_srcs // n_chunks), least.n_srcs))
    return Sizes(_more_prompts(*limits, n_srcs, taken, most.n_prompts), n_srcs)


def _more_srcs(
    peak: Peak, limit: float, smallest: tuple[Sizes, Taken], most: int
) -> tuple[int, Taken]:
    """(How many sources fit, with one prompt; what they take)"""
    (least, taken), n = smallest, smallest[0].n_srcs
    # A few sources more are little beside a pass; later, half of what is left is used.
    for_one = 0.05 * taken.n_bytes / least.n_srcs
    for _ in range(MAX_TRIES):
        left = limit - taken.n_bytes
        more = min(n + int(left / max(for_one, 1.0)), 3 * n, most)
        if more <= n:
            break
        of_more = peak(Sizes(1, more), Guard(limit, taken, more / n))
        if of_more is None or of_more.n_bytes > limit:
            most = (n + more) // 2
            continue
        for_one = 2 * (of_more.n_bytes - taken.n_bytes) / (more - n)
        n, taken = more, of_more
    return n, taken


def _more_prompts(peak: Peak, limit: float, n_srcs: int, taken: Taken, most: int) -> int:
    """How many prompts fit, if one takes so much."""
    n, for_one = 1, 0.0
    for _ in range(MAX_TRIES):
        # At each moment n prompts take a + b n bytes, with a and b at least 0: k times as
        # many take at most k times as much. As many more as the last ones let hope for are
        # tried too, at most twice as many.
        sure = int(n * limit / taken.n_bytes)
        hoped = n + int((limit - taken.n_bytes) / for_one) if for_one else 2 * n
        more = min(max(sure, min(hoped, 2 * n)), most)
        if more <= n:
            break
        of_more = peak(Sizes(more, n_srcs), Guard(limit, taken, more / n))
        if of_more is None or of_more.n_bytes > limit:
            return max(n, min(sure, most))
        for_one = (of_more.n_bytes - taken.n_bytes) / (more - n)
        n, taken = more, of_more
    return n


def _too_small(least: int, limit: int) -> MemoryLimitError:
    return MemoryLimitError(
        f"`memory_limit` is {limit:,} bytes, but the smallest piece of this work, a single "
        f"prompt, takes {least:,} bytes beside the model. Give at least that much, use "
        "shorter prompts, or keep less for the backward pass: "
        "`memory_limit=MemoryLimit(..., checkpoint=True)`. (A share of what is free is a "
        "float: 1.0 is all of it.)"
    )
