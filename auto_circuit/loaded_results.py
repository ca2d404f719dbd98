"""The results of sweeps, read back: tables, scores, circuits and configurations.

    results = load_results("results")
    results.rows
    scores = results.scores("Pocket IOI", "EAP")

What is read is compared with its checksum. Scores and circuits are read when they are asked
for. Nothing is computed, no model is loaded, and loading runs nothing.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import load

from auto_circuit.checks import checked, shown
from auto_circuit.circuit_files import (
    checked_document,
    document_edges,
    document_scores,
)
from auto_circuit.compared_results import ComparedResults, compared
from auto_circuit.errors import (
    AutoCircuitError,
    ConfigError,
    DataError,
    UnknownNameError,
    about,
    near_matches,
    one_line,
)
from auto_circuit.files import parse_json
from auto_circuit.fingerprints import digest
from auto_circuit.results_folder import (
    CONFIG_FILE,
    FAILED_FILE,
    PAGE_FILE,
    REPORT_FILE,
    REPORT_VERSION,
    ROWS_FILE,
    SCORES_ORDER,
    SUMMARY_FILE,
    is_sound_report,
    scores_file,
)
from auto_circuit.store import Folder, folder_at
from auto_circuit.sweep_config import ExperimentConfig, config_of_json
from auto_circuit.types import AlgoKey, MeasurementRow, PruneScores
from auto_circuit.utils.patchable_model import PatchableModel

if TYPE_CHECKING:
    import pandas

AGAIN = (
    "Run the same experiment again: it writes the folder anew, and computes nothing that is "
    "stored."
)


@checked
def load_results(folder: str | Path) -> LoadedResults:
    """The results of one sweep, or of all sweeps in a folder.

    folder: a sweep's folder (`results/<name>-<hash>`), a folder of them (`results`), or an
        address of fsspec for either (s3://bucket/results, memory://results).

    Raises ConfigError if no sweep's results are there, or only those of another version;
    DataError for a file that is damaged or missing, by name; FileError where the system
    refuses.
    """
    if not isinstance(folder, (str, Path)):
        raise ConfigError(
            f"`folder` is {shown(folder)}; expected a text or a path, such as 'results'."
        )
    place = folder_at(str(folder))
    report = sweep_report(place, str(folder))
    if report is not None:
        name, out = name_and_out(folder)
        return _loaded([_experiment(name, out, place, str(folder), report)], {})
    out = folder if isinstance(folder, Path) else folder.rstrip("/")
    experiments, left_out = [], {}
    for name in place.names(""):
        address = f"{out}/{name}"
        inner = folder_at(address)
        try:
            report = None if name.startswith(".") else sweep_report(inner, address)
            if report is not None:
                experiments.append(_experiment(name, out, inner, address, report))
        except NotOurs as error:
            left_out[name] = str(error)
    if not experiments:
        raise ConfigError(nothing_there(folder, left_out))
    return _loaded(experiments, left_out)


def nothing_there(
    folder: str | Path, left_out: Mapping[str, str], can_be_several: bool = True
) -> str:
    """What to say of a folder without results."""
    found = "".join(f" {why}" for why in left_out.values())
    if folder_at(str(folder)).read(PAGE_FILE) is not None:
        return (
            f"The sweep in {str(folder)!r:.300} has not finished. Run the same command again: "
            "it goes on where it was."
        )
    return (
        f"There are no results of a sweep in {str(folder)!r:.300}: expected a folder that a "
        f"sweep has written, such as results/pocket-0123abcd, with {REPORT_FILE} in it"
        f"{', or a folder of such folders' * can_be_several}.{found}"
    )


def name_and_out(folder: str | Path) -> tuple[str, str | Path]:
    """The last part of an address and what is before it, in the way that it was given."""
    if "://" in str(folder):
        out, _, name = str(folder).rstrip("/").rpartition("/")
        return name, out
    path = Path(folder)
    if path.name in ("", ".."):
        path = path.resolve()
    return path.name, str(path.parent) if isinstance(folder, str) else path.parent


# --------------------------------------------------------------------------- what was loaded


@dataclass(frozen=True, eq=False, repr=False)
class LoadedResults:
    """The results of one or several sweeps, as `load_results` reads them.

    rows: all measurements, one a row: the experiment (its folder's name), the algorithm's
        short name, and the fields of `MeasurementRow`.
    summary: a row for each experiment, task and algorithm: see `summary.summarize`.
    configs: experiment -> its configuration; `out` is where the results were found.
    failed: experiment -> cell that failed -> its error. {} if none did.
    left_out: folders beside them that are no sweep of this version -> what they are.
    """

    rows: pandas.DataFrame
    summary: pandas.DataFrame
    configs: Mapping[str, ExperimentConfig]
    failed: Mapping[str, Mapping[str, str]]
    left_out: Mapping[str, str]
    _experiments: tuple[_Experiment, ...] = field(repr=False)

    @checked
    def scores(
        self,
        task: str,
        algorithm: str,
        seed: int | None = None,
        experiment: str | None = None,
    ) -> PruneScores:
        """An algorithm's scores, as it gave them: ready for `run_circuits`.

        algorithm: its short name or its key. seed: None: the first one that there is.
        experiment: needed if several have such scores.

        Raises UnknownNameError (a ConfigError and a KeyError) for what there is not,
        ConfigError if several experiments have it, DataError for a damaged file.
        """
        places = [run for one in self._experiments for run in one.runs]
        chosen = (experiment, task, algorithm, seed)
        return _the_one("score", places, chosen).read()

    @property
    def circuits(self) -> LoadedCircuits:
        """(task, algorithm's short name) -> its circuit, of those that have one."""
        return LoadedCircuits([one for of in self._experiments for one in of.circuits])

    @checked
    def experiment(self, name: str) -> LoadedResults:
        """The results of one of the experiments. Raises UnknownNameError."""
        if name not in self.configs:
            raise _unknown("experiment", name, self.configs, "There is no")
        of = [one for one in self._experiments if one.name == name]
        return _loaded(of, {})

    @checked
    def compare(self, other: LoadedResults) -> ComparedResults:
        """These results beside others: see `ComparedResults`."""
        return compared(self, other)

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        lines = "<br>".join(map(html.escape, self._lines()))
        return f"<p>{lines}</p>{self.summary.to_html(index=False, max_rows=20)}"

    def _lines(self) -> list[str]:
        shown = list(self.configs)[:5]
        more = ", ..." * (len(self.configs) > len(shown))
        columns = ("task", "algorithm", "seed")
        counts = [_counted(self.rows[name].nunique(), name) for name in columns]
        n_circuits = sum(len(one.circuits) for one in self._experiments)
        n_experiments = _counted(len(self.configs), "experiment")
        lines = [
            f"Results of {n_experiments}: {', '.join(shown)}{more}",
            f"{', '.join(counts)}; {_counted(len(self.rows), 'measurement')}, "
            f"{_counted(n_circuits, 'circuit')}",
            ".rows, .summary, .configs, .scores(task, algorithm), "
            ".circuits[task, algorithm], .compare(other)",
        ]
        n_failed = sum(map(len, self.failed.values()))
        lines += [f"{_counted(n_failed, 'cell')} failed: see .failed"] * (n_failed > 0)
        return lines + [f"Left out: {why}" for why in self.left_out.values()]


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


@dataclass(frozen=True)
class LoadedCircuit:
    """The smallest tested circuit from which on all do 80 % of the task.

    document: what `save_circuit` writes, as JSON holds it. place: its file.
    """

    place: str
    document: dict[str, Any] = field(repr=False)

    @property
    def edges(self) -> dict[str, float]:
        """The name of each edge of the circuit -> its score."""
        return document_edges(self.place, self.document)

    @checked
    def scores(self, model: PatchableModel, any_model_name: bool = False) -> PruneScores:
        """The scores of all edges, 0 outside the circuit: see `load_circuit`."""
        return document_scores(self.place, self.document, model, any_model_name)


class LoadedCircuits(Mapping[tuple[str, str], LoadedCircuit]):
    """(task, algorithm's short name) -> its circuit, which is read when it is asked for.

    What is not there is an UnknownNameError, and what several experiments have a ConfigError.
    """

    def __init__(self, places: Iterable[_Place]) -> None:
        self._places = list(places)

    def __getitem__(self, key: Any) -> LoadedCircuit:
        if not isinstance(key, tuple) or len(key) != 2:
            raise UnknownNameError(
                f"{key!r:.100} is no pair of a task and an algorithm, such as "
                "('Pocket IOI', 'EAP')."
            )
        return _the_one("circuit", self._places, (None, *key, None)).read()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(
            dict.fromkeys((place.task, place.algorithm) for place in self._places)
        )

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, key: object) -> bool:
        return key in list(iter(self))  # without reading it

    def __repr__(self) -> str:
        return f"Circuits of {list(self)}"


# ------------------------------------------------------------------------- finding by name


class _Place(NamedTuple):
    """Where scores or a circuit are, and how they are read. algo: the algorithm's key."""

    experiment: str
    task: str
    algorithm: str
    seed: int
    algo: str
    read: Callable[[], Any]


Chosen = tuple[str | None, str, str, int | None]
"""Experiment, task, algorithm, seed; None: not said."""


def _the_one(what: str, places: list[_Place], chosen: Chosen) -> _Place:
    """The place that was chosen. Raises UnknownNameError, and ConfigError if it is not one."""
    so_far = ""
    for name, value in zip(_Place._fields, chosen, strict=False):
        if value is None:
            continue
        known = dict.fromkeys(getattr(place, name) for place in places)
        of_key = {place.algo: place.algorithm for place in places}
        if name == "algorithm" and value not in known:
            value = of_key.get(str(value), value)
        if value not in known:
            raise _unknown(name, value, known, f"There are no {what}s{so_far} of the")
        places = [place for place in places if getattr(place, name) == value]
        so_far += f" of the {name} {value!r}"
    experiments = list(dict.fromkeys(place.experiment for place in places))
    if len(experiments) > 1:
        raise ConfigError(
            f"{len(experiments)} experiments have {what}s{so_far}: "
            f"{', '.join(experiments)}. Name one: `results.experiment({experiments[0]!r})`"
            f"{', or `experiment=`' * (what == 'score')}."
        )
    return places[0]


def _unknown(
    name: str, value: Any, known: Iterable[Any], there_are_none: str
) -> UnknownNameError:
    known = [str(one) for one in known]
    there_is = f" There is {', '.join(map(repr, known))}." if known else ""
    hint = near_matches(str(value), known)
    return UnknownNameError(f"{there_are_none} {name} {value!r}.{hint}{there_is}")


# ------------------------------------------------------------------------------ reading files


class NotOurs(ConfigError):
    """A folder holds something, but no results that can be read here."""


@dataclass(frozen=True)
class ResultFiles:
    """A results' folder. What is read of it is compared with its checksum."""

    address: str
    folder: Folder
    checksums: Mapping[str, str]

    def read(self, name: str) -> bytes:
        """Raises DataError that names the file."""
        where = f"{self.address}/{name}"
        content = self.folder.read(name)
        if content is None or name not in self.checksums:
            raise DataError(f"{where} is missing. {AGAIN}")
        if digest(content) != self.checksums[name]:
            raise DataError(f"{where} is damaged, or was changed. {AGAIN}")
        return content


def sweep_report(folder: Folder, address: str) -> dict[str, Any] | None:
    """The report of a sweep; None if there are no results at all."""
    report = read_report(folder, address)
    if report is None:
        return None
    if "algorithms" not in report:
        raise NotOurs(
            f"{address} holds a test of robustness, or the paper's tables, and no sweep."
        )
    with _as_a_sweep_writes(f"{address}/{REPORT_FILE}"):
        for name in ("files", "algorithms", "failed"):
            _check_texts(name, report[name])
    return report


def read_report(folder: Folder, address: str) -> dict[str, Any] | None:
    """The report of an experiment; None if there are no results at all.

    Raises ConfigError for one of another version, DataError for a damaged one.
    """
    where = f"{address}/{REPORT_FILE}"
    content = folder.read(REPORT_FILE)
    if content is None:
        if folder.read(CONFIG_FILE) is None:
            return None
        raise NotOurs(
            f"{address} has no {REPORT_FILE}: it holds no sweep, or one of an earlier "
            f"version. {AGAIN}"
        )
    try:
        report = parse_json(content.decode(), where)
    except (DataError, UnicodeDecodeError):
        report = None
    is_sound = is_sound_report(report)
    if isinstance(report, dict) and (is_sound or "checksum" not in report):
        version = report.get("report")
        if version != REPORT_VERSION:
            raise NotOurs(
                f"{address} holds results of version {version!r:.40}, and version "
                f"{REPORT_VERSION} is read here. {AGAIN}"
            )
    if report is None or not is_sound:
        raise DataError(f"{where} is damaged, or was changed. {AGAIN}")
    return report


def _check_texts(name: str, texts: Any) -> None:
    if not all(isinstance(text, str) for text in [*texts.keys(), *texts.values()]):
        raise ValueError(f"{name!r} holds {shown(texts)}")


@contextmanager
def _as_a_sweep_writes(where: str) -> Iterator[None]:
    """Inside, a file is read whose checksum is right; what a sweep does not write is named."""
    try:
        yield
    except AutoCircuitError:
        raise
    except Exception as error:  # tables and tensors have many errors of their own
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(
            f"{where} is not as a sweep writes it ({problem:.200}). {AGAIN}"
        ) from error


@dataclass(frozen=True)
class _Experiment:
    """One sweep: its tables, and where its scores are. algorithms: key -> short name."""

    name: str
    files: ResultFiles
    config: ExperimentConfig
    algorithms: Mapping[str, str]
    rows: pandas.DataFrame
    summary: pandas.DataFrame
    failed: Mapping[str, str]

    @cached_property
    def runs(self) -> list[_Place]:
        """Where the scores of each task, algorithm and seed are."""
        columns = ["task", "algorithm", "seed", "algo"]
        return [
            _Place(self.name, task, algorithm, int(seed), algo, read)
            for task, algorithm, seed, algo in _distinct(self.rows, columns)
            for read in [_Scores(self.files, task, int(seed), algo)]
        ]

    @cached_property
    def circuits(self) -> list[_Place]:
        """Where the circuits are, of algorithms that have one."""
        algos = {short: key for key, short in self.algorithms.items()}
        with_one: Any = self.summary[self.summary["circuit"].notna()]
        columns = ["task", "algorithm", "circuit"]
        return [
            _Place(self.name, task, algorithm, self.config.seed, algos[algorithm], read)
            for task, algorithm, stem in _distinct(with_one, columns)
            for read in [_Circuit(self.files, f"{stem}.json")]
        ]


def _distinct(table: pandas.DataFrame, columns: list[str]) -> list[tuple[Any, ...]]:
    return list(table[columns].drop_duplicates().itertuples(index=False, name=None))


@dataclass(frozen=True)
class _Scores:
    """Reads the scores of an algorithm from the file of a task and seed."""

    files: ResultFiles
    task: str
    seed: int
    algo: str

    def __call__(self) -> PruneScores:
        content = self.files.read(scores_file(self.task, self.seed))
        with about(self.files.address):
            found = scores_in(content)
            if self.algo not in found:
                raise DataError(f"There are no scores of {self.algo!r}. {AGAIN}")
        return found[self.algo]


def scores_in(content: bytes) -> dict[AlgoKey, PruneScores]:
    """The scores in a file of them: algorithm -> scores, in the order in which they were.

    Raises DataError for what no sweep writes.
    """
    with _as_a_sweep_writes("A file of scores"):
        n_bytes = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + n_bytes])
        tensors, by_algo = load(content), {}
        for name in json.loads(header["__metadata__"][SCORES_ORDER]):
            algo, _, module = name.rpartition("/")
            by_algo.setdefault(algo, {})[module] = tensors[name]
        return by_algo


