"""Loaders as code for auto-circuit makes and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch as t
from torch import Tensor
from torch.utils.data import RandomSampler, Subset

from auto_circuit.data import (
    PromptDataLoader,
    PromptDataset,
    PromptPairBatch,
    load_datasets_from_json,
)
from auto_circuit.errors import ConfigError, DataError, GraphError
from auto_circuit.metrics.prune_metrics.answer_value import measure_answer_val
from auto_circuit.metrics.prune_metrics.kl_div import measure_kl_div
from auto_circuit.prune import run_circuits
from auto_circuit.tasks import Task
from auto_circuit.types import AblationType, PatchType
from auto_circuit.utils.ablation_activations import batch_src_ablations, src_ablations
from auto_circuit.utils.graph_utils import patch_mode
from auto_circuit.utils.misc import repo_path_to_abs_path
from auto_circuit.utils.tensor_ops import batch_answer_diffs, batch_avg_answer_val
from tests.micro import CLEAN, micro_model
from tests.texts import write_prompts

SCALES = [1.0, 2.0, 3.0, 4.0, 5.0]


def dataset() -> PromptDataset:
    clean = [scale * CLEAN for scale in SCALES]
    ones, zeros = [t.tensor([1])] * 5, [t.tensor([0])] * 5
    return PromptDataset(clean, [-row for row in clean], ones, zeros)


def loader(**options: Any) -> PromptDataLoader:
    return PromptDataLoader(dataset(), None, 0, **{"batch_size": 2, **options})


def scales(prompts: PromptDataLoader) -> list[list[int]]:
    """Which prompts each batch has, by their scale."""
    return [(batch.clean[:, -1, 0]).int().tolist() for batch in prompts]


# ------------------------------------------------------------------------- the order


def test_shuffle_is_one_order_that_the_seed_gives() -> None:
    before = t.get_rng_state()
    found = scales(loader(shuffle=True, seed=3))
    assert found == scales(loader(shuffle=True, seed=3)) != [[1, 2], [3, 4], [5]]
    assert sorted(sum(found, [])) == [1, 2, 3, 4, 5]
    assert found != scales(loader(shuffle=True, seed=4))
    by_generator = scales(loader(shuffle=True, generator=t.Generator().manual_seed(3)))
    assert by_generator == found
    assert t.equal(t.get_rng_state(), before)
    assert scales(loader(shuffle=False)) == scales(loader()) == [[1, 2], [3, 4], [5]]


def test_a_shuffled_loader_gives_the_same_batches_again() -> None:
    """Outputs are told by their batches' keys: they must be there when metrics read again."""
    shuffled, plain = loader(shuffle=True, seed=1), loader()
    keys = [batch.key for batch in shuffled]
    assert len(set(keys)) == 3 and keys == [batch.key for batch in shuffled]
    model = micro_model()
    scores = model.circuit_prune_scores(["B0.1->Resid End"])
    found, expected = (
        measure_answer_val(model, prompts, run_circuits(model, prompts, [1], scores))
        for prompts in (shuffled, plain)
    )
    # -41 where the prompt is CLEAN, by hand; the mean of the scales is 3.
    assert found == expected == [(1, pytest.approx(-41 * 3))]
    outs = run_circuits(model, shuffled, [0, 13], scores, PatchType.TREE_PATCH)
    assert measure_kl_div(model, shuffled, outs)[-1][1] == pytest.approx(0, abs=1e-6)


def test_samplers_and_subsets() -> None:
    assert scales(loader(sampler=[4, 0, 0])) == [[5, 1], [1]]
    drawn = loader(sampler=RandomSampler(SCALES, generator=t.Generator().manual_seed(0)))
    assert scales(drawn) == scales(drawn)
    assert drawn.n_prompts == 5
    subset = PromptDataLoader(Subset(dataset(), [3, 1]), None, 0, batch_size=2)
    assert scales(subset) == [[4, 2]] and subset.n_prompts == 2
    inner = Subset(Subset(dataset(), [3, 1, 0]), [2, 1])
    shuffled = PromptDataLoader(inner, None, 0, batch_size=1, shuffle=True)
    assert sorted(scales(shuffled)) == [[1], [2]]
    for sampler, message in (
        ([5], "yields 5; expected places from 0 to 4"),
        (iter([1]), "expected places in the data set"),
    ):
        with pytest.raises(ConfigError, match=message):
            loader(sampler=sampler)
    with pytest.raises(ConfigError, match="not both"):
        loader(sampler=[1], shuffle=True)


