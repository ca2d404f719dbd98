"""What a memory limit says, what work takes, and what fits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit import memory
from auto_circuit.errors import ConfigError, MemoryLimitError
from auto_circuit.memory import (
    MAX_TRIES,
    Guard,
    MemoryLimit,
    OverLimit,
    PeakMemory,
    Sizes,
    Taken,
    as_limit,
    fitting_sizes,
    free_bytes,
)

CPU = t.device("cpu")


@pytest.mark.parametrize("limit", [0, -5, 0.0, -0.5, 1.5, math.nan, math.inf])
def test_numbers_that_are_no_limit(limit: float) -> None:
    with pytest.raises(ConfigError, match="`memory_limit` is "):
        as_limit(limit)


def test_limits() -> None:
    assert as_limit(None) is None
    assert as_limit(5) == MemoryLimit(5)
    limit = MemoryLimit(0.5, checkpoint=True)
    assert as_limit(limit) is limit
    assert MemoryLimit(5).n_bytes(CPU) == 5


def test_a_share_is_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert MemoryLimit(0.25).n_bytes(CPU) == 250
    assert MemoryLimit(1.0).n_bytes(CPU) == 1000


def test_a_container_may_have_less_than_its_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    of_machine = free_bytes(CPU)
    assert of_machine > 2**20
    (tmp_path / "memory.max").write_text("70000\n")
    (tmp_path / "memory.current").write_text("60000\n")
    assert free_bytes(CPU) == 10000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 2**20


def test_where_nobody_knows_what_is_free() -> None:
    with pytest.raises(ConfigError, match="in bytes, as an int"):
        free_bytes(t.device("meta"))


# ------------------------------------------------------------------ what work takes


def test_the_peak_counts_what_is_there_at_the_same_time() -> None:
    before = t.ones(1000)
    with PeakMemory() as peak:
        doubled = before * 2  # 4000 bytes
        part = doubled[:10]  # a view: nothing new
        del doubled
        again = part + 1  # 40
        del part  # 4000 are gone
        later = t.zeros(500)  # 2000
        before.mul_(2).view(10, 100)  # was there before
    assert peak.n_bytes == 4040
    assert len(again) + len(later) == 510


def test_the_peak_counts_what_a_backward_pass_keeps() -> None:
    weight = t.ones(100, 100, requires_grad=True)
    x = t.ones(50, 100)

    def run() -> None:
        hidden = x
        for _ in range(3):
            hidden = (hidden @ weight).tanh()
        hidden.sum().backward()

    with PeakMemory() as peak:
        run()
    # Three outputs of tanh that autograd keeps, 20,000 bytes each, and at the end of the
    # backward pass a gradient or two of 40,000.
    assert 60_000 + 40_000 <= peak.n_bytes <= 200_000


# ----------------------------------------------------------------------- what fits


class Work:
    """Takes a + b n + c n s bytes at one moment and less fixed memory at another."""

    def __init__(self) -> None:
        self.tried: list[Sizes] = []

    def n_bytes(self, sizes: Sizes) -> int:
        n, s = sizes.n_prompts, sizes.n_srcs
        return max(500 + 10 * n + 3 * n * s, 20 * n + 5 * n * s)

    def peak(self, sizes: Sizes, guard: Guard | None) -> Taken | None:
        """By ten operations that keep 50 each, and one whose tensor goes with the sizes."""
        n, s = sizes.n_prompts, sizes.n_srcs
        large = max(10 * n + 3 * n * s, 20 * n + 5 * n * s - 500)
        if guard is not None:
            try:
                for there in range(0, 500, 50):
                    guard.check("small", there)
                guard.check("large", 500)
            except OverLimit:
                return None
        self.tried.append(sizes)
        return Taken(self.n_bytes(sizes), {"small": 50, "large": large})


LEAST, MOST = Sizes(1, 2), Sizes(16, 30)


@pytest.mark.parametrize("limit", [516, 560, 640, 700, 1000, 1700, 2800, 10**6])
def test_the_pieces_fit_and_nothing_larger_is_tried(limit: int) -> None:
    work = Work()
    sizes = fitting_sizes(work.peak, limit, LEAST, MOST)
    assert work.tried[0] == LEAST
    assert all(Work().n_bytes(tried) <= limit for tried in work.tried)
    assert len(work.tried) <= 2 * MAX_TRIES + 1
    # Sources are chunked only where not even one prompt fits with all of them.
    assert sizes.n_srcs == MOST.n_srcs or sizes.n_prompts == 1
    # All the memory that they leave would not do for twice as much.
    n, s = sizes.n_prompts, sizes.n_srcs
    larger = Sizes(2 * n, s) if s == MOST.n_srcs else Sizes(1, min(2 * s + 6, 30))
    assert sizes == MOST or Work().n_bytes(larger) > 0.85 * limit


def test_chunks_are_of_about_one_size() -> None:
    def peak(sizes: Sizes, guard: Guard | None) -> Taken:
        return Taken(100 * sizes.n_srcs, {})

    # 16 fit at a time: two chunks of 15, not of 16 and 14.
    assert fitting_sizes(peak, 1700, LEAST, MOST) == Sizes(1, 15)


def test_the_error_names_the_least() -> None:
    with pytest.raises(MemoryLimitError, match="is 515 bytes, but .* takes 516 bytes"):
        fitting_sizes(Work().peak, 515, LEAST, MOST)
    assert issubclass(MemoryLimitError, (ConfigError, MemoryError))


def test_shares_and_bytes_are_told_apart() -> None:
    def peak(sizes: Sizes, guard: Guard | None) -> Taken:
        return Taken(10, {})

    limit: Any = as_limit(1)
    with pytest.raises(MemoryLimitError, match="1.0 is all of it"):
        fitting_sizes(peak, limit.n_bytes(CPU), LEAST, MOST)
