"""The tables and figures of Miller et al. 2024, on local stand-ins of tasks and models."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
from collections.abc import Collection, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch as t
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from auto_circuit import experiments, paper_cells, sweep_cells, tasks
from auto_circuit.errors import AutoCircuitError, ConfigError
from auto_circuit.metrics.official_circuits.circuits.ioi_official import (
    ioi_head_based_official_edges,
)
from auto_circuit.paper import (
    check_paper_config,
    circuit_of_task,
    grid_rows,
    run_paper,
)
from auto_circuit.paper_config import PaperConfig
from auto_circuit.prune import set_masks
from auto_circuit.reports import ChangedReportWarning
from auto_circuit.store import DamagedCellWarning
from auto_circuit.sweep_config import ExperimentConfig, check_config
from auto_circuit.tasks import (
    IOI_TOKEN_CIRCUIT_TASK,
    TRACR_REVERSE_TOKEN_CIRCUIT_TASK,
    Task,
)
from auto_circuit.types import Edge
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode
from auto_circuit.utils.patchable_model import PatchableModel
from tests.browser import check_shown
from tests.models import randomize
from tests.stored_cells import computed as computed
from tests.stored_cells import killed_in_second_cell
from tests.test_mib import ioi_row, save_model

REPO = Path(__file__).parents[1]


def known_edges(model: PatchableModel, **kwargs: Any) -> Collection[Edge]:
    """Stands for a published circuit: every other edge of the last position and one name."""
    last = (model.seq_len or 1) - 1
    return [edge for edge in model.edges if edge.seq_idx in (None, 4, last)][::2]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A task on a tiny model, whose prompts have one length."""
    folder = tmp_path_factory.mktemp("task")
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32)
    rows = [ioi_row(idx) for idx in range(20)]
    prompts = [
        {
            "clean": row["prompt"],
            "corrupt": row["s2_io_flip_counterfactual"]["prompt"],
            "answers": [row["metadata"]["indirect_object"]],
            "wrong_answers": [row["metadata"]["subject"]],
        }
        for row in rows
    ]
    (folder / "prompts.json").write_text(json.dumps({"prompts": prompts}))
    return Task(
        key="Tiny Known",
        name="Tiny",
        batch_size=(8, 12),
        batch_count=1,
        token_circuit=True,
        _model_def=save_model(folder / "tiny", GPT2LMHeadModel, config),
        _dataset_name=folder / "prompts.json",
        _true_edge_func=known_edges,
    )


@pytest.fixture(scope="module")
def known(task: Task) -> Iterator[Task]:
    other = replace(task, key="Tiny Unknown", token_circuit=False, _true_edge_func=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASK_DICT, task.key, task)
        patch.setitem(tasks.TASK_DICT, other.key, other)
        yield task


def paper_command(out: Path) -> list[str]:
    args = ["paper", "--tasks", "Tiny Known", "Tiny Unknown", "--n-prompts", "4"]
    return [*args, *"--algos HISP Random --out".split(), str(out)]


class Finished(NamedTuple):
    """What a run has left in its `out`, and printed."""

    out: Path
    printed: str


