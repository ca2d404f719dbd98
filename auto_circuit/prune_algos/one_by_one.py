"""Trying many circuits that differ by single edges, at a fraction of a forward pass each.

Two things make it cheap. If no edge before some layer is patched, the layers before it give
what they gave before, so they do not run again: with the destinations taken from the last
layer to the first, an edge costs a third of a forward pass on average. And several
circuits can be tried in one pass, as further examples of a batch with masks of their own:
that pays where a pass costs its overhead, on small inputs and GPUs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from auto_circuit.checks import check_count
from auto_circuit.prune_algos.mask_training import TrainingBatch, circuit_outputs
from auto_circuit.types import Edge
from auto_circuit.utils.graph_utils import (
    patch_mode,
    preserved_masks,
    set_all_masks,
    set_mask_batch_size,
    starting_at,
)
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.utils.torch_state import own_computation


def edges_from_the_end(edges: Iterable[Edge]) -> list[Edge]:
    """Edges by destination, from the last layer to the first, else in the graph's order.

    Of one layer first those that lead through its attention, whose inputs the others change.
    """
    return sorted(edges, key=lambda edge: (-edge.dest.layer, not edge.is_crossing, edge))


@dataclass(frozen=True, eq=False)
class Trial:
    """Circuits that are tried side by side, on the same prompts.

    Edges must be patched from late layers to early ones (`edges_from_the_end`): layers
    before the first are not run again.

    before: the outputs before any edge was tried; None if the batch comes in parts, with
        one circuit at a time, in whole passes.
    """

    model: PatchableModel
    batch: TrainingBatch
    n_circuits: int
    before: Float[Tensor, "batch *seq vocab"] | None = None

    def patch(self, edge: Edge, circuits: slice, share: float) -> None:
        """Patch an edge (1) or leave it intact (0) in some of the circuits."""
        mask = edge.patch_mask(self.model).data
        if self.n_circuits == 1:
            mask[edge.patch_idx] = share
            return
        n_prompts = len(self.batch.inputs) // self.n_circuits
        lo, hi, _ = circuits.indices(self.n_circuits)
        mask[(slice(lo * n_prompts, hi * n_prompts), *edge.patch_idx)] = share

    def outputs(self, first: Edge) -> Float[Tensor, "circuit batch *seq vocab"]:
        """The circuits' outputs; edges into layers before `first`'s are as they were."""
        with starting_at(self.model, first.dest):
            outs = circuit_outputs(self.model, self.batch)
        return outs.unflatten(0, (self.n_circuits, -1))

    def by_part(
        self, first: Edge | None
    ) -> Iterator[tuple[Float[Tensor, "circuit _ *seq vocab"], Float[Tensor, "..."]]]:
        """(The circuits' outputs, the full model's) of all prompts, part by part.

        first: see `outputs`; None: before any edge was tried.
        """
        if self.batch.parts is None:
            assert self.before is not None
            outs = self.before[None] if first is None else self.outputs(first)
            yield outs, self.batch.clean_outputs[: outs.shape[1]]
            return
        for part in self.batch.parts():
            with part.patches(self.model):
                yield circuit_outputs(self.model, part)[None], part.clean_outputs


@contextmanager
def trial(
    model: PatchableModel,
    batch: TrainingBatch,
    n_circuits: int,
    intact: Collection[Edge] | None = None,
) -> Iterator[Trial]:
    """Inside, circuits can be tried; on exit, masks are what they were.

    intact: the edges that are not patched at the beginning; all if None.
    Raises ConfigError unless there is at least one circuit.
    """
    check_count("n_circuits", n_circuits)
    if batch.parts is not None:
        with own_computation(grad=False), preserved_masks(model):
            _leave_alone(model, intact)
            yield Trial(model, batch, 1)
        return
    repeated = _repeated(batch, n_circuits)
    assert repeated.patch_src_outs is not None
    with (
        own_computation(grad=False),
        # One circuit needs no masks for each example.
        set_mask_batch_size(model, len(repeated.inputs) if n_circuits > 1 else None),
        preserved_masks(model),
        patch_mode(model, repeated.patch_src_outs, keeps_layers=True),
    ):
        _leave_alone(model, intact)
        before = circuit_outputs(model, repeated)[: len(batch.inputs)]
        yield Trial(model, repeated, n_circuits, before)


def _leave_alone(model: PatchableModel, intact: Collection[Edge] | None) -> None:
    """Patch all edges but these; none if None."""
    set_all_masks(model, 0.0 if intact is None else 1.0)
    for edge in intact or ():
        edge.patch_mask(model).data[(..., *edge.patch_idx)] = 0.0


def _repeated(batch: TrainingBatch, times: int) -> TrainingBatch:
    """The batch, several times one after the other."""
    if times == 1 or batch.patch_src_outs is None:
        return batch

    def repeat(x: Tensor) -> Tensor:
        return x.repeat(times, *(1,) * (x.ndim - 1))

    by_token = repeat(batch.patch_src_outs.movedim(0, 2))
    return replace(
        batch,
        inputs=repeat(batch.inputs),
        kwargs={name: repeat(value) for name, value in batch.kwargs.items()},
        patch_src_outs=by_token.movedim(2, 0),
        clean_outputs=repeat(batch.clean_outputs),
    )


def chunks(edges: Sequence[Edge], size: int) -> Iterator[list[Edge]]:
    """The edges, a few at a time."""
    return (list(edges[i : i + size]) for i in range(0, len(edges), size))
