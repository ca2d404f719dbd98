"""What a run of the MIB benchmark is: a frozen configuration (`mib` runs it)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from auto_circuit.checks import checked
from auto_circuit.mib_prompts import Split, find_mib_task
from auto_circuit.result_names import NamesResults

MIB_MODELS = {
    "gpt2": "gpt2",
    "qwen2.5": "Qwen/Qwen2.5-0.5B",
    "gemma2": "google/gemma-2-2b",
    "llama3": "meta-llama/Llama-3.1-8B",
}
"""The benchmark's names of its models -> names on the Hugging Face hub."""

OTHER_NAMES = {"gpt2-small": "gpt2", "openai-community/gpt2": "gpt2"}
"""Other names of the same models -> the benchmark's."""

Dtype = Literal["float32", "float64", "bfloat16", "float16"]


@checked
@dataclass(frozen=True)
class MibConfig(NamesResults):
    """One run of the benchmark: a model, a task, and the algorithms that are compared."""

    model: str = "gpt2"
    """A hub name, a local folder, or one of the benchmark's: gpt2, qwen2.5, gemma2, llama3."""
    task: str = "ioi"
    """ioi, mcqa, arithmetic (arithmetic_addition), arithmetic_subtraction, arc (arc_easy) or
    arc_challenge."""
    algos: tuple[str, ...] = ("Random", "EAP", "EAP-IG inputs")
    """Names of prune algorithms (see auto_circuit/prune_algos/prune_algos.py)."""
    data: Path | None = None
    """The folder with the files of the task's data set; None: the Hugging Face hub."""
    split: Split = "validation"
    """On which prompts circuits are measured; they are found on those of train."""
    counterfactual: str | None = None
    """The field of the prompts that are patched from; None: the benchmark's."""
    n_train: int | None = None
    """On how many prompts circuits are found; None: as the benchmark does (1000 for ioi, all
    for mcqa, 100 for the others)."""
    n_test: int | None = None
    """On how many prompts circuits are measured; None: on all."""
    batch_size: int = 20
    """How many prompts are run at once."""
    dtype: Dtype = "float32"
    """The type of the weights. The benchmark's own runs have bfloat16 for all but gpt2."""
    file_format: Literal["json", "pt"] = "json"
    """The format of the submission's files."""
    seed: int = 42
    """All that algorithms draw at random."""
    device: str | None = None
    """Where models run, for example "cuda"; None: a GPU if there is one."""
    out: Path = Path("results")
    """The folder that holds the result folders."""

    @property
    def cell(self) -> str:
        """The benchmark's name of task and model: "arithmetic-addition_llama3"."""
        return f"{find_mib_task(self.task).name.replace('_', '-')}_{self.model_name}"

    @property
    def model_name(self) -> str:
        """The benchmark's name of the model; of another model, the last part of its name."""
        if self.model in MIB_MODELS:
            return self.model
        names = {hub_name: name for name, hub_name in MIB_MODELS.items()} | OTHER_NAMES
        path = Path(self.model)
        return names.get(self.model) or path.name or path.resolve().name

    @property
    def folder(self) -> Path:
        """Where the results are: the same folder for the same configuration."""
        return self.out / f"mib-{self.cell}-{self.digest}"

    @property
    def store(self) -> str:
        """Where all cells are, those of other experiments with the same `out` among them."""
        return str(self.out / "cells")
