"""A model small enough to follow by hand, for examples and tests.

Two blocks of two "heads" on a residual stream of two dimensions. A head multiplies its
input by a fixed weight, so block(x) = [4, 6] * x and each layer maps x to [5, 7] * x.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch as t
from einops import repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn import Identity, Module, ModuleList, Parameter

from auto_circuit.model_utils.model_adapter import GraphNodes, ModelAdapter, Port, SrcSite
from auto_circuit.types import Component, DestNode, SrcNode

N_HEADS = 2
EMBED, UNEMBED = Component("embed", positions="own"), Component("unembed")


class Block(Module):
    """Two heads that read the same input; their outputs are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = Parameter(t.tensor([[1.0, 2.0], [3.0, 4.0]]))
        self.head_inputs = Identity()
        self.head_outputs = Identity()

    def forward(
        self, x: Float[Tensor, "batch seq resid"]
    ) -> Float[Tensor, "batch seq resid"]:
        """The sum of the heads' outputs."""
        x_heads = self.head_inputs(repeat(x, "b s r -> b s h r", h=N_HEADS))
        return self.head_outputs(x_heads * self.weights).sum(dim=2)


class MicroModel(Module):
    """Blocks on a residual stream, without embedding, attention or non-linearity."""

    def __init__(self, n_layers: int = 2) -> None:
        super().__init__()
        self.input = Identity()
        self.blocks = ModuleList([Block() for _ in range(n_layers)])
        self.resids = ModuleList([Identity() for _ in range(n_layers)])
        self.output = Identity()

    def forward(
        self, x: Float[Tensor, "batch seq resid"]
    ) -> Float[Tensor, "batch seq resid"]:
        """The residual stream after the last block."""
        x = self.input(x)
        for block, resid in zip(self.blocks, self.resids, strict=True):
            x = resid(x + block(x))
        return self.output(x)


def _heads(layer: int) -> Component:
    return Component("heads", layer, "own")


def _start() -> SrcNode:
    return SrcNode("Resid Start", "input", layer=0, src_idx=0, component=EMBED)


def factorized_src_nodes(model: MicroModel) -> list[SrcNode]:
    """Start and every head."""
    return [_start()] + [
        SrcNode(
            name=f"B{layer}.{head}",
            module_name=f"blocks.{layer}.head_outputs",
            layer=layer + 1,
            head_idx=head,
            head_dim=2,
            src_idx=1 + layer * N_HEADS + head,
            component=_heads(layer),
            heads=(head,),
        )
        for layer in range(len(model.blocks))
        for head in range(N_HEADS)
    ]


def factorized_dest_nodes(model: MicroModel) -> list[DestNode]:
    """Every head and the end."""
    n_layers = len(model.blocks)
    heads = [
        DestNode(
            name=f"B{layer}.{head}",
            module_name=f"blocks.{layer}.head_inputs",
            layer=layer + 1,
            head_idx=head,
            head_dim=2,
            component=_heads(layer),
            heads=(head,),
        )
        for layer in range(n_layers)
        for head in range(N_HEADS)
    ]
    return heads + [DestNode("Resid End", "output", n_layers + 1, component=UNEMBED)]


def simple_graph_nodes(model: MicroModel) -> GraphNodes:
    """The unfactorized graph: heads feed the residual stream after their own block."""
    n_layers = len(model.blocks)
    srcs = [_start()]
    dests: list[DestNode] = []
    for layer in range(n_layers):
        min_src_idx = len(srcs) - 1
        srcs += [
            SrcNode(
                name=f"B{layer}.{head}",
                module_name=f"blocks.{layer}.head_outputs",
                layer=2 * layer,
                head_idx=head,
                head_dim=2,
                src_idx=min_src_idx + 1 + head,
                component=_heads(layer),
                heads=(head,),
            )
            for head in range(N_HEADS)
        ]
        is_last = layer == n_layers - 1
        name = "Resid End" if is_last else f"Resid Post {layer}"
        module_name = "output" if is_last else f"resids.{layer}"
        stream = Component("residual post", layer, "own")
        dests.append(
            DestNode(
                name=name,
                module_name=module_name,
                layer=2 * layer + 1,
                min_src_idx=min_src_idx,
                component=UNEMBED if is_last else stream,
            )
        )
        if not is_last:
            srcs.append(
                SrcNode(
                    name=name,
                    module_name=module_name,
                    layer=2 * layer + 2,
                    src_idx=len(srcs),
                    component=stream,
                )
            )
    return srcs, dests


def _graph_nodes(
    model: Module, factorized: bool, separate_qkv: bool | None
) -> GraphNodes:
    assert isinstance(model, MicroModel)
    if factorized:
        return factorized_src_nodes(model), factorized_dest_nodes(model)
    return simple_graph_nodes(model)


MICRO_MODEL_ADAPTER = ModelAdapter(
    name="MicroModel",
    about="Models of a few numbers, for tests and for checking things by hand.",
    tried=("MicroModel",),
    handles=lambda model: isinstance(model, MicroModel),
    graph_nodes=_graph_nodes,
    src_site=lambda model, module_name: SrcSite(model.get_submodule(module_name)),
    ports=lambda model, module_names, separate_qkv: tuple(
        Port((name,), model.get_submodule(name)) for name in module_names
    ),
    open_sites=lambda model, separate_qkv: nullcontext(),
    probe_input=lambda model: t.arange(12.0).reshape(2, 3, 2) - 4.0,
    find_unembed=lambda model: None,
    blocks=lambda model: (),
    is_transformer=False,
    example=MicroModel,
)
