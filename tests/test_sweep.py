"""Sweeps: what is checked, what runs, and what comes out, without files."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from auto_circuit import sweep, sweep_config
from auto_circuit.circuits import circuit_of_edges
from auto_circuit.errors import ConfigError, DataError, FileError, TrainingError, about
from auto_circuit.metrics.prune_metrics.answer_diff_percent import (
    LOGIT_DIFF_PERCENT_METRIC,
    measure_answer_diff_percent,
)
from auto_circuit.model_utils import load_model
from auto_circuit.model_utils.load_model import load_transformer
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.prune_algos import PruneAlgo, find_prune_algo
from auto_circuit.prune_algos.random_edges import random_prune_scores
from auto_circuit.sweep import run_sweep
from auto_circuit.sweep_config import ExperimentConfig, check_config
from auto_circuit.tasks import POCKET_IOI_TASK, POCKET_MODEL, Task, find_task
from auto_circuit.types import PatchType
from tests.texts import name_prompts, write_prompts


def test_ungroup_reaches_the_tasks() -> None:
    config = ExperimentConfig(ungroup=True)
    assert sweep_config._task("Pocket IOI", config).ungroup
    assert not sweep_config._task("Pocket IOI", ExperimentConfig()).ungroup
    assert config.folder != ExperimentConfig().folder


def test_kept_positions_reach_the_tasks() -> None:
    config = ExperimentConfig(keep_positions=True)
    assert sweep_config._task("Pocket IOI", config).keep_positions
    assert not sweep_config._task("Pocket IOI", ExperimentConfig()).keep_positions


def test_prompts_are_looked_at_before_the_first_task_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second task's have no wrong answers; no model is loaded to find that out."""
    prompt = {"clean": "a", "corrupt": "b", "answers": ["c"], "wrong_answers": []}
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"prompts": [prompt] * 4}))
    first = find_task("Pocket IOI")
    second = replace(
        first, key="none wrong", batch_size=2, batch_count=1, _dataset_name=path
    )
    tasks = {task.key: task for task in (first, second)}
    monkeypatch.setattr(sweep_config, "find_task", tasks.__getitem__)
    monkeypatch.setattr(sweep, "run_task", lambda *_: pytest.fail("it ran"))
    config = ExperimentConfig(tasks=tuple(tasks), algos=("EAP",), out=tmp_path / "out")
    with pytest.raises(DataError, match="2 of 2 prompts have no `wrong_answers`.*'EAP'"):
        run_sweep(config)
    config = replace(config, algos=("Random",))
    with pytest.raises(DataError, match="2 of 2 prompts have no .*'Logit Diff'"):
        run_sweep(config)
    kl = replace(config, metrics=("Clean KL Div",))
    assert len(check_config(kl)[0]) == 2


def test_the_folder_is_named_after_all_that_matters() -> None:
    config = ExperimentConfig()
    assert config.folder == ExperimentConfig().folder
    assert config.folder != ExperimentConfig(seed=1).folder
    assert config.folder.name == ExperimentConfig(out=Path("elsewhere")).folder.name


def test_a_prompt_file_is_a_task(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, name_prompts(9), name="mine")
    config = ExperimentConfig(
        tasks=("Pocket IOI", str(path)), model="gpt2", nodes=True, out=tmp_path / "out"
    )
    ioi, mine = check_config(config).tasks
    assert ioi._model_def == POCKET_MODEL
    assert (mine.key, mine._model_def) == (str(path), "gpt2")
    assert (mine.batch_size, mine.batch_count, mine.factorized) == (4, 1, False)
    (mine,) = check_config(replace(config, tasks=(str(path),), model=None)).tasks
    assert mine._model_def == POCKET_MODEL


def test_without_a_model_results_are_called_as_before_there_was_one() -> None:
    config = ExperimentConfig()
    assert "model" not in json.loads(config.json)
    assert json.loads(replace(config, model="gpt2").json)["model"] == "gpt2"
    assert replace(config, model="gpt2").digest != config.digest


