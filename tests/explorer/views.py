"""Views for the explorer's tests, made without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch as t

from auto_circuit.explorer.data import (
    VERSION,
    AlgorithmView,
    AttentionView,
    DestinationView,
    EffectsView,
    GraphView,
    NodeView,
    PromptSide,
    PromptView,
    SideEffects,
    SourceView,
    TaskView,
    algorithm_view,
)
from auto_circuit.model_utils.micro_model_utils import MicroModel
from auto_circuit.tasks import Task
from auto_circuit.types import MeasurementRow, PruneScores


def micro_task(folder: Path) -> Task:
    """A task of a model that is no transformer."""
    numbers = {"clean": [[3.0, 3.0], [1.0, 2.5]], "corrupt": [[1.0, 1.0], [1.0, 2.5]]}
    prompt = {**numbers, "answers": [1], "wrong_answers": [0]}
    path = folder / "numbers.json"
    path.write_text(json.dumps({"prompts": [prompt, prompt]}))
    return Task(
        key="Micro",
        name="Micro",
        batch_size=1,
        batch_count=1,
        token_circuit=False,
        _model_def=MicroModel(),
        _dataset_name=path,
    )


TOKENS = ("<bos>", "When", "Mary", "and", "John", "met")


def made_graph(
    n_blocks: int, n_heads: int, n_positions: int | None = None, **fields: Any
) -> GraphView:
    """The factorized graph of a transformer, with Q, K and V of their own."""
    nodes = [NodeView("Resid Start", "embed", 0, None, None)]
    sources = [SourceView("Resid Start", 0)]
    destinations: list[DestinationView] = []
    pairs: list[tuple[int, int]] = []

    def add_destination(name: str, node: int, module: str, head: int | None) -> None:
        pairs.extend((src, len(destinations)) for src in range(n_before))
        destinations.append(DestinationView(name, node, module, head, 0))

    for block in range(n_blocks):
        n_before = len(sources)
        first = len(nodes)
        for head in range(n_heads):
            nodes.append(
                NodeView(f"A{block}.{head}", "attention", 2 * block + 1, head, block)
            )
            sources.append(SourceView(f"A{block}.{head}", first + head))
        for part in "KQV":
            for head in range(n_heads):
                name = f"A{block}.{head}.{part}"
                add_destination(name, first + head, f"{block}.{part}", head)
        n_before = len(sources)
        nodes.append(NodeView(f"MLP {block}", "mlp", 2 * block + 2, None, block))
        add_destination(f"MLP {block}", len(nodes) - 1, f"{block}.mlp", None)
        sources.append(SourceView(f"MLP {block}", len(nodes) - 1))
    n_before = len(sources)
    nodes.append(NodeView("Resid End", "unembed", 2 * n_blocks + 1, None, None))
    add_destination("Resid End", len(nodes) - 1, "end", None)
    src, dest = np.array(pairs, dtype=np.uint16).T.copy()
    labels = None
    if n_positions is not None:
        labels = tuple(f"position {at}" for at in range(n_positions))
    graph = GraphView(
        nodes=tuple(nodes),
        sources=tuple(sources),
        destinations=tuple(destinations),
        src=src,
        dest=dest,
        n_positions=n_positions,
        position_labels=labels,
        first_token=0,
        true_edges=None,
        separate_qkv=True,
    )
    return replace(graph, **fields)


def made_scores(graph: GraphView, seed: int = 0) -> PruneScores:
    """Random scores, a few of them large."""
    generator = t.Generator().manual_seed(seed)
    rows: dict[str, list[t.Tensor]] = {}
    n_sources = np.bincount(graph.dest)
    lead = () if graph.n_positions is None else (graph.n_positions,)
    for destination, n_of_dest in zip(graph.destinations, n_sources, strict=True):
        row = t.randn((*lead, int(n_of_dest)), generator=generator) ** 3
        rows.setdefault(destination.module, []).append(row)
    has_heads = {one.module: one.head is not None for one in graph.destinations}
    return {
        module: t.stack(of_module, dim=-2) if has_heads[module] else of_module[0]
        for module, of_module in rows.items()
    }


def made_algorithm(
    graph: GraphView, name: str, seeds: Sequence[int] = (0,), sizes: Sequence[int] = ()
) -> AlgorithmView:
    """An algorithm whose circuits get better with their size."""
    rows = [
        MeasurementRow(
            task="Task",
            algo=name,
            metric="Logit Diff Percent",
            ablation="Resample",
            patch_type="Tree Patch",
            n_edges=size,
            value=100 * (size / graph.n_edges) ** 0.25 + seed,
            seed=seed,
        )
        for size in sizes
        for seed in seeds
    ]
    return algorithm_view(graph, name, [made_scores(graph, seed) for seed in seeds], rows)


def made_view(
    graph: GraphView,
    algorithms: Sequence[AlgorithmView],
    key: str = "Made",
    tokens: Sequence[str] = TOKENS,
) -> TaskView:
    """A view with attention and effects."""
    n = len(tokens)
    heads = [i for i, node in enumerate(graph.nodes) if node.kind == "attention"]
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 256, (2, len(heads), n, n)).astype(np.uint8)
    patterns = np.tril(patterns)
    effects = generator.normal(size=(2, len(graph.sources), 4)).astype(np.float32)
    effects = -np.sort(-effects, axis=-1)
    words = np.tile(np.arange(4, dtype=np.uint16) % n, (len(graph.sources), 1))
    sides = [
        SideEffects(effects[i, :, 0].copy(), effects[i, :, 1].copy(), words, effects[i])
        for i in range(2)
    ]
    corrupt = tuple(tokens[:2]) + ("Anne",) + tuple(tokens[3:])
    prompt = PromptView(
        clean=PromptSide(tuple(tokens), (2,)),
        corrupt=PromptSide(corrupt, (2,)),
        answers=(tokens[2],),
        wrong_answers=(tokens[-1],),
    )
    return TaskView(
        version=VERSION,
        key=key,
        name=f"{key} task",
        prompts=(prompt,) * 3,
        graph=graph,
        attention=AttentionView(tuple(heads), patterns[0], patterns[1]),
        effects=EffectsView(tuple(tokens), 2, *sides),
        algorithms=tuple(algorithms),
    )
