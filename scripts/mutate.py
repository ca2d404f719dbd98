"""Do the fast tests notice single-line faults? Put in a hundred, one at a time.

    python scripts/mutate.py                    # all of them
    python scripts/mutate.py --only 'acdc|kl_div'   # those whose file or name matches
    python scripts/mutate.py --list

The faults are put into a copy of the repository in a temporary folder; nothing is changed
here. Each runs in a process that is forked from one in which torch and TransformerLens are
loaded, and stops at the first test that fails, which must pass without the fault. Exit
status 1: a fault was not caught, or a test fails without any, or a fault's line is not in the
source any more (correct the table then).
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

os.environ["HF_HUB_OFFLINE"] = "1"
REPO = Path(__file__).resolve().parents[1]
COPIED = ("auto_circuit", "datasets", "tests", "pyproject.toml", "experiments.py")
LOADED_BEFORE = (
    *("torch", "torch._dynamo", "transformer_lens.model_bridge", "jaxtyping", "beartype"),
    *("pandas", "plotly.graph_objects", "plotly.io", "hypothesis", "pytest", "tyro"),
    *(
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
    ),
    *("transformers.models.gpt_neox.modeling_gpt_neox", "transformers.generation"),
)
SECONDS = 600
"""A test that takes longer hangs."""


@dataclass(frozen=True)
class Fault:
    """One line that a mistake could have made.

    name: what is wrong then. file: below auto_circuit/. old: a text that is there once.
    new: the text in its place. tests: the fast tests that should fail (below tests/).
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


LAWS = "test_laws.py"
EDGES = f"{LAWS}::test_each_single_edge_is_an_independent_path_patch"
ENDS = f"{LAWS}::test_no_mask_is_clean_and_all_masks_are_corrupt"
GRADIENTS = f"{LAWS}::test_mask_gradients_are_finite_differences"
SPARSE = f"{LAWS}::test_sparse_and_dense_computations_agree"
STATE = f"{LAWS}::test_state_is_restored_also_after_an_error"
EXAMPLES = f"{LAWS}::test_masks_of_each_example_are_as_if_it_was_alone"
SESSION = "utils/test_patch_session.py"
HALF = "test_half_precision.py"
CALLERS = "test_engine_callers.py"
ACDC = "prune_algos/test_one_by_one.py"
TRAINING = "prune_algos/test_mask_training.py"
EAP = "prune_algos/test_mask_gradient.py"
SWITCHES = "model_utils/test_transformer_lens_sites.py"
EAP_IG = "prune_algos/test_integrated_gradients.py"
METRICS = "metrics/prune_metrics/test_prune_metrics.py"
MICRO = "metrics/prune_metrics/test_micro_model.py"
AREA = "metrics/test_area_under_curve.py"
OPS = "utils/test_tensor_ops.py"
CIRCUITS = "test_prune.py"
DATA = "test_data.py"

# file -> its tests, for faults that name none.
TESTS = MappingProxyType(
    {
        "utils/tensor_ops.py": (OPS,),
        "utils/edge_counts.py": ("utils/test_edge_counts.py",),
        "utils/ablation_activations.py": (CIRCUITS, DATA),
        "utils/backward_modifiers.py": ("utils/test_backward_modifiers.py",),
        "prune.py": (CIRCUITS,),
        "prune_algos/ACDC.py": (ACDC,),
        "prune_algos/one_by_one.py": (ACDC,),
        "prune_algos/exact_edge_patching.py": (ACDC,),
        "prune_algos/mask_gradient.py": (EAP,),
        "prune_algos/integration_path.py": (EAP, EAP_IG),
        "prune_algos/integrated_gradients.py": (EAP_IG,),
        "prune_algos/objectives.py": (EAP, TRAINING),
        "prune_algos/mask_training.py": (TRAINING,),
        "prune_algos/subnetwork_probing.py": (TRAINING,),
        "prune_algos/circuit_probing.py": (TRAINING,),
        "prune_algos/edge_pruning.py": (TRAINING,),
        "prune_algos/matryoshka.py": (TRAINING,),
        "prune_algos/head_importance.py": ("prune_algos/test_head_importance.py",),
        "prune_algos/activation_magnitude.py": (
            "prune_algos/test_activation_magnitude.py",
        ),
        "prune_algos/score_ensembles.py": ("prune_algos/test_score_ensembles.py",),
        "prune_algos/prompt_scores.py": ("prune_algos/test_prompt_scores.py",),
        "prune_algos/random_edges.py": ("prune_algos/test_conformance.py",),
        "metrics/prune_metrics/kl_div.py": (METRICS,),
        "metrics/prune_metrics/answer_diff_percent.py": (METRICS,),
        "metrics/prune_metrics/correct_answer_percent.py": (METRICS,),
        "metrics/prune_metrics/mean_squared_error.py": (METRICS,),
        "metrics/prune_metrics/prompt_stats.py": (METRICS,),
        "metrics/prune_metrics/full_model_outs.py": (METRICS,),
        "metrics/area_under_curve.py": (AREA,),
        "metrics/faithfulness.py": ("metrics/test_faithfulness.py",),
        "metrics/minimality.py": ("metrics/test_minimality.py",),
        "metrics/stability.py": ("metrics/test_stability.py",),
        "metrics/circuit_pruning.py": ("metrics/test_circuit_pruning.py",),
        "metrics/hypothesis_tests.py": ("metrics/test_hypothesis_tests.py",),
        "metrics/official_circuits/measure_roc.py": (
            "metrics/official_circuits/test_measure_roc.py",
        ),
        "metrics/official_circuits/circuits/ioi_official.py": (
            "metrics/official_circuits/test_official_circuits.py",
        ),
        "circuit_files.py": ("test_circuit_files.py",),
        "files.py": ("test_files.py",),
        "checks.py": ("test_checks.py",),
        "data.py": (DATA,),
        "tasks.py": ("test_tasks.py",),
    }
)


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    """A fault, with its file's tests if it names none."""
    return Fault(name, file, old, new, tests or TESTS[file])


