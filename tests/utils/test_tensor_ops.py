"""Answers, divergences, hard concrete and score ranks, by hand and by their laws."""

from __future__ import annotations

import math

import pytest
import torch as t
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import DataError, GraphError
from auto_circuit.gates import (
    hard_concrete_expected_l0,
    hard_concrete_value,
    sample_hard_concrete,
)
from auto_circuit.ranking import (
    circuit_mask,
    desc_prune_scores,
    flat_prune_scores,
    prune_scores_threshold,
)
from auto_circuit.utils.tensor_ops import (
    UndefinedPercentWarning,
    answer_targets,
    batch_answer_diff_percents,
    batch_answer_diffs,
    batch_answer_vals,
    batch_avg_answer_diff,
    batch_avg_answer_val,
    correct_answer_greater_than_incorrect_proportion,
    correct_answer_proportion,
    indices_vals,
    kl_divs,
    multibatch_kl_div,
    vocab_avg_val,
)

VALS = t.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 9.0, 8.0]])


def make_batch(
    answers: Tensor | list[Tensor], wrong_answers: Tensor | list[Tensor]
) -> PromptPairBatch:
    """A batch of which only the answers matter."""
    prompts = t.zeros(len(answers), 1, dtype=t.int64)
    return PromptPairBatch(
        key=0,
        batch_diverge_idx=0,
        clean=prompts,
        corrupt=prompts,
        answers=answers,
        wrong_answers=wrong_answers,
    )


SINGLE = make_batch(t.tensor([[3], [0]]), t.tensor([[0], [2]]))
SEVERAL = make_batch(t.tensor([[0, 1], [2, 3]]), t.tensor([[2, 3], [0, 1]]))
RAGGED = make_batch(
    [t.tensor([0, 1, 3]), t.tensor([2])], [t.tensor([2]), t.tensor([0, 3])]
)


# ----------------------------------------------------------------------------- answers


def test_indices_vals_and_their_mean() -> None:
    indices = t.tensor([[0, 1], [2, 3]])
    t.testing.assert_close(indices_vals(VALS, indices), t.tensor([[1.0, 2], [9, 8]]))
    t.testing.assert_close(vocab_avg_val(VALS, indices), t.tensor((1.5 + 8.5) / 2))


def test_answer_values_by_hand() -> None:
    assert batch_avg_answer_val(VALS, SINGLE).item() == (4 + 5) / 2
    assert batch_avg_answer_val(VALS, SINGLE, wrong_answer=True).item() == (1 + 9) / 2
    assert batch_avg_answer_val(VALS, SEVERAL).item() == (1.5 + 8.5) / 2


def test_ragged_answers_weigh_prompts_equally() -> None:
    means = t.tensor([(1 + 2 + 4) / 3, 9.0])
    t.testing.assert_close(batch_answer_vals(VALS, RAGGED), means)
    t.testing.assert_close(batch_avg_answer_val(VALS, RAGGED), means.mean())
    diffs = means - t.tensor([3.0, (5 + 8) / 2])
    t.testing.assert_close(batch_answer_diffs(VALS, RAGGED), diffs)
    t.testing.assert_close(batch_avg_answer_diff(VALS, RAGGED), diffs.mean())


def test_infinite_values_elsewhere_do_not_leak_into_ragged_answers() -> None:
    vals = VALS.clone()
    vals[1, 0] = -math.inf
    batch = make_batch([t.tensor([0, 1]), t.tensor([2])], t.tensor([[3], [3]]))
    assert batch_avg_answer_val(vals, batch).item() == (1.5 + 9) / 2


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=6),
    st.integers(0, 1000),
)
def test_ragged_answers_equal_a_loop(rows: list[list[int]], seed: int) -> None:
    generator = t.Generator().manual_seed(seed)
    vals = t.randn(len(rows), 10, generator=generator, dtype=t.float64)
    answers = [t.tensor(row) for row in rows]
    batch = make_batch(answers, answers)
    loop = t.stack([vals[i, row].mean() for i, row in enumerate(rows)])
    t.testing.assert_close(batch_answer_vals(vals, batch), loop)
    n_top = sum(int(vals[i].argmax()) in row for i, row in enumerate(rows))
    share = correct_answer_proportion(vals, batch).item()
    assert share == pytest.approx(n_top / len(rows))


