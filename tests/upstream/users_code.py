"""Code as users of auto-circuit 1.0.1 write it; it runs there and here without a change.

Each function takes a model (as `load_tl_model` gives it) and returns named numbers.
`make_expected.py` runs them in the published version's environment and stores the numbers;
`test_contract_parity.py` runs them on ours. Only published names and parameters are used.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

import torch as t

from auto_circuit.data import PromptDataLoader, PromptDataset, load_datasets_from_json
from auto_circuit.metrics.area_under_curve import measurements_auc
from auto_circuit.metrics.completeness_metrics.same_under_knockouts import (
    same_under_knockout,
)
from auto_circuit.metrics.official_circuits.circuits.docstring_official import (
    docstring_node_based_official_edges,
    docstring_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.greaterthan_official import (
    greaterthan_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.ioi_official import (
    ioi_head_based_official_edges,
    ioi_true_edges,
    ioi_true_edges_mlp_0_only,
)
from auto_circuit.metrics.official_circuits.measure_roc import measure_task_roc
from auto_circuit.metrics.prune_metrics.answer_diff import measure_answer_diff
from auto_circuit.metrics.prune_metrics.answer_diff_percent import answer_diff_percent
from auto_circuit.metrics.prune_metrics.answer_value import measure_answer_val
from auto_circuit.metrics.prune_metrics.correct_answer_percent import (
    measure_correct_ans_percent,
)
from auto_circuit.metrics.prune_metrics.kl_div import measure_kl_div
from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRICS
from auto_circuit.metrics.prune_scores_similarity import prune_score_similarities
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.ACDC import acdc_prune_scores
from auto_circuit.prune_algos.activation_magnitude import (
    activation_magnitude_prune_scores,
)
from auto_circuit.prune_algos.circuit_probing import circuit_probing_prune_scores
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.ground_truth import ground_truth_prune_scores
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.prune_algos.subnetwork_probing import subnetwork_probing_prune_scores
from auto_circuit.tasks import Task
from auto_circuit.types import AblationType, EdgeCounts, PatchType
from auto_circuit.utils.ablation_activations import batch_src_ablations, src_ablations
from auto_circuit.utils.graph_utils import (
    edge_counts_util,
    patch_mode,
    patchable_model,
    set_all_masks,
    set_mask_batch_size,
    train_mask_mode,
)
from auto_circuit.utils.tensor_ops import (
    batch_answer_diff_percents,
    batch_answer_diffs,
    batch_avg_answer_diff,
    batch_avg_answer_val,
    correct_answer_greater_than_incorrect_proportion,
    correct_answer_proportion,
    desc_prune_scores,
    multibatch_kl_div,
    prune_scores_threshold,
)
from auto_circuit.visualize import draw_seq_graph
from tests.upstream.parity_models import (
    BATCH_SIZE,
    POCKET_PROMPTS,
    SEQ_LEN,
    edges_by_name,
    numbered_scores,
    prompts,
)

Numbers = dict[str, list[float]]
PER_BATCH = (
    AblationType.RESAMPLE,
    AblationType.BATCH_TOKENWISE_MEAN,
    AblationType.BATCH_ALL_TOK_MEAN,
)


def loader(several_answers: str = "one", seq_len: int | None = None) -> PromptDataLoader:
    return PromptDataLoader(
        PromptDataset(*prompts(several_answers)), seq_len, 0, batch_size=BATCH_SIZE
    )


def scores_of_edges(model: Any, scores: dict[str, t.Tensor]) -> list[float]:
    return [
        scores[edge.dest.module_name][edge.patch_idx].item()
        for edge in edges_by_name(model)
    ]


def values(measurements: Iterable[tuple[float, float]]) -> list[float]:
    return [number for pair in measurements for number in pair]


def some_sizes(model: Any) -> list[int]:
    return [0, 3, model.n_edges // 3, model.n_edges]


def some_numbers(tensor: t.Tensor) -> list[float]:
    """A few of many numbers, and their sum of squares."""
    flat = tensor.detach().double().flatten()
    return [*flat[:: max(1, len(flat) // 8)].tolist(), flat.square().sum().item()]


# ---- Patching and activations


def graph_and_ablations(model: Any) -> Numbers:
    found = {
        "counts": [float(len(part)) for part in (model.edges, model.srcs, model.dests)],
        "clean": some_numbers(model(prompts().clean)),
    }
    batches = loader(seq_len=model.seq_len)
    first = next(iter(batches))
    for ablation in AblationType:
        sample = batches if ablation.mean_over_dataset else first.corrupt
        found[f"src_ablations/{ablation.name}"] = some_numbers(
            src_ablations(model, sample, ablation)
        )
        side = "corrupt" if ablation in PER_BATCH else None
        by_batch = batch_src_ablations(model, batches, ablation, side)
        found[f"batch_src_ablations/{ablation.name}"] = [
            number for batch in batches for number in some_numbers(by_batch[batch.key])
        ]
    return found


def patch_some_edges(model: Any) -> Numbers:
    batch = next(iter(loader(seq_len=model.seq_len)))
    ablations = src_ablations(model, batch.corrupt, AblationType.RESAMPLE)
    edges = edges_by_name(model)
    found: Numbers = {}
    for idx in range(0, len(edges), max(1, len(edges) // 10)):
        with patch_mode(model, ablations, [edges[idx]]):
            found[f"one/{idx}"] = some_numbers(model(batch.clean))
    with patch_mode(model, ablations, [edge.name for edge in edges[::3]]):
        found["by name"] = some_numbers(model(batch.clean))
    for value in (0.3, 1.0):
        set_all_masks(model, value)
        with patch_mode(model, ablations):
            found[f"all at {value}"] = some_numbers(model(batch.clean))
    set_all_masks(model, 0.0)
    return found


# ---- Discovery


def mask_gradients(model: Any) -> Numbers:
    found: Numbers = {}
    for grad, answer in product(
        ("logit", "prob", "logprob", "logit_exp"), ("avg_diff", "avg_val")
    ):
        scores = mask_gradient_prune_scores(
            model, loader(seq_len=model.seq_len), None, grad, answer, mask_val=0.0
        )
        found[f"{grad}/{answer}"] = scores_of_edges(model, scores)
    for mask_val in (0.5, 1.0):
        scores = mask_gradient_prune_scores(
            model, loader(seq_len=model.seq_len), None, "logit", "avg_diff", mask_val
        )
        found[f"mask {mask_val}"] = scores_of_edges(model, scores)
    for several in ("equal", "ragged"):
        scores = mask_gradient_prune_scores(
            model, loader(several, model.seq_len), None, "logprob", "avg_diff", 0.0
        )
        found[f"{several} answers"] = scores_of_edges(model, scores)
    for ablation in AblationType:
        side = "corrupt" if ablation in PER_BATCH else None
        scores = mask_gradient_prune_scores(
            *(model, loader(seq_len=model.seq_len), None, "logit", "avg_diff", 0.0),
            ablation_type=ablation,
            clean_corrupt=side,
        )
        found[ablation.name] = scores_of_edges(model, scores)
    return found


def integrated_gradients(model: Any) -> Numbers:
    scores = mask_gradient_prune_scores(
        *(model, loader(seq_len=model.seq_len), None, "logit", "avg_diff"),
        integrated_grad_samples=N_SAMPLES,
    )
    return {"scores": scores_of_edges(model, scores)}


N_SAMPLES = 4


def edge_attribution(model: Any) -> Numbers:
    batches = loader(seq_len=model.seq_len)
    return {
        name: scores_of_edges(
            model, edge_attribution_patching_prune_scores(model, batches, None, diff)
        )
        for name, diff in (("difference", True), ("value", False))
    }


def activation_magnitude(model: Any) -> Numbers:
    scores = activation_magnitude_prune_scores(model, loader(seq_len=model.seq_len), None)
    return {"scores": scores_of_edges(model, scores)}


def acdc(model: Any) -> Numbers:
    found: Numbers = {}
    targets: dict[Any, list[int]] = {"kl_div": [-3, -2, -1], "mse": [-2, -1, 0]}
    for target, exponents in targets.items():
        scores = acdc_prune_scores(
            *(model, loader(seq_len=model.seq_len), None),
            tao_exps=exponents,
            tao_bases=[3],
            faithfulness_target=target,
        )
        found[target] = scores_of_edges(model, scores)
        flat = t.cat([value.flatten() for value in scores.values()])
        found[f"{target}/never removed"] = [float(flat.isinf().sum())]
        counts = edge_counts_util(model.edges, prune_scores=scores)
        found[f"{target}/sizes"] = [float(count) for count in counts]
    return found


def subnetwork_probing(model: Any) -> Numbers:
    found: Numbers = {}
    for target in ("kl_div", "answer", "wrong_answer", "logit_diff_percent"):
        for size in (None, 5):
            scores = subnetwork_probing_prune_scores(
                *(model, loader(seq_len=model.seq_len), None),
                learning_rate=0.1,
                epochs=5,
                regularize_lambda=0.5,
                mask_fn="sigmoid",
                circuit_size=size,
                tree_optimisation=True,
                faithfulness_target=target,
            )
            found[f"{target}/size {size}"] = scores_of_edges(model, scores)
    return found


def circuit_probing(model: Any) -> Numbers:
    scores = circuit_probing_prune_scores(
        *(model, loader(seq_len=model.seq_len), None),
        learning_rate=0.1,
        epochs=5,
        regularize_lambda=0.5,
        mask_fn="sigmoid",
        circuit_sizes=[3, 10],
        tree_optimisation=True,
    )
    return {"scores": scores_of_edges(model, scores)}


def prompt_gradients(model: Any) -> Numbers:
    batch = next(iter(loader(seq_len=model.seq_len)))
    ablations = src_ablations(model, batch.corrupt, AblationType.RESAMPLE)
    found: Numbers = {}
    with set_mask_batch_size(model, BATCH_SIZE), train_mask_mode(model):
        set_all_masks(model, 0.0)
        with patch_mode(model, ablations):
            batch_avg_answer_diff(model(batch.clean)[model.out_slice], batch).backward()
        gradients: dict[str, t.Tensor] = {
            wrapper.module_name: wrapper.patch_mask.grad.detach().clone()
            for wrapper in model.dest_wrappers
        }
    for idx in range(BATCH_SIZE):
        rows = {name: gradient[idx] for name, gradient in gradients.items()}
        found[f"prompt {idx}"] = scores_of_edges(model, rows)
    return found


# ---- Circuits and their metrics


def circuits(model: Any) -> Numbers:
    scores, sizes = numbered_scores(model), some_sizes(model)
    found: Numbers = {}
    for ablation, patch_type, is_reversed in product(
        AblationType, PatchType, (False, True)
    ):
        batches = loader(seq_len=model.seq_len)
        outs = run_circuits(
            *(model, batches, sizes, scores, patch_type, ablation),
            reverse_clean_corrupt=is_reversed,
        )
        name = f"{ablation.name}/{patch_type.name}/{is_reversed}"
        found[name] = [
            number
            for size in sorted(outs)
            for number in (float(size), *last_two(outs[size], batches))
        ]
    return found


def last_two(outs: dict[int, t.Tensor], batches: PromptDataLoader) -> list[float]:
    total = t.stack([outs[batch.key].double() for batch in batches])
    return [total.mean().item(), total.std().item(), total.flatten()[5].item()]


def metrics(model: Any) -> Numbers:
    found: Numbers = {}
    for several in ("one", "equal", "ragged"):
        batches = loader(several, model.seq_len)
        outs = run_circuits(model, batches, some_sizes(model), numbered_scores(model))
        inputs = (model, batches, outs)
        for func in ("logits", "softmax", "log_softmax"):
            name = f"{several}/{func}"
            found[f"{name}/value"] = values(measure_answer_val(*inputs, func))
            found[f"{name}/wrong"] = values(measure_answer_val(*inputs, func, True))
            found[f"{name}/difference"] = values(measure_answer_diff(*inputs, func))
            for of_means in (True, False):
                means, stds, points = answer_diff_percent(*inputs, func, of_means)
                found[f"{name}/percent/{of_means}"] = [
                    *values(means),
                    *values(stds),
                    *(number for _, all_of in points for number in as_list(all_of)),
                ]
        for clean in (True, False):
            found[f"{several}/kl/{clean}"] = values(measure_kl_div(*inputs, clean))
    batches = loader(seq_len=model.seq_len)
    outs = run_circuits(model, batches, some_sizes(model), numbered_scores(model))
    for among in (True, False):
        found[f"correct/{among}"] = values(
            measure_correct_ans_percent(model, batches, outs, among)
        )
    return found


def as_list(points: Any) -> list[float]:
    return points.flatten().tolist() if isinstance(points, t.Tensor) else list(points)


def predefined_metrics(model: Any) -> Numbers:
    """Metrics that the published version predefines, by key."""
    batches = loader(seq_len=model.seq_len)
    outs = run_circuits(
        *(model, batches, some_sizes(model), numbered_scores(model)),
        PatchType.TREE_PATCH,
    )
    by_key = {metric.key: metric for metric in PRUNE_METRICS}
    return {
        key: values(by_key[key].metric_func(model, batches, outs))
        for key in PUBLISHED_METRICS
    }


PUBLISHED_METRICS = (
    "Clean KL Div",
    "Corrupt KL Div",
    "Answer Prob",
    "Answer Logit",
    "Wrong Answer Logit",
    "Logit Diff",
    "Prob Diff",
    "Logit Diff Percent",
    "Prob Diff Percent",
    "LogProb Diff Percent",
    "Correct Answer Percent",
    "Correct Answer Greater Than Incorrect Percent",
)


def tensor_functions(model: Any) -> Numbers:
    found: Numbers = {}
    for several in ("one", "equal", "ragged"):
        for number, batch in enumerate(loader(several, model.seq_len)):
            logits = model(batch.clean)[model.out_slice]
            other = model(batch.corrupt)[model.out_slice]
            name = f"{several}/{number}"
            found[f"{name}/value"] = [
                batch_avg_answer_val(logits, batch).item(),
                batch_avg_answer_val(logits, batch, wrong_answer=True).item(),
                batch_avg_answer_diff(logits, batch).item(),
            ]
            found[f"{name}/each"] = [
                *batch_answer_diffs(logits, batch).tolist(),
                *batch_answer_diff_percents(other, logits, batch).tolist(),
            ]
            found[f"{name}/kl"] = [
                multibatch_kl_div(other.log_softmax(-1), logits.log_softmax(-1)).item()
            ]
            if several == "one":
                found[f"{name}/correct"] = [
                    correct_answer_proportion(logits, batch).item(),
                    correct_answer_greater_than_incorrect_proportion(
                        logits, batch
                    ).item(),
                ]
    scores = numbered_scores(model)
    found["descending"] = desc_prune_scores(scores).tolist()
    found["thresholds"] = [
        float(prune_scores_threshold(scores, count)) for count in (1, 2, 7)
    ]
    return found


def sizes_and_areas(model: Any) -> Numbers:
    edges, scores = model.edges, numbered_scores(model)
    constant = {name: t.ones_like(value) for name, value in scores.items()}
    grouped = {name: (value.abs() / 9).floor() for name, value in scores.items()}
    one_circuit = ground_truth_prune_scores(
        model, loader(seq_len=model.seq_len), set(edges_by_name(model)[:5])
    )
    cases: dict[str, tuple[Any, ...]] = {
        "default": (),
        "all": (EdgeCounts.ALL,),
        "logarithmic": (EdgeCounts.LOGARITHMIC,),
        "logarithmic, no ends": (EdgeCounts.LOGARITHMIC, None, False, False),
        "numbers and shares": ([0.0, 2, 0.5, 1.0],),
        "two": ([3, 7],),
        "groups": (EdgeCounts.GROUPS, grouped),
        "groups, no ends": (EdgeCounts.GROUPS, grouped, False, False),
        "default with scores": (None, scores),
        "default with groups": (None, grouped),
        "constant": (None, constant),
        "constant, with ends": (EdgeCounts.GROUPS, constant, True, True),
        "constant, no ends": (EdgeCounts.GROUPS, constant, False, False),
        "one circuit": (None, one_circuit),
        "one circuit and its size": (None, one_circuit, None, None, 5),
        "known size": (EdgeCounts.LOGARITHMIC, None, None, None, 11),
    }
    found = {
        f"sizes/{name}": [float(count) for count in edge_counts_util(edges, *arguments)]
        for name, arguments in cases.items()
    }
    rising: list[tuple[float, float]] = [
        (0, 0.1),
        (1, 0.4),
        (3, 1.5),
        (10, 2.5),
        (40, 3.0),
    ]
    for log_x in (False, True):
        found[f"area/{log_x}"] = [measurements_auc(rising, log_x, False, None)]
    official = set(edges_by_name(model)[::4])
    for all_edges in (False, True):
        found[f"roc/{all_edges}"] = values(
            measure_task_roc(model, official, scores, all_edges)
        )
    shifted = {name: value + 8 for name, value in scores.items()}
    similar = prune_score_similarities({"a": scores, "b": shifted}, [2, 7, 20])
    found["similarity"] = [
        similar[size][one][other]
        for size in (2, 7, 20)
        for one, other in (("a", "a"), ("a", "b"), ("b", "b"))
    ]
    return found


def drawn_edges(model: Any) -> Numbers:
    """How many edges a figure shows, and how thick they are, for some thresholds."""
    scores = numbered_scores(model)
    found: Numbers = {}
    for threshold in (0.0, 5.0, float(model.n_edges - 2)):
        figure = draw_seq_graph(model, scores, threshold, display_ipython=False)
        thickness = sorted(
            value for sankey in figure.data for value in sankey.link.value if value > 1e-3
        )
        found[f"threshold {threshold}"] = [float(len(thickness)), sum(thickness)]
    return found


# ---- A task with a tokenizer, a prefix cache, and positions


def loaded_prompts(model: Any) -> Iterator[tuple[str, Any, PromptDataLoader]]:
    """model: with a tokenizer. The same prompts with and without a prefix cache."""
    for name, tail in (("whole", False), ("tail", True)):
        _, test_loader = load_datasets_from_json(
            model,
            POCKET_PROMPTS,
            device=t.device("cpu"),
            prepend_bos=True,
            batch_size=4,
            train_test_size=(8, 8),
            return_seq_length=True,
            tail_divergence=tail,
        )
        graph = patchable_model(
            model,
            factorized=True,
            slice_output="last_seq",
            seq_len=test_loader.seq_len,
            separate_qkv=True,
            kv_caches=(test_loader.kv_cache,),
        )
        yield name, graph, test_loader


def prefix_cache(model: Any) -> Numbers:
    found: Numbers = {}
    for name, graph, batches in loaded_prompts(model):
        found[f"{name}/loader"] = [
            float(batches.seq_len or 0),
            float(batches.diverge_idx),
        ]
        found[f"{name}/words"] = [float(idx) for idx in batches.word_idxs.values()]
        for number, batch in enumerate(batches):
            found[f"{name}/{number}/tokens"] = batch.clean.flatten().double().tolist()
            found[f"{name}/{number}/answers"] = batch.answers.flatten().double().tolist()
            found[f"{name}/{number}/logits"] = some_numbers(
                graph(batch.clean)[graph.out_slice]
            )
            found[f"{name}/{number}/corrupt"] = some_numbers(
                graph(batch.corrupt)[graph.out_slice]
            )
    return found


def pocket_task(model: Any) -> Numbers:
    task = Task(
        key="Pocket of a user",
        name="Pocket of a user",
        batch_size=8,
        batch_count=2,
        token_circuit=False,
        _model_def=model,
        _dataset_name="pocket/ioi_single_template_prompts",
    )
    graph = task.model
    gradients = mask_gradient_prune_scores(
        graph, task.train_loader, None, "logit", "avg_diff", mask_val=0.0
    )
    scores = scores_of_edges(graph, gradients)
    best = sorted(range(len(scores)), key=lambda idx: -abs(scores[idx]))[:40]
    found = {
        "best edges": [float(idx) for idx in best],
        "their scores": [scores[idx] for idx in best],
        "sum": [sum(scores)],
    }
    numbered = numbered_scores(graph)
    for ablation in (AblationType.RESAMPLE, AblationType.TOKENWISE_MEAN_CORRUPT):
        outs = run_circuits(
            *(graph, task.test_loader, [0, 30, 300, graph.n_edges], numbered),
            PatchType.TREE_PATCH,
            ablation,
        )
        inputs = (graph, task.test_loader, outs)
        found[f"{ablation.name}/difference"] = values(
            measure_answer_diff(*inputs, "logits")
        )
        found[f"{ablation.name}/kl"] = values(measure_kl_div(*inputs))
    knockouts = {name: (value / 40).round() for name, value in numbered.items()}
    for threshold in (0.5, 9.5):
        circuit = same_under_knockout(task, numbered, knockouts, 200, threshold)
        found[f"knockouts/{threshold}"] = [
            float(number) for row in circuit for number in row
        ]
    return found


# ---- Known circuits, on graphs of the right shape


def gpt2_circuits(model: Any) -> Numbers:
    words = {"IO": 2, "S1": 4, "S1+1": 5, "S2": 10, "end": 14}
    functions = (ioi_true_edges, ioi_true_edges_mlp_0_only, ioi_head_based_official_edges)
    found: Numbers = {}
    for prefix in (0, 2):
        graph = patchable_model(model, True, "last_seq", 15 - prefix, True)
        for function in functions:
            found[f"{function.__name__}/prefix {prefix}"] = names_of(
                function(graph, True, words, prefix)
            )
    graph = patchable_model(model, True, "last_seq", None, True)
    for function in (*functions, greaterthan_true_edges):
        found[f"{function.__name__}/all"] = names_of(function(graph, word_idxs=words))
    for is_factorized in (True, False):
        graph = patchable_model(model, is_factorized, "last_seq", None, False)
        found[f"heads/{is_factorized}"] = names_of(ioi_head_based_official_edges(graph))
    return found


def docstring_circuits(model: Any) -> Numbers:
    words = {"A_def": 11, "B_def": 13, ",_B": 14, "C_def": 15}
    words |= {"A_doc": 27, "param_2": 33, "B_doc": 34, "param_3": 40}
    found: Numbers = {}
    for seq_len in (None, 41):
        graph = patchable_model(model, True, "last_seq", seq_len, True)
        for function in (docstring_true_edges, docstring_node_based_official_edges):
            found[f"{function.__name__}/{seq_len}"] = names_of(
                function(graph, seq_len is not None, words)
            )
    return found


def names_of(edges: Iterable[Any]) -> list[float]:
    """How many edges they are, and a checksum of their positions and names."""
    names = sorted(f"{edge.seq_idx} {edge.name}" for edge in edges)
    return [float(len(names)), float(zlib.crc32("\n".join(names).encode()) % 2**20)]


CASES: dict[str, Callable[[Any], Numbers]] = {
    case.__name__: case
    for case in (
        graph_and_ablations,
        patch_some_edges,
        mask_gradients,
        integrated_gradients,
        edge_attribution,
        activation_magnitude,
        prompt_gradients,
        subnetwork_probing,
        circuits,
        metrics,
        acdc,
        circuit_probing,
        predefined_metrics,
        tensor_functions,
        sizes_and_areas,
        drawn_edges,
    )
}
POCKET_CASES: dict[str, Callable[[Any], Numbers]] = {
    case.__name__: case for case in (prefix_cache, pocket_task)
}
KNOWN_CIRCUIT_CASES: dict[str, Callable[[Any], Numbers]] = {
    case.__name__: case for case in (gpt2_circuits, docstring_circuits)
}

GRAPHS: dict[str, dict[str, Any]] = {
    "qkv": {"factorized": True, "separate_qkv": True},
    "qkv, positions": {"factorized": True, "separate_qkv": True, "seq_len": SEQ_LEN},
    "heads": {"factorized": True, "separate_qkv": False},
    "not factorized": {"factorized": False, "separate_qkv": False},
}
ANY_GRAPH = [*CASES][:8]
RANDOM_MODEL_CASES: dict[str, list[str]] = {
    "gpt2/qkv": [*CASES],
    "gpt2/qkv, positions": [*ANY_GRAPH, "drawn_edges"],
    "gpt2/heads": [*ANY_GRAPH, "circuits", "acdc"],
    "gpt2/not factorized": [*ANY_GRAPH, "circuits"],
    "attention only/qkv": [*ANY_GRAPH, "circuits", "metrics", "acdc"],
    "attention only/heads": ANY_GRAPH,
}
"""What runs on which model and graph: enough to see every kind of number on each."""


def graph_of(model: Any, graph: str) -> Any:
    return patchable_model(model, slice_output="last_seq", **GRAPHS[graph])