FORWARD, HEADS = "utils/forward_pass.py", "utils/head_inputs.py"
PATCHES, WRAPPER = "utils/patch_session.py", "utils/patch_wrapper.py"
GRAPH, MODEL = "utils/graph_utils.py", "utils/patchable_model.py"
SITES = "model_utils/transformer_lens_sites.py"
PROBING, PRUNING = "prune_algos/subnetwork_probing.py", "prune_algos/edge_pruning.py"
TENSORS, ABLATIONS = "utils/tensor_ops.py", "utils/ablation_activations.py"
PERCENT = "metrics/prune_metrics/answer_diff_percent.py"
ROC, IOI = (
    "metrics/official_circuits/measure_roc.py",
    "metrics/official_circuits/circuits/ioi_official.py",
)

# fmt: off
ENGINE: tuple[Fault, ...] = (
    fault("differences have the wrong sign", PATCHES,
        "t.sub(patch, current, out=out)",
        "t.sub(current, patch, out=out)",
        EDGES),
    fault("fixed differences are subtracted from", PATCHES,
        "out.copy_(patch)",
        "t.sub(patch, current, out=out)",
        EAP_IG),
    fault("one source in a module's slot of another", PATCHES,
        "run.diff[:, :, run.slots[srcs.start + i]]",
        "run.diff[:, :, run.slots[srcs.stop - 1 - (i > 0)]]",
        EDGES, SPARSE),
    fault("patches of an earlier pass are still summed", PATCHES,
        "if version is None or version != self._patch_version:",
        "if version is None:",
        SESSION),
    fault("a remembered component despite a hook in it", PATCHES,
        "or any(m._forward_hooks or m._forward_pre_hooks for m in modules)",
        "or False",
        SESSION),
    fault("what hooks changed in place is remembered", PATCHES,
        "if not outs or [_version(out) for out in outs] != versions:",
        "if not outs:",
        SESSION),
    fault("the patched base without its constants", PATCHES,
        "return total + self.constants[port.name]",
        "return total",
        ENDS),
    fault("half precision sums of patches", PATCHES,
        "dtype = t.promote_types(self.patch.dtype, t.float32)",
        "dtype = self.patch.dtype",
        SESSION, "test_laws.py::test_other_float_types"),
    fault("masks are not copied for the backward pass", PATCHES,
        "return parts[0].clone()",
        "return parts[0]",
        SESSION),
    fault("layers before the first are kept from short passes", PATCHES,
        "        if self._first_layer == 0:\n"
        "            self._layer_outs",
        "        if True:\n"
        "            self._layer_outs",
        ACDC),
    fault("a pass from the middle starts one layer late", PATCHES,
        "self._first_layer = self._overwritten_from = layer",
        "self._first_layer = self._overwritten_from = layer + 1",
        ACDC),
    fault("weights on the patched base without minus 1", PATCHES,
        "weights = weights - 1",
        "weights = weights - 0",
        ENDS, SPARSE),
    fault("no edges chosen: patched instead of unpatched", PATCHES,
        "if _n_columns(unpatched, group) < _n_columns(patched, group):\n"
        "                    base = unpatched\n",
        "if _n_columns(unpatched, group) < _n_columns(patched, group):\n"
        "                    base = patched\n",
        ENDS, SPARSE),
    fault("masks' gradients are means over positions", FORWARD,
        "return by_token.sum(expanded, keepdim=True, dtype=weights.dtype)",
        "return by_token.mean(expanded, keepdim=True, dtype=weights.dtype)",
        f"{EAP}::test_eap_is_gradient_times_difference", GRADIENTS),
    fault("half precision sums of masks' gradients", FORWARD,
        "return by_token.sum(expanded, keepdim=True, dtype=weights.dtype)",
        "return by_token.sum(expanded, keepdim=True).to(weights.dtype)",
        HALF),
    fault("gradient sent back is added at the source", FORWARD,
        "return grad_out - sent_back.reshape(grad_out.shape), None, None",
        "return grad_out + sent_back.reshape(grad_out.shape), None, None",
        GRADIENTS),
    fault("gradient sent back is forgotten", FORWARD,
        "        if not run.has_grad:\n"
        "            return grad_out, None, None",
        "        if True:\n"
        "            return grad_out, None, None",
        GRADIENTS),
    fault("old gradients are not zeroed", FORWARD,
        "                grad.zero_()",
        "                pass",
        GRADIENTS, "test_laws.py::test_gradients_of_two_forward_passes_do_not_mix", SESSION),
    fault("x stays in the next source's slot", FORWARD,
        "with self._x_in_its_slot(block, x, keeps=self.holds_patches):",
        "with self._x_in_its_slot(block, x, keeps=False):",
        SESSION),
    fault("a second backward pass meets x in the slot", FORWARD,
        "with self._x_in_its_slot(block, x, keeps=True):",
        "with self._x_in_its_slot(block, x, keeps=False):",
        "model_utils/test_transformer_lens_sites.py", GRADIENTS),
    fault("a failed backward pass leaves its gradients", FORWARD,
        "self.backward_id, self.has_grad = backward_id, False",
        "self.backward_id = backward_id",
        SESSION),
    fault("only the first changed row is read", FORWARD,
        "lo = bisect_left(self.row_idxs, rows.start)",
        "lo = bisect_left(self.row_idxs, rows.start + 1)",
        EDGES),
    fault("masks of examples are read across positions", FORWARD,
        "return weights.expand(batch, seq, -1, -1).flatten(0, 1)",
        "return weights.expand(batch, seq, -1, -1).transpose(0, 1).flatten(0, 1)",
        EXAMPLES),
    fault("x has the weight 1 for the MLP's row too", FORWARD,
        "of_x[:, :, :n_head_rows] = 1.0",
        "of_x[:] = 1.0",
        EDGES, ENDS),
    fault("a folded norm is not centred", HEADS,
        "        inputs -= inputs.mean(-1, keepdim=True, dtype=exact)",
        "        pass",
        CALLERS),
    fault("the scale's own gradient is missing", HEADS,
        "factor[:, :n_heads] = -share * inverse_scale / x.shape[-1]",
        "factor[:, :n_heads] = 0 * share",
        GRADIENTS),
    fault("heads' gradients are not centred", HEADS,
        "rows -= rows.mean(-1, keepdim=True)",
        "pass",
        GRADIENTS),
    fault("a norm's bias does not reach queries", HEADS,
        "        return linear.bias  # type: ignore[no-any-return]\n"
        "    return linear_forward(linear, norm_bias)",
        "        return linear.bias  # type: ignore[no-any-return]\n"
        "    return linear.bias",
        GRADIENTS, SPARSE),
    fault("a key's gradient replaces the query's", HEADS,
        "beta=0 if is_first else 1",
        "beta=0",
        f"{EAP}::test_a_heads_score_is_the_sum_of_its_inputs_scores", GRADIENTS),
    fault("EAP keeps what the norm takes out", HEADS,
        "            products[:, : block.n_head_rows] -= t.bmm(\n",
        "            products[:, : block.n_head_rows] -= 0 * t.bmm(\n",
        EAP),
    fault("the norm's gain is left out", HEADS,
        "return [w * gain for w in weights] if isinstance(gain, Tensor) else weights",
        "return weights",
        GRADIENTS, EAP),
    fault("Gemma's norm weights without their 1", SITES,
        "weight = 1.0 + weight if bridge.uses_weight_offset else weight",
        "weight = weight",
        CALLERS),
    fault("the epsilon of norms is the default", SITES,
        "            return float(epsilon)",
        "            return 1e-5",
        "model_utils/test_transformer_lens_sites.py", LAWS),
    fault("query rows of shared keys in another order", SITES,
        "query_rows = tuple(head // group for head in range(model.cfg.n_heads))",
        "query_rows = tuple(head % n_kv for head in range(model.cfg.n_heads))",
        "model_utils/test_transformer_lens_sites.py", LAWS),
    fault("switches are not restored", SITES,
        "            _set_switches(model, before)",
        "            pass",
        STATE, "model_utils/test_adapters.py", SWITCHES),
    fault("masks are not restored", GRAPH,
        "            stack.enter_context(preserved_masks(model))",
        "            pass",
        STATE),
    fault("a changed weight is not noticed", GRAPH,
        "if model.weights is None or not model.weights.holds():",
        "if model.weights is None:",
        "test_laws.py::test_a_changed_weight_is_noticed"),
    fault("masks in the model's half precision", GRAPH,
        "dtype = mask_dtype(param.dtype)",
        "dtype = param.dtype",
        HALF),
    fault("an edge is patched at all positions", GRAPH,
        "edge.patch_mask(model).data[(..., *edge.patch_idx)] = 1.0",
        "edge.patch_mask(model).data[..., edge.patch_idx[-1]] = 1.0",
        EDGES),
    fault("sources of the same layer are read", GRAPH,
        "idxs = [src.src_idx for src in srcs if src.layer < dest.layer]",
        "idxs = [src.src_idx for src in srcs if src.layer <= dest.layer]",
        EDGES),
    fault("dropout does not rescale", WRAPPER,
        ".to(weights.dtype) / (1 - self.dropout_p)",
        ".to(weights.dtype)",
        "test_graph_utils.py", TRAINING),
    fault("dropout in eval mode too", WRAPPER,
        "if self.dropout_p > 0.0 and self.training:",
        "if self.dropout_p > 0.0:",
        "test_graph_utils.py", TRAINING),
    fault("masks of examples all become the last one's", WRAPPER,
        "self._replace_mask(self.mask.data[0])",
        "self._replace_mask(self.mask.data.mean(0))",
        "test_graph_utils.py", EXAMPLES),
    fault("the prefix's mask is of padding", MODEL,
        "mask.new_ones(tokens.shape[0], n_prefix)",
        "mask.new_zeros(tokens.shape[0], n_prefix)",
        "test_prefix_cache.py", DATA, "test_padding.py"),
    fault("edges take the value of another", MODEL,
        "of_module[edge.patch_idx] = score",
        "of_module[edge.patch_idx] = 1.0",
        "test_graph_utils.py"),
    fault("the unembedded position is the first", MODEL,
        "return (args[0][:, -1:].contiguous(), *args[1:])",
        "return (args[0][:, :1].contiguous(), *args[1:])",
        CIRCUITS),
    fault("GIM without the temperature's factor", "utils/backward_modifiers.py",
        "return _with_gradient_of(pattern, 0.5 * temperature * soft)",
        "return _with_gradient_of(pattern, 0.5 * soft)"),
    fault("RelP takes the true gradient of activations", "utils/backward_modifiers.py",
        "ratio = t.where(x == 0, 0.0, product / x).detach()",
        "ratio = t.where(x == 0, 0.0, product / x)"),
    fault("norms keep their scale's gradient", "utils/backward_modifiers.py",
        "normed = centred / facts.scale(centred).detach()",
        "normed = centred / facts.scale(centred)"),
    fault("a weight changed through `data` is not noticed", "weights.py",
        "return all(t.equal(t.cat(views), values) for views, values in self._samples)",
        "return True",
        "test_prefix_cache.py", LAWS, SESSION),
    fault("a prefix that a prompt has already is put in twice", MODEL,
        "if prefix is not None and self._are_whole(tokens, mask, prefix):",
        "if False:",
        "test_prefix_cache.py"),
    fault("padding at the end is text", "padding.py",
        "mask = 1 - (leading | trailing)",
        "mask = 1 - leading",
        "test_padding.py"),
    fault("an end of padding may be read", "padding.py",
        "    if n_padded:",
        "    if False:",
        "test_padding.py"),
    fault("only the first tokens of a prefix count", "prefix_cache.py",
        "return (tokens[:, : len(prefix)] == prefix).all(1)",
        "return (tokens[:, : len(prefix)] == prefix).any(1)",
        "test_prefix_cache.py"),
)