def test_answers_at_every_position() -> None:
    vals = t.stack([VALS, VALS + 10], dim=1)  # [batch=2, pos=2, vocab=4]
    batch = make_batch(
        t.tensor([[[3], [0]], [[0], [1]]]), t.tensor([[[0], [0]], [[2], [2]]])
    )
    t.testing.assert_close(batch_answer_vals(vals, batch), t.tensor([7.5, 11.0]))
    diffs = t.tensor([(3 + 0) / 2, (-4 - 2) / 2])
    t.testing.assert_close(batch_answer_diffs(vals, batch), diffs)
    assert correct_answer_proportion(vals, batch).item() == 0.25
    assert correct_answer_greater_than_incorrect_proportion(vals, batch).item() == 0.5


def test_ragged_answers_at_every_position() -> None:
    vals = t.stack([VALS, VALS + 10], dim=1)
    answers = [t.tensor([[3, 2], [0, 1]]), t.tensor([[0], [1]])]
    expected = t.tensor([(3.5 + 11.5) / 2, (5 + 17) / 2])
    batch = make_batch(answers, answers)
    t.testing.assert_close(batch_answer_vals(vals, batch), expected)


@pytest.mark.parametrize("dtype", [t.float64, t.bfloat16, t.float16])
def test_dtypes(dtype: t.dtype) -> None:
    vals = VALS.to(dtype)
    expected = t.float64 if dtype == t.float64 else t.float32
    assert batch_avg_answer_diff(vals, RAGGED).dtype == expected
    t.testing.assert_close(
        batch_answer_diffs(vals, RAGGED), batch_answer_diffs(VALS, RAGGED).to(expected)
    )
    logprobs = vals.log_softmax(-1)
    assert multibatch_kl_div(logprobs, logprobs).item() == 0.0
    assert correct_answer_proportion(vals, SINGLE).item() == 0.5


def test_percents_by_hand() -> None:
    target = t.tensor([[1.0, 0, 0, 3], [6, 0, 2, 0]])
    percents = batch_answer_diff_percents(VALS, target, SINGLE)
    t.testing.assert_close(percents, t.tensor([150.0, -100.0]))
    t.testing.assert_close(
        batch_answer_diff_percents(VALS, VALS, SINGLE), t.tensor([100.0, 100.0])
    )


def test_a_percentage_of_zero_is_nan_and_warns() -> None:
    target = t.tensor([[1.0, 0, 0, 1], [6, 0, 2, 0]])
    with pytest.warns(UndefinedPercentWarning, match="1 of 2 percentages are undefined"):
        percents = batch_answer_diff_percents(VALS, target, SINGLE)
    assert percents.isnan().tolist() == [True, False]


def test_a_percentage_of_rounding_noise_is_nan() -> None:
    target = t.tensor([[10.0, 0, 0, 10 + 1e-6], [6, 0, 2, 0]])
    with pytest.warns(UndefinedPercentWarning):
        assert batch_answer_diff_percents(VALS, target, SINGLE)[0].isnan()


def test_a_percentage_of_a_small_probability_is_defined() -> None:
    target = t.tensor([[1e-8, 0, 0, 3e-8], [6, 0, 2, 0]])
    assert batch_answer_diff_percents(target, target, SINGLE)[0].item() == 100.0


def test_correct_means_the_top_token_is_an_answer() -> None:
    assert correct_answer_proportion(VALS, SINGLE).item() == 0.5
    assert correct_answer_proportion(VALS, SEVERAL).item() == 0.5
    assert correct_answer_proportion(VALS, RAGGED).item() == 1.0


