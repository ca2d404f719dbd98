"""Sources that are a function of what their site shows, against autograd by hand.

The model is a residual stream with two layers of two heads. A layer's module gives the
heads' values; what a head writes is normed by the sum of both, so that it depends on the
other head's values too. `by_hand` computes the same model, and the patched one, in plain
torch from the formula of an edge, and autograd differentiates it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch as t
from torch import Tensor
from torch.nn import Identity, Linear, Module, Parameter

from auto_circuit.engine.edge_matrices import SrcPort
from auto_circuit.engine.patch_wrapper import PatchWrapperImpl
from auto_circuit.errors import GraphError
from auto_circuit.model_utils.model_adapter import ModelAdapter, Port, SrcSite
from auto_circuit.types import Component, DestNode, SrcNode
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, train_mask_mode
from auto_circuit.utils.patchable_model import PatchableModel

D_MODEL, N_LAYERS, N_HEADS, D_HEAD = 5, 2, 2, 3
N_SRCS = 1 + N_LAYERS * N_HEADS
N_READ = [1, 3, 5]
"""How many sources the two layers and the end read."""


class NormedLayer(Module):
    """x + sum over heads of f(W tanh(x)), where f norms by the sum of what heads write."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.values = Identity(), Linear(D_MODEL, N_HEADS * D_HEAD)
        self.writing = Parameter(t.zeros(N_HEADS, D_HEAD, D_MODEL))

    def written(self, values: Tensor) -> Tensor:
        """[batch seq head d_model]"""
        values = values.unflatten(-1, (N_HEADS, D_HEAD))
        heads = t.einsum("bshe,hed->bshd", values, self.writing)
        return heads / heads.sum(2, keepdim=True).square().mean(-1, keepdim=True).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.written(self.values(self.reads(x).tanh())).sum(2)


class NormedModel(Module):
    """The layers, between the modules that show the start and the end."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.end = Identity(), Identity()
        self.layers = t.nn.ModuleList(NormedLayer() for _ in range(N_LAYERS))
        generator = t.Generator().manual_seed(0)
        for weight in self.parameters():
            weight.data = t.randn(weight.shape, generator=generator, dtype=t.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for layer in self.layers:
            x = layer(x)
        return self.end(x)


def graph_nodes(*_: Any) -> tuple[list[SrcNode], list[DestNode]]:
    names = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
    srcs = [SrcNode("Start", "start", 0, src_idx=0, component=Component("embed"))]
    srcs += [
        SrcNode(
            f"A{layer}.{head}",
            f"layers.{layer}.values",
            layer + 1,
            head_idx=head,
            head_dim=2,
            src_idx=1 + N_HEADS * layer + head,
            component=Component("heads", layer, "own"),
        )
        for layer, head in names
    ]
    dests = [
        DestNode(
            f"A{layer}",
            f"layers.{layer}.reads",
            layer + 1,
            component=Component("heads", layer, "own"),
        )
        for layer in range(N_LAYERS)
    ]
    end = DestNode("End", "end", N_LAYERS + 1, component=Component("unembed"))
    return srcs, [*dests, end]


def src_site(model: Module, name: str) -> SrcSite:
    module: Any = model.get_submodule(name)
    if name == "start":
        return SrcSite(module)
    layer: Any = model.get_submodule(name.rpartition(".")[0])
    return SrcSite(module, transform=layer.written)


ADAPTER = ModelAdapter(
    name="normed",
    handles=lambda model: isinstance(model, NormedModel),
    graph_nodes=graph_nodes,
    src_site=src_site,
    ports=lambda model, names, separate_qkv: tuple(
        Port((name,), model.get_submodule(name)) for name in names
    ),
    open_sites=lambda model, separate_qkv: nullcontext(),
    probe_input=lambda model: CLEAN,
    find_unembed=lambda model: None,
    blocks=lambda model: (),
    is_transformer=False,
)
CLEAN, CORRUPT = t.randn(2, 2, 3, D_MODEL, dtype=t.float64).unbind()


@pytest.fixture(scope="module")
def model() -> PatchableModel:
    return patchable_model(NormedModel(), True, adapter=ADAPTER)


def by_hand(
    model: NormedModel, x: Tensor, masks: list[Tensor], patch: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(the output, what all sources write), from the formula of an edge."""
    written, reads = [x], x
    for layer, mask in zip([*model.layers, None], masks, strict=True):
        reads = t.stack(written).sum(0)
        if patch is not None:
            for i, out in enumerate(written):
                reads = reads + mask[i] * (patch[i] - out)
        if layer is not None:
            written += layer.written(layer.values(reads.tanh())).unbind(2)  # type: ignore[operator]
    return reads, t.stack(written)