ALGORITHMS: tuple[Fault, ...] = (
    fault("ACDC compares with the whole model, not with the last circuit", "prune_algos/ACDC.py",
        "if without - distance < threshold:",
        "if without < threshold:"),
    fault("ACDC does not remember the last circuit", "prune_algos/ACDC.py",
        "                    distance = without\n",
        ""),
    fault("ACDC's lowest threshold wins last", "prune_algos/ACDC.py",
        "tqdm(reversed(thresholds)",
        "tqdm((thresholds)"),
    fault("ACDC's KL the wrong way round", "prune_algos/ACDC.py",
        "multibatch_kl_div(outputs.log_softmax(-1), clean_outputs.log_softmax(-1))",
        "multibatch_kl_div(clean_outputs.log_softmax(-1), outputs.log_softmax(-1))"),
    fault("edges are tried from the start", "prune_algos/one_by_one.py",
        "key=lambda edge: (-edge.dest.layer, edge)",
        "key=lambda edge: (edge.dest.layer, edge)"),
    fault("circuits side by side share prompts", "prune_algos/one_by_one.py",
        "mask[(slice(lo * n_prompts, hi * n_prompts), *edge.patch_idx)] = share",
        "mask[(slice(lo, hi), *edge.patch_idx)] = share"),
    fault("batches weigh the same, whatever they hold", "prune_algos/exact_edge_patching.py",
        "weight = len(tokens) / dataloader.n_prompts",
        "weight = 1 / len(dataloader)"),
    fault("an edge stays patched", "prune_algos/exact_edge_patching.py",
        "circuits.patch(edge, slice(None), 0.0)",
        "pass"),
    fault("the sum over batches, not the mean", "prune_algos/mask_gradient.py",
        "total = n_prompts * len(points)",
        "total = len(points)"),
    fault("the number of points is forgotten", "prune_algos/mask_gradient.py",
        "total = n_prompts * len(points)",
        "total = n_prompts"),
    fault("what is patched in is always corrupt", "prune_algos/mask_gradient.py",
        "side = clean_corrupt if ablation_type in PER_BATCH_ABLATIONS else None",
        "side = \"corrupt\" if ablation_type in PER_BATCH_ABLATIONS else None"),
    fault("midpoints are left ends", "prune_algos/integration_path.py",
        "{\"midpoints\": 0.5, \"clean_end\": 1.0}",
        "{\"clean_end\": 1.0}"),
    fault("both ends are one point short", "prune_algos/integration_path.py",
        "n_points = n_steps + 1 if path_points == \"both_ends\" else n_steps",
        "n_points = n_steps"),
    fault("the path runs from clean to corrupt", "prune_algos/integrated_gradients.py",
        "start = t.lerp(ablated[0], clean[0], point)",
        "start = t.lerp(clean[0], ablated[0], point)"),
    fault("clean minus corrupt", "prune_algos/integrated_gradients.py",
        "patch_mode(model, ablated - clean, differences=True)",
        "patch_mode(model, clean - ablated, differences=True)"),
    fault("gradients of other sources stay", "prune_algos/integrated_gradients.py",
        "    for mask in model.patch_masks.values():\n"
        "        mask.grad = None\n",
        ""),
    fault("sources are patched beside the point", "prune_algos/integrated_gradients.py",
        "_patch_sources(model, srcs, 1 - point)",
        "_patch_sources(model, srcs, point)"),
    fault("the wrong sign of the answers' difference", "prune_algos/objectives.py",
        "return -batch_avg_answer_diff(values, batch)",
        "return batch_avg_answer_diff(values, batch)"),
    fault("a batch's mean instead of its sum", "prune_algos/objectives.py",
        "answer_loss(outputs, batch, grad_function, answer_function) * len(tokens)",
        "answer_loss(outputs, batch, grad_function, answer_function)"),
    fault("probabilities over the wrong axis", "prune_algos/objectives.py",
        "return t.softmax(outputs, dim=-1)",
        "return t.softmax(outputs, dim=0)"),
    fault("training on the wrong side", "prune_algos/mask_training.py",
        "patch_side: Side | None = \"corrupt\" if input_side == \"clean\" else \"clean\"",
        "patch_side: Side | None = \"clean\" if input_side == \"clean\" else \"corrupt\""),
    fault("ranks of a warm start the wrong way round", "prune_algos/mask_training.py",
        "(highest * (1 - 2 * log_rank))",
        "(highest * (2 * log_rank - 1))"),
    fault("ranks of a warm start by signed scores", "prune_algos/mask_training.py",
        "t.searchsorted(ascending, scores.abs().contiguous(), right=True)",
        "t.searchsorted(ascending, scores.contiguous(), right=True)"),
    fault("a warm start's ties at the left", "prune_algos/mask_training.py",
        "scores.abs().contiguous(), right=True)",
        "scores.abs().contiguous())"),
    fault("the penalty goes on below the allowed size", PROBING,
        "return t.relu(n_edges - allowed) / allowed",
        "return (n_edges - allowed) / allowed"),
    fault("the warm-up's size falls linearly", PROBING,
        "return model.n_edges * (circuit_size / model.n_edges) ** (progress / size_warmup)",
        "return model.n_edges + (circuit_size - model.n_edges) * (progress / size_warmup)"),
    fault("gates of the tree have the wrong sign", PROBING,
        "sign = -1 if tree_optimisation else 1",
        "sign = 1"),
    fault("patience ends one epoch early", PROBING,
        "return len(epochs) > patience and",
        "return len(epochs) >= patience and"),
    fault("half precision sums of gates", PROBING,
        "gates = [at_least_float32(sign * mask) for mask in masks.values()]",
        "gates = [sign * mask for mask in masks.values()]"),
    fault("edges to avoid are sought", PROBING,
        "penalty = penalty + avoid_lambda * _openness(",
        "penalty = penalty - avoid_lambda * _openness("),
    fault("Edge Pruning's multipliers never climb", PRUNING,
        "lr=multiplier_learning_rate, maximize=True",
        "lr=multiplier_learning_rate"),
    fault("Edge Pruning's target is there at once", PRUNING,
        "return first + (last - first) * progress",
        "return last"),
    fault("the mean gate at left ends", PRUNING,
        "(t.arange(N_POINTS, device=logits.device) + 0.5) / N_POINTS",
        "(t.arange(N_POINTS, device=logits.device) + 0.01) / N_POINTS"),
    fault("the soft top-k's gradient without tau's", "prune_algos/matryoshka.py",
        "return slopes * (grad - (grad * slopes).sum() / total)",
        "return slopes * grad"),
    fault("shares patch instead of keeping", "prune_algos/matryoshka.py",
        "mask.data.copy_(1 - shares.view_as(mask))",
        "mask.data.copy_(shares.view_as(mask))"),
    fault("the largest circuit has the highest score", "prune_algos/circuit_probing.py",
        "= len(sizes) - place",
        "= place + 1"),
    fault("node importance keeps its sign", "prune_algos/head_importance.py",
        "return _sum_over_edges(model, edge_scores).abs().sum(0)",
        "return _sum_over_edges(model, edge_scores).sum(0)"),
    fault("the stronger node counts", "prune_algos/head_importance.py",
        "t.where(start.abs() <= end.abs(), start, end)",
        "t.where(start.abs() >= end.abs(), start, end)"),
    fault("ties have their last rank", "prune_algos/score_ensembles.py",
        "(last_ranks - (group_sizes - 1) / 2)",
        "(last_ranks)"),
    fault("the interval is twice as wide", "prune_algos/score_ensembles.py",
        "margin = (1 - confidence) / 2",
        "margin = (1 - confidence)"),
    fault("padding counts in activations", "prune_algos/activation_magnitude.py",
        "            magnitudes = magnitudes * mask[:, -outs.shape[2] :]",
        "            pass"),
    fault("the mean before the absolute value", "prune_algos/activation_magnitude.py",
        "magnitudes = outs.abs().mean(dim=-1, dtype=wide)",
        "magnitudes = outs.mean(dim=-1, dtype=wide).abs()"),
)

