"""Every faithfulness metric: by hand, by its laws, and how it uses the model."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.metrics.prune_metrics.answer_diff import measure_answer_diff
from auto_circuit.metrics.prune_metrics.answer_diff_percent import (
    answer_diff_percent,
    measure_answer_diff_percent,
)
from auto_circuit.metrics.prune_metrics.answer_value import measure_answer_val
from auto_circuit.metrics.prune_metrics.correct_answer_percent import (
    measure_correct_ans_percent,
)
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.kl_div import measure_kl_div
from auto_circuit.metrics.prune_metrics.mean_squared_error import (
    measure_mean_squared_error,
)
from auto_circuit.metrics.prune_metrics.prompt_stats import prompt_vals
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    LOBPROB_DIFF_PERCENT_METRIC,
    PRUNE_METRIC_DICT,
    PRUNE_METRICS,
    PruneMetric,
    find_metric,
)
from auto_circuit.metrics.prune_metrics.task_measurements import measured_values
from auto_circuit.types import CircuitOutputs
from auto_circuit.utils.tensor_ops import UndefinedPercentWarning

EACH_METRIC = pytest.mark.parametrize("metric", PRUNE_METRICS, ids=str)
Batches = list[PromptPairBatch]


@pytest.fixture
def circuit_outs(model: Any, batches: Batches, outs_of: Any) -> CircuitOutputs:
    """0 edges: the corrupt run; 5 edges: random; 9 edges: the clean run."""
    generator = t.Generator().manual_seed(1)
    clean = outs_of(model, batches)
    noise = {k: t.randn(out.shape, generator=generator) for k, out in clean.items()}
    model.n_runs = 0
    return {0: outs_of(model, batches, "corrupt"), 5: noise, 9: clean}


def concat(outs: dict[int, t.Tensor]) -> t.Tensor:
    """All prompts' outputs."""
    return t.cat(list(outs.values()))


# ----------------------------------------------------------- the tuple's conformance


