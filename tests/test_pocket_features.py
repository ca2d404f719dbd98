"""The pocket model's autoencoders, and the circuit of features that they give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch as t

from auto_circuit.errors import ConfigError, ModelError
from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRIC_DICT
from auto_circuit.model_utils.features.autoencoder_files import load_autoencoders
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.sweep_cells import task_description
from auto_circuit.tasks import (
    POCKET_AUTOENCODERS,
    POCKET_IOI_FEATURES_TASK,
    POCKET_IOI_TASK,
    TASKS,
    Task,
)
from auto_circuit.types import PatchType
from scripts.train_pocket_autoencoders import AutoencoderConfig, train
from tests.models import tokens


@pytest.fixture(scope="module")
def task() -> Task:
    return POCKET_IOI_FEATURES_TASK


def test_the_autoencoders_are_small_and_say_what_is_there(task: Task) -> None:
    files = [path for path in POCKET_AUTOENCODERS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert task in TASKS
    (read,) = load_autoencoders(POCKET_AUTOENCODERS)
    bridge = POCKET_IOI_TASK._bare_model
    (batch,) = POCKET_IOI_TASK.test_loader
    inputs, kwargs = batch.model_input("clean")
    with t.no_grad():
        _, cache = bridge.run_with_cache(inputs, **kwargs)  # type: ignore[operator]
    x = cache[read.hook_name][:, -6:].flatten(0, 1)
    pre = (x - read.decoder_bias) @ read.encoder_weight.T + read.encoder_bias
    latents = pre * (pre > read.threshold)
    left = latents @ read.decoder_weight + read.decoder_bias - x
    assert left.square().sum() < 0.1 * (x - x.mean(0)).square().sum()
    assert 1 < (latents > 0).float().sum(1).mean() < 40


@pytest.mark.slow
def test_a_circuit_of_features_is_found(task: Task) -> None:
    model, loader = task.model, task.test_loader
    latents = [src for src in model.srcs if "Latent" in src.name]
    assert len(latents) == task.autoencoder_max_latents
    assert {src.name for src in latents} <= {dest.name for dest in model.dests}
    scores = edge_attribution_patching_prune_scores(model, task.train_loader, None)
    n_edges = model.n_edges // 8
    outs = run_circuits(
        model, loader, [0, n_edges, model.n_edges], scores, PatchType.TREE_PATCH
    )
    metric = PRUNE_METRIC_DICT["Logit Diff Percent"].metric_func
    none, some, whole = (value for _, value in metric(model, loader, outs))
    assert none < 20 and some > 75 and whole == pytest.approx(100, abs=0.01)
    of_latents = sum(
        float(edge.prune_score(scores).abs())
        for edge in model.edges
        if "Latent" in edge.src.name
    )
    of_errors = sum(
        float(edge.prune_score(scores).abs())
        for edge in model.edges
        if "Error" in edge.src.name
    )
    assert of_latents > 2 * of_errors > 0


def test_results_belong_to_the_autoencoders(task: Task, tmp_path: Path) -> None:
    other = replace(task, autoencoders=tmp_path)
    assert task_description(other) != task_description(task)
    assert "autoencoders" not in task_description(POCKET_IOI_TASK)
    with pytest.raises(ModelError, match="no folder with a cfg.json"):
        _ = other.model
    with pytest.raises(ConfigError, match="both `autoencoders` and `autoencoder_input`"):
        _ = replace(task, autoencoder_input="resid_delta_mlp").model


def test_training_lowers_the_error() -> None:
    generator = t.Generator().manual_seed(0)
    directions = t.randn(12, 16, generator=generator)
    x = directions[tokens(1, 400)[0] % 12] + 0.01 * t.randn(400, 16, generator=generator)
    errors = []
    for n_steps in (1, 150):
        config = AutoencoderConfig(n_latents=24, k=2, n_steps=n_steps, batch_tokens=64)
        trained = train(x, "blocks.1.hook_resid_pre", config)
        errors.append(float((trained(x) - x).square().mean()))
    assert errors[1] < errors[0] / 3
