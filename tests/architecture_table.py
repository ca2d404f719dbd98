"""Architecture x check: how far the library is off, family by family.

Every check compares with something that shares no code with the library: the plain Hugging
Face model, its hooks, finite differences. All but one run in float64.

python -m tests.architecture_table    # rewrites docs/architectures.json; all families: 2 min
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch as t
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.circuit_files import load_mib_circuit, save_mib_circuit
from auto_circuit.errors import AutoCircuitError
from auto_circuit.experiment_utils import load_tl_model
from auto_circuit.model_utils.transformer_lens_utils import WHOLE_ATTENTION_ADAPTER
from auto_circuit.prefix_cache import make_prefix_cache
from auto_circuit.spans import spans_of_labels
from auto_circuit.types import Edge, PruneScores
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.backward_modifiers import gim_backward, relp_backward
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    train_mask_mode,
    unpatch,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.architectures import FAMILIES, hugging_face, plain_model
from tests.models import VOCAB, tokens
from tests.plain_crossings import CrossingEdge, patch_each_crossing
from tests.plain_patching import (
    PlainModel,
    Rules,
    edge_scores,
    in_float64,
    patch_each_edge,
    ungrouped,
)

PATH = Path(__file__).parents[1] / "docs" / "architectures.json"
SEQ, N_EDGES, N_FEWER, N_CROSSINGS, PREFIX, PADDING = 6, 60, 12, 20, 2, 3
CLEAN, CORRUPT = tokens(1, SEQ, seed=1), tokens(1, SEQ, seed=2)
STEP = 1e-5
"""Of finite differences."""
NOT_SUPPORTED = "not supported, because "

Cell = float | str
"""A number, or `NOT_SUPPORTED` and why."""
Row = dict[str, Cell]


@dataclass(frozen=True)
class Subject:
    """One family: the plain model, and ours with the same weights, in float64."""

    name: str
    model: PatchableModel

    @cached_property
    def plain(self) -> PlainModel:
        return plain_model(self.name, t.float64)

    @cached_property
    def patch(self) -> Tensor:
        return src_ablations(self.model, CORRUPT)

    @property
    def crossing(self) -> Subject:
        """The same model in a graph with positions and edges through attention.

        Each token is a span, so that there can be padding before them.
        """
        spans = spans_of_labels([f"token {i}" for i in range(SEQ)])
        inner = self.model.wrapped_model
        graph = patchable_model(inner, True, None, None, True, crossing=True, spans=spans)
        return Subject(self.name, graph)


def subject(name: str) -> Subject:
    return Subject(name, graph(name, t.float64))


def graph(name: str, dtype: t.dtype) -> PatchableModel:
    return patchable_model(loaded(name, dtype), True, None, separate_qkv=True)


def loaded(name: str, dtype: t.dtype) -> TransformerBridge:
    return load_tl_model(hugging_face(name, dtype))


def loss(logits: Tensor) -> Tensor:
    """Some weighted sum of the last position's logits."""
    generator = t.Generator().manual_seed(0)
    weights = t.randn(VOCAB, generator=generator, dtype=t.float64)
    return (logits[:, -1] @ weights.to(logits.dtype)).sum()


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    found, expected = found.double(), expected.double()
    assert expected.abs().max() > 1e-3  # not a comparison of nothing
    return float((found - expected).abs().max() / expected.abs().max())


# ------------------------------------------------------------------------------ checks


def edges(of: Subject) -> float:
    return of.model.n_edges


def masks(of: Subject) -> float:
    """All masks 0: the plain model on the clean prompt. All 1: on the corrupt one.

    There every source writes what it writes on the corrupt prompt, too: nothing that reads
    the residual stream is without a mask.
    """
    errors = []
    for value, prompt in ((0.0, CLEAN), (1.0, CORRUPT)):
        written = t.empty_like(of.patch)
        set_all_masks(of.model, value)
        with t.no_grad(), patch_mode(of.model, of.patch, None, written):
            errors.append(off(of.model(CLEAN), of.plain.logits(prompt)))
    errors.append(off(written[1:], of.patch[1:]))
    set_all_masks(of.model, 0.0)
    return max(errors)


def single_edges(of: Subject) -> float:
    """60 edges, each alone, against hooks on the plain model; of what they change."""
    chosen = some_edges(list(of.model.edges), N_EDGES)
    return edges_off(of.model, of.patch, of.plain, chosen)


