"""The micro model and its prompts, small enough to follow by hand."""

from __future__ import annotations

import torch as t

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.model_utils.micro_model_utils import MicroModel
from auto_circuit.types import OutputSlice
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel

CLEAN = t.tensor([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])


def micro_model(
    factorized: bool = True,
    slice_output: OutputSlice = "last_seq",
    seq_len: int | None = None,
) -> PatchableModel:
    return patchable_model(MicroModel(), factorized, slice_output, seq_len)


def micro_loader(
    scales: list[float] | None = None, batch_size: int = 1
) -> PromptDataLoader:
    """A prompt for each scale: clean is `scale * CLEAN`, corrupt is minus that."""
    scales = scales or [1.0]
    clean = [scale * CLEAN for scale in scales]
    answers = [t.tensor([1])] * len(scales)
    wrong = [t.tensor([0])] * len(scales)
    dataset = PromptDataset(clean, [-row for row in clean], answers, wrong)
    return PromptDataLoader(dataset, None, 0, batch_size=batch_size)
