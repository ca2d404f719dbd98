"""The recipes of CONTRIBUTING, followed by newcomers, good and bad.

The good ones are put into a copy of the package, by one new file and the lines that the
recipe names; there the conformance tests must run over them and pass. The bad ones must
fail in the same tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch as t
from torch import Tensor

from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import ModelError
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.prompt_stats import prompt_means
from auto_circuit.metrics.prune_metrics.prune_metrics import PruneMetric
from auto_circuit.model_utils.micro_model_utils import MICRO_MODEL_ADAPTER, MicroModel
from auto_circuit.prune_algos.prune_algos import PruneAlgo
from auto_circuit.types import PruneScores
from auto_circuit.utils.graph_utils import set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from tests.metrics import conftest as small_models
from tests.metrics.prune_metrics import test_prune_metrics as of_metrics
from tests.model_utils import test_adapters as of_adapters
from tests.prune_algos import test_conformance as of_algos

REPO = Path(__file__).resolve().parents[1]
COPIED = ("auto_circuit", "datasets", "tests", "pyproject.toml")

# ---------------------------------------------------------------------- good newcomers

ALGO = '''"""The gradient of each mask, halfway."""

import torch as t

from auto_circuit.errors import DataError
from auto_circuit.prune_algos.prune_algo import PruneAlgo
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import iter_src_ablations
from auto_circuit.utils.graph_utils import patch_mode, set_all_masks, train_mask_mode
from auto_circuit.utils.tensor_ops import batch_avg_answer_diff


def newcomer_prune_scores(model, dataloader, official_edges):
    """How fast the answers' lead falls as an edge is patched."""
    if not len(dataloader):
        raise DataError("There are no prompts.")
    ablations = iter_src_ablations(
        model, dataloader, AblationType.RESAMPLE, clean_corrupt="corrupt"
    )
    with train_mask_mode(model) as masks:
        set_all_masks(model, 0.5)
        for batch, patch_src_outs in ablations:
            tokens, kwargs = batch.model_input("clean")
            with patch_mode(model, patch_src_outs):
                logits = model(tokens, **kwargs)[model.out_slice]
                (-batch_avg_answer_diff(logits, batch)).backward()
        return {name: mask.grad.clone() for name, mask in masks.items()}


NEWCOMER_PRUNE_ALGO = PruneAlgo(
    key="Newcomer", name="Newcomer", func=newcomer_prune_scores
)
'''
METRIC = '''"""How much more the circuit says the right answer than all wrong ones."""

from functools import partial

from auto_circuit.metrics.prune_metrics.prompt_stats import prompt_means
from auto_circuit.metrics.prune_metrics.prune_metric import PruneMetric
from auto_circuit.utils.tensor_ops import batch_answer_diffs


def prompt_newcomers(out, batch, full):
    """Each prompt's answers minus its wrong answers, twice."""
    return 2 * batch_answer_diffs(out, batch)


NEWCOMER_METRIC = PruneMetric(
    key="Newcomer",
    name="Newcomer",
    metric_func=partial(prompt_means, prompt_func=prompt_newcomers),
    prompt_func=prompt_newcomers,
)
'''
ADAPTER = '''"""Models that double everything at their end."""

from dataclasses import replace
from functools import partial

from torch.nn import Identity

from auto_circuit.model_utils.micro_model_utils import MICRO_MODEL_ADAPTER, MicroModel


class NewcomerModel(MicroModel):
    """A micro model whose output is doubled."""

    def forward(self, x):
        """Twice the micro model's output."""
        return 2 * super().forward(x)


NEWCOMER_ADAPTER = replace(
    MICRO_MODEL_ADAPTER,
    name="Newcomer",
    handles=lambda model: isinstance(model, NewcomerModel),
    example=NewcomerModel,
)
'''
GENERATOR = '''"""Which letter comes next: "A, B, C," -> " D"."""

import json
from pathlib import Path

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def prompt(start: int, other: int) -> dict:
    """Three letters and the next; in the corrupt prompt they start elsewhere."""
    return {
        "clean": ", ".join(LETTERS[start : start + 3]) + ",",
        "corrupt": ", ".join(LETTERS[other : other + 3]) + ",",
        "answers": [" " + LETTERS[start + 3]],
        "wrong_answers": [" " + LETTERS[other + 3]],
    }


