"""Do the fast tests notice single-line faults? Put in some 280, one at a time.

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

os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"
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
SECONDS = 300
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
SESSION = "engine/test_patch_session.py"
PLANNED, PRODUCTS = "engine/test_pass_works.py", "engine/test_matrix_work.py"
CUT = "engine/test_edge_matrices.py"
FACTS, HEADS_TESTS = "model_utils/test_block_facts.py", "engine/test_head_inputs.py"
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
LINKS = "utils/test_component_links.py"
DEAD_ENDS = "metrics/test_circuit_pruning.py"
CIRCUITS = "test_prune.py"
CORE_RULES = "prune_algos/test_core_rules.py"
ALGO_CONFIG = "prune_algos/test_algo_config.py"
DATA = "test_data.py"
BAD_INPUT = "test_bad_input.py"
CHECKS = "test_checks.py"
PUBLIC = "test_public_arguments.py"
PREFIX, PADDING = "test_prefix_cache.py", "test_padding.py"
TORCH_STATE, MODULE_USE = "test_torch_state.py", "utils/test_module_use.py"
SWEEPS, REPORTS = "test_sweep.py", "test_reports.py"
ROBUSTNESS = "test_robustness.py"
MIB, PAPER = "test_mib.py", "test_paper.py"
DRAWN = "test_visualize.py"
KNOCKED_OUT = "metrics/completeness_metrics/test_same_under_knockouts.py"
LOADED, UNGROUPED = (
    "model_utils/test_load_model.py",
    "model_utils/test_ungrouped_heads.py",
)

# file -> its tests, for faults that name none.
TESTS = MappingProxyType(
    {
        "utils/tensor_ops.py": (OPS,),
        "gates.py": (OPS,),
        "ranking.py": (OPS,),
        "utils/edge_counts.py": ("utils/test_edge_counts.py",),
        "utils/component_links.py": (LINKS, DEAD_ENDS),
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
        "checks.py": (CHECKS, PUBLIC),
        "data.py": (DATA,),
        "tasks.py": ("test_tasks.py",),
    }
)


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    """A fault, with its file's tests if it names none."""
    return Fault(name, file, old, new, tests or TESTS[file])


