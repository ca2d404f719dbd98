"""The tables and figures of Miller et al. 2024, on local stand-ins of tasks and models."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch as t
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from auto_circuit import experiments, tasks
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
from auto_circuit.tasks import IOI_TOKEN_CIRCUIT_TASK, Task
from auto_circuit.types import Edge
from auto_circuit.utils.ablation_activations import src_ablations
from auto_circuit.utils.graph_utils import patch_mode
from auto_circuit.utils.patchable_model import PatchableModel
from tests.browser import check_shown
from tests.models import randomize
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


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, task: Task) -> Task:
    monkeypatch.setitem(tasks.TASK_DICT, task.key, task)
    other = replace(task, key="Tiny Unknown", token_circuit=False, _true_edge_func=None)
    monkeypatch.setitem(tasks.TASK_DICT, other.key, other)
    return task


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


def test_one_command(
    known: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["paper", "--tasks", known.key, "Tiny Unknown", "--n-prompts", "4"]
    args += ["--algos", "HISP", "Random", "--out", str(tmp_path)]
    experiments.main(args)
    printed = capsys.readouterr().out
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
    (folder,) = tmp_path.iterdir()
    assert re.fullmatch("paper-[0-9a-f]{8}", folder.name)
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "verdicts.csv", "grid.csv", "aurocs.csv"),
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
