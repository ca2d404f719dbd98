"""The explorer's data: what it shows of a task, against independent computations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as t
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from auto_circuit.circuits import circuit_of_scores
from auto_circuit.errors import DataError, GraphError
from auto_circuit.explorer import plain_data
from auto_circuit.explorer.data import AlgorithmView, TaskView, algorithm_view
from auto_circuit.explorer.model_view import direct_logit_effects
from auto_circuit.explorer.task_view import task_view
from auto_circuit.prune import run_circuits
from auto_circuit.tasks import (
    POCKET_DOCSTRING_TASK,
    POCKET_IOI_TASK,
    TRACR_REVERSE_TOKEN_CIRCUIT_TASK,
    TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK,
    Task,
)
from auto_circuit.types import MeasurementRow, PruneScores
from tests.explorer.views import micro_task
from tests.models import (
    ARCHITECTURES,
    D_MODEL,
    MORE_ARCHITECTURES,
    N_CTX,
    N_HEADS,
    N_LAYERS,
    SIZES,
    VOCAB,
    randomize,
    state_snapshot,
    tokens,
)

N_TOKENS = 5
HOSTILE = ["<script>alert(1)</script>", "\u202eright", 'quo"te', "\U0001f600", "&amp;"]


def prompt_file(folder: Path, **fields: Any) -> Path:
    """Prompts of random token ids, each with the same first token."""
    sides = tokens(12, N_TOKENS).tolist()
    prompts = [
        {
            "clean": [1, *sides[i][1:]],
            "corrupt": [1, *sides[i + 1][1:]],
            "answers": [sides[i][0]],
            "wrong_answers": [(sides[i][0] + 1) % VOCAB],
        }
        for i in range(0, 12, 2)
    ]
    path = folder / "prompts.json"
    path.write_text(json.dumps({"prompts": prompts, **fields}))
    return path


def id_task(folder: Path, name: str, token_circuit: bool = False) -> Task:
    return Task(
        key=f"{name} by ids",
        name="Task of ids",
        batch_size=3,
        batch_count=1,
        token_circuit=token_circuit,
        _model_def=ARCHITECTURES[name](),
        seed=1,
        _dataset_name=prompt_file(folder, seq_labels=HOSTILE),
    )


def random_scores(task: Task, seed: int = 0, n_values: int = 0) -> PruneScores:
    """Random scores, of `n_values` different sizes (0: all different)."""
    generator = t.Generator().manual_seed(seed)
    scores = {}
    for name, like in task.model.new_prune_scores().items():
        values = t.randn(like.shape, generator=generator)
        scores[name] = (values * n_values).round() / n_values if n_values else values
    return scores


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return id_task(tmp_path_factory.mktemp("ids"), "gpt2", token_circuit=True)


@pytest.fixture(scope="module")
def view(task: Task) -> TaskView:
    return task_view(task)


def rows_of(sizes: dict[int, list[float]]) -> list[MeasurementRow]:
    """Values of each size, one for each seed."""
    return [
        MeasurementRow(
            "Task", "A", "Logit Diff Percent", "R", "T", size, value, seed=seed
        )
        for size, values in sizes.items()
        for seed, value in enumerate(values)
    ]


# -------------------------------------------------------------------------------- graph


def test_edges_are_those_of_the_model_in_its_order(task: Task, view: TaskView) -> None:
    names = [view.graph.edge_name(edge) for edge in range(view.graph.n_edges)]
    assert names == [repr(edge) for edge in task.model.edges]
    assert view.graph.n_positions == N_TOKENS
    assert view.graph.position_labels == tuple(HOSTILE)


def test_a_head_is_drawn_once_with_its_inputs_and_its_output(view: TaskView) -> None:
    graph = view.graph
    node = {source.name: source.node for source in graph.sources}
    for destination in graph.destinations:
        if destination.name.endswith((".Q", ".K", ".V")):
            assert destination.node == node[destination.name[:-2]]
    names = [one.name for one in graph.nodes]
    assert len(set(names)) == len(names) and "A1.3" in names and "MLP 0" in names
    assert names.count("Resid Start") == names.count("Resid End") == 1


def test_scores_are_in_the_order_of_the_edges(task: Task, view: TaskView) -> None:
    scores = random_scores(task)
    flat = view.graph.flat_scores(scores)
    expected = [float(edge.prune_score(scores)) for edge in task.model.edges]
    assert flat.tolist() == expected and len(set(expected)) > 100


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_edges_through_attention_come_after_all_others(name: str, tmp_path: Path) -> None:
    """They join the drawn heads at two positions, and have their own scores."""
    task = replace(
        id_task(tmp_path, "gpt2", token_circuit=True),
        _model_def=ARCHITECTURES[name](),
        crossing=True,
    )
    graph, edges = task_view(task).graph, {repr(e): e for e in task.model.edges}
    names = [graph.edge_name(edge) for edge in range(graph.n_edges)]
    assert sorted(names) == sorted(edges)
    scores = random_scores(task)
    expected = [float(edges[one].prune_score(scores)) for one in names]
    assert graph.flat_scores(scores).tolist() == expected
    for place in range(graph.n_from_sources, graph.n_edges, 7):
        edge, crossing = edges[names[place]], graph.crossing(place)
        assert crossing is not None and edge.is_crossing
        head, to, come_from = crossing
        assert (to, come_from) == (edge.seq_idx, edge.src.src_idx)
        assert graph.nodes[head.node].name == f"A{head.name[1:].split()[0]}"
        assert graph.drawn_ends(place) == (head.source_node, head.node)
    read = graph.nodes[graph.crossings[0].source_node].name
    assert read == ("A0.0" if name == "gpt2" else "A0.0.K")
    assert graph.crossing(0) is None
    with pytest.raises(GraphError, match="of the heads of"):
        graph.flat_scores({**scores, graph.crossings[0].module: t.ones(4, 1)})


def test_spans_are_named_and_show_their_words(tmp_path: Path) -> None:
    labels = ["start", "start", *["rest"] * (N_TOKENS - 2)]
    task = replace(
        id_task(tmp_path, "gpt2"),
        span_circuit=True,
        _dataset_name=prompt_file(tmp_path, seq_labels=labels),
    )
    graph = task_view(task).graph
    assert graph.position_labels == ("start", "rest") and graph.n_positions == 2
    assert graph.span_texts is not None and len(graph.span_texts) == 2
    assert all(graph.span_texts)


@pytest.mark.parametrize("change", ["missing", "too many", "too few heads", "flat"])
def test_scores_of_another_graph(task: Task, view: TaskView, change: str) -> None:
    scores = random_scores(task)
    name = next(name for name in scores if "hook_q" in name)
    changed = {
        "missing": {n: s for n, s in scores.items() if n != name},
        "too many": {**scores, name: t.cat([scores[name]] * 2, dim=-1)},
        "too few heads": {**scores, name: scores[name][:, :1]},
        "flat": {**scores, name: scores[name][0, 0]},
    }[change]
    with pytest.raises(GraphError, match="do not fit the graph: of the destination"):
        algorithm_view(view.graph, "A", [changed])


@pytest.mark.slow
def test_true_edges_are_those_of_the_task() -> None:
    task = TRACR_REVERSE_TOKEN_CIRCUIT_TASK
    graph = task_view(task).graph
    assert task.true_edges is not None and graph.true_edges is not None
    found = {graph.edge_name(edge) for edge in graph.true_edges}
    assert found == {repr(edge) for edge in task.true_edges}
    task.free()


# ---------------------------------------------------------------------------- algorithms


@pytest.mark.parametrize("n_values", [0, 2])
def test_circuits_are_those_that_are_run(
    task: Task, view: TaskView, n_values: int
) -> None:
    scores = random_scores(task, n_values=n_values)
    sizes = [0, 1, 7, 60, view.graph.n_edges]
    run = run_circuits(task.model, task.test_loader, sizes, scores)
    rows = rows_of({size: [1.0] for size in run})
    algorithm = algorithm_view(view.graph, "A", [scores], rows)
    assert [size.n_drawn for size in algorithm.sizes] == list(run)
    for size in run:
        circuit = circuit_of_scores(task.model, scores, size)
        drawn = algorithm.order[:size]
        assert {view.graph.edge_name(e) for e in drawn} == set(circuit.names)
    assert (len(algorithm.ties) > 0) == (n_values > 0)
    # Sizes that other seeds' circuits have may end within edges that tie here.
    asked = algorithm_view(view.graph, "A", [scores], rows_of({s: [1.0] for s in sizes}))
    assert [size.n_edges for size in asked.sizes] == sizes
    drawn = [circuit_of_scores(task.model, scores, size).n_edges for size in sizes]
    assert [size.n_drawn for size in asked.sizes] == drawn
    assert (drawn != sizes) == (n_values > 0)


def test_ties_are_the_runs_of_equal_scores(task: Task, view: TaskView) -> None:
    algorithm = algorithm_view(view.graph, "A", [random_scores(task, n_values=2)])
    falling = np.abs(algorithm.scores[algorithm.order])
    assert (np.diff(falling) <= 0).all()
    of_ties = {int(start): int(length) for start, length in algorithm.ties}
    position = 0
    while position < len(falling):
        n_equal = int((falling == falling[position]).sum())
        assert of_ties.pop(position, 1) == n_equal
        position += n_equal
    assert not of_ties


def test_seeds_give_means_and_intervals(task: Task, view: TaskView) -> None:
    of_seeds = [random_scores(task, seed) for seed in range(3)]
    rows = rows_of({2: [10.0, 20.0, 60.0], 0: [0.0, 0.0, 0.0]})
    algorithm = algorithm_view(view.graph, "A", of_seeds, rows)
    edge = list(task.model.edges)[17]
    values = np.array([float(edge.prune_score(scores)) for scores in of_seeds])
    half = 4.302653 * values.std(ddof=1) / 3**0.5
    assert algorithm.scores[17] == pytest.approx(values.mean(), rel=1e-6)
    assert algorithm.plus_minus is not None and algorithm.n_seeds == 3
    bits = algorithm.plus_minus.astype(np.uint32) << 16
    assert bits.view(np.float32)[17] == pytest.approx(half, rel=0.004)
    smallest, largest = algorithm.sizes
    assert smallest.n_edges == smallest.n_drawn == 0 and largest.n_edges == 2
    value = largest.values["Logit Diff Percent"]
    assert value.mean == pytest.approx(30.0)
    assert value.plus_minus == pytest.approx(4.302653 * 26.457513 / 3**0.5, rel=1e-4)


def test_one_seed_has_no_interval(task: Task, view: TaskView) -> None:
    algorithm = algorithm_view(
        view.graph, "A", [random_scores(task)], rows_of({1: [5.0], 2: [float("nan")]})
    )
    assert algorithm.plus_minus is None
    values = [size.values["Logit Diff Percent"] for size in algorithm.sizes]
    assert [(v.mean, v.plus_minus) for v in values] == [(5.0, None), (None, None)]


def test_infinite_scores_come_first_and_nan_has_no_rank(
    task: Task, view: TaskView
) -> None:
    scores = random_scores(task)
    name = next(iter(scores))
    scores[name][0, 0, 0] = -t.inf
    opposite = {**scores, name: scores[name].clone()}
    opposite[name][0, 0, 0] = t.inf
    for of_seeds in ([scores], [scores, opposite]):
        algorithm = algorithm_view(view.graph, "A", of_seeds)
        assert np.isinf(algorithm.scores[algorithm.order[0]])
    opposite[name][0, 0, 0] = t.nan
    with pytest.raises(GraphError, match="NaN"):
        algorithm_view(view.graph, "A", [opposite])
    with pytest.raises(GraphError, match="There are no scores of the algorithm 'A'"):
        algorithm_view(view.graph, "A", [])


# ------------------------------------------------------------------- the model on a prompt


def hugging_face(name: str) -> Any:
    """The model that `ARCHITECTURES` wraps, with the same weights, by itself."""
    if name == "gpt2":
        sizes: Any = {"n_layer": N_LAYERS, "n_head": N_HEADS, "n_embd": D_MODEL}
        config = GPT2Config(**sizes, vocab_size=VOCAB, n_positions=N_CTX)
        model: Any = GPT2LMHeadModel(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    randomize(model)
    model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attention_is_that_of_hugging_face(name: str, tmp_path: Path) -> None:
    task = id_task(tmp_path, name)
    view = task_view(task)
    assert view.attention is not None
    pair = task.test_loader.prompt_dataset[task.test_loader.places[0]]
    for side in ("clean", "corrupt"):
        out = hugging_face(name)(getattr(pair, side)[None], output_attentions=True)
        expected = t.cat([of_block[0] for of_block in out.attentions]).numpy()
        shown = getattr(view.attention, side) / 255
        assert shown.shape == expected.shape == (8, N_TOKENS, N_TOKENS)
        np.testing.assert_allclose(shown, expected, atol=0.5 / 255 + 1e-5)
    names = [view.graph.nodes[node].name for node in view.attention.nodes]
    assert names == [f"A{block}.{head}" for block in range(2) for head in range(4)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_direct_effects_and_biases_add_up_to_the_logits(
    name: str, tmp_path: Path
) -> None:
    task = id_task(tmp_path, name)
    tokens = next(iter(task.test_loader)).clean[:1]
    effects = direct_logit_effects(task.model, tokens, {})
    assert effects is not None and len(effects) == len(task.model.srcs)
    model = hugging_face(name)
    rest = model(tokens).logits[0, -1] - effects.sum(0)
    if name == "llama":  # it has no biases
        t.testing.assert_close(rest, t.zeros_like(rest), atol=2e-5, rtol=0)
        return
    stream: list[t.Tensor] = []
    norm = model.transformer.ln_f
    norm.register_forward_pre_hook(lambda module, args: stream.append(args[0][0, -1]))
    model(tokens)
    scale = (stream[0].var(unbiased=False) + norm.eps).sqrt()
    bias = sum(block.attn.c_proj.bias for block in model.transformer.h)
    expected = model.lm_head(norm.weight * (bias - bias.mean()) / scale + norm.bias)
    assert rest.abs().max() > 0.01
    t.testing.assert_close(rest, expected, atol=2e-5, rtol=1e-4)


def test_the_words_are_those_with_the_largest_effects(task: Task, view: TaskView) -> None:
    assert view.effects is not None
    tokens = task.test_loader.prompt_dataset[0].corrupt[None]
    effects = direct_logit_effects(task.model, tokens, {})
    assert effects is not None
    shown = view.effects.corrupt
    for source in range(len(view.graph.sources)):
        ranked = effects[source].argsort(descending=True).tolist()
        n_raised = view.effects.n_raised
        n_lowered = shown.words.shape[1] - n_raised
        expected = ranked[:n_raised] + ranked[::-1][:n_lowered]
        words = [view.effects.words[word] for word in shown.words[source]]
        assert words == [str(token) for token in expected]
        values = effects[source][expected].numpy()
        np.testing.assert_allclose(shown.values[source], values, atol=1e-5)
    answer = int(task.test_loader.prompt_dataset[0].answers[0])
    assert shown.answer is not None
    np.testing.assert_allclose(shown.answer, effects[:, answer].numpy(), atol=1e-5)


@pytest.mark.slow
def test_what_all_prompts_begin_with_is_shown_before_the_positions() -> None:
    task = POCKET_DOCSTRING_TASK
    view = task_view(task)
    n_prefix = task.test_loader.diverge_idx
    pair = task.test_loader.prompt_dataset[task.test_loader.places[0]]
    assert view.graph.first_token == n_prefix == 2
    shown = view.prompts[0].clean
    assert shown.tokens[:3] == ("<bos>", "def", "parse")
    assert len(shown.tokens) == n_prefix + len(pair.clean)
    differs = (pair.clean != pair.corrupt).nonzero()[:, 0]
    assert list(shown.differs) == (differs + n_prefix).tolist()
    assert view.attention is not None and view.effects is not None
    assert view.attention.clean.shape == (32, 36, 36)
    # No head looks ahead, and each looks somewhere.
    assert not np.triu(view.attention.clean, 1).any()
    np.testing.assert_allclose(view.attention.clean.sum(-1), 255, atol=18)
    task.free()


@pytest.mark.slow
def test_padding_is_not_shown() -> None:
    task = POCKET_IOI_TASK
    view = task_view(task)
    place = task.test_loader.places[0]
    pair = task.test_loader.prompt_dataset[place]
    assert pair.clean_attention_mask is not None and pair.clean_attention_mask[0] == 0
    n_text = int(pair.clean_attention_mask.sum())
    assert view.prompts[0].clean.tokens[0] == "<bos>"
    assert len(view.prompts[0].clean.tokens) == n_text
    assert view.attention is not None
    assert view.attention.clean.shape[1:] == (n_text, n_text)
    task.free()


def test_prompts_are_whole_and_show_what_differs(task: Task, view: TaskView) -> None:
    assert task.test_loader.diverge_idx == view.graph.first_token == 0
    places = task.test_loader.places
    for place, prompt in zip(places, view.prompts, strict=True):
        pair = task.test_loader.prompt_dataset[place]
        assert prompt.clean.tokens == tuple(map(str, pair.clean.tolist()))
        assert prompt.corrupt.tokens == tuple(map(str, pair.corrupt.tolist()))
        differs = (pair.clean != pair.corrupt).nonzero()[:, 0].tolist()
        assert list(prompt.clean.differs) == list(prompt.corrupt.differs) == differs
        assert prompt.answers == (str(int(pair.answers[0])),)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {}) for name in MORE_ARCHITECTURES),
        ("gpt2", {"factorized": False}),
        ("llama", {"separate_qkv": False}),
        ("llama", {"ungroup": True}),
    ],
)
def test_every_architecture_has_a_view(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = MORE_ARCHITECTURES[name]()
    task = replace(id_task(tmp_path, "gpt2"), _model_def=model, **options)
    view = task_view(task)
    names = [view.graph.edge_name(edge) for edge in range(view.graph.n_edges)]
    assert names == [repr(edge) for edge in task.model.edges]
    scores = random_scores(task)
    expected = [float(edge.prune_score(scores)) for edge in task.model.edges]
    assert view.graph.flat_scores(scores).tolist() == expected
    drawn = [node.name for node in view.graph.nodes]
    assert len(set(drawn)) == len(drawn)
    assert view.attention is not None and len(set(view.attention.nodes)) == 8
    assert view.effects is not None and not view.notes
    # An edge goes up.
    nodes, graph = view.graph.nodes, view.graph
    for src, dest in zip(graph.src, graph.dest, strict=True):
        below, above = graph.sources[src].node, graph.destinations[dest].node
        assert nodes[below].layer < nodes[above].layer


@pytest.mark.slow
def test_a_program_whose_answers_are_numbers() -> None:
    view = task_view(TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK)
    assert view.effects is not None and view.effects.clean.answer is None
    assert view.attention is not None and not view.notes
    TRACR_XPROPORTION_TOKEN_CIRCUIT_TASK.free()


@pytest.fixture(scope="module")
def micro_view(tmp_path_factory: pytest.TempPathFactory) -> TaskView:
    return task_view(micro_task(tmp_path_factory.mktemp("micro")))


def test_a_model_that_is_no_transformer(micro_view: TaskView) -> None:
    assert micro_view.attention is None and micro_view.effects is None
    assert len(micro_view.notes) == 2
    assert micro_view.prompts[0].clean.tokens == ("3, 3", "1, 2.5")
    assert micro_view.prompts[0].clean.differs == (0,)


def test_the_model_and_the_callers_state_are_left_alone(
    task: Task, view: TaskView
) -> None:
    model = task.model
    model.wrapped_model.train()
    before = state_snapshot(model)
    dtype = t.get_default_dtype()
    try:
        with t.inference_mode():
            inside = task_view(task)
        t.set_default_dtype(t.float64)
        other_dtype = task_view(task)
    finally:
        t.set_default_dtype(dtype)
    after = state_snapshot(model)
    model.wrapped_model.eval()
    assert {key for key in before if before[key] != after[key]} == set()
    assert inside.as_data() == other_dtype.as_data() == view.as_data()


# --------------------------------------------------------------------------- plain data


def test_a_view_comes_back_from_json(task: Task, view: TaskView) -> None:
    scores = [random_scores(task), random_scores(task, 1)]
    rows = rows_of({3: [1.0, 2.0]})
    algorithms: list[AlgorithmView] = [
        algorithm_view(view.graph, "Two", scores, rows),
        algorithm_view(view.graph, "One", scores[:1]),
    ]
    whole = view.with_algorithms(algorithms)
    text = json.dumps(whole.as_data(), allow_nan=False)
    back = TaskView.of_data(json.loads(text))
    assert json.dumps(back.as_data()) == text
    assert back.prompts == whole.prompts and back.graph.nodes == whole.graph.nodes
    np.testing.assert_array_equal(back.algorithms[0].scores, algorithms[0].scores)
    again = algorithm_view(back.graph, "Two", scores, rows)
    assert plain_data.as_data(again) == plain_data.as_data(algorithms[0])


def test_what_is_no_view(view: TaskView) -> None:
    data = view.as_data()
    with pytest.raises(DataError, match="view of version 99, and version 2 is read"):
        TaskView.of_data({**data, "version": 99})
    for damaged in (
        [],
        {**data, "graph": None},
        {**data, "prompts": "no"},
        {**data, "more": 1},
        {**data, "graph": {**data["graph"], "src": {"dtype": "object"}}},
        {**data, "graph": {**data["graph"], "n_positions": "5"}},
    ):
        with pytest.raises(DataError, match="no TaskView as plain data"):
            TaskView.of_data(damaged)


def test_algorithms_of_another_graph(
    task: Task, view: TaskView, micro_view: TaskView
) -> None:
    algorithm = algorithm_view(view.graph, "A", [random_scores(task)])
    with pytest.raises(GraphError, match="'A' scores .* edges, and the graph of"):
        micro_view.with_algorithms([algorithm])