FORWARD, HEADS = "engine/forward_pass.py", "engine/head_inputs.py"
WORK, WORKS = "engine/matrix_work.py", "engine/pass_works.py"
MATRICES, BLOCKS = "engine/edge_matrices.py", "model_utils/block_facts.py"
PATCHES, WRAPPER = "engine/patch_session.py", "engine/patch_wrapper.py"
GRAPH, MODEL = "utils/graph_utils.py", "utils/patchable_model.py"
SITES = "model_utils/transformer_lens_sites.py"
PROBING, PRUNING = "prune_algos/subnetwork_probing.py", "prune_algos/edge_pruning.py"
TENSORS, ABLATIONS = "utils/tensor_ops.py", "utils/ablation_activations.py"
PERCENT = "metrics/prune_metrics/answer_diff_percent.py"
TORCH, USE = "utils/torch_state.py", "utils/module_use.py"
KNOCKOUTS = "metrics/completeness_metrics/same_under_knockouts.py"
FIGURES = "visualize.py"
SWEEP, SWEEP_CONFIG, SUMMARY = "sweep.py", "sweep_config.py", "summary.py"
AREA_FIGURE = "metrics/area_under_curve_plot.py"
PAIRED, COMPARISONS = "metrics/paired_comparisons.py", "comparisons.py"
LOADING = "model_utils/load_model.py"
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
        "slot = works.slots[srcs.start + i]",
        "slot = works.slots[srcs.stop - 1 - (i > 0)]",
        EDGES, SPARSE),
    fault("a pass takes memory that is still lent", "engine/buffers.py",
        "flat, n_values = self._kept.pop(name, None), math.prod(shape)",
        "flat, n_values = self._kept.get(name), math.prod(shape)",
        "engine/test_buffers.py"),
    fault("the caller's memory is kept", "engine/buffers.py",
        'buffers["diff"] = None',
        "pass",
        "engine/test_buffers.py"),
    fault("memory is taken from a second backward pass", FORWARD,
        "self.awaits_backward = True  #",
        "pass  #",
        "engine/test_buffers.py"),
    fault("memory that another stream may be reading", "engine/buffers.py",
        "if self._stream != _stream(like):",
        "if False:",
        "engine/test_buffers.py"),
    fault("patches of an earlier pass are still summed", PATCHES,
        "if version is None or version != self._patch_version:",
        "if version is None:",
        SESSION),
    fault("a remembered component despite a hook in it", PATCHES,
        "not self.differences and not self._hook_ids and self.weights.holds()",
        "not self.differences and self.weights.holds()",
        SESSION, "utils/test_user_hooks.py"),
    fault("what hooks changed in place is remembered", PATCHES,
        "if not outs or [_version(out) for out in outs] != versions:",
        "if not outs:",
        SESSION),
    fault("the patched base without its constants", PATCHES,
        "return devices.moved(total, devices.device_of(constant)) + constant",
        "return total",
        ENDS),
    fault("half precision sums of patches", PATCHES,
        "dtype = t.promote_types(self.patch.dtype, t.float32)",
        "dtype = self.patch.dtype",
        SESSION, "test_laws.py::test_other_float_types"),
    fault("masks are not copied for the backward pass", WORKS,
        "return parts[0].clone()",
        "return parts[0]",
        PLANNED, SESSION),
    fault("only the first whole pass is kept for short ones", PATCHES,
        "        if self._first_block == 0:\n"
        "            self._block_outs",
        "        if idx not in self._block_outs:\n"
        "            self._block_outs",
        SESSION, ACDC),
    fault("after a pass from the middle whole ones are not kept", PATCHES,
        'stack.callback(setattr, self, "_first_block", 0)',
        'stack.callback(setattr, self, "_other_block", 0)',
        SESSION),
    fault("a pass from the middle starts one block late", PATCHES,
        "self._first_block = self._overwritten_from = block",
        "self._first_block = self._overwritten_from = block + 1",
        ACDC),
    fault("weights on the patched base without minus 1", WORKS,
        "weights = weights - 1",
        "weights = weights - 0",
        PLANNED, ENDS, SPARSE),
    fault("a second matrix has the columns of the first", WORKS,
        "of_srcs = slice(matrix.lo - port.srcs.start, matrix.hi - port.srcs.start)",
        "of_srcs = slice(0, matrix.hi - matrix.lo)",
        PLANNED),
    fault("sources are numbered from the matrix's first", WORKS,
        "(np.flatnonzero(flag[i].any(0)) + matrix.lo).tolist(),",
        "np.flatnonzero(flag[i].any(0)).tolist(),",
        PLANNED),
    fault("heads' input goes over the last column", WORKS,
        "inputs_slot = slots[recorded[-1]] + 1",
        "inputs_slot = slots[recorded[-1]]",
        PLANNED),
    fault("an MLP's second matrix begins a source late", MATRICES,
        "groups.append((shared, EdgeMatrix((port,), srcs.stop, port.srcs.stop)))",
        "groups.append((shared, EdgeMatrix((port,), srcs.stop + 1, port.srcs.stop)))",
        CUT),
    fault("no edges chosen: patched instead of unpatched", WORKS,
        "if _n_srcs(unpatched, group) < _n_srcs(patched, group):\n"
        "                base = unpatched\n",
        "if _n_srcs(unpatched, group) < _n_srcs(patched, group):\n"
        "                base = patched\n",
        PLANNED, ENDS, SPARSE),
    fault("masks' gradients are means over positions", WORK,
        "return by_token.sum(expanded, keepdim=True, dtype=self.weights.dtype)",
        "return by_token.mean(expanded, keepdim=True, dtype=self.weights.dtype)",
        PRODUCTS,
        f"{EAP}::test_eap_is_gradient_times_difference", GRADIENTS),
    fault("half precision sums of masks' gradients", WORK,
        "return by_token.sum(expanded, keepdim=True, dtype=self.weights.dtype)",
        "return by_token.sum(expanded, keepdim=True).to(self.weights.dtype)",
        HALF),
    fault("gradient sent back is added at the source", FORWARD,
        "grad = grad - sent_back.reshape(grad_out.shape)",
        "grad = grad + sent_back.reshape(grad_out.shape)",
        PRODUCTS, GRADIENTS),
    fault("gradient sent back is forgotten", FORWARD,
        "            if part.has_grad:",
        "            if False:",
        GRADIENTS),
    fault("each head is normed alone", SITES,
        "scale = norm.scale(heads.sum(2, keepdim=True))",
        "scale = norm.scale(heads)",
        FACTS),
    fault("what a head gives is not scaled as the residual stream is", SITES,
        "return weights if scale == 1.0 else scale * weights",
        "return weights",
        "model_utils/test_architectures.py"),
    fault("a module that adds the residual stream too is remembered", BLOCKS,
        "type(mlp) in PLAIN_MLPS and written in all_of_it",
        "type(mlp) in PLAIN_MLPS",
        FACTS),
    fault("what heads' linear maps read is not looked at", GRAPH,
        "            if not are_hooked:\n                _check_heads_read",
        "            if False:\n                _check_heads_read",
        FACTS),
    fault("an MLP's maps share no row", "model_utils/model_adapter.py",
        "return rows + [slice(stop, stop + 1)] * self.n_mlp_linears",
        "return rows + [slice(stop, stop + 1)] * min(1, self.n_mlp_linears)",
        HEADS_TESTS),
    fault("differences stay on their device", "engine/patch_session.py",
        "part.diff[:, :, slots].copy_(here.diff[:, :, slots])",
        "part.diff[:, :, slots].zero_()",
        "engine/test_devices.py"),
    fault("a transform's gradient is what is sent back", MATRICES,
        "if self.site.transform is None or out is None:",
        "if self.site.transform is not None or out is None:",
        "engine/test_src_transform.py"),
    fault("no gradients where all masks are 0", WORK,
        "if self.does_nothing and not self.weights.requires_grad:",
        "if self.does_nothing:",
        f"{CALLERS}::test_mask_gradients_are_finite_differences"),
    fault("old gradients are not zeroed", FORWARD,
        "                grad.zero_()",
        "                pass",
        PRODUCTS, GRADIENTS,
        "test_laws.py::test_gradients_of_two_forward_passes_do_not_mix", SESSION),
    fault("x stays in the next source's slot", WORK,
        "with self._x_in_its_slot(x, keeps=keeps):",
        "with self._x_in_its_slot(x, keeps=False):",
        PRODUCTS, SESSION),
    fault("x takes the slot of a source that has written already", WORK,
        "is_written = self.inputs_slot < here.n_written",
        "is_written = False",
        "model_utils/test_features_of_architectures.py::"
        "test_parts_are_those_of_the_plain_model[gptj-neurons]"),
    fault("a second backward pass meets x in the slot", WORK,
        "with self._x_in_its_slot(x, keeps=True):",
        "with self._x_in_its_slot(x, keeps=False):",
        PRODUCTS, "model_utils/test_transformer_lens_sites.py", GRADIENTS),
    fault("a failed backward pass leaves its gradients", FORWARD,
        "self.backward_id, self.has_grad = backward_id, False",
        "self.backward_id = backward_id",
        SESSION),
    fault("only the first changed row is read", WORK,
        "lo = bisect_left(self.row_idxs, rows.start)",
        "lo = bisect_left(self.row_idxs, rows.start + 1)",
        PRODUCTS, EDGES),
    fault("masks of examples are read across positions", WORK,
        "return weights.expand(batch, seq, -1, -1).flatten(0, 1)",
        "return weights.expand(batch, seq, -1, -1).transpose(0, 1).flatten(0, 1)",
        PRODUCTS, EXAMPLES),
    fault("x has the weight 1 for the MLP's row too", WORK,
        "of_x[:, :, :n_head_rows] = 1.0",
        "of_x[:] = 1.0",
        PRODUCTS, EDGES, ENDS),
    fault("heads are not centred before a norm in closed form", HEADS,
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
        "            products[:, : matrix.n_head_rows] -= t.bmm(\n",
        "            products[:, : matrix.n_head_rows] -= 0 * t.bmm(\n",
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
        "            stack.enter_context(preserved_masks(model, notes=\"patch_mode\"))",
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
        "earlier = [src for src in srcs if src.layer < dest.layer]",
        "earlier = [src for src in srcs if src.layer <= dest.layer]",
        EDGES),
    fault("dropout does not rescale", WRAPPER,
        ".to(weights.dtype) / (1 - self.dropout_p)",
        ".to(weights.dtype)",
        f"{CORE_RULES}::test_dropout_is_rescaled"),
    fault("dropout in eval mode too", WRAPPER,
        "if self.dropout_p > 0.0 and self.training:",
        "if self.dropout_p > 0.0:",
        "test_graph_utils.py::test_dropout_acts_in_train_mode_only"),
    fault("the mask that is left is the mean of the examples'", WRAPPER,
        "self._replace_mask(self.mask.data[0])",
        "self._replace_mask(self.mask.data.mean(0))",
        "test_graph_utils.py::test_a_wrapper_keeps_the_mask_of_the_first_example"),
    fault("the prefix's mask is of padding", MODEL,
        "mask.new_ones(tokens.shape[0], n_prefix)",
        "mask.new_zeros(tokens.shape[0], n_prefix)",
        f"{PREFIX}::test_a_prefix_before_padding_counts"),
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
        PREFIX, LAWS, SESSION),
    fault("a prefix that a prompt has already is put in twice", MODEL,
        "if prefix is not None and self._are_whole(tokens, mask, prefix):",
        "if False:",
        PREFIX),
    fault("padding at the end is text", "padding.py",
        "mask = 1 - (leading | trailing)",
        "mask = 1 - leading",
        PADDING),
    fault("an end of padding may be read", "padding.py",
        "    if n_padded:",
        "    if False:",
        PADDING),
    fault("only the first tokens of a prefix count", "prefix_cache.py",
        "return (tokens[:, : len(prefix)] == prefix).all(1)",
        "return (tokens[:, : len(prefix)] == prefix).any(1)",
        PREFIX),
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
        "multibatch_kl_div(clean_outputs.log_softmax(-1), outputs.log_softmax(-1))",
        f"{ACDC}::test_acdc_asks_how_well_the_circuit_predicts_the_model"),
    fault("a crossing edge adds the other run's values to its own", "engine/crossings.py",
        'self.patched.pop("value") - values if',
        'self.patched.pop("value") if',
        "engine/test_crossings.py"),
    fault("crossing edges lead the wrong way", "engine/edge_matrices.py",
        "self.pair_numbers[positions[:, :, None], positions[:, None, :]]",
        "self.pair_numbers[positions[:, None, :], positions[:, :, None]]",
        "engine/test_crossings.py"),
    fault("a key's effect forgets that others shrink", "prune_algos/peap.py",
        "shrunk + pattern * (1 - shrunk), 1 + pattern * (shrunk - 1)",
        "shrunk, t.ones_like(pattern)",
        "prune_algos/test_peap.py"),
    fault("edges are tried from the start", "prune_algos/one_by_one.py",
        "(-edge.dest.layer, not edge.is_crossing, edge)",
        "(edge.dest.layer, not edge.is_crossing, edge)"),
    fault("circuits side by side share prompts", "prune_algos/one_by_one.py",
        "mask[(slice(lo * n_prompts, hi * n_prompts), *edge.patch_idx)] = share",
        "mask[(slice(lo, hi), *edge.patch_idx)] = share",
        f"{ACDC}::test_several_edges_at_once_are_as_one_by_one"),
    fault("batches weigh the same, whatever they hold", "prune_algos/exact_edge_patching.py",
        "weight = len(batch.clean) / dataloader.n_prompts",
        "weight = 1 / len(dataloader)"),
    fault("an edge stays patched", "prune_algos/exact_edge_patching.py",
        "circuits.patch(edge, slice(None), 0.0)",
        "pass"),
    fault("the sum over batches, not the mean", "prune_algos/mask_gradient.py",
        "total = dataloader.n_prompts * len(points)",
        "total = len(points)"),
    fault("the number of points is forgotten", "prune_algos/mask_gradient.py",
        "total = dataloader.n_prompts * len(points)",
        "total = dataloader.n_prompts"),
    fault("what is patched in is always corrupt", "prune_algos/mask_gradient.py",
        "side = ablation_side(config.ablation_type, config.clean_corrupt)",
        "side = ablation_side(config.ablation_type, \"corrupt\")"),
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
        "_patch_alone(model, edges, 1 - point)",
        "_patch_alone(model, edges, point)"),
    fault("the wrong sign of the answers' difference", "prune_algos/objectives.py",
        "return -batch_avg_answer_diff(values, batch)",
        "return batch_avg_answer_diff(values, batch)"),
    fault("a batch's mean instead of its sum", "prune_algos/objectives.py",
        "answer_loss(outputs, batch, grad_function, answer_function) * len(tokens)",
        "answer_loss(outputs, batch, grad_function, answer_function)"),
    fault("probabilities over the wrong axis", "prune_algos/objectives.py",
        "return t.softmax(outputs, dim=-1)",
        "return t.softmax(outputs, dim=0)",
        f"{EAP}::test_what_answers_are_compared_in_by_hand"),
    fault("training on the wrong side", "prune_algos/mask_training.py",
        "return ablation_type, ablation_side(ablation_type, OTHER_SIDE[input_side])",
        "return ablation_type, ablation_side(ablation_type, input_side)"),
    fault("ranks of a warm start the wrong way round", "prune_algos/mask_training.py",
        "(highest * (1 - 2 * log_rank))",
        "(highest * (2 * log_rank - 1))",
        CORE_RULES),
    fault("ranks of a warm start by signed scores", "prune_algos/mask_training.py",
        "t.searchsorted(ascending, scores.abs().contiguous(), right=True)",
        "t.searchsorted(ascending, scores.contiguous(), right=True)",
        CORE_RULES),
    fault("a warm start's ties at the left", "prune_algos/mask_training.py",
        "scores.abs().contiguous(), right=True)",
        "scores.abs().contiguous())",
        CORE_RULES),
    fault("the penalty goes on below the allowed size", PROBING,
        "return t.relu(n_edges - allowed) / allowed",
        "return (n_edges - allowed) / allowed",
        f"{TRAINING}::test_a_circuit_below_the_allowed_size_costs_nothing"),
    fault("the warm-up's size falls linearly", PROBING,
        "return n_all * (size / n_all) ** (progress / size_warmup)",
        "return n_all + (size - n_all) * (progress / size_warmup)",
        CORE_RULES),
    fault("gates of the tree have the wrong sign", PROBING,
        "return \"others\" if self.tree_optimisation else \"circuit\"",
        "return \"circuit\"",
        f"{TRAINING}::test_a_training_begins_at_the_model_if_gates_are_open"),
    fault("patience ends one epoch early", PROBING,
        "return len(epochs) > patience and",
        "return len(epochs) >= patience and",
        CORE_RULES),
    fault("scores of the tree are the masks'", "prune_algos/mask_training.py",
        "return {name: swapped_logits(mask, patched) for name, mask in masks.items()}",
        "return dict(masks)",
        CORE_RULES),
    fault("masks of a training have the logits of the circuit", "prune_algos/mask_training.py",
        "masks[name].data.copy_(swapped_logits(logits, patched))",
        "masks[name].data.copy_(logits)",
        ALGO_CONFIG),
    fault("a published parameter keeps its sign inside", PROBING,
        "options[\"first_logit\"] = -init_val",
        "options[\"first_logit\"] = init_val",
        ALGO_CONFIG),
    fault("options one by one do not change a given config", "prune_algos/algo_config.py",
        "config = config.with_options(**options)",
        "pass",
        ALGO_CONFIG),
    fault("edges to avoid are sought", PROBING,
        "penalty = penalty + config.avoid_lambda * openness",
        "penalty = penalty - config.avoid_lambda * openness",
        CORE_RULES),
    fault("Edge Pruning's multipliers never climb", PRUNING,
        "lr=learning_rate, maximize=True",
        "lr=learning_rate",
        CORE_RULES),
    fault("Edge Pruning's target is there at once", PRUNING,
        "return first + (last - first) * progress",
        "return last",
        CORE_RULES),
    fault("the mean gate at left ends", PRUNING,
        "(t.arange(N_POINTS, device=logits.device) + 0.5) / N_POINTS",
        "(t.arange(N_POINTS, device=logits.device) + 0.01) / N_POINTS",
        f"{TRAINING}::test_the_expected_gate_is_the_mean_of_samples"),
    fault("the soft top-k's gradient without tau's", "prune_algos/matryoshka.py",
        "return slopes * (grad - (grad * slopes).sum() / total)",
        "return slopes * grad",
        f"{TRAINING}::test_soft_top_k"),
    fault("shares patch instead of keeping", "prune_algos/matryoshka.py",
        "mask.data.copy_(1 - shares.view_as(mask))",
        "mask.data.copy_(shares.view_as(mask))",
        f"{TRAINING}::test_matryoshka_learns"),
    fault("the largest circuit has the highest score", "prune_algos/circuit_probing.py",
        "= len(sizes) - place",
        "= place + 1",
        f"{TRAINING}::test_circuit_probing_ranks_by_the_smallest_circuit"),
    fault("node importance keeps its sign", "prune_algos/head_importance.py",
        "return _sum_over_edges(model, edge_scores).abs().sum(0)",
        "return _sum_over_edges(model, edge_scores).sum(0)",
        "prune_algos/test_head_importance.py::test_micro_model_by_hand"),
    fault("the stronger node counts", "prune_algos/head_importance.py",
        "t.where(start.abs() <= end.abs(), start, end)",
        "t.where(start.abs() >= end.abs(), start, end)",
        "prune_algos/test_head_importance.py::test_micro_model_by_hand"),
    fault("ties have their last rank", "prune_algos/score_ensembles.py",
        "(last_ranks - (group_sizes - 1) / 2)",
        "(last_ranks)"),
    fault("the interval is twice as wide", "prune_algos/score_ensembles.py",
        "margin = (1 - confidence) / 2",
        "margin = (1 - confidence)"),
    fault("padding counts in activations", "prune_algos/activation_magnitude.py",
        "        magnitudes = magnitudes * mask[:, -outs.shape[2] :]",
        "        pass",
        "prune_algos/test_activation_magnitude.py::test_padding_does_not_count"),
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
    fault("an edge too few in a circuit", "ranking.py",
        "return desc_scores[edge_count - 1]",
        "return desc_scores[max(edge_count - 2, 0)]"),
    fault("ties are left out", "ranking.py",
        "_magnitudes(scores).to(threshold.dtype) >= threshold.to(scores.device)",
        "_magnitudes(scores).to(threshold.dtype) > threshold.to(scores.device)"),
    fault("circuits are ranked by signed scores", "ranking.py",
        "return scores.abs() if scores.is_floating_point() else scores.float().abs()",
        "return scores if scores.is_floating_point() else scores.float()"),
    fault("samples of gates are the same in a batch", "gates.py",
        "shape = mask.shape if mask_expanded else (batch_size, *mask.shape)",
        "shape = mask.shape if mask_expanded else (1, *mask.shape)"),
    fault("gates are not clamped", "gates.py",
        "return (concrete * width + HARD_CONCRETE_LEFT).clamp(0.0, 1.0)",
        "return concrete * width + HARD_CONCRETE_LEFT"),
    fault("half precision in divergences", TENSORS,
        "targets = at_least_float32(target_logprobs)",
        "targets = target_logprobs"),
    fault("sizes of shares are rounded up", "utils/edge_counts.py",
        "return math.floor(float(count) * n_edges + 1e-6)",
        "return math.ceil(float(count) * n_edges)"),
    fault("logarithmic sizes without 9, 90, 900", "utils/edge_counts.py",
        "_logarithmic_counts(n_edges, range(1, 10))",
        "_logarithmic_counts(n_edges, range(1, 9))"),
    fault("a known circuit's size is not tested", "utils/edge_counts.py",
        "        counts.add(_checked_count(true_edge_count, n_edges, "
        "\"`true_edge_count`\"))",
        "        pass"),
    fault("half precision sums of activations over a data set", ABLATIONS,
        "wide = t.promote_types(outs.dtype, t.float32)",
        "wide = outs.dtype",
        HALF),
    fault("half precision sums of activations in a batch", ABLATIONS,
        "total = text.sum(dims, keepdim=True, dtype=wide)",
        "total = text.sum(dims, keepdim=True)",
        HALF),
    fault("padding counts in means", ABLATIONS,
        "return attention_mask[None, :, -outs.shape[2] :, None].bool()",
        "return outs.new_ones((1, *outs.shape[1:3], 1), dtype=t.bool)"),
    fault("a batch's mean over positions too", ABLATIONS,
        "AblationType.BATCH_TOKENWISE_MEAN: (1,),",
        "AblationType.BATCH_TOKENWISE_MEAN: (1, 2),"),
    fault("a loader with another prefix", ABLATIONS,
        "not t.equal(model.kv_caches.tokens, prefix.tokens)",
        "False",
        PREFIX),
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
        "return _area(heights) / (heights[-1][0] - heights[0][0])",
        "return _area(heights)"),
    fault("the area is divided by the last size", "metrics/area_under_curve.py",
        "return _area(heights) / (heights[-1][0] - heights[0][0])",
        "return _area(heights) / heights[-1][0]"),
    fault("a least area is a greatest one", "metrics/area_under_curve.py",
        "eps is None or not area < eps",
        "eps is None or not area > eps",
        f"{AREA}::test_a_least_area"),
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
    fault("Jaccard of the edges in either", "circuits.py",
        "int((mask & other[name]).sum())",
        "int((mask | other[name]).sum())",
        "metrics/test_stability.py"),
    fault("a circuit without the edges that another lacks", "circuits.py",
        "self.intersection(as_circuit(self.model, other).complement())",
        "self.intersection(as_circuit(self.model, other))",
        "test_circuits.py"),
    fault("an edge is taken out of the circuit that it was taken from", "circuits.py",
        "            if masks[name] is self.masks[name]:",
        "            if False:",
        "test_circuits.py"),
    fault("bootstrap without replacement", "metrics/stability.py",
        "t.randint(len(places), (len(places),), generator=generator).tolist()",
        "t.randperm(len(places), generator=generator).tolist()"),
    fault("a query is read at later positions too", "utils/component_links.py",
        "if dest.head_input == \"query\":",
        "if False:",
        f"{LINKS}::test_destinations_feed_what_changes_with_them"),
    fault("nodes that say nothing are inputs", "utils/component_links.py",
        "if src not in is_fed and src.kind != \"embed\" and src.layer >= first_dest:",
        "if False:",
        f"{LINKS}::test_nodes_that_say_nothing_and_share_no_name"),
    fault("a norm over all heads tells them apart", "utils/component_links.py",
        "or dest.heads is None or dest.reaches_all_heads:",
        "or dest.heads is None:",
        f"{LINKS}::test_destinations_feed_what_changes_with_them"),
    fault("a shared key belongs to one head", "model_utils/transformer_lens_utils.py",
        "heads=tuple(range(idx * group, (idx + 1) * group)),",
        "heads=(idx,),",
        f"{DEAD_ENDS}::test_key_value_heads_feed_their_group"),
    fault("latents are of no component",
        "model_utils/sparse_autoencoders/autoencoder_transformer.py",
        "            head_dim=2,\n            weight=None,",
        "            head_dim=2,\n            weight=None, component=None,",
        f"{DEAD_ENDS}::test_an_mlp_feeds_its_latents_and_its_error"),
    fault("keys matter at their own position only", "prune_algos/head_importance.py",
        "    if positions == \"own\":",
        "    if True:",
        "prune_algos/test_head_importance.py::test_the_strongest_keeps_its_sign"),
    fault("dead ends at the output stay", "utils/dead_ends.py",
        "& needed[dest][:, None]",
        "& True",
        "metrics/test_circuit_pruning.py"),
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
        "return int(differs.int().argmax(1).min())",
        "return int(differs.int().argmax(1).max())",
        f"{DATA}::test_the_first_difference_of_a_batch_is_its_earliest"),
    fault("the corrupt prompts get the clean mask", "data.py",
        "mask = self.clean_attention_mask if is_clean else self.corrupt_attention_mask",
        "mask = self.clean_attention_mask",
        f"{DATA}::test_each_side_of_a_batch_has_its_own_mask"),
    fault("Task.seed is ignored", "tasks.py",
        "random_seed=self.seed,",
        "random_seed=42,"),
    fault("batches of a prompt file are larger than they may be", "tasks.py",
        "n_batches = -(-(n_prompts // 2) // MAX_BATCH)",
        "n_batches = max(1, n_prompts // 2 // MAX_BATCH)",
        "test_tasks.py::test_a_task_of_a_prompt_file"),
    fault("train and test sizes are exchanged", "tasks.py",
        "batch_size=batch_sizes,",
        "batch_size=batch_sizes[::-1],",
        "test_tasks.py::test_a_model_object_or_a_folder"),
    fault("what was loaded is not freed", "tasks.py",
        "            del self.__dict__[name]",
        "            pass"),
)
INPUTS: tuple[Fault, ...] = (
    fault("a wrong Literal is let through", "checks.py",
        "return lambda v: any(_is_choice(v, choice) for choice in get_args(annotation))",
        "return None",
        PUBLIC, CHECKS),
    fault("a wrong enum is let through", "checks.py",
        "    return lambda v: isinstance(v, kind)\n",
        "    return lambda v: isinstance(v, kind) or issubclass(kind, Enum)\n",
        PUBLIC, CHECKS),
    fault("1 is the choice True", "checks.py",
        "return value is choice or (is_text and value == choice)",
        "return value == choice",
        CHECKS, PUBLIC),
    fault("arguments by name are not checked", "checks.py",
        "elif name in kwargs:\n                value",
        "elif False:\n                value",
        CHECKS, PUBLIC),
    fault("only the first wrong argument is named", "checks.py",
        "raise ConfigError(\" \".join(wrong))",
        "raise ConfigError(wrong[0])"),
    fault("the largest count is too large", "checks.py",
        "(at_most is not None and count > at_most)",
        "(at_most is not None and count >= at_most)"),
    fault("an open end of a range is in it", "checks.py",
        "above < number < below",
        "above <= number <= below"),
    fault("the ends of a range are not in it", "checks.py",
        "is_inside = low <= number <= high",
        "is_inside = low < number < high"),
    fault("a generator is a collection", "checks.py",
        "is_collection = isinstance(value, Collection)\n",
        "is_collection = isinstance(value, Iterable)\n"),
    fault("a text is a list of texts", "checks.py",
        "others = (str, bytes) if parts == (str,) else (str, bytes, Mapping)",
        "others = (bytes,) if parts == (str,) else (bytes, Mapping)"),
    fault("a dictionary is a list of numbers", "checks.py",
        "others = (str, bytes) if parts == (str,) else (str, bytes, Mapping)",
        "others = (str, bytes)"),
    fault("tensors may have more dimensions", "checks.py",
        "return value.ndim >= n_dims if is_open else value.ndim == n_dims",
        "return value.ndim >= n_dims"),
    fault("a negative seed is a seed", "checks.py",
        "check_count(\"seed\", seed, 0, 2**63 - 1)",
        "check_count(\"seed\", seed, -1, 2**63 - 1)"),
    fault("a link is replaced by a file", "files.py",
        "        final = final.resolve()\n    if _is_there_and_not(S_ISREG",
        "        pass\n    if _is_there_and_not(S_ISREG"),
    fault("the old folder goes before the new one is whole", "files.py",
        "        partial.mkdir()\n",
        "        shutil.rmtree(final, ignore_errors=True)\n        partial.mkdir()\n"),
    fault("an old folder stays under a hidden name", "files.py",
        "    shutil.rmtree(old, ignore_errors=True)\n",
        "    pass\n"),
    fault("a pipe is opened", "files.py",
        "        if not path.is_file():\n            raise FileError",
        "        if path.is_dir():\n            raise FileError",
        f"{BAD_INPUT}::test_pipes_folders_and_devices_are_not_read"),
    fault("doubled keys are taken", "files.py",
        "if len(content) < len(pairs):",
        "if False:",
        BAD_INPUT),
    fault("NaN in JSON is taken", "files.py",
        "parse_constant=refused, ",
        "",
        f"{DATA}::test_malformed_files"),
    fault("1e999 in JSON is infinity", "files.py",
        "return float(digits) if math.isfinite(float(digits)) else refused(digits[:40])",
        "return float(digits)",
        f"{DATA}::test_malformed_files"),
    fault("a name with a backslash", "files.py",
        "not set(name) & {*\"/\\\\\"}",
        "not set(name) & {*\"/\"}"),
    fault("a name of spaces at the ends", "files.py",
        "name.isprintable() and name == name.strip()",
        "name.isprintable()"),
    fault("the checksum depends on the order", "files.py",
        "json.dumps(content, sort_keys=True, separators=(\",\", \":\"))",
        "json.dumps(content, separators=(\",\", \":\"))",
        "test_files.py"),
    fault("checksums are not compared", "circuit_files.py",
        "if content[\"checksum\"] != checksum(rest):",
        "if False:",
        "test_circuit_files.py", BAD_INPUT),
    fault("another graph is read if the name does not count", "circuit_files.py",
        "not (key == \"name\" and any_model_name)",
        "not any_model_name"),
    fault("the position of an edge is lost", "edge_sequence.py",
        "self.dests[dest_idx], self.positions[position])",
        "self.dests[dest_idx], self.positions[0])",
        "test_edge_sequence.py"),
    fault("an edge from a later source is found", "edge_sequence.py",
        "and src.src_idx in self.read[dest_idx]",
        "and src.src_idx <= self.read[dest_idx].stop",
        "test_edge_sequence.py", BAD_INPUT),
    fault("a position beyond the last is found", "edge_sequence.py",
        "return seq_idx in self.positions",
        "return seq_idx in (*self.positions, self.seq_len)",
        "test_edge_sequence.py", BAD_INPUT),
    fault("a slice begins with the destination before", "edge_sequence.py",
        "bisect_right(self.starts, rest) - 1",
        "max(0, bisect_right(self.starts, rest) - 2)",
        "test_edge_sequence.py"),
    fault("MIB's edges that are none are skipped", "circuit_files.py",
        "elif is_in_graph or (score != 0 and math.isfinite(score)):",
        "elif False:"),
    fault("MIB's doubled nodes are read", "circuit_files.py",
        "        if doubles:\n",
        "        if False:\n"),
    fault("a damaged MIB file is read", "circuit_files.py",
        "if damaged is not None:",
        "if False:",
        BAD_INPUT, "test_circuit_files.py"),
    fault("MIB's circuit is every edge with a score", "circuit_files.py",
        "        circuit, _ = circuit_mask(prune_scores, edge_count)\n",
        "        pass\n"),
    fault("prompts of the first file only", "prompt_files.py",
        "prompts=[p for file in files for p in file.prompts]",
        "prompts=[p for file in files[:1] for p in file.prompts]",
        DATA),
    fault("positions of words are not moved by BOS", "prompt_files.py",
        "{word: idx + 1 for word, idx in self.word_idxs.items()}",
        "{word: idx for word, idx in self.word_idxs.items()}",
        DATA),
    fault("a byte order mark is text", "prompt_files.py",
        "encoding=\"utf-8-sig\"",
        "encoding=\"utf-8\"",
        DATA),
    fault("ragged numbers are taken", "prompt_files.py",
        "    if len(shapes) > 1:\n",
        "    if False:\n",
        f"{DATA}::test_bad_prompts_of_numbers"),
    fault("misspelt fields are ignored", "prompt_files.py",
        "if like and name not in known:",
        "if False:",
        f"{DATA}::test_malformed_files"),
    fault("empty cells are answers", "prompt_files.py",
        "return [cell] if cell else []",
        "return [cell]",
        f"{DATA}::test_csv_and_json_lines_say_the_same_as_json"),
    fault("lines of another number of cells", "prompt_files.py",
        "if cells and len(cells) != len(header):",
        "if cells and len(cells) < len(header):",
        f"{DATA}::test_malformed_lines"),
    fault("labels that differ from line to line", "prompt_files.py",
        "if any(one != other for one, other in pairwise(values)):",
        "if False:",
        f"{DATA}::test_malformed_lines"),
    fault("True is a token id", "prompt_files.py",
        "return isinstance(value, Integral) and not isinstance(value, bool)",
        "return isinstance(value, Integral)",
        f"{DATA}::test_bad_prompts"),
    fault("BOS is put in twice", "prompt_encoding.py",
        "int(bos is not None and ids[0] != bos)",
        "int(bos is not None)",
        f"{DATA}::test_a_prompt_that_begins_with_bos_gets_no_second_one"),
    fault("prompts are padded on the right", "prompt_encoding.py",
        "[[pad_id] * (length - len(row)) + row for row in rows]",
        "[row + [pad_id] * (length - len(row)) for row in rows]",
        f"{DATA}::test_padding_changes_nothing"),
    fault("a token id one beyond the vocabulary", "prompt_encoding.py",
        "if not 0 <= token < n_words]",
        "if not 0 <= token <= n_words]",
        f"{DATA}::test_a_tokenizer_with_more_words_than_the_model"),
    fault("negative token ids", "prompt_encoding.py",
        "if not 0 <= token < n_words]",
        "if not token < n_words]",
        f"{DATA}::test_bad_prompts"),
    fault("a prompt one longer than the context", "prompt_encoding.py",
        "if length > context:",
        "if length > context + 1:",
        f"{DATA}::test_bad_prompts"),
    fault("pad=False is ignored", "prompt_encoding.py",
        "if is_padded and not pad:",
        "if False:",
        f"{DATA}::test_unpadded_prompts_of_different_lengths"),
    fault("one degenerate pair is all", "prompt_encoding.py",
        "    if all(one or other for",
        "    if any(one or other for",
        f"{DATA}::test_pairs_that_show_nothing"),
    fault("an answer on both sides is not noticed", "prompt_encoding.py",
        "\"an answer is also a wrong answer\": sum(shared),",
        "\"an answer is also a wrong answer\": sum(same_answer),",
        f"{DATA}::test_pairs_that_show_nothing"),
    fault("numbers too large for float32", "prompt_encoding.py",
        "    if not numbers.isfinite().all():",
        "    if False:",
        f"{DATA}::test_bad_prompts_of_numbers"),
    fault("words that the tokenizer does not know", "prompt_encoding.py",
        "            if unk != tokenizer.bos_token_id:",
        "            if False:",
        f"{DATA}::test_bad_prompts"),
    fault("too few prompts are enough", "data.py",
        "if n_prompts <= len(prompts):",
        "if True:",
        f"{DATA}::test_too_few_prompts_and_bad_sizes"),
    fault("test prompts are train prompts", "data.py",
        "slice(n_train, n_train + n_test)",
        "slice(0, n_test)",
        f"{DATA}::test_tokens_answers_and_split"),
    fault("what is left may begin with the prefix again", "data.py",
        "while length > 0 and _begins_again(rows, length, bos):",
        "while False:",
        f"{PREFIX}::test_a_cut_prompt_never_looks_like_a_whole_one"),
    fault("a prefix of the clean prompts alone", "data.py",
        "rows = t.cat([encoded.clean, encoded.corrupt])",
        "rows = encoded.clean",
        f"{DATA}::test_the_last_token_is_no_prefix"),
    fault("padding may be in the prefix", "data.py",
        "is_common &= (encoded.mask == 1).all(dim=0)",
        "pass",
        f"{DATA}::test_padding_is_no_prefix_though_a_prompt_begins_with_that_token"),
    fault("a cache that is not exact is used", "data.py",
        "if is_exact(model, prefix, encoded.clean[0, length:]):",
        "if True:",
        f"{PREFIX}::test_a_prefix_that_is_not_exact_is_not_cut_off"),
)