def masks_of(value: float | None) -> list[Tensor]:
    generator = t.Generator().manual_seed(1)
    random = [t.rand(n, generator=generator, dtype=t.float64) for n in N_READ]
    return random if value is None else [t.full_like(mask, value) for mask in random]


def test_what_sources_write_is_the_function_of_their_site(model: PatchableModel) -> None:
    inner: Any = model.wrapped_model
    output, written = by_hand(inner, CORRUPT, masks_of(0.0), None)
    t.testing.assert_close(inner(CORRUPT), output)
    found = src_ablations(model, CORRUPT)
    t.testing.assert_close(found, written.detach())


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, None])
def test_patched_output_and_gradients_are_autograds(
    model: PatchableModel, value: float | None
) -> None:
    inner: Any = model.wrapped_model
    patch = src_ablations(model, CORRUPT)
    masks = [mask.requires_grad_() for mask in masks_of(value)]
    expected, _ = by_hand(inner, CLEAN, masks, patch)
    loss = expected.cos().sum()
    expected_grads = t.autograd.grad(loss, masks)
    with train_mask_mode(model) as own, patch_mode(model, patch):
        for parameter, mask in zip(own.values(), masks, strict=True):
            parameter.data.copy_(mask.detach())
        output = model(CLEAN)
        t.testing.assert_close(output, expected)
        grads = t.autograd.grad(output.cos().sum(), list(own.values()))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        # If all edges are patched, nothing of what earlier layers read reaches the end.
        is_read = value != 1.0 or len(expected_grad) == N_SRCS
        assert bool((expected_grad.abs() > 1e-4).any()) == is_read
        t.testing.assert_close(grad, expected_grad.to(grad.dtype))


def test_all_patched_is_the_corrupt_run(model: PatchableModel) -> None:
    patch = src_ablations(model, CORRUPT)
    with t.no_grad():
        expected = [model.wrapped_model(inputs) for inputs in (CLEAN, CORRUPT)]
        for edges, output in zip(([], model.edges), expected, strict=True):
            with patch_mode(model, patch, edges):
                t.testing.assert_close(model(CLEAN), output)


def test_one_source_of_a_module_without_heads() -> None:
    wrapper = PatchWrapperImpl("w", None, is_src=True, src_idxs=slice(3, 4))
    port = SrcPort(wrapper, SrcSite(Identity(), transform=lambda out: 3 * out.square()))
    out = t.tensor([[[1.0, 2.0]]])
    assert port.outputs(out).tolist() == [[[[3.0, 12.0]]]]
    grad = port.grad_of_out(out, t.ones(1, 1, 2))
    assert grad.tolist() == [[[6.0, 12.0]]]


def test_backward_hooks_where_a_function_of_the_output_is_written(
    model: PatchableModel,
) -> None:
    """They would not see the gradients that destinations send back."""
    layer: Any = model.wrapped_model.get_submodule("layers.0.values")
    patch = src_ablations(model, CORRUPT)
    handle = layer.register_full_backward_hook(lambda *args: None)
    try:
        with train_mask_mode(model), patch_mode(model, patch):
            with pytest.raises(GraphError, match=r"layers\.0\.values"):
                model(CLEAN)
    finally:
        handle.remove()
