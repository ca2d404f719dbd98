"""What a prune algorithm is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from auto_circuit.types import AlgoKey, PruneScores


@dataclass(frozen=True)
class PruneAlgo:
    """A way to score edges.

    key: its name in results; two algorithms are equal if their keys are.
    name, short_name: for figures and tables.
    func: (model, dataloader, official_edges) -> PruneScores. `model` is a
        PatchableModel; it must be as it was when the function returns.
    needs_true_edges: does it work only on tasks with a known circuit?
    """

    key: AlgoKey
    name: str = field(compare=False)
    func: Callable[..., PruneScores] = field(compare=False)
    _short_name: str | None = field(default=None, compare=False)
    needs_true_edges: bool = field(default=False, compare=False)

    @property
    def short_name(self) -> str:
        """The short name, or the name if there is none."""
        return self._short_name or self.name