STATES: tuple[Fault, ...] = (
    fault("autocast acts in a pass of ours", TORCH,
        "stack.enter_context(t.autocast(device_type, enabled=False))",
        "pass",
        TORCH_STATE),
    fault("gradients stay off", TORCH,
        "stack.enter_context(t.enable_grad() if wants_grad else t.no_grad())",
        "pass",
        TORCH_STATE),
    fault("inference mode stays on", TORCH,
        "stack.enter_context(t.inference_mode(False))",
        "pass",
        TORCH_STATE),
    fault("the caller's default dtype counts", TORCH,
        "            t.set_default_dtype(t.float32)\n",
        "            pass\n",
        TORCH_STATE),
    fault("the caller's default device counts", TORCH,
        "stack.enter_context(t.device(\"cpu\"))",
        "pass",
        TORCH_STATE),
    fault("train mode is not restored", TORCH,
        "module.__dict__[\"training\"] = module in in_training",
        "module.__dict__[\"training\"] = False",
        TORCH_STATE),
    fault("dropout that the bridge does not list stays live", TORCH,
        "        waiting.append(module.__dict__.get(\"original_model\"))\n",
        "",
        TORCH_STATE),
    fault("a model given by name keeps its state", TORCH,
        "args[0] if args else kwargs.get(\"model\")",
        "args[0] if args else None",
        "test_torch_state.py::test_a_model_that_is_given_by_name"),
    fault("inference tensors reach autograd", TORCH,
        "return tensor.clone() if tensor.is_inference() else tensor",
        "return tensor",
        TORCH_STATE),
    fault("a metric keeps gradients", "metrics/prune_metrics/prompt_stats.py",
        "@in_own_state(grad=False)\n",
        "@in_own_state()\n",
        METRICS),
    fault("the full model keeps gradients", "metrics/prune_metrics/full_model_outs.py",
        "with own_computation(grad=False):",
        "with own_computation():",
        f"{METRICS}::test_metric_leaves_no_gradients"),
    fault("threads may run a model at once", USE,
        "use.thread not in (None, me) or any(reader != me for reader in readers)",
        "any(reader != me for reader in readers)",
        MODULE_USE),
    fault("hooks come into another thread's plain pass", USE,
        "use.thread not in (None, me) or any(reader != me for reader in readers)",
        "use.thread not in (None, me)",
        MODULE_USE),
    fault("another model's patches act in a pass", USE,
        "if use.patched_by is not None and use.patched_by is not by:",
        "if False:",
        MODULE_USE),
    fault("a patch_mode that was left still patches", USE,
        "            use.patched_by = before\n            use.depth -= 1",
        "            use.depth -= 1",
        MODULE_USE),
    fault("a thread keeps a module that it has left", USE,
        "use.thread = me if use.depth else None",
        "pass",
        MODULE_USE),
    fault("a copied module is in use", USE,
        "        return ModuleUse()\n\n\n@contextmanager",
        "        return self\n\n\n@contextmanager",
        MODULE_USE),
    fault("a bridge and its model are two modules", USE,
        "        module = inner",
        "        return module",
        MODULE_USE),
    fault("a replaced weight is not noticed", "weights.py",
        "if [_stamp(weight) for weight in self._weights()] != self._stamps:",
        "if len(self._weights()) != len(self._stamps):",
        f"{PREFIX}::test_a_fingerprint_notices"),
    fault("a large model is looked at in every other column", "weights.py",
        "total // N_SAMPLED | 1",
        "total // N_SAMPLED",
        f"{PREFIX}::test_a_fingerprint_of_a_large_model_looks_at_every_matrix"),
    fault("a small model is looked at in places", "weights.py",
        "stride = 1 if total <= N_SMALL else",
        "stride = 3 if total <= N_SMALL else",
        f"{PREFIX}::test_a_single_weight_of_a_small_model_is_noticed"),
    fault("versions of weights do not count", "weights.py",
        "return weight.data_ptr(), 0 if weight.is_inference() else weight._version",
        "return weight.data_ptr(), 0",
        f"{PREFIX}::test_a_single_weight_of_a_large_model_is_noticed_if_torch_changes_it"),
    fault("weights of any model are this one's", "weights.py",
        "return self.holds() and all(address in addresses for address, _ in self._stamps)",
        "return self.holds()",
        f"{PREFIX}::test_a_fingerprint_notices"),
    fault("a cache of other weights is this model's", "weights.py",
        "return self.holds() and all(address",
        "return all(address",
        f"{PREFIX}::test_a_fingerprint_notices"),
    fault("a cache that lacks positions is used", "prefix_cache.py",
        "    if lengths != {len(tokens)}:",
        "    if False:",
        f"{PREFIX}::test_a_cache_that_lacks_a_position_is_refused"),
    fault("every cache is exact", "prefix_cache.py",
        "return bool((whole - cached).abs().max() <= rounding)",
        "return True",
        f"{PREFIX}::test_a_cache_that_is_not_exact_is_noticed"),
    fault("a prefix that runs over the end is there", "prefix_cache.py",
        "(found == prefix).all(1) & (places[:, -1] < seq)",
        "(found == prefix).all(1)",
        f"{PREFIX}::test_which_rows_begin_with_a_prefix"),
    fault("a prefix is of nobody's weights", "prefix_cache.py",
        "        WeightFingerprint(model),\n",
        "        None,\n",
        f"{PREFIX}::test_a_prefix_follows_the_weights"),
    fault("a prefix is computed in the caller's state", "prefix_cache.py",
        "@in_own_state(grad=False)\ndef make_prefix_cache(",
        "def make_prefix_cache(",
        f"{PREFIX}::test_a_prefix_is_computed_in_eval_mode"),
    fault("a BOS in each row is padding", "padding.py",
        "            run.zero_()\n",
        "            pass\n",
        PADDING),
    fault("a BOS in some rows is text", "padding.py",
        "if lengths.max() > 1 or lengths.min() != lengths.max():",
        "if lengths.max() > 1:",
        PADDING),
    fault("padding inside of a row is padding", "padding.py",
        "    leading = is_pad.cumprod(1)\n",
        "    leading = is_pad.int()\n",
        PADDING),
    fault("a mask of the tokens and the prefix is refused", "padding.py",
        "not in ((batch, seq), (batch, n_cached + seq)):",
        "not in ((batch, seq),):",
        PREFIX, PADDING, DATA),
)

