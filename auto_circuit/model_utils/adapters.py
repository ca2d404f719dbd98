"""The model families that the engine knows."""

from __future__ import annotations

from torch.nn import Module

from auto_circuit.errors import ModelError
from auto_circuit.model_utils.features.spliced import SPLICED_TRANSFORMER_ADAPTER
from auto_circuit.model_utils.micro_model_utils import MICRO_MODEL_ADAPTER
from auto_circuit.model_utils.model_adapter import ModelAdapter
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
    AUTOENCODER_TRANSFORMER_ADAPTER,
)
from auto_circuit.model_utils.transformer_lens_utils import TRANSFORMER_BRIDGE_ADAPTER

ADAPTERS: tuple[ModelAdapter, ...] = (
    MICRO_MODEL_ADAPTER,
    TRANSFORMER_BRIDGE_ADAPTER,
    AUTOENCODER_TRANSFORMER_ADAPTER,
    SPLICED_TRANSFORMER_ADAPTER,
)


def find_adapter(model: Module) -> ModelAdapter:
    """The adapter of a model's family. Raises ModelError for an unknown one."""
    for adapter in ADAPTERS:
        if adapter.handles(model):
            return adapter
    known = ", ".join(adapter.name for adapter in ADAPTERS)
    raise ModelError(
        f"A {type(model).__name__} cannot be patched: its architecture is not known. "
        f"Known: {known}. Load a Hugging Face model with "
        "`auto_circuit.experiment_utils.load_tl_model` (or `TransformerBridge`), or pass "
        "`patchable_model(..., adapter=ModelAdapter(...))` for a model of your own."
    )
