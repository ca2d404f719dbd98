"""The results of sweeps, read back in a notebook."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pandas as pd
import pytest
import torch as t

import auto_circuit as ac
from auto_circuit.circuit_files import load_circuit
from auto_circuit.compared_results import BOTH, OTHER_ONLY, THIS_ONLY
from auto_circuit.errors import ConfigError, DataError, UnknownNameError
from auto_circuit.files import checksum
from auto_circuit.fingerprints import digest
from auto_circuit.loaded_results import LoadedResults, load_results
from auto_circuit.reports import REPORT_FILE, write_results
from auto_circuit.runner import run_experiment
from auto_circuit.store import put_folder
from auto_circuit.summary import ExperimentResults
from auto_circuit.sweep_config import (
    ExperimentConfig,
    Plan,
    check_config,
    config_of_json,
)
from auto_circuit.tasks import find_task
from auto_circuit.types import AblationType, EdgeCounts, PatchType

TASK, SCORES = "Pocket IOI", "scores/pocket-ioi-seed-42.safetensors"
CIRCUIT = "circuits/pocket-ioi/eap.json"


class Swept(NamedTuple):
    """A sweep with two seeds, and another of the same cells with another ablation."""

    found: ExperimentResults
    zero: ExperimentResults
    plan: Plan

    @property
    def config(self) -> ExperimentConfig:
        return self.found.config

    @property
    def out(self) -> Path:
        return Path(self.config.out)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    config = ExperimentConfig(
        name="small",
        tasks=(TASK,),
        algos=("Random", "EAP"),
        metrics=("Logit Diff Percent",),
        circuit_sizes=(0, 100, 1519),
        n_seeds=2,
        once=("Random",),
        out=tmp_path_factory.mktemp("loaded") / "results",
    )
    zero = replace(config, name="zero", ablation=AblationType.ZERO)
    found = run_experiment(config)
    return Swept(found, run_experiment(zero), check_config(config))


@pytest.fixture(scope="module")
def loaded(swept: Swept) -> LoadedResults:
    return load_results(swept.config.folder)


@pytest.fixture
def copy(swept: Swept, tmp_path: Path) -> Path:
    """A copy of the results' folder, to be damaged."""
    folder = tmp_path / "results" / swept.config.folder.name
    shutil.copytree(
        swept.config.folder, folder, ignore=shutil.ignore_patterns("*.js", "*.html")
    )
    return folder


# ----------------------------------------------------------------------- what is in a folder


def test_rows_are_all_measurements(swept: Swept, loaded: LoadedResults) -> None:
    rows = loaded.rows
    expected = pd.DataFrame([asdict(row) for row in swept.found.rows])
    assert set(rows.columns) == {*expected.columns, "experiment", "algorithm"}
    assert list(rows.columns)[:4] == ["experiment", "task", "algorithm", "algo"]
    assert len(rows) == len(expected) == 9
    for column in ("task", "algo", "metric", "ablation", "n_edges", "value", "seed"):
        assert rows[column].tolist() == expected[column].tolist(), column
    assert set(rows["experiment"]) == {swept.config.folder.name}
    names = dict(zip(rows["algo"], rows["algorithm"], strict=True))
    assert names == {algo.key: algo.short_name for algo in swept.plan.algos}
    for column in ("n_edges", "value", "std", "n_prompts", "seed"):
        assert pd.api.types.is_numeric_dtype(rows[column]), column


def test_the_summary_is_that_of_the_sweep(swept: Swept, loaded: LoadedResults) -> None:
    found = loaded.summary.drop(columns="experiment")
    expected = swept.found.summary
    assert found.columns.tolist() == expected.columns.tolist()
    for column in expected:
        wanted = expected[column]
        assert (found[column].isna() == wanted.isna()).all(), column
        known = wanted.notna()
        assert (found[column][known] == wanted[known]).all(), column  # bit for bit