NUMBERS: tuple[Fault, ...] = (
    fault("a tie is a correct answer", TENSORS,
        "(vals > others).to(t.float32)",
        "(vals >= others).to(t.float32)"),
    fault("the KL of the other direction", TENSORS,
        "terms = targets.exp() * (targets - at_least_float32(input_logprobs))",
        "terms = at_least_float32(input_logprobs).exp() * (targets - "
        "at_least_float32(input_logprobs))"),
    fault("ragged answers weigh what fills them up", TENSORS,
        "sums = answer_vals.masked_fill(~is_answer, 0.0).sum(-1)",
        "sums = answer_vals.sum(-1)"),
    fault("an edge too few in a circuit", TENSORS,
        "return desc_scores[edge_count - 1]",
        "return desc_scores[max(edge_count - 2, 0)]"),
    fault("ties are left out", TENSORS,
        "_magnitudes(scores).to(threshold.dtype) >= threshold.to(scores.device)",
        "_magnitudes(scores).to(threshold.dtype) > threshold.to(scores.device)"),
    fault("circuits are ranked by signed scores", TENSORS,
        "return scores.abs() if scores.is_floating_point() else scores.float().abs()",
        "return scores if scores.is_floating_point() else scores.float()"),
    fault("samples of gates are the same in a batch", TENSORS,
        "shape = mask.shape if mask_expanded else (batch_size, *mask.shape)",
        "shape = mask.shape if mask_expanded else (1, *mask.shape)"),
    fault("gates are not clamped", TENSORS,
        "return (concrete * width + HARD_CONCRETE_LEFT).clamp(0.0, 1.0)",
        "return concrete * width + HARD_CONCRETE_LEFT"),
    fault("half precision in divergences", TENSORS,
        "targets = at_least_float32(target_logprobs)",
        "targets = target_logprobs"),
    fault("sizes of shares are rounded up", "utils/edge_counts.py",
        "return math.floor(float(count) * n_edges + 1e-6)",
        "return math.ceil(float(count) * n_edges)"),
    fault("logarithmic sizes without 9, 90, 900", "utils/edge_counts.py",
        "for digit in range(1, 10)]",
        "for digit in range(1, 9)]"),
    fault("a known circuit's size is not tested", "utils/edge_counts.py",
        "        counts.add(_checked_count(true_edge_count, n_edges, "
        "\"`true_edge_count`\"))",
        "        pass"),
    fault("half precision sums of activations over a data set", ABLATIONS,
        "of_batch = (outs * is_text).sum(1, keepdim=True, dtype=wide)",
        "of_batch = (outs * is_text).sum(1, keepdim=True)",
        HALF),
    fault("half precision sums of activations in a batch", ABLATIONS,
        "total = (outs * is_text).sum(dims, keepdim=True, dtype=wide)",
        "total = (outs * is_text).sum(dims, keepdim=True)",
        HALF),
    fault("padding counts in means", ABLATIONS,
        "return attention_mask[None, :, -outs.shape[2] :, None].bool()",
        "return outs.new_ones((1, *outs.shape[1:3], 1), dtype=t.bool)"),
    fault("a batch's mean over positions too", ABLATIONS,
        "dims = (1,) if ablation_type == AblationType.BATCH_TOKENWISE_MEAN else (1, 2)",
        "dims = (1, 2)"),
    fault("a loader with another prefix", ABLATIONS,
        "not t.equal(model.kv_caches.tokens, prefix.tokens)",
        "False",
        DATA),
    fault("clean and corrupt are exchanged", "prune.py",
        "clean_input = (patch_type == PatchType.TREE_PATCH) != reverse_clean_corrupt",
        "clean_input = (patch_type == PatchType.TREE_PATCH) == reverse_clean_corrupt"),
    fault("reversing is ignored", "prune.py",
        "clean_input = (patch_type == PatchType.TREE_PATCH) != reverse_clean_corrupt",
        "clean_input = patch_type == PatchType.TREE_PATCH"),
    fault("outputs share memory", "prune.py",
        "model.sliced(tokens, **kwargs).clone()",
        "model.sliced(tokens, **kwargs)[:1]"),
    fault("the standard deviation over n", "metrics/prune_metrics/prompt_stats.py",
        "return float(t.tensor(self.vals, dtype=t.float64).std())",
        "return float(t.tensor(self.vals, dtype=t.float64).std(correction=0))",
        METRICS, "metrics/prune_metrics/test_measure_prune_metrics.py"),
    fault("padding counts in divergences", "metrics/prune_metrics/kl_div.py",
        "return mask[full.model.out_slice]",
        "return t.ones(())"),
    fault("corrupt is compared with clean", "metrics/prune_metrics/kl_div.py",
        "side: Side = \"clean\" if compare_to_clean else \"corrupt\"",
        "side: Side = \"clean\""),
    fault("the sum of squares, not the mean", "metrics/prune_metrics/mean_squared_error.py",
        "differences.square().flatten(1).mean(1)",
        "differences.square().flatten(1).sum(1)"),
    fault("percentages of the prompt, not of the mean", PERCENT,
        "    if diff_of_means:\n"
        "        diffs",
        "    if not diff_of_means:\n"
        "        diffs"),
    fault("wrong answers are not asked", "metrics/prune_metrics/correct_answer_percent.py",
        "        if out_of_correct_and_incorrect_answers\n"
        "        else",
        "        if False\n"
        "        else"),
    fault("outputs of the other side are kept", "metrics/prune_metrics/full_model_outs.py",
        "key = (batch.key, side, prob_func)",
        "key = (batch.key, \"clean\", prob_func)"),
    fault("the area is not divided by its width", "metrics/area_under_curve.py",
        "return area / (heights[-1][0] - heights[0][0])",
        "return area"),
    fault("the area is divided by the last size", "metrics/area_under_curve.py",
        "return area / (heights[-1][0] - heights[0][0])",
        "return area / heights[-1][0]"),
    fault("the first crossing, though not for good", "metrics/area_under_curve.py",
        "(x, all(r for _, r in reached[i:]))",
        "(x, any(r for _, r in reached[i:]))"),
    fault("CMD without the absolute value", "metrics/faithfulness.py",
        "abs(1 - point.faithfulness)",
        "(1 - point.faithfulness)"),
    fault("ranks by |score| where signed were asked", "metrics/edge_ranks.py",
        "keys = scores if ranking == \"signed\" else scores.abs()",
        "keys = scores.abs()",
        "metrics/test_faithfulness.py"),
    fault("an effect with the wrong sign", "metrics/minimality.py",
        "EdgeEffect(edge, whole - value)",
        "EdgeEffect(edge, value - whole)"),
    fault("Jaccard of the edges in either", "metrics/stability.py",
        "int((edges & other[name]).sum())",
        "int((edges | other[name]).sum())"),
    fault("bootstrap without replacement", "metrics/stability.py",
        "t.randint(n_prompts, (n_prompts,), generator=generator).tolist()",
        "t.randperm(n_prompts, generator=generator).tolist()"),
    fault("dead ends at the output stay", "metrics/circuit_pruning.py",
        "& needed[dest][:, None]",
        "& True"),
    fault("a tie beats a random circuit", "metrics/hypothesis_tests.py",
        "n_worse = int((distances[1:] > distances[0]).sum())",
        "n_worse = int((distances[1:] >= distances[0]).sum())"),
    fault("a permutation test that can give 0", "metrics/hypothesis_tests.py",
        "p_value=(1 + n_reached) / (1 + n_permutations)",
        "p_value=n_reached / n_permutations"),
    fault("a tie counts whole in the ROC", ROC,
        "(y0 if pessimistic else (y0 + y1) / 2)",
        "(y0 if pessimistic else y1)"),
    fault("the false rate over all edges", ROC,
        "/ (model.n_edges - n_true)",
        "/ model.n_edges"),
    fault("a head of another layer", IOI,
        "((7, 3), (7, 9), (8, 6), (8, 10))",
        "((7, 3), (7, 9), (8, 6), (9, 10))"),
    fault("MLPs of the last layer too", IOI,
        "return first, max(_layers(row.dests), default=GPT2_SMALL.n_layers)",
        "return first, 1 + max(_layers(row.dests), default=GPT2_SMALL.n_layers - 1)"),
)

