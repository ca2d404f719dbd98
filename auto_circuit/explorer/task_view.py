"""The part of a task's view that needs its model: graph, prompts, attention, effects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch as t
from torch import Tensor

from auto_circuit.checks import check_count, checked
from auto_circuit.data import PromptDataLoader, PromptPair, Side, collate_fn
from auto_circuit.explorer.data import (
    VERSION,
    AttentionView,
    CrossingView,
    DestinationView,
    EffectsView,
    GraphView,
    NodeView,
    PromptSide,
    PromptView,
    SourceView,
    TaskView,
)
from auto_circuit.explorer.model_view import (
    as_bytes,
    attention_patterns,
    direct_logit_effects,
    effects_view,
)
from auto_circuit.tasks import Task
from auto_circuit.types import DestNode, Edge, Node, SrcNode
from auto_circuit.utils.patchable_model import PatchableModel

MAX_PATTERN_BYTES = 2_000_000
"""The most that the attention patterns of one side may take; longer prompts show none."""

N_PROMPTS = 3


@checked
def task_view(task: Task, n_prompts: int = N_PROMPTS) -> TaskView:
    """What the explorer shows of a task but scores: its model loads, and runs on a prompt.

    n_prompts: how many example prompts, the first ones of the test loader. Attention and
    effects are those on the first of them.
    """
    check_count("n_prompts", n_prompts)
    model = task.model
    loader = task.test_loader if task.test_loader.n_prompts else task.train_loader
    pairs = [loader.prompt_dataset[place] for place in loader.places[:n_prompts]]
    texts = _Texts.of(model, loader)
    graph = graph_view(task, loader, texts)
    attention = effects = None
    notes: list[str] = []
    if pairs:
        example = _Example(model, loader, pairs[0], texts)
        attention, why = example.attention(graph)
        notes += [why] if why else []
        effects, why = example.effects()
        notes += [why] if why else []
    return TaskView(
        version=VERSION,
        key=task.key,
        name=task.name,
        prompts=tuple(prompt_view(pair, texts) for pair in pairs),
        graph=graph,
        attention=attention,
        effects=effects,
        notes=tuple(notes),
    )


# -------------------------------------------------------------------------------- graph


def graph_view(task: Task, loader: PromptDataLoader, texts: _Texts) -> GraphView:
    """The graph of a task's model, with the true edges."""
    model = task.model
    srcs = list(model.srcs)
    dests = sorted(model.dests, key=lambda dest: dest.sort_key)
    drawn = _Drawn(srcs)
    sources = tuple(SourceView(src.name, drawn.add(src)) for src in srcs)
    destinations = tuple(_destination(dest, drawn) for dest in dests)
    pairs = [
        (src, place)
        for place, dest in enumerate(dests)
        for src in range(len(srcs))[model.wrapper(dest.module_name).in_srcs]  # type: ignore[index]
    ]
    src, dest = np.array(pairs, dtype=np.uint16).reshape(-1, 2).T.copy()
    labels = None
    if model.seq_len is not None:
        labels = model.position_labels(loader.seq_labels)
    crossings = tuple(_crossing(dest, drawn) for dest in model.crossings)
    pairs = [] if not crossings else _pairs_of(model)
    return GraphView(
        nodes=tuple(drawn.nodes),
        sources=sources,
        destinations=destinations,
        src=src,
        dest=dest,
        n_positions=model.seq_len,
        position_labels=None if labels is None else tuple(labels),
        first_token=loader.diverge_idx,
        true_edges=_true_edges(task, (src, dest), (srcs, dests)),
        separate_qkv=bool(model.separate_qkv),
        crossings=crossings,
        pairs=np.array(pairs, dtype=np.uint16) if crossings else None,
        span_texts=_span_texts(model, loader, texts),
    )


def _crossing(dest: DestNode, drawn: _Drawn) -> CrossingView:
    """What a head reads across positions; it is drawn as the head, and what it reads as that."""
    assert dest.crossing is not None and dest.head_idx is not None
    read = dest.crossing.srcs[0]
    name = read.name.partition("[")[0]
    return CrossingView(
        source=name,
        name=dest.name,
        source_node=drawn.add(replace(read, name=name)),
        node=drawn.add(dest),
        module=dest.module_name,
        head=dest.head_idx,
    )


def _pairs_of(model: PatchableModel) -> list[tuple[int, int]]:
    crossing = model.crossings[0].crossing
    assert crossing is not None
    return crossing.pairs()


