"""The recipes of CONTRIBUTING, followed by newcomers, good and bad.

The good ones are those of the page itself. They are put into a copy of the repository, by
one new file and two lines elsewhere each; there the conformance tests must run over them and
pass, and a sweep must measure them. The bad ones must fail in the same tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import unified_diff
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch as t
from torch import Tensor

from auto_circuit.data import PromptPairBatch
from auto_circuit.errors import ModelError
from auto_circuit.metrics.prune_metrics.full_model_outs import FullModelOuts
from auto_circuit.metrics.prune_metrics.measure_prune_metrics import measurement_rows
from auto_circuit.metrics.prune_metrics.prune_metrics import PruneMetric
from auto_circuit.model_utils.micro_model_utils import MICRO_MODEL_ADAPTER, MicroModel
from auto_circuit.prune_algos.prune_algos import PruneAlgo, run_prune_algos
from auto_circuit.tasks import POCKET_MODEL, Task
from auto_circuit.types import AblationType, PatchType, PruneScores
from auto_circuit.utils.graph_utils import patchable_model, set_all_masks
from auto_circuit.utils.patchable_model import PatchableModel
from tests.metrics import conftest as small_models
from tests.metrics.prune_metrics import test_prune_metrics as of_metrics
from tests.model_utils import test_adapters as of_adapters
from tests.prune_algos import test_conformance as of_algos

REPO = Path(__file__).resolve().parents[1]
COPIED = ("auto_circuit", "datasets", "tests", "pyproject.toml")

# ---------------------------------------------------------------------- good newcomers

FENCED = re.compile(r"^```(?:python|json)\n(.*?)^```$", re.M | re.S)
HUB_TASK = """HUB_TASK = Task("Hub", "Hub", 4, 1, False, "gpt2-medium", "store_prompts")
    HUB_TASK,
"""


@dataclass(frozen=True)
class Recipe:
    """A new file, and the lines of another one: one above a tuple, one in it."""

    title: str
    new_file: str
    text: str
    elsewhere: str
    tuple_name: str
    lines: str


def recipes() -> list[Recipe]:
    """Those of CONTRIBUTING, as they stand there."""
    page = (REPO / "CONTRIBUTING.md").read_text()
    part = page.partition("\n## To add something\n")[2].partition("\n## ")[0]
    return [recipe(section) for section in part.split("\n### ")[1:]]


def recipe(section: str) -> Recipe:
    text, lines = FENCED.findall(section)
    words, _, more_words = FENCED.sub("---", section).partition("---")
    more_words = more_words.partition("---")[0]
    (new_file,) = re.findall(r"`((?:auto_circuit|datasets)/\S+)`", words)
    (elsewhere,) = re.findall(r"`(auto_circuit/\S+)`", more_words)
    (tuple_name,) = re.findall(r"line in `([A-Z_]+)`", " ".join(more_words.split()))
    return Recipe(section.splitlines()[0], new_file, text, elsewhere, tuple_name, lines)


def follow(repo: Path, recipe: Recipe) -> None:
    assert not (repo / recipe.new_file).exists()
    (repo / recipe.new_file).write_text(recipe.text)
    add_lines(repo / recipe.elsewhere, recipe.tuple_name, recipe.lines)


def add_lines(file: Path, tuple_name: str, lines: str) -> None:
    """An import (in its place) or a constant above the tuple, and the tuple's new member."""
    above, member = lines.splitlines(keepends=True)
    text = file.read_text()
    if above.startswith("from "):
        package = re.escape(above.partition("import")[0].rpartition(".")[0] + ".")
        later = [
            match.start()
            for match in re.finditer(rf"^{package}.*$", text, re.M)
            if match[0].lower() > above.lower()
        ]
        place = later[0] if later else text.index(f"\n{tuple_name}: tuple[") + 1
    else:
        place = text.index(f"\n{tuple_name}: tuple[") + 1
    text = text[:place] + above + text[place:]
    head, tuple_start, tail = text.partition(f"\n{tuple_name}: tuple[")
    line, end, rest = tail.partition("= (\n")
    assert end, f"{file} has no tuple {tuple_name}"
    file.write_text(head + tuple_start + line + end + member + rest)


def texts(repo: Path) -> dict[Path, list[str]]:
    """The lines of every file that a recipe may touch."""
    return {
        path.relative_to(repo): path.read_text().splitlines()
        for name in COPIED
        for path in (
            [repo / name] if (repo / name).is_file() else (repo / name).rglob("*")
        )
        if path.suffix in (".py", ".json", ".toml", ".md")
    }


def changed_lines(old: dict[Path, list[str]], new: dict[Path, list[str]]) -> int:
    """How many lines of the files that were there came or went."""
    return sum(
        line[0] in "+-"
        for path, lines in old.items()
        if new[path] != lines
        for line in list(unified_diff(lines, new[path], n=0, lineterm=""))[2:]
    )


