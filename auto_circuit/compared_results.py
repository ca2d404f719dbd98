"""Two sets of results side by side: which numbers differ, by how much, and what only one has."""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from auto_circuit.comparisons import COMPARED, comparison_table, prompts_of
from auto_circuit.errors import ConfigError
from auto_circuit.metrics.paired_comparisons import (
    Comparison,
    Draw,
    compare_all,
    holm,
    smallest_p_value,
)
from auto_circuit.summary import run_numbers
from auto_circuit.sweep import FoundScores, ScoreMeasurements, TaskRun
from auto_circuit.sweep_cells import measurement_rows
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.types import MeasurementRow

if TYPE_CHECKING:
    import pandas

MEASURED_BY = ("task", "algorithm", "metric", "ablation", "patch_type", "seed", "n_edges")
"""What two measurements have in common that are compared."""
SUMMARIZED_BY = ("task", "algorithm", "number")
"""The same of numbers of the summary."""
BOTH, THIS_ONLY, OTHER_ONLY = "both", "this only", "other only"


@runtime_checkable
class Tables(Protocol):
    """What is compared: see `LoadedResults`."""

    @property
    def rows(self) -> pandas.DataFrame: ...

    @property
    def summary(self) -> pandas.DataFrame: ...

    @property
    def configs(self) -> Mapping[str, ExperimentConfig]: ...


@dataclass(frozen=True, eq=False, repr=False)
class ComparedResults:
    """Results beside other results, whatever experiments they are of.

    measurements: a row for each task, algorithm, metric, ablation, patch type, seed and
        number of edges; summary: a row for each task, algorithm and number of the summary.
        Both have `value` and `other`; `difference` is value - other, 0 where both are
        infinite alike or missing; `is_equal`; and `found_in`: "both", "this only" or "other
        only" (then the other side is empty). If one side has several experiments with the
        same measurement, those of the same name are compared.
    configs: a row for each field in which experiments differ that have measurements in common,
        or else rows of the summary.
    statistics: for each algorithm and number, over tasks and seeds that both have: the mean
        difference, its 95 % interval and p-value (see `metrics.paired_comparisons`; Holm's
        correction is over the algorithms). Numbers that follow from measurements: no AUROC.
    """

    measurements: pandas.DataFrame
    summary: pandas.DataFrame
    configs: pandas.DataFrame
    statistics: pandas.DataFrame

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        lines = "<br>".join(map(html.escape, self._lines()))
        different = self.summary[~self.summary["is_equal"]]
        return f"<p>{lines}</p>{different.to_html(index=False, max_rows=20)}"

    def _lines(self) -> list[str]:
        tables = {"measurements": self.measurements, "summary": self.summary}
        lines = [f"{name}: {_counted(table)}" for name, table in tables.items()]
        changed = ", ".join(dict.fromkeys(self.configs["field"]))
        return [
            *lines,
            f"configs: {f'different in {changed}' if changed else 'equal'}",
            f"statistics: {len(self.statistics)} paired comparisons",
        ]


def _counted(table: pandas.DataFrame) -> str:
    found, is_equal = table["found_in"], table["is_equal"]
    in_both = found == BOTH
    return (
        f"{int(is_equal.sum())} equal, {int((in_both & ~is_equal).sum())} different, "
        f"{int((found == THIS_ONLY).sum())} only in this, "
        f"{int((found == OTHER_ONLY).sum())} only in the other"
    )


def compared(this: Tables, other: Tables) -> ComparedResults:
    """Compare results. Raises ConfigError if it is open which experiments to compare."""
    measurements = _side_by_side(this.rows, other.rows, MEASURED_BY)
    numbers = _as_numbers(this.summary), _as_numbers(other.summary)
    summary = _side_by_side(*numbers, SUMMARIZED_BY)
    pairs = _pairs(measurements) or _pairs(summary)
    every_pair = [(first, second) for first in this.configs for second in other.configs]
    return ComparedResults(
        measurements=measurements,
        summary=summary,
        configs=_different_fields(this, other, pairs or every_pair),
        statistics=_statistics(this, other, pairs),
    )