if __name__ == "__main__":
    prompts = [prompt(start, (start + 7) % 23) for start in range(23)]
    path = Path(__file__).with_name("newcomer_prompts.json")
    path.write_text(json.dumps({"prompts": prompts}))
'''
TASKS = """NEWCOMER_TASK = Task(
    key="Newcomer",
    name="Newcomer",
    batch_size=4,
    batch_count=2,
    token_circuit=False,
    _model_def="gpt2-medium",
    _dataset_name="newcomer_prompts",
)
NEWCOMER_POCKET_TASK = Task(
    key="Newcomer Pocket",
    name="Newcomer Pocket",
    batch_size=4,
    batch_count=2,
    token_circuit=False,
    _model_def=POCKET_MODEL,
    _dataset_name="pocket/ioi_prompts",
)
"""


def add_member(file: Path, name: str, member: str, before: str = "") -> None:
    """A line in a tuple, and what must stand before it."""
    text = file.read_text()
    head, tuple_start, tail = text.partition(f"\n{name}: tuple[")
    line, end, rest = tail.partition("= (\n")
    assert end, f"{file} has no tuple {name}"
    file.write_text(head + before + tuple_start + line + end + f"    {member},\n" + rest)


def follow_recipes(repo: Path) -> None:
    package = repo / "auto_circuit"
    algos, metrics = package / "prune_algos", package / "metrics" / "prune_metrics"
    models, data = package / "model_utils", repo / "datasets"
    for folder, text, tuple_file, tuple_name, member in (
        (algos, ALGO, "prune_algos.py", "PRUNE_ALGOS", "NEWCOMER_PRUNE_ALGO"),
        (metrics, METRIC, "prune_metrics.py", "PRUNE_METRICS", "NEWCOMER_METRIC"),
        (models, ADAPTER, "adapters.py", "ADAPTERS", "NEWCOMER_ADAPTER"),
    ):
        (folder / "newcomer.py").write_text(text)
        module = ".".join((folder / "newcomer").relative_to(repo).parts)
        add_member(
            folder / tuple_file,
            tuple_name,
            member,
            before=f"from {module} import {member}  # isort: skip\n",
        )
    (data / "newcomer_generator.py").write_text(GENERATOR)
    subprocess.run([sys.executable, str(data / "newcomer_generator.py")], check=True)
    add_member(package / "tasks.py", "TASKS", "NEWCOMER_TASK", before="\n" + TASKS)
    add_member(package / "tasks.py", "TASKS", "NEWCOMER_POCKET_TASK")


@pytest.mark.slow
def test_newcomers_are_tested_and_pass(tmp_path: Path) -> None:
    for name in COPIED:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy2
        copy(REPO / name, tmp_path / name)
    follow_recipes(tmp_path)
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")
    }
    algo_files = ("prune_algos/test_conformance.py", "prune_algos/test_known_circuits.py")
    files = (*algo_files, "metrics/prune_metrics", "model_utils/test_adapters.py")
    tests = [f"tests/{name}" for name in (*files, "test_task_conformance.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rp", *tests]
        + ["-k", "Newcomer or test_micro_model or test_measure_prune_metrics"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
    for test, count in (
        ("test_scores_fit_the_graph_and_the_model_is_left_alone[Newcomer-small]", 1),
        ("test_the_circuit_is_found[Newcomer]", 1),
        ("test_prune_metrics.py::", 5),
        ("test_adapters.py::", 5),
        ("[Newcomer]", 5 + 5 + 3),
        ("[Newcomer Pocket]", 3),
    ):
        assert sum(test in line for line in passed) >= count, (test, passed)


# ----------------------------------------------------------------------- bad newcomers


def wrong_shapes(model: PatchableModel, *_: Any) -> PruneScores:
    return {
        name: t.ones(*scores.shape, 2)
        for name, scores in model.new_prune_scores().items()
    }


def masks_left_behind(model: PatchableModel, *_: Any) -> PruneScores:
    set_all_masks(model, 0.7)
    return model.new_prune_scores(1.0)


def misses_a_module(model: PatchableModel, *_: Any) -> PruneScores:
    return dict(list(model.new_prune_scores(1.0).items())[1:])


def not_a_number(model: PatchableModel, *_: Any) -> PruneScores:
    return model.new_prune_scores(float("nan"))


def only_zeros(model: PatchableModel, *_: Any) -> PruneScores:
    return model.new_prune_scores()


def another_draw_in_each_call(model: PatchableModel, *_: Any) -> PruneScores:
    seed = int.from_bytes(os.urandom(4), "big")
    generator = t.Generator().manual_seed(seed)
    return {
        name: t.rand(scores.shape, generator=generator)
        for name, scores in model.new_prune_scores().items()
    }


def left_in_training(model: PatchableModel, *_: Any) -> PruneScores:
    model.wrapped_model.train()
    return model.new_prune_scores(1.0)


@pytest.mark.parametrize(
    "func",
    [
        *(wrong_shapes, masks_left_behind, misses_a_module, not_a_number),
        *(only_zeros, another_draw_in_each_call, left_in_training),
    ],
)
def test_a_bad_algorithm_fails(func: Callable[..., PruneScores]) -> None:
    algo = PruneAlgo(key="Bad", name="Bad", func=func)
    with pytest.raises(AssertionError):
        of_algos.test_scores_fit_the_graph_and_the_model_is_left_alone(algo, "small")


def unsigned(out: Tensor, batch: PromptPairBatch, full: FullModelOuts) -> Tensor:
    return (out[:, 1:] - out[:, :-1]).abs().sum(1)


def nan(out: Tensor, batch: PromptPairBatch, full: FullModelOuts) -> Tensor:
    return out[:, 0] * float("nan")


def wrong_sign(out: Tensor, batch: PromptPairBatch, full: FullModelOuts) -> Tensor:
    return (out - full.vals(batch, "clean")).square().sum(1)  # and not `lower_better`


@pytest.mark.parametrize("func", [unsigned, nan, wrong_sign])
def test_a_bad_metric_fails(func: Any) -> None:
    metric_func = partial(prompt_means, prompt_func=func)
    metric = PruneMetric("Bad", "Bad", metric_func, prompt_func=func)
    with pytest.raises(AssertionError):
        of_metrics.test_metric_prefers_the_model_to_its_opposite(
            metric, small_models.LookupModel(), small_models.outs_of_model
        )


def test_a_metric_beyond_its_bounds_fails() -> None:
    metric = replace(of_metrics.PRUNE_METRIC_DICT["Logit Diff"], bounds=(0.0, 1.0))
    with pytest.raises(AssertionError):
        of_metrics.test_metric_prefers_the_model_to_its_opposite(
            metric, small_models.LookupModel(), small_models.outs_of_model
        )


def test_an_adapter_that_misses_a_source_fails() -> None:
    def graph_nodes(*args: Any) -> Any:
        srcs, dests = MICRO_MODEL_ADAPTER.graph_nodes(*args)
        return srcs[:-1], dests

    adapter = replace(MICRO_MODEL_ADAPTER, graph_nodes=graph_nodes)
    with pytest.raises(ModelError):
        of_adapters.test_no_mask_is_clean_and_all_masks_are_corrupt(adapter)


def test_an_adapter_whose_sites_are_never_passed_fails() -> None:
    class NoBlocks(MicroModel):
        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.input(x))

    adapter = replace(MICRO_MODEL_ADAPTER, example=NoBlocks)
    with pytest.raises(ModelError, match="head_"):
        of_adapters.test_every_site_fires(adapter)


def test_an_adapter_without_an_example_fails() -> None:
    with pytest.raises(AssertionError, match="give MicroModel an `example`"):
        of_adapters.test_unpatched_the_model_is_bit_for_bit_as_it_was(
            replace(MICRO_MODEL_ADAPTER, example=None)
        )


def test_an_adapter_after_one_that_takes_its_models_fails() -> None:
    with pytest.raises(AssertionError):
        of_adapters.test_it_handles_its_example_and_no_other_does_before(
            replace(MICRO_MODEL_ADAPTER, name="Second")
        )