@pytest.mark.parametrize(
    "tasks,model,message",
    [
        (
            ("Pocket IOI",),
            "gpt2",
            "`model` is 'gpt2', but each .* has a model of its own",
        ),
        (("a_b.json", "a-b.json"), None, "the prompt file 'a-b.json'.*signs alone"),
        (("x/" * 100 + "a.json",), None, "at most 200 bytes"),
    ],
)
def test_prompt_files_that_make_no_sweep(
    tasks: tuple[str, ...],
    model: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for task in tasks:
        Path(task).parent.mkdir(parents=True, exist_ok=True)
        write_prompts(Path(task).parent, name_prompts(4), name=Path(task).stem)
    with pytest.raises(ConfigError, match=message):
        check_config(ExperimentConfig(tasks=tasks, model=model, algos=("EAP",)))


@pytest.mark.parametrize(
    "config,message",
    [
        (ExperimentConfig(tasks=("Pocket IO",)), "no task 'Pocket IO'.*Did you mean"),
        (ExperimentConfig(algos=("ACDCC",)), "no prune algorithm 'ACDCC'.*Known: .*EAP"),
        (ExperimentConfig(metrics=("Logit",)), "no metric 'Logit'.*Known: .*Logit Diff"),
        (ExperimentConfig(metrics=()), "`metrics` is empty"),
        (ExperimentConfig(algos=("EAP", "EAP")), "`algos` names one of .* twice"),
    ],
)
def test_unknown_names(config: ExperimentConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run_sweep(config)


def test_the_seed_reaches_what_is_drawn(tmp_path: Path) -> None:
    config = ExperimentConfig(
        tasks=("Pocket IOI",),
        algos=("Random", "EAP", "MAttr quick"),
        metrics=("Logit Diff Percent",),
        circuit_sizes=(0, 1519),
        n_seeds=2,
        once=("MAttr quick",),
        out=tmp_path,
    )
    plan = check_config(config)
    assert list(config.seeds) == [42, 43]
    for seed, names in ((42, ["Random", "EAP", "MAttr quick"]), (43, ["Random", "EAP"])):
        of_seed = sweep.algos_of_seed(plan, config, seed)
        assert [algo.short_name for algo in of_seed] == names
        seeds = [
            parameters["seed"].default
            for algo in of_seed
            for parameters in (inspect.signature(algo.func).parameters,)
            if "seed" in parameters
        ]
        assert seeds == [seed] * (len(names) - 1)


def test_a_file_where_the_results_go(tmp_path: Path) -> None:
    config = ExperimentConfig(out=tmp_path)
    config.folder.write_text("mine")
    with pytest.raises(ConfigError, match="there is a file of that name"):
        check_config(config)
    assert config.folder.read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_is_noticed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sweep_config.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb")
    )
    with pytest.raises(ConfigError, match="cannot be written.*No space left"):
        check_config(ExperimentConfig(out=tmp_path))


def test_a_missing_prompt_file_is_noticed_before_the_first_task_runs(
    tmp_path: Path,
) -> None:
    config = ExperimentConfig(
        tasks=("Pocket IOI", "Docstring Token Circuit"), out=tmp_path
    )
    with pytest.raises(DataError, match="needs the prompt file"):
        run_sweep(config)


def test_eap_finds_the_ioi_circuit_and_chance_does_not() -> None:
    """At most a tenth of the edges recover 80 % of the logit difference."""
    task = POCKET_IOI_TASK
    model = task.model
    size = model.n_edges // 10
    percents = {}
    for name, find in (
        ("EAP", edge_attribution_patching_prune_scores),
        ("random", partial(random_prune_scores, seed=0)),
    ):
        scores = find(model, task.train_loader, None)
        outs = run_circuits(model, task.test_loader, [size], scores, PatchType.TREE_PATCH)
        ((n_edges, percent),) = measure_answer_diff_percent(model, task.test_loader, outs)
        assert n_edges <= model.n_edges / 10
        percents[name] = percent
    assert percents["EAP"] >= 80
    assert percents["random"] < 20


SMALL = ExperimentConfig(
    tasks=("Pocket IOI",),
    algos=("EAP",),
    metrics=("Logit Diff Percent",),
    circuit_sizes=(0, 20, 100),
    n_seeds=1,
)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Task]:
    yield POCKET_IOI_TASK
    POCKET_IOI_TASK.free()


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