@EACH_METRIC
def test_metric_is_the_mean_of_its_prompts(
    metric: PruneMetric, model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    points = metric.metric_func(model, batches, circuit_outs)
    assert [n_edges for n_edges, _ in points] == [0, 5, 9]
    assert metric.prompt_func is not None
    circuits = prompt_vals(model, batches, circuit_outs, metric.prompt_func)
    assert points == [(circuit.n_edges, circuit.mean) for circuit in circuits]
    assert all(len(circuit.vals) == 6 for circuit in circuits)


@EACH_METRIC
def test_metric_prefers_the_model_to_its_opposite(
    metric: PruneMetric, model: Any, outs_of: Any
) -> None:
    """In the direction that it names: an absolute value or a wrong sign would not."""
    right, wrong = t.eye(6).roll(1, dims=1)[:3], t.eye(6)[:3]
    model.logits = t.cat([2 * right - wrong, wrong - 2 * right])
    batch = PromptPairBatch(
        key=0,
        batch_diverge_idx=0,
        clean=t.tensor([[0], [1], [2]]),
        corrupt=t.tensor([[3], [4], [5]]),
        answers=t.tensor([[1], [2], [3]]),
        wrong_answers=t.tensor([[0], [1], [2]]),
    )
    outs = {0: outs_of(model, [batch], "corrupt"), 9: outs_of(model, [batch])}
    at_opposite, at_model = (v for _, v in metric.metric_func(model, [batch], outs))
    low, high = metric.bounds
    assert low <= at_opposite <= high and low <= at_model <= high
    sign = -1 if metric.lower_better else 1
    assert sign * at_model > sign * at_opposite


@EACH_METRIC
def test_metric_does_not_depend_on_the_batches(
    metric: PruneMetric, model: Any, make_batches: Any, outs_of: Any
) -> None:
    def measure(sizes: list[int]) -> float:
        batches = make_batches(sizes)
        circuit_outs = {3: outs_of(model, batches, "corrupt")}
        return metric.metric_func(model, batches, circuit_outs)[0][1]

    expected = measure([6])
    for sizes in ([1] * 6, [5, 1], [2, 4]):
        assert measure(sizes) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@EACH_METRIC
@pytest.mark.parametrize("dtype", [t.float64, t.bfloat16])
def test_metric_dtypes(
    metric: PruneMetric, dtype: t.dtype, model: Any, batches: Batches, outs_of: Any
) -> None:
    model.logits = model.logits.to(dtype)
    circuit_outs = {3: outs_of(model, batches, "corrupt")}
    ((_, value),) = metric.metric_func(model, batches, circuit_outs)
    assert math.isfinite(value)


@EACH_METRIC
def test_metric_leaves_no_gradients(
    metric: PruneMetric, model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    model.logits.requires_grad_()
    full = FullModelOuts(model, batches)
    assert not full.vals(batches[0], "clean", "softmax").requires_grad
    trained = {
        size: {key: out.clone().requires_grad_() for key, out in outs.items()}
        for size, outs in circuit_outs.items()
    }
    has_grad = []

    def spied(out: Tensor, batch: PromptPairBatch, full: FullModelOuts) -> Tensor:
        assert metric.prompt_func is not None
        values = metric.prompt_func(out, batch, full)
        sides = [full.vals(batch, side) for side in ("clean", "corrupt")]
        has_grad.extend(values.requires_grad for values in (values, *sides))
        return values

    prompt_vals(model, batches, trained, spied, full)
    assert has_grad and not any(has_grad)


def test_the_dictionary_has_every_metric_once() -> None:
    assert tuple(PRUNE_METRIC_DICT.values()) == PRUNE_METRICS
    assert LOBPROB_DIFF_PERCENT_METRIC.key == "LogProb Diff Percent"
    assert find_metric("Clean KL Div").lower_better


# ------------------------------------------------------------------------------- laws


def test_divergence_of_the_full_model_is_zero(
    model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    clean = measure_kl_div(model, batches, circuit_outs)
    corrupt = measure_kl_div(model, batches, circuit_outs, compare_to_clean=False)
    assert clean[2] == (9, 0.0) and corrupt[0] == (0, 0.0)
    assert min(clean[0][1], clean[1][1], corrupt[1][1], corrupt[2][1]) > 0


def test_divergence_by_hand(
    model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    probs = concat(circuit_outs[9]).softmax(-1)
    circuit = concat(circuit_outs[5]).softmax(-1)
    expected = (probs * (probs / circuit).log()).sum(-1).mean().item()
    assert measure_kl_div(model, batches, circuit_outs)[1][1] == pytest.approx(expected)


def test_squared_error_by_hand(
    model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    errors = dict(measure_mean_squared_error(model, batches, circuit_outs))
    assert errors[9] == 0.0
    for n_edges in (0, 5):
        differences = concat(circuit_outs[n_edges]) - concat(circuit_outs[9])
        assert errors[n_edges] == pytest.approx(float((differences**2).mean()), rel=1e-5)


@pytest.mark.parametrize("prob_func", ["logits", "softmax", "log_softmax"])
@pytest.mark.parametrize("diff_of_means", [True, False])
def test_the_full_model_has_100_percent(
    prob_func: Any,
    diff_of_means: bool,
    model: Any,
    batches: Batches,
    circuit_outs: CircuitOutputs,
) -> None:
    points = measure_answer_diff_percent(
        model, batches, circuit_outs, prob_func, diff_of_means
    )
    assert points[2][1] == pytest.approx(100)


def test_answer_values_by_hand(
    model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    out = concat(circuit_outs[5])
    rows = t.arange(6)
    right = out[rows, (rows + 1) % 6].mean().item()
    wrong = t.stack([out[i, [i] if i % 2 else [i, (i + 3) % 6]].mean() for i in range(6)])
    found = measure_answer_val(model, batches, circuit_outs)[1][1]
    assert found == pytest.approx(right)
    found = measure_answer_val(model, batches, circuit_outs, wrong_answer=True)[1][1]
    assert found == pytest.approx(wrong.mean().item())
    found = measure_answer_diff(model, batches, circuit_outs)[1][1]
    assert found == pytest.approx(right - wrong.mean().item())
    probs = out.softmax(-1)[rows, (rows + 1) % 6].mean().item()
    found = measure_answer_val(model, batches, circuit_outs, "softmax")[1][1]
    assert found == pytest.approx(probs)
    logprobs = out.log_softmax(-1)[rows, (rows + 1) % 6].mean().item()
    found = measure_answer_val(model, batches, circuit_outs, "log_softmax")[1][1]
    assert found == pytest.approx(logprobs)


def test_percent_of_means_is_not_the_mean_of_percents() -> None:
    # The model's logit differences are 1 and 4, the circuit's 2 and 2.
    logits = t.tensor([[1.0, 0.0], [4.0, 0.0]])
    batch = PromptPairBatch(
        key=3,
        batch_diverge_idx=0,
        clean=t.tensor([[0], [1]]),
        corrupt=t.tensor([[1], [0]]),
        answers=t.tensor([[0], [0]]),
        wrong_answers=t.tensor([[1], [1]]),
    )

    class Model:
        out_slice = (slice(None), -1)

        def __call__(self, tokens: t.Tensor) -> t.Tensor:
            return logits[tokens]

    outs = {7: {3: t.tensor([[2.0, 0.0], [2.0, 0.0]])}}
    means, stds, points = answer_diff_percent(Model(), [batch], outs)
    assert (means, stds) == ([(7, 80.0)], [(7, 0.0)])
    ((n_edges, of_prompts),) = points
    assert n_edges == 7 and of_prompts.shape == (0,)
    means, stds, points = answer_diff_percent(Model(), [batch], outs, diff_of_means=False)
    assert means == [(7, (200 + 50) / 2)]
    assert stds == [(7, pytest.approx(150 / math.sqrt(2)))]
    ((n_edges, of_prompts),) = points
    assert n_edges == 7 and of_prompts.tolist() == [200.0, 50.0]


@pytest.mark.parametrize("diff_of_means", [True, False])
def test_percent_of_nothing_is_nan_and_warns(
    diff_of_means: bool, model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    model.logits = t.ones(6, 6)
    with pytest.warns(UndefinedPercentWarning, match="full model's own difference"):
        points = measure_answer_diff_percent(
            model, batches, circuit_outs, diff_of_means=diff_of_means
        )
    assert all(math.isnan(value) for _, value in points)


def test_correct_answers_by_hand(model: Any, batches: Batches) -> None:
    right = {batch.key: t.zeros(len(batch.clean), 6) for batch in batches}
    for batch in batches:
        right[batch.key].scatter_(1, batch.answers, 1.0)  # type: ignore[arg-type]
    right[1][1] = 0.0
    outs = {1: right, 2: {key: -out for key, out in right.items()}}
    points = measure_correct_ans_percent(model, batches, outs)
    assert points == [(1, pytest.approx(100 * 5 / 6)), (2, 0.0)]
    for out in right.values():
        out[:, :] += t.tensor([9.0, 0, 0, 0, 0, 0]) * (out.sum(1, keepdim=True) > 0)
    # Token 0 is on top now, a wrong answer of prompt 0. Prompt 5 has a tie.
    greater = measure_correct_ans_percent(model, batches, outs, True)
    assert greater[0] == (1, pytest.approx(100 * 4 / 6))
    assert measure_correct_ans_percent(model, batches, outs)[0] == (1, 0.0)


# ---------------------------------------------------------------- positions and padding


def test_padding_does_not_enter_the_divergence(make_batches: Any) -> None:
    class Model:
        out_slice = slice(None)

        def __call__(self, tokens: t.Tensor, attention_mask: t.Tensor) -> t.Tensor:
            return t.eye(6)[tokens]

    batch = PromptPairBatch(
        key=0,
        batch_diverge_idx=0,
        clean=t.tensor([[0, 1, 2], [1, 2, 3]]),
        corrupt=t.tensor([[0, 1, 3], [1, 2, 4]]),
        answers=t.zeros(2, 3, 1, dtype=t.int64),
        wrong_answers=t.zeros(2, 3, 1, dtype=t.int64),
        clean_attention_mask=t.tensor([[0, 1, 1], [1, 1, 1]]),
        corrupt_attention_mask=t.tensor([[0, 1, 1], [1, 1, 1]]),
    )
    outs = {0: {0: t.eye(6)[batch.clean]}}
    outs[0][0][0, 0] = t.tensor([1000.0, 0, 0, 0, 0, 0])
    assert measure_kl_div(Model(), [batch], outs) == [(0, 0.0)]
    outs[0][0][0, 1] = 0.0
    single = t.nn.functional.kl_div(
        t.zeros(6).log_softmax(-1),
        t.eye(6)[1].log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    # One of two real positions, in one of two prompts.
    assert measure_kl_div(Model(), [batch], outs)[0][1] == pytest.approx(single / 4)


# ---------------------------------------------------------------------- shared outputs


def test_the_full_model_runs_once_for_all_metrics(
    model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    model.n_runs = 0
    full = FullModelOuts(model, batches)
    for metric in PRUNE_METRICS:
        assert metric.prompt_func is not None
        prompt_vals(model, batches, circuit_outs, metric.prompt_func, full)
    assert model.n_runs == 2 * len(batches)


def test_metrics_of_the_circuit_alone_do_not_run_the_model(
    model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    model.n_runs = 0
    measure_answer_val(model, batches, circuit_outs)
    measure_answer_diff(model, batches, circuit_outs)
    measure_correct_ans_percent(model, batches, circuit_outs)
    assert model.n_runs == 0
    measure_answer_diff_percent(model, batches, circuit_outs)
    assert model.n_runs == len(batches)


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([4, 1, 1], "batch 1 has 1 prompts, but .* 0 edges have 2 prompts for it"),
        ([4, 2, 0], "batch 2 has 0 prompts, but .* 0 edges have no such batch"),
    ],
)
def test_outputs_of_another_loader(
    sizes: list[int],
    message: str,
    model: Any,
    make_batches: Any,
    circuit_outs: CircuitOutputs,
) -> None:
    with pytest.raises(DataError, match=message):
        measure_answer_diff(model, make_batches(sizes), circuit_outs)


def test_a_loader_without_batches(model: Any, circuit_outs: CircuitOutputs) -> None:
    with pytest.raises(DataError, match="no batches"):
        measure_kl_div(model, [], circuit_outs)


def test_unknown_prob_func(
    model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    full = FullModelOuts(model, batches)
    with pytest.raises(Exception, match="prob_func"):
        full.vals(batches[0], "clean", "sigmoid")  # type: ignore[arg-type]


@pytest.mark.parametrize("y_min", [None, 0.0, -1.0])
def test_logarithmic_metrics_need_a_minimum(y_min: float | None) -> None:
    with pytest.raises(ConfigError, match="'Mine' has `log_y` and y_min="):
        PruneMetric("Mine", "Mine", partial(measure_kl_div), log_y=True, y_min=y_min)


def test_unknown_metric() -> None:
    with pytest.raises(ConfigError, match="'Clean KL'.*Did you mean 'Clean KL Div'"):
        find_metric("Clean KL")


# -------------------------------------------------------------------- one's own metrics


def top_logit(out: Tensor, batch: PromptPairBatch, full: FullModelOuts) -> Tensor:
    return out.flatten(1).amax(1)


def test_a_function_of_prompts_is_enough(
    model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    metric = PruneMetric("Top", "Top", prompt_func=top_logit)
    points = metric.metric_func(model, batches, circuit_outs)
    by_hand = {
        size: concat(outs).flatten(1).amax(1).double().mean().item()
        for size, outs in circuit_outs.items()
    }
    assert dict(points) == pytest.approx(by_hand)
    assert metric.measure(model, batches, circuit_outs) == points


def test_another_function_of_prompts_is_another_mean(
    model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    metric = PruneMetric("Top", "Top", prompt_func=top_logit)
    doubled = replace(metric, prompt_func=lambda *args: 2 * top_logit(*args))
    once, twice = (
        [value for _, value in m.metric_func(model, batches, circuit_outs)]
        for m in (metric, doubled)
    )
    assert twice == pytest.approx([2 * value for value in once])
    assert PruneMetric("Top", "Top", prompt_func=top_logit) == metric != doubled


def test_a_metric_without_a_function_is_refused() -> None:
    with pytest.raises(ConfigError, match="'Empty' has no function.*prompt_func"):
        PruneMetric("Empty", "Empty")


@pytest.mark.parametrize(
    "func", [lambda out, *_: out, lambda out, *_: out.mean(), lambda *_: [1.0, 2.0]]
)
def test_a_function_that_gives_no_number_for_each_prompt(
    func: Any, model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    metric = PruneMetric("Bad", "Bad", prompt_func=func)
    with pytest.raises(ConfigError, match="a number for each prompt"):
        metric.metric_func(model, batches, circuit_outs)


@pytest.mark.parametrize("points", [None, 3.0, [], [(0, 1.0)], [1.0, 2.0, 3.0], ["a"]])
def test_a_metric_that_gives_no_value_for_each_circuit(
    points: Any, model: Any, batches: Batches, circuit_outs: CircuitOutputs
) -> None:
    metric = PruneMetric("Bad", "Bad", lambda *_: points)
    full = FullModelOuts(model, batches)
    with pytest.raises(ConfigError, match=r"'Bad' gave .* circuits \[0, 5, 9\]"):
        measured_values(metric, model, batches, circuit_outs, full)