FILES: tuple[Fault, ...] = (
    fault("edges below the threshold are saved", "circuit_files.py",
        "((scores.abs() >= threshold) & (scores != 0))",
        "((scores != 0))"),
    fault("a circuit of another version is read", "circuit_files.py",
        "if version is True or version != VERSION:",
        "if version is True:"),
    fault("another model's circuit is read", "circuit_files.py",
        "    if differences:\n"
        "        hint",
        "    if False:\n"
        "        hint"),
    fault("shared keys are not split", "circuit_files.py",
        "float(_at(score_of, edge)) / graph.shared(dst)",
        "float(_at(score_of, edge))"),
    fault("shared keys overwrite each other", "circuit_files.py",
        "totals[edge] += score",
        "totals[edge] = score"),
    fault("a failed writing replaces the file", "files.py",
        "        yield partial\n"
        "        # Some",
        "        yield final\n"
        "        # Some"),
    fault("the partial file stays", "files.py",
        "            partial.unlink(missing_ok=True)",
        "            pass"),
    fault("True is a number", "checks.py",
        "isinstance(value, Integral) and not isinstance(value, bool)",
        "isinstance(value, Integral)"),
    fault("batches drop their keys' place", "data.py",
        "json.dumps([first_idx, *values])",
        "json.dumps([0, *values])"),
    fault("the last difference instead of the first", "data.py",
        "batch_diverge_idx=min(",
        "batch_diverge_idx=max("),
    fault("the corrupt prompts get the clean mask", "data.py",
        "mask = self.clean_attention_mask if is_clean else self.corrupt_attention_mask",
        "mask = self.clean_attention_mask"),
    fault("Task.seed is ignored", "tasks.py",
        "random_seed=self.seed,",
        "random_seed=42,"),
    fault("train and test sizes are exchanged", "tasks.py",
        "batch_size=sizes,",
        "batch_size=sizes[::-1],"),
    fault("what was loaded is not freed", "tasks.py",
        "            self.__dict__.pop(name, None)",
        "            pass"),
)
# fmt: on

