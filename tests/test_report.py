"""The report: what stands in the page, from where, and what becomes of damaged results."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch as t

from auto_circuit import experiments
from auto_circuit.errors import ConfigError, DataError
from auto_circuit.files import checksum
from auto_circuit.metrics.paired_comparisons import Comparison
from auto_circuit.prune_algos.prune_algos import find_prune_algo
from auto_circuit.report_page import words, writing
from auto_circuit.report_page.figures import zipped_plotly_js
from auto_circuit.report_page.page import PageData, report_page
from auto_circuit.report_page.words import Facts, command_line, verdict
from auto_circuit.report_page.writing import GrowingPage
from auto_circuit.reports import write_results, write_robustness
from auto_circuit.results_folder import REPORT_VERSION
from auto_circuit.stored_report import stored_report
from auto_circuit.summary import ExperimentResults
from auto_circuit.sweep_config import ExperimentConfig
from auto_circuit.types import AblationType, PatchType
from tests.stub_results import (
    N_EDGES,
    TOKENS,
    robustness_stub,
    stub_config,
    stub_folder,
    stub_results,
)

HOSTILE = "<script>alert('x')</script> \"q\" & 🐈 שלום {{ 7 * 7 }}"
TASKS = ("Pocket IOI", HOSTILE)
ALGOS = ("EAP", "Random", "ACDC quick")


class Page(HTMLParser):
    """A page as a browser without JavaScript has it: its tables, texts and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "hr", "input"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} closes another"

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts.append(data)
        if {"script", "style"} & {*self._open}:
            return
        self.text += data
        if {"td", "th"} & {*self._open}:
            self.tables[-1][-1][-1] += data
        if "h2" in self._open:
            self.headings[-1] += data

    def table(self, *titles: str) -> list[list[str]]:
        """The rows of the table whose first columns have these titles."""
        (found,) = [rows for rows in self.tables if rows[0][: len(titles)] == [*titles]]
        return found[1:]


@pytest.fixture(scope="module", autouse=True)
def without_plotly() -> Iterator[None]:
    """Plotly's library has 5 MB, which nobody reads here."""
    with pytest.MonkeyPatch.context() as patched:
        for place in ("plotly.offline.get_plotlyjs", "plotly.io._html.get_plotlyjs"):
            patched.setattr(place, lambda: "/* Plotly */")
        zipped_plotly_js.cache_clear()
        yield
    zipped_plotly_js.cache_clear()


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> ExperimentResults:
    """Results of two tasks, with their folder, their store, and a test of robustness."""
    out = tmp_path_factory.mktemp("report") / "results"
    config = stub_config(out, TASKS, ALGOS)
    results = stub_results(config, tokens=(*TOKENS[:-1], HOSTILE))
    of_robustness = replace(results.config, name="robust", circuit_shares=(0.01, 0.1))
    out.mkdir()
    write_robustness(of_robustness, robustness_stub(TASKS), [find_prune_algo("EAP")])
    stub_folder(results)
    return results


