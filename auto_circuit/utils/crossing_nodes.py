"""The nodes of crossing edges, which lead through attention from one position to another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch.nn import Module

from auto_circuit.errors import ConfigError
from auto_circuit.model_utils.model_adapter import CrossingSite, ModelAdapter
from auto_circuit.types import Crossing, DestNode, SrcNode


def crossing_sites(adapter: ModelAdapter, model: Module) -> tuple[CrossingSite, ...]:
    """Where heads read across positions. Raises ConfigError if the adapter knows no such."""
    if adapter.crossings is None or adapter.read_attention is None:
        raise ConfigError(
            "Crossing edges (`crossing=True`) lead through attention, into which the adapter "
            f"{adapter.name!r} cannot look. Use `crossing=False`."
        )
    return adapter.crossings(model)


def crossing_dests(site: CrossingSite, n_positions: int) -> Iterator[DestNode]:
    """A node for each head: what it reads at all positions."""
    for read_from, dest in zip(site.inputs, site.dests, strict=True):
        srcs = tuple(_at_position(read_from, i) for i in range(n_positions))
        yield replace(dest, crossing=Crossing(srcs, site.is_causal))


def _at_position(read_from: DestNode, position: int) -> SrcNode:
    """A head's keys (or values) at one position: "A0.1.V[3]"."""
    return SrcNode(
        name=f"{read_from.name}[{position}]",
        module_name=read_from.module_name,
        layer=read_from.layer,
        head_idx=read_from.head_idx,
        head_dim=read_from.head_dim,
        src_idx=position,
        component=read_from.component,
        heads=read_from.heads,
    )
