"""Results' folders of any content, and names of any kind: read, or an error of ours."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from auto_circuit.files import checksum
from auto_circuit.fingerprints import digest
from auto_circuit.loaded_results import load_results
from auto_circuit.reports import REPORT_FILE
from auto_circuit.runner import run_experiment
from auto_circuit.sweep_config import ExperimentConfig
from tests.fuzzing import only_our_errors

HOME = Path(tempfile.mkdtemp())
few = settings(max_examples=settings.default.max_examples // 10 or 1)  # type: ignore[union-attr]
"""Each example reads a whole folder."""
READ = (
    *("config.json", "measurements.parquet", "summary.csv", "failed.json", REPORT_FILE),
    *("scores/pocket-ioi-seed-42.safetensors", "circuits/pocket-ioi/eap.json"),
)
"""The files that are read of a folder."""


@cache
def sound() -> Path:
    """The folder of a sweep of two algorithms, one of which has a circuit."""
    config = ExperimentConfig(
        tasks=("Pocket IOI",),
        algos=("Random", "EAP"),
        metrics=("Logit Diff Percent",),
        circuit_sizes=(0, 100, 1519),
        n_seeds=1,
        out=HOME / "sound",
    )
    run_experiment(config)
    (config.folder / "failed.json").write_text(json.dumps({"a cell": "an error"}))
    for path in config.folder.rglob("*"):
        if path.suffix in (".html", ".js"):
            path.unlink()
    return config.folder


@cache
def contents() -> dict[str, bytes]:
    return {name: (sound() / name).read_bytes() for name in READ}


def copied() -> Path:
    """A copy of the folder, to be changed."""
    copy = HOME / "results" / sound().name
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(sound(), copy)
    return copy


def signed(folder: Path, report: dict[str, Any]) -> None:
    """Write a report, and in it what the folder's files are: nothing is damaged then."""
    files = {name: digest((folder / name).read_bytes()) for name in READ[:4] + READ[5:]}
    report = {**report, "files": files} if report.get("files") else report
    rest = {name: value for name, value in report.items() if name != "checksum"}
    (folder / REPORT_FILE).write_text(json.dumps({"checksum": checksum(rest), **rest}))


def report_of(folder: Path) -> dict[str, Any]:
    return {**json.loads((folder / REPORT_FILE).read_text()), "failed": {"a": "b"}}


def read_all(folder: Path) -> None:
    """Everything that can be read of a folder; each of it, or an error of ours."""
    results = None
    with only_our_errors():
        load_results(str(folder.parent))
    with only_our_errors():
        results = load_results(folder)
    if results is None:
        return
    for algo in dict.fromkeys([*results.rows["algorithm"][:1], "EAP"]):
        for task in results.rows["task"][:1]:
            with only_our_errors():
                results.scores(task, algo)
            with only_our_errors():
                circuit = results.circuits[task, algo]
                assert circuit.edges is not None
    with only_our_errors():
        assert repr(results) and results._repr_html_()
    with only_our_errors():
        results.compare(results)


PIECES = st.one_of(
    st.binary(max_size=4),
    st.sampled_from(
        [b"", b"null", b"[]", b"{}", b"1e999", b'"', b",", b"\n", b"-1", b"nan"]
    ),
)
EDITS = st.lists(st.tuples(st.floats(0, 1), PIECES), min_size=1, max_size=3)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=6,
)


def edited(content: bytes, edits: list[tuple[float, bytes]]) -> bytes:
    changed = bytearray(content)
    for place, piece in edits:
        start = int(place * max(0, len(changed) - 1))
        changed[start : start + 1] = piece
    return bytes(changed)


@few
@given(st.sampled_from(READ), EDITS, st.booleans())
def test_damaged_files(
    name: str, edits: list[tuple[float, bytes]], is_signed: bool
) -> None:
    """Also those whose checksums are right: written by who knows what."""
    folder = copied()
    (folder / name).write_bytes(edited(contents()[name], edits))
    if is_signed and name != REPORT_FILE:
        signed(folder, report_of(sound()))
    read_all(folder)


@few
@given(st.sampled_from(READ), st.sampled_from(READ), st.booleans())
def test_foreign_files(name: str, other: str, is_signed: bool) -> None:
    """A file with the content of another; a file that is gone; a folder in its place."""
    folder = copied()
    (folder / name).unlink()
    if name != other:
        (folder / name).write_bytes(contents()[other])
        if is_signed and name != REPORT_FILE:
            signed(folder, report_of(sound()))
    elif is_signed:
        (folder / name).mkdir()
    read_all(folder)


@few
@given(st.data())
def test_reports_of_any_content(data: st.DataObject) -> None:
    """With a checksum that is right."""
    folder = copied()
    report = report_of(sound())
    for name in data.draw(st.lists(st.sampled_from(sorted(report)), max_size=2)):
        report[name] = data.draw(JSON)
    if data.draw(st.booleans()):
        report.pop(data.draw(st.sampled_from(sorted(report))))
    signed(folder, report)
    read_all(folder)


@few
@given(st.sampled_from(["config.json", "failed.json", READ[-1]]), JSON)
def test_json_of_any_content(name: str, content: Any) -> None:
    folder = copied()
    (folder / name).write_text(json.dumps(content))
    signed(folder, report_of(sound()))
    read_all(folder)


@few
@given(st.data())
def test_tables_of_any_content(data: st.DataObject) -> None:
    """Columns are gone, renamed or hold something else."""
    import pandas

    folder = copied()
    rows = pandas.read_parquet(folder / "measurements.parquet")
    summary = pandas.read_csv(folder / "summary.csv")
    values = st.one_of(
        st.none(), st.floats(), st.text(max_size=4), st.integers(-3, 2**40)
    )
    for table in (rows, summary):
        for column in data.draw(st.lists(st.sampled_from(sorted(table)), max_size=2)):
            if column not in table:
                continue
            value = data.draw(values)
            how = data.draw(st.sampled_from(["gone", "filled", "renamed"]))
            if how == "filled":
                table[column] = [value] * len(table)
            else:
                old = table.pop(column)
                if how == "renamed":
                    table[f"{column}s"] = old
    n_rows = data.draw(st.sampled_from([0, 1, 100]))
    rows.head(n_rows).to_parquet(folder / "measurements.parquet")
    summary.to_csv(folder / "summary.csv", index=False)
    signed(folder, report_of(sound()))
    read_all(folder)


NAMES = st.one_of(st.text(max_size=8), st.none(), st.integers(), st.just(("a", "b")))


@given(NAMES, NAMES, st.one_of(st.none(), st.integers()), NAMES)
def test_names_of_any_kind(task: Any, algorithm: Any, seed: Any, experiment: Any) -> None:
    results = load_results(sound())
    for one, other in ((task, algorithm), ("Pocket IOI", algorithm), (task, "EAP")):
        with only_our_errors():
            results.scores(one, other, seed, experiment)
        with only_our_errors():
            assert results.circuits[one, other]
    with only_our_errors():
        results.experiment(experiment)
    with only_our_errors():
        results.compare(experiment)


@given(st.one_of(st.text(max_size=12), st.binary(max_size=8), st.none(), st.integers()))
def test_addresses_of_any_kind(address: Any) -> None:
    with only_our_errors():
        load_results(address)