def some_edges(edges: Sequence[Edge], n_edges: int) -> list[Edge]:
    return random.Random(0).sample(edges, min(n_edges, len(edges)))


def edges_off(
    model: PatchableModel, patch: Tensor, plain: PlainModel, chosen: Sequence[Edge]
) -> float:
    names = [(edge.src.name, edge.dest.name) for edge in chosen]
    before = plain.logits(CLEAN)
    expected = patch_each_edge(plain, CLEAN, CORRUPT, names) - before
    found = []
    for edge in chosen:
        with t.no_grad(), patch_mode(model, patch, [edge]):
            found.append(model(CLEAN)[0] - before[0])
    assert expected.abs().amax((1, 2)).median() > 1e-3
    return off(t.stack(found), expected)


def ungrouped_edges(of: Subject) -> float:
    """12 edges into keys and values of single query heads, against a plain model of which
    every query head has its own.
    """
    inner: Any = of.model.wrapped_model
    model = patchable_model(inner, True, None, None, True, ungroup=True)
    into = [edge for edge in model.edges if edge.dest.head_input in ("key", "value")]
    chosen = some_edges(into, N_FEWER)
    return edges_off(model, of.patch, ungrouped(of.plain), chosen)


def whole_attention(of: Subject) -> float:
    """12 edges of attention layers as sources, alone."""
    inner: Any = of.model.wrapped_model
    model = patchable_model(
        inner, True, None, separate_qkv=True, adapter=WHOLE_ATTENTION_ADAPTER
    )
    layers = [edge for edge in model.edges if re.fullmatch(r"A\d+", edge.src.name)]
    chosen = some_edges(layers, N_FEWER)
    return edges_off(model, src_ablations(model, CORRUPT), of.plain, chosen)


def crossing_edges(of: Subject) -> float:
    """20 edges through attention, of keys and values, as `single_edges`."""
    model = of.crossing.model
    crossings = [edge for edge in model.edges if edge.is_crossing]
    chosen = random.Random(0).sample(crossings, N_CROSSINGS)
    assert {edge.dest.head_input for edge in chosen} == {"key", "value"}
    plain = of.plain.logits(CLEAN)
    edges = [_plain_crossing(edge) for edge in chosen]
    expected = patch_each_crossing(of.plain, CLEAN, CORRUPT, edges) - plain
    found = []
    for edge in chosen:
        with t.no_grad(), patch_mode(model, of.patch, [edge]):
            found.append(model(CLEAN)[0] - plain[0])
    assert (expected.abs().amax((1, 2)) > 1e-3).sum() >= N_CROSSINGS // 2
    return off(t.stack(found), expected)


def _plain_crossing(edge: Edge) -> CrossingEdge:
    """A3.1.V[0]->A3.1 by value @ 4: head 1 of block 3 reads at 4 a value at 0."""
    block, head = map(int, re.findall(r"\d+", edge.dest.name))
    kind, to = edge.dest.head_input, edge.seq_idx
    assert kind in ("key", "value") and to is not None
    return CrossingEdge(kind, block, head, to, come_from=edge.src.src_idx)


def gradients(of: Subject) -> float:
    """Masks' gradients at 0, 0.5 and 1, against finite differences in 4 directions."""
    return max(_gradients_at(of, value) for value in (0.0, 0.5, 1.0))


def _gradients_at(of: Subject, value: float) -> float:
    generator = t.Generator().manual_seed(1)
    slopes, differences = [], []
    with train_mask_mode(of.model) as masks, patch_mode(of.model, of.patch):
        set_all_masks(of.model, value)
        loss(of.model(CLEAN)).backward()
        grads = {name: mask.grad for name, mask in masks.items() if mask.grad is not None}
        # Where all is patched, only what the end reads makes a difference.
        assert all(grad.any() for grad in grads.values()) or value == 1.0
        for _ in range(4):
            way = {
                name: t.randn(mask.shape, generator=generator, dtype=mask.dtype)
                for name, mask in masks.items()
            }
            slopes.append(
                t.stack([(grads[name] * way[name]).sum() for name in way]).sum()
            )
            values = []
            for step in (1, -1, 2, -2):
                for name, mask in masks.items():
                    mask.data = value + step * STEP * way[name]
                with t.no_grad():
                    values.append(loss(of.model(CLEAN)))
            near, far = values[0] - values[1], values[2] - values[3]
            differences.append((8 * near - far) / (12 * STEP))
    set_all_masks(of.model, 0.0)
    return off(t.stack(slopes), t.stack(differences))