def test_a_tie_is_not_correct() -> None:
    vals = t.tensor([[4.0, 2, 3, 4], [9, 7, 9, 8]])
    assert correct_answer_proportion(vals, SINGLE).item() == 0.0
    assert correct_answer_greater_than_incorrect_proportion(vals, SINGLE).item() == 0.0
    assert correct_answer_proportion(t.zeros(2, 4), SINGLE).item() == 0.0


def test_greater_than_incorrect_looks_at_the_answers_only() -> None:
    batch = make_batch(t.tensor([[1], [1]]), [t.tensor([0]), t.tensor([0, 2])])
    assert correct_answer_proportion(VALS, batch).item() == 0.0
    assert correct_answer_greater_than_incorrect_proportion(VALS, batch).item() == 0.5


def test_a_wrong_answer_that_is_correct_too_does_not_count() -> None:
    batch = make_batch(t.tensor([[3], [2]]), t.tensor([[3], [2]]))
    assert correct_answer_greater_than_incorrect_proportion(VALS, batch).item() == 1.0


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            t.tensor([[4], [0]]),
            "run from 0 to 4, but the output has the entries 0 to 3",
        ),
        (t.tensor([[-1], [0]]), "run from -1 to 0"),
        (t.tensor([[0.5], [1.0]]), "are numbers .torch.float32., not token ids"),
        (t.zeros(2, 0, dtype=t.int64), "no `answers`; at least one"),
        (t.zeros(3, 1, dtype=t.int64), r"need `answers` of shape \(2, 'n'\)"),
        ([t.tensor([0])], r"need `answers` of shape \(2, 'n'\), not 1 x"),
        (t.zeros(2, 1, 1, dtype=t.int64), 'slice_output="last_seq"'),
    ],
)
def test_bad_answers(answers: Tensor | list[Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        batch_avg_answer_val(VALS, make_batch(answers, answers))


def test_answers_without_positions_do_not_fit_an_output_with_positions() -> None:
    with pytest.raises(DataError, match=r"shape \(2, 3, 4\) need `answers`"):
        batch_avg_answer_val(t.zeros(2, 3, 4), SINGLE)


def test_gradients_reach_the_answers() -> None:
    vals = VALS.clone().requires_grad_()
    batch_avg_answer_diff(vals, RAGGED).backward()
    expected = t.tensor([[1 / 6, 1 / 6, -1 / 2, 1 / 6], [-1 / 4, 0, 1 / 2, -1 / 4]])
    t.testing.assert_close(vals.grad, expected)


# ------------------------------------------------------------------------- divergences


def test_kl_by_hand() -> None:
    target = t.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
    circuit = t.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    expected = t.tensor([first, math.log(2)])
    t.testing.assert_close(kl_divs(circuit, target), expected)
    t.testing.assert_close(multibatch_kl_div(circuit, target), expected.mean())
    assert kl_divs(target, circuit)[1].item() == math.inf


def test_kl_of_a_single_number() -> None:
    logprobs = t.zeros(3, 1)
    with pytest.raises(DataError, match="single number.*'Clean MSE'.*target='mse'"):
        kl_divs(logprobs, logprobs)


def test_targets_by_hand() -> None:
    numbers = make_batch(t.tensor([[0.5, 1.5], [2.0, 3.0]]), t.zeros(2, 2))
    assert answer_targets(t.zeros(2, 2), numbers).tolist() == [[0.5, 1.5], [2.0, 3.0]]
    ids = make_batch(t.tensor([[2], [0]]), t.tensor([[1], [1]]))
    assert answer_targets(t.ones(2, 3), ids).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (t.tensor([[0.5], [1.5]]), r"numbers of shape \(2, 1\).*shape \(2, 3\)"),
        (t.tensor([[0, 1], [1, 2]]), "needs one answer for every prompt"),
        ([t.tensor([0]), t.tensor([1, 2])], "needs one answer for every prompt"),
        (t.tensor([[3], [0]]), "from 0 to 3, but the output has the entries 0 to 2"),
    ],
)
def test_targets_that_do_not_fit(answers: Tensor | list[Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        answer_targets(t.ones(2, 3), make_batch(answers, answers))


def test_kl_averages_over_all_leading_dimensions() -> None:
    logprobs = t.randn(2, 3, 5, generator=t.manual_seed(0)).log_softmax(-1)
    target = t.randn(2, 3, 5, generator=t.manual_seed(1)).log_softmax(-1)
    reference = t.nn.functional.kl_div(logprobs, target, reduction="sum", log_target=True)
    t.testing.assert_close(multibatch_kl_div(logprobs, target), reference / 6)


def test_kl_of_half_precision_is_computed_in_float32() -> None:
    logits = t.randn(2, 3, 50, generator=t.Generator().manual_seed(0))
    logprobs, targets = logits.log_softmax(-1).bfloat16()
    found = kl_divs(logprobs, targets)
    t.testing.assert_close(found, kl_divs(logprobs.float(), targets.float()))


@given(st.lists(st.floats(-30, 30), min_size=3, max_size=3))
def test_kl_of_equal_distributions_is_zero(logits: list[float]) -> None:
    logprobs = t.tensor([logits]).log_softmax(-1)
    assert multibatch_kl_div(logprobs, logprobs).item() == 0.0


# ----------------------------------------------------------------------- hard concrete


def test_hard_concrete_samples_are_independent_in_the_batch() -> None:
    generator = t.Generator().manual_seed(0)
    samples = sample_hard_concrete(t.zeros(3, 4), 5, generator=generator)
    assert samples.shape == (5, 3, 4)
    assert samples.min() >= 0 and samples.max() <= 1
    assert not t.equal(samples[0], samples[1])
    expanded = sample_hard_concrete(t.zeros(5, 4), 5, mask_expanded=True)
    assert expanded.shape == (5, 4)


def test_hard_concrete_uses_the_generator_only() -> None:
    before = t.get_rng_state()
    mask = t.tensor([0.3, -2.0])
    first, second = (
        sample_hard_concrete(mask, 2, generator=t.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert t.equal(first, second)
    assert t.equal(before, t.get_rng_state())


@pytest.mark.parametrize("logit", [-3.0, -1.0, 0.0, 2.0])
def test_expected_l0_is_the_share_of_samples_above_zero(logit: float) -> None:
    mask = t.tensor([logit], dtype=t.float64)
    generator = t.Generator().manual_seed(0)
    samples = sample_hard_concrete(mask, 100_000, generator=generator)
    share = (samples > 0).double().mean().item()
    assert share == pytest.approx(hard_concrete_expected_l0(mask).item(), abs=0.006)


def test_hard_concrete_without_noise() -> None:
    # sigmoid(ln 5) = 5 / 6, stretched: 5 / 6 * 1.2 - 0.1 = 0.9
    values = hard_concrete_value(t.tensor([math.log(5), -math.log(5), 50.0, -50.0]))
    t.testing.assert_close(values, t.tensor([0.9, 0.1, 1.0, 0.0]))


@pytest.mark.parametrize("dtype", [t.bfloat16, t.float64])
def test_hard_concrete_dtypes(dtype: t.dtype) -> None:
    mask = t.zeros(1000, dtype=dtype, requires_grad=True)
    samples = sample_hard_concrete(mask, 2)
    assert samples.dtype == dtype
    samples.sum().backward()
    assert mask.grad is not None and mask.grad.isfinite().all()


def test_expanded_mask_of_another_batch_size() -> None:
    with pytest.raises(GraphError, match=r"shape \(3, 4\) was called expanded"):
        sample_hard_concrete(t.zeros(3, 4), 5, mask_expanded=True)


# ------------------------------------------------------------------------ prune scores

SCORES = {"a": t.tensor([[1.0, -3.0], [0.0, 2.0]]), "b": t.tensor([-2.0])}


def test_flat_and_descending_scores() -> None:
    assert flat_prune_scores(SCORES).tolist() == [1, -3, 0, 2, -2]
    assert desc_prune_scores(SCORES).tolist() == [3, 2, 2, 1, 0]


def test_threshold_is_the_score_of_that_rank() -> None:
    desc_scores = desc_prune_scores(SCORES)
    for rank, expected in enumerate([math.inf, 3, 2, 2, 1, 0]):
        assert prune_scores_threshold(SCORES, rank).item() == expected
        assert prune_scores_threshold(desc_scores, rank).item() == expected


@pytest.mark.parametrize(
    ("edge_count", "n_edges"), [(0, 0), (1, 1), (2, 3), (3, 3), (4, 4), (5, 5)]
)
def test_a_circuit_includes_all_ties(edge_count: int, n_edges: int) -> None:
    mask, real_size = circuit_mask(SCORES, edge_count)
    assert real_size == n_edges
    assert sum(int(m.sum()) for m in mask.values()) == n_edges
    assert {k: m.shape for k, m in mask.items()} == {
        k: s.shape for k, s in SCORES.items()
    }


def test_the_circuit_of_no_edges_is_empty_even_with_infinite_scores() -> None:
    scores = {"a": t.tensor([math.inf, 1.0, -math.inf])}
    mask, real_size = circuit_mask(scores, 0)
    assert real_size == 0 and not mask["a"].any()
    assert circuit_mask(scores, 1)[1] == 2
    assert circuit_mask(scores, 3)[1] == 3


def test_boolean_scores_are_a_circuit() -> None:
    mask, real_size = circuit_mask({"a": t.tensor([True, False, True])}, 2)
    assert mask["a"].tolist() == [True, False, True] and real_size == 2


def test_modules_of_different_precision_share_one_ranking() -> None:
    scores = {
        "a": t.tensor([1.0, 1.002], dtype=t.bfloat16),
        "b": t.tensor([1.004, 1.001]),
    }
    assert circuit_mask(scores, 1)[0]["b"].tolist() == [True, False]
    assert circuit_mask(scores, 1)[1] == 1


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=30),
    st.data(),
)
def test_circuits_are_the_best_edges(values: list[int], data: st.DataObject) -> None:
    edge_count = data.draw(st.integers(0, len(values)))
    split = data.draw(st.integers(0, len(values)))
    scores = {
        "a": t.tensor(values[:split]).float(),
        "b": t.tensor(values[split:]).float(),
    }
    mask, real_size = circuit_mask(scores, edge_count)
    flat_mask = t.cat([mask["a"], mask["b"]]).tolist()
    inside = [abs(v) for v, m in zip(values, flat_mask, strict=True) if m]
    outside = [abs(v) for v, m in zip(values, flat_mask, strict=True) if not m]
    assert real_size == len(inside) >= edge_count
    assert not inside or not outside or min(inside) > max(outside)
    if inside:
        n_above_worst = sum(v > min(inside) for v in inside)
        assert n_above_worst < edge_count


@pytest.mark.parametrize("edge_count", [-1, 6])
def test_sizes_that_the_graph_does_not_have(edge_count: int) -> None:
    message = f"circuit of {edge_count} edges was asked for; the graph has 5"
    with pytest.raises(GraphError, match=message):
        prune_scores_threshold(SCORES, edge_count)
    with pytest.raises(GraphError, match=message):
        circuit_mask(SCORES, edge_count)


def test_nan_scores_have_no_rank() -> None:
    scores = {"a": t.tensor([1.0]), "b": t.tensor([math.nan, 1.0])}
    with pytest.raises(GraphError, match="1 of the 2 scores of 'b' are NaN"):
        circuit_mask(scores, 1)


def test_no_scores_at_all() -> None:
    with pytest.raises(GraphError, match="scores are empty"):
        flat_prune_scores({})