# ------------------------------------------------------------------------------- the tables


def _side_by_side(
    this: pandas.DataFrame, other: pandas.DataFrame, by: tuple[str, ...]
) -> pandas.DataFrame:
    by_name = _is_ambiguous(this, by) or _is_ambiguous(other, by)
    names = set(this["experiment"]), set(other["experiment"])
    if by_name and not names[0] & names[1]:
        raise ConfigError(
            "Several experiments have the same measurements, and none is in both: "
            f"{', '.join(sorted(names[0]))} here, {', '.join(sorted(names[1]))} there. "
            "Compare one with one: `results.experiment(name).compare(other)`."
        )
    columns = ["experiment", "value", *(["plus_minus"] * ("plus_minus" in this))]
    merged: Any = _keyed(this, by, by_name, columns).merge(
        _keyed(other, by, by_name, columns),
        on=["_experiment", *by, "_place"],
        how="outer",
        suffixes=("", "_of_other"),
        indicator="found_in",
    )
    merged = merged.drop(columns=["_experiment", "_place"])
    merged = merged.rename(columns=lambda name: _other_name(str(name)))
    found = {"both": BOTH, "left_only": THIS_ONLY, "right_only": OTHER_ONLY}
    merged["found_in"] = merged["found_in"].astype(str).map(found)
    is_same = merged["value"] == merged["other"]  # infinite ones too
    is_same |= merged["value"].isna() & merged["other"].isna()
    merged["is_equal"] = is_same & (merged["found_in"] == BOTH)
    difference = (merged["value"] - merged["other"]).mask(merged["is_equal"], 0.0)
    merged["difference"] = difference
    others = [f"other_{name}" for name in columns if name != "value"]
    places = ["experiment", others[0], *by, "value", "other", "difference"]
    return merged[[*places, *columns[2:], *others[1:], "is_equal", "found_in"]]


def _other_name(column: str) -> str:
    if not column.endswith("_of_other"):
        return column
    name = column.removesuffix("_of_other")
    return "other" if name == "value" else f"other_{name}"


def _is_ambiguous(table: pandas.DataFrame, by: tuple[str, ...]) -> bool:
    """Do several experiments have the same?"""
    n_experiments = table.groupby(list(by), dropna=False)["experiment"].nunique()
    return bool((n_experiments > 1).any())


def _keyed(
    table: pandas.DataFrame, by: tuple[str, ...], by_name: bool, columns: list[str]
) -> pandas.DataFrame:
    """With the columns that tell rows apart, also those of circuits of one size."""
    experiment = table["experiment"] if by_name else ""
    keyed = table[[*columns, *by]].assign(_experiment=experiment)
    place = keyed.groupby(["_experiment", *by], dropna=False).cumcount()
    return keyed.assign(_place=place)


def _as_numbers(summary: pandas.DataFrame) -> pandas.DataFrame:
    """A row for each number of the summary, with half of its interval."""
    import pandas

    end = "_plus_minus"
    texts = ("experiment", "task", "algorithm", "circuit")
    numbers = [c for c in summary.columns if c not in texts and not c.endswith(end)]
    return pandas.concat(
        [
            summary[["experiment", "task", "algorithm"]].assign(
                number=number,
                value=summary[number].astype(float),
                plus_minus=summary.get(number + end, math.nan),
            )
            for number in numbers
        ],
        ignore_index=True,
    )


def _pairs(table: pandas.DataFrame) -> list[tuple[str, str]]:
    """The experiments that have rows in common."""
    in_both: Any = table[table["found_in"] == BOTH]
    columns = ["experiment", "other_experiment"]
    pairs = in_both[columns].drop_duplicates().itertuples(index=False, name=None)
    return [(str(first), str(second)) for first, second in pairs]


def _different_fields(
    this: Tables, other: Tables, pairs: list[tuple[str, str]]
) -> pandas.DataFrame:
    """`out`, which says where results are, is no difference."""
    import pandas

    rows = []
    for first, second in pairs:
        one, two = asdict(this.configs[first]), asdict(other.configs[second])
        rows += [
            (first, second, name, value, two[name])
            for name, value in one.items()
            if name != "out" and value != two[name]
        ]
    columns = ["experiment", "other_experiment", "field", "value", "other"]
    return pandas.DataFrame(rows, columns=columns)


