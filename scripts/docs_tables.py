"""The tables of the documentation site, made from the objects that they are about.

python scripts/docs_tables.py algorithms    # or tasks, metrics, architectures ...
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from auto_circuit.errors import DataError
from auto_circuit.metrics.prune_metrics.prune_metrics import PRUNE_METRICS, PruneMetric
from auto_circuit.model_utils.adapters import ADAPTERS
from auto_circuit.prune_algos.prune_algo import MSE_USE, PruneAlgo
from auto_circuit.prune_algos.prune_algos import PRUNE_ALGOS
from auto_circuit.tasks import TASKS, Task

ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
LONGEST = 76
"""Of an example prompt, more characters than these are cut off."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    cells = [list(head), *(list(row) for row in rows)]
    lines = ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in cells]
    lines.insert(1, "|" + "---|" * len(cells[0]))
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text as it stands in a cell: no `|`, no line breaks."""
    return " ".join(text.replace("|", r"\|").split())


def algorithms() -> str:
    """Every registered algorithm, but for those of squared errors."""
    head = ("`--algos`", "an edge's score", "paper", "cost", "when to use it")
    of_words = [algo for algo in PRUNE_ALGOS if algo not in of_numbers()]
    return table(head, map(_algorithm, of_words))


def number_algorithms() -> str:
    """Those that lower the squared error, for models whose output is a number."""
    head = ("`--algos`", "an edge's score", "paper", "cost")
    return table(head, (_algorithm(algo)[:4] for algo in of_numbers()))


def of_numbers() -> list[PruneAlgo]:
    """The algorithms that are for models whose output is a number."""
    return [algo for algo in PRUNE_ALGOS if algo.notes.use == MSE_USE]


def _algorithm(algo: PruneAlgo) -> list[str]:
    notes = algo.notes
    paper = ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", notes.paper)
    needs = " Needs the true edges." if algo.needs_true_edges else ""
    needs += " Needs wrong answers." if algo.needs_wrong_answers else ""
    return [f"`{algo.short_name}`", notes.idea, paper, notes.cost, notes.use + needs]


def metrics() -> str:
    """Every registered metric."""
    head = ("key", "the question", "closer to the model", "from, to", "wrong answers")
    return table(head, map(_metric, PRUNE_METRICS))


def _metric(metric: PruneMetric) -> list[str]:
    low, high = (f"{bound:g}".replace("inf", "∞") for bound in metric.bounds)
    better = "lower" if metric.lower_better else "higher"
    needed = "needed" if metric.needs_wrong_answers else "not needed"
    return [f"`{metric.key}`", metric.question, better, f"{low}, {high}", needed]


def tasks() -> str:
    """Every predefined task."""
    head = (
        "key",
        "an example: clean, *corrupt*, **answer**",
        "model",
        "positions",
        "circuit",
        "depth",
    )
    return table(head, map(_task, TASKS))


def _task(task: Task) -> list[str]:
    model = task._model_def
    place = "comes with the package" if _is_included(task) else "from the hub"
    return [
        f"`{task.key}`",
        _example(task),
        f"{Path(str(model)).name if isinstance(model, Path) else model} ({place})",
        "told apart" if task.token_circuit else "together",
        "not known" if task._true_edge_func is None else "known",
        "" if task.depth is None else str(task.depth),
    ]


def _is_included(task: Task) -> bool:
    return isinstance(task._model_def, Path) or task.key.startswith("Tracr")


def _example(task: Task) -> str:
    """The first prompt of its file; empty for a file that has to be written first."""
    try:
        path = task.prompt_path
    except DataError:
        return "(a script writes the prompts)"
    prompt = json.loads(path.read_text())["prompts"][0]
    clean, corrupt = (_shown(prompt[side]) for side in ("clean", "corrupt"))
    return f"{clean}<br>*{corrupt}*<br>**{_shown(prompt['answers'][0])}**"


def _shown(tokens: object) -> str:
    text = " ".join(map(str, tokens)) if isinstance(tokens, list) else str(tokens)
    text = " ".join(text.split())
    text = text if len(text) <= LONGEST else f"… {text[-LONGEST:]}"
    return re.sub(r"([*_`<\[\\])", r"\\\1", text)


def architectures() -> str:
    """Every family of models that the engine knows."""
    head = ("family", "which models", "tried, and run", "refused with a `ModelError`")
    rows = [(a.name, a.about, ", ".join(a.tried), ", ".join(a.refused)) for a in ADAPTERS]
    return table(head, rows)


ARCHITECTURES = Path(__file__).parents[1] / "docs" / "architectures.json"
"""What the tests found: `python -m tests.architecture_table` writes it."""
NOT_SUPPORTED = "not supported, because "


OF_EDGES = (
    *("edges", "masks", "single edges", "whole attention", "ungrouped"),
    *("crossing edges", "MIB"),
)
"""The checks of what is in a graph, and of single edges; the others are of whole runs."""
Found = dict[str, Any]


def architecture_edges() -> str:
    """Architecture x check of its graph: what the tests found."""
    return _checks(lambda check: check in OF_EDGES)


def architecture_runs() -> str:
    """Architecture x check of runs with many edges patched."""
    return _checks(lambda check: check not in OF_EDGES)


def _checks(is_shown: Callable[[str], bool]) -> str:
    found = json.loads(ARCHITECTURES.read_text())
    shown, reasons = [c for c in found["columns"] if is_shown(c)], _reasons(found)
    rows = (
        [found["titles"][name], *(_checked(cells[check], reasons) for check in shown)]
        for name, cells in found["families"].items()
        if not _is_refused(cells)
    )
    return table(["family", *(found["columns"][check] for check in shown)], rows)


def architecture_reasons() -> str:
    """Why a cell of those tables has no number."""
    reasons = _reasons(json.loads(ARCHITECTURES.read_text()))
    return table(
        ["", "not supported, because"],
        ((f"[{i}]", reason) for i, reason in enumerate(reasons, 1)),
    )


def architectures_refused() -> str:
    """Families without a graph, and why."""
    found = json.loads(ARCHITECTURES.read_text())
    return table(
        ["family", "not supported, because"],
        (
            [found["titles"][name], cells["edges"].removeprefix(NOT_SUPPORTED)]
            for name, cells in found["families"].items()
            if _is_refused(cells)
        ),
    )


def _is_refused(cells: Found) -> bool:
    return isinstance(cells["edges"], str)


def _reasons(found: Found) -> list[str]:
    rows = [row for row in found["families"].values() if not _is_refused(row)]
    cells = [cell for row in rows for cell in row.values()]
    texts = [cell.removeprefix(NOT_SUPPORTED) for cell in cells if isinstance(cell, str)]
    return list(dict.fromkeys(texts))


def _checked(cell: float | str, reasons: list[str]) -> str:
    if isinstance(cell, str):
        number = reasons.index(cell.removeprefix(NOT_SUPPORTED)) + 1
        return f"{NOT_SUPPORTED}[{number}](#why-not)"
    return f"{cell:.0e}" if 0 < cell < 0.01 else f"{cell:g}"


TABLES = {
    "algorithms": algorithms,
    "architectures": architectures,
    "architecture_edges": architecture_edges,
    "architecture_reasons": architecture_reasons,
    "architecture_runs": architecture_runs,
    "architectures_refused": architectures_refused,
    "metrics": metrics,
    "number_algorithms": number_algorithms,
    "tasks": tasks,
}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in TABLES:
        sys.exit(f"Say which table: {', '.join(TABLES)}.")
    print(TABLES[sys.argv[1]]())
