"""What algorithms and metrics need of a model and of a task."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from auto_circuit.data import PromptDataLoader
from auto_circuit.types import Edge


@runtime_checkable
class SlicedModel(Protocol):
    """A model of whose output the part `model(tokens)[model.out_slice]` counts."""

    out_slice: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


if TYPE_CHECKING:

    class TaskLike(Protocol):
        """A behaviour of a model: what `auto_circuit.tasks.Task` is for the metrics."""

        @property
        def key(self) -> str:
            """The name under which the task's results are filed."""
            ...

        @property
        def model(self) -> Any:
            """The PatchableModel (Any, so that a `cached_property` will do)."""
            ...

        @property
        def test_loader(self) -> PromptDataLoader:
            """The prompts that circuits are measured on."""
            ...

        @property
        def true_edge_count(self) -> int | None:
            """How many true edges there are, if they are known."""
            ...

    class PrunableTask(TaskLike, Protocol):
        """What a task also has for the algorithms that find its circuit."""

        @property
        def name(self) -> str:
            """The task's name for people."""
            ...

        @property
        def train_loader(self) -> PromptDataLoader:
            """The prompts that algorithms see."""
            ...

        @property
        def true_edges(self) -> Collection[Edge] | None:
            """The edges of the true circuit, if it is known."""
            ...

else:
    # A run-time check of a protocol reads its properties, which would load the model.
    TaskLike = PrunableTask = Any