# ------------------------------------------------------------------------------- statistics


def _statistics(
    this: Tables, other: Tables, pairs: list[tuple[str, str]]
) -> pandas.DataFrame:
    import pandas

    tables = [_statistics_of(this, other, pair) for pair in pairs]
    return (
        pandas.concat(tables, ignore_index=True) if tables else _with_names([], ("", ""))
    )


def _statistics_of(
    this: Tables, other: Tables, pair: tuple[str, str]
) -> pandas.DataFrame:
    runs = _runs(this, pair[0]), _runs(other, pair[1])
    first = _values(runs[0], this.configs[pair[0]])
    second = _values(runs[1], other.configs[pair[1]])
    prompts = prompts_of([*runs[0], *runs[1]])
    found: list[tuple[str, Comparison]] = []
    for number in COMPARED:
        family = {}
        for algorithm, values in first.get(number, {}).items():
            both = {"this": values, "other": second[number].get(algorithm, {})}
            (one,) = compare_all(number, both, prompts)
            if one.n_draws:
                family[algorithm] = one
        found += zip(family, _corrected(list(family.values())), strict=True)
    return _with_names(found, pair)


def _corrected(family: list[Comparison]) -> list[Comparison]:
    """With Holm's correction over all of them."""
    p_values = holm([one.p_value for one in family])
    best = holm([smallest_p_value(one.n_draws) for one in family])
    return [
        replace(one, p_holm=p, best_p_holm=best_p, n_compared=len(family))
        for one, p, best_p in zip(family, p_values, best, strict=True)
    ]


def _with_names(
    found: list[tuple[str, Comparison]], pair: tuple[str, str]
) -> pandas.DataFrame:
    table = comparison_table([one for _, one in found])
    table.insert(0, "experiment", pair[0])
    table.insert(1, "other_experiment", pair[1])
    table.insert(2, "algorithm", [algorithm for algorithm, _ in found])
    return table.drop(columns=["first", "second"])


Values = dict[str, dict[str, dict[Draw, int | float | None]]]
"""Number of the summary -> algorithm -> task and seed -> its value there."""


def _values(runs: list[TaskRun], config: ExperimentConfig) -> Values:
    values: Values = {number: {} for number in COMPARED}
    for run in runs:
        names = {found.algo: found.name for found in run.found}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the sweep has told them
            of_run = run_numbers(run, config.reverse_clean_corrupt)
        for algo, numbers in of_run.items():
            for number, by_algorithm in values.items():
                by_draw = by_algorithm.setdefault(names[algo], {})
                by_draw[run.task, run.seed] = numbers[number]
    return values


def _runs(of: Tables, experiment: str) -> list[TaskRun]:
    """What was measured in an experiment, without scores and circuits."""
    rows: Any = of.rows[of.rows["experiment"] == experiment]
    return [
        _run(str(task), int(seed), of_run)
        for (task, seed), of_run in rows.groupby(["task", "seed"], sort=False)
    ]


def _run(task: str, seed: int, rows: pandas.DataFrame) -> TaskRun:
    by_algo = dict(_by_algo(rows))
    found = [FoundScores(task, seed, algo, name, {}, math.nan) for algo, name in by_algo]
    measured = [
        ScoreMeasurements(algo, tuple(of_algo)) for (algo, _), of_algo in by_algo.items()
    ]
    return TaskRun(task, seed, tuple(found), tuple(measured))


def _by_algo(
    rows: pandas.DataFrame,
) -> Iterator[tuple[tuple[str, str], list[MeasurementRow]]]:
    names = [f.name for f in fields(MeasurementRow)]
    groups: Any = rows.groupby(["algo", "algorithm"], sort=False)
    for (algo, name), of_algo in groups:
        yield (str(algo), str(name)), measurement_rows(of_algo[names])