EXPERIMENT: tuple[Fault, ...] = (
    fault("the seed does not reach the algorithms", SWEEP,
        "        algo.with_seed(seed)\n",
        "        algo\n",
        f"{SWEEPS}::test_the_seed_reaches_what_is_drawn"),
    fault("the seed does not reach the tasks", SWEEP,
        "yield run_task(task.with_seed(seed), algos",
        "yield run_task(task, algos",
        "test_sweep.py::test_the_only_task_of_a_sweep_loads_its_model_once"),
    fault("a seed too few", SWEEP_CONFIG,
        "range(self.seed, self.seed + self.n_seeds)",
        "range(self.seed, self.seed + max(1, self.n_seeds - 1))",
        f"{SWEEPS}::test_the_seed_reaches_what_is_drawn"),
    fault("slow algorithms run for every seed", SWEEP,
        "if seed == config.seed or algo not in once",
        "if True",
        f"{SWEEPS}::test_the_seed_reaches_what_is_drawn"),
    fault("the folder is named after its place", "result_names.py",
        "left_out = {\"out\"} | {",
        "left_out = set() | {",
        f"{SWEEPS}::test_the_folder_is_named_after_all_that_matters"),
    fault("a new field names all old results anew", "result_names.py",
        "left_out = {\"out\"} | {", "left_out = {\"out\"} | set() & {",
        f"{SWEEPS}::test_without_a_model_results_are_called_as_before_there_was_one"),
    fault("the folder is not named after the seed", "result_names.py",
        "left_out = {\"out\"} | {",
        "left_out = {\"out\", \"seed\"} | {",
        f"{SWEEPS}::test_the_folder_is_named_after_all_that_matters"),
    fault("what is lost is what is kept", SWEEP,
        "100 - row.value if is_reversed else row.value",
        "row.value",
        f"{REPORTS}::test_a_reversed_test_counts_what_is_lost"),
    fault("the first size at 80 %, though not for good", SWEEP,
        "edges_for_share(curve, SHARE, target=100, stay=True)",
        "edges_for_share(curve, SHARE, target=100)",
        f"{REPORTS}::test_the_summary_of_several_seeds"),
    fault("80 % of the largest circuit, not of the model", SWEEP,
        "edges_for_share(curve, SHARE, target=100, stay=True)",
        "edges_for_share(curve, SHARE, stay=True)",
        f"{REPORTS}::test_80_percent_are_of_the_model_not_of_the_largest_circuit"),
    fault("the areas of the summary are exchanged", SUMMARY,
        "\"area\": areas[algo].kept,",
        "\"area\": areas[algo].off,",
        f"{REPORTS}::test_the_summary_of_several_seeds"),
    fault("a damaged manifest is read", "store.py",
        "if expected != checksum(manifest):", "if False:", "test_store.py"),
    fault("a damaged file of a cell is read", "store.py",
        "if digest(part) != expected:", "if False:", "test_store.py"),
    fault("another cell's manifest is read", "store.py",
        "if manifest.get(\"key\") != key:", "if False:", "test_store.py"),
    fault("a damaged file of the results is shown in the report", "stored_report.py",
        "elif digest(content) != expected:", "elif False:",
        "test_report.py::test_what_the_folder_has_lost_the_cells_give"),
    fault("the report's texts are HTML", "report_page/rendering.py",
        "autoescape=True,", "autoescape=False,",
        "test_report.py::test_hostile_texts_are_texts"),
    fault("a growing page takes the place of a finished one", "report_page/writing.py",
        "if place.read(REPORT_FILE) is not None:", "if False:",
        "test_report.py::test_the_page_grows_while_the_sweep_runs"),
    fault("a store of another version is read", "store.py",
        "if version != STORE_VERSION:", "if False:", "test_store.py"),
    fault("what another process has finished is computed again", "cells.py",
        "if not self.choice.force and self.store.read(work.cell) is not None:", "if False:",
        "test_cells.py::test_what_is_finished_between_the_look_and_the_claim_is_read"),
    fault("a cell is not claimed", "cells.py",
        "if not claim.enter_context(self.store.claimed(work.cell)):", "if False:",
        "test_cells.py::test_three_processes_share_the_work"),
    fault("defaults of a user's function do not count", "fingerprints.py",
        "described([value.__defaults__, value.__kwdefaults__])", "None",
        "test_fingerprints.py::test_what_a_function_encloses_and_its_defaults_count"),
    fault("what a function encloses does not count", "fingerprints.py",
        "{k: v for k, v in enclosed.items() if v is not value}", "{}",
        "test_fingerprints.py::test_what_a_function_encloses_and_its_defaults_count"),
    fault("weights do not count", "sweep_cells.py",
        "return {\"weights\": weights_description(task), \"prompts\"", "return {\"prompts\"",
        "test_sweep_cells.py::test_a_key_is_made_of_weights_and_prompts_by_what_is_in_them"),
    fault("the seed is not part of a cell", "sweep_cells.py",
        "\"seed\": seed, \"algorithm\": algo_description}",
        "\"algorithm\": algo_description}", "test_sweep_cells.py::"
        "test_cells_of_two_sweeps_are_the_same_if_nothing_changes_their_numbers"),
    fault("the sizes are not part of a cell", "sweep_cells.py",
        "\"sizes\": described(config.test_edges),", "", "test_sweep_cells.py::"
        "test_cells_of_two_sweeps_are_the_same_if_nothing_changes_their_numbers"),
    fault("weights do not count for the benchmark", "mib_cells.py",
        "\"weights\": weights_description(task),", "", f"{MIB}::test_what_changes_a_cell"),
    fault("the prompts of a measurement do not count", "mib_cells.py",
        "measured_on = {\"prompts\": _description(test)}", "measured_on = {}",
        f"{MIB}::test_what_changes_a_cell"),
    fault("the rows of a split do not count", "mib_cells.py",
        "\"rows\": digest(json.dumps(rows).encode())", "\"rows\": 0",
        f"{MIB}::test_what_changes_a_cell"),
    fault("the benchmark's files come at the end", "mib_report.py",
        "if isinstance(finished, MibResult):", "if len(self.outcomes) > 5:",
        f"{MIB}::test_an_interruption_says_what_is_kept"),
    fault("the circuit's share does not count", "paper_cells.py",
        "\"share\": None if share is None else share.hex()", "\"share\": None",
        f"{PAPER}::test_what_changes_a_cell"),
    fault("failed cells of the paper are not named", "paper_report.py",
        "failed = [outcome for outcome in outcomes.values() if outcome.error]",
        "failed = []", f"{PAPER}::test_the_others_go_on"),
    fault("the paper's results are of their place", "paper_report.py",
        "rows = (results.config.json, results", "rows = (results.config, results",
        f"{PAPER}::test_nothing_is_computed_twice"),
    fault("--only does not know algorithms", "cell_runs.py",
        "(not algos or algos & {*of_algo})", "True", f"{MIB}::test_nothing_is_computed_twice"),
    fault("--force is forgotten", "cell_runs.py",
        "force=options.force", "force=False", f"{MIB}::test_nothing_is_computed_twice"),
    fault("each test is as if it were the only one", PAIRED,
        "min(1.0, (len(tested) - place) * p_values[idx])",
        "p_values[idx]",
        "metrics/test_paired_comparisons.py::test_without_a_difference_few_are_claimed"),
    fault("a correction that falls again", PAIRED,
        "highest = max(highest, min(1.0, ",
        "highest = max(0.0, min(1.0, ",
        "metrics/test_paired_comparisons.py"),
    fault("differences on one side only are as far", PAIRED,
        "2 * _n_sums(array, least) / 2 ** len(array)",
        "_n_sums(array, least) / 2 ** len(array)",
        "metrics/test_paired_comparisons.py"),
    fault("ties are not as far", PAIRED,
        "abs(array.sum()) - 1e-9 * np.abs(array).sum()",
        "abs(array.sum()) + 1e-9 * np.abs(array).sum()",
        "metrics/test_paired_comparisons.py"),
    fault("random ways without the one that was found", PAIRED,
        "return (1 + n_as_far) / (1 + N_FLIPS)",
        "return n_as_far / N_FLIPS",
        "metrics/test_paired_comparisons.py"),
    fault("prompts that tasks share are independent", PAIRED,
        "by_draw.setdefault((prompts.get(task, task), seed), [])",
        "by_draw.setdefault((task, seed), [])",
        "metrics/test_paired_comparisons.py"),
    fault("rounding is a difference", PAIRED,
        "abs(difference) > ROUNDING * max(abs(first), abs(second))",
        "True",
        "metrics/test_paired_comparisons.py"),
    fault("the worse one is called the better", COMPARISONS,
        "first_is_better = (one.difference >= 0) ==",
        "first_is_better = (one.difference >= 0) !=",
        "test_comparisons.py"),
    fault("too few draws are no difference", COMPARISONS,
        "if o.can_be_significant and not o.is_significant",
        "if not o.is_significant",
        "test_comparisons.py"),
    fault("tasks on the same prompts are told apart", COMPARISONS,
        "in compare_all(number, by_algo, prompts)",
        "in compare_all(number, by_algo)",
        "test_comparisons.py"),
    fault("bars are of the mean curve, not the mean of the seeds' areas", AREA_FIGURE,
        "for measurements in of_seeds or [task_measurements]",
        "for measurements in [task_measurements]",
        "metrics/test_interval_figures.py"),
    fault("error bars of seeds that lack a task", AREA_FIGURE,
        "set(of_tasks[0]).intersection(*of_tasks)",
        "set(of_tasks[0])",
        "metrics/test_interval_figures.py"),
    fault("a ROC's jump has one height", "metrics/official_circuits/roc_plot.py",
        "max(at_x) if is_above else min(at_x)",
        "max(at_x)",
        "metrics/test_interval_figures.py"),
    fault("all seeds probe with the same gates", PROBING,
        "generator = seeded_generator(config.seed, device)",
        "generator = seeded_generator(0, device)",
        "test_seeds.py"),
    fault("all seeds prune with the same gates", PRUNING,
        "generator = seeded_generator(config.seed, device)",
        "generator = seeded_generator(0, device)",
        "test_seeds.py"),
    fault("the sizes of Matryoshka are drawn from the caller's state", "prune_algos/matryoshka.py",
        "t.rand((), generator=generator)",
        "t.rand(())",
        "test_seeds.py"),
    fault("the seed does not reach the algorithm that one starts from", "prune_algos/prune_algo.py",
        "warm_start.with_seed(seed)",
        "warm_start",
        "test_seeds.py"),
    fault("all seeds have the same prompts", "data.py",
        "random.Random(seed).shuffle(picked)",
        "random.Random(42).shuffle(picked)",
        "test_seeds.py"),
    fault("prompts are shuffled by the caller's state", "data.py",
        "random.Random(seed).shuffle(picked)",
        "random.shuffle(picked)",
        "test_seeds.py"),
    fault("sizes that the graph does not have", SWEEP_CONFIG,
        "        if size > n_edges:\n",
        "        if False:\n",
        "test_experiments.py::test_errors_come_before_long_work"),
    fault("metrics that do not fit are found when they are measured", SWEEP_CONFIG,
        "    if task.seed == config.seed:\n        _check_outputs",
        "    if False:\n        _check_outputs",
        "test_sweep.py::test_metrics_that_do_not_fit_are_found_before_the_first_task_runs"),
    fault("an error does not say what it is about", "errors.py",
        "            error.args = (f\"{what}: {text}\" if text else what,)",
        "            pass",
        SWEEPS),
    fault("edges outside of a circuit are in its file", SWEEP,
        "scores[name].where(mask, t.zeros_like(scores[name]))",
        "scores[name]",
        REPORTS),
    fault("edges of a circuit that score 0 are not in its file", SWEEP,
        "return inside if n_scored == circuit.n_edges else circuit.scores",
        "return inside",
        SWEEPS),
    fault("the whole graph is a circuit that was found", SWEEP,
        "    if circuit.n_edges == task.model.n_edges:\n",
        "    if False:\n",
        REPORTS),
    fault("each curve over its own range of sizes", "metrics/area_under_curve.py",
        "_areas(points, log_x, log_y, y_min, n_edges, full_values[0])",
        "_areas(points, log_x, log_y, y_min, *max(points))"),
    fault("a step has the first circuit's height", "metrics/area_under_curve.py",
        "max(point for point in points if point[0] <= size)[1]",
        "min(point for point in points if point[0] <= size)[1]"),
    fault("what is too much is not off the model", "metrics/area_under_curve.py",
        "sum(w * abs(1 - f) for",
        "sum(w * max(0, 1 - f) for"),
    fault("small sizes without all curves are means too", "metrics/area_under_curve.py",
        "if x >= max(firsts)}",
        "if x >= min(firsts)}"),
    fault("a falling metric never gets to its share", "metrics/area_under_curve.py",
        "(y - baseline) / (goal - baseline) >= share)",
        "y - baseline >= share * (goal - baseline))"),
    fault("reversing twice reverses", "robustness.py",
        "return (self.patch_type == PatchType.TREE_PATCH) != self.reverse_clean_corrupt",
        "return self.patch_type == PatchType.TREE_PATCH",
        f"{ROBUSTNESS}::test_variations_change_one_choice_each"),
    fault("a reversed verdict is what is kept", "robustness.py",
        "100 - percent if tested.reverse_clean_corrupt else percent",
        "percent",
        ROBUSTNESS),
    fault("weights that are missing are random", LOADING,
        "        if keys:\n            raise ModelError(",
        "        if False:\n            raise ModelError(",
        LOADED),
    fault("damaged weights load", LOADING,
        "    if damaged:\n",
        "    if False:\n",
        LOADED),
    fault("a model that is loaded wrong is taken", LOADING,
        "if not error <= _tolerance(model, weight.dtype) * spread:",
        "if False:",
        LOADED),
    fault("four bits lose their gradients in the first pass", "weights.py",
        "module.support_avx512bf16_for_cpu = False",
        "module.support_avx512bf16_for_cpu = True",
        "model_utils/test_bitsandbytes.py"),
    fault("weights that are not there are not missed", "weights.py",
        "if away and any(", "if not away and any(",
        "model_utils/test_bitsandbytes.py"),
    fault("heads of a group are in another order", "model_utils/ungrouped_heads.py",
        "by_head.repeat_interleave(self.group, dim).flatten(dim, dim + 1)",
        "t.cat([by_head] * self.group, dim).flatten(dim, dim + 1)",
        UNGROUPED),
    fault("cached keys come after a head's own", "model_utils/ungrouped_heads.py",
        "return t.cat([cached, own], 2)",
        "return t.cat([own, cached], 2)",
        UNGROUPED),
    fault("scores of prompts in another order", "prune_algos/prompt_scores.py",
        "self.parts.append(part)",
        "self.parts.insert(0, part)"),
    fault("candidates that stay rank with those that go", "prune_algos/acdc_after_eap.py",
        "edge.set_prune_score(scores, math.inf)",
        "edge.set_prune_score(scores, max(config.thresholds))",
        f"{ACDC}::test_the_quick_variant_is_acdc_on_small_graphs"),
    fault("edges outside of the candidates stay", "prune_algos/acdc_after_eap.py",
        "only_edges=True",
        "only_edges=False",
        f"{ACDC}::test_edges_that_are_no_candidates_are_patched_from_the_beginning"),
)