def test_other_options_of_torch() -> None:
    """`drop_last` makes the batches that auto-circuit made."""
    dropped = loader(drop_last=True)
    assert scales(dropped) == [[1, 2], [3, 4]] and dropped.n_prompts == 4
    assert loader().n_prompts == 5
    assert scales(PromptDataLoader(dataset(), None, 0)) == [[1], [2], [3], [4], [5]]
    for options, message in (
        ({"collate_fn": list}, "does not take `collate_fn`"),
        ({"batch_sampler": [[0]]}, "does not take `batch_sampler`"),
        ({"batch_size": None}, "`batch_size` is None"),
        ({"drop_last": 1}, "`drop_last` is 1; expected True or False"),
        ({"shuffle": True, "generator": 1}, "expected a torch.Generator"),
        ({"shuffle": True, "seed": -1}, "`seed` is -1"),
        ({"prefetch_factor": 2}, "options do not fit"),
    ):
        with pytest.raises(ConfigError, match=message):
            loader(**options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_workers_give_the_same_batches() -> None:
    found = loader(num_workers=2, pin_memory=True, shuffle=True, seed=3)
    plain = loader(shuffle=True, seed=3)
    assert scales(found) == scales(plain)
    assert [batch.key for batch in found] == [batch.key for batch in plain]


# ----------------------------------------------------------------- a short test split


def test_a_short_test_split_is_an_error_only_when_it_is_read(tmp_path: Path) -> None:
    rows: Any = CLEAN.tolist()
    prompt = {"clean": rows, "corrupt": rows[::-1], "answers": [1], "wrong_answers": [0]}
    path = write_prompts(tmp_path, [prompt] * 5)
    train, test = load_datasets_from_json(None, path, train_test_size=(4, 4))
    assert sum(len(batch.clean) for batch in train) == train.n_prompts == 4
    model = micro_model()
    message = r"5 prompts, but train_test_size=\(4, 4\) needs 8"
    for read in (
        lambda: next(iter(test)),
        lambda: run_circuits(model, test, [1], model.new_prune_scores(1.0)),
        lambda: batch_src_ablations(model, test, AblationType.ZERO),
    ):
        with pytest.raises(DataError, match=message):
            read()
    with pytest.raises(DataError, match="5 prompts"):
        load_datasets_from_json(None, path, train_test_size=(6, 0))
    task = Task("short", "short", 2, 2, False, micro_model().wrapped_model, path)
    assert task.model.n_edges == 13 and task.train_loader.n_prompts == 4
    with pytest.raises(DataError, match="needs 8"):
        list(task.test_loader)


# ------------------------------------------------------- means, and a smaller last batch


@pytest.mark.parametrize("side", ["CLEAN", "CORRUPT", "CLEAN_AND_CORRUPT"])
def test_every_prompt_counts_once_in_the_mean_of_a_data_set(side: str) -> None:
    """Batches of 2, 2 and 1: the mean of the scales is 3, that of the batches' means 3.3."""
    model, ablation = micro_model(), AblationType[f"TOKENWISE_MEAN_{side}"]
    acts = src_ablations(model, loader(), ablation)
    sign = {"CLEAN": 1, "CORRUPT": -1, "CLEAN_AND_CORRUPT": 0}[side]
    assert acts.shape[1] == 2
    t.testing.assert_close(acts[0, 0], sign * 3 * CLEAN)
    dropped = src_ablations(model, loader(drop_last=True), ablation)
    t.testing.assert_close(dropped[0, 0], sign * 2.5 * CLEAN)  # auto-circuit's


def test_a_mean_is_patched_into_the_smaller_last_batch_too() -> None:
    model, prompts = micro_model(), loader()
    acts = src_ablations(model, prompts, AblationType.TOKENWISE_MEAN_CORRUPT)
    found: list[Tensor] = []
    with patch_mode(model, acts, model.edges):
        for batch in prompts:
            found.append(model(batch.clean)[model.out_slice])
    # All edges are patched: the output is that of the mean, -3 times CLEAN.
    t.testing.assert_close(t.cat(found), -3 * t.tensor([[25.0, 49.0]]).expand(5, 2))
    *_, batch = prompts
    repeated = acts.contiguous()  # activations of two prompts, for all that one knows
    with (
        patch_mode(model, repeated, model.edges),
        pytest.raises(GraphError, match="shape"),
    ):
        model(batch.clean)


def test_a_batch_of_answers_alone() -> None:
    """By hand: the answers' mean is (2 + 5) / 2, the wrong ones' (1 + 6) / 2."""
    vals = t.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    answers, wrong = t.tensor([[1], [1]]), t.tensor([[0], [2]])
    one = t.tensor(0)
    batch = PromptPairBatch(12, 0, one, one, answers, wrong)
    assert float(batch_avg_answer_val(vals, batch)) == 3.5
    assert batch_answer_diffs(vals, batch).tolist() == [1.0, -1.0]
    with pytest.raises(DataError, match="`wrong_answers` has 1 rows"):
        PromptPairBatch(12, 0, one, one, answers, wrong[:1])
    with pytest.raises(DataError, match="`clean`"):
        PromptPairBatch(12, 0, one, t.zeros(2, 3), answers, wrong)


# ------------------------------------------------------- the files of auto-circuit's tests


@pytest.mark.parametrize("name", ["", "_multiple_answers"])
def test_micro_model_inputs(name: str) -> None:
    """The numbers of its tests, by hand (the same ones for every prompt)."""
    path = repo_path_to_abs_path(f"datasets/micro_model_inputs{name}.json")
    train, test = load_datasets_from_json(
        None, path, batch_size=7, train_test_size=(35, 35)
    )
    model = micro_model()
    for prompts in (train, test):  # equal batches of one loader are told apart
        assert len({batch.key for batch in prompts}) == 5
    for batch in (*train, *test):
        t.testing.assert_close(model(batch.clean)[:, -1], t.tensor([[25.0, 49.0]] * 7))
        t.testing.assert_close(
            model(batch.corrupt)[:, -1], t.tensor([[-25.0, -49.0]] * 7)
        )
    scores = model.circuit_prune_scores(
        edge_dict={
            "B0.1->Resid End": 3.0,
            "B0.0->B1.1": 2.0,
            "Resid Start->B0.0": 1.0,
        }
    )
    outs = run_circuits(model, test, [0, 1, 2, 3], scores)
    by_hand = {0: [-25, -49], 1: [-19, -41], 2: [-13, -25], 3: [-9, -13]}
    for n_edges, row in by_hand.items():
        for out in outs[n_edges].values():
            t.testing.assert_close(out, t.tensor([row] * 7).float())
    answers = {n: (row[1] if name == "" else sum(row) / 2) for n, row in by_hand.items()}
    assert dict(measure_answer_val(model, test, outs)) == pytest.approx(answers)


def test_mini_prompts_are_tokens_of_the_pocket_model() -> None:
    from transformers import AutoTokenizer

    from auto_circuit.prompt_files import read_prompt_file
    from auto_circuit.tasks import POCKET_MODEL

    file = read_prompt_file(repo_path_to_abs_path("datasets/mini_prompts.json"))
    tokenizer: Any = AutoTokenizer.from_pretrained(POCKET_MODEL)
    for prompt in file.prompts:
        clean, corrupt, *answers = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (
                prompt.clean,
                prompt.corrupt,
                *prompt.answers,
                *prompt.wrong_answers,
            )
        )
        assert len(clean) == len(corrupt) == 2 and clean[0] == corrupt[0]
        assert clean != corrupt
        assert [len(ids) for ids in answers] == [1, 1] and answers[0] != answers[1]
        assert tokenizer.unk_token_id not in (*clean, *corrupt, *answers[0], *answers[1])
