"""Names of auto-circuit that users import from where they are not defined.

A module of auto-circuit could also give every name that it imported itself, and notebooks
use that: `from auto_circuit.prune import src_ablations`. Ours give these names too, and
import what defines them when they are asked for, so that no module depends on another for
this alone. `auto_circuit.experiments`, the command line, gives what its parts define.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

PUBLISHED: dict[str, tuple[str, ...]] = {
    "data": ("PromptDataLoader",),
    "metrics.area_under_curve_plot": ("average_auc_plot",),
    "metrics.prune_metrics.answer_diff": ("measure_answer_diff",),
    "metrics.prune_metrics.answer_diff_percent": ("measure_answer_diff_percent",),
    "metrics.prune_metrics.answer_value": ("measure_answer_val",),
    "metrics.prune_metrics.correct_answer_percent": ("measure_correct_ans_percent",),
    "metrics.prune_metrics.kl_div": ("measure_kl_div",),
    "metrics.prune_metrics.prune_metrics": ("PRUNE_METRIC_DICT",),
    "metrics.prune_metrics.prune_metrics_plot": ("edge_patching_plot",),
    "model_utils.micro_model_utils": ("MicroModel",),
    "model_utils.sparse_autoencoders.autoencoder_transformer": (
        "AutoencoderTransformer",
        "sae_model",
    ),
    "model_utils.tracr_model_utils": (
        "TRACR_TASK_KEY",
        "get_tracr_model",
    ),
    "named_experiments": (
        "EXPERIMENTS",
        "NUMBERS",
        "ROBUSTNESS",
        "TRACR_REVERSE",
        "TRACR_XPROPORTION",
    ),
    "prune": ("run_circuits",),
    "prune_algos.ACDC": ("acdc_prune_scores",),
    "prune_algos.activation_magnitude": ("activation_magnitude_prune_scores",),
    "prune_algos.circuit_probing": ("circuit_probing_prune_scores",),
    "prune_algos.edge_attribution_patching": ("edge_attribution_patching_prune_scores",),
    "prune_algos.ground_truth": ("ground_truth_prune_scores",),
    "prune_algos.mask_gradient": (
        "INTEGRATED_EDGE_GRADS_PRUNE_ALGO",
        "LOGIT_EXP_GRAD_PRUNE_ALGO",
        "PROB_GRAD_PRUNE_ALGO",
        "mask_gradient_prune_scores",
    ),
    "prune_algos.prune_algo": ("PruneAlgo",),
    "prune_algos.prune_algos": ("PRUNE_ALGO_DICT",),
    "prune_algos.random_edges": (
        "RANDOM_PRUNE_ALGO",
        "random_prune_scores",
    ),
    "prune_algos.subnetwork_probing": (
        "SP_FAITHFULNESS_TARGET",
        "init_mask_val",
        "subnetwork_probing_prune_scores",
    ),
    "reports": (
        "print_robustness",
        "print_summary",
        "write_results",
    ),
    "runner": (
        "run_experiment",
        "run_robustness",
    ),
    "summary": (
        "ExperimentResults",
        "mean_measurements",
        "summarize",
    ),
    "sweep": (
        "SHARE",
        "TaskRun",
    ),
    "sweep_config": (
        "ExperimentConfig",
        "check_config",
    ),
    "tasks": (
        "TASK_DICT",
        "Task",
    ),
    "types": (
        "AblationType",
        "AlgoMeasurements",
        "AlgoPruneScores",
        "BatchKey",
        "COLOR_PALETTE",
        "CircuitOutputs",
        "DestNode",
        "Edge",
        "EdgeCounts",
        "Measurements",
        "Node",
        "PatchWrapper",
        "PruneScores",
        "SrcNode",
        "TestEdges",
    ),
    "utils.ablation_activations": (
        "batch_src_ablations",
        "src_ablations",
    ),
    "utils.custom_tqdm": ("tqdm",),
    "utils.edge_counts": ("edge_counts_util",),
    "utils.graph_utils": (
        "patch_mode",
        "set_all_masks",
    ),
    "utils.misc": (
        "module_by_name",
        "remove_hooks",
        "repo_path_to_abs_path",
        "set_module_by_name",
    ),
    "utils.patchable_model": ("PatchableModel",),
    "utils.tensor_ops": (
        "batch_answer_diff_percents",
        "batch_avg_answer_diff",
        "batch_avg_answer_val",
        "correct_answer_greater_than_incorrect_proportion",
        "correct_answer_proportion",
        "desc_prune_scores",
        "multibatch_kl_div",
        "prune_scores_threshold",
        "sample_hard_concrete",
    ),
    "visualize": ("draw_seq_graph",),
}
"""Module, below `auto_circuit` -> names that it defines."""
_HOMES = {name: home for home, names in PUBLISHED.items() for name in names}


def published_name(name: str) -> Any:
    """A module's `__getattr__`: what it does not have itself, but once had."""
    if name not in _HOMES:
        raise AttributeError(f"this module of auto_circuit has no attribute {name!r}")
    return getattr(import_module(f"auto_circuit.{_HOMES[name]}"), name)
