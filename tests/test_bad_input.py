"""Input that means nothing is an error of ours, and NaN stays NaN.

The property tests in `tests/fuzz` try many more; here is one of each kind.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as t
from torch import Tensor

from auto_circuit.caches import load_cache, save_cache
from auto_circuit.circuit_files import (
    load_circuit,
    load_mib_circuit,
    save_circuit,
    save_mib_circuit,
)
from auto_circuit.errors import (
    AutoCircuitError,
    ConfigError,
    DataError,
    FileError,
    GraphError,
)
from auto_circuit.metrics.faithfulness import faithfulness_curve
from auto_circuit.metrics.prune_metrics.prompt_stats import NotANumberWarning
from auto_circuit.metrics.prune_metrics.prune_metrics import (
    CLEAN_MSE_METRIC,
    CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC,
    CORRECT_ANSWER_PERCENT_METRIC,
    LOGIT_DIFF_METRIC,
    PRUNE_METRICS,
    PruneMetric,
)
from auto_circuit.prune import run_circuits
from auto_circuit.ranking import circuit_mask
from auto_circuit.types import EdgeCounts
from auto_circuit.utils.graph_utils import patch_mode, patchable_model
from auto_circuit.utils.patchable_model import PatchableModel
from auto_circuit.visualize import draw_seq_graph
from tests.fuzzing import no_hang
from tests.micro import CLEAN, micro_loader, micro_model
from tests.models import ARCHITECTURES

EDGE = "B0.0->B1.1"


@pytest.fixture(scope="module")
def model() -> PatchableModel:
    return micro_model()


def numbered(model: PatchableModel) -> dict[str, Tensor]:
    """Scores that are all different."""
    edges = {edge: float(i + 1) for i, edge in enumerate(model.edges)}
    return model.circuit_prune_scores(edge_dict=edges)


# ------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("seq_len", [None, 3])
@pytest.mark.parametrize(
    "after",
    [" @ foo", " @ -1", " @ 1 @ 2", " @ ", " @ ²", " @ ٣", " @ 01", " @ 99999999999"],
)
def test_positions_are_read_strictly(after: str, seq_len: int | None) -> None:
    model = micro_model(seq_len=seq_len)
    with pytest.raises(GraphError, match="no edge"):
        model.find_edges(EDGE + after)


def test_a_position_needs_a_graph_with_positions(model: PatchableModel) -> None:
    with pytest.raises(GraphError, match="does not tell positions apart"):
        model.find_edges(f"{EDGE} @ 1")
    (edge,) = micro_model(seq_len=3).find_edges(f"{EDGE} @ 1")
    assert repr(edge) == f"{EDGE} @ 1"


@pytest.mark.parametrize("edges", ["", EDGE, {EDGE: 1.0}, (e for e in [EDGE]), b"x", 1])
def test_edges_are_a_collection_of_edges(model: PatchableModel, edges: Any) -> None:
    patch = t.zeros(model.plan.n_srcs, 1, 3, 2)
    with pytest.raises(ConfigError, match="`edges?` is .*; expected"):
        with patch_mode(model, patch, edges):
            pass
    with pytest.raises(ConfigError, match="`edges?` is .*; expected"):
        model.circuit_prune_scores(edges)


# ----------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.to_sparse(),
        lambda x: x.double(),
        lambda x: x.long(),
        lambda x: x.requires_grad_(),
    ],
)
def test_scores_are_converted_exactly(model: PatchableModel, convert: Any) -> None:
    scores = numbered(model)
    converted = {name: convert(values.clone()) for name, values in scores.items()}
    found = model.check_scores(converted)
    assert all(t.equal(found[name].double(), scores[name].double()) for name in scores)
    expected = run_circuits(model, micro_loader(), [3], scores)
    outs = run_circuits(model, micro_loader(), [3], converted)
    assert all(t.equal(outs[3][key], out) for key, out in expected[3].items())


def test_large_whole_numbers_stay_apart(model: PatchableModel) -> None:
    scores: Any = {k: v.long() + 2**40 for k, v in numbered(model).items()}
    assert circuit_mask(scores, 3)[1] == 3
    scores["output"] = scores["output"] + 2**60
    with pytest.raises(GraphError, match="does not tell apart"):
        circuit_mask(scores, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (t.ones(5, device="meta"), "have no values"),
        (t.ones(5, dtype=t.complex64), "complex"),
        ([[1], [1, 2]], "expected a Tensor"),
        ("scores", "expected a Tensor"),
        (None, "expected a Tensor"),
        (np.array(["a"] * 5), "expected a Tensor"),
        (t.ones(4), "shape"),
        (t.full((5,), math.nan), "NaN"),
    ],
)
def test_what_is_no_score_is_refused(
    model: PatchableModel, values: Any, message: str
) -> None:
    scores: Any = {**numbered(model), "output": values}
    for use in (
        lambda: run_circuits(model, micro_loader(), [3], scores),
        lambda: draw_seq_graph(model, scores),
        lambda: faithfulness_curve(model, micro_loader(), scores),
    ):
        with pytest.raises(GraphError, match=f"'output'.*{message}"):
            use()


@pytest.mark.parametrize(
    "counts", [[0.5], ["10"], [True], EdgeCounts.ALL, "10", 3, [3, None], [math.nan]]
)
def test_circuit_sizes_are_whole_numbers(model: PatchableModel, counts: Any) -> None:
    with pytest.raises(ConfigError, match="`test_edge_counts` is"):
        run_circuits(model, micro_loader(), counts, numbered(model))


def test_circuit_sizes_are_in_range(model: PatchableModel) -> None:
    for bad in (14, -1):
        with pytest.raises(GraphError, match="give a number from 0 to 13"):
            run_circuits(model, micro_loader(), [bad], numbered(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": math.nan}, "`threshold` is nan"),
        ({"score_threshold": "0"}, "`score_threshold` is '0'"),
        ({"seq_labels": "abc"}, "`seq_labels` is 'abc'"),
        ({"prune_scores": [1.0]}, "`prune_scores` is"),
        ({"orientation": "x"}, "`orientation` is 'x'"),
    ],
)
def test_figures(model: PatchableModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_seq_graph(model, **options)


# ---------------------------------------------------------------------------- outputs


def outputs(model: PatchableModel) -> tuple[Any, dict[int, dict[int, Tensor]]]:
    loader = micro_loader([1.0, 2.0])
    return loader, run_circuits(model, loader, [3, 13], numbered(model))


@pytest.mark.parametrize("metric", PRUNE_METRICS, ids=lambda metric: metric.key)
def test_nan_stays_nan_and_is_said(model: PatchableModel, metric: PruneMetric) -> None:
    loader, outs = outputs(model)
    for out in outs[3].values():
        out.fill_(math.nan)
    with pytest.warns(NotANumberWarning, match="1 of 2 circuits .* has 3 edges"):
        values = dict(metric.metric_func(model, loader, outs))
    assert math.isnan(values[3]) and math.isfinite(values[13])


@pytest.mark.parametrize(
    "metric",
    [CORRECT_ANSWER_PERCENT_METRIC, CORRECT_ANSWER_GREATER_THAN_INCORRECT_PERCENT_METRIC],
)
def test_one_nan_of_several_prompts(model: PatchableModel, metric: PruneMetric) -> None:
    loader, outs = outputs(model)
    next(iter(outs[3].values()))[0, 0] = math.nan
    with pytest.warns(NotANumberWarning):
        assert math.isnan(dict(metric.metric_func(model, loader, outs))[3])


@pytest.mark.parametrize("metric", [CLEAN_MSE_METRIC])
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 1), (1, 3)])
def test_outputs_do_not_broadcast(
    model: PatchableModel, metric: PruneMetric, shape: tuple[int, ...]
) -> None:
    loader, outs = outputs(model)
    outs[3] = {key: t.zeros(shape) for key in outs[3]}
    with pytest.raises(DataError, match="shape"):
        metric.metric_func(model, loader, outs)


@pytest.mark.parametrize(
    "change",
    [
        lambda outs: outs[3].update({-1: t.zeros(1, 2)}),
        lambda outs: outs[3].popitem(),
        lambda outs: outs[3].update(dict.fromkeys(outs[3], t.zeros(1, 2).long())),
        lambda outs: outs.clear(),
    ],
)
def test_outputs_are_those_of_the_loader(model: PatchableModel, change: Any) -> None:
    loader, outs = outputs(model)
    change(outs)
    with pytest.raises(DataError, match="outputs|output"):
        LOGIT_DIFF_METRIC.metric_func(model, loader, outs)


def test_faithfulness_of_equal_prompts_is_refused(model: PatchableModel) -> None:
    loader = micro_loader()
    loader.dataset.corrupt_prompts[:] = [CLEAN.clone()]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="equal within rounding"):
        faithfulness_curve(model, loader, numbered(model), budgets=(0.5, 1.0))


# ------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("score", "error"),
    [(1e308, GraphError), (1e-46, GraphError), (-1e39, GraphError), (None, DataError)],
)
def test_scores_that_do_not_fit_are_not_loaded(
    tmp_path: Path, model: PatchableModel, score: Any, error: type[Exception]
) -> None:
    path = tmp_path / "c.json"
    save_circuit(path, model, [EDGE])
    content = json.loads(path.read_text())
    del content["checksum"]
    assert load_circuit(_written(path, content), model)  # such files are read too
    content["edges"][EDGE] = score
    with pytest.raises(error, match=f"score of '{EDGE}'"):
        load_circuit(_written(path, content), model)


def _written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_scores_that_do_not_fit_are_not_saved(
    tmp_path: Path, model: PatchableModel
) -> None:
    scores = {name: values.double() for name, values in numbered(model).items()}
    scores["output"][0] = 1e39
    with pytest.raises(GraphError, match="score of .*1e.39"):
        save_circuit(tmp_path / "c.json", model, scores)
    assert not list(tmp_path.iterdir())


def test_every_changed_digit_is_noticed(tmp_path: Path, model: PatchableModel) -> None:
    path = tmp_path / "c.json"
    save_circuit(path, model, numbered(model))
    text = path.read_text()
    for old, new in ((": 3.0", ": 7.0"), ("B0.0->B1.0", "B0.0->B1.1"), ("null", "true")):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match="checksum|twice"):
            load_circuit(path, model)


def test_doubled_keys_and_deep_files(tmp_path: Path, model: PatchableModel) -> None:
    path = tmp_path / "c.json"
    for text, message in (
        ('{"format": 1, "format": 2}', "'format' twice"),
        ("[" * 100_000, "nested too deeply"),
    ):
        path.write_text(text)
        for load in (load_circuit, load_mib_circuit):
            with pytest.raises((DataError, ConfigError), match=message + "|MIB format"):
                load(path, model)
    with pytest.raises(DataError, match=message):
        load_circuit(path, model)


def test_pipes_folders_and_devices_are_not_read(
    tmp_path: Path, model: PatchableModel
) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "pipe.json", tmp_path / "folder.json", Path("/dev/zero")):
        with no_hang(), pytest.raises(FileError, match="is no file that can be read"):
            load_circuit(path, model)


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_damage_of_mib_files(tmp_path: Path, suffix: str) -> None:
    model = patchable_model(ARCHITECTURES["gpt2"](), factorized=True, separate_qkv=True)
    scores = model.circuit_prune_scores(list(model.edges)[:5])
    path = tmp_path / f"c{suffix}"
    save_mib_circuit(path, model, scores)
    if suffix == ".json":
        path.write_text(path.read_text().replace('"score": 1.0', '"score": 1e308', 1))
        with pytest.raises(GraphError, match="1e.308"):
            load_mib_circuit(path, model)
        return
    content = bytearray(path.read_bytes())
    place = content.index(t.tensor([1.0, 1.0]).numpy().tobytes())
    content[place + 2] ^= 64
    path.write_bytes(content)
    with pytest.raises(DataError, match="checksum of .* is wrong"):
        load_mib_circuit(path, model)


@pytest.mark.parametrize("kind", ["ours", "mib.json", "mib.pt", "figure"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = patchable_model(ARCHITECTURES["gpt2"](), factorized=True, separate_qkv=True)
    scores = model.circuit_prune_scores(list(model.edges)[:5])
    path = tmp_path / {"ours": "c.json", "figure": "c.html"}.get(kind, kind)
    path.write_text("old")

    def write() -> None:
        if kind == "ours":
            save_circuit(path, model, scores)
        elif kind == "figure":
            draw_seq_graph(model, scores, file_path=path)
        else:
            save_mib_circuit(path, model, scores)

    def full(self: Path, *args: Any, **kwargs: Any) -> None:
        with self.open("w") as file:
            file.write("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(FileError, match="No space left on device"):
            write()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"
    write()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


# ------------------------------------------------------------------------------ caches


@pytest.mark.parametrize("name", ["../esc", "a/b", "", "..", "x" * 300, "a\0b"])
def test_caches_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="`base_filename`"):
        save_cache({"a": 1}, str(tmp_path / "folder"), name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [{"a": 1.5}, {"a": t.ones(3)}])
def test_damaged_caches(tmp_path: Path, data: dict[str, Any]) -> None:
    path = save_cache(data, str(tmp_path), "x")
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    content = path.read_bytes()
    place = content.index(b"1.5") if b"1.5" in content else len(content) - 1
    path.write_bytes(content[:place] + b"2" + content[place + 1 :])
    with pytest.raises(DataError, match="checksum"):
        load_cache(str(tmp_path), path.name)


@pytest.mark.parametrize(
    "data",
    [{"a": t.ones(2, device="meta")}, {"a": t.ones(2).to_sparse()}, {"a": 10**5000}],
)
def test_what_cannot_be_cached(tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(AutoCircuitError):
        save_cache(data, str(tmp_path), "x")
    assert not list(tmp_path.iterdir())