class OwnTextError(Exception):
    """Writes its text itself, and takes other arguments."""

    def __init__(self, code: int, *, why: str) -> None:
        super().__init__(code)
        self.why = why

    def __str__(self) -> str:
        return self.why


ERRORS = [
    ValueError("no luck"),
    DataError("no luck"),
    FileError("no luck"),
    TrainingError("no luck"),
    AssertionError(),
    KeyError("no luck"),
    OSError(28, "No space left on device", "file"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "no luck"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_algorithms_error_says_where_it_happened(
    error: Exception, loaded: Task
) -> None:
    """And it stays the same error, of the same kind."""
    algo = PruneAlgo("Mine", "My algorithm", failing(error))
    with pytest.raises(type(error)) as raised:
        sweep.find_scores(loaded, algo)
    assert raised.value is error
    said = [str(error), *getattr(error, "__notes__", ())]
    for words in ("Pocket IOI", "seed 42", "My algorithm"):
        assert any(words in text for text in said)
    assert isinstance(error, AssertionError) or re.search("no luck|No space", str(error))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
def test_an_error_that_writes_its_own_text_has_a_note() -> None:
    error = OwnTextError(3, why="because")
    with pytest.raises(OwnTextError) as raised, about("Task 'A'"):
        raise error
    assert raised.value is error and error.args
    assert str(error) == "because" and error.__notes__ == ["Task 'A'"]


def test_a_metrics_error_says_where_it_happened(loaded: Task) -> None:
    metric = replace(
        LOGIT_DIFF_PERCENT_METRIC, prompt_func=failing(ZeroDivisionError("no luck"))
    )
    scores = loaded.model.new_prune_scores()
    found = sweep.FoundScores("Pocket IOI", 42, "key", "My algorithm", scores, 1.0)
    message = (
        "^Task 'Pocket IOI', seed 42, algorithm 'My algorithm': metric 'Logit Diff "
        "Percent': no luck$"
    )
    with pytest.raises(ZeroDivisionError, match=message):
        sweep.measure_scores(loaded, found, [metric], SMALL)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("Clean KL Div", "metric 'Clean KL Div': .* single number"),
        ("Logit Diff", "metric 'Logit Diff': `answers` are numbers"),
    ],
)
def test_metrics_that_do_not_fit_are_found_before_the_first_task_runs(
    metric: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second task's outputs are numbers, which have no words to measure."""
    monkeypatch.setattr(sweep, "run_task", failing(AssertionError("it ran")))
    config = replace(
        SMALL,
        tasks=("Tracr reverse Token Circuit", "Tracr xproportion Token Circuit"),
        metrics=(metric,),
        circuit_sizes=(),
        out=tmp_path,
    )
    where = "Task 'Tracr xproportion Token Circuit': "
    with pytest.raises(DataError, match=where + message):
        run_sweep(config)


def test_prompts_that_do_not_fit_are_found_before_the_first_task_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What only the model's tokenizer knows: a word that it has not."""
    prompt = {"clean": "a", "corrupt": "b", "answers": ["c"], "wrong_answers": ["d"]}
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"prompts": [prompt] * 4}))
    first = find_task("Pocket IOI")
    second = replace(first, key="Mine", batch_size=2, batch_count=1, _dataset_name=path)
    tasks = {task.key: task for task in (first, second)}
    monkeypatch.setattr(sweep_config, "find_task", tasks.__getitem__)
    monkeypatch.setattr(sweep, "run_task", failing(AssertionError("it ran")))
    config = replace(SMALL, tasks=tuple(tasks), circuit_sizes=(), out=tmp_path / "out")
    with pytest.raises(DataError, match="^Task 'Mine': .* the tokenizer does not know"):
        run_sweep(config)