@pytest.fixture(scope="module")
def text(swept: ExperimentResults) -> str:
    return (swept.config.folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


# --------------------------------------------------------------------- what stands in it


def test_the_page_reads_from_the_question_to_how_to_reproduce_it(page: Page) -> None:
    assert page.headings == [
        "What was asked",
        "The verdict",
        "Summary",
        "Faithfulness",
        "Areas: CPR and CMD",
        "The true edges: ROC",
        "Agreement of algorithms",
        "Stability over prompts and seeds",
        "The six choices of a test",
        "The circuits",
        "How to reproduce it",
    ]
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {link[1:] for link in links if link} <= ids
    assert "The cat sat" in page.text and "still growing" not in page.text


def test_the_page_asks_nothing_of_the_network(page: Page) -> None:
    for tag, attrs in page.tags:
        assert "src" not in attrs and tag not in ("iframe", "img", "object"), tag
        target = attrs.get("href") or "#"
        assert target.startswith("#") or target == "data:,", target
    assert "@import" not in page.text and "url(" not in page.text


def test_hostile_texts_are_texts(page: Page, text: str) -> None:
    assert HOSTILE in page.text and "49" not in re.findall(r"שלום (\d+)", text)
    data = [json.loads(script) for script in page.scripts if script[0] == "{"]
    figures = [one for one in data if "layout" in one]
    # Besides: the explorer and its data, Plotly, and the page's own script.
    assert len(figures) == 6 and len(page.scripts) == len(figures) + 4
    assert text.count("<script>") == 1 and text.count("</script") == len(page.scripts)
    assert "&lt;script&gt;" in json.dumps(figures)
    assert "<script" not in json.dumps(figures)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_the_summarys_numbers_are_those_of_the_file(
    swept: ExperimentResults, page: Page
) -> None:
    with open(swept.config.folder / "summary.csv", newline="") as file:
        expected = list(csv.DictReader(file))
    rows = page.table("Task", "Algorithm", "Seeds")
    assert len(rows) == len(expected) == len(TASKS) * len(ALGOS)
    for row, of_file in zip(rows, expected, strict=True):
        assert row[:3] == [of_file["task"], of_file["algorithm"], of_file["n_seeds"]]
        columns = {"edges_for_80_percent": (3, 0), "area": (4, 3), "off": (5, 3)}
        for name, (column, digits) in columns.items():
            assert row[column] == shown(of_file, name, digits), name
        assert row[-2:] == ["1.5", "1.00"]  # seconds, GiB


def shown(row: dict[str, str], name: str, digits: int) -> str:
    if not row[name]:
        return "–"
    mean, half = f"{float(row[name]):,.{digits}f}", row[f"{name}_plus_minus"]
    return f"{mean} ± {float(half):,.{digits}f}" if half else mean


def test_the_numbers_behind_the_curves_are_the_measurements(
    swept: ExperimentResults, page: Page
) -> None:
    tables = [rows for rows in page.tables if rows[0] == ["Edges", *ALGOS]]
    assert len(tables) == len(TASKS)
    for task, (_, *rows) in zip(TASKS, tables, strict=True):
        for size, eap, _, once in rows:
            of = [r for r in swept.rows if r.task == task and r.n_edges == int(size)]
            one, two = (r.value for r in of if r.algo == find_prune_algo("EAP").key)
            assert float(eap.split(" ± ")[0]) == pytest.approx((one + two) / 2, rel=1e-3)
            half = float(eap.split(" ± ")[1])
            assert half == pytest.approx(12.706 * abs(one - two) / 2, rel=0.05)
            (alone,) = (r.value for r in of if r.algo == find_prune_algo(ALGOS[-1]).key)
            assert float(once) == pytest.approx(alone, rel=1e-3)


def test_agreement_and_stability_are_of_the_scores(
    swept: ExperimentResults, page: Page
) -> None:
    tables = [rows for rows in page.tables if rows[0] == ["Algorithm", *ALGOS]]
    run, again = swept.runs[0], swept.runs[1]
    caption = re.search(r"Jaccard index of circuits of (\d+) edges", page.text)
    assert caption is not None and (size := int(caption[1])) < N_EDGES
    circuits = {one.name: top(one.scores, size) for one in run.found}
    for name, *cells in tables[0][1:]:
        expected = [jaccard(circuits[name], other) for other in circuits.values()]
        assert cells == [f"{one:.2f}" for one in expected]
    stable = [rows for rows in page.tables if rows[0][:2] == ["Algorithm", "Seeds"]]
    name, n_seeds, found, _ = stable[0][1]
    assert (name, n_seeds) == (again.found[0].name, "2")
    assert found == f"{jaccard(circuits[name], top(again.found[0].scores, size)):.2f}"


def top(scores: dict[str, Any], size: int) -> set[tuple[str, int]]:
    flat = {
        (name, place): abs(float(value))
        for name, of_module in scores.items()
        for place, value in enumerate(of_module.flatten())
    }
    return {*sorted(flat, key=lambda place: -flat[place])[:size]}


def jaccard(one: set[Any], two: set[Any]) -> float:
    return len(one & two) / len(one | two)


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    config = replace(stub_config(tmp_path, TASKS[:1], ("EAP", "Random")), n_seeds=1)
    results = stub_results(config)
    names = {find_prune_algo(name).key: name for name in config.algos}
    alone = Page(report_page(PageData(results, names)))
    assert "nothing is known of how its circuit changes" in alone.text
    assert "They were not tested for these tasks" in alone.text


# -------------------------------------------------------------------------- the verdicts


def row(algorithm: str, edges: float, half: float = 5.0) -> dict[str, Any]:
    return {
        **{"task": "T", "algorithm": algorithm, "area": 0.5},
        **{"edges_for_80_percent": edges, "edges_for_80_percent_plus_minus": half},
    }


def pair(p_holm: float, difference: float = -10.0, best: float = 0.001) -> Comparison:
    return Comparison(
        *("edges_for_80_percent", "EAP", "Act Mag", difference),
        *(2.0, 9, 0, 1, 0, 1, p_holm),
        p_holm=p_holm,
        best_p_holm=best,
        n_compared=1,
    )


@pytest.mark.parametrize(
    ("rows", "comparisons", "expected"),
    [
        (
            [row("Act Mag", 70), row("EAP", 60)],
            [pair(0.01)],
            "On T, EAP does best: 60 ± 5 of 1,519 edges do 80 % of the task; that is fewer "
            "than the runner-up, Act Mag (70 ± 5) needs, by more than chance: over the 9 "
            "draws of prompts of all tasks, p = 0.01.",
        ),
        (
            [row("EAP", 60), row("Act Mag", 70)],
            [pair(0.4)],
            "it is not told apart from the runner-up, Act Mag (70 ± 5): over the 9 draws of "
            "prompts of all tasks, p = 0.4.",
        ),
        (
            [row("EAP", 60), row("Act Mag", 70)],
            [pair(0.4, best=0.2)],
            "whether that is better than the runner-up, Act Mag (70 ± 5) cannot be told from "
            "the 9 draws of prompts that both ran on.",
        ),
        (
            [row("EAP", 60), row("Act Mag", 70)],
            [pair(0.0001, difference=10.0)],
            "but over the 9 draws of prompts of all tasks, p < 0.001, it is Act Mag (70 ± 5 "
            "here) that needs fewer.",
        ),
        ([row("EAP", 1519)], [], "no algorithm finds a circuit smaller than the whole"),
        ([row("GT", 10), row("EAP", 60)], [], "On T, EAP does best"),
        ([row("EAP", float("nan"))], [], "no algorithm finds a circuit smaller"),
    ],
)
def test_verdicts(
    rows: list[dict[str, Any]], comparisons: list[Comparison], expected: str
) -> None:
    found = verdict("T", Facts(rows, {"T": 1519}, comparisons, ExperimentConfig()))
    assert expected in found.sentence
    of_known = "With the true edges ranked first (GT), 10 ± 5 are needed."
    assert (of_known in found.more) == (rows[0]["algorithm"] == "GT")


def test_no_verdict_without_percentages() -> None:
    config = ExperimentConfig(metrics=("Logit Diff",))
    found = verdict("T", Facts([row("EAP", float("nan"))], {}, [], config))
    assert "no verdict" in found.sentence and "`metrics`" in found.sentence


@pytest.mark.parametrize("ablation", AblationType)
def test_every_choice_has_words(ablation: AblationType) -> None:
    for patch_type in PatchType:
        config = ExperimentConfig(ablation=ablation, patch_type=patch_type)
        assert all(choice.words for choice in words.choices_in_words(config))


@pytest.mark.parametrize(
    ("experiment", "changes"),
    [
        ("sweep", {}),
        ("sweep", {"tasks": ("Pocket IOI",), "algos": ("EAP", "EAP-IG inputs")}),
        ("sweep", {"ablation": AblationType.ZERO, "patch_type": PatchType.EDGE_PATCH}),
        ("sweep", {"nodes": True, "mean_of_ratios": True, "once": ()}),
        ("sweep", {"circuit_shares": (0.1, 0.5), "token_positions": False, "seed": 7}),
        ("sweep", {"algos": ("EAP", "PEAP"), "spans": True, "crossing": True}),
        ("robustness", {"metrics": ("Logit Diff Percent",), "n_seeds": 1}),
        ("robustness", {"token_positions": True, "circuit_shares": (0.05,)}),
    ],
)
def test_the_command_line_asks_the_same(
    experiment: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = ExperimentConfig(**changes, out=tmp_path)
    typed = shlex.split(command_line(config, experiment))[2:]
    name, parsed, _ = experiments.parse(typed)
    assert name == experiment and parsed.digest == config.digest
    assert str(parsed.out) == str(tmp_path)


# ------------------------------------------------------------------- made again, damaged


@pytest.fixture
def copy(swept: ExperimentResults, tmp_path: Path) -> Path:
    """A copy of all that is stored, to be damaged; the results' folder in it."""
    shutil.copytree(swept.config.out, tmp_path / "results", copy_function=os.link)
    return tmp_path / "results" / swept.config.folder.name


def report(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says."""
    experiments.main(["report", str(folder)])
    return capsys.readouterr().out


def test_it_is_made_again_from_what_is_stored(
    swept: ExperimentResults, text: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "report.html").unlink()
    said = report(copy, capsys)
    assert said == f"Report: {copy}/report.html\n"
    assert same_but_place((copy / "report.html").read_text(), text)


def same_but_place(one: str, two: str) -> bool:
    def without(page: str) -> str:
        page = re.sub(r"<!-- \w+ -->", "", page)
        return re.sub(r"--out .*?</code>", "", page)

    return without(one) == without(two)


def test_nothing_is_written_again_but_a_page_that_is_not_sound(
    swept: ExperimentResults,
) -> None:
    folder, algos = swept.config.folder, [find_prune_algo(name) for name in ALGOS]
    path = folder / "report.html"
    before = path.read_text()
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    write_results(swept, [], algos)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == times
    path.write_text(before.replace("Circuits of", "Circles of"))
    write_results(swept, [], algos)
    assert path.read_text() == before


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # the copy's name of a file that it shares
    path.write_bytes(content)


def of_cell(copy: Path, kind: str, label: str) -> list[Path]:
    """The files of a cell."""
    folder = copy.parent / "cells" / kind
    (manifest,) = [
        path
        for path in folder.glob("*.json")
        if json.loads(path.read_text())["label"] == label
    ]
    return sorted(folder.glob(f"{manifest.stem}*"))


EAP = "Pocket IOI, seed 43, EAP"


@pytest.mark.parametrize(
    ("kind", "place", "damage"),
    [
        ("scores", 0, flipped),
        ("scores", 1, Path.unlink),
        ("measurements", 1, flipped),
    ],
)
def test_a_damaged_cell_is_named_and_the_rest_is_there(
    kind: str,
    place: int,
    damage: Callable[[Path], None],
    copy: Path,
    swept: ExperimentResults,
) -> None:
    label = f"{EAP}: {kind}"
    damage(of_cell(copy, kind, label)[place])
    found = stored_report(copy)
    assert len(found.damaged) == 1 and label in found.damaged[0]
    assert same(found.results, swept)


def same(one: ExperimentResults, two: ExperimentResults) -> bool:
    """Are all measurements, scores and ROCs the same?"""
    return one.rows == two.rows and all(
        run.measured == other.measured
        and all(
            t.equal(run.scores[algo][module], scores[module])
            for algo, scores in other.scores.items()
            for module in scores
        )
        for run, other in zip(one.runs, two.runs, strict=True)
    )


def test_what_is_damaged_stands_on_the_screen_and_in_the_page(
    copy: Path, page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    flipped(of_cell(copy, "measurements", f"{EAP}: measurements")[0])
    flipped(copy / "scores" / "pocket-ioi-seed-42.safetensors")
    said = report(copy, capsys)
    assert said.count("Damaged:") == 2 and f"Damaged: {EAP}: measurements" in said
    found = Page((copy / "report.html").read_text())
    assert EAP in found.text and "Not all stored results" in found.text
    assert "Pocket IOI, seed 42, all algorithms: scores" in found.text
    assert found.tables == page.tables


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("measurements.parquet", "All measurements"),
        ("scores/pocket-ioi-seed-43.safetensors", "Pocket IOI, seed 43, all algorithms"),
        ("rocs.json", "rocs.json"),
        ("summary.csv", "The summary"),
    ],
)
def test_what_the_folder_has_lost_the_cells_give(
    name: str, named: str, copy: Path, swept: ExperimentResults
) -> None:
    flipped(copy / name)
    found = stored_report(copy)
    assert len(found.damaged) == 1 and found.damaged[0].startswith(named)
    assert same(found.results, swept)


def test_without_store_and_measurements_the_summary_is_there(
    copy: Path, swept: ExperimentResults
) -> None:
    shutil.rmtree(copy.parent / "cells")
    flipped(copy / "measurements.parquet")
    found = stored_report(copy)
    assert found.damaged[0].startswith("All measurements")
    assert list(found.results.summary["area"]) == list(swept.summary["area"])
    assert found.results.runs == []


def other_version(folder: Path) -> None:
    path = folder / "report.json"
    content = {**json.loads(path.read_text()), "report": REPORT_VERSION + 1}
    content.pop("checksum")
    path.unlink()
    path.write_text(json.dumps({"checksum": checksum(content), **content}))


def only_a_page(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "report.html").write_text("growing")


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (shutil.rmtree, ConfigError, "There are no results"),
        (other_version, ConfigError, f"version {REPORT_VERSION + 1}.*Run the same"),
        (only_a_page, ConfigError, "has not finished. Run the same command"),
        (lambda f: flipped(f / "report.json"), DataError, "report.json is damaged"),
        (lambda f: flipped(f / "config.json"), DataError, "config.json is damaged"),
    ],
    ids=["none", "version", "unfinished", "report", "config"],
)
def test_what_is_no_result_is_one_line(
    damage: Callable[[Path], None],
    error: type[Exception],
    said: str,
    copy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(copy)
    with pytest.raises(error, match=said):
        stored_report(copy)
    for args in (["report", str(copy)], ["compare", str(copy), str(copy)], ["report"]):
        with pytest.raises(SystemExit) as stop:
            experiments.main(args)
        assert "\n" not in str(stop.value.code)
    assert not capsys.readouterr().out


def test_a_test_of_robustness_has_a_report_too(
    swept: ExperimentResults, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (folder,) = Path(swept.config.out).glob("robust-*")
    text = (folder / "report.html").read_text()
    assert "--circuit-shares 0.01 0.1" in Page(text).text
    assert Page(text).table("Choice", "Value")
    experiments.main(["report", str(folder), "--out", str(tmp_path / "own.html")])
    assert (tmp_path / "own.html").read_text() == text


# ------------------------------------------------------------------------------- growing


def test_the_page_grows_while_the_sweep_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stub_config(tmp_path, TASKS, ALGOS)
    algos = [find_prune_algo(name) for name in ALGOS]
    whole = stub_results(config)
    growing = GrowingPage(config, algos, 3)
    now = 100.0
    monkeypatch.setattr(writing.time, "monotonic", lambda: now)
    path = config.folder / "report.html"
    growing.begin(lambda: replace(whole, runs=[], summary=whole.summary[:0]))
    assert "0 of 3 cells" in Page(path.read_text()).text
    growing.ended(lambda: whole)
    assert "0 of 3 cells" in path.read_text()  # ten seconds have not passed
    now += 11.0
    growing.ended(lambda: whole)
    text = Page(path.read_text()).text
    assert "still growing" in text and "2 of 3 cells" in text and "does best" in text
    now += 11.0
    growing.ended(lambda: whole)
    assert "2 of 3 cells" in path.read_text()  # the last one is of the finished sweep
    (config.folder / "report.json").write_text("{}")  # all results are there
    path.write_text("finished")
    GrowingPage(config, algos, 3).begin(lambda: whole)
    assert path.read_text() == "finished"


def test_pages_take_little_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stub_config(tmp_path, TASKS, ALGOS)
    results = stub_results(config)
    clock = iter(range(0, 100_000, 10))  # ten seconds between two looks
    monkeypatch.setattr(writing.time, "monotonic", lambda: float(next(clock)))
    growing = GrowingPage(config, [], 1000)
    pages: list[float] = []
    monkeypatch.setattr(writing, "report_page", lambda data: pages.append(1) or "")
    for _ in range(100):
        growing.ended(lambda: results)
    assert 1 <= len(pages) <= 1 + 100 * 10 * writing.SHARE_OF_PAGES / 10


# ------------------------------------------------------------------------- two runs


def test_two_runs_side_by_side(
    swept: ExperimentResults,
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    config = replace(swept.config, out=tmp_path / "other", seed=43, n_seeds=1)
    other = stub_folder(stub_results(config))
    experiments.main(
        ["compare", str(copy), str(other), "--out", str(tmp_path / "c.html")]
    )
    said = capsys.readouterr().out
    assert f"Comparison: {tmp_path}/c.html" in said and " Area " in said
    found = Page((tmp_path / "c.html").read_text())
    assert ["seed", "42", "43"] in found.table("Field", "First", "Second")
    rows = found.table("Task", "Algorithm", "Number")
    area = {tuple(one[:2]): one for one in rows if one[2] == "Area"}
    for task, algo in area:
        expected = [
            shown_area(results.summary, task, algo)
            for results in (swept, stub_results(config))
        ]
        assert area[task, algo][3:5] == expected
    experiments.main(["compare", str(copy), str(copy)])
    assert (copy.parent / f"compare-{copy.name}-{copy.name}.html").exists()


def shown_area(summary: Any, task: str, algo: str) -> str:
    (found,) = summary[(summary.task == task) & (summary.algorithm == algo)].to_dict(
        "records"
    )
    row = {name: "" if value != value else str(value) for name, value in found.items()}
    return shown(row, "area", 3)