def random_masks(model: PatchableModel) -> None:
    generator = t.Generator().manual_seed(0)
    for mask in model.patch_masks.values():
        mask.data = t.rand(mask.shape, generator=generator, dtype=t.float64).to(
            mask.dtype
        )


def patched(of: Subject) -> Tensor:
    random_masks(of.model)
    with t.no_grad(), patch_mode(of.model, of.patch):
        return of.model(CLEAN)


def left_padding(of: Subject) -> float:
    """Random masks, with padding before the prompt and without."""
    expected = patched(of)[:, -1]
    clean, corrupt = (
        t.cat([t.zeros(1, PADDING, dtype=t.long), prompt], dim=1)
        for prompt in (CLEAN, CORRUPT)
    )
    mask = t.cat([t.zeros(1, PADDING), t.ones(1, SEQ)], dim=1).long()
    patch = src_ablations(of.model, corrupt, attention_mask=mask)
    with t.no_grad(), patch_mode(of.model, patch):
        found = of.model(clean, attention_mask=mask)[:, -1]
    return off(found, expected)


def prefix_cache(of: Subject) -> float:
    """Random masks, on prompts whose common beginning is cached, and on whole prompts."""
    corrupt = t.cat([CLEAN[:, :PREFIX], CORRUPT[:, PREFIX:]], dim=1)
    random_masks(of.model)
    with t.no_grad(), patch_mode(of.model, src_ablations(of.model, corrupt)):
        expected = of.model(CLEAN)[:, PREFIX:]
    inner: Any = of.model.wrapped_model
    cache = make_prefix_cache(inner, CLEAN[0, :PREFIX])
    cached = patchable_model(inner, True, None, None, True, (cache,))
    random_masks(cached)
    patch = src_ablations(cached, corrupt[:, PREFIX:])
    with t.no_grad(), patch_mode(cached, patch):
        return off(cached(CLEAN[:, PREFIX:]), expected)


def bf16_ranks(of: Subject) -> float:
    """The rank correlation of all edges' scores in bfloat16 with those in float64."""
    narrow = graph(of.name, t.bfloat16)
    scores = [mask_gradients(narrow, src_ablations(narrow, CORRUPT))]
    with in_float64():
        scores.append(mask_gradients(of.model, of.patch))
    ranks = [
        scores_in_order(model, of_model).double().argsort().argsort().double()
        for model, of_model in zip((narrow, of.model), scores, strict=True)
    ]
    return float(t.corrcoef(t.stack(ranks))[0, 1])


def mask_gradients(model: PatchableModel, patch: Tensor) -> PruneScores:
    set_all_masks(model, 0.0)
    with train_mask_mode(model) as masks, patch_mode(model, patch):
        loss(model(CLEAN)).backward()
        return {name: mask.grad for name, mask in masks.items() if mask.grad is not None}


def scores_in_order(model: PatchableModel, scores: PruneScores) -> Tensor:
    return t.stack([edge.prune_score(scores) for edge in model.edges])


def unpatched(of: Subject) -> float:
    """The largest difference of logits before and after; 0 is bit for bit the same."""
    inner: Any = loaded(of.name, t.float32)
    with t.no_grad():
        before = inner(CLEAN)
        model = patchable_model(inner, True, None, separate_qkv=True)
        set_all_masks(model, 1.0)
        with patch_mode(model, src_ablations(model, CORRUPT)):
            assert not t.allclose(model(CLEAN), before)
        after = unpatch(model)(CLEAN)
    return float((after - before).abs().max())


def gim(of: Subject) -> float:
    return _modified(of, gim_backward, "gim")


def relp(of: Subject) -> float:
    return _modified(of, relp_backward, "relp")


def _modified(of: Subject, modifier: Any, rules: Rules) -> float:
    """Scores under a modifier, against the rules written out for the plain model."""
    with modifier(of.model):
        scores = mask_gradients(of.model, of.patch)
    expected = edge_scores(of.plain, CLEAN, CORRUPT, loss, rules)
    pairs = [(edge.src.name, edge.dest.name) for edge in of.model.edges]
    found = scores_in_order(of.model, scores)
    return off(found, t.tensor([expected[pair] for pair in pairs]))