OTHERS: tuple[Fault, ...] = (
    fault("knocked out is all that is above, not the circuit's", KNOCKOUTS,
        "as_circuit(task.model, circuit).intersection(above)",
        "as_circuit(task.model, above)",
        KNOCKED_OUT),
    fault("a score at the threshold is knocked out", KNOCKOUTS,
        "scores > knockout_threshold",
        "scores >= knockout_threshold",
        KNOCKED_OUT),
    fault("the circuit without knockouts is compared with the whole model", KNOCKOUTS,
        "_kl_div(task, circuit_without_outs, model_without)",
        "_kl_div(task, circuit_without_outs, full)",
        KNOCKED_OUT),
    fault("the model without the circuit", KNOCKOUTS,
        "[circuit, knockouts.complement(), circuit.without(knockouts)]",
        "[circuit, circuit.complement(), circuit.without(knockouts)]",
        KNOCKED_OUT),
    fault("the share of the smaller circuit", "metrics/prune_scores_similarity.py",
        "larger = max(int(first.sum()), int(second.sum()))",
        "larger = min(int(first.sum()), int(second.sum()))",
        "metrics/test_prune_scores_similarity.py"),
    fault("modules in another order are other edges", "metrics/prune_scores_similarity.py",
        "for name in sorted(mask)}",
        "for name in mask}",
        "metrics/test_prune_scores_similarity.py"),
    fault("negative scores are drawn as positive ones", FIGURES,
        "color=POSITIVE_COLOR if score > 0 else NEGATIVE_COLOR",
        "color=POSITIVE_COLOR",
        DRAWN),
    fault("links are as wide as signed scores", FIGURES,
        "value=min(abs(score), style.widest)",
        "value=min(score, style.widest)",
        DRAWN),
    fault("queries are not joined to their heads", FIGURES,
        "    return links + _joins(links, joined)",
        "    return links",
        DRAWN),
    fault("caches that are damaged are read", "caches.py",
        "if metadata[CHECKSUM_KEY] != _checksum(text, tensors):",
        "if False:",
        f"{BAD_INPUT}::test_damaged_caches"),
    fault("damaged caches without tensors are read", "caches.py",
        "if found[\"checksum\"] != checksum(found[\"tree\"]):",
        "if False:",
        f"{BAD_INPUT}::test_damaged_caches"),
    fault("a tuple comes back as a list", "caches.py",
        "return tuple(_from_tree(item, tensors) for item in content)",
        "return [_from_tree(item, tensors) for item in content]",
        "utils/test_misc.py"),
    fault("a tensor of the same name overwrites", "caches.py",
        "    while name in tensors:\n        name += \"'\"\n",
        "",
        "utils/test_misc.py"),
    fault("a forward that stood in stays", "modules.py",
        "        del module.__dict__[\"forward\"]\n        if before is not None:",
        "        if before is not None:",
        STATE, SESSION),
    fault("the rank of a token counts itself", "utils/misc.py",
        "(logits > logits[token_id]).sum()",
        "(logits >= logits[token_id]).sum()",
        "utils/test_misc.py"),
)
# fmt: on

