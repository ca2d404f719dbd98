"""What every adapter must do. A new line in ADAPTERS is tested by this.

What single edges do is computed a second time, with plain hooks at the places that the
adapter names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch as t
from torch import Tensor
from torch.nn import Module

from auto_circuit.errors import ConfigError
from auto_circuit.model_utils.adapters import ADAPTERS, find_adapter
from auto_circuit.model_utils.model_adapter import HeadInputs, ModelAdapter, Port, SrcSite
from auto_circuit.types import DestNode, Edge, SrcNode
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.component_links import fed_links
from auto_circuit.utils.graph_utils import (
    patch_mode,
    patchable_model,
    set_all_masks,
    unpatch,
)
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import state_snapshot

on_all_adapters = pytest.mark.parametrize(
    "adapter", ADAPTERS, ids=lambda adapter: adapter.name
)
N_SINGLE_EDGES = 6


def example(adapter: ModelAdapter) -> Module:
    assert adapter.example is not None, f"give {adapter.name} an `example`"
    return adapter.example().eval().requires_grad_(False)


def graphs(adapter: ModelAdapter, seq_len: int | None = None) -> Iterator[PatchableModel]:
    """All kinds of graphs that the family has: the one of edges at least."""
    for factorized in (True, False):
        for separate_qkv in (True, False) if adapter.is_transformer else (None,):
            try:
                yield patchable_model(
                    example(adapter),
                    factorized,
                    slice_output=None,
                    seq_len=seq_len,
                    separate_qkv=separate_qkv,
                    adapter=adapter,
                )
            except ConfigError:
                assert not factorized


def clean_and_corrupt(model: PatchableModel) -> tuple[Tensor, Tensor]:
    """The probe's rows, and the same rows exchanged."""
    clean = model.adapter.probe_input(model.wrapped_model)
    corrupt = clean.roll(1, dims=0)
    assert not t.equal(clean, corrupt), "the probe needs two different rows"
    return clean, corrupt


def assert_equal(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    t.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=1e-4)


@on_all_adapters
def test_it_handles_its_example_and_no_other_does_before(adapter: ModelAdapter) -> None:
    assert adapter.handles(example(adapter))
    assert find_adapter(example(adapter)) is adapter


@on_all_adapters
def test_every_site_fires(adapter: ModelAdapter) -> None:
    for model in graphs(adapter):
        with hooks(model) as hook:
            fired: list[str] = []
            for name, module in sites(model):
                hook(module, lambda out, name=name, fired=fired: fired.append(name))
            model.wrapped_model(clean_and_corrupt(model)[0])
        assert {name for name, _ in sites(model)} == set(fired)


@on_all_adapters
def test_no_mask_is_clean_and_all_masks_are_corrupt(adapter: ModelAdapter) -> None:
    for model in graphs(adapter):
        clean, corrupt = clean_and_corrupt(model)
        patch = src_ablations(model, corrupt)
        for mask, expected in ((0.0, clean), (1.0, corrupt)):
            set_all_masks(model, mask)
            with t.no_grad(), patch_mode(model, patch):
                patched = model(clean)
            assert_equal(patched, model.wrapped_model(expected))


