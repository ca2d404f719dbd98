"""What the engine must know about a model family, as data.

An adapter says which modules of a model are its source and destination nodes. To support
a new architecture, write one of these in a file of its own and either add it to
`adapters.ADAPTERS` or pass it to `patchable_model(..., adapter=...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module

from auto_circuit.types import DestNode, SrcNode

GraphNodes = tuple[list[SrcNode], list[DestNode]]


@dataclass(frozen=True)
class Port:
    """One module through which the patches of a destination module enter the model.

    `module_name` names a module whose output is what the destination reads. A module
    whose output has a head dimension reads, in its head `h`, row `mask_rows[h]` of the
    mask; `mask_rows` None means row `h` (or the only row). `additive`: the module's
    output is not the residual stream itself but something that is added to it, so the
    patch is added there and reaches the residual stream.
    """

    module_name: str
    mask_rows: tuple[int, ...] | None = None
    additive: bool = False


@dataclass(frozen=True)
class ModelAdapter:
    """One model family.

    handles: is this a model of the family?
    graph_nodes: (model, factorized, separate_qkv) -> its sources and destinations, each
        in the order in which they run; source `i` has `src_idx` i.
    ports: (model, destination module name, separate_qkv) -> where its patches enter.
    find_module: (model, module name) -> the module whose forward hook sees the node.
    open_sites: (model, separate_qkv) -> a context in which every such module fires; it
        restores the model's switches on exit.
    probe_input: model -> a small input to check the graph with.
    find_unembed: model -> the module that turns the final residual stream into outputs,
        position by position, if there is one: outputs that nobody asks for are not
        computed.
    is_transformer: do its nodes need `separate_qkv`, and may it have a KV cache?
    """

    name: str
    handles: Callable[[Module], bool]
    graph_nodes: Callable[[Module, bool, bool | None], GraphNodes]
    ports: Callable[[Module, str, bool | None], tuple[Port, ...]]
    find_module: Callable[[Module, str], Module]
    open_sites: Callable[[Module, bool | None], AbstractContextManager[None]]
    probe_input: Callable[[Module], Tensor]
    find_unembed: Callable[[Module], Module | None]
    is_transformer: bool