@pytest.fixture(scope="module")
def finished(known: Task, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("finished")
    with redirect_stdout(io.StringIO()) as printed:
        experiments.main(paper_command(out))
    return Finished(out, printed.getvalue())


def test_the_grid_by_hand(known: Task) -> None:
    """The circuit's ratio of means and mean of ratios, from masks that are set by hand."""
    config = PaperConfig(tasks=(known.key,), tracr_tasks=())
    tested = circuit_of_task(known, config)
    assert tested.name == "published" and tested.n_edges == len(known_edges(known.model))
    rows = grid_rows(known, tested)
    assert len(rows) == 2 * 2 * 3 and len({row.ratio_of_means for row in rows}) == 12
    row = next(
        row
        for row in rows
        if (row.unit, row.positions, row.ablation) == ("edges", "told apart", "Resample")
    )
    model = known.model
    masks = model.new_prune_scores(1.0)
    for edge in known_edges(model):
        masks[edge.dest.module_name][edge.patch_idx] = 0.0
    (batch,) = known.test_loader
    with t.no_grad():
        whole = model(batch.clean)[:, -1].double()
        with patch_mode(model, src_ablations(model, batch.corrupt)):
            set_masks(model, masks)
            found = model(batch.clean)[:, -1].double()
    wholes, diffs = (
        (out.gather(1, batch.answers) - out.gather(1, batch.wrong_answers)).flatten()  # type: ignore[arg-type]
        for out in (whole, found)
    )
    ratios = (100 * diffs / wholes).numpy()
    assert row.ratio_of_means == pytest.approx(
        float(100 * diffs.mean() / wholes.mean()), abs=0.01
    )
    assert row.mean_of_ratios == pytest.approx(ratios.mean(), abs=0.01)
    quartiles = np.quantile(ratios, (0.25, 0.5, 0.75))
    assert [row.q1, row.median, row.q3] == pytest.approx(list(quartiles), abs=0.01)
    assert (row.n_prompts, row.n_edges) == (12, tested.n_edges)
    assert abs(row.ratio_of_means - row.mean_of_ratios) > 0.1
    known.free()


def test_one_command(known: Task, finished: Finished) -> None:
    out, printed = finished
    for word in (
        "Verdicts",
        "Ablation",
        "published",
        "GT",
        "AUROC",
        "HISP",
        "Tracr reverse",
    ):
        assert word in printed
    (folder,) = out.glob("paper-*")
    assert re.fullmatch("paper-[0-9a-f]{8}", folder.name)
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "verdicts.csv", "grid.csv", "aurocs.csv", "report.json"),
        *("verdicts.html", "grid.html", "roc.html", "plotly.min.js"),
    }
    verdicts = pd.read_csv(folder / "verdicts.csv")
    assert set(verdicts["task"]) == {known.key, "Tiny Unknown"}
    assert set(verdicts["choice"]) == {
        *("Ablation", "Unit", "Positions", "Direction", "Patched", "Average")
    }
    grid = pd.read_csv(folder / "grid.csv")
    assert set(grid["circuit"]) == {"published", "EAP"} and len(grid) == 24
    # The verdict of the task's own choices is the grid's number, where they are the same.
    of_known = verdicts[
        (verdicts["task"] == known.key) & (verdicts["choice"] == "Ablation")
    ]
    for ablation in ("Resample", "Zero"):
        (verdict,) = of_known[of_known["value"] == ablation]["verdict"]
        (cell,) = grid[
            (grid["task"] == known.key)
            & (grid["unit"] == "edges")
            & (grid["positions"] == "told apart")
            & (grid["ablation"] == ablation)
        ]["ratio_of_means"]
        assert cell == pytest.approx(verdict, abs=1e-3)
    aurocs = pd.read_csv(folder / "aurocs.csv").set_index("algorithm")["auroc"]
    assert aurocs["HISP"] > 0.8 > aurocs["Random"]
    known.free()


# ------------------------------------------------------------------- what has been computed


CELLS = [
    *("Tiny Known, seed 42, GT: scores", "Tiny Known, published: verdicts"),
    *("Tiny Known, published: grid", "Tiny Unknown, seed 42, EAP: scores"),
    *("Tiny Unknown, EAP: verdicts", "Tiny Unknown, EAP: grid"),
    *("Tracr reverse Token Circuit, seed 42, HISP: scores",),
    *("Tracr reverse Token Circuit, HISP: ROC",),
    *("Tracr reverse Token Circuit, seed 42, Random: scores",),
    *("Tracr reverse Token Circuit, Random: ROC",),
]


def result_files(out: Path) -> dict[str, bytes]:
    (folder,) = out.glob("paper-*")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_seconds(out: Path) -> dict[str, bytes]:
    """The tables but for the time that scores took."""
    (folder,) = out.glob("paper-*")
    aurocs = pd.read_csv(folder / "aurocs.csv").drop(columns="seconds")
    files = {name: (folder / name).read_bytes() for name in ("verdicts.csv", "grid.csv")}
    return {**files, "aurocs": aurocs.to_csv().encode()}


def test_nothing_is_computed_twice(
    finished: Finished,
    computed: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    shutil.copytree(finished.out, tmp_path, dirs_exist_ok=True)
    (folder,) = tmp_path.glob("paper-*")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "notes.txt").write_text("mine")
    command = paper_command(tmp_path)
    experiments.main(command)
    assert computed == [] and "10 of 10 cells were stored" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir() if p in before} == before
    experiments.main([*command, "--force", "--only", "Tiny Known"])
    (folder / "grid.csv").unlink()
    with pytest.warns(ChangedReportWarning):
        experiments.main([*command, "--only", "HISP"])
    assert computed == CELLS[:3]
    assert without_seconds(tmp_path) == without_seconds(finished.out)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(SystemExit, match="`only` names 'Tiny'.* Did you mean 'Tiny"):
        experiments.main([*command, "--only", "Tiny"])