@on_all_adapters
def test_single_edges_are_plain_hooks(adapter: ModelAdapter) -> None:
    for model in graphs(adapter):
        clean, corrupt = clean_and_corrupt(model)
        patch = src_ablations(model, corrupt)
        bare = model.wrapped_model(clean)
        changes = []
        for edge in list(model.edges)[:: -(-model.n_edges // N_SINGLE_EDGES)]:
            with t.no_grad(), patch_mode(model, patch, [edge]):
                found = model(clean)
            assert_equal(found, hooked_output(model, edge, clean, corrupt))
            changes.append(not t.allclose(found, bare))
        assert sum(changes) > len(changes) / 2  # not a comparison of nothing


@on_all_adapters
def test_destinations_feed_the_sources_that_change_with_them(
    adapter: ModelAdapter,
) -> None:
    for model in graphs(adapter, seq_len=4):
        if model.separate_qkv is not False:
            assert changed_srcs(model, 2, 4) == all_fed(model, 2, 4)


@on_all_adapters
def test_unpatched_the_model_is_bit_for_bit_as_it_was(adapter: ModelAdapter) -> None:
    for model in graphs(adapter):
        bare, (clean, corrupt) = example(adapter), clean_and_corrupt(model)
        bare(clean)  # TransformerLens puts in hooks of its own when it first runs
        before = state_snapshot(bare)
        set_all_masks(model, 1.0)
        with t.no_grad(), patch_mode(model, src_ablations(model, corrupt)):
            model(clean)
        assert unpatch(model) is model.wrapped_model
        assert state_snapshot(model.wrapped_model) == before
        assert t.equal(model.wrapped_model(clean), bare(clean))


# ------------------------------------------------------------------------ plain hooks

AddHook = Callable[[Module, Callable[[Tensor], Any]], None]


@contextmanager
def hooks(model: PatchableModel) -> Iterator[AddHook]:
    """Inside, every site is open; the hooks that are given get outputs."""
    with ExitStack() as stack, t.no_grad():
        stack.enter_context(
            model.adapter.open_sites(model.wrapped_model, model.separate_qkv)
        )

        def add(module: Module, function: Callable[[Tensor], Any]) -> None:
            def hook(module: Module, args: Any, out: Tensor) -> Tensor | None:
                result = function(out)
                return result if isinstance(result, Tensor) else None

            stack.callback(module.register_forward_hook(hook).remove)

        yield add


def ports(model: PatchableModel) -> tuple[Port, ...]:
    names = list(dict.fromkeys(dest.module_name for dest in in_order(model)))
    return model.adapter.ports(model.wrapped_model, names, model.separate_qkv)


def in_order(model: PatchableModel) -> list[DestNode]:
    _, dests = model.adapter.graph_nodes(
        model.wrapped_model, model.is_factorized, model.separate_qkv
    )
    return dests


def src_site(model: PatchableModel, node: SrcNode) -> SrcSite:
    return model.adapter.src_site(model.wrapped_model, node.module_name)


def sites(model: PatchableModel) -> list[tuple[str, Module]]:
    srcs = [(src.module_name, src_site(model, src).module) for src in model.srcs]
    return srcs + [(str(port.dest_modules), port.module) for port in ports(model)]


def written(model: PatchableModel, node: SrcNode, inputs: Tensor) -> Tensor:
    """What a source writes, [batch seq d_model]."""
    outs: list[Tensor] = []
    site = src_site(model, node)
    with hooks(model) as hook:
        hook(site.module, lambda out: outs.append(out.clone()))
        model.wrapped_model(inputs)
    (out,) = outs
    return part_of(model, node, out)


def part_of(model: PatchableModel, node: SrcNode, out: Tensor) -> Tensor:
    """What a source writes, from its site's output."""
    site = src_site(model, node)
    if site.transform is not None:
        out = site.transform(out)
    if node.head_idx is None:
        return out
    if site.projection is None:
        return out.select(node.head_dim or 0, node.head_idx)
    n_heads = sum(src.module_name == node.module_name for src in model.srcs)
    part = out.unflatten(-1, (n_heads, -1))[..., node.head_idx, :]
    return part @ site.projection(n_heads)[node.head_idx]


def hooked_output(
    model: PatchableModel, edge: Edge, clean: Tensor, corrupt: Tensor
) -> Tensor:
    """The output on `clean` where one destination reads one source's other output."""
    change = written(model, edge.src, corrupt) - written(model, edge.src, clean)
    with hooks(model) as hook:
        for port in ports(model):
            if edge.dest.module_name in port.dest_modules:
                add_to_row(hook, port, row_of(model, port, edge.dest), change)
        return model.wrapped_model(clean)


def all_fed(
    model: PatchableModel, position: int, seq_len: int
) -> dict[DestNode, set[tuple[str, int]]]:
    """What each destination feeds from one position, by what the nodes say."""
    reached = {
        "own": [position],
        "earlier": range(position, seq_len),
        "all": range(seq_len),
    }
    return {
        dest: {(link.src.name, at) for link in of_dest for at in reached[link.positions]}
        for dest, of_dest in fed_links(model).items()
    }


def changed_srcs(
    model: PatchableModel, position: int, seq_len: int
) -> dict[DestNode, set[tuple[str, int]]]:
    """What changes right after each destination if what it reads at a position does.

    That is in its own layer, or, in the unfactorized graph, in the next one: further on,
    what changes has read what changed before.
    """
    inputs = model.adapter.probe_input(model.wrapped_model)
    # Many rows with changes of their own: a latent is not active on each.
    inputs = inputs.repeat(6, 2, *[1] * (inputs.ndim - 2))[:, :seq_len]
    before = all_written(model, inputs, lambda hook: None)
    change = t.zeros_like(next(iter(before.values())))
    generator = t.Generator().manual_seed(0)
    change[:, position] = 5 * t.randn(change[:, position].shape, generator=generator)
    changed: dict[DestNode, set[tuple[str, int]]] = {}
    for dest in model.dests:

        def read_more(hook: AddHook, dest: DestNode = dest) -> None:
            for port in ports(model):
                if dest.module_name in port.dest_modules:
                    add_to_row(hook, port, row_of(model, port, dest), change)

        after = all_written(model, inputs, read_more)
        differences = {
            src: (after[src] - before[src]).abs().amax((0, -1))
            for src in model.srcs
            if src.layer == dest.layer + (not model.is_factorized)
        }
        changed[dest] = {
            (src.name, at)
            for src, sizes in differences.items()
            for at in range(seq_len)
            if sizes[at] > 1e-6
        }
    return changed


def all_written(
    model: PatchableModel, inputs: Tensor, change: Callable[[AddHook], None]
) -> dict[SrcNode, Tensor]:
    """What every source writes, where `change` has put in hooks."""
    outs: dict[str, Tensor] = {}
    with hooks(model) as hook:
        change(hook)
        for name in {src.module_name: None for src in model.srcs}:
            site = model.adapter.src_site(model.wrapped_model, name)
            hook(site.module, lambda out, name=name: outs.update({name: out.clone()}))
        model.wrapped_model(inputs)
    return {src: part_of(model, src, outs[src.module_name]) for src in model.srcs}


def row_of(model: PatchableModel, port: Port, dest: DestNode) -> int:
    before = port.dest_modules[: port.dest_modules.index(dest.module_name)]
    n_before = sum(other.module_name in before for other in model.dests)
    return n_before + (dest.head_idx or 0)


def add_to_row(hook: AddHook, port: Port, row: int, change: Tensor) -> None:
    if port.heads is not None:
        add_to_heads(hook, port.heads, port.module, row, change)
        return

    def add(out: Tensor) -> Tensor:
        if out.ndim == change.ndim:
            return out + change
        out = out.clone()
        for head in range(out.shape[2]):
            if (port.mask_rows[head] if port.mask_rows else head) == row:
                out[:, :, head] += change
        return out

    hook(port.module, add)


def add_to_heads(
    hook: AddHook, heads: HeadInputs, residual: Module, row: int, change: Tensor
) -> None:
    """Compute the linear maps that read the row once more, and take that head's part."""
    read: list[Tensor] = []
    hook(residual, lambda out: read.append(out.clone()))
    for (linear, n_heads), rows in zip(heads.linears, heads.rows(), strict=True):
        if row not in range(rows.start, rows.stop):
            continue

        def other_part(
            out: Tensor, linear: Module = linear, n: int = n_heads, head: int = 0
        ) -> Tensor:
            inputs = read[0] + change
            normed = inputs if heads.norm is None else heads.norm.forward(inputs)
            other = linear.forward(normed).unflatten(-1, (n, -1))
            out = out.clone()
            out.unflatten(-1, (n, -1))[..., head, :] = other[..., head, :]
            return out

        head = row - rows.start
        hook(linear, lambda out, part=other_part, head=head: part(out, head=head))