def test_seeds_share_a_model_and_have_prompts_of_their_own(loaded: Task) -> None:
    other = loaded.with_seed(7)
    assert other.model.wrapped_model is loaded.model.wrapped_model
    assert other.read_prompts() == replace(loaded, seed=7).read_prompts()
    assert other.read_prompts() != loaded.read_prompts()


def test_the_only_task_of_a_sweep_loads_its_model_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The checks before the first cell load it, too; a large model takes minutes."""
    names = []

    def load(name: str | Path, *args: Any) -> Any:
        names.append(name)
        return load_transformer(name, *args)

    monkeypatch.setattr(load_model, "load_transformer", load)
    config = replace(SMALL, algos=("Random",), n_seeds=2, out=tmp_path)
    assert [run.seed for run in run_sweep(config)] == [42, 43]
    assert len(names) == 1


def test_a_run_is_data_without_a_model(loaded: Task) -> None:
    """Its pieces can be kept, sent to another process, and compared."""
    found = sweep.find_scores(loaded, find_prune_algo("EAP"))
    metrics = [LOGIT_DIFF_PERCENT_METRIC]
    measured = sweep.measure_scores(loaded, found, metrics, SMALL)
    assert measured == sweep.measure_scores(loaded, found, metrics, SMALL)
    sent = pickle.loads(pickle.dumps((found, measured)))
    assert sent[1] == measured and len(pickle.dumps(sent)) < 1e6
    assert [row.n_edges for row in measured.rows] == [0, 20, 100]
    assert {row.seed for row in measured.rows} == {42}
    circuit = measured.circuit
    assert circuit is not None and circuit.n_edges == 100
    assert len(circuit.document["edges"]) == len(circuit.drawing.edges) == 100
    assert circuit.percent == measured.rows[-1].value > 80


def test_only_the_first_seed_has_circuits(loaded: Task) -> None:
    found = sweep.find_scores(loaded, find_prune_algo("EAP"))
    config = replace(SMALL, seed=41)
    assert not sweep.measure_scores(
        loaded, found, [LOGIT_DIFF_PERCENT_METRIC], config
    ).circuit


def test_scores_of_0_do_not_take_edges_out_of_a_circuit(loaded: Task) -> None:
    circuit = circuit_of_edges(loaded.model, ["A0.0->Resid End", "MLP 3->Resid End"])
    scores = loaded.model.new_prune_scores(2.0)
    inside = sweep.scores_inside(circuit, scores)
    assert sum(float(of_module.sum()) for of_module in inside.values()) == 4.0
    scores["blocks.3.hook_resid_post"] = scores["blocks.3.hook_resid_post"] * 0
    inside = sweep.scores_inside(circuit, scores)
    assert sum(float(of_module.sum()) for of_module in inside.values()) == 2.0
    scores = loaded.model.new_prune_scores(float("inf"))
    inside = sweep.scores_inside(circuit, scores)
    assert not any(of_module.isnan().any() for of_module in inside.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2**32 - 1, "n_seeds": 2}, "`seed` is 4294967295; expected .* at most"),
        ({"tasks": ("pocket ioi",)}, "no task 'pocket ioi'.* Did you mean 'Pocket IOI'"),
        ({"algos": ("eap",)}, "no prune algorithm 'eap'.* Did you mean 'EAP'"),
        ({"metrics": ("logit diff",)}, "no metric .* Did you mean 'Logit Diff'"),
    ],
)
def test_what_a_configuration_may_say(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(replace(SMALL, out=tmp_path, **change))