def mib_export(of: Subject) -> float:
    """The edges in a file of the benchmark, which gives the same scores when it is read."""
    scores = mask_gradients(of.model, of.patch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.json"
        save_mib_circuit(path, of.model, scores)
        back = load_mib_circuit(path, of.model)
        n_edges = len(json.loads(path.read_text())["edges"])
    for name, values in scores.items():
        t.testing.assert_close(back[name], values, rtol=1e-6, atol=0.0)
    return n_edges


@dataclass(frozen=True)
class Check:
    """One column.

    largest: what a number may be; None: it must stay what it is.
    near: how far it may be from what it was.
    is_exact: does it run where all is computed in float64?
    """

    title: str
    run: Callable[[Subject], float]
    largest: float | None = None
    smallest: float = 0.0
    near: float = 0.0
    is_exact: bool = True

    def is_right(self, number: float, committed: float) -> bool:
        if self.largest is None:
            return number == committed
        if self.near and abs(number - committed) > self.near:
            return False
        return self.smallest <= number <= self.largest


EXACT = 1e-10
CHECKS = {
    "edges": Check("builds: edges", edges),
    "masks": Check("masks 0, 1", masks, EXACT),
    "single edges": Check("60 single edges", single_edges, EXACT),
    "whole attention": Check("whole attention: 12 edges", whole_attention, EXACT),
    "ungrouped": Check("ungrouped: 12 edges", ungrouped_edges, EXACT),
    "crossing edges": Check("20 crossing edges", crossing_edges, EXACT),
    "gradients": Check("gradients", gradients, 1e-6),
    "left padding": Check("left padding", left_padding, EXACT),
    "prefix cache": Check("prefix cache", prefix_cache, EXACT),
    "bf16 ranks": Check("bf16 ranks", bf16_ranks, 1.0, 0.7, near=0.05, is_exact=False),
    "unpatched": Check("unpatched", unpatched, 0.0, is_exact=False),
    "GIM": Check("GIM", gim, EXACT),
    "RelP": Check("RelP", relp, EXACT),
    "MIB": Check("MIB file: edges", mib_export),
}


# ------------------------------------------------------------------------------- the table


def row(name: str) -> Row:
    """All checks of a family."""
    try:
        with in_float64():
            of = subject(name)
    except AutoCircuitError as error:
        return dict.fromkeys(CHECKS, because(error))
    return {key: cell(check, of) for key, check in CHECKS.items()}


def cell(check: Check, of: Subject) -> Cell:
    """A check's number, or why there is none."""
    try:
        with in_float64() if check.is_exact else nullcontext():
            return check.run(of)
    except AutoCircuitError as error:
        return because(error)


def because(error: AutoCircuitError) -> str:
    """An error's first sentence."""
    text = str(error).partition(". ")[0].rstrip(".")
    return NOT_SUPPORTED + text


def committed() -> dict[str, Row]:
    return json.loads(PATH.read_text())["families"]  # type: ignore[no-any-return]


def differences(name: str, found: Row, expected: Row) -> list[str]:
    """What is not as it was, or not as it should be."""
    wrong = []
    for key, check in CHECKS.items():
        new, old = found[key], expected.get(key)
        if isinstance(new, str) or isinstance(old, str) or old is None:
            is_right = _words(new) == _words(old)
        else:
            is_right = check.is_right(new, old)
        if not is_right:
            wrong.append(f"{name}, {check.title}: {new!r}; the table says {old!r}")
    return wrong


def _words(cell: Cell | None) -> str:
    """A reason without its numbers."""
    return re.sub(r"\d\S*", "", cell) if isinstance(cell, str) else str(cell)


def write(rows: dict[str, Row]) -> None:
    """The numbers as the page shows them: two digits."""
    families = {
        name: {key: _short(value) for key, value in cells.items()}
        for name, cells in rows.items()
    }
    content = {
        "titles": {name: FAMILIES[name].title for name in rows},
        "columns": {key: check.title for key, check in CHECKS.items()},
        "families": families,
    }
    PATH.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _short(value: Cell) -> Cell:
    if isinstance(value, str) or value == int(value):
        return value if isinstance(value, str) else int(value)
    return float(f"{value:.2g}" if value < 0.5 else f"{value:.3f}")


def main(names: list[str]) -> None:
    before = committed() if PATH.is_file() else {}
    rows, wrong = {}, []
    for name in FAMILIES:
        is_asked = not names or name in names
        rows[name] = row(name) if is_asked or name not in before else before[name]
        wrong += differences(name, rows[name], rows[name])
        print(name, rows[name], file=sys.stderr)
    if wrong:
        sys.exit("\n".join(["The table is not written:", *wrong]))
    write(rows)


if __name__ == "__main__":
    t.set_num_threads(1)
    main(sys.argv[1:])