FAULTS = (*ENGINE, *ALGORITHMS, *NUMBERS, *FILES)


# ---------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """What the tests say: their exit status, the test that failed first, and the time."""

    status: int | None
    failed: str
    seconds: float

    @property
    def is_caught(self) -> bool:
        """A test failed, or hung; no tests, or tests that cannot be asked for, do not."""
        return self.status is None or self.status in (1, 2)


def mutated(item: Fault, repo: Path = REPO) -> str:
    """The file's text with the fault. Raises ValueError if its line is not there once."""
    text = (repo / "auto_circuit" / item.file).read_text()
    count = text.count(item.old)
    if count != 1:
        raise ValueError(f"{item.file} has {item.old!r} {count} times, expected once.")
    text = text.replace(item.old, item.new)
    compile(text, item.file, "exec")
    return text


def run_tests(copy: Path, tests: Sequence[str], *options: str) -> Outcome:
    """Run tests of the copy in a forked process."""
    output, start = copy / "output.txt", time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_tests_in_child(copy, tests, output, options))
    status: int | None = None
    while time.monotonic() - start < SECONDS:
        pid, code = os.waitpid(child, os.WNOHANG)
        if pid:
            status = os.waitstatus_to_exitcode(code)
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    found = re.search(
        r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output.read_text(), re.MULTILINE
    )
    failed = "it hangs" if status is None else found[1] if found else ""
    return Outcome(status, failed, time.monotonic() - start)