@dataclass(frozen=True)
class _Circuit:
    """Reads a circuit."""

    files: ResultFiles
    name: str

    def __call__(self) -> LoadedCircuit:
        place = f"{self.files.address}/{self.name}"
        content = self.files.read(self.name)
        with _as_a_sweep_writes(place):
            document = checked_document(place, parse_json(content.decode(), place))
        return LoadedCircuit(place, document)


def _experiment(
    name: str,
    out: str | Path,
    folder: Folder,
    address: str,
    report: Mapping[str, Any],
) -> _Experiment:
    files = ResultFiles(address, folder, report["files"])
    algorithms = report["algorithms"]

    def read(name: str, reader: Callable[[bytes], Any]) -> Any:
        content = files.read(name)
        with about(address):
            return reader(content)

    config = read(CONFIG_FILE, partial(_config_in, out=out))
    rows = read(ROWS_FILE, rows_in)
    summary = read(SUMMARY_FILE, summary_in)
    failed = read(FAILED_FILE, _failed_in) if report["failed"] else {}
    with _as_a_sweep_writes(f"{address}/{ROWS_FILE}, or {SUMMARY_FILE},"):
        short_names = [algorithms[key] for key in rows["algo"]]
        others = {*summary["algorithm"]} - {*algorithms.values()}
        if others:
            raise ValueError(f"it has the algorithms {shown(others)}")
    rows.insert(0, "experiment", name)
    rows.insert(2, "algorithm", short_names)
    summary.insert(0, "experiment", name)
    return _Experiment(name, files, config, algorithms, rows, summary, failed)


