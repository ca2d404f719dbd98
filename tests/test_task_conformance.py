"""What every task and every metric must do. A new line in TASKS or PRUNE_METRICS is tested.

Models of the hub are replaced by random ones of the same shape, and their tokenizers by
small ones that know the words of the task's prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch as t
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
)
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from auto_circuit.errors import DataError
from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRICS
from auto_circuit.model_utils.sparse_autoencoders import sparse_autoencoder
from auto_circuit.model_utils.tracr_model_utils import TRACR_TASK_KEY
from auto_circuit.model_utils.transformer_lens_utils import native_bridge
from auto_circuit.prune import run_circuits
from auto_circuit.tasks import GENERATORS, TASKS, Task
from auto_circuit.types import CircuitOutputs, Edge, PatchType
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import randomize
from tests.test_datasets import bpe_tokenizer, generator, small_tokenizer

N_CTX, N_LATENTS = 64, 4
# Circuit sizes that are published (upstream: without the mistake that CHANGELOG names).
CIRCUIT_SIZES = {
    "Sports Players Component Circuit": 2276,
    "Indirect Object Identification Component Circuit": 771,
    "Docstring Component Circuit": 24,
    "Greaterthan Component Circuit": 235,
    "Tracr reverse Token Circuit": 8,
    "Tracr xproportion Token Circuit": 15,
}


# ------------------------------------------------------------------------- stand-ins


def gpt2_small(tokenizer: Any) -> TransformerBridge:
    config = GPT2Config(
        n_layer=12, n_head=12, n_embd=24, vocab_size=len(tokenizer), n_positions=N_CTX
    )
    return build_bridge_from_module(
        GPT2LMHeadModel(config), "GPT2LMHeadModel", hf_config=config
    )


def attn_only_4l(tokenizer: Any) -> TransformerBridge:
    config = TransformerBridgeConfig(
        n_layers=4,
        n_heads=8,
        d_model=32,
        d_head=4,
        n_ctx=N_CTX,
        d_vocab=len(tokenizer),
        attn_only=True,
        act_fn="relu",
        architecture="TransformerLensNative",
    )
    return native_bridge(config)


def pythia(tokenizer: Any, n_layers: int, n_heads: int) -> TransformerBridge:
    config = GPTNeoXConfig(
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        hidden_size=8 * n_heads,
        intermediate_size=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=N_CTX,
    )
    return build_bridge_from_module(
        GPTNeoXForCausalLM(config), "GPTNeoXForCausalLM", hf_config=config
    )


# A model of the hub that is not listed here is stood in for by GPT-2's shape: 12 blocks of
# 12 heads.
SHAPES = {
    "attn-only-4l": attn_only_4l,
    "EleutherAI/pythia-2.8b-deduped": lambda tok: pythia(tok, 32, 32),
    "EleutherAI/pythia-70m-deduped": lambda tok: pythia(tok, 6, 8),
}


def is_model_here(task: Task) -> bool:
    """A model of ours, an object or a folder; others come from the hub."""
    model = task._model_def
    if isinstance(model, Module) or model in get_args(TRACR_TASK_KEY):
        return True
    return Path(model).is_dir()


def stand_in(task: Task, folder: Path) -> Task:
    """The task on a random model of its model's shape, with few prompts."""
    if is_model_here(task):
        return replace(task, batch_size=(4, 3), batch_count=1)
    tokenizer, dataset = prompts_and_tokenizer(task, folder)
    bridge = SHAPES.get(str(task._model_def), gpt2_small)(tokenizer)
    randomize(bridge)
    bridge.tokenizer = tokenizer
    if task.autoencoder_input is not None:
        write_autoencoders(task, bridge, folder)
    return replace(
        task,
        # In float64: on a random model mean differences may cancel out, and of what is
        # left rounding would be a good part.
        _model_def=bridge.double().eval().requires_grad_(False),
        _dataset_name=dataset,
        batch_size=(4, 3),
        batch_count=1,
    )


def prompts_and_tokenizer(task: Task, folder: Path) -> tuple[Any, str | Path]:
    """A tokenizer that knows the file's words; or a file for the small tokenizer."""
    name = str(task._dataset_name)
    if name in GENERATORS:
        script = GENERATORS[name].split()[0].removeprefix("datasets/")
        module = generator(script.removesuffix("_generator.py"))
        write = getattr(module, Path(script).stem.removesuffix("_generator") + "_prompts")
        path = folder / "prompts.json"
        write(small_tokenizer(), n_prompts=20).write(path, "small")
        return small_tokenizer(), path
    prompts = json.loads(task.prompt_path.read_text())["prompts"]
    texts = [
        text
        for prompt in prompts
        for text in (
            *(prompt["clean"], prompt["corrupt"]),
            *(*prompt["answers"], *prompt["wrong_answers"]),
        )
    ]
    if "greaterthan" in name:
        # As in GPT-2's vocabulary, " 1346" is " 13" and "46": centuries are commoner.
        texts = [text.partition("year")[0] + "year to" for text in texts]
        texts += [f" {century}" for century in range(10, 20)] * 2000
        texts += [f"{year:02}" for year in range(100)] * 30
    return bpe_tokenizer(texts), name