def _tests_in_child(
    copy: Path, tests: Sequence[str], output: Path, options: Iterable[str]
) -> int:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p).resolve() != REPO)]
    import pytest

    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={copy}"]
    # Plugins that are loaded already cannot be rewritten; nor need they be.
    quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    # Without run-time checks of types, which take most of the time: values must tell.
    quiet += ["-o", "addopts=--import-mode=importlib"]
    try:
        return int(pytest.main([*quiet, *options, *(f"tests/{test}" for test in tests)]))
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
        return 3
    finally:
        sys.stdout.flush()


def put_in(copy: Path, item: Fault, options: Sequence[str] = ()) -> Outcome:
    """Run a fault's tests with it, and take it out again."""
    file = copy / "auto_circuit" / item.file
    before, text = file.read_text(), mutated(item, copy)
    try:
        file.write_text(text)
        # Python trusts compiled files by time and size: of another time, to be sure.
        os.utime(file, (1e9, 1e9))
        return run_tests(copy, item.tests, "-x", *options)
    finally:
        file.write_text(before)


def chosen(only: str) -> list[Fault]:
    """The faults in whose file and name a pattern is found."""
    return [f for f in FAULTS if re.search(only, f"{f.file}: {f.name}", re.IGNORECASE)]


def report(items: Sequence[Fault]) -> bool:
    """Put in the faults and print a line for each. Was every one caught?"""
    rotten = [error for item in items if (error := _rotten(item))]
    for error in rotten:
        print("NOT THERE ", error)
    items = [item for item in items if not _rotten(item)]
    for module in LOADED_BEFORE:
        importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(copied_into(Path(folder)))
        missed = [item for item in items if not trials.is_caught(item)]
    print(f"{len(items) - len(missed)} of {len(items)} caught; {len(rotten)} not there.")
    for item in missed:
        print(f"MISSED {item.file}: {item.name}")
    return not (missed or rotten or trials.broken)


