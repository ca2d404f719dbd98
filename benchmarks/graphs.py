"""Graphs of large models on the meta device: how long they take, and how much memory.

No weights are needed: a graph follows from the shapes. Each shape is measured in this process
after its model was made, which TransformerLens takes seconds for. `python -m benchmarks.graphs`
prints a table.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch as t
from rich.console import Console
from rich.table import Table
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

from auto_circuit.utils.graph_utils import patchable_model


@dataclass(frozen=True)
class Shape:
    """What a Llama-like model looks like. seconds: in which its graph must be built."""

    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    seconds: float

    def n_edges(self, n_positions: int) -> int:
        """How many edges its graph has, by a formula."""
        inputs = self.n_heads + 2 * self.n_kv_heads
        # Before block l there are 1 + l (heads + 1) sources; its MLP reads its heads too.
        before = [1 + block * (self.n_heads + 1) for block in range(self.n_layers + 1)]
        heads_read = sum(before[:-1]) * inputs
        mlps_read = sum(before[:-1]) + self.n_layers * self.n_heads
        return n_positions * (heads_read + mlps_read + before[-1])


SHAPES = {
    "Llama-3-8B": Shape(4096, 14336, 32, 32, 8, seconds=1.0),
    "Llama-3-70B": Shape(8192, 28672, 80, 64, 8, seconds=6.0),
}


@dataclass(frozen=True)
class Measured:
    """What a graph took. megabytes: the rise of the process's peak."""

    n_edges: int
    build_seconds: float
    name_seconds: float
    megabytes: float


def meta_bridge(shape: Shape) -> TransformerBridge:
    """A model of that shape, without weights."""
    config = LlamaConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        vocab_size=128_256,
        max_position_embeddings=8192,
    )
    with t.device("meta"):
        model = LlamaForCausalLM(config)
    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=config)
    return bridge.eval().requires_grad_(False)


def measured(name: str, n_positions: int) -> Measured:
    """Build the graph of a shape, and name one edge of it."""
    bridge = meta_bridge(SHAPES[name])
    peak, begun = _peak_megabytes(), time.perf_counter()
    graph = patchable_model(bridge, True, "last_seq", n_positions, separate_qkv=True)
    built = time.perf_counter()
    (edge,) = graph.find_edges(f"A0.1->A7.3.K @ {n_positions - 1}")
    named = time.perf_counter()
    assert edge in graph.edges
    megabytes = _peak_megabytes() - peak
    return Measured(graph.n_edges, built - begun, named - built, megabytes)


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(n_positions: int = 100) -> None:
    """Print the table."""
    table = Table(title=f"Graphs with {n_positions} positions on the meta device")
    for column in ("Shape", "Edges", "Built (s)", "One edge named (ms)", "Memory (MB)"):
        table.add_column(column, justify="left" if column == "Shape" else "right")
    for name in SHAPES:
        found = measured(name, n_positions)
        table.add_row(
            name,
            f"{found.n_edges:,}",
            f"{found.build_seconds:.2f}",
            f"{1000 * found.name_seconds:.1f}",
            f"{found.megabytes:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