def _span_texts(
    model: PatchableModel, loader: PromptDataLoader, texts: _Texts
) -> tuple[str, ...] | None:
    """What is in each span of the first prompt; None if positions are no spans."""
    if model.spans is None or not loader.n_prompts:
        return None
    pair = loader.prompt_dataset[loader.places[0]]
    tokens, mask = _sides(pair)["clean"]
    ids = (tokens if mask is None else tokens[mask > 0]).tolist()
    words: list[list[str]] = [[] for _ in model.spans.names]
    for token, span in zip(ids, model.spans.of_prompt(tuple(ids)), strict=True):
        words[span].append(texts.word(token))
    return tuple("".join(of_span) for of_span in words)


def _destination(dest: DestNode, drawn: _Drawn) -> DestinationView:
    return DestinationView(
        name=dest.name,
        node=drawn.add(dest),
        module=dest.module_name,
        head=dest.head_idx,
        first_source=dest.min_src_idx,
    )


class _Drawn:
    """The nodes to draw: what reads and what writes are one, if they are of one head."""

    def __init__(self, srcs: list[SrcNode]) -> None:
        self.nodes: list[NodeView] = []
        self._places: dict[Any, int] = {}
        self._written = {_identity(src) for src in srcs}

    def add(self, node: Node) -> int:
        """The place of what is drawn for a node."""
        key = _identity(node)
        key = key if key in self._written else node.name
        if key not in self._places:
            self._places[key] = len(self.nodes)
            component = node.component
            is_taken = any(other.name == node.name for other in self.nodes)
            self.nodes.append(
                NodeView(
                    # Keys and values that several heads share.
                    name=f"{node.name} (in)" if is_taken else node.name,
                    kind=node.kind or "",
                    layer=node.layer,
                    head=node.head_idx,
                    block=None if component is None else component.block,
                )
            )
        return self._places[key]


def _identity(node: Node) -> Any:
    """The same for the source and the destinations of one head, or of one MLP."""
    if node.component is None:
        return node.name
    is_whole = node.heads is None and node.head_idx is None
    # A sparse autoencoder's latents are many sources of one component.
    named = "" if is_whole or len(node.heads or ()) == 1 else node.name
    return (node.component, node.heads, named)


def _true_edges(
    task: Task,
    edges: tuple[np.ndarray, np.ndarray],
    nodes: tuple[list[SrcNode], list[DestNode]],
) -> np.ndarray | None:
    known = task.true_edges
    if known is None:
        return None
    names = [[node.name for node in of_kind] for of_kind in nodes]
    places = {
        (names[0][src], names[1][dest]): place
        for place, (src, dest) in enumerate(zip(*edges, strict=True))
    }
    found = [
        (
            _place_of_crossing(edge, task.model, len(places))
            if edge.is_crossing
            else (edge.seq_idx or 0) * len(places) + places[edge.src.name, edge.dest.name]
        )
        for edge in known
    ]
    return np.array(sorted(found), dtype=np.uint32)


def _place_of_crossing(edge: Edge, model: PatchableModel, n_at_one: int) -> int:
    """Edges through attention come after all others, head by head."""
    pairs, heads = _pairs_of(model), [dest.name for dest in model.crossings]
    pair = pairs.index((edge.seq_idx or 0, edge.src.src_idx))
    first = n_at_one * (model.seq_len or 1)
    return first + heads.index(edge.dest.name) * len(pairs) + pair


# ------------------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class _Texts:
    """What tokens are as text. prefix: those that all prompts begin with, cut off."""

    word: Callable[[Any], str]
    prefix: tuple[Any, ...]

    @staticmethod
    def of(model: PatchableModel, loader: PromptDataLoader) -> _Texts:
        tokenizer: Any = getattr(model.wrapped_model, "tokenizer", None)
        prefix = () if loader.kv_cache is None else loader.kv_cache.tokens.tolist()
        if tokenizer is None:
            return _Texts(_number, tuple(prefix))
        return _Texts(lambda token: tokenizer.decode([token]), tuple(prefix))