def copied_into(folder: Path) -> Path:
    """What the tests need of the repository, in a folder."""
    for name in COPIED:
        source = REPO / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.exists():
            shutil.copy2(source, folder / name)
    return folder


class Trials:
    """Puts in faults, and knows which tests fail without any."""

    def __init__(self, copy: Path) -> None:
        self.copy = copy
        self.is_sound: dict[str, bool] = {}

    @property
    def broken(self) -> list[str]:
        """The tests that fail as the code is: they tell nothing, and are left out."""
        return [test for test, is_sound in self.is_sound.items() if not is_sound]

    def is_caught(self, item: Fault) -> bool:
        """Put in one fault, and print what its tests say."""
        while True:
            left_out = [f"--deselect={test}" for test in self.broken]
            outcome = put_in(self.copy, item, left_out)
            if not outcome.is_caught or self._passes_without(outcome.failed):
                break
        verdict = "caught" if outcome.is_caught else "MISSED"
        by = outcome.failed.removeprefix("tests/") or f"status {outcome.status}"
        line = f"{outcome.seconds:5.1f} s  {verdict}  {item.file}: {item.name}  <- {by}"
        print(line, flush=True)
        return outcome.is_caught

    def _passes_without(self, test: str) -> bool:
        if not test.startswith("tests/"):
            return True
        if test not in self.is_sound:
            outcome = run_tests(self.copy, [test.removeprefix("tests/")])
            self.is_sound[test] = outcome.status == 0
            if outcome.status != 0:
                print(f"FAILS WITHOUT A FAULT: {test}", flush=True)
        return self.is_sound[test]


def _rotten(item: Fault) -> str:
    try:
        mutated(item)
    except (ValueError, OSError, SyntaxError) as error:
        return f"{item.name}: {error}"
    return ""


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--only", default="", help="those that match (a regular expression)"
    )
    parser.add_argument("--list", action="store_true", help="list the faults")
    arguments = parser.parse_args()
    items = chosen(arguments.only)
    if not arguments.list:
        return 0 if report(items) else 1
    for item in items:
        print(f"{item.file}: {item.name}\n  - {item.old!r}\n  + {item.new!r}")
    print(f"{len(items)} faults; {sum(bool(_rotten(item)) for item in items)} not there.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