@pytest.mark.slow
def test_what_is_stored_is_what_is_computed_without_a_store(finished: Finished) -> None:
    _, config, _ = experiments.parse(paper_command(finished.out))
    expected, folder = run_paper(config), config.folder
    for name, rows in (("verdicts", expected.verdicts), ("grid", expected.grid)):
        table = pd.read_csv(folder / f"{name}.csv")
        pd.testing.assert_frame_equal(table, pd.DataFrame(rows), check_exact=True)
    rocs = pd.read_csv(folder / "aurocs.csv")
    assert list(rocs["auroc"]) == [row.auroc for row in expected.rocs]


def keys(config: PaperConfig) -> set[str]:
    cells = paper_cells.paper_cells(check_paper_config(config), config)
    return {work.cell.key for work in cells.works}


@pytest.mark.parametrize(
    ("change", "n_same"),
    [
        ({"circuit_share": 0.02}, 8),
        ({"circuit_algo": "Act Mag"}, 7),
        ({"n_prompts": 5}, 4),
        ({"seed": 7}, 0),
        ({"algos": ("HISP", "EAP")}, 8),
        ({"tasks": ("Tiny Known",)}, 7),
        ({"device": "cpu"}, 10),
    ],
    ids=str,
)
def test_what_changes_a_cell(known: Task, change: dict[str, Any], n_same: int) -> None:
    _, config, _ = experiments.parse(paper_command(Path("results")))
    assert len(keys(config)) == 10
    assert len(keys(config) & keys(replace(config, **change))) == n_same


def test_a_sweep_has_computed_the_scores(finished: Finished, computed: list[str]) -> None:
    """The same scores are one cell, wherever they are used."""
    config = ExperimentConfig(
        tasks=(TRACR_REVERSE_TOKEN_CIRCUIT_TASK.key,), algos=("HISP", "Random"), n_seeds=1
    )
    found = sweep_cells.sweep_cells(check_config(config), config)
    of_paper = {path.stem for path in (finished.out / "cells" / "scores").glob("*.json")}
    assert {one.scores.cell.key for one in found} <= of_paper


@pytest.mark.slow
def test_a_killed_run_goes_on(finished: Finished, tmp_path: Path, computed: Any) -> None:
    command = paper_command(tmp_path)
    for n_cells in range(1, 10):
        assert killed_in_second_cell(command) == -signal.SIGKILL
        assert len(list((tmp_path / "cells").glob("*/*.json"))) == n_cells
    experiments.main(command)
    assert computed == CELLS[-1:]
    assert without_seconds(tmp_path) == without_seconds(finished.out)