def test_scores_are_those_that_were_computed(swept: Swept, loaded: LoadedResults) -> None:
    n_read = 0
    for run in swept.found.runs:
        for found in run.found:
            for name in (found.name, found.algo):
                scores = loaded.scores(TASK, name, seed=run.seed)
                assert list(scores) == list(found.scores) != sorted(found.scores)
                for module, expected in found.scores.items():
                    assert scores[module].dtype == expected.dtype
                    assert t.equal(scores[module], expected.cpu())
                n_read += 1
    assert n_read == 6
    first = loaded.scores(TASK, "EAP")
    assert all(
        t.equal(first[name], of) for name, of in loaded.scores(TASK, "EAP", 42).items()
    )


def test_scores_and_circuits_run(swept: Swept, loaded: LoadedResults) -> None:
    assert list(loaded.circuits) == [(TASK, "EAP")]
    circuit = loaded.circuits[TASK, "EAP"]
    of_eap = swept.found.runs[0].circuits[swept.plan.algos[1].key]
    assert circuit.document == of_eap.document
    assert len(circuit.edges) == of_eap.n_edges == 100
    model = find_task(TASK).model
    expected = load_circuit(swept.config.folder / CIRCUIT, model)
    read = circuit.scores(model)
    assert all(t.equal(read[name], scores) for name, scores in expected.items())
    scores = loaded.scores(TASK, "EAP")
    assert all(t.equal(scores[name][of != 0], of[of != 0]) for name, of in read.items())
    outs = ac.run_circuits(model, find_task(TASK).test_loader, [100], scores)
    assert list(outs) == [100]


def test_what_failed_is_there(swept: Swept, tmp_path: Path) -> None:
    config = replace(swept.config, out=tmp_path)
    broken = replace(swept.found, config=config, failed={"a cell": "its error"})
    write_results(broken, swept.plan.metrics, swept.plan.algos)
    found = load_results(config.folder)
    assert found.failed == {config.folder.name: {"a cell": "its error"}}
    assert "1 cell failed" in repr(found)


def test_nothing_failed_and_it_says_what_is_inside(loaded: LoadedResults) -> None:
    assert loaded.failed == {} and loaded.left_out == {}
    for text in (repr(loaded), loaded._repr_html_()):
        assert "1 task, 2 algorithms, 2 seeds" in text and "9 measurements" in text
        assert "1 circuit" in text
    assert "<table" in loaded._repr_html_()


# ---------------------------------------------------------------------------- configurations

CHANGED: dict[str, Any] = {
    "ablation": AblationType.TOKENWISE_MEAN_CORRUPT,
    "nodes": True,
    "token_positions": False,
    "reverse_clean_corrupt": True,
    "patch_type": PatchType.EDGE_PATCH,
    "mean_of_ratios": True,
    "name": "another ü",
    "tasks": ("Docstring", "IOI"),
    "algos": ("GT",),
    "metrics": (),
    "edge_counts": EdgeCounts.GROUPS,
    "circuit_sizes": (1, 10**12),
    "circuit_shares": (0.1, 1e-7, 1),
    "ungroup": True,
    "keep_positions": True,
    "seed": 2**32 - 40,
    "n_seeds": 7,
    "memory_limit": 0.5,
    "checkpoint": True,
    "spans": True,
    "crossing": True,
    "once": (),
    "device": "cuda:1",
    "model": "gpt2",
    "out": Path("elsewhere"),
}


def test_configurations_come_back_as_they_were(
    swept: Swept, loaded: LoadedResults
) -> None:
    assert loaded.configs == {swept.config.folder.name: swept.config}
    (as_text,) = load_results(str(swept.config.folder)).configs.values()
    assert as_text == replace(swept.config, out=str(swept.out))
    assert as_text.address == str(swept.config.folder)