def _number(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def prompt_view(pair: PromptPair, texts: _Texts) -> PromptView:
    """A prompt pair as text, with what was cut off before it and without padding."""
    return PromptView(
        clean=_side(pair, texts, "clean"),
        corrupt=_side(pair, texts, "corrupt"),
        answers=_answers(pair.answers, texts),
        wrong_answers=_answers(pair.wrong_answers, texts),
    )


def _side(pair: PromptPair, texts: _Texts, side: Side) -> PromptSide:
    tokens, mask = _sides(pair)[side]
    is_text = np.ones(len(tokens), bool) if mask is None else mask.cpu().numpy() > 0
    differs = (
        (pair.clean != pair.corrupt).flatten(1).any(1)
        if pair.clean.ndim > 1
        else (pair.clean != pair.corrupt)
    )
    n_prefix = len(texts.prefix)
    shown = np.flatnonzero(is_text)
    values = tokens.tolist()
    return PromptSide(
        tokens=tuple(
            texts.word(token) for token in (*texts.prefix, *(values[i] for i in shown))
        ),
        differs=tuple(
            n_prefix + place for place, i in enumerate(shown.tolist()) if differs[i]
        ),
    )


def _sides(pair: PromptPair) -> dict[Side, tuple[Tensor, Tensor | None]]:
    return {
        "clean": (pair.clean, pair.clean_attention_mask),
        "corrupt": (pair.corrupt, pair.corrupt_attention_mask),
    }


def _answers(answers: Tensor, texts: _Texts) -> tuple[str, ...]:
    is_ids = answers.ndim == 1 and not answers.is_floating_point()
    word = texts.word if is_ids else _number
    return tuple(word(value) for value in answers.tolist())


# ------------------------------------------------------------------- the model on a prompt


def _heads_drawn(graph: GraphView) -> dict[tuple[int | None, int | None], int]:
    """(block, head) -> the node that is drawn for it; its query's, if no head writes alone."""
    ends = [*graph.sources, *(d for d in graph.destinations if d.name.endswith(".Q"))]
    found: dict[tuple[int | None, int | None], int] = {}
    for end in ends:
        node = graph.nodes[end.node]
        if node.kind == "attention" and node.head is not None:
            found.setdefault((node.block, node.head), end.node)
    return found


@dataclass(frozen=True, eq=False)
class _Example:
    """The prompt that attention and effects are shown on."""

    model: PatchableModel
    loader: PromptDataLoader
    pair: PromptPair
    texts: _Texts

    def attention(self, graph: GraphView) -> tuple[AttentionView | None, str]:
        """What heads attend to, or why it is not shown."""
        whole = self._whole()
        if not whole:
            return None, "The model's inputs are no tokens, so no attention is shown."
        place = _heads_drawn(graph)
        longest = max(tokens.shape[1] for tokens in whole.values())
        if len(place) * longest**2 > MAX_PATTERN_BYTES:
            return None, f"Attention is not shown: the prompt has {longest} tokens."
        sides = {s: attention_patterns(self.model, whole[s]) for s in whole}
        heads = [
            (block, head, place[block, head])
            for block, patterns in sorted(sides["clean"].items())
            for head in range(len(patterns))
            if (block, head) in place
        ]
        if not heads:
            return None, "The model does not show where its heads attend."
        stacked = {
            side: t.stack([sides[side][block][head] for block, head, _ in heads])
            for side in sides
        }
        return (
            AttentionView(
                nodes=tuple(node for _, _, node in heads),
                clean=as_bytes(stacked["clean"]),
                corrupt=as_bytes(stacked["corrupt"]),
            ),
            "",
        )

    def _whole(self) -> dict[Side, Tensor]:
        """The tokens with those that all prompts begin with, without padding; {} if none."""
        found = {}
        for side, (tokens, mask) in _sides(self.pair).items():
            if tokens.ndim != 1 or tokens.is_floating_point():
                return {}
            tokens = tokens if mask is None else tokens[mask > 0]
            found[side] = t.cat([tokens.new_tensor(self.texts.prefix), tokens])[None]
        return found

    def effects(self) -> tuple[EffectsView | None, str]:
        """Which words the sources write for, or why it is not shown."""
        why = (
            "The model's final norm or unembedding is of a kind that is not known, so the "
            "words that nodes write for are not shown."
        )
        if not self.model.is_transformer:
            return None, why
        batch = collate_fn([self.pair])
        effects = {}
        for side in _sides(self.pair):
            effect = direct_logit_effects(self.model, *batch.model_input(side))
            if effect is None:
                return None, why
            effects[side] = effect
        word = self.texts.word
        return effects_view(effects, self._answer_ids(), word), ""

    def _answer_ids(self) -> tuple[int | None, int | None]:
        """Of the last position's first answer and first wrong one, where they are words."""
        found = []
        for answers in (self.pair.answers, self.pair.wrong_answers):
            at_last = answers[-1] if answers.ndim > 1 else answers
            is_word = len(at_last) and not answers.is_floating_point()
            found.append(int(at_last[0]) if is_word else None)
        return found[0], found[1]
