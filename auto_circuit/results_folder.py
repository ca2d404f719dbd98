"""What makes a results' folder: its files, what they are of, and whether they are sound."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from auto_circuit.errors import DataError
from auto_circuit.files import checksum
from auto_circuit.fingerprints import digest
from auto_circuit.robustness import RobustnessRow
from auto_circuit.summary import slug
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.types import TaskKey

REPORT_FILE = "report.json"
"""What a results' folder is made of: the keys of its cells, and its files' checksums."""

REPORT_VERSION = 3
"""Raised when what is written of the same cells changes."""

PAGE_FILE = "report.html"
"""What is to be read of them, made from the other files: it has no checksum among theirs."""

CONFIG_FILE, FAILED_FILE = "config.json", "failed.json"
ROWS_FILE, SUMMARY_FILE = "measurements.parquet", "summary.csv"
ORIGIN_FILE, ROCS_FILE = "origin.json", "rocs.json"
ROBUSTNESS_FILE = "robustness.parquet"

SCORES_ORDER = "order"
"""Of a file of scores, the metadata that list its tensors in the order of the scores."""


def scores_file(task: TaskKey, seed: int) -> str:
    """Where the scores of a task and seed are in the folder."""
    return f"scores/{slug(task)}-seed-{seed}.safetensors"


def examples_file(task: TaskKey) -> str:
    """Where the example prompts of a task are in the folder."""
    return f"examples/{slug(task)}.json"


# ---------------------------------------------------------------------------- the report


def write_report_file(folder: Path, of: Mapping[str, Any]) -> None:
    """Say what results are `of`, with the checksums of all files in their folder."""
    files = {
        str(path.relative_to(folder)): digest(path.read_bytes())
        for path in files_in(folder)
    }
    report = {**of, "files": files}
    report = {"checksum": checksum(report), **report}
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1))


def files_in(folder: Path) -> list[Path]:
    """All files of a folder and its folders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_report_file(folder: Path) -> dict[str, Any]:
    """{} if there is none, or it is not as it was written."""
    try:
        report = json.loads((folder / REPORT_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return report if is_sound_report(report) else {}


def is_sound_report(report: Any) -> bool:
    """Is the content of a REPORT_FILE as it was written?"""
    if not isinstance(report, dict):
        return False
    rest = {name: value for name, value in report.items() if name != "checksum"}
    return report.get("checksum") == checksum(rest)


# ----------------------------------------------------------------- tests of robustness


def robustness_beside(config: ExperimentConfig) -> list[RobustnessRow]:
    """What tests of robustness in the same `out` say of the same tasks; of each the last.

    What is damaged, or of another version, is left out.
    """
    rows: dict[TaskKey, list[RobustnessRow]] = {}
    for folder, report in _robustness_folders(config):
        found = _sound_robustness_rows(folder, report)
        for task in dict.fromkeys(row.task for row in found):
            rows[task] = [row for row in found if row.task == task]
    return [row for task in config.tasks for row in rows.get(task, [])]


def _robustness_folders(
    config: ExperimentConfig,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The last written one last."""
    if config.is_remote:
        return
    reports = config.folder.parent.glob(f"[!.]*/{REPORT_FILE}")
    for path in sorted(reports, key=lambda path: (path.stat().st_mtime_ns, path)):
        report = read_report_file(path.parent)
        is_of_this_version = report.get("report") == REPORT_VERSION
        if is_of_this_version and ROBUSTNESS_FILE in report["files"]:
            yield path.parent, report


def _sound_robustness_rows(
    folder: Path, report: Mapping[str, Any]
) -> list[RobustnessRow]:
    try:
        content = (folder / ROBUSTNESS_FILE).read_bytes()
    except OSError:
        return []
    if digest(content) != report["files"][ROBUSTNESS_FILE]:
        return []
    return robustness_rows_of(content)


def robustness_rows_of(content: bytes) -> list[RobustnessRow]:
    """The rows of a ROBUSTNESS_FILE. Raises DataError for anything else."""
    import pandas

    try:
        table = pandas.read_parquet(io.BytesIO(content))
        return [RobustnessRow(**row) for row in table.to_dict("records")]  # type: ignore[arg-type]
    except (ValueError, TypeError, OSError) as error:
        raise DataError(f"These are no rows of robustness: {error}.") from error


# ------------------------------------------------------------------------------ the page


def signed(page: str) -> str:
    """A page with its own checksum at its end."""
    return f"{page}<!-- {digest(page.encode())} -->\n"


def is_sound_page(path: Path, made_from: str) -> bool:
    """Is a page as it was written, and made from this?"""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    page, _, _ = text.rpartition("<!-- ")
    return text == signed(page) and f'content="{made_from}"' in page[:2000]


def made_from(config: ExperimentConfig, report: Mapping[str, Any], version: str) -> str:
    """What a page of these results is made from, in a word that changes with it.

    version: of what makes pages.
    """
    is_of_robustness = ROBUSTNESS_FILE in report.get("files", {})
    folders = [] if is_of_robustness else _robustness_folders(config)
    others = [other["checksum"] for _, other in folders]
    return checksum([version, report.get("checksum"), others])[:16]