def _config_in(content: bytes, out: str | Path) -> ExperimentConfig:
    with about(CONFIG_FILE), _as_a_sweep_writes(CONFIG_FILE):
        return config_of_json(content.decode(), out)


def _failed_in(content: bytes) -> dict[str, str]:
    with _as_a_sweep_writes(FAILED_FILE):
        failed = json.loads(content)
        _check_texts("the file", failed)
        return failed


def rows_in(content: bytes) -> pandas.DataFrame:
    """The table of a file of measurements. Raises DataError for what no sweep writes."""
    import pandas

    columns = [f.name for f in fields(MeasurementRow)]
    numbers = ["n_edges", "value", "std", "n_prompts", "seed"]
    with _as_a_sweep_writes(ROWS_FILE):
        rows: Any = pandas.read_parquet(io.BytesIO(content))[columns]
        rows[numbers] = rows[numbers].apply(pandas.to_numeric)
        if not (rows[["n_edges", "seed"]] % 1 == 0).all(axis=None):
            raise ValueError("a number of edges or a seed is none")
        for column in ("task", "metric"):
            if not all(isinstance(text, str) for text in rows[column]):
                raise ValueError(f"not every {column} has a name")
    return rows


def summary_in(content: bytes) -> pandas.DataFrame:
    """The table of a file of the summary. Raises DataError for what no sweep writes."""
    import pandas

    with _as_a_sweep_writes(SUMMARY_FILE):
        # As text first: a task may be named NA, and numbers must come back to the last digit.
        table = pandas.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        table["circuit"] = [stem or None for stem in table["circuit"]]
        table["n_seeds"] = table["n_seeds"].astype(int)
        for column in table.columns.drop(["task", "algorithm", "n_seeds", "circuit"]):
            table[column] = [float(text or "nan") for text in table[column]]
    return table


def _loaded(experiments: list[_Experiment], left_out: Mapping[str, str]) -> LoadedResults:
    import pandas

    return LoadedResults(
        rows=pandas.concat([one.rows for one in experiments], ignore_index=True),
        summary=pandas.concat([one.summary for one in experiments], ignore_index=True),
        configs={one.name: one.config for one in experiments},
        failed={one.name: one.failed for one in experiments if one.failed},
        left_out=left_out,
        _experiments=tuple(experiments),
    )