FAULTS = (
    *(*ENGINE, *ALGORITHMS, *NUMBERS, *FILES),
    *(*INPUTS, *STATES, *EXPERIMENT, *OTHERS),
)


# ---------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """What the tests say: their exit status, the test that failed first, why, and the time."""

    status: int | None
    failed: str
    why: str
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
        r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", output.read_text(), re.MULTILINE
    )
    failed, why = (found[1], found[2] or "") if found else ("", "")
    if status is None:
        failed, why = "it hangs", ""
    return Outcome(status, failed, why, time.monotonic() - start)


def _tests_in_child(
    copy: Path, tests: Sequence[str], output: Path, options: Iterable[str]
) -> int:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(copy)
    os.environ["COLUMNS"] = "300"  # so that why a test fails is not cut off
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
        is_caught = outcome.is_caught
        if outcome.status is None:  # on a busy machine all tests take long
            is_caught = run_tests(self.copy, item.tests, *left_out).status is not None
        verdict = "caught" if is_caught else "MISSED"
        by = outcome.failed.removeprefix("tests/") or f"status {outcome.status}"
        line = f"{outcome.seconds:5.1f} s  {verdict}  {item.file}: {item.name}  <- {by}"
        print(f"{line}  {outcome.why}".rstrip(), flush=True)
        return is_caught

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
