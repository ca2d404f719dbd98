"""The same code gives the same numbers as auto-circuit 1.0.1, or a stated multiple of them.

`users_code.py` ran there (see `make_expected.py`) and runs here, without a change. Where
ours differ on purpose, `THEIRS_FROM_OURS` says why, and how theirs follow from ours: exactly,
so that nothing else can hide behind the difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import src_ablations
from tests.upstream import users_code
from tests.upstream.our_models import KNOWN_CIRCUIT_MODELS, MODELS, pocket_model
from tests.upstream.parity_models import N_PROMPTS, edges_by_name
from tests.upstream.users_code import (
    BATCH_SIZE,
    CASES,
    KNOWN_CIRCUIT_CASES,
    N_SAMPLES,
    POCKET_CASES,
    RANDOM_MODEL_CASES,
    Numbers,
    graph_of,
)

# Users of graphs with positions name edges without them; ours says what that means.
pytestmark = pytest.mark.filterwarnings("ignore:.*names no position")
N_BATCHES = N_PROMPTS // BATCH_SIZE


@cache
def expected(kind: str) -> dict[str, dict[str, list[float]]]:
    text = (Path(__file__).parent / f"expected_{kind}.json").read_text()
    return json.loads(text)


# ---- How theirs follow from ours


def summed_over_batches(model: Any, ours: Numbers) -> Numbers:
    """Gradients: ours are means over prompts, theirs sums over the batches' means."""
    return {part: [N_BATCHES * x for x in numbers] for part, numbers in ours.items()}


def summed_over_positions_too(model: Any, ours: Numbers) -> Numbers:
    """Edge attribution: theirs writes the sum over all positions to every position."""
    summed = summed_over_batches(model, ours)
    if model.seq_len is None:
        return summed
    edges = edges_by_name(model)
    found: Numbers = {}
    for part, numbers in summed.items():
        totals = dict.fromkeys((edge.name for edge in edges), 0.0)
        for edge, number in zip(edges, numbers, strict=True):
            totals[edge.name] += number
        found[part] = [totals[edge.name] for edge in edges]
    return found


def summed_over_the_path(model: Any, ours: Numbers) -> Numbers:
    """Integrated gradients: theirs sums N + 1 points, from both ends of the path; ours
    averages N midpoints, or those points if asked to."""
    scores = users_code.mask_gradient_prune_scores(
        *(model, users_code.loader(seq_len=model.seq_len), None, "logit", "avg_diff"),
        integrated_grad_samples=N_SAMPLES,
        path_points="both_ends",
    )
    averaged = {"scores": users_code.scores_of_edges(model, scores)}
    n_points = N_SAMPLES + 1
    return {
        part: [n_points * x for x in numbers]
        for part, numbers in summed_over_batches(model, averaged).items()
    }


def magnitudes_of_signed_means(model: Any, ours: Numbers) -> Numbers:
    """Activation magnitude: theirs takes the mean first, so that signs cancel; ours is the
    mean of magnitudes. Theirs also takes a graph's first sources for those that a
    destination of an unfactorized graph reads."""
    means = 0
    for batch in users_code.loader(seq_len=model.seq_len):
        outs = src_ablations(model, batch.clean)
        means = means + outs.mean(dim=(1, 2, 3)).abs() / N_BATCHES
    assert isinstance(means, t.Tensor)
    return {
        "scores": [
            means[edge.src.src_idx - edge.dest.min_src_idx].item()
            for edge in edges_by_name(model)
        ]
    }


def corners_twice(model: Any, ours: Numbers) -> Numbers:
    """ROC curves: theirs repeats the corners (0, 0) and (1, 1)."""
    return {
        part: [0.0, 0.0, *numbers, 1.0, 1.0] if part.startswith("roc") else numbers
        for part, numbers in ours.items()
    }


def gradients_of_two_batches(model: Any, ours: Numbers) -> Numbers:
    """As `summed_over_batches`, for the task's two."""
    gradients = ("their scores", "sum")
    return {
        part: [2 * x for x in numbers] if part in gradients else numbers
        for part, numbers in ours.items()
    }


THEIRS_FROM_OURS: dict[str, Callable[[Any, Numbers], Numbers]] = {
    "mask_gradients": summed_over_batches,
    "integrated_gradients": summed_over_the_path,
    "edge_attribution": summed_over_positions_too,
    "activation_magnitude": magnitudes_of_signed_means,
    "sizes_and_areas": corners_twice,
    "pocket_task": gradients_of_two_batches,
}


@pytest.fixture(autouse=True)
def their_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask training there patches the mean of the corrupt prompts in, whatever one wants,
    and its Adam has the usual memory (see `mask_optimizer` for why ours is shorter)."""
    for name in ("subnetwork_probing_prune_scores", "circuit_probing_prune_scores"):
        ours = partial(
            getattr(users_code, name), ablation_type=AblationType.TOKENWISE_MEAN_CORRUPT
        )
        monkeypatch.setattr(users_code, name, ours)
    monkeypatch.setattr(
        "auto_circuit.prune_algos.subnetwork_probing.mask_optimizer",
        lambda masks, learning_rate: t.optim.Adam(masks.values(), lr=learning_rate),
    )


# Seconds each; without --runslow the others, on one graph.
SLOW = ("circuits", "subnetwork_probing")
NAMES = [
    pytest.param(f"{graph}/{case}", marks=() if is_fast else pytest.mark.slow)
    for graph, cases in RANDOM_MODEL_CASES.items()
    for case in cases
    for is_fast in (graph == "gpt2/qkv" and case not in SLOW,)
]


@pytest.mark.parametrize("name", NAMES)
def test_random_model(name: str) -> None:
    model_name, graph, case = name.split("/")
    model = graph_of(MODELS[model_name](), graph)
    published = expected("random")[name]
    ours = CASES[case](model)
    if "error" in published:  # it does not run there
        assert all(math.isfinite(x) for numbers in ours.values() for x in numbers)
        return
    assert_same(published, theirs_from_ours(case, model, ours))


@pytest.mark.parametrize(
    "case", ["prefix_cache", pytest.param("pocket_task", marks=pytest.mark.slow)]
)
def test_pocket_model(case: str) -> None:
    ours = POCKET_CASES[case](pocket_model())
    assert_same(expected("pocket")[case], theirs_from_ours(case, pocket_model(), ours))


@pytest.mark.slow
@pytest.mark.parametrize("case", KNOWN_CIRCUIT_CASES)
def test_known_circuits(case: str) -> None:
    ours = KNOWN_CIRCUIT_CASES[case](KNOWN_CIRCUIT_MODELS[case]())
    assert_same(expected("circuits")[case], ours)


def theirs_from_ours(case: str, model: Any, ours: Numbers) -> Numbers:
    difference = THEIRS_FROM_OURS.get(case)
    return ours if difference is None else difference(model, ours)


def assert_same(published: Numbers, ours: Numbers) -> None:
    assert list(published) == list(ours)
    assert any(number for numbers in published.values() for number in numbers)
    for part, numbers in published.items():
        theirs = t.tensor([float(number) for number in numbers], dtype=t.float64)
        found = t.tensor(ours[part], dtype=t.float64)
        finite = theirs[theirs.isfinite()]
        size = float(finite.abs().max()) if len(finite) else 1.0
        t.testing.assert_close(
            *(found, theirs),
            rtol=5e-4,
            atol=max(2e-5 * size, 1e-6),
            equal_nan=True,
            msg=lambda text, part=part: f"{part}: {text}",
        )
