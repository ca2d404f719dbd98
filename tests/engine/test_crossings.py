"""Edges that lead through attention are what plain hooks on Hugging Face models say they are."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch as t
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from auto_circuit.circuit_files import load_circuit, save_circuit
from auto_circuit.circuits import all_edges, circuit_of_edges
from auto_circuit.errors import ConfigError, GraphError
from auto_circuit.model_utils.micro_model_utils import MicroModel
from auto_circuit.prefix_cache import make_prefix_cache
from auto_circuit.types import Edge
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    set_mask_batch_size,
    train_mask_mode,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import (
    D_MODEL,
    MORE_ARCHITECTURES,
    N_CTX,
    N_HEADS,
    N_LAYERS,
    SIZES,
    VOCAB,
    architectures,
    gpt2,
    randomize,
    state_snapshot,
    tokens,
)

SEQ, D_HEAD = 5, D_MODEL // N_HEADS
CLEAN, CORRUPT = tokens(2, SEQ, seed=1), tokens(2, SEQ, seed=2)


def hf_gpt2() -> Any:
    config = GPT2Config(
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_embd=D_MODEL,
        vocab_size=VOCAB,
        n_positions=N_CTX,
    )
    return GPT2LMHeadModel(config)


def hf_llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


HF_MODELS: dict[str, Callable[[], Any]] = {"gpt2": hf_gpt2, "llama": hf_llama}


def hugging_face(name: str) -> Any:
    model = HF_MODELS[name]()
    randomize(model)
    # Larger than random initialisation has them: patterns that are not flat.
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("c_attn", "q_proj", "k_proj")):
            parameter.data *= 3
    return model.double().eval().requires_grad_(False)


def patchable(hf_model: Any, **options: Any) -> PatchableModel:
    hf_model = copy.deepcopy(hf_model)
    kind = type(hf_model).__name__
    bridge = build_bridge_from_module(hf_model, kind, hf_config=hf_model.config).eval()
    bridge.requires_grad_(False)
    options = {"seq_len": SEQ, "crossing": True, **options}
    return patchable_model(bridge, True, "last_seq", separate_qkv=True, **options)


# ------------------------------------------------------------ plain hooks, no code of ours


@dataclass
class Seen:
    """What one attention of a Hugging Face model computes: [batch head token d_head]."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    read: Tensor