@pytest.mark.parametrize("name", [f.name for f in fields(ExperimentConfig)])
def test_every_field_of_a_configuration_comes_back(name: str) -> None:
    config = ExperimentConfig(**{name: CHANGED[name]})
    assert getattr(config, name) != getattr(ExperimentConfig(), name)
    back = config_of_json(config.json, config.out)
    assert back == config
    assert type(getattr(back, name)) is type(getattr(config, name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seeed": 1, "ungruop": True}, "'seeed', 'ungruop'.* mean 'seed'.*'ungroup'"),
        ({"ablation": "ZEROO"}, "`ablation` is 'ZEROO'.* mean 'ZERO'"),
        ({"ablation": ["ZERO"]}, "`ablation` is"),
        ({"n_seeds": "3"}, "`n_seeds` is '3'; expected"),
        ({"tasks": "IOI"}, "`tasks` is 'IOI'"),
        ({"out": "x"}, "no field 'out'"),
        ([], "no object"),
    ],
)
def test_a_configuration_that_is_none(content: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        config_of_json(json.dumps(content), "results")


# --------------------------------------------------------------------- damage, other versions

READS: dict[str, Callable[[LoadedResults], object]] = {
    REPORT_FILE: lambda results: results,
    "config.json": lambda results: results,
    "measurements.parquet": lambda results: results,
    "summary.csv": lambda results: results,
    SCORES: lambda results: results.scores(TASK, "EAP"),
    CIRCUIT: lambda results: results.circuits[TASK, "EAP"],
}


def flipped(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize(
    "damage",
    [flipped, lambda c: c[: len(c) // 2], lambda _: b"", lambda _: b"foreign"],
    ids=["flipped", "truncated", "emptied", "foreign"],
)
def test_a_damaged_file_is_named(
    name: str, damage: Callable[[bytes], bytes], copy: Path
) -> None:
    READS[name](load_results(copy))
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    with pytest.raises(DataError, match=rf"{name} is damaged.*Run the same exp"):
        READS[name](load_results(copy.parent))


@pytest.mark.parametrize("name", [name for name in READS if name != REPORT_FILE])
def test_a_file_that_is_missing_is_named(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing.*Run the same exp"):
        READS[name](load_results(copy))


def test_other_versions_and_other_things_are_told(copy: Path) -> None:
    path = copy / REPORT_FILE
    report = json.loads(path.read_text())
    del report["checksum"]
    newer = {**report, "report": 99}
    path.write_text(json.dumps({"checksum": checksum(newer), **newer}))
    with pytest.raises(ConfigError, match="results of version 99, and version 3 is read"):
        load_results(copy)
    path.write_text(json.dumps({**report, "report": 1}))
    with pytest.raises(ConfigError, match="results of version 1,"):
        load_results(copy)
    path.unlink()
    with pytest.raises(
        ConfigError, match="has no report.json: it holds no sweep, or one"
    ):
        load_results(copy)
    with pytest.raises(ConfigError, match=r"no results of a sweep.*has no report.json"):
        load_results(copy.parent)


@pytest.mark.parametrize("name", ["nothing", "", "a file", "x" * 300, "nofs://x"])
def test_a_folder_without_results(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("mine")
    message = "no results of a sweep in .* expected|no results at 'nofs|too long"
    with pytest.raises((ConfigError, OSError), match=message) as error:
        load_results(name)
    assert isinstance(error.value, ac.errors.AutoCircuitError)


# --------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("Pocket IOY", "EAP"),
            "task 'Pocket IOY'. Did you mean 'Pocket IOI'.* There is",
        ),
        ((TASK, "EAQ"), "algorithm 'EAQ'. Did you mean 'EAP'.*'Random', 'EAP'"),
        ((TASK, "EAP", 44), "the seed 44.* There is '42', '43'"),
        ((TASK, "Random", 43), "algorithm 'Random' of the seed 43.* There is '42'"),
        ((TASK, "EAP", 42, "tiny"), "of the experiment 'tiny'. There is 'small-"),
    ],
)
def test_names_that_are_not_there(
    names: tuple[Any, ...], message: str, loaded: LoadedResults
) -> None:
    with pytest.raises(UnknownNameError, match=message) as error:
        loaded.scores(*names)
    assert isinstance(error.value, ConfigError) and isinstance(error.value, KeyError)
    assert str(error.value).startswith("There are no scores")


def test_circuits_that_are_not_there(loaded: LoadedResults) -> None:
    circuits = loaded.circuits
    with pytest.raises(
        UnknownNameError, match="of the algorithm 'Random'. There is 'EAP'"
    ):
        circuits[TASK, "Random"]
    with pytest.raises(ConfigError, match="no pair of a task and an algorithm"):
        circuits["Pocket IOI"]  # type: ignore[index]
    assert (TASK, "Random") not in circuits and circuits.get((TASK, "Random")) is None
    assert (TASK, "EAP") in circuits and len(circuits) == 1
    with pytest.raises(UnknownNameError, match="no experiment 'zero'.* There is 'small-"):
        loaded.experiment("zero")


# ----------------------------------------------------------------------------- several sweeps


def test_a_folder_of_several_experiments(swept: Swept) -> None:
    (swept.out / "mine").mkdir(exist_ok=True)
    (swept.out / "mine" / "config.json").write_text("{}")
    (swept.out / "notes.txt").write_text("mine")
    both = load_results(swept.out)
    names = [found.config.folder.name for found in (swept.found, swept.zero)]
    assert sorted(both.configs) == sorted(names)
    assert len(both.rows) == 18 and set(both.rows["experiment"]) == set(names)
    assert list(both.left_out) == ["mine"] and "Left out" in repr(both)
    with pytest.raises(ConfigError, match=f"2 experiments have scores.*{names[0]}"):
        both.scores(TASK, "EAP", seed=42)
    with pytest.raises(ConfigError, match=r"2 experiments .*results.experiment\('"):
        both.scores(TASK, "EAP")
    chosen = both.scores(TASK, "EAP", experiment=names[1])
    alone = both.experiment(names[1])
    assert list(alone.configs) == names[1:]
    assert all(t.equal(chosen[n], of) for n, of in alone.scores(TASK, "EAP").items())
    assert len(alone.rows) == 9


def test_an_address_of_fsspec(swept: Swept, copy: Path) -> None:
    address = f"memory://{swept.out.parent.name}/results"
    put_folder(copy, f"{address}/{copy.name}")
    local = load_results(copy)
    for folder in (address, f"{address}/{copy.name}", f"{address}/"):
        remote = load_results(folder)
        pd.testing.assert_frame_equal(remote.rows, local.rows)
        (config,) = remote.configs.values()
        assert config == replace(swept.config, out=address)
        scores = remote.scores(TASK, "EAP")
        assert all(t.equal(scores[n], s) for n, s in local.scores(TASK, "EAP").items())
        assert remote.circuits[TASK, "EAP"].edges == local.circuits[TASK, "EAP"].edges
    assert len(load_results(f"file://{copy}").rows) == 9
    files = fsspec.filesystem("memory")
    files.pipe_file(f"/{swept.out.parent.name}/results/{copy.name}/summary.csv", b"")
    with pytest.raises(DataError, match="memory://.*summary.csv is damaged"):
        load_results(address)


# ---------------------------------------------------------------------------------- comparison


def test_results_are_equal_to_themselves(loaded: LoadedResults) -> None:
    same = loaded.compare(loaded)
    for table in (same.measurements, same.summary):
        assert table["is_equal"].all() and (table["found_in"] == BOTH).all()
        assert (table["difference"] == 0).all()
    assert len(same.measurements) == 9 and same.configs.empty
    assert same.summary["value"].isna().any()  # equal, too
    assert (same.statistics["difference"] == 0).all() and len(same.statistics) == 6


def test_results_beside_others(swept: Swept, loaded: LoadedResults) -> None:
    # Other values of the same measurements, some missing, some new, one infinite in both.
    rows = loaded.rows.copy()
    rows.loc[1, "value"] = float("inf")
    rows.loc[4, "value"] = float("nan")
    this = replace(loaded, rows=rows)
    others = rows.copy()
    others.loc[8, "value"] += 2.5
    others.loc[7, "n_edges"] = 7
    compared = this.compare(replace(loaded, rows=others))
    table: Any = compared.measurements
    assert table["found_in"].value_counts().to_dict() == {
        BOTH: 8,
        THIS_ONLY: 1,
        OTHER_ONLY: 1,
    }
    assert int(table["is_equal"].sum()) == 7
    (changed,) = table[(table["found_in"] == BOTH) & ~table["is_equal"]].to_dict(
        "records"
    )
    assert changed["value"] == rows.loc[8, "value"]
    assert changed["other"] == others.loc[8, "value"]
    assert changed["difference"] == pytest.approx(-2.5)
    (new,) = table[table["found_in"] == OTHER_ONLY].to_dict(orient="records")
    assert new["n_edges"] == 7 and new["other"] == others.loc[7, "value"]
    assert pd.isna(new["value"]) and pd.isna(new["experiment"])
    assert "7 equal, 1 different, 1 only in this, 1 only in the other" in repr(compared)
    assert "<table" in compared._repr_html_()


def test_another_ablation_is_another_measurement(
    swept: Swept, loaded: LoadedResults
) -> None:
    zero = load_results(swept.zero.config.folder)
    compared: Any = loaded.compare(zero)
    assert not (compared.measurements["found_in"] == BOTH).any()
    assert len(compared.measurements) == 18
    found = {row["field"]: row for row in compared.configs.to_dict(orient="records")}
    assert set(found) == {"name", "ablation"}
    assert found["ablation"]["value"] is AblationType.RESAMPLE
    assert found["ablation"]["other"] is AblationType.ZERO
    areas = compared.summary[compared.summary["number"] == "area"]
    expected = dict(zip(loaded.summary["algorithm"], loaded.summary["area"], strict=True))
    others = dict(zip(zero.summary["algorithm"], zero.summary["area"], strict=True))
    assert len(areas) == 2 and set(areas["found_in"]) == {BOTH}
    for row in areas.to_dict(orient="records"):
        assert row["value"] == expected[row["algorithm"]]
        assert row["other"] == others[row["algorithm"]] != row["value"]
        assert row["difference"] == row["value"] - row["other"]


def test_statistics_are_of_what_both_have(swept: Swept, loaded: LoadedResults) -> None:
    zero = load_results(swept.zero.config.folder)
    table = loaded.compare(zero).statistics
    area = table[table["number"] == "area"].set_index("algorithm")
    for name in ("Random", "EAP"):
        one, two = (
            r.summary.set_index("algorithm").loc[name, "area"] for r in (loaded, zero)
        )
        assert area.loc[name, "difference"] == pytest.approx(
            one - two
        )  # means over seeds
    assert area.loc["EAP", "n_draws"] == 2 and area.loc["Random", "n_draws"] == 1


def test_several_experiments_are_compared_by_name(
    swept: Swept, loaded: LoadedResults
) -> None:
    both = load_results(swept.out)
    same = both.compare(load_results(swept.out))
    assert len(same.measurements) == 18 and same.measurements["is_equal"].all()
    assert same.summary["is_equal"].all() and same.configs.empty
    part = both.compare(loaded)
    assert (part.summary["found_in"] == THIS_ONLY).sum() == 14
    renamed = replace(loaded, summary=loaded.summary.assign(experiment="x"))
    with pytest.raises(ConfigError, match="Compare one with one"):
        both.compare(renamed)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("measurements.parquet", b"no table"),
        ("summary.csv", b"task,algorithm\na,b\n"),
        ("config.json", b"\xff"),
    ],
)
def test_what_no_sweep_writes_is_named_though_its_checksum_is_right(
    copy: Path, name: str, content: bytes
) -> None:
    (copy / name).write_bytes(content)
    report = json.loads((copy / REPORT_FILE).read_text())
    report["files"][name] = digest(content)
    del report["checksum"]
    report["checksum"] = checksum(report)
    (copy / REPORT_FILE).write_text(json.dumps(report))
    with pytest.raises(DataError, match=f"{name} is not as a sweep writes it"):
        load_results(copy)
