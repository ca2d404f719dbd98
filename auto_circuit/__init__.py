"""AutoCircuit: find and test circuits in transformers by edge patching.

    import auto_circuit as ac

    task = ac.find_task("Pocket IOI")
    scores = ac.find_prune_algo("EAP").func(task.model, task.train_loader, None)

The names that one needs most, from their homes. Each is imported when it is first used:
importing the package is quick, and does no work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_circuit.circuit_files import load_circuit as load_circuit
    from auto_circuit.circuit_files import save_circuit as save_circuit
    from auto_circuit.data import load_datasets_from_json as load_datasets_from_json
    from auto_circuit.experiment_utils import load_tl_model as load_tl_model
    from auto_circuit.explorer.explore import explore as explore
    from auto_circuit.loaded_results import load_results as load_results
    from auto_circuit.metrics.prune_metrics.measure_prune_metrics import (
        measure_prune_metrics as measure_prune_metrics,
    )
    from auto_circuit.metrics.prune_metrics.measure_prune_metrics import (
        measurement_figs as measurement_figs,
    )
    from auto_circuit.metrics.prune_metrics.prune_metrics import (
        PruneMetric as PruneMetric,
    )
    from auto_circuit.metrics.prune_metrics.prune_metrics import (
        find_metric as find_metric,
    )
    from auto_circuit.prune import run_circuits as run_circuits
    from auto_circuit.prune_algos.prune_algos import PruneAlgo as PruneAlgo
    from auto_circuit.prune_algos.prune_algos import find_prune_algo as find_prune_algo
    from auto_circuit.prune_algos.prune_algos import run_prune_algos as run_prune_algos
    from auto_circuit.runner import run_experiment as run_experiment
    from auto_circuit.sweep_config import ExperimentConfig as ExperimentConfig
    from auto_circuit.tasks import Task as Task
    from auto_circuit.tasks import find_task as find_task
    from auto_circuit.tasks import task_of_prompts as task_of_prompts
    from auto_circuit.types import AblationType as AblationType
    from auto_circuit.types import PatchType as PatchType
    from auto_circuit.utils.ablation_activations import src_ablations as src_ablations
    from auto_circuit.utils.graph_utils import patch_mode as patch_mode
    from auto_circuit.utils.graph_utils import patchable_model as patchable_model
    from auto_circuit.visualize import draw_seq_graph as draw_seq_graph

__version__ = "2.0.0.dev0"

_HOMES = {
    "circuit_files": ("load_circuit", "save_circuit"),
    "data": ("load_datasets_from_json",),
    "experiment_utils": ("load_tl_model",),
    "explorer.explore": ("explore",),
    "loaded_results": ("load_results",),
    "metrics.prune_metrics.measure_prune_metrics": (
        "measure_prune_metrics",
        "measurement_figs",
    ),
    "metrics.prune_metrics.prune_metrics": ("PruneMetric", "find_metric"),
    "prune": ("run_circuits",),
    "prune_algos.prune_algos": ("PruneAlgo", "find_prune_algo", "run_prune_algos"),
    "runner": ("run_experiment",),
    "sweep_config": ("ExperimentConfig",),
    "tasks": ("Task", "find_task", "task_of_prompts"),
    "types": ("AblationType", "PatchType"),
    "utils.ablation_activations": ("src_ablations",),
    "utils.graph_utils": ("patch_mode", "patchable_model"),
    "visualize": ("draw_seq_graph",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