class Plain:
    """A Hugging Face model whose attention is looked into, and changed, by plain hooks."""

    def __init__(self, model: Any, mask: Tensor | None = None) -> None:
        self.model = model
        self.kwargs: dict[str, Tensor] = {}
        if mask is not None:
            # Hugging Face's `generate` gives these too, and TransformerLens in every call.
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
            self.kwargs = {"attention_mask": mask, "position_ids": position_ids}
        self.is_gpt2 = isinstance(model, GPT2LMHeadModel)
        if self.is_gpt2:
            self.attentions = [block.attn for block in model.transformer.h]
            self.outputs = [attention.c_proj for attention in self.attentions]
        else:
            self.attentions = [layer.self_attn for layer in model.model.layers]
            self.outputs = [attention.o_proj for attention in self.attentions]

    def see(self, prompts: Tensor) -> list[Seen]:
        raw: list[dict[str, Any]] = [{} for _ in self.attentions]
        with ExitStack() as stack:
            for attention, output, found in zip(
                self.attentions, self.outputs, raw, strict=True
            ):
                names = ["c_attn"] if self.is_gpt2 else ["q_proj", "k_proj", "v_proj"]
                for name in names:
                    module = getattr(attention, name)
                    handle = module.register_forward_hook(keep(found, name))
                    stack.callback(handle.remove)
                handle = output.register_forward_pre_hook(keep_input(found, "read"))
                stack.callback(handle.remove)
                handle = attention.register_forward_pre_hook(
                    keep_keywords(found), with_kwargs=True
                )
                stack.callback(handle.remove)
            self.model(prompts, **self.kwargs)
        return [self._seen(found) for found in raw]

    def _seen(self, found: dict[str, Any]) -> Seen:
        if self.is_gpt2:
            parts = found["c_attn"].split(D_MODEL, -1)
        else:
            parts = [found[f"{name}_proj"] for name in "qkv"]
        queries, keys, values = (by_head(part) for part in parts)
        if not self.is_gpt2:
            queries, keys = apply_rotary_pos_emb(
                queries, keys, *found["position_embeddings"]
            )
            keys, values = (x.repeat_interleave(2, 1) for x in (keys, values))
        return Seen(queries, keys, values, by_head(found["read"]))

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[batch head token token], the lowest number where a token may not look."""
        scores = queries @ keys.mT / D_HEAD**0.5
        seq = scores.shape[-1]
        hidden = t.ones(seq, seq, dtype=t.bool).triu(1).expand_as(scores)
        if "attention_mask" in self.kwargs:
            hidden = hidden | (self.kwargs["attention_mask"] == 0)[:, None, None, :]
        return scores.masked_fill(hidden, t.finfo(scores.dtype).min)

    @contextmanager
    def added(self, block: int, change: Tensor) -> Iterator[None]:
        """Inside, a change [batch head token d_head] is added to what heads read."""
        flat = change.transpose(1, 2).flatten(2)
        handle = self.outputs[block].register_forward_pre_hook(
            lambda module, args: (args[0] + flat, *args[1:])
        )
        try:
            yield
        finally:
            handle.remove()

    def change(self, edge: Edge, clean: Seen, corrupt: Seen) -> Tensor:
        """What a crossing edge changes in what its head reads."""
        head, to, come_from = edge.dest.head_idx, edge.seq_idx, edge.src.src_idx
        scores = self.scores(clean.queries, clean.keys)
        pattern = scores.softmax(-1)
        change = t.zeros_like(clean.read)
        if edge.dest.head_input == "value":
            share = pattern[:, head, to, come_from, None]
            of_values = (
                corrupt.values[:, head, come_from] - clean.values[:, head, come_from]
            )
            change[:, head, to] = share * of_values
        else:
            other = self.scores(clean.queries, corrupt.keys)
            scores[:, head, to, come_from] = other[:, head, to, come_from]
            change[:, head, to] = ((scores.softmax(-1) - pattern) @ clean.values)[
                :, head, to
            ]
        return change

    def patched(self, edge: Edge, seen: list[Seen], others: list[Seen]) -> Tensor:
        """The logits of clean prompts, with one crossing edge patched."""
        block = int(edge.dest.module_name.split(".")[1])
        with self.added(block, self.change(edge, seen[block], others[block])):
            return self.model(CLEAN, **self.kwargs).logits[:, -1]


def keep(found: dict[str, Any], name: str) -> Callable[..., None]:
    return lambda module, args, out: found.update({name: out})


def keep_input(found: dict[str, Any], name: str) -> Callable[..., None]:
    return lambda module, args: found.update({name: args[0]})


def keep_keywords(found: dict[str, Any]) -> Callable[..., None]:
    return lambda module, args, kwargs: found.update(kwargs)


def by_head(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, D_HEAD)).transpose(1, 2)


def crossing_edges(model: PatchableModel) -> list[Edge]:
    return [edge for edge in model.edges if edge.is_crossing]


# ------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    "name,is_padded",
    [
        ("llama", True),
        pytest.param("gpt2", False, marks=pytest.mark.slow),
        pytest.param("gpt2", True, marks=pytest.mark.slow),
        pytest.param("llama", False, marks=pytest.mark.slow),
    ],
)
def test_single_edges_are_what_plain_hooks_say(name: str, is_padded: bool) -> None:
    """40 edges of keys and values, across positions and within one."""
    hf_model, mask = hugging_face(name), None
    if is_padded:
        # In float64, Llama's softmax in float32 gives NaN where all is padding.
        hf_model = hf_model.float()
        mask = t.tensor([[0, 0, 1, 1, 1], [1] * SEQ])
    model, plain = patchable(hf_model), Plain(hf_model, mask)
    kwargs = {} if mask is None else {"attention_mask": mask}
    edges = [e for e in crossing_edges(model) if e.seq_idx == SEQ - 1 or "A0" in e.name]
    edges = random.Random(0).sample(edges, 40)
    assert {edge.dest.head_input for edge in edges} == {"key", "value"}
    n_changed = 0
    with t.no_grad():
        before = model(CLEAN, **kwargs)[:, -1]
        patch = src_ablations(model, CORRUPT, attention_mask=mask)
        seen, others = plain.see(CLEAN), plain.see(CORRUPT)
        for edge in edges:
            expected = plain.patched(edge, seen, others)
            with patch_mode(model, patch, [edge]):
                found = model.sliced(CLEAN, **kwargs)
            t.testing.assert_close(found, expected, atol=1e-5, rtol=0.0)
            n_changed += bool((expected - before).abs().max() > 1e-4)
    assert n_changed >= (20 if is_padded else 30)


def small(
    seq_len: int | None = 3, crossing: bool = True, **options: Any
) -> PatchableModel:
    """One layer of two heads, in float64."""
    bridge = gpt2(1, 2).double()
    return patchable_model(
        bridge, True, "last_seq", seq_len, True, crossing=crossing, **options
    )


def random_masks(model: PatchableModel, seed: int = 0) -> None:
    generator = t.Generator().manual_seed(seed)
    for mask in model.patch_masks.values():
        mask.data.copy_(t.rand(mask.shape, generator=generator))


def test_edges_and_masks_belong_together() -> None:
    """Every entry of a mask is one edge; no edge leads back."""
    model = small()
    edges = list(model.edges)
    assert edges == sorted(edges) and len(edges) == model.n_edges
    assert len(crossing_edges(model)) == 2 * 2 * (1 + 2 + 3)
    numbered = model.new_prune_scores()
    for number, edge in enumerate(edges):
        assert edge.prune_score(numbered) == 0
        edge.set_prune_score(numbered, number + 1)
        assert model.find_edges(repr(edge)) == model.find_edges(edge) == [edge]
        assert model.edges.index(edge) == number and model.edges[number] == edge
    assert model.in_edge_order(numbered).tolist() == list(range(1, len(edges) + 1))
    assert all(e.src.src_idx <= (e.seq_idx or 0) for e in edges if e.is_crossing)
    at_two = [e for e in edges if e.seq_idx == 2]
    assert list(model.edge_dict[2]) == sorted(at_two)
    assert {e.name for e in at_two} == set(model.edge_name_dict[2])
    with pytest.raises(GraphError, match="reads no later position"):
        model.find_edges("A0.1.V[2]->A0.1 by value @ 1")
    with pytest.warns(UserWarning, match="all 2 positions"):
        assert len(model.find_edges("A0.1.V[1]->A0.1 by value")) == 2


@pytest.mark.parametrize("name", architectures("gemma2"))
def test_all_edges_patched_is_the_corrupt_run(name: str) -> None:
    """Whatever the crossing edges are, and half of the rest."""
    bridge = MORE_ARCHITECTURES[name]()
    model = patchable_model(bridge, True, None, SEQ, True, crossing=True)
    with t.no_grad():
        corrupt, patch = model(CORRUPT), src_ablations(model, CORRUPT)
        with patch_mode(model, patch):
            random_masks(model)
            for mask in [model.patch_masks[dest.module_name] for dest in model.dests]:
                mask.data.fill_(1.0)
            found = model(CLEAN)
    t.testing.assert_close(found, corrupt, atol=2e-5, rtol=0.0)


def test_a_graph_without_crossing_edges_is_the_one_that_it_was() -> None:
    """Bit for bit; and with crossing edges that are not patched, nothing is added."""
    with_crossings, without = small(), small(crossing=False)
    clean, corrupt = tokens(2, 3, seed=1), tokens(2, 3, seed=2)
    assert set(without.patch_masks) < set(with_crossings.patch_masks)
    outs = []
    for model in (with_crossings, without):
        with t.no_grad(), patch_mode(model, src_ablations(model, corrupt)):
            generator = t.Generator().manual_seed(0)
            for dest in dict.fromkeys(dest.module_name for dest in model.dests):
                mask = model.patch_masks[dest]
                mask.data.copy_(t.rand(mask.shape, generator=generator))
            outs.append(model(clean))
            set_all_masks(model, 0.0)
    assert t.equal(*outs)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gradients_are_finite_differences(value: float) -> None:
    """Of all masks, at 0, 1/2 and 1, where their products matter too."""
    found, expected = gradients(small(), value, step=1e-4)
    if value < 1:  # where all is patched, values and keys are those that are patched in
        assert (expected.abs() > 1e-6).sum() > 10
    t.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_gradients_of_grouped_queries_are_finite_differences(value: float) -> None:
    """Of Llama, which has rotary positions, and computes its softmax in float32."""
    bridge = MORE_ARCHITECTURES["llama"]().double()
    model = patchable_model(bridge, True, "last_seq", 3, True, crossing=True)
    found, expected = gradients(model, value, step=0.01)
    assert (expected.abs() > 1e-3).sum() > 10
    atol = 1e-3 * float(expected.abs().max())
    t.testing.assert_close(found, expected, atol=atol, rtol=0.0)


def gradients(model: PatchableModel, value: float, step: float) -> tuple[Tensor, Tensor]:
    """Of a logit by the masks of crossing edges, all masks at a value; by differences."""
    clean, corrupt = tokens(2, 3, seed=1), tokens(2, 3, seed=2)
    patch = src_ablations(model, corrupt)
    with train_mask_mode(model) as masks, patch_mode(model, patch):
        set_all_masks(model, value)
        model.sliced(clean)[:, 3].sum().backward()
        grads = {name: mask.grad.clone() for name, mask in masks.items()}  # type: ignore[union-attr]
    edges = crossing_edges(model)
    repeated = clean.repeat(2 * len(edges), 1)
    with t.no_grad(), set_mask_batch_size(model, len(repeated)):
        with patch_mode(model, patch.repeat(1, 2 * len(edges), 1, 1)):
            set_all_masks(model, value)
            for i, edge in enumerate(edges):
                mask = edge.patch_mask(model).data
                mask[(slice(4 * i, 4 * i + 2), *edge.patch_idx)] += step
                mask[(slice(4 * i + 2, 4 * i + 4), *edge.patch_idx)] -= step
            outs = model.sliced(repeated)[:, 3].view(-1, 2, 2).sum(-1)
            set_all_masks(model, 0.0)
    expected = (outs[:, 0] - outs[:, 1]) / (2 * step)
    return t.stack([edge.prune_score(grads) for edge in edges]), expected


@pytest.mark.parametrize("ungroup", [False, True])
def test_grouped_queries_have_crossing_edges_for_each_head(ungroup: bool) -> None:
    """In both graphs they are the same numbers, of the same heads."""
    model = patchable(hugging_face("llama"), ungroup=ungroup)
    names = [edge.src.name.partition("[")[0] for edge in crossing_edges(model)]
    assert len(set(names)) == 2 * N_LAYERS * (N_HEADS if ungroup else 2)
    other = patchable(hugging_face("llama"), ungroup=not ungroup)
    pairs = list(zip(crossing_edges(model), crossing_edges(other), strict=True))
    for ours, theirs in random.Random(0).sample(pairs, 6):
        outs = []
        for graph, edge in ((model, ours), (other, theirs)):
            with t.no_grad(), patch_mode(graph, src_ablations(graph, CORRUPT), [edge]):
                outs.append(graph.sliced(CLEAN))
        t.testing.assert_close(*outs)


def test_the_state_is_what_it_was() -> None:
    model = small()
    clean, patch = tokens(2, 3, seed=1), src_ablations(small(), tokens(2, 3, seed=2))
    attention = model.wrapped_model.blocks[0].attn  # type: ignore[union-attr, index]

    def state() -> dict[str, object]:
        inner = {name: id(value) for name, value in vars(attention).items()}
        inner.pop("_pattern", None)
        return state_snapshot(model) | inner

    model.sliced(clean)
    before = state()
    for error in (None, KeyError):
        try:
            with patch_mode(model, patch, [crossing_edges(model)[5]]):
                model.sliced(clean)
                if error is not None:
                    raise error
        except KeyError:
            pass
        assert state() == before


def test_a_prefix_cache_changes_no_number() -> None:
    bridge = gpt2().double()
    prefix = make_prefix_cache(bridge, t.tensor([7, 3]))
    cut = patchable_model(
        bridge, True, "last_seq", SEQ, True, kv_caches=(prefix,), crossing=True
    )
    whole = patchable_model(bridge, True, "last_seq", SEQ + 2, True, crossing=True)
    outs = []
    for model, shift in ((cut, 0), (whole, 2)):
        start = t.tensor([[7, 3]]).expand(2, -1)[:, :shift]
        clean, corrupt = (t.cat([start, x], 1) for x in (CLEAN, CORRUPT))
        edges = [
            edge
            for edge in crossing_edges(model)
            if edge.src.src_idx == 1 + shift and edge.seq_idx == SEQ - 1 + shift
        ]
        with t.no_grad(), patch_mode(model, src_ablations(model, corrupt), edges):
            outs.append(model.sliced(clean))
    t.testing.assert_close(*outs)


def test_bad_input_is_one_error() -> None:
    bridge = gpt2(1, 2)
    for options in ({"seq_len": None}, {"separate_qkv": False}, {"factorized": False}):
        arguments = {"factorized": True, "separate_qkv": True, "seq_len": 3, **options}
        with pytest.raises(ConfigError, match="so they need `"):
            patchable_model(bridge, crossing=True, **arguments)
    with pytest.raises(ConfigError, match="cannot look"):
        patchable_model(MicroModel(), True, seq_len=3, separate_qkv=True, crossing=True)
    with pytest.raises(GraphError, match="knows nothing of edges that lead through"):
        small().check_no_crossings("It")
    model = small()
    patch = src_ablations(model, tokens(2, 3))
    with (
        pytest.raises(GraphError, match="not only how far"),
        patch_mode(model, patch, differences=True),
    ):
        pass
    with t.no_grad(), patch_mode(model, patch, [crossing_edges(model)[5]]):
        weight = model.wrapped_model.blocks[0].attn.o.weight  # type: ignore[union-attr, index]
        weight.data.mul_(2)
        with pytest.raises(GraphError, match="have changed inside"):
            model.sliced(tokens(2, 3, seed=1))


def test_circuits_keep_their_crossing_edges(tmp_path: Path) -> None:
    """As files, and without dead ends."""
    model = small()
    scores = {
        name: t.rand(score.shape, generator=t.Generator().manual_seed(i))
        for i, (name, score) in enumerate(model.new_prune_scores().items())
    }
    save_circuit(tmp_path / "circuit.json", model, scores)
    loaded = load_circuit(tmp_path / "circuit.json", model)
    for name, score in scores.items():
        t.testing.assert_close(loaded[name], score.double())
    names = [
        "Resid Start->A0.1.V @ 0",
        "A0.1.V[0]->A0.1 by value @ 2",
        "A0.1->Resid End @ 2",
    ]
    path = circuit_of_edges(model, names)
    more = circuit_of_edges(
        model,
        [
            *names,
            "A0.1.V[1]->A0.1 by value @ 2",  # nothing leads to it
            "A0.0.K[0]->A0.0 by key @ 2",
            "Resid Start->A0.1.V @ 2",  # nobody reads it there
            "A0.1.V[0]->A0.1 by value @ 1",  # where nothing leads away
        ],
    )
    assert more.connected() == path == path.connected()
    assert path.without_edges(names[1:2]).connected().n_edges == 0
    # At the last position what leads to the output, before it keys and values.
    assert all_edges(model).connected().n_edges == 4 + 3 + 2 + 3 * 4 + 3 * 4