def write_autoencoders(task: Task, bridge: Any, folder: Path) -> None:
    bridge.cfg.model_name = str(task._model_def)
    size = task.autoencoder_pythia_size
    stem = "_".join(
        [Path(bridge.cfg.model_name).name, "resid_delta_mlp", *([size] if size else [])]
    )
    d_model, random = bridge.cfg.d_model, t.Generator().manual_seed(0)
    for block in range(bridge.cfg.n_layers):
        directions = t.randn(N_LATENTS, d_model, generator=random)
        weights = {
            "pre_bias": t.zeros(d_model),
            "encoder.weight": directions,
            "latent_bias": t.zeros(N_LATENTS),
            "decoder.weight": directions.T.contiguous(),
        }
        save_file(weights, folder / f"{stem}_{block}.safetensors")


def is_slow(task: Task) -> bool:
    """Large graphs: hundreds of thousands of edges."""
    return task.autoencoder_input is not None or (
        not is_model_here(task)
        and (task.token_circuit or "pythia" in str(task._model_def))
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(task, id=task.key, marks=pytest.mark.slow if is_slow(task) else ())
        for task in TASKS
    ],
)
def task(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Task]:
    folder = tmp_path_factory.mktemp("task")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(sparse_autoencoder, "CACHE_FOLDER", str(folder))
        yield stand_in(request.param, folder)


# ------------------------------------------------------------------------------- laws


def is_model_edge(model: PatchableModel, edge: Edge) -> bool:
    in_srcs = model.wrapper(edge.dest.module_name).in_srcs
    assert in_srcs is not None
    reads = edge.src.src_idx in range(in_srcs.start, in_srcs.stop)
    positions = [None] if model.seq_len is None else range(model.seq_len)
    nodes = edge.src in model.srcs and edge.dest in model.dests
    return nodes and reads and edge.seq_idx in positions


def test_prompts_are_pairs_and_answers_are_tokens(task: Task) -> None:
    for loader, size in ((task.train_loader, 4), (task.test_loader, 3)):
        (batch,) = loader
        assert batch.clean.shape == batch.corrupt.shape and len(batch.clean) == size
        assert (batch.clean != batch.corrupt).flatten(1).any(1).all()
        tokens, kwargs = batch.model_input("clean")
        vocabulary = task.model(tokens, **kwargs).shape[-1]
        for answers in (batch.answers, batch.wrong_answers):
            assert len(answers) == size
            for of_prompt in answers:
                if not of_prompt.is_floating_point():
                    assert of_prompt.numel() > 0
                    assert 0 <= of_prompt.min() and of_prompt.max() < vocabulary


def test_the_known_circuit_is_one_of_this_model(task: Task) -> None:
    if task._true_edge_func is None:
        assert task.true_edges is None and task.true_edge_count is None
        return
    edges = task.true_edges
    assert edges and len(edges) == task.true_edge_count
    assert task.true_edge_count == CIRCUIT_SIZES.get(task.key, task.true_edge_count)
    assert len({(edge.name, edge.seq_idx) for edge in edges}) == len(edges)
    assert all(is_model_edge(task.model, edge) for edge in edges)
    scores = task.model.new_prune_scores()
    for edge in edges:
        scores[edge.dest.module_name][edge.patch_idx] = 1.0
    assert sum(float(of_module.sum()) for of_module in scores.values()) == len(edges)


def test_metrics_have_their_bounds_and_their_value_at_the_model(task: Task) -> None:
    model, loader = task.model, task.test_loader
    scores = model.new_prune_scores(1.0)
    outs = run_circuits(model, loader, [0, model.n_edges], scores, PatchType.TREE_PATCH)
    full: CircuitOutputs = {model.n_edges: {}}
    with t.no_grad():
        for batch in loader:
            tokens, kwargs = batch.model_input("clean")
            full[model.n_edges][batch.key] = model.sliced(tokens, **kwargs)
    has_words = all(has_token_ids(batch.answers) for batch in loader)
    for metric in PRUNE_METRICS:
        if not has_words and not metric.of_numbers:
            with pytest.raises(DataError, match="numbers .* not token ids|single number"):
                metric.metric_func(model, loader, outs)
            continue
        values = dict(metric.metric_func(model, loader, outs))
        ((_, of_model),) = metric.metric_func(model, loader, full)
        low, high = metric.bounds
        assert set(values) == {0, model.n_edges}
        assert all(low <= value <= high for value in values.values()), metric.key
        at_model = values[model.n_edges]
        assert at_model == pytest.approx(of_model, rel=1e-3, abs=2e-3), metric.key
        if metric.key in ("Clean KL Div", "Clean MSE"):
            assert at_model == pytest.approx(0.0, abs=1e-5)
            assert values[0] > max(at_model, 1e-9), metric.key
        if metric.key.endswith("Diff Percent"):
            assert at_model == pytest.approx(100, abs=0.1)


def has_token_ids(answers: Tensor | list[Tensor]) -> bool:
    return not answers[0].is_floating_point()


def test_a_metric_says_which_question_it_answers() -> None:
    assert [metric.key for metric in PRUNE_METRICS if not metric.question] == []