def test_an_interruption_says_what_is_kept(
    finished: Finished,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def interrupted(task: Task, tested: Any) -> Any:
        raise KeyboardInterrupt

    shutil.copytree(finished.out / "cells", tmp_path / "cells")
    shutil.rmtree(tmp_path / "cells" / "paper-grid")
    monkeypatch.setattr(paper_cells, "grid_rows", interrupted)
    with pytest.raises(SystemExit) as stop:
        experiments.main(paper_command(tmp_path))
    assert stop.value.code == experiments.INTERRUPTED
    *_, line = capsys.readouterr().err.splitlines()
    n_stored = len(list((tmp_path / "cells").glob("*/*.json")))
    assert 2 < n_stored < 10  # also those that this run has not come to
    assert (
        f"{n_stored} of 10 cells are finished, and kept in {tmp_path / 'cells'}" in line
    )


def test_the_others_go_on(
    finished: Finished,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """What failed is named, and the rest written; a damaged cell is computed again."""
    shutil.copytree(finished.out / "cells", tmp_path / "cells")
    (tmp_path / "cells").joinpath("paper-roc").rename(tmp_path / "gone")
    rows = next((tmp_path / "cells" / "paper-grid").glob("*.parquet"))
    rows.write_bytes(rows.read_bytes()[:-4])
    roc_row = paper_cells.roc_row

    def failing(task: Task, found: Any) -> Any:
        if found.name == "Random":
            raise RuntimeError("no memory")
        return roc_row(task, found)

    monkeypatch.setattr(paper_cells, "roc_row", failing)
    with pytest.warns(DamagedCellWarning, match="grid is computed again"):
        with pytest.raises(
            SystemExit,
            match="1 of 10 cells failed: Tracr reverse .*, Random: ROC: RuntimeError: no mem",
        ):
            experiments.main(paper_command(tmp_path))
    assert "Random: ROC: failed" in capsys.readouterr().out
    (folder,) = tmp_path.glob("paper-*")
    assert list(pd.read_csv(folder / "aurocs.csv")["algorithm"]) == ["HISP"]
    assert (folder / "grid.csv").read_bytes() == result_files(finished.out)["grid.csv"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tasks": ("Pocket IOY",)}, "There is no task 'Pocket IOY'. Did you mean"),
        (
            {"algos": ("HIPS",)},
            "There is no prune algorithm 'HIPS'. Did you mean .*'HISP'",
        ),
        (
            {"tracr_tasks": ("Pocket IOI",)},
            "The true circuit of 'Pocket IOI' is not known",
        ),
        ({"tasks": (), "tracr_tasks": ()}, "are empty; name at least one"),
        ({"tasks": ("Pocket IOI", "Pocket IOI")}, "is named twice"),
        ({"circuit_share": 0.0}, "`circuit_share` is 0.0"),
        ({"n_prompts": 0}, "`n_prompts` is 0"),
        ({"out": Path(__file__)}, "Results cannot be written"),
    ],
)
def test_configurations_that_make_no_sense(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    config = replace(PaperConfig(tasks=("Pocket IOI",), out=tmp_path), **change)
    with pytest.raises(ConfigError, match=text):
        check_paper_config(config)


def test_models_and_prompts_that_cannot_be_had(tmp_path: Path) -> None:
    """Before anything is computed, and with what to do."""
    with pytest.raises(AutoCircuitError, match="docstring_generator.py"):
        run_paper(PaperConfig(out=tmp_path))
    config = PaperConfig(
        tasks=(IOI_TOKEN_CIRCUIT_TASK.key,), model=str(tmp_path / "no"), out=tmp_path
    )
    with pytest.raises(AutoCircuitError, match="there is nothing"):
        run_paper(config)


# ------------------------------------------- a published task on a model of the same shape


def save_ioi_model(folder: Path) -> Path:
    """A small model with the heads of GPT-2, and the words of the published IOI prompts."""
    file = json.loads(
        (REPO / "datasets/ioi/ioi_vanilla_template_prompts.json").read_text()
    )
    texts = [p[side] for p in file["prompts"] for side in ("clean", "corrupt")]
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]", " ".join(texts)))
    vocabulary = ["<bos>", "<pad>", "<unk>", *words]
    inner = Tokenizer(
        WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )
    config = GPT2Config(
        n_layer=12, n_head=12, n_embd=24, n_positions=32, vocab_size=len(vocabulary)
    )
    model = GPT2LMHeadModel(config)
    randomize(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_published_circuit_of_a_published_task(tmp_path: Path) -> None:
    config = PaperConfig(
        tasks=(IOI_TOKEN_CIRCUIT_TASK.key,),
        tracr_tasks=(),
        model=str(save_ioi_model(tmp_path / "model")),
        n_prompts=4,
        out=tmp_path,
    )
    (task,) = check_paper_config(config).tasks
    tested = circuit_of_task(task, config)
    edges = ioi_head_based_official_edges(
        task.model, True, task.train_loader.word_idxs, task.train_loader.diverge_idx
    )
    assert (tested.name, tested.n_edges) == ("published", len(edges))
    assert 0 < len(edges) < task.model.n_edges / 10
    n_scored = sum(int((scores != 0).sum()) for scores in tested.scores.values())
    assert n_scored == len(edges)


@pytest.mark.slow
def test_a_browser_shows_the_figures(known: Task, tmp_path: Path) -> None:
    args = ["paper", "--tasks", known.key, "--n-prompts", "4", "--out", str(tmp_path)]
    experiments.main([*args, "--algos", "HISP"])
    for path in tmp_path.rglob("*.html"):
        check_shown(path)
    known.free()
