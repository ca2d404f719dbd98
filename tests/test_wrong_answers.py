"""Prompts without wrong answers: what compares with them says so before it works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch as t

from auto_circuit.data import NEED_NO_WRONG_ANSWERS, PromptDataLoader, PromptDataset
from auto_circuit.errors import DataError
from auto_circuit.metrics.circuit_outs import circuit_prompt_vals
from auto_circuit.metrics.faithfulness import faithfulness_curve
from auto_circuit.metrics.prune_metrics.measure_prune_metrics import measurement_rows
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOGIT_DIFF_METRIC,
    PRUNE_METRICS,
    PruneMetric,
)
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.objectives import (
    COMPARE_WITH_WRONG_ANSWERS,
    AnswerFunction,
    FaithfulnessTarget,
    answer_loss,
    faithfulness_loss,
)
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS, PruneAlgo
from auto_circuit.types import AblationType, PatchType, PruneScores
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from tests.models import gpt2
from tests.prune_algos.test_conformance import SHORT, SLOW, score

MATCH = "prompts have no `wrong_answers`, which the .* compares with. These need none: "


@pytest.fixture(scope="module")
def model() -> PatchableModel:
    return patchable_model(gpt2(1, 2), True, "last_seq", separate_qkv=True)


def loader(n_without: int = 3) -> PromptDataLoader:
    generator = t.Generator().manual_seed(0)
    clean, corrupt = t.randint(40, (2, 3, 5), generator=generator)
    answers = [t.tensor([i]) for i in range(3)]
    none = t.tensor([], dtype=t.int64)
    wrong = [none] * n_without + [t.tensor([7])] * (3 - n_without)
    dataset = PromptDataset(clean, corrupt, answers, wrong)
    return PromptDataLoader(dataset, None, 0, batch_size=2)


def some_scores(model: PatchableModel) -> PruneScores:
    scores = model.new_prune_scores()
    return {
        name: values + t.arange(values.numel()).view_as(values) + 1.0
        for name, values in scores.items()
    }


# Those that need none run to their end.
FAST = ("EAP (log prob)", "EAP (MSE)", "Act Mag", "SEP")


@pytest.mark.parametrize(
    "algo",
    [
        pytest.param(
            algo,
            id=algo.key,
            marks=(
                ()
                if algo.needs_wrong_answers or algo.short_name in FAST
                else pytest.mark.slow
            ),
        )
        for algo in PRUNE_ALGOS
        if algo.key not in SLOW
    ],
)
def test_every_algorithm_says_whether_it_needs_them(
    algo: PruneAlgo, model: PatchableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHORT, "n_candidates", 5)
    n_passes = 0

    def count(*_: object) -> None:
        nonlocal n_passes
        n_passes += 1

    if not algo.needs_wrong_answers:
        scores = score(algo, model, loader())
        assert not any(values.isnan().any() for values in scores.values())
        return
    hook = model.wrapped_model.register_forward_pre_hook(count)
    try:
        with pytest.raises(DataError, match=MATCH):
            score(algo, model, loader(1))
    finally:
        hook.remove()
    assert n_passes == 0


@pytest.mark.parametrize("metric", PRUNE_METRICS, ids=lambda metric: metric.key)
def test_every_metric_says_whether_it_needs_them(
    metric: PruneMetric, model: PatchableModel
) -> None:
    scores = some_scores(model)
    outs = run_circuits(model, loader(), [0, 3], scores, PatchType.EDGE_PATCH)
    if metric.needs_wrong_answers:
        with pytest.raises(DataError, match="no `wrong_answers`.* These need none"):
            metric.metric_func(model, loader(), outs)
        with pytest.raises(DataError, match=MATCH):
            metric.check_prompts(loader(1))
        with pytest.raises(DataError, match=MATCH):
            metric.check_prompts(list(loader(1)))
    else:
        metric.check_prompts(loader())
        values = dict(metric.metric_func(model, loader(), outs))
        assert values.keys() == {0, 3}


@pytest.mark.parametrize("objective", COMPARE_WITH_WRONG_ANSWERS)
def test_objectives_that_compare(objective: str, model: PatchableModel) -> None:
    batch = next(iter(loader()))
    outputs = t.randn(2, 40, generator=t.Generator().manual_seed(0))
    with pytest.raises(DataError, match="These need none"):
        if objective in ("avg_diff", "max_diff"):
            answer_loss(outputs, batch, answer_function=objective)  # type: ignore[arg-type]
        else:
            faithfulness_loss(objective, outputs, batch, outputs)  # type: ignore[arg-type]


def test_a_percentage_of_nothing_is_no_objective() -> None:
    """The model prefers neither word on one prompt: rounding would be trained for."""
    batch = next(iter(loader(n_without=0)))
    outputs = t.randn(2, 40, generator=t.Generator().manual_seed(0))
    clean = outputs.clone()
    assert faithfulness_loss("logit_diff_percent", outputs, batch, clean) == 0
    clean[0, 7] = clean[0, batch.answers[0]] * (1 + 1e-7)
    with pytest.raises(DataError, match="For 1 of 2 prompts the full model's own"):
        faithfulness_loss("logit_diff_percent", outputs, batch, clean)


def test_objectives_that_do_not() -> None:
    from typing import get_args

    batch = next(iter(loader()))
    outputs = t.randn(2, 40, generator=t.Generator().manual_seed(0))
    for function in set(get_args(AnswerFunction)) - set(COMPARE_WITH_WRONG_ANSWERS):
        assert answer_loss(outputs, batch, "logit", function).isfinite()
    for target in set(get_args(FaithfulnessTarget)) - set(COMPARE_WITH_WRONG_ANSWERS):
        assert faithfulness_loss(target, outputs, batch, outputs).isfinite()


def test_the_error_names_what_needs_none() -> None:
    """Metrics and algorithms by name; a new one need not be named."""
    named = set(re.findall(r"'([^']+)'", NEED_NO_WRONG_ANSWERS))
    needs = {a.short_name: a.needs_wrong_answers for a in PRUNE_ALGOS}
    needs |= {metric.key: metric.needs_wrong_answers for metric in PRUNE_METRICS}
    assert not any(needs[name] for name in named if name in needs)
    metrics = {"Clean KL Div", "Corrupt KL Div", "Clean MSE", "Correct Answer Percent"}
    metrics |= {"Answer Logit", "Answer Prob", "Answer Logprob"}
    assert metrics | {"ACDC"} <= named & needs.keys()
    assert not named & set(COMPARE_WITH_WRONG_ANSWERS)
    for algo in PRUNE_ALGOS:
        assert not (algo.short_name.endswith("(MSE)") and algo.needs_wrong_answers)


def test_before_any_circuit_is_run(model: PatchableModel, tmp_path: Path) -> None:
    scores = some_scores(model)
    circuit = {name: values > 3 for name, values in scores.items()}

    class MyTask:
        key = name = "Mine"
        true_edge_count = true_edges = None
        test_loader = train_loader = loader()

        @property
        def model(self) -> PatchableModel:
            return model

    def fail(*_: object) -> None:
        raise AssertionError("the model ran")

    hook = model.wrapped_model.register_forward_pre_hook(fail)
    try:
        for call in (
            lambda: faithfulness_curve(model, loader(), scores),
            lambda: circuit_prompt_vals(model, loader(), [circuit], LOGIT_DIFF_METRIC),
            lambda: measurement_rows(
                [AblationType.RESAMPLE],
                [LOGIT_DIFF_METRIC],
                {"Mine": {"mine": scores}},
                PatchType.EDGE_PATCH,
                tasks=[MyTask()],  # type: ignore[list-item]
            ),
        ):
            with pytest.raises(DataError, match=MATCH):
                call()
    finally:
        hook.remove()