def run_in(repo: Path, *words: str) -> str:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")
    }
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=repo,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_the_page_has_a_recipe_for_each() -> None:
    assert [recipe.tuple_name for recipe in recipes()] == [
        *("PRUNE_ALGOS", "PRUNE_METRICS", "TASKS", "ADAPTERS"),
    ]


def made_by(recipe: Recipe, folder: Path, name: str) -> Any:
    """An object of a recipe's file, which is no part of the package."""
    path = folder / Path(recipe.new_file).name
    path.write_text(recipe.text)
    spec = spec_from_file_location(f"users_own_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def test_nothing_has_to_be_registered(tmp_path: Path) -> None:
    of_algo, of_metric, of_task, of_adapter = recipes()
    algo = made_by(of_algo, tmp_path, "HALFWAY_GRADIENT_PRUNE_ALGO")
    metric = made_by(of_metric, tmp_path, "ANSWER_RATIO_METRIC")
    adapter = made_by(of_adapter, tmp_path, "DOUBLED_MODEL_ADAPTER")
    prompts = tmp_path / "my_prompts.json"
    prompts.write_text(of_task.text)
    task = Task("Mine", "Mine", 4, 1, False, POCKET_MODEL, prompts)
    rows = measurement_rows(
        [AblationType.RESAMPLE],
        [metric],
        run_prune_algos([task], [algo]),
        PatchType.TREE_PATCH,
        test_edge_counts=[0, 100, task.model.n_edges],
        tasks=[task],
    )
    assert [row.metric for row in rows] == ["Answer Ratio"] * 3
    none, some, all_edges = (row.value for row in rows)
    assert 0 < none < 1 < some < all_edges
    model = patchable_model(adapter.example(), True, adapter=adapter)
    x = t.tensor([[[1.0, 2.0]]])
    assert t.equal(model(x), 2 * MicroModel()(x))


@pytest.mark.slow
def test_newcomers_are_tested_and_pass(tmp_path: Path) -> None:
    for name in COPIED:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy2
        copy(REPO / name, tmp_path / name)
    for recipe in recipes():
        before = texts(tmp_path)
        follow(tmp_path, recipe)
        after = texts(tmp_path)
        assert after.keys() - before.keys() == {Path(recipe.new_file)}, recipe.title
        assert changed_lines(before, after) <= 2, recipe.title
    run_in(tmp_path, "ruff", "check", "auto_circuit")
    run_in(tmp_path, "black", "--check", "-q", "auto_circuit")
    # A model of the hub is replaced by a random one.
    add_lines(tmp_path / "auto_circuit" / "tasks.py", "TASKS", HUB_TASK)
    algo_files = ("prune_algos/test_conformance.py", "prune_algos/test_known_circuits.py")
    files = (*algo_files, "metrics/prune_metrics", "model_utils/test_adapters.py")
    more = ("test_task_conformance.py", "test_wrong_answers.py", "test_imports.py")
    names = "Halfway or Answer_Ratio or Ratio or Store or Hub or Doubled"
    passed = run_in(
        tmp_path,
        *("pytest", "-q", "-rp", *(f"tests/{name}" for name in (*files, *more))),
        *("-k", f"{names} or micro_model or measure_prune_metrics or layer or the_error"),
    ).splitlines()
    for test, count in (
        (
            "test_scores_fit_the_graph_and_the_model_is_left_alone[Halfway Gradient-small]",
            1,
        ),
        ("test_the_circuit_is_found[Halfway Gradient]", 1),
        ("test_every_algorithm_says_whether_it_needs_them[Halfway Gradient]", 1),
        ("test_prune_metrics.py::", 5),
        ("test_every_metric_says_whether_it_needs_them[Answer Ratio]", 1),
        ("test_every_module_has_its_layer", 1),
        ("test_the_error_names_what_needs_none", 1),
        ("[Answer Ratio]", 5),
        ("[Doubled]", 5),
        ("[Store]", 3),
        ("[Hub]", 3),
    ):
        found = [line for line in passed if line.startswith("PASSED") and test in line]
        assert len(found) >= count, (test, passed)
    sweep = ("--tasks", "Store", "--algos", "Halfway Gradient", "--metrics")
    metrics = ("Answer Ratio", "Logit Diff Percent")
    run_in(
        tmp_path,
        *("auto_circuit.experiments", *sweep, *metrics, "--n-seeds", "1"),
        *("--out", str(tmp_path / "results")),
    )
    (measured,) = (tmp_path / "results").rglob("measurements.parquet")
    rows = pandas.read_parquet(measured)
    assert set(rows.task) == {"Store"} and set(rows.algo) == {"Halfway Gradient"}
    assert set(rows.metric) == set(metrics) and rows.value.notna().all()


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
    metric = PruneMetric("Bad", "Bad", prompt_func=func)
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
