"""The examples: each runs, prints what it says, and holds the code of CONTRIBUTING's recipe."""

from __future__ import annotations

import ast
import json
import re
import runpy
from itertools import pairwise
from pathlib import Path

import pytest

from tests.test_recipes import Recipe, recipes

REPO = Path(__file__).resolve().parents[1]
EXAMPLES = REPO / "examples"
NAMES = {
    "PRUNE_ALGOS": "algorithm",
    "PRUNE_METRICS": "metric",
    "TASKS": "task",
    "ADAPTERS": "architecture",
}
"""The tuple that a recipe adds to -> its example."""


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.slow
def test_an_algorithm_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(
        r"(.+): (\d+) edges do ([\d.]+) % of the task", printed("algorithm", capsys)
    )
    by_algo = {
        algo: [(int(n), float(percent)) for name, n, percent in lines if name == algo]
        for algo in ("Halfway Gradient", "EAP")
    }
    assert sum(map(len, by_algo.values())) == len(lines)
    for points in by_algo.values():
        sizes, percents = zip(*points, strict=True)
        assert sizes == (10, 50, 200, 1519)
        assert 30 < percents[0] < percents[1] < percents[2] < percents[3] == 100
    assert by_algo["EAP"] != by_algo["Halfway Gradient"]


@pytest.mark.slow
def test_a_metric_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("metric", capsys).replace(",", "")
    lines = re.findall(r"(\d+) edges: the right name is (\d+) times as likely", out)
    assert [int(n) for n, _ in lines] == [0, 50, 200, 1519]
    ratios = [int(ratio) for _, ratio in lines]
    assert 1 < ratios[0] and all(10 * ratios[0] < ratio for ratio in ratios[1:])


def test_a_task_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("task", capsys).splitlines()
    assert out[0] == "4 prompts to find a circuit, 4 to test it, such as"
    prompt = re.match(r"  After .* arrived at the store, (\w+) handed .* (\w+)$", out[1])
    assert prompt and prompt[1] != prompt[2] and out[1] != out[2]
    edges = [re.fullmatch(r"  ([^:]+->[^:]+): (-?[\d.]+)", line) for line in out[4:]]
    sizes = [abs(float(edge[2])) for edge in edges if edge]
    assert len(sizes) == 5 and sizes == sorted(sizes, reverse=True)


def test_a_model_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    out = dict(line.split(": ") for line in printed("architecture", capsys).splitlines())
    clean, corrupt = (json.loads(out[name]) for name in ("Clean", "Corrupt"))
    # Each of two layers multiplies by [5, 7], and what comes out is doubled.
    assert clean == [2 * 25 * 1, 2 * 49 * 2] and corrupt == [2 * 25 * 3, 2 * 49 * -1]
    assert json.loads(out["All edges patched"]) == corrupt
    # Head B0.0 gives [1, 2] times its input: [3, -2] in place of [1, 4].
    one = json.loads(out["Edge B0.0->Resid End patched"])
    assert one == [clean[0] + 2 * (3 - 1), clean[1] + 2 * (-2 - 4)]
    assert out["Edges"].startswith("Resid Start->B0.0, ")


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.tuple_name)
def test_the_code_of_a_recipe_is_that_of_its_example(recipe: Recipe) -> None:
    name = NAMES[recipe.tuple_name]
    if recipe.tuple_name == "TASKS":
        assert (EXAMPLES / "store_prompts.json").read_text() == recipe.text
        return
    text = (EXAMPLES / f"{name}.py").read_text()
    doc, *statements = parts(recipe.text)
    assert text.startswith(doc.removesuffix('"""'))
    there = parts(text)
    assert [part for part in there if part in statements] == statements


def parts(code: str) -> list[str]:
    """The statements of a module, with their decorators and the comments above them."""
    lines = code.splitlines()
    ends = [0, *(node.end_lineno or 0 for node in ast.parse(code).body)]
    return ["\n".join(lines[last:end]).strip() for last, end in pairwise(ends)]


def test_every_example_is_named_where_its_recipe_is() -> None:
    page = (REPO / "CONTRIBUTING.md").read_text()
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".json")}
    linked = set(re.findall(r"\]\(examples/([^)]+)\)", page))
    assert (
        linked
        == files
        == {f"{name}.py" for name in NAMES.values()} | {"store_prompts.json"}
    )
