"""A pass that keeps what some of the sources write, and not what all do.

What an edge's mask has for a gradient needs its own source's difference alone. So the masks
can be taken a few sources at a time, each time with a buffer for these. The others are left
out, where their masks are zero: they change nothing. Where they change what destinations read,
they need not be told apart: sources of one module that have the same mask at every destination
are one source, whose difference is the sum of theirs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch as t
from jaxtyping import Float
from torch import Tensor

from auto_circuit import devices


@dataclass(frozen=True)
class KeptSources:
    """The slots of a pass, and the sources whose differences are added up in each.

    slots: ranges of sources of one module, in order; a source is in one slot or in none.
    own: the sources whose masks get gradients; each has a slot for itself.
    """

    slots: tuple[range, ...]
    own: range

    def of(self, srcs: slice) -> slice:
        """The slots of these sources, which are all or none of a slot's."""
        first, stop = (
            bisect_left(self.slots, src, key=lambda slot: slot.start)
            for src in (srcs.start, srcs.stop)
        )
        return slice(first, stop)

    def added_up(
        self, srcs: slice, heads: Float[Tensor, "batch seq src d_model"]
    ) -> Float[Tensor, "batch seq slot d_model"]:
        """What goes to the slots of a module, from what each of its sources writes."""
        # Sources 9..12, of which 9 and 10 share a slot, and 11 has one: the heads 0..1 are
        # added up, and head 2 is taken as it is.
        parts = [
            heads[:, :, slot.start - srcs.start : slot.stop - srcs.start].sum(2)
            for slot in self.slots[self.of(srcs)]
        ]
        return t.stack(parts, 2)

    def spread(
        self, srcs: slice, of_slots: Float[Tensor, "token slot d_model"]
    ) -> Float[Tensor, "token src d_model"]:
        """The gradients of a module's sources, from those of all slots: the other way."""
        shape = (len(of_slots), srcs.stop - srcs.start, of_slots.shape[-1])
        of_srcs = of_slots.new_zeros(shape)
        slots = self.of(srcs)
        for i, slot in enumerate(self.slots[slots], start=slots.start):
            first, stop = slot.start - srcs.start, slot.stop - srcs.start
            of_srcs[:, first:stop] = of_slots[:, i : i + 1]
        return of_srcs

    def columns(
        self, lo: int, hi: int, weights: Float[Tensor, "batch seq row src"]
    ) -> Float[Tensor, "batch seq row slot"]:
        """The masks of the slots, from those of the sources lo..hi-1; gradients of its own."""
        slots = self.slots[self.of(slice(lo, hi))]
        columns = [slot.start - lo for slot in slots]
        picked = weights.index_select(-1, devices.index_tensor(columns, weights.device))
        n_own = sum(slot.start in self.own for slot in slots)
        if not n_own:
            return picked.detach()
        n_before = sum(slot.start < self.own.start for slot in slots)
        # Of slots that begin at the sources 0, 3, 4 and 5, of which 3 and 4 are own: 1, 2, 1.
        sizes = (n_before, n_own, len(slots) - n_before - n_own)
        before, own, after = picked.split(sizes, -1)
        return t.cat([before.detach(), own, after.detach()], -1)


def kept_alone(own: range, also: Sequence[int] = ()) -> KeptSources:
    """These sources, and none beside them but a few that get no gradients."""
    srcs = sorted({*own, *also})
    return KeptSources(tuple(range(src, src + 1) for src in srcs), own)


def kept_with_sums(own: range, modules: Sequence[slice]) -> KeptSources:
    """These sources, and the sums of the others, module by module."""
    slots: list[range] = []
    for srcs in modules:
        lo = min(max(own.start, srcs.start), srcs.stop)
        hi = max(min(own.stop, srcs.stop), lo)
        parts = (range(srcs.start, lo), range(hi, srcs.stop))
        alone = [range(src, src + 1) for src in range(lo, hi)]
        slots += [part for part in (parts[0], *alone, parts[1]) if part]
    return KeptSources(tuple(slots), own)
